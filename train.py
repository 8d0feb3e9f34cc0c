"""Stage 4: train sparse autoencoders (SAEs) on the activations that collect.py stored.

    python train.py                                         # the newest collection
    python train.py --data activations/mid_block.npy --k 32 --expansion_factor 8
    python train.py --k 16 32 64 --seeds 0 1                # six SAEs; the files are read once
    torchrun --nproc_per_node 4 train.py                    # the GPUs split each batch
    torchrun --nproc_per_node 4 train.py --shard_latents 2  # 2 x 2: and the latents, too

In a notebook:

    folders = main(Config(data=["acts.npy"], k=[32]))

The model, and what it learns to make small:

    top_acts, top_indices = topk(relu((x - b_dec) @ W_enc.T + b_enc), k)
    x_hat = top_acts @ W_dec[top_indices] + b_dec
    loss  = |x - x_hat|^2 / variance  +  auxk_alpha * AuxK             mean over the batch

AuxK says how badly the dead latents predict the error x - x_hat; it revives them. The optimizer is
Adam. b_dec starts at the geometric median of a sample. W_enc starts as a copy of W_dec, whose rows
keep length 1. The vectors of all prompts are shuffled one by one. Whole prompts are held out from
training and give the final numbers, by timestep and overall (analysis/metrics.py). They hold a
tenth of all vectors. If that is below 100,000, they hold up to 100,000, but not more than a
quarter; a million is the most.

Reads   activation files: .npy files of floats whose last axis is the width d of a vector.
        Name them one by one, by a glob or by their folder. Each hook name gets its own SAE.
Writes  <out_dir>/<run>/: cfg.json, sae.safetensors, metrics.jsonl, train.png, evaluate.png, and
        training_prompts.txt with a hash of each prompt that training saw. Several SAEs also get
        a picture of their FVU against L0, <out_dir>/<file>_sweep.png; with --run_name it lies in
        that folder.
        checkpoint.safetensors is deleted when the run is finished. After Ctrl-C or kill -9 the
        same command resumes and ends with the same bits. A finished run is never overwritten.

A row of metrics.jsonl describes one update. Its fvu, l0 and loss are measured on that batch alone,
before the update. Its dead is the share of the latents that are dead.

Sources: TopK and AuxK, Gao et al. 2024 (arXiv 2406.04093), sections 2.3, 2.4 and A.2; the
centring, D-Scope 2026.
"""

import importlib
import json
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cli import answer_help, run_script


@dataclass
class Config:
    # model
    expansion_factor: list[int] = field(default_factory=list)
    """Give the SAE this many latents per dimension of a vector. Raise it to find rarer features;
    memory and time grow with it. Several values train several SAEs. If not given, 16."""

    num_latents: list[int] = field(default_factory=list)
    """Give the SAE exactly this many latents, instead of --expansion_factor. Several values train
    several SAEs."""

    k: list[int] = field(default_factory=lambda: [16])
    """Keep this many latents active per vector; for sampletopk, per image and step, all tokens
    together. Raise it for a lower FVU, lower it for features that are easier to read. Several
    values train several SAEs."""

    activation: Literal["topk", "batchtopk", "sampletopk"] | None = None
    """Choose which latents stay active: the k largest of each vector (topk), k per vector on
    average over a batch (batchtopk), or the k largest of an image and step (sampletopk). If not
    given, topk."""

    batch_topk: bool = False
    """Short for --activation batchtopk. Use it if some vectors need more latents than others. After
    training, a threshold takes the place of k."""

    sample_topk: bool = False
    """Short for --activation sampletopk. Use it to compare with SAeUron."""

    multi_topk: bool = False
    """Let a second reconstruction with the 4 x k largest latents count 1/8 in the loss. Use it if
    the SAE will be used with another k than in training."""

    matryoshka: list[int] = field(default_factory=list)
    """Also train the first latents to reconstruct without the others: 1024 4096 means the first
    1024, and the first 4096. Use it to get general features first and special ones after them."""

    input_unit_norm: bool = False
    """Give each vector mean 0 and variance 1 before the SAE sees it. Use it if the lengths of the
    vectors differ much and do not matter."""

    normalize_decoder: bool = True
    """Keep the rows of W_dec at length 1. Turn it off only for comparisons."""

    # data
    data: list[str] = field(default_factory=list)
    """Train on these .npy files, globs or folders. If not given, train on the newest file in
    activations/."""

    data_seed: int = 0
    """Shuffle the vectors with this seed. The held-out prompts are the same for every seed."""

    # training
    effective_batch_size: int = 1024
    """Use this many vectors per update, over all processes together. Raise it for steadier updates,
    lower it for more updates."""

    num_epochs: int = 1
    """Go through the training vectors this many times. Raise it if one pass gives fewer than about
    1,000 updates."""

    max_examples: int | None = None
    """Stop after this many vectors (not prompts). Set it for a quick trial. If not given, all
    vectors of all epochs are used."""

    lr: float | None = None
    """Let Adam's learning rate rise to this peak. Lower it if the loss becomes NaN. If not given,
    it is 2e-4 / sqrt(num_latents / 2^14), and up to 6 times that for fewer than 30,000 updates: the
    fewer updates, the higher."""

    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """Let the learning rate fall to 0 over the last fifth of the updates (linear), over all of them
    (cosine), or not at all (constant)."""

    lr_warmup_steps: int = 100
    """Let the learning rate rise from 0 over this many updates, but at most over a fifth of all.
    Raise it if training is unstable at the start."""

    center: Literal["median", "mean", "none"] = "median"
    """Start b_dec at the geometric median of a sample, at its mean, or at 0 (none). Without a
    centre many latents can die; diagnose.py tries it."""

    loss_weight: Literal["none", "per_step"] = "none"
    """With per_step, divide the errors of each timestep by the mean square of its vectors. Use it
    if a few timesteps have much larger vectors than the others."""

    auxk_alpha: float = 1 / 32
    """Give AuxK, the loss that revives dead latents, this weight. Raise it if many latents stay
    dead; 0 turns AuxK off."""

    dead_feature_threshold: int = 100_000
    """Call a latent dead after this many vectors without a nonzero activation. Lower it for short
    runs, in which AuxK would otherwise start late."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Draw the initial weights from these seeds. Several values train several SAEs, which show how
    much the features depend on chance."""

    # output
    out_dir: str = "saes"
    """Make a folder for each run in this folder."""

    run_name: str | None = None
    """Give the run's folder this name. If not given, the name is made of the data file, k,
    num_latents, the kind of SAE and the seed."""

    log_every: int = 10
    """Write one row to metrics.jsonl per this many updates; it describes one batch. Raise it on a
    fast GPU, which waits for each row."""

    save_every: int = 1000
    """Write one checkpoint per this many updates. Lower it if the job can be killed at any time."""

    log_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    """Also send the rows of metrics.jsonl to this tracker."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else the CPU. Name mps to try
    it: many PyTorch versions can't train on it."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Compute the encoder's product in this precision. auto takes 16 bits where they are fast.
    Choose `no` if rounding must not change which latents are active."""

    grad_acc_steps: int = 1
    """Compute each batch in this many parts, one after another. Raise it if memory is short."""

    buffer_gb: float = 2.0
    """Let the shuffle buffer of each process take this many GB of memory. A file that fits into it
    is shuffled perfectly; raise it for larger files."""

    shard_latents: int = 1
    """Split the latents over this many processes of torchrun. Raise it if one GPU can't hold all
    latents. Each group of this many processes takes a part of every batch."""


