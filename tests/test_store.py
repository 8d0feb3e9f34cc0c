"""Prompts in, from every kind of file, and the mistakes that can be made there."""

import json
import sys

import numpy as np
import pyarrow.parquet
import pytest

from prompts import load_prompts
from store import Collection, npy_header, read_json


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl", "parquet"])
def test_prompt_files(tmp_path, suffix):
    path = tmp_path / f"p.{suffix}"
    rows = [{"prompt": 'a "red", fox', "style": "oil"}, {"prompt": "blé 🎨", "style": "ink"}]
    if suffix == "txt":
        path.write_text('a "red", fox\n\n  blé 🎨  \n', "utf-8")
        rows = [{"prompt": r["prompt"]} for r in rows]
    elif suffix == "csv":
        path.write_text('prompt,style\n"a ""red"", fox",oil\nblé 🎨,ink\n', "utf-8")
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert load_prompts(str(path)) == rows
    assert load_prompts(str(path), max_num_examples=1) == rows[:1]


def test_columns_and_negative_prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"a": "one", "b": "two", "c": 3, "d": [1]}\n')
    assert load_prompts(str(path), column="b") == [{"prompt": "two", "a": "one", "c": 3}]
    assert load_prompts(str(path), column="a", negative_prompt="b")[0]["negative_prompt"] == "two"
    assert load_prompts(str(path), column="a", negative_prompt="ugly")[0]["negative_prompt"] == "ugly"
    with pytest.raises(ValueError, match="choose with --column from: a, b, c, d"):
        load_prompts(str(path))
    with pytest.raises(ValueError, match="no column 'e'"):
        load_prompts(str(path), column="e")
    with pytest.raises(ValueError, match="is no text"):
        load_prompts(str(path), column="c")


def test_a_literal_prompt():
    assert load_prompts("a cat, 1/2 asleep") == [{"prompt": "a cat, 1/2 asleep"}]
    assert load_prompts("cat", negative_prompt="dog") == [{"prompt": "cat", "negative_prompt": "dog"}]


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "\n \n"),
        ("p.csv", "prompt\n"),
        ("p.jsonl", ""),
        ("p.jsonl", "{"),
        ("p.jsonl", "[1]\n"),
        ("p.parquet", "x"),
    ],
)
def test_files_without_prompts(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="no prompts|can't be read"):
        load_prompts(str(tmp_path / name))


def test_a_missing_file_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no prompt file"):
        load_prompts(str(tmp_path / "none.csv"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_prompts("guangyil/laion-coco-aesthetic")


def test_a_hub_data_set_is_streamed(monkeypatch):
    import datasets

    rows = [{"image": b"", "caption": f"number {i}", "score": i / 2} for i in range(5)]
    made = datasets.IterableDataset.from_generator(lambda: iter(rows))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or made)
    found = load_prompts("guangyil/laion-coco-aesthetic", "train", max_num_examples=3)
    assert found == [{"prompt": f"number {i}", "score": i / 2} for i in range(3)]
    assert asked == [(("guangyil/laion-coco-aesthetic",), {"split": "train", "streaming": True})]


def test_headers_are_numpys(tmp_path):
    for shape in ((3,), (2, 3, 4), (10**9, 50, 4096, 5120)):
        assert len(npy_header(shape, np.float16)) == 128
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (tmp_path / "a.npy").write_bytes(npy_header(array.shape, array.dtype) + array.tobytes())
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), array)


def test_folders_of_another_origin_are_left_alone(tmp_path):
    np.save(tmp_path / "mine.npy", np.zeros(3))
    with pytest.raises(ValueError, match="another origin"):
        Collection(tmp_path, {}, [{"prompt": "a"}], 1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.npy"]
    with pytest.raises(ValueError, match="can't be made"):
        Collection(tmp_path / "mine.npy" / "below", {}, [{"prompt": "a"}], 1)


def test_damaged_records(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="can't be read"):
        read_json(tmp_path / "a.json")
