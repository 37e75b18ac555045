"""An S3 API: moto's, as a program. It ends when its standard input does.

    python -P s3_process.py

The first line of standard output is its URL. Each line of standard input is a JSON object `{"bucket": NAME, "objects": {KEY: TEXT}}`,
which are put there at once; a line says so.

By itself moto goes through all keys for every listing, and may let two requests create the same object. Here names are kept in order, and
requests are answered one after the other.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server

models: Any = import_module("moto.s3.models")
server_of_moto: Any = import_module("moto.server")
_LAST = "\U0010ffff"
_list_as_moto = models.S3Backend.list_objects_v2


class _Keys(models._VersionedKeyStore):  # type: ignore[misc]  # noqa: SLF001  # what its buckets keep objects in
    """The objects of a bucket, with their names in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __setitem__(self, key: str, value: Any) -> None:
        self._note(key)
        super().__setitem__(key, value)

    def setlist(self, key: Any, list_: Any) -> Any:
        self._note(key)
        return super().setlist(key, list_)

    def pop(self, key: str) -> None:
        super().pop(key)
        del self.names[bisect_left(self.names, key)]

    def _note(self, key: str) -> None:
        if key not in self:
            insort(self.names, key)


def _list(
    backend: Any,
    bucket: Any,
    prefix: str | None,
    delimiter: str | None,
    continuation_token: str | None,
    start_after: str | None,
    max_keys: int,
) -> Any:
    if delimiter:
        return _list_as_moto(backend, bucket, prefix, delimiter, continuation_token, start_after, max_keys)
    names, prefix = bucket.keys.names, prefix or ""
    after = continuation_token or start_after or ""
    first = max(bisect_left(names, prefix), bisect_right(names, after) if after else 0)
    end = bisect_left(names, prefix + _LAST)
    page = names[first : min(end, first + max_keys)]
    token = page[-1] if page and first + len(page) < end else None
    return [bucket.keys[name] for name in page], token is not None, token


def main() -> None:
    logging.getLogger("werkzeug").disabled = True
    WSGIRequestHandler.protocol_version = "HTTP/1.1"
    models._VersionedKeyStore = _Keys  # noqa: SLF001  # moto has no option for it
    models.S3Backend.list_objects_v2 = _list
    answer, one_at_a_time = server_of_moto.DomainDispatcherApplication(server_of_moto.create_backend_app), threading.Lock()

    def application(environment: Any, start: Any) -> Iterable[bytes]:
        with one_at_a_time:
            return [b"".join(answer(environment, start))]

    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _say(f"http://127.0.0.1:{server.server_port}")
    for line in sys.stdin:
        given = json.loads(line)
        with one_at_a_time:
            backend = next(iter(models.s3_backends.values()))["aws"]
            for key, text in given["objects"].items():
                backend.put_object(given["bucket"], key, text.encode())
        _say("done")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
