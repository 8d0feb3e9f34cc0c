"""How well concepts of the toy are unlearned, by UnlearnCanvas's protocol and the toy's classifier.

    python -m bench unlearn --sae saes/a saes/b --report        # every concept, every method
    python -m bench unlearn --sae saes/a --unlearn star

    UA    unlearning accuracy: of the prompts with the concept, the fraction of images in which the
          classifier does not see it
    IRA   in-domain retain accuracy: of the other prompts, the fraction of images that show the
          right value of the same domain
    CRA   cross-domain retain accuracy: of all prompts, the fraction of images that show the right
          value of the other domain

A concept is one of 8 objects or 6 styles; the other domain of an object is the style. Prompts come
from toy/prompts.csv, without those of the SAE's training activations. There are two halves, each
with `per_cell` prompts of each object and style. On one half the settings are chosen: for each
concept by the mean of the three numbers (ties by the sum over its domain), on the prompts with the
concept and on `others` prompts without it. The other half is reported, all of it, with seeds of its
own. These methods are compared:

    none             the model as it is
    features         ours: the concept's features (contrast), conditional rows, x + delta. Their
                     activations are multiplied by a number, or what they add is put along the
                     direction of the nearest, 2nd or 3rd nearest other value (edits.redirect)
    saeuron          arXiv 2501.18052: each step has its own features, by their score. One that is
                     above its mean over the domain's values is multiplied by a negative number
                     times its mean on the concept. Both halves of the guidance are edited
    negative_prompt  the word, for the unconditional rows
    mean_direction   at the same module, s times what x has more than the other prompts' mean along
                     the difference of means is subtracted

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
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from analysis.concepts import auroc, find_features, image_scores, saeuron, toward
from analysis.feature_edits import adding_edits, delta, redirect, steer
from cli import check_positive, parse_object, product_dtype, resolve_device
from diffusion.generate import generate_media
from errors import UsageError
from hook import Generation, HookedDiffusionModel, find_model, model_of
from sae import Sae, newest_sae
from store.activation_file import read_description
from store.dataset import Activations
from store.disk import claim_folder, read_json, write_json
from store.hook_point import HookPoint, trained_on
from store.identity import activations_of, origin
from store.prompts import load_prompts
from toy.concepts import CONCEPTS, Classifier, to_model

DOMAINS = {"object": "style", "style": "object"}  # {domain: the other one, which CRA measures}


def pairs(first: str, second: str, values: Iterable[tuple]) -> list[dict]:
    """Return settings of two names: ("s", "n", [(1, 2)]) gives [{"s": 1, "n": 2}]."""
    return [{first: a, second: b} for a, b in values]


GRIDS = {  # {method: {domain: settings to try}}; every method gets the same number
    "features": {
        "object": pairs(
            "count", "multiply", [(2, -4), (4, -2), (4, -4), (8, -1), (8, -2), (16, -2)]
        ),
        "style": pairs("count", "toward", [(64, 0), (16, 0), (64, 1), (16, 1), (64, 2)])
        + [{"count": 4, "multiply": -1}],
    },
    "saeuron": dict.fromkeys(
        DOMAINS, pairs("count", "multiply", itertools.product((1, 2), (-1, -5, -20)))
    ),
    "negative_prompt": dict.fromkeys(
        DOMAINS,
        pairs(
            "text",
            "guidance_scale",
            itertools.product(("{}", "a picture of a {}"), (5.0, 7.5, 10.0)),
        ),
    ),
    "mean_direction": dict.fromkeys(
        DOMAINS, pairs("s", "rows", itertools.product((1, 2, 4), ("cond", "both")))
    ),
}


BATCH = 48  # prompts generated together


@dataclass
class Config:
    # model
    sae: list[str] = field(default_factory=list)
    """Unlearn with the SAEs in these folders, each at a hook point of its own. If not given, it is
    the newest one in saes/."""

    model_name: str | None = None
    """Load this diffusers folder, with the pipeline's arguments of the activations. If not given, it
    is the model that made the activations."""

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


@dataclass
class Domain:
    """Where a domain's concepts are unlearned, and what is known of them there."""

    name: str  # object or style
    sae: torch.nn.Module
    hook_point: HookPoint
    scores: torch.Tensor  # (P, S, M): mean activation over tokens of the activation file's pictures
    means: torch.Tensor  # (P, S, d): their mean vector
    times: torch.Tensor  # (S,): timesteps
    labels: list  # of each picture, its value of the domain

    def there(self, value: str) -> torch.Tensor:
        """Return which images show the value: bool (P,)."""
        return torch.tensor([label == value for label in self.labels])

    def nearest(self, value: str) -> list[str]:
        """Return the other values, the one with the most similar mean scores first."""
        mean = {v: self.scores[self.there(v)].mean((0, 1)) for v in sorted(set(self.labels))}
        return sorted(
            mean.keys() - {value}, key=lambda v: (float((mean[v] - mean[value]).norm()), v)
        )

    def step(self, timestep: float) -> int:
        """Return the index of the step whose timestep is nearest."""
        return int((self.times - timestep).abs().argmin())


