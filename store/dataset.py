"""The file side, reading: activation files found, split by prompt, and their vectors in a seeded
shuffle.

One data set is the vectors of one hook point, in one file of collect.py or several, in any float
`.npy` of two axes or more whose last is the vectors' width, or in a folder of Hugging Face
`datasets` rows. No pickle is read.
"""

import glob
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from errors import UsageError
from store.activation_file import (
    SIDE_FILES,
    hash_key,
    open_activation_file,
    read_description,
    read_pieces,
    read_prompts,
    refuse_unfinished,
)
from store.arrow import is_arrow
from store.disk import is_hidden
from store.shuffle import Reader

HELD_OUT = dict(
    share=0.1, at_least=100_000, at_most=1_000_000
)  # vectors kept from training, in whole prompts
READ_BYTES = 1 << 26  # that `held_out` reads at once


def newest_activations(folder="activations"):
    """What collect.py finished last in `folder`: a file, or, of a collection in several subfolders,
    a glob over these.

    Raises UsageError where there is none.
    """
    folder = Path(folder)
    described = [path for path in files_in(folder) if read_description(path)]
    if not described:
        raise UsageError(
            f"no activation file in {folder}/; run collect.py first, or name a .npy with --data"
        )
    newest = max(described, key=lambda path: path.with_suffix(".json").stat().st_mtime)
    return newest if newest.parent == folder else folder / "*" / newest.name


def files_in(folder):
    """The activation files of a folder, sorted; where it has none of its own, those of its
    subfolders.

    Raises UsageError where one of these folders holds an unfinished collection and no finished one.
    """
    found = own_files(folder)
    if found:
        return found
    return [
        path for inner in sorted(folder.glob("*")) if inner.is_dir() for path in own_files(inner)
    ]


def own_files(folder):
    """The activation files that lie in the folder itself, sorted. Raises UsageError where all are
    unfinished."""
    found = sorted(path for path in folder.glob("*.npy") if holds_activations(path))
    if not found:
        for partial in sorted(folder.glob("*.npy.partial")):
            if not is_hidden(partial):
                refuse_unfinished(partial)
    return found


def holds_activations(path):
    """Whether a file that was found is meant: in a folder of collect.py those that it describes,
    such as no samples.npy."""
    if path.suffix != ".npy" or path.name.endswith(SIDE_FILES) or is_hidden(path):
        return False
    return path.with_suffix(".json").exists() or not (path.parent / "collect.json").exists()


def find(item):
    """The files and saved data sets that a name, folder or glob means. Raises UsageError where
    there is none."""
    path = Path(item)
    if path.is_dir():
        found = [path] if is_arrow(path) else files_in(path)
    elif path.exists() or not glob.has_magic(item):
        found = [path]
    else:
        matches = [Path(match) for match in sorted(glob.glob(item))]
        found = [
            match
            for match in matches
            if (is_arrow(match) if match.is_dir() else holds_activations(match))
        ]
        for partial in [] if found else sorted(glob.glob(f"{item}.partial")):
            refuse_unfinished(partial)
    if not found:
        raise UsageError(f"{item}: no .npy file there")
    return found


def open_activations(data, seen=None):
    """Open files, folders and globs as data sets, one a model and hook name (side, rows, stream): a
    list of Activations.

    seen: hashes of the prompts of which none may be held out, see `Activations`. Files without a
    description are one data set together, and a file that is named twice is read once. Raises
    UsageError where a glob or folder has no file, OSError where a file is not there.
    """
    paths = {}
    for item in data:
        for path in find(str(item)):
            paths.setdefault(os.path.realpath(path), str(path))
    metas = {}
    for path in paths.values():
        metas[path] = (
            {"hook_name": Path(path).resolve().name} if is_arrow(path) else read_description(path)
        )
    known = {
        meta.get("model"): meta["fingerprint"] for meta in metas.values() if meta.get("fingerprint")
    }
    check_copies(metas)
    say_missing_shards(metas.values())
    sets = {}
    for path, meta in metas.items():
        weights = (
            meta.get("fingerprint") or known.get(meta.get("model")) or meta.get("model")
        )  # earlier versions know the name
        key = (weights, *(meta.get(name) for name in ("hook_name", "side", "rows", "stream")))
        sets.setdefault(key, []).append(path)
    return [Activations(paths, seen=seen) for paths in sets.values()]


