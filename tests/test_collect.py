"""Files that collect.py writes: what is in them, and that no interruption changes a byte."""

import io
import json
import os
import shutil
import threading
import wave
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import ddpm, dit, flux, stable_audio, wan, zimage
from PIL import Image
from tiny import build, generate_options, sd15, sdxl

import collect
from collect import Config
from diffusion import real_images
from hook import HookedDiffusionModel
from store import collection, dataset
from store.disk import checksum
from store.hook_point import HookPoint
from store.images import image_path, save_images

pytestmark = pytest.mark.slow

HOOKS = ["up_blocks.0.attentions.1", "mid_block"]


@pytest.fixture
def config(model_folder, tmp_path):
    return Config(
        hook_names=HOOKS,
        model_name=str(model_folder),
        out_dir=str(tmp_path / "acts"),
        num_inference_steps=3,
        batch_size=5,
        max_num_examples=8,
        device="cpu",
    )


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def test_the_files_hold_what_the_modules_computed(config, model_folder):
    collect.main(replace(config, rows="both", store_dtype="float32", save_samples=True))
    out = Path(config.out_dir)
    prompts = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
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
        output, cache = pipe.run_with_cache(HOOKS, text, rows="both", generator=seeds, **options)
        for name in HOOKS:
            for key, end in (("output", ""), ("output_uncond", ".uncond")):
                array = np.load(out / f"{name}{end}.npy", mmap_mode="r")
                assert array.dtype == np.float32 and array.shape == (8, 3, 64, 16)
                assert np.array_equal(array[first:last], cache[key][name].numpy())
        samples = np.load(out / "samples.npy")
        assert np.array_equal(samples[first:last], output.images.numpy())

    record = json.loads((out / "mid_block.uncond.json").read_text())
    assert record["checksum"] == checksum(record)
    assert (
        record["shape"] == [8, 3, 64, 16]
        and record["rows"] == "uncond"
        and record["grid"] == [8, 8]
    )
    assert record["timesteps"] == [667.0, 334.0, 1.0] and len(record["sigmas"]) == 3
    assert "mean_norm" not in record
    assert record["guidance_scale"] == 7.5 and record["pipeline_kwargs"]["num_inference_steps"] == 3


@pytest.mark.parametrize("side", ["input", "diff"])
def test_sides(config, side):
    collect.main(replace(config, store_dtype="float32"))
    collect.main(replace(config, store_dtype="float32", side=side, out_dir=config.out_dir + side))
    collect.main(replace(config, store_dtype="float32", side="input", out_dir=config.out_dir + "x"))
    read = lambda folder, name: np.load(Path(config.out_dir + folder) / name)
    name = HOOKS[0]
    output, before = read("", f"{name}.npy"), read("x", f"{name}.input.npy")
    expected = before if side == "input" else output - before
    assert np.array_equal(read(side, f"{name}.{side}.npy"), expected)


def test_images_steps_and_negative_prompts(config, tmp_path):
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
    collect.main(replace(config, **options))
    out = Path(config.out_dir)
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [(r["id"], r["seed"], r["prompt"], r["negative_prompt"], r["n"]) for r in rows] == [
        (0, 0, "a dog", "rain", 4),
        (0, 1, "a dog", "rain", 4),
        (1, 2, "a cat", "", 5),
        (1, 3, "a cat", "", 5),
    ]
    assert np.load(out / "mid_block.npy").shape == (4, 2, 64, 16)
    assert json.loads((out / "mid_block.json").read_text())["timesteps"] == [667.0, 1.0]


def test_odd_prompts_and_columns_named_like_ours(config, tmp_path):
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
    config = replace(config, dataset_name=str(table), num_images_per_prompt=2, negative_prompt="no")
    for _ in range(2):
        collect.main(config)
    lines = (Path(config.out_dir) / "prompts.jsonl").read_text().split("\n")[:-1]
    found = [json.loads(line) for line in lines]
    assert [(p["id"], p["seed"], p["negative_prompt"]) for p in found] == [
        (0, 7, ""),
        (0, 8, ""),
        (1, 7, "f"),
        (1, 8, "f"),
    ]
    assert [p["prompt"] for p in found[::2]] == [r["prompt"] for r in rows]
    images = [(Path(config.out_dir) / "images" / f"{row}.webp").read_bytes() for row in range(4)]
    assert images[0] != images[1]


