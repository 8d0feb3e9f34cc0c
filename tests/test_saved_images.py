"""What the model made is saved: images, videos and sounds."""

import io
import json
import wave
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import ddpm, dit, stable_audio, wan
from files import photos
from PIL import Image
from tiny import build

import collect
from collect import Config
from hook import HookedDiffusionModel
from store.images import image_path, save_images

pytestmark = pytest.mark.slow


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), float)


def lossy(image):
    """An image as WebP keeps it."""
    image.save(file := io.BytesIO(), "webp", quality=90)
    return pixels(file)


def test_images_are_what_the_pipeline_makes(collect_config, model_folder):
    """The same seeds in the same batches; with --no_save_images none, and the same activations."""
    collect.main(collect_config)
    collect.main(
        replace(collect_config, save_images=False, out_dir=collect_config.out_dir + "-none")
    )
    out = Path(collect_config.out_dir)
    pipe = HookedDiffusionModel.from_pretrained(model_folder)
    assert not Path(collect_config.out_dir + "-none", "images").exists()
    assert (out / "mid_block.npy").read_bytes() == Path(
        collect_config.out_dir + "-none", "mid_block.npy"
    ).read_bytes()
    seeds = [torch.Generator().manual_seed(i) for i in range(5)]
    images = pipe(
        [f"a picture of {i}" for i in range(5)],
        generator=seeds,
        num_inference_steps=3,
        output_type="pt",
    ).images
    for row, image in enumerate(images):
        image = Image.fromarray((255 * image.movedim(0, -1)).round().to(torch.uint8).numpy())
        assert np.abs(pixels(out / "images" / f"{row}.webp") - lossy(image)).mean() < 0.5
    assert len(list((out / "images").iterdir())) == 8


def test_images_of_a_data_set_are_saved_cropped(collect_config, tmp_path):
    folder = photos(tmp_path / "photos", 3)
    collect.main(
        replace(
            collect_config, num_inference_steps=None, images=str(folder), num_images_per_prompt=2
        )
    )
    for row in range(6):
        crop = (
            Image.open(folder / f"{row // 2}.png")
            .crop((5, 0, 35, 30))
            .resize((32, 32), Image.Resampling.LANCZOS)
        )
        saved = pixels(Path(collect_config.out_dir) / "images" / f"{row}.webp")
        assert saved.shape == (32, 32, 3)
        assert np.abs(saved - lossy(crop)).mean() < 1


@pytest.mark.parametrize(
    "recipe", [dit, ddpm, wan, stable_audio], ids=lambda recipe: recipe.__name__
)
def test_every_kind_of_output_is_saved(recipe, tmp_path, monkeypatch):
    """Class-conditional, unconditional, video and audio; the samples are those of the scheduler
    whatever the output."""
    hooked = HookedDiffusionModel.from_pipeline(build(recipe))
    monkeypatch.setattr(HookedDiffusionModel, "from_pretrained", lambda *args, **kwargs: hooked)
    (tmp_path / "p.txt").write_text("1\n2\n3\n")
    given = {
        k: v
        for k, v in recipe.options.items()
        if not callable(v) and k not in ("prompt", "output_type", "guidance_scale")
    }
    config = Config(
        hook_names=["*blocks.1" if recipe is not ddpm else "mid_block.attentions.0"],
        dataset_name=str(tmp_path / "p.txt"),
        out_dir=str(tmp_path / "acts"),
        pipeline_kwargs=json.dumps(given),
        num_inference_steps=2,
        batch_size=2,
        save_samples=True,
        device="cpu",
    )
    collect.main(config)
    shapes = {dit: (16, 16, 3), ddpm: (8, 12, 3), wan: (32, 64, 3)}
    for row in range(3):
        path = image_path(tmp_path / "acts" / "images", row)
        if recipe is stable_audio:
            with wave.open(str(path)) as sound:
                assert sound.getnchannels() == 2
                assert sound.getframerate() == hooked.pipe.vae.config.sampling_rate
                assert sound.getnframes() > 0
        else:
            assert pixels(path).shape == shapes[recipe]
            assert getattr(Image.open(path), "n_frames", 1) == (9 if recipe is wan else 1)
    samples = np.load(tmp_path / "acts" / "samples.npy")
    shapes = {dit: (4, 8, 8), ddpm: (3, 8, 12), wan: (4, 3, 4, 8), stable_audio: samples.shape[1:]}
    assert len(samples) == 3
    assert samples.shape[1:] == shapes[recipe]
    assert image_path(tmp_path / "acts" / "images", 3) is None


def test_what_can_be_saved(tmp_path):
    """PIL, NumPy and torch alike, videos of each; a grey image; and what is none, or not one a row,
    is refused."""
    colours = np.linspace(0, 1, 2 * 4 * 16 * 24 * 3).reshape(2, 4, 16, 24, 3).astype(np.float32)
    levels = (colours * 255).round().astype(np.uint8)
    video = dict(numpy=colours, torch=torch.from_numpy(colours).movedim(-1, 2))
    video["pil"] = [[Image.fromarray(frame) for frame in frames] for frames in levels]
    image = dict(
        numpy=colours[:, 0],
        torch=video["torch"][:, 0],
        pil=[frames[0] for frames in video["pil"]],
        bytes=levels[:, 0],
    )
    for kind, outputs, frames in (
        (SimpleNamespace, image, 1),
        (dict, image, 1),
        (SimpleNamespace, video, 4),
    ):
        saved = []
        for name, value in outputs.items():
            folder = tmp_path / f"{kind.__name__}{name}{frames}"
            field = "images" if frames == 1 else "frames"
            save_images(
                kind(**{field: value}) if kind is SimpleNamespace else value, folder, range(7, 9)
            )
            assert sorted(path.name for path in folder.iterdir()) == ["7.webp", "8.webp"]
            assert getattr(Image.open(folder / "8.webp"), "n_frames", 1) == frames
            saved.append((folder / "8.webp").read_bytes())
        assert len(set(saved)) == 1
        assert np.abs(pixels(folder / "8.webp") - levels[1, 0]).mean() < 4
    save_images([Image.new("L", (8, 8), 77)], tmp_path / "grey", range(1))
    save_images(np.full((1, 8, 8, 1), 77 / 255), tmp_path / "grey", range(1, 2))
    assert all(np.abs(pixels(tmp_path / "grey" / f"{i}.webp") - 77).max() < 3 for i in range(2))
    for wrong in (SimpleNamespace(meshes=[1]), np.zeros((1, 8)), torch.zeros(1, 2, 2, 4, 8, 8)):
        with pytest.raises(ValueError, match="--no_save_images"):
            save_images(wrong, tmp_path / "wrong", range(1))
    with pytest.raises(ValueError, match="made 2 images for 3 rows"):
        save_images(colours[:, 0], tmp_path / "wrong", range(3))


def test_a_sound_is_saved_as_it_is(tmp_path):
    tone = torch.sin(torch.arange(4000) / 7).expand(1, 2, -1) * torch.tensor([[1.0], [0.25]])
    save_images(SimpleNamespace(audios=tone), tmp_path, range(1), sampling_rate=16000)
    with wave.open(str(tmp_path / "0.wav")) as sound:
        read = np.frombuffer(sound.readframes(4000), "<i2").reshape(-1, 2) / 32767
        assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (2, 16000, 4000)
    assert np.abs(read.T - tone[0].numpy()).max() < 1e-4
