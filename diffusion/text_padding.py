"""Which tokens of a text stream are words, and which are padding that fills up a prompt.

A tokenizer pads each prompt to one length, and many models attend to the padding. No mask among the
denoiser's arguments tells it then. So the pipeline is begun once more, up to the denoiser, and what
the text encoders return at real tokens is NaN. Each later operation on a token keeps the NaN, so
the denoiser's text embeddings are NaN where a real token went, wherever the pipeline puts it.

    real = find_real_tokens(model, prompts, options, plan, {"cond"})
    real.masks["cond"]                   # one bool (T,) for each row
    tokens, lengths = real.leave_out(tokens, lengths, "cond")

For the prompt "a star" in a pipeline that joins the 77 tokens of one text encoder and the 256 of
another, the first has 4 real tokens (a start, two words, an end) and the second 3. The mask of its
row is True at the tokens 0 to 3 and 77 to 79. Tokens that no text encoder made, as those of a
missing text encoder, are padding too.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.dry_step import DryStep
from diffusion.forward import Forward
from diffusion.guidance import Pattern, Roles
from diffusion.signatures import Prompt, tensors
from diffusion.tokenizer_calls import TokenizerCall, watch_tokenizers
from diffusion.trace import DryRunOver


class EncoderCall(NamedTuple):
    """One call of a text encoder, with what a tokenizer returned."""

    tokenizer_call: TokenizerCall

    real: Tensor
    """bool (prompts, T): which tokens the tokenizer did not add to fill up a prompt."""


ChooseTokens = Callable[[int, EncoderCall], Tensor]
"""choose(number of the call, call) -> bool (prompts, T): the tokens that are followed."""


class RealTokens(NamedTuple):
    """Which tokens of the text embeddings are no padding, for the rows of one generation."""

    masks: dict[str, list[Tensor]]
    """{role: for each row bool (T,), on the CPU}. Only roles of which it is known."""

    reason: str
    """Why it is not known; "" if it is."""

    is_padded: bool = False
    """Whether a tokenizer has padded a prompt."""

    @property
    def why_not(self) -> str:
        """Why the padding of a module can't be told, where `mask` returns None."""
        return self.reason or "its text tokens are not those of the text embeddings, one to one"

    def mask(self, role: str, counts: list[int]) -> list[Tensor] | None:
        """Return for each row of a role which of its text tokens in a module are real: bool
        (count,).

        counts: the number of text tokens of each row in the module. A model may have cut the end of
        the text embeddings, if there is only padding. None if it is not known, or if the module
        has other tokens than the text embeddings.
        """
        masks = self.masks.get(role)
        if masks is None or len(masks) != len(counts):
            return None
        cut = []
        for mask, count in zip(masks, counts):
            if count > len(mask) or mask[count:].any():
                return None
            cut.append(mask[:count])
        return cut


