"""features.py: its numbers and maps against dense ones, pictures of every kind, the page in a real
browser."""

import base64
import io
import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from PIL import Image

import collect
import features
import train
from bench.maps import drawn, overlap
from cli import HERE
from features import (
    Config,
    Example,
    PromptWord,
    Statistics,
    list_examples,
    main,
    map_grid,
    nearest,
    over_represented,
    read_images,
    scan,
    telling,
)
from hook import HookedDiffusionModel
from sae import Sae
from store.dataset import open_activations
from store.disk import checksum
from store.words import compared_form
from toy.concepts import Classifier, to_model

pytestmark = pytest.mark.slow

STRANGE = [
    "<script>alert(1)</script>",
    '</script><img src=x onerror="alert(2)">',
    "{{data}} & <b>bold</b> \u2028 ' \" é",
]

TYPED = [  # in another way than the page writes it
    "Fox’s well\u2011known RED_hair ½ ① x²",
    "L’Étoile Cafe\u0301 Straße ΟΔΟΣ İstanbul ﬁsh ｓｔａｒ st\u00adar st\u200bar",
    "كَلْب الأُسْد אֲנִי 여우가 हिन्दी",
]


def write(folder, x, **meta):
    """An activation file as collect.py writes one, with prompts of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "block.npy"
    np.save(path, x)
    record = {
        "hook_name": "block",
        "shape": list(x.shape),
        "timesteps": [900, 500, 100][: x.shape[1]],
        "model": "toy",
    } | meta
    path.with_suffix(".json").write_text(json.dumps(record | {"checksum": checksum(record)}))
    rows = [{"id": p, "prompt": f"{folder.name} prompt {p}", "seed": p} for p in range(len(x))]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def colour_of(p):
    return 20 * (p % 10) + 30


def save_images(path, sizes):
    """Grey pictures beside an activation file, as collect.py saves what the model made."""
    folder = path.with_name("images")
    if not folder.exists():
        folder.mkdir()
        for p, size in enumerate(sizes):
            Image.new("RGB", size, (colour_of(p),) * 3).save(folder / f"{p}.webp", lossless=True)


def read_page(path):
    """The data of a page, by another way than the page's script."""
    data = json.loads(
        re.search(
            r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL
        )[1]
    )
    inflate = lambda text: np.frombuffer(zlib.decompress(base64.b64decode(text), -15), np.uint8)
    data["levels_of"] = [
        inflate(text).reshape(-1, data["cells"]) if text else np.zeros((0, data["cells"]))
        for text in data["maps"]
    ]
    return data


