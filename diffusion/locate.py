"""Find where the image's tokens, or the text's, are in what a module takes or returns.

There is no table of architectures. Before a denoiser runs for the first time, trial_runs.py runs it
with noise on parts of its arguments, and the tokens that change are counted here: the result is a
`Layout`, such as "image tokens 3 to 6 of the first tensor, on the grid (2, 2)", or the reason why
there is none, a `NotHookable`. It is kept in a dict that the caller hands in, so that it is found
once for all steps and batches with the same shapes and masks.

The main definition is `find_layouts`. The functions about `sampled` numbers find which part of a
denoiser's first argument belongs to the sample, if it has more: a picture to edit may be joined to
it.
"""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.forward import Forward
from diffusion.signatures import tensors, time_parameter, unwrap
from diffusion.token_layout import Layout, NotHookable, sample_grid, spatial_shape
from diffusion.trial_runs import Place, Run, Runs, Seen, bare, run_trials

NEVER_RAN = NotHookable(
    "never ran in a forward of the denoiser; is it compiled, or are its projections fused?"
)
SEVERAL_TIMES = NotHookable("runs several times in one forward of the denoiser")

SMALL_TENSOR = 1 << 18  # numbers; `describe` reads no larger ones


def find_layouts(
    forward: Forward,
    module: nn.Module,
    places: dict[Place, tuple[str, nn.Module]],
    known: dict,
) -> None:
    """Set `forward.layouts`, {(side, hook_name, stream): Layout | NotHookable}, before it runs.

    module: the denoiser. places: {(side, hook_name, stream): (denoiser, module)}; those of other
    denoisers are left out. known: what was found so far; what is new is added to it. Raises
    UsageError as `run_trials` does.
    """
    modules = {}
    for place, (denoiser, target) in places.items():
        if denoiser == forward.denoiser:
            modules[place] = target
    if not modules:
        return

    root = unwrap(module)
    time = time_parameter(root)
    sampled = sampled_key(forward)
    forward.sampled = known.get(sampled)
    arguments = {name: x for name, x in forward.arguments.items() if name != time}
    digest = known.get(("digest", sampled))
    key = (forward.denoiser, forward.rows, describe(arguments, forward.rows), digest)
    numbers = row_numbers(arguments, forward.rows)

    layouts = {}
    missing = {}
    for place, target in modules.items():
        layout = known.setdefault((key, place), LayoutsOfPlace()).get(numbers)
        if layout is None:
            missing[place] = target
        else:
            layouts[place] = layout
    if missing:
        with bare(root):
            runs = run_trials(root, forward, missing, known)
        for place in missing:
            layouts[place] = locate(runs, forward, place)
            known[key, place].found[numbers] = layouts[place]
    forward.layouts = layouts


@dataclass
class LayoutsOfPlace:
    """What was found for one place and arguments of the same shapes and masks.

    Integers of which each row has one are class numbers, which do not matter, or lengths of texts,
    which do. To look again for each new set of classes would make every step several times as slow.
    So a layout is believed for other numbers too if it was the same, in all rows, for each set that
    was met, and if the smallest, the largest and the sum of the numbers lie between those that were
    met: where a token begins grows with its row's length, with the longest of the batch, or with
    all of them together. With classes the looking soon ends.
    """

    found: dict[tuple, Layout | NotHookable] = field(default_factory=dict)
    """{row_numbers: what was found for them}."""

    def get(self, numbers: tuple) -> Layout | NotHookable | None:
        """Return the layout for these numbers; None if it has to be looked for."""
        if numbers in self.found:
            return self.found[numbers]
        layouts = list(self.found.values())
        if not layouts or any(layout != layouts[0] for layout in layouts):
            return None
        if isinstance(layouts[0], Layout):
            rows_differ = len(set(layouts[0].starts)) > 1 or len(set(layouts[0].counts)) > 1
            if rows_differ:
                return None
        for index, row in enumerate(numbers):
            for statistic in (min, max, sum):
                met = [statistic(other[index]) for other in self.found]
                if not min(met) <= statistic(row) <= max(met):
                    return None
        return layouts[0]


def row_numbers(arguments: dict[str, Any], rows: int) -> tuple[tuple[int, ...], ...]:
    """Return the integers of each argument that has one for each row, as class numbers are."""
    numbers = []
    for x in tensors(list(arguments.values())):
        if is_one_per_row(x, rows) and is_integer(x):
            numbers.append(tuple(x.flatten().tolist()))
    return tuple(numbers)


def is_one_per_row(x: Tensor, rows: int) -> bool:
    """Return whether a tensor has one number for each row, as (rows,) and (rows, 1) have."""
    return x.ndim > 0 and len(x) == rows and x.numel() == rows


