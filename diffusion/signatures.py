"""What a denoiser's forward and a pipeline's call take, and the tensors in what they give."""

import inspect

import torch

from errors import UsageError

SEEDING = ("generator", "latents")
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


def unwrap(module):
    """The module itself, out of torch.compile and (Distributed)DataParallel."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(
            module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
        ):
            inner = module.module
        if inner is None:
            return module
        module = inner


def forward_signature(module):
    """Of the class: offloading and casting hooks replace the instance's `forward` by one that takes
    anything."""
    return inspect.signature(type(unwrap(module)).forward)


def time_parameter(module):
    """Name of the parameter of `module.forward` that carries the time, or None."""
    names = list(forward_signature(module).parameters)
    return next((name for name in TIME_NAMES if name in names), None)


def sample_name(module):
    """Name of the parameter of `module.forward` that carries the sample: the first that is not the
    time.

    Raises UsageError where it takes anything, as a wrapper does.
    """
    parameters = list(forward_signature(module).parameters.values())[1:]
    time = time_parameter(module) or (parameters[1].name if len(parameters) > 1 else None)
    first = next((p for p in parameters if p.name != time), None)
    if first is None or first.kind in (first.VAR_POSITIONAL, first.VAR_KEYWORD):
        raise UsageError(
            f"{type(unwrap(module)).__name__}.forward does not say what it takes; hook the module that it wraps"
        )
    return first.name


def tensors(value):
    """The tensors in a (nested) tuple, list or dict, in order."""
    if torch.is_tensor(value):
        return [value]
    values = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (tuple, list))
        else ()
    )
    return [t for v in values for t in tensors(v)]


def with_tensor(value, index, x):
    """`value`, a nested structure of tensors, with the tensor at `index` of `tensors(value)`
    replaced by x."""
    if torch.is_tensor(value):
        return x if index == 0 else value
    if not isinstance(value, (dict, list, tuple)):
        return value
    new = {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        new[key] = with_tensor(item, index, x)
        index -= len(tensors(item))
    if isinstance(value, dict):
        return type(value)(**new)
    return type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())


def other_prompts(prompt, kwargs):
    """(prompt, kwargs) of the same generation with other positive prompts, or None where there are
    none to change.

    Texts are exchanged, or else their words reversed, so that few of them change their length;
    embeddings get noise; of class numbers each is the one before. What a pipeline takes besides,
    such as a negative prompt, stays.
    """
    changed = {}
    for name, value in ({"prompt": prompt} | kwargs).items():
        if "negative" in name or value is None:
            continue
        if name.startswith("prompt") and (
            isinstance(value, str) or isinstance(value, (list, tuple)) and texts_only(value)
        ):
            changed[name] = (
                other_text(value) if isinstance(value, str) else other_texts(list(value))
            )
        elif "prompt_embeds" in name or name == "image_embeds":
            changed[name] = with_noise(value)
        elif name == "class_labels":
            changed[name] = other_labels(value)
    if not changed:
        return None
    prompt = changed.pop("prompt", prompt)
    return prompt, kwargs | changed


def texts_only(values):
    return len(values) > 0 and all(isinstance(value, str) for value in values)


def other_text(text):
    """The words in reverse; a single word's letters; what reads the same both ways gets a word
    more."""
    for other in (" ".join(reversed(text.split())), text[::-1]):
        if other.split() != text.split():
            return other
    return (text + " something else").strip()


def other_texts(texts):
    """Each text is the next one's; where that is the same, another one."""
    following = [*texts[1:], texts[0]]
    return [b if a != b else other_text(a) for a, b in zip(texts, following)]


def other_labels(labels):
    """Class numbers, a list or a tensor of them, and perhaps texts that are numbers: each the one
    before, and 1 for 0."""
    if torch.is_tensor(labels):
        return torch.where(labels > 0, labels - 1, labels + 1)
    if isinstance(labels, (list, tuple)):
        return [other_labels(label) for label in labels]
    return labels - 1 if labels > 0 else labels + 1


def with_noise(value):
    """A nested structure of tensors with noise of their own size on the floating point ones."""
    if torch.is_tensor(value):
        if not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        return value + (noise * (value.detach().float().std(correction=0).cpu() + 1e-3)).to(
            value.device, value.dtype
        )
    return type(value)(map(with_noise, value)) if isinstance(value, (list, tuple)) else value


def outline(options):
    """Something hashable that is equal for generations with the same kinds of passes: prompts,
    seeds and pictures may differ.

    Of options, numbers, flags and names count, of prompts and lists only that they are given, of
    tensors the sizes of a row.
    """
    return tuple(
        (name, outline_of(name, value))
        for name, value in sorted(options.items())
        if name not in SEEDING
    )


def outline_of(name, value):
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str) and "prompt" not in name:
        return value
    if isinstance(value, dict):
        return outline(value)
    return tuple(value.shape[1:]) if torch.is_tensor(value) else "given"


def per_prompt(name):
    """Is it a pipeline's option for how many samples a prompt gets, such as num_images_per_prompt
    or num_videos_per_prompt?"""
    return name.startswith("num_") and name.endswith("_per_prompt")


def count_prompts(prompt, kwargs):
    """Prompts, None if that can't be seen, and images per prompt, from the arguments of a
    generation."""
    sized = (prompt, *(kwargs.get(name) for name in ("prompt_embeds", "class_labels")))
    P = next(
        (1 if isinstance(v, str) else len(v) for v in sized if v is not None),
        kwargs.get("batch_size"),
    )
    return P, next((v for k, v in kwargs.items() if per_prompt(k)), 1)


def prompt_arguments(pipe, prompt):
    """The arguments that tell a pipeline its prompts: where it takes none, class numbers written as
    text, or just how many."""
    takes = inspect.signature(pipe).parameters
    if prompt is None or "prompt" in takes:
        return {} if prompt is None else {"prompt": prompt}
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if "class_labels" in takes:
        if wrong := [t for t in texts if not str(t).strip().isdigit()]:
            raise UsageError(
                f"{type(pipe).__name__} takes class numbers as prompts, got {wrong[0]!r}"
            )
        return {"class_labels": [int(t) for t in texts]}
    if "batch_size" in takes:
        return {"batch_size": len(texts)}
    raise UsageError(f"{type(pipe).__name__} takes no prompt; it takes {', '.join(takes)}")
