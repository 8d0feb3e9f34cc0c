"""One SAE in training and its folder: begun, updated, saved, resumed and finished. train.py feeds several of them at once."""

import hashlib
import json
import math
import secrets
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from cli import product_dtype
from disk import read_json
from errors import UsageError
from log import plot_training, read_rows
from metrics import Metrics, middle, plot_evaluation, total
from processes import ALONE
from sae import Sae
from step import Step
from tensors import load_tensors, save_tensors

# options that a resumed run may change (whether the data are the same is seen from a sample), and those that name SAEs
FREE = ("data", "out_dir", "run_name", "device", "log_every", "save_every", "log_to", "wandb_project", "memory_gb", "hf_repo_id")
FREE += ("shard_latents",)
EACH = ("k", "num_latents", "expansion_factor", "seeds")
# of its updates batch_topk and sample_topk make like top-k: on the toy batch_topk ended with an FVU of 0.074, not 0.096,
# sample_topk in mid_block with 0.108, not 0.123; and in bench truth batch_topk found 99 % of the atoms, not 79 %
TOPK_FIRST = 0.3
SAMPLE = 32_768  # vectors that are checked, and that b_dec and the scale come from


def default_lr(iterations, num_latents):
    """Peak of Adam's learning rate: sparsify's 2e-4 / sqrt(num_latents / 2^14) for 30,000 updates and more, up to 6 times that
    for fewer. On the toy (1,438 updates) the FVU falls from 0.079 to 0.058, and in mid_block (360) from 0.16 to 0.096."""
    return 2e-4 / math.sqrt(num_latents / 2**14) * min(6, max(1, math.sqrt(30_000 / iterations)))


