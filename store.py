"""The file side, writing: activation files created, resumed, written and described; activations.py reads them.

An activation file is a plain NumPy array (prompts, steps, tokens, d) that `np.load(path, mmap_mode="r")` opens anywhere,
with a `.json` beside it that says what it holds. No pickle is read or written.
"""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from disk import checksum, lock, opened, read_json, rename, write_all, write_atomically
from errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

HEADER = 128  # bytes


def npy_header(shape, dtype):
    """The first 128 bytes of `.npy` format 1.0, whatever the shape, so that a file can grow in place."""
    fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + repr(fields).encode().ljust(117) + b"\n"


def as_numpy(x):
    """A NumPy view of a CPU tensor; bfloat16 as its bits in uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).contiguous().numpy()


def vouch(row, size):
    """What stands before the sums of a batch of `size` rows that is safe: `size`, and after the point a checksum of both."""
    return size + zlib.crc32(np.float64([size, *row[1:]]).tobytes()) / 2**32


def safe_counts(done):
    """How many rows of each batch are safe, by what `progress.npy` holds: int64 (batches,). 0 where a record is damaged; rows of
    an earlier version have no checksum."""
    sizes = np.nan_to_num(np.floor(done[:, 0]), posinf=0, neginf=0).astype(np.int64)
    return np.array([size if row[0] in (size, vouch(row, size)) else 0 for row, size in zip(done, sizes)], np.int64)


class Collection:
    """The files of one collection in `out_dir`, written batch by batch in any order; what is on disk is gone on with.

    settings: a JSON object of all that decides the bytes. prompts: list of dicts, one for each row of the arrays, whose
    `batch_size` consecutive rows are written together. `collect.json` (settings, and the facts that `write` was given)
    and `prompts.jsonl` are there from the start. While it runs, the arrays are `<name>.npy.partial`, and `progress.npy`
    (batches, 1 + sums) says how many rows of each batch are safe, see `vouch`, and what it adds to the sums of the
    descriptions. Of several processes on a machine one begins, then the others join it; each writes batches of its own.

    Raises UsageError for a folder with batches of other settings or prompts, with files of another program, with records that
    are damaged, and while another program writes there.
    """

    def __init__(self, out_dir, settings, prompts, batch_size, joining=False):
        self.out_dir, self.prompts, self.batch_size = Path(out_dir), prompts, batch_size
        self.sizes = np.diff([*range(0, len(prompts), batch_size), len(prompts)])  # rows of each batch
        self.ready, self.facts, self.held = set(), None, None  # ready: names of the files that can be written into
        self.settings = json.loads(json.dumps(settings))
        self.record, self.listing, self.progress = (self.out_dir / n for n in ("collect.json", "prompts.jsonl", "progress.npy"))
        try:
            if not joining:
                self._check_origin()
                self._hold(exclusive=True)
                self._begin()
            self._hold(exclusive=False)  # with those that join
            if joining:
                self.facts = self._read_record().get("facts")
        except BaseException:
            self.close()
            raise

    def _check_origin(self):
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out_dir {self.out_dir} can't be made: {error.strerror}") from None
        suffixes = (".npy",) if self.record.exists() else (".npy", ".npy.partial", ".jsonl")
        if not self.progress.exists() and (taken := [p.name for p in self.out_dir.iterdir() if p.name.endswith(suffixes)]):
            raise UsageError(f"{self.out_dir} has files of another origin ({taken[0]}); use another --out_dir")

    def _hold(self, exclusive):
        """The lock on the folder, for as long as this collection is open."""
        self.close()
        try:
            self.held = lock(self.out_dir / "collect.lock", exclusive)
        except BlockingIOError:
            raise UsageError(f"another collect.py is writing to {self.out_dir}; wait for it, or use another --out_dir") from None
        except OSError as error:
            raise UsageError(f"--out_dir {self.out_dir} can't be written: {error.strerror}") from None

    def _begin(self):
        lines = [json.dumps(p) for p in self.prompts]
        old = self.listing.read_bytes().split(b"\n")[:-1] if self.listing.exists() else []
        if self._done()[:, 0].any():
            self._compare(self._read_record(), old, [line.encode() for line in lines])
        else:  # nothing is safe yet: begin anew
            for path in self.out_dir.glob("*.npy.partial"):
                path.unlink()
        self._write_record()
        write_atomically(self.listing, "".join(line + "\n" for line in lines).encode())

    def _compare(self, there, old, lines):
        """What is there must be the beginning of what is asked for."""
        settings, self.facts = there.get("settings") or {}, there.get("facts")
        if other := [k for k in {**settings, **self.settings} if settings.get(k) != self.settings.get(k)]:
            k = "images" if "images" in other else other[0]
            before, now = settings.get(k), self.settings.get(k)
            if isinstance(before, dict) and isinstance(now, dict):
                k = next(name for name in {**before, **now} if before.get(name) != now.get(name))
                before, now = before.get(k), now.get(k)
            raise UsageError(
                f"{self.out_dir} holds a collection made with {k} {before!r}, not {now!r}: "
                "use the same options to go on with it, or another --out_dir"
            )
        if old[: len(lines)] != lines[: len(old)]:
            raise UsageError(f"{self.out_dir} holds a collection of other prompts; use another --out_dir")
        if len(old) > len(lines):
            raise UsageError(f"{self.out_dir} holds or has begun {len(old)} prompts, more than {len(lines)}; nothing to do")

    def _read_record(self):
        record = read_json(self.record)
        if record.get("checksum", checksum(record)) != checksum(record):  # there was none in earlier versions
            raise UsageError(f"{self.record} was changed after it was written; move its folder away and collect again")
        return record

    def _write_record(self):
        record = {"settings": self.settings, "facts": self.facts}
        write_atomically(self.record, (json.dumps(record | {"checksum": checksum(record)}, indent=1) + "\n").encode())

    def _done(self):
        """What `progress.npy` holds, for as many batches as there are now: float64 (batches, 1 + sums)."""
        if not self.progress.exists():
            return np.zeros((len(self.sizes), 1))
        shape, data = check_size(self.progress), self.progress.read_bytes()
        if len(shape) != 2 or data[:HEADER] != npy_header(shape, np.float64) or len(data) != HEADER + 8 * shape[0] * shape[1]:
            raise UsageError(f"{self.progress} is damaged; move its folder away and collect again")
        done = np.frombuffer(data, np.float64, offset=HEADER).reshape(shape)
        return np.pad(done, ((0, max(0, len(self.sizes) - len(done))), (0, 0)))

    def rows_of(self, batch):
        """The prompts of one batch."""
        return self.prompts[batch * self.batch_size : (batch + 1) * self.batch_size]

    def pending(self):
        """Indices of the batches that are not safe; one that has grown is done again, since bits depend on the batch, and so
        is one whose record is damaged."""
        done = safe_counts(self._done())[: len(self.sizes)]
        return [int(b) for b in np.flatnonzero(done != self.sizes)]

    def write(self, batch, arrays, sums, facts):
        """Write one batch: {name: CPU tensor (rows, ...)}, a vector of numbers to be summed over all batches, and facts
        (a JSON object) that are the same for each. Space for whole files is reserved before their first byte.

        Raises OSError when the disk is full and UsageError when a batch's facts differ from the ones before.
        """
        held = os.dup(self.held)  # after a second Ctrl-C the collection is closed, and the folder still ours until this returns
        try:
            self._write(batch, {name: as_numpy(x) for name, x in arrays.items()}, sums, json.loads(json.dumps(facts)))
        except OSError as error:
            where = f"{error.filename or self.out_dir} can't be written: {error.strerror or error}"
            raise OSError(f"{where}; finished batches are kept, and the same command goes on") from error
        finally:
            os.close(held)

    def _write(self, batch, arrays, sums, facts):
        for name, data in arrays.items():
            if len(data) != self.sizes[batch]:
                raise UsageError(f"{name}: got {len(data)} rows for {self.sizes[batch]}; collect one image a prompt")
        if facts != self.facts or arrays.keys() - self.ready:
            one = lock(self.listing, wait=True)  # of the processes that write here; prompts.jsonl itself no longer changes
            try:
                self._prepare(batch, arrays, 1 + len(sums), facts)
            finally:
                os.close(one)
        for name, data in arrays.items():
            with opened(self.out_dir / f"{name}.npy.partial") as fd:
                write_all(fd, data, HEADER + batch * self.batch_size * data[0].nbytes)
        row = np.float64([0, *sums])
        place, safe = HEADER + batch * row.nbytes, np.float64([vouch(row, self.sizes[batch])])
        with opened(self.progress) as fd:
            write_all(fd, row[:1], place)  # a batch that is done again: no count beside other sums
            os.fsync(fd)
            write_all(fd, row[1:], place + 8)
            os.fsync(fd)  # the sums before the count that vouches for them
            write_all(fd, safe, place)

    def _prepare(self, batch, arrays, columns, facts):
        """What the first batch of a process finds or makes, while no other process does."""
        if self.facts is None:
            self.facts = self._read_record().get("facts")
        if self.facts is None:
            self.facts = facts
            self._write_record()
        if facts != self.facts:
            raise UsageError(f"batch {batch} ran other steps or tokens than the ones before it; collect it on its own")
        done = self._done()
        for name, data in arrays.items():
            self._reserve(name, data, done[:, 0].any())
        if not self.progress.exists() or check_size(self.progress) != (len(done), columns):
            done = done if done[:, 0].any() else np.zeros((len(self.sizes), columns))
            write_atomically(self.progress, npy_header(done.shape, np.float64) + done.tobytes())
        self.ready |= arrays.keys()

    def _reserve(self, name, data, begun):
        """Make `<name>.npy.partial` of full size: a new file, or the one that is there, grown if need be."""
        if not name or Path(name).name != name:
            raise UsageError(f"{name!r} is no name for a file in {self.out_dir}")
        final, partial = self.out_dir / f"{name}.npy", self.out_dir / f"{name}.npy.partial"
        fresh = not (final.exists() or partial.exists())
        if fresh and begun:
            raise UsageError(f"{final} is missing; move its folder away and collect again")
        if not fresh:
            check_size(final if final.exists() else partial)
        if final.exists():
            final.with_suffix(".json").unlink(missing_ok=True)
            rename(final, partial)
        path = self.out_dir / f"{name}.npy.new" if fresh else partial  # a file without its header can't be gone on with
        try:
            with opened(path, os.O_CREAT) as fd:
                size = HEADER + len(self.prompts) * data[0].nbytes
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(fd, 0, size)
                else:
                    os.ftruncate(fd, size)
                write_all(fd, npy_header((len(self.prompts), *data.shape[1:]), data.dtype), 0)
        except OSError:
            if fresh:
                path.unlink(missing_ok=True)
            raise
        rename(path, partial)

    def sums(self):
        """Sums over all batches of the numbers given to `write`."""
        return self._done()[:, 1:].sum(0)

    def path(self, name):
        """Of the file `<name>.npy`, finished or not; None where there is none."""
        paths = [self.out_dir / f"{name}.npy{end}" for end in (".partial", "")]
        return next((path for path in paths if path.exists()), None)

    def shape(self, name):
        """Of the array in `<name>.npy`, finished or not; None where there is none."""
        path = self.path(name)
        return None if path is None else list(check_size(path))

    def read(self, name):
        """The small array in `<name>.npy`, finished or not."""
        return np.load(self.path(name), allow_pickle=False)

    def close(self):
        """Let others write in the folder."""
        if self.held is not None:
            os.close(self.held)
            self.held = None

    def finish(self, descriptions):
        """Give the files their final names and write `<name>.json` for {name: description or None}. Every batch must be
        done.
        """
        assert not self.pending()
        for name, record in descriptions.items():
            final, partial = self.out_dir / f"{name}.npy", self.out_dir / f"{name}.npy.partial"
            if partial.exists():
                rename(partial, final)
            check_size(final)
            if record is not None:
                text = json.dumps(record | {"checksum": checksum(record)}, indent=1)
                write_atomically(self.out_dir / f"{name}.json", f"{text}\n".encode())


def check_size(path):
    """Shape of a `.npy` file; raises UsageError if it is missing or shorter than its header says."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header can fail in any way
        raise UsageError(f"{path} is missing or damaged ({error}); move its folder away and collect again") from None
    return array.shape
