"""Check every kernel on this machine: each output and each gradient against float64, at odd sizes.

    python test_kernels.py     # a table; exit status 1 if anything fails
    pytest test_kernels.py     # the same checks as tests

With a GPU the Triton kernels run compiled; without one they run in Triton's interpreter, on the CPU. Their torch twins
are checked on the CPU. Outputs start as NaN, so that an element which is not written is seen.
"""

import os
import sys
from contextlib import contextmanager
from unittest.mock import patch

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so it comes before the kernels
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set

import pytest

from kernels import decode, encode, sum_by_latent

ADAM, DECODE, ENCODE, GRAD, TOPK = (sys.modules[f"kernels.{name}"] for name in ("adam", "decode", "encode", "grad", "topk"))
BACKENDS = ["torch"] + ["triton"] * (GRAD.triton is not None)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest element: rounding twice
SHAPES = {  # N, d, M, k
    "odd": (5, 7, 11, 3),
    "one vector, k = 1": (1, 33, 17, 1),
    "k = M": (6, 130, 9, 9),
    "one past the blocks": (9, 257, 40, 5),
    "k past one block": (3, 19, 70, 37),
    "repeated latents": (13, 24, 3, 6),
    "many columns": (2, 20, 4500, 3),
}


@contextmanager
def using(backend):
    """Both backends on any machine, where the public functions choose by device; new tensors are full of NaN."""
    own = lambda module, *names: patch.multiple(module, **{n: CHOSEN[n, backend] for n in names})
    fill = lambda dtype: float("nan") if dtype.is_floating_point else 0
    new_nan = lambda self, *shape, **options: self.new_full(shape, fill(options.get("dtype", self.dtype)), **options)
    decoder = own(DECODE, "gather_sum", "gather_dot", "sum_by_latent")
    encoder = own(ENCODE, "gather_sum", "sum_by_latent", "topk")
    with decoder, encoder, patch.object(torch.Tensor, "new_empty", new_nan):
        yield


CHOSEN = {(n, b): getattr(DECODE, f"{b}_{n}") for n in ("gather_sum", "gather_dot") for b in BACKENDS}
CHOSEN |= {("decode_error", b): getattr(DECODE, f"{b}_decode_error") for b in BACKENDS}
CHOSEN |= {("topk", b): getattr(TOPK, f"{b}_topk") for b in BACKENDS}
CHOSEN |= {(n, b): getattr(ADAM, f"{b}_{n}") for n in ("squared_norm", "update") for b in BACKENDS}
CHOSEN |= {("sum_by_latent", b): getattr(GRAD, f"{b}_sum_by_latent") for b in BACKENDS}


