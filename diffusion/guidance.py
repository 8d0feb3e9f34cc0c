"""Find out which rows of a denoiser's batch are conditional: those that the positive prompts
change.

With classifier-free guidance a denoiser computes several *chunks* of rows in each step: one with
the prompts ("cond"), one without them or with the negative prompts ("uncond"), and perhaps
perturbed ones ("other"). They stand in one batch or in several calls, in an order that each
pipeline chooses.

Example: two prompts, guidance scale 5, three steps. In each step the pipeline calls "unet" once,
with the 4 rows [uncond 0, uncond 1, cond 0, cond 1]. A chunk has R = 2 rows.

    before   hook.py runs the first step with other prompts, throws it away, and keeps one
             `OtherForward`: what the denoiser was given and what it predicted.
    step 0   `RoleFinder.label` gets one forward. Its pattern is (("unet", 2.0, None),): "unet" ran
             on 2 chunks, in no named context. The pattern is new, so `find_roles` compares the
             step with the `OtherForward`. Rows 0 and 1 have the same text embeddings in both, rows
             2 and 3 have others. It returns StepRoles([["uncond", "cond"]], favoured=1,
             is_sure=True), so the forward gets the roles ["uncond", "cond"], and the memory keeps
             the pattern.
    step 1   The pattern is known, so nothing is computed. The text embeddings of the two chunks are
    step 2   compared with those of the step before, in case the chunks have changed places.

The next batch with the same options has the same memory, so no step is run for it beforehand. In
its step 0 only the guidance is compared: if it favours another chunk than number 1, this is an
error.

If the prompts can't be changed, as in a loop of the user's own, only the guidance tells. The
scheduler gets `model_output` = 5 cond - 4 uncond. Least squares over the chunks of the denoiser's
output gives the weights [-4, 5] back (`guidance_weights`), also if the loop has added a multiple of
the sample, as one that predicts the clean image does. Chunk 0 is subtracted, so chunk 1 is
conditional. At a guidance scale of 0 or 1 one weight is 0, and nothing is subtracted. Then the
chunk whose embeddings differ between the two prompts is conditional. With a single prompt the step
tells nothing: a later step has to, and all steps that tell must agree. A network that left nothing
in the model output is no denoiser.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.forward import Forward
from diffusion.schedulers import number
from diffusion.signatures import tensors
from errors import UsageError

Roles = list[list[str]]
"""For each forward of a step the role of each of its chunks, such as [["uncond", "cond"]]; [] for a
forward that left nothing in the model output."""

Pattern = tuple[tuple[str, float, str | None], ...]
"""One kind of step, see `pattern_of`."""

# The names of diffusers' `cache_context`, and what they say of the rows computed in it.
CONTEXTS = {
    "cond": "cond",
    "pred_cond": "cond",
    "uncond": "uncond",
    "pred_uncond": "uncond",
}

SAY_ORDER = (
    "use a guidance scale above 1 (--guidance_scale), or in Python say "
    'order=("uncond", "cond"), or whatever the order of the passes in a step is'
)


class OtherForward(NamedTuple):
    """A forward that ran with other prompts: what is compared with a forward of the sampling."""

    denoiser: str
    rows: int

    conditioning: list
    """As in `Forward`."""

    output: Tensor | None


class StepRoles(NamedTuple):
    """What one step tells about the roles of its rows, see `find_roles`."""

    roles: Roles | None
    """None if the step does not tell them."""

    favoured: int | None
    """The index, among all chunks of the step, of the chunk that guidance adds while it subtracts
    others. None if there is no such chunk."""

    is_sure: bool
    """Whether no other step of this pattern can tell other roles."""


@dataclass(eq=False)
class Memory:
    """What the samplings of one pipeline with the same options learn from each other."""

    sure: dict[Pattern, StepRoles] = field(default_factory=dict)
    """The patterns whose roles are known for sure."""

    asked: bool = False
    """Whether a step with other prompts has been compared, or there are no prompts to change."""

    images_are_checked: bool = False
    """Whether it is known that an image that the pipeline is given reaches only its prompt's
    rows."""


class ChunkConditioning(NamedTuple):
    """The conditioning of one chunk, without the rest of its forward."""

    of_forward: list
    rows: slice

    def differs_from(self, other: "ChunkConditioning") -> bool:
        """Return whether any number differs. The same tensors in memory are not compared number by
        number, since that would wait for a GPU in every step."""
        mine = self.of_forward
        theirs = other.of_forward
        may_be_identical = self.rows == other.rows and len(mine) == len(theirs)
        if may_be_identical and all(x is y for x, y in zip(mine, theirs)):
            return False
        return not same([x[self.rows] for x in mine], [x[other.rows] for x in theirs])


@dataclass(eq=False)
class RoleFinder:
    """Labels the rows of one sampling, one step at a time.

    All steps of one pattern have the same roles. When a step of a pattern is complete, the first of
    these cases that fits applies:

    1. `memory.sure` has the pattern. Its roles hold. At the pattern's first step in this sampling,
       the guidance is also compared with that of the earlier sampling: UsageError if both favour a
       chunk and it is not the same one.
    2. This step tells the roles for sure (`find_roles`). They hold, and the memory keeps them for
       all later steps and samplings.
    3. This step tells the roles by its guidance only. They hold for this sampling, and each later
       step that tells must name the same conditional chunk, otherwise UsageError.
    4. This step tells nothing, and an earlier step did, by case 3. That step's roles hold.
    5. No step has told anything so far. The step is put into `undecided`, and its forwards have no
       roles. The first step that tells labels all undecided ones. At the end of the sampling,
       `label_or_refuse_the_rest` does so.

    For example, one prompt in a loop of the user's own, at guidance scales 0, 1 and 5: steps 0 and
    1 are undecided (case 5), and step 2 labels all three (case 3).
    """

    order: tuple[str, ...] | None = None
    """The roles of the chunks in a step, such as ("uncond", "cond"), if the user gives them."""

    other_forwards: list[OtherForward] | None = None
    """One for each forward of the first step of the same sampling with other prompts."""

    memory: Memory = field(default_factory=Memory)

    known: dict[Pattern, Roles] = field(default_factory=dict)
    """The roles that hold in this sampling. Those of a dry run are given to the sampling after
    it."""

    undecided: dict[Pattern, list[list[Forward]]] = field(default_factory=dict, init=False)
    """The steps whose roles are still unknown, each a list of its forwards."""

    _all_alike: dict[Pattern, bool] = field(default_factory=dict, init=False)
    """Whether in each undecided step of the pattern no chunk differs from another."""

    _met: set[Pattern] = field(default_factory=set, init=False)
    """The patterns of the steps of this sampling."""

    _last: dict[Pattern, dict[str, ChunkConditioning]] = field(default_factory=dict, init=False)
    """For each pattern the conditioning of each role's first chunk, in the pattern's last step."""

    def label(
        self, forwards: list[Forward], model_output: Tensor, R: int, sample: Tensor | None = None
    ) -> None:
        """Set the `roles` of the forwards of a complete step, if this or an earlier step tells
        them.

        R: rows of one chunk. sample: what is stepped. Raises UsageError if the step contradicts an
        earlier one, and if its rows can't be chunks of R.
        """
        pattern = pattern_of(forwards, R)
        if pattern not in self._met or pattern not in self.memory.sure:
            told = find_roles(forwards, model_output, R, self.order, self.other_forwards, sample)
            self._learn(pattern, told)
        self._met.add(pattern)

        roles = self.known.get(pattern)
        if roles is None:
            self._add_undecided(pattern, forwards, model_output, R, sample)
            return
        for step in self.undecided.pop(pattern, []):
            set_roles(step, roles)
        set_roles(forwards, roles)
        if pattern in self.memory.sure:
            self._check_exchange(pattern, forwards, R)

    def _learn(self, pattern: Pattern, told: StepRoles) -> None:
        """Take what a step tells into `known` and the memory: cases 1 to 3 above."""
        if self.other_forwards is not None:
            self.memory.asked = True

        remembered = self.memory.sure.get(pattern)
        if remembered is not None:
            self.known[pattern] = remembered.roles
            both_tell = remembered.favoured is not None and told.favoured is not None
            if both_tell and remembered.favoured != told.favoured:
                raise UsageError(
                    f"guidance favours chunk {told.favoured} of the denoiser's rows, and in an "
                    "earlier batch with the same options it was chunk "
                    f"{remembered.favoured}: {SAY_ORDER}"
                )
        elif told.is_sure:
            self.memory.sure[pattern] = told
            self.known[pattern] = told.roles
        elif told.roles is not None:
            before = self.known.setdefault(pattern, told.roles)
            if conditional_chunk(before) != conditional_chunk(told.roles):
                raise UsageError(
                    "can't tell conditional from unconditional rows: this step's guidance says "
                    f"otherwise than an earlier step: {SAY_ORDER}"
                )

    def _add_undecided(
        self,
        pattern: Pattern,
        forwards: list[Forward],
        model_output: Tensor,
        R: int,
        sample: Tensor | None,
    ) -> None:
        """Put a step among the undecided ones: case 5 above."""
        self.undecided.setdefault(pattern, []).append(forwards)
        if self._all_alike.get(pattern, True):
            self._all_alike[pattern] = are_alike(chunks_of(forwards, model_output, R, sample))

    def _check_exchange(self, pattern: Pattern, forwards: list[Forward], R: int) -> None:
        """Raise UsageError if the conditional chunk has what was the unconditional chunk's
        conditioning in the step before."""
        now = {}
        for forward in forwards:
            for c, role in enumerate(forward.roles):
                rows = slice(c * R, (c + 1) * R)
                now.setdefault(role, ChunkConditioning(forward.conditioning, rows))
        before = self._last.get(pattern, {})
        self._last[pattern] = now

        if not {"cond", "uncond"} <= now.keys() & before.keys():
            return
        if not now["cond"].differs_from(before["cond"]):
            return
        was_unconditional = not now["cond"].differs_from(before["uncond"])
        if was_unconditional and now["cond"].differs_from(now["uncond"]):
            raise UsageError(
                "the conditional and the unconditional pass change places between two steps: "
                + SAY_ORDER
            )

    def label_or_refuse_the_rest(self) -> None:
        """Label the steps whose roles are still unknown if their chunks are all alike, since any
        label is right then. Raises UsageError if a step is left whose chunks differ."""
        some_told = bool(self.known)
        for pattern in list(self.undecided):
            if self._all_alike[pattern]:
                self._label_alike(pattern)
        if not self.undecided:
            return
        waiting_forwards = next(iter(self.undecided.values()))[0]
        step = waiting_forwards[0].index
        if self.known and len(waiting_forwards) > 1:
            rows = " and ".join(str(forward.rows) for forward in waiting_forwards)
            raise UsageError(
                "can't tell conditional from unconditional rows: before the scheduler made step "
                f"{step}, the denoiser was called on {rows} rows, unlike in the steps "
                "that tell which are which; make calls that are no part of the sampling, such as a "
                "warm-up or another pipeline's, outside of the cache"
            )
        no_step = f"in no step of the kind of step {step}" if some_told else "in no step"
        raise UsageError(
            "can't tell conditional from unconditional rows: the prompts of this sampling can't "
            f"be changed to see what depends on them, and {no_step} the guidance scale was above 1 "
            "with two different predictions (it was between 0 and 1, or is the last layer still "
            f"zero, or was the denoiser called outside of the steps?): {SAY_ORDER}"
        )

    def _label_alike(self, pattern: Pattern) -> None:
        """Call the first chunk unconditional, the last one conditional and those between "other".

        This happens for an empty prompt beside an empty negative prompt.
        """
        sizes = [round(chunks) for _, chunks, _ in pattern]
        flat = ["other"] * sum(sizes)
        flat[0] = "uncond"
        flat[-1] = "cond"  # also of a single chunk

        roles = []
        for size in sizes:
            roles.append(flat[:size])
            flat = flat[size:]
        self.known[pattern] = roles
        for step in self.undecided.pop(pattern):
            set_roles(step, roles)


def set_roles(forwards: list[Forward], roles: Roles) -> None:
    """Give each forward of a step its roles."""
    for forward, roles_of_forward in zip(forwards, roles):
        forward.roles = roles_of_forward


def pattern_of(forwards: list[Forward], R: int) -> Pattern:
    """Return which denoisers ran in a step, on how many chunks of R rows, and in which context.

    For one call of "unet" with 4 rows, and R = 2, it is (("unet", 2.0, None),).
    """
    return tuple((forward.denoiser, forward.rows / R, forward.context) for forward in forwards)


def role_of_context(forward: Forward, R: int) -> str | None:
    """Return the role of a forward of one chunk by the name of the context that it runs in; None if
    there is no such name, or if it has several chunks."""
    return CONTEXTS.get(forward.context) if forward.rows == R else None


def conditional_chunk(roles: Roles) -> int | None:
    """Return the index of the first conditional chunk among all chunks of a step, or None.

    For [["uncond"], ["cond"]] it is 1.
    """
    flat = [role for roles_of_forward in roles for role in roles_of_forward]
    return flat.index("cond") if "cond" in flat else None


def check_order(order: tuple[str, ...] | None) -> None:
    """Raise UsageError for anything but None and a tuple or list of "cond", "uncond", "other"."""
    if order is None:
        return
    if not isinstance(order, (tuple, list)) or not set(order) <= {"cond", "uncond", "other"}:
        raise UsageError(
            'order: expected the passes of a step, such as ("uncond", "cond") or '
            f'("uncond", "cond", "other"), got {order!r}'
        )


# ------------------------------------------------------------------------------ what one step tells


@dataclass(eq=False)
class Chunk:
    """R rows of one forward that belong together, such as the conditional ones: a row per
    sample."""

    forward: Forward | OtherForward
    rows: slice

    weight: float = 0.0
    """Its weight in the model output, see `guidance_weights`."""

    certain: bool = False
    """Whether no other chunk could have this weight in its place."""

    @property
    def output(self) -> Tensor:
        """The prediction for these rows, (R, ...). The forward's output must be a tensor."""
        return self.forward.output[self.rows]

    @property
    def conditioning(self) -> list:
        """What the denoiser was given for these rows besides sample and time, such as
        embeddings."""
        return [x[self.rows] for x in self.forward.conditioning]

    @property
    def inputs(self) -> list:
        """The sample of these rows, and their conditioning."""
        return [self.forward.sample[self.rows], *self.conditioning]

    @property
    def varies(self) -> bool:
        """Whether the conditioning differs between rows. Then it comes from the prompts, and not
        from one negative prompt for all of them."""
        for x in self.conditioning:
            for r in range(1, len(x)):
                if not same(x[:1], x[r : r + 1]):
                    return True
        return False


