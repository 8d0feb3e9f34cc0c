"""Time, index, randomness and real images: what is recorded, and told to edits, is what the
denoiser was given."""

import json
import random
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from families import cogvideox, flow_matching, flux, kandinsky22, ltx, pictures, sd15_parts, wan
from PIL import Image
from tiny import PROMPTS, build, called_with, generate_options, qwen_tokenizer, sd15, sdxl

import ablate
import collect
import steer
import train
from analysis.feature_edits import Edits, Target, Typical, adding_edits
from diffusion import real_images
from diffusion.generate import Generation, generate
from diffusion.real_images import open_image, white_level
from diffusion.sampling_loop import Loop
from errors import UsageError
from evaluate import graft
from hook import Edit, HookedDiffusionModel, HookPoint

pytestmark = pytest.mark.slow

HOOK = "mid_block.attentions.0"


def prompt_and_options(n, recipe, **options):
    options = generate_options(n, recipe, **options)
    return options.pop("prompt", None), options


# ---------------------------------------------------------------------------- two loops in one call


@pytest.fixture(scope="module")
def two_loops():
    return HookedDiffusionModel.from_pipeline(build(kandinsky22))


TWO_LOOPS = dict(prior_num_inference_steps=3, num_inference_steps=5)


def test_the_index_restarts_with_the_second_loop(two_loops):
    """`Edit(steps=[3])` edits step 3 of the loop that its module runs in."""
    prompt, options = prompt_and_options(2, kandinsky22, **TWO_LOOPS)
    times, edited = [], []
    with two_loops.watch(
        2, on_step=lambda step: times.append((step.index, step.time()))
    ) as sampling:
        edit = Edit(
            lambda x: edited.append((sampling.index, sampling.timestep())), rows="all", steps=[3]
        )
        two_loops.run_with_hooks({"unet.mid_block": edit}, prompt, **options)
    assert [index for index, _ in times] == [0, 1, 2, 0, 1, 2, 3, 4]
    assert edited == [times[3 + 3]] * 2  # once each chunk of the guidance


def test_every_second_step_of_the_second_loop_is_kept(two_loops):
    prompt, options = prompt_and_options(2, kandinsky22, **TWO_LOOPS)
    _, every = two_loops.run_with_cache("unet.mid_block", prompt, **options)
    prompt, options = prompt_and_options(2, kandinsky22, **TWO_LOOPS)
    _, second = two_loops.run_with_cache(
        "unet.mid_block", prompt, cache_every_n_timesteps=2, **options
    )
    assert every["output"]["mid_block"].shape[1] == 5
    assert torch.equal(second["output"]["mid_block"], every["output"]["mid_block"][:, ::2])
    assert torch.equal(second["timesteps"]["mid_block"], every["timesteps"]["mid_block"][::2])


def test_a_report_by_step_has_the_timesteps_of_its_own_loop(two_loops):
    prompt, options = prompt_and_options(2, kandinsky22, **TWO_LOOPS)
    _, cache = two_loops.run_with_cache("unet.mid_block", prompt, **options)
    generation = Generation(
        prompt, [0, 1], options={k: v for k, v in options.items() if k != "generator"}
    )
    report, _ = graft(two_loops, lambda x: x, HookPoint("mid_block"), generation, windows=1)
    times = cache["timesteps"]["mid_block"].tolist()
    assert report["all"]["timesteps"] == [times[0], times[-1]]


class Euler:
    """A scheduler of one's own, with its own names and order of arguments."""

    def set_timesteps(self, n):
        self.timesteps = list(range(n, 0, -1))

    def step(self, prediction, timestep, sample):
        return sample - 0.1 * prediction


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(3, 3)

    def forward(self, x, t):
        return self.mix(x) + t


