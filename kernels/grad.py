"""sum_by_latent: the gradient of a weight matrix of which each vector touched only k rows.

    dW[m] = sum of weights[n, j] x[n] over the pairs (n, j) with top_indices[n, j] = m     (M, d)
    db[m] = sum of weights[n, j]      over the same pairs                                  (M,)

With weights = top_acts and x = grad of x_hat, this is the gradient of W_dec. With weights = grad of
top_acts and x = x - b_dec, it is that of W_enc and b_enc. The dense equivalent, whose S is zero but
for 0.3 % of its numbers (at M = 10240, k = 32):

    S  = torch.zeros(N, M).scatter_add(1, top_indices, weights)
    dW, db = S.T @ x, S.sum(0)

The N k pairs are sorted by latent. Then one program (in torch: one bag) sums each latent's row, in
the order of the vectors. Nothing is written twice, so there are no atomics, and the same input
gives the same bits.

The page has, in this order: sorting pairs; counting them; `Gradient`, a gradient that is not made
yet; the kernels; the launchers and their torch twins; the public functions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch twins do the work
    triton = gather_row = None

MAX_WIDTH = 4096  # of a row that a program keeps in registers; wider rows go through torch

# Rows of a gradient that are made at once: 3 MB at d = 640. They stay in the cache and come from
# the allocator's own store. The whole matrix, 26 MB, would come from the system, which costs 5 ms
# where making it takes 1.
BLOCK = 1024
MAX_STORED = 1 << 27  # numbers of a gradient that is stored, 0.5 GB; a larger one is made twice


def warps_for(BLOCK_D: int) -> int:
    """Return the number of warps of a program that keeps a row of BLOCK_D numbers."""
    return 8 if BLOCK_D > 512 else 4


def sort_pairs(top_indices: Tensor, num_latents: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs of top_indices (N, k) by latent; those of one latent stay in their order.

    Returns `order` (N k,) int64, the numbers of the pairs, counted row by row, and `ends` (M + 1,)
    int64: the pairs of latent m are order[ends[m] : ends[m + 1]]. An index of M or more belongs to
    no latent; its pairs come last.

    >>> sort_pairs(torch.tensor([[2, 0], [0, 3]]), num_latents=3)
    (tensor([1, 2, 0, 3]), tensor([0, 2, 2, 3]))
    """
    latents, order = torch.sort(top_indices.flatten(), stable=True)
    if latents.device.type == "cpu":
        return order, count_ends(latents, num_latents)
    return order, search_ends(latents, num_latents)


def search_ends(latents: Tensor, num_latents: int) -> Tensor:
    """Return where each latent's pairs begin in the sorted latents (P,): (M + 1,)."""
    every = torch.arange(num_latents + 1, device=latents.device, dtype=latents.dtype)
    return torch.searchsorted(latents, every)


def count_ends(latents: Tensor, num_latents: int) -> Tensor:
    """Return what `search_ends` does, by counting. On a CPU this takes 0.04 ms where searching
    takes 0.4; the host would have to wait for a GPU."""
    counts = torch.bincount(latents, minlength=num_latents)[:num_latents]
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def count_active(top_acts: Tensor, top_indices: Tensor, num_latents: int) -> Tensor:
    """Count on how many vectors each latent is active: (N, K), (N, K) -> (M,) int64.

    A zero activation is never active.
    """
    # zeros are counted in one more bin, which is thrown away
    active = torch.where(top_acts > 0, top_indices, num_latents).flatten()
    counts = active.new_zeros(num_latents + 1)  # bincount would make the host wait for a GPU
    return counts.scatter_add_(0, active, torch.ones_like(active))[:num_latents]


