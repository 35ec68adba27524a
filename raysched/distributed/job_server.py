"""The job server of a Ray cluster, spoken to over its REST interface.

Ray itself is not imported: a submission then takes a second less, and needs no dashboard packages
on the client. Tokens and passwords are sent in headers and never part of a message.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from raysched.errors import EXIT_FAILED, ConfigError, RunFailedError, UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_S = 30.0
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class ServerAwayError(UserError):
    """The server does not answer now; it may do so again."""

    exit_code = EXIT_FAILED


def server_address(given: str | None) -> str:
    """The server's URL: as given, from RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or on this machine.

    Raises:
        ConfigError: it is no http or https URL.
    """
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    found = [(name, os.environ[name]) for name in names if os.environ.get(name)]
    named = [("--address", given)] if given else found
    source, address = named[0] if named else ("--address", DEFAULT_ADDRESS)
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        usable = usable and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"{source}: must be the job server's URL, such as {DEFAULT_ADDRESS}, got "
            f"{address.rpartition('@')[2]!r} (HEAD:6379 is for `raysched tune` itself)"
        )
    return address.rstrip("/")


def find_token() -> str | None:
    """Ray's token: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    home = os.environ.get("HOME")
    path = Path(named) if named else Path(home) / ".ray" / "auth_token" if home else None
    if path is None or not path.is_file():
        return None
    return path.read_text(encoding="utf-8").strip()


class JobServer:
    """One cluster's job server.

    Args:
        address: its URL; a user and password in it are sent as basic authentication.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        host = parts.netloc.rpartition("@")[2]
        self.address = f"{parts.scheme}://{host}{parts.path}"
        self.warnings: list[str] = []
        self._headers: dict[str, str] = {}
        if parts.username is not None:
            pair = f"{parts.username}:{parts.password or ''}".encode()
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        self._local = parts.hostname in _LOOPBACK
        self._encrypted = parts.scheme == "https"

    def connect(self) -> dict[str, str]:
        """Log in; the cluster's versions of `ray` and `python`.

        Raises:
            ConfigError: nothing answers, it is no job server, or it wants another token.
        """
        try:
            mode = self._ask("GET", "/api/authentication_mode", absent_ok=True) or {}
            # Sent only where it is asked for: other servers must not learn it.
            if mode.get("authentication_mode") == "token":
                self._use_token()
            version = self._ask("GET", "/api/version")
            metadata = self._ask("GET", "/api/v0/cluster_metadata", absent_ok=True) or {}
        except ServerAwayError as error:
            raise ConfigError(
                f"{error}: start the cluster (cluster/local start), open a tunnel to its "
                "dashboard, or correct --address"
            ) from error
        python = (metadata.get("data") or {}).get("pythonVersion", "")
        return {"ray": str(version.get("ray_version", "")), "python": str(python)}

    def has_package(self, name: str) -> bool:
        """Whether the cluster holds this package already."""
        return self._ask("GET", f"/api/packages/gcs/{name}", absent_ok=True) is not None

    def upload(self, name: str, data: bytes) -> None:
        """Send a package."""
        self._ask("PUT", f"/api/packages/gcs/{name}", data=data)

    def submit(self, request: dict[str, Any]) -> None:
        """Start a job; the request has entrypoint, submission_id, runtime_env, metadata."""
        self._ask("POST", "/api/jobs/", data=json.dumps(request).encode())

    def job(self, submission_id: str) -> dict[str, Any] | None:
        """A job's details, None if there is none of this id."""
        found = self._ask("GET", f"/api/jobs/{quote(submission_id, safe='')}", absent_ok=True)
        return found or None

    def jobs(self) -> list[dict[str, Any]]:
        """All submitted jobs, the newest first."""
        found = [job for job in self._ask("GET", "/api/jobs/") if job.get("submission_id")]
        return sorted(found, key=lambda job: job.get("start_time") or 0, reverse=True)

    def logs(self, submission_id: str) -> str:
        """All that the job's driver has printed so far."""
        path = f"/api/jobs/{quote(submission_id, safe='')}/logs"
        found = self._ask("GET", path, absent_ok=True) or {}
        return str(found.get("logs") or "")

    def stop(self, submission_id: str) -> bool:
        """Ask a job to end; False if it had ended before."""
        found = self._ask("POST", f"/api/jobs/{quote(submission_id, safe='')}/stop", data=b"")
        return bool(found.get("stopped"))

    def _use_token(self) -> None:
        token = find_token()
        if token is None:
            raise ConfigError(
                f"{self.address} asks for a token: set RAY_AUTH_TOKEN_PATH to the file that "
                "holds it (cluster/local prints its path)"
            )
        name = "X-Ray-Authorization" if "Authorization" in self._headers else "Authorization"
        self._headers[name] = f"Bearer {token}"
        if not self._local and not self._encrypted:
            self.warnings.append(
                f"the token travels unencrypted to {self.address}: use https, or a tunnel "
                "(kubectl port-forward, ssh -L) to 127.0.0.1"
            )

    def _ask(
        self, method: str, path: str, *, data: bytes | None = None, absent_ok: bool = False
    ) -> Any:
        headers = {**self._headers, "Content-Type": "application/json"}
        request = urllib.request.Request(  # noqa: S310 - http or https, see server_address
            self.address + path, data=data, headers=headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
                body = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                body = error.read()
            return self._refused(method, error.code, body, absent_ok=absent_ok)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerAwayError(f"no job server answers at {self.address} ({reason})") from error
        try:
            return json.loads(body) if body.strip() else {}
        except ValueError as error:
            raise ConfigError(f"{self.address} is no Ray job server: {path} is no JSON") from error

    def _refused(self, method: str, code: int, body: bytes, *, absent_ok: bool) -> None:
        if code == 404 and absent_ok:
            return
        if code in (401, 403):
            raise ConfigError(
                f"{self.address} refuses the token ({code}): set RAY_AUTH_TOKEN_PATH to the file "
                "that holds the cluster's"
            )
        if code in (502, 503, 504):
            raise ServerAwayError(f"the job server at {self.address} answers {code}")
        lines = body.decode(errors="replace").strip().splitlines()
        # The runtime environment may stand in it, with the values of its variables.
        reason = lines[-1].partition("{")[0][:300] if lines else ""
        if method == "GET" and code >= 500:
            # Ray's answer for logs whose node can't be asked now; a look may be repeated.
            raise ServerAwayError(f"the job server at {self.address} answers {code}: {reason}")
        raise RunFailedError(f"{self.address} refuses the request ({code}): {reason}")
