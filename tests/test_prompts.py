"""Prompts in, from every kind of file: each is used as it was meant, or refused in one line."""

import importlib
import json
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from commands import run_script
from files import read_json, write_lines, write_text
from tiny import PROMPTS
from tiny_runs import collect_tiny

from errors import UsageError
from store.prompts import load_pictures, load_prompts, seen_text, with_seeds


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl", "parquet"])
def test_prompt_files(tmp_path, suffix):
    """Every kind of file gives the same prompts, with its other columns."""
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
    """--column names the prompts; --negative_prompt is a column if there is one of that name."""
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
    """What is no file and no data set is a prompt."""
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
    """Empty files are refused."""
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

    def load_dataset(*args, **options):
        asked.append((args, options))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts = load_prompts("guangyil/laion-coco-aesthetic", "train", max_num_examples=3)
    assert prompts == [{"prompt": f"number {i}", "score": i / 2} for i in range(3)]
    assert asked == [(("guangyil/laion-coco-aesthetic",), {"split": "train", "streaming": True})]


def prompts_of(path, **options):
    return [row["prompt"] for row in load_prompts(path, **options)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_header_of_a_table_says_its_separator(tmp_path, separator):
    fox = f'"a red fox{separator} in snow"'
    bottles = "three, green; bottles | in\tall".replace(separator, " ")
    lines = [["style", "Prompt"], ["oil", fox], ["ink", bottles]]
    path = write_text(tmp_path, "p.csv", "".join(separator.join(line) + "\r\n" for line in lines))
    assert load_prompts(path) == [
        {"prompt": fox.strip('"'), "style": "oil"},
        {"prompt": bottles, "style": "ink"},
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "prompt\na red fox, in snow\n",
            "line 2, 'a red fox', has 2 fields where the first line has 1",
        ),
        (
            "prompt,style\na blue star,oil\na red fox, in snow,oil\n",
            "line 3, 'a red fox', has 3 fields",
        ),
        (
            "prompt,style\na red fox\n",
            "line 2, 'a red fox', has 1 fields where the first line has 2",
        ),
        ("prompt;style\na red fox\n", "line 2, 'a red fox', has 1 fields"),
        ('prompt,style\n"a red\nfox",oil\na dog\n', "line 4, 'a dog'"),
        ("a red fox\na blue star\n", "put a line with the word prompt above it"),
        (
            "a red fox, in snow\na blue star, at night\n",
            "no column prompt, caption or text in its first line",
        ),
        ("prompt,style;caption\na,b;c\n", "several separators"),
        ("prompt,style,prompt\na,b,c\n", "names column 'prompt' twice"),
        ('prompt,style\n"a red fox" in snow,oil\n', "line 2"),
    ],
)
def test_a_table_that_can_be_read_in_several_ways_is_refused(tmp_path, text, message):
    path = write_text(tmp_path, "p.csv", text)
    with pytest.raises(UsageError, match="can't be read as csv: ") as refusal:
        load_prompts(path)
    assert message in str(refusal.value)


def test_a_column_of_an_unusual_name_is_named(tmp_path):
    path = write_text(tmp_path, "p.csv", "beschreibung\nein Fuchs\n")
    with pytest.raises(UsageError, match="choose with --column from: beschreibung"):
        load_prompts(path)
    assert prompts_of(path, column="beschreibung") == ["ein Fuchs"]
    path = write_text(tmp_path, "q.csv", "beschreibung;gegenteil\nein Fuchs;hell\n")
    rows = load_prompts(path, column="beschreibung", negative_prompt="gegenteil")
    assert rows == [{"prompt": "ein Fuchs", "negative_prompt": "hell"}]


