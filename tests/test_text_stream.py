"""Text streams: padding is left out, words are known, files have room for the longest prompt."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import cogvideox, flux, qwenimage, sd3, zimage
from tiny import PROMPTS, build, generate_options, sd15, sdxl, t5_encoder, t5_tokenizer

import collect
import evaluate
import steer as steer_script
import train
from analysis.feature_edits import Edits, Target, steer
from diffusion import text_padding
from diffusion.text_padding import RealTokens, with_padding, without_padding
from errors import UsageError
from hook import Edit, HookedDiffusionModel, HookPoint
from sae import Sae
from store.dataset import open_activations

pytestmark = pytest.mark.slow

BLOCK = "transformer_blocks.0"


def sd3_with_t5():
    pipe = sd3()
    pipe.register_modules(text_encoder_3=t5_encoder(), tokenizer_3=t5_tokenizer())
    return pipe


sd3_with_t5.options = sd3.options

CASES = {
    sd3: (BLOCK, lambda n: [range(n)]),
    sd3_with_t5: (BLOCK, lambda n: [range(n), range(77, 77 + 32)]),
    flux: ("single_transformer_blocks.0", lambda n: [range(32)]),
    cogvideox: ("transformer_blocks.1", lambda n: [range(32)]),
}


def letters(prompt):
    """The number of tokens that a tiny tokenizer of CLIP makes: one per letter, a start, an end."""
    return len(prompt.replace(" ", "")) + 2


def pieces_of_t5(prompt):
    return len(prompt) + 2  # also one per space, one before the first word, and an end


def real_positions(recipe, prompt):
    """By hand: which tokens of the text stream are no padding."""
    if recipe is sd3:
        return list(range(letters(prompt)))
    of_t5 = min(32, pieces_of_t5(prompt))
    if recipe is sd3_with_t5:
        return [*range(letters(prompt)), *range(77, 77 + of_t5)]
    return list(range(of_t5))


def arguments(recipe, n=3):
    options = generate_options(n, recipe)
    return options.pop("prompt"), options


@pytest.mark.parametrize("recipe", CASES, ids=lambda recipe: recipe.__name__)
def test_padding_is_left_out_and_what_is_kept_are_the_real_tokens(recipe):
    model, (name, _) = HookedDiffusionModel.from_pipeline(build(recipe)), CASES[recipe]
    caches = {}
    for keep_padding in (True, False):
        prompts, options = arguments(recipe)
        _, caches[keep_padding] = model.run_with_cache(
            name, prompts, stream="text", keep_padding=keep_padding, **options
        )
    whole, cache = caches[True]["output"][name], caches[False]
    for p, prompt in enumerate(prompts):
        real = real_positions(recipe, prompt)
        x = cache["output"][name][p]
        assert torch.equal(x[:, : len(real)], whole[p][:, real])
        assert not x[:, len(real) :].any()
        assert cache["lengths"][name][p] == len(real)
        assert cache["num_padding"][name][p] == whole.shape[2] - len(real) > 0
    assert cache["padding"][name] == "" and caches[True]["padding"][name] == "it is to be kept"


@pytest.mark.parametrize("recipe", [qwenimage, zimage, sd15], ids=lambda recipe: recipe.__name__)
def test_where_there_is_no_padding_nothing_is_left_out(recipe):
    """A mask cuts it off, or the pipeline does; for SD 1.5 it is cross-attention that has text."""
    model = HookedDiffusionModel.from_pipeline(build(recipe))
    name = {
        qwenimage: BLOCK,
        zimage: "layers.1",
        sd15: "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    }[recipe]
    prompts, options = arguments(recipe)
    _, cache = model.run_with_cache(name, prompts, stream="text", **options)
    assert cache["padding"][name] == ""
    assert cache["num_padding"][name].any() == (recipe is sd15)


def test_a_dry_run_for_the_padding_changes_no_bit_of_the_generation():
    model = HookedDiffusionModel.from_pipeline(build(sd3))
    samples = []
    for stream in ("image", "text"):
        prompts, options = arguments(sd3)
        with model.watch(3) as sampling:
            model.run_with_cache(BLOCK, prompts, stream=stream, **options)
        samples.append(sampling.sample)
    assert torch.equal(*samples)


def test_tokens_are_taken_out_and_put_back_by_hand():
    x = torch.arange(12.0).view(2, 3, 2) + 1
    masks = [torch.tensor([True, False, True]), torch.tensor([False, True, False])]
    compact = without_padding(x, masks)
    assert compact.tolist() == [[[1, 2], [5, 6]], [[9, 10], [0, 0]]]
    new = with_padding(-compact, x, masks)
    assert new.tolist() == [[[-1, -2], [3, 4], [-5, -6]], [[7, 8], [-9, -10], [11, 12]]]
    assert x.min() == 1  # the original stays


def test_masks_that_do_not_fit_a_module_are_not_used():
    mask = torch.tensor([True, True, False])
    real = RealTokens({"cond": [mask]}, "")
    assert torch.equal(real.mask("cond", [2])[0], mask[:2])  # its end, padding, was cut off
    assert real.mask("cond", [1]) is None and real.mask("cond", [4]) is None
    assert real.mask("uncond", [3]) is None and real.mask("cond", [3, 3]) is None


@pytest.mark.parametrize("keep_padding", [False, True])
def test_an_edit_changes_padding_only_on_request(keep_padding):
    """Against a hook by hand, which zeros the tokens of the conditional rows."""
    model = HookedDiffusionModel.from_pipeline(build(sd3_with_t5))
    prompts, options = arguments(sd3_with_t5)
    edit = Edit(torch.zeros_like, stream="text", keep_padding=keep_padding)
    with model.watch(3) as sampling:
        model.run_with_hooks({BLOCK: edit}, prompts, **options)

    def by_hand(module, args, output):
        text, image = output[0].clone(), output[1]
        for row, prompt in enumerate(prompts, len(prompts)):  # u, c
            real = real_positions(sd3_with_t5, prompt)
            text[row, slice(None) if keep_padding else real] = 0
        return text, image

    block = model.pipe.transformer.get_submodule(BLOCK)
    handle = block.register_forward_hook(by_hand)
    prompts, options = arguments(sd3_with_t5)
    with model.watch(3) as expected:
        model(prompts, **options)
    handle.remove()
    assert torch.equal(sampling.sample, expected.sample)


def test_an_edit_says_where_padding_can_not_be_told(monkeypatch):
    model = HookedDiffusionModel.from_pipeline(build(sd3))
    prompts, options = arguments(sd3, 2)

    def mixed(output):
        return [x.mean(1, keepdim=True) + x for x in output]

    encode = model.pipe.encode_prompt

    def encode_and_mix(*args, **kwargs):
        positive, negative, *pooled = encode(*args, **kwargs)
        return (*mixed([positive, negative]), *pooled)

    monkeypatch.setattr(model.pipe, "encode_prompt", encode_and_mix)
    with pytest.raises(UsageError, match="which text tokens are padding: what the text encoders"):
        model.run_with_hooks({BLOCK: Edit(torch.zeros_like, stream="text")}, prompts, **options)
    prompts, options = arguments(sd3, 2)
    _, cache = model.run_with_cache(BLOCK, prompts, stream="text", **options)
    assert "mixed before the denoiser" in cache["padding"][BLOCK]
    assert cache["lengths"][BLOCK].tolist() == [109, 109]


# ------------------------------------------------------------------------------ words


def test_tokens_of_a_template_that_the_pipeline_drops_are_no_words():
    pipe = build(qwenimage)
    pipe.prompt_template_encode = "Describe the image: {} please"
    pipe.prompt_template_encode_start_idx = 9
    model = HookedDiffusionModel.from_pipeline(pipe)
    prompts, options = arguments(qwenimage)
    [part] = model.text_parts(prompts, **options)
    assert (part.num_dropped_first, part.num_dropped_last) == (9, 0)
    assert "".join(part.pieces(prompts[0])) == f"the image: {prompts[0]} please"


def test_encoders_that_are_joined_in_their_width_make_each_word_once():
    model = HookedDiffusionModel.from_pipeline(build(sdxl))
    prompts, options = arguments(sdxl)
    parts = model.text_parts(prompts, **options)
    assert [part.tokenizer_name for part in parts] == ["tokenizer"]
    assert len(parts[0].pieces(prompts[0])) == letters(prompts[0])


# ------------------------------------------------------------------------------ collect.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "sd3"
    build(sd3_with_t5).save_pretrained(folder)
    return folder


def config(folder, out_dir, texts, **options):
    listing = Path(f"{out_dir}.txt")
    listing.write_text("\n".join(texts))
    options = dict(stream="text", hook_names=[BLOCK], num_inference_steps=2) | options
    return collect.Config(
        model_name=str(folder),
        dataset_name=str(listing),
        out_dir=str(out_dir),
        height=12,
        width=16,
        batch_size=1,
        store_dtype="float32",
        pipeline_kwargs='{"max_sequence_length": 32}',
        device="cpu",
        **options,
    )


SHORT, LONG = "a fox", "a red fox in the snow"


def test_a_longer_prompt_in_a_later_batch_has_room(folder, tmp_path, capsys):
    cfg = config(folder, tmp_path / "acts", [SHORT, LONG])
    [path] = collect.main(cfg)
    sizes = [letters(text) + pieces_of_t5(text) for text in (SHORT, LONG)]
    x, lengths = np.load(path), np.load(tmp_path / "acts" / f"{BLOCK}.text.lengths.npy")
    assert lengths.tolist() == sizes and x.shape == (2, 2, max(sizes), 32)
    printed = capsys.readouterr().out
    assert "text tokens of each prompt are padding and are left out" in printed
    # the promise before collecting is the size of the file
    [data] = open_activations([path])
    assert data.num_vectors == 2 * sum(sizes)

    meta = json.loads(path.with_suffix(".json").read_text())
    assert meta["padding"] is False and HookPoint.from_description(meta).padding is False
    rows = [json.loads(line) for line in (tmp_path / "acts" / "prompts.jsonl").open()]
    for row, text, size in zip(rows, (SHORT, LONG), sizes):
        assert list(row["tokens"]) == ["tokenizer", "tokenizer_3"]
        first, second = row["tokens"].values()
        assert len(first) + len(second) == size
        assert "".join(first).strip() == f"<|startoftext|>{text} <|endoftext|>"
        assert "".join(second) == f"{text}</s>"


def test_a_collection_that_has_no_room_for_a_longer_prompt_says_so_at_once(folder, tmp_path):
    collect.main(config(folder, tmp_path / "acts", [SHORT]))
    before = sorted((tmp_path / "acts").rglob("*"))
    with pytest.raises(UsageError, match="has room for 13 text tokens .* the longest prompt has"):
        collect.main(config(folder, tmp_path / "acts", [SHORT, LONG]))
    assert sorted((tmp_path / "acts").rglob("*")) == before
    # a shorter one is added
    collect.main(config(folder, tmp_path / "acts", [SHORT, "a cat"]))
    with pytest.raises(UsageError, match="--text_tokens 9: .* has 13 text tokens"):
        collect.main(config(folder, tmp_path / "other", [SHORT], text_tokens=9))
    [path] = collect.main(config(folder, tmp_path / "wide", [SHORT], text_tokens=60))
    collect.main(config(folder, tmp_path / "wide", [SHORT, LONG], text_tokens=60))
    assert np.load(path).shape[2] == 60
    for other in (50, 70):
        with pytest.raises(UsageError, match=f"^--text_tokens {other}: .* has room for 60 text"):
            collect.main(config(folder, tmp_path / "wide", [SHORT, LONG], text_tokens=other))


def test_padding_is_kept_on_request_and_is_another_hook_point(folder, tmp_path):
    [path] = collect.main(config(folder, tmp_path / "with", [SHORT, LONG], keep_padding=True))
    [other] = collect.main(config(folder, tmp_path / "without", [SHORT, LONG]))
    meta = json.loads(path.with_suffix(".json").read_text())
    assert meta["padding"] is True and np.load(path).shape[2] == 77 + 32
    assert len(open_activations([path, other])) == 2  # never trained on together
    with pytest.raises(UsageError, match="another --out_dir"):
        collect.main(config(folder, tmp_path / "with", [SHORT, LONG]))


@pytest.mark.parametrize("first", [False, True])
def test_padding_that_is_told_in_some_batches_alone_is_refused(
    folder, tmp_path, monkeypatch, first
):
    masks_of = RealTokens.mask

    def mask(self, role, counts):
        """The padding of the shorter prompt can't be told."""
        masks = masks_of(self, role, counts)
        is_short = sum(map(int, masks[0])) < letters(LONG) + pieces_of_t5(LONG)
        return None if is_short else masks

    monkeypatch.setattr(RealTokens, "mask", mask)
    texts = [LONG, SHORT] if first else [SHORT, LONG]
    with pytest.raises(UsageError, match="padding can be told in .* with --keep_padding"):
        collect.main(config(folder, tmp_path / "acts", texts, text_tokens=77 + 32))


