"""Fixtures that several test files share."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
from tiny import build, sd15, sdxl

# A background job ignores SIGINT and so do the processes that it starts; tests that press Ctrl-C
# need what a terminal gives.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=[sd15, sdxl], ids=lambda f: f.__name__)
def pipe(request):
    return build(request.param)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Stable Diffusion 1.5-like pipeline on disk, with prompts of its own."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe = build(sd15)
    pipe.save_pretrained(folder)
    (folder / "prompts.csv").write_text(
        "prompt,colour\n" + "".join(f"a picture of {i},{i % 3}\n" for i in range(12))
    )
    return folder
