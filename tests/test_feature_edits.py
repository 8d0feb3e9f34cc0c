"""Edits of features: against dense codes, at the rows, steps and tokens that were asked for, and
nothing else moves a bit."""

import functools

import numpy as np
import pytest
import torch
from tiny import PROMPTS, build, generate_options, sd15

from analysis.feature_edits import Edits, Typical, adding_edits, delta, redirect, steer, step_norm
from hook import HookedDiffusionModel
from sae import Sae
from store.hook_point import HookPoint

# followed by mid_block.resnets.1, which sees what became of it
HOOK = "mid_block.attentions.0"
D = 16
POINT = HookPoint(HOOK)
EVERY = {"topk": {}, "batchtopk": {}, "sampletopk": {}, "unit norm": {"input_unit_norm": True}}


def some_sae(d, M=64, k=6, cfg=None, seed=0):
    sae = Sae(d, M, k, cfg, seed)
    sae.b_dec.data.normal_(generator=torch.Generator().manual_seed(seed))
    if sae.activation == "batchtopk":
        sae.threshold.fill_(0.5)  # below which some of the k longest are
    return sae


@pytest.mark.parametrize("kind", EVERY)
def test_delta_is_the_difference_of_two_reconstructions(kind):
    activation = {} if kind == "unit norm" else {"activation": kind}
    sae = some_sae(24, cfg=activation | EVERY[kind])
    x = torch.randn(3, 10, 24, generator=torch.Generator().manual_seed(1))
    features = torch.tensor([5, 17, 40])
    top_acts, top_indices, *stats = (
        sae.encode(x) if kind == "sampletopk" else sae.encode(x.flatten(0, 1))
    )
    changed = torch.where(torch.isin(top_indices, features), -3 * top_acts, top_acts)
    codes = (changed.double(), top_acts.double())
    hats = [
        torch.zeros(30, 64).double().scatter_add_(1, top_indices.reshape(30, -1), c.reshape(30, -1))
        for c in codes
    ]
    expected = (hats[0] - hats[1]) @ sae.W_dec.double() * (stats[1].double() if stats else 1)
    change = delta(sae, x, features, lambda acts: -3 * acts)
    assert torch.allclose(change.flatten(0, 1).double(), expected, atol=1e-5)
    assert expected.abs().max() > 0.1
    untouched = ~torch.isin(torch.where(top_acts > 0, top_indices, -1), features).reshape(
        30, -1
    ).any(1)
    assert untouched.any()
    assert not change.flatten(0, 1)[untouched].any()  # exactly 0


def test_add_is_in_units_of_the_steps_norm():
    sae = some_sae(24)
    x = torch.randn(2, 10, 24)
    sae.W_dec.data.mul_(2)  # what is added goes along the unit row
    change = steer(sae, [3], add=2.5)(x)
    for tokens, added in zip(x, change):
        norm = (tokens.double().square().sum() / 10).sqrt()
        assert torch.allclose(
            added.double(), (2.5 * norm * sae.W_dec[3].double() / 2 / 1.0).expand(10, 24), atol=1e-4
        )
    padded = torch.cat([x, torch.zeros(2, 5, 24)], 1)
    assert torch.allclose(step_norm(padded, "text"), step_norm(x))
    assert not steer(sae, [3], add=2.5, stream="text")(padded)[:, 10:].any()


def test_redirect_puts_as_much_along_the_direction_as_it_takes_out():
    sae = some_sae(24)
    x = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(1))
    features = [5, 17, 40]
    u = torch.nn.functional.normalize(torch.randn(24), dim=0)
    taken = -delta(sae, x, torch.tensor(features), lambda acts: 0 * acts)
    change = redirect(sae, features, u)(x)
    assert torch.allclose(change + taken, taken.norm(dim=-1)[..., None] * u, atol=1e-5)
    assert taken.norm() > 1
    without = (taken == 0).all(-1)
    assert without.any()
    assert not without.all()
    assert not change[without].any()


def test_nothing_to_change_is_none():
    sae = some_sae(24)
    x = torch.randn(1, 4, 24)
    assert steer(sae, [3], multiply=1)(x) is None
    assert steer(sae, [3], add=0)(x) is None
    assert steer(sae, [], multiply=0)(x) is None


