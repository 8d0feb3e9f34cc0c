"""Tiny pipelines built from configs alone (nothing is downloaded), two prompts in under 0.3 s."""

import warnings

import torch

PROMPTS = ["a red fox in snow", "blue ocean waves at night", "three green bottles"]


def clip_tokenizer():
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], pad_token="!", model_max_length=77)


def clip_text_encoder(projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=200,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def tiny_unet(**options):
    from diffusers import UNet2DConditionModel

    defaults = dict(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        norm_num_groups=2,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return UNet2DConditionModel(**(defaults | options))


def sd15(scheduler=None):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        tiny_vae(),
        clip_text_encoder(),
        clip_tokenizer(),
        tiny_unet(),
        scheduler or DDIMScheduler(clip_sample=False, steps_offset=1),
        None,
        None,
        requires_safety_checker=False,
    )


def sdxl(scheduler=None):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = tiny_unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        tiny_vae(),
        clip_text_encoder(),
        clip_text_encoder(True),
        clip_tokenizer(),
        clip_tokenizer(),
        unet,
        scheduler or EulerDiscreteScheduler(),
    )


def build(recipe, **options):
    """A seeded pipeline whose zero-initialised weights are made random, so that its two guidance passes differ."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = recipe(**options)
    for p in pipe.unet.parameters():
        if p.ndim > 1 and not p.any():
            p.data.normal_(0, 0.05)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_options(n, **options):
    """Arguments of a short, seeded generation of n rows."""
    seeds = [torch.Generator().manual_seed(i) for i in range(n)]
    return dict(generator=seeds, num_inference_steps=2, guidance_scale=5.0, output_type="latent", height=32, width=32) | options
