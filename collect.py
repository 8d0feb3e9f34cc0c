"""Stage 2: run a diffusion model on prompts and keep what its layers compute, as plain `.npy` files.

    python collect.py                                                        # the toy, 128 of its prompts
    python collect.py --model_name sd-legacy/stable-diffusion-v1-5 --dataset_name prompts.txt --max_num_examples 2000
    python collect.py --hook_names "up_blocks.1.attentions.*" mid_block --rows both --cache_every_n_timesteps 5
    python collect.py --list_hooks                                           # what can be hooked, and what it would store
    python collect.py --images photos --timesteps_per_image 4                # of real pictures, without generating
    torchrun --nproc_per_node 4 collect.py                                   # on four GPUs, into the same files

Reads   a diffusers folder or hub id, and prompts: a .txt, .csv, .jsonl or .parquet file, a hub data set, or one prompt;
        or pictures, a folder or a column of such a data set.
Writes  <out_dir>/<hook_name>[.uncond][.input|.diff][.text].npy, (prompts, steps, tokens, d), with a .json that describes
        it, prompts.jsonl (line p describes row p), samples.npy (the final latents, float16 or float32), and for the next
        start collect.json and progress.npy. Of text also <name>.lengths.npy (prompts,), each one's tokens; of
        pictures also <name>.timesteps.npy (prompts, steps); with --tokens_per_step n <name>.tokens.npy (prompts, steps, n),
        which tokens of the raster they are, the same for all files of as many. Several machines: <out_dir>/node<i>/ each.

Pictures go through the VAE, get the noise of timesteps spread over the schedule, and through the denoiser once for each,
without guidance. The pipeline samples for this, its sample being replaced after each step, see images.py.

While a batch is generated, the one before it is copied from the GPU, converted and written; one may wait: three are in memory.

Interrupted, the same command goes on, and the files have the bytes of an undisturbed run, whatever the number of processes; a
larger --max_num_examples extends a finished collection. It does not decode pictures, shuffle, or keep anything that was not
asked for.
"""

import math
import shutil
import time
from collections import Counter
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from cli import GenerationConfig, check_positive, parse_object, resolve_device, resolve_dtype, run
from errors import UsageError
from hook import HookedDiffusionModel, NotHookable, find_model, tensors, unwrap
from hub import push
from images import Pictures, open_picture, seeded
from processes import Processes
from prompts import default_dataset, load_pictures, load_prompts
from store import Collection
from writer import Writer

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
DEFAULT_HOOK_NAMES = ("up_blocks.1.attentions.1",)
FACTS = ("timesteps", "sigmas", "grid")  # of a hook point, the same for every prompt


@dataclass
class Config(GenerationConfig):
    hook_names: list[str] = field(default_factory=lambda: list(DEFAULT_HOOK_NAMES))  # modules of the denoiser, or globs
    list_hooks: bool = False  # print what can be hooked (of --hook_names, if given), with shapes and sizes, and stop
    max_num_examples: int | None = 128  # prompts (None: all of the data set); a larger number extends
    num_images_per_prompt: int = 1  # rows a prompt; each with its own seed
    images: str | None = None  # a folder of pictures, or the column of --dataset_name that holds them, instead of generating
    timesteps_per_image: int = 4  # noise levels of each picture, spread over the schedule
    rows: Literal["cond", "uncond", "both"] = "cond"  # of the guidance
    side: Literal["output", "input", "diff"] = "output"  # of the module (diff: output - input)
    stream: Literal["image", "text"] = "image"  # tokens of a joint block
    text_tokens: int | None = None  # of --stream text: room for this many (None: as many as the first batch has)
    cache_every_n_timesteps: int = 1  # keep steps 0, n, 2n, ...
    tokens_per_step: int | None = None  # keep a random choice of so many of each picture's tokens at each step (None: all)
    store_dtype: Dtype = "auto"  # in the files (auto: bfloat16 if the model is, else float16)
    batch_size: int = 16  # prompts generated together; it decides the last bits, so it can't change on resume
    out_dir: str = "activations"  # folder for all files
    hf_repo_id: str | None = None  # <user>/<name> on the Hugging Face Hub, to push the finished folder to as a data set


