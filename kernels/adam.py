"""adam: clip, project, Adam, unit norm and a 16-bit copy, in one pass over the rows of a weight
matrix.

    g     = gradient[m] - along[m] W[m]         what lies along the row, which unit norm would undo (unit norm only)
    g     = g / max(1, |all gradients|)
    m, v  = beta1 m + (1 - beta1) g,  beta2 v + (1 - beta2) g^2
    W[m]  = W[m] - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    W[m]  = W[m] / |W[m]|  (unit norm only);    copy[m] = W[m] in 16 bits

A row's gradient is made from its pairs where it is used (kernels/grad.py). In Triton a program has
one row, in registers from its gradient to its copy; weights and moments are read and written once,
28 to 32 bytes a number, which is what the step costs at the least on a GPU. In torch a block of
rows stays in the cache.

Source: Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1.
"""

import torch

from kernels.grad import BLOCK, WIDEST, Gradient, gather_row, warps_for

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch twins do the work
    triton = None

BETAS, EPS = (0.9, 0.999), 6.25e-10  # Gao et al. 2024, A.3


def adam(params, gradients, exp_avg, exp_avg_sq, step, lr):
    """Adam on lists of tensors, in place. step () counts from 1; lr () or a number."""
    torch._fused_adam_(
        params, gradients, exp_avg, exp_avg_sq, [], [step] * len(params), lr=lr, beta1=BETAS[0], beta2=BETAS[1],
        weight_decay=0.0, eps=EPS, amsgrad=False, maximize=False,
    )  # fmt: skip


def blocks(M):
    return ((start, min(start + BLOCK, M)) for start in range(0, M, BLOCK))


