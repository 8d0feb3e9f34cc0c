"""Rows and steps in odd samplings: what a label, a count or a loop must not be mistaken for."""

import pytest
import torch
from families import RECIPES, cogvideox, lumina, pag, sana, sd3, svd, zimage
from test_families import Case, shared
from test_hook import HOOK, Denoiser, Euler
from tiny import PROMPTS, build, generate_options, sd15, tiny_unet

from hook import Edit, HookedDiffusionModel


def named(name):
    return next(recipe for recipe in RECIPES if recipe.__name__ == name)


@pytest.mark.parametrize(
    "recipe", [*map(named, ("sd15", "sdxl", "pixart", "ltx", "cogvideox")), sd3, lumina, sana]
)
def test_one_prompt_with_different_negative_prompts(recipe):
    """It is the unconditional rows that differ then: guidance subtracts them all the same."""
    case = shared(recipe)
    hook_name = case.by_hand.hook_name if case.by_hand else case.hooked.hook_names("*.1")[0]

    def rows(negative):
        return case.cache(
            hook_name, 2, [PROMPTS[0]] * 2, keep=dict(rows="both"), negative_prompt=negative
        )[1]

    before = rows(["blurry", "ugly it"])
    after = rows(["blurry", "ugly at"])
    assert torch.equal(before["output"][hook_name][:, 0], after["output"][hook_name][:, 0])
    changed = (
        (before["output_uncond"][hook_name] != after["output_uncond"][hook_name])[:, 0]
        .flatten(1)
        .any(1)
    )
    assert changed.tolist() == [False, True]


@pytest.mark.parametrize(
    "n, prompts, guided", [(4, 2, True), (2, 4, False), (1, 2, False), (2, 1, True)]
)
def test_a_wrong_number_of_prompts_is_an_error(n, prompts, guided):
    pipe = build(sd15)
    options = generate_options(prompts, guidance_scale=5.0 if guided else 1.0)
    with (
        pytest.raises(ValueError, match="say how many prompts"),
        HookedDiffusionModel.from_pipeline(pipe).cache(HOOK, n),
    ):
        pipe((PROMPTS * 2)[:prompts], **options)


def test_the_sample_says_how_many_rows_there_are_where_no_argument_does():
    case = Case(svd)
    # three pictures, no prompt, no guidance
    _, cache = case.cache("mid_block", max_guidance_scale=1.0)
    assert len(cache["output"]["mid_block"]) == 3


def test_a_perturbed_pass_is_not_unconditional():
    case = Case(pag)
    with pytest.raises(ValueError, match="no unconditional rows"):
        case.cache("mid_block", keep=dict(rows="uncond"), guidance_scale=0.0)


def test_a_dry_step_puts_attention_processors_back():
    case = Case(pag)
    before = {name: type(p) for name, p in case.pipe.unet.attn_processors.items()}
    case.sample({"mid_block": Edit(lambda x: x)})
    assert {name: type(p) for name, p in case.pipe.unet.attn_processors.items()} == before
    prompt, options = case.arguments(2)
    case.pipe(prompt, **options | {"pag_scale": 0.0})


def test_edits_of_all_rows_get_one_chunk_at_a_time_where_the_number_of_videos_is_ignored():
    case = Case(cogvideox)
    shapes = set()
    edit = Edit(lambda x: shapes.add(tuple(x.shape[:1])), rows="all")
    case.sample({"transformer_blocks.0": edit}, n=2, num_videos_per_prompt=2, generator=None)
    assert shapes == {(2,)}


def test_a_list_of_predictions_is_stacked_even_where_there_are_as_many_channels():
    case = Case(zimage)  # its samples have 4 channels; two prompts with guidance are 4 rows
    expected = case.seen_by_hand(case.by_hand.image, 2, prompts=["x", "x"])
    _, cache = case.cache("layers.1", 2, ["x", "x"], keep=dict(rows="both"))
    for key, role in (("output", "c"), ("output_uncond", "u")):
        assert torch.equal(
            cache[key]["layers.1"], torch.stack([torch.stack(steps) for steps in expected[role]])
        )


def test_a_foreign_scheduler_of_the_same_class_changes_nothing():
    from diffusers import DDIMScheduler

    pipe = build(sd15)
    foreign = DDIMScheduler()
    edited = []

    def callback(pipe, step, t, kwargs):
        foreign.set_timesteps(7)
        foreign.step(torch.zeros(1, 4, 2, 2), foreign.timesteps[0], torch.zeros(1, 4, 2, 2))
        return {}

    hooked = HookedDiffusionModel.from_pipeline(pipe)
    options = generate_options(2, num_inference_steps=5)
    options["callback_on_step_end"] = callback
    _, cache = hooked.run_with_cache(HOOK, PROMPTS[:2], cache_every_n_timesteps=2, **options)
    assert cache["output"][HOOK].shape[1] == 3
    hooked.run_with_hooks(
        {HOOK: Edit(lambda x: edited.append(len(x)), steps=[0])}, PROMPTS[:2], **options
    )
    assert edited == [2]


def test_a_dry_step_is_hidden_from_others_that_watch_the_model():
    """Another HookedDiffusionModel's first step would have two forwards, of which one would count
    as unconditional."""
    model = Denoiser()
    scheduler = Euler()
    loop = dict(get_timesteps=lambda n, device: range(n, 0, -1), sample_shape=(3, 4, 5))
    loop["encode_prompt"] = lambda prompt, *args: (torch.ones(len(prompt), 5), None)
    one, other = (HookedDiffusionModel(model, scheduler, **loop) for _ in range(2))
    with (
        pytest.raises(ValueError, match="no unconditional rows"),
        one.cache("out", 2, rows="uncond"),
    ):
        other.run_with_hooks(
            {"out": Edit(lambda x: x)}, ["a", "b"], num_inference_steps=2, guidance_scale=1.0
        )


