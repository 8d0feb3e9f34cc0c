"""What a user can do wrong ends in one line and status 2; scripts can be pasted into a notebook."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ablate
import collect
import evaluate
import train
from cli import (
    HERE,
    is_hub_dataset,
    is_one_prompt,
    resolve_device,
    resolve_dtype,
    run_script,
)
from options import grouped_options

SCRIPTS = [
    "ablate",
    "collect",
    "diagnose",
    "train",
    "evaluate",
    "features",
    "toy.make",
    "export",
    "steer",
]


def command_line(monkeypatch, capsys, script, *options):
    """Run a script's options as its command line would: (exit status, what it printed to
    stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        run_script(script.main, script.Config)
    return stop.value.code, capsys.readouterr().err


@dataclass
class Lists:
    k: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    n: int = 0


def test_devices_and_dtypes():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    for wrong in ("gpu", "", "cuda:99" if not torch.cuda.is_available() else "mps"):
        with pytest.raises(ValueError, match="--device"):
            resolve_device(wrong)


def test_processes_take_a_gpu_each_before_anything_is_on_one(monkeypatch):
    done = []

    def noting(name, value):
        def call(*args):
            done.append((name, *args))
            return value

        return call

    def zeros(n, device):
        done.append(("zeros", device))
        return torch.ones(n)

    for name, value in dict(is_available=True, device_count=2, set_device=None).items():
        monkeypatch.setattr(torch.cuda, name, noting(name, value))
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for count, device in ((3, "auto"), (3, "cuda"), (2, "cuda:0"), (2, "cuda:1")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
        with pytest.raises(
            ValueError,
            match="3 processes for 2 GPUs" if count == 3 else f"--device {device}: each of the 2",
        ):
            resolve_device(device)
        assert not {"zeros", "set_device"} & {name for name, *_ in done}
    assert resolve_device("auto") == torch.device("cuda")
    assert done[-2:] == [
        ("set_device", 1),
        ("zeros", "cuda"),
    ]
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert ("set_device", 0) not in done


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(cfg):
        np.zeros(3).reshape(2, 2)

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(ValueError, match="cannot reshape"):
        run_script(main, Lists)


@dataclass
class Numbers:
    k: list[int] = field(default_factory=list)
    lr: float | None = None
    seed: int = 0


@pytest.mark.parametrize(
    "option",
    ["lr inf", "lr nan", "lr -1e39", "seed 9223372036854775808", "k 1 99999999999999999999"],
)
def test_numbers_that_no_tensor_can_hold(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["x.py", *f"--{option}".split()])
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda cfg: pytest.fail("it ran"), Numbers)
    assert (
        f"x.py: error: --{option.replace('1 9', '9').replace('1e', '1e+')}: expected"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "argv", "x.py --k 1 9223372036854775807 --lr 1e38 --seed -1".split())
    run_script(lambda cfg: None, Numbers)


def fail(message, cfg):
    raise RuntimeError(message)


def test_of_runtime_errors_only_a_peer_that_is_gone_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    for count, error, raised in ((2, "Connection closed by peer", SystemExit), (2, "bug", RuntimeError),
                                (1, "Connection closed by peer", RuntimeError)):  # fmt: skip
        monkeypatch.setenv("WORLD_SIZE", str(count))
        with pytest.raises(raised):
            run_script(partial(fail, error), Lists)
    assert (
        capsys.readouterr().err
        == "x.py (process 0 of 2): error: another process ended; the same command resumes\n"
    )


