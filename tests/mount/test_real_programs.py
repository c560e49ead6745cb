"""Programs that people run, on a mount: what they leave must be right while mounted, after a remount and in fsck's eyes.

The programs themselves judge wherever they can: `git fsck`, SQLite's integrity_check, `tar --compare`, PostgreSQL's
checksums and amcheck. Nothing here reaches beyond this machine.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

from tests.mount.mounted import MountedVolume
from tests.mount.trees import describe, differences, make_tree, set_times

PROGRAMS: Final = Path(__file__).with_name("programs")
PROGRAM_TIMEOUT_S: Final = 300

pytestmark = pytest.mark.timeout(600)


def run(
    *command: str | Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    user: pwd.struct_passwd | None = None,
) -> str:
    """Run a program to its end and return its stdout; fails with all its output unless it exits 0."""
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PG", "PIP_", "PYTHON"))
    }
    result = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=cwd,
        env={**outside, "LC_ALL": "C.UTF-8", **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=PROGRAM_TIMEOUT_S,
        user=None if user is None else user.pw_uid,
        group=None if user is None else user.pw_gid,
        extra_groups=None if user is None else [],
    )
    assert result.returncode == 0, (
        f"{command}: exit {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    )
    return result.stdout


def seeded(seed: int) -> random.Random:
    """Return a generator and print its seed, which pytest shows with a failure."""
    print(f"seed {seed}")  # noqa: T201
    return random.Random(seed)


# git


GIT_ENVIRONMENT: Final = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "A. Author",
    "GIT_AUTHOR_EMAIL": "author@example.org",
    "GIT_AUTHOR_DATE": "2024-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "A. Author",
    "GIT_COMMITTER_EMAIL": "author@example.org",
    "GIT_COMMITTER_DATE": "2024-01-01T00:00:00Z",
}


def git(repository: Path, *arguments: str) -> str:
    """Run git in a repository, with nobody's settings."""
    return run("git", "-C", repository, *arguments, environment=GIT_ENVIRONMENT)


def make_repository(path: Path, rng: random.Random) -> None:
    """Make a repository of 1,200 files in 60 directories with three commits and a tag, the same for the same seed."""
    path.mkdir()
    git(path, "init", "--quiet", "--initial-branch=main")
    for commit in range(3):
        for number in range(commit * 400, (commit + 1) * 400):
            file = path / f"part{number % 6}" / f"module{number % 10}" / f"source_{number}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"value_{line} = {rng.random()}\n" for line in range(rng.randrange(60))))
        (path / f"blob{commit}.bin").write_bytes(rng.randbytes(300_000))
        (path / "CHANGES").write_text(f"commit {commit}\n")
        if commit == 1:
            (path / "run.sh").write_text("#!/bin/sh\n")
            (path / "run.sh").chmod(0o755)
            (path / "link").symlink_to("part0/module0")
        git(path, "add", "--all")
        git(path, "commit", "--quiet", "--message", f"commit {commit}")
    git(path, "tag", "v1")


def test_a_git_repository_of_over_a_thousand_files_is_cloned_used_and_repacked(
    volume_on_each_bucket: MountedVolume, tmp_path: Path
) -> None:
    origin = tmp_path / "origin"
    make_repository(origin, seeded(1))
    clone = volume_on_each_bucket.path / "clone"
    git(tmp_path, "clone", "--quiet", f"file://{origin}", str(clone))
    assert len(git(clone, "ls-files").splitlines()) > 1000
    assert git(clone, "rev-parse", "HEAD^{tree}") == git(origin, "rev-parse", "HEAD^{tree}")
    git(clone, "fsck", "--full", "--strict")
    assert git(clone, "status", "--porcelain") == ""

    git(clone, "checkout", "--quiet", "-b", "work")
    git(clone, "mv", "part0", "renamed")
    (clone / "CHANGES").write_text("work\n")
    git(clone, "commit", "--quiet", "--all", "--message", "work")
    git(clone, "checkout", "--quiet", "main")
    git(clone, "merge", "--quiet", "--no-ff", "--no-edit", "work")
    git(clone, "worktree", "add", "--quiet", str(volume_on_each_bucket.path / "worktree"), "v1")
    git(clone, "gc", "--quiet", "--prune=now")
    head = git(clone, "rev-parse", "HEAD")

    volume_on_each_bucket.remount()
    git(clone, "fsck", "--full", "--strict")
    assert git(clone, "rev-parse", "HEAD") == head
    # Compares content, not only the times in the index.
    git(clone, "update-index", "--really-refresh")
    git(clone, "diff-index", "--exit-code", "HEAD")
    assert git(clone, "status", "--porcelain") == ""
    assert git(volume_on_each_bucket.path / "worktree", "status", "--porcelain") == ""