def test_bfloat16_is_stored_as_its_bits(config):
    collect.main(replace(config, store_dtype="bfloat16"))
    collect.main(replace(config, store_dtype="float32", out_dir=config.out_dir + "32"))
    bits, full = (
        np.load(Path(d) / "mid_block.npy") for d in (config.out_dir, config.out_dir + "32")
    )
    assert bits.dtype == np.uint16
    assert json.loads((Path(config.out_dir) / "mid_block.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(
        torch.from_numpy(bits).view(torch.bfloat16), torch.from_numpy(full).bfloat16()
    )


CALLS = [
    (os, "pwrite"),
    (os, "write"),
    (os, "fsync"),
    (os, "replace"),
    (os, "unlink"),
    (os, "posix_fallocate"),
    (os, "open"),
]


def crash_at(patch, moment):
    """Let the system call number `moment` of those that write, and all after it, raise; the list
    that counts them."""
    made = []

    def crashing(real):
        def call(*args, **kwargs):
            made.append(real)
            if len(made) > moment:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    for module, name in CALLS:
        patch.setattr(module, name, crashing(getattr(module, name)))
    return made


@pytest.mark.parametrize("start", ["fresh", "extending", "shrinking"])
def test_a_crash_at_any_system_call_costs_no_byte(config, monkeypatch, start):
    """Power cuts between any two writes, syncs and renames: the same command then gives the files
    of an undisturbed run."""
    config = replace(
        config, hook_names=["mid_block"], num_inference_steps=1, batch_size=3, max_num_examples=5
    )
    hooked = HookedDiffusionModel.from_pretrained(config.model_name)
    monkeypatch.setattr(HookedDiffusionModel, "from_pretrained", lambda *args, **kwargs: hooked)
    collect.main(replace(config, out_dir=config.out_dir + "-undisturbed"))
    expected = contents(config.out_dir + "-undisturbed")
    started = Path(config.out_dir + "-started")
    if start == "extending":
        collect.main(replace(config, max_num_examples=4, out_dir=str(started)))
    if start == "shrinking":
        with monkeypatch.context() as patch:
            write = collection.Collection.write

            def only_the_first(self, batch, *rest):
                if batch > 0:
                    raise OSError("stopped")
                write(self, batch, *rest)

            patch.setattr(collection.Collection, "write", only_the_first)
            with pytest.raises(OSError, match="stopped"):
                collect.main(replace(config, max_num_examples=8, out_dir=str(started)))
    for moment in range(200):
        shutil.rmtree(config.out_dir, ignore_errors=True)
        if start != "fresh":
            shutil.copytree(started, config.out_dir)
        with monkeypatch.context() as patch:
            made = crash_at(patch, moment)
            with suppress(KeyboardInterrupt):
                collect.main(config)
        if len(made) <= moment:
            break
        collect.main(config)
        assert contents(config.out_dir) == expected, moment
    assert 50 < moment < 200


def test_a_larger_number_extends(config):
    collect.main(config)
    collect.main(replace(config, max_num_examples=12))
    collect.main(replace(config, max_num_examples=12, out_dir=config.out_dir + "-at-once"))
    assert contents(config.out_dir) == contents(config.out_dir + "-at-once")
    before = contents(config.out_dir)
    collect.main(replace(config, max_num_examples=12))  # nothing to do
    assert contents(config.out_dir) == before


def test_other_settings_are_refused(config):
    collect.main(config)
    before = contents(config.out_dir)
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
            collect.main(replace(config, **option))
    with pytest.raises(ValueError, match="other prompts"):
        collect.main(replace(config, negative_prompt="rain"))
    assert contents(config.out_dir) == before


def test_fp16_overflow_names_the_option(config, model_folder, tmp_path):
    pipe = build(sd15)
    pipe.unet.mid_block.resnets[-1].conv2.weight.data.mul_(1e6)
    pipe.save_pretrained(tmp_path / "loud")
    loud = replace(
        config,
        model_name=str(tmp_path / "loud"),
        dataset_name="a loud picture",
        hook_names=["mid_block.resnets.1"],
    )
    with pytest.raises(ValueError, match="--store_dtype"):
        collect.main(loud)
    collect.main(
        replace(loud, store_dtype="float32")
    )  # in the same folder: nothing was safe in it yet


def test_fp16_underflow_is_said_once_per_file(config, tmp_path, capsys):
    pipe = build(sd15)
    quiet = pipe.unet.mid_block.resnets[-1].conv2
    quiet.weight.data.mul_(1e-7)
    quiet.bias.data.mul_(1e-7)
    pipe.save_pretrained(tmp_path / "quiet")
    config = replace(
        config,
        model_name=str(tmp_path / "quiet"),
        dataset_name=str(Path(config.model_name) / "prompts.csv"),
        hook_names=["mid_block.resnets.1.conv2", "mid_block"],
    )
    collect.main(config)  # two batches
    notes = [line for line in capsys.readouterr().out.splitlines() if "too small for" in line]
    assert len(notes) == 1 and notes[0].startswith("note: mid_block.resnets.1.conv2: 100% of the")
    assert notes[0].endswith("collect again with --store_dtype bfloat16")
    collect.main(replace(config, store_dtype="bfloat16", out_dir=config.out_dir + "16"))
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
        found = collect.share_of_underflow(many * scale, torch.float16)
        assert found == pytest.approx(small, abs=0.01)


def test_a_list_of_prompts_for_all_batches_is_refused(config, tmp_path):
    """It would meet the wrong prompts in the second batch; a single text holds for all of them."""
    build(sdxl).save_pretrained(tmp_path / "sdxl")
    config = replace(
        config,
        model_name=str(tmp_path / "sdxl"),
        dataset_name=str(Path(config.model_name) / "prompts.csv"),
        hook_names=["mid_block"],
        max_num_examples=4,
        batch_size=2,
    )
    for name in ("prompt_2", "negative_prompt_2"):
        with pytest.raises(ValueError, match=f"{name} is a list, whose texts would meet the wrong"):
            collect.main(replace(config, pipeline_kwargs=json.dumps({name: ["x", "y"]})))
    assert not Path(config.out_dir).exists()
    collect.main(replace(config, pipeline_kwargs='{"negative_prompt_2": "x"}'))


def test_space_is_checked_before_anything_is_written(config, monkeypatch):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(collect.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="do not fit"):
        collect.main(config)
    assert not Path(config.out_dir).exists()


def test_a_full_disk_stops_with_an_os_error_and_goes_on_later(config, monkeypatch):
    def full(fd, offset, length):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space"):
            collect.main(config)
        assert not list(Path(config.out_dir).glob("*.partial"))
    collect.main(config)
    collect.main(replace(config, out_dir=config.out_dir + "-undisturbed"))
    assert contents(config.out_dir) == contents(config.out_dir + "-undisturbed")


def test_a_deleted_file_is_not_made_anew_with_zeros(config):
    collect.main(config)
    (Path(config.out_dir) / "mid_block.npy").unlink()
    for number in (8, 12):
        with pytest.raises(ValueError, match="missing"):
            collect.main(replace(config, max_num_examples=number))


@pytest.mark.parametrize("calls", [1, None])
def test_truncated_files_are_not_filled_with_zeros(config, monkeypatch, calls):
    """Cut while there is more to write, and cut when there is nothing left to do but to finish."""
    with monkeypatch.context() as patch:
        real, batches = collection.Collection.write, []

        def write(self, batch, *rest):
            batches.append(batch)
            if calls and len(batches) > calls:
                raise KeyboardInterrupt
            real(self, batch, *rest)

        patch.setattr(collection.Collection, "write", write)
        patch.setattr(
            collection.Collection, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            collect.main(config)
    partial = Path(config.out_dir) / "mid_block.npy.partial"
    os.truncate(partial, partial.stat().st_size // 2)
    with pytest.raises(ValueError, match="missing or damaged"):
        collect.main(config)
    assert partial.stat().st_size < 8 * 3 * 64 * 16 * 2


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


# --------------------------------------------------------------------------- the thread that writes


def during_write(monkeypatch, action):
    """Let `action(batch)` run before each batch is written."""
    real = collection.Collection.write
    monkeypatch.setattr(
        collection.Collection,
        "write",
        lambda self, batch, *rest: (action(batch), real(self, batch, *rest)),
    )


def counting_steps(monkeypatch):
    """A list that grows by one at each forward of the denoiser."""
    steps, real = [], HookedDiffusionModel.from_pretrained

    def load(*args, **kwargs):
        hooked = real(*args, **kwargs)
        hooked.pipe.unet.register_forward_pre_hook(lambda *_: steps.append(0))
        return hooked

    monkeypatch.setattr(HookedDiffusionModel, "from_pretrained", load)
    return steps


def test_a_batch_is_written_while_the_next_is_generated(config, monkeypatch):
    steps, seen = counting_steps(monkeypatch), []

    def wait(batch):
        before = len(steps)
        for _ in range(3000):
            if batch == 0 and len(steps) == before:
                threading.Event().wait(0.01)
        seen.append(
            (batch, len(steps) > before, threading.current_thread() is threading.main_thread())
        )

    during_write(monkeypatch, wait)
    collect.main(config)
    assert seen[0] == (0, True, False) and [batch for batch, _, _ in seen] == [0, 1]


def test_an_error_of_the_disk_ends_it_at_the_next_batch_and_loses_nothing(config, monkeypatch):
    """The third of many batches meets it while the fourth is generated: the first two are safe, no
    fifth is begun."""
    config = replace(config, batch_size=1, hook_names=["mid_block"])
    steps = counting_steps(monkeypatch)

    def fail(batch):
        if batch == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        during_write(patch, fail)
        with pytest.raises(OSError, match="No space"):
            collect.main(config)
    assert len(steps) == 4 * 3  # a hook does not see the step that was thrown away
    undone = collection.Collection.pending
    with monkeypatch.context() as patch:
        left = []
        patch.setattr(
            collection.Collection, "pending", lambda self: left.append(undone(self)) or left[-1]
        )
        collect.main(config)
    assert left[0] == [2, 3, 4, 5, 6, 7]
    collect.main(replace(config, out_dir=config.out_dir + "-undisturbed"))
    assert contents(config.out_dir) == contents(config.out_dir + "-undisturbed")


def test_ctrl_c_writes_what_was_generated(config, monkeypatch, capsys):
    """Once: the batch that is being written is finished, and a message says so; and an error of it
    is not lost."""
    real = HookedDiffusionModel.run_with_cache

    def interrupt(self, names, text, **kwargs):
        if "a picture of 7" in text:
            raise KeyboardInterrupt
        return real(self, names, text, **kwargs)

    monkeypatch.setattr(HookedDiffusionModel, "run_with_cache", interrupt)
    with monkeypatch.context() as patch:
        during_write(patch, lambda batch: threading.Event().wait(0.5))
        with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
            collect.main(config)
    assert "finishing what is generated" in capsys.readouterr().err
    (line,) = collection.read_progress(Path(config.out_dir) / "progress.jsonl").values()
    assert (line["batch"], line["rows"], list(line["crc32"])) == (0, 5, [*HOOKS, "images/"])

    def fail(batch):
        threading.Event().wait(0.5)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        during_write(patch, fail)
        with pytest.raises(OSError, match="No space"):
            collect.main(replace(config, out_dir=config.out_dir + "-full"))


def test_what_is_generated_is_written_when_the_next_fails(config, monkeypatch):
    real = HookedDiffusionModel.run_with_cache

    def fail(self, names, text, **kwargs):
        if "a picture of 7" in text:
            raise RuntimeError("of the model")
        return real(self, names, text, **kwargs)

    with monkeypatch.context() as patch:
        during_write(patch, lambda batch: threading.Event().wait(0.5))
        patch.setattr(HookedDiffusionModel, "run_with_cache", fail)
        with pytest.raises(RuntimeError):
            collect.main(config)
    assert list(collection.read_progress(Path(config.out_dir) / "progress.jsonl")) == [0]
    collect.main(config)  # and the folder is not locked


# ------------------------------------------------------------------------------- some of the tokens


def test_random_tokens_are_those_of_the_whole_file(config):
    """Whatever the batch, the side of the guidance and the hook point; a layer with no more is kept
    whole."""
    names = ["mid_block", HOOKS[0], "up_blocks.1.resnets.0"]  # 64, 64 and 256 tokens
    whole = replace(
        config, hook_names=names, rows="both", store_dtype="float32", num_images_per_prompt=2
    )
    collect.main(whole)
    collect.main(replace(whole, tokens_per_step=7, out_dir=config.out_dir + "7"))
    full, some = Path(config.out_dir), Path(config.out_dir + "7")
    index = {name: np.load(some / f"{name}.tokens.npy") for name in names}
    assert (
        np.array_equal(index[names[0]], index[names[1]])
        and index[names[0]].max() < 64 <= index[names[2]].max()
    )
    for name in names:
        assert (
            index[name].dtype == np.uint16
            and index[name].shape == (16, 3, 7)
            and (np.diff(index[name].astype(int)) > 0).all()
        )
        assert len(np.unique(index[name].reshape(-1, 7), axis=0)) == 16 * 3
        for end in ("", ".uncond"):
            assert np.array_equal(index[name], np.load(some / f"{name}{end}.tokens.npy"))
            x, kept = np.load(full / f"{name}{end}.npy"), np.load(some / f"{name}{end}.npy")
            assert np.array_equal(
                kept, np.take_along_axis(x, index[name][..., None].astype(int), 2)
            )
            record = json.loads((some / f"{name}{end}.json").read_text())
            assert record["tokens_per_step"] == 7 and record["shape"] == list(kept.shape)
    counts = np.bincount(index["mid_block"].reshape(-1), minlength=64)  # 336 of 64: 5.25 each
    assert counts.min() >= 0 and counts.max() < 20 and (counts > 0).mean() > 0.9
    assert contents(full / "images") == contents(some / "images")

    out = config.out_dir + "64"
    collect.main(
        replace(
            whole,
            tokens_per_step=64,
            out_dir=out,
            batch_size=3,
            cache_every_n_timesteps=2,
            rows="cond",
        )
    )
    assert sorted(path.name for path in Path(out).glob("*.tokens.npy")) == [
        "up_blocks.1.resnets.0.tokens.npy"
    ]
    assert json.loads((Path(out) / "mid_block.json").read_text())["tokens_per_step"] is None
    assert np.load(Path(out) / "mid_block.npy").shape == (16, 2, 64, 16)
    out = config.out_dir + "again"
    collect.main(
        replace(
            whole,
            tokens_per_step=7,
            out_dir=out,
            batch_size=3,
            cache_every_n_timesteps=2,
            rows="uncond",
        )
    )
    assert np.array_equal(
        np.load(Path(out) / "mid_block.uncond.tokens.npy"), index["mid_block"][:, ::2]
    )


def test_random_tokens_in_the_listing_the_room_and_of_pictures(
    config, tmp_path, capsys, monkeypatch
):
    config = replace(config, hook_names=["mid_block"], store_dtype="float32", tokens_per_step=7)
    collect.main(replace(config, list_hooks=True))
    printed = capsys.readouterr().out
    assert (
        f"{3 * 7 * (16 * 4 + 2) / 1e6:.2f}" in printed.splitlines()[1]
        and "7 random image tokens" in printed
    )
    usage = type(
        "Usage", (), {"free": 8 * 3 * 7 * (16 * 4 + 2)}
    )  # all of it, where 98 % may be asked for
    with monkeypatch.context() as patch:
        patch.setattr(collect.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match="lower --max_num_examples or --tokens_per_step"):
            collect.main(config)
        usage.free = usage.free * 100 // 97
        collect.main(config)
    with pytest.raises(ValueError, match="--tokens_per_step is for image tokens"):
        collect.main(replace(config, stream="text"))
    options = dict(
        num_inference_steps=None,
        images=str(photos(tmp_path / "p", 3)),
        out_dir=config.out_dir + "p",
    )
    collect.main(replace(config, **options))
    collect.main(
        replace(config, **options | dict(tokens_per_step=None, out_dir=config.out_dir + "w"))
    )
    index = np.load(Path(config.out_dir + "p") / "mid_block.tokens.npy")
    kept, whole = (np.load(Path(config.out_dir + end) / "mid_block.npy") for end in "pw")
    assert kept.shape == (3, 4, 7, 16) and np.array_equal(
        kept, np.take_along_axis(whole, index[..., None].astype(int), 2)
    )


def test_many_tokens_need_wider_indices():
    cache = {"output": {"a": torch.zeros(1, 1, 2, 3)}, "grid": {"a": (300, 300)}}
    cache["tokens"] = {"a": torch.tensor([[[5, 89_999]]])}
    sites = [collect.Site(HookPoint("a"), "", None, 0)]
    writer = collect.BatchWriter(Config(), None, sites, torch.float16, sampling_rate=0)
    arrays = writer.arrays_of(cache)
    assert collection.as_numpy(arrays["a.tokens"]).dtype == np.uint32 and arrays[
        "a.tokens"
    ].tolist() == [[[5, 89_999]]]


# -------------------------------------------------------------------------------- several processes


def test_shards_are_parts_of_the_whole(config, monkeypatch):
    """Together the rows, seeds, ids and images of an unsharded run, to the bit; each folder is a
    collection of its own."""
    config = replace(config, batch_size=2, max_num_examples=7, num_images_per_prompt=2)
    one = replace(config, out_dir=config.out_dir + "-one")
    collect.main(one)
    for i in (1, 0):
        paths = collect.main(replace(config, shard=f"{i}/2"))
        assert paths == [Path(config.out_dir) / f"shard{i}of2" / f"{name}.npy" for name in HOOKS]
    out = Path(config.out_dir)
    assert sorted(path.name for path in out.iterdir()) == ["shard0of2", "shard1of2"]
    order = (
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13],
    )  # batches of two prompts, of two images each
    for shard, rows in enumerate(order):
        folder = out / f"shard{shard}of2"
        for name in HOOKS:
            whole = np.load(Path(one.out_dir) / f"{name}.npy")
            assert np.array_equal(np.load(folder / f"{name}.npy"), whole[list(rows)])
        lines = (Path(one.out_dir) / "prompts.jsonl").read_text().splitlines()
        assert (folder / "prompts.jsonl").read_text().splitlines() == [lines[row] for row in rows]
        for here, row in enumerate(rows):
            assert (
                image_path(folder / "images", here).read_bytes()
                == image_path(Path(one.out_dir) / "images", row).read_bytes()
            )
        record = json.loads((folder / "mid_block.json").read_text())
        assert (record["shard"], record["num_prompts"]) == (f"{shard}/2", len(rows) // 2)
    data = dataset.open_activations(sorted(out.glob("*/mid_block.npy")))
    assert len(data) == 1 and data[0].num_prompts == 7

    for wrong in (config, replace(one, shard="0/2"), replace(config, shard="0/3")):
        with pytest.raises(ValueError, match="with another --shard, or without one"):
            collect.main(wrong)
    other = replace(config, out_dir=config.out_dir + "-other")
    with pytest.raises(ValueError, match="--shard 4/5: there are fewer batches"):
        collect.main(replace(other, shard="4/5"))
    for wrong in ("2/2", "1", "a/b", "-1/2", "0/0"):
        with pytest.raises(ValueError, match="expected i/n"):
            collect.main(replace(other, shard=wrong))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun over 2 machines.*--shard"):
        collect.main(other)
    assert not Path(other.out_dir).exists()


# ------------------------------------------------------------------------------ what the model made


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), float)


def lossy(image):
    """An image as WebP keeps it."""
    image.save(file := io.BytesIO(), "webp", quality=90)
    return pixels(file)


def test_images_are_what_the_pipeline_makes(config, model_folder):
    """The same seeds in the same batches; with --no_save_images none, and the same activations."""
    collect.main(config)
    collect.main(replace(config, save_images=False, out_dir=config.out_dir + "-none"))
    out, pipe = Path(config.out_dir), HookedDiffusionModel.from_pretrained(model_folder)
    assert not Path(config.out_dir + "-none", "images").exists()
    assert (out / "mid_block.npy").read_bytes() == Path(
        config.out_dir + "-none", "mid_block.npy"
    ).read_bytes()
    seeds = [torch.Generator().manual_seed(i) for i in range(5)]
    images = pipe(
        [f"a picture of {i}" for i in range(5)],
        generator=seeds,
        num_inference_steps=3,
        output_type="pt",
    ).images
    for row, image in enumerate(images):
        image = Image.fromarray((255 * image.movedim(0, -1)).round().to(torch.uint8).numpy())
        assert np.abs(pixels(out / "images" / f"{row}.webp") - lossy(image)).mean() < 0.5
    assert len(list((out / "images").iterdir())) == 8


def test_images_of_a_data_set_are_saved_cropped(config, tmp_path):
    folder = photos(tmp_path / "photos", 3)
    collect.main(
        replace(config, num_inference_steps=None, images=str(folder), num_images_per_prompt=2)
    )
    for row in range(6):
        crop = (
            Image.open(folder / f"{row // 2}.png")
            .crop((5, 0, 35, 30))
            .resize((32, 32), Image.Resampling.LANCZOS)
        )
        saved = pixels(Path(config.out_dir) / "images" / f"{row}.webp")
        assert saved.shape == (32, 32, 3) and np.abs(saved - lossy(crop)).mean() < 1


@pytest.mark.parametrize(
    "recipe", [dit, ddpm, wan, stable_audio], ids=lambda recipe: recipe.__name__
)
def test_every_kind_of_output_is_saved(recipe, tmp_path, monkeypatch):
    """Class-conditional, unconditional, video and audio; the samples are those of the scheduler
    whatever the output."""
    hooked = HookedDiffusionModel.from_pipeline(build(recipe))
    monkeypatch.setattr(HookedDiffusionModel, "from_pretrained", lambda *args, **kwargs: hooked)
    (tmp_path / "p.txt").write_text("1\n2\n3\n")
    given = {
        k: v
        for k, v in recipe.options.items()
        if not callable(v) and k not in ("prompt", "output_type", "guidance_scale")
    }
    config = Config(
        hook_names=["*blocks.1" if recipe is not ddpm else "mid_block.attentions.0"],
        dataset_name=str(tmp_path / "p.txt"),
        out_dir=str(tmp_path / "acts"),
        pipeline_kwargs=json.dumps(given),
        num_inference_steps=2,
        batch_size=2,
        save_samples=True,
        device="cpu",
    )
    collect.main(config)
    shapes = {dit: (16, 16, 3), ddpm: (8, 12, 3), wan: (32, 64, 3)}
    for row in range(3):
        path = image_path(tmp_path / "acts" / "images", row)
        if recipe is stable_audio:
            with wave.open(str(path)) as sound:
                assert (
                    sound.getnchannels() == 2
                    and sound.getframerate() == hooked.pipe.vae.config.sampling_rate
                )
                assert sound.getnframes() > 0
        else:
            assert pixels(path).shape == shapes[recipe]
            assert getattr(Image.open(path), "n_frames", 1) == (9 if recipe is wan else 1)
    samples = np.load(tmp_path / "acts" / "samples.npy")
    shapes = {dit: (4, 8, 8), ddpm: (3, 8, 12), wan: (4, 3, 4, 8), stable_audio: samples.shape[1:]}
    assert len(samples) == 3 and samples.shape[1:] == shapes[recipe]
    assert image_path(tmp_path / "acts" / "images", 3) is None


def test_what_can_be_saved(tmp_path):
    """PIL, NumPy and torch alike, videos of each; a grey image; and what is none, or not one a row,
    is refused."""
    colours = np.linspace(0, 1, 2 * 4 * 16 * 24 * 3).reshape(2, 4, 16, 24, 3).astype(np.float32)
    levels = (colours * 255).round().astype(np.uint8)
    video = dict(numpy=colours, torch=torch.from_numpy(colours).movedim(-1, 2))
    video["pil"] = [[Image.fromarray(frame) for frame in frames] for frames in levels]
    image = dict(
        numpy=colours[:, 0],
        torch=video["torch"][:, 0],
        pil=[frames[0] for frames in video["pil"]],
        bytes=levels[:, 0],
    )
    for kind, outputs, frames in (
        (SimpleNamespace, image, 1),
        (dict, image, 1),
        (SimpleNamespace, video, 4),
    ):
        found = []
        for name, value in outputs.items():
            folder = tmp_path / f"{kind.__name__}{name}{frames}"
            field = "images" if frames == 1 else "frames"
            save_images(
                kind(**{field: value}) if kind is SimpleNamespace else value, folder, range(7, 9)
            )
            assert sorted(path.name for path in folder.iterdir()) == ["7.webp", "8.webp"]
            assert getattr(Image.open(folder / "8.webp"), "n_frames", 1) == frames
            found.append((folder / "8.webp").read_bytes())
        assert len(set(found)) == 1
        assert np.abs(pixels(folder / "8.webp") - levels[1, 0]).mean() < 4
    save_images([Image.new("L", (8, 8), 77)], tmp_path / "grey", range(1))
    save_images(np.full((1, 8, 8, 1), 77 / 255), tmp_path / "grey", range(1, 2))
    assert all(np.abs(pixels(tmp_path / "grey" / f"{i}.webp") - 77).max() < 3 for i in range(2))
    for wrong in (SimpleNamespace(meshes=[1]), np.zeros((1, 8)), torch.zeros(1, 2, 2, 4, 8, 8)):
        with pytest.raises(ValueError, match="--no_save_images"):
            save_images(wrong, tmp_path / "wrong", range(1))
    with pytest.raises(ValueError, match="made 2 images for 3 rows"):
        save_images(colours[:, 0], tmp_path / "wrong", range(3))


def test_a_sound_is_saved_as_it_is(tmp_path):
    tone = torch.sin(torch.arange(4000) / 7).expand(1, 2, -1) * torch.tensor([[1.0], [0.25]])
    save_images(SimpleNamespace(audios=tone), tmp_path, range(1), sampling_rate=16000)
    with wave.open(str(tmp_path / "0.wav")) as sound:
        read = np.frombuffer(sound.readframes(4000), "<i2").reshape(-1, 2) / 32767
        assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (2, 16000, 4000)
    assert np.abs(read.T - tone[0].numpy()).max() < 1e-4


# ---------------------------------------------------------------------- text, pictures, the listing


def test_text_tokens_are_padded_to_one_length_and_not_trained_on(tmp_path):
    folder, prompts = tmp_path / "zimage", ["a red fox", "blue ocean waves at night", "three"]
    build(zimage).save_pretrained(folder)
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    options = dict(
        model_name=str(folder),
        dataset_name=str(tmp_path / "p.txt"),
        num_inference_steps=2,
        batch_size=1,
        device="cpu",
    )
    options |= dict(
        hook_names=["layers.1"], stream="text", height=24, width=32, out_dir=str(tmp_path / "out")
    )
    with pytest.raises(
        ValueError, match="larger --text_tokens"
    ):  # the first batch, of one prompt, is shorter
        collect.main(Config(**options))
    options |= dict(out_dir=str(tmp_path / "acts"), text_tokens=40, store_dtype="float32")
    collect.main(Config(**options))
    path = tmp_path / "acts" / "layers.1.text.npy"
    x, lengths = np.load(path), np.load(tmp_path / "acts" / "layers.1.text.lengths.npy")
    assert x.shape == (3, 2, 40, 32) and lengths.tolist() == [len(p) + 2 for p in prompts]
    for row, n in zip(x, lengths):
        assert row[:, :n].any(-1).all() and not row[:, n:].any()
    data = dataset.Activations([path])
    vectors = torch.cat([*data.held_out(), *(x for x, _ in data.batches(64, data.num_training))])
    assert len(vectors) == data.num_vectors == 2 * lengths.sum() and vectors.any(-1).all()
    assert [s.paths for s in dataset.open_activations([path.parent])] == [[str(path)]]


def photos(folder, n, size=(40, 30)):
    folder.mkdir()
    for i in range(n):
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 5 + 9 * i).convert("RGB").save(
            folder / f"{i}.png"
        )
    return folder


