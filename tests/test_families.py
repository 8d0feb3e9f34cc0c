"""Every kind of pipeline: rows, tokens, streams and edits, against what is written down here about
each by hand."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from families import EXTRAS, RECIPES, animatediff, controlnet, kandinsky22, svd, wan22
from tiny import PROMPTS, build, called_with, generate_options

import hook
from hook import Edit, HookedDiffusionModel, NotHookable

pytestmark = pytest.mark.slow

FOLDER = Path(hook.__file__).parent


class Hand(NamedTuple):
    """What is known of a family: a module, and where the tokens are in what it returns."""

    hook_name: str
    order: str  # of the chunks of a batch; a space stands between forwards
    grid: tuple
    image: tuple  # index into what the module returns (None: that is the tensor), tokens
    text: tuple | None = None


def whole(index=None):
    return index, slice(None)


def after_text(x, words):
    """Lumina2 puts the tokens of a row right behind its text, of which an empty one has none."""
    start = len(words) + len(" <Prompt Start> ") if words else 0
    return x[start : start + 12]


def unpadded(x, words):
    """A mask among the denoiser's arguments cuts off the padding of the batch."""
    return x[: len(words)]


BY_HAND = {
    "toy": Hand("up_blocks.1.attentions.1", "uc", (16, 16), whole(0)),
    "sd15": Hand("up_blocks.0.attentions.1", "uc", (8, 8), whole(0)),
    "sdxl": Hand("up_blocks.0.attentions.1", "uc", (8, 8), whole(0)),
    "sd3": Hand("transformer_blocks.0", "uc", (3, 4), whole(1), whole(0)),
    "flux": Hand("single_transformer_blocks.0", "c u", (3, 4), whole(1), whole(0)),
    "pixart": Hand("transformer_blocks.1", "uc", (4, 6), whole()),
    "dit": Hand("transformer_blocks.1", "cu", (4, 4), whole()),
    "ddpm": Hand("mid_block.attentions.0", "c", (4, 6), whole()),
    "wan": Hand("blocks.1", "c u", (3, 2, 4), whole()),
    "ltx": Hand("transformer_blocks.1", "uc", (3, 2, 4), whole()),
    "cogvideox": Hand("transformer_blocks.1", "uc", (3, 2, 4), whole(0), whole(1)),
    "stable_audio": Hand(
        "transformer_blocks.1", "uc", (12,), (None, slice(1, None)), (None, slice(1))
    ),
    "zimage": Hand(
        "layers.1",
        "cu",
        (6, 8),
        (None, slice(48)),
        (None, lambda x, words: x[64 : 64 + len(words) + 2]),
    ),
    "lumina2": Hand(
        "layers.1", "c u", (3, 4), (None, after_text), (None, lambda x, words: x[: len(words) + 16])
    ),
    "hunyuanvideo": Hand("single_transformer_blocks.0", "c u", (3, 2, 4), whole(0), (1, unpadded)),
    "qwenimage": Hand("transformer_blocks.0", "c u", (3, 4), whole(1), (0, unpadded)),
}


@called_with()
def toy():
    return HookedDiffusionModel.from_pretrained("toy").pipe