# SQLite


def test_sqlite_in_wal_mode_with_three_processes_at_once_loses_nothing(mounted_volume: MountedVolume) -> None:
    database = mounted_volume.path / "bank.db"
    connection = sqlite3.connect(database, isolation_level=None)
    assert connection.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    connection.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)")
    connection.execute("CREATE TABLE line (process INTEGER, step INTEGER, note BLOB, PRIMARY KEY (process, step))")
    connection.execute("CREATE INDEX line_note ON line (note)")
    connection.executemany("INSERT INTO account VALUES (?, 1000)", [(number,) for number in range(100)])

    transactions = 100
    processes = [
        subprocess.Popen([sys.executable, PROGRAMS / "sqlite_wal.py", database, str(number), str(transactions)])
        for number in range(3)
    ]
    assert [process.wait(PROGRAM_TIMEOUT_S) for process in processes] == [0, 0, 0]

    def verify(connection: sqlite3.Connection) -> None:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM line").fetchone() == (3 * transactions,)
        assert connection.execute("SELECT sum(balance) FROM account").fetchone() == (100_000,)

    verify(connection)
    connection.close()
    mounted_volume.remount()
    connection = sqlite3.connect(database)
    verify(connection)
    connection.execute("VACUUM")
    verify(connection)
    connection.close()


# tar and rsync


def test_a_tree_packed_and_unpacked_with_tar_is_the_same_there_and_back(
    volume_on_each_bucket: MountedVolume, tmp_path: Path
) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    make_tree(source, seeded(2))
    expected = describe(source)
    options = ("--format=posix", "--numeric-owner", "--xattrs", "--xattrs-include=user.*", "--acls", "--sparse")
    archive, unpacked = volume_on_each_bucket.path / "tree.tar", volume_on_each_bucket.path / "tree"
    run("tar", *options, "-C", source, "-cf", archive, ".")
    unpacked.mkdir()
    run("tar", *options, "-C", unpacked, "-xpf", archive)
    assert differences(expected, describe(unpacked)) == []
    run("tar", *options, "-C", unpacked, "--compare", "-f", archive)

    volume_on_each_bucket.remount_with_empty_cache()
    run("tar", *options, "-C", source, "--compare", "-f", archive)
    assert differences(expected, describe(unpacked)) == []
    run("tar", *options, "-C", unpacked, "-cf", tmp_path / "back.tar", ".")
    back.mkdir()
    run("tar", *options, "-C", back, "-xpf", tmp_path / "back.tar")
    assert differences(expected, describe(back)) == []


def test_a_tree_brought_with_rsync_is_the_same_there_and_back_and_a_second_run_copies_nothing(
    mounted_volume: MountedVolume, tmp_path: Path
) -> None:
    rng = seeded(3)
    source, back, copy = tmp_path / "source", tmp_path / "back", mounted_volume.path / "copy"
    make_tree(source, rng)
    rsync = ("rsync", "-aHAX", "--numeric-ids", "--delete", "--itemize-changes")
    run(*rsync, f"{source}/", f"{copy}/")
    assert differences(describe(source), describe(copy)) == []
    assert run(*rsync, "--checksum", f"{source}/", f"{copy}/") == ""

    # Changed in place, replaced, deleted and new files: what the second run of a backup meets.
    changed = [source / os.fsdecode(name) for name, entry in describe(source).items() if entry.size_bytes > 100_000]
    for path in changed[:4]:
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(50_000)
            file.write(rng.randbytes(1000))
    changed[4].unlink()
    shutil.rmtree(source / "empty directory")
    (source / "new").write_bytes(rng.randbytes(5000))
    set_times(source, rng)
    run(*rsync, f"{source}/", f"{copy}/")
    (source / "new").write_bytes(rng.randbytes(5001))
    set_times(source, rng)
    run(*rsync, "--inplace", "--no-whole-file", f"{source}/", f"{copy}/")
    assert differences(describe(source), describe(copy)) == []

    mounted_volume.remount_with_empty_cache()
    run(*rsync, f"{copy}/", f"{back}/")
    assert differences(describe(source), describe(back)) == []


