"""No source of ours calls what could run a user's file as code. Read from the syntax trees, not from the text."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("packages", "tools") for path in (ROOT / folder).rglob("*.py"))

# Never called, whatever the arguments. Names are as written, behind the last import: `import yaml as y` is not ours.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "cloudpickle.load",
    "joblib.load", "marshal.loads", "shelve.open", "torch.hub.load", "torch.jit.load", "tarfile.open",
    "shutil.unpack_archive", "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip
# Called with these arguments only.
REQUIRED = {"torch.load": ("weights_only", True)}
# Arguments that nothing is ever called with.
REFUSED = {("shell", True), ("allow_pickle", True), ("trust_remote_code", True), ("weights_only", False)}


def faults(tree: ast.AST) -> Iterator[str]:
    """What is wrong, with its line."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {each.arg: each.value for each in node.keywords}
        if name in FORBIDDEN:
            yield f"{node.lineno}: {name}"
        if name in REQUIRED:
            argument, value = REQUIRED[name]
            if not _is(given.get(argument), value):
                yield f"{node.lineno}: {name} without {argument}={value}"
        for argument, value in REFUSED:
            if argument in given and not _is(given[argument], not value):
                yield f"{node.lineno}: {argument}={ast.unparse(given[argument])}"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_runs_no_file_of_others(path: Path) -> None:
    assert list(faults(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=choice)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "x = pickle.loads(data)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=choice)",
        "subprocess.run(command, shell=True)",
        "model.from_pretrained(path, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_the_scan_sees(source: str) -> None:
    assert list(faults(ast.parse(source)))


def test_there_are_sources() -> None:
    assert len(SOURCES) > 80
