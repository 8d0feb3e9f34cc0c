"""What lies at one path of activations: a file of collect.py, any float `.npy`, or saved rows.

    file = open_activation_file("activations/mid_block.npy")
    file.P, file.S, file.T, file.d       # 128 prompts, 50 steps, 64 tokens, width 1280
    file.meta["model"]                   # what the .json beside it says

The main definitions are `ActivationFile` and `open_activation_file`; `read_pieces` reads its
numbers. store/dataset.py joins several files and splits their prompts. "Saved rows" are a folder
that Hugging Face `datasets` wrote. No pickle is read.
"""

import hashlib
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UsageError
from store.disk import checksum, fill, read_json, seen_from

PIECES = 32  # that a file without prompts is cut into
SIDE_FILES = (".tokens.npy", ".timesteps.npy", ".lengths.npy")  # that collect.py writes beside one
WHOLE_FILE = 1 << 24  # bytes; of a longer file `contents_checksum` reads some blocks
CHECKED_BLOCKS = 64
CHECKED_BLOCK_BYTES = 1 << 12
INVISIBLE = re.compile(r"[\s\u200b-\u200d\u2060\ufeff]+")  # white space, also of no width
COLLECTED_WITH = (
    *("variant", "revision", "model_files", "lora", "pipeline", "pipeline_kwargs", "images"),
    *("seed", "cache_every_n_timesteps", "tokens_per_step", "model_dtype", "fingerprints"),
)
"""Settings of a collection that decide what its vectors are like, beside the model and the hook
point."""


class StoredRows(NamedTuple):
    """Rows of equal width that lie one after another in a file."""

    path: str

    offset: int
    """Of the first row, in bytes."""

    num_rows: int

    width: int
    """Numbers in a row."""

    dtype: np.dtype

    tokens: int = 1
    """Rows of one (prompt, step)."""

    first: int = 0
    """Rows of the same array that come before these, in other files."""

    stamp: tuple[int, ...] | None = None
    """`file_stamp` of the file when it was opened; None if it was not looked at."""

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def check_stamp(self, fd: int) -> None:
        """Raise UsageError if the file, opened again as `fd`, was exchanged or changed since."""
        if self.stamp is not None and file_stamp(os.fstat(fd)) != self.stamp:
            raise UsageError(
                f"{self.path} was replaced or changed while it was in use; start again"
            )


