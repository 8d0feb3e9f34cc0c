"""Grafts and mean ablations against hooks as anybody would write them, and the numbers made of them
by hand."""

import json
from functools import partial
from typing import NamedTuple

import pytest
import torch
from families import RECIPES, flux, qwenimage, sd3, wan22
from PIL import Image
from test_families import BY_HAND
from tiny import PROMPTS, build, generate_options, sd15

import evaluate
from analysis.plots import GRAFT_ROWS, plot_graft
from diffusion.generate import generate
from evaluate import graft
from hook import Edit, Generation, HookedDiffusionModel
from sae import Sae
from store.disk import checksum
from store.hook_point import HookPoint, trained_on

pytestmark = pytest.mark.slow


class Hand(NamedTuple):
    """What is known of a pipeline: a hook point, which of what it returns are image and text
    tokens, the chunks of a step."""

    hook_name: str
    image: int
    text: int | None
    order: str  # of unconditional and conditional rows; a space stands between forwards
    d: int


HANDS = {
    sd15: Hand("up_blocks.0.attentions.1", 0, None, "uc", 16),
    sd3: Hand("transformer_blocks.0", 1, 0, "uc", 32),
    flux: Hand("transformer_blocks.0", 1, 0, "c u", 32),
}
PLACES = [(sd15, "image"), (sd3, "image"), (sd3, "text"), (flux, "image"), (flux, "text")]
P, S = 3, 3  # prompts and steps
SEEDS = [4, 5, 6]


def options_of(recipe, n=P, **options):
    options = generate_options(n, recipe, num_inference_steps=S, **options)
    return {name: value for name, value in options.items() if name not in ("prompt", "generator")}


def by_hand(pipe, recipe, change, stream="image", **options):
    """Final latents of the pipeline with `change(role, step, x (P, tokens, d), before)` or None at
    the hook point."""
    hand = HANDS[recipe]
    calls = []
    forwards = hand.order.split()
    index = getattr(hand, stream)

    def hook(module, args, output):
        step, position = divmod(len(calls), len(forwards))
        calls.append(None)

        def tokens(x):
            return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x

        x = output[index]
        before = args[0] if args else None
        chunks = []
        for c, role in enumerate(forwards[position]):
            rows = slice(c * P, (c + 1) * P)
            new = change(
                role, step, tokens(x)[rows], None if before is None else tokens(before)[rows]
            )
            chunks.append(tokens(x)[rows] if new is None else new)
        new = torch.cat(chunks)
        out = torch.empty_like(x)
        out.copy_(new.transpose(1, 2).reshape(x.shape) if x.ndim == 4 else new)
        return tuple(out if i == index else y for i, y in enumerate(output))

    denoiser = next(iter(HookedDiffusionModel.from_pipeline(pipe).denoisers.values()))
    handle = denoiser.get_submodule(hand.hook_name).register_forward_hook(hook)
    try:
        with torch.no_grad():
            generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
            return pipe(
                prompt=PROMPTS[:P], generator=generators, **options_of(recipe, **options)
            ).images
    finally:
        handle.remove()


def run(pipe, recipe, sae, stream="image", side="output", **options):
    generation = Generation(PROMPTS[:P], SEEDS, options=options.pop("options", options_of(recipe)))
    keys = dict(windows=[range(1), range(1, S)], batch_size=2) | options
    model = HookedDiffusionModel.from_pipeline(pipe)
    point = HookPoint(HANDS[recipe].hook_name, side, stream, padding=stream == "text")
    return graft(model, sae, point, generation, **keys)


def perfect(d, activation="topk", k=None):
    """An SAE that loses nothing: its latents are each number's positive and negative part."""
    sae = Sae(d, 2 * d, k or 2 * d, {"activation": activation})
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.W_dec.data.copy_(both)
    sae.encoder.weight.data.copy_(both)
    return sae


def constant(mean):
    """An SAE that never says but one thing."""
    sae = Sae(len(mean), 2 * len(mean), 1)
    sae.encoder.bias.data.fill_(-1e9)
    sae.b_dec.data.copy_(mean)
    return sae


def lossy(d):
    """An SAE that changes what it gets."""
    return Sae(d, 4 * d, 2, seed=1)


