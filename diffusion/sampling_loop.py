"""A small sampling loop for a denoiser of one's own, called as a diffusers pipeline is.

    loop = Loop(model, scheduler, encode_prompt, vae=vae, sample_shape=(4, 64, 64))
    loop("a red star", num_inference_steps=20, guidance_scale=5.0).images      # (1, 3, H, W)

It samples as Stable Diffusion does. `hook.HookedDiffusionModel(model, scheduler, ...)` makes one.
The functions below it read what a user's own functions take and return.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion.real_images import unscale_by_config
from diffusion.signatures import (
    forward_signature,
    result_tensor,
    tensors,
    time_parameter,
    with_tensor,
)
from errors import UsageError

GUIDANCE_SCALE = 7.5  # as in Stable Diffusion, where there are unconditional rows

Condition = Tensor | tuple | dict | None
"""What the denoiser's forward gets behind sample and time: one argument, several, or keyword
arguments. None is nothing."""


class Sampled(NamedTuple):
    """What a `Loop` returns."""

    images: Tensor
    """(N, ...): images in [0, 1], or the final sample."""


class Loop:
    """Samples with a denoiser: nn.Module whose `forward(sample, timestep, ...)` predicts.

    The arguments are those of `hook.HookedDiffusionModel`.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        encode_prompt: Callable | None = None,
        get_timesteps: Callable | None = None,
        vae: Any = None,
        sample_shape: tuple[int, ...] | None = None,
    ):
        self.model = model
        self.scheduler = scheduler
        self.encode_prompt = encode_prompt
        self.get_timesteps = get_timesteps
        self.vae = vae
        if sample_shape is not None and not isinstance(sample_shape, (tuple, list)):
            raise UsageError(
                f"sample_shape: expected the shape of one sample, such as (3, 32, 32), got "
                f"{sample_shape!r}"
            )
        self.sample_shape = sample_shape
        self._progress_bar_config = {}

    @property
    def components(self) -> dict[str, Any]:
        """{name: network or scheduler}, as a diffusers pipeline has them.

        The networks that `encode_prompt` uses are text_encoder, text_encoder_2, ...; those of the
        VAE are vae, vae_2, ...
        """
        components = {"model": self.model, "scheduler": self.scheduler}
        decoder = (self.vae, getattr(self.vae, "decode", None))
        for name, part in (("vae", decoder), ("text_encoder", self.encode_prompt)):
            number = 1
            for network in networks_in(part):
                if not any(network is other for other in components.values()):
                    components[name if number == 1 else f"{name}_{number}"] = network
                    number += 1
        return components

    @property
    def takes_prompts(self) -> bool:
        """Whether prompts decide what is sampled; without `encode_prompt` they are only counted."""
        return self.encode_prompt is not None

    def set_progress_bar_config(self, **options) -> None:
        """Give the progress bar options of tqdm, such as `disable=True`."""
        self._progress_bar_config = options

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
    ) -> Sampled:
        """Sample, with classifier-free guidance if `encode_prompt` returns unconditional rows and
        `guidance_scale > 1`.

        With a scale of 1 or less, a negative one too, there is one pass, the conditional one, as in
        diffusers. So the weights of the passes always tell which rows are conditional: a scale
        below 0, by whose weights the passes are exchanged, never guides here.

        guidance_scale: if not given, 7.5 where there are unconditional rows. batch_size: the number
        of samples where there is no prompt. latents: the noise to begin with, (N, *sample_shape);
        if not given, it is drawn with `generator`.

        The images are decoded to [0, 1] by the VAE. Without a VAE they are the final sample, mapped
        from [-1, 1] to [0, 1]; `as_images` says what becomes of samples that are no images. With
        `output_type="latent"` they are the final sample as it is.

        Raises UsageError where the prompt or the sample's shape is missing, where the scheduler
        lists no timesteps, for what `encode_prompt` returns in another form than it should, and for
        a guidance scale or a negative prompt that nothing would use.
        """
        weight = next(self.model.parameters(), torch.empty(0))
        prompts = [prompt] if isinstance(prompt, str) else prompt
        num_prompts = batch_size if prompts is None else len(prompts)
        num_samples = num_prompts * num_images_per_prompt
        if latents is not None:
            num_samples = len(latents)

        is_wanted = guidance_scale is None or guidance_scale > 1
        cond, uncond = self._encode(
            prompts, weight.device, num_images_per_prompt, is_wanted, negative_prompt
        )
        condition, scale = guided(cond, uncond, guidance_scale, num_samples)

        timesteps = self._timesteps(num_inference_steps, weight.device)
        self._num_timesteps = len(timesteps)  # as diffusers announces it, for who counts the steps
        if latents is None:
            latents = self._noise(num_samples, generator, weight)

        step_options = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_options["generator"] = generator
        for t in tqdm(timesteps, **self._progress_bar_config):
            x = latents if scale is None else torch.cat([latents] * 2)
            if hasattr(self.scheduler, "scale_model_input"):
                x = self.scheduler.scale_model_input(x, t)
            prediction = required_tensor(self._predict(x, t, condition), "the model's forward")
            if scale is not None:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + scale * (conditional - unconditional)
            stepped = self.scheduler.step(prediction, t, latents, **step_options)
            latents = required_tensor(stepped, "the scheduler's step")

        if output_type == "latent":
            return Sampled(latents)
        if self.vae is not None:
            return Sampled(self._decode(latents))
        return Sampled(as_images(as_pixels(latents)))

    def _predict(self, x: Tensor, t: Any, condition: Condition) -> Any:
        """Call the denoiser, and return what it returns. Its forward may take the time first."""
        first_two = (x, t)
        if is_time_first(self.model):
            first_two = (t, x)
        if condition is None:
            return self.model(*first_two)
        if isinstance(condition, dict):
            return self.model(*first_two, **condition)
        if isinstance(condition, tuple):
            return self.model(*first_two, *condition)
        return self.model(*first_two, condition)

    def _encode(
        self,
        prompts: list[str] | None,
        device: torch.device,
        num_images: int,
        is_guided: bool,
        negative_prompt: str | list[str] | None,
    ) -> tuple[Condition, Condition]:
        """Return (cond, uncond) with one row for each image, on the device; uncond may be None.

        Both are None without an `encode_prompt`. One that does not take the number of images per
        prompt returns one row for each prompt, and these are repeated here. Raises UsageError for a
        missing prompt, for a negative prompt that it does not take, and where it returns anything
        but cond or (cond, uncond) of the same shapes.
        """
        if self.encode_prompt is None:
            if negative_prompt is not None:
                raise UsageError("negative_prompt has no effect: the model has no `encode_prompt`")
            return None, None
        if prompts is None:
            raise UsageError("a model with `encode_prompt` needs a prompt")
        if isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * len(prompts)
        options = {
            "device": device,
            "num_images_per_prompt": num_images,
            "do_classifier_free_guidance": is_guided,
            "negative_prompt": negative_prompt,
        }
        taken = names_taken(self.encode_prompt, options)
        if negative_prompt is not None and "negative_prompt" not in taken:
            raise UsageError(
                "negative_prompt has no effect: `encode_prompt` takes no argument of this name"
            )
        encoded = call_with(self.encode_prompt, list(prompts), options)

        cond, uncond = encoded, None
        if isinstance(encoded, (tuple, list)):
            if len(encoded) != 2:
                raise UsageError(
                    f"encode_prompt returned {len(encoded)} values; expected cond, or the pair "
                    "(cond, uncond), where each is a tensor, or a tuple or dict of several"
                )
            cond, uncond = encoded

        conditions = []
        for condition in (cond, uncond):
            if condition is not None and "num_images_per_prompt" not in taken:
                condition = repeat_rows(condition, len(prompts), num_images)
            conditions.append(to_device(condition, device))
        cond, uncond = conditions
        check_rows(cond, len(prompts) * num_images)
        if uncond is not None and shapes(cond) != shapes(uncond):
            raise UsageError(
                f"encode_prompt returned (cond, uncond) of the shapes {shapes(cond)} and "
                f"{shapes(uncond)}; expected the same. Several tensors that belong together are a "
                "dict of keyword arguments of the model's forward"
            )
        return cond, uncond

    def _timesteps(self, num_inference_steps: int, device: torch.device) -> list:
        """Return the timesteps to sample at, from `get_timesteps` or from the scheduler."""
        if self.get_timesteps is not None:
            return list(call_with(self.get_timesteps, num_inference_steps, {"device": device}))
        if not hasattr(self.scheduler, "set_timesteps"):
            raise UsageError(
                "the scheduler has no set_timesteps(); pass "
                "get_timesteps(num_inference_steps, device)"
            )
        call_with(self.scheduler.set_timesteps, num_inference_steps, {"device": device})
        if not hasattr(self.scheduler, "timesteps"):
            raise UsageError(
                "the scheduler has no list `timesteps` after set_timesteps(); pass "
                "get_timesteps(num_inference_steps, device)"
            )
        return list(self.scheduler.timesteps)

    def _noise(
        self, n: int, generator: torch.Generator | list[torch.Generator] | None, weight: Tensor
    ) -> Tensor:
        """Return the noise that n samples begin with, on the device and in the dtype of `weight`,
        which is a weight of the model."""
        from diffusers.utils.torch_utils import randn_tensor

        shape = (n, *self._shape())
        noise = randn_tensor(shape, generator=generator, device=weight.device, dtype=weight.dtype)
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _shape(self) -> tuple[int, ...]:
        """Return the shape of one sample, without the batch axis."""
        if self.sample_shape is not None:
            return tuple(self.sample_shape)
        config = getattr(self.model, "config", None)
        channels = getattr(config, "in_channels", None)
        size = getattr(config, "sample_size", None)
        if channels is None or size is None:
            raise UsageError(
                "the sample's shape is unknown: the model has no config.in_channels and "
                "sample_size; pass sample_shape"
            )
        if isinstance(size, int):
            return (channels, size, size)
        return (channels, *size)

    def _decode(self, latents: Tensor) -> Tensor:
        """Return the images in [0, 1] that the final sample `latents` decodes to."""
        z = unscale_by_config(getattr(self.vae, "config", None), latents)
        decoded = self.vae.decode(z)
        return as_images(as_pixels(required_tensor(decoded, "the VAE's decode")))


