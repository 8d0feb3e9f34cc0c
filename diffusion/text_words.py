"""The words of a text stream: which piece of its prompt each real token stands for.

    parts = find_parts(model, prompts, options, plan)
    pieces = words_of_prompt(parts, "a red star")
    # {"tokenizer": ["<|startoftext|>", "a ", "red ", "star ", "<|endoftext|>"]}

A pipeline may join the tokens of several text encoders, and may drop the first ones, which belong
to a template. So each call of a text encoder is followed through the pipeline by itself, see
text_padding.py. A `TextPart` says which tokenizer made a part of the real tokens, and how many it
made that the denoiser does not get.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.guidance import Pattern, Roles
from diffusion.text_padding import ChooseTokens, EncoderCall, RealTokens, find_real_tokens
from diffusion.tokenizer_calls import Encoding, find_encoding, texts_of

CUTTING = ("truncation", "max_length", "add_special_tokens")
"""Options of a tokenizer that decide which tokens a prompt has, beside padding."""


class TextPart(NamedTuple):
    """Real tokens of a prompt that come from one text encoder, in their order."""

    tokenizer_name: str
    """The name of the pipeline's component."""

    encoding: Encoding
    """How the pipeline gives prompts to the tokenizer."""

    options: dict
    """Those of CUTTING with which it calls the tokenizer."""

    num_dropped_first: int
    """This many real tokens at the beginning do not reach the denoiser."""

    num_dropped_last: int

    def ids(self, prompt: str) -> list[int]:
        """Return the numbers of the tokens that the denoiser gets."""
        encoding = self.encoding
        text = encoding.before + encoding.prepared(prompt) + encoding.after
        ids = list(encoding.tokenizer(text, verbose=False, **self.options)["input_ids"])
        return ids[self.num_dropped_first : len(ids) - self.num_dropped_last]

    def pieces(self, prompt: str) -> list[str]:
        """Return the text of each token, with the spaces that belong to it.

        It is what the token adds to the decoded text, so the pieces together are that text.
        """
        tokenizer = self.encoding.tokenizer
        ids = self.ids(prompt)
        pieces = []
        before = ""
        for end in range(1, len(ids) + 1):
            text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
            piece = (
                text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[end - 1])
            )
            pieces.append(piece)
            before = text
        return pieces


def words_of_prompt(parts: list[TextPart], prompt: str) -> dict[str, list[str]]:
    """Return the pieces of a prompt by tokenizer, in the order of the text stream."""
    return {part.tokenizer_name: part.pieces(prompt) for part in parts}


def find_parts(
    model: Any, prompts: list[str], options: dict, plan: dict[Pattern, Roles]
) -> list[TextPart] | None:
    """Return the parts of the real text tokens of conditional rows, in their order.

    plan: see `text_padding.find_real_tokens`. None if what reaches the denoiser does not fit what
    the tokenizers made, token by token.
    """
    calls: list[EncoderCall] = []

    def keep(number: int, call: EncoderCall) -> Tensor:
        calls.append(call)
        return call.real

    def follow(choose: ChooseTokens | None) -> RealTokens:
        return find_real_tokens(model, prompts, options, plan, {"cond"}, choose)

    real = follow(keep).masks.get("cond")
    if real is None:
        return None
    found = []  # (first token in the first row, masks, TextPart)
    for number, call in enumerate(list(calls)):
        masks = follow(only(number, lambda mask: mask)).masks.get("cond")
        if masks is None or not any(mask.any() for mask in masks):
            continue
        if any(same_masks(masks, others) for _, others, _ in found):
            continue  # two encoders whose tokens are joined in their width
        part = part_of(model, prompts, number, call, masks, follow)
        if part is None:
            return None
        found.append((int(masks[0].int().argmax()), masks, part))
    found.sort(key=lambda entry: entry[0])

    for row, mask in enumerate(real):
        positions = []
        for _, masks, _ in found:
            positions += masks[row].nonzero()[:, 0].tolist()
        if positions != mask.nonzero()[:, 0].tolist():
            return None
    return [part for _, _, part in found]


def only(number: int, change: Callable[[Tensor], Tensor]) -> ChooseTokens:
    """Return a choice of tokens of the call with this number alone: change(real tokens)."""

    def choose(other: int, call: EncoderCall) -> Tensor:
        return change(call.real) if other == number else torch.zeros_like(call.real)

    return choose


def part_of(
    model: Any,
    prompts: list[str],
    number: int,
    call: EncoderCall,
    masks: list[Tensor],
    follow: Callable[[ChooseTokens], RealTokens],
) -> TextPart | None:
    """Return the TextPart of one call of a text encoder; None if it can't be told.

    masks: for each row the tokens of the text embeddings that come from the call. There may be
    several images, so several rows, of a prompt.
    """
    if len(call.real) != len(prompts) or len(masks) % len(prompts):
        return None
    num_images = len(masks) // len(prompts)
    num_dropped = set()
    for row, mask in enumerate(masks):
        num_dropped.add(int(call.real[row // num_images].sum() - mask.sum()))
    if len(num_dropped) > 1 or min(num_dropped) < 0:
        return None

    count = num_dropped.pop()
    dropped_first = 0
    if count:
        ends = follow(only(number, lambda real: real & (real.int().cumsum(1) <= count)))
        if not any(mask.any() for mask in ends.masks.get("cond", [])):
            dropped_first = count

    for text in texts_of(call.tokenizer_call):
        encoding = find_encoding(call.tokenizer_call, text, prompts)
        if encoding is not None:
            options = {}
            for name in CUTTING:
                if name in call.tokenizer_call.options:
                    options[name] = call.tokenizer_call.options[name]
            name = tokenizer_name(model.pipe, encoding.tokenizer)
            return TextPart(name, encoding, options, dropped_first, count - dropped_first)
    return None


def tokenizer_name(pipe: Any, tokenizer: Any) -> str:
    """Return the name of the pipeline's component that is, or has, this tokenizer."""
    for name, component in pipe.components.items():
        if tokenizer in (component, getattr(component, "tokenizer", None)):
            return name
    return type(tokenizer).__name__


def same_masks(masks: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(mask, other) for mask, other in zip(masks, others))
