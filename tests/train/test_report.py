"""report.html: a page that needs nothing else, that everyone can read, and in which no file's text is run."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from dmdr_train.checkpoint.manifest import signed
from dmdr_train.cli import main
from dmdr_train.recipe.load import dump_recipe, load_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting import curves, report_curves
from dmdr_train.reporting.report import _read as read_run
from dmdr_train.reporting.report import differences, facts, refresh_report, warnings
from dmdr_train.reporting.report_sheets import MOST_SHEETS, WIDEST, Sheet, fitting, student_sheets
from PIL import Image

EVIL = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>"
SHORT = ["run.steps=30", "objectives.1.start=0", "objectives.1.stop=null", "objectives.2.start=0"]
VOID = {"meta", "img", "input"}

Make = Callable[..., Path]


class Page(HTMLParser):
    """The elements of a page; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.found if tag in tags]


def row(step: int, **more: float) -> dict[str, float]:
    watched = {"watch/diversity": 0.5 - step / 100, "watch/teacher/diversity": 0.5, "watch/drift/mean": 0.02 * step}
    return {"step": step, "loss/refl": 1 / step, "lr/generator": 1e-4, "train_seconds": 60.0 * step, **watched, **more}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def make(name: str, *overrides: str, rows: Any = None) -> Path:
        run = tmp_path_factory.mktemp("runs") / name
        for folder in ("samples", "student", "checkpoints/step-00000030"):
            (run / folder).mkdir(parents=True)
        recipe = load_recipe("demo-t2i", [*SHORT, f"run.output={run}", *overrides])
        (run / "recipe.yaml").write_text(dump_recipe(recipe))
        rows = [row(step) for step in (10, 20, 30)] if rows is None else rows
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
        for number, stem in enumerate(("teacher-28", "teacher-4", "student-00000010", "student-00000020")):
            Image.new("RGB", (400, 100), (50 * number, 80, 120)).save(run / f"samples/{stem}.png")
        scores = {"name": f"student {EVIL}", "accuracy": 0.5, "intervals": {"accuracy": [0.4, 0.6]}, "broken": [3]}
        (run / "evaluation.json").write_text(json.dumps({"joint": scores, "real": {"name": "real", "accuracy": 1}}))
        card = f"# A title\n\nUse {EVIL}, `x`, ![y](https://host/y.png), [z](javascript:z).\n\n    a command\n\n"
        (run / "student/README.md").write_text(f"{card}## Evaluation\n\nno\n")
        manifest = {"step": 30, "world_size": 2, "weights": {}, "files": {}, "versions": {"torch": "2.10"}}
        (run / "checkpoints/step-00000030/manifest.json").write_text(json.dumps(signed(manifest)))
        return run

    return make


def recipe_of(run: Path) -> Recipe:
    return load_recipe(run / "recipe.yaml", [])


@pytest.fixture(scope="module")
def file(make_run: Make) -> Path:
    """A page of two runs, with texts that would run as scripts."""
    prompts = f"tracking.samples.prompts={json.dumps([EVIL, 'a dog'])}"
    first, second = make_run("<b>first", prompts), make_run("second", "optim.clip=0.5")
    output = first.parent / "new" / "page.html"
    main(["report", str(first), "-o", str(output), "--compare", str(second)])
    assert not (first / "report.html").exists()
    assert not (first / "curves.png").exists()
    return output


@pytest.fixture(scope="module")
def page(file: Path) -> str:
    return file.read_text()


def test_the_page_needs_nothing_else(page: str) -> None:
    assert len(page) < 100_000
    parsed = Page(page)
    for attributes in (attributes for _, attributes in parsed.found):
        assert attributes.get("src", "data:image/webp;base64,").startswith("data:image/webp;base64,")
        assert attributes.get("href", "#").startswith(("#", "https://"))  # a link waits for a click
    assert parsed.all("link", "iframe", "object", "base") == []
    assert "url(" not in page.split("</style>")[0]