def is_integer(x: Tensor) -> bool:
    """Return whether a tensor holds integers; truth values are none."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def describe(value: Any, rows: int) -> Any:
    """Return something hashable that is equal for arguments with the same layouts.

    A tensor counts by its shape. Its numbers count too if it is small and holds integers, or only
    two different numbers: it may be a mask, or a table of positions. The numbers of a tensor with
    one per row do not count here: integers are `row_numbers`, and a fraction, such as an angle that
    the model is conditioned on, is no length.
    """
    if torch.is_tensor(value):
        is_number = value.numel() == 1 and value.is_floating_point()
        if is_number or (is_one_per_row(value, rows) and value.dtype != torch.bool):
            return tuple(value.shape), value.dtype
        reads = 0 < value.numel() <= SMALL_TENSOR and not value.is_complex()
        if not reads or (value.is_floating_point() and not two_valued(value)):
            return tuple(value.shape), None
        return tuple(value.shape), value.cpu().double().numpy().tobytes()
    if isinstance(value, dict):
        return tuple((key, describe(item, rows)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(describe(item, rows) for item in value)
    return value if isinstance(value, (int, str)) else None


def two_valued(x: Tensor) -> bool:
    """Return whether a tensor holds no more than two different numbers, as masks do."""
    return bool(((x == x.min()) | (x == x.max())).all())


# ------------------------------------------------------------------------------- what the runs say


def not_stepped(denoiser: str) -> NotHookable:
    """Return why a module can't be hooked if its denoiser runs, and the scheduler gets nothing of
    what it returns."""
    return NotHookable(f"is part of {denoiser}, whose output does not reach the scheduler")


def locate(runs: Runs, forward: Forward, place: Place) -> Layout | NotHookable:
    """Return where the tokens of a place, (side, hook_name, stream), are.

    They are in the module's first tensor that has such tokens in every row. Image tokens change
    with the sample. Text tokens change with the text embeddings, and not with the sample.
    """
    side, hook_name, stream = place
    if hook_name in runs.idle:
        return NotHookable(runs.idle[hook_name])
    if (side, hook_name) not in runs.plain.seen:
        return NEVER_RAN
    seen = []
    for run in (runs.plain, runs.upper, runs.lower, runs.text):
        seen.append(run.seen.get((side, hook_name), []))
    if None in seen:
        return SEVERAL_TIMES

    in_plain_run = seen[0]
    if all(x.form is None for x in in_plain_run):
        shapes = " and ".join(str(tuple(x.shape)) for x in in_plain_run) or "none"
        return NotHookable(
            f"its {side} has no batch axis of {forward.rows} rows; the shape is {shapes}"
        )

    reason = f"its {side} holds no {stream} tokens"
    other_stream = "text" if stream == "image" else "image"
    for index, in_each_run in enumerate(zip(*seen)):
        plain = in_each_run[0]
        if plain.form is None:
            continue
        mask = mask_of(stream, *in_each_run)
        if mask is None:
            shape = tuple(plain.shape)
            reason = f"its {side} mixes the {forward.rows} rows of the batch; the shape is {shape}"
        elif mask.any(1).all():
            by_text = plain.tokens != in_each_run[-1].tokens
            return layout_of(runs, forward, place, index, plain, mask, by_text)
        elif mask_of(other_stream, *in_each_run).any(1).all():
            reason = f"its {side} holds no {stream} tokens, only {other_stream} tokens"
    return NotHookable(reason)


def mask_of(stream: str, plain: Seen, upper: Seen, lower: Seen, text: Seen) -> Tensor | None:
    """Return which tokens of a tensor belong to a stream, bool (rows, tokens).

    The arguments are the same tensor as seen in the four runs. None if the tensor mixes the rows:
    noise on one half of the sample's rows changed the other half.
    """
    half = (len(plain.tokens) + 1) // 2
    by_upper = plain.tokens != upper.tokens
    by_lower = plain.tokens != lower.tokens
    if by_upper[half:].any() or by_lower[:half].any():
        return None
    is_image = by_upper | by_lower
    if stream == "image":
        return is_image
    by_text = plain.tokens != text.tokens
    return by_text & ~is_image


def layout_of(
    runs: Runs,
    forward: Forward,
    place: Place,
    index: int,
    seen: Seen,
    mask: Tensor,
    by_text: Tensor,
) -> Layout | NotHookable:
    """Return the Layout of the tokens in `mask`, bool (rows, tokens), of a module's tensor number
    `index`.

    The tokens from the first to the last in the mask are taken. For a row [0, 0, 1, 1, 1] the start
    is 2 and the count 3. by_text: which tokens change with the text embeddings, bool (rows,
    tokens).
    """
    side, hook_name, stream = place
    starts = mask.int().argmax(1).tolist()
    ends = (mask.shape[1] - mask.flip(1).int().argmax(1)).tolist()
    counts = [end - start for start, end in zip(starts, ends)]

    # Some signs are only believed if a grid fits: gaps between the tokens, attention that is not
    # local, and tokens that change with both image and text. These may be image tokens with text
    # in their modulation. But where tokens mix otherwise than by attention, as in linear attention
    # or a mean over all of them, text tokens change with the image too.
    has_gaps = counts != mask.sum(1).tolist()
    text_may_mix_in = runs.has_text and not runs.attention_is_local
    grid = None
    if stream == "image":
        text_may_mix_in = text_may_mix_in or bool((mask & by_text).any())
        if len(set(counts)) == 1:
            module = runs.plain.modules[side, hook_name]
            grid = image_grid(runs.plain, forward, module, seen, counts[0])
        elif not text_may_mix_in:
            return NotHookable(
                f"its {side} has different numbers of image tokens in different rows: "
                f"{min(counts)} to {max(counts)}"
            )
    if grid is None and (has_gaps or text_may_mix_in):
        return NotHookable(
            "image and text tokens can't be told apart: from the first to the last of its "
            f"{stream} tokens there are {max(counts)}, on no grid of the sample; tokens may meet "
            "in the attention of PyTorch (scaled_dot_product_attention) and nowhere else"
        )

    grid = (max(counts),) if grid is None else tuple(grid)
    if stream == "text":
        counts = unmasked(forward, counts)
    return Layout(index, seen.form, starts, counts, grid, width_of(seen))


def width_of(seen: Seen) -> int:
    """Return the width d of a module's tokens. Where it is split into heads, it is the width of all
    heads together."""
    shape = seen.shape
    if seen.form == "map":
        return shape[1]
    if seen.form == "heads":
        return math.prod(shape[2:])
    if seen.form == "heads first":
        return shape[1] * shape[-1]
    return shape[-1]


def image_grid(
    run: Run, forward: Forward, module: nn.Module, seen: Seen, count: int
) -> tuple[int, ...] | None:
    """Return the grid of `count` image tokens, such as (16, 16) for 256; None if none fits.

    If the tensor is a map, it is the map's grid. Otherwise it is the grid of a map that the module
    or one around it took, otherwise that of the sample's patches, otherwise that of a tensor
    (rows, d, T) with the width on its second axis, as a wave has. The frames' axis is left out if
    there is a single frame: (1, 16, 16) becomes (16, 16).
    """
    has_heads = seen.form.startswith("heads")
    if len(seen.shape) > 3 and seen.form in ("map", "tokens"):
        grids = [spatial_shape(seen.shape, forward.rows, width_last=seen.form == "tokens")]
    else:
        paths = run.path_and_parents(module)
        grids = run.maps(paths[1:] if has_heads else paths)

    fitting = [grid for grid in grids if math.prod(grid) == count]
    grid = fitting[0] if fitting else None
    if not grid:
        grid = sample_grid(count, forward, getattr(run.root, "config", None))
    if not grid and seen.form == "map" and seen.shape[2:].numel() == count:
        grid = tuple(seen.shape[2:])
    if grid and len(grid) == 3 and grid[0] == 1:
        return grid[1:]
    return grid


def unmasked(forward: Forward, counts: list[int]) -> list[int]:
    """Return how many text tokens of each row a mask among the arguments leaves.

    The mask is (rows, tokens), of zeros and ones, and cuts off the end of each row: for counts
    [4, 4] and the mask [[1, 1, 0, 0], [1, 1, 1, 0]] it is [2, 3]. Without such a mask, and if the
    counts differ already, they are returned as they are.
    """
    longest = max(counts)
    if min(counts) < longest:
        return counts
    for mask in tensors(list(forward.arguments.values())):
        mask = mask.float()
        if tuple(mask.shape) != (forward.rows, longest) or set(mask.unique().tolist()) - {0, 1}:
            continue
        left = mask.sum(1).int().tolist()
        if all(n and row[:n].all() for row, n in zip(mask, left)):
            return left
    return counts


# ------------------------------------------------------- a first argument with more than the sample


def has_more_than_sample(forward: Forward, sample: Any) -> bool:
    """Return whether a denoiser's first argument has more numbers in a row than what the scheduler
    steps.

    A model that edits pictures gets (2, 8, 64, 64) for a sample of (2, 4, 64, 64): the other half
    is the picture.
    """
    if not torch.is_tensor(forward.sample) or not torch.is_tensor(sample):
        return False
    return forward.sample[0].numel() > sample[0].numel()


def sampled_key(forward: Forward) -> tuple:
    """Return the key under which `known` holds which numbers of such a first argument are
    sampled."""
    shape = tuple(forward.sample.shape[1:]) if torch.is_tensor(forward.sample) else None
    return "sampled", forward.denoiser, shape


def note_sampled(known: dict, forward: Forward, before: Tensor) -> None:
    """Add to `known` which numbers of a row of a denoiser's first argument are sampled.

    before: the first argument of the step before. The numbers that have changed are sampled; a
    picture to edit stays the same. Nothing is added if all or none have changed. Beside the mask
    stands its digest, so that equal masks lead to the same layouts.
    """
    if forward.sample.shape != before.shape:
        return
    mask = (forward.sample != before).any(0)
    if mask.any() and not mask.all():
        key = sampled_key(forward)
        known[key] = mask
        known["digest", key] = hashlib.sha256(mask.cpu().numpy().tobytes()).digest()
