"""Stage 1: which layer? Disable hook points one at a time and see what the pictures lose.

    python ablate.py                                                       # the toy's attention blocks, skipped
    python ablate.py --model_name sd-legacy/stable-diffusion-v1-5 --dataset_name "a cat on a chair" --num_inference_steps 20
    python ablate.py --hook_names "up_blocks.*.attentions.*" mid_block --mode mean --max_num_examples 16

Three ways (`--mode`): skip makes the module's output its input, zero makes it 0, mean makes it its mean over the prompts
(each half of the guidance on its own), so that what the prompt and the seed decided there is gone and the rest stays.
All rows are edited, conditional and unconditional, but of each only the image tokens: text of a joint block stays, and so do
the skip connections of a UNet's down block.

Reads   a diffusers folder or hub id, and prompts, as collect.py does.
Writes  <out_dir>/ablate.png (rows: hook names, the first untouched; columns: prompts), ablate_ranking.png, ablate.json.

Distances are to the untouched run with the same seeds: |a - b| / |b| of the final latents, and the root mean square over
pixels and channels of the pictures in [0, 1]. It does not search for combinations of layers.
"""

import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from cli import GenerationConfig, check_positive, parse_object, resolve_device, resolve_dtype, run
from disk import read_json, write_atomically
from errors import UsageError
from hook import Edit, HookedDiffusionModel, find_model, tensors
from prompts import default_dataset, load_prompts

SHOWN = 40  # rows of pictures at most, and bars: the hook points that matter most


@dataclass
class Config(GenerationConfig):
    hook_names: list[str] = field(default_factory=lambda: ["**.attentions.*"])  # modules of the denoiser, or globs
    mode: Literal["skip", "zero", "mean"] = "skip"  # what becomes of the module's output
    max_num_examples: int = 8  # prompts, all in one batch: the columns of the picture
    out_dir: str = "ablate"  # folder for the pictures and the numbers


EDITS = {
    "skip": Edit(lambda x, before: before, rows="all", with_input=True),
    "zero": Edit(torch.zeros_like, rows="all"),
    "mean": Edit(lambda x: x.mean(0, keepdim=True).expand_as(x), rows="all"),
}


