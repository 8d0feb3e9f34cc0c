"""update_rows: clip, project, Adam, unit norm and a 16-bit copy, in one pass over the rows of a
weight matrix.

    g       = gradient[m] - along[m] W[m]         (unit norm only)
    g       = g / clip                            clip = max(1, |all gradients|)
    first   = beta1 first  + (1 - beta1) g
    second  = beta2 second + (1 - beta2) g^2
    W[m]    = W[m] - lr first / (1 - beta1^t) / (sqrt(second / (1 - beta2^t)) + eps)
    W[m]    = W[m] / |W[m]|                       (unit norm only)
    copy[m] = W[m] in 16 bits                     (where there is a copy)

W, its gradient and its moments are (M, d); along[m] = gradient[m] . W[m] is (M,). What lies along a
row is taken out of its gradient, since unit norm would undo it. The dense equivalent, with G the
gradient as a matrix:

    W.grad = (G - along[:, None] * W) / clip
    optimizer.step();  W /= W.norm(dim=1, keepdim=True)

A row's gradient is made from its pairs where it is used (kernels/grad.py), so the matrix G need not
exist. In Triton a program has one row, in registers from its gradient to its copy. Weights and
moments are read and written once, 28 to 32 bytes per number: on a GPU an update can't cost less. In
torch a block of rows stays in the cache.

Beside it stand `squared_norm`, which is the norm that clips, and `sum_over`, which adds up the
gradients of several processes.

Source: Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.grad import BLOCK, MAX_WIDTH, Gradient, gather_row, warps_for

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch twins do the work
    triton = None

BETAS = (0.9, 0.999)
EPS = 6.25e-10  # Gao et al. 2024, A.3


def adam(
    params: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    step: Tensor,
    lr: float | Tensor,
) -> None:
    """Make one step of Adam on lists of tensors, in place. `step` () counts from 1."""
    steps = [step] * len(params)
    torch._fused_adam_(
        params,
        gradients,
        exp_avg,
        exp_avg_sq,
        [],
        steps,
        lr=lr,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=0.0,
        eps=EPS,
        amsgrad=False,
        maximize=False,
    )


# ---- Triton: a program per row ----

if triton is not None:

    @triton.jit
    def squared_norm_kernel(
        weights, vectors, ends, x, dense_at, dense, out, d,
        DENSE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Program m writes |gradient[m]|^2 to out[m]."""
        m = tl.program_id(0).to(tl.int64)
        g = gather_row(m, weights, vectors, ends, x, dense_at, dense, d, DENSE, BLOCK_P, BLOCK_D)
        tl.store(out + m, tl.sum(g * g, 0))

    @triton.jit
    def make_kernel(
        weights, vectors, ends, x, dense_at, dense, out, d,
        DENSE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Program m writes gradient[m] to out[m]."""
        m = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_D)
        g = gather_row(m, weights, vectors, ends, x, dense_at, dense, d, DENSE, BLOCK_P, BLOCK_D)
        tl.store(out + m * d + cols, g, mask=cols < d)

    @triton.jit
    def update_kernel(
        W, exp_avg, exp_avg_sq, copy, along, hyper,
        weights, vectors, ends, x, dense_at, dense, d, beta1, beta2, eps,
        DENSE: tl.constexpr, UNIT: tl.constexpr, COPY: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Program m updates row m of W, of both moments and of the copy.

        hyper (3,): lr / (1 - beta1^t), 1 / (1 - beta2^t), 1 / clip. They are read from memory,
        since a CUDA graph would freeze numbers. UNIT: keep unit norm. COPY: write the copy.
        """
        m = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK_D)
        inside, at = cols < d, m * d + cols
        # the gradient: project, clip
        g = gather_row(m, weights, vectors, ends, x, dense_at, dense, d, DENSE, BLOCK_P, BLOCK_D)
        w = tl.load(W + at, mask=inside, other=0.0)
        if UNIT:
            g -= tl.load(along + m) * w
        g *= tl.load(hyper + 2)
        # Adam
        first = beta1 * tl.load(exp_avg + at, mask=inside, other=0.0) + (1 - beta1) * g
        second = beta2 * tl.load(exp_avg_sq + at, mask=inside, other=0.0) + (1 - beta2) * g * g
        w -= tl.load(hyper) * first / (tl.sqrt(second * tl.load(hyper + 1)) + eps)
        # unit norm; a row of zeros stays one
        if UNIT:
            w = tl.where(inside, w, 0.0)
            w /= tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-38)
        tl.store(exp_avg + at, first, mask=inside)
        tl.store(exp_avg_sq + at, second, mask=inside)
        tl.store(W + at, w, mask=inside)
        if COPY:
            tl.store(copy + at, w, mask=inside)


