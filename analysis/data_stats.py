"""What training and diagnosis measure of the data: centre, scale, outliers, steps, rank, latents
that would start out dead.

    gamma          = |mean| / |std|                     norms over the d dimensions; above 1 the common mean rules
    effective rank = (sum l)^2 / sum l^2                l: eigenvalues of the covariance; 1 to d, as many if all were equal
    dead           = share of latents that are among the k largest of no vector, or only with a zero

x (N, d) is a sample of training vectors, M latents, k of them active. Statistics are made in
float64.

Sources: gamma and what it does at the start, Simon et al. 2026 (arXiv 2605.31518).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from analysis.metrics import count_active
from errors import UsageError
from sae import Sae

TRAINING_SAMPLE = 32_768  # vectors that training checks, and takes b_dec's start and the scale from
SAMPLE = 65_536  # vectors that a diagnosis is made of
CHUNK = 2048  # of them at once
OUTLIER = 10  # times the median RMS of a dimension
FEW_UPDATES, FEW_VECTORS, UNEVEN, MANY_DEAD, REPEATED, NEAR_OVERFLOW = (
    1000,
    100,
    3,
    0.2,
    0.01,
    30_000,
)  # see `warnings`


@dataclass(frozen=True)
class DataStats:
    """What training has to know of a data set: the SAE is trained on scale * x."""

    scale: float
    """A power of two that brings |x - center| near 1, so that folding it into the biases is
    exact."""

    center: torch.Tensor
    """(d,): where b_dec starts, of scaled vectors."""

    variance: float
    """Mean |x - mean|^2 of scaled vectors: what the squared error is divided by."""

    weights: list[float] | None
    """Of the error at each timestep; None: 1."""

    gamma: float
    """|mean| / |std| of the vectors as they are: see the top."""


def measure(
    dataset, center, input_unit_norm=False, per_step=False, seed=0, device="cpu"
) -> DataStats:
    """The DataStats of a sample of TRAINING_SAMPLE vectors.

    center: "median", "mean" or "none", see `middle`. per_step: with weights that even the timesteps
    out. Raises UsageError for NaN or inf, vectors that are all equal, and per_step without
    timesteps.
    """
    name, pieces = dataset.paths[0], dataset.draw(TRAINING_SAMPLE, seed)
    x = dataset.read(pieces).float().to(device)
    if bad := len(x) - int(x.isfinite().all(1).sum()):
        raise UsageError(
            f"{name}: {bad} of {len(x)} sampled vectors hold NaN or inf; collect it again"
        )
    severity = gamma(x.mean(0), x.var(0, correction=0))
    if input_unit_norm:
        x = Sae(dataset.d, 1, 1, {"input_unit_norm": True}).standardize(x)[0]
    b_dec = middle(x, center)
    spread = rms_about(x, b_dec)
    if not 0 < spread < math.inf:
        raise UsageError(
            f"{name}: the sampled vectors are all equal or too large (spread {spread}); nothing can be learned"
        )

    scale = 1.0 if input_unit_norm else power_of_two(spread)
    variance = scale**2 * (x - x.mean(0)).square().sum(1).mean().item()
    weights = weights_by_step(dataset, pieces, x - b_dec) if per_step else None
    return DataStats(scale, b_dec * scale, variance, weights, severity)


def weights_by_step(dataset, pieces, x):
    """The mean square of x (N, d), less the centre, over that of each timestep's vectors: [float].
    pieces: where x was read."""
    if not dataset.timesteps:
        raise UsageError(
            f"{dataset.paths[0]} has no timesteps; --loss_weight per_step needs a file of collect.py"
        )
    square = x.square().mean(1).cpu()
    step = torch.from_numpy(dataset.steps_of(pieces))
    return [
        (square.mean() / square[step == s].mean()).item() for s in range(len(dataset.timesteps))
    ]


def rms_about(x, center):
    """Root mean square of the numbers of x - center: (N, d), (d,) -> float."""
    return (x - center).square().mean().sqrt().item()


def power_of_two(spread):
    """The power of two that brings vectors of this RMS nearest to 1."""
    return 2.0 ** -round(math.log2(spread))


def middle(x, center):
    """What stands in the middle of x (N, d): its "median" (geometric) or "mean", or "none": 0.
    (d,)"""
    return {
        "median": geometric_median,
        "mean": lambda x: x.mean(0),
        "none": lambda x: torch.zeros_like(x[0]),
    }[center](x)


def geometric_median(x, iterations=100, tolerance=1e-5):
    """The point with the least sum of distances to the vectors of x: (N, d) -> (d,), by Weiszfeld's
    iteration (1937).

    Unlike the mean it is not dragged along by a few huge vectors. Stops when a step is below
    `tolerance` of the mean distance to the vectors.
    """
    median = x.mean(0)
    for _ in range(iterations):
        distance = (x - median).norm(dim=1)
        scale = distance.mean()
        if scale == 0:  # all vectors are equal
            break
        nearness = scale / distance.clamp_min(1e-6 * scale)
        previous, median = median, nearness @ x / nearness.sum()
        if (median - previous).norm() <= tolerance * scale:
            break
    return median


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
    """Dimensions whose RMS is above OUTLIER times the median of those that are not 0, largest
    first; their share of the power."""
    power = mean.square() + variance
    rms = power.sqrt()
    found = rms > OUTLIER * rms[rms > 0].median()
    dims = torch.argsort(rms, descending=True)[: int(found.sum())]
    return dims.tolist(), (power[dims].sum() / power.sum()).item()


def rms_by_step(x, step, num_steps):
    """Root mean square of the numbers of each step's vectors: (N, d), int64 (N,) -> float64
    (num_steps,), NaN where none is."""
    squares = torch.cat([part.double().square().mean(1) for part in x.split(CHUNK)])
    sums = torch.zeros(num_steps, dtype=torch.float64).index_add_(0, step, squares)
    return (sums / torch.bincount(step, minlength=num_steps)).sqrt()


def start(x, num_latents, k, center="median", seed=0):
    """The SAE that training on x (N, d) begins with, of x as it is: no scale changes which latents
    are the k largest.

    center: where b_dec starts - at the geometric median, the mean, or none: 0.
    """
    sae = Sae(x.shape[1], num_latents, k, seed=seed).to(x.device)
    sae.b_dec.data.copy_(middle(x, center))
    return sae


@torch.no_grad()
def count_fires(sae, x):
    """On how many of the vectors x (N, d) each latent is active: int64 (M,)."""
    return sum(count_active(*sae.encode(part), sae.num_latents) for part in x.split(CHUNK)).cpu()


def dead_share(fires):
    """Share of the latents that are active on no vector: (M,)."""
    return (fires == 0).double().mean().item()


def draw(dataset, seed=0):
    """SAMPLE training vectors in random order: x float32 (N, d), the step of each (N,) or None, how
    many were not finite.

    Those are left out. Raises UsageError where none is left.
    """
    pieces = dataset.draw(SAMPLE, seed)
    x = dataset.read(pieces).float()
    finite = x.isfinite().all(1).nonzero().flatten()
    if not len(finite):
        raise UsageError(
            f"{dataset.paths[0]}: all {len(x)} sampled vectors hold NaN or inf; collect it again"
        )
    order = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(seed))]
    step = torch.from_numpy(dataset.steps_of(pieces))[order] if dataset.timesteps else None
    return x[order], step, len(x) - len(order)


def report(dataset, k, num_latents, device="cpu", center="median", seed=0, drawn=None):
    """Everything that is measured of a data set before training: a dict for JSON, but for "fires".

    dead and fires: by centring - the one asked for and "none", or "median" where that is asked for
    - of the SAE at its start, on as many vectors as are held out, SAMPLE at most. drawn: what
    `draw` gave. Raises UsageError where nothing can be learned.
    """
    x, step, not_finite = drawn or draw(dataset, seed)
    mean, covariance = moments(x)
    check_spread(dataset.paths[0], x, mean, covariance.diagonal())

    found = describe(dataset) | {"num_sampled": len(x), "not_finite": not_finite}
    found |= describe_values(x) | describe_moments(mean, covariance)
    found |= describe_norms(x) if step is None else describe_steps(x, step, mean, dataset.timesteps)

    counted = min(len(x), dataset.num_held_out)
    found |= {
        "k": k,
        "num_latents": num_latents,
        "center": center,
        "num_counted": counted,
        "dead": {},
        "fires": {},
    }
    x = x.to(device)
    for way in (center, "none" if center != "none" else "median"):
        fires = count_fires(start(x, num_latents, k, way, seed), x[:counted])
        found["dead"][way] = {"start": dead_share(fires)}
        found["fires"][way] = {"start": fires}
    return found


def check_spread(name, x, mean, variance):
    """Raise UsageError where nothing can be learned of x (N, d): all equal, or squares that float32
    does not hold."""
    power = mean.square() + variance
    constant = (x.amin(0) == x.amax(0)).all()
    vanishes = not rms_about(x, mean.float()) > 0
    if constant or vanishes or power.sum() * len(x) > torch.finfo(torch.float32).max:
        raise UsageError(
            f"{name}: the sampled vectors are all equal or too large or small; nothing can be learned"
        )


def describe(dataset):
    """What files and sizes a data set has."""
    return {
        "data": dataset.paths,
        "hook_name": dataset.hook_name,
        "dtype": "bfloat16" if dataset.dtype == np.uint16 else str(dataset.dtype),
        "d": dataset.d,
        "num_vectors": dataset.num_vectors,
        "num_training": dataset.num_training,
        "num_held_out": dataset.num_held_out,
    }


def describe_values(x):
    """Copies, dimensions that never change, and the largest number of x (N, d)."""
    different = {hash(row.tobytes()) for row in x.numpy()}
    constant = x.amin(0) == x.amax(0)
    return {
        "repeated": 1 - len(different) / len(x),
        "constant_dims": constant.nonzero().flatten().tolist(),
        "largest": max(part.abs().max().item() for part in x.split(CHUNK)),
    }


def describe_moments(mean, covariance):
    """What the mean (d,) and the covariance (d, d) say."""
    variance = covariance.diagonal()
    dims, outlier_power = outliers(mean, variance)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
    return {
        "rms": (mean.square() + variance).mean().sqrt().item(),
        "gamma": gamma(mean, variance),
        "outlier_dims": dims,
        "outlier_power": outlier_power,
        "largest_mean": share_of_largest(mean.square()),
        "largest_variance": share_of_largest(variance),
        "effective_rank": effective_rank(eigenvalues),
        "eigenvalues": eigenvalues.tolist(),
        "mean": mean.tolist(),
        "variance": variance.tolist(),
    }


def describe_steps(x, step, mean, timesteps):
    """RMS by timestep of x (N, d), as it is and about its mean; only of those that occur, which few
    vectors need not all."""
    rms = rms_by_step(x, step, len(timesteps))
    spread = rms_by_step(x - mean.float(), step, len(timesteps))
    seen = (rms >= 0).nonzero().flatten().tolist()
    times = [timesteps[i] for i in seen]
    return {
        "timesteps": times,
        "rms_by_step": rms[seen].tolist(),
        "spread_by_step": spread[seen].tolist(),
    }


def describe_norms(x):
    """Percentiles of the vectors' RMS, where there are no timesteps."""
    squares = torch.cat([part.double().square().mean(1) for part in x.split(CHUNK)])
    percent = torch.linspace(0, 1, 101, dtype=torch.float64)
    return {"rms_percentiles": squares.sqrt().quantile(percent).tolist()}


