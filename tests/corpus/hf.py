"""The architectures of the transformers package: each model type, with a class that runs it."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from corpus.case import Case, Inputs, NotBuilt, outputs, seeded
from corpus.hints import Hints, learnt, second
from corpus.inputs import MAKERS, inputs_of
from corpus.rules import RULES
from corpus.shrink import Sizes, kept, shrunk
from corpus.texts import has_books

MOST_BYTES = 24 << 20
"""Weights of a model that counts as small."""

_SIZES = (
    Sizes(),
    Sizes(image=64),
    Sizes(sections=True),
    Sizes(width=64, image=64),
    Sizes(lists=False, image=64),
    Sizes(unknown=False),
    Sizes(parts=True),
    Sizes(even=True, image=64),
    Sizes(width=64, unknown=False, image=128),
    Sizes(width=64, unknown=False, lists=False, image=224),
)

_MENDED = (Sizes(), Sizes(even=True, image=64), Sizes(image=64))

_HEADS = (
    "ForConditionalGeneration",
    "ForCausalLM",
    "LMHeadModel",
    "ForMaskedLM",
    "ForImageClassification",
    "ForCTC",
    "ForPreTraining",
    "ForSequenceClassification",
    "For",
    "Model",
    "",
)


def model_types() -> list[str]:
    """Returns the model types that transformers knows, without importing any of them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return list(CONFIG_MAPPING_NAMES)