def find_roles(
    forwards: list[Forward],
    model_output: Tensor,
    R: int,
    order: tuple[str, ...] | None = None,
    other_forwards: list[OtherForward] | None = None,
    sample: Tensor | None = None,
) -> StepRoles:
    """Return which rows of one step's forwards are conditional, as far as this step tells.

    A denoiser whose predictions have no part in `model_output` gets no roles. For the others, the
    first of these that fits decides:

    1. All forwards ran in a named context, and the user gave no `order`: the names (sure).
    2. There is a single chunk: it is conditional (sure).
    3. The user gave an `order` (sure).
    4. Some chunks changed with other prompts, see `changed_by_prompts`, and others did not (sure,
       but if several changed and guidance favours none of them, nothing is told).
    5. The guidance of this step (not sure).

    R: rows of one chunk. other_forwards: the forwards of the same step with other prompts. sample:
    what the scheduler steps, see `guidance_weights`. Raises UsageError if the rows are no multiple
    of R, or if there are not as many chunks as `order` names.
    """
    if order is None:
        by_context = [role_of_context(forward, R) for forward in forwards]
        if None not in by_context:
            return StepRoles([[role] for role in by_context], None, is_sure=True)

    all_chunks = chunks_of(forwards, model_output, R, sample)
    used = used_denoisers(all_chunks, {forward.denoiser for forward in forwards})
    if not used:
        return StepRoles(None, None, is_sure=False)
    for forward in forwards:
        if forward.denoiser in used and forward.rows % R:
            raise UsageError(
                f"the denoiser got {forward.rows} rows, which is no multiple of {R} "
                "(prompts x images per prompt): say how many prompts there are"
            )

    chunks = [chunk for chunk in all_chunks if chunk.forward.denoiser in used]
    favoured = favoured_by_guidance(chunks)
    favoured_index = None if favoured is None else all_chunks.index(favoured)
    role_of_chunk, is_sure = roles_of_chunks(chunks, favoured, forwards, order, other_forwards)
    if role_of_chunk is None:
        return StepRoles(None, favoured_index, is_sure=False)

    roles = []
    for forward in forwards:
        own_chunks = [chunk for chunk in chunks if chunk.forward is forward]
        roles.append([role_of_chunk.get(chunk, "other") for chunk in own_chunks])
    return StepRoles(roles, favoured_index, is_sure)