def two_loops_of_ones_own(lengths):
    """Both schedulers are set before the first loop; the first loop ends before its list does."""
    torch.manual_seed(0)
    model, schedulers = Denoiser(), [Euler(), Euler()]
    hooked = HookedDiffusionModel(model, schedulers[0])
    hooked.schedulers = schedulers

    def pipe(prompt=None):
        x = torch.ones(2, 3)
        for scheduler in schedulers:
            scheduler.set_timesteps(4)
        for scheduler, length in zip(schedulers, lengths):
            for t in scheduler.timesteps[:length]:
                x = scheduler.step(model(x, float(t)), t, x)
        return x

    hooked.pipe = pipe
    return hooked


def test_a_loop_of_another_scheduler_has_an_index_of_its_own():
    hooked, edited = two_loops_of_ones_own([4, 3]), []
    with hooked.watch(2) as sampling:
        edit = Edit(
            lambda x: edited.append((sampling.index, sampling.timestep())), steps=[2], rows="all"
        )
        hooked.run_with_hooks({"mix": edit}, ["a", "b"])
    assert edited == [(2, 2.0)] * 2
    with pytest.raises(ValueError, match="step 2 while the denoiser ran is step 0 of another loop"):
        two_loops_of_ones_own([2, 3]).run_with_hooks(
            {"mix": Edit(lambda x: None, steps=[2], rows="all")}, ["a", "b"]
        )


# ----------------------------------------------------------------------------------------- strength


@called_with(image=pictures, strength=0.5)
def img2img():
    return diffusers.StableDiffusionImg2ImgPipeline(
        **sd15_parts(), safety_checker=None, requires_safety_checker=False
    )


@called_with(**img2img.options)
def img2img_heun():
    """Its list has every timestep but the first twice, and the sampling begins with the second of
    two."""
    pipe = img2img()
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    return pipe


@called_with(
    image=pictures,
    mask_image=lambda n: [p.convert("L") for p in pictures(n)],
    strength=0.5,
    height=16,
    width=24,
)
def inpaint():
    return diffusers.StableDiffusionInpaintPipeline(
        **sd15_parts(), safety_checker=None, requires_safety_checker=False
    )


@called_with(image=pictures, strength=0.5, height=16, width=24, max_sequence_length=32)
def flux_img2img():
    """Its denoiser is told a thousandth of the scheduler's timestep."""
    return diffusers.FluxImg2ImgPipeline(
        **{k: v for k, v in flux().components.items() if "image" not in k and "feature" not in k}
    )


IN_THE_MIDDLE = [
    (img2img, HOOK),
    (img2img_heun, HOOK),
    (inpaint, HOOK),
    (flux_img2img, "transformer_blocks.1"),
]


@pytest.mark.parametrize("recipe, name", IN_THE_MIDDLE)
@pytest.mark.parametrize("steps", [None, [2]])
def test_the_timestep_of_an_edit_is_the_schedulers(recipe, name, steps):
    hooked, true, told = HookedDiffusionModel.from_pipeline(build(recipe)), [], []
    prompt, options = prompt_and_options(2, recipe, num_inference_steps=6)
    with hooked.watch(2, on_step=lambda step: true.append(step.time())) as sampling:
        change = lambda x, timestep: told.append(timestep)
        hooked.run_with_hooks(
            {name: adding_edits(HookPoint(name), change, sampling, steps=steps)}, prompt, **options
        )
    n = 5 if recipe is img2img_heun else 3
    assert len(true) == n and true[0] < 700  # half of the schedule
    assert told == (true if steps is None else [true[2]])
    prompt, options = prompt_and_options(2, recipe, num_inference_steps=6)
    assert hooked.first_step(name, prompt, **options)["num_steps"] == n
    assert hooked.layouts(name, prompt, **options)[1] == {name: list(range(n))}


def test_steps_that_the_pipeline_leaves_out_at_the_end_do_not_count():
    """The first of two pipelines in turn ends early, and its scheduler's list does not."""
    hooked = HookedDiffusionModel.from_pipeline(build(sdxl))
    prompt, options = prompt_and_options(2, sdxl, num_inference_steps=10, denoising_end=0.6)
    assert hooked.first_step(HOOK, prompt, **options)["num_steps"] == 6
    _, cache = hooked.run_with_cache(HOOK, prompt, **options)
    assert len(cache["timesteps"][HOOK]) == 6