def test_a_description_of_an_earlier_version_has_padding():
    old = dict(hook_name="a", side="output", stream="text", rows="cond")
    assert HookPoint.from_description(old).padding
    assert not HookPoint.from_description(old | dict(stream="image")).padding
    point = HookPoint("a", stream="text")
    assert HookPoint.from_description(point.as_dict()) == point
    assert "padding" not in HookPoint("a").as_dict()


# ------------------------------------------------------------------------------ all stages


def test_all_stages_of_an_image_and_a_text_sae_of_what_one_block_takes(folder, tmp_path, capsys):
    """Collected from the input of a block, trained, grafted and steered together."""
    saes = []
    for stream in ("image", "text"):
        texts = [SHORT, LONG, "a cat", "three ships at night"]
        cfg = config(folder, tmp_path / stream, texts, stream=stream, side="input")
        [path] = collect.main(replace(cfg, hook_names=["transformer_blocks.1"]))
        options = dict(num_latents=[16], k=[2], out_dir=str(tmp_path / "saes"), device="cpu")
        train.main(train.Config(data=[str(path)], run_name=stream, **options))
        saes.append(str(tmp_path / "saes" / stream))

    evaluation = dict(num_prompts=1, windows=1, out_dir=str(tmp_path / "eval"), device="cpu")
    evaluate.main(evaluate.Config(sae=saes[1], graft=True, **evaluation))
    report = json.loads((tmp_path / "eval" / "text" / "graft.json").read_text())
    assert report["side"] == "input" and report["stream"] == "text" and not report["padding"]
    assert report["all"]["latents"]["graft"] > 0

    options = dict(add=[0.5], num_prompts=2, out_dir=str(tmp_path / "steer"), device="cpu")
    capsys.readouterr()
    _, numbers = steer_script.main(
        steer_script.Config(sae=saes, features=["0:3", "1:5"], **options)
    )
    moved = json.loads(numbers.read_text())["runs"][1]["pictures"]
    assert all(picture["moved"] > 0 for picture in moved)
    printed = capsys.readouterr().out
    assert "transformer_blocks.1.input: features 3" in printed
    assert "transformer_blocks.1.input.text: features 5" in printed
    with pytest.raises(UsageError, match="two SAEs of one hook point"):
        steer_script.main(
            steer_script.Config(sae=[saes[0]] * 2, features=["0:3", "1:5"], **options)
        )


