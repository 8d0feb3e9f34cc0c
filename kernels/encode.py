"""encode: the k largest activations of each vector, and a backward that touches nothing else.

    forward     pre_acts          = relu((x - b_dec) W_enc^T + b_enc)                    (N, M)
                top_acts, top_indices = the k largest of each row                        (N, k)
    backward    g                 = d_top_acts where top_acts > 0, else 0                (N, k)
                dW_enc, db_enc    = sum_by_latent(g, top_indices, x - b_dec)             (M, d), (M,)
                db_dec            = -db_enc W_enc                                        (d,)
                dx                = gather_sum(g, top_indices, W_enc)                    (N, d)

Autograd through topk would scatter g into a dense (N, M) gradient and multiply it twice: 640 times
the work at M = 20480, k = 32.
"""

import torch

from kernels.decode import gather_sum
from kernels.grad import sum_by_latent
from kernels.topk import topk

COLUMNS = 1 << 16  # of pre_acts at once
ROWS = 512  # of vectors at once on a CPU: what is selected from is still in the cache, 23 ms instead of 27


class Selector:
    """Chooses the k largest of relu(x W^T + b) in each row, by blocks of rows and columns; keeps
    its memory for the next call.

    Memory that is new each time costs 40 ms where the product takes 65 (float32, N = 1024, d = 640,
    M = 10240, two CPU cores).
    """

    def __init__(self):
        self.pre_acts = torch.empty(0)

    def __call__(self, x, W, b, k):
        """x (N, d), W (M, d), b (M,) of one dtype -> top_acts (N, k) of it, top_indices (N, k)
        int64."""
        N, M = len(x), len(W)
        height, width = min(N, ROWS if x.device.type == "cpu" else N), min(M, max(k, COLUMNS))
        if self.pre_acts.numel() < height * width or (
            self.pre_acts.dtype,
            self.pre_acts.device,
        ) != (x.dtype, x.device):
            self.pre_acts = x.new_empty(height * width)
        found = [self.of_rows(rows, W, b, k, width) for rows in x.split(height)]
        return tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found))

    def of_rows(self, x, W, b, k, width):
        found = []
        for start in range(0, len(W), width):
            shape = len(x), min(width, len(W) - start)
            pre_acts = self.pre_acts[: shape[0] * shape[1]].view(shape)
            torch.addmm(b[start : start + width], x, W[start : start + width].T, out=pre_acts)
            top_acts, top_indices = topk(pre_acts, min(k, shape[1]))
            found.append((top_acts, top_indices + start))
        if len(found) == 1:
            return found[0]
        return merge(*(torch.cat(parts, 1) for parts in zip(*found)), k)


def merge(top_acts, top_indices, k):
    """The k largest of those found in several parts of a row, (N, K) each; ties go to the lower
    index."""
    order = top_indices.argsort(1)
    top_acts, places = topk(top_acts.gather(1, order), k)
    return top_acts, top_indices.gather(1, order.gather(1, places))


class Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, k, dtype):
        x = x - b_dec
        top_acts, top_indices = Selector()(
            x.to(dtype), W_enc.to(dtype), b_enc.to(dtype), k
        )  # (N, k)
        top_acts = top_acts.to(W_enc.dtype)
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
    """The k largest of relu((x - b_dec) W_enc^T + b_enc) in each row, with gradients for x and all
    three parameters.

    x (N, d), W_enc (M, d), b_enc (M,), b_dec (d,) of one dtype; `dtype` (default: theirs) is that
    of the product alone. Returns top_acts (N, k), unordered, and top_indices (N, k) int64. A row
    with fewer than k positive pre_acts has zeros among its top_acts; these are not active and have
    no gradient.
    """
    return Encode.apply(x, W_enc, b_enc, b_dec, k, dtype or W_enc.dtype)
