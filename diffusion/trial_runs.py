"""Run a denoiser again on the arguments of a call, with noise on some of them, and look at its
modules.

Tokens of a module that change when the image's part of the input changes are image tokens, and
likewise for text. Attention would spread each change over all tokens, so it is made *local* in
these runs: each token gets its own query back, and depends on no other token.

`run_trials` makes four runs. For a batch of 2 rows (one prompt, with guidance):

    plain   the arguments as they are
    upper   noise on the sample of row 0
    lower   noise on the sample of row 1
    text    noise on all text embeddings, if there are any

A block that joins 3 text tokens and 4 image tokens then has fingerprints (one number per token)
that differ from those of the plain run at
    upper   row 0: tokens 3 to 6          row 1: none
    lower   row 0: none                   row 1: tokens 3 to 6
    text    tokens 0 to 2 in both rows
so locate.py knows that its image tokens are 3 to 6. If `upper` changed row 1 as well, the first
axis would not be the batch, or the module would mix the rows.
"""

import inspect
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffusion.forward import Forward
from diffusion.randomness import same_random_numbers
from diffusion.repeated import RunWatch
from diffusion.signatures import forward_signature, sample_name, tensors, time_parameter
from diffusion.token_layout import by_token, spatial_shape
from errors import UsageError

CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.batchnorm._NormBase)

SideOfModule = tuple[str, str]
"""(side, hook_name), such as ("output", "mid_block")."""

Place = tuple[str, str, str]
"""(side, hook_name, stream), such as ("output", "mid_block", "image")."""


class Seen(NamedTuple):
    """A tensor that a module took or returned in a run."""

    shape: torch.Size

    form: str | None
    """How its axes are to be read, see `token_layout.row_view`. None if its first axis is not the
    batch."""

    tokens: Tensor | None
    """A fingerprint of each token, int64 (rows, tokens); None without a form."""


class Runs(NamedTuple):
    """The four runs of `run_trials`, and what they showed together."""

    plain: "Run"
    upper: "Run"
    lower: "Run"
    text: "Run"

    has_text: bool
    """Whether there are text embeddings among the arguments."""

    attention_is_local: bool
    """Whether attention was met and made local. False if the model computes attention in a way that
    `LocalAttention` does not know, or has none."""

    idle: dict[str, str]
    """{hook_name: why it can't be hooked} of the modules that ran in only some of the runs."""


