"""Several processes (gloo, two threads of control and more) against one: the same updates from the
same global batches."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from commands import Processes
from files import read_json, read_lines
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1]
CASES = {  # name: (of the SAE, of the step)
    "topk": ({}, {}),
    "multi_topk": ({}, dict(multi_topk=True)),
    "batchtopk": (dict(activation="batchtopk"), {}),
    "sampletopk": (dict(activation="sampletopk"), {}),
    "matryoshka": (dict(activation="batchtopk"), dict(matryoshka=(10, 40))),
    "unit_norm": (dict(input_unit_norm=True), dict(normalize_decoder=False)),
}
D, M, K, N, TOKENS, STEPS = 24, 97, 5, 60, 10, 20


def twenty_updates(case, vectors, latents):
    """Parameters and what every update said, after 20 of them; of the last batch one of 4 processes
    has nothing."""
    from analysis.sharded import ShardedSae, ShardedUpdate
    from kernels import update as update_module
    from kernels.update import SparseUpdate
    from sae import Sae

    of_sae, of_step = CASES[case]
    k = 3 * TOKENS if of_sae.get("activation") == "sampletopk" else K
    sae = (
        ShardedSae(D, M, k, of_sae, seed=1, latents=latents)
        if latents.count > 1
        else Sae(D, M, k, of_sae, seed=1)
    )
    own_latents = latents.slice_of(M)
    g = torch.Generator().manual_seed(0)
    sae.b_dec.data.copy_(torch.randn(D, generator=g))
    # many are dead
    sae.encoder.bias.data.copy_(
        (0.1 * torch.randn(M, generator=g) - 1.0 * (torch.arange(M) % 3 == 0))[own_latents]
    )
    make = ShardedUpdate if latents.count > 1 else SparseUpdate
    update = make(sae, 7.0, auxk_alpha=1.0, dead_feature_threshold=50, group=vectors, **of_step)
    numbers = []
    for i in range(STEPS):
        tokens = TOKENS if sae.takes_samples else 1
        n = N if i < STEPS - 1 else max(3, tokens)
        x = torch.randn(n, D, generator=g) * 3 + 1
        weights = torch.rand(n, generator=g) + 0.5
        samples = vectors.slice_of(n // tokens)
        rows = slice(samples.start * tokens, samples.stop * tokens)
        x = x[rows].unflatten(0, (samples.stop - samples.start, tokens)) if tokens > 1 else x[rows]
        with patch.object(update_module, "LIST_DEAD_EVERY", 3):
            forward, norm = update(x, 1e-2, n, i < 5, weights[rows])
        numbers.append(
            [forward.loss.item(), norm.item(), float(update.num_listed), float(update.num_dead())]
        )
    return sae, update, numbers


def worker(folder):
    """One of the processes: every case, whose whole state goes to a file that all write
    together."""
    from analysis.sharded import grid, load_rows, save_rows
    from distributed import Processes
    from store.disk import save_tensors

    torch.set_num_threads(1)
    processes = Processes()
    for shards in [s for s in (1, 2, 4) if processes.count % s == 0]:
        vectors, latents = grid(processes, shards)
        for case in CASES:
            _, update, numbers = twenty_updates(case, vectors, latents)
            if vectors.index == 0:
                path = Path(folder) / f"{case}_{processes.count}_{shards}.safetensors"
                metadata = {"said": json.dumps(numbers), "rank": "0" * (1 + latents.index)}
                if latents.count > 1:
                    save_rows(path, update.state, metadata, latents)
                    # waits until the first one has given the file its name
                    latents.sum(torch.zeros(1))
                    again = load_rows(path, latents)
                    assert all(
                        torch.equal(again[name], tensor) for name, tensor in update.state.items()
                    )
                else:
                    save_tensors(path, update.state, metadata)
            # equal in all that split vectors
            own_codes = torch.stack([p.detach().double().sum() for p in update.params.values()])
            assert torch.equal(vectors.broadcast(own_codes.clone()), own_codes), case
    processes.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for count in (2, 4):
        by_processes(count, __file__, folder)
    return folder


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def launch(count, *command):
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
    return [str(word) for word in (sys.executable, *run, *command)]


def torchrun(count, *command):
    """Run a Python file with `count` processes."""
    done = subprocess.run(
        launch(count, *command), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def by_processes(count, *command):
    """`torchrun` without its start: forks."""
    processes = Processes(count, *command, cwd=HERE)
    try:
        assert processes.wait() == 0, processes.stderr[-4000:]
    finally:
        processes.kill()


@pytest.mark.parametrize("count, shards", [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("case", CASES)
def test_twenty_updates_are_those_of_one_process(folder, case, count, shards):
    from distributed import ALONE

    _, update, numbers = twenty_updates(case, ALONE, ALONE)
    with safe_open(folder / f"{case}_{count}_{shards}.safetensors", "pt") as file:
        assert set(file.keys()) == set(update.state)
        for name, expected in update.state.items():
            tensor = file.get_tensor(name)
            assert tensor.shape == expected.shape
            assert tensor.dtype == expected.dtype
            error = (
                tensor.double() - expected.double()
            ).norm() / expected.double().norm().clamp_min(1e-12)
            assert error < 1e-5, (name, error)
        theirs = torch.tensor(json.loads(file.metadata()["said"]), dtype=torch.float64)
    assert (
        (theirs - torch.tensor(numbers).double()).abs()
        <= 1e-4 * torch.tensor(numbers).double().abs()
    ).all()
    # AuxK has to choose among the dead latents
    assert max(dead for _, _, dead, _ in numbers) > D // 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """6000 sparse vectors of width 16: (20 prompts, 3 steps, 100 tokens, 16)."""
    rng = np.random.default_rng(0)
    x = (
        np.where(rng.random((6000, 24)) < 1 / 8, rng.gamma(3, 1, (6000, 24)), 0)
        @ rng.standard_normal((24, 16))
        + 5
    )
    path = tmp_path_factory.mktemp("data") / "acts.npy"
    np.save(path, x.astype(np.float32).reshape(20, 3, 100, 16))
    return path


TWICE = """
import os
from distributed import Processes
for word in ("first", "second", "third"):
    processes = Processes()
    line = [processes.all_gather(f"{word} {processes.rank}"), processes.any(processes.rank), processes.next("item") < 2]
    os.write(1, f"{line}\\n".encode())  # whole, also where the other process writes at once
    processes.close()