@pytest.mark.parametrize("batch_size", [3, 20, 1000])
@pytest.mark.parametrize("kind", ["image", "video", "line", "text", "part", "samples"])
def test_numbers_and_maps_are_those_of_the_dense_expression(kind, batch_size, tmp_path):
    """Two files, every vector's activations as a whole (N, M) matrix in float64, and means, counts
    and maps by loops."""
    rng, grid = (
        np.random.default_rng(0),
        {"video": [2, 4, 6], "line": [9], "text": [9]}.get(kind, [4, 6]),
    )
    T = 5 if kind == "part" else int(np.prod(grid))
    files = [rng.standard_normal((P, 3, T, 6), np.float32) for P in (4, 3)]
    stream = "text" if kind == "text" else "image"
    paths = [write(tmp_path / name, x, grid=grid, stream=stream) for name, x in zip("ab", files)]
    lengths, kept = [[9, 4, 0, 1], [2, 9, 3]], [rng.integers(0, 24, x.shape[:3]) for x in files]
    for path, n, tokens in zip(paths, lengths, kept):
        if kind == "text":
            np.save(path.with_suffix(".lengths.npy"), np.array(n))
        if kind == "part":
            np.save(path.with_suffix(".tokens.npy"), tokens)
    sae = Sae(
        6,
        11,
        20 if kind == "samples" else 2,
        {"activation": "sampletopk"} if kind == "samples" else {},
    )
    activations = open_activations(paths)[0]
    grids = [
        map_grid(file, 3 if kind in ("image", "video") else 16) for file in activations.sources
    ]
    found = scan(sae, activations, grids, 2, batch_size)
    counts, sums, largest, maps = np.zeros((11, 3), int), np.zeros((11, 3)), np.zeros(11), []
    high, wide = {"line": (1, 9), "text": (1, 9), "image": (2, 3), "video": (2, 3)}.get(
        kind, (4, 6)
    )
    for x, n, tokens in zip(files, lengths, kept):
        for p in range(len(x)):
            heat, seen = np.zeros((11, high * wide)), np.zeros(high * wide)
            for s in range(3):
                vectors = torch.from_numpy(x[p, s][: n[p] if kind == "text" else T])
                if not len(vectors):
                    continue
                codes = sae.encode(vectors[None] if kind == "samples" else vectors)
                acts = (
                    torch.zeros(len(vectors), 11)
                    .scatter_add(1, *(c.flatten(0, -2).detach() for c in codes[1::-1]))
                    .double()
                )
                counts[:, s] += (acts > 0).sum(0).numpy()
                sums[:, s] += acts.sum(0).numpy()
                largest = np.maximum(largest, acts.amax(0).numpy())
                for t, row in enumerate(acts.numpy()):
                    place = tokens[p, s, t] if kind == "part" else t
                    if len(grid) > 1:
                        r, c = place % 24 // 6, place % 6
                        cell = r * high // 4 * wide + c * wide // 6
                    heat[:, cell if len(grid) > 1 else place] += row
                    seen[cell if len(grid) > 1 else place] += 1
            maps.append(heat / np.maximum(seen, 1))
    maps = np.stack(maps)  # (examples, M, cells)
    assert (
        grids[0].shape == (high, wide)
        and found.vectors.tolist() == [(28 if kind == "text" else 7 * T)] * 3
    )
    assert (
        np.array_equal(found.counts, counts)
        and np.allclose(found.sums, sums)
        and np.allclose(found.largest, largest)
    )
    for f, peaks in enumerate(maps.max(2).T):
        order = np.argsort(-peaks)[:2]
        order = order[peaks[order] > 0]
        assert (
            found.examples[f][: len(order)].tolist() == order.tolist()
            and (found.examples[f][len(order) :] == -1).all()
        )
        assert np.allclose(found.peaks[f][: len(order)], peaks[order])
        for i, e in enumerate(order):
            assert (
                np.abs(found.maps[f, i].numpy() / 255 * peaks[e] - maps[e, f]).max()
                <= 0.6 / 255 * peaks[e]
            )


def test_two_files_are_one_page(tmp_path):
    rng = np.random.default_rng(0)
    paths = [
        write(tmp_path / name, rng.standard_normal((P, 3, 6, 4), np.float32), grid=[2, 3])
        for name, P in (("a", 4), ("b", 3))
    ]
    Sae(4, 8, 2).save_to_disk(tmp_path / "sae")
    for path, size in zip(paths, (8, 40)):
        save_images(path, [(size, 10)] * len(np.load(path)))
    config = dict(
        sae=str(tmp_path / "sae"), data=[str(path) for path in paths], out_dir=str(tmp_path)
    )
    page = main(Config(**config, picture_size=20, device="cpu"))
    data = read_page(page)
    assert page == tmp_path / "sae.html" and data["note"] == ""
    assert [source for _, _, source in data["examples"]] == [0] * 4 + [1] * 3
    assert data["examples"][5][:2] == ["b prompt 1", "b/ row 1, seed 1"]
    assert [opened(data, e).shape for e in (0, 6)] == [
        (10, 8, 3),
        (5, 20, 3),
    ]  # made smaller, never larger
    assert [
        abs(float(opened(data, e).mean()) - colour_of(p)) < 3 for e, p in ((3, 3), (4, 0), (6, 2))
    ] == [True] * 3


def words_and_counts(texts, chosen):
    """`over_represented` without the deviations."""
    found = over_represented(texts, chosen)
    return [[(word, count) for word, count, _ in of_feature] for of_feature in found]


