"""Random numbers that a generation draws besides those of its own generators, seeded and put back.

A pipeline is given one generator per row. A scheduler may draw others: from the global states of
PyTorch, NumPy and Python, where the pipeline does not pass its generators on, or from a generator
that it holds itself. What is stored, or compared with another run, must not depend on them, so they
are seeded from the rows' seeds, and a scheduler whose numbers no seed reaches is refused.
"""

import copy
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from diffusion.signatures import tensors
from errors import UsageError

DEPTH = 3  # of attributes, lists and dicts in which a scheduler's generators are looked for


def get_state(generator):
    """The state of a torch.Generator, or of one of NumPy or Python."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return (
        generator.get_state()
        if isinstance(generator, np.random.RandomState)
        else generator.getstate()
    )


def set_state(generator, state) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def set_seed(generator, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)


def generators_in(value, depth: int = DEPTH) -> Iterator:
    """The generators among the attributes and entries of an object, each as often as it is met."""
    if isinstance(
        value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    ):
        yield value
    elif depth and not isinstance(value, (torch.Tensor, torch.nn.Module, type)):
        items = value
        if not isinstance(value, (list, tuple)):
            items = (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
        for item in items:
            yield from generators_in(item, depth - 1)


@contextmanager
def same_random_numbers(*owners):
    """Random states, the global ones and those that `owners` hold, are those of the beginning again
    when the context ends."""
    cuda = range(torch.cuda.device_count())  # a seed is set on all of them
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 (a scheduler may use the global one)
    states = [
        (generator, get_state(generator)) for generator in generators_in(list(owners), DEPTH + 1)
    ]
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            if mps is not None:
                torch.mps.set_rng_state(mps)
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
            for generator, state in states:
                set_state(generator, state)


def mixed_seed(seeds: Iterable[int]) -> int:
    """One seed that follows from several."""
    return int.from_bytes(hashlib.sha256(repr(list(seeds)).encode()).digest()[:7], "big")


class RowByRow(TorchFunctionMode):
    """Context in which noise that PyTorch draws without a generator, one entry per row, is drawn
    for each row from its own seed.

    A row's noise is then the same whichever rows are generated together. What has another first
    axis is left as it is.
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
        if (
            func in self.DRAWN
            and kwargs.get("generator") is None
            and drawn.ndim
            and len(drawn) == len(self.generators)
        ):
            draw = self.DRAWN[func]
            rows = [
                draw(drawn.shape[1:], generator=generator, dtype=drawn.dtype)
                for generator in self.generators
            ]
            drawn.copy_(torch.stack(rows))
        return drawn


@contextmanager
def random_numbers_of(seeds: Iterable[int], *owners):
    """Context in which all random numbers, the global ones and those of the owners' generators,
    follow from the rows' seeds.

    They depend on which rows are generated together, and on nothing else; for a scheduler's noise,
    see `RowByRow`.
    """
    seed = mixed_seed(seeds)
    with same_random_numbers(*owners):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        for i, generator in enumerate(generators_in(list(owners), DEPTH + 1)):
            set_seed(generator, seed + i)
        yield


def check_repeatable(
    step: Callable, scheduler, args: tuple, kwargs: dict, timestep, sample: torch.Tensor, timesteps
) -> None:
    """Raise UsageError where a scheduler draws random numbers that no seed reaches, so that two
    runs with one seed differ.

    Copies of the scheduler are stepped twice through all of `timesteps`, from the same seeds and
    with one prediction throughout: no denoiser runs. step, args, kwargs: the call that is under
    way, of which timestep and sample are two arguments; its tensors are copied, since a scheduler
    may write into them. A scheduler that can't be copied is not looked at, and one that does not go
    on with such a prediction is compared as far as it goes.
    """
    generators = list(generators_in([args, kwargs]))
    models = {
        id(value): value for value in vars(scheduler).values() if isinstance(value, torch.nn.Module)
    }  # not to be copied

    def outcome():
        twin, now = copy.deepcopy(scheduler, dict(models)), sample.clone()
        copies = {
            id(value): value.clone()
            for value in (*args, *kwargs.values())
            if torch.is_tensor(value)
        }
        with same_random_numbers(generators), random_numbers_of([0], twin):
            for time in timesteps:
                changed = copies | {id(timestep): time, id(sample): now}
                own = [changed.get(id(value), value) for value in args]
                named = {name: changed.get(id(value), value) for name, value in kwargs.items()}
                try:
                    now = tensors(step(twin, *own, **named))[0]
                except Exception:  # it wants more than a prediction, and so do both copies
                    break
        return now.float()

    if not torch.is_tensor(sample):
        return
    try:
        first, second = outcome(), outcome()
    except Exception:  # noqa: BLE001  whatever a scheduler's own way to be copied raises
        return
    size = torch.nan_to_num(first, 0, 0, 0).abs().mean().item()
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * size, equal_nan=True):
        raise UsageError(
            f"{type(scheduler).__name__} draws random numbers that no seed reaches, so two runs with the same seeds differ: "
            "let it draw from a generator that it holds, or from PyTorch's own, or choose another scheduler"
        )
