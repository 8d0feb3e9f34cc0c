"""Rows and tokens are told by what depends on what, not by one step: each test is a way in which a
guess was silently wrong."""

import functools

import diffusers
import pytest
import torch
from families import flux_parts, sd15_parts
from test_hook import HOOK, Denoiser, Euler
from tiny import (
    PROMPTS,
    build,
    called_with,
    generate_options,
    sd15,
    t5_encoder,
    t5_tokenizer,
)

from diffusion import locate
from hook import Edit, HookedDiffusionModel

pytestmark = pytest.mark.slow


def map_tokens(x):
    """(rows, d, H, W) -> (rows, tokens, d)."""
    return x.flatten(2).transpose(1, 2)


def watch_by_hand(pipe, denoiser, hook_name, prompt, options, pick=lambda output: output):
    """What the module returns in each forward, from a hook as anybody would write it."""
    seen = []
    handle = (
        getattr(pipe, denoiser)
        .get_submodule(hook_name)
        .register_forward_hook(lambda m, i, o: seen.append(pick(o).clone()))
    )
    try:
        pipe(prompt=prompt, **options)
    finally:
        handle.remove()
    return seen


# ------------------------------------------------------------------------------------------------- guidance that begins late


class Ramp(diffusers.StableDiffusionPipeline):
    """Guidance grows with the steps; `scales` are those of the first ones."""

    scales = (0.0, 2.0, 5.0)

    @property
    def guidance_scale(self):
        index = getattr(self.scheduler, "index", 0)
        return self.scales[min(index, len(self.scales) - 1)]


class Counting(diffusers.DDIMScheduler):
    def set_timesteps(self, *args, **kwargs):
        self.index = 0
        return super().set_timesteps(*args, **kwargs)

    def step(self, *args, **kwargs):
        self.index += 1
        return super().step(*args, **kwargs)


class ZeroFirst(Counting):
    """As CFG-Zero* does: nothing of the prediction is used in the first step."""

    def step(self, model_output, *args, **kwargs):
        return super().step(model_output * (self.index > 0), *args, **kwargs)


@called_with(height=32, width=32)
def ramp(scheduler=Counting):
    scheduler = scheduler(clip_sample=False, steps_offset=1)
    parts = sd15_parts() | dict(scheduler=scheduler, safety_checker=None)
    return Ramp(**parts, requires_safety_checker=False)


def ramped(scales, scheduler=Counting):
    pipe = build(ramp, scheduler=scheduler)
    pipe.scales = scales
    return pipe


SCALES = {
    "from 0": (0.0, 2.0, 5.0),
    "always 0": (0.0,),
    "weak": (0.3,),
    "one": (1.0,),
    "negative": (-2.0,),
    "as ever": (5.0,),
}


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize(
    "prompts",
    [PROMPTS[:1], PROMPTS[:1] * 2, PROMPTS[:2], [""]],
    ids=["one", "the same", "two", "empty"],
)
@pytest.mark.parametrize("negative", [False, True], ids=["", "negatives"])
def test_conditional_rows_whatever_the_guidance_does(scales, prompts, negative):
    """u, c in one batch, in every step."""
    pipe, n = ramped(scales), len(prompts)
    more = {"negative_prompt": ["ugly", "blurry"][:n]} if negative else {}
    options, again = (generate_options(n, num_inference_steps=3, **more) for _ in range(2))
    _, cache = HookedDiffusionModel.from_pipeline(pipe).run_with_cache(
        HOOK, prompts, rows="both", **options
    )
    seen = watch_by_hand(pipe, "unet", HOOK, prompts, again, pick=lambda output: output[0])
    by_hand = torch.stack([map_tokens(x) for x in seen], 1)
    assert torch.equal(cache["output_uncond"][HOOK], by_hand[:n])
    assert torch.equal(cache["output"][HOOK], by_hand[n:])


def test_a_first_step_without_guidance_or_prediction():
    pipe = ramped((0.0, 3.0), ZeroFirst)
    options = generate_options(1, num_inference_steps=3)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    _, cache = hooked.run_with_cache(HOOK, PROMPTS[:1], **options)
    seen = watch_by_hand(
        pipe,
        "unet",
        HOOK,
        PROMPTS[:1],
        generate_options(1, num_inference_steps=3),
        pick=lambda o: o[0],
    )
    assert torch.equal(cache["output"][HOOK][0], torch.stack([map_tokens(x)[1] for x in seen]))


