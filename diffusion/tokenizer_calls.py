"""What of a prompt the model sees: a tokenizer cuts a text that is longer than its text encoder
takes.

    with watch_tokenizers(hooked.pipe) as calls:
        hooked.first_step(...)                    # or anything else in which the pipeline encodes prompts
    seen = SeenText(calls, prompts)               # prompts: those that were encoded
    seen.text("a long prompt ...")                # as far as any of the text encoders receives it

How a pipeline calls its tokenizers, with which template and up to which length, is seen from the
calls themselves. Where none was seen, as with a denoiser of one's own, a prompt counts as seen
whole.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import NamedTuple

from store.words import is_one_word, word_ends


class TokenizerCall(NamedTuple):
    """One call of a tokenizer."""

    tokenizer: object
    text: object
    """A string, or a list of them."""

    options: dict


class Encoding(NamedTuple):
    """How a pipeline gives prompts to one of its tokenizers."""

    tokenizer: object
    before: str
    """What stands before the prompt, such as the first part of a chat template."""

    after: str
    is_lowered: bool
    """Whether the pipeline strips the prompt and writes it in lower case."""

    limit: int | None
    """Tokens at most; None where the tokenizer does not cut."""

    def end(self, prompt: str) -> int:
        """How many characters of a prompt, in whole words, fit in."""
        if self.limit is None or self.count(prompt) <= self.limit:
            return len(prompt)
        ends = word_ends(prompt)
        fitting = bisect_right(ends, self.limit, key=lambda end: self.count(prompt[:end]))
        return ends[fitting - 1] if fitting else 0

    def count(self, prompt: str) -> int:
        """Tokens up to the end of the prompt, the special ones included."""
        return len(
            self.tokenizer(f"{self.before}{self.prepared(prompt)}", verbose=False)["input_ids"]
        )

    def prepared(self, prompt: str) -> str:
        return prompt.strip().lower() if self.is_lowered else prompt


@contextmanager
def watch_tokenizers(pipe: object) -> Iterator[list[TokenizerCall]]:
    """Keep the calls of all tokenizers among a pipeline's components, and in its processors, while
    the context lasts."""
    components = getattr(pipe, "components", {}).values()
    candidates = [
        part
        for component in components
        for part in (component, getattr(component, "tokenizer", None))
    ]
    classes = {
        type(part) for part in candidates if callable(part) and hasattr(part, "model_max_length")
    }
    calls = []
    with ExitStack() as stack:
        for cls in classes:
            stack.enter_context(keep_calls(cls, calls))
        yield calls


@contextmanager
def keep_calls(cls: type, calls: list[TokenizerCall]) -> Iterator[None]:
    """Add the calls of a class's instances to the list; python looks up `__call__` in the class
    alone."""
    original, is_own = cls.__call__, "__call__" in vars(cls)

    @wraps(original)
    def call(self, *args, **kwargs):
        text = args[0] if args else kwargs.get("text")
        calls.append(TokenizerCall(self, text, kwargs))
        return original(self, *args, **kwargs)

    cls.__call__ = call
    try:
        yield
    finally:
        if is_own:
            cls.__call__ = original
        else:
            del cls.__call__


class SeenText:
    """What a pipeline's text encoders receive of any prompt, learnt from the calls in which it
    encoded some prompts."""

    def __init__(self, calls: list[TokenizerCall], prompts: list[str]) -> None:
        found = []
        for call in calls:
            texts = [call.text] if isinstance(call.text, str) else call.text
            for text in texts if isinstance(texts, (list, tuple)) else []:
                encoding = find_encoding(call, text, prompts) if isinstance(text, str) else None
                if encoding is not None and encoding not in found:
                    found.append(encoding)
        # many pipelines also tokenize without a limit, to warn of what is cut
        cutting = {id(encoding.tokenizer) for encoding in found if encoding.limit is not None}
        self.encodings = [e for e in found if e.limit is not None or id(e.tokenizer) not in cutting]

    def text(self, prompt: str) -> str:
        """The prompt as far as the text encoder with the most room receives it, in whole words."""
        if not self.encodings:
            return prompt
        return prompt[: max(encoding.end(prompt) for encoding in self.encodings)]


def find_encoding(call: TokenizerCall, text: str, prompts: list[str]) -> Encoding | None:
    """How the text of a call was made of one of the prompts; None if it was made of something
    else."""
    is_cut = call.options.get("truncation") not in (None, False, "do_not_truncate")
    limit = call.options.get("max_length") or call.tokenizer.model_max_length
    limit = (
        limit if is_cut and getattr(call.tokenizer, "truncation_side", "right") == "right" else None
    )
    for is_lowered in (False, True):
        for prompt in sorted(set(prompts), key=len, reverse=True):  # one may be a part of another
            prepared = prompt.strip().lower() if is_lowered else prompt
            start = find_words(text, prepared) if prepared.strip() else None
            if start is not None:
                before, after = text[:start], text[start + len(prepared) :]
                return Encoding(call.tokenizer, before, after, is_lowered, limit)
    return None


def find_words(text: str, part: str) -> int | None:
    """Where a part begins in a text without cutting a word of it in two; None if it does not stand
    there so."""
    start = text.find(part)
    while start >= 0:
        end = start + len(part)
        cuts_before = is_one_word(text[max(start - 1, 0) : start], part[0])
        cuts_after = is_one_word(part[-1], text[end : end + 1])
        if not (cuts_before or cuts_after):
            return start
        start = text.find(part, start + 1)
    return None
