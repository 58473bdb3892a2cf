"""Writes the README's table from `benchmarks/results/*.json`, between its markers.

python -m benchmarks.table [--check]
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.frame import RESULTS, ROOT, Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README = ROOT / "README.md"
OURS = "bmaml_ppl compiled"


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
    shown = f"x {ratio:.3g}"
    return {"reached": shown} if asked is None else {"reached": shown, "asked": f"x {asked:g}", "met": ratio >= asked}


def meta_gradient(result: Row) -> Iterator[Line]:
    for job in sorted({(row["tasks"], row["n"], row["s"]) for row in result["rows"]}, key=lambda j: (j[0], -j[1])):
        rows = {r["variant"]: r for r in result["rows"] if (r["tasks"], r["n"], r["s"]) == job}
        ours = f"{rows[OURS]['ms']:.3g} ms"
        for name, row in rows.items():
            if name == OURS:
                continue
            asked = 3 if name.startswith("NumPyro") else None
            title = f"BMAML meta-gradient, T = {job[0]}, n = s = {job[1]}"
            yield Line(title, ours, f"{name} {row['ms']:.3g} ms", **faster(row["ours_times_faster"], asked))


def maml(result: Row) -> Iterator[Line]:
    rows = {row["variant"]: row for row in result["rows"]}
    for name, row in rows.items():
        if name != OURS:
            asked = {"jax by hand": 1, "TorchOpt": 35}.get(name)
            ours = f"{rows[OURS]['ms']:.3g} ms"
            beside = f"{name} {row['ms']:.3g} ms"
            yield Line("second-order MAML, 25 tasks", ours, beside, **faster(row["ours_times_faster"], asked))


def adapt(result: Row) -> Iterator[Line]:
    for row in result["rows"]:
        total = next(key for key in row if key.startswith("seconds_of_"))
        for ours in (key.removesuffix("_times_faster") for key in row if key.endswith("_times_faster")):
            us = next(r for r in result["rows"] if r["job"] == row["job"] and r["variant"] == ours)
            yield Line(
                f"adapt 10,000 tasks, {row['job']}, `{ours}`",
                f"{_duration(us[total])}, {us['megabytes']:.0f} MB{_share(us, total)}",
                f"{row['variant']} {_duration(row[total])}{_share(row, total)}",
                **faster(row[f"{ours}_times_faster"], 100 if row["variant"].startswith("Pyro") else None),
            )


def _share(row: Row, total: str) -> str:
    """From how many tasks a total was extrapolated."""
    return "" if row["tasks"] == int(total.split("_")[-1]) else f", from {row['tasks']}"


def scaling(result: Row) -> Iterator[Line]:
    for row in result["rows"]:
        first, last = row["values"][0], row["values"][-1]
        name = {"kernel": "M, kernel term alone", "steps": "n = s"}.get(row["sweep"], row["sweep"])
        met = row["exponent"] <= row["asked"] + 0.005
        ours = f"{row['ms'][0]:.3g} to {row['ms'][-1]:.3g} ms"
        reached, asked = f"exponent {row['exponent']:.2f}", f"at most {row['asked']}"
        yield Line(f"cost against {name}", ours, f"{first} to {last}", reached, asked, met)


def memory(result: Row) -> Iterator[Line]:
    rows, summary = result["rows"], result["summary"]
    peaks = [[row[f"{way}_megabytes"] for row in rows] for way in ("checkpointed", "full")]
    ours, beside = (f"{each[0]:.0f} to {each[-1]:.0f} MB" for each in peaks)
    job = f"peak memory, {rows[0]['steps']} to {rows[-1]['steps']} steps, checkpointed"
    ratio = summary["peak_ratio"]
    yield Line(job, ours, f"full unroll {beside}", f"grows x {ratio:.2f}", "x 1.5", ratio <= 1.5)
    ours, beside = (f"{rows[-1][f'{way}_ms']:.4g} ms" for way in ("checkpointed", "full"))
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
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def make_block() -> str:
    """The table, and a line on the machine."""
    lines: list[Line] = []
    machine = ""
    for name, read in (("meta_gradient", meta_gradient), ("maml", maml), ("adapt", adapt), ("memory", memory)):
        if (result := load(name)) is not None:
            lines += read(result)
            machine = machine or _describe(result["about"])
    if (result := load("scaling")) is not None:
        lines += scaling(result)
    lines += gpu()
    rows = [f"| {x.job} | {x.ours} | {x.beside} | {x.reached} | {_asked(x)} |" for x in lines]
    return "\n".join([machine, "", "| job | bmaml_ppl | beside | reached | asked |", "|---|---|---|---|---|", *rows])


def _asked(line: Line) -> str:
    return line.asked if line.met else f"{line.asked}: **missed**"


def _describe(about: Row) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if k not in ("bmaml-ppl", "arviz", "jaxlib"))
    return (
        f"{about['machine']}, {about['cores']} cores, {about['torch_threads']} threads of torch, seed {about['seed']}, "
        f"medians of {about['rounds']} interleaved rounds ({versions}):"
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
