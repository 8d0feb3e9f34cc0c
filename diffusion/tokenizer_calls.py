"""What the model sees of a prompt: a tokenizer cuts a text that is too long for its text encoder.

    with watch_tokenizers(model.pipe) as calls:
        model.first_step(...)                     # or anything else that makes the pipeline encode
    seen = SeenText(calls, prompts)               # the prompts that were encoded
    seen.text("a long prompt ...")                # as far as any of the text encoders receives it

How a pipeline calls its tokenizers, with which template and up to which length, is seen from the
calls themselves. Where no call was seen, as with a denoiser of one's own, a prompt counts as seen
whole.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from store.words import is_one_word, word_ends


class TokenizerCall(NamedTuple):
    """One call of a tokenizer."""

    tokenizer: Any
    text: Any
    """A text or a list of texts; other things that a tokenizer takes are passed over later."""

    options: dict
    """The keyword arguments."""

    result: Any
    """What the tokenizer returned: token numbers and masks by name."""

    def tensor(self, name: str) -> Tensor | None:
        """Return an entry of the result, such as "input_ids", as a tensor (texts, T), on the CPU.

        None without such an entry, and if the texts have different numbers of tokens.
        """
        try:
            values = torch.as_tensor(self.result[name]).cpu()
        except (KeyError, TypeError, ValueError):
            return None
        return values if values.ndim == 2 else None


class Encoding(NamedTuple):
    """How a pipeline gives prompts to one of its tokenizers."""

    tokenizer: Any

    before: str
    """What stands before the prompt, such as the first part of a chat template."""

    after: str
    """What stands after it."""

    is_lowered: bool
    """Whether the pipeline strips the prompt and writes it in lower case."""

    limit: int | None
    """The largest number of tokens. None where the tokenizer does not cut."""

    def end(self, prompt: str) -> int:
        """Return how many characters of a prompt fit in, in whole words.

        For "a red star" and room for two words it gives 5.
        """
        if self.limit is None or self.count(prompt) <= self.limit:
            return len(prompt)
        ends = word_ends(prompt)
        num_fitting = bisect_right(ends, self.limit, key=lambda end: self.count(prompt[:end]))
        return ends[num_fitting - 1] if num_fitting else 0

    def count(self, prompt: str) -> int:
        """Return how many tokens there are up to the end of the prompt, special ones included."""
        text = self.before + self.prepared(prompt)
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def prepared(self, prompt: str) -> str:
        """Return the prompt as the pipeline writes it into the text."""
        return prompt.strip().lower() if self.is_lowered else prompt


@contextmanager
def watch_tokenizers(pipe: Any) -> Iterator[list[TokenizerCall]]:
    """Context that yields a list, to which each call of a tokenizer of the pipeline is added.

    Tokenizers are among the pipeline's components, and inside its processors.
    """
    classes = set()
    for component in getattr(pipe, "components", {}).values():
        for candidate in (component, getattr(component, "tokenizer", None)):
            if callable(candidate) and hasattr(candidate, "model_max_length"):
                classes.add(type(candidate))
    calls = []
    with ExitStack() as stack:
        for cls in classes:
            stack.enter_context(keep_calls(cls, calls))
        yield calls


@contextmanager
def keep_calls(cls: type, calls: list[TokenizerCall]) -> Iterator[None]:
    """Context in which each call of an instance of a class is added to `calls`.

    The class is changed, since Python looks `__call__` up in the class alone.
    """
    original = cls.__call__
    is_inherited = "__call__" not in vars(cls)

    @wraps(original)
    def call(self, *args, **kwargs):
        text = args[0] if args else kwargs.get("text")
        result = original(self, *args, **kwargs)
        calls.append(TokenizerCall(self, text, kwargs, result))
        return result

    cls.__call__ = call
    try:
        yield
    finally:
        if is_inherited:
            del cls.__call__
        else:
            cls.__call__ = original


class SeenText:
    """What a pipeline's text encoders receive of any prompt.

    calls: those in which the pipeline encoded some prompts. prompts: those prompts.
    """

    def __init__(self, calls: list[TokenizerCall], prompts: list[str]) -> None:
        encodings = []
        for call in calls:
            for text in texts_of(call):
                encoding = find_encoding(call, text, prompts)
                if encoding is not None and encoding not in encodings:
                    encodings.append(encoding)
        # many pipelines also tokenize without a limit, to warn of what is cut
        cutting = {id(encoding.tokenizer) for encoding in encodings if encoding.limit is not None}
        self.encodings = []
        for encoding in encodings:
            if encoding.limit is not None or id(encoding.tokenizer) not in cutting:
                self.encodings.append(encoding)

    def text(self, prompt: str) -> str:
        """Return the prompt as far as the text encoder with the most room receives it.

        It is cut between words.
        """
        if not self.encodings:
            return prompt
        return prompt[: max(encoding.end(prompt) for encoding in self.encodings)]

    def counts(self, prompt: str) -> list[int]:
        """Return how many tokens of a prompt each text encoder gets, without padding."""
        counts = []
        for encoding in self.encodings:
            count = encoding.count(prompt)
            counts.append(count if encoding.limit is None else min(count, encoding.limit))
        return counts


def texts_of(call: TokenizerCall) -> list[str]:
    """Return the texts that a tokenizer was called with."""
    if isinstance(call.text, str):
        return [call.text]
    if isinstance(call.text, (list, tuple)):
        return [text for text in call.text if isinstance(text, str)]
    return []


def find_encoding(call: TokenizerCall, text: str, prompts: list[str]) -> Encoding | None:
    """Return how the text of a call was made from one of the prompts.

    None if it was made from something else.
    """
    limit = limit_of(call)
    for is_lowered in (False, True):
        for prompt in sorted(set(prompts), key=len, reverse=True):  # one may be a part of another
            prepared = prompt.strip().lower() if is_lowered else prompt
            start = find_words(text, prepared) if prepared.strip() else None
            if start is not None:
                before = text[:start]
                after = text[start + len(prepared) :]
                return Encoding(call.tokenizer, before, after, is_lowered, limit)
    return None


def limit_of(call: TokenizerCall) -> int | None:
    """Return after how many tokens a call cuts the end of its text; None where it does not."""
    cuts = call.options.get("truncation") not in (None, False, "do_not_truncate")
    cuts_the_end = getattr(call.tokenizer, "truncation_side", "right") == "right"
    if not cuts or not cuts_the_end:
        return None
    return call.options.get("max_length") or call.tokenizer.model_max_length


def find_words(text: str, part: str) -> int | None:
    """Return where a part begins in a text, without cutting a word in two; None if nowhere.

    For "a redder red star" and "red" it gives 9.
    """
    start = text.find(part)
    while start >= 0:
        end = start + len(part)
        cuts_before = is_one_word(text[max(start - 1, 0) : start], part[0])
        cuts_after = is_one_word(part[-1], text[end : end + 1])
        if not (cuts_before or cuts_after):
            return start
        start = text.find(part, start + 1)
    return None
