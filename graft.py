"""Grafting: put an SAE's reconstruction in a hook point's place while the model generates, and see what becomes of the picture.

    untouched      the model's own run at these seeds
    graft          in the steps of a window the hook point gives x_hat = sae(x) instead of x
    mean ablation  there it gives the mean of x instead: the untouched run's, of each step, over its prompts and tokens
    distance       root mean square difference to the untouched run's final latents (or pictures), mean over the prompts
    recovered      1 - distance(graft) / distance(mean ablation): 1 for x_hat = x, 0 for an SAE that only knows the mean

The share is of generation what FVU is of the vectors: it weighs an error by what the rest of the model makes of it. It can be
below 0. Latents and pictures are compared in each window of steps and in all steps, at the same seeds, batch by batch.

It follows the "loss recovered" of SAEs on language models (Rajamanoharan et al. 2024, arXiv 2404.16014), which ablates to zero;
here the loss is the distance to the model's own sample.
"""

import math
import textwrap
from collections import defaultdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from errors import UsageError, check_choice
from hook import ROLES, Edit, tensors
from hook_point import STREAMS
from sources import read_description

SIDES = ("output", "diff")
CLIP = "openai/clip-vit-large-patch14"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of its training's pictures
COLORS = {"latents": "#2f6db5", "images": "#e08a2e", "clip": "#6a9a3b"}
LABELS = {"latents": "latents", "images": "pictures", "clip": "CLIP"}
ROWS = {"untouched": "untouched", "graft": "grafted in all steps", "mean": "mean-ablated in all steps"}  # of the picture


def trained_on(sae):
    """What an SAE's vectors were, from the description beside its activation file: the keywords of `graft` that it decides.

    Returns {"hook_name", "side", "stream", "rows"}. Raises UsageError where the files that `sae.cfg["data"]` names have no
    description (moved, or not of collect.py), or differ.
    """
    keys, found = ("hook_name", "side", "stream", "rows"), []
    for path in sae.cfg.get("data") or []:
        meta = read_description(path)
        if any(key not in meta for key in keys):
            raise UsageError(
                f"{Path(path).with_suffix('.json')} is not there or does not say what {path} holds: {', '.join(keys)}"
            )
        found.append({key: meta[key] for key in keys})
    if not found:
        raise UsageError("the SAE's cfg.json names no activation file, so it is not known where in the model it belongs")
    if any(other != found[0] for other in found):
        raise UsageError(f"the SAE was trained on files of several kinds, {found[0]} and others; it can't be put in one place")
    return found[0]


