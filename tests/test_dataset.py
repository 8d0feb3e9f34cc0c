"""store/dataset.py: the split by prompt, the seeded order of batches, and which files are one data set."""

import os

import numpy as np
import pytest
import torch
from described import describe_mid_block, numbered_file, vector_numbers
from files import write_lines

from errors import UsageError
from store import dataset, shuffle
from store.dataset import Activations, newest_activations, open_activations
from store.identity import activations_of

pytestmark = pytest.mark.usefixtures("small_data")


def test_split_is_by_prompt_and_loses_nothing(tmp_path):
    data = Activations([numbered_file(tmp_path / "a.npy")])
    held_out = vector_numbers(data.held_out())
    training = vector_numbers(data.batches(7, data.num_training))
    # 2 prompts of 20
    assert (len(held_out), len(training)) == (data.num_held_out, data.num_training) == (48, 432)
    assert sorted(held_out.tolist() + training.tolist()) == list(range(480))

    def prompts(numbers):
        return set((numbers // 24).tolist())

    assert not prompts(held_out) & prompts(training)
    assert prompts(vector_numbers(data.sample(300)[None])) <= prompts(training)
    assert len(vector_numbers(data.sample(300)[None]).unique()) == 300
    other = Activations(data.paths, seed=1)
    assert prompts(vector_numbers(other.held_out())) != prompts(held_out)


def sides(data):
    """Sets of the units of 5 vectors, numbered from 0, that are held out and trained on."""
    return [
        set((vector_numbers(x) // 5).tolist())
        for x in (data.held_out(), data.batches(100, data.num_training))
    ]


def test_all_images_of_a_prompt_are_on_one_side(tmp_path):
    describe_mid_block(numbered_file(tmp_path / "a.npy", (40, 1, 5)), num_images_per_prompt=4)
    held_out, training = sides(Activations([tmp_path / "a.npy"]))
    assert len(held_out) == 4
    assert held_out | training == set(range(40))
    assert not {row // 4 for row in held_out} & {row // 4 for row in training}


def test_equal_prompts_are_on_one_side_in_all_files(tmp_path):
    rng = np.random.default_rng(0)
    texts = []
    for name in "ab":
        (tmp_path / name).mkdir()
        describe_mid_block(
            numbered_file(tmp_path / name / "m.npy", (40, 1, 5), first=200 * len(texts) // 40)
        )
        mine = [f"prompt {i}" for i in rng.integers(0, 15, 40)]
        write_lines(tmp_path / name / "prompts.jsonl", [{"prompt": t} for t in mine])
        texts += mine
    held_out, training = sides(Activations([tmp_path / "a" / "m.npy", tmp_path / "b" / "m.npy"]))
    assert held_out
    assert training
    assert held_out | training == set(range(80))
    assert not {texts[row] for row in held_out} & {texts[row] for row in training}
    (tmp_path / "a" / "prompts.jsonl").write_text("x")
    with pytest.raises(ValueError, match="prompts.jsonl"):
        Activations([tmp_path / "a" / "m.npy"])


@pytest.mark.parametrize("seed", range(6))
def test_never_more_than_half_is_held_out(tmp_path, seed):
    describe_mid_block(numbered_file(tmp_path / "a.npy", (40, 1, 5)))
    texts = ["a"] * 30 + ["b"] * 10
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": t} for t in texts])
    assert Activations([tmp_path / "a.npy"], seed).num_held_out == 50
    texts = ["a"] * 40  # one prompt, 40 seeds
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": t} for t in texts])
    assert Activations([tmp_path / "a.npy"], seed).num_held_out == 20


def test_how_much_is_held_out(tmp_path, monkeypatch):
    path = numbered_file(tmp_path / "a.npy", (100, 4))

    def held_out(**limits):
        return (
            monkeypatch.setattr(dataset, "HELD_OUT", limits),
            Activations([path]).num_held_out,
        )[1]

    assert held_out(share=0.1, at_least=0, at_most=10**6) == 40
    assert held_out(share=0.1, at_least=70, at_most=10**6) == 72  # whole prompts
    assert held_out(share=0.1, at_least=300, at_most=10**6) == 100  # but only up to a quarter
    assert held_out(share=0.1, at_least=0, at_most=12) == 12


@pytest.mark.parametrize("shape", [(500,), (1, 500), (1, 10, 50)])
def test_one_prompt_or_none_is_split_into_contiguous_pieces(tmp_path, shape):
    data = Activations([numbered_file(tmp_path / "a.npy", shape)])
    held_out = vector_numbers(data.held_out())
    assert sorted(
        held_out.tolist() + vector_numbers(data.batches(64, data.num_training)).tolist()
    ) == list(range(500))
    assert (held_out.diff() != 1).sum() < 4


@pytest.mark.parametrize("buffer_rows", [50, 10_000])
def test_shuffle_starts_anywhere_and_repeats_every_epoch(tmp_path, buffer_rows):
    data = Activations([numbered_file(tmp_path / "a.npy")])
    options = dict(seed=3, buffer_gb=buffer_rows * 8 / 2**30)
    stop = 2 * data.num_training + 100
    order = vector_numbers(data.batches(32, stop, **options))
    assert len(order) == stop
    assert len(order[:432].unique()) == len(order[432:864].unique()) == 432
    assert not torch.equal(order[:432], order[432:864])
    sizes = [len(x) for x, _ in data.batches(32, stop, **options)]
    assert set(sizes[:-1]) == {32}
    assert sizes[-1] == stop % 32
    for start in (32, 416, 448, 864):
        assert torch.equal(vector_numbers(data.batches(32, stop, start, **options)), order[start:])
    assert not torch.equal(
        vector_numbers(data.batches(32, stop, seed=4, buffer_gb=options["buffer_gb"])), order
    )
    # of one buffer where they are small: from all over the file, and others next time
    first = order[:40].sort().values
    assert first[-4] > 300
    assert not torch.equal(first, order[432:472].sort().values)


def test_each_row_is_read_once_an_epoch_and_once_at_all_where_they_fit(tmp_path, monkeypatch):
    data = Activations([numbered_file(tmp_path / "a.npy")])
    reads = []
    read = shuffle.Reader.read

    def counting(self, number, first, end, at):
        reads.extend(range(first, end))
        read(self, number, first, end, at)
        # all rows, or the buffer
        assert at + (end - first) * self.row_bytes <= len(self.buffer) <= 3456

    monkeypatch.setattr(shuffle.Reader, "read", counting)
    for _ in data.batches(10, 2 * 432, buffer_gb=200 * 8 / 2**30):
        pass
    assert set(np.bincount(reads)) <= {0, 2}
    assert len(reads) == 2 * 432
    reads.clear()
    for _ in data.batches(10, 3 * 432):
        pass
    assert len(reads) == len(set(reads)) == 432
    assert list(data.batches(10, 50, 50)) == []


def test_sample_is_drawn_alike_from_files_of_two_lengths(tmp_path):
    a = numbered_file(tmp_path / "a.npy", (10, 1, 5))
    b = numbered_file(tmp_path / "b.npy", (30, 1, 20), first=50)
    data = Activations([a, b])
    training = vector_numbers(data.batches(99, data.num_training)).sort().values
    assert torch.equal(data.sample(10**6)[:, 0].long(), training)
    some = data.sample(300)[:, 0].long()
    assert (some < 50).double().mean().item() == pytest.approx(
        (training < 50).double().mean().item(), abs=0.05
    )
    assert set(some.tolist()) <= set(training.tolist())
    assert len(some.unique()) == 300


def test_batches_are_shuffled_by_vector_not_by_image(tmp_path):
    data = Activations([numbered_file(tmp_path / "a.npy", (60, 2, 16))])
    batch = next(data.batches(64, 64))[0][:, 0].long() // 16  # which image of 16 tokens
    assert len(batch.unique()) > 40  # whole images would be 4; 64 draws from 108 images give 48


def test_several_files_are_one_data_set(tmp_path):
    a = numbered_file(tmp_path / "a.npy", (10, 5))
    b = numbered_file(tmp_path / "b.npy", (12, 5), first=50)
    (data,) = open_activations([tmp_path / "*.npy", a])
    assert data.paths == [str(a), str(b)]
    assert data.num_vectors == 110
    assert sorted(
        vector_numbers(data.held_out()).tolist()
        + vector_numbers(data.batches(9, data.num_training)).tolist()
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
        describe_mid_block(numbered_file(tmp_path / f"{name}.npy", first=first), **meta)
    for name in ("samples", "progress", "m.tokens"):
        numbered_file(tmp_path / f"{name}.npy")
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
    numbered_file(tmp_path / "a.npy").rename(tmp_path / "a.npy.partial")
    (tmp_path / "collect.json").write_text("{}")
    numbered_file(tmp_path / "progress.npy")
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
    describe_mid_block(numbered_file(tmp_path / "b.npy"))  # beside a finished file it is no data
    for item in (tmp_path, tmp_path / "*.npy"):
        assert [data.paths for data in open_activations([item])] == [[str(tmp_path / "b.npy")]]
    assert newest_activations(tmp_path) == tmp_path / "b.npy"


@pytest.mark.parametrize("names", [("node0", "node1"), ("shard0of2", "shard1of2")])
def test_a_folder_means_its_own_files_or_else_those_of_its_subfolders(tmp_path, names):
    for number, name in enumerate(names):
        (tmp_path / name / "deeper").mkdir(parents=True)
        (tmp_path / name / "collect.json").write_text("{}")
        describe_mid_block(numbered_file(tmp_path / name / "m.npy", (10, 4), first=40 * number))
        describe_mid_block(
            numbered_file(tmp_path / name / "n.npy", (10, 4), first=40 * number), hook_name="other"
        )
        numbered_file(tmp_path / name / "samples.npy")
        describe_mid_block(numbered_file(tmp_path / name / "deeper" / "m.npy"))
    (tmp_path / "notes.txt").write_text("")
    paths = [[str(tmp_path / name / f"{file}.npy") for name in names] for file in "mn"]
    assert [data.paths for data in open_activations([tmp_path])] == paths
    assert [data.paths for data in open_activations([tmp_path / name for name in names])] == paths
    os.utime(tmp_path / names[0] / "m.json", (2e9, 2e9))
    (data,) = open_activations([newest_activations(tmp_path)])
    assert data.paths == paths[0]
    assert data.num_vectors == 80
    assert data.num_prompts == 20

    (tmp_path / "empty").mkdir()
    assert len(open_activations([tmp_path])) == 2
    # a part that is still collected
    numbered_file(tmp_path / "empty" / "m.npy").rename(tmp_path / "empty" / "m.npy.partial")
    with pytest.raises(UsageError, match="empty/m.npy.partial is not finished"):
        open_activations([tmp_path])
    describe_mid_block(numbered_file(tmp_path / "own.npy"))
    assert [data.paths for data in open_activations([tmp_path])] == [[str(tmp_path / "own.npy")]]


@pytest.mark.parametrize("prompts", [1, 4])
def test_padding_of_text_is_not_read(tmp_path, prompts):
    """Of one prompt alone neither."""
    path = numbered_file(tmp_path / "a.npy", (prompts, 3, 5))
    describe_mid_block(path, stream="text", shape=[prompts, 3, 5, 2])
    lengths = [2, 5, 1, 4][:prompts]
    np.save(tmp_path / "a.lengths.npy", np.array(lengths))
    data = Activations([path])
    numbers = vector_numbers([*data.held_out(), *data.batches(4, data.num_training)])
    expected = [
        (p * 3 + s) * 5 + t for p in range(prompts) for s in range(3) for t in range(lengths[p])
    ]
    assert sorted(numbers.tolist()) == expected
    assert data.whole_prompts == (prompts > 1)
    np.save(tmp_path / "a.lengths.npy", np.array([*lengths, 1]))
    with pytest.raises(UsageError, match="is of another collection"):
        Activations([path])
    (tmp_path / "a.lengths.npy").write_bytes(b"")
    with pytest.raises(UsageError, match="a.lengths.npy is missing or damaged"):
        Activations([path])


class Model:
    """What activations_of looks at in an SAE."""

    def __init__(self, d_in, **cfg):
        self.d_in = d_in
        self.cfg = cfg
        self.training_prompts = None


def test_the_activations_of_an_sae(tmp_path):
    a = numbered_file(tmp_path / "a.npy")
    b = numbered_file(tmp_path / "b.npy")
    assert activations_of(Model(2, data=[str(a)]), "sae").paths == [str(a)]
    assert activations_of(Model(2, data=[str(a)]), "sae", [str(b)]).paths == [str(b)]
    with pytest.raises(
        UsageError, match="sae does not say which files it was trained on; name some with --data"
    ):
        activations_of(Model(2), "sae")
    with pytest.raises(UsageError, match="holds vectors of width 2, and the SAE takes width 3"):
        activations_of(Model(3, data=[str(a)]), "sae")
    describe_mid_block(b)
    with pytest.raises(
        UsageError, match="--data holds 2 hook points or models; expected the files of one"
    ):
        activations_of(Model(2), "sae", [str(a), str(b)])


def test_a_folder_of_plain_files_is_one_data_set(tmp_path):
    paths = [str(numbered_file(tmp_path / f"{name}.npy", first=ord(name))) for name in "ab"]
    assert [data.paths for data in open_activations([tmp_path])] == [paths]


def test_newest(tmp_path):
    """The newest activation file is one that collect.py described; samples.npy is none."""
    with pytest.raises(ValueError, match="collect.py first"):
        newest_activations(tmp_path)
    describe_mid_block(numbered_file(tmp_path / "a.npy"))
    numbered_file(tmp_path / "samples.npy")
    assert newest_activations(tmp_path).name == "a.npy"


def test_files_that_do_not_fit_together(tmp_path):
    numbered_file(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.zeros((5, 3), np.float32))
    with pytest.raises(ValueError, match="width 3"):
        open_activations([tmp_path / "?.npy"])


def test_batches_hold_every_step_alike(tmp_path):
    describe_mid_block(
        numbered_file(tmp_path / "a.npy", (20, 5, 8)),
        timesteps=[900, 700, 500, 300, 100],
        shape=[20, 5, 8, 2],
    )
    data = Activations([tmp_path / "a.npy"])
    assert data.timesteps == [900, 700, 500, 300, 100]
    batches = list(data.batches(50, 2 * data.num_training))
    numbers = vector_numbers(batches)
    assert sorted(numbers[: data.num_training].tolist()) == sorted(
        numbers[data.num_training :].tolist()
    )
    steps = numbers // 8 % 5
    assert torch.equal(torch.cat([step for _, step in batches]), steps)
    counts = torch.stack([batch.bincount(minlength=5) for batch in steps[:700].split(50)])
    assert counts.min() >= 8
    assert counts.max() <= 12  # by chance they would run from 4 to 18
    pieces = data.draw(100)
    assert (data.read(pieces)[:, 0].long() // 8 % 5).tolist() == data.steps_of(pieces).tolist()


def test_files_whose_timesteps_differ_have_none(tmp_path):
    for name, times in ("a", [3, 2, 1]), ("b", [3, 2, 0]):
        describe_mid_block(
            numbered_file(tmp_path / f"{name}.npy"), timesteps=times, shape=[20, 3, 8, 2]
        )
    assert Activations([tmp_path / "a.npy"]).timesteps == [3, 2, 1]
    assert Activations([tmp_path / "a.npy", tmp_path / "b.npy"]).timesteps == []


def test_whole_samples_stay_together(tmp_path):
    describe_mid_block(
        numbered_file(tmp_path / "a.npy", (20, 5, 8)),
        timesteps=[900, 700, 500, 300, 100],
        shape=[20, 5, 8, 2],
    )
    data = Activations([tmp_path / "a.npy"])
    assert data.sample_tokens() == 8
    for buffer_gb in (1, 2e-6):
        whole = vector_numbers(data.batches(40, data.num_training, buffer_gb=buffer_gb, tokens=8))
        samples = whole.view(-1, 8)
        assert sorted(whole.tolist()) == sorted(
            vector_numbers(data.batches(40, data.num_training)).tolist()
        )
        assert (samples[:, 0] % 8 == 0).all()
        assert (samples - samples[:, :1] == torch.arange(8)).all()
        assert (samples[:, 0] // 8).diff().ne(1).float().mean() > 0.8
        again = vector_numbers(
            data.batches(40, data.num_training, 240, buffer_gb=buffer_gb, tokens=8)
        )
        assert torch.equal(again, whole[240:])
    np.save(tmp_path / "flat.npy", np.zeros((100, 2), np.float32))
    with pytest.raises(ValueError, match="whole samples"):
        Activations([tmp_path / "flat.npy"]).sample_tokens()


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
    assert not is_held_out[0]
    assert is_held_out.any()
