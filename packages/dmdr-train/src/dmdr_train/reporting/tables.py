"""Tables of scores, for a terminal and in Markdown."""

from dmdr_train.evaluation.scores import Scores

COLUMNS = {
    "frechet": "FD",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "inception": "IS",
    "frechet_pixels": "FD pixels",
}


def columns(scores: dict[str, Scores]) -> list[str]:
    """The headings of the table: the measured scores, then scores by the reference and by rewards."""
    first = next(iter(scores.values()))
    known = [title for name, title in COLUMNS.items() if getattr(first, name) is not None]
    return [*known, *first.more]


def cells(scores: Scores) -> list[str]:
    """The numbers of a row, under the headings of `columns`."""
    values = [value for name in COLUMNS if (value := getattr(scores, name)) is not None]
    return [f"{value:.{1 if value >= 10 else 3}f}" for value in (*values, *scores.more.values())]


def markdown_table(scores: dict[str, Scores]) -> str:
    """The table in Markdown; it has at least one row."""
    lines = [
        "| pictures | " + " | ".join(columns(scores)) + " |",
        "|---|" + "---:|" * len(columns(scores)),
        *(f"| {row.name} | " + " | ".join(cells(row)) + " |" for row in scores.values()),
    ]
    return "\n".join(lines)


def print_table(scores: dict[str, Scores]) -> None:
    """Print the table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("pictures", *columns(scores), title="evaluation by a classifier that no reward uses")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in scores.values():
        table.add_row(row.name, *cells(row))
    Console(width=130).print(table)
