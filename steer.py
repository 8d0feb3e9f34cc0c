"""Stage 7: act. Change features while the model generates, and see each image before and after.

    python steer.py                                          # exchange two words of the prompts
    python steer.py --features 12 98 --multiply 0 4 --steps 0-10    # a row of images per value
    python steer.py --concept star --num_features 4 --multiply -2   # the features of a word
    python steer.py --concept star --num_features 16 --toward ring  # put rings in its place
    python steer.py --sae saes/a saes/b --features 0:12 1:98 --add 2.5 --mask 0 0 1 0.5

In a notebook:

    picture, numbers, *files = main(Config(concept="star", num_features=16, toward="ring"))

Your options decide which features are changed:

    --features            these
    --concept             those that are most active for prompts with this word, against the others
    --multiply or --add   without the two above: the feature that varies most between images
    none of these         those of two words of the prompts, which are exchanged

To exchange two words, the script finds two that no prompt has together, and whose prompts the
features separate best from those without the word. It takes out what the features of the first word
add to the activations, and adds as much along the direction of the second. It prints the command
that does the same.

The change is added to the activation, x + delta, so the part of x that the SAE does not explain
stays (analysis/feature_edits.py). Below each image stand two numbers, norm and distance. They say
how far the edited activations are from those that the SAE was trained on, and are 1 for typical
ones. If they are far above 1, the image says less about the feature than about a broken model.

Reads   SAE folders, their training data (activation files), and the model that made these.
Writes  <out_dir>/<what was changed>/: steer.png (one prompt per column, untouched images on top),
        steer.json; of a video model videos/<row>_<prompt>.webp, of an audio model
        audio/<row>_<prompt>.wav.

The script changes no weight: an edit lasts for one generation. analysis/feature_edits.py and
analysis/concepts.py name the sources. `python -m bench unlearn` measures how well concepts of the
toy are unlearned.
"""

import hashlib
import math
import re
import shlex
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from cli import answer_help, check_positive, parse_object, resolve_device, resolve_dtype, run_script


@dataclass
class Config:
    # model
    sae: list[str] = field(default_factory=list)
    """Use the SAEs in these folders, each at a hook point of its own; the image and the text of one
    block are two. If not given, the newest one in saes/ is taken."""

    model_name: str | None = None
    """Generate with this model, named as for collect.py. Another model than that of the activations
    samples with its own defaults. If not given, the model that made the activations is used. A
    Python file of yours has to be given, since it is run."""

    lora: list[str] = field(default_factory=list)
    """Add these LoRAs to the weights, as in collect.py. If neither this nor --model_name is given,
    those that made the activations are added."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model of a folder or of the hub. Read it first: it
    can do all that you can."""

    transfer: bool = False
    """Use the SAE on purpose where it was not trained: on a model with other weights."""

    num_inference_steps: int | None = None
    """Sample in this many steps. Fewer are faster. If not given, there are as many as in the
    activations."""

    guidance_scale: float | None = None
    """Use this scale of classifier-free guidance. If not given, that of the activations is used."""

    pipeline_kwargs: str = "{}"
    """Pass these arguments to the pipeline as well: a JSON object, such as '{"height": 512}'."""

    # data
    dataset_name: str | None = None
    """Take the prompts from this file or hub data set, or use this text as the one prompt. If not
    given, prompts of the activations are used."""

    column: str | None = None
    """Read the prompts from this column of --dataset_name. If not given, it is the one called
    prompt, caption or text, or else the only column of texts."""

    negative_prompt: str | None = None
    """Use this negative prompt for all prompts. If a column of --dataset_name has this name, its
    texts are used. If not given, a column negative_prompt is used, or else that of the
    activations."""

    inputs: list[str] = field(default_factory=list)
    """Give the pipeline these images: name=value, where the name is an argument of the pipeline.
    The value is an image file (the same for all prompts), a folder (one image per prompt, in the
    order of their names) or a column of --dataset_name. If not given, the images of the activations
    are used with their prompts."""

    num_prompts: int = 8
    """Generate this many prompts, which are the columns of the picture."""

    seed: int = 0
    """Generate prompt i of --dataset_name, counted from 0, with seed + i. Leave this option out if
    the data set has a column seed."""

    # which features
    features: list[str] = field(default_factory=list)
    """Change the features with these numbers, such as 12. With several SAEs, 0:12 is feature 12 of
    the first, and 1:12 that of the second."""

    concept: str | None = None
    """Change features that are more active for the prompts with this word than for the others.
    The top of this help says what is changed without it."""

    num_features: int | None = None
    """Find this many features in each SAE. Raise it if the concept stays. If not given, 1; if two
    words are exchanged without options, 8."""

    score: Literal["contrast", "saeuron"] = "contrast"
    """Find features by this score. contrast compares the mean activation with and without the word,
    in standard deviations; saeuron compares each feature's share of all activation. Use saeuron to
    compare with SAeUron."""

    num_pictures: int = 128
    """Find features on at most this many images of the activations. Raise it for rare words."""

    # what to change
    multiply: list[float] = field(default_factory=list)
    """Multiply the activations of the features: 0 switches a feature off, 1 changes nothing. Each
    value gives a row of images. If not given, and neither are --add and --toward, 0 and 4."""

    add: list[float] = field(default_factory=list)
    """Add this many times the direction of each feature to all tokens. 1 is as long as a typical
    token of the image at this step (RMS). Each value gives a row of images."""

    toward: str | None = None
    """Put this word of the prompts in the place of --concept, which it needs."""

    steps: str | None = None
    """Edit only in these steps, first-last, counted from 0. Both ends are included: 0-10 are eleven
    steps. If not given, all steps are edited."""

    mask: list[str] = field(default_factory=list)
    """Edit only in this box (top left bottom right, in fractions of the image), or only where this
    image file is white. If not given, all tokens are edited."""

    rows: Literal["cond", "uncond", "both"] | None = None
    """Edit these rows of classifier-free guidance: with the prompt (cond), without it (uncond), or
    both. If not given, those that the SAE was trained on."""

    renormalize: bool = False
    """Give each edited token the length that it had before the edit. Use it if a strong edit breaks
    images."""

    # output
    out_dir: str = "steer"
    """Make a folder for each edit in this folder."""

    # hardware
    batch_size: int = 8
    """Generate this many images together; each row of the picture is made in batches of so many.
    Lower it if the GPU's memory is too small."""

    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


