"""features.py: its numbers and maps against dense ones, the words of a feature, and images of every kind."""

import io
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pages import grey_of, read_page, save_grey_images, shown_image, write_block
from PIL import Image

import features
from features import (
    Config,
    Example,
    MapGrid,
    PromptWord,
    Statistics,
    list_examples,
    main,
    map_grid,
    nearest,
    over_represented,
    read_shown,
    scan,
    telling,
)
from sae import Sae
from store.dataset import open_activations

pytestmark = pytest.mark.slow


class Kind(NamedTuple):
    """A kind of activation file, and the size of its heat maps."""

    grid: list[int]
    map_shape: tuple[int, int, int]
    map_size: int = 16
    """The largest side of a map that the page is asked for."""


KINDS = {
    "image": Kind(grid=[4, 6], map_shape=(1, 2, 3), map_size=3),
    "video": Kind(grid=[4, 4, 6], map_shape=(2, 2, 3), map_size=6),
    "line": Kind(grid=[9], map_shape=(1, 1, 9)),
    "text": Kind(grid=[9], map_shape=(1, 1, 9)),
    "part": Kind(grid=[4, 6], map_shape=(1, 4, 6)),  # 5 of the 24 tokens are stored
    "samples": Kind(grid=[4, 6], map_shape=(1, 4, 6)),  # an SAE that takes all tokens of an image
}
NUM_STEPS = 3
NUM_LATENTS = 11


