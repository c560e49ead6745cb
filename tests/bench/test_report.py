"""The tables of the benchmark are the right medians and ratios."""

import json

from bench.environment import Environment
from bench.report import Failure, Measurement, document, summarise, table, text
from bench.works import MIB, Scale, Timing

SCALE = Scale(files_4k=10, files_64k=1, tree_files=1, random_reads=1, big_size_bytes=MIB)
ENVIRONMENT = Environment("6.1", "3.11.2", 2, 2**30, "ext4", 500.0, {"juicefs": "1.4.2"}, "abcdef0")


def measured(work: str, system: str, number: int, elapsed_s: float, pair: str = "s3") -> Measurement:
    size_bytes = 100 * MIB if work.startswith("big") else 0
    operations = 1 if work.startswith("big") else 1000
    p99_ns = None if work.startswith("big") else 5_000_000
    timing = Timing(operations, size_bytes, int(elapsed_s * 1e9), p99_ns, p99_ns)
    return Measurement(pair, work, system, number, timing, 0.5)


MEASUREMENTS = [
    *(measured("create-4k", "juicefs", number, elapsed_s) for number, elapsed_s in enumerate((4.0, 90.0, 3.0), 1)),
    *(measured("create-4k", "atoll", number, elapsed_s) for number, elapsed_s in enumerate((1.0, 0.1, 2.0), 1)),
    measured("big-write", "juicefs", 1, 0.5),
    measured("big-write", "atoll", 1, 1.0),
    measured("random-cold", "juicefs", 1, 1.0),
]


def test_a_row_is_the_median_of_its_rounds_in_its_unit() -> None:
    create, write, random = summarise(MEASUREMENTS)
    assert create.figure("juicefs") == 4000
    assert create.figure("atoll") == 1000
    assert create.p99_us == {"juicefs": 5000, "atoll": 5000}
    assert write.figure("juicefs") == 200
    assert write.p99_us == {}
    assert random.figure("atoll") is None


def test_a_ratio_above_one_means_faster_for_times_and_for_throughput() -> None:
    create, write, random = summarise(MEASUREMENTS)
    assert create.times_as_fast("atoll", other="juicefs") == 4
    assert create.goal_reached() is True
    assert write.times_as_fast("atoll", other="juicefs") == 0.5
    assert write.goal_reached() is False
    assert random.times_as_fast("atoll", other="juicefs") is None
    assert random.goal_reached() is None


def test_pairs_are_kept_apart() -> None:
    rows = summarise([*MEASUREMENTS, measured("create-4k", "juicefs", 1, 9.0, pair="directory")])
    assert [(row.pair, row.work.key) for row in rows] == [
        ("s3", "create-4k"),
        ("s3", "big-write"),
        ("s3", "random-cold"),
        ("directory", "create-4k"),
    ]


def test_the_table_is_aligned_and_shows_figures_ratios_and_goals() -> None:
    lines = table(summarise(MEASUREMENTS), ["atoll", "juicefs"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["work", "unit", "atoll", "juicefs", "atoll / juicefs", "goal"]
    assert cells[2] == ["create 4 KiB files", "us/op", "1,000", "4,000", "4x", "3x met"]
    assert cells[3] == ["big file, write and fsync", "MiB/s", "100", "200", "0.5x", "1x MISSED"]
    assert cells[4] == ["random 4 KiB, nothing cached", "us/op", "-", "1,000", "-", ""]


def test_what_failed_is_said_in_the_text_and_in_the_document() -> None:
    failures = [Failure("s3", "create-4k", "rclone", 2, "took longer than 5 s")]
    rows = summarise(MEASUREMENTS)
    written = text(rows, failures, ["atoll", "juicefs"], scale=SCALE, environment=ENVIRONMENT, rounds=3)
    assert "- s3, rclone, create-4k, round 2: took longer than 5 s" in written
    content = json.loads(document(rows, MEASUREMENTS, failures, scale=SCALE, environment=ENVIRONMENT))
    assert content["failures"][0]["reason"] == "took longer than 5 s"
    assert len(content["measurements"]) == len(MEASUREMENTS)
    assert content["summary"][0]["systems"]["atoll"]["times_as_fast_as_juicefs"] == 4
