"""Stage 1: which layer? Disable hook points one at a time and see what the images lose.

    python ablate.py                                                       # the toy's attention blocks, skipped
    python ablate.py --model_name sd-legacy/stable-diffusion-v1-5 --dataset_name "a cat on a chair" --num_inference_steps 20
    python ablate.py --hook_names "up_blocks.*.attentions.*" mid_block --mode mean --max_num_examples 16

Three ways (`--mode`): skip makes the module's output its input, zero makes it 0, mean makes it its
mean over the prompts (each half of the guidance on its own), so that what the prompt and the seed
decided there is gone and the rest stays. All rows are edited, conditional and unconditional, but of
each only the image tokens: text of a joint block stays, and so do the skip connections of a UNet's
down block.

Reads   a diffusers folder or hub id, and prompts, as collect.py does.
Writes  <out_dir>/ablate.png (rows: hook names, the first untouched; columns: prompts), ablate_ranking.png, ablate.json.

Distances are to the untouched run with the same seeds: |a - b| / |b| of the final latents, and the
root mean square over pixels and channels of the pictures in [0, 1]. It does not search for
combinations of layers.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.plots import ImageRow, plot_ablation_ranking, plot_images
from cli import GenerationConfig, check_positive, parse_object, resolve_device, resolve_dtype, run
from diffusion.generate import Generated, generate, required_images
from errors import UsageError
from hook import Edit, Generation, HookedDiffusionModel, find_model
from store.disk import claim_folder, write_json
from store.prompts import default_dataset, load_prompts, with_seeds

SHOWN = 40  # rows of pictures at most, and bars: the hook points that matter most


@dataclass
class Config(GenerationConfig):
    hook_names: list[str] = field(default_factory=lambda: ["**.attentions.*"])
    """Modules of the denoiser, or globs."""

    mode: Literal["skip", "zero", "mean"] = "skip"
    """What becomes of the module's output."""

    max_num_examples: int = 8
    """Prompts, all in one batch: the columns of the picture."""

    out_dir: str = "ablate"
    """Folder for the pictures and the numbers."""


EDITS = {
    "skip": Edit(lambda x, before: before, rows="all", with_input=True),
    "zero": Edit(torch.zeros_like, rows="all"),
    "mean": Edit(lambda x: x.mean(0, keepdim=True).expand_as(x), rows="all"),
}


def load_rows(cfg: Config) -> list[dict]:
    """The prompts, each with its seed. Raises UsageError for --mode mean of a single one."""
    dataset_name = cfg.dataset_name or default_dataset(find_model(cfg.model_name))
    rows = load_prompts(
        dataset_name, cfg.split, cfg.column, cfg.negative_prompt, cfg.max_num_examples
    )
    if cfg.mode == "mean" and len(rows) < 2:
        raise UsageError(
            "--mode mean needs two prompts or more to take the mean over; raise --max_num_examples"
        )
    return with_seeds(rows, cfg.seed)


def load_model(cfg: Config) -> tuple[HookedDiffusionModel, dict]:
    """The model, and the pipeline's arguments."""
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    model = HookedDiffusionModel.from_pretrained(
        cfg.model_name, dtype, device, cfg.cpu_offload, variant=cfg.variant, revision=cfg.revision
    )
    model.pipe.set_progress_bar_config(disable=True)
    extra = parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    return model, model.arguments(1, "pt", extra, **cfg.pipeline_options())


def describe(name: str, mode: str, first_step: dict) -> dict:
    """What is known of a hook point before it is ablated. first_step: of
    `HookedDiffusionModel.first_step`, with inputs."""
    before = tuple(first_step["input"][name].shape[2:])
    after = tuple(first_step["output"][name].shape[2:])
    tokens, d = after
    record = {
        "hook_name": name,
        "mode": mode,
        "grid": first_step["grid"][name],
        "tokens": tokens,
        "d": d,
    }
    record["mb_per_prompt"] = first_step["num_steps"] * tokens * d * 2 / 1e6
    if mode == "skip" and before != after:
        record["error"] = f"can't be skipped: it turns {before} into {after}"
    return record