def domains_of(saes, values):
    """Return the domains, each at the SAE whose best features tell its values apart best (mean
    AUROC): {name: Domain}.

    saes: SAEs of conditional rows of toy activations. values: {"object": names, "style": names}.
    Raises UsageError for activations that are not of the toy's prompts, or of none with, or none
    without, a value.
    """
    found, best = {}, dict.fromkeys(values, -1.0)
    for sae in saes:
        activations, hook_point = activations_of(sae, "the SAE"), trained_on(sae)
        path, rows = activations.paths[0], activations.prompt_lines()
        if (
            hook_point.rows != "cond"
            or not activations.timesteps
            or any(name not in row for name in values for row in rows)
        ):
            raise UsageError(
                f"{path}: unlearning needs --rows cond of generated pictures, "
                "with prompts of toy/prompts.csv"
            )
        scores, chosen = image_scores(sae, activations)
        vectors = (activations.read_image(i).float().numpy() for i in chosen)
        means = torch.from_numpy(np.stack([x.mean(1) for x in vectors]))
        for name in values:
            labels = [rows[i][name] for i in chosen]
            if absent := [
                value for value in values[name] if value not in labels or set(labels) == {value}
            ]:
                raise UsageError(
                    f"{path}: {absent[0]} is shown by {'all' if absent[0] in labels else 'none'} "
                    "of its pictures"
                )
            domain = Domain(
                name, sae, hook_point, scores, means, torch.tensor(activations.timesteps), labels
            )
            each = [
                auroc(scores.mean(1), domain.there(value)).max() for value in sorted(set(labels))
            ]
            if (told := float(torch.stack(each).mean())) > best[name]:
                best[name], found[name] = told, domain
    return found


def split_prompts(rows, used, per_cell, seed=0):
    """Return two halves of prompts, (choice, report), without the prompts in `used`.

    Each half has `per_cell` prompts of each object and style. Raises UsageError if too few are
    left.
    """
    halves, order = ([], []), np.random.default_rng(seed).permutation(len(rows))
    cells = {}
    for row in (rows[i] for i in order):
        if row["prompt"] not in used:
            cells.setdefault((row["object"], row["style"]), []).append(row)
    if short := [cell for cell, found in sorted(cells.items()) if len(found) < 2 * per_cell]:
        raise UsageError(
            f"--per_cell {per_cell}: only {len(cells[short[0]])} prompts are left "
            f"of {' '.join(short[0])}"
        )
    for _, found in sorted(cells.items()):
        for half, some in zip(halves, (found[:per_cell], found[-per_cell:])):
            half += some
    return halves


