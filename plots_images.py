"""Figures that show what a model made: rows of images under their prompts, and what was measured of them."""

import textwrap
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

IMAGE = 1.25  # inches, with the gap to the next
GAP = 0.05
CAPTION = 0.17
GRAFT_COLORS = {"latents": "#2f6db5", "images": "#e08a2e", "clip": "#6a9a3b"}
GRAFT_LABELS = {"latents": "latents", "images": "pictures", "clip": "CLIP"}
GRAFT_ROWS = {"untouched": "untouched", "graft": "grafted in all steps", "mean": "mean-ablated in all steps"}


class ImageRow(NamedTuple):
    """One row of an `image_grid`."""

    label: str
    images: Tensor
    """(P, 3, H, W) in [0, 1]"""

    captions: list[str] | None = None
    """What stands below each image."""


def image_grid(rows: list[ImageRow], prompts: list[str], title: str = "", below: float = 0.0, width: float = 0.0) -> Figure:
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

    def write(x: float, y: float, text: str, ha: str, va: str, size: float, color: str = "black") -> None:
        """Text at inches from the top left."""
        fig.text(x / W, 1 - y / H, text, ha=ha, va=va, fontsize=size, color=color, linespacing=1.3, parse_math=False)

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
                write(x + shown / 2, y + shown + 0.03, row.captions[column], "center", "top", 5.5, "#666666")
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
    for ax, key, label in zip(axes, ("latents", "images"), ("latents: |a - b| / |b|", "pictures: root mean square")):
        bars = ax.barh(names, [hook[key] for hook in hooks], color="#2f6db5", height=0.7)
        ax.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
        ax.set_xlabel("distance to the untouched " + label, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.margins(x=0.12)
    axes[0].invert_yaxis()  # the first on top
    fig.savefig(path, dpi=130)


def plot_graft(path: Path, report: dict, images: dict[str, Tensor] | None) -> None:
    """Write a PNG: the images untouched, grafted and mean-ablated in all steps, and the recovered shares below them.

    report, images: of `evaluate.graft`. Beside the rows stand the distances, means over all prompts with standard errors.
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
    """The recovered share in all steps and in each window, with its standard error; × where there is none to report."""
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
        style = dict(color=GRAFT_COLORS[name], label=GRAFT_LABELS[name], error_kw=dict(lw=1, capsize=2))
        ax.bar(places, shares, 0.92 * width, yerr=errors, **style)
        for x, share, error, record in zip(places, shares, errors, records):
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
