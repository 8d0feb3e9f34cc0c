"""Edits of features: what an SAE's latents add to an activation is changed, and the rest of the activation is kept.

    x' = x + delta,   delta = sum over the chosen features of (new activation - activation) W_dec[feature]

What the SAE does not explain of x stays as it is, so an edit that changes no activation changes no bit. `multiply` acts where a
feature is active; `add` acts on every token, in units of the step's RMS norm: the root of the mean |x|^2 over the tokens of this
picture at this step, so that one number means the same at every step and in every model.

How far an edit leaves the activations that the model itself makes is measured against those that the SAE was trained on
(`Typical`): steering that looks harmless by its features can push what later layers get far off (arXiv 2606.31699).
"""

from collections import defaultdict
from functools import partial

import torch

from activations import open_activations
from errors import UsageError
from hook import ROLES, Edit


def check_features(sae, features):
    """int64 (F,) on the SAE's device. Raises UsageError for one that the SAE does not have, or that is named twice."""
    for feature in features:
        if not 0 <= feature < sae.num_latents:
            raise UsageError(f"feature {feature}: the SAE has {sae.num_latents}, numbered 0 to {sae.num_latents - 1}")
    if len(set(features)) < len(features):
        raise UsageError(f"a feature is named twice: {' '.join(map(str, features))}")
    return torch.as_tensor(features, device=sae.W_dec.device)


@torch.no_grad()
def delta(sae, x, features, new, stream="image"):
    """What changing features adds to the tokens x (P, T, d) float32: (P, T, d), exactly 0 where nothing changes.

    features: int64 (F,). new(acts (n, F)) -> their new activations (n, F). It goes one picture at a time, as memory allows; a
    sample-topk SAE gets each whole. Padding of text, which is zeros, stays. Raises UsageError where widths differ.
    """
    P, T, d = x.shape
    if d != sae.d_in:
        raise UsageError(f"the SAE is of vectors of width {sae.d_in}, and those of this hook point have width {d}")
    F = len(features)
    column = torch.full((sae.num_latents,), F, device=features.device)  # of each latent among the chosen; F is none of them
    column[features] = torch.arange(F, device=features.device)
    added, samples = torch.zeros_like(x), sae.activation == "sampletopk"
    for tokens, out in zip(x, added):
        there = (tokens != 0).any(1) if stream == "text" else slice(None)
        if not len(vectors := tokens[there].to(sae.W_dec.device)):
            continue
        top_acts, top_indices, *stats = sae.encode(vectors[None] if samples else vectors)
        top_acts, top_indices = top_acts.flatten(0, -2), top_indices.flatten(0, -2)
        acts = top_acts.new_zeros(len(top_acts), F + 1).scatter_add_(1, column[top_indices], top_acts)[:, :F]
        change = (new(acts) - acts) @ sae.W_dec[features]
        out[there] = (change * stats[1].view(-1, 1) if stats else change).to(out)
    return added


def step_norm(x, stream="image"):
    """The RMS norm of each picture's tokens at one step: (P, T, d) -> (P, 1, 1); padding of text does not count."""
    squares = x.square().sum(-1)
    count = (x != 0).any(-1).sum(1) if stream == "text" else torch.full((len(x),), x.shape[1], device=x.device)
    return (squares.sum(1) / count.clamp_min(1)).sqrt()[:, None, None]


def steer(sae, features, multiply=None, add=None, stream="image"):
    """A function (x (P, T, d), timestep) -> delta (P, T, d), or None where it changes nothing: `multiply` 1 and `add` 0, or None.

    multiply: of the features' activations; 0 ablates. add: to x, along each feature's unit decoder row, in step norms.
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
    """A function (x (P, T, d), timestep) -> delta: what the features add is taken out, and put back along `direction`.

    direction: (d,) of length 1, such as `concepts.toward`: a token gets as much of it as it loses, in norm, so one without the
    features keeps its bits. One concept in another's place (an anchor, as in Kumari et al., arXiv 2303.13516, there by weights).
    """
    features = check_features(sae, features)

    def change(x, timestep=None):
        out = delta(sae, x, features, lambda acts: 0 * acts, stream)
        return out + out.norm(dim=-1, keepdim=True) * direction.to(out)

    return change


def time_of(sampling):
    """The scheduler's timestep of the step that is being computed; NaN where it does not list them."""
    times = next((s.timesteps for s in sampling.schedulers if torch.is_tensor(getattr(s, "timesteps", None))), ())
    return float(times[sampling.index]) if sampling.index < len(times) else float("nan")


