"""Our source never calls functions that could run a user's file as code. The test reads the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("packages", "tools") for path in (ROOT / folder).rglob("*.py"))

# Never called, whatever the arguments. Names are compared as written, so `import yaml as y` would not be found.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "cloudpickle.load",
    "joblib.load", "marshal.loads", "shelve.open", "torch.hub.load", "torch.jit.load",
    "shutil.unpack_archive", "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip
# Ends of the names of calls that are never made: they write wherever an archive's names point.
UNPACKING = (".extractall", ".extract")
# Called with these arguments only.
REQUIRED = {"torch.load": ("weights_only", True)}
# Arguments that are never used.
REFUSED = {("shell", True), ("allow_pickle", True), ("trust_remote_code", True), ("weights_only", False)}


def faults(tree: ast.AST, loads_models: bool = True) -> Iterator[str]:
    """Return the mistakes with their lines. Tools may load models that they have made; packages load anyone's."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {each.arg: each.value for each in node.keywords}
        if name in FORBIDDEN or name.endswith(UNPACKING):
            yield f"{node.lineno}: {name}"
        if name in REQUIRED:
            argument, value = REQUIRED[name]
            if not _is(given.get(argument), value):
                yield f"{node.lineno}: {name} without {argument}={value}"
        loads = loads_models and name.endswith(".from_pretrained") and not _reads_no_weights(node)
        if loads and not _is(given.get("use_safetensors"), True):
            yield f"{node.lineno}: {name} without use_safetensors=True"
        for argument, value in REFUSED:
            if argument in given and not _is(given[argument], not value):
                yield f"{node.lineno}: {argument}={ast.unparse(given[argument])}"


def _reads_no_weights(call: ast.Call) -> bool:
    """`from_pretrained` may load processors, configs, checked adapters, and models whose weights are given."""
    name = ast.unparse(call.func).lower()
    handed_over = bool(call.args) and isinstance(call.args[0], ast.Constant) and call.args[0].value is None
    kinds = ("tokenizer", "imageprocessor", "config", "peftmodel", "embedding")
    return handed_over or any(kind in name for kind in kinds)


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_runs_no_file_of_others(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(faults(tree, loads_models="packages" in path.parts)) == []


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
        "archive.extractall(folder)",
        "archive.extract(member)",
        "model.from_pretrained(path)",
    ],
)
def test_the_scan_sees(source: str) -> None:
    assert list(faults(ast.parse(source)))


def test_there_are_sources() -> None:
    assert len(SOURCES) > 80
