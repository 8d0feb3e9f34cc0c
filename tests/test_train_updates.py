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

NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def keep_largest(a, k):
    """All but the k largest numbers of each row set to 0."""
    if k >= a.shape[1]:
        return a
    return a * (a >= a.topk(k).values[:, -1:])


class DenseTraining:
    """What train.py does with an SAE, by plain dense autograd and torch's Adam in float64."""

    def __init__(self, sae, variance, normalize, alpha, dead_after):
        self.k = sae.k
        self.params = [sae.get_parameter(name).detach().double().requires_grad_() for name in NAMES]
        self.optimizer = torch.optim.Adam(self.params, betas=(0.9, 0.999), eps=6.25e-10)
        self.variance = variance
        self.normalize = normalize
        self.alpha = alpha
        self.dead_after = dead_after  # vectors
        self.silent_for = torch.zeros(sae.num_latents)
        self.dead = None
        self.residual = 1.0

    def loss(self, x):
        """The loss of a batch (N, d), the codes (N, M) with their zeros, and the error (N, d)."""
        W_enc, b_enc, W_dec, b_dec = self.params
        pre_acts = torch.relu((x - b_dec) @ W_enc.T + b_enc)
        codes = keep_largest(pre_acts, self.k)
        e = x - (codes @ W_dec + b_dec)
        loss = e.square().sum() / self.variance
        if len(self.dead):
            e_hat = keep_largest(pre_acts[:, self.dead], x.shape[1] // 2) @ W_dec[self.dead]
            auxk = (e.detach() - e_hat).square().sum() / self.residual
            loss = loss + self.alpha * auxk
        return loss / len(x), codes.detach(), e.detach()

    def update(self, x, lr):
        """Update the parameters; returns the norm of the gradient before it is clipped to 1."""
        self.dead = (self.silent_for >= self.dead_after).nonzero().flatten()
        self.optimizer.zero_grad()
        loss, codes, e = self.loss(x.double())
        loss.backward()

        _, _, W_dec, _ = self.params
        rows = W_dec.detach()
        if self.normalize:  # without the part of the gradient that would lengthen a row
            W_dec.grad -= (W_dec.grad * rows).sum(1, keepdim=True) * rows
        norm = sum(param.grad.square().sum() for param in self.params).sqrt().item()
        for param in self.params:
            param.grad /= max(1, norm)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        if self.normalize:
            rows /= rows.norm(dim=1, keepdim=True)

        self.silent_for = torch.where((codes > 0).any(0), 0, self.silent_for + len(x))
        self.residual = e.square().sum() / len(x)
        return norm


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
    sae = Sae(16, 48, 3)
    sae.b_dec.data.copy_(stats.center)
    reference = DenseTraining(sae, stats.variance, normalize, alpha=20.0, dead_after=200)
    norms = []
    num_dead = []
    rates = (0.005, 0.01, 0.01, 0.01, 0.01, 0.01 * 5 / 6)  # warmup, the peak, the decay
    for (batch, _), lr in zip(activations.batches(100, 600), rates):
        norms.append(reference.update(batch * stats.scale, lr))
        num_dead.append(len(reference.dead))
    assert max(norms) > 1.2
    assert max(num_dead) > 0

    trained = load_file(tmp_path / "run" / "sae.safetensors")
    trained["encoder.bias"] *= stats.scale
    trained["b_dec"] *= stats.scale
    moved = (reference.params[NAMES.index("W_dec")] - sae.W_dec.double()).norm()
    for name, expected in zip(NAMES, reference.params):
        assert (trained[name] - expected).norm() <= 1e-4 * moved, name


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
