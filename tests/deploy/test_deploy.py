"""What is in deploy/: files that their own tools accept, with options that the commands have."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import yaml  # type: ignore[import-untyped]

from client.cli.main import atoll as commands
from tests.mount.mounted import atoll
from tests.mount.service import ServiceProcess
from tests.servers.ports import free_ports

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
GUIDE = ROOT / "docs" / "guides" / "deploy.md"
NAMESPACES = frozenset(
    """
    BindPaths BindReadOnlyPaths DynamicUser ExecPaths InaccessiblePaths MountFlags NoExecPaths PrivateDevices PrivateIPC
    PrivateMounts PrivateNetwork PrivateTmp PrivateUsers ProcSubset ProtectControlGroups ProtectHome ProtectHostname
    ProtectKernelLogs ProtectKernelModules ProtectKernelTunables ProtectProc ProtectSystem ReadOnlyPaths ReadWritePaths
    RootDirectory RootImage TemporaryFileSystem
    """.split()  # noqa: SIM905
)
"""Settings of systemd.exec(5) with which a service gets a mount namespace, or one of users, of its own."""


def tool(name: str) -> str:
    """Return a program of the environment of these tests."""
    path = Path(sys.executable).with_name(name)
    assert path.exists(), f"{name} is missing: make setup, or pip install it with constraints.txt"
    return str(path)


def passes(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout if "verify" in command else "", done.stderr) == (0, "", ""), done


def check_options(words: Sequence[str]) -> None:
    """Check a command line of `atoll`, its words behind the name: the command exists, and takes these options and arguments."""
    group: click.Group = commands
    context = click.Context(group)
    words = list(words)
    name = words.pop(0)
    command = group.get_command(context, name)
    assert command is not None, name
    if isinstance(command, click.Group):
        command = command.get_command(context, words.pop(0))
        assert command is not None, words
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert given, words
    assert given <= known, (name, given - known)


def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def commands_in(script: str) -> list[list[str]]:
    """Return the command lines of `atoll` in a shell script."""
    joined = script.replace("\\\n", " ")
    found = []
    for line in re.split(r"[;\n]|&&|\|\|", joined):
        match = re.search(r"(?:^|\s)(?:/opt/atollfs/bin/atoll|atoll|atollfs:[0-9.]+) (.*)", line)
        if match is not None:
            words = shlex.split(match[1].replace("'", " "), comments=True)
            found.append([word for word in words if word not in (">", "2>&1")])
    return found


# -- Docker -----------------------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    passes(tool("hadolint"), str(DOCKERFILE))


def test_the_image_has_every_package_of_ours_and_what_debian_must_give() -> None:
    text = DOCKERFILE.read_text()
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    ours = {name for name in listed if "." not in name}
    assert {
        source for source, target in re.findall(r"^COPY (\w+) (\w+)$", text, re.MULTILINE) if source == target
    } == ours
    ignored = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().split()
    sources = {word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for word in line.split()}
    assert {f"!{source}" for source in sources} == {line for line in ignored if line.startswith("!")}
    debian = [line.split() for line in (ROOT / "scripts" / "debian-packages.txt").read_text().splitlines()]
    for package in [words[1] for words in debian if words[:1] == ["runtime"]]:
        assert re.search(rf"\b{re.escape(package)}\b", text), package


def test_the_image_runs_without_rights() -> None:
    stages = DOCKERFILE.read_text().split("\nFROM ")
    assert re.findall(r"^USER (\S+)$", stages[-1], re.MULTILINE) == ["10001:10001"]
    assert 'ENTRYPOINT ["atoll"]' in stages[-1]
    assert "gcc" not in stages[-1]


# -- compose ----------------------------------------------------------------------------------------------------------------


def test_compose_fits_its_schema() -> None:
    done = subprocess.run(
        [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_runs_commands_that_there_are() -> None:
    services = compose()["services"]
    checked = set()
    for name, service in services.items():
        if not service["image"].startswith("atollfs:"):
            continue
        command = service["command"]
        if "entrypoint" in service:
            found = commands_in(command[0].replace("$$", "$"))
            assert found, name
            for words in found:
                if words[0] != "status":
                    check_options(words)
                checked.add(words[0])
        else:
            check_options(command)
            checked.add(command[0])
    assert checked == {"serve", "mount", "format", "status", "token"}


def run_step(name: str, replaced: dict[str, str], environment: dict[str, str]) -> None:
    """Run what a container of compose runs once, with other places."""
    service = compose()["services"][name]
    script = service["command"][0].replace("$$", "$")
    for old, new in replaced.items():
        assert old in script, (name, old)
        script = script.replace(old, new)
    done = subprocess.run(
        [*service["entrypoint"], script],
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done


def test_the_steps_of_compose_make_store_volume_and_tokens_once(tmp_path: Path) -> None:
    admin, mount = tmp_path / "admin", tmp_path / "mount"
    for directory in (admin, mount, tmp_path / "bucket"):
        directory.mkdir()
    running = ServiceProcess(tmp_path, free_ports(1)[0], store=f"sqlite:///{tmp_path}/service.db")
    init = {"/run/atoll": str(admin)}
    token, own = admin / "admin.token", mount / "token"
    run_step("init", init, {"STORE": running.store})
    first = token.read_text()
    run_step("init", init, {"STORE": running.store})
    assert token.read_text() == first, "a second start leaves it"
    token.unlink()
    run_step("init", init, {"STORE": running.store})
    try:
        running.start()
        address = f"127.0.0.1:{running.port}"
        places = {
            "/run/atoll-mount": str(mount),
            "service:9410": address,
            "s3://atoll/volumes?endpoint=http://seaweedfs:8333&region=us-east-1": f"file://{tmp_path}/bucket",
        }
        environment = {"ATOLL_TOKEN_FILE": str(token)}
        run_step("format", places, environment)
        found = own.read_text(), atoll("status", f"atoll://{address}/team/data", environment=environment).stdout
        assert own.stat().st_mode & 0o777 == 0o600
        run_step("format", places, environment)
        assert own.read_text() == found[0]
        of_the_mount = {"ATOLL_TOKEN_FILE": str(own)}
        assert atoll("status", f"atoll://{address}/team/data", environment=of_the_mount).returncode == 0
        assert atoll("tenant", "list", f"atoll://{address}", environment=of_the_mount).returncode == 1
    finally:
        running.abandon()


def test_compose_names_only_what_it_has() -> None:
    document = compose()
    for service in document["services"].values():
        assert set(service.get("depends_on", ())) <= set(document["services"])
        for volume in service.get("volumes", ()):
            if isinstance(volume, str):
                assert volume.partition(":")[0] in document["volumes"]
    ports = [port for service in document["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports), "nothing is open to other machines"


# -- systemd ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    name = unit.name.replace("@", "@mnt-data")
    shutil.copy(unit, tmp_path / name)
    passes("systemd-analyze", "verify", "--man=no", str(tmp_path / name))


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_run_commands_that_there_are(unit: Path) -> None:
    [start] = settings(unit)["ExecStart"]
    [words] = commands_in(start.replace("$$", "$"))
    assert words[0] == ("mount" if "@" in unit.name else "serve")
    check_options(words)


def test_a_mount_has_no_namespace_of_its_own_and_time_to_upload() -> None:
    unit = settings(DEPLOY / "systemd" / "atoll-mount@.service")
    assert not set(unit) & NAMESPACES
    from client.mounted import DRAIN_S

    assert int(unit["TimeoutStopSec"][0]) > DRAIN_S + 120


def test_no_secret_is_on_a_command_line_and_each_file_is_in_the_guide() -> None:
    guide = GUIDE.read_text()
    for unit in UNITS:
        found = settings(unit)
        for credential in found["LoadCredential"]:
            name, _, path = credential.partition(":")
            assert f"$CREDENTIALS_DIRECTORY/{name}" in found["ExecStart"][0] or f"%d/{name}" in found["Environment"][0]
            assert path.replace("%i", "mnt-data") in guide, path
        for path in found["EnvironmentFile"]:
            assert path.replace("%i", "mnt-data") in guide, path


def test_the_command_of_a_unit_is_refused_for_what_is_missing_only(tmp_path: Path) -> None:
    """Run the service's command line as the unit's shell does, with a store that is not there."""
    [start] = settings(DEPLOY / "systemd" / "atoll-serve.service")["ExecStart"]
    script = shlex.split(start.replace("$$", "$"))[2]
    (tmp_path / "bucket.env").write_text("AWS_ACCESS_KEY_ID=key\n")
    command = Path(sys.executable).with_name("atoll")
    done = subprocess.run(
        ["/bin/sh", "-euc", script.replace("/opt/atollfs/bin/atoll", str(command))],
        env={
            "CREDENTIALS_DIRECTORY": str(tmp_path),
            "CACHE_DIRECTORY": str(tmp_path),
            "ATOLL_STORE": f"sqlite:///{tmp_path}/absent.db",
            "ATOLL_LISTEN": "127.0.0.1:0",
            "ATOLL_METRICS": "127.0.0.1:0",
            "ATOLL_SERVE_OPTIONS": "--insecure --memory 64MiB",
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    assert "absent.db" in done.stderr, done


def test_commands_of_the_guide_exist() -> None:
    names = set()
    for block in re.findall(r"```(?:sh|ini)\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        for words in commands_in(block):
            names.add(words[0])
            if any(word.startswith("--") for word in words):
                check_options(words)
    assert {"serve", "mount"} <= names
