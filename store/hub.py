"""The Hugging Face Hub: an SAE folder or an activation folder pushed with a card, an SAE folder
fetched.

`huggingface_hub` does the work: its token (`hf auth login` or the variable HF_TOKEN), its cache,
its variable HF_ENDPOINT. A folder whose files have changed replaces the ones there; the
repository's history keeps the old. The card is a README.md; it is written only if there is none,
neither in the folder nor in the repository.
"""

import glob
import json
from contextlib import contextmanager
from pathlib import Path

from errors import UsageError
from store.disk import is_hidden, read_json

TYPES = {"sae": "model", "activations": "dataset"}
DESCRIPTIONS, TENSORS = (
    ("cfg.json", "training_prompts.txt"),
    ("sae.safetensors", "sae_weights.safetensors"),
)
NOT_PUSHED = ("*.partial", "*.new", "*.lock", "checkpoint.safetensors", ".*", "*/.*")
SAE_FACTS = {  # what a card says, and the key of cfg.json that knows it
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
ACTIVATION_FACTS = {
    "model": "model",
    "pipeline": "pipeline",
    "guidance scale": "guidance_scale",
    "prompts": "num_prompts",
}


@contextmanager
def one_line(repo_id):
    """Whatever goes wrong on the way to the Hub, as an OSError that names the repository."""
    try:
        yield
    except (
        Exception
    ) as error:  # of huggingface_hub, or of its HTTP client, which has been another twice
        raise OSError(
            f"{repo_id}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def download(repo_id, folder=None):
    """Fetch the SAE at the top of a model repository, or in its folder `folder` -> path of the copy
    on this disk.

    Only cfg.json and safetensors files are fetched. Raises OSError where the repository can't be
    had, ValueError where there is no SAE in it.
    """
    from huggingface_hub import snapshot_download  # takes a second to import

    top = f"{folder.strip('/')}/" if folder else ""
    with one_line(repo_id):
        path = Path(
            snapshot_download(
                repo_id, allow_patterns=[glob.escape(top) + n for n in (*DESCRIPTIONS, *TENSORS)]
            )
        )
    if not any((path / top / name).exists() for name in TENSORS):
        raise UsageError(
            f"{repo_id} has no {' or '.join(top + name for name in TENSORS)}; name the folder that has, hook_name"
        )
    return path / top


def push(folder, repo_id, kind, path_in_repo=None, private=None):
    """Push an SAE folder (kind "sae", a model repository) or an activation folder ("activations", a
    data set) -> its address.

    A repository that is not there is made, `private` or not (None: as its owner's are).
    `path_in_repo`: a folder in it, where several are to share one; for an SAE, what
    `Sae.load_from_hub` is given as `hook_name`. Unfinished files stay here. Raises UsageError for a
    folder that is not of the kind or not finished, OSError for whatever the Hub says.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    text = card(folder, repo_id, kind, path_in_repo)
    repo_type = TYPES[kind]
    prefix = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    readme = prefix + "README.md"
    api = HfApi()
    with one_line(repo_id):
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
        if not has_card and not (folder / "README.md").exists():
            api.upload_file(
                repo_id=repo_id,
                repo_type=repo_type,
                path_or_fileobj=text.encode(),
                path_in_repo=readme,
                commit_message="Describe it",
            )
    if has_card and not (folder / "README.md").exists():
        print(
            f"{repo_id} keeps its {readme}, which may describe earlier files; if you delete it, the next push writes one"
        )
    return str(address)


def card(folder, repo_id, kind, path_in_repo=None):
    """README.md of a folder that is pushed: what it is, its numbers, how to load it. Raises as
    `push` does."""
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


def describe_sae(folder, repo_id, path_in_repo):
    """The card of an SAE folder, ours or SAELens'; only what its cfg.json says."""
    if not (folder / "cfg.json").exists() or not any((folder / name).exists() for name in TENSORS):
        raise UsageError(
            f"{folder} has no finished SAE: expected cfg.json and {' or '.join(TENSORS)}"
        )
    cfg = read_json(folder / "cfg.json")
    saelens = {"num_latents": cfg.get("d_sae"), "activation": cfg.get("architecture")}
    cfg = {**(cfg.get("metadata") or {}), **saelens, **cfg}
    facts = {name: cfg.get(key) for name, key in SAE_FACTS.items()}
    where = f'"{repo_id}", "{path_in_repo}"' if path_in_repo else f'"{repo_id}"'
    shape = (
        "(samples, tokens, d)" if str(cfg.get("activation")).startswith("sampletopk") else "(N, d)"
    )
    return f"""\
# {path_in_repo or cfg.get("hook_name") or repo_id}

A sparse autoencoder of a diffusion model's activations.

{table(facts)}

With the Python files of diffusion-sae in the working directory:

```python
from sae import Sae
sae = Sae.load_from_hub({where})
codes = sae.encode(x)  # x: raw activations {shape}
```
"""


def describe_activations(folder, repo_id, path_in_repo):
    """The card of an activation folder; only what the .json beside each file says."""
    files = [path for path in sorted(folder.iterdir()) if not is_hidden(path)]
    unfinished = [path.name for path in files if path.match("*.partial") or path.match("*.new")]
    if unfinished:
        raise UsageError(
            f"{folder} is not finished ({unfinished[0]}); let collect.py resume it first"
        )
    records = {}
    for path in (path for path in files if path.suffix == ".npy"):
        description = path.with_name(f"{path.stem}.json")
        if description.exists():
            records[path.name] = read_json(description)
    if not records:
        raise UsageError(f"{folder} has no activations: expected <hook_name>.npy and .json")

    first, record = next(iter(records.items()))
    facts = {name: record.get(key) for name, key in ACTIVATION_FACTS.items()}
    files = {}
    for name, record in records.items():
        shape = tuple(record.get("shape") or ())
        files[f"`{name}`"] = f"{shape} {record.get('dtype') or ''}"
    has_bfloat16 = any(record.get("dtype") == "bfloat16" for record in records.values())
    bits = ", bfloat16 as its bits in uint16" if has_bfloat16 else ""
    file = json.dumps(f"{path_in_repo}/{first}" if path_in_repo else first)
    return f"""\
# {path_in_repo or repo_id}

Activations of a diffusion model.

{table(facts)}

One NumPy array `(prompts, steps, tokens, d)` a file{bits}; the `.json` beside it says how it was made.

{table(files)}

```python
import numpy as np
from huggingface_hub import hf_hub_download
x = np.load(hf_hub_download("{repo_id}", {file}, repo_type="dataset"), mmap_mode="r")
```
"""


def table(facts):
    """A Markdown table of two columns; facts that are None are left out."""
    lines = ["| | |", "|---|---|"]
    for name, value in facts.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        if value is not None:
            lines.append(f"| {name} | {value} |")
    return "\n".join(lines)
