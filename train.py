"""Train a sparse autoencoder (SAE) on the activations that collect.py stored.

    python train.py                                                    # the newest file in activations/
    python train.py --data activations/mid_block.npy --k 32 --expansion_factor 8
    python train.py --data "shards/*.npy" --num_epochs 2 --lr 1e-4 --run_name mine

A TopK SAE with the auxiliary loss that revives dead latents (AuxK), trained by Adam on vectors shuffled one by one over
all prompts. b_dec starts at the geometric median of a sample, the encoder as the decoder's transpose; decoder rows keep
unit norm. A tenth of the prompts is kept from training and gives the final numbers.

Reads   activation files (.npy: floats, last axis d; see README), several, a glob or a folder; one SAE a hook name.
Writes  <out_dir>/<run_name>/: cfg.json, sae.safetensors, metrics.jsonl, train.png; checkpoint.safetensors until done.
Stopped by Ctrl-C or kill -9, the same command goes on and ends with the same bits. A run is never overwritten.
In a row of metrics.jsonl, fvu, l0 and loss are of that iteration's batch alone, before its update; dead counts latents.

Sources: TopK and AuxK, Gao et al. 2024 (arXiv 2406.04093), sections 2.3, 2.4 and A.2; the centring, D-Scope 2026.
"""

import hashlib
import importlib
import json
import math
import secrets
import signal
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from activations import newest_activations, open_activations
from cli import check_positive, resolve_device, resolve_dtype, run
from sae import Metrics, Sae, evaluate, geometric_median, save_tensors
from step import Step
from store import read_json, write_atomically


@dataclass
class Config:
    data: list[str] = field(default_factory=list)  # .npy files, globs, folders (none: newest in activations/)
    out_dir: str = "saes"  # the folder in which each run gets its own
    run_name: str | None = None  # its name (None: made of the file, k and num_latents)
    expansion_factor: int = 16  # num_latents as a multiple of the vectors' width
    num_latents: int | None = None  # size of the dictionary, instead of expansion_factor
    k: int = 16  # active latents a vector
    normalize_decoder: bool = True  # keep the rows of W_dec at unit norm
    effective_batch_size: int = 1024  # vectors per optimizer update, in all
    num_epochs: int = 1  # passes over the training vectors
    max_examples: int | None = None  # stop after this many vectors
    lr: float | None = None  # Adam's learning rate (None: 2e-4 / sqrt(num_latents / 2^14))
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"  # linear falls to 0 over the last fifth
    lr_warmup_steps: int = 100  # iterations in which the learning rate rises from 0, at most a fifth of all
    auxk_alpha: float = 1 / 32  # weight of the AuxK loss; 0 switches it off
    dead_feature_threshold: int = 100_000  # a latent is dead after this many vectors without a nonzero activation
    grad_acc_steps: int = 1  # an update goes through in this many parts, to save memory
    micro_acc_steps: int = 1  # and each of these in this many; the result is the same
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # of the encoder's product; auto: 16 bits where they are fast
    buffer_gb: float = 2.0  # memory of the shuffle buffer; a file that fits is shuffled perfectly
    seed: int = 0  # of the weights and the order of the vectors; the held-out prompts are the same for every seed
    device: str = "auto"  # auto, cuda, cuda:N, mps, cpu
    log_every: int = 10  # iterations between rows of metrics.jsonl; a row describes one batch
    save_every: int = 1000  # iterations between checkpoints
    log_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"  # where the rows of metrics.jsonl go as well
    wandb_project: str = "diffusion-saes"  # project there, for wandb and trackio


# options that a resumed run may change; whether the data are the same is seen from a sample
FREE = ("data", "out_dir", "run_name", "device", "log_every", "save_every", "log_to", "wandb_project")
SAMPLE = 32_768  # vectors that are checked, and that b_dec and the scale come from


