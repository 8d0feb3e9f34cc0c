"""Pipelines that take images, and pipelines that take no prompts, from prompt file to edited image."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from families import controlnet, ddpm, dit, img2img, inpaint, instruct_pix2pix, kontext, svd, wan22
from PIL import Image
from tiny import PROMPTS, build, generate_options

import ablate
import collect
import evaluate
import steer
import train
from diffusion.dry_step import check_images_by_row
from diffusion.generate import generate, image_lists
from errors import UsageError
from hook import Edit, Generation, HookedDiffusionModel
from store.inputs import InputImages, load_rows, name_of_copy, parse_inputs, read_inputs

HOOK = "up_blocks.0.attentions.1"
WITH_IMAGES = [img2img, inpaint, instruct_pix2pix, controlnet, svd, kontext]


def hook_of(recipe):
    return "transformer_blocks.0" if recipe is kontext else HOOK


def picture(number, size=(24, 16)):
    ramp = Image.linear_gradient("L").convert("RGB")
    return ramp.rotate(40 * number).resize(size)


def image_names(recipe):
    return [name for name in recipe.options if name in ("image", "mask_image")]


@pytest.fixture
def use(monkeypatch):
    """Let the scripts load this pipeline; returns it, hooked."""

    def use(recipe):
        hooked = HookedDiffusionModel.from_pipeline(build(recipe))
        monkeypatch.setattr(HookedDiffusionModel, "from_pretrained", lambda *a, **k: hooked)
        return hooked

    return use


def write_table(folder, name="table.csv", changed=None, count=3):
    """Write a table with a column of pictures per argument, and the pictures; the row `changed`
    gets others."""
    folder.mkdir(exist_ok=True)
    lines = ["prompt,photo,mask"]
    for row in range(count):
        number = row + 7 if row == changed else row
        picture(number).save(folder / f"{number}.png")
        picture(number + 4).point(lambda x: 255 * (x > 127)).save(folder / f"mask{number}.png")
        lines.append(f"{PROMPTS[row % 3]} {row},{number}.png,mask{number}.png")
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def config_of(recipe, table, out_dir, **options):
    extra = {}
    for name, value in recipe.options.items():
        is_ours = name in ("prompt", "height", "width", "guidance_scale", *image_names(recipe))
        if not is_ours and not callable(value):
            extra[name] = value
    columns = {"image": "photo", "mask_image": "mask"}
    inputs = [f"{name}={columns[name]}" for name in image_names(recipe)]
    config = collect.Config(
        model_name="toy",  # of which nothing is loaded, see `use`
        dataset_name=str(table),
        inputs=inputs,
        hook_names=[hook_of(recipe)],
        out_dir=str(out_dir),
        num_inference_steps=2,
        height=recipe.options.get("height"),
        width=recipe.options.get("width"),
        pipeline_kwargs=json.dumps(extra),
        device="cpu",
        save_images=False,
        store_dtype="float32",
    )
    return replace(config, **options)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", WITH_IMAGES, ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize("each", [1, 2])
def test_a_changed_image_changes_its_own_rows_alone(recipe, each, tmp_path, use):
    """With several images of each prompt too, for which pipelines mix up the images."""
    use(recipe)
    stored = {}
    for changed in (None, 1):
        table = write_table(tmp_path / "pictures", f"{changed}.csv", changed)
        out_dir = tmp_path / f"acts{changed}"
        config = config_of(recipe, table, out_dir, num_images_per_prompt=each)
        collect.main(config)
        stored[changed] = np.load(out_dir / f"{hook_of(recipe)}.npy")
    differs = (stored[None] != stored[1]).reshape(3 * each, -1).any(1).tolist()
    assert differs == [False] * each + [True] * each + [False] * each
    if recipe is kontext:
        assert stored[None].shape[2] == 12, "the tokens of the picture are no image tokens"
    lines = [json.loads(line) for line in (out_dir / "prompts.jsonl").read_text().splitlines()]
    copies = {name for line in lines for name in line["inputs"].values()}
    assert copies == {path.name for path in (out_dir / "inputs").iterdir()}
    assert set(lines[0]["inputs"]) == set(image_names(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", WITH_IMAGES[:-1], ids=lambda recipe: recipe.__name__)
def test_a_missing_image_is_said_in_a_line(recipe, tmp_path, use):
    use(recipe)
    table = write_table(tmp_path)
    config = config_of(recipe, table, tmp_path / "acts", inputs=[])
    with pytest.raises(UsageError, match="needs .*--inputs image=") as caught:
        collect.main(config)
    for name in image_names(recipe):
        assert f"{name}=..." in str(caught.value)
    assert "ip_adapter" not in str(caught.value)


def test_a_failure_that_is_not_of_a_missing_image_keeps_its_error(use):
    hooked = use(img2img)
    options = generate_options(2, img2img)
    options["strength"] = 7.0
    with pytest.raises(UsageError, match="strength"):
        hooked.first_step(HOOK, options.pop("prompt"), **options)


def test_a_path_among_the_pipelines_arguments_is_refused(tmp_path, use):
    use(controlnet)
    config = config_of(controlnet, write_table(tmp_path), tmp_path / "acts", inputs=[])
    config = replace(config, pipeline_kwargs='{"image": "x.png"}')
    with pytest.raises(UsageError, match="--inputs image="):
        collect.main(config)


@pytest.mark.parametrize("name", ["picture", "strength"])
def test_a_name_that_takes_no_image_is_refused(name, tmp_path, use):
    use(img2img)
    config = config_of(img2img, write_table(tmp_path), tmp_path / "acts")
    with pytest.raises(UsageError, match=f"{name}.*its images are image, ip_adapter_image"):
        collect.main(replace(config, inputs=[f"{name}=photo"]))


def test_what_inputs_takes(tmp_path):
    table = write_table(tmp_path / "t")
    rows = load_rows(["image=photo", "mask_image=" + str(tmp_path / "t/1.png")], str(table))
    assert [Path(row["inputs"]["image"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    assert {row["inputs"]["mask_image"] for row in rows} == {str(tmp_path / "t/1.png")}
    assert [row["prompt"] for row in rows] == [f"{text} {i}" for i, text in enumerate(PROMPTS)]

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in (2, 0, 1):
        picture(number).save(folder / f"{number}.png")
    rows = load_rows([f"image={folder}"], str(table))
    assert [Path(row["inputs"]["image"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    rows = load_rows([f"image={folder}"], None, max_num_examples=2)
    assert [row["prompt"] for row in rows] == ["", ""]
    assert load_rows([], None, max_num_examples=3) == [{"prompt": ""}] * 3

    (folder / "1.png").unlink()
    with pytest.raises(UsageError, match="2 images for 3 prompts"):
        load_rows([f"image={folder}"], str(table))
    assert len(load_rows([f"image={folder}"], str(table), max_num_examples=2)) == 2
    with pytest.raises(UsageError, match="no such column.*photo, mask"):
        load_rows(["image=phot"], str(table))
    with pytest.raises(UsageError, match="needs --dataset_name"):
        load_rows(["image=photo"], None)
    for wrong in ("image", "=a.png", "image=", "a b=c"):
        with pytest.raises(UsageError, match="expected name=value"):
            parse_inputs([wrong])
    with pytest.raises(UsageError, match="given twice"):
        parse_inputs(["image=a", "image=b"])
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(UsageError, match="--inputs image: .*broken.png can't be read"):
        InputImages.of_rows(load_rows([f"image={tmp_path / 'broken.png'}"], "a fox"))


def test_a_path_that_is_also_a_column_is_refused(tmp_path, monkeypatch):
    table = write_table(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo").mkdir()
    for number in range(3):
        picture(number + 3).save(tmp_path / f"photo/{number}.png")
    with pytest.raises(UsageError, match=r"photo is a column of .* \./photo names the latter"):
        load_rows(["image=photo"], str(table))
    [first, *_] = load_rows(["image=./photo"], str(table))
    assert Path(first["inputs"]["image"]).parent.name == "photo"


def test_one_line_says_the_order_of_a_folder(tmp_path, capsys):
    table = write_table(tmp_path / "t")
    (tmp_path / "f").mkdir()
    for number in (1, 2, 10):
        picture(number).save(tmp_path / f"f/{number}.png")
    load_rows([f"image={tmp_path / 'f'}"], str(table))
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith(
        f"f: 1.png is for '{PROMPTS[0]} 0'; in the order of names, 10.png comes before 2.png"
    )


def test_rows_of_which_some_have_images_are_refused(tmp_path):
    rows = load_rows([], "a fox") + load_rows([f"image={save_picture(tmp_path)}"], "a fox")
    InputImages.of_rows(rows[1:]).save(tmp_path, rows[1:])
    assert len(read_inputs([tmp_path], rows[1:])) == 1
    with pytest.raises(UsageError, match="from no image or image, and can't be"):
        read_inputs([tmp_path], rows)
    with pytest.raises(AssertionError, match="1 images, 2 prompts"):
        image_lists([{}, {"image": picture(0)}])


def save_picture(folder):
    picture(0).save(folder / "a.png")
    return folder / "a.png"


def test_images_of_several_sizes_are_refused_unless_the_pipeline_scales_them(tmp_path):
    picture(0).save(tmp_path / "a.png")
    picture(1, (32, 16)).save(tmp_path / "b.png")
    images = InputImages.of_rows(load_rows([f"image={tmp_path}"], None))
    images.check_sizes(is_resized=True)
    with pytest.raises(UsageError, match="24 x 16 and 32 x 16"):
        images.check_sizes(is_resized=False)


def test_a_changed_copy_and_a_changed_file_are_refused(tmp_path):
    picture(0).save(tmp_path / "a.png")
    rows = load_rows([f"image={tmp_path / 'a.png'}"], "a fox")
    images = InputImages.of_rows(rows)
    images.save(tmp_path, rows)
    [read] = read_inputs([tmp_path], rows)
    assert read["image"].tobytes() == picture(0).tobytes()
    assert rows[0]["inputs"] == {"image": name_of_copy(picture(0))}

    picture(1).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="a.png was changed"):
        images.of(rows)
    copy = tmp_path / "inputs" / rows[0]["inputs"]["image"]
    picture(1).save(copy)
    with pytest.raises(UsageError, match="was changed after"):
        read_inputs([tmp_path], rows)
    copy.unlink()
    with pytest.raises(UsageError, match="is not there"):
        read_inputs([tmp_path], rows)
    assert read_inputs([tmp_path], [{"prompt": "a", "inputs": "a column of an old file"}]) is None


class Mixing:
    """A pipeline that gives each prompt the image of another one."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.__signature__ = inspect.signature(pipe)

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def __call__(self, prompt=None, image=None, **options):
        return self.pipe(prompt, image=image[1:] + image[:1], **options)


