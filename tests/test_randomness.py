"""Random numbers: every source is seeded, dry steps leave no trace, and what no seed reaches is refused."""

import random
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from families import flow_matching, flux
from files import read_json
from tiny import PROMPTS, build, called_with, generate_options, sd15

import ablate
import collect
import steer
import train
from diffusion.generate import Generation, generate
from hook import Edit, HookedDiffusionModel

pytestmark = pytest.mark.slow

HOOK = "mid_block.attentions.0"


@called_with(**flux.options)
def stochastic():
    """Its pipeline does not pass the generators on to the scheduler, which draws from the global
    state."""
    pipe = flux()
    pipe.scheduler = flow_matching(stochastic_sampling=True)
    return pipe


def contents(folder):
    return {
        p.name: p.read_bytes()
        for p in sorted(Path(folder).iterdir())
        if p.is_file() and p.suffix in (".npy", ".jsonl")
    }


@pytest.fixture
def config(tmp_path):
    build(stochastic).save_pretrained(tmp_path / "model")
    (tmp_path / "p.txt").write_text("a red fox\nblue ocean waves\nthree green bottles\na cat\n")
    options = dict(
        hook_names=["transformer_blocks.1"],
        model_name=str(tmp_path / "model"),
        dataset_name=str(tmp_path / "p.txt"),
    )
    options |= dict(
        num_inference_steps=3,
        height=12,
        width=16,
        batch_size=2,
        device="cpu",
        out_dir=str(tmp_path / "acts"),
    )
    return collect.Config(**options, save_samples=True, save_images=False)


def test_collecting_twice_gives_the_same_bytes(config):
    paths = collect.main(config)
    torch.manual_seed(77)
    again = replace(config, out_dir=config.out_dir + "2")
    collect.main(again)
    assert contents(config.out_dir) == contents(again.out_dir)
    extended = replace(config, out_dir=config.out_dir + "3", max_num_examples=2)
    collect.main(extended)
    collect.main(replace(extended, max_num_examples=4))
    assert contents(config.out_dir)[paths[0].name] == contents(extended.out_dir)[paths[0].name]


def test_an_edit_that_changes_nothing_moves_nothing(config, tmp_path):
    paths = collect.main(config)
    saes = dict(
        num_latents=[40],
        k=[4],
        out_dir=str(tmp_path / "saes"),
        run_name="a",
        device="cpu",
        num_epochs=1,
    )
    train.main(
        train.Config(
            data=[str(paths[0])], **{k: v for k, v in saes.items() if k in vars(train.Config())}
        )
    )
    out = dict(out_dir=str(tmp_path / "steer"), device="cpu", num_prompts=2)
    steer.main(
        steer.Config(sae=[str(tmp_path / "saes" / "a")], features=["1"], multiply=[1.0], **out)
    )
    report = read_json(next((tmp_path / "steer").rglob("steer.json")))
    assert [picture["moved"] for run in report["runs"] for picture in run["pictures"]] == [0.0] * 4


def test_an_ablation_that_does_nothing_ranks_at_zero(config, tmp_path):
    """The second part of an attention's output is a dropout, which does nothing: skipped, it must
    not seem to."""
    options = dict(
        model_name=config.model_name,
        dataset_name=config.dataset_name,
        num_inference_steps=3,
        height=12,
        width=16,
    )
    name = "transformer_blocks.0.attn.to_out.1"
    ablate.main(
        ablate.Config(
            hook_names=[name],
            max_num_examples=2,
            out_dir=str(tmp_path / "ablate"),
            device="cpu",
            **options,
        )
    )
    record = read_json(tmp_path / "ablate" / "ablate.json")["hooks"][0]
    assert (record["latents"], record["images"]) == (0.0, 0.0)