if __name__ == "__main__":
    answer_help(Config)  # --help and a mistyped option are answered before torch is imported


import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from analysis.concepts import clearest_exchange, find_features, image_scores, toward, with_word
from analysis.feature_edits import Change, Edits, Target, Typical, check_features, redirect, steer
from analysis.plots import ImageRow, plot_images
from diffusion.generate import generate_media
from diffusion.loading import digest_of, find_model, is_model_file, split_function
from errors import UsageError, decimals
from hook import Generation, HookedDiffusionModel, model_of
from sae import Sae, newest_sae
from store.activation_file import refuse_unfinished
from store.disk import claim_folder, write_json
from store.hook_point import trained_on
from store.identity import activations_of, check_belongs, origin
from store.images import Media, describe_files, save_media
from store.inputs import (
    InputImages,
    input_names,
    load_rows,
    name_of_copy,
    names_folder,
    open_image,
    parse_inputs,
    read_inputs,
)
from store.prompts import seen_text, with_seeds

EXCHANGED_FEATURES = 8  # on the toy, 64 change more of the image than the concept
MULTIPLY = [0.0, 4.0]  # strengths of features that the user chose, if none is given
MILD_MULTIPLY = [0.0, 2.0]  # of a feature that nobody chose: 4 times it destroys the toy's images
LARGEST_STRENGTH = 1e6  # of --multiply and --add; a float16 overflows at 65,504
ROW_NAMES = {"multiply": "× {:g}", "add": "+ {:g}", "toward": "→ {}"}  # of a strength
FOLDER_NAMES = {"multiply": "x{:g}", "add": "add{:g}", "toward": "to_{}"}  # of a strength
LONGEST_NAME = 100  # characters of a folder's name
NOT_IN_NAMES = r"[^\w.+-]+"  # of folders and files


# -------------------------------------------------------------------------------------- options


def check_config(cfg: Config) -> None:
    """Raise UsageError for options that can't be used, or not together."""
    check_positive(
        cfg, "num_features", "num_pictures", "num_prompts", "num_inference_steps", "batch_size"
    )
    for name in ("multiply", "add"):
        for value in getattr(cfg, name):
            if not abs(value) <= LARGEST_STRENGTH:  # so that NaN is refused, too
                raise UsageError(
                    f"--{name} {value:g}: expected a number from "
                    f"{-LARGEST_STRENGTH:g} to {LARGEST_STRENGTH:g}"
                )

    if cfg.features and cfg.concept is not None:
        raise UsageError("expected one of --features and --concept at most")
    if bool(cfg.multiply) + bool(cfg.add) + (cfg.toward is not None) > 1:
        raise UsageError("expected one of --multiply, --add and --toward at most")
    if cfg.toward is not None and cfg.concept is None:
        raise UsageError("--toward needs --concept: it names the word that is put in its place")
    check_options_are_read(cfg)


