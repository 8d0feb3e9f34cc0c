"""The edge every script shares: parse the options, turn a user's mistake into one line and status 2, resolve the device."""

import dataclasses
import os
import sys
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def run(main, Config):
    """Parse `Config` from the command line with tyro and call `main(cfg)`.

    A ValueError that this project's own code raises, and any OSError, is the user's to mend: one line on stderr, exit
    status 2, no traceback. Anything else is a bug and keeps its traceback. Ctrl-C exits with 130.
    """
    import tyro  # here, so that a script pasted into a notebook runs without it

    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # before it is imported: it complains of absent torchvision
    args = gather_lists(sys.argv[1:], Config)
    cfg = tyro.cli(Config, args=args, description=sys.modules["__main__"].__doc__, use_underscores=True)
    try:
        main(cfg)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        origin = traceback.extract_tb(error.__traceback__)[-1]
        ours = HERE in Path(origin.filename).resolve().parents and origin.line.startswith("raise ")
        if isinstance(error, ValueError) and not ours:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def gather_lists(args, Config):
    """`--k 16 --k 32` as `--k 16 32`, for options that are lists: repeating one appends."""
    lists = {
        f.name for f in dataclasses.fields(Config) if str(f.type).removeprefix("typing.").lower().startswith("list")
    }
    groups, last = {"": []}, ""  # in order: everything up to the next option belongs to the one before
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
    """`auto` is CUDA, else MPS, else the CPU; anything else is taken at its word. Raises ValueError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device}: expected auto, cuda, cuda:N, mps or cpu") from None
    if not available.get(resolved.type, True):
        raise ValueError(f"--device {device}: not available on this machine; use --device cpu")
    return resolved


def resolve_dtype(dtype, device):
    """`auto` is float32 on a CPU, where 16 bits are many times slower, else bfloat16, or float16 where that is not to be had."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16
