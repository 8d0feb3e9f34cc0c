"""Stage 7: act. Amplify, ablate or add features while the model generates, and see each picture
before and after.

    python steer.py                                                   # a feature of the newest SAE, ablated and amplified
    python steer.py --features 12 98 --multiply 0 4 --steps 0-10      # two features together; a row for each strength
    python steer.py --concept star --num_features 4 --multiply -2     # the features that fire for prompts with the word
    python steer.py --concept star --num_features 16 --toward ring    # and in their place what rings have more of
    python steer.py --sae saes/a saes/b --features 0:12 1:98 --add 2.5 --mask 0 0 1 0.5

The change is added to the activation, x + delta, so what the SAE does not explain of it stays
(analysis/feature_edits.py). Beside each picture stands how far the edited activations are from
those that the SAE was trained on, as norm and distance, 1 for typical ones
(`feature_edits.Typical`): far above 1, the picture says less about the feature than about a broken
model.

Reads   SAE folders, the activation files that they were trained on, and the model that these are of.
Writes  <out_dir>/<what was changed>/: steer.png (a prompt a column, untouched above), steer.json.
It changes no weight: an edit lasts for the generation. Sources: see feature_edits.py and concepts.py
in analysis/. How well concepts of the toy are unlearned says `python -m bench unlearn`.
"""

import hashlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from analysis.concepts import find_features, image_scores, toward, with_word
from analysis.feature_edits import Change, Edits, Target, Typical, check_features, redirect, steer
from analysis.plots import ImageRow, plot_images
from cli import check_positive, parse_object, resolve_device, resolve_dtype, run
from diffusion.generate import generate_images
from errors import UsageError
from hook import Generation, HookedDiffusionModel, model_of
from sae import Sae, newest_sae
from store.activation_file import refuse_unfinished
from store.disk import claim_folder, write_json
from store.hook_point import trained_on
from store.identity import activations_of, check_belongs, origin
from store.prompts import load_prompts, seen_text, with_seeds


@dataclass
class Config:
    sae: list[str] = field(default_factory=list)
    """Their folders, each at a hook point of its own (none: the newest in saes/)."""

    features: list[str] = field(default_factory=list)
    """Such as 12; of several SAEs 0:12 for the first, 1:12 for the second."""

    concept: str | None = None
    """A word of the prompts: its features are found (neither: the feature that varies most)."""

    num_features: int = 1
    """Of the concept, in each SAE."""

    score: Literal["contrast", "saeuron"] = "contrast"
    """That finds them, see analysis/concepts.py."""

    num_pictures: int = 128
    """Of the activation files, that features are found from."""

    multiply: list[float] = field(default_factory=list)
    """Of the activations: 1 changes nothing, 0 ablates; a row for each."""

    add: list[float] = field(default_factory=list)
    """To x along decoder rows, in RMS norms of the step (neither: multiply 0 4)."""

    toward: str | None = None
    """With --concept: a word of the prompts that is put in its place."""

    steps: str | None = None
    """First-last, from 0 (None: all)."""

    mask: list[str] = field(default_factory=list)
    """Top left bottom right as fractions of the picture, or a file: white is edited."""

    rows: Literal["cond", "uncond", "both"] | None = None
    """Of the guidance, that are edited (None: those of the SAE)."""

    renormalize: bool = False
    """Give each edited token its norm of before back."""

    model_name: str | None = None
    """None: the model that the activations are of."""

    transfer: bool = False
    """Use an SAE on purpose where it was not trained: in a model with other weights."""

    dataset_name: str | None = None
    """Prompts: a file, a hub data set or one prompt (None: those of the activations)."""

    negative_prompt: str | None = None
    """None: the one that the activations were made with."""

    column: str | None = None
    """That holds the prompt (None: prompt, caption or text)."""

    num_prompts: int = 8
    """The columns of the picture."""

    seed: int = 0
    """Of prompt i of --dataset_name: seed + i, or its column seed; those of the activations have
    their own."""

    num_inference_steps: int | None = None
    """None: those of the activations."""

    guidance_scale: float | None = None
    """None: that of the activations."""

    pipeline_kwargs: str = "{}"
    """JSON object: anything else that the pipeline takes."""

    batch_size: int = 8
    """Prompts generated together."""

    out_dir: str = "steer"
    """In which each edit gets a folder."""

    device: str = "auto"
    """Auto, cuda, cuda:N, mps, cpu."""


