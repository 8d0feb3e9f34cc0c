"""Prompts and pictures in: from a file of any common kind, a hub data set, a model folder, or the command line itself."""

import csv
import json
from pathlib import Path

from errors import UsageError

TABLES = (".txt", ".csv", ".jsonl", ".parquet")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KINDS = "a .txt, .csv, .jsonl or .parquet file, a hub data set (owner/name) or a prompt"
OURS = ("id", "prompt", "negative_prompt", "seed")  # keys of prompts.jsonl that a column of the data set must not fill


def load_prompts(dataset_name, split="train", column=None, negative_prompt=None, max_num_examples=None):
    """Prompts from a .txt (one a line), .csv, .jsonl or .parquet file, a hub data set, or one literal prompt.

    Returns a list of {"prompt", "negative_prompt" where one is given, ...the other plain columns}. `column` holds the
    prompt (default: the first of prompt, caption, text, or the only one of text); `negative_prompt` is the name of a
    column or a text for all. Raises UsageError for a file or column that is not there and for a data set without prompts.
    """
    rows = read_rows(dataset_name, split, max_num_examples)
    prompts = []
    for row in rows:
        if not prompts:
            text = [c for c in row if isinstance(row[c], str)]
            column = column or next((c for c in ("prompt", "caption", "text") if c in text), None)
            column = column or (text[0] if len(text) == 1 else None)
            if column not in row:
                choice = ", ".join(row)
                raise UsageError(f"{dataset_name} has no column {column or 'prompt'!r}; choose with --column from: {choice}")
            negative_column = negative_prompt if negative_prompt in row else None
        if not isinstance(row.get(column), str):
            raise UsageError(f"{dataset_name}, row {len(prompts)}: column {column!r} is no text: {row.get(column)!r}")
        prompt = {"prompt": row[column]}
        if negative_prompt is not None:
            prompt["negative_prompt"] = str(row.get(negative_column) or "") if negative_column else negative_prompt
        used = (column, negative_column, *OURS)
        prompts.append(prompt | {c: v for c, v in row.items() if c not in used and isinstance(v, (str, int, float, bool))})
        if len(prompts) == max_num_examples:
            break
    if not prompts:
        raise UsageError(f"{dataset_name or 'the data set'} has no prompts")
    return prompts


def load_pictures(images, dataset_name=None, split="train", column=None, max_num_examples=None):
    """Pictures of a folder, in the order of their names, or of a data set's column `images`.

    Returns (prompts, sources): a list of {"prompt", "image", ...}, with the captions of the data set's `column` or an empty
    text, and as many paths, bytes or PIL images. Raises UsageError for a folder or column without pictures.
    """
    if Path(images).is_dir():
        found = sorted(p for p in Path(images).rglob("*") if p.suffix.lower() in PICTURES)[:max_num_examples]
        if not found:
            raise UsageError(f"--images {images}: no picture there ({', '.join(PICTURES)})")
        return [{"prompt": "", "image": str(p.relative_to(images))} for p in found], [str(p) for p in found]
    if dataset_name is None:
        raise UsageError(f"--images {images}: no such folder; a column of pictures needs --dataset_name")
    rows = read_rows(dataset_name, split, max_num_examples)
    if hasattr(rows, "cast_column"):  # of a hub data set: as files, which take less memory than pixels
        from datasets import Image

        rows = rows.cast_column(images, Image(decode=False))
    prompts, sources = [], []
    for row in rows:
        if images not in row or column is not None and column not in row:
            missing = images if images not in row else column
            raise UsageError(f"{dataset_name} has no column {missing!r}; there are {', '.join(row)}")
        value, caption = row[images], column or next((c for c in ("prompt", "caption", "text") if c in row), None)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and not Path(value).exists():
            value = str(Path(dataset_name).parent / value)
        if not isinstance(value, (str, bytes)) and not hasattr(value, "convert"):
            raise UsageError(f"{dataset_name}, row {len(prompts)}: column {images!r} is no picture: {value!r}")
        plain = {c: v for c, v in row.items() if c not in (caption, *OURS) and isinstance(v, (str, int, float, bool))}
        prompts.append({"prompt": str(row.get(caption) or ""), **plain})
        sources.append(value)
        if len(prompts) == max_num_examples:
            break
    if not prompts:
        raise UsageError(f"{dataset_name} has no rows")
    return prompts, sources


def default_dataset(model_folder):
    """The prompts that a model folder carries, `prompts.csv` in it; UsageError where there are none."""
    path = Path(model_folder) / "prompts.csv"
    if not path.is_file():
        raise UsageError(f"which prompts? --dataset_name takes {KINDS}")
    return str(path)


def read_rows(dataset_name, split, max_num_examples):
    """Rows, as dicts, of whatever `dataset_name` names."""
    path, words = Path(dataset_name), dataset_name.split()
    if path.suffix in TABLES and path.is_file():
        return read_table(path)
    if path.exists() or (len(words) == 1 and (path.suffix or dataset_name.count("/") > 1 or dataset_name[0] in "./~")):
        raise UsageError(f"no prompt file {path}; expected {KINDS}")
    if len(words) != 1 or dataset_name.count("/") != 1:
        return [{"prompt": dataset_name}] if words else []
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError(f"{dataset_name} looks like a hub data set: pip install datasets to read it") from None
    rows = load_dataset(dataset_name, split=split, streaming=True)
    return rows.take(max_num_examples) if max_num_examples else rows


def read_table(path):
    """Rows of a .txt, .csv, .jsonl or .parquet file as dicts."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # comes with `datasets`

            return pyarrow.parquet.read_table(path).to_pylist()
        with open(path, newline="", encoding="utf-8-sig") as f:
            if path.suffix == ".csv":
                return list(csv.DictReader(f, strict=True))
            lines = [line.strip() for line in f.read().split("\n")]  # splitlines would split at U+2028 too
        if path.suffix == ".txt":
            return [{"prompt": line} for line in lines if line]
        rows = [json.loads(line) for line in lines if line]
        if not all(isinstance(row, dict) for row in rows):
            raise UsageError("expected one object a line")
        return rows
    except ImportError:
        raise UsageError(f"{path}: pip install pyarrow to read parquet files") from None
    except (ValueError, csv.Error, OSError) as error:
        raise UsageError(f"{path} can't be read as {path.suffix[1:]}: {error}") from None
