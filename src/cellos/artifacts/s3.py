"""Artifacts to an object store by a presigned URL: PUT, with no other authorization than the URL's own.

The receipt names the object by what the document declares (`s3://<bucket>/<prefix>/<name>`). A URL that AWS's rules signed says for which
bucket and region it is: one that is for others than the document's is refused, or receipts would tell of a place where nothing is.
"""

from __future__ import annotations

from typing import BinaryIO

from cellos.artifacts.upload import Upload, check_segments, check_url, fill
from cellos.errors import ExportError
from cellos.ports import Receipt


class S3Store:
    """ArtifactStore behind a presigned PUT URL."""

    kind = "s3"

    def __init__(
        self, url: str, upload: Upload, *, target: str, bucket: str, key_prefix: str | None = None, region: str | None = None
    ) -> None:
        """Raises ExportError for a URL that cannot be used, or is for another bucket or region."""
        self._url = check_url(url, what="S3 presigned URL")
        self.upload = upload
        self._bucket = bucket
        self._prefix = (key_prefix or "").strip("/")
        self.target: str | None = target
        _check_scope(self._url, bucket, region)

    def url(self, cell_id: str, name: str) -> str:
        return fill(self._url, cell_id, name)

    def destination(self, cell_id: str, name: str) -> str:
        return "s3://" + "/".join(filter(None, (self._bucket, self._prefix, name)))

    def put(self, cell_id: str, name: str, source: BinaryIO, *, content_type: str | None = None) -> Receipt:
        check_segments(cell_id, name)
        written = self.upload.put(self.url(cell_id, name), source, name=name, content_type=content_type)
        destination = self.destination(cell_id, name)
        return Receipt(target_kind=self.kind, target_name=self.target, destination=destination, bytes_written=written)


def _check_scope(url: str, bucket: str, region: str | None) -> None:
    """Compare with the scope of a Signature Version 4: `<key id>/<date>/<region>/s3/aws4_request`."""
    from urllib.parse import parse_qs, unquote, urlsplit

    parts = urlsplit(url)
    scope = parse_qs(parts.query).get("X-Amz-Credential", [""])[0].split("/")
    if len(scope) != 5 or scope[3] != "s3":
        return
    if region and scope[2] != region:
        raise ExportError(f"S3 presigned URL is for region {scope[2]}, the target declares {region}")
    named = (parts.hostname or "").startswith(f"{bucket.lower()}.") or unquote(parts.path).split("/")[1:2] == [bucket]
    if bucket and not named:
        raise ExportError(f"S3 presigned URL is not for bucket {bucket}, which the target declares")
