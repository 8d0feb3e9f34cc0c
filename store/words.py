"""The words of a prompt: which words it has, and where it can be cut.

    >>> has_word("a Star, red", "star"), has_word("a starry night", "star")
    (True, False)
    >>> has_word("숲 속의 여우가", "여우"), has_word("صورة الثعلب", "ثعلب")
    (True, True)
    >>> words_of("a red-hot Star, don't")
    ['a', 'red-hot', 'star', "don't"]

Texts are compared in one form, `compared_form`: without case and invisible characters, and with an
accent as a part of its letter however it was typed. A text has each of its words. It also has the
words inside a compound: "red-hot", "red_hair" and "fox's" have "hot", "hair" and "fox".

Some scripts put no spaces between words (Thai, Lao, Khmer, Burmese, Chinese, Japanese): in these, a
text has a word wherever the word stands in it. Korean attaches particles to the end of a word, and
Arabic attaches the article and short prepositions to its start: a text has a word also where it
stands with these.
"""

import re
import unicodedata
from functools import cache

# ranges of a character class: Thai, Lao, Burmese, Khmer, Japanese; then Chinese
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)

# Nobody sees these in a prompt, and they hide a word that is copied from a web page: the soft
# hyphen, white space without a width, joiners, and marks of the direction of writing.
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")

# Arabic and Hebrew vowel signs and the Arabic lengthening line, which most texts leave out. The
# signs that make another letter of an Arabic one (U+0653 to U+0655) are not among them.
OPTIONAL_SIGNS = re.compile(
    "[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"  # Hebrew
    "\u0610-\u061a\u0640\u064b-\u0652\u0656-\u065f\u0670]"  # Arabic
)

# Typographic apostrophes and hyphens count as the plain ones. NFKC makes U+2010 of U+2011.
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u2010": "-"})

# "don't" has no words inside it. Other apostrophes stand between two words, or between a word and
# what is shortened: "fox's" has "fox", and "l'étoile" has "étoile".
REST_OF_NOT = re.compile(r"'t\b")
# "C++" and "C#" are names. After a longer word, "++" is a weight: "a red++ star".
SIGNS_OF_NAME = ("++", "#")

# Korean chooses between some particles by the syllable before them. Knowing this keeps "사과" (an
# apple) from being "사" with the particle "과".
PARTICLES_AFTER_CONSONANT = "은 이 을 과 으로 이나 이랑 이라 이며 이다 입니다 이에요 아".split()
PARTICLES_AFTER_VOWEL = "는 가 를 와 로 나 랑 라 며 다 입니다 예요 야".split()
PARTICLES = (
    "들 의 에 에서 에게 에게서 한테 께 께서 도 만 까지 부터 마다 조차 마저 밖에 처럼 같이 보다 "
    "하고 로서 로써 으로서 으로써 뿐 만큼"
).split()

ARTICLE = "ال"
# "and" or "so", then "with" or "like", then the article, which becomes "لل" after the preposition
# "ل"
ARABIC_PREFIX_WITH_ARTICLE = re.compile("[وف]?(?:[بك]?ال|لل)")
# Without the article, one letter can as well be the first letter of another word: "فقط" (only) is
# not "ف" and "قط" (a cat). Arabic roots have three letters, so shorter words take "and" alone.
ARABIC_PREFIX = re.compile("و?[بكل]?")
SHORTEST_ARABIC_ROOT = 3


@cache
def marks() -> str:
    """Return the ranges of a character class of what belongs to the letter before it.

    These are accents, vowel signs and joiners: Unicode's categories M*, and U+200C and U+200D.
    """
    found = []
    for code in range(0x300, 0x20000):
        if is_mark(chr(code)):
            found.append(re.escape(chr(code)))
    return "".join(found) + "\u200c\u200d"


def is_mark(character: str) -> bool:
    """Return whether a character changes the letter before it: an accent or a vowel sign."""
    return unicodedata.category(character)[0] == "M"


@cache
def letter_pattern() -> re.Pattern:
    """Return the pattern of one character of a word: a letter, digit, underscore or mark."""
    return re.compile(rf"[\w{marks()}]")


@cache
def unspaced_pattern() -> re.Pattern:
    """Return the pattern of one letter of a script that has no spaces between words."""
    return re.compile(f"[{UNSPACED}]")


@cache
def word_pattern() -> re.Pattern:
    """Return the pattern of a word, with the apostrophes and hyphens inside it.

    For "C++" or "C#", it is the letter with these signs.
    """
    letter = rf"[\w{marks()}]"
    name_with_sign = r"(?<![\w'-])[a-z](?:\+\+|#)(?![^\W_])"
    return re.compile(rf"{name_with_sign}|{letter}+(?:['-]+{letter}+)*")


@cache
def other_numbers_pattern() -> re.Pattern:
    """Return the pattern of a number that is no digit, such as "½", "²" or "①", as a group."""
    numbers = []
    for code in range(0x80, 0x20000):
        if unicodedata.category(chr(code)) == "No":
            numbers.append(chr(code))
    return re.compile(f"([{''.join(numbers)}])")


def compared_form(text: str) -> str:
    """Return a text as texts are compared.

    That is NFKC without case, without invisible characters and optional vowel signs, with plain
    apostrophes and hyphens, and with single spaces. Numbers that are no digits stay as they are:
    NFKC alone makes "1" of "①", and "1⁄2" of "½".

    >>> compared_form(" A  Fox’s ½")
    "a fox's ½"
    """
    if text.isascii():  # the same as below, in 1 microsecond per prompt instead of 80
        return " ".join(text.casefold().split())

    pieces = []
    for piece in other_numbers_pattern().split(INVISIBLE.sub("", text)):
        if not other_numbers_pattern().fullmatch(piece):
            piece = unicodedata.normalize("NFKC", piece)
        pieces.append(piece)
    text = "".join(pieces).translate(PLAIN)
    text = OPTIONAL_SIGNS.sub("", text)
    # The small letter of the Turkish "İ" is "i"; `casefold` adds a dot above to it.
    text = text.casefold().replace("i\u0307", "i")
    return " ".join(unicodedata.normalize("NFC", text).split())


