"""Inputs are used as they were meant, or refused in one line: prompt files, foreign SAEs, words,
leftovers of killed runs."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from commands import run_script
from families import flux, lumina2
from test_features import read_page
from test_foreign_saes import save_dictionary_by_hand, save_saelens_by_hand
from tiny import PROMPTS, build, generate_options, sd15, sdxl

import cli
import collect
import evaluate
import export
import features
import steer
import train
from analysis.concepts import contrast, saeuron, scaled, toward, with_word
from analysis.feature_edits import Target, Typical
from analysis.metrics import Metrics, usual_scale
from diffusion.tokenizer_calls import SeenText, TokenizerCall, watch_tokenizers
from errors import UsageError
from hook import HookPoint
from sae import Sae
from store import hub
from store.dataset import Activations, newest_activations, open_activations
from store.disk import claim_folder, fill, write_json
from store.prompts import load_pictures, load_prompts, seen_text, with_seeds
from store.words import words_of

pytestmark = pytest.mark.slow


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return str(path)


def prompts_of(path, **options):
    return [row["prompt"] for row in load_prompts(path, **options)]


# ------------------------------------------------------------------------------------------------------- prompt files


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_header_of_a_table_says_its_separator(tmp_path, separator):
    fox, bottles = (
        f'"a red fox{separator} in snow"',
        "three, green; bottles | in\tall".replace(separator, " "),
    )
    lines = [["style", "Prompt"], ["oil", fox], ["ink", bottles]]
    path = write(tmp_path, "p.csv", "".join(separator.join(line) + "\r\n" for line in lines))
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
    path = write(tmp_path, "p.csv", text)
    with pytest.raises(UsageError, match="can't be read as csv: ") as refusal:
        load_prompts(path)
    assert message in str(refusal.value)


def test_a_column_of_an_unusual_name_is_named(tmp_path):
    path = write(tmp_path, "p.csv", "beschreibung\nein Fuchs\n")
    with pytest.raises(UsageError, match="choose with --column from: beschreibung"):
        load_prompts(path)
    assert prompts_of(path, column="beschreibung") == ["ein Fuchs"]
    path = write(tmp_path, "q.csv", "beschreibung;gegenteil\nein Fuchs;hell\n")
    found = load_prompts(path, column="beschreibung", negative_prompt="gegenteil")
    assert found == [{"prompt": "ein Fuchs", "negative_prompt": "hell"}]


def test_blank_lines_spaces_and_marks(tmp_path):
    assert prompts_of(write(tmp_path, "a.csv", "\n\nprompt\n\na fox\n\n")) == ["a fox"]
    assert load_prompts(write(tmp_path, "b.csv", "prompt,style\na fox,oil\n,\n,\n")) == [
        {"prompt": "a fox", "style": "oil"}
    ]
    assert load_prompts(write(tmp_path, "c.csv", 'style, prompt\noil, "a fox, red"\n')) == [
        {"prompt": "a fox, red", "style": "oil"}
    ]
    assert prompts_of(write(tmp_path, "d.csv", 'prompt,style\n"a fox\nin snow",oil\n')) == [
        "a fox\nin snow"
    ]
    assert prompts_of(write(tmp_path, "e.txt", "a fox\ra dog\r")) == ["a fox", "a dog"]
    assert load_prompts(write(tmp_path, "f.tsv", "prompt\tstyle\na fox, red\toil\n")) == [
        {"prompt": "a fox, red", "style": "oil"}
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["p.csv", "P.CSV", "P.TXT", "p.jsonl"])
def test_encodings_that_the_file_names(tmp_path, encoding, name):
    lines = {"csv": "prompt\nblé 🎨\n", "txt": "blé 🎨\n", "jsonl": '{"prompt": "blé 🎨"}\n'}
    path = write(tmp_path, name, lines[name[2:].lower()], encoding)
    assert load_prompts(path) == [{"prompt": "blé 🎨"}]


def test_encodings_that_nobody_names_are_not_guessed(tmp_path):
    with pytest.raises(UsageError, match="byte 9 is no UTF-8; save it as UTF-8"):
        load_prompts(write(tmp_path, "a.csv", "prompt\nblé\n", "latin-1"))
    with pytest.raises(UsageError, match="UTF-16 without a byte-order mark"):
        load_prompts(write(tmp_path, "b.txt", "a fox\n", "utf-16-le"))


def test_json_arrays(tmp_path):
    assert load_prompts(write(tmp_path, "a.json", '["a fox", "a dog"]')) == [
        {"prompt": "a fox"},
        {"prompt": "a dog"},
    ]
    assert load_prompts(write(tmp_path, "b.JSON", '[\n{"prompt": "a fox",\n "n": 1}]')) == [
        {"prompt": "a fox", "n": 1}
    ]
    for text in ('{"prompt": {"0": "a fox"}}', '{"prompt": "a"}\n{"prompt": "b"}\n', "[1]"):
        with pytest.raises(UsageError, match="array of objects or of texts|is named .jsonl"):
            load_prompts(write(tmp_path, "c.json", text))


def test_rows_without_a_prompt_are_named(tmp_path):
    with pytest.raises(
        UsageError, match="row 1: column 'prompt' is no text: None"
    ):  # and style is not taken for it
        load_prompts(
            write(
                tmp_path,
                "a.jsonl",
                '{"prompt": null, "style": "oil"}\n{"prompt": "a fox", "style": "ink"}\n',
            )
        )
    with pytest.raises(UsageError, match="row 2: column 'prompt' is no text: None"):
        load_prompts(write(tmp_path, "b.jsonl", '{"prompt": "a fox"}\n{"caption": "a dog"}\n'))
    with pytest.raises(UsageError, match="row 2: column 'no' is no text"):
        load_prompts(
            write(
                tmp_path, "c.jsonl", '{"prompt": "a", "no": "b"}\n{"prompt": "a", "no": ["c"]}\n'
            ),
            negative_prompt="no",
        )


@pytest.mark.parametrize(
    "text", ["prompt\na fox\n", "prompt,seed\na fox,1\n", "Caption\tstyle\na fox\toil\n"]
)
def test_a_table_named_txt_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match="names columns; name a table .csv"):
        load_prompts(write(tmp_path, "p.txt", text))
    assert prompts_of(write(tmp_path, "q.txt", "a prompt, text, in red\n")) == [
        "a prompt, text, in red"
    ]


def test_a_missing_file_is_no_prompt(tmp_path):
    for name in ("my prompts.csv", "./my prompts", "/a folder/prompts", "P.TSV"):
        with pytest.raises(UsageError, match="no prompt file"):
            load_prompts(name)


def test_a_prompt_longer_than_a_file_name(trained, model_folder, tmp_path):
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
        "steer.py": ("--sae", trained[1], "--features", 3, "--pipeline_kwargs", size),
    }
    for script, options in commands.items():
        folder = tmp_path / script
        folder.mkdir()
        done = run_script(script, *few, *options, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "collect.py" / "out" / "prompts.jsonl").read_text())["prompt"]
        == prompt
    )


def test_seeds_and_negative_prompts_of_a_table(tmp_path):
    path = write(
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
    empty = write(tmp_path, "q.csv", "prompt,negative_prompt\na fox,\n")
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
    path = write(tmp_path, f"p.{kind}", f"[{row}]" if kind == "json" else row)
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
    path = write(tmp_path, "p.jsonl", json.dumps({"prompt": "a fox", **ADDED}))
    rows = load_prompts(path)
    assert rows == [{"prompt": "a fox", **kept}]
    assert seen_text(rows[0]) == "a fox"
    table = write(
        tmp_path, "p.csv", f"prompt,{','.join(ADDED)}\na fox,{','.join(ADDED.values())}\n"
    )
    assert load_prompts(table) == rows
    assert prompts_of(table, column="seen") == prompts_of(table, column="dataset_seen") == ["a dog"]
    path = write(tmp_path, "q.jsonl", '{"prompt": "a fox", "id": 3, "dataset_id": 4}')
    with pytest.raises(UsageError, match="columns 'id' and 'dataset_id' both count as"):
        load_prompts(path)

    (tmp_path / "0.png").write_bytes(b"a picture")
    path = write(tmp_path, "r.jsonl", json.dumps({"file": "0.png", "text": "a fox", **ADDED}))
    assert load_pictures("file", path)[0] == [{"prompt": "a fox", "file": "0.png", **kept}]


def test_a_collection_keeps_the_ids_of_its_data_set(model_folder, tmp_path):
    path = write(tmp_path, "p.jsonl", json.dumps({"prompt": "a fox", **ADDED}))
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


def test_a_collection_whose_ids_were_dropped_resumes(model_folder, tmp_path):
    """Earlier versions wrote no dataset_id: the same command still knows its collection."""
    path = write(tmp_path, "p.jsonl", '{"prompt": "a fox", "id": "cat-7", "seen": "a dog"}')
    lines = collect_tiny(model_folder, tmp_path, dataset_name=path)
    old = {name: value for name, value in lines[0].items() if not name.startswith("dataset_")}
    (tmp_path / "acts" / "prompts.jsonl").write_text(json.dumps(old) + "\n")
    assert collect_tiny(model_folder, tmp_path, dataset_name=path) == lines


@pytest.mark.parametrize("seed", ["x", "", "1.5", "1e3", "99999999999999999999", "nan"])
def test_seeds_that_are_none(tmp_path, seed):
    with pytest.raises(UsageError, match="row 2: column 'seed' is no whole number"):
        load_prompts(write(tmp_path, "p.csv", f"prompt,seed\na,1\nb,{seed}\n"))


def test_seeds_of_some_rows_only(tmp_path):
    with pytest.raises(UsageError, match="row 1: it has no seed, and other rows have one"):
        load_prompts(write(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "seed": 3}\n'))
    with pytest.raises(UsageError, match="'seed' is no whole number of 64 bits: True"):
        load_prompts(write(tmp_path, "q.jsonl", '{"prompt": "b", "seed": true}\n'))


def collect_tiny(model_folder, tmp_path, **options):
    """Collect mid_block of the tiny model in two steps; the lines of prompts.jsonl."""
    defaults = dict(
        model_name=str(model_folder),
        hook_names=["mid_block"],
        num_inference_steps=2,
        height=32,
        width=32,
    )
    defaults |= dict(out_dir=str(tmp_path / "acts"), store_dtype="float32", device="cpu")
    cfg = collect.Config(**defaults | options)
    collect.main(cfg)
    return [
        json.loads(line)
        for line in (Path(cfg.out_dir) / "prompts.jsonl").read_text("utf-8").splitlines()
    ]


def test_a_collection_uses_the_columns_of_its_data_set(model_folder, tmp_path):
    """With the seeds and negative prompts in the table it has the bytes of one whose options say
    the same."""
    path = write(
        tmp_path,
        "P.CSV",
        "prompt;negative_prompt;seed\n"
        + "".join(f"{p};dark;{7 + i}\n" for i, p in enumerate(PROMPTS)),
    )
    plain = write(tmp_path, "p.txt", "\n".join(PROMPTS))
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
    assert lines == same and [line["seed"] for line in lines] == [7, 8, 9] and other != lines
    a, b, c = ((tmp_path / name / "mid_block.npy").read_bytes() for name in "abc")
    assert a == b != c


def test_files_of_macos_are_no_pictures(tmp_path):
    from PIL import Image


    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".thumbs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / ".thumbs" / "a.png")
    prompts, sources = load_pictures(str(tmp_path))
    assert prompts == [{"prompt": "", "image": "a.png"}] and sources == [str(tmp_path / "a.png")]


# ----------------------------------------------------------------------------------------- descriptions of other packages


def change_json(path, change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    "change",
    [
        {"signed": True},
        {"jumprelu": 0.1},
        {"abs_topk": True},
        {"dataset_norm": 3.5},
        {"normalize_input": "layer_norm"},
        {"W_skip": 1},
        {"training": {"signed": True}, "pre_bias": -1.0},
    ],
    ids=str,
)
def test_a_sparsify_folder_with_an_unknown_key_is_refused(tmp_path, change):
    Sae(12, 30, 4).save_to_disk(tmp_path)
    change_json(tmp_path / "cfg.json", change)
    with pytest.raises(UsageError, match=f"cfg.json says {list(change)[-1]}.* can't be loaded"):
        Sae.load_from_disk(tmp_path)


@pytest.mark.parametrize("key", ["apply_b_dec_to_input", "use_relu", "encoder_bias"])
def test_a_key_that_is_off_may_change_the_meaning(tmp_path, key):
    Sae(12, 30, 4).save_to_disk(tmp_path)
    change_json(tmp_path / "cfg.json", {key: False})
    with pytest.raises(UsageError, match=f"says {key} False"):
        Sae.load_from_disk(tmp_path)


def test_an_export_for_saelens_comes_back_with_its_hook_point(tmp_path):
    site = {
        "hook_name": "mid_block",
        "side": "diff",
        "stream": "image",
        "rows": "uncond",
        "fingerprint": "a-b",
    }
    Sae(12, 30, 4, site | {"model_name": "toy"}).save_to_disk(tmp_path / "sae")
    export.main(
        export.Config(
            sae=str(tmp_path / "sae"), export="saelens", out_dir=str(tmp_path / "exported")
        )
    )
    sae = Sae.load_from_disk(tmp_path / "exported")
    assert (
        sae.hook_point == HookPoint("mid_block", "diff", "image", "uncond")
        and sae.cfg["fingerprint"] == "a-b"
    )


@pytest.mark.parametrize(
    "text",
    ["a solid red  star", "a RED\u00a0star", "red\nstar", "\uff52\uff45\uff44 star", "a red star"],
)
def test_a_concept_of_two_words_whatever_stands_between(text):
    assert with_word([text, "a blue ring"], " red  star ").tolist() == [True, False]


def test_what_changes_nothing_is_loaded(tmp_path):
    Sae(12, 30, 4).save_to_disk(tmp_path)
    off = {
        "signed": False,
        "jumprelu": None,
        "transcode": False,
        "multi_topk": True,
        "expansion_factor": 32,
        "some_list": [],
    }
    change_json(tmp_path / "cfg.json", off)
    assert Sae.load_from_disk(tmp_path).k == 4
    change_json(
        tmp_path / "cfg.json", {"training": {"digest": "0"}, "of_another_version": 1}
    )  # of train.py
    assert Sae.load_from_disk(tmp_path).k == 4
    change_json(tmp_path / "cfg.json", {"num_latents": 31})
    with pytest.raises(UsageError, match="expected encoder.weight"):
        Sae.load_from_disk(tmp_path)


@pytest.mark.parametrize(
    "old, change, name",
    [
        (False, {"use_error_term_bias": 1.5}, "use_error_term_bias"),
        (False, {"signed": True}, "signed"),
        (True, {"signed": True}, "signed"),
        (True, {"activation_fn_kwargs": {"k": 4, "signed": True}}, "signed"),
        (True, {"input_scale": 2.0}, "input_scale"),
    ],
    ids=str,
)
def test_a_saelens_folder_with_an_unknown_key_is_refused(tmp_path, old, change, name):
    save_saelens_by_hand(tmp_path, "topk", old=old)
    assert Sae.load_from_disk(tmp_path).k == 4
    change_json(tmp_path / "cfg.json", change)
    with pytest.raises(UsageError, match=f"says {name} "):
        Sae.load_from_disk(tmp_path)


@pytest.mark.parametrize("where", ["config", "trainer"])
def test_a_dictionary_learning_folder_with_an_unknown_key_is_refused(tmp_path, where):
    save_dictionary_by_hand(tmp_path, "AutoEncoderTopK")
    config = json.loads((tmp_path / "config.json").read_text())
    (config if where == "config" else config["trainer"])["dataset_norm"] = 3.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="config.json says dataset_norm 3.5"):
        Sae.load_from_disk(tmp_path)


@pytest.mark.parametrize(
    "kind, missing",
    [
        ("AutoEncoderTopK", ["k", "threshold"]),
        ("AutoEncoderTopK", ["threshold"]),
        ("BatchTopKSAE", ["k"]),
    ],
)
def test_old_dictionary_learning_files_have_k_in_their_config(tmp_path, kind, missing):
    save_dictionary_by_hand(tmp_path, kind)
    expected = Sae.load_from_disk(tmp_path)
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    torch.save(
        {name: tensor for name, tensor in state.items() if name not in missing}, tmp_path / "ae.pt"
    )
    sae = Sae.load_from_disk(tmp_path)
    x = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(0)) + 3
    assert sae.k == expected.k == 4 and torch.equal(sae(x), expected(x))
    if kind == "AutoEncoderTopK":
        config = json.loads((tmp_path / "config.json").read_text())
        del config["trainer"]["k"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save(
            {name: tensor for name, tensor in state.items() if name != "k"}, tmp_path / "ae.pt"
        )
        with pytest.raises(UsageError, match="k is None"):
            Sae.load_from_disk(tmp_path)


# ------------------------------------------------------------------------------------------------ what the model sees


@pytest.mark.parametrize(
    "text, word, has",
    [
        ("a dotted star", "dot", False),
        ("a Dot, red", "dot", True),
        ("a caf\u00e9 at night", "cafe\u0301", True),  # the same letter, typed in two ways
        ("a cafe\u0301 at night", "caf\u00e9", True),
        ("a cafe\u0301 at night", "cafe", False),
        ("eine Straße", "STRASSE", True),
        ("雪の中の赤い狐", "狐", True),
        ("一只红色的狐狸在雪中", "狐狸", True),
        ("一只红色的狐狸在雪中", "狗", False),
        ("แมวสีแดง", "แมว", True),
        ("ที่บ้าน", "ท", False),  # a vowel sign belongs to the letter before it
        ("हिन्दी", "ह", False),
        ("a red fox", "red fox", True),
        ("red_hair", "hair", True),  # as tags are written
        ("red_hair", "air", False),
        ("赤いfox", "fox", True),
    ],
)
def test_which_prompts_have_a_word(text, word, has):
    assert with_word([text, "x" if has else word], word).tolist() == [has, not has]


def test_words_with_accents_and_signs_stay_whole():
    assert words_of("Cafe\u0301, l’été; हिन्दी red-hot") == [
        "caf\u00e9",
        "l'été",
        "हिन्दी",
        "red-hot",
    ]


@pytest.mark.parametrize("recipe", [sd15, sdxl, flux, lumina2], ids=lambda f: f.__name__)
def test_the_text_that_the_encoders_receive(recipe):
    """A long prompt gives the encoders the ids of its `Encoding`, cut at its limit, and no other
    word would fit in."""
    pipe = build(recipe)
    prompt, received = " ".join(f"w{i}" for i in range(400)), []
    listen = lambda module, args, kwargs: received.append(
        kwargs.get("input_ids", args[0] if args else None)
    )
    for component in pipe.components.values():
        if hasattr(component, "get_input_embeddings"):
            component.register_forward_pre_hook(listen, with_kwargs=True)
    with watch_tokenizers(pipe) as calls:
        pipe(**generate_options(1, recipe, prompt=[prompt]))
    seen, rows = SeenText(calls, [prompt]), [row.tolist() for ids in received for row in ids]
    assert seen.encodings and calls
    for encoding in seen.encodings:
        whole = f"{encoding.before}{encoding.prepared(prompt)}{encoding.after}"
        ids = list(
            encoding.tokenizer(whole, truncation=True, max_length=encoding.limit)["input_ids"]
        )
        assert any(row[: len(ids)] == ids for row in rows) and len(ids) <= encoding.limit
    text = seen.text(prompt)
    more = prompt[: len(text)] + prompt[len(text) :].partition(" w")[0] + " w999"
    assert 0 < len(text) < len(prompt) and prompt.startswith(f"{text} ") and seen.text(more) == text
    assert seen.text("a red fox") == "a red fox"
    calls.clear()
    pipe.tokenizer("a red fox")
    assert not calls  # they are not watched any more


def test_without_a_tokenizer_all_is_seen():
    assert SeenText([], []).text("a fox") == "a fox"


@pytest.mark.parametrize(
    "text, before, after",
    [
        ("blurred, ugly", None, None),
        ("reds", None, None),
        ("blurred, red", "blurred, ", ""),
        ("say:red<end>", "say:", "<end>"),
    ],
)
def test_a_prompt_is_found_as_whole_words(text, before, after):
    call = TokenizerCall(SimpleNamespace(model_max_length=77), text, {"truncation": True})
    found = [(encoding.before, encoding.after) for encoding in SeenText([call], ["red"]).encodings]
    assert found == ([] if before is None else [(before, after)])


LONG = "a picture with very many words that go on and on until the end of what the encoder takes dotted"


@pytest.fixture
def long_collection(model_folder, tmp_path):
    """Six prompts, two of which say "dotted" behind the 77 tokens of the encoder, one before; the
    tiny one counts letters."""
    prompts = [LONG, f"{LONG} too", "a dotted star", "a red fox", "a blue star", "green bottles"]
    path = write(tmp_path, "p.txt", "\n".join(prompts))
    return path, collect_tiny(model_folder, tmp_path, dataset_name=path), tmp_path / "acts"


def test_words_behind_the_end_of_the_encoder_do_not_count(long_collection, tmp_path, monkeypatch):
    _, lines, folder = long_collection
    cut = lines[0]["seen"]
    assert LONG.startswith(f"{cut} ") and "dotted" not in cut and len(cut.replace(" ", "")) <= 75
    assert [line.get("seen") for line in lines] == [cut, cut, None, None, None, None]
    assert [line["prompt"] for line in lines[:2]] == [LONG, f"{LONG} too"]

    data = str(folder / "mid_block.npy")
    Sae(16, 40, 4, {"data": [data], "hook_name": "mid_block"}).save_to_disk(tmp_path / "sae")
    page = features.main(
        features.Config(sae=str(tmp_path / "sae"), out_dir=str(tmp_path / "pages"), device="cpu")
    )
    shown = read_page(page)
    where = [caption for caption, *_ in shown["examples"]].index(LONG)
    assert shown["seen"][str(where)] == cut and len(shown["seen"]) == 2
    assert with_word([seen_text(line) for line in lines], "dotted").tolist() == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]

    sae = Sae.load_from_disk(tmp_path / "sae")
    target = Target(str(tmp_path / "sae"), sae, None, features=[], activations=Activations([data]))
    config = steer.Config(concept="dotted")
    with_it, without = steer.choose_of_concept(config, target, steer.score_images(config, target))
    assert with_it == [lines[2]] and without == [lines[p] for p in (0, 1, 3, 4, 5)]


def test_a_collection_of_an_earlier_version_is_extended(long_collection, model_folder, tmp_path):
    """Its prompts.jsonl does not say what the encoders cut."""
    path, lines, folder = long_collection
    old = [{name: value for name, value in line.items() if name != "seen"} for line in lines]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    Path(path).write_text(Path(path).read_text() + "\na yellow ring")
    extended = collect_tiny(model_folder, tmp_path, dataset_name=path)
    assert extended[:6] == lines and len(extended) == 7


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_search_of_the_page_uses_what_the_encoder_receives(model_folder, tmp_path):
    path = write(
        tmp_path,
        "p.txt",
        "\n".join([LONG, "a dotted star", "a caf\u00e9", "红色的狐狸", "a red fox", "a dog"]),
    )
    collect_tiny(model_folder, tmp_path, dataset_name=path)
    data = str(tmp_path / "acts" / "mid_block.npy")
    Sae(16, 40, 4, {"data": [data], "hook_name": "mid_block"}).save_to_disk(tmp_path / "sae")
    options = dict(
        sae=str(tmp_path / "sae"), out_dir=str(tmp_path / "pages"), device="cpu", top_images=1
    )
    page = features.main(features.Config(**options))
    shown = read_page(page)
    captions = [caption for caption, *_ in shown["examples"]]
    of_feature = [captions[top[0]] if top else None for top in shown["top"]]
    with Browser() as browser:
        browser.open(page)
        set_value = "(() => {{ const q = document.getElementById('{}'); q.value = '{}'; q.dispatchEvent(new Event('{}')); }})()"
        browser.run(set_value.format("where", "prompts", "change"))
        for query, captions_found in (
            ("dotted", ["a dotted star"]),
            ("CAFE\u0301", ["a caf\u00e9"]),
            ("狐狸", ["红色的狐狸"]),
        ):
            browser.run(set_value.format("query", query, "input"))
            count = int(browser.run("document.getElementById('count').textContent").split()[0])
            assert count == sum(caption in captions_found for caption in of_feature), query


# --------------------------------------------------------------------------------------------- leftovers of a killed run


class Killed(Exception):
    """What stands for kill -9: nothing is put in order after it."""


def kill_at(monkeypatch, module, name, count=1):
    """Let the count-th call of a module's function end the program."""
    calls, original = [], getattr(module, name)

    def call(*args, **options):
        calls.append(name)
        if len(calls) == count:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(module, name, call)


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """A tiny collection and an SAE of it that nobody trained: (activation file, SAE folder)."""
    base = tmp_path_factory.mktemp("trained")
    collect_tiny(model_folder, base, height=64, width=64)
    data = str(base / "acts" / "mid_block.npy")
    Sae(16, 40, 4, {"data": [data], "hook_name": "mid_block"}).save_to_disk(base / "sae")
    return data, str(base / "sae")


