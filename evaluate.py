"""Stage 5: how good is an SAE? By timestep, on held-out prompts; and grafted into the model.

    python evaluate.py                                    # the newest SAE, on its training data
    python evaluate.py --sae saes/mid_block_k32_M20480 --graft
    python evaluate.py --sae theirs --data activations/mid_block.npy  # any SAE that loads

It measures FVU, explained variance, L0, cosine, dead and always-on latents on vectors that training
never saw; analysis/metrics.py defines each. With --graft it also generates with the SAE's
reconstruction in the place of the hook point's activations, once in all steps and once in each
window of steps:

    untouched      the model's own run with these seeds
    graft          in the steps of a window the hook point returns x_hat = sae(x) instead of x
    mean ablation  in these steps it returns the mean of x instead: the mean over the prompts and
                   tokens of the same step in the untouched run
    distance       root mean square difference to the untouched run's final latents (or images),
                   mean over the prompts
    recovered      1 - distance(graft) / distance(mean ablation): 1 for x_hat = x, 0 for an SAE that
                   only knows the mean; it can be below 0

FVU weighs every number of a vector alike; "recovered" weighs an error by what the rest of the model
makes of it. It follows the "loss recovered" of SAEs on language models (Rajamanoharan et al. 2024,
arXiv 2404.16014), which ablates to zero; here the loss is the distance to the model's own sample.

In a notebook, for any SAE or function and any prompts:

    generation = Generation(prompts, seeds, options=model.arguments(output_type="pt"))
    report, images = graft(model, sae, HookPoint("mid_block"), generation)

Reads   an SAE folder; activation files of collect.py, or any .npy; with --graft also the model that
        made them.
Writes  <out_dir>/<name of the SAE>/: evaluate.json, evaluate.png; graft.json, graft.png.

The held-out prompts are those that train.py holds out in the same files. The script trains nothing
and changes no SAE.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cli import (
    answer_help,
    check_positive,
    refuse_unused,
    resolve_device,
    resolve_dtype,
    run_script,
)


@dataclass
class Config:
    # model
    sae: str | None = None
    """Evaluate the SAE in this folder. If not given, the newest one in saes/ is taken."""

    model_name: str | None = None
    """With --graft: generate with this model, named as for collect.py. If not given, the model that
    made the activations is used. A Python file of yours has to be given, since it is run."""

    lora: list[str] = field(default_factory=list)
    """With --graft: add these LoRAs to the weights, as in collect.py. If neither this nor
    --model_name is given, those that made the activations are added."""

    trust_remote_code: bool = False
    """With --graft: run the Python code that comes with the model of a folder or of the hub. Read
    it first: it can do all that you can."""

    transfer: bool = False
    """Use the SAE on purpose where it was not trained: at another hook point, or on a model with
    other weights."""

    # data
    data: list[str] = field(default_factory=list)
    """Measure on these activation files of one hook point. If not given, the SAE's training files
    are used."""

    # graft
    graft: bool = False
    """Also generate with the SAE's reconstruction in the place of the activations."""

    num_prompts: int = 8
    """With --graft: generate this many held-out prompts. Each is generated 3 + 2 x windows times:
    11 by default. Raise it for a smaller standard error."""

    windows: int = 4
    """With --graft: divide the steps into this many windows of equal length, at most one per step.
    Raise it to see more exactly in which steps an error matters."""

    # output
    out_dir: str = "evaluations"
    """Make a folder for each SAE in this folder."""

    # hardware
    batch_size: int = 4096
    """Put this many vectors (tokens of a step) through the SAE together. Lower it if the memory is
    too small. --graft_batch_size is for prompts."""

    graft_batch_size: int = 8
    """With --graft: generate this many prompts together. Lower it if the memory is too small."""

    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


if __name__ == "__main__":
    answer_help(Config)  # --help and a mistyped option are answered before torch is imported

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.feature_edits import check_input_width, map_samples, replacing_edits
from analysis.metrics import Metrics, evaluate, total
from analysis.plots import plot_evaluation, plot_graft
from diffusion.generate import Generated, generate_batches
from errors import UsageError, decimals
from hook import Generation, HookedDiffusionModel, model_of, recorded_model
from sae import Sae, newest_sae
from store.activation_file import image_of, prompt_key, read_description, read_prompts
from store.dataset import Activations
from store.disk import claim_folder, read_json, write_json
from store.hook_point import HookPoint
from store.identity import activations_of, check_belongs, check_held_out, fingerprint
from store.inputs import read_inputs

