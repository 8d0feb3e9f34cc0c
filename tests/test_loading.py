"""What is loaded beside plain folders: LoRAs, single files, folders with code; one line for the rest."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import build, sd15

import collect
import evaluate
import steer
from diffusion import loading
from diffusion.loading import load_pipeline, parse_lora
from errors import UsageError
from hook import HookedDiffusionModel

HOOK = "up_blocks.0.attentions.0"


def with_lora(pipe, seed=0):
    """Add a LoRA with random weights to the UNet's attention, not fused."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(seed)
    pipe.unet.add_adapter(config)
    return pipe


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The folder and the file of a LoRA, as diffusers saves it."""
    peft_utils = pytest.importorskip("peft.utils")
    folder = tmp_path_factory.mktemp("lora") / "style"
    pipe = with_lora(build(sd15))
    weights = peft_utils.get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(folder, unet_lora_layers=weights)
    [file] = folder.glob("*.safetensors")
    return folder, file


def collect_with(model, out_dir, **options):
    defaults = dict(
        model_name=str(model),
        hook_names=[HOOK],
        max_num_examples=2,
        num_inference_steps=2,
        device="cpu",
        save_images=False,
        out_dir=str(out_dir),
    )
    return collect.main(collect.Config(**(defaults | options)))


# ------------------------------------------------------------------------------ LoRA


def test_a_lora_is_added_to_the_weights_and_module_names_stay(model_folder, lora):
    folder, file = lora
    plain = HookedDiffusionModel.from_pretrained(str(model_folder))
    before = {name: x.clone() for name, x in plain.pipe.unet.state_dict().items()}
    changes = []
    for text in (str(file), str(folder), f"{file}:0.5"):
        model = HookedDiffusionModel.from_pretrained(str(model_folder), lora=[text])
        assert list(model.modules()) == list(plain.modules())
        after = model.pipe.unet.state_dict()
        assert list(after) == list(before)
        name = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        changes.append(after[name] - before[name])
        assert torch.equal(after["conv_in.weight"], before["conv_in.weight"])
    whole, from_folder, half = changes
    assert whole.abs().max() > 1e-4
    assert torch.equal(whole, from_folder)
    assert torch.allclose(half, whole / 2, atol=1e-7)


@pytest.mark.slow
def test_a_description_remembers_the_lora_and_later_stages_load_it(
    model_folder, lora, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(lora[0], tmp_path / "style")
    [path] = collect_with(model_folder, tmp_path / "acts", lora=[f"{folder}:0.8"])
    [plain] = collect_with(model_folder, tmp_path / "plain")
    assert not np.array_equal(np.load(path), np.load(plain))
    meta = evaluate.read_description(path)
    [record] = meta["lora"]
    assert (record["name"], record["scale"]) == ("style", 0.8) and len(record["sha256"]) == 64
    assert json.loads(path.with_suffix(".json").read_text())["lora_paths"] == ["../style"]
    model, _ = steer.model_of(meta, device="cpu")
    assert collect.pipeline_fingerprints(model.pipe, torch.float32) == meta["fingerprints"]
    with pytest.raises(UsageError, match="other weights or settings of its unet"):
        collect_with(model_folder, tmp_path / "acts", lora=[f"{folder}:0.7"], max_num_examples=4)

    capsys.readouterr()
    steer.model_of(meta, str(model_folder), "cpu")
    assert "were made with --lora style:0.8" in capsys.readouterr().out
    [file] = folder.glob("*.safetensors")
    file.write_bytes(lora[1].read_bytes() + b" ")
    with pytest.raises(UsageError, match="style has changed since the activations"):
        steer.model_of(meta, device="cpu")
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="style, which is not there; name it with --lora"):
        steer.model_of(meta, device="cpu")


def test_what_is_no_lora_of_the_model(model_folder, lora, tmp_path, monkeypatch):
    assert parse_lora(f"{lora[1]}:0.25").scale == 0.25
    assert parse_lora(str(lora[0])).scale == 1.0
    for text, said in (
        (str(tmp_path / "absent.safetensors"), "expected a .safetensors file or a folder"),
        (f"{lora[1]}:1.2.3", "1.2.3 is no number"),
    ):
        with pytest.raises(UsageError, match=said):
            parse_lora(text)
    other = tmp_path / "other.safetensors"
    save_file({"a.b": torch.ones(2, 2)}, other)
    with pytest.raises(UsageError, match="other.safetensors: "):
        HookedDiffusionModel.from_pretrained(str(model_folder), lora=[str(other)])
    with pytest.raises(UsageError, match="no weight of .* has changed"):
        HookedDiffusionModel.from_pretrained(str(model_folder), lora=[f"{lora[1]}:0"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install peft to load a LoRA"):
        HookedDiffusionModel.from_pretrained(str(model_folder), lora=[str(lora[1])])


def test_a_model_that_was_saved_with_a_lora_that_is_not_fused(tmp_path):
    with_lora(build(sd15)).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="its unet have no weights for .*fuse_lora"):
        HookedDiffusionModel.from_pretrained(str(tmp_path / "model"), device="cpu")


# ------------------------------------------------------------------------------ code in a folder

CODE = "from pathlib import Path\nPath({mark!r}).touch()\nfrom diffusers import {base}\nclass Mine({base}): pass\n"


@pytest.mark.parametrize("part", ["pipeline", "unet"])
def test_code_in_a_folder_runs_only_if_it_is_trusted(part, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = shutil.copytree(model_folder, tmp_path / "model")
    mark = str(tmp_path / "was_run")
    index = json.loads((folder / "model_index.json").read_text())
    if part == "pipeline":
        base = index["_class_name"]
        index["_class_name"] = ["pipeline", "Mine"]
        path = folder / "pipeline.py"
    else:
        base = index["unet"][1]
        index["unet"] = ["mine", "Mine"]
        path = folder / "unet" / "mine.py"
    path.write_text(CODE.format(mark=mark, base=base))
    (folder / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(UsageError, match="comes with code of its own, which was not run.*add --tr"):
        collect_with(folder, tmp_path / "acts")
    assert not (tmp_path / "was_run").exists()
    [path] = collect_with(folder, tmp_path / "acts", trust_remote_code=True)
    assert (tmp_path / "was_run").exists()
    meta = evaluate.read_description(path)
    assert meta["trust_remote_code"] is True
    with pytest.raises(UsageError, match="add --trust_remote_code"):  # a description trusts nobody
        steer.model_of(meta, device="cpu")
    steer.model_of(meta, device="cpu", trust_remote_code=True)


# ------------------------------------------------------------------------------ single files


def test_a_single_file_is_loaded_by_the_class_that_its_repository_names(
    model_folder, tmp_path, monkeypatch
):
    """Nothing is downloaded here: the repository is a folder, and the class notes its call."""
    import diffusers

    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.x": torch.ones(2)}, file)
    seen = {}

    def fetch_diffusers_config(shapes):
        seen["shapes"] = {name: tuple(x.shape) for name, x in shapes.items()}
        return {"pretrained_model_name_or_path": str(model_folder)}

    def from_single_file(cls, path, **options):
        seen["call"] = (cls.__name__, path, options)
        return cls.from_pretrained(options["config"])

    name = "diffusers.loaders.single_file_utils.fetch_diffusers_config"
    monkeypatch.setattr(name, fetch_diffusers_config)
    pipeline = json.loads((model_folder / "model_index.json").read_text())["_class_name"]
    monkeypatch.setattr(
        getattr(diffusers, pipeline), "from_single_file", classmethod(from_single_file)
    )
    HookedDiffusionModel.from_pretrained(str(file))
    assert seen["shapes"] == {"model.diffusion_model.x": (2,)}
    options = {"config": str(model_folder), "dtype": torch.float32}
    assert seen["call"] == (pipeline, str(file), options)


def test_a_single_file_without_a_connection_is_one_line(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.x": torch.ones(2)}, file)
    with pytest.raises(
        UsageError, match="looks like a model of .*save the model as a folder first"
    ):
        load_pipeline(str(file), torch.float32)


def test_files_that_are_no_models(lora, tmp_path):
    with pytest.raises(UsageError, match="is a LoRA: name its model with --model_name"):
        load_pipeline(str(lora[1]), torch.float32)
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="can't be loaded"):
        load_pipeline(str(damaged), torch.float32)
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="expected a diffusers folder, a hub id, a .safetensors"):
        load_pipeline(str(pickle), torch.float32)
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(UsageError, match="can't be loaded: .*NoSuchPipeline"):
        load_pipeline(str(tmp_path), torch.float32)


def test_several_changed_files_have_changed(capsys):
    loading.say_changed_files({"a.py": "1", "b.py": "1"}, {"a.py": "2", "b.py": "2"})
    assert capsys.readouterr().out.startswith("note: a.py, b.py have changed since")
