"""What takes the place of some rows' tokens while a denoiser runs."""

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch

from diffusion.token_layout import NotHookable
from errors import UsageError, check_choice
from store.hook_point import STREAMS


@dataclass(frozen=True)
class Edit:
    """An edit of some rows' tokens of one stream, for `HookedDiffusionModel.run_with_hooks`.

    fn(x) gets the tokens (prompts, tokens, d) of what a module returns, text padded with zeros, and
    returns those to take their place, or None to leave them. With `with_input` it is fn(x, before),
    `before` being the same tokens of what the module takes. rows: cond, uncond, or all, of which
    `fn` gets each chunk of the guidance on its own. stream: image or text. steps: the steps to edit
    in, such as range(10); None is all.
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

    def is_for(self, index, roles):
        """Whether it edits rows of these roles, None where they are not told, in the step
        `index`."""
        in_step = self.steps is None or index in self.steps
        return in_step and (roles is None or self.rows == "all" or self.rows in roles)

    def listen(self, stack, module, name, sampling, idle, explicit):
        """Register hooks on the module `name`; `stack` removes them. `idle[name]` is why it has not
        edited, None once it has.

        Where there are no such tokens it is an error if the name was given, and passed over if a
        glob found it.
        """
        values = {}  # {side: what the module took or returned in the call that is under way}

        def before(module, args, kwargs):
            values["input"] = (args, kwargs)

        def after(module, args, kwargs, output):
            forward = sampling.current
            if forward is None or (self.steps is not None and sampling.index not in self.steps):
                idle[name] = idle[name] and "ran, but in none of the steps to edit"
                return None
            values["output"] = new_output = output
            for chunk, role in enumerate(forward.roles or ["all"] * (forward.rows // sampling.R)):
                if self.rows not in ("all", role):
                    continue
                layouts = [forward.layouts[side, name, self.stream] for side in self.sides]
                if missing := next(
                    (layout for layout in layouts if isinstance(layout, NotHookable)), None
                ):
                    idle[name] = idle[name] and missing.reason
                    if (
                        self.rows != "all" and explicit
                    ):  # of all chunks, the text of one may be empty
                        raise UsageError(f"{name}: {missing.reason}")
                    continue
                rows = slice(chunk * sampling.R, (chunk + 1) * sampling.R)
                tokens = [
                    layout.take(values[side], forward.rows)[rows]
                    for layout, side in zip(layouts, self.sides)
                ]
                new = self._edited(name, *(x.clone() for x in tokens))
                if new is not None:
                    new_output = layouts[0].put(new_output, forward.rows, rows.start, new)
                idle[name] = None
            values.clear()
            return new_output

        if self.with_input:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def _edited(self, name, x, *before):
        new = self.fn(x, *before)
        if new is not None and (not torch.is_tensor(new) or new.shape != x.shape):
            got = tuple(new.shape) if torch.is_tensor(new) else type(new).__name__
            raise UsageError(f"{name}: an edit must return {tuple(x.shape)} or None, got {got}")
        return new
