"""Activation files for writing: create, resume, extend, write and describe them.

    with Collection("activations", settings, prompts, batch_size=16) as collection:
        for index in collection.pending():
            batch = collection.batch(index)
            arrays = {"mid_block": sample(batch.prompts)}        # (rows, steps, tokens, d)
            collection.write(index, arrays, facts={})
        collection.finish({"mid_block": {"model": "toy"}})       # mid_block.npy and mid_block.json

Activations that were made elsewhere, with nnsight or in a loop of one's own, become such a file by

    describe(x, "mine/block.npy", prompts, grid=(8, 8), timesteps=[999, 500, 1])

An activation file is a plain NumPy array (prompts, steps, tokens, d) that `np.load(path,
mmap_mode="r")` opens anywhere, with a `.json` beside it that says what it holds. No pickle is read
or written. store/dataset.py reads the files.

What is finished is safe, whatever happens: the arrays of a batch are on the disk (fsync) before the
line of progress.jsonl that says so is written, and a file gets its name, and then its description,
after its last batch. So after a power cut there may be rows without a line, which are made again,
but no line without its rows.
"""

import errno
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from errors import UsageError
from store.activation_file import (
    NpyHeader,
    check_contents,
    contents_checksums,
    listing_digest,
    read_header,
)
from store.disk import (
    check_same,
    checksum,
    fill,
    is_hidden,
    make_folder,
    opened,
    read_json,
    relative_to,
    rename,
    write_all,
    write_atomically,
    write_json,
)
from store.images import image_path, images_checksum, remove_images, save_images

HEADER = 128  # bytes at the beginning of a file, before the numbers
CHECKED_AT_ONCE = 1 << 24  # bytes of a file
# keys of prompts.jsonl that earlier versions did not write
ADDED_LATER = (
    *("seen", "tokens", "image_digest"),
    *("dataset_id", "dataset_seen", "dataset_tokens", "dataset_inputs"),
)
IMAGES = "images/"  # beside names of files in a line of progress.jsonl; no file has such a name


