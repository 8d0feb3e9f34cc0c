"""Files that macOS adds, systems without preadv, and Windows."""

import importlib
import os
import sys
from fnmatch import fnmatch

import numpy as np
import pytest
from tiny_runs import collect_tiny

import cli
from errors import UsageError
from sae import Sae
from store import hub
from store.dataset import newest_activations, open_activations
from store.disk import fill
from store.prompts import load_pictures


def test_files_of_macos_are_no_pictures(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".thumbs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / ".thumbs" / "a.png")
    prompts, sources = load_pictures(str(tmp_path))
    assert prompts == [{"prompt": "", "image": "a.png"}]
    assert sources == [str(tmp_path / "a.png")]


@pytest.mark.slow
def test_files_of_macos_are_passed_over(untrained_sae, model_folder, tmp_path):
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
        (untrained_sae / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
    assert list(Sae.load_many(untrained_sae.parent)) == ["mid_block"]


def test_files_are_read_where_the_system_has_no_preadv(tmp_path, monkeypatch):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)))
    monkeypatch.delattr(os, "preadv")
    memory = memoryview(bytearray(56))
    with path.open("rb") as file:
        fill(file.fileno(), memory, 200, path)
        assert bytes(memory) == bytes(range(200, 256))
        assert file.tell() == 0  # other threads read through it too
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
    assert stopped.value.code == 2
    assert error.startswith(f"{script}.py: error: Windows is not supported; run this in WSL")
