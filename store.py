"""The file side: activation files created, resumed, written and described; vectors read back shuffled.

An activation file is a plain NumPy array (prompts, steps, tokens, d) that `np.load(path, mmap_mode="r")` opens anywhere,
with a `.json` beside it that says what it holds. No pickle is read or written.
"""

import glob
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


HELD_OUT = dict(share=0.1, at_least=100_000, at_most=1_000_000)  # vectors kept from training, in whole prompts
BLOCK_BYTES = 1 << 20  # read at once: large enough for a sequential read's speed, small enough to mix prompts


def read_description(path):
    """The `.json` beside an activation file, {} where there is none of ours. Raises ValueError if it is damaged."""
    path = Path(path).with_suffix(".json")
    meta = read_json(path) if path.exists() else {}
    if "checksum" not in meta:
        return {}  # somebody else's
    if meta["checksum"] != checksum(meta):
        raise ValueError(f"{path} was changed after it was written (its checksum differs); collect again or remove it")
    return meta


def open_file(path):
    """Map one activation file: its array (..., d), C order, read only, and its description ({} for a plain `.npy`).

    Raises ValueError for anything but floats of at least two axes, or bfloat16 bits that the description says are such.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix != ".npy":
        raise ValueError(f"{path} is not a finished .npy file")
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
    except OSError:
        raise
    except Exception as error:  # a damaged header can fail in any way; the reason is in the message
        raise ValueError(f"{path} is not a complete .npy file of numbers ({error})") from None
    meta = read_description(path)
    bfloat16 = array.dtype == np.uint16 and meta.get("dtype") == "bfloat16"
    if not bfloat16 and array.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"{path} holds {array.dtype}, expected float16, 32 or 64 (or bfloat16 with its .json)")
    if array.ndim < 2 or not array.flags.c_contiguous:
        raise ValueError(f"{path} has shape {array.shape}, expected (prompts, ..., d) or (vectors, d) in C order")
    if not array.size:
        raise ValueError(f"{path} is empty: shape {array.shape}")
    if list(meta.get("shape", array.shape)) != list(array.shape):
        raise ValueError(f"{path} has shape {list(array.shape)}, but its .json says {meta['shape']}")
    return array, meta


def newest_activations(folder="activations"):
    """The file that collect.py finished last in `folder`. Raises ValueError where there is none."""
    files = [path for path in Path(folder).glob("*.npy") if path.with_suffix(".json").exists()]
    if not files:
        raise ValueError(f"no activation file in {folder}/; run collect.py first, or name a .npy with --data")
    return max(files, key=lambda path: path.with_suffix(".json").stat().st_mtime)


def open_activations(data):
    """Open files, folders and globs as data sets, one a model and hook name (side, rows, stream): a list of Activations.

    Files without a description are one data set together, and a file that is named twice is read once. Raises ValueError
    where a glob or folder has no file, OSError where a file is not there.
    """
    paths = {}
    for item in map(str, data):
        found = [item]
        if Path(item).is_dir() or not Path(item).exists() and glob.has_magic(item):
            found = Path(item).glob("*.npy") if Path(item).is_dir() else map(Path, glob.glob(item))
            found = sorted(str(path) for path in found if holds_activations(path))
        if not found:
            raise ValueError(f"{item}: no .npy file there")
        for path in found:
            paths.setdefault(os.path.realpath(path), path)
    sets = {}
    for path in paths.values():
        meta = read_description(path)
        sets.setdefault(tuple(meta.get(key) for key in ("model", "hook_name", "side", "rows", "stream")), []).append(path)
    return [Activations(paths) for paths in sets.values()]


def holds_activations(path):
    """Whether a file that was found is meant: collect.py describes its activations, and not samples.npy or progress.npy."""
    side_file = path.name.endswith((".tokens.npy", ".timesteps.npy", ".lengths.npy"))
    return not side_file and (path.with_suffix(".json").exists() or not (path.parent / "collect.json").exists())


def prompts_of(path, array, meta):
    """What says which prompt each row of the file's first axis is of: its text in prompts.jsonl, or else a number."""
    listing, n = Path(path).with_name("prompts.jsonl"), int(meta.get("num_images_per_prompt", 1))
    if meta and listing.exists():
        try:
            texts = [json.loads(line).get("prompt") for line in listing.read_text("utf-8").splitlines()]
        except (ValueError, AttributeError):
            raise ValueError(f"{listing} can't be read; collect again, or move it away") from None
        if len(texts) == len(array) and None not in texts and len(set(texts)) > 1:
            return texts
    return [(path, row // n) for row in range(len(array))]


def read_lengths(path, array):
    """Tokens of each prompt (prompts,) that are no padding, of a file of text tokens."""
    path = Path(path).with_suffix(".lengths.npy")
    if check_size(path) != array.shape[:1]:
        raise ValueError(f"{path} is of another collection: {check_size(path)} for {array.shape[:1]}")
    return np.load(path, allow_pickle=False).clip(0, array.shape[2])


class Activations:
    """The vectors of one hook point, in one or several files, split into training and held-out prompts.

    The split is by prompt: all images of one (the first axis of an N-D file), and of its namesakes, fall on one side. A
    file of two axes or a single prompt is cut into 32 contiguous pieces instead. Held out is a seeded choice of
    HELD_OUT["share"] of the vectors in whole prompts, more where that is below `at_least` (up to a quarter and the rest
    of a prompt, never more than half), fewer where it is above `at_most`.

    Attributes: paths; hook_name ("" for plain files); d; num_vectors = num_training + num_held_out; whole_prompts, False where
    there were none to hold out.
    """

    def __init__(self, paths, seed=0):
        self.paths, self.rows, self.whole_prompts = [str(path) for path in paths], [], True
        units, prompts = [], []  # (file, first row, end row), and which prompt that is of
        for file, path in enumerate(self.paths):
            array, meta = open_file(path)
            rows = array.reshape(-1, array.shape[-1])
            self.rows.append(rows)
            if not file:
                self.d, self.dtype, self.hook_name = rows.shape[1], rows.dtype, str(meta.get("hook_name", ""))
            if (rows.shape[1], rows.dtype) != (self.d, self.dtype):
                here, there = f"width {rows.shape[1]}, {rows.dtype}", f"width {self.d}, {self.dtype}"
                raise ValueError(f"{path} holds vectors of {here}, {self.paths[0]} of {there}")
            names = prompts_of(path, array, meta) if array.ndim > 2 else []
            if len(set(names)) < 2:
                names, self.whole_prompts = [(path, piece) for piece in range(min(32, len(rows)))], False
            cuts = np.arange(len(names) + 1) * len(rows) // len(names)
            first, end = cuts[:-1], cuts[1:]
            if meta.get("stream") == "text" and len(names) == len(array):  # without the padding of each prompt's steps
                first = np.arange(0, len(rows), array.shape[2])
                names = [name for name in names for _ in range(array.shape[1])]
                end = first + read_lengths(path, array).repeat(array.shape[1])
            units.append(np.stack([np.full(len(names), file), first, end], 1))
            prompts += names
        units, numbers = np.concatenate(units), {}
        prompts = np.array([numbers.setdefault(name, len(numbers)) for name in prompts])
        if len(numbers) < 2:
            raise ValueError(f"{self.paths[0]} holds a single vector; there is nothing to train on")
        sizes = np.bincount(prompts, units[:, 2] - units[:, 1])
        self.num_vectors = int(sizes.sum())
        order = np.random.default_rng([seed, 0]).permutation(len(sizes))
        wanted = max(HELD_OUT["share"] * self.num_vectors, min(HELD_OUT["at_least"], self.num_vectors / 4))
        enough = np.searchsorted(np.cumsum(sizes[order]), min(wanted, HELD_OUT["at_most"])) + 1
        chosen = order[: min(enough, len(order) - 1)]
        held_out = np.isin(prompts, chosen)
        if 2 * sizes[chosen].sum() > self.num_vectors:  # few prompts of very different sizes
            held_out = ~held_out
        self.held_out_units, self.training_units = units[held_out], units[~held_out]
        self.num_held_out = int((self.held_out_units[:, 2] - self.held_out_units[:, 1]).sum())
        self.num_training = self.num_vectors - self.num_held_out

    def read(self, pieces):
        """Copy rows into one tensor (n, d) of the file's dtype (float32 for float64, which MPS can't hold).

        pieces (many, 3): file, first row, end row.
        """
        ends = np.cumsum(pieces[:, 2] - pieces[:, 1])
        out = np.empty((ends[-1], self.d), np.float32 if self.dtype == np.float64 else self.dtype)
        for (file, first, end), at in zip(pieces.tolist(), ends.tolist()):
            out[at - (end - first) : at] = self.rows[file][first:end]
        tensor = torch.from_numpy(out)
        return tensor.view(torch.bfloat16) if out.dtype == np.uint16 else tensor

    def sample(self, n, seed=0):
        """About n training vectors, drawn one by one from all files and prompts: float32 (n, d)."""
        units = self.training_units
        ends = np.cumsum(units[:, 2] - units[:, 1])
        rng = np.random.default_rng([seed, 1])
        chosen = np.sort(rng.choice(self.num_training, min(n, self.num_training), replace=False))
        unit = np.searchsorted(ends, chosen, side="right")
        row = units[unit, 2] - (ends[unit] - chosen)
        return self.read(np.stack([units[unit, 0], row, row + 1], 1)).float()

    def held_out(self):
        """The held-out vectors, one prompt after another in the order of the files: tensors (rows, d)."""
        for unit in self.held_out_units:
            yield self.read(unit[None])

    def batches(self, batch_size, stop, start=0, seed=0, buffer_gb=2.0):
        """Training vectors `start` to `stop` of an endless seeded shuffle: tensors (batch_size, d), the last shorter.

        Every vector comes once an epoch of `num_training`; a batch may span two epochs, so nothing is dropped. The
        order depends on the seed and the buffer's size alone: starting at any position gives what would have come.
        """
        parts, wanted = [], min(batch_size, stop - start)
        if wanted < 1:
            return
        for buffer, order in self.buffers(start, seed, buffer_gb):
            while len(order) and wanted:
                take, order = order[:wanted], order[wanted:]
                parts.append(buffer.index_select(0, take))  # 3 times as fast as NumPy's indexing
                wanted -= len(take)
                if not wanted:
                    batch = parts[0] if len(parts) == 1 else torch.cat(parts)
                    yield batch
                    start, parts = start + len(batch), []
                    wanted = min(batch_size, stop - start)
            if not wanted:
                return
            del buffer  # before the next is read, or there would be two in memory

    def buffers(self, start, seed, buffer_gb):
        """Endless (vectors, order) from position `start` on: an epoch's blocks in random order, buffer by buffer.

        A buffer that holds all vectors is read once and shuffled anew every epoch.
        """
        row_bytes = self.d * self.dtype.itemsize
        blocks = []
        for file, first, end in self.training_units.tolist():
            cuts = np.append(np.arange(first, end, max(1, BLOCK_BYTES // row_bytes)), end)
            blocks.append(np.stack([np.full(len(cuts) - 1, file), cuts[:-1], cuts[1:]], 1))
        blocks = np.concatenate(blocks)
        count = max(1, -int(-self.num_training * row_bytes // (buffer_gb * 2**30)))
        epoch, skip = divmod(start, self.num_training)
        whole = self.read(blocks) if count == 1 else None
        while whole is not None:
            order = np.random.default_rng([seed, 3, epoch]).permutation(self.num_training)
            yield whole, torch.from_numpy(order[skip:])
            epoch, skip = epoch + 1, 0
        while True:
            shuffled = np.random.default_rng([seed, 2, epoch]).permutation(blocks)
            ends = np.cumsum(shuffled[:, 2] - shuffled[:, 1])
            cuts = np.searchsorted(ends, np.arange(1, count) * self.num_training // count)
            for number, pieces in enumerate(np.split(shuffled, cuts)):
                n = int((pieces[:, 2] - pieces[:, 1]).sum())
                if skip < n:
                    order = np.random.default_rng([seed, 3, epoch, number]).permutation(n)
                    yield self.read(pieces), torch.from_numpy(order[skip:])
                skip = max(0, skip - n)
            epoch += 1
