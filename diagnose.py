"""Stage 3: are they fit to train on? One screen and one picture, before the long run.

    python diagnose.py                                                 # the newest file in activations/
    python diagnose.py --data activations/mid_block.npy --k 32 --expansion_factor 8
    python diagnose.py --data "shards/*.npy" --num_epochs 2 --center none

Measures 65,536 training vectors (health.py): their mean, outlier dimensions, RMS by timestep and rank. How many latents
will be dead is tried: train.py's own start, and then its first updates on the sample, once with the centring asked for and
once without (or with it, for --center none). The same updates say how long training takes.

Reads   activation files as train.py does; one diagnosis a hook name.
Writes  <out_dir>/<name of the first file>.png and .json; only a diagnosis of the same files is replaced.

It does not change the data, and it does not foresee what comes after the trial: a latent can still die, or revive, later.

Sources: outliers and dead latents, Simon et al. 2026 (arXiv 2605.31518); updates and AuxK, see kernels/update.py.
"""

import io
import json
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import health
from activations import newest_activations, open_activations
from cli import check_positive, product_dtype, resolve_device, run
from disk import read_json, write_atomically
from errors import UsageError
from health import OUTLIER, ratio
from jobs import default_lr
from kernels.update import SparseUpdate


@dataclass
class Config:
    data: list[str] = field(default_factory=list)  # .npy files, globs, folders (none: newest in activations/)
    out_dir: str = "diagnose"  # folder for the pictures and the numbers
    expansion_factor: int = 16  # of the SAE to be trained: num_latents as a multiple of the vectors' width
    num_latents: int | None = None  # size of the dictionary, instead of expansion_factor
    k: int = 16  # active latents a vector
    center: Literal["median", "mean", "none"] = "median"  # where b_dec is to start
    num_epochs: int = 1  # passes over the training vectors that are planned
    trial_updates: int = 500  # updates of the trial at most; AuxK begins after 98
    trial_seconds: float = 8.0  # and seconds, of each of its two halves
    seed: int = 0  # of the sample, the weights and the trial's order
    device: str = "auto"  # auto, cuda, cuda:N, mps, cpu


BATCH_SIZE = 1024  # train.py's effective_batch_size
AUXK_FROM = 98  # updates after which no latent can yet be dead, at 100,000 vectors
WORDS = {"median": "centred on the median", "mean": "centred on the mean", "none": "not centred"}


