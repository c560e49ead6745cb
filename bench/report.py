"""From single measurements to medians, ratios, a table, a JSON document and a plot.

Pure but for `write_report`, which writes files. Must not know how anything was measured.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Final

from bench.environment import Environment
from bench.plan import WORKS, Unit, Work
from bench.systems import Messages
from bench.works import MIB, Scale, Timing

BASELINE: Final = "juicefs"
SUBJECT: Final = "atoll"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed run of one work on one system."""

    pair: str
    work: str
    system: str
    round: int
    timing: Timing
    load_average: float
    # What was exchanged with the metadata service meanwhile, verification included.
    messages: Messages | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A work that gave no figure, and why."""

    pair: str
    work: str
    system: str
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """The medians of one work in one pair: seconds of the whole work, by system."""

    pair: str
    work: Work
    operations: int
    size_bytes: int
    median_s: dict[str, float]
    p99_us: dict[str, float]

    def figure(self, system: str) -> float | None:
        """Give the median in the unit of the row; None if there is none."""
        elapsed_s = self.median_s.get(system)
        if elapsed_s is None:
            return None
        match self.work.unit:
            case Unit.PER_OPERATION:
                return elapsed_s / self.operations * 1e6
            case Unit.THROUGHPUT:
                return self.size_bytes / MIB / elapsed_s

    def times_as_fast(self, system: str, *, other: str) -> float | None:
        """Give the time of the other divided by the time of the system: above 1 the system is faster."""
        mine_s, other_s = self.median_s.get(system), self.median_s.get(other)
        return None if mine_s is None or other_s is None else other_s / mine_s

    @property
    def goal(self) -> float | None:
        """Return how many times as fast as the baseline the project wants to be here."""
        return self.work.goal_in(self.pair)

    def goal_reached(self) -> bool | None:
        """Say whether the project is as many times as fast as it wants; None without goal or figures."""
        ratio = self.times_as_fast(SUBJECT, other=BASELINE)
        return None if ratio is None or self.goal is None else ratio >= self.goal


def summarise(measurements: Sequence[Measurement]) -> list[Row]:
    """Take the medians over the rounds, in the order of the plan."""
    rows = []
    for pair in dict.fromkeys(each.pair for each in measurements):
        for work in WORKS.values():
            mine = [each for each in measurements if (each.pair, each.work) == (pair, work.key)]
            if not mine:
                continue
            by_system = {
                name: [each.timing for each in mine if each.system == name]
                for name in dict.fromkeys(each.system for each in mine)
            }
            rows.append(
                Row(
                    pair=pair,
                    work=work,
                    operations=mine[0].timing.operations,
                    size_bytes=mine[0].timing.size_bytes,
                    median_s={name: median(t.elapsed_ns for t in timings) / 1e9 for name, timings in by_system.items()},
                    p99_us={
                        name: round(median(t.p99_ns for t in timings if t.p99_ns is not None) / 1e3, 1)
                        for name, timings in by_system.items()
                        if all(t.p99_ns is not None for t in timings)
                    },
                )
            )
    return rows


def messages_table(measurements: Sequence[Measurement]) -> str:
    """Draw what a mount exchanged with its metadata service, by work, in the last round; empty where nothing is known."""
    last = {each.work: each for each in measurements if each.messages is not None}
    lines = ["| work | operations | sent | received |", "| --- | ---: | ---: | ---: |"]
    for work in WORKS.values():
        if (found := last.get(work.key)) is not None and (counted := found.messages) is not None:
            each = [count / found.timing.operations for count in (counted.operations, counted.sent, counted.received)]
            lines.append(f"| {work.title} | " + " | ".join(f"{value:.2f}" for value in each) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def subject_of(systems: Sequence[str]) -> str:
    """Name the system whose ratios the table shows: the project, or the first one without it."""
    return SUBJECT if SUBJECT in systems else systems[0]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row], systems: Sequence[str]) -> str:
    """Draw the rows of one pair as a Markdown table that is aligned for reading as plain text."""
    subject = subject_of(systems)
    others = [name for name in systems if name != subject]
    header = ["work", "unit", *systems, *(f"{subject} / {name}" for name in others), "goal"]
    lines = [header]
    for row in rows:
        ratios = [row.times_as_fast(subject, other=name) for name in others]
        verdict = {None: "", True: " met", False: " MISSED"}[row.goal_reached()]
        goal = "" if row.goal is None else f"{row.goal:g}x{verdict}"
        figures = [_number(row.figure(name)) for name in systems]
        marks = ["-" if ratio is None else f"{_number(ratio)}x" for ratio in ratios]
        lines.append([row.work.title, row.work.unit.value, *figures, *marks, goal])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    alignments: list[Callable[[str, int], str]] = [str.ljust, str.ljust]
    alignments += [str.rjust] * (len(header) - 2)
    columns = list(zip(widths, alignments, strict=True))
    rule = [("-" * width if align is str.ljust else "-" * (width - 1) + ":") for width, align in columns]
    drawn = [[align(cell, width) for cell, (width, align) in zip(line, columns, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [drawn[0], rule, *drawn[1:]])


def document(
    rows: Sequence[Row],
    measurements: Sequence[Measurement],
    failures: Sequence[Failure],
    *,
    scale: Scale,
    environment: Environment,
) -> str:
    """Write everything that is known about the run as one JSON document."""
    summary = [
        {
            "pair": row.pair,
            "work": row.work.key,
            "title": row.work.title,
            "unit": row.work.unit.value,
            "goal": row.goal,
            "goal_reached": row.goal_reached(),
            "systems": {
                name: {
                    "figure": row.figure(name),
                    "median_s": elapsed_s,
                    "p99_us": row.p99_us.get(name),
                    "times_as_fast_as_juicefs": row.times_as_fast(name, other=BASELINE),
                }
                for name, elapsed_s in row.median_s.items()
            },
        }
        for row in rows
    ]
    content = {
        "environment": asdict(environment),
        "scale": asdict(scale),
        "summary": summary,
        "measurements": [asdict(each) for each in measurements],
        "failures": [asdict(each) for each in failures],
    }
    return json.dumps(content, indent=1) + "\n"


def text(
    rows: Sequence[Row],
    failures: Sequence[Failure],
    systems: Sequence[str],
    *,
    scale: Scale,
    environment: Environment,
    rounds: int,
    measurements: Sequence[Measurement] = (),
) -> str:
    """Write the tables of all pairs, with what they depend on, as Markdown."""
    reading = (
        f"Median of {rounds}; us/op: less is better, MiB/s: more is better; ratios above 1: "
        f"{subject_of(systems)} is faster."
    )
    amount = (
        f"{scale.files_4k:,} files of 4 KiB, {scale.files_64k:,} of 64 KiB, a tree of {scale.tree_files:,} files, "
        f"a big file of {scale.big_size_bytes // MIB:,} MiB, {scale.random_reads:,} random reads."
    )
    machine = (
        f"{environment.processors} processors, {environment.memory_bytes / 2**30:.0f} GiB, {environment.file_system}, "
        f"fdatasync {environment.fdatasync_us:.0f} us, kernel {environment.kernel}, Python {environment.python}, "
        f"commit {environment.commit}."
    )
    versions = "\n".join(f"- {name}: {version}" for name, version in environment.versions.items())
    parts = [reading, amount, machine, versions]
    for pair in dict.fromkeys(row.pair for row in rows):
        mine = [row for row in rows if row.pair == pair]
        present = [name for name in systems if any(name in row.median_s for row in mine)]
        parts += [f"### bucket = {pair}", table(mine, present)]
        if exchanged := messages_table([each for each in measurements if each.pair == pair]):
            parts += ["Metadata operations and messages of the mount for each operation of the work:", exchanged]
    if failures:
        listed = [f"- {f.pair}, {f.system}, {f.work}, round {f.round}: {f.reason}" for f in failures]
        parts += ["### failed", "\n".join(listed)]
    return "\n\n".join(parts) + "\n"


def plot(rows: Sequence[Row], systems: Sequence[str], path: Path) -> None:
    """Draw for one pair how many times as fast as the baseline every system is, on a logarithmic axis."""
    # By name: matplotlib comes with `make bench` only, and the project's checks run without it.
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    baseline = BASELINE if BASELINE in systems else systems[0]
    drawn = [name for name in systems if name != baseline] or list(systems)
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.2 * len(rows) * (len(drawn) + 1)), layout="constrained")
    height = 0.8 / len(drawn)
    for index, name in enumerate(drawn):
        ratios = [row.times_as_fast(name, other=baseline) for row in rows]
        places = [number + (index - (len(drawn) - 1) / 2) * height for number in range(len(rows))]
        bars = axes.barh(places, [(ratio or 1) - 1 for ratio in ratios], height=height, left=1, label=name)
        axes.bar_label(bars, [f"{_number(ratio)}x" for ratio in ratios], padding=3, fontsize=7)
    for number, row in enumerate(rows):
        if row.goal is not None:
            label = "goal" if number == 0 else None
            axes.plot([row.goal] * 2, [number - 0.45, number + 0.45], color="black", linewidth=1.5, label=label)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.work.title for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as {baseline} (right is faster)")
    axes.set_title(f"bucket = {rows[0].pair}")
    axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_report(
    measurements: Sequence[Measurement],
    failures: Sequence[Failure],
    systems: Sequence[str],
    *,
    scale: Scale,
    environment: Environment,
    rounds: int,
    output: Path,
) -> str:
    """Write results.json, results.md and a plot for each pair into a directory; return the text of the tables."""
    rows = summarise(measurements)
    written = text(
        rows, failures, systems, scale=scale, environment=environment, rounds=rounds, measurements=measurements
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.md").write_text(written)
    (output / "results.json").write_text(document(rows, measurements, failures, scale=scale, environment=environment))
    for pair in dict.fromkeys(row.pair for row in rows):
        mine = [row for row in rows if row.pair == pair]
        present = [name for name in systems if any(name in row.median_s for row in mine)]
        plot(mine, present, output / f"{pair}.png")
    return written
