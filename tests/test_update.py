"""The training step against plain dense autograd in float64 and torch.optim.Adam, and AuxK by
hand."""

import contextlib
import itertools
import sys
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.update as update_module
from distributed import Group
from kernels import Gradient, encode, sort_pairs, squared_norm
from kernels.topk import torch_topk
from kernels.update import SparseUpdate
from sae import Sae

NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
EPS = 6.25e-10


def make(d=24, M=96, k=5, seed=0, cfg=None, **options):
    g = torch.Generator().manual_seed(seed)
    sae = Sae(d, M, k, cfg, seed=seed)
    sae.b_dec.data.copy_(torch.randn(d, generator=g))
    sae.encoder.weight.data.add_(0.1 * torch.randn(M, d, generator=g))
    sae.encoder.bias.data.copy_(0.1 * torch.randn(M, generator=g))
    return sae, SparseUpdate(sae, variance=7.0, **options)


def top(a, k):
    """All but the k largest numbers of each row set to 0."""
    return a * (a >= a.topk(k).values[:, -1:]) if k < a.shape[1] else a


def select(pre_acts, k, activation):
    """What the variant keeps of (N, M), in blocks of 10 vectors where these are a sample."""
    N, M = pre_acts.shape
    if activation == "topk":
        return top(pre_acts, k)
    rows = {"batchtopk": (1, k * N), "sampletopk": (N // 10, k)}[activation]
    return top(pre_acts.reshape(rows[0], -1), rows[1]).view(N, M)


def dense_loss(
    params, x, variance, dead, residual, weights, alpha, multi_topk, prefixes, k, activation
):
    """The loss of kernels/update.py's first lines by dense autograd: what it is, the codes (N, M)
    and the error (N, d)."""
    W_enc, b_enc, W_dec, b_dec = params
    pre_acts = torch.relu((x - b_dec) @ W_enc.T + b_enc)
    codes = select(pre_acts, k, activation)

    def error(codes):
        return weights * (codes @ W_dec + b_dec - x).square().sum(1)

    loss = sum(error(codes * (torch.arange(len(b_enc)) < m)) for m in prefixes).sum() / (
        len(prefixes) * variance
    )
    e = (codes @ W_dec + b_dec - x).detach()
    if len(dead) and alpha:
        e_hat = top(pre_acts[:, dead], max(1, x.shape[1] // 2)) @ W_dec[dead]
        loss = loss + alpha * (weights * (-e - e_hat).square().sum(1)).sum() / residual
    if multi_topk:
        loss = loss + error(top(pre_acts, 4 * k)).sum() / (8 * variance)
    return loss / len(x), codes.detach(), e


PLAIN = [0.0, 5.0], [False, True], [False, True], [700.0, 0.07]
"""alpha, multi_topk, unit_norm and variance, in all combinations."""

OPTIONS = [  # alpha, multi_topk, unit_norm, variance, more
    *((*options, {}) for options in itertools.product(*PLAIN)),
    (5.0, False, True, 700.0, dict(activation="batchtopk")),
    (5.0, False, True, 0.07, dict(activation="batchtopk")),
    (5.0, False, True, 700.0, dict(activation="sampletopk", k=30)),
    (5.0, False, True, 0.07, dict(activation="sampletopk", k=30)),
    (5.0, False, False, 700.0, dict(matryoshka=[10, 40])),
    (5.0, False, True, 700.0, dict(matryoshka=[10, 40])),
    (5.0, False, True, 0.07, dict(matryoshka=[40], activation="batchtopk", weighted=True)),
    (0.0, False, True, 700.0, dict(weighted=True)),
    (5.0, True, True, 0.07, dict(weighted=True)),
    (5.0, False, True, 0.07, dict(input_unit_norm=True)),
    (5.0, False, True, 0.07, dict(padded=True)),
    (5.0, False, True, 0.07, dict(activation="batchtopk", each=True)),
]
DEFAULTS = dict(
    activation="topk",
    k=5,
    matryoshka=[],
    weighted=False,  # a weight for each vector
    input_unit_norm=False,
    padded=False,
    each=False,  # the k largest of each vector, as a batchtopk begins
)


class DenseUpdate:
    """The updates of an SAE in float64, by dense autograd and torch's Adam.

    It has 96 latents and gets batches of 40 vectors. Dead latents are looked up every third step.
    """

    def __init__(self, sae, alpha, multi_topk, unit_norm, variance, more):
        self.params = [sae.get_parameter(name).detach().double().requires_grad_() for name in NAMES]
        self.optimizer = torch.optim.Adam(self.params, lr=1e-3, betas=(0.9, 0.999), eps=EPS)
        self.alpha = alpha
        self.multi_topk = multi_topk
        self.unit_norm = unit_norm
        self.variance = variance
        self.prefixes = [*more["matryoshka"], 96]
        self.k = more["k"]
        self.activation = "topk" if more["each"] else more["activation"]
        self.iteration = 0
        self.silent_for = torch.zeros(96)
        self.dead = []
        self.residual = 1.0
        self.threshold = 0.0
        """The running mean of the smallest activation that was kept."""

    def step(self, x, weights):
        """Return the loss, the norm of its gradient, the codes (40, 96) and the error (40, d)."""
        if self.iteration % 3 == 0:
            self.dead = (self.silent_for >= 100).nonzero().flatten()
        loss, codes, e = dense_loss(
            self.params,
            x.double(),
            self.variance,
            self.dead,
            self.residual,
            weights,
            self.alpha,
            self.multi_topk,
            self.prefixes,
            self.k,
            self.activation,
        )
        self.optimizer.zero_grad()
        loss.backward()
        _, _, W_dec, _ = self.params
        rows = W_dec.detach()
        if self.unit_norm:  # without the part of the gradient that would lengthen a row
            W_dec.grad -= (W_dec.grad * rows).sum(1, keepdim=True) * rows
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0).item()
        self.optimizer.step()
        if self.unit_norm:
            rows /= rows.norm(dim=1, keepdim=True)

        self.iteration += 1
        self.silent_for = torch.where((codes > 0).any(0), 0, self.silent_for + 40)
        self.residual = (weights[:, None] * e.square()).sum() / 40
        smallest = codes[codes > 0].min()
        self.threshold += (smallest - self.threshold) / min(self.iteration, 10)
        return loss.detach(), norm, codes, e


@pytest.mark.parametrize("alpha, multi_topk, unit_norm, variance, more", OPTIONS)
def test_twenty_steps_against_float64(monkeypatch, alpha, multi_topk, unit_norm, variance, more):
    """Every variant; AuxK, Multi-TopK and unit norm on and off; a variance so small that every
    gradient is clipped, and a large one. Dead latents are looked up every third step."""
    monkeypatch.setattr(update_module, "LIST_DEAD_EVERY", 3)
    more = DEFAULTS | more
    cfg = {name: more[name] for name in ("activation", "input_unit_norm")}
    sae, update = make(
        k=more["k"],
        cfg=cfg,
        dead_feature_threshold=100,
        auxk_alpha=alpha,
        multi_topk=multi_topk,
        normalize_decoder=unit_norm,
        matryoshka=more["matryoshka"],
    )
    update.variance = variance
    update.padded = more["padded"]
    reference = DenseUpdate(sae, alpha, multi_topk, unit_norm, variance, more)

    norms = []
    num_with_dead = 0  # updates in which AuxK had latents to revive
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        x = torch.randn(40, 24, generator=g)
        weights = torch.rand(40, generator=g) if more["weighted"] else None
        given = x
        spread = 1
        if more["input_unit_norm"]:
            given = x * 3 + 1
            spread = given.std(1, correction=0, keepdim=True)
            x = (given - given.mean(1, keepdim=True)) / spread
        loss, norm, codes, e = reference.step(x, torch.ones(40) if weights is None else weights)
        norms.append(norm)
        num_with_dead += bool(len(reference.dead))

        if more["activation"] == "sampletopk":
            given = given.view(4, 10, 24)
        result, result_norm = update(given, 1e-3, weights=weights, plain_topk=more["each"])
        torch.testing.assert_close(result.loss.double(), loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(result_norm.double().item(), norm, rtol=1e-4, atol=0)
        dense = torch.zeros(40, 96).scatter(1, result.top_indices, result.top_acts)
        for mine, expected in (
            (result.e, e * spread),
            (result.x_hat - given.view(40, 24), e * spread),
            (dense, codes),
        ):
            assert (mine.double() - expected).norm() <= 1e-5 * expected.norm()

    assert num_with_dead > 3 or more["activation"] == "sampletopk"
    if variance < 1:
        assert min(norms) > 1
    else:
        assert max(norms) < 1 or alpha
    for name, expected in zip(NAMES, reference.params):
        error = (sae.get_parameter(name).double() - expected).norm() / expected.norm()
        assert error <= 1e-5, (name, error.item())
    assert update.state["silent_for"].tolist() == reference.silent_for.tolist()
    if more["activation"] == "batchtopk":
        assert sae.threshold.item() == pytest.approx(reference.threshold.item(), rel=1e-4)


def test_forward_and_backward_change_nothing():
    """So that forward, backward and step may be called one by one, with the bits of a call; of
    every variant."""
    for cfg, options in (
        ({}, {}),
        (dict(activation="batchtopk"), dict(matryoshka=[40])),
        ({}, dict(multi_topk=True)),
    ):
        (_, one), (_, other) = (
            make(cfg=cfg, auxk_alpha=1.0, dead_feature_threshold=60, **options) for _ in range(2)
        )
        for seed in range(4):
            x = torch.randn(40, 24, generator=torch.Generator().manual_seed(seed))
            whole, norm = one(x, 1e-3)
            if seed == 0:
                other.list_dead()
            before = {name: tensor.clone() for name, tensor in other.state.items()}
            forward = other.forward(x)
            gradients = other.backward(forward)
            assert all(torch.equal(before[name], tensor) for name, tensor in other.state.items())
            assert torch.equal(other.step(gradients, 1e-3), norm)
            assert torch.equal(forward.loss, whole.loss)
        assert all(torch.equal(one.state[name], tensor) for name, tensor in other.state.items())


def test_what_does_not_go_together():
    for cfg, options, message in (
        (dict(activation="batchtopk"), dict(multi_topk=True), "multi_topk"),
        (dict(activation="sampletopk"), dict(multi_topk=True), "multi_topk"),
        ({}, dict(multi_topk=True, matryoshka=[40]), "multi_topk"),
        ({}, dict(matryoshka=[0]), "matryoshka 0"),
        ({}, dict(matryoshka=[40, 97]), "matryoshka 97: expected 1 to num_latents = 96"),
    ):
        with pytest.raises(ValueError, match=message):
            make(cfg=cfg, **options)


def test_places_that_fill_up_a_reconstruction_are_pairs_of_no_latent():
    """multi_topk: of 4 k places k are used again. Were the others latent 0's, a GPU would add them
    up one by one."""
    _, update = make(multi_topk=True)
    gradients = update.backward(update.forward(torch.randn(40, 24)))
    assert gradients.W_enc.ends.diff()[0] < 40
    assert gradients.W_enc.ends[-1] <= 40 * (4 * 5 + 5)


def test_a_gradient_that_is_not_kept_gives_the_same_bits():
    states = []
    for kept in (True, False):
        _, step = make(auxk_alpha=1.0, dead_feature_threshold=60)
        step.gradient_memory = step.gradient_memory if kept else [None, None]
        for seed in range(4):
            step(torch.randn(40, 24, generator=torch.Generator().manual_seed(seed)), 1e-3)
        states.append(step.state)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_parts_are_the_whole():
    runs = {}
    for parts in (1, 3):
        sae, step = make(auxk_alpha=1.0, dead_feature_threshold=60)
        for seed in range(4):
            step(
                torch.randn(40, 24, generator=torch.Generator().manual_seed(seed)),
                1e-3,
                num_chunks=parts,
            )
        runs[parts] = step.state
    for name in runs[1]:
        torch.testing.assert_close(runs[1][name], runs[3][name], rtol=1e-5, atol=1e-6)


def test_a_saved_state_goes_on_to_the_same_bits():
    batches = [
        torch.randn(40, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(6)
    ]
    for dtype in (None, torch.bfloat16):
        _, whole = make(dtype=dtype, dead_feature_threshold=60)
        _, first = make(dtype=dtype, dead_feature_threshold=60)
        _, second = make(dtype=dtype, dead_feature_threshold=60, seed=1)
        for x in batches:
            whole(x, 1e-3)
        for x in batches[:3]:
            first(x, 1e-3)
        second.load_state_dict(first.state)
        for x in batches[3:]:
            second(x, 1e-3)
        assert all(torch.equal(whole.state[name], second.state[name]) for name in whole.state)


def test_auxk_predicts_the_residual_with_dead_latents_alone():
    """By hand: the one dead latent points along the residual, so the loss is 0 there, and only it
    has a gradient."""
    sae = Sae(2, 3, 1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
        sae.encoder.weight.copy_(sae.W_dec)
        sae.b_dec.fill_(10)
    step = SparseUpdate(sae, variance=1.0, auxk_alpha=1.0)
    # b_dec + (3, 1): latent 0 takes the 3, the residual is +(0, 1)
    x = torch.tensor([[13.0, 11.0]])
    dead = torch.tensor([1])

    def auxk():
        without = step.forward(x)
        step.dead_indices = dead
        step.num_listed = 1
        forward = step.forward(x)
        gradients = step.backward(forward)
        step.num_listed = 0
        torch.testing.assert_close(forward.loss, without.loss + forward.auxk.loss)
        return forward.auxk.loss, gradients

    loss, gradients = auxk()
    assert loss == 0
    assert not gradients.W_enc.dense.any()
    assert not gradients.W_dec.dense.any()
    assert not gradients.b_enc[1]
    sae.W_dec.data[1] *= 1.5
    loss, gradients = auxk()  # it says 1.5 where 1 is left over
    assert loss.item() == pytest.approx(0.25)
    assert gradients.b_enc[1].item() == pytest.approx(1.5)
    dW_enc = gradients.W_enc
    dW_dec = gradients.W_dec
    assert dW_enc.rows.tolist() == dW_dec.rows.tolist() == [1]
    assert dW_dec.dense.tolist() == [pytest.approx([0, 1])]
    assert dW_enc.dense.tolist() == [pytest.approx([4.5, 1.5])]
    assert gradients.along[1].item() == pytest.approx(1.5)


def test_zero_activations_move_nothing():
    sae, step = make(auxk_alpha=0.0)
    sae.encoder.bias.data.fill_(-100)
    before = {name: sae.get_parameter(name).clone() for name in NAMES}
    result, _ = step(torch.randn(40, 24), 1e-3)
    assert not result.top_acts.any()
    assert (step.state["silent_for"] == 40).all()
    for name in NAMES[:3]:
        torch.testing.assert_close(sae.get_parameter(name), before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "N, M, k", [(7, 50, 5), (1, 33, 33), (5, 40, 1), (9, 64, 63), (6, 512, 3), (3, 513, 3)]
)
def test_topk_is_exact_and_ties_go_to_the_lower_index(dtype, N, M, k):
    g = torch.Generator().manual_seed(0)
    for x in (
        torch.randn(N, M, generator=g),
        torch.randint(-2, 3, (N, M), generator=g).float(),
        -torch.rand(N, M, generator=g),
    ):
        x = x.to(dtype)
        acts, indices = torch_topk(x, k)
        expected = x.relu().sort(dim=1, descending=True, stable=True)
        by_value = acts.sort(dim=1, descending=True).values
        assert acts.dtype == dtype
        assert torch.equal(by_value, expected.values[:, :k])
        assert torch.equal(x.relu().gather(1, indices)[acts > 0], acts[acts > 0])
        for row in range(N):
            positive = expected.values[row, :k] > 0
            assert set(indices[row][acts[row] > 0].tolist()) == set(
                expected.indices[row, :k][positive].tolist()
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_columns_choose_as_the_whole_does(monkeypatch, dtype):
    g = torch.Generator().manual_seed(0)
    # many ties
    x, W, b, b_dec = (
        torch.randint(-2, 3, size, generator=g).float() for size in ((9, 6), (53, 6), (53,), (6,))
    )
    whole = encode(x, W, b, b_dec, 7, dtype)
    monkeypatch.setattr(sys.modules["kernels.encode"], "COLUMNS", 11)
    monkeypatch.setattr(sys.modules["kernels.encode"], "ROWS", 4)
    parts = encode(x, W, b, b_dec, 7, dtype)

    def as_sets(acts, indices):
        return [
            {(i, a) for i, a in zip(*row) if a > 0} for row in zip(indices.tolist(), acts.tolist())
        ]

    assert as_sets(*whole) == as_sets(*parts)


@pytest.mark.parametrize("block", [4, 1000])
@pytest.mark.parametrize("kept", [False, True])
def test_gradients_by_blocks_of_rows(monkeypatch, block, kept):
    for module in ("kernels.adam", "kernels.grad"):
        monkeypatch.setattr(sys.modules[module], "BLOCK", block)
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 3, generator=g)
    indices = torch.randint(9, (6, 3), generator=g)
    x = torch.randn(6, 5, generator=g)
    order, ends = sort_pairs(indices, 9)
    rows = torch.tensor([0, 3, 8])
    dense = torch.randn(3, 5, generator=g)
    gradient = Gradient(weights.flatten()[order], order // 3, ends, x, rows, dense).store(
        torch.empty(9, 5) if kept else None
    )
    expected = torch.zeros(6, 9).scatter_add(1, indices, weights).T @ x
    expected[rows] += dense
    torch.testing.assert_close(
        torch.cat([gradient.block(a, min(a + 4, 9)) for a in (0, 4, 8)]), expected
    )
    assert squared_norm(gradient).item() == pytest.approx(expected.square().sum().item(), rel=1e-5)


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU would have to be waited for: numbers that Python reads, and shapes that
    depend on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique_dim",
            "bincount",
        ), name
        return func(*args, **kwargs or {})


class Pair(Group):
    """Two processes, of which the other one has nothing."""

    def sum(self, x):
        return x


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(multi_topk=True),
        dict(matryoshka=[40]),
        dict(cfg=dict(activation="batchtopk")),
        dict(group=Pair((0, 1))),
    ],
)
def test_update_never_waits_for_the_device(options):
    """As on a GPU, through Triton's launchers, whose kernels do nothing here: so that a CUDA graph
    can hold the step."""
    from kernels.grad import triton

    if triton is None:
        pytest.skip("Triton is not installed")
    modules = {
        name: sys.modules[f"kernels.{name}"]
        for name in ("adam", "decode", "grad", "batch_topk", "topk")
    }
    _, step = make(auxk_alpha=1.0, dead_feature_threshold=0, dtype=torch.bfloat16, **options)
    step.padded, step.gradient_memory = (
        True,
        step.gradient_memory if "group" in options else [None, None],
    )
    step.state["dead"][:9] = True
    step.make_dead_indices()
    assert step.dead_indices.tolist() == [*range(9), *[96] * 7]
    kernels = {
        (m, n): k
        for m, module in modules.items()
        for n, k in vars(module).items()
        if n.endswith("_kernel")
    }
    launched = []

    class Nothing:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(self.name)

    with contextlib.ExitStack() as stack:
        for (module, name), _ in kernels.items():
            stack.enter_context(patch.object(modules[module], name, Nothing(name)))
        stack.enter_context(patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros))
        for name, module in dict(
            topk="topk", decode_error="decode", keep_largest="batch_topk"
        ).items():
            chosen = getattr(modules[module], f"triton_{name}")
            for user in (update_module, sys.modules["kernels.encode"], sys.modules["sae"]):
                if hasattr(user, name):
                    stack.enter_context(patch.object(user, name, chosen))
        stack.enter_context(
            patch.object(modules["grad"], "count_ends", modules["grad"].search_ends)
        )
        stack.enter_context(patch.object(modules["adam"], "in_triton", lambda W: True))
        stack.enter_context(
            patch.object(
                update_module, "totals", lambda weights, ends: weights.new_zeros(len(ends) - 1)
            )
        )
        stack.enter_context(
            patch.object(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
        )
        stack.enter_context(NoWaiting())
        step.run(torch.randn(40, 24))
    assert ("make_kernel" in launched) == ("group" in options)
    assert {"topk_kernel", "decode_error_kernel", "squared_norm_kernel", "update_kernel"} <= set(
        launched
    )