if __name__ == "__main__":
    answer_help(Config)  # --help and a mistyped option are answered before torch is imported

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from analysis.data_stats import TRAINING_SAMPLE, DataStats, measure
from analysis.metrics import Metrics, evaluate, total
from analysis.plots import plot_evaluation, plot_sweep, plot_training
from cli import check_positive, product_dtype, resolve_device
from distributed import ALONE, Group, Processes
from errors import UsageError, decimals
from kernels.update import LIST_DEAD_EVERY, Forward, SparseUpdate
from sae import Sae
from store.activation_file import collected_with, differences, provenance
from store.dataset import Activations, files_in, newest_activations, open_activations
from store.disk import (
    is_hidden,
    load_tensors,
    make_folder,
    read_json,
    save_tensors,
    write_atomically,
)

# batchtopk and sampletopk make this share of their updates like topk. On the toy, batchtopk then
# ended with an FVU of 0.074 instead of 0.096, and sampletopk in mid_block with 0.108 instead of
# 0.123. In `python -m bench truth`, batchtopk then found 99 % of the atoms instead of 79 %.
PLAIN_TOPK_UNTIL = 0.3

# A run without --expansion_factor and --num_latents has this many latents per dimension.
DEFAULT_EXPANSION_FACTOR = 16

# A resumed run may change these options. Whether the data are the same is seen from a sample.
FREE_TO_CHANGE = (
    "data",
    "out_dir",
    "run_name",
    "device",
    "log_every",
    "save_every",
    "log_to",
    "shard_latents",
)

# A run that was killed before its first checkpoint may leave these files in its folder.
LEFTOVERS = ("checkpoint.safetensors.partial", "train.lock")

# In place of these options, the settings of a run hold its SAE's k, num_latents, seed and
# activation.
RECORDED_PER_SAE = ("k", "num_latents", "expansion_factor", "seeds", "batch_topk", "sample_topk")


