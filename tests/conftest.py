"""Fixtures that several test files share."""

import os
import shutil
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
from project import QUARTER, make_project
from tiny import build, sd15, sdxl
from tiny_runs import COLLECTED_HOOKS, collect_tiny, save_untrained_sae, train_on_described_file
from training import save_vectors

import collect

# A background job ignores SIGINT and so do the processes that it starts; tests that press Ctrl-C
# need what a terminal gives.
signal.signal(signal.SIGINT, signal.default_int_handler)

TENTH = dict(share=0.1, at_least=0, at_most=10**9)


@pytest.fixture(params=[sd15, sdxl], ids=lambda f: f.__name__)
def pipe(request):
    return build(request.param)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Stable Diffusion 1.5-like pipeline on disk, with prompts of its own."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe = build(sd15)
    pipe.save_pretrained(folder)
    (folder / "prompts.csv").write_text(
        "prompt,colour\n" + "".join(f"a picture of {i},{i % 3}\n" for i in range(12))
    )
    return folder


@pytest.fixture(scope="module")
def untrained_sae(model_folder, tmp_path_factory):
    """The folder of an SAE with random weights, whose cfg.json names a collection of the tiny model.

    The model generated images of 64 x 64 pixels.
    """
    base = tmp_path_factory.mktemp("untrained")
    collect_tiny(model_folder, base, height=64, width=64)
    save_untrained_sae(base / "sae", base / "acts" / "mid_block.npy")
    return base / "sae"


@pytest.fixture(scope="module")
def described_sae(tmp_path_factory):
    """The folder that holds acts/block.npy, an activation file, and sae/, an SAE trained on it."""
    base = tmp_path_factory.mktemp("described")
    train_on_described_file(base)
    return base


@pytest.fixture
def collect_config(model_folder, tmp_path):
    """The options of a collection of two modules of the tiny model, in two batches."""
    return collect.Config(
        hook_names=COLLECTED_HOOKS,
        model_name=str(model_folder),
        out_dir=str(tmp_path / "acts"),
        num_inference_steps=3,
        batch_size=5,
        max_num_examples=8,
        device="cpu",
    )


@pytest.fixture
def quarter_held_out(monkeypatch):
    """A quarter of the prompts is held out, so that few of them suffice."""
    monkeypatch.setattr("store.dataset.HELD_OUT", QUARTER)


@pytest.fixture(scope="session")
def finished_project(model_folder, tmp_path_factory):
    """A project's folder (see project.py), which no test changes."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.dataset.HELD_OUT", QUARTER)
        patch.chdir(folder)
        make_project(folder, model_folder)
    return folder


@pytest.fixture
def project(finished_project, tmp_path, monkeypatch):
    """A copy of the finished project for one test, which is the current folder."""
    shutil.copytree(finished_project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def tenth_held_out(monkeypatch):
    """A tenth of the vectors is held out, even of a small file."""
    monkeypatch.setattr("store.dataset.HELD_OUT", TENTH)


@pytest.fixture
def small_data(tenth_held_out, monkeypatch):
    """A small file is read and shuffled as a large one: in several blocks, with a tenth held out."""
    monkeypatch.setattr("store.shuffle.BLOCK_BYTES", 64)


@pytest.fixture(scope="module")
def vectors_file(tmp_path_factory):
    """An activation file of 40 prompts (see training.save_vectors)."""
    path = tmp_path_factory.mktemp("vectors") / "acts.npy"
    save_vectors(path)
    return path
