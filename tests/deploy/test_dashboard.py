"""The dashboard asks for metrics that there are, with labels that they have.

docs/guides/metrics.md stands for what mounts and services answer: tests/mount/test_metrics.py compares names and labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.mount.test_metrics import documented_labels

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "atoll.json"
SECTIONS = ("Of a service", "Of a mount")
OF_THE_TARGET = {"instance"}
"""Labels that Prometheus adds."""
HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def queries() -> Iterator[tuple[str, str]]:
    """Yield the title of a panel and each of its queries; those of the variables, too."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


def known() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for section in SECTIONS:
        for name, labels in documented_labels(section).items():
            found.setdefault(name, set()).update(labels)
    return found


def metrics_in(query: str) -> dict[str, str]:
    """Return the metrics of a query, each with how it is written there."""
    return {HISTOGRAM.sub("", name): name for name in re.findall(r"\batoll_\w+", query)}


def test_every_metric_of_a_query_exists() -> None:
    metrics = known()
    histograms = {"atoll_meta_request_duration_seconds", "atoll_meta_batch_rows", "atoll_meta_commit_duration_seconds"}
    histograms.add("atoll_fuse_request_duration_seconds")
    asked = set()
    for title, query in queries():
        found = metrics_in(query)
        assert found, (title, query)
        for name, written in found.items():
            assert name in metrics, (title, written)
            assert (written != name) == (name in histograms), (title, written)
            asked.add(name)
    assert len(asked) > 45


def test_every_label_of_a_query_is_one_of_its_metrics() -> None:
    metrics = known()
    for title, query in queries():
        have = OF_THE_TARGET | set().union(*(metrics[name] for name in metrics_in(query)))
        # Prometheus gives its own label `job` precedence, and calls the metric's so.
        have = {"exported_job" if label == "job" else label for label in have}
        if "_bucket" in query:
            have.add("le")
        grouped = {label.strip() for inner in re.findall(r"\bby \(([^)]*)\)", query) for label in inner.split(",")}
        matched = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", query))
        listed = {label for _, label in re.findall(r"label_values\((\w+), (\w+)\)", query)}
        assert grouped | matched | listed <= have, (title, query)


def test_legends_name_labels_that_the_query_keeps() -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = {
                label.strip() for inner in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in inner.split(",")
            }
            assert named <= kept - {"le"}, (panel["title"], target)


def test_counters_are_asked_for_their_rate_and_gauges_are_not() -> None:
    for title, query in queries():
        for written in metrics_in(query).values():
            if "label_values" in query:
                continue
            is_counter = written.endswith("_total") or HISTOGRAM.search(written) is not None
            is_rate = re.search(rf"(rate|increase)\({written}\b", query) is not None
            assert is_counter == is_rate, (title, written)


def test_queries_are_balanced_and_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken.get((x, y)))
                taken[x, y] = panel["title"]
    for title, query in queries():
        for opening, closing in ("()", "[]", "{}"):
            assert query.count(opening) == query.count(closing), (title, query)


def test_what_people_look_for_has_a_panel() -> None:
    asked = set().union(*(metrics_in(query) for _, query in queries()))
    for name in (
        "atoll_meta_request_duration_seconds",
        "atoll_meta_commit_duration_seconds",
        "atoll_meta_batch_rows",
        "atoll_meta_memory_bytes",
        "atoll_meta_sessions",
        "atoll_meta_leases",
        "atoll_meta_lease_recalls_total",
        "atoll_meta_owner_epoch",
        "atoll_tenant_used_bytes",
        "atoll_tenant_max_bytes",
        "atoll_bucket_requests_total",
        "atoll_bucket_bytes_total",
        "atoll_chunk_cache_hit_bytes_total",
        "atoll_chunk_staged_bytes",
        "atoll_meta_jobs_failures_total",
        "atoll_meta_backup_age_seconds",
        "atoll_fuse_request_duration_seconds",
    ):
        assert name in asked, name
