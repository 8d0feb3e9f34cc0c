"""Does training find a dictionary that is known? Recovered atoms of synthetic data.

    python -m bench truth                          # d = 64, 256 atoms, 5 active, M = 512, k = 5
    python -m bench truth --vectors 200000 --num_epochs 15 --seeds 0

Claim: train.py at its defaults recovers all atoms with TopK, and at least 99 % with BatchTopK and
Matryoshka (docs/benchmarks.md).

    x = sum of 5 of the 256 atoms, with amplitudes uniform in [0, 1), plus noise

The atoms have length 1. The noise has a standard deviation of 0.01 in each dimension.

    recovered       fraction of atoms to which some decoder row has a cosine of at least 0.95
    fvu, l0, dead   of held-out vectors, as train.py defines them (docs/training.md)
"""

import contextlib
import io
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import train
from bench.step import conditions
from cli import check_positive, resolve_device
from sae import Sae

VARIANTS = {
    "TopK": {},
    "BatchTopK": {"activation": "batchtopk"},
    "Matryoshka": {"matryoshka": [256, 512]},
}
"""{name in the table: the options of train.py that make it}."""

CHUNK = 50_000  # vectors that are made at once; it decides the random draws


@dataclass
class Config:
    # data
    vectors: int = 1_000_000
    """Make this many vectors."""

    d: int = 64
    """Give the vectors this width."""

    atoms: int = 256
    """Give the dictionary this many atoms."""

    active: int = 5
    """Make each vector of this many atoms; it is also the SAE's k."""

    noise: float = 0.01
    """Add noise of this standard deviation to each dimension."""

    # training
    num_latents: int = 512
    """Give the SAE this many latents."""

    num_epochs: int = 1
    """Pass over the vectors this often."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Train one SAE from each of these seeds."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


def synthetic(
    vectors: int, d: int, atoms: int, active: int, noise: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors (vectors, d) and the atoms (atoms, d) that they are made of, both float32."""
    rng = np.random.default_rng(seed)
    dictionary = rng.standard_normal((atoms, d), np.float32)
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)

    x = np.empty((vectors, d), np.float32)
    for indices in np.array_split(np.arange(vectors), max(1, vectors // CHUNK)):
        n = len(indices)
        order = rng.random((n, atoms), np.float32).argpartition(active, axis=1)
        chosen = order[:, :active]
        codes = np.zeros((n, atoms), np.float32)
        np.put_along_axis(codes, chosen, rng.random(chosen.shape, np.float32), axis=1)
        x[indices] = codes @ dictionary + noise * rng.standard_normal((n, d), np.float32)
    return x, dictionary


def recovered(sae: Sae, dictionary: np.ndarray, cosine: float = 0.95) -> float:
    """Return the fraction of atoms (atoms, d) with this cosine, or more, to some decoder row."""
    rows = torch.nn.functional.normalize(sae.W_dec.detach().cpu(), dim=1)
    best_cosine = (torch.from_numpy(dictionary) @ rows.T).amax(1)
    return best_cosine.ge(cosine).float().mean().item()


def main(cfg: Config) -> None:
    """Print one line per variant and seed."""
    check_positive(cfg, "vectors", "d", "atoms", "active", "num_latents")
    print(conditions(resolve_device(cfg.device)))
    print(
        f"{cfg.vectors:,} vectors, d = {cfg.d}, {cfg.atoms} atoms, {cfg.active} active, "
        f"M = {cfg.num_latents}, k = {cfg.active}\n"
    )
    print(f"{'variant':12} {'seed':>4} {'recovered':>10} {'fvu':>8} {'l0':>6} {'dead':>7}")

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "x.npy"
        x, dictionary = synthetic(cfg.vectors, cfg.d, cfg.atoms, cfg.active, cfg.noise)
        np.save(data, x)
        for variant in VARIANTS:
            for path in train_variant(variant, data, Path(folder) / variant, cfg):
                print_row(variant, path, dictionary)


def train_variant(variant: str, data: Path, out_dir: Path, cfg: Config) -> list[Path]:
    """Train one SAE per seed, without printing; return their folders, sorted by name."""
    config = train.Config(
        data=[str(data)],
        out_dir=str(out_dir),
        num_latents=[cfg.num_latents],
        k=[cfg.active],
        seeds=cfg.seeds,
        num_epochs=cfg.num_epochs,
        device=cfg.device,
        **VARIANTS[variant],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(config)
    return sorted(path.parent for path in out_dir.glob("*/cfg.json"))


def print_row(variant: str, folder: Path, dictionary: np.ndarray) -> None:
    """Print the line of one trained SAE."""
    cfg = json.loads((folder / "cfg.json").read_text())
    fraction = recovered(Sae.load_from_disk(folder), dictionary)
    numbers = f"{cfg['fvu']:8.4f} {cfg['l0']:6.2f} {cfg['dead']:7.2%}"
    print(f"{variant:12} {cfg['training']['seed']:4} {fraction:10.1%} {numbers}", flush=True)
