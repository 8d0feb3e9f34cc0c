"""Real pictures in a sampling: while a pipeline samples, noised latents of pictures take the place of its own sample.

After each step of the scheduler the sample becomes the pictures' latents with the noise of the next timestep, so that the
pipeline itself does all the rest, and its denoiser sees real pictures at every timestep but the first. How latents are
packed into a sample is read off the first noise, which can be made again from its seeds: where each number went.

The other way, final samples that were stored take the place of a sampling's only step, and the pipeline decodes them.
"""

import copy
import io
import math
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps

from errors import UsageError
from rows import per_prompt, tensors

ROWS = 4  # noises that are compared to find the order: in 16 bits many numbers of one noise are the same


def open_picture(source):
    """Path, bytes or PIL image -> RGB, the right way up, over white where it is transparent. Raises UsageError if it is none."""
    name = source if isinstance(source, str) else "a picture"
    try:
        picture = source
        if not isinstance(source, Image.Image):
            picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):  # 16 bits: convert() would clip them
            levels = np.asarray(picture, np.float32)
            picture = Image.fromarray((levels / (65535 if levels.max() > 1 else 1) * 255).round().astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, AttributeError, Image.DecompressionBombError) as error:
        raise UsageError(f"--images: {name} can't be read: {error}") from None


def read_picture(source, width, height):
    """A picture cropped round its centre: float32 (3, height, width) in [-1, 1]."""
    picture = ImageOps.fit(open_picture(source), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def first_weight(vae):
    """Of its first convolution over pictures or frames, (width, colours, ...); None where it has none."""
    return next((p for p in vae.parameters() if p.ndim > 3), None)


@torch.no_grad()
def encode(vae, pixels):
    """Pictures (N, 3, H, W) in [-1, 1] -> latents (N, C, h, w), scaled as the denoiser expects them; (N, C, 1, h, w) of video."""
    config, weight = vae.config, first_weight(vae)
    if getattr(config, "force_upcast", False) and weight.dtype != torch.float32:
        vae.to(torch.float32)
    x = pixels if weight.ndim == 4 else pixels[:, :, None]
    found = vae.encode(x.to(getattr(vae, "device", weight.device), weight.dtype))
    z = found.latent_dist.mode() if hasattr(found, "latent_dist") else tensors(found)[0]
    broadcast = lambda values: torch.tensor(values, dtype=z.dtype, device=z.device).view(-1, *[1] * (z.ndim - 2))
    if getattr(config, "latents_mean", None) is not None:
        z = (z - broadcast(config.latents_mean)) / broadcast(config.latents_std)
    z = z - (getattr(config, "shift_factor", None) or 0.0)
    return z * (getattr(config, "scaling_factor", None) or 1.0)


def add_noise(scheduler, x, noise, timestep):
    """x at a timestep of the scheduler's present schedule, as its own steps would meet it there."""
    scheduler = copy.copy(scheduler)  # for the look-up by time: the original has its place in the schedule
    for place in ("_step_index", "_begin_index"):
        if hasattr(scheduler, place):
            setattr(scheduler, place, None)
    t = timestep.reshape(1).to(x.device).expand(len(x))
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x, t, noise).to(x.dtype)
    return scheduler.add_noise(x, noise, t).to(x.dtype)


