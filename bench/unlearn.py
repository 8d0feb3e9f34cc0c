"""How well concepts of the toy are unlearned, by UnlearnCanvas's protocol and the toy's classifier.

    python -m bench unlearn --sae saes/a saes/b --report        # every concept, every method
    python -m bench unlearn --sae saes/a --unlearn star

    UA    unlearning accuracy: of the prompts with the concept, the fraction of images in which the
          classifier does not see it
    IRA   in-domain retain accuracy: of the other prompts, the fraction of images that show the
          right value of the same domain
    CRA   cross-domain retain accuracy: of all prompts, the fraction of images that show the right
          value of the other domain

A concept is one of 8 objects or 6 styles. Objects and styles are the two domains. The prompts come
from toy/prompts.csv, without those of the SAE's training activations. They are split into two
halves, each with `per_cell` prompts of each object and style. The first half chooses the settings:
each is tried on the prompts with the concept and on 12 prompts without it, and the one with the
highest mean of the three numbers is chosen (of equal ones, the one with the highest sum over the
domain's concepts). The numbers that are reported come from the second half, which chose nothing and
has other seeds. These methods are compared:

    none             the model as it is
    features         ours: the concept's features (contrast) are edited in the conditional rows by
                     x + delta. Their activations are multiplied by a number, or what they add is
                     turned to the nearest, 2nd or 3rd nearest other value (feature_edits.redirect)
    saeuron          arXiv 2501.18052: each step has features of its own, by SAeUron's score. An
                     activation above the mean over the domain's values is multiplied by a negative
                     number times the feature's mean on the concept. The unconditional rows are
                     edited too
    negative_prompt  the word is the negative prompt, which the unconditional rows get
    mean_direction   at the same module: a direction leads from the mean vector without the concept
                     to that with it. How far x lies beyond the mean without the concept, along
                     this direction, is subtracted s times

Writes <out_dir>/<concept>/unlearn.json; the same command resumes where it stopped. SAeUron's code
adds x_hat - x for the error where its text keeps x - x_hat; here the error is kept. Sources:
UnlearnCanvas, Zhang et al. 2024 (arXiv 2402.11846); SAeUron's CRA, like here, is over all prompts.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.concepts import auroc, find_features, image_scores, saeuron, toward
from analysis.feature_edits import Change, adding_edits, delta, redirect, steer
from cli import check_positive, parse_object, product_dtype, resolve_device
from diffusion.generate import generate_media
from diffusion.trace import Sampling
from errors import UsageError
from hook import Edit, Generation, HookedDiffusionModel, find_model, model_of
from sae import Sae, newest_sae
from store.activation_file import read_description
from store.dataset import Activations
from store.disk import claim_folder, read_json, write_json
from store.hook_point import HookPoint, trained_on
from store.identity import activations_of, origin
from store.prompts import load_prompts
from toy.concepts import CONCEPTS, Classifier, to_model

BATCH = 48  # prompts generated together; it decides the images' last bits
NUM_OTHERS = 12  # prompts without the concept on which a setting is tried

DOMAINS = {"object": "style", "style": "object"}
"""{domain: the other one, which CRA measures}."""

Setting = dict[str, Any]
"""The numbers and words that a method is tried with, such as {"count": 2, "multiply": -4}."""


def pairs(first: str, second: str, values: Iterable[tuple]) -> list[Setting]:
    """Return settings with two names: for "s", "n" and [(1, 2)] it gives [{"s": 1, "n": 2}]."""
    return [{first: a, second: b} for a, b in values]


MULTIPLIED = pairs("count", "multiply", [(2, -4), (4, -2), (4, -4), (8, -1), (8, -2), (16, -2)])
REDIRECTED = pairs("count", "toward", [(64, 0), (16, 0), (64, 1), (16, 1), (64, 2)])
SAEURON = pairs("count", "multiply", itertools.product((1, 2), (-1, -5, -20)))
MEAN_DIRECTION = pairs("s", "rows", itertools.product((1, 2, 4), ("cond", "both")))
TEXTS = ("{}", "a picture of a {}")
NEGATIVE_PROMPT = pairs("text", "guidance_scale", itertools.product(TEXTS, (5.0, 7.5, 10.0)))

GRIDS = {
    "features": {"object": MULTIPLIED, "style": [*REDIRECTED, {"count": 4, "multiply": -1}]},
    "saeuron": {"object": SAEURON, "style": SAEURON},
    "negative_prompt": {"object": NEGATIVE_PROMPT, "style": NEGATIVE_PROMPT},
    "mean_direction": {"object": MEAN_DIRECTION, "style": MEAN_DIRECTION},
}
"""{method: {domain: the settings to try}}. Every method gets six."""


@dataclass
class Config:
    # model
    sae: list[str] = field(default_factory=list)
    """Unlearn with the SAEs in these folders, each at a hook point of its own. If not given, it is
    the newest one in saes/."""

    model_name: str | None = None
    """Load this diffusers folder, such as a copy of the model in another place. If not given, it is
    the model that made the activations."""

    # what to unlearn
    unlearn: str = "all"
    """Unlearn this object or style of the toy, or all of them one after another."""

    report: bool = False
    """Measure the other methods as well: SAeUron, a negative prompt, the mean direction."""

    # data
    per_cell: int = 1
    """Use this many prompts of each object and style to choose, and as many to report. Raise it for
    numbers that are less noisy."""

    # generation
    num_inference_steps: int = 10
    """Sample in this many steps."""

    guidance_scale: float | None = None
    """Use this scale of classifier-free guidance. If not given, it is that of the activations."""

    pipeline_kwargs: str = "{}"
    """Pass these arguments to the pipeline as well: a JSON object, such as '{"eta": 1.0}'."""

    # output
    out_dir: str = "unlearn"
    """Write into this folder, in which each concept gets a folder of its own."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


