"""Load a model: a folder or hub id of diffusers, a single file, a LoRA, or a user's Python file.

    load_pipeline("sd15", torch.float32)                # a pipeline of diffusers
    run_model_file("my_model.py:build", torch.float32, torch.device("cpu"))
    fuse_lora(pipe, "style.safetensors:0.8")            # into the weights; module names stay

Nothing is executed that the user did not name: a model file is run only where it is given as
`--model_name`, and code that lies in a diffusers folder only with `--trust_remote_code`.
`hook.HookedDiffusionModel.from_pretrained` is what calls this page.
"""

import hashlib
import importlib.util
import inspect
import re
import shlex
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from diffusion.signatures import takes_prompts
from errors import UsageError
from store.identity import pipeline_fingerprints
from store.inputs import load_rows, names_folder
from store.prompts import KINDS, default_dataset

PROJECT = Path(__file__).resolve().parents[1]
DEFAULT_FUNCTION = "build"  # of a model file
REMEDY = (
    "a model that diffusers loads in another way can be loaded by a Python file of yours, "
    "--model_name my_model.py (docs/models.md)"
)


# ------------------------------------------------------------------------------ names


def find_model(model_name: str) -> str:
    """Return the path of a model's folder or file, or a hub id as it is.

    A path is looked for from the current folder, then beside the scripts, so that the toy is found
    from anywhere. "my_model.py:build" gives "my_model.py". Raises UsageError for a name that is
    neither a path nor shaped like a hub id, and for a file of another kind.
    """
    name = str(model_name)
    file, _ = split_function(name)
    for path in (Path(file), PROJECT / file):
        if path.is_dir():
            return str(path)
        if path.is_file():
            if path.suffix not in (".py", ".safetensors"):
                raise UsageError(
                    f"--model_name {name}: expected a diffusers folder, a hub id, a .safetensors "
                    f"file, or a .py file whose function makes the model; {REMEDY}"
                )
            return str(path)
    if file.endswith((".py", ".safetensors")):
        raise UsageError(f"--model_name {name}: there is no file {file!r} here")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        missing = (
            f"no folder {name!r} here, and a hub id looks like owner/name; a model of your own is "
            "a file such as my_model.py"
        )
        if name == "toy":  # the default of the scripts
            missing += (
                "; the toy model lies in a checkout of the repository: run there, or give another "
                "model with --model_name"
            )
        raise UsageError(missing)
    return name


def default_prompts(model_name: str) -> str | None:
    """Return the file of prompts that a model's folder carries; None for a pipeline that takes no
    prompts, and for a Python file, whose model is asked later (`check_has_prompts`).

    A pipeline is asked by its class, so that no weights are loaded. Raises UsageError if it takes
    prompts, or its class is not known, and there is no file.
    """
    folder_or_id = find_model(model_name)
    try:
        return default_dataset(folder_or_id)
    except UsageError:
        if not is_model_file(model_name) and pipeline_takes_prompts(folder_or_id):
            raise
    return None


def load_prompt_rows(cfg: Any) -> list[dict]:
    """Return the prompts of a generation, with their images, as `store.inputs.load_rows` does.

    cfg: a `cli.GenerationConfig` with `max_num_examples`. Without --dataset_name and without a
    folder of images, they are the model's own, see `default_prompts`.
    """
    dataset_name = cfg.dataset_name
    if dataset_name is None and not names_folder(cfg.inputs):
        dataset_name = default_prompts(cfg.model_name)
    return load_rows(
        cfg.inputs,
        dataset_name,
        cfg.split,
        cfg.column,
        cfg.negative_prompt,
        cfg.max_num_examples,
    )


def check_has_prompts(pipe: Any, rows: list[dict]) -> None:
    """Raise UsageError if a pipeline takes prompts and no row has any, nor an image.

    rows: with "prompt" and perhaps "inputs"; they are empty if the user named no data set.
    """
    if takes_prompts(pipe) and not any(row["prompt"] or "inputs" in row for row in rows):
        raise UsageError(f"which prompts? --dataset_name takes {KINDS}")