CLIP = "openai/clip-vit-large-patch14"
# Mean and standard deviation of the colours of the images that CLIP was trained on
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PRINTED_METRICS = ("fvu", "explained_variance", "l0", "cosine", "dead", "always_on")
DISTANCES = ("latents", "images", "clip")

Replacement = Callable[[str, int, Tensor], Tensor | None]
"""replacement(role, step, x) -> what takes the place of x (P, tokens, d) float32; None leaves
it."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""distance(a, b) -> the distance of each of P samples or images: (P, ...), (P, ...) -> (P,)."""


def main(cfg: Config) -> list[Path]:
    """Measure one SAE; return the files that were written.

    Raises UsageError for an option, an SAE or data that can't be used, and if its folder holds
    something else.
    """
    check_config(cfg)

    # 1. The SAE, and vectors that it was not trained on
    device = resolve_device(cfg.device)
    path = Path(cfg.sae) if cfg.sae else newest_sae()
    sae = Sae.load_from_disk(path, device)
    activations = activations_of(sae, path, cfg.data, cfg.transfer)
    about = {"sae": str(path), "data": activations.paths}
    identity = {
        "sae_fingerprint": fingerprint(sae),
        "transfer": activations.transfer,
        "surely_unseen": check_held_out(sae, path, activations),
    }
    if cfg.graft and cfg.model_name is None:  # refused now, before anything is measured
        recorded_model(held_out_prompts(activations, cfg.num_prompts)[1])
    folder = Path(cfg.out_dir) / folder_name(path)
    claim_folder(folder, "evaluate.json", about, key=None)

    # 2. Its numbers on them
    by_step = evaluate([sae], activations, cfg.batch_size, progress=True)[0]
    if not math.isfinite(total(by_step).fvu):
        raise UsageError(
            f"{activations.paths[0]}: NaN or inf in held-out vectors; collect it again"
        )
    set_aside_other_graft(folder, identity["sae_fingerprint"])
    record = write_numbers(folder, about | identity, activations, by_step, path.name)
    print(
        f"{path}: {sae.num_latents} latents, {sae.activation}, "
        f"on {record['vectors']:,} held-out vectors"
    )
    print_numbers(record)
    written = [folder / "evaluate.json", folder / "evaluate.png"]

    # 3. Its reconstruction in the model
    if cfg.graft:
        written += graft_held_out(cfg, sae, path, activations, folder, device)
    print(f"saved in {folder}/: {', '.join(path.name for path in written)}")
    return written


def check_config(cfg: Config) -> None:
    """Raise UsageError for an option that can't be used, or that nothing would read."""
    check_positive(cfg, "batch_size", "num_prompts", "windows", "graft_batch_size")
    if not cfg.graft:
        graft_options = ["model_name", "lora", "trust_remote_code"]
        graft_options += ["num_prompts", "windows", "graft_batch_size"]
        refuse_unused(cfg, graft_options, "it is for --graft, which is not given")


def folder_name(sae_path: Path) -> str:
    """Return the name of an SAE: that of its folder, also if a file in it was named."""
    folder = sae_path if sae_path.is_dir() else sae_path.parent
    return folder.resolve().name


# ------------------------------------------------------------------------------ numbers


def write_numbers(
    folder: Path, about: dict, activations: Activations, by_step: list[Metrics], name: str
) -> dict:
    """Write evaluate.json and evaluate.png; return the record that evaluate.json holds.

    by_step: the metrics of each timestep's vectors. name: the title of the figure.
    """
    by_timestep = []
    for timestep, metrics in zip(activations.timesteps, by_step):
        if metrics.n:
            by_timestep.append({"timestep": timestep, **metrics.summary()})

    record = about | {
        "hook_name": activations.hook_name,
        "whole_prompts": activations.whole_prompts,
    }
    record |= total(by_step).summary() | {"by_timestep": by_timestep}
    write_json(folder / "evaluate.json", record)
    plot_evaluation(folder / "evaluate.png", by_step, activations.timesteps, name)
    return record


