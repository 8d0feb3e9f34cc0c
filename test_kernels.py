"""Check every kernel on this machine: each output and each gradient against float64, at odd sizes.

    python test_kernels.py     # prints a table; exit status 1 if anything fails
    pytest test_kernels.py     # the same checks as tests

With a GPU the Triton kernels run compiled. Without one they run in Triton's interpreter, on the
CPU. Their torch twins are checked on the CPU. Outputs start as NaN, so an element that is not
written is seen.

A check is a function (shape, dtype, backend) that returns the errors of all outputs by name. CHECKS
lists them; a new kernel gets one.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when the kernels import it
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set

import pytest

from kernels import decode, encode, sum_by_latent

# the modules, whose names the functions of the same names hide
ADAM = sys.modules["kernels.adam"]
BATCH_TOPK = sys.modules["kernels.batch_topk"]
DECODE = sys.modules["kernels.decode"]
ENCODE = sys.modules["kernels.encode"]
GRAD = sys.modules["kernels.grad"]
TOPK = sys.modules["kernels.topk"]

BACKENDS = ["torch"] if GRAD.triton is None else ["torch", "triton"]

# where `torch_<name>` and `triton_<name>` are
MODULE_OF = {
    "topk": TOPK,
    "keep_largest": BATCH_TOPK,
    "gather_sum": DECODE,
    "gather_dot": DECODE,
    "decode_error": DECODE,
    "sum_by_latent": GRAD,
    "squared_norm": ADAM,
    "sum_over": ADAM,
    "update_rows": ADAM,
}

# the largest error, as a fraction of the largest element: an output is rounded about twice
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

Shape = tuple[int, int, int, int]
"""N, d, M, k"""

Errors = dict[str, float]
"""The error of each output, by its name."""

SHAPES: dict[str, Shape] = {
    "odd": (5, 7, 11, 3),
    "one vector, k = 1": (1, 33, 17, 1),
    "k = M": (6, 130, 9, 9),
    "one past the blocks": (9, 257, 40, 5),
    "k past one block": (3, 19, 70, 37),
    "repeated latents": (13, 24, 3, 6),
}


class LargeCase(NamedTuple):
    """A shape that is slow in the interpreter, so it is for the kernels that it is about."""

    shape: Shape
    kernels: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


LARGE = {
    "many columns": LargeCase((2, 20, 4500, 3), ("topk", "keep_largest"), tuple(TOLERANCE)),
    "k = 512": LargeCase(
        (2, 20, 4501, 512),
        ("topk", "keep_largest", "decode_error"),
        (torch.float32, torch.bfloat16),
    ),
    "k = M = 512": LargeCase(
        (2, 20, 512, 512), ("topk", "decode_error", "decode", "encode"), (torch.float32,)
    ),
    "2^16 + 1 columns": LargeCase((2, 1, 65_537, 33), ("topk",), (torch.float32,)),
    "2^20 columns": LargeCase((1, 1, 1 << 20, 100), ("topk",), (torch.bfloat16,)),
}


# ---- what the checks share ----


def twin(name: str, backend: str) -> Callable:
    """Return a kernel's launcher ("triton") or its torch twin ("torch")."""
    return getattr(MODULE_OF[name], f"{backend}_{name}")