if triton is not None:

    @triton.jit
    def squared_norm_kernel(
        weights,
        vectors,
        ends,
        x,
        dense_at,
        dense,
        out,
        d,
        DENSE: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """Program m: |gradient[m]|^2."""
        m = tl.program_id(0).to(tl.int64)
        g = gather_row(m, weights, vectors, ends, x, dense_at, dense, d, DENSE, BLOCK_P, BLOCK_D)
        tl.store(out + m, tl.sum(g * g, 0))

    @triton.jit
    def make_kernel(
        weights,
        vectors,
        ends,
        x,
        dense_at,
        dense,
        out,
        d,
        DENSE: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """Program m: gradient[m], written to out[m]."""
        m = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_D)
        g = gather_row(m, weights, vectors, ends, x, dense_at, dense, d, DENSE, BLOCK_P, BLOCK_D)
        tl.store(out + m * d + cols, g, mask=cols < d)

    @triton.jit
    def update_kernel(
        W, exp_avg, exp_avg_sq, copy, along, hyper, weights, vectors, ends, x, dense_at, dense, d, beta1, beta2, eps,
        DENSE: tl.constexpr, UNIT: tl.constexpr, COPY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Program m: row m of everything. hyper: lr / (1 - beta1^t), 1 / (1 - beta2^t), 1 /
        clip."""
        m = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_D)
        inside, at = cols < d, m * d + cols
        g = gather_row(m, weights, vectors, ends, x, dense_at, dense, d, DENSE, BLOCK_P, BLOCK_D)
        w = tl.load(W + at, mask=inside, other=0.0)
        if UNIT:
            g -= tl.load(along + m) * w
        g *= tl.load(hyper + 2)
        first = beta1 * tl.load(exp_avg + at, mask=inside, other=0.0) + (1 - beta1) * g
        second = beta2 * tl.load(exp_avg_sq + at, mask=inside, other=0.0) + (1 - beta2) * g * g
        w -= tl.load(hyper) * first / (tl.sqrt(second * tl.load(hyper + 1)) + eps)
        if UNIT:
            w = tl.where(inside, w, 0.0)
            w /= tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-38)
        tl.store(exp_avg + at, first, mask=inside)
        tl.store(exp_avg_sq + at, second, mask=inside)
        tl.store(W + at, w, mask=inside)
        if COPY:
            tl.store(copy + at, w, mask=inside)


def row_blocks(d):
    BLOCK_D = max(16, triton.next_power_of_2(d))
    return dict(BLOCK_P=max(1, 2048 // BLOCK_D), BLOCK_D=BLOCK_D, num_warps=warps_for(BLOCK_D))


def launch(kernel, gradient, W, *args, **options):
    """One program a row, which fits in registers."""
    M, d = len(gradient.ends) - 1, gradient.x.shape[1]
    pairs = (gradient.weights, gradient.vectors, gradient.ends, gradient.x.contiguous())
    dense_at, dense = gradient.ends, gradient.x  # where there are none, anything
    if gradient.rows is not None:
        places = torch.arange(len(gradient.rows), device=W.device)
        dense_at = torch.full((M + 1,), -1, device=W.device).index_copy(0, gradient.rows, places)
        dense = gradient.dense.contiguous()
    options |= dict(DENSE=gradient.rows is not None, **row_blocks(d))
    with torch.cuda.device_of(W):  # Triton launches on the current device
        kernel[(M,)](*args[0], *pairs, dense_at, dense, *args[1], d, *args[2:], **options)


def triton_squared_norm(gradient, along=None):
    out = gradient.x.new_empty(len(gradient.ends) - 1)
    launch(squared_norm_kernel, gradient, gradient.x, (), (out,))
    return out.sum() if along is None else out.sum() - along.square().sum()


def triton_update_rows(W, gradient, exp_avg, exp_avg_sq, step, lr, clip, along=None, copy=None):
    hyper = torch.stack([lr / (1 - BETAS[0] ** step), 1 / (1 - BETAS[1] ** step), 1 / clip])
    tensors = (
        W,
        exp_avg,
        exp_avg_sq,
        W if copy is None else copy,
        W if along is None else along,
        hyper,
    )
    launch(
        update_kernel,
        gradient,
        W,
        tensors,
        (),
        *BETAS,
        EPS,
        UNIT=along is not None,
        COPY=copy is not None,
    )


def triton_sum_over(group, gradient, out):
    launch(make_kernel, gradient, gradient.x, (), (out,))
    every = torch.arange(len(out), device=out.device)
    empty = dict(
        weights=gradient.weights[:0],
        vectors=gradient.vectors[:0],
        ends=torch.zeros_like(gradient.ends),
    )
    return Gradient(**empty, x=gradient.x, rows=every, dense=group.sum(out))


def torch_sum_over(group, gradient, out):
    out = group.sum(gradient.keep(out).made)
    return gradient._replace(made=out, norm=torch.linalg.vector_norm(out).square())


def torch_squared_norm(gradient, along=None):
    total = gradient.norm
    if total is None:
        total = sum(
            torch.linalg.vector_norm(gradient.block(*rows)).square()
            for rows in blocks(len(gradient.ends) - 1)
        )
    return total if along is None else total - along.square().sum()


def torch_update_rows(W, gradient, exp_avg, exp_avg_sq, step, lr, clip, along=None, copy=None):
    for start, stop in reversed([*blocks(len(W))]):  # what was made last is in the cache still
        rows, g = (
            W[start:stop],
            gradient.block(start, stop) / clip,
        )  # a gradient that is kept is not written again
        if along is not None:
            g.addcmul_(along[start:stop, None] / clip, rows, value=-1)
        adam([rows], [g], [exp_avg[start:stop]], [exp_avg_sq[start:stop]], step, lr)
        if along is not None:
            rows.div_(
                torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(
                    torch.finfo(W.dtype).tiny
                )
            )
        if copy is not None:
            copy[start:stop] = rows


def in_triton(W):
    return triton is not None and W.is_cuda and W.shape[1] <= WIDEST


def sum_over(group, gradient, out):
    """The sum of every process's gradient, made in the memory `out` (M, d). `group.sum(x)` adds x
    up over them, in place.

    group: None for a process alone, whose gradient is made if there is memory for it.
    """
    if group is None:
        return gradient.keep(out)
    return (triton_sum_over if in_triton(gradient.x) else torch_sum_over)(group, gradient, out)


def squared_norm(gradient, along=None):
    """|gradient|^2, a scalar; where `along` (M,) is given, of what is left without it: |g - (g.w)
    w|^2 = |g|^2 - (g.w)^2."""
    return (triton_squared_norm if in_triton(gradient.x) else torch_squared_norm)(gradient, along)


def update_rows(W, gradient, exp_avg, exp_avg_sq, step, lr, clip, along=None, copy=None):
    """One step of Adam for a matrix W (M, d) and its moments, fp32, in place; `gradient` is a
    kernels.Gradient.

    step (): counted from 1. lr (): the learning rate. clip (): divides the gradient. along (M,):
    gradient[m] . W[m]; given, rows are projected and keep unit norm. copy: a 16-bit W to keep up to
    date.
    """
    twin = triton_update_rows if in_triton(W) else torch_update_rows
    twin(W, gradient, exp_avg, exp_avg_sq, step, lr, clip, along, copy)