def test_blank_lines_spaces_and_marks(tmp_path):
    assert prompts_of(write_text(tmp_path, "a.csv", "\n\nprompt\n\na fox\n\n")) == ["a fox"]
    assert load_prompts(write_text(tmp_path, "b.csv", "prompt,style\na fox,oil\n,\n,\n")) == [
        {"prompt": "a fox", "style": "oil"}
    ]
    assert load_prompts(write_text(tmp_path, "c.csv", 'style, prompt\noil, "a fox, red"\n')) == [
        {"prompt": "a fox, red", "style": "oil"}
    ]
    assert prompts_of(write_text(tmp_path, "d.csv", 'prompt,style\n"a fox\nin snow",oil\n')) == [
        "a fox\nin snow"
    ]
    assert prompts_of(write_text(tmp_path, "e.txt", "a fox\ra dog\r")) == ["a fox", "a dog"]
    assert load_prompts(write_text(tmp_path, "f.tsv", "prompt\tstyle\na fox, red\toil\n")) == [
        {"prompt": "a fox, red", "style": "oil"}
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["p.csv", "P.CSV", "P.TXT", "p.jsonl"])
def test_encodings_that_the_file_names(tmp_path, encoding, name):
    lines = {"csv": "prompt\nblé 🎨\n", "txt": "blé 🎨\n", "jsonl": '{"prompt": "blé 🎨"}\n'}
    path = write_text(tmp_path, name, lines[name[2:].lower()], encoding)
    assert load_prompts(path) == [{"prompt": "blé 🎨"}]


def test_encodings_that_nobody_names_are_not_guessed(tmp_path):
    with pytest.raises(UsageError, match="byte 9 is no UTF-8; save it as UTF-8"):
        load_prompts(write_text(tmp_path, "a.csv", "prompt\nblé\n", "latin-1"))
    with pytest.raises(UsageError, match="UTF-16 without a byte-order mark"):
        load_prompts(write_text(tmp_path, "b.txt", "a fox\n", "utf-16-le"))


def test_json_arrays(tmp_path):
    """An array of objects or of texts is read; other JSON is refused."""
    assert load_prompts(write_text(tmp_path, "a.json", '["a fox", "a dog"]')) == [
        {"prompt": "a fox"},
        {"prompt": "a dog"},
    ]
    assert load_prompts(write_text(tmp_path, "b.JSON", '[\n{"prompt": "a fox",\n "n": 1}]')) == [
        {"prompt": "a fox", "n": 1}
    ]
    for text in ('{"prompt": {"0": "a fox"}}', '{"prompt": "a"}\n{"prompt": "b"}\n', "[1]"):
        with pytest.raises(UsageError, match="array of objects or of texts|is named .jsonl"):
            load_prompts(write_text(tmp_path, "c.json", text))


def test_rows_without_a_prompt_are_named(tmp_path):
    # and style is not taken for it
    with pytest.raises(UsageError, match="row 1: column 'prompt' is no text and no number: None"):
        load_prompts(
            write_text(
                tmp_path,
                "a.jsonl",
                '{"prompt": null, "style": "oil"}\n{"prompt": "a fox", "style": "ink"}\n',
            )
        )
    with pytest.raises(UsageError, match="row 2: column 'prompt' is no text and no number: None"):
        load_prompts(write_text(tmp_path, "b.jsonl", '{"prompt": "a fox"}\n{"caption": "a dog"}\n'))
    with pytest.raises(UsageError, match="row 2: column 'no' is no text"):
        load_prompts(
            write_text(
                tmp_path, "c.jsonl", '{"prompt": "a", "no": "b"}\n{"prompt": "a", "no": ["c"]}\n'
            ),
            negative_prompt="no",
        )


@pytest.mark.parametrize(
    "text", ["prompt\na fox\n", "prompt,seed\na fox,1\n", "Caption\tstyle\na fox\toil\n"]
)
def test_a_table_named_txt_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match="names columns; name a table .csv"):
        load_prompts(write_text(tmp_path, "p.txt", text))
    assert prompts_of(write_text(tmp_path, "q.txt", "a prompt, text, in red\n")) == [
        "a prompt, text, in red"
    ]


def test_a_missing_file_is_no_prompt():
    for name in ("my prompts.csv", "./my prompts", "/a folder/prompts", "P.TSV"):
        with pytest.raises(UsageError, match="no prompt file"):
            load_prompts(name)


