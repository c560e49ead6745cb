"""Processes and mounts of the benchmark end, whatever happens. The mounts need root."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.processes import (
    StepFailed,
    end_process,
    go_on_unless_interrupted,
    has_ended,
    is_mounted,
    no_mount_left,
    run_step,
    running,
    unmount,
    wait_until,
)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_step_gives_what_it_printed(tmp_path: Path) -> None:
    assert run_step(python("print('out')"), log=tmp_path / "step", limit_s=60) == "out\n"


def test_a_failing_step_is_told_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="exit status 3: the reason"):
        run_step(
            python("import sys; print('x\\nthe reason', file=sys.stderr); sys.exit(3)"),
            log=tmp_path / "step",
            limit_s=60,
        )


def test_a_step_is_ended_at_its_limit_with_what_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = f"""
import os, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
child.wait()
"""
    with pytest.raises(StepFailed, match="took longer than 2 s"):
        run_step(python(program), log=tmp_path / "step", limit_s=2)
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    wait_until(lambda: all(map(has_ended, started)), what="end of both", deadline_s=60)


def test_a_daemon_that_a_step_leaves_behind_does_not_hold_it(tmp_path: Path) -> None:
    program = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)"
    pid = int(run_step(python(program), log=tmp_path / "step", limit_s=60))
    assert not has_ended(pid)
    end_process(pid)
    assert has_ended(pid)


def test_a_process_that_nobody_has_waited_for_has_ended() -> None:
    child = subprocess.Popen(["true"])
    wait_until(lambda: has_ended(child.pid), what="end of the child", deadline_s=60)
    assert Path(f"/proc/{child.pid}").exists()
    child.wait(60)


def test_a_process_that_ignores_the_goodbye_of_its_block_is_killed_with_its_session(tmp_path: Path) -> None:
    program = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
    with running(python(program), log=tmp_path / "log") as child:
        wait_until(lambda: not child.alive(), what="end, as its input is closed", deadline_s=60)
        grandchild = int((tmp_path / "log").read_text().splitlines()[0])
        assert not has_ended(grandchild)
    wait_until(lambda: has_ended(grandchild), what=f"end of {grandchild}", deadline_s=60)


def test_waiting_ends_when_the_child_has_ended(tmp_path: Path) -> None:
    with (
        running(python("print('no such option')"), log=tmp_path / "log", goodbye=signal.SIGKILL) as child,
        pytest.raises(StepFailed, match="the process ended: no such option"),
    ):
        wait_until(lambda: False, what="server", deadline_s=60, child=child)


def test_a_mount_with_blanks_in_its_name_is_seen_and_never_left_behind(tmp_path: Path) -> None:
    mountpoint = tmp_path / "a b"
    mountpoint.mkdir()
    assert not is_mounted(mountpoint)
    with no_mount_left(mountpoint):
        subprocess.run(["mount", "-t", "tmpfs", "none", str(mountpoint)], check=True)
        assert is_mounted(mountpoint)
    assert not is_mounted(mountpoint)


def test_an_unmount_that_fails_is_told_and_done_by_force(tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with no_mount_left(mountpoint):
        subprocess.run(["mount", "-t", "tmpfs", "none", str(mountpoint)], check=True)
        with (mountpoint / "open").open("w"), pytest.raises(StepFailed, match="umount"):
            unmount(mountpoint, ["umount", str(mountpoint)], log=tmp_path / "umount")
        assert not is_mounted(mountpoint)


def test_an_error_of_the_unwinding_does_not_hide_the_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        try:
            try:
                raise KeyboardInterrupt
            finally:
                raise StepFailed("the mount hangs")
        except StepFailed as error:
            go_on_unless_interrupted(error)
    go_on_unless_interrupted(StepFailed("alone"))
