"""Some of the tokens: random ones of each image, and the tokens of texts of several lengths."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import zimage
from files import contents, photos, read_json
from tiny import build
from tiny_runs import COLLECTED_HOOKS

import collect
from collect import Config
from store import collection, dataset
from store.hook_point import HookPoint

pytestmark = pytest.mark.slow

LAYERS = [*reversed(COLLECTED_HOOKS), "up_blocks.1.resnets.0"]
"""Two layers of 64 tokens and one of 256."""


@pytest.fixture
def three_layers(collect_config):
    """The options of a collection of 16 images, both rows of the guidance."""
    return replace(
        collect_config,
        hook_names=LAYERS,
        rows="both",
        store_dtype="float32",
        num_images_per_prompt=2,
    )


def test_random_tokens_are_those_of_the_whole_file(three_layers):
    """They are the same in both rows of the guidance, and in every layer of as many tokens."""
    full = Path(three_layers.out_dir)
    some = Path(three_layers.out_dir + "7")
    collect.main(three_layers)
    collect.main(replace(three_layers, tokens_per_step=7, out_dir=str(some)))
    tokens = {name: np.load(some / f"{name}.tokens.npy") for name in LAYERS}
    assert np.array_equal(tokens[LAYERS[0]], tokens[LAYERS[1]])
    assert tokens[LAYERS[0]].max() < 64 <= tokens[LAYERS[2]].max()
    for name in LAYERS:
        assert tokens[name].dtype == np.uint16
        assert tokens[name].shape == (16, 3, 7)
        assert (np.diff(tokens[name].astype(int)) > 0).all()
        assert len(np.unique(tokens[name].reshape(-1, 7), axis=0)) == 16 * 3
        for end in ("", ".uncond"):
            assert np.array_equal(tokens[name], np.load(some / f"{name}{end}.tokens.npy"))
            x = np.load(full / f"{name}{end}.npy")
            kept = np.load(some / f"{name}{end}.npy")
            expected = np.take_along_axis(x, tokens[name][..., None].astype(int), 2)
            assert np.array_equal(kept, expected)
            record = read_json(some / f"{name}{end}.json")
            assert record["tokens_per_step"] == 7
            assert record["shape"] == list(kept.shape)
    counts = np.bincount(tokens["mid_block"].reshape(-1), minlength=64)  # 336 of 64: 5.25 each
    assert counts.min() >= 0
    assert counts.max() < 20
    assert (counts > 0).mean() > 0.9
    assert contents(full / "images") == contents(some / "images")


def test_a_layer_with_no_more_tokens_is_kept_whole(three_layers):
    config = replace(three_layers, rows="cond", cache_every_n_timesteps=2, batch_size=3)
    collect.main(replace(config, tokens_per_step=64))
    out = Path(three_layers.out_dir)
    names = [path.name for path in out.glob("*.tokens.npy")]
    assert names == ["up_blocks.1.resnets.0.tokens.npy"]
    assert read_json(out / "mid_block.json")["tokens_per_step"] is None
    assert np.load(out / "mid_block.npy").shape == (16, 2, 64, 16)


def test_random_tokens_do_not_depend_on_the_batch_the_steps_or_the_rows(three_layers):
    config = replace(three_layers, tokens_per_step=7)
    collect.main(config)
    other = replace(config, rows="uncond", cache_every_n_timesteps=2, batch_size=3)
    other = replace(other, out_dir=three_layers.out_dir + "again")
    collect.main(other)
    tokens = np.load(Path(config.out_dir) / "mid_block.tokens.npy")
    again = np.load(Path(other.out_dir) / "mid_block.uncond.tokens.npy")
    assert np.array_equal(again, tokens[:, ::2])


def test_random_tokens_in_the_listing_the_room_and_of_pictures(
    collect_config, tmp_path, capsys, monkeypatch
):
    collect_config = replace(
        collect_config, hook_names=["mid_block"], store_dtype="float32", tokens_per_step=7
    )
    collect.main(replace(collect_config, list_hooks=True))
    printed = capsys.readouterr().out
    assert f"{3 * 7 * (16 * 4 + 2) / 1e6:.2f}" in printed.splitlines()[1]
    assert "7 random image tokens" in printed
    # all of it, where 98 % may be asked for
    usage = type("Usage", (), {"free": 8 * 3 * 7 * (16 * 4 + 2)})
    with monkeypatch.context() as patch:
        patch.setattr(collect.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match="lower --max_num_examples or --tokens_per_step"):
            collect.main(collect_config)
        usage.free = usage.free * 100 // 97
        collect.main(collect_config)
    with pytest.raises(ValueError, match="--tokens_per_step is for image tokens"):
        collect.main(replace(collect_config, stream="text"))
    options = dict(
        num_inference_steps=None,
        images=str(photos(tmp_path / "p", 3)),
        out_dir=collect_config.out_dir + "p",
    )
    collect.main(replace(collect_config, **options))
    collect.main(
        replace(
            collect_config,
            **options | dict(tokens_per_step=None, out_dir=collect_config.out_dir + "w"),
        )
    )
    index = np.load(Path(collect_config.out_dir + "p") / "mid_block.tokens.npy")
    kept, whole = (np.load(Path(collect_config.out_dir + end) / "mid_block.npy") for end in "pw")
    assert kept.shape == (3, 4, 7, 16)
    assert np.array_equal(kept, np.take_along_axis(whole, index[..., None].astype(int), 2))


def test_many_tokens_need_wider_indices():
    cache = {"output": {"a": torch.zeros(1, 1, 2, 3)}, "grid": {"a": (300, 300)}}
    cache["tokens"] = {"a": torch.tensor([[[5, 89_999]]])}
    sites = [collect.Site(HookPoint("a"), "", None, 1, 0)]
    writer = collect.BatchWriter(Config(), None, sites, torch.float16, sampling_rate=0)
    arrays = writer.arrays_of(cache)
    assert collection.as_numpy(arrays["a.tokens"]).dtype == np.uint32
    assert arrays["a.tokens"].tolist() == [[[5, 89_999]]]


def test_text_tokens_are_padded_to_one_length_and_not_trained_on(tmp_path):
    folder = tmp_path / "zimage"
    prompts = ["a red fox", "blue ocean waves at night", "three"]
    build(zimage).save_pretrained(folder)
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    options = dict(
        model_name=str(folder),
        dataset_name=str(tmp_path / "p.txt"),
        num_inference_steps=2,
        batch_size=1,
        device="cpu",
    )
    options |= dict(
        hook_names=["layers.1"], stream="text", height=24, width=32, out_dir=str(tmp_path / "out")
    )
    [path] = collect.main(Config(**options))
    longest = max(len(prompt) + 2 for prompt in prompts)  # the first batch, of one, is shorter
    assert np.load(path).shape == (3, 2, longest, 32)
    options |= dict(out_dir=str(tmp_path / "acts"), text_tokens=40, store_dtype="float32")
    collect.main(Config(**options))
    path = tmp_path / "acts" / "layers.1.text.npy"
    x = np.load(path)
    lengths = np.load(tmp_path / "acts" / "layers.1.text.lengths.npy")
    assert x.shape == (3, 2, 40, 32)
    assert lengths.tolist() == [len(p) + 2 for p in prompts]
    for row, n in zip(x, lengths):
        assert row[:, :n].any(-1).all()
        assert not row[:, n:].any()
    data = dataset.Activations([path])
    vectors = torch.cat([*data.held_out(), *(x for x, _ in data.batches(64, data.num_training))])
    assert len(vectors) == data.num_vectors == 2 * lengths.sum()
    assert vectors.any(-1).all()
    assert [s.paths for s in dataset.open_activations([path.parent])] == [[str(path)]]
