"""A secret stays in the environment: it enters no recipe, run folder, model card, table or log."""

import ast
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import dmdr_models.base.secrets
import dmdr_rewards.base.secrets
import pytest
import yaml
from dmdr_models import generate
from dmdr_rewards.base.secrets import redacted, secret_in
from dmdr_rewards.cli import main as dmdr_score
from dmdr_train.base.errors import UserError
from dmdr_train.cli import main as dmdr_train
from dmdr_train.recipe.load import load_recipe
from PIL import Image

CANARY = "canary-qwertzuiop"
VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "JUDGE_KEY", "SOME_SECRET", "DB_PASSWORD")


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"api_key": "x"}, "api_key"),
        ({"options": [{"a": 1}, {"openai_api_key": "x"}]}, "options.1.openai_api_key"),
        ({"Authorization": "Bearer x"}, "Authorization"),
        ({"token": "x"}, "token"),
        ({"hf_token": "x"}, "hf_token"),
        ({"client_secret": "x"}, "client_secret"),
        ({"db-password": "x"}, "db-password"),
        ({"url": "https://me:pass@host/v1"}, "url"),
        ({"url": "https://token@host/v1"}, "url"),
        ({"url": "https://host/v1?a=1&api_key=x"}, "url"),
        ({"url": "https://host/v1?key=x"}, "url"),
        ({"url": "https://host/v1?subscription-key=x"}, "url"),
        ({"url": "https://host/v1?a=1&sig=x"}, "url"),
        ({"url": "https://host/v1?X-Amz-Signature=x"}, "url"),
        ({"api_key_env": "JUDGE_KEY"}, None),
        ({"max_tokens": 8, "tokenizer": "vocab.txt", "key": "a", "tokens": "b", "api_key": None}, None),
        ({"url": "http://localhost:8000/v1", "prompt": "a sign: me@home"}, None),
    ],
)
def test_what_looks_like_a_secret(tree: Any, key: str | None) -> None:
    assert secret_in(tree) == key


def test_values_of_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"cannot log in with {CANARY} at https://me:{CANARY}@host/x?token={CANARY}&a=1"
    assert redacted(text) == f"cannot log in with {CANARY} at https://***@host/x?***&a=1"
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    assert redacted(text) == "cannot log in with *** at https://***@host/x?***&a=1"
    assert secret_in({"a": ["b", f"x{CANARY}"]}) == "a.1"
    monkeypatch.setenv("SHORT_TOKEN", "in")
    assert redacted("in it") == "in it"


