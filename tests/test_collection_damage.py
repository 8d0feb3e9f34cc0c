"""A stopped collection whose files were damaged before the same command resumes it."""

import json
import random
import shutil
from dataclasses import replace

import pytest
from commands import run_script
from files import contents, flip

import collect
from errors import UsageError

pytestmark = pytest.mark.slow

HOOK = "mid_block"


def collection_of(model_folder, out_dir, **options):
    """The Config of four batches."""
    options = (
        dict(
            hook_names=[HOOK], num_inference_steps=2, batch_size=2, max_num_examples=8, device="cpu"
        )
        | options
    )
    return collect.Config(model_name=str(model_folder), out_dir=str(out_dir), **options)


def stop(config, monkeypatch, num_batches):
    """Collect the first batches only, as when the command is interrupted."""
    real = collect.generate
    calls = []

    def generate(*args):
        if len(calls) == num_batches:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(collect, "generate", generate)
        with pytest.raises(KeyboardInterrupt):
            collect.main(config)


MANY_FILES = dict(rows="both", tokens_per_step=5, save_samples=True)


@pytest.mark.parametrize(
    "options", [{}, MANY_FILES, dict(side="diff")], ids=["plain", "many files", "diff"]
)
def test_damaged_rows_of_a_stopped_collection_are_made_again(
    options, monkeypatch, model_folder, tmp_path, capsys
):
    """Wherever one bit was flipped: in the rows of any file, in an image, or a whole image is
    missing."""
    config = collection_of(model_folder, tmp_path / "whole", **options)
    collect.main(config)
    expected = contents(config.out_dir)

    stopped = replace(config, out_dir=str(tmp_path / "stopped"))
    stop(stopped, monkeypatch, 3)
    rng = random.Random(0)
    names = [path.name for path in (tmp_path / "stopped").glob("*.npy.partial")]
    damages = [
        (name, 128 + rng.randrange((tmp_path / "stopped" / name).stat().st_size // 2))
        for name in names
    ]
    damages += [("images/1.webp", 40), ("images/2.webp", None)]
    for number, (name, offset) in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(stopped.out_dir, folder)
        if offset is None:
            (folder / name).unlink()
        else:
            flip(folder / name, offset)
        capsys.readouterr()
        collect.main(replace(config, out_dir=str(folder)))
        assert "1 of 3 batches are not as they were written" in capsys.readouterr().out, name
        assert contents(folder) == expected, (name, offset)


def test_a_damaged_line_of_progress_and_a_damaged_header(monkeypatch, model_folder, tmp_path):
    """A digit that names a batch that was never made, or rows of another shape; also where only the
    last renaming is missing."""
    config = collection_of(model_folder, tmp_path / "whole")
    collect.main(config)
    expected = contents(config.out_dir)

    stopped = replace(config, out_dir=str(tmp_path / "stopped"))
    stop(stopped, monkeypatch, 2)
    progress = (tmp_path / "stopped" / "progress.jsonl").read_text()
    shape = b"(8, 2, 64, 16)"
    header = (tmp_path / "stopped" / f"{HOOK}.npy.partial").read_bytes()
    assert shape in header[:128]
    assert '{"batch": 1,' in progress

    for number, line in enumerate(['{"batch": 3,', '{"batch": -1,']):
        folder = tmp_path / f"line{number}"
        shutil.copytree(stopped.out_dir, folder)
        (folder / "progress.jsonl").write_text(progress.replace('{"batch": 1,', line))
        collect.main(replace(config, out_dir=str(folder)))
        assert contents(folder) == expected

    for number, damaged in enumerate([b"(8, 2, 63, 16)", b"(8, 1, 64, 16)", b"(7, 2, 64, 16)"]):
        folder = tmp_path / f"header{number}"
        shutil.copytree(stopped.out_dir, folder)
        (folder / f"{HOOK}.npy.partial").write_bytes(header.replace(shape, damaged))
        collect.main(replace(config, out_dir=str(folder)))
        assert contents(folder) == expected

        folder = tmp_path / f"renaming{number}"
        shutil.copytree(config.out_dir, folder)
        (folder / f"{HOOK}.json").unlink()
        done = (folder / f"{HOOK}.npy").read_bytes()
        (folder / f"{HOOK}.npy").unlink()
        (folder / f"{HOOK}.npy.partial").write_bytes(done.replace(shape, damaged))
        collect.main(replace(config, out_dir=str(folder)))
        assert contents(folder) == expected


def test_lines_without_checksums_are_believed_and_what_is_finished_is_not_read(
    monkeypatch, model_folder, tmp_path, capsys
):
    config = collection_of(model_folder, tmp_path / "acts", max_num_examples=4)
    stop(config, monkeypatch, 1)
    (tmp_path / "acts" / "progress.jsonl").write_text('{"batch": 0, "rows": 2}\n')
    flip(tmp_path / "acts" / f"{HOOK}.npy.partial", 200)
    collect.main(config)
    lines = (tmp_path / "acts" / "progress.jsonl").read_text().splitlines()
    assert lines[0] == '{"batch": 0, "rows": 2}'
    assert list(json.loads(lines[1])["crc32"]) == [
        HOOK,
        "images/",
    ]

    flip(tmp_path / "acts" / f"{HOOK}.npy", -1)
    with pytest.raises(UsageError, match=f"{HOOK}.npy is not the file that"):
        collect.main(config)  # nothing to do, but this file is not described anew
    assert "not as they were written" not in capsys.readouterr().out
    collect.main(replace(config, max_num_examples=6))  # an extension goes on with these rows
    assert "1 of 2 batches are not as they were written" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [b"", b"garbage", None], ids=["empty", "garbage", "cut"])
@pytest.mark.parametrize("name", [f"{HOOK}.npy.partial", f"{HOOK}.tokens.npy.partial"])
def test_a_cut_file_of_a_stopped_collection_is_one_line(
    name, damage, monkeypatch, model_folder, tmp_path
):
    config = collection_of(model_folder, tmp_path / "acts", tokens_per_step=3)
    stop(config, monkeypatch, 2)
    path = tmp_path / "acts" / name
    path.write_bytes(path.read_bytes()[:-60] if damage is None else damage)
    options = [
        "--hook_names",
        HOOK,
        "--num_inference_steps",
        2,
        "--batch_size",
        2,
        "--max_num_examples",
        8,
        "--device",
        "cpu",
    ]
    options += [
        "--tokens_per_step",
        3,
        "--model_name",
        model_folder,
        "--out_dir",
        tmp_path / "acts",
    ]
    done = run_script("collect.py", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"{name} is missing or damaged" in done.stderr.splitlines()[-1]
