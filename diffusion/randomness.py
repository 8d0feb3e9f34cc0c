"""Seed the random numbers that a generation draws besides those of its own generators.

A pipeline is given one generator per row. Its scheduler may draw other numbers: from the global
states of PyTorch, NumPy and Python, if the pipeline does not pass its generators on, or from a
generator that the scheduler holds. What is stored, or compared with another run, must not depend on
them:

    same_random_numbers(scheduler)        puts all of these states back when the context ends
    random_numbers_of([5, 6], scheduler)  also seeds them, from the seeds of the rows
    RowByRow([5, 6])                      draws PyTorch's global noise for each row from its own
                                          seed, so that it is the same in any batch
    check_repeatable(...)                 refuses a scheduler whose numbers no seed reaches
"""

import copy
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion.signatures import result_tensor
from errors import UsageError

AnyGenerator: TypeAlias = (
    torch.Generator | np.random.Generator | np.random.RandomState | random.Random
)

DEPTH = 3  # levels of attributes, lists and dicts in which an object's generators are looked for


@contextmanager
def same_random_numbers(*owners: Any) -> Iterator[None]:
    """Put all random states back when the context ends.

    These are the global ones of PyTorch (on all devices), NumPy and Python, and those of the
    generators that the objects `owners` hold.
    """
    all_gpus = range(torch.cuda.device_count())  # a seed is set on all of them
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    numpy_state = np.random.get_state()  # noqa: NPY002 (a scheduler may use the global one)
    python_state = random.getstate()
    generators = generators_in(list(owners), DEPTH + 1)
    states = [(generator, get_state(generator)) for generator in generators]
    with torch.random.fork_rng(devices=all_gpus):
        try:
            yield
        finally:
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
            for generator, state in states:
                set_state(generator, state)


@contextmanager
def random_numbers_of(seeds: Iterable[int], *owners: Any) -> Iterator[None]:
    """Let all random numbers follow from the rows' seeds while the context lasts.

    These are the numbers of the states that `same_random_numbers` puts back afterwards. They depend
    on which rows are generated together; `RowByRow` removes that for most of a scheduler's noise.
    """
    seed = mixed_seed(seeds)
    with same_random_numbers(*owners):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        for i, generator in enumerate(generators_in(list(owners), DEPTH + 1)):
            set_seed(generator, seed + i)
        yield


class RowByRow(TorchFunctionMode):
    """Context in which noise with one entry per row is drawn for each row from its own seed.

    This is noise that PyTorch draws from its global state, by rand, randn, rand_like or randn_like.
    A row's noise is then the same whichever rows are generated together. Noise with another first
    axis than `len(seeds)` is left as it is.
    """

    DRAWN = {
        torch.randn: torch.randn,
        torch.randn_like: torch.randn,
        torch.rand: torch.rand,
        torch.rand_like: torch.rand,
    }

    def __init__(self, seeds: Iterable[int]):
        super().__init__()
        self.generators = [torch.Generator().manual_seed(mixed_seed([seed])) for seed in seeds]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        drawn = func(*args, **kwargs)
        if func not in self.DRAWN or kwargs.get("generator") is not None:
            return drawn
        if not drawn.ndim or len(drawn) != len(self.generators):
            return drawn

        draw = self.DRAWN[func]
        rows = []
        for generator in self.generators:
            rows.append(draw(drawn.shape[1:], generator=generator, dtype=drawn.dtype))
        return drawn.copy_(torch.stack(rows))