@pytest.mark.parametrize("rows, changed", [("cond", 1), ("uncond", 0)])
@pytest.mark.parametrize("scheduler", [Counting, ZeroFirst])
def test_an_edit_meets_its_rows_when_guidance_begins_late(rows, changed, scheduler):
    pipe, before, after = ramped((0.0, 3.0), scheduler), [], []
    hooked, options = HookedDiffusionModel.from_pipeline(pipe), generate_options(1)
    module = pipe.unet.get_submodule(HOOK)
    handles = [module.register_forward_hook(lambda m, i, o: before.append(o[0].clone()))]
    edits = {HOOK: Edit(lambda x: x + 1, rows=rows)}
    follow = pipe.unet.get_submodule("up_blocks.1.resnets.0").register_forward_pre_hook(
        lambda m, i: after.append(i[0].clone())
    )
    hooked.run_with_hooks(edits, PROMPTS[:1], **options)
    edited = after[-2:]
    after.clear()
    hooked(PROMPTS[:1], **generate_options(1))
    for handle in (*handles, follow):
        handle.remove()
    differs = [(a != b).flatten(1).any(1).tolist() for a, b in zip(edited, after)]
    assert differs[0] == [row == changed for row in range(2)]


def by_prompt_embeddings(pipe, prompts):
    embeds, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    return dict(prompt_embeds=embeds, negative_prompt_embeds=negative)


def test_rows_where_prompts_are_given_as_embeddings():
    pipe = ramped((0.0, 3.0))
    options = generate_options(1) | by_prompt_embeddings(pipe, PROMPTS[:1])
    _, cache = HookedDiffusionModel.from_pipeline(pipe).run_with_cache(HOOK, **options)
    seen = watch_by_hand(
        pipe,
        "unet",
        HOOK,
        None,
        options | {"generator": generate_options(1)["generator"]},
        pick=lambda o: o[0],
    )
    assert torch.equal(cache["output"][HOOK][0], torch.stack([map_tokens(x)[1] for x in seen]))