def equal_windows(steps, n):
    """The steps (a sorted list) in n windows of equal length, give or take one: ranges from the first step to after the last."""
    if not 1 <= n <= len(steps):
        raise UsageError(f"{n} windows of {len(steps)} steps: expected 1 to {len(steps)}")
    cuts = [i * len(steps) // n for i in range(n + 1)]
    return [range(steps[a], steps[b - 1] + 1) for a, b in zip(cuts, cuts[1:])]


def without_padding(x, stream):
    """The vectors of x (..., d) as (N, d), without those that are all zeros if it is text: that is how an `Edit` pads it."""
    x = x.flatten(0, -2)
    return x[(x != 0).any(1)] if stream == "text" else x


def reconstruct(sae, x, stream="image"):
    """x_hat of the tokens x (prompts, tokens, d) float32, one prompt after another, so that memory does not grow with them.

    A sample-topk SAE gets each prompt whole, (1, tokens, d), others get vectors, (tokens, d). Padding of text stays zero.
    """
    d, samples = x.shape[-1], getattr(sae, "activation", None) == "sampletopk"
    if getattr(sae, "d_in", d) != d:
        raise UsageError(f"the SAE is of vectors of width {sae.d_in}, and those of this hook point have width {d}")
    x_hat, device = torch.zeros_like(x), getattr(sae, "W_dec", x).device
    for tokens, out in zip(x, x_hat):
        there = (tokens != 0).any(1) if stream == "text" else slice(None)
        if len(vectors := tokens[there].to(device)):
            out[there] = (sae(vectors[None])[0] if samples else sae(vectors)).to(out)
    return x_hat


def generate(hooked, hook_name, change, steps, prompts, seeds, options, side="output", stream="image", rows="cond", on_step=None):
    """Generate with `change(role, step, x)` at the hook point.

    Returns the final latents (P, ...), and pictures (P, 3, H, W) in [0, 1] or None. x (P, tokens, d) float32 is what the SAE
    is of: the output, or output - input for side "diff". What `change` returns takes its place, None leaves it. The result is
    cast to the model's dtype; for "diff" the output moves by the change of the difference, so that no change moves no bit.
    """
    with hooked.watch(len(prompts), on_step=on_step) as sampling:

        def edit(role):
            def fn(output, before=None):
                x = output.float()
                if before is not None:
                    if before.shape != output.shape:
                        turns = f"{tuple(before.shape[1:])} into {tuple(output.shape[1:])}"
                        raise UsageError(f"side diff: {hook_name} turns {turns}, and there is no difference")
                    x = x - before.float()
                new = change(role, sampling.index, x)
                if new is not None and before is not None:
                    new = output.float() + (new - x)
                return None if new is None else new.to(output.dtype)

            return Edit(fn, role, stream, steps, with_input=side == "diff")

        hooks = {hook_name: [edit(role) for role in ROLES[rows].values()]}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        output = hooked.run_with_hooks(hooks, prompts, generator=generators, **options)
    images = next(iter(tensors(output)), None) if options.get("output_type") != "latent" else None
    if images is not None and images.ndim == 5:  # video: the frame in the middle
        images = images[:, images.shape[1] // 2]
    if images is not None and not (images.ndim == 4 and images.shape[1] == 3):
        images = None
    latents = sampling.sample[: sampling.R]  # some pipelines step both chunks of the guidance
    return latents.cpu(), images if images is None else images.cpu()


def rms(a, b):
    """Root mean square difference of each of P: (P, ...), (P, ...) -> (P,) float64."""
    return (a.double() - b.double()).flatten(1).square().mean(1).sqrt()


def mean_and_error(values):
    """Mean of (P,) and its standard error, which is None where P is 1; a number that is not finite is None."""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return tuple(v if math.isfinite(v) else None for v in (values.mean().item(), error))


def compare(graft, mean, floor=0.0):
    """The record of one distance: both runs' (P,) distances to the untouched one, paired by prompt, and what is recovered.

        recovered     1 - r, r = sum graft / sum mean
        recovered_se  its standard error over the prompts, that of a ratio of means: std(graft - r mean) / (sqrt(P) mean(mean))

    Both are None where the mean ablation moves the sample by no more than `floor`, or where a run gave NaN or infinity.
    """
    record = {}
    for name, values in (("graft", graft), ("mean", mean)):
        record[name], record[f"{name}_se"] = mean_and_error(values)
    if None in (record["graft"], record["mean"]) or record["mean"] <= floor:
        return record | {"recovered": None, "recovered_se": None}
    ratio = record["graft"] / record["mean"]
    error = mean_and_error(graft - ratio * mean)[1]
    return record | {"recovered": 1 - ratio, "recovered_se": error and error / record["mean"]}


def clip_distance(name=CLIP, device="cpu"):
    """1 - cosine similarity of two pictures' CLIP embeddings, a function (P, 3, H, W), (P, 3, H, W) -> (P,), and a line.

    The weights must be on this machine, as safetensors; nothing is downloaded. Where they are not the function is None and the
    line says so.
    """
    try:
        from transformers import CLIPModel

        model = CLIPModel.from_pretrained(name, local_files_only=True, use_safetensors=True).eval().to(device)
    except (OSError, ImportError):
        return None, f"no CLIP distance: the weights of {name} are not on this machine"
    size = model.config.vision_config.image_size
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    @torch.no_grad()
    def embed(x):
        x = torch.nn.functional.interpolate(x.to(device).float(), (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return model.visual_projection(model.vision_model((x - mean) / std).pooler_output)

    return lambda a, b: (1 - torch.cosine_similarity(embed(a), embed(b))).double().cpu(), f"CLIP distance by {name}"


def graft(
    hooked,
    sae,
    hook_name,
    prompts,
    seeds,
    windows=4,
    options=None,
    side="output",
    stream="image",
    rows="cond",
    batch_size=8,
    shown=8,
    clip=None,
):
    """Generate with the SAE's reconstruction at `hook_name`, and with its mean, in each window of steps and in all steps.

    hooked: a HookedDiffusionModel. sae: an Sae, or a function (N, d) -> (N, d) in float32. prompts, seeds: one seed a prompt.
    windows: into how many equal ones to cut the steps in which the hook point runs, or ranges of steps. options: of the
    pipeline, from `hooked.arguments(1, "pt", ...)`; a list among them has one entry a prompt if "prompt" is in its name. With
    output_type "latent", or where the pipeline gives no pictures, only latents are compared. side, stream, rows: what the SAE
    was trained on, see `trained_on`; the mean is of the same. Only these rows are edited, by default the conditional ones, of
    which guidance magnifies every change; "both" edits the unconditional ones too, with a mean of their own. batch_size:
    prompts generated together. shown: of how many prompts pictures are returned. clip: the function of `clip_distance`.

    Returns (report, pictures). report: a dict for JSON; "all" and each of "windows" is {"steps": [first, last], "timesteps":
    theirs, "latents": record, "images": record, "clip": record} with records of `compare`, the latter two where there are any.
    pictures: {"untouched", "graft", "mean"} of (shown, 3, H, W), the latter two edited in all steps, or None. The untouched
    run's latents and pictures are held in memory, 12 bytes a pixel in float32; of the others only one batch is.

    Raises UsageError for side "input", for a module or a window in which nothing can be edited, and where widths differ.
    """
    if side == "input":
        raise UsageError("the SAE was trained on --side input, and only what a module returns can be replaced, not what it takes")
    check_choice("side", side, SIDES)
    check_choice("stream", stream, STREAMS)
    check_choice("rows", rows, ROLES)
    prompts, seeds, options = list(prompts), list(seeds), dict(options or {})
    if not prompts or len(seeds) != len(prompts) or batch_size < 1:
        raise UsageError(f"{len(prompts)} prompts, {len(seeds)} seeds, batches of {batch_size}: expected a seed for each prompt")
    batches = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    count = windows if isinstance(windows, int) else len(windows)

    def sample(change, steps=None, on_step=None):
        """Batch by batch: which prompts, and {"latents": (P, ...), "images": (P, 3, H, W)}, the latter where there are any."""
        for batch in batches:
            here = {key: v[batch] if "prompt" in key and isinstance(v, list) else v for key, v in options.items()}
            made = generate(hooked, hook_name, change, steps, prompts[batch], seeds[batch], here, side, stream, rows, on_step)
            bar.update(len(prompts[batch]))
            yield batch, {kind: x for kind, x in zip(("latents", "images"), made) if x is not None}

    sums, counts, times = defaultdict(float), defaultdict(int), {}

    def measure(role, step, x):
        x = without_padding(x, stream)
        sums[role, step] = sums[role, step] + x.sum(0).cpu().double()
        counts[role, step] += len(x)

    with tqdm(total=len(prompts) * (3 + 2 * count), unit="prompt", desc="grafting") as bar:
        # 1. The untouched run, and the mean of each step over its prompts and tokens
        parts = [made for _, made in sample(measure, on_step=lambda step: times.setdefault(step.index, step.time()))]
        untouched = {kind: torch.cat([made[kind] for made in parts]) for kind in parts[0]}
        floors = {kind: torch.finfo(x.dtype).eps * x.double().square().mean().sqrt().item() for kind, x in untouched.items()}
        means = {key: (total / max(1, counts[key])).float() for key, total in sums.items()}
        steps = sorted({step for _, step in means})  # a denoiser may run in part of them
        whole = range(steps[0], steps[-1] + 1)
        windows = equal_windows(steps, windows) if isinstance(windows, int) else list(windows)
        for window in windows:
            if not set(window) & set(steps):
                raise UsageError(f"{hook_name} runs in steps {steps[0]} to {steps[-1]}, and in none of the window {window}")
        measures = {"latents": ("latents", rms), "images": ("images", rms)} | ({"clip": ("images", clip)} if clip else {})
        measures = {name: (kind, distance) for name, (kind, distance) in measures.items() if kind in untouched}
        pictures = {name: [] for name in ROWS} if "images" in untouched else None

        # 2. The reconstruction in place, and the mean, in all steps and in each window
        changes = {
            "graft": lambda role, step, x: reconstruct(sae, x, stream),
            "mean": lambda role, step, x: means[role, step].to(x.device).expand_as(x),
        }
        records = []
        for window in (whole, *windows):
            moved = {name: {mode: [] for mode in changes} for name in measures}
            for mode, change in changes.items():
                for batch, made in sample(change, window):
                    for name, (kind, distance) in measures.items():
                        moved[name][mode].append(distance(made[kind], untouched[kind][batch]))
                    if pictures is not None and not records:
                        pictures[mode].append(made["images"][: max(0, shown - batch.start)])
            here = [step for step in steps if step in window]
            record = {"steps": [here[0], here[-1]], "timesteps": [times[here[0]], times[here[-1]]]}
            for name, (kind, _) in measures.items():
                record[name] = compare(*(torch.cat(moved[name][mode]) for mode in changes), floors[kind])
            records.append(record)

    if pictures is not None:
        pictures["untouched"] = [untouched["images"]]
        pictures = {name: torch.cat(parts)[:shown] for name, parts in pictures.items()}
    report = {"hook_name": hook_name, "side": side, "stream": stream, "rows": rows, "prompts": prompts, "seeds": seeds}
    report |= {
        "batch_size": batch_size,
        "num_steps": len(steps),
        "mean": "of the untouched run: each step's, over prompts and tokens",
    }
    return report | {"all": records[0], "windows": records[1:]}, pictures


def label_of(window):
    (first, last), (start, end) = window["steps"], window["timesteps"]
    return f"step {first}\nt = {start:g}" if first == last else f"steps {first} … {last}\nt = {start:g} … {end:g}"


def bars(ax, report):
    """The recovered share in all steps and in each window, with its standard error; × where there is none to report."""
    windows = {"all steps": report["all"]} | {label_of(window): window for window in report["windows"]}
    names = [name for name in COLORS if name in report["all"]]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [x + (i - (len(names) - 1) / 2) * width for x in range(len(windows))]
        records = [window[name] for window in windows.values()]
        shares, errors = ([record[key] or 0.0 for record in records] for key in ("recovered", "recovered_se"))
        ax.bar(at, shares, 0.92 * width, yerr=errors, color=COLORS[name], label=LABELS[name], error_kw=dict(lw=1, capsize=2))
        for x, share, error, record in zip(at, shares, errors, records):
            text = "×" if record["recovered"] is None else f"{share:.2f}"
            ax.text(x, max(0, share + error) + 0.02, text, ha="center", va="bottom", fontsize=7)
    ax.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
    ax.axhline(0, color="#333333", linewidth=0.8)
    ax.set_ylim(top=max(1.1, ax.get_ylim()[1]))
    ax.set_xticks(range(len(windows)), list(windows), fontsize=7.5)
    ax.tick_params(axis="y", labelsize=7.5)
    ax.set_ylabel("recovered share", fontsize=8)
    title = f"1 − distance(graft) / distance(mean ablation), ± standard error over {len(report['prompts'])} prompts"
    ax.set_title(title, fontsize=8, loc="left", pad=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def picture(path, report, pictures):
    """Write a PNG: the pictures untouched, grafted and mean-ablated in all steps, a prompt a column, and `bars` below them.

    report, pictures: of `graft`. Beside the rows stand the distances, means over all prompts with their standard errors.
    """
    P, rows = (0, []) if pictures is None else (len(pictures["untouched"]), list(ROWS))
    texts = [textwrap.wrap(prompt, 20, max_lines=4, placeholder=" …") for prompt in map(str, report["prompts"][:P])]
    side, left, top = 1.25, 2.0, 0.5 + 0.14 * max(map(len, texts), default=0)  # inches
    W, H = max(8.0, left + side * P + 0.1), top + side * len(rows) + 2.85
    fig = Figure(figsize=(W, H), facecolor="white")
    what = {"output": "output", "diff": "output − input"}[report["side"]]
    title = f"{report['hook_name']}: the SAE's reconstruction of its {what} ({report['stream']} tokens, {report['rows']} rows)"
    fig.text(0.1 / W, 1 - 0.1 / H, title, ha="left", va="top", fontsize=10, parse_math=False)
    for r, name in enumerate(rows):
        for c, image in enumerate(pictures[name]):
            ax = fig.add_axes(
                ((left + side * c) / W, 1 - (top + side * (r + 1) - 0.05) / H, (side - 0.05) / W, (side - 0.05) / H)
            )
            ax.imshow(image.float().permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            ax.set_axis_off()
        label = ROWS[name]
        for measure in COLORS if name in ("graft", "mean") else ():
            if measure in report["all"]:
                moved, error = report["all"][measure][name], report["all"][measure][f"{name}_se"]
                label += f"\n{LABELS[measure]} " + ("not finite" if moved is None else f"{moved:.3f}")
                label += "" if error is None else f" ± {error:.3f}"
        y = 1 - (top + side * (r + 0.48)) / H
        fig.text((left - 0.1) / W, y, label, ha="right", va="center", fontsize=8, linespacing=1.4, parse_math=False)
    for c, text in enumerate("\n".join(lines) for lines in texts):
        x, y = (left + side * (c + 0.48)) / W, 1 - (top - 0.06) / H
        fig.text(x, y, text, ha="center", va="bottom", fontsize=6.5, parse_math=False)
    bars(fig.add_axes((0.75 / W, 0.5 / H, (W - 2.2) / W, 1.9 / H)), report)
    fig.savefig(path, dpi=150)
