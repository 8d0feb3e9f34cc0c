"""Run every stage on every kind of model, from the command line, and print what works as a table.

    python tests/stages.py                           # all families
    python tests/stages.py --only flux dit           # some of them
    python tests/stages.py --keep /tmp/stages        # leave the models and all files there

Each family is a tiny pipeline with random weights. It is saved in a folder, and the folder goes to
the scripts as a downloaded model would. A cell of the table is "yes" only if its command ended with
status 0 and what it wrote is right, see the `check_...` functions; otherwise the cell says what is
wrong, and the script ends with status 1. docs/models.md shows the table.
"""

import argparse
import json
import math
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import transformers
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import families  # noqa: E402
import tiny  # noqa: E402
from commands import run_script  # noqa: E402
from documents import own_model  # noqa: E402

STAGES = ("list", "ablate", "collect", "train", "graft", "features", "steer")
TEXTS = (
    "a red fox in snow",
    "blue ocean waves at night",
    "three green bottles",
    "a red star",
    "a blue ring on sand",
    "two birds at night",
    "an old red house",
    "a green field in snow",
)
NUM_STEPS = 4


@dataclass(frozen=True)
class Family:
    """A kind of model, and what its command lines need."""

    title: str
    """Its name in the table."""

    recipe: Callable | None
    """Builds the pipeline; its `options` are those of tests/families.py. None is the model of one's
    own of docs/models.md."""

    hook_name: str | None = None
    """The hook point that is collected; None is the script's default."""

    stream: str = "image"

    prompts: tuple[str, ...] | None = TEXTS
    """The data set; None for a pipeline that takes no prompt."""

    images: tuple[str, ...] = ()
    """The arguments of the pipeline that are images."""

    labels: dict[int, str] = field(default_factory=dict)
    """The names of the classes, which are the prompts."""

    @property
    def model_name(self) -> str:
        """The value of --model_name, in the family's folder."""
        return "my_model.py" if self.recipe is None else "model"


@tiny.called_with(**families.sd3.options)
def sd3():
    """With its third text encoder, without which a saved pipeline can't be loaded."""
    parts = families.sd3().components
    parts |= {"text_encoder_3": tiny.t5_encoder(), "tokenizer_3": tiny.t5_tokenizer()}
    return diffusers.StableDiffusion3Pipeline(**parts)


@tiny.called_with(**families.audioldm2.options)
def audioldm2():
    """With its feature extractor, without which a saved pipeline can't be loaded."""
    pipe = families.audioldm2()
    pipe.register_modules(feature_extractor=transformers.ClapFeatureExtractor())
    return pipe


@tiny.called_with(**families.cogvideox.options)
def cogvideox_dpm():
    """With the scheduler that keeps what it predicted in the step before."""
    pipe = families.cogvideox()
    pipe.register_modules(scheduler=diffusers.CogVideoXDPMScheduler())
    return pipe


def family_table() -> list[Family]:
    """Return all families, in the order of the table."""
    classes = {0: "goldfish", 1: "red fox", 2: "lighthouse", 3: "teapot", 4: "daisy"}
    return [
        Family("SDXL", tiny.sdxl),
        Family("SD3, image", sd3),
        Family("SD3, text", sd3, "transformer_blocks.0", "text"),
        Family("FLUX", families.flux),
        Family("FLUX Kontext", families.kontext, images=("image",)),
        Family("PixArt", families.pixart),
        Family("Sana", families.sana),
        Family("Qwen-Image", families.qwenimage),
        Family("Wan 2.1", families.wan),
        Family("Wan 2.2", families.wan22),
        Family("LTX", families.ltx),
        Family("CogVideoX with its DPM scheduler", cogvideox_dpm),
        Family("Stable Audio", families.stable_audio),
        Family("AudioLDM 2", audioldm2),
        Family("DiT", families.dit, prompts=tuple(classes.values()), labels=classes),
        Family("DDPM", families.ddpm, prompts=None),
        Family("img2img", families.img2img, images=("image",)),
        Family("inpainting", families.inpaint, images=("image", "mask_image")),
        Family("InstructPix2Pix", families.instruct_pix2pix, images=("image",)),
        Family("ControlNet", families.controlnet, images=("image",)),
        Family("SVD", families.svd, prompts=None, images=("image",)),
        Family("a model of your own", None, prompts=("cat", "dog", "fox", "owl") * 2),
    ]


