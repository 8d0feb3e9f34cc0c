"""Edits of features: what an SAE's latents add to an activation is changed, and the rest of the
activation is kept.

    x' = x + delta,   delta = sum over the chosen features of (new activation - activation) W_dec[feature]

What the SAE does not explain of x stays as it is, so an edit that changes no activation changes no
bit. `multiply` acts where a feature is active; `add` acts on every token, in units of the step's
RMS norm: the root of the mean |x|^2 over the tokens of this picture at this step, so that one
number means the same at every step and in every model.

How far an edit leaves the activations that the model itself makes is measured against those that
the SAE was trained on (`Typical`): steering that looks harmless by its features can push what later
layers get far off (arXiv 2606.31699).
"""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from analysis.metrics import usual_scale
from errors import UsageError
from hook import Edit
from sae import Sae
from store.dataset import Activations, open_activations
from store.hook_point import HookPoint

ROLES = {"cond": ("cond",), "uncond": ("uncond",), "both": ("cond", "uncond")}
"""Which chunks of the guidance an edit of these rows gets, each on its own."""

Change = Callable[[Tensor, float], Tensor | None]
"""(x (P, T, d) float32, timestep) -> what is added to x (P, T, d), or None for nothing."""


def check_features(sae, features):
    """int64 (F,) on the SAE's device. Raises UsageError for one that the SAE does not have, or that
    is named twice."""
    for feature in features:
        if not 0 <= feature < sae.num_latents:
            raise UsageError(
                f"feature {feature}: the SAE has {sae.num_latents}, numbered 0 to {sae.num_latents - 1}"
            )
    if len(set(features)) < len(features):
        raise UsageError(f"a feature is named twice: {' '.join(map(str, features))}")
    return torch.as_tensor(features, device=sae.W_dec.device)


def check_input_width(sae: Sae, x: Tensor) -> None:
    """Raise UsageError if the vectors x (..., d) are of another width than those that the SAE
    takes."""
    if x.shape[-1] != sae.d_in:
        raise UsageError(
            f"the SAE takes width {sae.d_in}, and this hook point has width {x.shape[-1]}"
        )


def map_samples(
    fn: Callable[[Tensor], Tensor], x: Tensor, stream: str, device: torch.device
) -> Tensor:
    """fn (1, n, d) -> (1, n, d) of each prompt's tokens on its own: x (P, T, d) -> (P, T, d).

    Memory does not grow with P. Padding of text, tokens that are all zeros, stays zero and is not
    given to fn, which runs on `device`.
    """
    result = torch.zeros_like(x)
    for tokens, out in zip(x, result):
        real = (tokens != 0).any(1) if stream == "text" else slice(None)
        vectors = tokens[real].to(device)
        if len(vectors):
            out[real] = fn(vectors[None])[0].to(out)
    return result


@torch.no_grad()
def delta(
    sae: Sae, x: Tensor, features: Tensor, new: Callable[[Tensor], Tensor], stream: str = "image"
) -> Tensor:
    """What changing features adds to the tokens x (P, T, d) float32: (P, T, d), exactly 0 where
    nothing changes.

    features: int64 (F,). new(acts (n, F)) -> their new activations (n, F). Padding of text, which
    is zeros, stays. Raises UsageError where widths differ.
    """
    check_input_width(sae, x)
    F = len(features)
    column = torch.full(
        (sae.num_latents,), F, device=features.device
    )  # of each latent among the chosen; F is none of them
    column[features] = torch.arange(F, device=features.device)

    def change(vectors: Tensor) -> Tensor:  # (1, n, d)
        top_acts, top_indices, *stats = sae.encode(vectors)
        top_acts, top_indices = top_acts[0], top_indices[0]
        acts = top_acts.new_zeros(len(top_acts), F + 1)
        acts = acts.scatter_add_(1, column[top_indices], top_acts)[:, :F]
        added = (new(acts) - acts) @ sae.W_dec[features]
        if stats:  # input_unit_norm: W_dec is in units of each vector's standard deviation
            added = added * stats[1].view(-1, 1)
        return added[None]

    return map_samples(change, x, stream, sae.W_dec.device)


def step_norm(x, stream="image"):
    """The RMS norm of each picture's tokens at one step: (P, T, d) -> (P, 1, 1); padding of text
    does not count."""
    squares = x.square().sum(-1)
    count = (
        (x != 0).any(-1).sum(1)
        if stream == "text"
        else torch.full((len(x),), x.shape[1], device=x.device)
    )
    return (squares.sum(1) / count.clamp_min(1)).sqrt()[:, None, None]


def steer(sae, features, multiply=None, add=None, stream="image"):
    """A function (x (P, T, d), timestep) -> delta (P, T, d), or None where it changes nothing:
    `multiply` 1 and `add` 0, or None.

    multiply: of the features' activations; 0 ablates. add: to x, along each feature's unit decoder
    row, in step norms.
    """
    features = check_features(sae, features)

    def change(x, timestep=None):
        if (multiply in (None, 1) and not add) or not len(features):
            return None
        added = torch.zeros_like(x)
        if multiply not in (None, 1):
            added += delta(sae, x, features, lambda acts: multiply * acts, stream)
        if add:
            rows = torch.nn.functional.normalize(sae.W_dec[features].detach(), dim=1).sum(0).to(x)
            real = (x != 0).any(-1, keepdim=True) if stream == "text" else 1
            added += add * step_norm(x, stream) * rows * real
        return added

    return change