def mixed_seed(seeds: Iterable[int]) -> int:
    """Return one seed below 2**56 that follows from several, by SHA-256."""
    digest = hashlib.sha256(repr(list(seeds)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


# --------------------------------------------------------------------------- generators of any kind


def generators_in(value: Any, depth: int = DEPTH) -> Iterator[AnyGenerator]:
    """Yield the generators among the attributes and entries of an object, `depth` levels deep.

    One that is met twice is yielded twice. Modules and tensors are not looked into.
    """
    if isinstance(value, AnyGenerator):
        yield value
        return
    if depth == 0 or isinstance(value, (torch.Tensor, torch.nn.Module, type)):
        return
    if isinstance(value, (list, tuple)):
        items = value
    elif isinstance(value, dict):
        items = value.values()
    else:
        items = getattr(value, "__dict__", {}).values()
    for item in items:
        yield from generators_in(item, depth - 1)


def get_state(generator: AnyGenerator) -> Any:
    """Return the state of a generator of PyTorch, NumPy or Python, for `set_state`."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def set_state(generator: AnyGenerator, state: Any) -> None:
    """Put a generator into a state that `get_state` returned."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def set_seed(generator: AnyGenerator, seed: int) -> None:
    """Seed a generator of any kind; those with seeds of 32 bits get the lower bits."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)


# --------------------------------------------------------------------- numbers that no seed reaches


def check_repeatable(
    step: Callable,
    scheduler: Any,
    args: tuple,
    kwargs: dict[str, Any],
    timestep: Any,
    sample: Any,
    timesteps: Sequence,
) -> None:
    """Raise UsageError if two runs of a scheduler from the same seeds differ.

    Then it draws random numbers that no seed reaches, as from the clock. Two copies of the
    scheduler are stepped through all of `timesteps`, see `run_copy`. No denoiser runs.

    step: the scheduler's method. args, kwargs: the arguments of the call that is to come, without
    the scheduler; `timestep` and `sample` are two of them. A scheduler that can't be copied, or
    whose sample is no tensor, is not checked.
    """
    if not torch.is_tensor(sample):
        return
    try:
        first = run_copy(step, scheduler, args, kwargs, timestep, sample, timesteps)
        second = run_copy(step, scheduler, args, kwargs, timestep, sample, timesteps)
    except Exception:  # noqa: BLE001  whatever a scheduler raises when it is copied
        return

    size = torch.nan_to_num(first, 0, 0, 0).abs().mean().item()
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * size, equal_nan=True):
        raise UsageError(
            f"{type(scheduler).__name__} draws random numbers that no seed reaches, so two runs "
            "with the same seeds differ: let it draw from a generator that it holds, or from "
            "PyTorch's own, or choose another scheduler"
        )


def run_copy(
    step: Callable,
    scheduler: Any,
    args: tuple,
    kwargs: dict[str, Any],
    timestep: Any,
    sample: Tensor,
    timesteps: Sequence,
) -> Tensor:
    """Step a copy of a scheduler through `timesteps` from a fixed seed; return the last sample,
    float.

    The prediction and the other arguments stay those of the call, see `check_repeatable`; only
    timestep and sample change. The call's tensors are copied, since a scheduler may write into
    them. A scheduler that fails with such a prediction is stepped as far as it goes.
    """
    models = {}
    for value in vars(scheduler).values():
        if isinstance(value, torch.nn.Module):
            models[id(value)] = value
    twin = copy.deepcopy(scheduler, models)  # objects in this dict are used and not copied

    arguments = {}  # {id of an argument: what takes its place}
    for value in (*args, *kwargs.values()):
        if torch.is_tensor(value):
            arguments[id(value)] = value.clone()
    current = sample.clone()

    generators = list(generators_in([args, kwargs]))
    with same_random_numbers(generators), random_numbers_of([0], twin):
        for time in timesteps:
            arguments[id(timestep)] = time
            arguments[id(sample)] = current
            changed_args = [arguments.get(id(value), value) for value in args]
            changed_kwargs = {name: arguments.get(id(x), x) for name, x in kwargs.items()}
            try:
                result = step(twin, *changed_args, **changed_kwargs)
                current = result_tensor(result)
            except Exception:  # it needs more than a prediction; the other copy fails likewise
                break
    return current.float()