# ------------------------------------------------------------------------------ edits


def random_sae(seed, d=32):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(24, d, generator=generator)
    sae = Sae(d, 24, 4)
    with torch.no_grad():
        sae.encoder.weight.copy_(weights)
        sae.W_dec.copy_(torch.nn.functional.normalize(weights, dim=1))
    return sae


def test_an_image_and_a_text_sae_of_one_block_are_edited_together():
    """As if each edit was made by a hook of its own."""
    model = HookedDiffusionModel.from_pipeline(build(sd3))
    saes = {stream: random_sae(i) for i, stream in enumerate(("image", "text"))}
    targets, changes = [], []
    for stream, sae in saes.items():
        targets.append(Target("", sae, HookPoint(BLOCK, stream=stream), features=[1, 2]))
        changes.append(steer(sae, [1, 2], add=0.5, stream=stream))

    def sample(make_edits):
        prompts, options = arguments(sd3)
        with model.watch(3) as sampling:
            model.run_with_hooks(make_edits(sampling), prompts, **options)
        return sampling.sample

    both = sample(Edits(targets, changes))
    by_hand = sample(
        lambda sampling: {
            BLOCK: [
                Edit(lambda x, i=i: x + changes[i](x, 0.0), stream=stream)
                for i, stream in enumerate(saes)
            ]
        }
    )
    alone = [sample(Edits([target], [change])) for target, change in zip(targets, changes)]
    assert torch.equal(both, by_hand)
    assert not torch.equal(both, alone[0]) and not torch.equal(both, alone[1])


