"""The law of the house (CONTRIBUTING.md), enforced by reading the source."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "bmaml_ppl").rglob("*.py"))
SOURCES = PACKAGE + [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

MAX_FUNCTION, USUAL_FUNCTION, MAX_FILE, MAX_CONTRIBUTING = 50, 30, 400, 85
PICKLES = {"cloudpickle", "dill", "joblib", "pickle", "shelve", "torch.load", "torch.save"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _functions(path: Path) -> list[Function]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _count_code_lines(function: Function, lines: list[str]) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    code = lines[body[0].lineno - 1 : function.end_lineno]
    return sum(1 for line in code if line.strip() and not line.strip().startswith("#"))


def _lengths(path: Path) -> dict[str, int]:
    lines = path.read_text().splitlines()
    return {f"{_name(path)}:{f.lineno} {f.name}": _count_code_lines(f, lines) for f in _functions(path)}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _uses(path: Path) -> set[str]:
    dotted = (ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
    return set(_imports(path)) | set(dotted)


def _missing_annotations(function: Function) -> list[str]:
    arguments = function.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    missing = [a.arg for a in every if a is not None and a.annotation is None and a.arg not in {"self", "cls"}]
    return missing + ([] if function.returns is not None else ["return"])


def _users(package: str, paths: list[Path]) -> set[str]:
    return {_name(p) for p in paths if any(name.split(".")[0] == package for name in _imports(p))}


def test_no_function_is_over_budget() -> None:
    lengths = {name: length for path in PACKAGE for name, length in _lengths(path).items()}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION} == {}
    if len(lengths) > 1:
        assert statistics.quantiles(lengths.values(), n=20)[-1] <= USUAL_FUNCTION


def test_no_file_is_over_budget() -> None:
    lengths = {_name(path): len(path.read_text().splitlines()) for path in PACKAGE}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE} == {}


def test_every_function_is_annotated() -> None:
    found = {f"{_name(p)}:{f.lineno} {f.name}": _missing_annotations(f) for p in SOURCES for f in _functions(p)}
    assert {name: missing for name, missing in found.items() if missing} == {}


def test_one_module_imports_arviz() -> None:
    assert _users("arviz", PACKAGE) <= {"bmaml_ppl/diagnostics/export.py"}


def test_matplotlib_stays_in_plots_demos_and_experiments() -> None:
    allowed = ("demo", "/experiments/", "/plots/")
    outside = {name for name in _users("matplotlib", PACKAGE) if not any(part in name for part in allowed)}
    assert outside == set()


@pytest.mark.parametrize("link", ["models", "inference"])
def test_nothing_imports_through_the_links(link: str) -> None:
    assert (ROOT / link).is_symlink()
    assert (ROOT / link).readlink() == Path("bmaml_ppl") / link
    assert _users(link, SOURCES) == set()


def test_nothing_is_pickled() -> None:
    found = {_name(path): _uses(path) & PICKLES for path in SOURCES}
    assert {name: uses for name, uses in found.items() if uses} == {}
    assert {_name(path) for path in SOURCES if "allow_pickle=" + "True" in path.read_text()} == set()


def test_every_notebook_is_tested() -> None:
    listed = ROOT / "tests" / "test_notebooks.py"
    text = listed.read_text() if listed.exists() else ""
    assert [path.name for path in NOTEBOOKS if path.name not in text and path.stem not in text] == []


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < MAX_CONTRIBUTING
