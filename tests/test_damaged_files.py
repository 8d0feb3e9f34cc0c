"""Activation files that are unfinished, cut or damaged end in one line, in every stage."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from commands import ROOT, run_script
from files import write_activations

import features
import train
from analysis.concepts import image_scores
from errors import UsageError
from sae import Sae
from store.dataset import Activations

pytestmark = pytest.mark.slow

STAGES = {
    "evaluate.py": ["--sae", "sae"],
    "features.py": ["--sae", "sae"],
    "steer.py": ["--sae", "sae", "--concept", "red"],
    "train.py": ["--data", "acts/block.npy", "--num_latents", 16, "--out_dir", "more"],
    "diagnose.py": ["--data", "acts/block.npy"],
}


@pytest.mark.parametrize("script", STAGES)
def test_a_stopped_extension_is_refused_by_every_stage(script, described_sae, tmp_path):
    """What is not yet written reads as zeros; the file has no description then, and another
    name."""
    folder = shutil.copytree(described_sae, tmp_path / "base")
    (folder / "acts" / "block.npy").rename(folder / "acts" / "block.npy.partial")
    (folder / "acts" / "block.json").unlink()
    done = run_script(script, *STAGES[script], "--device", "cpu", cwd=folder)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "block.npy.partial is not finished" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("script", STAGES)
def test_a_file_that_is_cut_while_it_is_read_is_one_line(script, described_sae, tmp_path):
    """It was opened whole, so only reading can notice; a memory map ended Python with SIGBUS."""
    folder = shutil.copytree(described_sae, tmp_path / "base")
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = {[script, *map(str, STAGES[script]), "--device", "cpu"]!r}
import store.dataset
begin = store.dataset.Activations.__init__
def begin_and_cut(self, *args, **options):
    begin(self, *args, **options)
    os.truncate(self.paths[0], 1000)
store.dataset.Activations.__init__ = begin_and_cut
import {script[:-3]} as stage
from cli import run_script
run_script(stage.main, stage.Config)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, (done.returncode, done.stderr)
    assert "block.npy" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("cut", [False, True])
def test_other_readers_notice_a_cut_too(cut, tmp_path):
    x = np.random.default_rng(0).standard_normal((6, 2, 64, 8)).astype(np.float32)
    write_activations(tmp_path / "block.npy", x)
    activations = Activations([tmp_path / "block.npy"])
    if cut:
        os.truncate(tmp_path / "block.npy", 400)
    readers = [
        lambda: list(activations.held_out()),
        lambda: activations.sample(64),
        lambda: activations.read_image(5),
        lambda: image_scores(Sae(8, 16, 2), activations),
        lambda: list(activations.batches(32, 64)),
    ]
    for reader in readers:
        with (
            pytest.raises(
                UsageError,
                match="block.npy (has become shorter while it was read|was replaced or changed while it was in use)",
            )
            if cut
            else nullcontext()
        ):
            reader()


def damaged_arrays(good, path):
    """Files in the place of a good array of whole numbers."""
    np.save(path, good)
    whole = path.read_bytes()
    damages = {
        "empty": b"",
        "garbage": os.urandom(300),
        "cut": whole[:-3],
        "half a header": whole[:50],
    }
    for name, wrong in (
        ("shape", good[:-1]),
        ("float", good.astype(np.float32)),
        ("text", good.astype("U1")),
        ("beyond", np.full_like(good, 9999)),
        ("negative", np.full(good.shape, -1, np.int64)),
    ):
        np.save(path, wrong)
        damages[name] = path.read_bytes()
    np.save(path, good.astype(object), allow_pickle=True)
    damages["pickle"] = path.read_bytes()
    return damages


def test_damaged_files_beside_the_activations_are_one_line(described_sae, tmp_path):
    x = np.random.default_rng(0).standard_normal((4, 2, 5, 8)).astype(np.float32)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 2, 5)).astype(np.uint16)
    write_activations(tmp_path / "block.npy", x, grid=[8, 8], tokens=tokens)
    config = features.Config(
        sae=str(described_sae / "sae"),
        data=[str(tmp_path / "block.npy")],
        out_dir=str(tmp_path),
        device="cpu",
    )
    features.main(config)
    path = tmp_path / "block.tokens.npy"
    for name, data in damaged_arrays(tokens, path).items():
        path.write_bytes(data)
        with pytest.raises(UsageError, match="block.tokens.npy"):
            features.main(config)
        assert name
    done = run_script(
        "features.py",
        "--sae",
        described_sae / "sae",
        "--data",
        tmp_path / "block.npy",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "block.tokens.npy" in done.stderr

    lengths = np.array([5, 3, 1, 2])
    (tmp_path / "text").mkdir()
    write_activations(tmp_path / "text" / "block.npy", x, stream="text", lengths=lengths)
    path = tmp_path / "text" / "block.lengths.npy"
    for data in damaged_arrays(lengths, path).values():
        path.write_bytes(data)
        with pytest.raises(UsageError, match="block.lengths.npy"):
            Activations([tmp_path / "text" / "block.npy"])
    done = run_script(
        "train.py", "--data", tmp_path / "text" / "block.npy", "--device", "cpu", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "block.lengths.npy" in done.stderr


DAMAGED_LINES = [
    "3",
    "[1]",
    '"text"',
    "null",
    "{}",
    '{"iteration": "1"}',
    "{",
    "\x00\x00",
    '{"iteration": 1, "fvu": null}',
]


def test_a_damaged_line_of_metrics_jsonl_is_one_line(described_sae, tmp_path, monkeypatch):
    words = [
        "--data",
        described_sae / "acts" / "block.npy",
        "--num_latents",
        16,
        "--k",
        2,
        "--effective_batch_size",
        64,
    ]
    words += ["--log_every", 2, "--out_dir", tmp_path, "--run_name", "run", "--device", "cpu"]
    path = tmp_path / "run" / "metrics.jsonl"
    options = dict(
        data=[str(described_sae / "acts" / "block.npy")],
        num_latents=[16],
        k=[2],
        effective_batch_size=64,
        log_every=2,
    )
    config = train.Config(**options, out_dir=str(tmp_path), run_name="run", device="cpu")
    real = train.SparseUpdate.step
    calls = []

    def step(*args, **options):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.SparseUpdate, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    good = path.read_text()
    first, rest = good.split("\n", 1)
    for line in DAMAGED_LINES:
        path.write_text(f"{first}\n{line}\n{rest}")
        with pytest.raises(UsageError, match="metrics.jsonl: line 2 is damaged; remove it"):
            train.main(config)
    done = run_script("train.py", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "line 2 is damaged" in done.stderr
    path.write_text(f"{good}\x00\x00\n{{")  # as a power cut leaves it
    train.main(config)
    iterations = [json.loads(line)["iteration"] for line in path.read_text().splitlines()]
    assert iterations == sorted(set(iterations))
    assert len(iterations) > 10