def main(cfg: Config) -> list[Path]:
    """Print the table; return the file that holds it.

    Raises UsageError for options, SAEs and a model that can't be used, and if `out_dir` holds a
    report that was made with other options.
    """
    check_positive(cfg, "per_cell", "num_inference_steps")

    # 1. What to unlearn, with which SAEs and which model
    device = resolve_device(cfg.device)
    sae_paths = cfg.sae or [str(newest_sae())]
    saes = load_saes(sae_paths, device)
    values = values_of(cfg.unlearn)
    meta = origin(saes[0].cfg, read_description(saes[0].cfg["data"][0]))
    model_name = cfg.model_name or meta["model"]
    model_folder = find_judged_model(model_name)
    # bfloat16 also on a CPU that multiplies it by itself: it is twice as fast there
    dtype = product_dtype("auto", device)
    model, arguments = load_model(cfg, meta, device, dtype)

    # 2. A folder that holds nothing else
    options = {
        "unlearn": cfg.unlearn,
        "per_cell": cfg.per_cell,
        "sae": {path: digest(sae) for path, sae in zip(sae_paths, saes)},
        "model": model_name,
        "dtype": str(dtype),
        **arguments,
    }
    path = Path(cfg.out_dir) / cfg.unlearn / "unlearn.json"
    report = open_report(path, options)

    # 3. Where each domain is edited, the prompts, and who judges
    domains = domains_of(saes, values)
    prompts = load_prompts(str(model_folder / "prompts.csv"))
    halves = split_prompts(prompts, training_prompts(saes), cfg.per_cell)
    classifier = Classifier.load(model_folder).to(device)
    describe_runs(report, domains, halves)

    # 4. The table, and its means over the concepts
    runs = Runs(model, arguments, classifier, device, report, path)
    methods = list(GRIDS) if cfg.report else ["features"]
    report["table"] = unlearn(runs, list_concepts(domains, values), halves, methods)
    add_totals(report, values)
    runs.save()
    print(
        f"\n{report['pictures']} pictures in {arguments['num_inference_steps']} steps, "
        f"{report['seconds']} s; on {len(halves.report)} prompts that chose nothing; "
        f"settings, prompts and seeds in {path}"
    )
    return [path]


# ---- what the options name


def load_saes(paths: list[str], device: torch.device) -> list[Sae]:
    """Return the SAEs of these folders. Raises UsageError if two of them share a hook point."""
    saes = [Sae.load_from_disk(path, device) for path in paths]
    hook_names = {trained_on(sae).hook_name for sae in saes}
    if len(hook_names) < len(saes):
        raise UsageError("--sae names two SAEs of one hook point; expected one each")
    return saes


