"""Activation files for reading: find them, hold out some prompts, and read vectors in a shuffle.

    activations = open_activations(["activations/mid_block.npy"])[0]
    for x, step in activations.batches(batch_size=1024, stop=activations.num_training):
        ...                                    # x (1024, d): training vectors in a random order
    for x in activations.held_out():
        ...                                    # x (n, d): vectors of prompts kept from training

A data set is the vectors of one hook point. They lie in one or several files of collect.py, in any
float `.npy` of at least two axes whose last axis is the vectors' width, or in a folder of Hugging
Face `datasets` rows. No pickle is read. store/collection.py writes the files.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from errors import UsageError
from store.activation_file import (
    SIDE_FILES,
    ActivationFile,
    StoredRows,
    contents_checksum,
    follow_link,
    group_units,
    hash_key,
    is_saved_rows,
    open_activation_file,
    read_description,
    read_pieces,
    read_prompts,
    refuse_unfinished,
)
from store.disk import is_hidden
from store.shuffle import Reader

HELD_OUT = dict(share=0.1, at_least=100_000, at_most=1_000_000)
"""How many vectors are kept from training: a share of them, and limits. See `choose_held_out`."""

READ_BYTES = 1 << 26  # that `held_out` reads at once


def newest_activations(folder: str | Path = "activations") -> Path:
    """Return the activation file that collect.py finished last in `folder`.

    For a collection in several subfolders, such as the shards acts/shard0of2 and acts/shard1of2, it
    is a glob over these: acts/*/mid_block.npy. Raises UsageError if there is no such file.
    """
    folder = Path(folder)
    described = [path for path in files_in(folder) if read_description(path)]
    if not described:
        raise UsageError(
            f"no activation file in {folder}/; run collect.py first, or name a .npy with --data"
        )
    newest = max(described, key=lambda path: path.with_suffix(".json").stat().st_mtime)
    if newest.parent == folder:
        return newest
    return folder / "*" / newest.name


def files_in(folder: Path) -> list[Path]:
    """Return the activation files of a folder, sorted; if it has none, those of its subfolders.

    Raises UsageError if one of these folders holds an unfinished collection and no finished one.
    """
    files = files_directly_in(folder)
    if files:
        return files
    for subfolder in sorted(folder.glob("*")):
        if subfolder.is_dir():
            files += files_directly_in(subfolder)
    return files


def files_directly_in(folder: Path) -> list[Path]:
    """Return the activation files that lie in the folder itself, sorted.

    Raises UsageError if there are only unfinished ones.
    """
    files = sorted(path for path in folder.glob("*.npy") if holds_activations(path))
    if files:
        return files
    for partial in sorted(folder.glob("*.npy.partial")):
        if not is_hidden(partial):
            refuse_unfinished(partial)
    return []


def holds_activations(path: Path) -> bool:
    """Return whether a file that the user did not name, but whose folder, counts as an activation
    file.

    In a folder of collect.py these are the files with a description, so not samples.npy; in any
    other folder every .npy but the side files, such as x.tokens.npy.
    """
    if path.suffix != ".npy" or path.name.endswith(SIDE_FILES) or is_hidden(path):
        return False
    is_described = path.with_suffix(".json").exists()
    return is_described or not (path.parent / "collect.json").exists()


def find_paths(item: str) -> list[Path]:
    """Return the files and folders of saved rows that a name, a folder or a glob means.

    A name that is no glob is returned as it is, whether or not it exists. Raises UsageError if a
    folder or glob has no activation file.
    """
    path = Path(item)
    if path.is_dir():
        paths = [path] if is_saved_rows(path) else files_in(path)
    elif path.exists() or not glob.has_magic(item):
        paths = [path]
    else:
        paths = match_glob(item)
    if not paths:
        raise UsageError(f"{item}: no .npy file there")
    return paths


def match_glob(pattern: str) -> list[Path]:
    """Return the activation files and folders of saved rows that match a glob, sorted.

    Raises UsageError if there are none, but an unfinished file matches.
    """
    paths = []
    for path in map(Path, sorted(glob.glob(pattern))):
        if is_saved_rows(path) or holds_activations(path):
            paths.append(path)
    if not paths:
        for partial in sorted(glob.glob(f"{pattern}.partial")):
            refuse_unfinished(partial)
    return paths


def open_activations(
    data: Iterable[str | Path], seen: set[str] | None = None
) -> list["Activations"]:
    """Open files, folders and globs as data sets: one for each model and hook point.

    Files without a description are one data set together. A file that is named twice is read once,
    and a link to an activation file stands for the file (see `follow_link`).

    seen: hashes (`hash_key`) of prompts that must not be held out, because an SAE was trained on
    them, see `Activations`. Raises UsageError if a glob or folder has no file, or if two files are
    copies of each other; OSError if a file is not there.
    """
    metas = {}  # {path: description}
    real_paths = set()
    for item in data:
        for path in map(follow_link, find_paths(str(item))):
            real_path = os.path.realpath(path)
            if real_path in real_paths:
                continue
            real_paths.add(real_path)
            if is_saved_rows(path):
                # no description: folders of saved rows with one name are one data set
                metas[str(path)] = {"hook_name": path.resolve().name}
            else:
                metas[str(path)] = read_description(path)
    check_copies(metas)
    say_missing_shards(metas.values())

    data_sets = {}  # {model and hook point: paths}
    fingerprints = fingerprints_of(metas.values())
    for path, meta in metas.items():
        model = meta.get("fingerprint") or fingerprints[meta.get("model")]
        hook_point = [meta.get(name) for name in ("hook_name", "side", "rows", "stream")]
        if meta.get("stream") == "text":
            hook_point.append(meta.get("padding", True))
        key = (model, *hook_point)
        data_sets.setdefault(key, []).append(path)
    for paths in data_sets.values():
        check_equal_contents(paths)
    return [Activations(paths, seen=seen) for paths in data_sets.values()]


def fingerprints_of(metas: Iterable[dict]) -> dict[str | None, str | None]:
    """Return {name of a model: fingerprint of its weights} for the models of some descriptions.

    Earlier versions wrote the name alone. Where no description has a fingerprint, the name takes
    its place: two descriptions {"model": "a", "fingerprint": "12ab"} and {"model": "b"} give
    {"a": "12ab", "b": "b"}.
    """
    fingerprints = {}
    for meta in metas:
        model = meta.get("model")
        fingerprints.setdefault(model, model)
        if meta.get("fingerprint"):
            fingerprints[model] = meta["fingerprint"]
    return fingerprints


def check_copies(metas: dict[str, dict]) -> None:
    """Raise UsageError if two paths of {path: description} are copies of one collection's file.

    Their vectors would count twice.
    """
    first_path = {}
    for path, meta in metas.items():
        if not meta.get("id"):
            continue
        key = tuple(meta.get(name) for name in ("id", "hook_name", "side", "rows", "stream"))
        other = first_path.setdefault(key, path)
        if other != path:
            raise UsageError(
                f"{other} and {path} are copies of one collection, "
                "whose vectors would count twice; name one"
            )


def check_equal_contents(paths: list[str]) -> None:
    """Raise UsageError if two files, or two folders of saved rows, have the same contents.

    Without prompts, equal vectors would lie on both sides of the split. paths: of one data set; two
    hook points can have equal vectors. Only files of the same size are read, see
    `contents_checksum`.
    """
    paths_by_size = {}
    for path in paths:
        sizes = tuple(file.stat().st_size for file in files_with_rows(path))
        paths_by_size.setdefault(sizes, []).append(path)
    for same_size in paths_by_size.values():
        if len(same_size) == 1:
            continue
        first_path = {}
        for path in same_size:
            contents = tuple(contents_checksum(file) for file in files_with_rows(path))
            other = first_path.setdefault(contents, path)
            if other != path and contents:
                raise UsageError(
                    f"{other} and {path} have the same contents, "
                    "so their vectors would count twice; name one"
                )


def files_with_rows(path: str) -> list[Path]:
    """Return the files that hold the numbers of a path: itself, or the .arrow files of a folder.

    [] if it is not there; whoever opens it says so.
    """
    path = Path(path)
    if path.is_dir():
        return sorted(path.glob("*.arrow"))
    return [path] if path.exists() else []


def say_missing_shards(metas: Iterable[dict]) -> None:
    """Print one line if the files are shards of a collection, but not all of them.

    Shards are made by `collect.py --shard i/n`; their descriptions say for example "0/2".
    """
    shards_by_count = {}
    for meta in metas:
        if meta.get("shard"):
            index, count = map(int, meta["shard"].split("/"))
            shards_by_count.setdefault(count, set()).add(index)
    for count, shards in shards_by_count.items():
        missing = sorted(set(range(count)) - shards)
        if missing:
            numbers = ", ".join(map(str, missing))
            print(f"note: of {count} shards of a collection {numbers} are not among the files")


def cut_unit(unit: np.ndarray, most: int) -> np.ndarray:
    """Cut a unit (file, first row, end row) into pieces of at most `most` rows: (n, 3).

    For [2, 0, 5] and 2 it gives [[2, 0, 2], [2, 2, 4], [2, 4, 5]]. An empty unit is one piece.
    """
    file, first, end = unit.tolist()
    starts = np.arange(first, max(end, first + 1), most)
    ends = np.minimum(starts + most, end)
    return np.stack([np.full(len(starts), file), starts, ends], 1)


def choose_held_out(sizes: np.ndarray, seed: int, is_unseen: np.ndarray | None) -> np.ndarray:
    """Choose whole prompts to keep from training: bool (prompts,).

    sizes (prompts,): how many vectors each prompt has. Prompts are taken in an order drawn from
    `seed` until they have HELD_OUT["share"] of all vectors. If that is below `at_least`, more are
    taken: up to `at_least`, but not more than a quarter of the vectors and the rest of the last
    prompt. If it is above `at_most`, fewer are taken. At least one prompt is left for training, and
    the smaller side is held out. For 20 prompts of 1,000 vectors, 5 are held out: a tenth is below
    `at_least`, and a quarter is the most.

    is_unseen: bool (prompts,), which prompts an SAE was not trained on. Then these alone are held
    out, all of them up to `at_most`. None if that does not matter.
    """
    num_vectors = int(sizes.sum())
    order = np.random.default_rng([seed, 0]).permutation(len(sizes))
    if is_unseen is not None:
        order = order[is_unseen[order]]
        wanted = HELD_OUT["at_most"]
        most_prompts = len(order)
    else:
        at_least = min(HELD_OUT["at_least"], num_vectors / 4)
        wanted = max(HELD_OUT["share"] * num_vectors, at_least)
        wanted = min(wanted, HELD_OUT["at_most"])
        most_prompts = len(order) - 1

    vectors_so_far = np.cumsum(sizes[order])
    num_prompts = np.searchsorted(vectors_so_far, wanted) + 1
    chosen = order[: min(num_prompts, most_prompts)]

    is_held_out = np.zeros(len(sizes), bool)
    is_held_out[chosen] = True
    if is_unseen is None and 2 * sizes[chosen].sum() > num_vectors:
        return ~is_held_out  # the last prompt was far larger than the others
    return is_held_out


def hashes_of_groups(prompts: list[tuple], numbers: list[int]) -> list[set[str]] | None:
    """Return the hashes of the keys of each group; None if a key is not a text, image or seed.

    prompts (n,): the keys of each unit. numbers (n,): the group of each, see `group_units`.
    """
    hashes = [set() for _ in range(max(numbers) + 1)]
    for keys, number in dict.fromkeys(zip(prompts, numbers)):
        for key in keys:
            if not isinstance(key, str):
                return None
            hashes[number].add(hash_key(key))
    return hashes


class Activations:
    """The vectors of one hook point, from one or several files, split into training and held-out.

    The split is by prompt (see `choose_held_out`): all images of a prompt, in any of the files,
    fall on one side, and so do all captions of a real image. A file of two axes, or of a single
    prompt, is cut into 32 contiguous pieces, which take the place of prompts; a held-out piece that
    is larger than HELD_OUT["at_most"] is shortened.

    paths: activation files of one width and dtype. seed: of the choice. seen: hashes (`hash_key`)
    of the prompts that an SAE was trained on; where every prompt can be told from the others by its
    text, image or seed, only other prompts are held out. Raises UsageError for files that can't be
    read or do not fit together, and for a single vector.
    """

    paths: list[str]
    sources: list[ActivationFile]
    """One opened file per path."""

    files: list[StoredRows]
    """All `StoredRows` of the sources. Pieces and units name a file by its index in this list."""

    shapes: list[list[int]]
    """The shape of each path's array."""

    hook_name: str
    """"" for plain files."""

    d: int
    """Width of a vector."""

    timesteps: list[float]
    """The scheduler's value at each step; [] if the files do not say it, or differ."""

    num_vectors: int
    """num_training + num_held_out."""

    num_prompts: int
    """0 if `whole_prompts` is False."""

    whole_prompts: bool
    """Whether what is held out are whole prompts, and not pieces or rows."""

    unseen: bool
    """Whether it is known, from `seen`, that an SAE has not seen what is held out."""

    training_prompts: set[str] | None
    """Hashes of the keys (`prompt_keys`) of what is not held out; None if the files do not say
    their prompts."""

    transfer: list[str]
    """Why the files do not belong to an SAE that is used on them on purpose; see identity.py."""

    training_units: np.ndarray
    """(n, 3): file, first row and end row of what is trained on."""

    held_out_units: np.ndarray
    """(n, 3): the same of what is held out."""

    def __init__(
        self, paths: Iterable[str | Path], seed: int = 0, seen: set[str] | None = None
    ) -> None:
        self.paths = [str(path) for path in paths]
        self.sources = [open_activation_file(path) for path in self.paths]
        self.check_vectors()
        first_rows = self.sources[0].files[0]
        self.d = first_rows.width
        self.dtype = first_rows.dtype
        self.hook_name = self.sources[0].hook_name
        self.transfer = []

        self.files = []
        units = []
        prompts = []
        for source in self.sources:
            units.append(source.units + [len(self.files), 0, 0])
            prompts += source.prompts
            self.files += source.files
        self.tokens = [file.tokens for file in self.files]
        self.shapes = [list(source.shape) for source in self.sources]

        self.timesteps = self.sources[0].timesteps
        if any(source.timesteps != self.timesteps for source in self.sources):
            self.timesteps = []
        self.whole_prompts = all(source.whole_prompts for source in self.sources)
        self.split(np.concatenate(units), prompts, seed, seen)

    def check_vectors(self) -> None:
        """Raise UsageError if the files hold vectors of different widths or dtypes."""
        first = self.sources[0].files[0]
        for path, source in zip(self.paths, self.sources):
            rows = source.files[0]
            if (rows.width, rows.dtype) != (first.width, first.dtype):
                raise UsageError(
                    f"{path} holds vectors of width {rows.width}, {rows.dtype}, "
                    f"{self.paths[0]} of width {first.width}, {first.dtype}"
                )

    def split(self, units: np.ndarray, prompts: list, seed: int, seen: set[str] | None) -> None:
        """Divide the units (n, 3) into `training_units` and `held_out_units`, and count both.

        prompts (n,): the keys of each unit. seed, seen: see `Activations`. Raises UsageError if
        there is a single group of units, which can't be divided.
        """
        prompts, groups = group_units(prompts)
        numbers = np.array(groups)
        num_groups = int(numbers.max()) + 1
        if num_groups < 2:
            raise UsageError(f"{self.paths[0]} holds a single vector; there is nothing to train on")
        sizes = np.bincount(numbers, units[:, 2] - units[:, 1])
        self.num_prompts = num_groups if self.whole_prompts else 0

        hashes = None
        if self.whole_prompts:
            hashes = hashes_of_groups(prompts, groups)
        self.unseen = hashes is not None and seen is not None
        is_unseen = None
        if self.unseen:
            is_unseen = np.array([group.isdisjoint(seen) for group in hashes])

        is_held_out = choose_held_out(sizes, seed, is_unseen)
        self.training_prompts = None
        if hashes is not None:
            trained = [hashes[number] for number in np.flatnonzero(~is_held_out)]
            self.training_prompts = set().union(*trained)
        self.held_out_units = units[is_held_out[numbers]]
        self.training_units = units[~is_held_out[numbers]]
        self.shorten_held_out(HELD_OUT["at_most"])
        held_out_sizes = self.held_out_units[:, 2] - self.held_out_units[:, 1]
        self.num_vectors = int(sizes.sum())
        self.num_held_out = int(held_out_sizes.sum())
        self.num_training = self.num_vectors - self.num_held_out

    def shorten_held_out(self, most: int) -> None:
        """Give the ends of held-out pieces back to training if they are more than `most` vectors.

        Whole prompts stay whole: only pieces of files without prompts are shortened, all by the
        same factor. For one held-out piece of rows 0 to 100 and `most` 60, rows 60 to 100 are
        trained on.
        """
        units = self.held_out_units
        sizes = units[:, 2] - units[:, 1]
        is_piece = []  # per file
        for source in self.sources:
            is_piece += [not source.whole_prompts] * len(source.files)
        shortened = sizes * most // max(most, sizes.sum())
        new_sizes = np.where(np.array(is_piece)[units[:, 0]], shortened, sizes)
        if (new_sizes == sizes).all():
            return
        new_ends = units[:, 1] + new_sizes
        given_back = np.stack([units[:, 0], new_ends, units[:, 2]], 1)[new_sizes < sizes]
        training = np.concatenate([self.training_units, given_back])
        self.training_units = training[np.lexsort((training[:, 1], training[:, 0]))]
        self.held_out_units = np.stack([units[:, 0], units[:, 1], new_ends], 1)

    def read(self, pieces: np.ndarray) -> torch.Tensor:
        """Copy rows into one tensor (n, d) of the files' dtype, but float32 for float64.

        (MPS can't hold float64.) pieces (many, 3): file, first row, end row. Raises UsageError if a
        file has become shorter, OSError if it can't be read.
        """
        rows = read_pieces(self.files, pieces)
        if rows.dtype == np.float64:
            rows = rows.astype(np.float32)
        tensor = torch.from_numpy(rows)
        if rows.dtype == np.uint16:
            return tensor.view(torch.bfloat16)
        return tensor

    def steps_of(self, pieces: np.ndarray) -> np.ndarray:
        """Return the step of each row that `read` gives for the same pieces: int64 (n,).

        A step is an index of `timesteps`; without timesteps it is 0. For a file (prompts, 3 steps,
        2 tokens, d), rows 2 to 8 have the steps 1 1 2 2 0 0.
        """
        num_steps = max(1, len(self.timesteps))
        steps = []
        for file, first, end in pieces.tolist():
            rows_before = self.files[file].first
            rows = np.arange(rows_before + first, rows_before + end)
            steps.append(rows // self.tokens[file] % num_steps)
        return np.concatenate(steps)

    def draw(self, n: int, seed: int = 0) -> np.ndarray:
        """Draw up to n training vectors, each by itself.

        Returns pieces (n, 3) for `read`, in the order of the files.
        """
        units = self.training_units
        ends = np.cumsum(units[:, 2] - units[:, 1])
        rng = np.random.default_rng([seed, 1])
        chosen = np.sort(rng.choice(self.num_training, min(n, self.num_training), replace=False))
        unit = np.searchsorted(ends, chosen, side="right")
        row = units[unit, 2] - (ends[unit] - chosen)
        return np.stack([units[unit, 0], row, row + 1], 1)

    def sample(self, n: int, seed: int = 0) -> torch.Tensor:
        """Read up to n training vectors that `draw` chooses: float32 (n, d)."""
        return self.read(self.draw(n, seed)).float()

    def digest(self) -> str:
        """Return 16 hex digits that tell these training vectors from others: a digest of a sample
        of 1,024 vectors, of the timesteps and of the number of tokens."""
        order = json.dumps([self.timesteps, self.tokens]).encode()
        sample = self.sample(1024).numpy().tobytes()
        return hashlib.sha256(sample + order).hexdigest()[:16]

    def sample_tokens(self) -> int:
        """Return the number of vectors of one (prompt, step).

        Raises UsageError if the files do not hold whole samples of one size.
        """
        units = np.concatenate([self.training_units, self.held_out_units])
        tokens = self.tokens[0]
        are_whole = (units[:, 2] - units[:, 1]) % tokens == 0
        if len(set(self.tokens)) > 1 or not are_whole.all():
            raise UsageError(
                f"{self.paths[0]}: sample_topk needs files of whole samples, "
                "(prompts, steps, tokens, d) of one size"
            )
        return tokens

    def held_out(self) -> Iterator[torch.Tensor]:
        """Yield the held-out vectors, prompt by prompt in file order: tensors (n, d).

        A prompt of more than 64 MB comes in several tensors.
        """
        most_rows = max(1, READ_BYTES // self.files[0].row_bytes)
        for unit in self.held_out_units:
            for piece in cut_unit(unit, most_rows):
                yield self.read(piece[None])

    def prompt_lines(self) -> list[dict]:
        """Return the parsed line of prompts.jsonl, a dict, of every image, file after file.

        Raises UsageError if a prompts.jsonl is missing, damaged, too short or changed.
        """
        lines = []
        for source in self.sources:
            num_images = source.P
            # the listing may be ahead of the file, while a collection is extended
            lines += read_prompts(source.path, num_images)[:num_images]
        return lines

    def read_image(self, index: int) -> torch.Tensor:
        """Read all vectors of one image: (steps, tokens, d), without the padding of text.

        index: the image's number through all files. The dtype is that of `read`.
        """
        ends = np.cumsum([source.P for source in self.sources])
        number = int(np.searchsorted(ends, index, side="right"))
        source = self.sources[number]
        image = index - (ends[number] - source.P)
        num_tokens = source.T
        if source.lengths is not None:
            num_tokens = int(source.lengths[image])
        first = (image * source.S + np.arange(source.S)) * source.T
        pieces = np.stack([np.full(source.S, number), first, first + num_tokens], 1)
        return self.read(pieces).view(source.S, num_tokens, self.d)

    def batches(
        self,
        batch_size: int,
        stop: int,
        start: int = 0,
        seed: int = 0,
        buffer_gb: float = 2.0,
        tokens: int = 1,
        share: tuple[int, int] = (0, 1),
        pin: bool = False,
        ahead: int = 4,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return an iterator over vectors `start` to `stop` of an endless shuffle for training.

        It yields (x (batch_size, d), step (batch_size,)); the last batch may be shorter. A step is
        an index of `timesteps`, and None without timesteps. Every vector comes once per epoch of
        `num_training`; a batch may span two epochs, so no vector is dropped. With timesteps, every
        stretch of a buffer holds the same share of every step. The order depends on the seed, the
        buffer's size and `tokens` alone, so starting at any position gives what would have come.
        store/shuffle.py explains it.

        tokens: this many consecutive vectors stay together; all sizes are multiples of it.
        share (i, n): yield only the i-th of n slices of each batch, cut at whole `tokens`. Every
        process has a buffer of its own.
        pin: put x into pinned memory, so that `x.to(device, non_blocking=True)` overlaps.
        ahead: number of batches that are prepared while one is used.

        Raises UsageError if a file got shorter, OSError if it can't be read.
        """
        reader = Reader(
            self.files, self.training_units, self.steps_of, tokens, seed, buffer_gb, pin
        )
        return self.typed_batches(reader.batches(batch_size, stop, start, share, ahead))

    def typed_batches(
        self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Turn the reader's batches, whose rows are bytes, into those that `batches` describes."""
        dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype
        if dtype == torch.uint16:
            dtype = torch.bfloat16
        for rows, step in batches:
            x = rows.view(dtype)
            if dtype == torch.float64:
                x = x.float()
            yield x, step if self.timesteps else None