@pytest.mark.parametrize("redacted", [dmdr_models.base.secrets.redacted, dmdr_rewards.base.secrets.redacted])
@pytest.mark.parametrize(
    "name",
    [
        *("sig", "signature", "key", "subscription-key", "token", "HF-Token", "db_password", "authorization"),
        *("X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "X-Goog-Signature", "X-Goog-Credential"),
    ],
)
def test_what_signs_an_address_is_redacted(redacted: Callable[[str], str], name: str) -> None:
    address = f"https://host/x?{name}=a%2Bb&size=8;{name}=c#{name}=d"
    assert redacted(address) == f"https://host/x?***&size=8;***#{name}=d"


@pytest.mark.parametrize("redacted", [dmdr_models.base.secrets.redacted, dmdr_rewards.base.secrets.redacted])
def test_other_words_of_an_address_stay(redacted: Callable[[str], str]) -> None:
    address = "https://host/sig=a/x?monkey=1&sigma=2&tokens=3&design=4&keyword=5#key=6"
    assert redacted(address) == address


def test_both_packages_redact_word_for_word() -> None:
    """Both packages contain the redaction, since neither may import the other."""

    def sources(module: ModuleType) -> list[str]:
        source = inspect.getsource(module)
        nodes = [node for node in ast.parse(source).body if not isinstance(node, ast.Import | ast.ImportFrom)]
        return [ast.get_source_segment(source, node) or "" for node in nodes[1:]]  # without the docstring

    shared = sources(dmdr_models.base.secrets)
    assert [node for node in sources(dmdr_rewards.base.secrets) if node in shared] == shared
    assert any(node.startswith("def redacted") for node in shared)


@pytest.mark.parametrize(
    "override",
    [
        f"objectives.1.reward.options={{api_key: {CANARY}}}",
        f"objectives.1.reward.options={{url: 'https://me:{CANARY}@host'}}",
        f"model.path=https://me:{CANARY}@host/model",
        f"tracking.wandb_api_key={CANARY}",
    ],
)
def test_a_recipe_with_a_secret_is_refused_unseen(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        dmdr_train(["run", "--config", "demo", override])
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {override.split('=')[0]}")
    assert "holds what looks like a secret" in line
    assert CANARY not in line
    assert not list(tmp_path.iterdir())


def test_a_secret_that_the_shell_has_put_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with pytest.raises(UserError, match=r"^tracking\.wandb: holds what looks like a secret"):
        load_recipe("demo", [f"tracking.wandb=project-{CANARY}"])


def test_an_error_line_shows_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    for program, arguments in (
        (dmdr_train, ["run", "--config", f"{CANARY}-HF_TOKEN"]),
        (dmdr_train, ["run", "--config", "demo", f"{CANARY}-JUDGE_KEY"]),
        (dmdr_train, ["run", "--config", "demo", f"--api-key={CANARY}-WANDB_API_KEY"]),
        (dmdr_score, [f"{CANARY}-OPENAI_API_KEY", "--reward", "clip", "-o", "a.csv"]),
        (dmdr_score, ["x", "--reward", "clip", "-o", "a.csv", "--device", "cpu", f"--key={CANARY}-SOME_SECRET"]),
        (dmdr_score, ["x", "--reward", "clip", "--option", f"clip.password={CANARY}", "-o", "a.csv"]),
        (dmdr_score, ["x", "--reward", f"clip=https://me:{CANARY}@host/x", "-o", "a.csv"]),
        (generate.main, ["--model", f"https://me:{CANARY}@hub/x", "-o", "a.png"]),
        (generate.main, ["--model", "x", "-o", f"{CANARY}-HF_TOKEN"]),
        (generate.main, ["--model", "x", "--steps", f"{CANARY}-DB_PASSWORD", "-o", "a.png"]),
    ):
        with pytest.raises(SystemExit) as end:
            program(arguments)
        assert end.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith(("error: ", "dmdr-generate: "))
        assert CANARY not in line, line


@pytest.mark.parametrize(
    ("program", "arguments", "broken"),
    [
        (dmdr_train, ["run", "--config", "demo"], "dmdr_train.recipe.load.load_recipe"),
        (dmdr_score, ["list"], "dmdr_rewards.interface.registry.available"),
        (generate.main, ["--model", "sit", "-o", "a.png"], "dmdr_models.generate._run"),
    ],
)
def test_a_traceback_shows_no_secret(
    program: Any, arguments: list[str], broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError(f"https://hub/?token={CANARY}", os.environ["HF_TOKEN"])

    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(broken, fail)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(KeyError) as caught:
        program(arguments)
    sys.excepthook(caught.type, caught.value, caught.tb)
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert "KeyError: ('https://hub/?***" in shown
    assert CANARY not in shown, shown


# -- whole runs


RECIPE: dict[str, Any] = {
    "model": {"family": "sit", "path": "sit", "fake_score_lora": {"rank": 2, "alpha": 2}},
    "objectives": [
        {"kind": "distribution_matching"},
        {"kind": "refl", "weight": 0.1, "reward": {"name": "class-label", "checkpoint": "classifier"}},
    ],
    "guidance": {"ratio": 1},
    "optim": {"batch_size": 2, "generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
    "run": {"output": "out", "steps": 1, "device": "cpu"},
    "tracking": {"log_every": 1, "wandb": "project", "samples": {"count": 2}},
}
WANDB = """
import json
def init(**options):
    with open(options["dir"] + "/wandb.json", "w") as file:
        json.dump(options, file)
    return __import__(__name__)
def log(*_, **__): pass
def finish(): pass
def Image(image): return image
"""


def holding(folder: Path, text: str) -> list[str]:
    """Return the files under a folder whose name or content contains a text."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in found if text in str(path) or text.encode() in path.read_bytes()]


def test_a_run_and_its_export_hold_no_secret(models: Callable[[str], Path], python: Any, tmp_path: Path) -> None:
    """Run with the keys of every tracker and hub in the environment, and with a tracker that records its arguments."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/wandb.py").write_text(WANDB)
    (work := tmp_path / "work").mkdir()
    for name in ("sit", "classifier"):
        (work / name).symlink_to(models(name))
    (work / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    variables = dict.fromkeys(VARIABLES, CANARY) | {"PYTHONPATH": str(tmp_path / "lib")}
    for command in ("run --config recipe.yaml", "export out -o exported", "report out"):
        done = python("-m", "dmdr_train", *command.split(), folder=work, **variables).check()
        assert CANARY not in done.stdout + done.stderr
    assert "project" in json.loads((work / "out/wandb.json").read_text())["project"]
    assert (work / "exported/README.md").is_file()
    assert holding(work, "project"), "the search must find what is there"
    assert holding(work, CANARY) == []


class Tattler(BaseHTTPRequestHandler):
    """An endpoint that repeats the received key in its errors and in its answers."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"]
        answer = json.dumps({"choices": [{"message": {"content": f"your key is {key}"}}]})
        status, text = self.server.replies.pop(0) or (200, answer)  # type: ignore[attr-defined]
        body = text.replace("KEY", key).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def tattler() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Tattler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_scores_and_pages_hold_no_secret(
    tattler: Any, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    (tmp_path / "pictures").mkdir()
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"pictures/{name}.png")
    seven = (200, json.dumps({"choices": [{"message": {"content": "7"}}]}))
    together = [seven, None, (400, "no, KEY")]  # a reward that stops then scores one picture after the other
    tattler.replies = together if choice == "skip" else [*together, *together]
    options = [f"url=http://127.0.0.1:{tattler.server_port}", "api_key_env=JUDGE_KEY", "concurrency=1"]
    given = [part for each in [*options, f"on_failure={choice}"] for part in ("--option", f"vlm-judge.{each}")]
    command = ["pictures", "--prompt", "a", "--reward", "vlm-judge=some-vlm", *given]
    dmdr_score([*command, "-o", "s.jsonl", "--html", "s.html", "--device", "cpu", "--workers", "0"])
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["vlm-judge"] for row in rows] == [7.0, None, None]
    assert CANARY not in shown.out + shown.err
    assert holding(tmp_path, "some-vlm")
    assert holding(tmp_path, CANARY) == []
    if choice == "stop":
        assert "your key is Bearer ***" in rows[1]["error"]
        assert "400 Bad Request, no, Bearer ***" in rows[2]["error"]
