"""The diagnosis: its numbers against float64 NumPy, its forecast of dead latents against real
training, its warnings."""

import json
import sys

import numpy as np
import pytest
import torch
from described import describe
from files import read_json
from PIL import Image

import cli
import diagnose
import train
from analysis import data_stats
from analysis.data_stats import geometric_median
from sae import Sae
from store.dataset import Activations

pytestmark = pytest.mark.slow


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("store.dataset.HELD_OUT", dict(share=0.1, at_least=0, at_most=10**9))


def save(path, x, **meta):
    """A file as collect.py describes it: (prompts, steps, tokens, d)."""
    np.save(path, x)
    meta = {
        "hook_name": path.stem,
        "stream": "image",
        "timesteps": list(range(900, 900 - 100 * x.shape[1], -100)),
        **meta,
    }
    describe(path, **meta)
    return path


def healthy(shape=(40, 3, 50, 8)):
    """Vectors without a fault, (prompts, steps, tokens, d)."""
    return np.random.default_rng(0).standard_normal(shape, np.float32) + 0.3


def measured(path, k=3, num_latents=24, **options):
    return data_stats.report(Activations([path]), k, num_latents, **options)


def config(path, out_dir, **options):
    defaults = dict(
        data=[str(path)], out_dir=str(out_dir), num_latents=24, k=3, trial_updates=5, device="cpu"
    )
    return diagnose.Config(**(defaults | options))


def test_statistics_against_numpy_in_float64():
    """Odd sizes, several chunks, a mean so large that float32 sums would lose the rest."""
    rng = np.random.default_rng(1)
    x = (
        rng.standard_normal((4999, 7)) * [1, 2, 3, 4, 5, 6, 0.1] + [3000, 0, 0, -7, 0, 0, 0]
    ).astype(np.float32)
    step = rng.integers(0, 5, 4999)
    mean, covariance = data_stats.moments(torch.from_numpy(x))
    wide = x.astype(np.float64)
    expected = np.cov(wide.T, bias=True)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, expected, rtol=1e-9, atol=1e-9)
    gamma = np.linalg.norm(wide.mean(0)) / np.linalg.norm(wide.std(0))
    assert data_stats.gamma(mean, covariance.diagonal()) == pytest.approx(gamma, rel=1e-10)
    assert gamma > 300
    values = np.linalg.eigvalsh(expected)
    rank = data_stats.effective_rank(torch.linalg.eigvalsh(covariance))
    assert rank == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-9)
    assert 2 < rank < 7
    rms = data_stats.rms_by_step(torch.from_numpy(x), torch.from_numpy(step), 6)
    np.testing.assert_allclose(
        rms[:5], [np.sqrt((wide[step == s] ** 2).mean()) for s in range(5)], rtol=1e-12
    )
    assert rms[5].isnan()


def test_effective_rank_by_hand():
    assert data_stats.effective_rank(torch.tensor([5.0, 5, 5, 0])) == pytest.approx(3)
    assert data_stats.effective_rank(torch.tensor([3.0, 1])) == pytest.approx(16 / 10)


def test_outliers_made_by_hand_are_found():
    x = np.random.default_rng(0).standard_normal((3000, 40)).astype(np.float32)
    x[:, 7] += 30  # by its mean
    x[:, 31] *= 50  # by its variance
    x[:, 12] *= 5  # large, but no outlier
    mean, covariance = data_stats.moments(torch.from_numpy(x))
    dims, fraction = data_stats.outliers(mean, covariance.diagonal())
    power = (x.astype(np.float64) ** 2).mean(0)
    assert dims == [31, 7]
    assert fraction == pytest.approx((power[7] + power[31]) / power.sum(), rel=1e-9)
    assert data_stats.share_of_largest(mean.square())[0] == 7
    assert data_stats.share_of_largest(covariance.diagonal())[0] == 31


