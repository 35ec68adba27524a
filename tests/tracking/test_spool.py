from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raysched.errors import StorageError
from raysched.tracking.spool import RunRecord, Spool


def _operations(spool: Spool) -> list[object]:
    return [entry.operation for entry in spool.entries()]


def test_a_half_written_line_is_ignored_and_cut_off_when_the_run_goes_on(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append({"op": "tags", "values": {"n": "1"}})
    spool.close()
    with spool.path.open("a") as file:
        file.write('{"op": "tags", "val')
    assert len(_operations(spool)) == 1
    spool.append({"op": "tags", "values": {"n": "2"}})
    assert [op["values"]["n"] for op in _operations(spool)] == ["1", "2"]
    assert spool.path.read_text().count("\n") == 2


def test_entries_go_on_from_an_acknowledged_offset(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number in range(3):
        spool.append({"op": "metrics", "values": {"a": number, "b": 0}})
    assert spool.num_pending() == 6
    spool.acknowledge(list(spool.entries())[1].end)
    assert [entry.operation["values"]["a"] for entry in spool.entries(spool.acknowledged())] == [2]
    assert Spool(tmp_path).num_pending() == 2


def test_a_damaged_acknowledgement_means_send_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append({"op": "tags", "values": {}})
    (spool.folder / "acknowledged.json").write_text('{"offset": 10')
    assert spool.acknowledged() == 0
    spool.acknowledge(10**6)
    assert spool.acknowledged() == 0


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.load_record() is None
    record = RunRecord("http://h", "e", "id", name="n", params={"a": "1"}, start_time=5)
    spool.save_record(record)
    assert spool.load_record() == record
    spool.record_path.write_text("{}")
    with pytest.raises(StorageError, match=r"run\.json"):
        spool.load_record()


def test_paths_inside_the_run_folder_survive_a_move(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run")
    inside = spool.relative(tmp_path / "run" / "config.yaml")
    assert inside == "config.yaml"
    assert Spool(tmp_path / "moved").resolve(inside) == tmp_path / "moved" / "config.yaml"
    assert spool.resolve(spool.relative(tmp_path / "x")) == tmp_path / "x"


_FILL = """
import json, resource, signal, sys
from pathlib import Path
from raysched.errors import StorageError
from raysched.tracking.spool import Spool
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
spool = Spool(Path(sys.argv[1]))
try:
    for number in range(1000):
        spool.append({"op": "tags", "values": {"n": str(number)}})
except StorageError as error:
    print(json.dumps({"after": number, "message": str(error)}))
"""


def test_a_full_disk_is_one_message_and_leaves_whole_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FILL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    result = json.loads(done.stdout)
    assert "can't keep the tracked points" in result["message"]
    assert len(_operations(Spool(tmp_path))) == result["after"] > 0
    assert Spool(tmp_path).path.read_bytes().endswith(b"\n")
