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


def test_random_tokens_are_those_of_the_whole_file(collect_config):
    """Whatever the batch, the side of the guidance and the hook point; a layer with no more is kept
    whole."""
    names = ["mid_block", COLLECTED_HOOKS[0], "up_blocks.1.resnets.0"]  # 64, 64 and 256 tokens
    whole = replace(
        collect_config,
        hook_names=names,
        rows="both",
        store_dtype="float32",
        num_images_per_prompt=2,
    )
    collect.main(whole)
    collect.main(replace(whole, tokens_per_step=7, out_dir=collect_config.out_dir + "7"))
    full = Path(collect_config.out_dir)
    some = Path(collect_config.out_dir + "7")
    index = {name: np.load(some / f"{name}.tokens.npy") for name in names}
    assert np.array_equal(index[names[0]], index[names[1]])
    assert index[names[0]].max() < 64 <= index[names[2]].max()
    for name in names:
        assert index[name].dtype == np.uint16
        assert index[name].shape == (16, 3, 7)
        assert (np.diff(index[name].astype(int)) > 0).all()
        assert len(np.unique(index[name].reshape(-1, 7), axis=0)) == 16 * 3
        for end in ("", ".uncond"):
            assert np.array_equal(index[name], np.load(some / f"{name}{end}.tokens.npy"))
            x = np.load(full / f"{name}{end}.npy")
            kept = np.load(some / f"{name}{end}.npy")
            assert np.array_equal(
                kept, np.take_along_axis(x, index[name][..., None].astype(int), 2)
            )
            record = read_json(some / f"{name}{end}.json")
            assert record["tokens_per_step"] == 7
            assert record["shape"] == list(kept.shape)
    counts = np.bincount(index["mid_block"].reshape(-1), minlength=64)  # 336 of 64: 5.25 each
    assert counts.min() >= 0
    assert counts.max() < 20
    assert (counts > 0).mean() > 0.9
    assert contents(full / "images") == contents(some / "images")

    out = collect_config.out_dir + "64"
    collect.main(
        replace(
            whole,
            tokens_per_step=64,
            out_dir=out,
            batch_size=3,
            cache_every_n_timesteps=2,
            rows="cond",
        )
    )
    assert sorted(path.name for path in Path(out).glob("*.tokens.npy")) == [
        "up_blocks.1.resnets.0.tokens.npy"
    ]
    assert read_json(Path(out) / "mid_block.json")["tokens_per_step"] is None
    assert np.load(Path(out) / "mid_block.npy").shape == (16, 2, 64, 16)
    out = collect_config.out_dir + "again"
    collect.main(
        replace(
            whole,
            tokens_per_step=7,
            out_dir=out,
            batch_size=3,
            cache_every_n_timesteps=2,
            rows="uncond",
        )
    )
    assert np.array_equal(
        np.load(Path(out) / "mid_block.uncond.tokens.npy"), index["mid_block"][:, ::2]
    )


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
    sites = [collect.Site(HookPoint("a"), "", None, 0)]
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
    # the first batch, of one prompt, is shorter
    with pytest.raises(ValueError, match="larger --text_tokens"):
        collect.main(Config(**options))
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
