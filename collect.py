"""Stage 2: run a diffusion model on prompts and keep what its layers compute, as plain `.npy` files.

    python collect.py                                                        # the toy, 128 of its prompts
    python collect.py --model_name sd-legacy/stable-diffusion-v1-5 --dataset_name prompts.txt --max_num_examples 2000
    python collect.py --hook_names "up_blocks.1.attentions.*" mid_block --rows both --cache_every_n_timesteps 5
    python collect.py --list_hooks                                           # what can be hooked, and what it would store
    python collect.py --images photos --timesteps_per_image 4                # of real pictures, without generating

Reads   a diffusers folder or hub id, and prompts: a .txt, .csv, .jsonl or .parquet file, a hub data set, or one prompt;
        or pictures, a folder or a column of such a data set.
Writes  <out_dir>/<hook_name>[.uncond][.input|.diff][.text].npy, (prompts, steps, tokens, d), with a .json that describes
        it, prompts.jsonl (line p describes row p), samples.npy (the final latents, float16 or float32), and for the next
        start collect.json and progress.npy. Of text also <name>.lengths.npy (prompts,), each one's tokens; of
        pictures also <name>.timesteps.npy (prompts, steps).

Pictures go through the VAE, get the noise of timesteps spread over the schedule, and through the denoiser once for each,
without guidance. The pipeline samples for this, its sample being replaced after each step, see images.py.

Interrupted, the same command goes on, and the files have the bytes of an undisturbed run; a larger --max_num_examples
extends a finished collection. It does not decode pictures, shuffle, or keep anything that was not asked for.
"""

import shutil
import time
from collections import Counter
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from cli import check_positive, parse_object, resolve_device, resolve_dtype, run
from hook import HookedDiffusionModel, find_model
from hub import push
from images import Pictures, open_picture, seeded
from prompts import default_dataset, load_pictures, load_prompts
from rows import tensors, unwrap
from store import Collection

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
DEFAULT_HOOK_NAMES = ("up_blocks.1.attentions.1",)
FACTS = ("timesteps", "sigmas", "grid")  # of a hook point, the same for every prompt


@dataclass
class Config:
    hook_names: list[str] = field(default_factory=lambda: list(DEFAULT_HOOK_NAMES))  # modules of the denoiser, or globs
    list_hooks: bool = False  # print what can be hooked (of --hook_names, if given), with shapes and sizes, and stop
    model_name: str = "toy"  # a diffusers folder or hub id
    variant: str | None = None  # of the weights, such as fp16
    revision: str | None = None  # of the hub repository
    dataset_name: str | None = None  # prompt file, hub data set or one prompt (None: the model folder's prompts.csv)
    split: str = "train"  # of a hub data set
    column: str | None = None  # that holds the prompt (None: prompt, caption or text)
    negative_prompt: str | None = None  # a text for all prompts, or the column that holds each one's
    out_dir: str = "activations"  # folder for all files
    dtype: Dtype = "auto"  # of the model (auto: float32 on a CPU, else 16 bits)
    store_dtype: Dtype = "auto"  # in the files (auto: bfloat16 if the model is, else float16)
    num_inference_steps: int | None = None  # None: the pipeline's own default, as for the next three
    guidance_scale: float | None = None  # classifier-free guidance
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    num_images_per_prompt: int = 1  # rows a prompt; each with its own seed
    images: str | None = None  # a folder of pictures, or the column of --dataset_name that holds them, instead of generating
    timesteps_per_image: int = 4  # noise levels of each picture, spread over the schedule
    pipeline_kwargs: str = "{}"  # JSON object: anything else that the pipeline takes
    cpu_offload: bool = False  # keep only the running component on the GPU
    seed: int = 0  # row i is generated with seed + i
    batch_size: int = 16  # prompts generated together; it decides the last bits, so it can't change on resume
    max_num_examples: int | None = 128  # prompts (None: all of the data set); a larger number extends
    cache_every_n_timesteps: int = 1  # keep steps 0, n, 2n, ...
    rows: Literal["cond", "uncond", "both"] = "cond"  # of the guidance
    side: Literal["output", "input", "diff"] = "output"  # of the module (diff: output - input)
    stream: Literal["image", "text"] = "image"  # tokens of a joint block
    text_tokens: int | None = None  # of --stream text: room for this many (None: as many as the first batch has)
    device: str = "auto"  # auto (cuda, else mps, else cpu), cuda:1, ...
    hf_repo_id: str | None = None  # <user>/<name> on the Hugging Face Hub, to push the finished folder to as a data set


