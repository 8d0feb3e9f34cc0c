"""threshold: BatchTopK's selection, the `count` largest activations of a whole batch, exact, ties
going to the earlier place.

    kept[n, j] = acts[n, j] if it is among the `count` largest of all of acts, else 0        (N, K)
    least      = the smallest number that is kept, 0 if none is                              ()

Zeros are never among them, so where fewer than `count` numbers are positive, these are what is
kept.

The bits of positive floats are in their order, so `least` is found digit by digit from the top: of
the numbers that agree with it so far, a histogram of the next digit says in which bin it lies and
how many are to be taken from there. On a GPU a digit has 8 bits, so float32 is read four times and
16-bit numbers twice, from the cache where they fit; then one pass counts what equals `least`, block
by block, and one writes. No sort; the host waits for nothing, so a CUDA graph can hold it; the
atomics are on integers, whose sums do not depend on their order.

In torch a digit has 16 bits, since bincount hardly feels how many bins there are: of 131,072
numbers 32,768 are kept in 0.3 ms (float32) or 0.2 (16 bits) in whatever order they come, where topk
takes 0.9 to 1.5 (0.2 to 0.5 if rows are sorted), kthvalue alone 0.8 to 2 and sort 7 to 9 (one CPU
core).

Source: Bussmann et al. 2024 (arXiv 2412.06410).
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl

    from kernels.topk import bits_of
except ImportError:  # macOS, Windows: the torch twin does the work
    triton = None


if triton is not None:

    @triton.jit
    def least_so_far(table, count, STEP: tl.constexpr):
        """The first STEP digits of `least`, and how many of the numbers that begin with them are to
        be kept.

        table: a row for each step, of what was known before it and the 256 bins of its digit.
        """
        known, left = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + count
        if STEP > 0:
            row, bins = table + (STEP - 1) * 258, tl.arange(0, 256)
            known, left, sizes = tl.load(row), tl.load(row + 1), tl.load(row + 2 + bins)
            dropped = tl.maximum(tl.sum(sizes, 0) - left, 0)
            digit = (
                tl.sum((tl.cumsum(sizes, 0) <= dropped).to(tl.int32), 0) & 255
            )  # 0, not 256, where there is nothing
            known, left = known * 256 + digit, left - tl.sum(tl.where(bins > digit, sizes, 0), 0)
        if tl.program_id(0) == 0:
            tl.store(table + STEP * 258, known)
            tl.store(table + STEP * 258 + 1, left)
        return known.to(tl.int32), left

    @triton.jit
    def histogram_kernel(
        acts, table, n, count, STEP: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Program i: the digit's bins over numbers i * BLOCK + [0, BLOCK) that begin like
        `least`."""
        known, _ = least_so_far(table, count, STEP)
        at, bins = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 256)
        bits = bits_of(acts, at, n)
        digit = bits >> SHIFT
        same = ((digit >> 8) == known) & (bits > 0)
        sizes = tl.histogram(tl.where(same, digit & 255, 0), 256)
        sizes -= tl.where(
            bins == 0, BLOCK - tl.sum(same.to(tl.int32), 0), 0
        )  # the others; Triton 3.2 has no mask for them
        tl.atomic_add(
            table + STEP * 258 + 2 + bins, sizes.to(tl.int64), mask=sizes > 0, sem="relaxed"
        )

    @triton.jit
    def count_kernel(acts, table, equals, least, n, count, STEP: tl.constexpr, BLOCK: tl.constexpr):
        """Program i: how many of numbers i * BLOCK + [0, BLOCK) equal `least`; the first one writes
        it down."""
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
        """Program i: numbers i * BLOCK + [0, BLOCK) of the result. ends[i]: how many equal `least`
        in blocks 0 to i."""
        i = tl.program_id(0).to(tl.int64)
        known, left = tl.load(found).to(tl.int32), tl.load(found + 1)
        at = i * BLOCK + tl.arange(0, BLOCK)
        bits = bits_of(acts, at, n)
        equal = ((bits == known) & (bits > 0)).to(tl.int32)
        rank = tl.load(ends + i) - tl.sum(equal, 0) + tl.cumsum(equal, 0)  # from 1 on, among them
        chosen = (bits > known) | ((equal > 0) & (rank <= left))
        x = tl.load(acts + at, mask=at < n, other=0.0)
        tl.store(kept + at, tl.where(chosen, x, 0.0), mask=at < n)


KEEP = dict(BLOCK=2048, num_warps=8)


def triton_keep_largest(acts, count):
    acts = acts.contiguous()
    n, steps = acts.numel(), acts.itemsize
    grid = (triton.cdiv(n, KEEP["BLOCK"]),)
    table = torch.zeros(steps + 1, 258, dtype=torch.int64, device=acts.device)
    equals = acts.new_empty(grid, dtype=torch.int32)
    kept, least = acts.new_empty(acts.shape), acts.new_empty(())
    with torch.cuda.device_of(acts):  # Triton launches on the current device
        for step in range(steps):
            histogram_kernel[grid](
                acts, table, n, count, STEP=step, SHIFT=8 * (steps - 1 - step), **KEEP
            )
        count_kernel[grid](acts, table, equals, least, n, count, STEP=steps, **KEEP)
        keep_kernel[grid](acts, table[steps], equals.cumsum(0), kept, n, **KEEP)
    return kept, least


def place_of_least(places, count):
    """The place of the smallest number kept, how many it has, and how many are above; 0 if none.
    Place 0 is not counted."""
    sizes = torch.bincount(places, minlength=1)
    sizes[0] = 0
    ends = sizes.cumsum(0)
    place = int(
        torch.searchsorted(ends, (ends[-1] - count).clamp_(min=0), right=True)
    )  # the first past what is dropped
    return (
        (place, int(sizes[place]), int(ends[-1] - ends[place])) if place < len(ends) else (0, 0, 0)
    )


def torch_keep_largest(acts, count):
    bits = acts.flatten().view(torch.int16 if acts.itemsize == 2 else torch.int32).clamp(min=0)
    if acts.itemsize == 2:
        least, equal, above = place_of_least(bits, count)
    else:
        places = (
            bits.sub(1).bitwise_right_shift_(16).add_(1)
        )  # p has the bits above (p - 1) << 16 up to p << 16, 0 has zero
        place, _, above = place_of_least(places, count)
        start = (place - 1) << 16
        low, equal, more = place_of_least(bits[places == place] - start, count - above)
        least, above = start + low, above + more
    F.threshold_(bits, least - 1, 0)
    if above + equal > count:
        bits[(bits == least).nonzero().flatten()[count - above :]] = 0
    return bits.view(acts.dtype).view(acts.shape), bits.new_tensor(least).view(acts.dtype)


def keep_largest(acts, count):
    """The `count` largest numbers of a whole batch, the others set to zero.

    acts (N, K): fp32, bf16 or fp16, contiguous, none negative. count: at least 1. Returns kept (N,
    K) and the smallest number kept, a 0-d tensor (0 if no number is positive), both of the dtype of
    acts.
    """
    return (triton_keep_largest if triton is not None and acts.is_cuda else torch_keep_largest)(
        acts, count
    )