def pipeline_takes_prompts(folder_or_id: str) -> bool:
    """Return whether the pipeline in a diffusers folder or behind a hub id takes prompts; True if
    its class is not known."""
    import diffusers  # takes seconds to import

    try:
        config = diffusers.DiffusionPipeline.load_config(folder_or_id)
    except (OSError, ValueError):
        return True
    pipeline = getattr(diffusers, config.get("_class_name", ""), None)
    return pipeline is None or takes_prompts(pipeline.__call__)


def split_function(model_name: str) -> tuple[str, str | None]:
    """Return (path, the name of its function) of a model file: "my_model.py:make" gives
    ("my_model.py", "make"), and "my_model.py" ("my_model.py", "build").

    For the name of anything else it gives (name, None).
    """
    match = re.fullmatch(r"(.+\.py)(?::([^\W\d]\w*))?", str(model_name))
    if match is None or Path(model_name).is_dir():
        return str(model_name), None
    return match[1], match[2] or DEFAULT_FUNCTION


def is_model_file(model_name: str) -> bool:
    """Return whether a name means a Python file whose function makes the model."""
    return split_function(model_name)[1] is not None


# ------------------------------------------------------------------------------ a model file


class OwnModel(NamedTuple):
    """What the function of a model file made."""

    made: Any

    taken: set[str]
    """Which of "dtype" and "device" the function takes."""

    files: dict[str, str]
    """{file: sha256} of the model file and of the modules that it imported from its folder."""


def run_model_file(model_name: str, dtype: torch.dtype, device: torch.device) -> OwnModel:
    """Run a model file, call its function, and return what that made.

    The function gets those of `dtype` and `device` that it takes. Raises UsageError where the file
    or the function fails; the message names the line of the user's code.
    """
    name, function = split_function(model_name)
    path = Path(find_model(name)).resolve()
    with ModulesBeside(path.parent) as modules:
        try:
            module = run_file(path)
            if not callable(getattr(module, function, None)):
                raise UsageError(
                    f"{path.name} has no function {function}(); name it with {path.name}:NAME"
                )
            made, taken = call_build(getattr(module, function), dtype, device)
        except (Exception, SystemExit) as error:
            place = place_of(error, path, modules)
            message = str(error)
            if not isinstance(error, UsageError):
                message = f"{type(error).__name__}: {message}"
            raise UsageError(f"{model_name}: {place}{message}") from error
        files = {path, *modules.imported().values()}
    digests = {}
    for file in sorted(files):
        digests[file.relative_to(path.parent).as_posix()] = digest_of(file)
    return OwnModel(made, taken, digests)


def run_file(path: Path) -> Any:
    """Run a Python file as a module, and return the module.

    The source itself is run, since compiled code in __pycache__ may be that of an older file which
    had the same size and time.
    """
    name = path.stem
    if name in sys.modules:
        name = f"{name}_model_file"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name] = module  # classes look up the module that they are defined in
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return module


def call_build(build: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, set[str]]:
    """Call the function of a model file with those of `dtype` and `device` that it takes; return
    (what it made, the names of these)."""
    signature = inspect.signature(build)
    options = {"dtype": dtype, "device": device}
    taken = {name: value for name, value in options.items() if name in signature.parameters}
    try:
        signature.bind(**taken)
    except TypeError as error:
        raise UsageError(
            f"{build.__name__}{signature}: {error}; it is called with dtype and device, if it "
            "takes them, and with nothing else"
        ) from None
    return build(**taken), set(taken)


