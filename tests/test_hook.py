"""Rows, tokens and labels of what hooks see, against hand-written hooks and against what must
change when a prompt does."""

import pytest
import torch
from tiny import PROMPTS, build, generate_options, sd15, tiny_unet

from diffusion.guidance import guidance_weights
from diffusion.token_layout import by_token
from hook import Edit, HookedDiffusionModel

HOOK = "up_blocks.0.attentions.1"


def run(pipe, prompts=PROMPTS[:2], hook_names=HOOK, rows="both", n=1, **options):
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    extra = {"num_images_per_prompt": n} if n > 1 else {}
    keep = {
        k: options.pop(k)
        for k in ("save_input", "cache_every_n_timesteps", "dtype")
        if k in options
    }
    return hooked.run_with_cache(
        hook_names,
        prompts,
        rows=rows,
        **keep,
        **generate_options(len(prompts) * n, **options),
        **extra,
    )


def test_rows_equal_a_hand_written_hook(pipe):
    """Row (p, s, t) is what the module returns for that prompt, step and token in the same batch:
    exact."""
    seen, inputs = [], []
    module = pipe.unet.get_submodule(HOOK)

    def hook(module, args, output):
        inputs.append(args[0].clone())
        seen.append(output[0].clone())

    handle = module.register_forward_hook(hook)
    try:
        _, cache = run(pipe, save_input=True)
    finally:
        handle.remove()
    for recorded, side in ((seen, "output"), (inputs, "input")):
        expected = torch.stack(recorded, 1)  # (rows, steps, d, H, W), unconditional rows first
        P, S, d, H, W = expected.shape
        expected = expected.reshape(P, S, d, H * W).transpose(2, 3)
        assert torch.equal(cache[side + "_uncond"][HOOK], expected[:2])
        assert torch.equal(cache[side][HOOK], expected[2:])
        assert cache["grid"][HOOK] == (H, W)
    assert cache["timesteps"][HOOK].tolist() == [float(t) for t in pipe.scheduler.timesteps]


@pytest.mark.parametrize("guidance_scale", [1.5, 7.0])
def test_changing_a_prompt_changes_its_conditional_rows_alone(pipe, guidance_scale):
    changed = [PROMPTS[0], PROMPTS[2], PROMPTS[1]]
    _, before = run(pipe, PROMPTS, guidance_scale=guidance_scale)
    _, after = run(
        pipe, changed[:1] + [PROMPTS[1] + " and stars"] + PROMPTS[2:], guidance_scale=guidance_scale
    )
    same = [
        torch.equal(before["output"][HOOK][p, 0], after["output"][HOOK][p, 0]) for p in range(3)
    ]
    assert same == [True, False, True]
    assert torch.equal(before["output_uncond"][HOOK][:, 0], after["output_uncond"][HOOK][:, 0])


def test_one_row_a_prompt_and_image(pipe):
    """The first axis is prompts x images, prompt-major: with n=2 the rows of a prompt are those of
    its two seeds."""
    _, two = run(pipe, n=2)
    repeated = [p for p in PROMPTS[:2] for _ in range(2)]
    _, four = run(pipe, repeated)
    assert two["output"][HOOK].shape[0] == 4
    assert torch.allclose(
        two["output"][HOOK], four["output"][HOOK], rtol=1e-3, atol=1e-3
    )  # prompts are encoded 2 or 4 at once


def test_options_of_the_cache(pipe):
    _, every = run(pipe, num_inference_steps=5)
    _, third = run(pipe, num_inference_steps=5, cache_every_n_timesteps=3, dtype=torch.float16)
    assert torch.equal(third["output"][HOOK], every["output"][HOOK][:, ::3].half())
    assert torch.equal(third["timesteps"][HOOK], every["timesteps"][HOOK][::3])
    assert torch.equal(third["sigmas"][HOOK], every["sigmas"][HOOK][::3])


def test_without_guidance_all_rows_are_conditional(pipe):
    for guidance_scale in (0.0, 1.0):
        _, cache = run(pipe, rows="cond", guidance_scale=guidance_scale)
        assert cache["output"][HOOK].shape[0] == 2
        with pytest.raises(ValueError, match="unconditional rows"):
            run(pipe, rows="uncond", guidance_scale=guidance_scale)


def test_an_empty_prompt_alone_is_not_an_error():
    _, cache = run(build(sd15), [""])
    assert torch.allclose(cache["output"][HOOK], cache["output_uncond"][HOOK], atol=1e-5)


