"""report.html: one page about a run that needs no other file and no network. Imports no torch."""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dmdr_rewards.base.secrets import redacted

from dmdr_train.base.atomic_files import write_whole
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.find import checkpoints_in
from dmdr_train.checkpoint.manifest import RECIPE, read_manifest
from dmdr_train.evaluation.scores import FOLDER, LATER, OWN, Scores, all_scores
from dmdr_train.monitoring import rules
from dmdr_train.recipe.load import dump_recipe, parse_recipe, read_yaml
from dmdr_train.recipe.schema import Evaluation, Recipe
from dmdr_train.reporting import report_curves
from dmdr_train.reporting.report_sheets import Sheet, sheet_prompts, student_sheets, teacher_sheets
from dmdr_train.reporting.summary import INTERVALS, how_measured, no_alarm
from dmdr_train.reporting.tables import cells, columns
from dmdr_train.tracking.metrics_file import read_metrics

MOST_RUNS = 6
"""Runs in one page: as many as there are colours and kinds of dashes."""


Evaluated = tuple[dict[str, Scores], Evaluation | None]
"""Scores by row, and how they were measured where that is known."""


@dataclass(frozen=True)
class RunFiles:
    """What the page shows of a run, read from its folder."""

    name: str
    folder: Path
    settings: Recipe
    rows: list[dict[str, float]]
    evaluations: dict[str, Evaluated]
    teacher: list[Sheet]
    sheets: list[Sheet]
    environment: list[tuple[str, str]]
    usage: str


def write_report(output: Path, runs: Sequence[tuple[Path, Recipe]]) -> None:
    """Write the page about the first run, compared with the others.

    Texts from files are escaped, secrets in them are redacted, and the page's policy lets no script run but its own.

    Args:
        runs: folders and recipes, at most `MOST_RUNS`.

    Raises:
        UserError: too many runs, or a damaged evaluation.json.
        OSError: the page cannot be written.
    """
    if len(runs) > MOST_RUNS:
        raise UserError("--compare", f"gives {len(runs) - 1} runs; give at most {MOST_RUNS - 1}")
    output.parent.mkdir(parents=True, exist_ok=True)
    text = render([_read(folder, settings, number == 0) for number, (folder, settings) in enumerate(runs)])
    write_whole(output, lambda path: path.write_text(text, encoding="utf-8"))


def refresh_report(run: Path, settings: Recipe) -> str:
    """Write RUN/report.html anew -> the line of a warning, empty if the page is written.

    The page is made from other files of the run, and `dmdr-train report` makes it again. So no failure of it ends a
    training or an evaluation; the page that was there before stays.
    """
    page = run / "report.html"
    try:
        write_report(page, [(run, settings)])
    except Exception as error:  # also of a library, or of a file that someone has changed
        reason = " ".join(str(error).split()) or type(error).__name__
        return redacted(f"warning: {page} could not be written ({reason}); to try again: dmdr-train report {run}")
    return ""


def _read(folder: Path, settings: Recipe, first: bool) -> RunFiles:
    """Read a run; of a run that is only compared with, the last sheet is enough."""
    sheets = student_sheets(folder, settings)
    return RunFiles(
        folder.resolve().name,
        folder,
        settings,
        read_metrics(folder),
        _evaluations(folder, settings),
        teacher_sheets(folder),
        sheets if first else sheets[-1:],
        environment(folder),
        usage(folder),
    )


def _evaluations(folder: Path, settings: Recipe) -> dict[str, Evaluated]:
    """The evaluations of a run, by their titles."""
    own = {OWN: settings.tracking.evaluation}
    later = folder / FOLDER / RECIPE  # evaluations of earlier versions have none
    if later.is_file():
        own[LATER] = parse_recipe(read_yaml(later, str(later))).tracking.evaluation
    return {title: (scores, own.get(title)) for title, scores in all_scores(folder).items()}


