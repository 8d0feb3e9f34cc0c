"""Each kernel alone, against plain PyTorch and against the bytes that it has to move.

    python -m bench kernels                               # N = 1024, d = 640, M = 10240, k = 32
    python -m bench kernels --N 4096 --d 1280 --M 20480   # sizes of Stable Diffusion 1.5

The table of docs/benchmarks.md was measured on two cores of an AMD EPYC. On a GPU these are the
Triton kernels, elsewhere their PyTorch versions. All take turns, in an order that rotates; the
first three rounds are not counted. On a GPU the time lies between two events. The GPU pauses before
the first event, and meanwhile the host launches everything, so the time contains no launching.

    ms p20, p50, p80   percentiles of our time
    plain p50, / ours  the plain expression's median, and the median of the ratios, round by round
    floor MB, ms       the bytes of all numbers that have to be read or written, each once (of W the
                       rows that are used), and their time at the speed of a copy in the same
                       rounds; the copy has 64 MB, on a GPU 256 MB
    GB/s               floor bytes over our median time
    of copy            this speed over the copy's; above 1, a cache held some of the numbers
    plain              what the plain expression does

None of these kernels does more than 4 N k d operations, 2 or 3 per byte, so the bytes are what
limits them.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench.step import WARMUP_ROUNDS, conditions, percentile, rotated, sync, write_csv
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

COPIED = 1 << 24  # float32 of the copy: 64 MB, more than a cache holds
COPIED_ON_GPU = 1 << 26

PAUSE = 2_000_000  # cycles of a GPU, about 1 ms, in which the host launches everything

LEARNING_RATE = 1e-4

# Bytes of a number
FLOAT32 = 4
BFLOAT16 = 2
INT64 = 8


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
    """The kernel."""

    dtype: str
    """Of its input."""

    floor_bytes: int
    """What has to be read and written at the least."""

    ours: Callable[[], Any]
    """Runs our kernel."""

    plain: Callable[[], Any] | None
    """Runs the plain expression; None for the copy."""

    expression: str
    """What the plain expression does."""


# ---- measuring and printing


@torch.no_grad()
def main(cfg: Config) -> None:
    """Print the table. Raises UsageError for an option that can't be used."""
    check_positive(cfg, "N", "d", "M", "k", "rounds")
    device = resolve_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream the events are in
    rows = make_rows(cfg, device)
    times = measure_in_turns(rows, cfg.rounds, device)

    where = conditions(device)
    print(where)
    print(f"N = {cfg.N}, d = {cfg.d}, M = {cfg.M}, k = {cfg.k}; {cfg.rounds} rounds\n")
    print(
        "kernel         dtype      ms p20     p50     p80"
        "  plain p50   / ours  floor MB     ms     GB/s  of copy  plain"
    )
    copy_speed = rows[0].floor_bytes / percentile(times[0]["ours"], 0.5)  # bytes per ms
    csv_rows = []
    for row, of_row in zip(rows, times):
        print_row(row, of_row, copy_speed)
        csv_rows += csv_rows_of(row, of_row, copy_speed, cfg.N)
    if cfg.csv:
        write_csv(cfg.csv, "kernels", csv_rows, where)


def measure_in_turns(
    rows: list[Row], rounds: int, device: torch.device
) -> list[dict[str, list[float]]]:
    """Return {"ours": milliseconds of each counted round, "plain": the same} of each row.

    The copy has no "plain".
    """
    jobs = []
    times = []
    for row in rows:
        times.append({"ours": []})
        jobs.append((row.ours, times[-1]["ours"]))
        if row.plain is not None:
            times[-1]["plain"] = []
            jobs.append((row.plain, times[-1]["plain"]))

    for number in tqdm(range(WARMUP_ROUNDS + rounds), "rounds"):
        for function, milliseconds in rotated(jobs, number):
            ms = measure(function, device)
            if number >= WARMUP_ROUNDS:
                milliseconds.append(ms)
    return times


