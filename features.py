"""Stage 6: look. One static page of an SAE's features, with no server and no network: pictures, heat maps, time, words.

    python features.py                                                   # the newest SAE in saes/, on the data that it is of
    python features.py --sae saes/mid_block_k32_M20480 --top_images 24
    python features.py --sae theirs --data activations/mid_block.npy     # any SAE that Sae.load_from_disk reads

All vectors are read once, those of training and those held out, and a feature's numbers are over all of them:

    density   share of the vectors on which it is active, that is not 0
    mean      of its activation over the vectors on which it is active; max: the largest activation
    time      mean activation over all vectors of each step
    map       of a prompt: mean activation over the steps, and over the tokens in each cell of the grid
    images    the prompts whose maps have the highest peaks, the highest first; their maps share one scale
    words     that more of these prompts have than of the others: log-odds with a prior, 1.96 deviations or more above 0
    nearest   the features with the largest cosine between their rows of W_dec and its own

Reads   an SAE folder; activation files of collect.py (with prompts.jsonl, samples.npy), or any .npy; the model that they are
        of, whose pipeline decodes the samples: one forward of the denoiser a picture, in place of a generation.
Writes  <out_dir>/<name of the SAE>.html; where that would be above --max_mb also <name>_files/ with the pictures.
Of a video it shows the frame in the middle, and a map that is the mean over the frames. Where part of the tokens was kept, a
cell without any is blank. Without samples or the model there are maps and words only. It names no feature, changes no SAE.

Sources: log-odds, Monroe, Colaresi & Quinn 2008 (Political Analysis 16), equations 16 to 22; the page is features.html.
"""

import base64
import hashlib
import html
import io
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from activations import open_activations
from cli import HERE, check_positive, resolve_device, run
from disk import write_atomically
from errors import UsageError
from formats import newest_sae
from images import image_path
from sae import Sae
from sources import open_file, read_lengths, read_prompts

CURVE = 50  # points of a time curve at most
LEVELS = 31  # of a heat map, beside 0: fewer compress better
WORDS, NEAREST = 6, 6  # a feature has at most
PRIOR, SIGNIFICANT = 10, 1.96  # prompts that the prior of a word is worth; deviations above 0 that make it over-represented
ABOUT = re.compile(rb'<meta name="about" content="([^"]*)">')


@dataclass
class Config:
    sae: str | None = None  # its folder (None: the newest in saes/)
    data: list[str] = field(default_factory=list)  # activation files of one hook point (none: those that it was trained on)
    out_dir: str = "features"  # in which each SAE gets a page
    model_name: str | None = None  # that decodes the samples (None: the model that the activations are of)
    pictures: bool = True  # decode the samples; without them no model is loaded
    top_images: int = 12  # of a feature
    map_size: int = 16  # cells a side of a heat map at most; a finer grid is averaged
    picture_size: int = 256  # pixels a side at most; a larger picture is made smaller
    max_mb: float = 25.0  # of the page; above it pictures go to a folder, and if need be features get fewer
    batch_size: int = 4096  # vectors that go through the SAE together
    decode_batch_size: int = 8  # samples decoded together
    cpu_offload: bool = False  # of the model, keep only the running component on the GPU
    device: str = "auto"  # auto, cuda, cuda:N, mps, cpu


class Source(NamedTuple):
    """An activation file, seen as (P, S, T, d): what its rows are of, and where its tokens are in a heat map."""

    path: Path
    meta: dict
    P: int
    S: int
    T: int
    rows: list | None  # of prompts.jsonl
    lengths: np.ndarray | None  # (P,): tokens that are no padding, of text
    kept: np.ndarray | None  # (P, S, T): which tokens of the grid were kept, if not all
    cells: np.ndarray  # of each token of the grid, its cell in the map
    shape: tuple  # (h, w) of the map
    ratio: float | None  # width / height of the grid, and so of the picture; None where it is a line


