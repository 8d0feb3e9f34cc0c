"""steer.py as a user runs it on a tiny pipeline: what is written, chosen, masked and refused."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from files import read_json, read_lines
from PIL import Image

import collect
import steer
import train
from analysis.concepts import contrast, image_scores
from errors import UsageError
from hook import HookedDiffusionModel
from sae import Sae
from steer import Config, main, parse_features, parse_steps, token_mask
from store.dataset import Activations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """Two SAEs of a tiny pipeline's hook points, of 16 and 64 tokens: their folders."""
    base = tmp_path_factory.mktemp("steer")
    listing = "prompt\n" + "".join(
        f"a {'red' if i % 3 else 'blue'} picture of {i}\n" for i in range(12)
    )
    (base / "prompts.csv").write_text(listing)
    options = dict(
        model_name=str(model_folder),
        device="cpu",
        num_inference_steps=4,
        height=64,
        width=64,
        batch_size=6,
    )
    options |= dict(
        dataset_name=str(base / "prompts.csv"), max_num_examples=12, out_dir=str(base / "acts")
    )
    names = ["mid_block.attentions.0", "up_blocks.0.attentions.1"]
    collect.main(collect.Config(hook_names=names, **options))
    folders = []
    for name in names:
        data = [str(base / "acts" / f"{name}.npy")]
        train.main(
            train.Config(
                data=data,
                num_latents=[40],
                k=[4],
                out_dir=str(base / "saes"),
                run_name=name,
                device="cpu",
            )
        )
        folders.append(str(base / "saes" / name))
    return folders


@pytest.fixture
def config(trained, tmp_path):
    return Config(
        sae=trained[:1], num_prompts=3, batch_size=2, out_dir=str(tmp_path / "steer"), device="cpu"
    )


def report_of(config, name):
    return read_json(Path(config.out_dir) / name / "steer.json")


def test_with_no_feature_named_the_one_that_varies_most(config, trained, capsys):
    written = main(config)  # no word is in 8 of the 12 prompts and missing in half of them
    folder = next(Path(config.out_dir).iterdir())
    printed = capsys.readouterr().out
    assert "the feature that varies most is changed" in printed
    assert sorted(folder.iterdir()) == sorted(written)
    report = report_of(config, folder.name)
    sae = Sae.load_from_disk(trained[0])
    scores = image_scores(sae, Activations(sae.cfg["data"]))[0].mean(1)
    assert report["saes"][0]["features"] == [int(scores.std(0).argmax())]
    assert folder.name == f"{scores.std(0).argmax()}_x0_x2"
    assert [run["name"] for run in report["runs"]] == ["untouched", "× 0", "× 2"]
    assert len(report["prompts"]) == 3
    feature = scores[:, report["saes"][0]["features"][0]]
    rows = read_lines(Path(sae.cfg["data"][0]).with_name("prompts.jsonl"))
    strength = {row["prompt"]: value for row, value in zip(rows, feature.tolist())}
    assert strength[report["prompts"][0]] == feature.max()
    assert strength[report["prompts"][2]] == feature.min()
    assert report["seeds"] == [
        next(r["seed"] for r in rows if r["prompt"] == p) for p in report["prompts"]
    ]
    for picture in report["runs"][0]["pictures"]:  # the model's own: what the SAE was trained on
        assert 0.7 < picture["norm"] < 1.4
        assert 0.7 < picture["distance"] < 1.4
        assert picture["moved"] == 0
    assert max(p["moved"] for p in report["runs"][2]["pictures"]) > 0
    picture = Image.open(folder / "steer.png")
    assert min(picture.size) > 400
    assert "norm" in printed
    main(config)  # again: the same
    with pytest.raises(
        ValueError, match="was made with num_prompts 3, not 2; choose another --out_dir"
    ):
        main(replace(config, num_prompts=2))