def redirect(sae, features, direction, stream="image"):
    """A function (x (P, T, d), timestep) -> delta: what the features add is taken out, and put back
    along `direction`.

    direction: (d,) of length 1, such as `concepts.toward`: a token gets as much of it as it loses,
    in norm, so one without the features keeps its bits. One concept in another's place (an anchor,
    as in Kumari et al., arXiv 2303.13516, there by weights).
    """
    features = check_features(sae, features)

    def change(x, timestep=None):
        out = delta(sae, x, features, lambda acts: 0 * acts, stream)
        return out + out.norm(dim=-1, keepdim=True) * direction.to(out)

    return change


def replacing_edits(
    hook_point: HookPoint,
    replace: Callable[[str, Tensor, Tensor], Tensor | None],
    rows: str | None = None,
    steps: Container[int] | None = None,
) -> list[Edit]:
    """The edits in which replace(role, output, x) takes the place of what a module returns.

    role: cond or uncond. output: (P, T, d), the module's. x: (P, T, d) float32, what an SAE of this
    hook point takes: the output, or output - input for side "diff". replace returns another output,
    or None to leave it. rows: cond, uncond or both; by default the hook point's. steps: those to
    edit in, None for all. Raises UsageError for side "input", and where a module turns its input
    into another shape and the side is "diff".
    """
    rows = rows or hook_point.rows
    if rows not in ROLES:
        raise UsageError(f"rows: expected {', '.join(ROLES)}, got {rows!r}")
    if hook_point.side == "input":
        raise UsageError(
            "the SAE was trained on --side input, and only what a module returns can be edited, not what it takes"
        )

    def edit(role: str, output: Tensor, before: Tensor | None = None) -> Tensor | None:
        x = output.float()
        if before is not None:
            if before.shape != output.shape:
                turns = f"{tuple(before.shape[1:])} into {tuple(output.shape[1:])}"
                raise UsageError(
                    f"side diff: {hook_point.hook_name} turns {turns}, and there is no difference"
                )
            x = x - before.float()
        return replace(role, output, x)

    with_input = hook_point.side == "diff"
    return [
        Edit(partial(edit, role), role, hook_point.stream, steps, with_input)
        for role in ROLES[rows]
    ]


def adding_edits(
    hook_point: HookPoint,
    change: Change,
    sampling,
    rows: str | None = None,
    steps: Container[int] | None = None,
    mask: Tensor | None = None,
    renormalize: bool = False,
    measure: Callable[[Tensor, float], None] | None = None,
) -> list[Edit]:
    """The edits that add `change(x, timestep)` to what a module returns; x, rows and steps as in
    `replacing_edits`.

    sampling: of `HookedDiffusionModel.watch`, which knows the step. mask: bool (T,), the tokens to
    edit, None for all. renormalize: an edited token gets its norm of before back. measure(x after
    the edit, timestep) is called for each edited chunk of the hook point's own rows, also where
    nothing changes. Raises UsageError for a mask of another number of tokens.
    """

    def replace(role: str, output: Tensor, x: Tensor) -> Tensor | None:
        if mask is not None and len(mask) != x.shape[1]:
            raise UsageError(f"the mask has {len(mask)} tokens, and this hook point {x.shape[1]}")
        timestep = sampling.timestep()
        added = change(x, timestep)
        if added is not None:
            moved = (added != 0).any(-1, keepdim=True)
            if mask is not None:
                moved &= mask.to(moved.device)[:, None]
            new = x + added
            if renormalize:
                new = new * (
                    x.norm(dim=-1, keepdim=True)
                    / new.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(new.dtype).tiny)
                )
            added = new - x
            x = torch.where(moved, new, x)
        if measure is not None and role == hook_point.rows:
            measure(x, timestep)
        if added is None:
            return None

        full = output.float()
        largest = torch.finfo(
            output.dtype
        ).max  # a float16 that overflows would be NaN from here on
        edited = (full + added).clamp(-largest, largest)
        # a token that is not touched keeps its bits: not even -0 + 0 is computed
        return torch.where(moved, edited, full).to(output.dtype)

    return replacing_edits(hook_point, replace, rows, steps)


@dataclass
class Target:
    """Features of one SAE that are edited, and where."""

    path: str
    sae: Sae
    hook_point: HookPoint
    features: list[int]

    activations: Activations | None = None
    """That the SAE was trained on; None where they are not there."""

    scores: list[float] | None = None
    """By which the features were found."""

    direction: Tensor | None = None
    """(d,), of length 1: what is put in the features' place, see `redirect`."""

    mask: Tensor | None = None
    """bool (T,): the tokens to edit; None for all."""

    typical: "Typical | None" = None
    """None: it is not measured how far edited activations are from those of training."""


