"""train.py: true numbers, the start, the learning rate, folders that are in use, and bad inputs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from described import describe
from files import read_json
from training import metrics_rows, train_config

import cli
import train
from analysis import data_stats
from analysis.data_stats import geometric_median, measure
from analysis.metrics import evaluate, total
from sae import Sae
from store.dataset import Activations
from train import Config, learning_rate, main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tenth_held_out")]

ROOT = Path(train.__file__).parent


def test_a_run_ends_with_true_numbers(vectors_file, tmp_path, capsys):
    (folder,) = main(train_config(vectors_file, tmp_path, num_epochs=3))
    assert folder == tmp_path / "run"
    names = ["cfg.json", "evaluate.png", "metrics.jsonl", "sae.safetensors", "train.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert str(folder) in capsys.readouterr().out
    cfg = read_json(folder / "cfg.json")
    sae = Sae.load_from_disk(folder)
    assert (cfg["d_in"], cfg["num_latents"], cfg["k"], cfg["training"]["num_epochs"]) == (
        16,
        48,
        3,
        3,
    )

    # as it is in the file: the scale is folded in
    x = torch.cat(list(Activations([vectors_file]).held_out())).double()
    x_hat = sae(x).double()
    top_acts, top_indices = sae.encode(x)
    assert len(x) == cfg["num_held_out"] == 800
    assert cfg["fvu"] == pytest.approx(
        (((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()).item(), rel=1e-5
    )
    assert cfg["l0"] == (top_acts > 0).sum().item() / 800
    assert cfg["dead"] == pytest.approx(1 - len(top_indices[top_acts > 0].unique()) / 48)
    assert cfg["fvu"] < 0.3
    assert 2 < cfg["l0"] <= 3
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert metrics_rows(folder)[-1]["vectors"] == cfg["num_training"] == 3 * 7200
    assert all(row["l0"] <= 3 for row in metrics_rows(folder))


def test_a_poor_or_unfair_number_is_said_to_be_one(tmp_path, capsys):
    """FVU above 1, and held-out vectors that are of the one prompt that there is."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((1, 4, 30, 6), np.float32))
    main(train_config(tmp_path / "a.npy", tmp_path, k=2, num_latents=8, max_examples=10, lr=0.5))
    printed = capsys.readouterr().out
    assert "no prompts to hold out whole" in printed
    assert "an fvu of 1 is what the mean alone gives" in printed
    assert read_json(tmp_path / "run" / "cfg.json")["held_out_whole_prompts"] is False


def test_a_run_stays_in_its_folder_and_can_be_read_by_others(vectors_file, tmp_path):
    for name in ("../x", str(tmp_path / "y")):
        with pytest.raises(ValueError, match="inside --out_dir"):
            main(train_config(vectors_file, tmp_path / "saes", run_name=name))
    main(train_config(vectors_file, tmp_path, max_examples=200))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()}
    assert modes["sae.safetensors"] == modes["cfg.json"]


def test_a_finished_run_is_left_alone(vectors_file, tmp_path, capsys):
    main(train_config(vectors_file, tmp_path, max_examples=500))
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()
    }
    capsys.readouterr()
    main(train_config(vectors_file, tmp_path, max_examples=500))
    assert "run is finished" in capsys.readouterr().out
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()
    }


def test_each_hook_name_gets_an_sae(tmp_path, monkeypatch):
    for name in ("a", "b"):
        np.save(
            tmp_path / f"{name}.npy",
            np.random.default_rng(0).standard_normal((20, 30, 6), np.float32),
        )
        describe(tmp_path / f"{name}.npy", hook_name=name)
    monkeypatch.chdir(tmp_path)
    main(Config(data=["."], k=[2], expansion_factor=[2], max_examples=64))
    assert sorted(path.name for path in Path("saes").iterdir()) == ["a_k2_M12", "b_k2_M12"]
    assert Sae.load_from_disk("saes/b_k2_M12").cfg["hook_name"] == "b"


