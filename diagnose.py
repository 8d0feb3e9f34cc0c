"""Stage 3: are the activations fit to train on? One screen and one picture, before the long run.

    python diagnose.py                                           # the newest collection
    python diagnose.py --data activations/mid_block.npy --k 32 --expansion_factor 8
    python diagnose.py --data "shards/*.npy" --num_epochs 2 --center none

In a notebook:

    (numbers,) = main(Config(data=["acts.npy"]))

It measures a sample of up to 65,536 training vectors (analysis/data_stats.py): their mean, outlier
dimensions, RMS by timestep and rank. Two trials show how many latents will be dead: each starts as
train.py does and makes the first updates on the sample, one with centring and one without. The same
updates say how long training takes.

Reads   activation files as train.py does. Each hook name gets a diagnosis.
Writes  <out_dir>/<name of the first file>.png and .json. Only a diagnosis of the same files is
        replaced.

It does not change the data, and it does not predict what comes after the trials: a latent can
still die, or revive, later.

Sources: outliers and dead latents, Simon et al. 2026 (arXiv 2605.31518); for updates and AuxK see
kernels/update.py.
"""

import math
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cli import answer_help, run_script


@dataclass
class Config:
    # model
    expansion_factor: int | None = None
    """Try an SAE with this many latents per dimension of a vector. Give the value that train.py
    will get. If not given, 16."""

    num_latents: int | None = None
    """Try an SAE with exactly this many latents, instead of --expansion_factor."""

    k: int = 16
    """Keep this many latents active per vector. Give the value that train.py will get."""

    # data
    data: list[str] = field(default_factory=list)
    """Diagnose these .npy files, globs or folders. If not given, diagnose the newest file in
    activations/."""

    # training
    center: Literal["median", "mean", "none"] = "median"
    """Start b_dec at the geometric median of a sample, at its mean, or at 0 (none)."""

    num_epochs: int = 1
    """Predict a training that goes through the vectors this many times."""

    trial_updates: int = 500
    """Make at most this many updates in each of the two trials (with and without centring). The
    revival of dead latents (AuxK) begins after 98; fewer updates predict too many dead latents."""

    trial_seconds: float = 8.0
    """Stop each of the two trials after this many seconds. Raise it if the screen says that a trial
    ended before AuxK."""

    seed: int = 0
    """Draw the sample, the first weights and the order of the vectors from this seed. Change it to
    see how much depends on chance."""

    # output
    out_dir: str = "diagnose"
    """Write the pictures and the numbers into this folder."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else the CPU. Name mps to try
    it: many PyTorch versions can't train on it. The predicted time is for this device."""


if __name__ == "__main__":
    answer_help(Config)  # --help and a mistyped option are answered before torch is imported

import torch
from torch import Tensor
from tqdm import tqdm

import train
from analysis import data_stats
from analysis.data_stats import OUTLIER, Draw, ratio
from analysis.plots import CENTERED, plot_diagnosis
from cli import check_positive, product_dtype
from errors import UsageError, decimals
from kernels.update import SparseUpdate
from sae import Sae
from store.dataset import Activations, newest_activations, open_activations
from store.disk import check_same, make_folder, read_json, write_json

DEFAULTS = train.Config()  # for all options of training that diagnose.py does not have
BATCH_SIZE = DEFAULTS.effective_batch_size

# After this many updates a latent can be dead for the first time, and AuxK begins.
AUXK_FROM = math.ceil(DEFAULTS.dead_feature_threshold / BATCH_SIZE)

Report = dict[str, Any]  # what data_stats.report returns, and what the trial adds to it


def main(cfg: Config) -> list[Path]:
    """Diagnose every data set; return the .json files with the numbers.

    Raises UsageError for an option that can't be used, for data that can't be measured, or if a
    file in --out_dir would be replaced that is not a diagnosis of the same data.
    """
    check_options(cfg)
    device = train.training_device(cfg.device)
    datasets = open_activations(cfg.data or [newest_activations()])
    paths = plan_files(Path(cfg.out_dir), datasets)
    for dataset, path in zip(datasets, paths):
        train.print_differences(dataset)
        diagnose(cfg, dataset, path, device)
    return paths


def check_options(cfg: Config) -> None:
    """Raise UsageError for a value that can't be used."""
    check_positive(cfg, "expansion_factor", "num_latents", "num_epochs", "trial_updates")
    if cfg.expansion_factor is not None and cfg.num_latents is not None:
        raise UsageError(
            f"--expansion_factor {cfg.expansion_factor} and --num_latents {cfg.num_latents} both "
            "say how many latents there are; give one of them"
        )
    if not cfg.trial_seconds > 0:  # NaN is refused, too
        raise UsageError(f"--trial_seconds {cfg.trial_seconds}: expected a positive number")


