"""How fit activations are to train on: mean, outliers, steps, rank, and the latents that would start out dead.

    gamma          = |mean| / |std|                     norms over the d dimensions; above 1 the common mean rules
    effective rank = (sum l)^2 / sum l^2                l: eigenvalues of the covariance; 1 to d, as many if all were equal
    dead           = share of latents that are among the k largest of no vector, or only with a zero

x (N, d) is a sample of training vectors, M latents, k of them active. Statistics are made in float64.

Sources: gamma and what it does at the start, Simon et al. 2026 (arXiv 2605.31518).
"""

import math

import numpy as np
import torch

from errors import UsageError
from metrics import count_active, middle
from sae import Sae

SAMPLE = 65_536  # vectors that everything is measured on
CHUNK = 2048  # of them at once
OUTLIER = 10  # times the median RMS of a dimension
FEW_UPDATES, FEW_VECTORS, UNEVEN, MANY_DEAD, REPEATED, NEAR_OVERFLOW = 1000, 100, 3, 0.2, 0.01, 30_000  # see `warnings`


def moments(x):
    """Mean (d,) and covariance (d, d) of x (N, d), in float64; divided by N."""
    mean = x.mean(0, dtype=torch.float64)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in x.split(CHUNK):
        part = part.double() - mean
        covariance.addmm_(part.T, part)
    return mean, covariance / len(x)


def gamma(mean, variance):
    """Outlier severity |mean| / |std|, of (d,) and (d,); infinite where nothing varies."""
    return (mean.norm() / variance.sum().sqrt()).item()


def effective_rank(eigenvalues):
    """Participation ratio (sum l)^2 / sum l^2 of the covariance's eigenvalues (d,)."""
    return (eigenvalues.sum().square() / eigenvalues.square().sum()).item()


def outliers(mean, variance):
    """Dimensions whose RMS is above OUTLIER times the median of those that are not 0, largest first; their share of the power."""
    power = mean.square() + variance
    rms = power.sqrt()
    found = rms > OUTLIER * rms[rms > 0].median()
    dims = torch.argsort(rms, descending=True)[: int(found.sum())]
    return dims.tolist(), (power[dims].sum() / power.sum()).item()


def rms_by_step(x, step, num_steps):
    """Root mean square of the numbers of each step's vectors: (N, d), int64 (N,) -> float64 (num_steps,), NaN where none is."""
    squares = torch.cat([part.double().square().mean(1) for part in x.split(CHUNK)])
    sums = torch.zeros(num_steps, dtype=torch.float64).index_add_(0, step, squares)
    return (sums / torch.bincount(step, minlength=num_steps)).sqrt()


def start(x, num_latents, k, center="median", seed=0):
    """The SAE that training on x (N, d) begins with, of x as it is: no scale changes which latents are the k largest.

    center: where b_dec starts - at the geometric median, the mean, or none: 0.
    """
    sae = Sae(x.shape[1], num_latents, k, seed=seed).to(x.device)
    sae.b_dec.data.copy_(middle(x, center))
    return sae


def input_scale(sae, x):
    """The power of two that brings x - b_dec nearest to an RMS of 1."""
    squares = sum((part - sae.b_dec.data).square().sum().item() for part in x.split(CHUNK))
    return 2.0 ** -round(math.log2(squares / x.numel()) / 2)


@torch.no_grad()
def count_fires(sae, x):
    """On how many of the vectors x (N, d) each latent is active: int64 (M,)."""
    return sum(count_active(*sae.encode(part), sae.num_latents) for part in x.split(CHUNK)).cpu()


def dead_share(fires):
    """Share of the latents that are active on no vector: (M,)."""
    return (fires == 0).double().mean().item()


def draw(activations, seed=0):
    """SAMPLE training vectors in random order: x float32 (N, d), the step of each (N,) or None, how many were not finite.

    Those are left out. Raises UsageError where none is left.
    """
    pieces = activations.draw(SAMPLE, seed)
    x = activations.read(pieces).float()
    finite = x.isfinite().all(1).nonzero().flatten()
    if not len(finite):
        raise UsageError(f"{activations.paths[0]}: all {len(x)} sampled vectors hold NaN or inf; collect it again")
    order = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(seed))]
    step = torch.from_numpy(activations.steps_of(pieces))[order] if activations.timesteps else None
    return x[order], step, len(x) - len(order)


