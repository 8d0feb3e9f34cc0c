"""evaluate.py: the numbers that training ended with, any SAE, the graft as a user runs it, and
every way to refuse."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from described import describe
from files import read_json, read_lines, write_lines
from tiny_runs import collect_tiny

import evaluate
import train
from errors import UsageError
from evaluate import Config, main
from sae import Sae
from store.dataset import open_activations

pytestmark = pytest.mark.slow


class Trained(NamedTuple):
    """An activation file of the tiny pipeline, and the folder of an SAE trained on it."""

    activations: Path
    sae: Path


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("evaluate")
    collect_tiny(
        model_folder,
        base,
        num_inference_steps=4,
        height=64,
        width=64,
        batch_size=6,
        max_num_examples=12,
    )
    activations = base / "acts" / "mid_block.npy"
    config = train.Config(
        data=[str(activations)],
        num_latents=[40],
        k=[4],
        out_dir=str(base / "saes"),
        run_name="run",
        device="cpu",
    )
    (folder,) = train.main(config)
    return Trained(activations, folder)


def evaluation_config(trained, out_dir, **options):
    return Config(sae=str(trained.sae), out_dir=str(out_dir), device="cpu", **options)


def test_the_numbers_are_those_that_training_ended_with(trained, tmp_path, capsys):
    main(evaluation_config(trained, tmp_path))
    report = read_json(tmp_path / "run" / "evaluate.json")
    cfg = Sae.load_from_disk(trained.sae).cfg
    printed = capsys.readouterr().out
    for name in ("fvu", "explained_variance", "l0", "cosine", "dead", "always_on"):
        assert report[name] == pytest.approx(cfg[name], rel=1e-6)
        assert f"{cfg[name]:.4f}" in printed
    timesteps = [row["timestep"] for row in report["by_timestep"]]
    assert len(timesteps) == 4
    assert timesteps == [row["timestep"] for row in cfg["by_timestep"]]
    assert (tmp_path / "run" / "evaluate.png").stat().st_size > 10_000
    main(evaluation_config(trained, tmp_path))  # the same command again is no mistake


def test_graft_generates_held_out_prompts_with_the_seeds_of_the_activations(
    trained, tmp_path, monkeypatch
):
    """Also where several videos were made for each prompt: one of each is generated again."""
    read_description = evaluate.read_description
    graft = evaluate.graft
    generations = []

    def describe_two_videos(path):
        description = read_description(path)
        arguments = description["pipeline_kwargs"] | {"num_videos_per_prompt": 2}
        return description | {"pipeline_kwargs": arguments}

    def graft_and_note(*args, **options):
        generations.append(args[3])
        return graft(*args, **options)

    monkeypatch.setattr(evaluate, "read_description", describe_two_videos)
    monkeypatch.setattr(evaluate, "graft", graft_and_note)
    written = main(evaluation_config(trained, tmp_path, graft=True, num_prompts=2, windows=2))
    names = ["evaluate.json", "evaluate.png", "graft.json", "graft.png"]
    assert [path.name for path in written] == names
    report = read_json(tmp_path / "run" / "graft.json")
    collected = set()
    for row in read_lines(trained.activations.with_name("prompts.jsonl")):
        collected.add((row["prompt"], row["seed"]))
    assert set(zip(generations[0].prompts, generations[0].seeds)) <= collected
    assert report["hook_name"] == "mid_block"
    assert report["num_steps"] == 4
    assert len(report["windows"]) == 2
    assert report["all"]["latents"]["mean"] > 0
    assert (tmp_path / "run" / "graft.png").exists()


def test_an_sae_on_other_data(trained, tmp_path):
    """Without timesteps there is no report by timestep, and nothing is known to generate."""
    flat = tmp_path / "flat.npy"
    width = Sae.load_from_disk(trained.sae).d_in
    np.save(flat, np.random.default_rng(0).standard_normal((500, width), np.float32))
    main(evaluation_config(trained, tmp_path / "out", data=[str(flat)]))
    assert read_json(tmp_path / "out" / "run" / "evaluate.json")["by_timestep"] == []
    with pytest.raises(ValueError, match="run was made with data .*; choose another --out_dir"):
        main(evaluation_config(trained, tmp_path / "out"))
    with pytest.raises(ValueError, match="not known what to generate"):
        main(evaluation_config(trained, tmp_path / "out2", data=[str(flat)], graft=True))


def test_what_can_not_be_evaluated(trained, tmp_path):
    numbers = np.arange(50, dtype=np.float32)
    np.save(tmp_path / "wide.npy", numbers[:, None].repeat(3, axis=1))
    with pytest.raises(ValueError, match="width 3"):
        main(evaluation_config(trained, tmp_path, data=[str(tmp_path / "wide.npy")]))
    Sae(3, 8, 2).save_to_disk(tmp_path / "bare")
    with pytest.raises(ValueError, match="name some with --data"):
        main(Config(sae=str(tmp_path / "bare"), device="cpu"))
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        main(evaluation_config(trained, tmp_path / "out"))
    assert [path.name for path in Path(tmp_path / "out" / "run").iterdir()] == ["thesis.txt"]
    assert torch.is_grad_enabled()


def test_graft_says_that_all_images_are_of_one_prompt(tmp_path):
    """They come from collect.py, and there is nothing to hold out."""
    path = tmp_path / "block.npy"
    np.save(path, np.random.default_rng(0).standard_normal((20, 2, 3, 4), np.float32))
    rows = [{"id": 0, "prompt": "a red fox", "seed": seed} for seed in range(20)]
    write_lines(tmp_path / "prompts.jsonl", rows)
    describe(path, shape=[20, 2, 3, 4], num_images_per_prompt=20)
    activations = open_activations([path])[0]
    with pytest.raises(UsageError, match="all 20 rows of .*block.npy are of one prompt"):
        evaluate.held_out_prompts(activations, 4)
    path.with_suffix(".json").unlink()
    (tmp_path / "prompts.jsonl").unlink()
    activations = open_activations([path])[0]
    with pytest.raises(UsageError, match="is not from collect.py with its prompts.jsonl"):
        evaluate.held_out_prompts(activations, 4)
