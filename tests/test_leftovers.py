"""Leftovers of killed runs: the same command finishes them, and nobody takes them for results."""

import importlib
from dataclasses import replace

import pytest
from commands import run_script
from files import read_json

import export
from errors import UsageError
from sae import Sae
from store.disk import claim_folder, write_json

pytestmark = pytest.mark.slow


class Killed(Exception):
    """What stands for kill -9: nothing is put in order after it."""


def kill_at(monkeypatch, module, name, count=1):
    """Let the count-th call of a module's function end the program."""
    calls = []
    original = getattr(module, name)

    def call(*args, **options):
        calls.append(name)
        if len(calls) == count:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(module, name, call)


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
def test_the_same_command_again_after_a_kill(
    untrained_sae, model_folder, tmp_path, monkeypatch, stage
):
    name, options, function, left = STAGES[stage]
    module = importlib.import_module(name)
    size = dict(num_inference_steps=2, pipeline_kwargs='{"height": 64, "width": 64}')
    options_of = {
        "steer": dict(sae=[str(untrained_sae)], **size),
        "evaluate": dict(sae=str(untrained_sae)),
    }
    options_of["ablate"] = dict(
        model_name=str(model_folder), num_inference_steps=2, height=64, width=64
    )
    cfg = module.Config(out_dir=str(tmp_path / "out"), device="cpu", **options_of[name], **options)
    with monkeypatch.context() as patch:
        kill_at(patch, module, function)
        with pytest.raises(Killed):
            module.main(cfg)
    folder = tmp_path / "out" if name == "ablate" else next((tmp_path / "out").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == left
    record = folder / f"{name}.json"
    assert read_json(record).get("unfinished") or function == "plot_evaluation"
    assert module.main(cfg)
    assert "unfinished" not in read_json(record)
    assert (folder / f"{name}.png").exists()
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