def values_of(name: str) -> dict[str, list[str]]:
    """Return {domain: concepts} of one concept's name, or of all.

    For "star" it gives {"object": ["star"]}. Raises UsageError for a name that the toy does not
    know.
    """
    values = {}
    for domain in DOMAINS:
        named = [value for value in CONCEPTS[domain] if name in (value, "all")]
        if named:
            values[domain] = named
    if not values:
        known = ", ".join([*CONCEPTS["object"], *CONCEPTS["style"]])
        raise UsageError(
            f"--unlearn {name}: the toy has no such object or style; expected all, {known}"
        )
    return values


def find_judged_model(model_name: str) -> Path:
    """Return the folder of a model. Raises UsageError if it holds no classifier of its images."""
    folder = Path(find_model(model_name))
    if not (folder / "classifier.safetensors").exists():
        raise UsageError(
            f"{folder} has no classifier that could judge its pictures; "
            "this benchmark is for the toy"
        )
    return folder


def load_model(
    cfg: Config, meta: dict, device: torch.device, dtype: torch.dtype
) -> tuple[HookedDiffusionModel, dict]:
    """Return the model that generates, and the pipeline's arguments.

    The arguments are those that the activations were made with, also in another folder of the
    model. The options of this benchmark take their place where they are given. meta: the
    description of the activations.
    """
    model, options = model_of(meta, cfg.model_name, device, dtype)
    for module in (*model.denoisers.values(), model.pipe.vae):
        module.to(memory_format=torch.channels_last)
    options["num_inference_steps"] = cfg.num_inference_steps
    if cfg.guidance_scale is not None:
        options["guidance_scale"] = cfg.guidance_scale
    options |= parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    return model, model.arguments(1, "pt", options)


def digest(sae: Sae) -> str:
    """Return 16 hex digits of a checksum of an SAE's tensors."""
    checksum = hashlib.sha256()
    for _, value in sorted(sae.state_dict().items()):
        checksum.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return checksum.hexdigest()[:16]


# ---- where concepts are unlearned


@dataclass
class Domain:
    """Where a domain's concepts are unlearned, and what the activation file's images show there.

    P images, S steps, M latents, vectors of width d.
    """

    name: str
    """object or style."""

    sae: Sae

    hook_point: HookPoint
    """Where the SAE was trained, and where its features are edited."""

    scores: Tensor
    """(P, S, M): each latent's mean activation over an image's tokens."""

    means: Tensor
    """(P, S, d): the mean vector over an image's tokens."""

    times: Tensor
    """(S,): the timesteps of the steps."""

    labels: list[str]
    """The value of the domain that each of the P images shows."""

    def shows(self, value: str) -> Tensor:
        """Return which images show the value: bool (P,)."""
        return torch.tensor([label == value for label in self.labels])

    def values(self) -> list[str]:
        """Return all values that some image shows, sorted."""
        return sorted(set(self.labels))

    def nearest(self, value: str) -> list[str]:
        """Return the other values, the one with the most similar mean scores first."""
        mean_scores = {}
        for each in self.values():
            mean_scores[each] = self.scores[self.shows(each)].mean((0, 1))

        def distance(other: str) -> tuple[float, str]:
            difference = mean_scores[other] - mean_scores[value]
            return float(difference.norm()), other

        return sorted(mean_scores.keys() - {value}, key=distance)

    def step(self, timestep: float) -> int:
        """Return the index of the step whose timestep is nearest."""
        return int((self.times - timestep).abs().argmin())

    def clarity(self) -> float:
        """Return how well single features tell the values apart: the mean of their best AUROCs."""
        scores = self.scores.mean(1)  # (P, M)
        best = [auroc(scores, self.shows(value)).max() for value in self.values()]
        return float(torch.stack(best).mean())


class Concept(NamedTuple):
    """What is unlearned: the value "star" of the domain "object"."""

    domain: Domain
    value: str


def domains_of(saes: list[Sae], values: dict[str, Iterable[str]]) -> dict[str, Domain]:
    """Return {name: Domain}, each at the SAE whose features tell its values apart most clearly.

    saes: of conditional rows of toy activations. values: {"object": names, "style": names}, or one
    of the two. Raises UsageError as `measure_domains` does.
    """
    domains = {}
    for sae in saes:
        for domain in measure_domains(sae, values):
            best = domains.get(domain.name)
            if best is None or domain.clarity() > best.clarity():
                domains[domain.name] = domain
    return domains