@pytest.mark.slow
def test_a_prompt_longer_than_a_file_name(untrained_sae, model_folder, tmp_path):
    """No file has a name of more than 255 bytes, and asking the system for one is an error."""
    prompt = "a red fox in the snow, " * 20 + "at night"
    assert load_prompts(prompt) == [{"prompt": prompt}]
    with pytest.raises(UsageError, match="no prompt file a red fox"):
        load_prompts(f"{prompt}.txt")
    size = '{"height": 64, "width": 64}'
    few = (
        "--model_name",
        model_folder,
        "--dataset_name",
        prompt,
        "--num_inference_steps",
        2,
        "--out_dir",
        "out",
    )
    commands = {
        "collect.py": ("--hook_names", "mid_block", "--height", 64, "--width", 64),
        "ablate.py": ("--hook_names", "mid_block", "--height", 64, "--width", 64),
        "steer.py": ("--sae", untrained_sae, "--features", 3, "--pipeline_kwargs", size),
    }
    for script, options in commands.items():
        folder = tmp_path / script
        folder.mkdir()
        done = run_script(script, *few, *options, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "collect.py" / "out" / "prompts.jsonl")["prompt"] == prompt


def test_seeds_and_negative_prompts_of_a_table(tmp_path):
    path = write_text(
        tmp_path, "p.csv", "prompt,Negative Prompt,seed,style\na fox,dark,7,oil\na dog,,3.0,ink\n"
    )
    rows = load_prompts(path)
    assert rows == [
        {"prompt": "a fox", "negative_prompt": "dark", "style": "oil", "seed": 7},
        {"prompt": "a dog", "negative_prompt": "", "style": "ink", "seed": 3},
    ]
    assert [row["seed"] for row in with_seeds(rows, 0)] == [7, 3]
    assert [row["seed"] for row in with_seeds(rows, 0, images_each=2)] == [7, 8, 3, 4]
    assert [
        row["seed"] for row in with_seeds([{"prompt": "a"}, {"prompt": "b"}], 5, images_each=2)
    ] == [5, 6, 7, 8]
    assert [row["negative_prompt"] for row in load_prompts(path, negative_prompt="grey")] == [
        "grey",
        "grey",
    ]
    with pytest.raises(UsageError, match="--seed 5: the data set has a column seed"):
        with_seeds(rows, 5)
    empty = write_text(tmp_path, "q.csv", "prompt,negative_prompt\na fox,\n")
    assert load_prompts(empty) == [{"prompt": "a fox"}]


@pytest.mark.parametrize(
    "first, second",
    [("Prompt", "prompt"), ("Seed", "seed"), ("Negative Prompt", "negative_prompt"), ("n ", "n")],
)
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_columns_that_count_as_one_are_refused(tmp_path, first, second, kind):
    """The last one would win silently. A .csv file with such columns is refused above."""
    row = {first: "1", second: "2"}
    row.setdefault("prompt", "a fox")
    path = tmp_path / f"p.{kind}"
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(importlib.import_module("pyarrow").Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if kind == "json" else row))
    name = second.strip()
    message = f"row 1: columns '{first}' and '{second}' both count as '{name}'; rename or remove"
    with pytest.raises(UsageError, match=message):
        load_prompts(str(path))
    assert load_prompts(str(path), column=first)[0]["prompt"] == "1"  # the one that is meant


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_an_object_with_a_key_twice_is_refused(tmp_path, kind):
    row = '{"prompt": "a fox", "prompt": "a dog"}'
    path = write_text(tmp_path, f"p.{kind}", f"[{row}]" if kind == "json" else row)
    with pytest.raises(UsageError, match=f"read as {kind}: an object has the key 'prompt' twice"):
        load_prompts(path)


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array(["a fox"]), pyarrow.array(["a dog"])]
    parquet.write_table(pyarrow.table(columns, names=["prompt", "prompt"]), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="can't be read as parquet"):
        load_prompts(str(tmp_path / "p.parquet"))


ADDED = {"id": "cat-7", "seen": "a dog", "image_digest": "0123456789abcdef"}


