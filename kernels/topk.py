"""topk: the k largest activations of each row, exact, ties going to the lower index.

    top_acts[n], top_indices[n] = the k largest of relu(pre_acts[n]) and where they are         (N, k), (N, k)

A row with fewer than k positive numbers has zeros among its top_acts; these are not active, and
what index they carry means nothing.

On a GPU a program has one row. The bits of positive floats are in their order, so the k-th largest
is found by bisection on the bits: each count reads the row again, from the cache but for the first
time, and it stops where a count is k. One more pass writes what is above, in the order of the
columns: no sort, no atomics.

On a CPU: the k largest of a row lie in those k groups of its columns whose largest numbers are
largest, since whatever lies elsewhere has k larger ones above it. So one pass writes the largest of
each group of 16, the groups are selected from, then their members. The selection is NumPy's, whose
partition is 5 times as fast as torch.topk: 1.1 ms for 512 rows of 10240 bfloat16 numbers and k =
32, where torch.topk takes 3.6 (two CPU cores with AVX-512).
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch twin does the work
    triton = None

GROUP = 16  # columns whose largest is looked at first
SPARE = 48  # groups more than k, so that numbers equal to the k-th are mostly among the chosen


def largest(keys, k):
    """The k largest of each row of integers (N, M), as they come. NumPy does in 0.2 ms what
    torch.topk does in 0.95."""
    k = min(k, keys.shape[1])
    keys = keys.numpy()
    keys.partition(keys.shape[1] - k, axis=1)
    return torch.from_numpy(keys[:, keys.shape[1] - k :])


def choose(bits, k, spare=SPARE):
    """The k largest of each row of integers (N, M), and their columns; of equal ones those of the
    lowest columns."""
    (N, M), n = bits.shape, bits.shape[1] // GROUP
    wide, shift = (
        (torch.int32, 16) if bits.dtype == torch.int16 and M <= 1 << 16 else (torch.int64, 32)
    )
    low = (
        1 << shift
    ) - 1  # a key is a number and, in its lower bits, where it stood: no two are alike
    columns, least = torch.arange(M, dtype=wide).expand(N, M), None
    grouped = 4 * (k + spare) < 3 * n
    if grouped:
        groups = bits[:, : n * GROUP].unflatten(1, (GROUP, n)).amax(1).to(wide) << shift
        groups = largest(groups.add_(torch.arange(n, dtype=wide)), k + spare)
        least = (groups >> shift).amin(
            1
        )  # the smallest of the largest numbers of the groups that are chosen
        members = torch.arange(0, n * GROUP, n, dtype=wide)  # columns that are n apart are a group
        columns = ((groups & low)[:, None] + members[:, None]).flatten(1)
        if n * GROUP < M:
            columns = torch.cat([columns, torch.arange(n * GROUP, M, dtype=wide).expand(N, -1)], 1)
    keys = (bits.gather(1, columns.long()) if grouped else bits).to(wide) << shift
    keys = largest(keys.add_(low - columns), k)
    values, columns = keys >> shift, low - (keys & low).long()
    if grouped:
        last = values.amin(1)
        tied = (
            ((least >= last) & (last > 0)).nonzero().flatten()
        )  # an equal one may be in another group: look at more of them
        if len(tied):
            again = choose(bits[tied], k, 4 * spare)
            values[tied], columns[tied] = again[0].to(wide), again[1]
    return values.to(bits.dtype), columns


def torch_topk(pre_acts, k):
    if pre_acts.device.type != "cpu":
        values, indices = pre_acts.relu().sort(dim=1, descending=True, stable=True)
        return values[:, :k], indices[:, :k]
    # Bits of positive floats are in the order of the numbers. As integers they are compared faster
    # than 16-bit floats.
    values, indices = choose(pre_acts.view({2: torch.int16, 4: torch.int32}[pre_acts.itemsize]), k)
    return F.relu(values.view(pre_acts.dtype)), indices


if triton is not None:

    @triton.jit
    def bits_of(row, cols, M):
        """The bits of relu(row[cols]) as integers in the order of the numbers: int32; 0 past the
        end."""
        x = tl.load(row + cols, mask=cols < M, other=0.0)
        if x.dtype == tl.float32:  # noqa: SIM108  decided when the kernel is compiled
            bits = x.to(tl.int32, bitcast=True)
        else:
            bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        return tl.maximum(bits, 0)  # the sign is the first bit

    @triton.jit
    def topk_kernel(pre_acts, top_acts, top_indices, M, k, BLOCK: tl.constexpr):
        """Program n: the k largest of row n, in the order of their columns."""
        n = tl.program_id(0).to(tl.int64)
        row, cols = pre_acts + n * M, tl.arange(0, BLOCK)
        high = tl.zeros((), tl.int32)
        for start in range(0, M, BLOCK):
            high = tl.maximum(high, tl.max(bits_of(row, start + cols, M), 0))
        low = tl.zeros((), tl.int32)  # at least k numbers have bits >= low, fewer have bits > high
        while low < high:
            middle = (
                high - (high - low) // 2
            )  # the upper of two; `+ 1` would pass the largest int32 where there is a NaN
            count = tl.zeros((), tl.int32)
            for start in range(0, M, BLOCK):
                count += tl.sum((bits_of(row, start + cols, M) >= middle).to(tl.int32), 0)
            low = tl.where(count >= k, middle, low)
            high = tl.where(count == k, middle, tl.where(count > k, high, middle - 1))
        above = tl.zeros((), tl.int32)
        for start in range(0, M, BLOCK):
            above += tl.sum((bits_of(row, start + cols, M) > low).to(tl.int32), 0)
        written, left = (
            tl.zeros((), tl.int32),
            k - above,
        )  # of those equal to the k-th, the first are taken
        for start in range(0, M, BLOCK):
            at = start + cols
            bits = bits_of(row, at, M)
            equal = ((bits == low) & (at < M)).to(tl.int32)
            chosen = ((bits > low) | ((equal > 0) & (tl.cumsum(equal, 0) <= left))).to(tl.int32)
            place = n * k + written + tl.cumsum(chosen, 0) - 1
            x = tl.load(row + at, mask=at < M, other=0.0)
            tl.store(top_acts + place, tl.where(bits > 0, x, 0.0), mask=chosen > 0)
            tl.store(top_indices + place, at.to(tl.int64), mask=chosen > 0)
            written += tl.sum(chosen, 0)
            left -= tl.sum(equal * chosen, 0)


def topk_blocks(M):
    BLOCK = min(4096, max(16, triton.next_power_of_2(M)))
    return dict(BLOCK=BLOCK, num_warps=8 if BLOCK > 512 else 4)


def triton_topk(pre_acts, k):
    N, M = pre_acts.shape
    top_acts, top_indices = pre_acts.new_empty(N, k), pre_acts.new_empty(N, k, dtype=torch.int64)
    with torch.cuda.device_of(pre_acts):  # Triton launches on the current device
        topk_kernel[(N,)](pre_acts.contiguous(), top_acts, top_indices, M, k, **topk_blocks(M))
    return top_acts, top_indices


def topk(pre_acts, k):
    """The k largest of relu(pre_acts) in each row: pre_acts (N, M) fp32, bf16 or fp16 -> (N, k) of
    its dtype, (N, k) int64."""
    return (triton_topk if triton is not None and pre_acts.is_cuda else torch_topk)(pre_acts, k)