def generate(hooked, hooks, prompts, seed, options):
    """Final latents (R, ...) and pictures (R, 3, H, W) in [0, 1], float32 on the CPU, of the same seeds every time."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    with hooked.watch() as sampling:
        output = hooked.run_with_hooks(hooks, prompts, generator=generators, **options)
    images = tensors(output)[0]
    if images.ndim == 5:  # video: the frame in the middle
        images = images[:, images.shape[1] // 2]
    return sampling.sample.float().cpu(), images.float().cpu()


def distances(a, b):
    """|a - b| / |b| of latents and root mean square difference of pictures, each the mean over the R prompts."""
    (latents, images), (latents_0, images_0) = a, b
    relative = (latents - latents_0).flatten(1).norm(dim=1) / latents_0.flatten(1).norm(dim=1)
    return relative.mean().item(), (images - images_0).square().flatten(1).mean(1).sqrt().mean().item()


def picture_grid(path, rows, prompts):
    """One row of pictures for each (label, (R, 3, H, W)); the prompts stand above the columns."""
    R = len(prompts)
    texts = [textwrap.wrap(prompt, 20, max_lines=4, placeholder=" …") for prompt in prompts]
    left, top = 2.6, 0.2 + 0.14 * max(map(len, texts))  # inches
    fig = Figure(figsize=(left + 1.25 * R, top + 1.25 * len(rows)), facecolor="white")
    W, H = fig.get_size_inches()
    for r, (label, images) in enumerate(rows):
        for c in range(R):
            ax = fig.add_axes(((left + 1.25 * c) / W, 1 - (top + 1.25 * (r + 1) - 0.05) / H, 1.2 / W, 1.2 / H))
            ax.imshow(images[c].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            ax.set_axis_off()
        y = 1 - (top + 1.25 * r + 0.6) / H
        fig.text((left - 0.12) / W, y, label, ha="right", va="center", fontsize=8, parse_math=False)
    for c, text in enumerate("\n".join(lines) for lines in texts):
        fig.text(
            (left + 1.25 * c + 0.6) / W, 1 - (top - 0.06) / H, text, ha="center", va="bottom", fontsize=6.5, parse_math=False
        )
    fig.savefig(path, dpi=150)


def ranking(path, hooks, title):
    """Bars of both distances, the largest first."""
    fig = Figure(figsize=(10, 1.3 + 0.3 * len(hooks)), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    fig.suptitle(title, fontsize=10)
    names = [h["hook_name"] for h in hooks][::-1]
    for ax, key, label in zip(axes, ("latents", "images"), ("latents: |a - b| / |b|", "pictures: root mean square")):
        bars = ax.barh(names, [h[key] for h in hooks][::-1], color="#2f6db5", height=0.7)
        ax.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
        ax.set_xlabel("distance to the untouched " + label, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.margins(x=0.12)
    fig.savefig(path, dpi=130)


def main(cfg):
    # 1. What to generate
    check_positive(cfg, "max_num_examples", "num_inference_steps")
    dataset_name = cfg.dataset_name or default_dataset(find_model(cfg.model_name))
    rows = load_prompts(dataset_name, cfg.split, cfg.column, cfg.negative_prompt, cfg.max_num_examples)
    prompts = [r["prompt"] for r in rows]
    if cfg.mode == "mean" and len(prompts) < 2:
        raise UsageError("--mode mean needs two prompts or more to take the mean over; raise --max_num_examples")
    out_dir = Path(cfg.out_dir)
    settings = {k: v for k, v in vars(cfg).items() if k not in ("out_dir", "device", "cpu_offload")}

    # 2. The model, and the shapes of what its layers take and give
    device = resolve_device(cfg.device)
    hooked = HookedDiffusionModel.from_pretrained(
        cfg.model_name, resolve_dtype(cfg.dtype, device), device, cfg.cpu_offload, variant=cfg.variant, revision=cfg.revision
    )
    hooked.pipe.set_progress_bar_config(disable=True)
    extra = parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    options = hooked.arguments(1, "pt", extra, **cfg.pipeline_options())
    if "negative_prompt" in rows[0]:
        options["negative_prompt"] = [r["negative_prompt"] for r in rows]
    dry = hooked.first_step(cfg.hook_names, prompts, save_input=True, **options)
    if (out_dir / "ablate.json").exists():
        there = read_json(out_dir / "ablate.json").get("options") or {}
        if other := [k for k in settings if there.get(k) != settings[k]]:
            told = ", ".join(f"{k} {there.get(k)!r}" for k in other)
            raise UsageError(f"{out_dir} holds a run with {told}; choose another --out_dir")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out_dir {out_dir} can't be made: {error.strerror}") from None

    # 3. One run untouched, then one a hook point
    done, failed, pictures = [], [], {}
    with tqdm(total=1 + len(dry["grid"]), unit="run", desc="ablating") as bar:
        untouched = generate(hooked, {}, prompts, cfg.seed, options)
        bar.update()
        for name, grid in dry["grid"].items():
            before, after = (tuple(dry[side][name].shape[2:]) for side in ("input", "output"))
            megabytes = dry["num_steps"] * after[0] * after[1] * 2 / 1e6
            record = {
                "hook_name": name,
                "mode": cfg.mode,
                "grid": grid,
                "tokens": after[0],
                "d": after[1],
                "mb_per_prompt": megabytes,
            }
            if cfg.mode == "skip" and before != after:
                failed.append(record | {"error": f"can't be skipped: it turns {before} into {after}"})
            else:
                made = generate(hooked, {name: EDITS[cfg.mode]}, prompts, cfg.seed, options)
                record["latents"], record["images"] = distances(made, untouched)
                done.append(record)
                pictures[name] = made[1]
            bar.update()
    done.sort(key=lambda h: -h["latents"])

    # 4. The table, the numbers and the pictures
    print(f"{'hook name':48} {'latents':>8} {'pictures':>9} {'tokens x d':>12} {'MB a prompt':>12}")
    for h in done:
        shape = f"{h['tokens']} x {h['d']}"
        print(f"{h['hook_name']:48} {h['latents']:8.3f} {h['images']:9.3f} {shape:>12} {h['mb_per_prompt']:12.1f}")
    for h in failed:
        print(f"{h['hook_name']:48} {h['error']}")
    seeds = [cfg.seed + i for i in range(len(prompts))]
    report = {"options": settings, "prompts": prompts, "seeds": seeds, "hooks": done + failed}
    write_atomically(out_dir / "ablate.json", (json.dumps(report, indent=1) + "\n").encode())
    labels = [(f"{h['hook_name']}\n{h['latents']:.3f}", pictures[h["hook_name"]]) for h in done[:SHOWN]]
    picture_grid(out_dir / "ablate.png", [("untouched", untouched[1]), *labels], prompts)
    written = [out_dir / "ablate.png"]
    if done:
        written.append(out_dir / "ablate_ranking.png")
        ranking(written[1], done[:SHOWN], f"{cfg.mode}: what each hook point does, mean over {len(prompts)} prompts")
    print(f"pictures in {' and '.join(map(str, written))}, numbers in {out_dir / 'ablate.json'}")


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
