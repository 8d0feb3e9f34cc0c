"""A collection that was made anew, extended or changed beside an SAE that knew the old one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from files import read_json
from PIL import Image
from project import (
    HOOK,
    PROMPTS,
    collection_config,
    evaluation_config,
    other_weights,
    train_project_sae,
)

import collect
import evaluate
import features
import steer
from analysis.metrics import Metrics
from errors import UsageError
from sae import Sae
from store.activation_file import hash_key, prompt_key
from store.dataset import Activations

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quarter_held_out")]


def test_the_same_path_collected_anew_with_another_seed_is_said(project, capsys):
    shutil.rmtree(project / "acts")
    collect.main(collection_config(rows="both", seed=5))
    capsys.readouterr()
    for run in (
        lambda: evaluate.main(evaluation_config()),
        lambda: features.main(features.Config(sae="saes/sae", device="cpu")),
        lambda: steer.main(
            steer.Config(sae=["saes/sae"], features=["1"], num_prompts=1, device="cpu")
        ),
    ):
        run()
        assert (
            "was collected otherwise than the SAE's training vectors: seed 5, not 0"
            in capsys.readouterr().out
        )


def test_the_same_path_collected_anew_with_another_model_is_refused(project):
    shutil.rmtree(project / "acts")
    other_weights(project / "model")
    collect.main(collection_config(rows="both"))
    for run in (
        lambda: evaluate.main(evaluation_config()),
        lambda: features.main(features.Config(sae="saes/sae", device="cpu")),
        lambda: steer.main(steer.Config(sae=["saes/sae"], features=["1"], device="cpu")),
    ):
        with pytest.raises(
            UsageError,
            match="does not belong to .*the weights are those of .*SAE was trained on .*--transfer",
        ):
            run()
    evaluate.main(evaluation_config(transfer=True))
    assert "the weights are those of" in read_json("evaluations/sae/evaluate.json")["transfer"][0]


def test_held_out_is_what_the_sae_never_saw_also_in_an_extended_collection(project):
    seen = Activations([project / "acts" / f"{HOOK}.npy"])
    trained = {
        prompt_key({"prompt": PROMPTS[unit[1] // seen.files[0].tokens // 2]})
        for unit in seen.training_units
    }
    evaluate.main(evaluation_config())
    before = read_json("evaluations/sae/evaluate.json")
    assert before["fvu"] == pytest.approx(read_json("saes/sae/cfg.json")["fvu"], rel=1e-9)
    assert before["surely_unseen"]

    collect.main(collection_config(rows="both", max_num_examples=24))
    evaluate.main(evaluation_config())
    after = read_json("evaluations/sae/evaluate.json")
    x = np.load(project / "acts" / f"{HOOK}.npy").astype(np.float32)
    unseen = [
        i for i, prompt in enumerate(PROMPTS) if prompt_key({"prompt": prompt}) not in trained
    ]
    vectors = torch.from_numpy(x[unseen]).flatten(0, -2)
    sae = Sae.load_from_disk("saes/sae")
    metrics = Metrics(sae.num_latents)
    with torch.no_grad():
        top_acts, top_indices = sae.encode(vectors)
        metrics.update(vectors, sae.decode(top_acts, top_indices), top_acts, top_indices)
    assert after["vectors"] == len(vectors) == 12 * 2 * x.shape[2]
    assert after["fvu"] == pytest.approx(metrics.fvu, rel=1e-5)


def test_a_collection_that_was_seen_whole_has_nothing_held_out(project):
    listing = [prompt_key({"prompt": prompt}) for prompt in PROMPTS]
    (project / "saes/sae/training_prompts.txt").write_text(
        "\n".join(sorted(map(hash_key, listing)))
    )
    cfg = read_json("saes/sae/cfg.json")
    Path("saes/sae/cfg.json").write_text(json.dumps(cfg | {"num_training_prompts": len(listing)}))
    with pytest.raises(UsageError, match="has seen every prompt of .*--data"):
        evaluate.main(evaluation_config())
    lines = (project / "saes/sae/training_prompts.txt").read_text().split("\n")
    for damaged in ("torn", "", "\n".join(lines[:-1])):
        (project / "saes/sae/training_prompts.txt").write_text(damaged)
        with pytest.raises(UsageError, match="training_prompts.txt is damaged"):
            evaluate.main(evaluation_config())


def test_other_weights_under_the_same_name_do_not_extend_a_collection(project):
    other_weights(project / "model")
    with pytest.raises(
        UsageError,
        match="from a model with other weights or settings of its unet, under the same name",
    ):
        collect.main(collection_config(rows="both", max_num_examples=24))


@pytest.mark.parametrize("component", ["unet", "tokenizer"])
def test_settings_and_vocabularies_are_part_of_the_model(project, component, capsys):
    """Those that are not weights: the heads of an attention, the number of a word."""
    if component == "unet":
        path = project / "model/unet/config.json"
        path.write_text(json.dumps(read_json(path) | {"attention_head_dim": 4}))
    else:
        path = next(
            (project / "model/tokenizer").glob("tokenizer.json"),
            project / "model/tokenizer/vocab.json",
        )
        text = path.read_text()
        path.write_text(
            text.replace('"a</w>": ', '"swapped": ')
            .replace('"b</w>": ', '"a</w>": ')
            .replace('"swapped": ', '"b</w>": ')
        )
        assert path.read_text() != text
    with pytest.raises(UsageError, match=f"other weights or settings of its {component}"):
        collect.main(collection_config(rows="both", max_num_examples=24))
    config = steer.Config(
        sae=["saes/sae"], features=["1"], multiply=[0.0], num_prompts=1, device="cpu"
    )
    if component == "unet":
        with pytest.raises(UsageError, match="does not belong to the model"):
            steer.main(config)
    else:
        steer.main(config)
        assert "note: the tokenizer of" in capsys.readouterr().out


def test_copies_and_missing_shards(project, capsys):
    shutil.copytree("acts", "again")
    with pytest.raises(UsageError, match="are copies of one collection"):
        train_project_sae(name="twice", data=[f"acts/{HOOK}.npy", f"again/{HOOK}.npy"])
    for shard in ("0/3", "2/3"):
        collect.main(collection_config(out_dir="shards", shard=shard, batch_size=2))
    capsys.readouterr()
    train_project_sae("shards", "shards")
    assert "note: of 3 shards of a collection 1 are not among the files" in capsys.readouterr().out


def test_one_side_of_the_size_alone_is_refused(project):
    with pytest.raises(UsageError, match="height is given alone"):
        collect.main(collection_config(width=None, out_dir="tall"))


def test_another_scheduler_does_not_extend_a_collection(project):
    path = project / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(read_json(path) | {"beta_end": 0.015}))
    with pytest.raises(UsageError, match="other weights or settings of its scheduler"):
        collect.main(collection_config(rows="both", max_num_examples=24))


@pytest.mark.parametrize("how", ["missing", "short", "another order", "another text"])
def test_a_listing_that_is_not_the_collections_is_refused(project, how):
    listing = project / "acts/prompts.jsonl"
    lines = listing.read_text().splitlines(keepends=True)
    changed = {
        "short": lines[:-1],
        "another order": lines[::-1],
        "another text": [lines[0].replace("blue", "green"), *lines[1:]],
    }
    listing.unlink()
    if how != "missing":
        listing.write_text("".join(changed[how]))
    for run in (
        lambda: train_project_sae(name="again"),
        lambda: evaluate.main(evaluation_config()),
        lambda: features.main(features.Config(sae="saes/sae", device="cpu")),
        lambda: steer.main(steer.Config(sae=["saes/sae"], concept="red", device="cpu")),
    ):
        with pytest.raises(
            UsageError,
            match="prompts.jsonl (is not there|does not say the prompts|was changed after)",
        ):
            run()


def test_another_image_under_the_same_name_does_not_extend_a_collection(project, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        Image.fromarray(np.full((64, 64, 3), 60 * i, np.uint8)).save(photos / f"{i}.png")
    options = dict(
        images=str(photos),
        dataset_name=None,
        num_inference_steps=None,
        out_dir="photo_acts",
        batch_size=2,
    )
    collect.main(collection_config(**options, max_num_examples=2))
    shutil.copy(photos / "3.png", photos / "0.png")
    with pytest.raises(UsageError, match="holds a collection of other prompts"):
        collect.main(collection_config(**options, max_num_examples=4))
    assert prompt_key({"prompt": "", "image": "a.png", "image_digest": "x"}) == prompt_key(
        {"prompt": "", "image": "b.png", "image_digest": "x"}
    )


def test_images_in_another_order_are_refused(project):
    images = project / "acts/images"
    config = features.Config(sae="saes/sae", device="cpu")
    features.main(config)
    first = (images / "0.webp").read_bytes()
    shutil.copy(images / "1.webp", images / "0.webp")
    (images / "1.webp").write_bytes(first)
    with pytest.raises(
        UsageError, match="rows 0 to 7 do not have the images that collect.py saved"
    ):
        features.main(config)
    shutil.rmtree(images)
    features.main(config)
