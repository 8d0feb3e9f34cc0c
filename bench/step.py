"""The whole training step: ours, the other packages', a plain dense one, and its product alone.

    pip install -r requirements-bench.txt
    python -m bench step
    python -m bench step --N 4096 --d 1280 --M 20480 --csv bench.csv  # Stable Diffusion 1.5

Claim: our step is 4.1 times as fast as eai-sparsify's and 12 times as fast as the dense one (two
cores of an AMD EPYC with AVX512-BF16; docs/benchmarks.md). It takes about two minutes there.

A step is forward, backward, clipping to norm 1 and fused Adam, on the same vectors. Decoder rows
keep length 1 where the package keeps them so. In every round each row takes one step, in an order
that rotates. The first three rounds are not counted. `dense` is autograd through a scatter and a
dense decoder. A package that is not installed is left out.

    product                   dtype of the product of vectors and encoder
    ms p20, p50, p80          percentiles of a step's time
    vectors/s                 N over the median time
    / ours, / gemm            median of the ratios, round by round, to ours and to the product alone
    peak MB                   memory of the GPU; - on a CPU
"""

import csv
import importlib.util
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cli import HERE, check_positive, resolve_device
from errors import UsageError
from kernels.update import SparseUpdate
from sae import Sae

COLUMNS = (
    "bench",
    "name",
    "dtype",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "vectors_per_s",
    "peak_mb",
    "device",
    "versions",
    "commit",
)
PACKAGES = ("torch", "triton", "eai-sparsify", "sae-lens", "dictionary-learning")
WARMUP_ROUNDS = 3

Step = Callable[[], Any]
"""Does one training step, or whatever else is timed."""


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

    # measuring
    rounds: int = 30
    """Count this many rounds. More rounds make the medians steadier."""

    names: tuple[str, ...] = ()
    """Measure only the rows of these names. If not given, all rows are measured."""

    # output
    csv: str | None = None
    """Append the rows to this CSV file. If not given, they are only printed."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


# ---- what every benchmark prints and uses


class Conditions(NamedTuple):
    """What a number depends on besides the command."""

    device: str
    """Name of the GPU, or of the CPU with its number of threads."""

    versions: str
    """`torch 2.13.0 triton 3.8.0`: the packages that are installed."""

    commit: str
    """Short hash of the checkout; "unknown" outside of one."""

    def __str__(self) -> str:
        return f"{self.device}; {self.versions}; commit {self.commit}"


def conditions(device: torch.device) -> Conditions:
    """Return the device, the installed packages and the commit."""
    installed = []
    for name in PACKAGES:
        try:
            installed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    commit = git.stdout.strip() or "unknown"
    return Conditions(describe_device(device), " ".join(installed), commit)


def describe_device(device: torch.device) -> str:
    """Return the GPU's name, or something like `AMD EPYC, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return "CPU"
    name = "CPU"
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(": ")[1]
            break
    return f"{name}, {torch.get_num_threads()} threads"


def sync(device: torch.device) -> None:
    """Wait until a GPU has done its work, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the value below which this fraction lies: for [1, 2, 3, 4] and 0.5 it gives 3."""
    index = min(len(values) - 1, int(fraction * len(values)))
    return sorted(values)[index]


def write_csv(path: str, bench: str, rows: list[list[str]], conditions: Conditions) -> None:
    """Append rows to a CSV file; a new file gets a line with the names of the columns."""
    is_new = not Path(path).exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([bench, *row, *conditions])


# ---- the rows: each function returns the step that is timed


def ours(
    cfg: Config,
    device: torch.device,
    x: Tensor,
    dtype: torch.dtype | None,
    graph: bool = False,
) -> Step:
    """Return our step, with the product in `dtype` (None: float32).

    graph: run it as one CUDA graph.
    """
    sae = start_weights(cfg, device)
    update = SparseUpdate(sae, variance=float(cfg.d), dtype=dtype, graph=graph)
    return lambda: update(x, 1e-4)


def eai_sparsify(cfg: Config, device: torch.device, x: Tensor) -> Step:
    """Return the step of EleutherAI's sparsify, as its Trainer does it."""
    if device.type != "cuda":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # or it asks for a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=cfg.M, k=cfg.k)
    sae = SparseCoder(cfg.d, config, device=device, dtype=torch.float32)
    params, optimizer = make_adam(sae)

    def step() -> None:
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        clip_and_step(params, optimizer)
        sae.set_decoder_norm_to_unit_norm()

    return step


