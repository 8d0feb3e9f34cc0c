"""store/activation_file.py: what one file says of itself, and which files are refused."""

import json

import numpy as np
import pytest
import torch
from described import describe_mid_block, numbered_file
from files import write_lines

from errors import UsageError
from store.activation_file import check_file, open_activation_file
from store.dataset import Activations, open_activations
from store.disk import checksum

pytestmark = pytest.mark.usefixtures("small_data")


def test_a_listing_that_is_ahead_of_its_file(tmp_path):
    """A larger --max_num_examples lists all prompts before its first batch is written; the split
    stays by text."""
    describe_mid_block(numbered_file(tmp_path / "a.npy", (4, 5)))
    texts = ["a", "b", "a", "b", "c", "d"]
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": t} for t in texts])
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
        assert (file.P, file.S, file.T) == axes
        assert file.d == 2
        assert file.grid == (axes[2],)
        assert file.tokens_kept is None
        assert file.prompt_rows is None
        assert file.lengths is None
    path = tmp_path / "2.npy"
    describe_mid_block(path, grid=[2, 2])
    assert open_activation_file(path).grid == (2, 2)
    describe_mid_block(path, grid=[4, 4])
    assert open_activation_file(path).grid == (4,)  # a grid of another file
    np.save(tmp_path / "2.tokens.npy", np.zeros((3, 5, 4), np.uint16))
    file = open_activation_file(path)
    assert file.grid == (4, 4)
    assert file.read_tokens_kept(2).shape == (5, 4)  # 4 tokens of the 16
    np.save(tmp_path / "2.tokens.npy", np.zeros((3, 5, 3), np.uint16))
    with pytest.raises(
        UsageError, match=r"2.tokens.npy is of another.*shape \(3, 5, 3\), expected \(3, 5, 4\)"
    ):
        open_activation_file(path).tokens_kept  # noqa: B018


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(tmp_path, dtype):
    """A sample is float32; batches are as they are stored, but only float16 stays in 16 bits."""
    data = Activations([numbered_file(tmp_path / "a.npy", (30, 10), dtype)])
    assert data.sample(9).dtype == torch.float32
    assert next(data.batches(4, 4))[0].dtype == (
        torch.float16 if dtype == np.float16 else torch.float32
    )


def test_bfloat16_needs_its_description(tmp_path):
    values = torch.randn(10, 4, 3).bfloat16()
    np.save(tmp_path / "a.npy", values.view(torch.uint16).numpy())
    with pytest.raises(ValueError, match="uint16"):
        check_file(tmp_path / "a.npy")
    describe_mid_block(tmp_path / "a.npy", dtype="bfloat16", shape=[10, 4, 3])
    data = Activations([tmp_path / "a.npy"])
    rows = torch.cat([*data.held_out(), *(x for x, _ in data.batches(5, data.num_training))])
    assert rows.dtype == torch.bfloat16
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, values.flatten(0, 1).tolist()))


def bad_files(folder):
    good = numbered_file(folder / "good.npy").read_bytes()
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


def test_damaged_description(tmp_path):
    path = numbered_file(tmp_path / "a.npy")
    describe_mid_block(path, shape=[20, 3, 8, 2])
    check_file(path)
    text = path.with_suffix(".json").read_text()
    path.with_suffix(".json").write_text(text.replace("mid_block", "mid_blocK"))
    with pytest.raises(ValueError, match="checksum"):
        check_file(path)
    path.with_suffix(".json").write_text(text[:30])
    with pytest.raises(ValueError, match="a.json"):
        check_file(path)
    describe_mid_block(path, shape=[21, 3, 8, 2])
    with pytest.raises(ValueError, match="its .json says"):
        check_file(path)


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
    data = json.dumps(record, indent=1).encode()
    refused = 0
    for offset in range(len(data)):
        for flip in (1, 2, 32, 255):
            path.write_bytes(data[:offset] + bytes([data[offset] ^ flip]) + data[offset + 1 :])
            try:
                assert check_file(tmp_path / "a.npy")[1] == record
            except ValueError:
                refused += 1
    assert refused > 2 * len(data)
