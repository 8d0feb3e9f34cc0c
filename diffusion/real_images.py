"""Real images in a sampling: noised latents of images take the place of a pipeline's own sample.

    real = RealImages(model, "", options)
    crops = [real.crop(path) for path in paths]
    with real.in_place(crops, seeds):             # what the pipeline generates here is ignored
        model([""] * len(crops), generator=seeded(seeds), **options)

After each step of the scheduler the sample becomes the images' latents with the noise of the next
timestep. So the pipeline itself does all the rest, and its denoiser sees real images at every
timestep but the first.

Two things differ between pipelines and are found by trying. How latents are packed into a sample is
read off the first noise, which can be made again from its seeds: where did each number go
(`infer_packing`)? Whether the latents are the pipeline's own is asked by putting known ones in the
place of what it sampled: its VAE must get them back. Where it does not, because the pipeline scales
or orders them in a way of its own, that way is learned from what the VAE gets for other known
samples (`infer_decoding`).

A pipeline without a VAE samples pixels. There the images in [-1, 1] are the latents, and what the
pipeline returns takes the place of what the VAE gets.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from diffusion.signatures import per_prompt, tensors
from diffusion.trace import DryRunOver, Sampling, patched, undisturbed
from errors import UsageError, decimals
from store.images import media_of
from store.inputs import Source, open_image

# Noises that are compared to find the packing: in 16 bits many numbers of one noise are the same
ROWS = 4
# Levels of a number that spells a position in digits: 16 bits tell them apart at any scale
BASE = 8
# Relative error of latents that come back: 16 bits leave 0.004
TOLERANCE = 0.02
# Error, as a share of the whole range, of an image that a VAE gives back badly
BAD_RECONSTRUCTION = 0.15
# ------------------------------------------------------------------------------ images


def crop_image(source: Source, width: int, height: int) -> Image.Image:
    """Return an image as RGB, scaled to cover width x height pixels and cropped round its centre.

    Raises UsageError if it can't be read.
    """
    return ImageOps.fit(open_image(source), (width, height), Image.Resampling.LANCZOS)


def to_pixels(image: Image.Image) -> Tensor:
    """Return an image as float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


# ------------------------------------------------------------------------------ the VAE


def first_weight(vae: nn.Module) -> Tensor | None:
    """Return the weight of the first convolution over images or frames, (width, colours, ...).

    None where the VAE has none.
    """
    for parameter in vae.parameters():
        if parameter.ndim > 3:
            return parameter
    return None


@torch.no_grad()
def encode(vae: nn.Module | None, pixels: Tensor) -> Tensor:
    """Return the VAE's latents of images (N, 3, H, W) in [-1, 1]: (N, C, h, w), or (N, C, 1, h, w)
    for a video VAE. Without a VAE they are the pixels.

    A VAE whose config says `force_upcast` is changed to float32 for good.
    """
    if vae is None:
        return pixels
    weight = first_weight(vae)
    if getattr(vae.config, "force_upcast", False) and weight.dtype != torch.float32:
        vae.to(torch.float32)
    is_for_video = weight.ndim > 4
    x = pixels[:, :, None] if is_for_video else pixels
    encoded = vae.encode(x.to(getattr(vae, "device", weight.device), weight.dtype))
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return tensors(encoded)[0]


def scale_by_config(config: Any, z: Tensor) -> Tensor:
    """Return a VAE's latents z (N, C, ...) as a denoiser takes them, by the VAE's config.

    That is ((z - latents_mean) / latents_std - shift_factor) * scaling_factor, without the entries
    that the config does not have.
    """
    if getattr(config, "latents_mean", None) is not None:
        z = (z - per_channel(config.latents_mean, z)) / per_channel(config.latents_std, z)
    z = z - (getattr(config, "shift_factor", None) or 0.0)
    return z * (getattr(config, "scaling_factor", None) or 1.0)


def unscale_by_config(config: Any, x: Tensor) -> Tensor:
    """Return a denoiser's sample x (N, C, ...) as the VAE decodes it: `scale_by_config` undone."""
    z = x / (getattr(config, "scaling_factor", None) or 1.0)
    z = z + (getattr(config, "shift_factor", None) or 0.0)
    if getattr(config, "latents_mean", None) is not None:
        z = z * per_channel(config.latents_std, z) + per_channel(config.latents_mean, z)
    return z


def per_channel(values: list[float], z: Tensor) -> Tensor:
    """Return one value for each channel in a shape that broadcasts over z (N, C, ...)."""
    ones = [1] * (z.ndim - 2)
    return torch.tensor(values, dtype=z.dtype, device=z.device).view(-1, *ones)


