"""The names of a denoiser's modules: which there are, and which of them a pattern means.

modules = find_modules({"unet": unet})
match_names("up_blocks.*.attentions.0", modules)    # ['up_blocks.1.attentions.0', ...]
check_hookable("unet", unet)                        # raises where hooks in it would not run
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from diffusion.signatures import unwrap
from errors import UsageError

# {wildcard of a glob: the same as a regular expression}
WILDCARDS = {"**": ".*", "*": "[^.]*", "?": "[^.]"}

Modules = dict[str, tuple[str, nn.Module]]
"""{hook_name: (denoiser's name, module)}"""


def find_modules(denoisers: dict[str, nn.Module]) -> Modules:
    """Return every module that can run: {hook_name: (denoiser's name, module)}.

    A hook name is the module's dotted name. Where several denoisers have a module of that name, the
    denoiser's name comes first: for a "unet" and a "prior" with a "mid_block" each it gives
    "unet.mid_block" and "prior.mid_block".
    """
    triples = []
    for denoiser, root in denoisers.items():
        for name, module in unwrap(root).named_modules():
            can_run = type(module).forward is not torch.nn.Module.forward
            if name and can_run:
                triples.append((denoiser, name, module))

    count = Counter(name for _, name, _ in triples)
    modules = {}
    for denoiser, name, module in triples:
        hook_name = name if count[name] == 1 else f"{denoiser}.{name}"
        modules[hook_name] = (denoiser, module)
    return modules


def is_pattern(name: str) -> bool:
    """Return whether a name has a wildcard."""
    return any(character in name for character in "*?[")


def match_names(pattern: str, modules: Modules) -> list[str]:
    """Return the hook names that a pattern means, see `HookedDiffusionModel.hook_names`.

    A name may have its denoiser's name before it, as in "unet.mid_block". Raises UsageError where
    nothing matches, and where the pattern can't be read.
    """
    long_names = {f"{denoiser}.{name}": name for name, (denoiser, _) in modules.items()}
    if not is_pattern(pattern):
        return [exact_name(pattern, list(modules), long_names)]
    try:
        regex = re.compile(regex_of(pattern))
    except re.error as error:
        raise UsageError(f"{pattern!r} is no pattern: {error}") from None

    if "." in pattern:
        matches = [name for name in modules if regex.fullmatch(name)]
        for long_name, name in long_names.items():
            if regex.fullmatch(long_name) and name not in matches:
                matches.append(name)
    else:
        matches = [name for name in modules if regex.fullmatch(name.rpartition(".")[2])]
    if not matches:
        raise UsageError(
            f"no module matches {pattern!r}; `**` crosses dots, and hook_names() lists what there "
            "is"
        )
    return matches


def exact_name(name: str, hook_names: list[str], long_names: dict[str, str]) -> str:
    """Return the hook name that a name without wildcards means.

    long_names: {hook name with its denoiser's name before it: hook name}. Raises UsageError, with
    the nearest names, where there is no such module, and where several denoisers have one.
    """
    if name in hook_names:
        return name
    if name in long_names:
        return long_names[name]
    of_several_denoisers = [other for other in hook_names if other.partition(".")[2] == name]
    if of_several_denoisers:
        raise UsageError(
            f"{name!r} is a module of several denoisers; say {' or '.join(of_several_denoisers)}"
        )
    nearest = difflib.get_close_matches(name, hook_names, 3, 0.5) or sorted(hook_names)[:3]
    raise UsageError(f"no module is named {name!r}; the nearest names are {', '.join(nearest)}")


def regex_of(pattern: str) -> str:
    r"""Return the regular expression of a glob, in which `*` and `?` do not cross a dot.

    For `a.*.b[!0]` it gives `a\.[^.]*\.b[^0]`.
    """
    regex = ""
    for piece in re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern):
        if piece.startswith("["):
            regex += piece.replace("[!", "[^", 1)
        elif piece in WILDCARDS:
            regex += WILDCARDS[piece]
        else:
            regex += re.escape(piece)
    return regex


def check_hookable(name: str, root: nn.Module) -> None:
    """Raise UsageError for a denoiser in which hooks would not run, or would see old values.

    Hooks do not run inside a compiled module. A cache repeats in later steps what blocks computed
    in an earlier one.
    """
    if any(is_compiled(module) for module in root.modules()):
        raise UsageError(
            f"{name} is compiled, and hooks inside it would not run: use it uncompiled"
        )
    hooks_of_diffusers = installed_hooks(root.modules())
    is_stateful = any(getattr(hook, "_is_stateful", False) for hook in hooks_of_diffusers)
    if getattr(unwrap(root), "is_cache_enabled", False) or is_stateful:
        raise UsageError(
            f"{name} caches what blocks compute and repeats it in other steps: switch that off "
            "first"
        )


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module was given to torch.compile, or compiled in place."""
    return hasattr(module, "_orig_mod") or bool(module._compiled_call_impl)


def installed_hooks(modules: Iterable[nn.Module]) -> list:
    """Return the hooks that diffusers put into modules: those of offloading, casting and caches."""
    hooks = []
    for module in modules:
        if hasattr(module, "_diffusers_hook"):
            hooks += module._diffusers_hook.hooks.values()
    return hooks
