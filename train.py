"""Train a sparse autoencoder (SAE) on the activations that collect.py stored.

    python train.py                                                    # the newest file in activations/
    python train.py --data activations/mid_block.npy --k 32 --expansion_factor 8
    python train.py --data "shards/*.npy" --num_epochs 2 --lr 1e-4 --run_name mine

A TopK SAE with the auxiliary loss that revives dead latents (AuxK), trained by Adam on vectors shuffled one by one over
all prompts. b_dec starts at the geometric median of a sample, the encoder as the decoder's transpose; decoder rows keep
unit norm. A share of the prompts is kept from training and gives the final numbers.

Reads   activation files (.npy: floats, last axis d; see README), several, a glob or a folder; one SAE a hook name.
Writes  <out_dir>/<run_name>/: cfg.json, sae.safetensors, metrics.jsonl, train.png; checkpoint.safetensors until done.
Stopped by Ctrl-C or kill -9, the same command goes on and ends with the same bits. A run is never overwritten.

Sources: TopK and AuxK, Gao et al. 2024 (arXiv 2406.04093), sections 2.3, 2.4 and A.2; the centring, D-Scope 2026.
"""

import hashlib
import importlib
import json
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from cli import resolve_device, run
from sae import Metrics, Sae, count_active, geometric_median
from store import newest_activations, open_activations, read_json


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
    lr_warmup_steps: int = 100  # iterations over which the learning rate rises from 0
    auxk_alpha: float = 1 / 32  # weight of the AuxK loss; 0 switches it off
    dead_feature_threshold: int = 100_000  # a latent is dead after this many vectors without a nonzero activation
    grad_acc_steps: int = 1  # an update goes through in this many parts, to save memory
    micro_acc_steps: int = 1  # and each of these in this many; the result is the same
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # of the encoder's product; auto: bf16 on CUDA
    buffer_gb: float = 2.0  # memory of the shuffle buffer; a file that fits is shuffled perfectly
    seed: int = 0  # of the weights and the order of the vectors; the held-out prompts are the same for every seed
    device: str = "auto"  # auto, cuda, cuda:N, mps, cpu
    log_every: int = 10  # iterations between rows of metrics.jsonl
    save_every: int = 1000  # iterations between checkpoints
    log_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"  # where the rows of metrics.jsonl go as well
    wandb_project: str = "diffusion-saes"  # project there, for wandb and trackio


# options that a resumed run may change; whether the data are the same is seen from a sample
FREE = ("data", "out_dir", "run_name", "device", "log_every", "save_every", "log_to", "wandb_project")
AT_LEAST_1 = (
    "expansion_factor", "num_latents", "effective_batch_size", "num_epochs", "max_examples", "dead_feature_threshold",
    "grad_acc_steps", "micro_acc_steps", "log_every", "save_every",
)  # fmt: skip
ADAM = dict(betas=(0.9, 0.999), eps=6.25e-10)  # Gao et al. 2024, section A.3
MOMENTS = ("exp_avg", "exp_avg_sq")
SAMPLE = 32_768  # vectors that are checked, and that b_dec and the scale come from


# ------------------------------------------------------------------------------------------------------------ the step


