"""Stage 2: run a diffusion model on prompts and keep what its layers compute, as plain `.npy`
files.

    python collect.py                                                        # the toy, 128 of its prompts
    python collect.py --model_name sd-legacy/stable-diffusion-v1-5 --dataset_name prompts.txt --max_num_examples 2000
    python collect.py --hook_names "up_blocks.1.attentions.*" mid_block --rows both --cache_every_n_timesteps 5
    python collect.py --list_hooks                                           # what can be hooked, and what it would store
    python collect.py --images photos --timesteps_per_image 4                # of real images, without generating
    torchrun --nproc_per_node 4 collect.py                                   # on four GPUs, into the same files
    python collect.py --shard 0/4                                            # on the first of four machines

In a notebook:

    paths = main(Config(hook_names=["mid_block"], dataset_name="a cat on a chair"))

Reads   a diffusers folder or hub id, and prompts: a .txt, .csv, .tsv, .json, .jsonl or .parquet file, a hub data set, or one
        prompt; or images, a folder or a column of such a data set. Of a table also the columns negative_prompt and seed: row i
        is generated with its own seed (its image j with seed + j), and without such a column with --seed + i.
Writes  <out_dir>/<hook_name>[.uncond][.input|.diff][.text].npy, (prompts, steps, tokens, d), with a .json that describes
        it, prompts.jsonl (line p describes row p), images/<p>.webp (or .wav: what the model made), and for the next start
        collect.json and progress.jsonl. Of text also <name>.lengths.npy (prompts,), each one's tokens; of images also
        <name>.timesteps.npy (prompts, steps); with --tokens_per_step n <name>.tokens.npy (prompts, steps, n), which tokens of
        the raster they are, the same for all files of as many; with --save_samples samples.npy, what the scheduler's last
        step gave. With --shard i/n all of this stands in <out_dir>/shard<i>of<n>/.

Real images go through the VAE, get the noise of timesteps spread over the schedule, and through the
denoiser once for each, without guidance. The pipeline samples for this, its sample being replaced
after each step, see diffusion/real_images.py.

While a batch is generated, the one before it is copied from the GPU, converted and written: two are
in memory.

Interrupted, the same command resumes, and the files get the bytes of an undisturbed run, whatever
the number of processes. A larger --max_num_examples extends a finished collection; a smaller one
finishes a stopped collection at that length.
"""

import hashlib
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cli import GenerationConfig, check_positive, parse_object, resolve_device, resolve_dtype, run
from diffusion.randomness import random_numbers_of
from diffusion.real_images import RealImages, open_image, seeded
from diffusion.tokenizer_calls import SeenText, watch_tokenizers
from distributed import Processes
from errors import UsageError
from hook import HookedDiffusionModel, NotHookable, find_model, unwrap
from store.collection import Collection, CollectionBatch
from store.disk import relative_to
from store.hook_point import HookPoint
from store.identity import pipeline_fingerprints
from store.images import sampling_rate_of
from store.prompts import default_dataset, load_pictures, load_prompts, with_seeds

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
DEFAULT_HOOK_NAMES = ("up_blocks.1.attentions.1",)
FACTS = ("timesteps", "sigmas", "grid")  # of a hook point, the same for every prompt
SUFFIXES = {
    "cond": {"cond": ""},
    "uncond": {"uncond": ""},
    "both": {"cond": "", "uncond": "_uncond"},
}  # of a cache's keys
SETTINGS = (  # options that decide the bytes
    *(
        "images",
        "variant",
        "revision",
        "rows",
        "side",
        "stream",
        "cache_every_n_timesteps",
        "batch_size",
        "seed",
    ),
    *("num_images_per_prompt", "tokens_per_step", "save_images", "save_samples", "shard"),
)
VERSIONS = ("torch", "diffusers", "transformers", "numpy")