def roles_of_chunks(
    chunks: list[Chunk],
    favoured: Chunk | None,
    forwards: list[Forward],
    order: tuple[str, ...] | None,
    other_forwards: list[OtherForward] | None,
) -> tuple[dict[Chunk, str] | None, bool]:
    """Return {chunk: role}, and whether the roles are sure: cases 2 to 5 of `find_roles`.

    A chunk without a role is "other". The roles are None if this step does not tell them.
    """
    if len(chunks) == 1:
        return {chunks[0]: "cond"}, True

    if order is not None:
        if len(order) != len(chunks):
            raise UsageError(
                f"order {tuple(order)} names {len(order)} passes, and a step of this sampling has "
                f"{len(chunks)}"
            )
        return dict(zip(chunks, order)), True

    changed = None
    if other_forwards is not None:
        changed = changed_by_prompts(chunks, forwards, other_forwards)
    if changed is not None:
        return roles_by_prompt(chunks, changed), True
    return roles_by_guidance(chunks, favoured), False


def chunks_of(
    forwards: list[Forward], model_output: Tensor, R: int, sample: Tensor | None = None
) -> list[Chunk]:
    """Return all chunks of a step, with their weights in its model output.

    The weights stay 0 and uncertain for a single chunk, and if a forward returned no tensor.
    """
    chunks = []
    for forward in forwards:
        for c in range(forward.rows // R):
            chunks.append(Chunk(forward, slice(c * R, (c + 1) * R)))
    if len(chunks) < 2 or any(chunk.forward.output is None for chunk in chunks):
        return chunks

    outputs = [chunk.output for chunk in chunks]
    weights, certain = guidance_weights(outputs, model_output, sample)
    with_weights = []
    for chunk, weight, is_certain in zip(chunks, weights, certain):
        with_weights.append(replace(chunk, weight=weight, certain=is_certain))
    return with_weights


class GuidanceWeights(NamedTuple):
    """How a model output is mixed from chunks of predictions."""

    weights: list[float]
    """One per chunk; 0 for a chunk that is smaller than the model output."""

    certain: list[bool]
    """One per chunk. It is False if other chunks could take its place, as identical predictions
    can: they share their weight."""


def guidance_weights(
    chunks: list[Tensor], model_output: Tensor, sample: Tensor | None = None
) -> GuidanceWeights:
    """Fit `model_output = sum_i weights[i] * chunks[i]` by least squares, in float64.

    chunks: (R, ...) each; model_output: (R, ...). For chunks u and c and the model output 5c - 4u
    it returns weights [-4, 5], both certain; for c twice and the model output c, [0.5, 0.5], both
    uncertain. If any number is not finite, all weights are 0 and uncertain: an edit may have made a
    prediction overflow. What a chunk has beyond the model output's shape, such as a learned
    variance or the tokens of a reference image, is left out.

    sample: what the scheduler steps, (R, ...). The model output may also hold any multiple of each
    of its rows: a loop may turn the guided noise g into the clean image (sample - 0.6 g) / 0.8.
    Since a sample resembles the noise in it, the chunks alone would be fitted to it with any signs.
    """
    target = model_output.detach().cpu().double()
    columns = torch.zeros(len(chunks), target.numel(), dtype=torch.float64)
    for column, chunk in zip(columns, chunks):
        x = cropped(chunk.detach().cpu().double(), target[: len(chunk)].shape)
        if x is not None:
            column[: x.numel()] = x.flatten()

    if not (target.isfinite().all() and columns.isfinite().all()):
        return GuidanceWeights([0.0] * len(chunks), [False] * len(chunks))

    sizes = columns.norm(dim=1, keepdim=True).clamp_min(1e-300)
    columns = columns / sizes
    fit = fit_weights(columns, target.flatten())
    if torch.is_tensor(sample):
        x = cropped(sample.detach().cpu().double(), target.shape)
        if x is not None and x.isfinite().all():
            rest = without(columns.view(len(columns), *target.shape), x).flatten(1)
            beside_sample = fit_weights(rest, without(target, x).flatten())
            # a prediction may be a multiple of the sample, as that of an untrained network is
            if all(beside_sample.certain):
                fit = beside_sample
    weights = torch.tensor(fit.weights, dtype=torch.float64) / sizes.flatten()
    return GuidanceWeights(weights.tolist(), fit.certain)


def fit_weights(columns: Tensor, target: Tensor) -> GuidanceWeights:
    """Fit `target = weights @ columns`, for columns (n, N) of norm 1 or less and a target (N,).

    Differences between columns of less than 1e-6 are rounding errors.
    """
    A = columns.T
    inverse = torch.linalg.pinv(A, atol=1e-6, rtol=1e-6)
    certain = (inverse @ A).diagonal() > 1 - 1e-6
    weights = inverse @ target
    return GuidanceWeights(weights.tolist(), certain.tolist())


def without(x: Tensor, sample: Tensor) -> Tensor:
    """Return x (..., R, ...) less what each row has along the same row of `sample` (R, ...).

    For the rows [[3, 4]] and the sample [[1, 0]] it is [[0, 4]].
    """
    direction = sample.reshape(len(sample), -1)
    direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-300)
    rows = x.reshape(-1, *direction.shape)
    along = (rows * direction).sum(-1, keepdim=True)
    return (rows - along * direction).view(x.shape)


