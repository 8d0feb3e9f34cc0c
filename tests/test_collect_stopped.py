"""A collection that was stopped, at whatever moment: the same command gives the bytes of an undisturbed run."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from files import contents
from spies import note_calls
from tiny_runs import COLLECTED_HOOKS

import collect
from hook import HookedDiffusionModel
from store import collection

pytestmark = pytest.mark.slow


def test_a_larger_number_extends(collect_config):
    collect.main(collect_config)
    collect.main(replace(collect_config, max_num_examples=12))
    collect.main(
        replace(collect_config, max_num_examples=12, out_dir=collect_config.out_dir + "-at-once")
    )
    assert contents(collect_config.out_dir) == contents(collect_config.out_dir + "-at-once")
    before = contents(collect_config.out_dir)
    collect.main(replace(collect_config, max_num_examples=12))  # nothing to do
    assert contents(collect_config.out_dir) == before


def test_space_is_checked_before_anything_is_written(collect_config, monkeypatch):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(collect.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="do not fit"):
        collect.main(collect_config)
    assert not Path(collect_config.out_dir).exists()


def test_a_full_disk_stops_with_an_os_error_and_goes_on_later(collect_config, monkeypatch):
    def full(fd, offset, length):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space"):
            collect.main(collect_config)
        assert not list(Path(collect_config.out_dir).glob("*.partial"))
    collect.main(collect_config)
    collect.main(replace(collect_config, out_dir=collect_config.out_dir + "-undisturbed"))
    assert contents(collect_config.out_dir) == contents(collect_config.out_dir + "-undisturbed")


def test_a_deleted_file_is_not_made_anew_with_zeros(collect_config):
    collect.main(collect_config)
    (Path(collect_config.out_dir) / "mid_block.npy").unlink()
    for number in (8, 12):
        with pytest.raises(ValueError, match="missing"):
            collect.main(replace(collect_config, max_num_examples=number))


@pytest.mark.parametrize("calls", [1, None])
def test_truncated_files_are_not_filled_with_zeros(collect_config, monkeypatch, calls):
    """Cut while there is more to write, and cut when there is nothing left to do but to finish."""
    with monkeypatch.context() as patch:
        real = collection.Collection.write
        batches = []

        def write(self, batch, *rest):
            batches.append(batch)
            if calls and len(batches) > calls:
                raise KeyboardInterrupt
            real(self, batch, *rest)

        patch.setattr(collection.Collection, "write", write)
        patch.setattr(
            collection.Collection, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            collect.main(collect_config)
    partial = Path(collect_config.out_dir) / "mid_block.npy.partial"
    os.truncate(partial, partial.stat().st_size // 2)
    with pytest.raises(ValueError, match="missing or damaged"):
        collect.main(collect_config)
    assert partial.stat().st_size < 8 * 3 * 64 * 16 * 2


def during_write(monkeypatch, action):
    """Let `action(batch)` run before each batch is written."""
    note_calls(
        monkeypatch, collection.Collection, "write", lambda self, batch, *rest: action(batch)
    )


def counting_steps(monkeypatch):
    """A list that grows by one at each forward of the denoiser."""
    steps = []
    real = HookedDiffusionModel.from_pretrained

    def load(*args, **kwargs):
        hooked = real(*args, **kwargs)
        hooked.pipe.unet.register_forward_pre_hook(lambda *_: steps.append(0))
        return hooked

    monkeypatch.setattr(HookedDiffusionModel, "from_pretrained", load)
    return steps


def test_a_batch_is_written_while_the_next_is_generated(collect_config, monkeypatch):
    steps = counting_steps(monkeypatch)
    seen = []

    def wait(batch):
        before = len(steps)
        for _ in range(3000):
            if batch == 0 and len(steps) == before:
                threading.Event().wait(0.01)
        seen.append(
            (batch, len(steps) > before, threading.current_thread() is threading.main_thread())
        )

    during_write(monkeypatch, wait)
    collect.main(collect_config)
    assert seen[0] == (0, True, False)
    assert [batch for batch, _, _ in seen] == [0, 1]


def test_an_error_of_the_disk_ends_it_at_the_next_batch_and_loses_nothing(
    collect_config, monkeypatch
):
    """The third of many batches meets it while the fourth is generated: the first two are safe, no
    fifth is begun."""
    collect_config = replace(collect_config, batch_size=1, hook_names=["mid_block"])
    steps = counting_steps(monkeypatch)

    def fail(batch):
        if batch == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        during_write(patch, fail)
        with pytest.raises(OSError, match="No space"):
            collect.main(collect_config)
    assert len(steps) == 4 * 3  # a hook does not see the step that was thrown away
    pending = collection.Collection.pending
    with monkeypatch.context() as patch:
        results = []

        def pending_and_note(self):
            results.append(pending(self))
            return results[-1]

        patch.setattr(collection.Collection, "pending", pending_and_note)
        collect.main(collect_config)
    assert results[0] == [2, 3, 4, 5, 6, 7]
    collect.main(replace(collect_config, out_dir=collect_config.out_dir + "-undisturbed"))
    assert contents(collect_config.out_dir) == contents(collect_config.out_dir + "-undisturbed")


def test_ctrl_c_writes_what_was_generated(collect_config, monkeypatch, capsys):
    """Once: the batch that is being written is finished, and a message says so; and an error of it
    is not lost."""
    real = HookedDiffusionModel.run_with_cache

    def interrupt(self, names, text, **kwargs):
        if "a picture of 7" in text:
            raise KeyboardInterrupt
        return real(self, names, text, **kwargs)

    monkeypatch.setattr(HookedDiffusionModel, "run_with_cache", interrupt)
    with monkeypatch.context() as patch:
        during_write(patch, lambda batch: threading.Event().wait(0.5))
        with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
            collect.main(collect_config)
    assert "finishing what is generated" in capsys.readouterr().err
    (line,) = collection.read_progress(Path(collect_config.out_dir) / "progress.jsonl").values()
    assert (line["batch"], line["rows"], list(line["crc32"])) == (
        0,
        5,
        [*COLLECTED_HOOKS, "images/"],
    )

    def fail(batch):
        threading.Event().wait(0.5)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        during_write(patch, fail)
        with pytest.raises(OSError, match="No space"):
            collect.main(replace(collect_config, out_dir=collect_config.out_dir + "-full"))


def test_what_is_generated_is_written_when_the_next_fails(collect_config, monkeypatch):
    real = HookedDiffusionModel.run_with_cache

    def fail(self, names, text, **kwargs):
        if "a picture of 7" in text:
            raise RuntimeError("of the model")
        return real(self, names, text, **kwargs)

    with monkeypatch.context() as patch:
        during_write(patch, lambda batch: threading.Event().wait(0.5))
        patch.setattr(HookedDiffusionModel, "run_with_cache", fail)
        with pytest.raises(RuntimeError):
            collect.main(collect_config)
    assert list(collection.read_progress(Path(collect_config.out_dir) / "progress.jsonl")) == [0]
    collect.main(collect_config)  # and the folder is not locked
