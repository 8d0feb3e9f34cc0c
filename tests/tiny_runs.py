"""Runs of tiny models: their arguments, and collections and SAEs made by the scripts' own `main`."""

from pathlib import Path

import numpy as np
from files import read_lines, write_activations
from tiny import generate_options

import collect
import train
from sae import Sae

COLLECTED_HOOKS = ["up_blocks.0.attentions.1", "mid_block"]
"""The modules of the fixture `collect_config`."""


def prompt_and_options(n, recipe, **options):
    """The prompts of a short generation (None if the pipeline takes none), and its other arguments."""
    options = generate_options(n, recipe, **options)
    return options.pop("prompt", None), options


def collect_tiny(model_folder, folder, **options):
    """Collect `mid_block` of a tiny model in two steps into `folder / "acts"`.

    options: fields of `collect.Config`. Returns the lines of the collection's prompts.jsonl.
    """
    defaults = dict(
        model_name=str(model_folder),
        hook_names=["mid_block"],
        num_inference_steps=2,
        height=32,
        width=32,
        out_dir=str(folder / "acts"),
        store_dtype="float32",
        device="cpu",
    )
    config = collect.Config(**defaults | options)
    collect.main(config)
    return read_lines(Path(config.out_dir) / "prompts.jsonl")


def save_untrained_sae(folder, data):
    """Save an SAE with random weights of 40 latents that fits `mid_block` of the tiny model."""
    cfg = {"data": [str(data)], "hook_name": "mid_block"}
    Sae(16, 40, 4, cfg).save_to_disk(folder)


def train_on_described_file(folder):
    """Write `folder / "acts" / "block.npy"`, of 40 prompts, and train `folder / "sae"` on it."""
    (folder / "acts").mkdir()
    path = folder / "acts" / "block.npy"
    x = np.random.default_rng(0).standard_normal((40, 2, 64, 8)).astype(np.float32)
    write_activations(path, x, grid=[8, 8])
    config = train.Config(
        data=[str(path)],
        num_latents=[32],
        k=[4],
        out_dir=str(folder),
        run_name="sae",
        device="cpu",
    )
    train.main(config)
