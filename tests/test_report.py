"""The report of a run: what it says is true, what it shows is escaped, and a browser opens it without a network."""

import html.parser
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from bmaml_ppl.cli import app
from bmaml_ppl.diagnostics import scores
from bmaml_ppl.report import write_report
from bmaml_ppl.report.assess import Column, assess, score_column, score_tasks
from bmaml_ppl.report.page import Html, bullets, code, number, paragraph, table
from bmaml_ppl.report.predictions import judge_calibration, measure_coverage
from bmaml_ppl.report.run import read_run
from bmaml_ppl.runs import read_csv, read_tasks

MODEL = '''
import pyro
import pyro.distributions as dist
import torch


def line(time, weight=None):
    """A line <script>alert("of one's own")</script> & noise."""
    mean = pyro.param("mean", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
    coef = pyro.sample("coef", dist.Normal(mean, scale).to_event(1))
    with pyro.plate("data", time.shape[0]):
        pyro.sample("obs", dist.Normal(coef[0] + coef[1] * time, 0.3), obs=weight)


def plane(x, size, both=None, sick=None):
    mean = pyro.param("mean", torch.zeros(2))
    level = pyro.sample("level", dist.Normal(mean, 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        shift = (x.sum(-1) + size).unsqueeze(-1)
        pyro.sample("obs", dist.Normal(level + shift, 0.5).to_event(1), obs=both)
        pyro.sample("ill", dist.Bernoulli(logits=level[0].expand(x.shape[0])), obs=sick)
'''
NAMES = ["<b>a</b>", "$b$ & $c$", "pig 2", "pig 3", "pig 4", "pig 5", "pig 6", "pig 7", "pig 8"]
FIT = ["fit", "model.py:line", "--data", "pigs.csv", "--task", "Pig", "--input", "time=Time", "--num-support", "2"]
SMALL = ["--num-steps", "3", "--batch-size", "3", "--set", "num_particles=5", "--set", "num_steps=2"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]


def _pigs(names: list[str], seed: int = 0) -> pandas.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [(name, t, 20 + 5 * t + rng.normal()) for i, name in enumerate(names) for t in range(6 - i % 2)]
    return pandas.DataFrame(rows, columns=["Pig", "Time", "Weight"])


def _invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a run in `run`."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "model.py").write_text(MODEL)
    _pigs(NAMES).to_csv(folder / "pigs.csv", index=False)
    _pigs(["new 0", "new 1", "new 2", "pig 2"], seed=1).iloc[1:].to_csv(folder / "other.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = _invoke(*FIT, "--output", "weight=Weight", "--out", "run", *SMALL)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    """The report of the run on its own tasks."""
    return write_report(folder / "run", num_samples=200).read_text()


class _Reader(html.parser.HTMLParser):
    """Collects tags, text by tag, and whether tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text.setdefault(tag, []).append(data)


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def _words(page: str) -> str:
    return " ".join(" ".join(_read(page).text["body"]).split())


def test_page_tells_what_was_learned_and_how(page: str) -> None:
    words = _words(page)
    for told in (
        "What line learned from pigs.csv",
        "a prior that the tasks of pigs.csv (column Pig) share, to predict Weight from Time, by svgd in 3 meta-steps",
        "on 9 tasks, seeing the first 2 observations of each",
        "These tasks also trained the prior",
        "svgd, 5 particles",
        "num_particles=5, num_steps=2",
        "standard deviations (",
        "coef[0]",
        "3 meta-steps",
        "bmaml-ppl fit --config",
        "What cannot be concluded",
        "9 tasks are few",
    ):
        assert told in words


def test_page_is_well_formed_and_accessible(page: str) -> None:
    reader = _read(page)
    tags = [tag for tag, _ in reader.tags]
    assert ("html", {"lang": "en"}) in reader.tags
    assert reader.text["title"] == ["What line learned from pigs.csv"]
    headings = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(headings, headings[1:], strict=False))
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) >= 7
    assert all(len(image["alt"] or "") > 30 for image in images)
    assert tags.count("caption") == tags.count("table")
    assert all("scope" in attributes for tag, attributes in reader.tags if tag == "th")
    names = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(names) == len(set(names))
    links = [(attributes["href"] or "")[1:] for tag, attributes in reader.tags if tag == "a"]
    assert links == names


