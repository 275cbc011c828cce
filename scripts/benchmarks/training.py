"""Programs that ``scripts/bench s3`` runs on a mount and on a local directory: ``training.py WORK DIRECTORY [make|…]``.

``make`` writes the files; else the work is done on them and what it took is printed as JSON: ``loader`` two epochs of a PyTorch
DataLoader over all files of ``images/``, in seconds; the others the bytes of what they took out of a large file.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MIB = 1 << 20
TENSOR = 16 * MIB
_WORKERS = 4


def make(root: Path, files: int, size: int) -> None:
    """``files`` files as large as small pictures, and one file of ``size`` bytes for each format."""
    source = random.Random(7)
    for number in range(files):
        path = root / "images" / f"class{number % 100:02}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.randbytes(source.randint(30 << 10, 80 << 10)))
    _make_safetensors(root / "model.safetensors", size)
    _make_parquet(root / "table.parquet", size)
    _make_hdf5(root / "array.h5", size)


def _make_safetensors(path: Path, size: int) -> None:
    from safetensors.numpy import save_file

    noise = np.random.default_rng(1)
    save_file({f"layer{number}": noise.random(TENSOR // 8) for number in range(size // TENSOR)}, path)


def _make_parquet(path: Path, size: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    noise = np.random.default_rng(2)
    rows = size // 16 // 8
    table = pa.table({f"column{number}": noise.random(rows) for number in range(16)})
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=1 << 20)


def _make_hdf5(path: Path, size: int) -> None:
    import h5py

    noise = np.random.default_rng(3)
    with h5py.File(path, "w") as file:
        file.create_dataset("array", data=noise.random((size // 8 // 4096, 4096)))


def loader(root: Path) -> Any:
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Images(Dataset[Any]):
        def __init__(self) -> None:
            self.paths = sorted(str(path) for path in (root / "images").rglob("*.jpg"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, number: int) -> Any:
            data = Path(self.paths[number]).read_bytes()
            return torch.frombuffer(bytearray(data[: 16 << 10]), dtype=torch.uint8)

    torch.manual_seed(1)
    images = Images()
    batches = DataLoader(images, batch_size=64, shuffle=True, num_workers=_WORKERS, multiprocessing_context="fork")
    epochs = []
    for _ in range(2):
        start = time.perf_counter()
        assert sum(len(batch) for batch in batches) == len(images)
        epochs.append(time.perf_counter() - start)
    return epochs


def safetensors(root: Path) -> Any:
    """Every 16th tensor, mapped into memory."""
    from safetensors import safe_open

    taken = 0
    with safe_open(root / "model.safetensors", framework="numpy") as file:
        for name in sorted(file.keys())[::16]:
            taken += file.get_tensor(name).nbytes
    return taken


def parquet(root: Path) -> Any:
    """Two of sixteen columns."""
    import pyarrow.parquet as pq

    return pq.read_table(root / "table.parquet", columns=["column3", "column11"]).nbytes


def hdf5(root: Path) -> Any:
    """A sixteenth of the rows, from the middle."""
    import h5py

    with h5py.File(root / "array.h5") as file:
        array = file["array"]
        middle, count = array.shape[0] // 2, array.shape[0] // 16
        return int(array[middle : middle + count].nbytes)


def mapped(root: Path) -> Any:
    """256 places of the large array's file, through a map."""
    area = np.memmap(root / "array.h5", dtype=np.uint8, mode="r")
    places = random.Random(9)
    starts = [places.randrange(len(area) - 4096) for _ in range(256)]
    return sum(int(np.array(area[start : start + 4096]).nbytes) for start in starts)


def main() -> None:
    work, root = sys.argv[1], Path(sys.argv[2])
    if work == "make":
        make(root, int(sys.argv[3]), int(sys.argv[4]))
    else:
        print(
            json.dumps(
                {"loader": loader, "safetensors": safetensors, "parquet": parquet, "hdf5": hdf5, "mapped": mapped}[work](root)
            )
        )
    sys.stdout.flush()
    os._exit(0)  # torch and pyarrow take a second to end in order


if __name__ == "__main__":
    main()