def render(runs: Sequence[RunFiles]) -> str:
    """The text of the page."""
    from jinja2 import Environment, StrictUndefined
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("js-default").disable("image")  # a picture of the model card would need the network
    room = files("dmdr_train.reporting")
    template, style, script = (room.joinpath(f"report.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    first = runs[0]
    charts = report_curves.charts([(run.settings, run.rows) for run in runs])
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(template).render(
        run=first,
        runs=runs,
        several=len(runs) > 1,
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        facts=facts(first),
        charts=charts,
        size=report_curves,
        spoken=[report_curves.spoken(chart, [run.name for run in runs]) for chart in charts],
        series=[[[line.run, line.points] for line in chart.lines] for chart in charts],
        prompts=sheet_prompts(first.settings),
        evaluations=[found for title in (OWN, LATER) if (found := _evaluation(runs, title))],
        watched=_watched(runs),
        no_alarm=no_alarm(first.settings),
        warnings=[(run.name, text) for run in runs for text in warnings(run)],
        differences=differences(runs),
        recipe=redacted(dump_recipe(first.settings)),
        usage=markdown.render(redacted(first.usage)),
    )


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """What was trained from what, as pairs of a term and its text."""
    settings, last = run.settings, report_curves.last_values(run.rows)
    model, steps = settings.model, settings.rollout.steps
    loras = "".join(f", with the LoRA {lora.path} at {lora.strength:g}" for lora in model.teacher_loras)
    lora = model.generator_lora
    trained = "all weights" if lora is None else f"a LoRA of rank {lora.rank}"
    start = f", which begin with {model.generator}" if model.generator else ""
    hours = last.get("train_seconds", 0.0) / 3600
    data = (
        settings.data.prompts or settings.data.embeddings or settings.data.pairs or f"classes: {settings.data.classes}"
    )
    found = [
        ("Teacher", f"{model.path} ({model.family}){loras}"),
        ("Student", f"{steps} step{'s' * (steps > 1)}, {trained}{start}"),
        *(
            ("Objective", _objective(name, each))
            for name, each in zip(settings.names, settings.objectives, strict=True)
        ),
        ("Data", str(data)),
        (
            "Training",
            f"{int(last.get('step', 0)):,} of {settings.run.steps:,} steps, batch {settings.optim.batch_size}, "
            f"{settings.optim.precision}, seed {settings.run.seed}",
        ),
    ]
    if hours:
        minutes = f"{60 * hours:.1f} minutes" if hours * 60 >= 1 else f"{3600 * hours:.0f} seconds"
        found.append(("Time", f"{hours:.1f} hours" if hours >= 1 else minutes))
    return [(term, redacted(text)) for term, text in found]


def _objective(name: str, objective: Any) -> str:
    reward = getattr(objective, "reward", None)
    of = ""
    if reward is not None:
        of = f" with {reward.name}" + (f" ({Path(reward.checkpoint).name})" if reward.checkpoint else "")
    until = "" if objective.stop is None else f" to step {objective.stop:,}"
    weight = objective.weight if isinstance(objective.weight, str) else f"{objective.weight:g}"
    return f"{name.replace('_', ' ')}{of}, weight {weight}, from step {objective.start:,}{until}"


def warnings(run: RunFiles) -> list[str]:
    """What a reader should know before the numbers are believed: alarms, skipped updates, and broken pictures."""
    found = [str(alarm) for alarm in rules.all_alarms(run.settings.rules, rules.evaluations(run.rows))]
    last = report_curves.last_values(run.rows)
    for name, count in last.items():
        if name.startswith("skipped/") and count:
            network = name.removeprefix("skipped/").replace("_", " ")
            were = "update of the {} was" if count == 1 else "updates of the {} were"
            found.append(f"{count:.0f} {were.format(network)} skipped, since a loss or gradient was not finite")
    found += [
        f"{row.name}: pictures that are not finite, which no score counts: {len(row.broken)}"
        for scores, _ in run.evaluations.values()
        for row in scores.values()
        if row.broken
    ]
    if last.get("step", 0) < run.settings.run.steps:
        found.append(f"the run has {int(last.get('step', 0)):,} of its {run.settings.run.steps:,} steps")
    return found


def _evaluation(runs: Sequence[RunFiles], title: str) -> dict[str, Any] | None:
    """The table of an evaluation over all runs: headings, and rows of (run, name, cells); None without scores."""
    found = [(run, *run.evaluations[title]) for run in runs if title in run.evaluations]
    rows = [(run, row) for run, scores, _ in found for row in scores.values()]
    if not rows:
        return None
    headings = columns({str(number): row for number, (_, row) in enumerate(rows)})
    made = [
        (run.name, row.name, [cell.partition(" [")[::2] for cell in cells(row, headings, intervals=True)])
        for run, row in rows
    ]
    ways = {run.name: how_measured(way).replace("`", "") if way else INTERVALS for run, _, way in found}
    alike = len(set(ways.values())) == 1
    how = next(iter(ways.values())) if alike else " ".join(f"{run}: {way}" for run, way in ways.items())
    return {"title": title, "headings": headings, "rows": made, "how": how}


def _watched(runs: Sequence[RunFiles]) -> dict[str, Any] | None:
    """The measures of early warning: for each name the teacher's value, and each run's first and last."""
    found = [rules.evaluations(run.rows) for run in runs]
    if not found[0]:
        return None
    names = [name for name in found[0][-1] if name in runs[0].settings.watched and not name.startswith("teacher/")]
    headings = ["teacher"]
    for run, each in zip(runs, found, strict=True):
        of = f"{run.name}, " if len(runs) > 1 else ""
        headings += [f"{of}step {row['step']:,}" for row in (each[0], each[-1])] if each else []
    rows = []
    for name in names:
        values = [found[0][-1].get(f"teacher/{name}")]
        values += [row.get(name) for each in found if each for row in (each[0], each[-1])]
        rows.append((name, [report_curves.number(value) for value in values]))
    return {"headings": headings, "rows": rows}


def differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """The keys in which the recipes of the runs differ, each with its values; `run.output` always differs."""
    flat = [dict(_flat(run.settings.model_dump(mode="json"))) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    return [
        (key, [redacted(str(each.get(key, "–"))) for each in flat])
        for key in keys
        if key != "run.output" and len({str(each.get(key, "–")) for each in flat}) > 1
    ]


def _flat(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    parts = [(f"{key}.{name}" if key else str(name), value) for name, value in inside]
    if not parts:
        yield key, node
    for name, value in parts:
        yield from _flat(value, name)


def environment(folder: Path) -> list[tuple[str, str]]:
    """The processes and the versions of packages that wrote the newest checkpoint; empty if none can be read."""
    for path in reversed(checkpoints_in(folder / "checkpoints")):
        try:
            manifest = read_manifest("run", path)
        except UserError:
            continue
        versions = [(str(name), str(version)) for name, version in manifest.get("versions", {}).items()]
        return [("newest checkpoint", path.name), ("processes", str(manifest["world_size"])), *versions]
    return []


def usage(folder: Path) -> str:
    """The part of the student's model card before its first section, without its title; empty without a card."""
    card = folder / "student" / "README.md"
    if not card.is_file():
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")
    return re.split(r"^## ", re.sub(r"\A# .*\n", "", text), maxsplit=1, flags=re.MULTILINE)[0]
