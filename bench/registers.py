"""What each kernel takes of a GPU: registers, spilled bytes and shared memory, without a GPU.

    python -m bench registers                       # four architectures, a few minutes
    python -m bench registers --archs 80 --widths 640

Claim: every configuration that the launchers can choose compiles without a spill for sm_75, sm_80,
sm_90 and sm_100. The exit status is 1 if one spills. No hardware is measured, so the numbers are
the same on every machine with the same version of Triton.

sm_75 (Colab's T4) is compiled for fp16, which it has, the others for bf16. The step itself is
float32, except for the product.

    arch      compute capability
    blocks    the kernel's compile-time constants, and the 16-bit type if it takes one
    regs      registers per thread
    stack     bytes per thread that did not fit into registers
    shared    bytes of shared memory per program
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels  # noqa: F401  loads the modules below
from errors import UsageError

# kernels/__init__ has functions with the names of some of its modules, so `from kernels import
# topk` would be the function
ADAM = sys.modules["kernels.adam"]
DECODE = sys.modules["kernels.decode"]
GRAD = sys.modules["kernels.grad"]
THRESHOLD = sys.modules["kernels.batch_topk"]
TOPK = sys.modules["kernels.topk"]

# d of the vectors; with every power of two among their blocks
WIDTHS = (8, 16, 32, 64, 128, 256, 320, 640, 1280, 2560, 4096)
NUM_LATENTS = (16, 64, 256, 1024, 2048, 1 << 20)

FLOATS = "*fp32"  # pointer to float32, as Triton spells types
INDICES = "*i64"
NUMBER = "i32"


@dataclass
class Config:
    archs: tuple[int, ...] = (75, 80, 90, 100)
    """Compile for these compute capabilities, times ten: 80 is an A100, 90 an H100."""

    widths: tuple[int, ...] = WIDTHS
    """Compile for vectors of these widths."""


class Configuration(NamedTuple):
    """One way in which a kernel can be launched."""

    kernel: Any
    """The function that @triton.jit decorates."""

    types: dict[str, str]
    """{argument: its type}, such as {"x": "*fp32", "n": "i32"}."""

    blocks: dict[str, Any]
    """The compile-time constants, and num_warps where it is not 4."""


def configurations(half: str, widths: tuple[int, ...]) -> Iterator[Configuration]:
    """Yield every configuration that can be launched; `half` is the 16-bit type of pointers."""
    for dtype in (FLOATS, half):
        yield from selection_kernels(dtype, half)
    for d in widths:
        yield from decoder_kernels(d)
        yield from update_kernels(d, half)


def selection_kernels(dtype: str, half: str) -> Iterator[Configuration]:
    """Yield the kernels that choose the largest activations, per vector and per batch."""
    types = {"pre_acts": dtype, "top_acts": dtype, "top_indices": INDICES, "M": NUMBER, "k": NUMBER}
    for M in NUM_LATENTS:
        yield Configuration(TOPK.topk_kernel, types, TOPK.topk_blocks(M))

    num_digits = 2 if dtype == half else 4  # bytes of a number, each a digit of the radix select
    types = {"acts": dtype, "table": INDICES, "n": NUMBER, "count": NUMBER}
    for digit in range(num_digits):
        constants = {"STEP": digit, "SHIFT": 8 * (num_digits - 1 - digit)}
        yield Configuration(THRESHOLD.histogram_kernel, types, THRESHOLD.KEEP | constants)

    types = types | {"equals": "*i32", "least": dtype}
    yield Configuration(THRESHOLD.count_kernel, types, THRESHOLD.KEEP | {"STEP": num_digits})

    types = {"acts": dtype, "found": INDICES, "ends": INDICES, "kept": dtype, "n": NUMBER}
    yield Configuration(THRESHOLD.keep_kernel, types, THRESHOLD.KEEP)


def decoder_kernels(d: int) -> Iterator[Configuration]:
    """Yield the kernels that gather and sum rows of the decoder, for vectors of width d."""
    gather = {"top_indices": INDICES, "W": FLOATS, "out": FLOATS, "d": NUMBER, "k": NUMBER}
    blocks = DECODE.GATHER_SUM | {"BLOCK_D": DECODE.block_of_columns(d, 256)}
    yield Configuration(DECODE.gather_sum_kernel, {"weights": FLOATS, **gather}, blocks)

    blocks = DECODE.GATHER_DOT | {"BLOCK_D": DECODE.block_of_columns(d, 128)}
    yield Configuration(DECODE.gather_dot_kernel, {"x": FLOATS, **gather}, blocks)

    types = dict.fromkeys(("x", "top_acts", "W", "b", "e", "d_acts"), FLOATS)
    types |= {"top_indices": INDICES, "d": NUMBER, "k": NUMBER}
    yield Configuration(DECODE.decode_error_kernel, types, DECODE.decode_error_blocks(d))

    types = dict.fromkeys(("weights", "x", "dW", "db"), FLOATS)
    types |= {"order": INDICES, "ends": INDICES, "d": NUMBER, "k": NUMBER}
    blocks = {"BLOCK_P": 8, "BLOCK_D": DECODE.block_of_columns(d, 256)}
    yield Configuration(GRAD.sum_kernel, types, blocks)


def update_kernels(d: int, half: str) -> Iterator[Configuration]:
    """Yield the kernels of the sparse gradient and of Adam, for rows of width d."""
    gradient = dict.fromkeys(("weights", "x", "dense"), FLOATS)
    gradient |= dict.fromkeys(("vectors", "ends", "dense_at"), INDICES)
    state = dict.fromkeys(("W", "exp_avg", "exp_avg_sq", "along", "hyper"), FLOATS)
    rates = {"d": NUMBER, "beta1": "fp32", "beta2": "fp32", "eps": "fp32"}

    for dense in (False, True):
        blocks = ADAM.row_blocks(d) | {"DENSE": dense}
        types = {**gradient, "out": FLOATS, "d": NUMBER}
        yield Configuration(ADAM.squared_norm_kernel, types, blocks)
        yield Configuration(ADAM.make_kernel, types, blocks)
        for unit, copy in ((False, False), (True, False), (False, True)):
            types = {**state, "copy": half if copy else FLOATS, **gradient, **rates}
            yield Configuration(ADAM.update_kernel, types, blocks | {"UNIT": unit, "COPY": copy})


def compile_for(arch: int, configuration: Configuration) -> Any:
    """Return the compiled kernel for a compute capability, times ten."""
    kernel, types, blocks = configuration
    constants = {}
    for name, value in blocks.items():
        if name != "num_warps":
            constants[(kernel.arg_names.index(name),)] = value
    source = ASTSource(kernel, signature_of(configuration), constants)
    options = {"num_warps": blocks.get("num_warps", 4)}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def signature_of(configuration: Configuration) -> dict[str, str]:
    """Return {argument: type} in the kernel's order; compile-time constants are "constexpr"."""
    kernel, types, _ = configuration
    return {name: types.get(name, "constexpr") for name in kernel.arg_names}


