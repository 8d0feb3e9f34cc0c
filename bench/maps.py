"""Do heat maps lie on what is drawn? Their intersection over union with the toy's objects.

    python -m bench maps                                # the newest SAE in saes/
    python -m bench maps --sae saes/a saes/b

Needs SAEs that were trained on activations of the toy's own prompts, with their images. It takes
less than a minute per SAE on two CPU cores.

A heat map is that of features.py, the mean activation over the steps. It fires where it has at
least a quarter of its peak. The object is where the image differs by more than 40 of 255 from its
background, the median of its border. One half of a feature's images chooses features; the other
half scores them. Two choices are printed:

    fit       the eight features that fit the object best, whatever they mean
    object    for each object, of the features most of whose images show it, the one that fits best

    IoU         mean and standard deviation, over the chosen features, of intersection over union
    shuffled    the same with the cells of each map in random order: what chance gives
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import features
from bench.step import conditions
from cli import check_positive, resolve_device
from errors import UsageError
from sae import Sae, newest_sae
from store.identity import activations_of

BACKGROUND_TOLERANCE = 40  # of 255; the distance of two colours
NUM_BEST_FITTING = 8


@dataclass
class Config:
    # model
    sae: list[str] = field(default_factory=list)
    """Score the SAEs in these folders. If not given, it is the newest one in saes/."""

    # data
    top_images: int = 16
    """Use this many images per feature. Features with fewer are left out."""

    share: float = 0.9
    """Call a feature one of an object if this fraction of its images shows the object."""

    at: float = 0.25
    """Count a cell of a map as firing from this fraction of the map's peak on."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


class Fit(NamedTuple):
    """How well the maps of one feature lie on the objects."""

    choosing: float
    """Mean overlap on the images with an even number, which choose."""

    scoring: float
    """Mean overlap on the images with an odd number."""

    shuffled: float
    """As `scoring`, with the cells of each map shuffled."""

    object_name: str | None
    """The object that nearly all of its images show; None if there is no such object."""


def drawn(image: np.ndarray | Image.Image) -> np.ndarray:
    """Return where an image (H, W, 3) of 0 to 255 shows its object: bool (H, W)."""
    pixels = np.asarray(image, float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, 0)
    return np.linalg.norm(pixels - background, axis=2) > BACKGROUND_TOLERANCE


def overlap(cells: np.ndarray, mask: np.ndarray, at: float = 0.25) -> float:
    """Return the intersection over union of a heat map (h, w) and a mask, bool (H, W).

    The map is enlarged to the mask's size, and fires where it has at least `at` of its peak.
    """
    height, width = mask.shape
    image = Image.fromarray(cells.astype(np.float32))
    enlarged = image.resize((width, height), Image.Resampling.BILINEAR)
    fires = np.asarray(enlarged) >= at * np.max(enlarged)
    return (fires & mask).sum() / (fires | mask).sum()


def main(cfg: Config) -> None:
    """Print both choices for each SAE. Raises UsageError for activations of other prompts."""
    check_positive(cfg, "top_images")
    device = resolve_device(cfg.device)
    rng = np.random.default_rng(0)
    print(conditions(device))
    for path in cfg.sae or [str(newest_sae())]:
        measure_sae(path, cfg, device, rng)


def measure_sae(
    path: str | Path, cfg: Config, device: torch.device, rng: np.random.Generator
) -> None:
    """Print both choices for one SAE; `rng` shuffles the cells of its maps.

    Raises UsageError if the SAE was not trained on activations of the toy's own prompts.
    """
    # 1. Every feature's images, and its maps of them
    sae = Sae.load_from_disk(path, device)
    activations = activations_of(sae, path)
    [file] = activations.sources
    if not file.prompt_rows or "object" not in file.prompt_rows[0]:
        raise UsageError(f"{file.path}: expected activations of the toy's own prompts")
    grid = features.map_grid(file, 16)
    scan = features.scan(sae, activations, [grid], cfg.top_images, 4096)

    # 2. The objects in these images
    images = [example.image for example in features.list_examples(activations)]
    masks = {}
    for number in sorted(set(scan.examples[scan.examples >= 0].tolist())):
        masks[number] = drawn(Image.open(images[number]).convert("RGB"))

    # 3. Each feature's fit
    num_cells = grid.num_cells
    fits = []
    for numbers, maps in zip(scan.examples.tolist(), scan.maps.numpy()):
        if min(numbers) < 0:
            continue  # it has too few images
        cells = [each[:num_cells].reshape(grid.shape[1:]) for each in maps]
        objects = [file.prompt_rows[number]["object"] for number in numbers]
        of_feature = [masks[number] for number in numbers]
        fits.append(measure_fit(cells, of_feature, objects, cfg, rng))

    # 4. The two choices
    print(
        f"\n{sae.cfg['hook_name']}: {len(fits)} features with {cfg.top_images} images, "
        f"of {len(masks)} images in all"
    )
    print_choices(fits)


def print_choices(fits: list[Fit]) -> None:
    """Print the eight features that fit best, and for each object the one that fits it best."""
    best_first = sorted(fits, key=lambda fit: -fit.choosing)
    best_of_object = {}
    for fit in best_first:
        if fit.object_name is not None:
            best_of_object.setdefault(fit.object_name, fit)
    print_choice("fit", best_first[:NUM_BEST_FITTING])
    print_choice("object", list(best_of_object.values()))


def measure_fit(
    cells: list[np.ndarray],
    masks: list[np.ndarray],
    objects: list[str],
    cfg: Config,
    rng: np.random.Generator,
) -> Fit:
    """Return the fit of one feature, from the map, mask and object of each of its images."""
    overlaps = [overlap(each, mask, cfg.at) for each, mask in zip(cells, masks)]
    shuffled = []
    for each, mask in zip(cells[1::2], masks[1::2]):
        mixed = rng.permutation(each.flatten()).reshape(each.shape)
        shuffled.append(overlap(mixed, mask, cfg.at))

    most_frequent = max(set(objects), key=objects.count)
    object_name = None
    if objects.count(most_frequent) >= cfg.share * len(objects):
        object_name = most_frequent
    return Fit(np.mean(overlaps[::2]), np.mean(overlaps[1::2]), np.mean(shuffled), object_name)


def print_choice(name: str, fits: list[Fit]) -> None:
    """Print the mean overlap of the chosen features, and what shuffled maps have."""
    if not fits:
        return
    scores = [fit.scoring for fit in fits]
    mean = np.mean(scores)
    spread = np.std(scores)
    shuffled = np.mean([fit.shuffled for fit in fits])
    print(
        f"{name:8} {len(fits)} features: IoU {mean:.3f} ± {spread:.3f}, shuffled {shuffled:.3f}",
        flush=True,
    )
