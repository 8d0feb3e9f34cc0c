"""Check every kernel on this machine: each output and each gradient against float64, at odd sizes.

    python test_kernels.py     # a table; exit status 1 if anything fails
    pytest test_kernels.py     # the same checks as tests

With a GPU the Triton kernels run compiled; without one they run in Triton's interpreter, on the
CPU. Their torch twins are checked on the CPU. Outputs start as NaN, so that an element which is not
written is seen.
"""

import os
import sys
from contextlib import contextmanager
from unittest.mock import patch

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when triton is imported, so it comes before the kernels
    )
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set

import pytest

from kernels import decode, encode, sum_by_latent

FILES = ("adam", "decode", "encode", "grad", "batch_topk", "topk")
ADAM, DECODE, ENCODE, GRAD, THRESHOLD, TOPK = (sys.modules[f"kernels.{name}"] for name in FILES)
BACKENDS = ["torch"] + ["triton"] * (GRAD.triton is not None)
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}  # of the largest element: rounding twice
SHAPES = {  # N, d, M, k
    "odd": (5, 7, 11, 3),
    "one vector, k = 1": (1, 33, 17, 1),
    "k = M": (6, 130, 9, 9),
    "one past the blocks": (9, 257, 40, 5),
    "k past one block": (3, 19, 70, 37),
    "repeated latents": (13, 24, 3, 6),
}
LARGE = {  # slow in the interpreter, so for those that they are about: N, d, M, k, kernels, dtypes
    "many columns": ((2, 20, 4500, 3), ("topk", "keep_largest"), TOLERANCE),
    "k = 512": (
        (2, 20, 4501, 512),
        ("topk", "keep_largest", "decode_error"),
        (torch.float32, torch.bfloat16),
    ),
    "k = M = 512": (
        (2, 20, 512, 512),
        ("topk", "decode_error", "decode", "encode"),
        (torch.float32,),
    ),
    "2^16 + 1 columns": ((2, 1, 65_537, 33), ("topk",), (torch.float32,)),
    "2^20 columns": ((1, 1, 1 << 20, 100), ("topk",), (torch.bfloat16,)),
}


@contextmanager
def using(backend):
    """Both backends on any machine, where the public functions choose by device; new tensors are
    full of NaN."""
    own = lambda module, *names: patch.multiple(module, **{n: CHOSEN[n, backend] for n in names})

    def new_nan(self, *shape, new_empty=torch.Tensor.new_empty, **options):
        out = new_empty(self, *shape, **options)
        return out.fill_(float("nan") if out.is_floating_point() else 0)

    decoder = own(DECODE, "gather_sum", "gather_dot", "sum_by_latent")
    encoder = own(ENCODE, "gather_sum", "sum_by_latent", "topk")
    with decoder, encoder, patch.object(torch.Tensor, "new_empty", new_nan):
        yield


CHOSEN = {
    (n, b): getattr(DECODE, f"{b}_{n}") for n in ("gather_sum", "gather_dot") for b in BACKENDS
}
CHOSEN |= {("decode_error", b): getattr(DECODE, f"{b}_decode_error") for b in BACKENDS}
CHOSEN |= {("topk", b): getattr(TOPK, f"{b}_topk") for b in BACKENDS}
CHOSEN |= {("keep_largest", b): getattr(THRESHOLD, f"{b}_keep_largest") for b in BACKENDS}
CHOSEN |= {
    (n, b): getattr(ADAM, f"{b}_{n}")
    for n in ("squared_norm", "sum_over", "update_rows")
    for b in BACKENDS
}
CHOSEN |= {("sum_by_latent", b): getattr(GRAD, f"{b}_sum_by_latent") for b in BACKENDS}


