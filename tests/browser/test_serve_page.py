"""`dmdr-generate serve` as users see it: the program with tiny models and a tiny CLIP, in a real browser."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.browser
SECONDS = 60
"""The longest that a page may take to change."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a student and a teacher with a score; its queue has room for one request."""
    import open_clip
    import torch
    from dmdr_models import tiny

    folder = tmp_path_factory.mktemp("serve")
    tiny.sd3(folder / "student", seed=0)
    tiny.sd3(folder / "teacher", seed=1)
    vision, text = {"layers": 1, "width": 64, "patch_size": 8}, {"width": 64, "heads": 1, "layers": 1}
    clip: dict[str, Any] = {"embed_dim": 4, "vision_cfg": {"image_size": 16, **vision}, "text_cfg": text}
    (folder / "clip.json").write_text(json.dumps(clip))
    torch.save(open_clip.CLIP(**clip).state_dict(), folder / "clip.bin")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    models = ["--model", "student", "--steps", "2", "--teacher", "teacher", "--teacher-steps", "4"]
    reward = ["--reward", "likeness@clip=clip.bin", "--option", "likeness.model=clip.json"]
    limits = ["--most-side", "64", "--most-steps", "200", "--most-letters", "100", "--most-waiting", "1"]
    command = [sys.executable, "-m", "dmdr_models.generate", "serve", *models, *reward, *limits, "--port", str(port)]
    with (folder / "said").open("w") as said:
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=said, text=True)
    try:
        assert server.stdout
        lines = iter(server.stdout.readline, "")
        found = next((line for line in lines if line.startswith("The page is at ")), None)
        assert found, (folder / "said").read_text()
        yield found.split()[4]
    finally:
        server.terminate()
        server.wait()


class Page:
    """What a user does and sees."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.until(lambda: self.button.is_enabled() and self.field("Prompt"))
        self.until(lambda: browser.execute_script("return document.readyState") == "complete")

    def until(self, seen: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.browser, SECONDS, 0.1, [WebDriverException, IndexError])
        return wait.until(lambda _: seen())

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    @property
    def button(self) -> Any:
        return self.all("button.primary")[0]

    def field(self, label: str) -> Any:
        path = f"//label[.//span[normalize-space()='{label}']]//*[self::input or self::textarea]"
        found = self.browser.find_elements("xpath", path)
        return (found or self.all(f"input[aria-label='number input for {label}']"))[0]

    def type(self, label: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.field(label).send_keys(Keys.CONTROL, "a")
        self.field(label).send_keys(text, Keys.TAB)

    def draw(self) -> None:
        self.button.click()

    def ready(self) -> bool:
        return self.button.text == "Draw" and self.button.is_enabled()

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """Address and alt text of each."""
        return [(each.get_attribute("src"), each.get_attribute("alt")) for each in self.all(".picture img")]

    @property
    def lines(self) -> list[str]:
        return [self.field(f"About the picture of the {side}").get_property("value") for side in ("student", "teacher")]

    def drawn(self, before: list[tuple[str, str]] | None = None) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = self.until(
            lambda: len(self.pictures) == 2 and self.pictures != before and self.ready() and self.pictures
        )
        return found


def test_a_prompt_becomes_two_pictures_with_scores(address: str, open_page: Callable[..., Any]) -> None:
    page = Page(open_page(address))
    page.type("Prompt", "a red circle")
    page.draw()
    first = page.drawn()
    assert [alt for _, alt in first] == ["Picture of the student: a red circle", "Picture of the teacher: a red circle"]
    said = [rf"{side} · {n} steps · \d+\.\d s · likeness -?\d\.\d{{3}}" for side, n in (("student", 2), ("teacher", 4))]
    assert all(re.fullmatch(form, line) for form, line in zip(said, page.lines, strict=True)), page.lines
    sizes = "return [...document.querySelectorAll('.picture img')].map(each => each.naturalWidth)"
    assert page.browser.execute_script(sizes) == [32, 32]
    for picture in page.all(".picture img"):  # a small one fills its place
        assert picture.value_of_css_property("object-fit") == "contain"
        assert min(picture.size.values()) > 200

    page.type("Steps of the student", "1")
    page.type("Seed", "7")
    page.type("Side in pixels", "48")
    page.draw()
    page.drawn(first)
    assert page.lines[0].startswith("student · 1 step · ")
    assert page.browser.execute_script(sizes) == [48, 48]

    loaded = page.browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert [name for name in loaded if not name.startswith((address, "data:", "blob:"))] == []
    assert [each for each in page.browser.get_log("browser") if each["level"] == "SEVERE"] == []


def test_a_refusal_says_why_and_leaves_the_pictures(address: str, open_page: Callable[..., Any]) -> None:
    page = Page(open_page(address, width=390, dark=True))
    page.type("Prompt", "a dog")
    page.draw()
    shown = page.drawn()
    for label, text, message in (
        ("Side in pixels", "2000", "size 2000 is not in 16 to 64: give another number, or 0"),
        ("Prompt", "<b>" * 40, "the prompt has 120 letters: give at most 100"),
        ("Prompt", " ", "the prompt is empty: write what to draw"),
    ):
        page.type(label, text)
        page.draw()
        page.until(lambda message=message: page.all("[role=alert]")[0].text == message and page.ready())
        assert page.pictures == shown
        assert page.browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        page.type("Side in pixels", "0")
    page.type("Prompt", "a cat")
    page.draw()
    page.drawn(shown)
    page.until(lambda: not [each for each in page.all("[role=alert]") if each.is_displayed()])


def test_a_second_user_waits_and_more_are_asked_to_try_again(address: str, open_page: Callable[..., Any]) -> None:
    users = [Page(open_page(address)) for _ in range(4)]
    for number, user in enumerate(users):
        user.type("Prompt", f"user {number}")
        for side in ("student", "teacher"):
            user.type(f"Steps of the {side}", "200")
    users[0].draw()
    users[0].until(lambda: users[0].button.text == "Drawing…" and not users[0].button.is_enabled())
    for user in users[1:]:
        user.draw()
    for user in users:
        user.until(user.ready)
    served = [user for user in users if len(user.pictures) == 2]
    assert users[0] in served
    assert 2 <= len(served) < 4
    for user in served:
        assert user.pictures[0][1] == f"Picture of the student: user {users.index(user)}"
    for user in users:
        if user not in served:
            assert "busy" in user.browser.find_element("tag name", "body").text
