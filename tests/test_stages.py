"""Every stage from the command line, on some kinds of model; tests/stages.py runs all of them."""

import re

import pytest
from commands import ROOT
from stages import STAGES, family_table, run_family

FAMILIES = {family.title: family for family in family_table()}
# One for each kind of output, of stream, of prompt and of guidance
SOME = (
    "SD3, text",
    "Wan 2.2",
    "CogVideoX with its DPM scheduler",
    "Stable Audio",
    "DiT",
    "FLUX Kontext",
    "SVD",
)


@pytest.mark.slow
@pytest.mark.parametrize("title", SOME)
def test_every_stage(title, tmp_path):
    results = run_family(FAMILIES[title], tmp_path / "family")
    assert results == dict.fromkeys(STAGES, "yes")


def test_the_table_of_the_docs_has_all_families():
    page = (ROOT / "docs/models.md").read_text()
    header = f"| family | {' | '.join(STAGES)} |"
    assert header in page
    rows = page.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    assert [re.match(r"\| (.*?) \|", row)[1] for row in rows] == list(FAMILIES)
    assert all(row.count("| yes ") == len(STAGES) for row in rows)
