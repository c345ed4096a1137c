# SPDX-License-Identifier: Apache-2.0
"""Object storage below a root URI: a folder of a file system or a prefix of a bucket (obstore).

`Storage.create` is conditional on every backend (link(2) on POSIX, If-None-Match on S3 and Azure,
ifGenerationMatch on GCS). Leases, manifests and committed parts are built on it.
"""

import errno
import functools
import hashlib
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import obstore
import pyarrow.fs
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, NotFoundError
from obstore.store import LocalStore, from_url

from sg4v_ray.core.errors import ConfigError, StorageError
from sg4v_ray.core.retry import RetryPolicy

STORAGE_ERRORS = (OSError, BaseError)
"""Errors raised while a disk or a bucket is unavailable."""
_CREATE = RetryPolicy(max_tries=6, first_delay_s=0.5, max_delay_s=8.0)
_SCHEMES = ("file", "s3", "gs", "az", "abfs", "abfss")
_CLOUD_VARIABLES = ("AWS_", "GOOGLE_", "AZURE_")


def is_local(uri: str) -> bool:
    """Say whether a URI names a file of this machine (an absolute path or file://)."""
    return uri.startswith(("/", "file://"))


def local_path(uri: str) -> Path:
    """Return the path of a local URI."""
    return Path(uri.removeprefix("file://"))


def check_root(root: str) -> str:
    """Return `root` without a trailing slash.

    Raises:
        ConfigError: it is relative, or its scheme is not one we can write to.
    """
    scheme, colon, _ = root.partition("://")
    if colon and scheme not in _SCHEMES:
        raise ConfigError(
            f"root {root!r} has the scheme {scheme!r}; use an absolute path or one of "
            + ", ".join(f"{one}://" for one in _SCHEMES[1:6])
        )
    if not colon and not root.startswith("/"):
        raise ConfigError(
            f"root {root!r} is relative; write an absolute path such as "
            f"{Path(root).absolute()} or a URI such as s3://bucket/{Path(root).name}"
        )
    if colon and scheme != "file" and (odd := set(root) & set("%?#")):
        raise ConfigError(
            f"root {root!r} has {' '.join(sorted(odd))}; in a bucket's URI these are read in "
            "several ways, so rename the prefix (a %20 is written as a space)"
        )
    return root.rstrip("/")


