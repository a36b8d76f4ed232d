"""The benchmarks run, small and without what only they need; nothing here depends on how long anything takes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import chain, traces

from bench import compression, machine, peers, soak, sweep
from bench.data import Data, RandomWeights, Saved
from bench.models import KINDS, ModelSpec, model_ctor
from bench.plot import of_samples, of_simulated, spread_out
from bench.rivals import RIVALS, belady_on_demand, blocks, fixed_prefix, lru_on_demand, one_ahead
from bench.samples import Samples, read
from bench.shapes import MACHINES, SHAPES, on
from bench.simulate import BOUND, PLANNED, panels, read_trace, simulate
from bench.table import budgets as budgets_table
from bench.table import peers as peers_table
from bench.traces import as_json, from_json
from bench.workload import MODES, Workload, digest
from litrt.compression import CODECS, SETTINGS, encode
from litrt.plan import make_plan
from litrt.policy import lru_streamed_bytes
from litrt.trace import Segment, Trace, Use

pytestmark = pytest.mark.timeout(900)  # the sweep starts eight processes, each of which imports transformers

ROOT = Path(__file__).parent.parent
SIZES = ["--layers", "3", "--width", "64", "--heads", "4", "--vocabulary", "500"]


def test_the_gpu_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    gpu: Any = importlib.import_module("bench.gpu")
    out = tmp_path / "gpu.json"
    # In a process of its own: what draws the picture, where it is installed, keeps fonts open.
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--dry-run", "--out", str(out)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(out.read_text())
    assert gpu.table(report) in printed
    assert all(cell["same"] for cell in report["results"])
    mine = [cell for cell in report["results"] if cell["system"] == "litrt"]
    assert {(cell["budget"], cell["n_tokens"]) for cell in mine} == {
        (budget, n_tokens) for budget in ("30%", "100%") for n_tokens in (1, 16)
    }
    for cell in mine:
        assert cell["link_bytes"] == cell["planned_bytes"] >= cell["bound_bytes"]
        assert (cell["link_bytes"] == 0) == (cell["budget"] == "100%")
        assert cell["held_bytes"] <= cell["budget_bytes"]
    assert "over the bound" in printed


# A sweep.


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """Returns the file, the output and the exit status of a small sweep, without root and with one peer missing."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("sweep")
    code = (
        "import sys\nfrom pathlib import Path\nfrom bench import cgroup, machine, peers, sweep\n"
        "cgroup.ROOT = Path(sys.argv[1]) / 'none'\nmachine.DROP_CACHES = cgroup.ROOT / 'none'\n"
        "peers.PEERS['accelerate'] = peers.Peer('accelerate', 'accelerate', 'no_such_package', print)\n"
        "sys.exit(sweep.main(sys.argv[2:]))"
    )
    options = ["--budgets", "5%,50%,100%", "--policies", "belady,lru", "--peers", "plain,accelerate,safetensors-mmap"]
    options += ["--rounds", "1", "--passes", "2", "--tokens", "4", "--limit", "4GB", "--cold"]
    out = folder / "sweep.jsonl"
    command = [sys.executable, "-c", code, str(folder), *SIZES, *options, "--data", str(folder), "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return out, process.stdout + process.stderr, process.returncode


def test_a_sweep_compares_every_cell_with_the_plain_model(swept: tuple[Path, str, int]) -> None:
    out, printed, status = swept
    assert status == 0, printed
    samples = read(out)
    worked = [cell for cell in samples.cells if "sha256" in cell]
    assert len({cell["sha256"] for cell in worked}) == 1
    assert all(cell["same"] is True for cell in worked)
    assert {(cell["system"], cell.get("budget"), cell.get("policy")) for cell in worked} == {
        ("plain", None, None),
        ("safetensors-mmap", None, None),
        *(("litrt", budget, policy) for budget in ("50%", "100%") for policy in ("belady", "lru")),
    }
    assert all(len(cell["pass_s"]) == len(cell["cpu_s"]) == 2 for cell in worked)


def test_a_sweep_checks_the_bytes_of_litrt(swept: tuple[Path, str, int]) -> None:
    samples = read(swept[0])
    (half,) = samples.of("litrt", "50%", "belady")
    assert half["bytes_checked"]
    assert half["n_faults"] == 0
    assert half["read_bytes_per_pass"] == half["planned_bytes_per_pass"] >= half["bound_bytes_per_pass"] > 0
    assert half["peak_bytes"] <= half["budget_bytes"] <= samples.model_bytes / 2
    (least_recent,) = samples.of("litrt", "50%", "lru")
    assert least_recent["read_bytes_per_pass"] > half["read_bytes_per_pass"]
    (whole,) = samples.of("litrt", "100%", "belady")
    assert whole["read_bytes_per_pass"] == 0


def test_what_fails_is_recorded_and_does_not_stop_a_sweep(swept: tuple[Path, str, int]) -> None:
    samples = read(swept[0])
    (missing,) = [cell for cell in samples.cells if cell["system"] == "accelerate"]
    assert missing["error"] == "no_such_package is not installed"
    small = [cell for cell in samples.cells if cell.get("budget") == "5%"]
    assert len(small) == 2
    for cell in small:
        assert cell["exit_status"] == 1
        assert "BudgetError" in cell["error"]
        assert "the smallest workable budget is" in cell["error"]


def test_a_sweep_without_root_says_so_once(swept: tuple[Path, str, int]) -> None:
    out, printed, _ = swept
    header = read(out).header
    assert header["limit_bytes"] is None
    assert header["page_cache_emptied"] is header["cold"] is False
    assert len(header["notes"]) == 2
    for note in header["notes"]:
        assert printed.count(note) == 1


def test_an_interrupted_sweep_can_be_read(swept: tuple[Path, str, int], tmp_path: Path) -> None:
    whole = swept[0].read_text()
    cut = tmp_path / "cut.jsonl"
    cut.write_text(whole[: whole.rindex('"pass_s"')])
    assert len(read(cut).cells) == len(read(swept[0]).cells) - 1
    lines = whole.splitlines(keepends=True)
    cut.write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    with pytest.raises(json.JSONDecodeError):
        read(cut)


def test_tables_and_the_bound_come_from_the_samples(swept: tuple[Path, str, int]) -> None:
    samples = read(swept[0])
    plain = samples.spread(samples.of("plain"))
    assert plain is not None
    bounds = [samples.bound_s(samples.budget_bytes(budget)) for budget in samples.budgets]
    assert bounds[1] == pytest.approx(plain.median_s)
    assert bounds[0] is not None
    assert bounds[0] >= plain.median_s * 0.999
    table = budgets_table(samples)
    assert [line.split(" | ")[0].strip("| ").split(" ")[0] for line in table.splitlines()[2:]] == ["50%", "100%"]
    table = peers_table(samples, "50%")
    assert table.count("bit-identical") == 4
    assert "no_such_package is not installed" in table


def test_a_sweep_in_which_litrt_never_worked_has_a_table(swept: tuple[Path, str, int], tmp_path: Path) -> None:
    lines = [line for line in swept[0].read_text().splitlines() if '"budget_bytes"' not in line]
    (tmp_path / "none.jsonl").write_text("\n".join(lines))
    samples = read(tmp_path / "none.jsonl")
    assert samples.budgets == []
    assert peers_table(samples).count("bit-identical") == 2
    assert len(budgets_table(samples).splitlines()) == 2
    with pytest.raises(ValueError, match=r"no cell of litrt worked with a budget of '50%'; these did: none"):
        peers_table(samples, "50%")


def test_a_wrong_result_is_seen(swept: tuple[Path, str, int], tmp_path: Path, capsys: Any) -> None:
    spec = ModelSpec(**{k: v for k, v in read(swept[0]).header["model"].items() if k not in ("name", "bytes")})
    arguments = sweep.parse([*SIZES, "--out", "-"])
    with (tmp_path / "out.jsonl").open("w") as file:
        made = sweep.Sweep(arguments, Data(tmp_path, spec), file, print)
        cell = {"round": 0, "limited": False, "disk_bps": None, "pass_s": [1.0], "cpu_s": [1.0], "max_rss_bytes": 1}
        made._finish({"system": "plain", "sha256": "a", **cell})
        made._finish({"system": "safetensors-mmap", "sha256": "a", **cell})
        assert made.n_wrong == 0
        made._finish({"system": "safetensors-mmap", "sha256": "b", **cell})
        made._finish({"system": "litrt", "budget": "1%", "policy": "lru", "round": 0, "error": "AssertionError: read"})
        assert made.n_wrong == 2
    assert "DIFFERENT" in capsys.readouterr().out


def test_the_picture_of_a_sweep_has_a_point_for_every_budget(swept: tuple[Path, str, int], tmp_path: Path) -> None:
    picture = of_samples(read(swept[0]))
    assert [len(curve.points) for curve in picture.curves] == [2, 2]
    assert [name for name, _ in picture.levels] == ["plain model", "memory-mapped safetensors"]
    assert len(picture.bound) == 2
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    command = [sys.executable, "-m", "bench", "plot", str(swept[0]), "--out", str(tmp_path / "sweep.png")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budgets", "50x"], "--budgets: cannot read budget '50x'"),
        (["--peers", "airllm"], "--peers: 'airllm' is none of pytorch-lit, accelerate, safetensors-mmap, plain"),
        (["--policies", "fifo"], "--policies: 'fifo' is none of belady, lru"),
        (["--model", "vit", "--mode", "decode"], "--mode decode needs one of gptj, llama, moe"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_is_made(options: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        sweep.parse([*options, "--out", "-"])
    assert message in capsys.readouterr().err


# Models and what is timed.


def small(kind: str, dtype: str = "float32") -> ModelSpec:
    if kind == "unet":
        return ModelSpec("unet", 1, 16, 1, 1, 0, 0, image_size=16, dtype=dtype)
    if kind == "vit":
        return ModelSpec("vit", 2, 32, 2, 2, 64, 10, image_size=16, patch_size=8, dtype=dtype)
    experts = {"experts": 8, "active_experts": 2} if kind == "moe" else {}
    return ModelSpec(kind, 2, 32, 2, 1 if kind != "gptj" else 2, 64, 100, dtype=dtype, **experts)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_made_one_weight_at_a_time_and_always_the_same(kind: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    spec = small(kind, dtype)
    Data(tmp_path, spec).make([], "none", print)
    weights, saved = RandomWeights(spec), Saved(Data(tmp_path, spec).safetensors)
    assert set(saved) == set(weights)
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    model = peers.load_plain(Data(tmp_path, spec))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    workload = Workload(spec, "pass", 1, 4, 1)
    with torch.no_grad():
        first, again = workload.ready(model)(), workload.ready(peers.load_mapped(Data(tmp_path, spec)))()
    assert first.isfinite().all()
    assert digest(first) == digest(again)
    assert digest(first) != digest(torch.nextafter(first, first + 1))
    del model, saved


@pytest.mark.parametrize("mode", MODES)
def test_every_repetition_of_a_mode_gives_the_same(mode: Any) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = model_ctor(small("llama"))()
    workload = Workload(small("llama"), mode, 2, 6, 3)
    with torch.no_grad():
        workload.fill(model)
        outputs = [workload.ready(model)() for _ in range(3)]
    assert outputs[0].shape == (2, {"pass": 6, "decode": 1, "generate": 3}[mode], 100)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_only_language_models_decode() -> None:
    with pytest.raises(ValueError, match="mode 'decode' needs a language model, and 'vit' is none"):
        Workload(small("vit"), "decode", 1, 4, 1)


def test_the_disk_is_measured_only_where_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    assert machine.read_bps(tmp_path / "file") is None


# Rivals, against cases worked by hand. Bytes move one per second.


def test_lru_loads_everything_on_a_cycle_and_belady_does_not() -> None:
    trace = chain([1, 1, 1, 1], compute_s=1.0)
    assert lru_on_demand(trace, 3) == 4 + 4
    assert belady_on_demand(trace, 3) == pytest.approx(4 + 4 / 3)  # with room for 3 of 4, (3 - 1) / (4 - 1) are hits
    assert lru_on_demand(trace, 4) == belady_on_demand(trace, 4) == 4
    assert lru_on_demand(trace, 0) == belady_on_demand(trace, 0) == math.inf


def test_a_block_ahead_hides_behind_the_block_before() -> None:
    slow_compute = chain([1, 1, 1, 1], compute_s=2.0)
    assert one_ahead(slow_compute, 2) == 8
    assert one_ahead(slow_compute, 1) == 4 * (2 + 1)  # no room for two: nothing overlaps
    slow_link = chain([3, 3, 3, 3], compute_s=2.0)
    assert one_ahead(slow_link, 6) == one_ahead(slow_link, 12) == 12
    assert one_ahead(slow_link, 2) == math.inf


def test_a_fixed_prefix_streams_the_rest() -> None:
    trace = chain([3, 3, 3, 3], compute_s=1.0)
    assert fixed_prefix(trace, 12) == 4
    # Two stay, and there is no room for the two others at once: the fourth waits for 3 s, and what the third waits for
    # hides 2 s behind the first two. Were one to stay, 9 bytes would stream.
    assert fixed_prefix(trace, 11) == 4 + 3 + 1
    assert fixed_prefix(trace, 3) == 4 * (3 + 1)


def test_blocks_are_numbered_modules() -> None:
    names = ["embed.weight", "layers.0.q.weight", "layers.0.k.weight", "layers.1.q.weight", "head.weight"]
    segments = tuple(Segment(name, 1, 1, 1) for name in names)
    trace = Trace(segments, (*(Use((n,), 1.0) for n in range(5)), Use((4, 0), 2.0)), 1.0)
    assert [(block.segments, block.compute_s) for block in blocks(trace)] == [
        ((0,), 1.0),
        ((1, 2), 2.0),
        ((3,), 1.0),
        ((4, 0), 3.0),
    ]


@settings(max_examples=40)
@given(traces(nested=False))
def test_rivals_compute_and_are_never_faster_than_the_bound(trace: Trace) -> None:
    for budget_bytes in (trace.largest_use_bytes, (trace.largest_use_bytes + trace.used_bytes) // 2, trace.used_bytes):
        bound_s = make_plan(trace, budget_bytes).bound_s
        for rival in RIVALS.values():
            assert rival(trace, budget_bytes) >= max(bound_s, trace.compute_s) - 1e-6


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.floats(0, 1))
def test_lru_on_demand_moves_what_the_policy_says(sizes: list[int], share: float) -> None:
    trace = chain(sizes, compute_s=1.0, bandwidth_bps=4.0)
    budget_bytes = int(trace.largest_use_bytes + share * (trace.used_bytes - trace.largest_use_bytes))
    want_s = trace.compute_s + lru_streamed_bytes(trace, budget_bytes) / trace.bandwidth_bps
    assert lru_on_demand(trace, budget_bytes) == pytest.approx(want_s)


# Simulation.


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_a_second_of_compute(shape: str) -> None:
    trace = SHAPES[shape]()
    assert trace.compute_s == pytest.approx(1)
    moved = on(trace, MACHINES["object"], 5.0)
    assert moved.compute_s == pytest.approx(5)
    assert (moved.bandwidth_bps, moved.latency_s) == (0.5e9, 0.03)
    assert moved.used_bytes == trace.used_bytes


def test_shapes_have_the_bytes_of_their_models() -> None:
    assert SHAPES["llama8b"]().used_bytes == pytest.approx(16.06e9, rel=1e-3)
    assert SHAPES["gptj"]().used_bytes == pytest.approx(12.1e9, rel=1e-2)


def test_a_simulation_shows_the_cliff_of_lru_and_the_plan_near_the_bound() -> None:
    trace = on(SHAPES["uniform"](8), MACHINES["disk"], 0.02)  # type: ignore[call-arg]
    panel = simulate(trace, (0.05, 0.5, 0.9, 1.0))
    assert all(math.isinf(seconds[0]) for seconds in panel.seconds.values())
    lru, planned, bound = panel.seconds["LRU on demand"], panel.seconds[PLANNED], panel.seconds[BOUND]
    assert lru[2] > 2 * planned[2]
    assert lru[3] == planned[3] == bound[3] == pytest.approx(0.02)
    assert [len(curve.points) for curve in of_simulated(panel).curves] == [3] * (1 + len(RIVALS))


@pytest.mark.parametrize("shape", ["llama8b", "uniform", "random", "convnet"])
@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_plans_are_near_the_bound_at_every_budget(shape: str, ratio: float) -> None:
    # Measured: up to 1.06, and 1.12 at 90 %. The bound is a closed form, up to 5 % below the best there is.
    trace = on(SHAPES[shape](), MACHINES["disk"], ratio * SHAPES[shape]().used_bytes / MACHINES["disk"].bandwidth_bps)
    for share, most in ((0.3, 1.07), (0.6, 1.07), (0.9, 1.13)):
        plan = make_plan(trace, int(share * trace.used_bytes))
        assert plan.bound_s * (1 - 1e-9) <= plan.pass_s <= most * plan.bound_s
        assert all(load.offset is not None for load in plan.loads)


def test_plans_are_no_slower_than_other_schedules_of_random_traces() -> None:
    # Others are given memory without gaps, a plan has addresses. Of few and large weights Belady's rule can keep a
    # different one in every pass, which a plan, the same in every pass, cannot: so those are not drawn.
    for seed in range(8):
        draw = random.Random(seed)
        trace = SHAPES["random"](draw.randint(16, 40), seed)  # type: ignore[call-arg]
        compute_s = 10 ** draw.uniform(-1.5, 1) * trace.used_bytes / 3.4e9
        trace = on(trace, MACHINES[draw.choice(["disk", "object"])], compute_s)
        least = trace.largest_use_bytes / trace.used_bytes
        budget_bytes = int(trace.used_bytes * draw.uniform(1.1 * least, 0.97))
        plan = make_plan(trace, budget_bytes)
        for name, rival in RIVALS.items():
            assert plan.pass_s <= rival(trace, budget_bytes) * 1.01, (seed, name)


def test_a_trace_of_a_sweep_is_simulated_as_it_was_recorded(swept: tuple[Path, str, int], tmp_path: Path) -> None:
    samples: Samples = read(swept[0])
    name, trace = read_trace(swept[0])
    assert name == "GPT-J, 3 layers"
    assert trace == samples.traces[0] == from_json(json.loads(json.dumps(as_json(trace))))
    (panel,) = panels(name, trace, [MACHINES["nvme"]], [], (1.0,), trace.compute_s)
    assert panel.seconds[PLANNED] == [pytest.approx(trace.compute_s)]
    without = tmp_path / "without.jsonl"
    without.write_text(swept[0].read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"has no trace"):
        read_trace(without)


def test_labels_are_moved_apart_and_no_further() -> None:
    assert spread_out([0.1, 0.5], 0.05) == [0.1, 0.5]
    assert spread_out([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spread_out([0.3, 0.45, 0.5], 0.1) == pytest.approx([0.3, 0.425, 0.525])


@pytest.mark.parametrize(
    "command", ["sweep", "plot", "table", "simulate", "record", "overhead", "reader", "compression"]
)
def test_every_command_explains_itself(command: str, capsys: Any) -> None:
    from bench.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"python -m bench {command}" in capsys.readouterr().out


# What the reader and the codecs do without a model.


def test_the_reader_benchmark_reads_every_store_at_every_number_of_threads(tmp_path: Path) -> None:
    out = tmp_path / "reader.json"
    command = [sys.executable, "-m", "bench", "reader", "--folder", str(tmp_path), "--out", str(out)]
    command += ["--gb", "0.07", "--repeats", "1", "--threads", "1,3"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    report = json.loads(out.read_text())
    assert [row["n_threads"] for row in report["results"]] == [1, 3]
    assert list(report["results"][1]["samples"]) == [
        "raw",
        *(f"{codec}, {most} at once" for codec in ("none", "lz4") for most in (2, 3)),
    ]
    assert report["n_bytes"] == 4096 * 4096 * 4
    assert report["lz4"]["stored_bytes"] < report["n_bytes"]
    assert "3 threads: raw " in printed
    assert [path.name for path in tmp_path.iterdir()] == ["reader.json"]


def test_the_compression_benchmark_measures_what_stores_are_written_with() -> None:
    values = torch.randn(300, 1000) * 0.02
    rows = compression.measure("bfloat16", [values], 2, 1)
    assert [row["codec"] for row in rows if row["used"]] == list(CODECS)
    for row, codec in zip(rows, CODECS, strict=False):
        chunk = values.bfloat16().flatten().view(torch.uint8).numpy()
        assert row["ratio"] == len(chunk) / len(encode(chunk, codec, 2))
        assert f"ratio {row['ratio']:.3f}" in compression.line(row)


def test_the_overhead_benchmark_counts_the_calls_that_stream(tmp_path: Path) -> None:
    from bench import overhead

    found = overhead.measure(12, 16, "50%", 2, tmp_path, profile=False)
    assert 0 < found["n_streamed_calls"] <= 12
    assert len(found["pass_s"]) == len(found["plain_s"]) == len(found["stall_s"]) == 2
    assert overhead.measure(3, 16, "100%", 1, tmp_path, profile=False)["n_streamed_calls"] == 0
    assert f"{found['n_streamed_calls']} streamed calls" in overhead.line(found)


# A soak.


def test_a_soak_compares_every_pass_with_the_plain_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "soak.json"
    options = ["--budget", "200kB", "--seconds", "0", "--passes", "45", "--every", "0", "--tokens", "3", "5"]
    command = [sys.executable, "-m", "bench", "soak", *SIZES, *options, "--data", str(tmp_path), "--out", str(out)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads(out.read_text())
    assert report["faults"] == []
    assert report["result"]["n_passes"] == 45
    assert report["result"]["n_broken"] == 1
    assert [len(hashes) for hashes in report["result"]["sha256"]] == [1, 1]
    budgets = {sample["budget_bytes"] for sample in report["samples"]}
    assert budgets == {200_000, 160_000}
    assert "45 passes, all as the plain model's; nothing grew" in finished.stdout


def samples_of(**last: int) -> list[dict[str, Any]]:
    """Returns samples of which the last half is something else, and a result."""
    common = {"rss_bytes": 10**9, "n_descriptors": 5, "n_threads": 4, "held_peak_bytes": 90, "budget_bytes": 100}
    samples: list[dict[str, Any]] = [{"s": float(at), **common, **(last if at >= 4 else {})} for at in range(8)]
    return [*samples, {"n_passes": 8, "sha256": [["a"], ["b"]]}]


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({}, []),
        ({"rss_bytes": 10**9 + 2**24 + 1}, ["resident memory grew by 16.78 MB"]),
        ({"rss_bytes": 10**9 - 2**25}, []),
        ({"n_descriptors": 6}, ["n_descriptors grew from 5 to 6"]),
        ({"n_threads": 9}, ["n_threads grew from 4 to 9"]),
        ({"held_peak_bytes": 101}, ["more was held than the budget"]),
    ],
)
def test_a_soak_says_what_grew(last: dict[str, int], said: list[str]) -> None:
    assert soak.faults(0, samples_of(**last), [["a"], ["b"]]) == said
    assert soak.faults(-9, samples_of(**last), [["a"], ["b"]]) == ["killed by signal 9"]
    assert "results differ" in soak.faults(0, samples_of(**last), [["a"], ["c"]])[0]


def test_the_recorded_ratios_are_of_the_settings_that_stores_have() -> None:
    report = json.loads((ROOT / "bench" / "results" / "compression-minilm.json").read_text())
    for codec, chosen in SETTINGS.items():
        found = [row for row in report["results"] if row["codec"] == codec and row["used"]]
        assert [row["dtype"] for row in found] == ["float32", "bfloat16", "float16", "float8_e4m3fn"]
        for row in found:
            assert (row["level"], row["shuffle"], row["block_bytes"]) == (
                chosen.level,
                chosen.shuffle,
                chosen.block_bytes,
            )
