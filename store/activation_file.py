"""What one path holds: an activation file of collect.py, any float `.npy`, or a folder of saved rows. No pickle is read."""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UsageError
from store.arrow import is_arrow, open_arrow
from store.disk import checksum, read_json, seen_from

PIECES = 32  # that a file without prompts is cut into
INVISIBLE = re.compile(r"[\s\u200b-\u200d\u2060\ufeff]+")
COLLECTED_WITH = (
    *("variant", "revision", "pipeline", "pipeline_kwargs", "images", "seed"),
    *("cache_every_n_timesteps", "tokens_per_step", "model_dtype", "fingerprints"),
)
"""Settings of a collection that decide what its vectors are like, beside the model and the hook point."""


class MappedRows(NamedTuple):
    """Vectors that lie one after another in a file of the disk."""

    path: str
    offset: int  # of the first vector, in bytes
    rows: np.ndarray  # (n, d), mapped from the file
    tokens: int  # vectors of one (prompt, step)
    first: int  # vectors of the same array that come before these


@dataclass(frozen=True)
class ActivationFile:
    """One opened path, seen as (P, S, T, d): prompts (one per image), steps, tokens and the width of a vector.

    A file of vectors alone counts as one prompt and one step.
    """

    path: Path
    meta: dict  # what collect.py says of the file; {} for files of other programs
    shape: tuple[int, ...]
    files: list[MappedRows]  # one for an .npy file, one or more for a folder of saved rows
    timesteps: list[float]  # the scheduler's value at each step; [] where the file does not say
    hook_name: str
    units: np.ndarray  # (n, 3): number in `files`, first row, end row; the rows of a unit show one prompt, and none is padding
    prompts: list  # (n,): which prompt each unit shows; units of the same value show the same
    whole_prompts: bool  # False where there are no prompts, or a single one; then `prompts` numbers contiguous pieces
    prompt_rows: list[dict] | None = None  # (P,): the lines of prompts.jsonl
    lengths: np.ndarray | None = None  # (P,): how many tokens are no padding; None where the file holds no text tokens

    @property
    def P(self) -> int:
        return 1 if len(self.shape) == 2 else self.shape[0]

    @property
    def S(self) -> int:
        return self.shape[1] if len(self.shape) > 3 else 1

    @property
    def T(self) -> int:
        return prod(self.shape[:-1]) // (self.P * self.S)

    @property
    def d(self) -> int:
        return self.shape[-1]

    @cached_property
    def tokens_kept(self) -> np.ndarray | None:
        """(P, S, T): which token of the grid each one is; None where all were kept. Raises UsageError for another shape."""
        path = self.path.with_suffix(".tokens.npy")
        if not path.exists():
            return None
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
        expected = (self.P, self.S, self.T)
        if kept.shape != expected:
            raise UsageError(f"{path} has shape {kept.shape}, expected {expected}")
        return kept

    @property
    def grid(self) -> tuple[int, ...]:
        """([frames,] height, width) on which the tokens lie; (T,) where no such grid is known."""
        grid = tuple(self.meta.get("grid") or ())
        if self.tokens_kept is None and prod(grid) != self.T:
            return (self.T,)
        return grid


def read_description(path):
    """The `.json` that collect.py wrote beside an activation file, {} where it wrote none. Raises UsageError if it is damaged."""
    path = Path(path)
    record = path.with_suffix(".json")
    if path.suffix != ".npy" or not record.exists():
        return {}
    meta = read_json(record)
    if "checksum" not in meta and not {"format", "hook_name"} <= meta.keys():
        return {}  # somebody else's
    if meta.get("checksum") != checksum(meta):
        raise UsageError(f"{record} was changed after it was written (its checksum differs); collect again or remove it")
    if meta.get("model_folder") is not None:
        meta["model_folder"] = seen_from(record.parent, meta["model_folder"])
    return meta


def refuse_unfinished(path):
    """Raise UsageError where a path names a file of a collection that was stopped, and the finished file is not there."""
    path = Path(path)
    partial = path if path.suffix == ".partial" else Path(f"{path}.partial")
    if partial.exists() and not (path.exists() and path != partial):
        raise UsageError(
            f"{partial} is not finished: the same collect.py command resumes it, "
            "and with a smaller --max_num_examples finishes it at that length"
        )