def batch_options(prompts, n):
    """Texts, negative prompts and generators of consecutive rows, `n` of them a prompt."""
    options = {"generator": seeded(p["seed"] for p in prompts)}
    if "negative_prompt" in prompts[0]:
        options["negative_prompt"] = [p["negative_prompt"] for p in prompts[::n]]
    return [p["prompt"] for p in prompts[::n]], options


def random_tokens(seeds, n):
    """For `run_with_cache(choose=...)`: of each row a random n of its tokens at a step, in their order, (rows, n) int64.

    The choice depends on the row's seed, the step and the number of tokens alone. None where there are no more than n.
    """

    @lru_cache(None)  # for one hook point after another
    def choose(step, tokens):
        if tokens <= n:
            return None
        draw = lambda seed: np.random.default_rng([seed % 2**64, step]).choice(tokens, n, replace=False)
        return torch.from_numpy(np.sort([draw(seed) for seed in seeds], 1))

    return choose


def to_store(x, dtype, name):
    """Convert for the file; what does not fit in float16 is an error, never an infinity."""
    stored = x.to(dtype)
    if torch.isfinite(stored).all():
        return stored
    if torch.isfinite(x).all():
        raise UsageError(f"{name}: {x.abs().max():.3g} does not fit in float16; use --store_dtype bfloat16 or float32")
    raise UsageError(f"{name}: the model computed NaN or infinity; try another --dtype")


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
                raise UsageError(f"{name}: a prompt has {here}; collect again with a larger --text_tokens")
            x = torch.nn.functional.pad(x, (0, 0, 0, text_tokens[name] - x.shape[2]))
            arrays[f"{stem}.lengths"] = cache["lengths" + suffix][name]
        if cfg.images is not None:
            arrays[f"{stem}.timesteps"] = cache["timesteps"][name].repeat(len(x), 1)
        if name in cache.get("tokens", {}):
            small = math.prod(cache["grid"][name]) <= 2**16
            arrays[f"{stem}.tokens"] = cache["tokens"][name].to(torch.uint16 if small else torch.uint32)
        arrays[stem] = to_store(x, store_dtype, name)
    for sample in tensors(output)[:1]:
        half = torch.float16 if store_dtype == torch.float16 else torch.float32
        arrays["samples"] = to_store(sample.cpu(), half, "the final samples")
    return arrays, torch.cat(norms).numpy()


def without_first_step(cache):
    """A sampling begins with noise alone, in which there is no picture; and a timestep that is met twice is kept once."""
    times = cache["timesteps"]
    kept = {name: [i for i in range(1, len(t)) if t[i] != t[i - 1]] for name, t in times.items()}
    for key in [key for key in cache if key.startswith(("input", "output", "timesteps", "sigmas", "tokens"))]:
        for name, x in cache[key].items():
            cache[key][name] = x[kept[name]] if x.ndim == 1 else x[:, kept[name]]


def kept_bytes(tokens, vector_bytes, cfg):
    """What one step of one row takes in a file, and in the one of indices beside it."""
    if cfg.tokens_per_step is None or tokens <= cfg.tokens_per_step:
        return tokens * vector_bytes
    return cfg.tokens_per_step * (vector_bytes + (2 if tokens <= 2**16 else 4))