def lr_at(iteration, iterations, cfg, num_latents):
    """The learning rate of an iteration, counted from 0."""
    peak = default_lr(iterations, num_latents) if cfg.lr is None else cfg.lr
    left = 1 - iteration / iterations
    fall = {"constant": 1.0, "linear": min(1.0, 5 * left), "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    rise = min(1.0, (iteration + 1) / (min(cfg.lr_warmup_steps, iterations // 5) + 1))
    return peak * rise * fall[cfg.lr_scheduler]


class Inputs(NamedTuple):
    """What a data set is to its SAEs: the trained one sees scale * x."""

    scale: float
    """a power of two, so that folding it into the biases is exact"""

    center: torch.Tensor
    """(d,): where b_dec starts, of scaled vectors"""

    variance: float
    """mean |x - mean(x)|^2 of scaled vectors"""

    weights: list[float] | None
    """of the error at each timestep; None: 1"""


def measure(activations, cfg, device):
    """The Inputs of a data set, from a sample, which is checked for NaN and inf."""
    name, pieces = activations.paths[0], activations.draw(SAMPLE, cfg.data_seed)
    sample = activations.read(pieces).float().to(device)
    if bad := len(sample) - int(sample.isfinite().all(1).sum()):
        raise UsageError(f"{name}: {bad} of {len(sample)} sampled vectors hold NaN or inf; collect it again")
    if cfg.input_unit_norm:
        sample = Sae(activations.d, 1, 1, {"input_unit_norm": True}).standardize(sample)[0]
    center = middle(sample, cfg.center)
    spread = (sample - center).square().mean().sqrt().item()
    if not 0 < spread < math.inf:
        raise UsageError(f"{name}: the sampled vectors are all equal or too large (spread {spread}); nothing can be learned")
    scale = 1.0 if cfg.input_unit_norm else 2.0 ** -round(math.log2(spread))
    variance, weights = scale**2 * (sample - sample.mean(0)).square().sum(1).mean().item(), None
    if cfg.loss_weight == "per_step":
        if not activations.timesteps:
            raise UsageError(f"{name} has no timesteps; --loss_weight per_step needs a file of collect.py")
        square, step = (sample - center).square().mean(1).cpu(), torch.from_numpy(activations.steps_of(pieces))
        weights = [(square.mean() / square[step == s].mean()).item() for s in range(len(activations.timesteps))]
    return Inputs(scale, center * scale, variance, weights)


def agree(processes, inputs):
    """The first process's Inputs, in all of them."""
    scale, center, variance, weights = processes.tell(inputs and inputs._replace(center=inputs.center.tolist()))[0]
    return Inputs(scale, torch.tensor(center), variance, weights)


@contextmanager
def held(folder):
    """No other train.py writes to the folder meanwhile, in which nothing remains of this. UsageError where one does already."""
    made, path = [path for path in (folder, *folder.parents) if not path.exists()], folder / "train.lock"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        what = "wait for it, or choose another --run_name or --out_dir"
        raise UsageError(f"another train.py is writing to {folder}; {what}") from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            path.unlink()
        for empty in made:
            with suppress(OSError):  # it is not
                empty.rmdir()


def find_run(folder, settings):
    """What `folder` holds of this run: "nothing", "checkpoint" or "finished", and the state that was saved with it.

    Raises UsageError where it holds anything else: another run, or files that are not ours.
    """
    cfg, checkpoint = folder / "cfg.json", folder / "checkpoint.safetensors"
    if cfg.exists():
        found, state = "finished", read_json(cfg)
    elif checkpoint.exists():
        try:
            with safe_open(checkpoint, "pt") as file:
                found, state = "checkpoint", json.loads(file.metadata()["state"])
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{checkpoint} is damaged ({error}); remove its folder to start again") from None
    elif folder.exists() and {path.name for path in folder.iterdir()} - {f"{checkpoint.name}.partial", "train.lock"}:
        raise UsageError(f"{folder} holds something else; choose another --run_name or --out_dir")
    else:
        return "nothing", None
    theirs = state.get("training") if isinstance(state.get("training"), dict) else {}
    for name in settings:
        if name not in theirs or theirs[name] != settings[name]:
            known = name in theirs and name not in ("num_vectors", "d_in", "digest")
            what = f"--{name} {theirs[name]}, not {settings[name]}" if known else "other data or by another program"
            raise UsageError(f"{folder} was made with {what}; choose another --run_name or --out_dir")
    return found, state


class Job:
    """One SAE in training and its folder. `state` is what the checkpoint says beside the tensors.

    Several processes have it together: `vectors` and `latents` are the groups of `Processes.grid` that split them.
    """

    def __init__(self, cfg, activations, folder, k, num_latents, seed, processes, vectors=ALONE, latents=ALONE):
        self.cfg, self.activations, self.folder, self.seed = cfg, activations, folder, seed
        self.vectors, self.latents = vectors, latents
        self.first = vectors.index == latents.index == 0  # writes what one process can
        self.last = 0.0  # loss and norm of the last update together
        self.began = 0.0  # when it would have, had it not been stopped; train.py sets it
        self.k, self.num_latents, self.checkpoint = k, num_latents, folder / "checkpoint.safetensors"
        if num_latents < latents.count:
            raise UsageError(f"--num_latents {num_latents}: expected at least --shard_latents {latents.count}")
        if k > num_latents and not cfg.sample_topk:
            raise UsageError(f"--k {k}: expected 1 to num_latents = {num_latents}")
        if wrong := [m for m in cfg.matryoshka if m > num_latents]:
            raise UsageError(f"--matryoshka {wrong[0]}: expected at most num_latents = {num_latents}")
        settings = {name: value for name, value in asdict(cfg).items() if name not in FREE + EACH}
        order = json.dumps([activations.timesteps, activations.tokens]).encode()
        digest = hashlib.sha256(activations.sample(1024).numpy().tobytes() + order).hexdigest()[:16]
        settings |= {"k": k, "num_latents": num_latents, "seed": seed}
        self.settings = settings | {"d_in": activations.d, "num_vectors": activations.num_vectors, "digest": digest}
        if any(other != self.settings for other in processes.tell(json.loads(json.dumps(self.settings)))):
            raise UsageError(f"{activations.paths[0]}: the processes do not see the same data")
        self.found, self.state = processes.tell(find_run(folder, self.settings) if processes.rank == 0 else None)[0]

    def start(self, inputs, device):
        """Make the SAE and the optimizer, new or as they were left."""
        cfg = self.cfg
        activation = "batchtopk" if cfg.batch_topk else "sampletopk" if cfg.sample_topk else "topk"
        variant = {"activation": activation, "input_unit_norm": cfg.input_unit_norm}
        self.sae = Sae(self.activations.d, self.num_latents, self.k, variant, self.seed, self.latents).to(device)
        if self.found == "nothing":
            self.state = {"iteration": 0, "vectors": 0, "seconds": 0.0, "run_id": secrets.token_hex(4), "training": self.settings}
            self.state |= {"scale": inputs.scale, "variance": inputs.variance, "weights": inputs.weights}
            self.state["product"] = str(product_dtype(cfg.mixed_precision, device))[6:]
            self.sae.b_dec.data.copy_(inputs.center)
        self.weights = self.state["weights"] and torch.tensor(self.state["weights"], device=device)
        self.step = Step(
            self.sae,
            self.state["variance"],
            auxk_alpha=cfg.auxk_alpha,
            dead_feature_threshold=cfg.dead_feature_threshold,
            normalize_decoder=cfg.normalize_decoder,
            multi_topk=cfg.multi_topk,
            matryoshka=cfg.matryoshka,
            dtype=getattr(torch, self.state["product"]),
            vectors=self.vectors,
        )
        if self.found == "nothing":
            if self.vectors.index == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
            self.save()
        else:
            self.step.load(load_tensors(self.checkpoint, self.latents) if self.vectors.index == 0 else {})
            print(f"going on at iteration {self.state['iteration']} of {self.folder}")

    def check(self):
        """UsageError where the last update was of NaN or inf: the weights are, from then on; asking makes a GPU wait."""
        if not math.isfinite(self.last):
            iteration = self.state["iteration"] - 1
            raise UsageError(f"NaN or inf in the data or the loss by iteration {iteration}; {self.checkpoint} is the last good")

    def save(self):
        self.check()
        if self.vectors.index == 0:
            state = {"state": json.dumps(self.state)}
            save_tensors(self.checkpoint, self.step.state, state, self.num_latents, self.latents)

    def update(self, x, step, n, tokens, iterations, log):
        """One iteration with n vectors, of which x (n or fewer, d) of timesteps step are this process's; its row, where one is
        due."""
        state, cfg = self.state, self.cfg
        iteration = state["iteration"]
        lr = lr_at(iteration, iterations, cfg, self.num_latents)
        x = x * state["scale"]
        given = x.unflatten(0, (len(x) // tokens, tokens)) if cfg.sample_topk else x
        weights = None if self.weights is None else self.weights[step]
        parts, begun = min(n, cfg.grad_acc_steps * cfg.micro_acc_steps), iteration >= TOPK_FIRST * iterations
        loss, norm, e, *found = self.step(given, lr, weights, parts, each=not begun, n=n)
        state["iteration"], state["vectors"] = iteration + 1, state["vectors"] + n
        last, row = iteration + 1 == iterations, None
        due, save = (iteration + 1) % cfg.log_every == 0 or last, (iteration + 1) % cfg.save_every == 0 or last
        self.last = loss + norm
        if due:
            self.check()
        state["seconds"] = round(time.perf_counter() - self.began, 4)
        if due:  # the numbers of this batch, by the weights that it found
            metrics = Metrics(self.num_latents)
            metrics.update(x, x + e, *found)
            metrics = metrics.gather(self.vectors, self.activations.d)
            row = {name: state[name] for name in ("iteration", "vectors", "seconds")} | {"fvu": metrics.fvu, "l0": metrics.l0}
            dead = (self.step.state["silent_for"] >= cfg.dead_feature_threshold).sum()
            row["dead"] = self.latents.sum(dead).item() / self.num_latents
            row |= {"loss": loss.item(), "lr": lr}
            if last:
                state["row"] = row  # waits for the held-out numbers
            else:
                log(row)
        if save:
            self.save()
        return row

    def finish(self, by_step, log):
        """Write the files of an SAE that takes activations as they are; cfg.json last: it says that the run is finished."""
        held_out, activations, state = total(by_step), self.activations, self.state
        if not math.isfinite(held_out.fvu):
            raise UsageError(
                f"{activations.paths[0]}: NaN or inf in held-out vectors; collect it again. {self.checkpoint} is kept"
            )
        numbers = held_out.summary()
        log(state["row"] | {f"held_out_{name}": value for name, value in numbers.items() if name != "vectors"})
        by_timestep = [{"timestep": t, **m.summary()} for t, m in zip(activations.timesteps, by_step) if m.n]
        self.sae.cfg |= {
            "normalize_decoder": self.cfg.normalize_decoder, "hook_name": activations.hook_name, "data": activations.paths,
            "num_held_out": numbers.pop("vectors"), **numbers, "held_out_whole_prompts": activations.whole_prompts,
            "by_timestep": by_timestep, "num_training": state["vectors"], "training": self.settings,
        }  # fmt: skip
        if self.first:
            plot_training(self.folder / "train.png", read_rows(self.folder / "metrics.jsonl"), held_out, self.folder.name)
            plot_evaluation(self.folder / "evaluate.png", by_step, activations.timesteps, self.folder.name)
        if self.vectors.index == 0:
            self.sae.save_to_disk(self.folder)
        if self.first:
            self.checkpoint.unlink()
        self.found = "finished"
