"""The embedded model is what toy/make.py says: a diffusers folder that loads with no network and
draws what it is asked."""

import csv

import numpy as np
import pytest
import torch
from files import read_json

from cli import HERE
from toy import concepts, make

pytestmark = pytest.mark.slow

TOY = HERE / "toy"


def test_drawings_are_seeded_and_labelled():
    pixels, attributes = concepts.draw_many(6, 3)
    again, _ = concepts.draw_many(6, 3)
    assert pixels.shape == (6, 3, 64, 64)
    assert torch.equal(pixels, again)
    assert {a["object"] for a in attributes} <= set(concepts.OBJECTS)
    assert all(a["colour"] in " ".join(concepts.captions(a)) for a in attributes)


def test_every_word_of_a_caption_is_one_token():
    tokenizer = make.build_tokenizer()
    for a in concepts.draw_many(50, 0)[1]:
        for caption in concepts.captions(a):
            words = caption.replace(",", " ,").split()
            assert len(tokenizer(caption).input_ids) == len(words) + 2 <= tokenizer.model_max_length


def test_training_goes_on_where_it_stopped(tmp_path):
    """Six iterations at once, and four with a stop after which the last checkpoint is gone on from,
    give the same weights."""

    def fit(folder, stop_at=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)

        calls = []

        def loss(generator):
            calls.append(generator)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return layer(torch.randn(4, 3, generator=generator)).square().sum()

        folder.mkdir(exist_ok=True)
        cfg = make.Config("train", work_dir=str(folder), save_every=3)
        make.fit("layer", {"layer": layer}, loss, 6, 0.1, cfg, torch.device("cpu"))
        return layer.weight.detach()

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "in-parts", stop_at=5)
    assert torch.equal(fit(tmp_path / "in-parts"), fit(tmp_path / "at-once"))


def test_the_folder_is_small_and_complete():
    assert sum(p.stat().st_size for p in TOY.rglob("*") if p.is_file()) <= 20e6
    assert not [p for p in TOY.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    with open(TOY / "prompts.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == len({r["prompt"] for r in rows}) == 8 * 6 * 6 * 4


def test_the_classifier_knows_the_drawings():
    pixels, attributes = concepts.draw_many(600, 77)
    seen = concepts.Classifier.load(TOY).predict(concepts.to_model(pixels))
    for name in ("object", "style", "colour"):
        assert np.mean([s[name] == a[name] for s, a in zip(seen, attributes)]) >= 0.99, name


def test_it_draws_what_it_is_asked():
    """A small part of `python -m toy.make check`: 24 prompts, 10 steps."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(TOY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert "up_blocks.1.attentions.1" in dict(pipe.unet.named_modules())
    with open(TOY / "prompts.csv", newline="") as f:
        rows = list(csv.DictReader(f))[-24:]
    generators = [torch.Generator().manual_seed(i) for i in range(24)]
    options = dict(
        num_inference_steps=10, guidance_scale=5.0, generator=generators, output_type="pt"
    )
    seen = concepts.Classifier.load(TOY).predict(
        2 * pipe([r["prompt"] for r in rows], **options).images - 1
    )
    for name, at_least in (("object", 0.9), ("style", 0.9), ("colour", 0.95)):
        assert np.mean([s[name] == r[name] for s, r in zip(seen, rows)]) >= at_least, name


def test_draw(tmp_path):
    """`python -m toy.make draw` shows drawings of the toy's concepts."""
    make.main(make.Config("draw", folder=str(tmp_path)))
    assert (tmp_path / "drawings.png").stat().st_size > 10_000


def test_training_from_nothing_ends_with_a_model_that_loads_and_is_never_overwritten(tmp_path):
    small = dict(
        num_drawings=48, classifier_iterations=2, vae_iterations=2, unet_iterations=2, batch_size=4
    )
    cfg = make.Config(
        "train",
        folder=str(tmp_path / "mine"),
        work_dir=str(tmp_path / "work"),
        device="cpu",
        **small,
    )
    make.main(cfg)
    make.main(
        make.Config("check", folder=cfg.folder, num_prompts=3, num_inference_steps=2, device="cpu")
    )
    report = read_json(tmp_path / "mine" / "check.json")
    assert set(report["generated"]) == {"object", "style", "colour"}
    assert (tmp_path / "mine" / "check.png").exists()
    with pytest.raises(ValueError, match="report made with other options"):
        make.main(
            make.Config(
                "check", folder=cfg.folder, num_prompts=4, num_inference_steps=2, device="cpu"
            )
        )
    with pytest.raises(ValueError, match="holds a trained model"):
        make.main(cfg)
    with pytest.raises(ValueError, match="other options"):
        make.main(
            make.Config(
                "train", folder=str(tmp_path / "other"), work_dir=cfg.work_dir, seed=1, **small
            )
        )


def test_training_that_goes_on_from_a_folder_keeps_its_classifier_and_autoencoder(tmp_path):
    small = dict(
        num_drawings=48, unet_iterations=2, batch_size=4, start_from=str(TOY), device="cpu"
    )
    make.main(
        make.Config(
            "train", folder=str(tmp_path / "mine"), work_dir=str(tmp_path / "work"), **small
        )
    )

    def same(path):
        return (TOY / path).read_bytes() == (tmp_path / "mine" / path).read_bytes()

    assert same("classifier.safetensors")
    assert same("vae/diffusion_pytorch_model.safetensors")
    assert not same("unet/diffusion_pytorch_model.safetensors")
    assert not same("text_encoder/model.safetensors")
