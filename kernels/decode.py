"""decode: each vector's reconstruction from the k rows of W_dec that it uses, and its backward.

    x_hat[n] = sum over j of top_acts[n, j] W_dec[top_indices[n, j]] + b_dec      (N, d)

The dense equivalent, which needs M / k times the products: 640 at M = 20480, k = 32.

    S = torch.zeros(N, M).scatter_add(1, top_indices, top_acts)
    x_hat = S @ W_dec + b_dec

Backward, given g = d_x_hat (N, d):

    d_top_acts[n, j] = g[n] . W_dec[top_indices[n, j]]                            (N, k)
    dW_dec           = sum_by_latent(top_acts, top_indices, g)                    (M, d)
    db_dec           = sum over n of g[n]                                         (d,)

The page has three operations, each with its kernel, its launcher and its torch twin:

    gather_sum(weights, top_indices, W)    sum over j of weights[n, j] W[top_indices[n, j]]   (N, d)
    gather_dot(x, top_indices, W)          x[n] . W[top_indices[n, j]]                        (N, k)
    decode_error(x, top_acts, ...)         x_hat - x, and its gather_dot, in one launch

In each kernel a program has one vector and gathers rows of W, BLOCK_K at a time. `decode_error`
keeps the whole row x_hat - x in registers, so that the second pass over the k rows, which are in
the cache by then, needs nothing else from memory.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.grad import MAX_WIDTH, sum_by_latent, warps_for

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch twins do the work
    triton = None


warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


# ---- the kernels ----

if triton is not None:

    @triton.jit
    def gather_sum_kernel(
        weights, top_indices, W, out, d, k, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
    ):
        """Program (n, c) writes columns c * BLOCK_D + [0, BLOCK_D) of out[n]."""
        n = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        row = tl.zeros((BLOCK_D,), tl.float32)
        for j in range(0, k, BLOCK_K):
            # BLOCK_K latents, their weights and their rows of W: (BLOCK_K, BLOCK_D)
            at = j + tl.arange(0, BLOCK_K)
            latent = tl.load(top_indices + n * k + at, mask=at < k, other=0).to(tl.int64)
            weight = tl.load(weights + n * k + at, mask=at < k, other=0.0).to(tl.float32)
            inside = (at < k)[:, None] & (cols < d)[None, :]
            tile = tl.load(W + latent[:, None] * d + cols[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            row += tl.sum(weight[:, None] * tile, 0)
        tl.store(out + n * d + cols, row, mask=cols < d)

    @triton.jit
    def gather_dot_kernel(
        x, top_indices, W, out, d, k, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
    ):
        """Program (n, c) writes out[n, j] for the values c * BLOCK_K + [0, BLOCK_K) of j."""
        n = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        latent = tl.load(top_indices + n * k + at, mask=at < k, other=0).to(tl.int64)
        dots = tl.zeros((BLOCK_K,), tl.float32)
        for c in range(0, d, BLOCK_D):
            # BLOCK_D columns of x[n], and of the rows of W: (BLOCK_K, BLOCK_D)
            cols = c + tl.arange(0, BLOCK_D)
            piece = tl.load(x + n * d + cols, mask=cols < d, other=0.0).to(tl.float32)
            inside = (at < k)[:, None] & (cols < d)[None, :]
            tile = tl.load(W + latent[:, None] * d + cols[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            dots += tl.sum(piece[None, :] * tile, 1)
        tl.store(out + n * k + at, dots, mask=at < k)

    @triton.jit
    def decode_error_kernel(
        x, top_acts, top_indices, W, b, e, d_acts, d, k,
        BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Program n writes e[n] = x_hat[n] - x[n], which it keeps whole in registers, and
        d_acts[n], its products with the k rows that made x_hat[n]."""
        n = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_D)
        # x_hat: the bias, and BLOCK_K rows of W at a time
        row = tl.load(b + cols, mask=cols < d, other=0.0).to(tl.float32)
        for j in range(0, k, BLOCK_K):
            at = j + tl.arange(0, BLOCK_K)
            latent = tl.load(top_indices + n * k + at, mask=at < k, other=0).to(tl.int64)
            weight = tl.load(top_acts + n * k + at, mask=at < k, other=0.0).to(tl.float32)
            inside = (at < k)[:, None] & (cols < d)[None, :]
            tile = tl.load(W + latent[:, None] * d + cols[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            row += tl.sum(weight[:, None] * tile, 0)
        # e = x_hat - x
        row = tl.where(
            cols < d, row - tl.load(x + n * d + cols, mask=cols < d, other=0.0).to(tl.float32), 0.0
        )
        tl.store(e + n * d + cols, row, mask=cols < d)
        # the products of e with the same rows, now from the cache
        for j in range(0, k, BLOCK_K):
            at = j + tl.arange(0, BLOCK_K)
            latent = tl.load(top_indices + n * k + at, mask=at < k, other=0).to(tl.int64)
            weight = tl.load(top_acts + n * k + at, mask=at < k, other=0.0)
            inside = (at < k)[:, None] & (cols < d)[None, :]
            tile = tl.load(W + latent[:, None] * d + cols[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            dots = tl.sum(row[None, :] * tile, 1)
            tl.store(d_acts + n * k + at, tl.where(weight > 0, dots, 0.0), mask=at < k)


GATHER_SUM = dict(BLOCK_K=8)  # block sizes of gather_sum_kernel,
GATHER_DOT = dict(BLOCK_K=16)  # and of gather_dot_kernel


def block_of_columns(d: int, largest: int) -> int:
    """Return the smallest power of two that is at least d, but within 16 and `largest`."""
    return min(largest, max(16, triton.next_power_of_2(d)))


def decode_error_blocks(d: int) -> dict[str, int]:
    """Return the block sizes and warps of `decode_error_kernel`: the whole width, and as many rows
    as make 4096 numbers."""
    BLOCK_D = block_of_columns(d, 1 << 30)
    return dict(BLOCK_K=max(1, 4096 // BLOCK_D), BLOCK_D=BLOCK_D, num_warps=warps_for(BLOCK_D))


# ---- gather_sum ----


def triton_gather_sum(weights: Tensor, top_indices: Tensor, W: Tensor) -> Tensor:
    """Return what `gather_sum` returns: launch a program for each vector and 256 columns."""
    N, k = top_indices.shape
    d = W.shape[1]
    out = W.new_empty(N, d)
    BLOCK_D = block_of_columns(d, 256)
    grid = (N, triton.cdiv(d, BLOCK_D))
    weights, top_indices, W = weights.contiguous(), top_indices.contiguous(), W.contiguous()
    with torch.cuda.device_of(W):  # Triton launches on the current device
        gather_sum_kernel[grid](weights, top_indices, W, out, d, k, **GATHER_SUM, BLOCK_D=BLOCK_D)
    return out


def torch_gather_sum(weights: Tensor, top_indices: Tensor, W: Tensor) -> Tensor:
    """Compute what `gather_sum` returns, in torch."""
    return F.embedding_bag(top_indices, W, mode="sum", per_sample_weights=weights.to(W.dtype))


def gather_sum(weights: Tensor, top_indices: Tensor, W: Tensor) -> Tensor:
    """Return the sum over j of weights[n, j] W[top_indices[n, j]]: (N, d), in the dtype of W.

    weights (N, k); top_indices (N, k) int64, below M; W (M, d).
    """
    if triton is not None and W.is_cuda:
        return triton_gather_sum(weights, top_indices, W)
    return torch_gather_sum(weights, top_indices, W)


# ---- gather_dot ----


def triton_gather_dot(x: Tensor, top_indices: Tensor, W: Tensor) -> Tensor:
    """Return what `gather_dot` returns: launch a program for each vector and 16 values of j."""
    N, k = top_indices.shape
    d = W.shape[1]
    out = x.new_empty(N, k)
    BLOCK_D = block_of_columns(d, 128)
    grid = (N, triton.cdiv(k, GATHER_DOT["BLOCK_K"]))
    x, top_indices, W = x.contiguous(), top_indices.contiguous(), W.contiguous()
    with torch.cuda.device_of(W):  # Triton launches on the current device
        gather_dot_kernel[grid](x, top_indices, W, out, d, k, **GATHER_DOT, BLOCK_D=BLOCK_D)
    return out


def torch_gather_dot(x: Tensor, top_indices: Tensor, W: Tensor) -> Tensor:
    """Compute what `gather_dot` returns, in torch, without making anything of size (N, k, d).

    A product x W^T that is sampled at the places of top_indices takes 2.9 ms. It wants float32 on a
    CPU; everything else goes through the backward of embedding_bag, 5.4 ms. Gathering rows and bmm
    would take 47 (N = 1024, d = 640, k = 32, two CPU cores).
    """
    N, k = top_indices.shape
    is_float32 = x.dtype == W.dtype == torch.float32
    if is_float32 and W.device.type == "cpu" and k <= len(W):
        return sampled_product(x, top_indices, W)

    # d_top_acts of embedding_bag, the gradient that we want, called by its name
    starts = torch.arange(0, N * k, k, device=x.device)
    vectors = torch.arange(N, device=x.device).repeat_interleave(k)
    x_like_W = x.to(W.dtype).contiguous()
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_like_W, W, top_indices.flatten(), starts, vectors, 0
    )
    return dots.view(N, k).to(x.dtype)


def sampled_product(x: Tensor, top_indices: Tensor, W: Tensor) -> Tensor:
    """Return (x W^T)[n, top_indices[n, j]]: (N, k), by a product that makes no other number."""
    N, k = top_indices.shape
    starts = torch.arange(0, N * k + 1, k)
    pattern = torch.sparse_csr_tensor(
        starts, top_indices.flatten(), x.new_zeros(N * k), (N, len(W)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, x, W.T).values().view(N, k)


def gather_dot(x: Tensor, top_indices: Tensor, W: Tensor) -> Tensor:
    """Return x[n] . W[top_indices[n, j]]: (N, k), in the dtype of x.

    x (N, d); top_indices (N, k) int64, below M; W (M, d).
    """
    if triton is not None and W.is_cuda:
        return triton_gather_dot(x, top_indices, W)
    return torch_gather_dot(x, top_indices, W)


# ---- decode_error ----


def triton_decode_error(
    x: Tensor, top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `decode_error` returns: launch a program for each vector."""
    N, k = top_indices.shape
    d = W_dec.shape[1]
    e = x.new_empty(N, d)
    d_acts = x.new_empty(N, k)
    inputs = [tensor.contiguous() for tensor in (x, top_acts, top_indices, W_dec, b_dec)]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        decode_error_kernel[(N,)](*inputs, e, d_acts, d, k, **decode_error_blocks(d))
    return e, d_acts


def torch_decode_error(
    x: Tensor, top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what `decode_error` returns, in torch."""
    e = gather_sum(top_acts, top_indices, W_dec).add_(b_dec).sub_(x)
    d_acts = gather_dot(e, top_indices, W_dec).mul_(top_acts > 0)
    return e, d_acts


def decode_error(
    x: Tensor, top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the error of a reconstruction, and its product with each row that made it.

    x (N, d), top_acts (N, k) without negative numbers, top_indices (N, k) int64, W_dec (M, d),
    b_dec (d,). Returns in the dtype of x:

        e[n]         = x_hat[n] - x[n]                                             (N, d)
        d_acts[n, j] = e[n] . W_dec[top_indices[n, j]] where top_acts > 0, else 0  (N, k)

    For the loss |e|^2 / 2 these are its gradients with respect to x_hat and to top_acts.
    """
    if triton is not None and x.is_cuda and x.shape[1] <= MAX_WIDTH:
        return triton_decode_error(x, top_acts, top_indices, W_dec, b_dec)
    return torch_decode_error(x, top_acts, top_indices, W_dec, b_dec)


# ---- decode ----


class Decode(torch.autograd.Function):
    """The autograd function of `decode`."""

    @staticmethod
    def forward(
        ctx: Any, top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> Tensor:
        ctx.save_for_backward(top_acts, top_indices, W_dec)
        return gather_sum(top_acts, top_indices, W_dec) + b_dec

    @staticmethod
    def backward(ctx: Any, d_x_hat: Tensor) -> tuple[Tensor | None, ...]:
        top_acts, top_indices, W_dec = ctx.saved_tensors
        d_acts = dW_dec = db_dec = None
        if ctx.needs_input_grad[0]:
            d_acts = gather_dot(d_x_hat, top_indices, W_dec).to(top_acts.dtype)
        if ctx.needs_input_grad[2]:
            dW_dec, _ = sum_by_latent(top_acts, top_indices, d_x_hat, len(W_dec))
        if ctx.needs_input_grad[3]:
            db_dec = d_x_hat.sum(0)
        return d_acts, None, dW_dec, db_dec


def decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Return x_hat = top_acts . W_dec[top_indices] + b_dec: (N, d), in the dtype of W_dec.

    top_acts (N, k), W_dec (M, d) and b_dec (d,): fp32, bf16 or fp16; these get gradients.
    top_indices (N, k): int64, below M; a row may repeat a latent.

    For top_acts [[2, 3]], top_indices [[0, 2]], W_dec [[1, 0], [5, 5], [0, 1]] and b_dec [1, 1] it
    gives [[3, 4]].
    """
    return Decode.apply(top_acts, top_indices, W_dec, b_dec)