def test_real_pictures_are_encoded_noised_and_run_once_at_each_timestep(
    config, model_folder, tmp_path
):
    """Against the same by hand: the VAE, `add_noise` and one forward of the UNet with the empty
    prompt."""
    folder = photos(tmp_path / "photos", 7, (64, 64))
    options = dict(
        num_inference_steps=None,
        images=str(folder),
        timesteps_per_image=3,
        store_dtype="float32",
        batch_size=4,
    )
    options["save_samples"] = True
    collect.main(replace(config, **options))
    out, name = Path(config.out_dir), HOOKS[0]
    x, times = np.load(out / f"{name}.npy"), np.load(out / f"{name}.timesteps.npy")
    assert x.shape == (7, 3, 64, 16) and (times == times[0]).all()
    lines = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [(line["image"], line["prompt"], line["seed"]) for line in lines] == [
        (f"{i}.png", "", i) for i in range(7)
    ]

    pipe, seen = HookedDiffusionModel.from_pretrained(model_folder).pipe, []
    pipe.unet.get_submodule(name).register_forward_hook(
        lambda m, i, o: seen.append(o[0].flatten(2).transpose(1, 2))
    )
    pictures = [Image.open(folder / f"{i}.png") for i in range(4)]
    pictures = [p.resize((32, 32), Image.Resampling.LANCZOS) for p in pictures]
    pixels = (
        torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    )
    with torch.no_grad():
        z = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = torch.cat(
            [
                torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i))
                for i in range(4)
            ]
        )
        text, _ = pipe.encode_prompt([""] * 4, "cpu", 1, False)
        for t in times[0]:
            t = torch.tensor(int(t))
            pipe.unet(
                pipe.scheduler.add_noise(z, noise, t.repeat(4)), t, encoder_hidden_states=text
            )
    by_hand = torch.stack(seen, 1).numpy()
    assert np.abs(x[:4] - by_hand).max() < 1e-4 * np.abs(by_hand).max()
    assert np.allclose(np.load(out / "samples.npy")[:4], z.numpy(), atol=1e-5)
    assert json.loads((out / f"{name}.json").read_text())["timesteps"] == times[0].tolist()
    before = contents(out)
    collect.main(replace(config, **options))  # finished: nothing changes
    assert contents(out) == before


