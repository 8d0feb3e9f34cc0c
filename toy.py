"""Draw, train and check the toy: a real Stable Diffusion pipeline of 6.1 M parameters, small enough to ship.

    python toy.py draw                    # a grid of the drawings it learns from
    python toy.py train --folder mine     # such a model from nothing; goes on where it stopped
    python toy.py check                   # what its pictures show, against what the prompts asked

Every drawing is one object in one style and one colour on a background, 64 x 64 RGB, at a random place, size and tilt.
`train` fits, in this order, a classifier of (object, style, colour), an AutoencoderKL (64 x 64 x 3 -> 32 x 32 x 4) and
a UNet2DConditionModel together with its CLIPTextModel (v-prediction, cosine betas, EMA of the weights, 10 % empty
captions, timesteps drawn from a logit-normal), and writes them as an ordinary diffusers folder. An update of the UNet takes
0.43 s on one core with AVX512-BF16 and 0.25 s on two, so 16,000 of them one to two hours, and all of it half an hour more.
The weights that ship had 6000 updates in several sessions, of which the first 2250 were in batches of 64 and 1750 without the
logit-normal, and then `python toy.py train --start_from toy --unet_iterations 13000 --seed 2`, 104 minutes on one core.

Reads   nothing; the drawings are made here.
Writes  draw: <folder>/drawings.png. train: <folder>/ and checkpoints in <work_dir>/. check: check.png and check.json in
        <out_dir>/, else <folder>/.
Does not download anything, and does not try to be a good image model: it is a model whose every concept is known.

Sources: v-prediction, Salimans & Ho 2022 (arXiv 2202.00512); cosine betas, Nichol & Dhariwal 2021 (arXiv 2102.09672);
logit-normal timesteps, Esser et al. 2024 (arXiv 2403.03206).
"""

import csv
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from cli import HERE, check_positive, resolve_device, run
from errors import UsageError

