"""keep_largest: BatchTopK's selection, the `count` largest activations of a whole batch, exact.

    kept[n, j] = acts[n, j] if it is among the `count` largest numbers of acts, else 0     (N, K)
    least      = the smallest number that is kept, 0 if none is                            ()

Ties go to the earlier place, row by row. Zeros are never kept, so where fewer than `count` numbers
are positive, `least` is the smallest positive one. The plain equivalent:

    values, places = acts.flatten().topk(count)
    kept = torch.zeros_like(acts).flatten().scatter_(0, places, values).view_as(acts)

The bits of positive floats, read as integers, are in the order of the floats. So `least` is found
digit by digit, from the top. A histogram of the next digit, over the numbers that begin with the
digits known so far, says which digit follows, and how many of the numbers that begin so are to be
kept.

On a GPU a digit has 8 bits, so float32 is read four times and 16-bit numbers twice, from the cache
where they fit. Then one pass counts, block by block, the numbers that equal `least`, and one pass
writes. There is no sort. The host waits for nothing, so a CUDA graph can capture it. The atomics
are on integers, whose sums do not depend on their order.

In torch a digit has 16 bits, since bincount hardly feels how many bins there are. Of 131,072
numbers 32,768 are kept in 0.3 ms (float32) or 0.2 (16 bits), in whatever order they come, where
topk takes 0.9 to 1.5 (0.2 to 0.5 if rows are sorted), kthvalue alone 0.8 to 2 and sort 7 to 9 (one
CPU core).

Source: Bussmann et al. 2024 (arXiv 2412.06410).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    from kernels.topk import bits_of
except ImportError:  # macOS, Windows: the torch twin does the work
    triton = None


# ---- Triton ----
#
# `table` (STEPS + 1, 258) int64 has a row for each digit. Its columns: the digits known before, as
# one number; how many numbers that begin with them are to be kept; the 256 bins of this digit.

if triton is not None:

    @triton.jit
    def least_so_far(table, count, STEP: tl.constexpr):
        """Return the first STEP digits of `least`, and how many of the numbers that begin with
        them are to be kept. The first program writes both to row STEP of the table."""
        known, left = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + count
        if STEP > 0:
            row, bins = table + (STEP - 1) * 258, tl.arange(0, 256)
            known, left, sizes = tl.load(row), tl.load(row + 1), tl.load(row + 2 + bins)
            # of the numbers in the bins, the smallest `dropped` are not kept; the digit is that of
            # the smallest number that is. It is 0, not 256, where all bins are empty.
            dropped = tl.maximum(tl.sum(sizes, 0) - left, 0)
            digit = tl.sum((tl.cumsum(sizes, 0) <= dropped).to(tl.int32), 0) & 255
            known, left = known * 256 + digit, left - tl.sum(tl.where(bins > digit, sizes, 0), 0)
        if tl.program_id(0) == 0:
            tl.store(table + STEP * 258, known)
            tl.store(table + STEP * 258 + 1, left)
        return known.to(tl.int32), left

    @triton.jit
    def histogram_kernel(
        acts, table, n, count, STEP: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Program i adds to the bins of digit STEP those of the numbers i * BLOCK + [0, BLOCK) that
        begin like `least`. The digit is 8 bits, SHIFT bits from the right."""
        known, _ = least_so_far(table, count, STEP)
        at, bins = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 256)
        bits = bits_of(acts, at, n)
        digit = bits >> SHIFT
        same = ((digit >> 8) == known) & (bits > 0)
        # Triton 3.2 has no mask for histograms: count the others in bin 0, and take them out
        sizes = tl.histogram(tl.where(same, digit & 255, 0), 256)
        sizes -= tl.where(bins == 0, BLOCK - tl.sum(same.to(tl.int32), 0), 0)
        tl.atomic_add(
            table + STEP * 258 + 2 + bins, sizes.to(tl.int64), mask=sizes > 0, sem="relaxed"
        )

    @triton.jit
    def count_kernel(acts, table, equals, least, n, count, STEP: tl.constexpr, BLOCK: tl.constexpr):
        """Program i writes to equals[i] how many of the numbers i * BLOCK + [0, BLOCK) equal
        `least`. The first program writes `least`."""
        known, _ = least_so_far(table, count, STEP)
        i = tl.program_id(0).to(tl.int64)
        bits = bits_of(acts, i * BLOCK + tl.arange(0, BLOCK), n)
        tl.store(equals + i, tl.sum(((bits == known) & (bits > 0)).to(tl.int32), 0))
        if i == 0:
            if least.dtype.element_ty == tl.float32:
                tl.store(least, known.to(tl.float32, bitcast=True))
            else:
                tl.store(least, known.to(tl.int16).to(least.dtype.element_ty, bitcast=True))

    @triton.jit
    def keep_kernel(acts, found, ends, kept, n, BLOCK: tl.constexpr):
        """Program i writes the numbers i * BLOCK + [0, BLOCK) of the result.

        found: the last row of the table, the bits of `least` and how many numbers that equal it are
        to be kept. ends[i]: how many numbers equal `least` in blocks 0 to i.
        """
        i = tl.program_id(0).to(tl.int64)
        known, left = tl.load(found).to(tl.int32), tl.load(found + 1)
        at = i * BLOCK + tl.arange(0, BLOCK)
        bits = bits_of(acts, at, n)
        equal = ((bits == known) & (bits > 0)).to(tl.int32)
        # the rank of each number among those that equal `least`, from 1 on
        rank = tl.load(ends + i) - tl.sum(equal, 0) + tl.cumsum(equal, 0)
        chosen = (bits > known) | ((equal > 0) & (rank <= left))
        x = tl.load(acts + at, mask=at < n, other=0.0)
        tl.store(kept + at, tl.where(chosen, x, 0.0), mask=at < n)


