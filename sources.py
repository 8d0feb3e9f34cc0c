"""What one path holds: an activation file of collect.py, finished or not, any float `.npy`, or a folder of saved rows.

Of a collection that was stopped only the finished batches count. No pickle is read.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arrow_file import is_arrow, open_arrow
from disk import checksum, read_json
from errors import UsageError
from hook_point import HookPoint
from store import check_size, safe_counts


class File(NamedTuple):
    """Rows that lie one after another in a file."""

    path: str
    offset: int
    """of the first row, in bytes"""

    rows: np.ndarray
    """(rows, d), mapped from the file"""

    tokens: int
    """rows of one (prompt, step)"""

    first: int
    """rows of the same array that come before these"""


def read_description(path):
    """What collect.py says of an activation file, {} where it does not: its `.json`, or what `unfinished` finds.

    Raises UsageError if it is damaged.
    """
    path = Path(path)
    record = stem_of(path).with_suffix(".json")
    if path.suffix != ".npy" or not record.exists():
        return unfinished(path)
    meta = read_json(record)
    if "checksum" not in meta and not {"format", "hook_name", "mean_norm"} <= meta.keys():
        return {}  # somebody else's
    if meta.get("checksum") != checksum(meta):
        raise UsageError(f"{record} was changed after it was written (its checksum differs); collect again or remove it")
    return meta


def stem_of(path):
    """`<name>.npy` of `<name>.npy` and `<name>.npy.partial`."""
    return path.with_suffix("") if path.suffix == ".partial" else path


def unfinished(path):
    """The description of a file of a collection that was stopped, and "unfinished": its folder's progress.npy. Else {}."""
    path = Path(path)
    record, progress = path.with_name("collect.json"), path.with_name("progress.npy")
    if not (record.exists() and progress.exists() and path.exists()):
        return {}
    there = read_json(record)
    settings, facts = there.get("settings") or {}, there.get("facts") or {}
    end = {"output": "", "input": ".input", "diff": ".diff"}[settings.get("side", "output")]
    end += ".text" if settings.get("stream") == "text" else ""
    for hook_name in facts:
        for rows in ("cond", "uncond") if settings.get("rows") == "both" else (settings.get("rows"),):
            if stem_of(path).name == f"{hook_name}{'.uncond' if rows == 'uncond' else ''}{end}.npy":
                meta = settings | {"hook_name": hook_name, "rows": rows, **facts[hook_name]}
                return meta | {"shape": list(check_size(path)), "unfinished": str(progress)}
    return {}


def safe_rows(array, meta):
    """Which rows of a file's first axis are written: all but those of batches that collect.py had not done: bool (prompts,)."""
    safe = np.ones(len(array), bool)
    if "unfinished" in meta:
        batch = meta["batch_size"] * meta["num_images_per_prompt"]
        number, row = np.divmod(np.arange(len(array)), batch)
        done = safe_counts(np.load(meta["unfinished"], allow_pickle=False))
        safe = row < np.pad(done, (0, max(0, number[-1] + 1 - len(done))))[number]
    return safe