# ------------------------------------------------------------------------------------- in the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["output", "diff"])
@pytest.mark.parametrize("recipe, stream", PLACES)
def test_the_identity_changes_no_bit(recipe, stream, side, dtype):
    pipe = build(recipe).to(dtype)
    seen = []

    def identity(x):
        seen.append(x.dtype)
        return x

    hooked = HookedDiffusionModel.from_pipeline(pipe)
    name = HANDS[recipe].hook_name
    if recipe is sd15 and side == "diff":
        # its output is far from its input: output - input + input is another number
        name += ".transformer_blocks.0.attn1"

    def replacement(role, step, x):
        return evaluate.reconstruct(identity, x, stream)

    make_edits = partial(
        evaluate.grafting_edits, HookPoint(name, side, stream), replacement, "both", None
    )
    made = generate(hooked, Generation(PROMPTS[:P], SEEDS, options=options_of(recipe)), make_edits)
    assert torch.equal(made.sample, by_hand(pipe, recipe, lambda *x: None))
    assert set(seen) == {torch.float32}
    assert len(seen) == P * S * 2


@pytest.mark.parametrize("rows", ["cond", "both"])
@pytest.mark.parametrize("recipe, stream", PLACES)
def test_windows_and_rows_are_those_of_a_hand_written_hook(recipe, stream, rows):
    """The graft and the mean ablation of every window; other steps, and by default unconditional
    rows, are left alone."""
    pipe = build(recipe)
    sae = lossy(HANDS[recipe].d)
    roles = ("c",) if rows == "cond" else ("c", "u")
    seen = {}
    untouched = by_hand(
        pipe, recipe, lambda role, step, x, _: seen.update({(role, step): x.clone()}), stream
    )
    means = {key: x.double().mean((0, 1)).float() for key, x in seen.items()}
    report, pictures = run(pipe, recipe, sae, stream, rows=rows)
    assert pictures is None
    assert [w["steps"] for w in (report["all"], *report["windows"])] == [
        [0, 2],
        [0, 0],
        [1, 2],
    ]
    distances = []
    for window in (report["all"], *report["windows"]):
        steps = range(window["steps"][0], window["steps"][1] + 1)
        for mode, new in (
            ("graft", lambda role, step, x: sae(x.flatten(0, 1)).view_as(x)),
            ("mean", lambda role, step, x: means[role, step].expand_as(x)),
        ):

            def change(role, step, x, _, new=new, steps=steps):
                return new(role, step, x) if role in roles and step in steps else None

            moved = (
                (by_hand(pipe, recipe, change, stream) - untouched)
                .flatten(1)
                .square()
                .mean(1)
                .sqrt()
            )
            assert moved.min() > 1e-5
            assert window["latents"][mode] == pytest.approx(moved.mean().item(), rel=1e-3)
            assert window["latents"][f"{mode}_se"] == pytest.approx(
                moved.std().item() / P**0.5, rel=2e-2, abs=1e-7
            )
            distances.append(window["latents"][mode])
        record = window["latents"]
        assert record["recovered"] == pytest.approx(1 - record["graft"] / record["mean"])
    assert len(set(distances)) == 6


def test_the_difference_is_added_to_what_the_module_takes():
    pipe = build(sd15)
    sae = lossy(16)
    seen = {}

    def note(role, step, x, before):
        seen[role, step] = x - before

    untouched = by_hand(pipe, sd15, note)
    report, _ = run(pipe, sd15, sae, side="diff")
    for mode, new in (
        ("graft", lambda step, x, before: before + sae((x - before).flatten(0, 1)).view_as(x)),
        ("mean", lambda step, x, before: before + seen["c", step].mean((0, 1))),
    ):
        change = lambda role, step, x, before: new(step, x, before) if role == "c" else None  # noqa: B023
        moved = (
            (by_hand(pipe, sd15, change) - untouched)
            .flatten(1)
            .square()
            .mean(1)
            .sqrt()
            .mean()
            .item()
        )
        assert report["all"]["latents"][mode] == pytest.approx(moved, rel=1e-3)
        assert moved > 1e-4