# ---------------------------------------------------------------------------------- what is asked costs one denoiser step, once


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by one with every forward of a UNet."""
    found, forward = [], diffusers.UNet2DConditionModel.forward

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        found.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", counted)
    return found


def test_asking_costs_one_step_for_all_batches(calls):
    pipe = build(sd15)
    hooked, batches = (
        HookedDiffusionModel.from_pipeline(pipe),
        (PROMPTS[:2], PROMPTS[1:], PROMPTS[:1]),
    )
    for prompts in batches:
        hooked.layouts(
            HOOK, prompts, **generate_options(len(prompts))
        )  # so that layouts are known, and not looked for below
    counts = []
    for prompts in batches:
        calls.clear()
        hooked.run_with_cache(
            HOOK, prompts, **generate_options(len(prompts), num_inference_steps=3)
        )
        counts.append(len(calls))
    assert counts == [4, 3, 3]
    calls.clear()
    hooked.first_step(HOOK, PROMPTS[1:], **generate_options(2, num_inference_steps=4))
    hooked.run_with_cache(HOOK, PROMPTS[:2], **generate_options(2, num_inference_steps=4))
    assert len(calls) == 1 + 1 + 4  # as collect.py does
    for rows, expected in (("all", 1 + 1 + 5), ("all", 1 + 5), ("cond", 1 + 5)):
        calls.clear()
        hooked.run_with_hooks(
            {HOOK: Edit(lambda x: x, rows=rows)},
            PROMPTS[:1],
            **generate_options(1, num_inference_steps=5),
        )
        assert len(calls) == expected
    calls.clear()
    hooked.run_with_hooks(
        {HOOK: Edit(lambda x: x)}, PROMPTS[:1], **generate_options(1, num_inference_steps=3)
    )
    assert len(calls) == 4  # the plan's step, which is nothing new


@pytest.mark.parametrize("first", ["layouts", "an edit of all rows", "an edit that fails"])
def test_the_answer_is_not_lost(first):
    pipe = ramped((0.0,))
    hooked, name = HookedDiffusionModel.from_pipeline(pipe), {HOOK: Edit(lambda x: x, rows="all")}
    if first == "layouts":
        hooked.layouts(HOOK, PROMPTS[:1], **generate_options(1))
    elif first == "an edit of all rows":
        hooked.run_with_hooks(name, PROMPTS[:1], **generate_options(1))
    else:
        with pytest.raises(ValueError, match="must return"):
            hooked.run_with_hooks({HOOK: Edit(lambda x: x[:0])}, PROMPTS[:1], **generate_options(1))
    _, cache = hooked.run_with_cache(HOOK, PROMPTS[1:2], **generate_options(1))
    seen = watch_by_hand(
        pipe, "unet", HOOK, PROMPTS[1:2], generate_options(1), pick=lambda output: output[0]
    )
    assert torch.equal(cache["output"][HOOK][0], torch.stack([map_tokens(x)[1] for x in seen]))


def test_asking_leaves_no_trace(pipe):
    hooked, options = (
        HookedDiffusionModel.from_pipeline(pipe),
        generate_options(2) | {"generator": None},
    )
    torch.manual_seed(3)
    expected = hooked(PROMPTS[:2], **options).images
    torch.manual_seed(3)
    output, _ = hooked.run_with_cache(HOOK, PROMPTS[:2], **options)
    assert torch.equal(output.images, expected)


# ------------------------------------------------------------------------------------------------------------ loops of one's own


def own_loop(
    scales,
    order=None,
    swap_at=None,
    n=1,
    cond_rows="out",
    same_text=False,
    places="uc",
    null_until=0,
):
    """A guided loop of one's own, u, c: (rows that were kept, conditional ones by hand)."""
    torch.manual_seed(0)
    model, scheduler, seen = Denoiser(), Euler(), []
    text = {"u": torch.randn(n, 5), "c": torch.randn(n, 5)}
    if same_text:
        text["c"] = text["c"][:1].expand(n, 5)
    x = torch.randn(n, 3, 4, 5)
    with (
        torch.no_grad(),
        HookedDiffusionModel(model, scheduler).cache("out", n, order=order) as cache,
    ):
        for i, scale in enumerate(scales):
            names = places[::-1] if i == swap_at else places
            given = torch.cat([text["u" if i < null_until else name] for name in names])
            out = dict(zip(names, model(torch.cat([x, x]), 9.0 - i, given).chunk(2)))
            seen.append(map_tokens(out["c"]))
            x = scheduler.step(out["u"] + scale * (out["c"] - out["u"]), 9.0 - i, x)
    return cache["output"]["out"], torch.stack(seen, 1)


@pytest.mark.parametrize("scales", [(0.0, 0.0, 4.0, 4.0), (0.5, 1.0, 2.0), (4.0, 4.0), (4.0, 0.0)])
def test_later_steps_tell_what_the_first_does_not(scales):
    assert torch.equal(*own_loop(scales))


@pytest.mark.parametrize("scales", [(0.0, 0.0), (1.0,), (0.0, 0.5, 1.0)])
def test_a_loop_whose_guidance_never_tells_is_refused_unless_the_order_is_said(scales):
    with pytest.raises(ValueError, match=r'say order=\("uncond", "cond"\)'):
        own_loop(scales)
    assert torch.equal(*own_loop(scales, order=("uncond", "cond")))


@pytest.mark.parametrize(
    "scales, options",
    [((-3.0, 4.0), {}), ((0.0, 4.0), dict(n=2, same_text=True)), ((4.0, 4.0), dict(swap_at=1))],
)
def test_steps_that_disagree_are_refused(scales, options):
    """The second has one prompt with two negative ones: its unconditional rows vary, and the
    conditional ones do not."""
    with pytest.raises(ValueError, match="otherwise than an earlier step"):
        own_loop(scales, **options)


@pytest.mark.parametrize("places", ["uc", "cu"])
@pytest.mark.parametrize("n", [1, 2])
def test_passes_that_are_equal_in_some_steps_are_told_by_the_others(n, places):
    """Guidance in a limited interval: before it both passes have the unconditional text, and any
    label would do there."""
    kept, conditional = own_loop((5.0, 5.0, 5.0), n=n, places=places, null_until=1)
    assert torch.equal(kept, conditional)
    kept, conditional = own_loop((5.0, 5.0), n=n, places=places, null_until=2)  # in no step
    assert torch.allclose(kept, conditional, atol=1e-5)


def test_an_order_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="names 3 passes, and a step of this sampling has 2"):
        own_loop((4.0,), order=("cond", "other", "uncond"))
    with pytest.raises(ValueError, match="order: expected"):
        own_loop((4.0,), order="cond")


