"""Files that are whole or not there: atomic writes, safetensors, JSON, and folders of results.

    write_atomically(path, b"text")       # after a power cut: all of the old bytes or of the new
    save_tensors(path, {"W": w}, {})      # the same for a safetensors file
    claim_folder(folder, "steer.json", {"seed": 0})    # refuses a folder of other results

What has to survive a power cut is written in this order: the bytes under another name, fsync, the
new name, fsync of the folder. A rename that reaches the disk before the bytes would leave an empty
file under the final name.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from errors import UsageError

WRITTEN_AT_ONCE = 1 << 30  # bytes; one call of pwrite can't write 2 GiB or more


# ---- writing


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that has either its old content or all of the new, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with opened(partial, os.O_CREAT | os.O_TRUNC) as fd:
        write_all(fd, data, 0)
    rename(partial, path)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that has either its old content or all of the new.

    Raises OSError if it can't be written, as on a full disk.
    """
    partial = path.with_name(path.name + ".partial")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(contiguous, partial, metadata)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o644 & ~umask)  # the package leaves it readable by its owner alone
        with opened(partial):  # leaving it waits until the file is safe
            pass
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written: {error}") from None
    rename(partial, path)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return {name: tensor} of a safetensors file, on the CPU."""
    return safetensors.torch.load_file(path)


def fill(fd: int, memory: memoryview, offset: int, path: str | Path) -> None:
    """Fill memory with the bytes of a file from `offset` on.

    fd: a descriptor of the file, which several threads may share. path: what messages call it.

    It reads, instead of mapping the file, because a map of a file that becomes shorter would end
    Python with SIGBUS, without a message, and nothing in Python can catch that. Raises UsageError
    if the file ends too early, OSError if it can't be read.
    """
    while memory:
        try:
            count = read_at(fd, memory, offset)
        except OSError as error:
            raise OSError(f"{path} can't be read: {error.strerror}") from None
        if not count:
            raise UsageError(f"{path} has become shorter while it was read; start again")
        memory = memory[count:]
        offset += count


def read_at(fd: int, memory: memoryview, offset: int) -> int:
    """Read bytes of a file into memory; return how many: at least 1, or 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [memory], offset)
    data = os.pread(fd, len(memory), offset)  # macOS before 11 has no preadv: this takes a copy
    memory[: len(data)] = data
    return len(data)