def share_of_largest(power):
    """Which of the dimensions (d,) has most, and what share of the sum."""
    return [
        int(power.argmax()),
        (power.max() / power.sum().clamp_min(torch.finfo(power.dtype).tiny)).item(),
    ]


def ratio(values):
    """The largest of a list over the smallest."""
    return max(values) / min(values) if min(values) else math.inf


def warnings(found):
    """What of a report is wrong, and what to do about it: a list of lines, empty if all is well."""
    lines, n, M = [], found["num_sampled"], found["num_latents"]
    if bad := found["not_finite"]:
        lines.append(
            f"{bad:,} of {n + bad:,} sampled vectors hold NaN or inf, which train.py refuses; collect again"
        )
    if found["dtype"] == "float16" and found["largest"] > NEAR_OVERFLOW:
        reach = f"|x| reaches {found['largest']:,.0f}, float16 ends at 65,504"
        lines.append(f"{reach}; collect again with --store_dtype float32 or bfloat16")
    if dims := found["constant_dims"]:
        lines.append(f"{len(dims)} of {found['d']} dimensions never change")
    if found["repeated"] > REPEATED:
        lines.append(
            f"{found['repeated']:.1%} of the sampled vectors are copies of another: padding, or the same file twice?"
        )
    if "timesteps" in found and (times := ratio(found["spread_by_step"])) > UNEVEN:
        lines.append(
            f"about the mean, steps differ {times:.1f} times in RMS, {times**2:.0f} in loss; consider --loss_weight per_step"
        )
    dead = {way: shares.get("trained", shares["start"]) for way, shares in found["dead"].items()}
    tried = "trained" in found["dead"][found["center"]]
    here, there = dead.pop(found["center"]), dead.popitem()
    if found["center"] == "none" and found["gamma"] > 1:
        shares = (
            f"{there[1]:.0%} of the latents {'end' if tried else 'start out'} dead, not {here:.0%}"
        )
        lines.append(f"gamma is {found['gamma']:.1f}: with --center {there[0]}, {shares}")
    elif here > MANY_DEAD:
        lines.append(
            f"{here:.0%} of the latents {'end' if tried else 'start out'} dead; fewer --num_latents, or more data"
        )
    if found["num_training"] < FEW_VECTORS * M:
        lines.append(
            f"{found['num_training'] / M:.0f} training vectors a latent are few; fewer --num_latents, or more prompts"
        )
    if (updates := found.get("updates", FEW_UPDATES)) < FEW_UPDATES:
        lines.append(
            f"{updates} updates are few; more prompts, or {-(-FEW_UPDATES // updates)} times as many --num_epochs"
        )
    return lines
