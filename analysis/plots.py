"""Every figure of the project: curves of training, sweeps, evaluations, diagnoses, grids of images.

    plot_training(path, rows, held_out, title)      # train.py
    plot_images(path, [ImageRow("untouched", images)], prompts)      # steer.py, ablate.py

Each `plot_...` writes one PNG. The numbers are defined elsewhere: metrics in analysis/metrics.py
and diagnoses in diagnose.py.
"""

import math
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, so that a notebook's backend stays as it is
from matplotlib.ticker import LogLocator
from torch import Tensor

from analysis.data_stats import OUTLIER
from analysis.metrics import Metrics, total
from errors import decimals

BLUE, ORANGE, GREY = "#2f6db5", "#e07b39", "#888888"
CENTERED = {"median": "centred on the median", "mean": "centred on the mean", "none": "not centred"}
IMAGE = 1.25  # inches of an image in a grid, with the gap to the next
GAP = 0.05  # inches
WIDE = 4.5  # inches of a picture that is much wider than high, such as a strip of frames
LOWEST = 0.35  # inches that a wide picture is high at least, so that its label fits
WIDE_RATIO = 2.0  # width / height from which on a picture is that
CAPTION = 0.17  # inches of the line below an image
GRAFT_COLORS = {"latents": BLUE, "images": "#e08a2e", "clip": "#6a9a3b"}
GRAFT_LABELS = {"latents": "latents", "images": "pictures", "clip": "CLIP"}
GRAFT_ROWS = {
    "untouched": "untouched",
    "graft": "grafted in all steps",
    "mean": "mean-ablated in all steps",
}


# ------------------------------------------------------------------------------- training


def plot_training(path: Path, rows: list[dict], held_out: Metrics, title: str) -> None:
    """Write a PNG of three panels: FVU and dead latents over training, and how often latents fire.

    rows: of metrics.jsonl, with "vectors", "fvu" and "dead". held_out: the numbers at the end.
    """
    fig = Figure(figsize=(13, 3.9), layout="constrained")
    fig.suptitle(
        f"{title}: held-out FVU {held_out.fvu:.3f}, L0 {held_out.l0:.1f}, dead {held_out.dead:.1%}"
    )
    left, middle, right = fig.subplots(1, 3)
    draw_over_training(left, rows, "fvu", held_out.fvu, "Variance not explained (FVU)")
    draw_over_training(middle, rows, "dead", held_out.dead, "Dead latents")

    values = [held_out.fvu, *(row["fvu"] for row in rows)]
    if max(values) > 3 * min(values) > 0:
        left.set_yscale("log", subs=[])
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:.2g}")
    middle.set_ylim(0, 1.1 * max(0.1, held_out.dead, *(row["dead"] for row in rows)))
    middle.yaxis.set_major_formatter("{x:.0%}")
    plot_activity(right, held_out)

    for ax in (left, middle, right):
        tidy(ax)
    fig.savefig(path, dpi=130)


def draw_over_training(ax: Axes, rows: list[dict], name: str, at_end: float, heading: str) -> None:
    """Draw one number of metrics.jsonl over the training vectors, and its held-out value."""
    most = max(row["vectors"] for row in rows)
    unit = 1
    label = "training vectors"
    if most >= 1e6:
        unit = 1e6
        label = "training vectors, millions"
    elif most >= 1e4:
        unit = 1e3
        label = "training vectors, thousands"

    dots = {}
    if len(rows) < 12:
        dots = dict(marker="o", ms=4)
    x = [row["vectors"] / unit for row in rows]
    y = [row[name] for row in rows]
    ax.plot(x, y, color=BLUE, lw=1.3, **dots, label="in training")
    ax.axhline(at_end, color=ORANGE, lw=1.3, ls="--", label="held out, at the end")
    ax.set(title=heading, xlabel=label, xlim=(0, 1.03 * most / unit))


