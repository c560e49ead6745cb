"""What TLS costs a metadata operation: lookups through `atoll serve` with a certificate and without, by turns.

    python bench/tls.py [--lookups 5000] [--rounds 3]

Needs openssl(1) for the certificate. One client, on loopback: one lookup after the other, then 64 at a time; time and CPU of
client and service together for each lookup, and how long a connection with its session takes to come about.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.servers import metadata_service

AT_ONCE = 64


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process and of this one."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + time.process_time()


async def measure(address: str, token: str, pid: int, lookups: int) -> dict[str, float]:
    """Return the figures of one service."""
    from client.address import parse_service_place
    from client.meta.connection import SessionConnection
    from client.meta.encryption import endpoint_at
    from client.meta.remote import RemoteMeta
    from metasvc.model import ROOT_INO, Caller

    endpoint = endpoint_at(parse_service_place(address), token, env=os.environ)

    def session() -> SessionConnection:
        return SessionConnection(endpoint, "acme/v", host="bench", pid=1, mountpoint="/bench", timeout_s=60)

    took = []
    for _ in range(10):
        begin_s = time.perf_counter()
        connection = session()
        await connection.open(timeout_s=20)
        took.append(time.perf_counter() - begin_s)
        await connection.close()
    connection = session()
    await connection.open(timeout_s=20)
    meta = RemoteMeta(connection)
    await meta.mkdir(Caller(), ROOT_INO, b"d%d" % time.time_ns(), mode=0o755)
    names = [entry.name for entry in (await meta.readdir(ROOT_INO, after=None, limit=10)).entries]
    begin_s, begin_cpu_s = time.perf_counter(), cpu_s(pid)
    for _ in range(lookups):
        await meta.lookup(ROOT_INO, names[0])
    one_s, one_cpu_s = time.perf_counter() - begin_s, cpu_s(pid) - begin_cpu_s
    begin_s, begin_cpu_s = time.perf_counter(), cpu_s(pid)
    for _ in range(lookups // AT_ONCE):
        await asyncio.gather(*(meta.lookup(ROOT_INO, names[0]) for _ in range(AT_ONCE)))
    many = lookups // AT_ONCE * AT_ONCE
    many_s, many_cpu_s = time.perf_counter() - begin_s, cpu_s(pid) - begin_cpu_s
    await connection.close()
    return {
        "session, ms": statistics.median(took) * 1e3,
        "one by one, us": one_s / lookups * 1e6,
        "its CPU, us": one_cpu_s / lookups * 1e6,
        f"{AT_ONCE} at once, us": many_s / many * 1e6,
        "their CPU, us": many_cpu_s / many * 1e6,
    }


def main() -> None:
    """Print a table."""
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lookups", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"atoll://": [], "atolls://": []}
    with tempfile.TemporaryDirectory(prefix="atoll-tls-") as text:
        directory = Path(text)
        cert, key = str(directory / "cert.pem"), str(directory / "key.pem")
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days"]
        command += ["2", "-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1", "-out", cert, "-keyout", key]
        subprocess.run(command, check=True, capture_output=True)
        os.environ["ATOLL_TLS_CA"] = cert
        atoll = str(Path(sys.executable).parent / "atoll")
        for turn in range(arguments.rounds):
            for scheme, each in found.items():
                options = ("--tls-cert", cert, "--tls-key", key) if scheme == "atolls://" else ()
                place = directory / f"{turn}-{scheme[:-3]}"
                with metadata_service(place, environment=dict(os.environ), options=options) as service:
                    address = service.address.replace("atoll://", scheme)
                    given = {**os.environ, "ATOLL_TOKEN": service.token}
                    made = [
                        atoll,
                        "format",
                        f"{address}/acme/v",
                        "--bucket",
                        f"file://{place}/objects",
                        "--create-bucket",
                    ]
                    subprocess.run(made, check=True, capture_output=True, env=given)
                    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                        each.append(runner.run(measure(address, service.token, service.pid, arguments.lookups)))
    for name in found["atoll://"][0]:
        figures = {scheme: statistics.median(run[name] for run in runs) for scheme, runs in found.items()}
        print(f"{name:20}" + "".join(f"  {scheme} {figure:8.1f}" for scheme, figure in figures.items()))


if __name__ == "__main__":
    main()