def check_options_are_read(cfg: Config) -> None:
    """Raise UsageError for an option that has a value other than its default, and no effect."""
    unread = []  # (options, when nothing reads them)
    if cfg.features:
        unread.append((("num_features", "num_pictures", "score"), "with --features"))
    elif cfg.concept is None and not exchanges_concepts(cfg):
        unread.append((("score",), "without --concept"))
    if not cfg.dataset_name:
        unread.append((("column",), "without --dataset_name"))
    if takes_prompts_of_activations(cfg):
        unread.append((("seed",), "without --dataset_name"))

    defaults = Config()
    for names, when in unread:
        for name in names:
            if getattr(cfg, name) != getattr(defaults, name):
                raise UsageError(f"--{name} has no effect {when}; leave it out")


def takes_prompts_of_activations(cfg: Config) -> bool:
    """Return whether the user has named no prompts, and no folder whose images are the rows."""
    return not cfg.dataset_name and not names_folder(cfg.inputs)


def exchanges_concepts(cfg: Config) -> bool:
    """Return whether the user has said neither which features are changed nor how."""
    chosen = cfg.features or cfg.concept is not None
    strength = cfg.multiply or cfg.add or cfg.toward is not None
    return not chosen and not strength


def parse_features(texts: list[str], saes: list[Sae]) -> list[list[int]]:
    """Return the features of each SAE: ["1:12", "0:3"] -> [[3], [12]], and ["12"] of one -> [[12]].

    Raises UsageError for a text of another form, an SAE that is not given, and a feature that the
    SAE does not have.
    """
    features_of = [[] for _ in saes]
    for text in texts:
        match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
        if not match or (match[1] is None and len(saes) > 1):
            form = "a number such as 12"
            if len(saes) > 1:
                form = "the SAE's place in --sae and a number, such as 0:12"
            raise UsageError(f"--features {text}: expected {form}")
        number = int(match[1] or 0)
        if number >= len(saes):
            raise UsageError(f"--features {text}: --sae names {len(saes)}, numbered from 0")
        features_of[number].append(int(match[2]))

    for sae, features in zip(saes, features_of):
        check_features(sae, features)
    return features_of


def parse_steps(text: str | None, num_steps: int | None) -> range | None:
    """Return the steps to edit in: "0-10" -> range(0, 11), "3" -> range(3, 4), None (all) -> None.

    num_steps: of the sampling, None if not known. Raises UsageError for another form, and for steps
    that the sampling does not have.
    """
    if text is None:
        return None

    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise UsageError(f"--steps {text}: expected first-last, such as 0-10")
    first = int(match[1])
    last = int(match[2] or match[1])
    if last < first:
        raise UsageError(f"--steps {text}: expected first-last, such as 0-10")
    if num_steps and last >= num_steps:
        raise UsageError(
            f"--steps {text}: the sampling has {num_steps} steps, 0 to {num_steps - 1}"
        )
    return range(first, last + 1)


def token_mask(given: list[str], grid: tuple[int, ...]) -> Tensor | None:
    """Return the tokens to edit, bool (tokens,), of a box in fractions or an image file.

    given: as in --mask; an empty list gives None. grid: (h, w) or (frames, h, w) of the hook point.
    A token is in the box if its centre is. Raises UsageError for anything else, and if no token is
    in the mask.
    """
    if not given:
        return None
    if len(grid) not in (2, 3):
        raise UsageError(
            f"--mask: the tokens of this hook point are on the grid {tuple(grid)}, "
            "which is no picture"
        )

    h, w = grid[-2:]
    mask = picture_mask(given[0], h, w) if len(given) == 1 else box_mask(given, h, w)
    if not mask.any():
        raise UsageError(f"--mask {' '.join(given)}: no token of the {h} x {w} is in it")
    num_frames = grid[0] if len(grid) == 3 else 1
    return mask.flatten().repeat(num_frames)


def box_mask(given: list[str], h: int, w: int) -> Tensor:
    """Return which tokens have their centre in a box, bool (h, w).

    given: top, left, bottom and right as fractions; 0 0 1 0.5 is the left half. Raises UsageError
    for anything else.
    """
    try:
        top, left, bottom, right = map(float, given)
    except ValueError:
        raise UsageError(
            f"--mask {' '.join(given)}: expected top left bottom right, "
            "such as 0 0 1 0.5, or a file"
        ) from None
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise UsageError(
            f"--mask {' '.join(given)}: expected fractions of the picture, from 0 to 1"
        )

    y = (torch.arange(h) + 0.5) / h
    x = (torch.arange(w) + 0.5) / w
    in_rows = (y >= top) & (y < bottom)
    in_columns = (x >= left) & (x < right)
    return in_rows[:, None] & in_columns


def picture_mask(path: str, h: int, w: int) -> Tensor:
    """Return what is white and opaque in an image file, bool (h, w).

    Raises UsageError for a file that is no image with 8 bits.
    """
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
    small = flat.resize((w, h), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)) > 127


# ----------------------------------------------------------------------------- SAEs and features