def check_options(cfg):
    """Raises ValueError for an option's value that nothing can be done with, or a --log_to that is not installed."""
    check_positive(cfg, "expansion_factor", "num_latents", "effective_batch_size", "num_epochs", "max_examples")
    check_positive(cfg, "dead_feature_threshold", "grad_acc_steps", "micro_acc_steps", "log_every", "save_every")
    for name, fine, expected in (
        ("lr", cfg.lr is None or 0 < cfg.lr < math.inf, "a positive number"),
        ("buffer_gb", cfg.buffer_gb > 0, "a positive number"),
        ("lr_warmup_steps", cfg.lr_warmup_steps >= 0, "0 or more"),
        ("auxk_alpha", 0 <= cfg.auxk_alpha < math.inf, "0 or more"),
    ):
        if not fine:
            raise ValueError(f"--{name} {getattr(cfg, name)}: expected {expected}")
    import_tracker(cfg.log_to)


def product_dtype(choice, device):
    """Of the encoder's product: auto is 16 bits on a GPU, and bfloat16 on a CPU that multiplies it by itself."""
    if choice == "auto" and device.type == "cpu":
        native = [getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile")]
        return torch.bfloat16 if any(native) else torch.float32
    named = {"auto": resolve_dtype("auto", device), "no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return named[choice]


def lr_at(iteration, iterations, cfg, num_latents):
    """The learning rate of an iteration, counted from 0."""
    peak = 2e-4 / math.sqrt(num_latents / 2**14) if cfg.lr is None else cfg.lr
    left = 1 - iteration / iterations
    fall = {"constant": 1.0, "linear": min(1.0, 5 * left), "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    rise = min(1.0, (iteration + 1) / (min(cfg.lr_warmup_steps, iterations // 5) + 1))
    return peak * rise * fall[cfg.lr_scheduler]


def prepare(activations, cfg, device, num_latents):
    """A new SAE of scaled inputs, that scale, and the scaled vectors' variance; checks a sample for NaN and inf."""
    name, sample = activations.paths[0], activations.sample(SAMPLE, cfg.seed).to(device)
    if bad := len(sample) - int(sample.isfinite().all(1).sum()):
        raise ValueError(f"{name}: {bad} of {len(sample)} sampled vectors hold NaN or inf; collect it again")
    median = geometric_median(sample)
    spread = (sample - median).square().mean().sqrt().item()
    if not 0 < spread < math.inf:
        raise ValueError(f"{name}: the sampled vectors are all equal or too large (spread {spread}); nothing can be learned")
    scale = 2.0 ** -round(math.log2(spread))  # a power of two, so that folding it into the biases is exact
    sae = Sae(activations.d, num_latents, cfg.k, seed=cfg.seed).to(device)
    sae.b_dec.data.copy_(median * scale)
    return sae, scale, scale**2 * (sample - sample.mean(0)).square().sum(1).mean().item()


def find_run(folder, settings):
    """What `folder` holds of this run: "nothing", "checkpoint" or "finished", and the state that was saved with it.

    Raises ValueError where it holds anything else: another run, or files that are not ours.
    """
    cfg, checkpoint = folder / "cfg.json", folder / "checkpoint.safetensors"
    if cfg.exists():
        found, state = "finished", read_json(cfg)
    elif checkpoint.exists():
        try:
            with safe_open(checkpoint, "pt") as file:
                found, state = "checkpoint", json.loads(file.metadata()["state"])
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{checkpoint} is damaged ({error}); remove its folder to start again") from None
    elif folder.exists() and any(path.name != f"{checkpoint.name}.partial" for path in folder.iterdir()):
        raise ValueError(f"{folder} holds something else; choose another --run_name or --out_dir")
    else:
        return "nothing", None
    theirs = state.get("training") if isinstance(state.get("training"), dict) else {}
    for name in settings:
        if name not in theirs or theirs[name] != settings[name]:
            known = name in theirs and name not in ("num_vectors", "d_in", "digest")
            what = f"--{name} {theirs[name]}, not {settings[name]}" if known else "other data or by another program"
            raise ValueError(f"{folder} was made with {what}; choose another --run_name or --out_dir")
    return found, state


@contextmanager
def interrupt_later():
    """The first Ctrl-C only fills the list, so that no iteration is cut in two; the second acts as always."""
    pressed, main_thread = [], threading.current_thread() is threading.main_thread()

    def handler(*_):
        pressed.append("Ctrl-C")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, handler) if main_thread else None  # Python allows it nowhere else
    try:
        yield pressed
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, previous)


def import_tracker(log_to):
    """The module that --log_to names, None for none. Raises ValueError where it is not installed."""
    try:
        name = {"none": None, "tensorboard": "torch.utils.tensorboard"}.get(log_to, log_to)
        return name and importlib.import_module(name)
    except ImportError:
        raise ValueError(f"--log_to {log_to}: not installed; pip install {log_to}") from None


def read_rows(path):
    """The rows of metrics.jsonl, up to one that a power cut has torn."""
    rows = []
    with suppress(FileNotFoundError, ValueError):
        for line in path.read_text(errors="replace").splitlines():
            rows.append(json.loads(line))
    return rows


@contextmanager
def open_log(cfg, folder, state):
    """A function that records a row in metrics.jsonl and where --log_to says. Rows from after `state` go."""
    path, tracker, run_id, done = folder / "metrics.jsonl", import_tracker(cfg.log_to), state["run_id"], state["iteration"]
    kept = [row for row in read_rows(path) if row["iteration"] <= done]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    also, close = lambda row: None, lambda: None
    if cfg.log_to == "tensorboard":
        writer = tracker.SummaryWriter(str(folder), purge_step=done + 1)
        also, close = lambda row: [writer.add_scalar(*item, row["iteration"]) for item in row.items()], writer.close
    elif tracker:
        resume = {"resume": "allow", "id": run_id} if cfg.log_to == "wandb" else {"resume": "allow"}  # trackio: by name
        tracker.init(project=cfg.wandb_project, name=f"{folder.name}-{run_id}", config=asdict(cfg), **resume)
        also, close = lambda row: tracker.log(row, step=row["iteration"]), tracker.finish
    try:
        with open(path, "a") as file:
            yield lambda row: (print(json.dumps(row), file=file, flush=True), also(row))
    finally:
        close()


def plot(path, rows, held_out, title):
    """Three panels: FVU and dead share over training, with the held-out values; how often latents are active."""
    from matplotlib.figure import Figure  # not pyplot, so that a notebook's backend stays as it is
    from matplotlib.ticker import LogLocator

    blue, orange = dict(color="#2f6db5", lw=1.3), dict(color="#e07b39", lw=1.3, ls="--")
    fig = Figure(figsize=(13, 3.9), layout="constrained")
    fig.suptitle(f"{title}: held-out FVU {held_out.fvu:.3f}, L0 {held_out.l0:.1f}, dead {held_out.dead:.1%}")
    left, middle, right = axes = fig.subplots(1, 3)
    most = max(row["vectors"] for row in rows)
    unit, word = (1e6, "millions") if most >= 1e6 else (1e3, "thousands") if most >= 1e4 else (1, "")
    for ax, name, heading in ((left, "fvu", "Variance not explained (FVU)"), (middle, "dead", "Dead latents")):
        dots = dict(marker="o", ms=4) if len(rows) < 12 else {}
        ax.plot([row["vectors"] / unit for row in rows], [row[name] for row in rows], **blue, **dots, label="in training")
        ax.axhline(getattr(held_out, name), **orange, label="held out, at the end")
        ax.set(title=heading, xlabel=f"training vectors{', ' * bool(word)}{word}", xlim=(0, 1.03 * most / unit))
    values = [held_out.fvu, *(row["fvu"] for row in rows)]
    if max(values) > 3 * min(values) > 0:
        left.set_yscale("log", subs=[])
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:.2g}")
    middle.set_ylim(0, 1.1 * max(0.1, held_out.dead, *(row["dead"] for row in rows)))
    middle.yaxis.set_major_formatter("{x:.0%}")
    often = held_out.counts.cpu().double() / held_out.n
    right.hist(often[often > 0].tolist(), torch.logspace(-math.ceil(math.log10(held_out.n)), 0, 49).tolist(), color="#2f6db5")
    right.axvline(max(held_out.l0, 1e-9) / len(often), **orange, label="mean, L0 / latents")
    right.set(title="How often latents are active", xlabel="share of held-out vectors", ylabel="latents", xscale="log")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3, lw=0.6)
        ax.legend(frameon=False, fontsize=9)
    fig.savefig(path, dpi=130)