def test_what_is_refused():
    """Features that the SAE does not have, other widths and sides that can't be edited are
    refused."""
    sae = some_sae(24)
    with pytest.raises(ValueError, match="feature 64: the SAE has 64, numbered 0 to 63"):
        steer(sae, [64], multiply=0)
    with pytest.raises(ValueError, match="named twice"):
        steer(sae, [3, 3], multiply=0)
    with pytest.raises(ValueError, match="width 24, and this hook point has width 16"):
        steer(sae, [3], multiply=0)(torch.randn(1, 2, 16))
    with pytest.raises(ValueError, match="rows: expected cond, uncond, both, got 'all'"):
        adding_edits(HookPoint(HOOK), None, None, rows="all")


@functools.cache
def hooked_model(dtype=None):
    """One model per dtype for all tests of this file: making it takes longer than a sampling."""
    pipe = build(sd15)
    if dtype is not None:
        pipe.to(dtype)
    return HookedDiffusionModel.from_pipeline(pipe)


def generate(change, steps=None, dtype=None, hook_point=POINT, **options):
    """(latents, [(output of the module, what follows it got)] a step, chunks as the pipeline stacks
    them) of two prompts."""
    hooked = hooked_model(dtype)
    unet = hooked.pipe.unet
    seen = []
    # The dry step, in which the plan is made, runs the modules too; it is not part of the sampling.
    with hooked.watch(2) as sampling:

        def keep_output(module, args, output):
            if not sampling.paused:
                seen.append([output[0].clone()])

        def keep_input(module, args):
            if not sampling.paused:
                seen[-1].append(args[0].clone())

        handles = [
            unet.get_submodule(HOOK).register_forward_hook(keep_output),
            unet.get_submodule("mid_block.resnets.1").register_forward_pre_hook(keep_input),
        ]
        edits = {}
        if change is not None:
            edits[HOOK] = adding_edits(hook_point, change, sampling, steps=steps, **options)
        try:
            arguments = generate_options(2, num_inference_steps=3)
            images = hooked.run_with_hooks(edits, PROMPTS[:2], **arguments).images
        finally:
            for handle in handles:
                handle.remove()

    def tokens(x):
        return x.flatten(2).transpose(1, 2)

    return images, [(tokens(before), tokens(after)) for before, after in seen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["cond", "both"])
def test_multiply_1_is_the_identity_bit_for_bit(dtype, rows):
    plain, _ = generate(None, dtype=dtype)
    sae = some_sae(D)

    def silent(x, timestep):
        """What features that are nowhere active add."""
        return torch.zeros_like(x)

    for change in (steer(sae, list(range(64)), multiply=1), steer(sae, [0], add=0), silent):
        assert torch.equal(generate(change, dtype=dtype, rows=rows)[0], plain)
    assert not torch.equal(
        generate(steer(sae, list(range(64)), multiply=2), dtype=dtype, rows=rows)[0], plain
    )


@pytest.mark.parametrize(
    "rows, there", [("cond", [False, True]), ("uncond", [True, False]), ("both", [True, True])]
)
def test_only_the_rows_steps_and_tokens_asked_for_are_touched(rows, there):
    sae = some_sae(D)
    T = generate(None)[1][0][0].shape[1]
    mask = torch.arange(T) % 3 == 0
    _, seen = generate(steer(sae, [1], add=1.0), steps=range(1, 2), rows=rows, mask=mask)
    assert len(seen) == 3  # each with an output before the edit, and what the next module got
    for step, (before, after) in enumerate(seen):
        for chunk, edited in enumerate(there):
            rows_of_chunk = slice(2 * chunk, 2 * chunk + 2)
            moved = (before[rows_of_chunk] != after[rows_of_chunk]).any(-1)
            expected = (
                mask.expand(2, T) if edited and step == 1 else torch.zeros(2, T, dtype=torch.bool)
            )
            assert torch.equal(moved, expected)
            x = before[rows_of_chunk]
            added = (
                step_norm(x)
                * torch.nn.functional.normalize(sae.W_dec[1], dim=0)
                * expected[..., None]
            )
            assert torch.allclose(after[rows_of_chunk], x + added, atol=1e-5)


