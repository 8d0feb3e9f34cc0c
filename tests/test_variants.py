"""Several SAEs from one reading, the variants from training to use, and the numbers by timestep."""

import json
import signal

import numpy as np
import pytest
import torch
from described import describe
from files import read_json, read_lines
from safetensors.torch import load_file

import train
from analysis.metrics import evaluate, total
from kernels.update import SparseUpdate
from sae import Sae
from store.dataset import Activations
from train import Config, main

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("store.dataset.HELD_OUT", dict(share=0.2, at_least=0, at_most=10**9))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20,000 vectors of width 16, each of about 3 of 24 directions, off centre, four times as large
    in the first step of four."""
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((24, 16)) / 4
    codes = np.where(rng.random((20_000, 24)) < 1 / 8, rng.gamma(3, 1, (20_000, 24)), 0)
    x = (codes @ atoms + 0.02 * rng.standard_normal((20_000, 16))).reshape(100, 4, 50, 16)
    x[:, 0] *= 4
    path = tmp_path_factory.mktemp("data") / "acts.npy"
    np.save(path, (x + 5).astype(np.float32))
    meta = {
        "format": 1,
        "hook_name": "mid_block",
        "timesteps": [900, 600, 300, 0],
        "shape": list(x.shape),
    }
    describe(path, **meta)
    return path


def config(data, out_dir, **options):
    defaults = dict(
        num_latents=[48],
        k=[3],
        effective_batch_size=200,
        lr=3e-3,
        lr_warmup_steps=5,
        run_name="run",
    )
    defaults |= dict(
        data=[str(data)],
        out_dir=str(out_dir),
        device="cpu",
        mixed_precision="no",
        dead_feature_threshold=2000,
    )
    return Config(**(defaults | options))


def weights(folder):
    return load_file(folder / "sae.safetensors")


def test_a_sweep_gives_what_each_alone_gives_from_one_reading(data, tmp_path, monkeypatch, capsys):
    read = Activations.read
    sizes = []  # the numbers of bytes that are read

    def read_and_note(*args):
        data = read(*args)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(Activations, "read", read_and_note)
    main(
        config(
            data,
            tmp_path / "sweep",
            k=[2, 4],
            num_latents=[32, 48],
            seeds=[0, 1],
            max_examples=4000,
        )
    )
    read_together = sum(sizes)
    sizes.clear()
    printed = capsys.readouterr().out
    base = tmp_path / "sweep" / "run"
    folders = sorted(path.name for path in base.iterdir() if path.is_dir())
    assert len(folders) == 8
    assert (base / "acts_sweep.png").exists()
    assert all(name in printed for name in folders)
    for name, options in (
        ("k2_M32", dict(k=[2], num_latents=[32])),
        ("k4_M48_seed1", dict(k=[4], seeds=[1])),
    ):
        main(config(data, tmp_path / name, max_examples=4000, **options))
        mine = weights(base / name)
        alone = weights(tmp_path / name / "run")
        assert all(torch.equal(mine[key], alone[key]) for key in alone)
        ours = read_json(base / name / "cfg.json")
        theirs = read_json(tmp_path / name / "run" / "cfg.json")
        for path_is_in in ("training", "data"):
            del ours[path_is_in]
            del theirs[path_is_in]
        assert ours == theirs
    assert read_together == sum(sizes) / 2


def test_a_sweep_that_is_interrupted_goes_on_to_the_same_bits(data, tmp_path, monkeypatch):
    options = dict(k=[2, 3], max_examples=4000, save_every=7)
    main(config(data, tmp_path / "whole", **options))
    saved = train.TrainingRun.save
    calls = []

    def save(job):
        calls.append(job)
        if len(calls) == 4:  # the first job has saved iteration 7, the second has not
            raise KeyboardInterrupt
        saved(job)

    monkeypatch.setattr(train.TrainingRun, "save", save)
    with pytest.raises(KeyboardInterrupt):
        main(config(data, tmp_path / "torn", **options))
    monkeypatch.undo()
    monkeypatch.setattr("store.dataset.HELD_OUT", dict(share=0.2, at_least=0, at_most=10**9))
    main(config(data, tmp_path / "torn", **options))
    for name in ("k2_M48", "k3_M48"):
        a, b = (tmp_path / kind / "run" / name for kind in ("whole", "torn"))
        assert (a / "sae.safetensors").read_bytes() == (b / "sae.safetensors").read_bytes()
        rows = [read_lines(folder / "metrics.jsonl") for folder in (a, b)]
        assert [[r["iteration"] for r in run_rows] for run_rows in rows] == [[10, 20]] * 2


VARIANTS = {
    "plain": {},
    "batch": dict(batch_topk=True),
    "sample": dict(sample_topk=True, k=[150]),  # of 50 tokens
    "multi": dict(multi_topk=True),
    "matryoshka": dict(matryoshka=[12, 24]),
    "batch matryoshka": dict(matryoshka=[12, 24], batch_topk=True),
    "unit norm": dict(input_unit_norm=True),
    "per step": dict(loss_weight="per_step"),
    "mean": dict(center="mean"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_trained_is_what_is_used(data, tmp_path, name):
    """The reloaded SAE selects what a step of training does of the same vectors: to the bit, or 1 %
    of L0 by a threshold."""
    main(config(data, tmp_path, num_epochs=3, **VARIANTS[name]))
    sae = Sae.load_from_disk(tmp_path / "run")
    assert sae.cfg["fvu"] < 0.35
    assert sae.cfg["dead"] < 0.3
    x = Activations([data]).read(Activations([data]).training_units)
    x = x.view(-1, 50, 16) if "sample" in name else x
    with torch.no_grad():
        codes = sae.encode(x)
    update = SparseUpdate(
        sae, 1.0, multi_topk="multi" in name, matryoshka=VARIANTS[name].get("matryoshka", ())
    )
    trained = update.forward(x)
    if "batch" in name:
        assert (codes.top_acts > 0).sum().item() == pytest.approx(
            (trained.top_acts > 0).sum().item(), rel=0.01
        )
        assert sae.cfg["l0"] == pytest.approx(3, rel=0.03)  # of other prompts
    else:

        def dense(acts, indices):
            return torch.zeros(16_000, 48).scatter(1, indices.flatten(0, -2), acts.flatten(0, -2))

        assert torch.equal(dense(*codes[:2]), dense(trained.top_acts, trained.top_indices))
        assert sae.cfg["l0"] == pytest.approx(3, rel=0.02)


def test_numbers_by_timestep_against_float64(data, tmp_path):
    main(config(data, tmp_path))
    sae = Sae.load_from_disk(tmp_path / "run")
    activations = Activations([data])
    held_out = torch.cat(list(activations.held_out())).view(-1, 4, 50, 16)
    by_timestep = sae.cfg["by_timestep"]
    assert [row["timestep"] for row in by_timestep] == [900, 600, 300, 0]
    for step, row in enumerate(by_timestep):
        x = held_out[:, step].reshape(-1, 16)
        top_acts, top_indices = sae.encode(x)
        x_hat, x = sae.decode(top_acts, top_indices).double(), x.double()
        assert row["vectors"] == len(x) == 1000
        assert row["fvu"] == pytest.approx(
            ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-5
        )
        assert row["cosine"] == pytest.approx(
            torch.cosine_similarity(x, x_hat).mean().item(), rel=1e-6
        )
        counts = torch.zeros(48).index_add(
            0, top_indices[top_acts > 0], torch.ones(int((top_acts > 0).sum()))
        )
        assert row["l0"] == pytest.approx(counts.sum().item() / 1000)
        assert row["dead"] == pytest.approx((counts == 0).float().mean().item())
        assert row["always_on"] == pytest.approx((counts >= 900).float().mean().item())
    whole = total(evaluate([sae], activations, 100)[0])
    assert sae.cfg["fvu"] == pytest.approx(whole.fvu)
    assert sae.cfg["explained_variance"] == pytest.approx(1 - whole.fvu)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out_fvu"] == sae.cfg["fvu"]
    assert last["held_out_dead"] == sae.cfg["dead"]


def test_a_weight_per_step_evens_the_steps_out(data, tmp_path):
    """The first step has 16 times the variance: unweighted it decides the dictionary, weighted the
    others count as much."""
    later = {}
    for loss_weight in ("none", "per_step"):
        main(config(data, tmp_path / loss_weight, loss_weight=loss_weight, k=[2], num_latents=[20]))
        rows = read_json(tmp_path / loss_weight / "run" / "cfg.json")["by_timestep"]
        later[loss_weight] = sum(row["fvu"] for row in rows[1:])
    assert later["per_step"] < later["none"]


@pytest.mark.parametrize("alias", ["batch_topk", "sample_topk"])
def test_older_names_of_activations(data, tmp_path, alias):
    """The same folder and the same bits."""
    options = dict(run_name=None, max_examples=1000, k=[150 if alias == "sample_topk" else 3])
    main(config(data, tmp_path / "a", **{alias: True}, **options))
    main(config(data, tmp_path / "b", activation=alias.replace("_", ""), **options))
    a, b = (
        next(folder.glob(f"acts_k*_M48_{alias}/sae.safetensors"))
        for folder in (tmp_path / "a", tmp_path / "b")
    )
    assert a.read_bytes() == b.read_bytes()
    training = read_json(b.with_name("cfg.json"))["training"]
    assert training == read_json(a.with_name("cfg.json"))["training"]
    assert training["activation"] == alias.replace("_", "")
    assert alias not in training


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(expansion_factor=[2, 4]), "--expansion_factor 2 4 and --num_latents 48 both say"),
        (dict(matryoshka=[49]), "--matryoshka 49"),
        (dict(matryoshka=[0]), "--matryoshka 0"),
        (dict(sample_topk=True, batch_topk=True), "expected one, got batchtopk and sampletopk"),
        (dict(activation="topk", batch_topk=True), "expected one, got batchtopk and topk"),
        (dict(multi_topk=True, batch_topk=True), "--multi_topk True"),
        (dict(k=[]), "--k"),
        (dict(seeds=[]), "--seeds"),
        (dict(k=[3, 49]), "--k 49"),
        (
            dict(activation="sampletopk", batch_topk=True),
            "expected one, got batchtopk and sampletopk",
        ),
        (
            dict(activation="batchtopk", sample_topk=True),
            "expected one, got batchtopk and sampletopk",
        ),
        (dict(multi_topk=True, activation="sampletopk"), "--multi_topk True"),
        (dict(activation="sampletopk", k=[48 * 50 + 1]), "--k 2401"),
        (dict(data_seed=-1), "--data_seed -1"),
        (dict(sample_topk=True, max_examples=5), "--max_examples 5: expected at least 50"),
    ],
)
def test_what_does_not_go_together_is_said_before_any_work(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main(config(data, tmp_path, **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, note",
    [
        (
            dict(max_examples=10**6),
            "note: --max_examples 1000000 has no effect: the run ends after",
        ),
        (
            dict(max_examples=200, num_epochs=2),
            "note: --num_epochs 2 has no effect: --max_examples",
        ),
        (dict(max_examples=200), None),
        (dict(num_epochs=2), None),
    ],
)
def test_an_option_that_another_one_leaves_unused_is_named(data, tmp_path, capsys, options, note):
    main(config(data, tmp_path, **options))
    printed = capsys.readouterr().out
    assert "training_prompts.txt" not in printed  # the file has no prompts
    if note is None:
        assert "has no effect" not in printed
    else:
        assert note in printed


@pytest.mark.parametrize("options", [dict(sample_topk=True), dict(loss_weight="per_step")])
def test_files_without_steps(tmp_path, options):
    """Options that need the steps of an image refuse a plain file by name."""
    np.save(tmp_path / "flat.npy", np.random.default_rng(0).standard_normal((1000, 8), np.float32))
    with pytest.raises(ValueError, match="flat.npy"):
        main(config(tmp_path / "flat.npy", tmp_path, **options))


def test_a_single_prompt_has_held_out_vectors_of_some_steps_only(tmp_path):
    x = np.random.default_rng(0).standard_normal((1, 50, 20, 8), np.float32)
    np.save(tmp_path / "one.npy", x)
    meta = {
        "format": 1,
        "hook_name": "mid_block",
        "timesteps": list(range(50, 0, -1)),
        "shape": list(x.shape),
    }
    describe(tmp_path / "one.npy", **meta)
    main(config(tmp_path / "one.npy", tmp_path))
    assert 0 < len(Sae.load_from_disk(tmp_path / "run").cfg["by_timestep"]) < 50


def test_prompts_without_text(tmp_path):
    """A prompt whose text has no token is passed over. Whole samples, of unequal lengths, are
    refused."""
    x = np.random.default_rng(0).standard_normal((20, 3, 10, 8), np.float32)
    np.save(tmp_path / "text.npy", x)
    np.save(tmp_path / "text.lengths.npy", np.array([10, 0, 7, 10] * 5))
    meta = {
        "format": 1,
        "hook_name": "b",
        "stream": "text",
        "timesteps": [3, 2, 1],
        "shape": list(x.shape),
    }
    describe(tmp_path / "text.npy", **meta)
    main(config(tmp_path / "text.npy", tmp_path))
    assert Sae.load_from_disk(tmp_path / "run").cfg["num_held_out"] > 0
    with pytest.raises(ValueError, match="whole samples"):
        main(config(tmp_path / "text.npy", tmp_path / "samples", sample_topk=True))


def test_weights_of_nan_are_never_saved(data, tmp_path, monkeypatch):
    update = train.SparseUpdate.step

    def step(*args, **options):
        norm = update(*args, **options)
        return norm * float("nan")

    monkeypatch.setattr(train.SparseUpdate, "step", step)
    with pytest.raises(ValueError, match="last good"):
        main(config(data, tmp_path))
    assert all(
        t.isfinite().all() for t in load_file(tmp_path / "run" / "checkpoint.safetensors").values()
    )


def test_ctrl_c_in_the_last_update_stops_before_the_held_out_numbers(data, tmp_path, monkeypatch):
    update = train.SparseUpdate.step
    calls = []

    def pressed(*args, **options):
        calls.append(args)
        if len(calls) == 3:  # of two updates each, by the first of two SAEs
            signal.raise_signal(signal.SIGINT)
        return update(*args, **options)

    cfg = config(data, tmp_path, k=[1, 2], max_examples=400)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.SparseUpdate, "step", pressed)
        main(cfg)
    assert len(calls) == 4
    assert sorted(path.name for path in tmp_path.glob("run/*/c*")) == ["checkpoint.safetensors"] * 2
    main(cfg)
    assert len(list(tmp_path.glob("run/*/cfg.json"))) == 2
