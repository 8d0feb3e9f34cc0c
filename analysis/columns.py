"""Which feature goes with a number of the data set, such as an angle or a difficulty?

    columns = numeric_columns(rows, prompt_ids)           # of prompts.jsonl: [Column("angle", ...)]
    means = ExampleMeans(choose_examples(columns, M), M, d)
    ...                                                   # means.add and means.finish, by example
    found = best_features(means, columns)                 # [ColumnReport("angle", ...)]

An example is one row of the activation files. For each feature, its mean activation over the
vectors of an example is compared with the column's number by Spearman's rank correlation rho: the
Pearson correlation of the ranks, where equal values share the mean of their ranks. It is 1 or -1 if
one always rises, or falls, with the other, whatever the shape of the curve.

Two controls stand beside the best features, since there are many features and some fit by chance:

    raw        the largest |rho| of a single dimension of the activations, without an SAE
    shuffled   the largest |rho| of any feature after the column's values were exchanged between
               prompts at random, in the best of 20 shuffles

A correlation does not show that a feature does anything: in one trained model a feature with a rho
of 0.98 changed nothing when it was edited.

Memory: M numbers per example would be 8 GB for 100,000 examples of 20,480 features. So at most
2^26 numbers are kept (256 MiB), of examples that are drawn at random with a fixed seed; the page
says how many.

Source: Spearman 1904 (American Journal of Psychology 15).
"""

import math
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_NUMBERS = 1 << 26  # mean activations that are kept at most
MAX_SORTED = 1 << 22  # numbers that are ranked at once
NUM_BEST = 10  # features that are reported for a column
NUM_SHUFFLES = 20
SEED = 0  # of the shuffles, and of the choice of examples
# Keys of prompts.jsonl that number or make the rows, and describe nothing
NO_COLUMNS = ("id", "seed")


class Column(NamedTuple):
    """A column of numbers of the data set."""

    name: str

    values: np.ndarray
    """float64 (examples,); NaN where a row has no number."""

    prompts: list[Hashable]
    """What tells the prompt of each example from others; images of one prompt have the same."""


class ColumnReport(NamedTuple):
    """Which features go with a column, and the controls."""

    name: str

    num_examples: int
    """How many examples were compared."""

    num_prompts: int
    """How many different prompts these show."""

    features: list[tuple[int, float]]
    """(feature, rho) of the largest |rho|, the largest first."""

    raw: tuple[int, float]
    """(dimension, rho) of the single dimension of the activations with the largest |rho|."""

    shuffled: float
    """The largest |rho| of any feature with shuffled values, over all shuffles."""

    num_shuffles: int


# -------------------------------------------------------------------------------- the columns