def check_copies(metas):
    """Raise UsageError where two paths of {path: description} are the same collection's file, whose
    vectors would count twice."""
    first = {}
    for path, meta in metas.items():
        site = tuple(meta.get(name) for name in ("id", "hook_name", "side", "rows", "stream"))
        if meta.get("id") and first.setdefault(site, path) != path:
            raise UsageError(
                f"{first[site]} and {path} are copies of one collection, whose vectors would count twice; name one"
            )


def say_missing_shards(metas):
    """Print one line where files are shards of a collection (`collect.py --shard i/n`) of which
    others are not among them."""
    found = {}
    for meta in metas:
        if meta.get("shard"):
            index, count = map(int, meta["shard"].split("/"))
            found.setdefault(count, set()).add(index)
    for count, shards in found.items():
        missing = sorted(set(range(count)) - shards)
        if missing:
            print(
                f"note: of {count} shards of a collection {', '.join(map(str, missing))} are not among the files"
            )


def cut_unit(unit, most):
    """A unit (file, first row, end row) in pieces of at most so many rows, (n, 3); an empty one is
    one piece."""
    file, first, end = unit.tolist()
    begins = np.arange(first, max(end, first + 1), most)
    return np.stack([np.full(len(begins), file), begins, np.minimum(begins + most, end)], 1)


