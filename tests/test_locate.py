"""Which tokens are the image's, where text or a reference image lies beside them."""

import diffusers
import pytest
import torch
from families import flux_parts
from hooks_by_hand import watch_by_hand
from spies import note_calls
from tiny import build, called_with, generate_options, t5_encoder, t5_tokenizer

from diffusion import locate
from hook import Edit, HookedDiffusionModel

pytestmark = pytest.mark.slow


class JointBlock(torch.nn.Module):
    def __init__(self, mixing):
        super().__init__()
        self.mixing = mixing
        self.norm = torch.nn.LayerNorm(24, elementwise_affine=False)
        self.qkv = torch.nn.Linear(24, 72)

    def forward(self, x, modulation):
        q, k, v = self.qkv(self.norm(x) * (1 + modulation)).chunk(3, -1)
        if self.mixing == "linear":
            q, k = q.exp(), k.exp()
            return x + q @ (k.mT @ v) / (q @ k.sum(1, keepdim=True).mT)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q[:, None], k[:, None], v[:, None]
        )
        return x + attended[:, 0]


class JointModel(torch.nn.Module):
    """5 text tokens, then 16 of the image, in blocks that mix them by attention or otherwise."""

    def __init__(self, mixing, mean_of=None):
        super().__init__()
        self.mean_of = mean_of
        self.embed = torch.nn.Conv2d(4, 24, 2, 2)
        self.blocks = torch.nn.ModuleList([JointBlock(kind) for kind in mixing])
        self.out = torch.nn.Linear(24, 16)

    def forward(self, sample, timestep, text):
        image = self.embed(sample).flatten(2).mT
        modulation = 0 * image[:, :1] + timestep / 1000
        if self.mean_of is not None:
            modulation = modulation + {"image": image, "text": text}[self.mean_of].mean(1, True)
        tokens = torch.cat([text, image], 1)
        for block in self.blocks:
            tokens = block(tokens, modulation)
        patches = self.out(tokens[:, 5:]).view(-1, 4, 4, 4, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(sample.shape)


def joint(mixing, mean_of=None):
    torch.manual_seed(0)
    text = torch.randn(2, 5, 24)
    return HookedDiffusionModel(
        JointModel(mixing, mean_of).eval(),
        diffusers.DDIMScheduler(),
        lambda *_: (text, 0 * text),
        sample_shape=(4, 8, 8),
    )


@pytest.mark.parametrize(
    "mixing, mean_of, refused",
    [
        (["attention"] * 3, None, []),
        (["attention"] * 3, "text", []),
        (["attention"] * 3, "image", [0, 1, 2]),
        (["attention", "linear", "attention"], None, [1, 2]),
        (["linear"] * 2, None, [0, 1]),
        (["linear", "attention", "linear"], None, [0, 1, 2]),
    ],
)
def test_text_that_meets_the_image_outside_of_attention_is_not_taken_for_it(
    mixing, mean_of, refused
):
    hooked = joint(mixing, mean_of)
    for i in range(len(mixing)):
        seen = []
        handle = hooked.pipe.model.blocks[i].register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output[-2:, 5:].clone())
        )
        options = dict(num_inference_steps=2)
        if i in refused:
            with pytest.raises(
                ValueError, match="can't be told apart: .* there are 21, on no grid"
            ):
                hooked.run_with_cache(f"blocks.{i}", ["a", "b"], **options)
        else:
            _, cache = hooked.run_with_cache(f"blocks.{i}", ["a", "b"], **options)
            assert cache["grid"][f"blocks.{i}"] == (4, 4)
            assert torch.equal(cache["output"][f"blocks.{i}"], torch.stack(seen[-2:], 1))
        handle.remove()