class Case:
    """A tiny pipeline, its hooks, and what is known of it by hand."""

    def __init__(self, recipe):
        self.recipe, self.pipe, self.by_hand = recipe, build(recipe), BY_HAND.get(recipe.__name__)
        self.hooked = HookedDiffusionModel.from_pipeline(self.pipe)

    def arguments(self, n, prompts=None, **options):
        """(prompt, other arguments) of n prompts; `prompts` are theirs where the pipeline takes
        any."""
        options = generate_options(n, self.recipe, **options)
        own = options.pop("prompt", None)
        return (own if own is None or prompts is None else prompts), options

    def cache(self, hook_names, n=3, prompts=None, change=False, keep=None, **options):
        prompt, options = self.arguments(n, prompts, **options)
        if change and prompt is not None:
            prompt = [
                prompt[0],
                prompt[1].replace("waves", "caves"),
                *prompt[2:],
            ]  # as long as before: some pad to the longest
        elif change and "image" in options:
            options["image"][1] = options["image"][1].rotate(45)
        elif change and "class_labels" in options:
            options["class_labels"][1] = 7
        elif change:
            options["generator"][1].manual_seed(77)
        return self.hooked.run_with_cache(hook_names, prompt, **(keep or {}), **options)

    def sample(self, edits=None, n=3, **options):
        prompt, options = self.arguments(n, **options)
        with self.hooked.watch() as sampling:
            self.hooked.run_with_hooks(edits or {}, prompt, **options)
        return sampling.sample

    def seen_by_hand(self, place, n=3, order=None, prompts=None, **options):
        """{"c" or "u": one list a row of the tokens of each step}, from a hook as anybody would
        write it."""
        h, seen = self.by_hand, []
        name, (index, tokens) = h.hook_name, place

        def look(module, args, output):
            x = (output if index is None else output[index]).clone()
            seen.append(x.flatten(2).transpose(1, 2) if x.ndim > 3 else x)

        denoiser = next(iter(self.hooked.denoisers.values()))
        prompt, options = self.arguments(n, prompts, **options)
        handle = denoiser.get_submodule(name).register_forward_hook(look)
        try:
            self.hooked(prompt, **options)
        finally:
            handle.remove()
        forwards = (order or h.order).split()
        rows = {role: [] for role in "cu"}
        for step in zip(*[iter(seen)] * len(forwards)):
            for x, roles in zip(step, forwards):
                for role, chunk in zip(roles, x.chunk(len(roles))):
                    words = (prompt if role == "c" and prompt else [""]) * len(chunk)
                    take = tokens if callable(tokens) else lambda row, words: row[tokens]
                    rows[role].append([take(row, w) for row, w in zip(chunk, words)])
        return {role: [list(steps) for steps in zip(*chunks)] for role, chunks in rows.items()}


CASES = [*RECIPES, toy]


@functools.cache
def shared(recipe):
    """The case of all tests that leave its pipeline as it is: later ones meet what earlier
    samplings left in it."""
    return Case(recipe)


@pytest.fixture(params=CASES, ids=lambda recipe: recipe.__name__)
def case(request):
    return shared(request.param)


def check(kept, expected):
    """kept (prompts, steps, tokens, d) equals `expected`, whose rows may have fewer tokens: the
    rest is padding."""
    assert len(kept) == len(expected)
    for row, steps in zip(kept, expected):
        assert len(row) == len(steps)
        for x, by_hand in zip(row, steps):
            assert torch.equal(x[: len(by_hand)], by_hand) and not x[len(by_hand) :].any()


def moved_by_a_change(case, guided):
    """Names of the modules in which changing prompt 2 changes anything at step 0: never but its own
    conditional rows."""
    keep = dict(rows="both" if guided else "cond", save_input=True)
    _, before = case.cache("**", keep=keep)
    _, after = case.cache("**", keep=keep, change=True)
    moved, starts = set(), {name: times[0] for name, times in before["timesteps"].items()}
    for side in {"input", "output", "input_uncond", "output_uncond"} & set(before):
        for name in [
            name for name in before[side] if starts[name] == max(starts.values())
        ]:  # the others run in later steps
            x = before[side][name]
            changed = (x[:, 0] != after[side][name][:, 0]).flatten(1).any(1).tolist()
            assert changed in (
                [False, False, False],
                [False, side in ("input", "output"), False],
            ), (side, name, changed)
            moved |= {name} if any(changed) else set()
    return moved


def test_changing_a_prompt_changes_its_rows_alone(case):
    moved = moved_by_a_change(case, guided="u" in case.by_hand.order)
    assert case.by_hand.hook_name in moved and len(moved) > 10


@pytest.mark.parametrize("recipe", EXTRAS, ids=lambda recipe: recipe.__name__)
def test_changing_a_prompt_changes_its_rows_alone_in_other_families(recipe):
    assert len(moved_by_a_change(shared(recipe), guided=True)) > 10


def test_the_cache_equals_a_hand_written_hook(case):
    h, prompts = case.by_hand, PROMPTS[:3]
    assert case.hooked.hook_names(h.hook_name) == [h.hook_name]
    _, cache = case.cache(
        h.hook_name, prompts=prompts, keep=dict(rows="both" if "u" in h.order else "cond")
    )
    expected = case.seen_by_hand(h.image, prompts=prompts)
    check(cache["output"][h.hook_name], expected["c"])
    if "u" in h.order:
        check(cache["output_uncond"][h.hook_name], expected["u"])
    else:
        with pytest.raises(ValueError, match="no unconditional rows"):
            case.cache(h.hook_name, keep=dict(rows="uncond"))
    assert cache["grid"][h.hook_name] == h.grid
    assert cache["output"][h.hook_name].shape[2] == torch.Size(h.grid).numel()
    assert cache["output"][h.hook_name].shape[1] == len(cache["timesteps"][h.hook_name]) == 2


