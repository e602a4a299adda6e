import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dmdr_rewards.score.page import write_page
from dmdr_rewards.score.sources import Item
from PIL import Image

EVIL = '<script>alert("x")</script> & $title \'"'


class Page(HTMLParser):
    """Every element with its attributes, and the text of each kind of element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


def row(number: int, score: float | None, **changes: Any) -> dict[str, Any]:
    identity = {"file_name": f"{number}.png", "prompt": f"prompt {number}", "label": None}
    return {**identity, "a": score, "b": score and -score, "total": score, "error": None, "note": None, **changes}


def page(tmp_path: Path, rows: list[dict[str, Any]], names: list[str], limit: int = 100) -> Page:
    for row in rows:
        Image.new("RGBA", (900, 30), "red").save(tmp_path / row["file_name"])
    items = [Item(row["file_name"], tmp_path / row["file_name"]) for row in rows]
    write_page(tmp_path / "page.html", "s.parquet", rows, items, names, limit)
    assert not list(tmp_path.glob(".*"))
    return Page(tmp_path / "page.html")


def test_the_page_needs_nothing_else_and_is_well_formed(tmp_path: Path) -> None:
    found = page(tmp_path, [row(n, n / 10) for n in range(1, 5)], ["a", "b"])
    assert found.open == []
    assert len(found.all("script")) == 1
    assert not found.all("link")
    addresses = [each[key] for _, each in found.elements for key in ("src", "href", "action", "srcset") if key in each]
    assert len(addresses) == 4
    assert all(address.startswith("data:image/webp;base64,") for address in addresses)
    assert "http" not in re.sub(r"base64,[^\"]*", "", found.source).replace("http-equiv", "")
    assert "url(" not in found.source


def test_pictures_are_sorted_by_the_total_and_carry_their_scores(tmp_path: Path) -> None:
    rows = [row(1, 0.2), row(2, None, error="cannot be read"), row(3, 0.9), row(4, 0.5)]
    found = page(tmp_path, rows, ["a", "b"])
    assert [each["data-scores"] for each in found.all("article")] == ["0.9 0.9 -0.9", "0.5 0.5 -0.5", "0.2 0.2 -0.2"]
    assert [each["alt"] for each in found.all("img")] == ["3.png", "4.png", "1.png"]
    assert {(each["width"], each["height"]) for each in found.all("img")} == {("320", "11")}
    assert found.text["button"] == ["total", "a", "b"]
    assert found.text["dd"][:3] == ["0.9000", "0.9000", "−0.9000"]
    assert found.text["summary"] == ["1 with an error"]
    assert "4 pictures · 1 with an error" in found.text["p"]


def test_notes_are_shown_with_their_pictures(tmp_path: Path) -> None:
    found = page(tmp_path, [row(1, 0.2, note="a reads 77 of <131> tokens"), row(2, 0.1)], ["a"])
    assert found.text["em"] == ["a reads 77 of <131> tokens"]
    assert any("1 with a note" in text for text in found.text["p"])


def test_one_reward_has_no_total(tmp_path: Path) -> None:
    found = page(tmp_path, [row(1, 0.2), row(2, 0.4)], ["b"])
    assert found.text["button"] == ["b"]
    assert [each["data-scores"] for each in found.all("article")] == ["-0.2", "-0.4"]


def test_a_histogram_counts_every_score(tmp_path: Path) -> None:
    scores = [0.0, 0.0, 0.0, 1.0, 0.5]
    found = page(tmp_path, [row(n, score) for n, score in enumerate(scores)], ["a"])
    counts = [int(text.split(" in ")[0]) for text in found.text["title"] if " in " in text]
    assert (len(counts), sum(counts), counts[0], counts[-1]) == (3, 5, 3, 1)
    heights = [float(each["height"]) for each in found.all("rect")]
    assert heights == pytest.approx([90, 30, 30])
    [mean] = [each for each in found.all("line") if each["class"] == "mean"]
    assert float(mean["x1"]) == pytest.approx(360 * 0.3)
    assert found.text["text"] == ["0.000", "1.000"]


def test_what_users_wrote_is_escaped(tmp_path: Path) -> None:
    rows = [row(1, 0.2, prompt=EVIL), row(2, None, error=EVIL), row(3, 0.2, prompt=None, label=7)]
    found = page(tmp_path, rows, ["a"])
    assert len(found.all("script")) == 1
    assert EVIL in "".join(found.text["p"])
    assert "label 7" in found.text["p"]
    assert EVIL in "".join(found.text["li"])


def test_of_too_many_the_best_and_the_worst_are_shown(tmp_path: Path) -> None:
    found = page(tmp_path, [row(n, n / 10) for n in range(8)], ["a"], limit=3)
    assert [each["alt"] for each in found.all("img")] == ["7.png", "6.png", "0.png"]
    assert found.text["i"] == ["1", "2", "8"]
    assert "8 pictures · showing the best 2 and the worst 1" in found.text["p"]
    assert sum(int(text.split(" in ")[0]) for text in found.text["title"] if " in " in text) == 8


def test_nothing_scored_and_equal_scores_still_make_a_page(tmp_path: Path) -> None:
    assert "no scores" in page(tmp_path, [row(1, None, error="x")], ["a"]).text["span"]
    assert len(page(tmp_path, [row(n, 0.25) for n in range(3)], ["a"]).all("rect")) == 1


def test_a_picture_that_is_gone_leaves_its_card(tmp_path: Path) -> None:
    items = [Item("x.png", tmp_path / "x.png")]
    write_page(tmp_path / "page.html", "s", [row(1, 0.5)], items, ["a"], 10)
    assert "gone" in Page(tmp_path / "page.html").text["span"]
