"""Taking a run up where its spool is lost: on another machine, from fetched checkpoints.

The spool tells a tracker which steps are recorded; without it, the steps between the checkpoint
and the loss would be recorded twice. So its last lines are written again from what MLflow has.
"""

from __future__ import annotations

from typing import Any

from raysched.tracking.spool import BY_FE, Spool, encode_number


def recall(client: Any, run: Any, spool: Spool) -> None:
    """Write the last point of every key, and the run's end, as lines that MLflow has already.

    Args:
        client: an MLflow client.
        run: the run as `client.get_run` gives it, with the last point of every metric.
        spool: the run's, without any line.
    """
    points = {metric.key: metric for metric in run.data.to_proto().metrics}
    for key, point in points.items():
        if key.startswith(BY_FE):
            continue
        by_fe = points.get(BY_FE + key)
        line = {"op": "metrics", "time": point.timestamp, "step": point.step}
        fe = float(by_fe.step) if by_fe is not None else 0.0
        spool.append({**line, "fe": fe, "values": {key: encode_number(point.value)}})
    for info in client.list_artifacts(run.info.run_id, "images"):
        key, mark, rest = info.path.rpartition("/")[2].partition("+step+")
        if mark:
            # Its file is gone like that of every picture that was sent.
            line = {"op": "image", "time": 0, "step": int(rest.partition("+")[0])}
            spool.append({**line, "key": key.replace("~", "/"), "path": f"tracking/images/{key}"})
    if run.info.status != "RUNNING":
        ended = {"op": "status", "time": run.info.end_time or 0, "status": "stopped"}
        spool.append(ended)
    spool.close()
    if spool.path.exists():
        spool.acknowledge(spool.path.stat().st_size)
