"""What collecting costs: collect.py's own loop against the bare pipeline call, in turns.

    python -m bench collect                      # the toy, and two tiny pipelines
    python -m bench collect --rounds 5 --tiny wan zimage

Claim: collecting from the toy is 0.98 times as fast as generating alone (4.5 ms per step more
for 16 images; docs/benchmarks.md; two cores of an AMD EPYC).

A round is one batch. First the pipeline runs alone, with the same prompts, seeds and output_type.
Then collect.py generates, converts and writes the batch, until it asks for the next one. Images are
left out unless --save_images is given. collect.py writes while the next batch is generated; here
one comes after the other, so that all that it costs is counted. The first round is not counted.

    bare /s, collect /s    images per second of either side, by the median time
    ratio                  median of the ratios of both times, round by round
    ms a step more         median of the differences, per sampling step
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch

import collect
from cli import HERE, resolve_device, resolve_dtype
from errors import UsageError
from hook import HookedDiffusionModel


class AtOnce(ThreadPoolExecutor):
    """An executor that has done the work when `submit` returns.

    It makes collect.py write a batch before the next one is generated.
    """

    def submit(self, *arguments):
        future = super().submit(*arguments)
        future.result()
        return future


@dataclass
class Config:
    # data
    tiny: list[str] = field(default_factory=lambda: ["sd15", "sd3"])
    """Measure these tiny pipelines as well; they are recipes of tests/families.py."""

    batch_size: int = 16
    """Generate this many images of the toy at once. The tiny pipelines generate 2."""

    num_inference_steps: int = 20
    """Sample in this many steps."""

    save_images: bool = False
    """Decode the images on both sides, and let collect.py save them."""

    # measuring
    rounds: int = 8
    """Count this many batches of the toy, and five times as many of the tiny pipelines."""

    # hardware
    device: str = "auto"
    """Run on this device: cpu, cuda, cuda:1 or mps. auto takes CUDA, else MPS, else the CPU."""


HOOKS = {
    "sd15": "up_blocks.0.attentions.1",
    "sd3": "transformer_blocks.0",
    "zimage": "layers.1",
    "wan": "blocks.1",
}


def measure(cfg, hooked, hook_name, rounds, batch_size, **pipeline_kwargs):
    """Return (seconds of the bare pipeline, seconds of collecting) of each counted round."""
    marks, original = [], HookedDiffusionModel.run_with_cache

    def run_with_cache(self, hook_names, prompt=None, *, generator, **kwargs):
        marks.append(time.perf_counter())
        ours = ("save_input", "save_output", "rows", "stream", "cache_every_n_timesteps", "later")
        bare = {name: value for name, value in kwargs.items() if name not in ours}
        self(
            prompt,
            generator=[torch.Generator().manual_seed(g.initial_seed()) for g in generator],
            **bare,
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return original(self, hook_names, prompt, generator=generator, **kwargs)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text(
            "".join(
                f"a red fox in snow, number {i:03d}\n" for i in range((rounds + 2) * batch_size)
            )
        )
        config = collect.Config(
            hook_names=[hook_name],
            dataset_name=str(prompts),
            out_dir=f"{folder}/activations",
            batch_size=batch_size,
            max_num_examples=None,
            num_inference_steps=cfg.num_inference_steps,
            pipeline_kwargs=json.dumps(pipeline_kwargs),
            save_images=cfg.save_images,
            device=cfg.device,
        )
        with (
            patch.object(HookedDiffusionModel, "from_pretrained", lambda *args, **kwargs: hooked),
            patch.object(HookedDiffusionModel, "run_with_cache", run_with_cache),
            patch.object(collect, "ThreadPoolExecutor", AtOnce),
        ):
            collect.main(config)
    return [
        (middle - begin, end - middle)
        for begin, middle, end in zip(marks[0::2], marks[1::2], marks[2::2])
    ][1:]


def main(cfg: Config) -> None:
    """Print one line per pipeline. Raises UsageError for a recipe that is not in HOOKS."""
    if wrong := [name for name in cfg.tiny if name not in HOOKS]:
        raise UsageError(f"--tiny {wrong[0]}: expected {', '.join(HOOKS)}")
    sys.path.insert(0, str(HERE / "tests"))
    import families
    from tiny import build

    device = resolve_device(cfg.device)
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(
        f"{chip}; torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{cfg.num_inference_steps} steps\n"
    )
    print(
        "pipeline  hook name                    batch  bare /s  collect /s  ratio  ms a step more"
    )
    toy = HookedDiffusionModel.from_pretrained("toy", resolve_dtype("auto", device), device)
    jobs = [("toy", toy, "up_blocks.1.attentions.1", cfg.rounds, cfg.batch_size, {})]
    for name in cfg.tiny:
        recipe = getattr(families, name)
        options = {n: v for n, v in recipe.options.items() if not callable(v)}
        jobs.append(
            (
                name,
                HookedDiffusionModel.from_pipeline(build(recipe).to(device)),
                HOOKS[name],
                5 * cfg.rounds,
                2,
                options,
            )
        )
    for name, hooked, hook_name, rounds, batch_size, options in jobs:
        times = measure(cfg, hooked, hook_name, rounds, batch_size, **options)
        bare, ours = (batch_size / statistics.median(side) for side in zip(*times))
        ratio = statistics.median(b / o for b, o in times)
        more = statistics.median(o - b for b, o in times) / cfg.num_inference_steps * 1e3
        print(
            f"{name:9} {hook_name:28} {batch_size:5}  {bare:7.2f}  "
            f"{ours:10.2f}  {ratio:5.3f}  {more:14.2f}"
        )
