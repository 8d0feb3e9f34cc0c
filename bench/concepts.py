"""Does a single feature tell a concept? AUROC on the toy, chosen and scored on different prompts.

    python -m bench concepts                       # collects, trains, scores: 30 min, one core
    python -m bench concepts --sae saes/a saes/b   # only scores

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
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import collect
import train
from analysis.concepts import auroc, image_scores
from bench.step import conditions
from cli import check_positive, resolve_device
from errors import UsageError
from sae import Sae
from store.identity import activations_of
from toy.concepts import CONCEPTS

ALL_SCORES = 1 << 40  # numbers: so many that no image is left out


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


class Choice(NamedTuple):
    """The feature that was chosen for a concept."""

    sae: int
    """Number of its SAE."""

    feature: int
    auroc: float
    """On the prompts that did not choose it."""


def best_features(scores: list[Tensor], shown: Tensor, choosing: Tensor) -> Choice:
    """Return the feature that separates best where `choosing` is true, and its AUROC elsewhere.

    scores: (P, M) of each SAE. shown: bool (P,), the images with the concept. choosing: bool (P,).
    """
    aurocs = [auroc(each[choosing], shown[choosing]) for each in scores]
    which = max(range(len(scores)), key=lambda i: aurocs[i].max())
    feature = int(aurocs[which].argmax())
    others = scores[which][~choosing][:, feature : feature + 1]
    return Choice(which, feature, float(auroc(others, shown[~choosing])[0]))


def train_saes(cfg: Config, work_dir: Path) -> list[Path]:
    """Collect, and train one SAE per hook point; return their folders.

    What `work_dir` holds already is used.
    """
    config = collect.Config(
        hook_names=cfg.hook_names,
        out_dir=str(work_dir / "activations"),
        num_inference_steps=20,
        guidance_scale=5.0,
        max_num_examples=cfg.num_prompts,
        batch_size=32,
        device=cfg.device,
    )
    collect.main(config)

    folders = []
    for name in cfg.hook_names:
        folder = work_dir / "saes" / name
        folders.append(folder)
        if (folder / "sae.safetensors").exists():
            continue
        config = train.Config(
            data=[str(work_dir / "activations" / f"{name}.npy")],
            out_dir=str(folder.parent),
            run_name=name,
            k=[cfg.k],
            expansion_factor=[cfg.expansion_factor],
            num_epochs=cfg.num_epochs,
            device=cfg.device,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(config)
    return folders


def main(cfg: Config) -> None:
    """Print the AUROC of every concept. Raises UsageError for SAEs of different prompts."""
    check_positive(cfg, "num_prompts", "num_epochs", "k", "expansion_factor")
    device = resolve_device(cfg.device)
    print(conditions(device))
    folders = cfg.sae or train_saes(cfg, Path(cfg.work_dir))
    saes = [Sae.load_from_disk(folder, device) for folder in folders]
    sets = [activations_of(sae, "the SAE") for sae in saes]

    rows = sets[0].prompt_lines()
    prompts = [row["prompt"] for row in rows]
    for activations in sets[1:]:
        if [row["prompt"] for row in activations.prompt_lines()] != prompts:
            raise UsageError("--sae: the SAEs were trained on activations of different prompts")

    for pool in cfg.pool:
        scores = []
        for sae, activations in zip(saes, sets):
            of_steps, _ = image_scores(sae, activations, pool, most=ALL_SCORES)  # (P, S, M)
            scores.append(of_steps.mean(1))
        print_scores(pool, scores, rows, [sae.cfg["hook_name"] for sae in saes], cfg)


def print_scores(
    pool: str, scores: list[Tensor], rows: list[dict], hook_names: list[str], cfg: Config
) -> None:
    """Print the table of one way to pool. scores: (P, M) of each SAE; rows: P prompts."""
    choosing = torch.arange(len(rows)) % 2 == 0
    print(
        f"\nimage score: {pool} over tokens, mean over steps; "
        f"{choosing.sum()} prompts choose, {(~choosing).sum()} score"
    )
    for name, values in CONCEPTS.items():
        num_told = 0
        for value in values:
            shown = torch.tensor([row[name] == value for row in rows])
            best = best_features(scores, shown, choosing)
            if best.auroc >= cfg.at_least:
                num_told += 1
            if cfg.show == "all":
                feature = f"{hook_names[best.sae]} {best.feature}"
                print(f"{name:8} {value:10} {best.auroc:.3f}   {feature}")
        print(f"{name:8} {num_told} of {len(values)} at {cfg.at_least} or more", flush=True)