def test_an_edited_activation_is_compared_with_its_own_step(tmp_path):
    """Norms near 1 in an untouched run: each step of an image-to-image sampling is as typical as
    any."""
    hooked = HookedDiffusionModel.from_pipeline(build(img2img))
    prompt, options = prompt_and_options(3, img2img, num_inference_steps=6)
    _, cache = hooked.run_with_cache(HOOK, prompt, **options)
    x = cache["output"][HOOK] * torch.tensor([1.0, 10.0, 100.0]).view(
        1, 3, 1, 1
    )  # so that a wrong step shows
    np.save(tmp_path / f"{HOOK}.npy", x.numpy())
    meta = {"timesteps": cache["timesteps"][HOOK].tolist(), "hook_name": HOOK}
    (tmp_path / f"{HOOK}.json").write_text(json.dumps(meta))
    typical, scale = (
        Typical([tmp_path / f"{HOOK}.npy"]),
        dict(zip(meta["timesteps"], (1.0, 10.0, 100.0))),
    )
    asked = []

    class Meter(Typical):
        def __init__(self):
            self.times = typical.times

        def __call__(self, x, timestep, text=False):
            asked.append(timestep)
            return typical(x * scale[timestep], timestep, text)

    edits = Edits(
        [Target("", None, HookPoint(HOOK), [], typical=Meter())], [lambda x, timestep: None]
    )
    options.pop("generator")
    generate(hooked, Generation(prompt, [0, 1, 2], options=options), edits)
    assert asked == meta["timesteps"]
    for norm, distance in edits.numbers(3):
        assert 0.4 < norm < 2 and 0.4 < distance < 2  # 10 or 0.1 at a wrong step


def test_a_timestep_that_cannot_be_told_is_not_compared():
    """A denoiser of one's own that is told another time than the scheduler, which lists none."""
    model, scheduler = Denoiser(), Euler()
    hooked = HookedDiffusionModel(model, scheduler)

    def pipe(prompt=None):
        x = torch.ones(2, 3)
        for t in (9, 5, 1):
            x = scheduler.step(model(x, 1 - t / 10), t, x)

    hooked.pipe, told = pipe, []
    with hooked.watch(2) as sampling:
        hooked.run_with_hooks(
            {"mix": Edit(lambda x: told.append(sampling.timestep()), rows="all")}, ["a", "b"]
        )
    assert told[0] == 9 and np.isnan(told[-1])


# -------------------------------------------------------------------- random numbers of a scheduler


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


def test_collecting_twice_gives_the_same_bytes(config, monkeypatch):
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
    report = json.loads(next((tmp_path / "steer").rglob("steer.json")).read_text())
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
    record = json.loads((tmp_path / "ablate" / "ablate.json").read_text())["hooks"][0]
    assert (record["latents"], record["images"]) == (0.0, 0.0)


def test_noise_of_a_row_does_not_depend_on_its_neighbours():
    """Whichever rows are generated together, a row has its own noise, and other seeds have other
    noise."""
    hooked, options = (
        HookedDiffusionModel.from_pipeline(build(stochastic)),
        generate_options(3, stochastic, num_inference_steps=3),
    )
    options = {
        k: v[0] if k == "negative_prompt" else v
        for k, v in options.items()
        if k not in ("generator", "prompt")
    }
    options["true_cfg_scale"] = 1.0
    three = generate(hooked, Generation(["a"] * 3, [3, 4, 5], options=options)).sample
    two = generate(hooked, Generation(["a"] * 2, [5, 3], options=options)).sample
    assert torch.allclose(two, three[[2, 0]], atol=1e-4) and not torch.allclose(
        three[0], three[1], atol=0.1
    )


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
    hooked, options = HookedDiffusionModel.from_pipeline(pipe), generate_options(2)
    options.pop("generator")
    generation = Generation(PROMPTS[:2], [3, 4], options=options)
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    first = generate(hooked, generation).sample
    kept = generate(hooked, generation, lambda sampling: {HOOK: Edit(lambda x: x.clone())}).sample
    assert torch.equal(first, kept)
    assert not torch.equal(first, generate(hooked, replace(generation, seeds=[3, 5])).sample)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert (
        torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]
    )