def read_resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers, bytes of stack) of a compiled kernel, by NVIDIA's cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    return int(registers[1]), int(stack[1])


def print_resources(arch: int, configuration: Configuration, half: str) -> int:
    """Compile a configuration and print its line; return its bytes of stack per thread."""
    kernel, types, blocks = configuration
    compiled = compile_for(arch, configuration)
    registers, stack = read_resources(compiled.asm["cubin"])
    words = [f"{name}={int(value)}" for name, value in blocks.items()]
    words.append(half.strip("*") if half in types.values() else "")
    print(
        f"sm_{arch:<4} {kernel.__name__:22} {' '.join(words):64} "
        f"{registers:5} {stack:5} {compiled.metadata.shared:6}"
    )
    return stack


def main(cfg: Config) -> None:
    """Print one line per configuration; exit with status 1 if one has a stack."""
    if not hasattr(TOPK.topk_kernel, "cache_key"):
        raise UsageError("Triton runs in its interpreter; unset TRITON_INTERPRET")
    print(f"triton {triton.__version__}\n")
    print(f"{'arch':7} {'kernel':22} {'blocks':64}  regs stack shared")

    seen = set()
    num_spilled = 0
    for arch in cfg.archs:
        half = "*fp16" if arch < 80 else "*bf16"
        for configuration in configurations(half, cfg.widths):
            kernel, _, blocks = configuration
            key = (arch, kernel.__name__, str(signature_of(configuration)), str(blocks))
            if key in seen:
                continue  # widths that share their blocks
            seen.add(key)
            if print_resources(arch, configuration, half) > 0:
                num_spilled += 1

    print(f"\n{len(seen)} configurations, {num_spilled} with a stack")
    if num_spilled > 0:
        raise SystemExit(1)