# A C project


def make_c_project(path: Path, modules: int) -> None:
    """Write a C program of that many modules and headers with a Makefile that tracks which header is used where."""
    path.mkdir()
    for number in range(modules):
        (path / f"module{number}.h").write_text(
            f"#ifndef MODULE{number}_H\n#define MODULE{number}_H\n#define FACTOR{number} {number}L\n"
            f"long value{number}(long x);\n#endif\n"
        )
        used = [number, *([number - 1] if number else [])]
        calls = f" + value{number - 1}(x)" if number else ""
        (path / f"module{number}.c").write_text(
            "".join(f'#include "module{use}.h"\n' for use in used)
            + f"long value{number}(long x) {{ return FACTOR{number} * x{calls}; }}\n"
        )
    (path / "main.c").write_text(
        f'#include <stdio.h>\n#include "module{modules - 1}.h"\n'
        f'int main(void) {{ printf("%ld\\n", value{modules - 1}(2)); return 0; }}\n'
    )
    (path / "Makefile").write_text(
        "SOURCES := $(wildcard *.c)\nOBJECTS := $(SOURCES:%.c=build/%.o)\nCFLAGS := -O1 -g -Wall -Werror -MMD -MP\n"
        "build/program: build/libmodules.a\n\t$(CC) -o $@ build/main.o build/libmodules.a\n"
        "build/libmodules.a: $(OBJECTS)\n\trm -f $@\n\t$(AR) rcs $@ $^\n"
        "build/%.o: %.c | build\n\t$(CC) $(CFLAGS) -c -o $@ $<\nbuild:\n\tmkdir -p $@\n"
        "-include $(OBJECTS:.o=.d)\n"
    )


def test_a_c_project_builds_in_parallel_runs_and_builds_again_only_what_changed(mounted_volume: MountedVolume) -> None:
    modules = 40
    project = mounted_volume.path / "project"
    make_c_project(project, modules)
    run("make", "-j2", cwd=project)
    program = project / "build" / "program"
    assert int(run(program)) == 2 * sum(range(modules))
    run("make", "--question", cwd=project)

    header = project / "module7.h"
    header.write_text(header.read_text().replace("FACTOR7 7L", "FACTOR7 1007L"))
    compiled = [line for line in run("make", "-j2", cwd=project).splitlines() if " -c -o " in line]
    assert sorted(line.split()[-1] for line in compiled) == ["module7.c", "module8.c"]
    assert int(run(program)) == 2 * (sum(range(modules)) + 1000)

    mounted_volume.remount()
    run("make", "--question", cwd=project)
    assert int(run(program)) == 2 * (sum(range(modules)) + 1000)
    stripped = project / "stripped"
    run("strip", "-o", stripped, program)
    assert int(run(stripped)) == 2 * (sum(range(modules)) + 1000)


# HDF5 and numpy


def test_an_hdf5_file_grows_in_chunks_is_changed_in_place_and_reads_back_the_same(
    volume_on_each_bucket: MountedVolume,
) -> None:
    rng = np.random.default_rng(4)
    path = volume_on_each_bucket.path / "trajectory.h5"
    positions = rng.standard_normal((400, 64, 3))
    frames = rng.integers(0, 255, (24, 512, 512), dtype=np.uint8)
    with h5py.File(path, "w") as file:
        file.attrs["kind"] = "trajectory"
        file.create_dataset("frames", data=frames)
        data = file.create_dataset(
            "positions",
            (0, 64, 3),
            dtype="f8",
            maxshape=(None, 64, 3),
            chunks=(16, 64, 3),
            compression="gzip",
            fletcher32=True,
        )
        for start in range(0, 400, 25):
            data.resize(start + 25, axis=0)
            data[start : start + 25] = positions[start : start + 25]
            file.flush()
    with h5py.File(path, "r+") as file:
        file["positions"][100:110] = 7.0
        positions[100:110] = 7.0
        file["frames"][5] = 255
        frames[5] = 255
        file.create_dataset("late", data=np.arange(100_000))
        file.move("late", "group/moved")

    def verify() -> None:
        with h5py.File(path, "r") as file:
            assert file.attrs["kind"] == "trajectory"
            for row in rng.integers(0, 400, 50):
                np.testing.assert_array_equal(file["positions"][row], positions[row])
            np.testing.assert_array_equal(file["positions"][:], positions)
            np.testing.assert_array_equal(file["frames"][:], frames)
            assert int(file["group/moved"][99_999]) == 99_999

    verify()
    volume_on_each_bucket.remount_with_empty_cache()
    verify()


