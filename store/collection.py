"""The file side, writing: activation files created, resumed, written and described;
store/dataset.py reads them.

An activation file is a plain NumPy array (prompts, steps, tokens, d) that `np.load(path,
mmap_mode="r")` opens anywhere, with a `.json` beside it that says what it holds. No pickle is read
or written.
"""

import errno
import hashlib
import json
import os
import struct
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from errors import UsageError
from store.activation_file import NpyHeader, listing_digest, read_header
from store.disk import (
    check_same,
    checksum,
    fill,
    is_hidden,
    make_folder,
    opened,
    read_json,
    rename,
    write_all,
    write_atomically,
    write_json,
)
from store.images import image_path, images_checksum, remove_images, save_images

HEADER = 128  # bytes
CHECKED_AT_ONCE = 1 << 24  # bytes of a file
# keys of prompts.jsonl that earlier versions did not write
ADDED_LATER = ("seen", "image_digest", "dataset_id", "dataset_seen")
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
    """The first 128 bytes of `.npy` format 1.0, whatever the shape, so that a file can grow in
    place."""
    fields = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": tuple(shape),
    }
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + repr(fields).encode().ljust(117) + b"\n"


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """A NumPy view of a CPU tensor; bfloat16 as its bits in uint16."""
    if x.dtype == torch.bfloat16:
        x = x.view(torch.uint16)
    return x.contiguous().numpy()


def same_prompt(old: bytes, new: bytes) -> bool:
    """Whether two lines of prompts.jsonl say the same; earlier versions did not write all of
    ADDED_LATER."""
    if old == new:
        return True
    try:
        was, now = json.loads(old), json.loads(new)
    except ValueError:
        return False
    for name in ADDED_LATER:
        if name not in was:
            now.pop(name, None)
    return was == now


def read_progress(path: Path) -> dict[int, dict]:
    """{batch: its line in progress.jsonl} of the batches that are safe; {} where there is no such
    file.

    Of two lines of one batch the last one counts. What is no such line, as a power cut may leave
    one, is passed over.
    """
    lines = {}
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if (
            isinstance(line, dict)
            and type(line.get("batch")) is int
            and type(line.get("rows")) is int
        ):
            lines[line["batch"]] = line
    return lines