SIZE = 64  # pixels a side
OBJECTS = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
STYLES = ("solid", "striped", "dotted", "checkered", "outlined", "blurred")
COLOURS = {
    "red": (220, 35, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (40, 165, 70),
    "blue": (40, 85, 225),
    "purple": (145, 50, 190),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (140, 140, 140), "black": (15, 15, 15), "pink": (250, 195, 210)}
CONCEPTS = {"object": OBJECTS, "style": STYLES, "colour": tuple(COLOURS)}  # what the classifier tells


@dataclass
class Config:
    command: Annotated[Literal["draw", "train", "check"], tyro.conf.Positional]  # what to do
    folder: str = str(HERE / "toy")  # the diffusers folder
    work_dir: str = str(HERE / "toy.work")  # checkpoints of `train`; may be deleted afterwards
    start_from: str | None = None  # train: the UNet goes on from this folder's weights; its classifier and autoencoder are kept
    num_drawings: int = 32_000  # drawings the autoencoder and the UNet see
    classifier_iterations: int = 2500  # batches of 64 drawings
    vae_iterations: int = 1200  # batches of 32 drawings
    unet_iterations: int = 16_000  # batches of `batch_size` latents
    batch_size: int = 16  # latents a UNet update: many small ones learn shapes sooner than few large ones
    lr: float = 5e-4  # Adam's, for the UNet and the text encoder; decays over the last third
    save_every: int = 250  # iterations between checkpoints
    out_dir: str | None = None  # check: where its report goes (None: into the folder)
    num_prompts: int = 576  # check: pictures to generate
    num_inference_steps: int = 20  # check: sampling steps
    guidance_scale: float = 5.0  # check: classifier-free guidance
    seed: int = 0  # of everything
    device: str = "auto"  # auto, cuda, mps, cpu


def contours(name, radius, tilt):
    """Closed outlines of an object round the origin: a list of (points, 2) float arrays, the outer one first."""
    turn = lambda n, start=0.0: tilt + math.radians(start) + 2 * math.pi * np.arange(n) / n
    polar = lambda angle, r: np.stack([r * np.sin(angle), -r * np.cos(angle)], 1)
    rotate = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    if name == "circle":
        return [polar(turn(64), radius)]
    if name == "ring":
        return [polar(turn(64), radius), polar(turn(64), 0.5 * radius)]
    if name == "square":
        return [polar(turn(4, 45), 1.2 * radius)]
    if name == "triangle":
        return [polar(turn(3), 1.2 * radius) + [0, 0.15 * radius]]
    if name == "star":
        return [polar(turn(10), 1.2 * radius * np.where(np.arange(10) % 2, 0.45, 1.0))]
    if name == "cross":
        a, b = 0.36, 1.05
        arm = np.array([(-a, -b), (a, -b), (a, -a)])
        quarter = np.array([(0, 1), (-1, 0)])
        return [radius * np.concatenate([arm @ np.linalg.matrix_power(quarter, i) for i in range(4)]) @ rotate]
    if name == "heart":
        s = 2 * math.pi * np.arange(64) / 64
        y = 13 * np.cos(s) - 5 * np.cos(2 * s) - 2 * np.cos(3 * s) - np.cos(4 * s)
        return [radius / 15 * np.stack([16 * np.sin(s) ** 3, -y - 2], 1) @ rotate]
    # moon: an outer arc of 260 degrees, closed by the arc of a second circle that cuts into it
    circle = lambda angle: np.stack([np.cos(angle), np.sin(angle)], 1)
    outer = np.radians(np.linspace(50, 310, 48))
    ends = circle(outer[[0, -1]])
    centre = np.array([0.75, 0.0])
    r = np.linalg.norm(ends[0] - centre)
    first = math.atan2(*(ends[1] - centre)[::-1]) % (2 * math.pi)
    last = math.atan2(*(ends[0] - centre)[::-1]) % (2 * math.pi)
    inner = np.linspace(first, last, 32)[1:-1]
    points = np.concatenate([circle(outer), centre + r * circle(inner)])
    return [1.1 * radius * (points - [-0.15, 0]) @ rotate]


def draw(attributes, rng):
    """One drawing of `{"object", "style", "colour", "background", "size"}`: uint8 (64, 64, 3)."""
    scale, side = 4, 4 * SIZE  # drawn four times as large, then averaged: smooth edges
    radius = scale * rng.uniform(*{"small": (11, 14), "": (14, 18), "large": (18, 21)}[attributes["size"]])
    margin = 1.25 * radius
    centre = rng.uniform(margin, side - margin, 2)
    shapes = [[tuple(p) for p in c + centre] for c in contours(attributes["object"], radius, rng.uniform(-0.25, 0.25))]
    jitter = lambda rgb: tuple(int(v) for v in np.clip(np.array(rgb) + rng.integers(-10, 11, 3), 0, 255))
    colour, ground = jitter(COLOURS[attributes["colour"]]), jitter(BACKGROUNDS[attributes["background"]])

    mask = Image.new("L", (side, side))
    for shape, ink in zip(shapes, (255, 0)):
        ImageDraw.Draw(mask).polygon(shape, fill=ink)
    style, x0, y0 = attributes["style"], *rng.uniform(0, 32, 2)
    pattern = Image.new("L", (side, side), 255)  # where the colour is full; elsewhere in the object it is a pale tint
    pen = ImageDraw.Draw(pattern)
    if style == "outlined":
        pattern = Image.new("L", (side, side))
        for shape in shapes:
            ImageDraw.Draw(pattern).line([*shape, shape[0], shape[1]], fill=255, width=int(2.6 * scale), joint="curve")
        mask = pattern
    elif style == "striped":
        for u in np.arange(-side - x0, 2 * side, 32):
            pen.polygon([(u, 0), (u + 16, 0), (u + 16 - side, side), (u - side, side)], fill=0)
    elif style == "dotted":
        pen.rectangle((0, 0, side, side), fill=0)
        for u, v in itertools.product(np.arange(-x0, side + 32, 26), np.arange(-y0, side + 32, 26)):
            pen.ellipse((u - 8.5, v - 8.5, u + 8.5, v + 8.5), fill=255)
    elif style == "checkered":
        for i, j in itertools.product(range(14), range(14)):
            if (i + j) % 2:
                pen.rectangle((20 * i - x0, 20 * j - y0, 20 * i + 19 - x0, 20 * j + 19 - y0), fill=0)
    elif style == "blurred":
        mask = mask.filter(ImageFilter.GaussianBlur(3.2 * scale))

    tint = tuple(round(0.3 * c + 0.7 * g) for c, g in zip(colour, ground))
    picture = Image.new("RGB", (side, side), ground)
    picture.paste(tint, mask=mask)
    picture.paste(colour, mask=ImageChops.multiply(mask, pattern))
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX))


