"""Run an old commit and the working tree on this machine with the same commands, and compare what
they write.

    python tests/golden.py b243481                    # every stage, about five minutes on two cores
    python tests/golden.py b243481 --only collect     # the commands whose name begins so
    python tests/golden.py b243481 --keep /tmp/golden # leave the files there

Activations, SAEs, metrics, reports and the data of the feature page are compared number by number.
Seconds, versions and checksums are left out. It prints one line per file, and ends with status 1 if
a file differs that NAMED does not list.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parents[1]
DATA = "activations/up_blocks.1.attentions.1.npy"
FEW_STEPS = ["--num_inference_steps", "6"]
SMALL_SAE = ["--data", DATA, "--expansion_factor", "4", "--log_every", "2", "--save_every", "20"]

# Differences that CHANGELOG.md names ("Results change: yes"): {file, as a regular expression:
# reason}
NAMED = {
    r".*/(collect\.json|progress\.npy)": "the progress of a collection is in progress.jsonl",
    r".*\.png": "figures share one grid and one style",
    r"steer_(multiply|add)/.*\.json": "--features shows prompts that are spread over the data",
}
# Never compared: times and versions, what CHANGELOG.md names as gone or new in a description, and
# pictures of the page
LEFT_OUT = {"seconds", "seconds_each", "versions", "checksum", "run_id", "vectors_per_second"}
LEFT_OUT |= {
    "mean_norm",
    "machines",
    "machine",
    "shard",
    "save_images",
    "save_samples",
    "output_type",
}
LEFT_OUT |= {"training", "unlearn", "report", "per_cell", "pictures", "note", "data", "crc32"}
LEFT_OUT |= {"num_features"}  # of steer.json: None where --features names them
# Keys that an older version did not write: what a collection and an SAE say of themselves so that
# stages can check it
ADDED = {
    "fingerprint",
    "fingerprints",
    "id",
    "prompts_digest",
    "model_folder",
    "model_dtype",
    "model_name",
    "collections",
}
ADDED |= {"side", "stream", "rows", "collected_with", "data_relative_to", "tokens_per_sample"}
ADDED |= {
    "num_training_prompts",
    "sae_fingerprint",
    "surely_unseen",
    "transfer",
    "negative_prompt",
    "image_digest",
    "seen",
    "num_training_in_data",
    "contents",
    "telling",
    "frames",
    "films",
    "sounds",
    "audio",
    "columns",
}


@dataclass
class Command:
    """One command line, and the files that it writes."""

    name: str
    script: str
    arguments: list[str]
    files: list[str]
    """Globs, relative to the folder in which the command runs."""

    new_only: list[str] = field(default_factory=list)
    """Arguments that only the working tree knows."""


def commands() -> list[Command]:
    found = []
    collect = ["--max_num_examples", "16", *FEW_STEPS]
    samples = ["--save_samples"]

    def add_collect(name: str, arguments: list[str], folder: str) -> None:
        files = [f"{folder}/*.npy", f"{folder}/*.json", f"{folder}/prompts.jsonl"]
        found.append(Command(name, "collect.py", [*arguments, "--out_dir", folder], files, samples))

    add_collect("collect output", collect, "activations")
    add_collect(
        "collect both", [*collect, "--rows", "both", "--cache_every_n_timesteps", "2"], "both"
    )
    for side in ("input", "diff"):
        add_collect(f"collect {side}", [*collect, "--side", side, "--tokens_per_step", "50"], side)
    add_collect("collect images", ["--images", "photos", "--timesteps_per_image", "3"], "images")

    variants = {
        "topk": [],
        "two": ["--k", "8", "16", "--seeds", "0", "1"],
        "batch_topk": ["--batch_topk"],
        "sample_topk": ["--sample_topk", "--k", "256"],
        "multi_topk": ["--multi_topk"],
        "matryoshka": ["--matryoshka", "128", "256"],
        "unit_norm": ["--input_unit_norm", "--center", "mean"],
        "per_step": [
            "--loss_weight",
            "per_step",
            "--grad_acc_steps",
            "2",
            "--no_normalize_decoder",
        ],
        "auxk": ["--dead_feature_threshold", "2048", "--lr_scheduler", "cosine"],
    }
    for name, arguments in variants.items():
        out_dir = f"saes_{name}"
        files = [
            f"{out_dir}/*/sae.safetensors",
            f"{out_dir}/*/metrics.jsonl",
            f"{out_dir}/*/cfg.json",
        ]
        found.append(
            Command(
                f"train {name}", "train.py", [*SMALL_SAE, *arguments, "--out_dir", out_dir], files
            )
        )

    sae = f"saes_topk/{Path(DATA).stem}_k16_M384"
    for name in ("topk", "batch_topk", "sample_topk"):
        folder = sae if name == "topk" else f"saes_{name}/*"
        graft = ["--graft", "--num_prompts", "2", "--windows", "2"] if name != "batch_topk" else []
        arguments = ["--sae", folder, *graft, "--out_dir", f"evaluations_{name}"]
        found.append(
            Command(f"evaluate {name}", "evaluate.py", arguments, [f"evaluations_{name}/*/*.json"])
        )

    found.append(Command("features", "features.py", ["--sae", sae], ["features/*.html"]))
    steer = ["--sae", sae, "--num_prompts", "4"]
    for name, arguments in {
        "multiply": ["--features", "3", "5", "--multiply", "0", "4", "--rows", "cond"],
        "add": [
            "--features",
            "3",
            "--add",
            "0.5",
            "--steps",
            "1-3",
            "--rows",
            "both",
            "--mask",
            "0",
            "0",
            "1",
            "0.5",
        ],
        "concept": [
            "--num_pictures",
            "16",
            "--concept",
            "black",
            "--num_features",
            "2",
            "--renormalize",
            "--rows",
            "cond",
        ],
    }.items():
        files = [f"steer_{name}/*/steer.json", f"steer_{name}/*/steer.png"]
        found.append(
            Command(
                f"steer {name}",
                "steer.py",
                [*steer, *arguments, "--out_dir", f"steer_{name}"],
                files,
            )
        )

    ablate = [
        "--max_num_examples",
        "2",
        "--num_inference_steps",
        "4",
        "--hook_names",
        "mid_block",
        "up_blocks.1.attentions.*",
    ]
    for mode in ("skip", "zero", "mean"):
        arguments = [*ablate, "--mode", mode, "--out_dir", f"ablate_{mode}"]
        found.append(
            Command(
                f"ablate {mode}",
                "ablate.py",
                arguments,
                [f"ablate_{mode}/*.json", f"ablate_{mode}/ablate.png"],
            )
        )
    arguments = [
        "--data",
        DATA,
        "--expansion_factor",
        "2",
        "--trial_updates",
        "5",
        "--trial_seconds",
        "1000",
    ]
    found.append(Command("diagnose", "diagnose.py", arguments, ["diagnose/*.json"]))
    return found


def draw_photos(folder: Path) -> None:
    """Five small pictures of noise and stripes, the same every time."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(5):
        pixels = generator.integers(0, 256, (80, 64 + 16 * number, 3), np.uint8)
        pixels[::8] = 40 * number
        Image.fromarray(pixels).save(folder / f"{number}.png")


