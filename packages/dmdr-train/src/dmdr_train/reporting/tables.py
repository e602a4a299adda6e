"""Tables of scores, for a terminal and in Markdown."""

import math
from collections.abc import Sequence

from dmdr_train.evaluation.scores import OWN, Scores

COLUMNS = {
    "frechet": "FD",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "inception": "IS",
    "frechet_pixels": "FD pixels",
    "kernel": "KID",
    "density": "density",
    "coverage": "coverage",
    "diversity": "diversity",
}
SECONDS = "s per picture"


def columns(scores: dict[str, Scores]) -> list[str]:
    """The headings of the table: the measured scores, then scores by the reference and by rewards, then the seconds."""
    rows = scores.values()
    known = [title for name, title in COLUMNS.items() if any(getattr(row, name) is not None for row in rows)]
    more = list(dict.fromkeys(name for row in rows for name in row.more))
    return [*known, *more, *([SECONDS] if any(row.seconds is not None for row in rows) else [])]


def cells(scores: Scores, headings: Sequence[str] | None = None, intervals: bool = False) -> list[str]:
    """The numbers of a row, under the headings of `columns`; a dash for a number that the row does not have.

    Args:
        headings: of the whole table; None for those of this row alone.
        intervals: whether the 95% intervals of means stand behind them.
    """
    found = {title: (name, getattr(scores, name)) for name, title in COLUMNS.items()}
    found |= {name: (name, value) for name, value in scores.more.items()} | {SECONDS: ("seconds", scores.seconds)}
    made = []
    for title in columns({"": scores}) if headings is None else headings:
        name, value = found.get(title, (title, None))
        low, high = scores.intervals.get(name, (math.nan, math.nan))  # a single prompt has no interval
        made.append(_number(value) + (f" [{_number(low)}, {_number(high)}]" if intervals and low == low else ""))
    return made


def headline(scores: Scores) -> str:
    """The numbers of a row in one line."""
    return ", ".join(f"{name} {value}" for name, value in zip(columns({"": scores}), cells(scores), strict=True))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.{1 if abs(value) >= 10 else 3}f}"


def markdown_table(scores: dict[str, Scores]) -> str:
    """The table in Markdown; it has at least one row."""
    lines = [
        "| pictures | " + " | ".join(columns(scores)) + " |",
        "|---|" + "---:|" * len(columns(scores)),
        *(f"| {row.name} | " + " | ".join(cells(row, columns(scores), True)) + " |" for row in scores.values()),
    ]
    return "\n".join(lines)


def print_table(scores: dict[str, Scores], title: str = OWN) -> None:
    """Print the table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("pictures", *columns(scores))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in scores.values():
        table.add_row(row.name, *(cell.replace(" [", "\n[") for cell in cells(row, columns(scores), True)))
    console = Console(width=max(130, 24 + 19 * len(columns(scores))), highlight=False)
    console.print(f"{title}, means with 95% confidence intervals:")
    console.print(table)
