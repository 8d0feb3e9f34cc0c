"""Stage 6: look. Write one static page of an SAE's features: images, heat maps, time, words.

    python features.py                           # the newest SAE in saes/, on its training data
    python features.py --sae saes/mid_block_k32_M20480 --top_images 24
    python features.py --sae theirs --data activations/mid_block.npy  # of another package

In a notebook:

    page = main(Config(sae="saes/mid_block_k32_M20480"))

The page needs no server and no network. The script reads all vectors of the activation files once,
training and held-out ones alike, and computes the numbers of each feature from all of them:

    density   share of the vectors on which the feature is active, which means: not 0
    mean      mean activation over the vectors on which it is active
    max       largest activation
    time      mean activation over all vectors of each step
    map       mean activation of one prompt over the steps, and over the tokens in each cell
    images    the prompts whose maps have the highest peaks; the maps of a feature share one scale
    words     words that more of these prompts have than of the others: log-odds with a prior, at
              least 1.96 standard deviations above 0
    telling   the standard deviations of the best word (1 without words) x -log10(density) x mean
              peak of the maps; the page is sorted by it, and opens on the largest
    strongest of a text stream: the texts of the tokens where its maps peak
    nearest   the features whose rows of W_dec have the largest cosine with its own

For each column of the data set that holds numbers, such as an angle, the page lists the features
whose mean activation goes with it, by rank correlation, beside the best single dimension of the
activations and shuffled values (analysis/columns.py).

Reads   an SAE folder; activation files of collect.py (with prompts.jsonl and images/), or any .npy.
Writes  <out_dir>/<name of the SAE>.html.

For a text stream the page shows the words of each prompt, with the activation as the colour under
each. Of a video it shows some frames, each with the map of the latent frame that covers it. Of
audio it has a player, the spectrogram, and a map along time. If only a part of the tokens was
stored, a cell without any of them is blank. Without images/ the page has maps and words only. It
gives no names to features, and the script changes no SAE.

Source: Monroe, Colaresi & Quinn 2008 (Political Analysis 16), equations 16 to 22, for the log-odds.
The page's template is analysis/features.html.
"""

import base64
import hashlib
import html
import io
import json
import linecache
import math
import re
import wave
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cli import HERE, answer_help, check_positive, resolve_device, run_script


@dataclass
class Config:
    # model
    sae: str | None = None
    """Show the SAE in this folder. If not given, the newest one in saes/ is taken."""

    transfer: bool = False
    """Use the SAE on purpose where it was not trained: at another hook point, or on a model with
    other weights."""

    # data
    data: list[str] = field(default_factory=list)
    """Read these activation files of one hook point. If not given, the SAE's training files are
    read."""

    # what to keep
    top_images: int = 12
    """Show this many images per feature. Raise it to see whether a feature means one thing."""

    map_size: int = 16
    """Divide a heat map into at most this many cells per side. The tokens in a cell are
    averaged. Frames of a video have half as many per side."""

    max_frames: int = 8
    """Show at most this many frames of a video, and as many maps. Raise it to see motion, lower it
    for a smaller page."""

    picture_size: int = 256
    """Shrink images and frames to at most this many pixels per side. Lower it for a smaller
    page."""

    # output
    out_dir: str = "features"
    """Write the page of each SAE into this folder."""

    # hardware
    batch_size: int = 4096
    """Encode this many vectors (tokens of a step) together. Lower it if the GPU's memory is too
    small. It changes no result."""

    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


if __name__ == "__main__":
    answer_help(Config)  # --help and a mistyped option are answered before torch is imported


import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from analysis.columns import (
    ColumnReport,
    ExampleMeans,
    best_features,
    choose_examples,
    numeric_columns,
)
from errors import UsageError, decimals
from sae import Sae, newest_sae
from store.activation_file import ActivationFile
from store.audio import (
    PICTURE_WIDTH,
    audio_picture,
    audio_seconds,
    encode_audio,
    read_audio,
    resample,
)
from store.collection import check_saved_images
from store.dataset import Activations
from store.disk import check_same, make_folder, write_atomically
from store.identity import activations_of
from store.images import image_path
from store.prompts import seen_text
from store.words import words_of

PAGE = HERE / "analysis/features.html"  # the template, with {{fields}}
ABOUT = re.compile(rb'<meta name="about" content="([^"]*)">')  # which SAE and data a page shows
CURVE = 50  # a time curve has at most this many points
LEVELS = 31  # a cell of a heat map has a level from 0 to this; fewer levels compress better
BLANK = "␣"  # a token of a text stream that is only spaces
NUM_WORDS = 6  # shown per feature, at most
NUM_NEAREST = 6  # shown per feature, at most
PRIOR = 10  # the prior of a word weighs as much as this many prompts
CUT_OFF = 0.85  # grey, where the model made audio that the pipeline cut off
SOUND_RATE = 16000  # samples per second of the page's audio, at most
MOST_SOUND = 48e6  # bytes of all audio in the page; more of it plays at a lower rate
SIGNIFICANT = 1.96  # standard deviations above 0 from which on a word is over-represented


# ------------------------------------------------------------------------------------ heat maps


