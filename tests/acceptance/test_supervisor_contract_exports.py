"""Artifacts on their way out: to a directory, to an HTTP server, by a presigned URL; which target gets what, and what a failure leaves."""

from __future__ import annotations

import socket
from typing import Any

import pytest

TOUCHED, COMPLETED, FAILED = "observability.v1.fs_touch", "export.v2.completed", "export.v2.failed"
MAKE = ("sh", "-c", "printf built > a.txt; printf other > b.txt")
A = {"name": "a.txt", "path": "a.txt", "contentType": "text/plain; charset=utf-8"}
B = {"name": "b.txt", "path": "b.txt"}
HTTP = {"kind": "http", "name": "drop-zone", "baseUrl": "http://127.0.0.1:1/declared"}
S3 = {"kind": "s3", "name": "artifact-bucket", "bucket": "archive", "keyPrefix": "2031/04"}


def export(*artifacts: dict[str, Any], targets: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"export": {"artifacts": list(artifacts), "targets": list(targets)}}


class TestDirectory:
    def test_the_receipt_says_where_it_is(self, site: Any) -> None:
        done = site.run(*MAKE, **export(A, B), variables={"CELLOS_EXPORT_DIR": "out"})
        assert done.returncode == 0
        assert (site.place / "out/cell-1/a.txt").read_text() == "built"
        first, second = [event["data"] for event in site.events if event["type"].endswith(COMPLETED)]
        assert first["receipt"] == {"targetKind": "local", "targetName": None, "destination": "cell-1/a.txt", "bytesWritten": 5}
        assert second["artifactName"] == "b.txt"
        touched = [event["data"] for event in site.events if event["type"].endswith(TOUCHED)]
        assert [(each["purpose"], each["sourcePath"], each["artifactName"]) for each in touched] == [
            ("export", "a.txt", "a.txt"),
            ("export", "b.txt", "b.txt"),
        ]

    def test_what_is_there_stays(self, site: Any) -> None:
        """And nothing is left beside it; an artifact that is missing leaves nothing, so the next attempt succeeds."""
        site.variables["CELLOS_EXPORT_DIR"] = str(site.place / "out")
        assert site.run("true", **export(A)).returncode == 1
        assert site.run(*MAKE, **export(A)).returncode == 0
        site.jsonl.unlink()
        done = site.run("sh", "-c", "echo new > a.txt", **export(A, B))
        assert done.returncode == 1
        assert [path.name for path in (site.place / "out/cell-1").iterdir()] == ["a.txt"]
        assert (site.place / "out/cell-1/a.txt").read_text() == "built"
        failed = site.data(FAILED)
        assert (failed["artifactName"], failed["targetKind"]) == ("a.txt", "local")
        assert failed["destination"] == "cell-1/a.txt"
        assert "targetName" not in failed
        assert site.data("lifecycle.v1.destroyed")["reason"] == failed["reason"]
        [started] = [event["id"] for event in site.events if event["type"].endswith("lifecycle.v1.started")]
        assert failed["provenance"] == {"parent": started, "parentType": "dev.cellos.events.cell.lifecycle.v1.started"}

    def test_nowhere_to_go_is_known_before_the_run(self, site: Any) -> None:
        done = site.run(*MAKE, **export(A))
        site.refused(done, 'Error: export sink: export requested for artifact "a.txt" but no export sink is configured')

    def test_a_root_that_is_none(self, site: Any) -> None:
        done = site.run(*MAKE, **export(A), variables={"CELLOS_EXPORT_DIR": "/dev/null"})
        site.refused(done, "CELLOS_EXPORT_DIR local sink: /dev/null: Not a directory (os error 20)")


