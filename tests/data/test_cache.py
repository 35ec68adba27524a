import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from raysched.config.run import DataConfig
from raysched.data.cache import cache_path, cached_source
from raysched.errors import StorageError

WAIT_S = 60


def digits(folder, **options):
    return DataConfig(cache_dir=str(folder), **options)


def test_the_cache_gives_back_what_was_decoded(tmp_path):
    first = cached_source(digits(tmp_path))
    second = cached_source(digits(tmp_path))
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.class_names == second.class_names
    assert second.images.dtype == np.uint8
    assert second.images.flags.writeable


def test_a_cached_source_is_not_decoded_again(tmp_path):
    cached_source(digits(tmp_path))
    program = (
        "import sys; from raysched.config.run import DataConfig;"
        "from raysched.data.cache import cached_source;"
        f"cached_source(DataConfig(cache_dir={str(tmp_path)!r}));"
        "assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=WAIT_S)


def test_options_that_change_pixels_change_the_file_and_others_do_not(tmp_path):
    plain = cache_path(digits(tmp_path))
    assert cache_path(digits(tmp_path, image_size=16)) != plain
    assert cache_path(digits(tmp_path, split_seed=5, limit=10, holdout_fraction=0.5)) == plain


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped byte", "foreign"])
def test_a_damaged_file_is_rebuilt_with_a_warning(tmp_path, damage):
    good = cached_source(digits(tmp_path))
    path = cache_path(digits(tmp_path))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped byte":
        content[len(content) // 3] ^= 0xFF
        path.write_bytes(content)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"label": [1, 2]}), path)
    with pytest.warns(UserWarning, match="cached images are damaged"):
        again = cached_source(digits(tmp_path))
    np.testing.assert_array_equal(again.images, good.images)
    np.testing.assert_array_equal(cached_source(digits(tmp_path)).images, good.images)


def _fill_at_the_same_time(folder, barrier, results):
    barrier.wait(timeout=WAIT_S)
    source = cached_source(digits(folder))
    results.put((os.getpid(), int(source.images.sum()), len(source.labels)))


def test_two_processes_fill_the_same_cache_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (tmp_path / "new" / "folder", barrier, results)
    workers = [context.Process(target=_fill_at_the_same_time, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=WAIT_S) for _ in workers]
    for worker in workers:
        worker.join(timeout=WAIT_S)
    assert [worker.exitcode for worker in workers] == [0] * 2
    assert len({answer[0] for answer in answers}) == 2
    assert len({answer[1:] for answer in answers}) == 1
    left = [path.name for path in (tmp_path / "new" / "folder").iterdir()]
    assert sum(name.endswith(".parquet") for name in left) == 1
    assert not [name for name in left if name.endswith(".tmp")]


def test_a_lock_that_is_never_released_ends_in_a_message(tmp_path):
    config = digits(tmp_path)
    with (
        FileLock(cache_path(config).with_suffix(".lock")),
        pytest.raises(StorageError, match=r"data\.cache_dir: .*\.lock was held .* 0\.2 s"),
    ):
        cached_source(config, lock_timeout_s=0.2)


def test_a_file_where_the_folder_should_be_is_a_message_with_the_key(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=r"data\.cache_dir: can't store .*file"):
            cached_source(digits(folder))


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    path = cache_path(digits(tmp_path))
    abandoned = tmp_path / f".{path.name}.123.tmp"
    abandoned.write_bytes(b"half")
    cached_source(digits(tmp_path))
    assert path.is_file()
    assert not abandoned.exists()


FULL_DISK_PROGRAM = """
import json, resource, sys
from raysched.config.run import DataConfig
from raysched.data.cache import cached_source
from raysched.errors import StorageError

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    cached_source(DataConfig(cache_dir=sys.argv[1]))
except StorageError as error:
    print(json.dumps(str(error)))
"""


def test_a_disk_that_takes_no_more_is_a_message_and_leaves_no_half_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK_PROGRAM, str(tmp_path)],
        check=True,
        timeout=WAIT_S,
        capture_output=True,
        text=True,
    )
    message = json.loads(done.stdout)
    assert message.startswith("data.cache_dir: can't store the decoded images")
    assert "set data.cache_dir to a folder that can be written" in message
    assert [path.suffix for path in Path(tmp_path).iterdir()] in ([], [".lock"])
