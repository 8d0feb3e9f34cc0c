"""The names of a denoiser's modules: which there are, and which of them a pattern means.

modules = find_modules({"unet": unet})
match_names("up_blocks.*.attentions.0", modules)    # ['up_blocks.1.attentions.0', ...]
block_groups(modules, "unet")                       # [['mid_block.attentions.0', ...], ...]
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

ATTENTIONS = "**.attentions.*"  # the attention blocks of a UNet, which lie inside its other blocks

# A misspelt name is nearly right if difflib finds it so similar: then a part of a block may be
# meant. Less similar names are only suggested if they are blocks: for `up_blocks.1.attentions.1`,
# where a transformer has none, the nearest of all names is that of a Dropout, at 0.6
NEARLY_RIGHT = 0.8
SIMILAR = 0.5
NUM_SUGGESTED = 3  # names in a message

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
        return [exact_name(pattern, modules, long_names)]
    matches = matching_names(pattern, modules, long_names)
    if not matches:
        raise UsageError(
            f"no module matches {pattern!r}; {hint_for_pattern(pattern, modules, long_names)}; "
            "collect.py --list_hooks shows all names"
        )
    return matches


def matching_names(pattern: str, modules: Modules, long_names: dict[str, str]) -> list[str]:
    """Return the hook names that a glob matches, perhaps none.

    long_names: {hook name with its denoiser's name before it: hook name}. Raises UsageError where
    the pattern can't be read.
    """
    try:
        regex = re.compile(regex_of(pattern))
    except re.error as error:
        raise UsageError(f"{pattern!r} is no pattern: {error}") from None

    if "." not in pattern:
        return [name for name in modules if regex.fullmatch(name.rpartition(".")[2])]
    matches = [name for name in modules if regex.fullmatch(name)]
    for long_name, name in long_names.items():
        if regex.fullmatch(long_name) and name not in matches:
            matches.append(name)
    return matches


def exact_name(name: str, modules: Modules, long_names: dict[str, str]) -> str:
    """Return the hook name that a name without wildcards means.

    long_names: {hook name with its denoiser's name before it: hook name}. Raises UsageError, with a
    pattern or the nearest names, where there is no such module, and where several denoisers have
    one.
    """
    if name in modules:
        return name
    if name in long_names:
        return long_names[name]
    of_several_denoisers = []
    for other, (denoiser, _) in modules.items():
        if other == f"{denoiser}.{name}":
            of_several_denoisers.append(other)
    if of_several_denoisers:
        raise UsageError(
            f"{name!r} is a module of several denoisers; say {' or '.join(of_several_denoisers)}"
        )
    for pattern in (f"**.{name}", f"{name}.*"):
        matches = matching_names(pattern, modules, long_names)
        if name and matches:
            raise UsageError(
                f"no module is named {name!r}, but the pattern {pattern!r} matches "
                f"{count_of(matches)}, such as {matches[0]}"
            )
    nearest = ", ".join(nearest_names(name, modules))
    raise UsageError(f"no module is named {name!r}; the nearest names are {nearest}")


def count_of(names: list[str]) -> str:
    """Return "1 module" or "3 modules", for so many names."""
    return "1 module" if len(names) == 1 else f"{len(names)} modules"


def hint_for_pattern(pattern: str, modules: Modules, long_names: dict[str, str]) -> str:
    """Return what to do about a pattern that matches nothing, as a clause.

    It says whether the pattern matches with `**` in the place of each `*`, or at any depth;
    otherwise it names blocks of the model.
    """
    across_dots = re.sub(r"\*+", "**", pattern)
    for other in (across_dots, f"**.{pattern}", f"**{across_dots}"):
        if matches := matching_names(other, modules, long_names):
            return (
                f"{other!r} matches {count_of(matches)}, such as {matches[0]} (`**` crosses dots)"
            )
    nearest = ", ".join(nearest_names(pattern.replace("*", ""), modules))
    return f"this model has {nearest}"


def nearest_names(name: str, modules: Modules) -> list[str]:
    """Return up to three hook names like one that is not there, blocks if possible."""
    nearly_right = difflib.get_close_matches(name, list(modules), NUM_SUGGESTED, NEARLY_RIGHT)
    if nearly_right:
        return nearly_right
    blocks = likely_blocks(modules)
    similar = difflib.get_close_matches(name, blocks, NUM_SUGGESTED, SIMILAR)
    return similar or blocks[:NUM_SUGGESTED]


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


# ------------------------------------------------------------------------------------- blocks


def block_groups(modules: Modules, denoiser: str) -> list[list[str]]:
    """Return groups of modules that may be the blocks of a denoiser, the likeliest group first.

    A block is a large part that takes what the block before it returned. Whether image tokens run
    through a module is not known here; `HookedDiffusionModel.blocks` finds that out, and takes the
    first group that has such modules. The groups are:

    1. what stands in a container named `attentions`, inside the other blocks of a UNet;
    2. the items of the outermost containers, if they have modules inside. There is a group for each
       depth, since all blocks may be inside a module that only wraps them;
    3. the modules with modules inside that are in no container, for each depth; one that is alone
       at its depth only wraps the others;
    4. all modules: a small model may have no other parts.

    For a transformer with blocks.0 and blocks.1, which have modules inside, an `embed`, which has
    them too, and a `proj_out`, which has none, the groups are [], ["blocks.0", "blocks.1"],
    ["embed"] and everything.
    """
    names = [name for name, (of, _) in modules.items() if of == denoiser]
    attentions = re.compile(regex_of(ATTENTIONS))
    items = set()
    blocks = {}  # {depth: names}
    parts = {}  # {depth: names}, of what is in no container
    for name in names:
        pieces = name.split(".")
        ancestors = {".".join(pieces[:length]) for length in range(1, len(pieces))}
        if ancestors & items:
            continue
        is_item = is_in_container(name, modules)
        if is_item:
            items.add(name)
        if any(modules[name][1].children()):
            group = blocks if is_item else parts
            group.setdefault(len(pieces), []).append(name)

    groups = [[name for name in names if attentions.fullmatch(name)]]
    groups += [blocks[depth] for depth in sorted(blocks)]
    for depth in sorted(parts):
        is_wrapper = len(parts[depth]) == 1 and depth < max(parts)
        if not is_wrapper:
            groups.append(parts[depth])
    return [*groups, names]


def is_in_container(name: str, modules: Modules) -> bool:
    """Return whether a module is an item of a container, such as blocks.0 of blocks.

    `modules` lists only what can run, so a container that can't, such as a ModuleList, is the
    parent that is missing in it. A Sequential can run.
    """
    denoiser, _ = modules[name]
    parent = name.rpartition(".")[0]
    if parent in modules:
        return isinstance(modules[parent][1], nn.Sequential)
    return parent not in ("", denoiser)


def likely_blocks(modules: Modules) -> list[str]:
    """Return the names of the modules that look like blocks, of all denoisers."""
    blocks = []
    for denoiser in dict.fromkeys(of for of, _ in modules.values()):
        blocks += next(filter(None, block_groups(modules, denoiser)))
    return blocks


# ------------------------------------------------------------------------------ can they be hooked


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