@pytest.mark.parametrize(
    "activation, k", [("topk", None), ("batchtopk", None), ("sampletopk", 64 * 32)]
)
def test_a_perfect_sae_recovers_all_and_the_mean_nothing(activation, k):
    pipe = build(sd15)
    seen = {}
    report, _ = run(pipe, sd15, perfect(16, activation, k))
    for window in (report["all"], *report["windows"]):
        assert window["latents"]["recovered"] == pytest.approx(1, abs=1e-4)
        assert window["latents"]["mean"] > 1e-4
    by_hand(pipe, sd15, lambda role, step, x, _: seen.update({(role, step): x.clone()}))
    report, _ = run(pipe, sd15, constant(seen["c", 0].mean((0, 1))))
    first, rest = (window["latents"]["recovered"] for window in report["windows"])
    assert first == pytest.approx(0, abs=1e-3)
    assert abs(rest) > 1e-2  # it is the mean of the first step alone


def test_an_sae_gets_whole_samples_one_at_a_time():
    shapes = []

    def fake(x):
        shapes.append(tuple(x.shape))
        return x

    run(build(sd15), sd15, fake)
    assert set(shapes) == {(1, 64, 16)}
    assert len(shapes) == P * S * 2  # in all steps, and in each step of the windows


@pytest.mark.parametrize("recipe", [*RECIPES, wan22], ids=lambda recipe: recipe.__name__)
def test_every_family(recipe):
    """Each prompt is compared with itself, whatever is stepped; where denoisers take turns, windows
    are of one's steps."""
    options = generate_options(2, recipe)
    prompts = options.pop("prompt", None) or ["1", "7"]
    options = {
        name: value
        for name, value in options.items()
        if name not in ("generator", "class_labels", "batch_size")
    }
    name = "transformer_2.blocks.1" if recipe is wan22 else BY_HAND[recipe.__name__].hook_name
    hooked = HookedDiffusionModel.from_pipeline(build(recipe))
    windows = 1 if recipe is wan22 else 2
    generation = Generation(prompts, [1, 2], options=options)
    report, pictures = graft(
        hooked, lambda x: 0.9 * x, HookPoint(name), generation, windows, batch_size=1
    )
    assert (pictures is None) == (options["output_type"] == "latent")
    assert len(report["windows"]) == windows == report["num_steps"]
    assert len(generate(hooked, generation).sample) == 2
    for window in (report["all"], *report["windows"]):
        record = window["latents"]
        assert min(record["graft"], record["mean"], record["graft_se"]) > 0
        assert record["recovered"] < 1
        assert window["steps"] == ([1, 1] if recipe is wan22 else window["steps"])


def test_padding_of_text_is_in_no_mean_and_in_no_reconstruction():
    pipe = build(qwenimage)
    counts = []
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    name = "transformer_blocks.0"
    options = options_of(qwenimage)
    prompts = PROMPTS[:P]

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in SEEDS]

    _, cache = hooked.run_with_cache(
        name, prompts, stream="text", save_input=True, generator=generators(), **options
    )
    x = cache["output"][name] - cache["input"][name]
    lengths = cache["lengths"][name].tolist()
    assert lengths == [len(prompt) for prompt in prompts]

    def half(x):
        counts.append(x.shape[1])
        return x / 2

    generation = Generation(prompts, SEEDS, options=options)
    report, _ = graft(hooked, half, HookPoint(name, "diff", "text"), generation, windows=[])
    assert counts[:P] == lengths
    assert len(counts) == P * S

    def latents(edits):
        with hooked.watch(P) as sampling:
            hooked.run_with_hooks(
                {name: edits} if edits else {}, prompts, generator=generators(), **options
            )
        return sampling.sample

    means = [torch.cat([x[p, s, :n] for p, n in enumerate(lengths)]).mean(0) for s in range(S)]

    def add(mean):
        # To the input: the next layer would norm away the size of an output alone.
        return lambda x, before: before + mean

    edits = []
    for step, mean in enumerate(means):
        edits.append(Edit(add(mean), stream="text", steps=[step], with_input=True))
    moved = (latents(edits) - latents([])).flatten(1).square().mean(1).sqrt().mean().item()
    assert report["all"]["latents"]["mean"] == pytest.approx(moved, rel=1e-3)
    assert moved > 1e-5