def file_stamp(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from another one at its path: which it is, its size and its time."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class ActivationFile:
    """One opened path, seen as (P, S, T, d): prompts, steps, tokens and the width of a vector.

    An entry of the first axis is one image; a prompt with several images has several. A file of
    vectors alone, (vectors, d), counts as one prompt and one step.
    """

    path: Path

    meta: dict
    """The description that collect.py wrote; {} for files of other programs."""

    shape: tuple[int, ...]

    files: list[StoredRows]
    """One for a .npy file, one or more for a folder of saved rows."""

    timesteps: list[float]
    """The scheduler's value at each step; [] if the file does not say it."""

    hook_name: str

    units: np.ndarray
    """(n, 3): index in `files`, first row, end row. The rows of a unit show one prompt, and none is
    padding."""

    prompts: list[tuple]
    """(n,): the keys of what each unit shows, see `prompt_keys`. Units that share a key belong
    together."""

    whole_prompts: bool
    """False if there are no prompts, only one, or unknown ones. Then `prompts` numbers pieces or
    rows: [((path, 0),), ((path, 1),), ...]."""

    prompt_rows: list[dict] | None = None
    """(P,): the lines of prompts.jsonl."""

    lengths: np.ndarray | None = None
    """(P,): how many tokens are no padding; None if the file does not hold text tokens."""

    @property
    def P(self) -> int:
        if len(self.shape) == 2:
            return 1
        return self.shape[0]

    @property
    def S(self) -> int:
        if len(self.shape) <= 3:
            return 1
        return self.shape[1]

    @property
    def T(self) -> int:
        return prod(self.shape[:-1]) // (self.P * self.S)

    @property
    def d(self) -> int:
        return self.shape[-1]

    @property
    def grid(self) -> tuple[int, ...]:
        """([frames,] height, width) on which the tokens lie; (T,) if no such grid is known."""
        grid = tuple(self.meta.get("grid") or ())
        if self.tokens_kept is None and prod(grid) != self.T:
            return (self.T,)
        return grid

    @cached_property
    def tokens_kept(self) -> StoredRows | None:
        """Where it lies which tokens of the grid were stored (see `read_tokens_kept`): one row (S *
        T,) per image. None if all were stored.

        Raises UsageError for a file that is damaged, or belongs to another collection.
        """
        path = self.path.with_suffix(".tokens.npy")
        if not path.exists():
            return None
        header = read_side_header(path, (self.P, self.S, self.T))
        return StoredRows(str(path), header.offset, self.P, self.S * self.T, header.dtype)

    def read_tokens_kept(self, image: int) -> np.ndarray:
        """Return which token of the grid each stored token of an image is: int64 (S, T).

        On a grid (8, 8), token 10 lies at row 1 and column 2. Raises UsageError for numbers that
        are not on the grid.
        """
        numbers = read_pieces([self.tokens_kept], np.array([[0, image, image + 1]]))
        if numbers.min() < 0 or numbers.max() >= prod(self.grid):
            raise UsageError(
                f"{self.tokens_kept.path} is damaged: row {image} names a token "
                f"outside of the grid {self.grid}"
            )
        return numbers.reshape(self.S, self.T).astype(np.int64)


def read_pieces(files: list[StoredRows], pieces: np.ndarray) -> np.ndarray:
    """Copy rows of files of one width and dtype into a new array (n, width).

    pieces (many, 3): index in `files`, first row, end row. Raises UsageError if a file has become
    shorter or was exchanged, OSError if it can't be read.
    """
    num_rows = int((pieces[:, 2] - pieces[:, 1]).sum())
    rows = np.empty((num_rows, files[0].width), files[0].dtype)
    memory = memoryview(rows.reshape(-1).view(np.uint8))
    done = 0  # bytes
    for number, pieces_of_file in groupby(pieces.tolist(), key=lambda piece: piece[0]):
        file = files[number]
        fd = os.open(file.path, os.O_RDONLY)
        try:
            file.check_stamp(fd)
            for _, first, end in pieces_of_file:
                num_bytes = (end - first) * file.row_bytes
                offset = file.offset + first * file.row_bytes
                fill(fd, memory[done : done + num_bytes], offset, file.path)
                done += num_bytes
        finally:
            os.close(fd)
    return rows


# ---- opening


def open_activation_file(path: str | Path) -> ActivationFile:
    """Open a `.npy` file or a folder of saved rows.

    Raises UsageError if it can't be used, or if its side files or its prompts.jsonl are damaged or
    exchanged; OSError if it is missing.
    """
    path = follow_link(path)
    if is_saved_rows(path):
        return open_saved_rows(path)
    header, meta = check_file(path)
    shape = header.shape
    prompt_rows = None
    if meta and len(shape) > 2:
        # the listing of a collection that is being extended is ahead of the file
        prompt_rows = read_prompts(path, shape[0])[: shape[0]]
    lengths = read_lengths(path, shape) if meta.get("stream") == "text" else None

    images = image_prompts(path, shape, meta, prompt_rows)
    whole_prompts = len(set(group_units(images)[1])) > 1
    first, end, prompts = cut_units(shape, images if whole_prompts else None, lengths)
    if not whole_prompts:
        prompts = [((str(path), piece),) for piece in prompts]
    rows = StoredRows(
        str(path),
        header.offset,
        prod(shape[:-1]),
        shape[-1],
        header.dtype,
        tokens=shape[-2],
        stamp=file_stamp(os.stat(path)),
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


def follow_link(path: str | Path) -> Path:
    """Return the file that a symbolic link means, if its description or side files lie there.

    A link whose description lies beside the link keeps its path, as in a folder of a download whose
    files are all links. So does a link to a `.npy` without such files.
    """
    path = Path(path)
    if not path.is_symlink() or path.with_suffix(".json").exists():
        return path
    real_path = Path(os.path.realpath(path))
    for suffix in (".json", *SIDE_FILES):
        if real_path.suffix == ".npy" and real_path.with_suffix(suffix).exists():
            return real_path
    return path


class NpyHeader(NamedTuple):
    """What a `.npy` file says about its array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    offset: int
    """Of the first number, in bytes."""

    c_order: bool


def read_header(path: str | Path) -> NpyHeader:
    """Read what a `.npy` file says about its array.

    Raises OSError if it can't be read, ValueError if it is damaged, shorter than it says, or holds
    objects.
    """
    try:
        # checks all that, never unpickles, and reads only the header
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged header can fail in any way
        raise ValueError(str(error)) from None
    offset = getattr(array, "offset", 0)
    return NpyHeader(array.shape, array.dtype, offset, array.flags.c_contiguous)


def check_file(path: str | Path) -> tuple[NpyHeader, dict]:
    """Check one activation file; return its header and its description ({} for a plain `.npy`).

    Raises UsageError unless it holds a non-empty array of floats (or of bfloat16, stored as uint16)
    in C order, with two axes or more, and is the file that its description is about. An unfinished
    file, and one with side files but no description, are refused as well. Raises FileNotFoundError
    if there is no such file.
    """
    path = Path(path)
    refuse_unfinished(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix != ".npy":
        raise UsageError(f"{path} is no .npy file")
    meta = read_description(path)
    if not meta:
        refuse_lone_side_files(path)
    try:
        header = read_header(path)
    except ValueError as error:
        raise UsageError(f"{path} is not a complete .npy file of numbers ({error})") from None
    check_array(path, header, meta)
    check_contents(path, meta)
    return header, meta


def check_array(path: Path, header: NpyHeader, meta: dict) -> None:
    """Raise UsageError unless an array can hold activations, and has the shape that its description
    `meta` says.

    It must be a non-empty array of floats (or of bfloat16, stored as uint16, if `meta` says so) in
    C order, with two axes or more.
    """
    shape = header.shape
    dtype = header.dtype
    is_bfloat16 = dtype == np.uint16 and meta.get("dtype") == "bfloat16"
    if not is_bfloat16 and dtype not in (np.float16, np.float32, np.float64):
        way_on = ""
        if dtype.kind == "f" and dtype.itemsize in (2, 4, 8):  # the bytes are in the other order
            way_on = f'; save x.astype("<f{dtype.itemsize}") instead of the array x'
        raise UsageError(
            f"{path} holds {dtype}, expected float16, 32 or 64 (or bfloat16 with its .json){way_on}"
        )
    if len(shape) < 2:
        raise UsageError(
            f"{path} has shape {shape}, expected (prompts, ..., d) or (vectors, d) in C order"
        )
    if not header.c_order:
        raise UsageError(
            f"{path} is in Fortran order, expected C order; "
            "save np.ascontiguousarray(x) instead of the array x"
        )
    if not prod(shape):
        raise UsageError(f"{path} is empty: shape {shape}")
    if list(meta.get("shape", shape)) != list(shape):
        raise UsageError(f"{path} has shape {list(shape)}, but its .json says {meta['shape']}")


def refuse_unfinished(path: str | Path) -> None:
    """Raise UsageError if a path names a file of a stopped collection that has no finished one."""
    path = Path(path)
    partial = path if path.suffix == ".partial" else Path(f"{path}.partial")
    is_finished = path != partial and path.exists()
    if partial.exists() and not is_finished:
        raise UsageError(
            f"{partial} is not finished: the same collect.py command resumes it, "
            "and with a smaller --max_num_examples finishes it at that length"
        )


def refuse_lone_side_files(path: Path) -> None:
    """Raise UsageError if a file without a description has side files of collect.py beside it.

    Without the description, padding would count as vectors, and prompts would not be known.
    """
    for suffix in SIDE_FILES:
        side_file = path.with_suffix(suffix)
        if side_file.exists():
            raise UsageError(
                f"{path} lies beside {side_file.name}, but {path.with_suffix('.json')}, which "
                f"describes both, is not there; put it back, or move {side_file.name} away to use "
                "all vectors of the file, padding too"
            )


def read_description(path: str | Path) -> dict:
    """Read the `.json` that collect.py wrote beside an activation file; {} if it wrote none.

    Raises UsageError if the description is damaged.
    """
    path = Path(path)
    record = path.with_suffix(".json")
    if path.suffix != ".npy" or not record.exists():
        return {}
    meta = read_json(record)
    if "checksum" not in meta and not {"format", "hook_name"} <= meta.keys():
        return {}  # another program's file
    if meta.get("checksum") != checksum(meta):
        raise UsageError(
            f"{record} was changed after it was written (its checksum differs); "
            "collect again or remove it"
        )
    for key in ("model_folder", "model_file"):
        if meta.get(key) is not None:
            meta[key] = seen_from(record.parent, meta[key])
    if "lora_paths" in meta:
        meta["lora_paths"] = [seen_from(record.parent, path) for path in meta["lora_paths"]]
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


def read_prompts(path: str | Path, count: int | None = None) -> list[dict]:
    """Return all lines of prompts.jsonl beside an activation file, parsed: one dict per image.

    count: how many images the file holds; if it is not given, the file's header says it. While a
    collection is extended, there may be more lines than that. Raises UsageError if the listing is
    missing, damaged or too short, or is not the one that the file was collected with.
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
        count = check_file(path)[0].shape[0]
    have_prompts = all(isinstance(row, dict) and "prompt" in row for row in rows)
    if len(rows) < count or not have_prompts:
        raise UsageError(f"{listing} does not say the prompts of {path}, one a line")
    recorded = read_description(path).get("prompts_digest")  # earlier versions wrote none
    if recorded not in (None, listing_digest(lines[:count])):
        raise UsageError(
            f"{listing} was changed after the activations were collected; "
            "put the old one back, or collect again"
        )
    return rows


def listing_digest(lines: Iterable[bytes]) -> str:
    """Return 16 hex digits of a digest of some lines of prompts.jsonl. A description holds that of
    the lines of its file."""
    return hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]


def read_side_header(path: Path, shape: tuple[int, ...]) -> NpyHeader:
    """Read the header of a file of whole numbers that collect.py wrote beside an activation file.

    Raises UsageError if it is missing, damaged or of another shape.
    """
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
            f"{path} holds {header.dtype}, expected whole numbers; "
            "move its folder away and collect again"
        )
    return header


