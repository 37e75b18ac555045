"""Buckets as `ObjectStore`, through obstore: S3 and what speaks its API, a directory, and, untested, GCS and Azure.

    my-bucket, s3://my-bucket[/path]      endpoint, region and credentials by the usual AWS variables
    file:///directory                     on one machine, to try it without S3; made if need be
    gs://my-bucket[/path], az://container[/path]

`open_store` reads nothing and connects to nobody; `prove` does. Requests are never repeated in here: who asked knows what may be.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from cellos.core.objects import IRREGULAR, Entry, ObjectStore, Stored
from cellos.errors import ConfigError, StoreError, StoreUnfit, StoreUnreachable, os_error_text

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore as Bucket

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
PAGE = 1000
CONNECT_SECONDS = 5
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST_TEXT = 300
_INSTANCE = "169.254.169.254"
"""Where a machine of AWS asks for its credentials."""
_REQUEST = re.compile(r"^.*?Error performing ([A-Z]+) (\S+) in \S+ - (?:Server returned non-2xx status code: )?")
_CURES = {
    "NoSuchBucket": "make the bucket, or name another; AWS_ENDPOINT_URL and AWS_REGION say where it is looked for",
    "InvalidAccessKeyId": "see AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "see AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "the credentials must be allowed to get, put, delete and list below the prefix",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "AuthorizationHeaderMalformed": "see AWS_REGION",
    "PermanentRedirect": "see AWS_REGION",
    "error sending request": "nobody answers there; AWS_ENDPOINT_URL and AWS_REGION say where the bucket is looked for",
}
"""What to do about a word in an error."""
T = TypeVar("T")


def open_store(url: str, environment: Mapping[str, str], *, request_seconds: float, make: bool = True) -> ObjectStore:
    """The store that a URL or a bucket's name stands for. `request_seconds` bounds each request. Raises ConfigError.

    `make`: a directory that is not there is made; who only reads does not want that.

    The library reads credentials and region by itself, from the environment of the process.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        scheme, url = "s3", f"s3://{url}"
    parts = urlsplit(url)
    if scheme == "file":
        if parts.netloc or not parts.path.startswith("/"):
            raise ConfigError(f"{url}: not a directory; write file:///absolute/path")
        return _open_directory(unquote(parts.path), make=make)
    if scheme not in {"s3", "gs", "az"}:
        raise ConfigError(f"{url}: no store of this kind; there are s3://, file://, gs:// and az://")
    if not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError(f"{scheme}://…: not {scheme}://BUCKET[/PATH]; credentials come from variables")
    return _open_remote(scheme, url, environment, request_seconds)


def _open_directory(path: str, *, make: bool) -> ObjectStore:
    from obstore.store import LocalStore

    if not make and not os.path.isdir(path):
        raise ConfigError(f"no such directory: {path}; cellos-fleet and cellos fleet submit make it")
    try:
        os.makedirs(path, exist_ok=True)
        return _Store(LocalStore(path), root=path)
    except OSError as error:
        raise ConfigError(f"file://{path}: {os_error_text(error)}") from error


def _open_remote(scheme: str, url: str, environment: Mapping[str, str], request_seconds: float) -> ObjectStore:
    from obstore import store

    make: Any = store.from_url  # its overloads want to know the scheme
    endpoint = _endpoint(environment) if scheme == "s3" else ""
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=request_seconds),
        "connect_timeout": timedelta(seconds=min(CONNECT_SECONDS, request_seconds)),
        "allow_http": endpoint.startswith("http://"),
        "user_agent": "cellos-fleet",
    }
    authority = environment.get("AWS_CA_BUNDLE", "").strip()
    try:
        if authority:
            with open(authority, "rb") as file:
                options["root_certificate"] = file.read()
        once: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=request_seconds)}
        return _Store(make(url, client_options=options, retry_config=once))
    except OSError as error:
        raise ConfigError(f"AWS_CA_BUNDLE={authority}: {os_error_text(error)}") from error
    except Exception as error:
        raise ConfigError(f"{url}: {_text(error)}") from error


def _endpoint(environment: Mapping[str, str]) -> str:
    """The URL that the library will use, if one is set: what is none makes it panic. Raises ConfigError."""
    found = ""
    for name in ENDPOINTS:
        value = environment.get(name, "")
        if not value:
            continue
        try:
            parts = urlsplit(value)
            is_one = parts.scheme in {"http", "https"} and bool(parts.hostname) and value == value.strip() and parts.port != 0
        except ValueError:
            is_one = False
        if not is_one or "@" in parts.netloc:
            raise ConfigError(f"{name}: not a URL of an S3 API; write http://HOST[:PORT] or https://HOST[:PORT], without credentials")
        found = found or value
    return found


