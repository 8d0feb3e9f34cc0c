"""A power cut at any system call of a collection costs no byte."""

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from files import contents

import collect
from hook import HookedDiffusionModel
from store import collection

pytestmark = pytest.mark.slow


CALLS = [
    (os, "pwrite"),
    (os, "write"),
    (os, "fsync"),
    (os, "replace"),
    (os, "unlink"),
    (os, "posix_fallocate"),
    (os, "open"),
]


def crash_at(patch, moment):
    """Let the system call number `moment` of those that write, and all after it, raise; the list
    that counts them."""
    made = []

    def crashing(real):
        def call(*args, **kwargs):
            made.append(real)
            if len(made) > moment:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    for module, name in CALLS:
        patch.setattr(module, name, crashing(getattr(module, name)))
    return made


@pytest.mark.parametrize("start", ["fresh", "extending", "shrinking"])
def test_a_crash_at_any_system_call_costs_no_byte(collect_config, monkeypatch, start):
    """Power cuts between any two writes, syncs and renames: the same command then gives the files
    of an undisturbed run."""
    collect_config = replace(
        collect_config,
        hook_names=["mid_block"],
        num_inference_steps=1,
        batch_size=3,
        max_num_examples=5,
    )
    hooked = HookedDiffusionModel.from_pretrained(collect_config.model_name)
    monkeypatch.setattr(HookedDiffusionModel, "from_pretrained", lambda *args, **kwargs: hooked)
    collect.main(replace(collect_config, out_dir=collect_config.out_dir + "-undisturbed"))
    expected = contents(collect_config.out_dir + "-undisturbed")
    started = Path(collect_config.out_dir + "-started")
    if start == "extending":
        collect.main(replace(collect_config, max_num_examples=4, out_dir=str(started)))
    if start == "shrinking":
        with monkeypatch.context() as patch:
            write = collection.Collection.write

            def only_the_first(self, batch, *rest):
                if batch > 0:
                    raise OSError("stopped")
                write(self, batch, *rest)

            patch.setattr(collection.Collection, "write", only_the_first)
            with pytest.raises(OSError, match="stopped"):
                collect.main(replace(collect_config, max_num_examples=8, out_dir=str(started)))
    for moment in range(200):
        shutil.rmtree(collect_config.out_dir, ignore_errors=True)
        if start != "fresh":
            shutil.copytree(started, collect_config.out_dir)
        with monkeypatch.context() as patch:
            made = crash_at(patch, moment)
            with suppress(KeyboardInterrupt):
                collect.main(collect_config)
        if len(made) <= moment:
            break
        collect.main(collect_config)
        assert contents(collect_config.out_dir) == expected, moment
    assert 50 < moment < 200
