"""Stage 1: which layer? Disable hook points one at a time and see what the images lose.

    python ablate.py                                       # the toy's attention blocks, skipped
    python ablate.py --model_name black-forest-labs/FLUX.1-schnell   # every block
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
        ablate_ranking.png, ablate.json; of a video model videos/<hook_name>_<prompt>.webp, of an
        audio model audio/<hook_name>_<prompt>.wav.

Two distances compare each run with the untouched run of the same seeds. Both are means over the
prompts:

    latents   |a - b| / |b|, where b are the final latents of the untouched run, and a the others
    images    root mean square difference of the pixels, which are numbers from 0 to 1; of the
              pixels of all frames of a video; of the samples of audio, from -1 to 1

The script does not search for combinations of layers.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    hook_names: list[str] | None = None
    """Disable these modules of the denoiser, one at a time. Give names or patterns: `*` stands for
    any text within one part of a dotted name, `**` also crosses dots. collect.py --list_hooks shows
    the names. If not given, "**.attentions.*", the attention blocks of a UNet, or every block of a
    model that has none."""

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
from diffusion.hook_names import ATTENTIONS, regex_of
from diffusion.loading import check_has_prompts, load_prompt_rows
from errors import UsageError, decimals
from hook import Edit, Generation, HookedDiffusionModel, Layout, NotHookable
from store.disk import claim_folder, write_json
from store.images import Media, describe_files, save_media
from store.inputs import InputImages, input_names
from store.prompts import with_seeds

MOST_SHOWN = 40  # rows of images, and bars: the hook points that matter most
# Options that do not decide the results, or stand in `HookedDiffusionModel.loaded_from`
NOT_SETTINGS = ("out_dir", "device", "cpu_offload", "lora", "trust_remote_code")
UNTOUCHED = "untouched"  # the name of the run without an edit
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
    inputs = InputImages.of_rows(prompts)
    model, options = load_model(cfg)
    if cfg.dataset_name is None:
        check_has_prompts(model.pipe, prompts)
    input_images = None
    if inputs is not None:
        model.check_image_arguments(inputs.sizes)
        inputs.check_sizes(is_resized=cfg.height is not None and cfg.width is not None)
        input_images = inputs.of(prompts)
    generation = Generation.from_rows(prompts, options, input_images)
    if not cfg.hook_names:
        cfg = replace(cfg, hook_names=default_hook_names(model, generation))
    records = find_records(cfg, model, generation)

    # 2. A folder that holds nothing else
    out_dir = Path(cfg.out_dir)
    settings = {name: value for name, value in vars(cfg).items() if name not in NOT_SETTINGS}
    settings |= model.loaded_from
    if inputs is None:
        del settings["inputs"]  # earlier versions had no such option
    else:
        settings["input_images"] = input_names(prompts)
    claim_folder(out_dir, "ablate.json", settings)

    # 3. One run untouched, then one per hook point
    runs = ablate(model, generation, records, cfg.mode, out_dir)
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
    if inputs is not None:
        report["inputs"] = [prompt["inputs"] for prompt in prompts]
    for record in ablated:
        add_files(record, runs[record["hook_name"]])
    add_files(report, runs[UNTOUCHED])
    write_json(out_dir / "ablate.json", report)
    pictures = draw(out_dir, cfg.mode, generation.prompts, ablated, runs)
    names = " and ".join(str(path) for path in pictures)
    files = [file for run in runs.values() for file in run.files]
    print(f"pictures in {names}, numbers in {out_dir / 'ablate.json'}{describe_files(files)}")
    return [out_dir / "ablate.json", *pictures, *files]


def load_lines(cfg: Config) -> list[dict]:
    """Return the prompts as in prompts.jsonl: {"prompt", "seed", perhaps "negative_prompt", ...}.

    Raises UsageError for --mode mean with a single prompt.
    """
    prompts = load_prompt_rows(cfg)
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
        cfg.model_name,
        dtype,
        device,
        cfg.cpu_offload,
        cfg.lora,
        variant=cfg.variant,
        revision=cfg.revision,
        trust_remote_code=cfg.trust_remote_code or None,
    )
    model.hide_progress_bar()
    extra = parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    return model, model.arguments(1, "pt", extra, **cfg.pipeline_options())


def default_hook_names(model: HookedDiffusionModel, generation: Generation) -> list[str]:
    """Return what is ablated if the user names nothing: the pattern of a UNet's attention blocks,
    or all blocks of a model without such.

    Prints one line about the blocks. Raises UsageError if there are none.
    """
    if any(re.fullmatch(regex_of(ATTENTIONS), name) for name in model.modules()):
        return [ATTENTIONS]
    blocks = model.blocks(generation.prompts, **generation.seeded_arguments())
    names = [name for of_denoiser in blocks.values() for name in of_denoiser]
    if not names:
        raise UsageError(
            "no block of this model returns image tokens; name modules with --hook_names "
            "(collect.py --list_hooks shows all)"
        )
    print(
        f"note: no module of this model matches {ATTENTIONS!r}, so its {len(names)} blocks are "
        f"ablated, {names[0]} to {names[-1]}; choose others with --hook_names (collect.py "
        "--list_hooks shows all)"
    )
    return names


def find_records(
    cfg: Config, model: HookedDiffusionModel, generation: Generation
) -> list[dict[str, Any]]:
    """Return the record of each hook point that --hook_names mean, before it is ablated.

    Only shapes are looked at, in a step that is thrown away: the activations of all blocks of a
    large model would not fit in memory. Raises UsageError for a module that has no image tokens, if
    the user spelt its name out or if none has some, and if no module can be skipped.
    """
    arguments = generation.seeded_arguments()
    returned, steps = model.layouts(cfg.hook_names, generation.prompts, **arguments)
    taken = dict.fromkeys(returned)
    if cfg.mode == "skip":
        taken, _ = model.layouts(cfg.hook_names, generation.prompts, side="input", **arguments)

    records = []
    reasons = {}
    for name, layout in returned.items():
        if isinstance(layout, NotHookable):
            reasons[name] = layout.reason
        else:
            num_steps = arguments.get("num_inference_steps")
            if steps[name] is not None:
                num_steps = len(steps[name])
            records.append(describe(name, cfg.mode, layout, taken[name], num_steps))
    for name, reason in reasons.items():
        if not records or name in cfg.hook_names:
            raise UsageError(f"{name}: {reason}")
    if all("error" in record for record in records):
        first = records[0]
        raise UsageError(f"{first['hook_name']} {first['error']}")
    return records


def describe(
    name: str,
    mode: str,
    returned: Layout,
    taken: Layout | NotHookable | None,
    num_steps: int | None,
) -> dict[str, Any]:
    """Return what is known about a hook point before it is ablated.

    returned, taken: where the tokens are in what the module returns and takes. num_steps: None if
    the model does not say it. "error" says why the module can't be skipped: it takes and returns
    tokens of different shapes, or takes none.
    """
    tokens = max(returned.counts)
    megabytes = None
    if num_steps is not None:
        megabytes = num_steps * tokens * returned.d * BYTES_PER_NUMBER / 1e6
    record = {
        "hook_name": name,
        "mode": mode,
        "grid": returned.grid,
        "tokens": tokens,
        "d": returned.d,
        "mb_per_prompt": megabytes,
    }
    if mode != "skip":
        return record
    if isinstance(taken, NotHookable):
        record["error"] = f"can't be skipped: {taken.reason}; use --mode zero or mean for it"
    elif (max(taken.counts), taken.d) != (tokens, returned.d):
        record["error"] = (
            f"can't be skipped: it turns (tokens, d) = {(max(taken.counts), taken.d)} into "
            f"{(tokens, returned.d)}; use --mode zero or mean for it"
        )
    return record


class Run(NamedTuple):
    """What one generation shows."""

    pictures: Tensor
    """(P, 3, H, W) in [0, 1]"""

    explanation: str
    """What the pictures show of a video or of audio; "" for images."""

    files: list[Path]
    """The videos or audio, one per prompt; [] for images."""


def ablate(
    model: HookedDiffusionModel,
    generation: Generation,
    records: list[dict],
    mode: str,
    folder: Path,
) -> dict[str, Run]:
    """Generate untouched, and once for each hook point that can be ablated.

    The distances "latents" and "images" are added to its record, and videos and audio are saved in
    the folder. Returns {"untouched": its run, hook_name: its run}.
    """
    runs = {}
    with tqdm(total=1 + len(records), unit="run", desc="ablating") as bar:
        untouched = generate(model, generation)
        runs[UNTOUCHED] = show(required_media(model, untouched), folder, UNTOUCHED)
        bar.update()
        for record in records:
            if "error" not in record:
                name = record["hook_name"]
                edits = {name: EDITS[mode]}
                made = generate(model, generation, lambda sampling, edits=edits: edits)
                record["latents"], record["images"] = distances(made, untouched)
                runs[name] = show(required_media(model, made), folder, name)
            bar.update()
    return runs


def show(made: Media, folder: Path, name: str) -> Run:
    """Return the pictures of a run, and save its videos or audio under its name."""
    return Run(made.pictures(), made.explanation(), save_media(made, folder, name))


def add_files(record: dict, run: Run) -> None:
    """Add the run's files to a record of ablate.json, if there are any."""
    if run.files:
        record["files"] = [f"{file.parent.name}/{file.name}" for file in run.files]


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
        latents = decimals(record["latents"], 3)
        images = decimals(record["images"], 3)
        shape = f"{record['tokens']} x {record['d']}"
        megabytes = "?"
        if record["mb_per_prompt"] is not None:
            megabytes = decimals(record["mb_per_prompt"], 1)
        print(f"{record['hook_name']:48} {latents:>8} {images:>9} {shape:>12} {megabytes:>13}")
    for record in failed:
        print(f"{record['hook_name']:48} {record['error']}")


def draw(
    folder: Path,
    mode: str,
    prompts: list[str],
    ablated: list[dict],
    runs: dict[str, Run],
) -> list[Path]:
    """Write ablate.png, and ablate_ranking.png if anything was ablated; return their paths.

    runs: as `ablate` returns them.
    """
    grid = [ImageRow("untouched", runs[UNTOUCHED].pictures)]
    for record in ablated[:MOST_SHOWN]:
        label = f"{record['hook_name']}\n{decimals(record['latents'], 3)}"
        grid.append(ImageRow(label, runs[record["hook_name"]].pictures))
    written = [folder / "ablate.png"]
    plot_images(written[0], grid, prompts, runs[UNTOUCHED].explanation)

    if ablated:
        written.append(folder / "ablate_ranking.png")
        title = f"{mode}: what each hook point does, mean over {len(prompts)} prompts"
        plot_ablation_ranking(written[1], ablated[:MOST_SHOWN], title)
    return written


if __name__ == "__main__":
    run_script(main, Config)  # in a notebook it returns at once, so that a pasted cell runs nothing