@dataclass
class Config(GenerationConfig):
    hook_names: list[str] = field(default_factory=lambda: list(DEFAULT_HOOK_NAMES))
    """Modules of the denoiser, or globs."""

    list_hooks: bool = False
    """Print what can be hooked (of --hook_names, if given), with shapes and sizes, and stop."""

    max_num_examples: int | None = 128
    """Prompts (None: all of the data set); a larger number extends."""

    num_images_per_prompt: int = 1
    """Rows a prompt; each with its own seed."""

    images: str | None = None
    """A folder of images, or the column of --dataset_name that holds them, instead of
    generating."""

    timesteps_per_image: int = 4
    """Noise levels of each image, spread over the schedule."""

    rows: Literal["cond", "uncond", "both"] = "cond"
    """Of the guidance."""

    side: Literal["output", "input", "diff"] = "output"
    """Of the module (diff: output - input)."""

    stream: Literal["image", "text"] = "image"
    """Tokens of a joint block."""

    text_tokens: int | None = None
    """Of --stream text: room for this many (None: as many as the first batch has)."""

    cache_every_n_timesteps: int = 1
    """Keep steps 0, n, 2n, ..."""

    tokens_per_step: int | None = None
    """Keep a random choice of so many of each image's tokens at each step (None: all)."""

    store_dtype: Dtype = "auto"
    """In the files (auto: bfloat16 if the model is, else float16)."""

    batch_size: int = 16
    """Prompts generated together; it decides the last bits, so it can't change on resume."""

    save_images: bool = True
    """Decode what the model made and save it, images/<row>.webp."""

    save_samples: bool = False
    """Save what the scheduler's last step gave, samples.npy."""

    out_dir: str = "activations"
    """Folder for all files."""

    shard: str | None = None
    """I/n: only every n-th batch from the i-th on, into <out_dir>/shard<i>of<n>/."""


class Site(NamedTuple):
    """A hook point of a collection, and what goes into its file."""

    point: HookPoint
    suffix: str
    """Of the cache's keys that hold it."""

    text_tokens: int | None
    """Room for so many tokens of text; None for image tokens."""

    step_bytes: int
    """What one step of one row takes on the disk."""


class Generated(NamedTuple):
    """What a batch of prompts became."""

    cache: Callable[[], dict]
    """Waits for the copies from the GPU and returns the cache of `run_with_cache`."""

    output: object
    """What the pipeline returned, or the real images (list of PIL); None if they are not to be
    saved."""

    sample: torch.Tensor
    """What the scheduler's last step gave, (rows, ...)."""


def batch_options(prompts: list[dict], n: int) -> tuple[list[str], dict]:
    """Texts of consecutive rows, `n` of them a prompt, and their generators and negative prompts as
    pipeline arguments."""
    options = {"generator": seeded(p["seed"] for p in prompts)}
    if "negative_prompt" in prompts[0]:
        options["negative_prompt"] = [p["negative_prompt"] for p in prompts[::n]]
    return [p["prompt"] for p in prompts[::n]], options


def generate(
    hooked: HookedDiffusionModel,
    cfg: Config,
    sites: list[Site],
    options: dict,
    real: RealImages | None,
    sources: list | None,
    prompts: list[dict],
) -> Generated:
    """Generate images of the prompts, or put real ones in their place, and keep what the hook
    points compute meanwhile."""
    texts, own = batch_options(prompts, cfg.num_images_per_prompt)
    seeds = [prompt["seed"] for prompt in prompts]
    if cfg.tokens_per_step:
        own["choose"] = random_tokens(seeds, cfg.tokens_per_step)
    crops, watching = None, hooked.watch(len(texts), cfg.num_images_per_prompt, row_seeds=seeds)
    if real is not None:
        crops = [real.crop(sources[prompt["id"]]) for prompt in prompts]
        watching = real.in_place(crops, seeds)
    names = list(dict.fromkeys(site.point.hook_name for site in sites))
    own |= dict(cache_every_n_timesteps=cfg.cache_every_n_timesteps, later=True, **kept(cfg))
    with random_numbers_of(seeds, *hooked.schedulers), watching as sampling:
        output, cache = hooked.run_with_cache(names, texts, **options, **own)
    shown = (crops or output) if cfg.save_images else None
    return Generated(cache, shown, sampling.sample[: len(prompts)])


