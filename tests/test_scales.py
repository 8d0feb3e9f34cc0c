"""Tiny and huge numbers: no result depends on the units of the activations."""

import numpy as np
import pytest
import torch
from files import read_json

import evaluate
import train
from analysis.concepts import contrast, saeuron, scaled, toward
from analysis.feature_edits import Typical
from analysis.metrics import Metrics, usual_scale
from sae import Sae
from store import hub

SCALES = [2.0**-66, 2.0**-40, 2.0**40]  # the first: values of 1e-20


@pytest.mark.parametrize("scale", [*SCALES, 2.0**100])
def test_metrics_do_not_depend_on_the_scale(scale):
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    x_hat = x + 0.3 * torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    x[7] = 0  # whose cosine is 0
    results = []
    for factor in (1.0, scale):
        metrics = Metrics(4)
        metrics.update(
            factor * x, factor * x_hat, torch.ones(50, 1), torch.zeros(50, 1, dtype=torch.int64)
        )
        results.append((metrics.fvu, metrics.cosine))
    assert results[0] == results[1]
    assert 0.9 < results[0][1] < 1


@pytest.mark.parametrize("scale", [2.0**-66, 2.0**-80, 2.0**66])
def test_standardized_vectors_do_not_depend_on_the_scale(scale):
    sae = Sae(12, 30, 4, {"input_unit_norm": True})
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) + 1
    x[7], x[8] = 0, 3  # which have no variance
    unit, _, std = sae.standardize(x)
    plain = (x - x.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    assert torch.equal(std, plain)  # of usual numbers the bits are those of the formula
    torch.testing.assert_close(sae.standardize(scale * x)[0], unit, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae(scale * x), scale * sae(x), rtol=1e-5, atol=scale * 1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_scores_of_features_do_not_depend_on_the_scale(scale):
    scores = torch.rand(20, 3, 30, generator=torch.Generator().manual_seed(0)).relu()
    scores[:, :, 5] = 0
    has = torch.arange(20) % 3 == 0
    torch.testing.assert_close(
        contrast(scale * scores, has), contrast(scores, has), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        saeuron(scale * scores, has), saeuron(scores, has), rtol=1e-4, atol=1e-6
    )
    sae = Sae(12, 30, 4)
    torch.testing.assert_close(
        toward(sae, scale * scores, has, ~has), toward(sae, scores, has, ~has)
    )


def test_scores_of_the_usual_size_are_not_copied():
    scores = torch.tensor([[-3.0, 2.0], [0.0, 1.0]])
    assert scaled(scores) is scores
    assert usual_scale(2.0**40 * scores) == 2.0**-41
    assert usual_scale(-scores * 2.0**40) == 2.0**-41
    assert torch.equal(scaled(2.0**40 * scores), scores / 2)
    assert (
        usual_scale(torch.tensor([torch.nan, 1e20]))
        == usual_scale(torch.tensor([torch.inf, 1e-20]))
        == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"activation": "batchtopk"}, {"input_unit_norm": True}], ids=str
)
def test_an_sae_of_tiny_activations(tmp_path, options):
    """It is as good as that of the same vectors in other units; it was not trained with the very
    same bits."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((24, 2, 32, 12)) * rng.uniform(0.2, 3, 12) + 1).astype(np.float32)
    results = []
    for name, scale in (("usual", 1), ("tiny", 2.0**-66)):
        np.save(tmp_path / f"{name}.npy", x * np.float32(scale))
        size = dict(
            num_latents=[30],
            k=[4],
            num_epochs=3,
            effective_batch_size=64,
            device="cpu",
            out_dir=str(tmp_path / "saes"),
        )
        (folder,) = train.main(
            train.Config(data=[str(tmp_path / f"{name}.npy")], run_name=name, **size, **options)
        )
        evaluate.main(
            evaluate.Config(sae=str(folder), out_dir=str(tmp_path / "evaluations"), device="cpu")
        )
        report = read_json(tmp_path / "evaluations" / name / "evaluate.json")
        typical = Typical([str(tmp_path / f"{name}.npy")])
        norm, distance = typical(torch.from_numpy(x[:4, 0] * np.float32(scale)), 0.0)
        results.append(
            [report["fvu"], report["cosine"], report["l0"], *norm.tolist(), *distance.tolist()]
        )
        cfg = read_json(folder / "cfg.json")
        assert cfg["num_training"] == 3 * cfg["num_training_in_data"]
        assert cfg["num_training_in_data"] < 24 * 2 * 32
        card = hub.card(folder, "me/sae", "sae")
        assert f"| training vectors in the data | {cfg['num_training_in_data']} |" in card
        assert f"| vectors seen in training, repeats counted | {cfg['num_training']} |" in card
    assert results[1] == pytest.approx(results[0], rel=0.05)
    assert results[0][1] > 0.85
