"""Edits: what takes the place of some rows' tokens while a denoiser runs.

    halve = Edit(lambda x: x / 2)                       # conditional rows, image tokens, all steps
    model.run_with_hooks({"mid_block": halve}, "a red star")

`Edit` says what to change. An `Editor` carries out the edits of one generation, with one
`EditHook` for each edit of a module, and checks that each edit takes place.
"""

from collections.abc import Callable, Container
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.locate import find_layouts
from diffusion.repeated import RunWatch
from diffusion.text_padding import RealTokens, with_padding, without_padding
from diffusion.token_layout import NotHookable
from diffusion.trace import Forward, Sampling, Step
from diffusion.unnoticed import processors_put_back
from errors import UsageError, check_choice
from store.hook_point import STREAMS


@dataclass(frozen=True)
class Edit:
    """An edit of some rows' tokens of one stream, for `HookedDiffusionModel.run_with_hooks`."""

    fn: Callable
    """fn(x) gets a copy of the tokens (prompts, tokens, d) of what a module returns, or takes. Text
    is padded with zeros. It returns those that take their place, of the same shape. It may also
    change x in place and return None, as `def fn(x): x.zero_()` does. Where it returns None and x
    is as it was, nothing is edited."""

    rows: str = "cond"
    """cond, uncond or all: which rows of classifier-free guidance. For all, `fn` is called for each
    pass on its own."""

    stream: str = "image"
    """image or text: which tokens of a joint block."""

    steps: Container[int] | None = None
    """The steps to edit in, such as range(10). If None, all of them."""

    with_input: bool = False
    """Call fn(x, before) instead, where `before` are the same tokens of what the module takes."""

    side: str = "output"
    """output or input: whether to edit what the module returns, or what it takes."""

    keep_padding: bool = False
    """With stream="text": give fn also the tokens that only fill up a prompt. Otherwise these stay
    as they are, where it can be told which they are."""

    def __post_init__(self) -> None:
        check_choice("side", self.side, ("output", "input"))
        if self.side == "input" and self.with_input:
            raise UsageError('an edit with side="input" gets the input alone: leave with_input out')
        check_choice("rows", self.rows, ("cond", "uncond", "all"))
        check_choice("stream", self.stream, STREAMS)
        is_text = isinstance(self.steps, str)  # in which "1" would be contained, but never 1
        if self.steps is not None and (is_text or not hasattr(self.steps, "__contains__")):
            raise UsageError(f"steps: expected a range or a list, got {self.steps!r}")

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides of a module whose tokens `fn` gets; the first is the one that is changed."""
        if self.with_input:
            return ("output", "input")
        return (self.side,)

    @property
    def leaves_padding(self) -> bool:
        """Whether padding of text is neither given to `fn` nor changed."""
        return self.stream == "text" and not self.keep_padding

    def is_for_step(self, index: int) -> bool:
        """Return whether the edit is made in the step with this index."""
        return self.steps is None or index in self.steps

    def is_for_rows(self, role: str) -> bool:
        """Return whether the edit is made in a pass with this role: cond, uncond or other; all if
        none is known."""
        return self.rows in ("all", role)

    def is_for(self, index: int, roles: list[str] | None) -> bool:
        """Return whether the edit is made in a forward of the step `index` with these roles.

        roles: one for each pass, such as ["uncond", "cond"]; None where they are not told.
        """
        if not self.is_for_step(index):
            return False
        return roles is None or self.rows == "all" or self.rows in roles

    def edited(self, hook_name: str, tokens: list[Tensor]) -> Tensor | None:
        """Return what `fn` makes of the tokens, given as one tensor for each side.

        Return None where it returns None and has not changed its first argument in place. Raises
        UsageError where it returns something else than None or tokens of the same shape.
        """
        expected = tuple(tokens[0].shape)
        copies = [x.clone() for x in tokens]
        new = self.fn(*copies)
        # NaN differs from itself, and is put back as it was
        if new is None and not torch.equal(copies[0], tokens[0]):
            new = copies[0]
        if new is None:
            return None
        if not torch.is_tensor(new) or tuple(new.shape) != expected:
            got = tuple(new.shape) if torch.is_tensor(new) else type(new).__name__
            raise UsageError(f"{hook_name}: an edit must return {expected} or None, got {got}")
        return new


class Editor:
    """Carries out the edits of one generation, and checks that each takes place.

    functions: {hook_name: [Edit, or a function as in PyTorch]}.
    targets: {hook_name: (denoiser's name, module)}, for the same names.
    explicit: the hook names that the user spelt out; the others were found by a glob.
    denoisers: {name: module}. known: layouts found so far, see `locate.find_layouts`.
    """

    real: RealTokens | None = None
    """Which text tokens are no padding; needed where an edit `leaves_padding`."""

    def __init__(
        self,
        functions: dict[str, list],
        targets: dict[str, tuple[str, nn.Module]],
        explicit: set[str],
        denoisers: dict[str, nn.Module],
        known: dict,
    ):
        self.functions = functions
        self.targets = targets
        self.explicit = explicit
        self.known = known

        self.edits: list[tuple[str, Edit]] = []  # (hook_name, edit)
        for hook_name, functions_of_module in functions.items():
            for function in functions_of_module:
                if isinstance(function, Edit):
                    self.edits.append((hook_name, function))

        self.wanted = {}  # {(side, hook_name, stream): (denoiser, module)}
        for hook_name, edit in self.edits:
            for side in edit.sides:
                self.wanted[side, hook_name, edit.stream] = targets[hook_name]

        edited_modules = {hook_name: targets[hook_name] for hook_name, _ in self.edits}
        self.runs = RunWatch(edited_modules, denoisers, known)
        # {hook_name: why no function of the module has done anything so far, None once one has}
        self.idle: dict[str, str | None] = dict.fromkeys(targets, "never ran")

    @property
    def rows(self) -> set[str]:
        """The rows that the edits are for: cond, uncond, all."""
        return {edit.rows for _, edit in self.edits}

    @property
    def leaves_padding(self) -> bool:
        """Whether an edit needs to know which text tokens are padding."""
        return any(edit.leaves_padding for _, edit in self.edits)

    def on_forward(self, forward: Forward, module: nn.Module) -> None:
        """Before a denoiser runs: find where the tokens are."""
        with processors_put_back([module]):
            find_layouts(forward, module, self.wanted, self.known)

    def on_step(self, step: Step) -> None:
        """When a step is complete: raise UsageError where a cache skipped an edited module."""
        for hook_name, edit in self.edits:
            for forward in step.forwards:
                if forward.denoiser != self.targets[hook_name][0]:
                    continue
                if not edit.is_for(step.index, forward.roles):
                    continue
                reason = self.runs.check(hook_name, forward, f"step {step.index}")
                if reason:
                    raise UsageError(f"{hook_name}: {reason}")

    def listen(self, stack: ExitStack, sampling: Sampling | None) -> None:
        """Register the hooks, in the user's order, but those on a module's input first; `stack`
        removes them.

        sampling: what labels the rows; it may be None if there is no `Edit`.
        """
        if self.edits:
            self.runs.listen(stack, sampling)
        for hook_name, (_, module) in self.targets.items():
            # a hook that notes a module's input comes behind those that change it
            functions = sorted(self.functions[hook_name], key=changes_no_input)
            for function in functions:
                if isinstance(function, Edit):
                    EditHook(self, hook_name, function, sampling).listen(stack, module)
                else:
                    hook = plain_hook(function, hook_name, self.idle)
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)

    def check_edited(self) -> None:
        """After the generation: raise UsageError where a module was not edited.

        One that a glob found may stay unedited as long as another was edited.
        """
        nothing_was_edited = all(self.idle.values())
        reasons = []
        for hook_name, reason in self.idle.items():
            if reason and (hook_name in self.explicit or nothing_was_edited):
                reasons.append(f"{hook_name}: {reason}")
        if reasons:
            raise UsageError("nothing was edited at " + "; ".join(reasons))


class EditHook:
    """One edit at one module: its hooks, and what they note between them."""

    def __init__(self, editor: Editor, hook_name: str, edit: Edit, sampling: Sampling):
        self.editor = editor
        self.idle = editor.idle
        self.is_explicit = hook_name in editor.explicit
        self.hook_name = hook_name
        self.edit = edit
        self.sampling = sampling
        # {side: what the module took or returned in the call that is under way}
        self.values: dict[str, Any] = {}

    def listen(self, stack: ExitStack, module: nn.Module) -> None:
        """Register the hooks on the module; `stack` removes them."""
        if self.edit.side == "input":
            handle = module.register_forward_pre_hook(self.change_input, with_kwargs=True)
            stack.callback(handle.remove)
            return
        if self.edit.with_input:
            handle = module.register_forward_pre_hook(self.note_input, with_kwargs=True)
            stack.callback(handle.remove)
        handle = module.register_forward_hook(self.change_output, with_kwargs=True)
        stack.callback(handle.remove)

    def note_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note what the module takes."""
        self.values["input"] = (args, kwargs)

    def change_input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Return the edited arguments (args, kwargs) of the module; None, which leaves them as they
        are, in the steps that are not to edit."""
        return self.edited((args, kwargs))

    def change_output(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Return the edited output of the module; None, which leaves it as it is, in the steps that
        are not to edit."""
        return self.edited(output)

    def edited(self, value: Any) -> Any:
        """Return what the module takes or returns, `value`, with edited tokens; None in the steps
        that are not to edit."""
        forward = self.sampling.current
        if forward is None or not self.edit.is_for_step(self.sampling.index):
            self.note_idle("ran, but in none of the steps to edit")
            return None

        self.values[self.edit.side] = value
        roles = forward.roles
        if not roles:  # nobody asks for them where every edit is for all rows
            roles = ["all"] * (forward.rows // self.sampling.R)
        new_value = value
        for chunk, role in enumerate(roles):
            if self.edit.is_for_rows(role):
                new_value = self.edit_chunk(forward, chunk, role, new_value)
        self.values.clear()
        return new_value

    def edit_chunk(self, forward: Forward, chunk: int, role: str, value: Any) -> Any:
        """Return `value` with the edited tokens of one pass, a chunk of the batch's rows.

        Where it has no such tokens, it raises UsageError if the user spelt the module's name out,
        and returns `value` as it is if a glob found the module.
        """
        layouts = []
        for side in self.edit.sides:
            layout = forward.layouts[side, self.hook_name, self.edit.stream]
            if isinstance(layout, NotHookable):
                self.note_idle(layout.reason)
                # with rows="all" the text of one pass may be empty while another has some
                if self.edit.rows != "all" and self.is_explicit:
                    raise UsageError(f"{self.hook_name}: {layout.reason}")
                return value
            layouts.append(layout)

        rows = slice(chunk * self.sampling.R, (chunk + 1) * self.sampling.R)
        whole = []
        for layout, side in zip(layouts, self.edit.sides):
            whole.append(layout.take(self.values[side], forward.rows)[rows])
        masks = None
        if self.edit.leaves_padding:
            masks = self.real_tokens(role, layouts[0].counts[rows])
        tokens = whole
        if masks is not None:
            tokens = [without_padding(x, masks) for x in whole]

        new = self.edit.edited(self.hook_name, tokens)
        self.idle[self.hook_name] = None
        if new is None:
            return value
        if masks is not None:
            new = with_padding(new, whole[0], masks)
        return layouts[0].put(value, forward.rows, rows.start, new)

    def real_tokens(self, role: str, counts: list[int]) -> list[Tensor] | None:
        """Return which text tokens of each row of a pass are no padding; None if the edit is for
        all of them, since nothing tells.

        Raises UsageError if a tokenizer has padded the prompts, and it can't be told where the
        padding is. counts: see `RealTokens.mask`.
        """
        real = self.editor.real
        if real.reason and real.is_padded:
            raise UsageError(
                f"{self.hook_name}: it can't be told which text tokens are padding: "
                f"{real.reason}; say keep_padding=True to edit all of them"
            )
        return real.mask(role, counts)

    def note_idle(self, reason: str) -> None:
        """Keep why nothing was edited so far, unless something was."""
        if self.idle[self.hook_name] is not None:
            self.idle[self.hook_name] = reason


def changes_no_input(function: Any) -> bool:
    """Return whether a function or an `Edit` leaves what a module takes as it is."""
    return not isinstance(function, Edit) or function.side != "input"


def plain_hook(function: Callable, hook_name: str, idle: dict[str, str | None]) -> Callable:
    """Return a user's function(module, input, output) as a forward hook with keyword arguments.

    `input` is the tuple of positional arguments, or of the keyword ones where there are no others.
    The hook sets `idle[hook_name]` to None when it is called.
    """

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        idle[hook_name] = None
        return function(module, args or tuple(kwargs.values()), output)

    return hook
