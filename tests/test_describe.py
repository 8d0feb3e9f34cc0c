"""Activations from elsewhere: what `describe` writes, and what the stages make of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from files import read_json, read_lines
from pages import read_page
from PIL import Image
from tiny import PROMPTS, build, generate_options, sd15
from training import train_config

import evaluate
import features
import steer
import train
from errors import UsageError
from hook import HookedDiffusionModel
from store.activation_file import open_activation_file
from store.collection import describe

SHAPE = (40, 3, 8, 16)


def numbers(shape=SHAPE):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def prompts(count=40):
    return [f"a {'red' if number % 2 else 'blue'} thing {number}" for number in range(count)]


def test_the_page_has_a_grid_words_timesteps_and_images(tmp_path):
    x = numbers()
    x[1::2, :, 5] += 8  # a direction of what is red, in the token at row 1, column 1
    path = describe(
        x,
        tmp_path / "mine" / "block.npy",
        prompts(),
        grid=(2, 4),
        timesteps=[900, 500, 100],
        images=[Image.new("RGB", (16, 8), (6 * row, 0, 0)) for row in range(40)],
    )
    train.main(train_config(path, tmp_path / "saes", num_epochs=2))
    cfg = read_json(tmp_path / "saes" / "run" / "cfg.json")
    assert cfg["hook_name"] == "block"
    page = features.main(
        features.Config(sae=str(tmp_path / "saes" / "run"), out_dir=str(tmp_path), device="cpu")
    )
    data = read_page(page)
    assert data["shapes"] == [[2, 4]]
    assert data["timesteps"] == [900, 500, 100]
    assert data["note"] == ""
    assert any("red" in [word for word, _ in words] for words in data["words"])
    [written, *_] = evaluate.main(
        evaluate.Config(
            sae=str(tmp_path / "saes" / "run"), out_dir=str(tmp_path / "e"), device="cpu"
        )
    )
    assert [row["timestep"] for row in read_json(written)["by_timestep"]] == [900, 500, 100]


def test_what_is_written_is_what_was_given(tmp_path):
    """Tensors, bfloat16, a memory map that is there already, and a second file of one folder."""
    x = torch.from_numpy(numbers()).bfloat16()
    path = describe(x, tmp_path / "b.npy", prompts(), seeds=range(40), hook_name="blocks.1")
    file = open_activation_file(path)
    assert (file.hook_name, file.meta["dtype"], file.P) == ("blocks.1", "bfloat16", 40)
    assert torch.equal(torch.from_numpy(np.load(path)).view(torch.bfloat16), x)
    assert read_lines(tmp_path / "prompts.jsonl")[3]["seed"] == 3

    mapped = np.lib.format.open_memmap(tmp_path / "c.npy", mode="w+", dtype=np.float32, shape=SHAPE)
    mapped[:] = numbers()
    describe(mapped, tmp_path / "c.npy", prompts(), seeds=range(40))
    assert open_activation_file(tmp_path / "c.npy").d == 16
    assert np.array_equal(np.load(tmp_path / "c.npy"), numbers().astype(np.float32))


def test_a_text_stream_leaves_its_padding_out(tmp_path):
    lengths = [3 + row % 4 for row in range(40)]
    describe(numbers(), tmp_path / "t.npy", prompts(), stream="text", lengths=lengths)
    file = open_activation_file(tmp_path / "t.npy")
    assert file.lengths.tolist() == lengths
    assert file.meta["padding"] is False
    train.main(train_config(tmp_path / "t.npy", tmp_path / "saes"))
    training = read_json(tmp_path / "saes" / "run" / "cfg.json")
    assert training["stream"] == "text"


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(array=numbers((40, 3, 16))), "expected an array .rows, steps, tokens, d."),
        (dict(array=np.zeros(SHAPE, int)), "expected floating-point numbers, got int64"),
        (dict(prompts=prompts(39)), "expected 40 prompts, one for each row"),
        (dict(prompts="a cat"), "expected 40 prompts, one for each row"),
        (dict(prompts=[{"text": "a"}] * 40), "without the key 'prompt'"),
        (dict(grid=(3, 3)), "the grid .3, 3. does not hold 8 tokens"),
        (dict(timesteps=[1, 2]), "2 timesteps: expected 3"),
        (dict(seeds=[1]), "1 seeds: expected 40"),
        (dict(stream="text"), "lengths are for stream"),
        (dict(lengths=[1] * 40), "lengths are for stream"),
        (dict(stream="text", lengths=[9] * 40), "not between 0 and 8"),
        (dict(path="a.npz"), "ends in .npy"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, options, says):
    given = dict(array=numbers(), path="a.npy", prompts=prompts()) | options
    with pytest.raises(UsageError, match=says):
        describe(given.pop("array"), tmp_path / given.pop("path"), given.pop("prompts"), **given)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    describe(numbers(), tmp_path / "a.npy", prompts())
    with pytest.raises(UsageError, match="a.npy is there already"):
        describe(numbers() + 1, tmp_path / "a.npy", prompts())
    with pytest.raises(UsageError, match="has other prompts; use another folder"):
        describe(numbers(), tmp_path / "b.npy", prompts()[::-1])
    (tmp_path / "collect.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a collection of collect.py"):
        describe(numbers(), tmp_path / "b.npy", prompts())


@pytest.mark.slow
def test_the_model_is_found_again_to_steer(tmp_path, monkeypatch):
    """With its name and seeds, the SAE edits the model; without them one line says what to do."""
    pipe = build(sd15)
    pipe.save_pretrained(tmp_path / "model")
    texts = [f"{PROMPTS[number % 3]} {number}" for number in range(6)]
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    _, cache = hooked.run_with_cache("mid_block", texts, **generate_options(6))
    x = cache["output"]["mid_block"]
    about = dict(grid=cache["grid"]["mid_block"], timesteps=cache["timesteps"]["mid_block"])
    monkeypatch.chdir(tmp_path)
    named = dict(hook_name="mid_block", model_name="model", seeds=range(6))
    describe(x, "named/mid.npy", texts, **about, **named)
    describe(x, "bare/mid.npy", texts, hook_name="mid_block", **about)
    for folder in ("named", "bare"):
        train.main(train_config(f"{folder}/mid.npy", folder, num_epochs=2))
    config = steer.Config(
        sae=["named/run"], multiply=[1.0, 4.0], num_prompts=2, out_dir="steer", device="cpu"
    )
    [report] = [path for path in steer.main(config) if Path(path).name == "steer.json"]
    runs = json.loads(Path(report).read_text())["runs"]
    assert max(image["moved"] for image in runs[1]["pictures"]) < 1e-4
    assert min(image["moved"] for image in runs[2]["pictures"]) > 0
    config.sae = ["bare/run"]
    config.out_dir = "bare"
    with pytest.raises(UsageError, match="does not say which model made them"):
        steer.main(config)
    config.model_name = "model"
    with pytest.raises(UsageError, match="the prompts have no seeds"):
        steer.main(config)
