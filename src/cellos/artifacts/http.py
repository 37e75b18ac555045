"""Artifacts to an HTTP server: PUT `<base URL>/<cell id>/<name>`, or a URL with placeholders."""

from __future__ import annotations

from typing import BinaryIO

from cellos.artifacts.upload import Upload, check_segments, check_url, encoded, fill, has_placeholder
from cellos.core.urls import without_credentials
from cellos.ports import Receipt


class HttpStore:
    """ArtifactStore below an http(s) URL. What is there is the server's to replace or to refuse."""

    kind = "http"

    def __init__(self, url: str, upload: Upload, *, target: str | None = None, token: str | None = None) -> None:
        """Raises ExportError for a URL that cannot be used. `token` is sent as Bearer."""
        self._url = check_url(url, what="HTTP export base URL" if url.strip() else "HTTP base URL")
        self.upload = upload
        self._token = token
        self.target = target

    @property
    def has_token(self) -> bool:
        return self._token is not None

    def with_token(self, token: str) -> HttpStore:
        return HttpStore(self._url, self.upload, target=self.target, token=token)

    def url(self, cell_id: str, name: str) -> str:
        """Where a file is sent. A URL with a query is complete, unless it has placeholders."""
        if has_placeholder(self._url) or "?" in self._url:
            return fill(self._url, cell_id, name)
        return f"{self._url.rstrip('/')}/{encoded(cell_id)}/{encoded(name)}"

    def destination(self, cell_id: str, name: str) -> str:
        """The URL without user, password and query."""
        return without_credentials(self.url(cell_id, name))

    def put(self, cell_id: str, name: str, source: BinaryIO, *, content_type: str | None = None) -> Receipt:
        check_segments(cell_id, name)
        url = self.url(cell_id, name)
        written = self.upload.put(url, source, name=name, content_type=content_type, token=self._token)
        return Receipt(target_kind=self.kind, target_name=self.target, destination=without_credentials(url), bytes_written=written)
