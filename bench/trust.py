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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from bench.step import conditions
from cli import HERE
from errors import UsageError, check_choice
from hook import Edit, HookedDiffusionModel

HOOK = "up_blocks.0.attentions.0"
PROMPTS = ["a red fox in snow", "blue ocean waves at night"]
STEPS = 4
EDITED = 2  # the step that is edited: of a second-order scheduler the second half of its second
FAMILY_SCALES = {False: 1, True: 4}  # the guidance scale of the transformers, without and with it


class NoiseOfItsOwn(diffusers.EulerDiscreteScheduler):
    """Draws noise from PyTorch's global state, whatever generator it is given, as solvers of SDEs
    in other packages do."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        """Return what Euler's scheduler returns, with noise added to the sample."""
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


class Family(NamedTuple):
    """A transformer of tests/families.py, and what its pipeline's source says of it."""

    hook_name: str

    image_output: int | None
    """The index of the image's tokens in the tuple that the module returns. None: it returns a
    tensor."""

    passes: str
    """How the two passes of the guidance run: "one batch", in which the unconditional rows come
    first, or "cond first", one call after the other."""


FAMILIES = {
    "sd3": Family("transformer_blocks.0", 1, "one batch"),
    "flux": Family("transformer_blocks.0", 1, "cond first"),
    "pixart": Family("transformer_blocks.0", None, "one batch"),
    "sana": Family("transformer_blocks.0", None, "one batch"),
}

GUIDANCE = ["0", "1", "7.5", "ramp", "negative"]
"""The columns: guidance scales, and the kinds that the docstring of this page describes."""

NO_UNCOND = ("0", "1")
"""The scales at which the pipeline runs no unconditional rows."""


@dataclass
class Config:
    # data
    schedulers: list[str] = field(default_factory=lambda: list(SCHEDULERS))
    """Compare with these schedulers, the rows of the first table."""

    guidance: list[str] = field(default_factory=lambda: list(GUIDANCE))
    """Compare with these kinds of guidance, the columns of the first table."""

    families: list[str] = field(default_factory=lambda: list(FAMILIES))
    """Compare with these tiny transformers, the rows of the second table."""


# ---- the tables


def main(cfg: Config) -> None:
    """Print both tables; exit with status 1 if a cell is not equal.

    Raises UsageError for a scheduler, a guidance or a family that is not known.
    """
    for name in cfg.schedulers:
        check_choice("--schedulers", name, tuple(SCHEDULERS))
    for name in cfg.guidance:
        check_choice("--guidance", name, tuple(GUIDANCE))
    for name in cfg.families:
        check_choice("--families", name, tuple(FAMILIES))

    start = time.perf_counter()
    where, versions, commit = conditions(torch.device("cpu"))
    print(f"{where}; {versions}; diffusers {diffusers.__version__}; commit {commit}\n")
    notes = print_schedulers(cfg.schedulers, cfg.guidance)
    print()
    notes += print_families(cfg.families)

    print()
    for note in notes:
        print(note)
    num_cells = 2 * len(cfg.schedulers) * len(cfg.guidance) + 4 * len(cfg.families)
    print(f"{num_cells - len(notes)} of {num_cells} cells are equal")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if notes:
        raise SystemExit(1)


def print_schedulers(schedulers: list[str], guidances: list[str]) -> list[str]:
    """Print the table of the schedulers; return a line for each cell that is not equal."""
    columns = [(number, guidance) for number in (1, 2) for guidance in guidances]
    titles = [f"{number} x {guidance}" for number, guidance in columns]
    print_line("scheduler", titles)
    notes = []
    for scheduler in schedulers:
        words = []
        for title, (number, guidance) in zip(titles, columns):
            word, note = judge(differences, scheduler, guidance, PROMPTS[:number])
            words.append(word)
            if note:
                notes.append(f"{scheduler}, {title}: {word}: {note}")
        print_line(scheduler, words)
    return notes


