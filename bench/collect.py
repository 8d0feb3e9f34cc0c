"""What collecting costs: collect.py's own loop against the bare pipeline call, in turns.

    python -m bench collect                      # the toy, and two tiny pipelines
    python -m bench collect --rounds 5 --tiny wan zimage

Claim: collecting from the toy is 0.98 times as fast as generating alone (4.5 ms per step more
for 16 images; docs/benchmarks.md; two cores of an AMD EPYC).

A round is one batch. First the pipeline runs alone, with the same prompts, seeds and output_type.
Then collect.py generates, converts and writes the batch, until it asks for the next one. Images are
left out unless --save_images is given. collect.py writes while the next batch is generated; here it
writes first, so that everything that it costs is counted. The first round is not counted.

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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

import collect
from cli import HERE, resolve_device, resolve_dtype
from errors import UsageError
from hook import HookedDiffusionModel

TOY_HOOK = "up_blocks.1.attentions.1"

HOOKS = {
    "sd15": "up_blocks.0.attentions.1",
    "sd3": "transformer_blocks.0",
    "zimage": "layers.1",
    "wan": "blocks.1",
}
"""{recipe of tests/families.py: the module that is hooked}."""

TINY_BATCH = 2  # images of the tiny pipelines that are generated at once
TINY_ROUNDS = 5  # times as many rounds as the toy, since their steps take a few milliseconds

# Arguments of `run_with_cache` that the pipeline does not take
CACHE_OPTIONS = (
    "save_input",
    "save_output",
    "rows",
    "stream",
    "keep_padding",
    "cache_every_n_timesteps",
    "later",
)

RUN_WITH_CACHE = HookedDiffusionModel.run_with_cache  # which `time_both` replaces for a while


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


class Job(NamedTuple):
    """One row of the table."""

    name: str
    model: HookedDiffusionModel
    hook_name: str

    rounds: int
    """How many batches are counted."""

    batch_size: int

    pipeline_kwargs: dict
    """Further arguments of the pipeline."""


class Round(NamedTuple):
    """The seconds of one batch on either side."""

    bare: float
    collecting: float


def main(cfg: Config) -> None:
    """Print one line per pipeline. Raises UsageError for a recipe that is not in HOOKS."""
    for name in cfg.tiny:
        if name not in HOOKS:
            raise UsageError(f"--tiny {name}: expected {', '.join(HOOKS)}")

    device = resolve_device(cfg.device)
    chip = f"{os.cpu_count()} CPU cores"
    if device.type == "cuda":
        chip = torch.cuda.get_device_name()
    print(
        f"{chip}; torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{cfg.num_inference_steps} steps\n"
    )
    print(
        "pipeline  hook name                    batch  bare /s  collect /s  ratio  ms a step more"
    )
    toy = HookedDiffusionModel.from_pretrained("toy", resolve_dtype("auto", device), device)
    jobs = [Job("toy", toy, TOY_HOOK, cfg.rounds, cfg.batch_size, {})]
    for name in cfg.tiny:
        jobs.append(tiny_job(name, cfg.rounds, device))
    for job in jobs:
        print_row(job, measure(job, cfg), cfg.num_inference_steps)


def tiny_job(name: str, rounds: int, device: torch.device) -> Job:
    """Return the row of a tiny pipeline with random weights, by its recipe in tests/families.py."""
    sys.path.insert(0, str(HERE / "tests"))
    import families
    from tiny import build

    recipe = getattr(families, name)
    model = HookedDiffusionModel.from_pipeline(build(recipe).to(device))
    options = {}
    for option, value in recipe.options.items():
        if not callable(value):
            options[option] = value
    return Job(name, model, HOOKS[name], TINY_ROUNDS * rounds, TINY_BATCH, options)


def measure(job: Job, cfg: Config) -> list[Round]:
    """Return the seconds of the bare pipeline and of collecting, of each counted round."""
    marks = []  # the time when the bare pipeline begins and when it ends, for each batch
    num_batches = job.rounds + 2  # the first is not counted, and the end of the last is not seen
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        prompts = Path(folder) / "prompts.txt"
        with prompts.open("w") as file:
            for number in range(num_batches * job.batch_size):
                file.write(f"a red fox in snow, number {number:03d}\n")

        config = collect.Config(
            hook_names=[job.hook_name],
            dataset_name=str(prompts),
            out_dir=f"{folder}/activations",
            batch_size=job.batch_size,
            max_num_examples=None,
            num_inference_steps=cfg.num_inference_steps,
            pipeline_kwargs=json.dumps(job.pipeline_kwargs),
            save_images=cfg.save_images,
            device=cfg.device,
        )
        timed = partialmethod(time_both, marks)
        with (
            patch.object(HookedDiffusionModel, "from_pretrained", return_value=job.model),
            patch.object(HookedDiffusionModel, "run_with_cache", timed),
            patch.object(collect, "ThreadPoolExecutor", AtOnce),
        ):
            collect.main(config)

    begins = marks[0::2]
    middles = marks[1::2]
    ends = begins[1:]  # collect.py asks for the next batch
    rounds = []
    for begin, middle, end in zip(begins, middles, ends):
        rounds.append(Round(middle - begin, end - middle))
    return rounds[1:]


def time_both(
    model: HookedDiffusionModel,
    marks: list[float],
    hook_names: str | list[str],
    prompt: str | list[str] | None = None,
    *,
    generator: list[torch.Generator],
    **kwargs: Any,
) -> Any:
    """Run the bare pipeline, then return what `run_with_cache` returns.

    The times before and after the bare run are appended to `marks`. kwargs: of `run_with_cache`.
    """
    marks.append(time.perf_counter())
    bare = {name: value for name, value in kwargs.items() if name not in CACHE_OPTIONS}
    same_seeds = [torch.Generator().manual_seed(g.initial_seed()) for g in generator]
    model(prompt, generator=same_seeds, **bare)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    marks.append(time.perf_counter())
    return RUN_WITH_CACHE(model, hook_names, prompt, generator=generator, **kwargs)


class AtOnce(ThreadPoolExecutor):
    """An executor that has done the work when `submit` returns.

    It makes collect.py write a batch before the next one is generated.
    """

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """Return the future of function(*arguments), which has a result already."""
        future = super().submit(function, *arguments)
        future.result()
        return future


def print_row(job: Job, rounds: list[Round], num_steps: int) -> None:
    """Print the line of a pipeline."""
    bare_speed = job.batch_size / statistics.median(each.bare for each in rounds)
    speed = job.batch_size / statistics.median(each.collecting for each in rounds)
    ratio = statistics.median(each.bare / each.collecting for each in rounds)
    difference = statistics.median(each.collecting - each.bare for each in rounds)
    milliseconds = 1e3 * difference / num_steps
    print(
        f"{job.name:9} {job.hook_name:28} {job.batch_size:5}  {bare_speed:7.2f}  "
        f"{speed:10.2f}  {ratio:5.3f}  {milliseconds:14.2f}"
    )
