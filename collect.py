"""Stage 2: run a diffusion model on prompts and store what its layers compute, as .npy files.

    python collect.py                                         # the toy, 128 of its prompts
    python collect.py --model_name sd-legacy/stable-diffusion-v1-5 --dataset_name prompts.txt
    python collect.py --hook_names "up_blocks.1.attentions.*" mid_block --rows both
    python collect.py --list_hooks                            # what can be hooked, and its size
    python collect.py --images photos --timesteps_per_image 4  # real images, not generated ones
    python collect.py --model_name inpainting --inputs image=photos mask_image=mask.png
    torchrun --nproc_per_node 4 collect.py                    # four GPUs, the same files
    python collect.py --shard 0/4                             # the first of four machines

In a notebook:

    paths = main(Config(hook_names=["mid_block"], dataset_name="a cat on a chair"))

Reads   a model: a diffusers folder or hub id, a .safetensors file, or a Python file of yours
        (docs/models.md); prompts: a .txt, .csv, .tsv, .json, .jsonl or .parquet file,
        a hub data set, or one prompt; or images: a folder, or a column of such a data set. A table
        may have the columns negative_prompt and seed. With a column seed, image j of a prompt is
        generated with seed + j; without it, the seed of row i of the files is --seed + i.
Writes  <out_dir>/<hook_name>[.uncond][.input|.diff][.text].npy, an array (rows, steps, tokens, d)
        with one row per prompt and image, and beside it a .json that describes it;
        prompts.jsonl, whose line p describes row p; images/<p>.webp (or .wav), what the model made;
        collect.json and progress.jsonl, from which the same command resumes;
        inputs/, copies of the images of --inputs; the "inputs" of a line name its own.

Some options write more files:

    --stream text         <name>.lengths.npy (rows,): the number of tokens of each text
    --images              <name>.timesteps.npy (rows, steps)
    --tokens_per_step n   <name>.tokens.npy (rows, steps, n): which tokens of the image were kept;
                          files with the same number of tokens keep the same ones
    --save_samples        samples.npy: what the scheduler's last step returned

Real images are encoded by the VAE, get the noise of timesteps that are spread over the schedule,
and go through the denoiser once per timestep, without guidance (diffusion/real_images.py).

While a batch is generated, the batch before it is written. So two batches are in memory.

After Ctrl-C or kill -9 the same command resumes, and the files get the bytes of an undisturbed run,
whatever the number of processes. A larger --max_num_examples extends a finished collection; a
smaller one finishes a stopped collection at that length.
"""

import inspect
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cli import (
    GenerationConfig,
    answer_help,
    check_generation_options,
    check_positive,
    parse_object,
    refuse_unused,
    resolve_device,
    resolve_dtype,
    run_script,
)

# What is stored without --hook_names, where a model has it. It lies at about two thirds of the
# depth of a UNet, like the default of other models. Without it the toy's images lose their colours
PREFERRED_HOOK_NAME = "up_blocks.1.attentions.1"


@dataclass
class Config(GenerationConfig):
    # data
    max_num_examples: int | None = 128
    """Use at most this many prompts (with --images: images). A larger number extends a finished
    collection."""

    num_images_per_prompt: int = 1
    """Make this many images of each prompt, each with a seed of its own."""

    images: str | None = None
    """Store the activations of real images: name their folder, or the column of --dataset_name that
    holds them. If not given, images are generated."""

    timesteps_per_image: int = 4
    """With --images: run the denoiser at this many noise levels of each image, spread over the
    schedule."""

    # what to keep
    hook_names: list[str] | None = None
    """Store what these modules of the denoiser compute. Give names or patterns: `*` stands for any
    text within one part of a dotted name, `**` also crosses dots. --list_hooks shows the names. If
    not given, up_blocks.1.attentions.1 is stored, or the block at two thirds of the depth of a
    model that has none; of each denoiser one, if there are several."""

    list_hooks: bool = False
    """Print what can be hooked, with shapes and sizes, and stop. What is stored without
    --hook_names is marked. With --hook_names, print these modules only."""

    rows: Literal["cond", "uncond", "both"] = "cond"
    """Classifier-free guidance runs the model with and without the prompt. Store the rows with the
    prompt (cond), those without it (uncond), or both, in two files."""

    side: Literal["output", "input", "diff"] = "output"
    """Store what a module returns (output), what it takes (input), or output - input (diff)."""

    stream: Literal["image", "text"] = "image"
    """Store the tokens of the image, or those of the text. Text tokens exist only in a block that
    carries image and text together."""

    text_tokens: int | None = None
    """With --stream text: leave room for this many tokens of each text. Set it if you want to
    extend the collection with longer prompts later. If not given, the longest prompt decides."""

    keep_padding: bool = False
    """With --stream text: also store the tokens that only fill up a prompt, to which many models
    attend. Without this option they are left out of the files, so of training and edits too. With
    it, the page of features has no words."""

    cache_every_n_timesteps: int = 1
    """Store every n-th step: 0, n, 2n, ... Raise it to save disk space."""

    tokens_per_step: int | None = None
    """Store this many of each image's tokens at each step, chosen at random. Set it to save disk
    space. If not given, all tokens are stored."""

    store_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Write numbers in this precision. auto means bfloat16 if the model runs in it, else float16.
    bfloat16 is written as uint16, because NumPy does not have it. Use float32 or bfloat16 if
    numbers do not fit in float16."""

    # output
    save_images: bool = True
    """Decode what the model made and save it in images/."""

    save_samples: bool = False
    """Save what the scheduler's last step returned, before it is decoded, in samples.npy."""

    out_dir: str = "activations"
    """Write all files into this folder."""

    shard: str | None = None
    """Collect only a part of the batches on this machine: i/n takes the batches i, i + n, i + 2n,
    ... and writes into <out_dir>/shard<i>of<n>/. If not given, all batches are collected."""

    # hardware
    batch_size: int = 16
    """Generate this many prompts together, each with all its images. Lower it if the GPU's memory
    is too small. It changes the last bits of the numbers, so a collection can only be resumed with
    the same value."""


if __name__ == "__main__":
    answer_help(Config)  # --help and a mistyped option are answered before torch is imported

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.audio_span import watch_decoders
from diffusion.dry_step import check_images_by_row
from diffusion.generate import check_shared_options, image_lists
from diffusion.loading import check_has_prompts, load_prompt_rows, parse_lora
from diffusion.randomness import random_numbers_of
from diffusion.real_images import RealImages, seeded
from diffusion.sampling_loop import Loop
from diffusion.signatures import class_text, per_prompt, takes_prompts
from diffusion.text_words import words_of_prompt
from diffusion.tokenizer_calls import SeenText, watch_tokenizers
from distributed import Processes
from errors import UsageError, decimals
from hook import (
    HookedDiffusionModel,
    Layout,
    NotHookable,
    find_model,
    unwrap,
)
from store.audio import sampling_rate_of
from store.collection import Collection, CollectionBatch
from store.disk import read_json, relative_to
from store.hook_point import HookPoint
from store.identity import pipeline_fingerprints
from store.inputs import InputImages, digest_of, open_image
from store.prompts import load_pictures, with_seeds

# A cache's keys end with these for each kind of rows: cache["output_uncond"]
SUFFIXES = {
    "cond": {"cond": ""},
    "uncond": {"uncond": ""},
    "both": {"cond": "", "uncond": "_uncond"},
}
FACTS = ("timesteps", "sigmas", "grid")  # of a hook point, the same for every prompt