def print_numbers(record: dict) -> None:
    """Print the numbers over all held-out vectors, and at the first and the last timestep."""
    for name in PRINTED_METRICS:
        line = f"  {name:18} {decimals(record[name], 4)}"
        if record["by_timestep"]:
            for numbers in (record["by_timestep"][0], record["by_timestep"][-1]):
                line += f"   at t = {numbers['timestep']:g}: {decimals(numbers[name], 4)}"
        print(line)
    if not record["whole_prompts"]:
        print(
            "note: there are no prompts to hold out whole, so the held-out vectors are from the "
            "same samples as the others"
        )


# ------------------------------------------------------------------------------ graft


@torch.no_grad()
def graft_held_out(
    cfg: Config, sae: Sae, path: Path, activations: Activations, folder: Path, device: torch.device
) -> list[Path]:
    """Generate held-out prompts with the SAE in place; write graft.json and graft.png, and return
    the paths that were written."""
    lines, meta = held_out_prompts(activations, cfg.num_prompts)
    model, options = model_of(
        meta,
        cfg.model_name,
        device,
        resolve_dtype("auto", device),
        cfg.lora,
        cfg.trust_remote_code,
    )
    # An SAE of another package does not say what it was trained on; its data does
    origin = sae.cfg if "fingerprint" in sae.cfg else sae.cfg | meta
    mismatches = check_belongs(str(path), origin, model=model, transfer=cfg.transfer)
    transfer = activations.transfer + mismatches
    inputs = read_inputs([Path(name).parent for name in activations.paths], lines)
    generation = Generation.from_rows(lines, model.arguments(1, "pt", options), inputs)
    hook_point = HookPoint.from_description(meta)
    windows = possible_windows(cfg.windows, model, hook_point, generation)
    clip, remark = clip_distance(device=device)
    print(remark)

    report, images = graft(
        model,
        sae,
        hook_point,
        generation,
        windows,
        batch_size=cfg.graft_batch_size,
        clip=clip,
        transfer=True,  # it was checked above, and what does not fit stands in the report
    )

    written = [folder / "graft.json", folder / "graft.png"]
    write_json(written[0], report | {"sae_fingerprint": fingerprint(sae), "transfer": transfer})
    plot_graft(written[1], report, images)
    print_graft(report)
    return written


def possible_windows(
    wanted: int, model: HookedDiffusionModel, hook_point: HookPoint, generation: Generation
) -> int:
    """Return into how many windows the steps are divided: `wanted`, or one per step if there are
    fewer steps, and then one line says so."""
    name = hook_point.hook_name
    batch = next(generation.batches(1))
    arguments = batch.seeded_arguments()
    _, steps = model.layouts(name, batch.prompts, stream=hook_point.stream, **arguments)
    num_steps = len(steps[name])
    if not 0 < num_steps < wanted:
        return wanted
    print(f"note: {name} runs in {num_steps} steps, so there are {num_steps} windows")
    return num_steps