def test_b_dec_starts_at_the_geometric_median_of_all_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(data_stats, "TRAINING_SAMPLE", 500)
    x = np.random.default_rng(0).standard_normal((50, 40, 4), np.float32) + np.arange(50)[
        :, None, None
    ].astype("f4")
    x[:, 0] = 1e4  # one vector in 40 is an outlier
    np.save(tmp_path / "a.npy", x)
    activations = Activations([tmp_path / "a.npy"])
    stats = measure(activations, "median")
    whole = geometric_median(torch.from_numpy(x.reshape(-1, 4)))
    # a batch of one prompt would be up to 50 off, the mean 500
    assert (stats.center / stats.scale - whole).norm() < 5
    assert np.log2(stats.scale) == round(np.log2(stats.scale))
    assert stats.variance == pytest.approx(x.reshape(-1, 4).var(0).sum() * stats.scale**2, rel=0.3)


def test_learning_rate():
    cfg = Config(lr_warmup_steps=3, lr_scheduler="linear")
    rates = [learning_rate(i, 100, 2**14, cfg) / 1.2e-3 for i in range(100)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[80] == pytest.approx(1)
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    constant = Config(lr=0.5, lr_scheduler="constant", lr_warmup_steps=100)
    assert learning_rate(50, 1000, 1, constant) == pytest.approx(0.5 * 51 / 101)
    # at most a fifth
    assert [learning_rate(i, 10, 1, constant) for i in range(4)] == pytest.approx(
        [0.5 / 3, 1 / 3, 0.5, 0.5]
    )
    assert learning_rate(50, 100, 2**16, cfg) == pytest.approx(6e-4)
    assert learning_rate(500, 7500, 2**14, cfg) == pytest.approx(4e-4)
    assert learning_rate(500, 10**6, 2**14, cfg) == pytest.approx(2e-4)


def test_device_of_the_evaluation_is_chunked_alike(vectors_file):
    sae = Sae(16, 20, 3)
    activations = Activations([vectors_file])
    a, b = (total(evaluate([sae], activations, size)[0]) for size in (7, 10**6))
    assert (a.l0, a.dead, a.n) == (b.l0, b.dead, b.n)
    assert a.fvu == pytest.approx(b.fvu, rel=1e-9)


def one_line_error(cfg, capsys, monkeypatch, *arguments):
    """What a shell user sees: exit status 2 and one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.run_script(lambda _: main(cfg), Config)
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2
    assert "error" in lines[-1]
    return lines[-1]


def test_bad_inputs_end_in_one_line(vectors_file, tmp_path, capsys, monkeypatch):

    def say(cfg):
        return one_line_error(cfg, capsys, monkeypatch)

    (tmp_path / "file").write_text("")
    (tmp_path / "bad.npy").write_bytes(vectors_file.read_bytes()[:-100])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run").mkdir()
    (tmp_path / "foreign" / "run" / "thesis.txt").write_text("mine")
    x = np.load(vectors_file)
    x[:, :, ::2, 3] = np.nan
    np.save(tmp_path / "nan.npy", x)
    np.save(tmp_path / "same.npy", np.ones((9, 9), np.float32))
    assert "--k 49" in say(train_config(vectors_file, tmp_path, k=49))
    assert "--k 0" in say(train_config(vectors_file, tmp_path, k=0))
    assert "bad.npy" in say(train_config(tmp_path / "bad.npy", tmp_path))
    assert "no such file" in say(train_config(tmp_path / "missing.npy", tmp_path))
    assert "NaN or inf" in say(train_config(tmp_path / "nan.npy", tmp_path))
    assert "equal" in say(train_config(tmp_path / "same.npy", tmp_path))
    assert "file" in say(train_config(vectors_file, tmp_path / "file" / "below"))
    assert "something else" in say(train_config(vectors_file, tmp_path / "foreign"))
    assert (
        "--device cuda" in say(train_config(vectors_file, tmp_path, device="cuda"))
        or torch.cuda.is_available()
    )
    zeros = "effective_batch_size num_epochs max_examples grad_acc_steps log_every save_every buffer_gb lr"
    for name in zeros.split():
        assert f"--{name} 0: expected" in say(train_config(vectors_file, tmp_path, **{name: 0}))
    for name, value in dict(
        lr=float("nan"), lr_warmup_steps=-1, auxk_alpha=-0.1, buffer_gb=float("nan")
    ).items():
        assert f"--{name} {value}: expected" in say(
            train_config(vectors_file, tmp_path, **{name: value})
        )
    np.save(tmp_path / "huge.npy", x[:, :, 1::2] * np.float32(1e30))
    assert "too large" in say(train_config(tmp_path / "huge.npy", tmp_path))
    assert not (tmp_path / "run").exists()
    main(train_config(vectors_file, tmp_path, max_examples=200))
    assert "--k 3, not 4" in say(train_config(vectors_file, tmp_path, max_examples=200, k=4))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run").mkdir()
    (tmp_path / "half" / "run" / "checkpoint.safetensors").write_bytes(b"half a file")
    assert "damaged" in say(train_config(vectors_file, tmp_path / "half"))
    np.save(tmp_path / "other.npy", x[:, :, 1::2])
    assert "other data" in say(train_config(tmp_path / "other.npy", tmp_path, max_examples=200))


def test_one_train_py_writes_to_a_folder_at_a_time(vectors_file, tmp_path):
    """Of a sweep to each; the lock of one that was killed is none, and nothing is left of it."""
    options = dict(k=[2, 3], max_examples=200)
    with (
        train.locked(tmp_path / "run" / "k3_M48"),
        pytest.raises(ValueError, match="another train.py is writing to .*k3_M48"),
    ):
        main(train_config(vectors_file, tmp_path, **options))
    assert not list(tmp_path.iterdir())
    (tmp_path / "run" / "k3_M48").mkdir(parents=True)
    (tmp_path / "run" / "k3_M48" / "train.lock").write_text("")
    main(train_config(vectors_file, tmp_path, **options))
    assert len(list(tmp_path.glob("run/*/cfg.json"))) == 2
    assert not list(tmp_path.rglob("*.lock"))


def as_version_0_wrote(settings):
    """Settings of a run as they were written when --batch_topk, --sample_topk and --micro_acc_steps
    were options."""
    activation = settings.pop("activation")
    old = {"batch_topk": activation == "batchtopk", "sample_topk": activation == "sampletopk"}
    return (
        settings | old | {"grad_acc_steps": settings["grad_acc_steps"] // 2, "micro_acc_steps": 2}
    )


def test_a_run_that_an_older_version_finished_is_left_alone(vectors_file, tmp_path, capsys):
    options = dict(max_examples=500, activation="batchtopk", grad_acc_steps=4)
    main(train_config(vectors_file, tmp_path, **options))
    path = tmp_path / "run" / "cfg.json"
    cfg = read_json(path)
    path.write_text(json.dumps(cfg | {"training": as_version_0_wrote(cfg["training"])}))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    main(train_config(vectors_file, tmp_path, **options))
    assert "run is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--activation batchtopk, not topk; choose another"):
        main(train_config(vectors_file, tmp_path, **options | dict(activation="topk")))
    with pytest.raises(ValueError, match="--grad_acc_steps 4, not 2; choose another"):
        main(train_config(vectors_file, tmp_path, **options | dict(grad_acc_steps=2)))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_gamma_is_said_in_one_line_that_names_diagnose_py(vectors_file, tmp_path, capsys):
    main(train_config(vectors_file, tmp_path, max_examples=200))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "gamma " in line]
    x = Activations([vectors_file]).sample(10**6).double()
    gamma = x.mean(0).norm() / x.var(0, correction=0).sum().sqrt()
    assert f"gamma {gamma:.2f};" in line
    assert "diagnose.py" in line


def test_trains_where_triton_is_absent(vectors_file, tmp_path):
    code = "import sys; sys.modules['triton'] = None; from train import Config, main; "
    code += f"main(Config(data=[{str(vectors_file)!r}], out_dir={str(tmp_path)!r}, k=[2], max_examples=300)); "
    code += "assert 'matplotlib.pyplot' not in sys.modules"  # a notebook's backend stays as it is
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "acts_k2_M256" / "cfg.json").exists()
