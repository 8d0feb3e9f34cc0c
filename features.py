"""Stage 6: look. One static page of an SAE's features, with no server and no network: pictures,
heat maps, time, words.

    python features.py                                                   # the newest SAE in saes/, on the data that it is of
    python features.py --sae saes/mid_block_k32_M20480 --top_images 24
    python features.py --sae theirs --data activations/mid_block.npy     # any SAE that Sae.load_from_disk reads

All vectors are read once, those of training and those held out, and a feature's numbers are over
all of them:

    density   share of the vectors on which it is active, that is not 0
    mean      of its activation over the vectors on which it is active; max: the largest activation
    time      mean activation over all vectors of each step
    map       of a prompt: mean activation over the steps, and over the tokens in each cell of the grid
    images    the prompts whose maps have the highest peaks, the highest first; their maps share one scale
    words     that more of these prompts have than of the others: log-odds with a prior, 1.96 deviations or more above 0
    nearest   the features with the largest cosine between their rows of W_dec and its own

Reads   an SAE folder; activation files of collect.py (with prompts.jsonl and images/), or any .npy.
Writes  <out_dir>/<name of the SAE>.html.
Of a video it shows the frame in the middle, and a map that is the mean over the frames. Where part of the tokens was kept, a
cell without any is blank. Without images/ there are maps and words only. It names no feature, changes no SAE.

Sources: log-odds, Monroe, Colaresi & Quinn 2008 (Political Analysis 16), equations 16 to 22; the
page is features.html.
"""

import base64
import hashlib
import html
import io
import json
import linecache
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cli import HERE, check_positive, resolve_device, run
from errors import UsageError
from sae import Sae, newest_sae
from store.collection import check_saved_images
from store.disk import check_same, make_folder, write_atomically
from store.identity import activations_of
from store.prompts import seen_text
from store.words import words_of

PAGE = HERE / "analysis/features.html"  # in which the fields in double braces are filled in
CURVE = 50  # points of a time curve at most
LEVELS = 31  # of a heat map, beside 0: fewer compress better
WORDS, NEAREST = 6, 6  # a feature has at most
PRIOR, SIGNIFICANT = (
    10,
    1.96,
)  # prompts that the prior of a word is worth; deviations above 0 that make it over-represented
ABOUT = re.compile(rb'<meta name="about" content="([^"]*)">')


@dataclass
class Config:
    sae: str | None = None
    """Its folder (None: the newest in saes/)."""

    data: list[str] = field(default_factory=list)
    """Activation files of one hook point (none: those that it was trained on)."""

    transfer: bool = False
    """Use the SAE on purpose where it was not trained: another hook point, or other weights."""

    out_dir: str = "features"
    """In which each SAE gets a page."""

    top_images: int = 12
    """Of a feature."""

    map_size: int = 16
    """Cells a side of a heat map at most; a finer grid is averaged."""

    picture_size: int = 256
    """Pixels a side at most; a larger picture is made smaller."""

    batch_size: int = 4096
    """Vectors that go through the SAE together."""

    device: str = "auto"
    """Auto, cuda, cuda:N, mps, cpu."""


class MapGrid(NamedTuple):
    """Where the tokens of an activation file lie in its heat maps."""

    size: tuple[
        int, int
    ]  # (height, width) of the grid in tokens; frames of a video lie on each other
    shape: tuple[int, int]  # (height, width) of a map in cells
    ratio: (
        float | None
    )  # width / height of the grid, and so of the image; None where the tokens lie in a line

    def cells_of(self, tokens: np.ndarray) -> np.ndarray:
        """The cell of each of these tokens (n,), which are numbered through the grid."""
        (height, width), (rows, columns) = self.size, self.shape
        row = tokens % (height * width) // width * rows // height
        column = tokens % width * columns // width
        return row * columns + column


def map_grid(file, map_size):
    """The `MapGrid` of an ActivationFile. Where no grid is known, a map has one line.

    Raises UsageError for a folder of saved rows.
    """
    if file.path.is_dir():
        raise UsageError(
            f"{file.path}: features.py needs an .npy file; collect the activations anew"
        )
    height, width = (1, 1, *file.grid)[-2:]
    shrink = min(1, map_size / max(height, width))  # the shape of the image is kept
    rows, columns = max(1, round(height * shrink)), max(1, round(width * shrink))
    if height == 1:
        rows, columns = 1, min(width, map_size * map_size)
    ratio = round(width / height, 3) if height > 1 else None
    return MapGrid((height, width), (rows, columns), ratio)


