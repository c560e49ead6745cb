#!/usr/bin/env bash
# Generate metasvc/api/atoll_pb2.py and .pyi from atoll.proto; a test compares them. Needs `make check` to have run once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${1:-.}
PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -m grpc_tools.protoc -I . --python_out="$target" --mypy_out=quiet:"$target" metasvc/api/atoll.proto