class ModulesBeside:
    """While it is open, a model file can import the modules that lie in its folder.

    They come before modules of this project that have the same name, such as `train`; afterwards
    such a name means ours again. The next model file imports its modules anew, so that it gets no
    other file's, and none that has changed since.
    """

    from_earlier: list[str] = []  # names of modules that earlier model files imported

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> "ModulesBeside":
        while self.from_earlier:
            sys.modules.pop(self.from_earlier.pop(), None)
        beside = {path.stem for path in self.folder.glob("*.py")}
        beside |= {path.parent.name for path in self.folder.glob("*/__init__.py")}
        self.ours = {}
        for name, module in list(sys.modules.items()):
            if is_projects(module, self.folder) and name.partition(".")[0] in beside:
                self.ours[name] = sys.modules.pop(name)
        self.known = {name.partition(".")[0] for name in sys.modules}
        self.known_files = {file_of(module) for module in list(sys.modules.values())}
        sys.path.insert(0, str(self.folder))
        return self

    def __exit__(self, *_) -> None:
        sys.path.remove(str(self.folder))
        for name in self.imported():
            top = name.partition(".")[0]
            has_our_name = (PROJECT / f"{top}.py").exists() or (PROJECT / top).is_dir()
            if has_our_name and self.folder != PROJECT:
                del sys.modules[name]
            else:
                self.from_earlier.append(name)
        sys.modules.update(self.ours)

    def holds(self, file: Path) -> bool:
        """Return whether a file lies in the folder, and was not imported before."""
        is_below = self.folder in file.parents and "site-packages" not in file.parts
        return is_below and file not in self.known_files

    def imported(self) -> dict[str, Path]:
        """Return {name: file} of the modules that were imported from the folder."""
        files = {}
        for name, module in list(sys.modules.items()):
            is_new = name.partition(".")[0] not in self.known
            if is_new and self.holds(file_of(module)):
                files[name] = file_of(module)
        return files


def file_of(module: Any) -> Path:
    """Return the file of a module; an empty path if it has none."""
    return Path(getattr(module, "__file__", None) or "")


def is_projects(module: Any, folder: Path) -> bool:
    """Return whether a module is one of this project, and does not lie in the folder."""
    parents = file_of(module).parents
    return PROJECT in parents and folder not in parents


def place_of(error: BaseException, path: Path, modules: ModulesBeside) -> str:
    """Return where in the user's code an error arose: "line 7, in build: ", or "".

    It is the innermost line of the model file at `path`, or of a module beside it; the latter comes
    with the name of its file.
    """
    file = line = function = None
    for frame in traceback.extract_tb(error.__traceback__):
        if modules.holds(Path(frame.filename)):
            file, line, function = Path(frame.filename), frame.lineno, frame.name
    if isinstance(error, SyntaxError) and error.filename is not None:
        file, line, function = Path(error.filename), error.lineno, None
    if line is None:
        return ""
    place = f"line {line}" if file == path else f"{file.name}, line {line}"
    if function not in (None, "<module>"):
        place += f", in {function}"
    return f"{place}: "


def recorded_model(meta: dict) -> str:
    """Return the folder, file or hub id of the model that made an activation file.

    meta: the description of that file. Raises UsageError if the model is a Python file: it would be
    run because a description says so, and not because the user does.
    """
    if meta.get("model") is None:
        raise UsageError(
            "the description of the activations does not say which model made them: name it with "
            "--model_name"
        )
    # `read_description` found this path from the activations, whatever the current folder is
    path = meta.get("model_folder") or meta.get("model_file")
    model_name = path if path is not None and Path(path).exists() else meta["model"]
    if not is_model_file(model_name):
        return model_name
    _, function = split_function(meta["model"])
    if function not in (None, DEFAULT_FUNCTION):
        model_name = f"{split_function(model_name)[0]}:{function}"
    raise UsageError(
        f"the activations were made by the program {model_name}, which is only run where you name "
        f"it: add --model_name {shlex.quote(model_name)}"
    )