def measure_domains(sae: Sae, values: dict[str, Iterable[str]]) -> list[Domain]:
    """Return the domains at the SAE's hook point, measured on its training activations.

    Raises UsageError for activations of other rows or of other prompts than the toy's, and if one
    of the values is shown by all or by none of the images.
    """
    activations = activations_of(sae, "the SAE")
    hook_point = trained_on(sae)
    path = activations.paths[0]
    rows = activations.prompt_lines()
    of_toy = all(name in row for row in rows for name in values)
    if hook_point.rows != "cond" or not activations.timesteps or not of_toy:
        raise UsageError(
            f"{path}: unlearning needs --rows cond of generated pictures, "
            "with prompts of toy/prompts.csv"
        )

    scores, images = image_scores(sae, activations)
    means = []
    for image in images:
        x = activations.read_image(image).float().numpy()  # (S, T, d)
        means.append(x.mean(1))
    means = torch.from_numpy(np.stack(means))
    times = torch.tensor(activations.timesteps)

    domains = []
    for name in values:
        labels = [rows[image][name] for image in images]
        check_shown(path, labels, values[name])
        domains.append(Domain(name, sae, hook_point, scores, means, times, labels))
    return domains


def check_shown(path: Path, labels: list[str], values: Iterable[str]) -> None:
    """Raise UsageError if one of the values is shown by all or by none of the images.

    labels: what each image shows. path: of the activations, for the message.
    """
    for value in values:
        count = labels.count(value)
        if count in (0, len(labels)):
            how_many = "none" if count == 0 else "all"
            raise UsageError(f"{path}: {value} is shown by {how_many} of its pictures")


# ---- the prompts


class Halves(NamedTuple):
    """Two lists of prompts with "prompt", "object", "style" and "seed"."""

    choice: list[dict]
    """Those that choose the settings."""

    report: list[dict]
    """Those whose numbers are reported."""


def training_prompts(saes: list[Sae]) -> set[str]:
    """Return the prompts of all activations that the SAEs were trained on."""
    prompts = set()
    for sae in saes:
        for row in Activations(sae.cfg["data"]).prompt_lines():
            prompts.add(row["prompt"])
    return prompts


def split_prompts(rows: list[dict], used: set[str], per_cell: int, seed: int = 0) -> Halves:
    """Return two halves of the prompts, without those in `used`.

    Each half has `per_cell` prompts of each object and style. The "seed" of a prompt is its index
    in the first half followed by the second. rows: as `load_prompts` returns them. seed: decides
    which prompts are taken. Raises UsageError if too few prompts are left.
    """
    cells = {}  # {(object, style): its unused rows in random order}
    for i in np.random.default_rng(seed).permutation(len(rows)):
        row = rows[i]
        cell = cells.setdefault((row["object"], row["style"]), [])
        if row["prompt"] not in used:
            cell.append(row)

    choice = []
    report = []
    for words, cell in sorted(cells.items()):
        if len(cell) < 2 * per_cell:
            raise UsageError(
                f"--per_cell {per_cell}: only {len(cell)} prompts are left of {' '.join(words)}"
            )
        choice += cell[:per_cell]
        report += cell[-per_cell:]
    seeded = [row | {"seed": number} for number, row in enumerate(choice + report)]
    return Halves(seeded[: len(choice)], seeded[len(choice) :])


def choosing_rows(rows: list[dict], domain_name: str, value: str) -> list[dict]:
    """Return the prompts with a value, then 12 of those without it, chosen with a fixed seed."""
    with_value = [row for row in rows if row[domain_name] == value]
    without = [row for row in rows if row[domain_name] != value]
    chosen = np.random.default_rng(0).permutation(len(without))[:NUM_OTHERS]
    return with_value + [without[i] for i in chosen]


# ---- the methods


class Intervention(NamedTuple):
    """What a method does while images are generated."""

    change: Change | None
    """change(x, timestep) is added to x at the domain's hook point. None changes nothing."""

    rows: str
    """cond or both: the rows of the guidance that are changed."""

    options: dict
    """Arguments of the pipeline, which take the place of others; "text" is the negative prompt."""


