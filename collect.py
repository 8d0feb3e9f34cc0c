"""Stage 2: run a diffusion model on prompts and keep what its layers compute, as plain `.npy` files.

    python collect.py                                                        # the toy, 256 of its prompts
    python collect.py --model_name sd-legacy/stable-diffusion-v1-5 --dataset_name prompts.txt --max_num_examples 2000
    python collect.py --hook_names "up_blocks.1.attentions.*" mid_block --rows both --cache_every_n_timesteps 5

Reads   a diffusers folder or hub id, and prompts: a .txt, .csv, .jsonl or .parquet file, a hub data set, or one prompt.
Writes  <out_dir>/<hook_name>[.uncond][.input|.diff].npy, (prompts, steps, tokens, d), with a .json that describes it,
        prompts.jsonl (line p describes row p), samples.npy (the final latents), collect.json and progress.npy.

Interrupted, the same command goes on, and the files have the bytes of an undisturbed run; a larger --max_num_examples
extends a finished collection. It does not decode pictures, shuffle, or keep anything that was not asked for.
"""

import inspect
import shutil
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from cli import resolve_device, resolve_dtype, run
from hook import HookedDiffusionModel, find_model
from rows import first_tensor, unwrap
from store import Collection, default_dataset, load_prompts

FACTS = ("timesteps", "sigmas", "grid")  # of a hook point, the same for every prompt


@dataclass
class Config:
    hook_names: list[str] = field(
        default_factory=lambda: ["up_blocks.1.attentions.1"]
    )  # modules of the denoiser; globs
    model_name: str = "toy"  # a diffusers folder or hub id
    variant: str | None = None  # of the weights, such as fp16
    revision: str | None = None  # of the hub repository
    dataset_name: str | None = None  # prompt file, hub data set or one prompt (None: the model folder's prompts.csv)
    split: str = "train"  # of a hub data set
    column: str | None = None  # that holds the prompt (None: prompt, caption or text)
    negative_prompt: str | None = None  # a text for all prompts, or the column that holds each one's
    out_dir: str = "activations"  # folder for all files
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = (
        "auto"  # of the model (auto: float32 on a CPU, else 16 bits)
    )
    store_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # in the files (auto: 16 bits)
    num_inference_steps: int | None = None  # None: the pipeline's own default, as for the next three
    guidance_scale: float | None = None  # classifier-free guidance
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    num_images_per_prompt: int = 1  # rows a prompt; each with its own seed
    pipeline_kwargs: str = "{}"  # JSON object: anything else that the pipeline takes
    cpu_offload: bool = False  # keep only the running component on the GPU
    seed: int = 0  # row i is generated with seed + i
    batch_size: int = 16  # prompts generated together; part of what decides the last bits
    max_num_examples: int | None = 256  # prompts (None: all of the data set); a larger number extends
    cache_every_n_timesteps: int = 1  # keep steps 0, n, 2n, ...
    rows: Literal["cond", "uncond", "both"] = "cond"  # of the guidance
    side: Literal["output", "input", "diff"] = "output"  # of the module (diff: output - input)
    stream: Literal["image", "text"] = "image"  # tokens of a joint block
    device: str = "auto"  # auto (cuda, else mps, else cpu), cuda:1, ...


def batch_options(rows, n):
    """Prompts, negative prompts and generators of consecutive rows, `n` of them a prompt."""
    options = {"generator": [torch.Generator().manual_seed(r["seed"]) for r in rows]}
    if "negative_prompt" in rows[0]:
        options["negative_prompt"] = [r["negative_prompt"] for r in rows[::n]]
    return [r["prompt"] for r in rows[::n]], options


def file_name(hook_name, suffix, cfg):
    return hook_name + suffix.replace("_", ".") + {"output": "", "input": ".input", "diff": ".diff"}[cfg.side]


def to_store(x, dtype, name):
    """Convert for the file; what does not fit in float16 is an error, never an infinity."""
    stored = x.to(dtype)
    if not torch.isfinite(stored).all():
        if torch.isfinite(x).all():
            raise ValueError(
                f"{name}: an activation of {x.abs().max():.3g} does not fit in {dtype}; use --store_dtype bfloat16 or float32"
            )
        raise ValueError(f"{name}: the model computed NaN or infinity; try another --dtype")
    return stored