def test_report_of_a_file_with_timesteps(tmp_path, small):
    x = healthy() * np.array([4, 2, 1], np.float32)[:, None, None]
    path = save(tmp_path / "mid.npy", x)
    activations = Activations([path])
    report = measured(path)
    held_out = {int(first) // 150 for _, first, _ in activations.held_out_units}
    training = np.delete(x, list(held_out), axis=0).astype(np.float64)  # all 5400 are sampled
    mean = training.mean((0, 1, 2))
    assert report["num_sampled"] == training[..., 0].size == 5400
    assert report["timesteps"] == [
        900,
        800,
        700,
    ]
    np.testing.assert_allclose(
        report["rms_by_step"], np.sqrt((training**2).mean((0, 2, 3))), rtol=1e-6
    )
    np.testing.assert_allclose(
        report["spread_by_step"], np.sqrt(((training - mean) ** 2).mean((0, 2, 3))), rtol=1e-6
    )
    assert report["largest"] == np.abs(training).max()
    assert report["rms"] == pytest.approx(np.sqrt((training**2).mean()))
    assert json.loads(
        json.dumps(
            {name: value for name, value in report.items() if name != "fires"}, allow_nan=False
        )
    )


@pytest.mark.parametrize("center", ["median", "mean", "none"])
def test_dead_at_the_start_is_counted_as_the_definition_says(tmp_path, small, center):
    path = tmp_path / "a.npy"
    np.save(path, healthy((40, 50, 8)) + np.float32(6) * np.eye(8, dtype=np.float32)[2])
    report = measured(path, 2, 40, center=center)
    x = data_stats.draw(Activations([path]))[0]
    assert list(report["dead"]) == [center, "none" if center != "none" else "median"]
    x = x.double().numpy()
    middle = {"mean": x.mean(0), "none": 0}.get(
        center, geometric_median(torch.from_numpy(x)).numpy()
    )
    W = data_stats.start(torch.from_numpy(x).float(), 40, 2, center).W_dec.detach().double().numpy()
    pre_acts = np.maximum((x[: report["num_counted"]] - middle) @ W.T, 0)
    kept = np.argsort(-pre_acts, 1)[:, :2]
    active = {j for row, chosen in zip(pre_acts, kept) for j in chosen if row[j] > 0}
    assert report["num_counted"] == 200
    assert report["dead"][center]["start"] == 1 - len(active) / 40
    assert report["dead"]["none"]["start"] > 0.3
    assert center == "none" or report["dead"][center]["start"] < 0.2


def test_the_start_the_rate_and_the_defaults_are_train_py_s(tmp_path, small):
    np.save(tmp_path / "a.npy", 10 * healthy((40, 50, 8)) + 3)
    activations = Activations([tmp_path / "a.npy"])
    cfg = train.Config(data_seed=5)
    stats = data_stats.measure(activations, cfg.center, seed=5)
    theirs = Sae(8, 24, 3, seed=5)
    theirs.b_dec.data.copy_(stats.center)
    x = activations.sample(data_stats.TRAINING_SAMPLE, 5)
    mine = data_stats.start(x, 24, 3, "median", 5)
    assert data_stats.power_of_two(data_stats.rms_about(x, mine.b_dec.data)) == stats.scale != 1
    mine.scale_inputs(1 / stats.scale)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], tensor)
    assert train.learning_rate(7, 90, 24, diagnose.DEFAULTS) == train.learning_rate(7, 90, 24, cfg)
    mine = diagnose.Config()
    theirs = train.with_activation(train.Config())
    (choice,) = train.plan_folders(theirs, activations, True)[1].values()
    assert diagnose.num_latents_of(mine, activations) == choice.num_latents == 16 * 8
    for name in ("data", "num_epochs", "center", "device"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert ([mine.k], [mine.seed]) == (theirs.k, theirs.seeds)
    assert theirs.effective_batch_size == diagnose.BATCH_SIZE
    assert theirs.dead_feature_threshold == 100_000
    assert (diagnose.AUXK_FROM - 1) * 1024 < 100_000 <= diagnose.AUXK_FROM * 1024


def test_the_trial_leaves_an_sae_of_the_vectors_as_they_are(small):
    """And with a learning rate of nothing, the one it was given; it stops at the time limit."""
    x = torch.from_numpy(100 * healthy((700, 8)) + 40)
    sae, start = (data_stats.start(x, 24, 3) for _ in range(2))
    with diagnose.tqdm(disable=True) as bar, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda *_: 0.0)
        assert len(diagnose.trial(sae, x, 9, config("", "", trial_updates=4), None, bar)) == 4
        for name, tensor in start.state_dict().items():
            torch.testing.assert_close(sae.state_dict()[name], tensor)
    with diagnose.tqdm(disable=True) as bar:
        assert len(diagnose.trial(sae, x, 9, config("", "", trial_seconds=1e-9), None, bar)) == 1
        diagnose.trial(sae, x, 200, config("", "", trial_updates=200), None, bar)

    def error(sae):
        return (sae(x) - x).square().sum().item()

    assert error(sae) < 0.8 * error(start)


