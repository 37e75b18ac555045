"""An S3 API in a process of its own, with one bucket, for tests and benchmarks. It is moto's (s3_process.py): it honours If-None-Match."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

REGION = "eu-central-1"
_PROGRAM = Path(__file__).with_name("s3_process.py")


class S3Server:
    """`environment` is what a client needs to know."""

    bucket = "fleet-test"

    def __init__(self, endpoint: str, process: subprocess.Popen[str]) -> None:
        self.endpoint = endpoint
        self._process = process

    @property
    def environment(self) -> dict[str, str]:
        return self.environment_at(self.endpoint)

    @staticmethod
    def environment_at(endpoint: str) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "NO_PROXY": "127.0.0.1",
        }

    def fill(self, objects: Mapping[str, str]) -> None:
        """Put many objects into the bucket, in a hundredth of the time that requests take."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"bucket": self.bucket, "objects": objects}) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """It ends with the `with`, and with us."""
    with subprocess.Popen([sys.executable, "-P", str(_PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        body = f"<CreateBucketConfiguration><LocationConstraint>{REGION}</LocationConstraint></CreateBucketConfiguration>"
        request = urllib.request.Request(f"{endpoint}/{S3Server.bucket}", data=body.encode(), method="PUT")  # noqa: S310  # ours
        with opener.open(request, timeout=60):
            pass
        yield S3Server(endpoint, process)
        process.stdin.close()