def device_of(backend: str) -> str:
    """Return where a backend is checked."""
    if backend == "triton" and torch.cuda.is_available():
        return "cuda"
    return "cpu"


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Make the public functions use a backend, where else they choose by device.

    Meanwhile new_empty gives tensors full of NaN.
    """
    new_empty = Tensor.new_empty

    def new_nan(self: Tensor, *shape, **options) -> Tensor:
        out = new_empty(self, *shape, **options)
        return out.fill_(float("nan") if out.is_floating_point() else 0)

    with ExitStack() as stack:
        for name in ("gather_sum", "gather_dot", "sum_by_latent"):
            stack.enter_context(patch.object(DECODE, name, twin(name, backend)))
        for name in ("gather_sum", "sum_by_latent", "topk"):
            stack.enter_context(patch.object(ENCODE, name, twin(name, backend)))
        stack.enter_context(patch.object(Tensor, "new_empty", new_nan))
        yield


def error(result: Tensor, expected: Tensor) -> float:
    """Return the largest difference, divided by the largest expected element. It is NaN if there is
    NaN anywhere."""
    assert result.shape == expected.shape
    difference = (result.double() - expected).abs().max()
    return (difference / expected.abs().max().clamp_min(1e-30)).item()


def differs(result: Tensor, expected: Tensor) -> float:
    """Return 0 if all elements are the same, else infinity."""
    return 0.0 if torch.equal(result.double(), expected.double()) else math.inf


def nan_as_infinity(value: float) -> float:
    """Return the number, or infinity for NaN, so that max() does not pass over it."""
    return math.inf if math.isnan(value) else value


def worst(errors: Iterable[float]) -> float:
    """Return the largest error; NaN is larger than any."""
    return max(errors, key=nan_as_infinity)


class Problem(NamedTuple):
    """Random inputs of all checks, of one dtype."""

    x: Tensor
    """(N, d)"""

    W: Tensor
    """(M, d)"""

    b: Tensor
    """(d,)"""

    acts: Tensor
    """(N, k): the second half of the first row is 0, and so is the last row if there are several"""

    indices: Tensor
    """(N, k) int64, distinct in a row where M allows"""


def random_problem(shape: Shape, dtype: torch.dtype, backend: str) -> Problem:
    """Draw the inputs from a fixed seed, on the backend's device."""
    N, d, M, k = shape
    generator = torch.Generator().manual_seed(0)
    device = device_of(backend)
    x = torch.randn(N, d, generator=generator).to(device, dtype)
    W = torch.randn(M, d, generator=generator).to(device, dtype)
    b = torch.randn(d, generator=generator).to(device, dtype)
    acts = torch.randn(N, k, generator=generator).to(device, dtype)
    acts[0, (k + 1) // 2 :] = 0
    if N > 1:
        acts[-1] = 0
    if k <= M:
        indices = torch.rand(N, M, generator=generator).topk(k).indices
    else:
        indices = torch.randint(M, (N, k), generator=generator)
    return Problem(x, W, b, acts, indices.to(device))


def dense(weights: Tensor, indices: Tensor, M: int) -> Tensor:
    """Return S (N, M), where S[n, m] is the sum of weights[n, j] with indices[n, j] = m."""
    S = torch.zeros(len(weights), M, dtype=weights.dtype, device=weights.device)
    return S.scatter_add(1, indices, weights)


def with_gradients(*tensors: Tensor) -> list[Tensor]:
    """Return copies that get gradients."""
    return [tensor.clone().requires_grad_() for tensor in tensors]


def in_float64(*tensors: Tensor) -> list[Tensor]:
    """Return copies in float64 that get gradients."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def gradient_errors(names: tuple[str, ...], inputs: list[Tensor], exact: list[Tensor]) -> Errors:
    """Return the error of each input's gradient."""
    errors = {}
    for name, tensor, reference in zip(names, inputs, exact):
        errors[name] = error(tensor.grad, reference.grad)
    return errors


# ---- the checks ----


def check_sum_by_latent(shape: Shape, dtype: torch.dtype, backend: str) -> Errors:
    x, W, _, weights, indices = random_problem(shape, dtype, backend)
    M = len(W)
    with using(backend):
        dW, db = twin("sum_by_latent", backend)(weights, indices, x, M)
        order, ends = GRAD.sort_pairs(indices, M)
        sums = GRAD.totals(weights.flatten()[order], ends)

    S = dense(weights.double(), indices, M)
    latents = indices.flatten().cpu().tolist()
    expected_order = sorted(range(len(latents)), key=lambda pair: latents[pair])  # it is stable
    expected_ends = [sum(latent < m for latent in latents) for m in range(M + 1)]
    wrong_order = differs(order.cpu(), torch.tensor(expected_order))
    wrong_ends = differs(ends.cpu(), torch.tensor(expected_ends))
    return {
        "dW": error(dW, S.T @ x.double()),
        "db": error(db, S.sum(0)),
        "totals": error(sums, S.sum(0)),
        "sort_pairs": worst([wrong_order, wrong_ends]),
    }


def check_decode(shape: Shape, dtype: torch.dtype, backend: str) -> Errors:
    d_x_hat, W, b, acts, indices = random_problem(shape, dtype, backend)
    inputs = with_gradients(acts, W, b)
    with using(backend):
        x_hat = decode(inputs[0], indices, inputs[1], inputs[2])
        x_hat.backward(d_x_hat)

    exact = in_float64(*inputs)
    acts, W, b = exact
    expected = dense(acts, indices, len(W)) @ W + b
    expected.backward(d_x_hat.double())
    errors = {"x_hat": error(x_hat, expected)}
    errors.update(gradient_errors(("d top_acts", "d W_dec", "d b_dec"), inputs, exact))
    return errors


def check_encode(shape: Shape, dtype: torch.dtype, backend: str) -> Errors:
    """The first two latents tie in every row. The last vector has no positive pre_act, and others
    have fewer than k."""
    x, W, b_dec, acts, _ = random_problem(shape, dtype, backend)
    k = min(shape[3], shape[2])
    d_top_acts = acts[:, :k] + 1
    b_enc = -0.1 - W[:, 0].abs()
    W[1] = W[0]
    if len(x) > 1:
        x[-1] = b_dec
    inputs = with_gradients(x, W, b_enc, b_dec)
    with using(backend):
        top_acts, top_indices = encode(*inputs, k)
        top_acts.backward(d_top_acts)

    exact = in_float64(*inputs)
    x, W, b_enc, b_dec = exact
    pre_acts = torch.relu((x - b_dec) @ W.T + b_enc)
    selected = pre_acts.gather(1, top_indices) * (top_acts > 0)
    selected.backward(d_top_acts.double())
    largest = pre_acts.topk(k, sorted=True).values.flip(1)
    errors = {
        "top_acts": error(top_acts, selected),
        "k largest": error(selected.sort().values, largest),
    }
    errors.update(gradient_errors(("d x", "d W_enc", "d b_enc", "d b_dec"), inputs, exact))
    return errors


def check_topk(shape: Shape, dtype: torch.dtype, backend: str) -> Errors:
    """Which numbers are selected, and which of equal ones: in random rows, in rows with few values,
    in rows with too few positive numbers, and in rows with none."""
    N, _, M, k = shape
    k = min(k, M)
    generator = torch.Generator().manual_seed(0)
    kinds = [
        torch.randn(N, M, generator=generator),
        torch.randint(-2, 3, (N, M), generator=generator).float(),
        torch.randn(N, M, generator=generator) - 2,
        -torch.rand(N, M, generator=generator),
    ]
    if M >= 1 << 17:
        kinds = kinds[:1]  # a row of 2^20 columns takes 4 s

    errors = []
    for rows in kinds:
        rows = rows.to(device_of(backend), dtype)
        with using(backend):
            top_acts, top_indices = twin("topk", backend)(rows, k)
        expected = rows.double().relu().sort(dim=1, descending=True, stable=True)
        expected_acts, expected_indices = expected.values[:, :k], expected.indices[:, :k]

        sorted_acts = top_acts.double().sort(dim=1, descending=True).values
        errors.append(differs(sorted_acts, expected_acts))
        # which columns are active: equal masks, and no column twice
        mask = torch.zeros_like(rows, dtype=torch.bool)
        active = mask.scatter(1, top_indices, top_acts > 0)
        should = mask.scatter(1, expected_indices, expected_acts > 0)
        errors.append(differs(active, should))
        errors.append(differs((top_acts > 0).sum(), should.sum()))
    return {"top_acts": worst(errors)}


def check_keep_largest(shape: Shape, dtype: torch.dtype, backend: str) -> Errors:
    """Which numbers are kept: of random ones, of few values, of numbers a hair apart, where fewer
    are positive than are to be kept, and where none is."""
    N, _, M, k = shape
    generator = torch.Generator().manual_seed(0)
    few_values = torch.randint(0, 3, (N, M), generator=generator)
    kinds = [
        torch.randn(N, M, generator=generator),
        torch.randn(N, M, generator=generator) - 2,
        few_values.float(),
        1 + few_values * 2.0**-20,
        torch.zeros(N, M),
    ]
    errors = []
    for acts in kinds:
        acts = acts.relu().to(device_of(backend), dtype)
        largest = acts.double().flatten().sort(descending=True, stable=True)
        num_positive = int((acts > 0).sum())
        for count in (1, min(N * k, N * M), N * M):
            with using(backend):
                kept, least = twin("keep_largest", backend)(acts, count)
            expected = torch.zeros_like(largest.values)
            expected[largest.indices[:count]] = largest.values[:count]
            errors.append(differs(kept, expected.view(N, M)))

            num_kept = min(count, num_positive)
            expected_least = largest.values[num_kept - 1] if num_kept else torch.zeros(())
            errors.append(differs(least, expected_least.to(least.device)))
    return {"kept": worst(errors)}


def check_decode_error(shape: Shape, dtype: torch.dtype, backend: str) -> Errors:
    x, W, b, acts, indices = random_problem(shape, dtype, backend)
    acts = acts.relu()
    with using(backend):
        e, d_acts = twin("decode_error", backend)(x, acts, indices, W, b)

    x, W, b, acts = x.double(), W.double(), b.double(), acts.double()
    expected = dense(acts, indices, len(W)) @ W + b - x
    expected_d_acts = (expected @ W.T).gather(1, indices) * (acts > 0)
    return {"e": error(e, expected), "d_acts": error(d_acts, expected_d_acts)}


class TwoAlike:
    """Stands for a `distributed.Group` of two processes that have the same numbers."""

    def sum(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class AdamReference:
    """What `update_rows` does, in float64, on the gradient as a matrix."""

    lr = 0.01
    clip = 1.5

    def __init__(self, W: Tensor, unit_norm: bool):
        self.W = W.double()
        self.exp_avg = torch.zeros_like(self.W)
        self.exp_avg_sq = torch.zeros_like(self.W)
        self.unit_norm = unit_norm
        self.step_count = 0

    def step(self, gradient: Tensor, along: Tensor | None) -> Tensor:
        """Make one step, and return the square of the projected gradient's norm."""
        self.step_count += 1
        g = gradient
        if self.unit_norm:
            g = g - along[:, None] * self.W
        squared_norm = g.square().sum()

        g = g / self.clip
        self.exp_avg = 0.9 * self.exp_avg + 0.1 * g
        self.exp_avg_sq = 0.999 * self.exp_avg_sq + 0.001 * g * g
        first = self.exp_avg / (1 - 0.9**self.step_count)
        second = self.exp_avg_sq / (1 - 0.999**self.step_count)
        self.W = self.W - self.lr * first / (second.sqrt() + ADAM.EPS)
        if self.unit_norm:
            self.W = self.W / self.W.norm(dim=1, keepdim=True)
        return squared_norm


def check_adam(shape: Shape, dtype: torch.dtype, backend: str) -> Errors:
    """Two steps: alone, with unit norm, and with unit norm over two processes."""
    plain = adam_errors(shape, dtype, backend, unit_norm=False, two_processes=False)
    unit = adam_errors(shape, dtype, backend, unit_norm=True, two_processes=False)
    both = adam_errors(shape, dtype, backend, unit_norm=True, two_processes=True)
    return {name: worst([plain[name], unit[name], both[name]]) for name in plain}


def adam_errors(
    shape: Shape, dtype: torch.dtype, backend: str, unit_norm: bool, two_processes: bool
) -> Errors:
    """Make two steps, the second one without dense rows. All is float32 but the copy, whose dtype
    is `dtype`."""
    x, W, _, weights, indices = random_problem(shape, torch.float32, backend)
    M, k = len(W), indices.shape[1]
    W = W / W.norm(dim=1, keepdim=True)
    copy = W.to(dtype, copy=True)
    exp_avg, exp_avg_sq = torch.zeros_like(W), torch.zeros_like(W)
    reference = AdamReference(W, unit_norm)
    clip = torch.tensor(reference.clip, device=W.device)

    # the gradient of the pairs, and the same with dense rows added
    order, ends = GRAD.sort_pairs(indices, M)
    pairs = GRAD.Gradient(weights.flatten()[order], order // k, ends, x)
    pair_sums = dense(weights.double(), indices, M).T @ x.double()
    rows = torch.arange(0, M, 3, device=W.device)
    all_sums = pair_sums.index_add(0, rows, W[rows].double() + 1)
    dense_rows = (all_sums - pair_sums)[rows].float()

    norm_errors = []
    for step, expected_gradient in ((1, all_sums), (2, pair_sums)):
        gradient = pairs
        if step == 1:
            gradient = pairs._replace(rows=rows, dense=dense_rows)
        along = along_float64 = None
        if unit_norm:
            along_float64 = (expected_gradient * W.double()).sum(1)
            along = along_float64.float()

        with using(backend):
            if two_processes:
                gradient = sum_of_two_halves(gradient, backend, out=torch.full_like(W, torch.nan))
            norm = twin("squared_norm", backend)(gradient, along)
            step_tensor = torch.tensor(float(step), device=W.device)
            twin("update_rows", backend)(
                W, gradient, exp_avg, exp_avg_sq, step_tensor, reference.lr, clip, along, copy
            )
        norm_errors.append(error(norm, reference.step(expected_gradient, along_float64)))

    copy_error = error(copy, reference.W)
    if dtype != torch.float32:
        copy_error *= tolerance("adam", torch.float32) / TOLERANCE[dtype]  # all else is float32
    return {
        "norm": worst(norm_errors),
        "W": error(W, reference.W),
        "exp_avg": error(exp_avg, reference.exp_avg),
        "exp_avg_sq": error(exp_avg_sq, reference.exp_avg_sq),
        "copy": copy_error,
    }


def sum_of_two_halves(gradient: GRAD.Gradient, backend: str, out: Tensor) -> GRAD.Gradient:
    """Return the same gradient as the sum over two processes, each of which has half of it."""
    half = gradient._replace(weights=gradient.weights / 2)
    if gradient.dense is not None:
        half = half._replace(dense=gradient.dense / 2)
    return twin("sum_over", backend)(TwoAlike(), half, out)


CHECKS: dict[str, Callable[[Shape, torch.dtype, str], Errors]] = {
    "topk": check_topk,
    "keep_largest": check_keep_largest,
    "decode_error": check_decode_error,
    "adam": check_adam,
    "sum_by_latent": check_sum_by_latent,
    "decode": check_decode,
    "encode": check_encode,
}


def tolerance(name: str, dtype: torch.dtype) -> float:
    """Return the largest error that a check may have."""
    if name in ("topk", "keep_largest"):
        return 0.0  # they are exact
    if name == "adam":
        return 2e-5  # it is float32 whatever the dtype, which is that of the copy
    if name == "encode" and dtype != torch.float32:
        return 4 * TOLERANCE[dtype]  # x - b_dec is rounded before the product
    return TOLERANCE[dtype]


class Case(NamedTuple):
    """One line of the table."""

    name: str
    """A key of CHECKS."""

    backend: str
    """One of BACKENDS."""

    title: str
    """What the shape is called in the table."""

    shape: Shape
    dtype: torch.dtype


def cases() -> list[Case]:
    """Return every check on every backend, shape and dtype."""
    every = []
    for name in CHECKS:
        for backend in BACKENDS:
            for title, shape in SHAPES.items():
                for dtype in TOLERANCE:
                    every.append(Case(name, backend, title, shape, dtype))
            for title, large in LARGE.items():
                if name in large.kernels:
                    for dtype in large.dtypes:
                        every.append(Case(name, backend, title, large.shape, dtype))
    return every


def name_of_argument(value: object) -> str:
    """Return how pytest shows an argument."""
    return str(value).removeprefix("torch.")


# ---- the tests ----


@pytest.mark.parametrize("name, backend, title, shape, dtype", cases(), ids=name_of_argument)
def test_kernel(name, backend, title, shape, dtype):
    errors = CHECKS[name](shape, dtype, backend)
    assert all(value <= tolerance(name, dtype) for value in errors.values()), errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_pairs_of_one_latent_are_added_in_float32(backend, dtype):
    """In bfloat16 a sum of ones would end at 256, in float16 at 2048."""
    x = torch.ones(4100, 3, dtype=dtype, device=device_of(backend))
    weights, indices = x[:, :1], x[:, :1].long()  # all pairs belong to latent 1
    dW, db = twin("sum_by_latent", backend)(weights, indices, x, 2)
    expected = torch.tensor([0, 4100], device=x.device).to(dtype)
    assert torch.equal(db, expected)
    assert torch.equal(dW, expected[:, None].expand(2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    x, W, _, weights, indices = random_problem((200, 40, 6, 3), torch.float32, backend)
    first_dW, first_db = twin("sum_by_latent", backend)(weights, indices, x, len(W))
    for _ in range(2):
        dW, db = twin("sum_by_latent", backend)(weights, indices, x, len(W))
        assert torch.equal(dW, first_dW)
        assert torch.equal(db, first_db)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_activations_have_no_gradient(backend):
    x, W, b_dec, d_top_acts, _ = random_problem((4, 8, 12, 5), torch.float32, backend)
    b_enc = torch.full_like(W[:, 0], -100.0)
    inputs = with_gradients(x, W, b_enc, b_dec)
    with using(backend):
        top_acts, _ = encode(*inputs, 5)
        top_acts.backward(d_top_acts)
    assert not top_acts.any()
    assert not any(tensor.grad.any() for tensor in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_past_two_to_the_31_numbers(backend):
    """W has 4.3 GB; of these a CPU needs only the pages that are touched."""
    device = device_of(backend)
    last, d = 1 << 20, 2053
    W = torch.empty(last + 1, d, dtype=torch.bfloat16, device=device)
    W[last], W[1] = 1, 2
    indices = torch.tensor([[last, 1]], device=device)
    weights = torch.tensor([[3, 0]], dtype=W.dtype, device=device)
    ones = W[:1] * 0 + 1
    ends = torch.tensor([0, 1, 2], device=device)
    gradient = GRAD.Gradient(weights.flatten(), indices.flatten(), ends, W)
    with using(backend):
        sums = twin("gather_sum", backend)(weights, indices, W)
        dots = twin("gather_dot", backend)(ones, indices, W)
        e, d_acts = twin("decode_error", backend)(W[last:], weights, indices, W, W[1])
        norm = twin("squared_norm", backend)(gradient)

    assert (sums == 3).all()
    assert dots.tolist() == [[2048, 4096]]  # 2053 and 4106 in bfloat16
    assert (e == 4).all()
    assert d_acts.tolist() == [[8192, 0]]
    assert norm.item() == pytest.approx(9 * d, rel=TOLERANCE[W.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_among_the_largest(backend):
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a GPU's 0 / 0
    rows = torch.arange(80.0).view(2, 40)
    rows[0, [5, 9]] = nan
    top_acts, top_indices = twin("topk", backend)(rows.to(device_of(backend)), 3)
    assert top_indices.sort().values.tolist() == [[5, 9, 39], [37, 38, 39]]
    assert top_acts[0].isnan().sum() == 2
    assert not top_acts[1].isnan().any()


def test_public_functions_on_the_cpu():
    x, W, b, acts, indices = random_problem((4, 8, 12, 5), torch.float32, "torch")
    S = dense(acts, indices, len(W))
    torch.testing.assert_close(decode(acts, indices, W, b), S @ W + b)
    torch.testing.assert_close(sum_by_latent(acts, indices, x, len(W))[0], S.T @ x)


# ---- the table ----


def main() -> int:
    """Print the largest error of every case. Returns the exit status: 1 if any is too large."""
    machine = "CPU; Triton in its interpreter"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    version = "absent" if GRAD.triton is None else GRAD.triton.__version__
    print(f"{machine}; torch {torch.__version__}, triton {version}\n")
    print(
        f"{'kernel':14} {'backend':8} {'case':19} {'N, d, M, k':>18}  {'dtype':9} "
        f"{'max rel error':>13}  of"
    )
    num_failed = 0
    for case in cases():
        errors = CHECKS[case.name](case.shape, case.dtype, case.backend)
        largest = worst(errors.values())
        worst_output = max(errors, key=lambda output: nan_as_infinity(errors[output]))
        passed = largest <= tolerance(case.name, case.dtype)
        num_failed += not passed
        sizes = ", ".join(str(size) for size in case.shape)
        dtype = name_of_argument(case.dtype)
        verdict = "pass" if passed else "FAIL"
        print(
            f"{case.name:14} {case.backend:8} {case.title:19} {sizes:>18}  {dtype:9} "
            f"{largest:13.1e}  {worst_output:10} {verdict}"
        )
    print(f"\n{num_failed} failed" if num_failed else "\nall pass")
    return int(num_failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
