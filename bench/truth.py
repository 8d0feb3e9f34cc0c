"""Does training find a dictionary that is known? Recovery of the atoms of synthetic data, by
variant and seed.

    python -m bench truth                          # a million vectors: d = 64, 256 atoms, 5 active, M = 512, k = 5
    python -m bench truth --vectors 200000 --num_epochs 15 --seeds 0

x = sum of 5 of the 256 unit atoms with amplitudes uniform in [0, 1), plus noise of 0.01 a
dimension. An atom is recovered where some decoder row has a cosine of at least 0.95 with it.
Trained by train.py at its defaults.
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


@dataclass
class Config:
    vectors: int = 1_000_000
    d: int = 64
    """Their width."""

    atoms: int = 256
    active: int = 5
    """Atoms of a vector."""

    noise: float = 0.01
    """Standard deviation, of each dimension."""

    num_latents: int = 512
    num_epochs: int = 1
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    device: str = "auto"
    """Auto, cuda, cuda:N, mps, cpu."""


VARIANTS = {
    "TopK": {},
    "BatchTopK": {"activation": "batchtopk"},
    "Matryoshka": {"matryoshka": [256, 512]},
}


def synthetic(vectors, d, atoms, active, noise, seed=0):
    """Vectors (vectors, d) and the unit atoms (atoms, d) that they are made of: float32."""
    rng = np.random.default_rng(seed)
    dictionary = rng.standard_normal((atoms, d), np.float32)
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    x = np.empty((vectors, d), np.float32)
    for part in np.array_split(np.arange(vectors), max(1, vectors // 50_000)):
        chosen = rng.random((len(part), atoms), np.float32).argpartition(active, axis=1)[:, :active]
        codes = np.zeros((len(part), atoms), np.float32)
        np.put_along_axis(codes, chosen, rng.random(chosen.shape, np.float32), axis=1)
        x[part] = codes @ dictionary + noise * rng.standard_normal((len(part), d), np.float32)
    return x, dictionary


def recovered(sae, dictionary, cosine=0.95):
    """The share of atoms (atoms, d) to which some decoder row has at least this cosine."""
    rows = torch.nn.functional.normalize(sae.W_dec.detach().cpu(), dim=1)
    return (torch.from_numpy(dictionary) @ rows.T).amax(1).ge(cosine).float().mean().item()


def main(cfg):
    check_positive(cfg, "vectors", "d", "atoms", "active", "num_latents")
    where, versions, commit = conditions(resolve_device(cfg.device))
    print(f"{where}; {versions}; commit {commit}")
    print(
        f"{cfg.vectors:,} vectors, d = {cfg.d}, {cfg.atoms} atoms, {cfg.active} active, M = {cfg.num_latents}, k = {cfg.active}\n"
    )
    print(f"{'variant':12} {'seed':>4} {'recovered':>10} {'fvu':>8} {'l0':>6} {'dead':>7}")
    with tempfile.TemporaryDirectory() as folder:
        x, dictionary = synthetic(cfg.vectors, cfg.d, cfg.atoms, cfg.active, cfg.noise)
        np.save(Path(folder) / "x.npy", x)
        for variant, options in VARIANTS.items():
            given = dict(
                num_latents=[cfg.num_latents],
                k=[cfg.active],
                seeds=cfg.seeds,
                num_epochs=cfg.num_epochs,
                device=cfg.device,
            )
            out_dir = Path(folder) / variant
            with contextlib.redirect_stdout(io.StringIO()):
                train.main(
                    train.Config(data=[f"{folder}/x.npy"], out_dir=str(out_dir), **given, **options)
                )
            for path in sorted(out_dir.glob("*/cfg.json")):
                row, share = (
                    json.loads(path.read_text()),
                    recovered(Sae.load_from_disk(path.parent), dictionary),
                )
                seed, numbers = (
                    row["training"]["seed"],
                    f"{row['fvu']:8.4f} {row['l0']:6.2f} {row['dead']:7.2%}",
                )
                print(f"{variant:12} {seed:4} {share:10.1%} {numbers}", flush=True)