def parse_features(texts: list[str], saes: list[Sae]) -> list[list[int]]:
    """`12` or, with several SAEs, `1:12` -> features of each SAE. Raises UsageError for what is
    neither, or not there."""
    found = [[] for _ in saes]
    for text in texts:
        match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
        if not match or (match[1] is None and len(saes) > 1):
            form = (
                "a number such as 12"
                if len(saes) == 1
                else "the SAE's place in --sae and a number, such as 0:12"
            )
            raise UsageError(f"--features {text}: expected {form}")
        if (which := int(match[1] or 0)) >= len(saes):
            raise UsageError(f"--features {text}: --sae names {len(saes)}, numbered from 0")
        found[which].append(int(match[2]))
    for sae, features in zip(saes, found):
        check_features(sae, features)
    return found


def parse_steps(text: str | None, num_steps: int | None) -> range | None:
    """`0-10` or `3` -> range(0, 11), range(3, 4); None is all. Raises UsageError for others, and
    outside of the sampling."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first:
        raise UsageError(f"--steps {text}: expected first-last, such as 0-10")
    if last >= (num_steps or last + 1):
        raise UsageError(
            f"--steps {text}: the sampling has {num_steps} steps, 0 to {num_steps - 1}"
        )
    return range(first, last + 1)


def token_mask(given: list[str], grid: tuple[int, ...]) -> Tensor | None:
    """The tokens to edit, bool (tokens,), of a box in fractions or a picture file; None for an
    empty list.

    grid: (h, w) or (frames, h, w) of the hook point. A token is in the box if its centre is.
    UsageError for what is neither.
    """
    if not given:
        return None
    if len(grid) not in (2, 3):
        raise UsageError(
            f"--mask: the tokens of this hook point are on the grid {tuple(grid)}, which is no picture"
        )
    h, w = grid[-2:]
    if len(given) == 1:
        mask = picture_mask(given[0], h, w)
    else:
        try:
            top, left, bottom, right = map(float, given)
        except ValueError:
            raise UsageError(
                f"--mask {' '.join(given)}: expected top left bottom right, such as 0 0 1 0.5, or a file"
            ) from None
        if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
            raise UsageError(
                f"--mask {' '.join(given)}: expected fractions of the picture, from 0 to 1"
            )
        y, x = (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w
        mask = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    if not mask.any():
        raise UsageError(f"--mask {' '.join(given)}: no token of the {h} x {w} is in it")
    return mask.flatten().repeat(grid[0] if len(grid) == 3 else 1)


def picture_mask(path: str, h: int, w: int) -> Tensor:
    """What is white and opaque in a picture file, bool (h, w). Raises UsageError for a file that is
    no picture of 8 bits."""
    try:
        picture = Image.open(path)
        picture.load()
    except OSError as error:
        raise UsageError(f"--mask {path}: no picture that can be read ({error})") from None
    if picture.mode.startswith(("I", "F")):
        raise UsageError(
            f"--mask {path}: expected a picture of 8 bits, and this one has mode {picture.mode}"
        )
    black = Image.new("RGBA", picture.size, "black")
    flat = Image.alpha_composite(black, picture.convert("RGBA")).convert("L")
    return torch.from_numpy(np.array(flat.resize((w, h), Image.Resampling.BOX))) > 127


def check_config(cfg: Config) -> None:
    """Raise UsageError for options that can't be used, or not together."""
    check_positive(
        cfg, "num_features", "num_pictures", "num_prompts", "num_inference_steps", "batch_size"
    )
    if cfg.features and cfg.concept is not None:
        raise UsageError("expected one of --features and --concept at most")
    if bool(cfg.multiply) + bool(cfg.add) + (cfg.toward is not None) > 1:
        raise UsageError("expected one of --multiply, --add and --toward at most")
    if cfg.toward is not None and cfg.concept is None:
        raise UsageError("--toward is of --concept: what is put in its place")


def load_targets(cfg: Config, device: torch.device) -> list[Target]:
    """The SAEs, without features yet. Raises UsageError if two belong to one hook point."""
    targets = []
    for path in cfg.sae or [str(newest_sae())]:
        sae = Sae.load_from_disk(path, device)
        data = sae.cfg.get("data") or []
        activations = None
        if data and all(Path(name).exists() for name in data):
            activations = activations_of(sae, path, transfer=cfg.transfer)
        targets.append(Target(path, sae, trained_on(sae), features=[], activations=activations))
    names = {target.hook_point.hook_name for target in targets}
    if len(names) < len(targets):
        raise UsageError("--sae names two SAEs of one hook point; expected one each")
    return targets


