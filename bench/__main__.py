"""python -m bench COMMAND, each with --help."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "sweep": "seconds per pass against budget, measured: litrt, its peers and the bound",
    "plot": "the picture of a sweep",
    "table": "the tables of the README, or of a sweep",
    "simulate": "the same picture from a trace and a bandwidth, without a machine",
    "record": "the trace of a model, for simulate",
    "overhead": "what litrt costs per call of a module",
    "soak": "a runtime for an hour in a memory limit: what it holds must not grow",
    "reader": "how fast stores are read, beside the disk",
    "compression": "what lossless codecs do to trained weights",
    "fuzz": "inputs that are changed at random: what litrt does with them",
}
INTERNAL = ("cell", "soaked")


def main(argv: list[str]) -> int:
    """Runs a command, and returns its exit status."""
    if not argv or argv[0] not in (*COMMANDS, *INTERNAL):
        print("usage: python -m bench COMMAND ...\n")
        for name, what in COMMANDS.items():
            print(f"  {name:<13}{what}")
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    status: int = importlib.import_module(f"bench.{argv[0]}").main(argv[1:])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
