"""The unlearning protocol: its scores by hand, its halves, each method against its formula, and a
table that goes on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import collect
import train
from bench import unlearn
from bench.unlearn import Config, Domain, judge, load_model, main, method, split_prompts, summary
from cli import HERE
from sae import Sae
from store.hook_point import HookPoint, trained_on
from store.prompts import load_prompts

pytestmark = pytest.mark.slow

TOY = HERE / "toy"


def test_scores_by_hand():
    rows = [
        dict(object=o, style=s)
        for o, s in (("star", "solid"), ("star", "dotted"), ("moon", "solid"), ("ring", "solid"))
    ]
    seen = [
        dict(object=o, style=s)
        for o, s in (("star", "solid"), ("moon", "solid"), ("moon", "solid"), ("star", "solid"))
    ]
    assert judge(seen, rows, "object", "star") == {"UA": 1 / 2, "IRA": 1 / 2, "CRA": 3 / 4}
    assert judge(seen, rows, "style", "dotted") == {"UA": 1, "IRA": 1, "CRA": 2 / 4}
    found = summary([{"UA": 1, "IRA": 0, "CRA": 1}, {"UA": 0, "IRA": 0, "CRA": 1}])
    assert (
        found["UA"] == (0.5, 0.5)
        and found["CRA"] == (1, 0)
        and found["mean"][0] == pytest.approx(0.5)
    )


def test_halves_are_balanced_and_of_no_prompt_that_was_used():
    rows = load_prompts(str(TOY / "prompts.csv"))
    used = {row["prompt"] for row in rows[:300]}
    halves = split_prompts(rows, used, 2)
    said = [row["prompt"] for half in halves for row in half]
    assert (
        [len(half) for half in halves] == [96, 96]
        and len(set(said)) == 192
        and not used & set(said)
    )
    for half in halves:
        assert {
            sum(row["object"] == o and row["style"] == s for row in half)
            for o in ("star", "moon")
            for s in ("solid",)
        } == {2}
    with pytest.raises(
        ValueError, match="--per_cell 13: only 24 prompts are left of circle blurred"
    ):
        split_prompts(rows, set(), 13)


@pytest.fixture
def domain():
    """Four pictures at two steps, of which two are of a star."""
    sae, generator = Sae(6, 10, 3), torch.Generator().manual_seed(0)
    scores, means = (
        torch.rand(4, 2, 10, generator=generator),
        torch.randn(4, 2, 6, generator=generator),
    )
    return Domain(
        "object",
        sae,
        HookPoint("x"),
        scores,
        means,
        torch.tensor([900.0, 100.0]),
        ["star", "moon", "star", "moon"],
    )


def test_saeuron_multiplies_what_is_above_the_mean_by_a_negative_multiple_of_the_concepts_mean(
    domain,
):
    change, rows, _ = method("saeuron", dict(count=2, multiply=-5), domain, "star")
    assert rows == "both"
    x = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(1)).abs()
    star, moon = domain.scores[[0, 2]].mean(0), domain.scores[[1, 3]].mean(0)
    for step, timestep in ((0, 999.0), (1, 0.0)):  # the nearest
        score = star[step] / star[step].sum() - moon[step] / moon[step].sum()
        top = score.argsort(descending=True)[:2]
        acts, indices = domain.sae.encode(x[0])
        codes = torch.zeros(30, 10).scatter_add_(1, indices, acts)
        new = codes.clone()
        for f in top:
            above = codes[:, f] > (star + moon)[step, f] / 2
            new[above, f] = codes[above, f] * -5 * star[step, f]
        assert (new != codes).any()
        assert torch.allclose(change(x, timestep)[0], (new - codes) @ domain.sae.W_dec, atol=1e-4)


def test_the_mean_direction_is_taken_out(domain):
    change, rows, _ = method("mean_direction", dict(s=1, rows="both"), domain, "star")
    x = torch.randn(2, 5, 6)
    without = domain.means[[1, 3], 1].mean(0)
    direction = domain.means[[0, 2], 1].mean(0) - without
    left = (x + change(x, 90.0) - without) @ direction
    assert rows == "both" and left.abs().max() < 1e-4 and change(x, 90.0).abs().max() > 0.01
    assert torch.allclose(
        method("mean_direction", dict(s=2, rows="cond"), domain, "star")[0](x, 90.0),
        2 * change(x, 90.0),
    )
    text = method(
        "negative_prompt", dict(text="a picture of a {}", guidance_scale=7.0), domain, "star"
    )
    assert text == (None, "cond", {"text": "a picture of a star", "guidance_scale": 7.0})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An SAE of the toy's activations in two steps, of little worth."""
    base = tmp_path_factory.mktemp("unlearn")
    options = dict(
        num_inference_steps=2,
        max_num_examples=48,
        batch_size=48,
        out_dir=str(base / "acts"),
        device="cpu",
    )
    collect.main(collect.Config(hook_names=["mid_block.attentions.0"], **options))
    path = base / "acts" / "mid_block.attentions.0.npy"
    train.main(
        train.Config(
            data=[str(path)],
            num_latents=[64],
            k=[8],
            out_dir=str(base),
            run_name="sae",
            device="cpu",
        )
    )
    return base / "sae"


