"""A tiny pipeline of every other kind: RECIPES are those that every test of families should pass,
EXTRAS have their own quirks.

What each has of its own stands in its docstring: how guidance runs (c and u are the conditional and
the unconditional rows; "u, c" is one batch in that order, "c then u" two forwards) and what one row
looks like at the denoiser.
"""

import diffusers
import transformers
from tiny import (
    called_with,
    clip_text_encoder,
    clip_tokenizer,
    language_model,
    qwen_tokenizer,
    qwen_vl,
    sd15,
    sdxl,
    t5_encoder,
    t5_tokenizer,
    tiny_unet,
    tiny_vae,
)
from tokenizers.pre_tokenizers import ByteLevel


def flow_matching(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def blurry(n):
    return ["blurry"] * n


@called_with(height=12, width=16, max_sequence_length=32)
def sd3():
    """u, c; (4, 6, 8). The last block returns (None, image tokens)."""
    size = dict(
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
    )
    size |= dict(
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(sample_size=16, pos_embed_max_size=32, **size),
        scheduler=flow_matching(),
        vae=tiny_vae(shift_factor=0.0),
        text_encoder=clip_text_encoder(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux_parts():
    """What the pipelines of FLUX.1 are made of."""
    size = dict(
        num_layers=2,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        patch_size=1,
        in_channels=16,
    )
    size |= dict(
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return dict(
        transformer=diffusers.FluxTransformer2DModel(**size),
        scheduler=flow_matching(),
        vae=tiny_vae(shift_factor=0.0),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


@called_with(
    true_cfg_scale=4.0, negative_prompt=blurry, height=12, width=16, max_sequence_length=32
)
def flux():
    """c then u beside an embedded guidance scale; packed (12, 16)."""
    return diffusers.FluxPipeline(**flux_parts())


@called_with(
    height=16, width=24, max_sequence_length=32, use_resolution_binning=False, clean_caption=False
)
def pixart():
    """u, c; (4, 8, 12), of which the denoiser returns 8 channels."""
    size = dict(
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
    )
    size |= dict(
        sample_size=8, caption_channels=32, cross_attention_dim=24, use_additional_conditions=False
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(**size),
        scheduler=diffusers.DDIMScheduler(),
        vae=tiny_vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


@called_with(prompt=None, class_labels=lambda n: list(range(n)), output_type="np")
def dit():
    """c, u, and the scheduler steps them both; (4, 8, 8), always square."""
    size = dict(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
    )
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(sample_size=8, **size),
        scheduler=diffusers.DDIMScheduler(),
        vae=tiny_vae(),
    )


@called_with(prompt=None, batch_size=lambda n: n, guidance_scale=None, output_type="np")
def ddpm():
    """No guidance; (3, 8, 12)."""
    size = dict(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=(8, 12),
        attention_head_dim=4,
    )
    size |= dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.DDPMPipeline(
        unet=diffusers.UNet2DModel(**size), scheduler=diffusers.DDPMScheduler()
    )


def wan_transformer():
    size = dict(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        patch_size=(1, 2, 2),
        in_channels=4,
        out_channels=4,
    )
    return diffusers.WanTransformer3DModel(
        text_dim=32, freq_dim=32, ffn_dim=32, rope_max_seq_len=32, **size
    )


@called_with(height=32, width=64, num_frames=9, max_sequence_length=32)
def wan(**components):
    """c then u; (4, 3, 4, 8)."""
    statistics = dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return diffusers.WanPipeline(
        transformer=wan_transformer(),
        scheduler=flow_matching(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics
        ),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        **components,
    )


@called_with(height=32, width=64, num_frames=33, max_sequence_length=32)
def ltx():
    """u, c; packed (24, 8)."""
    vae = {side + "block_out_channels": (8,) * 4 for side in ("", "decoder_")}
    vae |= {side + "layers_per_block": (1,) * 5 for side in ("", "decoder_")}
    vae |= {side + "spatio_temporal_scaling": (True,) * 4 for side in ("", "decoder_")}
    vae |= dict(
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4
    )
    size = dict(
        num_layers=2, num_attention_heads=4, attention_head_dim=8, in_channels=8, out_channels=8
    )
    return diffusers.LTXPipeline(
        transformer=diffusers.LTXVideoTransformer3DModel(
            cross_attention_dim=32, caption_channels=32, **size
        ),
        scheduler=flow_matching(),
        vae=diffusers.AutoencoderKLLTXVideo(latent_channels=8, patch_size=1, **vae),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


@called_with(height=32, width=64, num_frames=9, max_sequence_length=32)
def cogvideox():
    """u, c; frames before channels, (3, 4, 4, 8)."""
    size = dict(
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
    )
    size |= dict(
        sample_height=4, sample_width=8, sample_frames=9, text_embed_dim=32, max_text_seq_length=32
    )
    vae = dict(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2
    )
    return diffusers.CogVideoXPipeline(
        transformer=diffusers.CogVideoXTransformer3DModel(**size),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        vae=diffusers.AutoencoderKLCogVideoX(**vae),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


@called_with(audio_end_in_s=1.0)
def stable_audio():
    """u, c; (3, 12), and a block has a global token before those 12."""
    size = dict(
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        sample_size=12,
    )
    size |= dict(
        in_channels=3,
        out_channels=3,
        cross_attention_dim=4,
        cross_attention_input_dim=4,
        global_states_input_dim=8,
    )
    vae = dict(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], channel_multiples=[2, 4], sampling_rate=4
    )
    vae |= dict(decoder_channels=3, decoder_input_channels=3)
    projection = dict(text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32)
    return diffusers.StableAudioPipeline(
        transformer=diffusers.StableAudioDiTModel(time_proj_dim=8, **size),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
        vae=diffusers.AutoencoderOobleck(**vae),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        projection_model=diffusers.StableAudioProjectionModel(**projection),
    )


@called_with(height=24, width=32, max_sequence_length=64)
def zimage():
    """c, u; the sample is a list of (4, 1, 12, 16). A block has the image tokens padded to a
    multiple of 32, then the text."""
    size = dict(
        n_layers=2,
        n_refiner_layers=1,
        dim=32,
        n_heads=2,
        n_kv_heads=2,
        in_channels=4,
        cap_feat_dim=16,
    )
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            axes_dims=[8, 4, 4], axes_lens=[512, 32, 32], **size
        ),
        scheduler=flow_matching(),
        vae=tiny_vae(shift_factor=0.0),
        text_encoder=language_model("Qwen3"),
        tokenizer=qwen_tokenizer(),
    )


@called_with(height=48, width=64, max_sequence_length=64, system_prompt="")
def lumina2():
    """c then u; (4, 6, 8). A block has the text, whose length differs from row to row, then the
    image tokens."""
    size = dict(
        num_layers=2,
        num_refiner_layers=1,
        hidden_size=24,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
    )
    size |= dict(
        sample_size=8,
        in_channels=4,
        cap_feat_dim=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 64, 64),
    )
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(**size),
        scheduler=flow_matching(),
        vae=tiny_vae(),
        text_encoder=language_model("Gemma2"),
        tokenizer=qwen_tokenizer(),
    )


@called_with(
    true_cfg_scale=4.0,
    negative_prompt=blurry,
    height=16,
    width=32,
    num_frames=9,
    max_sequence_length=32,
    prompt_template={"template": "{}", "crop_start": 0},
)
def hunyuanvideo():
    """c then u beside an embedded guidance scale; (4, 3, 2, 4)."""
    size = dict(
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        attention_head_dim=10,
    )
    size |= dict(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=32,
    )
    vae = dict(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )
    return diffusers.HunyuanVideoPipeline(
        transformer=diffusers.HunyuanVideoTransformer3DModel(rope_axes_dim=(2, 4, 4), **size),
        scheduler=flow_matching(shift=7.0),
        vae=diffusers.AutoencoderKLHunyuanVideo(mid_block_add_attention=False, **vae),
        text_encoder=language_model("Llama"),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=clip_tokenizer(),
    )


@called_with(
    guidance_scale=None,
    true_cfg_scale=4.0,
    negative_prompt=blurry,
    height=24,
    width=32,
    max_sequence_length=64,
)
def qwenimage():
    """c then u; packed (12, 16). The text is padded to the longest of the batch."""
    size = dict(
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        patch_size=2,
        in_channels=16,
        out_channels=4,
    )
    vae = dict(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True]
    )
    pipe = diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4), **size
        ),
        scheduler=flow_matching(),
        vae=diffusers.AutoencoderKLQwenImage(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **vae),
        text_encoder=qwen_vl(),
        tokenizer=qwen_tokenizer(),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = (
        "{}",
        0,
    )  # else 200 letters of instruction
    return pipe