def lr_at(iteration, iterations, cfg, num_latents):
    """The learning rate of an iteration, counted from 0."""
    peak = 2e-4 / math.sqrt(num_latents / 2**14) if cfg.lr is None else cfg.lr
    left = 1 - iteration / iterations
    fall = {"constant": 1.0, "linear": min(1.0, 5 * left), "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return peak * min(1.0, (iteration + 1) / (cfg.lr_warmup_steps + 1)) * fall[cfg.lr_scheduler]


def auxk_loss(sae, x, x_hat, dead):
    """How badly the dead latents predict what the others leave over: sum of |e - e_hat|^2, a scalar.

        e     = x - x_hat, a constant
        e_hat = the k_aux largest activations among the dead latents, times their rows of W_dec; b_dec is in x_hat

    x, x_hat (N, d); dead (n_dead,) indices; k_aux = d / 2. Gao et al. 2024, section A.2. The products are dense, but
    over the dead latents only: at k_aux = d / 2 gathering rows would be dearer.
    """
    k_aux = max(1, x.shape[1] // 2)
    W_enc, b_enc, W_dec = (p.index_select(0, dead) for p in (sae.encoder.weight, sae.encoder.bias, sae.W_dec))
    acts = F.relu(F.linear(x - sae.b_dec, W_enc, b_enc))  # (N, n_dead)
    if len(dead) > k_aux:
        acts = acts * (acts >= acts.topk(k_aux).values[:, -1:])
    return (x - x_hat).detach().sub(acts @ W_dec).square().sum()


def backward(sae, x, n, variance, dead, alpha, dtype):
    """Add the gradient of one part's share of the loss, (|x - x_hat|^2 + alpha * AuxK) / (n * variance), to `.grad`.

    x (N, d) is part of an update's n vectors. Returns the loss and x_hat, top_acts, top_indices, all detached.
    """
    top_acts, top_indices = sae.encode(x, dtype)
    x_hat = sae.decode(top_acts, top_indices)
    loss = (x - x_hat).square().sum()
    if len(dead) and alpha:
        loss = loss + alpha * auxk_loss(sae, x, x_hat, dead)
    loss = loss / (n * variance)
    loss.backward()
    return loss.detach(), x_hat.detach(), top_acts.detach(), top_indices


# ------------------------------------------------------------------------------------------------------ start and stop


def prepare(activations, cfg, device, num_latents):
    """A new SAE of scaled inputs, that scale, and the scaled vectors' variance; checks a sample for NaN and inf."""
    name, sample = activations.paths[0], activations.sample(SAMPLE, cfg.seed).to(device)
    bad = len(sample) - int(sample.isfinite().all(1).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {len(sample)} sampled vectors hold NaN or inf; collect it again")
    median = geometric_median(sample)
    spread = (sample - median).square().mean().sqrt().item()
    if not spread:
        raise ValueError(f"{name}: all {len(sample)} sampled vectors are equal; there is nothing to learn")
    scale = 2.0 ** -round(math.log2(spread))  # a power of two, so that folding it into the biases is exact
    sae = Sae(activations.d, num_latents, cfg.k, seed=cfg.seed).to(device)
    sae.b_dec.data.copy_(median * scale)
    sample = sample * scale
    return sae, scale, (sample - sample.mean(0)).square().sum(1).mean().item()


def save_checkpoint(path, sae, optimizer, silent_for, state):
    """Write weights, Adam's moments, counters and `state` (JSON, in the header) to one file and swap it in."""
    tensors = {"silent_for": silent_for}
    for name, p in sae.named_parameters():
        tensors[name] = p.data
        if state["iteration"]:
            tensors |= {f"{name}.{moment}": optimizer.state[p][moment] for moment in MOMENTS}
    partial = path.with_suffix(".partial")
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial, {"state": json.dumps(state)})
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{partial}: {error}") from None
    partial.replace(path)


def load_checkpoint(path, sae, optimizer, silent_for, state):
    with safe_open(path, "pt") as file:
        silent_for.copy_(file.get_tensor("silent_for"))
        for name, p in sae.named_parameters():
            p.data.copy_(file.get_tensor(name))
            if state["iteration"]:
                optimizer.state[p] = {m: file.get_tensor(f"{name}.{m}").to(p.device) for m in MOMENTS}
                optimizer.state[p]["step"] = torch.tensor(float(state["iteration"]), device=p.device)


def find_run(folder, settings):
    """What `folder` holds of this run: "nothing", "checkpoint" or "finished", and the state that was saved with it.

    Raises ValueError where it holds anything else: another run, or files that are not ours.
    """
    cfg, checkpoint = folder / "cfg.json", folder / "checkpoint.safetensors"
    if cfg.exists():
        found, state = read_json(cfg), None
    elif checkpoint.exists():
        try:
            with safe_open(checkpoint, "pt") as file:
                state = found = json.loads(file.metadata()["state"])
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{checkpoint} is damaged ({error}); remove its folder to start again") from None
    elif folder.exists() and any(path.name != "checkpoint.partial" for path in folder.iterdir()):
        raise ValueError(f"{folder} holds something else; choose another --run_name or --out_dir")
    else:
        return "nothing", None
    theirs = found.get("training") if isinstance(found.get("training"), dict) else {}
    for name in settings:
        if name not in theirs or theirs[name] != settings[name]:
            known = name in theirs and name not in ("num_vectors", "d_in", "digest")
            what = f"--{name} {theirs[name]}, not {settings[name]}" if known else "other data or by another program"
            raise ValueError(f"{folder} was made with {what}; choose another --run_name or --out_dir")
    return "finished" if state is None else "checkpoint", state


@contextmanager
def interrupt_later():
    """The first Ctrl-C only fills the list, so that no iteration is cut in two; the second acts as always."""
    pressed = []

    def handler(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append("Ctrl-C")

    if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handler
        yield pressed
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


# ------------------------------------------------------------------------------------------------------------- records


def open_log(cfg, folder, done):
    """Two functions: one records a row in metrics.jsonl and where --log_to says, one ends that. Rows after `done` go."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() and done else []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["iteration"] <= done))
    also, close = lambda row: None, lambda: None
    try:
        if cfg.log_to == "tensorboard":
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
            also, close = lambda row: [writer.add_scalar(*item, row["iteration"]) for item in row.items()], writer.close
        elif cfg.log_to != "none":
            tracker = importlib.import_module(cfg.log_to)
            same_run = {"id": folder.name} if cfg.log_to == "wandb" else {}  # trackio goes by the name
            tracker.init(project=cfg.wandb_project, name=folder.name, config=asdict(cfg), resume="allow", **same_run)
            also, close = lambda row: tracker.log(row, step=row["iteration"]), tracker.finish
    except ImportError:
        raise ValueError(f"--log_to {cfg.log_to}: not installed; pip install {cfg.log_to}") from None

    def log(row):
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        also(row)

    return log, close


def plot(path, rows, held_out, title):
    """Three panels: FVU and dead share over training, with the held-out values; how often latents are active."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, PercentFormatter

    blue, orange = "#2f6db5", "#e07b39"
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    fig.suptitle(f"{title}: held-out FVU {held_out.fvu:.3f}, L0 {held_out.l0:.1f}, dead {held_out.dead:.1%}")
    vectors = [row["vectors"] / 1e6 for row in rows]
    for ax, name, heading in ((left, "fvu", "Variance not explained (FVU)"), (middle, "dead", "Dead latents")):
        ax.plot(vectors, [row[name] for row in rows], color=blue, lw=1.3, label="in training")
        ax.axhline(getattr(held_out, name), color=orange, lw=1.3, ls="--", label="held out, at the end")
        ax.set(title=heading, xlabel="training vectors, millions", xlim=(0, None))
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FormatStrFormatter("%.2g"))
    left.yaxis.set_minor_formatter(NullFormatter())
    top = max(0.1, 1.1 * held_out.dead, *(1.1 * row["dead"] for row in rows))
    middle.set_ylim(-0.02 * top, top)
    middle.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    often = held_out.counts.double().cpu() / held_out.n
    lowest = -math.ceil(math.log10(held_out.n))
    right.hist(often[often > 0].log10().tolist(), torch.linspace(lowest, 0, 49).tolist(), color=blue)
    right.axvline(
        math.log10(max(held_out.l0, 1e-9) / len(often)), color=orange, lw=1.3, ls="--", label="mean, L0 / latents"
    )
    right.set_xticks(range(lowest, 1), [f"$10^{{{e}}}$" for e in range(lowest, 1)])
    right.set(title="How often latents are active", xlabel="share of held-out vectors", ylabel="latents")
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
        ax.grid(alpha=0.3, lw=0.6)
        ax.legend(frameon=False, fontsize=9)
    fig.savefig(path, dpi=130)
    plt.close(fig)


@torch.no_grad()
def evaluate(sae, activations, batch_size, device):
    """Metrics of the SAE over all held-out vectors, as they are in the file."""
    metrics = Metrics(sae.num_latents)
    for prompt in activations.held_out():
        for x in prompt.split(batch_size):
            x = x.to(device).float()
            codes = sae.encode(x)
            metrics.update(x, sae.decode(*codes), *codes)
    return metrics


# ---------------------------------------------------------------------------------------------------------------- runs


def train(cfg, activations, folder, device):
    """Train, or finish training, the SAE of one data set in `folder`; prints a summary. Returns the SAE."""
    # 1. What is asked, and what is there already
    for name in AT_LEAST_1:
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    num_latents = cfg.num_latents or cfg.expansion_factor * activations.d
    if not 1 <= cfg.k <= num_latents:
        raise ValueError(f"--k {cfg.k}: expected 1 to num_latents = {num_latents}")
    digest = hashlib.sha256(activations.sample(1024).numpy().tobytes()).hexdigest()[:16]
    settings = {name: value for name, value in asdict(cfg).items() if name not in FREE}
    settings |= {"num_latents": num_latents}
    settings |= {"d_in": activations.d, "num_vectors": activations.num_vectors, "digest": digest}
    found, state = find_run(folder, settings)
    if found == "finished":
        print(f"{folder} is finished: {num_latents} latents, k = {cfg.k}; nothing to do")
        return Sae.load_from_disk(folder, device)

    # 2. The SAE and the optimizer, new or as they were left
    if found == "nothing":
        sae, scale, variance = prepare(activations, cfg, device, num_latents)
        state = {"iteration": 0, "vectors": 0, "seconds": 0.0, "scale": scale, "variance": variance}
        state["training"] = settings
    else:
        sae = Sae(activations.d, num_latents, cfg.k).to(device)
        print(f"going on at iteration {state['iteration']} of {folder}")
    optimizer = torch.optim.Adam(sae.parameters(), fused=True, **ADAM)
    silent_for = torch.zeros(num_latents, dtype=torch.int64, device=device)  # vectors since a latent was last active
    checkpoint = folder / "checkpoint.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if found == "nothing":
        save_checkpoint(checkpoint, sae, optimizer, silent_for, state)
    else:
        load_checkpoint(checkpoint, sae, optimizer, silent_for, state)
    log, close_log = open_log(cfg, folder, state["iteration"])

    # 3. Training
    total = min(cfg.max_examples or math.inf, cfg.num_epochs * activations.num_training)
    iterations = -(-total // cfg.effective_batch_size)
    parts = cfg.grad_acc_steps * cfg.micro_acc_steps
    precision = cfg.mixed_precision if cfg.mixed_precision != "auto" else "bf16" if device.type == "cuda" else "no"
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scale, variance, before, start = state["scale"], state["variance"], state["seconds"], time.perf_counter()
    batches = activations.batches(cfg.effective_batch_size, total, state["vectors"], cfg.seed, cfg.buffer_gb)
    bar = tqdm(total=total, initial=state["vectors"], unit="vec", unit_scale=True, dynamic_ncols=True, desc=folder.name)
    with bar, interrupt_later() as pressed:
        for batch in batches:
            n, iteration = len(batch), state["iteration"]
            dead = (silent_for >= cfg.dead_feature_threshold).nonzero().flatten()
            last = iteration + 1 == iterations
            show = (iteration + 1) % cfg.log_every == 0 or last
            metrics, counts, loss = Metrics(num_latents), torch.zeros_like(silent_for), 0.0
            for x in batch.chunk(parts):
                x = x.to(device).float() * scale
                share, x_hat, *codes = backward(sae, x, n, variance, dead, cfg.auxk_alpha, dtype)
                loss += share
                counts += count_active(*codes, num_latents)
                if show:
                    metrics.update(x, x_hat, *codes)
            if cfg.normalize_decoder:
                sae.remove_parallel_gradient()
            nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = lr = lr_at(iteration, iterations, cfg, num_latents)
            optimizer.step()
            optimizer.zero_grad()
            if cfg.normalize_decoder:
                sae.normalize_decoder()
            silent_for = torch.where(counts > 0, 0, silent_for + n)
            state |= {"iteration": iteration + 1, "vectors": state["vectors"] + n}
            state["seconds"] = round(before + time.perf_counter() - start, 2)
            bar.update(n)
            save = state["iteration"] % cfg.save_every == 0 or pressed
            if (show or save) and not math.isfinite(loss):  # it stays so, once the weights are; asking makes a GPU wait
                raise ValueError(
                    f"NaN or inf in the data or the loss by iteration {state['iteration']}; stopped. "
                    f"The last good checkpoint is {checkpoint}"
                )
            if show:
                dead_share = (silent_for >= cfg.dead_feature_threshold).float().mean().item()
                row = {name: state[name] for name in ("iteration", "vectors", "seconds")}
                row |= {"fvu": metrics.fvu, "l0": metrics.l0, "dead": dead_share, "loss": loss.item(), "lr": lr}
                log(row)
                bar.set_postfix(fvu=f"{metrics.fvu:.3f}", l0=f"{metrics.l0:.1f}", dead=f"{dead_share:.1%}")
            if save:
                save_checkpoint(checkpoint, sae, optimizer, silent_for, state)
            if pressed and not last:
                bar.close()
                print(f"stopped at iteration {state['iteration']} of {iterations}; the same command goes on")
                raise KeyboardInterrupt

    # 4. Held-out numbers of the SAE that takes activations as they are
    sae.scale_inputs(scale)
    held_out = evaluate(sae, activations, cfg.effective_batch_size, device)
    sae.cfg |= {
        "normalize_decoder": cfg.normalize_decoder, "hook_name": activations.hook_name, "data": activations.paths,
        "fvu": held_out.fvu, "l0": held_out.l0, "dead": held_out.dead, "num_held_out": held_out.n,
        "num_training": state["vectors"], "training": settings,
    }  # fmt: skip

    # 5. Files, cfg.json last: it is what says that the run is finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plot(folder / "train.png", rows, held_out, folder.name)
    sae.save_to_disk(folder)
    checkpoint.unlink()
    close_log()
    seen, seconds, fvu = state["vectors"], max(state["seconds"], 0.01), held_out.fvu
    print(f"{num_latents} latents of width {sae.d_in}, k = {sae.k}")
    print(f"trained:  {seen:,} vectors in {seconds:.0f} s ({seen / seconds:,.0f} a second)")
    print(f"held out: {held_out.n:,} vectors   fvu {fvu:.4f}   l0 {held_out.l0:.2f}   dead {held_out.dead:.2%}")
    print(f"saved in  {folder}/: cfg.json, sae.safetensors, metrics.jsonl, train.png")
    return sae


def main(cfg):
    device = resolve_device(cfg.device)
    sets = open_activations(cfg.data or [newest_activations()])
    for activations in sets:
        stem = Path(activations.paths[0]).stem
        name = cfg.run_name or f"{stem}_k{cfg.k}_M{cfg.num_latents or cfg.expansion_factor * activations.d}"
        folder = Path(cfg.out_dir) / name / (stem if cfg.run_name and len(sets) > 1 else "")
        train(cfg, activations, folder, device)


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
