"""Prompts and pictures in: from a file of any common kind, a hub data set, a model folder, or the
command line itself."""

import csv
import difflib
import io
import json
import os
import re
from pathlib import Path

from errors import UsageError
from store.disk import is_hidden

TABLES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KINDS = (
    "a .txt, .csv, .tsv, .json, .jsonl or .parquet file, a hub data set (owner/name) or a prompt"
)
OURS = (
    "id",
    "prompt",
    "negative_prompt",
    "seed",
    "seen",
)  # keys of prompts.jsonl that a column of the data set must not fill
PROMPT_COLUMNS = (
    "prompt",
    "caption",
    "text",
)  # that hold the prompt where --column names none; the first of these
SEPARATORS = ",;\t|"
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def load_prompts(
    dataset_name, split="train", column=None, negative_prompt=None, max_num_examples=None
):
    """Prompts from a file of one of the kinds TABLES, a hub data set, or one literal prompt.

    Returns a list of {"prompt", "negative_prompt" and "seed" where they are given, ...the other
    plain columns}. `column` holds the prompt (default: the first of prompt, caption, text, or the
    only one of text); `negative_prompt` is the name of a column or a text for all (default: the
    column of this name, if there is one). Raises UsageError for a file or column that is not there,
    for a file that can be read in several ways, and for a data set without prompts.
    """
    named = [name for name in (column, negative_prompt) if name is not None]
    rows = read_rows(dataset_name, split, max_num_examples, named)
    prompts = []
    columns = {}  # in the order in which the rows have them
    for number, row in enumerate(rows, 1):
        row = {column_name(name, named): value for name, value in row.items()}
        columns.update(dict.fromkeys(row))
        if not prompts:
            column = column or find_prompt_column(row)
            if column not in row:
                choice = ", ".join(row)
                raise UsageError(
                    f"{dataset_name} has no column {column or 'prompt'!r}; choose with --column from: {choice}"
                )
            negative_column = "negative_prompt" if negative_prompt is None else negative_prompt
        where = f"{dataset_name}, row {number}"
        if not isinstance(row.get(column), str):
            raise UsageError(f"{where}: column {column!r} is no text: {row.get(column)!r}")
        prompt = {"prompt": row[column], "negative_prompt": None}
        if negative_column in row:
            prompt["negative_prompt"] = text_of(row, negative_column, where)
        used = (column, negative_column, *OURS)
        prompt |= plain_columns(row, used)
        if "seed" in row and column != "seed":
            prompt["seed"] = seed_of(row, where)
        prompts.append(prompt)
        if len(prompts) == max_num_examples:
            break
    add_negative_prompts(prompts, negative_prompt)
    if not prompts:
        raise UsageError(f"{dataset_name or 'the data set'} has no prompts")
    check_seeds(prompts, dataset_name)
    if negative_prompt is not None:
        note_negative_prompt(negative_prompt, [name for name in columns if name != column])
    if negative_prompt is None and not any(prompt.get("negative_prompt") for prompt in prompts):
        for prompt in (
            prompts
        ):  # an empty column asks for nothing, and some pipelines take "" for more than nothing
            prompt.pop("negative_prompt", None)
    return prompts


def with_seeds(rows, seed, images_each=1):
    """The rows, each `images_each` times, with the seed that each image is generated with as the
    last key.

    It is the row's own seed, of the data set, plus the number of the image of this prompt; where
    the data set has none it is `seed` plus the number of the image of all. Raises UsageError where
    both are given.
    """
    if seed and "seed" in rows[0]:
        raise UsageError(
            f"--seed {seed}: the data set has a column seed, which says the seed of each row; use one of the two"
        )
    seeded = []
    for i, row in enumerate(rows):
        own = {name: value for name, value in row.items() if name != "seed"}
        first = row["seed"] if "seed" in row else seed + i * images_each
        seeded += [own | {"seed": first + j} for j in range(images_each)]
    return seeded


def seen_text(row):
    """The prompt of a row of prompts.jsonl as far as the model saw it, "" where there is none.

    collect.py writes it as "seen" where the text encoders cut the prompt; earlier versions did not.
    """
    return str(row.get("seen", row.get("prompt")) or "")


