"""Stores in object storage, through the library `obstore`: `s3://BUCKET/PATH`, `gs://...` and `az://...`.

Every object is written by a single PUT, so it is there as a whole or not at all. `create` and `replace` are
PUTs with a condition that the server checks. A server may ignore conditions without saying so, therefore
`begin_writing` tries them. A refused condition does not prove that another process won: the first try of a
repeated request may have been the winner. Conditional PUTs therefore carry a random id, which is read back.

Credentials, region and endpoint come from the environment variables of the library. Its client hangs in
forked processes, so only the process that used it first may go on using it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from coursepack.data.store.locations.local import MAX_HELD_BYTES
from coursepack.data.store.locations.resident import Resident
from coursepack.data.store.locations.services import SERVICES
from coursepack.errors import RecipeError, StoreNotFound, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import IO

    from numpy.typing import NDArray

    from coursepack.data.store.locations.base import PieceCheck
    from coursepack.data.store.locations.services import Service

TIMEOUT = timedelta(minutes=10)
"""Maximum duration of one request, including its body."""
RETRIES = {"max_retries": 6, "retry_timeout": timedelta(minutes=2)}
"""Repetition of requests that failed with a server error or without a response."""
ATTEMPTS = 3
"""Number of times that a conditional PUT without a response is sent; the library does not repeat it."""
RENEW_SECONDS = 30.0
"""Interval at which the holder of an object writes it again."""
LEASE_SECONDS = 120.0
"""Time since its last write after which an object is no longer held."""
WRITER = "coursepackwriter"
"""Metadata of an object: the random id of the conditional PUT that wrote it.

Azure allows no hyphens in names of metadata, and some proxies drop headers with underscores.
"""
HOLDER = "coursepackholder"
"""Metadata of an object that is held: host and process of its holder."""
PROBES = "probe"
"""Folder of the objects that are written to try conditions."""
_SEGMENT = re.compile(r"[^/\\\x00-\x1f]+")
_users: set[int] = set()
"""Process that has used the library's client; a forked process inherits it."""