def load_targets(cfg: Config, device: torch.device) -> list[Target]:
    """Return one target for each SAE of --sae, or for the newest SAE; `features` is still empty.

    The SAEs may belong to one module if they edit different tokens of it, image and text.

    Raises UsageError if two SAEs have one hook point.
    """
    targets = []
    for path in cfg.sae or [str(newest_sae())]:
        sae = Sae.load_from_disk(path, device)
        data = sae.cfg.get("data") or []
        activations = None
        if data and all(Path(name).exists() for name in data):
            activations = activations_of(sae, path, transfer=cfg.transfer)
        targets.append(Target(path, sae, trained_on(sae), features=[], activations=activations))

    # what is edited: the output and output - input of a module are edited in one place
    edited = set()
    for target in targets:
        point = target.hook_point
        rows = cfg.rows or point.rows
        edited.add((point.hook_name, point.side == "input", point.stream, rows))
    if len(edited) < len(targets):
        raise UsageError("--sae names two SAEs of one hook point; expected one each")
    return targets


class ScoredImages(NamedTuple):
    """Images of an SAE's training data, on which features are found."""

    scores: Tensor
    """(P, S, M): each image's score of every latent by step, see analysis/concepts.py."""

    rows: list[dict]
    """The line of prompts.jsonl of each image."""

    def texts(self) -> list[str]:
        """Return the prompt of each image as far as the model saw it."""
        return [seen_text(row) for row in self.rows]

    def chosen(self, indices: Tensor) -> list[dict]:
        """Return the rows with these indices, int (n,)."""
        return [self.rows[i] for i in indices.tolist()]


def choose_features(cfg: Config, targets: list[Target]) -> tuple[Config, list[dict] | None]:
    """Give each target its features.

    Returns the options, with those filled in that the user left to the script, and the prompts to
    show the features on, as rows of prompts.jsonl: some that have them, then some that do not. With
    --features the prompts are None.
    """
    if cfg.features:
        name_features(cfg, targets)
        return cfg, None

    exchange = exchanges_concepts(cfg)
    shown = None
    for target in targets:
        images = score_images(cfg, target)
        if exchange and shown is None:  # the first target decides
            cfg = with_exchange(cfg, images)
        if cfg.concept is not None:
            strong, weak = choose_of_concept(cfg, target, images)
        else:
            strong, weak = choose_varying(cfg, target, images)
        if shown is None:
            num_strong = math.ceil(cfg.num_prompts / 2)
            shown = strong[:num_strong] + weak[: cfg.num_prompts - num_strong]
    return cfg, shown


def name_features(cfg: Config, targets: list[Target]) -> None:
    """Give each target the features of --features, and say which SAE has none."""
    parsed = parse_features(cfg.features, [target.sae for target in targets])
    for target, features in zip(targets, parsed):
        target.features = features
        if not features:
            print(f"note: {target.path} has no feature in --features, so it changes nothing")


def rows_of(target: Target) -> list[dict]:
    """Return the lines of prompts.jsonl of all images that the SAE was trained on.

    Raises UsageError if the training data or their prompts are not there.
    """
    if target.activations is None:
        for path in target.sae.cfg.get("data") or []:
            refuse_unfinished(path)
        data = ", ".join(target.sae.cfg.get("data") or ["its activations"])
        raise UsageError(
            f"{target.path} was trained on {data}, which is not there: "
            "name --features and --dataset_name"
        )
    return target.activations.prompt_lines()


def score_images(cfg: Config, target: Target) -> ScoredImages:
    """Return up to --num_pictures images of the SAE's training data, with their scores."""
    rows = rows_of(target)
    scores, numbers = image_scores(target.sae, target.activations, pictures=cfg.num_pictures)
    return ScoredImages(scores, [rows[number] for number in numbers])


def with_exchange(cfg: Config, images: ScoredImages) -> Config:
    """Return the options with the exchange of two concepts filled in, and print what it is.

    If the prompts have no two words for it, the feature that varies most is changed, mildly.
    """
    num_features = cfg.num_features or EXCHANGED_FEATURES
    words = clearest_exchange(images.scores, images.texts(), EXCHANGED_FEATURES)
    if words is None:
        print(
            "no two words of the prompts can be exchanged: the feature that varies most is changed"
        )
        return replace(cfg, multiply=MILD_MULTIPLY)

    concept, other = words
    print(
        f"{concept!r} is exchanged for {other!r}: the features separate these two words "
        "best. The same, with your other options:\n"
        f"    python steer.py --concept {shlex.quote(concept)} --toward {shlex.quote(other)} "
        f"--num_features {num_features}"
    )
    return replace(cfg, concept=concept, toward=other, num_features=num_features)