def test_a_dry_step_leaves_the_random_numbers_as_they_were():
    """Also those of the schedulers, and those that a denoiser draws."""
    pipe = build(sd15, scheduler=Noisy(Held(np.random.default_rng())))

    def draw(module, args):
        np.random.randn(), random.random()  # noqa: NPY002

    pipe.unet.register_forward_pre_hook(draw)
    held = pipe.scheduler.draw.generator.bit_generator
    states = lambda: repr((np.random.get_state(), random.getstate(), held.state))  # noqa: NPY002
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
    steps, step = [], diffusers.DDIMScheduler.step

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
    hooked, options = (
        HookedDiffusionModel.from_pipeline(pipe),
        generate_options(2, num_inference_steps=4),
    )
    options.pop("generator")
    generation = Generation(PROMPTS[:2], [3, 4], options=options)
    first = generate(hooked, generation).sample
    assert torch.equal(
        first,
        generate(hooked, generation, lambda sampling: {HOOK: Edit(lambda x: x.clone())}).sample,
    )


# -------------------------------------------------------------------------------- sigmas, arguments


SECOND_ORDER = [
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverSDEScheduler",
]


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", *SECOND_ORDER]
)
@pytest.mark.parametrize("karras", [False, True])
def test_sigmas_are_those_that_the_denoiser_was_called_at(name, karras):
    """Against the scale of the denoiser's input, 1 / sqrt(sigma^2 + 1), measured from outside."""
    if name.startswith("DPMSolverSDE"):
        pytest.importorskip("torchsde")
    options = {"use_karras_sigmas": True} if karras and "EulerAncestral" not in name else {}
    pipe = build(sd15, scheduler=getattr(diffusers, name)(**options))
    hooked, inputs, samples = HookedDiffusionModel.from_pipeline(pipe), [], []
    pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0][:2].double()))
    with hooked.watch(2, on_step=lambda step: samples.append(step.sample.double())):
        _, cache = hooked.run_with_cache(
            HOOK, PROMPTS[:2], **generate_options(2, num_inference_steps=5)
        )
    scales = [(x.norm() / sample.norm()).item() for x, sample in zip(inputs, samples)]
    assert len(scales) == len(cache["sigmas"][HOOK])
    assert [1 / np.hypot(1, sigma) for sigma in cache["sigmas"][HOOK].tolist()] == pytest.approx(
        scales, rel=1e-3
    )


def test_a_timestep_that_is_listed_twice_has_the_sigma_of_its_step():
    """Rounded to integers, two of many sigmas have one timestep."""
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    pipe = build(sd15, scheduler=scheduler)
    _, cache = HookedDiffusionModel.from_pipeline(pipe).run_with_cache(
        HOOK, PROMPTS[:1], **generate_options(1, num_inference_steps=150)
    )
    assert len(set(cache["timesteps"][HOOK].tolist())) < 150
    assert cache["sigmas"][HOOK].tolist() == scheduler.sigmas[:150].double().tolist()


@called_with(**cogvideox.options)
def cogvideox_dpm():
    pipe = cogvideox()
    pipe.scheduler = diffusers.CogVideoXDPMScheduler()
    return pipe


def test_arguments_of_a_scheduler_are_bound_by_name():
    """`step(model_output, old_pred_original_sample, timestep, timestep_back, sample, ...)`."""
    pipe, seen, name = build(cogvideox_dpm), [], "transformer_blocks.1"
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    pipe.transformer.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(output[0].clone())
    )
    prompt, options = prompt_and_options(2, cogvideox_dpm, num_inference_steps=3)
    _, cache = hooked.run_with_cache(name, prompt, rows="both", **options)
    kept = torch.cat([cache["output_uncond"][name], cache["output"][name]])
    assert torch.equal(kept, torch.stack(seen, 1))
    assert cache["timesteps"][name].tolist() == [float(t) for t in pipe.scheduler.timesteps]


