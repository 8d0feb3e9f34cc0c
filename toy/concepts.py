"""What the toy knows: its concepts, drawings and captions, and the classifier that judges images.

A drawing shows one object in one style and one colour on a background. It has 64 x 64 RGB pixels,
and the object has a random position, size and tilt. make.py trains the model on such drawings.

    rng = np.random.default_rng(0)
    attributes = sample_attributes(rng)     # {"object": "moon", "style": "striped", ...}
    pixels = draw(attributes, rng)          # uint8 (64, 64, 3)
    captions(attributes)[0]                 # "a striped red moon on a white background"

Attributes   `sample_attributes`; CONCEPTS holds the three that the classifier tells
Drawings     `draw` and `draw_many`; `contours` and `make_pattern` are their geometry
Captions     `captions`, and `write_prompts` for the prompts.csv of the model's folder
Judging      `Classifier`, and `accuracies` of what it predicts
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
from torch import Tensor, nn
from tqdm import tqdm

SIZE = 64  # pixels per side of a drawing
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
CONCEPTS = {"object": OBJECTS, "style": STYLES, "colour": tuple(COLOURS)}
"""{concept: its values}; these three the classifier tells."""

SCALE = 4  # a drawing is made four times as large and then averaged, which makes its edges smooth
CANVAS = SCALE * SIZE  # pixels per side while it is drawn
RADII = {"small": (11, 14), "": (14, 18), "large": (18, 21)}  # pixels, least and most, of each size
SIZE_CHANCES = {"small": 0.3, "": 0.4, "large": 0.3}

Attributes = dict[str, str]
"""{"object", "style", "colour", "background", "size"} of a drawing; the size may be empty."""


def sample_attributes(rng: np.random.Generator) -> Attributes:
    """Return a random value of each attribute; all values of one attribute are equally likely,
    except for the size."""
    attributes = {}
    for name, values in (CONCEPTS | {"background": BACKGROUNDS}).items():
        attributes[name] = str(rng.choice(list(values)))
    attributes["size"] = str(rng.choice(list(SIZE_CHANCES), p=list(SIZE_CHANCES.values())))
    return attributes


# ---- drawings


def draw_many(n: int, seed: int, progress: str = "") -> tuple[Tensor, list[Attributes]]:
    """Return n random drawings, uint8 (n, 3, 64, 64), and the attributes of each.

    A text in `progress` shows a progress bar with this title.
    """
    rng = np.random.default_rng(seed)
    attributes = [sample_attributes(rng) for _ in range(n)]
    pixels = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for i in tqdm(range(n), progress, disable=not progress):
        pixels[i] = draw(attributes[i], rng)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), attributes


def draw(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Return a drawing of the attributes, uint8 (64, 64, 3).

    `rng` chooses what the attributes leave open: the exact radius, the position, the tilt, shades
    of both colours, and where the pattern begins. The order of these draws decides the drawing.
    """
    smallest, largest = RADII[attributes["size"]]
    radius = SCALE * rng.uniform(smallest, largest)
    margin = 1.25 * radius
    centre = rng.uniform(margin, CANVAS - margin, 2)
    tilt = rng.uniform(-0.25, 0.25)  # radians
    colour = jitter(COLOURS[attributes["colour"]], rng)
    ground = jitter(BACKGROUNDS[attributes["background"]], rng)
    x0, y0 = rng.uniform(0, 32, 2)

    shapes = []
    for outline in contours(attributes["object"], radius, tilt):
        shapes.append([tuple(point) for point in outline + centre])
    mask = make_mask(shapes, attributes["style"])
    pattern = make_pattern(attributes["style"], x0, y0)

    tint = tuple(round(0.3 * c + 0.7 * g) for c, g in zip(colour, ground))
    image = Image.new("RGB", (CANVAS, CANVAS), ground)
    image.paste(tint, mask=mask)
    image.paste(colour, mask=ImageChops.multiply(mask, pattern))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def jitter(rgb: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, ...]:
    """Return a colour whose channels differ by at most 10 from those of `rgb`."""
    shifted = np.array(rgb) + rng.integers(-10, 11, 3)
    return tuple(int(value) for value in np.clip(shifted, 0, 255))