def run(command: Command, code: Path, folder: Path, is_new: bool) -> str | None:
    """Run the command of the code in `folder`, in `folder`; what went wrong, or None."""
    arguments = []
    for argument in command.arguments:
        matches = sorted(folder.glob(argument)) if "*" in argument and "/" in argument else []
        arguments += [str(match.relative_to(folder)) for match in matches] or [argument]
    if is_new:
        arguments += command.new_only
    for pattern in command.files:  # what an earlier comparison left
        shutil.rmtree(folder / pattern.split("/")[0], ignore_errors=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(code / command.script), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return (
            done.stderr.strip().splitlines()[-1]
            if done.stderr.strip()
            else f"status {done.returncode}"
        )
    return None


def content(path: Path) -> object:
    """What a file says, as numbers that can be compared."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".png":
        return np.asarray(Image.open(path).convert("RGB"))
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".html":
        data = re.search(
            r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', path.read_text(), re.DOTALL
        )
        return json.loads(data[1])
    return json.loads(path.read_text())


def difference(old: object, new: object, where: str = "") -> str | None:
    """The first place at which two contents differ, or None."""
    if isinstance(old, np.ndarray) or isinstance(new, np.ndarray):
        if old.shape != new.shape or old.dtype != new.dtype:
            return f"{where}: {old.dtype} {old.shape}, now {new.dtype} {new.shape}"
        if old.tobytes() == new.tobytes():
            return None
        unequal = np.flatnonzero((old != new).ravel())
        return f"{where}: {len(unequal)} of {old.size} numbers"
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key in LEFT_OUT or key not in old and key in ADDED:
                continue
            if key not in new or key not in old:
                return f"{where}.{key} is {'gone' if key in old else 'new'}"
            if found := difference(old[key], new[key], f"{where}.{key}"):
                return found
        return None
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{where}: {len(old)} entries, now {len(new)}"
        for number, pair in enumerate(zip(old, new)):
            if found := difference(*pair, f"{where}[{number}]"):
                return found
        return None
    return None if old == new else f"{where}: {old!r}, now {new!r}"


def compare(command: Command, old: Path, new: Path) -> tuple[int, int]:
    """Print one line per file of a command; how many are equal, and how many differ unnamed."""
    names = set()
    for pattern in command.files:
        for folder in (old, new):
            names |= {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
    equal = unnamed = 0
    for name in sorted(names):
        if not (old / name).exists() or not (new / name).exists():
            found = (
                "only the old one is there"
                if (old / name).exists()
                else "only the new one is there"
            )
        else:
            found = difference(content(old / name), content(new / name))
        if found is None:
            equal += 1
            continue
        reason = next(
            (reason for pattern, reason in NAMED.items() if re.fullmatch(pattern, name)), None
        )
        unnamed += reason is None
        print(
            f"  {'DIFFERS' if reason is None else 'named'}  {name}: {found}{'' if reason is None else f' ({reason})'}"
        )
    print(f"  {equal} of {len(names)} files are equal", flush=True)
    return equal, unnamed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old_commit")
    parser.add_argument(
        "--only",
        default="",
        help="run the commands whose name begins so; earlier ones must be in --keep",
    )
    parser.add_argument(
        "--keep", help="folder for the files; what it holds is used again, not run again"
    )
    options = parser.parse_args()

    work = Path(options.keep or tempfile.mkdtemp(prefix="golden-"))
    code = work / "code"
    if not code.exists():
        subprocess.run(
            ["git", "-C", HERE, "worktree", "add", "--force", "--detach", code, options.old_commit],
            check=True,
        )
    folders = {"old": work / "old", "new": work / "new"}
    for folder in folders.values():
        if not (folder / "photos").exists():
            draw_photos(folder / "photos")

    equal = unnamed = failed = 0
    for command in commands():
        if not command.name.startswith(options.only):
            continue
        print(command.name, flush=True)
        for which, folder in folders.items():
            done = folder / f".{command.name.replace(' ', '_')}.done"
            if which == "old" and done.exists():
                continue
            error = run(command, code if which == "old" else HERE, folder, which == "new")
            if error:
                print(f"  FAILED  the {which} {command.script}: {error}")
                failed += 1
            else:
                done.touch()
        counts = compare(command, *folders.values())
        equal, unnamed = equal + counts[0], unnamed + counts[1]
    if not options.keep:
        subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", code], check=True)
    print(f"\n{equal} files equal, {unnamed} differ without being named, {failed} commands failed")
    return int(bool(unnamed or failed))


if __name__ == "__main__":
    raise SystemExit(main())
