"""Which prompts steer.py generates, with which negative prompts, and where in the image it edits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from files import read_json
from PIL import Image
from project import HOOK, collection_config, train_project_sae

import collect
import steer
from errors import UsageError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quarter_held_out")]


def test_prompts_of_ones_own_keep_their_own_negative_prompts(project):
    collect.main(collection_config(negative_prompt="blurred", out_dir="negative"))
    train_project_sae(Path("negative") / f"{HOOK}.npy", "negative")
    Path("own.csv").write_text("prompt,negative_prompt\na cat,red\na dog,blue\n")
    steer.main(
        steer.Config(
            sae=["saes/negative"],
            features=["1"],
            multiply=[0.0],
            dataset_name="own.csv",
            device="cpu",
        )
    )
    assert read_json("steer/1_x0/steer.json")["arguments"]["negative_prompt"] == ["red", "blue"]


@pytest.mark.parametrize("mask", [["0", "0", "50", "50"], ["0.5", "0", "0.2", "1"], ["deep.png"]])
def test_masks_that_are_not_understood_are_refused(project, mask):
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save("deep.png")
    config = steer.Config(
        sae=["saes/sae"], features=["1"], multiply=[0.0], num_prompts=1, mask=mask, device="cpu"
    )
    with pytest.raises(UsageError, match="--mask"):
        steer.main(config)


def test_what_is_transparent_in_a_mask_is_not_edited(tmp_path):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:, 4:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert (
        steer.token_mask([str(tmp_path / "mask.png")], (8, 8)).view(8, 8).sum(0).tolist()
        == [8] * 4 + [0] * 4
    )


def test_steering_an_sae_of_real_images_needs_prompts_and_takes_the_pipelines_settings(
    project, tmp_path
):
    (tmp_path / "photos").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    options = dict(
        images=str(tmp_path / "photos"),
        dataset_name=None,
        num_inference_steps=None,
        out_dir="photo_acts",
    )
    collect.main(collection_config(**options))
    train_project_sae(Path("photo_acts") / f"{HOOK}.npy", "photos")
    config = steer.Config(
        sae=["saes/photos"], features=["1"], multiply=[0.0], num_prompts=1, device="cpu"
    )
    with pytest.raises(
        UsageError, match="real images without captions .*: name prompts with --dataset_name"
    ):
        steer.main(config)
    steer.main(replace(config, dataset_name="a red picture"))
    arguments = read_json("steer/1_x0/steer.json")["arguments"]
    # so that the pipeline takes its own
    assert not {"num_inference_steps", "guidance_scale"} & arguments.keys()


def test_prompts_of_ones_own_keep_the_collections_negative_prompt(project):
    collect.main(collection_config(negative_prompt="blurred", out_dir="negative"))
    train_project_sae(Path("negative") / f"{HOOK}.npy", "negative")
    config = steer.Config(
        sae=["saes/negative"],
        features=["1"],
        multiply=[0.0],
        dataset_name="a red picture",
        device="cpu",
    )
    steer.main(config)
    assert read_json("steer/1_x0/steer.json")["arguments"]["negative_prompt"] in (
        "blurred",
        ["blurred"],
    )
    steer.main(replace(config, negative_prompt="ugly", out_dir="other"))
    assert read_json("other/1_x0/steer.json")["arguments"]["negative_prompt"] in ("ugly", ["ugly"])


def test_a_negative_prompt_counts_for_the_activations_own_prompts_too(project):
    config = steer.Config(
        sae=["saes/sae"],
        features=["1"],
        multiply=[0.0],
        num_prompts=1,
        negative_prompt="ugly",
        device="cpu",
    )
    steer.main(config)
    assert read_json("steer/1_x0/steer.json")["arguments"]["negative_prompt"] in ("ugly", ["ugly"])
