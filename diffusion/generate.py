"""Generate with seeds and edits: what ablate.py, evaluate.py, steer.py and the benchmarks share.

    options = model.arguments(output_type="pt")
    generation = Generation(["a red star", "a blue ring"], seeds=[0, 1], options=options)
    made = generate(model, generation)
    made.sample, made.media.values                  # (P, ...), (P, C, H, W) in [0, 1]

Every prompt has a seed of its own, so the other prompts of a batch change an image by rounding
only. There is one exception: where a scheduler draws random numbers that can't be drawn row by row
(`randomness.RowByRow`), they follow from the seeds of the whole batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion.dry_step import check_images_by_row
from diffusion.randomness import random_numbers_of
from diffusion.trace import Sampling
from errors import UsageError
from store.audio import sampling_rate_of
from store.images import Media, join_media, media_of

MakeEdits = Callable[[Sampling], dict[str, list]]
"""make_edits(sampling) -> {hook_name: [Edit]} for one batch. An edit that needs to know the step
asks the sampling."""


@dataclass(frozen=True)
class Generation:
    """What is generated: one image per prompt.

    Raises UsageError where the numbers of prompts, seeds, negative prompts and other lists of
    prompts differ.
    """

    prompts: list[str]

    seeds: list[int]
    """One per prompt."""

    negative_prompts: list[str] | None = None
    """One per prompt."""

    options: dict = field(default_factory=dict)
    """Further arguments of the pipeline, as `HookedDiffusionModel.arguments` returns them."""

    inputs: list[dict[str, Image.Image]] | None = None
    """One per prompt: the images that the pipeline takes, {argument: image}."""

    def __post_init__(self) -> None:
        count = len(self.prompts)
        if not count or len(self.seeds) != count:
            raise UsageError(
                f"{count} prompts and {len(self.seeds)} seeds: expected a seed for each prompt"
            )
        if self.negative_prompts is not None and len(self.negative_prompts) != count:
            raise UsageError(
                f"{count} prompts and {len(self.negative_prompts)} negative prompts: expected one "
                "for each prompt"
            )
        if self.inputs is not None and len(self.inputs) != count:
            raise UsageError(
                f"{count} prompts and input images for {len(self.inputs)}: expected some for each "
                "prompt"
            )
        for name, value in self.options.items():
            if is_list_of_prompts(name, value) and len(value) != count:
                raise UsageError(
                    f"{count} prompts and {len(value)} values of {name}: expected one for each "
                    "prompt, or a single text"
                )

    @classmethod
    def from_rows(
        cls, rows: list[dict], options: dict, inputs: list[dict[str, Image.Image]] | None = None
    ) -> "Generation":
        """Return the Generation of rows of prompts.jsonl, which have the keys "prompt", "seed" and
        perhaps "negative_prompt".

        The options hold for all prompts; `inputs` are the images of each row. Raises UsageError
        where rows have no seed, where some rows have a negative prompt and others have none, and
        for a list of prompts among the options.
        """
        check_shared_options(options)
        if any("seed" not in row for row in rows):
            raise UsageError(
                "the prompts have no seeds, so their images can't be generated again: name prompts "
                "with --dataset_name, or give seeds to store.collection.describe"
            )
        prompts = [row["prompt"] for row in rows]
        seeds = [row["seed"] for row in rows]
        negative_prompts = None
        if any("negative_prompt" in row for row in rows):
            negative_prompts = [row.get("negative_prompt") for row in rows]
        if negative_prompts is not None and None in negative_prompts:
            raise UsageError(
                "some of the prompts have a negative prompt and others have none; say one for all "
                "of them"
            )
        return cls(prompts, seeds, negative_prompts, options, inputs)

    def arguments(self) -> dict:
        """Return all arguments of the pipeline but the prompts and the random generators."""
        arguments = self.options | image_lists(self.inputs or [])
        if self.negative_prompts is not None:
            arguments["negative_prompt"] = self.negative_prompts
        return arguments

    def seeded_arguments(self) -> dict:
        """Return `arguments` with "generator", one random generator of each prompt's seed."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return self.arguments() | {"generator": generators}

    def batches(self, n: int) -> Iterator["Generation"]:
        """Yield consecutive parts of at most n prompts. Raises UsageError for n below 1.

        A list among the options is cut with the prompts if its name has "prompt" in it, as prompt_2
        has.
        """
        if n < 1:
            raise UsageError(f"batches of {n} prompts: expected at least 1")

        for start in range(0, len(self.prompts), n):
            part = slice(start, start + n)
            options = {}
            for name, value in self.options.items():
                is_per_prompt = is_list_of_prompts(name, value)
                options[name] = value[part] if is_per_prompt else value
            negative_prompts = self.negative_prompts
            if negative_prompts is not None:
                negative_prompts = negative_prompts[part]
            inputs = self.inputs
            if inputs is not None:
                inputs = inputs[part]
            yield Generation(
                self.prompts[part], self.seeds[part], negative_prompts, options, inputs
            )