def test_without_options_two_words_are_exchanged(config, monkeypatch, capsys):
    """The printed command does the same, in the same folder, and its options are in the report."""
    monkeypatch.setattr("analysis.concepts.MIN_IMAGES", 4)
    monkeypatch.setattr("analysis.concepts.MIN_CLEARNESS", -100.0)
    monkeypatch.setattr("analysis.concepts.SHARE_WITH_WORD", 0.9)
    main(config)
    printed = capsys.readouterr().out
    (folder,) = Path(config.out_dir).iterdir()
    options = report_of(config, folder.name)["options"]
    assert {options["concept"], options["toward"]} == {"red", "blue"}
    assert folder.name == f"{options['concept']}_to_{options['toward']}"
    command = f"--concept {options['concept']} --toward {options['toward']} --num_features 8"
    assert f"python steer.py {command}" in printed
    same = replace(config, concept=options["concept"], toward=options["toward"], num_features=8)
    main(same)  # would be refused if the folder's options were others
    assert report_of(config, folder.name)["saes"][0]["scores"]


def test_a_strength_without_features_changes_the_one_that_varies_most(config):
    main(replace(config, multiply=[0.0], num_prompts=1))
    (folder,) = Path(config.out_dir).iterdir()
    assert re.fullmatch(r"\d+_x0", folder.name)


def test_options_that_nothing_reads_are_refused(config):
    for options, message in (
        (dict(features=["1"], num_features=4), "--num_features has no effect with --features"),
        (dict(features=["1"], num_pictures=4), "--num_pictures has no effect with --features"),
        (dict(features=["1"], score="saeuron"), "--score has no effect with --features"),
        (dict(multiply=[0.0], score="saeuron"), "--score has no effect without --concept"),
        (dict(concept="red", seed=3), "--seed has no effect without --dataset_name"),
        (dict(concept="red", column="text"), "--column has no effect without --dataset_name"),
    ):
        with pytest.raises(UsageError, match=message):
            main(replace(config, **options))


def test_an_sae_without_a_feature_is_named(config, trained, capsys):
    main(replace(config, sae=trained, features=["1:5"], multiply=[0.0], num_prompts=1))
    assert f"note: {trained[0]} has no feature in --features" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_one_line(config, monkeypatch):
    for options, message in (
        (dict(add=[1e30]), r"--add 1e\+30: expected a number from -1e\+06 to 1e\+06"),
        (dict(multiply=[float("nan")]), "--multiply nan: expected"),
    ):
        with pytest.raises(UsageError, match=message):
            main(replace(config, features=["3"], **options))
    monkeypatch.setattr(steer, "LARGEST_STRENGTH", 1e40)
    with pytest.raises(UsageError, match=r"--add 1e\+30 makes .* not finite; edit less"):
        main(replace(config, features=["3"], add=[1e30], num_prompts=1))


def test_multiply_1_and_the_meter(config):
    main(replace(config, features=["3", "7"], multiply=[1.0, -2.0]))
    main(replace(config, features=["3", "7"], add=[20.0]))
    untouched, same, _ = report_of(config, "3+7_x1_x-2")["runs"]
    assert [p | {"moved": 0} for p in same["pictures"]] == untouched["pictures"]
    assert not any(p["moved"] for p in same["pictures"])
    far = report_of(config, "3+7_add20")["runs"][1]["pictures"]
    assert all(p["norm"] > 5 and p["distance"] > 5 for p in far)


def test_a_concept_of_two_saes_in_some_steps(config, trained):
    main(replace(config, sae=trained, concept="blue", num_features=2, steps="1-2", multiply=[0.0]))
    report = report_of(config, "blue_x0_steps1-2")
    for described, folder in zip(report["saes"], trained):
        sae = Sae.load_from_disk(folder)
        scores = image_scores(sae, Activations(sae.cfg["data"]))[0]
        has = torch.tensor([i % 3 == 0 for i in range(12)])
        assert described["features"] == contrast(scores, has).topk(2).indices.tolist()
    assert ["blue" in prompt for prompt in report["prompts"]] == [True, True, False]


