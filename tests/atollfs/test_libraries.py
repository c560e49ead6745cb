"""What people read and write volumes with: pandas, pyarrow, zarr, h5py, numpy."""

from __future__ import annotations

import asyncio
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow.dataset  # type: ignore[import-untyped]
import pyarrow.fs  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import zarr
import zarr.storage

from atollfs import AtollFileSystem
from tests.atollfs.places import Place


@pytest.fixture
def frame() -> pd.DataFrame:
    numbers = np.arange(50_000)
    return pd.DataFrame({"number": numbers, "text": [f"row {n}" for n in numbers], "part": numbers % 3})


def without_address(place: Place) -> dict[str, Any]:
    """Return what storage_options need where the URL says which volume it is, as that of a service does."""
    return {key: value for key, value in place.options.items() if "token" not in place.options or key != "address"}


def test_pandas_writes_and_reads_parquet_and_csv_by_url(
    fs: AtollFileSystem, place: Place, here: str, frame: pd.DataFrame
) -> None:
    options = without_address(place)
    url = fs.unstrip_protocol(here)
    frame.to_parquet(f"{url}/frame.parquet", storage_options=options)
    pd.testing.assert_frame_equal(pd.read_parquet(f"{url}/frame.parquet", storage_options=options), frame)
    frame.to_csv(f"{url}/frame.csv.gz", index=False, storage_options=options)
    pd.testing.assert_frame_equal(pd.read_csv(f"{url}/frame.csv.gz", storage_options=options), frame)


def test_pyarrow_writes_and_reads_a_dataset_in_parts(fs: AtollFileSystem, here: str, frame: pd.DataFrame) -> None:
    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    table = pyarrow.Table.from_pandas(frame)
    pyarrow.parquet.write_to_dataset(table, f"{here}/parts", partition_cols=["part"], filesystem=filesystem)
    assert sorted(name.rpartition("/")[2] for name in fs.ls(f"{here}/parts", detail=False)) == [
        "part=0",
        "part=1",
        "part=2",
    ]
    dataset = pyarrow.dataset.dataset(f"{here}/parts", filesystem=filesystem, partitioning="hive")
    found = dataset.to_table(filter=pyarrow.dataset.field("part") == 1).to_pandas()
    assert sorted(found["number"]) == list(range(1, 50_000, 3))
    filesystem.move(f"{here}/parts", f"{here}/moved")
    filesystem.delete_dir_contents(f"{here}/moved")
    assert fs.ls(f"{here}/moved") == []


def test_zarr_writes_and_reads_an_array_in_chunks(place: Place, here: str) -> None:
    values = np.random.default_rng(1).random((64, 100, 50))
    with place.opened(asynchronous=True) as fs:
        store = zarr.storage.FsspecStore(fs, path=f"{here}/array.zarr")
        array = zarr.create_array(store, shape=values.shape, chunks=(16, 50, 50), dtype=values.dtype)
        array[:] = values
        array[3, 5] = 7.0
        values[3, 5] = 7.0
        again = zarr.open_array(zarr.storage.FsspecStore(fs, path=f"{here}/array.zarr", read_only=True))
        np.testing.assert_array_equal(again[:], values)
        np.testing.assert_array_equal(again[10:20, ::7, 3], values[10:20, ::7, 3])
        group = zarr.open_group(zarr.storage.FsspecStore(fs, path=f"{here}/group.zarr"), mode="w")
        group.create_array("one", data=np.arange(10))
        assert list(zarr.open_group(zarr.storage.FsspecStore(fs, path=f"{here}/group.zarr"), mode="r")) == ["one"]
        assert asyncio.run(fs._exists(f"{here}/array.zarr/zarr.json"))
        options = without_address(place)
        by_url = zarr.open_array(f"{fs.unstrip_protocol(here)}/array.zarr", mode="r", storage_options=options)
        np.testing.assert_array_equal(by_url[:], values)


def test_h5py_and_numpy_work_on_open_files(fs: AtollFileSystem, here: str) -> None:
    values = np.arange(300_000).reshape(300, 1000)
    with fs.open(f"{here}/data.h5", "w+b") as file, h5py.File(file, "w") as data:
        data.create_dataset("values", data=values, chunks=(10, 1000))
    with fs.open(f"{here}/data.h5") as file, h5py.File(file, "r") as data:
        np.testing.assert_array_equal(data["values"][17:40], values[17:40])
    with fs.open(f"{here}/data.npz", "wb") as file:
        np.savez(file, values=values)
    with fs.open(f"{here}/data.npz") as file, np.load(file) as data:
        np.testing.assert_array_equal(data["values"], values)
