"""The page of features.py: what the toy drew, hostile prompts, and how it behaves in a browser."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from browser import Browser, needs_browser
from files import read_lines, write_lines
from pages import read_page, save_grey_images, shown_image, write_block
from tiny_runs import collect_tiny

import collect
import features
import train
from bench.maps import drawn, overlap
from cli import HERE
from features import Config, main
from hook import HookedDiffusionModel
from sae import Sae
from store.words import compared_form
from toy.concepts import Classifier, to_model

pytestmark = pytest.mark.slow

STRANGE = [
    "<script>alert(1)</script>",
    '</script><img src=x onerror="alert(2)">',
    "{{data}} & <b>bold</b> \u2028 ' \" é",
]
"""Prompts that would break a page which took them for HTML."""

TYPED = [
    "Fox’s well\u2011known RED_hair ½ ① x²",
    "L’Étoile Cafe\u0301 Straße ΟΔΟΣ İstanbul ﬁsh ｓｔａｒ st\u00adar st\u200bar",
    "كَلْب الأُسْد אֲנִי 여우가 हिन्दी",
]
"""Texts that are typed in another way than the page writes them."""


class ToyPage(NamedTuple):
    """A page of 32 images of the toy."""

    path: Path
    data: dict
    rows: list[dict]
    """The lines of the collection's prompts.jsonl."""


@pytest.fixture(scope="module")
def toy_page(tmp_path_factory):
    base = tmp_path_factory.mktemp("toy")
    acts = str(base / "acts")
    saes = str(base / "saes")
    options = dict(
        num_inference_steps=10, guidance_scale=5.0, max_num_examples=32, batch_size=16, device="cpu"
    )
    collect.main(collect.Config(out_dir=acts, **options))
    if not (base / "acts" / "images").exists():
        save_toy_images(base / "acts")
    train.main(
        train.Config(data=[acts], num_latents=[384], out_dir=saes, run_name="toy", device="cpu")
    )
    main(Config(sae=f"{saes}/toy", out_dir=str(base / "pages"), top_images=8, device="cpu"))
    path = base / "pages" / "toy.html"
    return ToyPage(path, read_page(path), read_lines(base / "acts" / "prompts.jsonl"))


def save_toy_images(folder):
    """What the toy makes of the prompts and seeds in a folder's prompts.jsonl."""
    hooked = HookedDiffusionModel.from_pretrained("toy")
    rows = read_lines(folder / "prompts.jsonl")
    (folder / "images").mkdir()
    for first in range(0, len(rows), 16):
        some = rows[first : first + 16]
        seeds = [torch.Generator().manual_seed(row["seed"]) for row in some]
        options = dict(generator=seeds, num_inference_steps=10, guidance_scale=5.0)
        for p, image in enumerate(hooked([row["prompt"] for row in some], **options).images, first):
            image.save(folder / "images" / f"{p}.webp", lossless=True)


def test_an_image_row_leads_back_to_the_picture_of_its_prompt(toy_page):
    """The toy's classifier sees the prompt's object, and the same seed gives the same image."""
    data = toy_page.data
    images = np.stack([shown_image(data, e) for e in range(len(data["examples"]))])
    classifier = Classifier.load(HERE / "toy")
    recognized = classifier.predict(to_model(torch.from_numpy(images).permute(0, 3, 1, 2)))
    num_right = 0
    rows = []  # of each example the line of prompts.jsonl
    for (text, where, _), concepts in zip(data["examples"], recognized):
        number = int(re.match(r"row (\d+)", where)[1])
        row = toy_page.rows[number]
        assert row["prompt"] == text
        assert where.endswith(f"seed {row['seed']}")
        num_right += concepts["object"] in text
        rows.append(row)
    assert len(recognized) == 32
    assert num_right >= 30  # 10 steps are few

    hooked = HookedDiffusionModel.from_pretrained("toy")
    for example in (3, 20):
        row = rows[example]
        seed = torch.Generator().manual_seed(row["seed"])
        options = dict(generator=seed, num_inference_steps=10, guidance_scale=5.0, output_type="np")
        again = 255 * hooked(row["prompt"], **options).images[0]
        distances = np.abs(images - again).mean((1, 2, 3))
        assert distances.argmin() == example
        assert distances[example] < 5  # of 255: what WebP leaves of a picture
    assert toy_page.path.stat().st_size < 25e6
    assert data["note"] == ""