def test_the_text_stream_is_the_text(case):
    h = case.by_hand
    if h.text is None:
        with pytest.raises(ValueError, match="no text tokens"):
            case.cache(h.hook_name, keep=dict(stream="text"))
        return
    _, cache = case.cache(h.hook_name, keep=dict(stream="text", keep_padding=True))
    expected = case.seen_by_hand(h.text)["c"]
    check(cache["output"][h.hook_name], expected)
    assert cache["lengths"][h.hook_name].tolist() == [len(steps[0]) for steps in expected]


def test_grids_of_all_modules_have_as_many_places_as_there_are_tokens(case):
    _, cache = case.cache("**")
    grids = {name: (cache["grid"][name], x.shape[2]) for name, x in cache["output"].items()}
    assert all(torch.Size(grid).numel() == tokens for grid, tokens in grids.values()), grids
    flat = {name for name, (grid, tokens) in grids.items() if len(grid) == 1 and tokens > 1}
    assert not flat or len(case.by_hand.grid) == 1, flat


@pytest.mark.parametrize("n", [1, 3])
def test_an_identity_edit_changes_no_bit(case, n):
    """Of all modules at once, in all rows, and of the text tokens too."""
    plain = case.sample(n=n)
    prompt, options = case.arguments(n)
    edits, touched = {}, set()
    for stream in ("image", "text"):
        layouts, _ = case.hooked.layouts("**", prompt, stream=stream, **options)
        for name, layout in layouts.items():
            if not isinstance(layout, NotHookable):
                edits.setdefault(name, []).append(
                    Edit(lambda x, name=name: touched.add(name), rows="all", stream=stream)
                )
                edits[name].append(Edit(lambda x: x.clone(), rows="all", stream=stream))
    assert torch.equal(case.sample(edits, n=n), plain) and touched == set(edits) and len(edits) > 10


@pytest.mark.parametrize("rows", ["cond", "uncond", "all"])
def test_an_edit_in_the_last_step_leaves_the_earlier_ones(case, rows):
    name = case.by_hand.hook_name
    edit = Edit(torch.zeros_like, rows=rows, steps=[1])
    if rows == "uncond" and "u" not in case.by_hand.order:
        with pytest.raises(ValueError, match="no unconditional rows to edit"):
            case.sample({name: edit})
        return
    _, plain = case.cache(name)
    prompt, options = case.arguments(3)
    after = "conv_out" if "conv_out" in case.hooked.modules() else name
    with case.hooked.cache([name, after], 3) as cache, case.hooked.watch() as sampling:
        case.hooked.run_with_hooks({name: edit}, prompt, **options)
    assert torch.equal(cache["output"][name][:, 0], plain["output"][name][:, 0])
    assert not torch.equal(sampling.sample, case.sample())


def test_an_edit_meets_the_rows_and_tokens_it_asks_for(case):
    """What `fn` gets in a conditional and in an unconditional edit is what the cache says, of
    either stream."""
    h, got = case.by_hand, {}
    roles = ["cond", "uncond"] if "u" in h.order else ["cond"]
    streams = (
        ["image", "text"] if h.text and case.recipe.__name__ != "lumina2" else ["image"]
    )  # its empty text has no token
    for role in roles:
        for stream in streams:
            kept = []
            case.sample(
                {
                    h.hook_name: Edit(
                        lambda x, kept=kept: kept.append(x.clone()), rows=role, stream=stream
                    )
                }
            )
            got[role, stream] = torch.stack(kept, 1)
    for stream in streams:
        _, cache = case.cache(
            h.hook_name, keep=dict(rows="both" if len(roles) > 1 else "cond", stream=stream)
        )
        for role, key in zip(roles, ("output", "output_uncond")):
            assert torch.equal(got[role, stream], cache[key][h.hook_name])


# ------------------------------------------ guidance, prompts and images a prompt, in five families