def error(result, expected):
    """Largest difference, as a share of the largest expected element; NaN anywhere makes it NaN."""
    assert result.shape == expected.shape
    return ((result.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def differs(result, expected):
    """0 if all elements are the same, else infinity."""
    return 0.0 if torch.equal(result.double(), expected.double()) else float("inf")


def worst(errors):
    """The largest, and NaN, which max() passes over, is larger than any."""
    return max(errors, key=lambda e: float("inf") if e != e else e)


def random_problem(shape, dtype, backend, k_of=None):
    """Seeded inputs: x (N, d), W (M, d), b (d,), acts (N, k), indices (N, k), distinct in a row
    where M allows.

    The first vector has fewer than k acts that are not zero, the last, if there are several, none.
    """
    N, d, M, k = shape
    g = torch.Generator().manual_seed(0)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    x, W, b, acts = (
        torch.randn(s, generator=g).to(device, dtype) for s in ((N, d), (M, d), (d,), (N, k))
    )
    acts[0, (k + 1) // 2 :], acts[1:][-1:] = 0, 0
    indices = (
        torch.rand(N, M, generator=g).topk(k).indices
        if k <= M
        else torch.randint(M, (N, k), generator=g)
    )
    return x, W, b, acts, indices.to(device)


def dense(weights, indices, M):
    """S (N, M), with S[n, indices[n, j]] the sum of weights[n, j]."""
    return torch.zeros(len(weights), M, dtype=weights.dtype, device=weights.device).scatter_add(
        1, indices, weights
    )


def check_sum_by_latent(shape, dtype, backend):
    x, W, _, weights, indices = random_problem(shape, dtype, backend)
    with using(backend):
        dW, db = CHOSEN["sum_by_latent", backend](weights, indices, x, len(W))
        order, ends = GRAD.sort_pairs(indices, len(W))
        sums = GRAD.totals(weights.flatten()[order], ends)
    S = dense(weights.double(), indices, len(W))
    latents = indices.flatten().cpu().tolist()
    right = torch.tensor(sorted(range(len(latents)), key=lambda pair: latents[pair]))  # stable
    starts = torch.tensor([sum(latent < m for latent in latents) for m in range(len(W) + 1)])
    pairs = worst([differs(order.cpu(), right), differs(ends.cpu(), starts)])
    return {
        "dW": error(dW, S.T @ x.double()),
        "db": error(db, S.sum(0)),
        "totals": error(sums, S.sum(0)),
        "sort_pairs": pairs,
    }


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
    return {"x_hat": error(x_hat, expected)} | {
        name: error(t.grad, r.grad) for name, t, r in zip(names, inputs, (acts, W, b))
    }


def check_encode(shape, dtype, backend):
    x, W, b_dec, g, _ = random_problem(shape, dtype, backend)
    k = min(shape[3], shape[2])
    g, b_enc = g[:, :k] + 1, -0.1 - W[:, 0].abs()
    W[1] = W[0]  # a tie in every row
    x[1:][-1:] = (
        b_dec  # all of whose pre_acts are negative; others have fewer than k that are positive
    )
    inputs = [t.clone().requires_grad_() for t in (x, W, b_enc, b_dec)]
    with using(backend):
        top_acts, top_indices = encode(*inputs, k)
        top_acts.backward(g)
    x, W, b_enc, b_dec = (t.detach().double().requires_grad_() for t in inputs)
    pre_acts = torch.relu((x - b_dec) @ W.T + b_enc)
    picked = pre_acts.gather(1, top_indices) * (top_acts > 0)
    picked.backward(g.double())
    largest = pre_acts.topk(k, sorted=True).values.flip(1)
    errors = {
        "top_acts": error(top_acts, picked),
        "k largest": error(picked.sort().values, largest),
    }
    names = ("d x", "d W_enc", "d b_enc", "d b_dec")
    return errors | {
        name: error(t.grad, r.grad) for name, t, r in zip(names, inputs, (x, W, b_enc, b_dec))
    }


def check_topk(shape, dtype, backend):
    """The numbers, and which of equal ones: in random rows, in rows of few values, and in rows with
    too few positive ones."""
    N, _, M, k = shape
    k, g = min(k, M), torch.Generator().manual_seed(0)
    device = random_problem(shape, dtype, backend)[0].device
    kinds = (
        torch.randn(N, M, generator=g),
        torch.randint(-2, 3, (N, M), generator=g).float(),
        torch.randn(N, M, generator=g) - 2,
    )
    errors = []
    for rows in (*kinds, -torch.rand(N, M, generator=g))[
        : 4 if M < 1 << 17 else 1
    ]:  # of 2^20 columns 4 s a row
        rows = rows.to(device, dtype)
        with using(backend):
            top_acts, top_indices = CHOSEN["topk", backend](rows, k)
        expected = rows.double().relu().sort(dim=1, descending=True, stable=True)
        errors.append(
            differs(top_acts.double().sort(dim=1, descending=True).values, expected.values[:, :k])
        )
        active = torch.zeros(N, M, dtype=torch.bool, device=device).scatter(
            1, top_indices, top_acts > 0
        )
        should = torch.zeros_like(active).scatter(
            1, expected.indices[:, :k], expected.values[:, :k] > 0
        )
        errors += [differs(active, should), differs((top_acts > 0).sum(), should.sum())]
    return {"top_acts": worst(errors)}


def check_keep_largest(shape, dtype, backend):
    """Which numbers are kept: random, few values, those a hair apart, fewer positive than are to be
    kept, none."""
    N, _, M, k = shape
    g = torch.Generator().manual_seed(0)
    device = random_problem(shape, dtype, backend)[0].device
    few = torch.randint(0, 3, (N, M), generator=g)
    random = (torch.randn(N, M, generator=g) - shift for shift in (0, 2))
    errors = []
    for acts in (*random, few.float(), 1 + few * 2.0**-20, torch.zeros(N, M)):
        acts = acts.relu().to(device, dtype)
        largest = acts.double().flatten().sort(descending=True, stable=True)
        for count in {1, min(N * k, N * M), N * M}:
            with using(backend):
                kept, least = CHOSEN["keep_largest", backend](acts, count)
            expected = torch.zeros_like(largest.values).scatter(
                0, largest.indices[:count], largest.values[:count]
            )
            smallest = largest.values[: min(count, int((acts > 0).sum()))][-1:].sum()
            errors += [differs(kept, expected.view(N, M)), differs(least, smallest)]
    return {"kept": worst(errors)}


def check_decode_error(shape, dtype, backend):
    x, W, b, acts, indices = random_problem(shape, dtype, backend)
    acts = acts.relu()
    with using(backend):
        e, d_acts = CHOSEN["decode_error", backend](x, acts, indices, W, b)
    x, W, b, acts = (t.double() for t in (x, W, b, acts))
    expected = dense(acts, indices, len(W)) @ W + b - x
    dots = (expected @ W.T).gather(1, indices) * (acts > 0)
    return {"e": error(e, expected), "d_acts": error(d_acts, dots)}


class Twins:
    """Stands for two processes with the same numbers."""

    def sum(self, x):
        return x.mul_(2)


def check_adam(shape, dtype, backend):
    """Two steps, the second without dense rows; alone, and summed over two processes; the copy is
    in `dtype`."""
    x, W, _, weights, indices = random_problem(shape, torch.float32, backend)
    M, k, rows = len(W), indices.shape[1], torch.arange(0, len(W), 3, device=W.device)
    W = W / W.norm(dim=1, keepdim=True)
    order, ends = GRAD.sort_pairs(indices, M)
    pairs = GRAD.Gradient(weights.flatten()[order], order // k, ends, x)
    sums = dense(weights.double(), indices, M).T @ x.double()
    both, errors = sums.index_add(0, rows, W[rows].double() + 1), {}
    for unit, together in ((False, False), (True, False), (True, True)):
        mine, copy, m, v = (
            W.clone(),
            W.to(dtype, copy=True),
            torch.zeros_like(W),
            torch.zeros_like(W),
        )
        w, first, second = W.double(), torch.zeros_like(sums), torch.zeros_like(sums)
        for step, full in ((1, both), (2, sums)):
            gradient = (
                pairs
                if full is sums
                else pairs._replace(rows=rows, dense=(both - sums)[rows].float())
            )
            if together:
                gradient = gradient._replace(
                    weights=gradient.weights / 2, dense=None if full is sums else gradient.dense / 2
                )
            along = (full * mine.double()).sum(1) if unit else None
            clip, t = torch.tensor(1.5, device=W.device), torch.tensor(float(step), device=W.device)
            given = None if along is None else along.float()
            with using(backend):
                if together:
                    gradient = CHOSEN["sum_over", backend](
                        Twins(), gradient, torch.full_like(W, torch.nan)
                    )
                norm = CHOSEN["squared_norm", backend](gradient, given)
                CHOSEN["update_rows", backend](mine, gradient, m, v, t, 0.01, clip, given, copy)
            g = full if along is None else full - along[:, None] * w
            errors["norm"] = worst([errors.get("norm", 0.0), error(norm, g.square().sum())])
            g = g / 1.5
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            w = w - 0.01 * (first / (1 - 0.9**step)) / (
                (second / (1 - 0.999**step)).sqrt() + ADAM.EPS
            )
            w = w / w.norm(dim=1, keepdim=True) if unit else w
        for name, a, b in (("W", mine, w), ("exp_avg", m, first), ("exp_avg_sq", v, second)):
            errors[name] = worst([errors.get(name, 0.0), error(a, b)])
        off = error(copy, w) / (1 if dtype == torch.float32 else TOLERANCE[dtype] / 2e-5)
        errors["copy"] = worst([errors.get("copy", 0.0), off])
    return errors


CHECKS = {
    "topk": check_topk,
    "keep_largest": check_keep_largest,
    "decode_error": check_decode_error,
    "adam": check_adam,
    "sum_by_latent": check_sum_by_latent,
    "decode": check_decode,
    "encode": check_encode,
}


def tolerance(name, dtype):
    if name in ("topk", "keep_largest", "adam"):  # exact; and float32 but for the copy
        return 2e-5 if name == "adam" else 0.0
    return TOLERANCE[dtype] * (
        4 if name == "encode" and dtype != torch.float32 else 1
    )  # x - b_dec is rounded first


def cases():
    """(name, backend, shape's name, shape, dtype)."""
    for name in CHECKS:
        for backend in BACKENDS:
            yield from (
                (name, backend, title, shape, dtype)
                for title, shape in SHAPES.items()
                for dtype in TOLERANCE
            )
            for title, (shape, names, dtypes) in LARGE.items():
                yield from (
                    (name, backend, title, shape, dtype) for dtype in dtypes if name in names
                )


@pytest.mark.parametrize(
    "name, backend, title, shape, dtype", cases(), ids=lambda v: str(v).removeprefix("torch.")
)
def test_kernel(name, backend, title, shape, dtype):
    errors = CHECKS[name](shape, dtype, backend)
    assert all(value <= tolerance(name, dtype) for value in errors.values()), errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_pairs_of_one_latent_are_added_in_float32(backend, dtype):
    x = torch.ones(
        4100,
        3,
        dtype=dtype,
        device="cuda" if backend == "triton" and torch.cuda.is_available() else "cpu",
    )
    dW, db = CHOSEN["sum_by_latent", backend](x[:, :1], x[:, :1].long(), x, 2)
    expected = torch.tensor(
        [0, 4100], device=x.device
    )  # in bfloat16 a sum of ones ends at 256, in float16 at 2048
    assert torch.equal(db, expected.to(dtype)) and torch.equal(
        dW, expected.to(dtype)[:, None].expand(2, 3)
    )


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_past_two_to_the_31_numbers(backend):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    last, d = 1 << 20, 2053
    W = torch.empty(
        last + 1, d, dtype=torch.bfloat16, device=device
    )  # 4.3 GB, of which a CPU sees the pages that are touched
    W[last], W[1] = 1, 2
    indices, weights = (
        torch.tensor([[last, 1]], device=device),
        torch.tensor([[3, 0]], dtype=W.dtype, device=device),
    )
    with using(backend):
        assert (CHOSEN["gather_sum", backend](weights, indices, W) == 3).all()
        assert CHOSEN["gather_dot", backend](W[:1] * 0 + 1, indices, W).tolist() == [
            [2048, 4096]
        ]  # 2053 and 4106 in bfloat16
        e, d_acts = CHOSEN["decode_error", backend](W[last:], weights, indices, W, W[1])
        assert (e == 4).all() and d_acts.tolist() == [[8192, 0]]
        ends = torch.tensor([0, 1, 2], device=device)
        gradient = GRAD.Gradient(weights.flatten(), indices.flatten(), ends, W)
        assert CHOSEN["squared_norm", backend](gradient).item() == pytest.approx(
            9 * d, rel=TOLERANCE[W.dtype]
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_among_the_largest(backend):
    rows = torch.arange(80.0).view(2, 40)
    rows[0, [5, 9]] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(
        torch.float32
    )  # what a GPU makes of 0 / 0
    rows = rows.to("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    top_acts, top_indices = CHOSEN["topk", backend](rows, 3)
    assert top_indices.sort().values.tolist() == [[5, 9, 39], [37, 38, 39]]
    assert top_acts[0].isnan().sum() == 2 and not top_acts[1].isnan().any()


def test_public_functions_on_the_cpu():
    x, W, b, acts, indices = random_problem((4, 8, 12, 5), torch.float32, "torch")
    S = dense(acts, indices, len(W))
    torch.testing.assert_close(decode(acts, indices, W, b), S @ W + b)
    torch.testing.assert_close(sum_by_latent(acts, indices, x, len(W))[0], S.T @ x)


def main():
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "CPU; Triton in its interpreter"
    )
    version = GRAD.triton.__version__ if GRAD.triton else "absent"
    print(f"{where}; torch {torch.__version__}, triton {version}\n")
    print(
        f"{'kernel':14} {'backend':8} {'case':19} {'N, d, M, k':>18}  {'dtype':9} {'max rel error':>13}  of"
    )
    failed = 0
    for name, backend, title, shape, dtype in cases():
        errors = CHECKS[name](shape, dtype, backend)
        largest = worst(errors.values())
        what = next(key for key, value in errors.items() if value is largest)
        good = largest <= tolerance(name, dtype)
        failed += not good
        sizes, kind = ", ".join(map(str, shape)), str(dtype).removeprefix("torch.")
        case = f"{name:14} {backend:8} {title:19} {sizes:>18}  {kind:9}"
        print(f"{case} {largest:13.1e}  {what:10} {'pass' if good else 'FAIL'}")
    print(f"\n{failed} failed" if failed else "\nall pass")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