class Activations:
    """The vectors of one hook point, in one or several files, split into training and held-out
    prompts.

    The split is by prompt: all images of one (the first axis of an N-D file), and of its namesakes,
    fall on one side. A file of two axes or a single prompt is cut into 32 contiguous pieces
    instead. Held out is a seeded choice of HELD_OUT["share"] of the vectors in whole prompts, more
    where that is below `at_least` (up to a quarter and the rest of a prompt, never more than half),
    fewer where it is above `at_most`; a piece of a file without prompts is cut at that.

    seen: hashes (`hash_key`) of the prompts that an SAE was trained on. Then held out are the
    others, all of them up to HELD_OUT["at_most"] vectors, where every prompt has a text (or an
    image, or a seed) to tell it by.

    Attributes: paths; sources, an ActivationFile each; files, all their StoredRows; shapes, one a
    path; hook_name ("" for plain files); d; num_vectors = num_training + num_held_out;
    whole_prompts, False where there were none to hold out; unseen, whether what is held out is
    known from `seen`; training_prompts, hashes of the prompts that are not held out, None if
    unknown; num_prompts, 0 then; timesteps, one a step of the sampling, [] where the files do not
    say or differ.
    """

    def __init__(self, paths, seed=0, seen=None):
        self.paths, self.files = [str(path) for path in paths], []
        self.sources, units, prompts = [open_activation_file(path) for path in self.paths], [], []
        for path, source in zip(self.paths, self.sources):
            rows = source.files[0]
            if not self.files:
                self.d, self.dtype, self.hook_name = rows.width, rows.dtype, source.hook_name
            if (rows.width, rows.dtype) != (self.d, self.dtype):
                here, there = f"width {rows.width}, {rows.dtype}", f"width {self.d}, {self.dtype}"
                raise UsageError(f"{path} holds vectors of {here}, {self.paths[0]} of {there}")
            units.append(source.units + [len(self.files), 0, 0])
            prompts += source.prompts
            self.files += source.files
        times = [source.timesteps for source in self.sources]
        self.timesteps = times[0] if all(other == times[0] for other in times) else []
        self.tokens = [file.tokens for file in self.files]
        self.shapes = [list(source.shape) for source in self.sources]
        self.whole_prompts = all(source.whole_prompts for source in self.sources)
        self.num_prompts = len(set(prompts)) if self.whole_prompts else 0
        units, numbers = np.concatenate(units), {}
        prompts = np.array([numbers.setdefault(name, len(numbers)) for name in prompts])
        if len(numbers) < 2:
            raise UsageError(f"{self.paths[0]} holds a single vector; there is nothing to train on")
        sizes = np.bincount(prompts, units[:, 2] - units[:, 1])
        self.num_vectors = int(sizes.sum())
        order = np.random.default_rng([seed, 0]).permutation(len(sizes))
        wanted = max(
            HELD_OUT["share"] * self.num_vectors, min(HELD_OUT["at_least"], self.num_vectors / 4)
        )
        hashes = [hash_key(name) if isinstance(name, str) else None for name in numbers]
        known = self.whole_prompts and None not in hashes
        self.unseen = known and seen is not None
        if self.unseen:
            order = order[[hashes[i] not in seen for i in order]]
            wanted = math.inf
        enough = np.searchsorted(np.cumsum(sizes[order]), min(wanted, HELD_OUT["at_most"])) + 1
        chosen = order[: enough if self.unseen else min(enough, len(order) - 1)]
        held_out = np.isin(prompts, chosen)
        if (
            2 * sizes[chosen].sum() > self.num_vectors and not self.unseen
        ):  # few prompts of very different sizes
            held_out = ~held_out
        kept = set(prompts[~held_out].tolist())
        self.training_prompts = {hashes[i] for i in kept} if known else None
        self.transfer = []
        self.held_out_units, self.training_units = units[held_out], units[~held_out]
        self.shorten_held_out(HELD_OUT["at_most"])
        self.num_held_out = int((self.held_out_units[:, 2] - self.held_out_units[:, 1]).sum())
        self.num_training = self.num_vectors - self.num_held_out

    def shorten_held_out(self, most):
        """Give the ends of held-out pieces back to training where all are more than `most` vectors;
        prompts stay whole."""
        units = self.held_out_units
        sizes = units[:, 2] - units[:, 1]
        plain = np.repeat(
            [not source.whole_prompts for source in self.sources],
            [len(source.files) for source in self.sources],
        )
        kept = np.where(plain[units[:, 0]], sizes * most // max(most, sizes.sum()), sizes)
        if (kept == sizes).all():
            return
        ends = np.stack([units[:, 0], units[:, 1] + kept, units[:, 2]], 1)[kept < sizes]
        training = np.concatenate([self.training_units, ends])
        self.training_units = training[np.lexsort((training[:, 1], training[:, 0]))]
        self.held_out_units = np.stack([units[:, 0], units[:, 1], units[:, 1] + kept], 1)

    def read(self, pieces):
        """Copy rows into one tensor (n, d) of the file's dtype (float32 for float64, which MPS
        can't hold).

        pieces (many, 3): file, first row, end row. Raises UsageError where a file has become
        shorter, OSError where it can't be read.
        """
        out = read_pieces(self.files, pieces)
        if out.dtype == np.float64:
            out = out.astype(np.float32)
        tensor = torch.from_numpy(out)
        return tensor.view(torch.bfloat16) if out.dtype == np.uint16 else tensor

    def steps_of(self, pieces):
        """The step of each row that `read` gives for the same pieces: int64 (n,), an index of
        `timesteps`; 0 without any."""
        count = max(1, len(self.timesteps))
        found = []
        for file, first, end in pieces.tolist():
            before = self.files[file].first
            found.append(np.arange(before + first, before + end) // self.tokens[file] % count)
        return np.concatenate(found)

    def draw(self, n, seed=0):
        """Up to n training vectors, drawn one by one from all files and prompts, as pieces for
        `read`."""
        units = self.training_units
        ends = np.cumsum(units[:, 2] - units[:, 1])
        rng = np.random.default_rng([seed, 1])
        chosen = np.sort(rng.choice(self.num_training, min(n, self.num_training), replace=False))
        unit = np.searchsorted(ends, chosen, side="right")
        row = units[unit, 2] - (ends[unit] - chosen)
        return np.stack([units[unit, 0], row, row + 1], 1)

    def sample(self, n, seed=0):
        """The same vectors: float32 (n, d)."""
        return self.read(self.draw(n, seed)).float()

    def digest(self):
        """16 hex digits of a sample of the training vectors, of the steps' timesteps and of the
        number of tokens."""
        order = json.dumps([self.timesteps, self.tokens]).encode()
        return hashlib.sha256(self.sample(1024).numpy().tobytes() + order).hexdigest()[:16]

    def sample_tokens(self):
        """Vectors of one (prompt, step). Raises UsageError where the files do not hold whole
        samples of one size."""
        units = np.concatenate([self.training_units, self.held_out_units])
        if len(set(self.tokens)) > 1 or ((units[:, 2] - units[:, 1]) % self.tokens[0]).any():
            raise UsageError(
                f"{self.paths[0]}: sample_topk needs files of whole samples, (prompts, steps, tokens, d) of one size"
            )
        return self.tokens[0]

    def held_out(self):
        """The held-out vectors, one prompt after another in the order of the files: tensors (rows,
        d), of a huge one several."""
        most = max(1, READ_BYTES // self.sources[0].files[0].row_bytes)
        for unit in self.held_out_units:
            for piece in cut_unit(unit, most):
                yield self.read(piece[None])

    def rows_of_prompts(self):
        """The lines of prompts.jsonl of every image of all files, in their order: dicts. Raises
        UsageError where one has none."""
        return [
            row
            for source in self.sources
            for row in read_prompts(source.path, source.P)[: source.P]
        ]

    def read_image(self, index):
        """All vectors of one image, numbered through all files (prompts, steps, tokens, d): (steps,
        tokens, d), as in `read`.

        Padding of text is left out.
        """
        ends = np.cumsum([source.P for source in self.sources])
        number = int(np.searchsorted(ends, index, side="right"))
        source = self.sources[number]
        row = index - (ends[number] - source.P)
        num_real = source.T if source.lengths is None else int(source.lengths[row])
        first = (row * source.S + np.arange(source.S)) * source.T
        pieces = np.stack([np.full(source.S, number), first, first + num_real], 1)
        return self.read(pieces).view(source.S, num_real, self.d)

    def batches(
        self,
        batch_size,
        stop,
        start=0,
        seed=0,
        buffer_gb=2.0,
        tokens=1,
        share=(0, 1),
        pin=False,
        ahead=4,
    ):
        """Training vectors `start` to `stop` of an endless seeded shuffle: (x (batch_size, d), step
        (batch_size,)), the last shorter. step: index of `timesteps`, None where there are none.

        Every vector comes once an epoch of `num_training`; a batch may span two epochs, so nothing
        is dropped. Where the files have timesteps, each stretch of a buffer holds the same share of
        every step. tokens: so many consecutive vectors stay together; all sizes are multiples of
        it. The order depends on the seed, the buffer's size and tokens alone: starting at any
        position gives what would have come. See store/shuffle.py.

        share (i, n): of each batch only the i-th of n slices, cut at whole `tokens`; each process
        has a buffer of its own. pin: x lies in pinned memory, so that `x.to(device,
        non_blocking=True)` overlaps. ahead: batches that are prepared while one is used.

        Raises UsageError where a file got shorter, OSError where it can't be read.
        """
        reader = Reader(
            self.files, self.training_units, self.steps_of, tokens, seed, buffer_gb, pin
        )
        dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype
        dtype = torch.bfloat16 if dtype == torch.uint16 else dtype

        def typed():
            for x, step in reader.batches(batch_size, stop, start, share, ahead):
                x = x.view(dtype)
                yield x.float() if dtype == torch.float64 else x, step if self.timesteps else None

        return typed()