FIVE = [recipe for recipe in RECIPES if recipe.__name__ in ("sd15", "sdxl", "sd3", "flux", "wan")]


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.0])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("recipe", FIVE, ids=lambda recipe: recipe.__name__)
def test_rows_with_any_guidance_and_number_of_prompts(recipe, scale, n, images):
    case = shared(recipe)
    h = case.by_hand
    options = {"true_cfg_scale" if recipe.__name__ == "flux" else "guidance_scale": scale}
    per_prompt = "num_videos_per_prompt" if recipe.__name__ == "wan" else "num_images_per_prompt"
    options |= {per_prompt: images} if images > 1 else {}
    negative = ["ugly", "a long and blurry thing", "x"][:n]
    guided = scale > 1
    for more in ({}, {"negative_prompt": negative}):
        _, cache = case.cache(
            h.hook_name, n, keep=dict(rows="both" if guided else "cond"), **options | more
        )
        expected = case.seen_by_hand(h.image, n, order=h.order if guided else "c", **options | more)
        check(cache["output"][h.hook_name], expected["c"])
        assert len(cache["output"][h.hook_name]) == n * images
        if guided:
            check(cache["output_uncond"][h.hook_name], expected["u"])
            assert not torch.equal(
                cache["output"][h.hook_name], cache["output_uncond"][h.hook_name]
            )
        else:
            with pytest.raises(ValueError, match="no unconditional rows"):
                case.cache(h.hook_name, n, keep=dict(rows="uncond"), **options | more)


# -------------------------------------------------------------------- several denoisers, and frames


def test_a_denoiser_that_runs_in_part_of_the_steps_has_that_many():
    case = shared(wan22)
    names = ["transformer.blocks.0", "transformer_2.blocks.0"]
    with pytest.raises(ValueError, match="transformer.blocks.0 or transformer_2.blocks.0"):
        case.hooked.hook_names("blocks.0")
    _, cache = case.cache(names, num_inference_steps=3)
    steps = [cache["output"][name].shape[1] for name in names]
    assert sum(steps) == 3 and min(steps) > 0
    times = [cache["timesteps"][name].tolist() for name in names]
    assert times[0] + times[1] == [float(t) for t in case.pipe.scheduler.timesteps]
    prompt, options = case.arguments(3)
    dry = case.hooked.first_step(names, prompt, **options)
    assert set(dry["grid"]) == set(names)
    with case.hooked.cache(names, 3) as around:  # which sees nothing of the dry steps
        case.hooked.first_step(names, prompt, **options)
        case.hooked(prompt, **options)
    assert sum(around["output"][name].shape[1] for name in names) == 2
    plain = case.sample()
    for name in names:
        assert torch.equal(case.sample({name: Edit(lambda x: x.clone())}), plain)
        assert not torch.equal(case.sample({name: Edit(torch.zeros_like)}), plain)


def test_a_network_that_only_conditions_the_denoiser_is_none():
    case = shared(controlnet)
    _, cache = case.cache("**", keep=dict(rows="both"))
    assert (
        "up_blocks.0.attentions.1" in cache["output"]
        and "controlnet_down_blocks.0" not in cache["output"]
    )
    with pytest.raises(ValueError, match="controlnet, whose output does not reach the scheduler"):
        case.cache("controlnet_down_blocks.0")


def test_two_loops_in_one_call():
    case = shared(kandinsky22)
    _, cache = case.cache(
        ["prior_prior.transformer_blocks.0", "unet.mid_block"], keep=dict(rows="both")
    )
    assert cache["grid"] == {"transformer_blocks.0": (1,), "mid_block": (8, 12)}
    assert all(
        x.shape[:2] == (3, 2) for side in ("output", "output_uncond") for x in cache[side].values()
    )


@pytest.mark.parametrize("recipe", [animatediff, svd], ids=lambda recipe: recipe.__name__)
def test_frames_that_are_rows_inside(recipe):
    """A row's tokens are those of all its frames, in raster order."""
    case, seen = Case(recipe), []
    name = "up_blocks.0.attentions.0"
    case.pipe.unet.get_submodule(name).register_forward_hook(
        lambda m, i, o: seen.append(o[0].clone())
    )
    _, cache = case.cache(name)
    d, H, W = seen[0].shape[1:]
    by_hand = (
        seen[0].reshape(2, 3, 3, d, H, W).permute(0, 1, 2, 4, 5, 3).flatten(2, 4)
    )  # chunk, prompt, frame, d, H, W
    assert cache["grid"][name] == (3, H, W)
    assert torch.equal(cache["output"][name][:, 0], by_hand[1])