def test_page_asks_nothing_of_a_network(page: str) -> None:
    reader = _read(page)
    sources = [
        value or "" for _, attributes in reader.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "url(" not in page
    assert "@import" not in page
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in reader.tags
    assert not {"script", "iframe", "object", "form", "b"} & {tag for tag, _ in reader.tags}


def test_names_and_source_are_shown_as_they_are_written(page: str) -> None:
    words = _words(page)
    assert '<script>alert("of one\'s own")</script> & noise' in words
    assert "<b>a</b>" in words
    assert "$b$ & $c$" in words
    assert page.count("<script") == 0


def test_scores_on_the_page_are_those_of_the_predictions(folder: Path, page: str) -> None:
    run = read_run(folder / "run")
    tasks = read_tasks(read_csv(run.settings.data), run.settings)
    posterior = run.prior.adapt(tasks.split_observations(2).support)
    query = tasks.split_observations(2).query
    draws = posterior.predict(query, num_samples=200)["obs"]
    assert query.mask is not None
    error = (draws.mean(0) - query.data["weight"])[query.mask].square().mean().sqrt().item()
    words = _words(page)
    assert f"Weight: RMSE {number(error)} after adapting" in words
    log_density = scores.mixture_log_density(posterior.log_likelihood(query, num_samples=200)["obs"])[query.mask]
    assert f"negative log density of an observation, nats {number(-log_density.mean().item())}" in words
    assert f"{int(query.mask.sum())} values of 9 tasks" in words


def test_other_tasks_are_named_so_and_too_short_ones_left_out(folder: Path) -> None:
    given = str(folder / "other.csv")
    words = _words(write_report(folder / "run", data=given, out=folder / "o.html", num_samples=100).read_text())
    assert "on 4 tasks" in words
    assert "1 of these tasks have the names of tasks that trained the prior (pig 2)" in words
    longer = write_report(
        folder / "run", data=given, num_support=5, rows="random", out=folder / "o.html", num_samples=100
    )
    words = _words(longer.read_text())
    assert "seeing 5 random observations" in words
    assert "have no more than 5 observations and were left out: new 0, new 1, pig 2" in words
    assert "adapted to 5 observations here; the prior was learned for 2" in words
    assert "--num-support 5 --rows random" in words
    assert "1 tasks are too few to judge the calibration" in words


def test_tasks_of_other_names_are_taken_for_new_ones(folder: Path) -> None:
    _pigs([f"new {i}" for i in range(3)]).to_csv(folder / "new.csv", index=False)
    page = write_report(folder / "run", data=str(folder / "new.csv"), out=folder / "n.html", num_samples=100)
    words = _words(page.read_text())
    assert "from new.csv, have other names than the tasks that trained the prior" in words
    assert "also trained" not in words


@pytest.fixture(scope="module")
def plane(folder: Path) -> Path:
    """A run with two inputs in one keyword, two outputs, one of two columns and one of yes or no, and a constant."""
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame({"task": np.repeat(np.arange(9), 6), "a": rng.normal(size=54), "b": rng.normal(size=54)})
    frame = frame.assign(size=frame.task * 0.1, u=rng.normal(size=54), v=rng.normal(size=54), sick=rng.random(54) < 0.5)
    frame.iloc[:-2].to_csv(folder / "plane.csv", index=False)
    settings = {
        "model": f"{folder}/model.py:plane",
        "data": f"{folder}/plane.csv",
        "task": "task",
        "input": {"x": ["a", "b"]},
        "constant": {"size": "size"},
        "output": {"both": ["u", "v"], "sick": "sick"},
        "num_support": "2-3",
        "num_steps": 0,
        "set": {"num_particles": 5, "num_steps": 2},
        "out": f"{folder}/plane",
    }
    (folder / "plane.yaml").write_text(yaml.safe_dump(settings))
    fitted = _invoke("fit", "--config", f"{folder}/plane.yaml")
    assert fitted.exit_code == 0, fitted.output
    return folder / "plane"


def test_several_inputs_and_outputs_constants_and_yes_or_no(plane: Path) -> None:
    done = _invoke("report", str(plane), "--num-samples", "100")
    assert done.exit_code == 0, done.output
    words = _words((plane / "report.html").read_text())
    for told in (
        "No curves are drawn",
        "u: RMSE",
        "v: RMSE",
        "sick: Brier score",
        "Brier score of sick",
        "predictions of yes",
        "no learning curve",
        "once a task",
    ):
        assert told in words
    assert "adapted to 3 observations here; the prior was learned for 2 to 3" in words
    assert "to predict u, v, sick from a, b" in words


def test_log_density_of_several_outputs_is_that_of_rows(plane: Path) -> None:
    run = read_run(plane)
    tasks = read_tasks(read_csv(run.settings.data), run.settings)
    found = assess(run.prior, tasks, run.outputs, num_support=3, num_samples=100)
    values = found.posterior.log_likelihood(found.query, num_samples=100)
    joint = scores.mixture_log_density(values["obs"] + values["ill"])
    torch.testing.assert_close(found.log_density, joint, equal_nan=True)
    assert [column.name for column in found.columns] == ["u", "v", "sick"]


def _column(spread: float = 1.0, shift: float = 0.0, num_tasks: int = 40) -> Column:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(num_tasks, 5, generator=generator)
    draws = shift + spread * torch.randn(999, num_tasks, 5, generator=generator)
    return Column("y", target, torch.ones(num_tasks, 5, dtype=torch.bool), draws, draws)


# Calibrated columns are judged so for about 98 % of the seeds.
@pytest.mark.parametrize(
    ("column", "told"),
    [
        (_column(), "no miscalibration shows beyond chance"),
        (_column(spread=0.4), "off: intervals hold too few values"),
        (_column(spread=3.0), "off: intervals hold too many values"),
        (_column(shift=1.0), "predictions lie too high and intervals hold too few values"),
        (_column(shift=-1.0), "predictions lie too low and intervals hold too few values"),
        (_column(num_tasks=3), "3 tasks are too few"),
    ],
)
def test_calibration_is_judged_in_words(column: Column, told: str) -> None:
    assert told in judge_calibration(column)


def test_error_of_coverage_counts_tasks() -> None:
    once = _column()
    copies = Column(
        "y",
        once.target.repeat(1, 4),
        once.mask.repeat(1, 4),
        once.draws.repeat(1, 1, 4),
        once.draws.repeat(1, 1, 4),
    )
    assert measure_coverage(copies) == pytest.approx(measure_coverage(once))
    assert measure_coverage(once).error > 0


def test_column_scores_ignore_what_is_not_real() -> None:
    column = _column()
    mask = torch.arange(5) < 3
    masked = Column("y", column.target, mask.expand(40, 5), column.draws, column.draws)
    short = Column("y", column.target[:, :3], mask[:3].expand(40, 3), column.draws[..., :3], column.draws[..., :3])
    assert score_column(masked) == pytest.approx(score_column(short))
    assert masked.spread == pytest.approx(short.spread)


def test_tasks_are_ranked_by_their_score(folder: Path) -> None:
    run = read_run(folder / "run")
    tasks = read_tasks(read_csv(run.settings.data), run.settings)
    found = assess(run.prior, tasks, run.outputs, num_support=2, num_samples=100)
    column, last = found.columns[0], len(tasks) - 2
    real = column.mask[last]
    one = scores.crps(column.draws[:, last][:, real], column.target[last][real]) / column.spread
    assert score_tasks(found)[last].item() == pytest.approx(one.item())


def test_page_parts_escape_text_and_keep_html() -> None:
    assert paragraph("a < b", Html("<i>c</i>")) == "<p>a &lt; b <i>c</i></p>"
    assert "<code>&lt;x&gt;</code>" in bullets([code("<x>")])
    cells = table("a & b", ["<h>", "n"], [("<r>", 1.23456), ("s", None)])
    assert "&lt;h&gt;" in cells
    assert "&lt;r&gt;" in cells
    assert '<td class="number">1.23</td>' in cells
    assert '<td class="number">–</td>' in cells
    assert [number(x) for x in (float("nan"), 12345.6, 0.00012345)] == ["not defined", "12,346", "0.000123"]


Change = Callable[[Path], object]


@pytest.mark.parametrize(
    ("change", "arguments", "told"),
    [
        (lambda run: shutil.rmtree(run), (), "there is no folder"),
        (lambda run: (run / "prior.safetensors").unlink(), (), "bmaml-ppl fit --out"),
        (lambda run: (run / "settings.yaml").rename(run / "adapt.yaml"), (), "is a folder of `bmaml-ppl adapt`"),
        (lambda run: None, ("--data", "none.csv"), "there is no data file 'none.csv'"),
        (lambda run: None, ("--num-support", "9"), "no task has more than 9 observations"),
        (lambda run: None, ("--rows", "last"), "choose 'first' or 'random'"),
    ],
)
def test_a_mistake_is_told_in_words(
    folder: Path, tmp_path: Path, change: Change, arguments: tuple[str, ...], told: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    change(run)
    result = _invoke("report", str(run), *arguments)
    assert result.exit_code == 2, result.output
    assert told in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_another_model_than_the_learned_one_is_refused(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    (tmp_path / "model.py").write_text(MODEL.replace('"scale"', '"width"'))
    kept = yaml.safe_load((run / "settings.yaml").read_text())
    (run / "settings.yaml").write_text(yaml.safe_dump({**kept, "model": f"{tmp_path}/model.py:line"}))
    assert "param 'scale' is missing in the model" in " ".join(_invoke("report", str(run)).output.split())


def test_help_has_its_example_line_by_line() -> None:
    text = _invoke("report", "--help").output
    assert "  bmaml-ppl report runs/pigs --data other_pigs.csv" in text
    assert "\b" not in text


def _browse(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, *QUIET, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


# Writes what the page looks like from inside to the title of a copy.
PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const outside = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
  document.title = JSON.stringify([
    images.length, images.filter(image => image.naturalWidth > 0).length, outside.length,
    document.documentElement.scrollWidth - document.documentElement.clientWidth]);
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_every_picture_and_fetches_nothing(page: str, tmp_path: Path, width: int) -> None:
    probed = page.replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    copy, shot = tmp_path / "copy.html", tmp_path / "shot.png"
    copy.write_text(probed.replace("</body>", f"{PROBE}</body>"))
    told = _browse(tmp_path / "profile", f"--window-size={width},900", "--dump-dom", copy.as_uri())
    title = re.search(r"<title>\[(\d+),(\d+),(\d+),(-?\d+)\]</title>", told.stdout)
    assert title is not None, told.stdout[:500]
    images, loaded, outside, overflow = map(int, title.groups())
    assert images == page.count("<img")
    assert (loaded, outside, overflow) == (images, 0, 0)
    assert "CONSOLE" not in told.stderr, told.stderr
    (tmp_path / "page.html").write_text(page)
    seen = _browse(
        tmp_path / "profile", f"--window-size={width},900", f"--screenshot={shot}", (tmp_path / "page.html").as_uri()
    )
    assert "CONSOLE" not in seen.stderr, seen.stderr
    assert shot.stat().st_size > 10_000
