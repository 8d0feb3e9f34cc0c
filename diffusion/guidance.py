"""Which rows of a denoiser's batch are conditional: those that another positive prompt changes.

Before a sampling its first step is run with other prompts and thrown away; the chunks of rows
(unconditional, conditional, ...) whose conditioning differs from that of the sampling itself are
conditional, whatever the guidance makes of them.

A loop whose prompts can't be changed is judged by its guidance instead. It mixes the chunks
linearly into the scheduler's `model_output`, s c + (1 - s) u, so least squares over the denoiser's
own output chunks gives the weights back, and for s > 1 the unconditional chunk is subtracted. A
step at s = 0 or s = 1 tells nothing: then later steps do, and all that tell must agree. A network
of which nothing is in the model output is no denoiser.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from diffusion.signatures import tensors
from errors import UsageError

CONTEXTS = {
    "cond": "cond",
    "pred_cond": "cond",
    "uncond": "uncond",
    "pred_uncond": "uncond",
}  # names of cache_context


def guidance_weights(chunks, model_output):
    """Weight of each chunk in `model_output ~ sum_i w_i chunk_i`, by least squares in float64:
    (weights, certain).

    chunks: list of (R, ...) tensors, model_output: (R, ...). weights: list of floats, 0 for a chunk
    that is smaller than the model output. certain: list of bool, False where other chunks could
    take a chunk's place (identical predictions), which then share its weight; all are 0 and
    uncertain where a number is not finite. What a chunk has past the model output's shape (a
    learned variance, tokens of a reference image) is left out.
    """
    target = model_output.detach().cpu().double()
    columns = torch.zeros(len(chunks), target.numel(), dtype=torch.float64)
    for i, chunk in enumerate(chunks):
        a, b = chunk.detach().cpu().double(), target[: len(chunk)]
        if (
            a.numel() != b.numel()
            and a.ndim == b.ndim
            and all(m >= n for m, n in zip(a.shape, b.shape))
        ):
            a = a[tuple(slice(n) for n in b.shape)]
        if a.numel() == b.numel():
            columns[i, : a.numel()] = a.flatten()
    if not (
        target.isfinite().all() and columns.isfinite().all()
    ):  # an edit made a prediction overflow
        return [0.0] * len(chunks), [False] * len(chunks)
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
    """The rows of one forward that belong together: one for every sample. `forward`: a
    `trace.Forward`, or a `Pass`."""

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
        """Whether rows have conditioning of their own: the prompts', then, and not one negative
        prompt's."""
        return any(
            not same(x[:1], x[r : r + 1]) for x in self.conditioning for r in range(1, len(x))
        )


class Pass(NamedTuple):
    """What is compared of a forward in a step with other prompts."""

    denoiser: str
    rows: int
    conditioning: list  # as in `trace.Forward`
    output: torch.Tensor | None


class Known(NamedTuple):
    """What is known for sure of the steps with one pattern of forwards."""

    roles: list
    by_weights: (
        int | None
    )  # which chunk is conditional by its guidance, where that told anything: the others repeat it


@dataclass(eq=False)
class Memory:
    """What the samplings of one pipeline with the same options hand on to each other."""

    sure: dict = field(default_factory=dict)  # {pattern: Known}
    asked: bool = False  # whether it was seen what other prompts change, or there are none


