"""The modules of a pipeline's denoisers by name: which there are, which a pattern means, and
whether hooks in them would run."""

import difflib
import re
from collections import Counter

import torch

from diffusion.signatures import unwrap
from errors import UsageError

WILDCARDS = {"**": ".*", "*": "[^.]*", "?": "[^.]"}


def find_modules(denoisers):
    """{hook_name: (denoiser name, module)} of every module that can run; names that several
    denoisers have are long."""
    found = [
        (denoiser, name, module)
        for denoiser, root in denoisers.items()
        for name, module in unwrap(root).named_modules()
        if name and type(module).forward is not torch.nn.Module.forward
    ]
    shared = Counter(name for _, name, _ in found)
    return {
        name if shared[name] == 1 else f"{denoiser}.{name}": (denoiser, module)
        for denoiser, name, module in found
    }


def is_pattern(name):
    return any(character in name for character in "*?[")


def match_names(pattern, modules):
    """The hook names that a pattern means, see `HookedDiffusionModel.hook_names`. modules: as
    `find_modules` finds them."""
    long = {f"{denoiser}.{name}": name for name, (denoiser, _) in modules.items()}
    if not is_pattern(pattern):
        return [exact_name(pattern, list(modules), long)]
    try:
        regex = re.compile(regex_of(pattern))
    except re.error as error:
        raise UsageError(f"{pattern!r} is no pattern: {error}") from None
    if "." in pattern:
        found = [name for name in modules if regex.fullmatch(name)]
        found += [
            name for full, name in long.items() if regex.fullmatch(full) and name not in found
        ]
    else:
        found = [name for name in modules if regex.fullmatch(name.rpartition(".")[2])]
    if not found:
        raise UsageError(
            f"no module matches {pattern!r}; `**` crosses dots, and hook_names() lists what there is"
        )
    return found


def exact_name(name, names, long):
    if name in names:
        return name
    if name in long:
        return long[name]
    if several := [n for n in names if n.partition(".")[2] == name]:
        raise UsageError(f"{name!r} is a module of several denoisers; say {' or '.join(several)}")
    near = difflib.get_close_matches(name, names, 3, 0.5) or sorted(names)[:3]
    raise UsageError(f"no module is named {name!r}; the nearest names are {', '.join(near)}")


def regex_of(pattern):
    """The regular expression of a glob, in which `*` and `?` do not cross a dot."""
    parts = []
    for part in re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern):
        if part.startswith("["):
            parts.append(part.replace("[!", "[^", 1))
        else:
            parts.append(WILDCARDS.get(part) or re.escape(part))
    return "".join(parts)


def check_hookable(name, root):
    """UsageError for a denoiser in which hooks would not run, or would see what an earlier step
    computed."""
    modules = list(root.modules())
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in modules):
        raise UsageError(
            f"{name} is compiled, and hooks inside it would not run: use it uncompiled"
        )
    installed = [
        hook
        for m in modules
        if hasattr(m, "_diffusers_hook")
        for hook in m._diffusers_hook.hooks.values()
    ]
    if getattr(unwrap(root), "is_cache_enabled", False) or any(
        getattr(hook, "_is_stateful", False) for hook in installed
    ):
        raise UsageError(
            f"{name} caches what blocks compute and repeats it in other steps: switch that off first"
        )