def test_a_mask_in_pictures_of_two_grids(config, trained, tmp_path):
    main(
        replace(
            config,
            sae=trained,
            features=["1:5"],
            add=[3.0],
            mask=["0", "0", "1", "0.5"],
            num_prompts=1,
        )
    )
    Image.fromarray(np.uint8([[255, 0]])).save(tmp_path / "left.png")
    other = replace(
        config,
        out_dir=config.out_dir + "2",
        sae=trained,
        features=["1:5"],
        add=[3.0],
        num_prompts=1,
    )
    main(replace(other, mask=[str(tmp_path / "left.png")]))
    runs = [report_of(c, "5_add3")["runs"][1]["pictures"] for c in (config, other)]
    assert runs[0] == runs[1]
    assert runs[0][0]["moved"] > 0


def test_every_option_reaches_the_pictures(config):
    """One that did nothing would leave the numbers as they are; one that covers all steps or tokens
    does leave them."""
    base = replace(config, features=["3", "7"], add=[3.0], num_prompts=1)
    runs = {}
    options = {
        "": {},
        "steps": dict(steps="0-1"),
        "mask": dict(mask=["0", "0", "1", "0.5"]),
        "rows": dict(rows="both"),
    }
    options |= {
        "norm": dict(renormalize=True),
        "all steps": dict(steps="0-3"),
        "all tokens": dict(mask=["0", "0", "1", "1"]),
    }
    for name, given in options.items():
        main(replace(base, out_dir=f"{config.out_dir}/{name}", **given))
        runs[name] = read_json(next(Path(f"{config.out_dir}/{name}").glob("*/steer.json")))["runs"][
            1
        ]["pictures"]
    assert runs["all steps"] == runs["all tokens"] == runs[""]
    assert all(
        runs[name][0]["moved"] not in (0, runs[""][0]["moved"])
        for name in ("steps", "mask", "rows", "norm")
    )


def test_untouched_is_what_the_model_makes_of_each_prompt_and_seed(config, trained, monkeypatch):
    shown = []
    monkeypatch.setattr(
        steer, "plot_images", lambda path, rows, prompts, explanation: shown.extend((rows, prompts))
    )
    main(replace(config, features=["3"], multiply=[0.0]))  # three prompts, two a batch
    (_, images, *_), *_ = shown[0]
    report = report_of(config, "3_x0")
    meta = read_json(Path(Sae.load_from_disk(trained[0]).cfg["data"][0]).with_suffix(".json"))
    hooked = HookedDiffusionModel.from_pretrained(meta["model"], device="cpu")
    options = hooked.arguments(
        1, "pt", {k: v for k, v in meta["pipeline_kwargs"].items() if k != "output_type"}
    )
    for image, prompt, seed in zip(images, shown[1], report["seeds"]):
        alone = hooked([prompt], generator=[torch.Generator().manual_seed(seed)], **options).images[
            0
        ]
        assert torch.allclose(image, alone.float(), atol=1e-3)
        assert (image - images[0]).abs().max() < 1.1
    # which two prompts, or two seeds, do not have in common
    assert (images[0] - images[2]).abs().max() > 0.02


def test_one_concept_in_the_place_of_another(config, trained):
    main(replace(config, concept="blue", num_features=8, toward="red"))
    report = report_of(config, "blue_to_red")
    assert [run["name"] for run in report["runs"]] == ["untouched", "→ red"]
    assert report["runs"][1]["toward"] == "red"
    assert len(report["saes"][0]["features"]) == 8
    assert report["runs"][1]["pictures"][0]["moved"] > 0


def test_only_features_that_tell_the_concept_are_changed(config, capsys):
    main(replace(config, concept="blue", num_features=40, multiply=[0.0]))
    (sae,) = report_of(config, "blue_x0")["saes"]
    num_features = len(sae["features"])
    assert 0 < num_features < 40
    assert min(sae["scores"]) > 0
    line = f"only {num_features} features of {config.sae[0]} are more active with 'blue'"
    assert line in capsys.readouterr().out


