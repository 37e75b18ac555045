from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cellos.artifacts.targets import Fallback, Targets, open_targets, scoped
from cellos.artifacts.upload import Upload
from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.errors import ConfigError, ExportError
from cellos.ports import ArtifactStore

HTTP = {"kind": "http", "name": "drop", "baseUrl": "https://user:pw@drop.example:8443/in"}
S3 = {"kind": "s3", "name": "artifact-bucket", "bucket": "archive", "keyPrefix": "2031", "region": "eu-central-1"}
EGRESS = [{"host": "DROP.example", "port": 8443, "protocol": "tls"}]
URL = "https://store.example/x"


def spec(
    targets: list[dict[str, Any]], *artifacts: dict[str, Any], egress: list[dict[str, Any]] | None = None, secrets: tuple[str, ...] = ()
) -> CellSpec:
    document = {
        "apiVersion": "cellos.io/v1",
        "kind": "ExecutionCell",
        "spec": {
            "id": "cell-1",
            "authority": {"egressRules": egress or [], "secretRefs": list(secrets)},
            "lifetime": {"ttlSeconds": 60},
            "export": {"targets": targets, "artifacts": [{"name": "a", "path": "a", **artifact} for artifact in artifacts]},
        },
    }
    return parse_execution_cell(json.dumps(document).encode()).spec


