"""Stage 3: are they fit to train on? One screen and one picture, before the long run.

    python diagnose.py                                                 # the newest file in activations/
    python diagnose.py --data activations/mid_block.npy --k 32 --expansion_factor 8
    python diagnose.py --data "shards/*.npy" --num_epochs 2 --center none

Measures 65,536 training vectors (analysis/data_stats.py): their mean, outlier dimensions, RMS by
timestep and rank. How many latents will be dead is tried: train.py's own start, and then its first
updates on the sample, once with the centring asked for and once without (or with it, for --center
none). The same updates say how long training takes.

Reads   activation files as train.py does; one diagnosis a hook name.
Writes  <out_dir>/<name of the first file>.png and .json; only a diagnosis of the same files is replaced.

It does not change the data, and it does not foresee what comes after the trial: a latent can still
die, or revive, later.

Sources: outliers and dead latents, Simon et al. 2026 (arXiv 2605.31518); updates and AuxK, see
kernels/update.py.
"""

import math
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import train
from analysis import data_stats
from analysis.data_stats import OUTLIER, ratio
from analysis.plots import CENTERED, plot_diagnosis
from cli import check_positive, product_dtype, run
from errors import UsageError
from kernels.update import SparseUpdate
from store.dataset import newest_activations, open_activations
from store.disk import check_same, make_folder, read_json, write_json


@dataclass
class Config:
    data: list[str] = field(default_factory=list)
    """.npy files, globs, folders (none: newest in activations/)."""

    out_dir: str = "diagnose"
    """Folder for the pictures and the numbers."""

    expansion_factor: int = 16
    """Of the SAE to be trained: num_latents as a multiple of the vectors' width."""

    num_latents: int | None = None
    """Size of the dictionary, instead of expansion_factor."""

    k: int = 16
    """Active latents a vector."""

    center: Literal["median", "mean", "none"] = "median"
    """Where b_dec is to start."""

    num_epochs: int = 1
    """Passes over the training vectors that are planned."""

    trial_updates: int = 500
    """Updates of the trial at most; AuxK begins after 98."""

    trial_seconds: float = 8.0
    """And seconds, of each of its two halves."""

    seed: int = 0
    """Of the sample, the weights and the trial's order."""

    device: str = "auto"
    """Auto, cuda, cuda:N, mps, cpu."""


DEFAULTS = train.Config()  # what is tried, and what training takes if nothing else is asked for
BATCH_SIZE = DEFAULTS.effective_batch_size
AUXK_FROM = math.ceil(
    DEFAULTS.dead_feature_threshold / BATCH_SIZE
)  # updates after which a latent can first be dead


def trial(sae, x, updates, cfg, dtype, bar):
    """Train `sae`, which takes x (N, d) as it is, by the first of so many updates. Returns the
    seconds of each that was done."""
    scale = data_stats.power_of_two(data_stats.rms_about(x, sae.b_dec.data))
    sae.scale_inputs(1 / scale)  # from here on it takes scale * x, as in train.py
    update = SparseUpdate(sae, scale**2 * x.var(0, correction=0).sum().item(), dtype=dtype)
    generator, seconds, deadline = (
        torch.Generator().manual_seed(cfg.seed),
        [],
        time.perf_counter() + cfg.trial_seconds,
    )
    wanted = min(updates, cfg.trial_updates)
    epochs = -(-wanted * BATCH_SIZE // len(x))
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(epochs)]).to(
        x.device
    )
    for i, rows in enumerate(order[: wanted * BATCH_SIZE].split(BATCH_SIZE)):
        started = time.perf_counter()
        lr = train.learning_rate(i, updates, sae.num_latents, DEFAULTS)
        forward, _ = update(x[rows] * scale, lr)
        loss = forward.loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(loss):
            raise UsageError(
                f"the loss is {loss} after {i + 1} updates of the trial; nothing can be learned from these vectors"
            )
        bar.update()
        if time.perf_counter() > deadline:
            break
    sae.scale_inputs(scale)
    return seconds


