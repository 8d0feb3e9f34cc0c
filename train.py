"""Train sparse autoencoders (SAEs) on the activations that collect.py stored.

    python train.py                                                    # the newest file in activations/
    python train.py --data activations/mid_block.npy --k 32 --expansion_factor 8
    python train.py --k 16 32 64 --expansion_factor 8 16 --seeds 0 1   # twelve SAEs from one reading of the file
    torchrun --nproc_per_node 4 train.py --shard_latents 2             # 2 x 2 GPUs: vectors and latents are split

A TopK SAE with the auxiliary loss that revives dead latents (AuxK), trained by Adam on vectors shuffled one by one over
all prompts. b_dec starts at the geometric median of a sample, the encoder as the decoder's transpose; decoder rows keep
unit norm. A tenth of the prompts is kept from training and gives the final numbers, by timestep and overall (metrics.py).

Reads   activation files (.npy: floats, last axis d; see README), several, a glob or a folder; one SAE a hook name.
Writes  <out_dir>/<run_name>/: cfg.json, sae.safetensors, metrics.jsonl, train.png, evaluate.png; checkpoint.safetensors
        until done. Of several SAEs also a picture of FVU against L0, <out_dir>/<run_name or file>_sweep.png.
Stopped by Ctrl-C or kill -9, the same command goes on and ends with the same bits. A run is never overwritten.
In a row of metrics.jsonl, fvu, l0 and loss are of that iteration's batch alone, before its update; dead counts latents.

Sources: TopK and AuxK, Gao et al. 2024 (arXiv 2406.04093), sections 2.3, 2.4 and A.2; the centring, D-Scope 2026.
"""

import math
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from activations import newest_activations, open_activations
from cli import check_positive, resolve_device, run
from disk import read_json
from errors import UsageError
from health import report, summary
from hub import push
from jobs import SAMPLE, Job, agree, held, measure
from log import import_tracker, open_log, plot_sweep
from metrics import evaluate, total
from processes import Processes


@dataclass
class Config:
    data: list[str] = field(default_factory=list)  # .npy files, globs, folders (none: newest in activations/)
    out_dir: str = "saes"  # the folder in which each run gets its own
    run_name: str | None = None  # its name (None: made of the file, k, num_latents and variant)
    expansion_factor: list[int] = field(default_factory=lambda: [16])  # num_latents as a multiple of the vectors' width
    num_latents: list[int] = field(default_factory=list)  # sizes of the dictionary, instead of expansion_factor
    k: list[int] = field(default_factory=lambda: [16])  # active latents a vector; with sample_topk, of a whole sample
    seeds: list[int] = field(default_factory=lambda: [0])  # of the weights; every k, size and seed gives an SAE
    batch_topk: bool = False  # k a vector on average over a batch; in use, a threshold that was learned
    sample_topk: bool = False  # k for all tokens of one (prompt, step)
    multi_topk: bool = False  # 4 k latents are to reconstruct as well, with an eighth of the weight
    matryoshka: list[int] = field(default_factory=list)  # so many first latents are to reconstruct as well, e.g. 1024 4096
    input_unit_norm: bool = False  # each vector is given mean 0 and variance 1 first
    center: Literal["median", "mean", "none"] = "median"  # where b_dec starts: geometric median or mean of a sample, or 0
    loss_weight: Literal["none", "per_step"] = "none"  # per_step: errors count by 1 / mean square at their timestep
    normalize_decoder: bool = True  # keep the rows of W_dec at unit norm
    effective_batch_size: int = 1024  # vectors per optimizer update, in all
    num_epochs: int = 1  # passes over the training vectors
    max_examples: int | None = None  # stop after this many vectors
    lr: float | None = None  # Adam's learning rate (None: 2e-4 / sqrt(num_latents / 2^14), up to 6 times that for short runs)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"  # linear falls to 0 over the last fifth
    lr_warmup_steps: int = 100  # iterations in which the learning rate rises from 0, at most a fifth of all
    auxk_alpha: float = 1 / 32  # weight of the AuxK loss; 0 switches it off
    dead_feature_threshold: int = 100_000  # a latent is dead after this many vectors without a nonzero activation
    grad_acc_steps: int = 1  # an update goes through in this many parts, to save memory
    micro_acc_steps: int = 1  # and each of these in this many; the result is the same
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # of the encoder's product; auto: 16 bits where they are fast
    buffer_gb: float = 2.0  # memory of the shuffle buffer; a file that fits is shuffled perfectly
    memory_gb: float | None = None  # for SAEs that are trained together (None: half of what is free); more take turns
    shard_latents: int = 1  # neighbouring processes of torchrun that own a slice of the latents each; else vectors are split
    data_seed: int = 0  # of the order of the vectors; the held-out prompts are the same for every seed
    device: str = "auto"  # auto, cuda, cuda:N, mps, cpu
    log_every: int = 10  # iterations between rows of metrics.jsonl; a row describes one batch
    save_every: int = 1000  # iterations between checkpoints
    log_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"  # where the rows of metrics.jsonl go as well
    wandb_project: str = "diffusion-saes"  # project there, for wandb and trackio
    hf_repo_id: str | None = None  # <user>/<name> on the Hugging Face Hub, to push every finished SAE to, each in its folder