def read_lengths(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read how many tokens of each prompt are no padding: int64 (prompts,).

    path: the activation file of text tokens, of shape (prompts, steps, tokens, d). Raises
    UsageError if the lengths are missing or damaged.
    """
    path = Path(path).with_suffix(".lengths.npy")
    num_prompts = shape[0]
    header = read_side_header(path, (num_prompts,))
    rows = StoredRows(str(path), header.offset, num_prompts, 1, header.dtype)
    lengths = read_pieces([rows], np.array([[0, 0, num_prompts]]))[:, 0]
    if lengths.min() < 0 or lengths.max() > shape[2]:
        raise UsageError(
            f"{path} is damaged: a prompt of {lengths.max()} tokens in a file of {shape[2]}; "
            "collect again"
        )
    return lengths.astype(np.int64)


def known_timesteps(shape: tuple[int, ...], meta: dict) -> list[float]:
    """Return the scheduler's value at each step of a file (prompts, steps, tokens, d).

    [] if the description does not say it, or says it for another number of steps.
    """
    timesteps = meta.get("timesteps") or []
    if len(shape) != 4 or len(timesteps) != shape[1]:
        return []
    return [float(timestep) for timestep in timesteps]


# ---- prompts and units


def image_prompts(
    path: Path, shape: tuple[int, ...], meta: dict, prompt_rows: list[dict] | None
) -> list[tuple]:
    """Return for each image of a file the keys of the prompt that it shows: (P,).

    They are the image's `prompt_keys` if the prompts are known and differ. Otherwise there is one
    key per image, (path, number): with two images per prompt, the images 0 to 3 have the numbers
    0 0 1 1. A file of two axes has no images, so it is [].
    """
    if len(shape) == 2:
        return []
    keys = [prompt_keys(row) for row in prompt_rows or []]
    _, groups = group_units(keys)
    if len(set(groups)) > 1:
        return keys
    images_per_prompt = int(meta.get("num_images_per_prompt", 1))
    return [((str(path), row // images_per_prompt),) for row in range(shape[0])]


def cut_units(
    shape: tuple[int, ...], images: list | None, lengths: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, list]:
    """Cut an array (prompts, ..., d), whose rows are vectors, into units that show one prompt each.

    images: which prompt each image shows; each image is one unit. None: the array is cut into 32
    contiguous units, which are numbered. lengths: of text tokens; each (prompt, step) is a unit
    without its padding. Returns the units' first rows (n,), end rows (n,), and what each shows
    (n,). For shape (2, 3, 4, d) and images "a", "b" it gives [0, 12], [12, 24] and ["a", "b"].
    """
    num_vectors = prod(shape[:-1])
    if lengths is None:
        shows = images
        if images is None:
            shows = list(range(min(PIECES, num_vectors)))
        cuts = np.arange(len(shows) + 1) * num_vectors // len(shows)
        return cuts[:-1], cuts[1:], shows

    steps, tokens = shape[1:3]
    num_units = len(lengths) * steps
    first = np.arange(num_units) * tokens
    end = first + lengths.repeat(steps)
    if images is None:
        return first, end, (np.arange(num_units) * PIECES // num_units).tolist()
    shows = []
    for image in images:
        shows += [image] * steps
    return first, end, shows


def prompt_key(row: dict) -> str:
    """Return what tells one prompt from another, as the model sees it.

    row: a line of prompts.jsonl. Text encoders cut long prompts (the row then says what was
    `seen`), and some drop case, white space or the form of an accent. Prompts that differ in these
    alone count as one for every model: at worst one more prompt is kept from training. For "A  Cat"
    it gives "text acat". A row without a text is known by its real image, or else by its seed.
    """
    text = row.get("seen", row.get("prompt"))
    if isinstance(text, str) and text.strip():
        return "text " + INVISIBLE.sub("", unicodedata.normalize("NFKC", text).casefold())
    image = image_of(row) or row.get("image")
    if image:
        return f"image {image}"
    if text not in (None, ""):
        return f"label {json.dumps(text)}"
    return f"seed {row.get('seed')}"


def image_of(row: dict) -> str | None:
    """Return what tells the images of a line of prompts.jsonl from others: the digest of its real
    image, or those of the images that its generation began with. None if it has neither."""
    inputs = row.get("inputs")  # an old collection may have a column of this name
    if isinstance(inputs, dict):
        return " ".join(inputs.values())
    return row.get("image_digest")


def prompt_keys(row: dict) -> tuple[str, ...]:
    """Return the keys of a line of prompts.jsonl: of its text, and of its images if it has any.

    A picture with several captions has several lines. All of them show the same picture, so that
    they must not be told apart by their texts alone. For {"prompt": "a cat", "image_digest": "ab"}
    it gives ("text acat", "image ab"), for {"prompt": "a cat"} it gives ("text acat",).
    """
    key = prompt_key(row)
    if not image_of(row):
        return (key,)
    picture = f"image {image_of(row)}"
    if key == picture:
        return (key,)
    return key, picture


def group_units(prompts: list[tuple]) -> tuple[list[tuple], list[int]]:
    """Return the keys by which units are grouped (n,), and the number of each unit's group (n,).

    prompts (n,): the keys of each unit, see `prompt_keys`. Units that share a key are in one group.
    If that joins all units, as where 10 images have the same 5 texts, the images alone are the
    keys, or else the texts alone, if these differ. For ("t", "p1"), ("t", "p2") it gives
    [("p1",), ("p2",)] and [0, 1].
    """
    numbers = number_groups(prompts)
    if max(numbers, default=0) > 0:
        return prompts, numbers
    for kind in (-1, 0):  # the image, the text
        units = [(keys[kind],) for keys in prompts]
        if len(set(units)) > 1:
            return units, number_groups(units)
    return prompts, numbers


def number_groups(units: list[tuple]) -> list[int]:
    """Return the number of each unit's group; groups are numbered in the order of their first unit.

    units: the keys of each. Units that share a key are in one group, and so are units that are
    joined through others. For ("a", "p1"), ("b", "p2"), ("c", "p1"), ("b", "p3") it gives
    [0, 1, 0, 1].
    """
    parents = {}  # {key: another key of its group}; the one that is its own parent stands for all
    for keys in dict.fromkeys(units):
        for key in keys:
            parents.setdefault(key, key)
            parents[first_of_group(parents, key)] = first_of_group(parents, keys[0])
    number_of = {}  # {key that stands for a group: the group's number}
    numbers = []
    for keys in units:
        first = first_of_group(parents, keys[0])
        numbers.append(number_of.setdefault(first, len(number_of)))
    return numbers


def first_of_group(parents: dict, key: object) -> object:
    """Return the key that stands for a key's group, and shorten the way to it in `parents`.

    parents: see `number_groups`. For {"a": "a", "b": "a"} and "b" it gives "a".
    """
    while parents[key] != key:
        parents[key] = parents[parents[key]]
        key = parents[key]
    return key


def hash_key(key: str) -> str:
    """Return 16 hex digits of a prompt's key.

    An SAE's folder holds them: they tell which prompts it has seen, but not what the prompts say.
    """
    return hashlib.sha256(key.encode()).hexdigest()[:16]


# ---- saved rows


def is_saved_rows(path: Path) -> bool:
    """Return whether a path is a folder that Hugging Face `datasets` wrote."""
    if not path.is_dir():
        return False
    from store.arrow import is_arrow  # only someone who has folders needs it

    return is_arrow(path)


def open_saved_rows(folder: str | Path) -> ActivationFile:
    """Open a folder of saved rows: each holds the vectors (tokens, d) of one image and step.

    Which rows show one image is told by their column `file_name`, or else by the order of their
    timesteps. If neither tells it, `whole_prompts` is False, and each row is trained on or held out
    by itself.
    """
    from store.arrow import open_arrow  # only someone who has such a folder needs it

    arrays, columns = open_arrow(folder)
    files = []
    rows_before = 0
    for path, offset, array in arrays:
        num_samples, tokens, d = array.shape
        num_rows = num_samples * tokens
        files.append(StoredRows(path, offset, num_rows, d, array.dtype, tokens, rows_before))
        rows_before += num_rows
    units = units_of_samples(files)

    timesteps, images = images_of_rows(columns.get("timestep") or [])
    prompts = columns.get("file_name")
    if not prompts:
        prompts = [(str(folder), image) for image in images or ()]
    whole_prompts = len(set(prompts)) > 1
    if not whole_prompts:
        prompts = [(str(folder), row) for row in range(len(units))]
    prompts = [(prompt,) for prompt in prompts]
    return ActivationFile(
        path=Path(folder),
        meta={},
        shape=(len(units), files[0].tokens, files[0].width),
        files=files,
        timesteps=timesteps,
        hook_name=Path(folder).resolve().name,
        units=units,
        prompts=prompts,
        whole_prompts=whole_prompts,
    )


def units_of_samples(files: list[StoredRows]) -> np.ndarray:
    """Return one unit per image and step: (n, 3), index in `files`, first row, end row.

    For one file of 6 rows, 2 per sample, it gives [[0, 0, 2], [0, 2, 4], [0, 4, 6]].
    """
    units = []
    for number, file in enumerate(files):
        first = np.arange(0, file.num_rows, file.tokens)
        units.append(np.stack([np.full_like(first, number), first, first + file.tokens], 1))
    return np.concatenate(units)


def images_of_rows(times: list) -> tuple[list[float], list[int] | None]:
    """Return the timesteps of a sampling, and which image each row shows, from the rows' timesteps.

    For 900 500 900 500 (image after image) it gives [900, 500] and [0, 0, 1, 1]. Where batches were
    saved step after step (see `images_by_step`) it gives [] and the images; [] and None where the
    order does not tell.
    """
    if not times or times[0] not in times[1:]:
        return [], None  # no column, or each row has a timestep of its own
    period = times.index(times[0], 1)
    if times == times[:period] * (len(times) // period):
        images = [row // period for row in range(len(times))]
        return [float(timestep) for timestep in times[:period]], images
    return [], images_by_step(np.array(times))


def images_by_step(times: np.ndarray) -> list[int] | None:
    """Return which image each row shows, if batches of images were saved step after step.

    times (n,): the timestep of each row. For 900 900 500 500, 900 500 (a batch of two images, then
    one image) it gives [0, 1, 0, 1, 2, 2]. None for rows in another order.
    """
    # the first row of each run of equal timesteps
    begins = np.flatnonzero(np.append(True, times[1:] != times[:-1]))
    counts = np.diff(np.append(begins, len(times)))
    values = times[begins]
    first_again = np.flatnonzero(values[1:] == values[0])
    num_steps = int(first_again[0]) + 1 if len(first_again) else len(values)
    if len(values) % num_steps:
        return None

    values = values.reshape(-1, num_steps)  # (batches, steps)
    counts = counts.reshape(-1, num_steps)
    step_is_repeated = len(set(values[0].tolist())) < num_steps
    batches_differ = (values != values[0]).any()
    images_differ = (counts != counts[:, :1]).any()
    if step_is_repeated or batches_differ or images_differ:
        return None

    images = []
    first = 0
    for count in counts[:, 0].tolist():
        images += list(range(first, first + count)) * num_steps
        first += count
    return images


# ---- provenance


def collected_with(meta: dict) -> dict:
    """Return the settings in a file's description that decide what its vectors are like."""
    return {name: meta[name] for name in COLLECTED_WITH if name in meta}


def differences(theirs: dict, ours: dict) -> list[str]:
    """Return what two groups of settings say differently, such as ["seed 5, not 0"] (ours is 5).

    Only names that both have are compared; of a setting that is an object, each of its names.
    """
    texts = []
    for name in theirs.keys() & ours.keys():
        before = theirs[name]
        now = ours[name]
        if isinstance(before, dict) and isinstance(now, dict):
            missing = dict.fromkeys((*before, *now))
            texts += differences({**missing, **before}, {**missing, **now})
        elif before != now:
            texts.append(f"{name} {now!r}, not {before!r}")
    return sorted(texts)


def provenance(sources: list[ActivationFile]) -> dict:
    """Return what an SAE's cfg.json says about its training data, the ActivationFiles `sources`.

    "data": their paths. If collect.py made them also the HookPoint ("hook_name", "side", "stream",
    "rows"), "model_name", the "fingerprint" of the denoiser and its "model_dtype", the ids of the
    "collections", and the settings that the first was "collected_with".
    """
    record = {"data": [str(source.path) for source in sources], "hook_name": sources[0].hook_name}
    meta = sources[0].meta
    if "side" in meta:
        for name in ("side", "stream", "rows", "fingerprint", "model_dtype"):
            record[name] = meta.get(name)
        if meta.get("stream") == "text":
            record["padding"] = meta.get("padding", True)
        record["model_name"] = meta.get("model")
        record["collections"] = [source.meta.get("id") for source in sources]
        record["collected_with"] = collected_with(meta)
    return record