def print_families(families: list[str]) -> list[str]:
    """Print the table of the transformers; return a line for each cell that is not equal."""
    columns = [(number, guided) for number in (1, 2) for guided in (False, True)]
    titles = [f"{number} x {FAMILY_SCALES[guided]}" for number, guided in columns]
    print_line("transformer", titles)
    notes = []
    for family in families:
        words = []
        for title, (number, guided) in zip(titles, columns):
            word, note = judge(family_differences, family, guided, number)
            words.append(word)
            if note:
                notes.append(f"{family}, {title}: {word}: {note}")
        print_line(family, words)
    return notes


def print_line(name: str, cells: list[str]) -> None:
    """Print a line of a table."""
    print(f"{name:18}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


class Verdict(NamedTuple):
    """What is said of a cell."""

    word: str
    """equal, DIFFERS or refused."""

    note: str
    """What differs, or why it is refused; "" if it is equal."""


def judge(compare: Callable[..., list[str]], *cell: Any) -> Verdict:
    """Return what is said of the differences that `compare(*cell)` returns, or of its refusal."""
    try:
        different = compare(*cell)
    except UsageError as error:
        return Verdict("refused", str(error))
    if different:
        return Verdict("DIFFERS", ", ".join(different))
    return Verdict("equal", "")


# ---- the pipeline of the first table


class BothPasses(StableDiffusionPipeline):
    """Runs both passes whatever the guidance scale is, which a callback may then change from step
    to step."""

    do_classifier_free_guidance = True


def import_from_tests() -> None:
    """Let the modules of tests/ be imported: `tiny` and `families`."""
    folder = str(HERE / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)


@cache
def components_without_scheduler() -> dict[str, Any]:
    """Return the components of the tiny pipeline: random weights from seed 0, no layer all zeros.

    All cells share them.
    """
    import_from_tests()
    from tiny import build, sd15

    components = dict(build(sd15).components)
    del components["scheduler"]
    return components


def make_pipeline(scheduler: str, guidance: str) -> StableDiffusionPipeline:
    """Return a new pipeline for one cell of the table; the weights are the same in all cells."""
    scheduler_class, options = SCHEDULERS[scheduler]
    pipeline_class = BothPasses if guidance == "ramp" else StableDiffusionPipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline_class(
            **components_without_scheduler(),
            scheduler=scheduler_class(**options),
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def raise_guidance(
    pipe: StableDiffusionPipeline, step: int, timestep: Tensor, tensors: dict
) -> dict:
    """Set the guidance scale of the step after `step`: 2, 4 and 6 after the steps 0, 1 and 2.

    It is a callback of the pipeline, which wants `tensors` back.
    """
    pipe._guidance_scale = 2.0 * (step + 1)
    return tensors


def call_options(guidance: str, number: int) -> dict[str, Any]:
    """Return the pipeline's arguments for `number` prompts, and set the global random state anew.

    Make new ones for each call, since a call uses its generators up.
    """
    options = dict(num_inference_steps=STEPS, height=32, width=32, output_type="latent")
    options["generator"] = [torch.Generator().manual_seed(seed) for seed in range(number)]
    options["guidance_scale"] = {"0": 0.0, "1": 1.0, "ramp": 0.0}.get(guidance, 7.5)
    if guidance == "ramp":
        options["callback_on_step_end"] = raise_guidance
    if guidance == "negative":
        options["negative_prompt"] = ["blurry"] * number
    torch.manual_seed(0)
    return options


# ---- the reference


@dataclass
class Reference:
    """What hooks written by hand saw of one sampling."""

    cond: Tensor
    """(prompts, steps, tokens, d): the conditional rows."""

    uncond: Tensor | None
    """The unconditional rows; None where guidance is off."""

    images: Tensor
    """(prompts, 4, h, w): the sample at the end."""

    timesteps: Tensor
    """(steps,) float64: what the denoiser was given."""

    sigmas: Tensor | None
    """(steps,) float64: noise over signal at these timesteps; None without a schedule of alphas."""


def by_hand(scheduler: str, guidance: str, prompts: list[str]) -> Reference:
    """Return what the plain pipeline and a plain hook give."""
    pipe = make_pipeline(scheduler, guidance)
    outputs = []
    times = []

    def note_time(module: nn.Module, args: tuple, kwargs: dict) -> None:
        times.append(float(args[1]))

    def note_output(module: nn.Module, args: tuple, output: tuple) -> None:
        tokens = output[0].flatten(2).transpose(1, 2)  # (rows, channels, h, w) to (rows, tokens, d)
        outputs.append(tokens.clone())

    handles = [
        pipe.unet.register_forward_pre_hook(note_time, with_kwargs=True),
        pipe.unet.get_submodule(HOOK).register_forward_hook(note_output),
    ]
    images = pipe(prompts, **call_options(guidance, len(prompts))).images
    for handle in handles:
        handle.remove()  # all cells share the modules

    cond = torch.stack(outputs, dim=1)  # (rows, steps, tokens, d)
    uncond = None
    if guidance not in NO_UNCOND:
        uncond = cond[: len(prompts)]
        cond = cond[len(prompts) :]
    timesteps = torch.tensor(times, dtype=torch.float64)
    return Reference(cond, uncond, images, timesteps, sigmas_at(timesteps, pipe.scheduler))


def sigmas_at(timesteps: Tensor, scheduler: Any) -> Tensor | None:
    """Return sqrt((1 - alpha) / alpha) of the noise schedule that the model is trained with.

    Between two whole timesteps it is linear. timesteps: (steps,) float64. Returns (steps,) float64,
    or None for a scheduler without alphas.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    alphas = scheduler.alphas_cumprod.double().numpy()
    sigmas = np.sqrt((1 - alphas) / alphas)
    return torch.from_numpy(np.interp(timesteps.numpy(), np.arange(len(alphas)), sigmas))


def edited_by_hand(scheduler: str, guidance: str, prompts: list[str]) -> Tensor:
    """Return the images where the conditional rows are halved in one step."""
    pipe = make_pipeline(scheduler, guidance)
    first_cond_row = 0 if guidance in NO_UNCOND else len(prompts)
    calls = []

    def halve(module: nn.Module, args: tuple, output: tuple) -> tuple:
        step = len(calls)
        calls.append(step)
        if step != EDITED:
            return output
        x = output[0].clone()
        x[first_cond_row:] *= 0.5
        return (x,)

    handle = pipe.unet.get_submodule(HOOK).register_forward_hook(halve)
    images = pipe(prompts, **call_options(guidance, len(prompts))).images
    handle.remove()  # all cells share the module
    return images


# ---- the project against the reference


def differences(scheduler: str, guidance: str, prompts: list[str]) -> list[str]:
    """Return what the project does otherwise than the reference in one cell; [] if nothing.

    Raises UsageError where the project refuses.
    """
    expected = by_hand(scheduler, guidance, prompts)
    different = recording_differences(scheduler, guidance, prompts, expected)

    nothing = {HOOK: Edit(lambda x: x), "mid_block": Edit(lambda x: 1 * x)}
    if not torch.equal(edited(scheduler, guidance, prompts, nothing), expected.images):
        different.append("images under edits that change nothing")

    halving = {HOOK: Edit(lambda x: 0.5 * x, steps=[EDITED])}
    halved = edited(scheduler, guidance, prompts, halving)
    halved_by_hand = edited_by_hand(scheduler, guidance, prompts)
    if not torch.equal(halved, halved_by_hand):
        different.append(f"images under an edit of step {EDITED}")
    if torch.equal(halved_by_hand, expected.images):
        different.append(f"an edit of step {EDITED} that changes nothing")
    return different


def recording_differences(
    scheduler: str, guidance: str, prompts: list[str], expected: Reference
) -> list[str]:
    """Return what is otherwise than in the reference while rows are stored; [] if nothing."""
    model = HookedDiffusionModel.from_pipeline(make_pipeline(scheduler, guidance))
    rows = "cond" if expected.uncond is None else "both"
    options = call_options(guidance, len(prompts))
    output, stored = model.run_with_cache(HOOK, prompts, rows=rows, **options)

    pairs = {
        "images while rows are stored": (output.images, expected.images),
        "conditional rows": (stored["output"][HOOK], expected.cond),
    }
    if expected.uncond is not None:
        pairs["unconditional rows"] = (stored["output_uncond"][HOOK], expected.uncond)
    pairs["timesteps"] = (stored["timesteps"][HOOK], expected.timesteps)
    different = unequal(pairs)

    sigmas = stored["sigmas"].get(HOOK)
    if expected.sigmas is None:
        if sigmas is not None:
            different.append("sigmas, which there should be none of")
    elif sigmas is None or not torch.allclose(sigmas, expected.sigmas, rtol=1e-3, atol=0):
        different.append("sigmas")
    return different


def unequal(pairs: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Return the names of the pairs whose two tensors are not equal."""
    names = []
    for name, (one, other) in pairs.items():
        if not torch.equal(one, other):
            names.append(name)
    return names


def edited(scheduler: str, guidance: str, prompts: list[str], edits: dict[str, Edit]) -> Tensor:
    """Return the images that the project makes with edits."""
    model = HookedDiffusionModel.from_pipeline(make_pipeline(scheduler, guidance))
    return model.run_with_hooks(edits, prompts, **call_options(guidance, len(prompts))).images


# ---- the transformers of the second table


def family_differences(family: str, guided: bool, number: int) -> list[str]:
    """Return what the project does otherwise than the reference, in rows and images of a
    transformer; [] if nothing.

    guided: with guidance. number: of prompts. Raises UsageError where the project refuses.
    """
    import_from_tests()
    import families
    from tiny import build

    recipe = getattr(families, family)
    name = FAMILIES[family].hook_name
    options = family_options(recipe, guided, number)
    expected = family_by_hand(build(recipe), family, options, guided)

    options = family_options(recipe, guided, number)
    prompts = options.pop("prompt")
    rows = "both" if guided else "cond"
    model = HookedDiffusionModel.from_pipeline(build(recipe))
    output, stored = model.run_with_cache(name, prompts, rows=rows, **options)
    pairs = {
        "images while rows are stored": (output.images, expected.images),
        "conditional rows": (stored["output"][name], expected.cond),
    }
    if guided:
        pairs["unconditional rows"] = (stored["output_uncond"][name], expected.uncond)
    different = unequal(pairs)

    options = family_options(recipe, guided, number)
    prompts = options.pop("prompt")
    model = HookedDiffusionModel.from_pipeline(build(recipe))
    output = model.run_with_hooks({name: Edit(lambda x: x)}, prompts, **options)
    if not torch.equal(output.images, expected.images):
        different.append("images under edits that change nothing")
    return different


class FamilyReference(NamedTuple):
    """What a hook written by hand saw of a transformer."""

    cond: Tensor
    """(prompts, steps, tokens, d): the conditional rows."""

    uncond: Tensor | None
    """The unconditional rows; None without guidance."""

    images: Tensor


def family_by_hand(pipe: Any, family: str, options: dict, guided: bool) -> FamilyReference:
    """Return what the plain pipeline of a transformer and a plain hook give.

    options: the pipeline's arguments, with a list of prompts. guided: whether they have guidance.
    """
    hook_name, image_output, passes = FAMILIES[family]
    outputs = []

    def note_output(module: nn.Module, args: tuple, output: Any) -> None:
        x = output if image_output is None else output[image_output]
        outputs.append(x.clone())

    handle = pipe.transformer.get_submodule(hook_name).register_forward_hook(note_output)
    images = pipe(**options).images
    handle.remove()

    number = len(images)  # of prompts
    x = torch.stack(outputs, dim=1)  # (rows, calls, tokens, d)
    if not guided:
        return FamilyReference(x, None, images)
    if passes == "one batch":
        return FamilyReference(x[number:], x[:number], images)
    return FamilyReference(x[:, ::2], x[:, 1::2], images)


def family_options(recipe: Callable, guided: bool, number: int) -> dict[str, Any]:
    """Return the arguments of a pipeline of tests/families.py, with guidance or without."""
    from tiny import generate_options

    options = generate_options(number, recipe, num_inference_steps=STEPS)
    name = "true_cfg_scale" if "true_cfg_scale" in options else "guidance_scale"
    options[name] = float(FAMILY_SCALES[guided])
    return options