def sparse_codes(path, gamma, n=200_000, d=32, atoms=128):
    """n vectors, each of about 6 of 128 directions, round a mean that 4 dimensions hold: |mean| /
    |std| is gamma."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((atoms, d))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    x = np.concatenate([
        np.where(rng.random((n // 10, atoms)) < 6 / atoms, rng.gamma(3, 1, (n // 10, atoms)), 0) @ rows for _ in range(10)
    ])  # fmt: skip
    x += 0.05 * rng.standard_normal(x.shape) - x.mean(0)
    x[:, :4] += gamma * np.linalg.norm(x.std(0)) / 2
    np.save(path, x.astype(np.float32).reshape(100, -1, d))
    return path


def trained(path, out_dir, center):
    """What train.py's defaults end with: the share of 256 latents, 8 active, that is silent on the
    held-out vectors."""
    options = dict(center=center, run_name=center, k=[8], num_latents=[256], device="cpu")
    train.main(train.Config(data=[str(path)], out_dir=str(out_dir), **options))
    return read_json(out_dir / center / "cfg.json")["dead"]


@pytest.mark.parametrize("gamma", [20, 3])
def test_dead_latents_are_foreseen(tmp_path, gamma):
    """gamma 20: few die where b_dec starts at the median, most where it starts at 0. gamma 3: about
    half do."""
    path = sparse_codes(tmp_path / "a.npy", gamma)
    cfg = config(path, tmp_path / "d", num_latents=256, k=8, trial_updates=300)
    diagnose.main(cfg)
    report = read_json(tmp_path / "d" / "a.json")
    assert report["gamma"] == pytest.approx(gamma, rel=0.02)
    assert sorted(report["outlier_dims"]) == ([0, 1, 2, 3] if gamma > 10 else [])
    ends = {center: trained(path, tmp_path / "saes", center) for center in ("median", "none")}
    for center, end in ends.items():
        assert abs(report["dead"][center]["trained"] - end) <= 0.2, (center, report["dead"], ends)
    assert ends["median"] <= 0.2
    if gamma == 20:
        assert ends["none"] >= 0.6
    else:
        assert abs(report["dead"]["none"]["trained"] - ends["none"]) <= 0.1
        assert 0.2 < ends["none"] < 0.8


def test_files_and_screen(tmp_path, small, capsys):
    """A .json and a .png for each file, and the same numbers on the screen."""
    path = save(tmp_path / "mid_block.attn.npy", healthy().astype(np.float16))
    (written,) = diagnose.main(config(path, tmp_path / "d"))
    out = capsys.readouterr().out
    assert written == tmp_path / "d" / "mid_block.attn.json"
    report = read_json(written)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "mid_block.attn.json",
        "mid_block.attn.png",
    ]
    assert min(Image.open(tmp_path / "d" / "mid_block.attn.png").size) > 800
    for text in (
        "(40, 3, 50, 8) float16: 6,000 vectors of 40 prompts, of 3 steps",
        f"gamma {report['gamma']:.2f}",
        "6 updates",
    ):
        assert text in out
    assert len(out.splitlines()) < 20
    assert report["updates"] == 6
    assert report["dead"]["median"]["updates"] == 5
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()}
    diagnose.main(config(path, tmp_path / "d", k=2))  # of the same data: replaced
    assert all(p.stat().st_mtime_ns > t for p, t in before.items())


def test_plain_files_text_and_bfloat16(tmp_path, small, capsys):
    (tmp_path / "plain").mkdir()
    np.save(tmp_path / "plain" / "a.npy", healthy((900, 8)).astype(np.float64))
    diagnose.main(config(tmp_path / "plain" / "a.npy", tmp_path / "d"))
    assert "steps" not in capsys.readouterr().out
    assert (tmp_path / "d" / "a.png").exists()

    x = healthy((40, 3, 10, 8))
    x[:, :, 4:] = 1e6  # padding, which is nobody's
    np.save(tmp_path / "t.text.lengths.npy", np.full(40, 4))
    report = measured(save(tmp_path / "t.text.npy", x, stream="text"))
    assert report["largest"] < 10
    assert report["num_vectors"] == 480
    steps = x[:, :, :4]
    training = np.delete(
        steps,
        [int(r) // 30 for _, r, _ in Activations([tmp_path / "t.text.npy"]).held_out_units],
        axis=0,
    )
    np.testing.assert_allclose(
        report["rms_by_step"], np.sqrt((training.astype(float) ** 2).mean((0, 2, 3))), rtol=1e-6
    )

    bits = torch.from_numpy(healthy()).bfloat16().view(torch.uint16).numpy()
    report = measured(save(tmp_path / "b.npy", bits, dtype="bfloat16"))
    assert report["dtype"] == "bfloat16"
    assert report["rms"] == pytest.approx(np.sqrt((healthy() ** 2).mean()), rel=0.02)


def test_warnings_only_where_something_is_wrong(tmp_path, small):
    def warned(change=lambda x: x, updates=5000, **options):
        with np.errstate(over="ignore"):
            path = save(tmp_path / "a.npy", change(healthy((40, 3, 60, 8))))
        return " | ".join(data_stats.warnings(measured(path, **options) | {"updates": updates}))

    def put(*where, value):
        def change(x):
            x[where] = value
            return x

        return change

    def shift(x):
        return x + np.float32(20) * np.eye(8, dtype=np.float32)[1]

    assert warned() == ""
    assert warned(shift) == ""
    assert "gamma is" in warned(shift, center="none")
    assert "with --center median, 0%" in warned(shift, center="none")
    assert "hold NaN or inf" in warned(put(slice(None), 0, 0, 3, value=np.nan))
    assert "--store_dtype" in warned(lambda x: (x * 2e4).astype(np.float16))
    assert warned(lambda x: x * 2e4) == ""
    assert "1 of 8 dimensions never change" in warned(put(..., 2, value=5))
    assert "copies of another" in warned(put(slice(None), slice(None), slice(9), value=1))
    assert "--loss_weight per_step" in warned(
        lambda x: x * np.array([9, 3, 1], np.float32)[:, None, None]
    )
    assert "training vectors a latent are few" in warned(num_latents=300)
    assert warned(updates=1000) == ""
    assert "2 times as many --num_epochs" in warned(updates=999)
    narrow = np.float32(1e-3) + np.eye(8, dtype=np.float32)[0]
    assert "of the latents start out dead" in warned(lambda x: x * narrow, num_latents=54, k=1)


def test_vectors_that_are_not_finite_are_left_out_and_said(tmp_path, small, capsys):
    x = healthy()
    x[:, 1, 7] = np.inf
    diagnose.main(config(save(tmp_path / "a.npy", x), tmp_path / "d"))
    out = capsys.readouterr().out
    assert "warning   36 of 5,400 sampled vectors hold NaN or inf" in out
    assert read_json(tmp_path / "d" / "a.json")["num_sampled"] == 5364


def test_mistakes_end_in_one_line_and_overwrite_nothing(tmp_path, small, capsys, monkeypatch):
    def say(path, out_dir="d", **options):
        monkeypatch.setattr(sys, "argv", ["diagnose.py"])
        monkeypatch.setattr(sys.modules["__main__"], "__doc__", "", raising=False)
        with pytest.raises(SystemExit) as caught:
            cli.run_script(
                lambda _: diagnose.main(config(path, tmp_path / out_dir, **options)),
                diagnose.Config,
            )
        lines = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2
        assert lines[-1].startswith("diagnose.py: error: ")
        return lines[-1]

    path = save(tmp_path / "a.npy", healthy())
    (tmp_path / "bad.npy").write_bytes(path.read_bytes()[:-100])
    np.save(tmp_path / "same.npy", np.full((30, 5, 8), 1.1, np.float32))
    np.save(tmp_path / "huge.npy", healthy((30, 5, 8)) * np.float32(1e30))
    np.save(tmp_path / "nan.npy", np.full((30, 5, 8), np.nan, np.float32))
    assert "no such file" in say(tmp_path / "missing.npy")
    assert "bad.npy" in say(tmp_path / "bad.npy")
    np.save(tmp_path / "zero.npy", np.zeros((30, 5, 8), np.float32))
    for name, text in (
        ("same", "equal or too large"),
        ("zero", "equal or too large"),
        ("huge", "equal or too large"),
        ("nan", "NaN or inf"),
    ):
        line = say(tmp_path / f"{name}.npy")
        assert f"{name}.npy: " in line
        assert text in line
    for options in (
        dict(k=25),
        dict(k=0),
        dict(trial_updates=0),
        dict(trial_seconds=float("nan")),
        dict(num_epochs=0),
    ):
        (name, value) = next(iter(options.items()))
        assert f"--{name} {value}: expected" in say(path, **options)
    both = "--expansion_factor 2 and --num_latents 24 both say how many latents there are"
    assert both in say(path, expansion_factor=2)
    (tmp_path / "file").write_text("")
    assert "can't be made" in say(path, "file/below")
    monkeypatch.chdir(tmp_path)
    assert "run collect.py first" in say(path, data=[])

    for name, text in (("a.json", '{"mine": 1}'), ("a.png", "mine")):
        (tmp_path / name[2:]).mkdir()
        (tmp_path / name[2:] / name).write_text(text)
        assert "choose another --out_dir" in say(path, name[2:])
        assert [(p.name, p.read_text()) for p in (tmp_path / name[2:]).iterdir()] == [(name, text)]
    diagnose.main(config(path, tmp_path / "d"))
    (tmp_path / "b").mkdir()
    assert "choose another --out_dir" in say(save(tmp_path / "b" / "a.npy", healthy()))
    meta = dict(hook_name="other")  # two data sets, one name
    assert "choose another --out_dir" in say(
        "", "e", data=[str(path), str(save(tmp_path / "b" / "a.npy", healthy(), **meta))]
    )
