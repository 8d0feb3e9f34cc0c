"""The quick part of `python -m bench trust`: what is stored and edited against hooks written by hand, bit for bit."""

import pytest

from bench.trust import GUIDANCE, PROMPTS, SCHEDULERS, differences

# a column of every kind for one scheduler, and schedulers of every kind: ancestral, second order, SDE
CELLS = [("DDIM", guidance, number) for guidance in GUIDANCE for number in (1, 2)]
CELLS += [(scheduler, "7.5", 1) for scheduler in ("Euler ancestral", "Heun", "KDPM2", "DPM++ 2M SDE", "LCM")]


@pytest.mark.parametrize("scheduler, guidance, number", CELLS)
def test_rows_and_edits_are_those_of_hooks_written_by_hand(scheduler, guidance, number):
    assert scheduler in SCHEDULERS
    assert differences(scheduler, guidance, PROMPTS[:number]) == []
