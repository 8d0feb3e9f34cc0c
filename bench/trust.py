"""Are recorded rows, times and edits those that hooks written by hand see? Bit for bit.

    python -m bench trust                            # all, two to three minutes on a CPU
    python -m bench trust --schedulers DDIM Heun     # some of them

A tiny Stable Diffusion pipeline with random weights samples 4 steps. The reference is a forward
hook on one module and its own bookkeeping: a step is one call of the denoiser, and where guidance
is on, the first half of its rows is unconditional. It uses nothing of the project. A cell is
"equal" if these have the same bits as in the reference: stored rows and timesteps, the images made
while they are stored, the images under edits that change nothing, and those under an edit of one
step; and if the stored sigmas are within 0.1% of the noise schedule's. Else it is "DIFFERS" or
"refused", and a line below the table says what. The exit status is 1 if anything differs or is
refused.

A second table does the same for the rows and images of tiny transformers with one and two prompts,
without guidance (1) and with it (4). guidance: "ramp" begins at 0 and rises to 6 while both passes
run, as CFG-Zero* does; "negative" has a negative prompt.
"""

import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import cache

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from bench.step import HERE, conditions
from errors import UsageError, check_choice
from hook import Edit, HookedDiffusionModel

HOOK = "up_blocks.0.attentions.0"
PROMPTS = ["a red fox in snow", "blue ocean waves at night"]
STEPS = 4
EDITED = 2  # the step that is edited: of a second-order scheduler the second half of its second


class NoiseOfItsOwn(diffusers.EulerDiscreteScheduler):
    """Draws noise from PyTorch's global state, whatever generator it is given, as solvers of SDEs
    in other packages do."""

    def step(self, model_output, timestep, sample, **kwargs):
        result = super().step(model_output, timestep, sample, **kwargs)
        noise = torch.randn(sample.shape)
        if not kwargs.get("return_dict", True):
            return (result[0] + 0.1 * noise, *result[1:])
        result.prev_sample = result.prev_sample + 0.1 * noise
        return result