# ------------------------------------------------------------------------------- command lines


def write_model(family: Family, folder: Path) -> None:
    """Save the family's pipeline in folder/model, its prompts, and an image for each prompt."""
    if family.recipe is None:
        (folder / "my_model.py").write_text(own_model())
    else:
        tiny.build(family.recipe).save_pretrained(folder / "model")
    if family.labels:
        index = folder / "model/model_index.json"
        settings = json.loads(index.read_text())
        settings["id2label"] = {str(number): name for number, name in family.labels.items()}
        index.write_text(json.dumps(settings))
    if family.prompts is not None:
        lines = ["prompt", *family.prompts]
        (folder / "prompts.csv").write_text("\n".join(lines) + "\n")
    if family.images:
        (folder / "photos").mkdir()
        ramp = Image.linear_gradient("L").convert("RGB").resize((64, 48))
        for number in range(len(TEXTS)):
            ramp.rotate(45 * number).save(folder / f"photos/{number}.png")
        (folder / "masks").mkdir()
        halves = ramp.point(lambda level: 255 * (level > 127))
        for number in range(len(TEXTS)):
            halves.rotate(90 * number).save(folder / f"masks/{number}.png")


def generation_options(family: Family) -> list[str]:
    """Return the options of collect.py and ablate.py that a short generation needs."""
    words = ["--model_name", family.model_name]
    if family.prompts is not None:
        words += ["--dataset_name", "prompts.csv"]
    if family.images:
        words += ["--inputs", *(f"{name}=photos" for name in family.images)]
    extra = {}
    steps = {"num_inference_steps": NUM_STEPS}
    own = family.recipe.options if family.recipe is not None else {}
    for name, value in (steps | own).items():
        if name in ("prompt", "class_labels", "batch_size", "output_type", *family.images):
            continue
        if callable(value):
            value = value(1)[0]
        if value is None:
            continue
        if name in ("height", "width", "num_inference_steps", "guidance_scale", "negative_prompt"):
            words += [f"--{name}", str(value)]
        else:
            extra[name] = value
    if extra:
        words += ["--pipeline_kwargs", json.dumps(extra)]
    return words


def hook_options(family: Family) -> list[str]:
    """Return the options that name the hook point, [] for the default one."""
    words = []
    if family.hook_name is not None:
        words += ["--hook_names", family.hook_name]
    if family.stream != "image":
        words += ["--stream", family.stream]
    return words


def command_of(stage: str, family: Family) -> list[str]:
    """Return the command line of a stage."""
    generating = generation_options(family)
    if stage == "list":
        return ["collect.py", *generating, *hook_options(family), "--list_hooks"]
    if stage == "ablate":
        hook_names = hook_options(family)[:2] if family.stream == "image" else []
        return ["ablate.py", *generating, *hook_names, "--max_num_examples", "2"]
    if stage == "collect":
        return ["collect.py", *generating, *hook_options(family), "--max_num_examples", "8"]
    if stage == "train":
        return ["train.py", "--num_latents", "64", "--k", "4", "--num_epochs", "4"]
    # a program runs only where it is named
    model = ["--model_name", "my_model.py"] if family.recipe is None else []
    if stage == "graft":
        return ["evaluate.py", "--graft", "--num_prompts", "2", "--windows", "2", *model]
    if stage == "features":
        return ["features.py"]
    return ["steer.py", "--num_features", "4", "--multiply", "1", "4", "--num_prompts", "2", *model]