def test_columns_named_like_keys_that_collect_adds_are_kept_under_other_names(tmp_path):
    """They are never taken for what collect.py wrote, and never lost."""
    kept = {f"dataset_{name}": value for name, value in ADDED.items()}
    path = write_text(tmp_path, "p.jsonl", json.dumps({"prompt": "a fox", **ADDED}))
    rows = load_prompts(path)
    assert rows == [{"prompt": "a fox", **kept}]
    assert seen_text(rows[0]) == "a fox"
    table = write_text(
        tmp_path, "p.csv", f"prompt,{','.join(ADDED)}\na fox,{','.join(ADDED.values())}\n"
    )
    assert load_prompts(table) == rows
    assert prompts_of(table, column="seen") == prompts_of(table, column="dataset_seen") == ["a dog"]
    path = write_text(tmp_path, "q.jsonl", '{"prompt": "a fox", "id": 3, "dataset_id": 4}')
    with pytest.raises(UsageError, match="columns 'id' and 'dataset_id' both count as"):
        load_prompts(path)

    (tmp_path / "0.png").write_bytes(b"a picture")
    path = write_text(tmp_path, "r.jsonl", json.dumps({"file": "0.png", "text": "a fox", **ADDED}))
    assert load_pictures("file", path)[0] == [{"prompt": "a fox", "file": "0.png", **kept}]


@pytest.mark.slow
def test_a_collection_keeps_the_ids_of_its_data_set(model_folder, tmp_path):
    path = write_text(tmp_path, "p.jsonl", json.dumps({"prompt": "a fox", **ADDED}))
    lines = collect_tiny(model_folder, tmp_path, dataset_name=path, out_dir=str(tmp_path / "a"))
    assert lines == [
        {
            "id": 0,
            "prompt": "a fox",
            "dataset_id": "cat-7",
            "dataset_seen": "a dog",
            "dataset_image_digest": "0123456789abcdef",
            "seed": 0,
        }
    ]


@pytest.mark.slow
def test_a_collection_whose_ids_were_dropped_resumes(model_folder, tmp_path):
    """Earlier versions wrote no dataset_id: the same command still knows its collection."""
    path = write_text(tmp_path, "p.jsonl", '{"prompt": "a fox", "id": "cat-7", "seen": "a dog"}')
    lines = collect_tiny(model_folder, tmp_path, dataset_name=path)
    old = {name: value for name, value in lines[0].items() if not name.startswith("dataset_")}
    (tmp_path / "acts" / "prompts.jsonl").write_text(json.dumps(old) + "\n")
    assert collect_tiny(model_folder, tmp_path, dataset_name=path) == lines


@pytest.mark.slow
def test_a_collection_whose_own_column_is_called_tokens_resumes(model_folder, tmp_path):
    """Earlier versions kept the column's name."""
    path = write_text(tmp_path, "p.jsonl", '{"prompt": "a fox", "tokens": 7}')
    [line] = lines = collect_tiny(model_folder, tmp_path, dataset_name=path)
    assert line["dataset_tokens"] == 7 and "tokens" not in line
    old = {name: value for name, value in line.items() if name != "dataset_tokens"}
    (tmp_path / "acts" / "prompts.jsonl").write_text(json.dumps(old | {"tokens": 7}) + "\n")
    assert collect_tiny(model_folder, tmp_path, dataset_name=path) == lines
    (tmp_path / "acts" / "prompts.jsonl").write_text(json.dumps(old | {"tokens": 8}) + "\n")
    with pytest.raises(UsageError, match="out_dir"):
        collect_tiny(model_folder, tmp_path, dataset_name=path)


@pytest.mark.parametrize("seed", ["x", "", "1.5", "1e3", "99999999999999999999", "nan"])
def test_seeds_that_are_none(tmp_path, seed):
    """A seed is a whole number of 64 bits."""
    with pytest.raises(UsageError, match="row 2: column 'seed' is no whole number"):
        load_prompts(write_text(tmp_path, "p.csv", f"prompt,seed\na,1\nb,{seed}\n"))


def test_seeds_of_some_rows_only(tmp_path):
    with pytest.raises(UsageError, match="row 1: it has no seed, and other rows have one"):
        load_prompts(
            write_text(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "seed": 3}\n')
        )
    with pytest.raises(UsageError, match="'seed' is no whole number of 64 bits: True"):
        load_prompts(write_text(tmp_path, "q.jsonl", '{"prompt": "b", "seed": true}\n'))


