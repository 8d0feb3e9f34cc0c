"""Real images in a sampling: while a pipeline samples, noised latents of images take the place of
its own sample.

After each step of the scheduler the sample becomes the images' latents with the noise of the next
timestep, so that the pipeline itself does all the rest, and its denoiser sees real images at every
timestep but the first. How latents are packed into a sample is read off the first noise, which can
be made again from its seeds: where each number went. Whether the latents are the pipeline's own is
asked by intervention: known ones are put in the place of what it sampled, and its VAE must get them
back. Where it does not, because the pipeline scales or orders them in a way of its own, that way is
learned from what the VAE gets for other known samples (`infer_decoding`).
"""

import copy
import io
import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from diffusion.signatures import per_prompt, tensors
from diffusion.trace import DryRunOver, patched, undisturbed
from errors import UsageError

ROWS = 4  # noises that are compared to find the order: in 16 bits many numbers of one noise are the same
BASE = 8  # levels of a number that says where it is: 16 bits tell them apart, whatever they are scaled by
BITS_PER_SAMPLE = 258  # a tag of TIFF
TOLERANCE = 0.02  # relative, of latents that come back: 16 bits leave 0.004


def open_image(source):
    """Path, bytes or PIL image -> RGB, the right way up, over white where it is transparent. Raises
    UsageError if it is none."""
    name = source if isinstance(source, str) else "an image"
    try:
        picture = source
        if not isinstance(source, Image.Image):
            picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        white = white_level(picture) if picture.mode.startswith(("I", "F")) else None
        picture = ImageOps.exif_transpose(picture)
        if white is not None:  # more than 8 bits, which convert() would clip
            levels = np.asarray(picture, np.float32) / white
            picture = Image.fromarray((levels * 255).round().clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
        AttributeError,
        Image.DecompressionBombError,
    ) as error:
        raise UsageError(f"--images: {name} can't be read: {error}") from None


def white_level(picture: Image.Image) -> float:
    """The number that is white in a grey image of more than 8 bits. Raises ValueError where its
    numbers do not say."""
    if picture.mode.startswith("I;16") or picture.format == "PNG":
        bits = getattr(picture, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
        return 2 ** bits[0] - 1
    largest = np.asarray(picture).max()
    for white in (1, 255, 65535):
        if largest <= white:
            return white
    raise ValueError(f"its numbers reach {largest:g}, so it is not known which is white")


def crop_image(source: str | bytes | Image.Image, width: int, height: int) -> Image.Image:
    """An image cropped round its centre to this size."""
    return ImageOps.fit(open_image(source), (width, height), Image.Resampling.LANCZOS)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def first_weight(vae):
    """Of its first convolution over images or frames, (width, colours, ...); None where it has
    none."""
    return next((p for p in vae.parameters() if p.ndim > 3), None)


@torch.no_grad()
def encode(vae, pixels):
    """Pictures (N, 3, H, W) in [-1, 1] -> latents of the VAE (N, C, h, w), or (N, C, 1, h, w) of
    video."""
    config, weight = vae.config, first_weight(vae)
    if getattr(config, "force_upcast", False) and weight.dtype != torch.float32:
        vae.to(torch.float32)
    x = pixels if weight.ndim == 4 else pixels[:, :, None]
    found = vae.encode(x.to(getattr(vae, "device", weight.device), weight.dtype))
    return found.latent_dist.mode() if hasattr(found, "latent_dist") else tensors(found)[0]


def scale_by_config(config, z):
    """Latents of a VAE -> of a denoiser, by the usual entries of the VAE's config."""
    broadcast = lambda values: torch.tensor(values, dtype=z.dtype, device=z.device).view(
        -1, *[1] * (z.ndim - 2)
    )
    if getattr(config, "latents_mean", None) is not None:
        z = (z - broadcast(config.latents_mean)) / broadcast(config.latents_std)
    z = z - (getattr(config, "shift_factor", None) or 0.0)
    return z * (getattr(config, "scaling_factor", None) or 1.0)


@torch.no_grad()
def reconstruction_error(vae, image: Image.Image) -> tuple[float, float]:
    """Root mean square error, of 1, of an image that the VAE encodes and decodes: given in [-1, 1],
    and given in [0, 1]."""
    errors, x = [], to_pixels(image)[None]
    for given, scale in ((x, 2), (x / 2 + 0.5, 1)):
        back = tensors(vae.decode(encode(vae, given)))[0].float().cpu()
        back = back if back.ndim == 4 else back[:, :, 0]
        errors.append((back - given).square().mean().sqrt().item() / scale)
    return errors[0], errors[1]


def add_noise(scheduler, x, noise, timestep):
    """x at a timestep of the scheduler's present schedule, as its own steps would meet it there."""
    scheduler = copy.copy(
        scheduler
    )  # for the look-up by time: the original has its place in the schedule
    for place in ("_step_index", "_begin_index"):
        if hasattr(scheduler, place):
            setattr(scheduler, place, None)
    t = timestep.reshape(1).to(x.device).expand(len(x))
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x, t, noise).to(x.dtype)
    return scheduler.add_noise(x, noise, t).to(x.dtype)