@dataclass(eq=False)
class RoleFinder:
    """Labels the rows of one sampling's steps, each step as it is complete."""

    order: tuple | None = (
        None  # of the chunks in a step, such as ("uncond", "cond"), where the user says it
    )
    passes: list | None = (
        None  # a `Pass` for each forward of the first step of the same sampling with other prompts
    )
    memory: Memory = field(default_factory=Memory)
    known: dict = field(
        default_factory=dict
    )  # {pattern: roles}, those in the memory that were met and those that weights told

    undecided: dict = field(
        default_factory=dict, init=False
    )  # {pattern: steps, each a list of forwards, without roles}
    _before: dict = field(
        default_factory=dict, init=False
    )  # {pattern: {role: `Rows` in the last step}}
    _alike: dict = field(
        default_factory=dict, init=False
    )  # {pattern: whether the passes differ in none of its undecided steps}
    _met: set = field(default_factory=set, init=False)  # patterns of this sampling

    def label(self, forwards, model_output, R):
        """Give the forwards of a complete step their roles, `R` rows a chunk; None where no step
        has told them yet.

        Raises UsageError where this step says otherwise than an earlier one, and where rows can't
        be told at all.
        """
        pattern = pattern_of(forwards, R)
        if pattern not in self.memory.sure or pattern not in self._met:
            self._decide(pattern, forwards, model_output, R)
        self._met.add(pattern)
        roles = self.known.get(pattern)
        if roles is None:
            self.undecided.setdefault(pattern, []).append(forwards)
            self._alike[pattern] = self._alike.get(pattern, True) and are_alike(
                chunks_of(forwards, model_output, R)
            )
            return
        for step in [*self.undecided.pop(pattern, []), forwards]:
            for f, of_it in zip(step, roles):
                f.roles = of_it
        if pattern in self.memory.sure:
            self._check_places(pattern, forwards, R)

    def _decide(self, pattern, forwards, model_output, R):
        roles, by_weights, sure = find_roles(forwards, model_output, R, self.order, self.passes)
        self.memory.asked |= self.passes is not None
        if pattern in self.memory.sure:
            before = self.memory.sure[pattern].by_weights
            self.known[pattern] = self.memory.sure[pattern].roles
            if None not in (before, by_weights) and before != by_weights:
                raise UsageError(
                    f"guidance favours chunk {by_weights} of the denoiser's rows, and in an earlier batch with the same options "
                    f"it was chunk {before}: " + SAY_ORDER
                )
        elif sure:
            self.memory.sure[pattern] = Known(roles, by_weights)
            self.known[pattern] = roles
        elif roles is not None:
            before = self.known.setdefault(pattern, roles)
            if place_of("cond", before) != place_of("cond", roles):
                raise UsageError(
                    "can't tell conditional from unconditional rows: this step's guidance says otherwise than an earlier step: "
                    + SAY_ORDER
                )

    def _check_places(self, pattern, forwards, R):
        """The passes must not change places from one step to the next."""
        now = {}
        for f in forwards:
            for c, role in enumerate(f.roles):
                now.setdefault(role, Rows(f.conditioning, slice(c * R, (c + 1) * R)))
        before = self._before.get(pattern, {})
        self._before[pattern] = now
        if {"cond", "uncond"} <= set(now) & set(before) and moved(now["cond"], before["cond"]):
            taken = not moved(now["cond"], before["uncond"])
            if taken and moved(now["cond"], now["uncond"]):
                raise UsageError(
                    "the conditional and the unconditional pass change places between two steps: "
                    + SAY_ORDER
                )

    def check_decided(self):
        """UsageError if no step has told some rows, unless the passes differ in none: any label is
        right then."""
        for pattern in [pattern for pattern in self.undecided if self._alike[pattern]]:
            self._label_alike(pattern)
        if self.undecided:
            raise UsageError(
                "can't tell conditional from unconditional rows: the prompts of this sampling can't be changed to see what "
                "depends on them, and in no step the guidance scale was above 1 with two different predictions (it was between "
                "0 and 1, or is the last layer still zero?): " + SAY_ORDER
            )

    def _label_alike(self, pattern):
        """As for an empty prompt beside an empty negative prompt: call the first pass
        unconditional, the last conditional."""
        steps = self.undecided.pop(pattern)
        roles, left = [], sum(round(chunks) for _, chunks, _ in pattern)
        for _, chunks, _ in pattern:
            of_forward = []
            for _ in range(round(chunks)):
                left -= 1
                of_forward.append(
                    "cond" if left == 0 else "other" if roles or of_forward else "uncond"
                )
            roles.append(of_forward)
        self.known[pattern] = roles
        for step in steps:
            for f, of_it in zip(step, roles):
                f.roles = of_it


def check_order(order):
    """UsageError for what is no order of the passes in a step."""
    if order is not None and not (
        isinstance(order, (tuple, list)) and set(order) <= {"cond", "uncond", "other"}
    ):
        raise UsageError(
            f'order: expected the passes of a step, such as ("uncond", "cond") or ("uncond", "cond", "other"), got {order!r}'
        )


SAY_ORDER = 'say order=("uncond", "cond"), or whatever the order of the passes in a step is'


