"""What the toy's pictures show: its concepts, their drawings and captions, and the classifier that
judges pictures.

Every drawing is one object in one style and one colour on a background, 64 x 64 RGB, at a random
place, size and tilt. make.py trains the model on them.
"""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

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
BACKGROUNDS = {
    "white": (245, 245, 245),
    "gray": (140, 140, 140),
    "black": (15, 15, 15),
    "pink": (250, 195, 210),
}
CONCEPTS = {
    "object": OBJECTS,
    "style": STYLES,
    "colour": tuple(COLOURS),
}  # what the classifier tells


def contours(name, radius, tilt):
    """Closed outlines of an object round the origin: a list of (points, 2) float arrays, the outer
    one first."""
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
        return [
            radius
            * np.concatenate([arm @ np.linalg.matrix_power(quarter, i) for i in range(4)])
            @ rotate
        ]
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
    radius = scale * rng.uniform(
        *{"small": (11, 14), "": (14, 18), "large": (18, 21)}[attributes["size"]]
    )
    margin = 1.25 * radius
    centre = rng.uniform(margin, side - margin, 2)
    shapes = [
        [tuple(p) for p in c + centre]
        for c in contours(attributes["object"], radius, rng.uniform(-0.25, 0.25))
    ]
    jitter = lambda rgb: tuple(
        int(v) for v in np.clip(np.array(rgb) + rng.integers(-10, 11, 3), 0, 255)
    )
    colour, ground = (
        jitter(COLOURS[attributes["colour"]]),
        jitter(BACKGROUNDS[attributes["background"]]),
    )

    mask = Image.new("L", (side, side))
    for shape, ink in zip(shapes, (255, 0)):
        ImageDraw.Draw(mask).polygon(shape, fill=ink)
    style, x0, y0 = attributes["style"], *rng.uniform(0, 32, 2)
    pattern = Image.new(
        "L", (side, side), 255
    )  # where the colour is full; elsewhere in the object it is a pale tint
    pen = ImageDraw.Draw(pattern)
    if style == "outlined":
        pattern = Image.new("L", (side, side))
        for shape in shapes:
            ImageDraw.Draw(pattern).line(
                [*shape, shape[0], shape[1]], fill=255, width=int(2.6 * scale), joint="curve"
            )
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
                pen.rectangle(
                    (20 * i - x0, 20 * j - y0, 20 * i + 19 - x0, 20 * j + 19 - y0), fill=0
                )
    elif style == "blurred":
        mask = mask.filter(ImageFilter.GaussianBlur(3.2 * scale))

    tint = tuple(round(0.3 * c + 0.7 * g) for c, g in zip(colour, ground))
    picture = Image.new("RGB", (side, side), ground)
    picture.paste(tint, mask=mask)
    picture.paste(colour, mask=ImageChops.multiply(mask, pattern))
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX))


def sample_attributes(rng):
    """A random value of each attribute: {"object", "style", "colour", "background", "size"}."""
    attributes = {}
    for name, values in (CONCEPTS | {"background": BACKGROUNDS}).items():
        attributes[name] = str(rng.choice(list(values)))
    attributes["size"] = str(rng.choice(["small", "", "large"], p=(0.3, 0.4, 0.3)))
    return attributes


def with_article(text):
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


def captions(attributes):
    """Every way the training captions say it; the first is the one the prompts use."""

    def say(*names):
        return " ".join(attributes[name] for name in names if attributes[name])

    colour, style = attributes["colour"], attributes["style"]
    background = attributes["background"]
    plain = with_article(say("style", "colour", "object"))
    sized = with_article(say("size", "style", "colour", "object"))
    sized_by_colour = with_article(say("size", "colour", "style", "object"))
    without_style = with_article(say("colour", "object"))
    return [
        f"{plain} on a {background} background",
        f"{sized} on a {background} background",
        f"{say('colour', 'style', 'object')}, {background} background",
        f"a picture of {sized_by_colour}",
        f"the {say('size', 'object')} is {colour} and {style}",
        f"{without_style} on {background}",
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
    """uint8 -> float32 in [-1, 1], as the classifier and the autoencoder take it."""
    return pixels.float() / 127.5 - 1


class Classifier(nn.Module):
    """Pictures (N, 3, 64, 64) in [-1, 1] -> logits of object (N, 8), style (N, 6), colour (N,
    6)."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, o) for o in widths[1:])
        self.heads = nn.ModuleDict(
            {n: nn.Linear(2 * widths[-1], len(names)) for n, names in CONCEPTS.items()}
        )

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
    """Share of pictures in which each of object, style and colour is what was wanted: two lists of
    dict -> dict."""
    return {n: sum(s[n] == w[n] for s, w in zip(seen, wanted)) / len(seen) for n in CONCEPTS}


def write_prompts(path, seed):
    """Every object, style, colour and background once, in random order, with its attributes as
    columns."""
    values = CONCEPTS | {"background": BACKGROUNDS}
    rows = [dict(zip(values, combination)) for combination in itertools.product(*values.values())]
    order = np.random.default_rng(seed).permutation(len(rows))
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, ["prompt", *rows[0]])
        writer.writeheader()
        writer.writerows({"prompt": captions(rows[i] | {"size": ""})[0], **rows[i]} for i in order)