def test_the_table_as_a_user_runs_it(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        unlearn, "GRIDS", {"features": {"object": [dict(count=8, multiply=m) for m in (1, -30)]}}
    )
    config = Config(
        sae=[str(trained)],
        unlearn="moon",
        num_inference_steps=2,
        out_dir=str(tmp_path),
        device="cpu",
    )
    path = tmp_path / "moon" / "unlearn.json"
    assert main(config) == [path]
    report = json.loads(path.read_text())
    table, said = report["table"], capsys.readouterr().out
    assert set(table) == {"none", "features"} and "UA" in said and "features" in said
    assert report["pictures"] == 48 + 2 * (6 + 12) + 48 and len(report["done"]) == 4
    seen = report["done"]["none"]["seen"]
    assert table["none"]["moon"] == judge(
        seen, [rows_of(p) for p in report["prompts"]["report"]], "object", "moon"
    )
    same = {key: record["seen"] for key, record in report["done"].items()}
    half = [report["prompts"]["choice"][i] for i in range(48)]
    assert (
        all(sum(f" {o} " in p for p in half) == 6 for o in ("moon", "star", "ring"))
        and len(same) == 4
    )
    start = report["seconds"]
    monkeypatch.setattr(
        unlearn, "generate", None
    )  # everything is there: nothing is generated again
    main(config)
    assert json.loads(path.read_text())["seconds"] == start
    with pytest.raises(
        ValueError, match="was made with num_inference_steps 2, not 3; choose another --out_dir"
    ):
        main(replace(config, num_inference_steps=3))


def rows_of(prompt):
    words = prompt.split()
    return {"object": words[words.index("on") - 1], "style": words[1]}


def test_multiply_1_unlearns_nothing(trained):
    """And the pictures of a method that changes nothing are the untouched ones."""
    from hook import HookedDiffusionModel

    hooked = HookedDiffusionModel.from_pretrained("toy", device="cpu")
    hooked.pipe.set_progress_bar_config(disable=True)
    sae = Sae.load_from_disk(trained)
    domain = unlearn.domains_of([sae], {"object": ("moon", "star")})["object"]
    assert (
        domain.hook_point == trained_on(sae)
        and domain.scores.shape == (48, 2, 64)
        and domain.means.shape == (48, 2, 160)
    )
    options = hooked.arguments(1, "pt", num_inference_steps=2)
    make = lambda m: unlearn.generate(
        hooked,
        ["a solid red moon"],
        [3],
        options,
        domain,
        *method("features", dict(count=8, multiply=m), domain, "moon"),
    )
    plain = unlearn.generate(hooked, ["a solid red moon"], [3], options)
    assert torch.equal(make(1), plain) and not torch.equal(make(-3), plain)


def test_what_is_refused(trained, model_folder, tmp_path):
    config = Config(sae=[str(trained)], out_dir=str(tmp_path), device="cpu")
    with pytest.raises(
        ValueError, match="--unlearn dog: the toy has no such object or style; expected all, circle"
    ):
        main(replace(config, unlearn="dog"))
    with pytest.raises(ValueError, match="has no classifier"):
        main(replace(config, unlearn="star", model_name=str(model_folder)))
    with pytest.raises(ValueError, match="two SAEs of one hook point"):
        main(replace(config, sae=[str(trained), str(trained)]))


def test_another_folder_of_the_model_gets_the_options_of_the_activations(tmp_path):
    """Only options that were given take the place of those that the activations were made with."""
    meta = {"model": "toy", "pipeline_kwargs": {"num_inference_steps": 20, "guidance_scale": 3.5}}
    copy = shutil.copytree(TOY, tmp_path / "copy")
    config = Config(model_name=str(copy), num_inference_steps=2, device="cpu")
    device = torch.device("cpu")
    _, arguments = load_model(config, meta, device, torch.float32)
    assert arguments["guidance_scale"] == 3.5 and arguments["num_inference_steps"] == 2
    _, of_toy = load_model(replace(config, model_name=None), meta, device, torch.float32)
    assert arguments == of_toy
    _, given = load_model(replace(config, guidance_scale=2.0), meta, device, torch.float32)
    assert given == arguments | {"guidance_scale": 2.0}


def test_a_cell_whose_prompts_were_all_used_is_refused():
    rows = load_prompts(str(TOY / "prompts.csv"))
    used = {row["prompt"] for row in rows if (row["object"], row["style"]) == ("star", "dotted")}
    with pytest.raises(ValueError, match="--per_cell 1: only 0 prompts are left of star dotted"):
        split_prompts(rows, used, 1)


def test_of_equal_settings_the_one_that_is_best_for_the_domain_is_chosen(domain):
    star, moon = unlearn.Concept(domain, "star"), unlearn.Concept(domain, "moon")
    means = {"star": [0.5, 0.5, 0.4, 0.5, 0.1, 0.1], "moon": [0.1, 0.3, 0.9, 0.3, 0.1, 0.1]}
    settings = unlearn.GRIDS["features"]["object"]
    choose = lambda concept: unlearn.best_setting("features", concept, [star, moon], means)
    assert choose(star) == settings[1] and choose(moon) == settings[2]
