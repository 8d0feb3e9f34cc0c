"""Stage 5: how good is an SAE? By timestep, on held-out prompts; and in its hook point's place,
while the model generates.

    python evaluate.py                                                  # the newest SAE in saes/, on the data that it is of
    python evaluate.py --sae saes/mid_block_k32_M20480 --graft
    python evaluate.py --sae theirs --data activations/mid_block.npy    # any SAE that Sae.load_from_disk reads

FVU, explained variance, L0, cosine, silent and always-on latents of the vectors that training never
saw (analysis/metrics.py says what each is). With --graft the SAE's reconstruction is put in the
hook point's place in a window of steps, and in all steps:

    untouched      the model's own run at these seeds
    graft          in the steps of a window the hook point gives x_hat = sae(x) instead of x
    mean ablation  there it gives the mean of x instead: the untouched run's, of each step, over its prompts and tokens
    distance       root mean square difference to the untouched run's final latents (or images), mean over the prompts
    recovered      1 - distance(graft) / distance(mean ablation): 1 for x_hat = x, 0 for an SAE that only knows the mean

The share is of generation what FVU is of the vectors: it weighs an error by what the rest of the
model makes of it. It can be below 0. It follows the "loss recovered" of SAEs on language models
(Rajamanoharan et al. 2024, arXiv 2404.16014), which ablates to zero; here the loss is the distance
to the model's own sample.

In a notebook, for any SAE or function and any prompts:

    generation = Generation(prompts, seeds, options=model.arguments(output_type="pt"))
    report, images = graft(model, sae, HookPoint("mid_block"), generation)

Reads   an SAE folder; activation files of collect.py, or any .npy; with --graft the model that they were collected from.
Writes  <out_dir>/<name of the SAE>/: evaluate.json, evaluate.png; graft.json, graft.png.
What is held out is the choice that train.py makes in the same files. It does not train, and changes no SAE.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.feature_edits import check_input_width, map_samples, replacing_edits
from analysis.metrics import Metrics, evaluate, total
from analysis.plots import plot_evaluation, plot_graft
from cli import check_positive, resolve_device, resolve_dtype, run
from diffusion.generate import Generated, generate_batches
from errors import UsageError
from hook import Generation, HookedDiffusionModel, model_of
from sae import Sae, newest_sae
from store.activation_file import read_description, read_prompts
from store.dataset import Activations
from store.disk import claim_folder, read_json, write_json
from store.hook_point import HookPoint
from store.identity import activations_of, check_belongs, check_held_out, fingerprint

CLIP = "openai/clip-vit-large-patch14"
CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of its training's pictures

Replacement = Callable[[str, int, Tensor], Tensor | None]
"""(role, step, x (P, tokens, d) float32) -> what takes x's place; None leaves it."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""Of each of P samples or images: (P, ...), (P, ...) -> (P,)."""


@dataclass
class Config:
    sae: str | None = None
    """Its folder (None: the newest in saes/)."""

    data: list[str] = field(default_factory=list)
    """Activation files of one hook point (none: those that it was trained on)."""

    transfer: bool = False
    """Use the SAE on purpose where it was not trained: another hook point, or other weights."""

    out_dir: str = "evaluations"
    """In which each SAE gets a folder."""

    batch_size: int = 4096
    """Vectors that go through the SAE together."""

    graft: bool = False
    """Also generate with the reconstruction in the hook point's place."""

    model_name: str | None = None
    """For --graft (None: the model that the activations are of)."""

    num_prompts: int = 8
    """Held-out prompts that are generated, 3 + 2 windows times each."""

    windows: int = 4
    """Of steps, of equal length."""

    graft_batch_size: int = 8
    """Prompts generated together."""

    device: str = "auto"
    """Auto, cuda, cuda:N, mps, cpu."""


