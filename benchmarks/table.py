"""Writes the README's table from `benchmarks/results/*.json`, between its markers.

python -m benchmarks.table [--check]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.frame import RESULTS, ROOT, Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README = ROOT / "README.md"
OURS = "bmaml_ppl compiled"
NUM_TASKS, WRONG = 10_000, 0.5
NOISE = 0.05
"""By which a fitted exponent may exceed what is asked: its error from timing."""


class Line(NamedTuple):
    """One row of the table.

    Attributes:
        job: What is computed.
        ours: What it costs here.
        beside: The peer, and what it costs there.
        reached: Times faster, an exponent, or a ratio of costs.
        asked: The aim, empty where there is none.
        met: Whether it is reached.
    """

    job: str
    ours: str
    beside: str
    reached: str
    asked: str = ""
    met: bool = True


def load(name: str) -> Row | None:
    path = RESULTS / f"{name}.json"
    found: Row | None = json.loads(path.read_text()) if path.exists() else None
    return found


def faster(ratio: float, asked: float | None) -> dict[str, Any]:
    """The last three entries of a line that says how many times faster."""
    shown = f"x {_digits(ratio)}"
    return {"reached": shown} if asked is None else {"reached": shown, "asked": f"x {asked:g}", "met": ratio >= asked}


def meta_gradient(result: Row) -> Iterator[Line]:
    for job in sorted({(row["tasks"], row["n"], row["s"]) for row in result["rows"]}, key=lambda j: (j[0], -j[1])):
        rows = {r["variant"]: r for r in result["rows"] if (r["tasks"], r["n"], r["s"]) == job}
        title = f"BMAML meta-gradient, T = {job[0]}, n = s = {job[1]}"
        yield from _beside_peers(title, rows, lambda peer: 3 if peer.startswith("NumPyro") else None)


def maml(result: Row) -> Iterator[Line]:
    rows = {row["variant"]: row for row in result["rows"]}
    yield from _beside_peers("second-order MAML, 25 tasks", rows, {"jax by hand": 1, "TorchOpt": 35}.get)


def _beside_peers(title: str, rows: dict[str, Row], asked: Callable[[str], float | None]) -> Iterator[Line]:
    for name, row in rows.items():
        if not name.startswith("bmaml_ppl"):
            ours, beside = f"{_digits(rows[OURS]['ms'])} ms", f"{name} {_digits(row['ms'])} ms"
            yield Line(title, ours, beside, **faster(row["ours_times_faster"], asked(name)))


def adapt(result: Row) -> Iterator[Line]:
    for row in result["rows"]:
        row["total"] = next(value for key, value in row.items() if key.startswith("seconds_of_"))
    for us in result["rows"]:
        for row in result["rows"]:
            key = f"{us['variant']}_times_faster"
            if row["job"] != us["job"] or key not in row or not _is_like(us["variant"], row["variant"]):
                continue
            memory = f", {us['megabytes']:.0f} MB" if us["tasks"] == NUM_TASKS else ""
            beside = f"{row['variant']}: {_duration(row['total'])}{_share(row)}"
            if row.get("means_off_by_sds", 0) > WRONG:
                beside += f"; means {row['means_off_by_sds']:.2g} standard deviations off"
            yield Line(
                f"adapt {NUM_TASKS:,} tasks, {row['job']}, `{us['variant']}`",
                f"{_duration(us['total'])}{memory}{_share(us)}",
                beside,
                **faster(row[key], 100 if row["variant"].startswith("Pyro") else None),
            )


def _is_like(ours: str, peer: str) -> bool:
    """Whether a line says something: draws beside draws, and SVGD beside all."""
    ours = ours.removesuffix(", compiled")
    return ours == "svgd" or ("NUTS" in peer if ours == "hmc" else peer == "Pyro NUTS")


def _share(row: Row) -> str:
    """From how many tasks a total was extrapolated."""
    return "" if row["tasks"] == NUM_TASKS else f" (from {row['tasks']} tasks)"


def scaling(result: Row) -> Iterator[Line]:
    for row in result["rows"]:
        first, last = row["values"][0], row["values"][-1]
        name = {"kernel": "M, kernel term alone", "steps": "n = s"}.get(row["sweep"], row["sweep"])
        met = row["exponent"] <= row["asked"] + NOISE
        ours = f"{_digits(row['ms'][0])} to {_digits(row['ms'][-1])} ms"
        reached, asked = f"exponent {row['exponent']:.2f}", f"at most {row['asked']}"
        yield Line(f"cost against {name}", ours, f"{first} to {last}", reached, asked, met)


def memory(result: Row) -> Iterator[Line]:
    rows, summary = result["rows"], result["summary"]
    peaks = [[row[f"{way}_megabytes"] for row in rows] for way in ("checkpointed", "full")]
    ours, beside = (f"{each[0]:.0f} to {each[-1]:.0f} MB" for each in peaks)
    job = f"peak memory, {rows[0]['steps']} to {rows[-1]['steps']} steps, checkpointed"
    ratio = summary["peak_ratio"]
    yield Line(job, ours, f"full unroll {beside}", f"grows x {ratio:.2f}", "x 1.5", ratio <= 1.5)
    ours, beside = (f"{_digits(rows[-1][f'{way}_ms'])} ms" for way in ("checkpointed", "full"))
    ratio = summary["time_ratio"]
    yield Line("the same, time", ours, f"full unroll {beside}", f"takes x {ratio:.2f}", "x 1.6", ratio <= 1.6)


def gpu() -> Iterator[Line]:
    for path in sorted(RESULTS.glob("gpu_*.json")):
        result = json.loads(path.read_text())
        if result["about"]["device"] == "cpu":
            continue
        for row in result["rows"]:
            what = f"{row['job']} on {result['about']['gpu']}, T = {row['tasks']}, {row['mode']}"
            fraction = f"{100 * row['fraction_of_roofline']:.3g} % of roofline" if "fraction_of_roofline" in row else ""
            asked = 1500 if row["tasks"] == 10 else 0
            reached = f"{row['per_second']:.4g} a second"
            yield Line(what, fraction, "", reached, f"{asked} a second" if asked else "", row["per_second"] >= asked)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds)} s"


def _digits(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def make_block() -> str:
    """The table, and a line on the machine."""
    lines: list[Line] = []
    machine, rounds = "", []
    for name, read in (("meta_gradient", meta_gradient), ("maml", maml), ("adapt", adapt), ("memory", memory)):
        if (result := load(name)) is not None:
            lines += read(result)
            machine = machine or _describe(result["about"])
            rounds.append(f"{name.replace('_', '-')} {result['about']['rounds']}")
    if (result := load("scaling")) is not None:
        lines += scaling(result)
        rounds.append(f"cost {result['about']['rounds']}")
    lines += gpu()
    rows = []
    for before, line in zip([None, *lines], lines, strict=False):
        same = before is not None and line[:2] == before[:2]
        first = "| |" if same else f"| {line.job} | {line.ours}"
        rows.append(f"{first} | {line.beside} | {line.reached} | {_asked(line)} |")
    machine = machine.replace("ROUNDS", ", ".join(rounds))
    return "\n".join([machine, "", "| job | bmaml_ppl | beside | reached | asked |", "|---|---|---|---|---|", *rows])


def _asked(line: Line) -> str:
    return line.asked if line.met else f"{line.asked} (**missed**)"


def _describe(about: Row) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if k not in ("bmaml-ppl", "arviz", "jaxlib"))
    return (
        f"{about['machine']}, {about['cores']} cores, {about['torch_threads']} threads of torch, seed {about['seed']}, "
        f"medians of interleaved rounds (ROUNDS; {versions}):"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the README does not hold the table")
    options = parser.parse_args()
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n{make_block()}\n{END}{after}"
    if options.check:
        sys.exit(None if new == text else "README.md does not hold the table of benchmarks/results: make bench-table")
    README.write_text(new)


if __name__ == "__main__":
    main()
