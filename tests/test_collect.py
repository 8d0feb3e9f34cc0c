"""Files that collect.py writes: what is in them, and which options do not fit together."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from files import contents, read_json, read_lines
from tiny import build, generate_options, sd15, sdxl
from tiny_runs import COLLECTED_HOOKS

import collect
from hook import HookedDiffusionModel
from store import dataset
from store.disk import checksum
from store.images import image_path

pytestmark = pytest.mark.slow


def test_the_files_hold_what_the_modules_computed(collect_config, model_folder):
    collect.main(replace(collect_config, rows="both", store_dtype="float32", save_samples=True))
    out = Path(collect_config.out_dir)
    prompts = read_lines(out / "prompts.jsonl")
    assert [p["prompt"] for p in prompts] == [f"a picture of {i}" for i in range(8)]
    assert [(p["id"], p["seed"], p["colour"]) for p in prompts[:3]] == [
        (0, 0, "0"),
        (1, 1, "1"),
        (2, 2, "2"),
    ]

    pipe = HookedDiffusionModel.from_pretrained(model_folder)
    for first, last in ((0, 5), (5, 8)):  # in the batches it fixed
        options = dict(num_inference_steps=3, guidance_scale=7.5, output_type="latent")
        seeds = [torch.Generator().manual_seed(i) for i in range(first, last)]
        text = [p["prompt"] for p in prompts[first:last]]
        output, cache = pipe.run_with_cache(
            COLLECTED_HOOKS, text, rows="both", generator=seeds, **options
        )
        for name in COLLECTED_HOOKS:
            for key, end in (("output", ""), ("output_uncond", ".uncond")):
                array = np.load(out / f"{name}{end}.npy", mmap_mode="r")
                assert array.dtype == np.float32
                assert array.shape == (8, 3, 64, 16)
                assert np.array_equal(array[first:last], cache[key][name].numpy())
        samples = np.load(out / "samples.npy")
        assert np.array_equal(samples[first:last], output.images.numpy())

    record = read_json(out / "mid_block.uncond.json")
    assert record["checksum"] == checksum(record)
    assert record["shape"] == [8, 3, 64, 16]
    assert record["rows"] == "uncond"
    assert record["grid"] == [8, 8]
    assert record["timesteps"] == [667.0, 334.0, 1.0]
    assert len(record["sigmas"]) == 3
    assert "mean_norm" not in record
    assert record["guidance_scale"] == 7.5
    assert record["pipeline_kwargs"]["num_inference_steps"] == 3


@pytest.mark.parametrize("side", ["input", "diff"])
def test_sides(collect_config, side):
    """--side input stores what the module got, --side diff the output minus that."""
    collect.main(replace(collect_config, store_dtype="float32"))
    collect.main(
        replace(
            collect_config, store_dtype="float32", side=side, out_dir=collect_config.out_dir + side
        )
    )
    collect.main(
        replace(
            collect_config,
            store_dtype="float32",
            side="input",
            out_dir=collect_config.out_dir + "x",
        )
    )

    def read(folder, name):
        return np.load(Path(collect_config.out_dir + folder) / name)

    name = COLLECTED_HOOKS[0]
    output = read("", f"{name}.npy")
    before = read("x", f"{name}.input.npy")
    expected = before if side == "input" else output - before
    assert np.array_equal(read(side, f"{name}.{side}.npy"), expected)


def test_images_steps_and_negative_prompts(collect_config, tmp_path):
    table = tmp_path / "p.jsonl"
    table.write_text(
        '{"caption": "a dog", "avoid": "rain", "n": 4}\n{"caption": "a cat", "avoid": "", "n": 5}\n'
    )
    options = dict(
        dataset_name=str(table),
        num_images_per_prompt=2,
        cache_every_n_timesteps=2,
        negative_prompt="avoid",
    )
    collect.main(replace(collect_config, **options))
    out = Path(collect_config.out_dir)
    rows = read_lines(out / "prompts.jsonl")
    assert [(r["id"], r["seed"], r["prompt"], r["negative_prompt"], r["n"]) for r in rows] == [
        (0, 0, "a dog", "rain", 4),
        (0, 1, "a dog", "rain", 4),
        (1, 2, "a cat", "", 5),
        (1, 3, "a cat", "", 5),
    ]
    assert np.load(out / "mid_block.npy").shape == (4, 2, 64, 16)
    assert read_json(out / "mid_block.json")["timesteps"] == [667.0, 1.0]


def test_odd_prompts_and_columns_named_like_ours(collect_config, tmp_path):
    """Line separators of Unicode, a column called id, an empty negative prompt: resumable, and ours
    stays ours.

    A column called seed counts: each image of a prompt has the next number.
    """
    table = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "a\u2028b\u0085c", "seed": 7, "id": 9, "no": None},
        {"prompt": "d\n\x00e", "seed": 7, "id": 9, "no": "f"},
    ]
    table.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    collect_config = replace(
        collect_config, dataset_name=str(table), num_images_per_prompt=2, negative_prompt="no"
    )
    for _ in range(2):
        collect.main(collect_config)
    lines = (Path(collect_config.out_dir) / "prompts.jsonl").read_text().split("\n")[:-1]
    listed = [json.loads(line) for line in lines]
    assert [(p["id"], p["seed"], p["negative_prompt"]) for p in listed] == [
        (0, 7, ""),
        (0, 8, ""),
        (1, 7, "f"),
        (1, 8, "f"),
    ]
    assert [p["prompt"] for p in listed[::2]] == [r["prompt"] for r in rows]
    images = [
        (Path(collect_config.out_dir) / "images" / f"{row}.webp").read_bytes() for row in range(4)
    ]
    assert images[0] != images[1]


def test_bfloat16_is_stored_as_its_bits(collect_config):
    collect.main(replace(collect_config, store_dtype="bfloat16"))
    collect.main(
        replace(collect_config, store_dtype="float32", out_dir=collect_config.out_dir + "32")
    )
    bits, full = (
        np.load(Path(d) / "mid_block.npy")
        for d in (collect_config.out_dir, collect_config.out_dir + "32")
    )
    assert bits.dtype == np.uint16
    assert read_json(Path(collect_config.out_dir) / "mid_block.json")["dtype"] == "bfloat16"
    assert torch.equal(
        torch.from_numpy(bits).view(torch.bfloat16), torch.from_numpy(full).bfloat16()
    )


def test_other_settings_are_refused(collect_config):
    collect.main(collect_config)
    before = contents(collect_config.out_dir)
    for option in (
        dict(seed=1),
        dict(guidance_scale=3.0),
        dict(batch_size=4),
        dict(rows="uncond"),
        dict(hook_names=["mid_block"]),
        dict(dataset_name="another prompt"),
        dict(max_num_examples=4),
        dict(pipeline_kwargs='{"eta": 0.5}'),
        dict(save_images=False),
        dict(save_samples=True),
    ):
        with pytest.raises(ValueError, match="was made with|holds"):
            collect.main(replace(collect_config, **option))
    with pytest.raises(ValueError, match="other prompts"):
        collect.main(replace(collect_config, negative_prompt="rain"))
    assert contents(collect_config.out_dir) == before


def test_fp16_overflow_names_the_option(collect_config, tmp_path):
    pipe = build(sd15)
    pipe.unet.mid_block.resnets[-1].conv2.weight.data.mul_(1e6)
    pipe.save_pretrained(tmp_path / "loud")
    loud = replace(
        collect_config,
        model_name=str(tmp_path / "loud"),
        dataset_name="a loud picture",
        hook_names=["mid_block.resnets.1"],
    )
    with pytest.raises(ValueError, match="--store_dtype"):
        collect.main(loud)
    # in the same folder: nothing was safe in it yet
    collect.main(replace(loud, store_dtype="float32"))


def test_fp16_underflow_is_said_once_per_file(collect_config, tmp_path, capsys):
    pipe = build(sd15)
    quiet = pipe.unet.mid_block.resnets[-1].conv2
    quiet.weight.data.mul_(1e-7)
    quiet.bias.data.mul_(1e-7)
    pipe.save_pretrained(tmp_path / "quiet")
    collect_config = replace(
        collect_config,
        model_name=str(tmp_path / "quiet"),
        dataset_name=str(Path(collect_config.model_name) / "prompts.csv"),
        hook_names=["mid_block.resnets.1.conv2", "mid_block"],
    )
    collect.main(collect_config)  # two batches
    notes = [line for line in capsys.readouterr().out.splitlines() if "too small for" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: mid_block.resnets.1.conv2: 100% of the")
    assert notes[0].endswith("collect again with --store_dtype bfloat16")
    collect.main(
        replace(collect_config, store_dtype="bfloat16", out_dir=collect_config.out_dir + "16")
    )
    assert "too small" not in capsys.readouterr().out


def test_share_of_numbers_that_are_too_small_for_fp16():
    x = torch.tensor([0.0, 0.0, 1.0, -1e-9, 1e-5, 7e-5])
    assert collect.share_of_underflow(x, torch.float16) == 0.5
    assert collect.share_of_underflow(x, torch.bfloat16) == 0
    assert collect.share_of_underflow(x.half(), torch.float16) == 0  # nothing is lost by storing
    assert collect.share_of_underflow(torch.zeros(3), torch.float16) == 0
    many = torch.randn(40, 1000, 50, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e-4, 4e-8):
        small = ((many * scale).abs() < 2**-14).double().mean().item()
        estimate = collect.share_of_underflow(many * scale, torch.float16)
        assert estimate == pytest.approx(small, abs=0.01)


def test_a_list_of_prompts_for_all_batches_is_refused(collect_config, tmp_path):
    """It would meet the wrong prompts in the second batch; a single text holds for all of them."""
    build(sdxl).save_pretrained(tmp_path / "sdxl")
    collect_config = replace(
        collect_config,
        model_name=str(tmp_path / "sdxl"),
        dataset_name=str(Path(collect_config.model_name) / "prompts.csv"),
        hook_names=["mid_block"],
        max_num_examples=4,
        batch_size=2,
    )
    for name in ("prompt_2", "negative_prompt_2"):
        with pytest.raises(ValueError, match=f"{name} is a list, whose texts would meet the wrong"):
            collect.main(replace(collect_config, pipeline_kwargs=json.dumps({name: ["x", "y"]})))
    assert not Path(collect_config.out_dir).exists()
    collect.main(replace(collect_config, pipeline_kwargs='{"negative_prompt_2": "x"}'))


def test_pipeline_arguments_fill_in_defaults():
    hooked = HookedDiffusionModel.from_pipeline(build(sd15))
    assert hooked.arguments(num_inference_steps=None, guidance_scale=None, height=None) == dict(
        num_inference_steps=50, guidance_scale=7.5
    )
    options = hooked.arguments(2, "latent", {"eta": 1.0}, guidance_scale=3.0)
    assert options == dict(
        guidance_scale=3.0, num_images_per_prompt=2, output_type="latent", eta=1.0
    )
    for wrong in ("etta", "prompt", "generator", "num_images_per_prompt"):
        with pytest.raises(ValueError, match=wrong):
            hooked.arguments(extra={wrong: 2})
    assert generate_options(1)["num_inference_steps"] == 2


def test_shards_are_parts_of_the_whole(collect_config, monkeypatch):
    """Together the rows, seeds, ids and images of an unsharded run, to the bit; each folder is a
    collection of its own."""
    collect_config = replace(
        collect_config, batch_size=2, max_num_examples=7, num_images_per_prompt=2
    )
    one = replace(collect_config, out_dir=collect_config.out_dir + "-one")
    collect.main(one)
    for i in (1, 0):
        paths = collect.main(replace(collect_config, shard=f"{i}/2"))
        assert paths == [
            Path(collect_config.out_dir) / f"shard{i}of2" / f"{name}.npy"
            for name in COLLECTED_HOOKS
        ]
    out = Path(collect_config.out_dir)
    assert sorted(path.name for path in out.iterdir()) == ["shard0of2", "shard1of2"]
    # batches of two prompts, of two images each
    order = (
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13],
    )
    for shard, rows in enumerate(order):
        folder = out / f"shard{shard}of2"
        for name in COLLECTED_HOOKS:
            whole = np.load(Path(one.out_dir) / f"{name}.npy")
            assert np.array_equal(np.load(folder / f"{name}.npy"), whole[list(rows)])
        lines = (Path(one.out_dir) / "prompts.jsonl").read_text().splitlines()
        assert (folder / "prompts.jsonl").read_text().splitlines() == [lines[row] for row in rows]
        for row_in_shard, row in enumerate(rows):
            assert (
                image_path(folder / "images", row_in_shard).read_bytes()
                == image_path(Path(one.out_dir) / "images", row).read_bytes()
            )
        record = read_json(folder / "mid_block.json")
        assert (record["shard"], record["num_prompts"]) == (f"{shard}/2", len(rows) // 2)
    data = dataset.open_activations(sorted(out.glob("*/mid_block.npy")))
    assert len(data) == 1
    assert data[0].num_prompts == 7

    for wrong in (collect_config, replace(one, shard="0/2"), replace(collect_config, shard="0/3")):
        with pytest.raises(ValueError, match="with another --shard, or without one"):
            collect.main(wrong)
    other = replace(collect_config, out_dir=collect_config.out_dir + "-other")
    with pytest.raises(ValueError, match="--shard 4/5: there are fewer batches"):
        collect.main(replace(other, shard="4/5"))
    for wrong in ("2/2", "1", "a/b", "-1/2", "0/0"):
        with pytest.raises(ValueError, match="expected i/n"):
            collect.main(replace(other, shard=wrong))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun over 2 machines.*--shard"):
        collect.main(other)
    assert not Path(other.out_dir).exists()


def test_the_listing_says_what_a_file_would_take(collect_config, capsys):
    collect.main(
        replace(
            collect_config,
            list_hooks=True,
            hook_names=["mid_block.**", "mid_block"],
            store_dtype="float32",
        )
    )
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("mid_block "))
    assert line.split() == [
        "mid_block",
        "64",
        "x",
        "16",
        "8",
        "x",
        "8",
        f"{3 * 64 * 16 * 4 / 1e6:.2f}",
    ]
    assert "\n  mid_block.attentions.0 " in printed
    assert "several times in one forward" in printed
    assert not Path(collect_config.out_dir).exists()
    collect.main(
        replace(collect_config, hook_names=["mid_block"], store_dtype="float32", max_num_examples=1)
    )
    size = (Path(collect_config.out_dir) / "mid_block.npy").stat().st_size
    assert size == 3 * 64 * 16 * 4 + 128
