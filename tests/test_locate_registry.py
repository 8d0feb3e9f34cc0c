"""Where image and text tokens are found in what a block returns, against what diffusers says.

diffusers lists for some block classes which of the returned tensors is the image and which the text
(`TransformerBlockRegistry` of diffusers/hooks/_helpers.py). The product does not use that list:
`diffusion/locate.py` finds out by running the denoiser. All of the classes are compared, in tiny
pipelines or in tiny denoisers that are called in a loop, with these exceptions:

- Cosmos3VLTextMoTDecoderLayer can't be built tiny here: its denoiser takes packed sequences of a
  language model, with positions that only its pipeline makes, and that needs the tokenizer and the
  processor of that language model.

diffusers is wrong about BriaTransformerBlock: it lists the image first and no text, and the block
returns `encoder_hidden_states, hidden_states` (version 0.42). The test knows what it returns.

A class may hold both streams in one tensor, or text in some of its places only. Then the list names
no text, and nothing is compared for it.
"""

import diffusers
import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from families import RECIPES, flux, kandinsky5, qwenimage, sd3
from tiny import build, generate_options, sd15

from diffusion.locate import find_layouts
from diffusion.token_layout import Layout
from hook import HookedDiffusionModel

PIPELINES = [sd15, *RECIPES, kandinsky5]
NOT_BUILT = {"Cosmos3VLTextMoTDecoderLayer"}
LISTED_WRONGLY = {"BriaTransformerBlock": (1, 0)}  # {class: the true indices of image and text}
ROWS = 2


def registered():
    """{class of a block: what diffusers says of it}; asking for an unknown class fills the list."""
    with pytest.raises(ValueError):
        TransformerBlockRegistry.get(torch.nn.Linear)
    return TransformerBlockRegistry._registry


REGISTERED = registered()


def ids(height, width, axes):
    """Positions of the tokens of an image, (tokens, axes): the last two axes are row and column."""
    positions = torch.zeros(height, width, axes)
    positions[..., axes - 2] = torch.arange(height)[:, None]
    positions[..., axes - 1] = torch.arange(width)
    return positions.flatten(0, 1)


def text(length, d):
    return torch.randn(ROWS, length, d)


def mask(length):
    return torch.ones(ROWS, length, dtype=torch.long)


HEADS = dict(num_attention_heads=2, attention_head_dim=16)
VIDEO = dict(num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=12)


def bria():
    model = diffusers.BriaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=12,
        axes_dims_rope=[4, 4, 8],
        **HEADS,
    )
    arguments = dict(encoder_hidden_states=text(5, 12), img_ids=ids(3, 4, 3))
    return model, torch.randn(ROWS, 12, 4), arguments | dict(txt_ids=torch.zeros(5, 3))


def flux2():
    model = diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        **HEADS,
    )
    arguments = dict(encoder_hidden_states=text(5, 12), img_ids=ids(3, 4, 4))
    return model, torch.randn(ROWS, 12, 4), arguments | dict(txt_ids=torch.zeros(5, 4))


def cogview4():
    model = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
        **HEADS,
    )
    size = torch.full((ROWS, 2), 64.0)
    arguments = dict(original_size=size, target_size=size, crop_coords=torch.zeros(ROWS, 2))
    return model, torch.randn(ROWS, 4, 6, 8), arguments | dict(encoder_hidden_states=text(5, 12))


def hunyuan_token_replace():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        pooled_projection_dim=8,
        guidance_embeds=False,
        rope_axes_dim=(4, 4, 8),
        image_condition_type="token_replace",
        **VIDEO,
        **HEADS,
    )
    arguments = dict(encoder_hidden_states=text(5, 12), encoder_attention_mask=mask(5))
    arguments |= dict(pooled_projections=torch.randn(ROWS, 8))
    return model, torch.randn(ROWS, 4, 2, 6, 8), arguments


def hunyuan_image():
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, rope_axes_dim=(8, 8), **VIDEO, **HEADS
    )
    arguments = dict(encoder_hidden_states=text(5, 12), encoder_attention_mask=mask(5))
    return model, torch.randn(ROWS, 4, 3, 4), arguments