def choose_of_concept(
    cfg: Config, target: Target, images: ScoredImages
) -> tuple[list[dict], list[dict]]:
    """Give the target the features of --concept. Returns the rows with the word, and without it."""
    texts = images.texts()
    has_word = with_word(texts, cfg.concept)
    if cfg.toward is not None:
        has_other = with_word(texts, cfg.toward) & ~has_word
        target.direction = toward(target.sae, images.scores, has_other, has_word)

    count = cfg.num_features or 1
    features, values = find_features(images.scores, has_word, cfg.score, count)
    target.features = features.tolist()
    target.scores = values.tolist()
    check_chosen_features(target, count, f"more active with {cfg.concept!r} than without it")
    with_it = has_word.nonzero()[:, 0]
    without = (~has_word).nonzero()[:, 0]
    return images.chosen(with_it), images.chosen(without)


def choose_varying(
    cfg: Config, target: Target, images: ScoredImages
) -> tuple[list[dict], list[dict]]:
    """Give the target the features that vary most between images.

    Returns the half of the rows in which they are strong, the strongest first, and the other half,
    the weakest first.
    """
    scores = images.scores.mean(1)  # (P, M), over the steps
    count = cfg.num_features or 1
    values, features = scores.std(0).topk(min(count, target.sae.num_latents))
    varies = values > 0
    features = features[varies]
    target.features = features.tolist()
    target.scores = values[varies].tolist()
    check_chosen_features(target, count, "active on some images more than on others")

    order = scores[:, features].sum(1).argsort(descending=True)
    half = len(order) // 2
    return images.chosen(order[:half]), images.chosen(order.flip(0)[:half])


def check_chosen_features(target: Target, count: int, what: str) -> None:
    """Print one line if fewer than `count` features are `what`. Raises UsageError if none is."""
    num_features = len(target.features)
    if num_features == 0:
        raise UsageError(f"no feature of {target.path} is {what}: name others with --features")
    if num_features < count:
        print(
            f"note: only {num_features} features of {target.path} are {what}, not {count}; "
            "these are changed"
        )


# ------------------------------------------------------------------------------------- strengths


class Strength(NamedTuple):
    """What one row of the picture does to the features."""

    kind: str
    """multiply, add or toward"""

    value: float | str

    def change(self, target: Target) -> Change:
        """Return what is added to the target's activations."""
        stream = target.hook_point.stream
        if self.kind == "toward":
            return redirect(target.sae, target.features, target.direction, stream)
        return steer(target.sae, target.features, stream=stream, **{self.kind: self.value})

    @property
    def row_name(self) -> str:
        """The name of the row in the picture, such as "× 4"."""
        return ROW_NAMES[self.kind].format(self.value)

    @property
    def folder_name(self) -> str:
        """Its part of the folder's name, such as "x4"."""
        return FOLDER_NAMES[self.kind].format(self.value)


UNTOUCHED = Strength("multiply", 1.0)


def strengths_of(cfg: Config) -> list[Strength]:
    """Return one strength per edited row of the picture."""
    if cfg.toward is not None:
        return [Strength("toward", cfg.toward)]
    if cfg.add:
        return [Strength("add", value) for value in cfg.add]
    return [Strength("multiply", value) for value in cfg.multiply or MULTIPLY]


def folder_name(cfg: Config, targets: list[Target]) -> str:
    """Return what is changed as the name of a folder, such as "12+98_x0_x4" or "star_to_ring".

    A name of 100 characters or more is cut, and gets a digest of the whole.
    """
    what = cfg.concept
    if what is None:
        what = "+".join(str(feature) for target in targets for feature in target.features)
    label = "_".join([what, *(strength.folder_name for strength in strengths_of(cfg))])
    if cfg.steps is not None:
        label += f"_steps{cfg.steps}"

    if len(label) >= LONGEST_NAME:
        digest = hashlib.sha256(label.encode()).hexdigest()[:8]
        label = f"{label[:80]}_{digest}"
    return re.sub(NOT_IN_NAMES, "-", label)


# ----------------------------------------------------------------------------- prompts and model


def choose_prompts(cfg: Config, targets: list[Target], shown: list[dict] | None) -> list[dict]:
    """Return what is generated: rows with a prompt and a seed.

    They come from --dataset_name, or from a folder of --inputs; else they are `shown`, of
    `choose_features`; else rows of the training data that are spread over it. Their "inputs" are
    sources of images, see `load_rows`, or names of copies beside the training data.
    """
    if takes_prompts_of_activations(cfg):
        rows = (shown or spread(rows_of(targets[0]), cfg.num_prompts))[: cfg.num_prompts]
        if cfg.negative_prompt is not None:
            rows = [{**row, "negative_prompt": cfg.negative_prompt} for row in rows]
        return rows

    rows = load_rows(
        cfg.inputs,
        cfg.dataset_name,
        column=cfg.column,
        negative_prompt=cfg.negative_prompt,
        max_num_examples=cfg.num_prompts,
    )
    negative = negative_prompt_of(cfg, targets[0])
    if negative is not None and "negative_prompt" not in rows[0]:
        rows = [{**row, "negative_prompt": negative} for row in rows]
    return with_seeds(rows, cfg.seed)