def test_noise_of_a_row_does_not_depend_on_its_neighbours():
    """Whichever rows are generated together, a row has its own noise, and other seeds have other
    noise."""
    hooked = HookedDiffusionModel.from_pipeline(build(stochastic))
    options = generate_options(3, stochastic, num_inference_steps=3)
    options = {
        k: v[0] if k == "negative_prompt" else v
        for k, v in options.items()
        if k not in ("generator", "prompt")
    }
    options["true_cfg_scale"] = 1.0
    three = generate(hooked, Generation(["a"] * 3, [3, 4, 5], options=options)).sample
    two = generate(hooked, Generation(["a"] * 2, [5, 3], options=options)).sample
    assert torch.allclose(two, three[[2, 0]], atol=1e-4)
    assert not torch.allclose(three[0], three[1], atol=0.1)


class Noisy(diffusers.DDIMScheduler):
    """A scheduler that adds noise from somewhere, to the last step."""

    def __init__(self, draw):
        super().__init__(clip_sample=False, steps_offset=1)
        self.draw = draw

    def step(self, *args, **kwargs):
        result = super().step(*args, **kwargs)
        noise = (
            torch.as_tensor(np.asarray(self.draw(result[0].numel())))
            .view_as(result[0])
            .to(result[0])
        )
        return diffusers.schedulers.scheduling_ddim.DDIMSchedulerOutput(result[0] + 0.1 * noise)


