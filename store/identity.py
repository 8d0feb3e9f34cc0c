"""Tell whether things belong together: fingerprints of models, and checks of an SAE before its use.

    fingerprint(unet)                               # "0f3a...-91bc...": of its settings and weights
    activations = activations_of(sae, "saes/mine")  # the files it was trained on, checked
    check_belongs("saes/mine", sae.cfg, model=hooked)       # UsageError if the weights are others

Names and paths do not tell: other weights come under the same name, and other activations lie at
the same path. So a collection says which weights made it, an SAE says what it was trained on
(`provenance` in activation_file.py), and `check_belongs` compares them wherever two things meet.

Parameters named `sae` take an `Sae`, those named `model` a `HookedDiffusionModel`. They have no
type here, because sae.py and hook.py import this folder and not the reverse.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from errors import UsageError
from store.activation_file import (
    ActivationFile,
    collected_with,
    differences,
    refuse_unfinished,
)
from store.dataset import Activations, open_activations

SAMPLED = 64  # values of each tensor, evenly spaced, that a fingerprint looks at one by one
WORD = torch.int64  # tensors are also summed as such words, which wrap around


# ---- models


def fingerprint(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return a digest of a module: "<16 hex digits of structure>-<16 hex digits of values>".

    The structure is names, shapes and settings. Of each tensor, 64 evenly spaced values are looked
    at, those behind its last whole word, and the wrapping sum of all words, so that a single other
    value is seen. A billion float32 parameters take a fifth of a second on a CPU core.

    dtype: floating-point values are cast to it first, so that a model loaded in float32 can be
    compared with one that was loaded in bfloat16. If values lie elsewhere (on the meta device, by
    sequential offloading), the second half is empty.
    """
    tensors = {}
    for name, tensor in module.state_dict().items():
        name = name.replace("_orig_mod.", "")  # a prefix that torch.compile adds
        tensors |= plain_tensors(name, tensor)
    return fingerprint_tensors(tensors, dtype, settings_text(module))


