"""Do heat maps lie on what is drawn? Their intersection over union with the object of the toy's
pictures.

    python -m bench maps                                # the newest SAE, on toy activations that it was trained on
    python -m bench maps --sae saes/a saes/b

A map of features.py (mean activation over the steps) fires where it is at least a quarter of its
peak. The object is where the picture differs from its background, the median of its border, by more
than 40 of 255. A feature's images take turns: half of them choose features, the other half score
them, beside the same maps with their cells shuffled. Two choices:

    fit       the eight features that fit the object best, whatever they are of
    object    for each object, of the features most of whose images show it, the one that fits best
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

import features
from bench.step import conditions
from cli import check_positive, resolve_device
from errors import UsageError
from sae import Sae, newest_sae
from store.identity import activations_of


@dataclass
class Config:
    sae: list[str] = field(default_factory=list)
    """Folders of SAEs of toy activations (none: the newest in saes/)."""

    top_images: int = 16
    """Of a feature; those with fewer are left out."""

    share: float = 0.9
    """Of a feature's images that show an object, if it is of that object."""

    at: float = 0.25
    """Of a map's peak, where it counts as firing."""

    device: str = "auto"
    """Auto, cuda, cuda:N, mps, cpu."""


def drawn(picture):
    """Where a picture (H, W, 3) of 0 to 255 shows its object: bool (H, W)."""
    picture = np.asarray(picture, float)
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return np.linalg.norm(picture - np.median(border, 0), axis=2) > 40


def overlap(cells, mask, at=0.25):
    """Intersection over union of a map (h, w), where it is at least `at` of its peak, with a mask
    (H, W)."""
    grown = Image.fromarray(cells.astype(np.float32)).resize(
        mask.shape[::-1], Image.Resampling.BILINEAR
    )
    fired = np.asarray(grown) >= at * np.max(grown)
    return (fired & mask).sum() / (fired | mask).sum()


def main(cfg):
    check_positive(cfg, "top_images")
    device, rng = resolve_device(cfg.device), np.random.default_rng(0)
    where, versions, commit = conditions(device)
    print(f"{where}; {versions}; commit {commit}")
    for path in cfg.sae or [str(newest_sae())]:
        # 1. The maps, and the objects in their pictures
        sae = Sae.load_from_disk(path, device)
        activations = activations_of(sae, path)
        (file,) = activations.sources
        if not file.prompt_rows or "object" not in file.prompt_rows[0]:
            raise UsageError(f"{file.path}: expected activations of the toy's own prompts")
        grid = features.map_grid(file, 16)
        found = features.scan(sae, activations, [grid], cfg.top_images, 4096)
        examples = features.list_examples(activations)
        shown = sorted(set(found.examples[found.examples >= 0].tolist()))
        masks = {e: drawn(Image.open(examples[e].image).convert("RGB")) for e in shown}

        # 2. Each feature's fit, in two halves of its images, and what most of them show
        fits = []  # (fit in the half that chooses, in the other, there with shuffled maps, object or None)
        for examples, maps in zip(found.examples.tolist(), found.maps.numpy()):
            if min(examples) < 0:
                continue
            each = [
                overlap(m[: np.prod(grid.shape)].reshape(grid.shape), masks[e], cfg.at)
                for m, e in zip(maps, examples)
            ]
            mixed = [
                rng.permutation(m[: np.prod(grid.shape)]).reshape(grid.shape) for m in maps[1::2]
            ]
            mixed = [overlap(m, masks[e], cfg.at) for m, e in zip(mixed, examples[1::2])]
            objects = [file.prompt_rows[e]["object"] for e in examples]
            most = max(set(objects), key=objects.count)
            told = most if objects.count(most) >= cfg.share * len(objects) else None
            fits.append((np.mean(each[::2]), np.mean(each[1::2]), np.mean(mixed), told))

        # 3. The two choices
        fits.sort(key=lambda fit: -fit[0])
        print(
            f"\n{sae.cfg['hook_name']}: {len(fits)} features with {cfg.top_images} images, of {len(shown)} pictures"
        )
        best = {}
        for fit in fits:
            best.setdefault(fit[3], fit)
        best.pop(None, None)
        for name, chosen in (("fit", fits[:8]), ("object", list(best.values()))):
            if chosen:
                _, fit, mixed = np.mean([f[:3] for f in chosen], 0)
                spread = np.std([f[1] for f in chosen])
                print(
                    f"{name:8} {len(chosen)} features: IoU {fit:.3f} ± {spread:.3f}, shuffled {mixed:.3f}",
                    flush=True,
                )
