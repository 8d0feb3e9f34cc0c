"""Before any test imports torch: one thread in each of several workers, and Triton's interpreter
where there is no GPU."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # two workers of two threads each are many times slower on two cores

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when Triton is imported, by whichever test comes first
    )


def pytest_collection_modifyitems(items):
    """Kernels in the interpreter are slow: their torch twins are what the quick tests run. Files
    with slow tests come first.

    A worker takes a whole file at a time: one that takes long and begins last would leave the other
    worker with nothing to do.
    """
    for item in items:
        if (
            not torch.cuda.is_available()
            and item.path.name == "test_kernels.py"
            and "triton" in item.name
        ):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