def test_a_step_is_a_call_of_the_scheduler():
    from diffusers import HeunDiscreteScheduler

    pipe = build(sd15, scheduler=HeunDiscreteScheduler())
    _, cache = run(pipe, num_inference_steps=5)
    assert cache["output"][HOOK].shape[1] == 9
    assert cache["timesteps"][HOOK].tolist() == [float(t) for t in pipe.scheduler.timesteps]
    assert (
        HookedDiffusionModel.from_pipeline(pipe).first_step(
            HOOK, PROMPTS[:2], **generate_options(2, num_inference_steps=5)
        )["num_steps"]
        == 9
    )


def test_the_first_step_leaves_no_trace(pipe):
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    options = generate_options(2) | {"generator": None}
    torch.manual_seed(3)
    expected = hooked(PROMPTS[:2], **options).images
    torch.manual_seed(3)
    step = hooked.first_step(HOOK, PROMPTS[:2], **options)
    output, cache = hooked.run_with_cache(HOOK, PROMPTS[:2], **options)
    assert torch.equal(output.images, expected)
    assert torch.equal(step["output"][HOOK][:, 0], cache["output"][HOOK][:, 0])


def test_the_first_step_puts_generators_back(pipe):
    hooked, options = HookedDiffusionModel.from_pipeline(pipe), generate_options(2)
    expected = hooked(PROMPTS[:2], **generate_options(2)).images
    hooked.first_step(HOOK, PROMPTS[:2], **options)
    assert torch.equal(hooked(PROMPTS[:2], **options).images, expected)


def test_an_inherited_step_is_not_left_on_the_subclass():
    from diffusers import DDIMScheduler

    class Mine(DDIMScheduler):
        pass

    run(build(sd15, scheduler=Mine(clip_sample=False, steps_offset=1)))
    assert not {"step", "set_timesteps"} & set(vars(Mine))


def test_nothing_is_left_behind(pipe):
    """Hooks and class patches are gone afterwards, also after an exception, and the sample is the
    untouched one."""
    before = hooks_and_patches(pipe)
    expected = pipe(PROMPTS[:2], **generate_options(2)).images
    output, _ = run(pipe, hook_names="**", save_input=True)
    assert torch.equal(output.images, expected)
    assert hooks_and_patches(pipe) == before

    def broken(module, input, output):
        raise RuntimeError("on purpose")

    hooked = HookedDiffusionModel.from_pipeline(pipe)
    with pytest.raises(RuntimeError, match="on purpose"), hooked.cache(HOOK, 2):
        hooked.run_with_hooks({"mid_block": broken}, PROMPTS[:2], **generate_options(2))
    assert hooks_and_patches(pipe) == before


def hooks_and_patches(pipe):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())
    return (
        hooks,
        type(pipe.scheduler).step,
        dict(vars(type(pipe.scheduler))),
        pipe._progress_bar_config,
    )


def test_edits(pipe):
    """A function sees (module, input, output) and what it returns takes the output's place; None
    changes nothing."""
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    plain = hooked(PROMPTS[:2], **generate_options(2)).images
    nothing = hooked.run_with_hooks(
        {HOOK: [lambda m, i, o: None, lambda m, i, o: (o[0] * 1,)]},
        PROMPTS[:2],
        **generate_options(2),
    ).images
    zeroed = hooked.run_with_hooks(
        {HOOK: lambda m, i, o: (0 * o[0],)}, PROMPTS[:2], **generate_options(2)
    ).images
    skipped = hooked.run_with_hooks(
        {HOOK: lambda m, i, o: (i[0],)}, PROMPTS[:2], **generate_options(2)
    ).images
    assert torch.equal(nothing, plain)
    assert not torch.equal(zeroed, plain)
    assert not torch.equal(skipped, plain)
    assert not torch.equal(skipped, zeroed)


def test_names(pipe):
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    assert hooked.hook_names("up_blocks.*.attentions.*") == [
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    ]
    assert hooked.hook_names(f"unet.{HOOK}") == [HOOK]
    assert "mid_block.attentions.0.transformer_blocks.0.attn2" in hooked.hook_names("attn[12]")
    assert "mid_block.attentions.0.transformer_blocks.0.attn2" in hooked.hook_names("mid_block.**")
    everything = hooked.hook_names()
    assert (
        set(everything) == set(hooked.hook_names("**")) and "mid_block.attentions" not in everything
    )
    with pytest.raises(ValueError, match="up_blocks.0.attentions.1"):
        hooked.hook_names("up_block.0.attention.1")
    with pytest.raises(ValueError, match="no module matches"):
        hooked.hook_names("down_block*.x")