class Statistics:
    """What is kept of M features over S steps: counts, sums, and maps of C cells of the K examples
    with the highest peaks."""

    def __init__(self, M, S, K, C, device):
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.counts = torch.zeros(
            M, S, dtype=torch.int64, device=device
        )  # vectors on which the feature is active
        self.sums = torch.zeros(M, S, dtype=wide, device=device)  # of its activations
        self.vectors = torch.zeros(S, dtype=torch.int64, device=device)
        self.largest = torch.zeros(M, device=device)
        self.peaks = torch.zeros(M, K, device=device)
        self.examples = torch.full((M, K), -1, dtype=torch.int64, device=device)
        self.maps = torch.zeros(
            M, K, C, dtype=torch.uint8, device=device
        )  # 255: the map's own peak
        self.heat, self.seen = (
            torch.zeros(M, C, device=device),
            torch.zeros(C, device=device),
        )  # of the example being read

    def add(self, top_acts, top_indices, step, cell):
        """Vectors of one example: (N, K), (N, K) of the SAE, and each one's step and cell, (N,)."""
        active = top_acts > 0
        acts, features = top_acts[active], top_indices[active]
        steps, cells = (place[:, None].expand_as(active)[active] for place in (step, cell))
        S, C = len(self.vectors), len(self.seen)
        self.counts.view(-1).index_add_(0, features * S + steps, torch.ones_like(features))
        self.sums.view(-1).index_add_(0, features * S + steps, acts.to(self.sums.dtype))
        self.vectors += torch.bincount(step, minlength=S)
        self.largest.scatter_reduce_(0, features, acts, "amax")
        self.heat.view(-1).index_add_(0, features * C + cells, acts)
        self.seen += torch.bincount(cell, minlength=C)

    def finish(self, example):
        """Every vector of this example has been added: where its map's peak is above a feature's
        lowest, it takes that place."""
        maps = self.heat / self.seen.clamp_min(1)
        peak, (lowest, slot) = maps.amax(1), self.peaks.min(1)
        f = (peak > lowest).nonzero()[:, 0]
        self.peaks[f, slot[f]], self.examples[f, slot[f]] = peak[f], example
        self.maps[f, slot[f]] = (255 * maps[f] / peak[f, None]).round().to(torch.uint8)
        self.heat.zero_()
        self.seen.zero_()

    def sort(self):
        """Each feature's examples by their peaks, the highest first, on the CPU."""
        order = self.peaks.sort(dim=1, descending=True, stable=True).indices
        self.peaks, self.examples = (
            self.peaks.gather(1, order).cpu(),
            self.examples.gather(1, order).cpu(),
        )
        self.maps = self.maps.gather(1, order[:, :, None].expand_as(self.maps)).cpu()
        self.counts, self.sums, self.vectors = (
            self.counts.cpu(),
            self.sums.cpu().double(),
            self.vectors.cpu(),
        )


@torch.no_grad()
def scan(sae, activations, grids, top_images, batch_size):
    """Read every vector once: the `Statistics` of all features, sorted. Examples are numbered
    through all files.

    grids: the MapGrid of each of `activations.sources`. Raises UsageError for numbers that are not
    finite, and where the SAE needs whole samples and the files do not hold such.
    """
    num_examples = sum(file.P for file in activations.sources)
    S = max(1, len(activations.timesteps))
    C = max(grid.shape[0] * grid.shape[1] for grid in grids)
    found = Statistics(sae.num_latents, S, min(top_images, num_examples), C, sae.W_dec.device)
    if sae.takes_samples:
        activations.sample_tokens()  # or a UsageError
    with tqdm(total=num_examples, unit="prompt", desc="features") as bar:
        for number, (file, grid) in enumerate(zip(activations.sources, grids)):
            for p in range(file.P):
                scan_prompt(found, sae, activations, number, p, grid, batch_size)
                found.finish(bar.n)
                bar.update()
    found.sort()
    return found


