"""What transformers' `generate` writes with `rt.module` is what the plain model writes: ids and scores, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.case import outputs
from small_models import CASES, Case

import litrt

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore")]

BUDGETS = ("min", "50%", "100%")
N_TOKENS = 4


@dataclass(frozen=True)
class Prepared:
    """A model with its store, what it is asked to continue, and what the plain model wrote."""

    case: Case
    plain: Any
    path: Path
    inputs: Mapping[str, torch.Tensor]

    def runtime(self, budget: str) -> litrt.Runtime:
        return litrt.Runtime(self.case.build, self.path, budget=budget)


def _prompts() -> dict[str, torch.Tensor]:
    """Two prompts of different lengths, padded on the left."""
    ids = torch.randint(5, 99, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models so small are slower with more
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    """Returns a function that makes a model and its store once, for all the tests that use it."""
    made: dict[str, Prepared] = {}

    def prepare(name: str) -> Prepared:
        if name not in made:
            case = CASES[name]
            plain = case.build()
            path = tmp_path_factory.mktemp("store") / "model.zarr"
            litrt.convert(plain.state_dict(), path, progress=False)
            inputs = case.inputs()
            if name in ("whisper", "llava"):
                inputs.pop("decoder_input_ids", None)
            else:
                inputs = _prompts()
            made[name] = Prepared(case, plain, path, inputs)
        return made[name]

    return prepare


def write(module: Any, inputs: Mapping[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Returns the token ids, and the scores of all steps."""
    given = {
        "max_new_tokens": N_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "decoder_start_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(1)
    return outputs(module.generate(**inputs, **(given | options)))


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected) > N_TOKENS
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def check(
    model: Prepared,
    *all_options: dict[str, Any],
    inputs: Mapping[str, torch.Tensor] | None = None,
    budgets: tuple[str, ...] = BUDGETS,
) -> None:
    """Asserts that a runtime writes what the plain model writes, in each way, and again with the plan of the first."""
    given = model.inputs if inputs is None else inputs
    expected = [write(model.plain, given, **options) for options in all_options]
    for budget in budgets:
        with model.runtime(budget) as rt:
            for options, wanted in zip(all_options, expected, strict=True):
                assert_same(write(rt.module, given, **options), wanted)
            before = rt.stats()
            assert_same(write(rt.module, given, **all_options[0]), expected[0])
            stats = rt.stats()
            assert stats.peak_bytes <= stats.budget_bytes
            assert (stats.since(before).read_bytes == 0) == (budget == "100%" or not rt.plan.streamed_bytes)
            assert rt.plan.streamed_bytes > 0 or budget != "min"


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
    "prompt in pieces": {"prefill_chunk_size": 3},
    "guided, hidden states": {"guidance_scale": 1.5, "output_hidden_states": True},
}


def test_a_decoder_writes_the_same_in_every_way(prepared: Callable[[str], Prepared]) -> None:
    check(prepared("llama"), *WAYS.values())


@pytest.mark.parametrize(
    "name", ["gptj", "mixtral", "t5", "bart", "whisper", pytest.param("llava", marks=pytest.mark.corpus)]
)
def test_other_models_write_the_same(name: str, prepared: Callable[[str], Prepared]) -> None:
    check(prepared(name), WAYS["beams"], budgets=("min", "50%"))


@pytest.mark.parametrize(("name", "encoder"), [("t5", "encoder"), ("bart", "model.encoder")])
def test_an_encoder_that_was_warmed_up_is_read_ahead(
    name: str, encoder: str, prepared: Callable[[str], Prepared]
) -> None:
    model = prepared(name)
    expected = write(model.plain, model.inputs)
    faults = []
    for methods in ([], [encoder]):
        with model.runtime("50%") as rt:
            for method in methods:
                rt.warmup(**model.inputs, method=method)
            for _ in range(6):  # then every path has its plan
                before = rt.stats()
                assert_same(write(rt.module, model.inputs), expected)
            faults.append(rt.stats().since(before).n_faults)
    assert faults[0] > 4 * faults[1]