def test_a_pipeline_that_takes_a_list_otherwise_is_refused(tmp_path, use):
    hooked = use(instruct_pix2pix)
    hooked.pipe = Mixing(hooked.pipe)
    options = generate_options(3, instruct_pix2pix)
    prompts, images = options.pop("prompt"), options.pop("image")
    del options["generator"]
    inputs = [{"image": image} for image in images]
    with pytest.raises(UsageError, match="one image for each prompt.*--batch_size 1"):
        generate(hooked, Generation(prompts, [0, 1, 2], None, options, inputs))
    with pytest.raises(UsageError, match="one image for each prompt"):
        collect.main(config_of(instruct_pix2pix, write_table(tmp_path), tmp_path / "acts"))


class Changed(Mixing):
    """A pipeline whose images are changed by a function on their way to it."""

    def __init__(self, pipe, change):
        super().__init__(pipe)
        self.change = change

    def __call__(self, prompt=None, image=None, **options):
        return self.pipe(prompt, image=self.change(image), **options)


def one_alone(images):
    if isinstance(images, list) and len(images) > 1:
        raise RuntimeError("Sizes of tensors must match")
    return images


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda images: images[:1] * len(images), "the last image changes nothing"),
        (one_alone, "it fails with Sizes of tensors.*--max_num_examples 1 of ablate.py"),
    ],
)
def test_one_image_for_all_and_a_list_that_fails_are_refused(change, message, use):
    hooked = use(instruct_pix2pix)
    hooked.pipe = Changed(hooked.pipe, change)
    options = generate_options(3, instruct_pix2pix)
    prompts, images = options.pop("prompt"), options.pop("image")
    del options["generator"]
    inputs = [{"image": image} for image in images]
    with pytest.raises(UsageError, match=message):
        generate(hooked, Generation(prompts, [0, 1, 2], None, options, inputs))
    hooked.pipe.change = list
    generate(hooked, Generation(prompts, [0, 1, 2], None, options, inputs))


