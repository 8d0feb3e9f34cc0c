"""The fast parts of a sparse autoencoder: one operation a file, a Triton kernel beside its torch
twin.

    topk(pre_acts, k)                                 -> top_acts, top_indices
    encode(x, W_enc, b_enc, b_dec, k)                 -> top_acts, top_indices
    decode(top_acts, top_indices, W_dec, b_dec)       -> x_hat
    sum_by_latent(weights, top_indices, x, M)         -> dW, db       (the weight gradient of both)
    update_rows(W, gradient, ...)                     clips, projects, Adam, unit norm, in place
    keep_largest(acts, count)                         -> kept, least      (BatchTopK's choice over a whole batch)
    update.SparseUpdate                               one training update, put together from these

Tensors on CUDA go through Triton, all others, and all where Triton is not installed, through torch.
Both give every gradient, accumulate in float32 and use no atomics but on integers, so the same
input gives the same bits.
"""

from kernels import _namesake

__path__ += _namesake.folders()
__getattr__ = _namesake.attribute

from kernels.adam import adam, squared_norm, sum_over, update_rows  # noqa: E402
from kernels.batch_topk import keep_largest  # noqa: E402
from kernels.decode import decode, decode_error  # noqa: E402
from kernels.encode import Selector, encode, merge  # noqa: E402
from kernels.grad import (  # noqa: E402
    MAX_STORED,
    Gradient,
    count_active,
    sort_pairs,
    sum_by_latent,
    totals,
    weighted_sum,
)  # noqa: E402
from kernels.topk import topk  # noqa: E402

__all__ = [
    "MAX_STORED", "Gradient", "Selector", "adam", "count_active", "decode", "decode_error", "encode", "keep_largest", "merge",
    "sort_pairs", "squared_norm", "sum_by_latent", "sum_over", "topk", "totals", "update_rows", "weighted_sum",
]  # fmt: skip
