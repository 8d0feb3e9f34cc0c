"""What a denoiser's forward and a pipeline's call take, and the tensors in what they give.

time_parameter(unet)                    # "timestep": which argument carries the time
sample_name(unet)                       # "sample": which carries the sample
tensors({"a": x, "b": [y, None]})       # [x, y]
count_prompts(["a", "b"], {})           # (2, 1): prompts, images per prompt
image_arguments(pipe)                   # ["image"]: which arguments of a pipeline take an image
other_prompts("a red star", {})         # ("star red a", {}): to see what depends on the prompt
"""

import copy
import difflib
import inspect
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from errors import UsageError

Prompt = str | list[str] | None

# Arguments that decide the noise, and not which passes a step has
SEEDING = ("generator", "latents")
# Names that denoisers of diffusers give to the time, the likeliest first
TIME_NAMES = (
    "timestep",
    "timesteps",
    "timestep_ratio",
    "sigma",
    "sigmas",
    "t",
    "time",
    "noise_level",
    "noise_labels",
)
# Parts of names of arguments that have an image's annotation, or end like its name, and take none
NO_IMAGES = ("embeds", "latents", "video", "frames")

# What schedulers and networks of diffusers call their result, where it has a name
RESULT_NAMES = ("prev_sample", "sample")

# --------------------------------------------------------------------------- a denoiser's forward


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module itself, out of torch.compile and (Distributed)DataParallel."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if getattr(module, "_orig_mod", None) is not None:
            module = module._orig_mod
        elif isinstance(module, wrappers):
            module = module.module
        else:
            return module


def forward_signature(module: nn.Module) -> inspect.Signature:
    """Return the signature of `forward`, with `self`.

    It is that of the class, since offloading and casting replace the instance's `forward` by one
    that takes anything.
    """
    return inspect.signature(type(unwrap(module)).forward)


def time_parameter(module: nn.Module) -> str | None:
    """Return the name of the parameter of `module.forward` that carries the time, or None."""
    parameters = forward_signature(module).parameters
    for name in TIME_NAMES:
        if name in parameters:
            return name
    return None


def sample_name(module: nn.Module) -> str:
    """Return the name of the parameter of `module.forward` that carries the sample.

    It is the first that is not the time; where no name says which is the time, that is the second.
    For `forward(self, t, x)` and for `forward(self, x, when)` it is "x". Raises UsageError where
    `forward` takes anything, as a wrapper does.
    """
    parameters = list(forward_signature(module).parameters.values())[1:]
    time = time_parameter(module)
    if time is None and len(parameters) > 1:
        time = parameters[1].name
    candidates = [parameter for parameter in parameters if parameter.name != time]
    anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if not candidates or candidates[0].kind in anything:
        raise UsageError(
            f"{type(unwrap(module)).__name__}.forward does not say what it takes; hook the module "
            "that it wraps"
        )
    return candidates[0].name


# --------------------------------------------------------------------------- nested tensors


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a (nested) tuple, list or dict, in their order."""
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    found = []
    for item in value:
        found += tensors(item)
    return found


def with_tensor(value: Any, index: int, x: Tensor) -> Any:
    """Return a copy of a nested structure in which x is the tensor at `index` of `tensors(value)`.

    For ({"a": p}, [q]), 1 and x it gives ({"a": p}, [x]).
    """
    if torch.is_tensor(value):
        return x if index == 0 else value
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return value

    new = {}
    for key, item in items:
        new[key] = with_tensor(item, index, x)
        index -= len(tensors(item))
    if isinstance(value, dict):
        return type(value)(**new)
    if hasattr(value, "_fields"):  # a NamedTuple
        return type(value)(*new.values())
    return type(value)(new.values())


def result_tensor(value: Any) -> Tensor | None:
    """Return the tensor that a denoiser, a scheduler's step or a VAE's decode returned.

    It is the one called prev_sample or sample, also in a dict, else the first one in the nested
    structure, or among the attributes of the object. None if there is none.
    """
    for name in RESULT_NAMES:
        named = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        if torch.is_tensor(named):
            return named
    in_value = tensors(value)
    if not in_value and hasattr(value, "__dict__"):
        in_value = tensors(vars(value))
    return in_value[0] if in_value else None


def with_result(value: Any, x: Tensor) -> Any:
    """Return a copy of what a function returned, with x in the place of its `result_tensor`."""
    result = result_tensor(value)
    for index, item in enumerate(tensors(value)):
        if item is result:
            return with_tensor(value, index, x)
    changed = copy.copy(value)
    for name, item in vars(value).items():
        if item is result:
            vars(changed)[name] = x  # also in a frozen dataclass
    return changed


# -------------------------------------------------------------------------- the same, other prompts


def other_prompts(prompt: Prompt, options: dict) -> tuple[Prompt, dict] | None:
    """Return (prompt, options) of the same generation with other positive prompts.

    Texts are exchanged, or else their words reversed, so that few of them change their length.
    Embeddings get noise. Each class number becomes the one before. What else a pipeline takes, such
    as a negative prompt, stays. Images change only where there is nothing else: they are prompts
    then. None where there are no prompts to change.
    """
    changed = {}
    for name, value in ({"prompt": prompt} | options).items():
        if value is None or "negative" in name:
            continue
        if name.startswith("prompt") and isinstance(value, str):
            changed[name] = other_text(value)
        elif name.startswith("prompt") and is_list_of_texts(value):
            changed[name] = other_texts(list(value))
        elif "prompt_embeds" in name or name == "image_embeds":
            changed[name] = with_noise(value)
        elif name == "class_labels":
            changed[name] = other_labels(value)
    if not changed:
        for name, value in options.items():
            images = images_in(value)
            if images:
                others = [other_image(image) for image in images]
                changed[name] = others if isinstance(value, list) else others[0]
    if not changed:
        return None
    prompt = changed.pop("prompt", prompt)
    return prompt, options | changed


def is_list_of_texts(value: Any) -> bool:
    """Return whether a value is a list or tuple of texts, at least one."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(item, str) for item in value)


