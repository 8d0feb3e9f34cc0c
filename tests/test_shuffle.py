"""The shuffle buffer: how well it mixes, what processes get, what happens when reading fails or
stops in the middle."""

import os
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from store import dataset, shuffle
from store.dataset import Activations
from store.shuffle import Plan, cut

HERE = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(dataset, "HELD_OUT", dict(share=0.05, at_least=0, at_most=10**9))
    monkeypatch.setattr(shuffle, "BLOCK_BYTES", 1024)


def data_set(path, prompts=128, tokens=64, steps=1):
    """Vectors (number, step) and how many bytes of them are trained on."""
    number = np.arange(prompts * steps * tokens).reshape(prompts, steps, tokens)
    np.save(path, np.stack([number, number // tokens % steps], -1).astype(np.float32))
    data = Activations([path])
    return data, data.num_training * 8


def numbers(batches):
    return torch.cat([x[:, 0] for x, _ in batches]).long().numpy()


@pytest.mark.parametrize("times", [0.9, 1.05, 1.2, 2, 8])
@pytest.mark.parametrize("tokens", [16, 128, 512])  # an eighth of a block, one, and four
def test_vectors_of_one_sample_seldom_meet(tmp_path, times, tokens):
    data, num_bytes = data_set(tmp_path / "a.npy", 65536 // tokens, tokens)
    size = 256
    n = data.num_training // 256 * 256
    order = numbers(data.batches(size, 3 * data.num_training, buffer_gb=num_bytes / times / 2**30))
    meetings = 0
    for epoch in range(3):
        mine = order[epoch * data.num_training :][: data.num_training]
        assert len(np.unique(mine)) == data.num_training
        sample = np.sort((mine[:n] // tokens).reshape(-1, size), 1)
        for batch in sample:
            counts = np.unique(batch, return_counts=True)[1]
            meetings += (counts * (counts - 1)).sum() / 3
    by_chance = n * (size - 1) * (tokens - 1) / (data.num_training - 1)
    assert 0.9 * min(times, 1) < meetings / by_chance < (1.1 if times < 1 else 1.5 * times)


@pytest.mark.parametrize("times", [0.5, 3])
def test_steps_take_turns_in_every_stage(tmp_path, times):
    data, num_bytes = data_set(tmp_path / "a.npy", 400, 16, steps=4)
    data.timesteps = [9.0, 6.0, 3.0, 0.0]
    batches = list(data.batches(64, data.num_training, buffer_gb=num_bytes / times / 2**30))
    assert all(torch.equal(x[:, 1].long(), step) for x, step in batches)
    counts = torch.stack([step.bincount(minlength=4) for _, step in batches[:-1]]).double()
    assert counts.std() < (1 if times < 1 else 2.5)  # 3.5 by chance


def test_a_start_anywhere_gives_what_would_have_come(tmp_path):
    data, num_bytes = data_set(tmp_path / "a.npy")
    options = dict(buffer_gb=num_bytes / 3 / 2**30, seed=5)
    stop = 2 * data.num_training + 77
    order = numbers(data.batches(100, stop, **options))
    for start in (1, 77, data.num_training - 1, data.num_training, data.num_training + 1, stop - 1):
        assert np.array_equal(numbers(data.batches(130, stop, start, **options)), order[start:])
    other = numbers(data.batches(100, stop, buffer_gb=num_bytes / 4 / 2**30, seed=5))
    assert not np.array_equal(other, order)
    assert np.array_equal(np.sort(other[: data.num_training]), np.unique(order))


@pytest.mark.parametrize("tokens", [1, 16])
def test_shares_put_together_are_the_batches(tmp_path, tokens):
    data, num_bytes = data_set(tmp_path / "a.npy", tokens=16)
    options = dict(start=64, buffer_gb=num_bytes / 2 / 2**30, tokens=tokens)
    whole = list(data.batches(112, data.num_training, **options))
    shares = [list(data.batches(112, data.num_training, **options, share=(i, 3))) for i in range(3)]
    for (x, _), *parts in zip(whole, *shares, strict=True):
        assert torch.equal(x, torch.cat([piece for piece, _ in parts]))
        assert all(len(piece) == (i + 1) * len(x) // tokens // 3 * tokens - i * len(x) // tokens // 3 * tokens
                   for i, (piece, _) in enumerate(parts))  # fmt: skip


def test_a_file_that_gets_shorter_is_named(tmp_path):
    data, num_bytes = data_set(tmp_path / "a.npy")
    batches = data.batches(64, 10 * data.num_training, buffer_gb=num_bytes / 3 / 2**30)
    next(batches)
    os.truncate(tmp_path / "a.npy", 20_000)
    with pytest.raises(ValueError, match=r"a\.npy has become shorter"):
        list(batches)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(OSError, match=r"a\.npy"):
        next(data.batches(64, 100))


def times_open(path):
    """How often this process has the file open; 0 where the system does not say. Other files don't
    count."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return 0
    return sum(fd.exists() and fd.samefile(path) for fd in descriptors.iterdir())


def test_closing_ends_the_threads_and_closes_the_files(tmp_path):
    data, num_bytes = data_set(tmp_path / "a.npy")
    threads = set(threading.enumerate())
    opened = times_open(tmp_path / "a.npy")
    batches = data.batches(64, 10**6, buffer_gb=num_bytes / 3 / 2**30)
    next(batches)
    assert set(threading.enumerate()) - threads
    batches.close()
    assert not set(threading.enumerate()) - threads
    assert times_open(tmp_path / "a.npy") == opened


@pytest.mark.slow  # a Python of its own imports torch
@pytest.mark.parametrize(
    "end",
    ["", "raise ValueError('boom')", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"],
)
def test_a_program_that_leaves_off_in_the_middle_ends(tmp_path, end):
    data_set(tmp_path / "a.npy")
    code = (
        "from store.dataset import Activations\n"
        f"b = Activations([{str(tmp_path / 'a.npy')!r}]).batches(64, 10**9)\nnext(b)\n{end}"
    )
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode == 0) == (not end)
    assert time.time() - started < 50
    assert done.stderr.count(b"Traceback") == bool(end)


def test_batches_that_are_kept_stay_as_they_are(tmp_path):
    data, _ = data_set(tmp_path / "a.npy")
    kept = []
    copies = []
    for i, (x, _) in enumerate(data.batches(64, 4 * data.num_training)):
        if i % 3:
            kept.append(x[5:9] if i % 2 else x)  # also where only a view is kept
            copies.append(kept[-1].clone())
    assert all(map(torch.equal, kept, copies))


def test_blocks_cover_the_units():
    units = np.array([[0, 0, 10], [0, 10, 25], [0, 30, 31], [1, 31, 40], [1, 40, 40], [1, 44, 48]])
    expected = [
        [0, 0, 8],
        [0, 8, 16],
        [0, 16, 24],
        [0, 24, 25],
        [0, 30, 31],
        [1, 31, 39],
        [1, 39, 40],
        [1, 44, 48],
    ]
    assert cut(units, 8).tolist() == expected


@pytest.mark.slow
def test_a_billion_vectors_are_planned_in_seconds():
    shuffle.BLOCK_BYTES = 1 << 20
    units = np.stack(
        [np.zeros(10**5, np.int64), np.arange(10**5) * 10**4, np.arange(1, 10**5 + 1) * 10**4], 1
    )
    units = units[np.arange(10**5) % 10 > 0]

    def steps_of(pieces):
        return np.zeros(int((pieces[:, 2] - pieces[:, 1]).sum()), np.int64)

    started = time.process_time()
    plan = Plan(units, steps_of, 2560, 1, 2 << 30, 0)
    stage, at = plan.stage_of_group(plan.total * 3 + 456_789_012)
    order, _ = plan.order(stage)
    assert time.process_time() - started < 20
    assert plan.total == 9 * 10**8
    assert 0 <= at < len(order) < plan.size
    assert len(np.unique(order)) == len(order)
    assert plan.blocks.nbytes < 100e6


def test_planning_takes_little_memory_and_the_order_of_a_seed_stays():
    """Stopped runs go on in it; the numbers are from when indices had 64 bits, which took 46 bytes
    a row and not 26."""
    shuffle.BLOCK_BYTES = 1 << 20
    n = 200_000

    def steps_of(pieces):
        return np.concatenate(
            [np.arange(first, end) // 50 % 40 for _, first, end in pieces.tolist()]
        )

    plan = Plan(np.array([[0, 0, n]]), steps_of, 10_000, 1, 1e10, 0)
    tracemalloc.start()
    try:
        order, steps = plan.order(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * n
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(steps, order // 50 % 40)
    assert order[:5].tolist() == [137052, 127703, 135465, 51826, 167686]


def test_shuffle_is_a_permutation():
    steps = np.array([0, 1, 1, 2] * 50, np.int16)
    order = shuffle.shuffle(steps, [1])
    assert np.array_equal(np.sort(order), np.arange(200))
    assert not np.array_equal(order, shuffle.shuffle(steps, [2]))
    assert np.array_equal(order, shuffle.shuffle(steps, [1]))