def method(name, setting, domain, value):
    """Return what a method does with a setting: (change or None, rows, pipeline options).

    change(x, timestep) is added to x at the domain's hook point; rows is "cond" or "both".
    """
    there, sae, stream = domain.there(value), domain.sae, domain.hook_point.stream
    if name == "features":
        features, _ = find_features(domain.scores, there, "contrast", setting["count"])
        if "toward" in setting:
            other = domain.there(domain.nearest(value)[setting["toward"]])
            return (
                redirect(sae, features.tolist(), toward(sae, domain.scores, other, there), stream),
                "cond",
                {},
            )
        return (
            steer(sae, features.tolist(), multiply=setting["multiply"], stream=stream),
            "cond",
            {},
        )
    if name == "saeuron":
        top = (
            saeuron(domain.scores, there).topk(setting["count"], dim=1).indices
        )  # (S, n): each step's own
        on_it = domain.scores[there].mean(0)
        mean = torch.stack(
            [domain.scores[domain.there(v)].mean(0) for v in sorted(set(domain.labels))]
        ).mean(0)

        def change(x, timestep):
            step = domain.step(timestep)
            features = top[step]
            scale, above = setting["multiply"] * on_it[step, features], mean[step, features]
            new = lambda acts: torch.where(acts > above.to(acts), acts * scale.to(acts), acts)
            return delta(sae, x, features.to(sae.W_dec.device), new, stream)

        return change, "both", {}
    if name == "negative_prompt":
        return (
            None,
            "cond",
            {"text": setting["text"].format(value), "guidance_scale": setting["guidance_scale"]},
        )
    if name == "mean_direction":
        without = domain.means[~there].mean(0)
        direction = torch.nn.functional.normalize(
            domain.means[there].mean(0) - without, dim=1
        )  # (S, d)

        def change(x, timestep):
            step = domain.step(timestep)
            u = direction[step].to(x)
            return -setting["s"] * ((x - without[step].to(x)) @ u)[..., None] * u

        return change, setting["rows"], {}
    return None, "cond", {}


def generate(hooked, prompts, seeds, options, domain=None, change=None, rows="cond", extra=None):
    """Return images (P, 3, H, W) in [0, 1] of prompts, made with the change at the domain's hook
    point."""
    extra = dict(extra or {})
    text = extra.pop("text", None)
    negative_prompts = None if text is None else [text] * len(prompts)
    generation = Generation(prompts, seeds, negative_prompts, options | extra)

    make_edits = None
    if change is not None:

        def make_edits(sampling):
            return {
                domain.hook_point.hook_name: adding_edits(domain.hook_point, change, sampling, rows)
            }

    return generate_media(hooked, generation, BATCH, make_edits).pictures()


def judge(seen, rows, name, value):
    """Return {"UA": ..., "IRA": ..., "CRA": ...} of images for the prompts `rows`, in which the
    classifier has `seen` [{"object": ..., "style": ..., ...}, ...]."""
    other = DOMAINS[name]
    share = lambda hits: sum(hits) / max(1, len(hits))
    return {
        "UA": share([s[name] != value for s, r in zip(seen, rows) if r[name] == value]),
        "IRA": share([s[name] == r[name] for s, r in zip(seen, rows) if r[name] != value]),
        "CRA": share([s[other] == r[other] for s, r in zip(seen, rows)]),
    }


def mean(record: dict[str, float]) -> float:
    """Return the mean of UA, IRA and CRA."""
    return (record["UA"] + record["IRA"] + record["CRA"]) / 3


