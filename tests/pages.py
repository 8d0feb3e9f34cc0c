"""The page of features.py: activation files and images that it shows, and what is in it."""

import base64
import io
import json
import re
import zlib

import numpy as np
from files import write_lines
from PIL import Image

from store.disk import checksum


def write_block(folder, x, **meta):
    """Write `folder / "block.npy"` as collect.py does, with prompts that name the folder; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "block.npy"
    np.save(path, x)
    description = {
        "hook_name": "block",
        "shape": list(x.shape),
        "timesteps": [900, 500, 100][: x.shape[1]],
        "model": "toy",
    } | meta
    description["checksum"] = checksum(description)
    path.with_suffix(".json").write_text(json.dumps(description))
    rows = []
    for number in range(len(x)):
        rows.append({"id": number, "prompt": f"{folder.name} prompt {number}", "seed": number})
    write_lines(folder / "prompts.jsonl", rows)
    return path


def grey_of(row):
    """The brightness of the image that `save_grey_images` saves for a row."""
    return 20 * (row % 10) + 30


def save_grey_images(path, sizes):
    """Save one grey image per row beside an activation file, where collect.py puts images."""
    folder = path.with_name("images")
    if folder.exists():
        return
    folder.mkdir()
    for row, size in enumerate(sizes):
        image = Image.new("RGB", size, (grey_of(row),) * 3)
        image.save(folder / f"{row}.webp", lossless=True)


def read_page(path):
    """The data of a page, by another way than the page's script.

    `levels_of` is added: for each feature the heat maps of its images, (images, cells), as uint8.
    """
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    data = json.loads(re.search(pattern, path.read_text(), re.DOTALL)[1])
    data["levels_of"] = []
    for text in data["maps"]:
        levels = np.zeros((0, data["cells"]))
        if text:
            inflated = zlib.decompress(base64.b64decode(text), -15)
            levels = np.frombuffer(inflated, np.uint8).reshape(-1, data["cells"])
        data["levels_of"].append(levels)
    return data


def shown_image(data, example):
    """The image that a page shows for one example, (height, width, 3)."""
    _, _, encoded = data["pictures"][example].partition(",")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
