"""The ablations do what they say, and the report holds what was measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from files import read_json
from PIL import Image
from tiny import PROMPTS, build, generate_options, sd15

import ablate
from diffusion.generate import Generated
from errors import UsageError
from hook import HookedDiffusionModel
from store.images import Media

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


@pytest.mark.parametrize("mode", ablate.EDITS)
def test_what_each_mode_puts_in_place(mode):
    pipe = build(sd15)
    seen = []
    module, follower = (
        pipe.unet.get_submodule("mid_block." + name) for name in ("attentions.0", "resnets.1")
    )
    module.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
    follower.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    hooked.run_with_hooks(
        {"mid_block.attentions.0": ablate.EDITS[mode]}, PROMPTS, **generate_options(3)
    )
    (before, after), edited = seen[-2:]
    # unconditional and conditional rows each have their own mean
    chunks = after.unflatten(0, (2, 3))
    mean = chunks.mean(1, keepdim=True).expand_as(chunks).flatten(0, 1)
    expected = {"skip": before, "zero": torch.zeros_like(after), "mean": mean}[mode]
    assert torch.allclose(edited, expected, atol=1e-6)
    assert mode == "mean" or torch.equal(edited, expected)


def test_distances_by_hand():
    latents = torch.ones(2, 1, 2, 2)
    images = torch.zeros(2, 3, 2, 2)
    moved_latents = latents * torch.tensor([2.0, 1.0]).view(2, 1, 1, 1)
    moved = Generated(moved_latents, Media("image", images + 0.5))
    untouched = Generated(latents, Media("image", images))
    assert ablate.distances(moved, untouched) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    "mode",
    [
        "skip",
        pytest.param("zero", marks=pytest.mark.slow),
        pytest.param("mean", marks=pytest.mark.slow),
    ],
)
def test_a_report(config, mode, capsys):
    """The report ranks the hook points by what ablating them changes; what can't be ablated has an
    error."""
    ablate.main(replace(config, mode=mode))
    out = Path(config.out_dir)
    report = read_json(out / "ablate.json")
    hooks = {h["hook_name"]: h for h in report["hooks"]}
    assert len(hooks) == 5
    assert report["seeds"] == [0, 1, 2]
    assert len(report["prompts"]) == 3
    ranked = [h["latents"] for h in report["hooks"] if "latents" in h]
    assert ranked == sorted(ranked, reverse=True)
    assert min(ranked) > 0
    assert (hooks[HOOK]["tokens"], hooks[HOOK]["d"], hooks[HOOK]["grid"]) == (64, 16, [8, 8])
    assert hooks[HOOK]["mb_per_prompt"] == 2 * 64 * 16 * 2 / 1e6
    # its output has another shape than its input
    assert ("error" in hooks["down_blocks.0"]) == (mode == "skip")
    printed = capsys.readouterr().out
    assert all(name in printed for name in hooks)
    assert str(out / "ablate.png") in printed
    pictures = Image.open(out / "ablate.png")
    assert min(pictures.size) > 300
    assert (out / "ablate_ranking.png").exists()


def test_other_settings_and_too_few_prompts_are_refused(config):
    config = replace(config, hook_names=["mid_block"])
    ablate.main(config)
    before = (Path(config.out_dir) / "ablate.png").read_bytes()
    with pytest.raises(
        ValueError, match="was made with mode 'skip', not 'zero'; choose another --out_dir"
    ):
        ablate.main(replace(config, mode="zero"))
    assert (Path(config.out_dir) / "ablate.png").read_bytes() == before
    with pytest.raises(ValueError, match="two prompts"):
        ablate.main(replace(config, mode="mean", max_num_examples=1, out_dir=config.out_dir + "2"))


def test_a_folder_of_something_else_is_not_written_into(config):
    out = Path(config.out_dir)
    out.mkdir()
    (out / "ablate.png").write_text("of another program")
    with pytest.raises(ValueError, match="holds something else; choose another --out_dir"):
        ablate.main(config)
    assert (out / "ablate.png").read_text() == "of another program"


def test_the_files_that_were_written_are_returned(config):
    written = ablate.main(replace(config, hook_names=["mid_block"]))
    assert [path.name for path in written] == ["ablate.json", "ablate.png", "ablate_ranking.png"]
    assert sorted(written) == sorted(Path(config.out_dir).iterdir())


def test_a_module_that_can_not_be_skipped(config, capsys):
    """Its input and its output differ in shape: the message says which other mode to use."""
    ablate.main(config)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "down_blocks.0 " in line]
    reason = "can't be skipped: it turns (tokens, d) = (256, 8) into (64, 8)"
    assert line.split(maxsplit=1) == ["down_blocks.0", f"{reason}; use --mode zero or mean for it"]
    alone = replace(config, hook_names=["down_blocks.0"], out_dir=config.out_dir + "2")
    with pytest.raises(UsageError, match="down_blocks.0 can't be skipped: .*--mode zero or mean"):
        ablate.main(alone)
    assert not Path(alone.out_dir).exists()


def test_modules_without_image_tokens(config):
    """A pattern leaves them out; one that was named is refused before anything is generated."""
    names = ["**.attentions.*", "time_embedding", "time_proj"]
    with pytest.raises(UsageError, match="^time_proj: its output holds no image tokens"):
        ablate.main(replace(config, hook_names=names))
    assert not Path(config.out_dir).exists()
    ablate.main(replace(config, hook_names=["**.attentions.*", "time_*"]))
    report = read_json(Path(config.out_dir) / "ablate.json")
    assert len(report["hooks"]) == 4


def test_a_small_distance_does_not_look_like_none(capsys):
    record = {"hook_name": "a", "latents": 2.2e-5, "images": 0.0, "tokens": 4, "d": 8}
    ablate.print_table([record | {"mb_per_prompt": 0.0013}], [])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["a", "2.2e-05", "0.000", "4", "x", "8", "0.0013"]