def numeric_columns(rows: list[dict], prompts: list[Hashable]) -> list[Column]:
    """Return the columns of prompts.jsonl that hold numbers, at least two different ones.

    rows: one per example. prompts: as in `Column`. A text counts as a number if it is one, since a
    .csv file has nothing else. A column may have gaps, but no other values: {"angle": 3},
    {"angle": null} and {} make a column, and {"angle": "left"} beside them does not. Prompts that
    are the numbers of another column are that column, and are left out.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in NO_COLUMNS)
    names.pop("prompt", None)
    names["prompt"] = None  # the last, so that its column is known
    columns = []
    for name in names:
        values = [number_in(row.get(name)) for row in rows]
        if None in values:
            continue
        numbers = np.array(values)
        is_known = name == "prompt" and any(
            np.array_equal(numbers, column.values, equal_nan=True) for column in columns
        )
        if len(np.unique(numbers[~np.isnan(numbers)])) > 1 and not is_known:
            columns.append(Column(name, numbers, prompts))
    return columns


def number_in(value: object) -> float | None:
    """Return a value of a column as a number, NaN if it is missing, None if it is no number.

    3 and "3" give 3.0, None and "" give NaN; True, "left" and "nan" give None.
    """
    if value is None or value == "":
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def choose_examples(columns: list[Column], num_features: int) -> list[int]:
    """Return which examples are compared, in ascending order: all, or as many as fit in memory.

    If they do not all fit, they are drawn at random: neighbours in a file may be alike.
    """
    if not columns:
        return []
    num_examples = len(columns[0].values)
    most = max(2, MAX_NUMBERS // num_features)
    if num_examples <= most:
        return list(range(num_examples))
    chosen = np.random.default_rng(SEED).choice(num_examples, most, replace=False)
    return np.sort(chosen).tolist()


# ---------------------------------------------------------------------------- means of examples


class ExampleMeans:
    """The mean activation of each feature, and the mean of each raw dimension, by example.

    examples: the numbers of those that are kept. M features, vectors of width d.
    """

    def __init__(self, examples: list[int], num_features: int, d: int):
        self.examples = examples
        self.slots = {example: slot for slot, example in enumerate(examples)}

        self.features = torch.zeros(len(examples), num_features)
        """(E, M) float32."""

        self.raw = torch.zeros(len(examples), d)
        """(E, d) float32."""

        # sums over the vectors of the example that is being read
        self.feature_sums = torch.zeros(num_features, dtype=torch.float64)
        self.raw_sums = torch.zeros(d, dtype=torch.float64)
        self.num_vectors = 0

    def wants(self, example: int) -> bool:
        """Return whether the means of an example are kept."""
        return example in self.slots

    def add(self, x: Tensor, top_acts: Tensor, top_indices: Tensor) -> None:
        """Add vectors x (n, d) of one example, and what the SAE says of them, (n, K) each."""
        acts = top_acts.clamp_min(0).flatten()
        sums = acts.new_zeros(len(self.feature_sums))
        sums.index_add_(0, top_indices.flatten(), acts)
        self.feature_sums += sums.cpu()
        self.raw_sums += x.sum(0).cpu()
        self.num_vectors += len(x)

    def finish(self, example: int) -> None:
        """Keep the means of the example whose vectors were added."""
        slot = self.slots[example]
        num_vectors = max(1, self.num_vectors)
        self.features[slot] = self.feature_sums / num_vectors
        self.raw[slot] = self.raw_sums / num_vectors
        self.feature_sums.zero_()
        self.raw_sums.zero_()
        self.num_vectors = 0


# -------------------------------------------------------------------------------- correlations


def best_features(means: ExampleMeans, columns: list[Column]) -> list[ColumnReport]:
    """Return a report for each column that is not constant on the examples that were kept."""
    reports = []
    for column in columns:
        values = column.values[means.examples]
        is_known = ~np.isnan(values)
        values = values[is_known]
        if len(np.unique(values)) < 2:
            continue
        prompts = []
        for example, known in zip(means.examples, is_known):
            if known:
                prompts.append(column.prompts[example])
        shuffles = shuffled_values(values, prompts)

        slots = torch.from_numpy(is_known.nonzero()[0])
        of_features = rank_correlations(np.stack([values, *shuffles]), means.features[slots])
        of_raw = rank_correlations(values[None], means.raw[slots])[0]
        by_size = np.argsort(-np.abs(of_features[0]), kind="stable")[:NUM_BEST]
        best = [(int(f), float(of_features[0, f])) for f in by_size if of_features[0, f] != 0]
        dimension = int(np.abs(of_raw).argmax())
        reports.append(
            ColumnReport(
                name=column.name,
                num_examples=len(values),
                num_prompts=len(set(prompts)),
                features=best,
                raw=(dimension, float(of_raw[dimension])),
                shuffled=float(np.abs(of_features[1:]).max()),
                num_shuffles=len(shuffles),
            )
        )
    return reports


def shuffled_values(values: np.ndarray, prompts: list[Hashable]) -> list[np.ndarray]:
    """Return the values (E,) exchanged between prompts at random, NUM_SHUFFLES times.

    The images of a prompt are alike, so they get the values of another prompt's images: if they
    were shuffled one by one, the control would be too easy to beat. A prompt with fewer images than
    the other gets the first of its values, and one with more gets them again from the first on.
    """
    rows_of_prompt = {}
    for row, prompt in enumerate(prompts):
        rows_of_prompt.setdefault(prompt, []).append(row)
    groups = list(rows_of_prompt.values())

    rng = np.random.default_rng(SEED)
    shuffles = []
    for _ in range(NUM_SHUFFLES):
        shuffled = np.empty_like(values)
        for rows, source in zip(groups, rng.permutation(len(groups))):
            shuffled[rows] = np.resize(values[groups[source]], len(rows))
        shuffles.append(shuffled)
    return shuffles


def rank_correlations(values: np.ndarray, x: Tensor) -> np.ndarray:
    """Return Spearman's rho of each row of values (C, E) with each column of x (E, M).

    The result is float64 (C, M); it is 0 where one of the two is constant. It is computed for some
    columns of x at a time, so that no more than MAX_SORTED numbers are ranked at once.
    """
    targets = standard_ranks(torch.from_numpy(values).T)  # (E, C)
    num_columns = max(1, MAX_SORTED // len(x))
    blocks = [targets.new_zeros(len(values), 0)]
    for first in range(0, x.shape[1], num_columns):
        ranks = standard_ranks(x[:, first : first + num_columns])
        blocks.append(targets.T @ ranks)
    return torch.cat(blocks, 1).clamp(-1, 1).numpy()


def standard_ranks(x: Tensor) -> Tensor:
    """Return the ranks within each column of x (E, M), with mean 0 and length 1, float64.

    A constant column gives zeros.
    """
    ranks = average_ranks(x)
    centered = ranks - ranks.mean(0)
    # half ranks are exact, so the length of a constant column is 0
    return centered / centered.norm(dim=0).clamp_min(1e-12)


def average_ranks(x: Tensor) -> Tensor:
    """Return the rank of each number within its column of x (E, M), from 0, float64.

    Equal numbers share the mean of their ranks: [5, 7, 5] gives [0.5, 2, 0.5].
    """
    order = x.argsort(0)
    in_order = x.gather(0, order)
    differs = in_order[1:] != in_order[:-1]
    edge = differs.new_ones(1, x.shape[1])
    position = torch.arange(len(x))[:, None].expand_as(x)

    # the positions of the first and the last of the numbers that are equal to each
    first = position.where(torch.cat([edge, differs]), 0).cummax(0).values
    last = position.where(torch.cat([differs, edge]), len(x) - 1)
    last = last.flip(0).cummin(0).values.flip(0)
    ranks = torch.empty(x.shape, dtype=torch.float64)
    return ranks.scatter_(0, order, (first + last).double() / 2)