def cropped(x: Tensor, shape: torch.Size) -> Tensor | None:
    """Return the first part of x, with as many numbers as `shape` has; None if x is too small.

    An axis of x that is longer is cut: (2, 8, 4, 4) becomes (2, 4, 4, 4). A tensor that has the
    right count of numbers in another shape stays as it is.
    """
    count = shape.numel()
    may_be_cut = x.numel() != count and x.ndim == len(shape)
    if may_be_cut and all(mine >= wanted for mine, wanted in zip(x.shape, shape)):
        x = x[tuple(slice(wanted) for wanted in shape)]
    return x if x.numel() == count else None


def used_denoisers(chunks: list[Chunk], denoisers: set[str]) -> set[str]:
    """Return the denoisers whose predictions go into the model output; the empty set if guidance
    left nothing of any of them.

    If there is a single denoiser, it is returned. If one returned no tensor, all are returned,
    since nothing can be compared. A chunk does not go into the model output if |weight| *
    |prediction| is below a thousandth of the largest one.
    """
    if len(denoisers) == 1 or any(chunk.forward.output is None for chunk in chunks):
        return denoisers
    norms = [chunk.output.norm().item() for chunk in chunks]
    sizes = [abs(chunk.weight) * norm for chunk, norm in zip(chunks, norms)]
    if max(sizes) <= 1e-6 * max(norms):
        return set()
    used = set()
    for chunk, size in zip(chunks, sizes):
        if size >= 1e-3 * max(sizes):
            used.add(chunk.forward.denoiser)
    return used