def mochi():
    model = diffusers.MochiTransformer3DModel(
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=5,
        **HEADS,
    )
    arguments = dict(encoder_hidden_states=text(5, 16), encoder_attention_mask=mask(5).bool())
    return model, torch.randn(ROWS, 4, 2, 6, 8), arguments


def motif():
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=12,
        rope_axes_dim=(4, 4, 8),
        **HEADS,
    )
    arguments = dict(encoder_hidden_states=text(5, 12), encoder_attention_mask=mask(5))
    return model, torch.randn(ROWS, 4, 2, 6, 8), arguments


DENOISERS = [bria, flux2, cogview4, hunyuan_token_replace, hunyuan_image, mochi, motif]


class Scheduler:
    def step(self, model_output, timestep, sample):
        return (sample - 0.1 * model_output,)


def blocks_in(model):
    """{hook_name: module} of the blocks whose classes diffusers lists."""
    return {name: m for name, (_, m) in model.modules().items() if type(m) in REGISTERED}


def layouts_of_pipeline(recipe):
    """{(hook_name, stream): layout}, and the blocks."""
    model = HookedDiffusionModel.from_pipeline(build(recipe))
    blocks = blocks_in(model)
    found = {}
    for stream in ("image", "text") if blocks else ():
        options = generate_options(2, recipe)
        layouts, _ = model.layouts(list(blocks), stream=stream, **options)
        found |= {(name, stream): layout for name, layout in layouts.items()}
    return found, blocks


def layouts_of_denoiser(recipe):
    torch.manual_seed(0)
    denoiser, sample, arguments = recipe()
    for p in denoiser.parameters():
        if p.ndim > 1 and not p.any():
            p.data.normal_(0, 0.05)
    scheduler = Scheduler()
    model = HookedDiffusionModel(denoiser.eval(), scheduler)
    blocks = blocks_in(model)
    wanted = {}
    for name, block in blocks.items():
        for stream in ("image", "text"):
            wanted["output", name, stream] = ("model", block)
    found = {}

    def on_forward(forward, module):
        find_layouts(forward, module, wanted, {})
        for (_, name, stream), layout in forward.layouts.items():
            found[name, stream] = layout

    timestep = torch.full((ROWS,), 500.0)
    with torch.no_grad(), model.watch(ROWS, on_forward=on_forward):
        arguments |= dict(hidden_states=sample, timestep=timestep, return_dict=False)
        scheduler.step(denoiser(**arguments)[0], 500, sample)
    return found, blocks


def check(found, blocks):
    """Compare the indices; return the names of the classes that were compared."""
    compared = set()
    for name, block in blocks.items():
        listed = REGISTERED[type(block)]
        indices = (listed.return_hidden_states_index, listed.return_encoder_hidden_states_index)
        expected, expected_text = LISTED_WRONGLY.get(type(block).__name__, indices)
        image, text_tokens = found[name, "image"], found[name, "text"]
        if not isinstance(image, Layout):
            # blocks of one class may refine the text before it meets the image
            assert isinstance(text_tokens, Layout), (name, image)
            continue
        is_last_of_joint = expected_text is not None and not isinstance(text_tokens, Layout)
        if is_last_of_joint:  # it returns None in the place of the text, which is no tensor
            assert "only image tokens" in text_tokens.reason
            expected = 0
        assert image.index == expected, name
        if isinstance(text_tokens, Layout) and expected_text is not None:
            assert text_tokens.index == expected_text, name
        if not is_last_of_joint:
            compared.add(type(block).__name__)
    return compared


@pytest.mark.parametrize("recipe", [sd15, sd3, flux, qwenimage], ids=lambda f: f.__name__)
def test_pipelines(recipe):
    assert check(*layouts_of_pipeline(recipe))


@pytest.mark.parametrize("recipe", DENOISERS, ids=lambda f: f.__name__)
def test_denoisers(recipe):
    assert check(*layouts_of_denoiser(recipe))


@pytest.mark.slow
def test_every_class_is_compared():
    compared = set()
    for recipe in PIPELINES:
        compared |= check(*layouts_of_pipeline(recipe))
    for recipe in DENOISERS:
        compared |= check(*layouts_of_denoiser(recipe))
    assert compared | NOT_BUILT == {block.__name__ for block in REGISTERED}