def spread(rows: list[dict], count: int) -> list[dict]:
    """Return up to `count` rows in their order, each drawn with a fixed seed from another part.

    The parts are equal pieces of the rows: the first rows of a data set are often all of one kind,
    and every n-th row may be, too.
    """
    count = min(count, len(rows))
    rng = np.random.default_rng(0)
    chosen = []
    for part in range(count):
        first = part * len(rows) // count
        end = (part + 1) * len(rows) // count
        chosen.append(rows[rng.integers(first, end)])
    return chosen


def negative_prompt_of(cfg: Config, target: Target) -> str | None:
    """Return the negative prompt of the option, or else that of the activations.

    Some pipelines guide only if there is one. Raises UsageError if the activations have several.
    """
    if cfg.negative_prompt is not None or target.activations is None:
        return cfg.negative_prompt

    prompts = {row.get("negative_prompt") for row in target.activations.prompt_lines()}
    if len(prompts) > 1:
        path = target.activations.paths[0]
        raise UsageError(
            f"{path} was collected with {len(prompts)} negative prompts; "
            "choose one with --negative_prompt"
        )
    return prompts.pop()


def choose_images(
    cfg: Config,
    rows: list[dict],
    targets: list[Target],
    model: HookedDiffusionModel,
    inputs: InputImages | None,
    options: dict,
) -> list[dict[str, Image.Image]] | None:
    """Return the images that the pipeline takes, {argument: image} for each row; None if there are
    none.

    They are `inputs`, those of new prompts. With the prompts of the activations they are their own,
    and an image of --inputs takes the place of these. options: the pipeline's other arguments.
    Raises UsageError for what can't be used, and for an image that was changed.
    """
    if not takes_prompts_of_activations(cfg):
        if inputs is None:
            return None
        model.check_image_arguments(inputs.sizes)
        sizes = (options.get("height"), options.get("width"))
        inputs.check_sizes(is_resized=None not in sizes)
        return inputs.of(rows)

    folders = []
    for target in targets:
        if target.activations is not None:
            folders += [Path(path).parent for path in target.activations.paths]
    images = read_inputs(folders, rows)
    files = parse_inputs(cfg.inputs)
    if not files:
        return images
    model.check_image_arguments(files)
    given = {name: open_image(path, f"--inputs {name}") for name, path in files.items()}
    return [{**of_row, **given} for of_row in images or [{}] * len(rows)]


def check_prompts(rows: list[dict], meta: dict, model: HookedDiffusionModel) -> None:
    """Raise UsageError if the activations were made from real images without captions, so that
    there is nothing to generate."""
    empty = any(row["prompt"] in (None, "") for row in rows)
    if empty and meta.get("images") is not None and model.accepts(prompt=""):
        raise UsageError(
            "the activations are of real images without captions (--images): "
            "name prompts with --dataset_name"
        )


def check_models(
    cfg: Config, model: HookedDiffusionModel, targets: list[Target]
) -> list[list[str]]:
    """Return, for each SAE, in what the model differs from the one that it was trained on.

    That is a list of texts, which is [] for an SAE that belongs to the model. Raises UsageError for
    an SAE that does not, unless --transfer is given.
    """
    transfers = []
    for target in targets:
        transfers.append(
            check_belongs(target.path, target.sae.cfg, model=model, transfer=cfg.transfer)
        )
    return transfers


def choose_arguments(
    cfg: Config, meta: dict, model: HookedDiffusionModel, collected: dict, is_other_model: bool
) -> dict:
    """Return the pipeline's arguments: those of the options, else of the activations.

    meta: the description of the activations. collected: the arguments that made these. Another
    model may need another size or number of steps, so it has its own defaults instead, and one
    line says so. A copy of the model is not another model. Raises UsageError for an argument that
    is given twice.
    """
    options = dict(collected)
    if meta.get("images") is not None:  # steps and guidance were those of adding noise
        options.pop("num_inference_steps", None)
        options.pop("guidance_scale", None)
    if is_other_model and options:
        settings = ", ".join(f"{name} {value}" for name, value in options.items())
        print(
            f"note: {cfg.model_name} is another model, so its own defaults are used, "
            f"not the settings of the activations ({settings})"
        )
        options = {}

    extra = parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    for name in ("num_inference_steps", "guidance_scale"):
        value = getattr(cfg, name)
        if value is None:
            continue
        if name in extra:
            raise UsageError(
                f"{name} is given twice: in --pipeline_kwargs and by an option of its own"
            )
        options[name] = value
    options.update(extra)
    return model.arguments(1, "pt", options)


