"""Which axis is the width, and which tokens are whose, in modules of every kind."""

import pytest
import torch
from families import EXTRAS, RECIPES
from test_families import shared
from test_hook import Euler
from torch import nn

from hook import HookedDiffusionModel, NotHookable


def width_of(module):
    """The width that a layer's own settings say; None for modules of other kinds."""
    if type(module) is nn.Linear:
        return module.out_features
    if type(module) is nn.GroupNorm:
        return module.num_channels
    if type(module) is nn.LayerNorm:
        return module.normalized_shape[-1]
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    return None


LARGE = [
    "animatediff", "audioldm2", "controlnet", "hunyuanvideo", "instruct_pix2pix", "kandinsky22", "lumina2", "pag",
    "qwenimage", "sdxl", "stable_audio", "svd", "wan22", "zimage",
]  # fmt: skip
"""Recipes with many layers, each of which takes 0.5 to 3 s here."""


def recipes():
    """All recipes; the large ones are slow."""
    for recipe in [*RECIPES, *EXTRAS]:
        marks = [pytest.mark.slow] if recipe.__name__ in LARGE else []
        yield pytest.param(recipe, marks=marks)


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.__name__)
def test_the_width_of_each_layer_is_its_own(recipe):
    """d of a layer's output is what the layer itself says: channels of a convolution, features of a
    linear layer."""
    case = shared(recipe)
    checked = 0
    prompt, options = case.arguments(2)
    layouts, _ = case.hooked.layouts("**", prompt, **options)
    modules = case.hooked.modules()
    for name, layout in layouts.items():
        width = width_of(modules[name][1])
        if width is None or isinstance(layout, NotHookable) or layout.form.startswith("heads"):
            continue
        assert layout.d == width, (name, layout)
        checked += 1
    assert checked > 5


class Wave(nn.Module):
    """Channels first, over 40 samples of a wave."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 16, 3, padding=1)
        self.act = nn.SiLU()
        self.out = nn.Conv1d(16, 3, 3, padding=1)

    def forward(self, x, t):
        return self.out(self.act(self.conv(x)) + t / 10)


class Last(nn.Module):
    """Channels last, over 6 x 8 places."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Linear(3, 16)
        self.act = nn.SiLU()
        self.out = nn.Linear(16, 3)

    def forward(self, x, t):
        return self.out(self.act(self.conv(x.movedim(1, -1))) + t / 10).movedim(-1, 1)


@pytest.mark.parametrize("model, size, grid", [(Wave, (3, 40), (40,)), (Last, (3, 6, 8), (6, 8))])
def test_channels_first_and_last(model, size, grid):
    torch.manual_seed(0)
    model, x, seen = model(), torch.randn(2, *size), {}
    for name in ("conv", "act"):
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: seen.__setitem__(name, o)
        )
    with (
        torch.no_grad(),
        HookedDiffusionModel(model, Euler()).cache(["conv", "act"], 2, save_input=True) as cache,
    ):
        Euler().step(model(x, 1.0), 1.0, x)
    for name, output in seen.items():
        by_hand = (
            output.flatten(2).transpose(1, 2) if isinstance(model, Wave) else output.flatten(1, 2)
        )
        assert cache["grid"][name] == grid
        assert torch.equal(cache["output"][name][:, 0], by_hand)
    assert torch.equal(cache["input"]["act"], cache["output"]["conv"])
    assert torch.equal(cache["input"]["conv"][:, 0], x.flatten(2).transpose(1, 2))


class Pooled(nn.Module):
    """Text is pooled by an attention whose output has another width than its query."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Conv2d(3, 3, 1)
        self.pool.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 3)

    def forward(self, x, t, text):
        w = self.pool
        q = text.mean(1, keepdim=True).transpose(0, 1)
        k = text.transpose(0, 1)
        pooled, _ = nn.functional.multi_head_attention_forward(
            q, k, k, 8, 2, w.in_proj_weight, w.in_proj_bias, None, None, False, 0.0, w.out_proj.weight, w.out_proj.bias,
            training=False, need_weights=False,
        )  # fmt: skip
        return self.out(x + pooled[0][:, :, None, None]) * (1 + t / 10)


def test_attention_that_pools_to_another_width():
    torch.manual_seed(0)
    model = Pooled()
    x = torch.randn(2, 3, 4, 5)
    with torch.no_grad(), HookedDiffusionModel(model, Euler()).cache("out", 2) as cache:
        Euler().step(model(x, 1.0, torch.randn(2, 6, 8)), 1.0, x)
    assert cache["grid"]["out"] == (4, 5)


class Packed(nn.Module):
    """Valid text, then the image, then padding: where the image is depends on the mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.block = nn.Identity()
        self.out = nn.Linear(8, 3)

    def forward(self, x, t, text, mask):
        image = self.embed(x.flatten(2).transpose(1, 2)) + t / 10
        rows = []
        for row, tokens, is_valid in zip(image, text, mask.bool()):
            rows.append(torch.cat([tokens[is_valid], row, 0 * tokens[~is_valid]]))
        tokens = self.block(nn.functional.scaled_dot_product_attention(*[torch.stack(rows)] * 3))
        starts = mask.sum(1).int().tolist()
        image = torch.stack([row[s : s + 20] for row, s in zip(tokens, starts)])
        return self.out(image).transpose(1, 2).unflatten(2, (4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_any_dtype_moves_the_image(dtype):
    torch.manual_seed(0)
    model = Packed().to(dtype)
    x = torch.randn(2, 3, 4, 5).to(dtype)
    seen = []
    model.block.register_forward_hook(lambda module, input, output: seen.append(output.clone()))
    hooked = HookedDiffusionModel(model, Euler())
    text = torch.randn(2, 6, 8).to(dtype)
    for lengths in ((5, 4), (2, 3)):
        mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).to(dtype)
        with torch.no_grad(), hooked.cache("block", 2) as cache:
            Euler().step(model(x, 1.0, text, mask), 1.0, x)
        by_hand = torch.stack([row[n : n + 20] for row, n in zip(seen[-1], lengths)])
        assert torch.equal(cache["output"]["block"][:, 0], by_hand)