def test_a_heat_map_lies_on_the_drawn_object(toy_page):
    """Maps at a quarter of their peak against the pixels that differ from the background, by more
    than the picture's noise.

    The five features that fit best in the first of their images are judged in the others, against
    their shuffled maps.
    """
    data = toy_page.data
    rng = np.random.default_rng(0)
    fits_of_features = []
    objects = [drawn(shown_image(data, e)) for e in range(len(data["examples"]))]
    assert 0.05 < np.mean(objects) < 0.4

    def fit(levels, e):
        return overlap(levels.reshape(data["shapes"][0]), objects[e])

    for top, maps in zip(data["top"], data["levels_of"]):
        if len(top) == 8:
            fits = [fit(levels, e) for levels, e in zip(maps, top)]
            shuffled = [fit(rng.permutation(levels), e) for levels, e in zip(maps, top)]
            fits_of_features.append((np.mean(fits[::2]), np.mean(fits[1::2]), np.mean(shuffled)))
    best = np.array(sorted(fits_of_features, reverse=True)[:5])
    assert best[:, 1].mean() >= 0.4, best
    assert (best[:, 1] > best[:, 2]).all(), best


@pytest.fixture(scope="module")
def large_page(model_folder, tmp_path_factory):
    """A page of 10,000 features of a tiny pipeline, whose prompts are hostile."""
    base = tmp_path_factory.mktemp("large")
    prompts = base / "prompts.jsonl"
    texts = STRANGE + [f"{'red' if i % 3 else 'blue'} picture number {i}" for i in range(21)]
    write_lines(prompts, [{"prompt": text} for text in texts])
    collect_tiny(
        model_folder,
        base,
        dataset_name=str(prompts),
        num_inference_steps=4,
        height=64,
        width=64,
        batch_size=8,
    )
    data = str(base / "acts" / "mid_block.npy")
    save_grey_images(base / "acts" / "mid_block.npy", [(64, 64)] * len(texts))
    d = np.load(data, mmap_mode="r").shape[-1]
    Sae(d, 10_000, 32, {"data": [data]}).save_to_disk(base / "saes" / "large")
    main(Config(sae=str(base / "saes" / "large"), out_dir=str(base / "pages"), device="cpu"))
    return base / "pages" / "large.html"


def test_strange_prompts_are_text(large_page):
    page = large_page.read_text()
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    assert "<img" not in page
    assert "<b>" not in page
    texts = [text for text, _, _ in read_page(large_page)["examples"]]
    assert set(STRANGE) <= set(texts)


class OpenedPage:
    """The large page in a browser, and what a user does with it."""

    def __init__(self, path, browser):
        self.data = read_page(path)
        self.browser = browser
        self.alive = [f for f, density in enumerate(self.data["density"]) if density > 0]

    def text(self, id):
        """The text of the element with this id."""
        return self.browser.run(f"document.getElementById('{id}').textContent")

    def count(self):
        """How many features the list says that it shows, such as "3,812 of"."""
        return self.text("count")

    def first_in_list(self):
        return self.browser.run("document.querySelector('.row .name').textContent")

    def set(self, id, value, event="change"):
        """Give an input a value, and let it send the event of a user's input."""
        self.browser.run(
            f"(() => {{ const input = document.getElementById('{id}'); "
            f"input.value = '{value}'; input.dispatchEvent(new Event('{event}')); }})()"
        )

    def type(self, query):
        self.set("query", query, "input")

    def prompts_of(self, feature):
        """The prompts of a feature's images."""
        return [self.data["examples"][e][0] for e in self.data["top"][feature]]

    def with_strange_prompt(self):
        """The living features that a prompt with a script is among the images of."""
        return [f for f in self.alive if STRANGE[0] in self.prompts_of(f)]


@pytest.fixture
def page(large_page):
    """The page without a feature in its address. Nothing that is done with it may be an error."""
    with Browser() as browser:
        browser.open(large_page)
        yield OpenedPage(large_page, browser)
        assert browser.errors == []
        assert browser.dialogs == []


@needs_browser
def test_the_page_opens_on_the_most_telling_feature(page):
    most_telling = int(np.argmax(page.data["telling"]))
    assert page.text("feature") == f"Feature {most_telling}"
    assert page.first_in_list() == f"#{most_telling}"
    assert page.text("explanation").startswith("A feature is telling if its prompts")


@needs_browser
def test_a_link_opens_its_feature_with_its_prompts_images_and_maps(page, large_page):
    strange = page.with_strange_prompt()[0]
    browser = page.browser
    browser.open(large_page, f"#f={strange}")
    assert page.text("feature") == f"Feature {strange}"
    browser.wait(
        "document.querySelectorAll('#pictures canvas[data-drawn]').length == document.querySelectorAll('figure').length"
    )
    shown = browser.run(
        "[...document.querySelectorAll('#pictures figure')].map(f => f.querySelector('figcaption').firstChild.data)"
    )
    assert shown == page.prompts_of(strange)
    assert STRANGE[0] in shown
    browser.wait(
        "[...document.querySelectorAll('#pictures img')].every(i => i.complete && i.naturalWidth == 64)"
    )
    height, width = page.data["shapes"][0]
    pixels = f"document.querySelector('#pictures canvas').getContext('2d').getImageData(0, 0, {width}, {height}).data"
    alpha = np.array(browser.run(f"[...{pixels}].filter((v, i) => i % 4 == 3)"))
    levels = page.data["levels_of"][strange][0]
    assert np.array_equal(alpha > 0, levels[: len(alpha)] > 0)
    assert alpha.max() == 255


