"""Draw, train and check the toy: a real Stable Diffusion pipeline of 6.1 M parameters, small enough
to ship.

    python -m toy.make draw                    # a grid of the drawings it learns from
    python -m toy.make train --folder mine     # such a model from nothing; goes on where it stopped
    python -m toy.make check                   # what its pictures show, against what the prompts asked

The drawings are those of analysis/concepts.py. `train` fits, in this order, a classifier of
(object, style, colour), an AutoencoderKL (64 x 64 x 3 -> 32 x 32 x 4) and a UNet2DConditionModel
together with its CLIPTextModel (v-prediction, cosine betas, EMA of the weights, 10 % empty
captions, timesteps drawn from a logit-normal), and writes them as an ordinary diffusers folder. An
update of the UNet takes 0.43 s on one core with AVX512-BF16 and 0.25 s on two, so 16,000 of them
one to two hours, and all of it half an hour more. The weights that ship had 6000 updates in several
sessions, of which the first 2250 were in batches of 64 and 1750 without the logit-normal, and then
`python -m toy.make train --start_from toy --unet_iterations 13000 --seed 2`, 104 minutes on one
core.

Reads   nothing; the drawings are made by analysis/concepts.py.
Writes  draw: <folder>/drawings.png. train: <folder>/ and checkpoints in <work_dir>/. check: check.png and check.json in
        <out_dir>/, else <folder>/.
Does not download anything, and does not try to be a good image model: it is a model whose every
concept is known.

Sources: v-prediction, Salimans & Ho 2022 (arXiv 2202.00512); cosine betas, Nichol & Dhariwal 2021
(arXiv 2102.09672); logit-normal timesteps, Esser et al. 2024 (arXiv 2403.03206).
"""

import csv
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from cli import HERE, check_positive, resolve_device, run_script
from errors import UsageError
from toy.concepts import (
    BACKGROUNDS,
    CONCEPTS,
    OBJECTS,
    SIZE,
    STYLES,
    Classifier,
    captions,
    draw,
    draw_many,
    sample_attributes,
    shares,
    to_model,
    write_prompts,
)


@dataclass
class Config:
    command: Literal["draw", "train", "check"]
    """Draw the training images, train the model on them, or check what it has learned."""

    folder: str = str(HERE / "toy")
    """The diffusers folder."""

    work_dir: str = str(HERE / "toy.work")
    """Checkpoints of `train`; may be deleted afterwards."""

    start_from: str | None = None
    """Train: the UNet goes on from this folder's weights; its classifier and autoencoder are
    kept."""

    num_drawings: int = 32_000
    """Drawings the autoencoder and the UNet see."""

    classifier_iterations: int = 2500
    """Batches of 64 drawings."""

    vae_iterations: int = 1200
    """Batches of 32 drawings."""

    unet_iterations: int = 16_000
    """Batches of `batch_size` latents."""

    batch_size: int = 16
    """Latents a UNet update: many small ones learn shapes sooner than few large ones."""

    lr: float = 5e-4
    """Adam's, for the UNet and the text encoder; decays over the last third."""

    save_every: int = 250
    """Iterations between checkpoints."""

    out_dir: str | None = None
    """Check: where its report goes (None: into the folder)."""

    num_prompts: int = 576
    """Check: pictures to generate."""

    num_inference_steps: int = 20
    """Check: sampling steps."""

    guidance_scale: float = 5.0
    """Check: classifier-free guidance."""

    seed: int = 0
    """Of everything."""

    device: str = "auto"
    """Auto, cuda, mps, cpu."""


def build_tokenizer():
    """A CLIPTokenizer whose merges make each word of the captions one token (byte-pair merges
    learnt from those words)."""
    from transformers import CLIPTokenizer

    values = CONCEPTS | {"background": tuple(BACKGROUNDS), "size": ("small", "large")}
    said = [
        captions({n: v[i % len(v)] for n, v in values.items()}) for i in range(len(OBJECTS))
    ]  # each value at least once
    words = sorted({word.strip(",") for texts in said for text in texts for word in text.split()})
    letters = [chr(c) for c in range(33, 127)]
    pieces, merges = [[*w[:-1], w[-1] + "</w>"] for w in words], []
    while pairs := [p for w in pieces for p in itertools.pairwise(w)]:
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        for w in pieces:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == best:
                    w[i : i + 2] = [w[i] + w[i + 1]]
                i += 1
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*special, *letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, unk_token=special[1], pad_token=special[1], model_max_length=24
    )