async def prove(store: ObjectStore, key: str, bodies: tuple[bytes, bytes]) -> Entry:
    """Leave the first body under a new key, after the store has kept it from being overwritten by the second one.

    Raises StoreUnfit where the store does not.
    """
    first, second = bodies
    if not await store.create(key, first):
        raise StoreUnreachable(f"an object that does not exist ({key}) could not be created: the store says that it is there, or is busy")
    again = await store.create(key, second)
    found = await store.read(key, len(first) + len(second))
    entry = await store.look(key)
    if found is None or entry is None:
        raise StoreUnfit(f"what was written ({key}) is not there when it is read")
    if again or found.body != first:
        raise StoreUnfit("it does not honour create-if-absent (If-None-Match): two agents could claim the same spec")
    return entry


class _Store:
    """One bucket. `root`: its directory, where it is one."""

    def __init__(self, bucket: Bucket, *, root: str | None = None) -> None:
        self._bucket = bucket
        self._root = root

    async def create(self, key: str, body: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        try:
            await _outcome(self._bucket.put_async(key, body, mode="create", use_multipart=False))
        except AlreadyExistsError:
            return False
        except FileNotFoundError as error:
            raise StoreError(_text(error)) from error
        return True

    async def write(self, key: str, body: bytes) -> None:
        try:
            await _outcome(self._bucket.put_async(key, body, mode="overwrite", use_multipart=False))
        except FileNotFoundError as error:
            raise StoreError(_text(error)) from error

    async def read(self, key: str, most: int) -> Stored | None:
        irregular = self._irregular(key)
        if irregular is not None:
            return Stored(body=b"", entry=irregular, fault=IRREGULAR)
        try:
            answer = await _outcome(self._bucket.get_async(key))
            entry = _entry(answer.meta)
            if entry.size > most:
                return Stored(body=b"", entry=entry, fault=f"{entry.size} bytes; at most {most} are read", too_large=True)
            return Stored(body=bytes(await _outcome(answer.bytes_async())), entry=entry)
        except FileNotFoundError:
            return None

    async def look(self, key: str) -> Entry | None:
        irregular = self._irregular(key)
        try:
            return irregular or _entry(await _outcome(self._bucket.head_async(key)))
        except FileNotFoundError:
            return None

    async def copy(self, source: str, target: str) -> None:
        if self._irregular(source) is not None:
            return
        try:
            await _outcome(self._bucket.copy_async(source, target))
        except FileNotFoundError:
            return

    async def remove(self, key: str) -> None:
        try:
            await _outcome(self._bucket.delete_async(key))
        except FileNotFoundError:
            return

    async def pages(self, prefix: str) -> AsyncIterator[Sequence[Entry]]:
        stream = self._bucket.list(prefix, chunk_size=PAGE).__aiter__()
        while True:
            try:
                page = await _outcome(stream.__anext__())
            except StopAsyncIteration:
                return
            yield sorted((_entry(meta) for meta in page), key=lambda entry: entry.key)

    def _irregular(self, key: str) -> Entry | None:
        """What a directory may hold beside files: links, which the library would follow, pipes, at which it would wait for ever."""
        if self._root is None:
            return None
        try:
            found = os.lstat(f"{self._root}/{key}")
        except OSError:
            return None  # that there is nothing is the library's to say
        if stat.S_ISREG(found.st_mode):
            return None
        return Entry(key=key, size=0, modified_ns=found.st_mtime_ns, etag=f"{found.st_ino:x}-{found.st_ctime_ns:x}")


def _entry(meta: ObjectMeta) -> Entry:
    modified = (meta["last_modified"] - _EPOCH) // timedelta(microseconds=1) * 1000
    return Entry(key=meta["path"], size=meta["size"], modified_ns=modified, etag=meta["e_tag"] or "")


async def _outcome(request: Awaitable[T]) -> T:
    """The answer; the library's errors as ours, but for what the caller takes as an answer."""
    from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        return await request
    except (AlreadyExistsError, FileNotFoundError):
        raise
    except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
        raise StoreError(_text(error)) from error
    except (BaseError, OSError) as error:
        raise StoreUnreachable(_text(error)) from error


def _text(error: Exception) -> str:
    """The library's words, without its debug output, and without what follows a `?` in URLs: that may be a signature. And what to do."""
    first = str(error).partition("\n\nDebug source")[0]
    if _INSTANCE in first:
        return f"no AWS credentials: neither AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are set, nor has this machine a role ({_INSTANCE})"
    told = re.search(r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?", first, re.DOTALL)
    head = first.partition("<?xml")[0]
    text = f"{head}{': '.join(part for part in told.groups() if part)}" if told else head
    text = _REQUEST.sub(r"\1 \2: ", re.sub(r"\?[^\s]*", "", " ".join(text.split())))
    cure = next((f" ({cure})" for word, cure in _CURES.items() if word in text), "")
    return text[:_LONGEST_TEXT] + cure
