"""The table, as Markdown and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.plan import FAILED, LEFT_OUT, Result

NOTHING = "–"
HEAD = "| row | batch | s per step | peak GiB | TFLOP/s | of matmul | waits | result |\n|---|" + "---:|" * 6 + "---|"


def write(folder: Path, results: Sequence[Result], environment: dict[str, Any], command: str) -> None:
    """Write gpu-check.md and gpu-check.json."""
    (folder / "gpu-check.md").write_text(markdown(results, environment, command), encoding="utf-8")
    found = {"command": command, **environment, "rows": [result.as_json() for result in results]}
    (folder / "gpu-check.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def markdown(results: Sequence[Result], environment: dict[str, Any], command: str) -> str:
    lines = [f"`{command}`", "", described(environment), "", HEAD]
    lines += [line(result, environment) for result in results if result.state != LEFT_OUT]
    if left := [result for result in results if result.state == LEFT_OUT]:
        lines += ["", "Left out:", "", *(f"- {result.name}: {result.reason}" for result in left)]
    return "\n".join(lines) + "\n"


def described(environment: dict[str, Any]) -> str:
    """Return a paragraph that describes the machine."""
    if not environment:
        return "Nothing was measured."
    parts = [environment["device"]]
    if "memory_gib" in environment:
        parts.append(f"{environment['memory_gib']} GiB, driver {environment['driver']}, CUDA {environment['cuda']}")
        parts.append(f"product of two 8192 x 8192 bf16 matrices {environment['matmul'] / 1e12:.0f} TFLOP/s")
        launch = environment["launch"] * 1e6
        parts.append(f"beside {environment['processor']}, which launches a small kernel in {launch:.1f} µs")
    versions = {"python": environment["python"], **environment["versions"]}
    parts.append(", ".join(f"{name} {value}" for name, value in versions.items() if value is not None))
    return "; ".join(parts) + "."


def line(result: Result, environment: dict[str, Any]) -> str:
    """Return one row. On a CPU it has no memory, no waits and no rates."""
    found = result.measured
    gpu = "memory_gib" in environment
    rate = found.flops / found.seconds if gpu and found.flops and found.seconds else None
    cells = [
        result.name,
        written(found.batch, "d"),
        written(found.seconds, ".3g"),
        written(found.peak, ".1f"),
        written(rate and rate / 1e12, ".0f"),
        written(rate and rate / environment["matmul"], ".0%"),
        written(found.waits, ".3g"),
        told(result),
    ]
    return f"| {' | '.join(cells)} |"


def written(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def told(result: Result) -> str:
    if result.state == FAILED:
        return f"**failed**: {result.reason}".replace("|", "/")
    return "; ".join([result.state, *result.measured.notes]).replace("|", "/")