def sample_attributes(rng):
    pick = lambda names, p=None: str(rng.choice(list(names), p=p))
    return {n: pick(v) for n, v in (CONCEPTS | {"background": BACKGROUNDS}).items()} | {
        "size": pick(("small", "", "large"), (0.3, 0.4, 0.3))
    }


def captions(attributes):
    """Every way the training captions say it; the first is the one the prompts use."""
    a = attributes
    words = lambda *names: " ".join(a[n] for n in names if a[n])
    article = lambda text: ("an " if text[0] in "aeiou" else "a ") + text
    return [
        f"{article(words('style', 'colour', 'object'))} on a {a['background']} background",
        f"{article(words('size', 'style', 'colour', 'object'))} on a {a['background']} background",
        f"{words('colour', 'style', 'object')}, {a['background']} background",
        f"a picture of {article(words('size', 'colour', 'style', 'object'))}",
        f"the {words('size', 'object')} is {a['colour']} and {a['style']}",
        f"{article(words('colour', 'object'))} on {a['background']}",
    ]


def draw_many(n, seed, progress=""):
    """n drawings and their attributes: uint8 (n, 3, 64, 64), list of dict."""
    rng = np.random.default_rng(seed)
    attributes = [sample_attributes(rng) for _ in range(n)]
    pixels = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for i in tqdm(range(n), progress, disable=not progress):
        pixels[i] = draw(attributes[i], rng)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), attributes


def to_model(pixels):
    return pixels.float() / 127.5 - 1