def test_a_module_that_runs_twice_is_refused_by_name_and_left_out_of_a_glob(pipe):
    twice = "up_blocks.0.resnets.0.nonlinearity"
    with pytest.raises(ValueError, match="several times"):
        run(pipe, hook_names=twice)
    _, cache = run(pipe, hook_names="up_blocks.0.resnets.0.*")
    assert twice not in cache["output"] and "up_blocks.0.resnets.0.conv1" in cache["output"]


def test_layouts_say_why_there_is_none(pipe):
    names = [HOOK, "time_embedding"]
    layouts, steps = HookedDiffusionModel.from_pipeline(pipe).layouts(
        names, PROMPTS[:2], **generate_options(2)
    )
    assert (layouts[HOOK].grid, layouts[HOOK].d, steps[HOOK]) == ((8, 8), 16, [0, 1])
    assert layouts["time_embedding"].reason.startswith("its output holds no image tokens")


def test_an_option_of_a_cache_that_is_none_is_refused(pipe):
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    with pytest.raises(TypeError, match="save_outputs"):
        hooked.cache(HOOK, 2, save_outputs=True).__enter__()


def test_modules_that_never_run_are_refused(pipe):
    pipe.unet.spare = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="never ran"):
        run(pipe, hook_names="spare")
    with pytest.raises(ValueError, match="never ran"):
        HookedDiffusionModel.from_pipeline(pipe).run_with_hooks(
            {"spare": lambda m, i, o: o}, PROMPTS[:1], **generate_options(1)
        )


def compiled(unet):
    return torch.compile(unet)


def compiled_in_place(unet):
    unet.compile()


def compiled_in_part(unet):
    unet.mid_block.compile()


@pytest.mark.parametrize(
    "compile", [compiled, compiled_in_place, compiled_in_part], ids=lambda f: f.__name__
)
def test_a_compiled_denoiser_is_refused(compile):
    pipe = build(sd15)
    if (unet := compile(pipe.unet)) is not None:
        pipe.unet = unet
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    assert HOOK in hooked.hook_names()
    for attempt in (
        lambda: hooked.run_with_cache(HOOK, PROMPTS[:1], **generate_options(1)),
        lambda: hooked.run_with_hooks(
            {HOOK: lambda m, i, o: o}, PROMPTS[:1], **generate_options(1)
        ),
        lambda: hooked.layouts(HOOK, PROMPTS[:1], **generate_options(1)),
    ):
        with pytest.raises(ValueError, match="compiled"):
            attempt()


def test_fused_projections_never_run(pipe):
    pipe.unet.fuse_qkv_projections()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.raises(ValueError, match="never ran.* fused"):
        run(pipe, hook_names=name)
    run(pipe, hook_names="mid_block.attentions.0.transformer_blocks.0.attn1")


@pytest.mark.parametrize("applied", ["to the model", "by its method"])
def test_block_caches_are_refused(applied):
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
    from families import flux

    pipe = build(flux)
    config = FirstBlockCacheConfig(threshold=0.1)
    if applied == "to the model":
        apply_first_block_cache(pipe.transformer, config)
    else:
        pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="caches what blocks compute"):
        HookedDiffusionModel.from_pipeline(pipe).run_with_cache("transformer_blocks.0", PROMPTS[:1])


def test_wrong_requests_are_refused(pipe):
    hooked, options = HookedDiffusionModel.from_pipeline(pipe), generate_options(2)
    ask = lambda **more: hooked.run_with_cache(HOOK, PROMPTS[:2], **more, **options)
    with pytest.raises(ValueError, match="stream: expected image, text, got 'audio'"):
        ask(stream="audio")
    with pytest.raises(ValueError, match="rows: expected cond, uncond, both, got 'all'"):
        ask(rows="all")
    with pytest.raises(ValueError, match="both off"):
        ask(save_output=False)
    with pytest.raises(ValueError, match="holds no image tokens"):
        hooked.run_with_cache("time_embedding", PROMPTS[:2], **options)
    with pytest.raises(ValueError, match="rows: expected cond, uncond, all"):
        Edit(torch.zeros_like, rows="both")
    with pytest.raises(ValueError, match=r"must return \(2, 64, 16\) or None, got \(2, 64, 1\)"):
        hooked.run_with_hooks({HOOK: Edit(lambda x: x[..., :1])}, PROMPTS[:2], **options)
    with pytest.raises(ValueError, match="no unconditional rows to edit"):
        hooked.run_with_hooks(
            {HOOK: Edit(torch.zeros_like, rows="uncond")},
            PROMPTS[:2],
            **options | {"guidance_scale": 1.0},
        )


