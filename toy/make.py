"""Draw, train and check the toy: a real Stable Diffusion pipeline of 6.1 M parameters.

    python -m toy.make draw                    # a grid of the drawings that it learns from
    python -m toy.make train --folder mine     # such a model from nothing; resumes after a stop
    python -m toy.make check                   # do its images show what the prompts asked for?

It is small enough to ship, and every concept in it is known: that is what it is for. It does not
try to be a good image model. Nothing is downloaded.

`train` makes drawings (toy/concepts.py) and fits three models to them, in this order:

1. a classifier of (object, style, colour), which judges images later;
2. an AutoencoderKL, 64 x 64 x 3 -> 32 x 32 x 4;
3. a UNet2DConditionModel together with its CLIPTextModel: v-prediction, cosine betas, a moving
   average of the weights, 10 % empty captions, timesteps drawn from a logit-normal distribution.

It writes them as an ordinary diffusers folder. An update of the UNet takes 0.43 s on one core with
AVX512-BF16 and 0.25 s on two. So 16,000 of them take one to two hours, and the rest takes half an
hour more.

The weights that ship had 6000 updates in several sessions, of which the first 2250 were in batches
of 64 and 1750 without the logit-normal. Then this command took 104 minutes on one core:

    python -m toy.make train --start_from toy --unet_iterations 13000 --seed 2

Writes  draw: <folder>/drawings.png.
        train: <folder>/, and checkpoints in <work_dir>/.
        check: check.png and check.json in <out_dir>/, or in <folder>/ if --out_dir is not given.

Sources: v-prediction, Salimans & Ho 2022 (arXiv 2202.00512); cosine betas, Nichol & Dhariwal 2021
(arXiv 2102.09672); logit-normal timesteps, Esser et al. 2024 (arXiv 2403.03206).
"""

