"""Reading activation files: what is refused, the split by prompt, and the seeded shuffle that
starts anywhere."""

import json
import os

import described
import numpy as np
import pytest
import torch

from errors import UsageError
from store import dataset, shuffle
from store.activation_file import check_file, open_activation_file
from store.dataset import Activations, newest_activations, open_activations
from store.disk import checksum
from store.identity import activations_of


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(dataset, "HELD_OUT", dict(share=0.1, at_least=0, at_most=10**9))
    monkeypatch.setattr(shuffle, "BLOCK_BYTES", 64)


def numbered(path, shape=(20, 3, 8), dtype=np.float32, first=0):
    """A file whose vectors are (number, number), counted through the file; returns its path."""
    numbers = first + np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    np.save(path, np.stack([numbers, numbers], -1).astype(dtype))
    return path


def describe(path, **meta):
    site = {"hook_name": "mid_block", "side": "output", "rows": "cond", "stream": "image"}
    described.describe(path, **{"format": 1} | site | meta)


def ids(tensors):
    """Numbers of vectors, from tensors or from batches of them with their steps."""
    return torch.cat([x[0] if isinstance(x, tuple) else x for x in tensors])[:, 0].long()


def test_split_is_by_prompt_and_loses_nothing(tmp_path):
    data = Activations([numbered(tmp_path / "a.npy")])
    held_out, training = ids(data.held_out()), ids(data.batches(7, data.num_training))
    assert (
        (len(held_out), len(training)) == (data.num_held_out, data.num_training) == (48, 432)
    )  # 2 prompts of 20
    assert sorted(held_out.tolist() + training.tolist()) == list(range(480))
    prompts = lambda numbers: set((numbers // 24).tolist())
    assert not prompts(held_out) & prompts(training)
    assert prompts(ids(data.sample(300)[None])) <= prompts(training)
    assert len(ids(data.sample(300)[None]).unique()) == 300
    other = Activations(data.paths, seed=1)
    assert prompts(ids(other.held_out())) != prompts(held_out)


def sides(data):
    """Sets of the units of 5 vectors, numbered from 0, that are held out and trained on."""
    return [
        set((ids(x) // 5).tolist()) for x in (data.held_out(), data.batches(100, data.num_training))
    ]


def test_all_images_of_a_prompt_are_on_one_side(tmp_path):
    describe(numbered(tmp_path / "a.npy", (40, 1, 5)), num_images_per_prompt=4)
    held_out, training = sides(Activations([tmp_path / "a.npy"]))
    assert len(held_out) == 4 and held_out | training == set(range(40))
    assert not {row // 4 for row in held_out} & {row // 4 for row in training}


def test_equal_prompts_are_on_one_side_in_all_files(tmp_path):
    rng, texts = np.random.default_rng(0), []
    for name in "ab":
        (tmp_path / name).mkdir()
        describe(numbered(tmp_path / name / "m.npy", (40, 1, 5), first=200 * len(texts) // 40))
        mine = [f"prompt {i}" for i in rng.integers(0, 15, 40)]
        (tmp_path / name / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": t}) + "\n" for t in mine)
        )
        texts += mine
    held_out, training = sides(Activations([tmp_path / "a" / "m.npy", tmp_path / "b" / "m.npy"]))
    assert held_out and training and held_out | training == set(range(80))
    assert not {texts[row] for row in held_out} & {texts[row] for row in training}
    (tmp_path / "a" / "prompts.jsonl").write_text("x")
    with pytest.raises(ValueError, match="prompts.jsonl"):
        Activations([tmp_path / "a" / "m.npy"])


@pytest.mark.parametrize("seed", range(6))
def test_never_more_than_half_is_held_out(tmp_path, seed):
    describe(numbered(tmp_path / "a.npy", (40, 1, 5)))
    texts = ["a"] * 30 + ["b"] * 10
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": t}) + "\n" for t in texts)
    )
    assert Activations([tmp_path / "a.npy"], seed).num_held_out == 50
    texts = ["a"] * 40  # one prompt, 40 seeds
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": t}) + "\n" for t in texts)
    )
    assert Activations([tmp_path / "a.npy"], seed).num_held_out == 20


def test_how_much_is_held_out(tmp_path, monkeypatch):
    path = numbered(tmp_path / "a.npy", (100, 4))
    held_out = lambda **limits: (
        monkeypatch.setattr(dataset, "HELD_OUT", limits),
        Activations([path]).num_held_out,
    )[1]
    assert held_out(share=0.1, at_least=0, at_most=10**6) == 40
    assert held_out(share=0.1, at_least=70, at_most=10**6) == 72  # whole prompts
    assert held_out(share=0.1, at_least=300, at_most=10**6) == 100  # but only up to a quarter
    assert held_out(share=0.1, at_least=0, at_most=12) == 12


@pytest.mark.parametrize("shape", [(500,), (1, 500), (1, 10, 50)])
def test_one_prompt_or_none_is_split_into_contiguous_pieces(tmp_path, shape):
    data = Activations([numbered(tmp_path / "a.npy", shape)])
    held_out = ids(data.held_out())
    assert sorted(held_out.tolist() + ids(data.batches(64, data.num_training)).tolist()) == list(
        range(500)
    )
    assert (held_out.diff() != 1).sum() < 4


@pytest.mark.parametrize("buffer_rows", [50, 10_000])
def test_shuffle_starts_anywhere_and_repeats_every_epoch(tmp_path, buffer_rows):
    data = Activations([numbered(tmp_path / "a.npy")])
    options = dict(seed=3, buffer_gb=buffer_rows * 8 / 2**30)
    stop = 2 * data.num_training + 100
    order = ids(data.batches(32, stop, **options))
    assert len(order) == stop and len(order[:432].unique()) == len(order[432:864].unique()) == 432
    assert not torch.equal(order[:432], order[432:864])
    sizes = [len(x) for x, _ in data.batches(32, stop, **options)]
    assert set(sizes[:-1]) == {32} and sizes[-1] == stop % 32
    for start in (32, 416, 448, 864):
        assert torch.equal(ids(data.batches(32, stop, start, **options)), order[start:])
    assert not torch.equal(
        ids(data.batches(32, stop, seed=4, buffer_gb=options["buffer_gb"])), order
    )
    first = (
        order[:40].sort().values
    )  # of one buffer where they are small: from all over the file, and others next time
    assert first[-4] > 300
    assert not torch.equal(first, order[432:472].sort().values)


def test_each_row_is_read_once_an_epoch_and_once_at_all_where_they_fit(tmp_path, monkeypatch):
    data, reads = Activations([numbered(tmp_path / "a.npy")]), []
    read = shuffle.Reader.read

    def counting(self, number, first, end, at):
        reads.extend(range(first, end))
        read(self, number, first, end, at)
        assert (
            at + (end - first) * self.row_bytes <= len(self.buffer) <= 3456
        )  # all rows, or the buffer

    monkeypatch.setattr(shuffle.Reader, "read", counting)
    for _ in data.batches(10, 2 * 432, buffer_gb=200 * 8 / 2**30):
        pass
    assert set(np.bincount(reads)) <= {0, 2} and len(reads) == 2 * 432
    reads.clear()
    for _ in data.batches(10, 3 * 432):
        pass
    assert len(reads) == len(set(reads)) == 432
    assert list(data.batches(10, 50, 50)) == []


def test_sample_is_drawn_alike_from_files_of_two_lengths(tmp_path):
    a, b = (
        numbered(tmp_path / "a.npy", (10, 1, 5)),
        numbered(tmp_path / "b.npy", (30, 1, 20), first=50),
    )
    data = Activations([a, b])
    training = ids(data.batches(99, data.num_training)).sort().values
    assert torch.equal(data.sample(10**6)[:, 0].long(), training)
    some = data.sample(300)[:, 0].long()
    assert (some < 50).double().mean().item() == pytest.approx(
        (training < 50).double().mean().item(), abs=0.05
    )
    assert set(some.tolist()) <= set(training.tolist()) and len(some.unique()) == 300


def test_batches_are_shuffled_by_vector_not_by_image(tmp_path):
    data = Activations([numbered(tmp_path / "a.npy", (60, 2, 16))])
    batch = next(data.batches(64, 64))[0][:, 0].long() // 16  # which image of 16 tokens
    assert len(batch.unique()) > 40  # whole images would be 4; 64 draws from 108 images give 48


def test_several_files_are_one_data_set(tmp_path):
    a, b = numbered(tmp_path / "a.npy", (10, 5)), numbered(tmp_path / "b.npy", (12, 5), first=50)
    (data,) = open_activations([tmp_path / "*.npy", a])
    assert data.paths == [str(a), str(b)] and data.num_vectors == 110
    assert sorted(
        ids(data.held_out()).tolist() + ids(data.batches(9, data.num_training)).tolist()
    ) == list(range(110))


def test_each_hook_name_is_a_data_set(tmp_path):
    metas = {
        "m": {},
        "n": {},
        "m.uncond": {"rows": "uncond"},
        "other": {"model": "other"},
        "u": {"hook_name": "up"},
    }
    for first, (name, meta) in enumerate(metas.items()):
        describe(numbered(tmp_path / f"{name}.npy", first=first), **meta)
    for name in ("samples", "progress", "m.tokens"):
        numbered(tmp_path / f"{name}.npy")
    (tmp_path / "collect.json").write_text("{}")
    for data in (
        [tmp_path],
        [tmp_path / "*.npy"],
        [tmp_path, tmp_path / "m.npy", tmp_path / ".." / tmp_path.name / "?.npy"],
    ):
        sets = open_activations(data)
        names = [[path[len(str(tmp_path)) + 1 :] for path in s.paths] for s in sets]
        assert names == [["m.npy", "n.npy"], ["m.uncond.npy"], ["other.npy"], ["u.npy"]]
        assert sets[3].hook_name == "up"
    assert [data.paths for data in open_activations([tmp_path / "samples.npy"])] == [
        [str(tmp_path / "samples.npy")]
    ]


def test_an_unfinished_collection_is_refused_in_one_line(tmp_path):
    numbered(tmp_path / "a.npy").rename(tmp_path / "a.npy.partial")
    (tmp_path / "collect.json").write_text("{}")
    numbered(tmp_path / "progress.npy")
    for item in (tmp_path / "a.npy", tmp_path / "a.npy.partial", tmp_path, tmp_path / "*.npy"):
        with pytest.raises(
            UsageError,
            match="a.npy.partial is not finished.*smaller --max_num_examples finishes it",
        ):
            open_activations([item])
    with pytest.raises(UsageError, match="a.npy.partial is not finished"):
        newest_activations(tmp_path)
    with pytest.raises(OSError, match="no such file"):
        open_activations([tmp_path / "b.npy"])
    describe(numbered(tmp_path / "b.npy"))  # beside a finished file it is no data
    for item in (tmp_path, tmp_path / "*.npy"):
        assert [data.paths for data in open_activations([item])] == [[str(tmp_path / "b.npy")]]
    assert newest_activations(tmp_path) == tmp_path / "b.npy"


@pytest.mark.parametrize("names", [("node0", "node1"), ("shard0of2", "shard1of2")])
def test_a_folder_means_its_own_files_or_else_those_of_its_subfolders(tmp_path, names):
    for number, name in enumerate(names):
        (tmp_path / name / "deeper").mkdir(parents=True)
        (tmp_path / name / "collect.json").write_text("{}")
        describe(numbered(tmp_path / name / "m.npy", (10, 4), first=40 * number))
        describe(numbered(tmp_path / name / "n.npy", (10, 4), first=40 * number), hook_name="other")
        numbered(tmp_path / name / "samples.npy")
        describe(numbered(tmp_path / name / "deeper" / "m.npy"))
    (tmp_path / "notes.txt").write_text("")
    paths = [[str(tmp_path / name / f"{file}.npy") for name in names] for file in "mn"]
    assert [data.paths for data in open_activations([tmp_path])] == paths
    assert [data.paths for data in open_activations([tmp_path / name for name in names])] == paths
    os.utime(tmp_path / names[0] / "m.json", (2e9, 2e9))
    (data,) = open_activations([newest_activations(tmp_path)])
    assert data.paths == paths[0] and data.num_vectors == 80 and data.num_prompts == 20

    (tmp_path / "empty").mkdir()
    assert len(open_activations([tmp_path])) == 2
    numbered(tmp_path / "empty" / "m.npy").rename(
        tmp_path / "empty" / "m.npy.partial"
    )  # a part that is still collected
    with pytest.raises(UsageError, match="empty/m.npy.partial is not finished"):
        open_activations([tmp_path])
    describe(numbered(tmp_path / "own.npy"))
    assert [data.paths for data in open_activations([tmp_path])] == [[str(tmp_path / "own.npy")]]


def test_a_listing_that_is_ahead_of_its_file(tmp_path):
    """A larger --max_num_examples lists all prompts before its first batch is written; the split
    stays by text."""
    describe(numbered(tmp_path / "a.npy", (4, 5)))
    texts = ["a", "b", "a", "b", "c", "d"]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": t}) + "\n" for t in texts)
    )
    assert Activations([tmp_path / "a.npy"]).num_prompts == 2
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UsageError, match="does not say the prompts"):
        Activations([tmp_path / "a.npy"])


def test_an_opened_file_says_what_its_axes_are(tmp_path):
    shapes = {
        (12, 2): (1, 1, 12),
        (3, 4, 2): (3, 1, 4),
        (3, 5, 4, 2): (3, 5, 4),
        (3, 5, 2, 2, 2): (3, 5, 4),
    }
    for number, (shape, axes) in enumerate(shapes.items()):
        np.save(tmp_path / f"{number}.npy", np.ones(shape, np.float32))
        file = open_activation_file(tmp_path / f"{number}.npy")
        assert (file.P, file.S, file.T) == axes and file.d == 2
        assert (
            file.grid == (axes[2],)
            and file.tokens_kept is None
            and file.prompt_rows is None
            and file.lengths is None
        )
    path = tmp_path / "2.npy"
    describe(path, grid=[2, 2])
    assert open_activation_file(path).grid == (2, 2)
    describe(path, grid=[4, 4])
    assert open_activation_file(path).grid == (4,)  # a grid of another file
    np.save(tmp_path / "2.tokens.npy", np.zeros((3, 5, 4), np.uint16))
    file = open_activation_file(path)
    assert file.grid == (4, 4) and file.read_tokens_kept(2).shape == (5, 4)  # 4 tokens of the 16
    np.save(tmp_path / "2.tokens.npy", np.zeros((3, 5, 3), np.uint16))
    with pytest.raises(
        UsageError, match=r"2.tokens.npy is of another.*shape \(3, 5, 3\), expected \(3, 5, 4\)"
    ):
        open_activation_file(path).tokens_kept  # noqa: B018


@pytest.mark.parametrize("prompts", [1, 4])
def test_padding_of_text_is_not_read(tmp_path, prompts):
    """Of one prompt alone neither."""
    path = numbered(tmp_path / "a.npy", (prompts, 3, 5))
    describe(path, stream="text", shape=[prompts, 3, 5, 2])
    lengths = [2, 5, 1, 4][:prompts]
    np.save(tmp_path / "a.lengths.npy", np.array(lengths))
    data = Activations([path])
    found = ids([*data.held_out(), *data.batches(4, data.num_training)])
    expected = [
        (p * 3 + s) * 5 + t for p in range(prompts) for s in range(3) for t in range(lengths[p])
    ]
    assert sorted(found.tolist()) == expected and data.whole_prompts == (prompts > 1)
    np.save(tmp_path / "a.lengths.npy", np.array([*lengths, 1]))
    with pytest.raises(UsageError, match="is of another collection"):
        Activations([path])
    (tmp_path / "a.lengths.npy").write_bytes(b"")
    with pytest.raises(UsageError, match="a.lengths.npy is missing or damaged"):
        Activations([path])


class Model:
    """What activations_of looks at in an SAE."""

    def __init__(self, d_in, **cfg):
        self.d_in, self.cfg, self.training_prompts = d_in, cfg, None


def test_the_activations_of_an_sae(tmp_path):
    a, b = numbered(tmp_path / "a.npy"), numbered(tmp_path / "b.npy")
    assert activations_of(Model(2, data=[str(a)]), "sae").paths == [str(a)]
    assert activations_of(Model(2, data=[str(a)]), "sae", [str(b)]).paths == [str(b)]
    with pytest.raises(
        UsageError, match="sae does not say which files it was trained on; name some with --data"
    ):
        activations_of(Model(2), "sae")
    with pytest.raises(UsageError, match="holds vectors of width 2, and the SAE takes width 3"):
        activations_of(Model(3, data=[str(a)]), "sae")
    describe(b)
    with pytest.raises(
        UsageError, match="--data holds 2 hook points or models; expected the files of one"
    ):
        activations_of(Model(2), "sae", [str(a), str(b)])


def saved_rows(folder, x, column="activations", plain=False, shards=2, **columns):
    from datasets import Array2D, Dataset, Features, disable_progress_bars

    disable_progress_bars()
    data = Dataset.from_dict({column: x.tolist() if plain else x, **columns})
    if not plain:
        data = data.cast(Features(data.features | {column: Array2D(x.shape[1:], str(x.dtype))}))
    data.save_to_disk(folder, num_shards=shards)
    return folder


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_saved_by_the_ancestor(tmp_path, dtype):
    x = np.arange(36 * 4, dtype=dtype).reshape(36, 4, 1).repeat(2, 2)
    times = np.tile(np.array([900, 500, 100], np.uint16), 12)
    data = open_activations(
        [saved_rows(tmp_path / "up.1", x, shards=5, timestep=times, label=["a"] * 36)]
    )[0]
    assert (data.hook_name, data.d, data.num_prompts, data.timesteps) == (
        "up.1",
        2,
        12,
        [900, 500, 100],
    )
    assert data.whole_prompts and data.sample_tokens() == 4
    assert {path for path, *_ in data.files} == {
        str(tmp_path / "up.1" / f"data-0000{i}-of-00005.arrow") for i in range(5)
    }
    held_out = ids(data.held_out())
    for buffer_gb in (1, 1e-6):
        found = list(data.batches(9, data.num_training, buffer_gb=buffer_gb))
        assert found[0][0].dtype == (torch.float16 if dtype == np.float16 else torch.float32)
        numbers = ids(found)
        assert sorted([*numbers.tolist(), *held_out.tolist()]) == list(range(144))
        assert torch.equal(torch.cat([step for _, step in found]), numbers // 4 % 3)
    assert not set((held_out // 12).tolist()) & set((numbers // 12).tolist())  # of other images


def test_rows_of_random_timesteps_are_no_run_of_one_prompt(tmp_path):
    """40,000 of them would be as many steps, more than 16 bits count."""
    x = np.arange(40_000, dtype=np.float32)[:, None, None]
    times = np.random.default_rng(0).random(40_000)
    data = open_activations([saved_rows(tmp_path / "a", x, timestep=times)])[0]
    assert (data.num_prompts, data.timesteps, data.whole_prompts) == (
        0,
        [],
        False,
    )  # it is not known which show one image
    found = torch.cat(
        [*data.held_out(), *(x for x, _ in data.batches(4096, data.num_training))]
    ).flatten()
    assert torch.equal(found.sort().values, torch.arange(40_000.0))


def test_rows_saved_as_lists_and_by_file_name(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 4, 8)).astype(np.float32)
    names = [f"{i // 5}.png" for i in range(30)]
    data = open_activations([saved_rows(tmp_path / "a", x, "values", plain=True, file_name=names)])[
        0
    ]
    assert data.num_prompts == 6 and data.timesteps == []
    rows = torch.cat([*data.held_out(), *(x for x, _ in data.batches(16, data.num_training))])
    assert sorted(map(tuple, rows.float().tolist())) == sorted(
        map(tuple, x.reshape(-1, 8).tolist())
    )
    flat = open_activations([saved_rows(tmp_path / "b", x[:, 0], plain=True)])[0]
    assert (flat.num_vectors, flat.d, flat.num_prompts, flat.whole_prompts) == (30, 8, 0, False)
    assert len(open_activations([tmp_path / "*"])) == 2
    with pytest.raises(ValueError, match="columns.*'other'"):
        open_activations([saved_rows(tmp_path / "c", x, "other")])
    with pytest.raises(ValueError, match="levels of lists of int64"):
        open_activations([saved_rows(tmp_path / "d", x.astype(int), plain=True)])
    ragged = [[[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0]]]
    for name, rows in (
        ("2 lengths", ragged * 2),
        ("different shapes", ragged),
    ):  # in one file, in two
        saved_rows(tmp_path / name, np.array([*rows, None], object)[:-1], plain=True)
        with pytest.raises(ValueError, match=name):
            open_activations([tmp_path / name])
    (tmp_path / "b" / "data-00000-of-00002.arrow").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="data-00000-of-00002.arrow is missing or not"):
        open_activations([tmp_path / "b"])


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_rows_are_refused(tmp_path, compression):
    """Their numbers do not lie in the file, so a place in it would be a number out of the air."""
    import pyarrow as pa

    x = np.random.default_rng(0).normal(size=(30, 4, 8)).astype(np.float32)
    folder = saved_rows(tmp_path / "a", x, plain=True, shards=1)
    [path] = folder.glob("*.arrow")
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(str(path), table.schema, options=options) as stream:
        stream.write_table(table)
    with pytest.raises(UsageError, match="arrow is compressed.*save it again"):
        open_activations([folder])


def test_a_folder_of_plain_files_is_one_data_set(tmp_path):
    paths = [str(numbered(tmp_path / f"{name}.npy", first=ord(name))) for name in "ab"]
    assert [data.paths for data in open_activations([tmp_path])] == [paths]


def test_newest(tmp_path):
    with pytest.raises(ValueError, match="collect.py first"):
        newest_activations(tmp_path)
    describe(numbered(tmp_path / "a.npy"))
    numbered(tmp_path / "samples.npy")
    assert newest_activations(tmp_path).name == "a.npy"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(tmp_path, dtype):
    data = Activations([numbered(tmp_path / "a.npy", (30, 10), dtype)])
    assert data.sample(9).dtype == torch.float32
    assert next(data.batches(4, 4))[0].dtype == (
        torch.float16 if dtype == np.float16 else torch.float32
    )


def test_bfloat16_needs_its_description(tmp_path):
    values = torch.randn(10, 4, 3).bfloat16()
    np.save(tmp_path / "a.npy", values.view(torch.uint16).numpy())
    with pytest.raises(ValueError, match="uint16"):
        check_file(tmp_path / "a.npy")
    describe(tmp_path / "a.npy", dtype="bfloat16", shape=[10, 4, 3])
    data = Activations([tmp_path / "a.npy"])
    rows = torch.cat([*data.held_out(), *(x for x, _ in data.batches(5, data.num_training))])
    assert rows.dtype == torch.bfloat16
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, values.flatten(0, 1).tolist()))


def bad_files(folder):
    good = numbered(folder / "good.npy").read_bytes()
    np.save(folder / "integers.npy", np.zeros((4, 4), np.int64))
    np.save(folder / "complex.npy", np.zeros((4, 4), np.complex64))
    np.save(folder / "big endian.npy", np.zeros((4, 4), ">f4"))
    np.save(folder / "vector.npy", np.zeros(4, np.float32))
    np.save(folder / "single.npy", np.zeros((1, 4), np.float32))
    np.save(folder / "no rows.npy", np.zeros((0, 4), np.float32))
    np.save(folder / "columns.npy", np.asfortranarray(np.zeros((4, 5), np.float32)))
    np.save(folder / "objects.npy", np.array([[{}, {}]], object), allow_pickle=True)
    (folder / "truncated.npy").write_bytes(good[:-8])
    (folder / "header.npy").write_bytes(good[:50])
    (folder / "empty.npy").write_bytes(b"")
    (folder / "text.npy").write_text("hello")
    (folder / "unfinished.npy.partial").write_bytes(good)
    return sorted(path for path in folder.iterdir() if path.name != "good.npy")


def test_bad_files_are_refused_by_name(tmp_path):
    files = bad_files(tmp_path)
    assert len(files) == 13
    for path in files:
        with pytest.raises(ValueError) as caught:
            open_activations([path])
        assert path.name in str(caught.value)
    with pytest.raises(OSError, match="no such file"):
        open_activations([tmp_path / "missing.npy"])
    with pytest.raises(ValueError, match="no .npy file"):
        open_activations([tmp_path / "missing*.npy"])


def test_files_that_do_not_fit_together(tmp_path):
    numbered(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.zeros((5, 3), np.float32))
    with pytest.raises(ValueError, match="width 3"):
        open_activations([tmp_path / "?.npy"])


def test_damaged_description(tmp_path):
    path = numbered(tmp_path / "a.npy")
    describe(path, shape=[20, 3, 8, 2])
    check_file(path)
    text = path.with_suffix(".json").read_text()
    path.with_suffix(".json").write_text(text.replace("mid_block", "mid_blocK"))
    with pytest.raises(ValueError, match="checksum"):
        check_file(path)
    path.with_suffix(".json").write_text(text[:30])
    with pytest.raises(ValueError, match="a.json"):
        check_file(path)
    describe(path, shape=[21, 3, 8, 2])
    with pytest.raises(ValueError, match="its .json says"):
        check_file(path)


def test_batches_hold_every_step_alike(tmp_path):
    describe(
        numbered(tmp_path / "a.npy", (20, 5, 8)),
        timesteps=[900, 700, 500, 300, 100],
        shape=[20, 5, 8, 2],
    )
    data = Activations([tmp_path / "a.npy"])
    assert data.timesteps == [900, 700, 500, 300, 100]
    found = list(data.batches(50, 2 * data.num_training))
    numbers = ids(found)
    assert sorted(numbers[: data.num_training].tolist()) == sorted(
        numbers[data.num_training :].tolist()
    )
    steps = numbers // 8 % 5
    assert torch.equal(torch.cat([step for _, step in found]), steps)
    counts = torch.stack([batch.bincount(minlength=5) for batch in steps[:700].split(50)])
    assert counts.min() >= 8 and counts.max() <= 12  # by chance they would run from 4 to 18
    pieces = data.draw(100)
    assert (data.read(pieces)[:, 0].long() // 8 % 5).tolist() == data.steps_of(pieces).tolist()


def test_files_whose_timesteps_differ_have_none(tmp_path):
    for name, times in ("a", [3, 2, 1]), ("b", [3, 2, 0]):
        describe(numbered(tmp_path / f"{name}.npy"), timesteps=times, shape=[20, 3, 8, 2])
    assert Activations([tmp_path / "a.npy"]).timesteps == [3, 2, 1]
    assert Activations([tmp_path / "a.npy", tmp_path / "b.npy"]).timesteps == []


def test_whole_samples_stay_together(tmp_path):
    describe(
        numbered(tmp_path / "a.npy", (20, 5, 8)),
        timesteps=[900, 700, 500, 300, 100],
        shape=[20, 5, 8, 2],
    )
    data = Activations([tmp_path / "a.npy"])
    assert data.sample_tokens() == 8
    for buffer_gb in (1, 2e-6):
        whole = ids(data.batches(40, data.num_training, buffer_gb=buffer_gb, tokens=8))
        samples = whole.view(-1, 8)
        assert sorted(whole.tolist()) == sorted(ids(data.batches(40, data.num_training)).tolist())
        assert (samples[:, 0] % 8 == 0).all() and (
            samples - samples[:, :1] == torch.arange(8)
        ).all()
        assert (samples[:, 0] // 8).diff().ne(1).float().mean() > 0.8
        again = ids(data.batches(40, data.num_training, 240, buffer_gb=buffer_gb, tokens=8))
        assert torch.equal(again, whole[240:])
    np.save(tmp_path / "flat.npy", np.zeros((100, 2), np.float32))
    with pytest.raises(ValueError, match="whole samples"):
        Activations([tmp_path / "flat.npy"]).sample_tokens()


def test_a_flipped_byte_in_a_description_is_seen(tmp_path):
    """Each byte in turn, also of the word "checksum": refused, or the same content."""
    record = {
        "format": 1,
        "hook_name": "a.b",
        "mean_norm": [1.5, 2.0],
        "shape": [2, 3, 4, 5],
        "timesteps": [900.0, 1.0],
    }
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4, 5), np.float32))
    record, path = record | {"checksum": checksum(record)}, tmp_path / "a.json"
    data, refused = json.dumps(record, indent=1).encode(), 0
    for place in range(len(data)):
        for flip in (1, 2, 32, 255):
            path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            try:
                assert check_file(tmp_path / "a.npy")[1] == record
            except ValueError:
                refused += 1
    assert refused > 2 * len(data)


def test_choose_held_out_by_hand(monkeypatch):
    """20 prompts of 10 vectors: a tenth, the limits, and the prompts that an SAE has not seen."""
    sizes = np.full(20, 10.0)
    order = np.random.default_rng([0, 0]).permutation(20)
    for limits, expected in (
        (dict(share=0.1, at_least=0, at_most=10**9), 2),
        (dict(share=0.1, at_least=30, at_most=10**9), 3),
        (dict(share=0.1, at_least=10**9, at_most=10**9), 5),  # a quarter
        (dict(share=0.4, at_least=0, at_most=35), 4),  # the rest of the fourth prompt too
    ):
        monkeypatch.setattr(dataset, "HELD_OUT", limits)
        is_held_out = dataset.choose_held_out(sizes, seed=0, is_unseen=None)
        assert sorted(np.flatnonzero(is_held_out)) == sorted(order[:expected])
    is_unseen = np.isin(np.arange(20), [3, 11, 12])
    assert (dataset.choose_held_out(sizes, 0, is_unseen) == is_unseen).sum() == 20
    monkeypatch.setattr(dataset, "HELD_OUT", dict(share=0.1, at_least=0, at_most=20))
    assert dataset.choose_held_out(sizes, 0, is_unseen)[is_unseen].sum() == 2

    # one huge prompt: the smaller side is held out, and at least one prompt is trained on
    monkeypatch.setattr(dataset, "HELD_OUT", dict(share=0.1, at_least=0, at_most=10**9))
    is_held_out = dataset.choose_held_out(np.array([1000.0, 1, 1]), 0, None)
    assert not is_held_out[0] and is_held_out.any()
