"""How the training step grows: N, d, M and k doubled one at a time, and a very large dictionary.

    python -m bench sizes                       # around N = 1024, d = 640, M = 10240, k = 32
    python -m bench sizes --large 262144 1280   # M and d of one step, and its peak memory

Claim: doubling N, d or M at most doubles the time, and doubling k adds 11 % (two cores of an AMD
EPYC with AVX512-BF16; docs/benchmarks.md). It takes about ten seconds there.

The sizes take turns in one process. The first two rounds are not counted.

    ms p50    median time of a step
    growth    median of the ratios, round by round, to the first row

With --large the peak memory is that of the process (Linux: VmHWM) or of the GPU.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from bench.step import conditions, sync
from cli import check_positive, resolve_device, resolve_dtype
from kernels.update import SparseUpdate
from sae import Sae

WARMUP_ROUNDS = 2


@dataclass
class Config:
    # data
    N: int = 1024
    """Give each step this many vectors."""

    d: int = 640
    """Give the vectors this width."""

    # model
    M: int = 10_240
    """Give the SAE this many latents."""

    k: int = 32
    """Keep this many latents active per vector."""

    large: tuple[int, int] | None = None
    """Measure one SAE with this M and this d instead, and its peak memory. If not given, the table
    is measured."""

    # measuring
    rounds: int = 12
    """Count this many rounds. More rounds make the medians steadier."""

    # hardware
    dtype: str = "bfloat16"
    """Compute the encoder's product in this precision: bfloat16, float16 or float32."""

    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


def make_step(
    N: int, d: int, M: int, k: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], Any]:
    """Return a function that does one training step on the same N random vectors each time."""
    x = torch.randn(N, d, generator=torch.Generator().manual_seed(0)).to(device)
    update = SparseUpdate(Sae(d, M, k).to(device), variance=float(d), dtype=dtype)
    return lambda: update(x, 1e-4)


def time_step(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one step."""
    sync(device)
    start = time.perf_counter()
    step()
    sync(device)
    return time.perf_counter() - start


def peak_gb(device: torch.device) -> float:
    """Return the most memory, in GB, that this process or its GPU has used until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return peak * unit / 1e9


def main(cfg: Config) -> None:
    """Print the table, or with --large one line."""
    check_positive(cfg, "N", "d", "M", "k", "rounds")
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    print(f"{conditions(device)}; product in {cfg.dtype}\n")
    if cfg.large:
        measure_large(cfg, device, dtype)
    else:
        measure_growth(cfg, device, dtype)


def measure_large(cfg: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Print the third step's time, and the peak memory of all three."""
    M, d = cfg.large
    step = make_step(cfg.N, d, M, cfg.k, device, dtype)
    for _ in range(3):
        seconds = time_step(step, device)
    print(
        f"N = {cfg.N}, d = {d}, M = {M}, k = {cfg.k}: {seconds:.2f} s per step, "
        f"peak memory {peak_gb(device):.1f} GB"
    )


def measure_growth(cfg: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Print the table: the base size, then each number of it doubled."""
    base = {"N": cfg.N, "d": cfg.d, "M": cfg.M, "k": cfg.k}
    sizes = [base]
    for name in base:
        sizes.append({**base, name: 2 * base[name]})
    steps = [make_step(**size, device=device, dtype=dtype) for size in sizes]
    times = time_in_turns(steps, cfg.rounds, device)

    print("      N      d       M    k    ms p50   growth")
    for size, milliseconds in zip(sizes, times):
        median = statistics.median(milliseconds)
        growth = statistics.median(a / b for a, b in zip(milliseconds, times[0]))
        columns = f"{size['N']:7} {size['d']:6} {size['M']:7} {size['k']:4}"
        print(f"{columns} {median:9.1f} {growth:8.2f}")


def time_in_turns(
    steps: list[Callable[[], Any]], rounds: int, device: torch.device
) -> list[list[float]]:
    """Return the milliseconds of each step in each counted round; the steps take turns."""
    times = [[] for _ in steps]
    for number in tqdm(range(WARMUP_ROUNDS + rounds), "rounds"):
        for step, milliseconds in zip(steps, times):
            seconds = time_step(step, device)
            if number >= WARMUP_ROUNDS:
                milliseconds.append(1e3 * seconds)
    return times
