"""The command line: meta-learn a Pyro model's prior from a CSV file, adapt it to new tasks, look at it."""

import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from bmaml_ppl import __version__, runs
from bmaml_ppl.distributed import join_world
from bmaml_ppl.experiments.commands import experiments
from bmaml_ppl.inference import ALGORITHMS
from bmaml_ppl.mistakes import explain_mistakes, list_files
from bmaml_ppl.numerics import Precision
from bmaml_ppl.settings import Settings, parse_pairs, resolve

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

app.add_typer(experiments, name="experiment")

_ENDS: dict[runs.End, str] = {
    "finished": "Written to",
    "stopped": "Stopped early, the same command goes on from the last checkpoint. Written to",
    "kept": "Learned before by the same settings, which --overwrite repeats. It is in",
}

_PAIR = "KEYWORD=COLUMN"
Inputs = Annotated[list[str] | None, typer.Option(metavar=_PAIR, help="The model's keyword and its column, or A,B.")]
Outputs = Annotated[list[str] | None, typer.Option(metavar=_PAIR, help="The same for what the model observes.")]
Constants = Annotated[list[str] | None, typer.Option(metavar=_PAIR, help="The same for what is known once a task.")]
Task = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column that labels the task.")]


def main() -> None:
    """Entry point of `bmaml-ppl`."""
    # ArviZ 0.x announces its next version once a day, which is no business of a table of results.
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
    warnings.formatwarning = _format_warning
    app()


