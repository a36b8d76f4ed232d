"""Adapters of the peft package on a model that streams: small plain weights beside the stored ones, which stay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CASES, Case
from torch import nn

import litrt
from litrt.placeholder import Placeholder

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore")]

BUDGETS = ("min", "50%", "100%")

_TARGETS = ["q_proj", "v_proj"]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": _TARGETS, "init_lora_weights": False, **options})


@pytest.fixture(scope="module", params=["llama"])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def path(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(case, tmp_path_factory.mktemp("store") / "model.zarr")


def converted(case: Case, path: Path) -> Path:
    litrt.convert(case.build().state_dict(), path, progress=False)
    return path


@pytest.fixture(params=BUDGETS)
def rt(request: pytest.FixtureRequest, case: Case, path: Path) -> Iterator[litrt.Runtime]:
    with litrt.Runtime(case.build, path, budget=request.param) as runtime:
        yield runtime
        stats = runtime.stats()
        assert stats.peak_bytes <= stats.budget_bytes


def adapted(module: nn.Module, config: Any, name: str = "default") -> Any:
    """Returns `module` with an adapter that has weights, the same at every call, as one that was trained has."""
    if isinstance(module, peft.PeftModel):
        module.add_adapter(name, copy.deepcopy(config))
        module.set_adapter(name)
    else:
        module = peft.get_peft_model(module, copy.deepcopy(config), name)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for full_name, weight in module.named_parameters():
            if f".{name}" in full_name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return module.eval()


def logits(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(**inputs).logits
    return result


def steps(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the outputs of a life with adapters."""
    yield logits(module, inputs)
    model = adapted(module, lora())
    yield logits(model, inputs)
    yield logits(model, inputs)
    with model.disable_adapter():
        yield logits(model, inputs)
    yield logits(model, inputs)
    model = adapted(model, lora(r=2, target_modules=["down_proj", "q_proj"]), "another")
    yield logits(model, inputs)
    model.set_adapter("default")
    yield logits(model, inputs)
    model.add_weighted_adapter(["default"], [0.5], "weaker")
    model.set_adapter("weaker")
    yield logits(model, inputs)
    model.delete_adapter("another")
    yield logits(model, inputs)
    bare = model.unload()
    yield logits(bare, inputs)
    yield logits(adapted(bare, lora(use_rslora=True, lora_alpha=3)), inputs)


def test_adapters_come_and_go(rt: litrt.Runtime, case: Case) -> None:
    inputs = case.inputs()
    expected = list(steps(case.build(), inputs))
    assert not any(torch.equal(expected[0], other) for other in expected[1:3]), "an adapter changes the output"
    for number, result in enumerate(steps(rt.module, inputs)):
        assert torch.equal(result, expected[number]), number


@pytest.mark.parametrize("planned", [False, True], ids=["before the plan", "after the plan"])
def test_what_the_model_had_still_streams(planned: bool, rt: litrt.Runtime, case: Case) -> None:
    inputs = case.inputs()
    if planned:
        rt.warmup(**inputs)
    model = adapted(rt.module, lora())
    for _ in range(3):
        before = rt.stats()
        result = logits(model, inputs)
    assert torch.equal(result, logits(adapted(case.build(), lora()), inputs))
    assert rt.stats().since(before).read_bytes == rt.plan.streamed_bytes
    for name, weight in model.named_parameters():
        assert not (isinstance(weight, Placeholder) and "lora" in name)
    assert any(isinstance(weight, Placeholder) for weight in model.parameters()) == (rt.plan.streamed_bytes > 0)


KINDS: dict[str, Callable[[], Any]] = {
    "magnitudes": lambda: lora(use_dora=True),
    "of embeddings": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "parts that are replaced": lambda: lora(modules_to_save=["lm_head"]),
    "of a parameter": lambda: lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "scaled": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "Kronecker products": lambda: peft.LoKrConfig(r=4, target_modules=_TARGETS),
    "prefixes": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters(kind: str, case: Case, path: Path) -> None:
    inputs = case.inputs()
    bare = case.build()
    unchanged = logits(bare, inputs)
    expected = logits(adapted(bare, KINDS[kind]()), inputs)
    assert not torch.equal(expected, unchanged)
    with litrt.Runtime(case.build, path, budget="min") as rt:
        model = adapted(rt.module, KINDS[kind]())
        for _ in range(2):
            assert torch.equal(logits(model, inputs), expected)
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


def test_adapters_of_experts_in_one_array(tmp_path: Path) -> None:
    case = CASES["mixtral"]
    config = lora(target_modules=[], target_parameters=["gate_up_proj"])
    inputs = case.inputs()
    expected = logits(adapted(case.build(), config), inputs)
    with litrt.Runtime(case.build, converted(case, tmp_path / "model.zarr"), budget="min") as rt:
        model = adapted(rt.module, config)
        for _ in range(2):
            assert torch.equal(logits(model, inputs), expected)


def test_an_adapter_is_saved_and_loaded(case: Case, path: Path, tmp_path: Path) -> None:
    inputs = case.inputs()
    config = lora(modules_to_save=["lm_head"])
    expected = logits(adapted(case.build(), config), inputs)
    with litrt.Runtime(case.build, path, budget="min") as rt:
        adapted(rt.module, config).save_pretrained(tmp_path / "adapter")
    with litrt.Runtime(case.build, path, budget="min") as rt:
        model = peft.PeftModel.from_pretrained(rt.module, tmp_path / "adapter")
        assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_is_not_merged_into_weights_that_stream(merge: str, safe: bool, case: Case, path: Path) -> None:
    inputs = case.inputs()
    expected = logits(adapted(case.build(), lora()), inputs)
    with litrt.Runtime(case.build, path, budget="min") as rt:
        model = adapted(rt.module, lora())
        with pytest.raises(litrt.WeightWriteError, match=r"cannot write to 'model\.layers\.0\..*read-only"):
            getattr(model, merge)(safe_merge=safe)
        assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("budget", ["90%", "100%"])
def test_what_was_merged_into_weights_that_stay_stays(budget: str, case: Case, path: Path) -> None:
    inputs = case.inputs()
    plain = adapted(case.build(), lora())
    expected = logits(plain, inputs)
    with litrt.Runtime(case.build, path, budget=budget) as rt:
        rt.warmup(**inputs)
        model = adapted(rt.module, lora())
        if budget == "100%":
            model.merge_adapter()
            plain.merge_adapter()
            expected = logits(plain, inputs)
        else:
            with pytest.raises(litrt.WeightWriteError):
                model.merge_adapter()
        for _ in range(3):
            result = logits(model, inputs)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
            assert budget != "100%" or torch.equal(result, expected)
            rt.warmup(**inputs)
