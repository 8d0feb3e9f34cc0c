"""The fast operations of a sparse autoencoder. Each page has a Triton kernel beside its torch twin.

    topk.py        topk(pre_acts, k)                            top_acts, top_indices
    encode.py      encode(x, W_enc, b_enc, b_dec, k)            top_acts, top_indices
    decode.py      decode(top_acts, top_indices, W_dec, b_dec)  x_hat
    grad.py        sum_by_latent(weights, top_indices, x, M)    dW, db, for both of these
    adam.py        update_rows(W, gradient, ...)                clip, Adam, unit norm, in place
    batch_topk.py  keep_largest(acts, count)                    kept, least: BatchTopK's selection
    update.py      SparseUpdate(sae, variance)                  one training update of all

N vectors have the width d; there are M latents, of which k are active per vector. Tensors on CUDA
go through Triton, and all others through torch, as do all where Triton is not installed. Both
accumulate in float32 and give every gradient. Atomics are used on integers only, so the same input
gives the same bits.

    >>> top_acts, top_indices = topk(torch.tensor([[3.0, -1.0, 2.0]]), k=2)
    >>> top_indices.tolist()
    [[2, 0]]

`python test_kernels.py` checks every kernel on your machine.
"""

from kernels import _namesake

__path__ += _namesake.folders()
__getattr__ = _namesake.attribute

from kernels.adam import adam, squared_norm, sum_over, update_rows  # noqa: E402
from kernels.batch_topk import keep_largest  # noqa: E402
from kernels.decode import decode, decode_error  # noqa: E402
from kernels.encode import Selector, encode, merge  # noqa: E402
from kernels.grad import (  # noqa: E402
    Gradient,
    count_active,
    sort_pairs,
    sum_by_latent,
    totals,
    weighted_sum,
)
from kernels.topk import topk  # noqa: E402

__all__ = [
    "Gradient",
    "Selector",
    "adam",
    "count_active",
    "decode",
    "decode_error",
    "encode",
    "keep_largest",
    "merge",
    "sort_pairs",
    "squared_norm",
    "sum_by_latent",
    "sum_over",
    "topk",
    "totals",
    "update_rows",
    "weighted_sum",
]