# --------------------------------------------------------------------- by a step with other prompts


def changed_by_prompts(
    chunks: list[Chunk], forwards: list[Forward], other_forwards: list[OtherForward]
) -> list[Chunk] | None:
    """Return the chunks that changed in a step with other prompts.

    A chunk is compared with the same rows of the same forward of that step. Its conditioning
    counts, and if no chunk's conditioning changed, its prediction: some denoisers do not get their
    conditioning as arguments. If all conditioning changed, the prompts may be padded to the longest
    one. Then that of an unconditional chunk changed by little in the part that both steps have, and
    only changes of more than a tenth of the largest one count.

    It is None if that step's forwards had other denoisers or row counts, if a prediction that would
    count is no tensor, and if all or none of the chunks count as changed.
    """
    kinds = [(forward.denoiser, forward.rows) for forward in forwards]
    if kinds != [(other.denoiser, other.rows) for other in other_forwards]:
        return None

    pairs = []
    for chunk in chunks:
        other = other_forwards[forwards.index(chunk.forward)]
        pairs.append((chunk, Chunk(other, chunk.rows)))

    changed = [chunk for chunk, other in pairs if not same(chunk.conditioning, other.conditioning)]
    if len(changed) == len(chunks):
        sizes = [difference(chunk.conditioning, other.conditioning) for chunk, other in pairs]
        changed = [chunk for chunk, size in zip(chunks, sizes) if size > 0.1 * max(sizes)]
    if not changed:
        if any(forward.output is None for forward in [*forwards, *other_forwards]):
            return None
        changed = [chunk for chunk, other in pairs if not torch.equal(chunk.output, other.output)]
    return changed if 0 < len(changed) < len(chunks) else None


