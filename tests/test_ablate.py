"""The ablations do what they say, and the report holds what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import PROMPTS, build, generate_options, sd15

import ablate
from hook import HookedDiffusionModel

HOOK = "up_blocks.0.attentions.1"


@pytest.fixture
def config(model_folder, tmp_path):
    return ablate.Config(
        hook_names=["**.attentions.*", "down_blocks.0"],
        model_name=str(model_folder),
        out_dir=str(tmp_path / "ablate"),
        num_inference_steps=2,
        max_num_examples=3,
        device="cpu",
    )


def test_what_each_mode_puts_in_place():
    x, y = torch.randn(6, 4, 2, 2), torch.randn(6, 4, 2, 2)
    assert torch.equal(ablate.edit("skip", 3)(None, (x,), (y, "rest"))[0], x)
    assert ablate.edit("skip", 3)(None, (x,), (y, "rest"))[1] == "rest"
    assert not ablate.edit("zero", 3)(None, (x,), y).any()
    mean = ablate.edit("mean", 3)(None, (x,), y)
    assert torch.equal(mean[0], y[:3].mean(0)) and torch.equal(mean[2], mean[0])  # each chunk of the guidance has its own
    assert torch.equal(mean[5], y[3:].mean(0))


def test_distances_by_hand():
    latents, images = torch.ones(2, 1, 2, 2), torch.zeros(2, 3, 2, 2)
    moved = (latents * torch.tensor([2.0, 1.0]).view(2, 1, 1, 1), images + 0.5)
    assert ablate.distances(moved, (latents, images)) == pytest.approx((0.5, 0.5))


def test_the_untouched_run_is_the_pipelines():
    pipe = build(sd15)
    options = {k: v for k, v in generate_options(2).items() if k != "generator"}
    latents, images = ablate.generate(
        HookedDiffusionModel.from_pipeline(pipe), {}, PROMPTS[:2], 7, options | {"output_type": "pt"}
    )
    seeds = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    assert torch.equal(latents, pipe(PROMPTS[:2], **options | {"generator": seeds}).images)
    assert images.shape == (2, 3, 32, 32) and 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize("mode", ["skip", "zero", "mean"])
def test_a_report(config, mode, capsys):
    ablate.main(replace(config, mode=mode))
    out = Path(config.out_dir)
    report = json.loads((out / "ablate.json").read_text())
    hooks = {h["hook_name"]: h for h in report["hooks"]}
    assert len(hooks) == 5 and report["seeds"] == [0, 1, 2] and len(report["prompts"]) == 3
    ranked = [h["latents"] for h in report["hooks"] if "latents" in h]
    assert ranked == sorted(ranked, reverse=True) and min(ranked) > 0
    assert (hooks[HOOK]["tokens"], hooks[HOOK]["d"], hooks[HOOK]["grid"]) == (64, 16, [8, 8])
    assert hooks[HOOK]["mb_per_prompt"] == 2 * 64 * 16 * 2 / 1e6
    assert ("error" in hooks["down_blocks.0"]) == (mode == "skip")  # its output has another shape than its input
    printed = capsys.readouterr().out
    assert all(name in printed for name in hooks) and str(out / "ablate.png") in printed
    pictures = Image.open(out / "ablate.png")
    assert min(pictures.size) > 300 and (out / "ablate_ranking.png").exists()


def test_other_settings_and_too_few_prompts_are_refused(config):
    ablate.main(config)
    before = (Path(config.out_dir) / "ablate.png").read_bytes()
    with pytest.raises(ValueError, match="choose another --out_dir"):
        ablate.main(replace(config, mode="zero"))
    assert (Path(config.out_dir) / "ablate.png").read_bytes() == before
    with pytest.raises(ValueError, match="two prompts"):
        ablate.main(replace(config, mode="mean", max_num_examples=1, out_dir=config.out_dir + "2"))