class Noise(torch.nn.Module):
    """Predicts the toy's noise. A loop of one's own may want it, whatever the toy predicts."""

    def __init__(self, pipe):
        super().__init__()
        self.unet = pipe.unet
        self.alphas = pipe.scheduler.alphas_cumprod

    def forward(self, sample, timestep, text):
        a = self.alphas[timestep]
        return a.sqrt() * self.unet(sample, timestep, text).sample + (1 - a).sqrt() * sample


@pytest.fixture(scope="module")
def toy():
    return HookedDiffusionModel.from_pretrained("toy").pipe


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@pytest.mark.parametrize("scale", [1.2, 3.0, 7.5, 12.0])
@pytest.mark.parametrize("predicts", ["sample", "clipped sample", "v_prediction"])
def test_a_loop_that_turns_the_guided_noise_into_something_else(toy, predicts, scale, num_steps):
    """The scheduler's input holds the sample too, which resembles the noise in it."""
    model = Noise(toy)
    scheduler = diffusers.DDIMScheduler.from_config(
        toy.scheduler.config, prediction_type=predicts.split()[-1], clip_sample=False
    )
    scheduler.set_timesteps(num_steps)
    prompts, empty = toy.encode_prompt(["a red star", "a blue ring"], "cpu", 1, True)[:2]
    name = "unet.up_blocks.1.attentions.1"
    seen = []
    model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(output[0])
    )
    x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    hooked = HookedDiffusionModel(model, scheduler)
    with torch.no_grad(), hooked.cache(name, 2, rows="both") as cache:
        for t in scheduler.timesteps:
            u, c = model(torch.cat([x, x]), t, torch.cat([empty, prompts])).chunk(2)
            noise = u + scale * (c - u)
            a = scheduler.alphas_cumprod[t].clamp_min(1e-5)
            if predicts == "v_prediction":
                prediction = (noise - (1 - a).sqrt() * x) / a.sqrt()
            else:
                prediction = (x - (1 - a).sqrt() * noise) / a.sqrt()
            if predicts == "clipped sample":
                prediction = prediction.clamp(-1, 1)
            x = scheduler.step(prediction, t, x).prev_sample
    assert torch.equal(cache["output"][name], torch.stack([map_tokens(o[2:]) for o in seen], 1))
    assert torch.equal(
        cache["output_uncond"][name], torch.stack([map_tokens(o[:2]) for o in seen], 1)
    )


def called_before(warm_up, scales=(4.0, 4.0)):
    """A guided loop after a call of the denoiser that belongs to no step."""
    torch.manual_seed(0)
    model, scheduler, seen = Denoiser(), Euler(), []
    texts = {"uncond": torch.randn(2, 5), "cond": torch.randn(2, 5)}
    x = torch.randn(2, 3, 4, 5)
    hooked = HookedDiffusionModel(model, scheduler)
    with torch.no_grad(), hooked.cache("out", 2, rows="both") as cache:
        warm_up(model, x, texts)
        for i, scale in enumerate(scales):
            out = model(torch.cat([x, x]), 9.0 - i, torch.cat([texts["uncond"], texts["cond"]]))
            seen.append(out)
            u, c = out.chunk(2)
            x = scheduler.step(u + scale * (c - u), 9.0 - i, x)
    for key, rows in (("output", slice(2, 4)), ("output_uncond", slice(0, 2))):
        expected = torch.stack([map_tokens(out[rows]) for out in seen], 1)
        assert torch.equal(cache[key]["out"], expected)


@pytest.mark.parametrize("text", ["cond", "uncond"])
def test_a_call_that_warms_the_denoiser_up_is_no_pass(text):
    called_before(lambda model, x, texts: model(x, 500.0, texts[text]))
    called_before(lambda model, x, texts: model(x + 1, 9.0, 2 * texts[text]))
    called_before(lambda model, x, texts: model(0 * x, 9.0, 0 * texts[text]))
    called_before(lambda model, x, texts: model(torch.randn(4, 3, 4, 5), 9.0, torch.randn(4, 5)))


def test_a_warm_up_that_repeats_a_pass_is_refused_by_what_is_true():
    """The model output may then be made of either call."""
    with pytest.raises(ValueError, match="was called on 2 and 4 rows, .* such as a warm-up"):
        called_before(lambda model, x, texts: model(x, 9.0, texts["cond"]))