def column_name(name, named):
    """The name of a column: without space around it, and "Negative Prompt" as negative_prompt;
    those in `named` stay."""
    if name in named:
        return name
    stripped = str(name).strip()
    usual = re.sub(r"[\s-]+", "_", stripped.lower())
    return usual if usual in (*PROMPT_COLUMNS, "negative_prompt", "seed") else stripped


def find_prompt_column(row):
    """The column that holds the prompt, by its name, or because no other is text; None where
    neither says it."""
    for name in PROMPT_COLUMNS:
        if isinstance(row.get(name, 0), str | None):
            return name
    text = [name for name in row if isinstance(row[name], str)]
    return text[0] if len(text) == 1 else None


def text_of(row, column, where):
    """What a column of texts says, "" where it says nothing. Raises UsageError for what is no
    text."""
    value = row.get(column)
    if not isinstance(value, str | None):
        raise UsageError(f"{where}: column {column!r} is no text: {value!r}")
    return value or ""


def seed_of(row, where):
    """The row's seed as an int. Raises UsageError for what is none."""
    value = row.get("seed")
    is_number = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    )
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\.0*)?\s*", value):
        is_number, value = True, value.partition(".")[0]
    if not is_number or not -(2**63) <= int(value) < 2**63 - 2**20:
        raise UsageError(
            f"{where}: column 'seed' is no whole number of 64 bits: {row.get('seed')!r}"
        )
    return int(value)


def add_negative_prompts(prompts, negative_prompt):
    """Give every prompt the negative one that is None so far: "" if others have one of their own,
    or else the text for all.

    Where there is neither, no prompt has one.
    """
    some = any(prompt["negative_prompt"] is not None for prompt in prompts)
    for prompt in prompts:
        if prompt["negative_prompt"] is None:
            prompt["negative_prompt"] = "" if some else negative_prompt
        if prompt["negative_prompt"] is None:
            del prompt["negative_prompt"]


def note_negative_prompt(negative_prompt: str, columns: list[str]) -> None:
    """Print whether --negative_prompt was taken as a column or as a text for all prompts.

    A mistyped name of a column would be a text, so a column of a similar name is suggested. columns:
    those of the table without the prompt's; if there are none, nothing can be mistaken, and nothing
    is printed.
    """
    if not columns:
        return
    if negative_prompt in columns:
        print(f"--negative_prompt: each prompt has its own, from the column {negative_prompt!r}")
        return
    spelled = {name.lower(): name for name in columns}
    nearest = difflib.get_close_matches(negative_prompt.lower(), spelled, n=1, cutoff=0.7)
    suggestion = f"; did you mean the column {spelled[nearest[0]]!r}?" if nearest else ""
    print(
        f"--negative_prompt: the text {negative_prompt!r} is used for all prompts, "
        f"because no column has this name{suggestion}"
    )


def check_seeds(prompts, dataset_name):
    """Raise UsageError if some rows have a seed and others have none."""
    without = [number for number, prompt in enumerate(prompts, 1) if "seed" not in prompt]
    if without and len(without) < len(prompts):
        raise UsageError(
            f"{dataset_name}, row {without[0]}: it has no seed, and other rows have one"
        )


def plain_columns(row, used):
    """The columns that are no part of the prompt and go along with it: texts, numbers and truth
    values."""
    return {
        name: value
        for name, value in row.items()
        if name not in used and isinstance(value, (str, int, float, bool))
    }


