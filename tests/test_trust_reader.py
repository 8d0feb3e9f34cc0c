"""One class reads activations: damaged, cut, stopped, huge and 16-bit files give the right numbers
or one line."""

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, run_script

import collect
import diagnose
import evaluate
import features
import train
from analysis.concepts import image_scores
from bench import unlearn
from errors import UsageError
from sae import Sae
from store import dataset
from store.activation_file import WHOLE_FILE, contents_checksum
from store.dataset import Activations
from store.disk import checksum
from store.identity import activations_of
from store.prompts import load_prompts

pytestmark = pytest.mark.slow

HOOK = "mid_block"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def flip(path, place):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# --------------------------------------------------- damage between a stop and the resuming command


def collection_of(model_folder, out_dir, **options):
    """The Config of four batches."""
    options = (
        dict(
            hook_names=[HOOK], num_inference_steps=2, batch_size=2, max_num_examples=8, device="cpu"
        )
        | options
    )
    return collect.Config(model_name=str(model_folder), out_dir=str(out_dir), **options)


def stop(config, monkeypatch, num_batches):
    """Collect the first batches only, as when the command is interrupted."""
    real, calls = collect.generate, []

    def generate(*args):
        if len(calls) == num_batches:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(collect, "generate", generate)
        with pytest.raises(KeyboardInterrupt):
            collect.main(config)


MANY_FILES = dict(rows="both", tokens_per_step=5, save_samples=True)