class Edits:
    """The edits of one run, at the hook point of every target, and how far off they are from what
    is typical there.

    Of the edited rows only those that the SAE was trained on, cond or uncond, have something to be
    typical of. changes: one per target. rows: cond, uncond or both; by default those of each
    target's hook point.
    """

    def __init__(
        self,
        targets: list[Target],
        changes: list[Change],
        rows: str | None = None,
        steps: Container[int] | None = None,
        renormalize: bool = False,
    ):
        self.targets = targets
        self.changes = changes
        self.rows = rows
        self.steps = steps
        self.renormalize = renormalize
        self.measured = []  # of each batch {target: [(2, P): norm and distance, of every step]}

    def __call__(self, sampling) -> dict[str, list[Edit]]:
        """{hook_name: [Edit]} for the next batch of prompts."""
        measured = {}
        self.measured.append(measured)
        edits = {}
        for i, (target, change) in enumerate(zip(self.targets, self.changes)):
            measure = None
            if target.typical is not None:
                measure = partial(self.measure, measured, i)
            edits[target.hook_point.hook_name] = adding_edits(
                target.hook_point,
                change,
                sampling,
                self.rows,
                self.steps,
                target.mask,
                self.renormalize,
                measure,
            )
        return edits

    def measure(self, measured: dict, i: int, x: Tensor, timestep: float) -> None:
        """Note how typical target i's activations x (P, T, d) are at one step."""
        target = self.targets[i]
        if math.isnan(timestep) and len(target.typical.times) > 1:
            return  # it is not known of which step they should be typical
        numbers = target.typical(x, timestep, target.hook_point.stream == "text")
        measured.setdefault(i, []).append(torch.stack(numbers))

    def numbers(self, P: int) -> list[list[float] | None]:
        """Each image's (norm, distance), means over edited steps, at the hook point that is
        furthest off; None if not known."""
        known = sorted({i for measured in self.measured for i in measured})
        if not known:
            return [None] * P
        each = []
        for i in known:
            batches = [torch.stack(measured[i]).mean(0) for measured in self.measured]
            each.append(torch.cat(batches, 1))
        each = torch.stack(each)  # (targets, 2, P)
        norm_off = (
            each[:, 0].clamp_min(1e-12).log().abs()
        )  # a norm is as far off at a half as at two
        furthest = torch.stack([norm_off, each[:, 1]], 1).argmax(0, keepdim=True)
        return each.gather(0, furthest)[0].T.tolist()


class Typical:
    """The activations that an SAE was trained on, by timestep, and how far others are from them.

        norm      RMS norm of the tokens / that of the training vectors of the step
        distance  |C^-1/2 (x - mean of the step)|, root mean square over the tokens / over the training vectors of the step

    Both are 1 for the model's own activations. C: covariance round the means of the steps, of
    vectors divided by their step's norm, with 0.1 % of its mean variance added to every direction,
    so that those the model never uses count, but finitely. From a seeded sample of n training
    vectors.
    """

    def __init__(self, data, n=32768, seed=0):
        activations = open_activations(data)[0]
        pieces = activations.draw(n, seed)
        x, step = activations.read(pieces).float(), torch.from_numpy(activations.steps_of(pieces))
        found, step = step.unique(return_inverse=True)
        self.times = torch.tensor(
            [activations.timesteps[i] for i in found] if activations.timesteps else [0.0]
        )
        count = torch.bincount(step).float()
        by_step = lambda values: torch.zeros(len(found), *values.shape[1:]).index_add_(
            0, step, values
        )
        unit = usual_scale(x)
        x = x * unit
        norms = (by_step(x.square().sum(1)) / count).sqrt().clamp_min(1e-12)  # (S,)
        x = x / norms[step, None]
        self.norms = norms / unit
        self.means = by_step(x) / count[:, None]  # (S, d)
        x = x - self.means[step]
        C = x.T @ x / len(x)
        values, vectors = torch.linalg.eigh(C + 1e-3 * C.diagonal().mean() * torch.eye(len(C)))
        self.whiten = (
            vectors / values.clamp_min(1e-12).sqrt()
        )  # (d, d): x @ whiten has unit variance in every direction
        self.spread = (
            (by_step((x @ self.whiten).square().sum(1)) / count).sqrt().clamp_min(1e-12)
        )  # (S,)

    def __call__(self, x, timestep, text=False):
        """x (P, T, d) at a timestep of the scheduler, of which the nearest is taken: norm (P,) and
        distance (P,).

        text: tokens that are all zeros are padding and do not count.
        """
        step = int((self.times - timestep).abs().argmin())  # NaN, where there is one step: that
        x = x.float().cpu() / self.norms[step]
        real = (x != 0).any(-1).float() if text else torch.ones(x.shape[:2])
        mean = lambda squares: ((squares * real).sum(1) / real.sum(1).clamp_min(1)).sqrt()
        norm = mean(x.square().sum(-1))
        return norm, mean(((x - self.means[step]) @ self.whiten).square().sum(-1)) / self.spread[
            step
        ]
