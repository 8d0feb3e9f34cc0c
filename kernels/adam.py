"""adam: clip, project, Adam, unit norm and a 16-bit copy, in one pass over the rows of a weight matrix.

    g     = gradient[m] - along[m] W[m]         what lies along the row, which unit norm would undo (unit norm only)
    g     = g / max(1, |all gradients|)
    m, v  = beta1 m + (1 - beta1) g,  beta2 v + (1 - beta2) g^2
    W[m]  = W[m] - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    W[m]  = W[m] / |W[m]|  (unit norm only);    copy[m] = W[m] in 16 bits

A row's gradient is made from its pairs where it is used (kernels/grad.py), so no matrix of gradients is written and read
again: a block of rows stays in the cache from its gradient to its copy.

Source: Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1.
"""

import torch

BLOCK = 1024  # rows: at d = 640 weight, gradient and both moments take 10 MB
BETAS, EPS = (0.9, 0.999), 6.25e-10  # Gao et al. 2024, A.3


def adam(params, gradients, exp_avg, exp_avg_sq, step, lr, clip):
    """Adam on lists of tensors, in place. step () counts from 1, clip () divides the gradients, which are overwritten."""
    torch._fused_adam_(
        params, gradients, exp_avg, exp_avg_sq, [], [step] * len(params), lr=lr, beta1=BETAS[0], beta2=BETAS[1],
        weight_decay=0.0, eps=EPS, amsgrad=False, maximize=False, grad_scale=clip,
    )  # fmt: skip


def blocks(M):
    return ((start, min(start + BLOCK, M)) for start in range(0, M, BLOCK))


def squared_norm(gradient, along=None):
    """|gradient|^2, a scalar; where `along` (M,) is given, of what is left without it: |g - (g.w) w|^2 = |g|^2 - (g.w)^2."""
    total = sum(torch.linalg.vector_norm(gradient.block(*rows)).square() for rows in blocks(len(gradient.ends) - 1))
    return total if along is None else total - along.square().sum()


def update(W, gradient, exp_avg, exp_avg_sq, step, lr, clip, along=None, copy=None):
    """One step of Adam for a matrix W (M, d) and its moments, in place; `gradient` is a kernels.Gradient.

    along (M,): gradient[m] . W[m]; given, rows are projected and keep unit norm. copy: a 16-bit W to keep up to date.
    """
    for start, stop in blocks(len(W)):
        rows, g = W[start:stop], gradient.block(start, stop)
        if along is not None:
            g.addcmul_(along[start:stop, None], rows, value=-1)
        adam([rows], [g], [exp_avg[start:stop]], [exp_avg_sq[start:stop]], step, lr, clip)
        if along is not None:
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(torch.finfo(W.dtype).tiny))
        if copy is not None:
            copy[start:stop] = rows
