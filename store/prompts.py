"""Prompts and pictures from a file, a hub data set, a model folder or the command line itself.

    load_prompts("prompts.csv")    # [{"prompt": "a red fox", "style": "oil"}, ...]
    load_prompts("owner/name")     # a data set on the hub
    load_prompts("a red fox")      # [{"prompt": "a red fox"}]
    load_pictures("photos")        # the pictures of a folder, instead of prompts

A prompt is a dict with "prompt"; with "negative_prompt" and "seed" if the data set has them; and
with the data set's other columns of texts, numbers and truth values. collect.py writes these dicts
into prompts.jsonl, one per line.

Nothing is guessed: a file that can be read in two ways, or in an encoding that it does not name, is
refused with a line that says how to mend it.
"""

import csv
import difflib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from errors import UsageError
from store.disk import is_hidden

Row = dict[str, Any]
"""{column: value}."""

TABLES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KINDS = (
    "a .txt, .csv, .tsv, .json, .jsonl or .parquet file, a hub data set (owner/name) or a prompt"
)

# The prompt stands in the first of these that the data set has, unless --column names another
PROMPT_COLUMNS = ("prompt", "caption", "text")
# These columns decide what is generated; they are found however they are spelled
USED_COLUMNS = (*PROMPT_COLUMNS, "negative_prompt", "seed")
# collect.py adds these keys to prompts.jsonl; a column of such a name is kept as dataset_<name>
ADDED_KEYS = ("id", "seen", "tokens", "image_digest", "inputs")
# Keys of a prompt that are never copied from a column of the same name as they are
OWN_KEYS = (*ADDED_KEYS, "prompt", "negative_prompt", "seed")

