"""What does not belong together is refused, or said: an SAE, its data, its prompts, its hook point
and its model."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import build, sd15

import collect
import evaluate
import features
import steer
import train
from analysis import feature_edits
from analysis.metrics import Metrics
from errors import UsageError
from hook import Generation, HookedDiffusionModel, HookPoint
from sae import Sae, newest_sae
from store.activation_file import contents_checksums, hash_key, prompt_key
from store.dataset import Activations, open_activations
from store.disk import checksum
from store.identity import activations_of, fingerprint, same_weights

pytestmark = pytest.mark.slow
HOOK = "mid_block.attentions.0"
PROMPTS = [
    f"a {'red' if i % 3 else 'blue'} picture of {'xyzuvw'[i % 6]} and {i}" for i in range(24)
]


def small_held_out(monkeypatch):
    monkeypatch.setattr("store.dataset.HELD_OUT", dict(share=0.25, at_least=0, at_most=10**9))


@pytest.fixture(autouse=True)
def held_out(monkeypatch):
    small_held_out(monkeypatch)


def collect_config(model="model", **options):
    """Of the current folder."""
    defaults = dict(
        model_name=model,
        dataset_name="prompts.txt",
        hook_names=[HOOK],
        num_inference_steps=2,
        height=64,
        width=64,
        batch_size=8,
        max_num_examples=16,
        out_dir="acts",
        device="cpu",
    )
    return collect.Config(**defaults | options)


def train_sae(data=f"acts/{HOOK}.npy", name="sae", **options):
    data = data if isinstance(data, list) else [str(data)]
    config = train.Config(data=data, num_latents=[64], k=[4], num_epochs=8, run_name=name)
    return train.main(replace(config, device="cpu", **options))[0]


@pytest.fixture(scope="module")
def made(model_folder, tmp_path_factory):
    """A folder with a model, prompts, a collection of 16 of them (conditional and unconditional)
    and an SAE of it."""
    base = tmp_path_factory.mktemp("identity")
    shutil.copytree(model_folder, base / "model")
    (base / "prompts.txt").write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        small_held_out(patch)
        patch.chdir(base)
        collect.main(collect_config(rows="both"))
        train_sae()
        train_sae(f"acts/{HOOK}.uncond.npy", "uncond")
    return base


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """The same in a folder of this test's own, which is the current one."""
    shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def evaluate_config(**options):
    return evaluate.Config(sae="saes/sae", device="cpu", **options)


def read(path):
    return json.loads(Path(path).read_text())