def test_everything_has_its_name(page: str) -> None:
    parsed = Page(page)
    ids = [attributes["id"] for _, attributes in parsed.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in parsed.found:
        for name in ("href", "for", "aria-labelledby"):
            place = attributes.get(name, f"#{ids[0]}")
            assert place.removeprefix("#") in ids or place == "https://host/y.png"
    assert all(picture["alt"] for picture in parsed.all("img"))
    assert len({picture["alt"] for picture in parsed.all("img")}) == len(parsed.all("img")) == 5
    assert all("aria-label" in each or each.get("aria-hidden") for each in parsed.all("svg"))
    assert [each["id"] for each in parsed.all("input")] == [each["for"] for each in parsed.all("label")]
    levels = [int(tag[1]) for tag, _ in parsed.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert all(each.get("tabindex") == "0" and each["aria-label"] for each in parsed.all("div") if "role" in each)


def test_no_text_of_a_file_is_run(page: str) -> None:
    parsed = Page(page)
    scripts = parsed.all("script")
    assert scripts == [{"type": "application/json", "id": "series"}, {}]
    assert not [name for _, attributes in parsed.found for name in attributes if name.startswith("on")]
    assert not [attributes for _, attributes in parsed.found if "style" in attributes]
    assert EVIL not in page
    text = "".join(parsed.texts["li"] + parsed.texts["p"] + parsed.texts["th"])
    assert text.count("document.title='run'") >= 3  # the prompt, the name of the scores, and the model card
    assert "<b>first" in "".join(parsed.texts["h1"])
    policy = parsed.all("meta")[2]["content"]
    for tag in ("style", "script"):
        own = page.rsplit(f"<{tag}>", 1)[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_names_in_metrics_are_escaped(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(curves, "draw_curves", lambda folder, settings: drawn.append(folder))
    run = make_run("run", rows=[row(1, **{f"loss/{EVIL}": 1.0}), row(2, **{f"loss/{EVIL}": 2.0})])
    main(["report", str(run)])
    text = (run / "report.html").read_text()
    assert EVIL not in text
    assert len(Page(text).all("script")) == 2
    assert drawn == [run]


def test_secrets_are_redacted(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("run", "run.seed=7")
    (run / "student/README.md").write_text("# T\n\nsee https://me:hidden@host/x and sesame-sesame\n")
    monkeypatch.setenv("SOME_API_KEY", "sesame-sesame")
    main(["report", str(run), "-o", str(run / "page.html")])
    text = (run / "page.html").read_text()
    assert "***" in text
    assert "hidden@" not in text
    assert "sesame" not in text


def test_what_it_says(page: str) -> None:
    cells = [text.strip() for kind in ("td", "th", "small", "dd") for text in Page(page).texts[kind]]
    assert {"optim.clip", "1.0", "0.5", "0.500", "[0.400, 0.600]", "torch", "30 of 30 steps"} & set(cells) >= {
        "optim.clip", "1.0", "0.5", "0.500", "[0.400, 0.600]",
    }  # fmt: skip
    assert "a command" in page
    assert ">no<" not in page  # the card's own evaluation
    assert cells.index("real") < cells.index(f"student {EVIL}")


def test_facts_warnings_and_differences(make_run: Make) -> None:
    steps = range(1, 6)
    rows = [row(n, **{"watch/diversity": 0.1, "skipped/generator": float(n > 2)}) for n in steps]
    run = make_run("run", rows=rows)
    read = read_run(run, recipe_of(run), True)
    found = dict(facts(read))
    assert found["Student"].startswith("4 steps, a LoRA of rank ")
    assert found["Training"].startswith("5 of 30 steps, batch ")
    assert found["Time"] == "5.0 minutes"
    texts = warnings(read)
    assert texts[0].startswith("early warning at step 3: limit: diversity 0.2, 0.2, 0.2 of the teacher's is below 0.6")
    assert texts[1] == "1 update of the generator was skipped, since a loss or gradient was not finite"
    assert texts[2].endswith("pictures that are not finite, which no score counts: 1")
    assert texts[3:] == ["the run has 5 of its 30 steps"]
    other = replace(read, settings=recipe_of(make_run("other", "run.seed=9")))
    assert ("run.seed", [str(read.settings.run.seed), "9"]) in differences([read, other])
    assert "run.output" not in dict(differences([read, other]))


def test_a_run_without_evaluation_and_rules(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("bare", "tracking.evaluation=null", "watch.rules=[]", rows=[row(30)])
    (run / "evaluation.json").unlink()
    (run / "evaluation").mkdir()
    scores = {"name": "student at step 30", "accuracy": 0.25, "intervals": {"accuracy": [0.1, 0.4]}}
    scored = {"student": scores, "teacher-4": {"name": "teacher, 4 steps"}}
    (run / "evaluation/evaluation.json").write_text(json.dumps(scored))
    main(["report", str(run), "-o", str(run / "page.html")])
    printed = capsys.readouterr().out  # the scores of `dmdr-train evaluate`, in the order of the page
    assert printed.index("teacher, 4 steps") < printed.index("student at step 30") < printed.index("0.250")
    texts = Page((run / "page.html").read_text()).texts["p"]
    assert "In brackets are 95% confidence intervals of means." in texts
    assert "No rule of early warning was in force." in texts


def test_two_evaluations_stand_in_two_tables(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """They may have other prompts and numbers of pictures, so their rows cannot be compared."""
    run = make_run("run", rows=[row(30)])
    measured = recipe_of(run).model_copy(deep=True).model_dump(mode="json")
    measured["tracking"]["evaluation"] |= {"prompt_files": ["mine/held_out.txt"], "pictures": 120, "reference": None}
    (run / "evaluation").mkdir()
    (run / "evaluation/recipe.yaml").write_text(yaml.safe_dump(measured))
    (run / "evaluation/evaluation.json").write_text(json.dumps({"student": {"name": "held-out student"}}))
    main(["report", str(run), "-o", str(run / "page.html")])
    text = (run / "page.html").read_text()
    first, second = text.index('id="evaluation"'), text.index(">Evaluation by dmdr-train evaluate<")
    assert first < text.index("Over 2000 pictures.") < second < text.index("held-out student")
    assert "Over at most 120 pictures of the prompts in held_out.txt." in text[second:]
    printed = capsys.readouterr().out
    assert (
        printed.index("Evaluation, means")
        < printed.index("Evaluation by dmdr-train evaluate")
        < printed.index("held-out")
    )


def test_limits_and_the_teacher_are_drawn_where_they_fit(make_run: Make) -> None:
    run = make_run("run")
    rows = [row(step) for step in (10, 20, 30)]
    charts = {chart.name: chart for chart in report_curves.charts([(recipe_of(run), rows)])}
    assert charts.keys() == {"diversity", "drift/mean", "loss/refl"}  # the learning rate is constant, and no loss
    diversity = charts["diversity"]
    assert [text for _, text, _ in diversity.levels] == ["warns below 0.3", "teacher 0.5"]
    assert diversity.levels[1][2] < float(diversity.lines[0].path.split(" ")[0].split(",")[1]) < diversity.levels[0][2]
    assert charts["drift/mean"].notes == []
    small = [{**each, "watch/drift/mean": each["step"] / 1000} for each in rows]
    squeezed = {chart.name: chart for chart in report_curves.charts([(recipe_of(run), small)])}["drift/mean"]
    assert squeezed.levels == []
    assert squeezed.notes == ["warns above 1 lies outside the chart"]


def test_scales() -> None:
    assert report_curves._ticks(-0.3, 1.05, False) == [0, 0.5, 1]
    assert report_curves._ticks(0.02, 30, True) == [0.1, 1, 10]
    labelled = report_curves._labelled([-2.934, -2.936, -2.938], lambda value: 100 * value)
    assert labelled == [("−2.934", -293.4), ("−2.936", -293.6), ("−2.938", -293.8)]
    assert report_curves._labelled([0, 0.5, 1], lambda value: value) == [("0", 0), ("0.5", 0.5), ("1", 1)]
    low, high, _ = report_curves._range([-28.19999, -28.2], [])
    assert low < -28.214 < -28.186 < high  # a change of rounding stays flat
    points = [(float(step), 2.0 * step) for step in range(1, 1001)]
    thin = report_curves.thinned(points)
    assert len(thin) == 250
    assert thin[0] == (2.5, 5)
    assert report_curves.values_of([{"step": 1, "x": float("nan")}, {"step": 2, "x": 3.0}], "x") == [(2, 3.0)]


def test_sheets(make_run: Make) -> None:
    run = make_run("run")
    for step in range(1, 31):
        Image.new("RGB", (2000 if step == 30 else 20, 10), "white").save(run / f"samples/student-{step:08d}.png")
    (run / "samples/student-00000001.png").write_bytes(b"damaged")
    Image.new("RGB", (30, 10), "red").save(run / "samples/student-joint.png")
    sheets = student_sheets(run, recipe_of(run))
    assert len(sheets) == MOST_SHEETS - 1
    assert (sheets[-1].step, sheets[-1].title, sheets[-1].width) == (30, "student at step 30, end of joint", 30)
    (run / "samples/student-joint.png").unlink()
    assert student_sheets(run, recipe_of(run))[-1].width == WIDEST


def test_sheets_leave_the_page_a_size_that_can_be_mailed() -> None:
    sheets = [Sheet("", step, "x" * 100, 1, 1) for step in range(6)]
    assert [sheet.step for sheet in fitting(sheets, 600)] == [0, 1, 2, 3, 4, 5]
    assert [sheet.step for sheet in fitting(sheets, 599)] == [0, 2, 4, 5]
    assert [sheet.step for sheet in fitting(sheets, 399)] == [0, 4, 5]
    assert [sheet.step for sheet in fitting(sheets, 1)] == [0, 5]


def test_a_page_that_cannot_be_written_is_one_line(make_run: Make) -> None:
    run = make_run("run")
    assert refresh_report(run, recipe_of(run)) == ""
    before = (run / "report.html").read_text()
    (run / "evaluation.json").write_text("damaged")
    said = refresh_report(run, recipe_of(run))
    assert said.startswith(f"warning: {run}/report.html could not be written (")
    assert said.endswith(f"; to try again: dmdr-train report {run}")
    assert "\n" not in said
    assert (run / "report.html").read_text() == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["-o", "page.pdf"], "error: --output: page.pdf does not end in .html; give a name that does\n"),
        (["--compare", *["run"] * 6], "error: --compare: gives 6 runs; give at most 5\n"),
        (["--compare", "nowhere"], "error: run: nowhere holds no recipe.yaml; give the folder of a run\n"),
    ],
)
def test_mistakes(
    make_run: Make, options: list[str], error: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run")
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit) as ended:
        main(["report", "run", *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err == error


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` or `#rgb`. Source: WCAG 2.2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme: int) -> None:
    style = files("dmdr_train.reporting").joinpath("report.css").read_text()
    colours = dict(re.findall(r"--(\w+): (#\w{3,6})[;}]", re.findall(r":root \{.*?\}", style, re.DOTALL)[theme]))
    needed = {"ink": 4.5, "soft": 4.5, "accent": 4.5, "alert": 4.5, "teacher": 3, "limit": 3}
    needed |= {f"run{number}": 3 for number in range(6)}
    for name, ratio in needed.items():
        for ground in ("page", "card"):
            light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= ratio, (name, ground)
