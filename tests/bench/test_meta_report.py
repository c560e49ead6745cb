"""The means of the comparison on names are right, and say whether their goals are reached."""

import json
from pathlib import Path

from bench.environment import Environment
from bench.meta_report import HEADLINE, Failure, Measurement, Setting, mean_ratio, means_table, ratio, write_report
from bench.meta_stores import Counters
from bench.works import Timing

ENVIRONMENT = Environment("6.1", "3.11.2", 2, 2**30, "ext4", 500.0, {"juicefs": "1.4.2"}, "abcdef0")
MANY = Setting("postgresql", "own", 16)
ONE = Setting("postgresql", "own", 1)


def counted(*, ours: bool) -> Counters:
    if ours:
        return Counters(110, 100, 0.5, 0.25, 0.75, requests=2000, batches=100, rows=3000, loads=10)
    return Counters(8000, 1000, 2.0, 1.0)


def measured(setting: Setting, work: str, system: str, number: int, per_second: float) -> Measurement:
    timing = Timing(1000, 0, int(1000 / per_second * 1e9))
    return Measurement(setting, work, system, number, timing, counted(ours=system == "atoll"), 0.5)


MEASUREMENTS = [
    *(measured(MANY, work, "juicefs", 1, 1000) for work in HEADLINE),
    # The median is 4000, and 2000 and 250 for two of the others.
    *(measured(MANY, "create", "atoll", number, rate) for number, rate in enumerate((4000, 9000, 100), 1)),
    *(measured(MANY, work, "atoll", 1, rate) for work, rate in zip(HEADLINE[1:], (2000, 250, 4000, 8000), strict=True)),
    measured(MANY, "stat_again", "juicefs", 1, 1000),
    measured(MANY, "stat_again", "atoll", 1, 1_000_000),
    measured(ONE, "create", "atoll", 1, 1000),
]


def test_a_ratio_is_of_medians_and_above_one_where_the_project_is_faster() -> None:
    assert ratio(MEASUREMENTS, MANY, "create") == 4
    assert ratio(MEASUREMENTS, MANY, "rename") == 0.25
    assert ratio(MEASUREMENTS, ONE, "create") is None


def test_the_mean_is_geometric_over_the_headline_alone_and_absent_without_all_of_it() -> None:
    mean = mean_ratio(MEASUREMENTS, MANY)
    assert mean is not None
    assert abs(mean - (4 * 2 * 0.25 * 4 * 8) ** 0.2) < 1e-3
    assert mean_ratio(MEASUREMENTS, ONE) is None


def test_goals_are_beside_the_means() -> None:
    lines = {line.split("|")[3].strip(): line for line in means_table(MEASUREMENTS).splitlines()[2:]}
    assert "| 2 met |" in lines["16"]
    assert "| - | 1 |" in lines["1"]
    slower = [each for each in MEASUREMENTS if not (each.work == "unlink" and each.system == "atoll")]
    slower.append(measured(MANY, "unlink", "atoll", 1, 1000))
    assert "| 2 MISSED |" in means_table(slower)
    assert Setting("redis", "own", 16).goal == 1
    assert Setting("postgresql", "shared", 16).goal is None


def test_counters_are_subtracted_and_added_where_both_were_counted() -> None:
    ours, theirs = counted(ours=True), counted(ours=False)
    assert ours.since(ours) == Counters(0, 0, 0.0, 0.0, 0.0, 0, 0, 0, 0)
    assert ours.plus(ours).batches == 200
    assert theirs.plus(theirs).statements == 16000
    assert ours.since(theirs).batches is None


def test_the_report_has_the_counters_for_each_operation_and_what_failed(tmp_path: Path) -> None:
    failures = [Failure(ONE, "juicefs", 2, "took longer than 5 s")]
    written = write_report(
        MEASUREMENTS, failures, amount="Empty files.", environment=ENVIRONMENT, rounds=3, output=tmp_path
    )
    assert "- postgresql, own, 1, juicefs, round 2: took longer than 5 s" in written
    [row] = [line for line in written.splitlines() if line.startswith("| postgresql | own | 16 | unlink | atoll |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")][5:]
    assert cells == ["0.11", "0.1", "2", "0.01", "20", "30", "500", "750", "250", "125"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["measurements"]) == len(MEASUREMENTS)
    assert content["failures"][0]["reason"] == "took longer than 5 s"
    assert (tmp_path / "results.md").read_text() == written
