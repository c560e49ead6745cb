"""The operations on names do what they say on a plain directory, by all processes, and see what is wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.meta_works import WORKS, Options, directory_of, names_of, run_work
from bench.works import Mismatch


def options(*, processes: int = 3, files: int = 7, shared: bool = False, limit_s: float = 60) -> Options:
    return Options(processes, files, shared, at_least_s=0.05, limit_s=limit_s)


@pytest.mark.parametrize("layout", ["own", "shared"])
def test_each_work_counts_what_all_processes_did_and_leaves_nothing_at_the_end(tmp_path: Path, layout: str) -> None:
    shared = layout == "shared"
    counts = {}
    for name in ("create", "stat", "stat_again", "readdir", "rename", "unlink"):
        timing = run_work(name, tmp_path, options(shared=shared))
        assert timing.elapsed_ns > 0
        counts[name] = timing.operations
        if name == "create":
            directories = {directory_of(tmp_path, options(shared=shared), process) for process in range(3)}
            assert len(directories) == (1 if shared else 3)
            assert sum(len(os.listdir(directory)) for directory in directories) == 21
    assert set(counts) == set(WORKS)
    assert counts["stat_again"] > 21
    assert counts["stat_again"] % 7 == 0
    # In the shared directory each process lists the files of all.
    assert counts["readdir"] == (63 if shared else 21)
    assert {counts[name] for name in ("create", "stat", "rename", "unlink")} == {21}
    assert os.listdir(tmp_path) == []


def test_the_clock_runs_as_long_as_the_repeated_work_is_to_take(tmp_path: Path) -> None:
    run_work("create", tmp_path, options())
    assert run_work("stat_again", tmp_path, options()).elapsed_ns >= 50_000_000


def test_processes_never_share_a_name() -> None:
    names = [name for process in range(16) for name in names_of(options(files=50), process)]
    assert len(set(names)) == 16 * 50


def test_a_name_too_many_or_too_few_is_seen(tmp_path: Path) -> None:
    run_work("create", tmp_path, options())
    extra = Path(directory_of(tmp_path, options(), 1)) / "extra"
    extra.touch()
    with pytest.raises(Mismatch, match="entries"):
        run_work("readdir", tmp_path, options())
    with pytest.raises(Mismatch, match="not the names that rename leaves"):
        run_work("rename", tmp_path, options())
    extra.unlink()
    (extra.parent / "renamed.001.000003").unlink()
    with pytest.raises(Mismatch, match="FileNotFoundError"):
        run_work("unlink", tmp_path, options())


def test_a_file_that_is_there_already_is_no_create(tmp_path: Path) -> None:
    run_work("create", tmp_path, options())
    for process in range(3):
        Path(directory_of(tmp_path, options(), process)).rename(tmp_path / f"old-{process}")
    run_work("create", tmp_path, options())
    (tmp_path / "process-000" / "file.000.000000").write_bytes(b"x")
    with pytest.raises(Mismatch, match="not empty"):
        run_work("stat", tmp_path, options())


def test_a_process_that_hangs_is_ended_at_the_limit(tmp_path: Path) -> None:
    begin_s = time.monotonic()
    run_work("create", tmp_path, options())
    with pytest.raises(Mismatch, match="did not end in time"):
        run_work("stat_again", tmp_path, Options(2, 7, False, at_least_s=600, limit_s=0.5))
    assert time.monotonic() - begin_s < 300


def test_a_work_in_a_process_of_its_own_tells_its_timing_or_one_line_of_error(tmp_path: Path) -> None:
    given = json.dumps(
        {"processes": 2, "files": 3, "shared": False, "at_least_s": 0.05, "limit_s": 60},
    )

    def process(work: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bench.meta_works", work, str(tmp_path), given]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    failed = process("stat")
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert "FileNotFoundError" in failed.stderr
    done = process("create")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["operations"] == 6
