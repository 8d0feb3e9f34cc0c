"""Say how good an SAE is, by timestep: on held-out prompts, and put in its hook point's place while the model generates.

    python evaluate.py                                                  # the newest SAE in saes/, on the data that it is of
    python evaluate.py --sae saes/mid_block_k32_M20480 --graft
    python evaluate.py --sae theirs --data activations/mid_block.npy    # any SAE that Sae.load_from_disk reads

FVU, explained variance, L0, cosine, silent and always-on latents of the vectors that training never saw (metrics.py says what
each is). With --graft, for each window of steps and for all: how much of what the mean ablation spoils the reconstruction
gives back, in final latents and in pictures (graft.py).

Reads   an SAE folder; activation files of collect.py, or any .npy; with --graft the model that they were collected from.
Writes  <out_dir>/<name of the SAE>/: evaluate.json, evaluate.png; graft.json, graft.png.
What is held out is the choice that train.py makes in the same files. It does not train, and changes no SAE.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from activations import open_activations
from cli import check_positive, resolve_device, resolve_dtype, run
from disk import read_json, write_atomically
from errors import UsageError
from graft import clip_distance, graft, picture
from hook import HookedDiffusionModel, per_prompt
from metrics import evaluate, total
from plots import plot_evaluation
from sae import Sae, newest_sae
from sources import read_description, read_prompts


@dataclass
class Config:
    sae: str | None = None  # its folder (None: the newest in saes/)
    data: list[str] = field(default_factory=list)  # activation files of one hook point (none: those that it was trained on)
    out_dir: str = "evaluations"  # in which each SAE gets a folder
    batch_size: int = 4096  # vectors that go through the SAE together
    graft: bool = False  # also generate with the reconstruction in the hook point's place
    model_name: str | None = None  # for --graft (None: the model that the activations are of)
    num_prompts: int = 8  # held-out prompts that are generated, 3 + 2 windows times each
    windows: int = 4  # of steps, of equal length
    graft_batch_size: int = 8  # prompts generated together
    device: str = "auto"  # auto, cuda, cuda:N, mps, cpu


def held_out_prompts(activations, count):
    """The first held-out prompts: their rows of prompts.jsonl, whose seeds gave the activations. One image of each."""
    file, first, _ = activations.held_out_units[0]
    path = Path(activations.files[file].path)
    meta, listing = read_description(path), path.with_name("prompts.jsonl")
    if not meta or not listing.exists() or not activations.whole_prompts:
        raise UsageError(f"--graft: {path} is not of collect.py with its prompts.jsonl, so it is not known what to generate")
    if meta.get("images") is not None:
        raise UsageError(f"--graft: {path} is of pictures (--images), and grafting needs a generation")
    rows = read_prompts(path)
    each, mine = meta["shape"][1] * meta["shape"][2], activations.held_out_units[activations.held_out_units[:, 0] == file]
    chosen = list(dict.fromkeys((mine[:, 1] // each).tolist()))
    unique = {rows[row]["prompt"] if isinstance(rows[row]["prompt"], str) else row: rows[row] for row in chosen}
    return list(unique.values())[:count], meta


def grafted(cfg, sae, activations, folder, device):
    """Stage 3: generate, and write graft.json and graft.png."""
    prompts, meta = held_out_prompts(activations, cfg.num_prompts)
    place = {key: meta[key] for key in ("hook_name", "side", "stream", "rows")}
    dtype = resolve_dtype("auto", device)
    named = {"variant": meta.get("variant"), "revision": meta.get("revision")}
    hooked = HookedDiffusionModel.from_pretrained(cfg.model_name or meta["model"], dtype, device, **named)
    hooked.pipe.set_progress_bar_config(disable=True)
    options = {k: v for k, v in meta["pipeline_kwargs"].items() if k != "output_type" and not per_prompt(k)}
    options = hooked.arguments(1, "pt", options)
    if "negative_prompt" in prompts[0]:
        options["negative_prompt"] = [row["negative_prompt"] for row in prompts]
    clip, line = clip_distance(device=device)
    print(line)
    texts, seeds = [row["prompt"] for row in prompts], [row["seed"] for row in prompts]
    report, pictures = graft(
        hooked, sae, prompts=texts, seeds=seeds, windows=cfg.windows, options=options, batch_size=cfg.graft_batch_size, clip=clip,
        **place,
    )  # fmt: skip
    write_atomically(folder / "graft.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    picture(folder / "graft.png", report, pictures)
    kinds = [kind for kind in ("latents", "images", "clip") if kind in report["all"]]
    print(f"recovered, 1 - distance(graft) / distance(mean ablation), over {len(prompts)} held-out prompts:")
    for window in (report["all"], *report["windows"]):
        said = [f"{kind} {show(window[kind])}" for kind in kinds]
        print(f"  steps {window['steps'][0]:3} to {window['steps'][1]:3}   {'   '.join(said)}")


def show(record):
    """A recovered share with its standard error."""
    if record["recovered"] is None:
        return "nothing to recover"
    return f"{record['recovered']:.3f}" + (f" ± {record['recovered_se']:.3f}" if record["recovered_se"] is not None else "")


def main(cfg):
    # 1. The SAE, and vectors that it was not trained on
    check_positive(cfg, "batch_size", "num_prompts", "windows", "graft_batch_size")
    device = resolve_device(cfg.device)
    path = Path(cfg.sae) if cfg.sae else newest_sae()
    sae = Sae.load_from_disk(path, device)
    data = cfg.data or sae.cfg.get("data")
    if not data:
        raise UsageError(f"{path} does not say which files it was trained on; name some with --data")
    sets = open_activations(data)
    if len(sets) > 1:
        raise UsageError(f"--data holds {len(sets)} hook points; expected the files of one")
    activations = sets[0]
    if activations.d != sae.d_in:
        raise UsageError(f"{activations.paths[0]} holds vectors of width {activations.d}, and the SAE is of {sae.d_in}")
    folder = Path(cfg.out_dir) / (path if path.is_dir() else path.parent).resolve().name
    about = {"sae": str(path), "data": activations.paths}
    if (folder / "evaluate.json").exists():
        before = read_json(folder / "evaluate.json")
        if {key: before.get(key) for key in about} != about:
            there = f"{before.get('sae')} on {before.get('data')}"
            raise UsageError(f"{folder} holds the evaluation of {there}; use another --out_dir")
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds something else; use another --out_dir")

    # 2. Its numbers on them
    by_step = evaluate([sae], activations, cfg.batch_size, progress=True)[0]
    numbers = total(by_step).summary()
    by_timestep = [{"timestep": t, **metrics.summary()} for t, metrics in zip(activations.timesteps, by_step) if metrics.n]
    folder.mkdir(parents=True, exist_ok=True)
    record = about | {"hook_name": activations.hook_name, "whole_prompts": activations.whole_prompts, **numbers}
    text = json.dumps(record | {"by_timestep": by_timestep}, indent=1, allow_nan=False)
    write_atomically(folder / "evaluate.json", f"{text}\n".encode())
    plot_evaluation(folder / "evaluate.png", by_step, activations.timesteps, path.name)
    print(f"{path}: {sae.num_latents} latents, {sae.activation}, on {numbers['vectors']:,} held-out vectors")
    for name in ("fvu", "explained_variance", "l0", "cosine", "dead", "always_on"):
        if by_timestep:
            first, last = by_timestep[0], by_timestep[-1]
            span = f"   at t = {first['timestep']:g}: {first[name]:.4f}   at t = {last['timestep']:g}: {last[name]:.4f}"
        print(f"  {name:18} {numbers[name]:.4f}{span if by_timestep else ''}")
    if not activations.whole_prompts:
        print("note: there are no prompts to hold out whole, so held-out vectors are of the same samples as the others")

    # 3. Its reconstruction in the model
    if cfg.graft:
        with torch.no_grad():
            grafted(cfg, sae, activations, folder, device)
    print(f"saved in {folder}/: {', '.join(sorted(found.name for found in folder.iterdir()))}")


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