def test_drafts_are_checked_in_the_same_way(prepared: Callable[[str], Prepared]) -> None:
    model, assistant = prepared("llama"), prepared("gptj")
    one = {name: value[:1] for name, value in model.inputs.items()}
    with assistant.runtime("min") as drafting:
        expected = write(model.plain, one, assistant_model=assistant.plain)
        for budget in BUDGETS:
            with model.runtime(budget) as rt:
                assert_same(write(rt.module, one, assistant_model=assistant.plain), expected)
                assert_same(write(rt.module, one, assistant_model=drafting.module), expected)
    check(model, {"prompt_lookup_num_tokens": 3}, inputs=one)


class Tokens(transformers.generation.streamers.BaseStreamer):
    """Gets the tokens one by one, and may have had enough."""

    def __init__(self, n_wanted: int = 1000) -> None:
        self.given: list[int] = []
        self._n_wanted = n_wanted

    def put(self, value: torch.Tensor) -> None:
        self.given += value.flatten().tolist()
        self._n_wanted -= 1
        if self._n_wanted < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.given.append(-1)


@pytest.mark.parametrize("budget", BUDGETS)
def test_tokens_are_streamed_as_they_are_written(budget: str, prepared: Callable[[str], Prepared]) -> None:
    model = prepared("llama")
    one = {name: value[:1] for name, value in model.inputs.items()}
    tokens = Tokens()
    expected = write(model.plain, one, streamer=tokens)
    with model.runtime(budget) as rt:
        for _ in range(2):
            streamed = Tokens()
            assert_same(write(rt.module, one, streamer=streamed), expected)
            assert streamed.given == tokens.given
            assert len(streamed.given) == 7 + N_TOKENS + 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_text_that_is_abandoned_leaves_the_next_one_right(budget: str, prepared: Callable[[str], Prepared]) -> None:
    model = prepared("llama")
    one = {name: value[:1] for name, value in model.inputs.items()}
    expected = write(model.plain, model.inputs)
    with model.runtime(budget) as rt:
        for n_tokens in (0, 1, 3):
            with pytest.raises(KeyboardInterrupt):
                write(rt.module, one, streamer=Tokens(n_tokens))
            assert_same(write(rt.module, model.inputs), expected)
        stop = transformers.StoppingCriteriaList([lambda ids, scores: torch.full(ids.shape[:1], ids.shape[1] >= 9)])
        (ids, *_) = write(rt.module, model.inputs, stopping_criteria=stop)
        assert ids.shape == (2, 9)
        assert torch.equal(ids, expected[0][:, :9])
        assert_same(write(rt.module, model.inputs), expected)
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


@pytest.mark.parametrize("budget", BUDGETS)
def test_two_threads_write_at_once_and_are_read_as_they_write(budget: str, prepared: Callable[[str], Prepared]) -> None:
    """As a server does: each request has a thread that writes, and one that reads what it has written so far."""
    model = prepared("llama")
    tokenizer = _tokenizer()
    requests = [{name: value[number : number + 1] for name, value in model.inputs.items()} for number in range(2)]
    expected = []
    for request in requests:
        ids = model.plain.generate(**request, max_new_tokens=N_TOKENS, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(ids[0]))
    with model.runtime(budget) as rt:
        for _ in range(2):
            streamers = [transformers.TextIteratorStreamer(tokenizer, timeout=60) for _ in requests]
            writers = [
                threading.Thread(
                    target=rt.module.generate,
                    kwargs={**request, "streamer": streamer, "max_new_tokens": N_TOKENS, "do_sample": False}
                    | {"pad_token_id": 0},
                )
                for request, streamer in zip(requests, streamers, strict=True)
            ]
            for writer in writers:
                writer.start()
            texts = ["".join(streamer) for streamer in streamers]
            for writer in writers:
                writer.join()
            assert texts == expected
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


def _tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"w{number}": number for number in range(99)}, unk_token="w0")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
