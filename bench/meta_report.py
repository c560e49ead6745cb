"""From the measurements of `make bench-meta` to medians, ratios, geometric means and tables.

Pure but for `write_report`. Must not know how anything was measured.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Final

from bench.environment import Environment
from bench.meta_stores import Counters
from bench.works import Timing

HEADLINE: Final = ("create", "stat", "rename", "readdir", "unlink")
"""The operations of the geometric mean; the others are shown only."""
WORKS: Final = ("create", "stat", "stat_again", "readdir", "rename", "unlink")
SYSTEMS: Final = ("atoll", "juicefs")
LAYOUTS: Final = ("own", "shared")
_GOALS: Final = {
    ("postgresql", "own", 1): 1.0,
    ("postgresql", "own", 16): 2.0,
    ("redis", "own", 1): 1.0,
    ("redis", "own", 4): 1.0,
    ("redis", "own", 16): 1.0,
}


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """Where the names are, and how many processes work in which directories."""

    store: str
    layout: str
    processes: int

    @property
    def goal(self) -> float | None:
        """Return what the geometric mean is to be at least."""
        return _GOALS.get((self.store, self.layout, self.processes))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One work of one system in one round; of several passes the sums."""

    setting: Setting
    work: str
    system: str
    round: int
    timing: Timing
    counters: Counters
    load_average: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Works that gave no figure, and why."""

    setting: Setting
    system: str
    round: int
    reason: str


def per_second(measurements: Sequence[Measurement], setting: Setting, work: str, system: str) -> float | None:
    """Return the median over the rounds of operations in a second; None without figures."""
    rates = [
        each.timing.operations / each.timing.elapsed_ns * 1e9
        for each in measurements
        if (each.setting, each.work, each.system) == (setting, work, system)
    ]
    return median(rates) if rates else None


def ratio(measurements: Sequence[Measurement], setting: Setting, work: str) -> float | None:
    """Return how many times as fast as JuiceFS the project is; None where one has no figure."""
    mine, other = (per_second(measurements, setting, work, system) for system in SYSTEMS)
    return None if mine is None or other is None else mine / other


def mean_ratio(measurements: Sequence[Measurement], setting: Setting) -> float | None:
    """Return the geometric mean over the headline's operations; None unless all have figures."""
    ratios = [ratio(measurements, setting, work) for work in HEADLINE]
    known = [each for each in ratios if each is not None]
    return prod(known) ** (1 / len(known)) if len(known) == len(HEADLINE) else None


