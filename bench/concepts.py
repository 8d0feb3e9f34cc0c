"""Does a single feature tell a concept? AUROC on the toy, chosen on half of the prompts and scored
on the other half.

    python -m bench concepts                            # collects, trains and scores: half an hour of one core
    python -m bench concepts --sae saes/a saes/b        # only scores

For each object, style and colour: the feature, of all of the SAEs, whose image score separates the
pictures with it from those without best on the even prompts, and its AUROC on the odd ones. Image
score: the latent's activation, mean or max over tokens (--pool), mean over steps. The prompts' own
words are the labels: of 576 pictures all show what was asked for (toy/check.json).
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
    hook_names: list[str] = field(
        default_factory=lambda: [
            "mid_block.attentions.0",
            "up_blocks.1.attentions.0",
            "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
        ]
    )
    """An SAE each: where ablation says that objects and styles are, and where the text's colour
    comes in."""

    sae: list[str] = field(default_factory=list)
    """Folders of SAEs to score instead, on the activations that they are of."""

    num_prompts: int = 384
    """Pictures that are collected, in 20 steps at guidance 5."""

    num_epochs: int = 4
    """Of training each SAE."""

    k: int = 16
    """Active latents a vector."""

    expansion_factor: int = 16
    """Latents as a multiple of the width."""

    pool: list[str] = field(default_factory=lambda: ["mean"])
    """Of the tokens: mean, max or both."""

    at_least: float = 0.95
    """AUROC that counts as telling it."""

    show: Literal["all", "summary"] = "all"
    """Every concept, or only how many are told."""

    work_dir: str = "concepts"
    """Activations and SAEs; what is there is used again."""

    device: str = "auto"
    """Auto, cuda, cuda:N, mps, cpu."""


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
    where, versions, commit = conditions(device)
    print(f"{where}; {versions}; commit {commit}")
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