@dataclass(frozen=True)
class Schedule:
    """How many vectors a run sees, and in what portions.

    >>> schedule = Schedule(num_vectors=2500, batch_size=1000, tokens_per_sample=1)
    >>> schedule.iterations, schedule.vectors_until(2), schedule.vectors_until(3)
    (3, 2000, 2500)
    """

    num_vectors: int
    """Vectors that the whole run sees. A vector counts once per epoch."""

    batch_size: int
    """Vectors per iteration, over all processes."""

    tokens_per_sample: int
    """Vectors that stay together: the tokens of one prompt and step for sampletopk, else 1."""

    @classmethod
    def plan(cls, cfg: Config, dataset: Activations) -> "Schedule":
        """Return the schedule that the options give on this data set; it has whole samples only.

        Raises UsageError if sampletopk is used on a file without samples, or if --max_examples is
        less than one sample.
        """
        tokens = 1
        if cfg.activation == "sampletopk":
            tokens = dataset.sample_tokens()

        num_vectors = cfg.num_epochs * dataset.num_training
        if cfg.max_examples is not None:
            num_vectors = min(cfg.max_examples, num_vectors)
        num_samples = num_vectors // tokens
        if num_samples == 0:
            raise UsageError(
                f"--max_examples {cfg.max_examples}: expected at least {tokens}, "
                "the tokens of one sample"
            )
        samples_per_batch = max(1, cfg.effective_batch_size // tokens)
        return cls(num_samples * tokens, samples_per_batch * tokens, tokens)

    @property
    def iterations(self) -> int:
        """The number of updates."""
        return math.ceil(self.num_vectors / self.batch_size)

    def vectors_until(self, iteration: int) -> int:
        """Return how many vectors come before an iteration. Only the last batch can be smaller."""
        return min(iteration * self.batch_size, self.num_vectors)

    def is_due(self, iteration: int, every: int) -> bool:
        """Return True in every `every`-th iteration and in the last one."""
        return (iteration + 1) % every == 0 or iteration + 1 == self.iterations


def peak_learning_rate(iterations: int, num_latents: int) -> float:
    """Return Adam's peak learning rate where --lr is not given.

    It is sparsify's 2e-4 / sqrt(num_latents / 2^14) for 30,000 iterations and more, and up to 6
    times that for fewer. On the toy (1,438 iterations) the FVU falls from 0.079 to 0.058 by that,
    and in mid_block (360 iterations) from 0.16 to 0.096.

    >>> peak_learning_rate(30_000, 2**14), peak_learning_rate(7_500, 2**14)
    (0.0002, 0.0004)
    """
    short_run = math.sqrt(30_000 / iterations)
    return 2e-4 / math.sqrt(num_latents / 2**14) * min(6, max(1, short_run))


def learning_rate(iteration: int, iterations: int, num_latents: int, cfg: Config) -> float:
    """Return the learning rate of one iteration, counted from 0: peak times rise times fall.

    The warmup takes cfg.lr_warmup_steps iterations, but at most a fifth of all. Then "linear" falls
    to 0 in the last fifth, "cosine" falls from the first iteration on, and "constant" not at all.

    With lr_scheduler="linear", lr=0.01, lr_warmup_steps=1 and six iterations it is 0.005, then
    0.01, and in the last one 0.01 * 5 / 6.
    """
    # 1) the peak
    peak = cfg.lr
    if peak is None:
        peak = peak_learning_rate(iterations, num_latents)

    # 2) linear warmup
    warmup = min(cfg.lr_warmup_steps, iterations // 5)
    rise = min(1.0, (iteration + 1) / (warmup + 1))

    # 3) decay
    left = 1 - iteration / iterations
    if cfg.lr_scheduler == "constant":
        fall = 1.0
    elif cfg.lr_scheduler == "linear":
        fall = min(1.0, 5 * left)
    else:
        fall = 0.5 - 0.5 * math.cos(math.pi * left)

    return peak * rise * fall


class Workers(NamedTuple):
    """The processes that torchrun started, and how they split the work (analysis/sharded.py)."""

    processes: Processes
    """All of them."""

    vectors: Group
    """The processes that split each batch, and hold the same latents as this one."""

    latents: Group
    """The processes that split the latents, and see the same vectors as this one."""

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes the files that exist once."""
        return self.processes.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.processes.device


def train(
    cfg: Config,
    dataset: Activations,
    schedule: Schedule,
    runs: list["TrainingRun"],
    workers: Workers,
) -> None:
    """Give every batch to every run, from the oldest checkpoint on.

    Ctrl-C lets the iteration end, saves all runs and raises KeyboardInterrupt.
    """
    device = workers.device
    pin_memory = device.type == "cuda"
    start = min(run.iteration for run in runs)
    batches = dataset.batches(
        schedule.batch_size,
        stop=schedule.num_vectors,
        start=schedule.vectors_until(start),
        seed=cfg.data_seed,
        buffer_gb=cfg.buffer_gb,
        tokens=schedule.tokens_per_sample,
        share=(workers.vectors.index, workers.vectors.count),
        pin=pin_memory,
    )
    bar = tqdm(
        total=schedule.num_vectors,
        initial=schedule.vectors_until(start),
        unit="vec",
        unit_scale=True,
        dynamic_ncols=True,
        desc=runs[0].folder.name,
        disable=not workers.is_first,
    )
    for run in runs:
        run.began = time.perf_counter() - run.seconds

    with bar, InterruptBetweenIterations() as interrupt:
        for iteration, (x, timestep_index) in enumerate(batches, start):
            x = x.to(device, non_blocking=pin_memory).float()  # (n, d): what this process got
            sample_shape = (len(x) // schedule.tokens_per_sample, schedule.tokens_per_sample)
            # the batch's vectors, over all processes
            num_vectors = schedule.vectors_until(iteration + 1) - schedule.vectors_until(iteration)
            num_parts = min(num_vectors, cfg.grad_acc_steps)
            if cfg.loss_weight == "per_step":
                timestep_index = timestep_index.to(device)  # a GPU waits for this
            plain_topk = iteration < PLAIN_TOPK_UNTIL * schedule.iterations
            logging = schedule.is_due(iteration, cfg.log_every)
            saving = schedule.is_due(iteration, cfg.save_every)

            for run in runs:
                if iteration < run.iteration:
                    continue  # this run's checkpoint is ahead of the others

                if iteration % LIST_DEAD_EVERY == 0:
                    run.update.list_dead()

                # forward, backward, step; the gradients are written out by hand, since autograd
                # would make dense ones
                lr = learning_rate(iteration, schedule.iterations, run.num_latents, cfg)
                samples = (x * run.scale).unflatten(0, sample_shape)
                weights = run.weights_of(timestep_index)
                forward = run.update.forward(samples, num_vectors, plain_topk, weights, num_parts)
                gradients = run.update.backward(forward)
                grad_norm = run.update.step(gradients, lr)

                run.iteration = iteration + 1
                run.last_loss = forward.loss + grad_norm  # NaN if either is

                # nothing above waits for a GPU, but list_dead; what follows does
                if logging:
                    run.check_finite()
                run.seconds = round(time.perf_counter() - run.began, 4)
                if logging:
                    row = run.log_batch(forward, lr)
                    bar.set_postfix(
                        fvu=f"{row['fvu']:.3f}", l0=f"{row['l0']:.1f}", dead=f"{row['dead']:.1%}"
                    )
                if saving:
                    run.save()

            bar.update(num_vectors)
            if workers.processes.any(interrupt.received):
                if iteration + 1 < schedule.iterations:  # the last iteration is saved already
                    for run in runs:
                        run.save()
                bar.write(
                    f"stopped at iteration {iteration + 1} of {schedule.iterations}; "
                    "the same command resumes"
                )
                raise KeyboardInterrupt

    for run in runs:
        run.seconds = max(time.perf_counter() - run.began, 0.01)


class InterruptBetweenIterations:
    """A context in which the first Ctrl-C or SIGTERM only sets `received`.

    So no iteration is cut in two. A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.received = False
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "InterruptBetweenIterations":
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous_handlers[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number: int, frame: object) -> None:
        """Note the signal, and let the next Ctrl-C act as always."""
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)


def main(cfg: Config) -> list[Path]:
    """Train one SAE per data set, size, k and seed; return their folders.

    Raises UsageError if an option or the data can't be used, or a folder holds another run.
    """
    cfg = with_activation(cfg)
    check_options(cfg)

    processes = Processes(training_device(cfg.device))
    vectors = ALONE
    latents = ALONE
    if processes.count > 1 or cfg.shard_latents != 1:
        from analysis.sharded import grid  # a single process needs nothing of it

        vectors, latents = grid(processes, cfg.shard_latents)
    workers = Workers(processes, vectors, latents)

    datasets = open_activations(cfg.data or [default_activations(workers.is_first)])
    folders = []
    for dataset in datasets:
        folders += train_on(cfg, dataset, len(datasets) == 1, workers)

    processes.barrier()
    processes.close()
    return folders


def default_activations(is_first: bool) -> Path:
    """Return the newest activation file or collection in activations/.

    The first process prints which file it is, if others lie beside it. Raises UsageError if there
    is none.
    """
    newest = newest_activations()
    if not is_first or not newest.is_file():
        return newest

    beside = set(newest.parent.glob("*.npy")) & set(files_in(newest.parent))
    if len(beside) > 1:
        print(
            f"training on {newest}, the newest of {len(beside)} files in its folder; "
            f"--data {newest.parent} trains an SAE for each"
        )
    return newest


def train_on(cfg: Config, dataset: Activations, is_only: bool, workers: Workers) -> list[Path]:
    """Train all SAEs of one data set, whose vectors are read once for all. Return their folders.

    is_only: whether this is the only data set of the command; it decides the folders' names.
    """
    # 1. The runs: new ones, ones to be resumed, and finished ones
    schedule = Schedule.plan(cfg, dataset)
    if workers.is_first:
        print_differences(dataset)
        print_options_without_effect(cfg, dataset)
        print_large_sizes(cfg, schedule)
    base, choices = plan_folders(cfg, dataset, is_only)
    folders = list(choices)
    identity = identify(dataset)

    with ExitStack() as open_runs:
        runs = []
        for folder, choice in choices.items():
            run = TrainingRun(cfg, dataset, identity, schedule, folder, choice, workers)
            runs.append(open_runs.enter_context(run))
        unfinished = [run for run in runs if not run.finished]

        # 2. Train them together, then measure them on vectors that training never saw
        if unfinished:
            start_or_resume(unfinished, cfg, dataset, workers)
            train(cfg, dataset, schedule, unfinished, workers)

            saes = [run.trained_sae() for run in unfinished]
            metrics = evaluate(
                saes,
                dataset,
                math.ceil(schedule.batch_size / cfg.grad_acc_steps),
                progress=workers.is_first,
                vectors=workers.vectors,
            )
            for run, by_timestep in zip(unfinished, metrics):
                run.finish(by_timestep)
            if not dataset.whole_prompts:
                print(
                    "note: there are no prompts to hold out whole, so the held-out vectors come "
                    "from the same samples as the training vectors"
                )

    # 3. A table and a picture of all of them
    if len(runs) > 1 and workers.is_first:
        print_and_plot_sweep(folders, base / f"{Path(dataset.paths[0]).stem}_sweep.png")
    return folders


def print_differences(dataset: Activations) -> None:
    """Print one line for each file that was collected with other options than the first one."""
    first, *others = dataset.sources
    if others and not first.meta:
        print(
            f"note: {len(dataset.sources)} files without a description are one data set; "
            "train on each with its own --data"
        )
    for other in others:
        # files of one collection have other seeds, which is no difference
        changes = differences(
            collected_with(first.meta) | {"seed": None}, collected_with(other.meta) | {"seed": None}
        )
        if changes:
            print(
                f"note: {other.path} was collected otherwise than {first.path}: "
                f"{'; '.join(changes)}"
            )


def print_options_without_effect(cfg: Config, dataset: Activations) -> None:
    """Print one line for an option that another one, or the size of the data, leaves unused."""
    if cfg.max_examples is None:
        return
    num_available = cfg.num_epochs * dataset.num_training
    if cfg.max_examples > num_available:
        print(
            f"note: --max_examples {cfg.max_examples} has no effect: the run ends after "
            f"{num_available} vectors, which are all of {cfg.num_epochs} epoch(s)"
        )
    if cfg.num_epochs > 1 and cfg.max_examples <= dataset.num_training:
        print(
            f"note: --num_epochs {cfg.num_epochs} has no effect: --max_examples "
            f"{cfg.max_examples} ends the run within the first epoch"
        )


def print_large_sizes(cfg: Config, schedule: Schedule) -> None:
    """Print one line if a batch is larger than the whole run, or has more parts than vectors."""
    num_vectors = schedule.num_vectors
    if cfg.effective_batch_size > num_vectors:
        print(
            f"note: --effective_batch_size {cfg.effective_batch_size} is more than the number of "
            f"vectors in the run, {num_vectors}, so there is a single update"
        )
    largest_batch = min(schedule.batch_size, num_vectors)
    if cfg.grad_acc_steps > largest_batch:
        print(
            f"note: --grad_acc_steps {cfg.grad_acc_steps} has the effect of {largest_batch}, "
            "since a batch has no more vectors"
        )


class SweepChoice(NamedTuple):
    """What sets one SAE of a command apart from the others on the same data."""

    k: int
    num_latents: int
    seed: int


def plan_folders(
    cfg: Config, dataset: Activations, is_only: bool
) -> tuple[Path, dict[Path, SweepChoice]]:
    """Return the folder that holds all SAEs of a data set, and the choice for each SAE's folder.

    For a.npy of width 8 and --k 4 --seeds 0 1 it gives saes/ and
    {saes/a_k4_M128: (4, 128, 0), saes/a_k4_M128_seed1: (4, 128, 1)}.
    """
    sizes = cfg.num_latents
    if not sizes:
        factors = cfg.expansion_factor or [DEFAULT_EXPANSION_FACTOR]
        sizes = [factor * dataset.d for factor in factors]

    choices = []
    for num_latents in sizes:
        for k in cfg.k:
            for seed in cfg.seeds:
                choice = SweepChoice(k, num_latents, seed)
                if choice not in choices:  # --k 16 16 trains one SAE
                    choices.append(choice)

    base = Path(cfg.out_dir)
    stem = Path(dataset.paths[0]).stem
    if not cfg.run_name:
        return base, {base / f"{stem}_{name_of(cfg, choice)}": choice for choice in choices}

    base = base / cfg.run_name
    if not is_only:
        base = base / stem
    if len(choices) == 1:
        return base, {base: choices[0]}
    return base, {base / name_of(cfg, choice): choice for choice in choices}


def name_of(cfg: Config, choice: SweepChoice) -> str:
    """Return what tells one SAE of a data set from another, such as "k16_M384_batch_topk_seed1"."""
    name = f"k{choice.k}_M{choice.num_latents}"
    if cfg.activation == "batchtopk":
        name += "_batch_topk"
    if cfg.activation == "sampletopk":
        name += "_sample_topk"
    for option in ("multi_topk", "input_unit_norm", "matryoshka"):
        if getattr(cfg, option):
            name += f"_{option}"
    if choice.seed != 0:
        name += f"_seed{choice.seed}"
    return name


def identify(dataset: Activations) -> dict[str, int | str]:
    """Return what tells a data set from another: its sizes, and a digest.

    The digest is made from a sample of the vectors and from their order.
    """
    return {"d_in": dataset.d, "num_vectors": dataset.num_vectors, "digest": dataset.digest()}


def start_or_resume(
    runs: list["TrainingRun"], cfg: Config, dataset: Activations, workers: Workers
) -> None:
    """Make every run ready for its next iteration. Raises UsageError if memory is too small."""
    check_memory(runs, dataset, workers)
    stats = None
    if any(run.saved is None for run in runs):
        stats = measure_once(cfg, dataset, workers.processes)
    for run in runs:
        if run.saved is None:
            run.start(stats)
        else:
            run.resume()

    what = "1 SAE" if len(runs) == 1 else f"{len(runs)} SAEs"
    print(f"{what}: the encoder's product in {runs[0].product}, the rest in float32")


def measure_once(cfg: Config, dataset: Activations, processes: Processes) -> DataStats:
    """Return the DataStats that the first process measured, in all processes."""
    message = None
    if processes.rank == 0:
        stats = measure(
            dataset,
            cfg.center,
            cfg.input_unit_norm,
            cfg.loss_weight == "per_step",
            cfg.data_seed,
            processes.device,
        )
        print(f"data      gamma {decimals(stats.gamma, 2)}; python diagnose.py says more")
        message = asdict(replace(stats, center=stats.center.tolist()))
    message = processes.all_gather(message)[0]
    message["center"] = torch.tensor(message["center"])
    return DataStats(**message)


class TrainingRun:
    """One SAE in training, and its folder. Used as a context, in which the folder is locked.

    identity: what `identify` returns for the data set. Raises UsageError for a k or a size that the
    data set does not allow.
    """

    def __init__(
        self,
        cfg: Config,
        dataset: Activations,
        identity: dict[str, int | str],
        schedule: Schedule,
        folder: Path,
        choice: SweepChoice,
        workers: Workers,
    ) -> None:
        self.cfg = cfg
        self.dataset = dataset
        self.schedule = schedule
        self.folder = folder
        self.k, self.num_latents, self.seed = choice
        self.workers = workers
        self.checkpoint = folder / "checkpoint.safetensors"
        self.metrics = folder / "metrics.jsonl"
        self.opened = ExitStack()  # the lock and the tracker
        self.iteration = 0  # the next one
        self.seconds = 0.0  # up to now, of earlier sessions too
        self.last_loss = 0.0  # loss + gradient norm of the last update, a tensor on the device
        self.last_row = None  # of metrics.jsonl; it waits for the held-out numbers
        self.check_sizes()

        # a process that holds a slice of the latents has its own way to do the same four things
        self.make_sae = Sae
        self.make_sparse_update = SparseUpdate
        self.save_tensors = save_tensors
        self.load_tensors = load_tensors
        if workers.latents.count > 1:
            from analysis import sharded

            self.make_sae = partial(sharded.ShardedSae, latents=workers.latents)
            self.make_sparse_update = sharded.ShardedUpdate
            self.save_tensors = partial(sharded.save_rows, latents=workers.latents)
            self.load_tensors = partial(sharded.load_rows, latents=workers.latents)

        # what decides the numbers: a run is resumed only with the same
        self.settings = {}
        for name, value in asdict(cfg).items():
            if name not in FREE_TO_CHANGE and name not in RECORDED_PER_SAE:
                self.settings[name] = value
        self.settings |= {"k": self.k, "num_latents": self.num_latents, "seed": self.seed}
        self.settings |= identity

    def check_sizes(self) -> None:
        """Raise UsageError for a number of latents that does not go with the other options."""
        num_shards = self.workers.latents.count
        if self.num_latents < num_shards:
            raise UsageError(
                f"--num_latents {self.num_latents}: expected at least --shard_latents {num_shards}"
            )
        if self.k > self.num_latents * self.schedule.tokens_per_sample:
            raise UsageError(f"--k {self.k}: expected 1 to num_latents = {self.num_latents}")
        for size in self.cfg.matryoshka:
            if size > self.num_latents:
                raise UsageError(
                    f"--matryoshka {size}: expected at most num_latents = {self.num_latents}"
                )

    def __enter__(self) -> "TrainingRun":
        """Lock the folder, and read the checkpoint or the finished SAE that it holds.

        Raises UsageError if these are another run's, or if another train.py writes the folder.
        """
        settings = json.loads(json.dumps(self.settings))
        if any(other != settings for other in self.workers.processes.all_gather(settings)):
            raise UsageError(f"{self.dataset.paths[0]}: the processes do not see the same data")

        with ExitStack() as opened:
            status = None
            if self.workers.is_first:
                if not (self.folder / "cfg.json").exists():
                    opened.enter_context(locked(self.folder))
                status = find_run(self.folder, settings)
            self.finished, self.saved = self.workers.processes.all_gather(status)[0]
            self.opened = opened.pop_all()  # without an error the lock stays until __exit__

        if self.finished and self.workers.is_first:
            # a power cut between the last two lines of `finish` leaves the checkpoint
            self.checkpoint.unlink(missing_ok=True)
            print(
                f"{self.folder} is finished: {self.num_latents} latents, k = {self.k}; "
                "nothing to do"
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self.opened.close()

    def start(self, stats: DataStats) -> None:
        """Begin with b_dec and the scale that the statistics of the data set say."""
        self.run_id = secrets.token_hex(4)
        product = product_dtype(self.cfg.mixed_precision, self.workers.device)
        product_name = str(product).removeprefix("torch.")
        self.make_update(stats.scale, stats.variance, stats.weights, product_name)
        self.sae.b_dec.data.copy_(stats.center)
        self.save()
        self.open_log()

    def resume(self) -> None:
        """Go back to the last checkpoint, and drop the logged rows that came after it."""
        state = self.saved
        self.iteration = state["iteration"]
        self.seconds = state["seconds"]
        self.run_id = state["run_id"]
        self.last_row = state.get("row")
        self.make_update(state["scale"], state["variance"], state["weights"], state["product"])
        tensors = {}
        if self.workers.vectors.index == 0:  # the others get them from this process
            tensors = self.load_tensors(self.checkpoint)
        self.update.load_state_dict(tensors)
        self.open_log()
        print(f"resuming at iteration {self.iteration} of {self.folder}")

    def make_update(
        self, scale: float, variance: float, weights: list[float] | None, product: str
    ) -> None:
        """Make the SAE, and what updates it.

        scale, variance, weights: see DataStats. product: the name of the dtype in which latents are
        chosen, such as "bfloat16".
        """
        cfg = self.cfg
        device = self.workers.device
        self.scale = scale
        self.variance = variance
        self.product = product
        self.weights = None
        if weights is not None:
            self.weights = torch.tensor(weights, device=device)

        variant = {"activation": cfg.activation, "input_unit_norm": cfg.input_unit_norm}
        if self.schedule.tokens_per_sample > 1:
            variant["tokens_per_sample"] = self.schedule.tokens_per_sample
        sae = self.make_sae(self.dataset.d, self.num_latents, self.k, variant, self.seed)
        self.sae = sae.to(device)
        self.update = self.make_sparse_update(
            self.sae,
            variance,
            auxk_alpha=cfg.auxk_alpha,
            dead_feature_threshold=cfg.dead_feature_threshold,
            normalize_decoder=cfg.normalize_decoder,
            multi_topk=cfg.multi_topk,
            matryoshka=cfg.matryoshka,
            dtype=getattr(torch, product),
            group=self.workers.vectors,
        )

    def weights_of(self, timestep_index: torch.Tensor) -> torch.Tensor | None:
        """Return the weight of each vector's error, (n,); None where all errors count alike."""
        if self.weights is None:
            return None
        return self.weights[timestep_index]

    def open_log(self) -> None:
        """Leave in metrics.jsonl the rows up to here, and open what --log_to names."""
        if not self.workers.is_first:
            return
        last_logged = self.iteration
        if self.last_row is not None:  # the row of the last iteration is in the checkpoint
            last_logged -= 1
        rows = [row for row in read_rows(self.metrics) if row["iteration"] <= last_logged]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.metrics, text.encode())
        tracker = open_tracker(
            self.cfg.log_to, self.folder, self.run_id, self.settings, last_logged
        )
        self.send = self.opened.enter_context(tracker)

    def log(self, row: dict[str, float]) -> None:
        """Append a row to metrics.jsonl, and send it to what --log_to names."""
        if not self.workers.is_first:
            return
        with open(self.metrics, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.send(row)

    def check_finite(self) -> None:
        """Raise UsageError if the last update met NaN or infinity.

        After such an update the weights hold NaN or infinity as well. Waits for the device.
        """
        if not math.isfinite(self.last_loss):
            raise UsageError(
                f"NaN or inf in the data or the loss by iteration {self.iteration - 1}; "
                f"the checkpoint {self.checkpoint} is the last good one. Lower --lr, or collect "
                "again"
            )

    def save(self) -> None:
        """Write the checkpoint; the one before it stays until the new one is complete.

        Its tensors are those of `SparseUpdate.state`: the SAE's own (and the threshold of a
        batchtopk), Adam's two moments of each and its step, and for each latent how long it was
        silent and whether it counts as dead. The rest is JSON in the file's metadata. The place in
        the data follows from the iteration.
        """
        self.check_finite()
        if self.workers.vectors.index > 0:
            return
        weights = None
        if self.weights is not None:
            weights = self.weights.tolist()
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "run_id": self.run_id,
            "training": self.settings,
            "scale": self.scale,
            "variance": self.variance,
            "weights": weights,
            "product": self.product,
            "row": self.last_row,
        }
        self.save_tensors(self.checkpoint, self.update.state, {"state": json.dumps(state)})

    def log_batch(self, forward: Forward, lr: float) -> dict[str, float]:
        """Log the numbers of one batch, before its update, as a row of metrics.jsonl. Return it.

        The last row is kept back: `finish` adds the held-out numbers to it.
        """
        metrics = Metrics(self.num_latents)
        metrics.update(forward.x, forward.x_hat, forward.top_acts, forward.top_indices)
        metrics = metrics.gather(self.workers.vectors, self.dataset.d)
        row = {
            "iteration": self.iteration,
            "vectors": self.schedule.vectors_until(self.iteration),
            "seconds": self.seconds,
            "fvu": metrics.fvu,
            "l0": metrics.l0,
            "dead": self.update.num_dead() / self.num_latents,
            "loss": forward.loss.item(),
            "lr": lr,
        }
        if self.iteration == self.schedule.iterations:
            self.last_row = row
        else:
            self.log(row)
        return row

    def trained_sae(self) -> Sae:
        """Return the SAE that takes raw activations: the scale is folded into its biases, exactly.

        A batchtopk SAE also gets its final threshold, instead of the running mean.
        """
        self.sae.scale_inputs(self.scale)
        if "threshold" in self.sae.state_dict():
            sample = self.dataset.sample(TRAINING_SAMPLE, self.cfg.data_seed)
            self.sae.calibrate(sample.to(self.workers.device))
        return self.sae

    def finish(self, by_timestep: list[Metrics]) -> None:
        """Write the SAE, its numbers and its pictures, and print how good it is.

        cfg.json is written last: it says that the run is finished. by_timestep: the SAE's Metrics
        on the held-out vectors of each timestep.
        """
        held_out = total(by_timestep)
        if not math.isfinite(held_out.fvu):
            raise UsageError(
                f"{self.dataset.paths[0]}: NaN or inf in held-out vectors; collect it again. "
                f"{self.checkpoint} is kept"
            )
        row = dict(self.last_row)
        for name, value in held_out.summary().items():
            if name != "vectors":
                row[f"held_out_{name}"] = value
        self.log(row)

        if self.workers.is_first:
            title = self.folder.name
            plot_training(self.folder / "train.png", read_rows(self.metrics), held_out, title)
            plot_evaluation(
                self.folder / "evaluate.png", by_timestep, self.dataset.timesteps, title
            )

        self.sae.cfg |= self.description(held_out, by_timestep)
        self.sae.training_prompts = self.dataset.training_prompts
        if self.workers.vectors.index == 0:
            self.sae.save_to_disk(self.folder)
        if self.workers.is_first:
            self.checkpoint.unlink()
        self.print_result(held_out)

    def description(self, held_out: Metrics, by_timestep: list[Metrics]) -> dict[str, Any]:
        """Return what cfg.json says beside the SAE's own settings: its data and its numbers."""
        dataset = self.dataset
        numbers = held_out.summary()
        num_held_out = numbers.pop("vectors")

        rows = []
        for timestep, metrics in zip(dataset.timesteps, by_timestep):
            if metrics.n:  # few held-out vectors need not have all timesteps
                rows.append({"timestep": timestep, **metrics.summary()})

        return {
            "normalize_decoder": self.cfg.normalize_decoder,
            **provenance(dataset.sources),
            "num_held_out": num_held_out,
            **numbers,
            "held_out_whole_prompts": dataset.whole_prompts,
            "by_timestep": rows,
            "num_training": self.schedule.num_vectors,  # a vector counts once per epoch
            "num_training_in_data": dataset.num_training,
            "training": self.settings,
        }

    def print_result(self, held_out: Metrics) -> None:
        """Print how long training took, how good the SAE is, and where it lies."""
        num_vectors = self.schedule.num_vectors
        speed = f"{num_vectors / self.seconds:,.0f}/s"
        epochs = ""
        if num_vectors > self.dataset.num_training:
            epochs = f", of {self.dataset.num_training:,} in the data"
        print(
            f"trained:  {num_vectors:,} vectors in {self.seconds:.0f} s ({speed}){epochs}; "
            f"{self.num_latents} latents, k = {self.k}"
        )
        fvu = decimals(held_out.fvu, 4)
        dead = decimals(100 * held_out.dead, 2)
        always_on = decimals(100 * held_out.always_on, 2)
        print(
            f"held out: {held_out.n:,} vectors   fvu {fvu}   l0 {held_out.l0:.2f}   "
            f"dead {dead}%   cosine {held_out.cosine:.4f}   always on {always_on}%"
        )
        if held_out.fvu >= 1:
            print(
                "note: an fvu of 1 is what the mean alone gives; "
                f"{self.schedule.iterations} updates are few, try more --num_epochs"
            )
        files = ["cfg.json", "sae.safetensors", "metrics.jsonl", "train.png", "evaluate.png"]
        if self.sae.training_prompts is not None:
            files.append("training_prompts.txt")
        print(f"saved in  {self.folder}/: {', '.join(files)}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep every other train.py out of it, until the context ends.

    Then the lock is removed, and so are the folders that were made here and are still empty.
    Raises UsageError if another train.py holds the lock.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    lock = FileLock(folder / "train.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another train.py is writing to {folder}; wait for it, or choose another --run_name "
            "or --out_dir"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not remove a file that is open
            os.unlink(lock.lock_file)
        lock.release()
        for new_folder in new_folders:
            with suppress(OSError):  # it is not empty
                new_folder.rmdir()


def find_run(folder: Path, settings: dict[str, Any]) -> tuple[bool, dict[str, Any] | None]:
    """Return whether `folder` holds this run finished, and what its cfg.json or checkpoint says.

    For an empty folder it gives (False, None). Raises UsageError if the folder holds anything else:
    another run, or files that are not ours.
    """
    record = folder / "cfg.json"
    checkpoint = folder / "checkpoint.safetensors"
    finished = record.exists()
    if finished:
        state = read_json(record)
    elif checkpoint.exists():
        state = read_state(checkpoint)
    else:
        for path in folder.iterdir():
            if path.name not in LEFTOVERS and not is_hidden(path):
                raise UsageError(
                    f"{folder} holds something else; choose another --run_name or --out_dir"
                )
        return False, None

    theirs = in_current_form(state.get("training"))
    for name, value in settings.items():
        if name in theirs and theirs[name] == value:
            continue
        difference = "other data or by another program"
        if name in theirs and name not in ("num_vectors", "d_in", "digest"):
            difference = f"--{name} {theirs[name]}, not {value}"
        raise UsageError(
            f"{folder} was made with {difference}; choose another --run_name or --out_dir"
        )
    return finished, state


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON that a checkpoint holds beside its tensors, see `TrainingRun.save`.

    Raises UsageError if the file is damaged.
    """
    try:
        with safe_open(checkpoint, "pt") as file:
            return json.loads(file.metadata()["state"])
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{checkpoint} is damaged ({error}); remove its folder to start again"
        ) from None


def in_current_form(theirs: object) -> dict[str, Any]:
    """Return the settings of a run as this version would have written them.

    In an older version activation was two options, and so was grad_acc_steps. Anything but a dict
    gives {}.
    """
    if not isinstance(theirs, dict):
        return {}
    if "activation" in theirs or "micro_acc_steps" not in theirs:
        return theirs

    activation = "topk"
    if theirs.get("batch_topk"):
        activation = "batchtopk"
    if theirs.get("sample_topk"):
        activation = "sampletopk"
    grad_acc_steps = theirs["grad_acc_steps"] * theirs["micro_acc_steps"]
    return theirs | {"activation": activation, "grad_acc_steps": grad_acc_steps}


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl, without a last one that a power cut has torn.

    A file that is not there gives []. Raises UsageError if a row before others is damaged.
    """
    if not path.exists():
        return []
    rows = [read_row(line) for line in path.read_text("utf-8", errors="replace").splitlines()]
    if None not in rows:
        return rows

    num_whole = rows.index(None)
    if any(rows[num_whole:]):
        raise UsageError(
            f"{path}: line {num_whole + 1} is damaged; remove it to go on without its numbers"
        )
    return rows[:num_whole]


def read_row(line: str) -> dict[str, float] | None:
    """Return a line of metrics.jsonl as a dict, or None if it is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    for name in ("iteration", "vectors", "fvu", "dead"):
        if not isinstance(row.get(name), (int, float)):
            return None
    return row


def import_tracker(log_to: str) -> Any:
    """Return the module that --log_to names, None for "none".

    Raises UsageError if it is not installed.
    """
    if log_to == "none":
        return None
    name = "torch.utils.tensorboard" if log_to == "tensorboard" else log_to
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"--log_to {log_to}: not installed; pip install {log_to}") from None


@contextmanager
def open_tracker(
    log_to: str, folder: Path, run_id: str, settings: dict[str, Any], last_logged: int
) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield a function that sends a row of metrics.jsonl to the tracker that --log_to names.

    last_logged: the last iteration whose row the tracker has already, 0 for a new run.
    """
    tracker = import_tracker(log_to)
    if log_to == "none":
        yield ignore_row
    elif log_to == "tensorboard":
        with closing(tracker.SummaryWriter(str(folder), purge_step=last_logged + 1)) as writer:
            yield partial(send_to_tensorboard, writer)
    else:
        options = {
            "project": os.environ.get(f"{log_to.upper()}_PROJECT", "diffusion-saes"),
            "name": f"{folder.name}-{run_id}",
            "config": settings,
            "resume": "allow",
        }
        if log_to == "wandb":  # trackio resumes by the name
            options["id"] = run_id
        tracker.init(**options)
        try:
            yield partial(send_to_service, tracker)
        finally:
            tracker.finish()


def ignore_row(row: dict[str, float]) -> None:
    """Send the row nowhere."""


def send_to_tensorboard(writer: Any, row: dict[str, float]) -> None:
    """Write each number of a row with a SummaryWriter."""
    for name, value in row.items():
        writer.add_scalar(name, value, row["iteration"])


def send_to_service(tracker: Any, row: dict[str, float]) -> None:
    """Send a row to wandb or trackio, which share this function."""
    tracker.log(row, step=row["iteration"])


def print_and_plot_sweep(folders: list[Path], path: Path) -> None:
    """Print a table of several SAEs of one data set, the best first, and draw FVU against L0."""
    records = {folder: read_json(folder / "cfg.json") for folder in folders}
    print(f"\n{'run':44} {'M':>7} {'k':>5} {'seed':>5} {'fvu':>8} {'l0':>8} {'dead':>7}")
    for folder in sorted(folders, key=lambda folder: records[folder]["fvu"]):
        record = records[folder]
        print(
            f"{folder.name:44} {record['num_latents']:7} {record['k']:5} "
            f"{record['training']['seed']:5} {decimals(record['fvu'], 4):>8} "
            f"{record['l0']:8.2f} {decimals(100 * record['dead'], 2):>6}%"
        )
    plot_sweep(path, list(records.values()))
    print(f"FVU against L0: {path}")


def training_device(name: str) -> torch.device:
    """Return the device that --device names. "auto" is not MPS, which must be asked for by name."""
    device = resolve_device(name)
    if name == "auto" and device.type == "mps":
        print(
            "training on the CPU: many PyTorch versions lack embedding_bag on MPS; "
            "--device mps tries it"
        )
        device = torch.device("cpu")
    return device


def with_activation(cfg: Config) -> Config:
    """Return the options with `activation` set, also from its older names.

    --batch_topk gives activation="batchtopk", no option gives "topk". Raises UsageError if two of
    the options contradict each other, as in --activation topk --batch_topk.
    """
    names = set()
    if cfg.activation is not None:
        names.add(cfg.activation)
    if cfg.batch_topk:
        names.add("batchtopk")
    if cfg.sample_topk:
        names.add("sampletopk")
    if len(names) > 1:
        raise UsageError(
            "--activation, --batch_topk and --sample_topk: expected one, "
            f"got {' and '.join(sorted(names))}"
        )
    activation = names.pop() if names else "topk"
    return replace(cfg, activation=activation)


def check_memory(runs: list["TrainingRun"], dataset: Activations, workers: Workers) -> None:
    """Raise UsageError if training all SAEs together needs more memory than this device has free.

    The largest need is counted: 34 bytes for each number of a matrix (M, d). They are 24 for two
    matrices and their two moments each, 8 for gradients (or to draw the first rows), and 2 for a
    copy in 16 bits.
    """
    free = min(workers.processes.all_gather(free_memory(workers.processes)))
    num_latents = sum(run.num_latents for run in runs)
    needed = 34 * num_latents * dataset.d / workers.latents.count
    if needed > free:
        sizes = " ".join(dict.fromkeys(str(run.num_latents) for run in runs))
        raise UsageError(
            f"--num_latents {sizes}: training {len(runs)} SAE(s) takes {needed / 1e9:.3g} GB, "
            f"where {free / 1e9:.3g} GB are free"
        )


def free_memory(processes: Processes) -> float:
    """Return the bytes that this process can still use on its device; infinity if unknown."""
    if processes.device.type == "cuda":
        return torch.cuda.mem_get_info(processes.device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable"):  # "MemAvailable:   12345678 kB"
                return 1024 * int(line.split()[1]) / processes.local_count
    return math.inf


def check_options(cfg: Config) -> None:
    """Raise UsageError for a value that can't be used, or a --log_to that is not installed."""
    check_positive(cfg, "effective_batch_size", "num_epochs", "max_examples")
    check_positive(cfg, "dead_feature_threshold", "grad_acc_steps", "log_every", "save_every")
    if cfg.expansion_factor and cfg.num_latents:
        raise UsageError(
            f"--expansion_factor {as_words(cfg.expansion_factor)} and --num_latents "
            f"{as_words(cfg.num_latents)} both say how many latents there are; give one of them"
        )
    for name in ("k", "num_latents", "matryoshka", "expansion_factor"):
        require(min(getattr(cfg, name), default=1) > 0, cfg, name, "numbers from 1")
    require(len(cfg.k) > 0, cfg, "k", "numbers from 1")
    require(len(cfg.seeds) > 0, cfg, "seeds", "at least one number")
    require(cfg.data_seed >= 0, cfg, "data_seed", "0 or more")
    require(cfg.lr is None or 0 < cfg.lr < math.inf, cfg, "lr", "a positive number")
    require(cfg.buffer_gb > 0, cfg, "buffer_gb", "a positive number")
    require(cfg.lr_warmup_steps >= 0, cfg, "lr_warmup_steps", "0 or more")
    require(0 <= cfg.auxk_alpha < math.inf, cfg, "auxk_alpha", "0 or more")
    if cfg.multi_topk:
        is_alone = cfg.activation == "topk" and not cfg.matryoshka
        expected = "no other --activation than topk, and no --matryoshka with it"
        require(is_alone, cfg, "multi_topk", expected)
    run_path = Path(cfg.run_name or "")
    if run_path.is_absolute() or ".." in run_path.parts:
        raise UsageError(f"--run_name {cfg.run_name}: expected a name inside --out_dir")
    import_tracker(cfg.log_to)


def require(is_fine: bool, cfg: Config, name: str, expected: str) -> None:
    """Raise UsageError for the value of the option `name` unless it is fine."""
    if not is_fine:
        value = getattr(cfg, name)
        if isinstance(value, list):
            value = as_words(value)
        raise UsageError(f"--{name} {value}: expected {expected}")


def as_words(values: list[int]) -> str:
    """Return a list as it is typed on the command line: [16, 32] is "16 32", [] is "(none)"."""
    return " ".join(map(str, values)) or "(none)"


if __name__ == "__main__":
    run_script(main, Config)