def row_blocks(d: int) -> dict[str, int]:
    """Return the block sizes and warps of the kernels above: a whole row, and up to 2048 numbers
    of its pairs' vectors at a time."""
    BLOCK_D = max(16, triton.next_power_of_2(d))
    return dict(BLOCK_P=max(1, 2048 // BLOCK_D), BLOCK_D=BLOCK_D, num_warps=warps_for(BLOCK_D))


def gradient_arguments(gradient: Gradient) -> dict[str, Any]:
    """Return the arguments of the kernels above that describe a gradient, by name."""
    arguments = {
        "weights": gradient.weights,
        "vectors": gradient.vectors,
        "ends": gradient.ends,
        "x": gradient.x.contiguous(),
        "d": gradient.x.shape[1],
        "DENSE": gradient.rows is not None,
    }
    if gradient.rows is None:
        arguments["dense_at"] = gradient.ends  # not read, but a kernel wants a pointer
        arguments["dense"] = gradient.x
        return arguments

    # the inverse of `rows`; padding writes into one number more than there are latents
    device = gradient.rows.device
    dense_at = torch.full((len(gradient.ends),), -1, device=device)
    numbers = torch.arange(len(gradient.rows), device=device)
    arguments["dense_at"] = dense_at.index_copy(0, gradient.rows, numbers)
    arguments["dense"] = gradient.dense.contiguous()
    return arguments


def launch(kernel: Any, gradient: Gradient, **arguments: Any) -> None:
    """Launch a kernel with one program for each row of the gradient."""
    num_latents = len(gradient.ends) - 1
    blocks = row_blocks(gradient.x.shape[1])
    with torch.cuda.device_of(gradient.x):  # Triton launches on the current device
        kernel[(num_latents,)](**gradient_arguments(gradient), **arguments, **blocks)


def triton_squared_norm(gradient: Gradient, along: Tensor | None = None) -> Tensor:
    """Return what `squared_norm` returns, (): launch `squared_norm_kernel`, and add up the rows."""
    squares = gradient.x.new_empty(len(gradient.ends) - 1)
    launch(squared_norm_kernel, gradient, out=squares)
    if along is None:
        return squares.sum()
    return squares.sum() - along.square().sum()


def triton_update_rows(
    W: Tensor,
    gradient: Gradient,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float | Tensor,
    clip: Tensor,
    along: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Launch `update_kernel`."""
    first_scale = lr / (1 - BETAS[0] ** step)
    second_scale = 1 / (1 - BETAS[1] ** step)
    launch(
        update_kernel,
        gradient,
        W=W,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        copy=W if copy is None else copy,  # not written without COPY
        along=W if along is None else along,  # not read without UNIT
        hyper=torch.stack([first_scale, second_scale, 1 / clip]),
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        UNIT=along is not None,
        COPY=copy is not None,
    )


def triton_sum_over(group: Any, gradient: Gradient, out: Tensor) -> Gradient:
    """Return the sum of a gradient over all processes, as a matrix made in the memory `out` (M, d).

    The result has no pairs, and all rows are dense.
    """
    launch(make_kernel, gradient, out=out)
    return Gradient(
        weights=gradient.weights[:0],
        vectors=gradient.vectors[:0],
        ends=torch.zeros_like(gradient.ends),
        x=gradient.x,
        rows=torch.arange(len(out), device=out.device),
        dense=group.sum(out),
    )


# ---- torch: block by block ----


def blocks(num_rows: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each block of rows, and the row after its last."""
    for start in range(0, num_rows, BLOCK):
        yield start, min(start + BLOCK, num_rows)


def torch_squared_norm(gradient: Gradient, along: Tensor | None = None) -> Tensor:
    """Compute what `squared_norm` returns, in torch."""
    total = gradient.norm
    if total is None:
        total = 0.0
        for start, stop in blocks(len(gradient.ends) - 1):
            total = total + torch.linalg.vector_norm(gradient.block(start, stop)).square()
    if along is None:
        return total
    return total - along.square().sum()


def torch_update_rows(
    W: Tensor,
    gradient: Gradient,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float | Tensor,
    clip: Tensor,
    along: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Do what `update_rows` does, in torch. The last block comes first: what was made last may
    still be in the cache."""
    for start, stop in reversed(list(blocks(len(W)))):
        rows = W[start:stop]
        g = gradient.block(start, stop) / clip  # a new tensor: a stored gradient is not changed
        if along is not None:
            g.addcmul_(along[start:stop, None] / clip, rows, value=-1)
        adam([rows], [g], [exp_avg[start:stop]], [exp_avg_sq[start:stop]], step, lr)
        if along is not None:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows.div_(norms.clamp_min_(torch.finfo(W.dtype).tiny))
        if copy is not None:
            copy[start:stop] = rows


def torch_sum_over(group: Any, gradient: Gradient, out: Tensor) -> Gradient:
    """Return what `sum_over` returns, computed in torch. The result has its matrix stored."""
    out = group.sum(gradient.store(out).stored)
    return gradient._replace(stored=out, norm=torch.linalg.vector_norm(out).square())


# ---- public functions ----


def in_triton(W: Tensor) -> bool:
    """Return whether matrices like W (M, d) go through Triton: on CUDA, if a row fits in
    registers."""
    return triton is not None and W.is_cuda and W.shape[1] <= MAX_WIDTH


def sum_over(group: Any, gradient: Gradient, out: Tensor | None) -> Gradient:
    """Return the sum of every process's gradient, made in the memory `out` (M, d).

    group: a `distributed.Group`, whose `sum(x)` adds x up over the processes, in place. None for a
    process alone; its gradient is stored in `out`, or stays unmade if `out` is None.
    """
    if group is None:
        return gradient.store(out)
    if in_triton(gradient.x):
        return triton_sum_over(group, gradient, out)
    return torch_sum_over(group, gradient, out)


def squared_norm(gradient: Gradient, along: Tensor | None = None) -> Tensor:
    """Return |gradient|^2, ().

    along (M,) is gradient[m] . W[m], for rows W[m] of unit norm. If given, what lies along the rows
    does not count: |g - (g.w) w|^2 = |g|^2 - (g.w)^2.
    """
    if in_triton(gradient.x):
        return triton_squared_norm(gradient, along)
    return torch_squared_norm(gradient, along)


def update_rows(
    W: Tensor,
    gradient: Gradient,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float | Tensor,
    clip: Tensor,
    along: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Make one step of Adam for a matrix W (M, d) and its moments, fp32, in place.

    step: (), counted from 1.
    lr: the learning rate, () or a number.
    clip: (), the gradient is divided by it.
    along: (M,), gradient[m] . W[m]. If given, rows are projected and keep unit norm.
    copy: (M, d), W in 16 bits, to be brought up to date. If not given, there is none.
    """
    if in_triton(W):
        triton_update_rows(W, gradient, exp_avg, exp_avg_sq, step, lr, clip, along, copy)
    else:
        torch_update_rows(W, gradient, exp_avg, exp_avg_sq, step, lr, clip, along, copy)