@torch.no_grad()
def reconstruction_error(vae: nn.Module, image: Image.Image) -> tuple[float, float]:
    """Return the error of an image that is encoded and decoded, given in [-1, 1] and in [0, 1].

    Each is a root mean square error, as a share of the range.
    """
    x = to_pixels(image)[None]
    errors = []
    for given, value_range in ((x, 2), (x / 2 + 0.5, 1)):
        back = tensors(vae.decode(encode(vae, given)))[0].float().cpu()
        if back.ndim > 4:  # of video, the only frame
            back = back[:, :, 0]
        errors.append((back - given).square().mean().sqrt().item() / value_range)
    return errors[0], errors[1]


def add_noise(scheduler: Any, x: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Return x at a timestep of the scheduler's present schedule, as its own steps would meet it.

    The scheduler is left as it is: a copy looks the timestep up.
    """
    scheduler = copy.copy(scheduler)
    for name in ("_step_index", "_begin_index"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, None)  # look the timestep up, do not count
    t = timestep.reshape(1).to(x.device).expand(len(x))
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x, t, noise).to(x.dtype)
    return scheduler.add_noise(x, noise, t).to(x.dtype)


# ------------------------------------------------------------------------------ packing


def infer_packing(noises: Tensor, sample: Tensor) -> Tensor | None:
    """Return how a pipeline arranges the numbers of its latents in a sample, read off noise.

    It is the order (n,) int64 with `sample = scale * noises[:, order]`, or None where the sample is
    no such rearrangement. noises, sample: (rows, n) float64, several rows since in 16 bits many
    numbers of one row are the same.

    Both are sorted, and numbers of the same rank belong together. Two channels of three numbers
    that a pipeline interleaves and doubles:

        noises  [[0.3, -1.2, 0.8,  2.0, -0.5, 1.1]]
        sample  [[0.6,  4.0, -2.4, -1.0, 1.6, 2.2]]
        order     [0,    3,    1,    4,   2,   5]
    """
    ours = np.lexsort(noises.numpy())
    theirs = np.lexsort(sample.numpy())
    scale = sample.norm() / noises.norm()
    expected = scale * noises[:, ours]
    if not torch.allclose(sample[:, theirs], expected, rtol=0.02, atol=1e-3 * scale.item()):
        return None
    order = torch.empty(sample.shape[1], dtype=torch.long)
    order[torch.from_numpy(theirs)] = torch.from_numpy(ours)
    return order


class Decoding(NamedTuple):
    """What a pipeline gives its VAE for a flattened sample: `z = scale * sample[order] + offset`.

    All three are (n,).
    """

    order: Tensor
    """int64"""

    scale: Tensor
    offset: Tensor

    def sample_of(self, z: Tensor) -> Tensor:
        """Return the samples (N, n) whose latents of the VAE are z (N, n)."""
        order, scale, offset = (x.to(z.device) for x in self)
        sample = torch.empty_like(z)
        sample[:, order] = (z - offset) / scale
        return sample


def infer_decoding(decoded: Callable[[Tensor], Tensor], size: int) -> Decoding | None:
    """Return how a pipeline turns a sample of `size` numbers into its VAE's latents.

    decoded: samples (N, size) -> latents (N, size), both float32. None where no rule like that of
    `Decoding` holds.

    Samples of zeros and of ones give the offset and the scale of each latent. Further samples spell
    the position of each number in digits to the base `BASE`: with a base of 10, position 42 would
    hold a 2 in the first of them and a 4 in the second.
    """
    num_digits = math.ceil(math.log(size, BASE)) if size > 1 else 1
    positions = torch.arange(size)
    samples = [torch.zeros(size), torch.ones(size)]
    for i in range(num_digits):
        digit = positions // BASE**i % BASE
        samples.append(digit * (2 / (BASE - 1)) - 1)  # 0 ... BASE - 1 become -1 ... 1
    zeros, ones, *spelt = decoded(torch.stack(samples))

    scale = ones - zeros
    if len(scale) != size or not scale.abs().min() > 0:
        return None
    order = torch.zeros(size, dtype=torch.long)
    for i, z in enumerate(spelt):
        digit = ((z - zeros) / scale + 1) * (BASE - 1) / 2
        if not (digit - digit.round()).abs().max() < 0.4:
            return None
        order += digit.round().long().clamp(0, BASE - 1) * BASE**i
    if not torch.equal(order.sort().values, positions):
        return None
    return Decoding(order, scale, zeros)


def relative_error(back: Tensor, z: Tensor) -> float:
    """Return |back - z| / |z| number by number, infinity where there are not as many numbers."""
    if back.numel() != z.numel():
        return math.inf
    return (back.flatten(1) - z.flatten(1)).norm().item() / z.norm().item()


# ------------------------------------------------------------------------------ in a pipeline


class RealImages:
    """Puts real images in the place of what a pipeline samples.

    model: a HookedDiffusionModel whose pipeline has a VAE. prompt, options: of any generation with
    it, as short as possible. `width` and `height` are the images' size in pixels: those of the
    options, or else the size that the pipeline decodes to.

    This costs two calls of the denoiser, once for all images: the first noise says how latents are
    packed into a sample, and only then known latents can be packed and sent through the pipeline.
    One call would do if the packing were read and used inside one step of the scheduler. The second
    try, with more steps, would have to run inside that step too, and one call is little beside a
    collection.

    Raises UsageError for a pipeline whose VAE can't encode images, or whose scheduler adds no
    noise, where its sample is no rearrangement of the VAE's latents, and where it decodes another
    shape than that of the images' latents, such as several frames.
    """

    def __init__(self, model: Any, prompt: str, options: dict):
        self.model = model
        self.vae = getattr(model.pipe, "vae", None)
        self.pipeline_name = type(model.pipe).__name__
        self._check_pipeline()
        options = {name: value for name, value in options.items() if not per_prompt(name)}

        # 1. The packing, from the first noise
        sample = model.first_sample([prompt] * ROWS, generator=seeded(range(ROWS)), **options)
        self.shape = sample.shape[1:]
        self.dtype = sample.dtype
        self.device = sample.device
        size = sample[0].numel()
        noises = [torch.randn(size, generator=g, dtype=sample.dtype) for g in seeded(range(ROWS))]
        self.order = infer_packing(torch.stack(noises).double(), sample.cpu().flatten(1).double())
        if self.order is None:
            raise UsageError(
                f"--images: the sample of {self.pipeline_name} is no rearrangement of noise on "
                "latents, so images can't be put in"
            )

        # 2. The way from a sample to the VAE's latents
        self.decoding: Decoding | None = None  # the usual one
        latents_of_64 = encode(self.vae, torch.zeros(1, 3, 64, 64)).shape  # of 64 x 64 pixels
        decoded = partial(self._decoded, prompt, options)
        shape = self._find_decoding(latents_of_64[1], decoded)
        if shape is None:
            raise UsageError(
                f"--images: what {self.pipeline_name} gives its VAE is no rearrangement of its "
                "sample, so images can't be put in"
            )

        # 3. The size of the images: that whose latents have the shape that the VAE gets
        pixels_per_latent = 64 // latents_of_64[-1]
        self.width = options.get("width") or shape[-1] * pixels_per_latent
        self.height = options.get("height") or shape[-2] * pixels_per_latent
        of_image = encode(self.vae, torch.zeros(1, 3, self.height, self.width)).shape[1:]
        if of_image != shape:
            raise UsageError(
                f"--images: an image of {self.width} x {self.height} has latents of shape "
                f"{tuple(of_image)}, and {self.pipeline_name} gives its VAE {tuple(shape)}: give "
                "another --width and --height, and for video "
                """--pipeline_kwargs '{"num_frames": 1}'"""
            )

    def _check_pipeline(self) -> None:
        """Raise UsageError for a VAE that does not encode images, and without a scheduler that can
        be used."""
        weight = None if self.vae is None else first_weight(self.vae)
        encodes = weight is not None and weight.shape[1] == 3 and hasattr(self.vae, "encode")
        if self.vae is not None and not encodes:
            raise UsageError(f"--images: {self.pipeline_name} has no VAE that encodes images")
        schedulers = self.model.schedulers
        if not any(hasattr(s, "add_noise") or hasattr(s, "scale_noise") for s in schedulers):
            raise UsageError(f"--images: {self.pipeline_name} has a scheduler that adds no noise")
        if any(getattr(s, "order", 1) > 1 for s in schedulers):
            raise UsageError(
                f"--images: {self.pipeline_name} has a scheduler that evaluates twice a step; "
                "choose another"
            )

    def _find_decoding(
        self, channels: int, decoded: Callable[[Tensor], Tensor]
    ) -> torch.Size | None:
        """Learn how the pipeline turns its sample into latents of the VAE; return their shape.

        Known latents are put in, and must come back. Where they do not do so in the usual way,
        `self.decoding` becomes the pipeline's own. The shape is that of one image's latents as the
        VAE gets them: (C, h, w), or (C, frames, h, w) for video. Their number alone would not tell
        16 x 64 from 32 x 32.

        channels: C. decoded: see `_decoded`. Returns None where no way is learned.
        """
        size = self.order.numel()
        if size % channels != 0:
            return None
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(ROWS, channels, size // channels, generator=generator)
        if self.vae is None:
            z = z.clamp(-1, 1)  # as a pipeline does with pixels

        back = decoded(self._sample_of(z))
        if relative_error(back, z) < TOLERANCE:
            return back.shape[1:]

        def flat_decoded(samples: Tensor) -> Tensor:
            batches = samples.split(ROWS)
            return torch.cat([decoded(x.view(-1, *self.shape)).flatten(1) for x in batches])

        self.decoding = infer_decoding(flat_decoded, size)
        if self.decoding is None:
            return None
        back = decoded(self._sample_of(z))
        if not relative_error(back, z) < TOLERANCE:
            return None
        return back.shape[1:]

    def _decoded(self, prompt: str, options: dict, samples: Tensor) -> Tensor:
        """Return what the pipeline gives its VAE after a short sampling that ended in `samples`.

        Without a VAE it is what the pipeline returns, in [-1, 1]. float32, on the CPU. Raises
        UsageError where it does not decode them row by row.
        """
        model = self.model
        options = {name: value for name, value in options.items() if name != "output_type"}
        options["generator"] = seeded(range(len(samples)))
        samples = samples.to(self.device, self.dtype)
        given = []  # to the VAE

        def catch(original):
            def decode(vae, *args, **kwargs):
                given.append(tensors([args, kwargs])[0].float().cpu())
                if sum(map(len, given)) >= len(samples):
                    raise DryRunOver
                return original(vae, *args, **kwargs)  # it decodes one after the other

            return decode

        def sample(**fewer_steps) -> None:
            watching = model.watch(len(samples), replace=lambda following, scheduler: samples)
            with watching, suppress(DryRunOver):
                output = model([prompt] * len(samples), **options | fewer_steps)
                if self.vae is None:
                    made = media_of(output, 0)
                    if made is not None and made.kind == "image":
                        given.append(made.values.float() * 2 - 1)

        with ExitStack() as stack:
            stack.enter_context(undisturbed(model.pipe, model.schedulers, model.denoisers, options))
            if self.vae is None:
                options.update(model.accepts(output_type="pt"))
            else:
                stack.enter_context(patched(type(self.vae), "decode", catch))
            try:
                sample(**model.accepts(num_inference_steps=1))
            except (ValueError, IndexError):  # a scheduler may need several
                sample()
        if sum(map(len, given)) != len(samples):
            raise UsageError(
                f"--images: {self.pipeline_name} does not decode what it samples, row by row, with "
                "a VAE or as pixels"
            )
        return torch.cat(given)

    def _sample_of(self, z: Tensor) -> Tensor:
        """Return the latents z of the VAE (N, ...) as clean samples, packed as the scheduler steps
        them."""
        z = z.to(self.device) if self.vae is None else z
        if self.decoding is not None:
            flat = self.decoding.sample_of(z.flatten(1).float())
        else:
            config = getattr(self.vae, "config", None)
            flat = scale_by_config(config, z).flatten(1)[:, self.order.to(z.device)]
        return flat.view(len(z), *self.shape).to(self.dtype)

    def crop(self, source: Source) -> Image.Image:
        """Return an image cropped round its centre to the size that is sampled."""
        return crop_image(source, self.width, self.height)

    def latents(self, images: list[Image.Image]) -> Tensor:
        """Return the clean samples (R, ...) of cropped images, on the VAE's device.

        They are packed as the scheduler steps them.
        """
        pixels = torch.stack([to_pixels(image) for image in images])
        return self._sample_of(encode(self.vae, pixels))

    def check_reconstruction(self, image: Image.Image) -> str | None:
        """Encode and decode an image, and return a remark where it does not come back.

        Raises UsageError where it would come back better if it were given in [0, 1].
        """
        if self.vae is None:
            return None
        try:
            error, error_from_unit = reconstruction_error(self.vae, image)
        except (AttributeError, TypeError, RuntimeError) as failure:
            # such as a decoder that takes a time
            return (
                "note: whether the VAE gives images back was not checked: "
                f"{type(failure).__name__}: {failure}"
            )
        if error_from_unit < error / 2:
            raise UsageError(
                "--images: the VAE would get numbers in [-1, 1], from which it gives images back "
                f"with an error of {error:.3f}, and it is made for [0, 1], from which the error is "
                f"{decimals(error_from_unit, 3)}"
            )
        if error > BAD_RECONSTRUCTION:
            return (
                f"note: the VAE gives an image back with an error of {error:.2f} of 1: its latents "
                "say little of the images"
            )
        return None

    @contextmanager
    def in_place(self, images: list[Image.Image], seeds: list[int]) -> Iterator[Sampling]:
        """Context in which the pipeline samples these cropped images, with noise of the seeds.

        images, seeds: one per row. It yields the sampling, whose sample becomes the clean images'.
        """
        x = self.latents(images)
        noises = [torch.randn(self.shape, generator=g, dtype=x.dtype) for g in seeded(seeds)]
        noise = torch.stack(noises).to(x.device)

        def replace(following: Tensor | None, scheduler: Any) -> Tensor:
            if following is None:  # after the last step
                return x
            return add_noise(scheduler, x, noise, following)

        with self.model.watch(replace=replace) as sampling:
            yield sampling


def seeded(seeds: Iterable[int]) -> list[torch.Generator]:
    """Return a generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
