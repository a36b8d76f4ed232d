"""Every model that is found and can be made small gives what the plain model gives, inside the budget.

`-m corpus` runs all of them and prints what was served and what was not; without it a sample runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from corpus import diffusion, hf, torch_modules, vision
from corpus.case import Case, NotBuilt
from corpus.check import check
from corpus.report import Row

import litrt

pytestmark = [pytest.mark.usefixtures("poisoned", "rough_plans"), pytest.mark.filterwarnings("ignore")]

Record = Callable[[Row], None]

SAMPLE = ("gpt2", "t5", "mixtral", "mamba", "siglip", "mllama", "llava")


def marked(names: list[str], *sample: str) -> list[Any]:
    """Returns names as parameters: all but a sample are run by a marker only."""
    return [pytest.param(name, marks=() if name in sample else pytest.mark.corpus, id=name) for name in names]


def model_types() -> list[str]:
    return hf.model_types() if importlib.util.find_spec("transformers") else []


def diffusers_classes() -> list[str]:
    return diffusion.classes() if importlib.util.find_spec("diffusers") else []


@pytest.fixture
def record(record_property: Callable[[str, Any], None]) -> Record:
    """Returns a function that puts a row into the table, from whichever process runs the test."""
    return lambda row: record_property("corpus", asdict(row))


def serve(name: str, find: Callable[[str], Case], path: Path, record: Record) -> None:
    """Checks a model and records the row of the table; skips what does not run as the plain model."""
    try:
        case = find(name)
        served = check(case, path)
    except NotBuilt as error:
        record(Row(name, "not built", reason=str(error)))
        pytest.skip(str(error))
    except litrt.WeightWriteError as error:
        # Weights are read-only: what writes them is told which one, and what to do.
        record(Row(name, "refused", reason=str(error)))
        if error.name not in str(error) or "w.clone()" not in str(error):
            raise
        pytest.skip(str(error))
    except BaseException as error:
        record(Row(name, "failed", reason=f"{type(error).__name__}: {error}"))
        raise
    record(Row(case.name, "served", case.family, served.weight_bytes))


# What they do with weights: gpt2 and t5 tie them, mixtral routes, mamba reads its tables by hand, siglip has
# nn.MultiheadAttention; mllama reads weights outside of the forward of the module that owns them.
@pytest.mark.timeout(900)  # slanet's decoder runs 500 times in a pass
@pytest.mark.parametrize("model_type", marked(model_types(), *SAMPLE))
def test_transformers(model_type: str, tmp_path: Path, record: Record) -> None:
    serve(model_type, hf.case_of, tmp_path / "model.zarr", record)


@pytest.mark.parametrize("name", marked(diffusers_classes()))
def test_diffusers(name: str, tmp_path: Path, record: Record) -> None:
    serve(name, diffusion.case_of, tmp_path / "model.zarr", record)


@pytest.mark.parametrize("name", marked(torch_modules.classes(), "MultiheadAttention", "EmbeddingBag"))
def test_torch_nn(name: str, tmp_path: Path, record: Record) -> None:
    serve(name, torch_modules.case_of, tmp_path / "model.zarr", record)


@pytest.mark.parametrize("name", marked(vision.names(), "efficientnet 0", "swin 0"))
def test_vision_nets(name: str, tmp_path: Path, record: Record) -> None:
    serve(name, vision.case_of, tmp_path / "model.zarr", record)


# The way from a config to a small one.


def test_a_model_that_cannot_be_made_small_says_why() -> None:
    with pytest.raises(NotBuilt, match="a container without a forward"):
        torch_modules.case_of("ModuleList")


def test_the_second_input_is_another_one() -> None:
    pytest.importorskip("transformers")
    case = hf.case_of("llama")
    first, second = (case.inputs(number)["input_ids"].shape for number in (0, 1))
    assert first[0] != second[0]
    assert first[1] != second[1]