class CollectionBatch(NamedTuple):
    """Consecutive rows of all files, generated and written together."""

    index: int
    """Which batch, from 0."""

    rows: range
    """Its rows: lines of prompts.jsonl, from 0."""

    prompts: list[dict]
    """These lines."""


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the first 128 bytes of `.npy` format 1.0.

    They have this length for every shape, so that a file can grow in place.
    """
    fields = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": tuple(shape),
    }
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + repr(fields).encode().ljust(117) + b"\n"


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """Return a NumPy view of a CPU tensor; of bfloat16, its bits as uint16."""
    if x.dtype == torch.bfloat16:
        x = x.view(torch.uint16)
    return x.contiguous().numpy()


def is_same_prompt(old: bytes, new: bytes) -> bool:
    """Return whether two lines of prompts.jsonl say the same.

    Keys of ADDED_LATER that the old line does not have are not compared. Earlier versions wrote a
    column "tokens" under this name, and not as "dataset_tokens".
    """
    if old == new:
        return True
    try:
        old_row = json.loads(old)
        new_row = json.loads(new)
    except ValueError:
        return False
    for name in ADDED_LATER:
        if name not in old_row and name in new_row:
            value = new_row.pop(name)
            plain = name.removeprefix("dataset_")
            if plain != name and plain in old_row:
                new_row.setdefault(plain, value)
    return old_row == new_row


def read_progress(path: Path) -> dict[int, dict]:
    """Read progress.jsonl: {batch: its line} of the batches that were written; {} without the file.

    If a batch has two lines, the last one counts. A text that is no such line, as a power cut may
    leave one, is passed over.
    """
    if not path.exists():
        return {}
    lines = {}
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict):
            continue
        if type(line.get("batch")) is int and type(line.get("rows")) is int:
            lines[line["batch"]] = line
    return lines


class Collection:
    """The files of one collection in `out_dir`, written batch by batch in any order.

    settings: a JSON object of all that decides the bytes. prompts: one dict for each row of the
    arrays; `batch_size` consecutive rows are written together. From the start there are
        collect.json    the settings, and the facts that `write` was given;
        prompts.jsonl   the prompts, one per line;
        progress.jsonl  one line for each batch that is safely on the disk: {"batch": 3, "rows": 16,
                        "crc32": {"<name>": checksum of its rows, "images/": of its images}}.
    Until the end the arrays are `<name>.npy.partial`.

    An unfinished collection is resumed. What it holds is compared with the checksums first, and a
    batch that differs is pending again; lines of earlier versions have no checksums and are
    believed. More prompts than before extend a collection. Fewer finish one that was stopped, at
    that length, if no batch lies behind it.

    Of several processes on a machine, the first one makes this object, which locks the folder as
    long as the collection is open; then the others make theirs with `joining`. Each writes batches
    of its own.

    Raises UsageError for a folder with batches of other settings or prompts, with files of another
    program, or with damaged records, and while another program writes there.
    """

    def __init__(
        self,
        out_dir: str | Path,
        settings: dict,
        prompts: list[dict],
        batch_size: int,
        joining: bool = False,
    ) -> None:
        self.out_dir = Path(out_dir)
        self.prompts = prompts
        self.batch_size = batch_size
        self.settings = json.loads(json.dumps(settings))
        self.facts = None
        self.ready = set()  # names of the files that this process can write into
        self.record = self.out_dir / "collect.json"
        self.listing = self.out_dir / "prompts.jsonl"
        self.progress = self.out_dir / "progress.jsonl"
        self.images = self.out_dir / "images"

        if joining:
            self.lock = nullcontext()
            self.facts = self._read_record().get("facts")
            return

        self._check_origin()
        self._lock_folder()
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Collection":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let others write in the folder, as soon as no thread of this process writes there."""
        if isinstance(self.lock, FileLock):
            self.lock.release()

    # ---- what a user of a collection calls

    def pending(self) -> list[int]:
        """Return the batches that are still to be written.

        A batch that has grown or shrunk is generated again: its bits depend on its size.
        """
        return self._pending_of(len(self.prompts))

    def batch(self, index: int) -> CollectionBatch:
        """Return the rows and prompts of a batch: with batch_size 16, batch 2 has rows 32 to 48."""
        first = index * self.batch_size
        rows = range(first, min(first + self.batch_size, len(self.prompts)))
        return CollectionBatch(index, rows, self.prompts[rows.start : rows.stop])

    def write(
        self,
        batch: int,
        arrays: dict[str, torch.Tensor],
        facts: dict,
        output: object = None,
        sampling_rate: int = 44100,
    ) -> None:
        """Write one batch: {name: CPU tensor (rows, ...)}.

        facts: a JSON object that has to be the same for each batch. output, sampling_rate: what
        `save_images` saves in the folder `images`; None saves nothing. Space for whole files is
        reserved before their first byte. Raises OSError if the disk is full, and UsageError if the
        facts differ from those of the batches before.
        """
        numbers = {name: as_numpy(x) for name, x in arrays.items()}
        facts = json.loads(json.dumps(facts))
        with self.lock:
            try:
                self._write(batch, numbers, facts, output, sampling_rate)
            except OSError as error:
                file = error.filename or self.out_dir
                raise OSError(
                    f"{file} can't be written: {error.strerror or error}; "
                    "finished batches are kept, and the same command resumes"
                ) from error

    def finish(self, descriptions: dict[str, dict | None]) -> None:
        """Give the files their names, and write `<name>.json` for {name: description or None}.

        Every batch must be done. The room behind the last row, of a collection that was to be
        longer, is cut off. The description gets the `contents_checksums` of the file. Raises
        UsageError if a file that was finished before was exchanged since.
        """
        assert not self.pending()
        self._write_progress(read_progress(self.progress))
        remove_images(self.images, first=len(self.prompts))
        for name in descriptions:
            self._cut(name)
            partial = self.out_dir / f"{name}.npy.partial"
            if partial.exists():
                rename(partial, self.out_dir / f"{name}.npy")
        for name, description in descriptions.items():  # now the side files have their names too
            if description is not None:
                self._describe(name, description)

    def _describe(self, name: str, description: dict) -> None:
        """Write `<name>.json`."""
        record = self.out_dir / f"{name}.json"
        final = self.out_dir / f"{name}.npy"
        if record.exists():  # nothing was written into the file since
            check_contents(final, read_json(record))
        description = {**description, "contents": contents_checksums(final)}
        write_json(record, {**description, "checksum": checksum(description)})

    def path(self, name: str) -> Path | None:
        """Return the file `<name>.npy`, finished or not; None if there is none."""
        for suffix in (".npy.partial", ".npy"):
            path = self.out_dir / f"{name}{suffix}"
            if path.exists():
                return path
        return None

    def shape(self, name: str) -> list[int] | None:
        """Return the shape that the array in `<name>.npy` has when finished; None without it."""
        path = self.path(name)
        if path is None:
            return None
        return [len(self.prompts), *check_size(path).shape[1:]]

    @property
    def lines(self) -> list[bytes]:
        """The lines of prompts.jsonl."""
        return [json.dumps(prompt).encode() for prompt in self.prompts]

    @property
    def prompts_digest(self) -> str:
        """The `listing_digest` of the lines, which the descriptions hold."""
        return listing_digest(self.lines)

    @property
    def id(self) -> str:
        """16 hex digits that tell this collection from every other one: a digest of the settings,
        with the fingerprints of the model's weights, and of the prompts."""
        text = json.dumps(self.settings, sort_keys=True) + self.prompts_digest
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # ---- beginning, resuming

    def _check_origin(self) -> None:
        """Make the folder. Raises UsageError if it holds files of another program or version."""
        make_folder(self.out_dir)
        if self.progress.exists():
            return
        names = [path.name for path in self.out_dir.iterdir() if not is_hidden(path)]
        if "progress.npy" in names:
            raise UsageError(
                f"{self.out_dir} holds a collection of an earlier version: if it is finished, "
                "train.py and the later stages read it, but only that version can resume or extend "
                "it; use another --out_dir"
            )
        foreign = [name for name in names if name.endswith(".npy")]
        if not self.record.exists():
            for name in names:
                if name.endswith((".npy.partial", ".jsonl")) or name == self.images.name:
                    foreign.append(name)
        if foreign:
            raise UsageError(
                f"{self.out_dir} has files of another origin ({foreign[0]}); use another --out_dir"
            )

    def _lock_folder(self) -> None:
        """Lock the folder. Raises UsageError if another program holds the lock."""
        # All threads share the lock: the one that writes takes it a second time, and so a thread
        # that still writes keeps the folder locked
        self.lock = FileLock(self.out_dir / "collect.lock", timeout=0, thread_local=False)
        try:
            self.lock.acquire()
        except Timeout:
            raise UsageError(
                f"another collect.py is writing to {self.out_dir}; "
                "wait for it, or use another --out_dir"
            ) from None
        except OSError as error:
            raise UsageError(
                f"--out_dir {self.out_dir} can't be written: {error.strerror}"
            ) from None

    def _begin(self) -> None:
        """Check what the folder holds, and write the records."""
        lines = self.lines
        progress = read_progress(self.progress)
        if progress:
            self._compare(lines)
            progress = self._without_damaged(progress)
        else:  # no batch was written yet: begin anew
            for path in self.out_dir.glob("*.npy.partial"):
                path.unlink()
            remove_images(self.images)
        self._write_record()
        write_atomically(self.listing, b"".join(line + b"\n" for line in lines))
        self._write_progress(progress)

    def _compare(self, lines: list[bytes]) -> None:
        """Raise UsageError unless the folder holds the beginning of what is asked for, or an
        unfinished collection that was to be longer.
        """
        record = self._read_record()
        self.facts = record.get("facts")
        remedy = "use the same options to resume it, or another --out_dir"
        self._compare_settings(record.get("settings") or {}, remedy)

        old = self.listing.read_bytes().split(b"\n")[:-1] if self.listing.exists() else []
        if not all(map(is_same_prompt, old, lines)):  # as far as both go
            raise UsageError(
                f"{self.out_dir} holds a collection of other prompts; use another --out_dir"
            )
        if len(old) > len(lines):
            self._check_shorter(len(old), len(lines))

    def _check_shorter(self, old_rows: int, num_rows: int) -> None:
        """Raise UsageError unless a collection of `old_rows` can be finished with `num_rows`."""
        partial = [path for path in self.out_dir.glob("*.npy.partial") if not is_hidden(path)]
        if not partial and not self._pending_of(old_rows):
            raise UsageError(
                f"{self.out_dir} holds {old_rows} rows, more than {num_rows}; nothing to do"
            )
        progress = read_progress(self.progress)
        last = max(progress)
        end = last * self.batch_size + progress[last]["rows"]
        if end > num_rows:
            raise UsageError(
                f"{self.out_dir} holds a stopped collection whose row {end - 1} is done: "
                f"it can be finished with {end} rows or more, not with {num_rows}"
            )
        print(
            f"{self.out_dir}: a stopped collection of {old_rows} rows, "
            f"which ends with row {num_rows} now"
        )

    def _compare_settings(self, theirs: dict, remedy: str) -> None:
        """Raise UsageError unless the settings of the folder's collection are ours.

        A collection of an earlier version does not say which weights made it.
        """
        ours = dict(self.settings)
        their_weights = theirs.get("fingerprints")
        if their_weights is None:
            ours.pop("fingerprints", None)
        elif their_weights != ours.get("fingerprints"):
            our_weights = ours["fingerprints"]
            changed = []
            for name in {**their_weights, **our_weights}:
                if their_weights.get(name) != our_weights.get(name):
                    changed.append(name)
            raise UsageError(
                f"{self.out_dir} was collected from a model with other weights or settings of its "
                f"{', '.join(changed)}, under the same name (or by another version of diffusers); "
                "use another --out_dir"
            )
        their_files = theirs.get("model_files")
        if their_files != ours.get("model_files"):
            names = {**(their_files or {}), **(ours.get("model_files") or {})}
            raise UsageError(
                f"{self.out_dir} was collected before {' or '.join(names)} was changed; "
                "use another --out_dir"
            )
        check_same(self.out_dir, theirs, ours, remedy)

    def _without_damaged(self, progress: dict[int, dict]) -> dict[int, dict]:
        """Return the progress without the batches whose rows or images are not those that were
        written, and print how many these are.

        The progress also loses batches beyond the collection's last one. A finished collection that
        is not extended is not checked: its progress is returned as it is.
        """
        partial = next(self.out_dir.glob("*.npy.partial"), None)
        pending = self._pending_of(len(self.prompts))
        if partial is None and not pending:
            return progress
        num_batches = -(-len(self.prompts) // self.batch_size)
        progress = {batch: line for batch, line in progress.items() if batch in range(num_batches)}
        done = [batch for batch in sorted(progress) if batch not in pending]
        damaged = {}
        for batch in tqdm(done, "checking what is there", unit="batch", leave=False, delay=2):
            names = self._changed_files(batch, progress[batch].get("crc32", {}))
            if names:
                damaged[batch] = names
        if damaged:
            batch, names = next(iter(damaged.items()))
            print(
                f"{self.out_dir}: {len(damaged)} of {len(done)} batches are not as they were "
                f"written (batch {batch} in {', '.join(names)}), and are made again"
            )
        return {batch: line for batch, line in progress.items() if batch not in damaged}

    def _changed_files(self, batch: int, checksums: dict[str, int]) -> list[str]:
        """Return the names of the files in which the rows of a batch have other checksums.

        checksums: {name: CRC-32} of the batch's line, with IMAGES for its images. If they are no
        dict, the damaged file is progress.jsonl. Raises UsageError if a file is missing or cut.
        """
        if not isinstance(checksums, dict):
            return [self.progress.name]
        rows = self.batch(batch).rows
        changed = []
        for name, expected in checksums.items():
            if self._checksum(name, rows) != expected:
                changed.append(name)
        return changed

    def _checksum(self, name: str, rows: range) -> int:
        """Return the CRC-32 of some rows as they lie on the disk; for IMAGES, of their images."""
        if name == IMAGES:
            return images_checksum(self.images, rows)
        path = self.path(name)
        if path is None:
            raise UsageError(self._missing(name))
        header = check_size(path)
        row_bytes = int(np.prod(header.shape[1:])) * header.dtype.itemsize
        begin = header.offset + rows.start * row_bytes
        end = header.offset + rows.stop * row_bytes
        crc = rows_checksum(header.shape[1:], header.dtype)
        fd = os.open(path, os.O_RDONLY)
        try:
            for offset in range(begin, end, CHECKED_AT_ONCE):
                data = memoryview(bytearray(min(CHECKED_AT_ONCE, end - offset)))
                fill(fd, data, offset, str(path))
                crc = zlib.crc32(data, crc)
        finally:
            os.close(fd)
        return crc

    def _missing(self, name: str) -> str:
        """Return the error message about a file that is gone."""
        return f"{self.out_dir / name}.npy is missing; move its folder away and collect again"

    # ---- the records

    def _read_record(self) -> dict:
        """Read collect.json. Raises UsageError if it is damaged."""
        record = read_json(self.record)
        # earlier versions wrote no checksum
        if record.get("checksum", checksum(record)) != checksum(record):
            raise UsageError(
                f"{self.record} was changed after it was written; "
                "move its folder away and collect again"
            )
        return record

    def _write_record(self) -> None:
        record = {"settings": self.settings, "facts": self.facts}
        write_json(self.record, {**record, "checksum": checksum(record)})

    def _write_progress(self, progress: dict[int, dict]) -> None:
        """Write progress.jsonl with one line per batch, in the order of the batches.

        So the bytes are the same whatever happened before, and there is no torn line to append to.
        """
        lines = [json.dumps(progress[batch]) + "\n" for batch in sorted(progress)]
        write_atomically(self.progress, "".join(lines).encode())

    def _pending_of(self, num_rows: int) -> list[int]:
        """Return the batches that are not recorded as done with the size that they have in a
        collection of `num_rows` rows.

        For 40 rows in batches of 16 and lines {"batch": 0, "rows": 16}, {"batch": 2, "rows": 16} it
        is [1, 2]: batch 2 has 8 rows now.
        """
        progress = read_progress(self.progress)
        pending = []
        for batch, first in enumerate(range(0, num_rows, self.batch_size)):
            rows = min(self.batch_size, num_rows - first)
            if batch not in progress or progress[batch]["rows"] != rows:
                pending.append(batch)
        return pending

    # ---- the arrays

    def _write(
        self,
        batch: int,
        arrays: dict[str, np.ndarray],
        facts: dict,
        output: object,
        sampling_rate: int,
    ) -> None:
        """Write the rows and images of a batch, and then its line in progress.jsonl."""
        rows = self.batch(batch).rows
        for name, data in arrays.items():
            if len(data) != len(rows):
                raise UsageError(
                    f"{name}: got {len(data)} rows for {len(rows)}; collect one image a prompt"
                )
        if facts != self.facts or arrays.keys() - self.ready:
            # only one of the processes that write into this folder prepares it at a time
            with FileLock(self.out_dir / "prepare.lock"):
                self._prepare(batch, arrays, facts)

        checksums = {}
        for name, data in arrays.items():
            with opened(self.out_dir / f"{name}.npy.partial") as fd:
                write_all(fd, data, HEADER + rows.start * data[0].nbytes)
            checksums[name] = zlib.crc32(data, rows_checksum(data.shape[1:], data.dtype))
        if output is not None:
            save_images(output, self.images, rows, sampling_rate)
            checksums[IMAGES] = images_checksum(self.images, rows)

        # Only now, when all is on the disk. One call of os.write, so that the lines of several
        # processes do not mix
        line = json.dumps({"batch": batch, "rows": len(rows), "crc32": checksums}) + "\n"
        with opened(self.progress, os.O_APPEND) as fd:
            if os.write(fd, line.encode()) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _prepare(self, batch: int, arrays: dict[str, np.ndarray], facts: dict) -> None:
        """Check or write the facts, and make the files; no other process does that meanwhile.

        Raises UsageError if the facts differ from those of the batches before.
        """
        if self.facts is None:
            self.facts = self._read_record().get("facts")
        if self.facts is None:
            self.facts = facts
            self._write_record()
        if facts != self.facts:
            raise UsageError(
                f"batch {batch} ran other steps or tokens than the ones before it; "
                "collect it on its own"
            )
        has_batches = bool(read_progress(self.progress))
        for name, data in arrays.items():
            self._reserve(name, data, has_batches)
        self.ready |= arrays.keys()

    def _reserve(self, name: str, data: np.ndarray, has_batches: bool) -> None:
        """Make `<name>.npy.partial` of full size: a new file, or an old one that grows if need be.

        data: the rows of a batch, which tell the size. has_batches: whether some batch was written,
        so that a missing file is an error. Raises UsageError for such a file, and for a name that
        is no file's; OSError if the disk is full.
        """
        if not name or Path(name).name != name:
            raise UsageError(f"{name!r} is no name for a file in {self.out_dir}")
        partial = self.out_dir / f"{name}.npy.partial"
        old = self.path(name)
        if old is None and has_batches:
            raise UsageError(self._missing(name))
        if old is None:
            # under another name until it has its header, without which it could not be resumed
            path = self.out_dir / f"{name}.npy.new"
        else:
            check_size(old)
            path = self._reopen(name)
        num_rows = len(self.prompts)
        try:
            with opened(path, os.O_CREAT) as fd:
                size = HEADER + num_rows * data[0].nbytes
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(fd, 0, size)
                elif os.fstat(fd).st_size < size:
                    os.ftruncate(fd, size)
                write_all(fd, npy_header((num_rows, *data.shape[1:]), data.dtype), 0)
        except OSError:
            if old is None:
                path.unlink(missing_ok=True)
            raise
        rename(path, partial)

    def _reopen(self, name: str) -> Path:
        """Rename `<name>.npy` back to `<name>.npy.partial`, and delete its description.

        Does nothing if the file is not finished. Returns the path of the .partial file.
        """
        final = self.out_dir / f"{name}.npy"
        partial = self.out_dir / f"{name}.npy.partial"
        if final.exists():
            final.with_suffix(".json").unlink(missing_ok=True)
            rename(final, partial)
        return partial

    def _cut(self, name: str) -> None:
        """Cut off the room behind a file's last row. Raises UsageError if the file is missing or
        too short."""
        path = self.path(name) or self.out_dir / f"{name}.npy"
        shape, dtype, *_ = check_size(path)
        num_rows = len(self.prompts)
        size = HEADER + num_rows * int(np.prod(shape[1:])) * dtype.itemsize
        old_size = path.stat().st_size
        if shape[0] == num_rows and old_size == size:
            return
        if old_size < size:
            raise UsageError(
                f"{path} has {shape[0]} rows of {num_rows}; move its folder away and collect again"
            )
        with opened(self._reopen(name)) as fd:
            write_all(fd, npy_header((num_rows, *shape[1:]), dtype), 0)
            os.ftruncate(fd, size)


def check_size(path: Path) -> NpyHeader:
    """Return the header of a `.npy` file whose size fits it.

    Raises UsageError if the file is missing, damaged or shorter than its header says.
    """
    try:
        return read_header(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is missing or damaged ({error}); move its folder away and collect again"
        ) from None


def rows_checksum(row_shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the CRC-32 of no row yet, to which `zlib.crc32(data, this)` adds rows.

    It depends on what a row is, so that a changed header changes the checksum too. CRC-32 takes a
    second for 4 GB on one core, a small part of what writing takes, and it finds every error that
    lies within 32 consecutive bits.
    """
    return zlib.crc32(f"{np.dtype(dtype).str} {list(row_shape)}".encode())


def check_saved_images(folder: Path, meta: dict, rows: set[int]) -> None:
    """Raise UsageError if images beside a finished activation file are not those that were saved.

    meta: the description of the file. rows: the images to check; their whole batches are read. Of a
    batch with a missing image, and of collections of earlier versions, nothing is known.
    """
    images = folder / "images"
    batch_size = meta.get("batch_size", 1) * meta.get("num_images_per_prompt", 1)
    for batch, line in read_progress(folder / "progress.jsonl").items():
        batch_rows = range(batch * batch_size, batch * batch_size + line["rows"])
        checksums = line.get("crc32")
        expected = checksums.get(IMAGES) if isinstance(checksums, dict) else None
        if expected is None or rows.isdisjoint(batch_rows):
            continue
        if any(image_path(images, row) is None for row in batch_rows):
            continue
        if images_checksum(images, batch_rows) != expected:
            raise UsageError(
                f"{images}: rows {batch_rows[0]} to {batch_rows[-1]} do not have the images that "
                "collect.py saved; put them back, or remove the folder to see features without "
                "images"
            )


# ---- activations from elsewhere


def describe(
    array: np.ndarray | torch.Tensor,
    path: str | Path,
    prompts: Sequence[str | dict],
    *,
    hook_name: str | None = None,
    grid: Sequence[int] | None = None,
    timesteps: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    side: str = "output",
    stream: str = "image",
    rows: str = "cond",
    lengths: Sequence[int] | None = None,
    model_name: str | None = None,
    images: object = None,
) -> Path:
    """Write activations that were made elsewhere as a file that all stages know; return its path.

    array: (rows, steps, tokens, d) of a floating-point dtype, one row per prompt and image, the
    steps from noise to the image. It is saved in `path`, which ends in .npy. An array that is the
    memory map of this file is only described.
    prompts: one per row, texts or dicts with "prompt" and any further columns.
    hook_name: the module; if None, the name of the file.
    grid: how the tokens of an image lie, such as (height, width) or (frames, height, width); the
    product is `tokens`. Without it the maps of features.py are lines.
    timesteps: the scheduler's value at each step. seeds: one per row.
    side, stream, rows: what was stored, as the options of collect.py name it.
    lengths: with stream="text", how many tokens of each row are no padding.
    model_name: a diffusers folder, hub id or Python file. With it, steer.py and evaluate.py --graft
    find the model.
    images: what the model made of each row, as `save_images` takes it, for the page.

    Beside the file it writes `<name>.json`, prompts.jsonl and images/. Several files of one folder
    share a prompts.jsonl. Raises UsageError for arrays, prompts and numbers that do not fit
    together, and where it would overwrite something.

    >>> describe(np.zeros((2, 1, 4, 8), np.float16), "mine/block.npy", ["a cat", "a dog"],
    ...          grid=(2, 2), timesteps=[999])
    PosixPath('mine/block.npy')
    """
    path = Path(path)
    check_described(array, path, prompts, grid, timesteps, seeds, stream, lengths)
    lines = described_lines(prompts, seeds)
    x = as_numpy(array.detach().cpu()) if isinstance(array, torch.Tensor) else array
    is_bfloat16 = isinstance(array, torch.Tensor) and array.dtype == torch.bfloat16

    make_folder(path.parent)
    listing = path.with_name("prompts.jsonl")
    text = b"".join(line + b"\n" for line in lines)
    if listing.exists() and listing.read_bytes() != text:
        raise UsageError(f"{listing} has other prompts; use another folder")
    if is_map_of(array, path):
        array.flush()
    elif path.exists():
        raise UsageError(f"{path} is there already; use another name")
    else:
        np.save(path, x)
    write_atomically(listing, text)
    if lengths is not None:
        np.save(path.with_suffix(".lengths.npy"), np.asarray(lengths, np.int64))
    if images is not None:
        save_images(images, path.with_name("images"), range(len(lines)))

    description = {
        "format": 1,
        "model": model_name,
        "hook_name": hook_name or path.stem,
        "side": side,
        "stream": stream,
        "rows": rows,
        "grid": None if grid is None else list(grid),
        "timesteps": None if timesteps is None else [float(timestep) for timestep in timesteps],
        "shape": list(x.shape),
        "dtype": "bfloat16" if is_bfloat16 else str(x.dtype),
        "num_images_per_prompt": 1,
        "pipeline_kwargs": {},
        "prompts_digest": listing_digest(lines),
        "contents": contents_checksums(path),
    }
    if stream == "text":
        description["padding"] = False
    if model_name is not None:
        file, *_ = model_name.split(":")
        key = "model_file" if file.endswith(".py") else "model_folder"
        if Path(file).exists():
            description[key] = relative_to(file, path.parent)
    identity = json.dumps(description, sort_keys=True).encode()
    description["id"] = hashlib.sha256(identity).hexdigest()[:16]
    write_json(path.with_suffix(".json"), {**description, "checksum": checksum(description)})
    return path


def check_described(
    array: np.ndarray | torch.Tensor,
    path: Path,
    prompts: Sequence[str | dict],
    grid: Sequence[int] | None,
    timesteps: Sequence[float] | None,
    seeds: Sequence[int] | None,
    stream: str,
    lengths: Sequence[int] | None,
) -> None:
    """Raise UsageError for arguments of `describe` that do not fit together."""
    shape = tuple(array.shape)
    if path.suffix != ".npy":
        raise UsageError(f"{path}: expected a name that ends in .npy")
    if len(shape) != 4:
        raise UsageError(
            f"expected an array (rows, steps, tokens, d), got shape {shape}; x[:, None] adds an "
            "axis of one step"
        )
    is_tensor = isinstance(array, torch.Tensor)
    is_floating = array.is_floating_point() if is_tensor else array.dtype.kind == "f"
    if not is_floating:
        raise UsageError(f"expected floating-point numbers, got {array.dtype}")
    if (path.parent / "collect.json").exists():
        raise UsageError(f"{path.parent} holds a collection of collect.py; use another folder")

    num_rows, num_steps, num_tokens, _ = shape
    if isinstance(prompts, str) or len(prompts) != num_rows:
        raise UsageError(f"expected {num_rows} prompts, one for each row of the array")
    if seeds is not None and len(seeds) != num_rows:
        raise UsageError(f"{len(seeds)} seeds: expected {num_rows}, one for each row")
    if grid is not None and int(np.prod(grid)) != num_tokens:
        raise UsageError(f"the grid {tuple(grid)} does not hold {num_tokens} tokens")
    if timesteps is not None and len(timesteps) != num_steps:
        raise UsageError(f"{len(timesteps)} timesteps: expected {num_steps}, one for each step")
    if (stream == "text") != (lengths is not None):
        raise UsageError('lengths are for stream="text", which needs them')
    if lengths is not None and len(lengths) != num_rows:
        raise UsageError(f"{len(lengths)} lengths: expected {num_rows}, one for each row")
    if lengths is not None and not 0 <= min(lengths) <= max(lengths) <= num_tokens:
        raise UsageError(f"a length is not between 0 and {num_tokens}, the number of tokens")


def described_lines(prompts: Sequence[str | dict], seeds: Sequence[int] | None) -> list[bytes]:
    """Return the lines of prompts.jsonl of `describe`: rows with "id", "prompt" and perhaps
    "seed"."""
    lines = []
    for number, prompt in enumerate(prompts):
        row = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        if "prompt" not in row:
            raise UsageError(f"prompt {number} is a dict without the key 'prompt'")
        if seeds is not None:
            row["seed"] = int(seeds[number])
        lines.append(json.dumps({"id": number, **row}).encode())
    return lines


def is_map_of(array: np.ndarray | torch.Tensor, path: Path) -> bool:
    """Return whether an array is the memory map of a file."""
    if not isinstance(array, np.memmap) or array.filename is None or not path.exists():
        return False
    return Path(array.filename).samefile(path)
