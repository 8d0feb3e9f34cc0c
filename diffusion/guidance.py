"""Which rows of a denoiser's batch are conditional: read off what guidance makes of them.

Where several chunks of rows (unconditional, conditional, ...) reach one step of the scheduler, guidance has mixed them linearly
into its `model_output`, s c + (1 - s) u, so least squares over the denoiser's own output chunks gives the weights back, and the
conditional chunk is the one of the largest weight. A network of which nothing is in there is no denoiser.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from diffusion.signatures import tensors
from errors import UsageError

CONTEXTS = {"cond": "cond", "pred_cond": "cond", "uncond": "uncond", "pred_uncond": "uncond"}  # names of cache_context


def guidance_weights(chunks, model_output):
    """Weight of each chunk in `model_output ~ sum_i w_i chunk_i`, by least squares in float64: (weights, certain).

    chunks: list of (R, ...) tensors, model_output: (R, ...). weights: list of floats, 0 for a chunk that is smaller than the
    model output. certain: list of bool, False where other chunks could take a chunk's place (identical predictions), which
    then share its weight. What a chunk has past the model output's shape (a learned variance, tokens of a reference image)
    is left out.
    """
    target = model_output.detach().cpu().double()
    columns = torch.zeros(len(chunks), target.numel(), dtype=torch.float64)
    for i, chunk in enumerate(chunks):
        a, b = chunk.detach().cpu().double(), target[: len(chunk)]
        if a.numel() != b.numel() and a.ndim == b.ndim and all(m >= n for m, n in zip(a.shape, b.shape)):
            a = a[tuple(slice(n) for n in b.shape)]
        if a.numel() == b.numel():
            columns[i, : a.numel()] = a.flatten()
    sizes = columns.norm(dim=1).clamp_min(1e-300)
    A = (columns / sizes[:, None]).T
    inverse = torch.linalg.pinv(A, rtol=1e-6)
    certain = (inverse @ A).diagonal() > 1 - 1e-6
    return (inverse @ target.flatten() / sizes).tolist(), certain.tolist()


def same(a, b):
    """Whether two lists of tensors, or of lists of tensors, are equal in every number."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return torch.equal(a, b)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))


@dataclass(eq=False)
class Chunk:
    """The rows of one forward that belong together: one for every sample. `forward`: a `trace.Forward`."""

    forward: Any
    rows: slice
    weight: float = 0.0  # in the model output, see `guidance_weights`
    certain: bool = False  # whether it can be the weight of no other chunk

    @property
    def output(self):
        return self.forward.output[self.rows]

    @property
    def conditioning(self):
        return [x[self.rows] for x in self.forward.conditioning]

    @property
    def inputs(self):
        return [self.forward.sample[self.rows], *self.conditioning]

    @property
    def varies(self):
        """Whether rows have conditioning of their own: the prompts', then, and not one negative prompt's."""
        return any(not same(x[:1], x[r : r + 1]) for x in self.conditioning for r in range(1, len(x)))


def find_roles(forwards, model_output, R):
    """Which rows of one step's forwards are conditional, `R` rows a chunk: [[cond, uncond or other, a chunk], a forward].

    A forward whose prediction has no part in `model_output` gets []. The first of these that tells decides: the name of the
    context a forward ran in; a single chunk is conditional; then `find_conditional` and `find_unconditional`. Raises UsageError
    where rows can't be told.
    """
    if all(f.context in CONTEXTS and f.rows == R for f in forwards):
        return [[CONTEXTS[f.context]] for f in forwards]
    chunks = [Chunk(f, slice(c * R, (c + 1) * R)) for f in forwards for c in range(f.rows // R)]
    used = {f.denoiser for f in forwards}
    if len(chunks) > 1 and all(c.forward.output is not None for c in chunks):
        weights, certain = guidance_weights([c.output for c in chunks], model_output)
        chunks = [replace(c, weight=weight, certain=of_it) for c, weight, of_it in zip(chunks, weights, certain)]
        if len(used) > 1:
            sizes = [abs(c.weight) * c.output.norm().item() for c in chunks]
            used = {c.forward.denoiser for c, size in zip(chunks, sizes) if size >= 1e-3 * max(sizes)}
    for f in forwards:
        if f.denoiser in used and f.rows % R:
            raise UsageError(
                f"the denoiser got {f.rows} rows, which is no multiple of {R} (prompts x images per prompt): "
                "say how many prompts there are"
            )
    chunks = [c for c in chunks if c.forward.denoiser in used]
    cond = find_conditional(chunks)
    roles = {find_unconditional(chunks, cond): "uncond", cond: "cond"}
    return [[roles.get(c, "other") for c in chunks if c.forward is f] for f in forwards]


def find_conditional(chunks):
    """One that guidance subtracts is not; where the conditioning of some varies from row to row, it is one of those; then it is
    the one of the largest weight.
    """
    certain = all(c.certain for c in chunks)
    total = sum(c.weight for c in chunks)
    subtracted = [c for c in chunks if certain and c.weight * total < -1e-3]
    candidates = [c for c in chunks if c not in subtracted]
    candidates = [c for c in candidates if c.varies] or candidates
    if len(candidates) > 1 and certain:
        weights = [c.weight for c in chunks]
        if len(weights) == 2 and min(weights) > 0.01:
            raise UsageError(
                f"can't tell conditional from unconditional rows at a guidance scale between 0 and 1 ({max(weights):.2f}): "
                "use two prompts or more"
            )
        return max(candidates, key=lambda c: abs(c.weight))
    if len(candidates) > 1 and not all(same(c.conditioning, chunks[0].conditioning) for c in chunks):
        raise UsageError(  # an empty prompt has the rows of the empty negative prompt, and then any label is right
            "can't tell conditional from unconditional rows: the denoiser predicts the same for both "
            "(is its last layer still zero?)"
        )
    return candidates[-1]


def find_unconditional(chunks, cond):
    """Of several others, one with the conditional chunk's own conditioning is a perturbed pass, and the unconditional one is all
    zeros wherever it differs from the rest. None if it is none of them.
    """
    rest = [c for c in chunks if c is not cond]
    if all(c.certain for c in chunks):  # else two passes may have the same prediction, being the same
        rest = [c for c in rest if not same(c.conditioning, cond.conditioning)]
    if len(rest) > 1:
        rest = [a for a in rest if all(is_less(a.inputs, b.inputs) for b in rest if b is not a)]
    return rest[0] if len(rest) == 1 else None


def is_less(a, b):
    """Whether inputs `a` are zero wherever they differ from inputs `b`, and somewhere differ."""
    pairs = [(x, y) for x, y in zip(tensors(a), tensors(b)) if not torch.equal(x, y)]
    return bool(pairs) and all(x.shape == y.shape and not x[x != y].any() for x, y in pairs)
