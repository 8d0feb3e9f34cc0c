"""The words of a prompt: which it has, and where it can be cut.

Texts are compared in one form (Unicode's NFC, without case), so that an accent counts as a part of
its letter however it was typed. Scripts without spaces between words (Thai, Lao, Khmer, Burmese,
Chinese, Japanese) have a word wherever it stands.
"""

import re
import unicodedata
from functools import cache

UNSPACED = (  # ranges of a character class
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"  # Thai, Lao, Burmese, Khmer, Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese
)


@cache
def marks() -> str:
    """The ranges of a character class of what belongs to the letter before it: accents, vowel
    signs, joiners."""
    found = (code for code in range(0x300, 0x20000) if unicodedata.category(chr(code))[0] == "M")
    return "".join(re.escape(chr(code)) for code in found) + "\u200c\u200d"


@cache
def patterns() -> tuple[re.Pattern, re.Pattern, re.Pattern]:
    """A letter, digit, underscore or mark; a letter of a script without spaces; a word, with
    apostrophes and hyphens in it."""
    letter = rf"[\w{marks()}]"
    return (
        re.compile(letter),
        re.compile(f"[{UNSPACED}]"),
        re.compile(rf"{letter}[\w{marks()}'’-]*"),
    )


def has_word(text: str, word: str) -> bool:
    """Whether a text has a word, or several in a row: not as a part of a longer word, but where
    words are not set apart."""
    text, word = (
        " ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in (text, word)
    )
    at = text.find(word)
    while word and at >= 0:
        before, after = text[:at][-1:], text[at + len(word) :][:1]
        if not (is_one_word(before, word[0]) or is_one_word(word[-1], after)):
            return True
        at = text.find(word, at + 1)
    return not word


def is_one_word(left: str, right: str) -> bool:
    """Whether two neighbouring characters, "" at an end of the text, belong to one word."""
    letter, unspaced, _ = patterns()
    if not (letter.match(left) and letter.match(right)):
        return False
    is_mark = unicodedata.category(right)[0] == "M"
    return is_mark or not (unspaced.match(left) or unspaced.match(right))


def words_of(text: str) -> list[str]:
    """All words of a text in lower case; of a script without spaces, what stands between spaces and
    punctuation."""
    return patterns()[2].findall(unicodedata.normalize("NFC", text.lower()))


def word_ends(text: str) -> list[int]:
    """Where a text can be cut without cutting a word in two, in order: its end among them, unless
    it is empty."""
    return [
        i
        for i in range(1, len(text) + 1)
        if not text[i - 1].isspace() and not is_one_word(text[i - 1], text[i : i + 1])
    ]
