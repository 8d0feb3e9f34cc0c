"""--log_to: what wandb, trackio and tensorboard are told."""

import sys

import pytest
from training import metrics_rows, train_config

import train
from train import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tenth_held_out")]


class FakeTracker:
    """Stands for the modules wandb and trackio, and for tensorboard's SummaryWriter."""

    def __init__(self):
        self.started = []
        self.rows = []
        self.finished = 0

    def init(self, **options):
        self.started.append(options)

    def log(self, row, step):
        self.rows.append(row | {"step": step})

    def SummaryWriter(self, folder, purge_step):
        self.started.append({"folder": folder, "purge_step": purge_step})
        return self

    def add_scalar(self, name, value, step):
        if name == "fvu":
            self.rows.append({"step": step, "fvu": value})

    def finish(self):
        self.finished += 1

    close = finish


def test_a_tracker_s_own_variable_names_the_project(vectors_file, tmp_path, monkeypatch):
    for log_to in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, log_to, fake := FakeTracker())
        monkeypatch.setenv(f"{log_to.upper()}_PROJECT", "mine")
        main(train_config(vectors_file, tmp_path / log_to, max_examples=200, log_to=log_to))
        assert fake.started[0]["project"] == "mine"


@pytest.mark.parametrize("log_to", ["wandb", "trackio", "tensorboard"])
def test_log_to(vectors_file, tmp_path, monkeypatch, log_to):
    fake = FakeTracker()
    calls = []
    update = train.SparseUpdate.step
    monkeypatch.setitem(
        sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(log_to, log_to), fake
    )

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(*args, **options)

    monkeypatch.setattr(train.SparseUpdate, "step", interrupted)
    options = dict(max_examples=600, log_every=1, save_every=2, log_to=log_to)
    with pytest.raises(KeyboardInterrupt):
        main(train_config(vectors_file, tmp_path, **options))
    assert fake.finished == 1
    assert [row["step"] for row in fake.rows] == [1, 2, 3]
    main(train_config(vectors_file, tmp_path, **options))
    assert fake.finished == 2
    assert [row["step"] for row in fake.rows] == [1, 2, 3, 3, 4, 5, 6]
    assert [row["fvu"] for row in fake.rows[3:]] == [
        row["fvu"] for row in metrics_rows(tmp_path / "run")[2:]
    ]
    main(train_config(vectors_file, tmp_path / "another", **options))
    first, resumed, other = fake.started
    if log_to == "tensorboard":
        assert [start["purge_step"] for start in fake.started] == [1, 3, 1]
    else:
        same = "id" if log_to == "wandb" else "name"
        assert first == resumed
        assert first["resume"] == "allow"
        assert first["project"] == "diffusion-saes"
        assert first[same] != other[same]


def test_a_tracker_that_is_not_there_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="pip install trackio"):
        main(train_config(tmp_path / "missing.npy", tmp_path / "out", log_to="trackio"))
