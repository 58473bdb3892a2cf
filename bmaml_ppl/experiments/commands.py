"""The studies' part of the command line: `bmaml-ppl experiment NAME`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bmaml_ppl.mistakes import explain_mistakes, list_files

__all__ = ["experiments"]

_EXAMPLES = {"shots": "5,10,20", "tasks": "100,1000,inf", "seeds": "0,1,2"}

experiments = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Repeat a study on real or published data.")


@experiments.command()
def growth(
    context: typer.Context,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the results go.")] = "runs/growth",
    quick: Annotated[
        bool, typer.Option("--quick", help="One split and too few steps: only shows that it runs.")
    ] = False,
    seeds: Annotated[str | None, typer.Option(metavar="A,B,...", help="Splits of the tasks, one a seed.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 2,
) -> None:
    """Predict countries, chicks, sleepless subjects, patients and pigs from a few observations each.

    Per data set: the linear mixed model, and one Pyro model learned by SVGD and by Laplace's method, on the same
    splits; takes some minutes. Needs the packages of pip install "bmaml-ppl[data]".

    \b
    Example:
      bmaml-ppl experiment growth --out runs/growth

    \b
    The folder then holds:
      metrics.json        the tables, and each split's scores
      metrics.csv         each split's scores
      forecasts.png       held-out tasks of each data set
      NAME.safetensors    the prior that Laplace's method learned of each data set
    """  # noqa: D301
    with explain_mistakes(context):
        from bmaml_ppl.experiments.growth import QUICK, GrowthSettings, format_studies, run_growth

        settings = replace(QUICK if quick else GrowthSettings(), workers=workers)
        chosen = _parse("seeds", seeds, int)
        settings = settings if chosen is None else replace(settings, seeds=chosen)
        typer.echo(
            f"{settings.fraction:.0%} of the tasks train, K observations of each other task are seen; splits by seeds "
            f"{', '.join(map(str, settings.seeds))}"
        )
        tables = run_growth(out, settings)
        typer.echo(f"\n{format_studies(tables)}\n\nRMSE and NLL are in standard deviations of the training tasks.")
        typer.echo(f"Written to {out}: {list_files(Path(out))}")


@experiments.command("sine-line")
def sine_line(
    context: typer.Context,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the results go.")] = "runs/sine_line",
    quick: Annotated[bool, typer.Option("--quick", help="Too few steps: only shows that it runs.")] = False,
) -> None:
    """Tell sinusoids from lines by a few points, where both may fit: ABML and PLATIPUS.

    Takes about seventeen minutes; what a run before left in the folder is used again.

    \b
    Example:
      bmaml-ppl experiment sine-line --out runs/sine_line

    \b
    The folder then holds:
      metrics.json        scores, and the shares of functions near either curve of ambiguous tasks
      ambiguous.png       posterior functions of ambiguous tasks
      NAME.safetensors    the prior that each method learned
    """  # noqa: D301
    with explain_mistakes(context):
        from bmaml_ppl.experiments.sine_line import QUICK, SineLineSettings, format_metrics, run_sine_line

        metrics = run_sine_line(out, QUICK if quick else SineLineSettings())
        typer.echo(f"{format_metrics(metrics)}\nWritten to {out}: {list_files(Path(out))}")


@experiments.command()
def sinusoid(
    context: typer.Context,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the results go.")] = "runs/sinusoid",
    quick: Annotated[bool, typer.Option("--quick", help="A miniature of a few minutes: shows that it runs.")] = False,
    parts: Annotated[str | None, typer.Option(metavar="A,B,...", help="Of the study; see below.")] = None,
    shots: Annotated[str | None, typer.Option(metavar="K,K,...", help="Observations of a new task.")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="T,T,...", help="Training tasks of Figure 1, or inf.")] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B,...", help="Rows of the table of methods.")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="A,B,...", help="Of Figure 1's runs.")] = None,
    effort: Annotated[float | None, typer.Option(min=0, help="Share of each method's meta-steps.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 2,
    device: Annotated[str, typer.Option(help="Where to learn: auto, cpu, cuda.")] = "auto",
) -> None:
    """Bayesian MAML's sinusoids: every method on the same curves, and Figure 1 as released and on equal terms.

    Takes hours; what a run before left in the folder with the same settings is not run again. Parts: pictures,
    methods, figure1, ablations.

    \b
    Example:
      bmaml-ppl experiment sinusoid --out runs/sinusoid --parts methods --methods maml,bmaml --shots 5,10

    \b
    The folder then holds:
      results.json        everything that was measured
      PART.csv, PART.md   the scores as tables
      *.png               the figures
      priors              what each method learned
    """  # noqa: D301
    with explain_mistakes(context):
        from bmaml_ppl.experiments.sinusoid.run import run_sinusoid
        from bmaml_ppl.experiments.sinusoid.settings import QUICK, SinusoidSettings

        given: dict[str, Any] = {
            "parts": _parse("parts", parts, str),
            "shots": _parse("shots", shots, int),
            "tasks": _parse("tasks", tasks, float),
            "methods": _parse("methods", methods, str),
            "seeds": _parse("seeds", seeds, int),
            "effort": effort,
        }
        settings = replace(QUICK if quick else SinusoidSettings(), workers=workers, device=device)
        settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
        run_sinusoid(out, settings, typer.echo)
        typer.echo(f"Written to {out}: {list_files(Path(out))}")


def _parse(name: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    """Values separated by commas."""
    if text is None:
        return None
    try:
        return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
    except ValueError:
        words = {"int": "integers", "float": "numbers"}[kind.__name__]
        raise ValueError(f"--{name} {text!r} is not a list of {words}; write --{name} {_EXAMPLES[name]}") from None
