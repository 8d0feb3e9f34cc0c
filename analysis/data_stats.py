"""What training and diagnosis measure of the data, before an SAE sees them.

    stats = measure(dataset, "median")         for train.py: scale, centre and variance
    numbers = report(dataset, k, num_latents)  for diagnose.py: everything below, as a dict
    lines = warnings(numbers)                  what is wrong, and what to do about it

Definitions, for a sample x (N, d) of training vectors and an SAE with M latents:

    gamma          = |mean| / |std|             norms over the d dimensions; above 1, the mean that
                                                all vectors share is larger than what varies
    effective rank = (sum l)^2 / sum l^2        l: eigenvalues of the covariance; from 1 to d, and
                                                d if all are equal
    dead           = share of latents that are among the k largest of no vector, or only with a zero

Statistics are computed in float64.

Sources: gamma and what it does at the start, Simon et al. 2026 (arXiv 2605.31518).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.metrics import count_active
from errors import UsageError
from sae import Sae
from store.dataset import Activations

TRAINING_SAMPLE = 32_768  # vectors that training checks, and takes b_dec's start and the scale from
SAMPLE = 65_536  # vectors that a diagnosis measures
CHUNK = 2048  # of them at once, to save memory
OUTLIER = 10  # a dimension is an outlier above this multiple of the median RMS of a dimension

# `warnings` warns below or above these numbers
FEW_UPDATES = 1000
FEW_VECTORS = 100  # training vectors per latent
UNEVEN = 3  # the largest RMS of a timestep over the smallest, about the mean
MANY_DEAD = 0.2  # share of the latents
REPEATED = 0.01  # share of the sampled vectors that are copies
NEAR_OVERFLOW = 30_000  # largest |x| in a float16 file


# Training


@dataclass(frozen=True)
class DataStats:
    """What training has to know of a data set: the SAE is trained on scale * x."""

    scale: float
    """A power of two that brings |x - center| near 1, so that folding it into the biases is
    exact."""

    center: Tensor
    """(d,): where b_dec starts, for scaled vectors."""

    variance: float
    """Mean |x - mean|^2 of scaled vectors: what the squared error is divided by."""

    weights: list[float] | None
    """Weight of the error at each timestep; None: all weigh 1."""

    gamma: float
    """|mean| / |std| of the vectors as they are: see the top."""


def measure(
    dataset: Activations,
    center: str,
    input_unit_norm: bool = False,
    per_step: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> DataStats:
    """Return the DataStats of a sample of up to TRAINING_SAMPLE vectors.

    center: "median", "mean" or "none", see `middle`. per_step: add weights that make all timesteps
    count alike. Raises UsageError for NaN or infinity, for a single vector, for vectors that are
    all equal, and for per_step without timesteps.
    """
    name = dataset.paths[0]
    check_number(dataset)
    pieces = dataset.draw(TRAINING_SAMPLE, seed)
    x = dataset.read(pieces).float().to(device)
    num_bad = len(x) - int(x.isfinite().all(1).sum())
    if num_bad:
        raise UsageError(
            f"{name}: {num_bad} of {len(x)} sampled vectors hold NaN or inf; collect it again"
        )
    severity = gamma(x.mean(0), x.var(0, correction=0))
    if input_unit_norm:
        x, _, _ = Sae(dataset.d, 1, 1, {"input_unit_norm": True}).standardize(x)
    b_dec = middle(x, center)
    spread = rms_about(x, b_dec)
    if not 0 < spread < math.inf:
        raise UsageError(
            f"{name}: the sampled vectors are all equal or too large (spread {spread}); "
            "nothing can be learned"
        )

    scale = 1.0 if input_unit_norm else power_of_two(spread)
    variance = scale**2 * (x - x.mean(0)).square().sum(1).mean().item()
    weights = None
    if per_step:
        weights = weights_by_step(dataset, pieces, x - b_dec)
    return DataStats(scale, b_dec * scale, variance, weights, severity)


def weights_by_step(dataset: Activations, pieces: np.ndarray, x: Tensor) -> list[float]:
    """Return for each timestep the mean square of all x, divided by that of the timestep's x.

    A timestep whose vectors are twice as long as the average gets about 1/4. x: (N, d), without the
    centre. pieces: which rows of the files x was read from. Raises UsageError for files without
    timesteps.
    """
    if not dataset.timesteps:
        raise UsageError(
            f"{dataset.paths[0]} has no timesteps; --loss_weight per_step needs a file of "
            "collect.py"
        )
    square = x.square().mean(1).cpu()
    step = torch.from_numpy(dataset.steps_of(pieces))
    weights = []
    for index in range(len(dataset.timesteps)):
        weight = square.mean() / square[step == index].mean()
        weights.append(weight.item())
    return weights


def rms_about(x: Tensor, center: Tensor) -> float:
    """Return the root mean square of all numbers of x (N, d) - center (d,)."""
    return (x - center).square().mean().sqrt().item()


def power_of_two(spread: float) -> float:
    """Return the power of two that brings an RMS nearest to 1: for 5.0 it gives 0.25."""
    return 2.0 ** -round(math.log2(spread))


def middle(x: Tensor, center: str) -> Tensor:
    """Return the centre (d,) of x (N, d).

    center: "median" is the geometric median, "mean" the mean, and "none" gives zeros.
    """
    if center == "median":
        return geometric_median(x)
    if center == "mean":
        return x.mean(0)
    return torch.zeros_like(x[0])


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Return the point with the least sum of distances to the vectors of x: (N, d) -> (d,).

    A few huge vectors move it little, and the mean a lot: for the numbers 0, 1, 2, 3, 1000 (d = 1)
    it is about 2. Weiszfeld's iteration (1937), which stops when it moves less than `tolerance`
    times the mean distance to the vectors.
    """
    median = x.mean(0)
    for _ in range(iterations):
        distance = (x - median).norm(dim=1)
        scale = distance.mean()
        if scale == 0:  # all vectors are equal
            break
        nearness = scale / distance.clamp_min(1e-6 * scale)
        previous = median
        median = nearness @ x / nearness.sum()
        if (median - previous).norm() <= tolerance * scale:
            break
    return median