def kept(cfg: Config) -> dict:
    """Which numbers `run_with_cache` and `first_step` keep at a hook point."""
    return dict(
        save_input=cfg.side != "output",
        save_output=cfg.side != "input",
        rows=cfg.rows,
        stream=cfg.stream,
    )


def random_tokens(seeds: list[int], n: int) -> Callable[[int, int], torch.Tensor | None]:
    """For `run_with_cache(choose=...)`: of each row a random n of its tokens at a step, in their
    order, (rows, n) int64.

    The choice depends on the row's seed, the step and the number of tokens alone. None where there
    are no more than n.
    """

    @lru_cache(None)  # for one hook point after another
    def choose(step, tokens):
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
    batches: list[CollectionBatch],
    bar: tqdm,
    processes: Processes,
) -> None:
    """Sample the batches, the processes in turn; a thread writes the one before meanwhile.

    An error of the thread, such as a full disk, ends this when the next batch has been sampled, or
    at the end. What was sampled when this is interrupted is still written; after a second Ctrl-C
    this returns before that.
    """
    ends = np.cumsum([0, *(len(batch.rows) for batch in batches)]).tolist()
    initial, writing = bar.n, None
    with ThreadPoolExecutor(max_workers=1) as writer:
        try:
            while (i := processes.next("batch")) < len(batches):
                generated = sample(batches[i].prompts)
                if writing is not None:
                    writing.result()
                writing = writer.submit(write, batches[i], generated)
                del generated  # the thread has it
                bar.update(initial + ends[i + 1] - bar.n)  # what all processes have done
        except KeyboardInterrupt:
            if writing is not None and not writing.done():
                print("\nfinishing what is generated", file=sys.stderr)
                writing.result()
            raise KeyboardInterrupt("the same command resumes") from None
        if writing is not None:
            writing.result()


def write_batch(
    collection: Collection,
    sites: list[Site],
    cfg: Config,
    dtype: torch.dtype,
    sampling_rate: int,
    batch: CollectionBatch,
    generated: Generated,
) -> None:
    """Write one batch; it counts as done once every byte of it is safe on the disk."""
    cache = generated.cache()
    if cfg.images is not None:
        without_first_step(cache)
    arrays = batch_arrays(cache, sites, cfg, dtype)
    if cfg.save_samples:
        samples_dtype = torch.float16 if dtype == torch.float16 else torch.float32
        arrays["samples"] = to_store(generated.sample.cpu(), samples_dtype, "the final samples")
    collection.write(batch.index, arrays, facts_of(cache, sites), generated.output, sampling_rate)


