"""The study's page and the README tell the kept results, which are those of the kept cells."""

import json
from pathlib import Path

import pytest

from bmaml_ppl.experiments.sinusoid.page import fill_page
from bmaml_ppl.experiments.sinusoid.recipes import RECIPES

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "experiments" / "sinusoid"


@pytest.mark.parametrize("page", ["README.md", "docs/sinusoid.md"])
def test_pages_show_the_kept_results(page: str) -> None:
    text = (ROOT / page).read_text()
    results = json.loads((KEPT / "results.json").read_text())
    assert "<!-- headline -->" in text
    assert fill_page(text, results) == text


def test_kept_cells_are_of_the_recipes_as_they_stand() -> None:
    cells = [json.loads(path.read_text()) for path in sorted((KEPT / "cells").glob("*.json"))]
    assert cells
    for cell in cells:
        asked = cell["asked"]
        described = RECIPES[asked["recipe"]].describe(asked["shots"])
        assert {name: asked[name] for name in described} == described, asked["recipe"]


def test_kept_scores_pass_the_published_ones() -> None:
    results = json.loads((KEPT / "results.json").read_text())["methods"]
    mse = {
        (cell["asked"]["recipe"], cell["asked"]["shots"]): cell["scores"]["mse"] for cell in results if cell["scores"]
    }
    bounds = {
        "bmaml_last": (2.042, 1.371, 0.844),
        "linear_mixture": (0.867, 0.061, 0.005),
        "program": (3 * 0.0086, 3 * 0.00037, 3 * 0.00012),
    }
    for recipe, values in bounds.items():
        for shots, bound in zip((5, 10, 20), values, strict=True):
            assert mse[recipe, shots] < bound, (recipe, shots)


def test_a_page_without_marks_or_results_stays_as_it_is() -> None:
    assert fill_page("nothing here", {"methods": []}) == "nothing here"
    page = "<!-- methods -->\nold\n<!-- end of methods -->"
    assert fill_page(page, {}) == page
