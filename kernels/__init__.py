"""The fast parts of a sparse autoencoder: one operation a file, a Triton kernel beside its torch twin.

    topk(pre_acts, k)                                 -> top_acts, top_indices
    encode(x, W_enc, b_enc, b_dec, k)                 -> top_acts, top_indices
    decode(top_acts, top_indices, W_dec, b_dec)       -> x_hat
    sum_by_latent(weights, top_indices, x, M)         -> dW, db       (the weight gradient of both)
    update_rows(W, gradient, ...)                     clips, projects, Adam, unit norm, in place
    keep_largest(acts, count)                         -> kept, least      (BatchTopK's choice over a whole batch)
    update.SparseUpdate                               one training update, put together from these

Tensors on CUDA go through Triton, all others, and all where Triton is not installed, through torch. Both give every
gradient, accumulate in float32 and use no atomics but on integers, so the same input gives the same bits.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

# Hugging Face's package `kernels` has this name too, and transformers imports from it where it is installed. From a
# checkout it would find this folder instead and fail, so whatever is not here is looked up there.
_namesake = PathFinder.find_spec("kernels", [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parents[1]])
if _namesake is not None:
    __path__ += _namesake.submodule_search_locations or []

from kernels.adam import adam, squared_norm, sum_over, update_rows  # noqa: E402
from kernels.decode import decode, decode_error  # noqa: E402
from kernels.encode import Selector, encode, merge  # noqa: E402
from kernels.grad import KEPT, Gradient, count_active, sort_pairs, sum_by_latent, totals, weighted_sum  # noqa: E402
from kernels.threshold import keep_largest  # noqa: E402
from kernels.topk import topk  # noqa: E402

__all__ = [
    "KEPT", "Gradient", "Selector", "adam", "count_active", "decode", "decode_error", "encode", "keep_largest", "merge",
    "sort_pairs", "squared_norm", "sum_by_latent", "sum_over", "topk", "totals", "update_rows", "weighted_sum",
]  # fmt: skip


def __getattr__(name):
    if _namesake is None or _namesake.loader is None or name.startswith("__"):
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    module = module_from_spec(_namesake)
    _namesake.loader.exec_module(module)
    return getattr(module, name)