@needs_browser
def test_the_page_finds_features_by_words_prompts_and_number(page):
    num_alive = len(page.alive)
    assert page.count().partition(" ")[0] == f"{num_alive:,}"
    assert num_alive > 3000
    for typed in TYPED:  # the search compares texts as --concept does
        assert page.browser.run(f"folded({json.dumps(typed)})") == compared_form(typed)
    assert page.browser.run("begins('red_hair', 'hai') && !begins('red_hair', 'air')")

    page.type("blu")
    blue = []
    for feature in page.alive:
        if any(word.startswith("blu") for word, _ in page.data["words"][feature]):
            blue.append(feature)
    assert page.count().startswith(f"{len(blue):,} of")
    assert 0 < len(blue) < num_alive

    page.set("where", "prompts")
    page.type("<SCRIPT>alert")
    assert page.count().startswith(f"{len(page.with_strange_prompt()):,} of")
    page.type("#77")
    assert "#77" in page.text("list")


@needs_browser
def test_the_list_is_filtered_and_sorted(page):
    page.set("alive", "dead")
    assert page.count().startswith(f"{10_000 - len(page.alive):,} of")
    page.set("alive", "all")
    page.set("sort", "density")
    densest = int(np.argmax(page.data["density"]))
    assert page.first_in_list() == f"#{densest}"
    page.set("least", "1", "input")  # percent
    num_dense = sum(density >= 0.01 for density in page.data["density"])
    assert page.count().startswith(f"{num_dense:,} of")


@needs_browser
def test_ten_thousand_features_scroll_and_only_those_in_view_exist(page):
    page.set("alive", "all")
    for scroll_top in [*range(0, 760_000, 76_000), 10**9]:
        page.browser.run(
            f"document.getElementById('list').scrollTop = {scroll_top}; new Promise(requestAnimationFrame)"
        )
    page.browser.wait(
        "document.querySelectorAll('.row').length && [...document.querySelectorAll('.row')].at(-1).offsetTop == 76 * 9999"
    )
    assert page.browser.run("document.querySelectorAll('.row').length") < 40


@needs_browser
def test_keys_and_links_move_between_features(page):
    browser = page.browser
    page.set("alive", "all")
    page.set("sort", "number")
    browser.run("location.hash = '#f=5'")
    browser.wait("document.getElementById('feature').textContent == 'Feature 5'")
    browser.press("j", "ArrowDown", "k")
    assert browser.run("location.hash") == "#f=6"
    assert browser.run("document.querySelector('[aria-selected=true]').id") == "row6"
    browser.press("/", "x")
    query = "document.getElementById('query').value"
    assert browser.run("document.activeElement.id") == "query"
    assert browser.run(query) == "x"
    browser.press("Escape", "Escape")
    assert browser.run(query) == ""
    assert browser.run("document.activeElement.tagName") == "BODY"