def pattern_of(forwards, R):
    """What tells one kind of step from another: which denoisers ran on how many chunks, and in
    which context."""
    return tuple((f.denoiser, f.rows / R, f.context) for f in forwards)


def place_of(role, roles):
    """Index of the first chunk with this role among all chunks of a step; None without one."""
    flat = [r for of_forward in roles for r in of_forward]
    return flat.index(role) if role in flat else None


class Rows(NamedTuple):
    """The conditioning of one chunk."""

    conditioning: list  # of its forward
    rows: slice


def moved(a, b):
    """Whether two `Rows` differ. The same objects are not compared number by number."""
    of_a, of_b = a.conditioning, b.conditioning
    if a.rows == b.rows and len(of_a) == len(of_b) and all(x is y for x, y in zip(of_a, of_b)):
        return False
    return not same([x[a.rows] for x in of_a], [x[b.rows] for x in of_b])


def chunks_of(forwards, model_output, R):
    """The chunks of a step's forwards, with their weights in its model output."""
    chunks = [Chunk(f, slice(c * R, (c + 1) * R)) for f in forwards for c in range(f.rows // R)]
    if len(chunks) < 2 or any(c.forward.output is None for c in chunks):
        return chunks
    weights, certain = guidance_weights([c.output for c in chunks], model_output)
    return [
        replace(c, weight=weight, certain=of_it)
        for c, weight, of_it in zip(chunks, weights, certain)
    ]


def find_roles(forwards, model_output, R, order=None, passes=None):
    """Which rows of one step's forwards are conditional, `R` rows a chunk: (roles, by_weights,
    sure).

    roles: [[cond, uncond or other, a chunk], a forward], [] for a forward whose prediction has no
    part in `model_output`; None where this step does not tell. by_weights: index of the chunk that
    guidance favours, None where it favours none. sure: whether other steps can't say otherwise.

    The first of these that tells decides: the user's `order`; the name of the context a forward ran
    in; a single chunk is conditional; the `passes` of the same step with other prompts; then the
    guidance. Raises UsageError where rows don't fit.
    """
    if order is None and all(f.context in CONTEXTS and f.rows == R for f in forwards):
        return [[CONTEXTS[f.context]] for f in forwards], None, True
    chunks = chunks_of(forwards, model_output, R)
    used = {f.denoiser for f in forwards}
    if len(used) > 1 and all(c.forward.output is not None for c in chunks):
        sizes = [abs(c.weight) * c.output.norm().item() for c in chunks]
        if max(sizes) <= 1e-6 * max(c.output.norm().item() for c in chunks):
            return None, None, False  # guidance left nothing of any network
        used = {c.forward.denoiser for c, size in zip(chunks, sizes) if size >= 1e-3 * max(sizes)}
    for f in forwards:
        if f.denoiser in used and f.rows % R:
            raise UsageError(
                f"the denoiser got {f.rows} rows, which is no multiple of {R} (prompts x images per prompt): "
                "say how many prompts there are"
            )
    everything, chunks = chunks, [c for c in chunks if c.forward.denoiser in used]
    favoured = favoured_by_guidance(chunks)
    by_weights = None if favoured is None else everything.index(favoured)
    if len(chunks) == 1:
        roles, sure = {chunks[0]: "cond"}, True
    elif order is not None:
        if len(order) != len(chunks):
            raise UsageError(
                f"order {tuple(order)} names {len(order)} passes, and a step of this sampling has {len(chunks)}"
            )
        roles, sure = dict(zip(chunks, order)), True
    else:
        prompted = None if passes is None else answering(chunks, forwards, passes)
        roles, sure = (
            roles_by_prompt(chunks, prompted) if prompted else roles_by_guidance(chunks, favoured)
        )
    if roles is None:
        return None, by_weights, False
    return (
        [[roles.get(c, "other") for c in chunks if c.forward is f] for f in forwards],
        by_weights,
        sure,
    )


def answering(chunks, forwards, passes):
    """The chunks that differ in a step with other prompts; None where none or all of them do.

    Their conditioning tells, and where that is not among the arguments their prediction. Where
    prompts are padded to the longest one, all conditioning may change; that of an unconditional
    pass does so by little, in the part that both have.
    """
    if [(f.denoiser, f.rows) for f in forwards] != [(p.denoiser, p.rows) for p in passes]:
        return None
    pairs = [(c, Chunk(passes[forwards.index(c.forward)], c.rows)) for c in chunks]
    changed = [c for c, other in pairs if not same(c.conditioning, other.conditioning)]
    if len(changed) == len(chunks):
        sizes = [difference(c.conditioning, other.conditioning) for c, other in pairs]
        changed = [c for c, size in zip(chunks, sizes) if size > 0.1 * max(sizes)]
    if not changed:
        changed = [c for c, other in pairs if not torch.equal(c.output, other.output)]
    return changed if 0 < len(changed) < len(chunks) else None


def difference(a, b):
    """The largest relative difference between two lists of tensors, in the part of each that both
    have."""
    sizes = [0.0]
    for x, y in zip(tensors(a), tensors(b)):
        if x.ndim == y.ndim and x.is_floating_point():
            common = tuple(slice(min(m, n)) for m, n in zip(x.shape, y.shape))
            x, y = x[common].double(), y[common].double()
            sizes.append(((x - y).norm() / y.norm().clamp_min(1e-300)).item())
    return max(sizes)


def roles_by_prompt(chunks, prompted):
    """(roles, sure), or (None, False): one of several chunks that prompts change is perturbed, and
    guidance subtracts that."""
    favoured = prompted[0]
    if len(prompted) > 1:
        favoured = favoured_by_guidance(chunks, prompted)
    if favoured is None:
        return None, False
    return {c: "other" for c in prompted} | {
        least([c for c in chunks if c not in prompted]): "uncond",
        favoured: "cond",
    }, True


def roles_by_guidance(chunks, favoured):
    """(roles, sure), or (None, False) where this step does not tell."""
    if are_alike(chunks):
        return (
            None,
            False,
        )  # another step may tell; `RoleFinder.check_decided` knows what to do if none does
    varying = [c for c in chunks if c.varies and c not in subtracted(chunks)]
    cond = favoured or (varying[0] if len(varying) == 1 else None)
    if cond is None:
        return None, False
    return {find_unconditional(chunks, cond): "uncond", cond: "cond"}, False


def are_alike(chunks):
    """Whether all passes have the same conditioning, and predictions that can't be told apart."""
    return all(same(c.conditioning, chunks[0].conditioning) for c in chunks) and not all(
        c.certain for c in chunks
    )


def subtracted(chunks):
    """Those that guidance subtracts, none where it is not certain."""
    total = sum(c.weight for c in chunks)
    return [c for c in chunks if all(c.certain for c in chunks) and c.weight * total < -1e-3]


def favoured_by_guidance(chunks, candidates=None):
    """The only chunk, of the candidates, that guidance adds while it subtracts others; None where
    there is no such one.

    Where the conditioning of some varies from row to row, it is one of those. The scale is taken
    for one above 0: with one below, the weights of the two passes are those of a scale above 1 with
    the passes exchanged, and only `order` can tell.
    """
    less = subtracted(chunks)
    left = [c for c in (candidates or chunks) if less and c not in less]
    left = [c for c in left if c.varies] or left
    return left[0] if len(left) == 1 else None


def find_unconditional(chunks, cond):
    """Of several others, one with the conditional chunk's own conditioning is a perturbed pass, and
    the unconditional one is all zeros wherever it differs from the rest. None if it is none of
    them.
    """
    rest = [c for c in chunks if c is not cond]
    if all(
        c.certain for c in chunks
    ):  # else two passes may have the same prediction, being the same
        rest = [c for c in rest if not same(c.conditioning, cond.conditioning)]
    return least(rest)


def least(chunks):
    """The chunk that is all zeros wherever it differs from the others; the only one; None if there
    is none."""
    if len(chunks) > 1:
        chunks = [
            a for a in chunks if all(is_less(a.inputs, b.inputs) for b in chunks if b is not a)
        ]
    return chunks[0] if len(chunks) == 1 else None


def is_less(a, b):
    """Whether inputs `a` are zero wherever they differ from inputs `b`, and somewhere differ."""
    pairs = [(x, y) for x, y in zip(tensors(a), tensors(b)) if not torch.equal(x, y)]
    return bool(pairs) and all(x.shape == y.shape and not x[x != y].any() for x, y in pairs)
