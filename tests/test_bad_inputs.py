"""Three hundred generated mistakes, and twenty of them as real command lines: one line and status
2, or a run that is right.

Never a traceback, never a hang, never a file changed that was there before. `pytest
--hypothesis-seed=N` tries others.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import typing
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from commands import run_script
from files import read_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ablate
import cli
import collect
import diagnose
import evaluate
import export
import features
import steer
import train
from sae import Sae

pytestmark = pytest.mark.slow

SCRIPTS = {
    module.__name__: module
    for module in (ablate, collect, diagnose, evaluate, export, features, steer, train)
}
SECONDS = 30  # for one case, which takes one or two
X = np.random.default_rng(0).normal(size=(20, 3, 4, 8)).astype(np.float32)
# command lines and the line that each ended in, of which some are run again in earnest
refused = []


def some(number):
    same = not any(word.startswith("--hypothesis-seed") for word in sys.argv)
    return settings(
        max_examples=number, derandomize=same, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        print_blob=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory, model_folder):
    """A folder of small and right inputs, which every case gets a copy of."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(model_folder, folder / "model")
    np.save(folder / "x.npy", X)
    (folder / "prompts.csv").write_text("prompt,colour\na picture,1\nanother one,2\n")
    Sae(8, 16, 2, {"data": ["x.npy"]}).save_to_disk(folder / "sae")
    with contextlib.chdir(folder):
        options = dict(
            model_name="model", dataset_name="prompts.csv", num_inference_steps=1, device="cpu"
        )
        collect.main(
            collect.Config(hook_names=["mid_block"], height=32, width=32, out_dir="acts", **options)
        )
    d = np.load(folder / "acts" / "mid_block.npy", mmap_mode="r").shape[-1]
    Sae(d, 16, 2, {"data": ["acts/mid_block.npy"]}).save_to_disk(folder / "acts" / "sae")
    return folder