# -------------------------------------------------------------------------------------- real images


@called_with(**ltx.options | dict(num_frames=1))
def ltx_statistics():
    """The statistics of its latents are buffers of the VAE, and not in the config."""
    pipe = ltx()
    pipe.vae.latents_mean.copy_(torch.randn(8, generator=torch.Generator().manual_seed(0)))
    pipe.vae.latents_std.copy_(torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5)
    return pipe


@called_with(height=32, width=48, max_sequence_length=64, text_encoder_out_layers=(0, 1, 2))
def flux2():
    """Noise is on 2 x 2 patches of latents, which a batch norm of the VAE scales."""
    import transformers

    text = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8, vocab_size=300
    )
    text |= dict(
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    size = dict(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        patch_size=1,
        in_channels=16,
    )
    size |= dict(
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=8,
        guidance_embeds=False,
    )
    blocks = dict(
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=32,
    )
    blocks |= dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=flow_matching(),
        vae=diffusers.AutoencoderKLFlux2(**blocks),
        text_encoder=transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text)),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.Flux2Transformer2DModel(**size),
    )
    pipe.vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    pipe.vae.bn.running_var.uniform_(0.3, 2, generator=torch.Generator().manual_seed(1))
    return pipe


@called_with(**sd15.options)
def pndm():
    """Its scheduler can't make a single step."""
    return sd15(diffusers.PNDMScheduler())


def own_of_ltx(pipe, z):
    scaled = pipe._normalize_latents(
        z, pipe.vae.latents_mean, pipe.vae.latents_std, pipe.vae.config.scaling_factor
    )
    return pipe._pack_latents(scaled, 1, 1)


def own_of_flux2(pipe, z):
    mean, variance = (
        pipe.vae.bn.running_mean.view(1, -1, 1, 1),
        pipe.vae.bn.running_var.view(1, -1, 1, 1),
    )
    return pipe._pack_latents(
        (pipe._patchify_latents(z) - mean) / (variance + pipe.vae.config.batch_norm_eps).sqrt()
    )


def own_of_sd15(pipe, z):
    return z * pipe.vae.config.scaling_factor


def photo(width, height):
    return Image.effect_mandelbrot((width, height), (-2, -1, 1, 1), 14).convert("RGB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe, own",
    [(ltx_statistics, own_of_ltx), (flux2, own_of_flux2), (sd15, own_of_sd15), (pndm, own_of_sd15)],
)
def test_latents_of_real_images_are_the_pipelines_own(recipe, own, dtype):
    pipe = build(recipe).to(dtype)
    _, options = prompt_and_options(1, recipe)
    options.pop("generator")
    size = options["width"], options["height"]
    real = real_images.RealImages(
        HookedDiffusionModel.from_pipeline(pipe), "", options | dict(num_inference_steps=5)
    )
    image = photo(*size)
    x = real_images.to_pixels(image)[None].to(
        pipe.vae.dtype
    )  # some VAEs are computed in float32 all the same
    with torch.no_grad():
        z = pipe.vae.encode(x if recipe is not ltx_statistics else x[:, :, None]).latent_dist.mode()
        expected = own(pipe, z).to(dtype).float()
    error = (real.latents([image]).float() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)
    if own is own_of_sd15:
        assert torch.equal(real.latents([image]).float(), expected)


