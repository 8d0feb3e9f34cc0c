"""How far it goes: disk, memory and time of large data sets and dictionaries, from measured rates.

    python -m bench scale                    # rates of this machine, then the tables
    python -m bench scale --check 500 1000   # predict 2000 toy prompts from these, and measure them

Disk is exact: prompts x steps x tokens x d x bytes. Times come from rates, and each says where its
rate is from: measured on this machine, published by others, or counted. Counted means the time that
a device's products, memory and links take at the least; it is a lower bound.

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

import torch

from bench.sizes import make_step
from bench.step import conditions, sync
from cli import HERE, check_positive, product_dtype, resolve_device
from store.collection import Collection
from store.dataset import Activations


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


# up_blocks.1.attentions.1 at 512 x 512; its scheduler makes 51 steps for 50
SD15 = dict(steps=51, tokens=256, d=1280)
HUGE = dict(M=1 << 20, d=1280, vectors=10**9)


def duration(seconds: float) -> str:
    """Return seconds as a text: 90 gives "1.5 min", 7200 gives "2.0 h"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def size(num_bytes: float) -> str:
    """Return bytes as a text: 1.5e9 gives "1.5 GB"."""
    unit, scale = next(
        (u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if num_bytes >= s or u == "MB"
    )
    return f"{num_bytes / scale:,.3g} {unit}"


def rates(cfg: Config, device: torch.device, folder: Path) -> tuple[float, float, float]:
    """Measure this machine at Stable Diffusion's shapes.

    Returns bytes written per second, bytes read per second, and vectors trained on per second.
    """
    rows, shape = 48, (1, SD15["steps"], SD15["tokens"], SD15["d"])
    collection = Collection(folder / "acts", {}, [{"prompt": str(i)} for i in range(rows)], 1)
    x, times = torch.randn(shape).half(), []
    for batch in range(rows):
        start = time.perf_counter()
        collection.write(batch, {"x": x}, {})
        times.append(time.perf_counter() - start)
    collection.finish({"x": None})
    collection.close()
    written = x.nbytes / sorted(times)[rows // 2]
    activations, start, seen = Activations([folder / "acts" / "x.npy"]), time.perf_counter(), 0
    for batch, _ in activations.batches(cfg.N, activations.num_training, buffer_gb=0.25):
        seen += batch.nbytes
    read = seen / (time.perf_counter() - start)
    step = make_step(cfg.N, SD15["d"], 16 * SD15["d"], cfg.k, device, product_dtype("auto", device))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        sync(device)
        times.append(time.perf_counter() - start)
    return written, read, cfg.N / sorted(times)[2]


def counted(cfg: Config, M: int, d: int, devices: int, split: bool) -> tuple[float, float]:
    """Return a lower bound for the seconds of one update, and the bytes of memory per device.

    The seconds are those of the products, the memory and the messages. With `split` the vectors
    are split and every device has all latents; otherwise each device has a slice of the latents.
    """
    share = 1 / devices
    products = 2 * cfg.N * d * M * share / (cfg.tflops * 1e12)
    per = 1 if split else share  # of the parameters, on each device
    moved = 32 * 2 * M * d * per / (cfg.memory_gbs * 1e9)
    if devices == 1:
        sent = 0
    elif split:
        sent = 2 * (2 * M * d * 4) * (1 - share)  # an all-reduce of both gradients
    else:
        sent = 2 * cfg.N * d * 4 * (1 - share) + cfg.N * cfg.k * 12 * (
            devices - 1
        )  # of x_hat; top_acts and top_indices
    return products + moved + sent / (cfg.link_gbs * 1e9), 34 * M * d * per + cfg.N * (
        6 * 4 * d + 2 * min(M * per, 65536)
    )


def run(script: str, *options: object) -> float:
    """Return the seconds that a script takes, from its command line to its end."""
    start = time.perf_counter()
    command = [sys.executable, str(HERE / script), *map(str, options)]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    return time.perf_counter() - start


def check(cfg: Config, folder: Path) -> None:
    """Fit on two sizes, and print what twice the larger one should take and takes."""
    counts, found = [*cfg.check, 2 * max(cfg.check)], []
    rows = (HERE / "toy" / "prompts.csv").read_text().splitlines()[1:]
    for n in counts:
        acts, listing = folder / f"acts{n}", folder / f"{n}.txt"
        listing.write_text(
            "".join(f"{rows[i % len(rows)].split(',')[0]}\n" for i in range(n))
        )  # 1152 and again, other seeds
        wanted = (
            "--dataset_name",
            listing,
            "--max_num_examples",
            n,
            "--num_inference_steps",
            cfg.num_inference_steps,
        )
        seconds = run("collect.py", *wanted, "--out_dir", acts)
        train = lambda i, n=n, acts=acts: run(
            "train.py", "--data", acts, "--out_dir", folder / "saes", "--run_name", f"{n}_{i}"
        )
        trained = sorted(map(train, range(3)))[1]
        stored = sum(path.stat().st_size for path in acts.rglob("*") if path.is_file())
        found.append((seconds, trained, stored))
        print(
            f"{n:7,} prompts: collect.py {seconds:7.1f} s, {size(stored)}; "
            f"train.py {trained:6.1f} s",
            flush=True,
        )
    print(
        f"\n{'of ' + format(counts[2], ',') + ' prompts':20} "
        f"{'predicted':>12} {'measured':>12} {'off by':>8}"
    )
    for name, values in zip(("collect.py, s", "train.py, s", "on disk, MB"), zip(*found)):
        slope = (values[1] - values[0]) / (counts[1] - counts[0])
        predicted = values[1] + slope * (counts[2] - counts[1])
        scale = 1e6 if "MB" in name else 1
        print(
            f"{name:20} {predicted / scale:12.1f} {values[2] / scale:12.1f} "
            f"{predicted / values[2] - 1:8.1%}"
        )


def main(cfg: Config) -> None:
    """Print the tables, or with --check what was predicted and measured."""
    check_positive(cfg, "num_inference_steps", "N", "k")
    device = resolve_device(cfg.device)
    where, versions, commit = conditions(device)
    print(f"{where}; {versions}; commit {commit}\n")
    with tempfile.TemporaryDirectory() as folder:
        if cfg.check:
            return check(cfg, Path(folder))
        written, read, trained = rates(cfg, device, Path(folder))
    d, M = SD15["d"], 16 * SD15["d"]
    update, _ = counted(cfg, M, d, 1, False)
    print(
        f"measured here: written {written / 1e6:,.0f} MB/s, read shuffled {read / 1e6:,.0f} MB/s, "
        f"trained {trained:,.0f} vectors/s"
    )
    print(
        f"               a million vectors of d = {d}: {size(1e6 * 2 * d)}, "
        f"read in {1e6 * 2 * d / read:.1f} s, ",
        end="",
    )
    print(f"trained on in {duration(1e6 / trained)} (M = {M:,}, k = {cfg.k}, batches of {cfg.N})")
    speeds = (
        f"{cfg.tflops:,.0f} TFLOP/s, {cfg.memory_gbs:,.0f} GB/s of memory "
        f"and {cfg.link_gbs:,.0f} of links"
    )
    print(f"counted:       trained on in {1e6 / cfg.N * update:.1f} s on a device of {speeds}")

    print(
        "\n| SD 1.5, 51 steps, 256 x 1280 | vectors | disk | generating "
        "| writing, here | training, here | training, counted |"
    )
    print("|---|---|---|---|---|---|---|")
    for prompts in (10_000, 1_000_000):
        for every, tokens in ((1, SD15["tokens"]), (5, SD15["tokens"]), (5, 32)):
            kept_steps = math.ceil(SD15["steps"] / every)
            vectors = prompts * kept_steps * tokens
            options = [f"every {every}th step"] * (every > 1) + [f"{tokens} tokens a step"] * (
                tokens < SD15["tokens"]
            )
            name = f"{prompts:,} prompts, {', '.join(options) or 'all'}"
            cells = [
                f"{vectors / 1e6:,.0f} M",
                size(vectors * 2 * d),
                duration(prompts * cfg.seconds_per_picture),
            ]
            cells += [
                duration(vectors * 2 * d / written),
                duration(vectors / trained),
                duration(vectors / cfg.N * update),
            ]
            print(f"| {name} | {' | '.join(cells)} |")

    M, d, vectors = HUGE["M"], HUGE["d"], HUGE["vectors"]
    print(
        f"\n| M = {M:,}, {vectors / 1e9:.0f} billion vectors of {d} "
        "| memory per device | an update, counted | in all, counted |"
    )
    print("|---|---|---|---|")
    for devices in (1, 2, 4, 8, 16, 64):
        for split in (False, True)[: 1 + (devices > 1)]:
            seconds, memory = counted(cfg, M, d, devices, split)
            how = (
                "1 device"
                if devices == 1
                else f"{devices} devices, {'vectors' if split else 'latents'} split"
            )
            print(
                f"| {how} | {size(memory)} | {1e3 * seconds:.1f} ms "
                f"| {duration(vectors / cfg.N * seconds)} |"
            )
    print(f"\ndata {size(vectors * 2 * d)}, checkpoint {size(24 * M * d)}, SAE {size(8 * M * d)}")