import csv
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from cli import HERE, check_positive, resolve_device, run_script
from errors import UsageError
from toy.concepts import (
    BACKGROUNDS,
    CONCEPTS,
    OBJECTS,
    SIZE,
    STYLES,
    Attributes,
    Classifier,
    accuracies,
    captions,
    draw,
    draw_many,
    sample_attributes,
    to_model,
    write_prompts,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

CLASSIFIER_BATCH = 64  # drawings
VAE_BATCH = 32  # drawings
SMALL_MODEL_LR = 1e-3  # of the classifier and the autoencoder
EMPTY_CAPTIONS = 0.1  # fraction; classifier-free guidance needs a model that knows the empty prompt
KL_WEIGHT = 1e-4  # of the autoencoder's loss
CHECK_BATCH = 48  # prompts generated together
CHECK_DRAWINGS = 4000  # drawings on which the classifier itself is checked

LossOf = Callable[[torch.Generator], Tensor]
"""Draws a batch with the generator and returns its loss."""


@dataclass
class Config:
    command: Literal["draw", "train", "check"]
    """Draw the training images, train the model on them, or check what it has learned."""

    # model
    folder: str = str(HERE / "toy")
    """Use this diffusers folder: train writes it, check reads it, draw puts its picture there."""

    start_from: str | None = None
    """Train: begin with the UNet, classifier and autoencoder of this folder, and train only the
    UNet. If not given, all of them are trained from nothing."""

    # data
    num_drawings: int = 32_000
    """Train the autoencoder and the UNet on this many drawings."""

    # training
    classifier_iterations: int = 2500
    """Update the classifier this often, with 64 drawings each time."""

    vae_iterations: int = 1200
    """Update the autoencoder this often, with 32 drawings each time."""

    unet_iterations: int = 16_000
    """Update the UNet this often, with `batch_size` drawings each time."""

    batch_size: int = 16
    """Use this many drawings per update of the UNet. Many small updates learn shapes sooner than
    few large ones."""

    lr: float = 5e-4
    """Use this learning rate for the UNet and its text encoder. It decays over the last third."""

    seed: int = 0
    """Choose drawings, initial weights, batches and noise by this seed."""

    # checking
    num_prompts: int = 576
    """Check: generate images of this many prompts."""

    num_inference_steps: int = 20
    """Check: sample in this many steps."""

    guidance_scale: float = 5.0
    """Check: use this scale of classifier-free guidance."""

    # output
    out_dir: str | None = None
    """Check: write the report into this folder. If not given, it goes into the model's folder."""

    work_dir: str = str(HERE / "toy.work")
    """Train: keep checkpoints in this folder. It may be deleted afterwards."""

    save_every: int = 250
    """Write a checkpoint after this many updates."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


# what decides the weights: training resumes only with the same
DECIDES_WEIGHTS = (
    "start_from",
    "num_drawings",
    "classifier_iterations",
    "vae_iterations",
    "unet_iterations",
    "batch_size",
    "lr",
    "seed",
)
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by the names in its state


def main(cfg: Config) -> None:
    """Draw, train or check. Raises UsageError for an option that can't be used, and if a folder
    holds something that was made with other options."""
    check_positive(cfg, "num_drawings", "classifier_iterations", "vae_iterations")
    check_positive(cfg, "unet_iterations", "batch_size", "save_every")
    check_positive(cfg, "num_prompts", "num_inference_steps")
    device = resolve_device(cfg.device)
    if cfg.command == "train":
        train(cfg, device)
    elif cfg.command == "check":
        check(cfg, device)
    else:
        draw_examples(Path(cfg.folder) / "drawings.png", cfg.seed)


# ---- draw


def draw_examples(path: Path, seed: int) -> None:
    """Save a picture with one drawing of each object (column) and style (row)."""
    rng = np.random.default_rng(seed)
    attributes = []
    for style in STYLES:
        for name in OBJECTS:
            attributes.append(sample_attributes(rng) | {"style": style, "object": name})
    drawings = np.stack([draw(each, rng) for each in attributes])

    path.parent.mkdir(parents=True, exist_ok=True)
    grid(torch.from_numpy(drawings).permute(0, 3, 1, 2), len(OBJECTS)).save(path)
    print(f"one drawing of each object and style in {path}")


def grid(pixels: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """Return one image of drawings uint8 (n, 3, 64, 64), with a gap of 2 pixels between them.

    Each pixel is enlarged to scale x scale.
    """
    num_rows = -(-len(pixels) // columns)
    pitch = SIZE + 2
    canvas = np.full((num_rows * pitch + 2, columns * pitch + 2, 3), 255, np.uint8)
    for i, drawing in enumerate(pixels):
        row, column = divmod(i, columns)
        y = 2 + row * pitch
        x = 2 + column * pitch
        canvas[y : y + SIZE, x : x + SIZE] = drawing.permute(1, 2, 0).numpy()
    height, width, _ = canvas.shape
    image = Image.fromarray(canvas)
    return image.resize((scale * width, scale * height), Image.Resampling.NEAREST)


# ---- the parts of the model


class Parts(NamedTuple):
    """What the pipeline consists of, and the classifier that judges its images."""

    classifier: Classifier
    vae: "AutoencoderKL"
    unet: "UNet2DConditionModel"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    scheduler: "DDIMScheduler"


def make_parts(cfg: Config, device: torch.device) -> Parts:
    """Return new parts, or those of `start_from`, whose autoencoder is frozen then."""
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(cfg.seed)  # the order below decides the initial weights
    tokenizer = build_tokenizer()
    scheduler = build_scheduler()
    if cfg.start_from is None:
        classifier = Classifier()
        vae = build_vae()
        unet = build_unet()
        text_encoder = build_text_encoder(tokenizer)
    else:
        earlier = StableDiffusionPipeline.from_pretrained(cfg.start_from, dtype=torch.float32)
        classifier = Classifier.load(cfg.start_from)
        vae = earlier.vae.eval().requires_grad_(False).to(device)
        unet = earlier.unet.train()
        text_encoder = earlier.text_encoder.train()
    vae.to(memory_format=torch.channels_last)
    unet.to(memory_format=torch.channels_last)
    return Parts(classifier, vae, unet, text_encoder, tokenizer, scheduler)


def build_tokenizer() -> "CLIPTokenizer":
    """Return a CLIPTokenizer that makes each word of the captions one token."""
    from transformers import CLIPTokenizer

    merges = learn_merges(caption_words())
    start = "<|startoftext|>"
    end = "<|endoftext|>"
    letters = [chr(code) for code in range(33, 127)]
    last_letters = [letter + "</w>" for letter in letters]  # "</w>" ends a word
    merged = ["".join(pair) for pair in merges]

    vocab = {}
    for token in [start, end, *letters, *last_letters, *merged]:
        vocab.setdefault(token, len(vocab))
    return CLIPTokenizer(
        vocab=vocab, merges=merges, unk_token=end, pad_token=end, model_max_length=24
    )


def caption_words() -> list[str]:
    """Return every word that occurs in a caption, sorted."""
    values = CONCEPTS | {"background": tuple(BACKGROUNDS), "size": ("small", "large")}
    words = set()
    for i in range(len(OBJECTS)):  # the longest list of values; the shorter ones begin again
        attributes = {name: each[i % len(each)] for name, each in values.items()}
        for caption in captions(attributes):
            words.update(word.strip(",") for word in caption.split())
    return sorted(words)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return the byte-pair merges that make one piece of every word, the first one to do first.

    The most frequent pair of neighbours is merged each time; of equally frequent ones the first in
    the alphabet. For ["on", "one"] it gives [("n", "e</w>"), ("o", "n</w>"), ("o", "ne</w>")].
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while True:
        pairs = []
        for word in pieces:
            pairs += itertools.pairwise(word)
        if not pairs:
            return merges

        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        for word in pieces:
            merge_pair(word, best)


def merge_pair(word: list[str], pair: tuple[str, str]) -> None:
    """Join the pair in a list of pieces, in place: ["o", "n", "e"] becomes ["on", "e"]."""
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i : i + 2] = [word[i] + word[i + 1]]
        i += 1


def build_vae() -> "AutoencoderKL":
    """Return a new autoencoder: images (N, 3, 64, 64) <-> (N, 4, 32, 32)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
    )