# Statistics of a sample


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and the covariance (d, d) of x (N, d), in float64; divided by N."""
    mean = x.mean(0, dtype=torch.float64)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for chunk in x.split(CHUNK):
        centred = chunk.double() - mean
        covariance.addmm_(centred.T, centred)
    return mean, covariance / len(x)


def gamma(mean: Tensor, variance: Tensor) -> float:
    """Return |mean| / |std| of a mean (d,) and a variance (d,); infinity where nothing varies."""
    return (mean.norm() / variance.sum().sqrt()).item()


def effective_rank(eigenvalues: Tensor) -> float:
    """Return (sum l)^2 / sum l^2 of the covariance's eigenvalues (d,): for 5, 5, 5, 0 it is 3."""
    return (eigenvalues.sum().square() / eigenvalues.square().sum()).item()


def outliers(mean: Tensor, variance: Tensor) -> tuple[list[int], float]:
    """Return the outlier dimensions, the largest first, and their share of the power.

    An outlier's RMS is above OUTLIER times the median of those that are not 0. mean, variance:
    (d,).
    """
    power = mean.square() + variance
    rms = power.sqrt()
    is_outlier = rms > OUTLIER * rms[rms > 0].median()
    dims = torch.argsort(rms, descending=True)[: int(is_outlier.sum())]
    return dims.tolist(), (power[dims].sum() / power.sum()).item()


def rms_by_step(x: Tensor, step: Tensor, num_steps: int) -> Tensor:
    """Return the root mean square of the numbers of each step's vectors, float64 (num_steps,).

    x: (N, d). step: int64 (N,), the step of each vector. A step without vectors gets NaN.
    """
    sums = torch.zeros(num_steps, dtype=torch.float64).index_add_(0, step, mean_squares(x))
    return (sums / torch.bincount(step, minlength=num_steps)).sqrt()


