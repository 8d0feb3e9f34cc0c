"""Several activation files together: each is read, compared with the SAE, and no copy counts twice."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import ROOT
from files import read_lines, saved_rows, write_activations

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
from store.dataset import Activations
from store.identity import activations_of
from store.prompts import load_prompts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def of_two_files(tmp_path_factory):
    """An SAE of two bfloat16 files of the toy's activations, 24 prompts each: its folder."""
    base = tmp_path_factory.mktemp("two")
    lines = (ROOT / "toy" / "prompts.csv").read_text().splitlines()
    prompts = load_prompts(str(ROOT / "toy" / "prompts.csv"))
    header = lines[0]
    kinds = {}  # {(object, style): lines of its prompts}
    for row, line in zip(prompts, lines[1:]):
        kinds.setdefault((row["object"], row["style"]), []).append(line)
    for number, name in enumerate("ab"):
        table = [header, *(lines_of_kind[number] for lines_of_kind in kinds.values())]
        (base / f"{name}.csv").write_text("\n".join(table) + "\n")
        config = collect.Config(
            hook_names=["mid_block.attentions.0"],
            dataset_name=str(base / f"{name}.csv"),
            store_dtype="bfloat16",
            out_dir=str(base / name),
            device="cpu",
            num_inference_steps=2,
            max_num_examples=48,
            batch_size=48,
            save_images=False,
        )
        collect.main(config)
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


class Stop(Exception):
    """Ends a script where enough of it has run."""


def test_unlearning_reads_numbers_of_all_files_and_excludes_all_their_prompts(
    of_two_files, tmp_path, monkeypatch
):
    sae = Sae.load_from_disk(of_two_files)
    paths = [of_two_files.parent / name / "mid_block.attentions.0.npy" for name in "ab"]
    domain = unlearn.domains_of([sae], {"object": ("moon", "star")})["object"]
    expected = np.concatenate([numbers_of(path).mean(2) for path in paths])
    assert domain.means.shape == (96, 2, 160)
    assert len(domain.labels) == len(domain.scores) == 96
    assert np.allclose(domain.means.numpy(), expected, rtol=1e-3, atol=1e-5)
    assert domain.means.abs().max() < 100

    excluded = []

    def split_prompts(rows, used, per_cell):
        excluded.append(used)
        raise Stop

    monkeypatch.setattr(unlearn, "split_prompts", split_prompts)
    config = unlearn.Config(sae=[str(of_two_files)], unlearn="moon", out_dir=str(tmp_path))
    with pytest.raises(Stop):
        unlearn.main(replace(config, device="cpu"))
    listed = set()
    for path in paths:
        listed |= {row["prompt"] for row in read_lines(path.with_name("prompts.jsonl"))}
    assert len(listed) == 96
    assert excluded == [listed]


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
    assert len(listing) == 96
    assert max(chosen) >= 48
    for score, picture in zip(scores[::5], chosen[::5]):
        acts, indices = sae.encode(torch.from_numpy(x[picture]))[:2]
        codes = torch.zeros(*acts.shape[:2], 64).scatter_add_(2, indices, acts)
        assert torch.allclose(score, codes.mean(1), atol=1e-4)


def of_two_guidances(folder):
    """Two files of one model and hook point, the second collected with another guidance."""
    for number, guidance in enumerate((7.5, 1.5)):
        (folder / str(number)).mkdir()
        x = np.random.default_rng(number).standard_normal((40, 2, 64, 8)).astype(np.float32)
        options = {"pipeline_kwargs": {"guidance_scale": guidance}, "id": f"id{number}"}
        write_activations(folder / str(number) / "block.npy", x, grid=[8, 8], **options)
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
        write_activations(paths[-1], x, id=f"id{number}", seed=1)
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