def say_changed_files(theirs: dict | None, ours: dict | None) -> None:
    """Print one line if the Python files that made a model have changed.

    theirs: {file: sha256} when the activations were collected. ours: the same now. None if the
    model comes from no such file.
    """
    if not theirs or not ours:
        return
    changed = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if changed:
        verb = "has" if len(changed) == 1 else "have"
        print(
            f"note: {', '.join(changed)} {verb} changed since the activations were collected, "
            "so the model may compute something else than it did then"
        )


def digest_of(path: Path) -> str:
    """Return the sha256 of a file in hex digits; of a folder, that of its .safetensors files."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------ diffusers


def load_pipeline(model_name: str, dtype: torch.dtype, **options) -> Any:
    """Return the pipeline of a diffusers folder, a hub id, or a single .safetensors file.

    options: of `DiffusionPipeline.from_pretrained`, such as variant, revision and
    trust_remote_code. Raises UsageError, in one line, for all that can't be loaded.
    """
    from diffusers import DiffusionPipeline  # takes seconds to import

    folder_or_id = find_model(model_name)
    try:
        if folder_or_id.endswith(".safetensors"):
            pipe = load_single_file(folder_or_id, dtype)
        else:
            # use_safetensors: no pickle
            pipe = DiffusionPipeline.from_pretrained(
                folder_or_id, dtype=dtype, use_safetensors=True, **options
            )
    except (UsageError, OSError):
        raise
    except Exception as error:  # whatever the many classes of components raise
        if "trust_remote_code" in str(error) and not options.get("trust_remote_code"):
            raise UsageError(
                f"{model_name} comes with code of its own, which was not run: "
                f"{str(error).partition(' Pass `trust')[0].splitlines()[0]} If you trust it, add "
                "--trust_remote_code"
            ) from error
        raise UsageError(f"{model_name} can't be loaded: {error}") from error
    check_complete(pipe, model_name)
    return pipe


def load_single_file(path: str, dtype: torch.dtype) -> Any:
    """Return the pipeline of a single .safetensors file, such as sites for models offer.

    diffusers tells from the weights which model it is, and takes the settings from that model's
    repository on the hub, where the class of the pipeline is named.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = list(file.keys())
        if any("lora" in name.lower() for name in names):
            raise UsageError(
                f"{path} is a LoRA: name its model with --model_name, and this file with --lora"
            )
        # the shapes are all that the detection looks at
        shapes = {}
        for name in names:
            shapes[name] = SimpleNamespace(shape=torch.Size(file.get_slice(name).get_shape()))
    repository = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    try:
        config = diffusers.DiffusionPipeline.load_config(repository)
    except OSError as error:
        raise UsageError(
            f"{path} looks like a model of {repository}, whose settings are needed and can't be "
            f"had ({error}); without a connection, save the model as a folder first"
        ) from error
    pipeline_class = getattr(diffusers, config["_class_name"])
    if not hasattr(pipeline_class, "from_single_file"):
        raise UsageError(f"{path} is not known as a whole pipeline in one file; {REMEDY}")
    return pipeline_class.from_single_file(path, config=repository, dtype=dtype)


def check_complete(pipe: Any, model_name: str) -> None:
    """Raise UsageError if a component has parameters that no file gave a value."""
    for name, component in pipe.components.items():
        if not isinstance(component, nn.Module):
            continue
        missing = [key for key, x in component.named_parameters() if x.device.type == "meta"]
        if missing:
            raise UsageError(
                f"{model_name}: the files of its {name} have no weights for {len(missing)} "
                f"parameters, such as {missing[0]}. A model with a LoRA is saved so unless it is "
                "fused: call pipe.fuse_lora() and pipe.unload_lora_weights() before "
                "pipe.save_pretrained(), or give the plain model and the LoRA with --lora. Some "
                "quantizers save files that diffusers can't load either"
            )


