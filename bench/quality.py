"""How good the dictionaries are: ours and the other packages', on the same vectors.

    python -m bench quality --data activations/up_blocks.1.attentions.1.npy \\
        activations/mid_block.attentions.0.npy

Claim: on the toy's activations our mean held-out FVU is 0.816 and 0.933 times that of the best
other package, with fewer silent latents than both (docs/benchmarks.md; two cores of an AMD EPYC).

All packages get the same file, M, k, vectors and batches, in the same order. For each package and
file the learning rate is the best of three: half the package's own default, the default, and twice
the default, by the held-out FVU of the first seed. Then every seed is trained with it. Otherwise
each package has its own defaults. eai-sparsify is trained as its Trainer does it: b_dec from the
first batch, sign descent in a schedule-free wrapper, no AuxK. SAELens is trained by its SAETrainer,
and ours by train.py.

    lr        the learning rate that was chosen
    fvu, l0   of the held-out vectors, as analysis/metrics.py defines them for all packages
    silent    fraction of latents without a nonzero activation on all held-out vectors
"""

import contextlib
import importlib.util
import io
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import train
from analysis.metrics import evaluate, total
from bench.step import conditions
from cli import check_positive, resolve_device
from errors import UsageError
from sae import Sae
from store.dataset import open_activations


@dataclass
class Config:
    # data
    data: list[str] = field(default_factory=list)
    """Train on these activation files. Give two hook points or more."""

    max_examples: int | None = None
    """Train on this many vectors. If not given, it is one pass over the training vectors."""

    # model
    k: int = 16
    """Keep this many latents active per vector."""

    expansion_factor: int = 16
    """Give the SAEs this many latents, as a multiple of the vectors' width."""

    packages: list[str] = field(default_factory=lambda: list(PACKAGES))
    """Measure these packages. Those that are not installed are left out."""

    # training
    batch_size: int = 1024
    """Give each update this many vectors."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Train each package from these seeds. The first one chooses the learning rate."""

    # hardware
    device: str = "cpu"
    """Train ours on this device. The other packages always train on the CPU."""


def batches(activations, cfg, stop):
    for x, _ in activations.batches(cfg.batch_size, stop):
        yield x.float()


def ours(activations, cfg, stop, lr, seed):
    M = cfg.expansion_factor * activations.d
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = dict(
            num_latents=[M], k=[cfg.k], seeds=[seed], lr=lr, effective_batch_size=cfg.batch_size
        )
        options |= dict(
            data=activations.paths,
            out_dir=folder,
            run_name="run",
            max_examples=stop,
            device=cfg.device,
        )
        train.main(train.Config(**options))
        return Sae.load_from_disk(Path(folder) / "run")


def eai_sparsify(activations, cfg, stop, lr, seed):
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    torch.manual_seed(seed)
    theirs = SparseCoder(
        activations.d, SparseCoderConfig(num_latents=cfg.expansion_factor * activations.d, k=cfg.k)
    )
    optimizer = ScheduleFreeWrapper(
        SignSGD([dict(params=theirs.parameters(), lr=lr)]), momentum=0.95
    )
    optimizer.train()
    for i, x in enumerate(batches(activations, cfg, stop)):
        if not i:
            theirs.b_dec.data = x.mean(0)
        theirs.set_decoder_norm_to_unit_norm()
        theirs(x).fvu.backward()
        theirs.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    sae = Sae(activations.d, theirs.num_latents, cfg.k)
    sae.load_state_dict({name: tensor.detach() for name, tensor in theirs.state_dict().items()})
    return sae


def sae_lens(activations, cfg, stop, lr, seed):
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    M = cfg.expansion_factor * activations.d
    theirs = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=activations.d, d_sae=M, k=cfg.k, device="cpu", dtype="float32")
    )
    options = SAETrainerConfig(
        total_training_samples=stop,
        train_batch_size_samples=cfg.batch_size,
        lr=lr,
        lr_end=lr / 10,
        device="cpu",
    )
    trainer = SAETrainer(options, theirs, batches(activations, cfg, stop))
    with contextlib.suppress(StopIteration):
        trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_inference_model(folder)
        return Sae.load_from_disk(folder)


# name: (what trains, its own default learning rate for M latents and T updates)
PACKAGES = {
    "ours": (ours, lambda M, T: train.peak_learning_rate(T, M)),
    "eai-sparsify": (eai_sparsify, lambda M, T: 5e-3 / (M / 2**14) ** 0.5),
    "sae-lens": (sae_lens, lambda M, T: 3e-4),
}


def main(cfg):
    check_positive(cfg, "k", "expansion_factor", "batch_size", "max_examples")
    where, versions, commit = conditions(resolve_device(cfg.device))
    if wrong := set(cfg.packages) - set(PACKAGES):
        raise UsageError(f"--packages {wrong.pop()}: expected some of {', '.join(PACKAGES)}")
    modules = {"ours": "train", "eai-sparsify": "sparsify", "sae-lens": "sae_lens"}
    there = [name for name in cfg.packages if importlib.util.find_spec(modules[name])]
    print(f"{where}; {versions}; commit {commit}")
    print(
        f"k = {cfg.k}, M = {cfg.expansion_factor} d, batches of {cfg.batch_size}, best of three learning rates\n"
    )
    print(
        f"{'hook name':28} {'package':14} {'lr':>9} {'seed':>4} {'fvu':>8} {'l0':>6} {'silent':>7}",
        flush=True,
    )
    for activations in open_activations(cfg.data):
        stop = (
            min(cfg.max_examples or activations.num_training, activations.num_training)
            // cfg.batch_size
            * cfg.batch_size
        )
        M, means = cfg.expansion_factor * activations.d, {}
        for package in there:
            make, default = PACKAGES[package]

            def run(lr, seed, make=make, activations=activations, stop=stop):
                sae = make(activations, cfg, stop, lr, seed)
                return total(evaluate([sae], activations, 4096)[0])

            rates = [default(M, stop // cfg.batch_size) * factor for factor in (0.5, 1, 2)]
            first = {lr: run(lr, cfg.seeds[0]) for lr in tqdm(rates, package, leave=False)}
            lr = min(first, key=lambda lr: first[lr].fvu)
            found = [first[lr], *(run(lr, seed) for seed in cfg.seeds[1:])]
            for seed, metrics in zip(cfg.seeds, found):
                numbers = f"{metrics.fvu:8.4f} {metrics.l0:6.2f} {metrics.dead:7.2%}"
                print(
                    f"{activations.hook_name:28} {package:14} {lr:9.2e} {seed:4} {numbers}",
                    flush=True,
                )
            means[package] = [
                sum(getattr(m, name) for m in found) / len(found) for name in ("fvu", "dead")
            ]
        if "ours" not in means:
            continue
        best = min(
            (numbers[0] for package, numbers in means.items() if package != "ours"),
            default=float("nan"),
        )
        print(
            f"{activations.hook_name:28} mean fvu of ours / best peer's {means['ours'][0] / best:.3f}\n",
            flush=True,
        )
