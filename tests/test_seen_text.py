"""What the text encoders receive of a prompt: words that they cut off do not count."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import Browser, needs_browser
from families import flux, lumina2
from files import write_lines, write_text
from pages import read_page
from tiny import build, generate_options, sd15, sdxl
from tiny_runs import collect_tiny

import features
import steer
from analysis.concepts import with_word
from analysis.feature_edits import Target
from diffusion.tokenizer_calls import SeenText, TokenizerCall, watch_tokenizers
from sae import Sae
from store.dataset import Activations
from store.prompts import seen_text


@pytest.mark.parametrize("recipe", [sd15, sdxl, flux, lumina2], ids=lambda f: f.__name__)
def test_the_text_that_the_encoders_receive(recipe):
    """A long prompt gives the encoders the ids of its `Encoding`, cut at its limit, and no other
    word would fit in."""
    pipe = build(recipe)
    prompt = " ".join(f"w{i}" for i in range(400))
    received = []

    def listen(module, args, kwargs):
        return received.append(kwargs.get("input_ids", args[0] if args else None))

    for component in pipe.components.values():
        if hasattr(component, "get_input_embeddings"):
            component.register_forward_pre_hook(listen, with_kwargs=True)
    with watch_tokenizers(pipe) as calls:
        pipe(**generate_options(1, recipe, prompt=[prompt]))
    seen = SeenText(calls, [prompt])
    rows = [row.tolist() for ids in received for row in ids]
    assert seen.encodings
    assert calls
    for encoding in seen.encodings:
        whole = f"{encoding.before}{encoding.prepared(prompt)}{encoding.after}"
        ids = list(
            encoding.tokenizer(whole, truncation=True, max_length=encoding.limit)["input_ids"]
        )
        assert any(row[: len(ids)] == ids for row in rows)
        assert len(ids) <= encoding.limit
    text = seen.text(prompt)
    more = prompt[: len(text)] + prompt[len(text) :].partition(" w")[0] + " w999"
    assert 0 < len(text) < len(prompt)
    assert prompt.startswith(f"{text} ")
    assert seen.text(more) == text
    assert seen.text("a red fox") == "a red fox"
    calls.clear()
    pipe.tokenizer("a red fox")
    assert not calls  # they are not watched any more


def test_without_a_tokenizer_all_is_seen():
    assert SeenText([], []).text("a fox") == "a fox"


@pytest.mark.parametrize(
    "text, before, after",
    [
        ("blurred, ugly", None, None),
        ("reds", None, None),
        ("blurred, red", "blurred, ", ""),
        ("say:red<end>", "say:", "<end>"),
    ],
)
def test_a_prompt_is_found_as_whole_words(text, before, after):
    call = TokenizerCall(SimpleNamespace(model_max_length=77), text, {"truncation": True}, {})
    surroundings = [
        (encoding.before, encoding.after) for encoding in SeenText([call], ["red"]).encodings
    ]
    assert surroundings == ([] if before is None else [(before, after)])


LONG = "a picture with very many words that go on and on until the end of what the encoder takes dotted"


@pytest.fixture
def long_collection(model_folder, tmp_path):
    """Six prompts, two of which say "dotted" behind the 77 tokens of the encoder, one before; the
    tiny one counts letters."""
    prompts = [LONG, f"{LONG} too", "a dotted star", "a red fox", "a blue star", "green bottles"]
    path = write_text(tmp_path, "p.txt", "\n".join(prompts))
    return path, collect_tiny(model_folder, tmp_path, dataset_name=path), tmp_path / "acts"


@pytest.mark.slow
def test_words_behind_the_end_of_the_encoder_do_not_count(long_collection, tmp_path):
    _, lines, folder = long_collection
    cut = lines[0]["seen"]
    assert LONG.startswith(f"{cut} ")
    assert "dotted" not in cut
    assert len(cut.replace(" ", "")) <= 75
    assert [line.get("seen") for line in lines] == [cut, cut, None, None, None, None]
    assert [line["prompt"] for line in lines[:2]] == [LONG, f"{LONG} too"]

    data = str(folder / "mid_block.npy")
    Sae(16, 40, 4, {"data": [data], "hook_name": "mid_block"}).save_to_disk(tmp_path / "sae")
    page = features.main(
        features.Config(sae=str(tmp_path / "sae"), out_dir=str(tmp_path / "pages"), device="cpu")
    )
    shown = read_page(page)
    where = [caption for caption, *_ in shown["examples"]].index(LONG)
    assert shown["seen"][str(where)] == cut
    assert len(shown["seen"]) == 2
    assert with_word([seen_text(line) for line in lines], "dotted").tolist() == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]

    sae = Sae.load_from_disk(tmp_path / "sae")
    target = Target(str(tmp_path / "sae"), sae, None, features=[], activations=Activations([data]))
    config = steer.Config(concept="dotted")
    with_it, without = steer.choose_of_concept(config, target, steer.score_images(config, target))
    assert with_it == [lines[2]]
    assert without == [lines[p] for p in (0, 1, 3, 4, 5)]


@pytest.mark.slow
def test_a_collection_of_an_earlier_version_is_extended(long_collection, model_folder, tmp_path):
    """Its prompts.jsonl does not say what the encoders cut."""
    path, lines, folder = long_collection
    old = [{name: value for name, value in line.items() if name != "seen"} for line in lines]
    write_lines(folder / "prompts.jsonl", old)
    Path(path).write_text(Path(path).read_text() + "\na yellow ring")
    extended = collect_tiny(model_folder, tmp_path, dataset_name=path)
    assert extended[:6] == lines
    assert len(extended) == 7


@pytest.mark.slow
@needs_browser
def test_the_search_of_the_page_uses_what_the_encoder_receives(model_folder, tmp_path):
    path = write_text(
        tmp_path,
        "p.txt",
        "\n".join([LONG, "a dotted star", "a caf\u00e9", "红色的狐狸", "a red fox", "a dog"]),
    )
    collect_tiny(model_folder, tmp_path, dataset_name=path)
    data = str(tmp_path / "acts" / "mid_block.npy")
    Sae(16, 40, 4, {"data": [data], "hook_name": "mid_block"}).save_to_disk(tmp_path / "sae")
    options = dict(
        sae=str(tmp_path / "sae"), out_dir=str(tmp_path / "pages"), device="cpu", top_images=1
    )
    page = features.main(features.Config(**options))
    shown = read_page(page)
    captions = [caption for caption, *_ in shown["examples"]]
    of_feature = [captions[top[0]] if top else None for top in shown["top"]]
    with Browser() as browser:
        browser.open(page)
        set_value = "(() => {{ const q = document.getElementById('{}'); q.value = '{}'; q.dispatchEvent(new Event('{}')); }})()"
        browser.run(set_value.format("where", "prompts", "change"))
        for query, captions_found in (
            ("dotted", ["a dotted star"]),
            ("CAFE\u0301", ["a caf\u00e9"]),
            ("狐狸", ["红色的狐狸"]),
        ):
            browser.run(set_value.format("query", query, "input"))
            count = int(browser.run("document.getElementById('count').textContent").split()[0])
            assert count == sum(caption in captions_found for caption in of_feature), query
