"""A model of one's own, made by a Python file, in all seven scripts; what its parts may look like."""

import json
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import run_script
from documents import own_model, own_model_commands
from PIL import Image
from tiny import build as build_tiny
from tiny import sd15
from torch import nn

import ablate
import collect
import evaluate
import steer
import train
from diffusion.loading import find_model, move, run_model_file, split_function
from errors import UsageError
from hook import Edit, HookedDiffusionModel
from store.identity import pipeline_fingerprints
from store.prompts import load_prompts

this_file = sys.modules[__name__]

PROMPTS = "prompt\n" + "cat\ndog\nfox\nowl\n" * 2

# A UNet of one channel, conditioned on a number, with a sampler of its own and no VAE. What its
# sampler returns is no tensor, and its timesteps are listed nowhere.
UNET = """
from dataclasses import dataclass

import torch
from layers import Down


@dataclass(frozen=True)
class Stepped:
    denoised: torch.Tensor
    prev_sample: torch.Tensor


class UNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.down = Down()
        self.up = torch.nn.ConvTranspose2d(8, 1, 2, 2)
        self.embed = torch.nn.Linear(1, 8)

    def forward(self, image, t, difficulty):
        h = self.down(image) + self.embed(difficulty[:, None])[:, :, None, None]
        return self.up(h.tanh())


class Sampler:
    def step(self, prediction, t, image):
        return Stepped(image - prediction, image - 0.2 * prediction)


def encode_prompt(prompts):
    return torch.tensor([float(text) for text in prompts])


def get_timesteps(n):
    return (t / 10 for t in range(n, -1, -1))  # one more than n


def build(device):
    torch.manual_seed(0)
    return dict(
        model=UNet().to(device),
        scheduler=Sampler(),
        encode_prompt=encode_prompt,
        get_timesteps=get_timesteps,
        sample_shape=(1, 8, 8),
    )
"""
LAYERS = """
import torch


class Down(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 2, 2)

    def forward(self, x):
        return self.conv(x)
"""

PIPELINE = '''
from types import SimpleNamespace

import torch


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x, sigma):
        return self.inner(x).sin()


class Scheduler:
    def step(self, prediction, sigma, x):
        return (x - 0.3 * prediction,)


class Pipeline:
    """Called like a pipeline, without anything else that one of diffusers has."""

    def __init__(self):
        torch.manual_seed(0)
        self.components = {"net": Denoiser(), "sampler": Scheduler()}

    def __call__(self, prompt, num_inference_steps=3, generator=None):
        x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generator])
        for sigma in torch.linspace(1, 0.1, num_inference_steps):
            prediction = self.components["net"](x, sigma)
            (x,) = self.components["sampler"].step(prediction, sigma, x)
        return SimpleNamespace(images=x.sigmoid())


def pipeline():
    return Pipeline()
'''


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return folder