def _format_warning(message: Warning | str, *where: Any, **more: Any) -> str:
    return f"Warning: {message}\n"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bmaml-ppl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Bayesian meta-learning for Pyro models.

    Write a Pyro model of ONE task (a patient, a school, a pig). `fit` learns from many tasks the prior that they
    share, `adapt` turns it into the posterior of each new task from a few observations, `show` tells what was
    learned, `report` how far to trust it.

    \b
    Examples:
      bmaml-ppl demo
      bmaml-ppl fit growth.py:growth --data pigs.csv --task Pig \\
          --input time=Time --output weight=Weight --out runs/pigs
      bmaml-ppl adapt runs/pigs/prior.safetensors --data new_pigs.csv
      bmaml-ppl show runs/pigs/prior.safetensors
      bmaml-ppl report runs/pigs
    """  # noqa: D301
    context.obj = debug


@app.command()
def fit(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL.py:NAME", help="File and name of the model.")] = None,
    config: Annotated[str | None, typer.Option(help="Settings in a YAML or TOML file; options here win.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE.csv", help="One row an observation.")] = None,
    task: Task = None,
    input: Inputs = None,
    output: Outputs = None,
    constant: Constants = None,
    num_support: Annotated[
        str | None, typer.Option(help=f"Observations a task adapts to: 3, or 2-5 [{Settings.num_support}].")
    ] = None,
    min_observations: Annotated[int | None, typer.Option(help="Leave out tasks with fewer rows.")] = None,
    standardize: Annotated[bool | None, typer.Option(help="Give the model columns of mean 0 and sd 1.")] = None,
    inference: Annotated[str | None, typer.Option(help=f"{', '.join(ALGORITHMS)} [{Settings.inference}].")] = None,
    set: Annotated[list[str] | None, typer.Option(metavar="OPTION=VALUE", help="Option of the inference.")] = None,
    objective: Annotated[str | None, typer.Option(help="auto, or a sum: 'chaser(5) + query_nll(mean)'.")] = None,
    num_steps: Annotated[int | None, typer.Option(help=f"Meta-steps [{Settings.num_steps}].")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Tasks a meta-step [{Settings.batch_size}].")] = None,
    first_order: Annotated[bool | None, typer.Option(help="Stop outer gradients at the scores.")] = None,
    compile: Annotated[str | None, typer.Option(help=f"auto, true or false [{Settings.compile}].")] = None,
    memory: Annotated[
        str | None, typer.Option(help=f"full, 'checkpointed(5)' or 'truncated(10)' [{Settings.memory}].")
    ] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Tasks differentiated together [all].")] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"{', '.join(get_args(Precision))} [{Settings.precision}].")
    ] = None,
    device: Annotated[str | None, typer.Option(help=f"auto, cpu or cuda [{Settings.device}].")] = None,
    seed: Annotated[int | None, typer.Option(help=f"Of everything random [{Settings.seed}].")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help=f"Meta-steps between checkpoints [{Settings.checkpoint_every}].")
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help=f"Where the results go [{Settings.out}].")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")] = False,
) -> None:
    """Learn the prior that many tasks share.

    MODEL.py:NAME is a function on keyword tensors: `pyro.param` is learned from all tasks, `pyro.sample` is each
    task's own. Columns are standardised for the model unless you say --no-standardize; predictions come back in
    your units. A run that was stopped goes on when the same command is given again.

    \b
    Examples:
      bmaml-ppl fit growth.py:growth --data pigs.csv --task Pig \\
          --input time=Time --output weight=Weight --out runs/pigs
      bmaml-ppl fit growth.py:growth --config pigs.yaml --num-steps 300 \\
          --inference svgd --set num_particles=10 --set num_steps=20
      torchrun --nproc-per-node 4 --max-restarts 3 -m bmaml_ppl fit ...

    \b
    A settings file holds the same names as the options:
      data: pigs.csv
      task: Pig
      input: {time: Time}
      output: {weight: Weight}
      set: {num_particles: 10}

    \b
    The folder then holds:
      prior.safetensors   what was learned
      settings.yaml       all settings and versions; fit --config repeats the run
      history.csv         loss and gradient norm of each meta-step
      learning.png        the same as a figure
    """  # noqa: D301
    with explain_mistakes(context):
        settings = resolve(_gather(context), config)
        learned, end = runs.fit_prior(settings, overwrite=overwrite)
        if join_world()[0].writes:
            typer.echo(runs.describe_prior(learned))
            typer.echo(f"\n{_ENDS[end]} {learned.parent}: {list_files(learned.parent)}")


@app.command()
def adapt(
    context: typer.Context,
    prior: Annotated[str, typer.Argument(metavar="PRIOR.safetensors", help="What `fit` learned.")],
    data: Annotated[str, typer.Option(metavar="FILE.csv", help="One row an observation.")],
    model: Annotated[str | None, typer.Option(metavar="MODEL.py:NAME", help="File and name of the model.")] = None,
    task: Task = None,
    input: Inputs = None,
    output: Outputs = None,
    constant: Constants = None,
    num_samples: Annotated[int, typer.Option(min=2, help="Draws.")] = 1000,
    seed: Annotated[int | None, typer.Option(help="Of particles and draws; the prior's by default.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="Beside the prior, `adapted`, by default.")] = None,
) -> None:
    """Adapt a learned prior to tasks, and predict.

    Rows whose output is given are what each task adapts to; rows whose output is empty are predicted too. A task
    without any output is predicted from the prior alone. The model and the columns are those that `fit` kept beside the
    prior, in settings.yaml, unless given here.

    \b
    Example, and a data file for it:
      bmaml-ppl adapt runs/pigs/prior.safetensors --data new_pigs.csv

    \b
      Pig,Time,Weight
      a,1,26.0
      a,2,30.5
      a,12,

    \b
    The folder then holds:
      predictions.csv   each row's predictive mean, sd and quantiles
      posterior.csv     each task's latents, in the model's units
      posterior.nc      draws, predictions and scores, for arviz.from_netcdf
      check.json        whether the posterior is to be believed, and why
      adapt.yaml        settings and versions
    """  # noqa: D301
    with explain_mistakes(context):
        beside = Path(prior).parent / "settings.yaml"
        given = _gather(context) | {"out": out or str(Path(prior).parent / "adapted")}
        settings = resolve(given, beside if beside.is_file() else None)
        folder = runs.adapt_prior(Path(prior), settings, num_samples=num_samples, seed=seed)
        typer.echo(f"Written to {folder}: {list_files(folder)}")


@app.command()
def show(
    context: typer.Context,
    prior: Annotated[str, typer.Argument(metavar="PRIOR.safetensors", help="What `fit` learned.")],
) -> None:
    """Show a learned prior: its sites, parameters, units and settings. The model is not needed.

    \b
    Example:
      bmaml-ppl show runs/pigs/prior.safetensors
    """  # noqa: D301
    with explain_mistakes(context):
        typer.echo(runs.describe_prior(Path(prior)))


@app.command()
def report(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder that `fit` wrote.")],
    data: Annotated[str | None, typer.Option(metavar="FILE.csv", help="Other tasks, which did not train.")] = None,
    num_support: Annotated[
        int | None, typer.Option(min=1, help="Observations seen of each task [what the prior was learned for].")
    ] = None,
    rows: Annotated[str, typer.Option(help="Which of them are seen: first, or random.")] = "first",
    num_samples: Annotated[int, typer.Option(min=100, help="Draws.")] = 1000,
    out: Annotated[str | None, typer.Option(metavar="FILE.html", help="RUN/report.html by default.")] = None,
) -> None:
    """Write one HTML page on a run: what was learned, how well it predicts, and whether to believe it.

    Sees the first observations of each task, predicts the rest, and shows scores, calibration, curves of the best and
    the worst tasks and what cannot be concluded. The page holds its pictures and needs no network. Without --data, the
    tasks are those that trained the prior.

    \b
    Example:
      bmaml-ppl report runs/pigs
      bmaml-ppl report runs/pigs --data other_pigs.csv --out other_pigs.html
    """  # noqa: D301
    with explain_mistakes(context):
        from bmaml_ppl.report import write_report

        chosen: Any = rows
        written = write_report(run, data=data, num_support=num_support, rows=chosen, num_samples=num_samples, out=out)
        typer.echo(f"Written to {written}")


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the results go.")] = "runs/demo",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="One split and too few steps: only shows that it runs.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 2,
) -> None:
    """Predict the growth of pigs from three weighings, by ten methods.

    Learns from most of 72 pigs, sees three weighings of each of the others and predicts the rest, on three splits
    of the pigs; takes a few minutes. Needs the packages of pip install "bmaml-ppl[data]".

    \b
    Example:
      bmaml-ppl demo --out runs/demo

    \b
    The folder then holds:
      metrics.json         the table, and each split's
      growth.safetensors   the learned prior of the growth curve
      posterior.nc         held-out pigs of the first split, for arviz.from_netcdf
      prior.png, pigs.png, learning.png
    """  # noqa: D301
    with explain_mistakes(context):
        from bmaml_ppl.demo import SMOKE, DemoSettings, run_demo
        from bmaml_ppl.evaluation import format_table

        settings = replace(SMOKE if smoke else DemoSettings(), workers=workers)
        typer.echo(
            f"72 pigs (geepack/dietox), {settings.fraction:.0%} train, {settings.num_support} weighings of each other "
            f"pig are seen; splits by seeds {', '.join(map(str, settings.seeds))}"
        )
        rows = run_demo(out, settings)
        typer.echo(f"\n{format_table(rows)}\n\nRMSE and NLL are in standard deviations of the training pigs' weights.")
        typer.echo(f"Written to {out}: {list_files(Path(out))}")


def _gather(context: typer.Context) -> dict[str, Any]:
    """The settings that were given on the command line."""
    names = {field.name for field in fields(Settings)}
    given = {name: value for name, value in context.params.items() if name in names}
    return {k: parse_pairs(k, v) if isinstance(v, list | tuple) else v for k, v in given.items() if v not in ((), [])}