def test_another_pipeline_may_sample_with_the_denoiser_between_two_steps():
    pipe = build(sd15)
    other = diffusers.StableDiffusionPipeline(
        **{**pipe.components, "scheduler": diffusers.EulerDiscreteScheduler()}
    )
    other.set_progress_bar_config(disable=True)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    expected = hooked.run_with_cache(HOOK, PROMPTS[:2], rows="both", **generate_options(2))[1]

    def sample(pipe, step, timestep, tensors):
        if step == 0:
            other(PROMPTS[1:3], **generate_options(2))
        return tensors

    hooked = HookedDiffusionModel.from_pipeline(pipe)
    with hooked.cache(HOOK, 2, rows="both") as cache:
        pipe(PROMPTS[:2], callback_on_step_end=sample, **generate_options(2))
    _, by_prompts = hooked.run_with_cache(
        HOOK, PROMPTS[:2], rows="both", callback_on_step_end=sample, **generate_options(2)
    )
    for recorded in (cache, by_prompts):
        for key in ("output", "output_uncond"):
            assert torch.equal(recorded[key][HOOK], expected[key][HOOK])


# ------------------------------------------------------------------------- text and image that meet outside of attention


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


# ----------------------------------------------------------------------------------------------------------------- Cosmos, FLUX


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
    from diffusers.models.transformers import transformer_cosmos

    monkeypatch.setattr(transformer_cosmos, "transforms", Resizing, raising=False)
    pipe, name = build(cosmos), "transformer_blocks.0"
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
    sampled = lambda edits: plain.run_with_hooks(edits, **generate_options(n, cosmos)).frames
    identity, edited = (
        sampled({name: Edit(fn, rows="cond")}) for fn in (lambda x: x.clone(), torch.zeros_like)
    )
    assert torch.equal(identity, sampled({})) and not torch.equal(edited, identity)


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
    hooked, prompt = HookedDiffusionModel.from_pipeline(pipe), options.pop("prompt")
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
    trials, run_trials = [], locate.run_trials
    monkeypatch.setattr(locate, "run_trials", lambda *args: trials.append(1) or run_trials(*args))
    hooked, name = HookedDiffusionModel.from_pipeline(build(kontext)), "transformer_blocks.0"
    for steps in (2, 3, 4):
        options = generate_options(1, kontext, num_inference_steps=steps)
        _, cache = hooked.run_with_cache(name, options.pop("prompt"), **options)
        assert cache["grid"][name] == (3, 4)
    assert len(trials) == 1


def test_tokens_of_a_reference_image_in_ones_own_loop_are_refused():
    pipe, name = build(kontext), "transformer_blocks.0"
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    with pytest.raises(ValueError, match=r"on the grid \(36,\)|on the grid"), hooked.cache(name, 1):
        pipe(**generate_options(1, kontext))


# ------------------------------------------------------------------------------------ caches, and forwards of an instance


def repeat_every_third(module, unet):
    """The module's `forward` is replaced by one that gives back in two of three calls what it
    kept."""
    forward, state = module.forward, {"calls": 0}

    def cached(*args, **kwargs):
        if state["calls"] % 3 == 0:
            state["kept"] = forward(*args, **kwargs)
        state["calls"] += 1
        return state["kept"]

    module.forward = cached


def repeat_by_timestep(module, unet):
    """As DeepCache does: in two of three steps; the denoiser's own `forward` is replaced to know
    which."""
    forward, of_denoiser, state, timesteps = module.forward, unet.forward, {}, []

    def watched(sample, timestep, *args, **kwargs):
        state["t"] = float(timestep)
        if state["t"] not in timesteps:
            timesteps.append(state["t"])
        return of_denoiser(sample, timestep, *args, **kwargs)

    def cached(*args, **kwargs):
        if timesteps.index(state["t"]) % 3 == 0:
            state["kept"] = forward(*args, **kwargs)
        return state["kept"]

    unet.forward, module.forward = watched, cached


class Skipping(torch.nn.Module):
    """A processor that keeps what its attention computed, as those of some caches do; no `forward`
    is replaced."""

    def __init__(self, processor):
        super().__init__()
        self.processor, self.calls = processor, 0

    def __call__(self, *args, **kwargs):
        if self.calls % 3 == 0:
            self.kept = self.processor(*args, **kwargs)
        self.calls += 1
        return self.kept