def batch_options(prompts, n):
    """Texts, negative prompts and generators of consecutive rows, `n` of them a prompt."""
    options = {"generator": seeded(p["seed"] for p in prompts)}
    if "negative_prompt" in prompts[0]:
        options["negative_prompt"] = [p["negative_prompt"] for p in prompts[::n]]
    return [p["prompt"] for p in prompts[::n]], options


def to_store(x, dtype, name):
    """Convert for the file; what does not fit in float16 is an error, never an infinity."""
    stored = x.to(dtype)
    if torch.isfinite(stored).all():
        return stored
    if torch.isfinite(x).all():
        raise ValueError(f"{name}: {x.abs().max():.3g} does not fit in float16; use --store_dtype bfloat16 or float32")
    raise ValueError(f"{name}: the model computed NaN or infinity; try another --dtype")


def batch_arrays(output, cache, places, cfg, store_dtype, text_tokens):
    """What a batch adds to each file, {name: (rows, ...)}, and the sums over it of |x|, one a step and file: float64."""
    arrays, norms = {}, []
    for name, suffix, stem in places:
        x = cache[("input" if cfg.side == "input" else "output") + suffix].pop(name)
        if cfg.side == "diff":
            x = x.float() - cache["input" + suffix].pop(name).float()
        norms.append(x.float().norm(dim=-1).sum((0, 2), dtype=torch.float64))
        if text_tokens:
            if x.shape[2] > text_tokens[name]:
                here = f"{x.shape[2]} text tokens, and the file has room for {text_tokens[name]}"
                raise ValueError(f"{name}: a prompt has {here}; collect again with a larger --text_tokens")
            x = torch.nn.functional.pad(x, (0, 0, 0, text_tokens[name] - x.shape[2]))
            arrays[f"{stem}.lengths"] = cache["lengths" + suffix][name]
        if cfg.images is not None:
            arrays[f"{stem}.timesteps"] = cache["timesteps"][name].repeat(len(x), 1)
        arrays[stem] = to_store(x, store_dtype, name)
    for sample in tensors(output)[:1]:
        half = torch.float16 if store_dtype == torch.float16 else torch.float32
        arrays["samples"] = to_store(sample.cpu(), half, "the final samples")
    return arrays, torch.cat(norms).numpy()


def without_first_step(cache):
    """A sampling begins with noise alone, in which there is no picture; and a timestep that is met twice is kept once."""
    times = cache["timesteps"]
    kept = {name: [i for i in range(1, len(t)) if t[i] != t[i - 1]] for name, t in times.items()}
    for key in [key for key in cache if key.startswith(("input", "output", "timesteps", "sigmas"))]:
        for name, x in cache[key].items():
            cache[key][name] = x[kept[name]] if x.ndim == 1 else x[:, kept[name]]