def test_words_are_monroes_log_odds():
    texts = ["a red fox", "a red cat", "the red dog", "a blue fox", "a blue cat", "a blue dog"] + [
        "a blue bird"
    ] * 5
    found = words_and_counts(texts, torch.tensor([[0, 1, 2], [3, 4, 6], [0, -1, -1], [-1, -1, -1]]))
    assert found[1:] == [[], [], []]  # blue is common, and one prompt with a word proves nothing
    # by hand: red in 3 of 3 chosen and 0 of 4 other distinct texts, prior 10 * 3 / 8
    delta = np.log(6.75 / 6.25) - np.log(3.75 / 10.25)
    assert (delta / np.sqrt(1 / 6.75 + 1 / 3.75) >= 1.96) == bool(found[0])
    many = [f"{'red' if i < 16 else 'blue'} thing {i}" for i in range(100)]
    assert words_and_counts(many, torch.arange(12)[None]) == [[("red", 12)]]
    delta = np.log((12 + 160 / 101) / (10 - 160 / 101)) - np.log(
        (4 + 160 / 101) / (98 - 4 - 160 / 101)
    )
    assert delta / np.sqrt(1 / (12 + 160 / 101) + 1 / (4 + 160 / 101)) >= 1.96
    ((red,),) = over_represented(many, torch.arange(12)[None])
    variance = 1 / (12 + 160 / 101) + 1 / (4 + 160 / 101)
    assert red.deviations == pytest.approx(delta / np.sqrt(variance))
    repeated = ["a"] * 4 + [f"Öl, don't {i}" for i in range(4)] + [f"blue {i}" for i in range(60)]
    assert words_and_counts(repeated, torch.arange(8).view(2, 4)) == [[], [("don't", 4), ("öl", 4)]]


def test_the_most_telling_feature_has_a_word_is_rare_and_strong():
    """By hand: deviations times -log10(density) times the mean peak; 1 deviation without words."""
    statistics = Statistics(4, 1, 2, 1, torch.device("cpu"))
    statistics.vectors += 1000
    statistics.counts[:, 0] = torch.tensor([10, 100, 10, 0])
    statistics.peaks[:] = torch.tensor([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [0.0, 0.0]])
    words = [
        [PromptWord("red", 2, 5.0), PromptWord("a", 2, 2.0)],
        [PromptWord("red", 2, 5.0)],
        [],
        [],
    ]
    assert telling(statistics, words) == pytest.approx([5 * 2 * 2, 5 * 1 * 2, 1 * 2 * 2, 0])


def test_neighbours_are_those_of_the_whole_matrix_of_cosines():
    W = (
        torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
        * torch.arange(1, 38)[:, None]
    )
    cosines = (W @ W.T / W.norm(dim=1)[:, None] / W.norm(dim=1)).fill_diagonal_(-2)
    for block in (8, 37, 100):
        indices, values = nearest(W, 4, block)
        assert torch.equal(indices, cosines.topk(4).indices) and torch.allclose(
            values, cosines.topk(4).values, atol=1e-6
        )
    assert nearest(W[:2], 6)[0].tolist() == [[1], [0]]


def test_images_of_every_kind(tmp_path):
    """A still one, an animated one (its middle frame), sound, a damaged file, none, a file of
    another program."""
    frames = [Image.new("RGB", (30, 20), (40 * i, 0, 0)) for i in range(5)]
    (tmp_path / "images").mkdir()
    path = lambda p: tmp_path / "images" / f"{p}.webp"
    frames[1].save(path(0), lossless=True)
    frames[0].save(path(1), save_all=True, append_images=frames[1:], lossless=True)
    path(2).with_suffix(".wav").write_bytes(b"RIFF")
    path(3).write_bytes(path(0).read_bytes()[:20])
    Image.new("RGBA", (300, 20), (0, 200, 0, 255)).save(path(4))
    example = lambda p: Example(0, "", "", "", None if p is None else path(p))
    images, note = read_images([example(0), example(1), example(4)], 60)
    assert note == ""
    opened = [Image.open(io.BytesIO(image)) for image in images]
    assert [(image.format, image.size) for image in opened] == [
        ("WEBP", (30, 20)),
        ("WEBP", (30, 20)),
        ("WEBP", (60, 4)),
    ]
    for image, colour in zip(opened, ((40, 0, 0), (80, 0, 0), (0, 200, 0))):
        assert np.abs(np.asarray(image).mean((0, 1)) - colour).max() < 6
    for number, said in ((2, "no pictures: the model made sound"), (3, "3.webp is not there or can't be read; collect again"),
                         (9, "9.webp is not there"), (None, "prompts.jsonl and images/ of collect.py are not")):  # fmt: skip
        images, note = read_images([example(number)], 60)
        assert images == [None] and said in note and note.startswith("no pictures: ")
    images, note = read_images([example(0), example(9)], 60)
    assert images[0] and images[1] is None and note.startswith("some pictures are missing: ")
    assert read_images([], 60) == ([], "")