def choose_features(cfg: Config, targets: list[Target]) -> list[dict] | None:
    """Give each target its features. Returns the prompts to show them on, rows of prompts.jsonl,
    where these follow from it."""
    if cfg.features:
        parsed = parse_features(cfg.features, [target.sae for target in targets])
        for target, features in zip(targets, parsed):
            target.features = features
        return None

    shown = None
    for target in targets:
        listing = rows_of(target)
        groups = (
            choose_varying(cfg, target)
            if cfg.concept is None
            else choose_of_concept(cfg, target, listing)
        )
        if shown is None:  # by the first: some images that have the feature, then some that do not
            half = -(-cfg.num_prompts // 2)
            shown = [
                listing[row] for row in (*groups[0][:half], *groups[1][: cfg.num_prompts - half])
            ]
    return shown


def rows_of(target: Target) -> list[dict]:
    """The lines of prompts.jsonl of all images that the SAE was trained on. Raises UsageError where
    they are not there."""
    if target.activations is None:
        for path in target.sae.cfg.get("data") or []:
            refuse_unfinished(path)
        data = ", ".join(target.sae.cfg.get("data") or ["its activations"])
        raise UsageError(
            f"{target.path} was trained on {data}, which is not there: name --features and --dataset_name"
        )
    return target.activations.rows_of_prompts()


def choose_of_concept(
    cfg: Config, target: Target, listing: list[dict]
) -> tuple[np.ndarray, np.ndarray]:
    """The features that fire for prompts with the word. Returns the rows of the listing with it,
    and those without."""
    scores, rows = image_scores(target.sae, target.activations, pictures=cfg.num_pictures)
    texts = [seen_text(listing[row]) for row in rows]
    has_word = with_word(texts, cfg.concept)
    if cfg.toward is not None:
        other = with_word(texts, cfg.toward) & ~has_word
        target.direction = toward(target.sae, scores, other, has_word)
    features, values = find_features(scores, has_word, cfg.score, cfg.num_features)
    target.features, target.scores = features.tolist(), values.tolist()
    return rows[has_word.numpy()], rows[~has_word.numpy()]


def choose_varying(cfg: Config, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """The features that vary most between images. Returns the rows of the listing where they are
    strong, and where weak."""
    scores, rows = image_scores(target.sae, target.activations, pictures=cfg.num_pictures)
    scores = scores.mean(1)  # (P, M), over steps
    values, features = scores.std(0).topk(min(cfg.num_features, target.sae.num_latents))
    target.features, target.scores = features.tolist(), values.tolist()
    order = rows[scores[:, features].sum(1).argsort(descending=True)]
    return order[: len(order) // 2], order[::-1][: len(order) // 2]


ROW_NAMES = {"multiply": "× {:g}", "add": "+ {:g}", "toward": "→ {}"}  # of a strength
FOLDER_NAMES = {"multiply": "x{:g}", "add": "add{:g}", "toward": "to_{}"}


class Strength(NamedTuple):
    """What one row of the picture does to the features."""

    kind: str
    """multiply, add or toward"""

    value: float | str

    def change(self, target: Target) -> Change:
        """What is added to the target's activations."""
        stream = target.hook_point.stream
        if self.kind == "toward":
            return redirect(target.sae, target.features, target.direction, stream)
        return steer(target.sae, target.features, stream=stream, **{self.kind: self.value})


def strengths_of(cfg: Config) -> list[Strength]:
    if cfg.toward is not None:
        return [Strength("toward", cfg.toward)]
    if cfg.add:
        return [Strength("add", value) for value in cfg.add]
    return [Strength("multiply", value) for value in cfg.multiply or (0.0, 4.0)]


def folder_name(cfg: Config, targets: list[Target]) -> str:
    """What is changed, in less than 100 characters."""
    what = cfg.concept
    if what is None:
        what = "+".join(str(feature) for target in targets for feature in target.features)
    label = "_".join(
        [what, *(FOLDER_NAMES[kind].format(value) for kind, value in strengths_of(cfg))]
    )
    if cfg.steps is not None:
        label += f"_steps{cfg.steps}"
    if len(label) >= 100:
        label = f"{label[:80]}_{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return re.sub(r"[^\w.+-]+", "-", label)


def choose_prompts(cfg: Config, targets: list[Target], shown: list[dict] | None) -> list[dict]:
    """What is generated: rows with a prompt and a seed."""
    if not cfg.dataset_name:
        rows = (shown or rows_of(targets[0]))[: cfg.num_prompts]
        if cfg.negative_prompt is not None:
            rows = [row | {"negative_prompt": cfg.negative_prompt} for row in rows]
        return rows
    rows = load_prompts(
        cfg.dataset_name,
        column=cfg.column,
        negative_prompt=cfg.negative_prompt,
        max_num_examples=cfg.num_prompts,
    )
    negative = negative_prompt_of(cfg, targets[0])
    if negative is not None and "negative_prompt" not in rows[0]:
        rows = [row | {"negative_prompt": negative} for row in rows]
    return with_seeds(rows, cfg.seed)


def negative_prompt_of(cfg: Config, target: Target) -> str | None:
    """The negative prompt of the option, or else of the activations: some pipelines guide only
    where there is one."""
    if cfg.negative_prompt is not None or target.activations is None:
        return cfg.negative_prompt
    found = {row.get("negative_prompt") for row in target.activations.rows_of_prompts()}
    if len(found) > 1:
        path = target.activations.paths[0]
        raise UsageError(
            f"{path} was collected with {len(found)} negative prompts; choose one with --negative_prompt"
        )
    return found.pop()


def check_prompts(rows: list[dict], meta: dict, model: HookedDiffusionModel) -> None:
    """Raise UsageError where the activations are of real images without captions, so that there is
    nothing to generate."""
    empty = any(row["prompt"] in (None, "") for row in rows)
    if empty and meta.get("images") is not None and model.accepts(prompt=""):
        raise UsageError(
            "the activations are of real images without captions (--images): name prompts with --dataset_name"
        )


def load_model(cfg: Config, meta: dict, device: torch.device) -> tuple[HookedDiffusionModel, dict]:
    """The model of the activations, and the pipeline's arguments: theirs, or those of the
    options."""
    model, options = model_of(meta, cfg.model_name, device, resolve_dtype("auto", device))
    if cfg.model_name:
        options = {}  # another model has defaults of its own
    if meta.get("images") is not None:  # the steps and the guidance were those of adding noise
        options = {
            name: value
            for name, value in options.items()
            if name not in ("num_inference_steps", "guidance_scale")
        }
    given = {"num_inference_steps": cfg.num_inference_steps, "guidance_scale": cfg.guidance_scale}
    options |= {name: value for name, value in given.items() if value is not None}
    extra = parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    if twice := [name for name in extra if given.get(name) is not None]:
        raise UsageError(
            f"{twice[0]} is given twice: in --pipeline_kwargs and by an option of its own"
        )
    options |= extra
    return model, model.arguments(1, "pt", options)


def place_masks(
    cfg: Config, model: HookedDiffusionModel, generation: Generation, targets: list[Target]
) -> range | None:
    """Give each target the tokens of --mask on its grid; the steps of --steps, None for all.

    Raises UsageError for what is not on the grid, and for steps that the sampling does not have.
    """
    first = next(generation.batches(1))
    for target in targets:
        stream = target.hook_point.stream
        cache = model.first_step(
            target.hook_point.hook_name, first.prompts, stream=stream, **first.arguments()
        )
        grid = next(iter(cache["grid"].values())) if stream == "image" else ()
        target.mask = token_mask(cfg.mask, grid)
        steps = parse_steps(cfg.steps, cache["num_steps"])
    return steps


def measure_typical(targets: list[Target]) -> None:
    """Give each target what is typical of its activations, where the files are there."""
    for target in targets:
        try:
            target.typical = Typical(target.sae.cfg["data"])
        except (ValueError, OSError) as error:
            print(f"note: norm and distance are not measured: {error}")


class Run(NamedTuple):
    """One row of the picture."""

    strength: Strength
    name: str
    images: Tensor
    """(P, 3, H, W) in [0, 1]"""

    numbers: list[list[float] | None]
    """(norm, distance) of each image; None where they were not measured"""

    def moved(self, untouched: "Run") -> Tensor:
        """(P,): root mean square difference to the untouched images."""
        return (self.images - untouched.images).square().flatten(1).mean(1).sqrt()

    def captions(self) -> list[str]:
        return ["" if n is None else f"norm {n[0]:.2f}   distance {n[1]:.2f}" for n in self.numbers]

    def record(self, untouched: "Run") -> dict:
        """What steer.json says of it."""
        images = []
        for moved, numbers in zip(self.moved(untouched).tolist(), self.numbers):
            norm, distance = numbers or (None, None)
            images.append({"moved": moved, "norm": norm, "distance": distance})
        return {"name": self.name, self.strength.kind: self.strength.value, "pictures": images}


def generate_runs(
    cfg: Config,
    model: HookedDiffusionModel,
    generation: Generation,
    targets: list[Target],
    steps: range | None,
) -> list[Run]:
    """The untouched run, then one for each strength."""
    untouched = Strength("multiply", 1.0)
    strengths = [untouched, *strengths_of(cfg)]
    count = len(generation.prompts)
    runs = []
    with tqdm(total=count * len(strengths), unit="picture", desc="steering") as bar:
        for strength in strengths:
            changes = [strength.change(target) for target in targets]
            edits = Edits(targets, changes, cfg.rows, steps, cfg.renormalize)
            images = generate_images(model, generation, cfg.batch_size, edits, bar)
            name = (
                "untouched"
                if strength is untouched
                else ROW_NAMES[strength.kind].format(strength.value)
            )
            runs.append(Run(strength, name, images, edits.numbers(count)))
    return runs


def print_table(runs: list[Run]) -> None:
    """Means over the images."""
    print(
        f"{'':12} {'norm':>6} {'distance':>9} {'pictures':>9}   (1: typical of training; the last: RMS change, of 1)"
    )
    for made in runs:
        known = [numbers for numbers in made.numbers if numbers is not None]
        norm, distance = [f"{value:.2f}" for value in np.mean(known, 0)] if known else ["-", "-"]
        print(f"{made.name:12} {norm:>6} {distance:>9} {made.moved(runs[0]).mean():9.3f}")


def main(cfg: Config) -> list[Path]:
    """Edit features while the model generates; return the files that were written.

    Raises UsageError for options, SAEs and prompts that can't be used, and if the folder holds
    something else.
    """
    check_config(cfg)
    start = time.perf_counter()

    # 1. The SAEs, where they belong, and their features
    device = resolve_device(cfg.device)
    targets = load_targets(cfg, device)
    shown = choose_features(cfg, targets)

    # 2. A folder that holds nothing else
    rows = choose_prompts(cfg, targets, shown)
    settings = {
        name: value
        for name, value in vars(cfg).items()
        if name not in ("out_dir", "device", "batch_size")
    }
    settings["sae"] = [target.path for target in targets]
    folder = Path(cfg.out_dir) / folder_name(cfg, targets)
    claim_folder(folder, "steer.json", settings)

    # 3. The model, and which tokens and steps are edited
    first = targets[0].activations
    meta = origin(targets[0].sae.cfg, {} if first is None else first.sources[0].meta)
    model, options = load_model(cfg, meta, device)
    check_prompts(rows, meta, model)
    transfers = [
        check_belongs(target.path, target.sae.cfg, model=model, transfer=cfg.transfer)
        for target in targets
    ]
    generation = Generation.from_rows(rows, options)
    steps = place_masks(cfg, model, generation, targets)

    # 4. What is typical, then the untouched run and one for each strength
    measure_typical(targets)
    runs = generate_runs(cfg, model, generation, targets, steps)

    # 5. The table, the numbers and the pictures
    print_table(runs)
    written = [folder / "steer.png", folder / "steer.json"]
    grid = [ImageRow(made.name, made.images, made.captions()) for made in runs]
    plot_images(written[0], grid, generation.prompts)

    report = {
        "options": settings,
        "arguments": generation.arguments(),
        "seeds": generation.seeds,
        "prompts": generation.prompts,
    }
    report["runs"] = [made.record(runs[0]) for made in runs]
    report["saes"] = []
    for target, transfer in zip(targets, transfers):
        known = {
            "path": target.path,
            "features": target.features,
            "scores": target.scores,
            "transfer": transfer,
        }
        report["saes"].append(target.hook_point.as_dict() | known)
        print(f"{target.hook_point.hook_name}: features {' '.join(map(str, target.features))}")
    report["seconds"] = round(time.perf_counter() - start, 1)
    write_json(written[1], report)
    print(f"pictures in {written[0]}, numbers in {written[1]}")
    return written


if __name__ == "__main__":
    run(main, Config)