# Options that decide the bytes: a collection is resumed only with the same
SETTINGS = (
    "images",
    "variant",
    "revision",
    "rows",
    "side",
    "stream",
    "cache_every_n_timesteps",
    "batch_size",
    "seed",
    "num_images_per_prompt",
    "tokens_per_step",
    "save_images",
    "save_samples",
    "shard",
)
VERSIONS = ("torch", "diffusers", "transformers", "numpy")

TOKENS_IN_2_BYTES = 2**16  # the indices of more tokens take 4 bytes each
FULLEST_DISK = 0.98  # of the free space; a file system is slow, or fails, when it is full
SMALLEST_FLOAT16 = torch.finfo(torch.float16).tiny  # 6e-5; smaller numbers lose digits, or become 0
# If more than this share of the nonzero numbers is below 6e-5, bfloat16 stores them better. Of a
# normal distribution it is so if the RMS is below 2.3e-5. There float16's fixed spacing of 6e-8 is
# an error of 1e-3, as large as bfloat16's rounding
MOST_UNDERFLOW = 0.99
UNDERFLOW_SAMPLE = 2**16  # this many numbers of a batch tell the share to within 1 %


class Site(NamedTuple):
    """A hook point of a collection, and what goes into its file."""

    point: HookPoint

    suffix: str
    """The end of the cache's keys that hold its numbers."""

    text_tokens: int | None
    """The number of text tokens that the file has room for; None for image tokens."""

    num_steps: int
    """The number of steps that are stored."""

    step_bytes: int
    """Bytes on the disk for one step of one row."""

    def with_room(self, text_tokens: int) -> "Site":
        """Return the same hook point with room for another number of text tokens."""
        vector_bytes = self.step_bytes // self.text_tokens
        return self._replace(text_tokens=text_tokens, step_bytes=text_tokens * vector_bytes)


class Batching(NamedTuple):
    """How lines of prompts.jsonl become arguments of the pipeline."""

    num_images: int
    """How many lines each text has: the images that the pipeline makes of it in one call."""

    inputs: InputImages | None
    """The images of --inputs."""

    def arguments(self, lines: list[dict]) -> tuple[list[str], dict[str, Any]]:
        """Return what the pipeline gets for a batch: (texts, keyword arguments).

        The keyword arguments are "generator", with one generator per line; "negative_prompt", with
        one per text, if the lines have negative prompts; and the images of the texts.

        lines: consecutive lines of prompts.jsonl, `num_images` of them for each text. For two
        images of each of two texts there are four lines, four generators and two texts.
        """
        arguments = {"generator": seeded(line["seed"] for line in lines)}
        first_of_each = lines[:: self.num_images]
        if "negative_prompt" in lines[0]:
            arguments["negative_prompt"] = [line["negative_prompt"] for line in first_of_each]
        if self.inputs is not None:
            arguments.update(image_lists(self.inputs.of(first_of_each)))
        return [line["prompt"] for line in first_of_each], arguments


class RealInput(NamedTuple):
    """Real images, and how they get into a sampling."""

    images: RealImages

    sources: list
    """Paths, bytes or PIL images; a prompt's "id" is the index."""

    def crops(self, prompts: list[dict]) -> list:
        """Return the PIL image of each prompt, cropped to the size of the sampling."""
        return [self.images.crop(self.sources[prompt["id"]]) for prompt in prompts]


class Generated(NamedTuple):
    """What a batch of prompts became."""

    cache: Callable[[], dict]
    """Waits for the copies from the GPU, and returns the cache of `run_with_cache`."""

    output: object
    """What the pipeline returned, or the real images (list of PIL); None if they are not saved."""

    sample: Tensor
    """What the scheduler's last step returned, (rows, ...)."""

    audio: dict[str, int] | None
    """Which part of the sample's time the audio shows, see diffusion/audio_span.py."""


def main(cfg: Config) -> list[Path]:
    """Collect the activations of every hook point; return their files.

    Raises UsageError for an option or a prompt file that can't be used, if the disk is too small,
    and if the folder holds a collection that was made with other options.
    """
    check_config(cfg)

    # 1. What to sample: one line of prompts.jsonl for each row of the files
    everything, sources = load_lines(cfg)
    prompts = lines_of_shard(cfg, everything)
    # Every shard takes the shapes from the first batch of all of them, so that its files fit the
    # others
    first_batch = everything[: cfg.batch_size * cfg.num_images_per_prompt]
    # The room for texts is taken from the longest of all prompts, which may be another shard's
    read = everything if cfg.stream == "text" else [*first_batch, *prompts]
    inputs = InputImages.of_rows(read)

    # 2. The model, one copy per process
    processes = start_processes(cfg)
    model = load_model(cfg, resolve_dtype(cfg.dtype, processes.device), processes)
    store_dtype = resolve_store_dtype(cfg.store_dtype, model.dtype)
    if cfg.dataset_name is None and cfg.images is None:
        check_has_prompts(model.pipe, prompts)
    add_class_names([*first_batch, *prompts], model.pipe)
    batching = choose_batching(cfg, model, inputs)
    options = pipeline_options(cfg, model, batching)
    if inputs is not None:
        texts, arguments = batching.arguments(first_batch)
        check_images_by_row(model, texts, arguments | options)
    note_unused_seeds(model, batching, first_batch[: batching.num_images], options)
    if cfg.list_hooks:
        print_hooks(cfg, model, batching, first_batch, options, store_dtype)
        return []
    real = None
    if sources is not None:
        images = RealImages(model, first_batch[0]["prompt"], options)
        real = RealInput(images, sources)
        if processes.rank == 0:
            check_real_input(real, prompts)

    # 3. One step that is thrown away: which hook points match, and what shape they have
    if not cfg.hook_names:
        hook_names, remark = default_hook_names(cfg, model, batching, first_batch, options)
        cfg = replace(cfg, hook_names=hook_names)
        if remark:
            print(remark)
    with watch_tokenizers(model.pipe) as calls:
        sites = find_sites(cfg, model, batching, first_batch, options, store_dtype)
    seen = SeenText(calls, [prompt["prompt"] for prompt in first_batch])
    add_seen_text(prompts, seen)
    if cfg.stream == "text":
        add_words(cfg, model, batching, prompts, first_batch, options)
        sites = with_room(cfg, model, batching, sites, everything, options, seen)
        sites = with_room_of(folder_of(cfg), sites, cfg.text_tokens)

    # 4. Room on the disk, before anything is written
    folder = folder_of(cfg)
    check_disk(cfg, folder, sites, len(prompts), processes)

    # 5. Generate batch by batch; a thread writes, and the processes take turns
    settings = settings_of(cfg, model, options, sites, store_dtype, processes.device)
    with open_collection(cfg, folder, settings, prompts, processes) as collection:
        if inputs is not None and processes.rank == 0:
            inputs.save(folder, prompts)
        sample = partial(generate, cfg, model, sites, batching, options, real)
        writer = BatchWriter(cfg, collection, sites, store_dtype, sampling_rate_of(model.pipe))
        collect(sample, writer.write, collection, processes)

        # 6. Give the files their names and descriptions
        if processes.rank == 0:
            finish(cfg, collection, model, sites)

    processes.barrier()  # torchrun's store, which hands out batches, ends with the first process
    processes.close()
    print(f"{unit(cfg)} in {folder / 'prompts.jsonl'}; next: {next_command(folder, sites)}")
    return [folder / f"{site.point.file_name}.npy" for site in sites]