KEEP = dict(BLOCK=2048, num_warps=8)


def triton_keep_largest(acts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what `keep_largest` returns: launch a histogram for each digit, then `count_kernel`
    and `keep_kernel`."""
    acts = acts.contiguous()
    n = acts.numel()
    steps = acts.itemsize  # digits of 8 bits
    grid = (triton.cdiv(n, KEEP["BLOCK"]),)
    table = torch.zeros(steps + 1, 258, dtype=torch.int64, device=acts.device)
    equals = acts.new_empty(grid, dtype=torch.int32)
    kept = acts.new_empty(acts.shape)
    least = acts.new_empty(())
    with torch.cuda.device_of(acts):  # Triton launches on the current device
        for step in range(steps):
            shift = 8 * (steps - 1 - step)
            histogram_kernel[grid](acts, table, n, count, STEP=step, SHIFT=shift, **KEEP)
        count_kernel[grid](acts, table, equals, least, n, count, STEP=steps, **KEEP)
        keep_kernel[grid](acts, table[steps], equals.cumsum(0), kept, n, **KEEP)
    return kept, least


# ---- torch ----


class Bin(NamedTuple):
    """The bin of a histogram that holds the smallest number that is kept."""

    digit: int
    """Which bin; 0 if there are no numbers."""

    size: int
    """The count of numbers in it."""

    above: int
    """The count of numbers in all higher bins."""


def bin_of_least(digits: Tensor, count: int) -> Bin:
    """Return the bin that holds the `count`-th largest of the digits (n,), or the smallest if there
    are fewer. A digit of 0 means that the number is not there.

    For the digits 3, 1, 0, 3, 2 and count = 3 it gives Bin(digit=2, size=1, above=2).
    """
    sizes = torch.bincount(digits, minlength=1)
    sizes[0] = 0
    ends = sizes.cumsum(0)
    total = ends[-1]
    dropped = (total - count).clamp_(min=0)
    digit = int(torch.searchsorted(ends, dropped, right=True))  # the first bin past the dropped
    if digit == len(ends):
        return Bin(0, 0, 0)
    return Bin(digit, int(sizes[digit]), int(total - ends[digit]))


def bin_of_least_32(bits: Tensor, count: int) -> Bin:
    """Return what `bin_of_least` does for int32 numbers (n,), by two digits of 16 bits.

    The bins of the first digit are not split at multiples of 2^16: number p > 0 is in bin
    (p - 1) // 2^16 + 1, so that zeros alone are in bin 0. Bin b has the 2^16 numbers from
    (b - 1) 2^16 + 1 on.
    """
    high_digits = bits.sub(1).bitwise_right_shift_(16).add_(1)
    high = bin_of_least(high_digits, count)
    start = (high.digit - 1) << 16
    low_digits = bits[high_digits == high.digit] - start
    low = bin_of_least(low_digits, count - high.above)
    return Bin(start + low.digit, low.size, high.above + low.above)


def torch_keep_largest(acts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute what `keep_largest` returns, in torch."""
    if acts.itemsize == 2:
        bits = acts.flatten().view(torch.int16).clamp(min=0)
        least = bin_of_least(bits, count)
    else:
        bits = acts.flatten().view(torch.int32).clamp(min=0)
        least = bin_of_least_32(bits, count)

    F.threshold_(bits, least.digit - 1, 0)  # set what is below `least` to 0
    if least.above + least.size > count:
        # more numbers equal `least` than may stay: drop the last ones
        equal = (bits == least.digit).nonzero().flatten()
        bits[equal[count - least.above :]] = 0
    kept = bits.view(acts.dtype).view(acts.shape)
    return kept, bits.new_tensor(least.digit).view(acts.dtype)


# ---- public function ----


def keep_largest(acts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keep the `count` largest numbers of a whole batch, and set the others to zero.

    acts (N, K): fp32, bf16 or fp16, contiguous, not negative. count: at least 1.
    Returns kept (N, K), and the smallest number that is kept, (), 0 if no number is positive; both
    in the dtype of acts.

    For [[1, 3], [0, 2]] and count = 2 it gives [[0, 3], [0, 2]] and 2.
    """
    if triton is not None and acts.is_cuda:
        return triton_keep_largest(acts, count)
    return torch_keep_largest(acts, count)
