"""Records the trace of a model, for `python -m bench simulate`.

python -m bench record --model llama --layers 4 --width 1024 --out trace.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import litrt
from bench.data import Data
from bench.models import add_model_arguments, model_ctor, spec_of
from bench.traces import as_json
from bench.workload import MODES, Workload
from litrt.units import format_bytes


def main(argv: list[str]) -> int:
    """Records, and writes the trace."""
    parser = argparse.ArgumentParser(
        prog="python -m bench record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--mode", choices=[mode for mode in MODES if mode != "generate"], default="pass")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--budget", default="50%", help="to record in (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder of made models; by default a temporary one")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    arguments = parser.parse_args(argv)
    spec = spec_of(arguments)
    workload = Workload(spec, arguments.mode, arguments.batch, arguments.tokens, 1)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        data = Data(arguments.data or Path(temporary), spec)
        data.make(["litrt"], "none", print)
        with litrt.Runtime(model_ctor(spec), data.store("none"), budget=arguments.budget) as rt:
            workload.fill(rt)
            rt.warmup(**workload.arguments())
            trace = rt.trace
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"name": spec.title, **as_json(trace)}) + "\n")
    print(
        f"{arguments.out}: {len(trace.uses)} uses of {len(trace.used)} weights, {format_bytes(trace.used_bytes)}, "
        f"{trace.compute_s:.3f} s of compute"
    )
    return 0
