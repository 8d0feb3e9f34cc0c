"""The file side, reading: activation files checked, split by prompt, and their vectors in a seeded shuffle.

One data set is the vectors of one hook point, in one file of collect.py or several, or in any float `.npy` of two axes or more
whose last is the vectors' width. No pickle is read.
"""

import glob
import json
import os
from pathlib import Path

import numpy as np
import torch

from store import check_size, checksum, read_json

HELD_OUT = dict(share=0.1, at_least=100_000, at_most=1_000_000)  # vectors kept from training, in whole prompts
BLOCK_BYTES = 1 << 20  # read at once: large enough for a sequential read's speed, small enough to mix prompts


def read_description(path):
    """The `.json` beside an activation file, {} where there is none of ours. Raises ValueError if it is damaged."""
    path = Path(path).with_suffix(".json")
    meta = read_json(path) if path.exists() else {}
    if "checksum" not in meta and not {"format", "hook_name", "mean_norm"} <= meta.keys():
        return {}  # somebody else's
    if meta.get("checksum") != checksum(meta):
        raise ValueError(f"{path} was changed after it was written (its checksum differs); collect again or remove it")
    return meta


def open_file(path):
    """Map one activation file: its array (..., d), C order, read only, and its description ({} for a plain `.npy`).

    Raises ValueError for anything but floats of at least two axes, or bfloat16 bits that the description says are such.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix != ".npy":
        raise ValueError(f"{path} is not a finished .npy file")
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
    except OSError:
        raise
    except Exception as error:  # a damaged header can fail in any way; the reason is in the message
        raise ValueError(f"{path} is not a complete .npy file of numbers ({error})") from None
    meta = read_description(path)
    bfloat16 = array.dtype == np.uint16 and meta.get("dtype") == "bfloat16"
    if not bfloat16 and array.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"{path} holds {array.dtype}, expected float16, 32 or 64 (or bfloat16 with its .json)")
    if array.ndim < 2 or not array.flags.c_contiguous:
        raise ValueError(f"{path} has shape {array.shape}, expected (prompts, ..., d) or (vectors, d) in C order")
    if not array.size:
        raise ValueError(f"{path} is empty: shape {array.shape}")
    if list(meta.get("shape", array.shape)) != list(array.shape):
        raise ValueError(f"{path} has shape {list(array.shape)}, but its .json says {meta['shape']}")
    return array, meta


def newest_activations(folder="activations"):
    """The file that collect.py finished last in `folder`. Raises ValueError where there is none."""
    files = [path for path in Path(folder).glob("*.npy") if path.with_suffix(".json").exists()]
    if not files:
        raise ValueError(f"no activation file in {folder}/; run collect.py first, or name a .npy with --data")
    return max(files, key=lambda path: path.with_suffix(".json").stat().st_mtime)


def open_activations(data):
    """Open files, folders and globs as data sets, one a model and hook name (side, rows, stream): a list of Activations.

    Files without a description are one data set together, and a file that is named twice is read once. Raises ValueError
    where a glob or folder has no file, OSError where a file is not there.
    """
    paths = {}
    for item in map(str, data):
        found = [item]
        if Path(item).is_dir() or not Path(item).exists() and glob.has_magic(item):
            found = Path(item).glob("*.npy") if Path(item).is_dir() else map(Path, glob.glob(item))
            found = sorted(str(path) for path in found if holds_activations(path))
        if not found:
            raise ValueError(f"{item}: no .npy file there")
        for path in found:
            paths.setdefault(os.path.realpath(path), path)
    sets = {}
    for path in paths.values():
        meta = read_description(path)
        sets.setdefault(tuple(meta.get(key) for key in ("model", "hook_name", "side", "rows", "stream")), []).append(path)
    return [Activations(paths) for paths in sets.values()]


def holds_activations(path):
    """Whether a file that was found is meant: collect.py describes its activations, and not samples.npy or progress.npy."""
    side_file = path.name.endswith((".tokens.npy", ".timesteps.npy", ".lengths.npy"))
    return not side_file and (path.with_suffix(".json").exists() or not (path.parent / "collect.json").exists())


def prompts_of(path, array, meta):
    """What says which prompt each row of the file's first axis is of: its text in prompts.jsonl, or else a number."""
    listing, n = Path(path).with_name("prompts.jsonl"), int(meta.get("num_images_per_prompt", 1))
    if meta and listing.exists():
        try:
            texts = [json.loads(line).get("prompt") for line in listing.read_text("utf-8").splitlines()]
        except (ValueError, AttributeError):
            raise ValueError(f"{listing} can't be read; collect again, or move it away") from None
        if len(texts) == len(array) and None not in texts and len(set(texts)) > 1:
            return texts
    return [(path, row // n) for row in range(len(array))]


def read_lengths(path, array):
    """Tokens of each prompt (prompts,) that are no padding, of a file of text tokens."""
    path = Path(path).with_suffix(".lengths.npy")
    if check_size(path) != array.shape[:1]:
        raise ValueError(f"{path} is of another collection: {check_size(path)} for {array.shape[:1]}")
    return np.load(path, allow_pickle=False).clip(0, array.shape[2])


def read_timesteps(path, array, meta):
    """The scheduler's timestep of each step of a file of (prompts, steps, tokens, d), [] where it does not say."""
    times = meta.get("timesteps") or []
    return [float(t) for t in times] if array.ndim == 4 and len(times) == array.shape[1] else []


class Activations:
    """The vectors of one hook point, in one or several files, split into training and held-out prompts.

    The split is by prompt: all images of one (the first axis of an N-D file), and of its namesakes, fall on one side. A
    file of two axes or a single prompt is cut into 32 contiguous pieces instead. Held out is a seeded choice of
    HELD_OUT["share"] of the vectors in whole prompts, more where that is below `at_least` (up to a quarter and the rest
    of a prompt, never more than half), fewer where it is above `at_most`.

    Attributes: paths; hook_name ("" for plain files); d; num_vectors = num_training + num_held_out; whole_prompts, False where
    there were none to hold out; timesteps, one a step of the sampling, [] where the files do not say or differ.
    """

    def __init__(self, paths, seed=0):
        self.paths, self.rows, self.whole_prompts = [str(path) for path in paths], [], True
        units, prompts, steps = [], [], []  # (file, first row, end row), and which prompt that is of
        for file, path in enumerate(self.paths):
            array, meta = open_file(path)
            rows = array.reshape(-1, array.shape[-1])
            self.rows.append(rows)
            if not file:
                self.d, self.dtype, self.hook_name = rows.shape[1], rows.dtype, str(meta.get("hook_name", ""))
            if (rows.shape[1], rows.dtype) != (self.d, self.dtype):
                here, there = f"width {rows.shape[1]}, {rows.dtype}", f"width {self.d}, {self.dtype}"
                raise ValueError(f"{path} holds vectors of {here}, {self.paths[0]} of {there}")
            steps.append((read_timesteps(path, array, meta), array.shape[-2]))
            names = prompts_of(path, array, meta) if array.ndim > 2 else []
            if len(set(names)) < 2:
                names, self.whole_prompts = [(path, piece) for piece in range(min(32, len(rows)))], False
            cuts = np.arange(len(names) + 1) * len(rows) // len(names)
            first, end = cuts[:-1], cuts[1:]
            if meta.get("stream") == "text" and len(names) == len(array):  # without the padding of each prompt's steps
                first = np.arange(0, len(rows), array.shape[2])
                names = [name for name in names for _ in range(array.shape[1])]
                end = first + read_lengths(path, array).repeat(array.shape[1])
            units.append(np.stack([np.full(len(names), file), first, end], 1))
            prompts += names
        self.timesteps = steps[0][0] if all(times == steps[0][0] for times, _ in steps) else []
        self.tokens = [tokens for _, tokens in steps]
        units, numbers = np.concatenate(units), {}
        prompts = np.array([numbers.setdefault(name, len(numbers)) for name in prompts])
        if len(numbers) < 2:
            raise ValueError(f"{self.paths[0]} holds a single vector; there is nothing to train on")
        sizes = np.bincount(prompts, units[:, 2] - units[:, 1])
        self.num_vectors = int(sizes.sum())
        order = np.random.default_rng([seed, 0]).permutation(len(sizes))
        wanted = max(HELD_OUT["share"] * self.num_vectors, min(HELD_OUT["at_least"], self.num_vectors / 4))
        enough = np.searchsorted(np.cumsum(sizes[order]), min(wanted, HELD_OUT["at_most"])) + 1
        chosen = order[: min(enough, len(order) - 1)]
        held_out = np.isin(prompts, chosen)
        if 2 * sizes[chosen].sum() > self.num_vectors:  # few prompts of very different sizes
            held_out = ~held_out
        self.held_out_units, self.training_units = units[held_out], units[~held_out]
        self.num_held_out = int((self.held_out_units[:, 2] - self.held_out_units[:, 1]).sum())
        self.num_training = self.num_vectors - self.num_held_out

    def read(self, pieces):
        """Copy rows into one tensor (n, d) of the file's dtype (float32 for float64, which MPS can't hold).

        pieces (many, 3): file, first row, end row.
        """
        ends = np.cumsum(pieces[:, 2] - pieces[:, 1])
        out = np.empty((ends[-1], self.d), np.float32 if self.dtype == np.float64 else self.dtype)
        for (file, first, end), at in zip(pieces.tolist(), ends.tolist()):
            out[at - (end - first) : at] = self.rows[file][first:end]
        tensor = torch.from_numpy(out)
        return tensor.view(torch.bfloat16) if out.dtype == np.uint16 else tensor

    def steps_of(self, pieces):
        """The step of each row that `read` gives for the same pieces: int64 (n,), an index of `timesteps`; 0 without any."""
        count = max(1, len(self.timesteps))
        steps = [np.arange(first, end) // self.tokens[file] % count for file, first, end in pieces.tolist()]
        return np.concatenate(steps)

    def draw(self, n, seed=0):
        """Up to n training vectors, drawn one by one from all files and prompts, as pieces for `read`."""
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

    def sample_tokens(self):
        """Vectors of one (prompt, step). Raises ValueError where the files do not hold whole samples of one size."""
        units = np.concatenate([self.training_units, self.held_out_units])
        if not self.whole_prompts or len(set(self.tokens)) > 1 or ((units[:, 2] - units[:, 1]) % self.tokens[0]).any():
            raise ValueError(
                f"{self.paths[0]}: sample_topk needs files of whole samples, (prompts, steps, tokens, d) of one size"
            )
        return self.tokens[0]

    def held_out(self):
        """The held-out vectors, one prompt after another in the order of the files: tensors (rows, d)."""
        for unit in self.held_out_units:
            yield self.read(unit[None])

    def batches(self, batch_size, stop, start=0, seed=0, buffer_gb=2.0, tokens=1):
        """Training vectors `start` to `stop` of an endless seeded shuffle: (x (batch_size, d), step (batch_size,)), the last
        shorter. step: index of `timesteps`, None where there are none.

        Every vector comes once an epoch of `num_training`; a batch may span two epochs, so nothing is dropped. Where the
        files have timesteps, each stretch of a buffer holds the same share of every step. tokens: so many consecutive vectors
        stay together; all sizes are multiples of it. The order depends on the seed, the buffer's size and tokens alone:
        starting at any position gives what would have come.
        """
        parts, wanted = [], min(batch_size, stop - start)
        if wanted < 1:
            return
        for buffer, steps, order in self.buffers(start, seed, buffer_gb, tokens):
            while len(order) and wanted:
                take, order = order[:wanted], order[wanted:]
                parts.append((buffer.index_select(0, take), steps[take]))  # 3 times as fast as NumPy's indexing
                wanted -= len(take)
                if not wanted:
                    x, step = (found[0] if len(parts) == 1 else torch.cat(found) for found in zip(*parts))
                    yield x, step if self.timesteps else None
                    start, parts = start + len(x), []
                    wanted = min(batch_size, stop - start)
            if not wanted:
                return
            del buffer  # before the next is read, or there would be two in memory

    def buffers(self, start, seed, buffer_gb, tokens):
        """Endless (vectors, their steps, order) from position `start` on: an epoch's blocks in random order, by buffers.

        A buffer that holds all vectors is read once and shuffled anew every epoch.
        """
        row_bytes = self.d * self.dtype.itemsize
        blocks = []
        for file, first, end in self.training_units.tolist():
            cuts = np.append(np.arange(first, end, max(1, BLOCK_BYTES // (row_bytes * tokens)) * tokens), end)
            blocks.append(np.stack([np.full(len(cuts) - 1, file), cuts[:-1], cuts[1:]], 1))
        blocks = np.concatenate(blocks)
        count = max(1, -int(-self.num_training * row_bytes // (buffer_gb * 2**30)))
        epoch, skip = divmod(start, self.num_training)
        if count == 1:
            whole, steps = self.read(blocks), self.steps_of(blocks)
            while True:
                yield whole, torch.from_numpy(steps), shuffle(steps, tokens, [seed, 3, epoch])[skip:]
                epoch, skip = epoch + 1, 0
        while True:
            shuffled = np.random.default_rng([seed, 2, epoch]).permutation(blocks)
            ends = np.cumsum(shuffled[:, 2] - shuffled[:, 1])
            cuts = np.searchsorted(ends, np.arange(1, count) * self.num_training // count)
            for number, pieces in enumerate(np.split(shuffled, cuts)):
                n = int((pieces[:, 2] - pieces[:, 1]).sum())
                if skip < n:
                    steps = self.steps_of(pieces)
                    yield self.read(pieces), torch.from_numpy(steps), shuffle(steps, tokens, [seed, 3, epoch, number])[skip:]
                skip = max(0, skip - n)
            epoch += 1


def shuffle(steps, tokens, seed):
    """A random order (n,) of vectors of these steps (n,): `tokens` consecutive ones stay together, and the steps take turns."""
    rng, steps = np.random.default_rng(seed), steps[::tokens]
    order = rng.permutation(len(steps))
    if len(counts := np.bincount(steps)) > 1:
        by_step = np.argsort(steps[order], kind="stable")
        place = np.concatenate([(np.arange(count) + rng.random(count)) / max(count, 1) for count in counts])
        order = order[by_step[np.argsort(place)]]
    return torch.from_numpy((order[:, None] * tokens + np.arange(tokens)).reshape(-1))