def test_pictures_go_where_a_packed_sample_has_them(tmp_path):
    """Of a family that packs latents: as its own packing does, noised as its own scheduler does."""
    pipe, folder = build(flux), photos(tmp_path / "photos", 2)
    pipe.vae.register_to_config(shift_factor=0.3)
    hooked, seen = HookedDiffusionModel.from_pipeline(pipe), []
    options = dict(
        num_inference_steps=4, output_type="latent", height=12, width=16, max_sequence_length=32
    )
    pictures = real_images.RealImages(hooked, "", options)
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: seen.append((k["hidden_states"], k["timestep"])), with_kwargs=True
    )
    crops = [pictures.crop(str(folder / f"{i}.png")) for i in range(2)]  # they are 4 x 3
    with pictures.in_place(crops, [3, 4]) as sampling:
        clean = hooked(["", ""], generator=real_images.seeded([3, 4]), **options).images
    read = [real_images.to_pixels(crop) for crop in crops]
    assert torch.equal(sampling.sample, clean)
    with torch.no_grad():
        z = (
            pipe.vae.encode(torch.stack(read)).latent_dist.mode() - 0.3
        ) * pipe.vae.config.scaling_factor
    packed = pipe._pack_latents(z, 2, 4, 6, 8)
    assert torch.equal(clean, packed)
    noise = torch.stack(
        [torch.randn(12, 16, generator=torch.Generator().manual_seed(i)) for i in (3, 4)]
    )
    for sample, t in seen[1:]:
        assert torch.allclose(sample, (1 - t[0]) * packed + t[0] * noise, atol=1e-5)