def sae_lens(cfg: Config, device: torch.device, x: Tensor) -> Step:
    """Return the step of SAELens's TopK SAE."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(
        d_in=cfg.d, d_sae=cfg.M, k=cfg.k, device=str(device), dtype="float32"
    )
    sae = TopKTrainingSAE(config)
    params, optimizer = make_adam(sae)

    def step() -> None:
        batch = TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
        sae.training_forward_pass(batch).loss.backward()
        clip_and_step(params, optimizer)

    return step


def dictionary_learning(cfg: Config, device: torch.device, x: Tensor) -> Step:
    """Return the step of dictionary_learning's TopKTrainer, with fused Adam and a constant rate."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    endless = 10**9  # steps of the schedule that is replaced below
    trainer = TopKTrainer(
        endless, cfg.d, cfg.M, cfg.k, layer=0, lm_name="", device=str(device), lr=1e-4
    )
    trainer.optimizer = torch.optim.Adam(
        trainer.ae.parameters(), lr=1e-4, betas=(0.9, 0.999), fused=True
    )
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)
    return lambda: trainer.update(1, x)


def dense(cfg: Config, device: torch.device, x: Tensor) -> Step:
    """Return the step that one would write in plain PyTorch: all gradients are dense."""
    sae = start_weights(cfg, device)
    params, optimizer = make_adam(sae)

    def step() -> None:
        pre_acts = F.relu(F.linear(x - sae.b_dec, sae.encoder.weight, sae.encoder.bias))
        top_acts, top_indices = pre_acts.topk(cfg.k, sorted=False)
        codes = torch.zeros_like(pre_acts).scatter(1, top_indices, top_acts)
        error = codes @ sae.W_dec + sae.b_dec - x
        loss = error.square().sum() / (len(x) * cfg.d)
        loss.backward()
        remove_parallel_gradient(sae.W_dec)
        clip_and_step(params, optimizer)
        normalize_rows(sae.W_dec)

    return step


def gemm(cfg: Config, device: torch.device, x: Tensor, dtype: torch.dtype) -> Step:
    """Return a step of the encoder's product alone, x W^T + b: a lower bound for all others."""
    W = torch.randn(cfg.M, cfg.d, device=device).to(dtype)
    b = torch.zeros(cfg.M, device=device, dtype=dtype)
    x = x.to(dtype)
    out = torch.empty(len(x), cfg.M, dtype=dtype, device=device)
    return lambda: torch.addmm(b, x, W.T, out=out)


def start_weights(cfg: Config, device: torch.device) -> Sae:
    """Return an SAE with the weights at which training begins, float32."""
    return Sae(cfg.d, cfg.M, cfg.k).to(device)


def make_adam(sae: torch.nn.Module) -> tuple[list[torch.nn.Parameter], torch.optim.Adam]:
    """Return a module's parameters and a fused Adam for them."""
    params = list(sae.parameters())
    return params, torch.optim.Adam(params, lr=1e-4, fused=True)


def clip_and_step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradients to norm 1, update the parameters, and drop the gradients."""
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def remove_parallel_gradient(W: Tensor) -> None:
    """Take from each row's gradient what lies along the row: normalizing would undo it anyway."""
    W.grad.sub_((W.grad * W).sum(1, keepdim=True) * W)


@torch.no_grad()
def normalize_rows(W: Tensor) -> None:
    """Divide each row by its length, in place."""
    W.div_(W.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny))


class Row(NamedTuple):
    """One row of the table."""

    package: str | None
    """The module that it needs; None if it needs only this project."""

    dtype: str
    """The dtype of the product."""

    make: Callable[[Config, torch.device, Tensor], Step]
    """Returns the step on vectors x (N, d) on the device."""


ROWS = {
    "ours": Row(None, "bfloat16", partial(ours, dtype=torch.bfloat16)),
    "ours_graph": Row(None, "bfloat16", partial(ours, dtype=torch.bfloat16, graph=True)),
    "ours_fp32": Row(None, "float32", partial(ours, dtype=None)),
    "eai-sparsify": Row("sparsify", "float32", eai_sparsify),
    "sae-lens": Row("sae_lens", "float32", sae_lens),
    "dictionary_learning": Row("dictionary_learning", "float32", dictionary_learning),
    "dense": Row(None, "float32", dense),
    "gemm": Row(None, "bfloat16", partial(gemm, dtype=torch.bfloat16)),
    "gemm_fp32": Row(None, "float32", partial(gemm, dtype=torch.float32)),
}


