"""The page of `dmdr-train report` in a real browser: keyboard, alt texts, width, light and dark."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from dmdr_train.recipe.load import dump_recipe, load_recipe
from dmdr_train.reporting.report import write_report
from PIL import Image

pytestmark = pytest.mark.browser
EVIL = "</script><script>document.title='run'</script>"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("report") / "<b>run"
    (run / "samples").mkdir(parents=True)
    short = ["run.steps=30", "objectives.1.start=0", "objectives.1.stop=null", "objectives.2.start=0"]
    prompts = f"tracking.samples.prompts={json.dumps([EVIL, 'a dog'])}"
    recipe = load_recipe("demo-t2i", [*short, f"run.output={run}", prompts])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    rows = [
        {"step": step, "loss/refl": 1 / step, "watch/diversity": 0.5 - step / 100, "watch/teacher/diversity": 0.5}
        for step in (10, 20, 30)
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for number, stem in enumerate(("teacher-28", *(f"student-{step:08d}" for step in (10, 20, 30)))):
        Image.effect_noise((800, 200), 30 + 20 * number).save(run / f"samples/{stem}.png")
    write_report(run / "report.html", [(run, recipe)])
    return (run / "report.html").as_uri()


def shown(browser: Any) -> list[str]:
    """The alt texts of the student's sheets that are shown."""
    sheets = browser.find_elements("css selector", "figure.student img")
    return [each.get_attribute("alt") for each in sheets if each.is_displayed()]


def test_the_keyboard_moves_the_slider(address: str, open_page: Callable[..., Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = open_page(address)
    assert browser.title == "<b>run · dmdr report"  # not "run"
    slider = browser.find_element("id", "step")
    assert shown(browser) == ["Samples of the student at step 30"]
    for key, step in ((Keys.ARROW_LEFT, 20), (Keys.HOME, 10), (Keys.ARROW_RIGHT, 20), (Keys.END, 30)):
        slider.send_keys(key)
        assert shown(browser) == [f"Samples of the student at step {step}"]
        assert slider.get_attribute("aria-valuetext") == f"student at step {step}"
        assert browser.find_element("css selector", ".slider output").text == f"student at step {step}"
    assert browser.execute_script("return getComputedStyle(arguments[0]).outlineWidth", slider) == "3px"
    pictures = browser.find_elements("css selector", "img")
    assert all(each.get_attribute("alt") for each in pictures)
    assert all(each.get_property("naturalWidth") for each in pictures)
    assert all(each.get_attribute("aria-label") for each in browser.find_elements("css selector", ".chart svg"))
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_follows_the_setting(address: str, open_page: Callable[..., Any], width: int, dark: bool) -> None:
    browser = open_page(address, width, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    colours = browser.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    page, ink = (sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(","))) for colour in colours)
    assert (page < ink) == dark
