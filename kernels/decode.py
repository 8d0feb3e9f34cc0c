"""decode: each vector's reconstruction from the k rows of W_dec that it uses, and its backward.

    forward     x_hat[n]       = sum_j top_acts[n, j] * W_dec[top_indices[n, j]] + b_dec      (N, d)
    backward    d_top_acts[n, j] = g[n] . W_dec[top_indices[n, j]]                            (N, k)
                dW_dec           = sum_by_latent(top_acts, top_indices, g)                    (M, d), kernels/grad.py
                db_dec           = sum_n g[n]                                                 (d,)

The dense expression is S @ W_dec + b_dec with S (N, M) holding the activations: M / k = 640 times
the products at M = 20480, k = 32. In both kernels a program has one vector and gathers k rows,
BLOCK_K at a time.
"""

import warnings

import torch
import torch.nn.functional as F

from kernels.grad import WIDEST, sum_by_latent, warps_for

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch twins do the work
    triton = None


warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


if triton is not None:

    @triton.jit
    def gather_sum_kernel(
        weights, top_indices, W, out, d, k, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
    ):
        """Program (n, c): columns c * BLOCK_D + [0, BLOCK_D) of out[n]."""
        n = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        row = tl.zeros((BLOCK_D,), tl.float32)
        for j in range(0, k, BLOCK_K):
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
        """Program (n, c): out[n, j] for BLOCK_K values of j, from c * BLOCK_K on."""
        n = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        latent = tl.load(top_indices + n * k + at, mask=at < k, other=0).to(tl.int64)
        dots = tl.zeros((BLOCK_K,), tl.float32)
        for c in range(0, d, BLOCK_D):
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
        x, top_acts, top_indices, W, b, e, d_acts, d, k, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
    ):  # fmt: skip
        """Program n: the whole of e[n] = x_hat[n] - x[n] in registers, and its products with the k
        rows that made it."""
        n = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_D)
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
        row = tl.where(
            cols < d, row - tl.load(x + n * d + cols, mask=cols < d, other=0.0).to(tl.float32), 0.0
        )
        tl.store(e + n * d + cols, row, mask=cols < d)
        for j in range(0, k, BLOCK_K):
            at = j + tl.arange(0, BLOCK_K)
            latent = tl.load(top_indices + n * k + at, mask=at < k, other=0).to(tl.int64)
            weight = tl.load(top_acts + n * k + at, mask=at < k, other=0.0)
            inside = (at < k)[:, None] & (cols < d)[None, :]
            tile = tl.load(W + latent[:, None] * d + cols[None, :], mask=inside, other=0.0).to(
                tl.float32
            )  # from the cache
            dots = tl.sum(row[None, :] * tile, 1)
            tl.store(d_acts + n * k + at, tl.where(weight > 0, dots, 0.0), mask=at < k)


GATHER_SUM = dict(BLOCK_K=8)
GATHER_DOT = dict(BLOCK_K=16)


def blocks_of(d, most):
    return min(most, max(16, triton.next_power_of_2(d)))