def roles_by_prompt(chunks: list[Chunk], changed: list[Chunk]) -> dict[Chunk, str] | None:
    """Return {chunk: role} where `changed` are the chunks that depend on the prompts; None if this
    step does not tell.

    If several depend on the prompts, all but one of them are perturbed passes. Guidance subtracts
    those, so it favours the conditional one.
    """
    cond = changed[0]
    if len(changed) > 1:
        cond = favoured_by_guidance(chunks, changed)
    if cond is None:
        return None
    roles = dict.fromkeys(changed, "other")
    uncond = zeroed_chunk([chunk for chunk in chunks if chunk not in changed])
    if uncond is not None:
        roles[uncond] = "uncond"
    roles[cond] = "cond"
    return roles


def difference(a: list, b: list) -> float:
    """Return the largest |x - y| / |y| over pairs of tensors x in a, y in b, in the part of each
    that both have.

    Integers do not count, nor pairs whose two tensors have unequal numbers of axes.
    """
    sizes = [0.0]
    for x, y in zip(tensors(a), tensors(b)):
        if x.ndim == y.ndim and x.is_floating_point():
            common = tuple(slice(min(m, n)) for m, n in zip(x.shape, y.shape))
            x = x[common].double()
            y = y[common].double()
            relative = (x - y).norm() / y.norm().clamp_min(1e-300)
            sizes.append(relative.item())
    return max(sizes)


