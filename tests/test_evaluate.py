"""evaluate.py: the numbers that training ended with, any SAE, the graft as a user runs it, and
every way to refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from described import describe

import collect
import evaluate
import train
from errors import UsageError
from evaluate import Config, main
from sae import Sae
from store.dataset import open_activations


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """A folder with activations of a tiny pipeline and an SAE of them; (activation file, SAE
    folder)."""
    base = tmp_path_factory.mktemp("evaluate")
    options = dict(
        model_name=str(model_folder),
        device="cpu",
        num_inference_steps=4,
        height=64,
        width=64,
        batch_size=6,
    )
    collect.main(
        collect.Config(
            hook_names=["mid_block"], max_num_examples=12, out_dir=str(base / "acts"), **options
        )
    )
    path = next((base / "acts").glob("mid_block*.npy"))
    train.main(
        train.Config(
            data=[str(path)],
            num_latents=[40],
            k=[4],
            out_dir=str(base / "saes"),
            run_name="run",
            device="cpu",
        )
    )
    return path, base / "saes" / "run"


def config(trained, out_dir, **options):
    return Config(sae=str(trained[1]), out_dir=str(out_dir), device="cpu", **options)


def test_the_numbers_are_those_that_training_ended_with(trained, tmp_path, capsys):
    main(config(trained, tmp_path))
    found, cfg = (
        json.loads((tmp_path / "run" / "evaluate.json").read_text()),
        Sae.load_from_disk(trained[1]).cfg,
    )
    said = capsys.readouterr().out
    for name in ("fvu", "explained_variance", "l0", "cosine", "dead", "always_on"):
        assert found[name] == pytest.approx(cfg[name], rel=1e-6) and f"{cfg[name]:.4f}" in said
    assert [row["timestep"] for row in found["by_timestep"]] == [
        row["timestep"] for row in cfg["by_timestep"]
    ]
    assert (
        len(found["by_timestep"]) == 4
        and (tmp_path / "run" / "evaluate.png").stat().st_size > 10_000
    )
    main(config(trained, tmp_path))  # again: the same


def test_graft_generates_held_out_prompts_with_the_seeds_of_the_activations(
    trained, tmp_path, monkeypatch
):
    asked, real, of = [], evaluate.graft, evaluate.read_description
    several = lambda path: (
        of(path) | {"pipeline_kwargs": of(path)["pipeline_kwargs"] | {"num_videos_per_prompt": 2}}
    )
    monkeypatch.setattr(
        evaluate, "read_description", several
    )  # of which one each is generated again
    monkeypatch.setattr(
        evaluate, "graft", lambda *args, **options: asked.append(args[3]) or real(*args, **options)
    )
    written = main(config(trained, tmp_path, graft=True, num_prompts=2, windows=2))
    assert [path.name for path in written] == [
        "evaluate.json",
        "evaluate.png",
        "graft.json",
        "graft.png",
    ]
    report = json.loads((tmp_path / "run" / "graft.json").read_text())
    rows = [
        json.loads(line) for line in trained[0].with_name("prompts.jsonl").read_text().splitlines()
    ]
    assert all(
        any(row["prompt"] == p and row["seed"] == s for row in rows)
        for p, s in zip(asked[0].prompts, asked[0].seeds)
    )
    assert (
        report["hook_name"] == "mid_block"
        and report["num_steps"] == 4
        and len(report["windows"]) == 2
    )
    assert report["all"]["latents"]["mean"] > 0 and (tmp_path / "run" / "graft.png").exists()


def test_an_sae_on_other_data(trained, tmp_path):
    np.save(
        tmp_path / "flat.npy",
        np.random.default_rng(0).standard_normal(
            (500, Sae.load_from_disk(trained[1]).d_in), np.float32
        ),
    )
    main(config(trained, tmp_path / "out", data=[str(tmp_path / "flat.npy")]))
    assert json.loads((tmp_path / "out" / "run" / "evaluate.json").read_text())["by_timestep"] == []
    with pytest.raises(ValueError, match="run was made with data .*; choose another --out_dir"):
        main(config(trained, tmp_path / "out"))
    with pytest.raises(ValueError, match="not known what to generate"):
        main(config(trained, tmp_path / "out2", data=[str(tmp_path / "flat.npy")], graft=True))


def test_what_can_not_be_evaluated(trained, tmp_path):
    np.save(
        tmp_path / "wide.npy",
        np.zeros((50, 3), np.float32) + np.arange(50, dtype=np.float32)[:, None],
    )
    with pytest.raises(ValueError, match="width 3"):
        main(config(trained, tmp_path, data=[str(tmp_path / "wide.npy")]))
    Sae(3, 8, 2).save_to_disk(tmp_path / "bare")
    with pytest.raises(ValueError, match="name some with --data"):
        main(Config(sae=str(tmp_path / "bare"), device="cpu"))
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        main(config(trained, tmp_path / "out"))
    assert [path.name for path in Path(tmp_path / "out" / "run").iterdir()] == [
        "thesis.txt"
    ] and torch.is_grad_enabled()


def test_graft_says_that_all_images_are_of_one_prompt(tmp_path):
    """They come from collect.py, and there is nothing to hold out."""
    path = tmp_path / "block.npy"
    np.save(path, np.random.default_rng(0).standard_normal((20, 2, 3, 4), np.float32))
    rows = [{"id": 0, "prompt": "a red fox", "seed": seed} for seed in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    describe(path, shape=[20, 2, 3, 4], num_images_per_prompt=20)
    activations = open_activations([path])[0]
    with pytest.raises(UsageError, match="all 20 rows of .*block.npy are of one prompt"):
        evaluate.held_out_prompts(activations, 4)
    path.with_suffix(".json").unlink()
    (tmp_path / "prompts.jsonl").unlink()
    activations = open_activations([path])[0]
    with pytest.raises(UsageError, match="is not from collect.py with its prompts.jsonl"):
        evaluate.held_out_prompts(activations, 4)