class Sent:
    """What uploads were asked to send."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.tokens: list[str | None] = []


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    seen = Sent()

    def put(self: Upload, url: str, source: Any, *, name: str, content_type: str | None = None, token: str | None = None) -> int:
        seen.urls.append(url)
        seen.tokens.append(token)
        return 0

    monkeypatch.setattr(Upload, "put", put)
    return seen


def stores(document: CellSpec, environment: Mapping[str, str], secrets: Mapping[str, str] | None = None) -> list[ArtifactStore | None]:
    targets = open_targets(document, environment)
    assert document.export is not None
    return [targets.for_artifact(artifact, secrets) for artifact in document.export.artifacts or ()]


def put(store: ArtifactStore | None) -> None:
    assert store is not None
    store.put("cell-1", "a", io.BytesIO())


class TestScopedVariables:
    @pytest.mark.parametrize(
        ("environment", "found"),
        [
            ({}, None),
            ({"X": "general"}, ("X", "general")),
            ({"X": "general", "X__ARTIFACT_BUCKET": " own "}, ("X__ARTIFACT_BUCKET", "own")),
            ({"X": "general", "X__ARTIFACT_BUCKET": "  "}, ("X", "general")),
            ({"X": " ", "X__ARTIFACT_BUCKET": ""}, None),
            ({"X__OTHER": "other"}, None),
        ],
    )
    def test_a_target_has_variables_of_its_own(self, environment: dict[str, str], found: tuple[str, str] | None) -> None:
        assert scoped(environment, "X", "artifact-bucket") == found

    def test_every_character_but_letters_and_digits_is_an_underscore(self) -> None:
        assert scoped({"X__A_B_C9": "1"}, "X", "a.b-c9") == ("X__A_B_C9", "1")


class TestWhichStore:
    def test_without_targets_the_default_is_used(self, tmp_path: Path) -> None:
        local = {"CELLOS_EXPORT_DIR": str(tmp_path)}
        document = spec([], {})
        assert [store and store.kind for store in stores(document, {})] == [None]
        assert [store and store.kind for store in stores(document, local)] == ["local"]
        assert [store and store.kind for store in stores(document, local | {"CELLOS_EXPORT_HTTP_BASE_URL": URL})] == ["http"]

    def test_the_only_target_needs_no_name_and_the_default_is_not_for_it(self, tmp_path: Path) -> None:
        environment = {"CELLOS_EXPORT_HTTP_BASE_URL__DROP": URL, "CELLOS_EXPORT_DIR": str(tmp_path)}
        [store] = stores(spec([HTTP], {}), environment)
        assert store is not None
        assert (store.kind, store.target) == ("http", "drop")

    def test_each_artifact_goes_to_its_target(self) -> None:
        environment = {"CELLOS_EXPORT_HTTP_BASE_URL": URL, "CELLOS_EXPORT_S3_PRESIGNED_URL": "https://s3.example/k"}
        found = stores(spec([HTTP, S3], {"target": "artifact-bucket"}, {"target": "drop"}), environment)
        assert [(store.kind, store.target) for store in found if store] == [("s3", "artifact-bucket"), ("http", "drop")]

    @pytest.mark.parametrize(("targets", "environment", "kind"), [([HTTP], {}, "http"), ([S3], {}, "s3"), ([], {}, "local")])
    def test_a_failure_is_reported_for_the_declared_kind(
        self, targets: list[dict[str, Any]], environment: dict[str, str], kind: str
    ) -> None:
        document = spec(targets, {})
        assert document.export is not None
        [artifact] = document.export.artifacts or ()
        assert open_targets(document, environment).kind_for(artifact) == kind
        default = open_targets(document, {"CELLOS_EXPORT_HTTP_BASE_URL": URL}).kind_for(artifact)
        assert default == ("s3" if kind == "s3" else "http")


class TestMissingUrls:
    def test_an_http_target_without_a_url_is_recorded(self) -> None:
        targets = open_targets(spec([HTTP], {}), {})
        reason = 'no HTTP export base URL is configured for target "drop", and no egress rule lists drop.example:8443'
        assert targets.fallbacks == (Fallback("CELLOS_EXPORT_HTTP_BASE_URL__DROP", "", reason),)

    def test_an_s3_target_without_a_url_is_recorded(self) -> None:
        targets = open_targets(spec([S3], {}), {})
        reason = 'no presigned URL is configured for target "artifact-bucket"'
        assert targets.fallbacks == (Fallback("CELLOS_EXPORT_S3_PRESIGNED_URL__ARTIFACT_BUCKET", "", reason),)

    @pytest.mark.parametrize("value", ["0", "False", " no ", "off"])
    def test_a_requirement_can_be_off(self, value: str) -> None:
        flags = dict.fromkeys(("CELL_OS_REQUIRE_HTTP_EXPORT", "CELL_OS_REQUIRE_S3_EXPORT"), value)
        assert len(open_targets(spec([HTTP, S3]), flags).fallbacks) == 2

    @pytest.mark.parametrize("value", ["1", "yes", ""])
    def test_a_required_http_url(self, value: str) -> None:
        with pytest.raises(ConfigError) as caught:
            open_targets(spec([HTTP], egress=EGRESS), {"CELL_OS_REQUIRE_HTTP_EXPORT": value})
        assert str(caught.value) == 'CELL_OS_REQUIRE_HTTP_EXPORT is set but no HTTP export base URL is configured for target "drop"'

    @pytest.mark.parametrize("variable", ["CELL_OS_REQUIRE_HTTP_EXPORT", "CELL_OS_REQUIRE_S3_EXPORT"])
    def test_a_required_presigned_url(self, variable: str) -> None:
        with pytest.raises(ConfigError) as caught:
            open_targets(spec([S3]), {variable: ""})
        assert str(caught.value) == 'S3 export is required but no presigned URL is configured for target "artifact-bucket"'

    def test_requirements_speak_of_declared_targets_only(self) -> None:
        require = {"CELL_OS_REQUIRE_HTTP_EXPORT": "1", "CELL_OS_REQUIRE_S3_EXPORT": "1"}
        assert open_targets(spec([]), require).fallbacks == ()
        assert open_targets(spec([HTTP]), {"CELL_OS_REQUIRE_S3_EXPORT": "1"}).fallbacks

    @pytest.mark.parametrize(
        ("targets", "cure"),
        [
            ([], "set CELLOS_EXPORT_DIR or CELLOS_EXPORT_HTTP_BASE_URL"),
            ([HTTP], "set CELLOS_EXPORT_HTTP_BASE_URL__DROP"),
            ([S3], "set CELLOS_EXPORT_S3_PRESIGNED_URL__ARTIFACT_BUCKET"),
        ],
    )
    def test_a_run_with_an_artifact_for_nowhere_is_refused(self, targets: list[dict[str, Any]], cure: str) -> None:
        with pytest.raises(ExportError) as caught:
            open_targets(spec(targets, {}), {}).check()
        assert str(caught.value) == f'export sink: export requested for artifact "a" but no export sink is configured; {cure}'

    @pytest.mark.parametrize("targets", [[], [HTTP], [S3]])
    def test_a_run_without_artifacts_is_not(self, targets: list[dict[str, Any]]) -> None:
        open_targets(spec(targets), {}).check()


class TestUrls:
    @pytest.mark.parametrize(
        ("targets", "variable", "text"),
        [
            (
                [],
                "CELLOS_EXPORT_HTTP_BASE_URL",
                "HTTP export sink init: export sink: HTTP export base URL scheme must be http or https, got ftp",
            ),
            ([HTTP], "CELLOS_EXPORT_HTTP_BASE_URL__DROP", "HTTP export sink init: export sink: HTTP export base URL scheme"),
            (
                [S3],
                "CELLOS_EXPORT_S3_PRESIGNED_URL",
                "S3 export sink init: export sink: S3 presigned URL scheme must be http or https, got ftp",
            ),
        ],
    )
    def test_a_malformed_url_is_fatal_and_not_repeated(self, targets: list[dict[str, Any]], variable: str, text: str) -> None:
        with pytest.raises(ConfigError) as caught:
            open_targets(spec(targets), {variable: "ftp://user:hidden@host/x?sig=hidden"})
        assert str(caught.value).startswith(text)
        assert str(caught.value).endswith(f" ({variable})")
        assert "hidden" not in str(caught.value)

    def test_an_s3_target_may_use_the_http_url(self) -> None:
        environment = {"CELLOS_EXPORT_HTTP_BASE_URL": "https://u:hidden@s3.example/k?sig=hidden"}
        targets = open_targets(spec([S3], {}), environment)
        reason = 'used for the s3 target "artifact-bucket" in place of CELLOS_EXPORT_S3_PRESIGNED_URL__ARTIFACT_BUCKET'
        assert targets.fallbacks == (Fallback("CELLOS_EXPORT_HTTP_BASE_URL", "https://s3.example/k", reason),)
        [store] = stores(spec([S3], {}), environment)
        assert store is not None
        assert store.destination("cell-1", "a") == "s3://archive/2031/a"

    def test_the_directory_is_looked_at(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=r"^CELLOS_EXPORT_DIR local sink: .*/file: Not a directory \(os error 20\)$"):
            open_targets(spec([]), {"CELLOS_EXPORT_DIR": str(tmp_path / "file")})
        open_targets(spec([]), {"CELLOS_EXPORT_DIR": str(tmp_path / "to-be-made")})

    def test_two_artifacts_for_one_url_are_refused(self) -> None:
        environment = {"CELLOS_EXPORT_S3_PRESIGNED_URL": "https://s3.example/k?sig=hidden"}
        with pytest.raises(ExportError, match=r'artifacts "a" and "b" would both be written to s3://archive/2031/b') as caught:
            open_targets(spec([S3], {}, {"name": "b"}), environment).check()
        assert "hidden" not in str(caught.value)
        environment = {"CELLOS_EXPORT_S3_PRESIGNED_URL": "https://s3.example/{artifact_name}"}
        with open_targets(spec([S3], {}, {"name": "b"}), environment) as targets:
            targets.check()
        with pytest.raises(ExportError, match='artifacts "a" and "a" would both'):
            open_targets(spec([], {}, {}), {"CELLOS_EXPORT_HTTP_BASE_URL": URL}).check()

    @pytest.mark.parametrize(
        ("environment", "region"),
        [
            ({}, "eu-central-1"),
            ({"CELLOS_EXPORT_S3_REGION": "us-east-1"}, "us-east-1"),
            ({"CELLOS_EXPORT_S3_REGION__ARTIFACT_BUCKET": "x"}, "x"),
        ],
    )
    def test_the_region_of_a_presigned_url_is_compared(self, environment: dict[str, str], region: str) -> None:
        url = "https://archive.s3.{}.example/k?X-Amz-Credential=ID%2F20310401%2F{}%2Fs3%2Faws4_request"
        open_targets(spec([S3]), environment | {"CELLOS_EXPORT_S3_PRESIGNED_URL": url.format(region, region)})
        with pytest.raises(
            ConfigError,
            match=rf"^S3 export sink init: .* is for region mars, the target declares {region} \(CELLOS_EXPORT_S3_PRESIGNED_URL\)$",
        ):
            open_targets(spec([S3]), environment | {"CELLOS_EXPORT_S3_PRESIGNED_URL": url.format("mars", "mars")})


class TestDeclaredUrlAndSecret:
    def test_a_base_url_that_the_egress_rules_list_is_used_with_its_own_secret(self, sent: Sent) -> None:
        document = spec([HTTP | {"secretRef": "UPLOAD"}], {}, egress=EGRESS, secrets=("UPLOAD",))
        environment = {"CELLOS_EXPORT_HTTP_BEARER_TOKEN": "of-the-operator"}
        [fallback] = open_targets(document, environment).fallbacks
        assert fallback.reason.endswith("its baseUrl https://drop.example:8443/in is used")
        [store] = stores(document, environment, {"UPLOAD": "of-the-document"})
        put(store)
        assert (sent.urls, sent.tokens) == (["https://user:pw@drop.example:8443/in/cell-1/a"], ["of-the-document"])

    def test_a_base_url_never_gets_the_token_of_the_operator(self, sent: Sent) -> None:
        document = spec([HTTP], {}, egress=EGRESS)
        for variable in ("CELLOS_EXPORT_HTTP_BEARER_TOKEN", "CELLOS_EXPORT_HTTP_BEARER_TOKEN__DROP"):
            [store] = stores(document, {variable: "of-the-operator"}, {})
            put(store)
        assert sent.tokens == [None, None]

    @pytest.mark.parametrize(
        ("secret_ref", "environment", "token"),
        [
            (None, {}, None),
            (None, {"CELLOS_EXPORT_HTTP_BEARER_TOKEN": "general"}, "general"),
            (None, {"CELLOS_EXPORT_HTTP_BEARER_TOKEN": "general", "CELLOS_EXPORT_HTTP_BEARER_TOKEN__DROP": "own"}, "own"),
            ("UPLOAD", {}, "secret"),
            ("UPLOAD", {"CELLOS_EXPORT_HTTP_BEARER_TOKEN": "general"}, "general"),
            ("UPLOAD", {"CELLOS_EXPORT_HTTP_BEARER_TOKEN__DROP": "own"}, "own"),
        ],
    )
    def test_which_token_goes_to_the_url_of_the_operator(
        self, sent: Sent, secret_ref: str | None, environment: dict[str, str], token: str | None
    ) -> None:
        target = HTTP if secret_ref is None else HTTP | {"secretRef": secret_ref}
        document = spec([target], {}, secrets=("UPLOAD",))
        [store] = stores(document, environment | {"CELLOS_EXPORT_HTTP_BASE_URL": URL}, {"UPLOAD": "secret"})
        put(store)
        assert sent.tokens == [token]

    def test_a_secret_that_was_not_resolved(self) -> None:
        document = spec([HTTP | {"secretRef": "UPLOAD"}], {}, secrets=("UPLOAD",))
        with pytest.raises(ExportError, match=r'^export sink: export target "drop": secret UPLOAD was not resolved$'):
            stores(document, {"CELLOS_EXPORT_HTTP_BASE_URL": URL}, {})

    def test_the_secret_of_an_s3_target_is_recorded_as_unused(self) -> None:
        document = spec([S3 | {"secretRef": "UPLOAD"}], secrets=("UPLOAD",))
        [fallback] = open_targets(document, {"CELLOS_EXPORT_S3_PRESIGNED_URL": URL}).fallbacks
        assert (fallback.variable, fallback.value) == ("spec.export.targets[].secretRef", "UPLOAD")

    def test_a_token_that_is_no_header(self) -> None:
        environment = {"CELLOS_EXPORT_HTTP_BASE_URL": URL, "CELLOS_EXPORT_HTTP_BEARER_TOKEN": "hidden\r\nX: y"}
        with pytest.raises(ConfigError, match=r"^CELLOS_EXPORT_HTTP_BEARER_TOKEN: ") as caught:
            open_targets(spec([]), environment)
        assert "hidden" not in str(caught.value)


class TestRetries:
    @pytest.mark.parametrize(
        ("kind", "target", "url"), [("HTTP", HTTP, "CELLOS_EXPORT_HTTP_BASE_URL"), ("S3", S3, "CELLOS_EXPORT_S3_PRESIGNED_URL")]
    )
    @pytest.mark.parametrize(
        ("variable", "value", "text"),
        [
            ("MAX_ATTEMPTS", "0", "{name} must be >= 1"),
            ("MAX_ATTEMPTS", "many", "{name} must be an integer >= 1: {name} is 'many'"),
            ("MAX_ATTEMPTS", "-1", "{name} must be an integer >= 1: {name} is '-1'"),
            ("RETRY_BACKOFF_MS", "1.5", "{name} must be an integer >= 0: {name} is '1.5'"),
        ],
    )
    def test_bad_values_are_fatal(self, kind: str, target: dict[str, Any], url: str, variable: str, value: str, text: str) -> None:
        name = f"CELLOS_EXPORT_{kind}_{variable}"
        with pytest.raises(ConfigError) as caught:
            open_targets(spec([target]), {url: URL, name: value})
        assert str(caught.value) == text.format(name=name)

    def test_a_target_may_have_its_own(self) -> None:
        pauses: list[float] = []
        environment = {
            "CELLOS_EXPORT_HTTP_BASE_URL": "http://127.0.0.1:1/",
            "CELLOS_EXPORT_HTTP_MAX_ATTEMPTS": "1",
            "CELLOS_EXPORT_HTTP_MAX_ATTEMPTS__DROP": "3",
            "CELLOS_EXPORT_HTTP_RETRY_BACKOFF_MS": "40",
        }
        document = spec([HTTP], {})
        assert document.export is not None
        [artifact] = document.export.artifacts or ()
        with open_targets(document, environment, sleep=pauses.append) as targets:
            store = targets.for_artifact(artifact)
            with pytest.raises(ExportError, match="Connection refused"):
                put(store)
        assert pauses == [0.04, 0.04]

    def test_the_name_of_the_general_variable_stands_first(self) -> None:
        environment = {"CELLOS_EXPORT_HTTP_BASE_URL": URL, "CELLOS_EXPORT_HTTP_MAX_ATTEMPTS__DROP": "x"}
        with pytest.raises(
            ConfigError, match=r"^CELLOS_EXPORT_HTTP_MAX_ATTEMPTS must be an integer >= 1: CELLOS_EXPORT_HTTP_MAX_ATTEMPTS__DROP is 'x'$"
        ):
            open_targets(spec([HTTP]), environment)


def test_a_client_that_cannot_be_made_is_known_before_the_run(tmp_path: Path) -> None:
    environment = {"CELLOS_EXPORT_HTTP_BASE_URL": URL, "CELLOS_CA_BUNDLE": str(tmp_path / "none")}
    targets: Targets = open_targets(spec([], {}), environment)
    with pytest.raises(ConfigError, match=r"^CELLOS_CA_BUNDLE: read "):
        targets.check()