def as_images(x: Tensor) -> Tensor:
    """Return samples of any shape as images (N, channels, H, W), or videos (N, frames, channels, H,
    W).

    A video or volume (N, channels, frames, H, W) gets its frames first. A series (N, channels,
    length) becomes a grey image with one line of pixels per channel, and a vector (N, length) one
    line. Other samples stay as they are.
    """
    if x.ndim == 5:
        return x.movedim(2, 1)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 2:
        return x[:, None, None]
    return x


def as_pixels(x: Tensor) -> Tensor:
    """Return images in [-1, 1] as images in [0, 1]."""
    return (x / 2 + 0.5).clamp(0, 1)


# ------------------------------------------------------------------ what a user's function takes


def is_time_first(model: nn.Module) -> bool:
    """Return whether a model is called as forward(timestep, sample, ...), by the names of its
    arguments."""
    _, first, *_ = forward_signature(model).parameters
    return first == time_parameter(model)


def names_taken(function: Callable, options: dict) -> set[str]:
    """Return the names of those options that `call_with` would give to a function."""
    parameters = parameters_of(function)
    if takes_all_by_position(parameters, options):
        return set(options)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    return {name for name in options if takes_any or name in names}


def call_with(function: Callable, first: Any, options: dict) -> Any:
    """Call function(first, ...) with those of the options that it takes, and return the result.

    It gets them by name. One that needs arguments of other names, or takes any number of them, gets
    all options by position: for f(a, b), options {"n": 1} and first 5 that is f(5, 1). Raises
    UsageError if it does not take so many.
    """
    taken = names_taken(function, options)
    parameters = parameters_of(function)
    if not takes_all_by_position(parameters, options):
        return function(first, **{name: options[name] for name in options if name in taken})
    by_position = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    takes_any = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    if not takes_any and len(by_position) < 1 + len(options):
        raise UsageError(
            f"{getattr(function, '__name__', function)} takes ({', '.join(map(str, parameters))}); "
            f"expected one argument, and any of these: {', '.join(options)}"
        )
    return function(first, *options.values())


