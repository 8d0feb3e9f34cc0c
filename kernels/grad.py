"""sum_by_latent: the gradient of a weight matrix of which each vector touched only k rows.

    dW[m] = sum over pairs (n, j) with top_indices[n, j] = m of weights[n, j] * x[n]          dW (M, d)
    db[m] = the same sum of weights[n, j]                                                     db (M,)

With (weights, x) = (top_acts, grad of x_hat) this is the gradient of W_dec; with (grad of top_acts,
x - b_dec) it is that of W_enc and b_enc. The dense expression is S.T @ x with S (N, M) holding the
weights, 0.3 % of it nonzero.

The N*k pairs are sorted by latent; then each latent's row is summed by one program, in the order of
the vectors. Nothing is written twice, so there are no atomics and the same input gives the same
bits.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch twin does the work
    triton = gather_row = None


WIDEST = 4096  # of a row that a program holds in registers; wider ones go through torch


def warps_for(BLOCK_D):
    """Of a program that holds a whole row."""
    return 8 if BLOCK_D > 512 else 4


def sort_pairs(top_indices, num_latents):
    """Pairs by latent: `order` (N*k,), and `ends` (M + 1,) so that latent m owns
    order[ends[m]:ends[m + 1]]."""
    latents, order = torch.sort(top_indices.flatten(), stable=True)
    return order, (count_ends if latents.device.type == "cpu" else search_ends)(
        latents, num_latents
    )


def count_active(top_acts, top_indices, num_latents):
    """How many vectors each latent is active on: (N, K), (N, K) -> int64 (M,). A zero activation is
    never active."""
    active = torch.where(
        top_acts > 0, top_indices, num_latents
    ).flatten()  # zeros go to one bin more, thrown away
    counts = active.new_zeros(num_latents + 1)  # bincount would make a GPU wait
    return counts.scatter_add_(0, active, torch.ones_like(active))[:num_latents]


def search_ends(latents, num_latents):
    return torch.searchsorted(
        latents, torch.arange(num_latents + 1, device=latents.device, dtype=latents.dtype)
    )


def count_ends(latents, num_latents):
    """The same by counting: 0.04 ms where searching takes 0.4, on a CPU; a GPU would have to be
    waited for."""
    counts = torch.bincount(latents, minlength=num_latents)[:num_latents]
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


BLOCK = 1024  # rows of a gradient that are made at once: 3 MB at d = 640, which stay in the cache and come from the allocator's
# own store; the whole, 26 MB, would come from the system and cost 5 ms for 1
KEPT = (
    1 << 27
)  # numbers of a gradient that is kept for its second use, 0.5 GB; a larger one is made twice, block by block


class Gradient(NamedTuple):
    """The gradient of a weight matrix (M, d): sums over pairs, sorted by latent, and some rows
    more.

    gradient[m] = sum of weights x[vectors] over the pairs ends[m] to ends[m + 1],   + dense[i] where rows[i] = m
    """

    weights: torch.Tensor  # (P,)
    vectors: torch.Tensor  # (P,): which row of x
    ends: torch.Tensor  # (M + 1,)
    x: torch.Tensor  # (N, d)
    rows: torch.Tensor | None = None  # (C,), rising; M or more: of no row
    dense: torch.Tensor | None = None  # (C, d)
    made: torch.Tensor | None = None  # (M, d): the matrix, if it is kept,
    norm: torch.Tensor | None = None  # and the square of its norm

    def keep(self, out):
        """The same, with the matrix made once and for all, in the memory `out` (M, d); None leaves
        it unmade."""
        if out is None:
            return self
        norm = 0.0
        for start in range(0, len(out), BLOCK):
            rows = self.block(start, min(start + BLOCK, len(out)))
            norm = norm + torch.linalg.vector_norm(rows).square()  # while they are in the cache
            out[start : start + BLOCK] = rows
        return self._replace(made=out, norm=norm)

    def block(self, start, stop):
        """Rows start to stop of the matrix."""
        if self.made is not None:
            return self.made[start:stop]
        ends = self.ends[start : stop + 1]
        first, last = int(ends[0]), int(ends[-1])
        out = F.embedding_bag(
            self.vectors[first:last], self.x, ends - first, mode="sum",
            per_sample_weights=self.weights[first:last], include_last_offset=True,
        )  # fmt: skip
        if self.rows is not None:
            a, b = torch.searchsorted(
                self.rows, torch.tensor([start, stop], device=self.rows.device)
            ).tolist()
            out.index_add_(0, self.rows[a:b] - start, self.dense[a:b])
        return out


if triton is not None:

    @triton.jit
    def sum_kernel(
        weights, order, ends, x, dW, db, d, k, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
    ):
        """Program (m, c): columns c * BLOCK_D + [0, BLOCK_D) of dW[m], over the pairs of latent m,
        BLOCK_P at a time."""
        m = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        start, end = tl.load(ends + m), tl.load(ends + m + 1)
        row = tl.zeros((BLOCK_D,), tl.float32)
        total = tl.zeros((BLOCK_P,), tl.float32)
        for p in range(start, end, BLOCK_P):
            at = p + tl.arange(0, BLOCK_P)
            pair = tl.load(order + at, mask=at < end, other=0)
            weight = tl.load(weights + pair, mask=at < end, other=0.0).to(tl.float32)
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
        m,
        weights,
        vectors,
        ends,
        x,
        dense_at,
        dense,
        d,
        DENSE: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """Row m of a `Gradient`, whole: (BLOCK_D,) float32, 0 past d."""
        cols = tl.arange(0, BLOCK_D)
        start, end = tl.load(ends + m), tl.load(ends + m + 1)
        row = tl.zeros((BLOCK_D,), tl.float32)
        for p in range(start, end, BLOCK_P):
            at = p + tl.arange(0, BLOCK_P)
            vector = tl.load(vectors + at, mask=at < end, other=0)
            weight = tl.load(weights + at, mask=at < end, other=0.0).to(tl.float32)
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


def totals(weights, ends):
    """Sum of the weights (P,) of each latent's pairs, in their order: (M,)."""
    M, ones = len(ends) - 1, weights.new_ones(1, 1)
    if triton is None or not weights.is_cuda:
        none = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
        return Gradient(weights, none, ends, ones).block(0, M)[:, 0]
    P = len(weights)
    order, out, db = (
        torch.arange(P, device=weights.device),
        weights.new_empty(M, 1),
        weights.new_empty(M),
    )
    with torch.cuda.device_of(weights):  # of all pairs the vector is the one in `ones`
        sum_kernel[(M, 1)](weights, order, ends, ones, out, db, 1, P + 1, BLOCK_P=32, BLOCK_D=16)
    return db