def duration(seconds):
    """In words."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def screen(found):
    """The report as lines to print."""
    d, steps, shape = (
        found["d"],
        len(found.get("timesteps", [])),
        " ".join(map(str, map(tuple, found["shapes"][:2]))),
    )
    counts = [
        f" of {n} {word}" for n, word in ((found["num_prompts"], "prompts"), (steps, "steps")) if n
    ]
    vectors = f"{found['num_vectors']:,} vectors{','.join(counts)}, {found['num_sampled']:,} of them sampled"
    rows = [("shape", f"{shape}{' ...' * (len(found['shapes']) > 2)} {found['dtype']}: {vectors}")]
    rows += [("size", f"RMS {found['rms']:.3g}, largest |x| {found['largest']:.4g}")]
    if steps:
        (low, t0), (high, t1) = (
            end(zip(found["rms_by_step"], found["timesteps"])) for end in (min, max)
        )
        times, inner = ratio(found["rms_by_step"]), ratio(found["spread_by_step"])
        rows += [
            (
                "steps",
                f"RMS {low:.3g} at timestep {t0:g} to {high:.3g} at {t1:g}: {times:.1f} times; {inner:.1f} about the mean",
            )
        ]
    (mean, most), (varies, much) = found["largest_mean"], found["largest_variance"]
    where = f"dimension {mean} holds {most:.0%} of |mean|², {varies} {much:.0%} of the variance"
    rows += [("mean", f"gamma {found['gamma']:.2f}; {where}")]
    dims = found["outlier_dims"]
    named = f": {', '.join(map(str, dims[:6]))}{', ...' * (len(dims) > 6)}, with {found['outlier_power']:.0%} of the power"
    rows += [
        (
            "outliers",
            f"{len(dims)} of {d} dimensions above {OUTLIER} times the median RMS{named if dims else ''}",
        )
    ]
    rows += [("rank", f"effective rank {found['effective_rank']:.1f} of {d}")]
    for way, dead in found["dead"].items():
        early = (
            ", before AuxK"
            if dead["updates"] <= AUXK_FROM and dead["updates"] < found["updates"]
            else ""
        )
        trained = f"{dead['trained']:.1%} after {dead['updates']:,} of {found['updates']:,} updates{early}"
        rows += [
            ("dead", f"{CENTERED[way]}: {dead['start']:.1%} of the latents at the start, {trained}")
        ]
    sae = f"{found['num_latents']} latents, k = {found['k']}; batches of {found['batch_size']}, lr {found['lr']:.2g}"
    rows += [
        (
            "training",
            f"{sae}: {found['updates']:,} updates, about {duration(found['seconds'])} on {found['device']}",
        )
    ]
    return [f"{name:9} {text}" for name, text in rows]


def claim(out_dir, datasets):
    """Where each data set's two files go, without their ending. Raises UsageError where one would
    replace what is not its own."""
    places = []
    for dataset in datasets:
        place = out_dir / Path(dataset.paths[0]).stem
        picture, numbers = (
            place.with_name(f"{place.name}.png"),
            place.with_name(f"{place.name}.json"),
        )
        if place in places:
            raise UsageError(f"{numbers} would be of two data sets; choose another --out_dir")
        if numbers.exists():
            theirs = read_json(numbers).get("data") or []
            check_same(numbers, {"data": real_paths(theirs)}, {"data": real_paths(dataset.paths)})
        elif picture.exists():
            raise UsageError(f"{picture} is of something else; choose another --out_dir")
        places.append(place)
    make_folder(out_dir)
    return places


def real_paths(paths):
    return sorted(map(os.path.realpath, paths))


def diagnose(cfg, dataset, place, device):
    """Measure and try one data set; print the screen and write the files. Returns the report."""
    # 1. What the sample says
    num_latents = cfg.num_latents or cfg.expansion_factor * dataset.d
    if not 1 <= cfg.k <= num_latents:
        raise UsageError(f"--k {cfg.k}: expected 1 to num_latents = {num_latents}")
    print(f"{' '.join(dataset.paths)}: measuring ...")
    drawn = data_stats.draw(dataset, cfg.seed)
    found = data_stats.report(dataset, cfg.k, num_latents, device, cfg.center, cfg.seed, drawn)
    found |= {"shapes": dataset.shapes, "num_prompts": dataset.num_prompts}

    # 2. What the first updates make of the latents, and how long they take
    x = drawn[0].to(device)
    updates = train.Schedule(cfg.num_epochs * dataset.num_training, BATCH_SIZE, 1).iterations
    dtype = product_dtype("auto", device)
    with tqdm(total=2 * min(updates, cfg.trial_updates), unit="update", desc="trial") as bar:
        for way, dead in found["dead"].items():
            sae = data_stats.start(x, num_latents, cfg.k, way, cfg.seed)
            seconds = trial(sae, x, updates, cfg, dtype, bar)
            fires = found["fires"][way]["trained"] = data_stats.count_fires(
                sae, x[: found["num_counted"]]
            )
            dead |= {
                "trained": data_stats.dead_share(fires),
                "updates": len(seconds),
                "seconds_each": statistics.median(seconds),
            }
        bar.total = bar.n
    lr = train.learning_rate(updates // 2, updates, num_latents, DEFAULTS)
    found |= {"batch_size": BATCH_SIZE, "lr": lr, "updates": updates}
    found |= {"device": str(device), "seconds": updates * found["dead"][cfg.center]["seconds_each"]}

    # 3. The screen and the files
    print(
        "\n".join([*screen(found), *(f"warning   {line}" for line in data_stats.warnings(found))])
    )
    numbers = {name: value for name, value in found.items() if name != "fires"}
    write_json(place.with_name(f"{place.name}.json"), numbers)
    plot_diagnosis(place.with_name(f"{place.name}.png"), found, place.name)
    print(f"picture in {place}.png, numbers in {place}.json")
    return found


def main(cfg: Config) -> list[Path]:
    """Diagnose every data set; return the files with the numbers. Raises UsageError for what can't
    be measured or replaced."""
    check_positive(cfg, "expansion_factor", "num_latents", "num_epochs", "trial_updates")
    if not cfg.trial_seconds > 0:
        raise UsageError(f"--trial_seconds {cfg.trial_seconds}: expected a positive number")
    device = train.training_device(cfg.device)
    datasets = open_activations(cfg.data or [newest_activations()])
    places = claim(Path(cfg.out_dir), datasets)
    for dataset, place in zip(datasets, places):
        diagnose(cfg, dataset, place, device)
    return [place.with_name(f"{place.name}.json") for place in places]


if __name__ == "__main__":
    run(main, Config)
