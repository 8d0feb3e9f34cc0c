"""The folder of a user's project: a model, prompts, collections and SAEs (the fixture `project`).

Functions here work in the current folder, which is the project's.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from files import read_json

import collect
import evaluate
import train
from store.activation_file import contents_checksums
from store.disk import checksum

HOOK = "mid_block.attentions.0"
PROMPTS = [
    f"a {'red' if i % 3 else 'blue'} picture of {'xyzuvw'[i % 6]} and {i}" for i in range(24)
]
QUARTER = dict(share=0.25, at_least=0, at_most=10**9)
"""What is held out, so that a few prompts suffice: a quarter of them."""


def collection_config(model="model", **options):
    """The options of a collection of 16 prompts into acts/, in two steps."""
    defaults = dict(
        model_name=model,
        dataset_name="prompts.txt",
        hook_names=[HOOK],
        num_inference_steps=2,
        height=64,
        width=64,
        batch_size=8,
        max_num_examples=16,
        out_dir="acts",
        device="cpu",
    )
    return collect.Config(**defaults | options)


def train_project_sae(data=f"acts/{HOOK}.npy", name="sae", **options):
    """Train an SAE of 64 latents into `saes/<name>`, and return its folder. data: one file or a list."""
    paths = data if isinstance(data, list) else [str(data)]
    config = train.Config(data=paths, num_latents=[64], k=[4], num_epochs=8, run_name=name)
    return train.main(replace(config, device="cpu", **options))[0]


def evaluation_config(**options):
    """The options of an evaluation of the project's SAE."""
    return evaluate.Config(sae="saes/sae", device="cpu", **options)


def make_project(folder, model_folder):
    """Fill the current folder, `folder`: a collection with both guidance rows, and an SAE for each."""
    shutil.copytree(model_folder, folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    collect.main(collection_config(rows="both"))
    train_project_sae()
    train_project_sae(f"acts/{HOOK}.uncond.npy", "uncond")


def other_weights(folder, scale=1.001):
    """Change one parameter of the denoiser in a model folder a little."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] *= scale
    pipe.unet.save_pretrained(folder / "unet")


def with_description(path, **changes):
    """Copy an activation file to other.npy, whose description says something else; its path."""
    target = path.with_name("other.npy")
    shutil.copy(path, target)
    description = read_json(path.with_suffix(".json")) | changes
    if description["stream"] == "text":
        _, _, tokens, _ = np.load(target, mmap_mode="r").shape
        np.save(target.with_name("other.lengths.npy"), np.full(16, tokens))
    description["contents"] = contents_checksums(target)
    description["checksum"] = checksum(description)
    target.with_suffix(".json").write_text(json.dumps(description))
    return Path(target)