def open_source(path, map_size):
    """The `Source` of one file. A file of vectors alone counts as one example, a file without a grid has maps of one line."""
    path = Path(path)
    if path.suffix != ".npy" or path.is_dir():
        raise UsageError(f"{path}: features.py needs a finished .npy file; go on with the collection, or collect anew")
    array, meta = open_file(path)
    P, S = (1, 1) if array.ndim == 2 else (len(array), array.shape[1] if array.ndim > 3 else 1)
    T = array.size // (P * S * array.shape[-1])
    kept, listing = path.with_suffix(".tokens.npy"), path.with_name("prompts.jsonl")
    kept = np.load(kept, mmap_mode="r", allow_pickle=False) if kept.exists() else None
    grid = tuple(meta.get("grid") or ())
    if kept is None and int(np.prod(grid)) != T:
        grid = (T,)
    if kept is not None and kept.shape != (P, S, T):
        raise UsageError(f"{path.with_suffix('.tokens.npy')} has shape {kept.shape}, expected {(P, S, T)}")
    frames, h, w = int(np.prod(grid[:-2])), *(1, 1, *grid)[-2:]
    high, wide = (max(1, round(n * min(1, map_size / max(h, w)))) for n in (h, w))  # the shape of the picture is kept
    high, wide = (high, wide) if h > 1 else (1, min(w, map_size * map_size))
    cells = (np.arange(h) * high // h)[:, None] * wide + np.arange(w) * wide // w
    rows = read_prompts(path) if meta and listing.exists() else None
    lengths = read_lengths(path, array) if meta.get("stream") == "text" else None
    ratio = round(w / h, 3) if h > 1 else None
    return Source(path, meta, P, S, T, rows, lengths, kept, np.tile(cells.ravel(), frames), (high, wide), ratio)


class Statistics:
    """What is kept of M features over S steps: counts, sums, and maps of C cells of the K examples with the highest peaks."""

    def __init__(self, M, S, K, C, device):
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.counts = torch.zeros(M, S, dtype=torch.int64, device=device)  # vectors on which the feature is active
        self.sums = torch.zeros(M, S, dtype=wide, device=device)  # of its activations
        self.vectors = torch.zeros(S, dtype=torch.int64, device=device)
        self.largest = torch.zeros(M, device=device)
        self.peaks = torch.zeros(M, K, device=device)
        self.examples = torch.full((M, K), -1, dtype=torch.int64, device=device)
        self.maps = torch.zeros(M, K, C, dtype=torch.uint8, device=device)  # 255: the map's own peak
        self.heat, self.seen = torch.zeros(M, C, device=device), torch.zeros(C, device=device)  # of the example being read

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
        """Every vector of this example has been added: where its map's peak is above a feature's lowest, it takes that place."""
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
        self.peaks, self.examples = self.peaks.gather(1, order).cpu(), self.examples.gather(1, order).cpu()
        self.maps = self.maps.gather(1, order[:, :, None].expand_as(self.maps)).cpu()
        self.counts, self.sums, self.vectors = self.counts.cpu(), self.sums.cpu().double(), self.vectors.cpu()


@torch.no_grad()
def scan(sae, activations, sources, top_images, batch_size):
    """Read every vector once: the `Statistics` of all features, sorted. Examples are numbered through all sources."""
    samples, device, examples = sae.activation == "sampletopk", sae.W_dec.device, sum(source.P for source in sources)
    S, C = max(1, len(activations.timesteps)), max(int(source.cells.max()) + 1 for source in sources)
    found = Statistics(sae.num_latents, S, min(top_images, examples), C, device)
    if samples:
        activations.sample_tokens()  # or a UsageError
    with tqdm(total=examples, unit="prompt", desc="features") as bar:
        for number, source in enumerate(sources):
            for p in range(source.P):
                n = source.T if source.lengths is None else int(source.lengths[p])
                size = max(n, batch_size // max(1, n) * n) if samples else batch_size
                for pieces in pieces_of(number, source, p, n, size):
                    x = activations.read(pieces).to(device).float()
                    if not torch.isfinite(x).all():
                        raise UsageError(f"{source.path}: prompt {p} holds numbers that are not finite")
                    codes = sae.encode(x.unflatten(0, (-1, n)) if samples else x)
                    row = np.concatenate([np.arange(first, end) for _, first, end in pieces.tolist()])
                    s, t = row // source.T % source.S, row % source.T
                    t = t if source.kept is None else np.asarray(source.kept[p])[s, t]
                    step, cell = (torch.from_numpy(i).to(device) for i in (s if S > 1 else 0 * s, source.cells[t]))
                    found.add(codes[0].flatten(0, -2), codes[1].flatten(0, -2), step, cell)
                found.finish(bar.n)
                bar.update()
    found.sort()
    return found


def pieces_of(number, source, p, n, size):
    """The first n tokens of each step of example p as pieces for `Activations.read`, together at most `size` vectors a time."""
    starts = (p * source.S + np.arange(source.S))[:, None] * source.T + np.arange(0, n, size)
    ends = np.minimum(starts + size, starts[:, :1] + n)
    pieces = np.stack([np.full(starts.size, number), starts.ravel(), ends.ravel()], 1)
    together = max(1, size // max(1, n))
    return [pieces[i : i + together] for i in range(0, len(pieces), together)]


def over_represented(texts, chosen):
    """Words that more of the chosen texts have than of the others: for each feature a list of (word, chosen texts with it).

    texts: one an example; texts that are the same count once. chosen (M, K): examples, -1 for none. With y_w of n chosen
    texts and z_w of m others, and a prior a_w of weight a in proportion to all texts:

        delta_w = logit((y_w + a_w) / (n + a)) - logit((z_w + a_w) / (m + a)),   variance = 1 / (y_w + a_w) + 1 / (z_w + a_w)

    (Monroe et al. 2008, on how many texts have a word). A word that all texts have can't be over-represented.
    """
    numbers = {}
    distinct = [numbers.setdefault(text, len(numbers)) for text in texts]
    words = [frozenset(re.findall(r"\w[\w'’-]*", text.lower())) for text in numbers]
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
    """The n rows with the largest cosine to each row: indices (M, n), cosines (M, n). Never holds more than block x M."""
    W, parts = torch.nn.functional.normalize(W_dec, dim=1), []
    for first in range(0, len(W), block):
        cosines = W[first : first + block] @ W.T
        cosines.diagonal(first).fill_(-2)  # itself
        parts.append(cosines.topk(min(n, len(W) - 1), dim=1))
    return torch.cat([part.indices for part in parts]).cpu(), torch.cat([part.values for part in parts]).cpu()


def pictures_of(cfg, sources, examples, device):
    """{example: WebP} of these examples, and why there are none of some or all, "" if there are."""
    found, first = {}, 0
    for source in sources:
        for e in examples:
            path = image_path(source.path.with_name("images"), e - first) if first <= e < first + source.P else None
            if path is not None and path.suffix == ".webp":
                with Image.open(path) as picture:
                    picture.seek(getattr(picture, "n_frames", 1) // 2)
                    picture = picture.convert("RGB")
                picture.thumbnail((cfg.picture_size, cfg.picture_size), Image.Resampling.LANCZOS)
                picture.save(file := io.BytesIO(), "webp", quality=85)
                found[e] = file.getvalue()
        first += source.P
    missing = len(examples) - len(found)
    return found, f"{missing} are not in images/, beside the activations" if missing else ""


def short(values, digits=4):
    """Numbers for JSON, of so many significant digits."""
    return [float(f"{v:.{digits}g}") for v in values]


def coarse(curve):
    """(M, S) -> (M, at most CURVE): the mean of neighbouring steps where there are more."""
    return np.stack([part.mean(1) for part in np.array_split(curve, min(CURVE, curve.shape[1]), axis=1)], 1)


def packed_maps(found, top):
    """Of each feature one string for the page: its maps, C bytes of 0 to LEVELS each, deflated, in base64."""
    share = (found.peaks / found.peaks[:, :1].clamp_min(1e-30))[:, :top, None].numpy()  # all have the scale of the first
    strings = []
    for maps, part in zip(found.maps[:, :top].numpy(), share):
        levels = np.rint(maps * part * (LEVELS / 255)).astype(np.uint8)[part[:, 0] > 0]
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        strings.append(base64.b64encode(deflate.compress(levels.tobytes()) + deflate.flush()).decode() if levels.size else "")
    return strings


def describe(found, sae, activations, sources, top):
    """All that the page says, but for the pictures: an object for JSON."""
    vectors, counts = found.vectors.double(), found.counts.double()
    total, n = counts.sum(1), int(vectors.sum())
    by_step = coarse((found.sums / vectors.clamp_min(1)).numpy())
    curves = np.rint(255 * by_step / by_step.max(1, keepdims=True).clip(1e-300)).astype(np.uint8)
    places = [(source, p) for source in sources for p in range(source.P)]
    rows = [source.rows[p] if source.rows else {} for source, p in places]
    texts = [str(row.get("prompt") or "") for row in rows]
    chosen = found.examples[:, :top]
    shown = sorted(set(chosen[chosen >= 0].tolist()))
    index = {e: i for i, e in enumerate(shown)}
    indices, cosines = nearest(sae.W_dec, NEAREST)
    several = len(sources) > 1
    captions = [texts[e] or str(rows[e].get("image") or "") for e in shown]
    where = [f"{places[e][0].path.parent.name}/ " * several + f"row {places[e][1]}" for e in shown]
    where = [w + (f", seed {rows[e]['seed']}" if "seed" in rows[e] else "") for w, e in zip(where, shown)]
    return shown, {
        "hook_name": activations.hook_name,
        "files": activations.paths,
        "about": f"{sae.num_latents:,} features, {sae.activation}, k = {sae.k}; {n:,} vectors of width {sae.d_in}",
        "levels": LEVELS,
        "timesteps": short(coarse(np.array([activations.timesteps]))[0], 6) if activations.timesteps else [],
        "shapes": [source.shape for source in sources],
        "ratios": [source.ratio for source in sources],
        "cells": found.maps.shape[2],
        "examples": [[c, w, sources.index(places[e][0])] for c, w, e in zip(captions, where, shown)],
        "density": short((total / max(1, n)).tolist()),
        "mean": short((found.sums.sum(1) / total.clamp_min(1)).tolist()),
        "max": short(found.largest.cpu().tolist()),
        "height": short(by_step.max(1).tolist()),
        "curves": base64.b64encode(curves.tobytes()).decode(),
        "top": [[index[e] for e in examples if e >= 0] for examples in chosen.tolist()],
        "peaks": [short((p for p in peaks if p > 0), 3) for peaks in found.peaks[:, :top].tolist()],
        "words": over_represented(texts, chosen),
        "nearest": [[[i, round(c, 3)] for i, c in zip(*row)] for row in zip(indices.tolist(), cosines.tolist())],
        "maps": packed_maps(found, top),
    }


def files_of(path):
    """The folder beside a page in which its pictures are, where they are not in it."""
    return path.with_name(path.stem + "_files")


def write_page(path, about, data, pictures, max_mb):
    """Write the page of `describe`'s data, with the pictures (files as bytes, None for none) in it, or beside it if it would
    be above `max_mb`: the folder in which they are, or None.

    Whatever comes from outside is data: JSON without a "<", which the page's script shows as text alone. The page may run that
    one script, which its hash names, and load pictures from its own bytes or from beside it, nothing else.
    """
    folder, text = files_of(path), json.dumps(data, separators=(",", ":"), allow_nan=False)
    beside = len(text) + sum(len(picture or b"") for picture in pictures) * 4 / 3 > max_mb * 1e6
    sources = []
    for old in folder.glob("*.webp"):  # of the page that this one takes the place of
        if old.stem.isdigit():
            old.unlink()
    for number, picture in enumerate(pictures):
        if beside and picture:
            folder.mkdir(exist_ok=True)
            (folder / f"{number}.webp").write_bytes(picture)
        inline = lambda: f"data:image/webp;base64,{base64.b64encode(picture).decode()}"  # noqa: B023
        sources.append(picture and (f"{quote(folder.name)}/{number}.webp" if beside else inline()))
    template = (HERE / "features.html").read_text("utf-8")
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1] for tag in ("style", "script"))
    style, script = (base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in (style, script))
    images = "data: 'self' file:" if beside else "data:"
    policy = f"default-src 'none'; img-src {images}; style-src 'sha256-{style}'; "
    policy += f"script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
    text = json.dumps(data | {"name": path.stem, "pictures": sources}, separators=(",", ":")).replace("<", "\\u003c")
    fields = {"title": html.escape(path.stem), "about": html.escape(json.dumps(about)), "policy": policy, "data": text}
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)
    write_atomically(path, page.encode())
    if not beside and folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    return folder if beside else None


def check_page(path, about):
    """UsageError where the page, or what is in its place, is not of this SAE and these activations. Makes its folder."""
    whose = lambda about: [Path(p).resolve() for p in (about["sae"], *about["data"])]
    if path.exists():
        try:
            before = whose(json.loads(html.unescape(ABOUT.search(path.read_bytes()[:65536])[1].decode())))
        except (TypeError, KeyError, ValueError):
            before = None
        if before != whose(about):
            raise UsageError(f"{path} is the page of another SAE or other activations; use another --out_dir")
    elif files_of(path).exists():
        raise UsageError(f"{files_of(path)} is there, and {path} is not: use another --out_dir")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out_dir {path.parent} can't be made: {error.strerror}") from None


def main(cfg):
    # 1. The SAE, and all vectors of its hook point
    check_positive(cfg, "top_images", "map_size", "picture_size", "batch_size", "decode_batch_size")
    if not cfg.max_mb > 0:
        raise UsageError(f"--max_mb {cfg.max_mb:g}: expected more than 0")
    device = resolve_device(cfg.device)
    folder = Path(cfg.sae) if cfg.sae else newest_sae()
    sae = Sae.load_from_disk(folder, device)
    names = cfg.data or sae.cfg.get("data")
    if not names:
        raise UsageError(f"{folder} does not say which files it was trained on; name some with --data")
    sets = open_activations(names)
    if len(sets) > 1:
        raise UsageError(f"--data holds {len(sets)} hook points; expected the files of one")
    activations = sets[0]
    if activations.d != sae.d_in:
        raise UsageError(f"{activations.paths[0]} holds vectors of width {activations.d}, and the SAE is of {sae.d_in}")
    path = Path(cfg.out_dir) / f"{(folder if folder.is_dir() else folder.parent).resolve().name}.html"
    about = {"sae": str(folder), "data": activations.paths}
    check_page(path, about)
    sources = [open_source(name, cfg.map_size) for name in activations.paths]

    # 2. Their numbers and maps; fewer of these where the page would be too large without any picture
    found, top = scan(sae, activations, sources, cfg.top_images, cfg.batch_size), cfg.top_images
    shown, data = describe(found, sae, activations, sources, top)
    while len(json.dumps(data)) > cfg.max_mb * 1e6 and top > 1:
        top = -(-top // 2)
        shown, data = describe(found, sae, activations, sources, top)
    if top < cfg.top_images:
        print(f"note: {top} images a feature, not {cfg.top_images}: with those the page would be above --max_mb {cfg.max_mb:g}")

    # 3. The pictures of the prompts that are shown
    pictures, note = pictures_of(cfg, sources, shown, device) if cfg.pictures else ({}, "")
    data["note"] = note and f"{'no pictures' if not pictures else 'some pictures are missing'}: {note}"
    if note:
        print(f"note: {data['note']}")

    # 4. The page
    files = write_page(path, about, data, [pictures.get(e) for e in shown], cfg.max_mb)
    alive = sum(density > 0 for density in data["density"])
    print(f"{folder}: {alive:,} of {sae.num_latents:,} features are active on {int(found.vectors.sum()):,} vectors")
    print(
        f"saved in {path} ({path.stat().st_size / 1e6:.1f} MB), {len(pictures)} pictures {f'in {files}/' if files else 'in it'}"
    )


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
