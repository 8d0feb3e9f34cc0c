"""Edits of features: change what some latents of an SAE add to an activation, and nothing else.

    change = steer(sae, [12, 98], multiply=0.0)      # x (P, T, d), timestep -> delta (P, T, d)
    edits = Edits([target], [change])                # for `HookedDiffusionModel`, see steer.py

    x' = x + delta
    delta = sum over the chosen features of (new activation - activation) W_dec[feature]

What the SAE does not explain of x stays as it is, so an edit that changes no activation changes no
bit. `multiply` acts where a feature is active. `add` acts on every token, in units of the step's
RMS norm: the root of the mean |x|^2 over the tokens of this image at this step. So one number means
the same at every step and in every model.

`Typical` measures how far an edit leaves the activations that the model itself makes, as the SAE's
training data show them: steering that looks harmless by its features can push what later layers get
far off (arXiv 2606.31699).

P prompts, T tokens, d the vectors' width, M latents of the SAE, F chosen features, S steps.
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


# ---------------------------------------------------------------------------- changes of features


def check_features(sae: Sae, features: list[int]) -> Tensor:
    """Return the features as int64 (F,) on the SAE's device.

    Raises UsageError for a feature that the SAE does not have, or that is named twice.
    """
    for feature in features:
        if not 0 <= feature < sae.num_latents:
            raise UsageError(
                f"feature {feature}: the SAE has {sae.num_latents}, "
                f"numbered 0 to {sae.num_latents - 1}"
            )
    if len(set(features)) < len(features):
        raise UsageError(f"a feature is named twice: {' '.join(map(str, features))}")
    return torch.as_tensor(features, device=sae.W_dec.device)


def check_input_width(sae: Sae, x: Tensor) -> None:
    """Raise UsageError if the vectors x (..., d) have another width than the SAE takes."""
    if x.shape[-1] != sae.d_in:
        raise UsageError(
            f"the SAE takes width {sae.d_in}, and this hook point has width {x.shape[-1]}"
        )


def real_tokens(x: Tensor, stream: str) -> Tensor:
    """Return which tokens are no padding, bool (..., T) for x (..., T, d).

    Text is padded with tokens that are all zeros; tokens of an image are never padding.
    """
    if stream == "text":
        return (x != 0).any(-1)
    return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)


def map_samples(
    fn: Callable[[Tensor], Tensor], x: Tensor, stream: str, device: torch.device
) -> Tensor:
    """Return what fn (1, n, d) -> (1, n, d) makes of each prompt's tokens by themselves: x (P, T,
    d) -> (P, T, d).

    Memory does not grow with P. Padding of text stays zero and is not given to fn, which runs on
    `device`.
    """
    result = torch.zeros_like(x)
    for tokens, out in zip(x, result):
        real = slice(None)  # choosing by a mask would wait for the GPU
        if stream == "text":
            real = real_tokens(tokens, stream)
        vectors = tokens[real].to(device)
        if len(vectors):
            out[real] = fn(vectors[None])[0].to(out)
    return result


@torch.no_grad()
def delta(
    sae: Sae, x: Tensor, features: Tensor, new: Callable[[Tensor], Tensor], stream: str = "image"
) -> Tensor:
    """Return what changing features adds to the tokens x (P, T, d) float32: (P, T, d).

    features: int64 (F,). new(acts (n, F)) returns their new activations (n, F). Where it returns
    them unchanged, the result is exactly 0; so it is at padding of text. Raises UsageError if the
    width of x is not the SAE's.
    """
    check_input_width(sae, x)
    num_features = len(features)

    # the column of each latent among the chosen; the last, F, collects all others
    column = torch.full((sae.num_latents,), num_features, device=features.device)
    column[features] = torch.arange(num_features, device=features.device)

    def change(vectors: Tensor) -> Tensor:  # (1, n, d)
        top_acts, top_indices, *stats = sae.encode(vectors)
        top_acts = top_acts[0]
        top_indices = top_indices[0]

        acts = top_acts.new_zeros(len(top_acts), num_features + 1)
        acts = acts.scatter_add_(1, column[top_indices], top_acts)[:, :num_features]
        added = (new(acts) - acts) @ sae.W_dec[features]
        if stats:  # input_unit_norm: W_dec is in units of each vector's standard deviation
            _, std = stats
            added = added * std.view(-1, 1)
        return added[None]

    return map_samples(change, x, stream, sae.W_dec.device)


def step_norm(x: Tensor, stream: str = "image") -> Tensor:
    """Return the RMS norm of each image's tokens at one step: (P, T, d) -> (P, 1, 1).

    Padding of text does not count. For one image with the tokens (3, 4) and (0, 0) it is
    sqrt(25 / 2); as text, in which the second is padding, it is 5.
    """
    squares = x.square().sum(-1)
    num_real = real_tokens(x, stream).sum(1)
    return (squares.sum(1) / num_real.clamp_min(1)).sqrt()[:, None, None]


def steer(
    sae: Sae,
    features: list[int],
    multiply: float | None = None,
    add: float | None = None,
    stream: str = "image",
) -> Change:
    """Return the Change that multiplies features' activations, or adds their decoder rows to x.

    multiply: of the features' activations; 0 ablates them, and None or 1 leaves them. add: to x,
    along each feature's decoder row of length 1, in step norms; None or 0 adds nothing. The Change
    returns None if it changes nothing. Raises UsageError for features that the SAE does not have.
    """
    indices = check_features(sae, features)
    multiplies = multiply not in (None, 1)

    def change(x: Tensor, timestep: float | None = None) -> Tensor | None:
        if not len(indices) or not (multiplies or add):
            return None

        added = torch.zeros_like(x)
        if multiplies:
            added += delta(sae, x, indices, lambda acts: multiply * acts, stream)
        if add:
            rows = sae.W_dec[indices].detach()
            direction = torch.nn.functional.normalize(rows, dim=1).sum(0).to(x)
            real = real_tokens(x, stream)[..., None]
            added += add * step_norm(x, stream) * direction * real
        return added

    return change


def redirect(sae: Sae, features: list[int], direction: Tensor, stream: str = "image") -> Change:
    """Return the Change that takes out what features add, and puts it back along a direction.

    direction: (d,) of length 1, such as `concepts.toward`. A token gets as much of it as it loses,
    in norm, so a token without the features keeps its bits. One concept takes the place of another,
    as in Kumari et al. (arXiv 2303.13516), who change weights for it.
    """
    indices = check_features(sae, features)

    def change(x: Tensor, timestep: float | None = None) -> Tensor:
        taken = delta(sae, x, indices, lambda acts: 0 * acts, stream)
        return taken + taken.norm(dim=-1, keepdim=True) * direction.to(taken)

    return change


# ------------------------------------------------------------------------- edits of a hook point


def replacing_edits(
    hook_point: HookPoint,
    replace: Callable[[str, Tensor, Tensor], Tensor | None],
    rows: str | None = None,
    steps: Container[int] | None = None,
) -> list[Edit]:
    """Return the edits in which replace(role, tokens, x) takes the place of a module's tokens.

    role: cond or uncond. tokens: (P, T, d), what the module returns, or takes for side "input". x:
    (P, T, d) float32, what an SAE of this hook point takes: the tokens, or output - input for side
    "diff". replace returns other tokens, or None to leave them. rows: cond, uncond or both; if
    None, the hook point's. steps: the steps to edit in; if None, all.

    Raises UsageError for side "diff" if the module turns its input into another shape.
    """
    rows = rows or hook_point.rows
    if rows not in ROLES:
        raise UsageError(f"rows: expected {', '.join(ROLES)}, got {rows!r}")

    def edit(role: str, tokens: Tensor, module_input: Tensor | None = None) -> Tensor | None:
        x = tokens.float()
        if module_input is not None:
            if module_input.shape != tokens.shape:
                shapes = f"{tuple(module_input.shape[1:])} into {tuple(tokens.shape[1:])}"
                raise UsageError(
                    f"side diff: {hook_point.hook_name} turns {shapes}, and there is no difference"
                )
            x = x - module_input.float()
        return replace(role, tokens, x)

    options = {
        "stream": hook_point.stream,
        "steps": steps,
        "side": "input" if hook_point.side == "input" else "output",
        "with_input": hook_point.side == "diff",
        "keep_padding": hook_point.padding,
    }
    return [Edit(partial(edit, role), role, **options) for role in ROLES[rows]]


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
    """Return the edits that add `change(x, timestep)` to what a module returns, or takes.

    x, rows and steps: see `replacing_edits`. sampling: of `HookedDiffusionModel.watch`, which knows
    the timestep. mask: bool (T,), the tokens to edit; if None, all. renormalize: give each edited
    token the norm back that it had. measure(x after the edit, timestep) is called for each edited
    chunk of the hook point's own rows, also where nothing changes.

    Raises UsageError for a mask with another number of tokens.
    """

    def replace(role: str, output: Tensor, x: Tensor) -> Tensor | None:
        if mask is not None and len(mask) != x.shape[1]:
            raise UsageError(f"the mask has {len(mask)} tokens, and this hook point {x.shape[1]}")

        timestep = sampling.timestep()
        added = change(x, timestep)
        if added is None:
            if measure is not None and role == hook_point.rows:
                measure(x, timestep)
            return None

        moved = (added != 0).any(-1, keepdim=True)  # (P, T, 1)
        if mask is not None:
            moved &= mask.to(moved.device)[:, None]
        new = x + added
        if renormalize:
            new = with_norm_of(new, x)
        if measure is not None and role == hook_point.rows:
            measure(torch.where(moved, new, x), timestep)

        # a float16 that overflows would be NaN from here on
        largest = torch.finfo(output.dtype).max
        full = output.float()
        edited = (full + (new - x)).clamp(-largest, largest)
        # a token that is not touched keeps its bits: not even -0 + 0 is computed
        return torch.where(moved, edited, full).to(output.dtype)

    return replacing_edits(hook_point, replace, rows, steps)


def with_norm_of(new: Tensor, x: Tensor) -> Tensor:
    """Return the tokens `new` (P, T, d), each scaled to the norm that it has in x (P, T, d)."""
    smallest = torch.finfo(new.dtype).tiny  # no division by zero
    norm = x.norm(dim=-1, keepdim=True)
    new_norm = new.norm(dim=-1, keepdim=True).clamp_min(smallest)
    return new * (norm / new_norm)


# ------------------------------------------------------------------------------- edits of a run


@dataclass
class Target:
    """Features of one SAE that are edited, and where."""

    path: str
    """Folder of the SAE."""

    sae: Sae

    hook_point: HookPoint
    """Where the SAE was trained, and where it edits."""

    features: list[int]

    activations: Activations | None = None
    """The SAE's training data. None if the files are not there."""

    scores: list[float] | None = None
    """The values by which the features were found. None if the user named them."""

    direction: Tensor | None = None
    """(d,), of length 1: what is put in the features' place, see `redirect`."""

    mask: Tensor | None = None
    """bool (T,): the tokens to edit. None for all."""

    typical: "Typical | None" = None
    """Measures how far edited activations are from those of training. None: it is not measured."""


