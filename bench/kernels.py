"""Each kernel alone, against plain PyTorch and against the bytes that it cannot do without.

    python -m bench kernels                                  # N = 1024, d = 640, M = 10240, k = 32
    python -m bench kernels --N 4096 --d 1280 --M 20480      # of Stable Diffusion 1.5

The table of docs/benchmarks.md was measured on two cores of an AMD EPYC. On a GPU these are the
Triton kernels, elsewhere their PyTorch versions. All take turns, in an order that rotates; the
first three rounds are not counted. On a GPU a time lies between two events, behind a pause in which
the host gets ahead, so that it holds no launching.

    ms p20, p50, p80   percentiles of our time
    plain p50, / ours  the plain expression's median, and the median of the ratios, round by round
    floor MB, ms       every number that has to be read or written, once (of W the rows that are
                       used), and its time at the speed of a copy in the same rounds; the copy has
                       64 MB, on a GPU 256 MB
    GB/s               floor bytes over our median time
    of copy            this speed over the copy's; above 1, a cache held part of the numbers
    plain              what the plain expression does

None of these kernels does more than 4 N k d operations, 2 or 3 per byte, so the bytes are what
limits them.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from bench.step import conditions, percentile, sync, write_csv
from cli import check_positive, resolve_device
from kernels import (
    Gradient,
    decode_error,
    keep_largest,
    sort_pairs,
    squared_norm,
    sum_by_latent,
    topk,
    totals,
    update_rows,
)
from kernels.decode import gather_dot, gather_sum


@dataclass
class Config:
    # data
    N: int = 1024
    """Give the kernels this many vectors."""

    d: int = 640
    """Give the vectors this width."""

    # model
    M: int = 10_240
    """Give the SAE this many latents."""

    k: int = 32
    """Keep this many latents active per vector. keep_largest chooses among four times as many."""

    # measuring
    rounds: int = 30
    """Count this many rounds. More rounds make the medians steadier."""

    # output
    csv: str | None = None
    """Append the rows to this CSV file. If not given, they are only printed."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


class Row(NamedTuple):
    """One row of the table."""

    name: str
    dtype: str
    bytes: int
    """What has to be read and written at the least."""

    ours: Callable
    """Runs our kernel."""

    plain: Callable | None = None
    """Runs the plain expression; None for the copy."""

    words: str = ""
    """What the plain expression does."""


def plain_decode_error(x, top_acts, top_indices, W_dec, b_dec):
    rows = W_dec[top_indices]  # (N, k, d)
    e = torch.einsum("nk,nkd->nd", top_acts, rows) + b_dec - x
    return e, torch.einsum("nd,nkd->nk", e, rows) * (top_acts > 0)


def plain_sum_by_latent(weights, top_indices, x, M):
    latents, products = top_indices.flatten(), weights[:, :, None] * x[:, None]  # (N, k, d)
    dW = x.new_zeros(M, x.shape[1]).index_add_(0, latents, products.flatten(0, 1))
    return dW, x.new_zeros(M).index_add_(0, latents, weights.flatten())


def plain_update(W, dW, optimizer, clip, copy):
    dW /= clip
    W.grad = dW - (dW * W).sum(1, keepdim=True) * W
    optimizer.step()
    W /= W.norm(dim=1, keepdim=True)
    copy.copy_(W)


def plain_keep_largest(acts, count):
    values, places = acts.flatten().topk(count, sorted=False)
    return torch.zeros_like(acts).flatten().scatter_(0, places, values).view(
        acts.shape
    ), values.min()


def plain_sort_pairs(top_indices, M):
    latents = top_indices.flatten()
    return latents.argsort(stable=True), F.pad(
        torch.bincount(latents, minlength=M).cumsum(0), (1, 0)
    )


