"""How the training step grows: N, M and d doubled one at a time, k as well, and a dictionary that
hardly fits.

    python -m bench sizes                       # round N = 1024, d = 640, M = 10240, k = 32
    python -m bench sizes --large 262144 1280   # and one step of so many latents and that width, with its peak memory

The sizes of a row take turns in one process; the first two rounds are not counted. `growth` is the
median time over that of the first row. Peak memory is that of the process (Linux: VmHWM) or of the
GPU.
"""

import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from bench.step import conditions, sync
from cli import check_positive, resolve_device, resolve_dtype
from kernels.update import SparseUpdate
from sae import Sae


@dataclass
class Config:
    N: int = 1024
    """Vectors a step."""

    d: int = 640
    """Their width."""

    M: int = 10_240
    """Latents."""

    k: int = 32
    """Active a vector."""

    rounds: int = 12
    """That are counted."""

    large: tuple[int, int] | None = None
    """M, d: one step on a fresh process's memory instead."""

    dtype: str = "bfloat16"
    """Of the product: bfloat16, float16, float32."""

    device: str = "auto"
    """Auto, cuda, cuda:N, mps, cpu."""


def make(N, d, M, k, device, dtype):
    x = torch.randn(N, d, generator=torch.Generator().manual_seed(0)).to(device)
    update = SparseUpdate(Sae(d, M, k).to(device), variance=float(d), dtype=dtype)
    return lambda: update(x, 1e-4)


def peak_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def main(cfg):
    check_positive(cfg, "N", "d", "M", "k", "rounds")
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    where, versions, commit = conditions(device)
    print(f"{where}; {versions}; commit {commit}; product in {cfg.dtype}\n")
    if cfg.large:
        M, d = cfg.large
        step, times = make(cfg.N, d, M, cfg.k, device, dtype), []
        for _ in range(3):
            start = time.perf_counter()
            step()
            sync(device)
            times.append(time.perf_counter() - start)
        print(
            f"N = {cfg.N}, d = {d}, M = {M}, k = {cfg.k}: {times[-1]:.2f} s a step, peak memory {peak_gb(device):.1f} GB"
        )
        return
    base = dict(N=cfg.N, d=cfg.d, M=cfg.M, k=cfg.k)
    sizes = [base, *({**base, name: 2 * base[name]} for name in base)]
    steps = [make(**size, device=device, dtype=dtype) for size in sizes]
    times = [[] for _ in sizes]
    for number in tqdm(range(2 + cfg.rounds), "rounds"):
        for i, step in enumerate(steps):
            sync(device)
            start = time.perf_counter()
            step()
            sync(device)
            if number > 1:
                times[i].append(1e3 * (time.perf_counter() - start))
    print("      N      d       M    k    ms p50   growth")
    for size, ms in zip(sizes, times):
        growth = statistics.median(a / b for a, b in zip(ms, times[0]))
        print(
            f"{size['N']:7} {size['d']:6} {size['M']:7} {size['k']:4} {statistics.median(ms):9.1f} {growth:8.2f}"
        )
