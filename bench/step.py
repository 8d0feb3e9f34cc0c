"""The whole training step: ours, each installed peer's, the plain dense one, and the encoder
product alone.

    pip install -r requirements-bench.txt
    python -m bench step                                    # N = 1024, d = 640, M = 10240, k = 32
    python -m bench step --N 4096 --d 1280 --M 20480 --csv bench.csv     # Stable Diffusion 1.5, up_blocks.1.attentions.1

A step is forward, backward, clipping to norm 1 and fused Adam, from the same weights on the same
vectors; with unit decoder rows where the package keeps them. One of each in every round, in an
order that turns; the first three rounds are not counted. Times are medians, `ratio` the median of
the paired ratios to `ours`. `dense` is autograd through scatter and a dense decoder.
"""

import csv
import importlib.util
import os
import statistics
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import HERE, check_positive, resolve_device
from errors import UsageError
from kernels.update import SparseUpdate
from sae import Sae

COLUMNS = (
    "bench,name,dtype,ms_p20,ms_p50,ms_p80,vectors_per_s,peak_mb,device,versions,commit".split(",")
)


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

    rounds: int = 30
    """That are counted."""

    names: tuple[str, ...] = ()
    """Rows to measure (none: all)."""

    csv: str | None = None
    """A file to append the rows to."""

    device: str = "auto"
    """Auto, cuda, cuda:N, mps, cpu."""


def finish(params, loss, optimizer, between=lambda: None, after=lambda: None):
    """Backward, clip, Adam."""
    loss.backward()
    between()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    after()


def start_weights(cfg, device):
    return Sae(cfg.d, cfg.M, cfg.k).to(device)


def ours(cfg, device, x, dtype, graph=False):
    update = SparseUpdate(
        start_weights(cfg, device), variance=float(cfg.d), dtype=dtype, graph=graph
    )
    return lambda: update(x, 1e-4)


def dense(cfg, device, x):
    sae = start_weights(cfg, device)
    params = list(sae.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)

    def step():
        pre_acts = F.relu(F.linear(x - sae.b_dec, sae.encoder.weight, sae.encoder.bias))
        top_acts, top_indices = pre_acts.topk(cfg.k, sorted=False)
        codes = torch.zeros_like(pre_acts).scatter(1, top_indices, top_acts)
        loss = (codes @ sae.W_dec + sae.b_dec - x).square().sum() / (len(x) * cfg.d)
        finish(
            params,
            loss,
            optimizer,
            lambda: remove_parallel_gradient(sae.W_dec),
            lambda: normalize_rows(sae.W_dec),
        )

    return step


@torch.no_grad()
def remove_parallel_gradient(W):
    """Take from each row's gradient what lies along the row: normalising would undo it anyway."""
    W.grad.sub_((W.grad * W).sum(1, keepdim=True) * W)


@torch.no_grad()
def normalize_rows(W):
    W.div_(W.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny))


def eai_sparsify(cfg, device, x):
    if device.type != "cuda":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # or it asks for a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(
        cfg.d, SparseCoderConfig(num_latents=cfg.M, k=cfg.k), device=device, dtype=torch.float32
    )
    params = list(sae.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)
    step = lambda: finish(
        params,
        sae(x).fvu,
        optimizer,
        sae.remove_gradient_parallel_to_decoder_directions,
        sae.set_decoder_norm_to_unit_norm,
    )
    return step


def sae_lens(cfg, device, x):
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=cfg.d, d_sae=cfg.M, k=cfg.k, device=str(device), dtype="float32")
    )
    params = list(sae.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)
    given = dict(coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
    return lambda: finish(
        params, sae.training_forward_pass(TrainStepInput(sae_in=x, **given)).loss, optimizer
    )


def dictionary_learning(cfg, device, x):
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        10**9, cfg.d, cfg.M, cfg.k, layer=0, lm_name="", device=str(device), lr=1e-4
    )
    trainer.optimizer = torch.optim.Adam(
        trainer.ae.parameters(), lr=1e-4, betas=(0.9, 0.999), fused=True
    )
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)
    return lambda: trainer.update(1, x)


