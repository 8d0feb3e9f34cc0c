"""What belongs together: fingerprints of models, and the check of an SAE against the activations or
the model that it meets.

Names and paths do not tell: other weights come under the same name, and other activations lie at
the same path. So a collection says which weights made it, an SAE says what it was trained on
(`provenance` in activation_file.py), and `check_belongs` compares them wherever two things meet.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from errors import UsageError
from store.activation_file import collected_with, differences, refuse_unfinished
from store.dataset import open_activations

SAMPLED = 64  # values of each tensor, evenly spaced, that a fingerprint looks at one by one
WORD = torch.int64  # tensors are also summed as such words, which wrap around


# ---------------------------------------------------------------------------------------------------------------- models


@torch.no_grad()
def fingerprint(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A digest of a module, "<16 hex digits of names, shapes and settings>-<16 of values>".

    Of each tensor 64 evenly spaced values are looked at, those behind its last whole word, and the
    wrapping sum of all words, so that a single other value is seen. A billion float32 parameters
    take a fifth of a second on a CPU core. dtype: floating-point values are cast to it first, so
    that a model loaded in float32 can be compared with one that was loaded in bfloat16. Where the
    values lie elsewhere (on the meta device, by sequential offloading), the second half is empty.
    """
    tensors = {}
    for name, tensor in module.state_dict().items():
        tensors[name.replace("_orig_mod.", "")] = tensor  # which torch.compile adds
    return fingerprint_tensors(tensors, dtype, settings_text(module))


@torch.no_grad()
def fingerprint_tensors(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None, settings: str = ""
) -> str:
    """Return the `fingerprint` of a module with these tensors and these settings."""
    structure = hashlib.sha256(settings.encode())
    values = hashlib.sha256()
    known = True
    for name in sorted(tensors):
        tensor = tensors[name]
        structure.update(f"{name} {tuple(tensor.shape)}\n".encode())
        known = known and tensor.device.type != "meta"
        if known and tensor.numel():
            values.update(digest_values(tensor, dtype))
    return f"{structure.hexdigest()[:16]}-{values.hexdigest()[:16] if known else ''}"