RECIPES = [
    sd15,
    sdxl,
    sd3,
    flux,
    pixart,
    dit,
    ddpm,
    wan,
    ltx,
    cogvideox,
    stable_audio,
    zimage,
    lumina2,
    hunyuanvideo,
    qwenimage,
]


def pictures(n):
    from PIL import Image

    ramp = Image.linear_gradient("L").convert("RGB")
    return [ramp.rotate(90 * i).resize((24, 16)) for i in range(n)]


def sd15_parts(**unet):
    """What the pipelines round the UNet of Stable Diffusion 1.5 share."""
    return dict(
        vae=tiny_vae(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=tiny_unet(**unet),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        feature_extractor=None,
    )


UNCHECKED = dict(safety_checker=None, requires_safety_checker=False)


@called_with(image=pictures, height=16, width=24)
def controlnet():
    """u, c in the ControlNet, then u, c in the UNet; (4, 8, 12)."""
    parts = sd15_parts()
    net = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(8, 16)
    )
    return diffusers.StableDiffusionControlNetPipeline(**parts, **UNCHECKED, controlnet=net)


@called_with(height=16, width=24, num_frames=3)
def animatediff():
    """u, c; (4, 3, 8, 12), whose frames become rows inside."""
    size = dict(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    return diffusers.AnimateDiffPipeline(
        **sd15_parts(), motion_adapter=diffusers.MotionAdapter(**size)
    )


@called_with(pag_scale=3.0, height=16, width=24)
def pag():
    """u, c and c perturbed; (4, 8, 12)."""
    return diffusers.StableDiffusionPAGPipeline(**sd15_parts(), **UNCHECKED)


@called_with(image=pictures, image_guidance_scale=1.5)
def instruct_pix2pix():
    """c, image alone, u; (8, 8, 12): the sample and the picture, whose size it takes."""
    return diffusers.StableDiffusionInstructPix2PixPipeline(
        **sd15_parts(in_channels=8), **UNCHECKED
    )


@called_with(image=pictures, strength=1.0)
def img2img():
    """u, c; (4, 8, 12): the picture's latents with noise, of the picture's size."""
    return diffusers.StableDiffusionImg2ImgPipeline(**sd15_parts(), **UNCHECKED)


def masks(n):
    from PIL import Image

    mask = Image.linear_gradient("L").point(lambda level: 255 * (level > 127)).convert("RGB")
    return [mask.rotate(90 * i).resize((24, 16)) for i in range(n)]


@called_with(image=pictures, mask_image=masks, height=16, width=24, strength=1.0)
def inpaint():
    """u, c; (9, 8, 12): the sample, the mask and the picture without what is masked."""
    return diffusers.StableDiffusionInpaintPipeline(**sd15_parts(in_channels=9), **UNCHECKED)


@called_with(
    image=pictures,
    true_cfg_scale=4.0,
    negative_prompt=blurry,
    height=12,
    width=16,
    max_area=12 * 16,
    _auto_resize=False,
    max_sequence_length=32,
)
def kontext():
    """c then u beside an embedded guidance scale; packed (12 + 24, 16): the sample, then the
    picture's tokens."""
    return diffusers.FluxKontextPipeline(**flux_parts())


@called_with(**wan.options)
def wan22():
    """As `wan`, with one transformer for the first step and another for the second."""
    return wan(transformer_2=wan_transformer(), boundary_ratio=0.5)


@called_with(negative_prompt="blurry", height=48, width=64, clean_caption=False)
def lumina():
    """c, u; (4, 6, 8), of which the denoiser returns 8 channels."""
    size = dict(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    transformer = diffusers.LuminaNextDiT2DModel(sample_size=8, in_channels=4, **size)
    transformer.pad_token.data.zero_()  # it is unused, and uninitialised
    return diffusers.LuminaPipeline(
        transformer=transformer,
        scheduler=flow_matching(),
        vae=tiny_vae(),
        text_encoder=language_model("Gemma"),
        tokenizer=qwen_tokenizer(),
    )


def clip_image_encoder():
    size = dict(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        projection_dim=32,
    )
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(image_size=224, patch_size=112, **size)
    )


@called_with(prior_num_inference_steps=2, prior_guidance_scale=5.0, height=32, width=48)
def kandinsky22():
    """Two loops in one call, u, c in each: a prior over (32,), then a UNet over (4, 16, 24)."""
    prior = dict(num_layers=2, num_attention_heads=2, attention_head_dim=12, embedding_dim=32)
    unet = dict(
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=32,
    )
    movq = dict(
        block_out_channels=(8, 8), norm_num_groups=2, latent_channels=4, num_vq_embeddings=12
    )
    movq |= dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    return diffusers.KandinskyV22CombinedPipeline(
        unet=tiny_unet(**unet),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        movq=diffusers.VQModel(**movq),
        prior_prior=diffusers.PriorTransformer(**prior),
        prior_image_encoder=clip_image_encoder(),
        prior_text_encoder=clip_text_encoder(projection=True),
        prior_tokenizer=clip_tokenizer(),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample"
        ),
        prior_image_processor=None,
    )


