"""Columns of arrays: one ``.npz`` file a column, read without trusting it."""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from typing import Any

from artifactfs.errors import IntegrityError, UsageError
from artifactfs.media.base import Plan, Stored
from artifactfs.media.extras import need
from artifactfs.media.payload import MadeFile

MAX_ARRAYS = 4 << 30
"""Bytes that a column of arrays has at most once it is unpacked: a small file can hold any number of zeros."""
_FOLDER = "media/serialized_data"
_KEY = "column"


def put_arrays(plan: Plan, column: str, values: list[Any]) -> tuple[str, str]:
    """Plan a file with arrays of one shape; returns its entry and the key in it. UsageError for arrays of Python objects."""
    numpy = need("numpy", "a column of arrays")
    array = numpy.stack(values)
    if array.dtype.hasobject:
        raise UsageError(f"the arrays of column {column!r} hold Python objects; convert them to numbers or text first")
    # The key is a file's name in the archive, and a keyword of the function that writes it.
    key = column if re.fullmatch(r"\w[\w -]{0,99}", column) and column not in ("file", "allow_pickle") else _KEY
    buffer = io.BytesIO()
    numpy.savez_compressed(buffer, **{key: array})
    return MadeFile(buffer.getvalue(), ".npz").put(plan, _FOLDER), key


def read_arrays(stored: Stored, where: tuple[str, str], shape: tuple[int, ...], rows: int) -> Any:
    """The arrays of a column, as one with a row for each. IntegrityError unless they are ``rows`` of that shape."""
    numpy = need("numpy", "a column of arrays")
    path, key = where
    local = stored.source.fetch(stored.source.entry(path, stored.path))
    try:
        with zipfile.ZipFile(local) as archive, archive.open(f"{key}.npy") as file:
            found, fortran, dtype = _header(numpy, file)
            size = math.prod(found) * dtype.itemsize
            if dtype.hasobject or found != (rows, *shape) or size > MAX_ARRAYS:
                raise stored.source.malformed(
                    path,
                    f"{key!r} is {dtype.str} {found}; expected are {rows} of shape {list(shape)}, of {MAX_ARRAYS} bytes at most",
                )
            data = file.read(size + 1)
    except IntegrityError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, RuntimeError, NotImplementedError) as error:
        raise stored.source.malformed(path, f"it is not an .npz file with {key!r} ({error})") from None
    if len(data) != size:
        raise stored.source.malformed(path, f"{key!r} has {len(data)} bytes where {size} are declared")
    return numpy.frombuffer(bytearray(data), dtype).reshape(found, order="F" if fortran else "C")


def _header(numpy: Any, file: Any) -> tuple[tuple[int, ...], bool, Any]:
    version = numpy.lib.format.read_magic(file)
    readers = {(1, 0): numpy.lib.format.read_array_header_1_0, (2, 0): numpy.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    shape, fortran, dtype = readers[version](file)
    return tuple(shape), bool(fortran), dtype