@pytest.fixture(autouse=True)
def offline_and_small(monkeypatch):
    """No case may use all of the machine's memory, or ask a hub."""
    resource = pytest.importorskip("resource")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("store.dataset.HELD_OUT", dict(share=0.1, at_least=0, at_most=10**9))
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if Path("/proc").exists()
        else 0
    )
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def at_most(seconds):
    def stop(*_):
        raise TimeoutError(f"a case took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def command(script, *more):
    """A right and quick command line of a script, and more options."""
    model = "--model_name model --dataset_name prompts.csv --num_inference_steps 1 --hook_names mid_block --max_num_examples"
    base = {
        "ablate": f"{model} 1",
        "collect": f"{model} 2",
        "diagnose": "--data x.npy --num_latents 16 --k 2 --trial_updates 2 --trial_seconds 1",
        "evaluate": "--sae sae --data x.npy",
        "features": "--sae sae --data x.npy",
        "steer": "--sae acts/sae --num_prompts 1 --multiply 0",
        "export": "--sae sae --export saelens --out_dir exported",
        "train": "--data x.npy --num_latents 16 --k 2 --max_examples 100 --effective_batch_size 50",
    }[script]
    return [
        script,
        *base.split(),
        *("--out_dir out".split() if script not in ("export", "evaluate") else []),
        *more,
    ]


def run(good, words, damage=lambda folder: None):
    """Run a command line in a copy of `good`: None if it is right, else the one line that it ends
    with."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "here"
        shutil.copytree(good, folder)
        damage(folder)
        before = contents(folder)
        err = io.StringIO()
        script = SCRIPTS[words[0]]
        with (
            contextlib.chdir(folder), at_most(SECONDS), patch.object(sys, "argv", [f"{words[0]}.py", *words[1:]]),
            contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()),
        ):  # fmt: skip
            try:
                cli.run_script(script.main, script.Config)
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
        after = contents(folder)
        # which is asked for
        outside = [
            path for path in folder.parent.iterdir() if path != folder and path.name != "outside"
        ]
    assert status in (0, 2), (words, status, err.getvalue()[-2000:])
    assert "Traceback" not in err.getvalue(), (words, err.getvalue()[-2000:])
    assert {path: after.get(path) for path in before} == before, words
    assert not outside, words
    lines = [line for line in err.getvalue().splitlines() if ": error: " in line]
    assert status == 0 or len(lines) == 1, (words, err.getvalue()[-2000:])
    return None if status == 0 else lines[0]


JUNK = [
    "", " ", "-1", "0", "1", "3", "1e400", "nan", "inf", "-inf", "99999999999999999999", "1.5", "true", "None", "{}", "[",
    '{"a": 1}', "../outside", "/proc/outside", "/dev/null", "/dev/full", "~", ".", "x.npy", "prompts.csv", "sae", "model",
    "mid_block.*", "**", "*", "cuda:99", "mps", "float16", "--", "-k", "a b", "ä€😀", "x" * 300, "\x1b[31m", "<script>", "%s%n",
    "'; rm -rf /", "hf://x/y", "a/b/c", "owner/name", "prompts.csv:1", "C:\\x",
]  # fmt: skip
# fine, but slow or elsewhere
ENDLESS = ("num_epochs", "list_hooks", "to_hub", "hf_repo_id", "log_to", "device")


def options(script):
    """Names of a script's options that a value can be given to."""
    fields = dataclasses.fields(SCRIPTS[script].Config)
    return [
        f.name
        for f in fields
        if f.name not in ENDLESS
        and typing.get_type_hints(SCRIPTS[script].Config)[f.name] is not bool
    ]


@some(120)
@given(data=st.data())
def test_options(good, data):
    """Options with junk values end in a result or in one line."""
    script = data.draw(st.sampled_from(sorted(SCRIPTS)))
    pairs = st.tuples(
        st.sampled_from(options(script)), st.sampled_from(JUNK) | st.integers(-3, 70000).map(str)
    )
    more = [
        word
        for name, value in data.draw(st.lists(pairs, min_size=1, max_size=2))
        for word in (f"--{name}", value)
    ]
    words = command(script, *more)
    line = run(good, words)
    if line:
        refused.append((words, line))


def test_numbers_that_no_tensor_holds(good):
    """Every option that takes a number, of every script."""
    for script, module in SCRIPTS.items():
        for name, kind in typing.get_type_hints(module.Config).items():
            values = ["inf", "nan"] * ("float" in str(kind)) + ["99999999999999999999"] * (
                "int" in str(kind)
            )
            for value in values:
                assert run(good, command(script, f"--{name}", value)), (script, name, value)


SHAPES = st.lists(
    st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 20, 10**6, 2**40, 2**63, 1.5, "3", None]), max_size=5
).map(tuple)
DTYPES = [
    "<f4",
    "<f2",
    ">f4",
    "<f8",
    "|O",
    "<i4",
    "|b1",
    "<U3",
    "<c8",
    "|V8",
    "f4, i4",
    "",
    "<f3",
    None,
    4,
]


def npy(descr, shape, fortran, version):
    header = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    return (
        b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header)) + header + X.tobytes()
    )


def damaged(raw):
    """Bytes of a file, cut short, or with a few of them changed."""
    cut = st.integers(0, len(raw)).map(lambda n: raw[:n])
    near = st.integers(0, min(len(raw) - 1, 400))  # where headers are
    flips = st.lists(st.tuples(near, st.integers(0, 255)), min_size=1, max_size=4)
    return cut | flips.map(lambda pairs: bytes(dict(pairs).get(i, b) for i, b in enumerate(raw)))


@some(70)
@given(data=st.data())
def test_npy_files(good, data):
    """Arrays with wrong headers, of wrong kinds or damaged end in a result or in one line."""
    headers = st.builds(
        npy,
        st.sampled_from(DTYPES),
        SHAPES,
        st.sampled_from([False, True, None]),
        st.sampled_from([1, 2, 3, 9]),
    )
    raw = data.draw(headers | damaged((good / "x.npy").read_bytes()) | st.binary(max_size=200))
    script = data.draw(st.sampled_from(["train", "diagnose", "evaluate"]))
    run(good, command(script), lambda folder: (folder / "x.npy").write_bytes(raw))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**70)
    | st.floats()
    | st.sampled_from(JUNK + ["topk", "batchtopk", "jumprelu"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "k", "data"]), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = [
    "activation",
    "k",
    "d_in",
    "num_latents",
    "input_unit_norm",
    "data",
    "hook_name",
    "training",
    "transcode",
    "batch_topk",
    "fvu",
]


