"""Training: its gradients against a dense float64 reference, resuming to the bit, and every way to
refuse."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Script
from described import describe
from safetensors import safe_open
from safetensors.torch import load_file

import cli
import train
from analysis import data_stats
from analysis.data_stats import geometric_median, measure
from analysis.metrics import evaluate, total
from sae import Sae
from store.dataset import Activations
from train import Config, learning_rate, main

pytestmark = pytest.mark.slow

ROOT = Path(train.__file__).parent


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("store.dataset.HELD_OUT", dict(share=0.1, at_least=0, at_most=10**9))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """8000 vectors of width 16, each of 3 of 24 directions, off centre: (40 prompts, 2 steps, 100
    tokens, 16)."""
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((24, 16)) / 4
    codes = np.where(rng.random((8000, 24)) < 1 / 8, rng.gamma(3, 1, (8000, 24)), 0)
    x = codes @ atoms + 0.02 * rng.standard_normal((8000, 16)) + 5
    path = tmp_path_factory.mktemp("data") / "acts.npy"
    np.save(path, x.astype(np.float32).reshape(40, 2, 100, 16))
    return path


def config(data, out_dir, **options):
    defaults = dict(
        num_latents=48, k=3, effective_batch_size=100, lr=3e-3, lr_warmup_steps=5, save_every=20
    )
    defaults |= dict(
        data=[str(data)], out_dir=str(out_dir), run_name="run", device="cpu", mixed_precision="no"
    )
    options = defaults | options
    for name in ("k", "num_latents"):
        options[name] = options[name] if isinstance(options[name], list) else [options[name]]
    return Config(**options)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_with_true_numbers(data, tmp_path, capsys):
    (folder,) = main(config(data, tmp_path, num_epochs=3))
    assert folder == tmp_path / "run"
    names = ["cfg.json", "evaluate.png", "metrics.jsonl", "sae.safetensors", "train.png"]
    assert (
        sorted(path.name for path in folder.iterdir()) == names
        and str(folder) in capsys.readouterr().out
    )
    cfg, sae = json.loads((folder / "cfg.json").read_text()), Sae.load_from_disk(folder)
    assert (cfg["d_in"], cfg["num_latents"], cfg["k"], cfg["training"]["num_epochs"]) == (
        16,
        48,
        3,
        3,
    )

    x = torch.cat(
        list(Activations([data]).held_out())
    ).double()  # as it is in the file: the scale is folded in
    x_hat = sae(x).double()
    top_acts, top_indices = sae.encode(x)
    assert len(x) == cfg["num_held_out"] == 800
    assert cfg["fvu"] == pytest.approx(
        (((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()).item(), rel=1e-5
    )
    assert cfg["l0"] == (top_acts > 0).sum().item() / 800
    assert cfg["dead"] == pytest.approx(1 - len(top_indices[top_acts > 0].unique()) / 48)
    assert cfg["fvu"] < 0.3 and 2 < cfg["l0"] <= 3
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert rows(folder)[-1]["vectors"] == cfg["num_training"] == 3 * 7200
    assert all(row["l0"] <= 3 for row in rows(folder))


def test_a_poor_or_unfair_number_is_said_to_be_one(tmp_path, capsys):
    """FVU above 1, and held-out vectors that are of the one prompt that there is."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((1, 4, 30, 6), np.float32))
    main(config(tmp_path / "a.npy", tmp_path, k=2, num_latents=8, max_examples=10, lr=0.5))
    printed = capsys.readouterr().out
    assert (
        "no prompts to hold out whole" in printed
        and "an fvu of 1 is what the mean alone gives" in printed
    )
    assert (
        json.loads((tmp_path / "run" / "cfg.json").read_text())["held_out_whole_prompts"] is False
    )


def test_a_run_stays_in_its_folder_and_can_be_read_by_others(data, tmp_path):
    for name in ("../x", str(tmp_path / "y")):
        with pytest.raises(ValueError, match="inside --out_dir"):
            main(config(data, tmp_path / "saes", run_name=name))
    main(config(data, tmp_path, max_examples=200))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()}
    assert modes["sae.safetensors"] == modes["cfg.json"]


