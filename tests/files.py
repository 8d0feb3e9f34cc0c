"""What tests do with files: read a folder whole, damage a byte, write an activation file by hand."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from store.disk import checksum


def contents(folder):
    """The bytes of every file below a folder: {path relative to the folder: bytes}."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def flip(path, offset):
    """Change one bit of the byte number `offset` of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def read_json(path):
    """What a JSON file holds."""
    return json.loads(Path(path).read_text("utf-8"))


def read_lines(path):
    """What the lines of a JSON Lines file hold, such as a collection's prompts.jsonl."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def write_lines(path, rows):
    """Write a JSON Lines file: one row per line."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_text(folder, name, text, encoding="utf-8"):
    """Write a text file, with the line ends that the text has; its path, as an option takes it."""
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return str(path)


def write_activations(path, x, lengths=None, tokens=None, **meta):
    """Write an activation file (prompts, steps, tokens, d) with all that collect.py writes beside it.

    Prompts with an odd number say "red", the others "blue". lengths: how many of its tokens each
    text has. tokens: which of the tokens were kept. meta: entries of the description.
    """
    np.save(path, x)
    description = {
        "format": 1,
        "hook_name": "block",
        "side": "output",
        "rows": "cond",
        "stream": "image",
        "model": "toy",
        **meta,
    }
    description |= {"timesteps": list(range(x.shape[1])), "shape": list(x.shape)}
    description["checksum"] = checksum(description)
    path.with_suffix(".json").write_text(json.dumps(description))
    rows = []
    for number in range(len(x)):
        colour = "red" if number % 2 else "blue"
        rows.append({"id": number, "prompt": f"a {colour} thing {number}", "seed": number})
    write_lines(path.parent / "prompts.jsonl", rows)
    if lengths is not None:
        np.save(path.with_suffix(".lengths.npy"), lengths)
    if tokens is not None:
        np.save(path.with_suffix(".tokens.npy"), tokens)


def saved_rows(folder, images, steps, num_tokens=4):
    """Save a data set of rows (num_tokens, 8), as the project's ancestor saved activations.

    images, steps: of each row, the number of its image and of its step. Every image has numbers of
    its own; vector entry 0 is the image, entry 1 the step. Returns the folder.
    """
    from datasets import Array2D, Dataset, Features, Value, disable_progress_bars

    disable_progress_bars()
    rng = np.random.default_rng(0)
    num_images = max(images) + 1
    of_image = rng.standard_normal((num_images, num_tokens, 8)).astype(np.float32)
    of_image[:, :, 0] = np.arange(num_images)[:, None]
    x = of_image[images]
    x[:, :, 1] = np.array(steps)[:, None]
    columns = {"activations": x, "timestep": [900 - 100 * step for step in steps]}
    kinds = Features({"activations": Array2D(x.shape[1:], "float32"), "timestep": Value("uint16")})
    Dataset.from_dict(columns, features=kinds).save_to_disk(folder)
    return folder


def photos(folder, n, size=(40, 30)):
    """Make a folder with n different images, 0.png to n-1.png; returns the folder."""
    folder.mkdir()
    for number in range(n):
        image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 5 + 9 * number)
        image.convert("RGB").save(folder / f"{number}.png")
    return folder
