"""Real images: encoded, noised and run as the pipeline itself would, or refused."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from families import flow_matching, flux, ltx, wan
from files import contents, photos, read_json, read_lines
from PIL import Image
from tiny import build, called_with, qwen_tokenizer, sd15
from tiny_runs import COLLECTED_HOOKS, prompt_and_options

import collect
from diffusion import real_images
from diffusion.sampling_loop import Loop
from errors import UsageError
from hook import HookedDiffusionModel
from store.inputs import open_image, white_level

pytestmark = pytest.mark.slow

HOOK = "mid_block.attentions.0"


@called_with(**ltx.options | dict(num_frames=1))
def ltx_statistics():
    """The statistics of its latents are buffers of the VAE, and not in the config."""
    pipe = ltx()
    pipe.vae.latents_mean.copy_(torch.randn(8, generator=torch.Generator().manual_seed(0)))
    pipe.vae.latents_std.copy_(torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5)
    return pipe


@called_with(height=32, width=48, max_sequence_length=64, text_encoder_out_layers=(0, 1, 2))
def flux2():
    """Noise is on 2 x 2 patches of latents, which a batch norm of the VAE scales."""
    import transformers

    text = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8, vocab_size=300
    )
    text |= dict(
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    size = dict(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        patch_size=1,
        in_channels=16,
    )
    size |= dict(
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=8,
        guidance_embeds=False,
    )
    blocks = dict(
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=32,
    )
    blocks |= dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=flow_matching(),
        vae=diffusers.AutoencoderKLFlux2(**blocks),
        text_encoder=transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text)),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.Flux2Transformer2DModel(**size),
    )
    pipe.vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    pipe.vae.bn.running_var.uniform_(0.3, 2, generator=torch.Generator().manual_seed(1))
    return pipe


@called_with(**sd15.options)
def pndm():
    """Its scheduler can't make a single step."""
    return sd15(diffusers.PNDMScheduler())


def own_of_ltx(pipe, z):
    scaled = pipe._normalize_latents(
        z, pipe.vae.latents_mean, pipe.vae.latents_std, pipe.vae.config.scaling_factor
    )
    return pipe._pack_latents(scaled, 1, 1)


def own_of_flux2(pipe, z):
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    variance = pipe.vae.bn.running_var.view(1, -1, 1, 1)
    return pipe._pack_latents(
        (pipe._patchify_latents(z) - mean) / (variance + pipe.vae.config.batch_norm_eps).sqrt()
    )


def own_of_sd15(pipe, z):
    return z * pipe.vae.config.scaling_factor


def photo(width, height):
    return Image.effect_mandelbrot((width, height), (-2, -1, 1, 1), 14).convert("RGB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe, own",
    [(ltx_statistics, own_of_ltx), (flux2, own_of_flux2), (sd15, own_of_sd15), (pndm, own_of_sd15)],
)
def test_latents_of_real_images_are_the_pipelines_own(recipe, own, dtype):
    pipe = build(recipe).to(dtype)
    _, options = prompt_and_options(1, recipe)
    options.pop("generator")
    size = options["width"], options["height"]
    real = real_images.RealImages(
        HookedDiffusionModel.from_pipeline(pipe), "", options | dict(num_inference_steps=5)
    )
    image = photo(*size)
    # some VAEs are computed in float32 all the same
    x = real_images.to_pixels(image)[None].to(pipe.vae.dtype)
    with torch.no_grad():
        z = pipe.vae.encode(x if recipe is not ltx_statistics else x[:, :, None]).latent_dist.mode()
        expected = own(pipe, z).to(dtype).float()
    error = (real.latents([image]).float() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)
    if own is own_of_sd15:
        assert torch.equal(real.latents([image]).float(), expected)


@pytest.mark.parametrize(
    "recipe, size",
    [
        (sd15, dict(height=16, width=64)),
        (flux, dict(height=8, width=32)),
        (wan, dict(height=16, width=64, num_frames=1)),
    ],
)
def test_an_image_comes_out_as_it_went_in_at_a_size_that_is_not_square(recipe, size):
    """The size may come from `--pipeline_kwargs`. A square of as many pixels would be scrambled."""
    pipe = build(recipe)
    _, options = prompt_and_options(1, recipe)
    options |= dict(size, num_inference_steps=3, output_type="pt", guidance_scale=1.0)
    generator = options.pop("generator")
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    real = real_images.RealImages(hooked, "", options)
    assert (real.width, real.height) == (size["width"], size["height"])

    image = real.crop(photo(64, 64))
    decode = pipe.vae.decode
    decoded = []

    def decode_and_note(z, *args, **options):
        decoded.append(z)
        return decode(z, *args, **options)

    pipe.vae.decode = decode_and_note
    with real.in_place([image], [0]):
        hooked([""], generator=generator, **options)
    x = real_images.to_pixels(image)[None]
    with torch.no_grad():
        z = pipe.vae.encode(x[:, :, None] if recipe is wan else x).latent_dist.mode()
    assert decoded[0].shape == z.shape
    assert torch.allclose(decoded[0], z, atol=1e-4)