STAGES = {  # module, its options, which of its functions is killed, what is left then
    "steer, its model": (
        "steer",
        {"features": ["3"], "num_prompts": 2},
        "model_of",
        ["steer.json"],
    ),
    "steer, its numbers": (
        "steer",
        {"features": ["3"], "num_prompts": 2},
        "write_json",
        ["steer.json", "steer.png"],
    ),
    "ablate": (
        "ablate",
        {"hook_names": ["mid_block"], "max_num_examples": 2},
        "ablate",
        ["ablate.json"],
    ),
    "evaluate": ("evaluate", {}, "write_json", ["evaluate.json"]),
    "evaluate, its picture": ("evaluate", {}, "plot_evaluation", ["evaluate.json"]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_command_again_after_a_kill(trained, model_folder, tmp_path, monkeypatch, stage):
    name, options, function, left = STAGES[stage]
    module = importlib.import_module(name)
    size = dict(num_inference_steps=2, pipeline_kwargs='{"height": 64, "width": 64}')
    own = {"steer": dict(sae=[trained[1]], **size), "evaluate": dict(sae=trained[1])}
    own["ablate"] = dict(model_name=str(model_folder), num_inference_steps=2, height=64, width=64)
    cfg = module.Config(out_dir=str(tmp_path / "out"), device="cpu", **own[name], **options)
    with monkeypatch.context() as patch:
        kill_at(patch, module, function)
        with pytest.raises(Killed):
            module.main(cfg)
    folder = tmp_path / "out" if name == "ablate" else next((tmp_path / "out").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == left
    record = folder / f"{name}.json"
    assert json.loads(record.read_text()).get("unfinished") or function == "plot_evaluation"
    assert module.main(cfg)
    assert "unfinished" not in json.loads(record.read_text()) and (folder / f"{name}.png").exists()
    others = {"steer": ("num_prompts", 2, 1), "ablate": ("seed", 0, 1)}
    if name in others:
        option, ours, other = others[name]
        with pytest.raises(UsageError, match=f"was made with {option} {ours}, not {other}"):
            module.main(replace(cfg, **{option: other}))


def test_leftovers_of_an_unfinished_run_are_nobody_s_result(tmp_path):
    """After one that failed before it made anything the next may have other options; else they
    would mix."""
    (tmp_path / "steer.json.partial").write_text('{"options": ')
    (tmp_path / "._steer.png").write_bytes(b"\0")
    claim_folder(tmp_path, "steer.json", {"seed": 0})
    claim_folder(tmp_path, "steer.json", {"seed": 1})
    (tmp_path / "steer.png").write_bytes(b"half")
    with pytest.raises(UsageError, match="was made with seed 1, not 0"):
        claim_folder(tmp_path, "steer.json", {"seed": 0})
    claim_folder(tmp_path, "steer.json", {"seed": 1})
    write_json(tmp_path / "steer.json", {"options": {"seed": 1}})
    claim_folder(tmp_path, "steer.json", {"seed": 1})
    with pytest.raises(UsageError, match="was made with seed 1, not 0"):
        claim_folder(tmp_path, "steer.json", {"seed": 0})
    (tmp_path / "steer.json").unlink()
    with pytest.raises(
        UsageError, match="holds something else; choose another --out_dir .steer.png is there"
    ):
        claim_folder(tmp_path, "steer.json", {"seed": 1})


@pytest.mark.parametrize(
    "left", ["sae_weights.safetensors.partial", "sae_weights.safetensors", "both"]
)
def test_export_again_after_a_kill(tmp_path, left):
    Sae(12, 30, 4).save_to_disk(tmp_path / "saes" / "mine")
    command = ("export.py", "--sae", "saes/mine", "--export", "saelens")
    whole = tmp_path / "whole"
    Sae.load_from_disk(tmp_path / "saes" / "mine")
    export.main(
        export.Config(sae=str(tmp_path / "saes" / "mine"), export="saelens", out_dir=str(whole))
    )
    out = tmp_path / "exported" / "mine"
    out.mkdir(parents=True)
    weights = (whole / "sae_weights.safetensors").read_bytes()
    if left == "both":
        (out / "cfg.json").write_bytes((whole / "cfg.json").read_bytes())
        (out / "sae_weights.safetensors").write_bytes(weights)
    else:
        (out / left).write_bytes(weights[:500])
    done = run_script(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(
        (out / name).read_bytes() == (whole / name).read_bytes()
        for name in ("cfg.json", "sae_weights.safetensors")
    )
    (out / "notes.txt").write_text("mine")
    (out / "cfg.json").unlink()
    with pytest.raises(
        UsageError, match="holds something else; choose another --out_dir .notes.txt is there"
    ):
        export.main(
            export.Config(sae=str(tmp_path / "saes" / "mine"), export="saelens", out_dir=str(out))
        )


# ------------------------------------------------------------------------------------------------------ other systems


def test_files_of_macos_are_passed_over(trained, model_folder, tmp_path):
    folder = tmp_path / "acts"
    folder.mkdir()
    for name in ("mid_block.npy", "mid_block.json", "prompts.jsonl", "mid_block.npy.partial"):
        (folder / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
    collect_tiny(model_folder, tmp_path)  # into this folder
    assert newest_activations(folder) == folder / "mid_block.npy"
    (data,) = open_activations([str(folder)])
    assert data.paths == [str(folder / "mid_block.npy")]
    assert "mid_block.npy" in hub.card(folder, "me/acts", "activations")
    with pytest.raises(UsageError, match="holds 12 rows, more than 5; nothing to do"):
        collect_tiny(model_folder, tmp_path, max_num_examples=5)

    assert not any(
        fnmatch(name, pattern)
        for pattern in hub.NOT_PUSHED
        for name in ("mid_block.npy", "images/0.webp")
    )
    np.save(folder / ".backup.npy", np.zeros((2, 16), np.float32))  # hidden by a user or an editor
    (folder / ".backup.json").write_text("{}")
    (data,) = open_activations([str(folder)])
    assert data.paths == [str(folder / "mid_block.npy")]
    assert ".backup" not in hub.card(folder, "me/acts", "activations")
    for name in (
        ".DS_Store",
        "._mid_block.npy",
        ".backup.npy",
        "images/._0.webp",
        ".thumbs/0.webp",
    ):
        assert any(fnmatch(name, pattern) for pattern in hub.NOT_PUSHED), name

    for name in ("sae.safetensors", "cfg.json"):
        (Path(trained[1]) / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
    assert list(Sae.load_many(Path(trained[1]).parent)) == ["mid_block"]


def test_files_are_read_where_the_system_has_no_preadv(tmp_path, monkeypatch):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)))
    monkeypatch.delattr(os, "preadv")
    memory = memoryview(bytearray(56))
    with path.open("rb") as file:
        fill(file.fileno(), memory, 200, path)
        assert (
            bytes(memory) == bytes(range(200, 256)) and file.tell() == 0
        )  # other threads read through it too
        with pytest.raises(UsageError, match="has become shorter"):
            fill(file.fileno(), memory, 201, path)


@pytest.mark.parametrize("script", ["collect", "train", "steer"])
def test_on_windows_the_first_line_says_that_it_is_not_supported(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(module.main, module.Config)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(
        f"{script}.py: error: Windows is not supported; run this in WSL"
    )


# ------------------------------------------------------------------------------------------------- tiny and huge numbers

SCALES = [2.0**-66, 2.0**-40, 2.0**40]  # the first: values of 1e-20


@pytest.mark.parametrize("scale", [*SCALES, 2.0**100])
def test_metrics_do_not_depend_on_the_scale(scale):
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    x_hat = x + 0.3 * torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    x[7] = 0  # whose cosine is 0
    found = []
    for factor in (1.0, scale):
        metrics = Metrics(4)
        metrics.update(
            factor * x, factor * x_hat, torch.ones(50, 1), torch.zeros(50, 1, dtype=torch.int64)
        )
        found.append((metrics.fvu, metrics.cosine))
    assert found[0] == found[1] and 0.9 < found[0][1] < 1


@pytest.mark.parametrize("scale", [2.0**-66, 2.0**-80, 2.0**66])
def test_standardized_vectors_do_not_depend_on_the_scale(scale):
    sae = Sae(12, 30, 4, {"input_unit_norm": True})
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) + 1
    x[7], x[8] = 0, 3  # which have no variance
    unit, _, std = sae.standardize(x)
    plain = (x - x.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    assert torch.equal(std, plain)  # of usual numbers the bits are those of the formula
    torch.testing.assert_close(sae.standardize(scale * x)[0], unit, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae(scale * x), scale * sae(x), rtol=1e-5, atol=scale * 1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_scores_of_features_do_not_depend_on_the_scale(scale):
    scores = torch.rand(20, 3, 30, generator=torch.Generator().manual_seed(0)).relu()
    scores[:, :, 5] = 0
    there = torch.arange(20) % 3 == 0
    torch.testing.assert_close(
        contrast(scale * scores, there), contrast(scores, there), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        saeuron(scale * scores, there), saeuron(scores, there), rtol=1e-4, atol=1e-6
    )
    sae = Sae(12, 30, 4)
    torch.testing.assert_close(
        toward(sae, scale * scores, there, ~there), toward(sae, scores, there, ~there)
    )


def test_scores_of_the_usual_size_are_not_copied():
    scores = torch.tensor([[-3.0, 2.0], [0.0, 1.0]])
    assert scaled(scores) is scores
    assert usual_scale(2.0**40 * scores) == 2.0**-41 and usual_scale(-scores * 2.0**40) == 2.0**-41
    assert torch.equal(scaled(2.0**40 * scores), scores / 2)
    assert (
        usual_scale(torch.tensor([torch.nan, 1e20]))
        == usual_scale(torch.tensor([torch.inf, 1e-20]))
        == 1
    )


@pytest.mark.parametrize(
    "options", [{}, {"activation": "batchtopk"}, {"input_unit_norm": True}], ids=str
)
def test_an_sae_of_tiny_activations(tmp_path, options):
    """It is as good as that of the same vectors in other units; it was not trained with the very
    same bits."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((24, 2, 32, 12)) * rng.uniform(0.2, 3, 12) + 1).astype(np.float32)
    found = []
    for name, scale in (("usual", 1), ("tiny", 2.0**-66)):
        np.save(tmp_path / f"{name}.npy", x * np.float32(scale))
        size = dict(
            num_latents=[30],
            k=[4],
            num_epochs=3,
            effective_batch_size=64,
            device="cpu",
            out_dir=str(tmp_path / "saes"),
        )
        (folder,) = train.main(
            train.Config(data=[str(tmp_path / f"{name}.npy")], run_name=name, **size, **options)
        )
        evaluate.main(
            evaluate.Config(sae=str(folder), out_dir=str(tmp_path / "evaluations"), device="cpu")
        )
        report = json.loads((tmp_path / "evaluations" / name / "evaluate.json").read_text())
        typical = Typical([str(tmp_path / f"{name}.npy")])
        norm, distance = typical(torch.from_numpy(x[:4, 0] * np.float32(scale)), 0.0)
        found.append(
            [report["fvu"], report["cosine"], report["l0"], *norm.tolist(), *distance.tolist()]
        )
        cfg = json.loads((folder / "cfg.json").read_text())
        assert (
            cfg["num_training"] == 3 * cfg["num_training_in_data"]
            and cfg["num_training_in_data"] < 24 * 2 * 32
        )
        card = hub.card(folder, "me/sae", "sae")
        assert f"| training vectors in the data | {cfg['num_training_in_data']} |" in card
        assert f"| vectors seen in training, repeats counted | {cfg['num_training']} |" in card
    assert found[1] == pytest.approx(found[0], rel=0.05) and found[0][1] > 0.85


# -------------------------------------------------------------------------------------------------- several processes

GROUP = """
import sys, time
import distributed
from cli import run_script
from dataclasses import dataclass

@dataclass
class Config:
    how: str = "works"
    rank: int = 0

def main(cfg):
    distributed.START, distributed.NOTE, distributed.BEAT, distributed.SILENCE = 15.0, 2.0, 0.3, 4.0
    processes = distributed.Processes()
    mine = processes.rank == cfg.rank
    processes.barrier()
    print("all there", file=sys.stderr, flush=True)
    if cfg.how == "ends" and mine:
        raise OSError("no such prompt file")
    if cfg.how in ("killed", "asleep") and mine:
        time.sleep(3600)
    if cfg.how == "works":
        time.sleep(6 * mine)  # longer than SILENCE
    if cfg.how == "asleep":
        processes.barrier()
    print(processes.all_gather(processes.rank), flush=True)
    processes.barrier()
    processes.close()

run_script(main, Config)
"""


@pytest.fixture
def start_group(tmp_path):
    """Starts processes as torchrun on two machines would, without one that ends those of the other
    machine."""
    every = []

    def start(*options, ranks=(0, 1)):
        started = start_processes(tmp_path, options, ranks)
        every.extend(started.values())
        return started

    yield start
    for process in every:
        process.kill()
        process.communicate()


def start_processes(tmp_path, options, ranks, count=2):
    """{rank: process} of a group of `count`, of which only `ranks` are started."""
    (tmp_path / "group.py").write_text(GROUP)
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    started = {}
    for rank in ranks:
        variables = dict(
            RANK=rank,
            WORLD_SIZE=count,
            LOCAL_RANK=0,
            LOCAL_WORLD_SIZE=1,
            GROUP_RANK=rank,
            GROUP_WORLD_SIZE=count,
        )
        variables |= dict(
            MASTER_ADDR="localhost", MASTER_PORT=port, PYTHONPATH=Path(cli.__file__).parent
        )
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, str(tmp_path / "group.py"), *options]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started[rank] = subprocess.Popen(command, env=environment, **pipes)
    return started


def wait_until_there(process):
    while "all there" not in process.stderr.readline():
        assert process.poll() is None


def test_processes_that_live_are_waited_for(start_group):
    started = start_group("--rank", "1")
    said = {rank: process.communicate(timeout=60) for rank, process in started.items()}
    assert all(process.returncode == 0 for process in started.values()), said
    assert said[0][0] == "[0, 1]\n" and said[0][1] == "all there\n"


def test_a_process_that_never_starts_is_named(start_group):
    (alone,) = start_group(ranks=(0,)).values()
    said = alone.communicate(timeout=60)[1]
    assert alone.returncode == 2 and said.count("waiting for process 1 of 2") >= 2
    assert (
        "group.py (process 0 of 2): error: process 1 of 2 did not start within 15 s; see what it says\n"
        in said
    )


def test_a_process_that_ends_early_is_named(start_group):
    started = start_group("--how", "ends", "--rank", "1")
    said = {rank: process.communicate(timeout=60)[1] for rank, process in started.items()}
    assert "group.py (process 1 of 2): error: no such prompt file\n" in said[1]
    assert (
        "group.py (process 0 of 2): error: process 1 of 2 has ended; see what it says, the same command resumes\n"
        in said[0]
    )
    assert started[0].returncode == started[1].returncode == 2


@pytest.mark.parametrize("how", ["killed", "asleep"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_dies_is_noticed(start_group, how, rank):
    """A stopped process keeps its connections, as a machine without power seems to: "asleep" waits
    in gloo, "killed" in tell."""
    started = start_group("--how", how, "--rank", str(rank))
    wait_until_there(started[rank])
    wait_until_there(started[1 - rank])
    started[rank].send_signal(signal.SIGSTOP)
    said = started[1 - rank].communicate(timeout=40)[1]
    assert (
        started[1 - rank].returncode == 2
        and "error: " in said
        and "the same command resumes\n" in said
    )
    assert "Traceback" not in said


def test_it_is_said_how_a_negative_prompt_was_taken(tmp_path, capsys):
    """A column that is spelled wrongly would be a text for all prompts."""
    path = write(tmp_path, "p.csv", "prompt,neg_prompt\na fox,dark\n")
    assert load_prompts(path, negative_prompt="negprompt")[0]["negative_prompt"] == "negprompt"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "the text 'negprompt' is used for all prompts" in said
    assert "did you mean the column 'neg_prompt'?" in said

    assert load_prompts(path, negative_prompt="neg_prompt")[0]["negative_prompt"] == "dark"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "each prompt has its own, from the column 'neg_prompt'" in said

    load_prompts(path, negative_prompt="ugly, blurred")
    said = capsys.readouterr().out
    assert "the text 'ugly, blurred' is used for all prompts" in said and "did you" not in said

    load_prompts("a fox", negative_prompt="ugly")  # nothing can be mistaken
    load_prompts(path)
    assert capsys.readouterr().out == ""


def test_a_column_of_negative_prompts_beside_real_images_is_said_to_be_unused(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = write(tmp_path, "p.csv", "prompt,picture,negative_prompt\na fox,a.png,dark\n")
    prompts, _ = load_pictures("picture", path)
    assert "negative_prompt" not in prompts[0]
    assert "--images does not use the column negative_prompt" in capsys.readouterr().out


@pytest.mark.parametrize("first", [{"prompt": "a"}, {"prompt": "a", "negative_prompt": None}])
def test_a_negative_prompt_in_a_later_row_counts(tmp_path, first):
    """Whatever the first row has."""
    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (first, {"prompt": "b", "negative_prompt": "blue", "no": "red"})
        )
    )
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
