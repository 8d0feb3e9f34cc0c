"""Does a single feature tell a concept? AUROC on the toy, chosen and scored on different prompts.

    python -m bench concepts                            # collects, trains, scores: 30 minutes, one core
    python -m bench concepts --sae saes/a saes/b        # only scores

For each object, style and colour one feature is chosen, of all of the SAEs: the one whose image
score best separates the images that show the concept from the others, on the prompts with an even
number. Its AUROC on the prompts with an odd number is printed.

The image score is the latent's activation, mean or max over tokens (--pool), mean over steps. The
prompts' own words are the labels: all of 576 images showed what was asked for (toy/check.json).

    <concept> <value> <AUROC>   <hook name> <feature>
"""

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import collect
import train
from analysis.concepts import auroc, image_scores
from bench.step import conditions
from cli import check_positive, resolve_device
from errors import UsageError
from sae import Sae
from store.identity import activations_of
from toy.concepts import CONCEPTS


@dataclass
class Config:
    # model
    hook_names: list[str] = field(
        default_factory=lambda: [
            "mid_block.attentions.0",
            "up_blocks.1.attentions.0",
            "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
        ]
    )
    """Train one SAE at each of these hook points. The first two are where ablation finds objects
    and styles; at the third one the text's colour comes in."""

    sae: list[str] = field(default_factory=list)
    """Score the SAEs in these folders on their training activations. If not given, SAEs are
    trained."""

    k: int = 16
    """Keep this many latents active per vector."""

    expansion_factor: int = 16
    """Give the SAEs this many latents, as a multiple of the vectors' width."""

    # data
    num_prompts: int = 384
    """Collect from this many prompts, in 20 steps at guidance 5."""

    # training
    num_epochs: int = 4
    """Pass over the training vectors this often."""

    # scoring
    pool: list[str] = field(default_factory=lambda: ["mean"])
    """Score an image by the mean or the max over its tokens. Give both words to see both."""

    at_least: float = 0.95
    """Count a concept as told from this AUROC on."""

    # output
    show: Literal["all", "summary"] = "all"
    """Print every concept, or only how many are told."""

    work_dir: str = "concepts"
    """Keep activations and SAEs in this folder. What it holds already is used again."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


def best_features(scores, there, choice):
    """Chosen where `choice`, scored elsewhere: [(P, M) of each SAE], bool (P,), bool (P,) -> (SAE,
    feature, AUROC)."""
    on_choice = [auroc(s[choice], there[choice]) for s in scores]
    which = max(range(len(scores)), key=lambda i: on_choice[i].max())
    feature = int(on_choice[which].argmax())
    return (
        which,
        feature,
        float(auroc(scores[which][~choice][:, feature : feature + 1], there[~choice])[0]),
    )


def train_some(cfg, work):
    """Collect, and train an SAE a hook point: their folders. What is in `work` already is used."""
    options = dict(
        num_inference_steps=20,
        guidance_scale=5.0,
        max_num_examples=cfg.num_prompts,
        batch_size=32,
        device=cfg.device,
    )
    collect.main(
        collect.Config(hook_names=cfg.hook_names, out_dir=str(work / "activations"), **options)
    )
    folders = [work / "saes" / name for name in cfg.hook_names]
    for folder in folders:
        if not (folder / "sae.safetensors").exists():
            size = dict(
                k=[cfg.k], expansion_factor=[cfg.expansion_factor], num_epochs=cfg.num_epochs
            )
            given = dict(
                data=[str(work / "activations" / f"{folder.name}.npy")], out_dir=str(folder.parent)
            )
            with contextlib.redirect_stdout(io.StringIO()):
                train.main(train.Config(**given, **size, run_name=folder.name, device=cfg.device))
    return folders


def main(cfg):
    check_positive(cfg, "num_prompts", "num_epochs", "k", "expansion_factor")
    device = resolve_device(cfg.device)
    print(conditions(device))
    saes = [
        Sae.load_from_disk(path, device) for path in cfg.sae or train_some(cfg, Path(cfg.work_dir))
    ]
    sets = [activations_of(sae, "the SAE") for sae in saes]
    listings = [activations.rows_of_prompts() for activations in sets]
    rows = listings[0]
    if any([r["prompt"] for r in listing] != [r["prompt"] for r in rows] for listing in listings):
        raise UsageError("the SAEs are of activations of different prompts")
    for pool in cfg.pool:
        scores = [
            image_scores(sae, activations, pool, most=1 << 40)[0].mean(1)
            for sae, activations in zip(saes, sets)
        ]
        choice = torch.arange(len(rows)) % 2 == 0
        print(
            f"\nimage score: {pool} over tokens, mean over steps; {choice.sum()} prompts choose, {(~choice).sum()} score"
        )
        for name, values in CONCEPTS.items():
            told = 0
            for value in values:
                there = torch.tensor([row[name] == value for row in rows])
                which, feature, area = best_features(scores, there, choice)
                told += area >= cfg.at_least
                if cfg.show == "all":
                    print(
                        f"{name:8} {value:10} {area:.3f}   {saes[which].cfg['hook_name']} {feature}"
                    )
            print(f"{name:8} {told} of {len(values)} at {cfg.at_least} or more", flush=True)