def has_word(text: str, word: str) -> bool:
    """Return whether a text has a word, or several words in a row.

    A part of a longer word does not count ("star" in "starry", "don" in "don't", "C" in "C++"),
    except in a script without spaces, and except that Korean particles and Arabic articles and
    prepositions may be attached. An inflected word is another word ("stars"). An underscore counts
    as a space: "red_hair" has "red hair". Every text has the empty word.
    """
    text = compared_form(text).replace("_", " ")
    word = compared_form(word).replace("_", " ").strip()
    if not word:
        return True

    if stands_in(text, word):
        return True
    # the preposition "ل" changes the article after it: "الثعلب" becomes "للثعلب"
    return word.startswith(ARTICLE) and stands_in(text, "لل" + word.removeprefix(ARTICLE))


def stands_in(text: str, word: str) -> bool:
    """Return whether a word, or several in a row, stands in a text on its own, and not within
    another word.

    Both are in the form that `compared_form` returns.
    """
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        if starts_word(text, start, word) and ends_word(text, end, word):
            return True
        start = text.find(word, start + 1)
    return False


def starts_word(text: str, start: int, word: str) -> bool:
    """Return whether nothing stands before text[start:] in the same word, or only an Arabic
    prefix."""
    if text[:start].endswith("n'") and REST_OF_NOT.match(text, start - 1):
        return False
    if not is_one_word(text[:start][-1:], word[0]):
        return True
    if not unicodedata.name(word[0], "").startswith("ARABIC"):
        return False

    first = start
    while first > 0 and letter_pattern().match(text[first - 1]):
        first -= 1
    prefix = without_marks(text[first:start])
    if ARABIC_PREFIX_WITH_ARTICLE.fullmatch(prefix):
        return True
    if len(without_marks(word)) < SHORTEST_ARABIC_ROOT:
        return prefix == "و"
    return ARABIC_PREFIX.fullmatch(prefix) is not None


def ends_word(text: str, end: int, word: str) -> bool:
    """Return whether nothing follows text[:end] in the same word, or only Korean particles."""
    if word[-1] == "n" and REST_OF_NOT.match(text, end):
        return False
    if is_name_with_sign(text, end):
        return False
    if not is_one_word(word[-1], text[end : end + 1]):
        return True

    last = end
    while last < len(text) and letter_pattern().match(text[last]):
        last += 1
    return are_particles(word[-1], text[end:last])


def is_name_with_sign(text: str, end: int) -> bool:
    """Return whether text[:end] ends with the letter of a name such as "C++", without its sign."""
    name = word_pattern().match(text, end - 1)
    return name is not None and name.end() > end and name[0].endswith(SIGNS_OF_NAME)


def are_particles(before: str, ending: str) -> bool:
    """Return whether an ending is one Korean particle or several, such as "에서" and "는".

    before: the character before the ending. For "우" and "가" it is True; for "사" and "과", False.
    """
    if not ending:
        return True
    for particle in (*PARTICLES, *particles_after(before)):
        if not ending.startswith(particle):
            continue
        if are_particles(particle[-1], ending.removeprefix(particle)):
            return True
    return False


def particles_after(character: str) -> list[str]:
    """Return the particles that need a syllable like this one before them.

    After "우", which ends in a vowel, these are PARTICLES_AFTER_VOWEL. After a character that is no
    Korean syllable, such as the last of "fox", both lists are possible.
    """
    if not "가" <= character <= "힣":
        return PARTICLES_AFTER_CONSONANT + PARTICLES_AFTER_VOWEL

    # Unicode orders the syllables by first consonant, vowel and final consonant, 28 of the last: 0
    # is none. After ㄹ (8) stands "로" as after a vowel.
    final = (ord(character) - ord("가")) % 28
    if final == 0:
        return PARTICLES_AFTER_VOWEL
    if final == 8:
        return [*PARTICLES_AFTER_CONSONANT, "로"]
    return PARTICLES_AFTER_CONSONANT


def without_marks(text: str) -> str:
    """Return a text without its accents and vowel signs."""
    return "".join(character for character in text if not is_mark(character))


def is_one_word(left: str, right: str) -> bool:
    """Return whether two neighbouring characters belong to one word; "" stands for an end of the
    text.

    For "a" and "b" it is True; for "a" and " ", or "a" and "", False. For two letters of which one
    belongs to a script without spaces it is False, since a text may be cut between any of these.
    """
    letter = letter_pattern()
    if not (letter.match(left) and letter.match(right)):
        return False
    if is_mark(right):
        return True
    unspaced = unspaced_pattern()
    return not (unspaced.match(left) or unspaced.match(right))


def words_of(text: str) -> list[str]:
    """Return all words of a text as they are compared, in order. The text has each of them.

    A compound such as "red-hot", "red_hair" or "fox's" is one word. In a script without spaces a
    "word" is what stands between spaces and punctuation.
    """
    return word_pattern().findall(compared_form(text))


def word_ends(text: str) -> list[int]:
    """Return the positions where a text can be cut without cutting a word in two, in order.

    The text's end is one of them, unless the text is empty. For "a cat." it gives [1, 5, 6].
    """
    ends = []
    for i in range(1, len(text) + 1):
        if text[i - 1].isspace():
            continue
        if not is_one_word(text[i - 1], text[i : i + 1]):
            ends.append(i)
    return ends