def move(pipe: Any, device: torch.device | str) -> None:
    """Move a pipeline, or the networks of an object without a method `to`, to a device."""
    if hasattr(pipe, "to"):
        pipe.to(device)
        return
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.to(device)


def offload(pipe: Any, device: torch.device | str | None) -> None:
    """Let a pipeline keep only what is running on the device. Raises UsageError if it can't."""
    if not hasattr(pipe, "enable_model_cpu_offload"):
        raise UsageError(
            f"--cpu_offload: {type(pipe).__name__} has no enable_model_cpu_offload(); leave it out"
        )
    pipe.enable_model_cpu_offload(device=device)


# ------------------------------------------------------------------------------ LoRA


class Lora(NamedTuple):
    """A LoRA and the factor by which its change of the weights is multiplied."""

    path: Path
    """A .safetensors file, or a folder that holds one."""

    scale: float

    def as_dict(self) -> dict[str, Any]:
        """Return what a description says about it, beside the path."""
        return {"name": self.path.name, "scale": self.scale, "sha256": digest_of(self.path)}


def parse_lora(text: str) -> Lora:
    """Return the Lora of an option: "style.safetensors:0.8", or without a scale, which is 1.

    Raises UsageError if there is no such file or folder.
    """
    path, scale = text, 1.0
    match = re.fullmatch(r"(.+):([-+]?[\d.]+(?:[eE][-+]?\d+)?)", text)
    if match is not None and not Path(text).exists():
        path = match[1]
        try:
            scale = float(match[2])
        except ValueError:
            raise UsageError(f"--lora {text}: {match[2]} is no number") from None
    is_file = Path(path).is_file() and Path(path).suffix == ".safetensors"
    if not is_file and not Path(path).is_dir():
        raise UsageError(
            f"--lora {text}: expected a .safetensors file or a folder that holds one, with a scale "
            "behind it if you like, such as style.safetensors:0.8"
        )
    return Lora(Path(path), scale)


def fuse_lora(pipe: Any, lora: Lora) -> None:
    """Add a LoRA to the weights of a pipeline, in place. The names of its modules stay.

    Raises UsageError without the package peft, for a pipeline that takes no LoRA, for a file that
    can't be read, and if no weight changes.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise UsageError(f"--lora {lora.path}: {type(pipe).__name__} takes no LoRA")
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"--lora {lora.path}: pip install peft to load a LoRA")
    before = pipeline_fingerprints(pipe)
    folder, name = lora.path.parent, lora.path.name
    options = {"weight_name": name}
    if lora.path.is_dir():
        folder, options = lora.path, {}
    try:
        pipe.load_lora_weights(str(folder), use_safetensors=True, **options)
        pipe.fuse_lora(lora_scale=lora.scale)
        pipe.unload_lora_weights()
    except Exception as error:  # what diffusers and peft raise for files of other kinds
        raise UsageError(
            f"--lora {lora.path}: it can't be loaded into {type(pipe).__name__}: {error}"
        ) from error
    if pipeline_fingerprints(pipe) == before:
        raise UsageError(
            f"--lora {lora.path}: no weight of {type(pipe).__name__} has changed; it may belong to "
            "another kind of model, or the scale may be 0"
        )


def loras_of(meta: dict) -> list[str]:
    """Return the --lora options that made an activation file; meta is its description.

    Raises UsageError for a LoRA that is gone or has changed.
    """
    options = []
    paths = meta.get("lora_paths") or []
    for number, record in enumerate(meta.get("lora") or []):
        path = paths[number] if number < len(paths) else record["name"]
        if not Path(path).exists():
            raise UsageError(
                f"the activations were made with the LoRA {path}, which is not there; name it with "
                "--lora"
            )
        if digest_of(Path(path)) != record["sha256"]:
            raise UsageError(
                f"the LoRA {path} has changed since the activations were made with it; put the old "
                "one back, or name another with --lora"
            )
        options.append(f"{path}:{record['scale']!r}")
    return options
