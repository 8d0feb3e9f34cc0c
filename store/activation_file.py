"""What one path holds: an activation file of collect.py, any float `.npy`, or a folder of saved
rows. No pickle is read."""

import hashlib
import json
import os
import re
import unicodedata
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UsageError
from store.arrow import is_arrow, open_arrow
from store.disk import checksum, fill, read_json, seen_from

PIECES = 32  # that a file without prompts is cut into
SIDE_FILES = (".tokens.npy", ".timesteps.npy", ".lengths.npy")  # that collect.py writes beside one
WHOLE_FILE = 1 << 24  # bytes; of a longer file `contents_checksum` reads some blocks
CHECKED_BLOCKS = 64
CHECKED_BLOCK_BYTES = 1 << 12
INVISIBLE = re.compile(r"[\s\u200b-\u200d\u2060\ufeff]+")
COLLECTED_WITH = (
    *("variant", "revision", "pipeline", "pipeline_kwargs", "images", "seed"),
    *("cache_every_n_timesteps", "tokens_per_step", "model_dtype", "fingerprints"),
)
"""Settings of a collection that decide what its vectors are like, beside the model and the hook
point."""


class StoredRows(NamedTuple):
    """Rows of equal width that lie one after another in a file."""

    path: str
    offset: int  # of the first row, in bytes
    num_rows: int
    width: int  # numbers in a row
    dtype: np.dtype
    tokens: int = 1  # rows of one (prompt, step)
    first: int = 0  # rows of the same array that come before these, in other files
    stamp: tuple[int, ...] | None = (
        None  # of the file when it was opened, see `file_stamp`; None: not looked at
    )

    def check_stamp(self, fd: int) -> None:
        """Raise UsageError where the file, opened again, is another than when its header was
        read."""
        if self.stamp is not None and file_stamp(os.fstat(fd)) != self.stamp:
            raise UsageError(
                f"{self.path} was replaced or changed while it was in use; start again"
            )

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