def parameters_of(function: Callable) -> list[inspect.Parameter]:
    """Return what a function takes; for a module what its forward takes."""
    if isinstance(function, nn.Module):
        function = function.forward
    return list(inspect.signature(function).parameters.values())


def takes_all_by_position(parameters: list[inspect.Parameter], options: dict) -> bool:
    """Return whether a function takes any number of arguments, or needs one of another name than
    its first argument and the options have."""
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for parameter in parameters[1:]:
        is_needed = parameter.kind in positional and parameter.default is inspect.Parameter.empty
        if is_needed and parameter.name not in options:
            return True
    return False


# ------------------------------------------------------------------- what a user's function uses

MOST_LINKS = 8  # from a user's function to a network that it uses


def networks_in(value: Any) -> list[nn.Module]:
    """Return the networks that a user's function or object uses, each once.

    For `def encode_prompt(prompts): return ENCODER(numbers(prompts))` that is ENCODER, and what
    `numbers` uses. They are not looked for inside a network, nor behind more than MOST_LINKS
    variables, functions and attributes.
    """
    networks = []
    seen = {}  # by id; it holds the values, so that no other one gets the id of one that is gone
    values = [value]
    for _ in range(MOST_LINKS):
        linked = []
        for value in values:
            if id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, nn.Module):
                networks.append(value)
            else:
                linked += linked_values(value)
        values = linked
    return networks


