"""How far it goes: disk, memory and time of large data sets and dictionaries, from measured rates.

    python -m bench scale                    # rates of this machine, then the tables
    python -m bench scale --check 500 1000   # predict 2000 toy prompts, and measure them

Disk is exact: prompts x steps x tokens x d x bytes. Times come from rates, and each table says
where a rate comes from: measured on this machine, published by others, or counted. "Counted" is the
time that a device's products, memory and links take at the least. So it is a lower bound.

--check fits straight lines, seconds = a + b x prompts, through two runs of collect.py and of
train.py as users start them. The tables are in docs/scaling.md.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from bench.sizes import make_step, time_step
from bench.step import conditions
from cli import HERE, check_positive, product_dtype, resolve_device
from store.collection import Collection
from store.dataset import Activations

# up_blocks.1.attentions.1 of Stable Diffusion 1.5 at 512 x 512; its scheduler makes 51 steps for 50
SD15_STEPS = 51
SD15_TOKENS = 256
SD15_WIDTH = 1280
SD15_LATENTS = 16 * SD15_WIDTH

# A very large dictionary
HUGE_LATENTS = 1 << 20
HUGE_WIDTH = 1280
HUGE_VECTORS = 10**9

BYTES_STORED = 2  # of a number in an activation file
BATCHES_WRITTEN = 48  # each waits for the disk, whose time varies
STEPS_TRAINED = 5
LARGEST_PRE_ACTS = 65_536  # latents whose activations are in memory at once, see kernels/encode.py

# Bytes for each of the 2 M d weights
BYTES_SAVED = 12  # the weight and Adam's two moments, in float32
BYTES_IN_MEMORY = (
    17  # the gradient too, and a copy in 16 bits that only the encoder has: 1 on average
)
BYTES_MOVED = 32  # in an update weight, moments and gradient are read and written


@dataclass
class Config:
    # data
    check: tuple[int, int] | None = None
    """Run collect.py and train.py on these two numbers of toy prompts, predict twice the larger
    one, and measure that too. If not given, the tables are printed."""

    num_inference_steps: int = 10
    """Sample in this many steps when --check runs collect.py."""

    # training
    N: int = 4096
    """Give each update this many vectors."""

    k: int = 32
    """Keep this many latents active per vector."""

    # hardware
    seconds_per_picture: float = 1.604
    """Count this many seconds for an image. The default is SD 1.5 in 50 steps on an A100, by
    github.com/fal-ai/stable-diffusion-benchmarks, "torch 2.1, SDPA"."""

    tflops: float = 790
    """Count with this speed of one device's products in bfloat16, in TFLOP/s. The default is an
    H100's, and so are those of the memory and the links."""

    memory_gbs: float = 3000
    """Count with this speed of one device's memory, in GB/s."""

    link_gbs: float = 450
    """Count with this speed between devices, in GB/s each way."""

    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


class Rates(NamedTuple):
    """What this machine does per second at Stable Diffusion's shapes."""

    written: float
    """Bytes that are safe on the disk."""

    read: float
    """Bytes read in shuffled order."""

    trained: float
    """Vectors that an SAE is trained on."""


class UpdateCost(NamedTuple):
    """What one update takes at the least."""

    seconds: float

    memory: float
    """Bytes per device."""


def main(cfg: Config) -> None:
    """Print the tables, or with --check what was predicted and measured."""
    check_positive(cfg, "num_inference_steps", "N", "k")
    device = resolve_device(cfg.device)
    print(f"{conditions(device)}\n")
    with tempfile.TemporaryDirectory() as folder:
        if cfg.check is not None:
            check_prediction(cfg, Path(folder))
            return
        rates = measure_rates(cfg, device, Path(folder))
    print_rates(cfg, rates)
    print_stable_diffusion(cfg, rates)
    print_huge_dictionary(cfg)


# ---- texts


def duration(seconds: float) -> str:
    """Return seconds as a text: 90 gives "1.5 min", 7200 gives "2.0 h", 3 days "3.0 days"."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    if seconds >= 60:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:.1f} s"


def size(num_bytes: float) -> str:
    """Return bytes as a text: 1.5e9 gives "1.5 GB", 1000 gives "0.001 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.3g} {unit}"
    return f"{num_bytes / 1e6:,.3g} MB"


# ---- rates of this machine


def measure_rates(cfg: Config, device: torch.device, folder: Path) -> Rates:
    """Return the rates of this machine. The files go into `folder`."""
    written = measure_writing(folder / "acts")
    read = measure_reading(folder / "acts" / "x.npy", cfg.N)
    return Rates(written, read, measure_training(cfg, device))


