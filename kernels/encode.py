"""encode: the k largest activations of each vector, and a backward that touches nothing else.

    forward     pre_acts          = relu((x - b_dec) W_enc^T + b_enc)                    (N, M)
                top_acts, top_indices = the k largest of each row                        (N, k)
    backward    g                 = d_top_acts where top_acts > 0, else 0                (N, k)
                dW_enc, db_enc    = sum_by_latent(g, top_indices, x - b_dec)             (M, d), (M,)
                db_dec            = -db_enc W_enc                                        (d,)
                dx                = gather_sum(g, top_indices, W_enc)                    (N, d)

Autograd through topk would scatter g into a dense (N, M) gradient and multiply it twice: 640 times the work at
M = 20480, k = 32.
"""

import torch
import torch.nn.functional as F

from kernels.decode import gather_sum
from kernels.grad import sum_by_latent


class Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, k, dtype):
        x = x - b_dec
        pre_acts = F.linear(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype))  # (N, M)
        top_acts, top_indices = pre_acts.topk(k, sorted=False)  # (N, k); relu after it is the same, and k / M the work
        top_acts = F.relu(top_acts).to(W_enc.dtype)
        ctx.save_for_backward(x, W_enc, top_acts, top_indices)
        ctx.mark_non_differentiable(top_indices)
        return top_acts, top_indices

    @staticmethod
    def backward(ctx, g, _):
        x, W_enc, top_acts, top_indices = ctx.saved_tensors
        g = g * (top_acts > 0)
        dx = gather_sum(g, top_indices, W_enc) if ctx.needs_input_grad[0] else None
        dW_enc, db_enc = sum_by_latent(g, top_indices, x, len(W_enc))
        return dx, dW_enc, db_enc, -db_enc @ W_enc, None, None


def encode(x, W_enc, b_enc, b_dec, k, dtype=None):
    """The k largest of relu((x - b_dec) W_enc^T + b_enc) in each row, with gradients for x and all three parameters.

    x (N, d), W_enc (M, d), b_enc (M,), b_dec (d,) of one dtype; `dtype` (default: theirs) is that of the product alone.
    Returns top_acts (N, k), unordered, and top_indices (N, k) int64. A row with fewer than k positive pre_acts has
    zeros among its top_acts; these are not active and have no gradient.
    """
    return Encode.apply(x, W_enc, b_enc, b_dec, k, dtype or W_enc.dtype)