def test_an_image_that_is_put_in_after_the_first_step_is_taken():
    """A UNet without inputs for the image: at strength 1 it begins with pure noise."""
    parts = {**build(img2img).components, "image_encoder": None}
    hooked = HookedDiffusionModel.from_pipeline(
        diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    )
    mask = Image.new("RGB", (24, 16))
    mask.paste("white", (0, 0, 12, 16))
    inputs = [{"image": picture(i), "mask_image": mask} for i in range(2)]
    options = dict(strength=1.0, num_inference_steps=2, height=16, width=24, output_type="latent")
    generate(hooked, Generation(PROMPTS[:2], [0, 1], None, options, inputs))


def test_each_prompt_is_given_once_per_sample_where_samples_may_be_sorted():
    class Pipe:
        def __call__(self, prompt=None, num_waveforms_per_prompt=1):
            pass

    class Sorting(Pipe):
        def score_waveforms(self):
            pass

    cfg = collect.Config(num_images_per_prompt=3)
    for pipe, expected in ((Pipe(), 3), (Sorting(), 1)):
        model = SimpleNamespace(pipe=pipe)
        assert collect.choose_batching(cfg, model, None).num_images == expected


# ------------------------------------------------------------------------------ later stages


@pytest.mark.parametrize("recipe, is_refused", [(kontext, True), (controlnet, False)])
def test_images_of_several_sizes_that_are_scaled_to_the_first_are_refused(recipe, is_refused):
    """A pipeline may scale all images of a batch alike, whatever height and width are given."""
    hooked = HookedDiffusionModel.from_pipeline(build(recipe))
    options = generate_options(2, recipe) | {"image": [picture(0), picture(1, (24, 48))]}
    prompts = options.pop("prompt")
    if not is_refused:
        return check_images_by_row(hooked, prompts, options)
    with pytest.raises(UsageError, match="different sizes.*scale the images to one size"):
        check_images_by_row(hooked, prompts, options)


