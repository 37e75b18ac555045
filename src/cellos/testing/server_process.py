"""`cellos-server` as a process for tests and benchmarks, on ports that the system chose."""

from __future__ import annotations

from cellos.testing.daemon_process import START_SECONDS, DaemonProcess

__all__ = ["START_SECONDS", "TOKEN", "ServerProcess"]
TOKEN = "a token for tests"


class ServerProcess(DaemonProcess):
    """`variables` come beside the token, a free port, and the NATS server at `nats_url`."""

    module = "cellos.server.main"
    ready = "cellos-server listening"

    def __init__(self, nats_url: str, **variables: str) -> None:
        super().__init__(nats_url, **{"CELLOS_SERVER_API_TOKEN": TOKEN, "CELLOS_SERVER_BIND": "127.0.0.1:0", **variables})
        self.address = ""
        """host:port of the API, once `start` is through."""
        self.admin = ""
        """host:port of the admin listener, if there is one."""

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def start(self) -> None:
        """Start, and wait until the API's port is open."""
        super().start()
        self.address = self.wait_for(self.ready)["bind"]
        admin = self.find("cellos-server admin listening")
        self.admin = admin["bind"] if admin is not None else ""