class Held:
    """A noise sampler that holds a generator of its own."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, n):
        if isinstance(self.generator, torch.Generator):
            return torch.randn(n, generator=self.generator)
        if isinstance(self.generator, random.Random):
            return [self.generator.gauss(0, 1) for _ in range(n)]
        return self.generator.normal(size=n)


SEEDED = {
    "torch": lambda: torch.randn,
    "numpy": lambda: np.random.randn,  # noqa: NPY002
    "python": lambda: lambda n: [random.gauss(0, 1) for _ in range(n)],
    "torch's generator": lambda: Held(torch.Generator()),
    "numpy's generator": lambda: Held(np.random.default_rng()),
    "an older one of numpy": lambda: Held(np.random.RandomState()),  # noqa: NPY002
    "python's generator": lambda: Held(random.Random()),
}


@pytest.mark.parametrize("draw", SEEDED)
def test_every_source_of_random_numbers_is_seeded_and_put_back(draw):
    pipe = build(sd15, scheduler=Noisy(SEEDED[draw]()))
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    options = generate_options(2)
    options.pop("generator")
    generation = Generation(PROMPTS[:2], [3, 4], options=options)
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    first = generate(hooked, generation).sample
    kept = generate(hooked, generation, lambda sampling: {HOOK: Edit(lambda x: x.clone())}).sample
    assert torch.equal(first, kept)
    assert not torch.equal(first, generate(hooked, replace(generation, seeds=[3, 5])).sample)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]


def test_a_dry_step_leaves_the_random_numbers_as_they_were():
    """Also those of the schedulers, and those that a denoiser draws."""
    pipe = build(sd15, scheduler=Noisy(Held(np.random.default_rng())))

    def draw(module, args):
        np.random.randn(), random.random()  # noqa: NPY002

    pipe.unet.register_forward_pre_hook(draw)
    bit_generator = pipe.scheduler.draw.generator.bit_generator

    def states():
        return repr((np.random.get_state(), random.getstate(), bit_generator.state))  # noqa: NPY002

    before = states()
    HookedDiffusionModel.from_pipeline(pipe).first_step(HOOK, PROMPTS[:2], **generate_options(2))
    assert states() == before


@pytest.mark.parametrize("when", ["always", "in the last step"])
def test_random_numbers_that_no_seed_reaches_are_refused(when):
    calls = []

    def draw(n):
        calls.append(n)
        late = when == "always" or len(calls) % 3 == 0
        return np.random.default_rng().normal(size=n) * late

    hooked = HookedDiffusionModel.from_pipeline(build(sd15, scheduler=Noisy(draw)))
    options = generate_options(2, num_inference_steps=3)
    with pytest.raises(ValueError, match="Noisy draws random numbers that no seed reaches"):
        hooked.first_step(HOOK, PROMPTS[:2], **options)
    calls.clear()
    with pytest.raises(ValueError, match="Noisy draws random numbers that no seed reaches"):
        hooked.run_with_hooks({HOOK: Edit(lambda x: x)}, PROMPTS[:2], **options)


class InPlace(diffusers.DDIMScheduler):
    """A scheduler that writes its result into the sample, and scales the prediction in place."""

    draw = None

    def step(self, model_output, timestep, sample, **kwargs):
        model_output *= 0.5
        sample.copy_(super().step(model_output, timestep, sample, **kwargs)[0])
        if self.draw is not None:
            sample += self.draw(sample)
        return (sample,)


def in_place():
    hooked = HookedDiffusionModel.from_pipeline(
        build(sd15, scheduler=InPlace(clip_sample=False, steps_offset=1))
    )
    return hooked, generate_options(2, num_inference_steps=3)


def test_looking_for_random_numbers_leaves_the_sample_alone():
    hooked, options = in_place()
    expected = options["generator"][0].clone_state(), options["generator"][1].clone_state()
    sample = hooked.first_sample(PROMPTS[:2], **options)
    size = sample.shape[1:]
    noise = torch.cat([torch.randn(1, *size, generator=generator) for generator in expected])
    assert torch.equal(sample, noise * hooked.pipe.scheduler.init_noise_sigma)


def test_random_numbers_of_a_scheduler_that_steps_in_place_are_refused():
    hooked, options = in_place()
    hooked.pipe.scheduler.draw = lambda x: torch.as_tensor(
        np.random.default_rng().normal(size=x.shape)
    ).to(x)
    with pytest.raises(ValueError, match="InPlace draws random numbers that no seed reaches"):
        hooked.first_step(HOOK, PROMPTS[:2], **options)


def test_a_scheduler_is_looked_at_once_for_all_batches(monkeypatch):
    """The steps that are made in it are those of the rest of the loop, and a dry step needs none of
    them."""
    steps = []
    step = diffusers.DDIMScheduler.step

    def counted(self, *args, **kwargs):
        steps.append(1)
        return step(self, *args, **kwargs)

    hooked = HookedDiffusionModel.from_pipeline(build(sd15))
    monkeypatch.setattr(diffusers.DDIMScheduler, "step", counted)
    counts = []
    for prompts in (PROMPTS[:2], PROMPTS[1:], PROMPTS[:1]):
        hooked.first_step(HOOK, prompts, **generate_options(len(prompts), num_inference_steps=7))
        counts.append(len(steps))
    assert counts == [14, 14, 14]
    hooked.pipe.scheduler = hooked.schedulers[0] = Noisy(
        lambda n: np.random.default_rng().normal(size=n)
    )
    with pytest.raises(ValueError, match="Noisy draws random numbers that no seed reaches"):
        hooked.first_step(HOOK, PROMPTS[:2], **generate_options(2, num_inference_steps=7))


class NotCopied(diffusers.DDIMScheduler):
    def __deepcopy__(self, memo):
        raise ValueError("this scheduler can't be copied")


def test_a_scheduler_that_cannot_be_copied_is_not_looked_at():
    hooked = HookedDiffusionModel.from_pipeline(
        build(sd15, scheduler=NotCopied(clip_sample=False, steps_offset=1))
    )
    assert HOOK in hooked.first_step(HOOK, PROMPTS[:2], **generate_options(2))["output"]


def test_the_brownian_tree_of_a_scheduler_is_seeded():
    pytest.importorskip("torchsde")
    pipe = build(sd15, scheduler=diffusers.DPMSolverSDEScheduler(use_karras_sigmas=True))
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    options = generate_options(2, num_inference_steps=4)
    options.pop("generator")
    generation = Generation(PROMPTS[:2], [3, 4], options=options)
    first = generate(hooked, generation).sample
    assert torch.equal(
        first,
        generate(hooked, generation, lambda sampling: {HOOK: Edit(lambda x: x.clone())}).sample,
    )