def build_vae():
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


def build_unet():
    """Module names are a subset of Stable Diffusion 1.5's; `up_blocks.1` works on 16 x 16 tokens of
    width 96."""
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


def build_text_encoder(tokenizer):
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


def build_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )


UNCHECKED = (
    "command",
    "folder",
    "work_dir",
    "out_dir",
    "save_every",
    "device",
    "num_prompts",
    "num_inference_steps",
    "guidance_scale",
)
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


def fit(name, modules, loss_of, iterations, lr, cfg, device):
    """Adam on `loss_of(generator)`, checkpointed to <work_dir>/<name>.safetensors and resumed from
    it.

    Every iteration seeds its own generator, so that an interrupted run goes on as if nothing had
    happened. The modules are left with the moving average of their weights.
    """
    path = Path(cfg.work_dir) / f"{name}.safetensors"
    params = {
        f"{m}.{n}": p
        for m, module in modules.items()
        for n, p in module.to(device).named_parameters()
    }
    optimizer = torch.optim.Adam(params.values(), lr=lr, betas=(0.9, 0.99), fused=True)
    average = {n: p.detach().clone() for n, p in params.items()}
    done = 0
    if path.exists():
        state = load_file(path)
        done = int(state["done"])
        for n, p in params.items():
            p.data.copy_(state[f"param.{n}"])
            average[n] = state[f"average.{n}"].to(device)
            if done < iterations:
                moments = {m: state[f"{m}.{n}"].to(device) for m in MOMENTS}
                optimizer.state[p] = {"step": torch.tensor(float(done), device=device), **moments}
    with tqdm(total=iterations, initial=done, desc=name) as bar:
        while done < iterations:
            rate = lr * min(1, (done + 1) / 100, max(0.02, 3 * (1 - done / iterations)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(torch.Generator().manual_seed(cfg.seed * 1_000_003 + done))
            loss.backward()
            nn.utils.clip_grad_norm_(params.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            for n, p in params.items():
                average[n].lerp_(p.data, 1 - min(0.999, (done + 1) / (done + 10)))
            bar.update()
            if done % 25 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if done % cfg.save_every == 0 or done == iterations:
                state = {"done": torch.tensor(done)}
                for n, p in params.items():
                    state |= {f"param.{n}": p.data, f"average.{n}": average[n]}
                    state |= {f"{m}.{n}": optimizer.state[p][m] for m in MOMENTS}
                save_file(
                    {k: v.contiguous() for k, v in state.items()}, path.with_suffix(".partial")
                )
                path.with_suffix(".partial").replace(path)
    for n, p in params.items():
        p.data.copy_(average[n])
    for module in modules.values():
        module.eval().requires_grad_(False)


def train(cfg, device):
    from diffusers import StableDiffusionPipeline

    folder, work = Path(cfg.folder), Path(cfg.work_dir)
    if (folder / "model_index.json").exists():
        raise UsageError(f"{folder} holds a trained model; name another --folder")
    work.mkdir(parents=True, exist_ok=True)
    made_with = json.dumps({n: v for n, v in vars(cfg).items() if n not in UNCHECKED}, indent=1)
    record = work / "settings.json"
    if record.exists() and record.read_text() != made_with:
        raise UsageError(
            f"{work} holds checkpoints made with other options; name another --work_dir"
        )
    record.write_text(made_with)
    torch.manual_seed(cfg.seed)
    classifier, vae, unet = Classifier(), build_vae(), build_unet()
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    text_encoder = build_text_encoder(tokenizer)
    if cfg.start_from is not None:
        before = StableDiffusionPipeline.from_pretrained(cfg.start_from, dtype=torch.float32)
        classifier, vae = (
            Classifier.load(cfg.start_from),
            before.vae.eval().requires_grad_(False).to(device),
        )
        unet, text_encoder = before.unet.train(), before.text_encoder.train()
    pixels, attributes = draw_many(cfg.num_drawings, cfg.seed, "drawing")
    labels = {
        n: torch.tensor([names.index(a[n]) for a in attributes]) for n, names in CONCEPTS.items()
    }
    autocast = lambda: torch.autocast(device.type, torch.bfloat16)

    def classifier_loss(generator):
        i = torch.randint(len(pixels), (64,), generator=generator)
        x = to_model(pixels[i])
        x = x + 0.15 * torch.rand(64, 1, 1, 1, generator=generator) * torch.randn(
            x.shape, generator=generator
        )
        logits = classifier(x.to(device))
        return sum(F.cross_entropy(logits[n], labels[n][i].to(device)) for n in logits)

    if cfg.start_from is None:
        fit(
            "classifier",
            {"classifier": classifier},
            classifier_loss,
            cfg.classifier_iterations,
            1e-3,
            cfg,
            device,
        )

    def vae_loss(generator):
        x = to_model(pixels[torch.randint(len(pixels), (32,), generator=generator)]).to(device)
        with autocast():
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(
                posterior.mean.shape, generator=generator
            ).to(device)
            x_hat = vae.decode(z).sample
        kl = (
            0.5
            * (
                posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()
            ).mean()
        )
        return (x_hat.float() - x).abs().mean() + (x_hat.float() - x).pow(2).mean() + 1e-4 * kl

    vae.to(memory_format=torch.channels_last)
    if cfg.start_from is None:
        fit("vae", {"vae": vae}, vae_loss, cfg.vae_iterations, 1e-3, cfg, device)
    encoded = work / "latents.safetensors"
    if not encoded.exists():
        with torch.no_grad():
            batches = tqdm(pixels.split(128), "encoding")
            latents = torch.cat(
                [vae.encode(to_model(p).to(device)).latent_dist.mean.cpu() for p in batches]
            )
        save_file({"latents": latents.contiguous()}, encoded.with_suffix(".partial"))
        encoded.with_suffix(".partial").replace(encoded)
    latents = load_file(encoded)["latents"]
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents = (latents * vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)
    tokenize = lambda texts: tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    ids, empty = (
        torch.stack([tokenize(captions(a)) for a in tqdm(attributes, "tokens")]),
        tokenize("")[0],
    )

    def unet_loss(generator):
        B = cfg.batch_size
        i = torch.randint(len(latents), (B,), generator=generator)
        x0 = latents[i].to(device)
        tokens = ids[i, torch.randint(ids.shape[1], (B,), generator=generator)]
        tokens = torch.where(torch.rand(B, 1, generator=generator) < 0.1, empty, tokens).to(device)
        t = (
            (1000 * torch.sigmoid(0.5 + torch.randn(B, generator=generator))).long().to(device)
        )  # most where shapes form
        noise = torch.randn(x0.shape, generator=generator).to(device)
        with autocast():
            v = unet(
                scheduler.add_noise(x0, noise, t), t, encoder_hidden_states=text_encoder(tokens)[0]
            ).sample
        return F.mse_loss(v.float(), scheduler.get_velocity(x0, noise, t))

    unet.to(memory_format=torch.channels_last)
    fit(
        "unet",
        {"unet": unet, "text_encoder": text_encoder},
        unet_loss,
        cfg.unet_iterations,
        cfg.lr,
        cfg,
        device,
    )

    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    partial = folder.with_name(folder.name + ".partial")
    pipe.to(device, torch.float16).save_pretrained(partial)
    save_file(classifier.state_dict(), partial / "classifier.safetensors")
    write_prompts(partial / "prompts.csv", cfg.seed)
    partial.replace(folder)
    print(f"the model is in {folder}; next: python -m toy.make check --folder {folder}")


def grid(pixels, columns, scale=2):
    """uint8 (n, 3, 64, 64) -> one PIL image, `columns` wide, with a thin gap."""
    n, rows = len(pixels), -(-len(pixels) // columns)
    step = SIZE + 2
    canvas = np.full((rows * step + 2, columns * step + 2, 3), 255, np.uint8)
    for i in range(n):
        y, x = 2 + i // columns * step, 2 + i % columns * step
        canvas[y : y + SIZE, x : x + SIZE] = pixels[i].permute(1, 2, 0).numpy()
    return Image.fromarray(canvas).resize(
        (scale * canvas.shape[1], scale * canvas.shape[0]), Image.Resampling.NEAREST
    )


@torch.no_grad()
def check(cfg, device):
    from diffusers import DiffusionPipeline

    folder, out_dir = Path(cfg.folder), Path(cfg.out_dir or cfg.folder)
    options = {
        n: getattr(cfg, n) for n in ("num_prompts", "num_inference_steps", "guidance_scale", "seed")
    }
    if (out_dir / "check.json").exists() and json.loads((out_dir / "check.json").read_text()).get(
        "options"
    ) != options:
        raise UsageError(
            f"{out_dir} holds a report made with other options; name another --out_dir"
        )
    classifier = Classifier.load(folder).to(device)
    see = lambda pixels: [
        p for x in pixels.split(200) for p in classifier.predict(to_model(x).to(device))
    ]
    out_dir.mkdir(parents=True, exist_ok=True)
    pixels, attributes = draw_many(4000, cfg.seed + 1, "drawing")
    report = {"drawings": shares(see(pixels), attributes)}

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    with open(folder / "prompts.csv", newline="") as f:
        rows = list(csv.DictReader(f))[: cfg.num_prompts]
    sampling = dict(
        num_inference_steps=cfg.num_inference_steps,
        guidance_scale=cfg.guidance_scale,
        output_type="pt",
    )
    made = []
    for start in tqdm(range(0, len(rows), 48), "generating"):
        prompts = [r["prompt"] for r in rows[start : start + 48]]
        generators = [
            torch.Generator().manual_seed(cfg.seed + start + i) for i in range(len(prompts))
        ]
        made.append(
            (pipe(prompts, generator=generators, **sampling).images.cpu() * 255)
            .round()
            .to(torch.uint8)
        )
    made = torch.cat(made)
    seen = see(made)
    report["generated"] = shares(seen, rows)
    for name, values in CONCEPTS.items():
        pairs = {v: [(s, r) for s, r in zip(seen, rows) if r[name] == v] for v in values}
        report[name] = {v: shares(*zip(*pairs[v]))[name] for v in values if pairs[v]}
    report["options"] = options

    print(f"{'':12}{'object':>8}{'style':>8}{'colour':>8}")
    for what, n in (("drawings", len(pixels)), ("generated", len(made))):
        print(
            f"{what:12}"
            + "".join(f"{share:8.1%}" for share in report[what].values())
            + f"   of {n}"
        )
    where = lambda i: (STYLES.index(rows[i]["style"]), OBJECTS.index(rows[i]["object"]))
    grid(made[sorted(range(min(96, len(rows))), key=where)], 16).save(out_dir / "check.png")
    (out_dir / "check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"pictures in {out_dir / 'check.png'}, numbers in {out_dir / 'check.json'}")


def main(cfg):
    check_positive(
        cfg,
        "num_drawings",
        "classifier_iterations",
        "vae_iterations",
        "unet_iterations",
        "batch_size",
        "save_every",
    )
    check_positive(cfg, "num_prompts", "num_inference_steps")
    device = resolve_device(cfg.device)
    if cfg.command == "train":
        return train(cfg, device)
    if cfg.command == "check":
        return check(cfg, device)
    path, rng = Path(cfg.folder) / "drawings.png", np.random.default_rng(cfg.seed)
    each = [sample_attributes(rng) | {"style": s, "object": o} for s in STYLES for o in OBJECTS]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(
        torch.from_numpy(np.stack([draw(a, rng) for a in each])).permute(0, 3, 1, 2), len(OBJECTS)
    ).save(path)
    print(f"one drawing of each object and style in {path}")


if __name__ == "__main__":
    if "get_ipython" not in globals():
        sys.argv[0] = "python -m toy.make"
    run_script(main, Config)
