"""Whether the modules that are read or edited really run: caches repeat in one step what they
computed in another.

Hooks fire wherever a module is called, also if a `forward` that was put in the place of its own
gives back what it kept. So this looks for what a call leads to: a module inside which something ran
in one call, and nothing in another, was skipped there. One without modules inside, whose own
`forward` was replaced, was skipped if it gives the same output for another input.
"""

import torch

from diffusion.signatures import tensors, unwrap
from errors import UsageError


class RunWatch:
    """Notes in each `trace.Forward` which target modules ran (`ran`) and which module was skipped
    (`skipped`).

    targets: {hook_name: (denoiser, module)}. denoisers: {name: root}. known: keeps from one
    sampling to the next inside which modules something runs.
    """

    def __init__(self, targets, denoisers, known):
        self.targets, self.known = targets, known
        self.names = {module: name for name, (_, module) in targets.items()}  # of what is looked at
        for denoiser in {denoiser for denoiser, _ in targets.values()}:
            for path, module in unwrap(denoisers[denoiser]).named_modules():
                if is_replaced(module):
                    self.names.setdefault(module, f"{denoiser}.{path}".rstrip("."))
        self.calls = 0  # of modules inside those
        self.began = {}  # {module: (forward, calls so far)} of the call that is under way
        self.empty = set()  # modules inside which nothing ran so far
        self.given = {}  # {module: {what it returned: what it was given}}, as fingerprints
        self.first = {}  # {hook_name: (whether it ran in the first forward that counts, when that was)}

    def listen(self, stack, sampling):
        """Register the hooks; `stack` removes them."""

        def count(module, args):
            self.calls += 1

        def begin(module, args):
            self.began[module] = (sampling.current, self.calls)

        def end(module, args, kwargs, output):
            forward, calls = self.began.pop(module, (None, 0))
            if forward is not None:
                forward.ran.add(self.names[module])
                if self._was_skipped(module, calls, (args, kwargs), output):
                    forward.skipped = forward.skipped or self.names[module]

        for part in {
            part for module in self.names for part in module.modules() if part is not module
        }:
            stack.callback(part.register_forward_pre_hook(count).remove)
        for module in self.names:
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end, with_kwargs=True).remove)

    def _was_skipped(self, module, calls, given, returned):
        if self.calls > calls:
            self.known["something runs inside", module] = True
            return module in self.empty
        if ("something runs inside", module) in self.known:
            return True
        self.empty.add(module)
        if not is_replaced(module) or next(module.children(), None) is not None:
            return False
        key, value = content_key(returned), content_key(given)
        return key is not None and self.given.setdefault(module, {}).setdefault(key, value) != value

    def check(self, name, forward, when):
        """Why a target can't be kept or edited: it did not run in a forward, and in others it does.
        None if it can.

        when: where the forward belongs to, such as "step 3". Raises UsageError for a module that
        was called without being run, since what it gives back may be stale.
        """
        if forward.skipped is not None:
            raise UsageError(
                f"{forward.skipped} was skipped in {when} or before: its `forward` was replaced on the instance, or a cache "
                "repeats what an earlier call computed; switch that off, so that hooks see what the model computes"
            )
        ran = name in forward.ran
        ran_first, first = self.first.setdefault(name, (ran, when))
        if ran == ran_first:
            return None
        idle, busy = (when, first) if ran_first else (first, when)
        return (
            f"did not run in {idle}, and it ran in {busy}: a cache skips it, or its denoiser does not need it in every step; "
            "switch the cache off, or hook another module"
        )


def is_replaced(module):
    """Whether its `forward` is not that of its class: offloading does that too, and then calls the
    class's own."""
    return "forward" in vars(module)


def content_key(value):
    """A hash of a few numbers of the first tensor in a nested structure; None where that has one
    number only, over and over."""
    found = [x for x in tensors(value) if x.is_floating_point() and x.numel()]
    if not found:
        return None
    numbers = found[0].detach().flatten()
    numbers = numbers[
        torch.linspace(0, len(numbers) - 1, min(len(numbers), 256)).long().to(numbers.device)
    ].tolist()
    return hash(tuple(numbers)) if len(set(numbers)) > 1 else None
