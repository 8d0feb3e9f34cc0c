"""The Hugging Face Hub: an SAE folder or an activation folder pushed with a card, an SAE folder fetched.

`huggingface_hub` does the work: its token (`hf auth login` or the variable HF_TOKEN), its cache, its variable HF_ENDPOINT.
A folder whose files have changed replaces the ones there; the repository's history keeps the old. A README.md that somebody
else wrote, in the folder or in the repository, is left as it is.
"""

import glob
import json
from contextlib import contextmanager
from pathlib import Path

from disk import read_json
from errors import UsageError

TYPES = {"sae": "model", "activations": "dataset"}
DESCRIPTIONS, TENSORS = ("cfg.json",), ("sae.safetensors", "sae_weights.safetensors")
UNFINISHED = ("*.partial", "*.new", "checkpoint.safetensors")
MARK = "<!-- Written by diffusion-sae. Without this line the next push leaves this file alone. -->"


@contextmanager
def one_line(repo_id):
    """Whatever goes wrong on the way to the Hub, as an OSError that names the repository."""
    try:
        yield
    except Exception as error:  # of huggingface_hub, or of its HTTP client, which has been another twice
        raise OSError(f"{repo_id}: {' '.join(str(error).split()) or type(error).__name__}") from error


def download(repo_id, folder=None):
    """Fetch the SAE at the top of a model repository, or in its folder `folder` -> path of the copy on this disk.

    Only cfg.json and safetensors files are fetched. Raises OSError where the repository can't be had, ValueError where there
    is no SAE in it.
    """
    from huggingface_hub import snapshot_download  # takes a second to import

    top = f"{folder.strip('/')}/" if folder else ""
    with one_line(repo_id):
        path = Path(snapshot_download(repo_id, allow_patterns=[glob.escape(top) + n for n in (*DESCRIPTIONS, *TENSORS)]))
    if not any((path / top / name).exists() for name in TENSORS):
        raise UsageError(f"{repo_id} has no {' or '.join(top + name for name in TENSORS)}; name the folder that has, hook_name")
    return path / top


def push(folder, repo_id, kind, path_in_repo=None, private=None):
    """Push an SAE folder (kind "sae", a model repository) or an activation folder ("activations", a data set) -> its address.

    A repository that is not there is made, `private` or not (None: as its owner's are). `path_in_repo`: a folder in it, where
    several are to share one; for an SAE, the hook name that `Sae.load_from_hub` is given. Unfinished files stay here. Raises
    UsageError for a folder that is not of the kind or not finished, OSError for whatever the Hub says.
    """
    from huggingface_hub import HfApi

    folder, place = Path(folder), f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    text, api, repo_type = card(folder, repo_id, kind, path_in_repo), HfApi(), TYPES[kind]
    with one_line(repo_id):
        address = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, path_in_repo=place or None, repo_type=repo_type,
            commit_message=f"Add {path_in_repo or folder.resolve().name}", ignore_patterns=list(UNFINISHED),
        )  # fmt: skip
        if not is_foreign(api, repo_id, repo_type, place + "README.md"):
            api.upload_file(
                path_or_fileobj=text.encode(), path_in_repo=place + "README.md", repo_id=repo_id, repo_type=repo_type,
                commit_message="Describe it",
            )  # fmt: skip
    return str(address)


def is_foreign(api, repo_id, repo_type, name):
    """Whether the repository has a file `name` that is none of our cards."""
    if not api.file_exists(repo_id, name, repo_type=repo_type):
        return False
    return MARK not in Path(api.hf_hub_download(repo_id, name, repo_type=repo_type)).read_text("utf-8", "replace")


def card(folder, repo_id, kind, path_in_repo=None):
    """README.md of a folder that is pushed: what it is, its numbers, how to load it. Raises as `push` does."""
    if kind not in TYPES:
        raise UsageError(f"kind {kind!r}: expected {' or '.join(TYPES)}")
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder")
    describe = describe_sae if kind == "sae" else describe_activations
    tags = ["sparse-autoencoder", "diffusion"] if kind == "sae" else ["activations", "diffusion"]
    head = ["---", "tags:", *(f"- {tag}" for tag in tags), "---", MARK, ""]
    return "\n".join([*head, *describe(folder, repo_id, path_in_repo)]) + "\n"