def test_renormalize_and_what_is_measured():
    sae = some_sae(D)
    seen = []

    def measure(x, timestep):
        return seen.append((x, timestep))

    _, both = generate(steer(sae, [1], add=3.0), renormalize=True, measure=measure)
    for (before, after), (x, _) in zip(both, seen):
        assert torch.allclose(before[2:].norm(dim=-1), after[2:].norm(dim=-1), rtol=1e-4)
        assert not torch.equal(before[2:], after[2:])
        assert torch.allclose(x, after[2:], atol=1e-6)
    assert len(seen) == 3
    assert seen[0][1] > seen[1][1] > seen[2][1]
    # both are edited, one is measured
    for of, expected in (
        ("cond", slice(2, 4)),
        ("uncond", slice(0, 2)),
    ):
        seen.clear()
        _, both = generate(
            steer(sae, [1], add=3.0),
            rows="both",
            measure=measure,
            hook_point=HookPoint(HOOK, rows=of),
        )
        assert len(seen) == 3
        assert all(torch.allclose(x, a[expected], atol=1e-5) for (_, a), (x, _) in zip(both, seen))


def test_what_overflows_float16_stays_finite():
    out, seen = generate(lambda x, timestep: torch.full_like(x, 1e6), dtype=torch.float16)
    assert seen[0][1][2:].max() == torch.finfo(torch.float16).max


def test_the_hook_point_that_is_furthest_off_is_told():
    edits = Edits([None] * 3, [None] * 3)
    assert edits.numbers(2) == [None, None]
    edits.measured = [{}, {}]  # two batches of one prompt
    for i, (norm, distance) in enumerate(((0.05, 1.0), (1.0, 3.0), (2.0, 0.5))):
        for step in (-0.5, 0.5):  # means over steps
            for number, measured in enumerate(edits.measured):
                measured.setdefault(i, []).append(
                    torch.tensor([[norm * (1 + step)], [distance + number]])
                )
    assert edits.numbers(2) == [pytest.approx([0.05, 3.0]), pytest.approx([0.05, 4.0])]


def test_side_diff_moves_the_output_by_the_change_of_the_difference():
    sae = some_sae(D)
    _, seen = generate(steer(sae, [1], add=1.0), hook_point=HookPoint(HOOK, "diff"))
    before, after = seen[0]
    moved = (after - before)[2:]
    direction = torch.nn.functional.normalize(sae.W_dec[1], dim=0)
    assert torch.allclose(moved, (moved @ direction)[..., None] * direction, atol=1e-5)
    # the norm is that of the difference
    assert not torch.allclose(moved[:, :1] @ direction, step_norm(before[2:])[:, 0], rtol=1e-3)


def test_typical_is_1_for_what_it_was_made_of(tmp_path):
    generator = torch.Generator().manual_seed(0)
    # four directions that the model never uses
    scales = torch.tensor([5.0] * 4 + [1.0] * 8 + [0.0] * 4)
    x = torch.randn(64, 100, 16, generator=generator) * scales + 2.0
    np.save(tmp_path / "x.npy", x.numpy())
    typical = Typical([tmp_path / "x.npy"], n=4000)
    norm, distance = typical(x[:8], 0.0)
    assert torch.allclose(norm.mean(), torch.tensor(1.0), atol=0.05)
    assert torch.allclose(distance.mean(), torch.tensor(1.0), atol=0.05)
    assert torch.allclose(typical(2 * x[:8], 0.0)[0], 2 * norm)
    padded = torch.cat([x[:8], torch.zeros(8, 300, 16)], 1)
    assert torch.allclose(
        torch.stack(typical(padded, 0.0, text=True)), torch.stack([norm, distance]), rtol=1e-4
    )
    assert typical(padded, 0.0)[0].max() < 0.6
    along = torch.zeros(16)
    across = torch.zeros(16)
    along[0], across[15] = 5.0, 5.0
    assert typical(x[:8] + across, 0.0)[1].min() > 3 * typical(x[:8] + along, 0.0)[1].max()
