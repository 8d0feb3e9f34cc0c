"""Rows of numbers in files: the headers of `.npy`, and reading that does not end the program where a file is cut meanwhile.

A memory map of a file that becomes shorter ends Python with SIGBUS, without a message, and nothing in Python can catch that.
Reading a file's bytes gives fewer of them instead, and here that is an error. No pickle is read.
"""

import os
import struct
import threading
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UsageError

HEADER = 128  # bytes, of the files that collect.py writes
SEEKING = threading.Lock()  # where threads have to share a file's position


class StoredRows(NamedTuple):
    """Rows of equal width that lie one after another in a file."""

    path: str
    offset: int  # of the first row, in bytes
    num_rows: int
    width: int  # numbers in a row
    dtype: np.dtype
    tokens: int = 1  # rows of one (prompt, step)
    first: int = 0  # rows of the same array that come before these, in other files

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


class NpyHeader(NamedTuple):
    """What a `.npy` file says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of the first number, in bytes
    c_order: bool


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The first 128 bytes of `.npy` format 1.0, whatever the shape, so that a file can grow in place."""
    fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + repr(fields).encode().ljust(117) + b"\n"


def read_header(path: str | Path) -> NpyHeader:
    """The NpyHeader of a file. Raises OSError where it can't be read, ValueError where it is damaged, shorter than it says, or
    holds objects.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # checks all that, never unpickles, and reads only the header
    except OSError:
        raise
    except Exception as error:  # a damaged header can fail in any way
        raise ValueError(str(error)) from None
    return NpyHeader(array.shape, array.dtype, getattr(array, "offset", 0), array.flags.c_contiguous)


def open_to_read(path: str | Path) -> int:
    """A file descriptor for `fill`."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def fill(fd: int, memory: memoryview, offset: int, path: str) -> None:
    """Fill memory (bytes) with those of a file from `offset` on; several threads may share the descriptor.

    Raises UsageError where the file ends before, OSError where it can't be read.
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
    with SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(memory))
    memory[: len(data)] = data
    return len(data)


def read_pieces(files: list[StoredRows], pieces: np.ndarray) -> np.ndarray:
    """Copy rows of files of one width and dtype into a new array (n, width).

    pieces (many, 3): number of the file, first row, end row. Raises UsageError where a file has become shorter, OSError where
    one can't be read.
    """
    counts = pieces[:, 2] - pieces[:, 1]
    out = np.empty((int(counts.sum()), files[0].width), files[0].dtype)
    memory = memoryview(out.reshape(-1).view(np.uint8))
    at = 0
    for number, group in groupby(pieces.tolist(), key=lambda piece: piece[0]):
        file = files[number]
        fd = open_to_read(file.path)
        try:
            for _, first, end in group:
                num_bytes = (end - first) * file.row_bytes
                fill(fd, memory[at : at + num_bytes], file.offset + first * file.row_bytes, file.path)
                at += num_bytes
        finally:
            os.close(fd)
    return out