@called_with(
    prompt=None,
    image=pictures,
    guidance_scale=None,
    max_guidance_scale=5.0,
    height=16,
    width=24,
    num_frames=3,
)
def svd():
    """u, c; (3, 8, 8, 12): frames, then the channels of sample and picture; the frames become rows
    inside."""
    unet = dict(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
        up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
        num_attention_heads=(2, 4),
        cross_attention_dim=32,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    vae = dict(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2)
    return diffusers.StableVideoDiffusionPipeline(
        vae=diffusers.AutoencoderKLTemporalDecoder(**vae),
        image_encoder=clip_image_encoder(),
        unet=diffusers.UNetSpatioTemporalConditionModel(**unet),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous"
        ),
        feature_extractor=transformers.CLIPImageProcessor(),
    )


@called_with(negative_prompt="blurry", height=32, width=64, num_frames=9, max_sequence_length=64)
def kandinsky5():
    """c then u; channels last, (3, 4, 8, 4)."""
    size = dict(
        num_visual_blocks=2,
        num_text_blocks=1,
        model_dim=16,
        ff_dim=16,
        time_dim=16,
        axes_dims=(4, 2, 2),
    )
    vae = dict(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=diffusers.Kandinsky5Transformer3DModel(in_text_dim=16, in_text_dim2=32, **size),
        scheduler=flow_matching(),
        vae=diffusers.AutoencoderKLHunyuanVideo(mid_block_add_attention=False, **vae),
        text_encoder=qwen_vl(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=clip_tokenizer(),
    )
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = (
        "{}",
        0,
    )  # else 800 letters of instruction
    return pipe


@called_with(height=12, width=16, max_sequence_length=32)
def auraflow():
    """u, c; (4, 6, 8). A block has 8 registers before the text."""
    size = dict(
        num_mmdit_layers=2,
        num_single_dit_layers=1,
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
    )
    size |= dict(
        sample_size=16, pos_embed_max_size=256, caption_projection_dim=32, joint_attention_dim=32
    )
    return diffusers.AuraFlowPipeline(
        transformer=diffusers.AuraFlowTransformer2DModel(**size),
        scheduler=flow_matching(),
        vae=tiny_vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


@called_with(
    negative_prompt="blurry",
    height=64,
    width=96,
    max_sequence_length=32,
    use_resolution_binning=False,
    complex_human_instruction=[],
)
def sana():
    """u, c; (4, 4, 6)."""
    size = dict(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        sample_size=8,
    )
    size |= dict(
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    vae = {side + "_block_out_channels": (8,) * 5 for side in ("encoder", "decoder")}
    vae |= {side + "_layers_per_block": (1,) * 5 for side in ("encoder", "decoder")}
    vae |= {side + "_qkv_multiscales": ((),) * 5 for side in ("encoder", "decoder")}
    return diffusers.SanaPipeline(
        transformer=diffusers.SanaTransformer2DModel(**size),
        scheduler=flow_matching(),
        vae=diffusers.AutoencoderDC(latent_channels=4, **vae),
        text_encoder=language_model("Gemma2"),
        tokenizer=qwen_tokenizer(),
    )


@called_with(audio_length_in_s=0.006, max_new_tokens=4)
def audioldm2():
    """u, c; (4, 12, 4): time, then mel bins. Its T5 text is padded to the longest of the batch."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    text = dict(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=300,
    )
    audio = dict(
        spec_size=8,
        window_size=4,
        num_mel_bins=8,
        depths=[1],
        num_attention_heads=[1],
        patch_embeds_hidden_size=8,
    )
    audio |= dict(patch_size=2, patch_stride=2, hidden_size=8, intermediate_size=16)
    unet = dict(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=16,
        attention_head_dim=2,
    )
    unet |= dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    unet |= dict(
        cross_attention_dim=((None, 16, 32),) * 2
    )  # attention to the map itself, to GPT-2's states, to T5's
    gpt2 = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)
    vocoder = dict(
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
    )
    return diffusers.AudioLDM2Pipeline(
        vae=tiny_vae(in_channels=1, out_channels=1),
        text_encoder=transformers.ClapModel(
            transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
        ),
        text_encoder_2=t5_encoder(),
        projection_model=diffusers.AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=16
        ),
        language_model=transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2)),
        tokenizer=transformers.RobertaTokenizer(
            {t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=32
        ),
        tokenizer_2=t5_tokenizer(),
        feature_extractor=None,
        unet=diffusers.AudioLDM2UNet2DConditionModel(**unet),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        vocoder=transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**vocoder)),
    )


EXTRAS = [
    controlnet,
    animatediff,
    pag,
    instruct_pix2pix,
    img2img,
    inpaint,
    kontext,
    wan22,
    lumina,
    kandinsky22,
    svd,
    kandinsky5,
    auraflow,
    sana,
    audioldm2,
]
