"""The mutation tool, on a module with one function, whose tests cover half of it."""

import ast
import subprocess
import sys
from pathlib import Path

import mutate
import pytest

ROOT = Path(__file__).parents[2]
MODULE = '''"""Nobody changes this."""


def positive(x: int) -> bool:
    """Nor this."""
    assert isinstance(x, int), "nor this"
    return x > 0
'''
TESTS = """
from toy.signs import positive


def test_positive() -> None:
    assert positive(1)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in a package, and its tests in the working directory."""
    (module := tmp_path / "src/toy/signs.py").parent.mkdir(parents=True)
    module.with_name("__init__.py").touch()
    module.write_text(MODULE)
    (tmp_path / "test_toy.py").write_text(TESTS)
    monkeypatch.chdir(tmp_path)
    return module


def test_the_mutants_of_a_module(toy: Path) -> None:
    found = mutate.mutants(toy)
    assert [(mutant.line, mutant.before, mutant.after) for mutant in found] == [
        (7, "return x > 0", "return"),
        (7, "x > 0", "x >= 0"),
        (7, "x > 0", "x <= 0"),
        (7, "0", "1"),
        (7, "0", "-1"),
    ]
    assert len({mutant.source for mutant in found}) == len(found)


def test_those_that_the_tests_let_pass_are_shown(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    command = [sys.executable, f"{ROOT}/tools/mutate.py", "src/toy/signs.py", "--preload", "pytest", "xdist.plugin"]
    done = subprocess.run([*command, "--tests", "-p", "xdist.plugin", "test_toy.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown, table = done.stdout.split("\n\n")
    assert shown.splitlines() == ["src/toy/signs.py:7: x > 0 -> x >= 0", "src/toy/signs.py:7: 0 -> -1"]
    assert table.split()[-8:] == ["5", "3", "2", "src/toy/signs.py", "5", "3", "2", "all"]
    assert toy.read_text() == MODULE


@pytest.mark.parametrize(
    ("passes", "said"), [(False, "do not pass on the unchanged src/toy/signs.py"), (True, "pass on an empty")]
)
def test_tests_that_cannot_tell_are_refused(
    toy: Path, passes: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forking.preload", lambda modules: None)
    monkeypatch.setattr(mutate, "survives", lambda *_: passes)
    with pytest.raises(SystemExit, match=said):
        mutate.main(["src/toy/signs.py", "--tests", "test_toy.py"])


def test_a_sample_is_drawn_by_its_seed(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("forking.preload", lambda modules: None)
    monkeypatch.setattr(mutate, "survives", lambda mutant, *_, **__: mutant.source != "")

    def sampled(seed: int) -> str:
        mutate.main(["src/toy/signs.py", "--sample", "2", "--seed", f"{seed}", "--tests", "test_toy.py"])
        return capsys.readouterr().out

    shown = [sampled(seed) for seed in range(8)]
    assert [sampled(seed) for seed in range(8)] == shown
    assert len(set(shown)) > 2
    assert all(each.count(" -> ") == 2 for each in shown)


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("a < b <= c", {"a <= b <= c", "a >= b <= c", "a < b < c", "a < b > c", "pass"}),
        ("if not a:\n    f()", {"if a:\n    f()", "if not a:\n    pass"}),
        ("while a and b:\n    break", {"while not (a and b):\n    break", "while a or b:\n    break",
                                       "while a and b:\n    continue"}),
        ("x = a.detach()[:n]", {"pass", "x = a.detach()", "x = a[:n]"}),
        ("import torch\ntorch.f(a, b, c=d)", {"import torch\npass", "import torch\ntorch.f(b, a, c=d)",
                                              "import torch\ntorch.f(a, b)"}),
        ("with torch.no_grad():\n    f()", {"if True:\n    f()", "with torch:\n    f()",
                                            "with torch.no_grad():\n    pass"}),
        ("@no_grad()\n@cached\ndef f(): return", {"@cached\ndef f(): return", "@no_grad()\ndef f(): return"}),
        ("x += [y for y in z if y]", {"x -= [y for y in z if y]", "pass", "x += [y for y in z]"}),
        ("raise Error(f'{a} is bad', 2)", {"pass"}),
        ("x = True, 'a'", {"pass", "x = (False, 'a')", "x = (True, 'ax')"}),
    ],
)  # fmt: skip
def test_every_kind_of_change(tmp_path: Path, source: str, change: set[str]) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert {mutant.source for mutant in mutate.mutants(path)} == {ast.unparse(ast.parse(each)) for each in change}
