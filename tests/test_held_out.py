"""Which vectors are held out: whole prompts and pictures where there are some, never too many."""

import json

import numpy as np
import pytest
import torch
from files import read_json, saved_rows, write_activations
from spies import note_calls

import evaluate
import train
from sae import Sae
from store import dataset
from store.dataset import Activations

pytestmark = pytest.mark.slow


def sparse_file(path, shape):
    """A file of zeros that takes no room on the disk."""
    np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
    return path


def test_little_of_a_huge_plain_file_is_held_out_and_it_is_read_in_blocks(tmp_path, monkeypatch):
    """A piece of 40 million vectors has 1.25 million: more than are ever held out, and it was read
    at once."""
    path = sparse_file(tmp_path / "x.npy", (40_000_000, 4))
    readings = note_calls(monkeypatch, Activations, "read", lambda self, pieces: pieces)
    Sae(4, 8, 2).save_to_disk(tmp_path / "sae")
    evaluate.main(
        evaluate.Config(
            sae=str(tmp_path / "sae"), data=[str(path)], out_dir=str(tmp_path / "e"), device="cpu"
        )
    )
    record = read_json(tmp_path / "e" / "sae" / "evaluate.json")
    assert record["vectors"] == 1_000_000
    assert record["whole_prompts"] is False
    of_one_piece = [pieces for pieces in readings if len(pieces) == 1]
    assert max((pieces[:, 2] - pieces[:, 1]).sum() for pieces in of_one_piece) <= 4096

    activations = Activations([path])
    units = np.concatenate([activations.training_units, activations.held_out_units])
    units = units[units[:, 1].argsort()]
    assert (units[1:, 1] == units[:-1, 2]).all()
    assert units[0, 1] == 0
    assert units[-1, 2] == 40_000_000
    assert activations.num_vectors == 40_000_000
    assert activations.num_held_out + activations.num_training == 40_000_000
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
    assert sum(blocks) == 1_000_000
    assert max(blocks) == 10_000


def test_held_out_pieces_that_fit_stay_as_they_were(tmp_path):
    path = sparse_file(tmp_path / "x.npy", (320_000, 4))
    units = Activations([path]).held_out_units
    assert (units[:, 1] % 10_000 == 0).all()
    assert (units[:, 2] - units[:, 1] == 10_000).all()
    assert len(units) == 8


def orders():
    """{name: (image, step) of each row} of 40 images in 3 steps."""
    steps = range(3)
    by_step = [(image, step) for step in steps for image in range(40)]
    by_image = [(image, step) for image in range(40) for step in steps]
    in_batches = []
    for batch in (range(16), range(16, 32), range(32, 40)):
        in_batches += [(image, step) for step in steps for image in batch]
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
    assert read_json(tmp_path / "saes" / "r" / "cfg.json")["held_out_whole_prompts"] == (
        order != "mixed"
    )


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
    write_activations(
        path, np.random.default_rng(0).standard_normal((40, 2, 3, 4)).astype(np.float32)
    )
    rows = [
        {"prompt": f"caption {caption} of {picture}", "image_digest": f"d{picture}"}
        for caption in range(5)
        for picture in range(8)
    ]
    rows[3]["prompt"] = rows[1]["prompt"]
    list_rows(path, rows)
    data = Activations([path])
    assert data.num_prompts == 7
    assert data.whole_prompts
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
    write_activations(
        path, np.random.default_rng(0).standard_normal((20, 2, 3, 4)).astype(np.float32)
    )
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
    assert data.whole_prompts
    assert data.num_prompts == len(values(rows, split_by))
    assert len(data.training_prompts) == len(values(trained, split_by))