@torch.no_grad()
def without_padding(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Return the real tokens of each row one after another, (R, n, d), padded with zeros.

    x: (R, T, d). masks: for each row bool (T or fewer,). n: the largest number of real tokens.
    """
    lengths = [int(mask.sum()) for mask in masks]
    out = x.new_zeros(len(x), max(lengths), x.shape[-1])
    for row, mask, length, target in zip(x, masks, lengths, out):
        where = mask.nonzero()[:, 0].to(x.device)  # a mask on the GPU would make it wait
        target[:length] = row[where]
    return out


def with_padding(new: Tensor, x: Tensor, masks: list[Tensor]) -> Tensor:
    """Return a copy of x (R, T, d) with new real tokens: the inverse of `without_padding`.

    new: (R, n, d).
    """
    out = x.clone()
    for row, mask, tokens in zip(out, masks, new):
        where = mask.nonzero()[:, 0].to(x.device)
        row[where] = tokens[: len(where)].to(x)
    return out


def find_real_tokens(
    model: Any,
    prompt: Prompt,
    options: dict,
    plan: dict[Pattern, Roles],
    roles: set[str],
    choose: ChooseTokens | None = None,
) -> RealTokens:
    """Return which tokens of the text embeddings are real, in a generation of these prompts.

    The pipeline runs up to the denoiser's first forward of the last of the `roles` (cond, uncond),
    and everything is put back. plan: the roles in each kind of step, see `guidance`. choose: the
    tokens to follow; if None, all real ones.
    """
    watch = TextWatch(roles)
    dry_step = DryStep(
        model,
        prompt,
        options,
        denoisers=None,
        on_forward=watch.on_forward,
        on_step=watch.on_step,
        plan=plan,
        must_repeat=False,
    )
    with follow_tokens(model, choose or (lambda _, call: call.real)) as calls:
        dry_step.run()
    if not calls:
        return RealTokens({}, "no text encoder was called with what a tokenizer returned")
    is_padded = not all(call.real.all() for call in calls)
    if watch.reason:
        return RealTokens({}, watch.reason, is_padded)
    if choose is not None:
        return RealTokens(watch.masks, "", is_padded)
    if are_mixed(watch.masks, calls):
        reason = "what the text encoders return is mixed before the denoiser gets it"
        return RealTokens({}, reason, is_padded)
    # without a negative prompt, some pipelines take zeros: such rows have no words and no padding
    masks = {}
    for role, masks_of_rows in watch.masks.items():
        if any(mask.any() for mask in masks_of_rows):
            masks[role] = masks_of_rows
    return RealTokens(masks, "", is_padded)


def are_mixed(masks: dict[str, list[Tensor]], calls: list[EncoderCall]) -> bool:
    """Return whether a row has more NaN tokens than all encoders together have real ones."""
    most = sum(int(call.real.sum(1).max()) for call in calls)
    counts = [int(mask.sum()) for masks_of_rows in masks.values() for mask in masks_of_rows]
    return max(counts, default=0) > most


class TextWatch:
    """Reads, from the forwards of a first step, which tokens of the text embeddings are NaN."""

    def __init__(self, roles: set[str]):
        self.roles = roles
        self.masks: dict[str, list[Tensor]] = {}  # [] for a role without any NaN
        self.reason = "the passes of the guidance can't be told before they run"

    def on_forward(self, forward: Forward, module: nn.Module) -> None:
        """Keep the masks of a forward's rows; stop if all roles have run."""
        masks = nan_tokens(forward) or []
        R = forward.rows // max(1, len(forward.roles))
        for chunk, role in enumerate(forward.roles):
            self.masks.setdefault(role, masks[chunk * R : (chunk + 1) * R])
        if self.roles <= self.masks.keys():
            self.reason = ""
            if not any(self.masks.values()):
                self.reason = "no text embeddings reach the denoiser token by token"
            raise DryRunOver

    def on_step(self, step: Any) -> None:
        """Stop after the first step."""
        raise DryRunOver


def nan_tokens(forward: Forward) -> list[Tensor] | None:
    """Return for each row of a forward which tokens of its text embeddings are NaN, bool (T,).

    Text embeddings are a tensor (rows, T, d), or a list with one (T, d) for each row. None if there
    are none with NaN, or if several differ in where it is.
    """
    found = []
    for entry in forward.conditioning:
        rows = list(entry)
        if not all(torch.is_tensor(x) and x.is_floating_point() and x.ndim == 2 for x in rows):
            continue
        masks = [x.isnan().any(-1).cpu() for x in rows]
        if any(mask.any() for mask in masks):
            found.append(masks)
    if not found:
        return None
    for masks in found[1:]:
        for first, other in zip(found[0], masks):
            if not torch.equal(first, other):
                return None
    return found[0]


# ------------------------------------------------------------------------ what the encoders return


@contextmanager
def follow_tokens(model: Any, choose: ChooseTokens) -> Iterator[list[EncoderCall]]:
    """Context in which the text encoders return NaN at chosen tokens; yields their calls."""
    calls = []
    with ExitStack() as stack:
        tokenizer_calls = stack.enter_context(watch_tokenizers(model.pipe))
        for component in encoders_of(model):
            TaggedEncoder(component, tokenizer_calls, calls, choose).listen(stack)
        yield calls


def encoders_of(model: Any) -> list[nn.Module]:
    """Return the networks of the pipeline that may be text encoders: all but the denoisers."""
    denoisers = list(model.denoisers.values())
    encoders = []
    for component in getattr(model.pipe, "components", {}).values():
        is_network = isinstance(component, nn.Module)
        if is_network and not any(component is denoiser for denoiser in denoisers):
            encoders.append(component)
    return encoders


class TaggedEncoder:
    """The hooks on one text encoder."""

    def __init__(
        self,
        component: nn.Module,
        tokenizer_calls: list[TokenizerCall],
        calls: list[EncoderCall],
        choose: ChooseTokens,
    ):
        self.component = component
        self.tokenizer_calls = tokenizer_calls
        self.calls = calls
        self.choose = choose
        self.running: list[nn.Module] = []  # modules that got token numbers; the outermost counts

    def listen(self, stack: ExitStack) -> None:
        """Register the hooks on the encoder, and on its parts, which a pipeline may call alone."""
        for module in (self.component, *self.component.children()):
            for handle in (
                module.register_forward_pre_hook(self.before, with_kwargs=True),
                module.register_forward_hook(self.after, with_kwargs=True),
            ):
                stack.callback(handle.remove)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if encoder_call(self.tokenizer_calls, (args, kwargs)) is not None:
            self.running.append(module)

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not self.running or self.running[-1] is not module:
            return
        self.running.pop()
        if self.running:
            return
        call = encoder_call(self.tokenizer_calls, (args, kwargs))
        self.calls.append(call)
        chosen = self.choose(len(self.calls) - 1, call)
        for x in tensors(output):
            if x.is_floating_point() and x.ndim > 2 and x.shape[:2] == chosen.shape:
                x[chosen.to(x.device)] = torch.nan


def encoder_call(tokenizer_calls: list[TokenizerCall], taken: Any) -> EncoderCall | None:
    """Return the call of a module that took what a tokenizer returned; None if it did not.

    A pipeline may cut off the end of the token numbers before.
    """
    numbers = [x for x in tensors(taken) if x.ndim == 2 and not x.is_floating_point()]
    if not numbers:
        return None
    ids = numbers[0].cpu()
    for call in reversed(tokenizer_calls):
        theirs = call.tensor("input_ids")
        if theirs is None or theirs.shape[0] != len(ids) or theirs.shape[1] < ids.shape[1]:
            continue
        if torch.equal(theirs[:, : ids.shape[1]], ids):
            mask = call.tensor("attention_mask")
            if mask is not None:
                return EncoderCall(call, mask[:, : ids.shape[1]].bool())
    return None
