"""What a tree must look like after `programs/writer.py` worked on it, however the file system ended.

Owns the model: a tree of files in memory to which the steps of the log are applied. A step that was acknowledged must be
there. The one that was under way may have happened or not; if it wrote data, each byte of its range may be old or new, as
POSIX has it for a write without fsync. Nothing else may differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from tests.mount.programs.writer import content

DATA_STEPS: Final = frozenset({"new_file", "write", "append"})
Step = dict[str, Any]


class StateDiffers(AssertionError):
    """Tell which names are not what the log allows."""


@dataclass(slots=True, eq=False)
class Node:
    """Hold one file, directory or link; several names may share a file."""

    kind: str
    mode: int
    data: bytes = b""
    note: bytes | None = None


class Log(NamedTuple):
    """Hold what one run of the writer left in its log. A step has the times `at_ns` and, when it was done, `done_ns`."""

    acknowledged: list[Step]
    under_way: Step | None
    errno: int | None
    message: str

    def during(self, moment_ns: int) -> Step | None:
        """Return the acknowledged step that was under way at a moment of CLOCK_MONOTONIC, if there was one."""
        for step in reversed(self.acknowledged):
            if step["at_ns"] < moment_ns:
                return step if moment_ns < step["done_ns"] else None
        return None


def read_log(path: Path) -> Log:
    """Read a log; a last line without newline was being written and does not count."""
    acknowledged: list[Step] = []
    announced: Step | None = None
    errno, message = None, ""
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            entry = json.loads(line)
            if entry.get("done"):
                assert announced is not None
                assert entry["step"] == announced["step"]
                acknowledged.append({**announced, "done_ns": entry["at_ns"]})
                announced = None
            elif "errno" in entry:
                errno, message = entry["errno"], entry["message"]
            else:
                assert announced is None
                announced = entry
    return Log(acknowledged, announced, errno, message)


@dataclass(slots=True)
class Model:
    """Hold the names below the writer's directory, by relative path without a slash at the end."""

    names: dict[str, Node] = field(default_factory=dict)

    def apply(self, step: Step) -> None:
        """Apply one step that happened."""
        name = step["name"]
        match step["op"]:
            case "new_file":
                self.names[name] = Node("file", 0o644, content(step["token"], step["size"]))
            case "create":
                self.names[name] = Node("file", 0o644)
            case "write" | "append":
                node = self.names[name]
                offset = step.get("offset", len(node.data))
                node.data = overlaid(node.data, content(step["token"], step["size"]), offset)
            case "truncate":
                node = self.names[name]
                node.data = node.data[: step["size"]].ljust(step["size"], b"\0")
            case "rename":
                moved = {path: node for path, node in self.names.items() if path == name or path.startswith(name + "/")}
                for path in moved:
                    del self.names[path]
                for path, node in moved.items():
                    self.names[step["to"] + path[len(name) :]] = node
            case "mkdir":
                self.names[name] = Node("directory", 0o755)
            case "rmdir" | "unlink":
                del self.names[name]
            case "link":
                self.names[step["to"]] = self.names[name]
            case "symlink":
                self.names[name] = Node("link", 0o777, step["target"].encode())
            case "chmod":
                self.names[name].mode = step["mode"]
            case "setxattr":
                self.names[name].note = step["value"].encode()
            case other:
                raise AssertionError(f"no such step: {other}")

    def copy(self) -> Model:
        """Return a model that shares nothing with this one."""
        nodes = {id(node): Node(node.kind, node.mode, node.data, node.note) for node in self.names.values()}
        return Model({name: nodes[id(node)] for name, node in self.names.items()})

    def settle(self, log: Log, root: Path) -> None:
        """Apply a log, compare with what is there, and take over how the step under way came out.

        Raises StateDiffers if what is there is not one of the states that the log allows. Reads every byte below `root`.
        """
        for step in log.acknowledged:
            self.apply(step)
        actual = read_tree(root)
        if log.under_way is None:
            self._demand(actual, "all acknowledged")
            return
        after = self.copy()
        if log.under_way["op"] in DATA_STEPS:
            problem = after._take_over_data(log.under_way, actual)
        else:
            after.apply(log.under_way)
            problem = []
        without, with_it = compare(self.names, actual), problem + compare(after.names, actual)
        if with_it and without:
            raise StateDiffers(
                f"step under way: {log.under_way}\nas if it had not happened: {without}\nas if it had: {with_it}"
            )
        if not with_it:
            self.names = after.names

    def _demand(self, actual: dict[str, Node], when: str) -> None:
        found = compare(self.names, actual)
        if found:
            raise StateDiffers(f"{when}: {found}")

    def _take_over_data(self, step: Step, actual: dict[str, Node]) -> list[str]:
        """Let a write that was under way have come as far as it did; returns what it can't have done."""
        name = step["name"]
        if name not in actual:
            return [f"{name}: missing"]
        if step["op"] == "new_file":
            self.names[name] = Node("file", 0o644)
        node = self.names[name]
        offset = step.get("offset", len(node.data))
        problem = impossible(node.data, content(step["token"], step["size"]), offset, actual[name].data)
        node.data = actual[name].data
        return [f"{name}: {problem}"] if problem else []