def make_rows(cfg: Config, device: torch.device) -> list[Row]:
    """Return the rows of the table, all on the same random vectors and weights."""
    N, d, M, k = cfg.N, cfg.d, cfg.M, cfg.k
    g = torch.Generator().manual_seed(0)
    x, W, pre_acts = (
        torch.randn(shape, generator=g).to(device) for shape in ((N, d), (M, d), (N, M))
    )
    W, b = F.normalize(W), x.mean(0)
    acts, indices = topk(pre_acts, k)
    many, _ = topk(pre_acts, min(4 * k, M))
    halves, few = pre_acts.bfloat16(), many.bfloat16()
    order, ends = sort_pairs(indices, M)
    gradient = Gradient(acts.flatten()[order], order // k, ends, x)
    along = totals(
        (acts * gather_dot(x, indices, W)).flatten()[order], ends
    )  # a step has it from decode_error
    mine, theirs, copy = W.clone(), W.clone(), W.bfloat16()
    moments, one = (torch.zeros_like(W), torch.zeros_like(W)), torch.ones((), device=device)
    optimizer = torch.optim.Adam([theirs], lr=1e-4, fused=device.type in ("cuda", "cpu"))
    source = torch.zeros(1 << (26 if device.type == "cuda" else 24), device=device)
    target = torch.zeros_like(source)

    pairs, vectors, matrix, used = N * k, 4 * N * d, 4 * M * d, 4 * d * len(indices.unique())
    read = vectors + 12 * pairs  # x, and a float32 and an int64 a pair
    made = lambda: plain_sum_by_latent(acts, indices, x, M)[0]
    index_add, einsum = "(N, k, d), index_add_", "W[top_indices], einsum"
    sums = lambda: torch.einsum("nk,nkd->nd", acts, W[indices])
    dots = lambda: torch.einsum("nd,nkd->nk", x, W[indices])
    relu_topk = lambda t: F.relu(t).topk(k, sorted=False)
    adam = lambda: plain_update(theirs, made(), optimizer, one, copy)
    fused = lambda: update_rows(mine, gradient, *moments, one, 1e-4, one, along, copy)
    single, half = "float32", "bfloat16"
    return [
        Row("copy", single, 8 * len(source), lambda: target.copy_(source)),
        Row(
            "topk",
            single,
            4 * N * M + 12 * pairs,
            lambda: topk(pre_acts, k),
            lambda: relu_topk(pre_acts),
            "relu, topk",
        ),
        Row(
            "topk",
            half,
            2 * N * M + 10 * pairs,
            lambda: topk(halves, k),
            lambda: relu_topk(halves),
            "relu, topk",
        ),
        Row(
            "decode_error",
            single,
            read + vectors + used + 4 * pairs,
            lambda: decode_error(x, acts, indices, W, b),
            lambda: plain_decode_error(x, acts, indices, W, b),
            einsum,
        ),
        Row("gather_sum", single, read + used, lambda: gather_sum(acts, indices, W), sums, einsum),
        Row("gather_dot", single, read + used, lambda: gather_dot(x, indices, W), dots, einsum),
        Row(
            "sum_by_latent",
            single,
            read + matrix + 4 * M,
            lambda: sum_by_latent(acts, indices, x, M),
            lambda: plain_sum_by_latent(acts, indices, x, M),
            index_add,
        ),
        Row(
            "update_rows",
            single,
            read + 6 * matrix + matrix // 2 + 12 * M,
            fused,
            adam,
            index_add + ", Adam(fused), norm, copy",
        ),
        Row(
            "squared_norm",
            single,
            read + 12 * M,
            lambda: squared_norm(gradient),
            lambda: made().square().sum(),
            index_add + ", sum",
        ),
        Row(
            "keep_largest",
            single,
            8 * many.numel(),
            lambda: keep_largest(many, pairs),
            lambda: plain_keep_largest(many, pairs),
            "topk, scatter",
        ),
        Row(
            "keep_largest",
            half,
            4 * many.numel(),
            lambda: keep_largest(few, pairs),
            lambda: plain_keep_largest(few, pairs),
            "topk, scatter",
        ),
        Row(
            "sort_pairs",
            "int64",
            16 * pairs + 8 * M,
            lambda: sort_pairs(indices, M),
            lambda: plain_sort_pairs(indices, M),
            "argsort, bincount, cumsum",
        ),
    ]


def measure(function: Callable, device: torch.device) -> float:
    """Return the milliseconds that a function takes on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        sync(device)
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # cycles, about 1 ms, in which the host launches all
    start.record()
    function()
    end.record()
    sync(device)
    return start.elapsed_time(end)


@torch.no_grad()
def main(cfg: Config) -> None:
    check_positive(cfg, "N", "d", "M", "k", "rounds")
    device = resolve_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream the events are in
    rows = make_rows(cfg, device)
    jobs = [
        (i, which)
        for i, row in enumerate(rows)
        for which in ("ours", "plain")
        if getattr(row, which)
    ]
    times = {job: [] for job in jobs}
    for number in tqdm(range(3 + cfg.rounds), "rounds"):
        turn = number % len(jobs)
        for i, which in jobs[turn:] + jobs[:turn]:
            ms = measure(getattr(rows[i], which), device)
            if number >= 3:
                times[i, which].append(ms)

    where, versions, commit = conditions(device)
    print(
        f"{where}; {versions}; commit {commit}\n"
        f"N = {cfg.N}, d = {cfg.d}, M = {cfg.M}, k = {cfg.k}; {cfg.rounds} rounds\n"
    )
    print(
        "kernel         dtype      ms p20     p50     p80"
        "  plain p50   / ours  floor MB     ms     GB/s  of copy  plain"
    )
    speed = rows[0].bytes / percentile(times[0, "ours"], 0.5)  # of the copy, bytes a ms
    written = []

    def add(name, dtype, *ms):
        found = [percentile(ms, share) for share in (0.2, 0.5, 0.8)]
        written.append(
            [name, dtype, *(f"{each:.4f}" for each in found), f"{1e3 * cfg.N / found[1]:.0f}", ""]
        )
        return found

    for i, row in enumerate(rows):
        p20, p50, p80 = add(row.name, row.dtype, *times[i, "ours"])
        floor, rate, plain = row.bytes / speed, row.bytes / p50, " " * 19
        if row.plain:
            _, middle, _ = add(f"{row.name}.plain", row.dtype, *times[i, "plain"])
            ratio = statistics.median(b / a for a, b in zip(times[i, "ours"], times[i, "plain"]))
            plain = f"{middle:10.3f} {ratio:8.2f}"
            add(f"{row.name}.floor", row.dtype, floor)
        line = f"{row.name:14} {row.dtype:10} {p20:6.3f} {p50:7.3f} {p80:7.3f} {plain}"
        print(
            f"{line} {row.bytes / 1e6:9.1f} {floor:6.3f} {rate / 1e6:8.1f} "
            f"{rate / speed:8.2f}  {row.words}".rstrip()
        )
    if cfg.csv:
        write_csv(cfg.csv, "kernels", written, (where, versions, commit))