def place_masks(
    cfg: Config, model: HookedDiffusionModel, generation: Generation, targets: list[Target]
) -> range | None:
    """Set the `mask` of each target to the tokens of --mask on its grid; return the steps of
    --steps, or None for all steps.

    Both need the first step of a sampling, so one function does both.
    Raises UsageError for a mask that is not on the grid, and for steps that the sampling does not
    have.
    """
    first = next(generation.batches(1))
    for target in targets:
        point = target.hook_point
        cache = model.first_step(
            point.hook_name,
            first.prompts,
            stream=point.stream,
            save_input=point.side == "input",
            save_output=point.side != "input",
            keep_padding=True,  # the number of steps and a grid do not depend on it
            **first.seeded_arguments(),
        )
        grid = ()
        if point.stream == "image":
            grid = next(iter(cache["grid"].values()))
        target.mask = token_mask(cfg.mask, grid)
    return parse_steps(cfg.steps, cache["num_steps"])


def measure_typical(targets: list[Target]) -> None:
    """Give each target the norms and distances of its training data, or say why it has none."""
    for target in targets:
        try:
            target.typical = Typical(target.sae.cfg["data"])
        except (ValueError, OSError) as error:
            print(f"note: norm and distance are not measured: {error}")


# ------------------------------------------------------------------------------------------ runs


class Run(NamedTuple):
    """One row of the picture."""

    strength: Strength

    name: str
    """What stands left of the row, such as "untouched" or "× 4"."""

    pictures: Tensor
    """(P, 3, H, W) in [0, 1]"""

    moved: Tensor
    """(P,): root mean square difference to what was made without an edit, of all pixels, of all
    frames or of all samples of audio."""

    numbers: list[list[float] | None]
    """(norm, distance) of each image; None if they were not measured."""

    explanation: str
    """What the pictures show of a video or of audio; "" for images."""

    files: list[Path]
    """The videos or audio, one per prompt; [] for images."""

    def captions(self) -> list[str]:
        """Return what stands below each image."""
        captions = []
        for numbers in self.numbers:
            caption = ""
            if numbers is not None:
                norm, distance = numbers
                caption = f"norm {norm:.2f}   distance {distance:.2f}"
            captions.append(caption)
        return captions

    def record(self) -> dict:
        """Return what steer.json says about the row."""
        images = []
        for moved, numbers in zip(self.moved.tolist(), self.numbers):
            norm, distance = numbers or (None, None)
            images.append({"moved": moved, "norm": norm, "distance": distance})
        for image, file in zip(images, self.files):
            image["file"] = f"{file.parent.name}/{file.name}"
        return {"name": self.name, self.strength.kind: self.strength.value, "pictures": images}


def check_finite(strength: Strength, made: Media, all_numbers: list[list[float] | None]) -> None:
    """Raise UsageError if what was made, or a number below it, is NaN or infinite.

    all_numbers: as `Run.numbers`.
    """
    known = [numbers for numbers in all_numbers if numbers is not None]
    if made.values.isfinite().all() and np.isfinite(known).all():
        return
    if strength == UNTOUCHED:
        raise UsageError("the model makes images that are not finite, without any edit")
    kind, value = strength
    value = value if kind == "toward" else f"{value:g}"
    raise UsageError(
        f"--{kind} {value} makes activations or images that are not finite; edit less: "
        "a strength nearer to 0, fewer --steps, or --renormalize"
    )


def generate_runs(
    cfg: Config,
    model: HookedDiffusionModel,
    generation: Generation,
    targets: list[Target],
    steps: range | None,
    folder: Path,
) -> list[Run]:
    """Return the untouched run, then one for each strength. Videos and audio are saved in folder.

    Raises UsageError if an edit is so strong that the images are not finite.
    """
    strengths = [UNTOUCHED, *strengths_of(cfg)]
    num_images = len(generation.prompts)
    untouched = None
    runs = []
    with tqdm(total=num_images * len(strengths), unit="picture", desc="steering") as bar:
        for strength in strengths:
            changes = [strength.change(target) for target in targets]
            edits = Edits(targets, changes, cfg.rows, steps, cfg.renormalize)
            made = generate_media(model, generation, cfg.batch_size, edits, bar)
            numbers = edits.numbers(num_images)
            check_finite(strength, made, numbers)

            if untouched is None:
                untouched = made.values.float()
            difference = made.values.float() - untouched
            moved = difference.square().flatten(1).mean(1).sqrt()
            name = file_name = "untouched"
            if strength is not UNTOUCHED:
                name = strength.row_name
                file_name = re.sub(NOT_IN_NAMES, "-", strength.folder_name)
            files = save_media(made, folder, file_name)
            run = Run(strength, name, made.pictures(), moved, numbers, made.explanation(), files)
            runs.append(run)
    return runs