class Classifier(nn.Module):
    """Pictures (N, 3, 64, 64) in [-1, 1] -> logits of object (N, 8), style (N, 6), colour (N, 6)."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, o) for o in widths[1:])
        self.heads = nn.ModuleDict({n: nn.Linear(2 * widths[-1], len(names)) for n, names in CONCEPTS.items()})

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = F.silu(norm(conv(x)))
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return {name: head(x) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, x):
        """Names, a list of {"object", "style", "colour"}, one a picture."""
        best = {n: logits.argmax(1).tolist() for n, logits in self(x).items()}
        return [{n: CONCEPTS[n][best[n][i]] for n in CONCEPTS} for i in range(len(x))]

    @classmethod
    def load(cls, folder):
        model = cls()
        model.load_state_dict(load_file(Path(folder) / "classifier.safetensors"))
        return model.eval().requires_grad_(False)


def shares(seen, wanted):
    """Share of pictures in which each of object, style and colour is what was wanted: two lists of dict -> dict."""
    return {n: sum(s[n] == w[n] for s, w in zip(seen, wanted)) / len(seen) for n in CONCEPTS}


def build_tokenizer():
    """A CLIPTokenizer whose merges make each word of the captions one token (byte-pair merges learnt from those words)."""
    from transformers import CLIPTokenizer

    values = CONCEPTS | {"background": tuple(BACKGROUNDS), "size": ("small", "large")}
    said = [captions({n: v[i % len(v)] for n, v in values.items()}) for i in range(len(OBJECTS))]  # each value at least once
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
    return CLIPTokenizer(vocab=vocab, merges=merges, unk_token=special[1], pad_token=special[1], model_max_length=24)


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
    """Module names are a subset of Stable Diffusion 1.5's; `up_blocks.1` works on 16 x 16 tokens of width 96."""
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
    """Adam on `loss_of(generator)`, checkpointed to <work_dir>/<name>.safetensors and resumed from it.

    Every iteration seeds its own generator, so that an interrupted run goes on as if nothing had happened. The modules
    are left with the moving average of their weights.
    """
    path = Path(cfg.work_dir) / f"{name}.safetensors"
    params = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.to(device).named_parameters()}
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
                save_file({k: v.contiguous() for k, v in state.items()}, path.with_suffix(".partial"))
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
        raise UsageError(f"{work} holds checkpoints made with other options; name another --work_dir")
    record.write_text(made_with)
    torch.manual_seed(cfg.seed)
    classifier, vae, unet = Classifier(), build_vae(), build_unet()
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    text_encoder = build_text_encoder(tokenizer)
    if cfg.start_from is not None:
        before = StableDiffusionPipeline.from_pretrained(cfg.start_from, dtype=torch.float32)
        classifier, vae = Classifier.load(cfg.start_from), before.vae.eval().requires_grad_(False).to(device)
        unet, text_encoder = before.unet.train(), before.text_encoder.train()
    pixels, attributes = draw_many(cfg.num_drawings, cfg.seed, "drawing")
    labels = {n: torch.tensor([names.index(a[n]) for a in attributes]) for n, names in CONCEPTS.items()}
    autocast = lambda: torch.autocast(device.type, torch.bfloat16)

    def classifier_loss(generator):
        i = torch.randint(len(pixels), (64,), generator=generator)
        x = to_model(pixels[i])
        x = x + 0.15 * torch.rand(64, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
        logits = classifier(x.to(device))
        return sum(F.cross_entropy(logits[n], labels[n][i].to(device)) for n in logits)

    if cfg.start_from is None:
        fit("classifier", {"classifier": classifier}, classifier_loss, cfg.classifier_iterations, 1e-3, cfg, device)

    def vae_loss(generator):
        x = to_model(pixels[torch.randint(len(pixels), (32,), generator=generator)]).to(device)
        with autocast():
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(device)
            x_hat = vae.decode(z).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return (x_hat.float() - x).abs().mean() + (x_hat.float() - x).pow(2).mean() + 1e-4 * kl

    vae.to(memory_format=torch.channels_last)
    if cfg.start_from is None:
        fit("vae", {"vae": vae}, vae_loss, cfg.vae_iterations, 1e-3, cfg, device)
    encoded = work / "latents.safetensors"
    if not encoded.exists():
        with torch.no_grad():
            batches = tqdm(pixels.split(128), "encoding")
            latents = torch.cat([vae.encode(to_model(p).to(device)).latent_dist.mean.cpu() for p in batches])
        save_file({"latents": latents.contiguous()}, encoded.with_suffix(".partial"))
        encoded.with_suffix(".partial").replace(encoded)
    latents = load_file(encoded)["latents"]
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents = (latents * vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)
    tokenize = lambda texts: tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    ids, empty = torch.stack([tokenize(captions(a)) for a in tqdm(attributes, "tokens")]), tokenize("")[0]

    def unet_loss(generator):
        B = cfg.batch_size
        i = torch.randint(len(latents), (B,), generator=generator)
        x0 = latents[i].to(device)
        tokens = ids[i, torch.randint(ids.shape[1], (B,), generator=generator)]
        tokens = torch.where(torch.rand(B, 1, generator=generator) < 0.1, empty, tokens).to(device)
        t = (1000 * torch.sigmoid(0.5 + torch.randn(B, generator=generator))).long().to(device)  # most where shapes form
        noise = torch.randn(x0.shape, generator=generator).to(device)
        with autocast():
            v = unet(scheduler.add_noise(x0, noise, t), t, encoder_hidden_states=text_encoder(tokens)[0]).sample
        return F.mse_loss(v.float(), scheduler.get_velocity(x0, noise, t))

    unet.to(memory_format=torch.channels_last)
    fit("unet", {"unet": unet, "text_encoder": text_encoder}, unet_loss, cfg.unet_iterations, cfg.lr, cfg, device)

    pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    partial = folder.with_name(folder.name + ".partial")
    pipe.to(device, torch.float16).save_pretrained(partial)
    save_file(classifier.state_dict(), partial / "classifier.safetensors")
    write_prompts(partial / "prompts.csv", cfg.seed)
    partial.replace(folder)
    print(f"the model is in {folder}; next: python toy.py check --folder {folder}")


def write_prompts(path, seed):
    """Every object, style, colour and background once, in random order, with its attributes as columns."""
    values = CONCEPTS | {"background": BACKGROUNDS}
    rows = [dict(zip(values, combination)) for combination in itertools.product(*values.values())]
    order = np.random.default_rng(seed).permutation(len(rows))
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, ["prompt", *rows[0]])
        writer.writeheader()
        writer.writerows({"prompt": captions(rows[i] | {"size": ""})[0], **rows[i]} for i in order)