def make_mask(shapes: list[list[tuple]], style: str) -> Image.Image:
    """Return the image, mode "L", that is 255 where the object covers the background.

    The first shape is filled and the second one, the hole of a ring, is cut out. In style
    "outlined" only the lines are covered; in style "blurred" the edges are soft.
    """
    mask = Image.new("L", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(mask)
    if style == "outlined":
        for shape in shapes:
            closed = [*shape, shape[0], shape[1]]  # the last joint becomes round like the others
            pen.line(closed, fill=255, width=int(2.6 * SCALE), joint="curve")
        return mask

    for shape, ink in zip(shapes, (255, 0)):
        pen.polygon(shape, fill=ink)
    if style == "blurred":
        return mask.filter(ImageFilter.GaussianBlur(3.2 * SCALE))
    return mask


def make_pattern(style: str, x0: float, y0: float) -> Image.Image:
    """Return the image, mode "L", that is 255 where the object has its full colour.

    Where it is 0 the object has a pale tint. (x0, y0) shifts stripes, dots and squares. The
    styles without a pattern are 255 everywhere.
    """
    pattern = Image.new("L", (CANVAS, CANVAS), 255)
    pen = ImageDraw.Draw(pattern)
    if style == "striped":
        for u in np.arange(-CANVAS - x0, 2 * CANVAS, 32):
            corners = [(u, 0), (u + 16, 0), (u + 16 - CANVAS, CANVAS), (u - CANVAS, CANVAS)]
            pen.polygon(corners, fill=0)
    elif style == "dotted":
        pen.rectangle((0, 0, CANVAS, CANVAS), fill=0)
        for u in np.arange(-x0, CANVAS + 32, 26):
            for v in np.arange(-y0, CANVAS + 32, 26):
                pen.ellipse((u - 8.5, v - 8.5, u + 8.5, v + 8.5), fill=255)
    elif style == "checkered":
        for i, j in itertools.product(range(14), range(14)):
            if (i + j) % 2 == 1:
                left = 20 * i
                top = 20 * j
                pen.rectangle((left - x0, top - y0, left + 19 - x0, top + 19 - y0), fill=0)
    return pattern


# ---- the geometry of the objects


def contours(name: str, radius: float, tilt: float) -> list[np.ndarray]:
    """Return the closed outlines of an object around the origin, each an array (points, 2).

    A ring has two of them, the outer one first; all others have one. x points right and y down.
    `tilt` is in radians.
    """
    if name == "circle":
        return [polar(turns(64, tilt), radius)]
    if name == "ring":
        return [polar(turns(64, tilt), radius), polar(turns(64, tilt), 0.5 * radius)]
    if name == "square":
        return [polar(turns(4, tilt + math.radians(45)), 1.2 * radius)]
    if name == "triangle":
        return [polar(turns(3, tilt), 1.2 * radius) + [0, 0.15 * radius]]
    if name == "star":
        reach = np.where(np.arange(10) % 2, 0.45, 1.0)  # points and notches take turns
        return [polar(turns(10, tilt), 1.2 * radius * reach)]
    if name == "cross":
        return [radius * cross() @ rotation(tilt)]
    if name == "heart":
        return [radius / 15 * heart() @ rotation(tilt)]
    return [1.1 * radius * moon() @ rotation(tilt)]


def turns(n: int, start: float) -> np.ndarray:
    """Return n angles, in radians, that divide a full turn equally and begin at `start`."""
    return start + 2 * math.pi * np.arange(n) / n


def polar(angle: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Return the points (n, 2) at these angles, measured from the top, and distances."""
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)


def rotation(tilt: float) -> np.ndarray:
    """Return the matrix (2, 2) that tilts points (n, 2) when they are multiplied by it."""
    return np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])


def cross() -> np.ndarray:
    """Return the 12 corners of an upright cross: three of an arm, turned by quarters."""
    half_width = 0.36
    length = 1.05
    arm = np.array(
        [(-half_width, -length), (half_width, -length), (half_width, -half_width)],
    )
    quarter = np.array([(0, 1), (-1, 0)])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter, i) for i in range(4)])


def heart() -> np.ndarray:
    """Return 64 points of the usual curve of a heart, about 16 units wide to either side."""
    s = 2 * math.pi * np.arange(64) / 64
    y = 13 * np.cos(s) - 5 * np.cos(2 * s) - 2 * np.cos(3 * s) - np.cos(4 * s)
    return np.stack([16 * np.sin(s) ** 3, -y - 2], 1)


def moon() -> np.ndarray:
    """Return a crescent that is open to the right.

    An outer arc of 260 degrees is closed by the arc of a second circle, which cuts into it.
    """
    outer = circle_points(np.radians(np.linspace(50, 310, 48)))
    first_end = outer[0]
    last_end = outer[-1]
    centre = np.array([0.75, 0.0])  # of the second circle, which goes through both ends
    r = np.linalg.norm(first_end - centre)

    start = angle_of(last_end - centre)
    stop = angle_of(first_end - centre)
    inner = np.linspace(start, stop, 32)[1:-1]
    points = np.concatenate([outer, centre + r * circle_points(inner)])
    return points - [-0.15, 0]


def circle_points(angle: np.ndarray) -> np.ndarray:
    """Return the points (n, 2) of the unit circle at these angles, measured from the right."""
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def angle_of(point: np.ndarray) -> float:
    """Return the angle of a point (x, y), in radians from 0 to 2 pi."""
    x, y = point
    return math.atan2(y, x) % (2 * math.pi)


# ---- captions


def captions(attributes: Attributes) -> list[str]:
    """Return the six captions of a drawing that training uses; prompts use the first one.

    For a large solid red moon on white it gives "a solid red moon on a white background",
    "a large solid red moon on a white background", "red solid moon, white background", ...
    """

    def join(*names: str) -> str:
        """Return the values of these attributes with spaces between them; an empty size is left
        out."""
        return " ".join(attributes[name] for name in names if attributes[name])

    colour = attributes["colour"]
    style = attributes["style"]
    background = attributes["background"]
    plain = with_article(join("style", "colour", "object"))
    sized = with_article(join("size", "style", "colour", "object"))
    sized_by_colour = with_article(join("size", "colour", "style", "object"))
    without_style = with_article(join("colour", "object"))
    return [
        f"{plain} on a {background} background",
        f"{sized} on a {background} background",
        f"{join('colour', 'style', 'object')}, {background} background",
        f"a picture of {sized_by_colour}",
        f"the {join('size', 'object')} is {colour} and {style}",
        f"{without_style} on {background}",
    ]


def with_article(text: str) -> str:
    """Return "an orange moon" for "orange moon", and "a red moon" for "red moon"."""
    if text[0] in "aeiou":
        return f"an {text}"
    return f"a {text}"


def write_prompts(path: Path, seed: int) -> None:
    """Write a CSV file with every combination of object, style, colour and background once.

    The order is random. The columns are prompt, object, style, colour and background.
    """
    values = CONCEPTS | {"background": BACKGROUNDS}
    rows = [dict(zip(values, combination)) for combination in itertools.product(*values.values())]
    order = np.random.default_rng(seed).permutation(len(rows))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", *rows[0]])
        writer.writeheader()
        for i in order:
            prompt = captions(rows[i] | {"size": ""})[0]
            writer.writerow({"prompt": prompt, **rows[i]})


# ---- judging images


def to_model(pixels: Tensor) -> Tensor:
    """Return pixels of 0 to 255 as float32 in [-1, 1], as classifier and autoencoder take them."""
    return pixels.float() / 127.5 - 1


class Classifier(nn.Module):
    """A small convolutional network that tells an image's object, style and colour.

    Images (N, 3, 64, 64) in [-1, 1] become {"object": logits (N, 8), "style": (N, 6), "colour":
    (N, 6)}. The toy's knows 99.9 % of the drawings (toy/check.json).
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.convs = nn.ModuleList()
        for width_in, width_out in itertools.pairwise(widths):
            self.convs.append(nn.Conv2d(width_in, width_out, 3, stride=2, padding=1))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.heads = nn.ModuleDict()
        for name, values in CONCEPTS.items():
            self.heads[name] = nn.Linear(2 * widths[-1], len(values))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for conv, norm in zip(self.convs, self.norms):
            x = F.silu(norm(conv(x)))
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return {name: head(x) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, x: Tensor) -> list[dict[str, str]]:
        """Return the most likely {"object", "style", "colour"} of each image."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(x).items()}
        predictions = []
        for i in range(len(x)):
            predictions.append({name: CONCEPTS[name][best[name][i]] for name in CONCEPTS})
        return predictions

    @classmethod
    def load(cls, folder: str | Path) -> "Classifier":
        """Return the classifier of a model's folder, ready to predict and not to be trained."""
        model = cls()
        model.load_state_dict(load_file(Path(folder) / "classifier.safetensors"))
        return model.eval().requires_grad_(False)


def accuracies(predicted: list[dict[str, str]], wanted: list[dict[str, str]]) -> dict[str, float]:
    """Return the fraction of images that show the wanted object, style and colour.

    For two images of which one has the wrong style it gives {"object": 1.0, "style": 0.5,
    "colour": 1.0}.
    """
    fractions = {}
    for name in CONCEPTS:
        hits = sum(shown[name] == asked[name] for shown, asked in zip(predicted, wanted))
        fractions[name] = hits / len(predicted)
    return fractions