def report(activations, k, num_latents, device="cpu", center="median", seed=0, drawn=None):
    """Everything that is measured of a data set before training: a dict for JSON, but for "fires".

    dead and fires: by centring - the one asked for and "none", or "median" where that is asked for - of the SAE at its
    start, on as many vectors as are held out, SAMPLE at most. drawn: what `draw` gave. Raises UsageError where nothing
    can be learned.
    """
    x, step, not_finite = drawn or draw(activations, seed)
    mean, covariance = moments(x)
    variance, constant = covariance.diagonal(), x.amin(0) == x.amax(0)
    power, (dims, outlier_power) = mean.square() + variance, outliers(mean, variance)
    if constant.all() or power.sum() * len(x) > torch.finfo(torch.float32).max:
        raise UsageError(f"{activations.paths[0]}: the sampled vectors are all equal or too large; nothing can be learned")
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
    found = {
        "data": activations.paths, "hook_name": activations.hook_name,
        "dtype": "bfloat16" if activations.dtype == np.uint16 else str(activations.dtype),
        "d": activations.d, "num_vectors": activations.num_vectors, "num_training": activations.num_training,
        "num_held_out": activations.num_held_out, "num_sampled": len(x), "not_finite": not_finite,
        "repeated": 1 - len({hash(row.tobytes()) for row in x.numpy()}) / len(x),
        "constant_dims": constant.nonzero().flatten().tolist(),
        "largest": max(part.abs().max().item() for part in x.split(CHUNK)), "rms": power.mean().sqrt().item(),
        "gamma": gamma(mean, variance), "outlier_dims": dims, "outlier_power": outlier_power,
        "largest_mean": share_of_largest(mean.square()), "largest_variance": share_of_largest(variance),
        "effective_rank": effective_rank(eigenvalues), "eigenvalues": eigenvalues.tolist(),
        "mean": mean.tolist(), "variance": variance.tolist(),
    }  # fmt: skip
    if step is not None:
        rms, spread = (rms_by_step(y, step, len(activations.timesteps)) for y in (x, x - mean.float()))
        seen = (rms >= 0).nonzero().flatten().tolist()  # few vectors need not be of every step
        found["timesteps"] = [activations.timesteps[i] for i in seen]
        found |= {"rms_by_step": rms[seen].tolist(), "spread_by_step": spread[seen].tolist()}
    else:
        percent = torch.linspace(0, 1, 101, dtype=torch.float64)
        squares = torch.cat([part.double().square().mean(1) for part in x.split(CHUNK)])
        found["rms_percentiles"] = squares.sqrt().quantile(percent).tolist()
    counted = min(len(x), activations.num_held_out)
    found |= {"k": k, "num_latents": num_latents, "center": center, "num_counted": counted, "dead": {}, "fires": {}}
    x = x.to(device)
    for way in (center, "none" if center != "none" else "median"):
        fires = count_fires(start(x, num_latents, k, way, seed), x[:counted])
        found["dead"][way], found["fires"][way] = {"start": dead_share(fires)}, {"start": fires}
    return found


def share_of_largest(power):
    """Which of the dimensions (d,) has most, and what share of the sum."""
    return [int(power.argmax()), (power.max() / power.sum().clamp_min(torch.finfo(power.dtype).tiny)).item()]


def ratio(values):
    """The largest of a list over the smallest."""
    return max(values) / min(values) if min(values) else math.inf


def warnings(found):
    """What of a report is wrong, and what to do about it: a list of lines, empty if all is well."""
    lines, n, M = [], found["num_sampled"], found["num_latents"]
    if bad := found["not_finite"]:
        lines.append(f"{bad:,} of {n + bad:,} sampled vectors hold NaN or inf, which train.py refuses; collect again")
    if found["dtype"] == "float16" and found["largest"] > NEAR_OVERFLOW:
        reach = f"|x| reaches {found['largest']:,.0f}, float16 ends at 65,504"
        lines.append(f"{reach}; collect again with --store_dtype float32 or bfloat16")
    if dims := found["constant_dims"]:
        lines.append(f"{len(dims)} of {found['d']} dimensions never change")
    if found["repeated"] > REPEATED:
        lines.append(f"{found['repeated']:.1%} of the sampled vectors are copies of another: padding, or the same file twice?")
    if "timesteps" in found and (times := ratio(found["spread_by_step"])) > UNEVEN:
        lines.append(
            f"about the mean, steps differ {times:.1f} times in RMS, {times**2:.0f} in loss; consider --loss_weight per_step"
        )
    dead = {way: shares.get("trained", shares["start"]) for way, shares in found["dead"].items()}
    tried = "trained" in found["dead"][found["center"]]
    here, there = dead.pop(found["center"]), dead.popitem()
    if found["center"] == "none" and found["gamma"] > 1:
        shares = f"{there[1]:.0%} of the latents {'end' if tried else 'start out'} dead, not {here:.0%}"
        lines.append(f"gamma is {found['gamma']:.1f}: with --center {there[0]}, {shares}")
    elif here > MANY_DEAD:
        lines.append(f"{here:.0%} of the latents {'end' if tried else 'start out'} dead; fewer --num_latents, or more data")
    if found["num_training"] < FEW_VECTORS * M:
        lines.append(f"{found['num_training'] / M:.0f} training vectors a latent are few; fewer --num_latents, or more prompts")
    if (updates := found.get("updates", FEW_UPDATES)) < FEW_UPDATES:
        lines.append(f"{updates} updates are few; more prompts, or {-(-FEW_UPDATES // updates)} times as many --num_epochs")
    return lines


def summary(found):
    """A report in at most three lines: the data, the latents, and the first warning if there is one."""
    steps = f", RMS by step within a factor of {ratio(found['rms_by_step']):.1f}" if "timesteps" in found else ""
    rank = f"effective rank {found['effective_rank']:.1f} of {found['d']}"
    lines = [f"data      gamma {found['gamma']:.2f}, {len(found['outlier_dims'])} outlier dimensions, {rank}{steps}"]
    words = {"median": "with b_dec at the geometric median", "mean": "with b_dec at the mean", "none": "without centring"}
    shares = [f"{shares['start']:.1%} {words[way]}" for way, shares in found["dead"].items()]
    lines.append(f"dead      at the start {', '.join(shares)}, of {found['num_latents']} latents")
    if wrong := warnings(found):
        more = f" ({len(wrong) - 1} more: python diagnose.py)" if len(wrong) > 1 else ""
        lines.append(f"warning   {wrong[0]}{more}")
    return lines