def gemm(cfg, device, x, dtype):
    W, b, x = (
        torch.randn(cfg.M, cfg.d, device=device).to(dtype),
        torch.zeros(cfg.M, device=device, dtype=dtype),
        x.to(dtype),
    )
    out = torch.empty(len(x), cfg.M, dtype=dtype, device=device)
    return lambda: torch.addmm(b, x, W.T, out=out)


# name: (package that it needs, dtype of the product, what makes the step)
ROWS = {
    "ours": (None, "bfloat16", lambda *args: ours(*args, torch.bfloat16)),
    "ours_graph": (None, "bfloat16", lambda *args: ours(*args, torch.bfloat16, graph=True)),
    "ours_fp32": (None, "float32", lambda *args: ours(*args, None)),
    "eai-sparsify": ("sparsify", "float32", eai_sparsify),
    "sae-lens": ("sae_lens", "float32", sae_lens),
    "dictionary_learning": ("dictionary_learning", "float32", dictionary_learning),
    "dense": (None, "float32", dense),
    "gemm": (None, "bfloat16", lambda *args: gemm(*args, torch.bfloat16)),
    "gemm_fp32": (None, "float32", lambda *args: gemm(*args, torch.float32)),
}
PACKAGES = ("torch", "triton", "eai-sparsify", "sae-lens", "dictionary-learning")


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def conditions(device):
    """(device, versions, commit), as strings."""
    where = "CPU"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        where = next(
            (line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU"
        )
        where += f", {torch.get_num_threads()} threads"
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return where, " ".join(f"{n} {v}" for n, v in found.items()), git.stdout.strip() or "unknown"


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def write_csv(path, bench, rows, conditions):
    new = not Path(path).exists()
    with open(path, "a", newline="") as f:
        writer = csv.writer(f)
        if new:
            writer.writerow(COLUMNS)
        writer.writerows([bench, *row, *conditions] for row in rows)


def main(cfg):
    check_positive(cfg, "N", "d", "M", "k", "rounds")
    if wrong := set(cfg.names) - set(ROWS):
        raise UsageError(f"--names {wrong.pop()}: expected {', '.join(ROWS)}")
    device = resolve_device(cfg.device)
    x = torch.randn(cfg.N, cfg.d, generator=torch.Generator().manual_seed(0)).to(device)
    steps, missing = {}, []
    for name, (package, _, make) in ROWS.items():
        if cfg.names and name not in cfg.names or name == "ours_graph" and device.type != "cuda":
            continue
        if package and importlib.util.find_spec(package) is None:
            missing.append(name)
            continue
        steps[name] = make(cfg, device, x)
    times, peaks = {name: [] for name in steps}, dict.fromkeys(steps, 0.0)
    for number in tqdm(range(3 + cfg.rounds), "rounds"):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            sync(device)
            start = time.perf_counter()
            steps[name]()
            sync(device)
            if number >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
            if device.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) / 2**20)

    where, versions, commit = conditions(device)
    print(
        f"{where}; {versions}; commit {commit}\nN = {cfg.N}, d = {cfg.d}, M = {cfg.M}, k = {cfg.k}; {cfg.rounds} rounds\n"
    )
    print(
        "name                 product      ms p20     p50     p80    vectors/s   / ours   / gemm   peak MB"
    )
    rows = []
    against = lambda name, other: (
        statistics.median(a / b for a, b in zip(times[name], times[other]))
        if other in times
        else float("nan")
    )
    for name, ms in times.items():
        p20, p50, p80 = (percentile(ms, share) for share in (0.2, 0.5, 0.8))
        dtype, speed = ROWS[name][1], 1e3 * cfg.N / p50
        peak = f"{peaks[name]:9.0f}" if device.type == "cuda" else "        -"
        ratios = f"{against(name, 'ours'):8.2f} {against(name, 'gemm'):8.2f}"
        print(
            f"{name:20} {dtype:10} {p20:8.1f} {p50:7.1f} {p80:7.1f} {speed:12,.0f} {ratios} {peak}"
        )
        rows.append(
            [
                name,
                dtype,
                f"{p20:.3f}",
                f"{p50:.3f}",
                f"{p80:.3f}",
                f"{speed:.0f}",
                f"{peaks[name]:.0f}",
            ]
        )
    if missing:
        print(f"\nnot installed: {', '.join(missing)}; pip install -r requirements-bench.txt")
    if cfg.csv:
        write_csv(cfg.csv, "step", rows, (where, versions, commit))