def test_pictures_of_a_data_set(config, tmp_path):
    folder = photos(tmp_path / "photos", 3)
    (folder / "p.csv").write_text(
        "file,caption,kind\n" + "".join(f"{i}.png,a picture,{i}\n" for i in range(3))
    )
    options = dict(
        num_inference_steps=None,
        images="file",
        dataset_name=str(folder / "p.csv"),
        timesteps_per_image=1,
    )
    options["save_samples"] = True
    collect.main(replace(config, **options))
    out = Path(config.out_dir)
    lines = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [(line["file"], line["prompt"], line["kind"]) for line in lines] == [
        (f"{i}.png", "a picture", str(i)) for i in range(3)
    ]
    collect.main(
        replace(
            config,
            **options | dict(dataset_name=None, images=str(folder), out_dir=config.out_dir + "2"),
        )
    )
    samples = [np.load(Path(d) / "samples.npy") for d in (out, config.out_dir + "2")]
    assert np.array_equal(*samples)


def test_pictures_with_guidance_have_as_many_steps_in_both_files(config, tmp_path):
    folder = photos(tmp_path / "photos", 3)
    options = dict(
        num_inference_steps=None,
        images=str(folder),
        guidance_scale=5.0,
        rows="both",
        hook_names=["mid_block"],
    )
    collect.main(replace(config, **options, num_images_per_prompt=2))
    shapes = [
        np.load(Path(config.out_dir) / f"mid_block{end}.npy").shape
        for end in ("", ".uncond", ".timesteps")
    ]
    assert shapes == [(6, 4, 64, 16), (6, 4, 64, 16), (6, 4)]


