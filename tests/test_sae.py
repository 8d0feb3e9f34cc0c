"""The SAE against float64 references, its folder against eai-sparsify itself, each metric against
answers by hand."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from files import read_json

from analysis.data_stats import geometric_median
from analysis.metrics import Metrics
from kernels import count_active
from sae import Sae, newest_sae
from store.disk import save_tensors
from store.foreign_saes import save_saelens

ROOT = Path(__file__).parents[1]
X = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)) + 3


def make_sae(k=4, cfg=None):
    sae = Sae(12, 30, k, cfg, seed=2)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
        sae.b_dec.add_(3)
    return sae


def test_encode_and_decode_against_float64():
    sae = make_sae()
    parameters = (sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec)
    W_enc, b_enc, W_dec, b_dec = (p.detach().double() for p in parameters)
    pre_acts = torch.relu((X.double() - b_dec) @ W_enc.T + b_enc)
    threshold = pre_acts.topk(4).values[:, -1:]
    codes = pre_acts * (pre_acts >= threshold)  # (N, M)
    top_acts, top_indices = sae.encode(X)
    mine = torch.zeros(50, 30).scatter(1, top_indices, top_acts)
    torch.testing.assert_close(mine.double(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(X).double(), codes @ W_dec + b_dec, rtol=1e-5, atol=1e-5)
    assert top_acts.shape == top_indices.shape == (50, 4)


def test_starts_with_unit_decoder_rows_and_the_encoder_as_their_transpose():
    sae = Sae(12, 30, 4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30))
    assert torch.equal(sae.encoder.weight, sae.W_dec)
    assert not sae.encoder.bias.any()
    assert torch.equal(sae.W_dec, Sae(12, 30, 4).W_dec)
    assert not torch.equal(sae.W_dec, Sae(12, 30, 4, seed=1).W_dec)
    with pytest.raises(ValueError, match="k is 31"):
        Sae(12, 30, 31)


def test_making_one_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_sae()
    assert torch.equal(torch.rand(3), expected)


def test_half_precision_vectors_are_taken():
    assert make_sae()(X.half()).dtype == torch.float32


def test_folding_a_power_of_two_is_exact():
    sae = make_sae()
    raw = make_sae()
    raw.scale_inputs(2.0**-5)
    acts, indices = sae.encode(X * 2.0**-5)
    raw_acts, raw_indices = raw.encode(X)
    assert torch.equal(raw_acts, acts * 2.0**5)
    assert torch.equal(raw_indices, indices)
    assert torch.equal(raw(X), sae(X * 2.0**-5) * 2.0**5)
    assert torch.equal(raw.W_dec, sae.W_dec)


def test_save_and_load_give_the_same_bits(tmp_path):
    sae = make_sae()
    sae.cfg["fvu"] = 0.125
    sae.save_to_disk(tmp_path / "a")
    again = Sae.load_from_disk(tmp_path / "a")
    assert torch.equal(again(X), sae(X))
    assert again.cfg == sae.cfg
    assert again.k == 4
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "cfg.json",
        "sae.safetensors",
    ]


def test_a_file_is_swapped_in_and_a_full_disk_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": X}, {})
    os.link(path, tmp_path / "old")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="a.safetensors can't be written"):
            save_tensors(path, {"x": X + 1}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    save_tensors(path, {"x": X + 1}, {})
    # another file, not the old one written over
    assert path.read_bytes() != before == (tmp_path / "old").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "old"]


@pytest.fixture
def sparsify(monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # without it sparsify wants a GPU
    return pytest.importorskip("sparsify")


def test_sparsify_reads_ours(sparsify, tmp_path):
    sae = make_sae()
    sae.save_to_disk(tmp_path)
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path)
    torch.testing.assert_close(theirs(X).sae_out, sae(X), rtol=1e-6, atol=1e-6)
    assert torch.equal(
        theirs.encode(X).top_indices.sort().values, sae.encode(X).top_indices.sort().values
    )


@pytest.mark.parametrize("size", [{"expansion_factor": 3}, {"num_latents": 31}])
def test_we_read_sparsify_s(sparsify, tmp_path, size):
    theirs = sparsify.SparseCoder(12, sparsify.SparseCoderConfig(k=5, **size))
    torch.nn.init.normal_(theirs.b_dec)
    torch.nn.init.normal_(theirs.encoder.bias)
    theirs.save_to_disk(tmp_path)
    sae = Sae.load_from_disk(tmp_path)
    assert sae.k == 5
    assert sae.num_latents == theirs.num_latents
    torch.testing.assert_close(sae(X), theirs(X).sae_out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"transcode": True}, "transcode"),
        ({"skip_connection": True}, "skip_connection"),
        ({"batch_topk": True}, "batch_topk"),
        ({"sample_topk": True}, "sample_topk"),
        ({"input_unit_norm": True}, "input_unit_norm"),
        ({"activation": "groupmax"}, "groupmax"),
        ({"activation": "batchtopk"}, "threshold"),
        ({"activation": "topk_unitnorm", "batch_topk": True}, "batch_topk"),
        ({"k": None}, "k is None"),
        ({"k": 31}, "k is 31"),
        ({"d_in": 13}, "expected encoder.weight"),
    ],
)
def test_refuses_what_it_would_get_wrong(tmp_path, change, message):
    make_sae().save_to_disk(tmp_path)
    cfg = read_json(tmp_path / "cfg.json")
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(ValueError, match=message):
        Sae.load_from_disk(tmp_path)


def test_loads_what_only_changes_training(tmp_path):
    make_sae().save_to_disk(tmp_path)
    cfg = read_json(tmp_path / "cfg.json")
    (tmp_path / "cfg.json").write_text(
        json.dumps(cfg | {"multi_topk": True, "batch_topk": False, "input_unit_norm": False})
    )
    assert torch.equal(Sae.load_from_disk(tmp_path)(X), make_sae()(X))


@pytest.mark.parametrize("name", ["cfg.json", "sae.safetensors"])
def test_damaged_and_missing_files(tmp_path, name):
    make_sae().save_to_disk(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(ValueError, match="not a readable SAE folder"):
        Sae.load_from_disk(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(OSError):
        Sae.load_from_disk(tmp_path)


def test_the_newest_sae_is_found_also_one_folder_deeper(tmp_path):
    with pytest.raises(ValueError, match="no SAE in"):
        newest_sae(tmp_path)
    for age, run in enumerate(("a", "group/b", "c")):
        make_sae().save_to_disk(tmp_path / run)
        os.utime(tmp_path / run / "cfg.json", (1e9 - age, 1e9 - age))
    assert newest_sae(tmp_path) == tmp_path / "a"
    os.utime(tmp_path / "group/b/cfg.json", (1e9 + 1, 1e9 + 1))
    assert newest_sae(tmp_path) == tmp_path / "group/b"


HEAVY = (
    "options",
    "diffusers",
    "transformers",
    "matplotlib",
    "cli",
    "store.hub",
    "export",
    "hook",
    "torch.distributed.run",
)


@pytest.mark.slow  # a Python of its own imports torch
def test_loading_one_imports_little(tmp_path):
    """Neither the command line, nor diffusers, nor plots: an SAE of this project and one of
    another."""
    sae = make_sae()
    ours = tmp_path / "ours"
    theirs = tmp_path / "saelens"
    sae.save_to_disk(ours)
    theirs.mkdir()
    save_saelens(sae.cfg, sae.state_dict(), theirs)
    code = (
        f"import sys; from sae import Sae; Sae.load_from_disk({str(ours)!r}); Sae.load_from_disk({str(theirs)!r}); "
        f"print(sorted(sys.modules.keys() & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done


def test_fvu_by_hand_and_not_a_mean_of_ratios():
    # mean (1, 0); sum |x - mean|^2 = 100 + 100 + 0.01 + 0.01; sum |x - x_hat|^2 = 1 + 1 + 1 + 1
    x = torch.tensor([[11.0, 0], [-9, 0], [1, 0.1], [1, -0.1]])
    x_hat = x + torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    metrics = Metrics(3)
    metrics.update(x, x_hat, torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int64))
    assert metrics.fvu == pytest.approx(4 / 200.02, rel=1e-6)  # the mean of the ratios would be 50


def test_l0_and_dead_by_hand():
    top_acts = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.0, 0.0]])  # a zero is not an activation
    top_indices = torch.tensor([[0, 1, 4], [4, 2, 3]])
    metrics = Metrics(5)
    metrics.update(X[:2], X[:2], top_acts, top_indices)
    assert count_active(top_acts, top_indices, 5).tolist() == [1, 0, 0, 0, 2]
    assert (metrics.l0, metrics.dead, metrics.fvu) == (1.5, 0.6, 0.0)


def test_l0_counts_after_the_selection():
    sae = make_sae()
    with torch.no_grad():
        sae.encoder.bias.fill_(100)  # every pre_act is positive
    metrics = Metrics(30)
    metrics.update(X, sae(X), *sae.encode(X))
    assert metrics.l0 == 4


def test_chunks_give_what_the_whole_gives_far_from_zero():
    sae = make_sae()
    x = X.double() * 1e-3 + 1e4
    x_hat = x + 1e-5
    whole = Metrics(30)
    chunked = Metrics(30)
    whole.update(x, x_hat, *sae.encode(X))
    for rows in torch.arange(50).split(7):
        chunked.update(x[rows], x_hat[rows], *sae.encode(X[rows]))
    expected = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert (
        whole.fvu
        == pytest.approx(expected.item(), rel=1e-6)
        == pytest.approx(chunked.fvu, rel=1e-6)
    )
    assert (whole.l0, whole.dead, whole.n) == (chunked.l0, chunked.dead, chunked.n)


def test_geometric_median():
    """By hand on a line and on a triangle; an outlier hardly moves it."""
    line = torch.tensor([[0.0], [1], [2], [3], [1000]])
    assert geometric_median(line).item() == pytest.approx(2, abs=0.05)  # on a line it is the median
    triangle = torch.tensor([[0.0, 0], [4, 0], [2, 3**0.5 * 2]])  # equilateral: its centre
    torch.testing.assert_close(
        geometric_median(triangle), torch.tensor([2, 2 / 3**0.5]), atol=1e-3, rtol=0
    )
    cloud = torch.randn(999, 8, generator=torch.Generator().manual_seed(0))
    # the mean has norm 283
    assert geometric_median(torch.cat([cloud, torch.full((1, 8), 1e5)])).norm() < 0.2
    assert torch.equal(geometric_median(torch.ones(5, 3)), torch.ones(3))


VARIANTS = [dict(activation="batchtopk"), dict(activation="sampletopk"), dict(input_unit_norm=True)]


@pytest.mark.parametrize("cfg", VARIANTS, ids=str)
def test_variants_come_back_as_they_were(tmp_path, cfg):
    sae = make_sae(cfg=cfg)
    x = X.view(2, -1, X.shape[1]) if sae.activation == "sampletopk" else X
    if sae.activation == "batchtopk":
        sae.threshold.fill_(0.8)
    sae.save_to_disk(tmp_path)
    again = Sae.load_from_disk(tmp_path)
    assert again.cfg == sae.cfg
    assert again.activation == sae.activation
    assert torch.equal(again(x), sae(x))
    assert all(torch.equal(a, b) for a, b in zip(again.encode(x), sae.encode(x)))
    activation = read_json(tmp_path / "cfg.json")["activation"]
    assert activation not in ("topk", "groupmax")  # all that sparsify takes


def test_batchtopk_in_use_keeps_what_reaches_the_threshold():
    sae = make_sae(cfg=dict(activation="batchtopk"))
    sae.threshold.fill_(0.5)
    pre_acts = torch.relu((X - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias)
    top_acts, top_indices = sae.encode(X)
    assert top_acts.shape[1] == (pre_acts >= 0.5).sum(1).max() <= 8 * sae.k
    dense = torch.zeros_like(pre_acts).scatter(1, top_indices, top_acts)
    torch.testing.assert_close(dense, pre_acts * (pre_acts >= 0.5))
    sae.scale_inputs(4.0)  # a power of two: now the SAE of X / 4 that it was of X
    torch.testing.assert_close(sae(X / 4), sae.decode(top_acts / 4, top_indices))


def test_sampletopk_shares_k_out_over_the_tokens():
    sae = make_sae(cfg=dict(activation="sampletopk"))
    x = X.view(2, -1, X.shape[1])
    pre_acts = torch.relu((x - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias)
    top_acts, top_indices = sae.encode(x)
    assert (top_acts > 0).sum((1, 2)).tolist() == [sae.k, sae.k]
    dense = torch.zeros_like(pre_acts).scatter(2, top_indices, top_acts)
    least = pre_acts.flatten(1).topk(sae.k).values[:, -1]
    torch.testing.assert_close(dense, pre_acts * (pre_acts >= least[:, None, None]))
    with pytest.raises(ValueError, match="samples, tokens, d"):
        sae.encode(X)


def test_input_unit_norm_gives_back_what_it_took():
    sae = make_sae(cfg=dict(input_unit_norm=True))
    plain = make_sae()
    z = (X - X.mean(1, keepdim=True)) / X.std(1, correction=0, keepdim=True)
    codes = sae.encode(X)
    torch.testing.assert_close(codes.top_acts, plain.encode(z).top_acts)
    torch.testing.assert_close(sae(X), plain(z) * codes.std + codes.mean)
    torch.testing.assert_close(sae(1000 * X + 7), 1000 * sae(X) + 7, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "cfg", [*VARIANTS, dict(activation="topk"), dict(activation="jumprelu")], ids=str
)
def test_every_variant_takes_whole_samples(cfg):
    """(samples, tokens, d) gives what the same vectors give; where samples share their latents,
    what each gives alone."""
    sae = make_sae(cfg=cfg)
    if sae.variant.threshold is not None:
        sae.threshold.fill_(0.5)
    samples = X.view(5, 10, 12)
    codes = sae.encode(samples)
    x_hat = sae(samples)
    assert codes.top_acts.shape[:2] == (5, 10)
    assert x_hat.shape == samples.shape
    expected = (
        torch.cat([sae(sample[None]) for sample in samples])
        if sae.takes_samples
        else sae(X).view_as(samples)
    )
    torch.testing.assert_close(x_hat, expected)
    torch.testing.assert_close(sae.decode(*codes), expected)


def test_what_can_t_be_is_refused():
    with pytest.raises(ValueError, match="activation 'groupmax': expected topk, batchtopk"):
        make_sae(cfg=dict(activation="groupmax"))
    with pytest.raises(ValueError, match="jumprelu SAE can't be trained"):
        make_sae(cfg=dict(activation="jumprelu")).keep(torch.ones(2, 3), 1)
    assert make_sae(k=40, cfg=dict(activation="sampletopk")).k == 40  # of a sample's
    with pytest.raises(ValueError, match="k is 40"):
        make_sae(k=40)