def unlearn(
    hooked, look, domains, values, halves, options, done, save, others=12, methods=tuple(GRIDS)
):
    """Return the whole table: {method: {concept: {"chosen": setting, "UA", "IRA", "CRA"}}}.

    The numbers are those of the second half.

    look(pictures) -> [{"object", "style", ...}] names what they show. values: {domain: [concepts]}.
    halves: of `split_prompts`. others: prompts without the concept that a setting is tried on, a
    seeded choice of the first half. done: {key: record} of what was measured before, which
    is not measured again; save() is called after each new record.
    """
    (choice, report), table = halves, {"none": {}, **{name: {} for name in methods}}
    seeds = {id(row): i for i, row in enumerate((*choice, *report))}

    def measure(key, rows, domain, value, name=None, setting=None):
        if key not in done:
            start = time.perf_counter()
            change, edited, extra = (
                method(name, setting, domain, value) if name else (None, "cond", None)
            )
            prompts, numbers = [row["prompt"] for row in rows], [seeds[id(row)] for row in rows]
            seen = look(generate(hooked, prompts, numbers, options, domain, change, edited, extra))
            done[key] = {
                "seen": seen,
                "pictures": len(rows),
                "seconds": round(time.perf_counter() - start, 1),
            }
            save()
        bar.update()
        return judge(done[key]["seen"], rows, domain.name, value)

    concepts = [(domains[name], value) for name in values for value in values[name]]
    tries = sum(len(GRIDS[name][domain.name]) + 1 for name in methods for domain, _ in concepts)
    with tqdm(total=len(concepts) + tries, unit="run", desc="unlearning") as bar:
        # 1. Every setting on the first half: the prompts with the concept and some without
        tried = {}
        for name, (domain, value) in itertools.product(methods, concepts):
            having, rest = (
                [r for r in choice if (r[domain.name] == value) == wanted]
                for wanted in (True, False)
            )
            rest = [rest[i] for i in np.random.default_rng(0).permutation(len(rest))[:others]]
            for number, setting in enumerate(GRIDS[name][domain.name]):
                key = f"{name} {value} {setting}"
                tried[name, value, number] = mean(
                    measure(key, [*having, *rest], domain, value, name, setting)
                )

        # 2. The best of each on the second half
        for domain, value in concepts:
            table["none"][value] = measure("none", report, domain, value)
        for name, (domain, value) in itertools.product(methods, concepts):
            grid, peers = (
                GRIDS[name][domain.name],
                [v for d, v in concepts if d.name == domain.name],
            )
            whole = [
                sum(tried[name, peer, number] for peer in peers) for number in range(len(grid))
            ]
            best = -max(
                (tried[name, value, number], whole[number], -number) for number in range(len(grid))
            )[2]
            record = measure(
                f"{name} {value} report {grid[best]}", report, domain, value, name, grid[best]
            )
            table[name][value] = {"chosen": grid[best]} | record
    return table


