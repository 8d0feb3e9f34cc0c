"""One file for each stage runs in an empty folder, without the repository."""

import ast
import functools
import os
import re
import subprocess
import sys

import pytest

import bundle

MODEL = "--num_inference_steps 2 --hook_names mid_block --max_num_examples 12 --device cpu"
STAGES = {  # in the order of use: each reads what the ones before it wrote
    "ablate": f"{MODEL} --max_num_examples 1 --out_dir ablate",
    "collect": f"{MODEL} --out_dir acts",
    "diagnose": "--data acts --num_latents 32 --k 2 --trial_updates 2 --trial_seconds 1",
    "train": "--data acts --num_latents 32 --k 2 --run_name one",
    "evaluate": "--sae saes/one",
    "features": "--sae saes/one",
    "steer": "--sae saes/one --features 0 --multiply 2 --num_prompts 1",
    "export": "--sae saes/one --export saelens --out_dir exported",
}
NEEDS_MODEL = ("ablate", "collect")


def run_in(folder, *words):
    """Run Python in a folder from which nothing leads to the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """All bundled files, away from the repository."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, bundle.ROOT / "bundle.py", "--out_dir", folder],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.slow
def test_the_stages_run_in_an_empty_folder(dist, tmp_path, model_folder):
    for stage, options in STAGES.items():
        words = options.split()
        if stage in NEEDS_MODEL:
            words += ["--model_name", model_folder]
        done = run_in(tmp_path, dist / f"{stage}.py", *words)
        assert done.returncode == 0, (stage, done.stderr[-3000:])
    assert "<html" in next((tmp_path / "features").glob("*.html")).read_text()
    assert (tmp_path / "steer").is_dir()
    assert (tmp_path / "exported").is_dir()


@pytest.mark.slow
def test_the_bundled_files_give_the_same_bytes_as_the_checkout(dist, tmp_path, model_folder):
    for folder, script in (
        ("bundled", dist / "collect.py"),
        ("checkout", bundle.ROOT / "collect.py"),
    ):
        words = [*MODEL.split(), "--model_name", model_folder, "--out_dir", folder]
        assert run_in(tmp_path, script, *words).returncode == 0
    bundled = (tmp_path / "bundled/mid_block.npy").read_bytes()
    assert bundled == (tmp_path / "checkout/mid_block.npy").read_bytes()


@pytest.mark.slow
def test_a_mistake_is_one_line(dist, tmp_path):
    done = run_in(tmp_path, dist / "train.py", "--ks", "3")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: error: there is no option --ks")


@pytest.mark.slow
def test_the_source_of_an_embedded_function_is_found(dist):
    """Triton compiles a kernel from what inspect.getsource says."""
    code = "import inspect, sae, store.disk; print(inspect.getsource(store.disk.read_json))"
    assert run_in(dist, "-c", code).stdout.startswith("def read_json(")


@pytest.mark.slow
def test_hook_and_sae_are_imported_side_by_side(dist):
    code = "import hook, sae, errors; assert hook.UsageError is errors.UsageError is sae.UsageError"
    done = run_in(dist, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_another_module_of_the_same_name_is_said(dist, tmp_path):
    (tmp_path / "store.py").write_text("mine = 1")
    code = f"import store, sys; sys.path.insert(0, {str(dist)!r}); import sae"
    done = run_in(tmp_path, "-c", code)
    assert "brings a module 'store', and another one is imported already" in done.stderr


def test_the_packages_are_those_of_the_requirements():
    text = bundle.bundle("train.py")
    block = text.split("# ///")[1]
    packages = ast.literal_eval(
        re.search(r"dependencies = (\[.*\])", block.replace("#", ""), re.S)[1]
    )
    assert packages == (bundle.ROOT / "requirements.txt").read_text().split("\n")[:-1]


def test_the_scripts_own_text_stands_unchanged_at_the_end(monkeypatch):
    # Most modules are in several bundles; each is parsed once.
    monkeypatch.setattr(bundle, "imported_by", functools.cache(bundle.imported_by))
    for script in bundle.BUNDLED:
        assert bundle.bundle(script).endswith((bundle.ROOT / script).read_text())
