"""Videos and audio in the stages: what is saved beside the pictures, and that maps lie on what they
are of."""

import json
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import audioldm2, stable_audio, wan
from PIL import Image
from tiny import PROMPTS, build, generate_options

import ablate
import collect
import steer
import train
from diffusion.audio_span import watch_decoders
from diffusion.generate import Generation, generate
from features import latent_frame, map_grid
from hook import HookedDiffusionModel

pytestmark = pytest.mark.slow

HOOKS = {stable_audio: "transformer_blocks.1", wan: "blocks.1"}
FILES = {stable_audio: ("audio", ".wav"), wan: ("videos", ".webp")}


def extra(recipe):
    """The arguments of the command line's --pipeline_kwargs."""
    return json.dumps(recipe.options)


@pytest.fixture(params=[stable_audio, wan], ids=lambda recipe: recipe.__name__)
def case(request, tmp_path):
    """(recipe, folder of the model, file of prompts)"""
    build(request.param).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return request.param, str(tmp_path / "model"), str(tmp_path / "prompts.txt")


def check_file(path, recipe):
    if recipe is wan:
        assert Image.open(path).n_frames == 9
        return
    with wave.open(str(path)) as sound:
        assert (sound.getframerate(), sound.getnchannels()) == (4, 2)
        assert sound.getnframes() == 4


def test_ablation_saves_what_was_made(case, tmp_path, capsys):
    recipe, model, prompts = case
    folder, suffix = FILES[recipe]
    cfg = ablate.Config(
        hook_names=[HOOKS[recipe]],
        model_name=model,
        dataset_name=prompts,
        num_inference_steps=2,
        pipeline_kwargs=extra(recipe),
        out_dir=str(tmp_path / "ablate"),
        device="cpu",
    )
    written = ablate.main(cfg)
    report = json.loads((tmp_path / "ablate" / "ablate.json").read_text())
    hook = report["hooks"][0]
    assert hook["latents"] > 0 and hook["images"] > 0
    expected = [f"{folder}/{HOOKS[recipe]}_{i}{suffix}" for i in range(3)]
    assert hook["files"] == expected
    assert report["files"] == [f"{folder}/untouched_{i}{suffix}" for i in range(3)]
    for name in (*report["files"], *expected):
        check_file(tmp_path / "ablate" / name, recipe)
        assert tmp_path / "ablate" / name in written
    assert f"6 files in {tmp_path / 'ablate' / folder}" in capsys.readouterr().out
    with Image.open(tmp_path / "ablate" / "ablate.png") as picture:
        assert picture.width > 3 * 4.5 * 150  # three wide pictures
    before = (tmp_path / "ablate" / "ablate.png").read_bytes()
    ablate.main(cfg)  # a second time, over its own files
    assert (tmp_path / "ablate" / "ablate.png").read_bytes() == before


def test_steering_saves_what_was_made(case, tmp_path, capsys):
    recipe, model, prompts = case
    folder, suffix = FILES[recipe]
    collect.main(
        collect.Config(
            hook_names=[HOOKS[recipe]],
            model_name=model,
            dataset_name=prompts,
            num_inference_steps=2,
            pipeline_kwargs=extra(recipe),
            out_dir=str(tmp_path / "acts"),
            device="cpu",
        )
    )
    data = tmp_path / "acts" / f"{HOOKS[recipe]}.npy"
    train.main(train.Config(data=[str(data)], k=[4], out_dir=str(tmp_path / "saes"), device="cpu"))
    [sae] = (tmp_path / "saes").glob("*/sae.safetensors")
    cfg = steer.Config(
        sae=[str(sae.parent)],
        features=["1", "2"],
        add=[3.0],
        num_prompts=2,
        out_dir=str(tmp_path / "steer"),
        device="cpu",
    )
    picture, numbers, *files = steer.main(cfg)
    assert picture.exists()
    runs = json.loads(numbers.read_text())["runs"]
    for run, name in zip(runs, ("untouched", "add3")):
        for i, image in enumerate(run["pictures"]):
            assert image["file"] == f"{folder}/{name}_{i}{suffix}"
            path = picture.parent / image["file"]
            check_file(path, recipe)
            assert path in files
    assert len(files) == 4 and f"4 files in {picture.parent / folder}" in capsys.readouterr().out
    assert runs[0]["pictures"][0]["moved"] == 0 < runs[1]["pictures"][0]["moved"]


# --------------------------------------------------------------- maps lie on what they are of