class WaveWithText(torch.nn.Module):
    """A wave has no grid, so only its length tells which tokens are its own."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(4, 8)
        self.coarse = torch.nn.Conv1d(8, 8, 3, stride=2, padding=1)
        self.out = torch.nn.Linear(8, 4)

    def forward(self, sample, timestep, text):
        x = self.embed(sample.mT) + text.mean(1, keepdim=True) + timestep / 1000
        x = x + self.coarse(x.mT).repeat_interleave(2, -1).mT
        return self.out(x).mT


def test_tokens_of_a_wave_may_change_with_the_text():
    torch.manual_seed(0)
    text = torch.randn(2, 5, 8)
    hooked = HookedDiffusionModel(
        WaveWithText(), diffusers.DDIMScheduler(), lambda *_: (text, 0 * text), sample_shape=(4, 40)
    )
    options = dict(num_inference_steps=2)
    _, cache = hooked.run_with_cache(["embed", "coarse", "out"], ["a", "b"], **options)
    assert cache["grid"] == {"embed": (40,), "coarse": (20,), "out": (40,)}


@called_with(height=32, width=32, num_frames=9)
def cosmos():
    """c then u, and the scheduler steps both, unconditional first."""
    size = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
    )
    size |= dict(
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
    )
    size |= dict(concat_padding_mask=True, extra_pos_embed_type="learnable")
    vae = diffusers.AutoencoderKLCosmos(
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        attention_resolutions=(8,),
        resolution=32,
        num_layers=1,
        patch_size=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )

    class Guard:
        def check_text_safety(self, prompt):
            return True

        def check_video_safety(self, video):
            return video

        def to(self, *args):
            return self

    return diffusers.CosmosTextToWorldPipeline(
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=diffusers.CosmosTransformer3DModel(**size),
        vae=vae,
        scheduler=diffusers.EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=80,
            sigma_data=0.5,
            sigma_schedule="karras",
            num_train_timesteps=1000,
            prediction_type="epsilon",
            rho=7.0,
            final_sigmas_type="sigma_min",
        ),
        safety_checker=Guard(),
    )


class Resizing:
    """Takes the place of torchvision, which the tests do without."""

    class functional:  # noqa: N801  its name there
        @staticmethod
        def resize(x, size, interpolation=None):
            return torch.nn.functional.interpolate(x, size)

    class InterpolationMode:
        NEAREST = None


@pytest.mark.parametrize("n", [1, 2])
def test_cosmos(n, monkeypatch):
    """The tokens of a video are those that a hook by hand sees, and an edit of them moves the
    frames."""
    from diffusers.models.transformers import transformer_cosmos

    monkeypatch.setattr(transformer_cosmos, "transforms", Resizing, raising=False)
    pipe = build(cosmos)
    name = "transformer_blocks.0"
    options = generate_options(n, cosmos)
    prompt = options.pop("prompt")
    _, cache = HookedDiffusionModel.from_pipeline(pipe).run_with_cache(
        name, prompt, rows="both", **options
    )
    again = generate_options(n, cosmos)
    seen = watch_by_hand(pipe, "transformer", name, again.pop("prompt"), again)
    assert torch.equal(cache["output"][name], torch.stack(seen[::2], 1))
    assert torch.equal(cache["output_uncond"][name], torch.stack(seen[1::2], 1))
    plain = HookedDiffusionModel.from_pipeline(pipe)

    def sampled(edits):
        return plain.run_with_hooks(edits, **generate_options(n, cosmos)).frames

    identity, edited = (
        sampled({name: Edit(fn, rows="cond")}) for fn in (lambda x: x.clone(), torch.zeros_like)
    )
    assert torch.equal(identity, sampled({}))
    assert not torch.equal(edited, identity)


def picture(width, height):
    from PIL import Image

    return Image.linear_gradient("L").convert("RGB").resize((width, height))


@called_with(
    image=lambda n: picture(32, 24),
    height=12,
    width=16,
    max_sequence_length=32,
    _auto_resize=False,
    max_area=12 * 16,
)
def kontext():
    """c alone, with an embedded guidance scale; 12 tokens of the sample, then those of the
    picture."""
    return diffusers.FluxKontextPipeline(**flux_parts())


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["transformer_blocks.0", "single_transformer_blocks.0"])
def test_tokens_of_a_reference_image_are_not_the_images(name, steps):
    pipe = build(kontext)
    options = generate_options(1, kontext, num_inference_steps=steps)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    prompt = options.pop("prompt")
    _, cache = hooked.run_with_cache(name, prompt, **options)
    again = generate_options(1, kontext, num_inference_steps=steps)
    seen = watch_by_hand(
        pipe, "transformer", name, again.pop("prompt"), again, pick=lambda output: output[1]
    )
    assert seen[0].shape[1] > 12
    assert cache["grid"][name] == (3, 4)
    assert torch.equal(cache["output"][name], torch.stack([x[:, :12] for x in seen], 1))
    options = generate_options(1, kontext, num_inference_steps=steps)
    layouts, _ = hooked.layouts(name, **options)
    assert layouts[name].grid == (3, 4)
    shapes = set()
    edit = Edit(lambda x: shapes.add(tuple(x.shape)))
    hooked.run_with_hooks({name: edit}, **options)
    assert shapes == {(1, 12, 32)}


def test_tokens_are_looked_for_once_whatever_the_options(monkeypatch):
    """What of the denoiser's input is sampled is seen again with other options, and is the same."""
    trials = note_calls(monkeypatch, locate, "run_trials", lambda *args: None)
    hooked = HookedDiffusionModel.from_pipeline(build(kontext))
    name = "transformer_blocks.0"
    for steps in (2, 3, 4):
        options = generate_options(1, kontext, num_inference_steps=steps)
        _, cache = hooked.run_with_cache(name, options.pop("prompt"), **options)
        assert cache["grid"][name] == (3, 4)
    assert len(trials) == 1


def test_tokens_of_a_reference_image_in_ones_own_loop_are_refused():
    pipe = build(kontext)
    name = "transformer_blocks.0"
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    with pytest.raises(ValueError, match=r"on the grid \(36,\)|on the grid"), hooked.cache(name, 1):
        pipe(**generate_options(1, kontext))