# -------------------------------------------------------------------------------------- by guidance


def roles_by_guidance(chunks: list[Chunk], favoured: Chunk | None) -> dict[Chunk, str] | None:
    """Return {chunk: role} by this step's guidance; None if the guidance does not tell.

    The conditional chunk is the one that guidance favours. If it favours none, it is the only one
    whose conditioning varies from row to row and that is not subtracted.
    """
    if are_alike(chunks):
        return None  # another step may tell, otherwise see `RoleFinder.label_or_refuse_the_rest`
    cond = favoured
    if cond is None:
        less = subtracted(chunks)
        varying = [chunk for chunk in chunks if chunk.varies and chunk not in less]
        cond = varying[0] if len(varying) == 1 else None
    if cond is None:
        return None
    roles = {}
    uncond = find_unconditional(chunks, cond)
    if uncond is not None:
        roles[uncond] = "uncond"
    roles[cond] = "cond"
    return roles


def favoured_by_guidance(
    chunks: list[Chunk], candidates: list[Chunk] | None = None
) -> Chunk | None:
    """Return the one candidate that guidance adds while it subtracts others.

    It is None if guidance subtracts none, or if several candidates are left. Candidates whose
    conditioning varies from row to row come first. With weights [-4, 5] it is chunk 1, and with
    [0, -4, 5] chunk 2: a call that only warms up the denoiser has no weight.

    The guidance scale is assumed to be above 0. A scale of -2 gives the weights [3, -2], which are
    also those of scale 3 with the two passes exchanged, so there only `order` can tell.
    """
    less = subtracted(chunks)
    if not less:
        return None
    left = [chunk for chunk in weighted(chunks) if chunk not in less]
    if candidates is not None:
        left = [chunk for chunk in left if chunk in candidates]
    varying = [chunk for chunk in left if chunk.varies]
    if varying:
        left = varying
    return left[0] if len(left) == 1 else None