def plan_files(out_dir: Path, datasets: list[Activations]) -> list[Path]:
    """Make `out_dir`, and return the .json file for each data set; its .png lies beside it.

    A data set whose first file is acts/a.npy gets <out_dir>/a.json. Raises UsageError if two data
    sets would get the same, or if it holds anything but a diagnosis of the same files.
    """
    paths = []
    for dataset in datasets:
        name = Path(dataset.paths[0]).stem
        numbers = out_dir / f"{name}.json"
        picture = out_dir / f"{name}.png"
        if numbers in paths:
            raise UsageError(
                f"{numbers} would hold the diagnosis of two data sets; choose another --out_dir "
                "for one of them"
            )
        if numbers.exists():
            theirs = read_json(numbers).get("data") or []
            check_same(numbers, {"data": real_paths(theirs)}, {"data": real_paths(dataset.paths)})
        elif picture.exists():
            raise UsageError(f"{picture} exists and is not a diagnosis; choose another --out_dir")
        paths.append(numbers)
    make_folder(out_dir)
    return paths


def real_paths(paths: list[str]) -> list[str]:
    """Return the paths sorted, each absolute and without links."""
    return sorted(os.path.realpath(path) for path in paths)


def num_latents_of(cfg: Config, dataset: Activations) -> int:
    """Return the number of latents that train.py would take. Raises UsageError if k is larger."""
    num_latents = cfg.num_latents
    if num_latents is None:
        factor = cfg.expansion_factor or train.DEFAULT_EXPANSION_FACTOR
        num_latents = factor * dataset.d
    if not 1 <= cfg.k <= num_latents:
        raise UsageError(f"--k {cfg.k}: expected 1 to num_latents = {num_latents}")
    return num_latents


def diagnose(cfg: Config, dataset: Activations, path: Path, device: torch.device) -> Report:
    """Measure and try one data set, print the screen, and write `path` and the picture beside it.

    Returns the report; it holds more than the file: which latents fired.
    """
    # 1. What the sample says
    num_latents = num_latents_of(cfg, dataset)
    print(f"{' '.join(dataset.paths)}: measuring ...")
    drawn = data_stats.draw(dataset, cfg.seed)
    report = data_stats.report(dataset, cfg.k, num_latents, device, cfg.center, cfg.seed, drawn)
    report["shapes"] = dataset.shapes
    report["num_prompts"] = dataset.num_prompts

    # 2. What the first updates make of the latents, and how long they take
    add_trials(report, cfg, dataset, drawn, device)

    # 3. The screen and the files
    for line in screen(report):
        print(line)
    for line in data_stats.warnings(report):
        print(f"warning   {line}")
    numbers = {name: value for name, value in report.items() if name != "fires"}
    picture = path.with_name(f"{path.stem}.png")
    write_json(path, numbers)
    plot_diagnosis(picture, report, path.stem)
    print(f"picture in {picture}, numbers in {path}")
    return report