@pytest.mark.parametrize(
    "recipe, size",
    [
        (sd15, dict(height=16, width=64)),
        (flux, dict(height=8, width=32)),
        (wan, dict(height=16, width=64, num_frames=1)),
    ],
)
def test_an_image_comes_out_as_it_went_in_at_a_size_that_is_not_square(recipe, size):
    """The size may come from `--pipeline_kwargs`. A square of as many pixels would be scrambled."""
    pipe = build(recipe)
    _, options = prompt_and_options(1, recipe)
    options |= dict(size, num_inference_steps=3, output_type="pt", guidance_scale=1.0)
    generator = options.pop("generator")
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    real = real_images.RealImages(hooked, "", options)
    assert (real.width, real.height) == (size["width"], size["height"])

    image = real.crop(photo(64, 64))
    decode = pipe.vae.decode
    decoded = []
    pipe.vae.decode = lambda z, *args, **kwargs: decoded.append(z) or decode(z, *args, **kwargs)
    with real.in_place([image], [0]):
        hooked([""], generator=generator, **options)
    x = real_images.to_pixels(image)[None]
    with torch.no_grad():
        z = pipe.vae.encode(x[:, :, None] if recipe is wan else x).latent_dist.mode()
    assert decoded[0].shape == z.shape
    assert torch.allclose(decoded[0], z, atol=1e-4)


def test_an_image_is_not_cut_into_the_frames_of_a_video():
    """4 frames of 4 x 4 latents are as many as 8 x 8 latents of one image."""
    _, options = prompt_and_options(1, wan)
    options.pop("generator")
    options |= dict(height=32, width=32, num_frames=13)
    with pytest.raises(UsageError, match=r"gives its VAE \(4, 4, 4, 4\): .*num_frames"):
        real_images.RealImages(HookedDiffusionModel.from_pipeline(build(wan)), "", options)


def test_a_size_that_no_option_tells_is_the_one_that_is_decoded():
    hooked, vae = with_decoding(lambda sample: 2 * sample, sample_shape=(4, 8, 32))
    real = real_images.RealImages(hooked, "", {"num_inference_steps": 3})
    assert (real.width, real.height) == (64, 16)
    with torch.no_grad():
        z = vae.encode(real_images.to_pixels(photo(64, 16))[None]).latent_dist.mode()
    assert torch.allclose(real.latents([photo(64, 16)]), z / 2, atol=1e-5)


class OwnDecoding(Loop):
    """A pipeline with a way of its own from its sample to the VAE's latents, `before_decoding`."""

    def __call__(self, prompt=None, output_type="pt", **options):
        sample = super().__call__(prompt, output_type="latent", **options).images
        return (
            sample
            if output_type == "latent"
            else self.vae.decode(self.before_decoding(sample)).sample
        )


def with_decoding(before_decoding, sample_shape=(4, 16, 16)):
    pipe = build(sd15)
    hooked = HookedDiffusionModel(
        pipe.unet, pipe.scheduler, pipe.encode_prompt, vae=pipe.vae, sample_shape=sample_shape
    )
    hooked.pipe.__class__ = OwnDecoding
    hooked.pipe.before_decoding = before_decoding
    return hooked, pipe.vae


def test_a_way_of_ones_own_from_sample_to_latents_is_learned():
    offset = torch.randn(1, 4, 1, 1)
    hooked, vae = with_decoding(lambda sample: 3 * sample.flip(1) + offset)
    real = real_images.RealImages(hooked, "", {"num_inference_steps": 3})
    with torch.no_grad():
        z = vae.encode(real_images.to_pixels(photo(32, 32))[None]).latent_dist.mode()
    assert torch.allclose(real.latents([photo(32, 32)]), ((z - offset) / 3).flip(1), atol=1e-5)


def test_latents_that_do_not_follow_number_by_number_are_refused():
    mix = torch.randn(4, 4)
    hooked, _ = with_decoding(lambda sample: torch.einsum("cd,bdhw->bchw", mix, sample))
    with pytest.raises(
        ValueError,
        match="--images: what OwnDecoding gives its VAE is no rearrangement of its sample",
    ):
        real_images.RealImages(hooked, "", {"num_inference_steps": 3})
    hooked, _ = with_decoding(lambda sample: sample[..., 1:])
    with pytest.raises(ValueError, match="no rearrangement"):
        real_images.RealImages(hooked, "", {"num_inference_steps": 3})
    hooked, _ = with_decoding(lambda sample: sample.square())
    with pytest.raises(ValueError, match="no rearrangement"):
        real_images.RealImages(hooked, "", {"num_inference_steps": 3})


