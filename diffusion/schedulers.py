"""Read what a scheduler says of itself: its list of timesteps, its position in it, its arguments.

Of a scheduler only `step(model_output, timestep, sample)` is required. Everything else here may be
missing, and then the functions return None or an empty list.
"""

import inspect
from collections.abc import Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StepArguments(NamedTuple):
    """The arguments of a scheduler's `step` that this project looks at."""

    model_output: Any
    """The prediction after guidance."""

    timestep: Any
    """A number or a tensor."""

    sample: Any
    """What is stepped; None if the scheduler takes no such argument."""


def step_arguments(signature: inspect.Signature, *args, **kwargs) -> StepArguments:
    """Return the prediction, timestep and sample among the arguments of a scheduler's `step`.

    args: all of them, `self` first. If `step` has parameters named timestep and sample, the names
    decide, since these may stand in another order. Otherwise the second, third and fourth arguments
    are taken; a sample that is not given is None.
    """
    call = signature.bind_partial(*args, **kwargs)
    by_name = {}
    by_position = []
    for name, value in call.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            by_name.update(value)
        else:
            by_name[name] = value
        if kind is inspect.Parameter.VAR_POSITIONAL:
            by_position.extend(value)
        else:
            by_position.append(value)

    if "timestep" in by_name and "sample" in by_name:
        prediction = by_name.get("model_output", by_position[1])
        return StepArguments(prediction, by_name["timestep"], by_name["sample"])
    model_output, timestep, sample = [*by_position, None][1:4]
    return StepArguments(model_output, timestep, sample)


def position_of(
    values: Sequence[float] | Tensor, value: float | None, expected: int | None = None
) -> int | None:
    """Return the index at which `value` stands in `values`; None if it is not there.

    A value may be listed several times, as two of many sigmas have the same rounded timestep. Then
    the index `expected` is returned if the value stands there, otherwise the first one. For
    [9, 5, 5, 1] and 5 it is 1, and 2 if 2 is expected.
    """
    numbers = torch.as_tensor(values).detach().flatten().cpu()
    if value is None or not len(numbers):
        return None
    if isinstance(expected, int) and expected < len(numbers) and numbers[expected] == value:
        return expected
    indices = (numbers == value).nonzero()
    return int(indices[0]) if len(indices) else None


def own_position(scheduler: Any) -> int | None:
    """Return the index in its list of timesteps that a scheduler states for its next step; None if
    it states none."""
    for name in ("step_index", "begin_index"):
        position = getattr(scheduler, name, None)
        if isinstance(position, int):
            return position
    return None


def timesteps_of(scheduler: Any) -> Any:
    """Return the scheduler's list of timesteps as it holds it; [] if it has none."""
    timesteps = getattr(scheduler, "timesteps", None)
    return timesteps if isinstance(timesteps, Sized) else []


def listed_timesteps(scheduler: Any) -> list[float]:
    """Return the scheduler's list of timesteps as numbers; [] if it has none."""
    return torch.as_tensor(timesteps_of(scheduler)).flatten().tolist()


def number(time: Any) -> float | None:
    """Return a time as a float.

    It is None if rows or tokens have different times, or if `time` is neither number nor tensor.
    For tensor([3, 3]) it is 3.0, for tensor([3, 4]) None.
    """
    if not torch.is_tensor(time) and not isinstance(time, (int, float)):
        return None
    values = torch.as_tensor(time).flatten()
    if not len(values) or not bool((values == values[0]).all()):
        return None
    return float(values[0])
