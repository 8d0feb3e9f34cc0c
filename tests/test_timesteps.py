"""Step, timestep and sigma: what is recorded, and told to edits, is what the denoiser was given."""

import json

import diffusers
import numpy as np
import pytest
import torch
from families import cogvideox, flux, kandinsky22, pictures, sd15_parts
from tiny import PROMPTS, build, called_with, generate_options, sd15, sdxl
from tiny_runs import prompt_and_options

from analysis.feature_edits import Edits, Target, Typical, adding_edits
from diffusion.generate import Generation, generate
from evaluate import graft
from hook import Edit, HookedDiffusionModel, HookPoint

pytestmark = pytest.mark.slow

HOOK = "mid_block.attentions.0"


@pytest.fixture(scope="module")
def two_loops():
    return HookedDiffusionModel.from_pipeline(build(kandinsky22))


TWO_LOOPS = dict(prior_num_inference_steps=3, num_inference_steps=5)


def test_the_index_restarts_with_the_second_loop(two_loops):
    """`Edit(steps=[3])` edits step 3 of the loop that its module runs in."""
    prompt, options = prompt_and_options(2, kandinsky22, **TWO_LOOPS)
    times = []
    edited = []
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
    model = Denoiser()
    schedulers = [Euler(), Euler()]
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
    hooked = two_loops_of_ones_own([4, 3])
    edited = []
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
    hooked = HookedDiffusionModel.from_pipeline(build(recipe))
    true = []
    told = []
    prompt, options = prompt_and_options(2, recipe, num_inference_steps=6)
    with hooked.watch(2, on_step=lambda step: true.append(step.time())) as sampling:

        def change(x, timestep):
            return told.append(timestep)

        hooked.run_with_hooks(
            {name: adding_edits(HookPoint(name), change, sampling, steps=steps)}, prompt, **options
        )
    n = 5 if recipe is img2img_heun else 3
    assert len(true) == n
    assert true[0] < 700  # half of the schedule
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
    # so that a wrong step shows
    x = cache["output"][HOOK] * torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    np.save(tmp_path / f"{HOOK}.npy", x.numpy())
    meta = {"timesteps": cache["timesteps"][HOOK].tolist(), "hook_name": HOOK}
    (tmp_path / f"{HOOK}.json").write_text(json.dumps(meta))
    typical = Typical([tmp_path / f"{HOOK}.npy"])
    scale = dict(zip(meta["timesteps"], (1.0, 10.0, 100.0)))
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
        assert 0.4 < norm < 2
        assert 0.4 < distance < 2  # 10 or 0.1 at a wrong step


def test_a_timestep_that_cannot_be_told_is_not_compared():
    """A denoiser of one's own that is told another time than the scheduler, which lists none."""
    model = Denoiser()
    scheduler = Euler()
    hooked = HookedDiffusionModel(model, scheduler)

    def pipe(prompt=None):
        x = torch.ones(2, 3)
        for t in (9, 5, 1):
            x = scheduler.step(model(x, 1 - t / 10), t, x)

    hooked.pipe = pipe
    told = []
    with hooked.watch(2) as sampling:
        hooked.run_with_hooks(
            {"mix": Edit(lambda x: told.append(sampling.timestep()), rows="all")}, ["a", "b"]
        )
    assert told[0] == 9
    assert np.isnan(told[-1])


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
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    inputs = []
    samples = []
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
    pipe = build(cogvideox_dpm)
    seen = []
    name = "transformer_blocks.1"
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    pipe.transformer.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(output[0].clone())
    )
    prompt, options = prompt_and_options(2, cogvideox_dpm, num_inference_steps=3)
    _, cache = hooked.run_with_cache(name, prompt, rows="both", **options)
    kept = torch.cat([cache["output_uncond"][name], cache["output"][name]])
    assert torch.equal(kept, torch.stack(seen, 1))
    assert cache["timesteps"][name].tolist() == [float(t) for t in pipe.scheduler.timesteps]


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
    assert cache["output"]["mid_block"].shape[1] == 4
    assert vars(diffusers.DDIMScheduler)["step"] is original
