"""Folders of Hugging Face `datasets` rows, as the ancestor of this project wrote its activations:
read in place, never copied.

`Dataset.save_to_disk` writes Arrow streams. A column of equal lists of floats lies in them as one
array a record batch, so its place in the file is all that reading needs. Extension types (Array2D)
are taken as what they store; nothing is unpickled.
"""

from pathlib import Path

import numpy as np

from errors import UsageError
from store.disk import read_json

COLUMNS = ("activations", "values")  # what the ancestor's versions call it


def is_arrow(folder):
    """Whether a folder holds a saved data set."""
    return (Path(folder) / "state.json").is_file() and (
        Path(folder) / "dataset_info.json"
    ).is_file()


def open_arrow(folder):
    """Map a saved data set: [(path, first byte, array (rows, tokens, d))], one a record batch, and
    the columns that say what a row is of, {"timestep" or "file_name": one value a row}.

    Reading from the arrays would end Python where the file becomes shorter (see `disk.fill`); they
    say where the numbers lie. Raises UsageError for rows that are no equal lists of floats, or
    files that are none of Arrow's.
    """
    import pyarrow as pa  # half a second, for those who have such a folder

    arrays, others = [], {"timestep": [], "file_name": []}
    for entry in read_json(Path(folder) / "state.json").get("_data_files") or []:
        path = Path(folder) / str(entry.get("filename"))
        try:
            source = pa.memory_map(str(path))
            begin = source.read_buffer(1).address
            source.seek(0)
            batches = list(pa.ipc.open_stream(source))
        except (pa.ArrowException, OSError) as error:
            raise UsageError(
                f"{path} is missing or not a complete Arrow stream ({error})"
            ) from None
        for batch in batches:
            if not len(batch):
                continue
            column = next((name for name in COLUMNS if name in batch.schema.names), None)
            if column is None:
                raise UsageError(
                    f"{folder} has columns {batch.schema.names}, expected {' or '.join(COLUMNS)}"
                )
            array = as_numpy(batch.column(column), f"{path}, column {column}")
            arrays.append((str(path), array.__array_interface__["data"][0] - begin, array))
            for name in others:
                others[name] += batch.column(name).to_pylist() if name in batch.schema.names else []
    if not arrays:
        raise UsageError(f"{folder} holds no rows")
    shapes = {(*array.shape[1:], str(array.dtype)) for *_, array in arrays}
    if len(shapes) > 1:
        raise UsageError(f"{folder} holds rows of different shapes: {sorted(shapes)}")
    rows = sum(len(array) for *_, array in arrays)
    return arrays, {name: values for name, values in others.items() if len(values) == rows}


def as_numpy(column, where):
    """An Arrow array of equal lists, or of equal lists of equal lists, as a view (rows, tokens,
    d)."""
    import pyarrow as pa

    shape = [len(column)]
    while True:
        column = column.storage if isinstance(column, pa.ExtensionArray) else column
        if column.null_count:
            raise UsageError(f"{where}: holds empty entries")
        if not hasattr(column, "flatten") or pa.types.is_struct(column.type):
            break
        inner = column.flatten()
        lengths = (
            [column.type.list_size]
            if hasattr(column.type, "list_size")
            else np.unique(np.diff(column.offsets))
        )
        if len(lengths) != 1 or not lengths[0]:
            raise UsageError(f"{where}: lists of {len(lengths)} lengths, expected one")
        shape.append(int(lengths[0]))
        column = inner
    if len(shape) not in (2, 3) or not pa.types.is_floating(column.type):
        raise UsageError(
            f"{where}: {len(shape) - 1} levels of lists of {column.type}, expected one or two of floats"
        )
    array = column.to_numpy(zero_copy_only=True)
    return array.reshape(shape[0], -1, shape[-1])
