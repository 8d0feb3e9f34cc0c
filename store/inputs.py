"""Images that a pipeline takes besides its prompts: where they come from, and the copies beside
what was made with them.

    rows = load_rows(["image=photos", "mask_image=mask.png"], "prompts.csv")
    images, rows = InputImages.of_rows(rows)
    rows[0]["inputs"]                       # {"image": "3f0c....png", "mask_image": "91ab....png"}
    images.save(folder, rows)               # folder/inputs/3f0c....png, once for each image
    read_inputs([folder], rows)             # [{"image": a PIL image, ...}, ...], one for each row

An image is known by a digest of its pixels, which is the name of its copy. So a later stage
generates with the same images, and refuses a copy that was changed.
"""

import hashlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from errors import UsageError
from store.disk import make_folder, write_atomically
from store.prompts import Row, load_prompts, pictures_of_folder

FOLDER = "inputs"  # beside prompts.jsonl
OPTION = "--inputs"
BITS_PER_SAMPLE = 258  # the tag of TIFF files that says how many bits a number has

Source = str | bytes | Image.Image
"""An image: a path, the bytes of a file, or a PIL image."""


# ------------------------------------------------------------------------------ the option


def parse_inputs(texts: list[str]) -> dict[str, str]:
    """Return {argument of the pipeline: value} of --inputs: ["image=a.png"] -> {"image": "a.png"}.

    Raises UsageError for a text without a name, or with a name that was given before.
    """
    values = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name.isidentifier() or not value:
            raise UsageError(
                f"{OPTION} {text}: expected name=value, such as image=photo.png, image=FOLDER, or "
                "image=COLUMN of the data set"
            )
        if name in values:
            raise UsageError(f"{OPTION} {text}: {name} is given twice")
        values[name] = value
    return values


def names_folder(inputs: list[str]) -> bool:
    """Return whether a value of --inputs is a folder, whose images can be the rows."""
    return any(os.path.isdir(value) for value in parse_inputs(inputs).values())


def load_rows(
    inputs: list[str],
    dataset_name: str | None,
    split: str = "train",
    column: str | None = None,
    negative_prompt: str | None = None,
    max_num_examples: int | None = None,
) -> list[Row]:
    """Return prompts as `load_prompts` does, each with its images as "inputs": {argument: source}.

    inputs: as in --inputs. A value is an image file, which all prompts get; a folder, whose images
    are given to the prompts in the order of their names; or a column of the data set, with one
    image per row. Without inputs, the rows have no key "inputs".

    dataset_name: as for `load_prompts`. If it is None, all prompts are "": there is one for each
    image of a folder, or else there are `max_num_examples`.

    One line says which image of a folder the first prompt gets. Raises UsageError for a value that
    is none of these, or both a path and a column; for a folder that has not one image for each
    prompt; and as `load_prompts` does.
    """
    files: dict[str, Source] = {}
    folders: dict[str, list[str]] = {}
    columns: dict[str, str] = {}
    values = parse_inputs(inputs)
    for name, value in values.items():
        if os.path.isdir(value):
            _, folders[name] = pictures_of_folder(Path(value), None, f"{OPTION} {name}={value}")
        elif os.path.isfile(value):
            files[name] = value
        elif dataset_name is None:
            raise UsageError(
                f"{OPTION} {name}={value}: there is no such file or folder; a column of images "
                "needs --dataset_name"
            )
        else:
            columns[name] = value

    if dataset_name is None:
        rows = empty_prompts(folders, negative_prompt, max_num_examples)
    else:
        rows = load_prompts(
            dataset_name,
            split,
            column,
            negative_prompt,
            max_num_examples,
            pictures=columns,
            paths={name: values[name] for name in (*files, *folders)},
        )
    is_cut = len(rows) == max_num_examples
    for name, paths in folders.items():
        if len(paths) < len(rows) or (len(paths) > len(rows) and not is_cut):
            raise UsageError(
                f"{OPTION} {name}: the folder has {len(paths)} images for {len(rows)} prompts; "
                "expected one for each prompt, in the order of the names"
            )
        if dataset_name is not None:
            say_first_pair(name, values[name], rows[0]["prompt"], paths)
    for number, row in enumerate(rows):
        of_folders = {name: paths[number] for name, paths in folders.items()}
        images = files | of_folders | row.pop("inputs", {})
        if images:
            row["inputs"] = images
    return rows


