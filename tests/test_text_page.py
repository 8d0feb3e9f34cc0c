"""The page of a text stream: the words of each prompt, with the activation as the colour under
each."""

import json

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from described import describe
from test_features import read_page

from features import Config, main, tokens_of
from sae import Sae
from store.activation_file import open_activation_file

TOKENS = [
    {"tokenizer": ["<start>", "a", " red", " fox"], "tokenizer_3": ["a", " ", "red fox", "</s>"]},
    {"tokenizer": ["<start>", "a", " cat"], "tokenizer_3": ["a cat", "</s>"]},
    {"tokenizer": ["<start>", "a", " <b>"], "tokenizer_3": ["a <b>", "</s>"]},
]
PROMPTS = ["a red fox", "a cat", "a <b>"]


def write_activations(folder, rows="cond", tokens=TOKENS):
    """One feature is active on the token " red" and, half as strongly, on " cat" and " <b>"."""
    lengths = np.array([8, 5, 5])
    x = np.zeros((3, 2, 8, 4), np.float32)
    x[0, :, 2, 1] = 4
    x[1:, :, 2, 1] = 2
    path = folder / "block.text.npy"
    np.save(path, x)
    np.save(folder / "block.text.lengths.npy", lengths)
    lines = []
    for i, (prompt, of_prompt) in enumerate(zip(PROMPTS, tokens)):
        lines.append(json.dumps({"id": i, "prompt": prompt, "seed": i, "tokens": of_prompt}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines))
    names = dict(hook_name="block", side="output", stream="text", rows=rows, padding=False)
    describe(path, timesteps=[900.0, 100.0], grid=[8], shape=list(x.shape), **names)
    return path


def sae_of_one_dimension():
    sae = Sae(4, 4, 1)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(4))
        sae.encoder.bias.zero_()
        sae.W_dec.copy_(torch.eye(4))
        sae.b_dec.zero_()
    return sae


@pytest.fixture
def page(tmp_path):
    path = write_activations(tmp_path)
    sae_of_one_dimension().save_to_disk(tmp_path / "sae")
    options = dict(sae=str(tmp_path / "sae"), data=[str(path)], out_dir=str(tmp_path / "pages"))
    return main(Config(**options, device="cpu"))


def test_each_token_has_its_activation_and_the_strongest_are_named(page):
    data = read_page(page)
    assert [data["examples"][e][0] for e in data["top"][1]] == PROMPTS
    assert data["tokens"] == {
        str(i): [["tokenizer", of["tokenizer"]], ["tokenizer_3", of["tokenizer_3"]]]
        for i, of in enumerate(TOKENS)
    }
    assert data["levels_of"][1][:, :4].tolist() == [[0, 0, 31, 0], [0, 0, 16, 0], [0, 0, 16, 0]]
    assert data["strongest"][1] == [["red", 1], ["cat", 1], ["<b>", 1]]
    assert data["strongest"][0] == []  # dead


def test_a_token_that_is_only_a_space_is_named(tmp_path):
    tokens = [{name: [" "] * len(texts) for name, texts in of.items()} for of in TOKENS]
    path = write_activations(tmp_path, tokens=tokens)
    sae_of_one_dimension().save_to_disk(tmp_path / "sae")
    options = dict(sae=str(tmp_path / "sae"), data=[str(path)], out_dir=str(tmp_path / "pages"))
    assert read_page(main(Config(**options, device="cpu")))["strongest"][1] == [["␣", 3]]


def test_what_can_not_be_words_is_not_shown_as_words(tmp_path):
    too_few = [{"tokenizer": ["a"]}] * 3
    for name, options in (
        ("uncond", dict(rows="uncond")),  # these rows have the negative prompt
        ("other", dict(tokens=too_few)),  # another number of tokens than in the file
        ("none", dict(tokens=[None] * 3)),  # of an earlier version
        ("column", dict(tokens=[8, 5, 5])),  # a table's own, in an earlier version
    ):
        (tmp_path / name).mkdir()
        file = open_activation_file(write_activations(tmp_path / name, **options))
        assert tokens_of(file, 0) is None
    (tmp_path / "known").mkdir()
    assert tokens_of(open_activation_file(write_activations(tmp_path / "known")), 1) == TOKENS[1]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_shows_words_as_text_with_colours(page):
    with Browser() as browser:
        browser.open(page, "#f=1")
        browser.wait("document.querySelector('.token[title=\"4\"]') !== null")
        spans = browser.run(
            "[...document.querySelectorAll('#pictures figure')].map(f =>"
            "[...f.querySelectorAll('.token')].map(s => [s.textContent, s.style.getPropertyValue('--act'),"
            "s.classList.contains('faint')]))"
        )
        assert [text for text, _, _ in spans[0]] == [
            "<start>", "a", " red", " fox", "a", "␣", "red fox", "</s>"
        ]  # fmt: skip
        acts = [float(act) for _, act, _ in spans[0]]
        assert acts == [0, 0, 1, 0, 0, 0, 0, 0] and float(spans[1][2][1]) == 16 / 31
        faint = [is_faint for _, _, is_faint in spans[0]]
        assert faint == [True, False, False, False, False, True, False, True]
        labels = "[...document.querySelector('.tokens').querySelectorAll('small')].map(s => s.textContent)"
        assert browser.run(labels) == ["tokenizer", "tokenizer_3"]
        assert browser.run("document.querySelector('#pictures b')") is None  # no markup of a prompt
        assert spans[2][2][0] == " <b>"
        browser.run(
            "document.getElementById('where').value = 'tokens';"
            "document.getElementById('query').value = 'CAT';"
            "document.getElementById('query').dispatchEvent(new Event('input'))"
        )
        assert browser.run("document.getElementById('count').textContent") == "1 of 4 features"
        assert browser.errors == []
