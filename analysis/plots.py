"""Every figure: curves of training, sweeps, evaluations and diagnoses, and grids of images. The
numbers are defined elsewhere."""

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
from analysis.metrics import total

BLUE, ORANGE, GREY = "#2f6db5", "#e07b39", "#888888"
CENTERED = {"median": "centred on the median", "mean": "centred on the mean", "none": "not centred"}
IMAGE = 1.25  # inches, with the gap to the next
GAP = 0.05
CAPTION = 0.17
GRAFT_COLORS = {"latents": BLUE, "images": "#e08a2e", "clip": "#6a9a3b"}
GRAFT_LABELS = {"latents": "latents", "images": "pictures", "clip": "CLIP"}
GRAFT_ROWS = {
    "untouched": "untouched",
    "graft": "grafted in all steps",
    "mean": "mean-ablated in all steps",
}


def plot_training(path, rows, held_out, title):
    """Three panels: FVU and dead share over training, with the held-out values; how often latents
    are active."""
    blue, orange = dict(color=BLUE, lw=1.3), dict(color=ORANGE, lw=1.3, ls="--")
    fig = Figure(figsize=(13, 3.9), layout="constrained")
    fig.suptitle(
        f"{title}: held-out FVU {held_out.fvu:.3f}, L0 {held_out.l0:.1f}, dead {held_out.dead:.1%}"
    )
    left, middle, right = axes = fig.subplots(1, 3)
    most = max(row["vectors"] for row in rows)
    unit, word = (
        (1e6, "millions") if most >= 1e6 else (1e3, "thousands") if most >= 1e4 else (1, "")
    )
    for ax, name, heading in (
        (left, "fvu", "Variance not explained (FVU)"),
        (middle, "dead", "Dead latents"),
    ):
        dots = dict(marker="o", ms=4) if len(rows) < 12 else {}
        ax.plot(
            [row["vectors"] / unit for row in rows],
            [row[name] for row in rows],
            **blue,
            **dots,
            label="in training",
        )
        ax.axhline(getattr(held_out, name), **orange, label="held out, at the end")
        ax.set(
            title=heading,
            xlabel=f"training vectors{', ' * bool(word)}{word}",
            xlim=(0, 1.03 * most / unit),
        )
    values = [held_out.fvu, *(row["fvu"] for row in rows)]
    if max(values) > 3 * min(values) > 0:
        left.set_yscale("log", subs=[])
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:.2g}")
    middle.set_ylim(0, 1.1 * max(0.1, held_out.dead, *(row["dead"] for row in rows)))
    middle.yaxis.set_major_formatter("{x:.0%}")
    plot_activity(right, held_out)
    for ax in axes:
        tidy(ax)
    fig.savefig(path, dpi=130)


def plot_sweep(path, rows):
    """FVU against L0 of several SAEs, a line through those of one size and seed; rows: their
    cfg.json."""
    fig = Figure(figsize=(6.2, 4.4), layout="constrained")
    ax = fig.subplots()
    sizes = sorted({row["num_latents"] for row in rows})
    for i, size in enumerate(sizes):
        color = colormaps["viridis"](0.9 * i / max(1, len(sizes) - 1))
        seeds = sorted({row["training"]["seed"] for row in rows if row["num_latents"] == size})
        for seed in seeds:
            line = [
                row for row in rows if (row["num_latents"], row["training"]["seed"]) == (size, seed)
            ]
            line = sorted((row["l0"], row["fvu"]) for row in line)
            label = f"{size} latents" if seed == seeds[0] else None
            ax.plot(*zip(*line), color=color, marker="o", ms=5, lw=1.3, alpha=0.85, label=label)
    every = [(row["l0"], row["fvu"]) for row in rows]
    best = sorted(
        p for p in every if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in every)
    )
    ax.plot(*zip(*best), color="#444444", ls=":", lw=1.2, label="no other has fewer and better")
    ax.set(
        title="Fewer active latents or less error",
        xlabel="active latents a vector (L0)",
        ylabel="FVU on held-out vectors",
    )
    if max(l0 for l0, _ in every) > 3 * min(l0 for l0, _ in every):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0, None)
    tidy(ax)
    fig.savefig(path, dpi=130)


