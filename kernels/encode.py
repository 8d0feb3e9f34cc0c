"""encode: the k largest activations of each vector, and a backward that touches nothing else.

    pre_acts     = relu((x - b_dec) W_enc^T + b_enc)                  (N, M)
    top_acts, top_indices = the k largest of each row                 (N, k)

The dense equivalent:

    pre_acts = torch.relu(F.linear(x - b_dec, W_enc, b_enc))
    top_acts, top_indices = pre_acts.topk(k, dim=1)

Backward, given d_top_acts (N, k):

    g            = d_top_acts where top_acts > 0, else 0              (N, k)
    dW_enc, db_enc = sum_by_latent(g, top_indices, x - b_dec)         (M, d), (M,)
    db_dec       = -db_enc W_enc                                      (d,)
    dx           = gather_sum(g, top_indices, W_enc)                  (N, d)

Autograd through topk would scatter g into a dense (N, M) gradient and multiply it twice: 640 times
the work at M = 20480, k = 32.

pre_acts is made block by block, in memory that is used again, and each block is selected from while
it is in the cache. There is no kernel here but the product, which is the library's, and `topk`.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.decode import gather_sum
from kernels.grad import sum_by_latent
from kernels.topk import topk

COLUMNS = 1 << 16  # of pre_acts that are made at once
ROWS = 512  # of vectors at once on a CPU: what is selected from is in the cache, 23 ms and not 27


class Selector:
    """Selects the k largest of relu(x W^T + b) in each row, by blocks of rows and columns.

    It keeps its memory for the next call. Allocating it anew costs 40 ms where the product takes 65
    (float32, N = 1024, d = 640, M = 10240, two CPU cores).
    """

    def __init__(self):
        self.pre_acts = torch.empty(0)

    def __call__(self, x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return top_acts (N, k), in the dtype of x, and top_indices (N, k) int64.

        x (N, d), W (M, d) and b (M,) have one dtype.
        """
        height = len(x)
        if x.device.type == "cpu":
            height = min(len(x), ROWS)
        width = min(len(W), max(k, COLUMNS))
        self.allocate(x, height * width)

        blocks = [self.select_rows(rows, W, b, k, width) for rows in x.split(height)]
        if len(blocks) == 1:
            return blocks[0]
        top_acts = torch.cat([acts for acts, _ in blocks])
        top_indices = torch.cat([indices for _, indices in blocks])
        return top_acts, top_indices

    def allocate(self, x: Tensor, size: int) -> None:
        """Make room for `size` numbers of x's dtype on its device, unless there is."""
        is_alike = self.pre_acts.dtype == x.dtype and self.pre_acts.device == x.device
        if self.pre_acts.numel() < size or not is_alike:
            self.pre_acts = x.new_empty(size)

    def select_rows(
        self, x: Tensor, W: Tensor, b: Tensor, k: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Return what `__call__` returns, for one block of vectors, with pre_acts of `width`
        latents at a time."""
        acts, indices = [], []
        for start in range(0, len(W), width):
            W_block = W[start : start + width]
            b_block = b[start : start + width]
            size = len(x) * len(W_block)
            pre_acts = self.pre_acts[:size].view(len(x), len(W_block))
            torch.addmm(b_block, x, W_block.T, out=pre_acts)
            block_acts, block_indices = topk(pre_acts, min(k, len(W_block)))
            acts.append(block_acts)
            indices.append(block_indices + start)
        if len(acts) == 1:
            return acts[0], indices[0]
        return merge(torch.cat(acts, 1), torch.cat(indices, 1), k)


def merge(top_acts: Tensor, top_indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of what was selected in several parts of a row, (N, K) each.

    Ties go to the lower index, so the candidates are first put in the order of their indices.
    """
    order = top_indices.argsort(1)
    top_acts, columns = topk(top_acts.gather(1, order), k)
    return top_acts, top_indices.gather(1, order.gather(1, columns))


class Encode(torch.autograd.Function):
    """The autograd function of `encode`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        k: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        x = x - b_dec
        select = Selector()
        top_acts, top_indices = select(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype), k)
        top_acts = top_acts.to(W_enc.dtype)
        ctx.save_for_backward(x, W_enc, top_acts, top_indices)
        ctx.mark_non_differentiable(top_indices)
        return top_acts, top_indices

    @staticmethod
    def backward(ctx: Any, d_top_acts: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, W_enc, top_acts, top_indices = ctx.saved_tensors
        g = d_top_acts * (top_acts > 0)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = gather_sum(g, top_indices, W_enc)
        dW_enc, db_enc = sum_by_latent(g, top_indices, x, len(W_enc))
        db_dec = -db_enc @ W_enc
        return dx, dW_enc, db_enc, db_dec, None, None


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k largest of relu((x - b_dec) W_enc^T + b_enc) in each row, and their latents.

    x (N, d), W_enc (M, d), b_enc (M,) and b_dec (d,) have one dtype; all four get gradients.
    dtype: the dtype of the product alone. If not given, theirs.

    Returns top_acts (N, k), unordered, in their dtype, and top_indices (N, k) int64. A row with
    fewer than k positive pre_acts has zeros among its top_acts. These are not active and have no
    gradient.
    """
    return Encode.apply(x, W_enc, b_enc, b_dec, k, dtype or W_enc.dtype)
