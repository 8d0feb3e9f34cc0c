"""Train sparse autoencoders (SAEs) on the activations that collect.py stored.

    python train.py                                                    # the newest file in activations/
    python train.py --data activations/mid_block.npy --k 32 --expansion_factor 8
    python train.py --k 16 32 64 --expansion_factor 8 16 --seeds 0 1   # twelve SAEs from one reading of the file
    torchrun --nproc_per_node 4 train.py --shard_latents 2             # 2 x 2 GPUs: vectors and latents are split

A TopK SAE with the auxiliary loss that revives dead latents (AuxK), trained by Adam on vectors
shuffled one by one over all prompts. b_dec starts at the geometric median of a sample, the encoder
as the decoder's transpose; decoder rows keep unit norm. A tenth of the prompts is kept from
training and gives the final numbers, by timestep and overall (analysis/metrics.py).

Reads   activation files (.npy: floats, last axis d; see README), several, a glob or a folder; one SAE a hook name.
Writes  <out_dir>/<run_name>/: cfg.json, sae.safetensors, training_prompts.txt (a hash of each prompt that training saw),
        metrics.jsonl, train.png, evaluate.png; checkpoint.safetensors until done. Of several SAEs also a picture of FVU
        against L0, <out_dir>/<run_name or file>_sweep.png.
Stopped by Ctrl-C or kill -9, the same command resumes and ends with the same bits. A run is never
overwritten. In a row of metrics.jsonl, fvu, l0 and loss are of that iteration's batch alone, before
its update; dead counts latents.

Sources: TopK and AuxK, Gao et al. 2024 (arXiv 2406.04093), sections 2.3, 2.4 and A.2; the centring,
D-Scope 2026.
"""

import importlib
import json
import math
import os
import secrets
import signal
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from analysis.data_stats import TRAINING_SAMPLE, DataStats, measure
from analysis.metrics import Metrics, evaluate, total
from analysis.plots import plot_evaluation, plot_sweep, plot_training
from cli import check_positive, product_dtype, resolve_device
from cli import run as run_script
from distributed import ALONE, Group, Processes
from errors import UsageError
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

# Of its updates batchtopk and sampletopk make like top-k: on the toy batchtopk ended with an FVU of
# 0.074, not 0.096, sampletopk in mid_block with 0.108, not 0.123; and in bench truth batchtopk
# found 99 % of the atoms, not 79 %.
PLAIN_TOPK_UNTIL = 0.3
# Options that a resumed run may change; whether the data are the same is seen from a sample.
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
# What a run that was killed before its first checkpoint may leave in its folder
LEFTOVERS = ("checkpoint.safetensors.partial", "train.lock")
# Options whose values for one SAE stand in its settings: k, num_latents, seed, activation.
NAMED_OTHERWISE = ("k", "num_latents", "expansion_factor", "seeds", "batch_topk", "sample_topk")


@dataclass
class Config:
    data: list[str] = field(default_factory=list)
    """.npy files, globs, folders (none: newest in activations/)."""

    out_dir: str = "saes"
    """The folder in which each run gets its own."""

    run_name: str | None = None
    """Its name (None: made of the file, k, num_latents and variant)."""

    expansion_factor: list[int] = field(default_factory=lambda: [16])
    """The number of latents as a multiple of the vectors' width."""

    num_latents: list[int] = field(default_factory=list)
    """Sizes of the dictionary, instead of expansion_factor."""

    k: list[int] = field(default_factory=lambda: [16])
    """Active latents a vector; with sampletopk, of a whole sample."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Of the weights; every k, size and seed gives an SAE."""

    activation: Literal["topk", "batchtopk", "sampletopk"] | None = None
    """Which latents stay: see sae.py (None: topk)."""

    batch_topk: bool = False
    """The same as --activation batchtopk: k a vector on average over a batch; in use, a
    threshold."""

    sample_topk: bool = False
    """The same as --activation sampletopk: k for all tokens of one (prompt, step)."""

    multi_topk: bool = False
    """4 k latents are to reconstruct as well, with an eighth of the weight."""

    matryoshka: list[int] = field(default_factory=list)
    """So many first latents are to reconstruct as well, e.g. 1024 4096."""

    input_unit_norm: bool = False
    """Each vector is given mean 0 and variance 1 first."""

    center: Literal["median", "mean", "none"] = "median"
    """Where b_dec starts: geometric median or mean of a sample, or 0."""

    loss_weight: Literal["none", "per_step"] = "none"
    """per_step: errors count by 1 / mean square at their timestep."""

    normalize_decoder: bool = True
    """Keep the rows of W_dec at unit norm."""

    effective_batch_size: int = 1024
    """Vectors per optimizer update, in all."""

    num_epochs: int = 1
    """Passes over the training vectors."""

    max_examples: int | None = None
    """Stop after this many vectors."""

    lr: float | None = None
    """Adam's learning rate (None: 2e-4 / sqrt(num_latents / 2^14), up to 6 times that for short
    runs)."""

    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """Linear falls to 0 over the last fifth."""

    lr_warmup_steps: int = 100
    """Iterations in which the learning rate rises from 0, at most a fifth of all."""

    auxk_alpha: float = 1 / 32
    """Weight of the AuxK loss; 0 switches it off."""

    dead_feature_threshold: int = 100_000
    """A latent is dead after this many vectors without a nonzero activation."""

    grad_acc_steps: int = 1
    """An update goes through in this many parts, to save memory."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Of the encoder's product; auto: 16 bits where they are fast."""

    buffer_gb: float = 2.0
    """Memory of the shuffle buffer of each process; a file that fits is shuffled perfectly."""

    shard_latents: int = 1
    """Neighbouring processes of torchrun that own a slice of the latents each; else vectors are
    split."""

    data_seed: int = 0
    """Of the order of the vectors; the held-out prompts are the same for every seed."""

    device: str = "auto"
    """Auto, cuda, cuda:N, mps, cpu."""

    log_every: int = 10
    """Iterations between rows of metrics.jsonl; a row describes one batch."""

    save_every: int = 1000
    """Iterations between checkpoints."""

    log_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    """Where the rows of metrics.jsonl go as well."""