# ------------------------------------------------------------------------------ options


def check_config(cfg: Config) -> None:
    """Raise UsageError for options that can't be used, not together, or that nothing would read."""
    check_positive(
        cfg,
        "batch_size",
        "num_images_per_prompt",
        "cache_every_n_timesteps",
        "max_num_examples",
        "text_tokens",
        "num_inference_steps",
        "timesteps_per_image",
        "height",
        "width",
        "tokens_per_step",
    )
    check_shards(cfg)
    check_generation_options(cfg)

    if cfg.stream == "text" and cfg.tokens_per_step is not None:
        raise UsageError(
            "--tokens_per_step is for image tokens; texts are stored whole, padded to --text_tokens"
        )
    if cfg.stream != "text":
        refuse_unused(cfg, ["text_tokens", "keep_padding"], "it is for --stream text")

    if cfg.images is None:
        refuse_unused(cfg, ["timesteps_per_image"], "it is for --images")
        return
    generation_options = [
        "num_inference_steps",
        "cache_every_n_timesteps",
        "negative_prompt",
        "inputs",
    ]
    refuse_unused(
        cfg, generation_options, "--images takes --timesteps_per_image, and generates nothing"
    )
    if "num_inference_steps" in parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs"):
        raise UsageError(
            "--pipeline_kwargs: num_inference_steps has no effect: --images takes "
            "--timesteps_per_image, and generates nothing; leave it out"
        )
    if Path(cfg.images).is_dir():
        refuse_unused(cfg, ["column"], f"--images {cfg.images} is a folder, without captions")


def parse_shard(text: str | None) -> tuple[int, int]:
    """Return (1, 4) for 1/4, and (0, 1) for None. Raises UsageError for another text."""
    if text is None:
        return 0, 1
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(
            f"--shard {text}: expected i/n, such as 0/4, 1/4, 2/4 and 3/4 on four machines"
        )
    return int(index), int(count)


def check_shards(cfg: Config) -> None:
    """Raise UsageError if --out_dir holds a collection with another number of shards.

    Training would read some rows twice.
    """
    _, count = parse_shard(cfg.shard)
    for pattern in ("collect.json", "shard*of*/collect.json", "node*/collect.json"):
        for record in Path(cfg.out_dir).glob(pattern):
            is_shard = record.parent != Path(cfg.out_dir)
            if cfg.shard is None:
                fits = not is_shard
            else:
                fits = is_shard and record.parent.name.endswith(f"of{count}")
            if not fits:
                raise UsageError(
                    f"{record.parent} holds a collection with another --shard, or without one; "
                    "use another --out_dir"
                )


def folder_of(cfg: Config) -> Path:
    """Return the folder of all files: --out_dir, or the shard's folder in it."""
    if cfg.shard is None:
        return Path(cfg.out_dir)
    index, count = parse_shard(cfg.shard)
    return Path(cfg.out_dir) / f"shard{index}of{count}"


def resolve_store_dtype(choice: str, model_dtype: torch.dtype) -> torch.dtype:
    """Return the precision of the files: 16 bits unless --store_dtype says otherwise."""
    if choice != "auto":
        return getattr(torch, choice)
    if model_dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float16


def decodes(cfg: Config) -> bool:
    """Return whether the pipeline has to decode what it samples."""
    return cfg.save_images and cfg.images is None


def unit(cfg: Config) -> str:
    """Return what the files have rows for: "prompts" or "images"."""
    return "prompts" if cfg.images is None else "images"


def cache_options(cfg: Config) -> dict[str, Any]:
    """Return which numbers `run_with_cache` and `first_step` keep at a hook point."""
    return {
        "save_input": cfg.side != "output",
        "save_output": cfg.side != "input",
        "rows": cfg.rows,
        "stream": cfg.stream,
        "keep_padding": cfg.keep_padding,
    }


# ------------------------------------------------------------------------------ prompts and images


