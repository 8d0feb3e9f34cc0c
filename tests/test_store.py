"""Prompts in, from every kind of file, and the mistakes that can be made there."""

import json
import os
import sys
import threading
from contextlib import closing

import numpy as np
import pyarrow.parquet
import pytest
import torch

from disk import read_json
from prompts import load_prompts
from store import HEADER, Collection, npy_header, vouch


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


def collection(folder, joining=False):
    return Collection(folder, {"a": 1}, [{"prompt": "a"}] * 5, 2, joining)


def finished(folder):
    """Three batches, with sums that are fractions."""
    c = collection(folder)
    for b, n in enumerate((2, 2, 1)):
        c.write(b, {"x": torch.full((n, 3), float(b))}, [0.1 + b, 1e9 / 3], {"steps": 2})
    c.close()
    return c


def test_a_folder_is_one_programs_until_it_is_closed(tmp_path):
    first, refused = collection(tmp_path), pytest.raises(ValueError, match="another collect.py is writing")
    with refused:
        collection(tmp_path)
    joined = collection(tmp_path, joining=True)
    first.close()
    with refused:  # one of its processes is still there
        collection(tmp_path)
    joined.close()
    collection(tmp_path).close()


def test_a_folder_stays_locked_while_a_thread_writes(tmp_path, monkeypatch):
    """After a second Ctrl-C in a notebook, say."""
    c, reached, go_on, real = collection(tmp_path), threading.Event(), threading.Event(), os.pwrite

    def slow(*args):
        reached.set()
        go_on.wait(60)
        return real(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    thread = threading.Thread(target=c.write, args=(0, {"x": torch.ones(2, 3)}, [1.0], {}))
    thread.start()
    reached.wait(60)
    c.close()
    with pytest.raises(ValueError, match="another collect.py is writing"):
        collection(tmp_path)
    go_on.set()
    thread.join()
    c = collection(tmp_path)
    assert c.pending() == [1, 2]
    c.close()


def test_processes_write_into_one_file(tmp_path):
    first = collection(tmp_path / "two")
    second = collection(tmp_path / "two", joining=True)
    batch = lambda b, n: (b, {"x": torch.full((n, 3), float(b))}, [0.1 + b, 1e9 / 3], {"steps": 2})
    second.write(*batch(2, 1))
    with pytest.raises(ValueError, match="ran other steps"):  # than the other process's
        first.write(1, {"x": torch.zeros(2, 3)}, [0.0, 0.0], {"steps": 3})
    first.write(*batch(0, 2))
    assert first.pending() == second.pending() == [1]
    second.write(*batch(1, 2))
    second.close()
    first.finish({"x": {"shape": [5, 3]}})
    first.close()
    finished(tmp_path / "one").finish({"x": {"shape": [5, 3]}})
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_flipped_byte_in_the_progress_is_done_again_or_refused(tmp_path):
    """Each byte in turn, three flips of it: no batch is taken for safe whose sums are not those that were written."""
    good = finished(tmp_path)
    path = tmp_path / "progress.npy"
    data, sums = path.read_bytes(), good.sums()
    row = np.load(path)[1]
    assert row[0] == vouch(row, 2) and int(row[0]) == 2 and row[1:].tolist() == [1.1, 1e9 / 3]
    assert good.pending() == []
    for place in range(len(data)):
        for flip in (1, 128, 255):
            path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            try:
                pending = good.pending()
            except ValueError as error:
                assert "damaged" in str(error)
                continue
            assert place >= HEADER and pending == [(place - HEADER) // 24] and good.sums() is not sums
    path.write_bytes(data[:-8])
    with pytest.raises(ValueError, match="damaged"):
        good.pending()
    path.write_bytes(npy_header((3, 3), np.float64) + np.float64([[2, 0, 0], [2, 0, 0], [0, 0, 0]]).tobytes())
    assert good.pending() == [2]  # an earlier version's, without checksums


def test_a_flipped_byte_in_the_settings_is_refused(tmp_path):
    finished(tmp_path)
    path = tmp_path / "collect.json"
    data, settings = path.read_bytes(), read_json(path)
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        try:
            c = collection(tmp_path)
        except ValueError:
            continue
        c.close()
        assert read_json(path) == settings and c.facts == settings["facts"]
    path.write_text(json.dumps({key: settings[key] for key in ("settings", "facts")}))  # an earlier version's
    c = collection(tmp_path)
    assert c.pending() == [] and c.facts == {"steps": 2}
    c.close()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", ""])
def test_a_name_cannot_leave_the_folder(tmp_path, name):
    with closing(Collection(tmp_path / "in", {}, [{"prompt": "a"}], 1)) as collection, pytest.raises(ValueError, match="no name"):
        collection.write(0, {name: torch.zeros(1, 2)}, [], {})
    assert [path.name for path in tmp_path.iterdir()] == ["in"] and not list((tmp_path / "in").glob("**/*.npy*"))
