"""Short trainings: their data, their options, and what a run writes."""

import json

import numpy as np
from files import read_lines
from safetensors import safe_open

from train import Config


def save_vectors(path):
    """Save 8000 vectors as (40 prompts, 2 steps, 100 tokens, 16).

    Each is the sum of about 3 of 24 directions, with a little noise, and not centred.
    """
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((24, 16)) / 4
    codes = np.where(rng.random((8000, 24)) < 1 / 8, rng.gamma(3, 1, (8000, 24)), 0)
    x = codes @ atoms + 0.02 * rng.standard_normal((8000, 16)) + 5
    np.save(path, x.astype(np.float32).reshape(40, 2, 100, 16))


def train_config(data, out_dir, **options):
    """The options of a run of 72 updates per epoch into out_dir/run. k and num_latents may be numbers."""
    defaults = dict(
        num_latents=48,
        k=3,
        effective_batch_size=100,
        lr=3e-3,
        lr_warmup_steps=5,
        save_every=20,
        data=[str(data)],
        out_dir=str(out_dir),
        run_name="run",
        device="cpu",
        mixed_precision="no",
    )
    options = defaults | options
    for name in ("k", "num_latents"):
        if not isinstance(options[name], list):
            options[name] = [options[name]]
    return Config(**options)


def metrics_rows(folder):
    """What a run's metrics.jsonl says."""
    return read_lines(folder / "metrics.jsonl")


def timeless_rows(folder):
    """What a run's metrics.jsonl says, without the seconds, which no two runs have alike."""
    rows = metrics_rows(folder)
    for row in rows:
        row.pop("seconds", None)
    return rows


def saved_state(out_dir):
    """What the checkpoint of out_dir/run says beside its tensors."""
    with safe_open(out_dir / "run" / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["state"])