def scan_prompt(found, sae, activations, number, p, grid, batch_size):
    """Add the vectors of prompt p in the file of that number to the statistics."""
    file, device = activations.sources[number], sae.W_dec.device
    n = file.T if file.lengths is None else int(file.lengths[p])
    size = max(n, batch_size // max(1, n) * n) if sae.takes_samples else batch_size
    kept = None if file.tokens_kept is None else file.read_tokens_kept(p)
    for pieces in pieces_of(number, file, p, n, size):
        x = activations.read(pieces).to(device).float()
        if not torch.isfinite(x).all():
            raise UsageError(f"{file.path}: prompt {p} holds numbers that are not finite")
        top_acts, top_indices = sae.encode(x.unflatten(0, (-1, n)) if sae.takes_samples else x)[:2]
        row = np.concatenate([np.arange(first, end) for _, first, end in pieces.tolist()])
        step, token = row // file.T % file.S, row % file.T
        if kept is not None:
            token = kept[step, token]
        if not activations.timesteps:
            step = np.zeros_like(step)
        step, cell = (
            torch.from_numpy(step).to(device),
            torch.from_numpy(grid.cells_of(token)).to(device),
        )
        found.add(top_acts.flatten(0, -2), top_indices.flatten(0, -2), step, cell)


def pieces_of(number, file, p, n, size):
    """The first n tokens of each step of prompt p as pieces for `Activations.read`, together at
    most `size` vectors a time."""
    starts = (p * file.S + np.arange(file.S))[:, None] * file.T + np.arange(0, n, size)
    ends = np.minimum(starts + size, starts[:, :1] + n)
    pieces = np.stack([np.full(starts.size, number), starts.ravel(), ends.ravel()], 1)
    together = max(1, size // max(1, n))
    return [pieces[i : i + together] for i in range(0, len(pieces), together)]


def over_represented(texts, chosen):
    """Words that more of the chosen texts have than of the others: for each feature a list of
    (word, chosen texts with it).

    texts: one an example; texts that are the same count once. chosen (M, K): examples, -1 for none.
    With y_w of n chosen texts and z_w of m others, and a prior a_w of weight a in proportion to all
    texts:

        delta_w = logit((y_w + a_w) / (n + a)) - logit((z_w + a_w) / (m + a)),   variance = 1 / (y_w + a_w) + 1 / (z_w + a_w)

    (Monroe et al. 2008, on how many texts have a word). A word that all texts have can't be
    over-represented.
    """
    numbers = {}
    distinct = [numbers.setdefault(text, len(numbers)) for text in texts]
    words = [frozenset(words_of(text)) for text in numbers]
    everywhere, total = Counter(word for text in words for word in text), len(words)
    found = []
    for examples in chosen.tolist():
        own = {distinct[e] for e in examples if e >= 0}
        n, m, scores = len(own), total - len(own), []
        for word, y in Counter(word for e in own for word in words[e]).items():
            prior, z = PRIOR * everywhere[word] / (total + 1), everywhere[word] - y
            odds = (y + prior) / (n + PRIOR - y - prior) * (m + PRIOR - z - prior) / (z + prior)
            score = np.log(odds) / np.sqrt(1 / (y + prior) + 1 / (z + prior))
            if y > 1 and score >= SIGNIFICANT:
                scores.append((-score, word, y))
        found.append([(word, y) for _, word, y in sorted(scores)[:WORDS]])
    return found


@torch.no_grad()
def nearest(W_dec, n, block=1024):
    """The n rows with the largest cosine to each row: indices (M, n), cosines (M, n). Never holds
    more than block x M."""
    W, parts = torch.nn.functional.normalize(W_dec, dim=1), []
    for first in range(0, len(W), block):
        cosines = W[first : first + block] @ W.T
        cosines.diagonal(first).fill_(-2)  # itself
        parts.append(cosines.topk(min(n, len(W) - 1), dim=1))
    return torch.cat([part.indices for part in parts]).cpu(), torch.cat(
        [part.values for part in parts]
    ).cpu()


def short(values, digits=4):
    """Numbers for JSON, of so many significant digits."""
    return [float(f"{v:.{digits}g}") for v in values]


def coarse(curve):
    """(M, S) -> (M, at most CURVE): the mean of neighbouring steps where there are more."""
    return np.stack(
        [part.mean(1) for part in np.array_split(curve, min(CURVE, curve.shape[1]), axis=1)], 1
    )


def packed_maps(found):
    """Of each feature one string for the page: its maps, C bytes of 0 to LEVELS each, deflated, in
    base64."""
    share = (found.peaks / found.peaks[:, :1].clamp_min(1e-30))[
        :, :, None
    ].numpy()  # all have the scale of the first
    strings = []
    for maps, part in zip(found.maps.numpy(), share):
        levels = np.rint(maps * part * (LEVELS / 255)).astype(np.uint8)[part[:, 0] > 0]
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        strings.append(
            base64.b64encode(deflate.compress(levels.tobytes()) + deflate.flush()).decode()
            if levels.size
            else ""
        )
    return strings


class Example(NamedTuple):
    """One prompt, or the one image of several that it was given."""

    file: int  # number of its activation file
    text: str  # its prompt, as far as the model saw it; "" where none is known
    caption: str  # what stands under its image: the prompt, or else the name of a real picture
    place: str  # where it is from: file, row, seed
    image: (
        Path | None
    )  # what collect.py saved of it, which may be missing; None where the file is not of collect.py


def list_examples(activations):
    """Every row of the files as an `Example`, in the order of `scan`'s numbers."""
    examples = []
    for number, file in enumerate(activations.sources):
        folder = f"{file.path.parent.name}/ " if len(activations.sources) > 1 else ""
        for p in range(file.P):
            row = file.prompt_rows[p] if file.prompt_rows else {}
            text = seen_text(row)
            caption = str(row.get("prompt") or row.get("image") or "")
            seed = f", seed {row['seed']}" if "seed" in row else ""
            image = file.path.with_name("images") / f"{p}.webp" if file.prompt_rows else None
            examples.append(Example(number, text, caption, f"{folder}row {p}{seed}", image))
    return examples


def describe(found, sae, activations, grids, examples):
    """All that the page says, but for the pictures, as an object for JSON; and the numbers of the
    examples that it shows."""
    shown = sorted(set(found.examples[found.examples >= 0].tolist()))
    vectors = f"{int(found.vectors.sum()):,} vectors of width {sae.d_in}"
    data = {
        "hook_name": activations.hook_name,
        "files": activations.paths,
        "about": f"{sae.num_latents:,} features, {sae.activation}, k = {sae.k}; {vectors}",
        "levels": LEVELS,
        "timesteps": [],
        "shapes": [grid.shape for grid in grids],
        "ratios": [grid.ratio for grid in grids],
        "cells": found.maps.shape[2],
        "examples": [[examples[e].caption, examples[e].place, examples[e].file] for e in shown],
    }
    if activations.timesteps:
        data["timesteps"] = short(coarse(np.array([activations.timesteps]))[0], 6)
    data |= describe_numbers(found) | describe_images(found, shown)
    cut = {
        i: examples[e].text
        for i, e in enumerate(shown)
        if examples[e].text and examples[e].text != examples[e].caption
    }
    if cut:
        data["seen"] = cut
    data["words"] = over_represented([example.text for example in examples], found.examples)
    indices, cosines = nearest(sae.W_dec, NEAREST)
    neighbours = zip(indices.tolist(), cosines.tolist())
    data["nearest"] = [[[f, round(cosine, 3)] for f, cosine in zip(*row)] for row in neighbours]
    return data, shown


def describe_numbers(found):
    """How often, how much and when each feature is active."""
    active = found.counts.double().sum(1)
    by_step = coarse((found.sums / found.vectors.double().clamp_min(1)).numpy())
    height = by_step.max(1)
    curves = np.rint(255 * by_step / height[:, None].clip(1e-300)).astype(np.uint8)
    return {
        "density": short((active / max(1, int(found.vectors.sum()))).tolist()),
        "mean": short((found.sums.sum(1) / active.clamp_min(1)).tolist()),
        "max": short(found.largest.cpu().tolist()),
        "height": short(height.tolist()),
        "curves": base64.b64encode(curves.tobytes()).decode(),
    }


def describe_images(found, shown):
    """In which of the shown examples each feature is most active, and where."""
    index = {example: i for i, example in enumerate(shown)}
    return {
        "top": [[index[e] for e in examples if e >= 0] for examples in found.examples.tolist()],
        "peaks": [short((peak for peak in peaks if peak > 0), 3) for peaks in found.peaks.tolist()],
        "maps": packed_maps(found),
    }


def read_images(examples, size):
    """The image of each example as the bytes of a small WebP, None where there is none, and a note
    that says why, or ""."""
    images = [
        small_image(example.image, size)
        for example in tqdm(examples, unit="picture", desc="pictures")
    ]
    missing = [example.image for example, image in zip(examples, images) if image is None]
    if not missing:
        return images, ""
    path = missing[0]
    if path is None:
        reason = "prompts.jsonl and images/ of collect.py are not beside the activations"
    elif path.with_suffix(".wav").exists():
        reason = "the model made sound"
    else:
        reason = f"{path} is not there or can't be read; collect again to have it"
    kind = "no pictures" if len(missing) == len(images) else "some pictures are missing"
    return images, f"{kind}: {reason}"


def small_image(path, size):
    """An image as the bytes of a WebP of at most `size` pixels a side; of a video the frame in the
    middle. None without one."""
    if path is None or not path.exists():
        return None
    try:
        with Image.open(path) as opened:
            opened.seek(getattr(opened, "n_frames", 1) // 2)
            image = opened.convert("RGB")
    except (
        OSError,
        ValueError,
        EOFError,
    ):  # after a scan of hours a page without it is better than none
        return None
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    image.save(file := io.BytesIO(), "webp", quality=85)
    return file.getvalue()


def write_page(path, about, data, images):
    """Write the page of `describe`'s data, with the images (WebP files as bytes, None for none) in
    it.

    Whatever comes from outside is data: JSON without a "<", which the page's script shows as text
    alone. The page may run that one script, which its hash names, and show images from its own
    bytes, nothing else.
    """
    urls = [
        image and f"data:image/webp;base64,{base64.b64encode(image).decode()}" for image in images
    ]
    text = json.dumps(
        data | {"name": path.stem, "pictures": urls}, separators=(",", ":"), allow_nan=False
    )
    template = "".join(linecache.getlines(str(PAGE)))  # bundle.py puts the page there
    fields = {
        "title": html.escape(path.stem),
        "about": html.escape(json.dumps(about)),
        "policy": security_policy(template),
        "data": text.replace("<", "\\u003c"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)
    write_atomically(path, page.encode())


def security_policy(template):
    """What a browser may do with the page: nothing but its own style, script and images."""
    hashes = {}
    for tag in ("style", "script"):
        code = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        hashes[tag] = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )


def check_page(path, about):
    """Make the page's folder. Raises UsageError where the page, or what is in its place, is not of
    this SAE and these files."""
    remedy = "use another --out_dir"
    if path.exists():
        try:
            theirs = resolved(
                json.loads(html.unescape(ABOUT.search(path.read_bytes()[:65536])[1].decode()))
            )
        except (TypeError, KeyError, ValueError):
            raise UsageError(f"{path} is no page of features.py; {remedy}") from None
        check_same(path, theirs, resolved(about), remedy)
    make_folder(path.parent)


def resolved(about):
    """The same SAE and data whatever folder they were named from."""
    return {
        "sae": str(Path(about["sae"]).resolve()),
        "data": [str(Path(name).resolve()) for name in about["data"]],
    }


def main(cfg):
    # 1. The SAE, and all vectors of its hook point
    check_positive(cfg, "top_images", "map_size", "picture_size", "batch_size")
    device = resolve_device(cfg.device)
    folder = Path(cfg.sae) if cfg.sae else newest_sae()
    sae = Sae.load_from_disk(folder, device)
    activations = activations_of(sae, folder, cfg.data, cfg.transfer)
    path = (
        Path(cfg.out_dir) / f"{(folder if folder.is_dir() else folder.parent).resolve().name}.html"
    )
    about = {"sae": str(folder), "data": activations.paths}
    check_page(path, about)
    grids = [map_grid(file, cfg.map_size) for file in activations.sources]

    # 2. Their numbers and maps
    found = scan(sae, activations, grids, cfg.top_images, cfg.batch_size)
    examples = list_examples(activations)
    data, shown = describe(found, sae, activations, grids, examples)
    if activations.transfer:
        data["about"] += f"; transfer: {'; '.join(activations.transfer)}"

    # 3. The images of the prompts that are shown, and the page
    for number, file in enumerate(activations.sources):
        first = sum(other.P for other in activations.sources[:number])
        rows = {example - first for example in shown if examples[example].file == number}
        check_saved_images(file.path.parent, file.meta, rows)
    images, data["note"] = read_images([examples[e] for e in shown], cfg.picture_size)
    if data["note"]:
        print(f"note: {data['note']}")
    write_page(path, about, data, images)
    alive = sum(density > 0 for density in data["density"])
    num_images = sum(image is not None for image in images)
    print(
        f"{folder}: {alive:,} of {sae.num_latents:,} features are active on {int(found.vectors.sum()):,} vectors"
    )
    print(f"saved in {path} ({path.stat().st_size / 1e6:.1f} MB), {num_images} pictures in it")
    return path


if __name__ == "__main__":
    run(main, Config)
