"""topk: the k largest activations of each row, exact, ties going to the lower index.

    top_acts[n], top_indices[n] = the k largest of relu(pre_acts[n]) and where they are         (N, k), (N, k)

A row with fewer than k positive numbers has zeros among its top_acts; these are not active, and what index they carry
means nothing.

The k largest of a row lie in those k groups of its columns whose largest numbers are largest: whatever lies elsewhere has k
larger ones above it. So one pass writes the largest of each group, and only M / GROUP + k GROUP numbers are selected from.
"""

import torch
import torch.nn.functional as F

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


topk = torch_topk