def add_trials(
    report: Report, cfg: Config, dataset: Activations, drawn: Draw, device: torch.device
) -> None:
    """Make the first updates, with and without a centre, and add what they show to the report.

    By centring: the share of dead latents after them, how many updates were made, and the median
    seconds of each. For the whole training: its number of updates, learning rate and seconds.
    """
    x = drawn.x.to(device)
    num_latents = report["num_latents"]
    num_vectors = cfg.num_epochs * dataset.num_training
    updates = train.Schedule(num_vectors, BATCH_SIZE, 1).iterations
    dtype = product_dtype("auto", device)

    with tqdm(total=2 * min(updates, cfg.trial_updates), unit="update", desc="trial") as bar:
        for center, dead in report["dead"].items():
            sae = data_stats.start(x, num_latents, cfg.k, center, cfg.seed)
            seconds = trial(sae, x, updates, cfg, dtype, bar)
            fires = data_stats.count_fires(sae, x[: report["num_counted"]])
            report["fires"][center]["trained"] = fires
            dead["trained"] = data_stats.dead_share(fires)
            dead["updates"] = len(seconds)
            dead["seconds_each"] = statistics.median(seconds)
        bar.total = bar.n

    report["batch_size"] = BATCH_SIZE
    report["lr"] = train.learning_rate(updates // 2, updates, num_latents, DEFAULTS)
    report["updates"] = updates
    report["device"] = str(device)
    report["seconds"] = updates * report["dead"][cfg.center]["seconds_each"]


def trial(
    sae: Sae, x: Tensor, updates: int, cfg: Config, dtype: torch.dtype | None, bar: tqdm
) -> list[float]:
    """Train `sae` by the first updates that train.py would make; return the seconds of each.

    x: (N, d), the sample, as it is; the SAE takes such vectors before and after the trial. updates:
    how many the whole training would have, which decides the learning rates. It ends after
    cfg.trial_updates or cfg.trial_seconds. Raises UsageError if the loss is NaN or infinite.
    """
    scale = data_stats.power_of_two(data_stats.rms_about(x, sae.b_dec.data))
    sae.scale_inputs(1 / scale)  # from here on it takes scale * x, as in train.py
    variance = scale**2 * x.var(0, correction=0).sum().item()
    update = SparseUpdate(sae, variance, dtype=dtype)

    seconds = []
    deadline = time.perf_counter() + cfg.trial_seconds
    order = trial_order(len(x), min(updates, cfg.trial_updates), cfg.seed).to(x.device)
    for iteration, rows in enumerate(order.split(BATCH_SIZE)):
        started = time.perf_counter()
        lr = train.learning_rate(iteration, updates, sae.num_latents, DEFAULTS)
        forward, _ = update(x[rows] * scale, lr)
        loss = forward.loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(loss):
            raise UsageError(
                f"the loss is {loss} after {iteration + 1} updates of the trial; nothing can be "
                "learned from these vectors"
            )
        bar.update()
        if time.perf_counter() > deadline:
            break
    sae.scale_inputs(scale)
    return seconds


def trial_order(num_vectors: int, num_updates: int, seed: int) -> Tensor:
    """Return the index of each vector that the trial sees, (num_updates * BATCH_SIZE,).

    Every vector comes once before any comes again.
    """
    generator = torch.Generator().manual_seed(seed)
    num_needed = num_updates * BATCH_SIZE
    epochs = math.ceil(num_needed / num_vectors)
    orders = [torch.randperm(num_vectors, generator=generator) for _ in range(epochs)]
    return torch.cat(orders)[:num_needed]


def screen(report: Report) -> list[str]:
    """Return the report as lines to print, each with a name of at most 9 letters in front."""
    lines = [f"shape     {shape_line(report)}"]
    lines.append(f"size      RMS {report['rms']:.3g}, largest |x| {report['largest']:.4g}")
    if report.get("timesteps"):
        lines.append(f"steps     {steps_line(report)}")
    lines.append(f"mean      {mean_line(report)}")
    lines.append(f"outliers  {outliers_line(report)}")
    lines.append(f"rank      effective rank {report['effective_rank']:.1f} of {report['d']}")
    for center in report["dead"]:
        lines.append(f"dead      {dead_line(report, center)}")
    lines.append(f"training  {training_line(report)}")
    return lines


def shape_line(report: Report) -> str:
    """Return "(40, 3, 50, 8) float16: 6,000 vectors of 40 prompts, of 3 steps, ..."."""
    shapes = " ".join(str(tuple(shape)) for shape in report["shapes"][:2])
    if len(report["shapes"]) > 2:
        shapes += " ..."

    counts = []
    if report["num_prompts"]:
        counts.append(f" of {report['num_prompts']} prompts")
    if report.get("timesteps"):
        counts.append(f" of {len(report['timesteps'])} steps")
    return (
        f"{shapes} {report['dtype']}: {report['num_vectors']:,} vectors{','.join(counts)}, "
        f"{report['num_sampled']:,} of them sampled"
    )


def steps_line(report: Report) -> str:
    """Return where the vectors are shortest and longest: "RMS 1 at timestep 900 to 9 at 1: ..."."""
    rms = list(zip(report["rms_by_step"], report["timesteps"]))
    lowest, lowest_timestep = min(rms)
    highest, highest_timestep = max(rms)
    return (
        f"RMS {lowest:.3g} at timestep {lowest_timestep:g} to {highest:.3g} at "
        f"{highest_timestep:g}: {ratio(report['rms_by_step']):.1f} times; "
        f"{ratio(report['spread_by_step']):.1f} times about the mean"
    )


def mean_line(report: Report) -> str:
    """Return gamma, and the dimensions with the largest part of the mean and of the variance."""
    mean_dimension, mean_share = report["largest_mean"]
    variance_dimension, variance_share = report["largest_variance"]
    gamma = decimals(report["gamma"], 2)
    return (
        f"gamma {gamma}; dimension {mean_dimension} holds {mean_share:.0%} of "
        f"|mean|²; dimension {variance_dimension} holds {variance_share:.0%} of the variance"
    )


def outliers_line(report: Report) -> str:
    """Return how many dimensions are outliers, the first six of them, and their power."""
    dimensions = report["outlier_dims"]
    text = f"{len(dimensions)} of {report['d']} dimensions above {OUTLIER} times the median RMS"
    if not dimensions:
        return text
    names = ", ".join(map(str, dimensions[:6]))
    if len(dimensions) > 6:
        names += ", ..."
    return f"{text}: {names}, with {report['outlier_power']:.0%} of the power"


def dead_line(report: Report, center: str) -> str:
    """Return how many latents are dead at the start and after the trial, with one centring."""
    dead = report["dead"][center]
    start = decimals(100 * dead["start"], 1)
    trained = decimals(100 * dead["trained"], 1)
    text = (
        f"{CENTERED[center]}: {start}% of the latents at the start, "
        f"{trained}% after {dead['updates']:,} of {report['updates']:,} updates"
    )
    if dead["updates"] <= AUXK_FROM and dead["updates"] < report["updates"]:
        text += ", before AuxK"
    return text


def training_line(report: Report) -> str:
    """Return what train.py would do, and about how long it would take."""
    return (
        f"{report['num_latents']} latents, k = {report['k']}; batches of {report['batch_size']}, "
        f"lr {report['lr']:.2g}: {report['updates']:,} updates, about "
        f"{duration(report['seconds'])} on {report['device']}"
    )


def duration(seconds: float) -> str:
    """Return seconds in words: "90 s", "100 min", "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    run_script(main, Config)