@dataclass(frozen=True)
class Schedule:
    """How many vectors a run sees, and in what portions."""

    num_vectors: int
    batch_size: int
    tokens_per_sample: int
    """Vectors that stay together: the tokens of one prompt and step for sampletopk, else 1."""

    @classmethod
    def plan(cls, cfg: Config, dataset: Activations) -> "Schedule":
        """Whole samples only. Raises UsageError for sampletopk without samples, and where
        --max_examples is less than one."""
        takes_samples = Sae(1, 1, 1, {"activation": cfg.activation}).takes_samples
        tokens = dataset.sample_tokens() if takes_samples else 1
        num_vectors = (
            min(cfg.max_examples or math.inf, cfg.num_epochs * dataset.num_training)
            // tokens
            * tokens
        )
        if not num_vectors:
            raise UsageError(
                f"--max_examples {cfg.max_examples}: expected at least {tokens}, the tokens of one sample"
            )
        samples_per_batch = max(1, cfg.effective_batch_size // tokens)
        return cls(num_vectors, samples_per_batch * tokens, tokens)

    @property
    def iterations(self) -> int:
        return math.ceil(self.num_vectors / self.batch_size)

    def vectors_until(self, iteration: int) -> int:
        """How many vectors come before an iteration; only the last batch can be smaller."""
        return min(iteration * self.batch_size, self.num_vectors)

    def is_due(self, iteration: int, every: int) -> bool:
        """True in every `every`-th iteration and in the last one."""
        return (iteration + 1) % every == 0 or iteration + 1 == self.iterations


def peak_learning_rate(iterations: int, num_latents: int) -> float:
    """Adam's, where --lr is not given: sparsify's 2e-4 / sqrt(num_latents / 2^14) for 30,000
    iterations and more, up to 6 times that for fewer. On the toy (1,438 iterations) the FVU falls
    from 0.079 to 0.058, and in mid_block (360) from 0.16 to 0.096."""
    short_run = math.sqrt(30_000 / iterations)
    return 2e-4 / math.sqrt(num_latents / 2**14) * min(6, max(1, short_run))


def learning_rate(iteration: int, iterations: int, num_latents: int, cfg: Config) -> float:
    """The learning rate of an iteration, counted from 0."""
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


def train(
    cfg: Config,
    dataset: Activations,
    schedule: Schedule,
    runs: list["TrainingRun"],
    processes: Processes,
    vectors: Group,
) -> None:
    """Give every batch to every run, from the oldest checkpoint on.

    Ctrl-C lets the iteration end, saves all runs and raises KeyboardInterrupt. vectors: the
    processes that split each batch.
    """
    device = processes.device
    pinned = device.type == "cuda"
    iterations, batch_size, tokens = (
        schedule.iterations,
        schedule.batch_size,
        schedule.tokens_per_sample,
    )
    start = min(run.iteration for run in runs)
    batches = dataset.batches(
        batch_size,
        stop=schedule.num_vectors,
        start=schedule.vectors_until(start),
        seed=cfg.data_seed,
        buffer_gb=cfg.buffer_gb,
        tokens=tokens,
        share=(vectors.index, vectors.count),
        pin=pinned,
    )
    bar = tqdm(
        total=schedule.num_vectors,
        initial=schedule.vectors_until(start),
        unit="vec",
        unit_scale=True,
        dynamic_ncols=True,
        desc=runs[0].folder.name,
        disable=processes.rank > 0,
    )
    for run in runs:
        run.began = time.perf_counter() - run.seconds

    with bar, interrupt_later() as pressed:
        for iteration, (x, timestep_index) in enumerate(batches, start):
            # this process's part of the batch, (n, d), and how many vectors the parts of all
            # processes have
            x = x.to(device, non_blocking=pinned).float()
            size = schedule.vectors_until(iteration + 1) - schedule.vectors_until(iteration)
            if cfg.loss_weight == "per_step":
                timestep_index = timestep_index.to(device)  # which makes a GPU wait
            plain_topk = iteration < PLAIN_TOPK_UNTIL * iterations
            logging = schedule.is_due(iteration, cfg.log_every)
            saving = schedule.is_due(iteration, cfg.save_every)

            for run in runs:
                if iteration < run.iteration:
                    continue  # this run's checkpoint is ahead of the others

                lr = learning_rate(iteration, iterations, run.num_latents, cfg)
                samples = (x * run.scale).unflatten(0, (len(x) // tokens, tokens))
                weights = None if run.weights is None else run.weights[timestep_index]
                num_parts = min(size, cfg.grad_acc_steps)
                if iteration % LIST_DEAD_EVERY == 0:
                    run.update.list_dead()

                # the gradients are written out by hand: autograd would make dense ones
                forward = run.update.forward(samples, size, plain_topk, weights, num_parts)
                gradients = run.update.backward(forward)
                grad_norm = run.update.step(gradients, lr)

                # nothing above waits for a GPU but list_dead; what follows does
                run.iteration = iteration + 1
                run.last_loss = forward.loss + grad_norm  # NaN if either is
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

            bar.update(size)
            if processes.any(pressed):
                for run in runs if iteration + 1 < iterations else []:  # the last update is saved
                    run.save()
                bar.write(
                    f"stopped at iteration {iteration + 1} of {iterations}; the same command resumes"
                )
                raise KeyboardInterrupt

    for run in runs:
        run.seconds = max(time.perf_counter() - run.began, 0.01)


@contextmanager
def interrupt_later():
    """The first Ctrl-C or SIGTERM only fills the list, so that no iteration is cut in two; a second
    Ctrl-C acts as always."""
    pressed, main_thread = [], threading.current_thread() is threading.main_thread()

    def handler(number, _):
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signals = (
        (signal.SIGINT, signal.SIGTERM) if main_thread else ()
    )  # Python allows it nowhere else
    previous = [signal.signal(number, handler) for number in signals]
    try:
        yield pressed
    finally:
        for number, action in zip(signals, previous):
            signal.signal(number, action)


def main(cfg: Config) -> list[Path]:
    """Train one SAE per data set, size, k and seed; return their folders.

    Raises UsageError if an option or the data can't be used, or a folder holds another run.
    """
    cfg = with_activation(cfg)
    check_options(cfg)
    processes = Processes(training_device(cfg.device))
    vectors = latents = ALONE
    if processes.count > 1 or cfg.shard_latents != 1:
        from analysis.sharded import grid

        vectors, latents = grid(processes, cfg.shard_latents)
    datasets = open_activations(cfg.data or [default_activations(processes.rank == 0)])
    folders = []
    for dataset in datasets:
        folders += train_on(cfg, dataset, len(datasets) == 1, processes, vectors, latents)
    processes.barrier()
    processes.close()
    return folders


def default_activations(say: bool) -> Path:
    """The newest activation file; print which one, and how many others lie beside it."""
    newest = newest_activations()
    others = (
        len(set(newest.parent.glob("*.npy")) & set(files_in(newest.parent))) - 1
        if newest.is_file()
        else 0
    )
    if say and others > 0:
        print(
            f"training on {newest}, the newest of {others + 1} files there; --data {newest.parent} trains an SAE for each"
        )
    return newest


def train_on(cfg, dataset, is_only, processes, vectors, latents) -> list[Path]:
    """All SAEs of one data set, each vector read once for all. Returns their folders."""
    # 1. The runs: new ones, ones to be resumed, and finished ones
    if processes.rank == 0:
        say_what_differs(dataset)
    schedule = Schedule.plan(cfg, dataset)
    base, wanted = plan_folders(cfg, dataset, is_only)
    data = identify(dataset)
    with ExitStack() as opened:
        runs = []
        for folder, (k, num_latents, seed) in wanted.items():
            run = TrainingRun(
                cfg,
                dataset,
                data,
                schedule,
                folder,
                k,
                num_latents,
                seed,
                processes,
                vectors,
                latents,
            )
            runs.append(opened.enter_context(run))
        unfinished = [run for run in runs if not run.finished]

        # 2. Train them together, then measure them on vectors that training never saw
        if unfinished:
            check_memory(unfinished, dataset, processes, latents)
            stats = None
            if any(run.saved is None for run in unfinished):
                stats = measure_once(cfg, dataset, processes)
            for run in unfinished:
                run.resume() if run.saved else run.start(stats)
            product = unfinished[0].product
            many = f"{len(unfinished)} SAEs" if len(unfinished) > 1 else "1 SAE"
            print(f"{many}: the encoder's product in {product}, the rest in float32")
            train(cfg, dataset, schedule, unfinished, processes, vectors)

            saes = [run.trained_sae() for run in unfinished]
            part = math.ceil(schedule.batch_size / cfg.grad_acc_steps)
            found = evaluate(saes, dataset, part, progress=processes.rank == 0, vectors=vectors)
            for run, by_step in zip(unfinished, found):
                run.finish(by_step)
            if not dataset.whole_prompts:
                print(
                    "note: there are no prompts to hold out whole, so held-out vectors are of the same samples as the others"
                )

    # 3. A table and a picture of all of them
    if len(runs) > 1 and processes.rank == 0:
        summarize(list(wanted), base / f"{Path(dataset.paths[0]).stem}_sweep.png")
    return list(wanted)


def say_what_differs(dataset: Activations) -> None:
    """Print one line for each file that was collected with other options than the first one."""
    first, *others = dataset.sources
    if others and not first.meta:
        print(
            f"note: {len(dataset.sources)} files without a description are one data set; train on each with its own --data"
        )
    for other in others:
        found = differences(
            collected_with(first.meta) | {"seed": None}, collected_with(other.meta) | {"seed": None}
        )
        if found:
            print(
                f"note: {other.path} was collected otherwise than {first.path}: {'; '.join(found)}"
            )


def plan_folders(cfg, dataset, is_only):
    """The folder that holds all SAEs of a data set, and {folder of one: (k, num_latents, seed)}."""
    stem = Path(dataset.paths[0]).stem
    sizes = cfg.num_latents or [factor * dataset.d for factor in cfg.expansion_factor]
    each = list(dict.fromkeys((k, M, seed) for M in sizes for k in cfg.k for seed in cfg.seeds))
    base = Path(cfg.out_dir)
    if not cfg.run_name:
        return base, {base / f"{stem}_{name_of(cfg, *one)}": one for one in each}
    base = base / cfg.run_name / ("" if is_only else stem)
    if len(each) == 1:
        return base, {base: each[0]}
    return base, {base / name_of(cfg, *one): one for one in each}


def name_of(cfg, k, num_latents, seed):
    """What tells one SAE of a data set from another."""
    variant = {"topk": "", "batchtopk": "_batch_topk", "sampletopk": "_sample_topk"}[cfg.activation]
    others = [
        name for name in ("multi_topk", "input_unit_norm", "matryoshka") if getattr(cfg, name)
    ]
    variant += "".join(f"_{name}" for name in others)
    return f"k{k}_M{num_latents}{variant}{f'_seed{seed}' * (seed != 0)}"


def identify(dataset):
    """What tells a data set from another: its sizes, and a digest of a sample and of the order of
    its vectors."""
    return {"d_in": dataset.d, "num_vectors": dataset.num_vectors, "digest": dataset.digest()}


def measure_once(cfg, dataset, processes):
    """The first process's DataStats, in all of them."""
    stats = None
    if processes.rank == 0:
        per_step = cfg.loss_weight == "per_step"
        stats = measure(
            dataset, cfg.center, cfg.input_unit_norm, per_step, cfg.data_seed, processes.device
        )
        print(f"data      gamma {stats.gamma:.2f}; python diagnose.py says more")
        stats = asdict(replace(stats, center=stats.center.tolist()))
    stats = processes.all_gather(stats)[0]
    return DataStats(**stats | {"center": torch.tensor(stats["center"])})


class TrainingRun:
    """One SAE in training, and its folder. Used as a context, in which the folder is locked.

    data: what `identify` says of the data set. vectors, latents: the groups of `sharded.grid` that
    split them. Raises UsageError for a k or a size that the data set does not allow.
    """

    def __init__(
        self,
        cfg: Config,
        dataset: Activations,
        data: dict,
        schedule: Schedule,
        folder: Path,
        k: int,
        num_latents: int,
        seed: int,
        processes: Processes,
        vectors: Group,
        latents: Group,
    ):
        self.cfg, self.dataset, self.schedule = cfg, dataset, schedule
        self.folder, self.k, self.num_latents, self.seed = folder, k, num_latents, seed
        self.processes, self.vectors = processes, vectors
        parts = Sae, SparseUpdate, save_tensors, load_tensors
        if latents.count > 1:
            from analysis.sharded import parts_of

            parts = parts_of(latents)
        self.make_sae, self.make_sparse_update, self.save_tensors, self.load_tensors = parts
        self.checkpoint = folder / "checkpoint.safetensors"
        self.metrics = folder / "metrics.jsonl"
        self.opened = ExitStack()
        self.iteration = 0  # the next one
        self.seconds = 0.0  # up to now, of earlier sessions too
        self.last_loss = 0.0  # loss + gradient norm of the last update, a tensor on the device
        self.last_row = None  # of metrics.jsonl: waits for the held-out numbers
        if num_latents < latents.count:
            raise UsageError(
                f"--num_latents {num_latents}: expected at least --shard_latents {latents.count}"
            )
        if k > num_latents * schedule.tokens_per_sample:
            raise UsageError(f"--k {k}: expected 1 to num_latents = {num_latents}")
        if wrong := [m for m in cfg.matryoshka if m > num_latents]:
            raise UsageError(
                f"--matryoshka {wrong[0]}: expected at most num_latents = {num_latents}"
            )

        # what decides the numbers: a run is resumed only with the same
        fixed = {
            name: value
            for name, value in asdict(cfg).items()
            if name not in FREE_TO_CHANGE + NAMED_OTHERWISE
        }
        self.settings = fixed | {"k": k, "num_latents": num_latents, "seed": seed} | data

    def __enter__(self) -> "TrainingRun":
        """Lock the folder, and look at what it holds. Raises UsageError if that is another run, or
        another train.py writes it."""
        settings = json.loads(json.dumps(self.settings))
        if any(other != settings for other in self.processes.all_gather(settings)):
            raise UsageError(f"{self.dataset.paths[0]}: the processes do not see the same data")
        with ExitStack() as opened:
            found = None
            if self.processes.rank == 0:
                if not (self.folder / "cfg.json").exists():
                    opened.enter_context(locked(self.folder))
                found = find_run(self.folder, settings)
            self.finished, self.saved = self.processes.all_gather(found)[0]
            self.opened = opened.pop_all()
        if self.finished and self.processes.rank == 0:
            self.checkpoint.unlink(missing_ok=True)  # where a power cut came just before it went
            print(
                f"{self.folder} is finished: {self.num_latents} latents, k = {self.k}; nothing to do"
            )
        return self

    def __exit__(self, *error):
        self.opened.close()

    def start(self, stats: DataStats) -> None:
        """Begin at the DataStats of the data set."""
        self.run_id = secrets.token_hex(4)
        product = product_dtype(self.cfg.mixed_precision, self.processes.device)
        self.make_update(
            stats.scale, stats.variance, stats.weights, str(product).removeprefix("torch.")
        )
        self.sae.b_dec.data.copy_(stats.center)
        self.save()
        self.open_log()

    def resume(self) -> None:
        """Go back to the last checkpoint, and drop the logged rows that came after it."""
        state = self.saved
        self.iteration, self.seconds, self.run_id = (
            state["iteration"],
            state["seconds"],
            state["run_id"],
        )
        self.last_row = state.get("row")
        self.make_update(state["scale"], state["variance"], state["weights"], state["product"])
        self.update.load_state_dict(
            self.load_tensors(self.checkpoint) if self.vectors.index == 0 else {}
        )
        self.open_log()
        print(f"going on at iteration {self.iteration} of {self.folder}")

    def make_update(self, scale, variance, weights, product):
        """The SAE, and what updates it. product: name of the dtype in which latents are chosen."""
        cfg, device = self.cfg, self.processes.device
        self.scale, self.variance, self.product = scale, variance, product
        self.weights = weights and torch.tensor(weights, device=device)
        variant = {"activation": cfg.activation, "input_unit_norm": cfg.input_unit_norm}
        if self.schedule.tokens_per_sample > 1:
            variant["tokens_per_sample"] = self.schedule.tokens_per_sample
        self.sae = self.make_sae(self.dataset.d, self.num_latents, self.k, variant, self.seed).to(
            device
        )
        self.update = self.make_sparse_update(
            self.sae,
            variance,
            auxk_alpha=cfg.auxk_alpha,
            dead_feature_threshold=cfg.dead_feature_threshold,
            normalize_decoder=cfg.normalize_decoder,
            multi_topk=cfg.multi_topk,
            matryoshka=cfg.matryoshka,
            dtype=getattr(torch, product),
            group=self.vectors,
        )

    def open_log(self):
        """Leave in metrics.jsonl the rows up to here, and open what --log_to names."""
        if self.processes.rank > 0:
            return
        done = self.iteration - (self.last_row is not None)
        kept = [row for row in read_rows(self.metrics) if row["iteration"] <= done]
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.send = self.opened.enter_context(
            open_tracker(self.cfg.log_to, self.folder, self.run_id, self.settings, done)
        )

    def log(self, row):
        """Append a row to metrics.jsonl, and send it where --log_to says."""
        if self.processes.rank > 0:
            return
        with open(self.metrics, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.send(row)

    def check_finite(self):
        """UsageError where the last update was of NaN or inf: the weights are, from then on; asking
        makes a GPU wait."""
        if not math.isfinite(self.last_loss):
            iteration = self.iteration - 1
            raise UsageError(
                f"NaN or inf in the data or the loss by iteration {iteration}; {self.checkpoint} is the last good"
            )

    def save(self) -> None:
        """Write the checkpoint: the tensors of `SparseUpdate.state`, and beside them what stands
        below.

        The tensors are the SAE's own (and the threshold of a batchtopk), Adam's two moments of each
        and its step, and for each latent how long it was silent and whether it counts as dead. The
        place in the data follows from the iteration.
        """
        self.check_finite()
        if self.vectors.index > 0:
            return
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "run_id": self.run_id,
            "training": self.settings,
            "scale": self.scale,
            "variance": self.variance,
            "weights": None if self.weights is None else self.weights.tolist(),
            "product": self.product,
            "row": self.last_row,
        }
        self.save_tensors(self.checkpoint, self.update.state, {"state": json.dumps(state)})

    def log_batch(self, forward: Forward, lr: float) -> dict[str, float]:
        """Log the numbers of this batch, by the weights that it found, as a row of metrics.jsonl;
        the last row waits."""
        metrics = Metrics(self.num_latents)
        metrics.update(forward.x, forward.x_hat, forward.top_acts, forward.top_indices)
        metrics = metrics.gather(self.vectors, self.dataset.d)
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
        """The SAE that takes activations as they are: the scale is folded into its biases,
        exactly."""
        self.sae.scale_inputs(self.scale)
        if "threshold" in self.sae.state_dict():  # instead of its running mean
            sample = self.dataset.sample(TRAINING_SAMPLE, self.cfg.data_seed)
            self.sae.calibrate(sample.to(self.processes.device))
        return self.sae

    def finish(self, by_step: list[Metrics]) -> None:
        """Write the SAE, its numbers and its pictures; cfg.json last: it says that the run is
        finished. Say how good it is.

        by_step: its Metrics on the held-out vectors of each timestep.
        """
        dataset, held_out = self.dataset, total(by_step)
        if not math.isfinite(held_out.fvu):
            raise UsageError(
                f"{dataset.paths[0]}: NaN or inf in held-out vectors; collect it again. {self.checkpoint} is kept"
            )
        numbers = held_out.summary()
        num_held_out = numbers.pop("vectors")
        self.log(self.last_row | {f"held_out_{name}": value for name, value in numbers.items()})
        self.sae.cfg |= {
            "normalize_decoder": self.cfg.normalize_decoder,
            **provenance(dataset.sources),
            "num_held_out": num_held_out,
            **numbers,
            "held_out_whole_prompts": dataset.whole_prompts,
            "by_timestep": [
                {"timestep": t, **m.summary()} for t, m in zip(dataset.timesteps, by_step) if m.n
            ],
            "num_training": self.schedule.num_vectors,  # seen, each as often as it was
            "num_training_in_data": dataset.num_training,
            "training": self.settings,
        }
        if self.processes.rank == 0:
            plot_training(
                self.folder / "train.png", read_rows(self.metrics), held_out, self.folder.name
            )
            plot_evaluation(
                self.folder / "evaluate.png", by_step, dataset.timesteps, self.folder.name
            )
        self.sae.training_prompts = dataset.training_prompts
        if self.vectors.index == 0:
            self.sae.save_to_disk(self.folder)
        if self.processes.rank == 0:
            self.checkpoint.unlink()
        self.say(held_out)

    def say(self, held_out):
        """The numbers in words."""
        seen, shape = self.schedule.num_vectors, f"{self.num_latents} latents, k = {self.k}"
        again = (
            f", of {self.dataset.num_training:,} in the data"
            if seen > self.dataset.num_training
            else ""
        )
        print(
            f"trained:  {seen:,} vectors in {self.seconds:.0f} s ({seen / self.seconds:,.0f}/s){again}; {shape}"
        )
        numbers = f"fvu {held_out.fvu:.4f}   l0 {held_out.l0:.2f}   dead {held_out.dead:.2%}   cosine {held_out.cosine:.4f}"
        print(f"held out: {held_out.n:,} vectors   {numbers}   always on {held_out.always_on:.2%}")
        if held_out.fvu >= 1:
            few = f"{self.schedule.iterations} updates are few, try more --num_epochs"
            print(f"note: an fvu of 1 is what the mean alone gives; {few}")
        print(
            f"saved in  {self.folder}/: cfg.json, sae.safetensors, metrics.jsonl, train.png, evaluate.png"
        )


@contextmanager
def locked(folder):
    """No other train.py writes to the folder meanwhile, in which nothing remains of this.
    UsageError where one does already."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    lock = FileLock(folder / "train.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        what = "wait for it, or choose another --run_name or --out_dir"
        raise UsageError(f"another train.py is writing to {folder}; {what}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not while it is open
            os.unlink(lock.lock_file)
        lock.release()
        for empty in made:
            with suppress(OSError):  # it is not
                empty.rmdir()


def find_run(folder, settings):
    """Whether `folder` holds this run finished, and the state of its checkpoint, None if it is new.

    Raises UsageError where it holds anything else: another run, or files that are not ours.
    """
    record, checkpoint = folder / "cfg.json", folder / "checkpoint.safetensors"
    finished = record.exists()
    if finished:
        state = read_json(record)
    elif checkpoint.exists():
        state = read_state(checkpoint)
    elif any(not is_hidden(path) for path in folder.iterdir() if path.name not in LEFTOVERS):
        raise UsageError(f"{folder} holds something else; choose another --run_name or --out_dir")
    else:
        return False, None

    theirs = in_current_words(state.get("training"))
    for name in settings:
        if name not in theirs or theirs[name] != settings[name]:
            known = name in theirs and name not in ("num_vectors", "d_in", "digest")
            what = (
                f"--{name} {theirs[name]}, not {settings[name]}"
                if known
                else "other data or by another program"
            )
            raise UsageError(
                f"{folder} was made with {what}; choose another --run_name or --out_dir"
            )
    return finished, state


def read_state(checkpoint):
    """What a checkpoint says beside its tensors. UsageError where it is damaged."""
    try:
        with safe_open(checkpoint, "pt") as file:
            return json.loads(file.metadata()["state"])
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{checkpoint} is damaged ({error}); remove its folder to start again"
        ) from None


def in_current_words(theirs):
    """The settings of a run, where an older version wrote them: activation was two options, and
    grad_acc_steps also two."""
    if not isinstance(theirs, dict):
        return {}
    if "activation" in theirs or "micro_acc_steps" not in theirs:
        return theirs
    activation = (
        "sampletopk"
        if theirs.get("sample_topk")
        else "batchtopk"
        if theirs.get("batch_topk")
        else "topk"
    )
    return theirs | {
        "activation": activation,
        "grad_acc_steps": theirs["grad_acc_steps"] * theirs["micro_acc_steps"],
    }


def read_rows(path):
    """The rows of metrics.jsonl, up to one that a power cut has torn. Raises UsageError where one
    before others is damaged."""
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    rows = [read_row(line) for line in lines]
    num_whole = rows.index(None) if None in rows else len(rows)
    if any(rows[num_whole:]):
        raise UsageError(
            f"{path}: line {num_whole + 1} is damaged; remove it to go on without its numbers"
        )
    return rows[:num_whole]


def read_row(line):
    """A row of metrics.jsonl as a dict; None where the line is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    numbers = (
        [row.get(name) for name in ("iteration", "vectors", "fvu", "dead")]
        if isinstance(row, dict)
        else [None]
    )
    return row if all(isinstance(number, (int, float)) for number in numbers) else None


def import_tracker(log_to):
    """The module that --log_to names, None for none. Raises UsageError where it is not
    installed."""
    try:
        name = {"none": None, "tensorboard": "torch.utils.tensorboard"}.get(log_to, log_to)
        return name and importlib.import_module(name)
    except ImportError:
        raise UsageError(f"--log_to {log_to}: not installed; pip install {log_to}") from None


@contextmanager
def open_tracker(log_to, folder, run_id, settings, done):
    """A function that sends a row where --log_to says, after `done` iterations of which it has rows
    already."""
    tracker = import_tracker(log_to)
    if log_to == "none":
        yield lambda row: None
    elif log_to == "tensorboard":
        with closing(tracker.SummaryWriter(str(folder), purge_step=done + 1)) as writer:
            yield lambda row: [writer.add_scalar(*item, row["iteration"]) for item in row.items()]
    else:
        project = os.environ.get(f"{log_to.upper()}_PROJECT", "diffusion-saes")
        same = {"id": run_id} if log_to == "wandb" else {}  # trackio resumes by name
        tracker.init(
            project=project, name=f"{folder.name}-{run_id}", config=settings, resume="allow", **same
        )
        try:
            yield lambda row: tracker.log(row, step=row["iteration"])
        finally:
            tracker.finish()


def summarize(folders, path):
    """The table and the picture of several SAEs of one data set."""
    rows = [read_json(folder / "cfg.json") for folder in folders]
    print(f"\n{'run':44} {'M':>7} {'k':>5} {'seed':>5} {'fvu':>8} {'l0':>8} {'dead':>7}")
    for folder, row in sorted(zip(folders, rows), key=lambda pair: pair[1]["fvu"]):
        seed, numbers = (
            row["training"]["seed"],
            f"{row['fvu']:8.4f} {row['l0']:8.2f} {row['dead']:7.2%}",
        )
        print(f"{folder.name:44} {row['num_latents']:7} {row['k']:5} {seed:5} {numbers}")
    plot_sweep(path, rows)
    print(f"FVU against L0: {path}")


def training_device(name):
    """The device of a training: not MPS, unless it is asked for by name."""
    device = resolve_device(name)
    if name == "auto" and device.type == "mps":
        print(
            "training on the CPU: many PyTorch versions lack embedding_bag on MPS; --device mps tries them"
        )
        device = torch.device("cpu")
    return device


def with_activation(cfg: Config) -> Config:
    """The options with `activation` said, also by its older names --batch_topk and --sample_topk.

    Raises UsageError where two of them say something else.
    """
    said = {cfg.activation} - {None}
    said |= {"batchtopk"} if cfg.batch_topk else set()
    said |= {"sampletopk"} if cfg.sample_topk else set()
    if len(said) > 1:
        raise UsageError(
            f"--activation, --batch_topk and --sample_topk: expected one, got {' and '.join(sorted(said))}"
        )
    return replace(cfg, activation=said.pop() if said else "topk")


def check_memory(runs, dataset, processes, latents):
    """Raise UsageError if all SAEs together need more memory in training than is free on this
    device."""
    meminfo = Path("/proc/meminfo")
    free = math.inf
    if processes.device.type == "cuda":
        free = torch.cuda.mem_get_info(processes.device)[0]
    elif meminfo.exists():
        available = next(
            line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")
        )
        free = 1024 * int(available.split()[1]) / processes.local_count
    free = min(processes.all_gather(free))
    num_latents = sum(run.num_latents for run in runs)
    # bytes for each of M x d: 24 for two matrices and their moments, 8 for gradients (or to draw
    # the first rows), 2 for a copy
    needed = 34 * num_latents * dataset.d / latents.count
    if needed > free:
        sizes = " ".join(dict.fromkeys(str(run.num_latents) for run in runs))
        raise UsageError(
            f"--num_latents {sizes}: training {len(runs)} SAE(s) takes {needed / 1e9:.3g} GB, where {free / 1e9:.3g} GB are free"
        )


def check_options(cfg):
    """Raises UsageError for an option's value that nothing can be done with, or a --log_to that is
    not installed."""
    check_positive(cfg, "effective_batch_size", "num_epochs", "max_examples")
    check_positive(cfg, "dead_feature_threshold", "grad_acc_steps", "log_every", "save_every")
    for name in ("k", "num_latents", "matryoshka", "expansion_factor"):
        unused = name == "expansion_factor" and cfg.num_latents
        require(unused or min(getattr(cfg, name), default=1) > 0, cfg, name, "numbers from 1")
    require(cfg.k, cfg, "k", "numbers from 1")
    require(cfg.num_latents or cfg.expansion_factor, cfg, "expansion_factor", "numbers from 1")
    require(cfg.seeds, cfg, "seeds", "at least one number")
    require(cfg.data_seed >= 0, cfg, "data_seed", "0 or more")
    require(cfg.lr is None or 0 < cfg.lr < math.inf, cfg, "lr", "a positive number")
    require(cfg.buffer_gb > 0, cfg, "buffer_gb", "a positive number")
    require(cfg.lr_warmup_steps >= 0, cfg, "lr_warmup_steps", "0 or more")
    require(0 <= cfg.auxk_alpha < math.inf, cfg, "auxk_alpha", "0 or more")
    alone = cfg.activation == "topk" and not cfg.matryoshka
    require(
        alone or not cfg.multi_topk,
        cfg,
        "multi_topk",
        "no other --activation than topk, and no --matryoshka with it",
    )
    if cfg.run_name and (Path(cfg.run_name).is_absolute() or ".." in Path(cfg.run_name).parts):
        raise UsageError(f"--run_name {cfg.run_name}: expected a name inside --out_dir")
    import_tracker(cfg.log_to)


def require(fine, cfg, name, expected):
    """Raise UsageError for the value of an option unless it is fine."""
    if not fine:
        value = getattr(cfg, name)
        if isinstance(value, list):
            value = " ".join(map(str, value)) or "(none)"
        raise UsageError(f"--{name} {value}: expected {expected}")


if __name__ == "__main__":
    run_script(main, Config)
