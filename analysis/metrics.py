"""The numbers that describe an SAE, each defined once, and how they are measured on held-out
vectors.

    fvu       = sum |x - x_hat|^2 / sum |x - mean(x)|^2      fraction of variance unexplained; both
                                                             sums are over the whole set
    explained_variance = 1 - fvu
    l0        = mean number of nonzero top_acts of a vector, after the selection
    cosine    = mean over the vectors of x . x_hat / (|x| |x_hat|)
    dead      = share of the M latents that are active on no vector of the set
    always_on = share of the M latents that are active on at least 90 % of the vectors (ALWAYS)

"By timestep" is the same over that timestep's vectors alone, with their own mean.

    metrics = Metrics(sae.num_latents)
    metrics.update(x, sae(x), *sae.encode(x))                # as often as there are chunks
    metrics.fvu, metrics.l0
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from distributed import ALONE, Group
from kernels import count_active
from sae import Sae
from store.dataset import Activations, cut_unit

ALWAYS = 0.9


class Metrics:
    """The numbers of one set of vectors, which comes in chunks.

    Sums are kept in float64. The variance is merged chunk by chunk about their own means (Chan et
    al. 1979), so that a mean far from zero costs no digits.
    """

    def __init__(self, num_latents: int) -> None:
        self.n = 0  # vectors so far
        self.mean: Tensor | float = 0.0  # (d,)
        self.variance = 0.0  # sum |x - mean|^2
        self.error = 0.0  # sum |x - x_hat|^2
        self.cosines = 0.0  # sum of the cosines
        # on how many vectors each latent is active
        self.counts = torch.zeros(num_latents, dtype=torch.int64)

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, top_acts: Tensor, top_indices: Tensor) -> None:
        """Add a chunk: x, x_hat (N, d); top_acts, top_indices (N, K)."""
        chunk = Metrics(len(self.counts))
        chunk.counts = count_active(top_acts, top_indices, len(self.counts))
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
        x = x.to(wide)
        x_hat = x_hat.to(wide)
        chunk.n = len(x)
        chunk.mean = x.mean(0)
        chunk.variance = (x - chunk.mean).square().sum().item()
        chunk.error = (x - x_hat).square().sum().item()
        # PyTorch's own eps, 1e-8, is longer than tiny vectors. This one is shorter, and its square
        # is not 0.
        eps = torch.finfo(wide).tiny ** 0.5
        chunk.cosines = cosine_similarity(x, x_hat, dim=1, eps=eps).sum().item()
        self.add(chunk)

    def add(self, other: "Metrics") -> None:
        """Add the vectors of another set to this one."""
        if other.n == 0:
            return
        n = self.n + other.n
        distance = torch.as_tensor(other.mean - self.mean).square().sum().item()
        between = distance * self.n * other.n / n  # variance of the two means about their own
        self.variance += other.variance + between
        self.mean = self.mean + (other.mean - self.mean) * (other.n / n)
        self.counts = self.counts.to(other.counts.device) + other.counts
        self.n = n
        self.error += other.error
        self.cosines += other.cosines

    def gather(self, group: Group, d: int) -> "Metrics":
        """Return the numbers of the vectors of all processes together, the same in each process.

        All processes of the group have to call it. d: width of the vectors.
        """
        if group.count == 1:
            return self
        mean = self.mean if self.n else torch.zeros(d)
        numbers = [self.n, self.variance, self.error, self.cosines, *mean.tolist()]
        mine = torch.tensor([numbers], dtype=torch.float64).to(group.device)
        counts = self.counts.to(group.device)

        whole = Metrics(len(self.counts))
        for numbers in group.all_gather(mine).view(group.count, -1).tolist():
            theirs = Metrics(len(self.counts))
            theirs.n = int(numbers[0])
            theirs.variance, theirs.error, theirs.cosines = numbers[1:4]
            theirs.mean = torch.tensor(numbers[4:], dtype=torch.float64)
            whole.add(theirs)
        whole.counts = group.sum(counts)
        return whole

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained. If nothing varies: 0 without an error, else 1."""
        if self.variance == 0:
            return float(self.error > 0)
        return self.error / self.variance

    @property
    def l0(self) -> float:
        """Mean number of active latents of a vector."""
        return self.counts.sum().item() / self.n

    @property
    def cosine(self) -> float:
        """Mean cosine between x and x_hat."""
        return self.cosines / self.n

    @property
    def dead(self) -> float:
        """Share of the latents that are active on no vector."""
        return (self.counts == 0).cpu().double().mean().item()

    @property
    def always_on(self) -> float:
        """Share of the latents that are active on at least ALWAYS of the vectors."""
        return (self.counts >= ALWAYS * self.n).cpu().double().mean().item()

    def summary(self) -> dict[str, float]:
        """Return all of them by name, and the number of vectors; as cfg.json records them."""
        return {
            "vectors": self.n,
            "fvu": self.fvu,
            "explained_variance": 1 - self.fvu,
            "l0": self.l0,
            "cosine": self.cosine,
            "dead": self.dead,
            "always_on": self.always_on,
        }