@pytest.mark.parametrize("stream", ["image", "text"])
def test_an_edit_of_an_input_is_one_of_the_output_before_it(stream):
    model = HookedDiffusionModel.from_pipeline(build(sd3))

    def sample(name, side, fn):
        prompts, options = arguments(sd3)
        edit = Edit(fn, rows="cond", stream=stream, side=side, steps=[1])
        with model.watch(3) as sampling:
            model.run_with_hooks({name: edit}, prompts, **options)
        return sampling.sample

    with_edit = sample("transformer_blocks.1", "input", lambda x: x * 2)
    assert torch.equal(with_edit, sample(BLOCK, "output", lambda x: x * 2))
    plain = sample("transformer_blocks.1", "input", lambda x: x.clone())
    assert not torch.equal(plain, with_edit)
    prompts, options = arguments(sd3)
    with model.watch(3) as untouched:
        model(prompts, **options)
    assert torch.equal(plain, untouched.sample)
    assert PROMPTS[: len(prompts)] == prompts


def test_an_edit_with_the_input_gets_the_edited_one_in_either_order():
    model = HookedDiffusionModel.from_pipeline(build(sd3))
    of_input = Edit(lambda x: x * 2, side="input")
    of_difference = Edit(lambda x, before: x + 0.1 * (x - before), with_input=True)

    def sample(edits):
        prompts, options = arguments(sd3)
        with model.watch(3) as sampling:
            model.run_with_hooks({"transformer_blocks.1": edits}, prompts, **options)
        return sampling.sample

    one = sample([of_input, of_difference])
    assert torch.equal(one, sample([of_difference, of_input]))


def test_an_input_is_edited_where_it_can_be_and_refused_where_both_are_meant():
    with pytest.raises(UsageError, match="leave with_input out"):
        Edit(lambda x: x, side="input", with_input=True)
    with pytest.raises(UsageError, match="side: expected output, input"):
        Edit(lambda x: x, side="diff")


def test_tokens_are_followed_only_once_per_call_of_an_encoder():
    """The parts of a text encoder get the same numbers; tokens would mix in its attention."""
    model = HookedDiffusionModel.from_pipeline(build(sd3))
    prompts, options = arguments(sd3, 2)
    with text_padding.follow_tokens(model, lambda _, call: call.real) as calls:
        model(prompts, **options)
    assert len(calls) == 4  # two encoders, with and without the prompt