def open_file(path):
    """Map one activation file: its array (..., d), C order, read only, and its description ({} for a plain `.npy`).

    Raises UsageError for anything but floats of at least two axes, or bfloat16 bits that the description says are such.
    """
    path = Path(path)
    refuse_unfinished(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix != ".npy":
        raise UsageError(f"{path} is no .npy file")
    meta = read_description(path)
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


def read_prompts(path, count=None):
    """The rows of prompts.jsonl beside an activation file, one per image. Raises UsageError where it is not there, or damaged.

    count: how many images the file holds (None: it is opened to see).
    """
    listing = Path(path).with_name("prompts.jsonl")
    if not listing.exists():
        raise UsageError(f"{listing} is not there, so it is not known which prompts the activations are of")
    lines = listing.read_bytes().split(b"\n")[:-1]
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UsageError(f"{listing} is damaged: {error}") from None
    if count is None:
        count = len(open_file(path)[0])
    if len(rows) < count or not all(isinstance(row, dict) and "prompt" in row for row in rows):
        raise UsageError(f"{listing} does not say the prompts of {path}, one a line")
    recorded = read_description(path).get("prompts_digest")  # earlier versions wrote none
    if recorded not in (None, listing_digest(lines[:count])):
        raise UsageError(f"{listing} was changed after the activations were collected; put the old one back, or collect again")
    return rows


def read_lengths(path, shape):
    """How many tokens of each prompt are no padding, (prompts,), of a file of text tokens (prompts, steps, tokens, d)."""
    path = Path(path).with_suffix(".lengths.npy")
    try:
        lengths = np.load(path, allow_pickle=False)
    except Exception as error:  # a damaged header can fail in any way
        raise UsageError(f"{path} is missing or damaged ({error}); move its folder away and collect again") from None
    if lengths.shape != shape[:1]:
        raise UsageError(f"{path} is of another collection: {lengths.shape} for {shape[:1]}")
    return lengths.clip(0, shape[2])


def open_activation_file(path):
    """Open a `.npy` file or a folder of saved rows. Raises UsageError where it can't be read, OSError where it is missing."""
    if is_arrow(path):
        return open_saved_rows(path)
    path = Path(path)
    array, meta = open_file(path)
    prompt_rows, lengths = None, None
    if meta and array.ndim > 2:
        prompt_rows = read_prompts(path, len(array))[: len(array)]  # the listing of a collection that grows is ahead of it
    if meta.get("stream") == "text":
        lengths = read_lengths(path, array.shape)
    images = image_prompts(path, array.shape, meta, prompt_rows)
    whole_prompts = len(set(images)) > 1
    first, end, prompts = cut_units(array.shape, images if whole_prompts else None, lengths)
    if not whole_prompts:
        prompts = [(str(path), piece) for piece in prompts]
    rows = MappedRows(str(path), getattr(array, "offset", 0), array.reshape(-1, array.shape[-1]), array.shape[-2], 0)
    return ActivationFile(
        path=path,
        meta=meta,
        shape=array.shape,
        files=[rows],
        timesteps=known_timesteps(array.shape, meta),
        hook_name=str(meta.get("hook_name", "")),
        units=np.stack([np.zeros_like(first), first, end], 1),
        prompts=prompts,
        whole_prompts=whole_prompts,
        prompt_rows=prompt_rows,
        lengths=lengths,
    )


def known_timesteps(shape, meta):
    """The scheduler's timestep of each step of a file (prompts, steps, tokens, d), [] where its description does not say."""
    times = meta.get("timesteps") or []
    return [float(t) for t in times] if len(shape) == 4 and len(times) == shape[1] else []


def image_prompts(path, shape, meta, prompt_rows):
    """Which prompt each image of a file shows: its `prompt_key` where these are known and differ, else a number of this file."""
    if len(shape) == 2:
        return []
    keys = [prompt_key(row) for row in prompt_rows or []]
    if len(set(keys)) > 1:
        return keys
    images_each = int(meta.get("num_images_per_prompt", 1))
    return [(str(path), row // images_each) for row in range(shape[0])]


def cut_units(shape, images, lengths):
    """Units of an array (prompts, ..., d) whose rows are vectors: first rows (n,), end rows (n,), and what each shows (n,).

    images: which prompt each of the array's images shows; None cuts contiguous pieces and numbers them.
    lengths: of text tokens, of which each (prompt, step) is a unit without its padding.
    """
    num_vectors = prod(shape[:-1])
    if lengths is not None:
        steps, tokens = shape[1:3]
        first = np.arange(len(lengths) * steps) * tokens
        end = first + lengths.repeat(steps)
        if images is None:
            return first, end, (np.arange(len(first)) * PIECES // len(first)).tolist()
        return first, end, [image for image in images for _ in range(steps)]
    shows = list(range(min(PIECES, num_vectors))) if images is None else images
    cuts = np.arange(len(shows) + 1) * num_vectors // len(shows)
    return cuts[:-1], cuts[1:], shows


def open_saved_rows(folder):
    """Open a folder of saved rows. Rows of one file name, or one run through the timesteps, show one prompt."""
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
    files = [MappedRows(path, at, a.reshape(-1, d), tokens, b * tokens) for (path, at, a), b in zip(arrays, begin.tolist())]
    first = np.concatenate([np.arange(count) for count in counts]) * tokens
    units = np.stack([np.arange(len(counts)).repeat(counts), first, first + tokens], 1)
    shape, hook_name = (len(first), tokens, d), Path(folder).resolve().name
    return ActivationFile(Path(folder), {}, shape, files, timesteps, hook_name, units, names, whole)


def prompt_key(row: dict) -> str:
    """What tells one prompt from another as the model sees it, of a row of prompts.jsonl.

    Text encoders cut long prompts (the row then says what was `seen`), and some drop case, white space or the form of an
    accent. Prompts that differ in these alone count as one for every model: at worst one more is kept from training. A row
    without a text is known by the name of its real image, or else by its seed.
    """
    text = row.get("seen", row.get("prompt"))
    if isinstance(text, str) and text.strip():
        return "text " + INVISIBLE.sub("", unicodedata.normalize("NFKC", text).casefold())
    if row.get("image"):
        return f"image {row['image']}"
    if text not in (None, ""):
        return f"label {json.dumps(text)}"
    return f"seed {row.get('seed')}"


def hash_key(key: str) -> str:
    """16 hex digits of a prompt's key: an SAE's folder tells which prompts it has seen, and not what they say."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def listing_digest(lines: list[bytes]) -> str:
    """A digest of the first lines of prompts.jsonl, as the description of an activation file holds it."""
    return hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]


def collected_with(meta: dict) -> dict:
    """The settings in a file's description that decide what its vectors are like."""
    return {name: meta[name] for name in COLLECTED_WITH if name in meta}


def differences(theirs: dict, ours: dict) -> list[str]:
    """Sentences such as "seed 5, not 0": what both say, and ours otherwise; of an object each of its names."""
    found = []
    for name in theirs.keys() & ours.keys():
        before, now = theirs[name], ours[name]
        if isinstance(before, dict) and isinstance(now, dict):
            missing = dict.fromkeys((*before, *now))
            found += differences(missing | before, missing | now)
        elif before != now:
            found.append(f"{name} {now!r}, not {before!r}")
    return sorted(found)


def provenance(sources: list) -> dict:
    """What an SAE's cfg.json says of its training data, of the ActivationFiles `sources`.

    "data": their paths. Where collect.py made them also the HookPoint ("hook_name", "side", "stream", "rows"), "model_name", the
    "fingerprint" of the denoiser and its "model_dtype", the ids of the "collections", and the settings that the first was
    "collected_with".
    """
    record = {"data": [str(source.path) for source in sources], "hook_name": sources[0].hook_name}
    meta = sources[0].meta
    if "side" in meta:
        record |= {name: meta.get(name) for name in ("side", "stream", "rows", "fingerprint", "model_dtype")}
        record["model_name"] = meta.get("model")
        record["collections"] = [source.meta.get("id") for source in sources]
        record["collected_with"] = collected_with(meta)
    return record