def test_a_module_without_the_rows_of_the_batch_is_refused():
    class Positions(Denoiser):
        def __init__(self):
            super().__init__()
            self.positions = torch.nn.Linear(3, 6)

        def forward(self, x, t, text):
            return super().forward(x, t, text) + self.positions(torch.ones(5, 3)).mean()

    torch.manual_seed(0)
    model, x = Positions(), torch.randn(2, 3, 4, 5)
    with (
        pytest.raises(ValueError, match=r"no batch axis of 2 rows; the shape is \(5, 6\)"),
        torch.no_grad(),
        HookedDiffusionModel(model, Euler()).cache("positions", 2),
    ):
        Euler().step(model(x, 1.0, torch.randn(2, 5)), 1.0, x)


class Joint(torch.nn.Module):
    """Six text tokens, three places that a mask sets to zero, an image of 4 x 5 patches; attention
    written out."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = (
            torch.nn.Linear(3, 8),
            torch.nn.Linear(8, 24),
            torch.nn.Linear(8, 3),
        )
        self.block = torch.nn.Identity()

    def forward(self, x, t, text):
        image = self.embed(x.flatten(2).transpose(1, 2)) + t / 10
        tokens = torch.cat([text, text[:, :3], image], 1)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        tokens = tokens + (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v
        keep = torch.ones(29).index_fill(0, torch.arange(6, 9), 0)
        tokens = self.block(tokens * keep[:, None])  # 0 or -0
        return self.out(tokens[:, 9:]).transpose(1, 2).unflatten(2, (4, 5))


@pytest.mark.parametrize("stream, first, grid", [("image", 9, (4, 5)), ("text", 0, (6,))])
def test_streams_of_attention_that_is_written_out(stream, first, grid):
    torch.manual_seed(0)
    model, x, text, seen = Joint(), torch.randn(2, 3, 4, 5), torch.randn(2, 6, 8), []
    model.block.register_forward_hook(lambda module, input, output: seen.append(output))
    with (
        torch.no_grad(),
        HookedDiffusionModel(model, Euler()).cache("block", 2, stream=stream) as cache,
    ):
        Euler().step(model(x, 1.0, text), 1.0, x)
    n = torch.Size(grid).numel()
    assert cache["grid"]["block"] == grid
    assert torch.equal(cache["output"]["block"][:, 0], seen[-1][:, first : first + n])


def test_a_step_that_does_not_fit_the_plan_is_an_error():
    """Edits of conditional rows where guidance sets in after the first step."""

    torch.manual_seed(0)
    model, scheduler = Denoiser(), Euler()
    hooked = HookedDiffusionModel(model, scheduler)
    x0, text = torch.randn(2, 3, 4, 5), torch.randn(2, 5)

    def late_guidance(prompt=None):
        x = x0
        for t in (9.0, 5.0):
            if t == 9.0:
                x = scheduler.step(model(x, t, text), t, x)
            else:
                uncond, cond = model(torch.cat([x, x]), t, torch.cat([0 * text, text])).chunk(2)
                x = scheduler.step(uncond + 4 * (cond - uncond), t, x)

    hooked.pipe = late_guidance
    with pytest.raises(ValueError, match="step 1 are not those of the first"):
        hooked.run_with_hooks({"mix": Edit(lambda x: 2 * x)}, ["a", "b"])
    hooked.run_with_hooks({"mix": Edit(lambda x: 2 * x, rows="all")}, ["a", "b"])


def test_guidance_weights_are_exact():
    g = torch.Generator().manual_seed(0)
    u, c, other = torch.randn(3, 3, 8, 8, 8, generator=g)

    def check(chunks, model_output, expected, certain=None, sample=None):
        weights, found = guidance_weights(chunks, model_output, sample)
        assert weights == pytest.approx(expected, abs=1e-6) and found == (
            certain or [True] * len(chunks)
        )

    check([u, c], u + 5 * (c - u), [-4, 5])
    check([c, u], -(u + 5 * (c - u)), [-5, 4])
    check([u, c], (u + 5 * (c - u))[:, :4], [-4, 5])
    check([u, u], u, [0.5, 0.5], [False, False])
    check([other, other, u, c], u + 5 * (c - u), [0, 0, -4, 5], [False, False, True, True])
    check([other[:, :4], u], u, [0, 1], [False, True])

    u, c, other = u.double(), c.double(), other.double()
    rows = torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1, 1)
    noise = u + 5 * (c - u)
    for sample in (other, other + 30 * u):  # the second is nearly the noise
        check([u, c], noise, [-4, 5], sample=sample)
        check([u, c], (sample - 0.6 * noise) / 0.8, [3, -3.75], sample=sample)
        check([u, c], noise + rows * sample, [-4, 5], sample=sample)
    check([u, c], noise, [-4, 5], sample=rows * c)  # a prediction that is a multiple of the sample


def test_tokens_are_in_raster_order():
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert by_token(x, 2, "map")[1, 2 * 5 + 3].tolist() == x[1, :, 2, 3].tolist()
    frames = torch.arange(6 * 3 * 4 * 5).reshape(6, 3, 4, 5)  # 2 rows of 3 frames
    assert (
        by_token(frames, 2, "map")[1, (2 * 4 + 1) * 5 + 4].tolist() == frames[5, :, 1, 4].tolist()
    )
    over_time = torch.arange(2 * 20 * 3 * 7).reshape(
        40, 3, 7
    )  # 2 rows of 4 x 5 places, each with 3 frames
    assert (
        by_token(over_time, 2, "frames")[1, (2 * 4 + 1) * 5 + 4].tolist()
        == over_time[20 + 9, 2].tolist()
    )
    heads = torch.arange(2 * 5 * 3 * 4).reshape(2, 5, 3, 4)
    assert by_token(heads, 2, "heads")[1, 2].tolist() == heads[1, 2].flatten().tolist()
    assert torch.equal(
        by_token(heads.transpose(1, 2), 2, "heads first"), by_token(heads, 2, "heads")
    )


# -------------------------------------------------------------------------- a denoiser of one's own


class Euler:
    """A hand-written scheduler: x' = x - step size x prediction."""

    def step(self, prediction, timestep, sample):
        return sample - 0.1 * prediction


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.text = torch.nn.Linear(5, 6)
        self.out = torch.nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x, t, text):
        return self.out((self.mix(x) * (1 + t / 10) + self.text(text)[..., None, None]).tanh())