def held_out_prompts(activations: Activations, count: int) -> tuple[list[dict], dict]:
    """Return (lines of prompts.jsonl, the description of their file) of held-out prompts.

    These are the first `count` in the first file that has any; of several images of a prompt one
    counts. Their seeds gave the activations. Raises UsageError if it is not known what to generate.
    """
    file, _, _ = activations.held_out_units[0]
    path = Path(activations.files[file].path)
    meta = read_description(path)
    if not meta or not path.with_name("prompts.jsonl").exists():
        raise UsageError(
            f"--graft: {path} is not from collect.py with its prompts.jsonl, so it is not known "
            "what to generate; name such a file with --data, or leave out --graft"
        )
    if meta.get("images") is not None:
        raise UsageError(
            f"--graft: {path} is from real images (--images), and grafting needs a generation; "
            "leave out --graft"
        )

    lines = read_prompts(path)
    if not activations.whole_prompts:
        raise UsageError(
            f"--graft: all {len(lines)} rows of {path} are of one prompt, so there is no held-out "
            "prompt to generate; collect two prompts or more, or leave out --graft"
        )
    vectors_per_row = meta["shape"][1] * meta["shape"][2]
    units_of_file = activations.held_out_units[activations.held_out_units[:, 0] == file]
    rows = dict.fromkeys((units_of_file[:, 1] // vectors_per_row).tolist())

    # Of lines with the same prompt the first gives the place, the last the seed
    unique = {}
    for row in rows:
        prompt = lines[row]["prompt"] or prompt_key(lines[row])  # an empty one is known by its seed
        key = (prompt, image_of(lines[row])) if isinstance(prompt, str) else row
        unique[key] = lines[row]
    return list(unique.values())[:count], meta


def set_aside_other_graft(folder: Path, sae_fingerprint: str) -> None:
    """Rename graft.json and graft.png if they were made with another SAE, and say so.

    That SAE lay at the same path before this one was trained.
    """
    record = folder / "graft.json"
    if not record.exists():
        return
    theirs = read_json(record).get("sae_fingerprint")
    if theirs is None:
        print(
            f"note: {record} was written by an earlier version, so it can't be checked that it was "
            "made with this SAE; --graft makes it anew"
        )
    elif theirs != sae_fingerprint:
        for path in (record, folder / "graft.png"):
            if path.exists():
                path.replace(path.with_stem("graft_of_another_sae"))
        print(
            f"note: {record} was made with an SAE that lay at this path before; it is called "
            "graft_of_another_sae.json now"
        )


def print_graft(report: dict) -> None:
    """Print the recovered share of all steps and of each window."""
    print(
        "recovered, 1 - distance(graft) / distance(mean ablation), "
        f"over {len(report['prompts'])} held-out prompts:"
    )
    for window in (report["all"], *report["windows"]):
        first, last = window["steps"]
        shares = []
        for kind in DISTANCES:
            if kind in window:
                shares.append(f"{kind} {recovered_text(window[kind])}")
        print(f"  steps {first:3} to {last:3}   {'   '.join(shares)}")


def recovered_text(record: dict) -> str:
    """Return a recovered share with its standard error, such as "0.812 ± 0.031"."""
    if record["recovered"] is None:
        return "nothing to recover"
    recovered = decimals(record["recovered"], 3)
    if record["recovered_se"] is None:
        return recovered
    return f"{recovered} ± {decimals(record['recovered_se'], 3)}"


def graft(
    model: HookedDiffusionModel,
    sae: Sae | Callable[[Tensor], Tensor],
    hook_point: HookPoint,
    generation: Generation,
    windows: int | list[range] = 4,
    rows: str | None = None,
    batch_size: int = 8,
    num_shown: int = 8,
    clip: Distance | None = None,
    transfer: bool = False,
) -> tuple[dict, dict[str, Tensor] | None]:
    """Generate with the SAE's reconstruction in place, and with the mean of x; compare the two.

    Both are done in each window of steps, and in all steps.

    sae: an Sae, or a function (1, tokens, d) -> (1, tokens, d) in float32.
    hook_point: where the SAE belongs, see `trained_on`.
    generation: what to generate. With output_type "latent", or if the pipeline returns no images,
        only latents are compared.
    windows: ranges of steps, or into how many of equal length to divide the steps in which the hook
        point runs.
    rows: which rows of the guidance are edited, "cond", "uncond" or "both", with means of their
        own. If None, the hook point's; guidance then magnifies every change.
    batch_size: prompts generated together.
    num_shown: the number of prompts whose images are returned.
    clip: a distance of images, see `clip_distance`.
    transfer: put the SAE on purpose in a place that it was not trained for.

    Returns (report, images). The report is a dict for JSON. Its "all" and each of its "windows" are
    {"steps": [first, last], "timesteps": of these two, "latents", "images" and "clip": records of
    `compare`}, the latter two if there are any. "images" compares all frames of videos and all
    samples of audio. images: None, or pictures {"untouched", "graft", "mean"} of (num_shown, 3, H,
    W), see `Media`, the latter two edited in all steps.

    The untouched run's latents and images stay in memory, 12 bytes per pixel in float32, of videos
    those of all frames; of the other runs only a few batches do.

    Raises UsageError for a module or a window in which nothing can be edited, if widths
    differ, and for an SAE of another hook point or model.
    """
    if isinstance(sae, Sae) and sae.hook_point is not None and not transfer:
        if sae.hook_point != hook_point:
            raise UsageError(
                f"the SAE was trained on {sae.hook_point}, not on {hook_point}; "
                "transfer=True grafts it there"
            )
        check_belongs("the SAE", sae.cfg, model=model)
    rows = rows or hook_point.rows
    num_windows = windows if isinstance(windows, int) else len(windows)
    num_runs = 1 + 2 * (1 + num_windows)
    num_prompts = len(generation.prompts)
    print(
        f"{num_runs} generations of each of {num_prompts} prompts: 1 untouched, and 2 for all "
        f"steps and for each of {num_windows} windows (--windows, --num_prompts)"
    )
    start = time.perf_counter()

    with tqdm(total=num_runs * num_prompts, unit="prompt", desc="grafting") as bar:

        def run(
            replacement: Replacement, steps: range | None = None, on_step: Callable | None = None
        ) -> Iterator[Generated]:
            """Return an iterator that generates batch by batch, with replacement(role, step, x) in
            the place of x."""
            make_edits = partial(grafting_edits, hook_point, replacement, rows, steps)
            return generate_batches(model, generation, batch_size, make_edits, on_step, bar)

        # 1. The untouched run, and the mean of x in each of its steps
        untouched = run_untouched(run, hook_point.stream)
        seconds = time.perf_counter() - start
        tqdm.write(
            f"the untouched run took {duration(seconds)}; the others will take about "
            f"{duration(seconds * (num_runs - 1))}"
        )
        windows = choose_windows(hook_point, untouched.steps, windows)
        floors = floors_of(untouched.generated)
        images = untouched.images()

        # 2. The reconstruction in place, and the mean, in all steps and in each window
        means = untouched.means
        replacements = {
            "graft": lambda role, step, x: reconstruct(sae, x, hook_point.stream),
            "mean": lambda role, step, x: means[role, step].to(x.device).expand_as(x),
        }
        records = []
        for window in windows:
            distances = {}
            for mode, replacement in replacements.items():
                made = run(replacement, window)
                distances[mode], shown = measure_run(made, untouched.generated, clip, num_shown)
                if images is not None:
                    images.setdefault(mode, shown)  # the first window is that of all steps
            records.append(compare_window(window, untouched, distances, floors))

    if images is not None:
        images = {mode: torch.cat(batches)[:num_shown] for mode, batches in images.items()}
    report = hook_point.as_dict() | {
        "rows": rows,
        "prompts": list(generation.prompts),
        "seeds": list(generation.seeds),
        "batch_size": batch_size,
        "num_steps": len(untouched.steps),
        "mean": "of the untouched run: each step's, over prompts and tokens",
        "all": records[0],
        "windows": records[1:],
    }
    explanation = untouched.explanation()
    if explanation:
        report["pictures"] = explanation
    return report, images


def duration(seconds: float) -> str:
    """Return a time to read: "12 s", "3.5 min" or "2.1 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


class UntouchedRun(NamedTuple):
    """What a model generates without an edit, and what the hook point computes meanwhile."""

    generated: list[Generated]
    """Batch by batch."""

    means: dict[tuple[str, int], Tensor]
    """{(role, step): mean of x over prompts and tokens, (d,) float32}, where the hook point
    runs."""

    timesteps: dict[int, float]
    """{step: its timestep}."""

    @property
    def steps(self) -> list[int]:
        """The steps in which the hook point runs, in order; a denoiser may run in some only."""
        return sorted({step for _, step in self.means})

    def images(self) -> dict[str, list[Tensor]] | None:
        """Return {"untouched": the images of each batch}; None if there are none."""
        if self.generated[0].media is None:
            return None
        return {"untouched": [made.media.pictures() for made in self.generated]}

    def explanation(self) -> str:
        """Return what the pictures show of a video or of audio; "" for images, and without any."""
        media = self.generated[0].media
        return "" if media is None else media.explanation()


def run_untouched(run: Callable[..., Iterator[Generated]], stream: str) -> UntouchedRun:
    """Generate without an edit, and return the images, the means of x and the timesteps. run: as in
    `graft`."""
    sums = defaultdict(float)
    counts = defaultdict(int)
    timesteps = {}
    steps_that_ran = set()

    def measure(role: str, step: int, x: Tensor) -> None:
        """Add x to the sums; it returns None, so x stays."""
        vectors = x.flatten(0, -2)
        if stream == "text":
            vectors = vectors[(vectors != 0).any(1)]  # without the padding
        sums[role, step] = sums[role, step] + vectors.sum(0).cpu().double()
        counts[role, step] += len(vectors)
        steps_that_ran.add(step)

    def on_step(step) -> None:
        # There may be another loop in the pipeline, in which the hook point does not run
        if step.index in steps_that_ran:
            timesteps.setdefault(step.index, step.time())
        steps_that_ran.clear()

    generated = list(run(measure, on_step=on_step))
    means = {}
    for key, vector_sum in sums.items():
        means[key] = (vector_sum / max(1, counts[key])).float()
    return UntouchedRun(generated, means, timesteps)


def choose_windows(
    hook_point: HookPoint, steps: list[int], windows: int | list[range]
) -> list[range]:
    """Return the window of all steps, then the others.

    steps: those in which the hook point runs. windows: as in `graft`. Raises UsageError for a
    window in which it does not run.
    """
    if isinstance(windows, int):
        windows = equal_windows(steps, windows)
    for window in windows:
        if not set(window) & set(steps):
            raise UsageError(
                f"{hook_point.hook_name} runs in steps {steps[0]} to {steps[-1]}, "
                f"and in none of the window {window}"
            )
    return [range(steps[0], steps[-1] + 1), *windows]


def equal_windows(steps: list[int], n: int) -> list[range]:
    """Return n ranges of equal length, give or take one, from the first step to the last.

    >>> equal_windows([3, 4, 5, 6], 2)
    [range(3, 5), range(5, 7)]

    Raises UsageError for fewer windows than one, or more than steps.
    """
    if not 1 <= n <= len(steps):
        raise UsageError(f"{n} windows of {len(steps)} steps: expected 1 to {len(steps)}")
    cuts = [i * len(steps) // n for i in range(n + 1)]
    windows = []
    for begin, end in zip(cuts, cuts[1:]):
        windows.append(range(steps[begin], steps[end - 1] + 1))
    return windows


def grafting_edits(
    hook_point: HookPoint, replacement: Replacement, rows: str, steps: range | None, sampling
) -> dict[str, list]:
    """Return {hook_name: [Edit]} that put replacement(role, step, x) in the place of x.

    The result is cast to the model's dtype. For side "diff" x is output - input, and the output
    moves by the change of x, so that a replacement equal to x changes no bit. sampling: it knows
    the step.
    """

    def replace(role: str, output: Tensor, x: Tensor) -> Tensor | None:
        new = replacement(role, sampling.index, x)
        if new is None:
            return None
        if hook_point.side == "diff":
            new = output.float() + (new - x)
        return new.to(output.dtype)

    return {hook_point.hook_name: replacing_edits(hook_point, replace, rows, steps)}


def reconstruct(sae: Sae | Callable[[Tensor], Tensor], x: Tensor, stream: str = "image") -> Tensor:
    """Return x_hat of the tokens x (P, tokens, d) float32. Padding of text stays zero.

    Raises UsageError if the SAE has another width.
    """
    device = x.device
    if isinstance(sae, Sae):
        check_input_width(sae, x)
        device = sae.W_dec.device
    return map_samples(sae, x, stream, device)


def measure_run(
    run: Iterator[Generated], untouched: list[Generated], clip: Distance | None, num_shown: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Measure how far a run is from the untouched one, batch by batch.

    Returns ({"latents", "images", "clip": the distance of each prompt (P,)}, images). The latter
    two distances are there if the run has images. The images are those of the first batches, at
    least `num_shown` if there are so many.
    """
    distances = defaultdict(list)
    shown = []
    for made, original in zip(run, untouched):
        distances["latents"].append(rms(made.sample, original.sample))
        if made.media is None:
            continue
        distances["images"].append(rms(made.media.values, original.media.values))
        if clip is not None and made.media.kind == "image":
            pictures = made.media.pictures()
            distances["clip"].append(clip(pictures, original.media.pictures()))
        if sum(len(images) for images in shown) < num_shown:
            shown.append(made.media.pictures())
    return {name: torch.cat(batches) for name, batches in distances.items()}, shown


def compare_window(
    window: range,
    untouched: UntouchedRun,
    distances: dict[str, dict[str, Tensor]],
    floors: dict[str, float],
) -> dict:
    """Return the report of one window.

    distances: {"graft", "mean": as `measure_run` returns}. floors: as `floors_of` returns.
    """
    edited = [step for step in untouched.steps if step in window]
    first_and_last = [edited[0], edited[-1]]
    record = {
        "steps": first_and_last,
        "timesteps": [untouched.timesteps[step] for step in first_and_last],
    }
    for name, moved in distances["graft"].items():
        record[name] = compare(moved, distances["mean"][name], floors[name])
    return record


def compare(graft: Tensor, mean: Tensor, floor: float = 0.0) -> dict[str, float | None]:
    """Return the record of one distance: how far the two runs are, and what is recovered.

    graft, mean: the (P,) distances of the two runs to the untouched one, paired by prompt.

        recovered     1 - r with r = sum graft / sum mean
        recovered_se  its standard error over the prompts, that of a ratio of means:
                      std(graft - r mean) / (sqrt(P) mean(mean))

    For graft [1, 3] and mean [4, 4] it is 0.5. Both are None if the mean ablation moves the sample
    by no more than `floor`, or if a run gave NaN or infinity.
    """
    record = {}
    for name, values in (("graft", graft), ("mean", mean)):
        record[name], record[f"{name}_se"] = mean_and_error(values)
    record["recovered"] = None
    record["recovered_se"] = None
    is_finite = record["graft"] is not None and record["mean"] is not None
    if not is_finite or record["mean"] <= floor:
        return record

    ratio = record["graft"] / record["mean"]
    record["recovered"] = 1 - ratio
    _, error = mean_and_error(graft - ratio * mean)
    if error is not None:
        record["recovered_se"] = error / record["mean"]
    return record


def mean_and_error(values: Tensor) -> tuple[float | None, float | None]:
    """Return the mean of (P,) and its standard error.

    The error of a single value is None, and so is a number that is not finite.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    mean = values.mean().item()
    error = math.nan
    if len(values) > 1:
        error = values.std().item() / math.sqrt(len(values))
    return mean if math.isfinite(mean) else None, error if math.isfinite(error) else None


def rms(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference of each of P: (P, ...), (P, ...) -> (P,) float64."""
    return (a.double() - b.double()).flatten(1).square().mean(1).sqrt()


def floors_of(generated: list[Generated]) -> dict[str, float]:
    """Return {"latents", "images", "clip": below which a distance says nothing}, by rounding."""
    floors = {"latents": rounding([made.sample for made in generated])}
    if generated[0].media is not None:
        floors["images"] = rounding([made.media.values for made in generated])
        floors["clip"] = floors["images"]
    return floors


def rounding(batches: list[Tensor]) -> float:
    """Return the spacing of numbers at the root mean square; a smaller distance says nothing."""
    x = torch.cat(batches)
    return torch.finfo(x.dtype).eps * x.double().square().mean().sqrt().item()


def clip_distance(
    name: str = CLIP, device: torch.device | str = "cpu"
) -> tuple[Distance | None, str]:
    """Return (a distance of images, a remark): 1 - cosine similarity of their CLIP embeddings.

    The weights must be on this machine, as safetensors; nothing is downloaded. If they are not, the
    function is None and the remark says so.
    """
    try:
        from transformers import CLIPModel  # takes seconds to import

        model = CLIPModel.from_pretrained(name, local_files_only=True, use_safetensors=True)
    except (OSError, ImportError):
        return None, f"no CLIP distance: the weights of {name} are not on this machine"
    model = model.eval().to(device)
    size = model.config.vision_config.image_size
    mean = torch.tensor(CLIP_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, device=device).view(1, 3, 1, 1)

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        images = torch.nn.functional.interpolate(
            images.to(device).float(), (size, size), mode="bicubic", antialias=True
        )
        pixels = (images.clamp(0, 1) - mean) / std
        return model.visual_projection(model.vision_model(pixels).pooler_output)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (1 - torch.cosine_similarity(embed(a), embed(b))).double().cpu()

    return distance, f"CLIP distance by {name}"


if __name__ == "__main__":
    run_script(main, Config)  # in a notebook it returns at once, so that a pasted cell runs nothing