def plot_sweep(path: Path, rows: list[dict]) -> None:
    """Write a PNG of FVU against L0 of several SAEs, with a line through those of one size and
    seed.

    rows: their cfg.json, with the held-out "fvu" and "l0".
    """
    fig = Figure(figsize=(6.2, 4.4), layout="constrained")
    ax = fig.subplots()
    sizes = sorted({row["num_latents"] for row in rows})
    for i, size in enumerate(sizes):
        color = colormaps["viridis"](0.9 * i / max(1, len(sizes) - 1))
        of_size = [row for row in rows if row["num_latents"] == size]
        seeds = sorted({row["training"]["seed"] for row in of_size})
        for seed in seeds:
            line = [row for row in of_size if row["training"]["seed"] == seed]
            points = sorted((row["l0"], row["fvu"]) for row in line)
            label = f"{size} latents" if seed == seeds[0] else None
            ax.plot(*zip(*points), color=color, marker="o", ms=5, lw=1.3, alpha=0.85, label=label)

    points = [(row["l0"], row["fvu"]) for row in rows]
    best = best_points(points)
    ax.plot(*zip(*best), color="#444444", ls=":", lw=1.2, label="no other has fewer and better")
    ax.set(
        title="Fewer active latents or less error",
        xlabel="active latents per vector (L0)",
        ylabel="FVU on held-out vectors",
    )
    if max(l0 for l0, _ in points) > 3 * min(l0 for l0, _ in points):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0, None)
    tidy(ax)
    fig.savefig(path, dpi=130)