def other_text(text: str) -> str:
    """Return a text with its words in reverse.

    For "a red star" it gives "star red a", for "star" "rats". What reads the same both ways gets
    two words more: for "a" it gives "a something else".
    """
    reversed_words = " ".join(reversed(text.split()))
    reversed_letters = text[::-1]
    for other in (reversed_words, reversed_letters):
        if other.split() != text.split():
            return other
    return (text + " something else").strip()


def other_texts(texts: list[str]) -> list[str]:
    """Return for each text the next one; where that is the same, `other_text` of it.

    For ["a star", "a ring"] it gives ["a ring", "a star"].
    """
    others = []
    for text, following in zip(texts, [*texts[1:], texts[0]]):
        others.append(following if following != text else other_text(text))
    return others


def other_labels(labels: Any) -> Any:
    """Return for each class number the one before, and 1 for 0.

    labels: a number, or a list or a tensor of them. For [3, 0] it gives [2, 1].
    """
    if torch.is_tensor(labels):
        return torch.where(labels > 0, labels - 1, labels + 1)
    if isinstance(labels, (list, tuple)):
        return [other_labels(label) for label in labels]
    return labels - 1 if labels > 0 else labels + 1


def images_in(value: Any) -> list[Image.Image]:
    """Return the images in an argument that is an image or a list of images; otherwise []."""
    if isinstance(value, Image.Image):
        return [value]
    is_list = isinstance(value, list) and all(isinstance(item, Image.Image) for item in value)
    return value if is_list else []


def other_image(image: Image.Image) -> Image.Image:
    """Return the negative of an image: white becomes black."""
    return ImageOps.invert(image)


def with_noise(value: Any) -> Any:
    """Return a nested structure of tensors with noise on each floating point one.

    The noise of a tensor has the size of its standard deviation, and the same seed always.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(map(with_noise, value))
    if not torch.is_tensor(value) or not value.is_floating_point():
        return value
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    size = value.detach().float().std(correction=0).cpu() + 1e-3
    return value + (noise * size).to(value.device, value.dtype)


# --------------------------------------------------------------------------- a pipeline's arguments


def outline(options: dict) -> tuple:
    """Return something hashable that is equal for generations with the same kinds of passes.

    Prompts, seeds and pictures may differ: of prompts and lists only counts that they are given,
    and of tensors the shape of a row. Numbers, flags and other texts count as they are.

    For {"prompt": "a star", "height": 64} it gives (("height", 64), ("prompt", "given")).
    """
    entries = []
    for name, value in sorted(options.items()):
        if name not in SEEDING:
            entries.append((name, outline_of(name, value)))
    return tuple(entries)


def outline_of(name: str, value: Any) -> Any:
    """Return what counts of one option, see `outline`."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str) and "prompt" not in name:
        return value
    if isinstance(value, dict):
        return outline(value)
    if torch.is_tensor(value):
        return tuple(value.shape[1:])
    return "given"


