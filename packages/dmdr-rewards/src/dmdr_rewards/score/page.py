"""The page of `dmdr-score --html`: one self-contained file with histograms and the pictures, best first."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from dmdr_rewards.base.atomic_files import write_whole
from dmdr_rewards.score.output import Row
from dmdr_rewards.score.sources import Item, open_picture

_THUMBNAIL = 320  # pixels of the longer side: sharp on the page's 220 at a display scale of 1.5


def write_page(
    path: Path, title: str, rows: Sequence[Row], items: Sequence[Item], names: list[str], limit: int
) -> None:
    """Write the page atomically.

    rows, items  the scores and the sources of the same pictures
    names        the rewards; with several, the page also shows `total` and is sorted by it
    limit        maximum number of pictures; of more, the page shows the best and the worst, half of `limit` each
    """
    columns = [*(["total"] if len(names) > 1 else []), *names]
    scored = [(row, item) for row, item in zip(rows, items, strict=True) if row[columns[0]] is not None]
    scored.sort(key=lambda pair: -pair[0][columns[0]])
    shown = list(enumerate(scored, 1))
    if len(shown) > limit:
        shown = shown[: -(-limit // 2)] + shown[len(shown) - limit // 2 :]
    # In the order of the sources, which are read forward.
    wanted = {id(item) for _, (_, item) in shown}
    pictures = {id(item): _thumbnail(item) for item in items if id(item) in wanted}
    failed = [row for row in rows if row["error"]]
    template = Template(files("dmdr_rewards.score").joinpath("page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        facts=_facts(len(rows), len(scored), len(shown), len(failed), sum(bool(row["note"]) for row in rows), limit),
        histograms="".join(_histogram(name, [row[name] for row in rows if row[name] is not None]) for name in columns),
        sorters="".join(
            f'<button data-column="{number}"{" aria-pressed=true" if number == 0 else ""}>{escape(name)}</button>'
            for number, name in enumerate(columns)
        ),
        cards="".join(_card(rank, row, pictures[id(item)], columns) for rank, (row, item) in shown),
        failed=_failures(failed),
    )
    write_whole(path, lambda partial: partial.write_text(page, encoding="utf-8"))


def _facts(pictures: int, scored: int, shown: int, failed: int, noted: int, limit: int) -> str:
    facts = [f"{pictures:,} picture{'s' * (pictures != 1)}"]
    if failed:
        facts.append(f"{failed:,} with an error")
    if noted:
        facts.append(f"{noted:,} with a note")
    if shown < scored:
        facts.append(f"showing the best {-(-limit // 2):,} and the worst {limit // 2:,}")
    return " · ".join(facts)


def _histogram(name: str, values: list[float]) -> str:
    if not values:
        return f"<figure><figcaption><b>{escape(name)}</b><span>no scores</span></figcaption></figure>"
    bins = min(40, max(8, math.ceil(2 * len(values) ** (1 / 3))))  # the Rice rule, within limits that stay legible
    counts, edges = np.histogram(values, bins)
    width, height, mean = 360, 90, float(np.mean(values))
    step, low, high = width / bins, edges[0], edges[-1]
    bars = "".join(
        f'<rect x="{number * step + 0.5:.2f}" y="{height - tall:.2f}" width="{step - 1:.2f}" height="{tall:.2f}">'
        f"<title>{count} in {_number(left)} … {_number(right)}</title></rect>"
        for number, (count, left, right) in enumerate(zip(counts, edges, edges[1:], strict=False))
        if (tall := height * count / counts.max())
    )
    middle = width * (mean - low) / (high - low)
    return (
        f"<figure><figcaption><b>{escape(name)}</b>"
        f"<span>mean {_number(mean)} · std {_number(float(np.std(values)))} · n {len(values):,}</span></figcaption>"
        f'<svg viewBox="0 0 {width} {height + 18}" role="img" aria-label="histogram of {escape(name)}">{bars}'
        f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>'
        f'<line class="mean" x1="{middle:.2f}" x2="{middle:.2f}" y1="0" y2="{height}"/>'
        f'<text x="0" y="{height + 14}">{_number(low)}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{_number(high)}</text></svg></figure>'
    )


def _card(rank: int, row: Row, thumbnail: str, columns: Sequence[str]) -> str:
    scores = "".join(
        f"<dt>{escape(name)}</dt><dd>{_number(row[name])}</dd>" for name in columns if row[name] is not None
    )
    under = row["prompt"] if row["prompt"] is not None else "" if row["label"] is None else f"label {row['label']}"
    note = f"<em>{escape(row['note'])}</em>" if row["note"] else ""
    return (
        f'<article data-scores="{" ".join(repr(row[name]) for name in columns)}">'
        f'<div class="frame">{thumbnail}<i title="place by {escape(columns[0])}">{rank:,}</i></div>'
        f"<dl>{scores}</dl>"
        f'<p title="{escape(under)}">{escape(under)}</p>{note}<small title="{escape(row["file_name"])}">'
        f"{escape(row['file_name'])}</small></article>\n"
    )


def _thumbnail(item: Item) -> str:
    try:
        picture = open_picture(item.source)
    except ValueError:  # it was removed or changed after it was scored
        return "<span>gone</span>"
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=80)
    text = base64.b64encode(data.getvalue()).decode("ascii")
    return (
        f'<img loading="lazy" decoding="async" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(item.file_name)}" src="data:image/webp;base64,{text}">'
    )


def _failures(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = "".join(f"<li><code>{escape(row['file_name'])}</code> {escape(row['error'])}</li>" for row in rows[:100])
    more = f"<li>… and {len(rows) - 100:,} more</li>" if len(rows) > 100 else ""
    return f"<details><summary>{len(rows):,} with an error</summary><ul>{lines}{more}</ul></details>"


def _number(value: float) -> str:
    return f"{value:#.4g}".replace("-", "−")