class Collection:
    """The files of one collection in `out_dir`, written batch by batch in any order; an unfinished
    one is resumed.

    settings: a JSON object of all that decides the bytes. prompts: list of dicts, one for each row
    of the arrays, whose `batch_size` consecutive rows are written together. From the start there
    are `collect.json` (the settings, and the facts that `write` was given), `prompts.jsonl`, and
    `progress.jsonl`, which gets one line for each batch that is safely on the disk: {"batch": 3,
    "rows": 16, "crc32": {"<name>": checksum of its rows, "images/": of its images}}. Until the end
    the arrays are `<name>.npy.partial`. What is resumed is compared with the checksums first, and a
    batch that differs is pending again; lines of earlier versions, which have none, are believed.

    Of several processes on a machine the first one begins, and locks the folder for as long as the
    collection is open; then the others join it. Each writes batches of its own.

    More prompts than before extend a collection. Fewer finish one that was stopped, at that length,
    if no batch lies behind it.

    Raises UsageError for a folder with batches of other settings or prompts, with files of another
    program, with records that are damaged, and while another program writes there.
    """

    def __init__(
        self,
        out_dir: str | Path,
        settings: dict,
        prompts: list[dict],
        batch_size: int,
        joining: bool = False,
    ) -> None:
        self.out_dir, self.prompts, self.batch_size = Path(out_dir), prompts, batch_size
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
        # of all threads: the one that writes holds it too, and so a thread that is still at it
        # keeps the folder locked
        self.lock = FileLock(self.out_dir / "collect.lock", timeout=0, thread_local=False)
        try:
            self.lock.acquire()
        except Timeout:
            raise UsageError(
                f"another collect.py is writing to {self.out_dir}; wait for it, or use another --out_dir"
            ) from None
        except OSError as error:
            raise UsageError(
                f"--out_dir {self.out_dir} can't be written: {error.strerror}"
            ) from None
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
        """Let others write in the folder, once no thread writes there."""
        if isinstance(self.lock, FileLock):
            self.lock.release()

    def _check_origin(self):
        make_folder(self.out_dir)
        if self.progress.exists():
            return
        names = [path.name for path in self.out_dir.iterdir() if not is_hidden(path)]
        if "progress.npy" in names:
            raise UsageError(
                f"{self.out_dir} holds a collection of an earlier version: if it is finished, train.py and the later stages "
                "read it, but only that version can resume or extend it; use another --out_dir"
            )
        foreign = [name for name in names if name.endswith(".npy")]
        if not self.record.exists():
            foreign += [
                name
                for name in names
                if name.endswith((".npy.partial", ".jsonl")) or name == self.images.name
            ]
        if foreign:
            raise UsageError(
                f"{self.out_dir} has files of another origin ({foreign[0]}); use another --out_dir"
            )

    def _begin(self):
        lines = self.lines
        progress = read_progress(self.progress)
        if progress:
            self._compare(lines)
            progress = self._without_damaged(progress)
        else:  # nothing is safe yet: begin anew
            for path in self.out_dir.glob("*.npy.partial"):
                path.unlink()
            remove_images(self.images)
        self._write_record()
        write_atomically(self.listing, b"".join(line + b"\n" for line in lines))
        self._write_progress(progress)

    def _compare(self, lines):
        """What is there must be the beginning of what is asked for, or an unfinished collection
        that goes further."""
        there = self._read_record()
        self.facts = there.get("facts")
        remedy = "use the same options to resume it, or another --out_dir"
        self._compare_settings(there.get("settings") or {}, remedy)

        old = self.listing.read_bytes().split(b"\n")[:-1] if self.listing.exists() else []
        if not all(map(same_prompt, old, lines)):  # as far as both go
            raise UsageError(
                f"{self.out_dir} holds a collection of other prompts; use another --out_dir"
            )
        if len(old) <= len(lines):
            return
        partial = [path for path in self.out_dir.glob("*.npy.partial") if not is_hidden(path)]
        if not partial and not self._pending_of(len(old)):
            raise UsageError(
                f"{self.out_dir} holds {len(old)} rows, more than {len(lines)}; nothing to do"
            )
        progress = read_progress(self.progress)
        last = max(progress)
        end = last * self.batch_size + progress[last]["rows"]
        if end > len(lines):
            raise UsageError(
                f"{self.out_dir} holds a stopped collection whose row {end - 1} is done: it can be finished "
                f"with {end} rows or more, not with {len(lines)}"
            )
        print(
            f"{self.out_dir}: a stopped collection of {len(old)} rows, which ends with row {len(lines)} now"
        )

    def _compare_settings(self, theirs, remedy):
        """Raise UsageError unless the settings are the same; a collection of an earlier version
        does not say which weights."""
        weights, ours = theirs.get("fingerprints"), dict(self.settings)
        if weights is None:
            ours.pop("fingerprints", None)
        elif weights != ours.get("fingerprints"):
            changed = [
                name
                for name in {**weights, **ours["fingerprints"]}
                if weights.get(name) != ours["fingerprints"].get(name)
            ]
            raise UsageError(
                f"{self.out_dir} was collected from a model with other weights or settings of its {', '.join(changed)}, "
                "under the same name (or by another version of diffusers); use another --out_dir"
            )
        check_same(self.out_dir, theirs, ours, remedy)

    def _without_damaged(self, progress):
        """The progress without the batches whose rows or images are not those that were written;
        they are named.

        A finished collection of which nothing more is wanted is not read again.
        """
        partial = next(self.out_dir.glob("*.npy.partial"), None)
        pending = self._pending_of(len(self.prompts))
        if partial is None and not pending:
            return progress
        num_batches = -(-len(self.prompts) // self.batch_size)
        progress = {batch: line for batch, line in progress.items() if batch in range(num_batches)}
        wanted = [batch for batch in sorted(progress) if batch not in pending]
        damaged = {}
        for batch in tqdm(wanted, "checking what is there", unit="batch", leave=False, delay=2):
            names = self._changed(batch, progress[batch].get("crc32", {}))
            if names:
                damaged[batch] = names
        if damaged:
            batch, names = next(iter(damaged.items()))
            count = f"{len(damaged)} of {len(wanted)} batches are not as they were written"
            print(
                f"{self.out_dir}: {count} (batch {batch} in {', '.join(names)}), and are made again"
            )
        return {batch: line for batch, line in progress.items() if batch not in damaged}

    def _changed(self, batch, checksums):
        """Names of the files in which a batch is not what it was. Raises UsageError where a file is
        missing or cut."""
        if not isinstance(checksums, dict):
            return [self.progress.name]
        rows = self.batch(batch).rows
        return [
            name for name, expected in checksums.items() if self._checksum(name, rows) != expected
        ]

    def _checksum(self, name, rows):
        """`rows_checksum` of some rows as they lie on the disk; `images_checksum` for IMAGES."""
        if name == IMAGES:
            return images_checksum(self.images, rows)
        path = self.path(name)
        if path is None:
            raise UsageError(
                f"{self.out_dir / name}.npy is missing; move its folder away and collect again"
            )
        header = check_size(path)
        row_bytes = int(np.prod(header.shape[1:])) * header.dtype.itemsize
        begin, end = (header.offset + row * row_bytes for row in (rows.start, rows.stop))
        found = rows_checksum(header.shape[1:], header.dtype)
        fd = os.open(path, os.O_RDONLY)
        try:
            for at in range(begin, end, CHECKED_AT_ONCE):
                data = memoryview(bytearray(min(CHECKED_AT_ONCE, end - at)))
                fill(fd, data, at, str(path))
                found = zlib.crc32(data, found)
        finally:
            os.close(fd)
        return found

    def _read_record(self):
        record = read_json(self.record)
        if record.get("checksum", checksum(record)) != checksum(
            record
        ):  # there was none in earlier versions
            raise UsageError(
                f"{self.record} was changed after it was written; move its folder away and collect again"
            )
        return record

    def _write_record(self):
        record = {"settings": self.settings, "facts": self.facts}
        write_json(self.record, record | {"checksum": checksum(record)})

    def _write_progress(self, progress):
        """In the order of the batches, each once: the same bytes whatever happened meanwhile, and
        no torn line to append to."""
        lines = [json.dumps(progress[batch]) + "\n" for batch in sorted(progress)]
        write_atomically(self.progress, "".join(lines).encode())

    def _pending_of(self, num_rows):
        """Batches of a collection of so many rows that are not safe."""
        progress, pending = read_progress(self.progress), []
        for batch, first in enumerate(range(0, num_rows, self.batch_size)):
            rows = min(self.batch_size, num_rows - first)
            if batch not in progress or progress[batch]["rows"] != rows:
                pending.append(batch)
        return pending

    @property
    def lines(self) -> list[bytes]:
        """The lines of prompts.jsonl."""
        return [json.dumps(prompt).encode() for prompt in self.prompts]

    @property
    def prompts_digest(self) -> str:
        """What the descriptions say of the lines of prompts.jsonl."""
        return listing_digest(self.lines)

    @property
    def id(self) -> str:
        """16 hex digits that tell this collection from every other: of its settings, the model's
        weights, and its prompts."""
        text = json.dumps(self.settings, sort_keys=True) + self.prompts_digest
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pending(self) -> list[int]:
        """The batches that are not safe. One that has grown or shrunk is generated again: its bits
        depend on its size."""
        return self._pending_of(len(self.prompts))

    def batch(self, index: int) -> CollectionBatch:
        """The batch with this index."""
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
        """Write one batch: {name: CPU tensor (rows, ...)}, and facts (a JSON object) that are the
        same for each.

        output, sampling_rate: what `save_images` saves in the folder `images`; None is nothing.
        Space for whole files is reserved before their first byte. Raises OSError when the disk is
        full and UsageError when a batch's facts differ from the ones before.
        """
        numbers = {name: as_numpy(x) for name, x in arrays.items()}
        with self.lock:
            try:
                self._write(batch, numbers, json.loads(json.dumps(facts)), output, sampling_rate)
            except OSError as error:
                where = (
                    f"{error.filename or self.out_dir} can't be written: {error.strerror or error}"
                )
                raise OSError(
                    f"{where}; finished batches are kept, and the same command resumes"
                ) from error

    def _write(self, batch, arrays, facts, output, sampling_rate):
        rows = self.batch(batch).rows
        for name, data in arrays.items():
            if len(data) != len(rows):
                raise UsageError(
                    f"{name}: got {len(data)} rows for {len(rows)}; collect one image a prompt"
                )
        if facts != self.facts or arrays.keys() - self.ready:
            with FileLock(
                self.out_dir / "prepare.lock"
            ):  # one of the processes that write here at a time
                self._prepare(batch, arrays, facts)
        checksums = {}
        for name, data in arrays.items():
            with opened(self.out_dir / f"{name}.npy.partial") as fd:
                write_all(fd, data, HEADER + rows.start * data[0].nbytes)
            checksums[name] = zlib.crc32(data, rows_checksum(data.shape[1:], data.dtype))
        if output is not None:
            save_images(output, self.images, rows, sampling_rate)
            checksums[IMAGES] = images_checksum(self.images, rows)
        # only now: all is on the disk. One call, so that the lines of several processes do not mix
        line = json.dumps({"batch": batch, "rows": len(rows), "crc32": checksums}) + "\n"
        with opened(self.progress, os.O_APPEND) as fd:
            if os.write(fd, line.encode()) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _prepare(self, batch, arrays, facts):
        """What the first batch of a process finds or makes, while no other process does."""
        if self.facts is None:
            self.facts = self._read_record().get("facts")
        if self.facts is None:
            self.facts = facts
            self._write_record()
        if facts != self.facts:
            raise UsageError(
                f"batch {batch} ran other steps or tokens than the ones before it; collect it on its own"
            )
        begun = bool(read_progress(self.progress))
        for name, data in arrays.items():
            self._reserve(name, data, begun)
        self.ready |= arrays.keys()

    def _reserve(self, name, data, begun):
        """Make `<name>.npy.partial` of full size: a new file, or the one that is there, grown if
        need be."""
        if not name or Path(name).name != name:
            raise UsageError(f"{name!r} is no name for a file in {self.out_dir}")
        partial = self.out_dir / f"{name}.npy.partial"
        fresh = self.path(name) is None
        if fresh and begun:
            raise UsageError(
                f"{self.out_dir / name}.npy is missing; move its folder away and collect again"
            )
        if not fresh:
            check_size(self.path(name))
            self._reopen(name)
        path = (
            self.out_dir / f"{name}.npy.new" if fresh else partial
        )  # a file without its header can't be gone on with
        try:
            with opened(path, os.O_CREAT) as fd:
                size = HEADER + len(self.prompts) * data[0].nbytes
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(fd, 0, size)
                elif os.fstat(fd).st_size < size:
                    os.ftruncate(fd, size)
                write_all(fd, npy_header((len(self.prompts), *data.shape[1:]), data.dtype), 0)
        except OSError:
            if fresh:
                path.unlink(missing_ok=True)
            raise
        rename(path, partial)

    def _reopen(self, name):
        """Make a finished file an unfinished one; its path."""
        final, partial = self.out_dir / f"{name}.npy", self.out_dir / f"{name}.npy.partial"
        if final.exists():
            final.with_suffix(".json").unlink(missing_ok=True)
            rename(final, partial)
        return partial

    def path(self, name: str) -> Path | None:
        """The file `<name>.npy`, finished or not; None where there is none."""
        paths = [self.out_dir / f"{name}.npy{end}" for end in (".partial", "")]
        return next((path for path in paths if path.exists()), None)

    def shape(self, name: str) -> list[int] | None:
        """Shape of the array in `<name>.npy` when it is finished; None where there is no such
        file."""
        path = self.path(name)
        return None if path is None else [len(self.prompts), *check_size(path).shape[1:]]

    def finish(self, descriptions: dict[str, dict | None]) -> None:
        """Give the files their final names and write `<name>.json` for {name: description or None}.

        Every batch must be done. The room behind the last row, of a collection that was to be
        longer, is cut off.
        """
        assert not self.pending()
        self._write_progress(read_progress(self.progress))
        remove_images(self.images, first=len(self.prompts))
        for name, record in descriptions.items():
            final, partial = self.out_dir / f"{name}.npy", self.out_dir / f"{name}.npy.partial"
            self._cut(name)
            if partial.exists():
                rename(partial, final)
            if record is not None:
                write_json(self.out_dir / f"{name}.json", record | {"checksum": checksum(record)})

    def _cut(self, name):
        """Let a file end with its last row."""
        path = self.path(name) or self.out_dir / f"{name}.npy"
        shape, dtype, *_ = check_size(path)
        num_rows = len(self.prompts)
        size = HEADER + num_rows * int(np.prod(shape[1:])) * dtype.itemsize
        has = path.stat().st_size
        if shape[0] == num_rows and has == size:
            return
        if has < size:
            raise UsageError(
                f"{path} has {shape[0]} rows of {num_rows}; move its folder away and collect again"
            )
        with opened(self._reopen(name)) as fd:
            write_all(fd, npy_header((num_rows, *shape[1:]), dtype), 0)
            os.ftruncate(fd, size)


def check_size(path: Path) -> NpyHeader:
    """The header of a `.npy` file; raises UsageError if the file is missing or shorter than its
    header says."""
    try:
        return read_header(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is missing or damaged ({error}); move its folder away and collect again"
        ) from None


def rows_checksum(row_shape: tuple[int, ...], dtype: np.dtype) -> int:
    """CRC-32 of no row yet, only of what a row is: `zlib.crc32(data, this)` is that of rows, which
    a changed header changes too.

    Four GB a second on one core, a small part of what writing takes, and it finds every error of 32
    bits in a row or fewer.
    """
    return zlib.crc32(f"{np.dtype(dtype).str} {list(row_shape)}".encode())


def check_saved_images(folder: Path, meta: dict, rows: set[int]) -> None:
    """Raise UsageError where images of some rows beside a finished activation file are not those
    that collect.py saved.

    meta: the description of the file. Of a batch with a missing image, and of collections of
    earlier versions, nothing is known.
    """
    images = folder / "images"
    batch_size = meta.get("batch_size", 1) * meta.get("num_images_per_prompt", 1)
    for batch, line in read_progress(folder / "progress.jsonl").items():
        of_batch = range(batch * batch_size, batch * batch_size + line["rows"])
        expected = line["crc32"].get(IMAGES) if isinstance(line.get("crc32"), dict) else None
        if (
            expected is None
            or rows.isdisjoint(of_batch)
            or any(image_path(images, row) is None for row in of_batch)
        ):
            continue
        if images_checksum(images, of_batch) != expected:
            raise UsageError(
                f"{images}: rows {of_batch[0]} to {of_batch[-1]} do not have the images that collect.py saved; put them back, "
                "or remove the folder to see features without images"
            )