def describe_sae(folder, repo_id, path_in_repo):
    """Lines of the card of an SAE folder, ours or SAELens'; only what its cfg.json says."""
    if not (folder / "cfg.json").exists() or not any((folder / name).exists() for name in TENSORS):
        raise UsageError(f"{folder} has no finished SAE: expected cfg.json and {' or '.join(TENSORS)}")
    cfg = read_json(folder / "cfg.json")
    cfg = {**(cfg.get("metadata") or {}), "num_latents": cfg.get("d_sae"), "activation": cfg.get("architecture")} | cfg
    facts = {
        "hook name": cfg.get("hook_name"), "model": cfg.get("model_name"), "vector width d": cfg.get("d_in"),
        "latents M": cfg.get("num_latents"), "active k": cfg.get("k"), "activation": cfg.get("activation"),
        "training vectors": cfg.get("num_training"), "held-out vectors": cfg.get("num_held_out"),
        "fvu, fraction of variance unexplained, held out": cfg.get("fvu"),
        "l0, mean number of active latents, held out": cfg.get("l0"), "dead, share of latents silent on them": cfg.get("dead"),
    }  # fmt: skip
    where = f'"{repo_id}"' + (f', "{path_in_repo}"' if path_in_repo else "")
    samples = "(samples, tokens, d)" if str(cfg.get("activation")).startswith("sampletopk") else "(N, d)"
    return [
        f"# {path_in_repo or cfg.get('hook_name') or repo_id}", "",
        "A sparse autoencoder of a diffusion model's activations.", "", *table(facts), "",
        "With the Python files of diffusion-sae in the working directory:", "", "```python", "from sae import Sae",
        f"sae = Sae.load_from_hub({where})", f"codes = sae.encode(x)  # x: raw activations {samples}", "```",
    ]  # fmt: skip


def describe_activations(folder, repo_id, path_in_repo):
    """Lines of the card of an activation folder; only what the .json beside each file says."""
    if partial := [path.name for path in folder.iterdir() if path.match("*.partial") or path.match("*.new")]:
        raise UsageError(f"{folder} is not finished ({partial[0]}); let collect.py go on with it first")
    records = {}
    for path in sorted(folder.glob("*.npy")):
        if path.with_name(f"{path.stem}.json").exists():
            records[path.name] = read_json(path.with_name(f"{path.stem}.json"))
    if not records:
        raise UsageError(f"{folder} has no activations: expected <hook_name>.npy and .json")
    name, record = next(iter(records.items()))
    keys = {"model": "model", "pipeline": "pipeline", "guidance scale": "guidance_scale", "prompts": "num_prompts"}
    facts = {key: record.get(name) for key, name in keys.items()}
    top = f"{path_in_repo}/" if path_in_repo else ""
    bits = ", bfloat16 as its bits in uint16" if any(r.get("dtype") == "bfloat16" for r in records.values()) else ""
    return [
        f"# {path_in_repo or repo_id}", "", "Activations of a diffusion model.", "", *table(facts), "",
        f"One NumPy array `(prompts, steps, tokens, d)` a file{bits}; the `.json` beside it says how it was made.", "",
        *table({f"`{file}`": f"{tuple(r.get('shape') or ())} {r.get('dtype') or ''}" for file, r in records.items()}), "",
        "```python", "import numpy as np", "from huggingface_hub import hf_hub_download",
        f'x = np.load(hf_hub_download("{repo_id}", {json.dumps(top + name)}, repo_type="dataset"), mmap_mode="r")', "```",
    ]  # fmt: skip


def table(facts):
    """Lines of a Markdown table of two columns; facts that are None are left out."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in facts.items() if value is not None}
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in shown.items())]