def hooks(
    change,
    sampling,
    side="output",
    stream="image",
    rows="cond",
    steps=None,
    where=None,
    renormalize=False,
    measure=None,
    of="both",
):
    """The `capture.Edit`s that add `change(x)` to what a module returns, for `HookedDiffusionModel.run_with_hooks`.

    change(x, timestep) -> delta or None, x (P, T, d) float32: the output, or output - input for side "diff". rows: cond, uncond
    or both. steps: those to edit in, None for all. where: bool (T,), the tokens to edit, None for all. renormalize: an edited
    token gets its norm of before back. measure(x after the edit, step, timestep) is called for each edited chunk of the rows
    `of`, also where nothing changes. sampling: of `HookedDiffusionModel.watch`, which knows the step. Raises UsageError for side
    "input", for a mask of another number of tokens, and where a module turns its input into another shape and the side is diff.
    """
    if side == "input":
        raise UsageError("the SAE was trained on --side input, and only what a module returns can be edited, not what it takes")

    def fn(role, output, before=None):
        if before is not None and before.shape != output.shape:
            raise UsageError(f"side diff: {tuple(before.shape[1:])} becomes {tuple(output.shape[1:])}; there is no difference")
        full = output.float()
        x = full if before is None else full - before.float()
        if where is not None and len(where) != x.shape[1]:
            raise UsageError(f"the mask is of {len(where)} tokens, and here are {x.shape[1]}")
        added = change(x, timestep := time_of(sampling))
        if added is not None:
            moved = (added != 0).any(-1, keepdim=True)
            if where is not None:
                moved &= where.to(moved.device)[:, None]
            new = x + added
            if renormalize:
                new = new * (x.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp_min(1e-12))
            added, x = new - x, torch.where(moved, new, x)
        if measure is not None and role in ROLES[of].values():
            measure(x, sampling.index, timestep)
        if added is None:
            return None
        largest = torch.finfo(output.dtype).max  # a float16 that overflows would be NaN from here on
        # a token that is not touched keeps its bits: not even -0 + 0 is computed
        return torch.where(moved, (full + added).clamp(-largest, largest), full).to(output.dtype)

    return [Edit(partial(fn, role), role, stream, steps, with_input=side == "diff") for role in ROLES[rows].values()]


class Edits:
    """The edits of one run, at the hook point of every SAE, and how far off they are from what is typical there.

    Of the edited rows only those that the SAE was trained on, cond or uncond, have something to be typical of.
    changes: functions of `steer`; places: what `graft.trained_on` says; typical: a `Typical` or None; where: a mask or None;
    each one an SAE. options: keywords of `hooks` for all.
    """

    def __init__(self, changes, places, typical, options, where):
        self.changes, self.places, self.typical, self.options, self.where = changes, places, typical, options, where
        self.measured = defaultdict(list)  # {(first prompt, SAE): [(norm, distance), each (P,), of a chunk at a step]}

    def __call__(self, sampling, start):
        """{hook_name: [Edit]} for the batch that begins with prompt `start`."""
        found = {}
        for i, (change, place, where) in enumerate(zip(self.changes, self.places, self.where)):

            def measure(x, step, timestep, i=i, text=place["stream"] == "text"):
                if self.typical[i] is not None:
                    self.measured[start, i].append(torch.stack(self.typical[i](x, timestep, text)))

            kwargs = dict(side=place["side"], stream=place["stream"], where=where, measure=measure, of=place["rows"])
            found[place["hook_name"]] = hooks(change, sampling, **self.options, **kwargs)
        return found

    def numbers(self, P):
        """Each picture's (norm, distance), means over edited steps, at the hook point that is furthest off; None if not known."""
        if not self.measured:
            return [None] * P
        starts, known = (sorted(set(column)) for column in zip(*self.measured))
        each = [torch.cat([torch.stack(self.measured[start, i]).mean(0) for start in starts], 1) for i in known]
        each = torch.stack(each)  # (SAEs, 2, P): a norm is as far off at a half as at two
        furthest = torch.stack([each[:, 0].clamp_min(1e-12).log().abs(), each[:, 1]], 1).argmax(0, keepdim=True)
        return each.gather(0, furthest)[0].T.tolist()


class Typical:
    """The activations that an SAE was trained on, by timestep, and how far others are from them.

        norm      RMS norm of the tokens / that of the training vectors of the step
        distance  |C^-1/2 (x - mean of the step)|, root mean square over the tokens / over the training vectors of the step

    Both are 1 for the model's own activations. C: covariance round the means of the steps, of vectors divided by their step's
    norm, with 0.1 % of its mean variance added to every direction, so that those the model never uses count, but finitely.
    From a seeded sample of n training vectors.
    """

    def __init__(self, data, n=32768, seed=0):
        activations = open_activations(data)[0]
        pieces = activations.draw(n, seed)
        x, step = activations.read(pieces).float(), torch.from_numpy(activations.steps_of(pieces))
        found, step = step.unique(return_inverse=True)
        self.times = torch.tensor([activations.timesteps[i] for i in found] if activations.timesteps else [0.0])
        count = torch.bincount(step).float()
        by_step = lambda values: torch.zeros(len(found), *values.shape[1:]).index_add_(0, step, values)
        self.norms = (by_step(x.square().sum(1)) / count).sqrt().clamp_min(1e-12)  # (S,)
        x = x / self.norms[step, None]
        self.means = by_step(x) / count[:, None]  # (S, d)
        x = x - self.means[step]
        C = x.T @ x / len(x)
        values, vectors = torch.linalg.eigh(C + 1e-3 * C.diagonal().mean() * torch.eye(len(C)))
        self.whiten = vectors / values.clamp_min(1e-12).sqrt()  # (d, d): x @ whiten has unit variance in every direction
        self.spread = (by_step((x @ self.whiten).square().sum(1)) / count).sqrt().clamp_min(1e-12)  # (S,)

    def __call__(self, x, timestep, text=False):
        """x (P, T, d) at a timestep of the scheduler, of which the nearest is taken: norm (P,) and distance (P,).

        text: tokens that are all zeros are padding and do not count.
        """
        step = int((self.times - timestep).abs().argmin())  # NaN: the first
        x = x.float().cpu() / self.norms[step]
        real = (x != 0).any(-1).float() if text else torch.ones(x.shape[:2])
        mean = lambda squares: ((squares * real).sum(1) / real.sum(1).clamp_min(1)).sqrt()
        norm = mean(x.square().sum(-1))
        return norm, mean(((x - self.means[step]) @ self.whiten).square().sum(-1)) / self.spread[step]
