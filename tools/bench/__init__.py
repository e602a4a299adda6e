"""Benchmarks of dmdr, each one command: `python tools/bench NAME`. docs/benchmarks.md has the method and figures."""
