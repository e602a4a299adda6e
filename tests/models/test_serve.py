"""`dmdr-generate serve` without its page: what a request draws, and which requests are refused."""

import json
import re
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dmdr_models import generate, serve
from dmdr_models.base.errors import UsageError
from dmdr_models.studio import Limits, Side, Studio
from PIL import Image
from same_picture import same_picture

Asked = list[tuple[list[Any], dict[str, Any]]]


class Reward:
    def score(self, images: torch.Tensor, prompts: list[Any]) -> torch.Tensor:
        if prompts == ["unreadable"]:
            raise ValueError("https://me:hidden@host cannot read this")
        if prompts == ["skipped"]:
            return torch.full((1,), torch.nan)
        return images.mean((1, 2, 3))


@pytest.fixture
def asked() -> Asked:
    return []


@pytest.fixture
def studio(asked: Asked) -> Studio:
    def side(name: str, value: float) -> Side:
        def draw(prompts: list[Any], **changed: Any) -> torch.Tensor:
            asked.append((prompts, changed))
            if prompts == ["unknown"]:
                raise ValueError("unknown is unknown")
            if prompts == ["large"]:
                raise torch.OutOfMemoryError
            return torch.full((1, 3, 8, 8), value)

        return Side(name, draw, 4, True)

    limits = Limits(steps=10, side=64, letters=20)
    return Studio([side("student", 0.25), side("teacher", 0.5)], "texts", limits, {"brightness": Reward()})


def test_an_answer_has_a_picture_and_a_line_for_each_model(studio: Studio, asked: Asked) -> None:
    (student, said), (teacher, beside) = studio.answer(" a dog ", 3, [1, 10], 32)
    assert asked == [
        (["a dog"], {"seed": 3, "steps": 1, "size": 32}),
        (["a dog"], {"seed": 3, "steps": 10, "size": 32}),
    ]
    assert (student.size, student.getpixel((0, 0)), teacher.getpixel((7, 7))) == ((8, 8), (64,) * 3, (128,) * 3)
    assert re.fullmatch(r"student · 1 step · \d+\.\d s · brightness 0\.250", said)
    assert re.fullmatch(r"teacher · 10 steps · \d+\.\d s · brightness 0\.500", beside)


def test_size_0_is_the_models_own(studio: Studio, asked: Asked) -> None:
    studio.answer("a dog", 0, [4, 4])
    assert [changed for _, changed in asked] == [{"seed": 0, "steps": 4}] * 2


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (("  ", 0, [4, 4]), "the prompt is empty: write what to draw"),
        (("x" * 21, 0, [4, 4]), "the prompt has 21 letters: give at most 20"),
        (("a dog", -1, [4, 4]), "seed -1 is not in [0, 2^63): give a smaller whole number"),
        (("a dog", 2**63, [4, 4]), "seed"),
        (("a dog", 1.5, [4, 4]), "seed 1.5"),
        (("a dog", 0, [4, 11]), "steps 11 is not in 1 to 10: give another number"),
        (("a dog", 0, [0, 4]), "steps 0 is not in 1 to 10"),
        (("a dog", 0, [True, 4]), "steps True"),
        (("a dog", 0, [4, 4], 65), "size 65 is not in 16 to 64: give another number, or 0"),
        (("a dog", 0, [4, 4], 8), "size 8 is not in 16 to 64"),
    ],
)
def test_beyond_the_limits_nothing_is_drawn(studio: Studio, asked: Asked, request_: Any, error: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(error)}"):
        studio.answer(*request_)
    assert asked == []


def test_what_a_model_refuses_is_named(studio: Studio) -> None:
    with pytest.raises(UsageError, match="student: unknown is unknown"):
        studio.answer("unknown", 0, [4, 4])
    with pytest.raises(UsageError, match="student: the memory is too small for this picture: give a smaller side"):
        studio.answer("large", 0, [4, 4])


def test_a_picture_without_a_score_is_shown(studio: Studio) -> None:
    lines = [line for _, line in studio.answer("unreadable", 0, [4, 4])]
    assert all(line.endswith(" · brightness: no score (https://***@host cannot read this)") for line in lines)
    assert all(line.endswith(" · brightness: no score") for _, line in studio.answer("skipped", 0, [4, 4]))


def options(*arguments: Any) -> Any:
    return serve._parser().parse_args([str(argument) for argument in arguments])