def test_pictures_of_every_kind(tmp_path):
    levels = np.linspace(0, 65535, 30, dtype=np.uint16).repeat(40).reshape(30, 40)
    grey = Image.fromarray(levels)
    clear = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    turned = Image.new("RGB", (30, 40))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    read = lambda source: real_images.to_pixels(real_images.crop_image(source, 40, 30))
    assert torch.allclose(read(grey)[0, :, 0], torch.linspace(-1, 1, 30), atol=0.02)
    assert torch.equal(read(clear), torch.ones(3, 30, 40))  # what is transparent is white
    assert real_images.open_image(str(tmp_path / "turned.jpg")).size == (40, 30)
    assert read(Image.new("P", (1, 1))).shape == (3, 30, 40)
    (tmp_path / "broken.png").write_bytes(
        photos(tmp_path / "p", 1).joinpath("0.png").read_bytes()[:300]
    )
    with pytest.raises(ValueError, match="broken.png can't be read"):
        read(str(tmp_path / "broken.png"))


def test_a_timestep_that_a_scheduler_meets_twice_is_kept_once():
    times = torch.tensor([9.0, 6.0, 6.0, 3.0])
    cache = {"timesteps": {"a": times}, "output_uncond": {"a": torch.arange(8).view(1, 4, 2, 1)}}
    collect.without_noise_step(cache)
    assert cache["timesteps"]["a"].tolist() == [6, 3]
    assert cache["output_uncond"]["a"].flatten().tolist() == [2, 3, 6, 7]


def test_the_listing_says_what_a_file_would_take(config, capsys):
    collect.main(
        replace(
            config, list_hooks=True, hook_names=["mid_block.**", "mid_block"], store_dtype="float32"
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
    assert "\n  mid_block.attentions.0 " in printed and "several times in one forward" in printed
    assert not Path(config.out_dir).exists()
    collect.main(
        replace(config, hook_names=["mid_block"], store_dtype="float32", max_num_examples=1)
    )
    size = (Path(config.out_dir) / "mid_block.npy").stat().st_size
    assert size == 3 * 64 * 16 * 4 + 128