def load_pictures(images, dataset_name=None, split="train", column=None, max_num_examples=None):
    """Pictures of a folder, in the order of their names, or of a data set's column `images`.

    Returns (prompts, sources): a list of {"prompt", "image", ...}, with the captions of the data
    set's `column` or an empty text, and as many paths, bytes or PIL images. Raises UsageError for a
    folder or column without pictures.
    """
    if os.path.isdir(images):
        if dataset_name is not None:
            raise UsageError(
                f"--images {images} is a folder, whose images have no captions; leave out --dataset_name"
            )
        found = [path for path in Path(images).rglob("*") if path.suffix.lower() in PICTURES]
        found = sorted(
            path for path in found if not any(map(is_hidden, path.relative_to(images).parts))
        )[:max_num_examples]
        if not found:
            raise UsageError(f"--images {images}: no picture there ({', '.join(PICTURES)})")
        return [{"prompt": "", "image": str(p.relative_to(images))} for p in found], [
            str(p) for p in found
        ]
    if dataset_name is None:
        raise UsageError(
            f"--images {images}: no such folder; a column of pictures needs --dataset_name"
        )
    named = [name for name in (images, column) if name is not None]
    rows = read_rows(dataset_name, split, max_num_examples, named)
    if hasattr(
        rows, "cast_column"
    ):  # of a hub data set: as files, which take less memory than pixels
        from datasets import Image

        rows = rows.cast_column(images, Image(decode=False))
    prompts, sources = [], []
    for number, row in enumerate(rows, 1):
        row, where = (
            {column_name(name, named): value for name, value in row.items()},
            f"{dataset_name}, row {number}",
        )
        if images not in row or column is not None and column not in row:
            missing = images if images not in row else column
            raise UsageError(
                f"{dataset_name} has no column {missing!r}; there are {', '.join(row)}"
            )
        value, caption = row[images], column or next((c for c in PROMPT_COLUMNS if c in row), None)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            beside = os.path.join(
                os.path.dirname(dataset_name), value
            )  # where a table means, whatever the current folder has
            value = beside if os.path.exists(beside) or not os.path.exists(value) else value
        if not isinstance(value, (str, bytes)) and not hasattr(value, "convert"):
            raise UsageError(f"{where}: column {images!r} is no picture: {value!r}")
        prompt = {"prompt": text_of(row, caption, where), **plain_columns(row, (caption, *OURS))}
        if "seed" in row:
            prompt["seed"] = seed_of(row, where)
        prompts.append(prompt)
        sources.append(value)
        if len(prompts) == max_num_examples:
            break
    if not prompts:
        raise UsageError(f"{dataset_name} has no rows")
    if "negative_prompt" in row:
        print("note: --images does not use the column negative_prompt: nothing is generated")
    check_seeds(prompts, dataset_name)
    return prompts, sources


def default_dataset(model_folder):
    """The prompts that a model folder carries, `prompts.csv` in it; UsageError where there are
    none."""
    path = Path(model_folder) / "prompts.csv"
    if not path.is_file():
        raise UsageError(f"which prompts? --dataset_name takes {KINDS}")
    return str(path)


def read_rows(dataset_name, split, max_num_examples, named=()):
    """Rows, as dicts, of whatever `dataset_name` names. named: columns that the user asks for."""
    path, words = Path(dataset_name), dataset_name.split()
    if path.suffix.lower() in TABLES and os.path.isfile(path):
        return read_table(path, named)
    looks_like_a_file = path.suffix.lower() in TABLES or dataset_name.startswith(
        ("/", "./", "../", "~/")
    )
    if len(words) == 1:
        looks_like_a_file |= (
            bool(path.suffix) or dataset_name.count("/") > 1 or dataset_name[0] in "./~"
        )
    if looks_like_a_file or os.path.exists(
        path
    ):  # a Path's `exists` raises OSError for a prompt too long for a file name
        raise UsageError(f"no prompt file {path}; expected {KINDS}")
    if len(words) != 1 or dataset_name.count("/") != 1:
        return [{"prompt": dataset_name}] if words else []
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError(
            f"{dataset_name} looks like a hub data set: pip install datasets to read it"
        ) from None
    rows = load_dataset(dataset_name, split=split, streaming=True)
    return rows.take(max_num_examples) if max_num_examples else rows


def read_table(path, named=()):
    """Rows of a file of one of the kinds TABLES as dicts. Raises UsageError for what is none, or
    can be read in several ways."""
    kind = path.suffix[1:].lower()
    try:
        if kind == "parquet":
            import pyarrow.parquet  # comes with `datasets`

            return pyarrow.parquet.read_table(path).to_pylist()
        text = decode(path.read_bytes())
        if kind in ("csv", "tsv"):
            return read_csv(text, SEPARATORS if kind == "csv" else "\t", named)
        if kind == "json":
            return read_json_array(text)
        lines = [
            line.strip() for line in re.split("\r\n|\r|\n", text)
        ]  # splitlines would split at U+2028 too
        lines = [line for line in lines if line]
        if kind == "txt":
            check_no_header(lines)
            return [{"prompt": line} for line in lines]
        rows = [json.loads(line) for line in lines]
        if not all(isinstance(row, dict) for row in rows):
            raise UsageError("expected one object a line")
        return rows
    except ImportError:
        raise UsageError(f"{path}: pip install pyarrow to read parquet files") from None
    except (ValueError, csv.Error, OSError) as error:
        raise UsageError(f"{path} can't be read as {kind}: {error}") from None