@pytest.fixture
def unet(tmp_path):
    """A project's folder with the UNet and its prompts, whose column is a number."""
    folder = write(tmp_path / "project", unet=UNET, layers=LAYERS)
    lines = [json.dumps({"difficulty": (7 * i % 16) / 16, "kind": i % 2}) for i in range(16)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def collect_unet(folder, out_dir, **options):
    defaults = dict(
        model_name=str(folder / "unet.py"),
        dataset_name=str(folder / "data.jsonl"),
        column="difficulty",
        hook_names=["down"],
        num_inference_steps=3,
        batch_size=4,
        device="cpu",
        out_dir=str(out_dir),
    )
    return collect.main(collect.Config(**(defaults | options)))


# ------------------------------------------------------------------------------ whole stages


@pytest.mark.slow
def test_the_example_of_the_docs_runs_as_written(tmp_path):
    (tmp_path / "my_model.py").write_text(own_model())
    (tmp_path / "prompts.csv").write_text("prompt\n" + "cat\ndog\nfox\nowl\n" * 4)
    stages = []
    for words in own_model_commands():
        assert words[0] == "python"
        done = run_script(*words[1:], cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr[-2000:])
        stages.append(words[1].removesuffix(".py"))
    expected = ["ablate", "collect", "diagnose", "train", "evaluate", "features", "steer"]
    assert stages == expected
    x = np.load(tmp_path / "own/blocks.2.npy")
    assert x.shape == (16, 10, 64, 64) and np.isfinite(x).all()
    meta = json.loads((tmp_path / "own/blocks.2.json").read_text())
    assert meta["grid"] == [8, 8] and meta["model_file"] == "../my_model.py"
    assert len(list((tmp_path / "own/images").glob("*.webp"))) == 16
    for picture in ("ablate/ablate.png", "evaluations/own/graft.png"):
        assert (tmp_path / picture).exists()
    assert list((tmp_path / "steer").glob("*/steer.png"))
    page = (tmp_path / "features/own.html").read_text()
    assert "data:image" in page


@pytest.mark.slow
def test_a_unet_from_outside_goes_through_all_stages_from_another_folder(unet, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = "--device cpu --num_inference_steps 3"
    prompts = f"--dataset_name {unet}/data.jsonl --column difficulty"
    model = f"--model_name {unet}/unet.py"
    for line in (
        f"ablate.py {model} {prompts} {options} --hook_names down --mode zero",
        f"collect.py {model} {prompts} {options} --hook_names down --save_samples --out_dir a",
        "diagnose.py --data a --num_latents 16 --k 2 --trial_updates 2 --trial_seconds 1",
        "train.py --data a --num_latents 16 --k 2 --run_name one",
        f"evaluate.py --sae saes/one --graft {model} --windows 2",
        "features.py --sae saes/one",
        f"steer.py --sae saes/one {model} --features 1 --num_prompts 2",
    ):
        done = run_script(*line.split(), cwd=elsewhere)
        assert done.returncode == 0, (line, done.stderr[-2000:])
        assert "Traceback" not in done.stderr
        if line.startswith("collect"):
            assert "16 prompts x 4 steps" in done.stdout  # get_timesteps gives one more
    assert np.load(elsewhere / "a/down.npy").shape == (16, 4, 16, 8)
    assert np.load(elsewhere / "a/samples.npy").shape == (16, 1, 8, 8)
    assert (elsewhere / "a/images/15.webp").exists()
    line = json.loads((elsewhere / "a/prompts.jsonl").read_text().splitlines()[1])
    assert line["prompt"] == "0.4375" and line["difficulty"] == 0.4375


def test_an_object_that_is_called_like_a_pipeline(tmp_path):
    folder = write(tmp_path / "project", mine=PIPELINE)
    (folder / "prompts.csv").write_text(PROMPTS)
    paths = collect.main(
        collect.Config(
            model_name=f"{folder}/mine.py:pipeline",
            hook_names=["inner"],
            num_inference_steps=2,
            device="cpu",
            out_dir=str(tmp_path / "acts"),
        )
    )
    assert np.load(paths[0]).shape == (8, 2, 64, 3)
    assert (tmp_path / "acts/images/7.webp").exists()
    meta = json.loads(paths[0].with_suffix(".json").read_text())
    assert meta["model"].endswith("mine.py:pipeline") and meta["pipeline"] == "Pipeline"
    assert meta["fingerprint"] == meta["fingerprints"]["net"]


def test_a_pipeline_of_diffusers_put_together_in_a_file(tmp_path, model_folder):
    code = f"""
        from diffusers import DiffusionPipeline
        def build(dtype, device):
            return DiffusionPipeline.from_pretrained({str(model_folder)!r}, dtype=dtype).to(device)
    """
    folder = write(tmp_path / "project", pipe=code)
    options = dict(
        dataset_name=str(model_folder / "prompts.csv"),
        hook_names=["mid_block"],
        max_num_examples=2,
        num_inference_steps=2,
        device="cpu",
        save_images=False,
    )
    made = []
    for name, out in ((str(folder / "pipe.py"), "own"), (str(model_folder), "folder")):
        config = collect.Config(model_name=name, out_dir=str(tmp_path / out), **options)
        made.append(np.load(collect.main(config)[0]))
    assert np.array_equal(*made)


def test_real_images_go_through_a_model_of_ones_own(tmp_path):
    code = own_model().replace(
        "    def step(self, velocity, t, x):",
        "    def add_noise(self, x, noise, t):\n"
        "        t = t.view(-1, 1, 1, 1)\n"
        "        return (1 - t) * x + t * noise\n\n"
        "    def step(self, velocity, t, x):",
    )
    assert "add_noise" in code
    folder = write(tmp_path / "project", my_model=code)
    rows = []
    for i, name in enumerate(("cat", "dog")):
        Image.new("RGB", (40, 32), (100 * i, 90, 10)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "prompt": name})
    (folder / "data.json").write_text(json.dumps(rows))
    config = collect.Config(
        model_name=str(folder / "my_model.py"),
        images="image",
        dataset_name=str(folder / "data.json"),
        timesteps_per_image=2,
        hook_names=["patch"],
        device="cpu",
        store_dtype="float32",
        out_dir=str(tmp_path / "acts"),
    )
    [path] = collect.main(config)
    x = torch.from_numpy(np.load(path))
    assert x.shape == (2, 2, 64, 64)
    # at the timestep 1/3 two thirds are the image, whose colour the patches' mean shows
    timesteps = np.load(tmp_path / "acts/patch.timesteps.npy")
    model = HookedDiffusionModel.from_pretrained(str(folder / "my_model.py"))
    clean = torch.tensor([100, 90, 10])[None, :, None, None] / 127.5 - 1
    with torch.no_grad():
        expected = model.pipe.model.patch((1 - timesteps[1, 1]) * clean.expand(1, 3, 4, 4))
        bias = model.pipe.model.patch.bias
    mean = x[1, 1].mean(0)
    assert torch.allclose(mean, expected[0, :, 0, 0], atol=0.3)
    assert (mean - bias).norm() > 0.1


# ------------------------------------------------------------------------------ files and hashes


def test_a_description_runs_nothing_and_says_what_to_add(unet, tmp_path, monkeypatch):
    [path] = collect_unet(unet, tmp_path / "acts")
    meta = json.loads(path.with_suffix(".json").read_text())
    assert meta["model_file"] == "../project/unet.py"
    assert set(meta["model_files"]) == {"unet.py", "layers.py"}
    monkeypatch.chdir(tmp_path)
    description = evaluate.read_description("acts/down.npy")
    assert description["model_file"] == "project/unet.py"
    with pytest.raises(UsageError, match="only run where you name it: add --model_name project/un"):
        steer.model_of(description)
    with pytest.raises(UsageError, match="is only run where you name it"):
        steer.model_of(description | {"model": "toy"})  # the path alone counts
    model, options = steer.model_of(description, "project/unet.py", "cpu")
    assert options == {"num_inference_steps": 3} and model.hook_names("down") == ["down"]


@pytest.mark.parametrize("name", ["unet", "layers"])
def test_a_changed_file_is_said_and_does_not_extend_a_collection(unet, tmp_path, capsys, name):
    [path] = collect_unet(unet, tmp_path / "acts", max_num_examples=8)
    meta = evaluate.read_description(path)
    capsys.readouterr()
    steer.model_of(meta, str(unet / "unet.py"), "cpu")
    assert "has changed" not in capsys.readouterr().out
    with open(unet / f"{name}.py", "a") as file:
        file.write("\n# another version\n")
    steer.model_of(meta, str(unet / "unet.py"), "cpu")
    assert capsys.readouterr().out.startswith(f"note: {name}.py has changed since the activations")
    with pytest.raises(UsageError, match=f"was collected before .*{name}.py.* was changed"):
        collect_unet(unet, tmp_path / "acts")


def test_a_moved_project_extends_its_collection(unet, tmp_path, monkeypatch):
    monkeypatch.chdir(unet)
    here = Path(".")
    collect_unet(here, "acts", max_num_examples=8)
    before = np.load("acts/down.npy")
    moved = tmp_path / "moved"
    monkeypatch.chdir(tmp_path)
    shutil.move(unet, moved)
    monkeypatch.chdir(moved)
    collect_unet(here, "acts")
    assert np.array_equal(np.load("acts/down.npy")[:8], before)


def test_each_load_takes_the_modules_as_they_are_beside_its_own_file(tmp_path):
    """Two projects have a module of one name, which is also one of ours; none gets another's."""
    made = []
    for number in (1, 2):
        folder = write(
            tmp_path / str(number),
            mine="import train, parts\ndef build():\n    return train.number, parts.number",
            train=f"number = {number}",
            parts=f"number = {10 * number}",
        )
        made.append(run_model_file(str(folder / "mine.py"), torch.float32, torch.device("cpu")))
    assert [own.made for own in made] == [(1, 10), (2, 20)]
    assert set(made[0].files) == {"mine.py", "parts.py", "train.py"}
    assert sys.modules["train"] is train and hasattr(train, "learning_rate")
    assert not any(str(tmp_path) in path for path in sys.path)


def test_names_of_models():
    assert split_function("a/my.model.py") == ("a/my.model.py", "build")
    assert split_function("a/b.py:make_it") == ("a/b.py", "make_it")
    assert split_function("owner/name") == ("owner/name", None)
    for name, said in (
        ("absent.py", "there is no file 'absent.py'"),
        ("absent.py:build", "there is no file 'absent.py'"),
        ("absent.safetensors", "there is no file"),
        ("absent", "a model of your own is a file such as my_model.py"),
        (__file__ + "x", "no folder"),
    ):
        with pytest.raises(UsageError, match=said):
            find_model(name)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def build():\n    return {}['weights']\n", r"line 2, in build: KeyError: 'weights'"),
        ("import broken\ndef build(): pass\n", r"broken.py, line 3: NameError: name 'x'"),
        ("def build(:\n", r"line 1: SyntaxError"),
        ("import sys\nsys.exit('no weights')\n", r"line 2: SystemExit: no weights"),
        ("def make(): pass\n", r"mine.py has no function build\(\); name it with mine.py:NAME"),
        (
            "def build(path): pass\n",
            r"missing a required argument: 'path'; it is called with dtype",
        ),
        (
            PIPELINE.replace("generator=None", "seed=None") + "\nbuild = pipeline\n",
            "Pipeline takes no argument generator, so a seed would not decide what it makes",
        ),
        ("def build(): return 3\n", r"returned a int; expected a HookedDiffusionModel, a dict"),
        (
            "def build(): return {'net': 3}\n",
            r"the keys net; expected model and scheduler, and any",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line_with_its_place(tmp_path, code, said):
    folder = write(tmp_path, mine=code, broken="a = 1\n\nb = x\n")
    with pytest.raises(UsageError, match=said):
        HookedDiffusionModel.from_pretrained(str(folder / "mine.py"))


def test_options_that_a_file_does_not_take(unet, tmp_path):
    with pytest.raises(UsageError, match="--revision has no effect"):
        collect_unet(unet, tmp_path / "a", revision="main")
    with pytest.raises(UsageError, match="--trust_remote_code has no effect"):
        collect_unet(unet, tmp_path / "a", trust_remote_code=True)
    with pytest.raises(UsageError, match="--cpu_offload: Loop has no enable_model_cpu_offload"):
        collect_unet(unet, tmp_path / "a", cpu_offload=True)
    with pytest.raises(UsageError, match="guidance_scale 3 has no effect"):
        collect_unet(unet, tmp_path / "a", guidance_scale=3.0)
    with pytest.raises(UsageError, match="negative_prompt has no effect"):
        collect_unet(unet, tmp_path / "a", negative_prompt="no")


def test_networks_are_switched_to_evaluation(tmp_path):
    code = """
        import torch
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.dropout = torch.nn.Dropout(0.5)
            def forward(self, x, t):
                return self.dropout(x)
        class Steps:
            def step(self, y, t, x): return x
        def build():
            return dict(model=Net().double(), scheduler=Steps(), sample_shape=(1, 2, 2),
                        get_timesteps=lambda n: range(n))
    """
    folder = write(tmp_path, mine=code)
    model = HookedDiffusionModel.from_pretrained(str(folder / "mine.py"))
    assert not model.pipe.model.training
    assert model.dtype == torch.float32  # without parameters


# ------------------------------------------------------------------------------ the loop


class Net(nn.Module):
    """Adds up what it is conditioned on, so that rows can be told."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls = []

    def forward(self, x, t, y=None, scale=None):
        self.calls.append((len(x), y, scale))
        h = self.inner(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])
        for condition in (y, scale):
            if condition is not None:
                h = h + condition.reshape(-1, 1, 1, 1)
        return h


class Steps:
    def step(self, model_output, timestep, sample):
        return sample - 0.1 * model_output


def loop_of(encode_prompt, **options):
    torch.manual_seed(0)
    defaults = dict(get_timesteps=lambda n: range(n, 0, -1), sample_shape=(4, 2, 3))
    return HookedDiffusionModel(Net(), Steps(), encode_prompt, **(defaults | options))


def numbers(texts):
    return torch.tensor([float(len(text)) for text in texts])


@pytest.mark.parametrize(
    ("encode_prompt", "rows", "last"),
    [
        (lambda p: numbers(p), 4, [1.0, 1.0, 2.0, 2.0]),
        (lambda p: (numbers(p), None), 4, [1.0, 1.0, 2.0, 2.0]),
        (lambda p: (numbers(p), -numbers(p)), 8, [-1.0, -1.0, -2.0, -2.0, 1.0, 1.0, 2.0, 2.0]),
        (lambda p: {"y": numbers(p)}, 4, [1.0, 1.0, 2.0, 2.0]),
        (lambda p: ((numbers(p), numbers(p)), None), 4, [1.0, 1.0, 2.0, 2.0]),
        (
            lambda p, num_images_per_prompt: numbers(p).repeat_interleave(num_images_per_prompt),
            4,
            [1.0, 1.0, 2.0, 2.0],
        ),
        (lambda p, *_: (numbers(p).repeat_interleave(2), None), 4, [1.0, 1.0, 2.0, 2.0]),
        (
            lambda texts, where, n, guided, negative: numbers(texts).repeat_interleave(n),
            4,
            [1.0, 1.0, 2.0, 2.0],
        ),
        (None, 4, None),
    ],
)
def test_what_encode_prompt_may_take_and_return(encode_prompt, rows, last):
    model = loop_of(encode_prompt)
    images = model(["a", "bb"], num_images_per_prompt=2, num_inference_steps=2).images
    assert images.shape == (4, 4, 2, 3)
    called_with, y, _ = model.pipe.model.calls[-1]
    assert called_with == rows
    assert (y.tolist() if last is not None else y) == last


def test_a_prompt_that_the_file_refuses_is_one_line_with_its_place(unet, tmp_path):
    (unet / "data.jsonl").write_text('{"difficulty": "hard"}')
    with pytest.raises(
        UsageError, match=r"could not convert string to float: 'hard' \(unet.py, li"
    ):
        collect_unet(unet, tmp_path / "acts")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda p: [numbers(p)] * 3, "returned 3 values; expected cond, or the pair"),
        (lambda p: (numbers(p), numbers(p)[:, None]), "of the shapes .* expected the same"),
        (lambda p: 3, "returned a int; expected a tensor"),
        (lambda p: numbers("a"), r"shapes \[\(1,\)\] for 2 images"),
        (lambda p, path: numbers(p), "expected one argument, and any of these: device, num_images"),
    ],
)
def test_what_encode_prompt_must_not_return(returned, said):
    with pytest.raises(UsageError, match=said):
        loop_of(returned)(["a", "bb"], num_inference_steps=2)


def test_shared_tensors_are_not_doubled():
    table = torch.ones(1)

    def encode_prompt(prompts):
        return {"y": numbers(prompts), "scale": table}, {"y": -numbers(prompts), "scale": table}

    model = loop_of(encode_prompt)
    model(["a", "bb"], num_inference_steps=2)
    rows, y, scale = model.pipe.model.calls[-1]
    assert rows == 4 and y.tolist() == [-1.0, -2.0, 1.0, 2.0] and scale.shape == (1,)


ENCODER, OTHER = nn.Linear(1, 1), nn.Linear(1, 1)


def encode(prompts):
    return torch.cat([row for row in (encode_one(prompt) for prompt in prompts)])


@torch.no_grad()
def encode_one(prompt):
    return ENCODER(numbers([prompt])[:, None])[:, 0]


class Encoder:
    """With one network among its attributes, and another in its components."""

    def __init__(self):
        self.networks = {"first": nn.Linear(1, 1)}

    @property
    def components(self):
        return {"scheduler": None, "second": OTHER}

    def __call__(self, prompts):
        return encode(prompts)

    def encode(self, prompts):
        return self.networks["first"](numbers(prompts)[:, None])[:, 0]

    def decode(self, z):
        return z[:, :3]


def test_the_networks_that_encode_prompt_and_a_plain_vae_use_are_components():
    def of_closure(prompts):
        return OTHER(encode(prompts)[:, None])[:, 0]

    encoder = Encoder()
    first = encoder.networks["first"]
    for encode_prompt, expected in (
        (encode, [ENCODER]),
        (of_closure, [OTHER, ENCODER]),
        (encoder, [first, OTHER, ENCODER]),
        (encoder.encode, [first, OTHER, ENCODER]),
        (partial(lambda net, prompts: numbers(prompts), OTHER), [OTHER]),
        (lambda prompts, net=OTHER: numbers(prompts), [OTHER]),
        (lambda prompts: this_file.OTHER(numbers(prompts)[:, None]), [OTHER]),
        (OTHER.forward, [OTHER]),
        (numbers, []),
    ):
        components = loop_of(encode_prompt).pipe.components
        names = ["text_encoder", "text_encoder_2", "text_encoder_3"][: len(expected)]
        assert list(components) == ["model", "scheduler", *names]
        found = [components[name] for name in names]
        assert set(map(id, found)) == set(map(id, expected))
    components = loop_of(encoder.encode, vae=encoder).pipe.components
    assert {id(components[name]) for name in ("vae", "vae_2", "vae_3")} == set(
        map(id, (first, OTHER, ENCODER))
    )
    assert "text_encoder" not in components


def test_another_prompt_encoder_is_another_model():
    before = pipeline_fingerprints(loop_of(encode).pipe)
    with torch.no_grad():
        ENCODER.weight.add_(1)
    after = pipeline_fingerprints(loop_of(encode).pipe)
    assert before["text_encoder"] != after["text_encoder"] and before["model"] == after["model"]


@pytest.mark.slow
def test_the_encode_prompt_of_a_pipeline_moves_with_the_model():
    pipe = build_tiny(sd15)
    unet = build_tiny(sd15).unet
    loop = HookedDiffusionModel(unet, pipe.scheduler, pipe.encode_prompt, vae=pipe.vae).pipe
    encoders = {name for name in loop.components if name.startswith("text_encoder")}
    assert any(loop.components[name] is pipe.text_encoder for name in encoders)
    move(loop, "meta")
    assert pipe.text_encoder.device.type == pipe.vae.device.type == "meta"


class Decoder:
    def __init__(self, wrap):
        self.wrap = wrap

    def decode(self, z):
        return self.wrap(z[:, :3] * 0 + 0.5)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x,), lambda x: SimpleNamespace(loss=x[0], sample=x)]
)
def test_a_vae_without_settings(wrap):
    model = loop_of(None, vae=Decoder(wrap))
    images = model(["a", "bb"], num_inference_steps=2).images
    assert images.shape == (2, 3, 2, 3) and (images == 0.75).all()


def test_a_vae_with_settings_gets_its_own_latents():
    """As diffusers encodes: (z - mean) / std, minus the shift, times the scale."""
    vae = Decoder(lambda x: x)
    vae.decode = lambda z: z
    vae.config = SimpleNamespace(
        scaling_factor=2.0, shift_factor=0.5, latents_mean=[1.0] * 4, latents_std=[3.0] * 4
    )
    options = dict(num_inference_steps=2, latents=torch.zeros(1, 4, 2, 3))
    sample = loop_of(None, vae=vae)(["a"], output_type="latent", **options).images
    images = loop_of(None, vae=vae)(["a"], **options).images
    assert torch.equal(images, (((sample / 2 + 0.5) * 3 + 1) / 2 + 0.5).clamp(0, 1))


def test_without_a_vae_the_sample_is_the_image():
    model = loop_of(numbers)
    options = dict(num_inference_steps=2)
    results = []
    for output_type in ("pt", "latent"):
        seed = torch.Generator().manual_seed(0)
        results.append(model(["a"], generator=seed, output_type=output_type, **options).images)
    image, sample = results
    assert torch.equal(image, (sample / 2 + 0.5).clamp(0, 1)) and sample.min() < -1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: {"prev_sample": x},
        lambda x: SimpleNamespace(denoised=x + 9, prev_sample=x),
        lambda x: SimpleNamespace(order=1, following=x),
    ],
)
def test_what_a_step_may_return(wrap):
    class Wrapped(Steps):
        def step(self, model_output, timestep, sample):
            return wrap(super().step(model_output, timestep, sample))

    torch.manual_seed(0)
    model = HookedDiffusionModel(
        Net(), Wrapped(), numbers, get_timesteps=lambda n: range(n, 0, -1), sample_shape=(4, 2, 3)
    )
    plain = loop_of(numbers)
    made = []
    for one in (model, plain):
        seed = torch.Generator().manual_seed(0)
        with one.watch(1) as sampling:
            one(["a"], generator=seed, num_inference_steps=2, output_type="latent")
        made.append(sampling.sample)
    assert torch.equal(*made)


def test_the_loop_is_read_and_edited_like_a_pipeline(capsys):
    model = loop_of(lambda p: (numbers(p), -numbers(p)))
    generator = torch.Generator().manual_seed(0)
    options = dict(num_inference_steps=3, generator=generator, output_type="latent")
    output, cache = model.run_with_cache("inner", ["a", "bb"], rows="both", **options)
    assert "100%" in capsys.readouterr().err
    assert cache["output"]["inner"].shape == (2, 3, 6, 4)
    model.hide_progress_bar()
    generator.manual_seed(0)
    edit = Edit(lambda x: 2 * x, rows="cond", steps=[0])
    changed = model.run_with_hooks({"inner": edit}, ["a", "bb"], **options)
    assert not torch.equal(output.images, changed.images)
    assert capsys.readouterr().err == ""


def test_the_number_of_steps_is_that_of_the_loop():
    model = loop_of(numbers, get_timesteps=lambda n: iter(range(2 * n)))
    _, steps = model.layouts("inner", ["a"], num_inference_steps=3)
    assert steps == {"inner": list(range(6))}


# ------------------------------------------------------------------------------ forwards


class Conditioned(nn.Module):
    """Each row's tokens are text, which is as long as `lengths` says, and then the image."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.label = nn.Embedding(num_classes, 4)
        self.mix = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x, t, condition):
        self.calls += 1
        tokens = x.flatten(2).mT
        if condition.is_floating_point():
            tokens = tokens + condition.reshape(-1, 1, 1)
        else:
            tokens = tokens + self.label(condition)[:, None]
        return self.mix(tokens).mT.unflatten(2, x.shape[2:])


class WithLengths(Conditioned):
    """Integers that are lengths: so many text tokens stand in front of the image's."""

    def forward(self, x, t, condition):
        self.calls += 1
        tokens = torch.cat([x.new_zeros(len(x), 4, 4), x.flatten(2).mT], 1)
        for row, length in enumerate(condition.tolist()):
            tokens[row] = tokens[row].roll(length - 4, 0)
        tokens = self.mix(tokens)
        for row, length in enumerate(condition.tolist()):
            tokens[row] = tokens[row].roll(4 - length, 0)
        return tokens[:, 4:].mT.unflatten(2, x.shape[2:])


def forwards_of_batches(net, batches, num_steps=3):
    """The cache of each batch, and how many forwards it took, with one step of one prompt first."""
    options = dict(get_timesteps=lambda n: range(n, 0, -1), sample_shape=(4, 2, 3))
    model = HookedDiffusionModel(net, Steps(), lambda p: batches[p[0]], **options)
    model.first_step("mix", ["0"] * len(batches["0"]), num_inference_steps=num_steps)
    caches, counts = [], []
    for name, condition in batches.items():
        before = net.calls
        _, cache = model.run_with_cache("mix", [name] * len(condition), num_inference_steps=3)
        caches.append(cache)
        counts.append(net.calls - before)
    return caches, counts


def test_a_fraction_as_the_condition_costs_no_further_forwards():
    batches = {str(i): torch.tensor([0.1 * i, 0.3 + i]) for i in range(4)}
    _, counts = forwards_of_batches(Conditioned(), batches)
    assert counts[1:] == [3, 3, 3]


def test_classes_cost_no_further_forwards_once_they_lie_between_those_that_were_met():
    classes = [[0, 1], [8, 9], [3, 5], [9, 2], [4, 4]]
    batches = {str(i): torch.tensor(row) for i, row in enumerate(classes)}
    _, counts = forwards_of_batches(Conditioned(), batches)
    assert counts[1] > 3
    assert counts[2:] == [3, 3, 3]


def test_a_class_beyond_those_that_were_met_is_looked_at_again():
    batches = {"0": torch.tensor([2, 3]), "1": torch.tensor([4, 5]), "2": torch.tensor([3, 5])}
    _, counts = forwards_of_batches(Conditioned(), batches)
    assert counts[1] > 3 and counts[2] == 3


class WithLongest(WithLengths):
    """The image's tokens of all rows begin behind the longest text of the batch."""

    def forward(self, x, t, condition):
        return super().forward(x, t, condition.max().expand(len(x)))


@pytest.mark.parametrize(
    "net, sets",
    [
        # 2 lies between 0 and 4, with other places
        (WithLengths(), [[4, 4], [0, 0], [2, 2], [1, 3]]),
        # 1 and 2 lie between 1 and 4, and so does 3
        (WithLongest(), [[1, 4], [1, 2], [3, 1]]),
    ],
)
def test_lengths_are_never_taken_for_classes(net, sets):
    """Image tokens begin where the text of the row, or the longest of the batch, ends."""
    torch.manual_seed(0)
    batches = {str(i): torch.tensor(row) for i, row in enumerate(sets)}
    seen = []
    net.mix.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    caches, _ = forwards_of_batches(net, batches)
    for cache, lengths in zip(caches, sets):
        x = cache["output"]["mix"]  # (2, 3, 6, 4)
        assert x.shape == (2, 3, 6, 4)
        if isinstance(net, WithLongest):
            lengths = [max(lengths)] * 2
        for row, length in enumerate(lengths):
            expected = [full[row, length : length + 6] for full in seen if full.shape == (2, 10, 4)]
            assert any(torch.equal(x[row, -1], one) for one in expected)


# ------------------------------------------------------------------------------ numbers as prompts


def test_a_column_of_numbers(tmp_path):
    table = tmp_path / "data.json"
    table.write_text(json.dumps([{"angle": 0.1, "name": "a"}, {"angle": 2, "name": "b"}]))
    rows = load_prompts(str(table), column="angle")
    assert rows[0] == {"prompt": "0.1", "angle": 0.1, "name": "a"}
    assert rows[1]["prompt"] == "2"
    table.write_text('[{"prompt": 0}, {"prompt": 1}]')
    assert [row["prompt"] for row in load_prompts(str(table))] == ["0", "1"]
    table.write_text('[{"angle": true}]')
    with pytest.raises(UsageError, match="is no text and no number: True"):
        load_prompts(str(table), column="angle")
    table.write_text('[{"angle": NaN}]')
    with pytest.raises(UsageError, match="is no text and no number"):
        load_prompts(str(table), column="angle")


def test_numbers_too_large_for_float16_are_refused_before_a_batch_is_generated(unet, tmp_path):
    code = UNET.replace("return self.up(h.tanh())", "return self.up((1e6 * h).tanh())").replace(
        "h = self.down(image)", "h = 277_000 * self.down(image)"
    )
    (unet / "layers.py").write_text(LAYERS.replace("self.conv(x)", "277_000 * self.conv(x)"))
    (unet / "unet.py").write_text(code)
    with pytest.raises(UsageError, match="down: .*e.05 does not fit in float16; use --store_dtype"):
        collect_unet(unet, tmp_path / "acts")
    assert not (tmp_path / "acts").exists()
    collect_unet(unet, tmp_path / "acts", store_dtype="float32")


def test_a_file_is_only_run_in_a_process_that_names_it(tmp_path):
    """Importing the project, and reading a description, runs nothing."""
    code = "import hook, collect; print('ok')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.stdout == "ok\n", done.stderr


# ------------------------------------------------------------------------- samples of other shapes


class Plain(nn.Module):
    """Takes the time first, and samples of any shape."""

    def __init__(self, shape):
        super().__init__()
        self.inner = nn.Linear(shape[-1], shape[-1])

    def forward(self, timestep, sample):
        return self.inner(sample) * 0.5


class NamedSteps:
    """Its step returns a dict in which the next sample is not the first."""

    def step(self, prediction, t, x):
        return {"x0": torch.zeros_like(x), "prev_sample": x - 0.3 * prediction}


def plain(shape, **options):
    torch.manual_seed(0)
    made = dict(get_timesteps=lambda n: list(range(n, 0, -1)), sample_shape=shape)
    return HookedDiffusionModel(Plain(shape), NamedSteps(), **(made | options))


def test_a_dict_is_read_by_its_names():
    """Of a step's result prev_sample counts, of a VAE's sample, wherever they stand."""
    model = plain((3, 4, 4))
    options = dict(num_inference_steps=2, output_type="latent")
    options["generator"] = torch.Generator().manual_seed(0)
    assert model(**options).images.abs().min() > 0
    vae = SimpleNamespace(decode=lambda z: {"mean": z * 0, "sample": z * 0 + 1})
    images = plain((3, 4, 4), vae=vae)(num_inference_steps=2).images
    assert torch.equal(images, torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((3, 4, 6), (2, 3, 4, 6)),
        ((1, 5, 4, 6), (2, 5, 1, 4, 6)),  # a volume: its slices are frames
        ((2, 24), (2, 1, 2, 24)),  # a series: a line of pixels per channel
        ((24,), (2, 1, 1, 24)),
    ],
)
def test_samples_of_any_shape_are_shown(shape, expected):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = plain(shape)(["a", "b"], num_inference_steps=2, generator=generators).images
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = dict(num_inference_steps=2, generator=generators, output_type="latent")
    sample = plain(shape)(["a", "b"], **options).images
    assert images.shape == expected
    assert 0 <= images.min() < 0.5 < images.max() <= 1
    assert torch.equal(
        images.flatten().sort()[0], (sample / 2 + 0.5).clamp(0, 1).flatten().sort()[0]
    )