def settings_of(measurements: Sequence[Measurement]) -> list[Setting]:
    """Return the settings that have figures, in the order of the report."""
    return sorted({each.setting for each in measurements})


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.{digits}g}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], *, texts: int) -> str:
    """Draw a Markdown table, the first columns to the left."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def means_table(measurements: Sequence[Measurement]) -> str:
    """Draw the ratios of the operations, their geometric means and the goals."""
    lines = []
    for setting in settings_of(measurements):
        mean = mean_ratio(measurements, setting)
        verdict = "" if setting.goal is None or mean is None else " met" if mean >= setting.goal else " MISSED"
        goal = "" if setting.goal is None else f"{setting.goal:g}{verdict}"
        ratios = [_number(ratio(measurements, setting, work)) for work in HEADLINE]
        again = _number(ratio(measurements, setting, "stat_again"))
        lines.append([setting.store, setting.layout, f"{setting.processes}", *ratios, _number(mean), goal, again])
    head = ["names in", "directories", "processes", *HEADLINE, "geometric mean", "goal", "(stat again)"]
    return _table(head, lines, texts=2)


def rates_table(measurements: Sequence[Measurement]) -> str:
    """Draw operations in a second of both systems, the lowest and highest round beside the median."""
    lines = []
    for setting in settings_of(measurements):
        for work in WORKS:
            cells = [setting.store, setting.layout, f"{setting.processes}", work]
            for system in SYSTEMS:
                rates = sorted(
                    each.timing.operations / each.timing.elapsed_ns * 1e9
                    for each in measurements
                    if (each.setting, each.work, each.system) == (setting, work, system)
                )
                cells += [_number(median(rates) if rates else None)]
                cells += [f"{_number(rates[0])} to {_number(rates[-1])}" if rates else "-"]
            lines.append([*cells, _number(ratio(measurements, setting, work))])
    head = ["names in", "directories", "processes", "work"]
    head += [text for system in SYSTEMS for text in (f"{system} op/s", "lowest to highest")]
    return _table([*head, "ratio"], lines, texts=4)


def counts_table(measurements: Sequence[Measurement]) -> str:
    """Draw what each operation cost the server and the processes; the last round."""
    last = {(each.setting, each.work, each.system): each for each in measurements}
    lines = [
        [setting.store, setting.layout, f"{setting.processes}", work, system, *_costs(last[setting, work, system])]
        for setting in settings_of(measurements)
        for work in WORKS
        for system in SYSTEMS
        if (setting, work, system) in last
    ]
    head = ["names in", "directories", "processes", "work", "system"]
    head += ["statements", "transactions", "requests", "loads", "requests in a batch", "rows in a batch"]
    head += ["us server", "us service", "us mount", "us elapsed"]
    return _table(head, lines, texts=5)


def _costs(each: Measurement) -> list[str]:
    count, counted = each.timing.operations, each.counters

    def per_operation(value: float | None, factor: float = 1.0) -> str:
        return "-" if value is None else _number(value * factor / count)

    requests, batches, rows = counted.requests, counted.batches, counted.rows
    # A batch now and then is a session's or the owner's: then a mean over it means nothing.
    enough = batches is not None and batches >= 10
    changes = None if not enough or batches is None or requests is None else requests / batches
    in_batch = None if not enough or batches is None or rows is None else rows / batches
    cpu = [counted.server_cpu_s, counted.service_cpu_s, counted.client_cpu_s]
    return [
        per_operation(counted.statements),
        per_operation(counted.transactions),
        per_operation(requests),
        per_operation(counted.loads),
        _number(changes),
        _number(in_batch),
        *(per_operation(value, 1e6) for value in cpu),
        _number(each.timing.elapsed_ns / 1e3 / count),
    ]


def text(
    measurements: Sequence[Measurement],
    failures: Sequence[Failure],
    *,
    amount: str,
    environment: Environment,
    rounds: int,
) -> str:
    """Write the tables, with what they depend on, as Markdown."""
    machine = (
        f"{environment.processors} processors, {environment.memory_bytes / 2**30:.0f} GiB, {environment.file_system}, "
        f"fdatasync {environment.fdatasync_us:.0f} us, kernel {environment.kernel}, Python {environment.python}, "
        f"commit {environment.commit}."
    )
    loads = [each.load_average for each in measurements]
    if loads:
        machine += f" Load average {min(loads):.1f} to {max(loads):.1f}, the benchmark's own included."
    reading = (
        "How many times as fast as JuiceFS CE, both with default options on one server that makes each change durable. "
        f"Median of {rounds}. {amount}"
    )
    costs = (
        "For each operation, in the last round: statements or commands, and transactions of the server; requests of the "
        "mount to the service, and trips of that for rows; requests and rows in a committed batch; processor time. Idle "
        "work of the server and of the processes is in it."
    )
    versions = "\n".join(f"- {name}: {version}" for name, version in environment.versions.items())
    parts = [reading, machine, versions, means_table(measurements)]
    parts += ["Operations in a second of all processes together (of readdir: entries):", rates_table(measurements)]
    parts += [costs, counts_table(measurements)]
    if failures:
        listed = [
            f"- {f.setting.store}, {f.setting.layout}, {f.setting.processes}, {f.system}, round {f.round}: {f.reason}"
            for f in failures
        ]
        parts += ["### failed", "\n".join(listed)]
    return "\n\n".join(parts) + "\n"


def write_report(
    measurements: Sequence[Measurement],
    failures: Sequence[Failure],
    *,
    amount: str,
    environment: Environment,
    rounds: int,
    output: Path,
) -> str:
    """Write results.md and results.json into a directory; return the text of the tables."""
    written = text(measurements, failures, amount=amount, environment=environment, rounds=rounds)
    means = [
        {**asdict(setting), "geometric_mean": mean_ratio(measurements, setting), "goal": setting.goal}
        for setting in settings_of(measurements)
    ]
    content = {
        "environment": asdict(environment),
        "means": means,
        "measurements": [asdict(each) for each in measurements],
        "failures": [asdict(each) for each in failures],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.md").write_text(written)
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    return written
