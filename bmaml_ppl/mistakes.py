"""How the command line tells a user's mistake, and what it has written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from bmaml_ppl import runs
from bmaml_ppl.distributed import ElsewhereError

__all__ = ["explain_mistakes", "list_files"]

_MISTAKES = (ValueError, TypeError, KeyError, OSError, ImportError, SyntaxError, ElsewhereError)
"""What the library raises for a mistake of its user; anything else is a bug, unless it comes from the model."""


def list_files(folder: Path) -> str:
    """Names of a folder's files."""
    return ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))


@contextmanager
def explain_mistakes(context: typer.Context) -> Iterator[None]:
    """Tells a user's mistake in one paragraph and exits with code 2; bugs of this package keep their traceback."""
    try:
        yield
    except Exception as error:
        message = _explain(error)
        if context.obj or message is None:
            raise
        typer.secho(f"Error: {message}", err=True, fg="red")
        raise typer.Exit(2) from error


def _explain(error: Exception) -> str | None:
    """What to tell of an error, or None where neither the user nor the user's model made it."""
    chain = [error, *filter(None, (error.__cause__, error.__context__))]
    lines = [line for link in chain for line in runs.find_model_lines(link)]
    if not lines and not isinstance(error, _MISTAKES):
        return None
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if lines or not isinstance(error, ValueError | TypeError | KeyError | OSError | ImportError):
        text = f"{type(error).__name__}: {text}"
    return "\n  ".join([text, *lines[:1]])
