"""A device that runs behind the host: right values, in the right order, inside two budgets. No device is needed.

Every operator and every copy is checked against the events that order them. Released memory is not poisoned: to do that
is work among the copies, which would keep in order what should be kept in order by itself.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeStore
from test_equivalence import CASES, EarlyExit, RoutedExperts, assert_same, plain_model, seeded, x
from torch import nn

import litrt
import litrt.link
import litrt.planner
from litrt.arena import Arena
from litrt.budget import as_segments
from litrt.cache import Cache
from litrt.device import CpuDevice
from litrt.pipeline import Pipeline
from litrt.placeholder import Placeholder
from litrt.tensors import TensorInfo
from litrt.testing import FakeDevice, Mutation, OrderError

WIDTH = 64
N_LAYERS = 8
LAYER_BYTES = WIDTH * WIDTH * 4
N_PASSES = 3


class Chain(nn.Module):
    def __init__(self, n_layers: int = N_LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def plain() -> nn.Module:
    return plain_model(Chain)


@pytest.fixture
def path(plain: nn.Module, make_store: MakeStore) -> Path:
    return make_store(plain)


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits copies into pieces so small that every weight has several, of which few are under way at once."""
    monkeypatch.setattr(litrt.link, "COPY_BYTES", 4096)
    monkeypatch.setattr(litrt.link, "_IN_FLIGHT_BYTES", 3 * 4096)


def sample() -> torch.Tensor:
    return x(5, WIDTH)


def run_checked(rt: litrt.Runtime, device: FakeDevice, call: Callable[[nn.Module], Any]) -> Any:
    with device.watching(), torch.no_grad():
        return call(rt.module)


# Right values, in the right order.