def overlaid(old: bytes, new: bytes, offset: int) -> bytes:
    """Return the content after a write of `new` at `offset`; a gap before it is zeros, an empty write changes nothing."""
    if not new:
        return old
    return old[:offset].ljust(offset, b"\0") + new + old[offset + len(new) :]


def impossible(old: bytes, new: bytes, offset: int, actual: bytes) -> str | None:
    """Say why no part of a write can have made `actual` of `old`; None if some part can, byte by byte."""
    whole = overlaid(old, new, offset)
    if not len(old) <= len(actual) <= len(whole):
        return f"size {len(actual)}, not within [{len(old)}, {len(whole)}]"
    seen = np.frombuffer(actual, np.uint8)
    before = np.frombuffer(old[: len(actual)].ljust(len(actual), b"\0"), np.uint8)
    after = np.frombuffer(whole[: len(actual)], np.uint8)
    wrong = np.flatnonzero((seen != before) & (seen != after))
    if len(wrong):
        return f"{len(wrong)} bytes neither old nor new, the first at {wrong[0]}, the last at {wrong[-1]}"
    return None


def read_tree(root: Path) -> dict[str, Node]:
    """Read all below `root`; names of one file share a node. AssertionError where a file counts other links than there are."""
    names: dict[str, Node] = {}
    nodes: dict[int, Node] = {}
    links: Counter[int] = Counter()
    counted: dict[int, int] = {}
    for directory, subdirectories, files in os.walk(root):
        for entry in (*subdirectories, *files):
            path = os.path.join(directory, entry)
            status = os.lstat(path)
            if status.st_ino not in nodes:
                nodes[status.st_ino] = read_node(path, status)
            names[os.path.relpath(path, root)] = nodes[status.st_ino]
            if not stat.S_ISDIR(status.st_mode):
                links[status.st_ino] += 1
                counted[status.st_ino] = status.st_nlink
    assert counted == links, f"links counted and found: {counted.items() ^ links.items()}"
    return names


def read_node(path: str, status: os.stat_result) -> Node:
    """Read one file, link or directory, its size checked against its content."""
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        return Node("directory", mode)
    if stat.S_ISLNK(status.st_mode):
        return Node("link", mode, os.fsencode(os.readlink(path)))
    data = Path(path).read_bytes()
    assert len(data) == status.st_size, f"{path}: {len(data)} bytes where stat says {status.st_size}"
    note = os.getxattr(path, "user.note") if "user.note" in os.listxattr(path) else None
    return Node("file", mode, data, note)


def compare(expected: dict[str, Node], actual: dict[str, Node]) -> list[str]:
    """Return one line for each name that differs, at most 20."""
    lines = []
    for name in sorted(expected.keys() | actual.keys()):
        before, after = expected.get(name), actual.get(name)
        if before is None or after is None:
            lines.append(f"{name}: {'missing' if after is None else 'not expected'}")
        elif summary(before) != summary(after):
            lines.append(
                f"{name}: {summary(before)} became {summary(after)}{first_difference(before.data, after.data)}"
            )
    if groups(expected) != groups(actual):
        lines.append(f"hard links: {groups(expected) ^ groups(actual)}")
    return lines[:20]


def summary(node: Node) -> tuple[str, str, int, str, bytes | None]:
    """Return what two nodes must have in common."""
    return node.kind, oct(node.mode), len(node.data), hashlib.sha256(node.data).hexdigest()[:16], node.note


def first_difference(expected: bytes, actual: bytes) -> str:
    """Say where two contents part, in words that help to see whose mistake it is; nothing if they do not."""
    common = min(len(expected), len(actual))
    differing = np.flatnonzero(np.frombuffer(expected[:common], np.uint8) != np.frombuffer(actual[:common], np.uint8))
    if not len(differing):
        return ""
    start, end = int(differing[0]), int(differing[-1]) + 1
    zeros = " (all of it zeros)" if not any(actual[start:end]) else ""
    return f", differing in [{start}, {end}){zeros}"


def groups(names: dict[str, Node]) -> set[frozenset[str]]:
    """Return which names are one file, for files with several."""
    by_node: dict[int, set[str]] = {}
    for name, node in names.items():
        by_node.setdefault(id(node), set()).add(name)
    return {frozenset(group) for group in by_node.values() if len(group) > 1}


def count_lines(paths: Iterable[Path]) -> int:
    """Count the lines of logs that are being written."""
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())