def open_file(path):
    """Map one activation file: its array (..., d), C order, read only, and its description ({} for a plain `.npy`).

    Raises UsageError for anything but floats of at least two axes, or bfloat16 bits that the description says are such.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    meta = read_description(path)
    if path.suffix != ".npy" and not meta:
        raise UsageError(f"{path} is no .npy file, nor one of a collection that was stopped")
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
    except OSError:
        raise
    except Exception as error:  # a damaged header can fail in any way; the reason is in the message
        raise UsageError(f"{path} is not a complete .npy file of numbers ({error})") from None
    bfloat16 = array.dtype == np.uint16 and meta.get("dtype") == "bfloat16"
    if not bfloat16 and array.dtype not in (np.float16, np.float32, np.float64):
        raise UsageError(f"{path} holds {array.dtype}, expected float16, 32 or 64 (or bfloat16 with its .json)")
    if array.ndim < 2 or not array.flags.c_contiguous:
        raise UsageError(f"{path} has shape {array.shape}, expected (prompts, ..., d) or (vectors, d) in C order")
    if not array.size:
        raise UsageError(f"{path} is empty: shape {array.shape}")
    if list(meta.get("shape", array.shape)) != list(array.shape):
        raise UsageError(f"{path} has shape {list(array.shape)}, but its .json says {meta['shape']}")
    return array, meta


def read_prompts(path):
    """The rows of prompts.jsonl beside an activation file, one a picture. Raises UsageError where it is not there, or damaged."""
    listing = Path(path).with_name("prompts.jsonl")
    if not listing.exists():
        raise UsageError(f"{listing} is not there, so it is not known which prompts the activations are of")
    try:
        rows = [json.loads(line) for line in listing.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise UsageError(f"{listing} is damaged: {error}") from None
    if len(rows) < len(open_file(path)[0]) or not all(isinstance(row, dict) and "prompt" in row for row in rows):
        raise UsageError(f"{listing} does not say the prompts of {path}, one a line")
    return rows


def prompts_of(path, array, meta):
    """What says which prompt each row of the file's first axis is of: its text in prompts.jsonl, or else a number."""
    listing, n = Path(path).with_name("prompts.jsonl"), int(meta.get("num_images_per_prompt", 1))
    if meta and listing.exists():
        try:
            texts = [json.loads(line).get("prompt") for line in listing.read_text("utf-8").splitlines()]
        except (ValueError, AttributeError):
            raise UsageError(f"{listing} can't be read; collect again, or move it away") from None
        texts = texts[: len(array)] if "unfinished" in meta else texts  # the listing may be ahead of the file
        if len(texts) == len(array) and None not in texts and len(set(texts)) > 1:
            return texts
    return [(path, row // n) for row in range(len(array))]


def read_lengths(path, array):
    """Tokens of each prompt (prompts,) that are no padding, of a file of text tokens."""
    path = stem_of(Path(path)).with_suffix(".lengths.npy")
    path = path if path.exists() else Path(f"{path}.partial")
    if check_size(path) != array.shape[:1]:
        raise UsageError(f"{path} is of another collection: {check_size(path)} for {array.shape[:1]}")
    return np.load(path, allow_pickle=False).clip(0, array.shape[2])


def read_timesteps(array, meta):
    """The scheduler's timestep of each step of a file of (prompts, steps, tokens, d), [] where it does not say."""
    times = meta.get("timesteps") or []
    return [float(t) for t in times] if array.ndim == 4 and len(times) == array.shape[1] else []


class Source(NamedTuple):
    """What one path holds."""

    files: list[File]
    units: np.ndarray
    """(n, 3): file, first row, end row; each of one prompt"""

    prompts: list
    """which prompt each unit is of"""

    timesteps: list[float]
    shape: tuple[int, ...]
    hook_name: str
    whole_prompts: bool
    note: str = ""


def open_source(path):
    """A `.npy` file, finished or not, or a folder of saved rows as a Source."""
    if is_arrow(path):
        return open_rows(path)
    array, meta = open_file(path)
    rows = array.reshape(-1, array.shape[-1])
    safe, note, whole = safe_rows(array, meta), "", True
    names = prompts_of(path, array, meta) if array.ndim > 2 else []
    if "unfinished" in meta:
        n = meta["num_images_per_prompt"]
        note = f"{path}: {safe.sum() // n} of {len(array) // n} prompts; the collection is not finished"
        if len({name for name, there in zip(names, safe) if there}) < 2:
            raise UsageError(f"{note}, and has too little to train on yet; go on with it")
    elif len(set(names)) < 2:
        names, whole = [(path, piece) for piece in range(min(32, len(rows)))], False
    cuts = np.arange(len(names) + 1) * len(rows) // len(names)
    first, end = cuts[:-1], cuts[1:]
    if len(names) == len(array):
        first, end, names = first[safe], end[safe], [name for name, there in zip(names, safe) if there]
        if meta.get("stream") == "text":  # without the padding of each prompt's steps
            first = (first[:, None] + np.arange(array.shape[1]) * array.shape[2]).reshape(-1)
            end = first + read_lengths(path, array)[safe].repeat(array.shape[1])
            names = [name for name in names for _ in range(array.shape[1])]
    file = File(str(path), getattr(array, "offset", 0), rows, array.shape[-2], 0)
    units, hook_name = np.stack([np.zeros_like(first), first, end], 1), str(meta.get("hook_name", ""))
    return Source([file], units, names, read_timesteps(array, meta), array.shape, hook_name, whole, note)


def open_rows(folder):
    """A folder of saved rows as a Source. Rows of one file name, or one run through the timesteps, are one prompt."""
    arrays, columns = open_arrow(folder)
    counts = np.array([len(array) for *_, array in arrays])
    _, tokens, d = arrays[0][2].shape
    names, times, timesteps = [(str(folder), row) for row in range(counts.sum())], columns.get("timestep"), []
    if times and times[0] in times[1:]:  # else each row has a timestep of its own, as random ones are
        period = times.index(times[0], 1)
        if times == times[:period] * (len(times) // period):
            timesteps = [float(t) for t in times[:period]]
            names = [(str(folder), row // period) for row in range(len(times))]
    names = columns.get("file_name") or names
    whole = len(set(names)) > 1
    names = names if whole else list(range(len(names)))
    begin = np.cumsum(counts) - counts
    files = [File(path, at, a.reshape(-1, d), tokens, b * tokens) for (path, at, a), b in zip(arrays, begin.tolist())]
    first = np.concatenate([np.arange(count) for count in counts]) * tokens
    units = np.stack([np.arange(len(counts)).repeat(counts), first, first + tokens], 1)
    return Source(files, units, names, timesteps, (len(first), tokens, d), Path(folder).resolve().name, whole)


def trained_on(sae) -> HookPoint:
    """The hook point of an SAE's training vectors, from the descriptions beside the files that `sae.cfg["data"]` names.

    Raises UsageError where a file has no description (moved, or not made by collect.py), or where two name different ones.
    """
    found = []
    for path in sae.cfg.get("data") or []:
        meta = read_description(path)
        try:
            found.append(HookPoint.from_description(meta))
        except UsageError as error:
            raise UsageError(f"{Path(path).with_suffix('.json')} is not there or not complete: {error}") from None
    if not found:
        raise UsageError("the SAE's cfg.json names no activation file, so it is not known where in the model it belongs")
    for other in found:
        if other != found[0]:
            raise UsageError(f"the SAE was trained on files of several hook points, {found[0]} and {other}")
    return found[0]