def run_trials(
    root: nn.Module, forward: Forward, places: dict[Place, nn.Module], known: dict
) -> Runs:
    """Run the denoiser `root` on the arguments of `forward`, changed in several ways; return what
    the runs showed.

    places: the modules to look at. known: what was found out before, for `RunWatch`. The upper half
    of the rows is the larger one if their number is odd. A single row has no lower half, and a run
    that is not needed is the plain one. Numbers that are not `forward.sampled` get no noise: a
    picture to edit that is joined to the sample does not change between steps.

    Raises UsageError if the denoiser fails, and if a module is called without being run, since it
    would repeat what an earlier call computed.
    """
    sample = sample_name(root)
    upper_rows = range((forward.rows + 1) // 2)
    lower_rows = range(len(upper_rows), forward.rows)
    noisy_text = noise_on_text(root, forward)
    text_before = {name: forward.arguments[name] for name in noisy_text}
    pairs = zip(tensors(noisy_text), tensors(text_before))
    has_text = any(noisy is not before for noisy, before in pairs)

    trials = Trials(root, forward, places, known)
    plain = trials.run({})
    upper = trials.run({sample: disturb(forward.sample, upper_rows, forward.sampled)})
    lower = plain
    if lower_rows:
        lower = trials.run({sample: disturb(forward.sample, lower_rows, forward.sampled)})
    text = trials.run(noisy_text) if has_text else plain
    attention_is_local = trials.attention.calls > 0
    return Runs(plain, upper, lower, text, has_text, attention_is_local, trials.idle)


@dataclass
class Trial:
    """What `RunWatch` notes in a trial run, as in a `Forward`."""

    ran: set[str] = field(default_factory=set)
    skipped: str | None = None


class Trials:
    """Runs a denoiser several times, and watches which modules do not run each time."""

    def __init__(
        self, root: nn.Module, forward: Forward, places: dict[Place, nn.Module], known: dict
    ):
        self.root = root
        self.forward = forward
        self.modules = {(side, name): module for (side, name, _), module in places.items()}
        self.targets = {}
        for (_, name), module in self.modules.items():
            self.targets[name] = (forward.denoiser, module)
        self.run_watch = RunWatch(self.targets, {forward.denoiser: root}, known)
        self.attention = LocalAttention()
        self.current = Trial()  # where `run_watch` notes what runs
        self.count = 0
        self.idle = {}

    def run(self, changes: dict[str, Any]) -> "Run":
        """Run the denoiser with `changes` of its arguments, {name: value}, and return the Run."""
        self.count += 1
        self.current = Trial()
        run = Run(self.root, self.forward.rows, self.modules)
        with ExitStack() as stack:
            self.run_watch.listen(stack, self)
            run.call(self.forward, changes, self.attention)
        for name in self.targets:
            when = f"trial run {self.count} of the denoiser"
            reason = self.run_watch.check(name, self.current, when)
            if reason is not None:
                self.idle.setdefault(name, reason)
        return run


class Run:
    """One call of a denoiser, and what it showed."""

    def __init__(self, root: nn.Module, rows: int, modules: dict[SideOfModule, nn.Module]):
        self.root = root
        self.rows = rows
        self.modules = modules
        self.paths = {module: path for path, module in root.named_modules()}

        self.seen: dict[SideOfModule, list[Seen] | None] = {}
        """What the `modules` took or returned; None for one that ran several times."""

        self.inputs: dict[str, list[torch.Size]] = {}
        """{path: shapes of the larger tensors that the module took}, of the `modules` and of those
        around them."""

        self.width_last: dict[torch.Size, bool] = {}
        """{shape: whether the width of such a tensor is its last axis, not its second}, as told by
        the layers that returned one."""

    def call(self, forward: Forward, changes: dict[str, Any], attention: TorchFunctionMode) -> None:
        """Call the denoiser as in `forward`, with `changes` of its arguments and a fixed seed.

        Raises UsageError with the reason if it fails, as a model may whose attention is its own.
        """
        signature = forward_signature(self.root)
        self_name = next(iter(signature.parameters))
        arguments = {self_name: self.root} | forward.arguments | changes
        call = inspect.BoundArguments(signature, arguments)
        handles = self._register_hooks()
        try:
            with torch.no_grad(), same_random_numbers(), attention:
                torch.manual_seed(0)
                self.root(*call.args[1:], **call.kwargs)
        except Exception as error:
            failed = traceback.extract_tb(error.__traceback__)[-1]
            raise UsageError(
                f"{forward.denoiser} can't be run to find its tokens: {type(error).__name__}: "
                f"{error} ({Path(failed.filename).name}, line {failed.lineno})"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def _register_hooks(self) -> list:
        """Register the hooks that fill `seen`, `inputs` and `width_last`; return their handles."""
        handles = []
        for module in self.root.modules():
            has_own_parameters = next(module.parameters(recurse=False), None) is not None
            if has_own_parameters:
                handles.append(module.register_forward_hook(self._note_width))

        paths = {path for module in self.modules.values() for path in self.path_and_parents(module)}
        for path in paths:
            module = self.root.get_submodule(path)
            hook = self._note_inputs(path)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        for (side, name), module in self.modules.items():
            hook = self._note_tokens(side, name)
            if side == "input":
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return handles

    def _note_width(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Note in `width_last`, for each tensor that a layer returns, which axis is its width."""
        for x in tensors(output):
            is_last = width_is_last(module, x)
            if is_last is not None:
                self.width_last[x.shape] = is_last

    def _note_inputs(self, path: str) -> Callable:
        """Return a hook that notes in `inputs` the shapes of what the module at `path` takes."""

        def hook(module, args, kwargs):
            shapes = []
            for x in tensors((args, kwargs)):
                if x.ndim > 2 and len(x) % self.rows == 0:
                    shapes.append(x.shape)
            self.inputs[path] = shapes

        return hook

    def _note_tokens(self, side: str, name: str) -> Callable:
        """Return a hook that notes in `seen` the tensors on one side of a module; None if the
        module runs twice."""

        def hook(module, args, kwargs, output=None):
            value = output if side == "output" else (args, kwargs)
            if (side, name) in self.seen:
                self.seen[side, name] = None
            else:
                self.seen[side, name] = [self._look_at(x, module, side) for x in tensors(value)]

        return hook

    def _look_at(self, x: Tensor, module: nn.Module, side: str) -> Seen:
        """Return what `seen` holds about a tensor on one side of a module."""
        form = self._form(x, module, side)
        if form is None:
            return Seen(x.shape, None, None)
        return Seen(x.shape, form, hash_tokens(by_token(x, self.rows, form)))

    def _form(self, x: Tensor, module: nn.Module, side: str) -> str | None:
        """Return how the axes of a module's tensor are to be read, see `token_layout.row_view`;
        None if the first axis is not the batch."""
        if x.ndim < 2 or len(x) % self.rows or not x.numel():
            return None
        paths = self.path_and_parents(module)

        # 1. inside attention, (rows, T, heads, d) or (rows, heads, T, d)
        if x.ndim == 4 and len(x) == self.rows:
            form = self._form_with_heads(x, paths[1:])
            if form is not None:
                return form

        # 2. the width is the second axis: a feature map
        is_last = width_is_last(module, x) if side == "input" else None
        if is_last is None:
            is_last = self.width_last.get(x.shape, x.ndim < 4)
        if not is_last and x.ndim > 2:
            return "map"

        # 3. (rows H W, frames, d): attention over the frames of a video, at each pixel
        if x.ndim == 3:
            pixels = len(x) // self.rows
            videos = [sizes for sizes in self.maps(paths) if len(sizes) == 3]
            for frames, height, width in videos:
                if pixels == height * width and x.shape[1] == frames and pixels != frames:
                    return "frames"

        # 4. everything else
        return "tokens"

    def _form_with_heads(self, x: Tensor, paths: list[str]) -> str | None:
        """Return "heads" or "heads first" if x is a sequence of the modules around it (at `paths`,
        nearest first) whose width is split into heads; otherwise None.

        If they took (2, 77, 320), then (2, 77, 8, 40) has "heads" and (2, 8, 77, 40) "heads first".
        Two sequences may also have been joined, so the sum of their lengths counts as a length.
        """
        shapes = []
        for path in paths:
            shapes = self.inputs.get(path, [])
            if shapes:
                break
        if not shapes or len(shapes[0]) != 3:
            return None
        lengths = [shape[1] for shape in shapes if len(shape) == 3]
        lengths.append(sum(lengths))
        if x.shape[1] in lengths:
            return "heads"
        return "heads first" if x.shape[2] in lengths else None

    def path_and_parents(self, module: nn.Module) -> list[str]:
        """Return the paths of a module and of those around it, nearest first.

        For "blocks.0.attn" it is ["blocks.0.attn", "blocks.0", "blocks", ""]. The root, whose path
        is "", gives ["", ""].
        """
        names = self.paths[module].split(".")
        return [".".join(names[:i]) for i in range(len(names), -1, -1)]

    def maps(self, paths: list[str]) -> list[tuple[int, ...]]:
        """Return for each module that took a feature map the spatial shape of its first one, such
        as (H, W)."""
        sizes = []
        for path in paths:
            maps = [shape for shape in self.inputs.get(path, []) if len(shape) > 3]
            if maps:
                is_last = self.width_last.get(maps[0], False)
                sizes.append(spatial_shape(maps[0], self.rows, is_last))
        return sizes


def width_is_last(module: nn.Module, x: Tensor) -> bool | None:
    """Return whether the width of a tensor that a layer takes or returns is its last axis.

    False means that it is the second. None if the layer does not tell: no size of its parameters is
    that of one of these axes.
    """
    if isinstance(module, CHANNELS_FIRST):
        return False
    if x.ndim < 2:
        return None
    sizes = {n for parameter in module.parameters(recurse=False) for n in parameter.shape}
    if not {x.shape[-1], x.shape[1]} & sizes:
        return None
    return x.shape[-1] in sizes


def hash_tokens(x: Tensor) -> Tensor:
    """Return a fingerprint of each token of (rows, tokens, d): the sum of its bits as integers,
    int64 (rows, tokens).

    A token that changes gets another fingerprint, but for rare accidents; 0.0 and -0.0 are equal.
    """
    if x.is_complex():
        x = torch.view_as_real(x).flatten(-2)
    x = x + 0  # makes a 0.0 of -0.0
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.contiguous().view(integers[x.element_size()])
    return bits.sum(-1, dtype=torch.int64)


def disturb(
    x: Tensor | list, rows: Collection[int], mask: Tensor | None = None
) -> Tensor | list[Tensor]:
    """Return a tensor, or a list of one tensor per row, with noise added to some rows.

    mask: bool, shaped as a row of the tensor; only these numbers get noise. Integers get no noise:
    0 becomes 1, and other numbers n become n - 1.
    """
    if not torch.is_tensor(x):
        return [disturb(row[None], [0])[0] if r in rows else row for r, row in enumerate(x)]

    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
    chosen = torch.zeros(len(x), *[1] * (x.ndim - 1), dtype=torch.bool)
    chosen[list(rows)] = True
    if mask is not None:
        chosen = chosen & mask.cpu()
    other = x + noise if x.is_floating_point() else (x - 1).abs()
    return torch.where(chosen.to(x.device), other, x)


def noise_on_text(root: nn.Module, forward: Forward) -> dict[str, Any]:
    """Return the arguments of a forward, but sample and time, with noise on all text embeddings."""
    not_text = (sample_name(root), time_parameter(root))
    sample_is_list = isinstance(forward.sample, (list, tuple))
    noisy = {}
    for name, value in forward.arguments.items():
        if name not in not_text:
            noisy[name] = disturb_text(value, forward.rows, sample_is_list)
    return noisy


def disturb_text(value: Any, rows: int, sample_is_list: bool) -> Any:
    """Return a nested argument with noise on each sequence of embeddings in it.

    These are tensors (rows, length, d), and if the sample is a list, also lists of one tensor per
    row. All else in it is the same object as before.
    """
    if torch.is_tensor(value):
        is_sequence = value.ndim == 3 and len(value) == rows and value.is_floating_point()
        return disturb(value, range(rows)) if is_sequence else value
    if isinstance(value, dict):
        return {key: disturb_text(item, rows, sample_is_list) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    one_per_row = all(torch.is_tensor(item) and item.is_floating_point() for item in value)
    if sample_is_list and len(value) == rows and one_per_row:
        return disturb(value, range(rows))
    return type(value)(disturb_text(item, rows, sample_is_list) for item in value)


class LocalAttention(TorchFunctionMode):
    """While it is on, attention gives each token its own query back.

    It knows PyTorch's two attention functions, and a softmax over square scores, which is taken
    for attention of an image over itself. Other scores are those over a text, whose tokens may
    change the image's: no image token sees another one there.
    """

    calls = 0
    """How many calls of attention it has met."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}

        def argument(name: str, position: int) -> Any:
            return args[position] if len(args) > position else kwargs[name]

        if func is F.scaled_dot_product_attention:
            self.calls += 1
            query = argument("query", 0)
            value = argument("value", 2)
            if query.shape[-1] == value.shape[-1]:
                return query
            return query[..., :1].expand(*query.shape[:-1], value.shape[-1])

        if func is F.multi_head_attention_forward:
            self.calls += 1
            weight = argument("out_proj_weight", 11)
            bias = argument("out_proj_bias", 12)
            return F.linear(argument("query", 0), weight, bias), None

        if func in (torch.softmax, torch.Tensor.softmax, F.softmax):
            scores = argument("input", 0)
            if scores.ndim > 2:
                self.calls += 1
                queries, keys = scores.shape[-2:]
                if queries == keys:
                    identity = torch.eye(keys, dtype=scores.dtype, device=scores.device)
                    return identity.expand_as(scores)
        return func(*args, **kwargs)


@contextmanager
def bare(root: nn.Module) -> Iterator[None]:
    """Take all hooks off the module and those inside it while the context lasts.

    The user's own hooks see nothing of runs that only find something out.
    """
    saved = []
    for module in root.modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            saved.append((module, kind, getattr(module, kind)))
    try:
        for module, kind, hooks in saved:
            setattr(module, kind, type(hooks)())
        yield
    finally:
        for module, kind, hooks in saved:
            setattr(module, kind, hooks)