def cell_of(position, kind):
    """The cell of the heat map in which a token lies, from the token's position on the grid."""
    if len(kind.grid) == 1:
        return position
    _, height, width = kind.map_shape
    frame = position // 24 // 2  # four frames of tokens share two frames of the map
    row = position % 24 // 6
    column = position % 6
    return (frame * height + row * height // 4) * width + column * width // 6


def dense_codes(sae, vectors, together):
    """The activations of all latents in float64, (n, M). together: the vectors are one sample."""
    encoded = sae.encode(vectors[None] if together else vectors)
    top_indices = encoded.top_indices.flatten(0, -2).detach()
    top_acts = encoded.top_acts.flatten(0, -2).detach()
    return torch.zeros(len(vectors), NUM_LATENTS).scatter_add(1, top_indices, top_acts).double()


class DenseStatistics:
    """The numbers of the page by loops over images, steps and tokens."""

    def __init__(self):
        self.counts = np.zeros((NUM_LATENTS, NUM_STEPS), int)
        self.sums = np.zeros((NUM_LATENTS, NUM_STEPS))
        self.largest = np.zeros(NUM_LATENTS)
        self.maps = []  # for each image (M, cells)

    def add_image(self, sae, steps, positions, kind, together):
        """steps: for each step its vectors (n, d); positions: for each step those of the tokens."""
        num_cells = int(np.prod(kind.map_shape))
        heat = np.zeros((NUM_LATENTS, num_cells))
        tokens_in_cell = np.zeros(num_cells)
        for step, vectors in enumerate(steps):
            if not len(vectors):
                continue
            acts = dense_codes(sae, vectors, together)
            self.counts[:, step] += (acts > 0).sum(0).numpy()
            self.sums[:, step] += acts.sum(0).numpy()
            self.largest = np.maximum(self.largest, acts.amax(0).numpy())
            for position, row in zip(positions[step], acts.numpy()):
                cell = cell_of(position, kind)
                heat[:, cell] += row
                tokens_in_cell[cell] += 1
        self.maps.append(heat / np.maximum(tokens_in_cell, 1))


@pytest.mark.parametrize("batch_size", [3, 20, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_maps_are_those_of_the_dense_expression(kind, batch_size, tmp_path):
    """Two files, every vector's activations as a whole (N, M) matrix in float64, and means, counts
    and maps by loops."""
    rng = np.random.default_rng(0)
    num_tokens = 5 if kind == "part" else int(np.prod(KINDS[kind].grid))
    files = []
    for num_prompts in (4, 3):
        files.append(rng.standard_normal((num_prompts, NUM_STEPS, num_tokens, 6), np.float32))
    lengths = [[9, 4, 0, 1], [2, 9, 3]]  # of the texts
    kept = [rng.integers(0, 24, x.shape[:3]) for x in files]  # the positions of the stored tokens
    stream = "text" if kind == "text" else "image"
    paths = []
    for name, x, file_lengths, positions in zip("ab", files, lengths, kept):
        path = write_block(tmp_path / name, x, grid=KINDS[kind].grid, stream=stream)
        if kind == "text":
            np.save(path.with_suffix(".lengths.npy"), np.array(file_lengths))
        if kind == "part":
            np.save(path.with_suffix(".tokens.npy"), positions)
        paths.append(path)

    together = kind == "samples"
    if together:
        sae = Sae(6, NUM_LATENTS, 20, {"activation": "sampletopk"})
    else:
        sae = Sae(6, NUM_LATENTS, 2)
    activations = open_activations(paths)[0]
    grids = [map_grid(file, KINDS[kind].map_size, 2) for file in activations.sources]
    statistics = scan(sae, activations, grids, 2, batch_size)

    dense = DenseStatistics()
    for x, file_lengths, file_positions in zip(files, lengths, kept):
        for image, length, positions in zip(x, file_lengths, file_positions):
            if kind != "text":
                length = num_tokens
            if kind != "part":
                positions = [range(num_tokens)] * NUM_STEPS
            steps = torch.from_numpy(image)[:, :length]
            dense.add_image(sae, steps, positions, KINDS[kind], together)

    num_vectors = 28 if kind == "text" else 7 * num_tokens
    assert grids[0].shape == KINDS[kind].map_shape
    assert statistics.vectors.tolist() == [num_vectors] * NUM_STEPS
    assert np.array_equal(statistics.counts, dense.counts)
    assert np.allclose(statistics.sums, dense.sums)
    assert np.allclose(statistics.largest, dense.largest)

    maps = np.stack(dense.maps)  # (images, M, cells)
    for latent, peaks in enumerate(maps.max(2).T):
        best = np.argsort(-peaks)[:2]
        best = best[peaks[best] > 0]
        assert statistics.examples[latent][: len(best)].tolist() == best.tolist()
        assert (statistics.examples[latent][len(best) :] == -1).all()
        assert np.allclose(statistics.peaks[latent][: len(best)], peaks[best])
        for number, image in enumerate(best):
            levels = statistics.maps[latent, number].numpy()  # whole numbers, 255 for the peak
            error = np.abs(levels / 255 * peaks[image] - maps[image, latent])
            assert error.max() <= 0.6 / 255 * peaks[image]


def test_two_files_are_one_page(tmp_path):
    rng = np.random.default_rng(0)
    paths = [
        write_block(tmp_path / name, rng.standard_normal((P, 3, 6, 4), np.float32), grid=[2, 3])
        for name, P in (("a", 4), ("b", 3))
    ]
    Sae(4, 8, 2).save_to_disk(tmp_path / "sae")
    for path, size in zip(paths, (8, 40)):
        save_grey_images(path, [(size, 10)] * len(np.load(path)))
    config = dict(
        sae=str(tmp_path / "sae"), data=[str(path) for path in paths], out_dir=str(tmp_path)
    )
    page = main(Config(**config, picture_size=20, device="cpu"))
    data = read_page(page)
    assert page == tmp_path / "sae.html"
    assert data["note"] == ""
    assert [source for _, _, source in data["examples"]] == [0] * 4 + [1] * 3
    assert data["examples"][5][:2] == ["b prompt 1", "b/ row 1, seed 1"]
    # made smaller, never larger
    assert [shown_image(data, e).shape for e in (0, 6)] == [
        (10, 8, 3),
        (5, 20, 3),
    ]
    assert [
        abs(float(shown_image(data, e).mean()) - grey_of(p)) < 3
        for e, p in ((3, 3), (4, 0), (6, 2))
    ] == [True] * 3


def test_examples_are_counted_without_a_progress_bar(tmp_path, monkeypatch):
    """With TQDM_DISABLE set, a bar counts nothing."""
    x = np.random.default_rng(0).standard_normal((5, 2, 6, 4), np.float32)
    Sae(4, 8, 2).save_to_disk(tmp_path / "sae")
    path = str(write_block(tmp_path / "a", x, grid=[2, 3]))
    config = dict(sae=str(tmp_path / "sae"), data=[path], device="cpu")
    shown = read_page(main(Config(**config, out_dir=str(tmp_path / "1"))))
    monkeypatch.setattr(features, "tqdm", partial(features.tqdm, disable=True))
    hidden = read_page(main(Config(**config, out_dir=str(tmp_path / "2"))))
    assert hidden["top"] == shown["top"]
    assert len(hidden["examples"]) == 5


def words_and_counts(texts, chosen):
    """`over_represented` without the deviations."""
    words_of_features = over_represented(texts, chosen)
    return [[(word, count) for word, count, _ in of_feature] for of_feature in words_of_features]


def test_words_are_monroes_log_odds():
    texts = ["a red fox", "a red cat", "the red dog", "a blue fox", "a blue cat", "a blue dog"] + [
        "a blue bird"
    ] * 5
    words = words_and_counts(texts, torch.tensor([[0, 1, 2], [3, 4, 6], [0, -1, -1], [-1, -1, -1]]))
    assert words[1:] == [[], [], []]  # blue is common, and one prompt with a word proves nothing
    # by hand: red in 3 of 3 chosen and 0 of 4 other distinct texts, prior 10 * 3 / 8
    delta = np.log(6.75 / 6.25) - np.log(3.75 / 10.25)
    assert (delta / np.sqrt(1 / 6.75 + 1 / 3.75) >= 1.96) == bool(words[0])
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


def test_no_word_is_over_represented_where_all_prompts_are_shown():
    """There are no other prompts to compare with: "a" was said of 12 of 12."""
    texts = [f"a {color} fox" for color in ("red", "blue", "green", "pink") * 3]
    assert words_and_counts(texts, torch.arange(12)[None]) == [[]]
    different = [f"{text} {number}" for number, text in enumerate(texts)]
    assert words_and_counts(different, torch.arange(12)[None]) == [[]]
    assert words_and_counts([*different, "a dog"], torch.arange(12)[None]) == [[("fox", 12)]]


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
        assert torch.equal(indices, cosines.topk(4).indices)
        assert torch.allclose(values, cosines.topk(4).values, atol=1e-6)
    assert nearest(W[:2], 6)[0].tolist() == [[1], [0]]


def test_images_of_every_kind(tmp_path):
    """A still one, an animated one (its middle frame), sound, a damaged file, none, a file of
    another program."""
    frames = [Image.new("RGB", (30, 20), (40 * i, 0, 0)) for i in range(5)]
    (tmp_path / "images").mkdir()

    def path(p):
        return tmp_path / "images" / (f"{p}.wav" if p == 2 else f"{p}.webp")

    frames[1].save(path(0), lossless=True)
    frames[0].save(path(1), save_all=True, append_images=frames[1:], lossless=True)
    path(2).write_bytes(b"RIFF")
    path(3).write_bytes(path(0).read_bytes()[:20])
    Image.new("RGBA", (300, 20), (0, 200, 0, 255)).save(path(4))

    def example(p):
        return Example(0, "", "", "", None if p is None else path(p), None)

    def read(*numbers):
        still = MapGrid((1, 2, 3), (1, 2, 3), 1.5)
        return read_shown([example(number) for number in numbers], [still], Config(picture_size=60))

    shown, note = read(0, 1, 4)
    assert note == ""
    assert shown[0].film == shown[2].film == ()
    assert shown[1].picture is None
    assert [frame for frame, _ in shown[1].film] == [0] * 5
    images = [shown[0].picture, shown[1].film[2][1], shown[2].picture]
    opened = [Image.open(io.BytesIO(image)) for image in images]
    assert [(image.format, image.size) for image in opened] == [
        ("WEBP", (30, 20)),
        ("WEBP", (30, 20)),
        ("WEBP", (60, 4)),
    ]
    for image, colour in zip(opened, ((40, 0, 0), (80, 0, 0), (0, 200, 0))):
        assert np.abs(np.asarray(image).mean((0, 1)) - colour).max() < 6
    for number, message in ((2, "2.wav is not there or can't be read; collect again"), (3, "3.webp is not there or can't be read; collect again"),
                         (9, "9.webp is not there"), (None, "prompts.jsonl and images/ of collect.py are not")):  # fmt: skip
        shown, note = read(number)
        assert shown[0].is_missing
        assert message in note
        assert note.startswith("no pictures: ")
    shown, note = read(0, 9)
    assert shown[0].picture
    assert shown[1].is_missing
    assert note.startswith("some pictures are missing: ")
    assert read() == ([], "")


def test_only_files_of_collect_have_images(tmp_path):
    rng = np.random.default_rng(0)
    path = write_block(tmp_path / "a", rng.standard_normal((2, 3, 6, 4), np.float32), grid=[2, 3])
    assert [example.image for example in list_examples(open_activations([path])[0])] == [
        tmp_path / "a" / "images" / f"{p}.webp" for p in range(2)
    ]
    path.with_suffix(".json").unlink()
    assert [example.image for example in list_examples(open_activations([path])[0])] == [None, None]
