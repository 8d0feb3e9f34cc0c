"""The edge that every script shares: its options, one line for a user's mistake, the device.

    if __name__ == "__main__":
        answer_help(Config)  # --help and a mistyped option, before torch is imported
    ...
    if __name__ == "__main__":
        run_script(main, Config)

Nothing here imports torch until a function needs it: that import takes seconds, and `--help` is
answered in a fraction of one.
"""

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from errors import UsageError
from options import default_of, parse

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent

STATUS_MISTAKE = 2
STATUS_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
STATUS_BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of our output, such as `head`, has ended

# What gloo, nccl and torch's store write when another process has ended
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exit",
    "Connection was likely closed",
)
# Seconds for which the other processes wait before they fail too. All of them meet a mistake at
# the same moment, and the first one to fail makes torchrun end the others: that must be process 0,
# which prints the line.
LET_FIRST_SPEAK = 3

LARGEST_FLOAT32 = 3e38

# Arguments of pipelines that have options of their own
PIPELINE_OPTIONS = ("num_inference_steps", "guidance_scale", "height", "width")


@dataclasses.dataclass
class GenerationConfig:
    """Options of every script that generates from prompts: which model, which prompts, how."""

    # model
    model_name: str = "toy"
    """Load this model: a diffusers folder, an id on the Hugging Face hub, a .safetensors file, or a
    Python file of yours whose function makes the model, such as my_model.py:build. toy is the small
    model of this project."""

    variant: str | None = None
    """Load this variant of the weight files, such as fp16. If not given, the plain files are
    loaded."""

    revision: str | None = None
    """Load this revision of the hub repository: a branch, a tag or a commit. If not given, its main
    branch is loaded."""

    lora: list[str] = dataclasses.field(default_factory=list)
    """Add these LoRAs to the weights: .safetensors files, or folders that hold one, with a scale
    behind a colon if you like, such as style.safetensors:0.8."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model of a folder or of the hub. Read it first: it
    can do all that you can."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Run the model in this precision. auto means float32 on a CPU; elsewhere it means bfloat16, or
    float16 on a GPU without bfloat16. A model of your own runs in what its function makes, unless
    the function takes dtype."""

    # data
    dataset_name: str | None = None
    """Take the prompts from this file or hub data set, or use this text as the one prompt. If not
    given, prompts.csv in the model's folder, or beside its file, is used. A pipeline without
    prompts needs none: it makes --max_num_examples samples."""

    split: str = "train"
    """Use this split of a hub data set."""

    column: str | None = None
    """Read the prompts from this column; a number in it becomes its text. If not given, it is the
    one called prompt, caption or text, or else the only column of texts."""

    negative_prompt: str | None = None
    """Use this negative prompt for all prompts. If a column has this name, its texts are used. If
    not given, the column negative_prompt is used where the data set has one."""

    inputs: list[str] = dataclasses.field(default_factory=list)
    """Give the pipeline these images: name=value, where the name is an argument of the pipeline,
    such as image or mask_image. The value is an image file (the same for all prompts), a folder
    (one image per prompt, in the order of their names) or a column of --dataset_name. Without
    --dataset_name the images of a folder are the rows, and the prompts are empty."""

    seed: int = 0
    """Generate image i, counted from 0, with seed + i. Leave this option out if the data set has a
    column seed."""

    # generation
    num_inference_steps: int | None = None
    """Sample in this many steps. Fewer are faster. If not given, the pipeline's default is used."""

    guidance_scale: float | None = None
    """Use this scale of classifier-free guidance. Raise it to follow the prompt more closely. If
    not given, the pipeline's default is used."""

    height: int | None = None
    """Make images of this height, in pixels. If not given, the pipeline's default is used."""

    width: int | None = None
    """Make images of this width, in pixels. If not given, the pipeline's default is used."""

    pipeline_kwargs: str = "{}"
    """Pass these arguments to the pipeline as well: a JSON object, such as '{"eta": 1.0}'."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""

    cpu_offload: bool = False
    """Keep only the component that is running on the GPU. This is slower; use it if the model does
    not fit."""

    def pipeline_options(self) -> dict[str, Any]:
        """Return the pipeline's arguments that have options of their own; None is the pipeline's
        default."""
        return {name: getattr(self, name) for name in PIPELINE_OPTIONS}


def answer_help(Config: type) -> None:
    """Read the command line once, only to answer `--help` or to refuse a mistyped option.

    Call it before torch is imported. `run_script` reads the command line again. In a notebook,
    where the page may have been pasted into a cell, it does nothing.
    """
    if not is_pasted(Config):
        read_options(Config)


def run_script(main: Callable[[Any], Any], Config: type) -> None:
    """Read the command line into a `Config` and call `main(cfg)`.

    A UsageError or an OSError is the user's to mend, and so is the end of another process of
    torchrun: each is one line on stderr and exit status 2, without a traceback. Any other error is
    a bug and keeps its traceback. Ctrl-C exits with status 130. Of the processes of torchrun only
    the first one prints. It does nothing if the script was pasted into a notebook's cell.
    """
    if is_pasted(Config):
        return

    cfg = read_options(Config)
    try:
        main(cfg)
        flush_output()
    except BrokenPipeError:
        leave_broken_pipe()
    except KeyboardInterrupt as interrupt:
        if is_first_process():
            reason = f": {interrupt}" if str(interrupt) else ""
            print(f"\ninterrupted{reason}", file=sys.stderr)
        raise SystemExit(STATUS_INTERRUPTED) from None
    except (UsageError, OSError) as error:
        fail(str(error))
    except RuntimeError as error:
        if not is_peer_gone(error):
            raise
        fail("another process ended; the same command resumes")


def is_pasted(Config: type) -> bool:
    """Return whether the class was defined in a notebook's cell, where IPython puts
    `get_ipython`."""
    return hasattr(sys.modules.get(Config.__module__), "get_ipython")


def is_first_process() -> bool:
    """Return True in process 0 of torchrun, and without torchrun."""
    return int(os.environ.get("RANK", 0)) == 0


def count_processes() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def program_name() -> str:
    """Return how the user called the program: `train.py`, or `python -m bench step`."""
    return Path(sys.argv[0]).name


def read_options(Config: type) -> Any:
    """Return the `Config` that sys.argv asks for; exit with one line if it can't be used."""
    # transformers complains of an absent torchvision when it is imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    check_system()

    if is_first_process():
        quiet = nullcontext()
    else:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        quiet = redirect_stderr(sys.stdout)

    try:
        with quiet:
            cfg = parse(Config, program_name(), sys.argv[1:])
    except SystemExit:
        flush_output()
        if not is_first_process():
            time.sleep(LET_FIRST_SPEAK)
        raise

    try:
        check_numbers(cfg)
    except UsageError as error:
        fail(str(error))
    return cfg