def rename(old: Path, new: Path) -> None:
    """Rename a file, replacing `new`, and make the folder remember it."""
    os.replace(old, new)
    sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    """Write a folder's list of files to the disk (fsync), so that it has them after a power cut."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def checksum(meta: dict[str, Any]) -> str:
    """Return the SHA-256 of a description without its key "checksum".

    It is taken over JSON with sorted keys and without spaces, so the order of keys does not count.
    """
    described = {key: value for key, value in meta.items() if key != "checksum"}
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextmanager
def opened(path: str | Path, flags: int = 0) -> Iterator[int]:
    """Open a file for writing; yield its descriptor.

    What was written is safe on the disk (fsync) when the context ends. flags: os.O_CREAT and the
    like. An OSError names the file.
    """
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        yield fd
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | np.ndarray, offset: int) -> None:
    """Write all bytes, or a C-ordered array, into a file from `offset` on.

    One call of `os.pwrite` may write less than it is asked to.
    """
    view = memoryview(data).cast("B")
    while len(view):
        count = os.pwrite(fd, view[:WRITTEN_AT_ONCE], offset)
        view = view[count:]
        offset += count


# ---- JSON


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(record, indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UsageError if the file is missing or holds none."""
    try:
        record = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} can't be read: {error}") from None
    if not isinstance(record, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return record


# ---- folders


def is_hidden(path: str | Path) -> bool:
    """Return whether the name of a file begins with a dot.

    So do those of the ._ files that macOS leaves on the disks of other systems.
    """
    return Path(path).name.startswith(".")


def make_folder(folder: str | Path, option: str = "--out_dir") -> None:
    """Make a folder and those above it; `option` is where the user named it.

    Raises UsageError if it can't be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {folder} can't be made: {error.strerror}") from None


def check_same(
    place: str | Path,
    theirs: dict[str, Any],
    ours: dict[str, Any],
    remedy: str = "choose another --out_dir",
) -> None:
    """Raise UsageError if what lies at `place` was made with other settings than `ours`.

    theirs, ours: JSON objects. The message names the first setting that differs, and ends with the
    remedy; in a setting that is an object itself, it names the first difference inside.
    """
    ours = json.loads(json.dumps(ours))  # tuples become lists, as in the file
    for name in {**theirs, **ours}:
        before = theirs.get(name)
        now = ours.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            check_same(place, before, now, remedy)
        raise UsageError(f"{place} was made with {name} {before!r}, not {now!r}; {remedy}")


def claim_folder(
    folder: str | Path,
    record: str,
    settings: dict[str, Any],
    key: str | None = "options",
    option: str = "--out_dir",
) -> None:
    """Make the folder of a result, and write into it that the result is unfinished.

    record: the name of the JSON file that describes the result. settings: what the result is made
    with, kept in the record as the object `key`; with key None they stand in the record itself.
    Until the caller writes the record it says "unfinished", so the next run knows the leftovers of
    one that was killed, and writes them anew. A folder that holds the finished result of the same
    settings is left as it is.

    Raises UsageError if the folder holds a result of other settings, or something else.
    """
    folder = Path(folder)
    path = folder / record
    if path.exists():
        old_record = read_json(path)
        is_finished = not old_record.get("unfinished")
        # a run that failed before it made anything is no obstacle to other settings
        if is_finished or holds_more_than(folder, path):
            old_settings = settings_in(old_record, settings, key)
            check_same(folder, old_settings, settings, f"choose another {option}")
        if is_finished:
            return
    else:
        check_empty(folder, (record,), option)

    make_folder(folder, option)
    new_record = dict(settings) if key is None else {key: settings}
    new_record["unfinished"] = True
    write_json(path, new_record)


def settings_in(
    record: dict[str, Any], settings: dict[str, Any], key: str | None
) -> dict[str, Any]:
    """Return the settings that a record holds, as `claim_folder` wrote them; {} if it has none."""
    if key is None:
        return {name: record.get(name) for name in settings}
    stored = record.get(key)
    return stored if isinstance(stored, dict) else {}


def holds_more_than(folder: Path, path: Path) -> bool:
    """Return whether a folder holds a file that is not hidden, besides the file `path`."""
    return any(other != path and not is_hidden(other) for other in folder.iterdir())


def check_empty(folder: Path, files: Collection[str], option: str = "--out_dir") -> None:
    """Raise UsageError if a folder holds anything but these files.

    The files may be finished or partial; hidden ones don't count. A missing folder is empty.
    """
    if not folder.is_dir():
        return
    allowed = {*files, *(f"{file}.partial" for file in files)}
    names = sorted(path.name for path in folder.iterdir() if not is_hidden(path))
    others = [name for name in names if name not in allowed]
    if others:
        raise UsageError(
            f"{folder} holds something else; choose another {option} ({others[0]} is there)"
        )


def relative_to(path: str | Path, folder: Path) -> str:
    """Return a path as seen from a folder: for a/b.npy and the folder c it is ../a/b.npy.

    It is absolute if there is no way from one to the other, as between drives.
    """
    try:
        return Path(os.path.relpath(Path(path).resolve(), Path(folder).resolve())).as_posix()
    except ValueError:
        return str(Path(path).resolve())


def seen_from(folder: str | Path, path: str) -> str:
    """Return the path that `relative_to` was given, the inverse: for c and ../a/b.npy, a/b.npy.

    It is absolute if the words in which the folder is named lead to another place, as they do where
    the folder is a link.
    """
    full = (Path(folder).resolve() / path).resolve()
    plain = Path(os.path.normpath(Path(folder) / path))
    return str(plain if plain.resolve() == full else full)