def skip_attention(attention, unet):
    attention.set_processor(Skipping(attention.processor))


SKIPPED = "was skipped in|did not run in"
ATTENTION = f"{HOOK}.transformer_blocks.0.attn1"
CACHES = {
    "the module itself": (HOOK, HOOK, repeat_every_third),
    "one around it": (HOOK, f"{HOOK}.proj_in", repeat_every_third),
    "one inside it": (ATTENTION, HOOK, repeat_every_third),
    "one before it": ("mid_block", HOOK, repeat_every_third),
    "one after it": ("up_blocks.1.resnets.1", HOOK, repeat_every_third),
    "a single layer": (f"{ATTENTION}.to_q", f"{ATTENTION}.to_q", repeat_every_third),
    "by its processor": (ATTENTION, ATTENTION, skip_attention),
    "by timestep": (HOOK, HOOK, repeat_by_timestep),
    "by timestep, inside": (HOOK, f"{HOOK}.proj_in", repeat_by_timestep),
    "by timestep, before": ("mid_block", HOOK, repeat_by_timestep),
    "by timestep, after": ("up_blocks.1.resnets.1", HOOK, repeat_by_timestep),
    "by timestep, a layer": (f"{ATTENTION}.to_q", f"{ATTENTION}.to_q", repeat_by_timestep),
    "a layer of a processor": (ATTENTION, f"{ATTENTION}.to_q", skip_attention),
}