def decode(data):
    """The text of a file: UTF-8, or what its byte-order mark says. Raises UsageError for another
    encoding, never guesses one."""
    encoding = next(
        (name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8-sig"
    )
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"byte {error.start} is no {encoding.removesuffix('-sig').upper()}; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise UsageError(
            "it holds zero bytes, so it is no text or UTF-16 without a byte-order mark; save it as UTF-8"
        )
    return text


def read_csv(text, separators, named):
    """Rows of comma-separated text as dicts, by the names in its first line, which also says the
    separator.

    Raises UsageError where the first line names no column that is known or in `named`, or does so
    with two separators, and for a row with more or fewer fields than the first line. A row without
    any text, as spreadsheets leave them, is left out.
    """
    headers = {
        separator: header for separator in separators if (header := read_header(text, separator))
    }
    if not headers:
        return []
    known = {*PROMPT_COLUMNS, *named}
    fitting = {
        sep: header
        for sep, header in headers.items()
        if known & {column_name(name, named) for name in header}
    }
    several = {separator: header for separator, header in fitting.items() if len(header) > 1}
    if len(several) > 1:
        raise UsageError(
            f"its first line can be read with several separators: {text.split(chr(10))[0]!r}"
        )
    if not fitting:
        names = max(headers.values(), key=len)
        raise UsageError(
            f"no column prompt, caption or text in its first line; choose with --column from: {', '.join(names)}; "
            "or, if this is a prompt and no header, put a line with the word prompt above it"
        )
    separator, header = next(iter((several or fitting).items()))
    names = [column_name(name, named) for name in header]
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise UsageError(f"its first line names column {twice[0]!r} twice")

    reader = csv_reader(text, separator)
    rows = []
    try:
        for fields in reader:
            has_text = len(fields) == 1 or any(field.strip() for field in fields)
            if fields and has_text:
                check_fields(fields, names, reader.line_num)
                rows.append(dict(zip(names, fields)))
    except csv.Error as error:
        raise UsageError(f"line {reader.line_num}: {error}") from None
    return rows[1:]


def check_fields(fields, names, line):
    """Raise UsageError for a record that has more or fewer fields than the first line has names."""
    if len(fields) != len(names):
        start = fields[0] if len(fields[0]) < 40 else f"{fields[0][:40]}..."
        raise UsageError(
            f"line {line}, {start!r}, has {len(fields)} fields where the first line has {len(names)}; "
            "put a text that contains the separator in double quotes"
        )


def csv_reader(text, separator):
    """Reads the records of comma-separated text; where the header has a space after each separator,
    so may the others."""
    header = next(
        filter(str.strip, io.StringIO(text, newline="")), ""
    )  # the first line that is not blank
    is_spaced = separator in header and all(
        rest.startswith(" ") for rest in header.split(separator)[1:]
    )
    return csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=is_spaced, strict=True
    )


def read_header(text, separator):
    """The fields of the first record that has any; None where the text can't be read with this
    separator."""
    try:
        return next(filter(None, csv_reader(text, separator)), None)
    except csv.Error:
        return None


def read_json_array(text):
    """Rows of a JSON array of objects, or of texts that are prompts."""
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{error}; a file with one object a line is named .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, (dict, str)) for row in rows):
        raise UsageError("expected an array of objects or of texts")
    return [{"prompt": row} if isinstance(row, str) else row for row in rows]


def check_no_header(lines):
    """Raise UsageError if lines that are to be prompts begin with the names of a table's
    columns."""
    for separator in SEPARATORS:
        names = lines[0].lower().split(separator) if lines else []
        if {"prompt", "caption", "negative_prompt"} & set(names) and all(
            re.fullmatch(r"\w+", name) for name in names
        ):
            raise UsageError(
                f"its first line, {lines[0]!r}, names columns; name a table .csv, or remove that line"
            )