@pytest.mark.parametrize(
    "options", [{}, MANY_FILES, dict(side="diff")], ids=["plain", "many files", "diff"]
)
def test_damaged_rows_of_a_stopped_collection_are_made_again(
    options, monkeypatch, model_folder, tmp_path, capsys
):
    """Wherever one bit was flipped: in the rows of any file, in an image, or a whole image is
    missing."""
    config = collection_of(model_folder, tmp_path / "whole", **options)
    collect.main(config)
    expected = contents(config.out_dir)

    stopped = replace(config, out_dir=str(tmp_path / "stopped"))
    stop(stopped, monkeypatch, 3)
    rng = random.Random(0)
    names = [path.name for path in (tmp_path / "stopped").glob("*.npy.partial")]
    damages = [
        (name, 128 + rng.randrange((tmp_path / "stopped" / name).stat().st_size // 2))
        for name in names
    ]
    damages += [("images/1.webp", 40), ("images/2.webp", None)]
    for number, (name, place) in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(stopped.out_dir, folder)
        if place is None:
            (folder / name).unlink()
        else:
            flip(folder / name, place)
        capsys.readouterr()
        collect.main(replace(config, out_dir=str(folder)))
        assert "1 of 3 batches are not as they were written" in capsys.readouterr().out, name
        assert contents(folder) == expected, (name, place)


def test_a_damaged_line_of_progress_and_a_damaged_header(
    monkeypatch, model_folder, tmp_path, capsys
):
    """A digit that names a batch that was never made, or rows of another shape; also where only the
    last renaming is missing."""
    config = collection_of(model_folder, tmp_path / "whole")
    collect.main(config)
    expected = contents(config.out_dir)

    stopped = replace(config, out_dir=str(tmp_path / "stopped"))
    stop(stopped, monkeypatch, 2)
    progress = (tmp_path / "stopped" / "progress.jsonl").read_text()
    shape = b"(8, 2, 64, 16)"
    header = (tmp_path / "stopped" / f"{HOOK}.npy.partial").read_bytes()
    assert shape in header[:128] and '{"batch": 1,' in progress

    for number, line in enumerate(['{"batch": 3,', '{"batch": -1,']):
        folder = tmp_path / f"line{number}"
        shutil.copytree(stopped.out_dir, folder)
        (folder / "progress.jsonl").write_text(progress.replace('{"batch": 1,', line))
        collect.main(replace(config, out_dir=str(folder)))
        assert contents(folder) == expected

    for number, damaged in enumerate([b"(8, 2, 63, 16)", b"(8, 1, 64, 16)", b"(7, 2, 64, 16)"]):
        folder = tmp_path / f"header{number}"
        shutil.copytree(stopped.out_dir, folder)
        (folder / f"{HOOK}.npy.partial").write_bytes(header.replace(shape, damaged))
        collect.main(replace(config, out_dir=str(folder)))
        assert contents(folder) == expected

        folder = tmp_path / f"renaming{number}"
        shutil.copytree(config.out_dir, folder)
        (folder / f"{HOOK}.json").unlink()
        done = (folder / f"{HOOK}.npy").read_bytes()
        (folder / f"{HOOK}.npy").unlink()
        (folder / f"{HOOK}.npy.partial").write_bytes(done.replace(shape, damaged))
        collect.main(replace(config, out_dir=str(folder)))
        assert contents(folder) == expected


def test_lines_without_checksums_are_believed_and_what_is_finished_is_not_read(
    monkeypatch, model_folder, tmp_path, capsys
):
    config = collection_of(model_folder, tmp_path / "acts", max_num_examples=4)
    stop(config, monkeypatch, 1)
    (tmp_path / "acts" / "progress.jsonl").write_text('{"batch": 0, "rows": 2}\n')
    flip(tmp_path / "acts" / f"{HOOK}.npy.partial", 200)
    collect.main(config)
    lines = (tmp_path / "acts" / "progress.jsonl").read_text().splitlines()
    assert lines[0] == '{"batch": 0, "rows": 2}' and list(json.loads(lines[1])["crc32"]) == [
        HOOK,
        "images/",
    ]

    flip(tmp_path / "acts" / f"{HOOK}.npy", -1)
    with pytest.raises(UsageError, match=f"{HOOK}.npy is not the file that"):
        collect.main(config)  # nothing to do, but this file is not described anew
    assert "not as they were written" not in capsys.readouterr().out
    collect.main(replace(config, max_num_examples=6))  # an extension goes on with these rows
    assert "1 of 2 batches are not as they were written" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [b"", b"garbage", None], ids=["empty", "garbage", "cut"])
@pytest.mark.parametrize("name", [f"{HOOK}.npy.partial", f"{HOOK}.tokens.npy.partial"])
def test_a_cut_file_of_a_stopped_collection_is_one_line(
    name, damage, monkeypatch, model_folder, tmp_path
):
    config = collection_of(model_folder, tmp_path / "acts", tokens_per_step=3)
    stop(config, monkeypatch, 2)
    path = tmp_path / "acts" / name
    path.write_bytes(path.read_bytes()[:-60] if damage is None else damage)
    options = [
        "--hook_names",
        HOOK,
        "--num_inference_steps",
        2,
        "--batch_size",
        2,
        "--max_num_examples",
        8,
        "--device",
        "cpu",
    ]
    options += [
        "--tokens_per_step",
        3,
        "--model_name",
        model_folder,
        "--out_dir",
        tmp_path / "acts",
    ]
    done = run_script("collect.py", *options, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{name} is missing or damaged" in done.stderr.splitlines()[-1]


# ------------------------------------------------------------ SAEs of bfloat16 files, several files


@pytest.fixture(scope="module")
def of_two_files(tmp_path_factory):
    """An SAE of two bfloat16 files of the toy's activations, 24 prompts each: its folder."""
    base = tmp_path_factory.mktemp("two")
    lines = (ROOT / "toy" / "prompts.csv").read_text().splitlines()
    prompts = load_prompts(str(ROOT / "toy" / "prompts.csv"))
    kinds = {}
    for number, row in enumerate(prompts):
        kinds.setdefault((row["object"], row["style"]), []).append(number)
    for name, place in (("a", 0), ("b", 1)):
        chosen = [numbers[place] for numbers in kinds.values()]
        (base / f"{name}.csv").write_text(
            "\n".join([lines[0], *(lines[1 + number] for number in chosen)]) + "\n"
        )
        options = dict(
            dataset_name=str(base / f"{name}.csv"),
            store_dtype="bfloat16",
            out_dir=str(base / name),
            device="cpu",
        )
        options |= dict(
            num_inference_steps=2, max_num_examples=48, batch_size=48, save_images=False
        )
        collect.main(collect.Config(hook_names=["mid_block.attentions.0"], **options))
    data = [str(base / name / "mid_block.attentions.0.npy") for name in "ab"]
    train.main(
        train.Config(
            data=data, num_latents=[64], k=[8], out_dir=str(base), run_name="sae", device="cpu"
        )
    )
    return base / "sae"


def numbers_of(path):
    """A file of bfloat16 as float32, by another way than the reader's: its bits are the upper half
    of a float32's."""
    return (np.load(path).astype(np.uint32) << 16).view(np.float32)


def test_unlearning_reads_numbers_of_all_files_and_excludes_all_their_prompts(
    of_two_files, tmp_path, monkeypatch
):
    sae = Sae.load_from_disk(of_two_files)
    paths = [of_two_files.parent / name / "mid_block.attentions.0.npy" for name in "ab"]
    domain = unlearn.domains_of([sae], {"object": ("moon", "star")})["object"]
    expected = np.concatenate([numbers_of(path).mean(2) for path in paths])
    assert domain.means.shape == (96, 2, 160) and len(domain.labels) == len(domain.scores) == 96
    assert (
        np.allclose(domain.means.numpy(), expected, rtol=1e-3, atol=1e-5)
        and domain.means.abs().max() < 100
    )

    seen = []
    monkeypatch.setattr(
        unlearn, "split_prompts", lambda rows, used, per_cell: seen.append(used) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        unlearn.main(
            unlearn.Config(
                sae=[str(of_two_files)], unlearn="moon", out_dir=str(tmp_path), device="cpu"
            )
        )
    listed = [
        json.loads(line)["prompt"]
        for path in paths
        for line in path.with_name("prompts.jsonl").read_text().splitlines()
    ]
    assert len(set(listed)) == 96 and seen == [set(listed)]


def test_unlearning_on_a_stopped_extension_is_one_line(of_two_files, tmp_path, monkeypatch):
    folder = shutil.copytree(of_two_files.parent, tmp_path / "base")
    path = folder / "a" / "mid_block.attentions.0.npy"
    path.rename(f"{path}.partial")
    path.with_suffix(".json").unlink()
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="not finished|no description|is not there"):
        unlearn.main(
            unlearn.Config(sae=["sae"], unlearn="moon", out_dir=str(tmp_path), device="cpu")
        )


def test_image_scores_of_two_files_are_those_of_their_numbers(of_two_files):
    sae = Sae.load_from_disk(of_two_files)
    activations = Activations(sae.cfg["data"])
    scores, chosen = image_scores(sae, activations, pictures=20)
    x = np.concatenate([numbers_of(path) for path in activations.paths])
    listing = activations.prompt_lines()
    assert len(listing) == 96 and max(chosen) >= 48
    for score, picture in zip(scores[::5], chosen[::5]):
        acts, indices = sae.encode(torch.from_numpy(x[picture]))[:2]
        codes = torch.zeros(*acts.shape[:2], 64).scatter_add_(2, indices, acts)
        assert torch.allclose(score, codes.mean(1), atol=1e-4)


def test_the_padding_of_texts_takes_no_k_of_a_sample_topk(tmp_path):
    """Zeros have activations where b_enc is positive, and shared the k of the sample."""
    x = np.random.default_rng(0).standard_normal((3, 2, 6, 8)).astype(np.float32)
    lengths = np.array([4, 6, 0])
    for image, length in zip(x, lengths):
        image[:, length:] = 0
    describe(tmp_path / "block.npy", x, stream="text", lengths=lengths)
    sae = Sae(8, 12, 3, {"activation": "sampletopk"})
    sae.encoder.bias.data.fill_(2.0)
    scores, _ = image_scores(sae, Activations([tmp_path / "block.npy"]))
    acts, indices = sae.encode(torch.from_numpy(x[0, :, :4]))[:2]
    expected = torch.zeros(2, 12).scatter_add_(1, indices.flatten(1), acts.flatten(1)) / 4
    assert torch.allclose(scores[0], expected, atol=1e-5) and not scores[2].any()


# -------------------------------------------------------------- files exchanged under a description


@pytest.fixture(scope="module")
def of_two_seeds(tmp_path_factory):
    """A folder with two collections that differ in their seed: files of equal names and shapes."""
    base = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1):
        out = str(base / f"seed{seed}")
        options = dict(hook_names=["mid_block"], tokens_per_step=4)
        collect.main(
            collect.Config(
                **options,
                num_inference_steps=2,
                batch_size=2,
                max_num_examples=4,
                device="cpu",
                seed=seed,
                out_dir=out,
            )
        )
    return base


@pytest.mark.parametrize("suffix", [".npy", ".tokens.npy"])
def test_another_file_of_the_same_shape_is_refused(of_two_seeds, tmp_path, suffix):
    acts, name = tmp_path / "acts", f"mid_block{suffix}"
    shutil.copytree(of_two_seeds / "seed0", acts)
    Activations([acts / "mid_block.npy"])
    shutil.copy(of_two_seeds / "seed1" / name, acts / name)
    with pytest.raises(UsageError, match=f"{name} is not the file that .*mid_block.json describes"):
        Activations([acts / "mid_block.npy"])


def test_padding_without_a_description_is_not_taken_for_vectors(tmp_path):
    """Lengths beside a file whose .json is gone: nothing says that they are meant."""
    x = np.random.default_rng(0).standard_normal((4, 2, 6, 3)).astype(np.float32)
    path = tmp_path / "block.npy"
    describe(path, x, stream="text", lengths=np.array([6, 2, 3, 1]))
    assert Activations([path]).num_vectors == 2 * 12
    path.with_suffix(".json").unlink()
    with pytest.raises(UsageError, match="block.npy lies beside block.lengths.npy"):
        Activations([path])
    path.with_suffix(".lengths.npy").unlink()
    assert Activations([path]).num_vectors == 2 * 24


def test_a_second_run_of_collect_does_not_describe_an_exchanged_file(of_two_seeds, tmp_path):
    shutil.copytree(of_two_seeds / "seed0", tmp_path / "acts")
    shutil.copy(of_two_seeds / "seed1" / "mid_block.npy", tmp_path / "acts" / "mid_block.npy")
    options = dict(hook_names=["mid_block"], tokens_per_step=4, num_inference_steps=2)
    config = collect.Config(**options, batch_size=2, max_num_examples=4, device="cpu")
    with pytest.raises(UsageError, match="mid_block.npy is not the file that"):
        collect.main(replace(config, out_dir=str(tmp_path / "acts")))


def test_an_extended_collection_is_described_anew(of_two_seeds, tmp_path):
    shutil.copytree(of_two_seeds / "seed0", tmp_path / "acts")
    before = json.loads((tmp_path / "acts/mid_block.json").read_text())["contents"]
    options = dict(hook_names=["mid_block"], tokens_per_step=4, num_inference_steps=2)
    config = collect.Config(**options, batch_size=2, max_num_examples=6, device="cpu")
    collect.main(replace(config, out_dir=str(tmp_path / "acts")))
    after = json.loads((tmp_path / "acts/mid_block.json").read_text())["contents"]
    assert before.keys() == after.keys() == {".npy", ".tokens.npy"}
    assert before[".npy"] != after[".npy"] and before[".tokens.npy"] != after[".tokens.npy"]
    assert Activations([tmp_path / "acts/mid_block.npy"]).num_prompts == 6


def test_the_checksum_of_a_long_file_reads_its_ends_and_blocks_between(tmp_path):
    path = tmp_path / "long"
    data = np.random.default_rng(0).integers(0, 256, WHOLE_FILE + 1000, np.uint8)
    path.write_bytes(data.tobytes())
    before = contents_checksum(path)
    for place in (0, WHOLE_FILE // 63 * 5 + 2000, len(data) - 1):
        flip(path, place)
        assert contents_checksum(path) != before
        flip(path, place)
    assert contents_checksum(path) == before
    path.write_bytes(data[:-1].tobytes())
    assert contents_checksum(path) != before


# ------------------------------------------------------------------------- stopped, cut and damaged


def describe(path, x, lengths=None, tokens=None, **meta):
    """Write an activation file as collect.py does."""
    np.save(path, x)
    meta = {
        "format": 1,
        "hook_name": "block",
        "side": "output",
        "rows": "cond",
        "stream": "image",
        "model": "toy",
        **meta,
    }
    meta |= {"timesteps": list(range(x.shape[1])), "shape": list(x.shape)}
    path.with_suffix(".json").write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    rows = [
        {"id": p, "prompt": f"a {'red' if p % 2 else 'blue'} thing {p}", "seed": p}
        for p in range(len(x))
    ]
    (path.parent / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if lengths is not None:
        np.save(path.with_suffix(".lengths.npy"), lengths)
    if tokens is not None:
        np.save(path.with_suffix(".tokens.npy"), tokens)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An activation file and an SAE of it: the folder that holds acts/ and sae/."""
    base = tmp_path_factory.mktemp("small")
    (base / "acts").mkdir()
    x = np.random.default_rng(0).standard_normal((40, 2, 64, 8)).astype(np.float32)
    describe(base / "acts" / "block.npy", x, grid=[8, 8])
    data = [str(base / "acts" / "block.npy")]
    train.main(
        train.Config(
            data=data, num_latents=[32], k=[4], out_dir=str(base), run_name="sae", device="cpu"
        )
    )
    return base


STAGES = {
    "evaluate.py": ["--sae", "sae"],
    "features.py": ["--sae", "sae"],
    "steer.py": ["--sae", "sae", "--concept", "red"],
    "train.py": ["--data", "acts/block.npy", "--num_latents", 16, "--out_dir", "more"],
    "diagnose.py": ["--data", "acts/block.npy"],
}


@pytest.mark.parametrize("script", STAGES)
def test_a_stopped_extension_is_refused_by_every_stage(script, small, tmp_path):
    """What is not yet written reads as zeros; the file has no description then, and another
    name."""
    folder = shutil.copytree(small, tmp_path / "base")
    (folder / "acts" / "block.npy").rename(folder / "acts" / "block.npy.partial")
    (folder / "acts" / "block.json").unlink()
    done = run_script(script, *STAGES[script], "--device", "cpu", cwd=folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (
        "block.npy.partial is not finished" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


@pytest.mark.parametrize("script", STAGES)
def test_a_file_that_is_cut_while_it_is_read_is_one_line(script, small, tmp_path):
    """It was opened whole, so only reading can notice; a memory map ended Python with SIGBUS."""
    folder = shutil.copytree(small, tmp_path / "base")
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = {[script, *map(str, STAGES[script]), "--device", "cpu"]!r}
import store.dataset
begin = store.dataset.Activations.__init__
def begin_and_cut(self, *args, **options):
    begin(self, *args, **options)
    os.truncate(self.paths[0], 1000)
store.dataset.Activations.__init__ = begin_and_cut
import {script[:-3]} as stage
from cli import run_script
run_script(stage.main, stage.Config)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    assert "block.npy" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("cut", [False, True])
def test_other_readers_notice_a_cut_too(cut, tmp_path):
    x = np.random.default_rng(0).standard_normal((6, 2, 64, 8)).astype(np.float32)
    describe(tmp_path / "block.npy", x)
    activations = Activations([tmp_path / "block.npy"])
    if cut:
        os.truncate(tmp_path / "block.npy", 400)
    readers = [
        lambda: list(activations.held_out()),
        lambda: activations.sample(64),
        lambda: activations.read_image(5),
        lambda: image_scores(Sae(8, 16, 2), activations),
        lambda: list(activations.batches(32, 64)),
    ]
    for reader in readers:
        with (
            pytest.raises(
                UsageError,
                match="block.npy (has become shorter while it was read|was replaced or changed while it was in use)",
            )
            if cut
            else nullcontext()
        ):
            reader()


def damaged_arrays(good, path):
    """Files in the place of a good array of whole numbers."""
    np.save(path, good)
    whole = path.read_bytes()
    damages = {
        "empty": b"",
        "garbage": os.urandom(300),
        "cut": whole[:-3],
        "half a header": whole[:50],
    }
    for name, wrong in (
        ("shape", good[:-1]),
        ("float", good.astype(np.float32)),
        ("text", good.astype("U1")),
        ("beyond", np.full_like(good, 9999)),
        ("negative", np.full(good.shape, -1, np.int64)),
    ):
        np.save(path, wrong)
        damages[name] = path.read_bytes()
    np.save(path, good.astype(object), allow_pickle=True)
    damages["pickle"] = path.read_bytes()
    return damages


def test_damaged_files_beside_the_activations_are_one_line(small, tmp_path):
    x = np.random.default_rng(0).standard_normal((4, 2, 5, 8)).astype(np.float32)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 2, 5)).astype(np.uint16)
    describe(tmp_path / "block.npy", x, grid=[8, 8], tokens=tokens)
    config = features.Config(
        sae=str(small / "sae"),
        data=[str(tmp_path / "block.npy")],
        out_dir=str(tmp_path),
        device="cpu",
    )
    features.main(config)
    path = tmp_path / "block.tokens.npy"
    for name, data in damaged_arrays(tokens, path).items():
        path.write_bytes(data)
        with pytest.raises(UsageError, match="block.tokens.npy"):
            features.main(config)
        assert name
    done = run_script(
        "features.py",
        "--sae",
        small / "sae",
        "--data",
        tmp_path / "block.npy",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and "block.tokens.npy" in done.stderr
    )

    lengths = np.array([5, 3, 1, 2])
    (tmp_path / "text").mkdir()
    describe(tmp_path / "text" / "block.npy", x, stream="text", lengths=lengths)
    path = tmp_path / "text" / "block.lengths.npy"
    for data in damaged_arrays(lengths, path).values():
        path.write_bytes(data)
        with pytest.raises(UsageError, match="block.lengths.npy"):
            Activations([tmp_path / "text" / "block.npy"])
    done = run_script(
        "train.py", "--data", tmp_path / "text" / "block.npy", "--device", "cpu", cwd=tmp_path
    )
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and "block.lengths.npy" in done.stderr
    )


DAMAGED_LINES = [
    "3",
    "[1]",
    '"text"',
    "null",
    "{}",
    '{"iteration": "1"}',
    "{",
    "\x00\x00",
    '{"iteration": 1, "fvu": null}',
]


def test_a_damaged_line_of_metrics_jsonl_is_one_line(small, tmp_path, monkeypatch):
    words = [
        "--data",
        small / "acts" / "block.npy",
        "--num_latents",
        16,
        "--k",
        2,
        "--effective_batch_size",
        64,
    ]
    words += ["--log_every", 2, "--out_dir", tmp_path, "--run_name", "run", "--device", "cpu"]
    path = tmp_path / "run" / "metrics.jsonl"
    options = dict(
        data=[str(small / "acts" / "block.npy")],
        num_latents=[16],
        k=[2],
        effective_batch_size=64,
        log_every=2,
    )
    config = train.Config(**options, out_dir=str(tmp_path), run_name="run", device="cpu")
    real, calls = train.SparseUpdate.step, []

    def step(*args, **options):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.SparseUpdate, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    good = path.read_text()
    first, rest = good.split("\n", 1)
    for line in DAMAGED_LINES:
        path.write_text(f"{first}\n{line}\n{rest}")
        with pytest.raises(UsageError, match="metrics.jsonl: line 2 is damaged; remove it"):
            train.main(config)
    done = run_script("train.py", *words, cwd=tmp_path)
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and "line 2 is damaged" in done.stderr
    )
    path.write_text(f"{good}\x00\x00\n{{")  # as a power cut leaves it
    train.main(config)
    iterations = [json.loads(line)["iteration"] for line in path.read_text().splitlines()]
    assert iterations == sorted(set(iterations)) and len(iterations) > 10


# ----------------------------------------------------------------- files of one huge prompt or none


def sparse_file(path, shape):
    """A file of zeros that takes no room on the disk."""
    np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
    return path


def test_little_of_a_huge_plain_file_is_held_out_and_it_is_read_in_blocks(tmp_path, monkeypatch):
    """A piece of 40 million vectors has 1.25 million: more than are ever held out, and it was read
    at once."""
    path = sparse_file(tmp_path / "x.npy", (40_000_000, 4))
    sizes, read = [], Activations.read
    monkeypatch.setattr(
        Activations, "read", lambda self, pieces: [sizes.append(pieces), read(self, pieces)][1]
    )
    Sae(4, 8, 2).save_to_disk(tmp_path / "sae")
    evaluate.main(
        evaluate.Config(
            sae=str(tmp_path / "sae"), data=[str(path)], out_dir=str(tmp_path / "e"), device="cpu"
        )
    )
    record = json.loads((tmp_path / "e" / "sae" / "evaluate.json").read_text())
    assert record["vectors"] == 1_000_000 and record["whole_prompts"] is False
    assert max((pieces[:, 2] - pieces[:, 1]).sum() for pieces in sizes if len(pieces) == 1) <= 4096

    activations = Activations([path])
    units = np.concatenate([activations.training_units, activations.held_out_units])
    units = units[units[:, 1].argsort()]
    assert (units[1:, 1] == units[:-1, 2]).all() and units[0, 1] == 0 and units[-1, 2] == 40_000_000
    assert (
        activations.num_held_out + activations.num_training == activations.num_vectors == 40_000_000
    )
    assert sum(map(len, activations.held_out())) == 1_000_000


@pytest.mark.parametrize(
    "shape", [(10, 1_000_000, 4), (1, 20_000_000, 4)], ids=["few prompts", "one prompt"]
)
def test_a_huge_prompt_is_read_in_blocks(shape, tmp_path, monkeypatch):
    """A prompt stays whole, one alone is cut in pieces; neither is in memory at once."""
    activations = Activations([sparse_file(tmp_path / "x.npy", shape)])
    assert activations.num_held_out == 1_000_000
    monkeypatch.setattr(dataset, "READ_BYTES", 80_000)
    blocks = [len(block) for block in activations.held_out()]
    assert sum(blocks) == 1_000_000 and max(blocks) == 10_000


def test_held_out_pieces_that_fit_stay_as_they_were(tmp_path):
    path = sparse_file(tmp_path / "x.npy", (320_000, 4))
    units = Activations([path]).held_out_units
    assert (
        (units[:, 1] % 10_000 == 0).all()
        and (units[:, 2] - units[:, 1] == 10_000).all()
        and len(units) == 8
    )


# ---------------------------------------------------------------------------- folders of saved rows


def saved_rows(folder, images, steps, num_tokens=4):
    """Rows of images (n,) at steps (n,), each image with numbers of its own, as the ancestor saves
    them."""
    from datasets import Array2D, Dataset, Features, Value, disable_progress_bars

    disable_progress_bars()
    rng = np.random.default_rng(0)
    own = rng.standard_normal((max(images) + 1, num_tokens, 8)).astype(np.float32)
    own[:, :, 0] = np.arange(max(images) + 1)[:, None]
    x = own[images]
    x[:, :, 1] = np.array(steps)[:, None]
    kinds = Features({"activations": Array2D(x.shape[1:], "float32"), "timestep": Value("uint16")})
    Dataset.from_dict(
        {"activations": x, "timestep": [900 - 100 * s for s in steps]}, features=kinds
    ).save_to_disk(folder)
    return folder


def orders():
    """{name: (image, step) of each row} of 40 images in 3 steps."""
    by_step = [(image, step) for step in range(3) for image in range(40)]
    in_batches = [
        (image, step)
        for batch in (range(16), range(16, 32), range(32, 40))
        for step in range(3)
        for image in batch
    ]
    by_image = [(image, step) for image in range(40) for step in range(3)]
    mixed = [by_image[i] for i in np.random.default_rng(0).permutation(120)]
    return {"by image": by_image, "by step": by_step, "in batches": in_batches, "mixed": mixed}


@pytest.mark.parametrize("order", orders())
def test_rows_of_one_image_are_on_one_side_or_it_is_said(order, tmp_path, capsys):
    """A folder that is ordered by step had each image on both sides, and said "whole prompts"."""
    images, steps = zip(*orders()[order])
    folder = saved_rows(tmp_path / "rows", list(images), list(steps))
    activations = Activations([folder])
    held_out = torch.cat(list(activations.held_out()))
    training = torch.cat([x for x, _ in activations.batches(64, activations.num_training)])
    assert len(held_out) + len(training) == 480
    shared = set(held_out[:, 0].tolist()) & set(training[:, 0].tolist())
    assert activations.whole_prompts == (order != "mixed") == (not shared)
    assert activations.num_prompts == (0 if order == "mixed" else 40)

    options = dict(
        num_latents=[16],
        k=[2],
        effective_batch_size=64,
        out_dir=str(tmp_path / "saes"),
        run_name="r",
        device="cpu",
    )
    train.main(train.Config(data=[str(folder)], **options))
    evaluate.main(
        evaluate.Config(sae=str(tmp_path / "saes" / "r"), out_dir=str(tmp_path / "e"), device="cpu")
    )
    assert capsys.readouterr().out.count("no prompts to hold out whole") == (
        2 if order == "mixed" else 0
    )
    assert json.loads((tmp_path / "saes" / "r" / "cfg.json").read_text())[
        "held_out_whole_prompts"
    ] == (order != "mixed")


def test_orders_of_timesteps_that_tell_no_image():
    from store.activation_file import images_by_step

    assert images_by_step(np.array([900, 900, 500, 500, 900, 500])) == [0, 1, 0, 1, 2, 2]
    for times in (
        [900, 900, 500],
        [900, 500, 500],
        [900, 900, 500, 500, 500, 500, 900, 900],
        [900, 500, 900, 100],
        [1, 1, 2, 1],
    ):
        assert images_by_step(np.array(times)) is None, times


def test_a_file_that_is_replaced_while_it_is_in_use_is_refused(tmp_path):
    """Not read with the width of the old one."""
    path = tmp_path / "x.npy"
    np.save(path, np.ones((64, 16), np.float32))
    activations = Activations([path])
    activations.sample(8)
    np.save(path, np.ones((64, 32), np.float32))
    for read in (
        lambda: activations.sample(8),
        lambda: list(activations.held_out()),
        lambda: list(activations.batches(8, 16)),
    ):
        with pytest.raises(UsageError, match="was replaced or changed while it was in use"):
            read()


def test_numbers_that_are_not_finite_or_vanish_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("store.dataset.HELD_OUT", dict(share=0.1, at_least=0, at_most=10**9))
    x = np.random.default_rng(0).normal(size=(64, 3, 4, 8)).astype(np.float32)
    np.save("x.npy", x)
    np.save("tiny.npy", x * 1e-30)
    with pytest.raises(UsageError, match="all equal or too large or small"):
        diagnose.main(diagnose.Config(data=["tiny.npy"], device="cpu"))
    Sae(8, 16, 2, {"data": ["x.npy"]}).save_to_disk("sae")
    file, first, _ = Activations(["x.npy"]).held_out_units[0]
    x.reshape(-1, 8)[first] = np.nan
    np.save("x.npy", x)
    with pytest.raises(UsageError, match="NaN or inf in held-out vectors"):
        evaluate.main(evaluate.Config(sae="sae", device="cpu"))


# --------------------------------------------------------------------------------- found by testers


def list_rows(path, rows):
    """Write prompts.jsonl beside an activation file."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path.parent / "prompts.jsonl").write_text(text)


def sides(data, rows):
    """The rows of prompts.jsonl that are trained on, and those that are held out."""
    vectors_per_row = data.num_vectors // len(rows)
    held_out = set((data.held_out_units[:, 1] // vectors_per_row).tolist())
    assert 0 < len(held_out) < len(rows)
    return (
        [row for number, row in enumerate(rows) if number not in held_out],
        [row for number, row in enumerate(rows) if number in held_out],
    )


def values(rows, name):
    return {row[name] for row in rows}


def test_captions_of_one_picture_lie_on_one_side(tmp_path):
    """As in COCO: 8 pictures, each with 5 captions; two pictures also share a caption."""
    path = tmp_path / "a.npy"
    describe(path, np.random.default_rng(0).standard_normal((40, 2, 3, 4)).astype(np.float32))
    rows = [
        {"prompt": f"caption {caption} of {picture}", "image_digest": f"d{picture}"}
        for caption in range(5)
        for picture in range(8)
    ]
    rows[3]["prompt"] = rows[1]["prompt"]
    list_rows(path, rows)
    data = Activations([path])
    assert data.num_prompts == 7 and data.whole_prompts
    trained, held_out = sides(data, rows)
    assert not values(trained, "image_digest") & values(held_out, "image_digest")
    assert not values(trained, "prompt") & values(held_out, "prompt")

    # an SAE of it has seen the pictures of the training rows under any other caption, too
    again = [
        {"prompt": f"other {row['prompt']}", "image_digest": row["image_digest"]} for row in rows
    ]
    list_rows(path, again)
    seen = Activations([path], seen=data.training_prompts)
    assert seen.unseen
    assert values(sides(seen, again)[1], "image_digest") == values(held_out, "image_digest")


@pytest.mark.parametrize("alike", ["prompt", "image_digest", "both cross"])
def test_rows_that_all_hang_together_are_split_by_their_pictures_or_else_their_texts(
    alike, tmp_path
):
    """Where no split keeps both apart, the pictures decide if there are several."""
    path = tmp_path / "a.npy"
    describe(path, np.random.default_rng(0).standard_normal((20, 2, 3, 4)).astype(np.float32))
    rows = []
    for number in range(20):
        prompt = "a photo" if alike == "prompt" else f"text {number % 5}"
        picture = "d" if alike == "image_digest" else f"d{number // 5}"
        rows.append({"prompt": prompt, "image_digest": picture})
    list_rows(path, rows)
    data = Activations([path])
    split_by = "prompt" if alike == "image_digest" else "image_digest"
    trained, held_out = sides(data, rows)
    assert not values(trained, split_by) & values(held_out, split_by)
    assert data.whole_prompts and data.num_prompts == len(values(rows, split_by))
    assert len(data.training_prompts) == len(values(trained, split_by))


def test_a_link_to_an_activation_file_stands_for_the_file(small, tmp_path, capsys):
    real = small / "acts/block.npy"
    link = tmp_path / "link.npy"
    link.symlink_to(real)
    by_link = dataset.open_activations([link])[0]
    by_name = Activations([real])
    assert by_link.paths == [os.path.realpath(real)] and by_link.hook_name == "block"
    assert by_link.training_prompts == by_name.training_prompts
    assert np.array_equal(by_link.held_out_units, by_name.held_out_units)
    assert Activations([link]).training_prompts == by_name.training_prompts
    assert len(dataset.open_activations([link, real])[0].paths) == 1
    options = dict(data=[str(link)], device="cpu", out_dir=str(tmp_path / "evaluations"))
    evaluate.main(evaluate.Config(sae=str(small / "sae"), **options))
    printed = capsys.readouterr().out
    assert "may be among them" not in printed and "whether the hook_name" not in printed

    # a link with a description of its own beside it, as in a download, keeps its path
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in real.parent.iterdir():
        (linked / file.name).symlink_to(file)
    by_links = dataset.open_activations([linked])[0]
    assert by_links.paths == [str(linked / "block.npy")]
    assert by_links.training_prompts == by_name.training_prompts


@pytest.mark.parametrize("suffix", [".tokens.npy", ".timesteps.npy", ".lengths.npy"])
def test_a_file_beside_side_files_needs_its_description(suffix, tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 4, 16, 8)).astype(np.float32)
    np.save(tmp_path / "b.text.npy", x)
    np.save(tmp_path / f"b.text{suffix}", np.full(40, 3))
    (tmp_path / "link.npy").symlink_to(tmp_path / "b.text.npy")
    for name in ("b.text.npy", "link.npy"):
        with pytest.raises(UsageError, match=f"b.text.npy lies beside b.text{suffix}"):
            dataset.open_activations([tmp_path / name])


def of_two_guidances(folder):
    """Two files of one model and hook point, the second collected with another guidance."""
    for number, guidance in enumerate((7.5, 1.5)):
        (folder / str(number)).mkdir()
        x = np.random.default_rng(number).standard_normal((40, 2, 64, 8)).astype(np.float32)
        options = {"pipeline_kwargs": {"guidance_scale": guidance}, "id": f"id{number}"}
        describe(folder / str(number) / "block.npy", x, grid=[8, 8], **options)
    return [str(folder / "0/block.npy"), str(folder / "1/block.npy")]


def test_every_file_is_compared_with_the_sae(tmp_path, capsys):
    data = of_two_guidances(tmp_path)
    config = train.Config(data=data[:1], num_latents=[32], k=[4], out_dir=str(tmp_path))
    train.main(replace(config, run_name="sae", device="cpu"))
    capsys.readouterr()
    options = dict(sae=str(tmp_path / "sae"), data=data, device="cpu")
    for number, stage in enumerate((evaluate, features)):
        stage.main(stage.Config(**options, out_dir=str(tmp_path / f"out{number}")))
        printed = capsys.readouterr().out
        assert printed.count("was collected otherwise than the SAE's training vectors") == 1
        assert f"note: {data[1]} was collected" in printed
        assert "guidance_scale 1.5, not 7.5" in printed


def test_diagnosis_says_which_file_was_collected_otherwise(tmp_path, capsys):
    data = of_two_guidances(tmp_path)
    options = dict(trial_updates=2, device="cpu", out_dir=str(tmp_path / "diagnosis"))
    diagnose.main(diagnose.Config(data=data, **options))
    printed = capsys.readouterr().out
    assert f"note: {data[1]} was collected otherwise than {data[0]}" in printed


def test_each_kind_of_file_is_compared_once(tmp_path, capsys):
    """Five shards that differ alike are one line, not five."""
    paths = []
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        x = np.random.default_rng(number).standard_normal((8, 2, 4, 8)).astype(np.float32)
        paths.append(tmp_path / str(number) / "block.npy")
        describe(paths[-1], x, id=f"id{number}", seed=1)
    point = {"hook_name": "block", "side": "output", "rows": "cond", "stream": "image"}
    sae = Sae(8, 16, 2, {**point, "collected_with": {"seed": 0}})
    activations_of(sae, "sae", paths)
    assert capsys.readouterr().out.count("seed 1, not 0") == 1


@pytest.mark.parametrize("large", [False, True])
def test_copies_of_plain_files_are_refused(large, tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 16, 8)).astype(np.float32)
    if large:
        x = np.resize(x, (40, 1 << 14, 8))
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "b.npy", x + 1)
    shutil.copy(tmp_path / "a.npy", tmp_path / "c.npy")
    assert len(dataset.open_activations([tmp_path / "a.npy", tmp_path / "b.npy"])[0].paths) == 2
    with pytest.raises(UsageError, match="a.npy and .*c.npy have the same contents"):
        dataset.open_activations([tmp_path])


def test_copies_of_saved_rows_are_refused(tmp_path):
    (tmp_path / "first").mkdir()
    saved_rows(tmp_path / "first/rows", [0, 0, 1, 1], [0, 1, 0, 1])
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    with pytest.raises(UsageError, match="first/rows and .*second/rows have the same contents"):
        dataset.open_activations([tmp_path / "first/rows", tmp_path / "second/rows"])


def test_too_few_vectors_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    np.save("two.npy", x[:2])
    np.save("equal.npy", np.ones((40, 8), np.float32))
    config = train.Config(data=["two.npy"], num_latents=[16], k=[2], device="cpu")
    with pytest.raises(UsageError, match="two.npy has 1 training vector, too few to learn from"):
        train.main(config)
    with pytest.raises(UsageError, match="two.npy has 1 training vector, too few to learn from"):
        diagnose.main(diagnose.Config(data=["two.npy"], device="cpu"))
    with pytest.raises(UsageError, match="the sampled vectors are all equal"):
        train.main(replace(config, data=["equal.npy"]))


def test_sizes_beyond_the_data_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).standard_normal((4000, 8)).astype(np.float32))
    config = train.Config(data=["x.npy"], num_latents=[16], k=[2], device="cpu")
    num_training = Activations(["x.npy"]).num_training
    for number, (options, line) in enumerate(
        (
            ({}, None),
            (
                {"effective_batch_size": 10**7},
                "note: --effective_batch_size 10000000 is more than the number of vectors in the "
                f"run, {num_training}, so there is a single update",
            ),
            (
                {"max_examples": 1},
                "note: --effective_batch_size 1024 is more than the number of vectors in the "
                "run, 1, so there is a single update",
            ),
            (
                {"grad_acc_steps": 10**6},
                "note: --grad_acc_steps 1000000 has the effect of 1024, "
                "since a batch has no more vectors",
            ),
        )
    ):
        train.main(replace(config, run_name=str(number), **options))
        printed = capsys.readouterr().out
        if line is None:
            assert "--effective_batch_size" not in printed and "--grad_acc_steps" not in printed
        else:
            assert line in printed


def test_arrays_in_another_order_of_bytes_or_axes_say_the_way_on(tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 16, 8)).astype(np.float32)
    ways = {
        "big": (x.astype(">f4"), 'x.astype("<f4")'),
        "fortran": (np.asfortranarray(x), "np.ascontiguousarray(x)"),
    }
    for name, (array, way) in ways.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(UsageError) as error:
            Activations([tmp_path / f"{name}.npy"])
        assert way in str(error.value)