def test_two_models_that_take_turns_keep_their_own_steps():
    torch.manual_seed(0)
    models = [Denoiser(), Denoiser()]
    schedulers = [Euler(), Euler()]
    x = torch.randn(2, 3, 4, 5)
    text = torch.randn(2, 5)
    a, b = (HookedDiffusionModel(m, s).cache("out", 2) for m, s in zip(models, schedulers))
    with torch.no_grad(), a as of_a, b as of_b:
        for t in (3.0, 2.0):
            predictions = [model(x, t + i / 2, text) for i, model in enumerate(models)]
            for i, scheduler in enumerate(schedulers):
                scheduler.step(predictions[i], t + i / 2, x)
    assert of_a["timesteps"]["out"].tolist() == [3.0, 2.0]
    assert of_b["timesteps"]["out"].tolist() == [3.5, 2.5]


def test_a_second_sampling_in_one_cache_is_an_error():
    pipe = build(sd15)
    with (
        pytest.raises(ValueError, match="second sampling"),
        HookedDiffusionModel.from_pipeline(pipe).cache(HOOK, 2),
    ):
        for _ in range(2):
            pipe(PROMPTS[:2], **generate_options(2))


def one_step(model, timestep, scheduler=None, x=None, rows=2, **options):
    """Of a loop of one's own: the cache of `out`, or of what `model` has in its place."""
    x = torch.randn(rows, 3, 4, 5) if x is None else x
    hooked = HookedDiffusionModel(model, scheduler or Euler())
    with hooked.cache("out", rows, **options) as cache:
        (scheduler or Euler()).step(model(x, timestep, torch.randn(rows, 5)), timestep, x)
    return cache


def test_timesteps_of_one_element_and_of_single_rows():

    def broadcast(t):
        return t.view(-1, 1, 1, 1)

    model = type(
        "Rowwise",
        (Denoiser,),
        {"forward": lambda self, x, t, text: Denoiser.forward(self, x, broadcast(t), text)},
    )()
    assert one_step(model, torch.tensor([3.0, 3.0]))["timesteps"]["out"].tolist() == [3.0]
    with pytest.raises(ValueError, match="timestep of its own"):
        one_step(model, torch.tensor([3.0, 4.0]))


def test_the_time_may_come_first():
    model = type(
        "TimeFirst",
        (Denoiser,),
        {"forward": lambda self, t, x, text: Denoiser.forward(self, x, t, text)},
    )()
    torch.manual_seed(0)
    hooked = HookedDiffusionModel(model, Euler())
    x = torch.randn(2, 3, 4, 5)
    with torch.no_grad(), hooked.cache("out", 2) as cache:
        prediction = model(1.0, x, torch.randn(2, 5))
        Euler().step(prediction, 1.0, x)
    assert torch.equal(cache["output"]["out"][:, 0], prediction.flatten(2).transpose(1, 2))


def test_a_wrapper_and_a_scheduler_that_takes_anything():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    with pytest.raises(ValueError, match="hook the module that it wraps"):
        HookedDiffusionModel(Wrapper(Denoiser()), Euler())

    class Loose:
        def step(self, *args, **kwargs):
            return args[2]

    assert one_step(Denoiser(), 2.0, Loose())["timesteps"]["out"].tolist() == [2.0]


def test_a_cache_keeps_no_graph():
    cache = one_step(Denoiser(), 1.0)
    assert not cache["output"]["out"].requires_grad


def test_what_goes_on_in_place_is_cached_as_it_was():
    class InPlace(Denoiser):
        def forward(self, x, t, text):
            mixed = self.mix(x)
            self.before = mixed.clone()
            mixed += 100
            return self.out(mixed)

    model = InPlace()
    with torch.no_grad(), HookedDiffusionModel(model, Euler()).cache("mix", 2) as cache:
        x = torch.randn(2, 3, 4, 5)
        Euler().step(model(x, 1.0, torch.randn(2, 5)), 1.0, x)
    assert torch.equal(cache["output"]["mix"][:, 0], model.before.flatten(2).transpose(1, 2))


def test_globs_of_edits_pass_over_modules_without_tokens(pipe):
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    options = generate_options(2)
    names = set()
    hooked.run_with_hooks({"**": Edit(lambda x: names.add(1))}, PROMPTS[:2], **options)
    assert names
    with pytest.raises(ValueError, match="time_embedding: its output holds no image tokens"):
        hooked.run_with_hooks({"time_embedding": Edit(lambda x: x)}, PROMPTS[:2], **options)
    with pytest.raises(ValueError, match="none of the steps to edit"):
        hooked.run_with_hooks({HOOK: Edit(lambda x: x, steps=range(5, 9))}, PROMPTS[:2], **options)


def test_requests_that_make_no_sense_are_refused():
    hooked = HookedDiffusionModel(Denoiser(), Euler())
    for call, message in (
        (lambda: Edit(torch.zeros_like, steps=1), "expected a range or a list"),
        (lambda: hooked.cache("out", 0).__enter__(), "n_prompts"),
        (lambda: hooked.cache("out", ["a"]).__enter__(), "n_prompts"),
        (lambda: hooked.cache("out", 1, cache_every_n_timesteps=0).__enter__(), "at least 1"),
        (lambda: hooked("a"), "set_timesteps"),
        (
            lambda: HookedDiffusionModel(tiny_unet(), Euler(), encode_prompt=lambda *args: args)(),
            "needs a prompt",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