def build_unet() -> "UNet2DConditionModel":
    """Return a new UNet whose modules are named as some of Stable Diffusion 1.5's are.

    `up_blocks.1` works on 16 x 16 tokens of width 96.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(32, 96, 160),
        layers_per_block=1,
        cross_attention_dim=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: "CLIPTokenizer") -> "CLIPTextModel":
    """Return a new text encoder of two layers, of width 128."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=128,
            intermediate_size=256,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> "DDIMScheduler":
    """Return the scheduler of training and sampling: cosine betas, v-prediction."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )


# ---- train


def train(cfg: Config, device: torch.device) -> None:
    """Train what `start_from` does not give, and write the model's folder."""
    folder = Path(cfg.folder)
    work_dir = Path(cfg.work_dir)
    if (folder / "model_index.json").exists():
        raise UsageError(f"{folder} holds a trained model; name another --folder")
    claim_work_dir(cfg, work_dir)

    parts = make_parts(cfg, device)
    pixels, attributes = draw_many(cfg.num_drawings, cfg.seed, "drawing")
    if cfg.start_from is None:
        train_classifier(parts.classifier, pixels, attributes, cfg, device)
        train_autoencoder(parts.vae, pixels, cfg, device)
    samples = encode_drawings(parts.vae, pixels, work_dir / "latents.safetensors", device)
    train_unet(parts, samples, attributes, cfg, device)

    save_model(parts, folder, cfg.seed, device)
    print(f"the model is in {folder}; next: python -m toy.make check --folder {folder}")


def claim_work_dir(cfg: Config, work_dir: Path) -> None:
    """Note the options in the folder. Raises UsageError if its checkpoints had other ones."""
    work_dir.mkdir(parents=True, exist_ok=True)
    options = {name: getattr(cfg, name) for name in DECIDES_WEIGHTS}
    text = json.dumps(options, indent=1)
    record = work_dir / "settings.json"
    if record.exists() and record.read_text() != text:
        raise UsageError(
            f"{work_dir} holds checkpoints made with other options; name another --work_dir"
        )
    record.write_text(text)