@torch.no_grad()
def evaluate(
    saes: list[Sae],
    activations: Activations,
    batch_size: int,
    progress: bool = False,
    vectors: Group = ALONE,
) -> list[list[Metrics]]:
    """Return the Metrics of SAEs on the held-out vectors, by timestep: result[sae][timestep].

    The vectors are read once for all SAEs. Files without timesteps count as one timestep. `total`
    puts the timesteps together. vectors: the processes that split the held-out prompts; each gets
    the whole result. Raises UsageError for sampletopk on files without whole samples.
    """
    takes_samples = any(sae.takes_samples for sae in saes)
    if takes_samples:
        activations.sample_tokens()  # raises the UsageError
    num_steps = max(1, len(activations.timesteps))
    by_sae = []
    for sae in saes:
        by_sae.append([Metrics(sae.num_latents) for _ in range(num_steps)])

    # a unit is the rows of one prompt in one file: (file, first row, end row)
    units = activations.held_out_units[vectors.index :: vectors.count]
    units = tqdm(units, "held-out vectors", unit="prompt", disable=not progress, leave=False)
    for unit in units:
        file, first, end = unit.tolist()
        if first == end:  # a prompt without text
            continue
        tokens = activations.tokens[file] if takes_samples else 1
        samples_at_once = max(1, batch_size // tokens)
        for piece in cut_unit(unit, samples_at_once * tokens):
            pieces = piece[None]
            x = activations.read(pieces).to(saes[0].W_dec.device).float()
            step = torch.zeros(len(x), dtype=torch.int64)
            if num_steps > 1:
                step = torch.from_numpy(activations.steps_of(pieces))
            for sae, by_step in zip(saes, by_sae):
                add_batch(sae, x, tokens, step, by_step)

    result = []
    for by_step in by_sae:
        result.append([metrics.gather(vectors, activations.d) for metrics in by_step])
    return result


def add_batch(sae: Sae, x: Tensor, tokens: int, step: Tensor, by_step: list[Metrics]) -> None:
    """Encode and decode vectors x (N, d), and add each to the Metrics of its step.

    tokens: vectors of a sample. step: int64 (N,), an index of `by_step` for each vector.
    """
    samples = x
    if sae.takes_samples:
        samples = x.unflatten(0, (-1, tokens))
    codes = sae.encode(samples)
    x_hat = sae.decode(*codes).view_as(x)
    top_acts, top_indices = (code.flatten(0, -2) for code in codes[:2])
    for index in step.unique().tolist():
        at_step = (step == index).to(x.device)
        by_step[index].update(x[at_step], x_hat[at_step], top_acts[at_step], top_indices[at_step])


def total(metrics: list[Metrics]) -> Metrics:
    """Return the Metrics of several sets taken together."""
    whole = Metrics(len(metrics[0].counts))
    for one in metrics:
        whole.add(one)
    return whole


def usual_scale(x: Tensor) -> float:
    """Return the power of two that brings the largest |x| near 1; 1.0 where none is needed.

    None is needed if the largest is between 1e-6 and 1e6, or 0, or not finite. It is for results
    that do not depend on the scale of x: multiplied by it, x loses nothing in squares, nor by a
    small number that keeps a divisor above 0. For 2^40 it gives 2^-40.
    """
    lowest, highest = torch.aminmax(x)  # without a copy of x, as abs would make
    largest = max(-lowest.item(), highest.item())
    if not 0 < largest < math.inf or 1e-6 <= largest <= 1e6:
        return 1.0
    return 2.0 ** min(126, -math.floor(math.log2(largest)))
