"""Tiny pipelines built from configs alone (nothing is downloaded), two prompts in under 0.3 s.

The parts, and the two recipes that most tests use; `families.py` has one recipe for each other kind
of pipeline.
"""

import warnings

import torch

from hook import HookedDiffusionModel

PROMPTS = ["a red fox in snow", "blue ocean waves at night", "three green bottles"]


def called_with(**options):
    """Keeps beside a recipe, as `recipe.options`, what the call of its pipeline needs beyond the
    common options.

    A function stands for its value for n prompts, None for a common option that the pipeline does
    not take.
    """

    def keep(recipe):
        recipe.options = options
        return recipe

    return keep


def clip_tokenizer():
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    return CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[], pad_token="!", model_max_length=77
    )


def t5_tokenizer():
    from transformers import T5Tokenizer

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((chr(c), -3.0) for c in range(33, 127)),
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=32)


def qwen_tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=64
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    return tokenizer


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
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_encoder():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=1, vocab_size=128)
    )


def language_model(family):
    """A decoder whose hidden states are the text embedding: family is Gemma, Gemma2, Llama or
    Qwen3."""
    import transformers

    size = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8, vocab_size=300
    )
    size |= dict(
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return getattr(transformers, family + "Model")(getattr(transformers, family + "Config")(**size))


def qwen_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    size = dict(hidden_size=16, intermediate_size=16)
    text = dict(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=300,
        bos_token_id=0,
        eos_token_id=0,
    )
    text |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2]))
    vision = dict(depth=1, num_heads=2, out_hidden_size=16)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=size | text, vision_config=size | vision)
    )


def tiny_vae(**options):
    from diffusers import AutoencoderKL

    defaults = dict(
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=32,
    )
    options = defaults | options
    depth = len(options["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        **options,
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


@called_with(height=32, width=32)
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


@called_with(height=32, width=32)
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
    """A seeded pipeline whose zero-initialised weights are made random, so that its two guidance
    passes differ."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = recipe(**options)
    for denoiser in HookedDiffusionModel.from_pipeline(pipe).denoisers.values():
        for p in denoiser.parameters():
            if p.ndim > 1 and not p.any():
                p.data.normal_(0, 0.05)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_options(n, recipe=None, **options):
    """Arguments of a short, seeded generation of n prompts.

    With a recipe they are all that its pipeline needs, the first n of PROMPTS (or what it takes in
    their place) among them; without one they are those of `sd15` but for the prompts.
    """
    rows = n * next((v for name, v in options.items() if name.endswith("_per_prompt")), 1)
    seeds = [torch.Generator().manual_seed(i) for i in range(rows)]
    common = dict(generator=seeds, num_inference_steps=2, guidance_scale=5.0, output_type="latent")
    if recipe is None:
        return common | sd15.options | options
    own = {name: value(n) if callable(value) else value for name, value in recipe.options.items()}
    needed = common | dict(prompt=(PROMPTS * n)[:n]) | own
    return {name: value for name, value in needed.items() if value is not None} | options