def ablate(
    model: HookedDiffusionModel, generation: Generation, records: list[dict], mode: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Generate untouched, and with each hook point ablated that can be; its distances are added to
    its record.

    Returns the untouched images (P, 3, H, W) in [0, 1], and {hook_name: images}.
    """
    images = {}
    with tqdm(total=1 + len(records), unit="run", desc="ablating") as bar:
        untouched = generate(model, generation)
        untouched_images = required_images(model, untouched)
        bar.update()
        for record in records:
            name = record["hook_name"]
            if "error" not in record:
                made = generate(model, generation, lambda sampling, name=name: {name: EDITS[mode]})
                record["latents"], record["images"] = distances(made, untouched)
                images[name] = required_images(model, made)
            bar.update()
    return untouched_images, images


def distances(made: Generated, untouched: Generated) -> tuple[float, float]:
    """|a - b| / |b| of latents and root mean square difference of images, each the mean over the
    prompts."""
    latents, latents_0 = made.sample.float(), untouched.sample.float()
    relative = (latents - latents_0).flatten(1).norm(dim=1) / latents_0.flatten(1).norm(dim=1)
    difference = made.images.float() - untouched.images.float()
    return relative.mean().item(), difference.square().flatten(1).mean(1).sqrt().mean().item()


def print_table(done: list[dict], failed: list[dict]) -> None:
    print(f"{'hook name':48} {'latents':>8} {'pictures':>9} {'tokens x d':>12} {'MB a prompt':>12}")
    for hook in done:
        shape = f"{hook['tokens']} x {hook['d']}"
        numbers = f"{hook['latents']:8.3f} {hook['images']:9.3f} {shape:>12} {hook['mb_per_prompt']:12.1f}"
        print(f"{hook['hook_name']:48} {numbers}")
    for hook in failed:
        print(f"{hook['hook_name']:48} {hook['error']}")


def main(cfg: Config) -> list[Path]:
    """Ablate every hook point; return the files that were written.

    Raises UsageError for an option or prompts that can't be used, and if out_dir holds something
    else.
    """
    check_positive(cfg, "max_num_examples", "num_inference_steps")

    # 1. What to generate, and the shapes of what the layers take and return
    rows = load_rows(cfg)
    model, options = load_model(cfg)
    generation = Generation.from_rows(rows, options)
    first_step = model.first_step(
        cfg.hook_names, generation.prompts, save_input=True, **generation.arguments()
    )
    records = [describe(name, cfg.mode, first_step) for name in first_step["grid"]]

    # 2. A folder that holds nothing else
    out_dir = Path(cfg.out_dir)
    settings = {
        name: value
        for name, value in vars(cfg).items()
        if name not in ("out_dir", "device", "cpu_offload")
    }
    claim_folder(out_dir, "ablate.json", settings)

    # 3. One run untouched, then one per hook point
    untouched, images = ablate(model, generation, records, cfg.mode)
    done = [record for record in records if "error" not in record]
    failed = [record for record in records if "error" in record]
    done.sort(key=lambda record: -record["latents"])

    # 4. The table, the numbers and the pictures
    print_table(done, failed)
    report = {
        "options": settings,
        "prompts": generation.prompts,
        "seeds": generation.seeds,
        "hooks": done + failed,
    }
    written = [out_dir / "ablate.json", out_dir / "ablate.png"]
    write_json(written[0], report)

    grid = [ImageRow("untouched", untouched)]
    for record in done[:SHOWN]:
        label = f"{record['hook_name']}\n{record['latents']:.3f}"
        grid.append(ImageRow(label, images[record["hook_name"]]))
    plot_images(written[1], grid, generation.prompts)
    if done:
        written.append(out_dir / "ablate_ranking.png")
        title = f"{cfg.mode}: what each hook point does, mean over {len(rows)} prompts"
        plot_ablation_ranking(written[2], done[:SHOWN], title)
    print(f"pictures in {' and '.join(map(str, written[1:]))}, numbers in {written[0]}")
    return written


if __name__ == "__main__":
    run(main, Config)
