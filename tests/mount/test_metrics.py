"""Metrics over HTTP: the page in docs names what mounts and services answer, and nothing else."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.mount.mounted import atoll, mounted
from tests.mount.service import mounted_from, service
from tests.mount.stores import about_embedded_volumes
from tests.servers.ports import free_ports

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "metrics.md"
SUFFIXES = re.compile(r"(_bucket|_sum|_count|_created)$")


def scrape(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return str(answer.read().decode())


def names(text: str) -> set[str]:
    """Return the names of metrics, histograms without their suffixes."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE))
    found = set()
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name = re.split(r"[{ ]", line, maxsplit=1)[0]
        bare = SUFFIXES.sub("", name)
        if name != bare and (kinds.get(bare) == "histogram" or name.endswith("_created")):
            name = bare if kinds.get(bare) == "histogram" else f"{bare}_total"
        found.add(name)
    return found


def documented(section: str) -> set[str]:
    """Return the names in the tables of a part of the page."""
    part = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return {re.sub(r"\{.*\}", "", name) for row in rows for name in re.findall(r"`([^`]+)`", row)}


def labels(text: str) -> dict[str, set[str]]:
    """Return the labels of each metric that has samples, but for those of histograms' buckets."""
    found: dict[str, set[str]] = {}
    for name, inner in re.findall(r"^(atoll_\w+?)(?:_bucket|_sum|_count)?(?:\{(.*)\})? \S+$", text, flags=re.MULTILINE):
        found.setdefault(name, set()).update(set(re.findall(r'(\w+)="', inner)) - {"le"})
    return found


def documented_labels(section: str) -> dict[str, set[str]]:
    """Return the labels of each metric in the tables of a part of the page."""
    part = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    found = re.findall(r"`(\w+)(?:\{([\w,]*)\})?`", " ".join(rows))
    return {name: {label for label in inner.split(",") if label} for name, inner in found}


def work(path: Path) -> None:
    """Do something of everything that counts."""
    (path / "small").write_bytes(b"x")
    (path / "big").write_bytes(os.urandom(300_000))
    assert (path / "big").stat().st_size == 300_000
    os.listdir(path)
    with pytest.raises(FileNotFoundError):
        (path / "absent").stat()


@about_embedded_volumes
def test_the_page_names_every_metric_and_no_other(tmp_path: Path) -> None:
    [port, other_port, service_port] = free_ports(3)
    seen: set[str] = set()
    (tmp_path / "embedded").mkdir()
    with mounted(tmp_path / "embedded", mount_options=("--metrics", f"127.0.0.1:{port}", "--backup", "1h")) as volume:
        work(volume.path)
        seen |= names(scrape(port))
        assert names((volume.path / ".atoll" / "stats").read_text()) == names(scrape(port))
    (tmp_path / "bucket").mkdir()
    with (
        service(
            tmp_path, options=("--metrics", f"127.0.0.1:{service_port}", "--memory", "3MiB", "--backup", "1h")
        ) as running,
        mounted_from(
            running,
            tmp_path,
            "--bucket",
            f"file://{tmp_path}/bucket",
            mount_options=("--metrics", f"127.0.0.1:{other_port}"),
        ) as volume,
    ):
        work(volume.path)
        seen |= names(scrape(other_port))
        known = documented_labels("Of a mount")
        assert {name: known[name] for name in labels(scrape(other_port))} == labels(scrape(other_port))
        text = scrape(service_port)
        assert names(text) | {"atoll_meta_requests_repeated_total"} == documented("Of a service")
        known = documented_labels("Of a service")
        for name, found in labels(text).items():
            if not name.endswith("_created"):
                assert known[name] == found, name
        assert re.search(r'atoll_meta_request_duration_seconds_count\{op="create"\} 2\.0', text)
        assert 'atoll_meta_sessions_connected{volume="acme/data"} 1.0' in text
        assert re.search(r'atoll_meta_memory_limit_bytes\{volume="acme/data"\} 3\.145728e\+06', text)
        with pytest.raises(urllib.error.HTTPError):
            scrape(service_port, "/other")
        shown = atoll("top", str(volume.path), "--count", "1", "--interval", "0.2")
        assert shown.returncode == 0, shown
        assert "operations/s" in shown.stdout
        shown = atoll("top", running.address(), "--count", "1", "--interval", "0.2", environment=volume.environment)
        assert shown.returncode == 0, shown
        assert str(volume.path) in shown.stdout
        assert re.search(r"^owner atoll://[\d.:]+, epoch \d+$", shown.stdout, re.MULTILINE)
        assert re.search(r"^tenant acme: .* used of unlimited, ", shown.stdout, re.MULTILINE)
        assert 'atoll_tenant_max_bytes{tenant="acme"} 0.0' in text
    assert seen == documented("Of a mount")


def test_a_port_that_is_taken_or_nonsense_is_told_in_one_line(tmp_path: Path) -> None:
    with service(tmp_path) as running:
        for listen in (f"127.0.0.1:{running.port}", "nonsense", "127.0.0.1:70000"):
            ran = atoll("serve", "--store", running.store, "--listen", "127.0.0.1:0", "--metrics", listen)
            assert ran.returncode == 1
            (line,) = ran.stderr.splitlines()[-1:]
            assert "give" in line
        ran = atoll("serve", "--store", running.store, "--listen", "127.0.0.1:0", "--memory", "1000")
        assert ran.returncode != 0
        assert "give at least 1MiB" in ran.stderr
