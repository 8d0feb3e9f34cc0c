"""What does not belong together is refused, or said: an SAE, its data, its hook point and its model."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from files import read_json, write_lines
from project import (
    HOOK,
    PROMPTS,
    collection_config,
    evaluation_config,
    other_weights,
    train_project_sae,
    with_description,
)
from safetensors.torch import load_file, save_file
from tiny import build, sd15

import collect
import evaluate
import features
import steer
import train
from analysis import feature_edits
from errors import UsageError
from hook import Generation, HookedDiffusionModel, HookPoint
from sae import Sae, newest_sae
from store.activation_file import prompt_key
from store.dataset import Activations, open_activations
from store.disk import checksum
from store.identity import activations_of, fingerprint, same_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quarter_held_out")]


def test_a_setting_that_a_later_version_adds_changes_no_fingerprint():
    pipe = build(sd15)
    before = fingerprint(pipe.unet)
    pipe.unet.register_to_config(dropout=0.0)  # its default
    assert fingerprint(pipe.unet) == before
    pipe.unet.register_to_config(dropout=0.5)
    assert fingerprint(pipe.unet) != before


@pytest.mark.parametrize(
    "twin",
    [
        "A RED PICTURE",
        " a red picture ",
        "a  red picture",
        "a red\u00a0picture",
        "a red picture\u200b",
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
    write_lines(tmp_path / "prompts.jsonl", rows)
    meta = {"hook_name": "mid_block"}
    (tmp_path / "a.json").write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    data = Activations([tmp_path / "a.npy"])
    held_out = sorted(unit[1] // 6 for unit in data.held_out_units)
    assert data.num_prompts == 20
    assert held_out
    assert all(row ^ 1 in held_out for row in held_out)


def test_an_sae_finds_its_own_data_and_model_from_anywhere(project, tmp_path, monkeypatch):
    """In another project, whose data and model have the same relative paths, it uses its own."""
    other = tmp_path / "other"
    shutil.copytree(project, other)
    other_weights(other / "model", 100.0)
    shutil.rmtree(other / "acts")
    monkeypatch.chdir(other)
    collect.main(collection_config(dataset_name=PROMPTS[0], rows="both"))
    shutil.rmtree(other / "saes")
    evaluate.main(evaluate.Config(sae="../project/saes/sae", device="cpu"))
    assert (
        Path(read_json("evaluations/sae/evaluate.json")["data"][0]).resolve()
        == (project / "acts" / f"{HOOK}.npy").resolve()
    )
    steer.main(
        steer.Config(sae=["../project/saes/sae"], features=["1"], num_prompts=2, device="cpu")
    )
    report = read_json(next(Path("steer").glob("*/steer.json")))
    assert set(report["prompts"]) <= set(PROMPTS)
    moved = tmp_path / "moved"
    os.rename(project, moved)  # the whole project: SAE and data still find each other
    evaluate.main(evaluate.Config(sae=str(moved / "saes/sae"), out_dir="moved", device="cpu"))


def test_an_sae_without_its_data_says_so_and_takes_no_other(project, tmp_path, monkeypatch):
    shutil.copytree(project / "saes/sae", tmp_path / "alone/saes/sae")
    monkeypatch.chdir(tmp_path / "alone")
    with pytest.raises(UsageError, match="which is not there; name the files with --data"):
        evaluate.main(evaluate.Config(sae="saes/sae", device="cpu"))


@pytest.mark.parametrize(
    "change",
    [{"hook_name": "mid_block"}, {"side": "input"}, {"rows": "uncond"}, {"stream": "text"}],
)
def test_data_of_another_site_are_refused_or_marked(project, change):
    path = project / "acts" / f"{HOOK}.npy"
    other = (
        path.with_name(f"{HOOK}.uncond.npy")
        if change == {"rows": "uncond"}
        else with_description(path, **change)
    )
    (key, value), *_ = change.items()
    with pytest.raises(
        UsageError, match=f"does not belong to .*: {key} '{value}', and the SAE was trained on"
    ):
        evaluate.main(evaluation_config(data=[str(other)]))
    with pytest.raises(UsageError, match="does not belong to"):
        features.main(features.Config(sae="saes/sae", data=[str(other)], device="cpu"))
    evaluate.main(evaluation_config(data=[str(other)], transfer=True))
    assert key in read_json("evaluations/sae/evaluate.json")["transfer"][0]


def test_an_sae_of_unconditional_rows_edits_those(project, monkeypatch):
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
    assert roles
    assert all(rows == ["uncond"] for rows in roles)


def test_an_sae_says_where_it_belongs(project):
    collect.main(collection_config(side="diff", out_dir="diff"))
    train_project_sae(Path("diff") / f"{HOOK}.diff.npy", "diff")
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
        assert ((acts > 0).sum((1, 2)) <= 2 * tokens).all()
        assert (acts > 0).sum() >= 0.9 * 3 * 2 * tokens


def test_several_files_are_all_trained_or_named(project, capsys):
    shutil.rmtree(project / "acts")
    collect.main(collection_config(rows="both", out_dir="activations"))
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


def test_a_graft_of_an_sae_that_lay_there_before_does_not_stay(project, capsys):
    config = evaluation_config(graft=True, num_prompts=1, windows=1)
    evaluate.main(config)
    folder = project / "evaluations/sae"
    evaluate.main(evaluation_config())
    assert (folder / "graft.json").exists()  # the same SAE
    shutil.rmtree(project / "saes/sae")
    train_project_sae(seeds=[3])
    evaluate.main(evaluation_config())
    assert not (folder / "graft.json").exists()
    assert not (folder / "graft.png").exists()
    assert "was made with an SAE that lay at this path before" in capsys.readouterr().out
    assert (folder / "graft_of_another_sae.json").exists()
    assert (folder / "graft_of_another_sae.png").exists()
    # of an earlier version, which did not say of which SAE
    (folder / "graft.json").write_text("{}")
    evaluate.main(evaluation_config())
    assert (folder / "graft.json").exists()
    assert "it can't be checked that it was made with this SAE" in capsys.readouterr().out


def test_models_with_other_weights_are_refused(project):
    shutil.copytree(project / "model", project / "finetuned")
    other_weights(project / "finetuned")
    shutil.copytree(project / "model", project / "a copy")
    config = evaluation_config(graft=True, num_prompts=1, windows=1)
    with pytest.raises(UsageError, match="does not belong to the model: the weights are those of"):
        evaluate.main(replace(config, model_name="finetuned"))
    evaluate.main(replace(config, model_name="a copy"))
    evaluate.main(replace(config, model_name="finetuned", transfer=True))
    assert read_json("evaluations/sae/graft.json")["transfer"]
    options = dict(features=["1"], multiply=[0.0], num_prompts=1, device="cpu")
    with pytest.raises(UsageError, match="does not belong to the model"):
        steer.main(steer.Config(sae=["saes/sae"], model_name="finetuned", **options))
    steer.main(steer.Config(sae=["saes/sae"], model_name="finetuned", transfer=True, **options))

    collect.main(
        collection_config("finetuned", hook_names=["up_blocks.0.attentions.1"], out_dir="others")
    )
    train_project_sae(Path("others/up_blocks.0.attentions.1.npy"), "finetuned")
    with pytest.raises(UsageError, match="finetuned does not belong to the model"):
        steer.main(
            steer.Config(
                sae=["saes/sae", "saes/finetuned"], **options | dict(features=["0:1", "1:1"])
            )
        )


def test_another_text_encoder_is_said(project, capsys):
    pipe = DiffusionPipeline.from_pretrained("model")
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(1.01)
    pipe.text_encoder.save_pretrained("model/text_encoder")
    config = steer.Config(
        sae=["saes/sae"], features=["1"], multiply=[0.0], num_prompts=1, device="cpu"
    )
    steer.main(config)
    assert "note: the text_encoder of" in capsys.readouterr().out


def test_files_that_were_collected_otherwise_are_said(project, capsys):
    collect.main(collection_config(guidance_scale=2.0, seed=40, out_dir="weak"))
    capsys.readouterr()
    train.main(
        train.Config(
            data=[f"acts/{HOOK}.npy", f"weak/{HOOK}.npy"], num_latents=[64], k=[4], device="cpu"
        )
    )
    printed = capsys.readouterr().out
    assert "was collected otherwise than acts/" in printed
    assert "guidance_scale 2.0, not" in printed
    assert "seed" not in printed


def test_activations_of_two_models_under_one_name_are_not_mixed(project):
    other_weights(project / "model")
    collect.main(collection_config(out_dir="others"))
    sae = Sae.load_from_disk("saes/sae")
    with pytest.raises(UsageError, match="2 hook points or models"):
        activations_of(sae, "sae", ["acts/" + f"{HOOK}.npy", "others/" + f"{HOOK}.npy"])


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
    module = torch.nn.Module()
    # begins in the middle of a word, and does not end with one
    module.weight = torch.nn.Parameter(whole[3:70])
    before = fingerprint(module)
    for index in (0, 30, 65, 66):
        changed = torch.nn.Module()
        changed.weight = torch.nn.Parameter(whole[3:70].clone())
        assert fingerprint(changed) == before
        with torch.no_grad():
            changed.weight[index] += 1
        assert fingerprint(changed) != before


def test_a_copied_sae_knows_what_it_has_seen(project):
    sae = Sae.load_from_disk("saes/sae")
    sae.save_to_disk("elsewhere/deep/copy")
    again = Sae.load_from_disk("elsewhere/deep/copy")
    assert again.training_prompts == sae.training_prompts
    assert again.training_prompts
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

    cfg = read_json(folder / "cfg.json")
    del cfg["sae_fingerprint"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    Sae.load_from_disk(folder)
    assert not capsys.readouterr().err


def test_an_sae_of_an_earlier_version_on_another_hook_name_is_refused(project):
    cfg = read_json("saes/sae/cfg.json")
    for key in ("side", "stream", "rows", "fingerprint", "collected_with"):
        cfg.pop(key)
    Path("saes/sae/cfg.json").write_text(json.dumps(cfg))
    other = with_description(project / "acts" / f"{HOOK}.npy", hook_name="mid_block")
    with pytest.raises(UsageError, match="hook_name 'mid_block', and the SAE was trained on"):
        evaluate.main(evaluation_config(data=[str(other)]))


def test_files_of_one_model_with_and_without_a_fingerprint_are_one_data_set(project):
    old = with_description(project / "acts" / f"{HOOK}.npy")
    meta = read_json(old.with_suffix(".json"))
    for key in ("fingerprint", "fingerprints", "id", "contents"):
        meta.pop(key, None)
    old.with_suffix(".json").write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    np.save(old, np.load(old)[:, ::-1].copy())  # a copy of the other file would be refused
    assert len(open_activations([project / "acts" / f"{HOOK}.npy", old])) == 1


def test_earlier_versions_are_read_with_a_line(project, capsys):
    """Descriptions and SAE folders without fingerprints, sides and prompts: used, and it is said
    what could not be checked."""
    cfg = read_json("saes/sae/cfg.json")
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
    old["data"] = [str(project / "acts" / f"{HOOK}.npy")]
    Path("saes/sae/cfg.json").write_text(json.dumps(old))
    Path("saes/sae/training_prompts.txt").unlink()
    for path in Path("acts").glob(f"{HOOK}*.json"):
        meta = read_json(path)
        for key in ("fingerprint", "fingerprints", "id", "prompts_digest", "model_folder"):
            meta.pop(key)
        path.write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    evaluate.main(evaluation_config())
    out = capsys.readouterr().out
    assert "it can't be checked" in out
    assert "whether the model's weights are the same" in out
    assert read_json("evaluations/sae/evaluate.json")["fvu"] == pytest.approx(cfg["fvu"], rel=1e-9)
    # the digest of the data says so
    assert read_json("evaluations/sae/evaluate.json")["surely_unseen"]
    steer.main(
        steer.Config(sae=["saes/sae"], features=["1"], multiply=[0.0], num_prompts=1, device="cpu")
    )
    evaluate.main(evaluation_config(graft=True, num_prompts=1, windows=1))