def digest_values(tensor: torch.Tensor, dtype: torch.dtype | None) -> bytes:
    """The sampled values of a tensor as bytes, and the sum of all its bits."""
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    flat = tensor.detach().contiguous().flatten()
    if flat.storage_offset():  # a part of another tensor, which may not begin at a word
        flat = flat.clone()
    per_word = max(1, WORD.itemsize // flat.element_size())
    num_whole = len(flat) // per_word * per_word
    total = int(flat[:num_whole].view(WORD).sum()) if num_whole else 0
    spaced = torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64).long()
    places = torch.cat([spaced, torch.arange(num_whole, len(flat))])
    sampled = flat[places.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes()
    return sampled + str(total).encode()


def settings_text(component) -> str:
    """The settings of a diffusers or transformers component that are not the default of its class,
    as JSON; "" without any.

    So another version of the library, whose classes have more settings, says the same. How it was
    loaded is left out.
    """
    config = getattr(component, "config", None)
    if hasattr(config, "to_diff_dict"):  # transformers
        chosen = config.to_diff_dict()
    elif isinstance(config, Mapping):
        signature = inspect.signature(type(component).__init__).parameters
        defaults = {name: parameter.default for name, parameter in signature.items()}
        chosen = {
            name: value
            for name, value in config.items()
            if plain(value) != plain(defaults.get(name))
        }
    else:
        return ""
    left_out = ("dtype", "torch_dtype", "transformers_version", "architectures")
    chosen = {
        name: value
        for name, value in chosen.items()
        if not name.startswith("_") and name not in left_out
    }
    return json.dumps(chosen, sort_keys=True, default=str) if chosen else ""


def plain(value: object) -> object:
    """A setting as it comes back from a file: tuples are lists there."""
    return json.loads(json.dumps(value, default=str))


def pipeline_fingerprints(pipe, dtype: torch.dtype | None = None) -> dict[str, str]:
    """{component: fingerprint} of all that decides what a pipeline computes: modules, schedulers'
    settings, vocabularies."""
    found = {}
    for name, component in sorted(getattr(pipe, "components", {}).items()):
        if isinstance(component, nn.Module):
            found[name] = fingerprint(component, dtype)
            continue
        text = None
        if callable(getattr(type(component), "step", None)):
            text = type(component).__name__ + settings_text(component)
        elif callable(getattr(component, "get_vocab", None)):
            text = json.dumps(component.get_vocab(), sort_keys=True)
        if text is not None:
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def same_weights(one: str, other: str) -> bool | None:
    """Whether two fingerprints are of the same weights; None where the structure is the same and
    the values are not known."""
    structure, values = one.split("-")
    other_structure, other_values = other.split("-")
    if structure != other_structure:
        return False
    if not values or not other_values:
        return None
    return values == other_values


def origin(cfg: dict, description: dict) -> dict:
    """Which model, with which options, an SAE's training vectors came from: the description beside
    its data, or its cfg.json.

    Raises UsageError where neither says it.
    """
    if description:
        return description
    if "collected_with" not in cfg:
        data = ", ".join(cfg.get("data") or ["activations"])
        raise UsageError(
            f"{data}: no description of collect.py is there, and the SAE does not say which model it belongs to"
        )
    return cfg["collected_with"] | {"model": cfg["model_name"]}


# ------------------------------------------------------------------------------------------------------------- the check


class Finding(NamedTuple):
    """What a comparison found."""

    text: str
    is_wrong: bool
    """False: it can't be checked."""


def check_belongs(
    name: str, cfg: dict, source=None, model=None, transfer: bool = False
) -> list[str]:
    """Raise UsageError unless the SAE `name` was trained for what it is about to be used on; [] if
    it was.

    cfg: its cfg.json. source: the ActivationFile, or model: the HookedDiffusionModel that it meets.
    With `transfer` what does not belong together is said in one line and returned, for the results
    to say it too. What can't be checked, as for SAEs of other packages, and how else the
    activations were collected, is said in one line each.
    """
    met, findings = "the model", []
    if source is not None:
        met = str(source.path)
        findings += compare_sites(cfg, source.meta)
        findings.append(compare_weights(cfg, source.meta))
        say_what_differs(cfg, met, source.meta)
    else:
        findings.append(compare_with_model(cfg, model))

    wrong = [found.text for found in findings if found is not None and found.is_wrong]
    unknown = [found.text for found in findings if found is not None and not found.is_wrong]
    if wrong and not transfer:
        raise UsageError(
            f"{name} does not belong to {met}: {'; '.join(wrong)}. To use it there on purpose: --transfer"
        )
    if wrong:
        print(f"note: transfer of {name} to {met}: {'; '.join(wrong)}")
    if unknown:
        print(f"note: {name} and {met}: it can't be checked {', '.join(unknown)}")
    return wrong


def say_what_differs(cfg: dict, path: str, meta: dict) -> None:
    """Print one line where a file is none of those that an SAE was trained on: how else it was
    collected, or other prompts."""
    if "collected_with" not in cfg or meta.get("id") in cfg.get("collections", []):
        return
    others = differences(cfg["collected_with"], collected_with(meta))
    if others:
        print(
            f"note: {path} was collected otherwise than the SAE's training vectors: {'; '.join(others)}"
        )
    elif meta:
        print(
            f"note: {path} has other prompts than when the SAE was trained: it was extended, or collected anew"
        )


def compare_sites(cfg: dict, meta: dict) -> list[Finding]:
    """Where the hook point in a file's description is not the one that an SAE was trained on."""
    by_train = "digest" in (
        cfg.get("training") or {}
    )  # of any version; earlier ones said the hook name alone
    found = []
    for key in ("hook_name", "side", "stream", "rows"):
        comparable = "side" in cfg or by_train and key == "hook_name" and cfg.get(key)
        if not comparable or key not in meta:
            found.append(Finding(f"whether the {key} is the same", is_wrong=False))
        elif cfg[key] != meta[key]:
            found.append(
                Finding(
                    f"{key} {meta[key]!r}, and the SAE was trained on {cfg[key]!r}", is_wrong=True
                )
            )
    return found


def compare_weights(cfg: dict, meta: dict) -> Finding | None:
    """Whether an SAE's training vectors were made by the weights of a description ("fingerprint",
    "model_dtype", "model")."""
    trained, here = cfg.get("fingerprint"), meta.get("fingerprint")
    if not trained or not here:
        return Finding("whether the model's weights are the same", is_wrong=False)
    same = same_weights(trained, here)
    if same is False and meta.get("model_dtype") != cfg.get("model_dtype"):
        same = same_weights(
            trained.split("-")[0] + "-", here
        )  # rounding changes values, not the structure
    if same is None:
        dtypes = f"{meta.get('model_dtype')} here, {cfg.get('model_dtype')} in training"
        return Finding(f"whether the weights are the same ({dtypes})", is_wrong=False)
    if same:
        return None
    theirs = f"{cfg.get('model_name')} (fingerprint {trained})"
    text = f"the weights are those of {meta.get('model')} (fingerprint {here}), and the SAE was trained on {theirs}"
    return Finding(text, is_wrong=True)


def compare_with_model(cfg: dict, model) -> Finding | None:
    """Whether a model's denoiser has the weights that made an SAE's training vectors; print which
    other components have not."""
    modules, hook_name = model.modules(), cfg.get("hook_name")
    if not hook_name or not cfg.get("fingerprint"):
        return Finding("whether the model's weights are the same", is_wrong=False)
    if hook_name not in modules:
        return Finding(f"the model has no module {hook_name!r}", is_wrong=True)
    component = modules[hook_name][0]
    denoiser = model.denoisers[component]
    own = next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)
    recorded = getattr(torch, str(cfg.get("model_dtype")), own)
    dtype = recorded if own in (recorded, torch.float32) else own
    ours = pipeline_fingerprints(model.pipe, dtype)
    here = ours.get(component) or fingerprint(denoiser, dtype)
    name = getattr(model.pipe, "name_or_path", None) or type(denoiser).__name__

    theirs = (cfg.get("collected_with") or {}).get("fingerprints") or {}
    changed = [
        part for part in theirs.keys() & ours.keys() - {component} if theirs[part] != ours[part]
    ]
    if changed and dtype == recorded:
        parts = ", ".join(sorted(changed))
        print(
            f"note: the {parts} of {name} is not what it was when the SAE's training vectors were collected"
        )
    return compare_weights(
        cfg, {"fingerprint": here, "model_dtype": str(dtype).removeprefix("torch."), "model": name}
    )