def check(
    construct: Callable[[], nn.Module], plain: nn.Module, path: Path, call: Any, case: Any, **options: Any
) -> None:
    with torch.no_grad():
        expected = call(plain)
    device = options["device"]
    with litrt.Runtime(construct, path, **options) as rt:
        run_checked(rt, device, call)
        n_synchronized = device.n_synchronized
        for number in range(N_PASSES):
            before = rt.stats()
            y = run_checked(rt, device, call)
            if case is None or case.repeats:
                assert_same(y, expected)
            counted = rt.stats().since(before)
            if case is not None and case.repeats and not case.aliases and number:
                assert counted.link_bytes == rt.plan.streamed_bytes
                assert counted.n_faults == 0
                # Nothing in a steady pass waits for the device.
                assert device.n_synchronized == n_synchronized
            elif case is not None:
                n_synchronized = device.n_synchronized
        stats = rt.stats()
        assert stats.link_bytes > 0
        assert stats.read_bytes > 0
        assert stats.peak_bytes <= stats.budget_bytes


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_plain_model(name: str, make_store: MakeStore) -> None:
    case = CASES[name]
    plain = plain_model(case.construct)
    path = make_store(plain)
    args = case.inputs()
    device = FakeDevice("random", seed=zlib.crc32(name.encode()))
    smallest = smallest_budget(case.construct, path, lambda module: case.call(module, *args))
    budget = max(smallest, sum(value.nbytes for value in plain.state_dict().values()) // 2)
    check(
        seeded(case.construct), plain, path, lambda module: case.call(module, *args), case, budget=budget, device=device
    )


def smallest_budget(construct: Callable[[], nn.Module], path: Path, call: Callable[[nn.Module], Any]) -> int:
    with litrt.Runtime(seeded(construct), path, budget="min", device=FakeDevice("early")) as rt:
        with torch.no_grad():
            call(rt.module)
        return rt.stats().budget_bytes


@pytest.mark.parametrize("host_budget", ["auto", 0])
@pytest.mark.parametrize("run", ["late", "early"])
@pytest.mark.parametrize(
    "name", ["TiedWeights", "decoder", "RoutedExperts", "large_weights", "Embeddings", "use: view as another dtype"]
)
def test_outputs_are_right_at_the_smallest_budget(
    name: str, run: Any, host_budget: Any, make_store: MakeStore, small_copies: None
) -> None:
    case = CASES[name]
    plain = plain_model(case.construct)
    args = case.inputs()
    check(
        seeded(case.construct),
        plain,
        make_store(plain),
        lambda module: case.call(module, *args),
        None,
        budget="min",
        device=FakeDevice(run),
        host_budget=host_budget,
    )


def test_a_second_stream_and_a_second_runtime_are_kept_apart_from_the_first(plain: nn.Module, path: Path) -> None:
    device = FakeDevice("random")
    with (
        litrt.Runtime(Chain, path, budget="50%", device=device) as a,
        litrt.Runtime(Chain, path, budget="25%", device=device) as b,
    ):
        for rt in (a, b):
            rt.warmup(sample())
        for number in range(6):
            with device.stream(number % 2):
                for rt in (a, b):
                    assert torch.equal(run_checked(rt, device, lambda module: module(sample())), plain(sample()))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_mode_of_the_caller_makes_no_difference(mode: Any, plain: nn.Module, path: Path) -> None:
    device = FakeDevice("late")
    with litrt.Runtime(Chain, path, budget="30%", device=device) as rt, mode():
        for _ in range(3):
            with device.watching():
                y = rt(sample())
            assert torch.equal(y, plain(sample()))


@pytest.mark.parametrize("run", ["late", "early", "random"])
@pytest.mark.parametrize("construct", [EarlyExit, RoutedExperts])
def test_passes_that_take_other_paths_are_right(
    construct: Callable[[], nn.Module], run: Any, make_store: MakeStore, small_copies: None
) -> None:
    plain = plain_model(construct)
    device = FakeDevice(run)
    width = plain.state_dict()["experts.0.weight" if construct is RoutedExperts else "gate.weight"].shape[1]
    with litrt.Runtime(seeded(construct), make_store(plain), budget="90%", device=device) as rt, torch.no_grad():
        for number in (2, 5, 1, 2, 2, 1, 1, 4, 4, 3):
            y = x(number, width, seed=number)
            y = y[None] if construct is RoutedExperts else y
            with device.watching():
                got = rt(y)
            assert_same(got, plain(y))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("on_device", [False, True])
def test_compiled_blocks_are_not_compiled_again_after_the_second_pass(
    on_device: bool, plain: nn.Module, path: Path
) -> None:
    device: Any = FakeDevice("random") if on_device else "cpu"
    torch._dynamo.reset()
    with litrt.Runtime(Chain, path, budget="50%", device=device) as rt, torch.no_grad():
        for layer in rt.module.layers:
            layer.compile(backend="eager")
        for _ in range(2):
            rt(sample())
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                assert torch.equal(rt(sample()), plain(sample()))
    torch._dynamo.reset()


def test_an_exception_in_mid_pass_leaves_the_runtime_usable(plain: nn.Module, path: Path) -> None:
    device = FakeDevice("late")
    with litrt.Runtime(Chain, path, budget="40%", device=device) as rt:
        rt.warmup(sample())
        for failing in (0, 3, 7):
            handle = rt.module.layers[failing].register_forward_pre_hook(_run_out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                rt(sample())
            handle.remove()
            assert torch.equal(run_checked(rt, device, lambda module: module(sample())), plain(sample()))


def _run_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("of activations")


def test_a_fault_while_copies_are_under_way_is_served(plain: nn.Module, path: Path, small_copies: None) -> None:
    device = FakeDevice("late")
    with litrt.Runtime(Chain, path, budget="40%", device=device) as rt, torch.no_grad():
        rt.warmup(sample())
        streamed = [load.segment for load in rt.plan.loads]
        last = rt.plan.segments[streamed[-1]].name
        before = rt.stats()
        # Loads for the start of the pass are queued; this one is not among them.
        with device.watching():
            assert torch.equal(rt.module.get_parameter(last) + 0, plain.get_parameter(last))
            assert torch.equal(rt(sample()), plain(sample()))
        assert rt.stats().since(before).link_bytes > 0


def test_no_more_copies_are_under_way_than_keep_the_link_busy_so_that_an_urgent_one_is_soon_served(
    plain: nn.Module, path: Path, small_copies: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[int] = []
    most: list[int] = []
    device = FakeDevice("late")
    copy = FakeDevice.copy

    def counted(self: FakeDevice, memory: Any, source: torch.Tensor, waits: Any = ()) -> None:
        copy(self, memory, source, waits)
        queued.append(source.numel())
        most.append(sum(job.seconds > 0 for job in self._queue))

    monkeypatch.setattr(FakeDevice, "copy", counted)
    with litrt.Runtime(Chain, path, budget="60%", device=device) as rt:
        for _ in range(3):
            assert torch.equal(rt(sample()), plain(sample()))
    assert set(queued) == {4096}
    assert max(most) == 3


def test_a_damaged_chunk_is_an_error_of_the_caller_and_passes_work_again_when_it_is_restored(
    plain: nn.Module, path: Path
) -> None:
    device = FakeDevice("random")
    with litrt.Runtime(Chain, path, budget="40%", device=device, host_budget=0) as rt:
        rt.warmup(sample())
        assert rt.host_plan is not None
        name = rt.plan.segments[rt.host_plan.loads[2].segment].name
        file = next(found for found in (path / name / "c").rglob("*") if found.is_file())
        content = file.read_bytes()
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(litrt.CorruptWeightError, match=name):  # noqa: PT012
            for _ in range(3):
                rt(sample())
        file.write_bytes(content)
        for _ in range(2):
            with contextlib.suppress(litrt.CorruptWeightError):  # one that was read ahead
                rt(sample())
        assert torch.equal(run_checked(rt, device, lambda module: module(sample())), plain(sample()))


# The rules of order: each, when broken, is noticed.


def _break_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arena, "_hand_over", lambda self, block: None)


def _break_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records the end of a use before the operator is called."""
    acquire = Pipeline.acquire

    def too_early(self: Pipeline, indices: tuple[int, ...]) -> Any:
        binding = acquire(self, indices)
        for index in indices:
            FakeDevice.record_use(self._device, self._entries[index].used)  # type: ignore[arg-type]
        return binding

    monkeypatch.setattr(Pipeline, "acquire", too_early)
    monkeypatch.setattr(FakeDevice, "record_use", lambda self, events: None)


def _break_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "_free_held", Cache.free)


def _break_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets the uses of other streams."""
    record_use = FakeDevice.record_use

    def only_the_last(self: FakeDevice, events: list[Any]) -> None:
        record_use(self, events)
        del events[:-1]

    monkeypatch.setattr(FakeDevice, "record_use", only_the_last)


def _nothing(_: Any) -> None:
    pass


BREAKS: dict[str, tuple[Mutation, Callable[[pytest.MonkeyPatch], None]]] = {
    "operators do not wait for copies": (Mutation(ignore_wait=True), _nothing),
    "copies do not wait for uses": (Mutation(ignore_waits=True), _nothing),
    "the end of a copy is recorded before its last piece": (Mutation(early_record=True), _nothing),
    "a range is handed on without what it waits for": (Mutation(), _break_busy),
    "the end of a use is recorded before the use": (Mutation(), _break_record),
    "the end of an alias is not recorded": (Mutation(), _break_alias),
    "a use on one stream hides that on another": (Mutation(), _break_streams),
}


def exercise(device: FakeDevice, plain: nn.Module, path: Path) -> None:
    """Runs passes that depend on every rule, and raises where one is broken."""
    with litrt.Runtime(Chain, path, budget=3 * LAYER_BYTES, device=device) as rt, torch.no_grad(), device.watching():
        y = sample()
        expected = None
        for number in range(8):
            # Streams take turns, and aliases of weights are used and dropped.
            with device.stream(number % 2):
                alias = rt.module.layers[number % N_LAYERS].weight.view(torch.int32)
                alias.sum()
                del alias
                got = rt(y)
            expected = got if expected is None else expected
            if not torch.equal(got, expected):
                raise OrderError("other values")
        streams = [device.stream(0), device.stream(1)]
        weight = rt.module.layers[3].weight
        for stream in streams:
            with stream:
                weight.sum()
        for layer in rt.module.layers:
            with device.stream(1):
                layer.weight.sum()


def test_the_protocol_is_not_seen_to_fail(plain: nn.Module, path: Path) -> None:
    for run in ("late", "early", "random"):
        exercise(FakeDevice(run), plain, path)


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_rule_is_noticed(name: str, plain: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation, change = BREAKS[name]
    change(monkeypatch)
    with pytest.raises(OrderError):
        exercise(FakeDevice("late", mutation=mutation), plain, path)


def test_a_resident_that_makes_room_is_overwritten_after_its_uses(plain: nn.Module, path: Path) -> None:
    device = FakeDevice("late")
    with litrt.Runtime(Chain, path, budget=4 * LAYER_BYTES, device=device) as rt, torch.no_grad():
        rt.warmup(sample())
        resident_bytes = rt.stats().resident_bytes
        streamed = list(dict.fromkeys(load.segment for load in rt.plan.loads))[:4]
        names = [rt.plan.segments[index].name for index in streamed]
        with device.watching():
            rt(sample())
            got = torch.stack([rt.module.get_parameter(name) for name in names])
            assert torch.equal(got, torch.stack([plain.get_parameter(name) for name in names]))
            assert rt.stats().resident_bytes < resident_bytes
            del got
            assert torch.equal(rt(sample()), plain(sample()))


def test_what_a_block_that_was_never_written_to_waited_for_goes_to_the_next_one_there() -> None:
    device = FakeDevice("late")
    segments = as_segments([TensorInfo.of_bytes(name, 512) for name in "abc"], align_bytes=512)
    infos = [TensorInfo.of_bytes(segment.name, segment.nbytes) for segment in segments]
    arena = Arena(device, 512, 512)
    cache = Cache(segments, infos, device, arena, scratch_bytes=0, growable=False, wait=lambda: None)
    used, _, written = cache.entries
    used.copied = device.record_copy()
    for entry in cache.entries:
        assert cache.place_planned(entry, 0)
        if entry is used:
            device.record_use(entry.used)
            (event,) = entry.used
        else:
            assert entry.block is not None
            assert entry.block.waits == [event], entry.segment.name
        if entry is not written:
            cache.free(entry)


# Time on the device's clock.


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("budget", [3, 5, 7])
def test_a_steady_pass_takes_what_the_plan_predicts(ratio: float, budget: int, path: Path) -> None:
    compute_s = 1e-3
    device = FakeDevice("late", bandwidth_bps=ratio * LAYER_BYTES / compute_s, matmul_s=compute_s)
    with litrt.Runtime(Chain, path, budget=budget * LAYER_BYTES, device=device) as rt, device.watching():
        rt.warmup(sample())
        for _ in range(3):
            rt(sample())
        began_s = device.now_s
        for _ in range(4):
            rt(sample())
        assert (device.now_s - began_s) / 4 == pytest.approx(rt.plan.pass_s, rel=0.02)
        assert rt.plan.pass_s >= rt.plan.bound_s * (1 - 1e-9)


def test_waits_of_the_device_count_as_late_and_not_as_hits(path: Path) -> None:
    slow = FakeDevice("late", bandwidth_bps=LAYER_BYTES / 1e-2)
    with litrt.Runtime(Chain, path, budget=3 * LAYER_BYTES, device=slow) as rt:
        rt.warmup(sample())
        before = rt.stats()
        rt(sample())
        counted = rt.stats().since(before)
        assert counted.n_late > 0
        assert counted.n_hits + counted.n_late + counted.n_faults == len(rt.plan.steps)
        assert counted.link_stall_s >= 1e-2
        assert counted.stall_s >= counted.link_stall_s


def test_a_profile_names_the_modules_that_are_waited_for(path: Path) -> None:
    with litrt.Runtime(Chain, path, budget="50%", device=FakeDevice("late")) as rt:
        rt.warmup(sample())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            rt(sample())
        streamed = {rt.plan.segments[load.segment].name.removesuffix(".weight") for load in rt.plan.loads}
    keys = {event.key for event in profile.key_averages()}
    assert {f"litrt wait {name}" for name in streamed} <= keys


# Memory.


@pytest.mark.parametrize("budget", ["min", "30%", "100%"])
def test_a_steady_pass_allocates_nothing(budget: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = []
    device = FakeDevice("random")
    with litrt.Runtime(Chain, path, budget=budget, device=device) as rt:
        rt.warmup(sample())
        monkeypatch.setattr(FakeDevice, "allocate", lambda self, n: allocated.append(n))
        monkeypatch.setattr(FakeDevice, "allocate_host", lambda self, n: allocated.append(n))
        for _ in range(3):
            rt(sample())
    assert not allocated


def test_the_arena_is_exactly_the_budget_and_the_largest_use_where_that_is_the_smallest(path: Path) -> None:
    device = FakeDevice("random")
    with litrt.Runtime(Chain, path, budget=3 * LAYER_BYTES + 77, device=device) as rt:
        assert device._allocated_bytes == 3 * LAYER_BYTES + 77
    with litrt.Runtime(Chain, path, budget="min", device=device) as rt:
        rt.warmup(sample())
        assert device._allocated_bytes == rt.stats().budget_bytes == LAYER_BYTES


def test_auto_is_what_the_device_has_left_beside_activations_and_a_reserve(
    plain: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litrt.planner, "_RESERVE_BYTES", 1000)
    activation_bytes = 2 * LAYER_BYTES
    device = FakeDevice("random", memory_bytes=7 * LAYER_BYTES + 1000, activation_bytes=activation_bytes)
    with litrt.Runtime(Chain, path, budget="auto", device=device) as rt:
        rt.warmup(sample())
        assert rt.stats().budget_bytes == 5 * LAYER_BYTES
        assert torch.equal(rt(sample()), plain(sample()))
        assert rt.stats().peak_bytes <= 5 * LAYER_BYTES
    device = FakeDevice("random")
    with litrt.Runtime(Chain, path, budget="auto", device=device) as rt:
        rt.warmup(sample())
        assert rt.stats().budget_bytes == rt.stats().resident_bytes == N_LAYERS * LAYER_BYTES


def test_where_all_fits_parameters_are_plain_and_nothing_is_copied(plain: nn.Module, path: Path) -> None:
    device = FakeDevice("late")
    with litrt.Runtime(Chain, path, budget="100%", device=device) as rt:
        rt.warmup(sample())
        before = rt.stats()
        assert not any(isinstance(parameter, Placeholder) for parameter in rt.module.parameters())
        assert torch.equal(run_checked(rt, device, lambda module: module(sample())), plain(sample()))
        counted = rt.stats().since(before)
        assert (counted.link_bytes, counted.read_bytes) == (0, 0)


# The host tier.


def steady(rt: litrt.Runtime) -> litrt.Stats:
    for _ in range(2):
        rt(sample())
    before = rt.stats()
    for _ in range(N_PASSES):
        rt(sample())
    return rt.stats().since(before)


def test_what_is_resident_on_the_device_has_no_host_copy_and_the_store_is_read_no_more(path: Path) -> None:
    device = FakeDevice("random")
    with litrt.Runtime(Chain, path, budget="50%", device=device) as rt:
        rt.warmup(sample())
        counted = steady(rt)
        assert rt.host_plan is not None
        assert not set(rt.host_plan.resident) & set(rt.plan.resident)
        assert set(rt.host_plan.resident) == {load.segment for load in rt.plan.loads}
        assert counted.read_bytes == 0
        assert counted.link_bytes == N_PASSES * rt.plan.streamed_bytes
        assert rt._host is not None
        assert rt._host.pinned_bytes == sum(rt.plan.segments[index].nbytes for index in rt.host_plan.resident)


@pytest.mark.parametrize("host_layers", [2, 3, 4])
def test_a_host_tier_that_is_too_small_keeps_a_part_and_reads_the_rest_in_every_pass(
    host_layers: int, path: Path
) -> None:
    device = FakeDevice("random")
    with litrt.Runtime(Chain, path, budget=2 * LAYER_BYTES, device=device, host_budget=host_layers * LAYER_BYTES) as rt:
        rt.warmup(sample())
        counted = steady(rt)
        assert rt.host_plan is not None
        # Reads run ahead of copies, a little more or less when they are counted.
        assert abs(counted.read_bytes - N_PASSES * rt.host_plan.streamed_bytes) <= host_layers * LAYER_BYTES
        assert 0 < counted.read_bytes < counted.link_bytes
        assert counted.link_bytes == N_PASSES * rt.plan.streamed_bytes
        assert rt.host_plan.budget_bytes == host_layers * LAYER_BYTES
        assert rt.stats().host_peak_bytes <= host_layers * LAYER_BYTES


def test_a_host_budget_of_nothing_takes_what_copies_need(plain: nn.Module, path: Path) -> None:
    device = FakeDevice("random")
    with litrt.Runtime(Chain, path, budget="50%", device=device, host_budget=0) as rt:
        rt.warmup(sample())
        counted = steady(rt)
        assert counted.link_bytes == N_PASSES * rt.plan.streamed_bytes
        assert rt.host_plan is not None
        assert 0 < counted.read_bytes <= counted.link_bytes
        assert rt.stats().host_peak_bytes == 2 * LAYER_BYTES
        assert torch.equal(rt(sample()), plain(sample()))


def test_host_budgets_that_cannot_be_read_are_refused(path: Path) -> None:
    with pytest.raises(litrt.BudgetError, match="cannot read budget"):
        litrt.Runtime(Chain, path, device=FakeDevice(), host_budget="much")


def test_a_new_plan_for_the_device_leaves_what_host_memory_has(plain: nn.Module, path: Path) -> None:
    class Skips(Chain):
        n_used = N_LAYERS

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[-self.n_used :]:
                x = torch.tanh(layer(x))
            return x

    device = FakeDevice("random")
    with litrt.Runtime(Skips, path, budget="40%", device=device) as rt:
        rt.warmup(sample())
        plan = rt.plan
        before = rt.stats()
        rt.module.n_used = N_LAYERS - 3
        y = sample()
        for _ in range(4):
            got = run_checked(rt, device, lambda module: module(y))
        assert rt.plan.loads is not plan.loads
        for layer in plain.layers[3:]:
            y = torch.tanh(layer(y))
        assert torch.equal(got, y)
        assert rt.stats().since(before).read_bytes == 0


def test_a_second_warmup_plans_both_tiers_anew(plain: nn.Module, path: Path) -> None:
    device = FakeDevice("random")
    with litrt.Runtime(Chain, path, budget="50%", device=device) as rt:
        for _ in range(3):
            rt.warmup(sample())
            assert torch.equal(run_checked(rt, device, lambda module: module(sample())), plain(sample()))
            assert steady(rt).read_bytes == 0


def test_rows_of_a_table_that_the_device_cannot_hold_come_by_way_of_the_host(make_store: MakeStore) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(40_000, WIDTH)
            self.layers = Chain(3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.layers(self.words(ids))

    plain = plain_model(Words)
    path = make_store(plain)
    ids = torch.tensor([[0, 39_999, 7], [7, 20_000, 1]])
    table_bytes = 40_000 * WIDTH * 4
    for host_budget in ("auto", 0):
        device = FakeDevice("random")
        with litrt.Runtime(Words, path, budget=2 * LAYER_BYTES, device=device, host_budget=host_budget) as rt:
            for _ in range(3):
                assert torch.equal(run_checked(rt, device, lambda module: module(ids)), plain(ids))
            stats = rt.stats()
            assert rt.plan.tables
            assert stats.peak_bytes <= 2 * LAYER_BYTES < table_bytes


# Other dtypes.


@pytest.mark.parametrize(
    ("stored", "served"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
@pytest.mark.parametrize("budget", ["min", "100%"])
@pytest.mark.parametrize("on_device", [False, True])
def test_weights_are_served_in_another_dtype_than_they_are_stored_in(
    on_device: bool, budget: str, stored: str, served: str, make_store: MakeStore, small_copies: None
) -> None:
    class Mixed(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor([3, 1]))

    dtype: torch.dtype = getattr(torch, served)
    plain = plain_model(Mixed).to(getattr(torch, stored))
    path = make_store(plain)
    y = sample().to(dtype)
    expected = plain.to(dtype)(y)
    device: Any = FakeDevice("random") if on_device else "cpu"
    with litrt.Runtime(Mixed, path, budget=budget, device=device, dtype=served) as rt:
        for _ in range(3):
            assert torch.equal(rt(y), expected)
        assert rt.module.layers[0].weight.dtype == dtype
        assert rt.module.count.dtype == torch.int64
        stats = rt.stats()
        assert stats.peak_bytes <= stats.budget_bytes
        if budget == "min":
            before = rt.stats()
            rt(y)
            moved = rt.stats().since(before)
            stored_bytes = sum(rt.plan.segments[load.segment].fetch_bytes for load in rt.plan.loads)
            assert (moved.link_bytes if on_device else moved.read_bytes) == rt.plan.streamed_bytes == stored_bytes


@pytest.mark.parametrize("dtype", ["int8", "float", torch.int32, "much"])
def test_a_dtype_that_is_not_floating_is_refused(dtype: Any, path: Path) -> None:
    if dtype == "float":
        litrt.Runtime(Chain, path, budget="100%", dtype=dtype).close()  # torch.float
        return
    with pytest.raises(ValueError, match="use a floating dtype"):
        litrt.Runtime(Chain, path, budget="100%", dtype=dtype)


# Devices.


def test_devices_that_are_not_there_are_named(path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(litrt.DeviceError, match="'cuda' is not there"):
            litrt.Runtime(Chain, path, device="cuda")
    with pytest.raises(litrt.DeviceError, match="'meta' is not supported"):
        litrt.Runtime(Chain, path, device="meta")
    with pytest.raises(litrt.DeviceError, match="none that torch knows"):
        litrt.Runtime(Chain, path, device="toaster")


def test_the_fake_itself_notices_host_memory_that_was_overwritten_too_soon() -> None:
    device = FakeDevice("late")
    memory, source = device.allocate(8), CpuDevice().allocate(8)
    device.copy(memory, torch.from_numpy(source))
    source[0] = 1
    with pytest.raises(OrderError, match="overwritten before its copy"):
        device.synchronize()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8192, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.rnn(self.embed(tokens))[0]
        return result


@pytest.mark.parametrize("timing", ["early", "late", "random"])
def test_rows_are_gathered_where_copies_that_are_done_have_their_room(timing: Any, make_store: MakeStore) -> None:
    """What an operator used is in host memory until the next copy, and rows are needed before that."""
    plain = plain_model(Recurrent)
    tokens = torch.arange(10).view(5, 2) * 800
    with (
        litrt.Runtime(
            seeded(Recurrent), make_store(plain), budget="min", device=FakeDevice(timing), host_budget=0
        ) as rt,
        torch.no_grad(),
    ):
        rt.warmup(tokens)
        for _ in range(2):
            assert torch.equal(rt(tokens), plain(tokens))


def test_what_was_written_to_and_cannot_be_read_again_gives_its_room_on_behind_the_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice("late")
    acquire, restore = litrt.link.Link._acquire, Pipeline.restore

    def failing(*_: Any) -> Any:
        raise litrt.CorruptWeightError("it is gone", name="", file="")

    def restore_in_vain(pipeline: Pipeline, binding: Any) -> None:
        monkeypatch.setattr(litrt.link.Link, "_acquire", failing)
        restore(pipeline, binding)
        monkeypatch.setattr(litrt.link.Link, "_acquire", acquire)

    with litrt.Runtime(Chain, path, budget="min", device=device, host_budget=0) as rt:
        rt.warmup(sample())
        monkeypatch.setattr(Pipeline, "restore", restore_in_vain)
        with device.watching(), torch.no_grad():
            with pytest.raises(litrt.WeightWriteError):
                torch.nn.functional.embedding_bag(torch.tensor([[1, 2]]), rt.module.layers[1].weight, max_norm=0.01)
            for layer in rt.module.layers[2:]:
                layer(sample())
