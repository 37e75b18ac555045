"""An S3 API in a process of its own, with one bucket, for tests and benchmarks. It is moto's, which honours If-None-Match."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

REGION = "eu-central-1"
_SERVER = """
import logging
import threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

logging.getLogger("werkzeug").disabled = True
WSGIRequestHandler.protocol_version = "HTTP/1.1"
answer, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

def application(environment, start):
    with one_at_a_time:
        return [b"".join(answer(environment, start))]

server = make_server("127.0.0.1", 0, application, threaded=True)
server.daemon_threads = True
print(f"http://127.0.0.1:{server.server_port}", flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
input()
"""
"""One request at a time: by itself it may let two of them create the same object."""


class S3Server:
    """`environment` is what a client needs to know."""

    bucket = "fleet-test"

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

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


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """It ends with the `with`, and with us."""
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        body = f"<CreateBucketConfiguration><LocationConstraint>{REGION}</LocationConstraint></CreateBucketConfiguration>"
        request = urllib.request.Request(f"{endpoint}/{S3Server.bucket}", data=body.encode(), method="PUT")  # noqa: S310  # ours
        with opener.open(request, timeout=60):
            pass
        yield S3Server(endpoint)
        process.stdin.write("\n")