def image_lists(inputs: list[dict[str, Image.Image]]) -> dict[str, Any]:
    """Return the images of a batch of prompts as a pipeline takes them: {argument: its images}.

    These are a list with one image per prompt; for a single prompt it is the image itself, since
    some pipelines take no list. For [{"image": a}, {"image": b}] it gives {"image": [a, b]}.
    """
    if len(inputs) == 1:
        return dict(inputs[0])
    lists: dict[str, list] = {}
    for images in inputs:
        for name, image in images.items():
            lists.setdefault(name, []).append(image)
    for name, images in lists.items():
        assert len(images) == len(inputs), f"{name}: {len(images)} images, {len(inputs)} prompts"
    return lists


def is_list_of_prompts(name: str, value: object) -> bool:
    """Return whether an argument of a pipeline holds one value per prompt, such as a list
    prompt_2."""
    return "prompt" in name and isinstance(value, list)


def check_shared_options(options: dict) -> None:
    """Raise UsageError if options that hold for all prompts have a list of prompts among them.

    Each batch would get the same list, so its texts would meet the wrong prompts.
    """
    for name, value in options.items():
        if is_list_of_prompts(name, value):
            raise UsageError(
                f"{name} is a list, whose texts would meet the wrong prompts in the second batch; "
                "give a single text, which holds for all prompts"
            )


class Generated(NamedTuple):
    """What a model made of P prompts, on the CPU, in the model's own dtypes."""

    sample: Tensor
    """(P, ...): what the scheduler's last step returned. With a VAE these are its latents."""

    media: Media | None
    """The images, videos or audio. None if the pipeline returns none."""


def generate(
    model, batch: Generation, make_edits: MakeEdits | None = None, on_step: Callable | None = None
) -> Generated:
    """Generate all prompts of `batch` together, with the edits that `make_edits` returns.

    model: a HookedDiffusionModel. on_step(step) is called at every step, with a `trace.Step`.
    Raises UsageError as `HookedDiffusionModel.run_with_hooks` does.
    """
    options = batch.seeded_arguments()
    if batch.inputs is not None:
        check_images_by_row(model, batch.prompts, batch.seeded_arguments())

    reproducible = random_numbers_of(batch.seeds, *model.schedulers)
    watching = model.watch(len(batch.prompts), on_step=on_step, row_seeds=batch.seeds)
    with reproducible, watching as sampling:
        edits = {} if make_edits is None else make_edits(sampling)
        output = model.run_with_hooks(edits, batch.prompts, **options)

    sample = sampling.sample[: sampling.R]  # some pipelines step the unconditional rows too
    media = None
    if options.get("output_type") != "latent":
        media = media_of(output, sampling_rate_of(model.pipe))
    return Generated(sample.cpu(), media)


def generate_batches(
    model,
    generation: Generation,
    batch_size: int,
    make_edits: MakeEdits | None = None,
    on_step: Callable | None = None,
    bar: tqdm | None = None,
) -> Iterator[Generated]:
    """Call `generate` for at most `batch_size` prompts at a time; `bar` counts the prompts."""
    for batch in generation.batches(batch_size):
        yield generate(model, batch, make_edits, on_step)
        if bar is not None:
            bar.update(len(batch.prompts))


def generate_media(
    model,
    generation: Generation,
    batch_size: int,
    make_edits: MakeEdits | None = None,
    bar: tqdm | None = None,
) -> Media:
    """Return what the model made of all prompts. Raises UsageError if the pipeline returns no
    images, videos or audio."""
    batches = []
    for made in generate_batches(model, generation, batch_size, make_edits, bar=bar):
        batches.append(required_media(model, made))
    return join_media(batches)


def required_media(model, made: Generated) -> Media:
    """Return the images, videos or audio. Raises UsageError if there are none."""
    if made.media is None:
        raise UsageError(f"{type(model.pipe).__name__} returns no images, videos or audio to show")
    return made.media