def test_steer_refuses_images_of_several_sizes(tmp_path):
    picture(0).save(tmp_path / "a.png")
    picture(1, (32, 16)).save(tmp_path / "b.png")
    cfg = steer.Config(dataset_name="prompts.txt", inputs=[f"image={tmp_path}"])
    rows = load_rows(cfg.inputs, None)
    inputs = InputImages.of_rows(rows)
    model = SimpleNamespace(check_image_arguments=lambda sizes: None)
    with pytest.raises(UsageError, match="24 x 16 and 32 x 16"):
        steer.choose_images(cfg, rows, [], model, inputs, {})
    options = dict(height=16, width=24)
    assert len(steer.choose_images(cfg, rows, [], model, inputs, options)) == 2


@pytest.mark.parametrize("dataset_name", [None, "a fox"])
def test_settings_of_steer_know_images_and_model_files_by_their_content(dataset_name, tmp_path):
    path, model = tmp_path / "a.png", tmp_path / "my_model.py"
    cfg = steer.Config(
        dataset_name=dataset_name, inputs=[f"image={path}"], model_name=f"{model}:build"
    )
    kinds = set()
    for number, code in ((0, "a"), (1, "a"), (1, "b"), (1, "b")):
        picture(number).save(path)
        model.write_text(code)
        rows = load_rows(cfg.inputs, "a fox")
        InputImages.of_rows(rows)
        kinds.add(json.dumps(steer.settings_of(cfg, [], rows)))
    assert len(kinds) == 3


def save_pipeline(recipe, folder):
    build(recipe).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [inpaint, svd, kontext], ids=lambda recipe: recipe.__name__)