def infer_packing(noises: torch.Tensor, sample: torch.Tensor) -> torch.Tensor | None:
    """How a pipeline arranges the numbers of its latents in a sample, read off noise: `sample =
    scale * noises[:, order]`.

    noises, sample: (rows, n) float64, several rows since in 16 bits many numbers of one row are the
    same. Returns order (n,) int64, or None where the sample is no such rearrangement. Both are
    sorted, and what comes at the same place belongs together. Two channels of three numbers that a
    pipeline interleaves and doubles:

        noises  [[0.3, -1.2, 0.8,  2.0, -0.5, 1.1]]
        sample  [[0.6,  4.0, -2.4, -1.0, 1.6, 2.2]]
        order     [0,    3,    1,    4,   2,   5]
    """
    ours = np.lexsort(noises.numpy())
    theirs = np.lexsort(sample.numpy())
    scale = sample.norm() / noises.norm()
    if not torch.allclose(
        sample[:, theirs], scale * noises[:, ours], rtol=0.02, atol=1e-3 * scale.item()
    ):
        return None
    order = torch.empty(sample.shape[1], dtype=torch.long)
    order[torch.from_numpy(theirs)] = torch.from_numpy(ours)
    return order


class Decoding(NamedTuple):
    """What a pipeline gives its VAE for a sample: `z = scale * sample[order] + offset`, all
    (n,)."""

    order: torch.Tensor
    """int64"""

    scale: torch.Tensor
    offset: torch.Tensor

    def sample_of(self, z: torch.Tensor) -> torch.Tensor:
        """Latents of the VAE (N, n) -> samples (N, n)."""
        order, scale, offset = (x.to(z.device) for x in self)
        sample = torch.empty_like(z)
        sample[:, order] = (z - offset) / scale
        return sample