def weighted_sum(weights, W):
    """weights W = sum of weights[m] W[m]: (M,), (M, d) -> (d,)."""
    M = len(weights)
    if W.device.type != "cpu" or M % 16:
        return weights @ W
    rows = torch.arange(M).view(
        16, -1
    )  # 0.44 ms where a product by a vector takes 1.05 (M = 10240, d = 640, two CPU cores)
    return F.embedding_bag(rows, W, mode="sum", per_sample_weights=weights.view(16, -1)).sum(0)


def triton_sum_by_latent(weights, top_indices, x, num_latents):
    k, d = top_indices.shape[1], x.shape[1]
    order, ends = sort_pairs(top_indices, num_latents)
    dW, db = x.new_empty(num_latents, d), x.new_empty(num_latents)
    BLOCK_D = min(256, triton.next_power_of_2(d))
    grid = (num_latents, triton.cdiv(d, BLOCK_D))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        sum_kernel[grid](
            weights.contiguous(),
            order,
            ends,
            x.contiguous(),
            dW,
            db,
            d,
            k,
            BLOCK_P=8,
            BLOCK_D=BLOCK_D,
        )
    return dW, db


def torch_sum_by_latent(weights, top_indices, x, num_latents):
    order, ends = sort_pairs(top_indices, num_latents)
    weights = weights.to(x.dtype).flatten()[order]
    add_up = lambda rows, x: F.embedding_bag(
        rows, x, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
    # db is the same sum over a column of ones: index_add_ would add in the input's dtype, and with
    # atomics on CUDA
    return add_up(order // top_indices.shape[1], x), add_up(order * 0, x.new_ones(1, 1)).flatten()


def sum_by_latent(weights, top_indices, x, num_latents):
    """Sum `weights[n, j] * x[n]` over all pairs whose `top_indices[n, j]` is m, for every latent m.

    weights (N, k) and x (N, d): fp32, bf16 or fp16; top_indices (N, k): int64, below num_latents.
    Returns dW (num_latents, d) and db (num_latents,) in the dtype of x; rows of latents that nobody
    chose are zero.
    """
    sums = triton_sum_by_latent if triton is not None and x.is_cuda else torch_sum_by_latent
    return sums(weights, top_indices, x, num_latents)