def test_tokens_of_layers_over_time_are_in_raster_order():
    """Inside a temporal layer the places are rows and the frames are tokens: (rows H W, frames,
    d)."""
    case, seen = Case(animatediff), []
    name = "up_blocks.0.motion_modules.0.transformer_blocks.0"
    case.pipe.unet.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o.clone()))
    _, cache = case.cache(name)
    H, W = cache["grid"][name][1:]
    by_hand = (
        seen[0].unflatten(0, (2, 3, H * W)).transpose(2, 3).flatten(2, 3)
    )  # chunk, prompt, frame and place, d
    assert cache["grid"][name] == (3, H, W) and seen[0].shape[:2] == (6 * H * W, 3)
    assert torch.equal(cache["output"][name][:, 0], by_hand[1])


def test_names_of_contexts_tell_where_predictions_do_not():
    """One prompt, and a last layer of zeros: conditional and unconditional predictions are the
    same."""
    case = Case(next(recipe for recipe in RECIPES if recipe.__name__ == "wan"))
    torch.nn.init.zeros_(case.pipe.transformer.proj_out.weight)
    _, cache = case.cache("blocks.1", n=1, keep=dict(rows="both"))
    expected = case.seen_by_hand(case.by_hand.image, n=1)
    check(cache["output"]["blocks.1"], expected["c"])
    check(cache["output_uncond"]["blocks.1"], expected["u"])


# -------------------------------------------------------------------------------- no family by name


def test_nothing_knows_a_family():
    """hook.py and what it imports name no pipeline, model class or family of diffusers."""
    import diffusers

    sources, found = [], ["hook", "diffusion.real_images"]
    while found:
        sources.append(FOLDER / f"{found.pop().replace('.', '/')}.py")
        for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", sources[-1].read_text(), re.M):
            file = FOLDER / f"{name.replace('.', '/')}.py"
            if file.exists() and file not in sources and name not in found:
                found.append(name)
    assert {"guidance.py", "locate.py", "trace.py", "token_layout.py"} < {f.name for f in sources}
    folders = {
        p.name for p in (Path(diffusers.__file__).parent / "pipelines").iterdir() if p.is_dir()
    }
    plain = {"deprecated", "dance_diffusion", "audio_diffusion", "latent_diffusion", "__pycache__"}
    families = {
        word
        for name in folders - plain
        for word in (name, name.replace("_", ""), name.replace("_", "-"))
    } - {"shape"}
    classes = {
        name
        for name in dir(diffusers)
        if name.endswith(("Pipeline", "Model", "Scheduler", "DiffusionModel"))
    }
    allowed = {"DiffusionPipeline"}
    for source in sources:
        words = set(re.findall(r"[A-Za-z][\w-]*", source.read_text()))
        assert not {w for w in words if w.lower() in families or w in classes - allowed}, source
        assert not re.search(
            r"UNet\w|Transformer\w|type\([^)]*\)\.__name__ ?[=!i]", source.read_text()
        ), source


def test_a_list_of_prompts_is_left_as_it_was():
    """Some pipelines write their chat template into the list they get: a dry step must not do so
    twice."""
    zimage = next(recipe for recipe in RECIPES if recipe.__name__ == "zimage")
    case, prompts = shared(zimage), PROMPTS[:2]
    case.sample({"layers.1": Edit(lambda x: x)}, n=2)
    prompt, options = case.arguments(2, prompts)
    case.hooked.run_with_hooks({"layers.1": Edit(lambda x: x)}, prompt, **options)
    assert prompt == ["a red fox in snow", "blue ocean waves at night"]


@pytest.mark.parametrize(
    "name, form", [("sd3", "heads first"), ("flux", "heads"), ("cogvideox", "heads first")]
)
def test_heads_are_part_of_a_token(name, form):
    """Normalised queries are (rows, tokens, heads, d) in some families and (rows, heads, tokens, d)
    in others."""
    case = shared(next(recipe for recipe in RECIPES if recipe.__name__ == name))
    hook_name = case.hooked.hook_names("transformer_blocks.0.*.norm_q")[0]
    prompt, options = case.arguments(2)
    layout = case.hooked.layouts(hook_name, prompt, **options)[0][hook_name]
    assert (layout.form, layout.grid, layout.d) == (form, case.by_hand.grid, 32)