def method(name: str, setting: Setting, domain: Domain, value: str) -> Intervention:
    """Return what a method does with a setting to unlearn a value. "none" does nothing."""
    if name == "features":
        return Intervention(change_features(setting, domain, value), "cond", {})
    if name == "saeuron":
        return Intervention(change_as_saeuron(setting, domain, value), "both", {})
    if name == "mean_direction":
        change = subtract_direction(setting["s"], domain, value)
        return Intervention(change, setting["rows"], {})
    if name == "negative_prompt":
        text = setting["text"].format(value)
        options = {"text": text, "guidance_scale": setting["guidance_scale"]}
        return Intervention(None, "cond", options)
    assert name == "none", name
    return Intervention(None, "cond", {})


def change_features(setting: Setting, domain: Domain, value: str) -> Change:
    """Return the change of the value's `count` best features, by their contrast.

    With `multiply` their activations are multiplied. With `toward` what they add is turned to
    another value: 0 is the nearest one.
    """
    sae = domain.sae
    stream = domain.hook_point.stream
    has_value = domain.shows(value)
    features, _ = find_features(domain.scores, has_value, "contrast", setting["count"])
    if "toward" not in setting:
        return steer(sae, features.tolist(), multiply=setting["multiply"], stream=stream)
    other = domain.nearest(value)[setting["toward"]]
    direction = toward(sae, domain.scores, domain.shows(other), has_value)
    return redirect(sae, features.tolist(), direction, stream)


def change_as_saeuron(setting: Setting, domain: Domain, value: str) -> Change:
    """Return the change of SAeUron: each step has its own `count` features with the best score.

    Where a feature's activation is above its mean over the domain's values, it is multiplied by
    `multiply` times the feature's mean on the value.
    """
    sae = domain.sae
    has_value = domain.shows(value)
    best = saeuron(domain.scores, has_value).topk(setting["count"], dim=1)
    features_of_step = best.indices  # (S, count)

    mean_on_value = domain.scores[has_value].mean(0)  # (S, M)
    means = [domain.scores[domain.shows(each)].mean(0) for each in domain.values()]
    mean_over_values = torch.stack(means).mean(0)  # (S, M)

    def change(x: Tensor, timestep: float) -> Tensor:
        step = domain.step(timestep)
        features = features_of_step[step]
        factor = setting["multiply"] * mean_on_value[step, features]
        threshold = mean_over_values[step, features]

        def new_acts(acts: Tensor) -> Tensor:
            return torch.where(acts > threshold.to(acts), acts * factor.to(acts), acts)

        return delta(sae, x, features.to(sae.W_dec.device), new_acts, domain.hook_point.stream)

    return change


def subtract_direction(s: float, domain: Domain, value: str) -> Change:
    """Return the change that subtracts, along the direction to a value, what x has too much of.

    At each step the direction u leads from the mean vector without the value to that with it, and
    the change is -s ((x - mean without) u) u. With s = 1 nothing is left of the difference.
    """
    has_value = domain.shows(value)
    mean_without = domain.means[~has_value].mean(0)  # (S, d)
    difference = domain.means[has_value].mean(0) - mean_without
    direction = torch.nn.functional.normalize(difference, dim=1)

    def change(x: Tensor, timestep: float) -> Tensor:
        step = domain.step(timestep)
        u = direction[step].to(x)
        along = (x - mean_without[step].to(x)) @ u  # (P, T)
        return -s * along[..., None] * u

    return change


# ---- images and their scores


def generate(
    model: HookedDiffusionModel,
    prompts: list[str],
    seeds: list[int],
    arguments: dict,
    domain: Domain | None = None,
    change: Change | None = None,
    rows: str = "cond",
    options: dict | None = None,
) -> Tensor:
    """Return images (P, 3, H, W) in [0, 1] of the prompts.

    arguments: of the pipeline. domain: where x is changed; None if it is not changed. The other
    three are the fields of an `Intervention`.
    """
    options = dict(options or {})
    text = options.pop("text", None)
    negative_prompts = None if text is None else [text] * len(prompts)
    generation = Generation(prompts, seeds, negative_prompts, arguments | options)
    if change is None:
        return generate_media(model, generation, BATCH).pictures()

    def make_edits(sampling: Sampling) -> dict[str, list[Edit]]:
        hook_point = domain.hook_point
        return {hook_point.hook_name: adding_edits(hook_point, change, sampling, rows)}

    return generate_media(model, generation, BATCH, make_edits).pictures()


