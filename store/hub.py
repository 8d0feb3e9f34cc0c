"""The Hugging Face Hub: push an SAE folder or an activation folder with a card, fetch an SAE.

    push("saes/mine", "me/my-sae", "sae")
    push("activations", "me/my-activations", "activations")
    download("me/my-sae")                  # path of the copy on this disk

`huggingface_hub` does the work, with its token (`hf auth login` or the variable HF_TOKEN), its
cache, and its variable HF_ENDPOINT. Files of the folder replace those of the same name in the
repository, whose history keeps the old ones. The card is a README.md; it is written only if neither
the folder nor the repository has one.
"""

import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import UsageError
from store.disk import is_hidden, read_json

TYPES = {"sae": "model", "activations": "dataset"}  # what the hub calls such a repository
DESCRIPTIONS = ("cfg.json", "training_prompts.txt")
TENSORS = ("sae.safetensors", "sae_weights.safetensors")
NOT_PUSHED = ("*.partial", "*.new", "*.lock", "checkpoint.safetensors", ".*", "*/.*")
SAE_FACTS = {  # {what a card says: the key of cfg.json that holds it}
    "hook name": "hook_name",
    "model": "model_name",
    "vector width d": "d_in",
    "latents M": "num_latents",
    "active k": "k",
    "activation": "activation",
    "training vectors in the data": "num_training_in_data",
    "vectors seen in training, repeats counted": "num_training",
    "held-out vectors": "num_held_out",
    "fvu, fraction of variance unexplained, held out": "fvu",
    "l0, mean number of active latents, held out": "l0",
    "dead, share of latents silent on them": "dead",
}
ACTIVATION_FACTS = {  # the same of the .json beside an activation file
    "model": "model",
    "pipeline": "pipeline",
    "guidance scale": "guidance_scale",
    "prompts": "num_prompts",
}


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn whatever goes wrong on the way to the hub into an OSError that names the repository."""
    try:
        yield
    # huggingface_hub raises its own errors and those of its HTTP client, which it has changed twice
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{repo_id}: {message}") from error


def download(repo_id: str, folder: str | None = None) -> Path:
    """Fetch an SAE from a model repository; return the path of the copy on this disk.

    folder: where the SAE lies in the repository; None is its top. Only descriptions and safetensors
    files are fetched, never a pickle. Raises OSError if the repository can't be had, UsageError if
    there is no SAE in it.
    """
    from huggingface_hub import snapshot_download  # takes a second to import

    top = f"{folder.strip('/')}/" if folder else ""
    patterns = [glob.escape(top) + name for name in (*DESCRIPTIONS, *TENSORS)]
    with hub_errors(repo_id):
        path = Path(snapshot_download(repo_id, allow_patterns=patterns))
    if not any((path / top / name).exists() for name in TENSORS):
        expected = " or ".join(top + name for name in TENSORS)
        raise UsageError(f"{repo_id} has no {expected}; name the folder that has, hook_name")
    return path / top


def push(
    folder: str | Path,
    repo_id: str,
    kind: str,
    path_in_repo: str | None = None,
    private: bool | None = None,
) -> str:
    """Push a folder to the hub; return the address of the repository.

    kind: "sae" (an SAE folder, to a model repository) or "activations" (an activation folder, to a
    data set). path_in_repo: a folder in the repository, if several share it; for an SAE it is what
    `Sae.load_from_hub` takes as `hook_name`. private: whether a new repository is; None leaves that
    to the owner's settings. Unfinished files are not pushed.

    Raises UsageError for a folder that is not of the kind or not finished, OSError for whatever the
    hub says.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    text = card(folder, repo_id, kind, path_in_repo)
    repo_type = TYPES[kind]
    prefix = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    readme = prefix + "README.md"
    brings_card = (folder / "README.md").exists()
    api = HfApi()
    with hub_errors(repo_id):
        address = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        has_card = api.file_exists(repo_id, readme, repo_type=repo_type)
        api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            path_in_repo=prefix or None,
            commit_message=f"Add {path_in_repo or folder.resolve().name}",
            ignore_patterns=list(NOT_PUSHED),
        )
        if not has_card and not brings_card:
            api.upload_file(
                repo_id=repo_id,
                repo_type=repo_type,
                path_or_fileobj=text.encode(),
                path_in_repo=readme,
                commit_message="Describe it",
            )
    if has_card and not brings_card:
        print(
            f"{repo_id} keeps its {readme}, which may describe earlier files; if you delete it, "
            "the next push writes one"
        )
    return str(address)


