"""The decoded images of a source in one Parquet file that all trials of a sweep share.

The file's name is the SHA-256 of everything that the pixels depend on, so a changed source or
option never meets an old file. Written under a lock to a temporary name, then renamed: readers
see a whole file or none. N images, C channels, H = W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysched.config.paths import user_path
from raysched.config.run import DataConfig
from raysched.data.sources import DecodedSource, decode_source, source_identity
from raysched.errors import StorageError

FORMAT_VERSION = 1
LOCK_TIMEOUT_S = 900.0
_METADATA_KEY = b"raysched"


def cached_source(config: DataConfig, lock_timeout_s: float = LOCK_TIMEOUT_S) -> DecodedSource:
    """The source's images, from the cache if they are in it, else decoded and stored.

    Raises:
        DataError: the source is missing or corrupt.
        StorageError: the cache can't be written, or another process held it for too long.
    """
    path = cache_path(config)
    if path.is_file():
        found = _read_or_warn(path)
        if found is not None:
            return found
    return _fill(config, path, lock_timeout_s)


def cache_path(config: DataConfig) -> Path:
    """The file that holds, or will hold, the decoded images of this source."""
    folder = cache_folder(config)
    identity = {"format": FORMAT_VERSION, **source_identity(config)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder / f"{config.source}-{key[:32]}.parquet"


def cache_folder(config: DataConfig) -> Path:
    """Where the cache is: `data.cache_dir`, else $RAYSCHED_CACHE, else ~/.cache/raysched."""
    named = config.cache_dir or os.environ.get("RAYSCHED_CACHE") or "~/.cache/raysched"
    return user_path(named, "data.cache_dir")


def _fill(config: DataConfig, path: Path, lock_timeout_s: float) -> DecodedSource:
    from filelock import FileLock, Timeout

    lock_path = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_path, timeout=lock_timeout_s):
            # Another process may have stored it while this one waited for the lock.
            found = _read_or_warn(path) if path.is_file() else None
            if found is None:
                found = decode_source(config)
                _write(path, found)
            return found
    except Timeout as error:
        raise StorageError(
            f"data.cache_dir: {lock_path} was held by another process for {lock_timeout_s:g} s; "
            "wait for it to finish decoding, or set data.cache_dir to another folder"
        ) from error
    except OSError as error:
        raise StorageError(
            f"data.cache_dir: can't store the decoded images in {path.parent} "
            f"({error.strerror or error}); free space there, or set data.cache_dir to a folder "
            "that can be written"
        ) from error


def _read_or_warn(path: Path) -> DecodedSource | None:
    """The cached images, or None and a warning if the file is damaged."""
    import pyarrow as pa

    try:
        return _read(path)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        warnings.warn(
            f"{path}: the cached images are damaged ({str(error).splitlines()[0]}); "
            "decoding them again",
            stacklevel=2,
        )
        return None


def _read(path: Path) -> DecodedSource:
    import pyarrow.parquet as pq

    # Opened by us: a path given to pyarrow may start its own threads for a file this small.
    with path.open("rb") as file:
        table = pq.ParquetFile(file, page_checksum_verification=True).read(use_threads=False)
    described = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    count, *shape = described["shape"]
    images = np.empty((count, *shape), dtype=np.uint8)
    filled = 0
    for chunk in table.column("image").chunks:
        rows = _chunk_pixels(chunk, tuple(shape))
        images[filled : filled + len(rows)] = rows
        filled += len(rows)
    labels = table.column("label").to_numpy().astype(np.int64)
    if filled != count or len(labels) != count:
        raise ValueError(f"{filled} images and {len(labels)} labels instead of {count}")
    return DecodedSource(images, labels, tuple(described["class_names"]))


def _chunk_pixels(chunk: object, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """View a chunk of fixed-size binary values as (n, C, H, W)."""
    import pyarrow as pa

    assert isinstance(chunk, pa.FixedSizeBinaryArray)
    size = int(np.prod(shape))
    values = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
    return values[chunk.offset * size : (chunk.offset + len(chunk)) * size].reshape(-1, *shape)


def _write(path: Path, source: DecodedSource) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = np.ascontiguousarray(source.images)
    size = int(np.prod(images.shape[1:]))
    pixels = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(size), len(images), [None, pa.py_buffer(images.tobytes())]
    )
    described = {"shape": list(images.shape), "class_names": list(source.class_names)}
    schema = pa.schema(
        [("image", pa.binary(size)), ("label", pa.int64())],
        metadata={_METADATA_KEY: json.dumps(described).encode()},
    )
    table = pa.Table.from_arrays([pixels, pa.array(source.labels)], schema=schema)
    # Whoever holds the lock is the only writer: other temporary files are a killed one's.
    for abandoned in path.parent.glob(f".{path.name}.*.tmp"):
        abandoned.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
