"""Stage 1: which layer? Disable hook points one at a time and see what the images lose.

    python ablate.py                                       # the toy's attention blocks, skipped
    python ablate.py --model_name sd-legacy/stable-diffusion-v1-5 --dataset_name "a red fox"
    python ablate.py --hook_names "up_blocks.*.attentions.*" mid_block --mode mean

In a notebook:

    paths = main(Config(hook_names=["mid_block"], mode="zero"))

There are three ways to disable a module (--mode):

    skip    its output becomes its input
    zero    its output becomes 0
    mean    its output becomes its mean over the prompts (one mean for the conditional rows, one for
            the unconditional rows): only what all prompts share stays

All rows are edited, conditional and unconditional, but only the tokens of the image. The text
tokens of a block that carries image and text together stay, and so do the skip connections of a
UNet's down block.

Reads   a diffusers folder or hub id, and prompts, as collect.py does.
Writes  <out_dir>/ablate.png (rows: hook names, the untouched images first; columns: prompts),
        ablate_ranking.png, ablate.json.

Two distances compare each run with the untouched run of the same seeds. Both are means over the
prompts:

    latents   |a - b| / |b|, where b are the final latents of the untouched run, and a the others
    images    root mean square difference of the pixels, which are numbers from 0 to 1; of the
              pixels of all frames of a video; of the samples of audio, from -1 to 1

The script does not search for combinations of layers.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cli import (
    GenerationConfig,
    answer_help,
    check_generation_options,
    check_positive,
    parse_object,
    resolve_device,
    resolve_dtype,
    run_script,
)


@dataclass
class Config(GenerationConfig):
    # data
    max_num_examples: int = 8
    """Use at most this many prompts, all in one batch; they are the columns of the picture. Lower
    it if the GPU's memory is too small."""

    # what to disable
    hook_names: list[str] = field(default_factory=lambda: ["**.attentions.*"])
    """Disable these modules of the denoiser, one at a time. Give names or patterns: `*` stands for
    any text within one part of a dotted name, `**` also crosses dots. collect.py --list_hooks shows
    the names."""

    mode: Literal["skip", "zero", "mean"] = "skip"
    """Replace the module's output by its input (skip), by 0 (zero), or by its mean over the prompts
    (mean)."""

    # output
    out_dir: str = "ablate"
    """Write the pictures and the numbers into this folder."""


if __name__ == "__main__":
    answer_help(Config)  # --help and a mistyped option are answered before torch is imported

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.plots import ImageRow, plot_ablation_ranking, plot_images
from diffusion.generate import Generated, generate, required_media
from errors import UsageError
from hook import Edit, Generation, HookedDiffusionModel, find_model
from store.disk import claim_folder, write_json
from store.prompts import default_dataset, load_prompts, with_seeds

MOST_SHOWN = 40  # rows of images, and bars: the hook points that matter most
NOT_SETTINGS = ("out_dir", "device", "cpu_offload")  # options that do not decide the results
BYTES_PER_NUMBER = 2  # collect.py stores 16 bits


def to_input(x: Tensor, taken: Tensor) -> Tensor:
    """Return what the module took, in place of what it returned."""
    return taken


def to_mean(x: Tensor) -> Tensor:
    """Return the mean over the prompts for each of them: (P, tokens, d) -> (P, tokens, d)."""
    return x.mean(0, keepdim=True).expand_as(x)


EDITS = {
    "skip": Edit(to_input, rows="all", with_input=True),
    "zero": Edit(torch.zeros_like, rows="all"),
    "mean": Edit(to_mean, rows="all"),
}


def main(cfg: Config) -> list[Path]:
    """Ablate every hook point; return the files that were written.

    Raises UsageError for an option or prompts that can't be used, and if out_dir holds something
    else.
    """
    check_positive(cfg, "max_num_examples", "num_inference_steps")
    check_generation_options(cfg)

    # 1. What to generate, and the shapes of what the layers take and return
    prompts = load_lines(cfg)
    model, options = load_model(cfg)
    generation = Generation.from_rows(prompts, options)
    first_step = model.first_step(
        cfg.hook_names, generation.prompts, save_input=True, **generation.arguments()
    )
    records = [describe(name, cfg.mode, first_step) for name in first_step["grid"]]

    # 2. A folder that holds nothing else
    out_dir = Path(cfg.out_dir)
    settings = {name: value for name, value in vars(cfg).items() if name not in NOT_SETTINGS}
    claim_folder(out_dir, "ablate.json", settings)

    # 3. One run untouched, then one per hook point
    untouched, images = ablate(model, generation, records, cfg.mode)
    ablated = [record for record in records if "error" not in record]
    ablated.sort(key=lambda record: -record["latents"])
    failed = [record for record in records if "error" in record]

    # 4. The table, the numbers and the pictures
    print_table(ablated, failed)
    report = {
        "options": settings,
        "prompts": generation.prompts,
        "seeds": generation.seeds,
        "hooks": ablated + failed,
    }
    write_json(out_dir / "ablate.json", report)
    pictures = draw(out_dir, cfg.mode, generation.prompts, ablated, untouched, images)
    names = " and ".join(str(path) for path in pictures)
    print(f"pictures in {names}, numbers in {out_dir / 'ablate.json'}")
    return [out_dir / "ablate.json", *pictures]


