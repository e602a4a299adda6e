"""Mutation testing: change a module in one small place at a time, and check whether its tests notice.

    python tools/mutate.py packages/dmdr-models/src/dmdr_models/networks/lora.py --tests tests/models/test_lora.py
    python tools/mutate.py packages/dmdr-core/src/dmdr_core/*.py --sample 200 --tests tests/core -k "not mutate"

Each printed line is a mutant that the tests did not notice: its place, the original code and the changed code. Read
each line: either no test can distinguish the mutant from the original, or a test is missing. The table at the end
counts the mutants of each module.

A mutant has another comparison or operator, a number that is one more or less, a negated condition or constant, or
exchanged arguments; or it lacks a statement, a keyword argument, a slice, a decorator, the context of a `with`, the
condition of a comprehension, or a method call such as `detach`. Docstrings, annotations, assertions and the text of
errors are not changed.

For each mutant, a process is forked after the slow imports, with a changed copy of the package first on its path. A
mutant therefore costs only the time of its tests, and the files of the checkout do not change. The tests run in the
given order until one fails, so name the fastest first. The exit code is 1 if the tests fail on the unchanged module, or
pass on an empty one.

Why not a library: mutmut leaves out functions with a decorator, and thus everything under `no_grad`, and needs a layout
of its own; cosmic-ray removes neither statements nor `detach`, and imports torch again for every mutant.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import forking

IMPORTED = ("torch", "hypothesis.core", "deepspeed", "diffusers", "peft", "pydantic", "pytest", "transformers")
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
READ_BY_PEOPLE = ("annotation", "returns")


@dataclass(frozen=True)
class Mutant:
    """The changed source of a module: `before` became `after`, at a line of the original."""

    path: Path
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before} -> {self.after}"


def mutants(path: Path) -> list[Mutant]:
    """Return every mutant of a file in the order of its syntax tree, without duplicates."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {name.asname or name.name.split(".")[0] for node in imports for name in node.names}
    found: dict[str, Mutant] = {}
    for holder, key, line in _places(tree, 1):
        node = holder[key]
        for other in _others(node, imported):
            holder[key] = other
            source = ast.unparse(ast.fix_missing_locations(tree))
            found.setdefault(source, Mutant(path, line, _shown(node), _shown(other), source))
        holder[key] = node
    found.pop(ast.unparse(tree), None)
    return list(found.values())


def survives(mutant: Mutant, tests: Sequence[str], timeout: float = float("inf")) -> bool:
    """Return whether the tests pass on the mutant; tests that take longer than `timeout` seconds count as failed."""
    package = mutant.path.absolute().parent
    while (package.parent / "__init__.py").exists():
        package = package.parent
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder, package.name)  # a new folder for each mutant, so that no bytecode of another is used
        shutil.copytree(package, changed, ignore=shutil.ignore_patterns("__pycache__"))
        (changed / mutant.path.absolute().relative_to(package)).write_text(mutant.source, encoding="utf-8")
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        program = ["-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
        log = Path(folder, "log")
        process = forking.start(program, Path.cwd(), {**os.environ, "PYTHONPATH": path}, log, log)
        return forking.wait([process], timeout) == [0]


def _places(node: ast.AST, line: int) -> Iterator[tuple[Any, Any, int]]:
    """Yield the places that may be changed: a list or the fields of a node, the key in it, and the line."""
    line = getattr(node, "lineno", line)
    for field, value in ast.iter_fields(node):
        if field in READ_BY_PEOPLE:
            continue
        holder: Any = value if isinstance(value, list) else vars(node)
        for key in range(len(value)) if isinstance(value, list) else [field]:
            child = holder[key]
            if not isinstance(child, ast.AST) or isinstance(child, ast.Assert | ast.JoinedStr) or _is_text(child):
                continue
            yield holder, key, getattr(child, "lineno", line)
            if not isinstance(child, ast.Raise):
                yield from _places(child, line)


def _others(node: ast.AST, imported: set[str]) -> Iterator[ast.AST]:
    """Yield the replacements of a node."""
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for kind in COMPARISONS[type(op)]:
                    yield _but(node, ops=[*ops[:i], kind(), *ops[i + 1 :]])
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            yield _but(node, op=OPERATORS[type(op)]())
        case ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield _but(node, op=OPERATORS[type(op)]())
            yield ast.Pass()
        case ast.BoolOp(op=op):
            yield _but(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Constant(value=str(value)):
            yield ast.Constant(f"{value}x")
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.UnaryOp):
            yield _but(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[_, *_]):
            yield _but(node, ifs=[])
        case ast.With(body=body):
            yield ast.If(ast.Constant(True), body, [])
        case ast.FunctionDef(decorator_list=decorators) | ast.ClassDef(decorator_list=decorators):
            for i in range(len(decorators)):
                yield _but(node, decorator_list=[*decorators[:i], *decorators[i + 1 :]])
        case ast.Return(value=ast.expr()):
            yield ast.Return()
        case ast.Assign() | ast.Expr() | ast.Raise():
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.Subscript(value=value, slice=ast.Slice()):
            yield value
        case ast.Call(func=func, args=args, keywords=keywords):
            for i in range(len(args) - 1):
                yield _but(node, args=[*args[:i], args[i + 1], args[i], *args[i + 2 :]])
            for i in range(len(keywords)):
                yield _but(node, keywords=[*keywords[:i], *keywords[i + 1 :]])
            if isinstance(func, ast.Attribute) and getattr(func.value, "id", "") not in imported:
                yield func.value


def _but(node: ast.AST, **fields: Any) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _is_text(node: ast.AST) -> bool:
    """Return whether a node is a statement that consists of a string, such as a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _shown(node: ast.AST, most: int = 90) -> str:
    text = ast.unparse(node).partition("\n")[0].strip()
    return text if len(text) <= most else f"{text[: most - 1]}…"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="modules to change")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, required=True, help="pytest's arguments; must come last")
    parser.add_argument("--sample", type=int, help="number of mutants to try, drawn at random, instead of all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument(
        "--preload", nargs="+", default=IMPORTED, help="modules to import once; none of the changed ones"
    )
    given = parser.parse_args(arguments)
    forking.preload(given.preload)

    slowest = 0.0
    for path in given.files:
        begun = time.monotonic()
        if not survives(Mutant(path, 0, "", "", path.read_text(encoding="utf-8")), given.tests):
            sys.exit(f"error: the tests do not pass on the unchanged {path}")
        slowest = max(slowest, time.monotonic() - begun)
        if survives(Mutant(path, 0, "", "", ""), given.tests):
            sys.exit(f"error: the tests pass on an empty {path}; name the tests of this module")
    found = [mutant for path in given.files for mutant in mutants(path)]
    if given.sample is not None and given.sample < len(found):
        chosen = set(random.Random(given.seed).sample(range(len(found)), given.sample))
        found = [mutant for i, mutant in enumerate(found) if i in chosen]
    tried, survived = Counter(mutant.path for mutant in found), Counter[Path]()
    for mutant in found:
        if survives(mutant, given.tests, timeout=10 + 5 * slowest):
            survived[mutant.path] += 1
            print(mutant, flush=True)
    print(f"\n{'mutants':>8} {'killed':>8} {'survived':>8}  module")
    for path, count in [*tried.items(), ("all", len(found))]:
        lived = survived[path] if isinstance(path, Path) else survived.total()
        print(f"{count:8} {count - lived:8} {lived:8}  {path}")


if __name__ == "__main__":
    main()