@pytest.mark.parametrize("recipe", [stable_audio, audioldm2], ids=lambda recipe: recipe.__name__)
def test_time_in_a_map_runs_as_in_the_audio(recipe, tmp_path):
    """Noise is changed at the end of the sample alone: the last columns of the map change most, and
    the end of the audio does. The same for the first columns."""
    model = HookedDiffusionModel.from_pipeline(build(recipe))
    name = "transformer_blocks.0" if recipe is stable_audio else "down_blocks.1.attentions.0"
    options = generate_options(1, recipe, num_inference_steps=1)
    options = {key: value for key, value in options.items() if key not in ("prompt", "generator")}
    if recipe is stable_audio:
        options["audio_end_in_s"] = 6.0  # all that it samples
    sample = generate(model, Generation(PROMPTS[:1], [0], options=options)).sample
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))

    def run(latents):
        output, cache = model.run_with_cache(
            name,
            PROMPTS[:1],
            latents=latents.clone(),
            generator=torch.Generator().manual_seed(0),
            **(options | {"output_type": "pt"}),
        )
        return output.audios.flatten(), cache["output"][name][0, 0], cache["grid"][name]

    audio, x, grid = run(noise)
    file = SimpleNamespace(grid=list(grid), meta={"audio": {}}, path=tmp_path / "block.npy")
    cells = map_grid(file, 16)
    third = sample.shape[2] // 3
    for where in (slice(-third, None), slice(0, third)):
        changed = noise.clone()
        changed[:, :, where] = -changed[:, :, where]
        other_audio, other_x, _ = run(changed)
        moved = np.zeros(cells.num_cells)
        np.add.at(moved, cells.cells_of(np.arange(len(x))), (other_x - x).norm(dim=1).numpy())
        by_time = moved.reshape(cells.shape[1:]).sum(0)
        by_sample = (other_audio - audio).abs().numpy()
        for change in (by_time, by_sample):
            count = max(1, len(change) // 3)
            first, last = change[:count].mean(), change[-count:].mean()
            near, far = (last, first) if where.start else (first, last)
            assert near > 1.5 * far, (recipe.__name__, near, far)


def test_the_lowest_band_lies_at_the_bottom_of_a_map(tmp_path):
    """The latents of AudioLDM 2 are (time, mel): noise changed at the first bands moves the lowest
    row."""
    model = HookedDiffusionModel.from_pipeline(build(audioldm2))
    options = generate_options(1, audioldm2, num_inference_steps=1)
    options = {key: value for key, value in options.items() if key not in ("prompt", "generator")}
    sample = generate(model, Generation(PROMPTS[:1], [0], options=options)).sample
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
    changed = noise.clone()
    changed[..., :1] = -changed[..., :1]
    name = "down_blocks.0"  # convolutions alone
    rows = []
    for latents in (noise, changed):
        _, cache = model.run_with_cache(name, PROMPTS[:1], latents=latents, **options)
        rows.append(cache["output"][name][0, 0])
    grid = list(cache["grid"][name])
    file = SimpleNamespace(grid=grid, meta={"audio": {}}, path=tmp_path / "block.npy")
    cells = map_grid(file, 16)
    moved = np.zeros(cells.num_cells)
    difference = (rows[1] - rows[0]).norm(dim=1).numpy()
    np.add.at(moved, cells.cells_of(np.arange(len(difference))), difference)
    by_band = moved.reshape(cells.shape[1:]).mean(1)
    assert by_band.argmax() == len(by_band) - 1 and by_band[0] < by_band[-1]


def test_audio_that_is_cut_off_is_noticed():
    """Stable Audio samples 6 seconds, whatever part of them is asked for; the tiny decoder makes 23
    samples of them. The VAE decodes one row after the other, as it does in collect.py."""
    model = HookedDiffusionModel.from_pipeline(build(stable_audio))
    model.pipe.vae.enable_slicing()
    options = generate_options(2, stable_audio, output_type="pt")
    for start, end, first in ((0.0, 5.5, 0), (0.0, 1.0, 0), (2.0, 3.5, 8)):
        options |= {"audio_start_in_s": start, "audio_end_in_s": end}
        with watch_decoders(model) as decoded:
            output = model.pipe(**options)
        description = decoded.describe(output, 4, is_latent=False)
        assert description == {"sampling_rate": 4, "first_sample": first, "num_samples": 23}
    assert "decode" not in vars(model.pipe.vae)  # as it was
    assert decoded.describe(SimpleNamespace(images=[]), 4, is_latent=False) is None
    latent = decoded.describe(SimpleNamespace(audios=torch.zeros(2, 3, 12)), 4, is_latent=True)
    assert latent == {"sampling_rate": 4}


def test_a_latent_frame_covers_the_frames_that_it_changes_first():
    """The VAE of Wan decodes causally: the first frame that moves is the first that it covers."""
    vae = build(wan).vae
    z = torch.randn(1, 4, 3, 4, 8, generator=torch.Generator().manual_seed(0))

    def decode(z):
        with torch.no_grad():
            return vae.decode(z).sample[0]  # (channels, frames, h, w)

    video = decode(z)
    for latent in (1, 2):
        changed = z.clone()
        changed[:, :, latent] += 3
        moved = (decode(changed) - video).abs().amax((0, 2, 3)) > 1e-4
        covering = [latent_frame(frame, video.shape[1], 3) for frame in range(video.shape[1])]
        assert moved.tolist() == [other >= latent for other in covering]