def mean_squares(x: Tensor) -> Tensor:
    """Return the mean square of each vector's numbers: (N, d) -> float64 (N,)."""
    return torch.cat([chunk.double().square().mean(1) for chunk in x.split(CHUNK)])


def share_of_largest(power: Tensor) -> list[float]:
    """Return which dimension has most of the power (d,), and its share: for 1, 3 it is [1, 0.75].

    The share is 0 if all power is 0.
    """
    total = power.sum().clamp_min(torch.finfo(power.dtype).tiny)
    return [int(power.argmax()), (power.max() / total).item()]


def ratio(values: list[float]) -> float:
    """Return the largest value divided by the smallest; infinity if the smallest is 0."""
    smallest = min(values)
    if smallest == 0:
        return math.inf
    return max(values) / smallest


# Latents at the start of training


def start(x: Tensor, num_latents: int, k: int, center: str = "median", seed: int = 0) -> Sae:
    """Return the SAE that training on x (N, d) begins with; it takes x as it is.

    Training scales x, and no scale changes which latents are the k largest. center: see `middle`.
    """
    sae = Sae(x.shape[1], num_latents, k, seed=seed).to(x.device)
    sae.b_dec.data.copy_(middle(x, center))
    return sae


@torch.no_grad()
def count_fires(sae: Sae, x: Tensor) -> Tensor:
    """Count, for each latent, the vectors x (N, d) on which it is active: int64 (M,), on the CPU.

    It takes only SAEs that encode each vector by itself, without samples and input_unit_norm.
    """
    counts = torch.zeros(sae.num_latents, dtype=torch.int64, device=x.device)
    for chunk in x.split(CHUNK):
        counts = counts + count_active(*sae.encode(chunk), sae.num_latents)
    return counts.cpu()


def dead_share(fires: Tensor) -> float:
    """Return the share of latents that are active on no vector: for fires 0, 5, 0, 1 it is 0.5."""
    return (fires == 0).double().mean().item()


# Diagnosis


class Draw(NamedTuple):
    """A sample of training vectors."""

    x: Tensor
    """(N, d) float32, in random order; vectors that hold NaN or infinity are left out."""

    step: Tensor | None
    """(N,) int64: the step of each vector; None if the files have no timesteps."""

    not_finite: int
    """How many vectors were left out."""


def draw(dataset: Activations, seed: int = 0) -> Draw:
    """Return up to SAMPLE training vectors, drawn from all files and prompts.

    Raises UsageError if all of them hold NaN or infinity.
    """
    pieces = dataset.draw(SAMPLE, seed)
    x = dataset.read(pieces).float()
    finite = x.isfinite().all(1).nonzero().flatten()
    if len(finite) == 0:
        raise UsageError(
            f"{dataset.paths[0]}: all {len(x)} sampled vectors hold NaN or inf; collect it again"
        )
    generator = torch.Generator().manual_seed(seed)
    order = finite[torch.randperm(len(finite), generator=generator)]
    step = None
    if dataset.timesteps:
        step = torch.from_numpy(dataset.steps_of(pieces))[order]
    return Draw(x[order], step, len(x) - len(order))


def report(
    dataset: Activations,
    k: int,
    num_latents: int,
    device: str | torch.device = "cpu",
    center: str = "median",
    seed: int = 0,
    drawn: Draw | None = None,
) -> dict[str, Any]:
    """Return everything that is measured of a data set before training, as a dict for JSON.

    Its "dead" and "fires" have an entry for the centring that is asked for, and one for "none" (or
    for "median", if "none" is asked for): {"start": of the SAE at its start}. They are counted on
    as many vectors as are held out, at most SAMPLE. "fires" holds tensors (M,), which JSON does not
    take. drawn: the sample, if it was drawn already. Raises UsageError if nothing can be learned.
    """
    check_number(dataset)
    if drawn is None:
        drawn = draw(dataset, seed)
    x, step, not_finite = drawn
    mean, covariance = moments(x)
    check_spread(dataset.paths[0], x, mean, covariance.diagonal())

    numbers = describe(dataset)
    numbers["num_sampled"] = len(x)
    numbers["not_finite"] = not_finite
    numbers.update(describe_values(x))
    numbers.update(describe_moments(mean, covariance))
    if step is None:
        numbers.update(describe_norms(x))
    else:
        numbers.update(describe_steps(x, step, mean, dataset.timesteps))

    num_counted = min(len(x), dataset.num_held_out)
    numbers.update(k=k, num_latents=num_latents, center=center, num_counted=num_counted)
    numbers.update(dead={}, fires={})
    x = x.to(device)
    other_center = "median" if center == "none" else "none"
    for one_center in (center, other_center):
        sae = start(x, num_latents, k, one_center, seed)
        fires = count_fires(sae, x[:num_counted])
        numbers["dead"][one_center] = {"start": dead_share(fires)}
        numbers["fires"][one_center] = {"start": fires}
    return numbers