@dataclass(frozen=True, slots=True)
class Storage:
    """A folder of a file system or a prefix of a bucket.

    Credentials and endpoints come from the environment, as each cloud's own tools read them.
    """

    root: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", check_root(self.root))

    def open(self, *, make: bool = False) -> Any:
        """Return the obstore store of this root; only `make` may create a local folder.

        Raises:
            FileNotFoundError: the folder is local and does not exist.
        """
        if not is_local(self.root):
            return _bucket(self.root, _cloud_environment())
        folder = local_path(self.root)
        if not make and not folder.is_dir():
            raise FileNotFoundError(folder)
        return LocalStore(folder, mkdir=make, automatic_cleanup=False)

    def sub(self, path: str) -> "Storage":
        """Return the storage of a folder below this one."""
        return Storage(f"{self.root}/{path}")

    def uri(self, path: str) -> str:
        """Return the absolute URI of a path below this root."""
        return f"{self.root}/{path}"

    def put(self, path: str, data: bytes, *, sync: bool = False) -> None:
        """Write an object whole, replacing it atomically when it exists.

        Args:
            sync: return when a local disk has it too, so that a power cut loses nothing. Buckets
                always do.
        """
        obstore.put(self.open(make=True), path, data)
        if sync and is_local(self.root):
            file = local_path(self.uri(path))
            for place in (file, file.parent):
                handle = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)

    def create(
        self,
        path: str,
        data: bytes,
        *,
        is_own: Callable[[], bool] | None = None,
    ) -> bool:
        """Write an object only if it does not exist; return True if this call wrote it.

        On a local disk the bytes are synced before the object appears. A store may accept the
        object and lose its answer; its client then tries again and gets "exists" for its own
        object. So after a refusal or an error the object is compared with `data`: the same bytes
        mean that this call wrote it. Callers put a unique id into `data`. That also makes it safe
        to repeat a create after a dropped connection, which the client does not do.

        Args:
            is_own: replaces the comparison of all bytes, for large objects that have their
                writer's id in a small part.

        Raises:
            OSError, obstore.exceptions.BaseError: the store refused for good, e.g. no permission.
            StorageError: a local file system without hard links, or a bucket that failed each time
                and has no such object.
        """
        if is_local(self.root):
            return _link_new(local_path(self.uri(path)), data)
        for failures in range(1, _CREATE.max_tries + 1):
            try:
                obstore.put(self.open(make=True), path, data, mode="create")
                return True
            # S3 also answers "exists" (409) while an earlier write of this key is in progress.
            except (AlreadyExistsError, GenericError) as error:
                if self.exists(path):
                    return is_own() if is_own else self.get(path) == data
                if failures == _CREATE.max_tries:
                    raise StorageError(
                        f"{self.uri(path)} could not be written in {failures} tries: "
                        f"{first_line(error)}. Run the job again when the store answers: what is "
                        "committed is kept"
                    ) from error
            time.sleep(random.uniform(0, _CREATE.bound_s(failures)))
        raise AssertionError("unreachable: the last try returns or raises")

    def get(self, path: str) -> bytes:
        """Read an object whole.

        Raises:
            StorageError: there is no such object.
        """
        try:
            return bytes(obstore.get(self.open(), path).bytes())
        except (NotFoundError, FileNotFoundError) as error:
            raise StorageError(f"no such object: {self.uri(path)}") from error

    def exists(self, path: str) -> bool:
        """Say whether an object exists."""
        try:
            obstore.head(self.open(), path)
        except (NotFoundError, FileNotFoundError):
            return False
        return True

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Read the bytes from `start` up to `end` (excluded) of an object that has so many.

        Raises:
            StorageError: there is no such object.
        """
        try:
            return bytes(obstore.get_range(self.open(), path, start=start, end=end))
        except (NotFoundError, FileNotFoundError) as error:
            raise StorageError(f"no such object: {self.uri(path)}") from error

    def size_bytes(self, path: str) -> int:
        """Return the size of an object.

        Raises:
            StorageError: there is no such object.
        """
        try:
            return int(obstore.head(self.open(), path)["size"])
        except (NotFoundError, FileNotFoundError) as error:
            raise StorageError(f"no such object: {self.uri(path)}") from error

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the paths of all objects below a prefix, relative to this root, in order."""
        yield from self.sizes(prefix)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the sizes in bytes of all objects below a prefix, by path, in order of paths."""
        try:
            batches = obstore.list(self.open(), prefix or None)
        except FileNotFoundError:
            return {}
        found = {cast(str, one["path"]): int(one["size"]) for batch in batches for one in batch}
        return dict(sorted(found.items()))

    def list_folder(self, prefix: str = "") -> Sequence[str]:
        """Return the paths of the objects right below a prefix, without sub-folders, in order."""
        try:
            found = obstore.list_with_delimiter(self.open(), prefix or None)
        except (NotFoundError, FileNotFoundError):
            return []
        return sorted(cast(str, one["path"]) for one in found["objects"])

    def delete(self, prefix: str) -> None:
        """Delete an object, or all objects below a prefix."""
        if is_local(self.root):
            found = local_path(self.root) / prefix
            if found.is_dir():
                shutil.rmtree(found)
            else:
                found.unlink(missing_ok=True)
            return
        # A prefix listing leaves out the object whose name equals the prefix.
        exact = [prefix] if prefix and self.exists(prefix) else []
        self.delete_objects([*exact, *self.list(prefix)])

    def delete_objects(self, paths: Sequence[str]) -> None:
        """Delete objects by their whole paths; many at once in a bucket."""
        if is_local(self.root):
            for path in paths:
                (local_path(self.root) / path).unlink(missing_ok=True)
            return
        if paths:
            obstore.delete(self.open(), list(paths))

    def arrow(self, path: str = "") -> tuple[pyarrow.fs.FileSystem, str]:
        """Return the pyarrow file system and path of the same place, for Ray and Parquet."""
        uri = self.uri(path).rstrip("/")
        if is_local(self.root):
            return pyarrow.fs.LocalFileSystem(), str(local_path(uri))
        filesystem, inside = pyarrow.fs.FileSystem.from_uri(uri)
        return filesystem, inside

    def upload(self, folder: Path, path: str) -> dict[str, str]:
        """Copy a local folder to `path` ('' is the root); return sha256 digests by file name."""
        digests = {}
        for file in sorted(one for one in folder.rglob("*") if one.is_file()):
            name = file.relative_to(folder).as_posix()
            digests[name] = sha256_of(file)
            obstore.put(self.open(make=True), f"{path}/{name}" if path else name, file)
        return digests

    def localise(self, path: str, *, cache: Path, digests: dict[str, str]) -> Path:
        """Bring a folder of files to this node once and check every checksum.

        A local root is used where it lies. Several processes may call this at once: each fills
        its own temporary folder and the first rename wins.

        Raises:
            StorageError: a file is missing or its bytes are not those that were committed.
        """
        if is_local(self.root):
            folder = local_path(self.uri(path))
            _check_digests(folder, digests)
            return folder
        key = hashlib.sha256(repr((self.uri(path), sorted(digests.items()))).encode()).hexdigest()
        cache = cache.expanduser()
        target = cache / key[:32]
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as staging:
                for name in digests:
                    self._download(f"{path}/{name}", Path(staging) / name)
                with suppress(OSError):  # another process on this node won the race
                    os.rename(staging, target)
        try:
            _check_digests(target, digests)
        except StorageError as error:
            raise StorageError(
                f"{error}. This is a node's copy of {self.uri(path)}: delete {target}, run again"
            ) from error
        return target

    def _download(self, path: str, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = obstore.get(self.open(), path).stream()
        except (NotFoundError, FileNotFoundError) as error:
            raise StorageError(f"no such object: {self.uri(path)}") from error
        with to.open("wb") as file:
            for chunk in stream:
                file.write(chunk)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text: obstore adds pages of details."""
    return str(error).strip().partition("\n")[0]


def _cloud_environment() -> tuple[tuple[str, str], ...]:
    return tuple(
        sorted(item for item in os.environ.items() if item[0].startswith(_CLOUD_VARIABLES))
    )


@functools.lru_cache(maxsize=64)
def _bucket(root: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """Keep one client, with its connections, for each root and set of credentials."""
    return from_url(root)


def _link_new(target: Path, data: bytes) -> bool:
    """Write a file that must not exist: synced bytes first, then link(2) to its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Listings of obstore hide names that end with # and digits, as its own unfinished writes have.
    staging = target.with_name(f"{target.name}#{uuid.uuid4().int}")
    try:
        with staging.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(staging, target)
        except FileExistsError:
            return target.read_bytes() == data
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            raise StorageError(
                f"the file system of {target.parent} refuses hard links ({error.strerror}), which "
                "commits need; use a root on another file system or in a bucket"
            ) from error
    finally:
        staging.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def sha256_of(file: Path) -> str:
    """Return the sha256 hex digest of a file, read in pieces."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_digests(folder: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            raise StorageError(f"{file} is missing; the artifact's manifest lists it")
        if sha256_of(file) != digest:
            raise StorageError(f"{file} was changed after it was committed; restore or rebuild it")