def decode_error_blocks(d):
    BLOCK_D = blocks_of(d, 1 << 30)
    return dict(BLOCK_K=max(1, 4096 // BLOCK_D), BLOCK_D=BLOCK_D, num_warps=warps_for(BLOCK_D))


def triton_gather_sum(weights, top_indices, W):
    (N, k), d = top_indices.shape, W.shape[1]
    out = W.new_empty(N, d)
    BLOCK_D = blocks_of(d, 256)
    grid = (N, triton.cdiv(d, BLOCK_D))
    weights, top_indices, W = weights.contiguous(), top_indices.contiguous(), W.contiguous()
    with torch.cuda.device_of(W):  # Triton launches on the current device
        gather_sum_kernel[grid](weights, top_indices, W, out, d, k, **GATHER_SUM, BLOCK_D=BLOCK_D)
    return out


def triton_gather_dot(x, top_indices, W):
    (N, k), d = top_indices.shape, W.shape[1]
    out = x.new_empty(N, k)
    BLOCK_D = blocks_of(d, 128)
    grid = (N, triton.cdiv(k, GATHER_DOT["BLOCK_K"]))
    x, top_indices, W = x.contiguous(), top_indices.contiguous(), W.contiguous()
    with torch.cuda.device_of(W):
        gather_dot_kernel[grid](x, top_indices, W, out, d, k, **GATHER_DOT, BLOCK_D=BLOCK_D)
    return out


def torch_gather_sum(weights, top_indices, W):
    return F.embedding_bag(top_indices, W, mode="sum", per_sample_weights=weights.to(W.dtype))


def torch_gather_dot(x, top_indices, W):
    # Two ways in which nothing of size (N, k, d) is made, 2.9 and 5.4 ms where gather and bmm take
    # 47 (N = 1024, d = 640, k = 32, two CPU cores): a product sampled at some places, and the
    # backward of embedding_bag, called by name.
    N, k = top_indices.shape
    if x.dtype == W.dtype == torch.float32 and W.device.type == "cpu" and k <= len(W):
        starts = torch.arange(0, N * k + 1, k)
        places = torch.sparse_csr_tensor(
            starts, top_indices.flatten(), x.new_zeros(N * k), (N, len(W)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(places, x, W.T).values().view(N, k)
    starts = torch.arange(0, N * k, k, device=x.device)
    vectors = torch.arange(N, device=x.device).repeat_interleave(k)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return (
        dots(x.to(W.dtype).contiguous(), W, top_indices.flatten(), starts, vectors, 0)
        .view(N, k)
        .to(x.dtype)
    )


def gather_sum(weights, top_indices, W):
    """sum_j weights[n, j] * W[top_indices[n, j]]: (N, d), in the dtype of W."""
    return (triton_gather_sum if triton is not None and W.is_cuda else torch_gather_sum)(
        weights, top_indices, W
    )


def gather_dot(x, top_indices, W):
    """x[n] . W[top_indices[n, j]]: (N, k), in the dtype of x."""
    return (triton_gather_dot if triton is not None and W.is_cuda else torch_gather_dot)(
        x, top_indices, W
    )


def triton_decode_error(x, top_acts, top_indices, W_dec, b_dec):
    (N, k), d = top_indices.shape, W_dec.shape[1]
    e, d_acts = x.new_empty(N, d), x.new_empty(N, k)
    inputs = (t.contiguous() for t in (x, top_acts, top_indices, W_dec, b_dec))
    with torch.cuda.device_of(x):
        decode_error_kernel[(N,)](*inputs, e, d_acts, d, k, **decode_error_blocks(d))
    return e, d_acts


def torch_decode_error(x, top_acts, top_indices, W_dec, b_dec):
    e = gather_sum(top_acts, top_indices, W_dec).add_(b_dec).sub_(x)
    return e, gather_dot(e, top_indices, W_dec).mul_(top_acts > 0)


def decode_error(x, top_acts, top_indices, W_dec, b_dec):
    """e = x_hat - x (N, d), and e[n] . W_dec[top_indices[n, j]] where top_acts is not zero (N, k):
    a loss's two gradients."""
    twin = (
        triton_decode_error
        if triton is not None and x.is_cuda and x.shape[1] <= WIDEST
        else torch_decode_error
    )
    return twin(x, top_acts, top_indices, W_dec, b_dec)


class Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, top_acts, top_indices, W_dec, b_dec):
        ctx.save_for_backward(top_acts, top_indices, W_dec)
        return gather_sum(top_acts, top_indices, W_dec) + b_dec

    @staticmethod
    def backward(ctx, g):
        top_acts, top_indices, W_dec = ctx.saved_tensors
        d_acts = dW_dec = db_dec = None
        if ctx.needs_input_grad[0]:
            d_acts = gather_dot(g, top_indices, W_dec).to(top_acts.dtype)
        if ctx.needs_input_grad[2]:
            dW_dec, _ = sum_by_latent(top_acts, top_indices, g, len(W_dec))
        if ctx.needs_input_grad[3]:
            db_dec = g.sum(0)
        return d_acts, None, dW_dec, db_dec


def decode(top_acts, top_indices, W_dec, b_dec):
    """x_hat = top_acts . W_dec[top_indices] + b_dec, with gradients for top_acts, W_dec and b_dec.

    top_acts (N, k), W_dec (M, d), b_dec (d,): fp32, bf16 or fp16; top_indices (N, k): int64, below
    M, repeats allowed. Returns x_hat (N, d) in the dtype of W_dec.
    """
    return Decode.apply(top_acts, top_indices, W_dec, b_dec)
