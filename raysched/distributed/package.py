"""What a submitted job is sent: the package's source, its config files, and nothing else.

Data, checkpoints, runs, environments and whatever may hold a secret stay here. The archive is made
the same way every time, so that its digest names its content.
"""

from __future__ import annotations

import hashlib
import io
import re
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from raysched.errors import ConfigError

MAX_BYTES = 64 * 2**20
MIB = 2**20
CONFIG_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
SOURCE_SUFFIXES = (
    *CONFIG_SUFFIXES,
    ".py",
    ".typed",
    ".html",
    ".css",
    ".js",
    ".txt",
    ".md",
    ".svg",
)
LEFT_OUT_FOLDERS = frozenset(
    {"__pycache__", "node_modules", "runs", "mlruns", "checkpoints", "data", "venv", "build"}
)
LEFT_OUT_SUFFIXES = frozenset(
    {".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npz", ".npy", ".parquet", ".arrow", ".db"}
)
SECRETS = (
    *(".env", ".env.*", "*.env", ".netrc", "_netrc", ".npmrc", ".pypirc", ".git-credentials"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "id_rsa*", "id_ed25519*"),
    *("credentials", "credentials.*", "*secret*", "*kubeconfig*", "auth_token*", "*.token"),
    *("service-account*.json", "service_account*.json"),
)
# The package's own modules may be called anything; `--include` and config files may not.
_PASSWORD = re.compile(rb"://[^\s/'\"@]+:[^\s/'\"]+@")
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """The files of a job.

    Attributes:
        files: name in the archive -> the file.
        renamed: what the command line calls a file -> its name in the archive.
        from_checkout: whether the package's own source is among them.
    """

    files: dict[str, Path]
    renamed: dict[str, str]
    from_checkout: bool

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes per file."""
        return {name: path.stat().st_size for name, path in self.files.items()}

    def archive(self) -> bytes:
        """The files as a zip, the same bytes for the same content."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(self.files):
                entry = zipfile.ZipInfo(name, _FIRST_DAY)
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, self.files[name].read_bytes(), zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    def digest(self) -> str:
        """SHA-256 over names and contents."""
        total = hashlib.sha256()
        for name in sorted(self.files):
            content = hashlib.sha256(self.files[name].read_bytes()).hexdigest()
            total.update(f"{name}\0{content}\n".encode())
        return total.hexdigest()


def collect(
    configs: Sequence[str], include: Sequence[str] = (), *, source: Path | None = None
) -> Package:
    """Choose what is sent.

    Args:
        configs: config and space files, as the command line names them, with their bases.
        include: further files or folders that the user names.
        source: the package's folder; default: that of this module.

    Raises:
        ConfigError: a file is missing, may hold a secret, or all of it is too large.
    """
    package = Path(__file__).parents[1] if source is None else source
    files: dict[str, Path] = {}
    from_checkout = is_checkout(package)
    if from_checkout:
        for path in _walk(package):
            if path.suffix in SOURCE_SUFFIXES:
                files[f"{package.name}/{path.relative_to(package).as_posix()}"] = path
        files["pyproject.toml"] = package.parent / "pyproject.toml"
    named = [Path(text) for text in configs]
    extra = [path for text in include for path in _included(Path(text))]
    for path in named:
        _check_named(path)
    names = _names([*named, *extra])
    for path, name in zip([*named, *extra], names, strict=True):
        if files.setdefault(name, path).resolve() != path.resolve():
            raise ConfigError(f"{path}: has the name of another file of the job, {name}")
    renamed = {str(text): name for text, name in zip(configs, names, strict=False)}
    result = Package(files, renamed, from_checkout)
    _check_size(result)
    return result


def is_checkout(package: Path) -> bool:
    """Whether the package is a clone's (or an editable install's), not an installed one's."""
    project = package.parent / "pyproject.toml"
    if not project.is_file():
        return False
    try:
        name = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("name")
    except (OSError, ValueError):
        return False
    return bool(name == package.name)


def holds_password(content: bytes) -> bool:
    """Whether a text names a URL with a user's password in it."""
    return _PASSWORD.search(content) is not None


def may_be_secret(path: Path) -> bool:
    """Whether a file's name is one that secrets are kept under."""
    return any(fnmatch(path.name.lower(), pattern) for pattern in SECRETS)


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, without hidden, left-out and secret ones, and without links."""
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") or path.is_symlink()
        is_room = path.parent == _package_root()
        if hidden or (path.name in LEFT_OUT_FOLDERS and not is_room):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.suffix == ".py" or not (path.suffix in LEFT_OUT_SUFFIXES or may_be_secret(path)):
            yield path


def _package_root() -> Path:
    # raysched/data is a room of the package, no data.
    return Path(__file__).parents[1]


def _included(path: Path) -> list[Path]:
    if path.is_dir():
        inside = [found for found in _walk(path) if not may_be_secret(found)]
        for found in inside:
            _check_content(found)
        return inside
    _check_named(path)
    return [path]


def _check_named(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if may_be_secret(path) or path.suffix in LEFT_OUT_SUFFIXES:
        raise ConfigError(
            f"{path}: is not sent: its name is one of secrets, data or checkpoints; put it on the "
            "cluster's storage, or give it as a secret of the cluster"
        )
    _check_content(path)


def _check_content(path: Path) -> None:
    if path.stat().st_size <= MIB and holds_password(path.read_bytes()):
        raise ConfigError(
            f"{path}: holds a URL with a password, which the cluster would keep in plain text: "
            "take it out, and give the job MLFLOW_TRACKING_URI in the cluster's environment"
        )


def _names(paths: Sequence[Path]) -> list[str]:
    """Names in the archive: relative to here; files from elsewhere keep their places to another.

    A base is named relative to its space, so these two must move together.
    """
    here = Path.cwd().resolve()
    absolute = [path.absolute() for path in paths]
    whole = [Path(_normal(path)) for path in absolute]
    if all(path.is_relative_to(here) for path in whole):
        names = [path.relative_to(here).as_posix() for path in whole]
    else:
        parents = [path.parent for path in whole]
        common = parents[0]
        while not all(parent.is_relative_to(common) for parent in parents):
            common = common.parent
        names = [f"job/{path.relative_to(common).as_posix()}" for path in whole]
    for name in names:
        assert not PurePosixPath(name).is_absolute(), name
        assert ".." not in PurePosixPath(name).parts, name
    return names


def _normal(path: Path) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return str(Path(*parts).parent.resolve() / parts[-1])


def _check_size(package: Package) -> None:
    sizes = package.sizes
    if sum(sizes.values()) <= MAX_BYTES:
        return
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    listed = ", ".join(f"{name} ({size / MIB:.1f} MiB)" for name, size in largest)
    raise ConfigError(
        f"the job's files have {sum(sizes.values()) / MIB:.0f} MiB, at most {MAX_BYTES // MIB} "
        f"are sent; the largest: {listed}; data belongs on storage that the cluster sees"
    )