def check_number(dataset: Activations) -> None:
    """Raise UsageError if there is a single training vector, which varies about nothing."""
    if dataset.num_training < 2:
        raise UsageError(
            f"{dataset.paths[0]} has {dataset.num_training} training vector, too few to learn "
            "from; collect more"
        )


def check_spread(name: str, x: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Raise UsageError if nothing can be learned from x (N, d).

    That is so if all vectors are equal, or if float32 does not hold the squares.
    """
    power = mean.square() + variance
    constant = (x.amin(0) == x.amax(0)).all()
    vanishes = not rms_about(x, mean.float()) > 0
    overflows = power.sum() * len(x) > torch.finfo(torch.float32).max
    if constant or vanishes or overflows:
        raise UsageError(
            f"{name}: the sampled vectors are all equal or too large or small; "
            "nothing can be learned"
        )


def describe(dataset: Activations) -> dict[str, Any]:
    """Return which files and sizes a data set has."""
    dtype = str(dataset.dtype)
    if dataset.dtype == np.uint16:  # NumPy has no bfloat16, so its bits are stored
        dtype = "bfloat16"
    return {
        "data": dataset.paths,
        "hook_name": dataset.hook_name,
        "dtype": dtype,
        "d": dataset.d,
        "num_vectors": dataset.num_vectors,
        "num_training": dataset.num_training,
        "num_held_out": dataset.num_held_out,
    }


def describe_values(x: Tensor) -> dict[str, Any]:
    """Return what the numbers of x (N, d) say.

    The share of vectors that are copies, the dimensions that never change, and the largest |x|.
    """
    different = {hash(row.tobytes()) for row in x.numpy()}
    constant = x.amin(0) == x.amax(0)
    return {
        "repeated": 1 - len(different) / len(x),
        "constant_dims": constant.nonzero().flatten().tolist(),
        "largest": max(chunk.abs().max().item() for chunk in x.split(CHUNK)),
    }


def describe_moments(mean: Tensor, covariance: Tensor) -> dict[str, Any]:
    """Return what the mean (d,) and the covariance (d, d) say: see the definitions at the top."""
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


def describe_steps(
    x: Tensor, step: Tensor, mean: Tensor, timesteps: list[float]
) -> dict[str, list[float]]:
    """Return the RMS by timestep of x (N, d), as it is and about its mean.

    A timestep that none of the vectors has is left out; a small sample need not have all.
    """
    rms = rms_by_step(x, step, len(timesteps))
    spread = rms_by_step(x - mean.float(), step, len(timesteps))
    seen = (rms >= 0).nonzero().flatten().tolist()  # NaN is not
    return {
        "timesteps": [timesteps[index] for index in seen],
        "rms_by_step": rms[seen].tolist(),
        "spread_by_step": spread[seen].tolist(),
    }


def describe_norms(x: Tensor) -> dict[str, list[float]]:
    """Return 101 percentiles (0 to 100) of the vectors' RMS, for files without timesteps."""
    percent = torch.linspace(0, 1, 101, dtype=torch.float64)
    return {"rms_percentiles": mean_squares(x).sqrt().quantile(percent).tolist()}


# Warnings


def warnings(numbers: dict[str, Any]) -> list[str]:
    """Return what a report shows to be wrong, and what to do about it; [] if all is well.

    numbers: what `report` returned, and what diagnose.py added to it.
    """
    candidates = [
        warn_of_not_finite(numbers),
        warn_of_overflow(numbers),
        warn_of_constant_dims(numbers),
        warn_of_copies(numbers),
        warn_of_uneven_steps(numbers),
        warn_of_dead(numbers),
        warn_of_few_vectors(numbers),
        warn_of_few_updates(numbers),
    ]
    return [line for line in candidates if line is not None]


def warn_of_not_finite(numbers: dict[str, Any]) -> str | None:
    """Return a line if sampled vectors hold NaN or infinity."""
    num_bad = numbers["not_finite"]
    if num_bad == 0:
        return None
    num_drawn = numbers["num_sampled"] + num_bad
    return (
        f"{num_bad:,} of {num_drawn:,} sampled vectors hold NaN or inf, which train.py refuses; "
        "collect again"
    )


def warn_of_overflow(numbers: dict[str, Any]) -> str | None:
    """Return a line if the largest number of a float16 file is near the end of float16."""
    if numbers["dtype"] != "float16" or numbers["largest"] <= NEAR_OVERFLOW:
        return None
    return (
        f"|x| reaches {numbers['largest']:,.0f}, float16 ends at 65,504; "
        "collect again with --store_dtype float32 or bfloat16"
    )


def warn_of_constant_dims(numbers: dict[str, Any]) -> str | None:
    """Return a line if some dimensions never change."""
    num_constant = len(numbers["constant_dims"])
    if num_constant == 0:
        return None
    return f"{num_constant} of {numbers['d']} dimensions never change"


def warn_of_copies(numbers: dict[str, Any]) -> str | None:
    """Return a line if many sampled vectors are copies of others."""
    if numbers["repeated"] <= REPEATED:
        return None
    return (
        f"{numbers['repeated']:.1%} of the sampled vectors are copies of another: padding, or the "
        "same file twice?"
    )


def warn_of_uneven_steps(numbers: dict[str, Any]) -> str | None:
    """Return a line if the vectors of some timesteps are much longer than those of others."""
    if "timesteps" not in numbers:
        return None
    times = ratio(numbers["spread_by_step"])
    if times <= UNEVEN:
        return None
    return (
        f"about the mean, steps differ {times:.1f} times in RMS, {times**2:.0f} in loss; "
        "consider --loss_weight per_step"
    )


def warn_of_dead(numbers: dict[str, Any]) -> str | None:
    """Return a line if many latents are dead, or if a centre would keep many alive.

    Where the trial was made, what counts is the share at its end.
    """
    center = numbers["center"]
    is_tried = "trained" in numbers["dead"][center]
    when = "end" if is_tried else "start out"
    dead = {}
    for one_center, shares in numbers["dead"].items():
        dead[one_center] = shares["trained"] if "trained" in shares else shares["start"]

    if center == "none" and numbers["gamma"] > 1:
        (other_center,) = set(dead) - {center}
        return (
            f"gamma is {numbers['gamma']:.1f}: with --center {other_center}, "
            f"{dead[other_center]:.0%} of the latents {when} dead, not {dead[center]:.0%}"
        )
    if dead[center] > MANY_DEAD:
        return f"{dead[center]:.0%} of the latents {when} dead; fewer --num_latents, or more data"
    return None


def warn_of_few_vectors(numbers: dict[str, Any]) -> str | None:
    """Return a line if there are few training vectors for each latent."""
    if numbers["num_training"] >= FEW_VECTORS * numbers["num_latents"]:
        return None
    return (
        f"{numbers['num_training'] / numbers['num_latents']:.0f} training vectors a latent are "
        "few; fewer --num_latents, or more prompts"
    )


def warn_of_few_updates(numbers: dict[str, Any]) -> str | None:
    """Return a line if the training has few updates. Before the trial they are not known."""
    updates = numbers.get("updates", FEW_UPDATES)
    if updates >= FEW_UPDATES:
        return None
    return (
        f"{updates} updates are few; more prompts, or {math.ceil(FEW_UPDATES / updates)} times as "
        "many --num_epochs"
    )