SEPARATORS = ",;\t|"
BYTE_ORDER_MARKS = {
    # UTF-32 comes first, because its mark begins with that of UTF-16
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


# ---- prompts


def load_prompts(
    dataset_name: str,
    split: str = "train",
    column: str | None = None,
    negative_prompt: str | None = None,
    max_num_examples: int | None = None,
    pictures: dict[str, str] | None = None,
    paths: dict[str, str] | None = None,
) -> list[Row]:
    """Return the prompts of a file, of a hub data set, or one literal prompt.

    For a table with the columns Prompt, style and seed it gives [{"prompt": "a red fox",
    "style": "oil", "seed": 7}, ...].

    column: holds the prompt. If None, it is the first of prompt, caption and text, or the only
    column of texts. negative_prompt: the name of a column, or a text for all prompts. If None, the
    column negative_prompt is used where there is one. pictures: {key: column}; of each row these
    columns' pictures become "inputs": {key: picture}, see `picture_of`. paths: {key: path} of
    pictures that are no column; a path that is called like one is refused.

    Raises UsageError for a file or a column that is missing, for a file that can be read in several
    ways, for a cell that can't be used, and for a data set without prompts.
    """
    pictures = pictures or {}
    named = [name for name in (column, negative_prompt, *pictures.values()) if name is not None]
    negative_column = "negative_prompt" if negative_prompt is None else negative_prompt

    prompts = []
    columns: dict[str, None] = {}  # of all rows, in order
    rows = read_rows(dataset_name, split, max_num_examples, named)
    rows = undecoded(rows, list(pictures.values()))
    for number, row in enumerate(rows, 1):
        where = f"{dataset_name}, row {number}"
        check_no_column(row, paths or {}, dataset_name)
        row = rename_columns(row, named, where)
        columns.update(dict.fromkeys(row))
        if not prompts:
            column = column or find_prompt_column(row)
            check_has_column(row, column, dataset_name)
        prompt = make_prompt(row, column, negative_column, where)
        for key, picture_column in pictures.items():
            check_has_picture(row, picture_column, key, dataset_name)
            picture = picture_of(row, picture_column, dataset_name, where)
            prompt.setdefault("inputs", {})[key] = picture
        prompts.append(prompt)
        if len(prompts) == max_num_examples:
            break
    if not prompts:
        raise UsageError(f"{dataset_name or 'the data set'} has no prompts")

    add_negative_prompts(prompts, negative_prompt)
    if negative_prompt is None:
        drop_empty_negative_prompts(prompts)
    else:
        note_negative_prompt(negative_prompt, [name for name in columns if name != column])
    check_seeds(prompts, dataset_name)
    return prompts


def default_dataset(model: str | Path) -> str:
    """Return the path of the prompts that a model carries: `prompts.csv` in its folder, or beside
    its file.

    Raises UsageError if there are none.
    """
    folder = Path(model).parent if Path(model).is_file() else Path(model)
    path = folder / "prompts.csv"
    if not path.is_file():
        raise UsageError(f"which prompts? --dataset_name takes {KINDS}")
    return str(path)


def with_seeds(rows: list[Row], seed: int, images_each: int = 1) -> list[Row]:
    """Return each row `images_each` times, with the seed of its image as the last key.

    Image j of row i gets the row's own seed + j. Rows without a seed get seed + i * images_each
    + j: for two rows, seed 5 and two images each, that is 5, 6, 7, 8.

    Raises UsageError if the rows have seeds and `seed` is not 0: it is not known which counts.
    """
    if seed and "seed" in rows[0]:
        raise UsageError(
            f"--seed {seed}: the data set has a column seed, which says the seed of each row; "
            "use one of the two"
        )
    seeded = []
    for i, row in enumerate(rows):
        first_seed = row["seed"] if "seed" in row else seed + i * images_each
        others = {name: value for name, value in row.items() if name != "seed"}
        for j in range(images_each):
            seeded.append({**others, "seed": first_seed + j})
    return seeded


def seen_text(row: Row) -> str:
    """Return the prompt of a row of prompts.jsonl as far as the model saw it; "" if it has none.

    Where the text encoders cut the prompt, collect.py writes what is left as "seen"; earlier
    versions did not.
    """
    return str(row.get("seen", row.get("prompt")) or "")


# ---- pictures


def load_pictures(
    images: str,
    dataset_name: str | None = None,
    split: str = "train",
    column: str | None = None,
    max_num_examples: int | None = None,
) -> tuple[list[Row], list[Any]]:
    """Return the pictures of the folder `images`, or of a data set's column `images`.

    Returns (prompts, sources), one of each per picture. A prompt is the caption of the data set's
    `column` with the other columns; for a folder it is {"prompt": "", "image": path in the folder},
    in the order of the names. A source is a path, the bytes of a file or a PIL image.

    Raises UsageError for a folder or a column without pictures.
    """
    if os.path.isdir(images):
        if dataset_name is not None:
            raise UsageError(
                f"--images {images} is a folder, whose images have no captions; "
                "leave out --dataset_name"
            )
        return pictures_of_folder(Path(images), max_num_examples)
    if dataset_name is None:
        raise UsageError(
            f"--images {images}: no such folder; a column of pictures needs --dataset_name"
        )
    return pictures_of_column(images, dataset_name, split, column, max_num_examples)


def pictures_of_folder(
    folder: Path, max_num_examples: int | None, option: str | None = None
) -> tuple[list[Row], list[str]]:
    """Return the pictures in a folder and below it, as `load_pictures` does; hidden ones are left
    out. option: what the error says if there are none; it is --images if not given."""
    paths = []
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        is_shown = not any(is_hidden(name) for name in inside.parts)
        if path.suffix.lower() in PICTURES and is_shown:
            paths.append(path)
    if not paths:
        option = option or f"--images {folder}"
        raise UsageError(f"{option}: no picture there ({', '.join(PICTURES)})")

    paths = sorted(paths)[:max_num_examples]
    prompts = [{"prompt": "", "image": str(path.relative_to(folder))} for path in paths]
    return prompts, [str(path) for path in paths]


def pictures_of_column(
    images: str,
    dataset_name: str,
    split: str,
    column: str | None,
    max_num_examples: int | None,
) -> tuple[list[Row], list[Any]]:
    """Return the pictures of a data set's column `images`, as `load_pictures` does."""
    named = [name for name in (images, column) if name is not None]
    rows = read_rows(dataset_name, split, max_num_examples, named)
    rows = undecoded(rows, [images])
    prompts = []
    sources = []
    for number, row in enumerate(rows, 1):
        where = f"{dataset_name}, row {number}"
        row = rename_columns(row, named, where)
        for name in named:
            if name not in row:
                raise UsageError(
                    f"{dataset_name} has no column {name!r}; there are {', '.join(row)}"
                )
        source = picture_of(row, images, dataset_name, where)
        caption_column = column or first_caption_column(row)
        prompt = {"prompt": text_of(row, caption_column, where)}
        prompt |= plain_columns(row, (caption_column, *OWN_KEYS))
        if "seed" in row:
            prompt["seed"] = seed_of(row, where)
        prompts.append(prompt)
        sources.append(source)
        if len(prompts) == max_num_examples:
            break
    if not prompts:
        raise UsageError(f"{dataset_name} has no rows")
    if "negative_prompt" in row:
        print("note: --images does not use the column negative_prompt: nothing is generated")
    check_seeds(prompts, dataset_name)
    return prompts, sources


def undecoded(rows: Iterable[Row], columns: list[str]) -> Iterable[Row]:
    """Return rows of a hub data set whose pictures in these columns are not decoded, since files
    take less memory than pixels; other rows as they are."""
    if not hasattr(rows, "cast_column"):
        return rows
    from datasets import Image

    for column in columns:
        rows = rows.cast_column(column, Image(decode=False))
    return rows


def check_has_picture(row: Row, column: str, key: str, dataset_name: str) -> None:
    """Raise UsageError if a row lacks the column of an image that the pipeline takes as `key`."""
    if column not in row:
        raise UsageError(
            f"--inputs {key}={column}: there is no such file or folder, and {dataset_name} has no "
            f"such column; there are {', '.join(row)}"
        )


def check_no_column(row: Row, paths: dict[str, str], dataset_name: str) -> None:
    """Raise UsageError if a path of --inputs, in {argument: path}, is also a column of the row."""
    for key, path in paths.items():
        if path in map(str.strip, row):
            raise UsageError(
                f"--inputs {key}={path}: {path} is a column of {dataset_name} and a file or folder "
                f"here; ./{path} names the latter, and for the column run it in another folder"
            )


def first_caption_column(row: Row) -> str | None:
    """Return the first of prompt, caption and text that a row has, or None."""
    for name in PROMPT_COLUMNS:
        if name in row:
            return name
    return None


def picture_of(row: Row, images: str, dataset_name: str, where: str) -> Any:
    """Return the picture in the column `images` of a row: a path, bytes or a PIL image.

    A relative path is looked for beside the table first, and then in the current folder.
    """
    value = row[images]
    if isinstance(value, dict):  # how `datasets` gives a picture that is not decoded
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        beside_table = os.path.join(os.path.dirname(dataset_name), value)
        if os.path.exists(beside_table) or not os.path.exists(value):
            value = beside_table
    is_pil_image = hasattr(value, "convert")
    if not isinstance(value, (str, bytes)) and not is_pil_image:
        raise UsageError(f"{where}: column {images!r} is no picture: {value!r}")
    return value


# ---- one row of a data set


def rename_columns(row: Row, named: list[str], where: str) -> Row:
    """Return a row whose columns have the names that `column_name` gives them.

    Raises UsageError if two columns get the same name, since one of them would be lost.
    """
    renamed = {}
    originals = {}
    for original, value in row.items():
        name = column_name(original, named)
        if name in renamed:
            raise UsageError(
                f"{where}: columns {originals[name]!r} and {original!r} both count as {name!r}; "
                "rename or remove one of them"
            )
        renamed[name] = value
        originals[name] = original
    return renamed


def column_name(name: str, named: list[str]) -> str:
    """Return the name under which a column is kept.

    White space around a name is removed. A column that decides what is generated is found however
    it is spelled: "Negative Prompt" gives "negative_prompt". A column that is called like a key
    which collect.py adds is kept under another name: "id" gives "dataset_id". A name that the user
    gave, in `named`, stays as it is.
    """
    if name in named:
        return name
    stripped = str(name).strip()
    if stripped in ADDED_KEYS:
        return f"dataset_{stripped}"
    usual = re.sub(r"[\s-]+", "_", stripped.lower())
    return usual if usual in USED_COLUMNS else stripped


def find_prompt_column(row: Row) -> str | None:
    """Return the column that holds the prompt: by its name, or because no other one is text.

    Of prompt, caption and text, the first one counts that is a text or empty; a column prompt of
    numbers counts if there is nothing else; None if the row does not say it. {"style": "oil",
    "caption": "a fox"} gives "caption".
    """
    for name in PROMPT_COLUMNS:
        if name in row and isinstance(row[name], str | None):
            return name
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if len(texts) == 1:
        return texts[0]
    return "prompt" if isinstance(row.get("prompt"), (int, float)) else None


def check_has_column(row: Row, column: str | None, dataset_name: str) -> None:
    """Raise UsageError if a row lacks the column of the prompts; None is one that was not found."""
    if column not in row:
        raise UsageError(
            f"{dataset_name} has no column {column or 'prompt'!r}; "
            f"choose with --column from: {', '.join(row)}"
        )


def make_prompt(row: Row, column: str, negative_column: str, where: str) -> Row:
    """Return the prompt of a row; its "negative_prompt" is None if the row has no such column.

    A number becomes its text, and its column also stays as it is: the column "angle" with 0.5 gives
    {"prompt": "0.5", "angle": 0.5, ...}.
    """
    text = row.get(column)
    used = [column, negative_column, *OWN_KEYS]
    if is_number(text):
        text = str(text)
        used.remove(column)
    if not isinstance(text, str):
        raise UsageError(f"{where}: column {column!r} is no text and no number: {text!r}")
    prompt = {"prompt": text, "negative_prompt": None}
    if negative_column in row:
        prompt["negative_prompt"] = text_of(row, negative_column, where)
    prompt |= plain_columns(row, used)
    if "seed" in row and column != "seed":
        prompt["seed"] = seed_of(row, where)
    return prompt


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and no truth value."""
    is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_numeric and math.isfinite(value)


def text_of(row: Row, column: str | None, where: str) -> str:
    """Return the text of a column, "" if the column is missing or empty.

    Raises UsageError for a value that is no text.
    """
    value = row.get(column)
    if not isinstance(value, str | None):
        raise UsageError(f"{where}: column {column!r} is no text: {value!r}")
    return value or ""


def seed_of(row: Row, where: str) -> int:
    """Return the row's seed: 7, 7.0, "7" and "7.0" give 7.

    Raises UsageError for anything but a whole number of 64 bits; 2**20 numbers are left for the
    seeds of further images.
    """
    value = row.get("seed")
    is_text = isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\.0*)?\s*", value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    seed = None
    if is_text:
        seed = int(value.partition(".")[0])
    elif is_number and value == value // 1:  # false for NaN and infinity
        seed = int(value)
    if seed is None or not -(2**63) <= seed < 2**63 - 2**20:
        raise UsageError(f"{where}: column 'seed' is no whole number of 64 bits: {value!r}")
    return seed


def plain_columns(row: Row, left_out: Iterable[str | None]) -> Row:
    """Return the other columns of a row, which go along with its prompt: texts, numbers and truth
    values."""
    plain = {}
    for name, value in row.items():
        if name not in left_out and isinstance(value, (str, int, float, bool)):
            plain[name] = value
    return plain


# ---- all rows of a data set


def add_negative_prompts(prompts: list[Row], negative_prompt: str | None) -> None:
    """Replace each negative prompt that is None: by "" if other prompts have one, else by the text
    for all.

    If there is neither, the key is removed from all prompts.
    """
    some_have_one = any(prompt["negative_prompt"] is not None for prompt in prompts)
    for prompt in prompts:
        if prompt["negative_prompt"] is None:
            prompt["negative_prompt"] = "" if some_have_one else negative_prompt
        if prompt["negative_prompt"] is None:
            del prompt["negative_prompt"]


def drop_empty_negative_prompts(prompts: list[Row]) -> None:
    """Remove the key "negative_prompt" from all rows, in place, if all negative prompts are empty.

    An empty column asks for nothing, and some pipelines take "" for more than nothing.
    """
    if not any(prompt.get("negative_prompt") for prompt in prompts):
        for prompt in prompts:
            prompt.pop("negative_prompt", None)


def note_negative_prompt(negative_prompt: str, columns: list[str]) -> None:
    """Print whether --negative_prompt was taken as a column or as a text for all prompts.

    A mistyped name of a column would be a text, so a column of a similar name is suggested.
    columns: those of the table without the prompt's; if there are none, nothing can be mistaken,
    and nothing is printed.
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


def check_seeds(prompts: list[Row], dataset_name: str) -> None:
    """Raise UsageError if some rows have a seed and others have none."""
    without = [number for number, prompt in enumerate(prompts, 1) if "seed" not in prompt]
    if without and len(without) < len(prompts):
        raise UsageError(
            f"{dataset_name}, row {without[0]}: it has no seed, and other rows have one"
        )


# ---- reading


def read_rows(
    dataset_name: str, split: str, max_num_examples: int | None, named: list[str]
) -> Iterable[Row]:
    """Return the rows of whatever `dataset_name` names: a file, a hub data set, or one prompt.

    named: the columns that the user asks for. Raises UsageError for what looks like a file and is
    none, instead of taking its name for a prompt.
    """
    path = Path(dataset_name)
    if path.suffix.lower() in TABLES and os.path.isfile(path):
        return read_table(path, named)
    # os.path.exists, because Path.exists raises OSError for a prompt too long for a file name
    if looks_like_a_file(dataset_name) or os.path.exists(path):
        raise UsageError(f"no prompt file {path}; expected {KINDS}")

    words = dataset_name.split()
    if not words:
        return []
    looks_like_a_hub_id = len(words) == 1 and dataset_name.count("/") == 1
    if not looks_like_a_hub_id:
        return [{"prompt": dataset_name}]

    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError(
            f"{dataset_name} looks like a hub data set: pip install datasets to read it"
        ) from None
    rows = load_dataset(dataset_name, split=split, streaming=True)
    return rows.take(max_num_examples) if max_num_examples else rows


def looks_like_a_file(dataset_name: str) -> bool:
    """Return whether a name must be meant as a file, whether or not there is one.

    True for "my prompts.csv", "./my prompts", "data.xlsx" and "a/b/c"; False for "owner/name", and
    for the prompt "a fox, 3.5 metres tall".
    """
    suffix = Path(dataset_name).suffix
    if suffix.lower() in TABLES or dataset_name.startswith(("/", "./", "../", "~/")):
        return True
    is_one_word = len(dataset_name.split()) == 1
    is_path = bool(suffix) or dataset_name.count("/") > 1 or dataset_name.startswith((".", "~"))
    return is_one_word and is_path


def read_table(path: Path, named: list[str]) -> list[Row]:
    """Return the rows of a file of one of the kinds TABLES; its suffix says which.

    Raises UsageError if it is not of this kind, or can be read in several ways.
    """
    kind = path.suffix[1:].lower()
    try:
        if kind == "parquet":
            return read_parquet(path)
        text = decode(path.read_bytes())
        if kind == "csv":
            return read_csv(text, SEPARATORS, named)
        if kind == "tsv":
            return read_csv(text, "\t", named)
        if kind == "json":
            return read_json_array(text)
        if kind == "jsonl":
            return read_json_lines(text)
        return read_text_lines(text)
    except ImportError:
        raise UsageError(f"{path}: pip install pyarrow to read parquet files") from None
    except (ValueError, csv.Error, OSError) as error:
        raise UsageError(f"{path} can't be read as {kind}: {error}") from None


def read_parquet(path: Path) -> list[Row]:
    """Return the rows of a parquet file. pyarrow raises ValueError if two columns have one name."""
    import pyarrow.parquet  # comes with `datasets`

    return pyarrow.parquet.read_table(path).to_pylist()


def decode(data: bytes) -> str:
    """Return the text of a file: UTF-8, or the encoding that its byte-order mark names.

    Raises UsageError for another encoding; none is guessed.
    """
    encoding = "utf-8-sig"
    for mark, name in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            encoding = name
            break
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        expected = encoding.removesuffix("-sig").upper()
        raise UsageError(f"byte {error.start} is no {expected}; save it as UTF-8") from None
    if "\0" in text:
        raise UsageError(
            "it holds zero bytes, so it is no text or UTF-16 without a byte-order mark; "
            "save it as UTF-8"
        )
    return text


def lines_of(text: str) -> list[str]:
    """Return the lines of a text that are not blank, without space around them."""
    lines = re.split("\r\n|\r|\n", text)  # str.splitlines would split at U+2028 too
    stripped = [line.strip() for line in lines]
    return [line for line in stripped if line]


def read_text_lines(text: str) -> list[Row]:
    """Return one row per line, which is its prompt.

    Raises UsageError if the first line names the columns of a table: it would become a prompt.
    """
    lines = lines_of(text)
    for separator in SEPARATORS:
        names = lines[0].lower().split(separator) if lines else []
        are_words = all(re.fullmatch(r"\w+", name) for name in names)
        if are_words and {"prompt", "caption", "negative_prompt"} & set(names):
            raise UsageError(
                f"its first line, {lines[0]!r}, names columns; "
                "name a table .csv, or remove that line"
            )
    return [{"prompt": line} for line in lines]


def read_json_lines(text: str) -> list[Row]:
    """Return the rows of a text with one JSON object per line. Raises UsageError for a line that is
    no object, or has a key twice."""
    rows = [parse_json(line) for line in lines_of(text)]
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError("expected one object per line")
    return rows


def read_json_array(text: str) -> list[Row]:
    """Return the rows of a JSON array of objects or texts: a text "a cat" becomes
    {"prompt": "a cat"}.

    Raises UsageError for anything else, and for an object that has a key twice.
    """
    try:
        rows = parse_json(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{error}; a file with one object per line is named .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, (dict, str)) for row in rows):
        raise UsageError("expected an array of objects or of texts")
    return [{"prompt": row} if isinstance(row, str) else row for row in rows]


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises UsageError if an object has a key twice; json.loads
    would take the last one. Raises JSONDecodeError if the text is no JSON."""
    return json.loads(text, object_pairs_hook=as_object)


def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of a JSON object's keys and values. Raises UsageError for a key twice."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise UsageError(f"an object has the key {key!r} twice; rename or remove one of them")
        values[key] = value
    return values


# ---- comma-separated text


def read_csv(text: str, separators: str, named: list[str]) -> list[Row]:
    """Return the rows of comma-separated text; its first line names the columns.

    The separator is the one with which the first line has a known column, or one in `named`. A row
    without any text, as spreadsheets leave them, is left out. For "style;Prompt\\noil;a fox" it
    gives [{"style": "oil", "prompt": "a fox"}].

    Raises UsageError if no separator or several ones give such a column, if two columns have one
    name, and for a row with more or fewer fields than the first line.
    """
    headers = {}
    for separator in separators:
        header = read_header(text, separator)
        if header:
            headers[separator] = header
    if not headers:
        return []
    separator = choose_separator(headers, named, text)
    names = [column_name(name, named) for name in headers[separator]]
    for name in names:
        if name and names.count(name) > 1:
            raise UsageError(f"its first line names column {name!r} twice")

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
    return rows[1:]  # without the header


def choose_separator(headers: dict[str, list[str]], named: list[str], text: str) -> str:
    """Return the separator whose header names a column of prompts.

    headers: {separator: the fields of the first line with it}. A separator that does not occur in
    the first line leaves it whole; it counts if no other fits, as for a table of one column.
    """
    known = {*PROMPT_COLUMNS, *named}
    fitting = []
    for separator, header in headers.items():
        names = {column_name(name, named) for name in header}
        if known & names:
            fitting.append(separator)

    if not fitting:
        longest = max(headers.values(), key=len)
        raise UsageError(
            "no column prompt, caption or text in its first line; "
            f"choose with --column from: {', '.join(longest)}; "
            "or, if this is a prompt and no header, put a line with the word prompt above it"
        )
    occurring = [separator for separator in fitting if len(headers[separator]) > 1]
    if len(occurring) > 1:
        first_line = text.split("\n")[0]
        raise UsageError(f"its first line can be read with several separators: {first_line!r}")
    return occurring[0] if occurring else fitting[0]


def read_header(text: str, separator: str) -> list[str] | None:
    """Return the fields of the first record that has any; None if the text can't be read with this
    separator."""
    try:
        for fields in csv_reader(text, separator):
            if fields:
                return fields
    except csv.Error:
        pass
    return None


def csv_reader(text: str, separator: str) -> Iterator[list[str]]:
    """Return the reader of the records of comma-separated text.

    If the header has a space after each separator, spaces after separators are skipped.
    """
    header = ""
    for line in io.StringIO(text, newline=""):
        if line.strip():
            header = line
            break
    _, *others = header.split(separator)
    is_spaced = bool(others) and all(field.startswith(" ") for field in others)
    return csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=is_spaced, strict=True
    )


def check_fields(fields: list[str], names: list[str], line: int) -> None:
    """Raise UsageError for a record that has more or fewer fields than the first line has names."""
    if len(fields) == len(names):
        return
    start = fields[0] if len(fields[0]) < 40 else f"{fields[0][:40]}..."
    raise UsageError(
        f"line {line}, {start!r}, has {len(fields)} fields where the first line has {len(names)}; "
        "put a text that contains the separator in double quotes"
    )