def classes(model_type: str) -> list[type[nn.Module]]:
    """Returns the classes of a model type, those with a head first."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

    config_class = CONFIG_MAPPING[model_type]
    folder = model_type_to_module_name(model_type)
    package = importlib.import_module(f"transformers.models.{folder}")
    module_name = config_class.__module__.rsplit(".", 1)[-1].replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(f"{package.__name__}.{module_name}")
    except ImportError as error:
        raise NotBuilt(f"it has no module of models: {error}") from None
    base = transformers.PreTrainedModel
    found = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not re.search(r"PreTrainedModel$|PretrainedModel$", name)
        and value.config_class is config_class
        and value.forward is not base.forward
    ]
    return sorted(found, key=_rank)


def _rank(kind: type[nn.Module]) -> tuple[bool, int]:
    """Orders classes: those that take text and images, sounds or a second text first, then by their head."""
    head = next(index for index, head in enumerate(_HEADS) if head in kind.__name__)
    return head > 1 and family(kind) not in ("vision-language", "encoder-decoder"), head


def family(kind: type[nn.Module]) -> str:
    """Returns which inputs a class takes, for reports."""
    parameters = inspect.signature(kind.forward).parameters
    text = "input_ids" in parameters
    if "pixel_values" in parameters or "pixel_values_videos" in parameters or "visual_embeds" in parameters:
        return "vision-language" if text else "vision"
    if {"input_features", "input_values", "audio_codes"} & set(parameters):
        return "audio"
    if "decoder_input_ids" in parameters:
        return "encoder-decoder"
    if "past_values" in parameters:
        return "series"
    if text:
        return "decoder" if re.search("CausalLM|LMHead", kind.__name__) else "text"
    return "vision" if "grid_thw" in parameters else "other"


def _merged(arguments: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments with others in their place, also inside those that are arguments of a part."""
    merged = dict(arguments)
    for name, value in others.items():
        before = merged.get(name)
        merged[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def small(kind: type[nn.Module], model_type: str, limit_s: float = 30, mend: bool = False) -> Case:
    """Returns a class as a case: the first way to make it small in which the plain model runs.

    With `mend`, one of the sizes is left as it is: it may be another one than its rule takes it for.

    Raises:
        NotBuilt: If there is none.
    """
    config_class: Any = kind.config_class
    try:
        default = config_class(**RULES.get(model_type, {}).get("with", {}))
    except Exception as error:
        raise NotBuilt(_brief("config", error)) from None
    rule = RULES.get(model_type, {}).get("set", {})
    waiting = [_merged(shrunk(default, sizes), rule) for sizes in (_MENDED if mend else _SIZES)]
    reasons: list[str] = []
    end_s = time.process_time() + limit_s
    for arguments in waiting:
        for changed in kept(arguments, default, reasons) if mend else (arguments,):
            if time.process_time() > end_s:
                raise NotBuilt(_summary(reasons))
            found: list[str] = []
            if (case := _attempt(kind, model_type, changed, found, 5 if mend else 16, end_s)) is not None:
                return case
            if mend and found[0].startswith("forward") and found[0] not in reasons and len(waiting) < 6:
                waiting.append(changed)  # it goes further, or elsewhere
            reasons += found
    raise NotBuilt(_summary(reasons))


def _attempt(
    kind: type[nn.Module], model_type: str, arguments: dict[str, Any], reasons: list[str], n_tries: int, end_s: float
) -> Case | None:
    """Returns a class as a case if it runs with a config of `arguments`; adds the reasons why it does not."""
    try:
        config_class: Any = kind.config_class
        config = config_class(**arguments)
    except Exception as error:
        reasons.append(_brief("config", error))
        return None
    try:
        with torch.device("meta"):
            n_bytes = sum(p.nbytes for p in kind(config).parameters())
    except Exception:
        n_bytes = 0  # a constructor that needs values
    construct = functools.partial(kind, config)
    try:
        if n_bytes > MOST_BYTES:
            raise NotBuilt(f"{n_bytes / 1e6:.0f} MB of weights")
        with seeded():
            model = construct().eval()
        n_bytes = sum(p.nbytes for p in model.parameters())
        if n_bytes > MOST_BYTES:
            raise NotBuilt(f"{n_bytes / 1e6:.0f} MB of weights")
        if n_bytes == 0:
            raise NotBuilt("it has no weights")
    except NotBuilt as error:
        reasons.append(str(error))
        return None
    except Exception as error:
        reasons.append(_brief("constructor", error))
        return None
    hints = _hints(model, reasons, RULES.get(model_type, {}).get("hints", Hints()), n_tries, end_s)
    if hints is None:
        return None
    made = [inputs_of(model, hints), _other(model, hints)]
    return Case(f"{model_type}: {kind.__name__}", family(kind), construct, made.__getitem__)


def _hints(model: nn.Module, reasons: list[str], first: Hints, n_tries: int, end_s: float) -> Hints | None:
    waiting, tried = [first], set()
    known = [name for name in inspect.signature(model.forward).parameters if name in MAKERS]
    while waiting and len(tried) < n_tries and (not tried or time.process_time() < end_s):
        hints = waiting.pop(0)
        if hints in tried or (hints.books and not has_books(model)):
            continue
        tried.add(hints)
        given: Inputs = {}
        try:
            given = inputs_of(model, hints)
            with torch.no_grad(), seeded():
                y = outputs(model(**given))
            if not y or not any(t.numel() for t in y):
                raise NotBuilt("it returns no tensor")
            if not any(t.isfinite().any() for t in y if t.is_floating_point()):
                raise NotBuilt("what the plain model returns is not finite")
            return hints
        except Exception as error:
            reasons.append(_brief("forward", error))
            waiting[:0] = learnt(hints, str(error), given, known)
    return None


def _other(model: nn.Module, hints: Hints) -> Inputs:
    """Returns a second input: another batch size and another length, or at least another one of these."""
    for other in (second(hints, True), second(hints, False), replace(hints, n_tokens=hints.n_tokens + 4)):
        given = inputs_of(model, other)
        try:
            with torch.no_grad(), seeded():
                model(**given)
            return given
        except Exception:
            continue
    return inputs_of(model, hints)


def _brief(where: str, error: Exception) -> str:
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _summary(reasons: list[str]) -> str:
    unique = list(dict.fromkeys(reasons))
    return unique[0] if unique else "nothing to try"


def case_of(model_type: str, limit_s: float = 20) -> Case:
    """Returns a model type as a case, by the first of its classes that can be made small.

    Args:
        model_type: Its name.
        limit_s: Seconds of the processor that all its classes together may take, half of it for the first one.

    Raises:
        NotBuilt: If there is none.
    """
    reasons = []
    kinds = classes(model_type)
    end_s = time.process_time() + limit_s
    for mend, n_kinds in ((False, 4), (True, 2)):
        for kind in kinds[:n_kinds]:
            left_s = end_s - time.process_time()
            if reasons and left_s <= 0:
                break
            try:
                return small(kind, model_type, min(left_s, limit_s / 2), mend)
            except NotBuilt as error:
                reasons.append(f"{kind.__name__}: {error}")
        if any("no rule for its input" in reason for reason in reasons[:1]):
            break
    raise NotBuilt(reasons[0] if reasons else "no class of a model belongs to its config")