# ---------------------------------------------------------------------------------- what is right


class Wrong(Exception):
    """What a stage wrote is not right."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)


def require_picture(path: Path) -> None:
    """Raise Wrong unless a picture is there that shows something."""
    require(path.is_file(), f"no {path.name}")
    with Image.open(path) as picture:
        levels = np.asarray(picture.convert("L"))
    require(levels.std() > 1, f"{path.name} is empty")


def only(paths: list[Path], what: str) -> Path:
    require(len(paths) == 1, f"{len(paths)} {what}")
    return paths[0]


def check_list(folder: Path, family: Family, printed: str) -> None:
    """Some module can be hooked, and no size is printed as 0."""
    row = r"^ *([\w.]+) +(\d+) x (\d+) .*? ([\d.e-]+)(  default)?$"
    rows = re.findall(row, printed, re.MULTILINE)
    require(len(rows) > 0, "nothing can be hooked")
    require(all(float(size) > 0 for *_, size, _ in rows), "a size of 0 is printed")
    require(family.hook_name is not None or any(mark for *_, mark in rows), "no default is marked")


def check_ablate(folder: Path, family: Family, printed: str) -> None:
    """Each hook point has finite distances, some of them above 0, and there is a picture."""
    report = json.loads((folder / "ablate/ablate.json").read_text())
    ablated = [record for record in report["hooks"] if "error" not in record]
    require(len(ablated) > 0, "nothing was ablated")
    require(all(math.isfinite(record["latents"]) for record in ablated), "not finite")
    require(max(record["latents"] for record in ablated) > 0, "no ablation changes anything")
    require_picture(folder / "ablate/ablate.png")


def activation_files(folder: Path) -> list[Path]:
    """Return the activation files of a collection, which have a description."""
    records = [path for path in folder.glob("activations/*.json") if path.stem != "collect"]
    require(len(records) > 0, "no activation file")
    return [path.with_suffix(".npy") for path in records]


def check_collect(folder: Path, family: Family, printed: str) -> None:
    """The file has the promised size, its numbers are finite, and prompts differ.

    Unless --save_images is off, something to look at or to hear lies beside it for each row.
    """
    rows = len(family.prompts or TEXTS)
    promised = re.search(r"x (\d+) steps of", printed)
    require(promised is not None, "no size is promised")
    for path in activation_files(folder):
        x = np.load(path).astype(np.float32)
        require(np.isfinite(x).all(), "not finite")
        require(len(x) == rows, f"{len(x)} rows, not {rows}")
        require(np.ptp(x, axis=0).max() > 0, "all prompts have the same activations")
        require(
            int(promised[1]) == x.shape[1], f"{promised[1]} steps promised, {x.shape[1]} stored"
        )
    made = list(folder.glob("activations/images/*"))
    require(len(made) == rows, f"{len(made)} images for {rows} rows")


def check_train(folder: Path, family: Family, printed: str) -> None:
    """The SAE explains something of the held-out vectors."""
    for path in folder.glob("saes/*/cfg.json"):
        cfg = json.loads(path.read_text())
        require(0 <= cfg["fvu"] < 1.5, f"fvu {cfg['fvu']}")
        require(cfg["num_held_out"] > 0, "nothing is held out")


def check_graft(folder: Path, family: Family, printed: str) -> None:
    """The reconstruction moves the sample by a finite distance, and there is a picture."""
    path = only(list(folder.glob("evaluations/*/graft.json")), "evaluations")
    report = json.loads(path.read_text())
    latents = report["all"]["latents"]
    require(math.isfinite(latents["graft"]) and latents["graft"] > 0, "the graft moves nothing")
    require_picture(path.with_name("graft.png"))


def page_data(folder: Path) -> dict:
    """Return the data of the feature page."""
    page = only(list(folder.glob("features/*.html")), "pages").read_text()
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


def check_features(folder: Path, family: Family, printed: str) -> None:
    """The page has examples, and each shows something: an image, a player or words."""
    data = page_data(folder)
    require(len(data["examples"]) > 0, "no examples")
    require(data["note"] == "", data["note"])
    for i, picture in enumerate(data["pictures"]):
        others = [*data["films"], *data["sounds"], *data.get("tokens", {})]
        require(picture is not None or str(i) in others, f"example {i} shows nothing")
    require(max(data["density"]) > 0, "no feature is active")


def check_steer(folder: Path, family: Family, printed: str) -> None:
    """Untouched features change nothing, stronger ones something, and there is a picture."""
    record = only(list(folder.glob("steer/*/steer.json")), "steering results")
    runs = json.loads(record.read_text())["runs"]
    moved = [max(image["moved"] for image in run["pictures"]) for run in runs]
    require(moved[1] < 1e-3, f"x 1 moves the images by {moved[1]:.2g}")
    require(moved[2] > 0, "x 4 moves nothing")
    require_picture(record.with_name("steer.png"))


# A stage is run if the stage before it wrote this
NEEDED_FILES = {
    "train": "activations/progress.jsonl",
    "graft": "saes/*/cfg.json",
    "features": "saes/*/cfg.json",
    "steer": "saes/*/cfg.json",
}
CHECKS = {
    "list": check_list,
    "ablate": check_ablate,
    "collect": check_collect,
    "train": check_train,
    "graft": check_graft,
    "features": check_features,
    "steer": check_steer,
}


# --------------------------------------------------------------------------------------- the table


def run_family(family: Family, folder: Path) -> dict[str, str]:
    """Return {stage: "yes", or what is wrong}; what follows a failed collection is not run."""
    folder.mkdir(parents=True)
    try:
        write_model(family, folder)
    except Exception as error:
        traceback.print_exc()
        return dict.fromkeys(STAGES, f"the model can't be saved: {error}")

    results = {}
    for stage in STAGES:
        needed = NEEDED_FILES.get(stage)
        if needed is not None and not list(folder.glob(needed)):
            results[stage] = "-"
            continue
        results[stage] = run_stage(stage, family, folder)
    return results


def run_stage(stage: str, family: Family, folder: Path) -> str:
    """Run one stage in a family's folder; return "yes", or what is wrong in one line."""
    words = command_of(stage, family)
    done = run_script(*words, cwd=folder, timeout=300)
    log = folder / f"{stage}.log"
    log.write_text(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}")
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()]
        kind = "TRACEBACK " if "Traceback" in done.stderr else ""
        return f"{kind}{last[-1] if last else done.returncode}"
    try:
        CHECKS[stage](folder, family, done.stdout)
    except (Wrong, OSError, KeyError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "yes"


def print_table(results: dict[str, dict[str, str]]) -> None:
    """Print the table in Markdown, then what is wrong."""
    print(f"\n| family | {' | '.join(STAGES)} |")
    print("|---" * (len(STAGES) + 1) + "|")
    for title, cells in results.items():
        shown = [cell if cell in ("yes", "-") else "**no**" for cell in cells.values()]
        print(f"| {title} | {' | '.join(shown)} |")
    for title, cells in results.items():
        for stage, cell in cells.items():
            if cell not in ("yes", "-"):
                print(f"{title}, {stage}: {cell[:300]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="parts of families' names")
    parser.add_argument("--keep", help="leave all files in this folder, which must not exist")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(arguments.keep or scratch)
        results = {}
        for family in family_table():
            name = re.sub(r"\W+", "_", family.title.lower())
            if arguments.only and not any(
                part.lower() in family.title.lower() for part in arguments.only
            ):
                continue
            start = time.monotonic()
            results[family.title] = run_family(family, root / name)
            print(f"{family.title}: {time.monotonic() - start:.0f} s", flush=True)
        print_table(results)
    return any(cell != "yes" for cells in results.values() for cell in cells.values())


if __name__ == "__main__":
    sys.exit(main())
