"""Which feature goes with a number of the data set: ranks, correlations, controls, and the page."""

import json
import math

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from pages import read_page, write_block

import features
from analysis import columns
from analysis.columns import (
    Column,
    ExampleMeans,
    average_ranks,
    best_features,
    choose_examples,
    numeric_columns,
    rank_correlations,
    shuffled_values,
)
from sae import Sae


def reference_ranks(x):
    """By definition, in float64: how many numbers are smaller, and half of the others that are
    equal."""
    x = np.asarray(x, float)
    smaller = (x[None] < x[:, None]).sum(1)
    equal = (x[None] == x[:, None]).sum(1) - 1
    return smaller + equal / 2


def reference_rho(a, b):
    a, b = reference_ranks(a), reference_ranks(b)
    a, b = a - a.mean(), b - b.mean()
    length = math.sqrt((a * a).sum() * (b * b).sum())
    return (a * b).sum() / length if length else 0.0


def test_ranks_by_hand():
    x = torch.tensor([[5.0, 1.0, 2.0], [7.0, 1.0, -1.0], [5.0, 1.0, 0.0]])
    assert average_ranks(x).tolist() == [[0.5, 1.0, 2.0], [2.0, 1.0, 0.0], [0.5, 1.0, 1.0]]


@pytest.mark.parametrize("num_sorted", [1, 40, 10**6])
def test_correlations_against_the_definition(monkeypatch, num_sorted):
    monkeypatch.setattr(columns, "MAX_SORTED", num_sorted)  # any number of blocks
    rng = np.random.default_rng(3)
    values = rng.normal(size=(3, 37))
    values[1] = rng.integers(0, 4, 37)  # many ties
    x = rng.normal(size=(37, 11)).astype(np.float32)
    x[:, 2] = 0  # a dead feature
    x[:, 3] = values[0]
    x[:, 4] = -(values[0] ** 3)
    x[:, 5:8] *= rng.random((37, 3)) > 0.6  # active on a part of the examples: ties at 0
    rho = rank_correlations(values, torch.from_numpy(x))
    expected = [[reference_rho(v, x[:, m]) for m in range(11)] for v in values]
    assert np.allclose(rho, expected, rtol=0, atol=1e-12)
    assert rho[0, 3] == pytest.approx(1) and rho[0, 4] == pytest.approx(-1) and not rho[:, 2].any()


def test_which_columns_are_numbers():
    rows = [
        {"id": 0, "prompt": "a", "seed": 4, "angle": 1, "text": "0.5", "half": 2.0, "gap": None},
        {"id": 1, "prompt": "b", "seed": 5, "angle": 1, "text": "-2", "half": "left", "gap": 3},
        {"id": 2, "prompt": "c", "seed": 6, "angle": 1, "text": "1e3", "half": 3, "gap": "4"},
        {"id": 3, "prompt": "d", "seed": 7, "angle": 1, "text": "7", "yes": True, "inf": "inf"},
    ]
    found = {column.name: column.values for column in numeric_columns(rows, [0, 1, 2, 3])}
    assert list(found) == ["text", "gap"]  # `angle` is constant, and a seed describes nothing
    assert found["text"].tolist() == [0.5, -2, 1000, 7]
    assert np.isnan(found["gap"][[0, 3]]).all() and found["gap"][1:3].tolist() == [3, 4]


def test_prompts_that_are_another_column_are_left_out():
    """So it is with --column angle; the numbers of classes have no other column."""
    rows = [{"prompt": "0.5", "angle": 0.5, "size": 3}, {"prompt": "2", "angle": 2, "size": 4}]
    assert [column.name for column in numeric_columns(rows, [0, 1])] == ["angle", "size"]
    rows = [{"prompt": "0.5"}, {"prompt": "2"}]
    assert [column.name for column in numeric_columns(rows, [0, 1])] == ["prompt"]


