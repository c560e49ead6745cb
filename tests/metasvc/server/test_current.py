"""The generated code is what the proto file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.processes import run_step
from metasvc.api import atoll_pb2 as pb
from metasvc.server.administration import _OPERATIONS as ADMIN
from metasvc.server.object_urls import OPERATION as SIGN_OBJECTS
from metasvc.server.operations import OPERATIONS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["atoll_pb2.py", "atoll_pb2.pyi"])
def test_the_generated_code_is_current(name: str, tmp_path: Path) -> None:
    run_step(["bash", str(ROOT / "scripts" / "generate-api.sh"), str(tmp_path)], log=tmp_path / "log", limit_s=60)
    made = (tmp_path / "metasvc" / "api" / name).read_text()
    assert made == (ROOT / "metasvc" / "api" / name).read_text(), "run scripts/generate-api.sh"


def test_every_operation_of_the_proto_file_is_served() -> None:
    assert OPERATIONS.keys() == {field.name for field in pb.Request.DESCRIPTOR.oneofs[0].fields}
    assert {*ADMIN, SIGN_OBJECTS} == {field.name for field in pb.AdminRequest.DESCRIPTOR.oneofs[0].fields}


def test_numbers_of_fields_have_no_gaps_that_are_not_reserved() -> None:
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        numbers = sorted(field.number for field in message.fields)
        assert numbers == list(range(1, len(numbers) + 1)), f"{name}: reserve the numbers of fields that were removed"


def test_every_field_of_the_model_s_rows_travels() -> None:
    from metasvc.model import Inode, StatFs

    assert [field.name for field in pb.Inodes.DESCRIPTOR.fields] == list(Inode._fields)
    assert [field.name for field in pb.StatFsReply.DESCRIPTOR.fields] == list(StatFs.__dataclass_fields__)