class Pictures:
    """Puts pictures in the place of what a pipeline samples.

    hooked: a HookedDiffusionModel whose pipeline has a VAE. prompt, options: of any generation with it, as short as can be.
    width, height: of the pictures, or None for the pipeline's own size, which is square. Raises UsageError for a pipeline
    without a VAE or a scheduler that adds noise, and where its sample is no rearrangement of the VAE's latents.
    """

    def __init__(self, hooked, prompt, options, width=None, height=None):
        pipe, name = hooked.pipe, type(hooked.pipe).__name__
        self.hooked, self.vae = hooked, getattr(pipe, "vae", None)
        weight = None if self.vae is None else first_weight(self.vae)
        if weight is None or weight.shape[1] != 3 or not hasattr(self.vae, "encode"):
            raise UsageError(f"--images: {name} has no VAE that encodes pictures")
        if not any(hasattr(s, "add_noise") or hasattr(s, "scale_noise") for s in hooked.schedulers):
            raise UsageError(f"--images: {name} has a scheduler that adds no noise")
        if any(getattr(s, "order", 1) > 1 for s in hooked.schedulers):
            raise UsageError(f"--images: {name} has a scheduler that evaluates twice a step; choose another")
        options = {k: v for k, v in options.items() if not per_prompt(k)}
        sample = hooked.first_sample([prompt] * ROWS, generator=seeded(range(ROWS)), **options).cpu()
        size = sample[0].numel()
        noises = torch.stack([torch.randn(size, generator=g, dtype=sample.dtype) for g in seeded(range(ROWS))]).double()
        there = sample.flatten(1).double()
        ours, theirs = (np.lexsort(x.numpy()) for x in (noises, there))
        scale = there.norm() / noises.norm()
        if not torch.allclose(there[:, theirs], scale * noises[:, ours], rtol=0.02, atol=1e-3 * scale.item()):
            raise UsageError(
                f"--images: the sample of {name} is no rearrangement of noise on latents, so pictures can't be put in"
            )
        order = torch.empty(size, dtype=torch.long)
        order[torch.from_numpy(theirs)] = torch.from_numpy(ours)
        self.order, self.shape, self.dtype = order, sample.shape[1:], sample.dtype
        shapes = encode(self.vae, torch.zeros(1, 3, 64, 64)).shape
        self.shrinks = 64 // shapes[-1]
        side = math.isqrt(size // shapes[1]) * self.shrinks
        self.width, self.height = width or side, height or side
        here = (self.width // self.shrinks) * (self.height // self.shrinks) * shapes[1]
        if here != size:
            raise UsageError(
                f"--images: a picture of {self.width} x {self.height} has {here} latents, and {name} samples {size}: "
                """give --width and --height, and for video --pipeline_kwargs '{"num_frames": 1}'"""
            )

    def latents(self, sources):
        """Clean samples (R, ...) of the pictures, packed as the scheduler steps them, on the VAE's device."""
        z = encode(self.vae, torch.stack([read_picture(s, self.width, self.height) for s in sources]))
        return z.flatten(1)[:, self.order.to(z.device)].view(len(z), *self.shape).to(self.dtype)

    @contextmanager
    def in_place(self, sources, seeds):
        """Context in which the pipeline samples these pictures, one a row, with noise of the seeds; it returns the clean ones."""
        x = self.latents(sources)
        noise = torch.stack([torch.randn(self.shape, generator=g, dtype=x.dtype) for g in seeded(seeds)]).to(x.device)

        def replace(index, scheduler):
            last = index + 1 >= len(scheduler.timesteps)
            return x if last else add_noise(scheduler, x, noise, scheduler.timesteps[index + 1])

        with self.hooked.watch(replace=replace):
            yield


@torch.no_grad()
def decoded(hooked, samples, prompts, pipeline_kwargs, batch_size=8):
    """What final samples show, one picture (PIL, RGB) after another; of a video, the frame in the middle.

    samples: arrays as the pipeline returned them with output_type "latent". prompts: as many rows of prompts.jsonl.
    pipeline_kwargs: of that generation. The pipeline itself unpacks and decodes, whatever it does to its latents: it samples
    one step, whose result the samples replace. Raises UsageError where they are not its samples, or it gives no pictures.
    """
    dropped = lambda name: name in ("output_type", "timesteps", "sigmas") or per_prompt(name)
    given = {name: value for name, value in pipeline_kwargs.items() if not dropped(name)}
    options, noise = hooked.arguments(1, "pt", given | hooked.accepts(num_inference_steps=1)), None
    for i in range(0, len(samples), batch_size):
        x, rows = torch.from_numpy(np.stack(samples[i : i + batch_size])), prompts[i : i + batch_size]
        own = options | {"generator": seeded([0] * len(rows))}
        if "negative_prompt" in rows[0]:
            own["negative_prompt"] = [row["negative_prompt"] for row in rows]
        texts = [row["prompt"] for row in rows]
        noise = hooked.first_sample(texts, **own) if noise is None else noise
        if noise.shape[1:] != x.shape[1:]:
            raise UsageError(f"{type(hooked.pipe).__name__} samples {tuple(noise.shape[1:])}, and these are {tuple(x.shape[1:])}")
        x = x.to(noise)
        with hooked.watch(len(rows), replace=lambda index, scheduler, x=x: x):
            output = hooked(texts, **own)
        images = next(iter(tensors(output)), getattr(output, "images", None))
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images).movedim(-1, 1)
        if torch.is_tensor(images) and images.ndim == 5:
            images = images[:, images.shape[1] // 2]
        if not torch.is_tensor(images) or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UsageError(f"{type(hooked.pipe).__name__} gives no pictures")
        for image in images.float().clamp(0, 1).mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1).cpu():
            yield Image.fromarray(image.permute(1, 2, 0).numpy())


def seeded(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]
