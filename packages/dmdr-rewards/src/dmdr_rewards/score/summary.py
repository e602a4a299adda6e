"""The table of statistics that `dmdr-score` prints at the end of a run."""

from collections.abc import Sequence
from pathlib import Path

from dmdr_rewards.score.output import Row
from dmdr_rewards.score.reward_arguments import RewardArgument


def print_summary(
    path: Path, rows: Sequence[Row], rewards: Sequence[RewardArgument], count: int, speed: float | None
) -> None:
    """Print count, mean, std, min and max of each reward, the first errors, and the first note.

    path   the output, which is the title
    count  pictures that this run scored
    speed  pictures per second; None if this run scored none
    """
    import numpy as np
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("reward", "weight", "count", "mean", "std", "min", "max", title=escape(str(path)))
    for column in table.columns[1:]:
        column.justify = "right"
    named = [(reward.name, f"{reward.weight:g}") for reward in rewards] + [("total", "")] * (len(rewards) > 1)
    for name, weight in named:
        values = np.array([row[name] for row in rows if row[name] is not None])
        numbers = (values.mean(), values.std(), values.min(), values.max()) if len(values) else [float("nan")] * 4
        table.add_row(name, weight, str(len(values)), *(f"{number:.5g}" for number in numbers))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)

    failed = [row for row in rows if row["error"]]
    now = f"{count} scored now" + ("" if speed is None else f", {speed:.3g} pictures/s")
    console.print(f"{len(rows)} picture{'s' * (len(rows) != 1)}, {len(failed)} with an error; {now}", markup=False)
    for row in failed[:3]:
        console.print(f"  {row['file_name']}: {row['error']}", markup=False)
    if len(failed) > 3:
        console.print(f"  … and {len(failed) - 3} more, in the column error")
    noted = [row for row in rows if row["note"]]
    if noted:
        first = f"{noted[0]['file_name']}: {noted[0]['note']}"
        console.print(f"{len(noted)} with a note, in the column note; first: {first}", markup=False)