def train(cfg, activations, folder, device):
    """Train, or finish training, the SAE of one data set in `folder`; prints a summary. Returns the SAE."""
    # 1. What is asked, and what is there already
    num_latents = cfg.num_latents or cfg.expansion_factor * activations.d
    if not 1 <= cfg.k <= num_latents:
        raise ValueError(f"--k {cfg.k}: expected 1 to num_latents = {num_latents}")
    digest = hashlib.sha256(activations.sample(1024).numpy().tobytes()).hexdigest()[:16]
    settings = {name: value for name, value in asdict(cfg).items() if name not in FREE}
    settings |= {"d_in": activations.d, "num_latents": num_latents, "num_vectors": activations.num_vectors, "digest": digest}
    found, state = find_run(folder, settings)
    checkpoint = folder / "checkpoint.safetensors"
    if found == "finished":
        checkpoint.unlink(missing_ok=True)  # where a power cut came just before it went
        print(f"{folder} is finished: {num_latents} latents, k = {cfg.k}; nothing to do")
        return Sae.load_from_disk(folder, device)

    # 2. The SAE and the optimizer, new or as they were left
    if found == "nothing":
        state = {"iteration": 0, "vectors": 0, "seconds": 0.0, "run_id": secrets.token_hex(4), "training": settings}
        sae, state["scale"], state["variance"] = prepare(activations, cfg, device, num_latents)
    else:
        sae = Sae(activations.d, num_latents, cfg.k).to(device)
        print(f"going on at iteration {state['iteration']} of {folder}")
    dtype = getattr(torch, state.setdefault("product", str(product_dtype(cfg.mixed_precision, device))[6:]))
    print(f"{folder.name}: the encoder's product in {state['product']}, the rest in float32")
    step = Step(
        sae,
        state["variance"],
        auxk_alpha=cfg.auxk_alpha,
        dead_feature_threshold=cfg.dead_feature_threshold,
        normalize_decoder=cfg.normalize_decoder,
        dtype=dtype,
    )
    save_checkpoint = lambda: save_tensors(checkpoint, step.state, {"state": json.dumps(state)})
    if found == "nothing":
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint()
    else:
        step.load(load_file(checkpoint))

    # 3. Training
    total = min(cfg.max_examples or math.inf, cfg.num_epochs * activations.num_training)
    iterations = -(-total // cfg.effective_batch_size)
    parts = cfg.grad_acc_steps * cfg.micro_acc_steps
    scale, start = state["scale"], time.perf_counter() - state["seconds"]
    batches = activations.batches(cfg.effective_batch_size, total, state["vectors"], cfg.seed, cfg.buffer_gb)
    bar = tqdm(total=total, initial=state["vectors"], unit="vec", unit_scale=True, dynamic_ncols=True, desc=folder.name)
    with open_log(cfg, folder, state) as log, bar, interrupt_later() as pressed:
        for batch in batches:
            iteration = state["iteration"]
            last = iteration + 1 == iterations
            x, lr = batch.to(device).float() * scale, lr_at(iteration, iterations, cfg, num_latents)
            loss, norm, e, *found = step(x, lr, parts=parts)
            seconds = round(time.perf_counter() - start, 2)
            state |= {"iteration": iteration + 1, "vectors": state["vectors"] + len(x), "seconds": seconds}
            bar.update(len(x))
            log_it = state["iteration"] % cfg.log_every == 0 or last
            save = state["iteration"] % cfg.save_every == 0 or last or pressed
            if (log_it or save) and not math.isfinite(loss + norm):  # it stays so once the weights are; asking makes a GPU wait
                raise ValueError(f"NaN or inf in the data or the loss by iteration {iteration}; {checkpoint} is the last good")
            if log_it:  # the numbers of this batch, by the weights that it found
                metrics = Metrics(num_latents)
                metrics.update(x, x + e, *found)
                row = {name: state[name] for name in ("iteration", "vectors", "seconds")} | {"fvu": metrics.fvu, "l0": metrics.l0}
                row["dead"] = (step.state["silent_for"] >= cfg.dead_feature_threshold).float().mean().item()
                log(row | {"loss": loss.item(), "lr": lr})
                bar.set_postfix(fvu=f"{row['fvu']:.3f}", l0=f"{row['l0']:.1f}", dead=f"{row['dead']:.1%}")
            if save:
                save_checkpoint()
            if pressed:
                bar.write(f"stopped at iteration {state['iteration']} of {iterations}; the same command goes on")
                raise KeyboardInterrupt

    # 4. Held-out numbers of the SAE that takes activations as they are
    sae.scale_inputs(scale)
    held_out = evaluate(sae, activations.held_out(), -(-cfg.effective_batch_size // parts))
    if not math.isfinite(held_out.fvu):
        raise ValueError(f"{activations.paths[0]}: NaN or inf in held-out vectors; collect it again. {checkpoint} is kept")
    sae.cfg |= {
        "normalize_decoder": cfg.normalize_decoder, "hook_name": activations.hook_name, "data": activations.paths,
        "fvu": held_out.fvu, "l0": held_out.l0, "dead": held_out.dead, "num_held_out": held_out.n,
        "held_out_whole_prompts": activations.whole_prompts,
        "num_training": state["vectors"], "training": settings,
    }  # fmt: skip

    # 5. Files, cfg.json last: it is what says that the run is finished
    plot(folder / "train.png", read_rows(folder / "metrics.jsonl"), held_out, folder.name)
    sae.save_to_disk(folder)
    checkpoint.unlink()
    vectors, seconds = state["vectors"], max(state["seconds"], 0.01)
    print(f"trained:  {vectors:,} vectors in {seconds:.0f} s ({vectors / seconds:,.0f}/s); {num_latents} latents, k = {cfg.k}")
    print(f"held out: {held_out.n:,} vectors   fvu {held_out.fvu:.4f}   l0 {held_out.l0:.2f}   dead {held_out.dead:.2%}")
    if not activations.whole_prompts:
        print("note: there are no prompts to hold out whole, so held-out vectors are of the same samples as the others")
    if held_out.fvu >= 1:
        print(f"note: an fvu of 1 is what the mean alone gives; {iterations} updates are few: more prompts, or --num_epochs")
    print(f"saved in  {folder}/: cfg.json, sae.safetensors, metrics.jsonl, train.png")
    return sae


def main(cfg):
    check_options(cfg)
    device = resolve_device(cfg.device)
    if cfg.device == "auto" and device.type == "mps":
        device = torch.device("cpu")
        print("training on the CPU: many PyTorch versions lack embedding_bag's gradients on MPS; --device mps tries them")
    for activations in (sets := open_activations(cfg.data or [newest_activations()])):
        stem = Path(activations.paths[0]).stem
        if cfg.run_name and (Path(cfg.run_name).is_absolute() or ".." in Path(cfg.run_name).parts):
            raise ValueError(f"--run_name {cfg.run_name}: expected a name inside --out_dir")
        name = cfg.run_name or f"{stem}_k{cfg.k}_M{cfg.num_latents or cfg.expansion_factor * activations.d}"
        folder = Path(cfg.out_dir) / name / (stem if cfg.run_name and len(sets) > 1 else "")
        train(cfg, activations, folder, device)


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