def other_weights(folder, scale=1.001):
    """Change one parameter of the denoiser in a model folder a little."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] *= scale
    pipe.unet.save_pretrained(folder / "unet")


# ------------------------------------------------------------------------- collected anew, extended


def test_the_same_path_collected_anew_with_another_seed_is_said(copy, capsys):
    shutil.rmtree(copy / "acts")
    collect.main(collect_config(rows="both", seed=5))
    capsys.readouterr()
    for run in (
        lambda: evaluate.main(evaluate_config()),
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


def test_the_same_path_collected_anew_with_another_model_is_refused(copy):
    shutil.rmtree(copy / "acts")
    other_weights(copy / "model")
    collect.main(collect_config(rows="both"))
    for run in (
        lambda: evaluate.main(evaluate_config()),
        lambda: features.main(features.Config(sae="saes/sae", device="cpu")),
        lambda: steer.main(steer.Config(sae=["saes/sae"], features=["1"], device="cpu")),
    ):
        with pytest.raises(
            UsageError,
            match="does not belong to .*the weights are those of .*SAE was trained on .*--transfer",
        ):
            run()
    evaluate.main(evaluate_config(transfer=True))
    assert "the weights are those of" in read("evaluations/sae/evaluate.json")["transfer"][0]


def test_held_out_is_what_the_sae_never_saw_also_in_an_extended_collection(copy):
    seen = Activations([copy / "acts" / f"{HOOK}.npy"])
    trained = {
        prompt_key({"prompt": PROMPTS[unit[1] // seen.files[0].tokens // 2]})
        for unit in seen.training_units
    }
    evaluate.main(evaluate_config())
    before = read("evaluations/sae/evaluate.json")
    assert (
        before["fvu"] == pytest.approx(read("saes/sae/cfg.json")["fvu"], rel=1e-9)
        and before["surely_unseen"]
    )

    collect.main(collect_config(rows="both", max_num_examples=24))
    evaluate.main(evaluate_config())
    after = read("evaluations/sae/evaluate.json")
    x = np.load(copy / "acts" / f"{HOOK}.npy").astype(np.float32)
    unseen = [
        i for i, prompt in enumerate(PROMPTS) if prompt_key({"prompt": prompt}) not in trained
    ]
    vectors = torch.from_numpy(x[unseen]).flatten(0, -2)
    sae = Sae.load_from_disk("saes/sae")
    metrics = Metrics(sae.num_latents)
    with torch.no_grad():
        top_acts, top_indices = sae.encode(vectors)
        metrics.update(vectors, sae.decode(top_acts, top_indices), top_acts, top_indices)
    assert after["vectors"] == len(vectors) == 12 * 2 * x.shape[2] and after[
        "fvu"
    ] == pytest.approx(metrics.fvu, rel=1e-5)


def test_a_collection_that_was_seen_whole_has_nothing_held_out(copy):
    listing = [prompt_key({"prompt": prompt}) for prompt in PROMPTS]
    (copy / "saes/sae/training_prompts.txt").write_text("\n".join(sorted(map(hash_key, listing))))
    cfg = read("saes/sae/cfg.json")
    Path("saes/sae/cfg.json").write_text(json.dumps(cfg | {"num_training_prompts": len(listing)}))
    with pytest.raises(UsageError, match="has seen every prompt of .*--data"):
        evaluate.main(evaluate_config())
    lines = (copy / "saes/sae/training_prompts.txt").read_text().split("\n")
    for damaged in ("torn", "", "\n".join(lines[:-1])):
        (copy / "saes/sae/training_prompts.txt").write_text(damaged)
        with pytest.raises(UsageError, match="training_prompts.txt is damaged"):
            evaluate.main(evaluate_config())


def test_other_weights_under_the_same_name_do_not_extend_a_collection(copy):
    other_weights(copy / "model")
    with pytest.raises(
        UsageError,
        match="from a model with other weights or settings of its unet, under the same name",
    ):
        collect.main(collect_config(rows="both", max_num_examples=24))


@pytest.mark.parametrize("part", ["unet", "tokenizer"])
def test_settings_and_vocabularies_are_part_of_the_model(copy, part, capsys):
    """Those that are not weights: the heads of an attention, the number of a word."""
    if part == "unet":
        path = copy / "model/unet/config.json"
        path.write_text(json.dumps(read(path) | {"attention_head_dim": 4}))
    else:
        path = next(
            (copy / "model/tokenizer").glob("tokenizer.json"), copy / "model/tokenizer/vocab.json"
        )
        text = path.read_text()
        path.write_text(
            text.replace('"a</w>": ', '"swapped": ')
            .replace('"b</w>": ', '"a</w>": ')
            .replace('"swapped": ', '"b</w>": ')
        )
        assert path.read_text() != text
    with pytest.raises(UsageError, match=f"other weights or settings of its {part}"):
        collect.main(collect_config(rows="both", max_num_examples=24))
    config = steer.Config(
        sae=["saes/sae"], features=["1"], multiply=[0.0], num_prompts=1, device="cpu"
    )
    if part == "unet":
        with pytest.raises(UsageError, match="does not belong to the model"):
            steer.main(config)
    else:
        steer.main(config)
        assert "note: the tokenizer of" in capsys.readouterr().out


def test_a_setting_that_a_later_version_adds_changes_no_fingerprint():
    pipe = build(sd15)
    before = fingerprint(pipe.unet)
    pipe.unet.register_to_config(dropout=0.0)  # its default
    assert fingerprint(pipe.unet) == before
    pipe.unet.register_to_config(dropout=0.5)
    assert fingerprint(pipe.unet) != before


def test_copies_and_missing_shards(copy, capsys):
    shutil.copytree("acts", "again")
    with pytest.raises(UsageError, match="are copies of one collection"):
        train_sae(name="twice", data=[f"acts/{HOOK}.npy", f"again/{HOOK}.npy"])
    for shard in ("0/3", "2/3"):
        collect.main(collect_config(out_dir="shards", shard=shard, batch_size=2))
    capsys.readouterr()
    train_sae("shards", "shards")
    assert "note: of 3 shards of a collection 1 are not among the files" in capsys.readouterr().out


def test_prompts_of_ones_own_keep_their_own_negative_prompts(copy):
    collect.main(collect_config(negative_prompt="blurred", out_dir="negative"))
    train_sae(Path("negative") / f"{HOOK}.npy", "negative")
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
    assert read("steer/1_x0/steer.json")["arguments"]["negative_prompt"] == ["red", "blue"]


def test_one_side_of_the_size_alone_is_refused(copy):
    with pytest.raises(UsageError, match="height is given alone"):
        collect.main(collect_config(width=None, out_dir="tall"))


@pytest.mark.parametrize("mask", [["0", "0", "50", "50"], ["0.5", "0", "0.2", "1"], ["deep.png"]])
def test_masks_that_are_not_understood_are_refused(copy, mask):
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


def test_another_scheduler_does_not_extend_a_collection(copy):
    path = copy / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(read(path) | {"beta_end": 0.015}))
    with pytest.raises(UsageError, match="other weights or settings of its scheduler"):
        collect.main(collect_config(rows="both", max_num_examples=24))


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    "twin",
    [
        "A RED PICTURE",
        " a red picture ",
        "a  red picture",
        "a red\u00a0picture",
        "\ufb01ne a red picture"[0:0] + "a red picture\u200b",
    ],
)
def test_prompts_that_the_model_reads_alike_are_one(twin):
    assert prompt_key({"prompt": twin}) == prompt_key({"prompt": "a red picture"})
    assert prompt_key({"prompt": "cafe\u0301"}) == prompt_key({"prompt": "caf\u00e9"})
    assert prompt_key({"prompt": "a red picture"}) != prompt_key({"prompt": "a blue picture"})
    assert prompt_key({"prompt": "", "image": "a.png"}) != prompt_key(
        {"prompt": "", "image": "b.png"}
    )
    assert prompt_key({"prompt": "", "seed": 1}) != prompt_key({"prompt": "", "seed": 2})


def test_both_spellings_of_a_prompt_lie_on_one_side(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 2, 3, 4)).astype(np.float32)
    np.save(tmp_path / "a.npy", x)
    rows = [{"prompt": text} for i in range(20) for text in (f"A cat {i}", f" a CAT {i}  ")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = {"hook_name": "mid_block"}
    (tmp_path / "a.json").write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    data = Activations([tmp_path / "a.npy"])
    held_out = sorted(unit[1] // 6 for unit in data.held_out_units)
    assert data.num_prompts == 20 and held_out and all(row ^ 1 in held_out for row in held_out)


@pytest.mark.parametrize("how", ["missing", "short", "another order", "another text"])
def test_a_listing_that_is_not_the_collections_is_refused(copy, how):
    listing = copy / "acts/prompts.jsonl"
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
        lambda: train_sae(name="again"),
        lambda: evaluate.main(evaluate_config()),
        lambda: features.main(features.Config(sae="saes/sae", device="cpu")),
        lambda: steer.main(steer.Config(sae=["saes/sae"], concept="red", device="cpu")),
    ):
        with pytest.raises(
            UsageError,
            match="prompts.jsonl (is not there|does not say the prompts|was changed after)",
        ):
            run()


def test_another_image_under_the_same_name_does_not_extend_a_collection(copy, tmp_path):
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
    collect.main(collect_config(**options, max_num_examples=2))
    shutil.copy(photos / "3.png", photos / "0.png")
    with pytest.raises(UsageError, match="holds a collection of other prompts"):
        collect.main(collect_config(**options, max_num_examples=4))
    assert prompt_key({"prompt": "", "image": "a.png", "image_digest": "x"}) == prompt_key(
        {"prompt": "", "image": "b.png", "image_digest": "x"}
    )


def test_images_in_another_order_are_refused(copy):
    images = copy / "acts/images"
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


# -------------------------------------------------------------------------------- folders and sites


def test_an_sae_finds_its_own_data_and_model_from_anywhere(copy, tmp_path, monkeypatch):
    """In another project, whose data and model have the same relative paths, it uses its own."""
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    other_weights(other / "model", 100.0)
    shutil.rmtree(other / "acts")
    monkeypatch.chdir(other)
    collect.main(collect_config(dataset_name=PROMPTS[0], rows="both"))
    shutil.rmtree(other / "saes")
    evaluate.main(evaluate.Config(sae="../project/saes/sae", device="cpu"))
    assert (
        Path(read("evaluations/sae/evaluate.json")["data"][0]).resolve()
        == (copy / "acts" / f"{HOOK}.npy").resolve()
    )
    steer.main(
        steer.Config(sae=["../project/saes/sae"], features=["1"], num_prompts=2, device="cpu")
    )
    report = read(next(Path("steer").glob("*/steer.json")))
    assert set(report["prompts"]) <= set(PROMPTS)
    moved = tmp_path / "moved"
    os.rename(copy, moved)  # the whole project: SAE and data still find each other
    evaluate.main(evaluate.Config(sae=str(moved / "saes/sae"), out_dir="moved", device="cpu"))


def test_an_sae_without_its_data_says_so_and_takes_no_other(copy, tmp_path, monkeypatch):
    shutil.copytree(copy / "saes/sae", tmp_path / "alone/saes/sae")
    monkeypatch.chdir(tmp_path / "alone")
    with pytest.raises(UsageError, match="which is not there; name the files with --data"):
        evaluate.main(evaluate.Config(sae="saes/sae", device="cpu"))


def described(path, **changes):
    """A copy of an activation file whose description says something else."""
    target = path.with_name("other.npy")
    shutil.copy(path, target)
    meta = read(path.with_suffix(".json")) | changes
    if meta["stream"] == "text":
        _, _, tokens, _ = np.load(target, mmap_mode="r").shape
        np.save(target.with_name("other.lengths.npy"), np.full(16, tokens))
    meta["contents"] = contents_checksums(target)
    target.with_suffix(".json").write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    return target


@pytest.mark.parametrize(
    "change",
    [{"hook_name": "mid_block"}, {"side": "input"}, {"rows": "uncond"}, {"stream": "text"}],
)
def test_data_of_another_site_are_refused_or_marked(copy, change):
    path = copy / "acts" / f"{HOOK}.npy"
    other = (
        path.with_name(f"{HOOK}.uncond.npy")
        if change == {"rows": "uncond"}
        else described(path, **change)
    )
    (key, value), *_ = change.items()
    with pytest.raises(
        UsageError, match=f"does not belong to .*: {key} '{value}', and the SAE was trained on"
    ):
        evaluate.main(evaluate_config(data=[str(other)]))
    with pytest.raises(UsageError, match="does not belong to"):
        features.main(features.Config(sae="saes/sae", data=[str(other)], device="cpu"))
    evaluate.main(evaluate_config(data=[str(other)], transfer=True))
    assert key in read("evaluations/sae/evaluate.json")["transfer"][0]


def test_an_sae_of_unconditional_rows_edits_those(copy, monkeypatch):
    roles = []
    real = feature_edits.replacing_edits

    def spy(hook_point, replace, rows=None, steps=None):
        edits = real(hook_point, replace, rows, steps)
        roles.append([edit.rows for edit in edits])
        return edits

    monkeypatch.setattr(feature_edits, "replacing_edits", spy)
    config = steer.Config(
        sae=["saes/uncond"], features=["1"], add=[3.0], num_prompts=1, device="cpu"
    )
    steer.main(config)
    assert roles and all(rows == ["uncond"] for rows in roles)


def test_an_sae_says_where_it_belongs(copy, tmp_path):
    collect.main(collect_config(side="diff", out_dir="diff"))
    train_sae(Path("diff") / f"{HOOK}.diff.npy", "diff")
    saes = Sae.load_many("saes")
    assert set(saes) == {HOOK, f"{HOOK}.uncond", f"{HOOK}.diff"}
    assert saes[f"{HOOK}.diff"].hook_point == HookPoint(HOOK, "diff", "image", "cond")
    model = HookedDiffusionModel.from_pretrained("model", device="cpu")
    generation = Generation(
        PROMPTS[:1], [0], options=model.arguments(1, "latent", {"num_inference_steps": 1})
    )
    with pytest.raises(UsageError, match="the SAE was trained on .*diff"):
        evaluate.graft(model, saes[f"{HOOK}.diff"], HookPoint(HOOK), generation, 1)
    evaluate.graft(model, saes[f"{HOOK}.diff"], HookPoint(HOOK), generation, 1, transfer=True)


def test_samples_of_another_size_keep_the_active_latents_per_token(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 2, 16, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    config = train.Config(
        data=[str(tmp_path / "x.npy")], num_latents=[64], k=[32], activation="sampletopk"
    )
    (folder,) = train.main(replace(config, out_dir=str(tmp_path), run_name="sae", device="cpu"))
    sae = Sae.load_from_disk(folder)
    for tokens in (4, 16, 64):
        acts = sae.encode(torch.randn(3, tokens, 8) * 5).top_acts
        assert ((acts > 0).sum((1, 2)) <= 2 * tokens).all() and (
            acts > 0
        ).sum() >= 0.9 * 3 * 2 * tokens


# -------------------------------------------------------------------------------------- suggestions


def test_several_files_are_all_trained_or_named(copy, monkeypatch, capsys):
    shutil.rmtree(copy / "acts")
    collect.main(collect_config(rows="both", out_dir="activations"))
    assert (
        "python train.py --data activations, which trains an SAE for each of the 2 files"
        in capsys.readouterr().out
    )
    train.main(train.Config(num_latents=[64], k=[4], run_name="one", device="cpu"))
    assert (
        "the newest of 2 files in its folder; --data activations trains an SAE for each"
        in capsys.readouterr().out
    )


def test_the_newest_sae_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("old", "sweep/mid_block/k8_M64", "sweep/mid_block/k16_M64")):
        Sae(4, 8, 2).save_to_disk(Path("saes") / name)
        os.utime(Path("saes") / name / "cfg.json", (i, i))
    assert newest_sae() == Path("saes/sweep/mid_block/k16_M64")


# ---------------------------------------------------------------------------- generation of its own


def test_steering_an_sae_of_real_images_needs_prompts_and_takes_the_pipelines_settings(
    copy, tmp_path
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
    collect.main(collect_config(**options))
    train_sae(Path("photo_acts") / f"{HOOK}.npy", "photos")
    config = steer.Config(
        sae=["saes/photos"], features=["1"], multiply=[0.0], num_prompts=1, device="cpu"
    )
    with pytest.raises(
        UsageError, match="real images without captions .*: name prompts with --dataset_name"
    ):
        steer.main(config)
    steer.main(replace(config, dataset_name="a red picture"))
    arguments = read("steer/1_x0/steer.json")["arguments"]
    assert (
        not {"num_inference_steps", "guidance_scale"} & arguments.keys()
    )  # so that the pipeline takes its own


def test_prompts_of_ones_own_keep_the_collections_negative_prompt(copy):
    collect.main(collect_config(negative_prompt="blurred", out_dir="negative"))
    train_sae(Path("negative") / f"{HOOK}.npy", "negative")
    config = steer.Config(
        sae=["saes/negative"],
        features=["1"],
        multiply=[0.0],
        dataset_name="a red picture",
        device="cpu",
    )
    steer.main(config)
    assert read("steer/1_x0/steer.json")["arguments"]["negative_prompt"] in ("blurred", ["blurred"])
    steer.main(replace(config, negative_prompt="ugly", out_dir="other"))
    assert read("other/1_x0/steer.json")["arguments"]["negative_prompt"] in ("ugly", ["ugly"])


# -------------------------------------------------------------------------------- grafts and models


def test_a_graft_of_an_sae_that_lay_there_before_does_not_stay(copy, capsys):
    config = evaluate_config(graft=True, num_prompts=1, windows=1)
    evaluate.main(config)
    folder = copy / "evaluations/sae"
    evaluate.main(evaluate_config())
    assert (folder / "graft.json").exists()  # the same SAE
    shutil.rmtree(copy / "saes/sae")
    train_sae(seeds=[3])
    evaluate.main(evaluate_config())
    assert not (folder / "graft.json").exists() and not (folder / "graft.png").exists()
    assert "was made with an SAE that lay at this path before" in capsys.readouterr().out
    assert (folder / "graft_of_another_sae.json").exists() and (
        folder / "graft_of_another_sae.png"
    ).exists()
    (folder / "graft.json").write_text(
        "{}"
    )  # of an earlier version, which did not say of which SAE
    evaluate.main(evaluate_config())
    assert (
        folder / "graft.json"
    ).exists() and "it can't be checked that it was made with this SAE" in capsys.readouterr().out


def test_models_with_other_weights_are_refused(copy, tmp_path):
    shutil.copytree(copy / "model", copy / "finetuned")
    other_weights(copy / "finetuned")
    shutil.copytree(copy / "model", copy / "a copy")
    config = evaluate_config(graft=True, num_prompts=1, windows=1)
    with pytest.raises(UsageError, match="does not belong to the model: the weights are those of"):
        evaluate.main(replace(config, model_name="finetuned"))
    evaluate.main(replace(config, model_name="a copy"))
    evaluate.main(replace(config, model_name="finetuned", transfer=True))
    assert read("evaluations/sae/graft.json")["transfer"]
    options = dict(features=["1"], multiply=[0.0], num_prompts=1, device="cpu")
    with pytest.raises(UsageError, match="does not belong to the model"):
        steer.main(steer.Config(sae=["saes/sae"], model_name="finetuned", **options))
    steer.main(steer.Config(sae=["saes/sae"], model_name="finetuned", transfer=True, **options))

    collect.main(
        collect_config("finetuned", hook_names=["up_blocks.0.attentions.1"], out_dir="others")
    )
    train_sae(Path("others/up_blocks.0.attentions.1.npy"), "finetuned")
    with pytest.raises(UsageError, match="finetuned does not belong to the model"):
        steer.main(
            steer.Config(
                sae=["saes/sae", "saes/finetuned"], **options | dict(features=["0:1", "1:1"])
            )
        )


def test_another_text_encoder_is_said(copy, capsys):
    pipe = DiffusionPipeline.from_pretrained("model")
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(1.01)
    pipe.text_encoder.save_pretrained("model/text_encoder")
    config = steer.Config(
        sae=["saes/sae"], features=["1"], multiply=[0.0], num_prompts=1, device="cpu"
    )
    steer.main(config)
    assert "note: the text_encoder of" in capsys.readouterr().out


def test_files_that_were_collected_otherwise_are_said(copy, capsys):
    collect.main(collect_config(guidance_scale=2.0, seed=40, out_dir="weak"))
    capsys.readouterr()
    train.main(
        train.Config(
            data=[f"acts/{HOOK}.npy", f"weak/{HOOK}.npy"], num_latents=[64], k=[4], device="cpu"
        )
    )
    assert (
        "was collected otherwise than acts/" in (out := capsys.readouterr().out)
        and "guidance_scale 2.0, not" in out
    )
    assert "seed" not in out


def test_activations_of_two_models_under_one_name_are_not_mixed(copy):
    other_weights(copy / "model")
    collect.main(collect_config(out_dir="others"))
    sae = Sae.load_from_disk("saes/sae")
    with pytest.raises(UsageError, match="2 hook points or models"):
        activations_of(sae, "sae", ["acts/" + f"{HOOK}.npy", "others/" + f"{HOOK}.npy"])


# ------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_sees_each_weight_and_not_the_precision():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.Linear(70, 3))
    before = fingerprint(module)
    assert before == fingerprint(module)
    half = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.Linear(70, 3)).to(torch.bfloat16)
    half.load_state_dict(module.state_dict())
    assert fingerprint(module, torch.bfloat16) == fingerprint(half, torch.bfloat16) != before
    with torch.no_grad():
        module[0].weight[31, 7] += 1e-6
    assert same_weights(before, fingerprint(module)) is False
    other = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.Linear(70, 4))
    assert fingerprint(other).split("-")[0] != before.split("-")[0]
    assert same_weights(before, fingerprint(module.to("meta"))) is None


def test_a_fingerprint_of_a_quantized_tensor_sees_its_parts():
    """Such a tensor is a wrapper, which knows few operations itself."""
    from torch.testing._internal.two_tensor import TwoTensor

    digests = set()
    for value, scale in ((1.0, 2.0), (1.0, 3.0), (4.0, 2.0)):
        module = torch.nn.Linear(3, 2, bias=False)
        wrapped = TwoTensor(torch.full((2, 3), value), torch.full((2, 3), scale))
        module.weight = torch.nn.Parameter(wrapped)
        digests.add(fingerprint(module))
    assert len(digests) == 3


def test_a_fingerprint_of_a_part_of_a_tensor_and_of_its_last_values():
    whole = torch.randn(200).bfloat16()
    part = torch.nn.Module()
    part.weight = torch.nn.Parameter(
        whole[3:70]
    )  # begins in the middle of a word, and does not end with one
    before = fingerprint(part)
    for place in (0, 30, 65, 66):
        changed = torch.nn.Module()
        changed.weight = torch.nn.Parameter(whole[3:70].clone())
        assert fingerprint(changed) == before
        with torch.no_grad():
            changed.weight[place] += 1
        assert fingerprint(changed) != before


def test_a_copied_sae_knows_what_it_has_seen(copy):
    sae = Sae.load_from_disk("saes/sae")
    sae.save_to_disk("elsewhere/deep/copy")
    again = Sae.load_from_disk("elsewhere/deep/copy")
    assert again.training_prompts == sae.training_prompts and again.training_prompts
    assert [Path(name).resolve() for name in again.cfg["data"]] == [
        Path(name).resolve() for name in sae.cfg["data"]
    ]


def test_other_weights_beside_a_cfg_json_are_said(tmp_path, capsys):
    """Weights of the same shape, and one edited number; what was saved together is silent."""
    folder = tmp_path / "sae"
    Sae(8, 500, 2, seed=0).save_to_disk(folder)
    Sae.load_from_disk(folder).save_to_disk(tmp_path / "again")
    assert "sae_fingerprint" not in Sae.load_from_disk(tmp_path / "again").cfg
    assert not capsys.readouterr().err

    tensors = load_file(folder / "sae.safetensors")
    tensors["W_dec"][123, 4] += 1
    save_file(tensors, folder / "sae.safetensors")
    Sae.load_from_disk(folder)
    line = "sae.safetensors does not hold the weights that its cfg.json describes"
    assert line in capsys.readouterr().err

    Sae(8, 500, 2, seed=1).save_to_disk(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "sae.safetensors", folder)
    assert not capsys.readouterr().err
    Sae.load_from_disk(folder)
    assert line in capsys.readouterr().err

    cfg = read(folder / "cfg.json")
    del cfg["sae_fingerprint"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    Sae.load_from_disk(folder)
    assert not capsys.readouterr().err


def test_an_sae_of_an_earlier_version_on_another_hook_name_is_refused(copy):
    cfg = read("saes/sae/cfg.json")
    for key in ("side", "stream", "rows", "fingerprint", "collected_with"):
        cfg.pop(key)
    Path("saes/sae/cfg.json").write_text(json.dumps(cfg))
    other = described(copy / "acts" / f"{HOOK}.npy", hook_name="mid_block")
    with pytest.raises(UsageError, match="hook_name 'mid_block', and the SAE was trained on"):
        evaluate.main(evaluate_config(data=[str(other)]))


def test_files_of_one_model_with_and_without_a_fingerprint_are_one_data_set(copy):
    old = described(copy / "acts" / f"{HOOK}.npy")
    meta = read(old.with_suffix(".json"))
    for key in ("fingerprint", "fingerprints", "id", "contents"):
        meta.pop(key, None)
    old.with_suffix(".json").write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    np.save(old, np.load(old)[:, ::-1].copy())  # a copy of the other file would be refused
    assert len(open_activations([copy / "acts" / f"{HOOK}.npy", old])) == 1


def test_a_negative_prompt_counts_for_the_activations_own_prompts_too(copy):
    config = steer.Config(
        sae=["saes/sae"],
        features=["1"],
        multiply=[0.0],
        num_prompts=1,
        negative_prompt="ugly",
        device="cpu",
    )
    steer.main(config)
    assert read("steer/1_x0/steer.json")["arguments"]["negative_prompt"] in ("ugly", ["ugly"])


def test_earlier_versions_are_read_with_a_line(copy, capsys):
    """Descriptions and SAE folders without fingerprints, sides and prompts: used, and it is said
    what could not be checked."""
    cfg = read("saes/sae/cfg.json")
    new = (
        "side",
        "stream",
        "rows",
        "fingerprint",
        "model_dtype",
        "model_name",
        "collections",
        "collected_with",
        "num_training_prompts",
    )
    old = {key: value for key, value in cfg.items() if key not in (*new, "data_relative_to")}
    old["data"] = [str(copy / "acts" / f"{HOOK}.npy")]
    Path("saes/sae/cfg.json").write_text(json.dumps(old))
    Path("saes/sae/training_prompts.txt").unlink()
    for path in Path("acts").glob(f"{HOOK}*.json"):
        meta = read(path)
        for key in ("fingerprint", "fingerprints", "id", "prompts_digest", "model_folder"):
            meta.pop(key)
        path.write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    evaluate.main(evaluate_config())
    out = capsys.readouterr().out
    assert "it can't be checked" in out and "whether the model's weights are the same" in out
    assert read("evaluations/sae/evaluate.json")["fvu"] == pytest.approx(cfg["fvu"], rel=1e-9)
    assert read("evaluations/sae/evaluate.json")["surely_unseen"]  # the digest of the data says so
    steer.main(
        steer.Config(sae=["saes/sae"], features=["1"], multiply=[0.0], num_prompts=1, device="cpu")
    )
    evaluate.main(evaluate_config(graft=True, num_prompts=1, windows=1))