def test_an_image_is_not_cut_into_the_frames_of_a_video():
    """4 frames of 4 x 4 latents are as many as 8 x 8 latents of one image."""
    _, options = prompt_and_options(1, wan)
    options.pop("generator")
    options |= dict(height=32, width=32, num_frames=13)
    with pytest.raises(UsageError, match=r"gives its VAE \(4, 4, 4, 4\): .*num_frames"):
        real_images.RealImages(HookedDiffusionModel.from_pipeline(build(wan)), "", options)


def test_a_size_that_no_option_tells_is_the_one_that_is_decoded():
    hooked, vae = with_decoding(lambda sample: 2 * sample, sample_shape=(4, 8, 32))
    real = real_images.RealImages(hooked, "", {"num_inference_steps": 3})
    assert (real.width, real.height) == (64, 16)
    with torch.no_grad():
        z = vae.encode(real_images.to_pixels(photo(64, 16))[None]).latent_dist.mode()
    assert torch.allclose(real.latents([photo(64, 16)]), z / 2, atol=1e-5)


class OwnDecoding(Loop):
    """A pipeline with a way of its own from its sample to the VAE's latents, `before_decoding`."""

    def __call__(self, prompt=None, output_type="pt", **options):
        sample = super().__call__(prompt, output_type="latent", **options).images
        return (
            sample
            if output_type == "latent"
            else self.vae.decode(self.before_decoding(sample)).sample
        )


def with_decoding(before_decoding, sample_shape=(4, 16, 16)):
    pipe = build(sd15)
    hooked = HookedDiffusionModel(
        pipe.unet, pipe.scheduler, pipe.encode_prompt, vae=pipe.vae, sample_shape=sample_shape
    )
    hooked.pipe.__class__ = OwnDecoding
    hooked.pipe.before_decoding = before_decoding
    return hooked, pipe.vae


def test_a_way_of_ones_own_from_sample_to_latents_is_learned():
    offset = torch.randn(1, 4, 1, 1)
    hooked, vae = with_decoding(lambda sample: 3 * sample.flip(1) + offset)
    real = real_images.RealImages(hooked, "", {"num_inference_steps": 3})
    with torch.no_grad():
        z = vae.encode(real_images.to_pixels(photo(32, 32))[None]).latent_dist.mode()
    assert torch.allclose(real.latents([photo(32, 32)]), ((z - offset) / 3).flip(1), atol=1e-5)


def test_latents_that_do_not_follow_number_by_number_are_refused():
    mix = torch.randn(4, 4)
    hooked, _ = with_decoding(lambda sample: torch.einsum("cd,bdhw->bchw", mix, sample))
    with pytest.raises(
        ValueError,
        match="--images: what OwnDecoding gives its VAE is no rearrangement of its sample",
    ):
        real_images.RealImages(hooked, "", {"num_inference_steps": 3})
    hooked, _ = with_decoding(lambda sample: sample[..., 1:])
    with pytest.raises(ValueError, match="no rearrangement"):
        real_images.RealImages(hooked, "", {"num_inference_steps": 3})
    hooked, _ = with_decoding(lambda sample: sample.square())
    with pytest.raises(ValueError, match="no rearrangement"):
        real_images.RealImages(hooked, "", {"num_inference_steps": 3})


class Squares(torch.nn.Module):
    """A VAE that gives back what it got, within the range that it is made for."""

    def __init__(self, low):
        super().__init__()
        self.config = None
        self.low = low
        self.conv = torch.nn.Conv2d(3, 1, 1)

    def encode(self, x):
        return (torch.nn.functional.pixel_unshuffle(x.clamp(self.low, 1), 2),)

    def decode(self, z):
        return (torch.nn.functional.pixel_shuffle(z, 2).clamp(self.low, 1),)


