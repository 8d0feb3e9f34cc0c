"""A small sampling loop for a denoiser of one's own, called as a diffusers pipeline is."""

import inspect
from types import SimpleNamespace

import torch

from diffusion.signatures import tensors
from errors import UsageError


class Loop:
    """model: nn.Module whose `forward(sample, timestep, ...)` predicts for a batch-first sample.
    The rest as in `hook.HookedDiffusionModel`.
    """

    def __init__(
        self, model, scheduler, encode_prompt=None, get_timesteps=None, vae=None, sample_shape=None
    ):
        self.model, self.scheduler, self.vae = model, scheduler, vae
        self.encode_prompt, self.get_timesteps, self.sample_shape = (
            encode_prompt,
            get_timesteps,
            sample_shape,
        )

    def __call__(
        self,
        prompt=None,
        *,
        num_inference_steps=50,
        guidance_scale=7.5,
        negative_prompt=None,
        num_images_per_prompt=1,
        batch_size=1,
        generator=None,
        latents=None,
        output_type="pt",
    ):
        """Sample, with classifier-free guidance if `guidance_scale > 1` and prompts can be encoded.

        With a scale of 1 or less, a negative one too, there is one pass, the conditional one, as in
        diffusers. So the weights of the passes always tell which rows are conditional: a scale
        below 0, by whose weights the passes are exchanged, never guides here.

        Returns an object with `images`: decoded to [0, 1] by the VAE if there is one and
        `output_type` is not "latent".
        """
        weight = next(self.model.parameters(), torch.empty(0))
        n = num_images_per_prompt * (
            batch_size if prompt is None or isinstance(prompt, str) else len(prompt)
        )
        guided, embeds = False, []
        if self.encode_prompt is not None:
            if prompt is None:
                raise UsageError("a model with `encode_prompt` needs a prompt")
            guided = guidance_scale > 1
            cond, uncond = self.encode_prompt(
                prompt, weight.device, num_images_per_prompt, guided, negative_prompt
            )
            embeds = [torch.cat([uncond, cond]) if guided else cond]
        if self.get_timesteps is not None:
            timesteps = self.get_timesteps(num_inference_steps, weight.device)
        else:
            if not hasattr(self.scheduler, "set_timesteps"):
                raise UsageError(
                    "the scheduler has no set_timesteps(); pass get_timesteps(num_inference_steps, device)"
                )
            self.scheduler.set_timesteps(num_inference_steps, device=weight.device)
            timesteps = self.scheduler.timesteps
        if latents is None:
            from diffusers.utils.torch_utils import randn_tensor

            latents = randn_tensor(
                (n, *self._shape()), generator=generator, device=weight.device, dtype=weight.dtype
            )
            latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        options = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            options["generator"] = generator
        for t in timesteps:
            x = torch.cat([latents] * 2) if guided else latents
            if hasattr(self.scheduler, "scale_model_input"):
                x = self.scheduler.scale_model_input(x, t)
            prediction = tensors(self.model(x, t, *embeds))[0]
            if guided:
                uncond, cond = prediction.chunk(2)
                prediction = uncond + guidance_scale * (cond - uncond)
            latents = tensors(self.scheduler.step(prediction, t, latents, **options))[0]
        if self.vae is None or output_type == "latent":
            return SimpleNamespace(images=latents)
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        images = tensors(self.vae.decode(latents / self.vae.config.scaling_factor + shift))[0]
        return SimpleNamespace(images=(images / 2 + 0.5).clamp(0, 1))

    def _shape(self):
        if self.sample_shape is not None:
            return tuple(self.sample_shape)
        config = getattr(self.model, "config", None)
        channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
        if channels is None or size is None:
            raise UsageError(
                "the sample's shape is unknown: the model has no config.in_channels and sample_size; pass sample_shape"
            )
        return (channels, size, size) if isinstance(size, int) else (channels, *size)