def load_lines(cfg: Config) -> list[dict]:
    """Return the prompts as in prompts.jsonl: {"prompt", "seed", perhaps "negative_prompt", ...}.

    Raises UsageError for --mode mean with a single prompt.
    """
    dataset_name = cfg.dataset_name or default_dataset(find_model(cfg.model_name))
    prompts = load_prompts(
        dataset_name, cfg.split, cfg.column, cfg.negative_prompt, cfg.max_num_examples
    )
    if cfg.mode == "mean" and len(prompts) < 2:
        raise UsageError(
            "--mode mean needs two prompts or more to take the mean over; raise --max_num_examples"
        )
    return with_seeds(prompts, cfg.seed)


def load_model(cfg: Config) -> tuple[HookedDiffusionModel, dict[str, Any]]:
    """Return the model, and the pipeline's arguments that are the same for all prompts."""
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    model = HookedDiffusionModel.from_pretrained(
        cfg.model_name, dtype, device, cfg.cpu_offload, variant=cfg.variant, revision=cfg.revision
    )
    model.pipe.set_progress_bar_config(disable=True)
    extra = parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    return model, model.arguments(1, "pt", extra, **cfg.pipeline_options())


def describe(name: str, mode: str, first_step: dict) -> dict[str, Any]:
    """Return what is known about a hook point before it is ablated.

    first_step: the cache of `HookedDiffusionModel.first_step`, with inputs. "error" says why the
    module can't be skipped: it takes and returns tokens of different shapes.
    """
    taken = tuple(first_step["input"][name].shape[2:])
    returned = tuple(first_step["output"][name].shape[2:])
    tokens, d = returned
    record = {
        "hook_name": name,
        "mode": mode,
        "grid": first_step["grid"][name],
        "tokens": tokens,
        "d": d,
        "mb_per_prompt": first_step["num_steps"] * tokens * d * BYTES_PER_NUMBER / 1e6,
    }
    if mode == "skip" and taken != returned:
        record["error"] = f"can't be skipped: it turns {taken} into {returned}"
    return record


def ablate(
    model: HookedDiffusionModel, generation: Generation, records: list[dict], mode: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Generate untouched, and once for each hook point that can be ablated.

    The distances "latents" and "images" are added to its record. Returns pictures of the untouched
    run, (P, 3, H, W) in [0, 1], and {hook_name: pictures}.
    """
    images = {}
    with tqdm(total=1 + len(records), unit="run", desc="ablating") as bar:
        untouched = generate(model, generation)
        untouched_images = required_media(model, untouched).pictures()
        bar.update()
        for record in records:
            if "error" not in record:
                name = record["hook_name"]
                edits = {name: EDITS[mode]}
                made = generate(model, generation, lambda sampling, edits=edits: edits)
                record["latents"], record["images"] = distances(made, untouched)
                images[name] = required_media(model, made).pictures()
            bar.update()
    return untouched_images, images


def distances(made: Generated, untouched: Generated) -> tuple[float, float]:
    """Return two distances, each the mean over the prompts.

    The first is |a - b| / |b| of the latents, the second the root mean square difference of the
    images, videos or audio.
    """
    latents = made.sample.float().flatten(1)
    untouched_latents = untouched.sample.float().flatten(1)
    relative = (latents - untouched_latents).norm(dim=1) / untouched_latents.norm(dim=1)

    difference = (made.media.values.float() - untouched.media.values.float()).flatten(1)
    rms = difference.square().mean(1).sqrt()
    return relative.mean().item(), rms.mean().item()


def print_table(ablated: list[dict], failed: list[dict]) -> None:
    """Print a line for each hook point, those that can't be ablated last."""
    print(f"{'hook name':48} {'latents':>8} {'images':>9} {'tokens x d':>12} {'MB per prompt':>13}")
    for record in ablated:
        shape = f"{record['tokens']} x {record['d']}"
        print(
            f"{record['hook_name']:48} {record['latents']:8.3f} {record['images']:9.3f} "
            f"{shape:>12} {record['mb_per_prompt']:13.1f}"
        )
    for record in failed:
        print(f"{record['hook_name']:48} {record['error']}")


def draw(
    folder: Path,
    mode: str,
    prompts: list[str],
    ablated: list[dict],
    untouched: Tensor,
    images: dict[str, Tensor],
) -> list[Path]:
    """Write ablate.png, and ablate_ranking.png if anything was ablated; return their paths."""
    grid = [ImageRow("untouched", untouched)]
    for record in ablated[:MOST_SHOWN]:
        label = f"{record['hook_name']}\n{record['latents']:.3f}"
        grid.append(ImageRow(label, images[record["hook_name"]]))
    written = [folder / "ablate.png"]
    plot_images(written[0], grid, prompts)

    if ablated:
        written.append(folder / "ablate_ranking.png")
        title = f"{mode}: what each hook point does, mean over {len(prompts)} prompts"
        plot_ablation_ranking(written[1], ablated[:MOST_SHOWN], title)
    return written


if __name__ == "__main__":
    run_script(main, Config)  # in a notebook it returns at once, so that a pasted cell runs nothing
