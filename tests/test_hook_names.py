"""Which modules are taken for the blocks of a model: what is stored and ablated if the user names
nothing, and what is suggested after a name that does not exist."""

import json
from pathlib import Path

import pytest
import torch
from families import controlnet, flux, kandinsky5, pixart, sd3, stable_audio, wan22, zimage
from tiny import PROMPTS, build, generate_options, sd15
from torch import nn

import ablate
import collect
from diffusion.hook_names import block_groups, find_modules, match_names
from errors import UsageError
from hook import HookedDiffusionModel


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(d), nn.Linear(d, d)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Embed(nn.Module):
    """Has a container with modules inside, and no token of the image."""

    def __init__(self, d):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, d), nn.SiLU(), Block(d))

    def forward(self, t):
        return self.layers(t.float().reshape(-1, 1))


class InOrder(nn.Module):
    """Its blocks stand in a ModuleList, defined in another order than they run in."""

    def __init__(self):
        super().__init__()
        self.time = Embed(4)
        self.last = nn.ModuleList([Block(4)])
        self.blocks = nn.ModuleList([Block(4) for _ in range(5)])
        self.out = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))

    def forward(self, x, t):
        x = x.movedim(1, -1) + self.time(t.expand(len(x)))[:, None, None]
        for block in [*self.blocks, *self.last]:
            x = block(x)
        return self.out(x).movedim(-1, 1)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t):
        return self.inner(x, t)


class Attributes(nn.Module):
    """Has no container at all, as small UNets do."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.down, self.middle, self.up = Block(4), Block(4), Block(4)

    def forward(self, x, t):
        x = x.movedim(1, -1) + self.time(t.float().reshape(1, 1))
        return self.up(self.middle(self.down(x))).movedim(-1, 1)


class Leaves(nn.Module):
    """Has nothing that has modules inside."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x, t):
        return self.second(self.first(x).relu())


class Scheduler:
    timesteps = torch.tensor([900, 400])

    def set_timesteps(self, num_inference_steps, device=None):
        pass

    def step(self, model_output, timestep, sample):
        return (sample - 0.1 * model_output,)


def own_model(module):
    def encode_prompt(prompt, device, num_images_per_prompt, guidance, negative_prompt):
        return None, None

    torch.manual_seed(0)
    return HookedDiffusionModel(module, Scheduler(), sample_shape=(4, 8, 8))


def blocks_of(model, recipe=None, **options):
    if recipe is None:
        arguments = {"batch_size": 2, "num_inference_steps": 2, "guidance_scale": 1.0}
    else:
        arguments = generate_options(2, recipe)
    found = model.blocks(**arguments, **options)
    return {denoiser: list(names) for denoiser, names in found.items()}


@pytest.mark.parametrize(
    "module, names",
    [
        (InOrder(), ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "last.0"]),
        (Wrapper(InOrder()), [*(f"inner.blocks.{i}" for i in range(5)), "inner.last.0"]),
        (Attributes(), ["down", "middle", "up"]),
        (Wrapper(Attributes()), ["inner.down", "inner.middle", "inner.up"]),
        (Leaves(), ["first", "second"]),
    ],
    ids=["containers", "wrapped", "attributes", "wrapped attributes", "leaves"],
)
def test_blocks_of_a_model_of_ones_own(module, names):
    assert blocks_of(own_model(module)) == {"model": names}