class Squares(torch.nn.Module):
    """A VAE that gives back what it got, within the range that it is made for."""

    def __init__(self, low):
        super().__init__()
        self.config, self.low, self.conv = None, low, torch.nn.Conv2d(3, 1, 1)

    def encode(self, x):
        return (torch.nn.functional.pixel_unshuffle(x.clamp(self.low, 1), 2),)

    def decode(self, z):
        return (torch.nn.functional.pixel_shuffle(z, 2).clamp(self.low, 1),)


def test_a_vae_made_for_another_range_is_refused_and_a_bad_one_is_remarked(
    model_folder, tmp_path, capsys
):
    real = real_images.RealImages.__new__(real_images.RealImages)
    real.vae = Squares(-1)
    assert real.check_reconstruction(photo(32, 32)) is None
    real.vae = Squares(0)
    with pytest.raises(ValueError, match=r"it is made for \[0, 1\]"):
        real.check_reconstruction(photo(32, 32))
    real.vae.decode = lambda z, time: z
    assert "was not checked: TypeError" in real.check_reconstruction(photo(32, 32))
    (tmp_path / "photos").mkdir()
    photo(32, 32).save(tmp_path / "photos" / "a.png")
    options = dict(
        images=str(tmp_path / "photos"),
        timesteps_per_image=1,
        out_dir=str(tmp_path / "acts"),
        device="cpu",
    )
    collect.main(collect.Config(model_name=str(model_folder), hook_names=[HOOK], **options))
    assert (
        "note: the VAE gives an image back with an error of" in capsys.readouterr().out
    )  # its weights are random


@pytest.mark.parametrize(
    "dtype, white",
    [(np.uint16, 65535), (np.int32, 255), (np.float32, 255), (np.float32, 1), (np.int32, 65535)],
)
def test_images_of_more_than_8_bits_keep_their_brightness(tmp_path, dtype, white):
    """Grey of two thirds stays that, whatever number is white."""
    levels = np.full((8, 8), white * 2 / 3).astype(dtype)
    levels[0, 0] = white
    Image.fromarray(levels).save(tmp_path / "grey.tiff")
    assert np.array(open_image(str(tmp_path / "grey.tiff")))[4, 4].tolist() == [170, 170, 170]


def test_a_tiff_of_12_bits_keeps_its_brightness():
    picture = Image.fromarray(np.full((8, 8), 4095 * 2 // 3, np.uint16))
    assert white_level(picture) == 65535
    picture.tag_v2 = {258: (12,)}
    assert white_level(picture) == 4095


def test_numbers_of_which_none_is_known_to_be_white_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 1e6, np.float32)).save(tmp_path / "grey.tiff")
    with pytest.raises(UsageError, match="it is not known which is white"):
        open_image(str(tmp_path / "grey.tiff"))


def test_samplings_that_end_in_another_order_do_not_disturb_each_other():
    """The first that was watched ends first; the second sees all of its steps, and the class is as
    before."""
    original = vars(diffusers.DDIMScheduler)["step"]
    pipes = [build(sd15) for _ in range(2)]
    for pipe in pipes:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    first, second = (HookedDiffusionModel.from_pipeline(pipe) for pipe in pipes)
    options = generate_options(2, num_inference_steps=4)
    _, alone = second.run_with_cache(
        "mid_block", PROMPTS[:2], **generate_options(2, num_inference_steps=4)
    )

    outer = first.watch(2)
    outer.__enter__()

    def leave(pipe, step, timestep, given):
        if step == 1:
            outer.__exit__(None, None, None)
        return given

    _, cache = second.run_with_cache(
        "mid_block", PROMPTS[:2], **options | {"callback_on_step_end": leave}
    )
    assert torch.equal(cache["output"]["mid_block"], alone["output"]["mid_block"])
    assert (
        cache["output"]["mid_block"].shape[1] == 4
        and vars(diffusers.DDIMScheduler)["step"] is original
    )