def batch_arrays(
    cache: dict, sites: list[Site], cfg: Config, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a batch adds to each file: {name: (rows, ...)}."""
    arrays = {}
    for point, suffix, text_tokens, _ in sites:
        name, stem = point.hook_name, point.file_name
        x = cache[("input" if point.side == "input" else "output") + suffix].pop(name)
        if point.side == "diff":
            x = x.float() - cache["input" + suffix].pop(name).float()
        if text_tokens is not None:
            if x.shape[2] > text_tokens:
                has = f"{x.shape[2]} text tokens, and the file has room for {text_tokens}"
                raise UsageError(
                    f"{name}: a prompt has {has}; collect again with a larger --text_tokens"
                )
            x = torch.nn.functional.pad(x, (0, 0, 0, text_tokens - x.shape[2]))
            arrays[f"{stem}.lengths"] = cache["lengths" + suffix][name]
        if cfg.images is not None:
            arrays[f"{stem}.timesteps"] = cache["timesteps"][name].repeat(len(x), 1)
        if name in cache.get("tokens", {}):
            small = math.prod(cache["grid"][name]) <= 2**16
            arrays[f"{stem}.tokens"] = cache["tokens"][name].to(
                torch.uint16 if small else torch.uint32
            )
        arrays[stem] = to_store(x, dtype, name)
    return arrays


def facts_of(cache: dict, sites: list[Site]) -> dict[str, dict]:
    """{hook_name: its FACTS}, a JSON object."""
    facts = {}
    for site in sites:
        name = site.point.hook_name
        facts[name] = {
            key: torch.as_tensor(cache[key][name]).tolist() for key in FACTS if name in cache[key]
        }
        if site.text_tokens is not None:
            facts[name]["grid"] = [site.text_tokens]
    return facts


def to_store(x: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Convert for the file; what does not fit in float16 is an error, never an infinity."""
    stored = x.to(dtype)
    if torch.isfinite(stored).all():
        return stored
    if torch.isfinite(x).all():
        raise UsageError(
            f"{name}: {x.abs().max():.3g} does not fit in float16; use --store_dtype bfloat16 or float32"
        )
    raise UsageError(f"{name}: the model computed NaN or infinity; try another --dtype")


def without_first_step(cache: dict) -> None:
    """A sampling begins with noise alone, in which there is no image; and a timestep that is met
    twice is kept once."""
    times = cache["timesteps"]
    steps = {name: [i for i in range(1, len(t)) if t[i] != t[i - 1]] for name, t in times.items()}
    for key in [
        key for key in cache if key.startswith(("input", "output", "timesteps", "sigmas", "tokens"))
    ]:
        for name, x in cache[key].items():
            cache[key][name] = x[steps[name]] if x.ndim == 1 else x[:, steps[name]]


def main(cfg: Config) -> list[Path]:
    """Collect the activations of every hook point; return their files.

    Raises UsageError for an option or a prompt file that can't be used, if the disk is too small,
    and if the folder holds a collection that was made with other options.
    """
    check_config(cfg)

    # 1. Prompts: one row of every file for each prompt and image
    everything, sources = load_rows(cfg)
    prompts = shard_of(everything, cfg)

    # 2. The model, each process its own
    processes = Processes(resolve_device(cfg.device))
    if processes.nodes > 1:
        raise UsageError(
            f"torchrun over {processes.nodes} machines: on each of them collect with --shard instead, 0/2, 1/2, ..."
        )
    first = processes.rank == 0
    dtype = resolve_dtype(cfg.dtype, processes.device)
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    store_dtype = half if cfg.store_dtype == "auto" else getattr(torch, cfg.store_dtype)
    hooked = load_model(cfg, dtype, processes)
    options = pipeline_options(cfg, hooked)

    # 3. What its layers give in one step that is thrown away: that of the first batch, in every
    # shard
    texts, own = batch_options(
        everything[: cfg.batch_size * cfg.num_images_per_prompt], cfg.num_images_per_prompt
    )
    if cfg.list_hooks:
        print_hooks(hooked, texts, options | own, cfg, store_dtype.itemsize)
        return []
    real = None
    if cfg.images is not None:
        real = RealImages(hooked, texts[0], options)
        if first:
            check_images(sources, prompts)
            if remark := real.check_reconstruction(real.crop(sources[prompts[0]["id"]])):
                print(remark)
    with watch_tokenizers(hooked.pipe) as calls:
        sites, num_steps = find_sites(hooked, cfg, texts, options | own, store_dtype)
    add_seen_text(prompts, SeenText(calls, texts))

    # 4. Room on the disk, before anything is written
    folder = Path(cfg.out_dir)
    if cfg.shard is not None:
        folder /= "shard{}of{}".format(*parse_shard(cfg.shard))
    check_disk(folder, cfg, sites, len(prompts), num_steps, first)

    # 5. Generate batch by batch, and write on another thread; the processes take turns
    settings = settings_of(cfg, hooked, options, sites, processes.device, dtype, store_dtype)
    arguments = (folder, settings, prompts, cfg.batch_size * cfg.num_images_per_prompt)
    with Collection(*arguments) if first else nullcontext() as collection:
        pending = processes.all_gather(collection.pending() if first else None)[0]
        collection = collection or Collection(*arguments, joining=True)
        sample = partial(generate, hooked, cfg, sites, options, real, sources)
        write = partial(
            write_batch, collection, sites, cfg, store_dtype, sampling_rate_of(hooked.pipe)
        )
        batches = [collection.batch(index) for index in pending]
        batches = [collection.batch(index) for index in pending]
        initial = len(prompts) - sum(len(batch.rows) for batch in batches)
        with tqdm(
            total=len(prompts), initial=initial, unit="row", desc="collecting", disable=not first
        ) as bar:
            collect(sample, write, batches, bar, processes)
            processes.barrier()
            bar.update(len(prompts) - bar.n)

        # 6. Give the files their names, and describe them
        if first:
            finish(collection, hooked, sites, cfg)
    processes.barrier()  # torchrun's store, which hands out the batches, ends with the first process
    processes.close()
    print(f"{what(cfg)} in {folder / 'prompts.jsonl'}; next: {next_command(folder, sites)}")
    return [folder / f"{site.point.file_name}.npy" for site in sites]


def next_command(folder: Path, sites: list[Site]) -> str:
    """How to train on all files of the collection."""
    if len(sites) > 1:
        return f"python train.py --data {folder}, which trains an SAE for each of the {len(sites)} files"
    return (
        "python train.py" if str(folder) == Config().out_dir else f"python train.py --data {folder}"
    )


def check_config(cfg: Config) -> None:
    """Raise UsageError for options that can't be used, or not together."""
    check_positive(
        cfg,
        "batch_size",
        "num_images_per_prompt",
        "cache_every_n_timesteps",
        "max_num_examples",
        "text_tokens",
    )
    check_positive(
        cfg, "num_inference_steps", "timesteps_per_image", "height", "width", "tokens_per_step"
    )
    if cfg.tokens_per_step and cfg.stream == "text":
        raise UsageError(
            "--tokens_per_step is for image tokens; texts are stored whole, padded to --text_tokens"
        )
    generates = (
        cfg.num_inference_steps is not None
        or cfg.cache_every_n_timesteps > 1
        or cfg.negative_prompt is not None
    )
    if cfg.images is not None and generates:
        raise UsageError(
            "--images takes --timesteps_per_image, and no steps or negative prompts of a generation"
        )
    check_shards(cfg)


def parse_shard(text: str | None) -> tuple[int, int]:
    """(1, 4) for 1/4, and (0, 1) for None."""
    if text is None:
        return 0, 1
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(
            f"--shard {text}: expected i/n, such as 0/4, 1/4, 2/4 and 3/4 on four machines"
        )
    return int(index), int(count)


def check_shards(cfg: Config) -> None:
    """Raise UsageError where --out_dir holds a collection with another number of shards: training
    would read rows twice."""
    _, count = parse_shard(cfg.shard)
    ours = "" if cfg.shard is None else f"of{count}"
    for pattern in ("collect.json", "shard*of*/collect.json", "node*/collect.json"):
        for record in Path(cfg.out_dir).glob(pattern):
            name = "" if record.parent == Path(cfg.out_dir) else record.parent.name
            if not name.endswith(ours) or bool(name) != bool(ours):
                raise UsageError(
                    f"{record.parent} is of a collection with another --shard, or none; use another --out_dir"
                )


def load_rows(cfg: Config) -> tuple[list[dict], list | None]:
    """What is collected in all shards: (the lines of prompts.jsonl, the real images by "id" or
    None)."""
    sources = None
    if cfg.images is None:
        dataset_name = cfg.dataset_name or default_dataset(find_model(cfg.model_name))
        texts = load_prompts(
            dataset_name, cfg.split, cfg.column, cfg.negative_prompt, cfg.max_num_examples
        )
    else:
        texts, sources = load_pictures(
            cfg.images, cfg.dataset_name, cfg.split, cfg.column, cfg.max_num_examples
        )
    n = cfg.num_images_per_prompt
    rows = with_seeds(texts, cfg.seed, n)
    return [{"id": number // n, **row} for number, row in enumerate(rows)], sources


def shard_of(prompts: list[dict], cfg: Config) -> list[dict]:
    """The rows that --shard means: every n-th batch."""
    index, count = parse_shard(cfg.shard)
    mine = [prompt for prompt in prompts if prompt["id"] // cfg.batch_size % count == index]
    if not mine:
        raise UsageError(
            f"--shard {cfg.shard}: there are fewer batches than that; lower --batch_size"
        )
    return mine


def check_images(sources: list, prompts: list[dict]) -> None:
    """Note in each row a digest of its image's pixels, so that another image of the same name is no
    longer taken for it.

    Raises UsageError for an image that can't be read, before anything is written.
    """
    digests = {}
    for i in tqdm(sorted({prompt["id"] for prompt in prompts}), "reading", unit="image"):
        image = open_image(sources[i])
        digests[i] = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
    for prompt in prompts:
        prompt["image_digest"] = digests[prompt["id"]]


def load_model(cfg: Config, dtype: torch.dtype, processes: Processes) -> HookedDiffusionModel:
    """The model, on this process's device."""
    for library in ("diffusers", "transformers") if processes.rank else ():
        import_module(f"{library}.utils.logging").disable_progress_bar()
    names = dict(variant=cfg.variant, revision=cfg.revision)
    hooked = HookedDiffusionModel.from_pretrained(
        cfg.model_name, dtype, processes.device, cfg.cpu_offload, **names
    )
    hooked.pipe.set_progress_bar_config(disable=True)
    if decodes(cfg) and hasattr(getattr(hooked.pipe, "vae", None), "enable_slicing"):
        hooked.pipe.vae.enable_slicing()  # one image at a time: a batch of 16 may take more memory than its generation
    return hooked


def decodes(cfg: Config) -> bool:
    """Whether the pipeline has to decode what it samples."""
    return cfg.save_images and cfg.images is None


def pipeline_options(cfg: Config, hooked: HookedDiffusionModel) -> dict:
    """The pipeline's arguments that are the same for every batch."""
    options = cfg.pipeline_options()
    if cfg.images is not None:
        options["num_inference_steps"] = (
            1 + cfg.timesteps_per_image
        )  # of which the first is not kept
        if cfg.guidance_scale is None:
            options |= hooked.accepts(guidance_scale=1.0)
    extra = parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    if cfg.images is not None and "num_inference_steps" in extra:
        raise UsageError(
            "--images takes --timesteps_per_image, and no num_inference_steps of a generation"
        )
    return hooked.arguments(
        cfg.num_images_per_prompt, "pt" if decodes(cfg) else "latent", extra, **options
    )


def find_sites(
    hooked: HookedDiffusionModel,
    cfg: Config,
    texts: list[str],
    options: dict,
    store_dtype: torch.dtype,
) -> tuple[list[Site], int]:
    """(The hook points that --hook_names mean, how many steps are kept), from one step that is
    thrown away.

    Raises UsageError for a module that can't be hooked so; one that a glob found is left out.
    """
    dry = hooked.first_step(cfg.hook_names, texts, **kept(cfg), **options)
    names = list(dry["grid"])
    if cfg.side == "diff":
        shapes = {
            name: (tuple(dry["input"][name].shape[2:]), tuple(dry["output"][name].shape[2:]))
            for name in names
        }
        names = [name for name in names if shapes[name][0] == shapes[name][1]]
        for name in set(shapes) - set(names):
            if name in cfg.hook_names or not names:
                raise UsageError(
                    f"--side diff: {name} turns {shapes[name][0]} into {shapes[name][1]}"
                )
    sites = []
    for name in names:
        _, _, tokens, d = dry["input" if cfg.side == "input" else "output"][name].shape
        text_tokens = (cfg.text_tokens or tokens) if cfg.stream == "text" else None
        step_bytes = kept_bytes(text_tokens or tokens, d * store_dtype.itemsize, cfg)
        for rows, suffix in SUFFIXES[cfg.rows].items():
            point = HookPoint(name, cfg.side, cfg.stream, rows)
            sites.append(Site(point, suffix, text_tokens, step_bytes))
    num_steps = math.ceil(
        (dry["num_steps"] or options["num_inference_steps"]) / cfg.cache_every_n_timesteps
    )
    return sites, num_steps - (cfg.images is not None)


def add_seen_text(prompts: list[dict], seen: SeenText) -> None:
    """Note in the rows whose prompt the text encoders cut how far they receive it, as "seen"; say
    how many these are."""
    texts = {text: seen.text(text) for text in {prompt["prompt"] for prompt in prompts}}
    cut = [prompt for prompt in prompts if texts[prompt["prompt"]] != prompt["prompt"]]
    for prompt in cut:
        prompt["seen"] = texts[prompt["prompt"]]
    if cut:
        print(
            f'note: {len(cut)} prompts are longer than the text encoders take; "seen" in prompts.jsonl says what they get'
        )


def kept_bytes(tokens: int, vector_bytes: int, cfg: Config) -> int:
    """What one step of one row takes in a file, and in the one of indices beside it."""
    if cfg.tokens_per_step is None or tokens <= cfg.tokens_per_step:
        return tokens * vector_bytes
    return cfg.tokens_per_step * (vector_bytes + (2 if tokens <= 2**16 else 4))


def print_hooks(
    hooked: HookedDiffusionModel, texts: list[str], options: dict, cfg: Config, bytes_each: int
) -> None:
    """Print the tree of modules that can be hooked, with what they return and the MB a prompt that
    a file would take."""
    hook_names = ["**"] if cfg.hook_names == list(DEFAULT_HOOK_NAMES) else cfg.hook_names
    layouts, num_steps = hooked.layouts(hook_names, texts, stream=cfg.stream, **options)
    steps = -(-(num_steps or options["num_inference_steps"]) // cfg.cache_every_n_timesteps)
    found = {
        name: layout for name, layout in layouts.items() if not isinstance(layout, NotHookable)
    }
    parts = {name: name.split(".") for name in found}
    depth = {
        name: sum(".".join(p[:i]) in found for i in range(1, len(p))) for name, p in parts.items()
    }
    width = max((2 * depth[name] + len(name) for name in found), default=20)
    print(f"{'hook name':{width}} {'tokens x d':>14}  {'grid':12} {'MB a prompt':>11}")
    for name, layout in found.items():
        tokens, grid = max(layout.counts), " x ".join(map(str, layout.grid))
        megabytes = (
            steps * kept_bytes(tokens, layout.d * bytes_each, cfg) * cfg.num_images_per_prompt / 1e6
        )
        print(
            f"{'  ' * depth[name] + name:{width}} {f'{tokens} x {layout.d}':>14}  {grid:12} {megabytes:11.2f}"
        )
    reasons = Counter(
        layout.reason.partition(";")[0]
        for layout in layouts.values()
        if isinstance(layout, NotHookable)
    )
    for reason, count in reasons.most_common():
        print(f"{count} more can't be hooked: {reason}")
    some = (
        f"{cfg.tokens_per_step} random {cfg.stream} tokens"
        if cfg.tokens_per_step
        else f"{cfg.stream} tokens"
    )
    print(f"{steps} steps of {some}, {bytes_each} bytes a number; --rows both stores twice as much")


def what(cfg: Config) -> str:
    """What a row is of."""
    return "prompts" if cfg.images is None else "images"


def check_disk(
    folder: Path, cfg: Config, sites: list[Site], num_rows: int, num_steps: int, first: bool
) -> None:
    """Print how much will be written; raise UsageError, in the first process, if it does not
    fit."""
    needed = num_rows * num_steps * sum(site.step_bytes for site in sites)
    there = sum(path.stat().st_size for path in folder.glob("*.npy*"))
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()
    )
    free = shutil.disk_usage(existing).free
    names = ", ".join(dict.fromkeys(site.point.hook_name for site in sites))
    print(
        f"{num_rows // cfg.num_images_per_prompt} {what(cfg)} x {num_steps} steps of {names}: "
        f"{needed / 1e6:,.0f} MB in {folder}/ ({free / 1e9:,.0f} GB free)"
    )
    if first and needed - there > 0.98 * free:
        raise UsageError(
            f"{needed / 1e9:.3g} GB do not fit: {(free + there) / 1e9:.3g} GB are free for {cfg.out_dir}; "
            "lower --max_num_examples or --tokens_per_step, or raise --cache_every_n_timesteps"
        )


def settings_of(
    cfg: Config,
    hooked: HookedDiffusionModel,
    options: dict,
    sites: list[Site],
    device: torch.device,
    *dtypes: torch.dtype,
) -> dict:
    """All that decides the bytes: a collection is resumed with the same settings only. dtypes: of
    the model, in the files."""
    model_dtype, dtype = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return {
        "format": 1,
        "model": cfg.model_name,
        **{name: getattr(cfg, name) for name in SETTINGS},
        "pipeline": type(hooked.pipe).__name__,
        "hook_names": list(dict.fromkeys(site.point.hook_name for site in sites)),
        "dtype": dtype,
        "model_dtype": model_dtype,
        "device": device.type,
        "pipeline_kwargs": options,
        "fingerprints": pipeline_fingerprints(hooked.pipe, dtypes[0]),
        "text_tokens": {
            site.point.hook_name: site.text_tokens for site in sites if site.text_tokens is not None
        },
    }


def finish(
    collection: Collection, hooked: HookedDiffusionModel, sites: list[Site], cfg: Config
) -> None:
    """Give the files of a collection whose batches are all there their names and descriptions."""
    versions = {name: version(name) for name in VERSIONS}
    descriptions = {"samples": None} if cfg.save_samples else {}
    model = find_model(cfg.model_name)
    identity = {"id": collection.id, "prompts_digest": collection.prompts_digest}
    identity["model_folder"] = (
        relative_to(model, collection.out_dir) if Path(model).is_dir() else None
    )
    for site in sites:
        stem, shape = site.point.file_name, collection.shape(site.point.file_name)
        if shape is None:
            raise UsageError(
                f"{collection.out_dir / stem}.npy is missing; move its folder away and collect again"
            )
        extras = [f"{stem}.{extra}" for extra in ("lengths", "timesteps", "tokens")]
        descriptions |= {extra: None for extra in extras if collection.shape(extra)}
        name = site.point.hook_name
        component = hooked.modules()[name][0]
        descriptions[stem] = {
            **collection.settings,
            **collection.facts[name],
            **site.point.as_dict(),
            **identity,
            "denoiser": type(unwrap(hooked.denoisers[component])).__name__,
            "fingerprint": collection.settings["fingerprints"][component],
            "guidance_scale": collection.settings["pipeline_kwargs"].get("guidance_scale"),
            "tokens_per_step": shape[2] if f"{stem}.tokens" in descriptions else None,
            "shape": shape,
            "num_prompts": shape[0] // cfg.num_images_per_prompt,
            "versions": versions,
        }
    collection.finish(descriptions)
    for site in sites:
        record = descriptions[site.point.file_name]
        print(
            f"{collection.out_dir / site.point.file_name}.npy  {tuple(record['shape'])} {record['dtype']}"
        )


if __name__ == "__main__":
    run(main, Config)