@pytest.mark.parametrize("order", ["uncond first", "cond first"])
@pytest.mark.parametrize("forwards", [1, 2])
def test_a_loop_of_ones_own(order, forwards):
    torch.manual_seed(0)
    model, scheduler = Denoiser(), Euler()
    hooked = HookedDiffusionModel(model, scheduler)
    text = {"cond": torch.randn(3, 5), "uncond": torch.zeros(3, 5)}
    names = ["uncond", "cond"] if order == "uncond first" else ["cond", "uncond"]
    seen = {"cond": [], "uncond": []}
    x = torch.randn(3, 3, 4, 5)
    with torch.no_grad(), hooked.cache(["mix", "out"], 3, rows="both", save_input=True) as cache:
        for t in (9.0, 5.0, 1.0):
            if forwards == 2:
                out = {n: model(x, t, text=text[n]) for n in names}
            else:
                out = dict(
                    zip(
                        names,
                        model(torch.cat([x, x]), t, torch.cat([text[n] for n in names])).chunk(2),
                    )
                )
            for n in names:
                seen[n].append(out[n].flatten(2).transpose(1, 2))
            x = scheduler.step(out["uncond"] + 4 * (out["cond"] - out["uncond"]), t, x)
    assert torch.equal(cache["output"]["out"], torch.stack(seen["cond"], 1))
    assert torch.equal(cache["output_uncond"]["out"], torch.stack(seen["uncond"], 1))
    assert cache["timesteps"]["mix"].tolist() == [9.0, 5.0, 1.0]
    assert cache["grid"]["mix"] == (4, 5)
    assert Euler.step.__qualname__ == "Euler.step"


def test_the_built_in_loop_gives_the_pipelines_images():
    pipe = build(sd15)

    def encode_prompt(
        prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt
    ):
        return pipe.encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt
        )

    hooked = HookedDiffusionModel(pipe.unet, pipe.scheduler, encode_prompt, vae=pipe.vae)
    options = dict(num_inference_steps=3, guidance_scale=5.0)
    for output_type, tolerance in (("latent", 0), ("pt", 1e-6)):
        latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        expected = pipe(
            PROMPTS[:2], latents=latents, output_type=output_type, height=32, width=32, **options
        ).images
        output, cache = hooked.run_with_cache(
            HOOK, PROMPTS[:2], latents=latents, output_type=output_type, **options
        )
        assert torch.allclose(output.images, expected, atol=tolerance, rtol=0)
        assert cache["output"][HOOK].shape == (2, 3, 64, 16)