def test_blocks_of_pipelines():
    pipe = HookedDiffusionModel.from_pipeline
    attentions = ["down_blocks.1.attentions.0", "mid_block.attentions.0"]
    attentions += ["up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]
    assert blocks_of(pipe(build(sd15)), sd15) == {"unet": attentions}
    assert blocks_of(pipe(build(pixart)), pixart) == {
        "transformer": ["transformer_blocks.0", "transformer_blocks.1"]
    }
    joint = ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"]
    model = pipe(build(flux))
    assert blocks_of(model, flux) == {"transformer": joint}
    assert blocks_of(model, flux, stream="text") == {"transformer": joint}
    assert blocks_of(model, flux, side="input") == {"transformer": joint}


@pytest.mark.slow
def test_blocks_of_odd_pipelines():
    pipe = HookedDiffusionModel.from_pipeline
    # the text has blocks of its own, which come first
    model = pipe(build(kandinsky5))
    blocks = ["visual_transformer_blocks.0", "visual_transformer_blocks.1"]
    assert blocks_of(model, kandinsky5) == {"transformer": blocks}
    refined = ["noise_refiner.0", "layers.0", "layers.1", "all_final_layer.2-1"]
    assert blocks_of(pipe(build(zimage)), zimage) == {"transformer": refined}
    # the embeddings are Sequentials, and no image runs through them
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    assert blocks_of(pipe(build(stable_audio)), stable_audio) == {"transformer": blocks}
    # only the text encoder's projection holds text, and that is no block
    assert blocks_of(pipe(build(pixart)), pixart, stream="text") == {}
    # the last block drops the text
    sd3_model = pipe(build(sd3))
    assert blocks_of(sd3_model, sd3, stream="text") == {"transformer": ["transformer_blocks.0"]}
    # two denoisers take turns
    assert blocks_of(pipe(build(wan22)), wan22) == {
        name: [f"{name}.blocks.0", f"{name}.blocks.1"] for name in ("transformer", "transformer_2")
    }
    # a ControlNet has the same blocks, and the scheduler gets nothing of it
    model = pipe(build(controlnet))
    assert list(blocks_of(model, controlnet)) == ["unet"]
    layouts, _ = model.layouts("controlnet.mid_block", **generate_options(2, controlnet))
    assert "does not reach the scheduler" in layouts["controlnet.mid_block"].reason


# ------------------------------------------------------------------------------- suggestions


def refusal(pattern, module):
    with pytest.raises(UsageError) as error:
        match_names(pattern, find_modules({"transformer": module}))
    return str(error.value)


def test_suggestions_name_blocks_and_patterns():
    transformer, unet = build(sd3).transformer, build(sd15).unet
    message = refusal("up_blocks.1.attentions.1", transformer)
    assert message == (
        "no module is named 'up_blocks.1.attentions.1'; the nearest names are "
        "transformer_blocks.0, transformer_blocks.1"
    )
    assert "up_blocks.0.attentions.1" in refusal("up_blocks.1.attentions.1", unet)
    # a part of a block is suggested where it is nearly right
    message = refusal("transformer_blocks.0.attn.to_k1", transformer)
    assert "transformer_blocks.0.attn.to_k" in message

    # what a module is called inside its parents, and the name of a container
    message = refusal("attn2", unet)
    assert "the pattern '**.attn2' matches 4 modules, such as " in message
    assert len(match_names("**.attn2", find_modules({"unet": unet}))) == 4
    assert "the pattern '**.attentions.0' matches 3 modules" in refusal("attentions.0", unet)
    message = refusal("transformer_blocks", transformer)
    assert "the pattern 'transformer_blocks.*' matches 2 modules" in message

    # patterns
    message = refusal("*.attn2", unet)
    assert "'**.attn2' matches 4 modules" in message and "collect.py --list_hooks" in message
    assert "'**.attn.to_?' matches 6 modules" in refusal("attn.to_?", transformer)
    message = refusal("**.attentions.*", transformer)
    assert "this model has transformer_blocks." in message and "hook_names()" not in message


def test_groups_by_hand():
    modules = find_modules({"model": InOrder()})
    items = ["last.0", *(f"blocks.{i}" for i in range(5))]  # as they are defined
    embedding = ["time.layers.2"]
    parts = [["time", "out"], ["time.layers"]]
    assert block_groups(modules, "model") == [[], items, embedding, *parts, list(modules)]
    assert block_groups(modules, "unet") == [[], []]


# -------------------------------------------------------------------------- from the command line


@pytest.fixture
def saved(tmp_path):
    def save(recipe, *texts):
        folder = tmp_path / recipe.__name__
        build(recipe).save_pretrained(folder)
        (folder / "prompts.csv").write_text("\n".join(["prompt", *(texts or PROMPTS)]))
        own = {name: value for name, value in recipe.options.items() if not callable(value)}
        size = {name: own.pop(name) for name in ("height", "width")}
        return size | {
            "model_name": str(folder),
            "num_inference_steps": 2,
            "max_num_examples": 2,
            "device": "cpu",
            "out_dir": str(tmp_path / f"{recipe.__name__}_out"),
            "pipeline_kwargs": json.dumps(own),
        }

    return save


def test_what_is_collected_of_a_transformer(saved, capsys):
    options = saved(flux)
    [file] = collect.main(collect.Config(**options))
    assert file.name == "transformer_blocks.1.npy"
    line = capsys.readouterr().out.splitlines()[0]
    assert line == (
        "note: this model has no up_blocks.1.attentions.1, so the block at two thirds of the depth "
        "is stored: transformer_blocks.1 (number 2 of 3); choose others with --hook_names "
        "(--list_hooks shows all)"
    )

    collect.main(collect.Config(**options, list_hooks=True))
    printed = capsys.readouterr().out
    [marked] = [line for line in printed.splitlines() if line.endswith("  default")]
    assert marked.split()[0] == "transformer_blocks.1" and line in printed

    options["out_dir"] += "_text"
    [file] = collect.main(collect.Config(**options, stream="text"))
    assert file.name == "transformer_blocks.1.text.npy"


def test_a_stream_that_no_block_has_is_said(saved):
    options = saved(pixart)
    with pytest.raises(UsageError, match="no block of this model has text tokens in its output"):
        collect.main(collect.Config(**options, stream="text"))
    assert not Path(options["out_dir"]).exists()


def test_what_is_ablated_of_a_transformer(saved, capsys):
    options = saved(pixart)
    ablate.main(ablate.Config(**options))
    report = json.loads((Path(options["out_dir"]) / "ablate.json").read_text())
    names = ["transformer_blocks.0", "transformer_blocks.1"]
    assert sorted(hook["hook_name"] for hook in report["hooks"]) == names
    assert report["options"]["hook_names"] == names
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("note: no module of this model matches '**.attentions.*', so its 2 ")


@pytest.mark.slow
def test_of_several_denoisers_one_block_each(saved, capsys):
    options = saved(wan22)
    files = collect.main(collect.Config(**options | {"num_inference_steps": 4}))
    names = ["transformer.blocks.1.npy", "transformer_2.blocks.1.npy"]
    assert [file.name for file in files] == names
    line = capsys.readouterr().out.splitlines()[0]
    assert "at two thirds of the depth of each denoiser is stored: transformer.blocks.1" in line