# ---- measuring and printing


def main(cfg: Config) -> None:
    """Print the table. Raises UsageError for an option that can't be used."""
    check_positive(cfg, "N", "d", "M", "k", "rounds")
    for name in cfg.names:
        if name not in ROWS:
            raise UsageError(f"--names {name}: expected some of {', '.join(ROWS)}")
    device = resolve_device(cfg.device)
    names, missing = choose_rows(cfg.names, device)
    x = torch.randn(cfg.N, cfg.d, generator=torch.Generator().manual_seed(0)).to(device)
    steps = {name: ROWS[name].make(cfg, device, x) for name in names}
    times, peaks = measure(steps, cfg.rounds, device)

    where = conditions(device)
    print(where)
    print(f"N = {cfg.N}, d = {cfg.d}, M = {cfg.M}, k = {cfg.k}; {cfg.rounds} rounds\n")
    print(
        "name                 product      ms p20     p50     p80    vectors/s"
        "   / ours   / gemm   peak MB"
    )
    rows = [print_row(name, times, peaks[name], cfg.N) for name in names]
    if missing:
        print(f"\nnot installed: {', '.join(missing)}; pip install -r requirements-bench.txt")
    if cfg.csv:
        write_csv(cfg.csv, "step", rows, where)


def choose_rows(wanted: Sequence[str], device: torch.device) -> tuple[list[str], list[str]]:
    """Return the rows to measure, and those whose package is not installed.

    wanted: names; () wants all. A CUDA graph needs CUDA.
    """
    names = []
    missing = []
    for name, row in ROWS.items():
        if wanted and name not in wanted:
            continue
        if name == "ours_graph" and device.type != "cuda":
            continue
        if row.package is not None and importlib.util.find_spec(row.package) is None:
            missing.append(name)
            continue
        names.append(name)
    return names, missing


def rotated(names: list[Any], turn: int) -> list[Any]:
    """Return the list with another beginning each turn: ["a", "b"] and 1 give ["b", "a"]."""
    start = turn % len(names)
    return names[start:] + names[:start]


def measure(
    steps: dict[str, Step], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return {name: milliseconds of each counted round} and {name: peak memory in MB}.

    The memory is that of a GPU; on a CPU it is 0.
    """
    times = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0.0)
    for number in tqdm(range(WARMUP_ROUNDS + rounds), "rounds"):
        for name in rotated(list(steps), number):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            sync(device)
            start = time.perf_counter()
            steps[name]()
            sync(device)
            milliseconds = 1e3 * (time.perf_counter() - start)
            if number >= WARMUP_ROUNDS:
                times[name].append(milliseconds)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device) / 2**20
                peaks[name] = max(peaks[name], peak)
    return times, peaks


def print_row(name: str, times: dict[str, list[float]], peak_mb: float, N: int) -> list[str]:
    """Print the line of a row; return what a CSV file gets of it.

    times: milliseconds of each round of all rows. peak_mb: memory of the GPU, 0 on a CPU.
    """
    dtype = ROWS[name].dtype
    p20, p50, p80 = [percentile(times[name], fraction) for fraction in (0.2, 0.5, 0.8)]
    speed = 1e3 * N / p50  # vectors per second
    to_ours = median_ratio(times, name, "ours")
    to_gemm = median_ratio(times, name, "gemm")
    peak = f"{peak_mb:.0f}" if peak_mb else "-"
    print(
        f"{name:20} {dtype:10} {p20:8.1f} {p50:7.1f} {p80:7.1f} {speed:12,.0f} "
        f"{to_ours:8.2f} {to_gemm:8.2f} {peak:>9}"
    )
    milliseconds = [f"{p20:.3f}", f"{p50:.3f}", f"{p80:.3f}"]
    return [name, dtype, *milliseconds, f"{speed:.0f}", f"{peak_mb:.0f}"]


def median_ratio(times: dict[str, list[float]], name: str, other: str) -> float:
    """Return the median over the rounds of a row's time over another's; NaN without the other."""
    if other not in times:
        return float("nan")
    return statistics.median(a / b for a, b in zip(times[name], times[other]))
