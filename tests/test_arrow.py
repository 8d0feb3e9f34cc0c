"""store/arrow.py: folders of rows that the data sets library saved."""

import numpy as np
import pytest
import torch
from described import vector_numbers

from errors import UsageError
from store.dataset import open_activations

pytestmark = pytest.mark.usefixtures("small_data")


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
    assert data.whole_prompts
    assert data.sample_tokens() == 4
    assert {path for path, *_ in data.files} == {
        str(tmp_path / "up.1" / f"data-0000{i}-of-00005.arrow") for i in range(5)
    }
    held_out = vector_numbers(data.held_out())
    for buffer_gb in (1, 1e-6):
        batches = list(data.batches(9, data.num_training, buffer_gb=buffer_gb))
        assert batches[0][0].dtype == (torch.float16 if dtype == np.float16 else torch.float32)
        numbers = vector_numbers(batches)
        assert sorted([*numbers.tolist(), *held_out.tolist()]) == list(range(144))
        assert torch.equal(torch.cat([step for _, step in batches]), numbers // 4 % 3)
    assert not set((held_out // 12).tolist()) & set((numbers // 12).tolist())  # of other images


def test_rows_of_random_timesteps_are_no_run_of_one_prompt(tmp_path):
    """40,000 of them would be as many steps, more than 16 bits count."""
    x = np.arange(40_000, dtype=np.float32)[:, None, None]
    times = np.random.default_rng(0).random(40_000)
    data = open_activations([saved_rows(tmp_path / "a", x, timestep=times)])[0]
    # it is not known which show one image
    assert (data.num_prompts, data.timesteps, data.whole_prompts) == (
        0,
        [],
        False,
    )
    vectors = torch.cat(
        [*data.held_out(), *(x for x, _ in data.batches(4096, data.num_training))]
    ).flatten()
    assert torch.equal(vectors.sort().values, torch.arange(40_000.0))


def test_rows_saved_as_lists_and_by_file_name(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 4, 8)).astype(np.float32)
    names = [f"{i // 5}.png" for i in range(30)]
    data = open_activations([saved_rows(tmp_path / "a", x, "values", plain=True, file_name=names)])[
        0
    ]
    assert data.num_prompts == 6
    assert data.timesteps == []
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
    # in one file, in two
    for name, rows in (
        ("2 lengths", ragged * 2),
        ("different shapes", ragged),
    ):
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