class MapGrid(NamedTuple):
    """Where the tokens of an activation file lie in its heat maps."""

    size: tuple[int, int, int]
    """(frames, height, width) of the grid in tokens; for all but videos there is one frame. Of
    audio the height counts frequencies, and the width times."""

    shape: tuple[int, int, int]
    """(frames, height, width) of a map in cells."""

    ratio: float | None
    """Width / height of the grid, and so of the image. None for audio, and if the tokens lie in a
    line."""

    audio: dict[str, int] | None = None
    """Of audio: what diffusion/audio_span.py says of it, {} if nobody does. Then time runs to the
    right in the map, and frequency upwards. None if it is no audio."""

    is_time_first: bool = False
    """Of audio: tokens are numbered time by time, and not frequency by frequency."""

    @property
    def num_cells(self) -> int:
        """The number of cells in a map, over all of its frames."""
        return math.prod(self.shape)

    def cells_of(self, tokens: np.ndarray) -> np.ndarray:
        """Return the cell (n,) in which each token lies; tokens (n,) are numbered frame by frame,
        and in a frame row by row.

        For one frame of 2 x 4 tokens in 1 x 2 cells, tokens [0, 1, 2, 7] lie in cells [0, 0, 1, 1].
        """
        num_frames, height, width = self.size
        frame = tokens // (height * width) % num_frames
        row = tokens % (height * width) // width
        column = tokens % width
        if self.is_time_first:
            column = tokens // height % width
            row = tokens % height
        if self.audio is not None:
            row = height - 1 - row

        map_frames, map_height, map_width = self.shape
        frame = frame * map_frames // num_frames
        row = row * map_height // height
        column = column * map_width // width
        return (frame * map_height + row) * map_width + column


