"""topk: the k largest activations of each row, exact, ties going to the lower index.

    top_acts[n], top_indices[n] = the k largest of relu(pre_acts[n]) and where they are         (N, k), (N, k)

A row with fewer than k positive numbers has zeros among its top_acts; these are not active, and what index they carry
means nothing.

On a GPU a program has one row. The bits of positive floats are in their order, so the k-th largest is found by bisection on
the bits: each count reads the row again, from the cache but for the first time, and it stops where a count is k. One more pass
writes what is above, in the order of the columns: no sort, no atomics.

In torch: the k largest of a row lie in those k groups of its columns whose largest numbers are largest, since whatever lies
elsewhere has k larger ones above it. So one pass writes the largest of each group, and only M / GROUP + k GROUP numbers are
selected from.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch twin does the work
    triton = None

GROUP = 16  # columns whose largest is looked at first


def largest(x, k):
    """The k largest of each row, as they come: values and indices. Which of equal ones is left open."""
    M = x.shape[1]
    if M % GROUP or M < 4 * k * GROUP:
        return x.topk(k, sorted=False)
    groups = x.view(len(x), GROUP, M // GROUP).amax(1).topk(k, sorted=False).indices  # of every M / GROUP-th column
    columns = (groups[:, :, None] + torch.arange(0, M, M // GROUP, device=x.device)).flatten(1)
    values, places = x.gather(1, columns).topk(k, sorted=False)
    return values, columns.gather(1, places)


def torch_topk(pre_acts, k, keys=None):
    """keys: int32 (N, M), where 16-bit numbers are made comparable; memory that is new each time costs 20 ms."""
    N, M = pre_acts.shape
    if pre_acts.dtype in (torch.bfloat16, torch.float16) and M <= 1 << 16:
        # In 16 bits the k-th place is tied in most rows. The bits of positive floats are in their order, so one integer
        # holds the number and, below it, how far from the last column it is: no two are alike.
        keys = torch.empty(N, M, dtype=torch.int32, device=pre_acts.device) if keys is None else keys
        keys.copy_(pre_acts.view(torch.int16)).mul_(1 << 16)
        keys.add_(torch.arange(M - 1, -1, -1, dtype=torch.int32, device=keys.device))
        best, _ = largest(keys, k)
        return F.relu((best >> 16).to(torch.int16).view(pre_acts.dtype)), M - 1 - (best & 0xFFFF).long()
    values, indices = largest(pre_acts, min(k + 1, M))  # one more than asked for shows whether the last place is tied
    if k < M:
        values, order = values.sort(1, descending=True)
        tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > 0)
        values, indices = values[:, :k], indices.gather(1, order[:, :k])
        if tied.any():
            whole = pre_acts[tied].sort(dim=1, descending=True, stable=True)
            values[tied], indices[tied] = whole.values[:, :k], whole.indices[:, :k]
    return F.relu(values), indices


if triton is not None:

    @triton.jit
    def bits_of(row, cols, M):
        """The bits of relu(row[cols]) as integers in the order of the numbers: int32; 0 past the end."""
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
            middle = high - (high - low) // 2  # the upper of two; `+ 1` would pass the largest int32 where there is a NaN
            count = tl.zeros((), tl.int32)
            for start in range(0, M, BLOCK):
                count += tl.sum((bits_of(row, start + cols, M) >= middle).to(tl.int32), 0)
            low = tl.where(count >= k, middle, low)
            high = tl.where(count == k, middle, tl.where(count > k, high, middle - 1))
        above = tl.zeros((), tl.int32)
        for start in range(0, M, BLOCK):
            above += tl.sum((bits_of(row, start + cols, M) > low).to(tl.int32), 0)
        written, left = tl.zeros((), tl.int32), k - above  # of those equal to the k-th, the first are taken
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


def triton_topk(pre_acts, k, keys=None):
    N, M = pre_acts.shape
    top_acts, top_indices = pre_acts.new_empty(N, k), pre_acts.new_empty(N, k, dtype=torch.int64)
    with torch.cuda.device_of(pre_acts):  # Triton launches on the current device
        topk_kernel[(N,)](pre_acts.contiguous(), top_acts, top_indices, M, k, **topk_blocks(M))
    return top_acts, top_indices


def topk(pre_acts, k, keys=None):
    """The k largest of relu(pre_acts) in each row: pre_acts (N, M) fp32, bf16 or fp16 -> (N, k) of its dtype, (N, k) int64.

    keys: memory that the torch twin may use, see there.
    """
    return (triton_topk if triton is not None and pre_acts.is_cuda else torch_topk)(pre_acts, k, keys)