def say_first_pair(name: str, folder: str, prompt: str, paths: list[str]) -> None:
    """Print which image of a folder the first prompt gets; and, where the names hold numbers, the
    first image that is not in the order of these, such as 10.png before 2.png."""
    text = f"note: {OPTION} {name}={folder}: {os.path.basename(paths[0])} is for {prompt!r}"
    for path, next_path in zip(paths, paths[1:]):
        if numbers_in(path) > numbers_in(next_path):
            before, after = os.path.basename(path), os.path.basename(next_path)
            text += f"; in the order of names, {before} comes before {after}"
            break
    print(text)


def numbers_in(path: str) -> list[int]:
    """Return the numbers in the name of a file: [2, 10] for "page2_10.png"."""
    return [int(digits) for digits in re.findall("[0-9]+", os.path.basename(path))]


def empty_prompts(
    folders: dict[str, list[str]], negative_prompt: str | None, max_num_examples: int | None
) -> list[Row]:
    """Return one prompt "" for each image of a folder, or else `max_num_examples` of them.

    folders: {argument: its images}.
    """
    count = max((len(paths) for paths in folders.values()), default=max_num_examples or 1)
    row = {"prompt": ""}
    if negative_prompt is not None:
        row["negative_prompt"] = negative_prompt
    return [dict(row) for _ in range(count)][:max_num_examples]


# ------------------------------------------------------------------------------ images by digest


@dataclass(frozen=True)
class InputImages:
    """Where the images of some rows are, and how large. It does not hold the images."""

    sources: dict[str, Source]
    """{name of its copy: an image}"""

    sizes: dict[str, set[tuple[int, int]]]
    """{argument: the (width, height) of its images}"""

    @classmethod
    def of_rows(cls, rows: list[Row]) -> "InputImages | None":
        """Read all images of the rows of `load_rows`; None if they have none.

        In each row, "inputs" becomes {argument: the name that its copy gets}. A row may be named
        twice. Raises UsageError for an image that can't be read.
        """
        if "inputs" not in rows[0]:
            return None
        sources = {}
        sizes = {}
        known = {}  # {path: (name, size)}, since all rows may have the same file
        different = {id(row): row for row in rows}
        for number, row in enumerate(tqdm(different.values(), "reading", unit="row", delay=1), 1):
            names = {}
            for argument, source in row["inputs"].items():
                if isinstance(source, str) and not os.path.isfile(source):
                    raise UsageError(
                        f"{OPTION} {argument}, row {number}: there is no file {source!r}"
                    )
                is_path = isinstance(source, str)
                if is_path and source in known:
                    name, size = known[source]
                else:
                    image = open_image(source, f"{OPTION} {argument}")
                    name, size = name_of_copy(image), image.size
                    if is_path:
                        known[source] = name, size
                names[argument] = name
                sources.setdefault(name, source)
                sizes.setdefault(argument, set()).add(size)
            row["inputs"] = names
        return cls(sources, sizes)

    def check_sizes(self, is_resized: bool) -> None:
        """Raise UsageError if images of one argument have several sizes, since an activation file
        has as many tokens in each row.

        is_resized: whether the pipeline scales them to a height and width that are given.
        """
        for argument, sizes in self.sizes.items():
            if len(sizes) > 1 and not is_resized:
                (a, b), (c, d) = sorted(sizes)[:2]
                raise UsageError(
                    f"{OPTION} {argument}: the images have different sizes, such as {a} x {b} and "
                    f"{c} x {d}, and all rows of a file have the same number of tokens; scale the "
                    "images, or give --height and --width if the pipeline takes them"
                )

    def of(self, rows: list[Row]) -> list[dict[str, Image.Image]]:
        """Return the images of each row, {argument: image}.

        Raises UsageError for a file that was changed since it was read first.
        """
        images = []
        opened = {}
        for row in rows:
            for argument, name in row["inputs"].items():
                if name not in opened:
                    opened[name] = open_image(self.sources[name], f"{OPTION} {argument}")
                    check_unchanged(opened[name], name, str(self.sources[name]))
            images.append({argument: opened[name] for argument, name in row["inputs"].items()})
        return images

    def save(self, folder: Path, rows: list[Row]) -> None:
        """Write a lossless copy of each image of the rows into folder/inputs/, if it is not
        there."""
        copies = folder / FOLDER
        make_folder(copies)
        for name in dict.fromkeys(name for row in rows for name in row["inputs"].values()):
            if not (copies / name).exists():
                image = open_image(self.sources[name], OPTION)
                check_unchanged(image, name, str(self.sources[name]))
                file = io.BytesIO()
                image.save(file, "png")
                write_atomically(copies / name, file.getvalue())