class TestHttp:
    @pytest.fixture
    def drop(self, site: Any, web: Any) -> Any:
        site.variables |= {"CELLOS_EXPORT_HTTP_BASE_URL": f"{web.url}/in/", "CELLOS_EXPORT_DIR": "/nowhere"}
        return site

    def test_what_is_sent(self, drop: Any, web: Any) -> None:
        done = drop.run(*MAKE, **export(A, B), variables={"CELLOS_EXPORT_HTTP_BEARER_TOKEN": "t0ken-value"})
        assert done.returncode == 0, done.stderr
        (method, path, headers, body), second = web.requests
        assert (method, path, body) == ("PUT", "/in/cell-1/a.txt", b"built")
        assert (headers["authorization"], headers["content-type"]) == ("Bearer t0ken-value", "text/plain; charset=utf-8")
        assert second[1] == "/in/cell-1/b.txt"
        receipts = [event["data"]["receipt"] for event in drop.events if event["type"].endswith(COMPLETED)]
        assert receipts[0] == {
            "targetKind": "http",
            "targetName": None,
            "destination": f"{web.url}/in/cell-1/a.txt",
            "bytesWritten": 5,
        }
        assert drop.holding("t0ken-value") == []

    @pytest.mark.parametrize(
        ("base", "path"),
        [
            ("/in/{cell_id}-{artifact_name}?sig=s3cret", "/in/cell-1-a.txt?sig=s3cret"),
            ("/fixed?sig=s3cret", "/fixed?sig=s3cret"),
            ("/in", "/in/cell-1/a.txt"),
        ],
    )
    def test_the_url(self, drop: Any, web: Any, base: str, path: str) -> None:
        assert drop.run(*MAKE, **export(A), variables={"CELLOS_EXPORT_HTTP_BASE_URL": web.url + base}).returncode == 0
        assert web.requests[0][1] == path
        assert drop.data(COMPLETED)["receipt"]["destination"] == web.url + path.partition("?")[0]
        assert drop.holding("s3cret") == []

    @pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
    def test_what_may_pass_is_tried_again(self, drop: Any, web: Any, status: int) -> None:
        web.answers = [(status, "busy"), (200, "")]
        retries = {"CELLOS_EXPORT_HTTP_MAX_ATTEMPTS": "2", "CELLOS_EXPORT_HTTP_RETRY_BACKOFF_MS": "10"}
        assert drop.run(*MAKE, **export(A), variables=retries).returncode == 0
        assert [body for *_, body in web.requests] == [b"built", b"built"]

    @pytest.mark.parametrize(("attempts", "answers"), [("1", [(503, "busy")]), ("2", [(503, "busy")] * 2), ("3", [(403, "busy")])])
    def test_what_does_not_is_told(self, drop: Any, web: Any, attempts: str, answers: list[tuple[int, str]]) -> None:
        web.answers = list(answers)
        base = web.url.replace("://", "://user:s3cret@") + "/in?sig=s3cret"
        variables = {"CELLOS_EXPORT_HTTP_MAX_ATTEMPTS": attempts, "CELLOS_EXPORT_HTTP_BASE_URL": base}
        done = drop.run(*MAKE, **export(A), variables=variables)
        text = f"export sink: http put {web.url}/in returned {answers[0][0]}: busy"
        assert (done.returncode, len(web.requests)) == (1, len(answers))
        assert f"Error: {text}\n" in done.stderr
        failed = drop.data(FAILED)
        assert (failed["targetKind"], failed["reason"]) == ("http", text)
        assert "s3cret" not in done.stderr
        assert drop.holding("s3cret") == []

    def test_a_server_that_says_nothing_is_not_waited_for(self, site: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            variables = {
                "CELLOS_EXPORT_HTTP_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/",
                "CELLOS_EXPORT_HTTP_TIMEOUT_MS": "200",
            }
            done = site.run(*MAKE, **export(A), variables=variables)
        assert done.returncode == 1
        assert "Error: export sink: http put http://127.0.0.1:" in done.stderr

    @pytest.mark.parametrize("value", ["0", "soon", "", "-1"])
    def test_times_that_are_none_are_the_defaults(self, drop: Any, value: str) -> None:
        names = ("CELLOS_EXPORT_HTTP_TIMEOUT_MS", "CELLOS_EXPORT_HTTP_CONNECT_TIMEOUT_MS")
        assert drop.run(*MAKE, **export(A), variables=dict.fromkeys(names, value)).returncode == 0

    @pytest.mark.parametrize(
        ("variables", "text"),
        [
            (
                {"CELLOS_EXPORT_HTTP_BASE_URL": "ftp://127.0.0.1/"},
                "HTTP export sink init: export sink: HTTP export base URL scheme must be http or https, got ftp",
            ),
            ({"CELLOS_EXPORT_HTTP_BASE_URL": "http://"}, "HTTP export sink init: export sink: invalid HTTP export base URL"),
            ({"CELLOS_EXPORT_HTTP_MAX_ATTEMPTS": "x"}, "CELLOS_EXPORT_HTTP_MAX_ATTEMPTS must be an integer >= 1"),
            ({"CELLOS_EXPORT_HTTP_MAX_ATTEMPTS": "0"}, "CELLOS_EXPORT_HTTP_MAX_ATTEMPTS must be >= 1"),
            ({"CELLOS_EXPORT_HTTP_RETRY_BACKOFF_MS": "x"}, "CELLOS_EXPORT_HTTP_RETRY_BACKOFF_MS must be an integer >= 0"),
            ({"CELLOS_CA_BUNDLE": "/nowhere"}, "CELLOS_CA_BUNDLE: read /nowhere: No such file or directory (os error 2)"),
            ({"CELLOS_CA_BUNDLE": "/dev/null"}, "CELLOS_CA_BUNDLE: no certificates found in /dev/null"),
        ],
    )
    def test_settings_that_are_wrong_stop_the_start(self, drop: Any, variables: dict[str, str], text: str) -> None:
        drop.refused(drop.run(*MAKE, **export(A), variables=variables), f"Error: {text}")


class TestTargets:
    def test_each_gets_its_own(self, site: Any, web: Any) -> None:
        """A variable of the target's own wins; a blank one is not there; an s3 target sends no token."""
        variables = {
            "CELLOS_EXPORT_HTTP_BASE_URL": f"{web.url}/general",
            "CELLOS_EXPORT_HTTP_BASE_URL__DROP_ZONE": f"{web.url}/own",
            "CELLOS_EXPORT_HTTP_BEARER_TOKEN": "t0ken-value",
            "CELLOS_EXPORT_HTTP_BEARER_TOKEN__DROP_ZONE": " ",
            "CELLOS_EXPORT_S3_PRESIGNED_URL__ARTIFACT_BUCKET": f"{web.url}/put?X-Amz-Signature=s3cret",
        }
        artifacts = [A | {"target": "drop-zone"}, B | {"target": "artifact-bucket"}]
        done = site.run(*MAKE, **export(*artifacts, targets=(HTTP, S3)), variables=variables)
        assert done.returncode == 0, done.stderr
        first, second = web.requests
        assert (first[1], first[2]["authorization"]) == ("/own/cell-1/a.txt", "Bearer t0ken-value")
        assert (second[1], "authorization" in second[2]) == ("/put?X-Amz-Signature=s3cret", False)
        receipts = [event["data"]["receipt"] for event in site.events if event["type"].endswith(COMPLETED)]
        assert receipts == [
            {"targetKind": "http", "targetName": "drop-zone", "destination": f"{web.url}/own/cell-1/a.txt", "bytesWritten": 5},
            {
                "targetKind": "s3",
                "targetName": "artifact-bucket",
                "destination": "s3://archive/2031/04/b.txt",
                "bytesWritten": 5,
            },
        ]
        assert site.holding("s3cret", "t0ken-value") == []

    def test_the_only_one_gets_all(self, site: Any, web: Any) -> None:
        variables = {"CELLOS_EXPORT_S3_PRESIGNED_URL": f"{web.url}/{{artifact_name}}", "CELLOS_EXPORT_DIR": str(site.place)}
        assert site.run(*MAKE, **export(A, B, targets=(S3,)), variables=variables).returncode == 0
        assert [path for _, path, *_ in web.requests] == ["/a.txt", "/b.txt"]

    def test_a_presigned_url_is_tried_again_and_never_told(self, site: Any, web: Any) -> None:
        web.answers = [(503, ""), (403, "<Code>SignatureDoesNotMatch</Code>")]
        variables = {
            "CELLOS_EXPORT_S3_PRESIGNED_URL": f"{web.url}/put?X-Amz-Signature=s3cret",
            "CELLOS_EXPORT_S3_MAX_ATTEMPTS__ARTIFACT_BUCKET": "3",
        }
        done = site.run(*MAKE, **export(A, targets=(S3,)), variables=variables)
        assert (done.returncode, len(web.requests)) == (1, 2)
        text = f"export sink: s3 put {web.url}/put returned 403: <Code>SignatureDoesNotMatch</Code>"
        assert f"Error: {text}\n" in done.stderr
        failed = site.data(FAILED)
        assert (failed["targetKind"], failed["targetName"], failed["reason"]) == ("s3", "artifact-bucket", text)
        assert failed["destination"] == "s3://archive/2031/04/a.txt"
        assert site.holding("s3cret") == []

    def test_an_s3_target_may_use_the_variable_of_http_which_is_told(self, site: Any, web: Any) -> None:
        variables = {"CELLOS_EXPORT_HTTP_BASE_URL": f"{web.url}/put?X-Amz-Signature=s3cret"}
        done = site.run(*MAKE, **export(A, targets=(S3,)), variables=variables)
        assert (done.returncode, len(web.requests)) == (0, 1)
        assert "not followed: CELLOS_EXPORT_HTTP_BASE_URL=" in done.stderr
        strict = variables | {"CELLOS_STRICT_CONFIG": "1", "CELL_OS_USE_NOOP_SINK": "1"}
        site.jsonl.unlink()
        again = site.run(*MAKE, **export(A, targets=(S3,)), variables=strict)
        site.refused(again, "refusing to start with 1 ignored/misconfigured env var(s): [CELLOS_EXPORT_HTTP_BASE_URL=")
        assert "s3cret" not in done.stderr + again.stderr

    @pytest.mark.parametrize(
        ("variable", "target", "text"),
        [
            (
                "CELL_OS_REQUIRE_HTTP_EXPORT",
                HTTP,
                'CELL_OS_REQUIRE_HTTP_EXPORT is set but no HTTP export base URL is configured for target "drop-zone"',
            ),
            (
                "CELL_OS_REQUIRE_HTTP_EXPORT",
                S3,
                'S3 export is required but no presigned URL is configured for target "artifact-bucket"',
            ),
            (
                "CELL_OS_REQUIRE_S3_EXPORT",
                S3,
                'S3 export is required but no presigned URL is configured for target "artifact-bucket"',
            ),
        ],
    )
    @pytest.mark.parametrize("value", ["", "1"])
    def test_a_url_can_be_required(self, site: Any, variable: str, target: dict[str, Any], text: str, value: str) -> None:
        done = site.run("true", **export(targets=(target,)), variables={variable: value})
        site.refused(done, f"Error: {text}")
        assert site.run("true", **export(targets=(target,)), variables={variable: "0"}).returncode == 0

    def test_that_speaks_of_declared_targets_only(self, site: Any) -> None:
        both = {"CELL_OS_REQUIRE_HTTP_EXPORT": "1", "CELL_OS_REQUIRE_S3_EXPORT": "1"}
        assert site.run("true", **export(), variables=both).returncode == 0