@pytest.mark.slow
def test_a_collection_uses_the_columns_of_its_data_set(model_folder, tmp_path):
    """With the seeds and negative prompts in the table it has the bytes of one whose options say
    the same."""
    path = write_text(
        tmp_path,
        "P.CSV",
        "prompt;negative_prompt;seed\n"
        + "".join(f"{p};dark;{7 + i}\n" for i, p in enumerate(PROMPTS)),
    )
    plain = write_text(tmp_path, "p.txt", "\n".join(PROMPTS))
    lines = collect_tiny(model_folder, tmp_path, dataset_name=path, out_dir=str(tmp_path / "a"))
    same = collect_tiny(
        model_folder,
        tmp_path,
        dataset_name=plain,
        out_dir=str(tmp_path / "b"),
        seed=7,
        negative_prompt="dark",
    )
    other = collect_tiny(model_folder, tmp_path, dataset_name=plain, out_dir=str(tmp_path / "c"))
    assert lines == same
    assert [line["seed"] for line in lines] == [7, 8, 9]
    assert other != lines
    a, b, c = ((tmp_path / name / "mid_block.npy").read_bytes() for name in "abc")
    assert a == b != c


def test_it_is_said_how_a_negative_prompt_was_taken(tmp_path, capsys):
    """A column that is spelled wrongly would be a text for all prompts."""
    path = write_text(tmp_path, "p.csv", "prompt,neg_prompt\na fox,dark\n")
    assert load_prompts(path, negative_prompt="negprompt")[0]["negative_prompt"] == "negprompt"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "the text 'negprompt' is used for all prompts" in printed
    assert "did you mean the column 'neg_prompt'?" in printed

    assert load_prompts(path, negative_prompt="neg_prompt")[0]["negative_prompt"] == "dark"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "each prompt has its own, from the column 'neg_prompt'" in printed

    load_prompts(path, negative_prompt="ugly, blurred")
    printed = capsys.readouterr().out
    assert "the text 'ugly, blurred' is used for all prompts" in printed
    assert "did you" not in printed

    load_prompts("a fox", negative_prompt="ugly")  # nothing can be mistaken
    load_prompts(path)
    assert capsys.readouterr().out == ""


def test_a_column_of_negative_prompts_beside_real_images_is_said_to_be_unused(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = write_text(tmp_path, "p.csv", "prompt,picture,negative_prompt\na fox,a.png,dark\n")
    prompts, _ = load_pictures("picture", path)
    assert "negative_prompt" not in prompts[0]
    assert "--images does not use the column negative_prompt" in capsys.readouterr().out


@pytest.mark.parametrize("first", [{"prompt": "a"}, {"prompt": "a", "negative_prompt": None}])
def test_a_negative_prompt_in_a_later_row_counts(tmp_path, first):
    """Whatever the first row has."""
    path = tmp_path / "p.jsonl"
    write_lines(path, (first, {"prompt": "b", "negative_prompt": "blue", "no": "red"}))
    assert [row["negative_prompt"] for row in load_prompts(str(path))] == ["", "blue"]
    assert [row["negative_prompt"] for row in load_prompts(str(path), negative_prompt="no")] == [
        "",
        "red",
    ]
    assert [
        row["negative_prompt"] for row in load_prompts(str(path), negative_prompt="ugly, blurred")
    ] == ["ugly, blurred"] * 2


def test_a_table_means_the_pictures_beside_it(tmp_path, monkeypatch):
    for folder in ("", "table"):
        (tmp_path / folder / "pics").mkdir(parents=True)
        (tmp_path / folder / "pics/0.png").write_bytes(folder.encode())
    (tmp_path / "table/meta.csv").write_text("file,caption\npics/0.png,a\n")
    monkeypatch.chdir(tmp_path)
    _, (source,) = load_pictures("file", "table/meta.csv")
    assert Path(source).read_bytes() == b"table"
    with pytest.raises(UsageError, match="whose images have no captions; leave out --dataset_name"):
        load_pictures("table", "table/meta.csv")