def measure(function: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds that a function takes on the device."""
    if device.type != "cuda":
        start_time = time.perf_counter()
        function()
        sync(device)
        return 1e3 * (time.perf_counter() - start_time)

    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(PAUSE)
    start.record()
    function()
    end.record()
    sync(device)
    return start.elapsed_time(end)


def print_row(row: Row, times: dict[str, list[float]], copy_speed: float) -> None:
    """Print the line of a row. copy_speed: bytes per millisecond of the copy."""
    p20, p50, p80 = [percentile(times["ours"], fraction) for fraction in (0.2, 0.5, 0.8)]
    plain = " " * 19
    if row.plain is not None:
        plain_p50 = percentile(times["plain"], 0.5)
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["plain"]))
        plain = f"{plain_p50:10.3f} {ratio:8.2f}"
    floor_ms = row.floor_bytes / copy_speed
    speed = row.floor_bytes / p50
    ours = f"{row.name:14} {row.dtype:10} {p20:6.3f} {p50:7.3f} {p80:7.3f}"
    floor = f"{row.floor_bytes / 1e6:9.1f} {floor_ms:6.3f}"
    of_copy = f"{speed / 1e6:8.1f} {speed / copy_speed:8.2f}"
    print(f"{ours} {plain} {floor} {of_copy}  {row.expression}".rstrip())


def csv_rows_of(
    row: Row, times: dict[str, list[float]], copy_speed: float, N: int
) -> list[list[str]]:
    """Return the lines of a row for a CSV file: ours, and if it is not the copy plain and floor."""
    named = {row.name: times["ours"]}
    if row.plain is not None:
        named[f"{row.name}.plain"] = times["plain"]
        named[f"{row.name}.floor"] = [row.floor_bytes / copy_speed]
    lines = []
    for name, milliseconds in named.items():
        percentiles = [percentile(milliseconds, fraction) for fraction in (0.2, 0.5, 0.8)]
        numbers = [f"{ms:.4f}" for ms in percentiles]
        vectors_per_second = f"{1e3 * N / percentiles[1]:.0f}"
        lines.append([name, row.dtype, *numbers, vectors_per_second, ""])
    return lines


# ---- the rows: all on the same random vectors and weights


class Inputs(NamedTuple):
    """What the kernels get: N vectors of width d, M latents, k of them active per vector."""

    x: Tensor
    """(N, d)"""

    W: Tensor
    """(M, d): rows of length 1."""

    b: Tensor
    """(d,)"""

    pre_acts: Tensor
    """(N, M)"""

    top_acts: Tensor
    """(N, k)"""

    top_indices: Tensor
    """(N, k) int64"""

    order: Tensor
    """(N k,) int64: the pairs of vector and active latent, sorted by latent."""

    ends: Tensor
    """(M + 1,) int64: where each latent's pairs begin in `order`."""


def make_inputs(cfg: Config, device: torch.device) -> Inputs:
    """Return random inputs from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((cfg.N, cfg.d), generator=generator).to(device)
    W = torch.randn((cfg.M, cfg.d), generator=generator).to(device)
    pre_acts = torch.randn((cfg.N, cfg.M), generator=generator).to(device)
    top_acts, top_indices = topk(pre_acts, cfg.k)
    order, ends = sort_pairs(top_indices, cfg.M)
    return Inputs(x, F.normalize(W), x.mean(0), pre_acts, top_acts, top_indices, order, ends)


def make_rows(cfg: Config, device: torch.device) -> list[Row]:
    """Return the rows of the table; the copy, with which they are compared, is the first."""
    inputs = make_inputs(cfg, device)
    candidates, _ = topk(inputs.pre_acts, min(4 * cfg.k, cfg.M))
    return [
        copy_row(device),
        topk_row("float32", inputs.pre_acts, cfg.k),
        topk_row("bfloat16", inputs.pre_acts.bfloat16(), cfg.k),
        decode_error_row(inputs),
        gather_sum_row(inputs),
        gather_dot_row(inputs),
        sum_by_latent_row(inputs),
        update_rows_row(inputs),
        squared_norm_row(inputs),
        keep_largest_row("float32", candidates, inputs.top_acts.numel()),
        keep_largest_row("bfloat16", candidates.bfloat16(), inputs.top_acts.numel()),
        sort_pairs_row(inputs),
    ]


def copy_row(device: torch.device) -> Row:
    """Return the row of a large tensor's copy, whose speed is that of the memory."""
    count = COPIED_ON_GPU if device.type == "cuda" else COPIED
    source = torch.zeros(count, device=device)
    target = torch.zeros_like(source)
    floor_bytes = 2 * FLOAT32 * len(source)
    return Row("copy", "float32", floor_bytes, partial(target.copy_, source), None, "")


def topk_row(dtype: str, pre_acts: Tensor, k: int) -> Row:
    """Return the row of `topk`: the k largest of pre_acts (N, M) per vector."""
    size = pre_acts.element_size()
    num_pairs = len(pre_acts) * k
    floor_bytes = size * pre_acts.numel() + (size + INT64) * num_pairs
    ours = partial(topk, pre_acts, k)
    plain = partial(plain_topk, pre_acts, k)
    return Row("topk", dtype, floor_bytes, ours, plain, "relu, topk")


def plain_topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest positive numbers of each row, and their columns, in any order."""
    return F.relu(pre_acts).topk(k, sorted=False)


def bytes_of_pairs(inputs: Inputs) -> int:
    """Return the bytes of x, and of a float32 and an int64 for each pair of vector and latent."""
    return FLOAT32 * inputs.x.numel() + (FLOAT32 + INT64) * inputs.top_acts.numel()


def bytes_of_used_rows(inputs: Inputs) -> int:
    """Return the bytes of those rows of W whose latent is active for some vector."""
    num_used = len(inputs.top_indices.unique())
    return FLOAT32 * inputs.W.shape[1] * num_used


def decode_error_row(inputs: Inputs) -> Row:
    """Return the row of `decode_error`: the error, and its products with the rows that made it."""
    written = FLOAT32 * inputs.x.numel() + FLOAT32 * inputs.top_acts.numel()
    floor_bytes = bytes_of_pairs(inputs) + bytes_of_used_rows(inputs) + written
    arguments = (inputs.x, inputs.top_acts, inputs.top_indices, inputs.W, inputs.b)
    ours = partial(decode_error, *arguments)
    plain = partial(plain_decode_error, *arguments)
    return Row("decode_error", "float32", floor_bytes, ours, plain, "W[top_indices], einsum")


def plain_decode_error(
    x: Tensor, top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `kernels.decode_error` returns: (N, d) and (N, k)."""
    rows = W_dec[top_indices]  # (N, k, d)
    error = torch.einsum("nk,nkd->nd", top_acts, rows) + b_dec - x
    d_acts = torch.einsum("nd,nkd->nk", error, rows) * (top_acts > 0)
    return error, d_acts


def gather_sum_row(inputs: Inputs) -> Row:
    """Return the row of `gather_sum`: active latents' rows, weighted by activations and summed."""
    # the sums (N, d), which are written, have as many bytes as x, which is not read
    floor_bytes = bytes_of_pairs(inputs) + bytes_of_used_rows(inputs)
    arguments = (inputs.top_acts, inputs.top_indices, inputs.W)
    ours = partial(gather_sum, *arguments)
    plain = partial(plain_gather_sum, *arguments)
    return Row("gather_sum", "float32", floor_bytes, ours, plain, "W[top_indices], einsum")


def plain_gather_sum(weights: Tensor, top_indices: Tensor, W: Tensor) -> Tensor:
    """Return what `kernels.decode.gather_sum` returns: (N, d)."""
    return torch.einsum("nk,nkd->nd", weights, W[top_indices])


def gather_dot_row(inputs: Inputs) -> Row:
    """Return the row of `gather_dot`: products of a vector with its active latents' rows."""
    # the products, which are written, have as many bytes as the activations, which are not read
    floor_bytes = bytes_of_pairs(inputs) + bytes_of_used_rows(inputs)
    arguments = (inputs.x, inputs.top_indices, inputs.W)
    ours = partial(gather_dot, *arguments)
    plain = partial(plain_gather_dot, *arguments)
    return Row("gather_dot", "float32", floor_bytes, ours, plain, "W[top_indices], einsum")


def plain_gather_dot(x: Tensor, top_indices: Tensor, W: Tensor) -> Tensor:
    """Return what `kernels.decode.gather_dot` returns: (N, k)."""
    return torch.einsum("nd,nkd->nk", x, W[top_indices])


def sum_by_latent_row(inputs: Inputs) -> Row:
    """Return the row of `sum_by_latent`: the gradients of W and of the biases."""
    M = len(inputs.W)
    written = FLOAT32 * inputs.W.numel() + FLOAT32 * M
    floor_bytes = bytes_of_pairs(inputs) + written
    arguments = (inputs.top_acts, inputs.top_indices, inputs.x, M)
    ours = partial(sum_by_latent, *arguments)
    plain = partial(plain_sum_by_latent, *arguments)
    return Row("sum_by_latent", "float32", floor_bytes, ours, plain, "(N, k, d), index_add_")


def plain_sum_by_latent(
    weights: Tensor, top_indices: Tensor, x: Tensor, M: int
) -> tuple[Tensor, Tensor]:
    """Return what `kernels.sum_by_latent` returns: (M, d) and (M,)."""
    latents = top_indices.flatten()
    products = weights[:, :, None] * x[:, None]  # (N, k, d)
    dW = x.new_zeros(M, x.shape[1]).index_add_(0, latents, products.flatten(0, 1))
    db = x.new_zeros(M).index_add_(0, latents, weights.flatten())
    return dW, db


def make_gradient(inputs: Inputs) -> Gradient:
    """Return the gradient of W as sums over sorted pairs, as a training step has it."""
    k = inputs.top_acts.shape[1]
    weights = inputs.top_acts.flatten()[inputs.order]
    return Gradient(weights, inputs.order // k, inputs.ends, inputs.x)


def update_rows_row(inputs: Inputs) -> Row:
    """Return the row of `update_rows`: a step of Adam on W, whose rows keep length 1."""
    M = len(inputs.W)
    device = inputs.W.device
    # W and both moments are read and written, and the copy is written
    matrices = (6 * FLOAT32 + BFLOAT16) * inputs.W.numel()
    floor_bytes = bytes_of_pairs(inputs) + matrices + (INT64 + FLOAT32) * M  # ends and along

    # gradient[m] . W[m]; a training step has it from decode_error
    dots = inputs.top_acts * gather_dot(inputs.x, inputs.top_indices, inputs.W)
    along = totals(dots.flatten()[inputs.order], inputs.ends)
    W = inputs.W.clone()
    exp_avg = torch.zeros_like(W)
    exp_avg_sq = torch.zeros_like(W)
    copy = W.bfloat16()
    one = torch.ones((), device=device)  # the step, and what the gradient is divided by
    gradient = make_gradient(inputs)
    ours = partial(
        update_rows, W, gradient, exp_avg, exp_avg_sq, one, LEARNING_RATE, one, along, copy
    )

    plain_W = inputs.W.clone()
    is_fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.Adam([plain_W], lr=LEARNING_RATE, fused=is_fused)
    plain = partial(plain_update, plain_W, inputs, optimizer, one, copy)
    expression = "(N, k, d), index_add_, Adam(fused), norm, copy"
    return Row("update_rows", "float32", floor_bytes, ours, plain, expression)


def plain_update(
    W: Tensor, inputs: Inputs, optimizer: torch.optim.Adam, clip: Tensor, copy: Tensor
) -> None:
    """Do what `kernels.update_rows` does to W (M, d) and its copy, with a dense gradient."""
    dW, _ = plain_sum_by_latent(inputs.top_acts, inputs.top_indices, inputs.x, len(W))
    dW /= clip
    W.grad = dW - (dW * W).sum(1, keepdim=True) * W
    optimizer.step()
    W /= W.norm(dim=1, keepdim=True)
    copy.copy_(W)


def squared_norm_row(inputs: Inputs) -> Row:
    """Return the row of `squared_norm`: the square of the norm by which a gradient is clipped."""
    floor_bytes = bytes_of_pairs(inputs) + INT64 * len(inputs.W)  # ends
    ours = partial(squared_norm, make_gradient(inputs))
    plain = partial(plain_squared_norm, inputs)
    return Row("squared_norm", "float32", floor_bytes, ours, plain, "(N, k, d), index_add_, sum")


def plain_squared_norm(inputs: Inputs) -> Tensor:
    """Return what `kernels.squared_norm` returns, ()."""
    M = len(inputs.W)
    dW, _ = plain_sum_by_latent(inputs.top_acts, inputs.top_indices, inputs.x, M)
    return dW.square().sum()


def keep_largest_row(dtype: str, acts: Tensor, count: int) -> Row:
    """Return the row of `keep_largest`: the `count` largest of a whole batch acts (N, 4 k)."""
    floor_bytes = 2 * acts.element_size() * acts.numel()
    ours = partial(keep_largest, acts, count)
    plain = partial(plain_keep_largest, acts, count)
    return Row("keep_largest", dtype, floor_bytes, ours, plain, "topk, scatter")


def plain_keep_largest(acts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what `kernels.keep_largest` returns: acts with zeros (N, K), and the smallest, ()."""
    largest, indices = acts.flatten().topk(count, sorted=False)
    kept = torch.zeros_like(acts).flatten().scatter_(0, indices, largest)
    return kept.view(acts.shape), largest.min()


def sort_pairs_row(inputs: Inputs) -> Row:
    """Return the row of `sort_pairs`: the pairs of vector and active latent, by latent."""
    M = len(inputs.W)
    floor_bytes = 2 * INT64 * inputs.top_indices.numel() + INT64 * M
    ours = partial(sort_pairs, inputs.top_indices, M)
    plain = partial(plain_sort_pairs, inputs.top_indices, M)
    return Row("sort_pairs", "int64", floor_bytes, ours, plain, "argsort, bincount, cumsum")


def plain_sort_pairs(top_indices: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """Return what `kernels.sort_pairs` returns: (N k,) and (M + 1,)."""
    latents = top_indices.flatten()
    order = latents.argsort(stable=True)
    ends = torch.bincount(latents, minlength=M).cumsum(0)
    return order, F.pad(ends, (1, 0))
