"""Watch whether the modules that are read or edited really compute.

Caches such as DeepCache repeat in one step what a module computed in another. Its hooks fire all
the same if a `forward` that was put in the place of its own returns a stored result. So `RunWatch`
looks at what a call leads to:

- A module inside which another module ran in one call, and none in a second call, was *skipped* in
  the second.
- A module without modules inside, whose `forward` was replaced on the instance, was skipped if it
  returns the same output for another input.
- A module that ran in one step and not in another did not run everywhere, see `RunWatch.check`.

Example: "mid_block" in three steps, while a cache repeats it in the second.

    step 0   mid_block is called, and modules inside it run: `forward.ran` is {"mid_block"}
    step 1   mid_block is called, and nothing inside it runs: `forward.skipped` is "mid_block"
             `check("mid_block", forward, "step 1")` raises UsageError
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from diffusion.signatures import tensors, unwrap
from errors import UsageError

NUMBERS_COMPARED = 256  # of a tensor, by `content_key`


class RunWatch:
    """Notes in each forward which target modules ran (`ran`), and which module was skipped first
    (`skipped`).

    targets: {hook_name: (denoiser, module)}. denoisers: {name: module}. known: a dict that the
    caller keeps from one sampling to the next; it remembers inside which modules others run.
    """

    def __init__(
        self,
        targets: dict[str, tuple[str, nn.Module]],
        denoisers: dict[str, nn.Module],
        known: dict,
    ):
        self.targets = targets
        self.known = known

        # the modules to watch: the targets, and those whose `forward` was replaced
        self.names = {module: name for name, (_, module) in targets.items()}
        for denoiser in {denoiser for denoiser, _ in targets.values()}:
            for path, module in unwrap(denoisers[denoiser]).named_modules():
                if is_replaced(module):
                    self.names.setdefault(module, f"{denoiser}.{path}".rstrip("."))

        self.calls = 0
        """The calls of modules inside the watched ones, so far."""

        self.began: dict[nn.Module, tuple[Any, int]] = {}
        """{module: (forward, calls so far)} of calls that have begun."""

        self.empty: set[nn.Module] = set()
        """The modules that were called while nothing inside them ran."""

        self.inputs: dict[nn.Module, dict[int, int | None]] = {}
        """{module: {key of what it returned: key of what it was given then}}, see `content_key`."""

        self.first: dict[str, tuple[bool, str]] = {}
        """{hook_name: (whether it ran in the first forward that was checked, when that was)}."""

    def listen(self, stack: ExitStack, sampling: Any) -> None:
        """Register the hooks; `stack` removes them. `sampling.current` is the forward that runs."""

        def count(module, args):
            self.calls += 1

        def begin(module, args):
            self.began[module] = (sampling.current, self.calls)

        def end(module, args, kwargs, output):
            forward, calls = self.began.pop(module, (None, 0))
            if forward is None:
                return
            name = self.names[module]
            forward.ran.add(name)
            if self._was_skipped(module, calls, (args, kwargs), output):
                forward.skipped = forward.skipped or name

        for inner in modules_inside(self.names):
            stack.callback(inner.register_forward_pre_hook(count).remove)
        for module in self.names:
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end, with_kwargs=True).remove)

    def _was_skipped(self, module: nn.Module, calls: int, given: Any, returned: Any) -> bool:
        """Return whether a call of a module computed nothing, or an earlier call of it did.

        calls: how many modules inside any module had been called before this call.
        """
        has_run_inside = ("something runs inside", module)
        if self.calls > calls:
            self.known[has_run_inside] = True
            return module in self.empty
        if has_run_inside in self.known:
            return True

        # nothing has ever run inside: it may have no modules, or be skipped in every call so far
        self.empty.add(module)
        has_children = next(module.children(), None) is not None
        if has_children or not is_replaced(module):
            return False
        key = content_key(returned)
        if key is None:
            return False
        input_key = content_key(given)
        first_input_key = self.inputs.setdefault(module, {}).setdefault(key, input_key)
        return first_input_key != input_key

    def check(self, name: str, forward: Any, when: str) -> str | None:
        """Return why a target can't be stored or edited, or None.

        The reason is that it runs in some of the checked forwards only. when: what the forward
        belongs to, such as "step 3". Raises UsageError if a module was skipped, since what it
        returns may be out of date.
        """
        if forward.skipped is not None:
            raise UsageError(
                f"{forward.skipped} was skipped in {when} or before: its `forward` was replaced on "
                "the instance, or a cache repeats what an earlier call computed; switch that off, "
                "so that hooks see what the model computes"
            )
        has_run = name in forward.ran
        ran_first, first = self.first.setdefault(name, (has_run, when))
        if has_run == ran_first:
            return None
        idle, busy = (when, first) if ran_first else (first, when)
        return (
            f"did not run in {idle}, and it ran in {busy}: a cache skips it, or its denoiser does "
            "not need it in every step; switch the cache off, or hook another module"
        )


def modules_inside(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Return the modules that lie inside at least one of the given ones."""
    inside = set()
    for module in modules:
        inside.update(inner for inner in module.modules() if inner is not module)
    return inside


def is_replaced(module: nn.Module) -> bool:
    """Return whether the instance has a `forward` that is not its class's.

    This alone means nothing: offloading replaces it too, and then calls the class's own.
    """
    return "forward" in vars(module)


def content_key(value: Any) -> int | None:
    """Return a hash of up to 256 numbers, evenly spaced, of the first tensor of floats in `value`.

    None if there is no such tensor, or if these numbers are all equal, since constants return the
    same output for any input.
    """
    candidates = [x for x in tensors(value) if x.is_floating_point() and x.numel()]
    if not candidates:
        return None
    numbers = candidates[0].detach().flatten()
    count = min(len(numbers), NUMBERS_COMPARED)
    indices = torch.linspace(0, len(numbers) - 1, count).long().to(numbers.device)
    chosen = numbers[indices].tolist()
    return hash(tuple(chosen)) if len(set(chosen)) > 1 else None