def test_a_vae_made_for_another_range_is_refused_and_a_bad_one_is_remarked(
    model_folder, tmp_path, capsys
):
    real = real_images.RealImages.__new__(real_images.RealImages)
    real.vae = Squares(-1)
    assert real.check_reconstruction(photo(32, 32)) is None
    real.vae = Squares(0)
    with pytest.raises(ValueError, match=r"it is made for \[0, 1\]"):
        real.check_reconstruction(photo(32, 32))
    real.vae.decode = lambda z, time: z
    assert "was not checked: TypeError" in real.check_reconstruction(photo(32, 32))
    (tmp_path / "photos").mkdir()
    photo(32, 32).save(tmp_path / "photos" / "a.png")
    options = dict(
        images=str(tmp_path / "photos"),
        timesteps_per_image=1,
        out_dir=str(tmp_path / "acts"),
        device="cpu",
    )
    collect.main(collect.Config(model_name=str(model_folder), hook_names=[HOOK], **options))
    # its weights are random
    assert "note: the VAE gives an image back with an error of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "dtype, white",
    [(np.uint16, 65535), (np.int32, 255), (np.float32, 255), (np.float32, 1), (np.int32, 65535)],
)
def test_images_of_more_than_8_bits_keep_their_brightness(tmp_path, dtype, white):
    """Grey of two thirds stays that, whatever number is white."""
    levels = np.full((8, 8), white * 2 / 3).astype(dtype)
    levels[0, 0] = white
    Image.fromarray(levels).save(tmp_path / "grey.tiff")
    assert np.array(open_image(str(tmp_path / "grey.tiff")))[4, 4].tolist() == [170, 170, 170]


def test_a_tiff_of_12_bits_keeps_its_brightness():
    picture = Image.fromarray(np.full((8, 8), 4095 * 2 // 3, np.uint16))
    assert white_level(picture) == 65535
    picture.tag_v2 = {258: (12,)}
    assert white_level(picture) == 4095


def test_numbers_of_which_none_is_known_to_be_white_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 1e6, np.float32)).save(tmp_path / "grey.tiff")
    with pytest.raises(UsageError, match="it is not known which is white"):
        open_image(str(tmp_path / "grey.tiff"))


def test_real_pictures_are_encoded_noised_and_run_once_at_each_timestep(
    collect_config, model_folder, tmp_path
):
    """Against the same by hand: the VAE, `add_noise` and one forward of the UNet with the empty
    prompt."""
    folder = photos(tmp_path / "photos", 7, (64, 64))
    options = dict(
        num_inference_steps=None,
        images=str(folder),
        timesteps_per_image=3,
        store_dtype="float32",
        batch_size=4,
    )
    options["save_samples"] = True
    collect.main(replace(collect_config, **options))
    out = Path(collect_config.out_dir)
    name = COLLECTED_HOOKS[0]
    x = np.load(out / f"{name}.npy")
    times = np.load(out / f"{name}.timesteps.npy")
    assert x.shape == (7, 3, 64, 16)
    assert (times == times[0]).all()
    lines = read_lines(out / "prompts.jsonl")
    assert [(line["image"], line["prompt"], line["seed"]) for line in lines] == [
        (f"{i}.png", "", i) for i in range(7)
    ]

    pipe = HookedDiffusionModel.from_pretrained(model_folder).pipe
    seen = []
    pipe.unet.get_submodule(name).register_forward_hook(
        lambda m, i, o: seen.append(o[0].flatten(2).transpose(1, 2))
    )
    pictures = [Image.open(folder / f"{i}.png") for i in range(4)]
    pictures = [p.resize((32, 32), Image.Resampling.LANCZOS) for p in pictures]
    pixels = (
        torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    )
    with torch.no_grad():
        z = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = torch.cat(
            [
                torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i))
                for i in range(4)
            ]
        )
        text, _ = pipe.encode_prompt([""] * 4, "cpu", 1, False)
        for t in times[0]:
            t = torch.tensor(int(t))
            pipe.unet(
                pipe.scheduler.add_noise(z, noise, t.repeat(4)), t, encoder_hidden_states=text
            )
    by_hand = torch.stack(seen, 1).numpy()
    assert np.abs(x[:4] - by_hand).max() < 1e-4 * np.abs(by_hand).max()
    assert np.allclose(np.load(out / "samples.npy")[:4], z.numpy(), atol=1e-5)
    assert read_json(out / f"{name}.json")["timesteps"] == times[0].tolist()
    before = contents(out)
    collect.main(replace(collect_config, **options))  # finished: nothing changes
    assert contents(out) == before


