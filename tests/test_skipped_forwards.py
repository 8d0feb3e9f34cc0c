"""Modules that do not run in every step: caches are refused, and globs leave such modules out."""

import functools

import diffusers
import pytest
import torch
from hooks_by_hand import map_tokens
from test_hook import HOOK, Euler
from tiny import (
    PROMPTS,
    build,
    generate_options,
    sd15,
)

from hook import Edit, HookedDiffusionModel

pytestmark = pytest.mark.slow


def repeat_every_third(module, unet):
    """The module's `forward` is replaced by one that gives back in two of three calls what it
    kept."""
    forward = module.forward
    state = {"calls": 0}

    def cached(*args, **kwargs):
        if state["calls"] % 3 == 0:
            state["kept"] = forward(*args, **kwargs)
        state["calls"] += 1
        return state["kept"]

    module.forward = cached


def repeat_by_timestep(module, unet):
    """As DeepCache does: in two of three steps; the denoiser's own `forward` is replaced to know
    which."""
    forward = module.forward
    of_denoiser = unet.forward
    state = {}
    timesteps = []

    def watched(sample, timestep, *args, **kwargs):
        state["t"] = float(timestep)
        if state["t"] not in timesteps:
            timesteps.append(state["t"])
        return of_denoiser(sample, timestep, *args, **kwargs)

    def cached(*args, **kwargs):
        if timesteps.index(state["t"]) % 3 == 0:
            state["kept"] = forward(*args, **kwargs)
        return state["kept"]

    unet.forward = watched
    module.forward = cached


class Skipping(torch.nn.Module):
    """A processor that keeps what its attention computed, as those of some caches do; no `forward`
    is replaced."""

    def __init__(self, processor):
        super().__init__()
        self.processor = processor
        self.calls = 0

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
    hooked = HookedDiffusionModel.from_pipeline(pipe)

    def options():
        return generate_options(2, num_inference_steps=6)

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
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    seen = []
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
        model = Late()
        scheduler = Euler()
        x = torch.randn(2, 3, 4, 5)
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
        model = Gated()
        x = torch.randn(2, 3, 4, 5)
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
    caches = []
    images = []
    for change in (lambda unet: None, replace):
        pipe = build(sd15)
        hooked = HookedDiffusionModel.from_pipeline(pipe)
        change(pipe.unet)
        options = generate_options(1, num_inference_steps=4)
        _, cache = hooked.run_with_cache(names, PROMPTS[:1], **options)
        caches.append(cache["output"])
        edits = {name: Edit(lambda x: x.clone(), rows="cond") for name in names}
        options = generate_options(1, num_inference_steps=4)
        images.append(hooked.run_with_hooks(edits, PROMPTS[:1], **options).images)
    assert all(torch.equal(caches[0][name], caches[1][name]) for name in names)
    assert torch.equal(*images)