def plot_evaluation(path, by_step, timesteps, title):
    """Four panels: FVU and cosine, L0, silent and always-on latents by timestep; how often latents
    are active."""
    whole = total(by_step)
    fig = Figure(figsize=(15, 3.7), layout="constrained")
    numbers = (
        f"FVU {whole.fvu:.4f}, cosine {whole.cosine:.4f}, L0 {whole.l0:.1f}, dead {whole.dead:.2%}"
    )
    numbers += f", always on {whole.always_on:.2%}; {whole.n:,} held-out vectors"
    fig.suptitle(f"{title}: {numbers}", fontsize=11)
    axes = fig.subplots(1, 4)
    x, by_step = zip(*((t, metrics) for t, metrics in zip(timesteps or [0], by_step) if metrics.n))
    dots = dict(marker="o", ms=3.5, lw=1.3)
    for ax, heading, lines in (
        (axes[0], "Variance not explained (FVU)", [("fvu", BLUE, "at this timestep")]),
        (axes[1], "Active latents a vector (L0)", [("l0", BLUE, "at this timestep")]),
        (
            axes[2],
            "Share of latents",
            [("dead", BLUE, "silent at this timestep"), ("always_on", ORANGE, "always on")],
        ),
    ):
        for name, color, label in lines:
            ax.plot(
                x, [getattr(metrics, name) for metrics in by_step], color=color, label=label, **dots
            )
        ax.set(
            title=heading,
            xlabel="timestep (noise on the left)" if timesteps else "",
            ylim=(0, None),
        )
        if not timesteps:
            ax.set_xticks([])
        if len(lines) == 1:
            ax.axhline(
                getattr(whole, lines[0][0]), color=ORANGE, ls="--", lw=1.2, label="of all together"
            )
    if len(x) > 1 and x[0] > x[-1]:
        for ax in axes[:3]:
            ax.invert_xaxis()
    axes[2].yaxis.set_major_formatter("{x:.0%}")
    plot_activity(axes[3], whole)
    for ax in axes:
        tidy(ax)
    fig.savefig(path, dpi=130)


def plot_diagnosis(path, found, title):
    """Four panels: RMS by timestep, power by dimension, eigenvalues, how often latents fire."""
    blue, orange, grey = (dict(color=color, lw=1.4) for color in (BLUE, ORANGE, GREY))
    fig = Figure(figsize=(11, 7.4), layout="constrained")
    fig.suptitle(title, fontsize=12, parse_math=False)
    (by_step, by_dim), (by_rank, by_latent) = axes = fig.subplots(2, 2)
    ranks = range(1, found["d"] + 1)

    if "timesteps" in found:
        dots = dict(marker="o", ms=3.5)
        by_step.plot(found["timesteps"], found["rms_by_step"], **blue, **dots, label="as they are")
        by_step.plot(
            found["timesteps"],
            found["spread_by_step"],
            **orange,
            **dots,
            label="about their common mean",
        )
        by_step.set(
            title="RMS by timestep", xlabel="timestep, in the order of sampling", ylabel="RMS"
        )
        by_step.set_ylim(bottom=0)
        if found["timesteps"][0] > found["timesteps"][-1]:
            by_step.invert_xaxis()
    else:
        by_step.plot(
            found["rms_percentiles"], [p / 100 for p in range(101)], **blue, label="sampled vectors"
        )
        by_step.set(
            title="RMS of vectors",
            xlabel="RMS of a vector's numbers, at most",
            ylabel="share of the vectors",
            ylim=(0, 1.02),
        )
        by_step.yaxis.set_major_formatter("{x:.0%}")

    power = sorted((m**2 + v, v) for m, v in zip(found["mean"], found["variance"]))[::-1]
    by_dim.plot(ranks, [p for p, _ in power], **blue, label="mean² + variance")
    by_dim.plot(
        ranks, [v for _, v in power], color=ORANGE, ls="", marker=".", ms=4, label="variance alone"
    )
    limit = OUTLIER**2 * statistics.median(p for p, _ in power)
    by_dim.axhline(limit, **grey, ls="--", label=f"outliers: {OUTLIER} times the median RMS")
    by_dim.set(
        title=f"Power by dimension: gamma {found['gamma']:.2f}",
        xlabel="dimension, sorted",
        ylabel="power",
        yscale="log",
    )

    total = sum(found["eigenvalues"])
    by_rank.plot(
        ranks, [max(l / total, 1e-12) for l in found["eigenvalues"]], **blue, label="eigenvalues"
    )
    by_rank.axvline(
        found["effective_rank"],
        **grey,
        ls="--",
        label=f"effective rank {found['effective_rank']:.1f} of {found['d']}",
    )
    by_rank.set(
        title="Spectrum of the covariance",
        xlabel="eigenvalue, sorted",
        ylabel="share of the variance",
        yscale="log",
    )

    for way, style in zip(found["dead"], (blue, orange)):
        for when, line in (("start", ":"), ("trained", "-")):
            fires = found["fires"][way][when].sort(descending=True).values.double()
            after = (
                "at the start"
                if when == "start"
                else f"after {found['dead'][way]['updates']} updates"
            )
            label = f"{CENTERED[way]}, {after}: {found['dead'][way][when]:.1%} dead"
            alive = fires[fires > 0] / found["num_counted"]
            by_latent.plot(
                [(i + 1) / len(fires) for i in range(len(alive))],
                alive.tolist(),
                **style,
                ls=line,
                label=label,
            )
    by_latent.axhline(found["k"] / found["num_latents"], **grey, ls="--", label="mean, k / latents")
    by_latent.set(
        title="How often latents are active",
        xlabel="latents, sorted",
        ylabel="share of the vectors",
        yscale="log",
    )
    by_latent.set_xlim(-0.02, 1.02)
    by_latent.xaxis.set_major_formatter("{x:.0%}")
    for ax in axes.flat:
        tidy(ax)
    fig.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    fig.savefig(path, dpi=140)