def list_hooks(hooked, hook_names, prompts, options, cfg, bytes_each):
    """Print the tree of modules that can be hooked, with what they return and the MB a prompt that a file would take."""
    layouts, num_steps = hooked.layouts(hook_names, prompts, stream=cfg.stream, **options)
    steps = -(-(num_steps or options["num_inference_steps"]) // cfg.cache_every_n_timesteps)
    found = {name: layout for name, layout in layouts.items() if not isinstance(layout, NotHookable)}
    parts = {name: name.split(".") for name in found}
    depth = {name: sum(".".join(p[:i]) in found for i in range(1, len(p))) for name, p in parts.items()}
    width = max((2 * depth[name] + len(name) for name in found), default=20)
    print(f"{'hook name':{width}} {'tokens x d':>14}  {'grid':12} {'MB a prompt':>11}")
    for name, layout in found.items():
        tokens, grid = max(layout.counts), " x ".join(map(str, layout.grid))
        megabytes = steps * kept_bytes(tokens, layout.d * bytes_each, cfg) * cfg.num_images_per_prompt / 1e6
        print(f"{'  ' * depth[name] + name:{width}} {f'{tokens} x {layout.d}':>14}  {grid:12} {megabytes:11.2f}")
    reasons = Counter(layout.reason.partition(";")[0] for layout in layouts.values() if isinstance(layout, NotHookable))
    for reason, count in reasons.most_common():
        print(f"{count} more can't be hooked: {reason}")
    some = f"{cfg.tokens_per_step} random {cfg.stream} tokens" if cfg.tokens_per_step else f"{cfg.stream} tokens"
    print(f"{steps} steps of {some}, {bytes_each} bytes a number; --rows both stores twice as much")


def main(cfg):
    # 1. Prompts: one row of every file for each prompt and image
    check_positive(cfg, "batch_size", "num_images_per_prompt", "cache_every_n_timesteps", "max_num_examples", "text_tokens")
    check_positive(cfg, "num_inference_steps", "timesteps_per_image", "height", "width", "tokens_per_step")
    if cfg.tokens_per_step and cfg.stream == "text":
        raise UsageError("--tokens_per_step is for image tokens; texts are stored whole, padded to --text_tokens")
    if cfg.images is None:
        dataset_name = cfg.dataset_name or default_dataset(find_model(cfg.model_name))
        texts = load_prompts(dataset_name, cfg.split, cfg.column, cfg.negative_prompt, cfg.max_num_examples)
    else:
        if cfg.num_inference_steps is not None or cfg.cache_every_n_timesteps > 1 or cfg.negative_prompt is not None:
            raise UsageError("--images takes --timesteps_per_image, and no steps or negative prompts of a generation")
        texts, sources = load_pictures(cfg.images, cfg.dataset_name, cfg.split, cfg.column, cfg.max_num_examples)
    n = cfg.num_images_per_prompt
    prompts = [{"id": i, **t, "seed": cfg.seed + i * n + j} for i, t in enumerate(texts) for j in range(n)]

    # 2. The model, each process its own, and what its layers give in one step that is thrown away
    processes = Processes(resolve_device(cfg.device))
    device, node, nodes, first = processes.device, processes.node, processes.nodes, processes.local_rank == 0
    dtype = resolve_dtype(cfg.dtype, device)
    for library in ("diffusers", "transformers") if processes.rank else ():
        import_module(f"{library}.utils.logging").disable_progress_bar()
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    store_dtype = half if cfg.store_dtype == "auto" else getattr(torch, cfg.store_dtype)
    hooked = HookedDiffusionModel.from_pretrained(
        cfg.model_name, dtype, device, cfg.cpu_offload, variant=cfg.variant, revision=cfg.revision
    )
    hooked.pipe.set_progress_bar_config(disable=True)
    options = cfg.pipeline_options()
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
        for source in tqdm(
            sources if first else [], "reading", unit="picture", disable=processes.rank > 0
        ):  # before anything is written
            open_picture(source)
    dry = hooked.first_step(cfg.hook_names, text, **sides, **options, **batch)
    hook_names = list(dry["grid"])
    if cfg.side == "diff":
        shapes = {name: (tuple(dry["input"][name].shape[2:]), tuple(dry["output"][name].shape[2:])) for name in hook_names}
        hook_names = [name for name in hook_names if shapes[name][0] == shapes[name][1]]
        for name in set(shapes) - set(hook_names):
            if name in cfg.hook_names or not hook_names:
                raise UsageError(f"--side diff: {name} turns {shapes[name][0]} into {shapes[name][1]}")
    side = "input" if cfg.side == "input" else "output"
    text_tokens = {name: cfg.text_tokens or dry[side][name].shape[2] for name in hook_names if cfg.stream == "text"}

    # 3. Room on the disk, before anything is written
    suffixes = {"cond": ("",), "uncond": ("",), "both": ("", "_uncond")}[cfg.rows]
    end = {"output": "", "input": ".input", "diff": ".diff"}[cfg.side] + {"image": "", "text": ".text"}[cfg.stream]
    uncond = {"": ".uncond" if cfg.rows == "uncond" else "", "_uncond": ".uncond"}
    places = [(name, suffix, name + uncond[suffix] + end) for name in hook_names for suffix in suffixes]
    num_steps = -(-(dry["num_steps"] or options["num_inference_steps"]) // cfg.cache_every_n_timesteps) - (pictures is not None)
    counts = {name: text_tokens.get(name, x.shape[2]) for name, x in dry[side].items()}
    step_bytes = {name: kept_bytes(counts[name], x.shape[3] * store_dtype.itemsize, cfg) for name, x in dry[side].items()}
    what, out_dir = "pictures" if pictures else "prompts", Path(cfg.out_dir)
    if other := next(out_dir.glob("node*/collect.json" if nodes == 1 else "collect.json"), None):
        machines = "several machines" if nodes == 1 else "one machine"
        raise UsageError(f"{other} is of a collection by {machines}: go on with as many, or use another --out_dir")
    if nodes > 1:
        if cfg.hf_repo_id or nodes > -(-len(texts) // cfg.batch_size):
            why = "push with hub.py when all have ended" if cfg.hf_repo_id else "fewer batches than that; lower --batch_size"
            raise UsageError(f"{nodes} machines: {why}")
        out_dir /= f"node{node}"
        prompts = [p for i, p in enumerate(prompts) if i // (cfg.batch_size * n) % nodes == node]
    num_texts = len(prompts) // n
    need = len(prompts) * num_steps * sum(step_bytes[name] for name, _, _ in places)
    there = sum(f.stat().st_size for f in out_dir.glob("*.npy*")) if out_dir.is_dir() else 0
    free = shutil.disk_usage(next(p for p in (out_dir.absolute(), *out_dir.absolute().parents) if p.is_dir())).free
    print(
        f"{num_texts} {what} x {num_steps} steps of {', '.join(hook_names)}: "
        f"{need / 1e6:,.0f} MB in {out_dir}/ ({free / 1e9:,.0f} GB free)"
    )
    if first and need - there > 0.98 * free:
        raise UsageError(
            f"{need / 1e9:.3g} GB do not fit: {(free + there) / 1e9:.3g} GB are free for {cfg.out_dir}; "
            "lower --max_num_examples or --tokens_per_step, or raise --cache_every_n_timesteps"
        )

    # 4. Generate batch by batch, and write on another thread; the processes of a machine take turns
    settings = {"format": 1, "model": cfg.model_name, "variant": cfg.variant, "revision": cfg.revision}
    settings |= {"pipeline": type(hooked.pipe).__name__, "hook_names": hook_names, "rows": cfg.rows, "side": cfg.side}
    settings |= {"stream": cfg.stream, "cache_every_n_timesteps": cfg.cache_every_n_timesteps, "batch_size": cfg.batch_size}
    settings |= {"seed": cfg.seed, "dtype": str(store_dtype)[6:], "model_dtype": str(dtype)[6:], "device": device.type}
    settings |= {"num_images_per_prompt": n, "pipeline_kwargs": options, "images": cfg.images, "text_tokens": text_tokens}
    settings |= {"tokens_per_step": cfg.tokens_per_step}
    settings |= {"machines": nodes, "machine": node} if nodes > 1 else {"machines": None, "machine": None}
    arguments = (out_dir, settings, prompts, cfg.batch_size * n)
    collection = Collection(*arguments) if first else None
    told = processes.tell(collection.pending() if first else None)
    collection = collection or Collection(*arguments, joining=True)
    pending = told[processes.rank - processes.local_rank]  # as the first on this machine found them
    ends = np.cumsum([0, *(len(collection.rows_of(b)) // n for b in pending)]).tolist()  # prompts
    initial, started = num_texts - ends[-1], time.time()
    bar = tqdm(total=num_texts, initial=initial, unit="prompt", desc="collecting", disable=processes.rank > 0)

    kept = dict(cache_every_n_timesteps=cfg.cache_every_n_timesteps, later=True)

    def convert(output, cached):
        cache = cached()
        if pictures:
            without_first_step(cache)
        cache["grid"] |= {name: (tokens,) for name, tokens in text_tokens.items()}
        arrays, norms = batch_arrays(output, cache, places, cfg, store_dtype, text_tokens)
        facts = {name: {k: torch.as_tensor(cache[k][name]).tolist() for k in FACTS if name in cache[k]} for name in hook_names}
        return arrays, norms, facts

    def write(b, converted):
        collection.write(b, *(converted() if callable(converted) else converted))

    with closing(collection):  # until then the folder is locked
        with bar:
            with Writer(write) as writer, ExitStack() as stack:
                for denoiser in hooked.denoisers.values():  # an error of the thread ends a generation at its next step
                    stack.callback(unwrap(denoiser).register_forward_pre_hook(writer.check).remove)
                while (i := processes.next(f"batch of {node}")) < len(pending):
                    rows = collection.rows_of(pending[i])
                    text, batch = batch_options(rows, n)
                    if cfg.tokens_per_step:
                        batch["choose"] = random_tokens([r["seed"] for r in rows], cfg.tokens_per_step)
                    shown = pictures and pictures.in_place([sources[r["id"]] for r in rows], [r["seed"] for r in rows])
                    with shown or nullcontext():
                        output, cached = hooked.run_with_cache(hook_names, text, **kept, **sides, **options, **batch)
                    converted = partial(convert, output, cached)
                    if device.type == "cpu":  # here: two threads that compute get in each other's way, 12 % slower on two cores
                        converted = converted()
                    writer.put(pending[i], converted)
                    del output, cached, converted  # the thread has them
                    bar.update(initial + ends[i + 1] - bar.n)
                    rate = need / num_texts * (bar.n - initial) / (time.time() - started)
                    bar.set_postfix_str(f"{rate / 1e6:.0f} MB/s")
            processes.barrier(local=True)
            bar.update(num_texts - bar.n)

        # 5. Describe the files
        if first:
            steps = [len(collection.facts[name]["timesteps"]) for name, _, _ in places]
            descriptions = {} if collection.shape("samples") is None else {"samples": None}
            for (name, suffix, stem), norms in zip(places, np.split(collection.sums(), np.cumsum(steps)[:-1])):
                shape = collection.shape(stem)
                if shape is None:
                    raise UsageError(f"{out_dir / stem}.npy is missing; move its folder away and collect again")
                extras = [f"{stem}.{extra}" for extra in ("lengths", "timesteps", "tokens")]
                descriptions |= {extra: None for extra in extras if collection.shape(extra)}
                denoiser = hooked.denoisers[hooked.modules()[name][0]]
                record = settings | {"hook_name": name, "denoiser": type(unwrap(denoiser)).__name__, **collection.facts[name]}
                record |= {"rows": "uncond" if uncond[suffix] else "cond", "guidance_scale": options.get("guidance_scale")}
                record |= {"tokens_per_step": shape[2] if extras[-1] in descriptions else None}
                tokens = collection.read(extras[0]).sum() if text_tokens else shape[0] * shape[2]  # of all prompts
                record |= {"shape": shape, "num_prompts": num_texts, "mean_norm": (norms / tokens).tolist()}
                versions = {p: version(p) for p in ("torch", "diffusers", "transformers", "numpy")}
                descriptions[stem] = record | {"versions": versions}
            collection.finish(descriptions)
            for stem in (stem for _, _, stem in places):
                print(f"{out_dir / stem}.npy  {tuple(descriptions[stem]['shape'])} {descriptions[stem]['dtype']}")
            if cfg.hf_repo_id:
                print(push(out_dir, cfg.hf_repo_id, "activations"))
    processes.barrier()  # torchrun's store, which hands out the batches, ends with the first machine
    processes.close()
    where = "" if cfg.out_dir == Config().out_dir else f" --data {cfg.out_dir}"
    print(f"{what} in {out_dir / 'prompts.jsonl'}, final samples in {out_dir / 'samples.npy'}; next: python train.py{where}")


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