def test_an_hdf5_file_is_read_by_another_process_while_it_is_appended_to(mounted_volume: MountedVolume) -> None:
    rows, columns = 200, 50
    path = mounted_volume.path / "live.h5"
    with h5py.File(path, "w", libver="latest") as file:
        data = file.create_dataset("data", (0, columns), maxshape=(None, columns), chunks=(10, columns), dtype="i8")
        file.swmr_mode = True
        command = [sys.executable, str(PROGRAMS / "hdf5_reader.py"), str(path), str(rows)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
            try:
                assert reader.stdout is not None
                assert reader.stdout.readline() == "ready\n"
                for row in range(rows):
                    data.resize(row + 1, axis=0)
                    data[row] = np.arange(row, row + columns)
                    data.flush()
                assert reader.wait(PROGRAM_TIMEOUT_S) == 0
            finally:
                reader.kill()


def test_numpy_arrays_mapped_into_memory_are_written_and_read_back_the_same(mounted_volume: MountedVolume) -> None:
    program = (sys.executable, PROGRAMS / "numpy_arrays.py")
    run(*program, "write", mounted_volume.path)
    run(*program, "verify", mounted_volume.path)
    mounted_volume.remount()
    run(*program, "verify", mounted_volume.path)
    mounted_volume.remount_with_empty_cache()
    run(*program, "verify", mounted_volume.path)


# PostgreSQL


class PostgreSQL:
    """Hold a database cluster on the mount, served on a unix socket only, by a user that is not root."""

    def __init__(self, programs: Path, data: Path, socket_directory: Path) -> None:
        self.programs = programs
        self.data = data
        self.socket_directory = socket_directory
        # Anybody but root will do; Debian's package makes the user `postgres`.
        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        self.user = pwd.getpwuid(os.geteuid())
        if self.user.pw_uid == 0:
            self.user = names.get("postgres", names["nobody"])
            os.chown(socket_directory, self.user.pw_uid, self.user.pw_gid)

    def run(self, program: str, *arguments: str | Path) -> str:
        """Run one of PostgreSQL's programs as the cluster's user."""
        environment = {"PGHOST": str(self.socket_directory), "PGUSER": "bench", "PGDATABASE": "postgres", "PGTZ": "UTC"}
        # Not in pytest's directories, which that user may not enter.
        return run(self.programs / program, *arguments, cwd=Path("/"), environment=environment, user=self.user)

    def query(self, sql: str) -> str:
        """Return what a query answers, unaligned, without headings."""
        return self.run("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql).strip()

    @contextmanager
    def serving(self, *, stop_mode: str) -> Iterator[None]:
        """Serve the cluster while the body runs; `immediate` leaves it as a crash would, to be recovered at next start."""
        log = self.socket_directory / "log"
        options = f"-c listen_addresses= -k {self.socket_directory} -c shared_buffers=32MB -c max_wal_size=64MB"
        self.run("pg_ctl", "-D", self.data, "-l", log, "-w", "-t", "120", "-o", options, "start")
        try:
            yield
        except BaseException:
            print(log.read_text())  # noqa: T201
            self.run("pg_ctl", "-D", self.data, "-w", "-t", "120", "-m", "immediate", "stop")
            raise
        self.run("pg_ctl", "-D", self.data, "-w", "-t", "120", "-m", stop_mode, "stop")

    def verify(self, transactions: int) -> None:
        """Check pgbench's invariant (all balances tell the same sum), that no commit is lost, and every heap and index."""
        accounts, tellers, branches, history, count = self.query(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),"
            " (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history),"
            " (SELECT count(*) FROM pgbench_history)"
        ).split("|")
        assert accounts == tellers == branches == history
        assert int(count) == transactions
        self.run("pg_amcheck", "--install-missing", "--heapallindexed", "--parent-check", "postgres")


@pytest.fixture
def socket_directory() -> Iterator[Path]:
    """Yield a directory whose path is short enough for a socket (107 bytes), open to the user of a server."""
    with tempfile.TemporaryDirectory(prefix="atoll-pg-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        yield path


@pytest.mark.parametrize(
    ("scale", "transactions"),
    [pytest.param(1, 60, id="short"), pytest.param(10, 2000, id="long", marks=pytest.mark.slow)],
)
def test_postgresql_is_set_up_runs_pgbench_recovers_from_a_crash_and_verifies_its_checksums(
    mounted_volume: MountedVolume, postgresql_programs: Path, socket_directory: Path, scale: int, transactions: int
) -> None:
    cluster = PostgreSQL(postgresql_programs, mounted_volume.path / "pgdata", socket_directory)
    cluster.data.mkdir(mode=0o700)
    os.chown(cluster.data, cluster.user.pw_uid, cluster.user.pw_gid)
    cluster.run(
        "initdb", "-D", cluster.data, "-U", "bench", "-A", "trust", "--data-checksums", "--no-locale", "-E", "UTF8"
    )
    with cluster.serving(stop_mode="immediate"):
        cluster.run("pgbench", "--quiet", "-i", "-s", str(scale))
        cluster.run("pgbench", "-n", "-c", "2", "-j", "2", "-t", str(transactions))
    with cluster.serving(stop_mode="fast"):  # replays the log first
        cluster.verify(2 * transactions)
        cluster.query("VACUUM FULL pgbench_accounts")
        cluster.query("CREATE DATABASE copied")
    cluster.run("pg_checksums", "--check", "-D", cluster.data)

    mounted_volume.remount()
    cluster.run("pg_checksums", "--check", "-D", cluster.data)
    with cluster.serving(stop_mode="fast"):
        cluster.verify(2 * transactions)


# pip


def make_wheel(directory: Path, modules: int) -> Path:
    """Make a wheel with a package of that many modules, data and a command; as pip wants it, down to the RECORD."""
    files = {
        **{f"reef/module{number}.py": f"VALUE = {number}\n" for number in range(modules)},
        "reef/__init__.py": "",
        "reef/data/table.bin": "x" * 300_000,
        "reef/main.py": (
            "import importlib, pathlib\n\n\n"
            "def main():\n"
            f"    total = sum(importlib.import_module(f'reef.module{{n}}').VALUE for n in range({modules}))\n"
            "    print(total, (pathlib.Path(__file__).parent / 'data' / 'table.bin').stat().st_size)\n"
        ),
        "reef-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: reef\nVersion: 1.0\n",
        "reef-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "reef-1.0.dist-info/entry_points.txt": "[console_scripts]\nreef = reef.main:main\n",
    }
    record = "reef-1.0.dist-info/RECORD"
    files[record] = "".join(f"{name},,\n" for name in (*files, record))
    wheel = directory / "reef-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), content)
    return wheel


@pytest.mark.parametrize(
    ("venv_options", "modules"),
    [
        pytest.param(("--without-pip",), 150, id="pip from outside"),
        pytest.param((), 400, id="pip of its own", marks=pytest.mark.slow),
    ],
)
def test_pip_installs_into_a_virtual_environment_and_takes_out_again_what_it_put_there(
    mounted_volume: MountedVolume, tmp_path: Path, venv_options: tuple[str, ...], modules: int
) -> None:
    wheel = make_wheel(tmp_path, modules)
    environment = mounted_volume.path / "venv"
    run(sys.executable, "-m", "venv", *venv_options, environment)
    python = environment / "bin" / "python"
    pip: tuple[str | Path, ...] = (python, "-m", "pip")
    if venv_options:
        pip = (sys.executable, "-m", "pip", "--python", python)
    pip = (*pip, "--isolated", "--disable-pip-version-check", "--no-cache-dir")
    expected = f"{sum(range(modules))} 300000\n"
    run(*pip, "install", "--no-index", wheel)
    assert run(environment / "bin" / "reef") == expected
    run(*pip, "check")

    mounted_volume.remount()
    assert run(environment / "bin" / "reef") == expected
    run(*pip, "install", "--no-index", "--force-reinstall", wheel)
    assert run(environment / "bin" / "reef") == expected
    run(*pip, "uninstall", "--yes", "reef")
    assert list(environment.rglob("reef*")) == []
    run(*pip, "check")
