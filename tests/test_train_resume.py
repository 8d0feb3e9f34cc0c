"""A training that stops, by a signal or by numbers that are not finite: nothing is lost, and it resumes."""

import signal
import time

import numpy as np
import pytest
from commands import Script
from safetensors.torch import load_file
from spies import note_calls
from training import metrics_rows, saved_state, timeless_rows, train_config

import train
from analysis import data_stats
from sae import Sae
from store.dataset import Activations
from train import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tenth_held_out")]


@pytest.fixture(scope="module")
def undisturbed(vectors_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    command(vectors_file, out)
    return out / "run"


def command(data, out, stop=None):
    """Run train.py as a user would; `stop` is the signal to send once some rows are there. Returns
    its status."""
    options = "--num_latents 48 --k 3 --effective_batch_size 50 --save_every 30 --log_every 1 --num_epochs 20 --lr 3e-3"
    options += " --dead_feature_threshold 500 --run_name run --max_examples 25000"
    process = Script("train.py", "--data", data, "--out_dir", out, *options.split(), cwd=out.parent)
    metrics = out / "run" / "metrics.jsonl"
    while stop and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") > 100:
            process.send_signal(stop)
            break
        time.sleep(0.01)
    return process.wait(60)


@pytest.mark.parametrize("stop, status", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_and_resumed_is_the_same_to_the_bit(
    vectors_file, tmp_path, undisturbed, stop, status
):
    assert command(vectors_file, tmp_path, stop) == status
    assert not (tmp_path / "run" / "cfg.json").exists()
    if stop == signal.SIGINT:
        assert saved_state(tmp_path)["iteration"] == metrics_rows(tmp_path / "run")[-1]["iteration"]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 1')  # torn
    assert command(vectors_file, tmp_path) == 0
    assert (tmp_path / "run" / "sae.safetensors").read_bytes() == (
        undisturbed / "sae.safetensors"
    ).read_bytes()
    assert timeless_rows(tmp_path / "run") == timeless_rows(undisturbed)


def test_ctrl_c_saves_each_sae_once(vectors_file, tmp_path, monkeypatch):
    update = train.SparseUpdate.step
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 19:
            signal.raise_signal(signal.SIGINT)
        return update(*args, **options)

    monkeypatch.setattr(train.SparseUpdate, "step", interrupted)
    saved = note_calls(monkeypatch, train, "save_tensors", lambda path, *args: path.parent.name)
    options = dict(seeds=[0, 1], num_epochs=9, save_every=10**6)
    with pytest.raises(KeyboardInterrupt):
        main(train_config(vectors_file, tmp_path, **options))
    assert sorted(saved) == ["k3_M48"] * 2 + ["k3_M48_seed1"] * 2  # at the start, and now
    assert len(calls) == 20  # the batch in which it came is given to both


@pytest.mark.parametrize("where", [(train, "evaluate"), (Sae, "save_to_disk")])
def test_ctrl_c_after_the_last_update_is_heard(vectors_file, tmp_path, monkeypatch, where):
    """At once, and the same command resumes with the held-out numbers."""
    cfg = train_config(vectors_file, tmp_path, batch_topk=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, lambda *args, **options: signal.raise_signal(signal.SIGINT))
        main(cfg)
    assert not (tmp_path / "run" / "cfg.json").exists()
    main(cfg)
    main(train_config(vectors_file, tmp_path / "undisturbed", batch_topk=True))
    resumed = tmp_path / "run"
    expected = tmp_path / "undisturbed" / "run"
    assert (resumed / "sae.safetensors").read_bytes() == (expected / "sae.safetensors").read_bytes()
    assert timeless_rows(resumed) == timeless_rows(expected)
    assert len(metrics_rows(resumed)) == 8


def test_seconds_are_those_that_one_waits(vectors_file, tmp_path, monkeypatch, capsys):
    """Reading and saving are in them; and what was before a Ctrl-C, but not what was between."""
    now = [0]
    stop = [3]
    batches = Activations.batches
    save = train.save_tensors

    def read(self, *args, **options):
        for i, batch in enumerate(batches(self, *args, **options)):
            now[0] += 1
            if i == stop[0]:
                signal.raise_signal(signal.SIGINT)
            yield batch

    def saved(*args):
        now[0] += 10
        save(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Activations, "batches", read)
    monkeypatch.setattr(train, "save_tensors", saved)
    cfg = train_config(vectors_file, tmp_path, max_examples=600, log_every=1, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    now[0] += 1000
    stop[0] = None
    main(cfg)
    assert [row["seconds"] for row in metrics_rows(tmp_path / "run")] == [1, 12, 23, 34, 35, 46]
    assert "600 vectors in 56 s (11/s)" in capsys.readouterr().out


def test_nan_met_later_keeps_the_last_good_checkpoint(vectors_file, tmp_path, monkeypatch):
    monkeypatch.setattr(data_stats, "TRAINING_SAMPLE", 50)
    x = np.load(vectors_file)
    x[20, 1, 50] = np.inf
    np.save(tmp_path / "inf.npy", x)
    with pytest.raises(ValueError, match="NaN or inf in the data.*last good"):
        main(train_config(tmp_path / "inf.npy", tmp_path, save_every=1, log_every=1000))
    tensors = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (tmp_path / "run" / "cfg.json").exists()


def test_nan_in_held_out_vectors_is_no_result(vectors_file, tmp_path):
    """All of the training is kept: with the checkpoint of the last iteration, the same command
    fails at once."""
    x = np.load(vectors_file)
    x.reshape(-1, 16)[Activations([vectors_file]).held_out_units[0, 1]] = np.nan
    np.save(tmp_path / "nan.npy", x)
    for _ in range(2):
        with pytest.raises(ValueError, match="held-out"):
            main(train_config(tmp_path / "nan.npy", tmp_path, max_examples=1234, save_every=10**6))
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
            "checkpoint.safetensors",
            "metrics.jsonl",
        ]
        state = saved_state(tmp_path)
        assert state["iteration"] == state["row"]["iteration"] == 13
        assert metrics_rows(tmp_path / "run")[-1]["iteration"] == 10


def test_a_leftover_checkpoint_goes(vectors_file, tmp_path):
    main(train_config(vectors_file, tmp_path, max_examples=200))
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"")
    main(train_config(vectors_file, tmp_path, max_examples=200))
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
