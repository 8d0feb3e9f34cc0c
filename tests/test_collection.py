"""Prompts in, from every kind of file, and the mistakes that can be made there."""

import json
import os
import shutil
import sys
import threading
import zlib
from contextlib import closing

import numpy as np
import pyarrow.parquet
import pytest
import torch

from store.collection import Collection, npy_header
from store.disk import read_json
from store.prompts import load_prompts


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
    assert (
        load_prompts(str(path), column="a", negative_prompt="ugly")[0]["negative_prompt"] == "ugly"
    )
    with pytest.raises(ValueError, match="choose with --column from: a, b, c, d"):
        load_prompts(str(path))
    with pytest.raises(ValueError, match="no column 'e'"):
        load_prompts(str(path), column="e")
    with pytest.raises(ValueError, match="is no text"):
        load_prompts(str(path), column="d")
    assert load_prompts(str(path), column="c") == [{"prompt": "3", "a": "one", "b": "two", "c": 3}]


def test_a_literal_prompt():
    assert load_prompts("a cat, 1/2 asleep") == [{"prompt": "a cat, 1/2 asleep"}]
    assert load_prompts("cat", negative_prompt="dog") == [
        {"prompt": "cat", "negative_prompt": "dog"}
    ]


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
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or made
    )
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


def collection(folder, joining=False, rows=5):
    return Collection(folder, {"a": 1}, [{"prompt": "a"}] * rows, 2, joining)


def array(batch, rows):
    return {"x": torch.full((rows, 3), float(batch))}


def finished(folder):
    """Three batches."""
    c = collection(folder)
    for batch, rows in enumerate((2, 2, 1)):
        c.write(batch, array(batch, rows), {"steps": 2})
    c.close()
    return c


def test_a_folder_is_one_programs_until_it_is_closed(tmp_path):
    first, refused = (
        collection(tmp_path),
        pytest.raises(ValueError, match="another collect.py is writing"),
    )
    with refused:
        collection(tmp_path)
    collection(tmp_path, joining=True).close()  # of the same torchrun: has no lock of its own
    with refused:
        collection(tmp_path)
    first.close()
    collection(tmp_path).close()


