"""A small sampling loop for a denoiser of one's own, called as a diffusers pipeline is.

    loop = Loop(model, scheduler, encode_prompt, vae=vae, sample_shape=(4, 64, 64))
    loop("a red star", num_inference_steps=20, guidance_scale=5.0).images      # (1, 3, H, W)

It samples as Stable Diffusion does. `hook.HookedDiffusionModel(model, scheduler, ...)` makes one.
"""

import inspect
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.signatures import tensors
from errors import UsageError


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
        vae: nn.Module | None = None,
        sample_shape: tuple[int, ...] | None = None,
    ):
        self.model = model
        self.scheduler = scheduler
        self.encode_prompt = encode_prompt
        self.get_timesteps = get_timesteps
        self.vae = vae
        self.sample_shape = sample_shape

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
    ) -> SimpleNamespace:
        """Sample, with classifier-free guidance if `guidance_scale > 1` and prompts can be encoded.

        With a scale of 1 or less, a negative one too, there is one pass, the conditional one, as in
        diffusers. So the weights of the passes always tell which rows are conditional: a scale
        below 0, by whose weights the passes are exchanged, never guides here.

        batch_size: the number of samples where there is no prompt. latents: the noise to begin
        with, (N, *sample_shape); if not given, it is drawn with `generator`.

        Returns an object with `images` (N, ...): decoded to [0, 1] by the VAE if there is one and
        `output_type` is not "latent", else the final sample. Raises UsageError where the prompt or
        the sample's shape is missing, or the scheduler lists no timesteps.
        """
        weight = next(self.model.parameters(), torch.empty(0))
        device = weight.device

        is_guided = False
        embeddings = []
        if self.encode_prompt is not None:
            if prompt is None:
                raise UsageError("a model with `encode_prompt` needs a prompt")
            is_guided = guidance_scale > 1
            cond, uncond = self.encode_prompt(
                prompt, device, num_images_per_prompt, is_guided, negative_prompt
            )
            embeddings = [torch.cat([uncond, cond]) if is_guided else cond]

        timesteps = self._timesteps(num_inference_steps, device)
        if latents is None:
            num_prompts = batch_size
            if prompt is not None:
                num_prompts = 1 if isinstance(prompt, str) else len(prompt)
            latents = self._noise(num_prompts * num_images_per_prompt, generator, weight)

        step_options = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_options["generator"] = generator
        for t in timesteps:
            x = torch.cat([latents] * 2) if is_guided else latents
            if hasattr(self.scheduler, "scale_model_input"):
                x = self.scheduler.scale_model_input(x, t)
            prediction = tensors(self.model(x, t, *embeddings))[0]
            if is_guided:
                uncond, cond = prediction.chunk(2)
                prediction = uncond + guidance_scale * (cond - uncond)
            latents = tensors(self.scheduler.step(prediction, t, latents, **step_options))[0]

        if self.vae is None or output_type == "latent":
            return SimpleNamespace(images=latents)
        return SimpleNamespace(images=self._decode(latents))

    def _timesteps(self, num_inference_steps: int, device: torch.device) -> Iterable:
        """Return the timesteps to sample at, from `get_timesteps` or from the scheduler."""
        if self.get_timesteps is not None:
            return self.get_timesteps(num_inference_steps, device)
        if not hasattr(self.scheduler, "set_timesteps"):
            raise UsageError(
                "the scheduler has no set_timesteps(); pass "
                "get_timesteps(num_inference_steps, device)"
            )
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        return self.scheduler.timesteps

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
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        images = tensors(self.vae.decode(latents / config.scaling_factor + shift))[0]
        return (images / 2 + 0.5).clamp(0, 1)