def judge(seen: list[dict], rows: list[dict], domain_name: str, value: str) -> dict[str, float]:
    """Return {"UA": ..., "IRA": ..., "CRA": ...} of unlearning a value of a domain.

    seen: {"object": ..., "style": ...} of each image, as the classifier sees it. rows: the same of
    its prompt. For the value "star", if a prompt with a star gave a ring and a prompt with a moon
    gave a moon, both with the right style, all three are 1.
    """
    other = DOMAINS[domain_name]
    unlearned = []
    in_domain = []
    cross_domain = []
    for image, row in zip(seen, rows):
        if row[domain_name] == value:
            unlearned.append(image[domain_name] != value)
        else:
            in_domain.append(image[domain_name] == row[domain_name])
        cross_domain.append(image[other] == row[other])
    return {
        "UA": fraction(unlearned),
        "IRA": fraction(in_domain),
        "CRA": fraction(cross_domain),
    }


def fraction(hits: list[bool]) -> float:
    """Return the fraction that is true; 0 for an empty list."""
    return sum(hits) / max(1, len(hits))


def mean(record: dict[str, float]) -> float:
    """Return the mean of UA, IRA and CRA."""
    return (record["UA"] + record["IRA"] + record["CRA"]) / 3


# ---- the table


def list_concepts(domains: dict[str, Domain], values: dict[str, list[str]]) -> list[Concept]:
    """Return the concepts of all domains, in the order of `values` {domain: concepts}."""
    concepts = []
    for name in values:
        for value in values[name]:
            concepts.append(Concept(domains[name], value))
    return concepts


@dataclass
class Runs:
    """Generates images and has them judged. What the report holds already is not done again."""

    model: HookedDiffusionModel

    arguments: dict
    """Of the pipeline."""

    classifier: Classifier

    device: torch.device
    """Of the classifier."""

    report: dict
    """What is written to `path` after every run. Its "done" is {key: what a run gave}, and holds
    the runs of earlier calls too."""

    path: Path

    def save(self) -> None:
        """Write the report."""
        write_json(self.path, self.report)

    def measure(
        self, key: str, rows: list[dict], concept: Concept, name: str, setting: Setting
    ) -> dict[str, float]:
        """Return UA, IRA and CRA of a method and a setting on the prompts `rows`.

        key: what the run is called in the report. If it is there, nothing is generated.
        """
        done = self.report["done"]
        if key not in done:
            start = time.perf_counter()
            intervention = method(name, setting, concept.domain, concept.value)
            prompts = [row["prompt"] for row in rows]
            seeds = [row["seed"] for row in rows]
            images = generate(
                self.model, prompts, seeds, self.arguments, concept.domain, *intervention
            )
            pixels = (images * 255).round()
            seen = self.classifier.predict(to_model(pixels).to(self.device))
            seconds = round(time.perf_counter() - start, 1)
            done[key] = {"seen": seen, "pictures": len(rows), "seconds": seconds}
            self.save()
        return judge(done[key]["seen"], rows, concept.domain.name, concept.value)


def unlearn(
    runs: Runs, concepts: list[Concept], halves: Halves, methods: list[str]
) -> dict[str, dict[str, dict]]:
    """Return the table: {method: {concept: {"chosen": setting, "UA": ..., "IRA": ..., ...}}}.

    The settings are chosen on the first half, and the numbers are those of the second half. The
    method "none" stands first, and has no setting.
    """
    num_runs = len(concepts)
    for name in methods:
        for concept in concepts:
            num_runs += len(GRIDS[name][concept.domain.name]) + 1

    with tqdm(total=num_runs, unit="run", desc="unlearning") as bar:
        means = try_settings(runs, concepts, halves.choice, methods, bar)

        table = {"none": {}}
        for concept in concepts:
            record = runs.measure("none", halves.report, concept, "none", {})
            table["none"][concept.value] = record
            bar.update()
        for name in methods:
            table[name] = {}
            for concept in concepts:
                setting = best_setting(name, concept, concepts, means[name])
                key = f"{name} {concept.value} report {setting}"
                record = runs.measure(key, halves.report, concept, name, setting)
                table[name][concept.value] = {"chosen": setting} | record
                bar.update()
    return table