def test_features_that_never_change_are_not_those_that_vary_most(config, monkeypatch, capsys):
    score_images = steer.score_images

    def silenced(cfg, target):
        images = score_images(cfg, target)
        images.scores[:, :, silent:] = 0
        return images

    monkeypatch.setattr(steer, "score_images", silenced)
    silent = 2
    main(replace(config, num_features=40, add=[1.0], num_prompts=1))
    assert "only 2 features of" in capsys.readouterr().out
    silent = 0
    with pytest.raises(UsageError, match="no feature of .* is active on some images more"):
        main(replace(config, num_features=40, add=[1.0], num_prompts=1))
    with pytest.raises(UsageError, match="no feature of .* is more active with 'blue' than"):
        main(replace(config, concept="blue", num_prompts=1))


def test_a_copy_of_the_model_keeps_the_settings_of_the_activations(
    config, model_folder, tmp_path, capsys
):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    options = dict(features=["3"], multiply=[0.0], num_prompts=1)
    main(replace(config, **options))
    expected = report_of(config, "3_x0")
    assert expected["arguments"]["num_inference_steps"] == 4
    moved = replace(config, model_name=str(copy), out_dir=str(tmp_path / "moved"), **options)
    main(moved)
    report = report_of(moved, "3_x0")
    assert report["arguments"] == expected["arguments"]
    assert report["runs"] == expected["runs"]
    assert "another model" not in capsys.readouterr().out

    pipe = HookedDiffusionModel.from_pretrained(str(copy)).pipe
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(0.1)
    pipe.save_pretrained(tmp_path / "other")
    other = replace(moved, model_name=str(tmp_path / "other"), out_dir=str(tmp_path / "its"))
    main(replace(other, transfer=True, num_inference_steps=2))
    assert "height" not in report_of(other, "3_x0")["arguments"]
    line = "is another model, so its own defaults are used, not the settings of the activations ("
    assert line + "num_inference_steps 4" in capsys.readouterr().out


def test_activations_of_several_videos_a_prompt(config, monkeypatch):

    def several(cfg, meta):
        return meta | {"pipeline_kwargs": meta["pipeline_kwargs"] | {"num_videos_per_prompt": 2}}

    monkeypatch.setattr(steer, "origin", several)
    main(replace(config, features=["3"], multiply=[0.0], num_prompts=1))
    assert len(report_of(config, "3_x0")["prompts"]) == 1


def test_many_features_have_a_folder_too(config):
    main(replace(config, features=[str(f) for f in range(40)], multiply=[0.0], num_prompts=1))
    (folder,) = Path(config.out_dir).iterdir()
    assert len(folder.name) < 100
    assert folder.name.startswith("0+1+2+3")


def test_boxes_by_hand():
    assert token_mask([], (4, 4)) is None
    assert token_mask(["0", "0.5", "0.5", "1"], (2, 4)).view(2, 4).tolist() == [
        [False, False, True, True],
        [False] * 4,
    ]
    assert token_mask(["0", "0.5", "0.5", "1"], (3, 2, 4)).view(3, 2, 4)[2, 0].tolist() == [
        False,
        False,
        True,
        True,
    ]
    for given, grid, message in (
        (["0", "0", "0.1", "0.1"], (2, 2), "no token of the 2 x 2"),
        (["0", "0", "1"], (2, 2), "expected top left bottom right"),
        (["nowhere.png"], (2, 2), "no picture that can be read"),
        (["0", "0", "1", "1"], (7,), "which is no picture"),
    ):
        with pytest.raises(ValueError, match=message):
            token_mask(given, grid)