class Edits:
    """The edits of one run at the hook point of every target, and how typical the results are.

    An SAE was trained on cond or on uncond rows, so only edits of these rows can be compared with
    its training data. changes: one per target. rows: cond, uncond or both; if None, those of each
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
        self.measured = []
        """One dict per batch: {number of the target: [(2, P) norm and distance at each step]}."""

    def __call__(self, sampling) -> dict[str, list[Edit]]:
        """Return {hook_name: [Edit]} for the next batch of prompts."""
        measured = {}
        self.measured.append(measured)
        edits = {}
        for number, (target, change) in enumerate(zip(self.targets, self.changes)):
            measure = None
            if target.typical is not None:
                measure = partial(self.measure, measured, number)
            # an image and a text SAE may belong to one module
            edits.setdefault(target.hook_point.hook_name, []).extend(
                adding_edits(
                    target.hook_point,
                    change,
                    sampling,
                    self.rows,
                    self.steps,
                    target.mask,
                    self.renormalize,
                    measure,
                )
            )
        return edits

    def measure(
        self, measured: dict[int, list[Tensor]], number: int, x: Tensor, timestep: float
    ) -> None:
        """Note how typical one target's activations x (P, T, d) are at one step.

        Nothing is noted if the timestep is not known (NaN) and the training data have several.
        """
        target = self.targets[number]
        if math.isnan(timestep) and len(target.typical.times) > 1:
            return
        numbers = target.typical(x, timestep, text=target.hook_point.stream == "text")
        measured.setdefault(number, []).append(torch.stack(numbers))

    def numbers(self, num_images: int) -> list[list[float] | None]:
        """Return the (norm, distance) of each image, means over the edited steps.

        If several targets were measured, each number is that of the target where it is furthest
        from typical. An image has None if nothing was measured.
        """
        known = sorted({number for measured in self.measured for number in measured})
        if not known:
            return [None] * num_images

        means = []
        for number in known:
            batches = [torch.stack(measured[number]).mean(0) for measured in self.measured]
            means.append(torch.cat(batches, 1))
        means = torch.stack(means)  # (targets, 2, P)

        # a norm of a half is as far off as a norm of two
        norm_off = means[:, 0].clamp_min(1e-12).log().abs()
        furthest = torch.stack([norm_off, means[:, 1]], 1).argmax(0, keepdim=True)  # (1, 2, P)
        return means.gather(0, furthest)[0].T.tolist()


class Typical:
    """The activations that an SAE was trained on, by timestep, and how far others are from them.

        norm      RMS norm of the tokens / RMS norm of the training vectors of the step
        distance  RMS over the tokens of |C^-1/2 (x - mean of the step)| / the same over the
                  training vectors of the step

    Both are 1 for the model's own activations. C is the covariance about the means of the steps, of
    vectors divided by their step's norm. 0.1 % of its mean variance is added to every direction, so
    that directions that the model never uses count, but finitely.
    """

    def __init__(self, data: list[str], n: int = 32768, seed: int = 0):
        """Measure up to n training vectors of the activation files, drawn with a seed."""
        activations = open_activations(data)[0]
        pieces = activations.draw(n, seed)
        x = activations.read(pieces).float()  # (n, d)
        steps, step = torch.from_numpy(activations.steps_of(pieces)).unique(return_inverse=True)
        count = torch.bincount(step).float()  # (S,)

        times = [0.0]
        if activations.timesteps:
            times = [activations.timesteps[i] for i in steps]
        self.times = torch.tensor(times)
        """(S,): the scheduler's timesteps of the steps that were drawn; 0 if they are not known."""

        unit = usual_scale(x)
        x = x * unit
        norms = (sum_by_step(x.square().sum(1), step) / count).sqrt().clamp_min(1e-12)
        self.norms = norms / unit
        """(S,): RMS norm of the vectors of each step."""

        x = x / norms[step, None]
        self.means = sum_by_step(x, step) / count[:, None]
        """(S, d): mean of each step's vectors, divided by its norm."""

        x = x - self.means[step]
        self.whiten = whitening(x.T @ x / len(x))
        """(d, d): x @ whiten has the variance 1 in every direction."""

        lengths = (x @ self.whiten).square().sum(1)
        self.spread = (sum_by_step(lengths, step) / count).sqrt().clamp_min(1e-12)
        """(S,): RMS length of the whitened vectors of each step."""

    def __call__(self, x: Tensor, timestep: float, text: bool = False) -> tuple[Tensor, Tensor]:
        """Return the norm (P,) and distance (P,) of x (P, T, d) at a timestep of the scheduler.

        The nearest known timestep is taken; NaN is allowed if only one is known. text: tokens that
        are all zeros are padding and do not count.
        """
        step = int((self.times - timestep).abs().argmin())  # NaN gives 0
        x = x.float().cpu() / self.norms[step]
        real = real_tokens(x, "text" if text else "image").float()

        norm = root_mean(x.square().sum(-1), real)
        whitened = (x - self.means[step]) @ self.whiten
        return norm, root_mean(whitened.square().sum(-1), real) / self.spread[step]


def sum_by_step(values: Tensor, step: Tensor) -> Tensor:
    """Return the sums of the values (n, ...) with each step: (S, ...). step: int64 (n,)."""
    num_steps = int(step.max()) + 1
    return torch.zeros(num_steps, *values.shape[1:]).index_add_(0, step, values)


def whitening(covariance: Tensor) -> Tensor:
    """Return W (d, d) so that x @ W has the variance 1 in every direction.

    0.1 % of the mean variance is added to every direction first.
    """
    d = len(covariance)
    regularized = covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(d)
    values, vectors = torch.linalg.eigh(regularized)
    return vectors / values.clamp_min(1e-12).sqrt()


def root_mean(squares: Tensor, real: Tensor) -> Tensor:
    """Return the root of the mean square over the real tokens: (P, T), float (P, T) -> (P,)."""
    return ((squares * real).sum(1) / real.sum(1).clamp_min(1)).sqrt()