def read_inputs(folders: list[Path], rows: list[Row]) -> list[dict[str, Image.Image]] | None:
    """Return the images of lines of prompts.jsonl, {argument: image} for each; None if they have
    none.

    folders: those of the collections; the copies lie in `inputs` of one of them. Raises UsageError
    for a copy that is missing or was changed, and for rows that have images of other arguments.
    """
    kinds = set()
    for row in rows:  # "inputs" may be a column of an old file
        kinds.add(tuple(sorted(row["inputs"])) if isinstance(row.get("inputs"), dict) else ())
    if kinds == {()}:
        return None
    if len(kinds) > 1:
        names = " or ".join(", ".join(kind) or "no image" for kind in sorted(kinds))
        raise UsageError(
            f"the rows of {' and '.join(str(folder) for folder in folders)} were generated from "
            f"{names}, and can't be generated together: give evaluate.py the activations of one "
            "collection with --data, and steer.py other prompts with --dataset_name"
        )
    opened = {}
    for row in rows:
        for name in row["inputs"].values():
            if name not in opened:
                opened[name] = read_copy(folders, name)
    return [{key: opened[name] for key, name in row["inputs"].items()} for row in rows]


def read_copy(folders: list[Path], name: str) -> Image.Image:
    """Return an image by the name of its copy, see `read_inputs`."""
    for folder in folders:
        path = Path(folder) / FOLDER / name
        if path.exists():
            image = open_image(str(path), "an input image")
            check_unchanged(image, name, str(path))
            return image
    raise UsageError(
        f"{Path(folders[0]) / FOLDER / name} is not there: the activations were generated from "
        "this image; put it back, or collect again"
    )


def name_of_copy(image: Image.Image) -> str:
    """Return the name of an image's copy."""
    return f"{digest_of(image)}.png"


def digest_of(image: Image.Image) -> str:
    """Return 16 hex digits of a digest of an image's size and pixels."""
    pixels = f"{image.size}".encode() + image.tobytes()
    return hashlib.sha256(pixels).hexdigest()[:16]


def input_names(rows: list[Row]) -> dict[str, dict[str, str]]:
    """Return {the number of a row: the names of its images' copies}, by which settings know them.

    rows: after `InputImages.of_rows`.
    """
    return {str(number): row["inputs"] for number, row in enumerate(rows)}


def check_unchanged(image: Image.Image, name: str, path: str) -> None:
    """Raise UsageError if an image is not the one whose copy has this name."""
    if name_of_copy(image) != name:
        raise UsageError(
            f"{path} was changed after the activations were generated from it; put the old image "
            "back, or collect again"
        )


# ------------------------------------------------------------------------------ reading


def open_image(source: Source, option: str = "--images") -> Image.Image:
    """Open an image, given as a path, bytes or a PIL image.

    It becomes RGB, the right way up, over white where it is transparent. More than 8 bits are
    scaled to 8. Raises UsageError, which names the option that the image comes from, if it can't be
    read.
    """
    name = source if isinstance(source, str) else "an image"
    unreadable = (
        OSError,
        SyntaxError,
        ValueError,
        AttributeError,
        Image.DecompressionBombError,
    )
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, bytes):
            image = Image.open(io.BytesIO(source))
        else:
            image = Image.open(source)
        return to_rgb(image)
    except unreadable as error:
        raise UsageError(f"{option}: {name} can't be read: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB, the right way up, over white where it is transparent.

    More than 8 bits are scaled to 8. Raises ValueError where it is not known which number is white.
    """
    white = None  # the number that is white
    if image.mode.startswith(("I", "F")):  # I;16, I and F have more than 8 bits
        white = white_level(image)  # before exif_transpose, which drops the tags
    image = ImageOps.exif_transpose(image)
    if white is not None:  # convert() would clip numbers above 255
        levels = np.asarray(image, np.float32) / white
        image = Image.fromarray((levels * 255).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def white_level(image: Image.Image) -> float:
    """Return the number that is white in a grey image of more than 8 bits.

    A format of 16 bits says so: 65535, or 4095 for a TIFF of 12 bits. Otherwise it is the smallest
    of 1, 255 and 65535 that no number of the image exceeds. Raises ValueError if a number exceeds
    all three.
    """
    if image.mode.startswith("I;16") or image.format == "PNG":
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
        return 2 ** bits[0] - 1
    largest = np.asarray(image).max()
    for white in (1, 255, 65535):
        if largest <= white:
            return white
    raise ValueError(f"its numbers reach {largest:g}, so it is not known which is white")