@needs_browser
@pytest.mark.parametrize("height, width", [(64, 128), (128, 64)])
def test_maps_cover_pictures_that_are_not_square(model_folder, tmp_path, height, width):
    options = dict(
        model_name=str(model_folder),
        device="cpu",
        num_inference_steps=2,
        height=height,
        width=width,
    )
    prompts = dict(dataset_name="a picture", out_dir=str(tmp_path / "acts"))
    collect.main(collect.Config(hook_names=["up_blocks.0.attentions.1"], **prompts, **options))
    data = str(tmp_path / "acts" / "up_blocks.0.attentions.1.npy")
    save_grey_images(Path(data), [(width, height)])
    d = np.load(data, mmap_mode="r").shape[-1]
    Sae(d, 20, 8, {"data": [data]}).save_to_disk(tmp_path / "some")
    main(Config(sae=str(tmp_path / "some"), out_dir=str(tmp_path), map_size=4, device="cpu"))
    page = read_page(tmp_path / "some.html")
    assert page["shapes"] == [[4 * height // 128, 4 * width // 128]]
    assert page["ratios"] == [width / height]
    box = "(b => [b.x, b.y, b.width, b.height])({}.getBoundingClientRect())".format
    with Browser() as browser:
        browser.open(tmp_path / "some.html")
        for selector in (".row .picture", "#pictures .picture"):
            browser.wait(f"document.querySelector('{selector} img').naturalWidth == {width}")
            image, canvas = (
                browser.run(box(f"document.querySelector('{selector} {tag}')"))
                for tag in ("img", "canvas")
            )
            fit = browser.run(
                f"getComputedStyle(document.querySelector('{selector} img')).objectFit"
            )
            assert image == canvas
            assert image[2] / image[3] == pytest.approx(width / height, rel=0.02)
            assert fit == "fill"
        row, thumb = (
            browser.run(box(f"document.querySelector('{selector}')"))
            for selector in (".row", ".row .picture")
        )
        assert thumb[1] >= row[1]
        assert thumb[1] + thumb[3] <= row[1] + row[3]


@needs_browser
def test_the_page_on_a_phone(toy_page):
    with Browser(390, 844, phone=True) as browser:
        browser.open(toy_page.path)
        browser.wait("document.querySelector('.row img').naturalWidth == 64")
        browser.run("document.querySelector('.row').click()")
        assert browser.run("getComputedStyle(document.getElementById('detail')).display") == "block"
        browser.run("document.getElementById('back').click()")
        assert browser.run("getComputedStyle(document.getElementById('detail')).display") == "none"
        assert browser.run("document.documentElement.scrollWidth") <= 390
        assert browser.errors == []


def save_vectors_of_width_3(tmp_path):
    """A plain file of 50 vectors and an SAE of their width without data: their paths as options."""
    wide = tmp_path / "wide.npy"
    np.save(wide, np.ones((50, 3), np.float32))
    Sae(3, 8, 2).save_to_disk(tmp_path / "bare")
    return str(wide), str(tmp_path / "bare")


def test_what_can_not_be_shown(toy_page, tmp_path):
    """Data of another width, none or not finite; pages and folders of somebody else."""
    toy_sae = str(toy_page.path.parent.parent / "saes" / "toy")
    wide, bare_sae = save_vectors_of_width_3(tmp_path)
    with pytest.raises(ValueError, match="width 3"):
        main(Config(sae=toy_sae, data=[wide], device="cpu"))
    with pytest.raises(ValueError, match="name some with --data"):
        main(Config(sae=bare_sae, device="cpu"))
    for text in ("mine", '<meta name="about" content="{}">'):
        (tmp_path / "toy.html").write_text(text)
        with pytest.raises(ValueError, match="another --out_dir"):
            main(Config(sae=toy_sae, out_dir=str(tmp_path), device="cpu"))
        assert (tmp_path / "toy.html").read_text() == text
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be made"):
        main(Config(sae=toy_sae, out_dir=str(tmp_path / "file"), device="cpu"))

    other = write_block(tmp_path / "acts", np.ones((2, 3, 4, 96), np.float32))
    config = Config(sae=toy_sae, data=[str(other)], out_dir=str(toy_page.path.parent))
    with pytest.raises(ValueError, match="toy.html was made with data .*; use another --out_dir"):
        main(replace(config, transfer=True, device="cpu"))

    infinite = tmp_path / "inf.npy"
    np.save(infinite, np.full((50, 3), np.inf, np.float32))
    config = Config(sae=bare_sae, data=[str(infinite)], out_dir=str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="inf.npy: prompt 0 holds numbers that are not finite"):
        main(config)


def test_a_page_is_made_again_with_the_same_bytes_also_by_another_path(toy_page, monkeypatch):
    before = toy_page.path.read_bytes()
    base = toy_page.path.parent.parent
    monkeypatch.chdir(base)
    for sae in ("saes/toy", str(base / "saes" / "toy")):
        main(Config(sae=sae, out_dir=str(toy_page.path.parent), top_images=8, device="cpu"))
    assert toy_page.path.read_bytes() == before


def test_a_page_without_images_says_why(toy_page, tmp_path, capsys):
    """A collection of an earlier version, which has none, and plain vectors."""
    base = toy_page.path.parent.parent
    acts = tmp_path / "old"
    shutil.copytree(base / "acts", acts, ignore=shutil.ignore_patterns("images"))
    toy_sae = str(base / "saes" / "toy")
    main(Config(sae=toy_sae, data=[str(acts)], out_dir=str(tmp_path / "other"), device="cpu"))
    data = read_page(tmp_path / "other" / "toy.html")
    assert "no pictures: " in data["note"]
    assert "images/0.webp is not there" in data["note"]
    assert not any(data["pictures"])
    assert "collect again" in capsys.readouterr().out

    wide, bare_sae = save_vectors_of_width_3(tmp_path)
    main(Config(sae=bare_sae, data=[wide], out_dir=str(tmp_path), device="cpu"))
    data = read_page(tmp_path / "bare.html")
    assert data["examples"] == [["", "row 0", 0]]
    assert "images/ of collect.py" in data["note"]
    assert features.CURVE == 50