def test_pictures_go_where_a_packed_sample_has_them(tmp_path):
    """Of a family that packs latents: as its own packing does, noised as its own scheduler does."""
    pipe = build(flux)
    folder = photos(tmp_path / "photos", 2)
    pipe.vae.register_to_config(shift_factor=0.3)
    hooked = HookedDiffusionModel.from_pipeline(pipe)
    seen = []
    options = dict(
        num_inference_steps=4, output_type="latent", height=12, width=16, max_sequence_length=32
    )
    pictures = real_images.RealImages(hooked, "", options)
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: seen.append((k["hidden_states"], k["timestep"])), with_kwargs=True
    )
    crops = [pictures.crop(str(folder / f"{i}.png")) for i in range(2)]  # they are 4 x 3
    with pictures.in_place(crops, [3, 4]) as sampling:
        clean = hooked(["", ""], generator=real_images.seeded([3, 4]), **options).images
    read = [real_images.to_pixels(crop) for crop in crops]
    assert torch.equal(sampling.sample, clean)
    with torch.no_grad():
        z = (
            pipe.vae.encode(torch.stack(read)).latent_dist.mode() - 0.3
        ) * pipe.vae.config.scaling_factor
    packed = pipe._pack_latents(z, 2, 4, 6, 8)
    assert torch.equal(clean, packed)
    noise = torch.stack(
        [torch.randn(12, 16, generator=torch.Generator().manual_seed(i)) for i in (3, 4)]
    )
    for sample, t in seen[1:]:
        assert torch.allclose(sample, (1 - t[0]) * packed + t[0] * noise, atol=1e-5)


def test_pictures_of_a_data_set(collect_config, tmp_path):
    folder = photos(tmp_path / "photos", 3)
    (folder / "p.csv").write_text(
        "file,caption,kind\n" + "".join(f"{i}.png,a picture,{i}\n" for i in range(3))
    )
    options = dict(
        num_inference_steps=None,
        images="file",
        dataset_name=str(folder / "p.csv"),
        timesteps_per_image=1,
    )
    options["save_samples"] = True
    collect.main(replace(collect_config, **options))
    out = Path(collect_config.out_dir)
    lines = read_lines(out / "prompts.jsonl")
    assert [(line["file"], line["prompt"], line["kind"]) for line in lines] == [
        (f"{i}.png", "a picture", str(i)) for i in range(3)
    ]
    collect.main(
        replace(
            collect_config,
            **options
            | dict(dataset_name=None, images=str(folder), out_dir=collect_config.out_dir + "2"),
        )
    )
    samples = [np.load(Path(d) / "samples.npy") for d in (out, collect_config.out_dir + "2")]
    assert np.array_equal(*samples)


def test_pictures_with_guidance_have_as_many_steps_in_both_files(collect_config, tmp_path):
    folder = photos(tmp_path / "photos", 3)
    options = dict(
        num_inference_steps=None,
        images=str(folder),
        guidance_scale=5.0,
        rows="both",
        hook_names=["mid_block"],
    )
    collect.main(replace(collect_config, **options, num_images_per_prompt=2))
    shapes = [
        np.load(Path(collect_config.out_dir) / f"mid_block{end}.npy").shape
        for end in ("", ".uncond", ".timesteps")
    ]
    assert shapes == [(6, 4, 64, 16), (6, 4, 64, 16), (6, 4)]


def test_pictures_of_every_kind(tmp_path):
    levels = np.linspace(0, 65535, 30, dtype=np.uint16).repeat(40).reshape(30, 40)
    grey = Image.fromarray(levels)
    clear = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    turned = Image.new("RGB", (30, 40))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)

    def read(source):
        return real_images.to_pixels(real_images.crop_image(source, 40, 30))

    assert torch.allclose(read(grey)[0, :, 0], torch.linspace(-1, 1, 30), atol=0.02)
    assert torch.equal(read(clear), torch.ones(3, 30, 40))  # what is transparent is white
    assert real_images.open_image(str(tmp_path / "turned.jpg")).size == (40, 30)
    assert read(Image.new("P", (1, 1))).shape == (3, 30, 40)
    (tmp_path / "broken.png").write_bytes(
        photos(tmp_path / "p", 1).joinpath("0.png").read_bytes()[:300]
    )
    with pytest.raises(ValueError, match="broken.png can't be read"):
        read(str(tmp_path / "broken.png"))


def test_a_timestep_that_a_scheduler_meets_twice_is_kept_once():
    times = torch.tensor([9.0, 6.0, 6.0, 3.0])
    cache = {"timesteps": {"a": times}, "output_uncond": {"a": torch.arange(8).view(1, 4, 2, 1)}}
    collect.without_noise_step(cache)
    assert cache["timesteps"]["a"].tolist() == [6, 3]
    assert cache["output_uncond"]["a"].flatten().tolist() == [2, 3, 6, 7]
