"""Benchmarks of litrt: `python -m bench COMMAND` from the root of the repository."""