TOGETHER = 8  # batches that each of several SAEs is given in turn, so that its weights stay in the cache


def check_options(cfg):
    """Raises UsageError for an option's value that nothing can be done with, or a --log_to that is not installed."""
    check_positive(cfg, "effective_batch_size", "num_epochs", "max_examples")
    check_positive(cfg, "dead_feature_threshold", "grad_acc_steps", "micro_acc_steps", "log_every", "save_every")
    alone = not (cfg.batch_topk or cfg.sample_topk or cfg.matryoshka)
    for name, fine, expected in (
        ("k", cfg.k and min(cfg.k) > 0, "numbers from 1"),
        ("num_latents", min(cfg.num_latents, default=1) > 0, "numbers from 1"),
        ("expansion_factor", cfg.num_latents or min(cfg.expansion_factor, default=0) > 0, "numbers from 1"),
        ("matryoshka", min(cfg.matryoshka, default=1) > 0, "numbers from 1"),
        ("seeds", cfg.seeds, "at least one number"),
        ("data_seed", cfg.data_seed >= 0, "0 or more"),
        ("lr", cfg.lr is None or 0 < cfg.lr < math.inf, "a positive number"),
        ("buffer_gb", cfg.buffer_gb > 0, "a positive number"),
        ("memory_gb", cfg.memory_gb is None or cfg.memory_gb > 0, "a positive number"),
        ("lr_warmup_steps", cfg.lr_warmup_steps >= 0, "0 or more"),
        ("auxk_alpha", 0 <= cfg.auxk_alpha < math.inf, "0 or more"),
        ("sample_topk", not (cfg.batch_topk and cfg.sample_topk), "no --batch_topk with it"),
        ("multi_topk", not cfg.multi_topk or alone, "no --batch_topk, --sample_topk or --matryoshka with it"),
    ):
        if not fine:
            value = getattr(cfg, name)
            value = " ".join(map(str, value)) or "(none)" if isinstance(value, list) else value
            raise UsageError(f"--{name} {value}: expected {expected}")
    import_tracker(cfg.log_to)


@contextmanager
def interrupt_later():
    """The first Ctrl-C or SIGTERM only fills the list, so that no iteration is cut in two; a second Ctrl-C acts as always."""
    pressed, main_thread = [], threading.current_thread() is threading.main_thread()

    def handler(number, _):
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signals = (signal.SIGINT, signal.SIGTERM) if main_thread else ()  # Python allows it nowhere else
    previous = [signal.signal(number, handler) for number in signals]
    try:
        yield pressed
    finally:
        for number, action in zip(signals, previous):
            signal.signal(number, action)