def print_table(runs: list[Run]) -> None:
    """Print one line per run: means over its images."""
    print(
        f"{'':12} {'norm':>6} {'distance':>9} {'pictures':>9}   "
        "(1: typical of training; the last: RMS change, of 1)"
    )
    for run in runs:
        norm = distance = "-"
        known = [numbers for numbers in run.numbers if numbers is not None]
        if known:
            norm, distance = [f"{value:.2f}" for value in np.mean(known, 0)]
        print(f"{run.name:12} {norm:>6} {distance:>9} {decimals(run.moved.mean().item(), 3):>9}")


def settings_of(cfg: Config, targets: list[Target], rows: list[dict]) -> dict:
    """Return the options that decide the images. If others made a folder, it is not used again.

    Of a model file and of the images of --inputs there are digests, since they may change. rows:
    with the names of these images' copies, if they are new prompts.
    """
    settings = {}
    for name, value in vars(cfg).items():
        if name not in ("out_dir", "device", "batch_size"):
            settings[name] = value
    settings["sae"] = [target.path for target in targets]
    for name in ("inputs", "lora", "trust_remote_code"):
        if not settings[name]:
            del settings[name]  # earlier versions had no such option
    if cfg.model_name and is_model_file(cfg.model_name):
        path = Path(find_model(split_function(cfg.model_name)[0]))
        settings["model_files"] = {path.name: digest_of(path)}
    if cfg.inputs and takes_prompts_of_activations(cfg):
        images = {}
        for name, path in parse_inputs(cfg.inputs).items():
            images[name] = name_of_copy(open_image(path, f"--inputs {name}"))
        settings["input_images"] = images
    elif cfg.inputs:
        settings["input_images"] = input_names(rows)
    return settings


def report_of(
    settings: dict,
    generation: Generation,
    runs: list[Run],
    targets: list[Target],
    transfers: list[list[str]],
) -> dict:
    """Return what steer.json says, without the seconds. transfers: what `check_models` returned."""
    saes = []
    for target, transfer in zip(targets, transfers):
        record = target.hook_point.as_dict()
        record["path"] = target.path
        record["features"] = target.features
        record["scores"] = target.scores
        record["transfer"] = transfer
        saes.append(record)
    arguments = replace(generation, inputs=None).arguments()
    if generation.inputs is not None:
        names = []  # for each prompt, as in prompts.jsonl
        for images in generation.inputs:
            names.append({name: name_of_copy(image) for name, image in images.items()})
        arguments["inputs"] = names
    return {
        "options": settings,
        "arguments": arguments,
        "seeds": generation.seeds,
        "prompts": generation.prompts,
        "runs": [run.record() for run in runs],
        "saes": saes,
    }


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
    cfg, shown = choose_features(cfg, targets)

    # 2. A folder that holds nothing else
    rows = choose_prompts(cfg, targets, shown)
    inputs = None if takes_prompts_of_activations(cfg) else InputImages.of_rows(rows)
    settings = settings_of(cfg, targets, rows)
    folder = Path(cfg.out_dir) / folder_name(cfg, targets)
    claim_folder(folder, "steer.json", settings)

    # 3. The model, and which tokens and steps are edited
    description = {}
    if targets[0].activations is not None:
        description = targets[0].activations.sources[0].meta
    meta = origin(targets[0].sae.cfg, description)
    model, collected = model_of(
        meta,
        cfg.model_name,
        device,
        resolve_dtype("auto", device),
        cfg.lora,
        cfg.trust_remote_code,
    )
    check_prompts(rows, meta, model)
    transfers = check_models(cfg, model, targets)
    is_other_model = cfg.model_name is not None and any(transfers)
    options = choose_arguments(cfg, meta, model, collected, is_other_model)
    images = choose_images(cfg, rows, targets, model, inputs, options)
    generation = Generation.from_rows(rows, options, images)
    steps = place_masks(cfg, model, generation, targets)

    # 4. What is typical, then the untouched run and one for each strength
    measure_typical(targets)
    runs = generate_runs(cfg, model, generation, targets, steps, folder)

    # 5. The table, the picture and the numbers
    print_table(runs)
    for target in targets:
        print(f"{target.hook_point.file_name}: features {' '.join(map(str, target.features))}")
    picture = folder / "steer.png"
    numbers = folder / "steer.json"
    grid = [ImageRow(run.name, run.pictures, run.captions()) for run in runs]
    plot_images(picture, grid, generation.prompts, runs[0].explanation)
    report = report_of(settings, generation, runs, targets, transfers)
    report["seconds"] = round(time.perf_counter() - start, 1)
    write_json(numbers, report)
    files = [file for run in runs for file in run.files]
    print(f"pictures in {picture}, numbers in {numbers}{describe_files(files)}")
    return [picture, numbers, *files]


if __name__ == "__main__":
    run_script(main, Config)