def learning_rate(iteration, iterations, num_latents):
    """train.py's default at an iteration, counted from 0: up over 100, at most a fifth; down to 0 over the last fifth."""
    rise = (iteration + 1) / (min(100, iterations // 5) + 1)
    return default_lr(iterations, num_latents) * min(1.0, rise, 5 * (1 - iteration / iterations))


def trial(sae, x, updates, cfg, dtype, bar):
    """Train `sae`, which takes x (N, d) as it is, by the first of so many updates. Returns the seconds of each that was done."""
    scale = health.input_scale(sae, x)
    sae.scale_inputs(1 / scale)  # from here on it takes scale * x, as in train.py
    update = SparseUpdate(sae, scale**2 * x.var(0, correction=0).sum().item(), dtype=dtype)
    generator, seconds, deadline = torch.Generator().manual_seed(cfg.seed), [], time.perf_counter() + cfg.trial_seconds
    wanted = min(updates, cfg.trial_updates)
    epochs = -(-wanted * BATCH_SIZE // len(x))
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(epochs)]).to(x.device)
    for i, rows in enumerate(order[: wanted * BATCH_SIZE].split(BATCH_SIZE)):
        started = time.perf_counter()
        forward, _ = update(x[rows] * scale, learning_rate(i, updates, sae.num_latents))
        loss = forward.loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(loss):
            raise UsageError(f"the loss is {loss} after {i + 1} updates of the trial; nothing can be learned from these vectors")
        bar.update()
        if time.perf_counter() > deadline:
            break
    sae.scale_inputs(scale)
    return seconds


def duration(seconds):
    """In words."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def screen(found):
    """The report as lines to print."""
    d, steps, shape = found["d"], len(found.get("timesteps", [])), " ".join(map(str, map(tuple, found["shapes"][:2])))
    counts = [f" of {n} {word}" for n, word in ((found["num_prompts"], "prompts"), (steps, "steps")) if n]
    vectors = f"{found['num_vectors']:,} vectors{','.join(counts)}, {found['num_sampled']:,} of them sampled"
    rows = [("shape", f"{shape}{' ...' * (len(found['shapes']) > 2)} {found['dtype']}: {vectors}")]
    rows += [("size", f"RMS {found['rms']:.3g}, largest |x| {found['largest']:.4g}")]
    if steps:
        (low, t0), (high, t1) = (end(zip(found["rms_by_step"], found["timesteps"])) for end in (min, max))
        times, inner = ratio(found["rms_by_step"]), ratio(found["spread_by_step"])
        rows += [
            ("steps", f"RMS {low:.3g} at timestep {t0:g} to {high:.3g} at {t1:g}: {times:.1f} times; {inner:.1f} about the mean")
        ]
    (mean, most), (varies, much) = found["largest_mean"], found["largest_variance"]
    where = f"dimension {mean} holds {most:.0%} of |mean|², {varies} {much:.0%} of the variance"
    rows += [("mean", f"gamma {found['gamma']:.2f}; {where}")]
    dims = found["outlier_dims"]
    named = f": {', '.join(map(str, dims[:6]))}{', ...' * (len(dims) > 6)}, with {found['outlier_power']:.0%} of the power"
    rows += [("outliers", f"{len(dims)} of {d} dimensions above {OUTLIER} times the median RMS{named if dims else ''}")]
    rows += [("rank", f"effective rank {found['effective_rank']:.1f} of {d}")]
    for way, dead in found["dead"].items():
        early = ", before AuxK" if dead["updates"] <= AUXK_FROM and dead["updates"] < found["updates"] else ""
        trained = f"{dead['trained']:.1%} after {dead['updates']:,} of {found['updates']:,} updates{early}"
        rows += [("dead", f"{WORDS[way]}: {dead['start']:.1%} of the latents at the start, {trained}")]
    sae = f"{found['num_latents']} latents, k = {found['k']}; batches of {found['batch_size']}, lr {found['lr']:.2g}"
    rows += [("training", f"{sae}: {found['updates']:,} updates, about {duration(found['seconds'])} on {found['device']}")]
    return [f"{name:9} {text}" for name, text in rows]


def plot(found, title):
    """Four panels: RMS by timestep, power by dimension, eigenvalues, how often latents fire. Returns the PNG's bytes."""
    blue, orange, grey = (dict(color=color, lw=1.4) for color in ("#2f6db5", "#e07b39", "#888888"))
    fig = Figure(figsize=(11, 7.4), layout="constrained")
    fig.suptitle(title, fontsize=12, parse_math=False)
    (by_step, by_dim), (by_rank, by_latent) = axes = fig.subplots(2, 2)
    ranks = range(1, found["d"] + 1)

    if "timesteps" in found:
        dots = dict(marker="o", ms=3.5)
        by_step.plot(found["timesteps"], found["rms_by_step"], **blue, **dots, label="as they are")
        by_step.plot(found["timesteps"], found["spread_by_step"], **orange, **dots, label="about their common mean")
        by_step.set(title="RMS by timestep", xlabel="timestep, in the order of sampling", ylabel="RMS")
        by_step.set_ylim(bottom=0)
        if found["timesteps"][0] > found["timesteps"][-1]:
            by_step.invert_xaxis()
    else:
        by_step.plot(found["rms_percentiles"], [p / 100 for p in range(101)], **blue, label="sampled vectors")
        by_step.set(
            title="RMS of vectors", xlabel="RMS of a vector's numbers, at most", ylabel="share of the vectors", ylim=(0, 1.02)
        )
        by_step.yaxis.set_major_formatter("{x:.0%}")

    power = sorted((m**2 + v, v) for m, v in zip(found["mean"], found["variance"]))[::-1]
    by_dim.plot(ranks, [p for p, _ in power], **blue, label="mean² + variance")
    by_dim.plot(ranks, [v for _, v in power], color="#e07b39", ls="", marker=".", ms=4, label="variance alone")
    limit = OUTLIER**2 * statistics.median(p for p, _ in power)
    by_dim.axhline(limit, **grey, ls="--", label=f"outliers: {OUTLIER} times the median RMS")
    by_dim.set(title=f"Power by dimension: gamma {found['gamma']:.2f}", xlabel="dimension, sorted", ylabel="power", yscale="log")

    total = sum(found["eigenvalues"])
    by_rank.plot(ranks, [max(l / total, 1e-12) for l in found["eigenvalues"]], **blue, label="eigenvalues")
    by_rank.axvline(
        found["effective_rank"], **grey, ls="--", label=f"effective rank {found['effective_rank']:.1f} of {found['d']}"
    )
    by_rank.set(title="Spectrum of the covariance", xlabel="eigenvalue, sorted", ylabel="share of the variance", yscale="log")

    for way, style in zip(found["dead"], (blue, orange)):
        for when, line in (("start", ":"), ("trained", "-")):
            fires = found["fires"][way][when].sort(descending=True).values.double()
            after = "at the start" if when == "start" else f"after {found['dead'][way]['updates']} updates"
            label = f"{WORDS[way]}, {after}: {found['dead'][way][when]:.1%} dead"
            alive = fires[fires > 0] / found["num_counted"]
            by_latent.plot([(i + 1) / len(fires) for i in range(len(alive))], alive.tolist(), **style, ls=line, label=label)
    by_latent.axhline(found["k"] / found["num_latents"], **grey, ls="--", label="mean, k / latents")
    by_latent.set(title="How often latents are active", xlabel="latents, sorted", ylabel="share of the vectors", yscale="log")
    by_latent.set_xlim(-0.02, 1.02)
    by_latent.xaxis.set_major_formatter("{x:.0%}")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3, lw=0.6)
        ax.legend(frameon=False, fontsize=8)
    fig.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=140)
    return png.getvalue()