def file_stamp(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from one that took its place: which it is, how long, and when it was
    written."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class NpyHeader(NamedTuple):
    """What a `.npy` file says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of the first number, in bytes
    c_order: bool


def read_header(path: str | Path) -> NpyHeader:
    """The NpyHeader of a file. Raises OSError where it can't be read, ValueError where it is
    damaged, shorter than it says, or holds objects.
    """
    try:
        array = np.lib.format.open_memmap(
            path, mode="r"
        )  # checks all that, never unpickles, and reads only the header
    except OSError:
        raise
    except Exception as error:  # a damaged header can fail in any way
        raise ValueError(str(error)) from None
    return NpyHeader(
        array.shape, array.dtype, getattr(array, "offset", 0), array.flags.c_contiguous
    )


def read_pieces(files: list[StoredRows], pieces: np.ndarray) -> np.ndarray:
    """Copy rows of files of one width and dtype into a new array (n, width).

    pieces (many, 3): number of the file, first row, end row. Raises UsageError where a file has
    become shorter, OSError where one can't be read.
    """
    counts = pieces[:, 2] - pieces[:, 1]
    out = np.empty((int(counts.sum()), files[0].width), files[0].dtype)
    memory = memoryview(out.reshape(-1).view(np.uint8))
    at = 0
    for number, group in groupby(pieces.tolist(), key=lambda piece: piece[0]):
        file = files[number]
        fd = os.open(file.path, os.O_RDONLY)
        try:
            file.check_stamp(fd)
            for _, first, end in group:
                num_bytes = (end - first) * file.row_bytes
                fill(
                    fd, memory[at : at + num_bytes], file.offset + first * file.row_bytes, file.path
                )
                at += num_bytes
        finally:
            os.close(fd)
    return out


@dataclass(frozen=True)
class ActivationFile:
    """One opened path, seen as (P, S, T, d): prompts (one per image), steps, tokens and the width
    of a vector.

    A file of vectors alone counts as one prompt and one step.
    """

    path: Path
    meta: dict  # what collect.py says of the file; {} for files of other programs
    shape: tuple[int, ...]
    files: list[StoredRows]  # one for an .npy file, one or more for a folder of saved rows
    timesteps: list[float]  # the scheduler's value at each step; [] where the file does not say
    hook_name: str
    units: np.ndarray  # (n, 3): number in `files`, first row, end row; the rows of a unit show one prompt, and none is padding
    prompts: list  # (n,): which prompt each unit shows; units of the same value show the same
    whole_prompts: bool  # False where there are none, a single one, or unknown ones; then `prompts` numbers pieces or rows
    prompt_rows: list[dict] | None = None  # (P,): the lines of prompts.jsonl
    lengths: np.ndarray | None = (
        None  # (P,): how many tokens are no padding; None where the file holds no text tokens
    )

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
    def tokens_kept(self) -> StoredRows | None:
        """Which token of the grid each one is, a row (S * T,) for each of P; None where all were
        kept: see `read_tokens_kept`.

        Raises UsageError for a file that is damaged, or of another collection.
        """
        path = self.path.with_suffix(".tokens.npy")
        if not path.exists():
            return None
        header = read_side_header(path, (self.P, self.S, self.T))
        return StoredRows(str(path), header.offset, self.P, self.S * self.T, header.dtype)

    def read_tokens_kept(self, row: int) -> np.ndarray:
        """int64 (S, T): which tokens of the grid image `row` has. Raises UsageError for numbers
        that are not on the grid."""
        kept = read_pieces([self.tokens_kept], np.array([[0, row, row + 1]])).reshape(
            self.S, self.T
        )
        if kept.min() < 0 or kept.max() >= prod(self.grid):
            raise UsageError(
                f"{self.tokens_kept.path} is damaged: row {row} names a token outside of the grid {self.grid}"
            )
        return kept.astype(np.int64)

    @property
    def grid(self) -> tuple[int, ...]:
        """([frames,] height, width) on which the tokens lie; (T,) where no such grid is known."""
        grid = tuple(self.meta.get("grid") or ())
        if self.tokens_kept is None and prod(grid) != self.T:
            return (self.T,)
        return grid


def read_description(path):
    """The `.json` that collect.py wrote beside an activation file, {} where it wrote none. Raises
    UsageError if it is damaged."""
    path = Path(path)
    record = path.with_suffix(".json")
    if path.suffix != ".npy" or not record.exists():
        return {}
    meta = read_json(record)
    if "checksum" not in meta and not {"format", "hook_name"} <= meta.keys():
        return {}  # somebody else's
    if meta.get("checksum") != checksum(meta):
        raise UsageError(
            f"{record} was changed after it was written (its checksum differs); collect again or remove it"
        )
    if meta.get("model_folder") is not None:
        meta["model_folder"] = seen_from(record.parent, meta["model_folder"])
    return meta


def contents_checksum(path: str | Path) -> int:
    """Return a CRC-32 that another file of the same size does not have, but for rare accidents.

    A file of up to 16 MiB is read whole. Of a longer one, 64 evenly spaced blocks of 4 KiB are
    read, the first and the last bytes among them, so that 100 GB take milliseconds: a file that was
    exchanged is noticed, a single changed number between two blocks is not. Raises OSError if the
    file can't be read.
    """
    crc = 0
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        block_bytes = size
        starts = [0]
        if size > WHOLE_FILE:
            block_bytes = CHECKED_BLOCK_BYTES
            last = size - block_bytes
            starts = [last * block // (CHECKED_BLOCKS - 1) for block in range(CHECKED_BLOCKS)]
        for start in starts:
            block = bytearray(block_bytes)
            fill(fd, memoryview(block), start, path)
            crc = zlib.crc32(block, crc)
    finally:
        os.close(fd)
    return crc


def contents_checksums(path: str | Path) -> dict[str, int]:
    """Return {end of the name: `contents_checksum`} of an activation file and its side files, such
    as {".npy": 123, ".lengths.npy": 456}. Its description holds this as "contents".
    """
    checksums = {}
    for suffix in (".npy", *SIDE_FILES):
        file = Path(path).with_suffix(suffix)
        if file.exists():
            checksums[suffix] = contents_checksum(file)
    return checksums


def check_contents(path: str | Path, meta: dict) -> None:
    """Raise UsageError if an activation file or a side file is not the one that `meta` describes.

    meta: its description. Earlier versions wrote no "contents", so nothing is checked then. A side
    file that is missing is reported by the stage that needs it.
    """
    expected = meta.get("contents")
    if expected is None:
        return
    path = Path(path)
    for suffix, crc in contents_checksums(path).items():
        if expected.get(suffix) != crc:
            raise UsageError(
                f"{path.with_suffix(suffix)} is not the file that {path.with_suffix('.json')} "
                "describes: it was exchanged or changed after it was collected; put the old one "
                "back, or move the folder away and collect again"
            )


def refuse_unfinished(path):
    """Raise UsageError where a path names a file of a collection that was stopped, and the finished
    file is not there."""
    path = Path(path)
    partial = path if path.suffix == ".partial" else Path(f"{path}.partial")
    if partial.exists() and not (path.exists() and path != partial):
        raise UsageError(
            f"{partial} is not finished: the same collect.py command resumes it, "
            "and with a smaller --max_num_examples finishes it at that length"
        )


def open_file(path) -> tuple[NpyHeader, dict]:
    """What one activation file holds: an array (..., d) in C order, and its description ({} for a
    plain `.npy`).

    Raises UsageError for anything but floats of at least two axes, or bfloat16 bits that the
    description says are such.
    """
    path = Path(path)
    refuse_unfinished(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix != ".npy":
        raise UsageError(f"{path} is no .npy file")
    meta = read_description(path)
    lengths = path.with_suffix(".lengths.npy")
    if not meta and lengths.exists():
        raise UsageError(
            f"{path} lies beside {lengths.name}, which says which of its tokens are padding, but "
            f"{path.with_suffix('.json')} that describes both is not there; put it back, or move "
            f"{lengths.name} away to use the padding too"
        )
    try:
        header = read_header(path)
    except ValueError as error:
        raise UsageError(f"{path} is not a complete .npy file of numbers ({error})") from None
    shape, dtype = header.shape, header.dtype
    bfloat16 = dtype == np.uint16 and meta.get("dtype") == "bfloat16"
    if not bfloat16 and dtype not in (np.float16, np.float32, np.float64):
        raise UsageError(
            f"{path} holds {dtype}, expected float16, 32 or 64 (or bfloat16 with its .json)"
        )
    if len(shape) < 2 or not header.c_order:
        raise UsageError(
            f"{path} has shape {shape}, expected (prompts, ..., d) or (vectors, d) in C order"
        )
    if not prod(shape):
        raise UsageError(f"{path} is empty: shape {shape}")
    if list(meta.get("shape", shape)) != list(shape):
        raise UsageError(f"{path} has shape {list(shape)}, but its .json says {meta['shape']}")
    check_contents(path, meta)
    return header, meta


def read_prompts(path, count=None):
    """The rows of prompts.jsonl beside an activation file, one per image. Raises UsageError where
    it is not there, or damaged.

    count: how many images the file holds (None: it is opened to see).
    """
    listing = Path(path).with_name("prompts.jsonl")
    if not listing.exists():
        raise UsageError(
            f"{listing} is not there, so it is not known which prompts the activations are of"
        )
    lines = listing.read_bytes().removesuffix(b"\n").split(b"\n")
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UsageError(f"{listing} is damaged: {error}") from None
    if count is None:
        count = open_file(path)[0].shape[0]
    if len(rows) < count or not all(isinstance(row, dict) and "prompt" in row for row in rows):
        raise UsageError(f"{listing} does not say the prompts of {path}, one a line")
    recorded = read_description(path).get("prompts_digest")  # earlier versions wrote none
    if recorded not in (None, listing_digest(lines[:count])):
        raise UsageError(
            f"{listing} was changed after the activations were collected; put the old one back, or collect again"
        )
    return rows


def read_side_header(path, shape):
    """The header of a file of whole numbers that collect.py wrote beside an activation file. Raises
    UsageError for another."""
    try:
        header = read_header(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is missing or damaged ({error}); move its folder away and collect again"
        ) from None
    if header.shape != shape:
        raise UsageError(
            f"{path} is of another collection: it has shape {header.shape}, expected {shape}"
        )
    if header.dtype.kind not in "iu" or not header.c_order:
        raise UsageError(
            f"{path} holds {header.dtype}, expected whole numbers; move its folder away and collect again"
        )
    return header


def read_lengths(path, shape):
    """How many tokens of each prompt are no padding, (prompts,), of a file of text tokens (prompts,
    steps, tokens, d)."""
    path = Path(path).with_suffix(".lengths.npy")
    header = read_side_header(path, shape[:1])
    rows = StoredRows(str(path), header.offset, shape[0], 1, header.dtype)
    lengths = read_pieces([rows], np.array([[0, 0, shape[0]]]))[:, 0]
    if lengths.min() < 0 or lengths.max() > shape[2]:
        raise UsageError(
            f"{path} is damaged: a prompt of {lengths.max()} tokens in a file of {shape[2]}; collect again"
        )
    return lengths.astype(np.int64)


def open_activation_file(path):
    """Open a `.npy` file or a folder of saved rows. Raises UsageError where it can't be read,
    OSError where it is missing."""
    if is_arrow(path):
        return open_saved_rows(path)
    path = Path(path)
    header, meta = open_file(path)
    shape = header.shape
    prompt_rows, lengths = None, None
    if meta and len(shape) > 2:
        prompt_rows = read_prompts(path, shape[0])[
            : shape[0]
        ]  # the listing of a collection that grows is ahead of it
    if meta.get("stream") == "text":
        lengths = read_lengths(path, shape)
    images = image_prompts(path, shape, meta, prompt_rows)
    whole_prompts = len(set(images)) > 1
    first, end, prompts = cut_units(shape, images if whole_prompts else None, lengths)
    if not whole_prompts:
        prompts = [(str(path), piece) for piece in prompts]
    stamp = file_stamp(os.stat(path))
    rows = StoredRows(
        str(path),
        header.offset,
        prod(shape[:-1]),
        shape[-1],
        header.dtype,
        tokens=shape[-2],
        stamp=stamp,
    )
    return ActivationFile(
        path=path,
        meta=meta,
        shape=shape,
        files=[rows],
        timesteps=known_timesteps(shape, meta),
        hook_name=str(meta.get("hook_name", "")),
        units=np.stack([np.zeros_like(first), first, end], 1),
        prompts=prompts,
        whole_prompts=whole_prompts,
        prompt_rows=prompt_rows,
        lengths=lengths,
    )


def known_timesteps(shape, meta):
    """The scheduler's timestep of each step of a file (prompts, steps, tokens, d), [] where its
    description does not say."""
    times = meta.get("timesteps") or []
    return [float(t) for t in times] if len(shape) == 4 and len(times) == shape[1] else []


def image_prompts(path, shape, meta, prompt_rows):
    """Which prompt each image of a file shows: its `prompt_key` where these are known and differ,
    else a number of this file."""
    if len(shape) == 2:
        return []
    keys = [prompt_key(row) for row in prompt_rows or []]
    if len(set(keys)) > 1:
        return keys
    images_each = int(meta.get("num_images_per_prompt", 1))
    return [(str(path), row // images_each) for row in range(shape[0])]


def cut_units(shape, images, lengths):
    """Units of an array (prompts, ..., d) whose rows are vectors: first rows (n,), end rows (n,),
    and what each shows (n,).

    images: which prompt each of the array's images shows; None cuts contiguous pieces and numbers
    them. lengths: of text tokens, of which each (prompt, step) is a unit without its padding.
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
    """Open a folder of saved rows. Those that show one image are found by their file names, or by
    the order of their timesteps.

    Where neither tells, each row is held out or trained on alone, and `whole_prompts` is False.
    """
    arrays, columns = open_arrow(folder)
    counts = np.array([len(array) for *_, array in arrays])
    _, tokens, d = arrays[0][2].shape
    times, timesteps = columns.get("timestep") or [], []
    period = (
        times.index(times[0], 1) if times and times[0] in times[1:] else 0
    )  # else each has a timestep of its own
    images = None
    if period and times == times[:period] * (len(times) // period):
        timesteps = [float(t) for t in times[:period]]
        images = [row // period for row in range(len(times))]
    elif period:
        images = images_by_step(np.array(times))
    prompts = columns.get("file_name") or [(str(folder), image) for image in images or ()]
    whole_prompts = len(set(prompts)) > 1
    if not whole_prompts:
        prompts = [(str(folder), row) for row in range(counts.sum())]
    files = []
    for (path, offset, array), before in zip(arrays, (np.cumsum(counts) - counts).tolist()):
        files.append(
            StoredRows(
                path, offset, len(array) * tokens, d, array.dtype, tokens, first=before * tokens
            )
        )
    first = np.concatenate([np.arange(count) for count in counts]) * tokens
    units = np.stack([np.arange(len(counts)).repeat(counts), first, first + tokens], 1)
    shape, hook_name = (len(first), tokens, d), Path(folder).resolve().name
    return ActivationFile(
        Path(folder), {}, shape, files, timesteps, hook_name, units, prompts, whole_prompts
    )


def images_by_step(times):
    """Which image each row shows where a batch of images was saved step after step, and batch after
    batch: a list.

    times (n,): 900 900 500 500, 900 500 -> 0 1 0 1, 2 2. None for rows in another order.
    """
    begins = np.flatnonzero(np.append(True, times[1:] != times[:-1]))
    counts, values = np.diff(np.append(begins, len(times))), times[begins]
    again = np.flatnonzero(values[1:] == values[0])
    num_steps = int(again[0]) + 1 if len(again) else len(values)
    if len(values) % num_steps:
        return None
    values, counts = values.reshape(-1, num_steps), counts.reshape(-1, num_steps)
    if (
        len(set(values[0].tolist())) < num_steps
        or (values != values[0]).any()
        or (counts != counts[:, :1]).any()
    ):
        return None
    images, first = [], 0
    for count in counts[:, 0].tolist():
        images += list(range(first, first + count)) * num_steps
        first += count
    return images


def prompt_key(row: dict) -> str:
    """What tells one prompt from another as the model sees it, of a row of prompts.jsonl.

    Text encoders cut long prompts (the row then says what was `seen`), and some drop case, white
    space or the form of an accent. Prompts that differ in these alone count as one for every model:
    at worst one more is kept from training. A row without a text is known by the name of its real
    image, or else by its seed.
    """
    text = row.get("seen", row.get("prompt"))
    if isinstance(text, str) and text.strip():
        return "text " + INVISIBLE.sub("", unicodedata.normalize("NFKC", text).casefold())
    image = row.get("image_digest") or row.get("image")
    if image:
        return f"image {image}"
    if text not in (None, ""):
        return f"label {json.dumps(text)}"
    return f"seed {row.get('seed')}"


def hash_key(key: str) -> str:
    """16 hex digits of a prompt's key: an SAE's folder tells which prompts it has seen, and not
    what they say."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def listing_digest(lines: list[bytes]) -> str:
    """A digest of the first lines of prompts.jsonl, as the description of an activation file holds
    it."""
    return hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]


def collected_with(meta: dict) -> dict:
    """The settings in a file's description that decide what its vectors are like."""
    return {name: meta[name] for name in COLLECTED_WITH if name in meta}


def differences(theirs: dict, ours: dict) -> list[str]:
    """Sentences such as "seed 5, not 0": what both say, and ours otherwise; of an object each of
    its names."""
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

    "data": their paths. Where collect.py made them also the HookPoint ("hook_name", "side",
    "stream", "rows"), "model_name", the "fingerprint" of the denoiser and its "model_dtype", the
    ids of the "collections", and the settings that the first was "collected_with".
    """
    record = {"data": [str(source.path) for source in sources], "hook_name": sources[0].hook_name}
    meta = sources[0].meta
    if "side" in meta:
        record |= {
            name: meta.get(name)
            for name in ("side", "stream", "rows", "fingerprint", "model_dtype")
        }
        record["model_name"] = meta.get("model")
        record["collections"] = [source.meta.get("id") for source in sources]
        record["collected_with"] = collected_with(meta)
    return record