def test_it_draws_what_the_program_draws(model: Path, tmp_path: Path) -> None:
    """A student of class labels beside its teacher, loaded from folders."""
    student = shutil.copytree(model, tmp_path / "student")
    (student / "dmdr.json").write_text(json.dumps({"family": "sit", "steps": 2, "method": "sde", "shift": 3.0}))
    given = options("--model", student, "--family", "sit", "--teacher", model, "--teacher-steps", 3)
    studio = serve.open_studio(given)
    assert [(side.name, side.steps, side.sized) for side in studio.sides] == [
        ("student", 2, False),
        ("teacher", 3, False),
    ]
    (drawn, _), (beside, _) = studio.answer("3", 40, [2, 3])
    arguments = ["--family", "sit", "--classes", "3", "--per-class", "1", "--seed", "40"]
    generate.main(
        ["--model", str(student), *arguments, "-o", str(tmp_path / "a.png"), "--separate", str(tmp_path / "a")]
    )
    more = ["--steps", "3", "-o", str(tmp_path / "b.png"), "--separate", str(tmp_path / "b")]
    generate.main(["--model", str(model), *arguments, *more])
    for picture, name in ((drawn, "a"), (beside, "b")):
        with Image.open(tmp_path / name / "00000-3.png") as expected:
            assert same_picture(np.asarray(picture), np.asarray(expected))
    with pytest.raises(UsageError, match="is no class label: give a number"):
        studio.answer("a dog", 0, [2, 3])
    with pytest.raises(UsageError, match="student: "):
        studio.answer("99", 0, [2, 3])
    with pytest.raises(UsageError, match="pictures of one size"):
        studio.answer("3", 0, [2, 3], 64)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--most-side", "0"], "--most-side 0 is not at least 1"),
        (["--device", "nowhere"], "--device nowhere "),
        (["--reward", "nonsense"], "--reward nonsense: unknown reward 'nonsense'"),
        (["--reward", "class-label=nowhere"], "--reward class-label: "),
        (["--reward", "a@class-label=nowhere"], "--reward a: "),
        (["--reward", "class-label=x:2"], "--reward class-label has the weight 2, but no total is shown: leave it out"),
        (["--reward", "clip=x"], "--reward clip reads texts, but the model takes labels: give another reward"),
        (["--reward", "class-label=x", "--option", "preprocess=dmdr"], "--option: 'preprocess=dmdr' is not NAME.KEY"),
        (["--option", "clip.model=x"], "--option: clip is not among the rewards asked for: none"),
        (["--reward", "dinov2=x", "--option", "dinov2.colour=red"], "--reward dinov2: reward 'dinov2': .*colour"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    model: Path, arguments: list[str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmdr_models.drawing.own_sampler.OwnSampler.open", None)
    with pytest.raises(UsageError, match=f"^{error}"):
        serve.open_studio(options("--model", model, "--family", "sit", *arguments))


def test_a_teacher_that_is_not_there_is_named(model: Path) -> None:
    with pytest.raises(UsageError, match=r"^--teacher nowhere"):
        serve.open_studio(options("--model", model, "--family", "sit", "--teacher", "nowhere"))


def test_addresses_that_cannot_be_answered() -> None:
    with pytest.raises(UsageError, match="--port 0 is not in 1 to 65535: give another number"):
        serve.check_address("127.0.0.1", 0)
    with pytest.raises(UsageError, match=r"--host 192\.0\.2\.1 --port 7860: .*; give another port or address"):
        serve.check_address("192.0.2.1", 7860)  # an address for documents, which no machine has
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--host 127\.0\.0\.1 --port {port}: .*; give another port or address"):
            serve.check_address("127.0.0.1", port)
    serve.check_address("127.0.0.1", port)


def test_rewards_are_named_as_for_dmdr_score(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("dmdr_rewards.create", lambda *given, **more: asked.append((given, more)) or Reward())
    rewards = ["--reward", "old@class-label=a.bin", "--reward", "dinov2", "--option", "old.preprocess=dmdr"]
    given = options("--model", model, "--family", "sit", *rewards, "--option", "dinov2.count=3")
    studio = serve.open_studio(given)
    assert asked == [
        (("class-label", "a.bin", "cpu"), {"preprocess": "dmdr"}),
        (("dinov2", None, "cpu"), {"count": 3}),
    ]
    assert re.search(r" s · old 0\.\d{3} · dinov2 0\.\d{3}$", studio.answer("3", 0, [1])[0][1])


def test_without_gradio_it_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        generate.main(["serve", "--model", "nowhere"])
    assert end.value.code == 2
    assert capsys.readouterr().err == 'dmdr-generate serve: serve needs gradio: pip install "dmdr-models[serve]"\n'


def test_it_answers_this_machine_alone() -> None:
    assert options("--model", "x").host == "127.0.0.1"


def test_the_page_has_the_limits(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for Gradio that remembers what it was asked for; tests/browser has the real one."""
    made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Part:
        def __init__(self, name: str, given: tuple[Any, ...], more: dict[str, Any]) -> None:
            self.name, self.given, self.more = name, given, more

        def __enter__(self) -> "Part":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return part(name)

    def part(name: str) -> Any:
        return lambda *given, **more: made.append((name, given, more)) or Part(name, given, more)

    names = (
        "Blocks",
        "Markdown",
        "HTML",
        "Row",
        "Column",
        "Textbox",
        "Button",
        "Slider",
        "Number",
        "Image",
        "on",
        "skip",
    )
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(**{name: part(name) for name in names}))
    from dmdr_models import serve_page

    serve_page.launch(studio, "127.0.0.1", 7000)
    found = {name: (given, more) for name, given, more in made}
    assert found["queue"][1] == {"max_size": 8, "default_concurrency_limit": 1}
    assert found["launch"][1].items() >= {"server_name": "127.0.0.1", "server_port": 7000, "share": False}.items()
    assert [given for name, given, _ in made if name == "Slider"] == [(1, 10, 4), (1, 10, 4)]
    draw, ready = (given[0] for name, given, _ in made if name == "then")
    assert found["failure"][0][0] is ready
    assert (found["on"][0][1]().more, ready().more) == ({"interactive": False}, {"interactive": True})
    *shown, refused = draw(" a dog", 3.0, 0, 1.0, 2.0)
    assert [part.more["alt_text"] for part in shown[::2]] == [
        "Picture of the student: a dog",
        "Picture of the teacher: a dog",
    ]
    assert [type(part.given[0]) for part in shown[::2]] == [Image.Image, Image.Image]
    assert [line.split(" · ")[0] for line in shown[1::2]] == ["student", "teacher"]
    assert refused.more == {"visible": False}
    *kept, refused = draw("<b>", 0, 1000, 1, 2)
    assert [part.name for part in kept] == ["skip"] * 4
    assert refused.more == {"visible": True}
    assert ">size 1000 is not in 16 to 64: give another number, or 0<" in refused.given[0]
    assert "<b>" not in draw("<b>" * 9, 0, 0, 1, 2)[-1].given[0]
    assert "the prompt is empty" in draw(None, 0, 0, 1, 2)[-1].given[0]