def map_grid(file: ActivationFile, map_size: int, max_frames: int = 1) -> MapGrid:
    """Return where the tokens of a file lie in its maps.

    An image's map has at most `map_size` cells per side. A video's has half of that, and at most
    `max_frames` frames. Audio and tokens in a line have at most map_size² cells. Raises UsageError
    for a folder of saved rows, whose rows can't be traced to prompts.
    """
    if file.path.is_dir():
        raise UsageError(
            f"{file.path}: features.py needs an .npy file; collect the activations anew"
        )

    num_frames, height, width = (1, 1, 1, *file.grid)[-3:]
    if file.meta.get("stream") == "text":
        # a cell for each token, which is a word
        return MapGrid((1, 1, width), (1, 1, width), ratio=None)
    audio = audio_of(file)
    if num_frames == height == 1:
        shape = (1, 1, min(width, map_size * map_size))
        return MapGrid((1, 1, width), shape, None, audio)
    if audio is not None:
        return audio_grid(height, width, map_size, audio)

    if num_frames > 1:
        map_size = max(1, map_size // 2)
    shrink = min(1, map_size / max(height, width))  # the shape of the image is kept
    num_rows = max(1, round(height * shrink))
    num_columns = max(1, round(width * shrink))
    shape = (min(num_frames, max_frames), num_rows, num_columns)
    return MapGrid((num_frames, height, width), shape, round(width / height, 3))


def audio_of(file: ActivationFile) -> dict[str, int] | None:
    """Return what a file's description says about its audio, {} if it does not know, None if it is
    not of audio."""
    saved = image_path(file.path.with_name("images"), 0)
    if saved is not None and saved.suffix == ".wav":
        return file.meta.get("audio", {})
    return file.meta.get("audio")


def audio_grid(first_side: int, second_side: int, map_size: int, audio: dict) -> MapGrid:
    """Return the grid of audio whose tokens have a time and a frequency.

    No file says which side is time. It is taken to be the longer one, because seconds of audio have
    more times than a spectrogram has bands; of equal sides it is the first.
    """
    is_time_first = first_side >= second_side
    num_times = max(first_side, second_side)
    num_frequencies = min(first_side, second_side)
    map_height = min(num_frequencies, max(1, map_size // 4))
    map_width = min(num_times, 4 * map_size)
    size = (1, num_frequencies, num_times)
    return MapGrid(size, (1, map_height, map_width), None, audio, is_time_first)


# ---------------------------------------------------------------------------- numbers of features


class Statistics:
    """The numbers of all features, gathered from one example after the other.

    An example is one prompt, or one of several images of a prompt. Sizes: M features, S steps, C
    cells of a map, and the N examples per feature whose maps have the highest peaks.
    """

    def __init__(
        self,
        num_features: int,
        num_steps: int,
        num_examples: int,
        num_cells: int,
        device: torch.device,
    ):
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        wide = torch.float64
        if device.type == "mps":
            wide = torch.float32  # MPS has no float64

        self.counts = zeros(num_features, num_steps, dtype=torch.int64)
        """(M, S): the number of vectors on which the feature is active."""

        self.sums = zeros(num_features, num_steps, dtype=wide)
        """(M, S): the sum of its activations."""

        self.vectors = zeros(num_steps, dtype=torch.int64)
        """(S,): the number of vectors of each step."""

        self.largest = zeros(num_features)
        """(M,): the largest activation."""

        self.peaks = zeros(num_features, num_examples)
        """(M, N): the peaks of the maps, 0 if there are fewer than N."""

        self.examples = zeros(num_features, num_examples, dtype=torch.int64) - 1
        """(M, N): the numbers of the examples, -1 if there are fewer than N."""

        self.maps = zeros(num_features, num_examples, num_cells, dtype=torch.uint8)
        """(M, N, C): their maps, of all frames; 255 is the map's own peak."""

        # of the example that is being read
        self.heat = zeros(num_features, num_cells)  # (M, C): sums of activations
        self.seen = zeros(num_cells)  # (C,): number of vectors

    def add(self, top_acts: Tensor, top_indices: Tensor, step: Tensor, cell: Tensor) -> None:
        """Add vectors of one example.

        top_acts, top_indices: (n, K), from the SAE. step, cell: int64 (n,), of each vector.
        """
        active = top_acts > 0
        acts = top_acts[active]
        features = top_indices[active]
        steps = step[:, None].expand_as(active)[active]
        cells = cell[:, None].expand_as(active)[active]
        num_steps = len(self.vectors)
        num_cells = len(self.seen)

        by_step = features * num_steps + steps
        self.counts.view(-1).index_add_(0, by_step, torch.ones_like(features))
        self.sums.view(-1).index_add_(0, by_step, acts.to(self.sums.dtype))
        self.vectors += torch.bincount(step, minlength=num_steps)
        self.largest.scatter_reduce_(0, features, acts, "amax")

        self.heat.view(-1).index_add_(0, features * num_cells + cells, acts)
        self.seen += torch.bincount(cell, minlength=num_cells)

    def finish(self, example: int) -> None:
        """Make the maps of the example whose vectors were added, and keep those with high peaks.

        A map that peaks above the lowest that the feature has so far takes its place.
        """
        maps = self.heat / self.seen.clamp_min(1)
        peak = maps.amax(1)
        lowest, slot = self.peaks.min(1)

        f = (peak > lowest).nonzero()[:, 0]
        self.peaks[f, slot[f]] = peak[f]
        self.examples[f, slot[f]] = example
        self.maps[f, slot[f]] = (255 * maps[f] / peak[f, None]).round().to(torch.uint8)

        self.heat.zero_()
        self.seen.zero_()

    def sort(self) -> None:
        """Sort each feature's examples by their peaks, the highest first; move all to the CPU."""
        order = self.peaks.sort(dim=1, descending=True, stable=True).indices
        self.peaks = self.peaks.gather(1, order).cpu()
        self.examples = self.examples.gather(1, order).cpu()
        self.maps = self.maps.gather(1, order[:, :, None].expand_as(self.maps)).cpu()

        self.counts = self.counts.cpu()
        self.sums = self.sums.cpu().double()
        self.vectors = self.vectors.cpu()
        self.largest = self.largest.cpu()

    @property
    def density(self) -> Tensor:
        """float64 (M,): share of the vectors on which each feature is active."""
        return self.counts.double().sum(1) / max(1, int(self.vectors.sum()))


@torch.no_grad()
def scan(
    sae: Sae,
    activations: Activations,
    grids: list[MapGrid],
    top_images: int,
    batch_size: int,
    means: ExampleMeans | None = None,
) -> Statistics:
    """Read every vector once and return the sorted statistics of all features.

    Examples are numbered through all files. grids: one per file. means: is filled with the mean
    activations of its examples. Raises UsageError for numbers that are not finite, and if the SAE
    needs whole samples and the files do not hold such.
    """
    num_examples = sum(file.P for file in activations.sources)
    num_cells = max(grid.num_cells for grid in grids)
    statistics = Statistics(
        sae.num_latents,
        max(1, len(activations.timesteps)),
        min(top_images, num_examples),
        num_cells,
        sae.W_dec.device,
    )
    if sae.takes_samples:
        activations.sample_tokens()  # raises the UsageError

    example = 0  # not counted by the bar, which counts nothing if TQDM_DISABLE is set
    with tqdm(total=num_examples, unit="prompt", desc="features") as bar:
        for number, (file, grid) in enumerate(zip(activations.sources, grids)):
            for p in range(file.P):
                wanted = None
                if means is not None and means.wants(example):
                    wanted = means
                scan_prompt(statistics, sae, activations, number, p, grid, batch_size, wanted)
                statistics.finish(example)
                if wanted is not None:
                    wanted.finish(example)
                example += 1
                bar.update()
    statistics.sort()
    return statistics


def scan_prompt(
    statistics: Statistics,
    sae: Sae,
    activations: Activations,
    number: int,
    p: int,
    grid: MapGrid,
    batch_size: int,
    means: ExampleMeans | None = None,
) -> None:
    """Add the vectors of prompt p of the file with this number to the statistics, and to `means`
    if it is given."""
    file = activations.sources[number]
    device = sae.W_dec.device
    num_tokens = file.T
    if file.lengths is not None:
        num_tokens = int(file.lengths[p])
    if sae.takes_samples:  # the latents of one step's tokens are chosen together
        batch_size = max(num_tokens, batch_size // max(1, num_tokens) * num_tokens)
    tokens_kept = None
    if file.tokens_kept is not None:
        tokens_kept = file.read_tokens_kept(p)

    for pieces in pieces_of(number, file, p, num_tokens, batch_size):
        x = activations.read(pieces).to(device).float()
        if not torch.isfinite(x).all():
            raise UsageError(f"{file.path}: prompt {p} holds numbers that are not finite")
        if sae.takes_samples:
            x = x.unflatten(0, (-1, num_tokens))
        top_acts, top_indices, *_ = sae.encode(x)
        if means is not None:
            means.add(x.flatten(0, -2), top_acts.flatten(0, -2), top_indices.flatten(0, -2))

        # row r of a file is token r % T of step r // T % S, and so on over the prompts
        rows = np.concatenate([np.arange(first, end) for _, first, end in pieces.tolist()])
        step = rows // file.T % file.S
        token = rows % file.T
        if tokens_kept is not None:
            token = tokens_kept[step, token]
        if not activations.timesteps:
            step = np.zeros_like(step)

        statistics.add(
            top_acts.flatten(0, -2),
            top_indices.flatten(0, -2),
            torch.from_numpy(step).to(device),
            torch.from_numpy(grid.cells_of(token)).to(device),
        )


def pieces_of(
    number: int, file: ActivationFile, p: int, num_tokens: int, size: int
) -> list[np.ndarray]:
    """Return the first `num_tokens` tokens of each step of prompt p as pieces for
    `Activations.read`.

    Each array (n, 3) holds file number, first row and end row of n pieces, together at most `size`
    vectors. A step with more tokens than that is cut into several pieces.
    """
    first_of_step = (p * file.S + np.arange(file.S))[:, None] * file.T
    starts = first_of_step + np.arange(0, num_tokens, size)
    ends = np.minimum(starts + size, first_of_step + num_tokens)
    pieces = np.stack([np.full(starts.size, number), starts.ravel(), ends.ravel()], 1)

    pieces_per_batch = max(1, size // max(1, num_tokens))
    batches = []
    for first in range(0, len(pieces), pieces_per_batch):
        batches.append(pieces[first : first + pieces_per_batch])
    return batches


# ----------------------------------------------------------------------------- words, neighbours


class PromptWord(NamedTuple):
    """A word that more of a feature's prompts have than of the others."""

    word: str

    count: int
    """How many of the feature's prompts have it."""

    deviations: float
    """Its log-odds, in standard deviations above 0."""


def over_represented(texts: list[str], chosen: Tensor) -> list[list[PromptWord]]:
    """Return the words that more of each feature's texts have than of the others, the best first.

    texts: one per example; equal texts count once. chosen: int (M, N), examples, -1 for none. A
    word that all texts have can't be over-represented, and a word of a single text is not counted.
    """
    numbers = {}  # of each distinct text
    number_of_example = []
    for text in texts:
        number_of_example.append(numbers.setdefault(text, len(numbers)))

    words_of_text = []
    num_with_word = Counter()
    for text in numbers:
        words = frozenset(words_of(text))
        words_of_text.append(words)
        num_with_word.update(words)

    words_of_feature = []
    for examples in chosen.tolist():
        own_texts = {number_of_example[e] for e in examples if e >= 0}
        words_of_feature.append(best_words(own_texts, words_of_text, num_with_word))
    return words_of_feature


def best_words(
    own_texts: set[int], words_of_text: list[frozenset[str]], num_with_word: Counter
) -> list[PromptWord]:
    """Return the over-represented words of one feature's texts, at most NUM_WORDS, the best first.

    num_with_word: how many of all distinct texts have each word. If the feature has all texts,
    there are no others to compare with, and no word is over-represented.
    """
    if len(own_texts) == len(words_of_text):
        return []
    counts = Counter()
    for number in own_texts:
        counts.update(words_of_text[number])

    best = []
    num_texts = len(words_of_text)
    for word, count in counts.items():
        if count < 2:
            continue  # one text proves nothing
        deviations = log_odds(count, len(own_texts), num_with_word[word], num_texts)
        if deviations >= SIGNIFICANT:
            best.append(PromptWord(word, count, float(deviations)))
    best.sort(key=lambda word: (-word.deviations, word.word))
    return best[:NUM_WORDS]


def log_odds(y: int, n: int, num_with_word: int, num_texts: int) -> float:
    """Return by how many standard deviations a word is over-represented in some of the texts.

    y of n chosen texts have the word, and z of m others. The prior a_w shares the weight a = PRIOR
    in proportion to all texts:

        delta    = logit((y + a_w) / (n + a)) - logit((z + a_w) / (m + a))
        variance = 1 / (y + a_w) + 1 / (z + a_w)
        result   = delta / sqrt(variance)

    Source: Monroe et al. 2008, here on how many texts have a word.
    """
    z = num_with_word - y
    m = num_texts - n
    prior = PRIOR * num_with_word / (num_texts + 1)
    odds_ratio = (y + prior) / (n + PRIOR - y - prior) * (m + PRIOR - z - prior) / (z + prior)
    return np.log(odds_ratio) / np.sqrt(1 / (y + prior) + 1 / (z + prior))


@torch.no_grad()
def nearest(W_dec: Tensor, n: int, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Return the n rows with the largest cosine to each row: indices (M, n) and cosines (M, n).

    A row is not its own neighbour; n is at most M - 1. Never more than block x M cosines are in
    memory.
    """
    W = torch.nn.functional.normalize(W_dec, dim=1)
    n = min(n, len(W) - 1)
    indices = []
    cosines = []
    for first in range(0, len(W), block):
        of_block = W[first : first + block] @ W.T
        of_block.diagonal(first).fill_(-2)  # itself
        top = of_block.topk(n, dim=1)
        indices.append(top.indices)
        cosines.append(top.values)
    return torch.cat(indices).cpu(), torch.cat(cosines).cpu()


# ------------------------------------------------------------------------------ what the page says


class Example(NamedTuple):
    """One prompt, or one of several images of a prompt."""

    file: int
    """The number of its activation file."""

    text: str
    """Its prompt, as far as the model saw it; "" if none is known."""

    caption: str
    """What stands under its image: the prompt, or else the name of a real image."""

    place: str
    """Where it comes from: file, row, seed."""

    image: Path | None
    """The file of its image, video or audio, which may be missing. None if collect.py did not write
    the activations."""

    tokens: dict[str, list[str]] | None = None
    """Of a text stream: for each tokenizer the text of each token, all together in the order of the
    map's cells. None if it is not known."""

    def pieces(self) -> list[str]:
        """Return the text of each token, of all tokenizers."""
        return [piece for pieces in (self.tokens or {}).values() for piece in pieces]


def list_examples(activations: Activations) -> list[Example]:
    """Return every row of the files as an Example, in the order in which `scan` numbers them."""
    examples = []
    for number, file in enumerate(activations.sources):
        folder = ""
        if len(activations.sources) > 1:
            folder = f"{file.path.parent.name}/ "
        for p in range(file.P):
            row = {}
            image = None
            if file.prompt_rows:
                row = file.prompt_rows[p]
                folder_of_images = file.path.with_name("images")
                image = image_path(folder_of_images, p) or folder_of_images / f"{p}.webp"
            place = f"{folder}row {p}"
            if "seed" in row:
                place += f", seed {row['seed']}"
            caption = str(row.get("prompt") or row.get("image") or "")
            tokens = tokens_of(file, p)
            examples.append(Example(number, seen_text(row), caption, place, image, tokens))
    return examples


def tokens_of(file: ActivationFile, p: int) -> dict[str, list[str]] | None:
    """Return the text of each token of prompt p of a text stream, {tokenizer: [text of each]}.

    None if collect.py did not store it (an earlier version may have stored a column of this name),
    if the rows are not those of the prompts, or if there are other numbers of tokens.
    """
    if file.lengths is None or file.meta.get("rows") != "cond" or not file.prompt_rows:
        return None
    tokens = file.prompt_rows[p].get("tokens")
    if not isinstance(tokens, dict) or sum(map(len, tokens.values())) != file.lengths[p]:
        return None
    return tokens


def describe(
    statistics: Statistics,
    sae: Sae,
    activations: Activations,
    grids: list[MapGrid],
    examples: list[Example],
) -> tuple[dict, list[int]]:
    """Return all that the page says, without the images, and the examples that it shows.

    The first is an object for JSON; the second holds numbers of examples in ascending order.
    """
    shown = sorted(set(statistics.examples[statistics.examples >= 0].tolist()))
    captions = []
    for e in shown:
        captions.append([examples[e].caption, examples[e].place, examples[e].file])
    features = f"{sae.num_latents:,} features, {sae.activation}, k = {sae.k}"
    vectors = f"{int(statistics.vectors.sum()):,} vectors of width {sae.d_in}"
    data = {
        "hook_name": activations.hook_name,
        "files": activations.paths,
        "about": f"{features}; {vectors}",
        "levels": LEVELS,
        "timesteps": [],
        "shapes": [grid.shape[1:] for grid in grids],
        "frames": [grid.shape[0] for grid in grids],
        "ratios": [grid.ratio for grid in grids],
        "audio": [describe_audio(grid) for grid in grids],
        "cells": statistics.maps.shape[2],
        "examples": captions,
    }
    if activations.timesteps:
        timesteps = coarse(np.array([activations.timesteps]))[0]
        data["timesteps"] = short(timesteps, 6)
    data.update(describe_numbers(statistics))
    data.update(describe_images(statistics, shown))

    seen = {}  # prompts of which the model saw only the beginning
    for i, e in enumerate(shown):
        text = examples[e].text
        if text and text != examples[e].caption:
            seen[i] = text
    if seen:
        data["seen"] = seen

    if any(file.lengths is not None for file in activations.sources):
        data.update(describe_tokens(statistics, examples, shown))

    words = over_represented([example.text for example in examples], statistics.examples)
    data["words"] = [[[word, count] for word, count, _ in of_feature] for of_feature in words]
    data["telling"] = short(telling(statistics, words))
    data["nearest"] = describe_nearest(sae)
    return data, shown


def describe_audio(grid: MapGrid) -> dict | None:
    """Return which seconds a map of audio stands for, None if it is none of audio.

    {"seconds": of the whole map, "first": the second at which the audio begins, "khz": the highest
    frequency of the spectrogram}; {} if nobody says it.
    """
    if grid.audio is None:
        return None
    if "num_samples" not in grid.audio:
        return {}
    rate = grid.audio["sampling_rate"]
    return {
        "seconds": round(grid.audio["num_samples"] / rate, 4),
        "first": round(grid.audio["first_sample"] / rate, 4),
        "khz": rate / 2000,
    }


def describe_numbers(statistics: Statistics) -> dict:
    """Return how often, how strongly and when each feature is active."""
    num_active = statistics.counts.double().sum(1)
    mean = statistics.sums.sum(1) / num_active.clamp_min(1)
    by_step = coarse((statistics.sums / statistics.vectors.double().clamp_min(1)).numpy())
    height = by_step.max(1)
    curves = np.rint(255 * by_step / height[:, None].clip(1e-300)).astype(np.uint8)
    return {
        "density": short(statistics.density.tolist()),
        "mean": short(mean.tolist()),
        "max": short(statistics.largest.tolist()),
        "height": short(height.tolist()),
        "curves": base64.b64encode(curves.tobytes()).decode(),
    }


def describe_images(statistics: Statistics, shown: list[int]) -> dict:
    """Return in which of the shown examples each feature is most active, and where in them."""
    position = {example: i for i, example in enumerate(shown)}
    top = []
    for examples in statistics.examples.tolist():
        top.append([position[e] for e in examples if e >= 0])
    peaks = []
    for of_feature in statistics.peaks.tolist():
        peaks.append(short([peak for peak in of_feature if peak > 0], 3))
    return {"top": top, "peaks": peaks, "maps": packed_maps(statistics)}


def rows_and_prompts(activations: Activations) -> tuple[list[dict], list[tuple[int, int]]]:
    """Return the line of prompts.jsonl of each example, {} if there is none, and what tells its
    prompt from others: (number of the file, number of the prompt in it)."""
    rows = []
    prompts = []
    for number, file in enumerate(activations.sources):
        for p in range(file.P):
            row = {}
            if file.prompt_rows:
                row = file.prompt_rows[p]
            rows.append(row)
            prompts.append((number, row.get("id", p)))
    return rows, prompts


def describe_column(report: ColumnReport) -> dict:
    """Return what the page says about a column of numbers."""
    dimension, raw_rho = report.raw
    return {
        "name": report.name,
        "examples": report.num_examples,
        "prompts": report.num_prompts,
        "features": [[f, round(rho, 3)] for f, rho in report.features],
        "raw": [dimension, round(raw_rho, 3)],
        "shuffled": round(report.shuffled, 3),
        "shuffles": report.num_shuffles,
    }


def column_line(report: ColumnReport) -> str:
    """Return one line about a column: the feature that goes with it best, and the controls."""
    dimension, raw_rho = report.raw
    best = "no feature is active"
    if report.features:
        feature, rho = report.features[0]
        best = f"feature {feature} has the rank correlation {rho:.2f}"
    return (
        f"column {report.name}: {best}; raw dimension {dimension} has {raw_rho:.2f}, and shuffled "
        f"values reach {report.shuffled:.2f}"
    )


def describe_tokens(
    statistics: Statistics, examples: list[Example], shown: list[int]
) -> dict[str, Any]:
    """Return the words of text streams: those of each shown example, and on which tokens each
    feature is strongest.

    "tokens" is {number of the shown example: [[tokenizer, [text of each token]], ...]}. "strongest"
    has for each feature [text, in how many of its examples the strongest token has it], the most
    frequent first. A text is as in the prompt, without the spaces around it; BLANK is a token that
    is only spaces.
    """
    tokens = {}
    for i, e in enumerate(shown):
        if examples[e].tokens is not None:
            tokens[i] = list(map(list, examples[e].tokens.items()))

    strongest = []
    best_cells = statistics.maps.argmax(2)
    for of_feature, cells in zip(statistics.examples.tolist(), best_cells.tolist()):
        counts = Counter()
        for e, cell in zip(of_feature, cells):
            pieces = examples[e].pieces() if e >= 0 else []
            if cell < len(pieces) and pieces[cell]:
                counts[pieces[cell].strip() or BLANK] += 1
        strongest.append([list(item) for item in counts.most_common(NUM_WORDS)])
    return {"tokens": tokens, "strongest": strongest}


def describe_nearest(sae: Sae) -> list[list[list]]:
    """Return the nearest features of each feature as [feature, cosine]."""
    result = []
    indices, cosines = nearest(sae.W_dec, NUM_NEAREST)
    for features, of_features in zip(indices.tolist(), cosines.tolist()):
        result.append([[f, round(cosine, 3)] for f, cosine in zip(features, of_features)])
    return result


def telling(statistics: Statistics, words: list[list[PromptWord]]) -> list[float]:
    """Return how telling each feature is, 0 for a dead one; the page sorts by it.

    It is the product of three factors: how clearly its best word is over-represented, in standard
    deviations (1 without words); how rarely it is active, -log10(density); and the mean peak of its
    maps. The second alone would put features first that are active on a few vectors by chance, and
    the third alone those that are active everywhere. On the toy the first 20 features by this order
    show dots, stripes, checks and colours, and each has its word in 12 of 12 prompts.
    """
    peaks = statistics.peaks.mean(1).tolist()
    scores = []
    for best, density, peak in zip(words, statistics.density.tolist(), peaks):
        clearness = best[0].deviations if best else 1.0
        rarity = 0.0
        if density > 0:
            rarity = -math.log10(density)
        scores.append(clearness * rarity * peak)
    return scores


def short(values: list[float], digits: int = 4) -> list[float]:
    """Return numbers for JSON, rounded to this many significant digits: 0.123456 -> 0.1235."""
    return [float(f"{value:.{digits}g}") for value in values]


def coarse(curves: np.ndarray) -> np.ndarray:
    """Return curves (M, S) with at most CURVE points, the means of neighbouring steps."""
    num_points = min(CURVE, curves.shape[1])
    points = []
    for steps in np.array_split(curves, num_points, axis=1):
        points.append(steps.mean(1))
    return np.stack(points, 1)


def packed_maps(statistics: Statistics) -> list[str]:
    """Return the maps of each feature as one string for the page, "" for a dead feature.

    The C bytes of each map, 0 to LEVELS, are deflated together and written in base64.
    """
    # the maps of a feature share the scale of the first, which has the highest peak
    relative = statistics.peaks / statistics.peaks[:, :1].clamp_min(1e-30)  # (M, N)
    relative = relative[:, :, None].numpy()

    strings = []
    for maps, scale in zip(statistics.maps.numpy(), relative):
        levels = np.rint(maps * scale * (LEVELS / 255)).astype(np.uint8)  # (N, C)
        levels = levels[scale[:, 0] > 0]
        if not levels.size:
            strings.append("")
            continue
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = deflate.compress(levels.tobytes()) + deflate.flush()
        strings.append(base64.b64encode(packed).decode())
    return strings


# ------------------------------------------------------------------------ images, videos and audio


class Shown(NamedTuple):
    """What the page shows of one example; nothing if its file is missing or damaged."""

    picture: bytes | None = None
    """An image as a WebP file; of audio the waveform above the spectrogram."""

    film: tuple[tuple[int, bytes], ...] = ()
    """Of a video some frames as WebP files, each with the number of the map's frame that covers
    it."""

    sound: bytes | None = None
    """Audio as a WAV file of one channel."""

    @property
    def is_missing(self) -> bool:
        return self.picture is None and not self.film


def read_shown(
    examples: list[Example], grids: list[MapGrid], cfg: Config
) -> tuple[list[Shown], str]:
    """Return what the page shows of each example, and why it shows nothing of some.

    The reason is "" if nothing is missing. grids: one per activation file.
    """
    sound_rate = choose_sound_rate([example.image for example in examples])
    shown = []
    missing = []
    for example in tqdm(examples, unit="picture", desc="pictures"):
        path = example.image
        grid = grids[example.file]
        if path is not None and path.suffix == ".wav":
            seen = show_audio(path, grid.audio or {}, sound_rate)
        else:
            seen = show_image(path, grid, cfg.picture_size, cfg.max_frames)
        shown.append(seen)
        if seen.is_missing:
            missing.append(path)
    if not missing:
        return shown, ""

    path = missing[0]
    reason = f"{path} is not there or can't be read; collect again to have it"
    if path is None:
        reason = "prompts.jsonl and images/ of collect.py are not beside the activations"
    extent = "some pictures are missing"
    if len(missing) == len(shown):
        extent = "no pictures"
    return shown, f"{extent}: {reason}"


def show_image(path: Path | None, grid: MapGrid, size: int, max_frames: int) -> Shown:
    """Return an image, or frames of a video, as WebP files of at most `size` pixels per side.

    Nothing is shown of a file that is missing or damaged: after a scan of hours, a page without one
    image is better than no page.
    """
    if path is None or not path.exists():
        return Shown()
    try:
        with Image.open(path) as opened:
            num_frames = getattr(opened, "n_frames", 1)
            if num_frames == grid.size[0] == 1:
                return Shown(picture=small_image(opened, size))
            film = []
            for frame, map_frame in frames_shown(num_frames, grid, max_frames):
                opened.seek(frame)
                film.append((map_frame, small_image(opened, size)))
            return Shown(film=tuple(film))
    except (OSError, ValueError, EOFError):
        return Shown()


def small_image(opened: Image.Image, size: int) -> bytes:
    """Return an image as a WebP file of at most `size` pixels per side."""
    image = opened.convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "webp", quality=85)
    return file.getvalue()


def frames_shown(num_frames: int, grid: MapGrid, max_frames: int) -> list[tuple[int, int]]:
    """Return (frame of the video, frame of the map that covers it) for each frame that is shown.

    They are all frames, or `max_frames`, so that each frame of the map is seen: for 9 frames over 3
    latent frames, and at most 3, it gives [(0, 0), (3, 1), (7, 2)]. A video of fewer frames than
    the map shows some of them twice.
    """
    num_latents = grid.size[0]
    map_frames = grid.shape[0]
    covered = [[] for _ in range(map_frames)]  # by each frame of the map
    for frame in range(num_frames):
        latent = latent_frame(frame, num_frames, num_latents)
        covered[latent * map_frames // num_latents].append(frame)

    count = max(map_frames, min(num_frames, max_frames))
    if min(len(frames) for frames in covered) == 0:
        return [(number * num_frames // count, number) for number in range(count)]
    if count == map_frames:
        return [(frames[len(frames) // 2], number) for number, frames in enumerate(covered)]

    shown = []
    evenly_spaced = np.linspace(0, num_frames - 1, count).round().astype(int).tolist()
    for map_frame, frames in enumerate(covered):
        shown += [(frame, map_frame) for frame in frames if frame in evenly_spaced]
    return shown


def latent_frame(frame: int, num_frames: int, num_latents: int) -> int:
    """Return which latent frame covers a frame of a video.

    Video VAEs encode the first frame alone, and then r frames together. It is so where the numbers
    fit, num_frames - 1 = r (num_latents - 1): of 9 frames in 3 latent frames, frame 0 lies in the
    first, 1 to 4 in the second, 5 to 8 in the third. Otherwise each covers the same share.
    """
    if num_latents > 1 and num_frames > 1 and (num_frames - 1) % (num_latents - 1) == 0:
        together = (num_frames - 1) // (num_latents - 1)
        return math.ceil(frame / together)
    return frame * num_latents // num_frames


def choose_sound_rate(paths: list[Path | None]) -> int:
    """Return at how many samples per second the page plays audio, so that all of it together has
    at most MOST_SOUND bytes."""
    seconds = 0.0
    for path in paths:
        if path is not None and path.suffix == ".wav":
            seconds += audio_seconds(path)
    if seconds == 0:
        return SOUND_RATE
    return min(SOUND_RATE, int(MOST_SOUND / (2 * seconds)))  # 2 bytes per sample


def show_audio(path: Path, span: dict, sound_rate: int) -> Shown:
    """Return the spectrogram and the sound of a WAV file; nothing if it is damaged.

    span: as `MapGrid.audio`. The picture is as wide as the heat
    map, and grey where the audio was cut off.
    """
    try:
        audio, sampling_rate = read_audio(path)
    except (OSError, EOFError, wave.Error):
        return Shown()
    num_samples = max(audio.shape[1], span.get("num_samples", 0))
    left = round(PICTURE_WIDTH * span.get("first_sample", 0) / num_samples)
    width = max(1, round(PICTURE_WIDTH * audio.shape[1] / num_samples))
    inside = audio_picture(audio, width)
    picture = torch.full((3, inside.shape[1], PICTURE_WIDTH), CUT_OFF)
    picture[:, :, left : left + width] = inside[:, :, : PICTURE_WIDTH - left]

    levels = (255 * picture).round().to(torch.uint8).movedim(0, -1).numpy()
    sound_rate = min(sound_rate, sampling_rate)
    sound = encode_audio(resample(audio.mean(0), sampling_rate, sound_rate), sound_rate)
    return Shown(small_image(Image.fromarray(levels), PICTURE_WIDTH), sound=sound)


# -------------------------------------------------------------------------------------- the page


def write_page(path: Path, about: dict, data: dict, shown: list[Shown]) -> None:
    """Write the page: the data of `describe`, and the images, frames and sounds in it.

    Whatever comes from outside is data: JSON without a "<", which the page's script shows as text
    alone. The page may run that one script, which its hash names, and show images and play audio
    from its own bytes, nothing else.
    """
    data = {**data, "name": path.stem}
    data["pictures"] = [data_url(seen.picture, "image/webp") for seen in shown]
    data["films"] = {}
    data["sounds"] = {}
    for i, seen in enumerate(shown):
        if seen.film:
            film = [[map_frame, data_url(image, "image/webp")] for map_frame, image in seen.film]
            data["films"][i] = film
        if seen.sound is not None:
            data["sounds"][i] = data_url(seen.sound, "audio/wav")
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)

    template = "".join(linecache.getlines(str(PAGE)))  # bundle.py puts the page there
    fields = {
        "title": html.escape(path.stem),
        "about": html.escape(json.dumps(about)),
        "policy": security_policy(template),
        "data": text.replace("<", "\\u003c"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)
    write_atomically(path, page.encode())


def data_url(data: bytes | None, kind: str) -> str | None:
    """Return the bytes of a file as an address that holds them, None for None."""
    if data is None:
        return None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def security_policy(template: str) -> str:
    """Return what a browser may do with the page: use its own style, script, images and audio
    only."""
    hashes = {}
    for tag in ("style", "script"):
        code = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        digest = hashlib.sha256(code.encode()).digest()
        hashes[tag] = base64.b64encode(digest).decode()
    rules = (
        "default-src 'none'",
        "img-src data:",
        "media-src data:",
        f"style-src 'sha256-{hashes['style']}'",
        f"script-src 'sha256-{hashes['script']}'",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(rules)


def check_page(path: Path, about: dict) -> None:
    """Make the page's folder. Raises UsageError if the path holds anything but a page of the same
    SAE and files."""
    remedy = "use another --out_dir"
    if path.exists():
        try:
            beginning = path.read_bytes()[:65536]
            text = html.unescape(ABOUT.search(beginning)[1].decode())
            theirs = resolved(json.loads(text))
        except (TypeError, KeyError, ValueError):
            raise UsageError(f"{path} is no page of features.py; {remedy}") from None
        check_same(path, theirs, resolved(about), remedy)
    make_folder(path.parent)


def resolved(about: dict) -> dict:
    """Return absolute paths, so that an SAE and its data are the same from whatever folder."""
    return {
        "sae": str(Path(about["sae"]).resolve()),
        "data": [str(Path(name).resolve()) for name in about["data"]],
    }


def page_path(out_dir: str, sae: Path) -> Path:
    """Return the path of an SAE's page: saes/a, or a file saes/a/sae.safetensors -> a.html."""
    folder = sae if sae.is_dir() else sae.parent
    return Path(out_dir) / f"{folder.resolve().name}.html"


def check_shown_images(activations: Activations, examples: list[Example], shown: list[int]) -> None:
    """Raise UsageError if images that the page shows are not those that collect.py saved."""
    first = 0  # the number of the file's first example
    for number, file in enumerate(activations.sources):
        rows = {e - first for e in shown if examples[e].file == number}
        check_saved_images(file.path.parent, file.meta, rows)
        first += file.P


def main(cfg: Config) -> Path:
    """Write the page of an SAE's features and return its path.

    Raises UsageError for options, an SAE and data that can't be used, and if the path holds another
    page.
    """
    # 1. The SAE, and all vectors of its hook point
    check_positive(cfg, "top_images", "map_size", "max_frames", "picture_size", "batch_size")
    device = resolve_device(cfg.device)
    folder = Path(cfg.sae) if cfg.sae else newest_sae()
    sae = Sae.load_from_disk(folder, device)
    activations = activations_of(sae, folder, cfg.data, cfg.transfer)
    path = page_path(cfg.out_dir, folder)
    about = {"sae": str(folder), "data": activations.paths}
    check_page(path, about)
    grids = [map_grid(file, cfg.map_size, cfg.max_frames) for file in activations.sources]

    # 2. The numbers and maps of all features
    columns = numeric_columns(*rows_and_prompts(activations))
    means = None
    if columns:
        chosen = choose_examples(columns, sae.num_latents)
        means = ExampleMeans(chosen, sae.num_latents, sae.d_in)
    statistics = scan(sae, activations, grids, cfg.top_images, cfg.batch_size, means)
    examples = list_examples(activations)
    data, shown = describe(statistics, sae, activations, grids, examples)
    reports = []
    if means is not None:
        reports = best_features(means, columns)
        data["columns"] = [describe_column(report) for report in reports]
    if activations.transfer:
        data["about"] += f"; transfer: {'; '.join(activations.transfer)}"

    # 3. The images, videos or audio of the prompts that are shown, and the page
    check_shown_images(activations, examples, shown)
    examples = [examples[e] for e in shown]
    seen, data["note"] = read_shown(examples, grids, cfg)
    if data["note"]:
        print(f"note: {data['note']}")
    write_page(path, about, data, seen)

    num_active = int((statistics.density > 0).sum())
    num_vectors = int(statistics.vectors.sum())
    num_images = sum(not one.is_missing for one in seen)
    megabytes = path.stat().st_size / 1e6
    print(
        f"{folder}: {num_active:,} of {sae.num_latents:,} features "
        f"are active on {num_vectors:,} vectors"
    )
    for report in reports:
        print(column_line(report))
    print(f"saved in {path} ({decimals(megabytes, 1)} MB), {num_images} pictures in it")
    return path


if __name__ == "__main__":
    run_script(main, Config)