"""


def test_one_group_after_another(tmp_path):
    """As in a notebook's cell or a script of several stages: the later one finds nothing of the
    earlier."""
    (tmp_path / "twice.py").write_text(TWICE)
    printed = torchrun(2, tmp_path / "twice.py").stdout
    for word in ("first", "second", "third"):
        assert printed.count(f"[['{word} 0', '{word} 1'], True, True]") == 2


FULL = """
import resource, sys, torch
from pathlib import Path
from distributed import Processes
from analysis.sharded import grid, save_rows
processes, path = Processes(), Path(sys.argv[1])
_, latents = grid(processes, 2)
save = lambda x: save_rows(path / "a.safetensors", {"x": x[latents.slice_of(1000)]}, {}, latents)
save(torch.zeros(1000))
for full in (0, 1):
    if processes.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        save(torch.ones(1000))
    except OSError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (path / f"{full} {processes.rank}").write_text(said)
processes.close()
"""


def test_a_full_disk_is_named_by_every_process(tmp_path):
    """The first one fails when it makes the file, the second one when it writes into it; the old
    file stays."""
    (tmp_path / "full.py").write_text(FULL)
    by_processes(2, tmp_path / "full.py", tmp_path)
    for name in ("0 0", "0 1", "1 0", "1 1"):
        assert (
            (tmp_path / name).read_text().endswith("a.safetensors can't be written: File too large")
        )
    assert not load_file(tmp_path / "a.safetensors")["x"].any()
    assert not list(tmp_path.glob("*.partial"))


def train(data, out, *options):
    return [
        HERE / "train.py", "--data", data, "--out_dir", out, "--num_latents", 45, "--effective_batch_size", 64, "--log_every", 1,
        "--dead_feature_threshold", 500, "--lr", 1e-3, "--device", "cpu", "--mixed_precision", "no", "--k", 3,
        "--batch_topk", "--num_epochs", 3, *options,
    ]  # fmt: skip


def folder_of(out, name="acts_k3_M45_batch_topk"):
    """Weights, and the numbers of each iteration and at the end."""
    folder = out / name
    rows = read_lines(folder / "metrics.jsonl")
    assert not [path for path in folder.iterdir() if "checkpoint" in path.name]
    return (
        load_file(folder / "sae.safetensors"),
        rows,
        read_json(folder / "cfg.json")["num_held_out"],
    )


def same(actual, expected, tolerance=1e-4):
    for name, tensor in expected[0].items():
        assert (actual[0][name] - tensor).norm() <= tolerance * tensor.norm(), name
    assert len(actual[1]) == len(expected[1])
    assert actual[2] == expected[2]
    for row, other in zip(actual[1], expected[1]):
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(other[name], rel=1e-3), (name, row["iteration"])


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    by_processes(1, *train(data, out))
    return folder_of(out)


@pytest.mark.parametrize("count, shards", [(2, 1), (4, 2)])
def test_training_by_several_processes_is_that_of_one(data, alone, tmp_path, count, shards):
    """Two SAEs from one reading, one of them the one that was trained alone; the held-out numbers
    too."""
    start = torchrun if count == 2 else by_processes
    start(count, *train(data, tmp_path, "--seeds", 0, 1, "--shard_latents", shards))
    same(folder_of(tmp_path), alone)
    assert len(list(tmp_path.glob("*/cfg.json"))) == 2
    assert len(list(tmp_path.glob("*_sweep.png"))) == 1


def test_stopped_with_two_processes_and_gone_on_with_one_and_four(data, alone, tmp_path):
    metrics = tmp_path / "acts_k3_M45_batch_topk" / "metrics.jsonl"
    for count, shards, most in ((2, 2, 40), (1, 1, 80), (4, 2, 120)):
        process = Processes(count, *train(data, tmp_path, "--shard_latents", shards), cwd=HERE)
        while process.poll() is None and not (
            metrics.exists() and metrics.read_text().count("\n") > most
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)  # as a cluster's scheduler does
        assert process.wait(60) != 0
        state = safe_open(metrics.with_name("checkpoint.safetensors"), "pt").metadata()["state"]
        assert most < json.loads(state)["iteration"] < 200
    by_processes(2, *train(data, tmp_path))
    same(folder_of(tmp_path), alone)


def test_when_one_process_is_killed_the_other_says_so_in_one_line(data, tmp_path):
    command = launch(2, *train(data, tmp_path, "--num_epochs", 10**6))
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.rglob("metrics.jsonl")):
        time.sleep(0.01)
    time.sleep(0.5)  # in the midst of the updates
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = (
        int(pid) for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(second, signal.SIGKILL)
    printed = process.communicate(timeout=60)[1]
    assert (
        "train.py (process 0 of 2): error: another process ended; the same command resumes\n"
        in printed
    )
    assert "[rank0]" not in printed
    assert process.returncode != 0  # torch puts it before each line of a traceback


if __name__ == "__main__":
    worker(sys.argv[1])