def grid(pixels, columns, scale=2):
    """uint8 (n, 3, 64, 64) -> one PIL image, `columns` wide, with a thin gap."""
    n, rows = len(pixels), -(-len(pixels) // columns)
    step = SIZE + 2
    canvas = np.full((rows * step + 2, columns * step + 2, 3), 255, np.uint8)
    for i in range(n):
        y, x = 2 + i // columns * step, 2 + i % columns * step
        canvas[y : y + SIZE, x : x + SIZE] = pixels[i].permute(1, 2, 0).numpy()
    return Image.fromarray(canvas).resize((scale * canvas.shape[1], scale * canvas.shape[0]), Image.Resampling.NEAREST)


@torch.no_grad()
def check(cfg, device):
    from diffusers import DiffusionPipeline

    folder, out_dir = Path(cfg.folder), Path(cfg.out_dir or cfg.folder)
    options = {n: getattr(cfg, n) for n in ("num_prompts", "num_inference_steps", "guidance_scale", "seed")}
    if (out_dir / "check.json").exists() and json.loads((out_dir / "check.json").read_text()).get("options") != options:
        raise UsageError(f"{out_dir} holds a report made with other options; name another --out_dir")
    classifier = Classifier.load(folder).to(device)
    see = lambda pixels: [p for x in pixels.split(200) for p in classifier.predict(to_model(x).to(device))]
    out_dir.mkdir(parents=True, exist_ok=True)
    pixels, attributes = draw_many(4000, cfg.seed + 1, "drawing")
    report = {"drawings": shares(see(pixels), attributes)}

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    with open(folder / "prompts.csv", newline="") as f:
        rows = list(csv.DictReader(f))[: cfg.num_prompts]
    sampling = dict(num_inference_steps=cfg.num_inference_steps, guidance_scale=cfg.guidance_scale, output_type="pt")
    made = []
    for start in tqdm(range(0, len(rows), 48), "generating"):
        prompts = [r["prompt"] for r in rows[start : start + 48]]
        generators = [torch.Generator().manual_seed(cfg.seed + start + i) for i in range(len(prompts))]
        made.append((pipe(prompts, generator=generators, **sampling).images.cpu() * 255).round().to(torch.uint8))
    made = torch.cat(made)
    seen = see(made)
    report["generated"] = shares(seen, rows)
    for name, values in CONCEPTS.items():
        pairs = {v: [(s, r) for s, r in zip(seen, rows) if r[name] == v] for v in values}
        report[name] = {v: shares(*zip(*pairs[v]))[name] for v in values if pairs[v]}
    report["options"] = options

    print(f"{'':12}{'object':>8}{'style':>8}{'colour':>8}")
    for what, n in (("drawings", len(pixels)), ("generated", len(made))):
        print(f"{what:12}" + "".join(f"{share:8.1%}" for share in report[what].values()) + f"   of {n}")
    where = lambda i: (STYLES.index(rows[i]["style"]), OBJECTS.index(rows[i]["object"]))
    grid(made[sorted(range(min(96, len(rows))), key=where)], 16).save(out_dir / "check.png")
    (out_dir / "check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"pictures in {out_dir / 'check.png'}, numbers in {out_dir / 'check.json'}")


def main(cfg):
    check_positive(cfg, "num_drawings", "classifier_iterations", "vae_iterations", "unet_iterations", "batch_size", "save_every")
    check_positive(cfg, "num_prompts", "num_inference_steps")
    device = resolve_device(cfg.device)
    if cfg.command == "train":
        return train(cfg, device)
    if cfg.command == "check":
        return check(cfg, device)
    path, rng = Path(cfg.folder) / "drawings.png", np.random.default_rng(cfg.seed)
    each = [sample_attributes(rng) | {"style": s, "object": o} for s in STYLES for o in OBJECTS]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(torch.from_numpy(np.stack([draw(a, rng) for a in each])).permute(0, 3, 1, 2), len(OBJECTS)).save(path)
    print(f"one drawing of each object and style in {path}")


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
