"""Files that are whole or not there: atomic writes, safetensors, JSON, and what a folder already
holds; and reading in place."""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from errors import UsageError


def write_atomically(path, data):
    """The file has either its old content or all of the new, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with opened(partial, os.O_CREAT | os.O_TRUNC) as fd:
        write_all(fd, data, 0)
    rename(partial, path)


def save_tensors(path, tensors, metadata):
    """Write {name: tensor} and metadata {str: str} as a safetensors file; `path` has its old
    content or all of the new.

    Raises OSError, as on a full disk.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata
        )
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o644 & ~umask)  # the package leaves it readable by its owner alone
        with opened(partial):  # which waits until it is safe
            pass
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written: {error}") from None
    rename(partial, path)


def load_tensors(path):
    """{name: tensor} of a safetensors file, on the CPU."""
    return safetensors.torch.load_file(path)


def fill(fd: int, memory: memoryview, offset: int, path: str | Path) -> None:
    """Fill memory (bytes) with those of a file from `offset` on; several threads may share the
    descriptor.

    A memory map of a file that becomes shorter would end Python with SIGBUS, without a message, and
    nothing in Python can catch that. Raises UsageError where the file ends before, OSError where it
    can't be read.
    """
    while memory:
        try:
            count = read_at(fd, memory, offset)
        except OSError as error:
            raise OSError(f"{path} can't be read: {error.strerror}") from None
        if not count:
            raise UsageError(f"{path} has become shorter while it was read; start again")
        memory, offset = memory[count:], offset + count


def read_at(fd, memory, offset):
    """How many bytes were read, at least 1 before the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [memory], offset)
    data = os.pread(fd, len(memory), offset)  # as on macOS before 11: by a copy
    memory[: len(data)] = data
    return len(data)


def rename(old, new):
    """Rename, and make the folder remember it."""
    os.replace(old, new)
    sync_folder(new.parent)


def sync_folder(folder):
    """Make a folder remember which files it has, also after a power cut."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def checksum(meta):
    """SHA-256 of a description without its "checksum", over its canonical JSON."""
    canonical = json.dumps(
        {key: meta[key] for key in meta if key != "checksum"}, sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextmanager
def opened(path, flags=0):
    """File descriptor to write with; what was written is safe when the context ends. An OSError
    names the file."""
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        yield fd
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(fd)


def write_all(fd, data, offset):
    """`os.pwrite` of bytes or a C-ordered array until everything is written."""
    view = memoryview(data).cast("B")
    while len(view):
        n = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[n:], offset + n


def write_json(path: Path, record: dict) -> None:
    """Write a JSON object, whole or not at all. Raises ValueError for NaN and infinity, which JSON
    does not have."""
    text = json.dumps(record, indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def read_json(path):
    """A JSON object; UsageError in one line if the file is none."""
    try:
        record = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} can't be read: {error}") from None
    if not isinstance(record, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return record


def is_hidden(path: str | Path) -> bool:
    """Whether a name begins with a dot, as those of the ._ files do that macOS leaves on other
    systems' disks."""
    return Path(path).name.startswith(".")


def make_folder(folder, option="--out_dir"):
    """Make a folder and those above it. Raises UsageError where that can't be done."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {folder} can't be made: {error.strerror}") from None


def check_same(place, theirs, ours, remedy="choose another --out_dir"):
    """Raise UsageError if what lies at `place` was made with other settings than `ours`.

    theirs, ours: JSON objects. The message names the first setting that differs; in one that is an
    object itself, the first difference in there.
    """
    ours = json.loads(json.dumps(ours))
    for name in {**theirs, **ours}:
        before, now = theirs.get(name), ours.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            check_same(place, before, now, remedy)
        raise UsageError(f"{place} was made with {name} {before!r}, not {now!r}; {remedy}")


def claim_folder(folder, record, settings, key="options", option="--out_dir"):
    """Make the folder of a result. Raises UsageError if it holds a result of other settings, or
    something else.

    record: name of the JSON file that describes the result, whose object `key` holds the settings
    that it was made with; with key None they stand in it beside the result. Until the caller writes
    it, it says "unfinished": so the next run knows the leftovers of one that was killed, and writes
    them anew.
    """
    folder = Path(folder)
    path = folder / record
    if path.exists():
        theirs = read_json(path)
        is_finished = not theirs.get("unfinished")
        said = theirs.get(key) if key else {name: theirs.get(name) for name in settings}
        others = [
            other for other in folder.iterdir() if other != path and not other.name.startswith(".")
        ]
        if is_finished or others:  # one that failed before it made anything is no obstacle
            check_same(
                folder, said if isinstance(said, dict) else {}, settings, f"choose another {option}"
            )
        if is_finished:
            return
    else:
        check_empty(folder, (record,), option)
    make_folder(folder, option)
    write_json(path, (settings if key is None else {key: settings}) | {"unfinished": True})


def check_empty(folder, files, option="--out_dir"):
    """Raise UsageError if a folder holds anything but some of these files, finished or partial, and
    hidden files."""
    if not folder.is_dir():
        return
    own = {name for file in files for name in (file, f"{file}.partial")}
    others = sorted(
        path.name for path in folder.iterdir() if path.name not in own and not is_hidden(path)
    )
    if others:
        raise UsageError(
            f"{folder} holds something else; choose another {option} ({others[0]} is there)"
        )


def relative_to(path: str | Path, folder: Path) -> str:
    """A path as seen from a folder; absolute where there is no way from one to the other, as
    between drives."""
    try:
        return Path(os.path.relpath(Path(path).resolve(), Path(folder).resolve())).as_posix()
    except ValueError:
        return str(Path(path).resolve())


def seen_from(folder: str | Path, path: str) -> str:
    """The inverse of `relative_to`: the path in the words in which the folder is named, absolute
    where that is another place."""
    full = (Path(folder).resolve() / path).resolve()
    plain = Path(
        os.path.normpath(Path(folder) / path)
    )  # which is another place if the folder is a link
    return str(plain if plain.resolve() == full else full)
