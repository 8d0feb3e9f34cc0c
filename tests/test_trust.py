"""The quick part of `python -m bench trust`: what is stored and edited against hooks written by
hand, bit for bit."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from files import read_lines

import collect
from bench.trust import FAMILIES, GUIDANCE, HOOK, PROMPTS, differences, family_differences

# a column of every kind for one scheduler, and schedulers of every kind: ancestral, second order,
# SDE
pytestmark = pytest.mark.slow

CELLS = [("DDIM", guidance, number) for guidance in GUIDANCE for number in (1, 2)]
CELLS += [
    (scheduler, "7.5", 1)
    for scheduler in ("Euler ancestral", "Heun", "KDPM2", "DPM++ 2M SDE", "LCM")
]


@pytest.mark.parametrize("scheduler, guidance, number", CELLS)
def test_rows_and_edits_are_those_of_hooks_written_by_hand(scheduler, guidance, number):
    assert differences(scheduler, guidance, PROMPTS[:number]) == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_files_of_collect_are_what_hooks_written_by_hand_see(model_folder, tmp_path, number):
    """Batches of one to three prompts with two images each; of five steps those numbered 0, 2 and 4
    are kept."""
    options = dict(num_inference_steps=5, guidance_scale=7.5, height=32, width=32)
    files = dict(
        model_name=str(model_folder),
        hook_names=[HOOK],
        out_dir=str(tmp_path / "acts"),
        store_dtype="float32",
    )
    files |= dict(
        max_num_examples=4, num_images_per_prompt=2, batch_size=number, cache_every_n_timesteps=2
    )
    (path,) = collect.main(collect.Config(**files, **options, save_images=False, device="cpu"))
    stored = torch.from_numpy(np.load(path))

    rows = read_lines(path.parent / "prompts.jsonl")
    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    expected = []
    outputs = []
    pipe.unet.get_submodule(HOOK).register_forward_hook(
        lambda module, args, output: outputs.append(output[0].flatten(2).transpose(1, 2).clone())
    )
    for start in range(0, len(rows), 2 * number):
        batch = rows[start : start + 2 * number]
        generators = [torch.Generator().manual_seed(row["seed"]) for row in batch]
        outputs.clear()
        prompts = [row["prompt"] for row in batch[::2]]
        pipe(
            prompts, generator=generators, num_images_per_prompt=2, output_type="latent", **options
        )
        expected.append(torch.stack(outputs[::2], dim=1)[len(batch) :])
    assert torch.equal(stored, torch.cat(expected))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_transformers_are_those_of_hooks_written_by_hand(family, guided):
    assert family_differences(family, guided, 2) == []