def per_prompt(name: str) -> bool:
    """Return whether a pipeline's argument says how many samples a prompt gets.

    Such are num_images_per_prompt and num_videos_per_prompt.
    """
    return name.startswith("num_") and name.endswith("_per_prompt")


def count_prompts(prompt: Prompt, options: dict) -> tuple[int | None, int]:
    """Return how many prompts a generation has, None if that can't be seen, and images per prompt.

    For "a star" and {"num_images_per_prompt": 4} it gives (1, 4). Without prompts, a list of images
    counts.
    """
    num_images = 1
    for name, value in options.items():
        if per_prompt(name):
            num_images = value
            break
    for given in (prompt, options.get("prompt_embeds"), options.get("class_labels")):
        if isinstance(given, str):
            return 1, num_images
        if given is not None:
            return len(given), num_images
    for value in options.values():
        if images_in(value):
            return len(images_in(value)), num_images
    return options.get("batch_size"), num_images


def takes_prompts(pipe: Any) -> bool:
    """Return whether a pipeline takes a text or a class for each sample.

    One that takes none only has to be told how many samples to make, or gets images. A loop for a
    model of one's own says so itself.
    """
    if hasattr(pipe, "takes_prompts"):
        return pipe.takes_prompts
    parameters = inspect.signature(pipe).parameters
    return "prompt" in parameters or "class_labels" in parameters


def prompt_arguments(pipe: Any, prompt: Prompt) -> dict:
    """Return the arguments that tell a pipeline its prompts.

    One that takes no prompt gets the numbers of the classes that the prompts name, or else the
    number of prompts as its batch size: for ["3", "7"] {"class_labels": [3, 7]}, or
    {"batch_size": 2}. One that takes images instead needs neither. Raises UsageError where it takes
    none of these.
    """
    if prompt is None:
        return {}
    parameters = inspect.signature(pipe).parameters
    if "prompt" in parameters:
        return {"prompt": prompt}
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if "class_labels" in parameters:
        return {"class_labels": [class_number(pipe, text) for text in texts]}
    if "batch_size" in parameters:
        return {"batch_size": len(texts)}
    if image_arguments(pipe):
        return {}
    raise UsageError(f"{type(pipe).__name__} takes no prompt; it takes {', '.join(parameters)}")


def image_arguments(pipe: Any) -> list[str]:
    """Return the names of the arguments of a pipeline that take an image, in their order.

    Their annotation names PIL's images, or their name ends with "image".
    """
    names = []
    for name, parameter in inspect.signature(pipe).parameters.items():
        annotation = str(parameter.annotation)
        takes_image = "PIL" in annotation or "ImageInput" in annotation or name.endswith("image")
        if takes_image and "prompt" not in name and not any(word in name for word in NO_IMAGES):
            names.append(name)
    return names


# --------------------------------------------------------------------------- classes as prompts


def class_names(pipe: Any) -> dict[str, int]:
    """Return {name of a class: its number}, as a pipeline lists them in `labels`; {} if it does
    not."""
    labels = getattr(pipe, "labels", None)
    return labels if isinstance(labels, dict) else {}


def class_number(pipe: Any, text: Any) -> int:
    """Return the number of the class that a prompt means: its number or its name.

    "281", "tabby" and "tabby, tabby cat" give 281 if the pipeline's `labels` have these two names
    of it. Raises UsageError for what is neither, with the nearest name.
    """
    names = class_names(pipe)
    text = str(text).strip()
    if text in names:
        return names[text]
    numbers = {names.get(name.strip()) for name in text.split(",")}
    if len(numbers) == 1 and None not in numbers:
        return numbers.pop()
    pipeline = type(pipe).__name__
    if not text.isdigit():
        if not names:
            raise UsageError(f"{pipeline} takes class numbers as prompts, got {text!r}")
        nearest = difflib.get_close_matches(text, names, n=1)
        suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UsageError(
            f"{pipeline} takes the numbers or names of classes as prompts, and has no class "
            f"{text!r}{suggestion}"
        )
    if names and int(text) > max(names.values()):
        raise UsageError(f"{pipeline} has classes up to {max(names.values())}, got {text}")
    return int(text)


def class_text(pipe: Any, text: str) -> str:
    """Return the names of the class that a prompt means, such as "tabby, tabby cat" for "281".

    Without names the prompt stays as it is. Raises UsageError as `class_number` does.
    """
    number = class_number(pipe, text)
    names = [name for name, other in class_names(pipe).items() if other == number]
    return ", ".join(names) if names else text