def sum_bags(weights: Tensor, vectors: Tensor, ends: Tensor, x: Tensor) -> Tensor:
    """Return for each m the sum of weights[p] x[vectors[p]] over ends[m] <= p < ends[m + 1].

    weights (P,), vectors (P,) int64, ends (M + 1,) from 0 to P, x (N, d) -> (M, d). It is computed
    in torch.
    """
    return F.embedding_bag(
        vectors, x, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


class Gradient(NamedTuple):
    """The gradient of a weight matrix (M, d), as sums over P pairs that are sorted by latent.

    gradient[m] = sum of weights[p] x[vectors[p]] over ends[m] <= p < ends[m + 1]
                  + dense[i] where rows[i] = m
    """

    weights: Tensor
    """(P,)"""

    vectors: Tensor
    """(P,) int64: the row of x that belongs to the pair"""

    ends: Tensor
    """(M + 1,) int64, from `sort_pairs`"""

    x: Tensor
    """(N, d)"""

    rows: Tensor | None = None
    """(C,) int64, rising: the rows that `dense` is added to; M or more is padding"""

    dense: Tensor | None = None
    """(C, d)"""

    stored: Tensor | None = None
    """(M, d): the matrix itself, once `store` has made it"""

    norm: Tensor | None = None
    """(): the square of its norm, if it is stored"""

    def store(self, out: Tensor | None) -> "Gradient":
        """Return the same gradient, with its matrix made in the memory `out` (M, d).

        If `out` is None it stays unmade, and `block` makes its rows whenever it is asked.
        """
        if out is None:
            return self
        norm = 0.0
        for start in range(0, len(out), BLOCK):
            rows = self.block(start, min(start + BLOCK, len(out)))
            norm = norm + torch.linalg.vector_norm(rows).square()  # while they are in the cache
            out[start : start + BLOCK] = rows
        return self._replace(stored=out, norm=norm)

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows start to stop of the matrix: (stop - start, d)."""
        if self.stored is not None:
            return self.stored[start:stop]

        ends = self.ends[start : stop + 1]
        first, last = int(ends[0]), int(ends[-1])  # pairs
        out = sum_bags(self.weights[first:last], self.vectors[first:last], ends - first, self.x)
        if self.rows is not None:
            bounds = torch.tensor([start, stop], device=self.rows.device)
            i, end = torch.searchsorted(self.rows, bounds).tolist()
            out.index_add_(0, self.rows[i:end] - start, self.dense[i:end])
        return out


if triton is not None:

    @triton.jit
    def sum_kernel(
        weights, order, ends, x, dW, db, d, k, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
    ):
        """Program (m, c) sums columns c * BLOCK_D + [0, BLOCK_D) of dW[m] over the pairs of latent
        m, BLOCK_P pairs at a time. The programs with c = 0 write db[m]."""
        m = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        start, end = tl.load(ends + m), tl.load(ends + m + 1)
        row = tl.zeros((BLOCK_D,), tl.float32)
        total = tl.zeros((BLOCK_P,), tl.float32)
        for p in range(start, end, BLOCK_P):
            # BLOCK_P pairs, and their weights
            at = p + tl.arange(0, BLOCK_P)
            pair = tl.load(order + at, mask=at < end, other=0)
            weight = tl.load(weights + pair, mask=at < end, other=0.0).to(tl.float32)
            # the vectors that they belong to: (BLOCK_P, BLOCK_D)
            inside = (at < end)[:, None] & (cols < d)[None, :]
            tile = tl.load(x + (pair // k)[:, None] * d + cols[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            row += tl.sum(weight[:, None] * tile, 0)
            total += weight
        tl.store(dW + m * d + cols, row, mask=cols < d)
        tl.store(db + m, tl.sum(total, 0), mask=tl.program_id(1) == 0)

    @triton.jit
    def gather_row(
        m, weights, vectors, ends, x, dense_at, dense, d,
        DENSE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Return row m of a `Gradient`, whole: (BLOCK_D,) float32, 0 past d.

        dense_at (M,): the row of `dense` that is added to row m; -1 if there is none.
        """
        cols = tl.arange(0, BLOCK_D)
        start, end = tl.load(ends + m), tl.load(ends + m + 1)
        row = tl.zeros((BLOCK_D,), tl.float32)
        for p in range(start, end, BLOCK_P):
            # BLOCK_P pairs, and their weights
            at = p + tl.arange(0, BLOCK_P)
            vector = tl.load(vectors + at, mask=at < end, other=0)
            weight = tl.load(weights + at, mask=at < end, other=0.0).to(tl.float32)
            # the vectors that they belong to: (BLOCK_P, BLOCK_D)
            inside = (at < end)[:, None] & (cols < d)[None, :]
            tile = tl.load(x + vector[:, None] * d + cols[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            row += tl.sum(weight[:, None] * tile, 0)
        if DENSE:
            i = tl.load(dense_at + m).to(tl.int64)
            row += tl.load(dense + i * d + cols, mask=cols < tl.where(i >= 0, d, 0), other=0.0).to(
                tl.float32
            )
        return row


def triton_sum_by_latent(
    weights: Tensor, top_indices: Tensor, x: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    """Return what `sum_by_latent` returns: launch a program for each latent and 256 columns."""
    k = top_indices.shape[1]
    d = x.shape[1]
    order, ends = sort_pairs(top_indices, num_latents)
    dW = x.new_empty(num_latents, d)
    db = x.new_empty(num_latents)
    BLOCK_D = min(256, triton.next_power_of_2(d))
    grid = (num_latents, triton.cdiv(d, BLOCK_D))
    weights, x = weights.contiguous(), x.contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        sum_kernel[grid](weights, order, ends, x, dW, db, d, k, BLOCK_P=8, BLOCK_D=BLOCK_D)
    return dW, db


def torch_sum_by_latent(
    weights: Tensor, top_indices: Tensor, x: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    """Return what `sum_by_latent` returns, computed in torch.

    db is the same sum as dW, over a column of ones: index_add_ would add in the input's dtype, and
    with atomics on CUDA.
    """
    order, ends = sort_pairs(top_indices, num_latents)
    vectors = order // top_indices.shape[1]
    weights = weights.to(x.dtype).flatten()[order]
    dW = sum_bags(weights, vectors, ends, x)
    db = sum_bags(weights, torch.zeros_like(vectors), ends, x.new_ones(1, 1)).flatten()
    return dW, db


def sum_by_latent(
    weights: Tensor, top_indices: Tensor, x: Tensor, num_latents: int
) -> tuple[Tensor, Tensor]:
    """Sum weights[n, j] x[n], and weights[n, j], over the pairs of each latent.

    weights (N, k) and x (N, d): fp32, bf16 or fp16; top_indices (N, k): int64, below num_latents.
    Returns dW (num_latents, d) and db (num_latents,) in the dtype of x; they are summed in float32.
    The rows of latents that no vector chose are zero.
    """
    if triton is not None and x.is_cuda:
        return triton_sum_by_latent(weights, top_indices, x, num_latents)
    return torch_sum_by_latent(weights, top_indices, x, num_latents)


def triton_totals(weights: Tensor, ends: Tensor) -> Tensor:
    """Return what `totals` returns: launch `sum_kernel` for db alone, where x is a single 1, and
    every pair belongs to it."""
    num_pairs = len(weights)
    num_latents = len(ends) - 1
    order = torch.arange(num_pairs, device=weights.device)
    x = weights.new_ones(1, 1)
    dW = weights.new_empty(num_latents, 1)
    db = weights.new_empty(num_latents)
    k = num_pairs + 1  # so that pair // k, the row of x, is 0
    with torch.cuda.device_of(weights):  # Triton launches on the current device
        sum_kernel[(num_latents, 1)](weights, order, ends, x, dW, db, 1, k, BLOCK_P=32, BLOCK_D=16)
    return db


def torch_totals(weights: Tensor, ends: Tensor) -> Tensor:
    """Compute what `totals` returns, in torch, where x is a single 1."""
    zeros = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
    ones = weights.new_ones(1, 1)
    return Gradient(weights, zeros, ends, ones).block(0, len(ends) - 1)[:, 0]


def totals(weights: Tensor, ends: Tensor) -> Tensor:
    """Return the sum of the weights (P,) of each latent's pairs, added in their order: (M,).

    >>> totals(torch.tensor([1.0, 2.0, 5.0]), ends=torch.tensor([0, 2, 2, 3]))
    tensor([3., 0., 5.])
    """
    if triton is not None and weights.is_cuda:
        return triton_totals(weights, ends)
    return torch_totals(weights, ends)


def weighted_sum(weights: Tensor, W: Tensor) -> Tensor:
    """Return weights W, the sum of weights[m] W[m]: (M,), (M, d) -> (d,).

    On a CPU it is the sum of 16 partial sums, by embedding_bag: 0.44 ms, where the product of a
    vector and a matrix takes 1.05 (M = 10240, d = 640, two CPU cores).
    """
    num_latents = len(weights)
    if W.device.type != "cpu" or num_latents % 16:
        return weights @ W
    rows = torch.arange(num_latents).view(16, -1)
    partial_sums = F.embedding_bag(rows, W, mode="sum", per_sample_weights=weights.view(16, -1))
    return partial_sums.sum(0)