def subtracted(chunks: list[Chunk]) -> list[Chunk]:
    """Return the chunks whose weight has the opposite sign of the sum of all weights.

    There are none if any weight is uncertain, or if the sum is 0 up to rounding. With weights
    [-4, 5] it is chunk 0. So it is with [-0.004, 0.005]: a loop may scale its prediction by the
    noise, of which little is left at the end.
    """
    if not all(chunk.certain for chunk in chunks):
        return []
    total = sum(chunk.weight for chunk in chunks)
    largest = max(abs(chunk.weight) for chunk in chunks)
    if abs(total) < 1e-3 * largest:
        return []
    return [chunk for chunk in chunks if chunk.weight * total < -1e-3 * total**2]


def weighted(chunks: list[Chunk]) -> list[Chunk]:
    """Return the chunks whose weight is at least a thousandth of the sum of all weights.

    With weights [0, -4, 5] these are chunks 1 and 2.
    """
    total = sum(chunk.weight for chunk in chunks)
    return [chunk for chunk in chunks if abs(chunk.weight) >= 1e-3 * abs(total)]


def find_unconditional(chunks: list[Chunk], cond: Chunk) -> Chunk | None:
    """Return the unconditional chunk of a step whose conditional chunk is known; None if there is
    none.

    A chunk with the conditional one's conditioning is a perturbed pass, if the two predictions
    differ. A chunk without weight and with another sample or time is no pass of this step, but
    a call that warms up the denoiser, for example. Among several others the unconditional one is
    the `zeroed_chunk`.
    """
    rest = [chunk for chunk in chunks if chunk is not cond]
    if all(chunk.certain for chunk in chunks):
        rest = [chunk for chunk in rest if not same(chunk.conditioning, cond.conditioning)]
        with_weight = weighted(chunks)
        rest = [chunk for chunk in rest if chunk in with_weight or same_input(chunk, cond)]
    return zeroed_chunk(rest)


def same_input(a: Chunk, b: Chunk) -> bool:
    """Return whether two chunks have the same sample and the same time."""
    same_time = number(a.forward.time) == number(b.forward.time)
    return same_time and same(a.forward.sample[a.rows], b.forward.sample[b.rows])


def zeroed_chunk(chunks: list[Chunk]) -> Chunk | None:
    """Return the chunk whose inputs are zero wherever they differ from those of the other chunks.

    It is None if there is no such chunk, or more than one. A single chunk is returned whatever its
    inputs are. The zeros are how pipelines without negative prompts mark a missing condition.
    """
    if len(chunks) > 1:
        candidates = []
        for chunk in chunks:
            others = [other for other in chunks if other is not chunk]
            if all(is_zeroed(chunk.inputs, other.inputs) for other in others):
                candidates.append(chunk)
        chunks = candidates
    return chunks[0] if len(chunks) == 1 else None


def is_zeroed(a: list, b: list) -> bool:
    """Return whether the tensors of `a` are zero wherever they differ from those of `b`, and differ
    at all.

    For [tensor([1, 0])] and [tensor([1, 2])] it is True, the other way round False.
    """
    differing = [(x, y) for x, y in zip(tensors(a), tensors(b)) if not torch.equal(x, y)]
    for x, y in differing:
        if x.shape != y.shape or x[x != y].any():
            return False
    return len(differing) > 0


def are_alike(chunks: list[Chunk]) -> bool:
    """Return whether all chunks have the same conditioning, and predictions that can't be told
    apart."""
    if all(chunk.certain for chunk in chunks):
        return False
    return all(same(chunk.conditioning, chunks[0].conditioning) for chunk in chunks)


def same(a: Tensor | list, b: Tensor | list) -> bool:
    """Return whether two tensors, or two nested lists of tensors, are equal in structure and in
    every number."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return torch.equal(a, b)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