def test_only_files_of_collect_have_images(tmp_path):
    rng = np.random.default_rng(0)
    path = write(tmp_path / "a", rng.standard_normal((2, 3, 6, 4), np.float32), grid=[2, 3])
    assert [example.image for example in list_examples(open_activations([path])[0])] == [
        tmp_path / "a" / "images" / f"{p}.webp" for p in range(2)
    ]
    path.with_suffix(".json").unlink()
    assert [example.image for example in list_examples(open_activations([path])[0])] == [None, None]


# The toy: what its page shows is what the model drew


@pytest.fixture(scope="module")
def toy_page(tmp_path_factory):
    """(page, its data, rows of prompts.jsonl) of 32 pictures of the toy."""
    base = tmp_path_factory.mktemp("toy")
    acts, saes = str(base / "acts"), str(base / "saes")
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
    rows = [json.loads(line) for line in (base / "acts" / "prompts.jsonl").read_text().splitlines()]
    return path, read_page(path), rows


def save_toy_images(folder):
    """What the toy makes of the prompts and seeds in a folder's prompts.jsonl."""
    hooked = HookedDiffusionModel.from_pretrained("toy")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    (folder / "images").mkdir()
    for first in range(0, len(rows), 16):
        some = rows[first : first + 16]
        seeds = [torch.Generator().manual_seed(row["seed"]) for row in some]
        options = dict(generator=seeds, num_inference_steps=10, guidance_scale=5.0)
        for p, image in enumerate(hooked([row["prompt"] for row in some], **options).images, first):
            image.save(folder / "images" / f"{p}.webp", lossless=True)


def opened(data, e):
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(data["pictures"][e].partition(",")[2])))
    )