def plot_activity(ax, metrics):
    """A histogram: how many latents are active on which share of the vectors."""
    often = metrics.counts.cpu().double() / metrics.n
    bins = torch.logspace(-math.ceil(math.log10(max(10, metrics.n))), 0, 49).tolist()
    ax.hist(often[often > 0].tolist(), bins, color=BLUE)
    ax.axvline(
        max(metrics.l0, 1e-9) / len(often),
        color=ORANGE,
        lw=1.3,
        ls="--",
        label="mean, L0 / latents",
    )
    ax.set(
        title="How often latents are active",
        xlabel="share of held-out vectors",
        ylabel="latents",
        xscale="log",
    )


def tidy(ax):
    """What every panel of this project's pictures ends with."""
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
    """Rows of images, labels to their left, and the prompts above the columns.

    below: inches that stay free at the bottom. width: of the figure, in inches, at least.
    """
    texts = [textwrap.fill(prompt, 21, max_lines=4, placeholder=" …") for prompt in prompts]
    prompt_lines = max([text.count("\n") + 1 for text in texts], default=0)
    label_lines = [line for row in rows for line in row.label.split("\n")]
    left = 0.3 + 0.065 * max(map(len, label_lines), default=0)
    top = 0.16 + 0.13 * prompt_lines + (0.34 if title else 0.0)
    row_height = IMAGE + (CAPTION if any(row.captions for row in rows) else 0.0)

    W = max(width, left + IMAGE * len(prompts) + 0.05)
    H = top + row_height * len(rows) + below
    fig = Figure(figsize=(W, H), facecolor="white")
    shown = IMAGE - GAP

    def write(
        x: float, y: float, text: str, ha: str, va: str, size: float, color: str = "black"
    ) -> None:
        """Text at inches from the top left."""
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
        write(left + IMAGE * column + shown / 2, top - 0.05, text, "center", "bottom", 6.5)
    for number, row in enumerate(rows):
        y = top + row_height * number
        write(left - 0.1, y + shown / 2, row.label, "right", "center", 8)
        for column, image in enumerate(row.images):
            x = left + IMAGE * column
            ax = fig.add_axes((x / W, 1 - (y + shown) / H, shown / W, shown / H))
            ax.imshow(image.float().permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            ax.set_axis_off()
            if row.captions:
                write(
                    x + shown / 2,
                    y + shown + 0.03,
                    row.captions[column],
                    "center",
                    "top",
                    5.5,
                    "#666666",
                )
    return fig


def plot_images(path: Path, rows: list[ImageRow], prompts: list[str]) -> None:
    """Write an `image_grid` as a PNG."""
    image_grid(rows, prompts).savefig(path, dpi=150)


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
        bars = ax.barh(names, [hook[key] for hook in hooks], color=BLUE, height=0.7)
        ax.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
        ax.set_xlabel("distance to the untouched " + label, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.margins(x=0.12)
    axes[0].invert_yaxis()  # the first on top
    fig.savefig(path, dpi=130)


def plot_graft(path: Path, report: dict, images: dict[str, Tensor] | None) -> None:
    """Write a PNG: the images untouched, grafted and mean-ablated in all steps, and the recovered
    shares below them.

    report, images: of `evaluate.graft`. Beside the rows stand the distances, means over all prompts
    with standard errors.
    """
    rows, prompts = [], []
    if images is not None:
        prompts = [str(prompt) for prompt in report["prompts"][: len(images["untouched"])]]
        rows = [ImageRow(graft_label(mode, report["all"]), images[mode]) for mode in GRAFT_ROWS]

    what = {"output": "output", "diff": "output − input"}[report["side"]]
    title = f"{report['hook_name']}: the SAE's reconstruction of its {what} ({report['stream']} tokens, {report['rows']} rows)"
    fig = image_grid(rows, prompts, title, below=2.85, width=8.0)
    W, H = fig.get_size_inches()
    draw_recovered(fig.add_axes((0.75 / W, 0.5 / H, (W - 2.2) / W, 1.9 / H)), report)
    fig.savefig(path, dpi=150)


def graft_label(mode: str, window: dict) -> str:
    """What stands beside a row of images, with the distances of a window's record."""
    label = GRAFT_ROWS[mode]
    if mode == "untouched":
        return label
    for measure, name in GRAFT_LABELS.items():
        if measure not in window:
            continue
        moved, error = window[measure][mode], window[measure][f"{mode}_se"]
        label += f"\n{name} " + ("not finite" if moved is None else f"{moved:.3f}")
        label += "" if error is None else f" ± {error:.3f}"
    return label


def window_label(window: dict) -> str:
    """Steps and timesteps of a window, for an axis."""
    first, last = window["steps"]
    start, end = window["timesteps"]
    if first == last:
        return f"step {first}\nt = {start:g}"
    return f"steps {first} … {last}\nt = {start:g} … {end:g}"


def draw_recovered(ax: Axes, report: dict) -> None:
    """The recovered share in all steps and in each window, with its standard error; × where there
    is none to report."""
    windows = {"all steps": report["all"]}
    for window in report["windows"]:
        windows[window_label(window)] = window
    measures = [name for name in GRAFT_COLORS if name in report["all"]]
    width = 0.8 / len(measures)
    for i, name in enumerate(measures):
        offset = (i - (len(measures) - 1) / 2) * width
        places = [place + offset for place in range(len(windows))]
        records = [window[name] for window in windows.values()]
        shares = [record["recovered"] or 0.0 for record in records]
        errors = [record["recovered_se"] or 0.0 for record in records]
        style = dict(
            color=GRAFT_COLORS[name], label=GRAFT_LABELS[name], error_kw=dict(lw=1, capsize=2)
        )
        ax.bar(places, shares, 0.92 * width, yerr=errors, **style)
        for x, share, error, record in zip(places, shares, errors, records):
            text = "×" if record["recovered"] is None else f"{share:.2f}"
            ax.text(x, max(0, share + error) + 0.02, text, ha="center", va="bottom", fontsize=7)
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.axhline(0, color="#333333", linewidth=0.8)
    ax.set_ylim(top=max(1.1, ax.get_ylim()[1]))
    ax.set_xticks(range(len(windows)), list(windows), fontsize=7.5)
    ax.tick_params(axis="y", labelsize=7.5)
    ax.set_ylabel("recovered share", fontsize=8)
    title = f"1 − distance(graft) / distance(mean ablation), ± standard error over {len(report['prompts'])} prompts"
    ax.set_title(title, fontsize=8, loc="left", pad=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