@pytest.mark.parametrize("cached, hook_name, replace", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("rows", ["cond", "all"])
def test_a_cache_that_replaces_forwards_is_refused(cached, hook_name, replace, rows):
    pipe = build(sd15)
    replace(pipe.unet.get_submodule(cached), pipe.unet)
    hooked, options = (
        HookedDiffusionModel.from_pipeline(pipe),
        lambda: generate_options(2, num_inference_steps=6),
    )
    with pytest.raises(ValueError, match=SKIPPED):
        hooked.run_with_cache(hook_name, PROMPTS[:2], **options())
    with pytest.raises(ValueError, match=SKIPPED):
        hooked.run_with_hooks(
            {hook_name: Edit(lambda x: 2 * x, rows=rows)}, PROMPTS[:2], **options()
        )
    with pytest.raises(ValueError, match=SKIPPED):
        hooked.run_with_cache(
            "up_blocks.*.attentions.*" if cached != ATTENTION else "**", PROMPTS[:2], **options()
        )


def test_steps_that_are_not_recorded_may_be_skipped():
    pipe = build(sd15)
    repeat_by_timestep(pipe.unet.get_submodule(HOOK), pipe.unet)
    hooked, seen = HookedDiffusionModel.from_pipeline(pipe), []
    options = generate_options(2, num_inference_steps=6, cache_every_n_timesteps=3)
    pipe.unet.get_submodule(HOOK).register_forward_hook(
        lambda module, args, output: seen.append(output[0][2:].clone())
    )
    _, cache = hooked.run_with_cache(HOOK, PROMPTS[:2], **options)
    assert torch.equal(cache["output"][HOOK], torch.stack([map_tokens(x) for x in seen[::3]], 1))


class Late(torch.nn.Module):
    """A denoiser with a module that only runs in the second half of the sampling."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.late = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x, t):
        x = self.b(self.a(x))
        return self.late(x) if t < 500 else x


@pytest.mark.parametrize("times", [(900.0, 600.0, 300.0), (300.0, 600.0)])
def test_a_glob_leaves_out_what_does_not_run_in_every_step(times):
    """And its name, spelt out, is refused."""

    def sample(positions):
        model, scheduler, x = Late(), Euler(), torch.randn(2, 3, 4, 5)
        with torch.no_grad(), HookedDiffusionModel(model, scheduler).cache(positions, 2) as cache:
            for t in times:
                x = scheduler.step(model(x, t), t, x)
        return cache

    assert sorted(sample("*")["output"]) == ["a", "b"]
    with pytest.raises(ValueError, match="late: did not run in step"):
        sample(["a", "late"])


class Gated(Late):
    """The module runs where the sample is on average what it was at first."""

    usual = None

    def forward(self, x, t):
        self.usual = x.mean() if self.usual is None else self.usual
        return super().forward(x, 0 if x.mean() == self.usual else 999)


def test_a_glob_leaves_out_what_runs_in_some_trials_only():
    def layouts(positions):
        model, x = Gated(), torch.randn(2, 3, 4, 5)
        with torch.no_grad(), HookedDiffusionModel(model, Euler()).cache(positions, 2) as cache:
            Euler().step(model(x, 900.0), 900.0, x)
        return sorted(cache["output"])

    assert layouts("*") == ["a", "b"]
    with pytest.raises(
        ValueError,
        match="late: did not run in trial run 2 of the denoiser, and it ran in trial run 1",
    ):
        layouts("late")


@pytest.mark.parametrize(
    "config", ["PyramidAttentionBroadcastConfig", "FasterCacheConfig", "FirstBlockCacheConfig"]
)
def test_caches_of_diffusers_are_refused(config):
    from families import flux

    pipe = build(flux)
    options = {
        "PyramidAttentionBroadcastConfig": dict(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
        "FasterCacheConfig": dict(
            current_timestep_callback=lambda: 500, is_guidance_distilled=True
        ),
        "FirstBlockCacheConfig": dict(threshold=0.1),
    }
    pipe.transformer.enable_cache(getattr(diffusers, config)(**options[config]))
    with pytest.raises(ValueError, match="caches what blocks compute"):
        HookedDiffusionModel.from_pipeline(pipe).run_with_cache(
            "transformer_blocks.0", **generate_options(1, flux)
        )


def offloaded(unet):
    import accelerate

    accelerate.cpu_offload(unet, execution_device="cpu")


def cast_by_layer(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)


def replaced_for_good(unet):
    """Somebody's own forward, which calls the one that was there."""
    for module in unet.modules():
        module.forward = functools.partial(
            lambda forward, *args, **kwargs: forward(*args, **kwargs), module.forward
        )


@pytest.mark.parametrize(
    "replace", [offloaded, cast_by_layer, replaced_for_good], ids=lambda f: f.__name__
)
def test_forwards_that_call_the_modules_own_are_let_through(replace):
    names = [HOOK, "mid_block", f"{ATTENTION}.to_q", "conv_out"]
    caches, images = [], []
    for change in (lambda unet: None, replace):
        pipe = build(sd15)
        hooked = HookedDiffusionModel.from_pipeline(pipe)
        change(pipe.unet)
        caches.append(
            hooked.run_with_cache(names, PROMPTS[:1], **generate_options(1, num_inference_steps=4))[
                1
            ]["output"]
        )
        edits = {name: Edit(lambda x: x.clone(), rows="cond") for name in names}
        images.append(
            hooked.run_with_hooks(
                edits, PROMPTS[:1], **generate_options(1, num_inference_steps=4)
            ).images
        )
    assert all(torch.equal(caches[0][name], caches[1][name]) for name in names)
    assert torch.equal(*images)


@pytest.mark.parametrize("scale", [-2.0, 0.0, 1.0, 4.0])
def test_the_loop_that_comes_with_it_never_exchanges_the_passes(scale):
    """It guides with a scale above 1 only, and puts the unconditional rows first."""
    torch.manual_seed(0)
    model, seen = Denoiser(), []
    text = {"cond": torch.randn(2, 5), "uncond": torch.randn(2, 5)}
    hooked = HookedDiffusionModel(
        model,
        Euler(),
        encode_prompt=lambda *_: (text["cond"], text["uncond"]),
        get_timesteps=lambda n, device: range(n, 0, -1),
        sample_shape=(3, 4, 5),
    )

    def keep_conditional(module, args, output):
        conditional = (args[2][:, None] == text["cond"]).all(-1).any(1)
        assert len(output) == (4 if scale > 1 else 2)
        seen.append(map_tokens(output[conditional]))

    model.register_forward_hook(keep_conditional)
    with hooked.cache("out", 2) as cache:
        hooked(["a", "b"], num_inference_steps=3, guidance_scale=scale)
    assert torch.equal(cache["output"]["out"], torch.stack(seen, 1))


# ------------------------------------------------------------------------------- components that are replaced after hooking


def another_scheduler(pipe):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return "scheduler"


def a_scheduler_of_the_same_class(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return "scheduler"


def another_denoiser(pipe):
    pipe.unet = build(sd15).unet
    return "unet"


@pytest.mark.parametrize(
    "replace", [another_scheduler, a_scheduler_of_the_same_class, another_denoiser]
)
def test_a_component_that_was_replaced_after_hooking_is_named(replace):
    pipe = build(sd15)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    replaced = replace(pipe)
    attempts = (
        lambda: hooked.run_with_cache(HOOK, PROMPTS[:1], **generate_options(1)),
        lambda: hooked.run_with_hooks({HOOK: Edit(torch.neg)}, PROMPTS[:1], **generate_options(1)),
        lambda: hooked.run_with_hooks({HOOK: lambda *_: None}, PROMPTS[:1], **generate_options(1)),
        lambda: hooked.first_sample(PROMPTS[:1], **generate_options(1)),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match=f"^{replaced} of .* was replaced after hooking"):
            attempt()
    again = HookedDiffusionModel.from_pipeline(pipe)
    again.run_with_cache(HOOK, PROMPTS[:1], **generate_options(1))


def test_a_loop_whose_model_was_replaced_after_hooking_is_named():
    hooked = HookedDiffusionModel(Denoiser(), Euler(), sample_shape=(3, 4, 5))
    hooked.pipe.model = Denoiser()
    with pytest.raises(ValueError, match="^model of Loop was replaced after hooking"):
        hooked.run_with_cache("out", num_inference_steps=2)


# -------------------------------------------------------------------- what the user attached sees nothing but the sampling


class Store(diffusers.models.attention_processor.AttnProcessor):
    """Counts and stores as prompt-to-prompt editing does, in an object that all layers share."""

    def __init__(self, controller):
        self.controller = controller

    def __call__(self, attention, hidden_states, *args, **kwargs):
        self.controller.calls += 1
        self.controller.sizes["all"].append(hidden_states.shape)
        self.controller.total += hidden_states.detach().double().sum()
        return super().__call__(attention, hidden_states, *args, **kwargs)


class Controller:
    def __init__(self):
        self.calls = 0
        self.sizes = {"all": []}
        self.total = torch.zeros((), dtype=torch.float64)


def run_plainly(hooked, options):
    hooked(PROMPTS[:2], **options)


def run_with_cache(hooked, options):
    hooked.run_with_cache(HOOK, PROMPTS[:2], **options)


def run_with_edits(hooked, options):
    edit = Edit(lambda x: None)
    hooked.run_with_hooks({HOOK: edit}, PROMPTS[:2], **options)


def run_after_a_first_step(hooked, options):
    again = options | generate_options(2, num_inference_steps=3)
    hooked.first_step(HOOK, PROMPTS[:2], **again)
    hooked.layouts(HOOK, PROMPTS[:2], **again)
    hooked(PROMPTS[:2], **options)


@pytest.mark.parametrize("run", [run_with_cache, run_with_edits, run_after_a_first_step])
def test_attention_processors_of_the_users_own_see_the_sampling_only(run):
    """Among them the probes that look for the image's tokens, in the middle of the sampling."""
    seen = []
    for how in (run_plainly, run):
        pipe, controller = build(sd15), Controller()
        pipe.unet.set_attn_processor(Store(controller))
        how(HookedDiffusionModel.from_pipeline(pipe), generate_options(2, num_inference_steps=3))
        seen.append(controller)
    plain, hooked = seen
    assert plain.calls > 0
    assert (hooked.calls, hooked.sizes) == (plain.calls, plain.sizes)
    assert torch.equal(hooked.total, plain.total)


@pytest.mark.parametrize("run", [run_with_cache, run_with_edits, run_after_a_first_step])
def test_hooks_of_the_users_own_see_the_sampling_only(run):
    pipe, seen = build(sd15), []
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    run(HookedDiffusionModel.from_pipeline(pipe), generate_options(2, num_inference_steps=3))
    assert len(seen) == 3


def test_a_hook_that_the_denoiser_needs_is_called_in_dry_steps_too():
    """As one that fills in an argument; without it there would be no dry step at all."""
    pipe = build(sd15)

    class NeedsSize(type(pipe.unet)):
        @functools.wraps(type(pipe.unet).forward)
        def forward(self, *args, **kwargs):
            assert self.size == (16, 16)
            return super().forward(*args, **kwargs)

    def note_size(module, args):
        module.size = tuple(args[0].shape[2:])

    pipe.unet.__class__ = NeedsSize
    pipe.unet.size = None
    pipe.unet.register_forward_pre_hook(note_size)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    hooked.run_with_hooks({HOOK: Edit(torch.neg)}, PROMPTS[:1], **generate_options(1))
    assert pipe.unet.size == (16, 16)