# ------------------------------------------------------------------------------------------------ an SAE and activations


def activations_of(sae, folder, data=(), transfer=False):
    """The Activations of one hook point for an SAE: of the files that `data` names, or else of
    those it was trained on.

    Held out are prompts that the SAE has not seen. sae: anything with `cfg`, whose "data" lists
    files, `d_in` and `training_prompts`. folder: what messages call it. transfer: use files of
    another hook point or model on purpose. Raises UsageError where no files are known, where they
    are of several hook points, where they do not belong to the SAE (`check_belongs`), or where
    their vectors have another width.
    """
    named = data or sae.cfg.get("data")
    if not named:
        raise UsageError(
            f"{folder} does not say which files it was trained on; name some with --data"
        )
    missing = [path for path in named if not data and not Path(path).exists()]
    if missing:
        refuse_unfinished(missing[0])
        raise UsageError(
            f"{folder} was trained on {missing[0]}, which is not there; name the files with --data"
        )
    sets = open_activations(named, sae.training_prompts)
    if len(sets) > 1:
        raise UsageError(
            f"--data holds {len(sets)} hook points or models; expected the files of one"
        )
    activations = sets[0]
    check_width(sae, activations.sources[0])
    activations.transfer = check_belongs(
        str(folder), sae.cfg, activations.sources[0], transfer=transfer
    )
    return activations


def check_width(sae, source) -> None:
    """Raise UsageError where an ActivationFile holds vectors of another width than the SAE
    takes."""
    if source.d != sae.d_in:
        raise UsageError(
            f"{source.path} holds vectors of width {source.d}, and the SAE takes width {sae.d_in}"
        )


def check_held_out(sae, folder, activations):
    """Whether the SAE has surely seen none of what is held out; print one line if that is not
    known.

    Raises UsageError where nothing is left that it has not seen.
    """
    if not activations.num_held_out:
        raise UsageError(
            f"{folder} has seen every prompt of {activations.paths[0]}; name other activations with --data"
        )
    trained = sae.cfg.get("training") or {}
    if activations.unseen or trained.get("digest") == activations.digest():
        return True
    print(
        f"note: {folder} does not say which of these vectors it was trained on; some of those held out may be among them"
    )
    return False