def card(folder: Path, repo_id: str, kind: str, path_in_repo: str | None = None) -> str:
    """Return the README.md of a folder that is pushed: what it is, its numbers, how to load it.

    Raises UsageError as `push` does.
    """
    if kind not in TYPES:
        raise UsageError(f"kind {kind!r}: expected {' or '.join(TYPES)}")
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder")
    if kind == "sae":
        tags = ["sparse-autoencoder", "diffusion"]
        text = describe_sae(folder, repo_id, path_in_repo)
    else:
        tags = ["activations", "diffusion"]
        text = describe_activations(folder, repo_id, path_in_repo)
    front_matter = "\n".join(["---", "tags:", *(f"- {tag}" for tag in tags), "---"])
    return f"{front_matter}\n\n{text}"


def describe_sae(folder: Path, repo_id: str, path_in_repo: str | None) -> str:
    """Return the card of an SAE folder, ours or SAELens', from its cfg.json alone."""
    if not (folder / "cfg.json").exists() or not any((folder / name).exists() for name in TENSORS):
        raise UsageError(
            f"{folder} has no finished SAE: expected cfg.json and {' or '.join(TENSORS)}"
        )
    cfg = read_json(folder / "cfg.json")
    metadata = cfg.get("metadata") or {}  # of SAELens, which has other names for two keys
    renamed = {"num_latents": cfg.get("d_sae"), "activation": cfg.get("architecture")}
    cfg = {**metadata, **renamed, **cfg}
    facts = {name: cfg.get(key) for name, key in SAE_FACTS.items()}
    arguments = f'"{repo_id}", "{path_in_repo}"' if path_in_repo else f'"{repo_id}"'
    takes_samples = str(cfg.get("activation")).startswith("sampletopk")
    shape = "(samples, tokens, d)" if takes_samples else "(N, d)"
    return f"""\
# {path_in_repo or cfg.get("hook_name") or repo_id}

A sparse autoencoder of a diffusion model's activations.

{table(facts)}

With the Python files of diffusion-sae in the working directory:

```python
from sae import Sae
sae = Sae.load_from_hub({arguments})
codes = sae.encode(x)  # x: raw activations {shape}
```
"""


def describe_activations(folder: Path, repo_id: str, path_in_repo: str | None) -> str:
    """Return the card of an activation folder, from the .json beside each file alone."""
    records = read_descriptions(folder)
    first, record = next(iter(records.items()))
    facts = {name: record.get(key) for name, key in ACTIVATION_FACTS.items()}
    files = {}
    for name, record in records.items():
        shape = tuple(record.get("shape") or ())
        files[f"`{name}`"] = f"{shape} {record.get('dtype') or ''}"
    has_bfloat16 = any(record.get("dtype") == "bfloat16" for record in records.values())
    bits = ", bfloat16 as its bits in uint16" if has_bfloat16 else ""
    first_path = json.dumps(f"{path_in_repo}/{first}" if path_in_repo else first)
    return f"""\
# {path_in_repo or repo_id}

Activations of a diffusion model.

{table(facts)}

One NumPy array `(prompts, steps, tokens, d)` a file{bits}; the `.json` beside it says how it was made.

{table(files)}

```python
import numpy as np
from huggingface_hub import hf_hub_download
x = np.load(hf_hub_download("{repo_id}", {first_path}, repo_type="dataset"), mmap_mode="r")
```
"""


def read_descriptions(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {file name: its description} of the activation files in a folder, sorted by name.

    Raises UsageError if there is none, or if the collection is not finished.
    """
    paths = [path for path in sorted(folder.iterdir()) if not is_hidden(path)]
    for path in paths:
        if path.match("*.partial") or path.match("*.new"):
            raise UsageError(
                f"{folder} is not finished ({path.name}); let collect.py resume it first"
            )
    records = {}
    for path in paths:
        description = path.with_suffix(".json")
        if path.suffix == ".npy" and description.exists():
            records[path.name] = read_json(description)
    if not records:
        raise UsageError(f"{folder} has no activations: expected <hook_name>.npy and .json")
    return records


def table(facts: dict[str, Any]) -> str:
    """Return a Markdown table of two columns; facts that are None are left out.

    {"k": 16, "fvu": 0.12345, "l0": None} gives the rows "| k | 16 |" and "| fvu | 0.1235 |".
    """
    lines = ["| | |", "|---|---|"]
    for name, value in facts.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        if value is not None:
            lines.append(f"| {name} | {value} |")
    return "\n".join(lines)
