"""What is packaged is what is in the tree: no package forgotten, none by accident, schemas and type markers included."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOT_PACKAGES = ("atollfs", "chunkstore", "client", "metasvc", "migrations")


def packages_of_the_tree() -> set[str]:
    """Name every directory below the root packages that holds a module."""
    found = {path.parent for package in ROOT_PACKAGES for path in (ROOT / package).rglob("*.py")}
    return {".".join(directory.relative_to(ROOT).parts) for directory in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, as pip would."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ROOT_PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run(
        [*command, str(directory), str(source)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(directory.glob("atollfs-*.whl"))


def test_the_packages_listed_are_the_packages_in_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(packages_of_the_tree()) == listed


def test_every_package_has_an_init_module() -> None:
    directories = [ROOT.joinpath(*name.split(".")) for name in packages_of_the_tree()]
    assert [d for d in directories if not (d / "__init__.py").is_file()] == []


def test_the_wheel_holds_every_module_schema_and_type_marker(wheel: Path) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for package in ROOT_PACKAGES
        for pattern in ("*.py", "*.pyi", "*.proto", "*.sql", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }
    assert any(name.endswith(".sql") for name in expected)
    assert {f"{package}/py.typed" for package in ROOT_PACKAGES} <= expected
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_the_wheel_installs_the_command_atoll_under_the_project_s_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        by_name = {name.partition(".dist-info/")[2]: archive.read(name).decode() for name in archive.namelist()}
    assert "atoll = client.cli.main:main" in by_name["entry_points.txt"]
    assert "[fsspec.specs]\natoll = atollfs:AtollFileSystem" in by_name["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in by_name["METADATA"]
    assert "Requires-Python: >=3.11.2" in by_name["METADATA"]


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["bench"],
    }
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+-]+", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    assert {name for name in wanted if name.lower() not in pinned} == set()


def test_every_make_verb_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)\b", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    verbs = set(re.findall(r"^([a-z-]+):.* ## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"run", "stop", "test", "test-all", "check", "bench"} <= named
    assert named <= verbs