def test_steps_and_features_by_hand():
    assert parse_steps("0-2", 4) == range(3)
    assert parse_steps("3", 4) == range(3, 4)
    assert parse_steps(None, 4) is None
    for text, message in (
        ("0-4", "has 4 steps, 0 to 3"),
        ("3-1", "expected first-last"),
        ("all", "expected first-last"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_steps(text, 4)
    saes = [Sae(4, 8, 2), Sae(4, 16, 2)]
    assert parse_features(["3"], saes[:1]) == [[3]]
    assert parse_features(["1:12", "0:3", "1:0"], saes) == [[3], [12, 0]]
    for text, message in (
        ("3", "such as 0:12"),
        ("2:3", "--sae names 2"),
        ("0:9", "feature 9: the SAE has 8"),
        ("x", "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_features([text], saes)


def test_what_is_refused(config, trained, tmp_path):
    """Options that contradict each other, the SAE or the data are refused."""
    for options, message in (
        (dict(features=["40"]), "feature 40: the SAE has 40, numbered 0 to 39"),
        (dict(concept="green"), "concept 'green': none of the 12 prompts"),
        (dict(features=["1"], concept="red"), "one of --features and --concept"),
        (dict(features=["1"], multiply=[1.0], add=[1.0]), "one of --multiply, --add and --toward"),
        (dict(concept="red", add=[1.0], toward="blue"), "one of --multiply, --add and --toward"),
        (dict(features=["1"], toward="blue"), "--toward needs --concept"),
        (dict(concept="red", toward="green"), "concept 'green': none"),
        (dict(concept=""), "concept ''"),
        (dict(features=["1"], steps="2-9"), "--steps 2-9: the sampling has 4 steps"),
        (dict(sae=[*trained[:1], *trained[:1]], features=["0:1"]), "two SAEs of one hook point"),
    ):
        with pytest.raises(ValueError, match=message):
            main(replace(config, **options))
    # says that it is of the same activations
    other = Sae(24, 48, 4, Sae.load_from_disk(trained[0]).cfg)
    other.save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="the SAE takes width 24"):
        main(replace(config, sae=[str(tmp_path / "other")], features=["1"]))


def test_without_the_activations_there_is_no_meter(config, trained, monkeypatch, capsys):
    def gone(data):
        raise FileNotFoundError(f"{data[0]}: no such file")

    monkeypatch.setattr(steer, "Typical", gone)
    main(replace(config, features=["3"], multiply=[0.0]))
    assert "not measured" in capsys.readouterr().out
    assert report_of(config, "3_x0")["runs"][1]["pictures"][0]["norm"] is None


def test_a_folder_of_something_else_is_not_written_into(config):
    folder = Path(config.out_dir) / "3_x0"
    folder.mkdir(parents=True)
    (folder / "steer.png").write_text("of another program")
    with pytest.raises(ValueError, match="holds something else; choose another --out_dir"):
        main(replace(config, features=["3"], multiply=[0.0]))
    assert (folder / "steer.png").read_text() == "of another program"


def test_rows_are_spread_over_the_training_data():
    by_kind = [{"id": i, "kind": i // 32} for i in range(128)]  # the first 32 are of one kind
    assert {row["kind"] for row in steer.spread(by_kind, 8)} == {0, 1, 2, 3}
    in_turn = [{"id": i, "kind": i % 4} for i in range(128)]  # and so is every 16th
    assert len({row["kind"] for row in steer.spread(in_turn, 8)}) > 1
    ids = [row["id"] for row in steer.spread(by_kind, 8)]
    assert ids == sorted(set(ids)) and ids == [row["id"] for row in steer.spread(by_kind, 8)]
    assert steer.spread(by_kind[:3], 8) == by_kind[:3]


def test_features_are_shown_on_rows_of_all_kinds(config):
    """The prompts are not the first of the file."""
    main(replace(config, features=["3"], multiply=[0.0]))
    prompts = report_of(config, "3_x0")["prompts"]
    numbers = [int(prompt.split()[-1]) for prompt in prompts]
    assert [4 * part <= n < 4 * part + 4 for part, n in enumerate(numbers)] == [True] * 3
