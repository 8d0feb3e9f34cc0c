"""The two things that `trace.Sampling` records: a `Forward` of a denoiser, and a `Step` of a
scheduler.

For two prompts with guidance, the forward of the second of three steps (timestep 334) is, once the
scheduler has used it:

    Forward(denoiser="unet", rows=4, context=None, arguments={"sample": ..., "timestep": ...},
            sample=(4, 4, 64, 64), conditioning=[(4, 77, 768)], roles=["uncond", "cond"],
            time=334, index=1, output=(4, 4, 64, 64))

and the step is `Step(index=1, timestep=334, forwards=[that one], scheduler, R=2, sample)`, with
`sample` (2, 4, 64, 64).
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion.schedulers import own_position, position_of
from diffusion.signatures import result_tensor, tensors
from errors import UsageError


@dataclass(eq=False)
class Forward:
    """One call of a denoiser."""

    denoiser: str
    """The name of the pipeline's component, such as "unet"."""

    rows: int
    """The rows of the batch: the number of chunks times R."""

    context: str | None
    """The name of the `cache_context` in which it runs, such as "cond"; None outside of any."""

    arguments: dict[str, Any]
    """All arguments by name, without `self`."""

    sample: Any
    """The first argument: a tensor (rows, ...), or a list with one tensor per row."""

    conditioning: list
    """The other arguments with one entry per row, without the time: tensors, or lists of
    tensors."""

    roles: list[str] | None = None
    """The role of each chunk: "cond", "uncond" or "other". It is None until a step has told them,
    and [] if the scheduler's input has nothing of this forward. While an edited denoiser runs,
    these are the roles that the plan predicts."""

    time: Any = None
    """The time argument as the denoiser was given it."""

    index: int = 0
    """The index of the step for which it runs."""

    output: Tensor | None = None
    """The prediction (rows, ...)."""

    sampled: Tensor | None = None
    """Which numbers of a row of `sample` belong to the scheduler's sample, bool, shaped as a row.
    None means all of them; a picture to edit, for example, does not belong to it."""

    layouts: dict = field(default_factory=dict)
    """{(side, hook_name, stream): Layout | NotHookable}, see token_layout.py."""

    captured: dict = field(default_factory=dict)
    """What the hooks of a `Recorder` keep: {(side, hook_name): tokens}."""

    ran: set[str] = field(default_factory=set)
    """The names of the modules that were called, see repeated.py."""

    skipped: str | None = None
    """The name of a module that was called and computed nothing, see repeated.py."""


@dataclass(eq=False)
class Step:
    """One call of `scheduler.step`, and the forwards whose predictions went into it."""

    index: int
    """The index of the step in its loop, from 0."""

    timestep: Any
    """The timestep as the scheduler was given it."""

    forwards: list[Forward]
    """Without those that left nothing in the scheduler's input."""

    scheduler: Any

    R: int
    """The rows of one chunk: prompts times images per prompt."""

    sample: Any
    """The sample that the scheduler was given, (R, ...)."""

    def time(self) -> float:
        """Return the timestep as a number. Raises UsageError if rows have different timesteps."""
        values = torch.as_tensor(self.timestep).flatten()
        if len(values) > 1 and not (values == values[0]).all():
            raise UsageError("each row has a timestep of its own, and a step has one")
        return float(values[0])

    def sigma(self) -> float | None:
        """Return the sigma at which the denoiser was called, or None if the scheduler has none.

        For a variance-preserving schedule this is noise over signal. Call it before the scheduler
        computes its step, since that moves the scheduler's position.
        """
        timesteps = getattr(self.scheduler, "timesteps", None)
        sigmas = getattr(self.scheduler, "sigmas", None)
        have_lists = torch.is_tensor(timesteps) and torch.is_tensor(sigmas)
        if have_lists and len(sigmas) >= len(timesteps):
            position = position_of(timesteps, self.time(), own_position(self.scheduler))
            return None if position is None else self._sigma_of_input(float(sigmas[position]))

        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        if torch.is_tensor(alphas) and self.time() in range(len(alphas)):
            alpha = float(alphas[int(self.time())])
            return math.sqrt((1 - alpha) / alpha) if alpha > 0 else None
        return None

    def _sigma_of_input(self, listed: float) -> float:
        """Return the sigma by which the scheduler scaled the denoiser's input.

        That is the `listed` sigma, but for schedulers of second order: they call the denoiser also
        between two listed sigmas. The scale of the input is 1 / sqrt(sigma^2 + sigma_data^2), so
        for sigma_data = 1 a scale of 0.5 means that sigma was sqrt(3).
        """
        if getattr(self.scheduler, "order", 1) == 1:
            return listed
        if not hasattr(self.scheduler, "scale_model_input"):
            return listed

        twin = copy.copy(self.scheduler)  # scaling moves the position of the scheduler
        one = torch.ones(1, dtype=torch.float64, device=self.sample.device)
        scale = float(twin.scale_model_input(one, self.timestep))
        sigma_data = getattr(getattr(self.scheduler, "config", None), "sigma_data", 1.0)
        if scale == 1 or math.isclose(scale, 1 / math.hypot(listed, sigma_data), rel_tol=1e-4):
            return listed
        return math.sqrt(max(0.0, 1 / scale**2 - sigma_data**2))


def row_wise(values: Iterable, sample: Any) -> list:
    """Return those of the arguments `values`, also of nested ones, that have one entry per row.

    These are tensors (rows, ...), and if `sample` is a list, also lists of one tensor per row. A
    video model repeats its text for each frame: if `sample` (rows, channels, k, H, W) or (rows, k,
    channels, H, W) has k frames, a tensor (rows k, T, d) is returned as (rows, k, T, d).
    """
    rows = len(sample)
    sample_is_list = isinstance(sample, (list, tuple))
    frame_counts = ()  # either of the two axes can be the frames
    if torch.is_tensor(sample) and sample.ndim == 5:
        frame_counts = sample.shape[1:3]

    entries = []
    for value in values:
        if torch.is_tensor(value):
            if value.ndim and len(value) == rows:
                entries.append(value)
            elif value.ndim == 3 and len(value) in [rows * k for k in frame_counts]:
                entries.append(value.unflatten(0, (rows, -1)))
        elif isinstance(value, dict):
            entries += row_wise(value.values(), sample)
        elif isinstance(value, (list, tuple)):
            one_per_row = len(value) == rows and all(map(torch.is_tensor, value))
            if sample_is_list and one_per_row:
                entries.append(list(value))
            else:
                entries += row_wise(value, sample)
    return entries


def prediction(output: Any, forward: Forward) -> Tensor | None:
    """Return the prediction (rows, ...) in what a denoiser returned; None if there is none.

    It is the `result_tensor`. If the sample is a list, it is the first `rows` tensors, stacked.
    """
    returned = tensors(output)
    first_rows = returned[: forward.rows]
    if isinstance(forward.sample, (list, tuple)) and len(returned) >= forward.rows:
        shapes = {x.shape for x in first_rows}
        if len(shapes) == 1:
            return torch.stack(first_rows).detach()
    first = result_tensor(output)
    return first.detach() if first is not None and first.ndim else None