def write_numbers(
    folder: Path, about: dict, activations: Activations, by_step: list[Metrics], name: str
) -> dict:
    """Write evaluate.json and evaluate.png; the record that evaluate.json holds."""
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
    """The numbers over all held-out vectors, and at the first and the last timestep."""
    for name in ("fvu", "explained_variance", "l0", "cosine", "dead", "always_on"):
        span = ""
        if record["by_timestep"]:
            first, last = record["by_timestep"][0], record["by_timestep"][-1]
            span = f"   at t = {first['timestep']:g}: {first[name]:.4f}   at t = {last['timestep']:g}: {last[name]:.4f}"
        print(f"  {name:18} {record[name]:.4f}{span}")
    if not record["whole_prompts"]:
        print(
            "note: there are no prompts to hold out whole, so held-out vectors are of the same samples as the others"
        )


# ----------------------------------------------------------------------------------------------------------- grafting


def held_out_prompts(activations: Activations, count: int) -> tuple[list[dict], dict]:
    """The first held-out prompts: their rows of prompts.jsonl, whose seeds gave the activations,
    and the file's description.

    One image of each. Raises UsageError where it is not known what to generate.
    """
    file, first, _ = activations.held_out_units[0]
    path = Path(activations.files[file].path)
    meta, listing = read_description(path), path.with_name("prompts.jsonl")
    if not meta or not listing.exists() or not activations.whole_prompts:
        raise UsageError(
            f"--graft: {path} is not of collect.py with its prompts.jsonl, so it is not known what to generate"
        )
    if meta.get("images") is not None:
        raise UsageError(
            f"--graft: {path} is of pictures (--images), and grafting needs a generation"
        )
    rows = read_prompts(path)
    each, mine = (
        meta["shape"][1] * meta["shape"][2],
        activations.held_out_units[activations.held_out_units[:, 0] == file],
    )
    chosen = list(dict.fromkeys((mine[:, 1] // each).tolist()))
    unique = {
        rows[row]["prompt"] if isinstance(rows[row]["prompt"], str) else row: rows[row]
        for row in chosen
    }
    return list(unique.values())[:count], meta


@torch.no_grad()
def graft_held_out(
    cfg: Config, sae: Sae, path: Path, activations: Activations, folder: Path, device: torch.device
) -> list[Path]:
    """Generate held-out prompts with the SAE in place; write graft.json and graft.png."""
    rows, meta = held_out_prompts(activations, cfg.num_prompts)
    model, options = model_of(meta, cfg.model_name, device, resolve_dtype("auto", device))
    own = (
        sae.cfg if "fingerprint" in sae.cfg else sae.cfg | meta
    )  # an SAE of another package is checked by its data
    transfer = activations.transfer + check_belongs(
        str(path), own, model=model, transfer=cfg.transfer
    )
    generation = Generation.from_rows(rows, model.arguments(1, "pt", options))
    clip, line = clip_distance(device=device)
    print(line)

    hook_point = HookPoint.from_description(meta)
    report, images = graft(
        model,
        sae,
        hook_point,
        generation,
        cfg.windows,
        batch_size=cfg.graft_batch_size,
        clip=clip,
        transfer=True,
    )

    written = [folder / "graft.json", folder / "graft.png"]
    write_json(written[0], report | {"sae_fingerprint": fingerprint(sae), "transfer": transfer})
    plot_graft(written[1], report, images)
    print_graft(report)
    return written


def set_aside_other_graft(folder: Path, sae_fingerprint: str) -> None:
    """Rename graft.json and graft.png of another SAE, which lay at the same path before this one
    was trained; say so."""
    record = folder / "graft.json"
    theirs = read_json(record).get("sae_fingerprint") if record.exists() else sae_fingerprint
    if theirs is None:
        print(
            f"note: {record} is of an earlier version, so it can't be checked that it is of this SAE; --graft makes it anew"
        )
    elif theirs != sae_fingerprint:
        for path in (record, folder / "graft.png"):
            if path.exists():
                path.replace(path.with_stem("graft_of_another_sae"))
        print(
            f"note: {record} was of an SAE that lay at this path before: it is graft_of_another_sae.json now"
        )


def print_graft(report: dict) -> None:
    """The recovered shares of each window."""
    print(
        f"recovered, 1 - distance(graft) / distance(mean ablation), over {len(report['prompts'])} held-out prompts:"
    )
    for window in (report["all"], *report["windows"]):
        first, last = window["steps"]
        shares = [
            f"{kind} {show(window[kind])}"
            for kind in ("latents", "images", "clip")
            if kind in window
        ]
        print(f"  steps {first:3} to {last:3}   {'   '.join(shares)}")


def show(record: dict) -> str:
    """A recovered share with its standard error."""
    if record["recovered"] is None:
        return "nothing to recover"
    if record["recovered_se"] is None:
        return f"{record['recovered']:.3f}"
    return f"{record['recovered']:.3f} ± {record['recovered_se']:.3f}"


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
    """Generate with the SAE's reconstruction at the hook point, and with its mean, in each window
    of steps and in all steps.

    sae: an Sae, or a function (1, tokens, d) -> (1, tokens, d) in float32. hook_point: where the
    SAE belongs, see `trained_on`. generation: with output_type "latent", or where the pipeline
    gives no images, only latents are compared. windows: into how many equal ones to cut the steps
    in which the hook point runs, or ranges of steps. rows: those that are edited, by default the
    hook point's, of which guidance magnifies every change; "both" edits the others too, with a mean
    of their own. batch_size: prompts generated together. num_shown: of how many prompts images are
    returned. clip: the function of `clip_distance`. transfer: put the SAE on purpose in a place
    that it was not trained for.

    Returns (report, images). report: a dict for JSON; "all" and each of "windows" is {"steps":
    [first, last], "timesteps": theirs, "latents": record, "images": record, "clip": record} with
    records of `compare`, the latter two where there are any. images: {"untouched", "graft", "mean"}
    of (num_shown, 3, H, W), the latter two edited in all steps, or None. The untouched run's
    latents and images are held in memory, 12 bytes a pixel in float32; of the others only a few
    batches are.

    Raises UsageError for side "input", for a module or a window in which nothing can be edited,
    where widths differ, and for an SAE of another hook point or model.
    """
    rows = rows or hook_point.rows
    if isinstance(sae, Sae) and sae.hook_point is not None and not transfer:
        if sae.hook_point != hook_point:
            raise UsageError(
                f"the SAE was trained on {sae.hook_point}, not on {hook_point}; transfer=True grafts it there"
            )
        check_belongs("the SAE", sae.cfg, model=model)
    num_windows = windows if isinstance(windows, int) else len(windows)
    num_runs = 1 + 2 * (1 + num_windows)

    with tqdm(total=num_runs * len(generation.prompts), unit="prompt", desc="grafting") as bar:

        def sample(
            replacement: Replacement, steps: range | None = None, on_step=None
        ) -> Iterator[Generated]:
            """Generate batch by batch with replacement(role, step, x) in x's place."""
            make_edits = partial(grafting_edits, hook_point, replacement, rows, steps)
            return generate_batches(model, generation, batch_size, make_edits, on_step, bar)

        # 1. The untouched run, and the mean of each step over its prompts and tokens
        untouched, means, timesteps = run_untouched(sample, hook_point.stream)
        steps = sorted({step for _, step in means})  # a denoiser may run in part of them
        if isinstance(windows, int):
            windows = equal_windows(steps, windows)
        for window in windows:
            if not set(window) & set(steps):
                span = f"steps {steps[0]} to {steps[-1]}"
                raise UsageError(
                    f"{hook_point.hook_name} runs in {span}, and in none of the window {window}"
                )
        floors = {"latents": rounding([made.sample for made in untouched])}
        images = None
        if untouched[0].images is not None:
            images = {"untouched": [made.images for made in untouched]}
            floors["images"] = floors["clip"] = rounding(images["untouched"])

        # 2. The reconstruction in place, and the mean, in all steps and in each window
        replacements = {
            "graft": lambda role, step, x: reconstruct(sae, x, hook_point.stream),
            "mean": lambda role, step, x: means[role, step].to(x.device).expand_as(x),
        }
        records = []
        for window in (range(steps[0], steps[-1] + 1), *windows):
            moved = {}
            for mode, replacement in replacements.items():
                moved[mode], shown = measure_run(
                    sample(replacement, window), untouched, clip, num_shown
                )
                if images is not None:
                    images.setdefault(mode, shown)  # of all steps, which come first
            edited = [step for step in steps if step in window]
            record = {"steps": [edited[0], edited[-1]]}
            record["timesteps"] = [timesteps[step] for step in record["steps"]]
            for name in moved["graft"]:
                record[name] = compare(moved["graft"][name], moved["mean"][name], floors[name])
            records.append(record)

    if images is not None:
        images = {mode: torch.cat(parts)[:num_shown] for mode, parts in images.items()}
    report = hook_point.as_dict() | {
        "rows": rows,
        "prompts": list(generation.prompts),
        "seeds": list(generation.seeds),
    }
    report |= {
        "batch_size": batch_size,
        "num_steps": len(steps),
        "mean": "of the untouched run: each step's, over prompts and tokens",
        "all": records[0],
        "windows": records[1:],
    }
    return report, images


def grafting_edits(
    hook_point: HookPoint, replacement: Replacement, rows: str, steps: range | None, sampling
) -> dict[str, list]:
    """{hook_name: [Edit]} that put replacement(role, step, x) in x's place.

    The result is cast to the model's dtype; for side "diff" the output moves by the change of the
    difference, so that no change moves no bit.
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
    """x_hat of the tokens x (P, tokens, d) float32. Padding of text stays zero. Raises UsageError
    where widths differ."""
    device = x.device
    if isinstance(sae, Sae):
        check_input_width(sae, x)
        device = sae.W_dec.device
    return map_samples(sae, x, stream, device)


def run_untouched(
    sample: Callable[..., Iterator[Generated]], stream: str
) -> tuple[list[Generated], dict[tuple[str, int], Tensor], dict[int, float]]:
    """Generate without an edit. sample: as in `graft`.

    Returns what was generated, batch by batch; the mean of x over prompts and tokens, {(role,
    step): (d,)}, where the hook point runs; and the timestep of each step.
    """
    sums, counts = defaultdict(float), defaultdict(int)
    timesteps, ran = {}, set()

    def measure(role: str, step: int, x: Tensor) -> None:
        x = x.flatten(0, -2)
        if stream == "text":
            x = x[(x != 0).any(1)]  # without the padding
        sums[role, step] = sums[role, step] + x.sum(0).cpu().double()
        counts[role, step] += len(x)
        ran.add(step)

    def on_step(step) -> None:
        if step.index in ran:  # there may be another loop, in which the hook point does not run
            timesteps.setdefault(step.index, step.time())
        ran.clear()

    untouched = list(sample(measure, on_step=on_step))
    means = {key: (total / max(1, counts[key])).float() for key, total in sums.items()}
    return untouched, means, timesteps


def equal_windows(steps: list[int], n: int) -> list[range]:
    """The steps (a sorted list) in n windows of equal length, give or take one: ranges from the
    first step to after the last."""
    if not 1 <= n <= len(steps):
        raise UsageError(f"{n} windows of {len(steps)} steps: expected 1 to {len(steps)}")
    cuts = [i * len(steps) // n for i in range(n + 1)]
    return [range(steps[a], steps[b - 1] + 1) for a, b in zip(cuts, cuts[1:])]


def measure_run(
    run: Iterator[Generated], untouched: list[Generated], clip: Distance | None, num_shown: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """How far a run is from the untouched one, batch by batch.

    Returns each prompt's distances, {"latents", "images", "clip"} of (P,), the latter two where
    there are any; and the images of the first batches, `num_shown` or more if there are so many.
    """
    moved, shown = defaultdict(list), []
    for made, theirs in zip(run, untouched):
        moved["latents"].append(rms(made.sample, theirs.sample))
        if made.images is None:
            continue
        moved["images"].append(rms(made.images, theirs.images))
        if clip is not None:
            moved["clip"].append(clip(made.images, theirs.images))
        if sum(map(len, shown)) < num_shown:
            shown.append(made.images)
    return {name: torch.cat(parts) for name, parts in moved.items()}, shown


def rounding(parts: list[Tensor]) -> float:
    """The spacing of numbers at the root mean square of the parts, below which a distance says
    nothing."""
    x = torch.cat(parts)
    return torch.finfo(x.dtype).eps * x.double().square().mean().sqrt().item()


def rms(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference of each of P: (P, ...), (P, ...) -> (P,) float64."""
    return (a.double() - b.double()).flatten(1).square().mean(1).sqrt()


def mean_and_error(values: Tensor) -> tuple[float | None, float | None]:
    """Mean of (P,) and its standard error, which is None where P is 1; a number that is not finite
    is None."""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return tuple(v if math.isfinite(v) else None for v in (values.mean().item(), error))


def compare(graft: Tensor, mean: Tensor, floor: float = 0.0) -> dict[str, float | None]:
    """The record of one distance: both runs' (P,) distances to the untouched one, paired by prompt,
    and what is recovered.

        recovered     1 - r, r = sum graft / sum mean
        recovered_se  its standard error over the prompts, that of a ratio of means: std(graft - r mean) / (sqrt(P) mean(mean))

    Both are None where the mean ablation moves the sample by no more than `floor`, or where a run
    gave NaN or infinity.
    """
    record = {}
    for name, values in (("graft", graft), ("mean", mean)):
        record[name], record[f"{name}_se"] = mean_and_error(values)
    if None in (record["graft"], record["mean"]) or record["mean"] <= floor:
        return record | {"recovered": None, "recovered_se": None}
    ratio = record["graft"] / record["mean"]
    error = mean_and_error(graft - ratio * mean)[1]
    return record | {"recovered": 1 - ratio, "recovered_se": error and error / record["mean"]}


def clip_distance(name=CLIP, device="cpu"):
    """1 - cosine similarity of two pictures' CLIP embeddings, a function (P, 3, H, W), (P, 3, H, W)
    -> (P,), and a line.

    The weights must be on this machine, as safetensors; nothing is downloaded. Where they are not
    the function is None and the line says so.
    """
    try:
        from transformers import CLIPModel

        model = (
            CLIPModel.from_pretrained(name, local_files_only=True, use_safetensors=True)
            .eval()
            .to(device)
        )
    except (OSError, ImportError):
        return None, f"no CLIP distance: the weights of {name} are not on this machine"
    size = model.config.vision_config.image_size
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD)
    )

    @torch.no_grad()
    def embed(x):
        x = torch.nn.functional.interpolate(
            x.to(device).float(), (size, size), mode="bicubic", antialias=True
        ).clamp(0, 1)
        return model.visual_projection(model.vision_model((x - mean) / std).pooler_output)

    return (
        lambda a, b: (1 - torch.cosine_similarity(embed(a), embed(b))).double().cpu(),
        f"CLIP distance by {name}",
    )


# --------------------------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> list[Path]:
    """Measure one SAE; return the files that were written.

    Raises UsageError for an option, an SAE or data that can't be used, and if its folder holds
    something else.
    """
    check_positive(cfg, "batch_size", "num_prompts", "windows", "graft_batch_size")

    # 1. The SAE, and vectors that it was not trained on
    device = resolve_device(cfg.device)
    path = Path(cfg.sae) if cfg.sae else newest_sae()
    sae = Sae.load_from_disk(path, device)
    activations = activations_of(sae, path, cfg.data, cfg.transfer)
    about = {"sae": str(path), "data": activations.paths}
    own = {"sae_fingerprint": fingerprint(sae), "transfer": activations.transfer}
    own["surely_unseen"] = check_held_out(sae, path, activations)
    folder = Path(cfg.out_dir) / (path if path.is_dir() else path.parent).resolve().name
    claim_folder(folder, "evaluate.json", about, key=None)

    # 2. Its numbers on them
    by_step = evaluate([sae], activations, cfg.batch_size, progress=True)[0]
    if not math.isfinite(total(by_step).fvu):
        raise UsageError(
            f"{activations.paths[0]}: NaN or inf in held-out vectors; collect it again"
        )
    set_aside_other_graft(folder, own["sae_fingerprint"])
    record = write_numbers(folder, about | own, activations, by_step, path.name)
    print(
        f"{path}: {sae.num_latents} latents, {sae.activation}, on {record['vectors']:,} held-out vectors"
    )
    print_numbers(record)
    written = [folder / "evaluate.json", folder / "evaluate.png"]

    # 3. Its reconstruction in the model
    if cfg.graft:
        written += graft_held_out(cfg, sae, path, activations, folder, device)
    print(f"saved in {folder}/: {', '.join(path.name for path in written)}")
    return written


if __name__ == "__main__":
    run(main, Config)