def test_an_image_row_leads_back_to_the_picture_of_its_prompt(toy_page):
    path, data, rows = toy_page
    pictures = np.stack([opened(data, e) for e in range(len(data["examples"]))])
    seen = Classifier.load(HERE / "toy").predict(
        to_model(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    )
    hooked, right, places = HookedDiffusionModel.from_pretrained("toy"), 0, []
    for (text, where, _), names in zip(data["examples"], seen):
        places.append(int(re.match(r"row (\d+)", where)[1]))
        row = rows[places[-1]]
        assert row["prompt"] == text and where.endswith(f"seed {row['seed']}")
        right += names["object"] in text
    assert len(seen) == 32 and right >= 30  # 10 steps are few
    for e in (3, 20):
        seed = torch.Generator().manual_seed(rows[places[e]]["seed"])
        options = dict(generator=seed, num_inference_steps=10, guidance_scale=5.0, output_type="np")
        again = 255 * hooked(rows[places[e]]["prompt"], **options).images[0]
        distances = np.abs(pictures - again).mean((1, 2, 3))
        assert distances.argmin() == e and distances[e] < 5  # of 255: what WebP leaves of a picture
    assert path.stat().st_size < 25e6 and data["note"] == ""


def test_a_heat_map_lies_on_the_drawn_object(toy_page):
    """Maps at a quarter of their peak against the pixels that differ from the background, by more
    than the picture's noise.

    The five features that fit best in the first of their images are judged in the others, against
    their shuffled maps.
    """
    _, data, _ = toy_page
    rng, found = np.random.default_rng(0), []
    objects = [drawn(opened(data, e)) for e in range(len(data["examples"]))]
    assert 0.05 < np.mean(objects) < 0.4
    fit = lambda levels, e: overlap(levels.reshape(data["shapes"][0]), objects[e])
    for top, maps in zip(data["top"], data["levels_of"]):
        if len(top) == 8:
            fits = [fit(levels, e) for levels, e in zip(maps, top)]
            shuffled = [fit(rng.permutation(levels), e) for levels, e in zip(maps, top)]
            found.append((np.mean(fits[::2]), np.mean(fits[1::2]), np.mean(shuffled)))
    best = np.array(sorted(found, reverse=True)[:5])
    assert best[:, 1].mean() >= 0.4 and (best[:, 1] > best[:, 2]).all(), best


# The page in a browser


@pytest.fixture(scope="module")
def large_page(model_folder, tmp_path_factory):
    """A page of 10,000 features of a tiny pipeline, whose prompts are hostile."""
    base = tmp_path_factory.mktemp("large")
    prompts = base / "prompts.jsonl"
    texts = STRANGE + [f"{'red' if i % 3 else 'blue'} picture number {i}" for i in range(21)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = dict(
        model_name=str(model_folder),
        device="cpu",
        num_inference_steps=4,
        height=64,
        width=64,
        batch_size=8,
    )
    collect.main(
        collect.Config(
            hook_names=["mid_block"],
            dataset_name=str(prompts),
            out_dir=str(base / "acts"),
            **options,
        )
    )
    data = str(base / "acts" / "mid_block.npy")
    save_images(base / "acts" / "mid_block.npy", [(64, 64)] * len(texts))
    d = np.load(data, mmap_mode="r").shape[-1]
    Sae(d, 10_000, 32, {"data": [data]}).save_to_disk(base / "saes" / "large")
    main(Config(sae=str(base / "saes" / "large"), out_dir=str(base / "pages"), device="cpu"))
    return base / "pages" / "large.html"


def test_strange_prompts_are_text(large_page):
    page = large_page.read_text()
    assert (
        page.count("<script") == 2
        and page.count("</script") == 2
        and "<img" not in page
        and "<b>" not in page
    )
    texts = [text for text, _, _ in read_page(large_page)["examples"]]
    assert set(STRANGE) <= set(texts)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_in_a_browser(large_page):
    data = read_page(large_page)
    alive = [f for f, density in enumerate(data["density"]) if density > 0]
    strange = next(
        f for f in alive if STRANGE[0] in [data["examples"][e][0] for e in data["top"][f]]
    )
    text = "document.getElementById('{}').textContent".format
    with Browser() as browser:
        browser.open(large_page)  # on the most telling feature, which is the first of the list
        most_telling = int(np.argmax(data["telling"]))
        assert browser.run(text("feature")) == f"Feature {most_telling}"
        assert browser.run("document.querySelector('.row .name').textContent") == f"#{most_telling}"
        assert browser.run(text("explanation")).startswith("A feature is telling if its prompts")
        browser.open(large_page, f"#f={strange}")
        assert browser.run(text("feature")) == f"Feature {strange}"  # a link opens its feature
        browser.wait(
            "document.querySelectorAll('#pictures canvas[data-drawn]').length == document.querySelectorAll('figure').length"
        )
        shown = browser.run(
            "[...document.querySelectorAll('#pictures figure')].map(f => f.querySelector('figcaption').firstChild.data)"
        )
        assert (
            shown == [data["examples"][e][0] for e in data["top"][strange]] and STRANGE[0] in shown
        )
        browser.wait(
            "[...document.querySelectorAll('#pictures img')].every(i => i.complete && i.naturalWidth == 64)"
        )
        h, w = data["shapes"][0]
        pixels = f"document.querySelector('#pictures canvas').getContext('2d').getImageData(0, 0, {w}, {h}).data"
        alpha = np.array(browser.run(f"[...{pixels}].filter((v, i) => i % 4 == 3)"))
        assert (
            np.array_equal(alpha > 0, data["levels_of"][strange][0][: len(alpha)] > 0)
            and alpha.max() == 255
        )

        # search, filters, sorting
        everything = int(browser.run(text("count")).partition(" ")[0].replace(",", ""))
        assert everything == len(alive) > 3000
        search = "(() => {{ const q = document.getElementById('{}'); q.value = '{}'; q.dispatchEvent(new Event('{}')); }})()".format
        for typed in TYPED:  # the search compares texts as --concept does
            assert browser.run(f"folded({json.dumps(typed)})") == compared_form(typed)
        assert browser.run("begins('red_hair', 'hai') && !begins('red_hair', 'air')")
        browser.run(search("query", "blu", "input"))
        blue = [f for f in alive if any(word.startswith("blu") for word, _ in data["words"][f])]
        assert (
            browser.run(text("count")).startswith(f"{len(blue):,} of")
            and 0 < len(blue) < everything
        )
        browser.run(search("where", "prompts", "change"))
        browser.run(search("query", "<SCRIPT>alert", "input"))
        hostile = [
            f for f in alive if STRANGE[0] in [data["examples"][e][0] for e in data["top"][f]]
        ]
        assert browser.run(text("count")).startswith(f"{len(hostile):,} of")
        browser.run(search("query", "#77", "input"))
        assert "#77" in browser.run(text("list"))
        browser.run(search("query", "", "input"))
        browser.run(search("alive", "dead", "change"))
        assert browser.run(text("count")).startswith(f"{10_000 - everything:,} of")
        browser.run(search("alive", "all", "change"))
        browser.run(search("sort", "density", "change"))
        densest = int(np.argmax(data["density"]))
        assert browser.run("document.querySelector('.row .name').textContent") == f"#{densest}"
        browser.run(search("least", "1", "input"))
        assert browser.run(text("count")).startswith(
            f"{sum(v >= 0.01 for v in data['density']):,} of"
        )
        browser.run(search("least", "", "input"))

        # 10,000 features scroll, and only those in view exist
        for place in [*range(0, 760_000, 76_000), 10**9]:
            browser.run(
                f"document.getElementById('list').scrollTop = {place}; new Promise(requestAnimationFrame)"
            )
        browser.wait(
            "document.querySelectorAll('.row').length && [...document.querySelectorAll('.row')].at(-1).offsetTop == 76 * 9999"
        )
        assert browser.run("document.querySelectorAll('.row').length") < 40

        # keys, links
        browser.run(search("sort", "number", "change"))
        browser.run("location.hash = '#f=5'")
        browser.wait("document.getElementById('feature').textContent == 'Feature 5'")
        browser.press("j", "ArrowDown", "k")
        assert (
            browser.run("location.hash") == "#f=6"
            and browser.run("document.querySelector('[aria-selected=true]').id") == "row6"
        )
        browser.press("/", "x")
        assert (
            browser.run("document.activeElement.id + document.getElementById('query').value")
            == "queryx"
        )
        browser.press("Escape", "Escape")
        assert (
            browser.run("document.getElementById('query').value + document.activeElement.tagName")
            == "BODY"
        )
        assert browser.errors == [] and browser.dialogs == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
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
    save_images(Path(data), [(width, height)])
    d = np.load(data, mmap_mode="r").shape[-1]
    Sae(d, 20, 8, {"data": [data]}).save_to_disk(tmp_path / "some")
    main(Config(sae=str(tmp_path / "some"), out_dir=str(tmp_path), map_size=4, device="cpu"))
    page = read_page(tmp_path / "some.html")
    assert page["shapes"] == [[4 * height // 128, 4 * width // 128]] and page["ratios"] == [
        width / height
    ]
    box = "(b => [b.x, b.y, b.width, b.height])({}.getBoundingClientRect())".format
    with Browser() as browser:
        browser.open(tmp_path / "some.html")
        for place in (".row .picture", "#pictures .picture"):
            browser.wait(f"document.querySelector('{place} img').naturalWidth == {width}")
            image, canvas = (
                browser.run(box(f"document.querySelector('{place} {tag}')"))
                for tag in ("img", "canvas")
            )
            fit = browser.run(f"getComputedStyle(document.querySelector('{place} img')).objectFit")
            assert (
                image == canvas
                and image[2] / image[3] == pytest.approx(width / height, rel=0.02)
                and fit == "fill"
            )
        row, thumb = (
            browser.run(box(f"document.querySelector('{place}')"))
            for place in (".row", ".row .picture")
        )
        assert thumb[1] >= row[1] and thumb[1] + thumb[3] <= row[1] + row[3]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_on_a_phone(toy_page):
    with Browser(390, 844, phone=True) as browser:
        browser.open(toy_page[0])
        browser.wait("document.querySelector('.row img').naturalWidth == 64")
        browser.run("document.querySelector('.row').click()")
        assert browser.run("getComputedStyle(document.getElementById('detail')).display") == "block"
        browser.run("document.getElementById('back').click()")
        assert browser.run("getComputedStyle(document.getElementById('detail')).display") == "none"
        assert browser.run("document.documentElement.scrollWidth") <= 390 and browser.errors == []


def test_what_can_not_be_shown(toy_page, tmp_path, capsys, monkeypatch):
    base = toy_page[0].parent.parent
    sae = str(base / "saes" / "toy")
    np.save(tmp_path / "wide.npy", np.ones((50, 3), np.float32))
    with pytest.raises(ValueError, match="width 3"):
        main(Config(sae=sae, data=[str(tmp_path / "wide.npy")], device="cpu"))
    Sae(3, 8, 2).save_to_disk(tmp_path / "bare")
    with pytest.raises(ValueError, match="name some with --data"):
        main(Config(sae=str(tmp_path / "bare"), device="cpu"))
    for text in ("mine", '<meta name="about" content="{}">'):
        (tmp_path / "toy.html").write_text(text)
        with pytest.raises(ValueError, match="another --out_dir"):
            main(Config(sae=sae, out_dir=str(tmp_path), device="cpu"))
        assert (tmp_path / "toy.html").read_text() == text
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be made"):
        main(Config(sae=sae, out_dir=str(tmp_path / "file"), device="cpu"))
    other = write(tmp_path / "acts", np.ones((2, 3, 4, 96), np.float32))
    with pytest.raises(ValueError, match="toy.html was made with data .*; use another --out_dir"):
        main(
            Config(
                sae=sae,
                data=[str(other)],
                out_dir=str(toy_page[0].parent),
                transfer=True,
                device="cpu",
            )
        )
    np.save(tmp_path / "inf.npy", np.full((50, 3), np.inf, np.float32))
    with pytest.raises(ValueError, match="inf.npy: prompt 0 holds numbers that are not finite"):
        main(
            Config(
                sae=str(tmp_path / "bare"),
                data=[str(tmp_path / "inf.npy")],
                out_dir=str(tmp_path),
                device="cpu",
            )
        )
    before = toy_page[0].read_bytes()
    monkeypatch.chdir(base)  # and by another path
    for name in ("saes/toy", sae):  # its own page is made again
        main(Config(sae=name, out_dir=str(toy_page[0].parent), top_images=8, device="cpu"))
    assert toy_page[0].read_bytes() == before
    capsys.readouterr()
    shutil.copytree(
        base / "acts", tmp_path / "old", ignore=shutil.ignore_patterns("images")
    )  # of an earlier version
    main(
        Config(sae=sae, data=[str(tmp_path / "old")], out_dir=str(tmp_path / "other"), device="cpu")
    )
    data = read_page(tmp_path / "other" / "toy.html")
    assert (
        "no pictures: " in data["note"]
        and "images/0.webp is not there" in data["note"]
        and not any(data["pictures"])
    )
    assert "collect again" in capsys.readouterr().out
    main(
        Config(
            sae=str(tmp_path / "bare"),
            data=[str(tmp_path / "wide.npy")],
            out_dir=str(tmp_path),
            device="cpu",
        )
    )  # vectors
    data = read_page(tmp_path / "bare.html")
    assert (
        data["examples"] == [["", "row 0", 0]]
        and "images/ of collect.py" in data["note"]
        and features.CURVE == 50
    )
