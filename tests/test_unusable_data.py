"""Data that nothing can be learned from, and sizes that do not fit the data, are said."""

from dataclasses import replace

import numpy as np
import pytest

import diagnose
import evaluate
import train
from errors import UsageError
from sae import Sae
from store.dataset import Activations

pytestmark = pytest.mark.slow


def test_numbers_that_are_not_finite_or_vanish_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("store.dataset.HELD_OUT", dict(share=0.1, at_least=0, at_most=10**9))
    x = np.random.default_rng(0).normal(size=(64, 3, 4, 8)).astype(np.float32)
    np.save("x.npy", x)
    np.save("tiny.npy", x * 1e-30)
    with pytest.raises(UsageError, match="all equal or too large or small"):
        diagnose.main(diagnose.Config(data=["tiny.npy"], device="cpu"))
    Sae(8, 16, 2, {"data": ["x.npy"]}).save_to_disk("sae")
    file, first, _ = Activations(["x.npy"]).held_out_units[0]
    x.reshape(-1, 8)[first] = np.nan
    np.save("x.npy", x)
    with pytest.raises(UsageError, match="NaN or inf in held-out vectors"):
        evaluate.main(evaluate.Config(sae="sae", device="cpu"))


def test_too_few_vectors_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    np.save("two.npy", x[:2])
    np.save("equal.npy", np.ones((40, 8), np.float32))
    config = train.Config(data=["two.npy"], num_latents=[16], k=[2], device="cpu")
    with pytest.raises(UsageError, match="two.npy has 1 training vector, too few to learn from"):
        train.main(config)
    with pytest.raises(UsageError, match="two.npy has 1 training vector, too few to learn from"):
        diagnose.main(diagnose.Config(data=["two.npy"], device="cpu"))
    with pytest.raises(UsageError, match="the sampled vectors are all equal"):
        train.main(replace(config, data=["equal.npy"]))


def test_sizes_beyond_the_data_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).standard_normal((4000, 8)).astype(np.float32))
    config = train.Config(data=["x.npy"], num_latents=[16], k=[2], device="cpu")
    num_training = Activations(["x.npy"]).num_training
    for number, (options, line) in enumerate(
        (
            ({}, None),
            (
                {"effective_batch_size": 10**7},
                "note: --effective_batch_size 10000000 is more than the number of vectors in the "
                f"run, {num_training}, so there is a single update",
            ),
            (
                {"max_examples": 1},
                "note: --effective_batch_size 1024 is more than the number of vectors in the "
                "run, 1, so there is a single update",
            ),
            (
                {"grad_acc_steps": 10**6},
                "note: --grad_acc_steps 1000000 has the effect of 1024, "
                "since a batch has no more vectors",
            ),
        )
    ):
        train.main(replace(config, run_name=str(number), **options))
        printed = capsys.readouterr().out
        if line is None:
            assert "--effective_batch_size" not in printed
            assert "--grad_acc_steps" not in printed
        else:
            assert line in printed


def test_arrays_in_another_order_of_bytes_or_axes_say_the_way_on(tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 16, 8)).astype(np.float32)
    ways = {
        "big": (x.astype(">f4"), 'x.astype("<f4")'),
        "fortran": (np.asfortranarray(x), "np.ascontiguousarray(x)"),
    }
    for name, (array, way) in ways.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(UsageError) as error:
            Activations([tmp_path / f"{name}.npy"])
        assert way in str(error.value)
