"""The README says what is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import litrt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_raw_samples():
    spec = importlib.util.spec_from_file_location("table", ROOT / "bench" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert table.filled(README) == README, "run: python bench/table.py"


def test_every_file_it_links_to_exists():
    import re

    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_name_it_uses_is_public():
    import re

    for name in re.findall(r"litrt\.([a-zA-Z_]+)\(", README):
        assert name in litrt.__all__, name


def test_ci_runs_the_command_that_the_readme_gives_for_the_tests():
    assert "tox" in README
    assert '"$venv/bin/tox"' in (ROOT / ".ci" / "run").read_text()