def summary(records: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return the mean and standard deviation over concepts: {"UA": (mean, std), "IRA": ..., "CRA":
    ..., "mean": ...}."""
    columns = {key: [record[key] for record in records] for key in ("UA", "IRA", "CRA")}
    columns["mean"] = [mean(record) for record in records]
    return {
        key: (float(np.mean(numbers)), float(np.std(numbers))) for key, numbers in columns.items()
    }


def digest(sae: Sae) -> str:
    """Return 16 hex digits of a checksum of an SAE's tensors."""
    checksum = hashlib.sha256()
    for _, value in sorted(sae.state_dict().items()):
        checksum.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return checksum.hexdigest()[:16]


def load_model(
    cfg: Config, meta: dict, device: torch.device, dtype: torch.dtype
) -> tuple[HookedDiffusionModel, dict]:
    """Return the model that generates, and the pipeline's arguments.

    The arguments are those that the activations were made with, also in another folder of the
    model. The options of this benchmark take their place where they are given.
    """
    hooked, options = model_of(meta, cfg.model_name, device, dtype)
    for module in (*hooked.denoisers.values(), hooked.pipe.vae):
        module.to(memory_format=torch.channels_last)
    options["num_inference_steps"] = cfg.num_inference_steps
    if cfg.guidance_scale is not None:
        options["guidance_scale"] = cfg.guidance_scale
    options |= parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    return hooked, hooked.arguments(1, "pt", options)


def values_of(name: str) -> dict[str, list[str]]:
    """Return {domain: concepts} of one concept's name, or of all. Raises UsageError for a name that
    the toy does not know."""
    values = {}
    for domain in DOMAINS:
        found = [value for value in CONCEPTS[domain] if name in (value, "all")]
        if found:
            values[domain] = found
    if not values:
        known = ", ".join([*CONCEPTS["object"], *CONCEPTS["style"]])
        raise UsageError(
            f"--unlearn {name}: the toy has no such object or style; expected all, {known}"
        )
    return values


def summarize(values: dict[str, list[str]], table: dict) -> dict:
    """Return mean and standard deviation over the concepts of each domain, and over all, and print
    them."""
    found = {}
    for name, concepts in {**values, "all": sum(values.values(), [])}.items():
        found[name] = {
            method: summary([records[value] for value in concepts])
            for method, records in table.items()
        }
        print(f"\n{name}, mean ± standard deviation over {len(concepts)}: {', '.join(concepts)}")
        print(f"{'':16} {'UA':>14} {'IRA':>14} {'CRA':>14} {'mean':>14}")
        for method, numbers in found[name].items():
            columns = [f"{100 * value:6.1f} ± {100 * std:5.1f}" for value, std in numbers.values()]
            print(f"{method:16} {' '.join(columns)}")
    return found


def write_report(path: Path, report: dict) -> None:
    write_json(path, report)


def main(cfg: Config) -> list[Path]:
    """Print the table; return the file that holds it. Raises UsageError for options, SAEs and a
    model that can't be used."""
    # 1. What to unlearn, and whether it can be judged
    check_positive(cfg, "per_cell", "num_inference_steps")
    device = resolve_device(cfg.device)
    paths = cfg.sae or [str(newest_sae())]
    saes = [Sae.load_from_disk(path, device) for path in paths]
    if len({trained_on(sae).hook_name for sae in saes}) < len(saes):
        raise UsageError("--sae names two SAEs of one hook point; expected one each")
    values = values_of(cfg.unlearn)
    meta = origin(saes[0].cfg, read_description(saes[0].cfg["data"][0]))
    model_name = cfg.model_name or meta["model"]
    model = Path(find_model(model_name))
    if not (model / "classifier.safetensors").exists():
        raise UsageError(
            f"{model} has no classifier that could judge its pictures; "
            "this benchmark is for the toy"
        )

    # 2. The model, and a folder that holds nothing else
    dtype = product_dtype(
        "auto", device
    )  # bfloat16 also on a CPU that multiplies it by itself: twice as fast
    hooked, arguments = load_model(cfg, meta, device, dtype)
    options = {
        "unlearn": cfg.unlearn,
        "per_cell": cfg.per_cell,
        "sae": {path: digest(sae) for path, sae in zip(paths, saes)},
    }
    options = json.loads(
        json.dumps(options | {"model": model_name, "dtype": str(dtype)} | arguments)
    )
    path = Path(cfg.out_dir) / cfg.unlearn / "unlearn.json"
    claim_folder(path.parent, path.name, options)
    done = read_json(path).get("done", {}) if path.exists() else {}

    # 3. Where each domain is edited, the prompts, and who judges
    domains = domains_of(saes, values)
    used = {row["prompt"] for sae in saes for row in Activations(sae.cfg["data"]).prompt_lines()}
    halves = split_prompts(load_prompts(str(model / "prompts.csv")), used, cfg.per_cell)
    classifier = Classifier.load(model).to(device)

    def look(images):
        return classifier.predict(to_model((images * 255).round()).to(device))

    # 4. The table
    report = {"options": options, "done": done}
    report["hook_names"] = {name: domain.hook_point.hook_name for name, domain in domains.items()}
    report["prompts"] = {
        name: [row["prompt"] for row in half] for name, half in zip(("choice", "report"), halves)
    }
    report["seeds"] = "the place of the prompt in the two lists, one after the other, from 0"
    save = partial(write_report, path, report)
    methods = tuple(GRIDS) if cfg.report else ("features",)
    report["table"] = unlearn(
        hooked, look, domains, values, halves, arguments, done, save, methods=methods
    )
    report["seconds"] = round(sum(record["seconds"] for record in done.values()))
    report["pictures"] = sum(record["pictures"] for record in done.values())
    report["summary"] = summarize(values, report["table"])
    save()
    print(
        f"\n{report['pictures']} pictures in {arguments['num_inference_steps']} steps, "
        f"{report['seconds']} s; on {len(halves[1])} prompts that chose nothing; "
        f"settings, prompts and seeds in {path}"
    )
    return [path]
