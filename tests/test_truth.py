"""Training finds a dictionary that is known; the full size is `python -m bench truth`."""

import numpy as np
import pytest

import train
from bench.truth import VARIANTS, recovered, synthetic
from sae import Sae

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    path = tmp_path_factory.mktemp("truth") / "x.npy"
    x, dictionary = synthetic(60_000, d=32, atoms=64, active=3, noise=0.01)
    np.save(path, x)
    return path, dictionary


@pytest.mark.parametrize("variant", VARIANTS)
def test_known_atoms_are_recovered(known, tmp_path, monkeypatch, variant):
    monkeypatch.setattr("store.dataset.HELD_OUT", dict(share=0.1, at_least=0, at_most=10**9))
    path, dictionary = known
    options = {
        name: [64, 128] if name == "matryoshka" else value
        for name, value in VARIANTS[variant].items()
    }
    options |= dict(num_latents=[128], k=[3], num_epochs=20, lr=4e-3, device="cpu", run_name="run")
    assert recovered(Sae(32, 128, 3), dictionary) < 0.3  # before training
    train.main(train.Config(data=[str(path)], out_dir=str(tmp_path), **options))
    assert recovered(Sae.load_from_disk(tmp_path / "run"), dictionary) >= 0.95