def test_a_denoiser_without_prompts():
    torch.manual_seed(0)
    unet = torch.nn.Module()
    unet = type("Plain", (torch.nn.Module,), {"forward": lambda self, x, t: self.conv(x)})()
    unet.conv = torch.nn.Conv2d(3, 3, 1)
    hooked = HookedDiffusionModel(
        unet, Euler(), get_timesteps=lambda n, device: range(n, 0, -1), sample_shape=(3, 4, 4)
    )
    output, cache = hooked.run_with_cache(
        "conv", num_inference_steps=4, batch_size=2, generator=torch.Generator().manual_seed(0)
    )
    assert output.images.shape == (2, 3, 4, 4) and cache["output"]["conv"].shape == (2, 4, 16, 3)
    with pytest.raises(ValueError, match="sample_shape"):
        HookedDiffusionModel(unet, Euler(), get_timesteps=lambda n, device: range(n))()


def test_a_zero_last_layer_is_no_reason_to_guess():
    pipe = build(sd15)
    torch.nn.init.zeros_(pipe.unet.conv_out.weight)
    with (
        pytest.raises(ValueError, match="can't tell conditional"),
        HookedDiffusionModel.from_pipeline(pipe).cache(HOOK, 1),
    ):
        pipe(PROMPTS[:1], **generate_options(1))
    _, one = run(
        pipe, PROMPTS[:1]
    )  # another prompt changes conditional rows, whatever is predicted of them
    _, other = run(pipe, PROMPTS[1:2])
    assert torch.equal(one["output_uncond"][HOOK], other["output_uncond"][HOOK])
    assert not torch.equal(one["output"][HOOK], other["output"][HOOK])
    _, cache = run(
        pipe
    )  # with two prompts the conditioning tells: the unconditional one is the same for both
    _, after = run(pipe, [PROMPTS[0], PROMPTS[2]])
    assert torch.equal(cache["output_uncond"][HOOK], after["output_uncond"][HOOK])


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_weak_guidance_is_labelled_by_the_conditioning(scale):
    torch.manual_seed(0)
    model, x = Denoiser(), torch.randn(2, 3, 4, 5)
    text = torch.cat([torch.zeros(2, 5), torch.randn(2, 5)])

    def sample(n):
        with torch.no_grad(), HookedDiffusionModel(model, Euler()).cache("out", n) as cache:
            uncond, cond = model(
                torch.cat([x[:n], x[:n]]), 1.0, torch.cat([text[:n], text[2 : 2 + n]])
            ).chunk(2)
            Euler().step(uncond + scale * (cond - uncond), 1.0, x[:n])
        return cache["output"]["out"], cond

    kept, cond = sample(2)
    assert torch.equal(kept[:, 0], cond.flatten(2).transpose(1, 2))
    if scale == 0.3:
        with pytest.raises(ValueError, match="between 0 and 1"):
            sample(1)


def test_unconditional_rows_in_part_of_the_steps_have_their_own_timesteps():
    torch.manual_seed(0)
    model, x = Denoiser(), torch.randn(2, 3, 4, 5)
    text = torch.cat([torch.zeros(2, 5), torch.randn(2, 5)])

    def sample(rows):
        with (
            torch.no_grad(),
            HookedDiffusionModel(model, Euler()).cache("out", 2, rows=rows) as cache,
        ):
            for t in (9.0, 5.0, 1.0):
                both = t < 9
                out = model(torch.cat([x, x]) if both else x, t, text if both else text[2:])
                Euler().step(out[:2] + 4 * (out[2:] - out[:2]) if both else out, t, x)
        return cache

    assert sample("cond")["timesteps"]["out"].tolist() == [9.0, 5.0, 1.0]
    uncond = sample("uncond")
    assert (
        uncond["timesteps"]["out"].tolist() == [5.0, 1.0] and uncond["output"]["out"].shape[1] == 2
    )
    with pytest.raises(ValueError, match="part of the steps"):
        sample("both")


def test_two_denoisers_have_long_names():
    pipe = build(sd15)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    hooked.denoisers = {"unet": pipe.unet, "unet_2": tiny_unet()}
    assert hooked.hook_names(f"unet_2.{HOOK}") == [f"unet_2.{HOOK}"]