def test_a_sample_shape_that_is_no_shape():
    with pytest.raises(UsageError, match="sample_shape: expected the shape of one sample.*got 8"):
        plain((8,), sample_shape=8)


WITHOUT_PROMPTS = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x).sin()
        return x


class Euler:
    def set_timesteps(self, n):
        self.timesteps = torch.linspace(1, 0.1, n)

    def step(self, prediction, t, x):
        return x - 0.3 * prediction


def build():
    torch.manual_seed(0)
    return dict(model=Net(), scheduler=Euler(), sample_shape=(3, 8, 8))


def prompted():
    return build() | dict(encode_prompt=lambda prompts: torch.zeros(len(prompts), 1))
"""


def test_a_model_without_prompts_needs_no_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "project", net=WITHOUT_PROMPTS))
    config = collect.Config(
        model_name="net.py", max_num_examples=4, num_inference_steps=2, device="cpu", batch_size=2
    )
    [path] = collect.main(config)
    assert np.load(path).shape == (4, 2, 64, 3)
    config.model_name = "net.py:prompted"
    config.out_dir = "prompted"
    with pytest.raises(UsageError, match="^which prompts. --dataset_name takes"):
        collect.main(config)


@pytest.mark.slow
def test_a_graft_of_few_steps_has_a_window_per_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write(tmp_path / "project", net=WITHOUT_PROMPTS))
    collect.main(
        collect.Config(model_name="net.py", max_num_examples=6, num_inference_steps=2, device="cpu")
    )
    train.main(
        train.Config(data=["activations"], num_latents=[8], k=[2], run_name="run", device="cpu")
    )
    evaluate.main(
        evaluate.Config(
            graft=True, num_prompts=1, model_name="net.py", device="cpu", sae="saes/run"
        )
    )
    assert "runs in 2 steps, so there are 2 windows" in capsys.readouterr().out
    report = json.loads(Path("evaluations/run/graft.json").read_text())
    assert len(report["windows"]) == 2


def test_a_vae_of_videos_has_frames_behind_channels():
    vae = SimpleNamespace(decode=lambda z: z.repeat(1, 1, 2, 1, 1))  # twice as many frames
    images = plain((3, 2, 4, 4), vae=vae)(["a"], num_inference_steps=2).images
    assert images.shape == (1, 4, 3, 4, 4)


UNCOUNTED = (
    WITHOUT_PROMPTS
    + """

