"""store/words.py: which words a text has, where words are attached to others, and where to cut."""

import doctest

import pytest

import store.words
from analysis.concepts import with_word
from store.words import are_particles, compared_form, has_word, word_ends, words_of


def test_the_examples_of_the_page():
    assert doctest.testmod(store.words).failed == 0


@pytest.mark.parametrize(
    "text",
    [
        "여우가 숲에",
        "붉은 여우를 그린 그림",
        "여우",
        "여우들이",
        "여우에게는",
        "큰 여우, 숲",
        "여우와 늑대",
    ],
)
def test_korean_particles_do_not_hide_a_word(text):
    assert has_word(text, "여우")


@pytest.mark.parametrize(
    "text, word",
    [
        ("여우비가 온다", "여우"),  # a sunshower: another word
        ("불여우가", "여우"),  # a compound
        ("사과 하나", "사"),  # an apple; after a vowel the particle would be 와
        ("배우가", "배"),  # an actor is no ship
    ],
)
def test_a_longer_korean_word_is_another_word(text, word):
    assert not has_word(text, word)


def test_korean_particles_after_other_scripts_and_after_consonants():
    assert has_word("fox가 숲에", "fox")
    assert has_word("말이 달린다", "말")
    assert has_word("말로", "말")
    assert not are_particles("꽃", "로")
    assert are_particles("꽃", "으로")
    assert not are_particles("우", "은")


@pytest.mark.parametrize(
    "text",
    [
        "الثعلب في الغابة",
        "بالثعلب",
        "صورة للثعلب",
        "ثعلب",
        "والثعلب",
        "وبالثعلب",
        "بثعلب",
        "وثعلب",
        "بِالثعلب",
    ],
)
def test_arabic_articles_and_prepositions_do_not_hide_a_word(text):
    assert has_word(text, "ثعلب")


def test_a_longer_arabic_word_is_another_word():
    assert not has_word("فقط", "قط")  # "only" is no cat
    assert has_word("القط", "قط")
    assert has_word("كلب وقط", "قط")
    assert not has_word("مثعلب", "ثعلب")
    assert not has_word("ثعلبان", "ثعلب")
    assert has_word("صورة للثعلب", "الثعلب")
    assert not has_word("ثعلب", "الثعلب")


def test_words_of_other_scripts_stay_whole():
    assert not has_word("starry", "star")
    assert has_word("a STAR.", "star")
    assert has_word("一只狐狸在森林", "狐狸")
    assert has_word("anything", "")
    assert words_of("Red-hot, don't") == ["red-hot", "don't"]
    assert word_ends("a cat.") == [1, 5, 6]
    assert word_ends("") == []


@pytest.mark.parametrize(
    "text, word",
    [
        ("a st\u00adar", "star"),  # a soft hyphen
        ("a st\u200bar", "star"),  # white space of no width
        ("a \u200estar\u200f", "star"),  # marks of the direction of writing
        ("artist’s star", "artist's"),
        ("artist's star", "artist’s"),
        ("well\u2011known", "well-known"),
        ("red_hair", "hair"),  # tags
        ("red_hair", "red hair"),
        ("red hair", "red_hair"),
        ("كَلْب", "كلب"),  # vowel signs
        ("كـلب", "كلب"),  # a lengthened letter
        ("İstanbul", "istanbul"),
        ("i\u0307stanbul", "İSTANBUL"),
        ("fox’s tail", "fox"),
        ("l’étoile", "étoile"),
        ("don’t", "don't"),
        ("in C++ code", "C++"),
        ("a red++ star", "red"),  # a weight
        ("ﬁsh", "fish"),
    ],
)
def test_another_way_of_typing_does_not_hide_a_word(text, word):
    assert has_word(text, word)


@pytest.mark.parametrize(
    "text, word",
    [
        ("½ cup", "1"),
        ("① red", "1"),
        ("x²", "x2"),
        ("C++ code", "C"),
        ("C# code", "C"),
        ("don't", "don"),
        ("don’t", "t"),
        ("can't", "can"),
        ("الأسد", "اسد"),  # the hamza makes another letter
    ],
)
def test_a_sign_that_makes_another_word_is_seen(text, word):
    assert not has_word(text, word)


@pytest.mark.parametrize(
    "text",
    [
        "Don’t: 'red' _red_hair_ C++, C#; well\u2011known ½ ① x²",
        "L’Étoile, cafe\u0301, Straße, ΟΔΟΣ, İstanbul, ﬁsh, st\u00adar++",
        "كَلْب والثعلب, אֲנִי, 여우가, 赤いfox, हिन्दी, แมวสีแดง",
    ],
)
def test_a_text_has_each_of_its_words(text):
    """A word that the feature page shows is one that --concept finds."""
    words = words_of(text)
    assert len(words) >= 6
    assert all(has_word(text, word) and compared_form(word) == word for word in words)


@pytest.mark.parametrize(
    "text",
    ["a solid red  star", "a RED\u00a0star", "red\nstar", "\uff52\uff45\uff44 star", "a red star"],
)
def test_a_concept_of_two_words_whatever_stands_between(text):
    assert with_word([text, "a blue ring"], " red  star ").tolist() == [True, False]


@pytest.mark.parametrize(
    "text, word, has",
    [
        ("a dotted star", "dot", False),
        ("a Dot, red", "dot", True),
        ("a caf\u00e9 at night", "cafe\u0301", True),  # the same letter, typed in two ways
        ("a cafe\u0301 at night", "caf\u00e9", True),
        ("a cafe\u0301 at night", "cafe", False),
        ("eine Straße", "STRASSE", True),
        ("雪の中の赤い狐", "狐", True),
        ("一只红色的狐狸在雪中", "狐狸", True),
        ("一只红色的狐狸在雪中", "狗", False),
        ("แมวสีแดง", "แมว", True),
        ("ที่บ้าน", "ท", False),  # a vowel sign belongs to the letter before it
        ("हिन्दी", "ह", False),
        ("a red fox", "red fox", True),
        ("red_hair", "hair", True),  # as tags are written
        ("red_hair", "air", False),
        ("赤いfox", "fox", True),
    ],
)
def test_which_prompts_have_a_word(text, word, has):
    assert with_word([text, "x" if has else word], word).tolist() == [has, not has]


def test_words_with_accents_and_signs_stay_whole():
    assert words_of("Cafe\u0301, l’été; हिन्दी red-hot") == [
        "caf\u00e9",
        "l'été",
        "हिन्दी",
        "red-hot",
    ]