def load_lines(cfg: Config) -> tuple[list[dict], list | None]:
    """Return what all shards collect: (lines of prompts.jsonl, the real images or None).

    A line has an "id", which counts the prompts, a "prompt", a "seed", and perhaps a
    "negative_prompt" and other columns of the data set; with --inputs it has "inputs", see
    `load_rows`. The real images are paths, bytes or PIL images, by "id".
    """
    sources = None
    if cfg.images is None:
        texts = load_prompt_rows(cfg)
    else:
        texts, sources = load_pictures(
            cfg.images, cfg.dataset_name, cfg.split, cfg.column, cfg.max_num_examples
        )

    lines = []
    for row, prompt in enumerate(with_seeds(texts, cfg.seed, cfg.num_images_per_prompt)):
        lines.append({"id": row // cfg.num_images_per_prompt, **prompt})
    return lines, sources


def lines_of_shard(cfg: Config, lines: list[dict]) -> list[dict]:
    """Return the lines that --shard means: those of every n-th batch.

    Raises UsageError if there are none.
    """
    index, count = parse_shard(cfg.shard)
    chosen = [line for line in lines if line["id"] // cfg.batch_size % count == index]
    if not chosen:
        raise UsageError(
            f"--shard {cfg.shard}: there are fewer batches than that; lower --batch_size"
        )
    return chosen


def choose_batching(
    cfg: Config, model: HookedDiffusionModel, inputs: InputImages | None
) -> Batching:
    """Return how the pipeline gets its prompts, and the images of --inputs if there are any.

    A pipeline gets each prompt once, with the number of images of each. If it takes no such number,
    or may sort what it makes of a prompt, it gets each prompt once per image. So it does with
    --inputs, since many pipelines give several images of several prompts the wrong ones.
    Raises UsageError for images that the pipeline does not take, and where their sizes differ.
    """
    if inputs is None:
        takes_number = any(per_prompt(name) for name in inspect.signature(model.pipe).parameters)
        # A pipeline that can score what it made, as audio ones do, sorts the samples of a prompt by
        # their scores where it is given a number of them: then a file would be another row's. The
        # activations stay in the order of generation, so each prompt is given once per sample.
        sorts = any(name.startswith("score") for name in dir(type(model.pipe)))
        is_safe = takes_number and not sorts
        return Batching(cfg.num_images_per_prompt if is_safe else 1, None)
    model.check_image_arguments(inputs.sizes)
    size_is_given = cfg.height is not None and cfg.width is not None
    inputs.check_sizes(size_is_given)
    return Batching(1, inputs)


def check_real_input(real: RealInput, prompts: list[dict]) -> None:
    """Note a digest of each image in its line, and say if the VAE gives the first one back badly.

    Raises UsageError for an image that can't be read, before anything is written.
    """
    add_image_digests(prompts, real.sources)
    [first_image] = real.crops(prompts[:1])
    remark = real.images.check_reconstruction(first_image)
    if remark:
        print(remark)


def add_image_digests(prompts: list[dict], sources: list) -> None:
    """Note in each line a digest of its image's pixels, as "image_digest".

    So another image of the same name is not taken for it when the collection is resumed.
    """
    digests = {}
    ids = sorted({prompt["id"] for prompt in prompts})
    for image_id in tqdm(ids, "reading", unit="image"):
        digests[image_id] = digest_of(open_image(sources[image_id]))
    for prompt in prompts:
        prompt["image_digest"] = digests[prompt["id"]]


def add_class_names(lines: list[dict], pipe: Any) -> None:
    """Write into each line the names of the class that its prompt means, if the pipeline takes
    classes and knows their names.

    So the words of the prompts are those of the classes. If the pipeline takes no prompts, it says
    that they are only labels. Raises UsageError for a prompt that is no class.
    """
    if not takes_prompts(pipe) and any(line["prompt"] for line in lines):
        print(
            f"note: {type(pipe).__name__} takes no prompts; those of the data set are only labels"
        )
    if "class_labels" in inspect.signature(pipe).parameters:
        for line in lines:
            line["prompt"] = class_text(pipe, line["prompt"])


def add_seen_text(prompts: list[dict], seen: SeenText) -> None:
    """Note in a line whose prompt the text encoders cut how far they receive it, as "seen".

    Prints how many lines these are.
    """
    texts = {}
    for text in {prompt["prompt"] for prompt in prompts}:
        texts[text] = seen.text(text)

    num_cut = 0
    for prompt in prompts:
        seen_text = texts[prompt["prompt"]]
        if seen_text != prompt["prompt"]:
            prompt["seen"] = seen_text
            num_cut += 1
    if num_cut:
        print(
            f"note: {num_cut} prompts are longer than the text encoders take; "
            '"seen" in prompts.jsonl says what they get'
        )


# ------------------------------------------------------------------------------ the model


def start_processes(cfg: Config) -> Processes:
    """Return the processes that torchrun started, and join them; without torchrun there is one.

    Raises UsageError for processes on several machines.
    """
    processes = Processes(resolve_device(cfg.device))
    if processes.nodes > 1:
        raise UsageError(
            f"torchrun over {processes.nodes} machines: on each of them collect with --shard "
            "instead, 0/2, 1/2, ..."
        )
    return processes


def load_model(cfg: Config, dtype: torch.dtype, processes: Processes) -> HookedDiffusionModel:
    """Return the model of --model_name, hooked, on this process's device."""
    if processes.rank > 0:
        for library in ("diffusers", "transformers"):
            import_module(f"{library}.utils.logging").disable_progress_bar()
    model = HookedDiffusionModel.from_pretrained(
        cfg.model_name,
        dtype,
        processes.device,
        cfg.cpu_offload,
        cfg.lora,
        variant=cfg.variant,
        revision=cfg.revision,
        trust_remote_code=cfg.trust_remote_code or None,
    )
    model.hide_progress_bar()
    if decodes(cfg) and hasattr(getattr(model.pipe, "vae", None), "enable_slicing"):
        # one image at a time: decoding 16 together may take more memory than generating them
        with suppress(NotImplementedError):  # some classes inherit the method alone
            model.pipe.vae.enable_slicing()
    return model


def pipeline_options(
    cfg: Config, model: HookedDiffusionModel, batching: Batching
) -> dict[str, Any]:
    """Return the pipeline's arguments that are the same for every batch.

    Raises UsageError for an argument that the pipeline does not take, and for a list of prompts
    among --pipeline_kwargs.
    """
    options = cfg.pipeline_options()
    if cfg.images is not None:
        # The first step is not kept: its sample is the pipeline's own noise
        options["num_inference_steps"] = 1 + cfg.timesteps_per_image
        if cfg.guidance_scale is None:
            options.update(model.accepts(guidance_scale=1.0))
    extra = parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    check_shared_options(extra)
    output_type = "pt" if decodes(cfg) else "latent"
    return model.arguments(batching.num_images, output_type, extra, **options)


def note_unused_seeds(
    model: HookedDiffusionModel, batching: Batching, lines: list[dict], options: dict
) -> None:
    """Print one line if the samples of a model of one's own do not begin with noise of their seeds.

    Then the same seed gives another image in another batch. It is tried in two steps that are
    thrown away, on the first lines. Pipelines of diffusers and the loop that comes with this
    project draw from the generators that they get.
    """
    if not model.loaded_from.get("model_files") or isinstance(model.pipe, Loop):
        return
    samples = []
    for shift in (0, 1):
        shifted = [{**line, "seed": line["seed"] + shift} for line in lines]
        texts, arguments = batching.arguments(shifted)
        samples.append(model.first_sample(texts, **arguments, **options))
    if torch.equal(*samples):
        print(
            "note: another seed gives the same noise, so this model does not draw its noise from "
            "the argument `generator`, a list of one torch.Generator per sample: what it makes of "
            "a prompt may depend on the batch"
        )


# ------------------------------------------------------------------------------ hook points


def default_hook_names(
    cfg: Config,
    model: HookedDiffusionModel,
    batching: Batching,
    first_batch: list[dict],
    options: dict,
) -> tuple[list[str], str]:
    """Return (the hook names that are stored if the user names none, a line that says why).

    The line is "" for the preferred hook name. If the model does not have it, or it can't be hooked
    as --side and --stream ask, the block at two thirds of the depth is stored, of each denoiser if
    there are several. Raises UsageError if no block can be hooked so.
    """
    texts, arguments = batching.arguments(first_batch)
    arguments.update(options)
    sides = ("output", "input") if cfg.side == "diff" else (cfg.side,)
    find = {"stream": cfg.stream, **arguments}

    why = f"this model has no {PREFERRED_HOOK_NAME}"
    if PREFERRED_HOOK_NAME in model.modules():
        layouts = []
        for side in sides:
            of_side, _ = model.layouts(PREFERRED_HOOK_NAME, texts, side=side, **find)
            layouts.append(of_side[PREFERRED_HOOK_NAME])
        if fit_together(layouts):
            return [PREFERRED_HOOK_NAME], ""
        why = f"{PREFERRED_HOOK_NAME} has no {cfg.stream} tokens to store"

    # {denoiser: {hook_name: Layout}} of each side
    blocks_of_side = [model.blocks(texts, side=side, **find) for side in sides]
    chosen = {}  # {hook_name: which of the blocks it is}
    for denoiser, blocks in blocks_of_side[0].items():
        names = []
        for name in blocks:
            layouts = [of_side.get(denoiser, {}).get(name) for of_side in blocks_of_side]
            if fit_together(layouts):
                names.append(name)
        if names:
            number = math.ceil(2 * len(names) / 3)
            chosen[names[number - 1]] = f"number {number} of {len(names)}"
    if not chosen:
        raise UsageError(
            f"no block of this model has {cfg.stream} tokens in its {' and '.join(sides)}; choose "
            "another module with --hook_names (--list_hooks shows all)"
        )
    which = "the block at two thirds of the depth"
    if len(chosen) > 1:
        which += " of each denoiser"
    described = ", ".join(f"{name} ({place})" for name, place in chosen.items())
    return list(chosen), (
        f"note: {why}, so {which} is stored: {described}; choose others with --hook_names "
        "(--list_hooks shows all)"
    )


def fit_together(layouts: list[Layout | NotHookable | None]) -> bool:
    """Return whether all sides of a module can be hooked, and hold tokens of one shape."""
    if not all(isinstance(layout, Layout) for layout in layouts):
        return False
    return len({(max(layout.counts), layout.d) for layout in layouts}) == 1


def find_sites(
    cfg: Config,
    model: HookedDiffusionModel,
    batching: Batching,
    first_batch: list[dict],
    options: dict,
    store_dtype: torch.dtype,
) -> list[Site]:
    """Return the hook points that --hook_names mean.

    They are found in one step, which is thrown away. Raises UsageError for a module that can't be
    hooked as asked (one that only a glob names is left out), and for numbers that do not fit in the
    file's precision.
    """
    texts, arguments = batching.arguments(first_batch)
    arguments.update(options)
    cache = model.first_step(cfg.hook_names, texts, **cache_options(cfg), **arguments)

    hook_names = list(cache["grid"])
    if cfg.side == "diff":
        hook_names = names_with_difference(cfg, cache)

    sites = []
    for name in hook_names:
        side = "input" if cfg.side == "input" else "output"
        _, _, tokens, d = cache[side][name].shape
        for suffix in SUFFIXES[cfg.rows].values():
            x = cache[side + suffix][name]
            if cfg.side == "diff":
                x = x.float() - cache["input" + suffix][name].float()
            checked_numbers(x, store_dtype, name)
        num_steps = count_kept_steps(cfg, cache["steps"][name], options)
        if cfg.images is not None:
            num_steps -= 1  # the first one, of noise alone
        step_bytes = bytes_per_step(cfg, tokens, d * store_dtype.itemsize)
        for rows, suffix in SUFFIXES[cfg.rows].items():
            point = HookPoint(name, cfg.side, cfg.stream, rows)
            text_tokens = None
            if cfg.stream == "text":
                text_tokens = tokens
                reason = cache["padding" + suffix][name]
                point = replace(point, padding=reason != "")
                say_padding(cfg, point, reason, cache["num_padding" + suffix][name])
            sites.append(Site(point, suffix, text_tokens, num_steps, step_bytes))
    return sites


def say_padding(cfg: Config, point: HookPoint, reason: str, num_padding: Tensor) -> None:
    """Print one line if padding of text is left out, or kept although it was to be left out.

    reason: why it is kept. num_padding: int (prompts,), how much is left out in the first batch.
    """
    if point.padding and not cfg.keep_padding:
        print(
            f"note: {point.file_name}: padding of the text, if there is any, is stored with it: "
            f"{reason}"
        )
    if not point.padding and num_padding.any():
        print(
            f"note: {point.file_name}: {num_padding.float().mean():.0f} text tokens of each prompt "
            "are padding and are left out (mean of the first batch); --keep_padding keeps them"
        )


def add_words(
    cfg: Config,
    model: HookedDiffusionModel,
    batching: Batching,
    prompts: list[dict],
    first_batch: list[dict],
    options: dict,
) -> None:
    """Note in each line the words of its text tokens, as "tokens": {tokenizer: [text of each]}.

    Prints one line if they can't be told.
    """
    texts, arguments = batching.arguments(first_batch)
    if cfg.keep_padding:
        return  # words are known of real tokens only
    parts = model.text_parts(texts, **arguments, **options)
    if parts is None:
        print("note: it is not known which token stands for which word, so no words are stored")
        return
    words = {}
    for text in {prompt["prompt"] for prompt in prompts}:
        words[text] = words_of_prompt(parts, text)
    for prompt in prompts:
        prompt["tokens"] = words[prompt["prompt"]]


def with_room(
    cfg: Config,
    model: HookedDiffusionModel,
    batching: Batching,
    sites: list[Site],
    everything: list[dict],
    options: dict,
    seen: SeenText,
) -> list[Site]:
    """Return the sites with room for the longest text of all prompts, or for --text_tokens.

    The longest prompt of each tokenizer goes through the denoiser's first step, and shows how many
    tokens its text has there. If no tokenizer was seen, all prompts do. Raises UsageError if
    --text_tokens is smaller than that.
    """
    rows = longest_lines(everything, seen, cfg.num_images_per_prompt)
    rows_per_batch = cfg.batch_size * cfg.num_images_per_prompt
    hook_names = list(dict.fromkeys(site.point.hook_name for site in sites))
    longest = {}
    for start in range(0, len(rows), rows_per_batch):
        texts, arguments = batching.arguments(rows[start : start + rows_per_batch])
        cache = model.first_step(hook_names, texts, **cache_options(cfg), **arguments, **options)
        for site in sites:
            side = "input" if cfg.side == "input" else "output"
            key = side + site.suffix
            name = site.point.hook_name
            longest[name] = max(longest.get(name, 0), cache[key][name].shape[2])

    roomy = []
    for site in sites:
        needed = longest[site.point.hook_name]
        if cfg.text_tokens is not None and cfg.text_tokens < needed:
            raise UsageError(
                f"--text_tokens {cfg.text_tokens}: {site.point.hook_name} has {needed} text tokens "
                "of the longest prompt; raise it, or leave it out"
            )
        roomy.append(site.with_room(cfg.text_tokens or needed))
    return roomy


def longest_lines(lines: list[dict], seen: SeenText, num_images: int) -> list[dict]:
    """Return the lines of the prompts that may have the longest text stream.

    For each tokenizer, and for all of them together, that is the prompt with the most tokens, and
    the one with the longest negative prompt. All lines if no tokenizer was seen. A prompt keeps its
    `num_images` lines.
    """
    if not seen.encodings:
        return lines
    chosen = set()
    for name in ("prompt", "negative_prompt"):
        counts = {}
        for line in lines:
            text = line.get(name)
            if text is not None and text not in counts:
                counts[text] = seen.counts(text)
        firsts = {}  # {text: its first line}
        for index, line in enumerate(lines[::num_images]):
            firsts.setdefault(line.get(name), index)
        for column in range(len(seen.encodings)):
            if counts:
                chosen.add(firsts[max(counts, key=lambda text: counts[text][column])])
        if counts:
            chosen.add(firsts[max(counts, key=lambda text: sum(counts[text]))])

    rows = []
    for index in sorted(chosen):
        rows += lines[index * num_images : (index + 1) * num_images]
    return rows


def with_room_of(folder: Path, sites: list[Site], text_tokens: int | None) -> list[Site]:
    """Return the sites with the room of the files that are in the folder already.

    Raises UsageError if a prompt needs more, and if --text_tokens says another number: a file can't
    be made wider.
    """
    if not (folder / "collect.json").exists():
        return sites
    rooms = (read_json(folder / "collect.json").get("settings") or {}).get("text_tokens") or {}
    roomy = []
    for site in sites:
        room = rooms.get(site.point.hook_name, site.text_tokens)
        if text_tokens not in (None, room):
            raise UsageError(
                f"--text_tokens {text_tokens}: {folder} has room for {room} text tokens of each "
                "prompt; leave it out, or collect into another --out_dir"
            )
        if room < site.text_tokens:
            raise UsageError(
                f"{folder} has room for {room} text tokens of each prompt, and the longest prompt "
                f"has {site.text_tokens}: collect the new prompts into another --out_dir, and "
                "train on both"
            )
        roomy.append(site.with_room(room))
    return roomy


def names_with_difference(cfg: Config, cache: dict) -> list[str]:
    """Return the hook names whose input and output have one shape, so that they can be subtracted.

    Raises UsageError if another one was named without a glob, and if none is left.
    """
    fitting = []
    others = {}
    for name in cache["grid"]:
        taken = tuple(cache["input"][name].shape[2:])
        returned = tuple(cache["output"][name].shape[2:])
        if taken == returned:
            fitting.append(name)
        else:
            others[name] = (taken, returned)
    for name, (taken, returned) in others.items():
        if name in cfg.hook_names or not fitting:
            raise UsageError(f"--side diff: {name} turns {taken} into {returned}")
    return fitting


def count_kept_steps(cfg: Config, steps: list[int] | None, options: dict) -> int:
    """Return the number of steps that are stored: 10 for every fifth of 50.

    steps: those in which the denoiser runs; if the scheduler does not say them, the pipeline's
    option tells how many there are. Raises UsageError if it has no such option.
    """
    if steps is None and "num_inference_steps" not in options:
        raise UsageError(
            "it is not known how many steps this model makes: give its scheduler a list "
            "`timesteps`, or its call an argument num_inference_steps"
        )
    if steps is None:
        steps = range(options["num_inference_steps"])
    return sum(step % cfg.cache_every_n_timesteps == 0 for step in steps)


def bytes_per_step(cfg: Config, tokens: int, vector_bytes: int) -> int:
    """Return the bytes that one step of one row takes on the disk, with the indices of tokens."""
    if cfg.tokens_per_step is None or tokens <= cfg.tokens_per_step:
        return tokens * vector_bytes
    index_bytes = 2 if tokens <= TOKENS_IN_2_BYTES else 4
    return cfg.tokens_per_step * (vector_bytes + index_bytes)


def print_hooks(
    cfg: Config,
    model: HookedDiffusionModel,
    batching: Batching,
    first_batch: list[dict],
    options: dict,
    store_dtype: torch.dtype,
) -> None:
    """Print the tree of modules that can be hooked: tokens, width, grid, and the size of a file."""
    hook_names = cfg.hook_names
    defaults = []
    remark = ""
    if not hook_names:
        hook_names = ["**"]
        try:
            defaults, remark = default_hook_names(cfg, model, batching, first_batch, options)
        except UsageError as error:  # no block fits, and other modules may
            remark = f"note: {error}"
    texts, arguments = batching.arguments(first_batch)
    arguments.update(options)
    side = "input" if cfg.side == "input" else "output"
    layouts, steps = model.layouts(hook_names, texts, side=side, stream=cfg.stream, **arguments)

    kept_steps = {name: count_kept_steps(cfg, steps[name], options) for name in layouts}
    hookable = {}
    reasons = Counter()
    for name, layout in layouts.items():
        if isinstance(layout, NotHookable):
            reasons[layout.reason.partition(";")[0]] += 1
        else:
            hookable[name] = layout

    lengths = {}
    if cfg.stream == "text" and hookable:
        cache = model.first_step(list(hookable), texts, **cache_options(cfg), **arguments)
        for name, x in cache[side].items():
            lengths[name] = x.shape[2]  # without padding

    labels = {name: "  " * depth_in_tree(name, hookable) + name for name in hookable}
    width = max([len(label) for label in labels.values()], default=20)
    print(f"{'hook name':{width}} {'tokens x d':>14}  {'grid':12} {'MB per prompt':>13}")
    for name, layout in hookable.items():
        tokens = lengths.get(name, max(layout.counts))
        num_kept = kept_steps[name]
        row_bytes = num_kept * bytes_per_step(cfg, tokens, layout.d * store_dtype.itemsize)
        megabytes = decimals(row_bytes * cfg.num_images_per_prompt / 1e6, 2)
        shape = f"{tokens} x {layout.d}"
        grid = " x ".join(map(str, (tokens,) if cfg.stream == "text" else layout.grid))
        mark = "  default" if name in defaults else ""
        print(f"{labels[name]:{width}} {shape:>14}  {grid:12} {megabytes:>13}{mark}")

    for reason, count in reasons.most_common():
        print(f"{count} more can't be hooked: {reason}")
    chosen = f"{cfg.stream} tokens"
    if cfg.tokens_per_step is not None:
        chosen = f"{cfg.tokens_per_step} random {chosen}"
    numbers = " or ".join(map(str, sorted({kept_steps[name] for name in hookable or layouts})))
    print(
        f"{numbers} steps of {chosen}, {store_dtype.itemsize} bytes per number; "
        "--rows both stores twice as much"
    )
    if remark:
        print(remark)


def depth_in_tree(name: str, names: dict[str, Layout]) -> int:
    """Return how many of the names are parents of this one: 1 for "a.b.c" among "a" and "x"."""
    parts = name.split(".")
    parents = [".".join(parts[:length]) for length in range(1, len(parts))]
    return sum(parent in names for parent in parents)


def check_disk(
    cfg: Config,
    folder: Path,
    sites: list[Site],
    num_rows: int,
    processes: Processes,
) -> None:
    """Print how much will be written.

    Raises UsageError if it does not fit; only in the first process, which writes first.
    """
    needed = num_rows * sum(site.num_steps * site.step_bytes for site in sites)
    already_written = sum(path.stat().st_size for path in folder.glob("*.npy*"))
    existing = folder.absolute()
    while not existing.is_dir():
        existing = existing.parent
    free = shutil.disk_usage(existing).free

    names = ", ".join(dict.fromkeys(site.point.hook_name for site in sites))
    steps = " or ".join(map(str, sorted({site.num_steps for site in sites})))
    print(
        f"{num_rows // cfg.num_images_per_prompt} {unit(cfg)} x {steps} steps of {names}: "
        f"{decimals(needed / 1e6, 0)} MB in {folder}/ ({decimals(free / 1e9, 0)} GB free)"
    )
    if processes.rank == 0 and needed - already_written > FULLEST_DISK * free:
        raise UsageError(
            f"{needed / 1e9:.3g} GB do not fit: {(free + already_written) / 1e9:.3g} GB are free "
            f"for {cfg.out_dir}; lower --max_num_examples or --tokens_per_step, "
            "or raise --cache_every_n_timesteps"
        )


# ------------------------------------------------------------------------------ generate


def generate(
    cfg: Config,
    model: HookedDiffusionModel,
    sites: list[Site],
    batching: Batching,
    options: dict,
    real: RealInput | None,
    prompts: list[dict],
) -> Generated:
    """Generate images of the prompts, and keep what the hook points compute meanwhile.

    With real images, these take the place of the pipeline's own sample after every step. Copies
    from the GPU may still be under way when this returns.
    """
    texts, arguments = batching.arguments(prompts)
    seeds = [prompt["seed"] for prompt in prompts]
    if cfg.tokens_per_step is not None:
        arguments["choose"] = random_tokens(seeds, cfg.tokens_per_step)
    arguments.update(options)
    arguments.update(cache_options(cfg))
    arguments.update(cache_every_n_timesteps=cfg.cache_every_n_timesteps, later=True)

    crops = None
    if real is None:
        watching = model.watch(len(texts), batching.num_images, row_seeds=seeds)
    else:
        crops = real.crops(prompts)
        watching = real.images.in_place(crops, seeds)

    hook_names = list(dict.fromkeys(site.point.hook_name for site in sites))
    random_numbers = random_numbers_of(seeds, *model.schedulers)
    with random_numbers, watching as sampling, watch_decoders(model) as decoded:
        output, cache = model.run_with_cache(hook_names, texts, **arguments)

    to_save = None
    if cfg.save_images:
        to_save = crops or output
    sampling_rate = sampling_rate_of(model.pipe)
    audio = decoded.describe(output, sampling_rate, is_latent=not decodes(cfg))
    return Generated(cache, to_save, sampling.sample[: len(prompts)], audio)


def random_tokens(seeds: list[int], n: int) -> Callable[[int, int], Tensor | None]:
    """Return a function choose(step, tokens) for `run_with_cache`.

    It returns the indices of n random tokens of each row, in ascending order, (rows, n) int64; None
    if there are no more than n tokens. They depend only on the row's seed, the step and the number
    of tokens.
    """

    @lru_cache(None)  # it is called for one hook point after another
    def choose(step: int, tokens: int) -> Tensor | None:
        if tokens <= n:
            return None
        chosen = []
        for seed in seeds:
            rng = np.random.default_rng([seed % 2**64, step])
            chosen.append(rng.choice(tokens, n, replace=False))
        return torch.from_numpy(np.sort(chosen, 1))

    return choose


def collect(
    sample: Callable[[list[dict]], Generated],
    write: Callable[[CollectionBatch, Generated], None],
    collection: Collection,
    processes: Processes,
) -> None:
    """Sample every batch that is not on the disk yet; a thread writes the batch before it.

    The processes take turns, and all of them return when all batches are written. An error of the
    thread, such as a full disk, ends this when the next batch has been sampled, or at the end. What
    was sampled when this is interrupted is still written; a second Ctrl-C does not wait for that.
    """
    # The first process says which batches: others may have written some by the time we look
    pending = processes.all_gather(collection.pending())[0]
    batches = [collection.batch(index) for index in pending]
    num_rows = len(collection.prompts)
    num_done = num_rows - sum(len(batch.rows) for batch in batches)
    bar = tqdm(
        total=num_rows,
        initial=num_done,
        unit="row",
        desc="collecting",
        disable=processes.rank > 0,
    )
    # Rows that all processes have done when the batch with this index is sampled
    done_after = [num_done + rows for rows in accumulate(len(batch.rows) for batch in batches)]
    writing = None

    with bar, ThreadPoolExecutor(max_workers=1) as writer:
        try:
            while (index := processes.next("batch")) < len(batches):
                generated = sample(batches[index].prompts)
                if writing is not None:
                    writing.result()
                writing = writer.submit(write, batches[index], generated)
                del generated  # the thread has it, and frees it when it is written
                bar.update(done_after[index] - bar.n)
        except KeyboardInterrupt:
            if writing is not None and not writing.done():
                print("\nfinishing what is generated", file=sys.stderr)
                writing.result()
            raise KeyboardInterrupt("the same command resumes") from None
        if writing is not None:
            writing.result()
        processes.barrier()
        bar.update(num_rows - bar.n)


# ------------------------------------------------------------------------------ write


@contextmanager
def open_collection(
    cfg: Config, folder: Path, settings: dict, prompts: list[dict], processes: Processes
) -> Iterator[Collection]:
    """Open the collection in every process, for as long as the context lasts.

    The first process begins or resumes it and locks the folder. Only then do the others join.
    Raises UsageError as `Collection` does.
    """
    rows_per_batch = cfg.batch_size * cfg.num_images_per_prompt
    if processes.rank == 0:
        with Collection(folder, settings, prompts, rows_per_batch) as collection:
            processes.all_gather(None)
            yield collection
    else:
        processes.all_gather(None)
        yield Collection(folder, settings, prompts, rows_per_batch, joining=True)


class BatchWriter:
    """Writes generated batches into the files of a collection."""

    def __init__(
        self,
        cfg: Config,
        collection: Collection,
        sites: list[Site],
        store_dtype: torch.dtype,
        sampling_rate: int,
    ) -> None:
        """sampling_rate: of audio, in Hz."""
        self.cfg = cfg
        self.collection = collection
        self.sites = sites
        self.store_dtype = store_dtype
        self.sampling_rate = sampling_rate
        self.noted = set()  # names of the files of which underflow was said

    def write(self, batch: CollectionBatch, generated: Generated) -> None:
        """Write one batch; it counts as done once every byte of it is safe on the disk.

        Raises UsageError for numbers that the files can't hold, and OSError if the disk is full.
        """
        cache = generated.cache()
        if self.cfg.images is not None:
            without_noise_step(cache)
        arrays = self.arrays_of(cache)
        if self.cfg.save_samples:
            dtype = torch.float16 if self.store_dtype == torch.float16 else torch.float32
            arrays["samples"] = self.to_store(generated.sample.cpu(), dtype, "the final samples")
        facts = facts_of(cache, self.sites)
        if generated.audio is not None:
            for of_hook_point in facts.values():
                of_hook_point["audio"] = generated.audio
        self.collection.write(batch.index, arrays, facts, generated.output, self.sampling_rate)

    def arrays_of(self, cache: dict) -> dict[str, Tensor]:
        """Return what a batch adds to each file: {name: CPU tensor (rows, ...)}.

        The numbers are taken out of the cache, so that their memory is free when they are written.
        """
        arrays = {}
        for site in self.sites:
            name = site.point.hook_name
            stem = site.point.file_name
            x = take_numbers(cache, site)
            if site.text_tokens is not None:
                check_padding(cache, site)
                x = pad_text(x, site)
                arrays[f"{stem}.lengths"] = cache["lengths" + site.suffix][name]
            if self.cfg.images is not None:
                arrays[f"{stem}.timesteps"] = cache["timesteps"][name].repeat(len(x), 1)
            if name in cache.get("tokens", {}):
                num_tokens = math.prod(cache["grid"][name])
                index_dtype = torch.uint16 if num_tokens <= TOKENS_IN_2_BYTES else torch.uint32
                arrays[f"{stem}.tokens"] = cache["tokens"][name].to(index_dtype)
            arrays[stem] = self.to_store(x, self.store_dtype, name)
        return arrays

    def to_store(self, x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """Return x in the precision of its file. What does not fit is an error, never an infinity.

        If nearly all numbers are too small for float16, it says so, once per file.
        """
        stored = checked_numbers(x, dtype, name)
        share = share_of_underflow(x, dtype)
        if share > MOST_UNDERFLOW and name not in self.noted:
            self.noted.add(name)
            tqdm.write(
                f"note: {name}: {share:.0%} of the nonzero numbers are too small for float16 "
                f"(below {SMALLEST_FLOAT16:.0e}), so they are stored with few digits or as 0; "
                "collect again with --store_dtype bfloat16"
            )
        return stored


def checked_numbers(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return x in another precision. Raises UsageError for numbers that do not fit in it.

    name: the hook point, for the message.
    """
    stored = x.to(dtype)
    if torch.isfinite(stored).all():
        return stored
    if torch.isfinite(x).all():
        raise UsageError(
            f"{name}: {x.abs().max():.3g} does not fit in float16; "
            "use --store_dtype bfloat16 or float32"
        )
    raise UsageError(f"{name}: the model computed NaN or infinity; try another --dtype")


def take_numbers(cache: dict, site: Site) -> Tensor:
    """Return what a hook point computed, (rows, steps, tokens, d), and remove it from the cache."""
    name = site.point.hook_name
    if site.point.side == "diff":
        returned = cache["output" + site.suffix].pop(name)
        taken = cache["input" + site.suffix].pop(name)
        return returned.float() - taken.float()
    return cache[site.point.side + site.suffix].pop(name)


def check_padding(cache: dict, site: Site) -> None:
    """Raise UsageError if padding is left out in this batch and not in the first, or the other way
    round: the description says one of them for all rows."""
    reason = cache["padding" + site.suffix][site.point.hook_name]
    if site.point.padding == (reason != ""):
        return
    told = "in the first batch and not in a later one"
    if site.point.padding:
        told = "in a later batch and not in the first one"
    raise UsageError(
        f"{site.point.file_name}: which text tokens are padding can be told {told}"
        f"{reason and f' ({reason})'}; collect into another --out_dir with --keep_padding"
    )


def pad_text(x: Tensor, site: Site) -> Tensor:
    """Return x (rows, steps, tokens, d), padded with zeros to the number of tokens that the file
    has room for.

    Raises UsageError if x has more tokens than that.
    """
    num_tokens = x.shape[2]
    if num_tokens > site.text_tokens:
        raise UsageError(
            f"{site.point.hook_name}: a prompt has {num_tokens} text tokens, and the file has room "
            f"for {site.text_tokens}; collect again with --text_tokens {num_tokens} or more"
        )
    return torch.nn.functional.pad(x, (0, 0, 0, site.text_tokens - num_tokens))


def share_of_underflow(x: Tensor, dtype: torch.dtype) -> float:
    """Return which share of the nonzero numbers of x is too small for float16, from 0 to 1.

    Such a number is below 6e-5; float16 stores it with fewer digits, and as 0 below 3e-8. The share
    is 0 if `dtype` is another one, and if x is float16 already, so that nothing is lost. It is
    measured on about 65,000 numbers, in less than a millisecond.
    """
    if dtype != torch.float16 or x.dtype == torch.float16:
        return 0.0
    # An odd stride meets every channel, or every fifth, of a width such as 320
    stride = (x.numel() // UNDERFLOW_SAMPLE) | 1
    size = x.flatten()[::stride].abs()
    num_nonzero = (size > 0).sum().item()
    num_too_small = ((size > 0) & (size < SMALLEST_FLOAT16)).sum().item()
    return num_too_small / max(1, num_nonzero)


def without_noise_step(cache: dict) -> None:
    """Take out of a cache of real images, in place, the steps that are no noise level of their own.

    These are the first one, whose sample is noise alone, without an image, and a timestep that is
    met twice: of the timesteps [999, 999, 500, 500, 1] the steps 2 and 4 stay.
    """
    kept_steps = {}
    for name, timesteps in cache["timesteps"].items():
        kept_steps[name] = []
        for step in range(1, len(timesteps)):
            if timesteps[step] != timesteps[step - 1]:
                kept_steps[name].append(step)

    for key, of_hook_points in cache.items():
        if not key.startswith(("input", "output", "timesteps", "sigmas", "tokens")):
            continue
        for name, x in of_hook_points.items():
            steps = kept_steps[name]
            of_hook_points[name] = x[steps] if x.ndim == 1 else x[:, steps]


def facts_of(cache: dict, sites: list[Site]) -> dict[str, dict]:
    """Return {hook_name: its FACTS}, a JSON object."""
    facts = {}
    for site in sites:
        name = site.point.hook_name
        facts[name] = {}
        for key in FACTS:
            if name in cache[key]:
                facts[name][key] = torch.as_tensor(cache[key][name]).tolist()
        if site.text_tokens is not None:
            facts[name]["grid"] = [site.text_tokens]
    return facts


def settings_of(
    cfg: Config,
    model: HookedDiffusionModel,
    options: dict,
    sites: list[Site],
    store_dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Return all that decides the bytes; a collection is resumed only with the same settings."""
    text_tokens = {}
    for site in sites:
        if site.text_tokens is not None:
            text_tokens[site.point.hook_name] = site.text_tokens
    settings = {}
    if cfg.stream == "text" and not cfg.keep_padding:
        settings["keep_padding"] = False  # earlier versions kept it and did not say so
    return {
        **settings,
        "format": 1,
        "model": cfg.model_name,
        **{name: getattr(cfg, name) for name in SETTINGS},
        "pipeline": type(model.pipe).__name__,
        "hook_names": list(dict.fromkeys(site.point.hook_name for site in sites)),
        "dtype": str(store_dtype).removeprefix("torch."),
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
        "pipeline_kwargs": options,
        "fingerprints": pipeline_fingerprints(model.pipe, model.dtype),
        "text_tokens": text_tokens,
        **model.loaded_from,
    }


def finish(
    cfg: Config, collection: Collection, model: HookedDiffusionModel, sites: list[Site]
) -> None:
    """Give the files of a complete collection their names and descriptions, and print them.

    Raises UsageError if a file is missing.
    """
    descriptions: dict[str, dict | None] = {}
    if cfg.save_samples:
        descriptions["samples"] = None
    for site in sites:
        stem = site.point.file_name
        for extra in ("lengths", "timesteps", "tokens"):
            if collection.shape(f"{stem}.{extra}"):
                descriptions[f"{stem}.{extra}"] = None
        descriptions[stem] = describe_site(cfg, collection, model, site)
    collection.finish(descriptions)

    for site in sites:
        stem = site.point.file_name
        record = descriptions[stem]
        print(f"{collection.out_dir / stem}.npy  {tuple(record['shape'])} {record['dtype']}")


def describe_site(
    cfg: Config, collection: Collection, model: HookedDiffusionModel, site: Site
) -> dict[str, Any]:
    """Return the .json beside an activation file; docs/formats.md says what each key means."""
    stem = site.point.file_name
    shape = collection.shape(stem)
    if shape is None:
        raise UsageError(
            f"{collection.out_dir / stem}.npy is missing; move its folder away and collect again"
        )
    tokens_per_step = None
    if collection.shape(f"{stem}.tokens"):
        tokens_per_step = shape[2]

    # Paths as seen from the collection, so that a project's folder can be moved
    paths: dict[str, Any] = {"model_folder": None}
    path_or_id = find_model(cfg.model_name)
    if Path(path_or_id).is_dir():
        paths["model_folder"] = relative_to(path_or_id, collection.out_dir)
    elif Path(path_or_id).is_file():
        paths["model_file"] = relative_to(path_or_id, collection.out_dir)
    if cfg.lora:
        loras = [parse_lora(text).path for text in cfg.lora]
        paths["lora_paths"] = [relative_to(path, collection.out_dir) for path in loras]

    settings = collection.settings
    component = model.modules()[site.point.hook_name][0]
    return {
        **settings,
        **collection.facts[site.point.hook_name],
        **site.point.as_dict(),
        "id": collection.id,
        "prompts_digest": collection.prompts_digest,
        **paths,
        "denoiser": type(unwrap(model.denoisers[component])).__name__,
        "fingerprint": settings["fingerprints"][component],
        "guidance_scale": settings["pipeline_kwargs"].get("guidance_scale"),
        "tokens_per_step": tokens_per_step,
        "shape": shape,
        "num_prompts": shape[0] // cfg.num_images_per_prompt,
        "versions": {name: version(name) for name in VERSIONS},
    }


def next_command(folder: Path, sites: list[Site]) -> str:
    """Return the command that trains on all files of the collection."""
    if len(sites) > 1:
        return (
            f"python train.py --data {folder}, which trains an SAE for each of the {len(sites)} "
            "files"
        )
    if str(folder) == Config().out_dir:
        return "python train.py"
    return f"python train.py --data {folder}"


if __name__ == "__main__":
    run_script(main, Config)  # in a notebook it returns at once, so that a pasted cell runs nothing