def test_images_of_a_prompt_are_shuffled_together():
    values = np.array([1.0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4])
    prompts = [i // 3 for i in range(12)]
    shuffles = shuffled_values(values, prompts)
    assert len(shuffles) == columns.NUM_SHUFFLES
    assert all((s.reshape(4, 3) == s.reshape(4, 3)[:, :1]).all() for s in shuffles)
    assert all(sorted(s) == sorted(values) for s in shuffles)
    assert len({tuple(s) for s in shuffles}) > 5


def test_examples_that_do_not_fit_are_drawn(monkeypatch):
    of = [Column("angle", np.arange(100.0), list(range(100)))]
    assert choose_examples(of, 7) == list(range(100)) and choose_examples([], 7) == []
    monkeypatch.setattr(columns, "MAX_NUMBERS", 70)
    chosen = choose_examples(of, 7)
    assert len(chosen) == 10 and chosen == sorted(set(chosen)) and max(chosen) < 100
    assert chosen == choose_examples(of, 7) and chosen != list(range(10))


def planted(num_prompts=24, num_images=2, M=6, d=5):
    """Means of examples in which feature 4 falls with the column, and dimension 2 rises with it."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.permutation(num_prompts).astype(float), num_images)
    prompts = [e // num_images for e in range(len(values))]
    means = ExampleMeans(list(range(len(values))), M, d)
    for example, value in enumerate(values):
        for _ in range(2):  # in two pieces
            x = torch.from_numpy(rng.normal(size=(3, d)).astype(np.float32))
            x[:, 2] = value
            acts = torch.from_numpy(rng.random((3, 2)).astype(np.float32))
            acts[:, 1] = math.exp(-value)
            indices = torch.tensor([[0, 4], [1, 4], [2, 4]])
            means.add(x, acts, indices)
        means.finish(example)
    return means, Column("angle", values, prompts)


def test_a_planted_feature_is_found_and_controls_are_below_it():
    means, column = planted()
    [report] = best_features(means, [column])
    assert report.name == "angle"
    assert (report.num_examples, report.num_prompts, report.num_shuffles) == (48, 24, 20)
    assert report.features[0] == (4, pytest.approx(-1)) and report.raw == (2, pytest.approx(1))
    assert 0.1 < report.shuffled < 0.95
    assert [f for f, _ in report.features].count(3) == 0  # it was never active
    assert all(abs(rho) < 0.6 for _, rho in report.features[1:])


def test_rows_without_a_number_are_left_out():
    means, column = planted()
    gaps = replace_values(column, [0, 1, 7])
    [report] = best_features(means, [gaps])
    assert (report.num_examples, report.num_prompts) == (45, 23)
    assert report.features[0] == (4, pytest.approx(-1))
    nearly_all = replace_values(column, range(2, 48))  # the two that are left are of one prompt
    assert best_features(means, [nearly_all]) == []


def replace_values(column, missing):
    values = column.values.copy()
    values[list(missing)] = np.nan
    return column._replace(values=values)


# ------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(path, data, what was printed): two files, in which the first dimension rises with a column
    and feature 3 of the SAE reads it."""
    folder = tmp_path_factory.mktemp("columns")
    rng = np.random.default_rng(0)
    paths, number = [], 0
    for name, num_prompts in (("a", 9), ("b", 7)):
        x = rng.standard_normal((2 * num_prompts, 3, 6, 4), np.float32)
        rows = []
        for row in range(2 * num_prompts):
            value = (7 * (row // 2) + number) % 16  # two images of each prompt
            x[row, ..., 0] = 3 * value + 0.1 * x[row, ..., 0]
            rows.append({"id": row // 2, "prompt": f"{name} {row // 2}", "seed": row})
            rows[-1] |= {"<b>angle</b>": value / 10, "same": 2, "kind": "left"}
        paths.append(str(write_block(folder / name, x, grid=[2, 3])))
        listing = folder / name / "prompts.jsonl"
        listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
        number += 9
    torch.manual_seed(0)
    sae = Sae(4, 8, 2)
    with torch.no_grad():
        sae.encoder.weight[3] = torch.tensor([1.0, 0, 0, 0])
    sae.save_to_disk(folder / "sae")
    config = features.Config(
        sae=str(folder / "sae"), data=paths, out_dir=str(folder), device="cpu", batch_size=7
    )
    path = features.main(config)
    return path, read_page(path), (paths, sae)


def test_the_page_lists_columns_of_numbers(page):
    _, data, (paths, sae) = page
    [column] = data["columns"]
    assert column["name"] == "<b>angle</b>"  # the others are constant, or no numbers
    assert (column["examples"], column["prompts"], column["shuffles"]) == (32, 16, 20)
    # in float64, from all activations at once
    x = np.concatenate([np.load(path) for path in paths]).astype(float)
    acts = np.zeros((32, 8))
    for e in range(32):
        top_acts, top_indices, *_ = sae.encode(torch.from_numpy(x[e].reshape(-1, 4)).float())
        for act, index in zip(top_acts.flatten().tolist(), top_indices.flatten().tolist()):
            acts[e, index] += max(0, act) / 18
    values = [(7 * p + first) % 16 for first, n in ((0, 9), (9, 7)) for p in range(n)]
    values = np.repeat(values, 2)
    rho = [reference_rho(values, acts[:, m]) for m in range(8)]
    assert column["features"][0][0] == 3 and column["features"][0][1] > 0.98
    assert [r for _, r in column["features"]] == pytest.approx(
        [rho[f] for f, _ in column["features"]], abs=2e-3
    )
    raw = [reference_rho(values, x[..., m].mean((1, 2))) for m in range(4)]
    assert column["raw"] == [0, pytest.approx(max(raw, key=abs), abs=2e-3)]
    assert 0.2 < column["shuffled"] < 0.95


def test_a_page_without_such_columns_has_none(tmp_path, capsys):
    x = np.random.default_rng(0).standard_normal((4, 3, 6, 4), np.float32)
    path = write_block(tmp_path / "a", x, grid=[2, 3])
    Sae(4, 8, 2).save_to_disk(tmp_path / "sae")
    config = {"sae": str(tmp_path / "sae"), "data": [str(path)], "out_dir": str(tmp_path)}
    assert "columns" not in read_page(features.main(features.Config(**config, device="cpu")))
    assert "column" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_columns_in_a_browser(page):
    path, data, _ = page
    with Browser() as browser:
        browser.open(path)
        text = "document.getElementById('columns').textContent"
        shown = browser.run(text)
        assert "<b>angle</b>" in shown and "does not show that editing" in shown
        assert "over 32 images of 16 prompts" in shown
        browser.run("document.querySelector('#columns summary').click()")
        browser.run("document.querySelector('#columns-list a').click()")
        assert browser.run("location.hash") == "#f=3"
        assert browser.run("document.getElementById('feature').textContent") == "Feature 3"
        assert not browser.errors and not browser.dialogs
