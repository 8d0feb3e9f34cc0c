"""Stage 7: act. Amplify, ablate or add features while the model generates, and see each picture before and after.

    python steer.py                                                   # a feature of the newest SAE, ablated and amplified
    python steer.py --features 12 98 --multiply 0 4 --steps 0-10      # two features together; a row for each strength
    python steer.py --concept star --num_features 4 --multiply -2     # the features that fire for prompts with the word
    python steer.py --concept star --num_features 16 --toward ring    # and in their place what rings have more of
    python steer.py --sae saes/a saes/b --features 0:12 1:98 --add 2.5 --mask 0 0 1 0.5
    python steer.py --sae saes/a saes/b --unlearn all --report        # the toy: how well concepts go, against four baselines

The change is added to the activation, x + delta, so what the SAE does not explain of it stays (edits.py). Beside each picture
stands how far the edited activations are from those that the SAE was trained on, as norm and distance, 1 for typical ones
(`edits.Typical`): far above 1, the picture says less about the feature than about a broken model.

Reads   SAE folders, the activation files that they were trained on, and the model that these are of.
Writes  <out_dir>/<what was changed>/: steer.png (a prompt a column, untouched above), steer.json. --unlearn: unlearn.json.
It changes no weight: an edit lasts for the generation. Sources: see edits.py, concepts.py and unlearn.py.
"""

import hashlib
import json
import re
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from cli import check_positive, parse_object, product_dtype, resolve_device, resolve_dtype, run
from concepts import find_features, image_scores, toward, with_word
from disk import read_json, write_atomically
from edits import Edits, Typical, check_features, redirect, steer
from errors import UsageError
from graft import trained_on
from hook import HookedDiffusionModel, find_model, per_prompt, tensors
from prompts import load_prompts
from sae import Sae, newest_sae
from sources import read_description, read_prompts
from unlearn import GRIDS, domains_of, split_prompts, summary, unlearn


@dataclass
class Config:
    sae: list[str] = field(default_factory=list)  # their folders, each at a hook point of its own (none: the newest in saes/)
    features: list[str] = field(default_factory=list)  # such as 12; of several SAEs 0:12 for the first, 1:12 for the second
    concept: str | None = None  # a word of the prompts: its features are found (neither: the feature that varies most)
    num_features: int = 1  # of the concept, in each SAE
    score: Literal["contrast", "saeuron"] = "contrast"  # that finds them, see concepts.py
    num_pictures: int = 128  # of the activation files, that features are found from
    multiply: list[float] = field(default_factory=list)  # of the activations: 1 changes nothing, 0 ablates; a row for each
    add: list[float] = field(default_factory=list)  # to x along decoder rows, in RMS norms of the step (neither: multiply 0 4)
    toward: str | None = None  # with --concept: a word of the prompts that is put in its place
    steps: str | None = None  # first-last, from 0 (None: all)
    mask: list[str] = field(default_factory=list)  # top left bottom right as fractions of the picture, or a file: white is edited
    rows: Literal["cond", "uncond", "both"] = "cond"  # of the guidance, that are edited
    renormalize: bool = False  # give each edited token its norm of before back
    unlearn: str | None = None  # an object or style of the toy, or all: score how well it goes, of --report with the baselines
    report: bool = False  # with --unlearn: also SAeUron, a negative prompt and removing the mean direction
    per_cell: int = 1  # with --unlearn: prompts of each object and style, in either half
    model_name: str | None = None  # None: the model that the activations are of
    dataset_name: str | None = None  # prompts: a file, a hub data set or one prompt (None: those of the activations)
    column: str | None = None  # that holds the prompt (None: prompt, caption or text)
    num_prompts: int = 8  # the columns of the picture
    seed: int = 0  # of prompt i of --dataset_name: seed + i; those of the activations have their own
    num_inference_steps: int | None = None  # None: those of the activations; with --unlearn 10
    guidance_scale: float | None = None  # None: that of the activations
    pipeline_kwargs: str = "{}"  # JSON object: anything else that the pipeline takes
    batch_size: int = 8  # prompts generated together
    out_dir: str = "steer"  # in which each edit gets a folder
    device: str = "auto"  # auto, cuda, cuda:N, mps, cpu


def parse_features(texts, saes):
    """`12` or, with several SAEs, `1:12` -> features of each SAE. Raises UsageError for what is neither, or not there."""
    found = [[] for _ in saes]
    for text in texts:
        match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
        if not match or (match[1] is None and len(saes) > 1):
            form = "a number such as 12" if len(saes) == 1 else "the SAE's place in --sae and a number, such as 0:12"
            raise UsageError(f"--features {text}: expected {form}")
        if (which := int(match[1] or 0)) >= len(saes):
            raise UsageError(f"--features {text}: --sae names {len(saes)}, numbered from 0")
        found[which].append(int(match[2]))
    for sae, features in zip(saes, found):
        check_features(sae, features)
    return found