def claim(out_dir, sets):
    """Where each data set's two files go, without their ending. Raises UsageError where one would replace what is not its own."""
    places = []
    for activations in sets:
        place = out_dir / Path(activations.paths[0]).stem
        picture, numbers = (place.with_name(f"{place.name}.{end}") for end in ("png", "json"))
        theirs = read_json(numbers).get("data") if numbers.exists() else None
        same = theirs and sorted(map(os.path.realpath, theirs)) == sorted(map(os.path.realpath, activations.paths))
        if place in places or not same and (numbers.exists() or picture.exists()):
            raise UsageError(f"{numbers if numbers.exists() else picture} is of other data; choose another --out_dir")
        places.append(place)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out_dir {out_dir} can't be made: {error.strerror}") from None
    return places


def diagnose(cfg, activations, place, device):
    """Measure and try one data set; print the screen and write the files. Returns the report."""
    # 1. What the sample says
    num_latents = cfg.num_latents or cfg.expansion_factor * activations.d
    if not 1 <= cfg.k <= num_latents:
        raise UsageError(f"--k {cfg.k}: expected 1 to num_latents = {num_latents}")
    print(f"{' '.join(activations.paths)}: measuring ...")
    drawn = health.draw(activations, cfg.seed)
    found = health.report(activations, cfg.k, num_latents, device, cfg.center, cfg.seed, drawn)
    found |= {"shapes": activations.shapes, "num_prompts": activations.num_prompts}

    # 2. What the first updates make of the latents, and how long they take
    x, updates = drawn[0].to(device), -(-cfg.num_epochs * activations.num_training // BATCH_SIZE)
    dtype = product_dtype("auto", device)
    with tqdm(total=2 * min(updates, cfg.trial_updates), unit="update", desc="trial") as bar:
        for way, dead in found["dead"].items():
            sae = health.start(x, num_latents, cfg.k, way, cfg.seed)
            seconds = trial(sae, x, updates, cfg, dtype, bar)
            fires = found["fires"][way]["trained"] = health.count_fires(sae, x[: found["num_counted"]])
            dead |= {"trained": health.dead_share(fires), "updates": len(seconds), "seconds_each": statistics.median(seconds)}
        bar.total = bar.n
    found |= {"batch_size": BATCH_SIZE, "lr": learning_rate(updates // 2, updates, num_latents), "updates": updates}
    found |= {"device": str(device), "seconds": updates * found["dead"][cfg.center]["seconds_each"]}

    # 3. The screen and the files
    print("\n".join([*screen(found), *(f"warning   {line}" for line in health.warnings(found))]))
    numbers = {name: value for name, value in found.items() if name != "fires"}
    write_atomically(place.with_name(f"{place.name}.png"), plot(found, place.name))
    write_atomically(place.with_name(f"{place.name}.json"), (json.dumps(numbers, indent=1) + "\n").encode())
    print(f"picture in {place}.png, numbers in {place}.json")
    return found


def main(cfg):
    check_positive(cfg, "expansion_factor", "num_latents", "num_epochs", "trial_updates")
    if not cfg.trial_seconds > 0:
        raise UsageError(f"--trial_seconds {cfg.trial_seconds}: expected a positive number")
    device = resolve_device(cfg.device)
    if cfg.device == "auto" and device.type == "mps":
        device = torch.device("cpu")  # as in train.py
    sets = open_activations(cfg.data or [newest_activations()])
    for activations, place in zip(sets, claim(Path(cfg.out_dir), sets)):
        diagnose(cfg, activations, place, device)


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