def try_settings(
    runs: Runs, concepts: list[Concept], choice: list[dict], methods: list[str], bar: tqdm
) -> dict[str, dict[str, list[float]]]:
    """Return {method: {concept: the mean of UA, IRA and CRA with each setting}}."""
    means = {}
    for name in methods:
        means[name] = {}
        for concept in concepts:
            rows = choosing_rows(choice, concept.domain.name, concept.value)
            of_settings = []
            for setting in GRIDS[name][concept.domain.name]:
                key = f"{name} {concept.value} {setting}"
                of_settings.append(mean(runs.measure(key, rows, concept, name, setting)))
                bar.update()
            means[name][concept.value] = of_settings
    return means


def best_setting(
    name: str, concept: Concept, concepts: list[Concept], means: dict[str, list[float]]
) -> Setting:
    """Return the setting of a method with the highest mean on a concept.

    Of equal ones it is that with the highest sum over the concepts of the domain, then the first.
    means: {concept: the mean with each setting}. For the means [0.5, 0.5] of the concept and
    [0.1, 0.3] of another one it is the second setting.
    """
    domain_name = concept.domain.name
    of_concept = means[concept.value]
    of_domain = [means[other.value] for other in concepts if other.domain.name == domain_name]
    sums = [sum(of_setting) for of_setting in zip(*of_domain)]

    best = 0
    for i in range(1, len(sums)):
        if (of_concept[i], sums[i]) > (of_concept[best], sums[best]):
            best = i
    return GRIDS[name][domain_name][best]


def summary(records: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return the mean and standard deviation over records of UA, IRA, CRA and their mean.

    It is {"UA": (mean, std), "IRA": ..., "CRA": ..., "mean": ...}.
    """
    columns = {key: [record[key] for record in records] for key in ("UA", "IRA", "CRA")}
    columns["mean"] = [mean(record) for record in records]
    statistics = {}
    for key, numbers in columns.items():
        statistics[key] = (float(np.mean(numbers)), float(np.std(numbers)))
    return statistics


# ---- the report


def open_report(path: Path, options: dict) -> dict:
    """Claim the report's folder, and return the report with the runs that were done before.

    It is {"options": ..., "done": {key: what a run gave}}. Raises UsageError if the folder holds a
    report of other options.
    """
    options = json.loads(json.dumps(options))  # as they come back from the file
    claim_folder(path.parent, path.name, options)
    runs_before = {}
    if path.exists():
        runs_before = read_json(path).get("done", {})
    return {"options": options, "done": runs_before}


def describe_runs(report: dict, domains: dict[str, Domain], halves: Halves) -> None:
    """Add to the report where each domain is edited, and on which prompts."""
    hook_names = {name: domain.hook_point.hook_name for name, domain in domains.items()}
    report["hook_names"] = hook_names
    report["prompts"] = {
        "choice": [row["prompt"] for row in halves.choice],
        "report": [row["prompt"] for row in halves.report],
    }
    report["seeds"] = "the place of the prompt in the two lists, one after the other, from 0"


def add_totals(report: dict, values: dict[str, list[str]]) -> None:
    """Add to the report what all runs took, and the `summary` of each domain and of all concepts.

    The summaries are {domain or "all": {method: summary}}, and they are printed.
    """
    runs = report["done"].values()
    report["seconds"] = round(sum(run["seconds"] for run in runs))
    report["pictures"] = sum(run["pictures"] for run in runs)

    groups = dict(values)
    groups["all"] = [value for domain in values for value in values[domain]]
    report["summary"] = {}
    for name, group in groups.items():
        summaries = {}
        for method_name, records in report["table"].items():
            summaries[method_name] = summary([records[value] for value in group])
        report["summary"][name] = summaries
        print_summary(name, group, summaries)


def print_summary(name: str, values: list[str], summaries: dict[str, dict]) -> None:
    """Print one line per method, in percent. name: of the domain whose concepts are `values`."""
    print(f"\n{name}, mean ± standard deviation over {len(values)}: {', '.join(values)}")
    print(f"{'':16} {'UA':>14} {'IRA':>14} {'CRA':>14} {'mean':>14}")
    for method_name, numbers in summaries.items():
        columns = [f"{100 * value:6.1f} ± {100 * std:5.1f}" for value, std in numbers.values()]
        print(f"{method_name:16} {' '.join(columns)}")
