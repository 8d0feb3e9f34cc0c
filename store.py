"""The file side, writing: activation files created, resumed, written and described; activations.py reads them.

An activation file is a plain NumPy array (prompts, steps, tokens, d) that `np.load(path, mmap_mode="r")` opens anywhere,
with a `.json` beside it that says what it holds. No pickle is read or written.
"""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import torch

HEADER = 128  # bytes


def npy_header(shape, dtype):
    """The first 128 bytes of `.npy` format 1.0, whatever the shape, so that a file can grow in place."""
    fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + repr(fields).encode().ljust(117) + b"\n"


def as_numpy(x):
    """A NumPy view of a CPU tensor; bfloat16 as its bits in uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).contiguous().numpy()


def write_atomically(path, data):
    """The file has either its old content or all of the new, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    rename(partial, path)


def rename(old, new):
    """Rename, and make the folder remember it."""
    os.replace(old, new)
    if os.name == "posix":
        folder = os.open(new.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def checksum(meta):
    """SHA-256 of a description without its "checksum", over its canonical JSON."""
    canonical = json.dumps({key: meta[key] for key in meta if key != "checksum"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Collection:
    """The files of one collection in `out_dir`, written batch by batch in any order; what is on disk is gone on with.

    settings: a JSON object of all that decides the bytes. prompts: list of dicts, one for each row of the arrays, whose
    `batch_size` consecutive rows are written together. `collect.json` (settings, and the facts that `write` was given)
    and `prompts.jsonl` are there from the start. While it runs, the arrays are `<name>.npy.partial`, and `progress.npy`
    (batches, 1 + sums) says how many rows of each batch are safe, and what it adds to the sums of the descriptions.

    Raises ValueError for a folder with batches of other settings or prompts, or with files of another program.
    """

    def __init__(self, out_dir, settings, prompts, batch_size):
        self.out_dir, self.prompts, self.batch_size = Path(out_dir), prompts, batch_size
        self.sizes = np.diff([*range(0, len(prompts), batch_size), len(prompts)])  # rows of each batch
        self.files, self.facts = {}, None
        self.settings = json.loads(json.dumps(settings))
        lines = [json.dumps(p) for p in prompts]
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out_dir {out_dir} can't be made: {error.strerror}") from None
        record, listing, progress = (self.out_dir / n for n in ("collect.json", "prompts.jsonl", "progress.npy"))
        suffixes = (".npy",) if record.exists() else (".npy", ".npy.partial", ".jsonl")
        if not progress.exists() and (taken := [p.name for p in self.out_dir.iterdir() if p.name.endswith(suffixes)]):
            raise ValueError(f"{out_dir} has files of another origin ({taken[0]}); use another --out_dir")
        self.progress = np.load(progress, allow_pickle=False) if progress.exists() else np.zeros((0, 1))
        old = listing.read_text("utf-8").split("\n")[:-1] if listing.exists() else []
        if self.progress[:, 0].any():
            self._compare(read_json(record), old, lines)
        else:  # nothing is safe yet: begin anew
            for path in self.out_dir.glob("*.npy.partial"):
                path.unlink()
            self.progress, old = np.zeros((0, 1)), []
        self._record()
        if old != lines:
            write_atomically(listing, "".join(line + "\n" for line in lines).encode())
        self.progress = np.pad(self.progress, ((0, len(self.sizes) - len(self.progress)), (0, 0)))

    def _compare(self, there, old, lines):
        """What is there must be the beginning of what is asked for."""
        settings, self.facts = there.get("settings") or {}, there.get("facts")
        if other := [k for k in {**settings, **self.settings} if settings.get(k) != self.settings.get(k)]:
            k = "images" if "images" in other else other[0]
            before, now = settings.get(k), self.settings.get(k)
            if isinstance(before, dict) and isinstance(now, dict):
                k = next(name for name in {**before, **now} if before.get(name) != now.get(name))
                before, now = before.get(k), now.get(k)
            raise ValueError(
                f"{self.out_dir} holds a collection made with {k} {before!r}, not {now!r}: "
                "use the same options to go on with it, or another --out_dir"
            )
        if old[: len(lines)] != lines[: len(old)]:
            raise ValueError(f"{self.out_dir} holds a collection of other prompts; use another --out_dir")
        if len(old) > len(lines):
            raise ValueError(f"{self.out_dir} holds or has begun {len(old)} prompts, more than {len(lines)}; nothing to do")

    def _record(self):
        text = json.dumps({"settings": self.settings, "facts": self.facts}, indent=1)
        write_atomically(self.out_dir / "collect.json", f"{text}\n".encode())

    def rows_of(self, batch):
        """The prompts of one batch."""
        return self.prompts[batch * self.batch_size : (batch + 1) * self.batch_size]

    def pending(self):
        """Indices of the batches that are not safe; one that has grown is done again, since bits depend on the batch."""
        return [int(b) for b in np.flatnonzero(self.progress[:, 0] != self.sizes)]

    def write(self, batch, arrays, sums, facts):
        """Write one batch: {name: CPU tensor (rows, ...)}, a vector of numbers to be summed over all batches, and facts
        (a JSON object) that are the same for each. Space for the whole file is reserved before its first byte.

        Raises OSError when the disk is full and ValueError when a batch's facts differ from the ones before.
        """
        facts = json.loads(json.dumps(facts))
        if self.facts is None:
            self.facts = facts
            self._record()
        if facts != self.facts:
            raise ValueError(f"batch {batch} ran other steps or tokens than the ones before it; collect it on its own")
        for name, x in arrays.items():
            if len(x) != self.sizes[batch]:
                raise ValueError(f"{name}: got {len(x)} rows for {self.sizes[batch]}; collect one image a prompt")
        for name, x in arrays.items():
            data = as_numpy(x)
            if name not in self.files:
                self.files[name] = self._open(name, data)
            write_all(self.files[name], data, HEADER + batch * self.batch_size * data[0].nbytes)
            os.fsync(self.files[name])
        path = self.out_dir / "progress.npy"
        shape = (len(self.sizes), 1 + len(sums))
        if self.progress.shape != shape or not path.exists() or check_size(path) != shape:
            self.progress = np.pad(self.progress, ((0, 0), (0, shape[1] - self.progress.shape[1])))
            write_atomically(path, npy_header(shape, np.float64) + self.progress.tobytes())
        row = self.progress[batch]
        row[0], row[1:] = self.sizes[batch], sums
        fd = os.open(path, os.O_WRONLY)
        try:
            write_all(fd, row[1:], HEADER + batch * row.nbytes + 8)
            os.fsync(fd)  # the sums before the count that vouches for them
            write_all(fd, row[:1], HEADER + batch * row.nbytes)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _open(self, name, data):
        """File descriptor of `<name>.npy.partial`, of full size: a new file, or the one that is there, grown if need be."""
        final, partial = self.out_dir / f"{name}.npy", self.out_dir / f"{name}.npy.partial"
        fresh = not (final.exists() or partial.exists())
        if fresh and self.progress[:, 0].any():
            raise ValueError(f"{final} is missing; move its folder away and collect again")
        if not fresh:
            check_size(final if final.exists() else partial)
        if final.exists():
            final.with_suffix(".json").unlink(missing_ok=True)
            rename(final, partial)
        path = self.out_dir / f"{name}.npy.new" if fresh else partial  # a file without its header can't be gone on with
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            size = HEADER + len(self.prompts) * data[0].nbytes
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
            else:
                os.ftruncate(fd, size)
            write_all(fd, npy_header((len(self.prompts), *data.shape[1:]), data.dtype), 0)
            os.fsync(fd)
        except OSError:
            os.close(fd)
            if fresh:
                path.unlink()
            raise
        rename(path, partial)
        return fd

    def sums(self):
        """Sums over all batches of the numbers given to `write`."""
        return self.progress[:, 1:].sum(0)

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
        while self.files:
            os.close(self.files.popitem()[1])

    def finish(self, descriptions):
        """Give the files their final names and write `<name>.json` for {name: description or None}. Every batch must be
        done.
        """
        assert not self.pending()
        self.close()
        for name, record in descriptions.items():
            final, partial = self.out_dir / f"{name}.npy", self.out_dir / f"{name}.npy.partial"
            if partial.exists():
                rename(partial, final)
            check_size(final)
            if record is not None:
                text = json.dumps(record | {"checksum": checksum(record)}, indent=1)
                write_atomically(self.out_dir / f"{name}.json", f"{text}\n".encode())


def write_all(fd, data, offset):
    """`os.pwrite` of bytes or a C-ordered array until everything is written."""
    view = memoryview(data).cast("B")
    while len(view):
        n = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[n:], offset + n


def check_size(path):
    """Shape of a `.npy` file; raises ValueError if it is missing or shorter than its header says."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); move its folder away and collect again") from None
    return array.shape


def read_json(path):
    """A JSON object; ValueError in one line if the file is none."""
    try:
        record = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return record