class BucketLocation:
    """A location in a bucket, with one object per key. See `Location` for the methods."""

    has_locks = False
    is_remote = True

    def __init__(self, scheme: str, rest: str, kind: str = "store") -> None:
        """Parse an address; nothing is opened before the first operation.

        Args:
            scheme: `s3`, `gs` or `az`.
            rest: bucket, and the path in it.
            kind: content of the location: `store`, `group` for that of replicas, or `source` for the folder
                of a source's files, which may be the bucket itself.

        Raises:
            RecipeError: the address is not SCHEME://BUCKET/PATH.
        """
        self._service = SERVICES[scheme]
        bucket, segments = self._service.bucket, rest.rstrip("/").split("/")
        invalid = [part for part in segments if part in (".", "..") or not _SEGMENT.fullmatch(part)]
        if len(segments) < (1 if kind == "source" else 2) or invalid:
            raise RecipeError(
                f"address {f'{scheme}://{rest}'!r} of a {kind} is not {scheme}://{bucket.upper()}/PATH: give "
                f"the {bucket} and the path of the {kind} in it"
            )
        self._kind = kind
        self._scheme, self._rest = scheme, "/".join(segments)
        self._bucket, self.name = segments[0], segments[-1]
        self._opened: Any = None
        self._is_conditional = True

    def __reduce__(self) -> tuple[type[BucketLocation], tuple[str, str, str]]:
        return BucketLocation, (self._scheme, self._rest, self._kind)

    def __str__(self) -> str:
        return f"{self._scheme}://{self._rest}"

    def where(self, key: str) -> str:
        """Return the address of an object."""
        return f"{self}/{key}"

    def begin_writing(self, *, single_writer: bool) -> None:
        """Try on an object of its own whether the server keeps conditions, and remove that object.

        Raises:
            RecipeError: it does not, and `single_writer` is false.
            StoreNotFound: there is no such bucket.
        """
        try:
            self._is_conditional = self._keeps_conditions()
        except FileNotFoundError as error:
            raise StoreNotFound(
                f"there is no {self._service.bucket} {self._bucket!r} for the {self._kind} {str(self)!r}: "
                f"create it, or correct the address or the endpoint ({' or '.join(self._service.endpoint)})"
            ) from error
        if not self._is_conditional and not single_writer:
            raise RecipeError(
                f"the server of {str(self)!r} does not keep conditional writes (If-None-Match, If-Match), by "
                "which several processes share a store. Use a service that does, or write with one process "
                "at a time and say so with --single-writer"
            )

    def put(self, key: str, *pieces: bytes | NDArray[Any]) -> None:
        """Write an object with a single PUT."""
        with self._naming(key):
            self._put(key, b"".join(bytes(memoryview(piece).cast("B")) for piece in pieces))  # type: ignore[arg-type, unused-ignore]  # stubs differ between Pythons

    def create(self, key: str, data: bytes) -> str | None:
        """Write an object on the condition that there is none."""
        if self._is_conditional:
            return self._put_if(key, data, "create")
        return None if self.tag(key) is not None else self._put_alone(key, data)

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Write an object on the condition that it has the tag."""
        if self._is_conditional:
            e_tag, _, version = tag.partition(" ")
            # The library does not accept a version that is None.
            condition = {"e_tag": e_tag, "version": version} if version else {"e_tag": e_tag}
            return self._put_if(key, data, condition)
        return self._put_alone(key, data) if self.tag(key) == tag else None

    def tag(self, key: str) -> str | None:
        """Return the entity tag of an object, with its version if the service gives one."""
        try:
            return _tag(self._head(key))
        except FileNotFoundError:
            return None

    def get(self, key: str, max_bytes: int) -> bytes:
        """Read an object."""
        return self.get_tagged(key, max_bytes)[0]

    def get_tagged(self, key: str, max_bytes: int) -> tuple[bytes, str]:
        """Read an object and its tag in one request."""
        data, meta, _ = self._get(key, max_bytes)
        return data, _tag(meta)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` of an object."""
        if stop <= start:
            return self.get(key, 0)[:0] if self.size(key) == 0 else b""
        with self._naming(key):
            return bytes(self._client().get_range(key, start=start, end=stop))

    def get_ranges(self, key: str, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """Read several ranges of bytes of an object. Ranges that are close to each other are one request."""
        with self._naming(key):
            return [bytes(piece) for piece in self._client().get_ranges(key, starts=starts, ends=stops)]

    def download(self, key: str, file: IO[bytes]) -> None:
        """Write the content of an object to an open file."""
        with self._naming(key):
            for piece in self._client().get(key).stream():
                file.write(piece)

    def entries(self) -> dict[str, tuple[int, str]]:
        """Return the size and the tag of every object of the location, by key."""
        with self._naming(""):
            found = [entry for page in self._client().list() for entry in page]
            return {str(entry["path"]): (int(entry["size"]), _tag(entry)) for entry in found}

    def size(self, key: str) -> int:
        """Return the size of an object in bytes."""
        return int(self._head(key)["size"])

    def modified(self, key: str) -> float:
        """Return the server's time of an object's last write."""
        return float(self._head(key)["last_modified"].timestamp())

    def map(self, key: str, *, resident: bool = False, check: PieceCheck | None = None) -> Resident:
        """Read an object into memory."""
        data, _, _ = self._get(key, sys.maxsize)
        return Resident(np.frombuffer(data, dtype=np.uint8))

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the objects directly in a folder."""
        return sorted(str(entry["path"]).rpartition("/")[2] for entry in self._list(folder))

    def delete(self, key: str) -> None:
        """Remove an object if it exists."""
        with suppress(FileNotFoundError), self._naming(key):
            self._client().delete(key)

    def make_way(self, keys: Iterable[str]) -> None:
        """Do nothing: no folder can be at the key of an object."""

    def sweep(self, folder: str, wanted: Callable[[str], bool]) -> None:
        """Do nothing: an interrupted PUT leaves nothing behind."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Do nothing: there are no locks."""
        yield

    @contextmanager
    def hold(self, key: str, data: bytes) -> Iterator[Callable[[bytes], None]]:
        """Write an object, and again every `RENEW_SECONDS`; it stays, but is no longer held afterwards."""
        lease = _Lease(self, key, data)
        try:
            yield lease.write
        finally:
            lease.release()

    def held(self, folder: str) -> list[tuple[str, bytes]]:
        """Return the objects that were held less than `LEASE_SECONDS` ago.

        An object held by a process of this machine that no longer runs is left out.
        """
        found = []
        for entry in sorted(self._list(folder), key=lambda entry: str(entry["path"])):
            if time.time() - entry["last_modified"].timestamp() > LEASE_SECONDS:
                continue
            key = f"{folder}/{str(entry['path']).rpartition('/')[2]}"
            with suppress(FileNotFoundError):
                data, _, attributes = self._get(key, MAX_HELD_BYTES)
                if _is_alive(attributes.get(HOLDER)):
                    found.append((key, data))
        return found

    def put_held(self, key: str, data: bytes) -> None:
        """Write an object that this process holds."""
        with self._naming(key):
            self._put(key, data, attributes={HOLDER: f"{socket.gethostname()} {os.getpid()}"})

    def free_bytes(self) -> int:
        """Return a very large number: a bucket has no limit."""
        return sys.maxsize

    def zarr_store(self) -> Any:
        """Return the objects as Zarr reads them."""
        from zarr.storage import ObjectStore

        return ObjectStore(self._client(), read_only=True)

    def _client(self) -> Any:
        if not _users <= {os.getpid()}:
            raise RuntimeError(
                f"{str(self)!r} was opened in another process, and its client cannot be used in a fork of "
                "that: start processes by `spawn`, or read the store before they start"
            )
        _users.add(os.getpid())
        if self._opened is None:
            self._opened = _open_client(str(self), self._kind, self._service)
        return self._opened

    def _put(self, key: str, data: bytes, **options: Any) -> str:
        # Parts of an interrupted multipart upload would stay in the bucket, invisible.
        return _tag(self._client().put(key, data, use_multipart=False, **options))

    def _put_if(self, key: str, data: bytes, mode: Any) -> str | None:
        """Write an object under a condition; returns its tag, or None if the condition does not hold."""
        self._client()
        from obstore import exceptions

        writer = secrets.token_hex(16)
        for attempt in range(ATTEMPTS):
            try:
                return self._put(key, data, mode=mode, attributes={WRITER: writer})
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return self._tag_if_by(key, writer)
            except FileNotFoundError as error:
                if mode == "create":
                    raise self._service.no_bucket(self.where(key)) from error
                return None
            except exceptions.GenericError as error:
                # Without a response, only the object tells whether it was written.
                if (tag := self._tag_if_by(key, writer)) is not None:
                    return tag
                if attempt == ATTEMPTS - 1:
                    raise self._service.system_error(error, self.where(key)) from error
            except exceptions.BaseError as error:
                raise self._service.system_error(error, self.where(key)) from error
        return None

    def _tag_if_by(self, key: str, writer: str) -> str | None:
        """Return the tag of an object if this conditional PUT has written it, else None."""
        try:
            _, meta, attributes = self._get(key, sys.maxsize)
        except FileNotFoundError:
            return None
        return _tag(meta) if attributes.get(WRITER) == writer else None

    def _put_alone(self, key: str, data: bytes) -> str:
        with self._naming(key):
            return self._put(key, data)

    def _keeps_conditions(self) -> bool:
        key = f"{PROBES}/{secrets.token_hex(8)}"
        self._is_conditional = True
        try:
            first = self.create(key, b"1")
            return (
                first is not None
                and self.create(key, b"2") is None
                and self.replace(key, b"3", first) is not None
                and self.replace(key, b"4", first) is None
            )
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            return False
        finally:
            with suppress(OSError):
                self.delete(key)

    def _get(self, key: str, max_bytes: int) -> tuple[bytes, Any, dict[str, str]]:
        """Return content, metadata and attributes of an object."""
        with self._naming(key):
            found = self._client().get(key)
            meta, attributes = found.meta, dict(found.attributes)
            if meta["size"] > max_bytes:
                raise ValueError(f"has {meta['size']:,} bytes, expected at most {max_bytes:,}")
            return bytes(found.bytes()), meta, attributes

    def _head(self, key: str) -> Any:
        with self._naming(key):
            return self._client().head(key)

    def _list(self, folder: str) -> list[Any]:
        with self._naming(folder):
            return list(self._client().list_with_delimiter(folder or None)["objects"])

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """Turn the library's errors into system errors that name the object."""
        self._client()
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.where(key)) from error
        except BaseError as error:
            raise self._service.system_error(error, self.where(key)) from error