def mistakes(tmp_path, model_folder):
    """(what, script, options, what the line says)"""
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "some.csv").write_text("a,b\n1,2\n")
    (tmp_path / "file").write_text("")
    x = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "int.npy", x.astype(np.int32))
    np.save(tmp_path / "object.npy", np.array([{}, None]), allow_pickle=True)
    (tmp_path / "short.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:5000])
    np.save(tmp_path / "nan.npy", np.where(np.arange(400)[:, None] == 7, np.nan, x))
    np.save(tmp_path / "inf.npy", np.where(np.arange(400)[:, None] == 7, np.inf, x))
    np.save(tmp_path / "flat.npy", x[:, 0])
    model = [
        "--model_name",
        model_folder,
        "--out_dir",
        tmp_path / "a",
        "--num_inference_steps",
        2,
        "--max_num_examples",
        2,
    ]
    (tmp_path / "some.jsonl").write_text('{"a": "text", "b": 2}\n')
    for folder in ("none", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"\x89PNG")
    pictures = [*model[:4]]
    one_hook = ["--hook_names", "mid_block"]
    saes = ["--out_dir", tmp_path / "s", "--device", "cpu"]
    return [
        (
            "unknown hook name",
            collect,
            [*model, "--hook_names", "up_blocks.0.attention.1"],
            "up_blocks.0.attentions.1",
        ),
        (
            "unknown glob",
            collect,
            [*model, "--hook_names", "up_blocks.*.attn"],
            "no module matches",
        ),
        ("missing model folder", collect, ["--model_name", tmp_path / "nothing"], "no folder"),
        (
            "a folder that is no model",
            collect,
            ["--model_name", tmp_path, "--dataset_name", "a cat"],
            "model_index.json",
        ),
        (
            "empty prompt file",
            collect,
            [*model, "--dataset_name", tmp_path / "empty.txt"],
            "no prompts",
        ),
        (
            "missing prompt file",
            collect,
            [*model, "--dataset_name", tmp_path / "none.txt"],
            "no prompt file",
        ),
        (
            "missing column",
            collect,
            [*model, "--dataset_name", tmp_path / "some.csv", "--column", "c"],
            "from: a, b",
        ),
        (
            "out_dir below a file",
            collect,
            [*model, "--hook_names", "mid_block", "--out_dir", tmp_path / "file" / "a"],
            "can't be made",
        ),
        (
            "a table of another kind",
            collect,
            [*model, "--dataset_name", tmp_path / "x.npy"],
            "no prompt file",
        ),
        ("batches of none", collect, [*model, "--batch_size", 0], "--batch_size 0"),
        ("no examples", collect, [*model, "--max_num_examples", 0], "--max_num_examples 0"),
        ("a bad pattern", collect, [*model, "--hook_names", "attn[z-a]"], "no pattern"),
        ("a missing variant", collect, [*model, "--variant", "fp16"], "can't be loaded"),
        (
            "text tokens",
            collect,
            [*model, "--hook_names", "mid_block", "--stream", "text"],
            "no text tokens",
        ),
        (
            "other shapes",
            collect,
            [*model, "--hook_names", "down_blocks.0", "--side", "diff"],
            "--side diff",
        ),
        (
            "an option in the JSON",
            collect,
            [*model, "--pipeline_kwargs", '{"generator": 1}'],
            "generator",
        ),
        ("no such device", collect, [*model, "--device", "tpu"], "--device"),
        (
            "bad pipeline_kwargs",
            collect,
            [*model, "--hook_names", "mid_block", "--pipeline_kwargs", "{"],
            "--pipeline_kwargs",
        ),
        (
            "no guidance",
            collect,
            [*model, "--hook_names", "mid_block", "--rows", "uncond", "--guidance_scale", 1],
            "guidance",
        ),
        (
            "no pictures",
            collect,
            [*pictures, *one_hook, "--images", tmp_path / "none"],
            "no picture there",
        ),
        (
            "a column of pictures",
            collect,
            [*pictures, *one_hook, "--images", "nowhere"],
            "no such folder",
        ),
        (
            "a broken picture",
            collect,
            [*pictures, *one_hook, "--images", tmp_path / "broken"],
            "0.png can't be read",
        ),
        (
            "no picture in a row",
            collect,
            [*pictures, "--images", "b", "--dataset_name", tmp_path / "some.jsonl"],
            "no picture: 2",
        ),
        (
            "steps and pictures",
            collect,
            [*model, "--images", tmp_path / "broken"],
            "--timesteps_per_image",
        ),
        (
            "what the pipeline refuses",
            collect,
            [
                *model,
                *one_hook,
                "--pipeline_kwargs",
                '{"callback_on_step_end_tensor_inputs": ["x"]}',
            ],
            "has to be in",
        ),
        ("missing data", train, [*saes, "--data", tmp_path / "none.npy"], "none.npy"),
        ("integers", train, [*saes, "--data", tmp_path / "int.npy"], "int32"),
        ("objects", train, [*saes, "--data", tmp_path / "object.npy"], "object.npy"),
        ("truncated", train, [*saes, "--data", tmp_path / "short.npy"], "short.npy"),
        ("one axis", train, [*saes, "--data", tmp_path / "flat.npy"], "shape"),
        ("NaN", train, [*saes, "--data", tmp_path / "nan.npy"], "NaN"),
        ("inf", train, [*saes, "--data", tmp_path / "inf.npy"], "inf"),
        (
            "k > num_latents",
            train,
            [*saes, "--data", tmp_path / "x.npy", "--k", 9, "--num_latents", 8],
            "9",
        ),
        (
            "more latents than memory",
            train,
            [*saes, "--data", tmp_path / "x.npy", "--num_latents", 10**11],
            "GB are free",
        ),
        (
            "saes below a file",
            train,
            ["--data", tmp_path / "x.npy", "--out_dir", tmp_path / "file" / "s"],
            "file",
        ),
    ]


def test_mistakes_end_with_one_line_and_status_2(monkeypatch, capsys, tmp_path, model_folder):
    for what, script, options, message in mistakes(tmp_path, model_folder):
        before = sorted(p for p in tmp_path.rglob("*"))
        capsys.readouterr()
        status, err = command_line(monkeypatch, capsys, script, *options)
        lines = [
            line for line in err.splitlines() if line.startswith(f"{script.__name__}.py: error: ")
        ]
        assert status == 2, (what, err)
        assert len(lines) == 1, (what, err)
        assert err.rstrip().endswith(lines[0]), (what, err)
        assert message in lines[0], (what, err)
        assert "Traceback" not in err, what
        made = [p for p in tmp_path.rglob("*") if p not in before and p.is_file()]
        assert not made, (what, made)


@pytest.fixture
def short(model_folder, tmp_path):
    """Options of a short collection into tmp_path/a."""
    what = ["--model_name", model_folder, "--hook_names", "mid_block", "--num_inference_steps", 2]
    return [*what, "--out_dir", tmp_path / "a"]


def test_no_free_space(monkeypatch, capsys, tmp_path, short):
    """A collection that would not fit on the disk ends in one line, and nothing is written."""
    monkeypatch.setattr(
        collect.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    status, err = command_line(monkeypatch, capsys, collect, *short)
    assert status == 2
    assert "do not fit" in err
    assert not (tmp_path / "a").exists()


def test_other_settings(monkeypatch, capsys, tmp_path, short):
    """A collection with other settings ends in one line, and no byte of the old one changes."""
    monkeypatch.setattr(sys, "argv", ["collect.py", *map(str, short)])
    run_script(collect.main, collect.Config)
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    status, err = command_line(monkeypatch, capsys, collect, *short, "--seed", 5)
    assert status == 2
    assert "another --out_dir" in err
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before


@pytest.mark.slow  # a Python of its own imports torch
def test_a_real_command_line_has_no_traceback(tmp_path):
    """One of them in a process of its own: the guard, the status and stderr."""
    done = subprocess.run(
        [sys.executable, HERE / "train.py", "--data", str(tmp_path / "none.npy")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("train.py: error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script):
    words = ["-m", script] if "." in script else [f"{script}.py"]
    done = subprocess.run(
        [sys.executable, *words, "--help"], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {'python -m ' if '.' in script else ''}{words[-1]} "), (
        done.stdout
    )
    module = importlib.import_module(script)
    for options in grouped_options(module.Config).values():
        for option in options:
            name = option.field.name
            assert name == "command" or f"--{name}" in done.stdout, name
            assert option.help.endswith("."), f"{name} has no docstring that is a sentence"
            assert option.help in " ".join(done.stdout.split()), name
    assert module.__doc__.splitlines()[0] in " ".join(done.stdout.split())


@pytest.mark.parametrize("script", ["train", "export"])
def test_a_reader_of_the_output_that_ends_early_is_no_error(script, tmp_path):
    """As in `python train.py --help | head -1`. `true` has ended long before Python writes."""
    done = subprocess.run(
        f"{sys.executable} {HERE}/{script}.py --help | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() in ("0", "141")
    assert done.stderr == ""


@pytest.fixture
def shell(monkeypatch, tmp_path):
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.chdir(HERE)
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_pasted_into_a_notebook_defines_its_names_and_runs_nothing(
    shell, script, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    shell.run_cell((HERE / f"{script.replace('.', '/')}.py").read_text()).raise_error()
    assert shell.user_ns["__name__"] == "__main__"
    assert shell.user_ns["Config"].__dataclass_fields__
    assert callable(shell.user_ns["main"])
    assert capsys.readouterr().out == ""


def test_main_works_from_a_notebook(shell, tmp_path, model_folder):
    shell.run_cell((HERE / "collect.py").read_text()).raise_error()
    out = tmp_path / "acts"
    options = dict(
        model_name=str(model_folder),
        hook_names=["mid_block"],
        out_dir=str(out),
        num_inference_steps=2,
    )
    cell = f"main(Config(**{options}, max_num_examples=3))"
    shell.run_cell(cell).raise_error()
    assert np.load(out / "mid_block.npy").shape == (3, 2, 64, 16)


def test_percent_run_does_run(shell, capsys):
    shell.run_cell("%run collect.py --help")
    assert "--hook_names" in capsys.readouterr().out


@pytest.mark.slow  # a Python of its own imports torch
def test_the_folder_kernels_gets_on_with_the_package_of_that_name(tmp_path):
    """transformers imports from Hugging Face's `kernels` where its metadata says that a fitting
    version is installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        "from .layer import Mode\nfrom kernels.layer import other\n"
    )
    (tmp_path / "kernels" / "layer.py").write_text("class Mode: pass\nother = 7\n")
    code = (
        "import sae; from kernels import Mode, other, decode; from kernels.layer import Mode as same; "
        "from kernels.decode import decode as ours; assert other == 7 and decode is ours is sae.decode"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


GRAFT = "it is for --graft, which is not given"
UNUSED = [  # script, options of which nothing reads the first, why
    (collect, ["--split", "test"], "only a data set of the hub has splits"),
    (collect, ["--split", "test", "--dataset_name", "a cat"], "only a data set of the hub"),
    (ablate, ["--split", "test"], "only a data set of the hub has splits"),
    (collect, ["--column", "prompt", "--dataset_name", "a cat"], "'a cat' is the prompt itself"),
    (ablate, ["--column", "prompt", "--dataset_name", "cat"], "'cat' is the prompt itself"),
    (collect, ["--revision", "main"], "--model_name toy is a folder"),
    (ablate, ["--revision", "main"], "--model_name toy is a folder"),
    (collect, ["--text_tokens", 8], "it is for --stream text"),
    (collect, ["--timesteps_per_image", 3], "it is for --images"),
    (collect, ["--column", "text", "--images", "photos"], "is a folder, without captions"),
    (collect, ["--split", "test", "--images", "photos"], "only a data set of the hub has splits"),
    (evaluate, ["--model_name", "toy"], GRAFT),
    (evaluate, ["--num_prompts", 3], GRAFT),
    (evaluate, ["--windows", 2], GRAFT),
    (evaluate, ["--graft_batch_size", 2], GRAFT),
]


@pytest.mark.parametrize("script, options, why", UNUSED)
def test_an_option_that_nothing_reads_is_refused(
    script, options, why, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.new("RGB", (32, 32)).save("photos/a.png")
    few = [] if script is evaluate else ["--max_num_examples", 1, "--out_dir", "out"]
    status, err = command_line(monkeypatch, capsys, script, *options, *few, "--device", "cpu")
    assert status == 2
    assert f"{options[0]} has no effect: " in err
    assert why in err
    assert not Path("out").exists()


@pytest.mark.parametrize("script", [collect, ablate])
def test_an_argument_that_is_given_twice_is_refused(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    twice = ["--num_inference_steps", 2, "--pipeline_kwargs", '{"num_inference_steps": 1}']
    few = ["--max_num_examples", 1, "--device", "cpu"]
    status, err = command_line(monkeypatch, capsys, script, *twice, *few)
    assert status == 2
    assert "num_inference_steps is given twice" in err


def test_what_is_a_prompt_and_what_is_a_data_set(tmp_path):
    table = tmp_path / "my prompts.csv"
    table.write_text("prompt\na cat\n")
    assert [is_one_prompt(name) for name in ("cat", "a cat / a dog", "a cat")] == [True] * 3
    names = (None, str(table), "prompts.csv", "no such prompts.csv", "owner/name")
    assert not any(is_one_prompt(name) for name in names)
    assert is_hub_dataset("owner/name")
    assert not any(is_hub_dataset(name) for name in (None, "a cat / a dog", "cat", str(table)))