def linked_values(value: Any) -> list[Any]:
    """Return what a value leads to: the items of a list, the attributes of an object, the variables
    that a function names."""
    if isinstance(value, (str, bytes, Tensor, type, ModuleType)):
        return []
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        owner = value.__self__
        return [owner] if isinstance(owner, nn.Module) else [owner, value.__func__]
    if inspect.isfunction(value):
        return variables_of(value)
    linked = list(getattr(value, "__dict__", {}).values())
    if isinstance(getattr(type(value), "components", None), property):  # a pipeline
        linked += value.components.values()
    if callable(value):
        linked.append(type(value).__call__)
    return linked


def variables_of(function: FunctionType) -> list[Any]:
    """Return the values of the variables that a function names: those of its file, those of the
    function around it, its defaults, and what it takes from other files, as `file.ENCODER`."""
    names = names_in(function.__code__)
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for module in [value for value in values if isinstance(value, ModuleType)]:
        values += [vars(module)[name] for name in names if name in vars(module)]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not set yet
            values.append(cell.cell_contents)
    return [*values, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def names_in(code: CodeType) -> list[str]:
    """Return the names of variables and attributes in a function's code, and in the functions and
    generators that are written inside it."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names += names_in(constant)
    return names


# ---------------------------------------------------------------- what a user's function returns


def required_tensor(value: Any, what: str) -> Tensor:
    """Return `result_tensor` of what a function returned. Raises UsageError where there is none."""
    x = result_tensor(value)
    if x is None:
        raise UsageError(f"{what} returned a {type(value).__name__} without a tensor in it")
    return x


def has_rows(x: Tensor, rows: int) -> bool:
    """Return whether a tensor has one entry for each of the rows; others hold for all rows."""
    return x.ndim > 0 and len(x) == rows


def shapes(condition: Condition) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors in a condition."""
    return [tuple(x.shape) for x in tensors(condition)]


def repeat_rows(condition: Condition, num_prompts: int, num_images: int) -> Condition:
    """Return a condition with each prompt's row `num_images` times: a, b becomes a, a, b, b."""
    for index, x in enumerate(tensors(condition)):
        if num_images > 1 and has_rows(x, num_prompts):
            condition = with_tensor(condition, index, x.repeat_interleave(num_images, 0))
    return condition


def to_device(condition: Condition, device: torch.device) -> Condition:
    """Return a condition whose tensors are on the device."""
    for index, x in enumerate(tensors(condition)):
        condition = with_tensor(condition, index, x.to(device))
    return condition


def check_rows(cond: Condition, rows: int) -> None:
    """Raise UsageError unless a condition is of a kind that the model can be given, and has one row
    for each image."""
    if not isinstance(cond, (Tensor, tuple, dict)):
        raise UsageError(
            f"encode_prompt returned a {type(cond).__name__}; expected a tensor, or a tuple or "
            "dict of several arguments of the model's forward"
        )
    if not any(has_rows(x, rows) for x in tensors(cond)):
        raise UsageError(
            f"encode_prompt returned tensors of the shapes {shapes(cond)} for {rows} images; "
            "expected a first axis of one row per prompt"
        )


def guided(
    cond: Condition, uncond: Condition, guidance_scale: float | None, rows: int
) -> tuple[Condition, float | None]:
    """Return (the condition of a batch, the guidance scale).

    If there is guidance, the first half of the batch is unconditional; else the scale is None, and
    the batch has the conditional rows only. Raises UsageError for a scale that nothing would use.
    """
    scale = GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    if scale > 1 and uncond is not None:
        return in_one_batch(uncond, cond, rows), scale
    if scale > 1 and guidance_scale is not None:
        raise UsageError(
            f"guidance_scale {guidance_scale:g} has no effect: the model has no unconditional "
            "rows; leave it out, or let `encode_prompt` return the pair (cond, uncond)"
        )
    return cond, None


def in_one_batch(uncond: Condition, cond: Condition, rows: int) -> Condition:
    """Return the condition of a batch whose first half is unconditional.

    A tensor without rows is the same in both. Raises UsageError where it is not.
    """
    joined = cond
    for index, (without, with_prompt) in enumerate(zip(tensors(uncond), tensors(cond))):
        if has_rows(with_prompt, rows):
            joined = with_tensor(joined, index, torch.cat([without, with_prompt]))
        elif not torch.equal(without, with_prompt):
            raise UsageError(
                f"encode_prompt returned a tensor of the shape {tuple(with_prompt.shape)}, which "
                f"has no row for each of {rows} images and differs between cond and uncond"
            )
    return joined
