"""What takes the place of some rows' tokens while a denoiser runs."""

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch

from errors import UsageError, check_choice
from hook_point import STREAMS
from tokens import NotHookable


@dataclass(frozen=True)
class Edit:
    """An edit of some rows' tokens of one stream, for `HookedDiffusionModel.run_with_hooks`.

    fn(x) gets the tokens (prompts, tokens, d) of what a module returns, text padded with zeros, and returns those to take
    their place, or None to leave them. With `with_input` it is fn(x, before), `before` being the same tokens of what the
    module takes. rows: cond, uncond, or all, of which `fn` gets each chunk of the guidance on its own. stream: image or text.
    steps: the steps to edit in, such as range(10); None is all.
    """

    fn: Callable
    rows: str = "cond"
    stream: str = "image"
    steps: Container[int] | None = None
    with_input: bool = False

    def __post_init__(self):
        check_choice("rows", self.rows, ("cond", "uncond", "all"))
        check_choice("stream", self.stream, STREAMS)
        if self.steps is not None and not hasattr(self.steps, "__contains__"):
            raise UsageError(f"steps: expected a range or a list, got {self.steps!r}")

    @property
    def sides(self):
        return ("output", "input") if self.with_input else ("output",)

    def hook(self, name, sampling, idle, explicit):
        """A forward hook for the module `name`, and one before it; `idle[name]` is why it has not edited, None once it has.

        Where there are no such tokens it is an error if the name was given, and passed over if a glob found it.
        """
        inputs = {}

        def before(module, args, kwargs):
            inputs[name] = (args, kwargs)

        def after(module, args, kwargs, output):
            forward, value = sampling.current, output
            if forward is None or (self.steps is not None and sampling.index not in self.steps):
                idle[name] = idle[name] and "ran, but in none of the steps to edit"
                return None
            rows, R = forward.rows, sampling.R
            for chunk, role in enumerate(forward.roles or ["all"] * (rows // R)):
                if self.rows not in ("all", role):
                    continue
                layouts = [forward.layouts[side, name, self.stream] for side in self.sides]
                if why := next((layout.reason for layout in layouts if isinstance(layout, NotHookable)), None):
                    idle[name] = idle[name] and why
                    if self.rows != "all" and explicit:  # of all chunks, the text of one may be empty
                        raise UsageError(f"{name}: {why}")
                    continue
                here = slice(chunk * R, (chunk + 1) * R)
                x, *rest = (layout.take(v, rows)[here].clone() for layout, v in zip(layouts, (output, inputs.get(name))))
                new = self.fn(x, *rest)
                if new is not None and (not torch.is_tensor(new) or new.shape != x.shape):
                    got = tuple(new.shape) if torch.is_tensor(new) else type(new).__name__
                    raise UsageError(f"{name}: an edit must return {tuple(x.shape)} or None, got {got}")
                value = value if new is None else layouts[0].put(value, rows, here.start, new)
                idle[name] = None
            return value

        return before, after
