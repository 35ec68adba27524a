"""Places that settings name: the forms of `training.storage_path`; no passwords in any of them.

A folder (local or NFS, also as `file://`), or an object store that pyarrow reaches: `s3://`,
`gs://`, `abfs://`. Credentials come from the environment, never from the path: the path is
written into config files and to MLflow.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from raysched.config.run import RunConfig

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss")
_SECRET_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:key|password|secret|token|sig)[\w.-]*=)[^&]+")
_LOGIN = re.compile(r"(://[^/@:]*):[^/]*@")


def is_uri(path: str) -> bool:
    """Whether a storage path is a URI rather than a folder's name."""
    return "://" in path


def without_secrets(path: str) -> str:
    """The same path with every password, key and token in it blotted out."""
    return _SECRET_QUERY.sub(r"\1***", _LOGIN.sub(r"\1:***@", path))


def below(path: str, folder: str) -> str:
    """A folder within a storage path; options of a URI stay at its end."""
    place, mark, options = path.partition("?") if is_uri(path) else (path, "", "")
    return f"{place.rstrip('/')}/{folder}{mark}{options}"


def store_rule(c: RunConfig) -> str | None:
    """What is wrong with `tracking.uri`, None if nothing is."""
    uri = c.tracking.uri
    if uri is None or without_secrets(uri) == uri:
        return None
    return (
        f"must not hold a password, got {without_secrets(uri)}; leave it out and set "
        "MLFLOW_TRACKING_URI to the whole URI, or MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, for config files are kept and shown in MLflow"
    )


def storage_rule(c: RunConfig) -> str | None:
    """What is wrong with `training.storage_path`, None if nothing is."""
    path = c.training.storage_path
    if path is None or not is_uri(path):
        return None
    if without_secrets(path) != path:
        return (
            f"must not hold credentials, got {without_secrets(path)}; put them into the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "GOOGLE_APPLICATION_CREDENTIALS), for it is written to config files and to MLflow"
        )
    parts = urlsplit(path)
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        return f"must be a folder or begin with one of {known}, got {path}"
    if parts.scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        return f"must be file:// and an absolute path (file:///data/runs), got {path}"
    if parts.scheme != "file" and not parts.netloc:
        return f"must name a bucket ({parts.scheme}://BUCKET/FOLDER), got {path}"
    return None
