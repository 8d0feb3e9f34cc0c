"""What belongs together: fingerprints of models, ids of collections, the prompts that an SAE was trained on, and one check.

Names and paths do not tell: other weights come under the same name, and other activations lie at the same path. So a collection
says which weights made it, an SAE says what it was trained on, and `check_belongs` compares them wherever two things meet.

    fingerprint(module)              of a model's weights, the same wherever and in whatever precision they are loaded
    provenance(sources)              what an SAE's cfg.json says of its training data
    prompt_key(row)                  prompts that are the same for the model have the same key
    check_belongs(name, cfg, ...)    refuses what an SAE was not trained for, and returns what it could not check
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from errors import UsageError
from store.activation_file import collected_with, differences, listing_digest, refuse_unfinished
from store.dataset import open_activations

SAMPLED = 64  # values of each tensor, evenly spaced, that a fingerprint looks at one by one
WORD = torch.int64  # tensors are also summed as such words, which wrap around


# ---------------------------------------------------------------------------------------------------------------- models


@torch.no_grad()
def fingerprint(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A digest of a module's weights, "<16 hex digits of names and shapes>-<16 of values>".

    Of each tensor 64 evenly spaced values are looked at, and the wrapping sum of all its bits, so that a single other value is
    seen. A billion float32 parameters take about a second on a CPU. dtype: floating-point values are cast to it first, so that
    a model loaded in float32 can be compared with one that was loaded in bfloat16. Where the values lie elsewhere (on the meta
    device, by sequential offloading), the second half is empty.
    """
    structure, values = hashlib.sha256(), hashlib.sha256()
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in module.state_dict().items()}
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
    places = torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64).long()
    sampled = flat[places.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes()
    per_word = max(1, WORD.itemsize // flat.element_size())
    words = flat[: len(flat) // per_word * per_word].view(WORD)
    total = int(words.sum()) if len(words) else 0
    return sampled + str(total).encode()


def pipeline_fingerprints(pipe, dtype: torch.dtype | None = None) -> dict[str, str]:
    """{component: fingerprint} of all that decides what a pipeline computes: its modules, and the settings of its schedulers."""
    found = {}
    for name, component in sorted(getattr(pipe, "components", {}).items()):
        if isinstance(component, nn.Module):
            found[name] = fingerprint(component, dtype)
        elif callable(getattr(type(component), "step", None)):
            config = {key: value for key, value in dict(getattr(component, "config", {})).items() if not key.startswith("_")}
            text = json.dumps([type(component).__name__, config], sort_keys=True, default=str)
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def same_weights(one: str, other: str) -> bool | None:
    """Whether two fingerprints are of the same weights; None where the structure is the same and the values are not known."""
    structure, values = one.split("-")
    other_structure, other_values = other.split("-")
    if structure != other_structure:
        return False
    if not values or not other_values:
        return None
    return values == other_values


# ----------------------------------------------------------------------------------------------------------- collections


def collection_id(settings: dict, lines: list[bytes]) -> str:
    """16 hex digits of all that decides a collection: its settings, with the fingerprints of the model, and its prompts."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode() + listing_digest(lines).encode()).hexdigest()[:16]


def origin(cfg: dict, description: dict) -> dict:
    """Which model, with which options, an SAE's training vectors came from: the description beside its data, or its cfg.json.

    Raises UsageError where neither says it.
    """
    if description:
        return description
    if "collected_with" not in cfg:
        data = ", ".join(cfg.get("data") or ["activations"])
        raise UsageError(f"{data}: no description of collect.py is there, and the SAE does not say which model it belongs to")
    return cfg["collected_with"] | {"model": cfg["model_name"]}


# ------------------------------------------------------------------------------------------------------------- the check


def check_belongs(name: str, cfg: dict, source=None, model=None, transfer: bool = False) -> list[str]:
    """Raise UsageError unless the SAE `name` was trained for what it is about to be used on; [] if it was.

    cfg: its cfg.json. source: the ActivationFile, model: the HookedDiffusionModel that it meets. With `transfer` what does not
    belong together is said in one line and returned, for the results to say it too. What can't be checked, as for SAEs of other
    packages, is said in one line.
    """
    wrong, unknown = [], []
    if source is not None:
        compare_sites(cfg, source, wrong, unknown)
        compare_weights(
            cfg, source.meta.get("fingerprint"), source.meta.get("model_dtype"), source.meta.get("model"), wrong, unknown
        )
    if model is not None:
        compare_with_model(cfg, model, wrong, unknown)
    met = [str(source.path)] if source is not None else []
    met += ["the model"] if model is not None else []
    if wrong and not transfer:
        raise UsageError(
            f"{name} does not belong to {' and '.join(met)}: {'; '.join(wrong)}. To use it there on purpose: --transfer"
        )
    if wrong:
        print(f"note: transfer of {name} to {' and '.join(met)}: {'; '.join(wrong)}")
    if unknown:
        print(f"note: {name} and {' and '.join(met)}: it can't be checked {', '.join(unknown)}")
    return wrong


def compare_sites(cfg, source, wrong, unknown):
    """Note where the hook point of a file is not the one that an SAE was trained on, and how else it was collected."""
    for key in ("hook_name", "side", "stream", "rows"):
        if "side" not in cfg or key not in source.meta:
            unknown.append(f"whether the {key} is the same")
        elif cfg[key] != source.meta[key]:
            wrong.append(f"{key} {source.meta[key]!r}, and the SAE was trained on {cfg[key]!r}")
    if "collected_with" in cfg and source.meta:
        others = differences(cfg["collected_with"], collected_with(source.meta))
        if others:
            print(f"note: {source.path} was collected otherwise than the SAE's training vectors: {'; '.join(others)}")


def compare_weights(cfg, fingerprint, dtype, model_name, wrong, unknown):
    """Note where the weights that made an SAE's training vectors are not those of this fingerprint."""
    if not cfg.get("fingerprint") or not fingerprint:
        unknown.append("whether the model's weights are the same")
        return
    same = same_weights(cfg["fingerprint"], fingerprint)
    if same is False and dtype != cfg.get("model_dtype"):
        same = same_weights(cfg["fingerprint"].split("-")[0] + "-", fingerprint)  # rounding changes values, not the structure
    if same is None:
        unknown.append(f"whether the weights are the same ({dtype} here, {cfg.get('model_dtype')} in training)")
    if same is False:
        trained = f"{cfg.get('model_name')} (fingerprint {cfg['fingerprint']})"
        wrong.append(f"the weights are those of {model_name} (fingerprint {fingerprint}), and the SAE was trained on {trained}")


def compare_with_model(cfg, model, wrong, unknown):
    """Note where a model's denoiser has other weights than the one that made an SAE's training vectors."""
    modules = model.modules()
    hook_name = cfg.get("hook_name")
    if hook_name not in modules:
        wrong.append(f"the model has no module {hook_name!r}")
        return
    denoiser = model.denoisers[modules[hook_name][0]]
    own = next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)
    recorded = getattr(torch, str(cfg.get("model_dtype")), own)
    dtype = recorded if own in (recorded, torch.float32) else own
    found = fingerprint(denoiser, dtype) if cfg.get("fingerprint") else None
    name = getattr(model.pipe, "name_or_path", None) or type(denoiser).__name__
    compare_weights(cfg, found, str(dtype).removeprefix("torch."), name, wrong, unknown)
    theirs = (cfg.get("collected_with") or {}).get("fingerprints") or {}
    ours = pipeline_fingerprints(model.pipe, dtype) if theirs and dtype == recorded else {}
    changed = [part for part in theirs.keys() & ours.keys() - {modules[hook_name][0]} if theirs[part] != ours[part]]
    if changed:
        print(
            f"note: the {', '.join(sorted(changed))} of {name} is not what it was when the SAE's training vectors were collected"
        )


# ------------------------------------------------------------------------------------------------ an SAE and activations


def activations_of(sae, folder, data=(), transfer=False):
    """The Activations of one hook point for an SAE: of the files that `data` names, or else of those it was trained on.

    Held out are prompts that the SAE has not seen. sae: anything with `cfg`, whose "data" lists files, `d_in` and
    `training_prompts`. folder: what messages call it. transfer: use files of another hook point or model on purpose. Raises
    UsageError where no files are known, where they are of several hook points, where they do not belong to the SAE
    (`check_belongs`), or where their vectors have another width.
    """
    named = data or sae.cfg.get("data")
    if not named:
        raise UsageError(f"{folder} does not say which files it was trained on; name some with --data")
    missing = [path for path in named if not data and not Path(path).exists()]
    if missing:
        refuse_unfinished(missing[0])
        raise UsageError(f"{folder} was trained on {missing[0]}, which is not there; name the files with --data")
    sets = open_activations(named, sae.training_prompts)
    if len(sets) > 1:
        raise UsageError(f"--data holds {len(sets)} hook points or models; expected the files of one")
    activations = sets[0]
    check_width(sae, activations.sources[0])
    activations.transfer = check_belongs(str(folder), sae.cfg, activations.sources[0], transfer=transfer)
    return activations


def check_width(sae, source) -> None:
    """Raise UsageError where an ActivationFile holds vectors of another width than the SAE takes."""
    if source.d != sae.d_in:
        raise UsageError(f"{source.path} holds vectors of width {source.d}, and the SAE is of {sae.d_in}")


def check_held_out(sae, folder, activations):
    """Whether the SAE has surely seen none of what is held out; print one line if that is not known.

    Raises UsageError where nothing is left that it has not seen.
    """
    if not activations.num_held_out:
        raise UsageError(f"{folder} has seen every prompt of {activations.paths[0]}; name other activations with --data")
    trained = sae.cfg.get("training") or {}
    if activations.unseen or trained.get("digest") == activations.digest():
        return True
    print(f"note: {folder} does not say which of these vectors it was trained on; some of those held out may be among them")
    return False