def measure_writing(folder: Path) -> float:
    """Return the bytes per second of a collection's batches of one prompt, by the median time."""
    prompts = [{"prompt": str(number)} for number in range(BATCHES_WRITTEN)]
    x = torch.randn(1, SD15_STEPS, SD15_TOKENS, SD15_WIDTH).half()
    times = []
    with Collection(folder, {}, prompts, batch_size=1) as collection:
        for batch in range(BATCHES_WRITTEN):
            start = time.perf_counter()
            collection.write(batch, {"x": x}, {})
            times.append(time.perf_counter() - start)
        collection.finish({"x": None})
    return x.nbytes / sorted(times)[BATCHES_WRITTEN // 2]


def measure_reading(path: Path, batch_size: int) -> float:
    """Return the bytes per second of one pass over a file in shuffled order."""
    activations = Activations([path])
    num_bytes = 0
    start = time.perf_counter()
    for x, _ in activations.batches(batch_size, activations.num_training, buffer_gb=0.25):
        num_bytes += x.nbytes
    return num_bytes / (time.perf_counter() - start)


def measure_training(cfg: Config, device: torch.device) -> float:
    """Return the vectors per second of training, by the median time of a step."""
    dtype = product_dtype("auto", device)
    step = make_step(cfg.N, SD15_WIDTH, SD15_LATENTS, cfg.k, device, dtype)
    times = [time_step(step, device) for _ in range(STEPS_TRAINED)]
    return cfg.N / sorted(times)[STEPS_TRAINED // 2]


# ---- what is counted


def count_update(cfg: Config, M: int, d: int, devices: int, split_vectors: bool) -> UpdateCost:
    """Return a lower bound for the seconds of one update, and the bytes of memory per device.

    The seconds are those of the products, the memory and the messages. With `split_vectors` every
    device has all latents and a part of the vectors; otherwise each has a slice of the latents.
    """
    fraction = 1 / devices
    fraction_of_weights = 1 if split_vectors else fraction

    products = 2 * cfg.N * d * M * fraction / (cfg.tflops * 1e12)
    moved = BYTES_MOVED * 2 * M * d * fraction_of_weights / (cfg.memory_gbs * 1e9)
    sent = bytes_sent(cfg, M, d, devices, split_vectors) / (cfg.link_gbs * 1e9)

    weights = BYTES_IN_MEMORY * 2 * M * d * fraction_of_weights
    vectors = 6 * 4 * d  # six float32 arrays (N, d)
    pre_acts = 2 * min(M * fraction_of_weights, LARGEST_PRE_ACTS)  # in 16 bits
    return UpdateCost(products + moved + sent, weights + cfg.N * (vectors + pre_acts))


def bytes_sent(cfg: Config, M: int, d: int, devices: int, split_vectors: bool) -> float:
    """Return the bytes that each device sends in one update; 0 for a single device."""
    if devices == 1:
        return 0
    others = 1 - 1 / devices
    if split_vectors:
        gradients = 2 * M * d * 4
        return 2 * gradients * others  # an all-reduce sends everything twice
    x_hat = 2 * cfg.N * d * 4 * others
    selected = cfg.N * cfg.k * 12 * (devices - 1)  # top_acts and top_indices, float32 and int64
    return x_hat + selected


# ---- the tables


def print_rates(cfg: Config, rates: Rates) -> None:
    """Print what was measured, and what a device of the options' speeds needs at the least."""
    million = 1e6 * BYTES_STORED * SD15_WIDTH  # bytes of a million vectors
    update = count_update(cfg, SD15_LATENTS, SD15_WIDTH, devices=1, split_vectors=False)
    print(
        f"measured here: written {rates.written / 1e6:,.0f} MB/s, "
        f"read shuffled {rates.read / 1e6:,.0f} MB/s, trained {rates.trained:,.0f} vectors/s"
    )
    print(
        f"               a million vectors of d = {SD15_WIDTH}: {size(million)}, "
        f"read in {million / rates.read:.1f} s, "
        f"trained on in {duration(1e6 / rates.trained)} "
        f"(M = {SD15_LATENTS:,}, k = {cfg.k}, batches of {cfg.N})"
    )
    print(
        f"counted:       trained on in {1e6 / cfg.N * update.seconds:.1f} s on a device of "
        f"{cfg.tflops:,.0f} TFLOP/s, {cfg.memory_gbs:,.0f} GB/s of memory "
        f"and {cfg.link_gbs:,.0f} of links"
    )


def print_stable_diffusion(cfg: Config, rates: Rates) -> None:
    """Print what collecting Stable Diffusion 1.5 and training on it take."""
    print(
        "\n| SD 1.5, 51 steps, 256 x 1280 | vectors | disk | generating "
        "| writing, here | training, here | training, counted |"
    )
    print("|---|---|---|---|---|---|---|")
    for prompts in (10_000, 1_000_000):
        print_stable_diffusion_row(cfg, rates, prompts, every=1, tokens=SD15_TOKENS)
        print_stable_diffusion_row(cfg, rates, prompts, every=5, tokens=SD15_TOKENS)
        print_stable_diffusion_row(cfg, rates, prompts, every=5, tokens=32)


def print_stable_diffusion_row(
    cfg: Config, rates: Rates, prompts: int, every: int, tokens: int
) -> None:
    """Print the line of a collection that stores `tokens` tokens of each `every`-th step."""
    update = count_update(cfg, SD15_LATENTS, SD15_WIDTH, devices=1, split_vectors=False)
    stored_steps = math.ceil(SD15_STEPS / every)
    vectors = prompts * stored_steps * tokens
    num_bytes = vectors * BYTES_STORED * SD15_WIDTH

    left_out = []
    if every > 1:
        left_out.append(f"every {every}th step")
    if tokens < SD15_TOKENS:
        left_out.append(f"{tokens} tokens a step")
    cells = [
        f"{prompts:,} prompts, {', '.join(left_out) or 'all'}",
        f"{vectors / 1e6:,.0f} M",
        size(num_bytes),
        duration(prompts * cfg.seconds_per_picture),
        duration(num_bytes / rates.written),
        duration(vectors / rates.trained),
        duration(vectors / cfg.N * update.seconds),
    ]
    print(f"| {' | '.join(cells)} |")


def print_huge_dictionary(cfg: Config) -> None:
    """Print what training a million latents takes on 1 to 64 devices."""
    M = HUGE_LATENTS
    d = HUGE_WIDTH
    print(
        f"\n| M = {M:,}, {HUGE_VECTORS / 1e9:.0f} billion vectors of {d} "
        "| memory per device | an update, counted | in all, counted |"
    )
    print("|---|---|---|---|")
    print_huge_dictionary_row(cfg, "1 device", count_update(cfg, M, d, 1, False))
    for devices in (2, 4, 8, 16, 64):
        latents_split = count_update(cfg, M, d, devices, split_vectors=False)
        vectors_split = count_update(cfg, M, d, devices, split_vectors=True)
        print_huge_dictionary_row(cfg, f"{devices} devices, latents split", latents_split)
        print_huge_dictionary_row(cfg, f"{devices} devices, vectors split", vectors_split)
    data = size(HUGE_VECTORS * BYTES_STORED * d)
    checkpoint = size(BYTES_SAVED * 2 * M * d)
    sae = size(4 * 2 * M * d)
    print(f"\ndata {data}, checkpoint {checkpoint}, SAE {sae}")


def print_huge_dictionary_row(cfg: Config, how: str, update: UpdateCost) -> None:
    """Print the line of a way to split a very large dictionary."""
    in_all = HUGE_VECTORS / cfg.N * update.seconds
    print(f"| {how} | {size(update.memory)} | {1e3 * update.seconds:.1f} ms | {duration(in_all)} |")


# ---- the prediction


class Cost(NamedTuple):
    """What a number of toy prompts costs."""

    collecting: float
    """Seconds of collect.py."""

    training: float
    """Seconds of train.py: the median of three runs."""

    stored: int
    """Bytes in the folder of the activations."""


def check_prediction(cfg: Config, folder: Path) -> None:
    """Measure two numbers of prompts, and print what twice the larger one should take and takes."""
    smaller, larger = cfg.check
    twice = 2 * max(cfg.check)
    costs = {}
    for num_prompts in (smaller, larger, twice):
        cost = measure_cost(cfg, num_prompts, folder)
        costs[num_prompts] = cost
        print(
            f"{num_prompts:7,} prompts: collect.py {cost.collecting:7.1f} s, {size(cost.stored)}; "
            f"train.py {cost.training:6.1f} s",
            flush=True,
        )

    print(f"\n{f'of {twice:,} prompts':20} {'predicted':>12} {'measured':>12} {'off by':>8}")
    units = {"collect.py, s": 1, "train.py, s": 1, "on disk, MB": 1e6}
    for column, (name, unit) in enumerate(units.items()):
        of_smaller = costs[smaller][column]
        of_larger = costs[larger][column]
        measured = costs[twice][column]
        slope = (of_larger - of_smaller) / (larger - smaller)
        predicted = of_larger + slope * (twice - larger)
        off_by = predicted / measured - 1
        print(f"{name:20} {predicted / unit:12.1f} {measured / unit:12.1f} {off_by:8.1%}")


def measure_cost(cfg: Config, num_prompts: int, folder: Path) -> Cost:
    """Run collect.py and three times train.py on toy prompts; return what they cost."""
    activations = folder / f"acts{num_prompts}"
    prompts = folder / f"{num_prompts}.txt"
    rows = (HERE / "toy" / "prompts.csv").read_text().splitlines()[1:]
    with prompts.open("w") as file:
        for number in range(num_prompts):
            row = rows[number % len(rows)]  # the same ones again after 1152, with other seeds
            file.write(row.split(",")[0] + "\n")

    options = ["--dataset_name", prompts, "--max_num_examples", num_prompts]
    options += ["--num_inference_steps", cfg.num_inference_steps, "--out_dir", activations]
    collecting = run("collect.py", *options)

    training = []
    for number in range(3):
        options = ["--data", activations, "--out_dir", folder / "saes"]
        training.append(run("train.py", *options, "--run_name", f"{num_prompts}_{number}"))

    files = [path for path in activations.rglob("*") if path.is_file()]
    stored = sum(path.stat().st_size for path in files)
    return Cost(collecting, sorted(training)[1], stored)


def run(script: str, *options: object) -> float:
    """Return the seconds that a script takes, from its command line to its end."""
    command = [sys.executable, str(HERE / script), *map(str, options)]
    start = time.perf_counter()
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    return time.perf_counter() - start
