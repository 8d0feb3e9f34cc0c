"""A description is believed only for the file that it was written for."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from files import flip, read_json, write_activations

import collect
import evaluate
from errors import UsageError
from store import dataset
from store.activation_file import WHOLE_FILE, contents_checksum
from store.dataset import Activations

pytestmark = pytest.mark.slow


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
    acts = tmp_path / "acts"
    name = f"mid_block{suffix}"
    shutil.copytree(of_two_seeds / "seed0", acts)
    Activations([acts / "mid_block.npy"])
    shutil.copy(of_two_seeds / "seed1" / name, acts / name)
    with pytest.raises(UsageError, match=f"{name} is not the file that .*mid_block.json describes"):
        Activations([acts / "mid_block.npy"])


def test_padding_without_a_description_is_not_taken_for_vectors(tmp_path):
    """Lengths beside a file whose .json is gone: nothing says that they are meant."""
    x = np.random.default_rng(0).standard_normal((4, 2, 6, 3)).astype(np.float32)
    path = tmp_path / "block.npy"
    write_activations(path, x, stream="text", lengths=np.array([6, 2, 3, 1]))
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
    before = read_json(tmp_path / "acts/mid_block.json")["contents"]
    options = dict(hook_names=["mid_block"], tokens_per_step=4, num_inference_steps=2)
    config = collect.Config(**options, batch_size=2, max_num_examples=6, device="cpu")
    collect.main(replace(config, out_dir=str(tmp_path / "acts")))
    after = read_json(tmp_path / "acts/mid_block.json")["contents"]
    assert before.keys() == after.keys() == {".npy", ".tokens.npy"}
    assert before[".npy"] != after[".npy"]
    assert before[".tokens.npy"] != after[".tokens.npy"]
    assert Activations([tmp_path / "acts/mid_block.npy"]).num_prompts == 6


def test_the_checksum_of_a_long_file_reads_its_ends_and_blocks_between(tmp_path):
    path = tmp_path / "long"
    data = np.random.default_rng(0).integers(0, 256, WHOLE_FILE + 1000, np.uint8)
    path.write_bytes(data.tobytes())
    before = contents_checksum(path)
    for offset in (0, WHOLE_FILE // 63 * 5 + 2000, len(data) - 1):
        flip(path, offset)
        assert contents_checksum(path) != before
        flip(path, offset)
    assert contents_checksum(path) == before
    path.write_bytes(data[:-1].tobytes())
    assert contents_checksum(path) != before


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


def test_a_link_to_an_activation_file_stands_for_the_file(described_sae, tmp_path, capsys):
    real = described_sae / "acts/block.npy"
    link = tmp_path / "link.npy"
    link.symlink_to(real)
    by_link = dataset.open_activations([link])[0]
    by_name = Activations([real])
    assert by_link.paths == [os.path.realpath(real)]
    assert by_link.hook_name == "block"
    assert by_link.training_prompts == by_name.training_prompts
    assert np.array_equal(by_link.held_out_units, by_name.held_out_units)
    assert Activations([link]).training_prompts == by_name.training_prompts
    assert len(dataset.open_activations([link, real])[0].paths) == 1
    options = dict(data=[str(link)], device="cpu", out_dir=str(tmp_path / "evaluations"))
    evaluate.main(evaluate.Config(sae=str(described_sae / "sae"), **options))
    printed = capsys.readouterr().out
    assert "may be among them" not in printed
    assert "whether the hook_name" not in printed

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