def best_points(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the sorted points (l0, fvu) for which no other has both at most as large.

    For (1, 5), (2, 3) and (3, 4) these are (1, 5) and (2, 3).
    """
    best = []
    for point in points:
        l0, fvu = point
        dominated = any(other != point and other[0] <= l0 and other[1] <= fvu for other in points)
        if not dominated:
            best.append(point)
    return sorted(best)


# ----------------------------------------------------------------------------- evaluation


def plot_evaluation(path: Path, by_step: list[Metrics], timesteps: list[float], title: str) -> None:
    """Write a PNG of four panels: FVU, L0, and silent and always-on latents by timestep, and how
    often latents are active.

    by_step: one per step, of which those without vectors are left out. timesteps: of the scheduler;
    [] if they are not known, and then there is one step.
    """
    whole = total(by_step)
    fig = Figure(figsize=(15, 3.7), layout="constrained")
    numbers = (
        f"FVU {whole.fvu:.4f}, cosine {whole.cosine:.4f}, L0 {whole.l0:.1f}, dead {whole.dead:.2%}"
    )
    numbers += f", always on {whole.always_on:.2%}; {whole.n:,} held-out vectors"
    fig.suptitle(f"{title}: {numbers}", fontsize=11)
    fvu, l0, latents, activity = axes = fig.subplots(1, 4)

    x = []
    known = []
    for timestep, metrics in zip(timesteps or [0], by_step):
        if metrics.n:
            x.append(timestep)
            known.append(metrics)

    def draw(ax: Axes, name: str, color: str, label: str) -> None:
        y = [getattr(metrics, name) for metrics in known]
        ax.plot(x, y, color=color, label=label, marker="o", ms=3.5, lw=1.3)

    draw(fvu, "fvu", BLUE, "at this timestep")
    fvu.set_title("Variance not explained (FVU)")
    draw(l0, "l0", BLUE, "at this timestep")
    l0.set_title("Active latents per vector (L0)")
    draw(latents, "dead", BLUE, "not active at this timestep")
    draw(latents, "always_on", ORANGE, "always on")
    latents.set_title("Share of latents")

    for ax in (fvu, l0, latents):
        ax.set(xlabel="timestep (noise on the left)" if timesteps else "", ylim=(0, None))
        if not timesteps:
            ax.set_xticks([])
    mean = dict(color=ORANGE, ls="--", lw=1.2, label="of all together")
    fvu.axhline(whole.fvu, **mean)
    l0.axhline(whole.l0, **mean)
    if len(x) > 1 and x[0] > x[-1]:
        for ax in (fvu, l0, latents):
            ax.invert_xaxis()
    latents.yaxis.set_major_formatter("{x:.0%}")

    plot_activity(activity, whole)
    for ax in axes:
        tidy(ax)
    fig.savefig(path, dpi=130)


# ------------------------------------------------------------------------------ diagnosis


def plot_diagnosis(path: Path, found: dict, title: str) -> None:
    """Write a PNG of four panels: RMS by timestep, power by dimension, eigenvalues, how often
    latents fire. found: the numbers of diagnose.py."""
    fig = Figure(figsize=(11, 7.4), layout="constrained")
    fig.suptitle(title, fontsize=12, parse_math=False)
    axes = fig.subplots(2, 2)

    if "timesteps" in found:
        draw_rms_by_step(axes[0, 0], found)
    else:
        draw_rms_of_vectors(axes[0, 0], found)
    draw_power(axes[0, 1], found)
    draw_spectrum(axes[1, 0], found)
    draw_trials(axes[1, 1], found)

    for ax in axes.flat:
        tidy(ax)
    fig.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    fig.savefig(path, dpi=140)


def draw_rms_by_step(ax: Axes, found: dict) -> None:
    """Draw the RMS of the vectors at each timestep, and about the mean of all."""
    line = dict(lw=1.4, marker="o", ms=3.5)
    times = found["timesteps"]
    ax.plot(times, found["rms_by_step"], color=BLUE, **line, label="as they are")
    ax.plot(times, found["spread_by_step"], color=ORANGE, **line, label="about their common mean")
    ax.set(title="RMS by timestep", xlabel="timestep, in the order of sampling", ylabel="RMS")
    ax.set_ylim(bottom=0)
    if times[0] > times[-1]:
        ax.invert_xaxis()


def draw_rms_of_vectors(ax: Axes, found: dict) -> None:
    """Draw which share of the vectors has at most some RMS."""
    shares = [percent / 100 for percent in range(101)]
    ax.plot(found["rms_percentiles"], shares, color=BLUE, lw=1.4, label="sampled vectors")
    ax.set(
        title="RMS of vectors",
        xlabel="RMS of a vector's numbers, at most",
        ylabel="share of the vectors",
        ylim=(0, 1.02),
    )
    ax.yaxis.set_major_formatter("{x:.0%}")


def draw_power(ax: Axes, found: dict) -> None:
    """Draw the power of each dimension, the largest first, and from where on it is an outlier."""
    power = [(m**2 + v, v) for m, v in zip(found["mean"], found["variance"])]
    power = sorted(power)[::-1]
    totals = [total_power for total_power, _ in power]
    variances = [variance for _, variance in power]
    ranks = range(1, found["d"] + 1)

    ax.plot(ranks, totals, color=BLUE, lw=1.4, label="mean² + variance")
    ax.plot(ranks, variances, color=ORANGE, ls="", marker=".", ms=4, label="variance alone")
    limit = OUTLIER**2 * statistics.median(totals)
    label = f"outliers: {OUTLIER} times the median RMS"
    ax.axhline(limit, color=GREY, lw=1.4, ls="--", label=label)
    ax.set(
        title=f"Power by dimension: gamma {found['gamma']:.2f}",
        xlabel="dimension, sorted",
        ylabel="power",
        yscale="log",
    )


def draw_spectrum(ax: Axes, found: dict) -> None:
    """Draw each eigenvalue's share of the variance, and the effective rank."""
    whole = sum(found["eigenvalues"])
    shares = [max(value / whole, 1e-12) for value in found["eigenvalues"]]
    ax.plot(range(1, found["d"] + 1), shares, color=BLUE, lw=1.4, label="eigenvalues")
    rank = found["effective_rank"]
    label = f"effective rank {rank:.1f} of {found['d']}"
    ax.axvline(rank, color=GREY, lw=1.4, ls="--", label=label)
    ax.set(
        title="Spectrum of the covariance",
        xlabel="eigenvalue, sorted",
        ylabel="share of the variance",
        yscale="log",
    )


def draw_trials(ax: Axes, found: dict) -> None:
    """Draw how often latents fire at the start and after the trial updates, the most active first.

    One colour for each way of centring; dotted at the start.
    """
    for way, color in zip(found["dead"], (BLUE, ORANGE)):
        dead = found["dead"][way]
        after = {"start": "at the start", "trained": f"after {dead['updates']} updates"}
        for when, style in (("start", ":"), ("trained", "-")):
            fires = found["fires"][way][when].sort(descending=True).values.double()
            alive = fires[fires > 0] / found["num_counted"]
            x = [(i + 1) / len(fires) for i in range(len(alive))]
            label = f"{CENTERED[way]}, {after[when]}: {dead[when]:.1%} dead"
            ax.plot(x, alive.tolist(), color=color, lw=1.4, ls=style, label=label)

    mean = found["k"] / found["num_latents"]
    ax.axhline(mean, color=GREY, lw=1.4, ls="--", label="mean, k / latents")
    ax.set(
        title="How often latents are active",
        xlabel="latents, sorted",
        ylabel="share of the vectors",
        yscale="log",
    )
    ax.set_xlim(-0.02, 1.02)
    ax.xaxis.set_major_formatter("{x:.0%}")


# --------------------------------------------------------------------- parts of several figures


def plot_activity(ax: Axes, metrics: Metrics) -> None:
    """Draw a histogram: how many latents are active on which share of the vectors."""
    often = metrics.counts.cpu().double() / metrics.n
    lowest = -math.ceil(math.log10(max(10, metrics.n)))  # a power of 10, at most 1 / n
    bins = torch.logspace(lowest, 0, 49).tolist()
    ax.hist(often[often > 0].tolist(), bins, color=BLUE)
    mean = max(metrics.l0, 1e-9) / len(often)
    ax.axvline(mean, color=ORANGE, lw=1.3, ls="--", label="mean, L0 / latents")
    ax.set(
        title="How often latents are active",
        xlabel="share of held-out vectors",
        ylabel="latents",
        xscale="log",
    )


def tidy(ax: Axes) -> None:
    """Give a finished panel the style of this project's figures, and its legend."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3, lw=0.6)
    ax.legend(frameon=False, fontsize=8)


class ImageRow(NamedTuple):
    """One row of an `image_grid`."""

    label: str
    images: Tensor
    """(P, 3, H, W) in [0, 1]"""

    captions: list[str] | None = None
    """What stands below each image."""


def image_grid(
    rows: list[ImageRow],
    prompts: list[str],
    title: str = "",
    below: float = 0.0,
    width: float = 0.0,
) -> Figure:
    """Return rows of images, with labels to their left and the prompts above the columns.

    Images have square places; wide pictures, such as a strip of frames or a spectrogram, have
    places of their own shape, which are wider. below: inches that stay free at the bottom. width:
    inches that the figure has at least.
    """
    column_width, image_height = size_of_places(rows)
    line_length = round(21 * column_width / IMAGE)
    texts = []
    for prompt in prompts:
        texts.append(textwrap.fill(prompt, line_length, max_lines=4, placeholder=" …"))
    prompt_lines = max([text.count("\n") + 1 for text in texts], default=0)
    label_lines = [line for row in rows for line in row.label.split("\n")]
    left = 0.3 + 0.065 * max(map(len, label_lines), default=0)
    top = 0.16 + 0.13 * prompt_lines + (0.34 if title else 0.0)
    row_height = image_height + (CAPTION if any(row.captions for row in rows) else 0.0)

    W = max(width, left + column_width * len(prompts) + 0.05)
    H = top + row_height * len(rows) + below
    fig = Figure(figsize=(W, H), facecolor="white")
    shown_width = column_width - GAP
    shown_height = image_height - GAP

    def write(
        x: float, y: float, text: str, ha: str, va: str, size: float, color: str = "black"
    ) -> None:
        """Write a text at x, y, in inches from the top left."""
        fig.text(
            x / W,
            1 - y / H,
            text,
            ha=ha,
            va=va,
            fontsize=size,
            color=color,
            linespacing=1.3,
            parse_math=False,
        )

    write(0.1, 0.1, title, "left", "top", 10)
    for column, text in enumerate(texts):
        x = left + column_width * column
        write(x + shown_width / 2, top - 0.05, text, "center", "bottom", 6.5)
    for number, row in enumerate(rows):
        y = top + row_height * number
        write(left - 0.1, y + shown_height / 2, row.label, "right", "center", 8)
        for column, image in enumerate(row.images):
            x = left + column_width * column
            box = (x / W, 1 - (y + shown_height) / H, shown_width / W, shown_height / H)
            ax = fig.add_axes(box)
            ax.imshow(image.float().permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            ax.set_axis_off()
            if row.captions:
                write(
                    x + shown_width / 2,
                    y + shown_height + 0.03,
                    row.captions[column],
                    "center",
                    "top",
                    5.5,
                    "#666666",
                )
    return fig


def size_of_places(rows: list[ImageRow]) -> tuple[float, float]:
    """Return the width and height in inches of an image in a grid, with the gap to the next."""
    ratio = 1.0
    if rows:
        height, width = rows[0].images.shape[-2:]
        ratio = width / height
    if ratio < WIDE_RATIO:
        return IMAGE, IMAGE
    return WIDE, max(LOWEST, (WIDE - GAP) / ratio + GAP)


def plot_images(
    path: Path, rows: list[ImageRow], prompts: list[str], explanation: str = ""
) -> None:
    """Write an `image_grid` as a PNG. explanation: what its pictures show, see `Media`."""
    image_grid(rows, prompts, explanation).savefig(path, dpi=150)


def plot_ablation_ranking(path: Path, hooks: list[dict], title: str) -> None:
    """Write a PNG of bars: both distances of each hook point, in the order given.

    hooks: records of ablate.json, with "hook_name", "latents" and "images".
    """
    fig = Figure(figsize=(10, 1.3 + 0.3 * len(hooks)), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    fig.suptitle(title, fontsize=10)
    names = [hook["hook_name"] for hook in hooks]
    for ax, key, label in zip(
        axes, ("latents", "images"), ("latents: |a - b| / |b|", "pictures: root mean square")
    ):
        distances = [hook[key] for hook in hooks]
        bars = ax.barh(names, distances, color=BLUE, height=0.7)
        labels = [decimals(distance, 3) for distance in distances]
        ax.bar_label(bars, labels, padding=3, fontsize=8)
        ax.set_xlabel("distance to the untouched " + label, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.margins(x=0.12)
    axes[0].invert_yaxis()  # the first on top
    fig.savefig(path, dpi=130)


def plot_graft(path: Path, report: dict, images: dict[str, Tensor] | None) -> None:
    """Write a PNG of images and, below them, the recovered shares.

    The images are untouched, grafted and mean-ablated in all steps; beside each row stand the
    distances, means over all prompts with standard errors. report, images: of `evaluate.graft`.
    Without images there are the shares alone.
    """
    rows = []
    prompts = []
    if images is not None:
        prompts = [str(prompt) for prompt in report["prompts"][: len(images["untouched"])]]
        rows = [ImageRow(graft_label(mode, report["all"]), images[mode]) for mode in GRAFT_ROWS]

    what = {"output": "output", "input": "input", "diff": "output − input"}[report["side"]]
    title = (
        f"{report['hook_name']}: the SAE's reconstruction of its {what} "
        f"({report['stream']} tokens, {report['rows']} rows)"
    )
    if "pictures" in report:
        title += f"; {report['pictures']}"
    fig = image_grid(rows, prompts, title, below=2.85, width=8.0)
    W, H = fig.get_size_inches()
    draw_recovered(fig.add_axes((0.75 / W, 0.5 / H, (W - 2.2) / W, 1.9 / H)), report)
    fig.savefig(path, dpi=150)


def graft_label(mode: str, window: dict) -> str:
    """Return what stands beside a row of images: its name, and the distances of a window's record.

    mode: untouched, graft or mean.
    """
    label = GRAFT_ROWS[mode]
    if mode == "untouched":
        return label
    for measure, name in GRAFT_LABELS.items():
        if measure not in window:
            continue
        moved = window[measure][mode]
        error = window[measure][f"{mode}_se"]
        label += f"\n{name} "
        label += "not finite" if moved is None else decimals(moved, 3)
        if error is not None:
            label += f" ± {decimals(error, 3)}"
    return label


def window_label(window: dict) -> str:
    """Return the steps and timesteps of a window, for an axis: "steps 0 … 4\\nt = 999 … 799"."""
    first, last = window["steps"]
    start, end = window["timesteps"]
    if first == last:
        return f"step {first}\nt = {start:.4g}"
    return f"steps {first} … {last}\nt = {start:.4g} … {end:.4g}"


def draw_recovered(ax: Axes, report: dict) -> None:
    """Draw bars of the recovered share in all steps and in each window, with standard errors.

    A share that can't be computed is marked with ×.
    """
    windows = {"all steps": report["all"]}
    for window in report["windows"]:
        windows[window_label(window)] = window
    measures = [name for name in GRAFT_COLORS if name in report["all"]]
    width = 0.8 / len(measures)
    for i, name in enumerate(measures):
        offset = (i - (len(measures) - 1) / 2) * width
        xs = [number + offset for number in range(len(windows))]
        records = [window[name] for window in windows.values()]
        shares = [record["recovered"] or 0.0 for record in records]
        errors = [record["recovered_se"] or 0.0 for record in records]
        style = dict(
            color=GRAFT_COLORS[name], label=GRAFT_LABELS[name], error_kw=dict(lw=1, capsize=2)
        )
        ax.bar(xs, shares, 0.92 * width, yerr=errors, **style)
        for x, share, error, record in zip(xs, shares, errors, records):
            text = "×" if record["recovered"] is None else f"{share:.2f}"
            ax.text(x, max(0, share + error) + 0.02, text, ha="center", va="bottom", fontsize=7)
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.axhline(0, color="#333333", linewidth=0.8)
    ax.set_ylim(top=max(1.1, ax.get_ylim()[1]))
    ax.set_xticks(range(len(windows)), list(windows), fontsize=7.5)
    ax.tick_params(axis="y", labelsize=7.5)
    ax.set_ylabel("recovered share", fontsize=8)
    title = (
        "1 − distance(graft) / distance(mean ablation), "
        f"± standard error over {len(report['prompts'])} prompts"
    )
    ax.set_title(title, fontsize=8, loc="left", pad=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