def list_hooks(hooked, hook_names, prompts, options, cfg, bytes_each):
    """Print the tree of modules that can be hooked, with what they return and the MB a prompt that a file would take."""
    layouts, num_steps = hooked.layouts(hook_names, prompts, stream=cfg.stream, **options)
    steps = -(-(num_steps or options["num_inference_steps"]) // cfg.cache_every_n_timesteps)
    found = {name: layout for name, layout in layouts.items() if not isinstance(layout, str)}
    parts = {name: name.split(".") for name in found}
    depth = {name: sum(".".join(p[:i]) in found for i in range(1, len(p))) for name, p in parts.items()}
    width = max((2 * depth[name] + len(name) for name in found), default=20)
    print(f"{'hook name':{width}} {'tokens x d':>14}  {'grid':12} {'MB a prompt':>11}")
    for name, layout in found.items():
        tokens, grid = max(layout.counts), " x ".join(map(str, layout.grid))
        megabytes = steps * tokens * layout.d * bytes_each * cfg.num_images_per_prompt / 1e6
        print(f"{'  ' * depth[name] + name:{width}} {f'{tokens} x {layout.d}':>14}  {grid:12} {megabytes:11.2f}")
    reasons = Counter(layout.partition(";")[0] for layout in layouts.values() if isinstance(layout, str))
    for reason, count in reasons.most_common():
        print(f"{count} more can't be hooked: {reason}")
    print(f"{steps} steps of {cfg.stream} tokens, {bytes_each} bytes a number; --rows both stores twice as much")


def main(cfg):
    # 1. Prompts: one row of every file for each prompt and image
    check_positive(cfg, "batch_size", "num_images_per_prompt", "cache_every_n_timesteps", "max_num_examples", "text_tokens")
    check_positive(cfg, "num_inference_steps", "timesteps_per_image", "height", "width")
    if cfg.images is None:
        dataset_name = cfg.dataset_name or default_dataset(find_model(cfg.model_name))
        texts = load_prompts(dataset_name, cfg.split, cfg.column, cfg.negative_prompt, cfg.max_num_examples)
    else:
        if cfg.num_inference_steps is not None or cfg.cache_every_n_timesteps > 1 or cfg.negative_prompt is not None:
            raise ValueError("--images takes --timesteps_per_image, and no steps or negative prompts of a generation")
        texts, sources = load_pictures(cfg.images, cfg.dataset_name, cfg.split, cfg.column, cfg.max_num_examples)
    n = cfg.num_images_per_prompt
    prompts = [{"id": i, **t, "seed": cfg.seed + i * n + j} for i, t in enumerate(texts) for j in range(n)]

    # 2. The model, and what its layers give in one step that is thrown away
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    store_dtype = half if cfg.store_dtype == "auto" else getattr(torch, cfg.store_dtype)
    hooked = HookedDiffusionModel.from_pretrained(
        cfg.model_name, dtype, device, cfg.cpu_offload, variant=cfg.variant, revision=cfg.revision
    )
    hooked.pipe.set_progress_bar_config(disable=True)
    options = {name: getattr(cfg, name) for name in ("num_inference_steps", "guidance_scale", "height", "width")}
    if cfg.images is not None:
        options["num_inference_steps"] = 1 + cfg.timesteps_per_image  # of which the first is not kept
        if cfg.guidance_scale is None:
            options |= hooked.accepts(guidance_scale=1.0)
    extra = parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    options = hooked.arguments(n, "latent", extra, **options)  # latent: decoding would cost time and is not asked for
    sides = dict(save_input=cfg.side != "output", save_output=cfg.side != "input", rows=cfg.rows, stream=cfg.stream)
    text, batch = batch_options(prompts[: cfg.batch_size * n], n)
    if cfg.list_hooks:
        names = ["**"] if cfg.hook_names == list(DEFAULT_HOOK_NAMES) else cfg.hook_names
        return list_hooks(hooked, names, text, options | batch, cfg, store_dtype.itemsize)
    pictures = None
    if cfg.images is not None:
        pictures = Pictures(hooked, text[0], options, cfg.width, cfg.height)
        for source in tqdm(sources, "reading", unit="picture"):  # all can be read, before anything is written
            open_picture(source)
    dry = hooked.first_step(cfg.hook_names, text, **sides, **options, **batch)
    hook_names = list(dry["grid"])
    if cfg.side == "diff":
        shapes = {name: (tuple(dry["input"][name].shape[2:]), tuple(dry["output"][name].shape[2:])) for name in hook_names}
        hook_names = [name for name in hook_names if shapes[name][0] == shapes[name][1]]
        for name in set(shapes) - set(hook_names):
            if name in cfg.hook_names or not hook_names:
                raise ValueError(f"--side diff: {name} turns {shapes[name][0]} into {shapes[name][1]}")
    side = "input" if cfg.side == "input" else "output"
    text_tokens = {name: cfg.text_tokens or dry[side][name].shape[2] for name in hook_names if cfg.stream == "text"}

    # 3. Room on the disk, before anything is written
    suffixes = {"cond": ("",), "uncond": ("",), "both": ("", "_uncond")}[cfg.rows]
    end = {"output": "", "input": ".input", "diff": ".diff"}[cfg.side] + {"image": "", "text": ".text"}[cfg.stream]
    uncond = {"": ".uncond" if cfg.rows == "uncond" else "", "_uncond": ".uncond"}
    places = [(name, suffix, name + uncond[suffix] + end) for name in hook_names for suffix in suffixes]
    num_steps = -(-(dry["num_steps"] or options["num_inference_steps"]) // cfg.cache_every_n_timesteps) - (pictures is not None)
    vectors = {name: text_tokens.get(name, x.shape[2]) * x.shape[3] for name, x in dry[side].items()}
    need = len(prompts) * num_steps * sum(vectors[name] for name, _, _ in places) * store_dtype.itemsize
    out_dir = Path(cfg.out_dir)
    there = sum(f.stat().st_size for f in out_dir.glob("*.npy*")) if out_dir.is_dir() else 0
    free = shutil.disk_usage(next(p for p in (out_dir.absolute(), *out_dir.absolute().parents) if p.is_dir())).free
    print(
        f"{len(texts)} {'pictures' if pictures else 'prompts'} x {num_steps} steps of {', '.join(hook_names)}: "
        f"{need / 1e6:,.0f} MB in {out_dir}/ ({free / 1e9:,.0f} GB free)"
    )
    if need - there > 0.98 * free:
        raise ValueError(
            f"{need / 1e9:.3g} GB do not fit: {(free + there) / 1e9:.3g} GB are free for {cfg.out_dir}; "
            "lower --max_num_examples or raise --cache_every_n_timesteps"
        )

    # 4. Generate and write, batch by batch
    settings = {"format": 1, "model": cfg.model_name, "variant": cfg.variant, "revision": cfg.revision}
    settings |= {"pipeline": type(hooked.pipe).__name__, "hook_names": hook_names, "rows": cfg.rows, "side": cfg.side}
    settings |= {"stream": cfg.stream, "cache_every_n_timesteps": cfg.cache_every_n_timesteps, "batch_size": cfg.batch_size}
    settings |= {"seed": cfg.seed, "dtype": str(store_dtype)[6:], "model_dtype": str(dtype)[6:], "device": device.type}
    settings |= {"num_images_per_prompt": n, "pipeline_kwargs": options, "images": cfg.images, "text_tokens": text_tokens}
    collection = Collection(out_dir, settings, prompts, cfg.batch_size * n)
    pending, written, started = collection.pending(), 0, time.time()
    todo = sum(len(collection.rows_of(b)) for b in pending) // n
    bar = tqdm(total=len(texts), initial=len(texts) - todo, unit="prompt", desc="collecting")
    with closing(collection), bar:
        for b in pending:
            rows, every = collection.rows_of(b), cfg.cache_every_n_timesteps
            text, batch = batch_options(rows, n)
            shown = pictures and pictures.in_place([sources[r["id"]] for r in rows], [r["seed"] for r in rows])
            with shown or nullcontext():
                output, cache = hooked.run_with_cache(
                    hook_names, text, cache_every_n_timesteps=every, **sides, **options, **batch
                )
            if pictures:
                without_first_step(cache)
            cache["grid"] |= {name: (tokens,) for name, tokens in text_tokens.items()}
            arrays, norms = batch_arrays(output, cache, places, cfg, store_dtype, text_tokens)
            facts = {
                name: {k: torch.as_tensor(cache[k][name]).tolist() for k in FACTS if name in cache[k]} for name in hook_names
            }
            collection.write(b, arrays, norms, facts)
            bar.update(len(text))
            written += sum(a.nbytes for a in arrays.values())
            bar.set_postfix_str(f"{written / 1e6 / (time.time() - started):.0f} MB/s")

    # 5. Describe the files
    steps = [len(collection.facts[name]["timesteps"]) for name, _, _ in places]
    descriptions = {} if collection.shape("samples") is None else {"samples": None}
    for (name, suffix, stem), norms in zip(places, np.split(collection.sums(), np.cumsum(steps)[:-1])):
        shape = collection.shape(stem)
        if shape is None:
            raise ValueError(f"{out_dir / stem}.npy is missing; move its folder away and collect again")
        denoiser = hooked.denoisers[hooked.modules()[name][0]]
        record = settings | {"hook_name": name, "denoiser": type(unwrap(denoiser)).__name__, **collection.facts[name]}
        record |= {"rows": "uncond" if uncond[suffix] else "cond", "guidance_scale": options.get("guidance_scale")}
        tokens = collection.read(f"{stem}.lengths").sum() if text_tokens else shape[0] * shape[2]  # of all prompts
        record |= {"shape": shape, "num_prompts": len(texts), "mean_norm": (norms / tokens).tolist()}
        descriptions |= {f"{stem}.{extra}": None for extra in ("lengths", "timesteps") if collection.shape(f"{stem}.{extra}")}
        descriptions[stem] = record | {"versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "numpy")}}
    collection.finish(descriptions)
    for stem in (stem for _, _, stem in places):
        print(f"{out_dir / stem}.npy  {tuple(descriptions[stem]['shape'])} {descriptions[stem]['dtype']}")
    if cfg.hf_repo_id:
        print(push(out_dir, cfg.hf_repo_id, "activations"))
    what = "pictures" if pictures else "prompts"
    where = "" if cfg.out_dir == Config().out_dir else f" --data {cfg.out_dir}"
    print(f"{what} in {out_dir / 'prompts.jsonl'}, final samples in {out_dir / 'samples.npy'}; next: python train.py{where}")


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