def test_later_stages_generate_with_the_same_images(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = save_pipeline(recipe, tmp_path / "model")
    table = write_table(tmp_path / "pictures", count=6)
    config = config_of(
        recipe, table, "activations", model_name=model, save_samples=True, batch_size=6
    )
    [path] = collect.main(config)
    samples = torch.from_numpy(np.load("activations/samples.npy")).float()

    train.main(
        train.Config(data=[str(path)], num_latents=[32], k=[4], run_name="sae", device="cpu")
    )
    generated = []
    original = HookedDiffusionModel.run_with_hooks

    def watch(self, edits, prompt, **options):
        generated.append((prompt, options["image"]))
        return original(self, edits, prompt, **options)

    monkeypatch.setattr(HookedDiffusionModel, "run_with_hooks", watch)
    evaluate.main(evaluate.Config(graft=True, num_prompts=2, windows=1, device="cpu"))
    lines = [
        json.loads(line) for line in Path("activations/prompts.jsonl").read_text().splitlines()
    ]
    image_of = {line["prompt"]: line["inputs"]["image"] for line in lines}
    steer.main(steer.Config(features=["1"], multiply=[1], num_prompts=6, device="cpu"))
    for prompts, images in generated:
        images = images if isinstance(images, list) else [images]
        assert [name_of_copy(image) for image in images] == [image_of[text] for text in prompts]
    report = json.loads(next(Path("steer").glob("*/steer.json")).read_text())
    assert [of_row["image"] for of_row in report["arguments"]["inputs"]] == list(image_of.values())

    # the untouched run of steer.py is that of collect.py
    rows = [{**line, "seed": line["seed"]} for line in lines]
    hooked = HookedDiffusionModel.from_pretrained(model)
    options = json.loads(path.with_suffix(".json").read_text())["pipeline_kwargs"]
    generation = Generation.from_rows(rows, options, read_inputs([path.parent], rows))
    made = generate(hooked, generation).sample.float()
    assert torch.allclose(made, samples, atol=1e-2 * samples.abs().max().item())

    # other images, and a changed one
    picture(6).save("other.png")
    generated.clear()
    other = steer.Config(
        features=["1"],
        multiply=[1],
        num_prompts=2,
        inputs=["image=other.png"],
        out_dir="o",
        device="cpu",
    )
    steer.main(other)
    assert all(name_of_copy(image) == name_of_copy(picture(6)) for _, x in generated for image in x)
    picture(3).save(path.parent / "inputs" / image_of[lines[0]["prompt"]])
    with pytest.raises(UsageError, match="was changed"):
        steer.main(
            steer.Config(features=["1"], multiply=[1], num_prompts=6, out_dir="p", device="cpu")
        )


@pytest.mark.slow
def test_ablate_takes_images(tmp_path, use):
    use(inpaint)
    table = write_table(tmp_path / "pictures")
    config = config_of(inpaint, table, tmp_path)
    options = {
        name: getattr(config, name)
        for name in ("inputs", "dataset_name", "num_inference_steps", "height", "width", "device")
    }
    ablate.main(ablate.Config(hook_names=[HOOK], out_dir=str(tmp_path / "ablate"), **options))
    with pytest.raises(UsageError, match="was made with image '.*.png', not '"):
        picture(8).save(tmp_path / "pictures/1.png")
        ablate.main(ablate.Config(hook_names=[HOOK], out_dir=str(tmp_path / "ablate"), **options))
    report = json.loads((tmp_path / "ablate/ablate.json").read_text())
    assert len(report["inputs"]) == 3 and set(report["inputs"][0]) == {"image", "mask_image"}
    assert report["hooks"][0]["latents"] > 0


@pytest.mark.slow
def test_a_collection_with_images_resumes_in_shards_and_refuses_other_images(tmp_path, use):
    use(instruct_pix2pix)
    table = write_table(tmp_path / "pictures", count=4)
    out_dir = tmp_path / "acts"
    config = config_of(instruct_pix2pix, table, out_dir, batch_size=2, max_num_examples=2)
    collect.main(config)
    first = np.load(out_dir / f"{HOOK}.npy")
    collect.main(replace(config, max_num_examples=4))
    whole = np.load(out_dir / f"{HOOK}.npy")
    assert np.array_equal(whole[:2], first) and len(whole) == 4
    for number in (0, 1):
        shard = replace(
            config, max_num_examples=4, shard=f"{number}/2", out_dir=str(tmp_path / "s")
        )
        collect.main(shard)
        part = np.load(tmp_path / f"s/shard{number}of2/{HOOK}.npy")
        assert np.array_equal(part, whole[2 * number : 2 * number + 2])
        assert len(list((tmp_path / f"s/shard{number}of2/inputs").iterdir())) == 2

    picture(6).save(tmp_path / "pictures/0.png")
    with pytest.raises(UsageError, match="other prompts"):
        collect.main(replace(config, max_num_examples=4))


@pytest.mark.slow
def test_the_longest_text_may_be_of_another_shard(tmp_path, use):
    use(kontext)
    table = write_table(tmp_path, count=3)
    table.write_text(table.read_text().replace(",2.png", " and a very long text,2.png"))
    config = config_of(kontext, table, tmp_path / "acts", batch_size=1, stream="text", shard="0/3")
    [path] = collect.main(config)
    assert len(np.load(path)) == 1


# ------------------------------------------------------------------------------ reference tokens


@pytest.mark.slow
def test_the_tokens_of_a_reference_image_stay_out(use):
    """From the first step on, in every kind of block, in the cache, the grid and an edit."""
    hooked = use(kontext)
    options = generate_options(2, kontext, num_inference_steps=1)
    prompt = options.pop("prompt")
    names = [
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "transformer_blocks.0.attn.to_q",
    ]
    layouts, _ = hooked.layouts(names, prompt, **options)
    assert {name: layouts[name].grid for name in names} == dict.fromkeys(names, (3, 4))
    before, after = [], []
    block = hooked.pipe.transformer.transformer_blocks[1]
    block.register_forward_hook(lambda module, args, output: before.append(output[1].clone()))
    next_block = hooked.pipe.transformer.single_transformer_blocks[0]
    next_block.register_forward_pre_hook(
        lambda module, args, kwargs: after.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    edit = Edit(torch.zeros_like, rows="all")
    hooked.run_with_hooks({"transformer_blocks.1": edit}, prompt, **options)
    before, after = before[-1], after[-1]
    assert before.shape[1] == 12 + 24
    assert not after[:, :12].any() and torch.equal(after[:, 12:], before[:, 12:])


# ------------------------------------------------------------------------------ no prompts, classes


def test_class_names_and_numbers_are_prompts(tmp_path, use):
    hooked = use(dit)
    hooked.pipe.labels = {"tabby": 0, "tabby cat": 0, "goldfish": 1, "red fox": 2}
    (tmp_path / "p.txt").write_text("goldfish\n2\ntabby\n")
    config = collect.Config(
        hook_names=["transformer_blocks.1"],
        dataset_name=str(tmp_path / "p.txt"),
        out_dir=str(tmp_path / "acts"),
        num_inference_steps=2,
        num_images_per_prompt=2,
        store_dtype="float32",
        device="cpu",
    )
    [path] = collect.main(config)
    lines = [
        json.loads(line) for line in (tmp_path / "acts/prompts.jsonl").read_text().splitlines()
    ]
    names = ["goldfish", "red fox", "tabby, tabby cat"]
    assert [line["prompt"] for line in lines] == [name for name in names for _ in range(2)]
    _, cache = hooked.run_with_cache(
        "transformer_blocks.1",
        ["1", "1", "2", "2", "0", "0"],
        generator=[torch.Generator().manual_seed(i) for i in range(6)],
        num_inference_steps=2,
    )
    assert np.array_equal(np.load(path), cache["output"]["transformer_blocks.1"].numpy())
    cases = {"conditional": [], "unconditional": []}
    for name in ("goldfish", "red fox"):  # one prompt, without guidance that tells
        options = dict(num_inference_steps=1, guidance_scale=1.5)
        options["generator"] = [torch.Generator().manual_seed(0)]
        _, cache = hooked.run_with_cache("transformer_blocks.1", [name], rows="both", **options)
        cases["conditional"].append(cache["output"]["transformer_blocks.1"])
        cases["unconditional"].append(cache["output_uncond"]["transformer_blocks.1"])
    assert not torch.equal(*cases["conditional"]) and torch.equal(*cases["unconditional"])
    assert hooked.role_memories and all(memory.sure for memory in hooked.role_memories.values())
    for wrong, message in (("goldfsh", "did you mean 'goldfish'"), ("3", "classes up to 2")):
        with pytest.raises(UsageError, match=message):
            hooked([wrong])
    hooked.pipe.labels = {}
    with pytest.raises(UsageError, match="class numbers as prompts"):
        hooked(["goldfish"])


def test_a_pipeline_without_prompts_needs_a_count_alone(tmp_path, monkeypatch):
    model = save_pipeline(ddpm, tmp_path / "model")
    config = collect.Config(
        model_name=model,
        hook_names=["mid_block.attentions.0"],
        out_dir=str(tmp_path / "acts"),
        max_num_examples=3,
        num_images_per_prompt=2,
        num_inference_steps=2,
        device="cpu",
    )
    [path] = collect.main(config)
    assert np.load(path).shape[0] == 6
    lines = [
        json.loads(line) for line in (tmp_path / "acts/prompts.jsonl").read_text().splitlines()
    ]
    assert [(line["prompt"], line["seed"]) for line in lines] == [("", i) for i in range(6)]
    with pytest.raises(UsageError, match="which prompts"):
        collect.main(replace(config, model_name=save_pipeline(dit, tmp_path / "dit")))


def test_real_images_are_put_into_a_model_of_pixels(tmp_path, use):
    hooked = use(ddpm)
    (tmp_path / "photos").mkdir()
    for number in range(2):
        picture(number).save(tmp_path / f"photos/{number}.png")
    config = collect.Config(
        hook_names=["mid_block.attentions.0"],
        images=str(tmp_path / "photos"),
        timesteps_per_image=2,
        out_dir=str(tmp_path / "acts"),
        save_samples=True,
        store_dtype="float32",
        device="cpu",
    )
    [path] = collect.main(config)
    crop = picture(1).resize((12, 8), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 127.5 - 1
    samples = torch.from_numpy(np.load(tmp_path / "acts/samples.npy"))
    assert samples.shape == (2, 3, 8, 12) and torch.allclose(samples[1], pixels, atol=1e-6)

    timesteps = np.load(path.with_suffix(".timesteps.npy"))
    noise = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))
    noisy = hooked.pipe.scheduler.add_noise(pixels, noise, torch.tensor(int(timesteps[1, 0])))
    kept = []
    hooked.pipe.unet.mid_block.attentions[0].register_forward_hook(
        lambda module, args, output: kept.append(output)
    )
    with torch.no_grad():
        hooked.pipe.unet(noisy[None], int(timesteps[1, 0]))
    expected = kept[0].flatten(2).transpose(1, 2)[0]
    assert torch.allclose(torch.from_numpy(np.load(path))[1, 0], expected, atol=1e-4)


# ------------------------------------------------------------------------------ denoisers in turn


def test_a_network_that_runs_in_every_step_takes_no_turns(use):
    """The ControlNet's output does not reach the scheduler, but it runs in each step."""
    hooked = use(controlnet)
    options = generate_options(2, controlnet, num_inference_steps=3)
    _, steps = hooked.layouts("**", options.pop("prompt"), **options)
    assert {tuple(of_module) for of_module in steps.values()} == {(0, 1, 2)}


def test_each_denoiser_is_promised_its_own_steps(tmp_path, use, capsys):
    hooked = use(wan22)
    options = {k: v for k, v in wan22.options.items() if k not in ("height", "width")}
    config = collect.Config(
        hook_names=["transformer.blocks.0", "transformer_2.blocks.0"],
        dataset_name="a red fox in snow",
        out_dir=str(tmp_path / "acts"),
        num_inference_steps=5,
        height=32,
        width=64,
        pipeline_kwargs=json.dumps(options),
        save_images=False,
        device="cpu",
    )
    collect.main(config)
    shapes = [np.load(tmp_path / f"acts/{name}.npy").shape[1] for name in config.hook_names]
    assert sum(shapes) == 5 and shapes[0] != shapes[1]
    promised = re.search(r"x ([\d or]+) steps of", capsys.readouterr().out)[1]
    assert promised == " or ".join(map(str, sorted(shapes)))

    calls = []
    original = hooked.pipe.transformer.proj_out.forward  # a dry step takes hooks off

    def counted(x):
        calls.append(1)
        return original(x)

    hooked.pipe.transformer.proj_out.forward = counted
    prompt = ["a red fox in snow"]
    arguments = dict(num_inference_steps=5, height=32, width=64, **options)
    before = inspect.getattr_static(hooked.pipe.transformer, "forward")
    for names in (config.hook_names, config.hook_names[:1], config.hook_names[1:]):
        _, steps = hooked.layouts(names, prompt, **arguments)
        assert {name: len(steps[name]) for name in names} == {
            name: shapes[config.hook_names.index(name)] for name in names
        }
    calls.clear()
    hooked.first_step(config.hook_names[1:], prompt, **arguments)
    assert len(calls) == 2, "the first transformer computes one step, with its two passes"
    assert inspect.getattr_static(hooked.pipe.transformer, "forward") is before
    collect.main(replace(config, list_hooks=True))
    assert f"{promised} steps of image tokens" in capsys.readouterr().out
