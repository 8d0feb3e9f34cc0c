"""Where training writes what it measures: metrics.jsonl always, a tracker if asked for, and a picture at the end."""

import importlib
import json
from contextlib import contextmanager, suppress

from disk import write_atomically
from errors import UsageError
from metrics import plot_activity, tidy


def import_tracker(log_to):
    """The module that --log_to names, None for none. Raises UsageError where it is not installed."""
    try:
        name = {"none": None, "tensorboard": "torch.utils.tensorboard"}.get(log_to, log_to)
        return name and importlib.import_module(name)
    except ImportError:
        raise UsageError(f"--log_to {log_to}: not installed; pip install {log_to}") from None


def read_rows(path):
    """The rows of metrics.jsonl, up to one that a power cut has torn."""
    rows = []
    with suppress(FileNotFoundError, ValueError):
        for line in path.read_text(errors="replace").splitlines():
            rows.append(json.loads(line))
    return rows


@contextmanager
def open_log(cfg, folder, state):
    """A function that records a row in metrics.jsonl and where --log_to says. Rows from after `state` go."""
    path, tracker, run_id = folder / "metrics.jsonl", import_tracker(cfg.log_to), state["run_id"]
    done = state["iteration"] - ("row" in state)  # the last row waits for the held-out numbers
    kept = [row for row in read_rows(path) if row["iteration"] <= done]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    also, close = lambda row: None, lambda: None
    if cfg.log_to == "tensorboard":
        writer = tracker.SummaryWriter(str(folder), purge_step=done + 1)
        also, close = lambda row: [writer.add_scalar(*item, row["iteration"]) for item in row.items()], writer.close
    elif tracker:
        resume = {"resume": "allow", "id": run_id} if cfg.log_to == "wandb" else {"resume": "allow"}  # trackio: by name
        tracker.init(project=cfg.wandb_project, name=f"{folder.name}-{run_id}", config=state["training"], **resume)
        also, close = lambda row: tracker.log(row, step=row["iteration"]), tracker.finish
    try:
        with open(path, "a") as file:
            yield lambda row: (print(json.dumps(row), file=file, flush=True), also(row))
    finally:
        close()


def plot_training(path, rows, held_out, title):
    """Three panels: FVU and dead share over training, with the held-out values; how often latents are active."""
    from matplotlib.figure import Figure  # not pyplot, so that a notebook's backend stays as it is
    from matplotlib.ticker import LogLocator

    blue, orange = dict(color="#2f6db5", lw=1.3), dict(color="#e07b39", lw=1.3, ls="--")
    fig = Figure(figsize=(13, 3.9), layout="constrained")
    fig.suptitle(f"{title}: held-out FVU {held_out.fvu:.3f}, L0 {held_out.l0:.1f}, dead {held_out.dead:.1%}")
    left, middle, right = axes = fig.subplots(1, 3)
    most = max(row["vectors"] for row in rows)
    unit, word = (1e6, "millions") if most >= 1e6 else (1e3, "thousands") if most >= 1e4 else (1, "")
    for ax, name, heading in ((left, "fvu", "Variance not explained (FVU)"), (middle, "dead", "Dead latents")):
        dots = dict(marker="o", ms=4) if len(rows) < 12 else {}
        ax.plot([row["vectors"] / unit for row in rows], [row[name] for row in rows], **blue, **dots, label="in training")
        ax.axhline(getattr(held_out, name), **orange, label="held out, at the end")
        ax.set(title=heading, xlabel=f"training vectors{', ' * bool(word)}{word}", xlim=(0, 1.03 * most / unit))
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
    """FVU against L0 of several SAEs, a line through those of one size and seed; rows: their cfg.json."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6.2, 4.4), layout="constrained")
    ax = fig.subplots()
    sizes = sorted({row["num_latents"] for row in rows})
    for i, size in enumerate(sizes):
        color = colormaps["viridis"](0.9 * i / max(1, len(sizes) - 1))
        seeds = sorted({row["training"]["seed"] for row in rows if row["num_latents"] == size})
        for seed in seeds:
            line = [row for row in rows if (row["num_latents"], row["training"]["seed"]) == (size, seed)]
            line = sorted((row["l0"], row["fvu"]) for row in line)
            label = f"{size} latents" if seed == seeds[0] else None
            ax.plot(*zip(*line), color=color, marker="o", ms=5, lw=1.3, alpha=0.85, label=label)
    every = [(row["l0"], row["fvu"]) for row in rows]
    best = sorted(p for p in every if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in every))
    ax.plot(*zip(*best), color="#444444", ls=":", lw=1.2, label="no other has fewer and better")
    ax.set(title="Fewer active latents or less error", xlabel="active latents a vector (L0)", ylabel="FVU on held-out vectors")
    if max(l0 for l0, _ in every) > 3 * min(l0 for l0, _ in every):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0, None)
    tidy(ax)
    fig.savefig(path, dpi=130)