def infer_decoding(decoded: Callable[[torch.Tensor], torch.Tensor], size: int) -> Decoding | None:
    """How a pipeline turns a sample of `size` numbers into its VAE's latents, from what it makes of
    known samples.

    decoded: samples (N, size) -> latents (N, size), both float32. Samples of zeros and of ones give
    the offset and the scale of each latent, and others spell the place of each number in digits.
    None where no such rule holds.
    """
    digits = math.ceil(math.log(size, BASE)) if size > 1 else 1
    places = torch.arange(size)
    known = [torch.zeros(size), torch.ones(size)]
    known += [(places // BASE**i % BASE) * (2 / (BASE - 1)) - 1 for i in range(digits)]
    zeros, ones, *spelt = decoded(torch.stack(known))
    scale = ones - zeros
    if len(scale) != size or not scale.abs().min() > 0:
        return None
    order = torch.zeros(size, dtype=torch.long)
    for i, z in enumerate(spelt):
        digit = ((z - zeros) / scale + 1) * (BASE - 1) / 2
        if not (digit - digit.round()).abs().max() < 0.4:
            return None
        order += digit.round().long().clamp(0, BASE - 1) * BASE**i
    return Decoding(order, scale, zeros) if torch.equal(order.sort().values, places) else None


class RealImages:
    """Puts real images in the place of what a pipeline samples.

    hooked: a HookedDiffusionModel whose pipeline has a VAE. prompt, options: of any generation with
    it, as short as can be. width, height: of the images, or None for the pipeline's own size, which
    is square.

    This costs two calls of the denoiser, once for all images: the first noise says how latents are
    packed into a sample, and only then known latents can be packed and sent through the pipeline.
    One call would do if the packing were read and used inside one step of the scheduler. The check
    of the size and the second try, with more steps, would have to run inside that step too, and one
    call is little beside a collection.

    Raises UsageError for a pipeline without a VAE or a scheduler that adds noise, and where its
    sample is no rearrangement of the VAE's latents.
    """

    def __init__(self, hooked, prompt, options, width=None, height=None):
        self.hooked, self.vae = hooked, getattr(hooked.pipe, "vae", None)
        self._check()
        name = type(hooked.pipe).__name__
        options = {k: v for k, v in options.items() if not per_prompt(k)}
        sample = hooked.first_sample([prompt] * ROWS, generator=seeded(range(ROWS)), **options)
        self.shape, self.dtype, device = sample.shape[1:], sample.dtype, sample.device
        size = sample[0].numel()
        noises = torch.stack(
            [torch.randn(size, generator=g, dtype=sample.dtype) for g in seeded(range(ROWS))]
        )
        self.order = infer_packing(noises.double(), sample.cpu().flatten(1).double())
        if self.order is None:
            raise UsageError(
                f"--images: the sample of {name} is no rearrangement of noise on latents, so images can't be put in"
            )
        shapes = encode(self.vae, torch.zeros(1, 3, 64, 64)).shape
        channels, shrinks = shapes[1], 64 // shapes[-1]
        side = math.isqrt(size // channels) * shrinks
        self.width, self.height = width or side, height or side
        grid = (self.height // shrinks, self.width // shrinks)
        there = math.prod(grid) * channels
        if there != size:
            raise UsageError(
                f"--images: an image of {self.width} x {self.height} has {there} latents, and {name} samples {size}: "
                """give --width and --height, and for video --pipeline_kwargs '{"num_frames": 1}'"""
            )
        self.decoding = None  # the usual one
        self._find_decoding((*shapes[1:-2], *grid), partial(self._decoded, prompt, options, device))

    def _find_decoding(self, shape, decoded):
        """Make sure that known latents (N, *shape) of the VAE come back when the pipeline decodes
        them; learn how, if not.

        decoded: see `_decoded`. Raises UsageError where it can't be learned.
        """
        z = torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0))
        if self._error(z, decoded) < TOLERANCE:
            return
        flat = lambda samples: torch.cat(
            [decoded(part.view(-1, *self.shape)).flatten(1) for part in samples.split(ROWS)]
        )
        self.decoding = infer_decoding(flat, self.order.numel())
        if self.decoding is None or not self._error(z, decoded) < TOLERANCE:
            name = type(self.hooked.pipe).__name__
            raise UsageError(
                f"--images: what {name} gives its VAE is no rearrangement of its sample, so images can't be put in"
            )

    def _error(self, z, decoded):
        """Relative, of latents z of the VAE that are put in as samples and decoded."""
        back = decoded(self._sample_of(z))
        if back.numel() != z.numel():
            return math.inf
        return (back.flatten(1) - z.flatten(1)).norm().item() / z.norm().item()

    def _decoded(self, prompt, options, device, samples):
        """What the pipeline gives its VAE to decode after a short sampling that ended in `samples`:
        float32, on the CPU."""
        hooked, got = self.hooked, []
        options = {k: v for k, v in options.items() if k != "output_type"}
        options["generator"] = seeded(range(len(samples)))
        samples = samples.to(device, self.dtype)

        def catch(original):
            def decode(vae, *args, **kwargs):
                got.append(tensors([args, kwargs])[0].float().cpu())
                if sum(map(len, got)) >= len(samples):
                    raise DryRunOver
                return original(vae, *args, **kwargs)  # one after the other

            return decode

        def sample(**fewer):
            with (
                hooked.watch(len(samples), replace=lambda following, scheduler: samples),
                suppress(DryRunOver),
            ):
                hooked([prompt] * len(samples), **options | fewer)

        with ExitStack() as stack:
            stack.enter_context(
                undisturbed(hooked.pipe, hooked.schedulers, hooked.denoisers, options)
            )
            stack.enter_context(patched(type(self.vae), "decode", catch))
            try:
                sample(**hooked.accepts(num_inference_steps=1))
            except (ValueError, IndexError):  # a scheduler may need several
                sample()
        if sum(map(len, got)) != len(samples):
            raise UsageError(
                f"--images: {type(hooked.pipe).__name__} does not decode what it samples with its VAE, row by row"
            )
        return torch.cat(got)

    def _sample_of(self, z):
        """Latents of the VAE (N, ...) -> clean samples (N, ...), packed as the scheduler steps
        them."""
        if self.decoding is not None:
            flat = self.decoding.sample_of(z.flatten(1).float())
        else:
            flat = scale_by_config(self.vae.config, z).flatten(1)[:, self.order.to(z.device)]
        return flat.view(len(z), *self.shape).to(self.dtype)

    def _check(self):
        name = type(self.hooked.pipe).__name__
        weight = None if self.vae is None else first_weight(self.vae)
        if weight is None or weight.shape[1] != 3 or not hasattr(self.vae, "encode"):
            raise UsageError(f"--images: {name} has no VAE that encodes images")
        schedulers = self.hooked.schedulers
        if not any(hasattr(s, "add_noise") or hasattr(s, "scale_noise") for s in schedulers):
            raise UsageError(f"--images: {name} has a scheduler that adds no noise")
        if any(getattr(s, "order", 1) > 1 for s in schedulers):
            raise UsageError(
                f"--images: {name} has a scheduler that evaluates twice a step; choose another"
            )

    def crop(self, source: str | bytes | Image.Image) -> Image.Image:
        """An image cropped round its centre to the size that is sampled."""
        return crop_image(source, self.width, self.height)

    def latents(self, images: list[Image.Image]) -> torch.Tensor:
        """Clean samples (R, ...) of cropped images, packed as the scheduler steps them, on the
        VAE's device."""
        return self._sample_of(
            encode(self.vae, torch.stack([to_pixels(image) for image in images]))
        )

    def check_reconstruction(self, image: Image.Image) -> str | None:
        """Encode and decode an image: a remark where it does not come back. UsageError where it
        would come back from [0, 1]."""
        try:
            error, from_unit = reconstruction_error(self.vae, image)
        except (
            AttributeError,
            TypeError,
            RuntimeError,
        ) as failure:  # such as a decoder that takes a time
            return f"note: whether the VAE gives images back was not checked: {type(failure).__name__}: {failure}"
        if from_unit < error / 2:
            raise UsageError(
                f"--images: the VAE would get numbers in [-1, 1], from which it gives images back with an error of {error:.3f}, "
                f"and it is made for [0, 1], from which the error is {from_unit:.3f}"
            )
        if error > 0.15:
            return f"note: the VAE gives an image back with an error of {error:.2f} of 1: its latents say little of the images"
        return None

    @contextmanager
    def in_place(self, images: list[Image.Image], seeds: list[int]):
        """Context in which the pipeline samples these cropped images, one a row, with noise of the
        seeds; it yields the sampling, whose sample becomes the clean ones."""
        x = self.latents(images)
        noise = torch.stack(
            [torch.randn(self.shape, generator=g, dtype=x.dtype) for g in seeded(seeds)]
        ).to(x.device)

        def replace(following, scheduler):
            return x if following is None else add_noise(scheduler, x, noise, following)

        with self.hooked.watch(replace=replace) as sampling:
            yield sampling


def seeded(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]
