"""Compile every configuration that the launchers can choose, without a GPU, and print what each
takes of one.

    python -m bench registers                       # registers, stack (spilled bytes) and shared memory on four architectures

sm_75 (Colab's T4) is compiled for fp16, which it has, the others for bf16; the step itself is
float32 but for the product.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels  # noqa: F401  loads the modules below
from errors import UsageError

ADAM, DECODE, GRAD, THRESHOLD, TOPK = (
    sys.modules[f"kernels.{n}"] for n in ("adam", "decode", "grad", "batch_topk", "topk")
)
WIDTHS = (
    8,
    16,
    32,
    64,
    128,
    256,
    320,
    640,
    1280,
    2560,
    4096,
)  # of d, with every power of two among their blocks


@dataclass
class Config:
    archs: tuple[int, ...] = (75, 80, 90, 100)
    """Compute capabilities, ten times."""

    widths: tuple[int, ...] = WIDTHS
    """Of the vectors."""


def configurations(half, widths):
    """(kernel, {argument: type}, constants, num_warps) of all that can be launched."""
    f, i, n = "*fp32", "*i64", "i32"
    pairs = dict(weights=f, vectors=i, ends=i, x=f, dense_at=i, dense=f)
    for dtype in ("*fp32", half):
        for M in (16, 64, 256, 1024, 2048, 1 << 20):
            yield (
                TOPK.topk_kernel,
                dict(pre_acts=dtype, top_acts=dtype, top_indices=i, M=n, k=n),
                TOPK.topk_blocks(M),
            )
        digits, step = 2 if dtype == half else 4, dict(acts=dtype, table=i, n=n, count=n)
        for digit in range(digits):
            yield (
                THRESHOLD.histogram_kernel,
                step,
                THRESHOLD.KEEP | dict(STEP=digit, SHIFT=8 * (digits - 1 - digit)),
            )
        yield (
            THRESHOLD.count_kernel,
            step | dict(equals="*i32", least=dtype),
            THRESHOLD.KEEP | dict(STEP=digits),
        )
        yield (
            THRESHOLD.keep_kernel,
            dict(acts=dtype, found=i, ends=i, kept=dtype, n=n),
            THRESHOLD.KEEP,
        )
    for d in widths:
        gather = dict(top_indices=i, W=f, out=f, d=n, k=n)
        yield (
            DECODE.gather_sum_kernel,
            dict(weights=f, **gather),
            DECODE.GATHER_SUM | dict(BLOCK_D=DECODE.block_of_columns(d, 256)),
        )
        yield (
            DECODE.gather_dot_kernel,
            dict(x=f, **gather),
            DECODE.GATHER_DOT | dict(BLOCK_D=DECODE.block_of_columns(d, 128)),
        )
        fused = dict(x=f, top_acts=f, top_indices=i, W=f, b=f, e=f, d_acts=f, d=n, k=n)
        yield DECODE.decode_error_kernel, fused, DECODE.decode_error_blocks(d)
        summed = dict(weights=f, order=i, ends=i, x=f, dW=f, db=f, d=n, k=n)
        yield GRAD.sum_kernel, summed, dict(BLOCK_P=8, BLOCK_D=DECODE.block_of_columns(d, 256))
        for dense in (False, True):
            blocks = ADAM.row_blocks(d) | dict(DENSE=dense)
            yield ADAM.squared_norm_kernel, dict(**pairs, out=f, d=n), blocks
            yield ADAM.make_kernel, dict(**pairs, out=f, d=n), blocks
            for unit, copy in ((False, False), (True, False), (False, True)):
                state = dict(
                    W=f, exp_avg=f, exp_avg_sq=f, copy=half if copy else f, along=f, hyper=f
                )
                rest = dict(d=n, beta1="fp32", beta2="fp32", eps="fp32")
                yield (
                    ADAM.update_kernel,
                    dict(**state, **pairs, **rest),
                    blocks | dict(UNIT=unit, COPY=copy),
                )


def resources(cubin):
    """(registers, stack, shared) of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "SHARED"))


def main(cfg):
    if not hasattr(TOPK.topk_kernel, "cache_key"):
        raise UsageError("Triton runs in its interpreter; unset TRITON_INTERPRET")
    print(f"triton {triton.__version__}\n")
    print(f"{'arch':7} {'kernel':22} {'blocks':64}  regs stack shared")
    seen, spilled = set(), 0
    for arch in cfg.archs:
        for kernel, types, blocks in configurations("*fp16" if arch < 80 else "*bf16", cfg.widths):
            constants = {name: value for name, value in blocks.items() if name != "num_warps"}
            signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
            key = (arch, kernel.__name__, str(signature), str(blocks))
            if key in seen:
                continue
            seen.add(key)
            warps = blocks.get("num_warps", 4)
            source = ASTSource(
                kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}
            )
            compiled = triton.compile(
                source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}
            )
            registers, stack, _ = resources(compiled.asm["cubin"])
            spilled += stack > 0
            named = " ".join(f"{n}={int(v)}" for n, v in blocks.items())
            kinds = "/".join(
                sorted({t for t in types.values() if t in ("*fp16", "*bf16")})
            ).replace("*", "")
            line = f"sm_{arch:<4} {kernel.__name__:22} {named + ' ' + kinds:64}"
            print(f"{line} {registers:5} {stack:5} {compiled.metadata.shared:6}")
    print(f"\n{len(seen)} configurations, {spilled} with a stack")
    if spilled:
        raise SystemExit(1)
