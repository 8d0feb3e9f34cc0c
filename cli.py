"""The edge every script shares: parse the options, turn a user's mistake into one line and status
2, resolve the device."""

import dataclasses
import json
import os
import sys
import time
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Literal

import torch

from errors import UsageError

HERE = Path(__file__).resolve().parent
# what gloo, nccl and the store say where another process is there no more
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exit",
    "Connection was likely closed",
)


@dataclasses.dataclass
class GenerationConfig:
    """Options of every script that generates from prompts: which model, which prompts, how."""

    model_name: str = "toy"
    """A diffusers folder or hub id."""

    variant: str | None = None
    """Of the weights, such as fp16."""

    revision: str | None = None
    """Of the hub repository."""

    dataset_name: str | None = None
    """Prompt file, hub data set or one prompt (None: the model folder's prompts.csv)."""

    split: str = "train"
    """Of a hub data set."""

    column: str | None = None
    """That holds the prompt (None: prompt, caption or text)."""

    negative_prompt: str | None = None
    """A text for all, or the column that holds each one's (None: negative_prompt, if any)."""

    num_inference_steps: int | None = None
    """None: the pipeline's own default, as for the next three."""

    guidance_scale: float | None = None
    """Classifier-free guidance."""

    height: int | None = None
    """Pixels."""

    width: int | None = None
    """Pixels."""

    pipeline_kwargs: str = "{}"
    """JSON object: anything else that the pipeline takes."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of the model (auto: float32 on a CPU, else 16 bits)."""

    cpu_offload: bool = False
    """Keep only the running component on the GPU."""

    seed: int = 0
    """Row i is generated with seed + i; where the data set has a column seed, with what that
    says."""

    device: str = "auto"
    """Auto (cuda, else mps, else cpu), cuda:1, ..."""

    def pipeline_options(self) -> dict:
        """The pipeline's arguments that have an option of their own; None is the pipeline's own
        default."""
        return {
            name: getattr(self, name)
            for name in ("num_inference_steps", "guidance_scale", "height", "width")
        }


def answer_help(Config):
    pass


def run(main, Config):
    """Parse `Config` from the command line with tyro and call `main(cfg)`.

    A UsageError, and any OSError, is the user's to mend: one line on stderr, exit status 2, no
    traceback; so is what torch.distributed says when another process has ended. Anything else is a
    bug and keeps its traceback. Ctrl-C exits with 130. Of the processes of torchrun only the first
    prints, and those that fail say which they are.
    """
    check_system()
    import tyro  # here, so that what imports another function of this file does not wait for it

    rank, count = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # before it is imported: it complains of absent torchvision
    args = gather_lists(sys.argv[1:], Config)
    program = Path(sys.argv[0]).name
    description = sys.modules["__main__"].__doc__
    try:
        with redirect_stderr(sys.stdout) if rank else nullcontext():
            cfg = tyro.cli(
                Config, args=args, prog=program, description=description, use_underscores=True
            )
    except SystemExit:
        time.sleep(3 if rank else 0)  # as below
        raise
    try:
        check_numbers(cfg)
        main(cfg)
    except KeyboardInterrupt as error:
        if not rank:
            print(": ".join(["\ninterrupted", *filter(None, [str(error)])]), file=sys.stderr)
        raise SystemExit(130) from None
    except (UsageError, OSError, RuntimeError) as error:
        said = " ".join(str(error).split())
        gone = (
            count > 1
            and isinstance(error, RuntimeError)
            and any(words in said for words in PEER_GONE)
        )
        if not gone and isinstance(error, RuntimeError):
            raise
        if rank:
            time.sleep(3)  # what the first one meets too it says, and torchrun then ends the others
        who = f" (process {rank} of {count})" if count > 1 else ""
        said = "another process ended; the same command resumes" if gone else said
        print(f"{program}{who}: error: {said}", file=sys.stderr)
        raise SystemExit(2) from None


def check_system():
    """Say on Windows that it is not supported, and exit with status 2: files are written by
    os.pwrite, which it does not have."""
    if sys.platform == "win32":
        program = Path(sys.argv[0]).name
        print(
            f"{program}: error: Windows is not supported; run this in WSL (wsl --install)",
            file=sys.stderr,
        )
        raise SystemExit(2)


def gather_lists(args, Config):
    """`--k 16 --k 32` as `--k 16 32`, for options that are lists: repeating one appends."""
    lists = {
        f.name
        for f in dataclasses.fields(Config)
        if str(f.type).removeprefix("typing.").lower().startswith("list")
    }
    groups, last = (
        {"": []},
        "",
    )  # in order: everything up to the next option belongs to the one before
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", "")
        key = name[2:].replace("-", "_")
        if not name:
            groups[last].append(arg)
            continue
        last = key if key in lists else f"{key} {i}"
        groups.setdefault(last, [name] if key in lists else [arg])
        if key in lists and equals:
            groups[last].append(value)
    return [arg for group in groups.values() for arg in group]


def resolve_device(device="auto"):
    """`auto` is CUDA, else MPS, else the CPU; else what is named. Of several processes on a machine
    each gets a GPU of its own, before it allocates anything. Raises UsageError for a device that
    can't be used."""
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here > 1 and device.startswith("cuda") and torch.cuda.is_available():
        if device != "cuda":
            raise UsageError(
                f"--device {device}: each of the {here} processes takes a GPU of its own; expected cuda"
            )
        if here > (gpus := torch.cuda.device_count()):
            raise UsageError(
                f"{here} processes for {gpus} GPU{'s' * (gpus > 1)}: lower --nproc_per_node, or use --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(
            f"--device {device}: not to be had on this machine; expected auto, cuda, cuda:N, mps or cpu"
        ) from None
    return torch.device(device)


def resolve_dtype(dtype, device):
    """`auto` is float32 on a CPU, where 16 bits are many times slower, else bfloat16, or float16
    where that is not to be had."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    return (
        torch.bfloat16
        if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float16
    )


def product_dtype(choice, device):
    """Of the encoder's product: auto is 16 bits on a GPU, and bfloat16 on a CPU that multiplies it
    by itself."""
    if choice == "auto" and device.type == "cpu":
        native = [
            getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()
            for name in ("avx512_bf16", "amx_tile")
        ]
        return torch.bfloat16 if any(native) else torch.float32
    named = {
        "auto": resolve_dtype("auto", device),
        "no": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    return named[choice]


def parse_object(text, option):
    """A JSON object given on the command line; UsageError if it is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{option} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{option}: expected a JSON object, got {text}")
    return value


def check_numbers(cfg):
    """UsageError for a number of any option that no tensor can hold: beyond float32's range or 64
    bits, infinite or NaN."""
    for name, value in vars(cfg).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not abs(number) < 3e38:
                raise UsageError(f"--{name} {number}: expected a finite float32 number")
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise UsageError(f"--{name} {number}: expected a number of at most 64 bits")


def check_positive(cfg, *names):
    """UsageError for an option below 1; None is left alone."""
    for name in names:
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise UsageError(f"--{name} {value}: expected at least 1")
