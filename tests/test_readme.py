"""The README says what is true."""

from __future__ import annotations

import re
from pathlib import Path

import litrt
from bench.table import filled

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_raw_samples():
    assert (
        README.count("<!-- table: ") == len(re.findall(r"<!-- table: \S+ (?:peers|budgets)(?: \S+)? -->", README)) > 0
    )
    assert filled(README) == README, "run: python -m bench table"


def test_a_table_that_is_not_current_is_seen():
    changed = re.sub(r"(\*\*litrt\*\* \|) [\d.]+", r"\1 0.01", README)
    assert changed != README
    assert filled(changed) == README


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_name_it_uses_is_public():
    for name in re.findall(r"litrt\.([a-zA-Z_]+)\(", README):
        assert name in litrt.__all__, name


def test_ci_runs_the_command_that_the_readme_gives_for_the_tests():
    assert "tox" in README
    assert '"$venv/bin/tox"' in (ROOT / ".ci" / "run").read_text()