def test_a_finished_run_is_left_alone(data, tmp_path, capsys):
    main(config(data, tmp_path, max_examples=500))
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()
    }
    capsys.readouterr()
    main(config(data, tmp_path, max_examples=500))
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


def dense_reference(sae, x, dead, alpha, variance, residual):
    """The loss by plain dense autograd in float64, its gradients, and the codes (N, M) with their
    zeros."""
    W_enc, b_enc, W_dec, b_dec = params = [
        p.detach().double().requires_grad_()
        for p in (sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec)
    ]
    top = lambda a, k: a * (a >= a.topk(k).values[:, -1:]) if k < a.shape[1] else a
    x = x.double()
    pre_acts = torch.relu((x - b_dec) @ W_enc.T + b_enc)
    codes = top(pre_acts, sae.k)
    e = x - (codes @ W_dec + b_dec)
    e_hat = top(pre_acts[:, dead], x.shape[1] // 2) @ W_dec[dead]
    auxk = bool(len(dead)) * (e.detach() - e_hat).square().sum() / residual
    loss = (e.square().sum() / variance + alpha * auxk) / len(x)
    loss.backward()
    return loss.detach(), [p.grad for p in params], codes.detach(), e.detach()


@pytest.mark.parametrize("normalize", [True, False])
def test_updates_against_float64_autograd_and_torch_adam(data, tmp_path, normalize, monkeypatch):
    """Six updates of `train`: the gradient, what is projected and clipped, the learning rate, Adam,
    who is dead."""
    monkeypatch.setattr(train, "LIST_DEAD_EVERY", 1)
    cfg = config(
        data,
        tmp_path,
        max_examples=600,
        lr=0.01,
        lr_warmup_steps=1,
        auxk_alpha=20.0,
        dead_feature_threshold=200,
    )
    cfg.normalize_decoder = normalize
    main(cfg)
    activations = Activations([data])
    stats = measure(activations, "median")
    scale, variance = stats.scale, stats.variance
    sae = Sae(16, 48, 3)
    sae.b_dec.data.copy_(stats.center)
    sae, start = sae.double(), sae.W_dec.detach().clone()
    params = [sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec]
    optimizer = torch.optim.Adam(params, betas=(0.9, 0.999), eps=6.25e-10)
    silent, residual, norms, dead_at_some_time = torch.zeros(48), 1.0, [], 0
    for (batch, _), rate in zip(
        activations.batches(100, 600), (0.005, 0.01, 0.01, 0.01, 0.01, 0.01 * 5 / 6)
    ):
        dead = (silent >= 200).nonzero().flatten()
        dead_at_some_time += len(dead)
        _, grads, codes, e = dense_reference(sae, batch * scale, dead, 20.0, variance, residual)
        if normalize:
            W = sae.W_dec.detach()
            grads[2] = grads[2] - (grads[2] * W).sum(1, keepdim=True) * W
        norms.append(sum(g.square().sum() for g in grads).sqrt().item())
        for p, g in zip(params, grads):
            p.grad = g / max(1, norms[-1])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if normalize:
            sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
        silent = torch.where((codes > 0).any(0), 0, silent + 100)
        residual = e.square().sum() / 100
    assert max(norms) > 1.2 and dead_at_some_time
    mine = load_file(tmp_path / "run" / "sae.safetensors")
    mine["encoder.bias"] *= scale
    mine["b_dec"] *= scale
    for p, name in zip(params, ("encoder.weight", "encoder.bias", "W_dec", "b_dec")):
        assert (mine[name] - p).norm() <= 1e-4 * (sae.W_dec - start).norm(), name


def test_parts_add_up_to_the_whole_update(data, tmp_path):
    one = dict(max_examples=1000, auxk_alpha=1.0, dead_feature_threshold=200)
    main(config(data, tmp_path / "a", **one))
    main(config(data, tmp_path / "b", grad_acc_steps=6, **one))
    a, b = (load_file(tmp_path / name / "run" / "sae.safetensors") for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)


def test_more_parts_than_vectors_are_as_many(data, tmp_path):
    one = dict(max_examples=110, effective_batch_size=10)
    main(config(data, tmp_path / "a", grad_acc_steps=10, **one))
    main(config(data, tmp_path / "b", grad_acc_steps=2**62, **one))
    a, b = ((tmp_path / name / "run" / "sae.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_bf16_product_changes_little(data, tmp_path):
    saes = {}
    for precision in ("no", "bf16", "fp16", "auto"):
        main(config(data, tmp_path / precision, mixed_precision=precision))
        saes[precision] = Sae.load_from_disk(tmp_path / precision / "run")
        assert saes[precision].cfg["fvu"] == pytest.approx(saes["no"].cfg["fvu"], rel=0.2)
    same = lambda a, b: torch.equal(saes[a].W_dec, saes[b].W_dec)
    here = train.product_dtype("auto", torch.device("cpu"))  # what this CPU is fast at
    assert (
        same("auto", {torch.float32: "no", torch.bfloat16: "bf16"}[here])
        and not same("bf16", "no")
        and not same("fp16", "no")
        and not same("fp16", "bf16")
    )


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
    assert (
        stats.center / stats.scale - whole
    ).norm() < 5  # a batch of one prompt would be up to 50 off, the mean 500
    assert np.log2(stats.scale) == round(np.log2(stats.scale))
    assert stats.variance == pytest.approx(x.reshape(-1, 4).var(0).sum() * stats.scale**2, rel=0.3)


@pytest.mark.parametrize("options", [{}, {"effective_batch_size": 50}, {"grad_acc_steps": 20}])
def test_dead_feature_threshold_counts_vectors(data, tmp_path, options):
    """Without learning and k = 1 some latents never fire: they are dead from vector 600 on, in any
    batches."""
    options = (
        dict(
            lr=1e-30,
            k=1,
            num_latents=300,
            dead_feature_threshold=600,
            log_every=1,
            max_examples=1000,
        )
        | options
    )
    main(config(data, tmp_path, **options))
    assert min(row["vectors"] for row in rows(tmp_path / "run") if row["dead"] > 0) == 600


def test_auxk_revives_latents_that_started_badly(data, tmp_path, monkeypatch):
    class Badly(Sae):
        def __init__(self, *args):
            super().__init__(*args)
            self.encoder.weight.data[12:] *= (
                0.05  # three quarters of the latents never come among the k largest
            )

    monkeypatch.setattr(train, "Sae", Badly)
    dead = {}
    for alpha in (0, 1 / 32):
        main(
            config(
                data,
                tmp_path / str(alpha),
                auxk_alpha=alpha,
                dead_feature_threshold=1000,
                num_epochs=3,
            )
        )
        dead[alpha] = Sae.load_from_disk(tmp_path / str(alpha) / "run").cfg["dead"]
    assert dead[0] > 0.6 and dead[1 / 32] < dead[0] / 2


def test_learning_rate():
    cfg = Config(lr_warmup_steps=3, lr_scheduler="linear")
    rates = [learning_rate(i, 100, 2**14, cfg) / 1.2e-3 for i in range(100)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert (
        rates[80] == pytest.approx(1)
        and rates[90] == pytest.approx(0.5)
        and rates[99] == pytest.approx(0.05)
    )
    constant = Config(lr=0.5, lr_scheduler="constant", lr_warmup_steps=100)
    assert learning_rate(50, 1000, 1, constant) == pytest.approx(0.5 * 51 / 101)
    assert [learning_rate(i, 10, 1, constant) for i in range(4)] == pytest.approx(
        [0.5 / 3, 1 / 3, 0.5, 0.5]
    )  # at most a fifth
    assert learning_rate(50, 100, 2**16, cfg) == pytest.approx(6e-4)
    assert learning_rate(500, 7500, 2**14, cfg) == pytest.approx(4e-4)
    assert learning_rate(500, 10**6, 2**14, cfg) == pytest.approx(2e-4)


def test_device_of_the_evaluation_is_chunked_alike(data):
    sae, activations = Sae(16, 20, 3), Activations([data])
    a, b = (total(evaluate([sae], activations, size)[0]) for size in (7, 10**6))
    assert (a.l0, a.dead, a.n) == (b.l0, b.dead, b.n) and a.fvu == pytest.approx(b.fvu, rel=1e-9)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    command(data, out)
    return out / "run"


def saved_state(out):
    with safe_open(out / "run" / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["state"])


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
def test_stopped_and_resumed_is_the_same_to_the_bit(data, tmp_path, undisturbed, stop, status):
    assert command(data, tmp_path, stop) == status
    assert not (tmp_path / "run" / "cfg.json").exists()
    if stop == signal.SIGINT:
        assert saved_state(tmp_path)["iteration"] == rows(tmp_path / "run")[-1]["iteration"]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 1')  # torn
    assert command(data, tmp_path) == 0
    assert (tmp_path / "run" / "sae.safetensors").read_bytes() == (
        undisturbed / "sae.safetensors"
    ).read_bytes()
    timeless = lambda folder: [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)
    ]
    assert timeless(tmp_path / "run") == timeless(undisturbed)


def test_ctrl_c_saves_each_sae_once(data, tmp_path, monkeypatch):
    update, save, calls, saved = train.SparseUpdate.step, train.save_tensors, [], []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 19:
            signal.raise_signal(signal.SIGINT)
        return update(*args, **options)

    monkeypatch.setattr(train.SparseUpdate, "step", interrupted)
    monkeypatch.setattr(
        train,
        "save_tensors",
        lambda path, *args: saved.append(path.parent.name) or save(path, *args),
    )
    options = dict(seeds=[0, 1], num_epochs=9, save_every=10**6)
    with pytest.raises(KeyboardInterrupt):
        main(config(data, tmp_path, **options))
    assert sorted(saved) == ["k3_M48"] * 2 + ["k3_M48_seed1"] * 2  # at the start, and now
    assert len(calls) == 20  # the batch in which it came is given to both


@pytest.mark.parametrize("where", [(train, "evaluate"), (Sae, "save_to_disk")])
def test_ctrl_c_after_the_last_update_is_heard(data, tmp_path, monkeypatch, where):
    """At once, and the same command resumes with the held-out numbers."""
    cfg = config(data, tmp_path, batch_topk=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, lambda *args, **options: signal.raise_signal(signal.SIGINT))
        main(cfg)
    assert not (tmp_path / "run" / "cfg.json").exists()
    main(cfg)
    main(config(data, tmp_path / "undisturbed", batch_topk=True))
    found, expected = tmp_path / "run", tmp_path / "undisturbed" / "run"
    assert (found / "sae.safetensors").read_bytes() == (expected / "sae.safetensors").read_bytes()
    timeless = lambda folder: [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)
    ]
    assert timeless(found) == timeless(expected) and len(rows(found)) == 8


def test_seconds_are_those_that_one_waits(data, tmp_path, monkeypatch, capsys):
    """Reading and saving are in them; and what was before a Ctrl-C, but not what was between."""
    now, stop, batches, save = [0], [3], Activations.batches, train.save_tensors

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
    cfg = config(data, tmp_path, max_examples=600, log_every=1, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    now[0] += 1000
    stop[0] = None
    main(cfg)
    assert [row["seconds"] for row in rows(tmp_path / "run")] == [1, 12, 23, 34, 35, 46]
    assert "600 vectors in 56 s (11/s)" in capsys.readouterr().out


def one_line_error(cfg, capsys, monkeypatch, *arguments):
    """What a shell user sees: exit status 2 and one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.run_script(lambda _: main(cfg), Config)
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and "error" in lines[-1]
    return lines[-1]


def test_bad_inputs_end_in_one_line(data, tmp_path, capsys, monkeypatch):
    say = lambda cfg: one_line_error(cfg, capsys, monkeypatch)
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.npy").write_bytes(data.read_bytes()[:-100])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run").mkdir()
    (tmp_path / "foreign" / "run" / "thesis.txt").write_text("mine")
    x = np.load(data)
    x[:, :, ::2, 3] = np.nan
    np.save(tmp_path / "nan.npy", x)
    np.save(tmp_path / "same.npy", np.ones((9, 9), np.float32))
    assert "--k 49" in say(config(data, tmp_path, k=49))
    assert "--k 0" in say(config(data, tmp_path, k=0))
    assert "bad.npy" in say(config(tmp_path / "bad.npy", tmp_path))
    assert "no such file" in say(config(tmp_path / "missing.npy", tmp_path))
    assert "NaN or inf" in say(config(tmp_path / "nan.npy", tmp_path))
    assert "equal" in say(config(tmp_path / "same.npy", tmp_path))
    assert "file" in say(config(data, tmp_path / "file" / "below"))
    assert "something else" in say(config(data, tmp_path / "foreign"))
    assert (
        "--device cuda" in say(config(data, tmp_path, device="cuda")) or torch.cuda.is_available()
    )
    zeros = "effective_batch_size num_epochs max_examples grad_acc_steps log_every save_every buffer_gb lr"
    for name in zeros.split():
        assert f"--{name} 0: expected" in say(config(data, tmp_path, **{name: 0}))
    for name, value in dict(
        lr=float("nan"), lr_warmup_steps=-1, auxk_alpha=-0.1, buffer_gb=float("nan")
    ).items():
        assert f"--{name} {value}: expected" in say(config(data, tmp_path, **{name: value}))
    np.save(tmp_path / "huge.npy", x[:, :, 1::2] * np.float32(1e30))
    assert "too large" in say(config(tmp_path / "huge.npy", tmp_path))
    assert not (tmp_path / "run").exists()
    main(config(data, tmp_path, max_examples=200))
    assert "--k 3, not 4" in say(config(data, tmp_path, max_examples=200, k=4))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run").mkdir()
    (tmp_path / "half" / "run" / "checkpoint.safetensors").write_bytes(b"half a file")
    assert "damaged" in say(config(data, tmp_path / "half"))
    np.save(tmp_path / "other.npy", x[:, :, 1::2])
    assert "other data" in say(config(tmp_path / "other.npy", tmp_path, max_examples=200))


def test_nan_met_later_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    monkeypatch.setattr(data_stats, "TRAINING_SAMPLE", 50)
    x = np.load(data)
    x[20, 1, 50] = np.inf
    np.save(tmp_path / "inf.npy", x)
    with pytest.raises(ValueError, match="NaN or inf in the data.*last good"):
        main(config(tmp_path / "inf.npy", tmp_path, save_every=1, log_every=1000))
    tensors = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (tmp_path / "run" / "cfg.json").exists()


def test_nan_in_held_out_vectors_is_no_result(data, tmp_path):
    """All of the training is kept: with the checkpoint of the last iteration, the same command
    fails at once."""
    x = np.load(data)
    x.reshape(-1, 16)[Activations([data]).held_out_units[0, 1]] = np.nan
    np.save(tmp_path / "nan.npy", x)
    for _ in range(2):
        with pytest.raises(ValueError, match="held-out"):
            main(config(tmp_path / "nan.npy", tmp_path, max_examples=1234, save_every=10**6))
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
            "checkpoint.safetensors",
            "metrics.jsonl",
        ]
        state = saved_state(tmp_path)
        assert (
            state["iteration"] == state["row"]["iteration"] == 13
            and rows(tmp_path / "run")[-1]["iteration"] == 10
        )


def test_one_train_py_writes_to_a_folder_at_a_time(data, tmp_path):
    """Of a sweep to each; the lock of one that was killed is none, and nothing is left of it."""
    options = dict(k=[2, 3], max_examples=200)
    with (
        train.locked(tmp_path / "run" / "k3_M48"),
        pytest.raises(ValueError, match="another train.py is writing to .*k3_M48"),
    ):
        main(config(data, tmp_path, **options))
    assert not list(tmp_path.iterdir())
    (tmp_path / "run" / "k3_M48").mkdir(parents=True)
    (tmp_path / "run" / "k3_M48" / "train.lock").write_text("")
    main(config(data, tmp_path, **options))
    assert len(list(tmp_path.glob("run/*/cfg.json"))) == 2 and not list(tmp_path.rglob("*.lock"))


def as_version_0_wrote(settings):
    """Settings of a run as they were written when --batch_topk, --sample_topk and --micro_acc_steps
    were options."""
    activation = settings.pop("activation")
    old = {"batch_topk": activation == "batchtopk", "sample_topk": activation == "sampletopk"}
    return (
        settings | old | {"grad_acc_steps": settings["grad_acc_steps"] // 2, "micro_acc_steps": 2}
    )


def test_a_run_that_an_older_version_finished_is_left_alone(data, tmp_path, capsys):
    options = dict(max_examples=500, activation="batchtopk", grad_acc_steps=4)
    main(config(data, tmp_path, **options))
    path = tmp_path / "run" / "cfg.json"
    cfg = json.loads(path.read_text())
    path.write_text(json.dumps(cfg | {"training": as_version_0_wrote(cfg["training"])}))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    main(config(data, tmp_path, **options))
    assert "run is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--activation batchtopk, not topk; choose another"):
        main(config(data, tmp_path, **options | dict(activation="topk")))
    with pytest.raises(ValueError, match="--grad_acc_steps 4, not 2; choose another"):
        main(config(data, tmp_path, **options | dict(grad_acc_steps=2)))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_gamma_is_said_in_one_line_that_names_diagnose_py(data, tmp_path, capsys):
    main(config(data, tmp_path, max_examples=200))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "gamma " in line]
    x = Activations([data]).sample(10**6).double()
    gamma = x.mean(0).norm() / x.var(0, correction=0).sum().sqrt()
    assert f"gamma {gamma:.2f};" in line and "diagnose.py" in line


def test_a_leftover_checkpoint_goes(data, tmp_path):
    main(config(data, tmp_path, max_examples=200))
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"")
    main(config(data, tmp_path, max_examples=200))
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


class FakeTracker:
    """Stands for the modules wandb and trackio, and for tensorboard's SummaryWriter."""

    def __init__(self):
        self.started, self.rows, self.finished = [], [], 0

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


def test_a_tracker_s_own_variable_names_the_project(data, tmp_path, monkeypatch):
    for log_to in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, log_to, fake := FakeTracker())
        monkeypatch.setenv(f"{log_to.upper()}_PROJECT", "mine")
        main(config(data, tmp_path / log_to, max_examples=200, log_to=log_to))
        assert fake.started[0]["project"] == "mine"


@pytest.mark.parametrize("log_to", ["wandb", "trackio", "tensorboard"])
def test_log_to(data, tmp_path, monkeypatch, log_to):
    fake, calls, update = FakeTracker(), [], train.SparseUpdate.step
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
        main(config(data, tmp_path, **options))
    assert fake.finished == 1 and [row["step"] for row in fake.rows] == [1, 2, 3]
    main(config(data, tmp_path, **options))
    assert fake.finished == 2 and [row["step"] for row in fake.rows] == [1, 2, 3, 3, 4, 5, 6]
    assert [row["fvu"] for row in fake.rows[3:]] == [
        row["fvu"] for row in rows(tmp_path / "run")[2:]
    ]
    main(config(data, tmp_path / "another", **options))
    first, resumed, other = fake.started
    if log_to == "tensorboard":
        assert [start["purge_step"] for start in fake.started] == [1, 3, 1]
    else:
        same = "id" if log_to == "wandb" else "name"
        assert (
            first == resumed and first["resume"] == "allow" and first["project"] == "diffusion-saes"
        )
        assert first[same] != other[same]


def test_a_tracker_that_is_not_there_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="pip install trackio"):
        main(config(tmp_path / "missing.npy", tmp_path / "out", log_to="trackio"))


def test_trains_where_triton_is_absent(data, tmp_path):
    code = "import sys; sys.modules['triton'] = None; from train import Config, main; "
    code += (
        f"main(Config(data=[{str(data)!r}], out_dir={str(tmp_path)!r}, k=[2], max_examples=300)); "
    )
    code += "assert 'matplotlib.pyplot' not in sys.modules"  # a notebook's backend stays as it is
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "acts_k2_M256" / "cfg.json").exists()