CLASSES = {"cat": 0.0, "dog": 1.0}


class Bare:
    def step(self, prediction, t, x):
        return x - 0.3 * prediction


class Sampler:
    def __init__(self):
        self.components = {"net": Net(), "scheduler": Bare()}

    def __call__(self, prompt, generator=None):
        scale = torch.tensor([CLASSES[text] for text in prompt])
        x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generator])
        x = x + scale[:, None, None, None]
        for t in (1.0, 0.5):
            x = self.components["scheduler"].step(self.components["net"](x, t), t, x)
        return (x.sigmoid(),)


def uncounted():
    torch.manual_seed(0)
    return Sampler()
"""
)


def test_a_sampler_that_does_not_say_how_many_steps_it_makes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write(tmp_path / "project", net=UNCOUNTED))
    Path("prompts.csv").write_text("prompt\ncat\ndog\n")
    config = collect.Config(model_name="net.py:uncounted", device="cpu", hook_names=["blocks.1"])
    with pytest.raises(UsageError, match="it is not known how many steps this model makes"):
        collect.main(config)
    options = dict(hook_names=["blocks.1"], max_num_examples=2, device="cpu")
    ablate.main(ablate.Config(model_name="net.py:uncounted", **options))
    assert "?" in capsys.readouterr().out
    Path("prompts.csv").write_text("prompt\ncat\nbird\n")
    with pytest.raises(UsageError, match="KeyError: 'bird' .net.py, line "):
        collect.main(config)


GLOBAL_NOISE = """
def unseeded():
    sampler = uncounted()
    call = Sampler.__call__

    class Unseeded(Sampler):
        def __call__(self, prompt, generator=None, num_inference_steps=2):
            return call(self, prompt, [None] * len(prompt))

    sampler.__class__ = Unseeded
    return sampler


def seeded():
    sampler = uncounted()
    call = Sampler.__call__

    class Seeded(Sampler):
        def __call__(self, prompt, generator=None, num_inference_steps=2):
            return call(self, prompt, generator)

    sampler.__class__ = Seeded
    return sampler
"""


@pytest.mark.parametrize("function, is_noted", [("unseeded", True), ("seeded", False)])
def test_noise_that_no_seed_reaches_is_said(tmp_path, monkeypatch, capsys, function, is_noted):
    monkeypatch.chdir(write(tmp_path / "project", net=UNCOUNTED + GLOBAL_NOISE))
    Path("prompts.csv").write_text("prompt\ncat\ndog\n")
    options = dict(hook_names=["blocks.1"], num_inference_steps=2, device="cpu")
    collect.main(collect.Config(model_name=f"net.py:{function}", **options))
    assert ("another seed gives the same noise" in capsys.readouterr().out) == is_noted