SCHEDULERS = {
    "DDIM": (diffusers.DDIMScheduler, dict(clip_sample=False, steps_offset=1)),
    "DDIMParallel": (diffusers.DDIMParallelScheduler, dict(clip_sample=False, steps_offset=1)),
    "DDPM": (diffusers.DDPMScheduler, dict(clip_sample=False)),
    "DDPMParallel": (diffusers.DDPMParallelScheduler, dict(clip_sample=False)),
    "DEIS": (diffusers.DEISMultistepScheduler, {}),
    "DPM++ 2M": (diffusers.DPMSolverMultistepScheduler, {}),
    "DPM++ 2M SDE": (diffusers.DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++")),
    "DPM++ 2S": (diffusers.DPMSolverSinglestepScheduler, dict(lower_order_final=True)),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "IPNDM": (diffusers.IPNDMScheduler, {}),
    "KDPM2": (diffusers.KDPM2DiscreteScheduler, {}),
    "KDPM2 ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "LCM": (diffusers.LCMScheduler, {}),
    "PNDM": (diffusers.PNDMScheduler, dict(skip_prk_steps=True, steps_offset=1)),
    "SA-Solver": (diffusers.SASolverScheduler, {}),
    "TCD": (diffusers.TCDScheduler, {}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "noise of its own": (NoiseOfItsOwn, {}),
}
FAMILIES = {
    "sd3": (
        "transformer_blocks.0",
        1,
        "one batch",
    ),  # module, its image tokens in a tuple, how the passes run
    "flux": ("transformer_blocks.0", 1, "cond first"),
    "pixart": ("transformer_blocks.0", None, "one batch"),
    "sana": ("transformer_blocks.0", None, "one batch"),
}
"""Transformers of tests/families.py, with what their pipelines' source says of them."""

GUIDANCE = ["0", "1", "7.5", "ramp", "negative"]


@dataclass
class Config:
    # data
    schedulers: list[str] = field(default_factory=lambda: list(SCHEDULERS))
    """Compare with these schedulers, the rows of the first table."""

    guidance: list[str] = field(default_factory=lambda: list(GUIDANCE))
    """Compare with these kinds of guidance, the columns of the first table."""

    families: list[str] = field(default_factory=lambda: list(FAMILIES))
    """Compare with these tiny transformers, the rows of the second table."""


class BothPasses(StableDiffusionPipeline):
    """Runs both passes whatever the guidance scale is, which a callback may then change from step
    to step."""

    do_classifier_free_guidance = True


@cache
def parts() -> dict:
    """Return the components of the tiny pipeline, without a scheduler: random weights from seed 0,
    no layer all zeros."""
    sys.path.insert(0, str(HERE / "tests"))
    from tiny import build, sd15

    return {name: part for name, part in build(sd15).components.items() if name != "scheduler"}


def make_pipeline(scheduler: str, guidance: str) -> StableDiffusionPipeline:
    """Return a new pipeline for one cell of the table; the weights are the same in all cells."""
    scheduler_class, options = SCHEDULERS[scheduler]
    kind = BothPasses if guidance == "ramp" else StableDiffusionPipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kind(**parts(), scheduler=scheduler_class(**options), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def raise_guidance(pipe, step: int, timestep, tensors: dict) -> dict:
    """Set the guidance scale of the step after `step`: a callback of the pipeline. Return
    `tensors`, which the pipeline wants back."""
    pipe._guidance_scale = 2.0 * (step + 1)
    return tensors


def call_options(guidance: str, number: int) -> dict:
    """Return the pipeline's arguments for `number` prompts; the random states are set anew with
    each call."""
    options = dict(num_inference_steps=STEPS, height=32, width=32, output_type="latent")
    options["generator"] = [torch.Generator().manual_seed(seed) for seed in range(number)]
    options["guidance_scale"] = {"0": 0.0, "1": 1.0, "ramp": 0.0}.get(guidance, 7.5)
    if guidance == "ramp":
        options["callback_on_step_end"] = raise_guidance
    if guidance == "negative":
        options["negative_prompt"] = ["blurry"] * number
    torch.manual_seed(0)
    return options


@dataclass
class Reference:
    """What hooks written by hand saw of one sampling."""

    cond: torch.Tensor  # (prompts, steps, tokens, d)
    uncond: torch.Tensor | None  # the same; None where guidance is off
    images: torch.Tensor  # (prompts, 4, h, w): the latents at the end
    timesteps: torch.Tensor  # (steps,) float64: what the denoiser was given
    sigmas: (
        torch.Tensor | None
    )  # (steps,) float64: noise over signal at these timesteps; None without a schedule of alphas


def by_hand(scheduler: str, guidance: str, prompts: list[str]) -> Reference:
    """Return what the plain pipeline and a plain hook give: the `Reference`."""
    pipe = make_pipeline(scheduler, guidance)
    outputs, times = [], []

    def note(module, args, kwargs):
        times.append(float(args[1]))

    def keep(module, args, output):
        outputs.append(
            output[0].flatten(2).transpose(1, 2).clone()
        )  # (rows, channels, h, w) -> (rows, tokens, channels)

    handles = [pipe.unet.register_forward_pre_hook(note, with_kwargs=True)]
    handles.append(pipe.unet.get_submodule(HOOK).register_forward_hook(keep))
    images = pipe(prompts, **call_options(guidance, len(prompts))).images
    for handle in handles:
        handle.remove()
    timesteps = torch.tensor(times, dtype=torch.float64)
    steps, P = torch.stack(outputs, dim=1), len(prompts)  # (rows, steps, tokens, d)
    if guidance in ("0", "1"):
        return Reference(steps, None, images, timesteps, sigmas_at(timesteps, pipe.scheduler))
    return Reference(steps[P:], steps[:P], images, timesteps, sigmas_at(timesteps, pipe.scheduler))


def sigmas_at(timesteps: torch.Tensor, scheduler) -> torch.Tensor | None:
    """Return sqrt((1 - alpha) / alpha) of the noise schedule that the model is trained with, linear
    between two whole timesteps."""
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    alphas = scheduler.alphas_cumprod.double().numpy()
    return torch.from_numpy(
        np.interp(timesteps.numpy(), np.arange(len(alphas)), np.sqrt((1 - alphas) / alphas))
    )


def edited_by_hand(scheduler: str, guidance: str, prompts: list[str]) -> torch.Tensor:
    """Return the images where the conditional rows are halved in one step."""
    pipe, calls = make_pipeline(scheduler, guidance), []
    first = 0 if guidance in ("0", "1") else len(prompts)  # conditional row

    def halve(module, args, output):
        calls.append(1)
        if len(calls) - 1 != EDITED:
            return output
        x = output[0].clone()
        x[first:] *= 0.5
        return (x,)

    handle = pipe.unet.get_submodule(HOOK).register_forward_hook(halve)
    images = pipe(prompts, **call_options(guidance, len(prompts))).images
    handle.remove()  # the module is that of all cells
    return images


def edited(
    scheduler: str, guidance: str, prompts: list[str], edits: dict[str, Edit]
) -> torch.Tensor:
    """Return the images that the project makes with edits."""
    model = HookedDiffusionModel.from_pipeline(make_pipeline(scheduler, guidance))
    return model.run_with_hooks(edits, prompts, **call_options(guidance, len(prompts))).images


def differences(scheduler: str, guidance: str, prompts: list[str]) -> list[str]:
    """Return what the project does otherwise than the reference in one cell; [] if nothing. Raises
    UsageError where it refuses."""
    expected = by_hand(scheduler, guidance, prompts)
    found = []

    model = HookedDiffusionModel.from_pipeline(make_pipeline(scheduler, guidance))
    rows = "cond" if expected.uncond is None else "both"
    output, stored = model.run_with_cache(
        HOOK, prompts, rows=rows, **call_options(guidance, len(prompts))
    )
    if not torch.equal(output.images, expected.images):
        found.append("images while rows are stored")
    if not torch.equal(stored["output"][HOOK], expected.cond):
        found.append("conditional rows")
    if expected.uncond is not None and not torch.equal(
        stored["output_uncond"][HOOK], expected.uncond
    ):
        found.append("unconditional rows")
    if not torch.equal(stored["timesteps"][HOOK], expected.timesteps):
        found.append("timesteps")
    if expected.sigmas is None:
        if HOOK in stored["sigmas"]:
            found.append("sigmas, which there should be none of")
    elif HOOK not in stored["sigmas"] or not torch.allclose(
        stored["sigmas"][HOOK], expected.sigmas, rtol=1e-3, atol=0
    ):
        found.append("sigmas")

    nothing = {HOOK: Edit(lambda x: x), "mid_block": Edit(lambda x: 1 * x)}
    if not torch.equal(edited(scheduler, guidance, prompts, nothing), expected.images):
        found.append("images under edits that change nothing")

    halved = edited(scheduler, guidance, prompts, {HOOK: Edit(lambda x: 0.5 * x, steps=[EDITED])})
    halved_by_hand = edited_by_hand(scheduler, guidance, prompts)
    if not torch.equal(halved, halved_by_hand):
        found.append(f"images under an edit of step {EDITED}")
    if torch.equal(halved_by_hand, expected.images):
        found.append(f"an edit of step {EDITED} that changes nothing")
    return found


def family_options(recipe, guided: bool, number: int) -> dict:
    """Return the arguments of a pipeline of tests/families.py, with guidance or without."""
    from tiny import generate_options

    options = generate_options(number, recipe, num_inference_steps=STEPS)
    name = "true_cfg_scale" if "true_cfg_scale" in options else "guidance_scale"
    return options | {name: 4.0 if guided else 1.0}


def family_differences(family: str, guided: bool, number: int) -> list[str]:
    """Return what the project does otherwise than the reference, in rows and images of a
    transformer; [] if nothing."""
    parts()  # so that tests/ can be imported
    import families
    from tiny import build

    recipe = getattr(families, family)
    name, place, passes = FAMILIES[family]
    pipe, outputs = build(recipe), []

    def keep(module, args, output):
        outputs.append((output if place is None else output[place]).clone())

    handle = pipe.transformer.get_submodule(name).register_forward_hook(keep)
    images = pipe(**family_options(recipe, guided, number)).images
    handle.remove()
    cond, uncond = torch.stack(outputs, dim=1), None
    if guided and passes == "one batch":
        cond, uncond = cond[number:], cond[:number]
    elif guided:
        cond, uncond = cond[:, ::2], cond[:, 1::2]

    rows, found = "both" if guided else "cond", []
    options = family_options(recipe, guided, number)
    output, stored = HookedDiffusionModel.from_pipeline(build(recipe)).run_with_cache(
        name, options.pop("prompt"), rows=rows, **options
    )
    if not torch.equal(output.images, images):
        found.append("images while rows are stored")
    if not torch.equal(stored["output"][name], cond):
        found.append("conditional rows")
    if guided and not torch.equal(stored["output_uncond"][name], uncond):
        found.append("unconditional rows")

    options = family_options(recipe, guided, number)
    model = HookedDiffusionModel.from_pipeline(build(recipe))
    same = model.run_with_hooks({name: Edit(lambda x: x)}, options.pop("prompt"), **options)
    if not torch.equal(same.images, images):
        found.append("images under edits that change nothing")
    return found


def judge(compare, *cell) -> tuple[str, str]:
    """Return (word in the table, line below the table) for what `compare(*cell)` returns or
    raises."""
    try:
        found = compare(*cell)
    except UsageError as error:
        return "refused", str(error)
    return ("DIFFERS", ", ".join(found)) if found else ("equal", "")


def main(cfg):
    for name in cfg.schedulers:
        check_choice("--schedulers", name, tuple(SCHEDULERS))
    for name in cfg.guidance:
        check_choice("--guidance", name, tuple(GUIDANCE))
    for name in cfg.families:
        check_choice("--families", name, tuple(FAMILIES))
    start = time.perf_counter()
    where, versions, commit = conditions(torch.device("cpu"))
    print(f"{where}; {versions}; diffusers {diffusers.__version__}; commit {commit}\n")
    columns = [(number, guidance) for number in (1, 2) for guidance in cfg.guidance]
    print(
        f"{'scheduler':18}"
        + "".join(f"{f'{number} x {guidance}':>13}" for number, guidance in columns)
    )
    notes = []
    for scheduler in cfg.schedulers:
        words = []
        for number, guidance in columns:
            word, note = judge(differences, scheduler, guidance, PROMPTS[:number])
            words.append(word)
            if note:
                notes.append(f"{scheduler}, {number} x {guidance}: {word}: {note}")
        print(f"{scheduler:18}" + "".join(f"{word:>13}" for word in words), flush=True)
    family_columns = [(number, guided) for number in (1, 2) for guided in (False, True)]
    print(
        f"\n{'transformer':18}"
        + "".join(f"{f'{number} x {4 if guided else 1}':>13}" for number, guided in family_columns)
    )
    for family in cfg.families:
        words = []
        for number, guided in family_columns:
            word, note = judge(family_differences, family, guided, number)
            words.append(word)
            if note:
                notes.append(f"{family}, {number} x {4 if guided else 1}: {word}: {note}")
        print(f"{family:18}" + "".join(f"{word:>13}" for word in words), flush=True)
    print("", *notes, sep="\n")
    cells = len(cfg.schedulers) * len(columns) + len(cfg.families) * len(family_columns)
    print(f"{cells - len(notes)} of {cells} cells are equal")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if notes:
        raise SystemExit(1)