@pytest.mark.parametrize("stream", ["image", "text"])
def test_what_a_module_takes_is_grafted(stream):
    """As if the module before, which returns the same tokens, was."""
    reports = []
    for name, side in (("transformer_blocks.1", "input"), ("transformer_blocks.0", "output")):
        model = HookedDiffusionModel.from_pipeline(build(sd3))
        generation = Generation(PROMPTS[:P], SEEDS, options=options_of(sd3))
        point = HookPoint(name, side, stream)
        report, _ = graft(model, lambda x: x / 2, point, generation, windows=1)
        reports.append(report["all"])
    assert reports[0] == reports[1] and reports[0]["latents"]["graft"] > 0
    model = HookedDiffusionModel.from_pipeline(build(sd3))
    point = HookPoint("transformer_blocks.1", "input", stream)
    report, _ = graft(model, lambda x: x, point, generation, windows=1)
    assert report["all"]["latents"]["graft"] == 0 < report["all"]["latents"]["mean"]


def test_it_says_how_many_generations_there_are_and_how_long_they_take(capsys):
    run(build(sd15), sd15, perfect(16))
    printed = capsys.readouterr().out
    assert f"7 generations of each of {P} prompts: 1 untouched, and 2 for all steps" in printed
    assert "the others will take about" in printed


def test_a_time_is_read_in_its_unit():
    assert [evaluate.duration(s) for s in (3.4, 210, 7560)] == ["3 s", "3.5 min", "2.1 h"]


def test_where_the_mean_moves_nothing_there_is_no_share():
    pipe = build(sd15)
    torch.nn.init.zeros_(pipe.unet.get_submodule(HANDS[sd15].hook_name).proj_out.weight)
    torch.nn.init.zeros_(pipe.unet.get_submodule(HANDS[sd15].hook_name).proj_out.bias)
    report, _ = run(pipe, sd15, lambda x: x + 0.1, side="diff")
    for window in (report["all"], *report["windows"]):
        record = window["latents"]
        assert record["mean"] == 0
        assert record["graft"] > 0
        assert record["recovered"] is record["recovered_se"] is None


def test_what_can_not_be_grafted_is_said():
    pipe = build(sd15)
    for options, match in (
        (dict(side="sideways"), "side: expected output"),
        (dict(rows="all"), "rows: expected cond"),
        (dict(windows=4), "4 windows of 3 steps"),
        (dict(windows=[range(7, 9)]), "none of the window"),
        (dict(batch_size=0), "expected at least 1"),
        (dict(rows="both", options=options_of(sd15, guidance_scale=1.0)), "no unconditional rows"),
    ):
        with pytest.raises(ValueError, match=match):
            run(pipe, sd15, perfect(16), **options)
    with pytest.raises(ValueError, match="width 8, and this hook point has width 16"):
        run(pipe, sd15, perfect(8))
    with pytest.raises(ValueError, match="there is no difference"):
        generation = Generation(PROMPTS, SEEDS, options=options_of(sd15))
        graft(
            HookedDiffusionModel.from_pipeline(pipe),
            perfect(16),
            HookPoint("down_blocks.0", "diff"),
            generation,
            1,
        )


# -------------------------------------------------------------------------------------- the numbers


def test_windows_by_hand():
    assert evaluate.equal_windows(list(range(10)), 4) == [
        range(0, 2),
        range(2, 5),
        range(5, 7),
        range(7, 10),
    ]
    assert evaluate.equal_windows([3, 4, 5, 6], 2) == [range(3, 5), range(5, 7)]


def test_the_record_by_hand():
    record = evaluate.compare(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0]))
    expected = dict(graft=2, graft_se=1, mean=4, mean_se=0, recovered=0.5, recovered_se=0.25)
    assert record == pytest.approx(expected)
    paired = evaluate.compare(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([2.0, 6.0, 4.0]))
    # of each prompt exactly half
    assert (paired["recovered"], paired["recovered_se"]) == pytest.approx((0.5, 0))
    one = evaluate.compare(torch.tensor([1.0]), torch.tensor([4.0]))
    assert one == dict(
        graft=1, graft_se=None, mean=4, mean_se=None, recovered=0.75, recovered_se=None
    )
    assert (
        evaluate.compare(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.1]), floor=0.2)["recovered"]
        is None
    )
    broken = evaluate.compare(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 1.0]))
    assert broken["graft"] is broken["recovered"] is None
    assert json.dumps(broken, allow_nan=False)