def parse_steps(text, num_steps):
    """`0-10` or `3` -> range(0, 11), range(3, 4); None is all. Raises UsageError for others, and outside of the sampling."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first:
        raise UsageError(f"--steps {text}: expected first-last, such as 0-10")
    if last >= (num_steps or last + 1):
        raise UsageError(f"--steps {text}: the sampling has {num_steps} steps, 0 to {num_steps - 1}")
    return range(first, last + 1)


def token_mask(given, grid):
    """The tokens to edit, bool (tokens,), of a box in fractions or a picture file; None for an empty list.

    grid: (h, w) or (frames, h, w) of the hook point. A token is in the box if its centre is. UsageError for what is neither.
    """
    if not given:
        return None
    if len(grid) not in (2, 3):
        raise UsageError(f"--mask: the tokens of this hook point are on the grid {tuple(grid)}, which is no picture")
    h, w = grid[-2:]
    if len(given) == 1:
        try:
            picture = Image.open(given[0]).convert("L").resize((w, h), Image.Resampling.BOX)
        except OSError as error:
            raise UsageError(f"--mask {given[0]}: no picture that can be read ({error})") from None
        mask = torch.from_numpy(np.array(picture)) > 127
    else:
        try:
            top, left, bottom, right = map(float, given)
        except ValueError:
            raise UsageError(f"--mask {' '.join(given)}: expected top left bottom right, such as 0 0 1 0.5, or a file") from None
        y, x = (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w
        mask = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    if not mask.any():
        raise UsageError(f"--mask {' '.join(given)}: no token of the {h} x {w} is in it")
    return mask.flatten().repeat(grid[0] if len(grid) == 3 else 1)


def choose(cfg, saes):
    """Features for each SAE, their scores, its direction of --toward or None, and rows of prompts.jsonl (None: see Config)."""
    nothing = [None] * len(saes)
    if cfg.features:
        return parse_features(cfg.features, saes), nothing, nothing, None
    features, values, directions, order = [], [], [], None
    for sae in saes:
        listing = read_prompts(sae.cfg["data"][0])
        scores, chosen = image_scores(sae, sae.cfg["data"][0], pictures=cfg.num_pictures)
        directions.append(None)
        if cfg.concept is not None:
            texts = [listing[i]["prompt"] for i in chosen]
            there = with_word(texts, cfg.concept)
            if cfg.toward is not None:
                directions[-1] = toward(sae, scores, with_word(texts, cfg.toward) & ~there, there)
            best, value = find_features(scores, there, cfg.score, cfg.num_features)
            groups = [chosen[there.numpy()], chosen[~there.numpy()]]
        else:
            value, best = scores.mean(1).std(0).topk(min(cfg.num_features, sae.num_latents))
            by = chosen[scores.mean(1)[:, best].sum(1).argsort(descending=True)]
            groups = [by[: len(by) // 2], by[::-1][: len(by) // 2]]
        features.append(best.tolist())
        values.append(value.tolist())
        half = -(-cfg.num_prompts // 2)
        # the columns of the picture: some that have it, then some that do not
        order = order or [listing[row] for row in (*groups[0][:half], *groups[1][: cfg.num_prompts - half])]
    return features, values, directions, order


def generate(hooked, edits, prompts, seeds, options, batch_size, bar):
    """Pictures (P, 3, H, W) in [0, 1], edited by `edits`, batch by batch."""
    made = []
    for start in range(0, len(prompts), batch_size):
        here = slice(start, start + batch_size)
        given = {k: v[here] if "prompt" in k and isinstance(v, list) else v for k, v in options.items()}
        with hooked.watch(len(prompts[here])) as sampling:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[here]]
            output = hooked.run_with_hooks(edits(sampling, start), prompts[here], generator=generators, **given)
        images = tensors(output)[0]
        images = images[:, images.shape[1] // 2] if images.ndim == 5 else images  # video: the frame in the middle
        if images.ndim != 4 or images.shape[1] != 3:
            raise UsageError(f"{type(hooked.pipe).__name__} gives {tuple(images.shape)}, no pictures to show")
        made.append(images.float().cpu())
        bar.update(len(prompts[here]))
    return torch.cat(made)


def picture(path, rows, prompts):
    """Rows of (label, pictures (P, 3, H, W), [(norm, distance) or None a picture]); the prompts stand above the columns."""
    P = len(prompts)
    texts = ["\n".join(textwrap.wrap(prompt, 22, max_lines=4, placeholder=" …")) for prompt in prompts]
    side, left, top, below = 1.3, 0.85, 0.16 + 0.13 * max(text.count("\n") + 1 for text in texts), 0.17  # inches
    W, H = left + side * P, top + (side + below) * len(rows)
    fig = Figure(figsize=(W, H), facecolor="white")
    for r, (label, images, measured) in enumerate(rows):
        y = top + (side + below) * r
        fig.text((left - 0.1) / W, 1 - (y + side / 2) / H, label, ha="right", va="center", fontsize=9, parse_math=False)
        for c, (image, numbers) in enumerate(zip(images, measured)):
            x = left + side * c
            ax = fig.add_axes((x / W, 1 - (y + side - 0.05) / H, (side - 0.05) / W, (side - 0.05) / H))
            ax.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            ax.set_axis_off()
            if numbers is not None:
                text = f"norm {numbers[0]:.2f}   distance {numbers[1]:.2f}"
                at = ((x + (side - 0.05) / 2) / W, 1 - (y + side - 0.01) / H)
                fig.text(*at, text, ha="center", va="top", fontsize=5.5, color="#666666")
            if not r:
                at = ((x + (side - 0.05) / 2) / W, 1 - (top - 0.05) / H)
                fig.text(*at, texts[c], ha="center", va="bottom", fontsize=6.5, parse_math=False)
    fig.savefig(path, dpi=150)


def open_folder(folder, name, options):
    """The folder, made. Raises UsageError if it holds a result of other options, or something else."""
    if (folder / name).exists():
        there = read_json(folder / name).get("options") or {}
        if other := [k for k in options if there.get(k) != options[k]]:
            raise UsageError(f"{folder} holds a run with other {', '.join(other)}; choose another --out_dir")
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds something else; choose another --out_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out_dir {folder} can't be made: {error.strerror}") from None
    return folder


def load_model(cfg, meta, device, dtype):
    """The model that the activations are of, and the pipeline arguments that they were made with, or those of the options."""
    named = {"variant": meta.get("variant"), "revision": meta.get("revision")}
    hooked = HookedDiffusionModel.from_pretrained(cfg.model_name or meta["model"], dtype, device, **named)
    hooked.pipe.set_progress_bar_config(disable=True)
    before = {} if cfg.model_name else meta["pipeline_kwargs"]
    options = {k: v for k, v in before.items() if k != "output_type" and not per_prompt(k)}
    given = {"num_inference_steps": cfg.num_inference_steps, "guidance_scale": cfg.guidance_scale}
    options |= {k: v for k, v in given.items() if v is not None} | parse_object(cfg.pipeline_kwargs, "--pipeline_kwargs")
    return hooked, hooked.arguments(1, "pt", options)


def digest(sae):
    """A checksum of an SAE's numbers, hexadecimal."""
    found = hashlib.sha256()
    for _, value in sorted(sae.state_dict().items()):
        found.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def unlearning(cfg, saes, meta, device):
    """--unlearn: the table of unlearn.py, gone on with where it stopped."""
    from toy.concepts import CONCEPTS, Classifier, to_model

    # 1. What to unlearn, and whether it can be judged
    values = {name: [v for v in CONCEPTS[name] if cfg.unlearn in (v, "all")] for name in ("object", "style")}
    values = {name: found for name, found in values.items() if found}
    if not values:
        known = ", ".join([*CONCEPTS["object"], *CONCEPTS["style"]])
        raise UsageError(f"--unlearn {cfg.unlearn}: the toy has no such object or style; expected all, {known}")
    model = Path(find_model(cfg.model_name or meta["model"]))
    if not (model / "classifier.safetensors").exists():
        raise UsageError(f"--unlearn: {model} has no classifier that could judge its pictures; that is for the toy")
    methods = tuple(GRIDS) if cfg.report else ("features",)

    # 2. The model, and where each domain is edited
    dtype = product_dtype("auto", device)  # bfloat16 also on a CPU that multiplies it by itself: twice as fast
    cfg.num_inference_steps = cfg.num_inference_steps or 10
    hooked, arguments = load_model(cfg, meta, device, dtype)
    for module in (*hooked.denoisers.values(), hooked.pipe.vae):
        module.to(memory_format=torch.channels_last)
    options = {"unlearn": cfg.unlearn, "per_cell": cfg.per_cell, "sae": {path: digest(sae) for path, sae in saes}}
    options = json.loads(json.dumps(options | {"model": cfg.model_name or meta["model"], "dtype": str(dtype)} | arguments))
    folder = open_folder(Path(cfg.out_dir) / f"unlearn_{cfg.unlearn}", "unlearn.json", options)
    before = read_json(folder / "unlearn.json") if (folder / "unlearn.json").exists() else {}
    domains = domains_of([sae for _, sae in saes], values)
    rows = load_prompts(str(model / "prompts.csv"))
    used = {row["prompt"] for _, sae in saes for row in read_prompts(sae.cfg["data"][0])}
    halves = split_prompts(rows, used, cfg.per_cell)
    classifier = Classifier.load(model).to(device)
    look = lambda images: classifier.predict(to_model((images * 255).round()).to(device))

    # 3. The table
    report = {"options": options, "done": before.get("done", {})}
    report["hook_names"] = {name: domain.place["hook_name"] for name, domain in domains.items()}
    report["prompts"] = {name: [row["prompt"] for row in half] for name, half in zip(("choice", "report"), halves)}
    report["seeds"] = "the place of the prompt in the two lists, one after the other, from 0"
    save = lambda: write_atomically(folder / "unlearn.json", (json.dumps(report, indent=1) + "\n").encode())
    table = unlearn(hooked, look, domains, values, halves, arguments, report["done"], save, methods=methods)
    report["table"] = table
    report["seconds"] = round(sum(record["seconds"] for record in report["done"].values()))
    report["pictures"] = sum(record["pictures"] for record in report["done"].values())
    report["summary"] = {}
    for name, concepts in {**values, "all": sum(values.values(), [])}.items():
        report["summary"][name] = {m: summary([records[v] for v in concepts]) for m, records in table.items()}
        print(f"\n{name}, mean ± standard deviation over {len(concepts)}: {', '.join(concepts)}")
        print(f"{'':16} {'UA':>14} {'IRA':>14} {'CRA':>14} {'mean':>14}")
        for m, numbers in report["summary"][name].items():
            print(f"{m:16} " + " ".join(f"{100 * value:6.1f} ± {100 * std:5.1f}" for value, std in numbers.values()))
    save()
    count = f"{report['pictures']} pictures in {arguments['num_inference_steps']} steps, {report['seconds']} s"
    print(f"\n{count}; on {len(halves[1])} prompts that chose nothing; settings, prompts and seeds in {folder / 'unlearn.json'}")