def fit(cfg, activations, jobs, device, processes, diagnosed=False):
    """Train, or finish training, the SAEs of one data set together, each vector read once for all."""
    vectors, first = jobs[0].vectors, jobs[0].first
    # 1. The SAEs and the optimizers
    tokens = activations.sample_tokens() if cfg.sample_topk else 1
    whole = min(cfg.max_examples or math.inf, cfg.num_epochs * activations.num_training) // tokens * tokens
    if not whole:
        raise UsageError(f"--max_examples {cfg.max_examples}: expected at least {tokens}, the tokens of one sample")
    inputs = None
    if any(job.found == "nothing" for job in jobs):
        inputs = agree(processes, measure(activations, cfg, device) if first else None)
    for job in jobs:
        job.start(inputs, device)
    if first and inputs and not cfg.input_unit_norm and not diagnosed:  # what diagnose.py says at length
        job = jobs[0]
        k = min(-(-job.k // tokens), job.num_latents)
        found = report(activations, k, job.num_latents, device, cfg.center, cfg.data_seed)
        print("\n".join(summary(found)))
    product, many = jobs[0].state["product"], f"{len(jobs)} SAEs" if len(jobs) > 1 else "1 SAE"
    print(f"{many}: the encoder's product in {product}, the rest in float32")

    # 2. Training; a job that is ahead of the others waits
    size = max(1, cfg.effective_batch_size // tokens) * tokens
    iterations, done = -(-whole // size), min(job.state["vectors"] for job in jobs)
    share, pin = (vectors.index, vectors.count), device.type == "cuda"
    batches = activations.batches(size, whole, done, cfg.data_seed, cfg.buffer_gb, tokens, share, pin)
    name, weighted = jobs[0].folder.name, cfg.loss_weight == "per_step"  # moving the steps makes a GPU wait
    bar = tqdm(total=whole, initial=done, unit="vec", unit_scale=True, dynamic_ncols=True, desc=name, disable=not first)
    with ExitStack() as stack:
        logs = [stack.enter_context(open_log(cfg, job.folder, job.state)) if first else lambda row: None for job in jobs]
        row = None  # the newest
        for job in jobs:
            job.began = time.perf_counter() - job.state["seconds"]
        with bar, interrupt_later() as pressed:
            while chunk := list(islice(batches, TOGETHER if len(jobs) > 1 else 1)):
                chunk = [(x.to(device, non_blocking=pin).float(), step.to(device) if weighted else None) for x, step in chunk]
                for job, log in zip(jobs, logs):
                    at = done
                    for x, step in chunk:
                        n = min(size, whole - at)
                        if job.state["vectors"] == at:
                            row = job.update(x, step, n, tokens, iterations, log) or row
                        at += n
                done = at
                bar.update(at - bar.n)
                if row:
                    bar.set_postfix(fvu=f"{row['fvu']:.3f}", l0=f"{row['l0']:.1f}", dead=f"{row['dead']:.1%}")
                if processes.any(pressed):
                    for job in jobs if done < whole else []:  # the last update is saved
                        job.save()
                    iteration = min(job.state["iteration"] for job in jobs)
                    bar.write(f"stopped at iteration {iteration} of {iterations}; the same command goes on")
                    raise KeyboardInterrupt
        ended = time.perf_counter()

        # 3. Held-out numbers, and the files
        sample = activations.sample(SAMPLE, cfg.data_seed).to(device) if cfg.batch_topk else None
        for job in jobs:
            job.sae.scale_inputs(job.state["scale"])
            if cfg.batch_topk:
                job.sae.calibrate(sample)
        part = -(-size // (cfg.grad_acc_steps * cfg.micro_acc_steps))
        found = evaluate([job.sae for job in jobs], activations, part, progress=first, vectors=vectors)
        for job, by_step, log in zip(jobs, found, logs):
            job.finish(by_step, log)
            held_out, seconds = total(by_step), max(ended - job.began, 0.01)
            seen, shape = job.state["vectors"], f"{job.num_latents} latents, k = {job.k}"
            print(f"trained:  {seen:,} vectors in {seconds:.0f} s ({seen / seconds:,.0f}/s); {shape}")
            numbers = f"fvu {held_out.fvu:.4f}   l0 {held_out.l0:.2f}   dead {held_out.dead:.2%}   cosine {held_out.cosine:.4f}"
            print(f"held out: {held_out.n:,} vectors   {numbers}   always on {held_out.always_on:.2%}")
            if held_out.fvu >= 1:
                print(f"note: an fvu of 1 is what the mean alone gives; {iterations} updates are few, try more --num_epochs")
            if cfg.hf_repo_id and first:
                where = None if cfg.run_name and job.folder == Path(cfg.out_dir) / cfg.run_name else job.folder.name
                print(push(job.folder, cfg.hf_repo_id, "sae", where))
            print(f"saved in  {job.folder}/: cfg.json, sae.safetensors, metrics.jsonl, train.png, evaluate.png")
    if not activations.whole_prompts:
        print("note: there are no prompts to hold out whole, so held-out vectors are of the same samples as the others")


def free_bytes(device, processes):
    """Memory that is free on the device for each of the processes; infinite where that is not to be seen."""
    if device.type == "cuda":
        return min(processes.tell(torch.cuda.mem_get_info(device)[0]))
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)
    return min(processes.tell(free / processes.local_count))


def in_turns(jobs, memory, free):
    """Groups of jobs that fit in so many bytes of memory together, at least one each.

    Raises UsageError for one whose weights and moments alone are more than what is free.
    """
    groups, left = [], -1
    for job in jobs:
        numbers = job.num_latents * job.activations.d // job.latents.count
        if 24 * numbers > free:
            need = f"{24 * numbers / 1e9:.3g} GB for weights and moments"
            raise UsageError(f"--num_latents {job.num_latents}: {need}, where {free / 1e9:.3g} GB are free")
        need = 34 * numbers  # weights, moments, gradients and a 16-bit copy
        if need > left:
            groups.append([])
            left = memory
        groups[-1].append(job)
        left -= need
    return groups


def summarize(folders, path):
    """The table and the picture of several SAEs of one data set."""
    rows = [read_json(folder / "cfg.json") for folder in folders]
    print(f"\n{'run':44} {'M':>7} {'k':>5} {'seed':>5} {'fvu':>8} {'l0':>8} {'dead':>7}")
    for folder, row in sorted(zip(folders, rows), key=lambda pair: pair[1]["fvu"]):
        seed, numbers = row["training"]["seed"], f"{row['fvu']:8.4f} {row['l0']:8.2f} {row['dead']:7.2%}"
        print(f"{folder.name:44} {row['num_latents']:7} {row['k']:5} {seed:5} {numbers}")
    plot_sweep(path, rows)
    print(f"FVU against L0: {path}")


def name_of(cfg, k, num_latents, seed):
    """What tells one SAE of a data set from another."""
    variants = ("batch_topk", "sample_topk", "multi_topk", "input_unit_norm", "matryoshka")
    variant = "".join(f"_{name}" for name in variants if getattr(cfg, name))
    return f"k{k}_M{num_latents}{variant}{f'_seed{seed}' * (seed != 0)}"


def main(cfg):
    check_options(cfg)
    device = resolve_device(cfg.device)
    processes = Processes(device)
    device = processes.device
    vectors, latents = processes.grid(cfg.shard_latents)
    if cfg.device == "auto" and device.type == "mps":
        device = torch.device("cpu")
        print("training on the CPU: many PyTorch versions lack embedding_bag on MPS; --device mps tries them")
    if cfg.run_name and (Path(cfg.run_name).is_absolute() or ".." in Path(cfg.run_name).parts):
        raise UsageError(f"--run_name {cfg.run_name}: expected a name inside --out_dir")
    for activations in (sets := open_activations(cfg.data or [newest_activations()])):
        stem = Path(activations.paths[0]).stem
        sizes = cfg.num_latents or [factor * activations.d for factor in cfg.expansion_factor]
        each = list(dict.fromkeys((k, M, seed) for M in sizes for k in cfg.k for seed in cfg.seeds))
        base = Path(cfg.out_dir) / (cfg.run_name or "") / (stem if cfg.run_name and len(sets) > 1 else "")
        folders = [base if cfg.run_name else base / f"{stem}_{name_of(cfg, *one)}" for one in each]
        if cfg.run_name and len(each) > 1:
            folders = [base / name_of(cfg, *one) for one in each]
        with ExitStack() as stack:
            for folder in folders if processes.rank == 0 else []:
                if not (folder / "cfg.json").exists():
                    stack.enter_context(held(folder))
            jobs = [Job(cfg, activations, folder, *one, processes, vectors, latents) for folder, one in zip(folders, each)]
            for job in jobs:
                if job.found == "finished" and job.first:
                    job.checkpoint.unlink(missing_ok=True)  # where a power cut came just before it went
                    print(f"{job.folder} is finished: {job.num_latents} latents, k = {job.k}; nothing to do")
            free = free_bytes(device, processes)
            memory = (free / 2 if free < math.inf else 4e9) if cfg.memory_gb is None else cfg.memory_gb * 2**30
            for turn, group in enumerate(in_turns([job for job in jobs if job.found != "finished"], memory, free)):
                fit(cfg, activations, group, device, processes, diagnosed=turn > 0)
                for job in group:
                    del job.step, job.sae
            if len(jobs) > 1 and processes.rank == 0:
                summarize(folders, base / f"{stem}_sweep.png")
    processes.barrier()
    processes.close()


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