def test_a_folder_stays_locked_while_a_thread_writes(tmp_path, monkeypatch):
    """After a second Ctrl-C in a notebook, say."""
    c, reached, go_on, real = collection(tmp_path), threading.Event(), threading.Event(), os.pwrite

    def slow(*args):
        reached.set()
        go_on.wait(60)
        return real(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    thread = threading.Thread(target=c.write, args=(0, array(1, 2), {}))
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
    second.write(2, array(2, 1), {"steps": 2})
    with pytest.raises(ValueError, match="ran other steps"):  # than the other process's
        first.write(1, array(0, 2), {"steps": 3})
    first.write(0, array(0, 2), {"steps": 2})
    assert first.pending() == second.pending() == [1]
    second.write(1, array(1, 2), {"steps": 2})
    second.close()
    first.finish({"x": {"shape": [5, 3]}})
    first.close()
    finished(tmp_path / "one").finish({"x": {"shape": [5, 3]}})
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_progress_is_one_line_for_each_safe_batch(tmp_path):
    """A line appears when the data are on the disk, a torn one counts for nothing, and the next
    start appends to none."""
    c, progress = collection(tmp_path), tmp_path / "progress.jsonl"
    assert progress.read_text() == ""
    c.write(1, array(1, 2), {})
    c.write(0, array(0, 2), {})
    lines = []
    for batch in (0, 1):
        checksum = zlib.crc32(array(batch, 2)["x"].numpy().tobytes(), zlib.crc32(b"<f4 [3]"))
        lines.append(json.dumps({"batch": batch, "rows": 2, "crc32": {"x": checksum}}) + "\n")
    assert progress.read_text() == lines[1] + lines[0]
    c.close()
    for torn in (
        '{"batch": 2, "ro',
        '{"batch": 2, "rows": "1"}',
        "[2, 1]\n",
        "\x00\x00",
        '{"rows": 1}\n',
        "\udcff",
    ):
        with progress.open("ab") as file:
            file.write(torn.encode("utf-8", "surrogateescape"))
        with collection(tmp_path) as c:
            assert c.pending() == [2]
        assert progress.read_text() == lines[0] + lines[1]
    progress.write_text(
        '{"batch": 0, "rows": 2, "checksum": 7}\n{"batch": 1, "rows": 1}\n{"batch": 2, "rows": 1}\n'
    )
    with collection(tmp_path) as c:
        assert c.pending() == [1]  # which had another size
        assert '"checksum": 7' in progress.read_text()  # what a later version says


def test_a_batch_is_safe_only_after_its_data(tmp_path, monkeypatch):
    calls = []
    c, pwrite, fsync, write = collection(tmp_path), os.pwrite, os.fsync, os.write
    monkeypatch.setattr(os, "pwrite", lambda *args: (calls.append("data"), pwrite(*args))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(os, "write", lambda *args: (calls.append("line"), write(*args))[1])
    c.write(0, array(0, 2), {})
    assert calls[-4:] == ["data", "sync", "line", "sync"] and calls.count("line") == 1
    c.close()


def test_a_smaller_number_finishes_a_stopped_collection(tmp_path, capsys):
    """Whichever of its batches are there; and back again before it is finished."""
    description = {"x": {"shape": [4, 3]}}
    expected = tmp_path / "expected"
    with collection(expected, rows=4) as c:
        c.write(0, array(0, 2), {})
        c.write(1, array(1, 2), {})
        c.finish(description)
    capsys.readouterr()
    for number, done in enumerate(([0, 1], [0], [1])):
        folder = tmp_path / str(number)
        with collection(folder, rows=8) as c:
            for batch in done:
                c.write(batch, array(batch, 2), {})
        with collection(folder, rows=4) as c:
            assert c.pending() == sorted({0, 1} - {*done})
        assert (
            "a stopped collection of 8 rows, which ends with row 4 now" in capsys.readouterr().out
        )
        with collection(folder, rows=8) as c:  # not yet finished: nothing has been cut off
            assert c.pending() == sorted({0, 1, 2, 3} - {*done})
            assert c.shape("x") == [8, 3]
        with collection(folder, rows=4) as c:
            for batch in c.pending():
                c.write(batch, array(batch, len(c.batch(batch).rows)), {})
            (folder / "images").mkdir(exist_ok=True)
            for row in (1, 4, 7):
                (folder / "images" / f"{row}.webp").write_bytes(b"")
            c.finish(description)
        assert [path.name for path in (folder / "images").iterdir()] == ["1.webp"]
        shutil.rmtree(folder / "images")
        for path in expected.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
        with pytest.raises(ValueError, match="holds 4 rows, more than 2; nothing to do"):
            collection(folder, rows=2)


def test_no_finished_batch_is_thrown_away(tmp_path):
    with collection(tmp_path, rows=8) as c:
        for batch in (0, 2):
            c.write(batch, array(batch, 2), {})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for rows in (2, 4, 5):
        with pytest.raises(ValueError, match=f"finished with 6 rows or more, not with {rows}"):
            collection(tmp_path, rows=rows)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with collection(tmp_path, rows=6) as c:
        assert c.pending() == [1]


def test_nothing_is_cut_off_a_finished_file_that_is_extended(tmp_path):
    """An extension that was stopped before its first batch: the file has its name and its
    description still."""
    with collection(tmp_path) as c:
        for batch, rows in enumerate((2, 2, 1)):
            c.write(batch, array(batch, rows), {})
        c.finish({"x": {"shape": [5, 3]}})
    collection(tmp_path, rows=8).close()
    with collection(tmp_path) as c:
        assert c.pending() == []
        c.finish({"x": {"shape": [5, 3]}})
    assert np.load(tmp_path / "x.npy")[:, 0].tolist() == [0, 0, 1, 1, 2]


def test_a_folder_of_an_earlier_version_is_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    np.save(tmp_path / "progress.npy", np.zeros((1, 2)))
    (tmp_path / "collect.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match="of an earlier version: if it is finished, train.py and the later stages read it",
    ):
        collection(tmp_path)


def test_images_of_somebody_else_are_not_overwritten(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="another origin .images"):
        collection(tmp_path)


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
    path.write_text(
        json.dumps({key: settings[key] for key in ("settings", "facts")})
    )  # an earlier version's
    c = collection(tmp_path)
    assert c.pending() == [] and c.facts == {"steps": 2}
    c.close()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", ""])
def test_a_name_cannot_leave_the_folder(tmp_path, name):
    with (
        closing(Collection(tmp_path / "in", {}, [{"prompt": "a"}], 1)) as collection,
        pytest.raises(ValueError, match="no name"),
    ):
        collection.write(0, {name: torch.zeros(1, 2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["in"] and not list(
        (tmp_path / "in").glob("**/*.npy*")
    )