def plain_tensors(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return {name: tensor}; of a quantized tensor its parts, such as {"a.scale": ..., ...}."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    tensors = {}
    for part in tensor.__tensor_flatten__()[0]:
        tensors |= plain_tensors(f"{name}.{part}", getattr(tensor, part))
    return tensors


@torch.no_grad()
def fingerprint_tensors(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None, settings: str = ""
) -> str:
    """Return the `fingerprint` of a module with these tensors and these settings.

    It is "<16 hex digits of names, shapes and settings>-<16 hex digits of values>". Without values,
    as on the meta device, nothing stands behind the dash. dtype: round the values to it first.
    """
    structure = hashlib.sha256(settings.encode())
    values = hashlib.sha256()
    are_known = True
    for name in sorted(tensors):
        tensor = tensors[name]
        structure.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if tensor.device.type == "meta":
            are_known = False
        elif tensor.numel():
            values.update(digest_values(tensor, dtype))
    values_digest = values.hexdigest()[:16] if are_known else ""
    return f"{structure.hexdigest()[:16]}-{values_digest}"


def digest_values(tensor: torch.Tensor, dtype: torch.dtype | None) -> bytes:
    """Return the sampled values of a tensor as bytes, and the sum of its words as digits.

    The words are of 8 bytes; the values of a last word that is not whole are sampled instead.
    """
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    flat = tensor.detach().contiguous().flatten()
    if flat.storage_offset():  # a part of another tensor, which may not begin at a word
        flat = flat.clone()
    values_per_word = max(1, WORD.itemsize // flat.element_size())
    num_in_words = len(flat) // values_per_word * values_per_word
    total = 0
    if num_in_words:
        total = int(flat[:num_in_words].view(WORD).sum())
    spaced = torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64).long()
    indices = torch.cat([spaced, torch.arange(num_in_words, len(flat))])
    sampled = flat[indices.to(flat.device)].cpu()
    return sampled.view(torch.uint8).numpy().tobytes() + str(total).encode()


def settings_text(component: object) -> str:
    """Return the settings of a diffusers or transformers component as JSON; "" without settings.

    Settings that have the default of the component's class are left out, so that a version of the
    library whose classes have more settings gives the same text. How it was loaded is left out too.
    """
    config = getattr(component, "config", None)
    if hasattr(config, "to_diff_dict"):  # transformers
        settings = config.to_diff_dict()
    elif isinstance(config, Mapping):  # diffusers
        parameters = inspect.signature(type(component).__init__).parameters
        settings = {}
        for name, value in config.items():
            default = parameters[name].default if name in parameters else None
            if as_json(value) != as_json(default):
                settings[name] = value
    else:
        return ""
    left_out = ("dtype", "torch_dtype", "transformers_version", "architectures")
    chosen = {}
    for name, value in settings.items():
        if not name.startswith("_") and name not in left_out:
            chosen[name] = value
    return json.dumps(chosen, sort_keys=True, default=str) if chosen else ""


def as_json(value: object) -> object:
    """Return a setting as it comes back from a file: a tuple (1, 2) becomes the list [1, 2]."""
    return json.loads(json.dumps(value, default=str))


def pipeline_fingerprints(pipe: object, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Return {component: fingerprint} of all that decides what a pipeline computes.

    These are modules, settings of schedulers, and vocabularies of tokenizers. A pipeline without
    `components` gives {}.
    """
    fingerprints = {}
    for name, component in sorted(getattr(pipe, "components", {}).items()):
        if isinstance(component, nn.Module):
            fingerprints[name] = fingerprint(component, dtype)
            continue
        if callable(getattr(type(component), "step", None)):  # a scheduler
            text = type(component).__name__ + settings_text(component)
        elif callable(getattr(component, "get_vocab", None)):  # a tokenizer
            text = json.dumps(component.get_vocab(), sort_keys=True)
        else:
            continue
        fingerprints[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return fingerprints


def same_weights(one: str, other: str) -> bool | None:
    """Return whether two fingerprints come from the same weights.

    None: the structure is the same, and the values of one of them are not known. For "ab-12" and
    "ab-34" it gives False, for "ab-12" and "ab-" None.
    """
    structure, values = one.split("-")
    other_structure, other_values = other.split("-")
    if structure != other_structure:
        return False
    if not values or not other_values:
        return None
    return values == other_values


def origin(cfg: dict, description: dict) -> dict:
    """Return which model, with which options, made an SAE's training vectors.

    description: what lies beside its training data, and is returned if it is not {}. Else the
    answer is in cfg, its cfg.json. Raises UsageError if neither says it.
    """
    if description:
        return description
    if "collected_with" not in cfg:
        data = ", ".join(cfg.get("data") or ["activations"])
        raise UsageError(
            f"{data}: no description of collect.py is there, "
            "and the SAE does not say which model it belongs to"
        )
    return cfg["collected_with"] | {"model": cfg["model_name"]}


# ---- the check


class Finding(NamedTuple):
    """A difference that a comparison found, or something that it could not compare."""

    text: str
    is_wrong: bool
    """True: a difference. False: it can't be checked."""


def check_belongs(
    name: str,
    cfg: dict,
    source: ActivationFile | None = None,
    model=None,
    transfer: bool = False,
) -> list[str]:
    """Raise UsageError unless the SAE `name` was trained for what it is about to be used on.

    cfg: its cfg.json. It meets either a `source` or a `model`. Returns [] if they belong together.
    With `transfer` differences are no error: they are printed in one line and returned, so that the
    results can say them too. What can't be checked, as for SAEs of other packages, and how else the
    activations were collected, is printed in one line each.
    """
    if source is not None:
        meeting = str(source.path)
        findings = compare_hook_points(cfg, source.meta)
        findings += compare_weights(cfg, source.meta)
        say_what_differs(cfg, meeting, source.meta)
    else:
        meeting = "the model"
        findings = compare_with_model(cfg, model)

    wrong = [finding.text for finding in findings if finding.is_wrong]
    unknown = [finding.text for finding in findings if not finding.is_wrong]
    if wrong and not transfer:
        raise UsageError(
            f"{name} does not belong to {meeting}: {'; '.join(wrong)}. "
            "To use it there on purpose: --transfer"
        )
    if wrong:
        print(f"note: transfer of {name} to {meeting}: {'; '.join(wrong)}")
    if unknown:
        print(f"note: {name} and {meeting}: it can't be checked {', '.join(unknown)}")
    return wrong


def say_what_differs(cfg: dict, path: str, meta: dict) -> None:
    """Print one line if a file is not one of those that an SAE was trained on.

    The line says how else it was collected, or that it has other prompts. meta: its description.
    """
    if "collected_with" not in cfg or meta.get("id") in cfg.get("collections", []):
        return
    others = differences(cfg["collected_with"], collected_with(meta))
    if others:
        print(
            f"note: {path} was collected otherwise than the SAE's training vectors: "
            f"{'; '.join(others)}"
        )
    elif meta:
        print(
            f"note: {path} has other prompts than when the SAE was trained: "
            "it was extended, or collected anew"
        )


def compare_hook_points(cfg: dict, meta: dict) -> list[Finding]:
    """Return in what the hook point of a file's description differs from that of an SAE's training.

    There is one Finding for each of hook_name, side, stream and rows that differs (`is_wrong`), or
    that one of the two does not say. cfg: of the SAE. meta: the description.
    """
    findings = []
    training = cfg.get("training") or {}
    for key in ("hook_name", "side", "stream", "rows"):
        is_said = "side" in cfg
        if key == "hook_name" and "digest" in training:  # train.py has always said this one
            is_said = is_said or bool(cfg.get(key))
        if not is_said or key not in meta:
            findings.append(Finding(f"whether the {key} is the same", is_wrong=False))
        elif cfg[key] != meta[key]:
            text = f"{key} {meta[key]!r}, and the SAE was trained on {cfg[key]!r}"
            findings.append(Finding(text, is_wrong=True))
    if cfg.get("stream") == meta.get("stream") == "text":
        # earlier versions kept padding and did not speak of it
        is_trained = cfg.get("padding", True)
        is_met = meta.get("padding", True)
        if is_trained != is_met:
            with_or_without = {True: "with padding", False: "without padding"}
            text = (
                f"text tokens {with_or_without[is_met]}, and the SAE was trained "
                f"{with_or_without[is_trained]}"
            )
            findings.append(Finding(text, is_wrong=True))
    return findings


def compare_weights(cfg: dict, meta: dict) -> list[Finding]:
    """Return [] if the weights that made an SAE's training vectors are those that `meta` describes,
    else one Finding.

    cfg: of the SAE. meta: "fingerprint", "model_dtype" and "model" of a file's description or of a
    model.
    """
    trained_fingerprint = cfg.get("fingerprint")
    met_fingerprint = meta.get("fingerprint")
    if not trained_fingerprint or not met_fingerprint:
        return [Finding("whether the model's weights are the same", is_wrong=False)]

    is_same = same_weights(trained_fingerprint, met_fingerprint)
    if is_same is False and meta.get("model_dtype") != cfg.get("model_dtype"):
        # rounding to another dtype changes the values, not the structure
        structure = trained_fingerprint.split("-")[0]
        is_same = same_weights(f"{structure}-", met_fingerprint)
    if is_same is None:
        dtypes = f"{meta.get('model_dtype')} here, {cfg.get('model_dtype')} in training"
        return [Finding(f"whether the weights are the same ({dtypes})", is_wrong=False)]
    if is_same:
        return []
    text = (
        f"the weights are those of {meta.get('model')} (fingerprint {met_fingerprint}), "
        f"and the SAE was trained on {cfg.get('model_name')} (fingerprint {trained_fingerprint})"
    )
    return [Finding(text, is_wrong=True)]


def compare_with_model(cfg: dict, model) -> list[Finding]:
    """Return [] if a model's denoiser has the weights that made an SAE's training vectors, else one
    Finding.

    cfg: of the SAE. Prints one line if other components differ, such as the VAE.
    """
    modules = model.modules()
    hook_name = cfg.get("hook_name")
    if not hook_name or not cfg.get("fingerprint"):
        return [Finding("whether the model's weights are the same", is_wrong=False)]
    if hook_name not in modules:
        return [Finding(f"the model has no module {hook_name!r}", is_wrong=True)]

    component = modules[hook_name][0]
    denoiser = model.denoisers[component]
    model_dtype = floating_dtype(denoiser)
    recorded_dtype = getattr(torch, str(cfg.get("model_dtype")), model_dtype)
    # float32 can be rounded to what was recorded; a rounded model can't be made exact again
    dtype = recorded_dtype if model_dtype == torch.float32 else model_dtype
    fingerprints = pipeline_fingerprints(model.pipe, dtype)
    name = getattr(model.pipe, "name_or_path", None) or type(denoiser).__name__

    trained = (cfg.get("collected_with") or {}).get("fingerprints") or {}
    changed = []
    for other in sorted(trained.keys() & fingerprints.keys() - {component}):
        if trained[other] != fingerprints[other]:
            changed.append(other)
    if changed and dtype == recorded_dtype:
        print(
            f"note: the {', '.join(changed)} of {name} is not what it was "
            "when the SAE's training vectors were collected"
        )
    description = {
        "fingerprint": fingerprints.get(component) or fingerprint(denoiser, dtype),
        "model_dtype": str(dtype).removeprefix("torch."),
        "model": name,
    }
    return compare_weights(cfg, description)


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first floating-point parameter, float32 if it has none."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


# ---- an SAE and activations


def activations_of(
    sae,
    folder: str | Path,
    data: Sequence[str | Path] = (),
    transfer: bool = False,
) -> Activations:
    """Open the activations that an SAE is to be used on, check that they belong to it, and return
    them.

    data: names of files, folders or globs; if none is given, the files that it was trained on. Only
    prompts that the SAE has not seen are held out. folder: what messages call the SAE. transfer:
    use files of another hook point or model on purpose. Raises UsageError if no files are known, if
    they hold several hook points or vectors of another width, or if they do not belong to the SAE
    (see `check_belongs`).
    """
    names = data or sae.cfg.get("data")
    if not names:
        raise UsageError(
            f"{folder} does not say which files it was trained on; name some with --data"
        )
    if not data:
        check_training_files(folder, names)
    data_sets = open_activations(names, sae.training_prompts)
    if len(data_sets) > 1:
        raise UsageError(
            f"--data holds {len(data_sets)} hook points or models; expected the files of one"
        )
    activations = data_sets[0]
    check_width(sae, activations.sources[0])  # all have one width
    for source in differing_sources(sae.cfg, activations.sources):
        for difference in check_belongs(str(folder), sae.cfg, source, transfer=transfer):
            if difference not in activations.transfer:
                activations.transfer.append(difference)
    return activations


def differing_sources(cfg: dict, sources: list[ActivationFile]) -> list[ActivationFile]:
    """Return the first of the files about which `check_belongs` says the same, of each kind.

    So eight shards of one collection are checked and named once. cfg: the SAE's cfg.json.
    """
    first_of_kind = {}
    for source in sources:
        compared = collected_with(source.meta)
        for name in (
            "hook_name",
            "side",
            "stream",
            "rows",
            "padding",
            "fingerprint",
            "model",
            "model_dtype",
        ):
            compared[name] = source.meta.get(name)
        compared["trained_on"] = source.meta.get("id") in cfg.get("collections", [])
        kind = json.dumps(compared, sort_keys=True)
        first_of_kind.setdefault(kind, source)
    return list(first_of_kind.values())


def check_training_files(folder: str | Path, paths: Sequence[str]) -> None:
    """Raise UsageError if a file that the SAE in `folder` was trained on is not there."""
    for path in paths:
        if not Path(path).exists():
            refuse_unfinished(path)
            raise UsageError(
                f"{folder} was trained on {path}, which is not there; name the files with --data"
            )


def check_width(sae, source: ActivationFile) -> None:
    """Raise UsageError if a file's vectors have another width than the SAE takes."""
    if source.d != sae.d_in:
        raise UsageError(
            f"{source.path} holds vectors of width {source.d}, and the SAE takes width {sae.d_in}"
        )


def check_held_out(sae, folder: str | Path, activations: Activations) -> bool:
    """Return whether it is sure that the SAE has seen none of the held-out vectors.

    If it is not known, prints one line. Raises UsageError if the SAE has seen every prompt, so that
    nothing is held out.
    """
    if not activations.num_held_out:
        raise UsageError(
            f"{folder} has seen every prompt of {activations.paths[0]}; "
            "name other activations with --data"
        )
    training = sae.cfg.get("training") or {}
    if activations.unseen or training.get("digest") == activations.digest():
        return True
    print(
        f"note: {folder} does not say which of these vectors it was trained on; "
        "some of those held out may be among them"
    )
    return False