def fail(message: str) -> None:
    """Print one line on stderr and exit with status 2. Of several processes the first is
    fastest."""
    if not is_first_process():
        time.sleep(LET_FIRST_SPEAK)

    who = ""
    if count_processes() > 1:
        who = f" (process {os.environ.get('RANK', 0)} of {count_processes()})"
    one_line = " ".join(message.split())
    print(f"{program_name()}{who}: error: {one_line}", file=sys.stderr)
    raise SystemExit(STATUS_MISTAKE) from None


def is_peer_gone(error: RuntimeError) -> bool:
    """Return whether torch.distributed says by this error that another process has ended."""
    return count_processes() > 1 and any(words in str(error) for words in PEER_GONE)


def flush_output() -> None:
    """Write what is still buffered; exit quietly if nobody reads it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        leave_broken_pipe()


def leave_broken_pipe() -> None:
    """Exit quietly because nobody reads our output any more."""
    # Python flushes stdout when it exits, and would fail again
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(STATUS_BROKEN_PIPE) from None


def check_system() -> None:
    """Refuse Windows: files are written by os.pwrite, which it does not have."""
    if sys.platform == "win32":
        fail("Windows is not supported; run this in WSL (wsl --install)")


def resolve_device(device: str = "auto") -> "torch.device":
    """Return the device that an option names; `auto` is CUDA, else MPS, else the CPU.

    Each of several processes on a machine gets a GPU of its own, before it allocates anything.
    Raises UsageError for a device that this machine does not have, and if there are more processes
    than GPUs.
    """
    import torch

    if device == "auto":
        device = best_device()

    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if num_processes > 1 and device.startswith("cuda") and torch.cuda.is_available():
        take_own_gpu(device, num_processes)

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(
            f"--device {device}: this machine does not have it; "
            "expected auto, cuda, cuda:N, mps or cpu"
        ) from None
    return torch.device(device)


def best_device() -> str:
    """Return the fastest kind of device of this machine: cuda, mps or cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def take_own_gpu(device: str, num_processes: int) -> None:
    """Give this process of torchrun the GPU with the number of its local rank."""
    import torch

    if device != "cuda":
        raise UsageError(
            f"--device {device}: each of the {num_processes} processes takes a GPU of its own; "
            "expected cuda"
        )
    num_gpus = torch.cuda.device_count()
    if num_processes > num_gpus:
        gpus = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
        raise UsageError(
            f"{num_processes} processes for {gpus}: lower --nproc_per_node, or use --device cpu"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def resolve_dtype(choice: str, device: "torch.device") -> "torch.dtype":
    """Return the precision of a model.

    `auto` is float32 on a CPU, where 16 bits are many times slower; elsewhere it is bfloat16, or
    float16 on a GPU that has no bfloat16 of its own.
    """
    import torch

    if choice != "auto":
        return getattr(torch, choice)
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def product_dtype(choice: str, device: "torch.device") -> "torch.dtype":
    """Return the precision of the encoder's product, from `auto`, `no`, `bf16` or `fp16`.

    `auto` is 16 bits on a GPU, and bfloat16 on a CPU that has instructions for it.
    """
    import torch

    if choice == "no":
        return torch.float32
    if choice == "bf16":
        return torch.bfloat16
    if choice == "fp16":
        return torch.float16
    if device.type == "cpu" and multiplies_bfloat16():
        return torch.bfloat16
    return resolve_dtype("auto", device)


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16: AVX512-BF16 or AMX."""
    import torch

    for name in ("avx512_bf16", "amx_tile"):
        is_supported = getattr(torch.cpu, f"_is_{name}_supported", None)
        if is_supported is not None and is_supported():
            return True
    return False


def parse_object(text: str, option: str) -> dict:
    """Return the JSON object that an option was given. Raises UsageError if it is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{option} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{option}: expected a JSON object, got {text}")
    return value


def check_generation_options(cfg: Any) -> None:
    """Raise UsageError for an option of `GenerationConfig` that was given and that nothing reads.

    Such an option would be recorded beside the results, which it did not change. cfg: any dataclass
    with `dataset_name`, `model_name`, `device` and `pipeline_kwargs`; of the other options it may
    lack some.
    """
    if not is_hub_dataset(cfg.dataset_name):
        refuse_unused(cfg, ["split"], "only a data set of the hub has splits")
    if is_one_prompt(cfg.dataset_name):
        refuse_unused(cfg, ["column"], f"--dataset_name {cfg.dataset_name!r} is the prompt itself")
    if cfg.model_name is not None and is_local_model(cfg.model_name):
        refuse_unused(cfg, ["revision"], f"--model_name {cfg.model_name} is a folder")
    elif cfg.model_name is not None and re.search(r"\.safetensors$|\.py(:\w+)?$", cfg.model_name):
        unused = ["revision", "variant", "trust_remote_code"]
        refuse_unused(cfg, unused, f"--model_name {cfg.model_name} is a file")

    for name in parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs"):
        if name in PIPELINE_OPTIONS and getattr(cfg, name, None) is not None:
            raise UsageError(
                f"{name} is given twice: in --pipeline_kwargs and by an option of its own"
            )


def refuse_unused(cfg: Any, names: list[str], reason: str) -> None:
    """Raise UsageError if one of these options was given, because nothing would read it.

    An option counts as given if its value is not the default. A name that `cfg` does not have is
    passed over. reason: a clause, such as "only a data set of the hub has splits".
    """
    for field in dataclasses.fields(cfg):
        if field.name in names and getattr(cfg, field.name) != default_of(field):
            raise UsageError(f"--{field.name} has no effect: {reason}; leave the option out")


def is_hub_dataset(dataset_name: str | None) -> bool:
    """Return whether a name is one word that looks like owner/name and is no file of this
    machine."""
    if dataset_name is None or os.path.exists(dataset_name):
        return False
    return len(dataset_name.split()) == 1 and dataset_name.count("/") == 1


def is_one_prompt(dataset_name: str | None) -> bool:
    """Return whether a text is surely the prompt itself, and neither a file nor a data set.

    It is False for a name that ends like a file's, such as `my prompts.csv`: if there is no such
    file, `store.prompts` says so.
    """
    if dataset_name is None or os.path.exists(dataset_name):
        return False
    if re.search(r"\.\w+$", dataset_name):
        return False
    return len(dataset_name.split()) > 1 or "/" not in dataset_name


def is_local_model(model_name: str) -> bool:
    """Return whether the model is a folder: in the current folder, or beside this file, as the toy
    is."""
    return Path(model_name).is_dir() or (HERE / model_name).is_dir()


def check_numbers(cfg: Any) -> None:
    """Raise UsageError for a number that no tensor can hold: not finite, or beyond 64 bits."""
    for name, value in vars(cfg).items():
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, float) and not abs(number) < LARGEST_FLOAT32:
                raise UsageError(f"--{name} {number}: expected a finite float32 number")
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise UsageError(f"--{name} {number}: expected a number of at most 64 bits")


def check_positive(cfg: Any, *names: str) -> None:
    """Raise UsageError for an option below 1; None is left alone."""
    for name in names:
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: expected at least 1")
