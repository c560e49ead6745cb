"""Run a work in a process of its own, with a time limit: a file system that hangs costs that process only.

Owns the command line between the benchmark and `bench.works`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bench.processes import run_step
from bench.works import Options, Timing

_ROOT: Final = Path(__file__).resolve().parent.parent


def run_work(function: str, directory: Path, *, options: Options, log: Path, limit_s: float) -> Timing:
    """Run one work on a directory; raise StepFailed on an error, a wrong byte or at the time limit."""
    arguments = [sys.executable, "-m", "bench.works", function, str(directory), json.dumps(asdict(options))]
    return Timing(**json.loads(run_step(arguments, log=log, limit_s=limit_s, directory=_ROOT)))