def main(cfg):
    # 1. The SAEs, where they belong, and the features
    check_positive(cfg, "num_features", "num_pictures", "num_prompts", "num_inference_steps", "batch_size", "per_cell")
    if bool(cfg.features) + (cfg.concept is not None) + (cfg.unlearn is not None) > 1:
        raise UsageError("expected one of --features, --concept and --unlearn at most")
    if bool(cfg.multiply) + bool(cfg.add) + (cfg.toward is not None) > 1:
        raise UsageError("expected one of --multiply, --add and --toward at most")
    if cfg.toward is not None and cfg.concept is None:
        raise UsageError("--toward is of --concept: what is put in its place")
    if cfg.report and cfg.unlearn is None:
        raise UsageError("--report is of --unlearn: name a concept of the toy, or all")
    of_pictures = ("multiply", "add", "toward", "steps", "mask", "rows", "renormalize", "dataset_name", "column")
    if cfg.unlearn is not None and (given := [name for name in of_pictures if getattr(cfg, name) != getattr(Config(), name)]):
        raise UsageError(f"--{given[0]} is not of --unlearn, which tries settings of its own (unlearn.py)")
    device, start = resolve_device(cfg.device), time.perf_counter()
    paths = cfg.sae or [str(newest_sae())]
    saes = [Sae.load_from_disk(path, device) for path in paths]
    places = [trained_on(sae) for sae in saes]
    if len({place["hook_name"] for place in places}) < len(places):
        raise UsageError("--sae names two SAEs of one hook point; expected one each")
    meta = read_description(saes[0].cfg["data"][0])
    if cfg.unlearn is not None:
        return unlearning(cfg, list(zip(paths, saes)), meta, device)
    features, scores, directions, rows = choose(cfg, saes)
    strengths = [("add", c) for c in cfg.add] or [("multiply", m) for m in cfg.multiply or (0.0, 4.0)]
    strengths = strengths if cfg.toward is None else [("toward", cfg.toward)]

    # 2. The model, the prompts, and which tokens and steps
    if cfg.dataset_name:
        rows = load_prompts(cfg.dataset_name, column=cfg.column, max_num_examples=cfg.num_prompts)
        rows = [row | {"seed": cfg.seed + i} for i, row in enumerate(rows)]
    rows = (rows or read_prompts(saes[0].cfg["data"][0]))[: cfg.num_prompts]
    prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
    what = "+".join(str(f) for found in features for f in found) if cfg.concept is None else cfg.concept
    named = {"multiply": lambda m: f"x{m:g}", "add": lambda c: f"add{c:g}", "toward": lambda word: f"to_{word}"}
    label = "_".join([what, *(named[kind](value) for kind, value in strengths)])
    label += "" if cfg.steps is None else f"_steps{cfg.steps}"
    label = label if len(label) < 100 else f"{label[:80]}_{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    settings = {k: v for k, v in vars(cfg).items() if k not in ("out_dir", "device", "batch_size")} | {"sae": paths}
    folder = open_folder(Path(cfg.out_dir) / re.sub(r"[^\w.+-]+", "-", label), "steer.json", settings)
    hooked, options = load_model(cfg, meta, device, resolve_dtype("auto", device))
    if "negative_prompt" in rows[0]:
        options["negative_prompt"] = [row["negative_prompt"] for row in rows]
    where, steps = [], None
    for place in places:
        given = {k: v[:1] if "prompt" in k and isinstance(v, list) else v for k, v in options.items()}
        dry = hooked.first_step(place["hook_name"], prompts[:1], stream=place["stream"], **given)
        where.append(token_mask(cfg.mask, next(iter(dry["grid"].values())) if place["stream"] == "image" else ()))
        steps = parse_steps(cfg.steps, dry["num_steps"])

    # 3. What is typical, then the untouched run and one for each strength
    typical = []
    for sae in saes:
        try:
            typical.append(Typical(sae.cfg["data"]))
        except (ValueError, OSError) as error:
            typical.append(None)
            print(f"note: norm and distance are not measured: {error}")
    runs = []
    with tqdm(total=len(prompts) * (1 + len(strengths)), unit="picture", desc="steering") as bar:
        for kind, value in (("multiply", 1.0), *strengths):
            if kind == "toward":
                changes = [redirect(s, f, u, p["stream"]) for s, f, u, p in zip(saes, features, directions, places)]
            else:
                changes = [steer(s, f, stream=p["stream"], **{kind: value}) for s, f, p in zip(saes, features, places)]
            edits = Edits(changes, places, typical, dict(rows=cfg.rows, steps=steps, renormalize=cfg.renormalize), where)
            images = generate(hooked, edits, prompts, seeds, options, cfg.batch_size, bar)
            runs.append({"kind": kind, "value": value, "images": images, "numbers": edits.numbers(len(prompts))})

    # 4. The table, the numbers and the pictures
    print(f"{'':12} {'norm':>6} {'distance':>9} {'pictures':>9}   (1: typical of training; the last: RMS change, of 1)")
    names = {"multiply": lambda m: f"× {m:g}", "add": lambda c: f"+ {c:g}", "toward": lambda word: f"→ {word}"}
    names = ["untouched", *(names[kind](value) for kind, value in strengths)]
    report = {"options": settings, "arguments": options, "seeds": seeds, "prompts": prompts, "runs": []}
    report["saes"] = [p | {"path": path, "features": f, "scores": s} for p, path, f, s in zip(places, paths, features, scores)]
    for name, made in zip(names, runs):
        moved = (made["images"] - runs[0]["images"]).square().flatten(1).mean(1).sqrt()
        known = [n for n in made["numbers"] if n is not None]
        middle = [f"{v:.2f}" for v in np.mean(known, 0)] if known else ["-", "-"]
        print(f"{name:12} {middle[0]:>6} {middle[1]:>9} {moved.mean():9.3f}")
        pictures = [{"moved": m, "norm": n and n[0], "distance": n and n[1]} for m, n in zip(moved.tolist(), made["numbers"])]
        report["runs"].append({"name": name, made["kind"]: made["value"], "pictures": pictures})
    picture(folder / "steer.png", [(name, made["images"], made["numbers"]) for name, made in zip(names, runs)], prompts)
    report["seconds"] = round(time.perf_counter() - start, 1)
    write_atomically(folder / "steer.json", (json.dumps(report, indent=1) + "\n").encode())
    for sae in report["saes"]:
        print(f"{sae['hook_name']}: features {' '.join(map(str, sae['features']))}")
    print(f"pictures in {folder / 'steer.png'}, numbers in {folder / 'steer.json'}")


if __name__ == "__main__" and "get_ipython" not in globals():
    run(main, Config)
