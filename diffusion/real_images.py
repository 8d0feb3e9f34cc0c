"""Real images in a sampling: while a pipeline samples, noised latents of images take the place of its own sample.

After each step of the scheduler the sample becomes the images' latents with the noise of the next timestep, so that the
pipeline itself does all the rest, and its denoiser sees real images at every timestep but the first. How latents are
packed into a sample is read off the first noise, which can be made again from its seeds: where each number went.
"""

import copy
import io
import math
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps

from diffusion.signatures import per_prompt, tensors
from errors import UsageError

ROWS = 4  # noises that are compared to find the order: in 16 bits many numbers of one noise are the same


def open_image(source):
    """Path, bytes or PIL image -> RGB, the right way up, over white where it is transparent. Raises UsageError if it is none."""
    name = source if isinstance(source, str) else "an image"
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


def crop_image(source: str | bytes | Image.Image, width: int, height: int) -> Image.Image:
    """An image cropped round its centre to this size."""
    return ImageOps.fit(open_image(source), (width, height), Image.Resampling.LANCZOS)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def first_weight(vae):
    """Of its first convolution over images or frames, (width, colours, ...); None where it has none."""
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


def infer_packing(noises: torch.Tensor, sample: torch.Tensor) -> torch.Tensor | None:
    """How a pipeline arranges the numbers of its latents in a sample, read off noise: `sample = scale * noises[:, order]`.

    noises, sample: (rows, n) float64, several rows since in 16 bits many numbers of one row are the same. Returns order (n,)
    int64, or None where the sample is no such rearrangement. Both are sorted, and what comes at the same place belongs
    together. Two channels of three numbers that a pipeline interleaves and doubles:

        noises  [[0.3, -1.2, 0.8,  2.0, -0.5, 1.1]]
        sample  [[0.6,  4.0, -2.4, -1.0, 1.6, 2.2]]
        order     [0,    3,    1,    4,   2,   5]
    """
    ours = np.lexsort(noises.numpy())
    theirs = np.lexsort(sample.numpy())
    scale = sample.norm() / noises.norm()
    if not torch.allclose(sample[:, theirs], scale * noises[:, ours], rtol=0.02, atol=1e-3 * scale.item()):
        return None
    order = torch.empty(sample.shape[1], dtype=torch.long)
    order[torch.from_numpy(theirs)] = torch.from_numpy(ours)
    return order


class RealImages:
    """Puts real images in the place of what a pipeline samples.

    hooked: a HookedDiffusionModel whose pipeline has a VAE. prompt, options: of any generation with it, as short as can be.
    width, height: of the images, or None for the pipeline's own size, which is square. Raises UsageError for a pipeline
    without a VAE or a scheduler that adds noise, and where its sample is no rearrangement of the VAE's latents.
    """

    def __init__(self, hooked, prompt, options, width=None, height=None):
        self.hooked, self.vae = hooked, getattr(hooked.pipe, "vae", None)
        self._check()
        name = type(hooked.pipe).__name__
        options = {k: v for k, v in options.items() if not per_prompt(k)}
        sample = hooked.first_sample([prompt] * ROWS, generator=seeded(range(ROWS)), **options).cpu()
        self.shape, self.dtype = sample.shape[1:], sample.dtype
        size = sample[0].numel()
        noises = torch.stack([torch.randn(size, generator=g, dtype=sample.dtype) for g in seeded(range(ROWS))])
        self.order = infer_packing(noises.double(), sample.flatten(1).double())
        if self.order is None:
            raise UsageError(f"--images: the sample of {name} is no rearrangement of noise on latents, so images can't be put in")
        shapes = encode(self.vae, torch.zeros(1, 3, 64, 64)).shape
        channels, shrinks = shapes[1], 64 // shapes[-1]
        side = math.isqrt(size // channels) * shrinks
        self.width, self.height = width or side, height or side
        there = (self.width // shrinks) * (self.height // shrinks) * channels
        if there != size:
            raise UsageError(
                f"--images: an image of {self.width} x {self.height} has {there} latents, and {name} samples {size}: "
                """give --width and --height, and for video --pipeline_kwargs '{"num_frames": 1}'"""
            )

    def _check(self):
        name = type(self.hooked.pipe).__name__
        weight = None if self.vae is None else first_weight(self.vae)
        if weight is None or weight.shape[1] != 3 or not hasattr(self.vae, "encode"):
            raise UsageError(f"--images: {name} has no VAE that encodes images")
        schedulers = self.hooked.schedulers
        if not any(hasattr(s, "add_noise") or hasattr(s, "scale_noise") for s in schedulers):
            raise UsageError(f"--images: {name} has a scheduler that adds no noise")
        if any(getattr(s, "order", 1) > 1 for s in schedulers):
            raise UsageError(f"--images: {name} has a scheduler that evaluates twice a step; choose another")

    def crop(self, source: str | bytes | Image.Image) -> Image.Image:
        """An image cropped round its centre to the size that is sampled."""
        return crop_image(source, self.width, self.height)

    def latents(self, images: list[Image.Image]) -> torch.Tensor:
        """Clean samples (R, ...) of cropped images, packed as the scheduler steps them, on the VAE's device."""
        z = encode(self.vae, torch.stack([to_pixels(image) for image in images]))
        return z.flatten(1)[:, self.order.to(z.device)].view(len(z), *self.shape).to(self.dtype)

    @contextmanager
    def in_place(self, images: list[Image.Image], seeds: list[int]):
        """Context in which the pipeline samples these cropped images, one a row, with noise of the seeds; it yields the
        sampling, whose sample becomes the clean ones."""
        x = self.latents(images)
        noise = torch.stack([torch.randn(self.shape, generator=g, dtype=x.dtype) for g in seeded(seeds)]).to(x.device)

        def replace(following, scheduler):
            return x if following is None else add_noise(scheduler, x, noise, following)

        with self.hooked.watch(replace=replace) as sampling:
            yield sampling


def seeded(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]
