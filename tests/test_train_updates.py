"""What an update does: against dense float64 autograd and torch's Adam, in parts, and for dead latents."""

import pytest
import torch
from safetensors.torch import load_file
from training import metrics_rows, train_config

import train
from analysis.data_stats import measure
from sae import Sae
from store.dataset import Activations
from train import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tenth_held_out")]


def dense_reference(sae, x, dead, alpha, variance, residual):
    """The loss by plain dense autograd in float64, its gradients, and the codes (N, M) with their
    zeros."""
    W_enc, b_enc, W_dec, b_dec = params = [
        p.detach().double().requires_grad_()
        for p in (sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec)
    ]

    def top(a, k):
        return a * (a >= a.topk(k).values[:, -1:]) if k < a.shape[1] else a

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
def test_updates_against_float64_autograd_and_torch_adam(
    vectors_file, tmp_path, normalize, monkeypatch
):
    """Six updates of `train`: the gradient, what is projected and clipped, the learning rate, Adam,
    who is dead."""
    monkeypatch.setattr(train, "LIST_DEAD_EVERY", 1)
    cfg = train_config(
        vectors_file,
        tmp_path,
        max_examples=600,
        lr=0.01,
        lr_warmup_steps=1,
        auxk_alpha=20.0,
        dead_feature_threshold=200,
    )
    cfg.normalize_decoder = normalize
    main(cfg)
    activations = Activations([vectors_file])
    stats = measure(activations, "median")
    scale = stats.scale
    variance = stats.variance
    sae = Sae(16, 48, 3)
    sae.b_dec.data.copy_(stats.center)
    sae, start = sae.double(), sae.W_dec.detach().clone()
    params = [sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec]
    optimizer = torch.optim.Adam(params, betas=(0.9, 0.999), eps=6.25e-10)
    silent = torch.zeros(48)
    residual = 1.0
    norms = []
    dead_at_some_time = 0
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
    assert max(norms) > 1.2
    assert dead_at_some_time
    mine = load_file(tmp_path / "run" / "sae.safetensors")
    mine["encoder.bias"] *= scale
    mine["b_dec"] *= scale
    for p, name in zip(params, ("encoder.weight", "encoder.bias", "W_dec", "b_dec")):
        assert (mine[name] - p).norm() <= 1e-4 * (sae.W_dec - start).norm(), name


def test_parts_add_up_to_the_whole_update(vectors_file, tmp_path):
    one = dict(max_examples=1000, auxk_alpha=1.0, dead_feature_threshold=200)
    main(train_config(vectors_file, tmp_path / "a", **one))
    main(train_config(vectors_file, tmp_path / "b", grad_acc_steps=6, **one))
    a, b = (load_file(tmp_path / name / "run" / "sae.safetensors") for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)


def test_more_parts_than_vectors_are_as_many(vectors_file, tmp_path):
    one = dict(max_examples=110, effective_batch_size=10)
    main(train_config(vectors_file, tmp_path / "a", grad_acc_steps=10, **one))
    main(train_config(vectors_file, tmp_path / "b", grad_acc_steps=2**62, **one))
    a, b = ((tmp_path / name / "run" / "sae.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_bf16_product_changes_little(vectors_file, tmp_path):
    saes = {}
    for precision in ("no", "bf16", "fp16", "auto"):
        main(train_config(vectors_file, tmp_path / precision, mixed_precision=precision))
        saes[precision] = Sae.load_from_disk(tmp_path / precision / "run")
        assert saes[precision].cfg["fvu"] == pytest.approx(saes["no"].cfg["fvu"], rel=0.2)

    def same(a, b):
        return torch.equal(saes[a].W_dec, saes[b].W_dec)

    fastest = train.product_dtype("auto", torch.device("cpu"))  # what this CPU is fast at
    assert same("auto", {torch.float32: "no", torch.bfloat16: "bf16"}[fastest])
    assert not same("bf16", "no")
    assert not same("fp16", "no")
    assert not same("fp16", "bf16")


@pytest.mark.parametrize("options", [{}, {"effective_batch_size": 50}, {"grad_acc_steps": 20}])
def test_dead_feature_threshold_counts_vectors(vectors_file, tmp_path, options):
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
    main(train_config(vectors_file, tmp_path, **options))
    assert min(row["vectors"] for row in metrics_rows(tmp_path / "run") if row["dead"] > 0) == 600


def test_auxk_revives_latents_that_started_badly(vectors_file, tmp_path, monkeypatch):
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
            train_config(
                vectors_file,
                tmp_path / str(alpha),
                auxk_alpha=alpha,
                dead_feature_threshold=1000,
                num_epochs=3,
            )
        )
        dead[alpha] = Sae.load_from_disk(tmp_path / str(alpha) / "run").cfg["dead"]
    assert dead[0] > 0.6
    assert dead[1 / 32] < dead[0] / 2