@some(50)
@given(data=st.data())
def test_cfg_json(good, data):
    """SAE descriptions with other, missing or damaged entries end in a result or in one line."""
    cfg = read_json(good / "sae" / "cfg.json")
    changed = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3).map(
        lambda more: json.dumps(cfg | more).encode()
    )
    dropped = st.sampled_from(sorted(cfg)).map(
        lambda key: json.dumps({k: v for k, v in cfg.items() if k != key}).encode()
    )
    raw = data.draw(
        changed
        | dropped
        | damaged(json.dumps(cfg).encode())
        | VALUES.map(lambda v: json.dumps(v).encode())
    )
    script = data.draw(st.sampled_from(["evaluate", "export"]))
    run(good, command(script), lambda folder: (folder / "sae" / "cfg.json").write_bytes(raw))


@some(30)
@given(data=st.data())
def test_safetensors(good, data):
    """Damaged weights end in a result or in one line."""
    raw = data.draw(
        damaged((good / "sae" / "sae.safetensors").read_bytes()) | st.binary(max_size=100)
    )
    script = data.draw(st.sampled_from(["evaluate", "export"]))
    run(good, command(script), lambda folder: (folder / "sae" / "sae.safetensors").write_bytes(raw))


@some(30)
@given(data=st.data())
def test_prompt_files(good, data):
    """Prompt files with any bytes end in a result or in one line."""
    text = st.text(max_size=60).map(lambda s: s.encode("utf-8", "surrogatepass"))
    lines = st.lists(VALUES.map(lambda v: json.dumps({"prompt": v})), max_size=3).map(
        lambda rows: "\n".join(rows).encode()
    )
    raw = data.draw(
        text
        | lines
        | st.binary(max_size=60)
        | st.just(b"prompt\n\x00\n")
        | st.just(b'prompt,"\n"x\n')
    )
    name = data.draw(st.sampled_from(["p.txt", "p.csv", "p.jsonl", "p.parquet", "p.json", "p.pkl"]))
    words = command(
        "collect", "--dataset_name", name, *data.draw(st.sampled_from([[], ["--column", "prompt"]]))
    )
    run(good, words, lambda folder: (folder / name).write_bytes(raw))


def test_twenty_of_them_as_command_lines(good, tmp_path):
    """What is refused in one process is refused in one of its own, with the same line."""
    cases = [case for case in refused if not any("\x00" in word for word in case[0])]
    cases = cases[:: max(1, len(cases) // 20)][:20]
    assert len(cases) == 20

    def alone(i, words, line):
        folder = tmp_path / str(i) / "here"
        shutil.copytree(good, folder)
        before = contents(folder)
        done = run_script(f"{words[0]}.py", *words[1:], cwd=folder, OMP_NUM_THREADS="1")
        assert done.returncode == 2, (words, done.stderr[-2000:])
        assert "Traceback" not in done.stderr, (words, done.stderr[-2000:])
        assert line in done.stderr, (line, done.stderr[-2000:])
        assert {path: contents(folder).get(path) for path in before} == before

    for i, case in enumerate(cases):
        alone(i, *case)


def test_no_file_can_run_code(good, tmp_path):
    """A pickle under every name that is read ends in a refusal, and its code does not run."""

    class Escape:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "escaped"),)

    import pickle

    raw = pickle.dumps(Escape())
    for script, name in (
        ("train", "x.npy"), ("diagnose", "x.npy"), ("evaluate", "x.npy"), ("evaluate", "sae/sae.safetensors"),
        ("evaluate", "sae/cfg.json"), ("export", "sae/sae.safetensors"), ("collect", "prompts.csv"), ("train", "x.json"),
    ):  # fmt: skip
        run(good, command(script), lambda folder, name=name: (folder / name).write_bytes(raw))
    objects = io.BytesIO()
    np.save(objects, np.array([Escape()], dtype=object), allow_pickle=True)
    assert "error" in run(
        good, command("train"), lambda folder: (folder / "x.npy").write_bytes(objects.getvalue())
    )

    def foreign(folder):
        shutil.rmtree(folder / "sae")
        (folder / "sae").mkdir()
        torch.save({"encoder.weight": Escape()}, folder / "sae" / "ae.pt")
        (folder / "sae" / "config.json").write_text("{}")

    assert "error" in run(good, command("evaluate"), foreign)
    assert not (tmp_path / "escaped").exists()