def test_the_standard_error_is_that_of_samples_of_prompts():
    torch.manual_seed(0)
    # 4000 experiments of 50 prompts, some of which move more than others
    size = torch.rand(4000, 50) + 0.5
    grafts = size * (0.3 + 0.1 * torch.randn(4000, 50))
    means = size
    records = [evaluate.compare(g, m) for g, m in zip(grafts, means)]
    spread = torch.tensor([r["recovered"] for r in records]).std().item()
    assert torch.tensor([r["recovered_se"] for r in records]).mean().item() == pytest.approx(
        spread, rel=0.05
    )


def test_where_an_sae_belongs(tmp_path):
    """Its hook point is that of all its training files, or it is refused."""
    meta = {"hook_name": "mid_block", "side": "diff", "stream": "text", "rows": "uncond"}
    for name, changed in (("a", {}), ("b", {}), ("c", {"side": "output"})):
        other_model = meta | changed | {"model": "toy"}
        (tmp_path / f"{name}.json").write_text(
            json.dumps(other_model | {"checksum": checksum(other_model)})
        )

    def sae(*names):
        return Sae(4, 8, 2, {"data": [str(tmp_path / f"{name}.npy") for name in names]})

    assert trained_on(sae("a", "b")) == HookPoint(**meta, padding=True)
    for names, match in (
        ("ac", "files of several hook points"),
        ("d", "d.json is not there"),
        ("", "names no activation file"),
    ):
        with pytest.raises(ValueError, match=match):
            trained_on(sae(*names))


def test_a_report_and_its_picture(tmp_path):
    pipe = build(sd15)
    seen = []
    options = options_of(sd15, output_type="pt", negative_prompt=["blurry", "dark", "cut"])

    def clip(a, b):
        seen.append(a)
        return evaluate.rms(a, b)

    report, pictures = run(pipe, sd15, lossy(16), options=options, num_shown=2, clip=clip)
    untouched = pipe(
        PROMPTS[:P], generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], **options
    ).images
    assert torch.allclose(pictures["untouched"], untouched[:2], atol=1e-5)
    assert all(x.shape == (2, 3, 32, 32) for x in pictures.values())
    assert list(pictures) == list(GRAFT_ROWS)
    _, more = run(pipe, sd15, lossy(16), options=options, num_shown=8)
    assert all(
        x.shape == (3, 3, 32, 32) and torch.equal(x[:2], pictures[name]) for name, x in more.items()
    )
    for mode in ("graft", "mean"):  # the pictures are those of all steps
        moved = evaluate.rms(more[mode], more["untouched"]).mean().item()
        assert moved == pytest.approx(report["all"]["images"][mode], rel=1e-6)
    assert pictures["graft"].ne(pictures["untouched"]).any()
    assert pictures["mean"].ne(pictures["graft"]).any()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for window in (report["all"], *report["windows"]):
        assert window["images"] == window["clip"] != window["latents"]
        assert 0 < window["images"]["graft"] < 1
    assert report["all"]["timesteps"] == [
        float(t) for t in (pipe.scheduler.timesteps[0], pipe.scheduler.timesteps[-1])
    ]
    sizes = []
    report["windows"][0]["latents"] |= {"recovered": None, "recovered_se": None}
    for name, shown in (("with", pictures), ("without", None)):
        plot_graft(tmp_path / f"{name}.png", report, shown)
        sizes.append(Image.open(tmp_path / f"{name}.png").size)
    assert sizes[0][0] == sizes[1][0] > 1000
    assert sizes[0][1] > sizes[1][1] + 400 > 800


def test_clip_is_used_where_it_is_and_its_absence_said(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    distance, line = evaluate.clip_distance(str(tmp_path / "nowhere"))
    assert distance is None
    assert line.startswith("no CLIP distance")
    assert "not on this machine" in line
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = small | dict(image_size=16, patch_size=8)
    text = small | dict(vocab_size=50)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        tmp_path
    )
    distance, line = evaluate.clip_distance(str(tmp_path))
    a, b = torch.rand(2, 2, 3, 32, 32)
    assert distance(a, a).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert line.startswith("CLIP distance")
    assert distance(a, b).min() > 1e-4
    assert distance(a, b).shape == (2,)