def error(result, expected):
    """Largest difference, as a share of the largest expected element; NaN anywhere makes it NaN."""
    assert result.shape == expected.shape
    return ((result.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def random_problem(shape, dtype, backend, k_of=None):
    """Seeded inputs: x (N, d), W (M, d), b (d,), acts (N, k), indices (N, k), distinct in a row where M allows."""
    N, d, M, k = shape
    g = torch.Generator().manual_seed(0)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    x, W, b, acts = (torch.randn(s, generator=g).to(device, dtype) for s in ((N, d), (M, d), (d,), (N, k)))
    indices = torch.rand(N, M, generator=g).topk(k).indices if k <= M else torch.randint(M, (N, k), generator=g)
    return x, W, b, acts, indices.to(device)


def dense(weights, indices, M):
    """S (N, M), with S[n, indices[n, j]] the sum of weights[n, j]."""
    return torch.zeros(len(weights), M, dtype=weights.dtype, device=weights.device).scatter_add(1, indices, weights)


def check_sum_by_latent(shape, dtype, backend):
    x, W, _, weights, indices = random_problem(shape, dtype, backend)
    with using(backend):
        dW, db = CHOSEN["sum_by_latent", backend](weights, indices, x, len(W))
    S = dense(weights.double(), indices, len(W))
    return {"dW": error(dW, S.T @ x.double()), "db": error(db, S.sum(0))}


def check_decode(shape, dtype, backend):
    g, W, b, acts, indices = random_problem(shape, dtype, backend)
    inputs = [t.clone().requires_grad_() for t in (acts, W, b)]
    with using(backend):
        x_hat = decode(inputs[0], indices, *inputs[1:])
        x_hat.backward(g)
    acts, W, b = (t.detach().double().requires_grad_() for t in inputs)
    expected = dense(acts, indices, len(W)) @ W + b
    expected.backward(g.double())
    names = ("d top_acts", "d W_dec", "d b_dec")
    return {"x_hat": error(x_hat, expected)} | {name: error(t.grad, r.grad) for name, t, r in zip(names, inputs, (acts, W, b))}


def check_encode(shape, dtype, backend):
    x, W, b_dec, g, _ = random_problem(shape, dtype, backend)
    k = min(shape[3], shape[2])
    g, b_enc = g[:, :k], W[:, 0] - 0.5  # negative enough that some rows have fewer than k positive pre_acts
    W[1] = W[0]  # a tie in every row
    inputs = [t.clone().requires_grad_() for t in (x, W, b_enc, b_dec)]
    with using(backend):
        top_acts, top_indices = encode(*inputs, k)
        top_acts.backward(g)
    x, W, b_enc, b_dec = (t.detach().double().requires_grad_() for t in inputs)
    pre_acts = torch.relu((x - b_dec) @ W.T + b_enc)
    picked = pre_acts.gather(1, top_indices) * (top_acts > 0)
    picked.backward(g.double())
    largest = pre_acts.topk(k, sorted=True).values.flip(1)
    errors = {"top_acts": error(top_acts, picked), "k largest": error(picked.sort().values, largest)}
    names = ("d x", "d W_enc", "d b_enc", "d b_dec")
    return errors | {name: error(t.grad, r.grad) for name, t, r in zip(names, inputs, (x, W, b_enc, b_dec))}


def check_topk(shape, dtype, backend):
    """The numbers, and which of equal ones: in random rows, in rows of few values, and in rows with too few positive ones."""
    N, _, M, k = shape
    k, g = min(k, M), torch.Generator().manual_seed(0)
    device = random_problem(shape, dtype, backend)[0].device
    kinds = torch.randn(N, M, generator=g), torch.randint(-2, 3, (N, M), generator=g).float(), torch.randn(N, M, generator=g) - 2
    worst = 0.0
    for rows in (*kinds, -torch.rand(N, M, generator=g)):
        rows = rows.to(device, dtype)
        with using(backend):
            top_acts, top_indices = CHOSEN["topk", backend](rows, k)
        expected = rows.double().relu().sort(dim=1, descending=True, stable=True)
        values, order = top_acts.double().sort(dim=1, descending=True, stable=True)
        worst = max(worst, (values - expected.values[:, :k]).abs().max().item())
        active = torch.zeros(N, M, dtype=torch.bool, device=device).scatter(1, top_indices, top_acts > 0)
        should = torch.zeros_like(active).scatter(1, expected.indices[:, :k], expected.values[:, :k] > 0)
        right = torch.equal(active, should) and len(top_indices[top_acts > 0]) == int(should.sum())
        worst = max(worst, 0.0 if right else float("inf"))
    return {"top_acts": worst}


def check_decode_error(shape, dtype, backend):
    x, W, b, acts, indices = random_problem(shape, dtype, backend)
    acts = acts.relu()
    with using(backend):
        e, d_acts = CHOSEN["decode_error", backend](x, acts, indices, W, b)
    x, W, b, acts = (t.double() for t in (x, W, b, acts))
    expected = dense(acts, indices, len(W)) @ W + b - x
    dots = (expected @ W.T).gather(1, indices) * (acts > 0)
    return {"e": error(e, expected), "d_acts": error(d_acts, dots)}


def check_adam(shape, dtype, backend):
    """Two steps, the second without pairs that are not dense; the copy is in `dtype`."""
    x, W, _, weights, indices = random_problem(shape, torch.float32, backend)
    M, k, rows = len(W), indices.shape[1], torch.arange(0, len(W), 3, device=W.device)
    W = W / W.norm(dim=1, keepdim=True)
    order, ends = GRAD.sort_pairs(indices, M)
    gradient = GRAD.Gradient(weights.flatten()[order], order // k, ends, x, rows, W[rows] + 1)
    full = dense(weights.double(), indices, M).T @ x.double()
    full[rows] += W[rows].double() + 1
    errors = {}
    for unit in (False, True):
        mine, copy, m, v = W.clone(), W.to(dtype, copy=True), torch.zeros_like(W), torch.zeros_like(W)
        w, first, second = W.double(), torch.zeros_like(full), torch.zeros_like(full)
        for step in (1, 2):
            along = (full * mine.double()).sum(1) if unit else None
            clip, t = torch.tensor(1.5, device=W.device), torch.tensor(float(step), device=W.device)
            given = None if along is None else along.float()
            with using(backend):
                norm = CHOSEN["squared_norm", backend](gradient, given)
                CHOSEN["update", backend](mine, gradient, m, v, t, 0.01, clip, given, copy)
            g = full if along is None else full - along[:, None] * w
            errors["norm"] = max(errors.get("norm", 0.0), error(norm, g.square().sum()))
            g = g / 1.5
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            w = w - 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + ADAM.EPS)
            w = w / w.norm(dim=1, keepdim=True) if unit else w
        for name, a, b in (("W", mine, w), ("exp_avg", m, first), ("exp_avg_sq", v, second)):
            errors[name] = max(errors.get(name, 0.0), error(a, b))
        errors["copy"] = max(errors.get("copy", 0.0), error(copy, w) / (1 if dtype == torch.float32 else TOLERANCE[dtype] / 2e-5))
    return errors


CHECKS = {
    "topk": check_topk,
    "decode_error": check_decode_error,
    "adam": check_adam,
    "sum_by_latent": check_sum_by_latent,
    "decode": check_decode,
    "encode": check_encode,
}


def tolerance(name, dtype):
    if name in ("topk", "adam"):  # exact; and float32 but for the copy
        return {"topk": 0.0, "adam": 2e-5}[name]
    return TOLERANCE[dtype] * (4 if name == "encode" and dtype != torch.float32 else 1)  # x - b_dec is rounded first


def cases():
    for name in CHECKS:
        for backend in BACKENDS:
            for shape in SHAPES:
                for dtype in TOLERANCE:
                    if name == "topk" or shape != "many columns":  # a program a column is slow in the interpreter
                        yield name, backend, shape, dtype


@pytest.mark.parametrize("name, backend, shape, dtype", cases(), ids=lambda v: str(v).removeprefix("torch."))
def test_kernel(name, backend, shape, dtype):
    errors = CHECKS[name](SHAPES[shape], dtype, backend)
    assert all(value <= tolerance(name, dtype) for value in errors.values()), errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_pairs_of_one_latent_are_added_in_float32(backend, dtype):
    x = torch.ones(4100, 3, dtype=dtype, device="cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    dW, db = CHOSEN["sum_by_latent", backend](x[:, :1], x[:, :1].long(), x, 2)
    expected = torch.tensor([0, 4100], device=x.device)  # in bfloat16 a sum of ones ends at 256, in float16 at 2048
    assert torch.equal(db, expected.to(dtype)) and torch.equal(dW, expected.to(dtype)[:, None].expand(2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    x, W, _, weights, indices = random_problem((200, 40, 6, 3), torch.float32, backend)
    runs = [CHOSEN["sum_by_latent", backend](weights, indices, x, len(W)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_activations_have_no_gradient(backend):
    x, W, b_dec, g, _ = random_problem((4, 8, 12, 5), torch.float32, backend)
    inputs = [t.requires_grad_() for t in (x, W, torch.full_like(W[:, 0], -100.0), b_dec)]
    with using(backend):
        top_acts, _ = encode(*inputs, 5)
        top_acts.backward(g)
    assert not top_acts.any()
    assert not any(t.grad.any() for t in inputs)


def test_public_functions_on_the_cpu():
    x, W, b, acts, indices = random_problem((4, 8, 12, 5), torch.float32, "torch")
    S = dense(acts, indices, len(W))
    torch.testing.assert_close(decode(acts, indices, W, b), S @ W + b)
    torch.testing.assert_close(sum_by_latent(acts, indices, x, len(W))[0], S.T @ x)


def main():
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU; Triton in its interpreter"
    version = GRAD.triton.__version__ if GRAD.triton else "absent"
    print(f"{where}; torch {torch.__version__}, triton {version}\n")
    print(f"{'kernel':14} {'backend':8} {'case':19} {'N, d, M, k':>18}  {'dtype':9} {'max rel error':>13}  of")
    failed = 0
    for name, backend, shape, dtype in cases():
        errors = CHECKS[name](SHAPES[shape], dtype, backend)
        worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
        good = errors[worst] <= tolerance(name, dtype)
        failed += not good
        sizes, kind = ", ".join(map(str, SHAPES[shape])), str(dtype).removeprefix("torch.")
        case = f"{name:14} {backend:8} {shape:19} {sizes:>18}  {kind:9}"
        print(f"{case} {errors[worst]:13.1e}  {worst:10} {'pass' if good else 'FAIL'}")
    print(f"\n{failed} failed" if failed else "\nall pass")
    return bool(failed)


if __name__ == "__main__" and "get_ipython" not in globals():
    raise SystemExit(main())