def train_classifier(
    classifier: Classifier,
    pixels: Tensor,
    attributes: list[Attributes],
    cfg: Config,
    device: torch.device,
) -> None:
    """Fit the classifier to noisy drawings; the noise has a level of 0 to 0.15 in each."""
    labels = {}
    for name, values in CONCEPTS.items():
        labels[name] = torch.tensor([values.index(each[name]) for each in attributes])

    def loss_of(generator: torch.Generator) -> Tensor:
        """Return the sum of the cross entropies of object, style and colour."""
        i = torch.randint(len(pixels), (CLASSIFIER_BATCH,), generator=generator)
        x = to_model(pixels[i])
        level = 0.15 * torch.rand(CLASSIFIER_BATCH, 1, 1, 1, generator=generator)
        x = x + level * torch.randn(x.shape, generator=generator)
        logits = classifier(x.to(device))
        return sum(F.cross_entropy(logits[name], labels[name][i].to(device)) for name in logits)

    modules = {"classifier": classifier}
    iterations = cfg.classifier_iterations
    fit("classifier", modules, loss_of, iterations, SMALL_MODEL_LR, cfg, device)


def train_autoencoder(
    vae: "AutoencoderKL", pixels: Tensor, cfg: Config, device: torch.device
) -> None:
    """Fit the autoencoder: absolute and squared error, and a little of the KL divergence."""

    def loss_of(generator: torch.Generator) -> Tensor:
        i = torch.randint(len(pixels), (VAE_BATCH,), generator=generator)
        x = to_model(pixels[i]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            x_hat = vae.decode(posterior.mean + posterior.std * noise).sample

        squared_mean = posterior.mean.float() ** 2
        log_variance = posterior.logvar.float()
        kl = 0.5 * (squared_mean + posterior.var.float() - 1 - log_variance).mean()
        # the error is computed twice: sharing it would round its 16-bit gradient elsewhere
        absolute = (x_hat.float() - x).abs().mean()
        squared = (x_hat.float() - x).pow(2).mean()
        return absolute + squared + KL_WEIGHT * kl

    fit("vae", {"vae": vae}, loss_of, cfg.vae_iterations, SMALL_MODEL_LR, cfg, device)


def encode_drawings(
    vae: "AutoencoderKL", pixels: Tensor, path: Path, device: torch.device
) -> Tensor:
    """Return the drawings as the autoencoder encodes them, (n, 4, 32, 32), with a deviation of 1.

    The file at `path` keeps the codes for a resumed run. The factor that they are multiplied by is
    written into the autoencoder's config, as Stable Diffusion does it.
    """
    if not path.exists():
        encoded = []
        with torch.no_grad():
            for batch in tqdm(pixels.split(128), "encoding"):
                encoded.append(vae.encode(to_model(batch).to(device)).latent_dist.mean.cpu())
        save_whole(path, {"latents": torch.cat(encoded)})

    samples = load_file(path)["latents"]
    vae.register_to_config(scaling_factor=round(1 / samples.std().item(), 5))
    return (samples * vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)


def train_unet(
    parts: Parts,
    samples: Tensor,
    attributes: list[Attributes],
    cfg: Config,
    device: torch.device,
) -> None:
    """Fit the UNet and the text encoder to predict v of noisy samples (n, 4, 32, 32)."""
    batch_size = cfg.batch_size
    scheduler = parts.scheduler

    def tokenize(texts: str | list[str]) -> Tensor:
        """Return the token ids of texts, (texts, 24)."""
        return parts.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids

    token_ids = torch.stack([tokenize(captions(each)) for each in tqdm(attributes, "tokens")])
    empty = tokenize("")[0]

    def loss_of(generator: torch.Generator) -> Tensor:
        """Return the mean squared error of v, for a random caption, timestep and noise of each
        sample."""
        i = torch.randint(len(samples), (batch_size,), generator=generator)
        x0 = samples[i].to(device)

        which_caption = torch.randint(token_ids.shape[1], (batch_size,), generator=generator)
        is_empty = torch.rand(batch_size, 1, generator=generator) < EMPTY_CAPTIONS
        tokens = torch.where(is_empty, empty, token_ids[i, which_caption]).to(device)

        # logit-normal around 0.5: most timesteps lie where shapes form
        position = torch.sigmoid(0.5 + torch.randn(batch_size, generator=generator))
        timesteps = (1000 * position).long().to(device)

        noise = torch.randn(x0.shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            noisy = scheduler.add_noise(x0, noise, timesteps)
            text = parts.text_encoder(tokens)[0]
            v = parts.unet(noisy, timesteps, encoder_hidden_states=text).sample
        return F.mse_loss(v.float(), scheduler.get_velocity(x0, noise, timesteps))

    modules = {"unet": parts.unet, "text_encoder": parts.text_encoder}
    fit("unet", modules, loss_of, cfg.unet_iterations, cfg.lr, cfg, device)


def save_model(parts: Parts, folder: Path, seed: int, device: torch.device) -> None:
    """Write the diffusers folder in float16, with the classifier and the prompts.

    It gets its name when it is complete.
    """
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        parts.vae,
        parts.text_encoder,
        parts.tokenizer,
        parts.unet,
        parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = folder.with_name(folder.name + ".partial")
    pipe.to(device, torch.float16).save_pretrained(partial)
    save_file(parts.classifier.state_dict(), partial / "classifier.safetensors")
    write_prompts(partial / "prompts.csv", seed)
    partial.replace(folder)


# ---- one loop for all three models


def fit(
    name: str,
    modules: dict[str, nn.Module],
    loss_of: LossOf,
    iterations: int,
    lr: float,
    cfg: Config,
    device: torch.device,
) -> None:
    """Train modules with Adam, and leave them with the moving average of their weights.

    <work_dir>/<name>.safetensors is the checkpoint. Every iteration seeds a generator of its own,
    so a run that resumes from it ends with the weights of an undisturbed one.
    """
    path = Path(cfg.work_dir) / f"{name}.safetensors"
    params = {}
    for module_name, module in modules.items():
        for param_name, param in module.to(device).named_parameters():
            params[f"{module_name}.{param_name}"] = param
    optimizer = torch.optim.Adam(params.values(), lr=lr, betas=(0.9, 0.99), fused=True)
    average = {param_name: param.detach().clone() for param_name, param in params.items()}

    done = 0
    if path.exists():
        done = load_checkpoint(path, params, average, optimizer, iterations, device)

    with tqdm(total=iterations, initial=done, desc=name) as bar:
        while done < iterations:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, iterations, lr)

            loss = loss_of(torch.Generator().manual_seed(cfg.seed * 1_000_003 + done))
            loss.backward()
            nn.utils.clip_grad_norm_(params.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1

            # a short average at the start, which forgets the initial weights, and a long one later
            decay = min(0.999, (done + 1) / (done + 10))
            for param_name, param in params.items():
                average[param_name].lerp_(param.data, 1 - decay)

            bar.update()
            if done % 25 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if done % cfg.save_every == 0 or done == iterations:
                save_checkpoint(path, params, average, optimizer, done)

    for param_name, param in params.items():
        param.data.copy_(average[param_name])
    for module in modules.values():
        module.eval().requires_grad_(False)


def learning_rate(done: int, iterations: int, peak: float) -> float:
    """Return the learning rate after `done` iterations.

    It rises over the first 100 iterations, stays at the peak, and falls over the last third to 2 %
    of it.
    """
    rise = (done + 1) / 100
    fall = max(0.02, 3 * (1 - done / iterations))
    return peak * min(1, rise, fall)


def save_checkpoint(
    path: Path,
    params: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Adam,
    done: int,
) -> None:
    """Write weights, their averages and Adam's moments, and the number of iterations."""
    tensors = {"done": torch.tensor(done)}
    for name, param in params.items():
        tensors[f"param.{name}"] = param.data
        tensors[f"average.{name}"] = average[name]
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[param][moment]
    save_whole(path, tensors)


def load_checkpoint(
    path: Path,
    params: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Adam,
    iterations: int,
    device: torch.device,
) -> int:
    """Put a checkpoint into weights, averages and optimizer; return the iterations it has had."""
    tensors = load_file(path)
    done = int(tensors["done"])
    for name, param in params.items():
        param.data.copy_(tensors[f"param.{name}"])
        average[name] = tensors[f"average.{name}"].to(device)
        if done < iterations:
            state = {"step": torch.tensor(float(done), device=device)}
            for moment in MOMENTS:
                state[moment] = tensors[f"{moment}.{name}"].to(device)
            optimizer.state[param] = state
    return done


def save_whole(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that has its name only when it is complete."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


# ---- check


@torch.no_grad()
def check(cfg: Config, device: torch.device) -> None:
    """Write how often the images of the prompts show what was asked for, and print it.

    The classifier judges. Its own accuracy, on drawings that it was not trained on, stands beside.
    """
    folder = Path(cfg.folder)
    out_dir = Path(cfg.out_dir or folder)
    options = {}
    for name in ("num_prompts", "num_inference_steps", "guidance_scale", "seed"):
        options[name] = getattr(cfg, name)
    refuse_other_report(out_dir, options)
    classifier = Classifier.load(folder).to(device)
    out_dir.mkdir(parents=True, exist_ok=True)

    drawings, attributes = draw_many(CHECK_DRAWINGS, cfg.seed + 1, "drawing")
    report: dict[str, Any] = {}
    report["drawings"] = accuracies(classify(classifier, drawings, device), attributes)

    with open(folder / "prompts.csv", newline="") as file:
        rows = list(csv.DictReader(file))[: cfg.num_prompts]
    images = generate_images(folder, [row["prompt"] for row in rows], cfg, device)
    predicted = classify(classifier, images, device)
    report["generated"] = accuracies(predicted, rows)
    for name in CONCEPTS:
        report[name] = accuracy_by_value(name, predicted, rows)
    report["options"] = options

    print(f"{'':12}{'object':>8}{'style':>8}{'colour':>8}")
    print_accuracies("drawings", report["drawings"], len(drawings))
    print_accuracies("generated", report["generated"], len(images))
    save_picture(out_dir / "check.png", images, rows)
    (out_dir / "check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"pictures in {out_dir / 'check.png'}, numbers in {out_dir / 'check.json'}")


def refuse_other_report(out_dir: Path, options: dict[str, Any]) -> None:
    """Raise UsageError if the folder holds a report that was made with other options."""
    path = out_dir / "check.json"
    if path.exists() and json.loads(path.read_text()).get("options") != options:
        raise UsageError(
            f"{out_dir} holds a report made with other options; name another --out_dir"
        )


def classify(classifier: Classifier, pixels: Tensor, device: torch.device) -> list[dict[str, str]]:
    """Return {"object", "style", "colour"} of each image, uint8 (n, 3, 64, 64)."""
    predicted = []
    for batch in pixels.split(200):
        predicted += classifier.predict(to_model(batch).to(device))
    return predicted


def generate_images(folder: Path, prompts: list[str], cfg: Config, device: torch.device) -> Tensor:
    """Return an image of each prompt, uint8 (n, 3, 64, 64); prompt i has the seed `seed + i`."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(prompts), CHECK_BATCH), "generating"):
        batch = prompts[start : start + CHECK_BATCH]
        first_seed = cfg.seed + start
        generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(batch))]
        output = pipe(
            batch,
            generator=generators,
            num_inference_steps=cfg.num_inference_steps,
            guidance_scale=cfg.guidance_scale,
            output_type="pt",
        )
        images.append((output.images.cpu() * 255).round().to(torch.uint8))
    return torch.cat(images)


def accuracy_by_value(
    name: str, predicted: list[dict[str, str]], rows: list[dict[str, str]]
) -> dict[str, float]:
    """Return {value: fraction of its prompts whose image shows it}, for one concept.

    For "object" it may give {"circle": 1.0, "moon": 0.9}. Values without a prompt are left out.
    """
    fractions = {}
    for value in CONCEPTS[name]:
        indices = [i for i, row in enumerate(rows) if row[name] == value]
        if indices:
            asked = [rows[i] for i in indices]
            fractions[value] = accuracies([predicted[i] for i in indices], asked)[name]
    return fractions


def print_accuracies(title: str, fractions: dict[str, float], count: int) -> None:
    """Print a line such as `generated     100.0%  100.0%  100.0%   of 576`."""
    columns = "".join(f"{fraction:8.1%}" for fraction in fractions.values())
    print(f"{title:12}{columns}   of {count}")


def save_picture(path: Path, images: Tensor, rows: list[dict[str, str]]) -> None:
    """Save a grid of the first 96 images, sorted by style and then by object."""

    def style_and_object(i: int) -> tuple[int, int]:
        return STYLES.index(rows[i]["style"]), OBJECTS.index(rows[i]["object"])

    order = sorted(range(min(96, len(rows))), key=style_and_object)
    grid(images[order], 16).save(path)


if __name__ == "__main__":
    if "get_ipython" not in globals():
        sys.argv[0] = "python -m toy.make"
    run_script(main, Config)