def main(cfg):
    # 1. prompts: one row of every file for each prompt and image
    dataset_name = cfg.dataset_name or default_dataset(find_model(cfg.model_name))
    prompts = load_prompts(dataset_name, cfg.split, cfg.column, cfg.negative_prompt, cfg.max_num_examples)
    n = cfg.num_images_per_prompt
    rows = [{"id": i, "seed": cfg.seed + i * n + j} | p for i, p in enumerate(prompts) for j in range(n)]

    # 2. the model, and what its layers give in one step that is thrown away
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    store_dtype = half if cfg.store_dtype == "auto" else getattr(torch, cfg.store_dtype)
    weights = {k: v for k in ("variant", "revision") if (v := getattr(cfg, k)) is not None}
    hooked = HookedDiffusionModel.from_pretrained(cfg.model_name, dtype, None if cfg.cpu_offload else device, **weights)
    if cfg.cpu_offload:
        hooked.pipe.enable_model_cpu_offload(device=device)
    hooked.pipe.set_progress_bar_config(disable=True)
    options = {name: getattr(cfg, name) for name in ("num_inference_steps", "guidance_scale", "height", "width")}
    options = hooked.arguments(n, cfg.pipeline_kwargs, **options)
    if "output_type" in inspect.signature(type(hooked.pipe).__call__).parameters:
        options["output_type"] = "latent"  # decoding would cost time and is not asked for
    sides = dict(save_input=cfg.side != "output", save_output=cfg.side != "input", rows=cfg.rows, stream=cfg.stream)
    text, batch = batch_options(rows[: cfg.batch_size * n], n)
    step = hooked.first_step(cfg.hook_names, text, **sides, **options, **batch)
    hook_names = list(step["grid"])

    # 3. room on the disk, before anything is written
    side = "input" if cfg.side == "input" else "output"
    suffixes = {"cond": ("",), "uncond": ("",), "both": ("", "_uncond")}[cfg.rows]
    num_steps = -(-(step["num_steps"] or options["num_inference_steps"]) // cfg.cache_every_n_timesteps)
    sizes = {name: num_steps * step[side][name][0, 0].numel() * store_dtype.itemsize for name in hook_names}
    need, out_dir = len(rows) * len(suffixes) * sum(sizes.values()), Path(cfg.out_dir)
    there = sum(f.stat().st_size for f in out_dir.glob("*.npy*")) if out_dir.is_dir() else 0
    free = shutil.disk_usage(next(p for p in (out_dir.absolute(), *out_dir.absolute().parents) if p.is_dir())).free
    print(
        f"{len(prompts)} prompts x {num_steps} steps of {', '.join(hook_names)}: "
        f"{need / 1e6:,.0f} MB in {out_dir}/ ({free / 1e9:,.0f} GB free)"
    )
    if need - there > 0.98 * free:
        raise ValueError(
            f"{need / 1e9:.1f} GB do not fit: {(free + there) / 1e9:.1f} GB are free for {cfg.out_dir}; "
            "lower --max_num_examples or raise --cache_every_n_timesteps"
        )

    # 4. generate and write, batch by batch
    settings = {
        "format": 1,
        "model": cfg.model_name,
        "variant": cfg.variant,
        "revision": cfg.revision,
        "hook_names": hook_names,
        "rows": cfg.rows,
        "side": cfg.side,
        "stream": cfg.stream,
        "cache_every_n_timesteps": cfg.cache_every_n_timesteps,
        "dtype": str(dtype)[6:],
        "store_dtype": str(store_dtype)[6:],
        "batch_size": cfg.batch_size,
        "seed": cfg.seed,
        "device": device.type,
        "pipeline": type(hooked.pipe).__name__,
        "pipeline_kwargs": options,
    }
    collection = Collection(out_dir, settings, rows, cfg.batch_size * n)
    pending, started = collection.pending(), time.time()
    written, todo = 0, sum(len(collection.rows_of(b)) for b in pending) // n
    bar = tqdm(total=len(prompts), initial=len(prompts) - todo, unit="prompt", desc="collecting")
    for b in pending:
        text, batch = batch_options(collection.rows_of(b), n)
        output, cache = hooked.run_with_cache(
            hook_names, text, cache_every_n_timesteps=cfg.cache_every_n_timesteps, **sides, **options, **batch
        )
        arrays, norms = {}, []
        for name in hook_names:
            for suffix in suffixes:
                x = cache[side + suffix].pop(name)
                if cfg.side == "diff":
                    before = cache["input" + suffix].pop(name)
                    if before.shape != x.shape:
                        raise ValueError(f"--side diff: {name} turns {tuple(before.shape)} into {tuple(x.shape)}")
                    x = x.float() - before.float()
                norms.append(x.float().norm(dim=-1).sum((0, 2), dtype=torch.float64))  # by step
                arrays[file_name(name, suffix, cfg)] = to_store(x, store_dtype, name)
        if (sample := first_tensor(output)) is not None:
            arrays["samples"] = to_store(sample.cpu(), torch.float16, "samples")
        facts = {
            name: {k: torch.as_tensor(v[name]).tolist() for k, v in cache.items() if k in FACTS and name in v}
            for name in hook_names
        }
        collection.write(b, arrays, torch.cat(norms).numpy(), facts)
        bar.update(len(text))
        written += sum(a.nbytes for a in arrays.values())
        bar.set_postfix_str(f"{written / 1e6 / (time.time() - started):.0f} MB/s")
    bar.close()

    # 5. describe the files
    places = [(name, suffix) for name in hook_names for suffix in suffixes]
    norms = np.split(
        collection.sums(), np.cumsum([len(collection.facts[name]["timesteps"]) for name, _ in places])[:-1]
    )
    libraries = {p: version(p) for p in ("torch", "diffusers", "transformers", "numpy")}
    descriptions = {"samples": None}
    for (name, suffix), norm in zip(places, norms):
        stem = file_name(name, suffix, cfg)
        shape = collection.shape(stem)
        descriptions[stem] = (
            settings
            | collection.facts[name]
            | {
                "hook_name": name,
                "rows": suffix[1:] or ("uncond" if cfg.rows == "uncond" else "cond"),
                "denoiser": type(unwrap(hooked.denoisers[hooked.modules()[name][0]])).__name__,
                "shape": shape,
                "num_prompts": len(prompts),
                "num_images_per_prompt": n,
                "dtype": str(store_dtype)[6:],
                "model_dtype": str(dtype)[6:],
                "guidance_scale": options.get("guidance_scale"),
                "mean_norm": (norm / (shape[0] * shape[2])).tolist(),
                "versions": libraries,
            }
        )
    if not collection.has("samples"):
        del descriptions["samples"]
    collection.finish(descriptions)
    for stem, record in descriptions.items():
        if record:
            print(f"{out_dir / stem}.npy  {tuple(record['shape'])} {record['dtype']}")
    print(f"prompts in {out_dir / 'prompts.jsonl'}, final samples in {out_dir / 'samples.npy'}; next: python train.py")


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
