"""How good the dictionaries are: ours and the other packages', on the same vectors.

    python -m bench quality --data activations/up_blocks.1.attentions.1.npy \\
        activations/mid_block.attentions.0.npy

Claim: on the toy's activations our mean held-out FVU is 0.816 and 0.933 times that of the best
other package, with fewer dead latents than both (docs/benchmarks.md; two cores of an AMD EPYC).

All packages get the same file, M, k, vectors and batches, in the same order. For each package and
file the learning rate is the best of three: half the package's own default, the default, and twice
the default, by the held-out FVU of the first seed. Then every seed is trained with it. Otherwise
each package has its own defaults. eai-sparsify is trained as its Trainer does it: b_dec from the
first batch, sign descent in a schedule-free wrapper, no AuxK. SAELens is trained by its SAETrainer,
and ours by train.py.

    lr        the learning rate that was chosen
    fvu, l0   of the held-out vectors, as analysis/metrics.py defines them for all packages
    dead      fraction of latents without a nonzero activation on all held-out vectors
"""

import contextlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import train
from analysis.metrics import Metrics, evaluate, total
from bench.step import conditions
from cli import check_positive, resolve_device
from errors import UsageError
from sae import Sae
from store.dataset import Activations, open_activations


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


def batches(activations: Activations, cfg: Config, stop: int) -> Iterator[Tensor]:
    """Yield the same batches for every package: float32 (batch_size, d), `stop` vectors in all."""
    for x, _ in activations.batches(cfg.batch_size, stop):
        yield x.float()


def ours(activations: Activations, cfg: Config, stop: int, lr: float, seed: int) -> Sae:
    """Return the SAE that train.py trains at its defaults."""
    with tempfile.TemporaryDirectory() as folder:
        config = train.Config(
            data=activations.paths,
            out_dir=folder,
            run_name="run",
            num_latents=[cfg.expansion_factor * activations.d],
            k=[cfg.k],
            seeds=[seed],
            lr=lr,
            effective_batch_size=cfg.batch_size,
            max_examples=stop,
            device=cfg.device,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(config)
        return Sae.load_from_disk(Path(folder) / "run")


def eai_sparsify(activations: Activations, cfg: Config, stop: int, lr: float, seed: int) -> Sae:
    """Return an SAE that was trained as the Trainer of EleutherAI's sparsify does."""
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
        if i == 0:
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


def sae_lens(activations: Activations, cfg: Config, stop: int, lr: float, seed: int) -> Sae:
    """Return the SAE that SAELens's SAETrainer trains."""
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


class Package(NamedTuple):
    """One of the packages that are compared."""

    module: str
    """Its name when it is imported."""

    train: Callable[[Activations, Config, int, float, int], Sae]
    """Trains on `stop` vectors with a learning rate and a seed."""

    default_lr: Callable[[int, int], float]
    """Its own learning rate for M latents and T updates."""


def our_lr(M: int, T: int) -> float:
    """Return the peak that train.py chooses."""
    return train.peak_learning_rate(T, M)


def eai_sparsify_lr(M: int, T: int) -> float:
    """Return the learning rate of sparsify's Trainer for sign descent; 5e-3 for 16,384 latents."""
    return 5e-3 / (M / 2**14) ** 0.5


def sae_lens_lr(M: int, T: int) -> float:
    """Return the default of SAELens, which depends on neither."""
    return 3e-4


PACKAGES = {
    "ours": Package("train", ours, our_lr),
    "eai-sparsify": Package("sparsify", eai_sparsify, eai_sparsify_lr),
    "sae-lens": Package("sae_lens", sae_lens, sae_lens_lr),
}


def main(cfg: Config) -> None:
    """Print one line per file, package and seed, and the ratio of the mean FVUs of each file."""
    check_positive(cfg, "k", "expansion_factor", "batch_size", "max_examples")
    for name in cfg.packages:
        if name not in PACKAGES:
            raise UsageError(f"--packages {name}: expected some of {', '.join(PACKAGES)}")
    print(conditions(resolve_device(cfg.device)))
    print(
        f"k = {cfg.k}, M = {cfg.expansion_factor} d, batches of {cfg.batch_size}, "
        "best of three learning rates\n"
    )
    print(
        f"{'hook name':28} {'package':14} {'lr':>9} {'seed':>4} {'fvu':>8} {'l0':>6} {'dead':>7}",
        flush=True,
    )
    installed = [name for name in cfg.packages if importlib.util.find_spec(PACKAGES[name].module)]
    for activations in open_activations(cfg.data):
        mean_fvu = {name: measure(name, activations, cfg) for name in installed}
        if "ours" in mean_fvu:
            print_ratio(activations.hook_name, mean_fvu)


def measure(name: str, activations: Activations, cfg: Config) -> float:
    """Choose a package's learning rate, train with every seed, print; return the mean FVU."""
    M = cfg.expansion_factor * activations.d
    default = PACKAGES[name].default_lr(M, count_updates(activations, cfg))
    of_first_seed = {}
    for factor in tqdm((0.5, 1, 2), name, leave=False):
        lr = default * factor
        of_first_seed[lr] = train_and_evaluate(name, activations, cfg, lr, cfg.seeds[0])
    best_lr = min(of_first_seed, key=lambda lr: of_first_seed[lr].fvu)

    results = [of_first_seed[best_lr]]
    for seed in cfg.seeds[1:]:
        results.append(train_and_evaluate(name, activations, cfg, best_lr, seed))
    for seed, metrics in zip(cfg.seeds, results):
        numbers = f"{metrics.fvu:8.4f} {metrics.l0:6.2f} {metrics.dead:7.2%}"
        print(f"{activations.hook_name:28} {name:14} {best_lr:9.2e} {seed:4} {numbers}", flush=True)
    return sum(metrics.fvu for metrics in results) / len(results)


def train_and_evaluate(
    name: str, activations: Activations, cfg: Config, lr: float, seed: int
) -> Metrics:
    """Train a package once; return what its SAE does on the held-out vectors."""
    stop = count_updates(activations, cfg) * cfg.batch_size
    sae = PACKAGES[name].train(activations, cfg, stop, lr, seed)
    by_timestep = evaluate([sae], activations, 4096)[0]
    return total(by_timestep)


def count_updates(activations: Activations, cfg: Config) -> int:
    """Return the whole batches of the training vectors, or of the first `max_examples`."""
    num_vectors = activations.num_training
    if cfg.max_examples is not None:
        num_vectors = min(cfg.max_examples, num_vectors)
    return num_vectors // cfg.batch_size


def print_ratio(hook_name: str, mean_fvu: dict[str, float]) -> None:
    """Print our mean FVU over that of the best other package; NaN if there is no other."""
    others = [fvu for name, fvu in mean_fvu.items() if name != "ours"]
    ratio = mean_fvu["ours"] / min(others, default=float("nan"))
    print(f"{hook_name:28} mean fvu of ours / best other's {ratio:.3f}\n", flush=True)
