"""Folders that `datasets.Dataset.save_to_disk` wrote, read in place and never copied.

The ancestor of this project saved its activations so: one row per image and step, with the vectors
in the column "activations" or "values". The files are Arrow streams, in which a column of lists of
equal length lies as one array per record batch. So the array's place in the file is all that
reading needs. Extension types (Array2D) are taken as what they store; nothing is unpickled.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from errors import UsageError
from store.disk import read_json

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("activations", "values")  # what the versions of the ancestor call it
ROW_COLUMNS = ("timestep", "file_name")  # they say which step and which image a row shows


class ArrowRows(NamedTuple):
    """The vectors of one record batch."""

    path: str
    """The file that holds them."""

    offset: int
    """Where the first number lies in the file, in bytes."""

    array: np.ndarray
    """(rows, tokens, d) of floats, mapped from the file."""


def is_arrow(folder: str | Path) -> bool:
    """Return whether a folder holds a saved data set."""
    folder = Path(folder)
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def open_arrow(folder: str | Path) -> tuple[list[ArrowRows], dict[str, list]]:
    """Open a saved data set: return the vectors of each record batch, and the columns ROW_COLUMNS.

    A column has one value per row, and is [] or left out if not all rows have it. The arrays say
    where the numbers lie and of which kind they are; read the numbers with `disk.fill` instead,
    since reading a mapped file that becomes shorter would end Python.

    Raises UsageError for files that are not Arrow's or are compressed, and for rows that are no
    lists of floats of one length.
    """
    folder = Path(folder)
    batches = []
    columns = {name: [] for name in ROW_COLUMNS}
    for entry in read_json(folder / "state.json").get("_data_files") or []:
        path = folder / str(entry.get("filename"))
        stream = read_stream(path)
        for batch in stream.batches:
            column = find_column(batch, folder)
            array = as_numpy(batch.column(column), f"{path}, column {column}")
            batches.append(ArrowRows(str(path), offset_of(array, stream, path), array))
            for name in ROW_COLUMNS:
                if name in batch.schema.names:
                    columns[name] += batch.column(name).to_pylist()
    if not batches:
        raise UsageError(f"{folder} holds no rows")

    shapes = {(*rows.array.shape[1:], str(rows.array.dtype)) for rows in batches}
    if len(shapes) > 1:
        raise UsageError(f"{folder} holds rows of different shapes: {sorted(shapes)}")
    num_rows = sum(len(rows.array) for rows in batches)
    complete = {name: values for name, values in columns.items() if len(values) == num_rows}
    return batches, complete


class Stream(NamedTuple):
    """An Arrow stream, mapped into memory."""

    address: int
    """Where the file's first byte lies in memory."""

    size: int
    """Bytes of the file."""

    batches: list["pyarrow.RecordBatch"]
    """Its record batches that are not empty."""


def read_stream(path: Path) -> Stream:
    """Map an Arrow stream into memory, and return its batches.

    Raises UsageError if the file is missing, damaged or of another kind.
    """
    import pyarrow as pa  # half a second, which only those who have such a folder wait for

    try:
        source = pa.memory_map(str(path))
        address = source.read_buffer(1).address
        source.seek(0)
        batches = list(pa.ipc.open_stream(source))
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} is missing or not a complete Arrow stream ({error})") from None
    return Stream(address, source.size(), [batch for batch in batches if len(batch)])


def find_column(batch: "pyarrow.RecordBatch", folder: Path) -> str:
    """Return which of COLUMNS a record batch has. Raises UsageError if it has none."""
    for name in COLUMNS:
        if name in batch.schema.names:
            return name
    raise UsageError(f"{folder} has columns {batch.schema.names}, expected {' or '.join(COLUMNS)}")


def as_numpy(column: Any, where: str) -> np.ndarray:
    """Return a view (rows, tokens, d) of an Arrow array of lists, or of lists of lists, of floats.

    tokens is 1 for an array of lists. Raises UsageError for other types, for lists of different
    lengths, and for empty entries.
    """
    import pyarrow as pa

    shape = [len(column)]
    while True:
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if column.null_count:
            raise UsageError(f"{where}: holds empty entries")
        is_list = hasattr(column, "flatten") and not pa.types.is_struct(column.type)
        if not is_list:
            break
        shape.append(length_of_lists(column, where))
        column = column.flatten()

    if len(shape) not in (2, 3) or not pa.types.is_floating(column.type):
        raise UsageError(
            f"{where}: {len(shape) - 1} levels of lists of {column.type}, "
            "expected one or two of floats"
        )
    array = column.to_numpy(zero_copy_only=True)
    return array.reshape(shape[0], -1, shape[-1])


def length_of_lists(column: Any, where: str) -> int:
    """Return the length of the lists in an Arrow array. Raises UsageError if it is not one length
    above 0."""
    if hasattr(column.type, "list_size"):
        lengths = [column.type.list_size]
    else:
        lengths = np.unique(np.diff(column.offsets))
    if len(lengths) != 1 or not lengths[0]:
        raise UsageError(f"{where}: lists of {len(lengths)} lengths, expected one")
    return int(lengths[0])


def offset_of(array: np.ndarray, stream: Stream, path: Path) -> int:
    """Return where the first number of an array lies in the mapped file, in bytes.

    Raises UsageError if the array does not lie in the file: then the stream is compressed, and
    pyarrow unpacked it into other memory.
    """
    offset = array.__array_interface__["data"][0] - stream.address
    if offset < 0 or offset + array.nbytes > stream.size:
        raise UsageError(
            f"{path} is compressed, and only rows that are not can be read in place; load it with "
            "datasets.load_from_disk, and save it again with save_to_disk"
        )
    return offset
