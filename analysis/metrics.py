"""Every number said about an SAE, each defined once: Metrics, and what is measured on held-out
vectors.

    fvu       = sum |x - x_hat|^2 / sum |x - mean(x)|^2      both sums over the whole set; explained variance is 1 - fvu
    l0        = mean number of nonzero top_acts of a vector, after the selection
    cosine    = mean over the vectors of x . x_hat / (|x| |x_hat|)
    dead      = share of the M latents that are active on no vector of the set
    always_on = share of the M latents that are active on at least ALWAYS of the vectors

"By timestep" is the same over that timestep's vectors alone, with their own mean.
"""

import math

import torch
from tqdm import tqdm

from distributed import ALONE
from kernels import count_active
from store.dataset import cut_unit

ALWAYS = 0.9


def usual_scale(x):
    """The power of two that brings the largest of the numbers x near 1, or 1.0 where it is between
    1e-6 and 1e6, or 0.

    For what does not depend on the scale of x, so that nothing is lost in squares and in what keeps
    a divisor above 0.
    """
    lowest, highest = torch.aminmax(x)  # without a copy of x, as abs would make
    largest = max(-lowest.item(), highest.item())
    if not 0 < largest < math.inf or 1e-6 <= largest <= 1e6:
        return 1.0
    return 2.0 ** min(126, -math.floor(math.log2(largest)))


class Metrics:
    """The numbers of a set of vectors that comes in chunks, on the SAE's device.

    Sums are kept in float64; the variance is merged chunk by chunk about their own means (Chan et
    al. 1979), so that a mean far from zero costs no digits.
    """

    def __init__(self, num_latents):
        self.n, self.mean, self.variance, self.error, self.cosines = 0, 0.0, 0.0, 0.0, 0.0
        self.counts = torch.zeros(
            num_latents, dtype=torch.int64
        )  # vectors on which each latent is active

    @torch.no_grad()
    def update(self, x, x_hat, top_acts, top_indices):
        """Add a chunk: x, x_hat (N, d); top_acts, top_indices (N, K)."""
        part = Metrics(len(self.counts))
        part.counts = count_active(top_acts, top_indices, len(self.counts))
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
        x, x_hat = x.to(wide), x_hat.to(wide)
        part.n, part.mean = len(x), x.mean(0)
        part.variance = (x - part.mean).square().sum().item()
        part.error = (x - x_hat).square().sum().item()
        # PyTorch's own eps, 1e-8, is more than the length of tiny vectors; the square of this one
        # is not 0
        smallest = torch.finfo(wide).tiny ** 0.5
        part.cosines = (
            torch.nn.functional.cosine_similarity(x, x_hat, dim=1, eps=smallest).sum().item()
        )
        self.add(part)

    def add(self, other):
        """Take in another set's numbers."""
        if not other.n:
            return
        n = self.n + other.n
        between = (
            torch.as_tensor(other.mean - self.mean).square().sum().item() * self.n * other.n / n
        )
        self.variance += other.variance + between
        self.mean = self.mean + (other.mean - self.mean) * (other.n / n)
        self.counts = self.counts.to(other.counts.device) + other.counts
        self.n, self.error, self.cosines = n, self.error + other.error, self.cosines + other.cosines

    def gather(self, group, d):
        """The numbers of all processes of a distributed.Group together, in each of them. d: width
        of the vectors."""
        if group.count == 1:
            return self
        mean = self.mean if self.n else torch.zeros(d)
        numbers = torch.tensor(
            [[self.n, self.variance, self.error, self.cosines, *mean.tolist()]], dtype=torch.float64
        )
        whole = Metrics(len(self.counts))
        counts = self.counts.to(group.device)
        for n, variance, error, cosines, *mean in (
            group.all_gather(numbers.to(group.device)).view(group.count, -1).tolist()
        ):
            part = Metrics(len(self.counts))
            part.n, part.variance, part.error, part.cosines = int(n), variance, error, cosines
            part.mean = torch.tensor(mean, dtype=torch.float64)
            whole.add(part)
        whole.counts = group.sum(counts)
        return whole

    @property
    def fvu(self):
        return self.error / self.variance if self.variance else float(self.error > 0)

    @property
    def l0(self):
        return self.counts.sum().item() / self.n

    @property
    def cosine(self):
        return self.cosines / self.n

    @property
    def dead(self):
        return (self.counts == 0).cpu().double().mean().item()

    @property
    def always_on(self):
        return (self.counts >= ALWAYS * self.n).cpu().double().mean().item()

    def summary(self):
        """All of them, as plain numbers."""
        return {
            "vectors": self.n, "fvu": self.fvu, "explained_variance": 1 - self.fvu, "l0": self.l0, "cosine": self.cosine,
            "dead": self.dead, "always_on": self.always_on,
        }  # fmt: skip


@torch.no_grad()
def evaluate(saes, activations, batch_size, progress=False, vectors=ALONE):
    """Metrics of SAEs on the held-out vectors of `activations`, which are read once: for each SAE a
    list, one a timestep.

    Where the files have no timesteps the list is of one; `total` puts them together. The
    distributed.Group `vectors` shares out the prompts.
    """
    takes_samples = any(sae.takes_samples for sae in saes)
    if takes_samples:
        activations.sample_tokens()  # or a UsageError
    steps = max(1, len(activations.timesteps))
    found = [[Metrics(sae.num_latents) for _ in range(steps)] for sae in saes]
    units = activations.held_out_units[vectors.index :: vectors.count]
    units = tqdm(units, "held-out vectors", unit="prompt", disable=not progress, leave=False)
    for unit in units:
        if unit[1] == unit[2]:  # a prompt without text
            continue
        tokens = activations.tokens[int(unit[0])] if takes_samples else 1
        size = max(1, batch_size // tokens) * tokens  # whole samples
        for piece in cut_unit(unit, size):
            x = activations.read(piece[None]).to(saes[0].W_dec.device).float()
            at = (
                torch.from_numpy(activations.steps_of(piece[None]))
                if steps > 1
                else torch.zeros(len(x), dtype=torch.int64)
            )
            for sae, metrics in zip(saes, found):
                codes = sae.encode(x.unflatten(0, (-1, tokens)) if sae.takes_samples else x)
                x_hat, codes = (
                    sae.decode(*codes).view_as(x),
                    [code.flatten(0, -2) for code in codes[:2]],
                )
                for s in at.unique().tolist():
                    here = (at == s).to(x.device)
                    metrics[s].update(x[here], x_hat[here], *(code[here] for code in codes))
    return [[metrics.gather(vectors, activations.d) for metrics in by_step] for by_step in found]


def total(metrics):
    """The Metrics of several sets taken together."""
    whole = Metrics(len(metrics[0].counts))
    for part in metrics:
        whole.add(part)
    return whole