class _Lease:
    """An object that this process holds, written again by a thread."""

    def __init__(self, location: BucketLocation, key: str, data: bytes) -> None:
        self._location, self._key, self._data = location, key, data
        self._turn, self._ended = threading.Lock(), threading.Event()
        self.write(data)
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Replace the content of the object."""
        with self._turn:
            self._data = data
            self._location.put_held(self._key, data)

    def release(self) -> None:
        """Stop holding the object. If it cannot be written, the lease ends by itself."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            self._location.put(self._key, self._data)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with suppress(OSError):
                self.write(self._data)


def _open_client(address: str, kind: str, service: Service) -> Any:
    """Return the library's client for an address.

    Raises:
        RecipeError: the library is not installed, or does not accept the address or the environment.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise RecipeError(
            f"{kind} {address!r} needs obstore, which cannot be imported: {error}. "
            "Get it with `pip install 'coursepack[s3]'`"
        ) from error
    options = {"timeout": TIMEOUT, **({"allow_http": True} if service.allows_http() else {})}
    try:
        return from_url(address, client_options=options, retry_config=RETRIES)
    except (BaseError, ValueError) as error:
        raise RecipeError(
            f"{kind} {address!r} cannot be opened: {first_line(error)}. Check "
            f"{' and '.join(service.credentials)}"
        ) from error


def _tag(meta: Any) -> str:
    """Return the tag from the metadata of an object, or from the result of a PUT."""
    return " ".join(part for part in (meta["e_tag"], meta["version"]) if part)


def _is_alive(holder: str | None) -> bool:
    """Return False if there is no holder, or if it was a process of this machine that has ended."""
    host, _, pid = (holder or "").rpartition(" ")
    return bool(holder) and (host != socket.gethostname() or psutil.pid_exists(int(pid)))
