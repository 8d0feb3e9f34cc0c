"""Generating with seeds and edits: the images are those of the pipeline itself, however they are
batched."""

import pytest
import torch
from tiny import PROMPTS, build, generate_options, sd15, sdxl

from diffusion.generate import (
    Generation,
    generate,
    generate_batches,
    generate_media,
    required_media,
)
from errors import UsageError
from hook import Edit, HookedDiffusionModel, find_model

HOOK = "up_blocks.0.attentions.1"


def options_of(**options):
    """Of the tiny pipeline, but the prompts and generators."""
    return {
        name: value for name, value in generate_options(1, **options).items() if name != "generator"
    }


def generation_of(n=3, **options):
    return Generation(PROMPTS[:n], list(range(7, 7 + n)), options=options_of(**options))


@pytest.fixture(scope="module")
def model():
    return HookedDiffusionModel.from_pipeline(build(sd15))


def test_what_is_generated_is_the_pipelines(model):
    generation = generation_of(2, output_type="pt")
    made = generate(model, generation)
    for output_type, ours in (("latent", made.sample), ("pt", made.media.values)):
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        options = generation.options | {"output_type": output_type}
        assert torch.equal(ours, model.pipe(PROMPTS[:2], generator=generators, **options).images)
    values = made.media.values
    assert made.media.kind == "image" and values.shape == (2, 3, 32, 32)
    assert 0 <= values.min() and values.max() <= 1
    assert torch.equal(made.media.pictures(), values)
    without = generate(model, generation_of(2))  # latents only
    assert without.media is None and torch.equal(without.sample, made.sample)
    with pytest.raises(
        ValueError, match="StableDiffusionPipeline returns no images, videos or audio"
    ):
        required_media(model, without)


def test_batches_cut_all_that_belongs_to_a_prompt():
    options = {"prompt_2": ["x", "y", "z"], "guidance_scale": 3.0, "sigmas": [2.0, 1.0, 0.0]}
    whole = Generation(["a", "b", "c"], [5, 6, 7], ["not a", "not b", "not c"], options)
    first, second = whole.batches(2)
    assert (first.prompts, first.seeds) == (["a", "b"], [5, 6])
    assert (
        second.prompts,
        second.seeds,
    ) == (["c"], [7])
    assert second.arguments() == {
        "prompt_2": ["z"],
        "guidance_scale": 3.0,
        "sigmas": [2.0, 1.0, 0.0],
        "negative_prompt": ["not c"],
    }
    assert first.arguments()["negative_prompt"] == ["not a", "not b"]
    assert "negative_prompt" not in whole.options
    assert [batch.prompts for batch in whole.batches(3)] == [whole.prompts]
    assert "negative_prompt" not in generation_of().arguments()
    rows = [
        {"prompt": "a", "seed": 1, "negative_prompt": "x"},
        {"prompt": "b", "seed": 2, "negative_prompt": "y"},
    ]
    assert Generation.from_rows(rows, {}) == Generation(["a", "b"], [1, 2], ["x", "y"])
    assert Generation.from_rows([{"prompt": "a", "seed": 1}], {}) == Generation(["a"], [1])


def test_what_does_not_match_is_said():
    with pytest.raises(ValueError, match="2 prompts and 1 seeds: expected a seed for each prompt"):
        Generation(["a", "b"], [1])
    with pytest.raises(ValueError, match="0 prompts"):
        Generation([], [])
    with pytest.raises(ValueError, match="2 prompts and 1 negative prompts"):
        Generation(["a", "b"], [1, 2], ["c"])
    with pytest.raises(ValueError, match="2 prompts and 1 values of prompt_2"):
        Generation(["a", "b"], [1, 2], options={"prompt_2": ["c"]})
    rows = [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 2}]
    for name in ("prompt_2", "prompt_3", "negative_prompt_2"):
        with pytest.raises(ValueError, match=f"{name} is a list, whose texts would meet the wrong"):
            Generation.from_rows(rows, {name: ["c", "d"]})
        assert Generation.from_rows(rows, {name: "c"}).options == {name: "c"}
    with pytest.raises(ValueError, match="batches of 0 prompts: expected at least 1"):
        next(generation_of().batches(0))


def test_each_batch_has_its_own_edits_and_steps(model):
    sizes = []
    indices = []
    advanced = []

    class Bar:
        update = staticmethod(advanced.append)

    def make_edits(sampling):
        def note(x):
            sizes.append((len(x), sampling.index))

        return {HOOK: Edit(note)}

    generation = generation_of()

    def on_step(step):
        return indices.append(step.index)

    parts = list(generate_batches(model, generation, 2, make_edits, on_step, Bar))
    assert sizes == [(2, 0), (2, 1), (1, 0), (1, 1)]
    assert indices == [0, 1, 0, 1]
    assert advanced == [2, 1]
    sample = torch.cat([batch.sample for batch in parts])
    assert torch.allclose(sample, generate(model, generation).sample, atol=1e-4)
    made = generate_media(model, generation_of(output_type="pt"), 2)
    together = generate(model, generation_of(output_type="pt")).media
    assert torch.allclose(made.values, together.values, atol=1e-4)

    def zero(sampling):
        return {HOOK: Edit(torch.zeros_like)}

    assert not torch.allclose(generate(model, generation, zero).sample, sample, atol=1e-3)


def test_an_edit_in_place_that_returns_nothing_is_carried_out(model):
    def zero(x):
        x.zero_()

    def zero_before(x, before):
        before.zero_()  # a copy of what the module takes, which no edit changes

    def look(x):
        pass

    def images(edit):
        return generate(model, generation_of(2), lambda sampling: {HOOK: [edit]}).sample

    plain = generate(model, generation_of(2)).sample
    returned = images(Edit(lambda x: 0 * x))
    assert not torch.equal(returned, plain)
    assert torch.equal(images(Edit(zero)), returned)
    assert torch.equal(images(Edit(zero_before, with_input=True)), plain)
    assert torch.equal(images(Edit(look)), plain)


@pytest.mark.parametrize("steps", ["0-1", "1", 1])
def test_steps_that_are_no_collection_of_numbers_are_refused(steps):
    with pytest.raises(UsageError, match="steps: expected a range or a list, got"):
        Edit(lambda x: x, steps=steps)


def test_a_missing_toy_is_said_to_lie_in_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusion.loading.PROJECT", tmp_path)
    with pytest.raises(UsageError, match="no folder 'toy' here.*in a checkout.*--model_name"):
        find_model("toy")
    with pytest.raises(
        UsageError,
        match="looks like owner/name; a model of your own is a file such as my_model.py$",
    ):
        find_model("toys")


def test_a_sample_size_that_the_pipeline_cant_use_is_named():
    pipe = build(sdxl)
    pipe.default_sample_size = (8, 32)
    pipe.unet.register_to_config(sample_size=(8, 32))
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    options = dict(num_inference_steps=2, output_type="latent")
    with pytest.raises(
        UsageError, match=r"can't use the sample_size \(8, 32\) of its unet .*height"
    ):
        hooked(["a star"], **options)
    options |= dict(height=16, width=64)
    assert hooked(["a star"], **options).images.shape[2:] == (8, 32)
    with pytest.raises(TypeError):  # another mistake stays what it is
        hooked(["a star"], guidance_scale="high", **options)
