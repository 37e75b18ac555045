"""Which store each artifact of a document goes to, by the document's targets and the operator's variables.

Where files leave this host to is the operator's to say: the variables win. An http target that no variable speaks of goes to its own
`baseUrl`, but only where the document's egress rules list that host, and then never with the operator's token. A target's `secretRef` is
its token where the operator gave none.
A target without a URL has no store; a run with an artifact for it is refused before a cell exists.

A variable may be for one target: `CELLOS_EXPORT_HTTP_BASE_URL__DROP` is for the target `drop`, `…__MY_DROP` for `my-drop`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Self

from cellos.artifacts.files import DirectoryStore
from cellos.core.documents import Artifact, CellSpec
from cellos.core.documents.execution_cell import HttpTarget, S3Target
from cellos.errors import ConfigError, ExportError, os_error_text
from cellos.ports import ArtifactStore

# The other stores are imported where one is made: most runs export nothing.
if TYPE_CHECKING:
    from cellos.artifacts.http import HttpStore
    from cellos.artifacts.s3 import S3Store
    from cellos.artifacts.upload import Kind, Retries

HTTP_URL = "CELLOS_EXPORT_HTTP_BASE_URL"
HTTP_TOKEN = "CELLOS_EXPORT_HTTP_BEARER_TOKEN"
S3_URL = "CELLOS_EXPORT_S3_PRESIGNED_URL"
S3_REGION = "CELLOS_EXPORT_S3_REGION"
DIRECTORY = "CELLOS_EXPORT_DIR"
REQUIRE_HTTP = "CELL_OS_REQUIRE_HTTP_EXPORT"
REQUIRE_S3 = "CELL_OS_REQUIRE_S3_EXPORT"


class Fallback(NamedTuple):
    """Something that is not configured as it should be, which strict configuration refuses. `value` holds no credentials."""

    variable: str
    value: str
    reason: str


class Targets:
    """The stores of one document. Close it."""

    def __init__(
        self,
        spec: CellSpec,
        stores: Mapping[str, HttpStore | S3Store],
        default: DirectoryStore | HttpStore | None,
        fallbacks: tuple[Fallback, ...],
    ) -> None:
        self._stores = stores
        self._default = default
        self._named = {target.name: target for target in (spec.export and spec.export.targets) or ()}
        self._artifacts = (spec.export and spec.export.artifacts) or ()
        self.fallbacks = fallbacks

    def for_artifact(self, artifact: Artifact, secrets: Mapping[str, str] | None = None) -> ArtifactStore | None:
        """Where it goes; None where nothing is configured. `secrets` are the values of secretRefs, for a target that names one."""
        store = self._store_of(artifact)
        if secrets is None or store is None or isinstance(store, DirectoryStore):
            return store
        from cellos.artifacts.http import HttpStore

        if not isinstance(store, HttpStore) or store.target is None:
            return store
        reference = self._named[store.target].secret_ref
        if reference is None or store.has_token:
            return store
        if not secrets.get(reference):
            raise ExportError(f'export target "{store.target}": secret {reference} was not resolved')
        return store.with_token(secrets[reference])

    def _store_of(self, artifact: Artifact) -> DirectoryStore | HttpStore | S3Store | None:
        name = self._target_of(artifact)
        return self._default if name is None else self._stores.get(name)

    def kind_for(self, artifact: Artifact) -> str:
        """Kind for the report of a failure: the declared one, else the store's, else `local`."""
        target = self._named.get(self._target_of(artifact) or "")
        if target is not None:
            return "http" if isinstance(target, HttpTarget) else "s3"
        return self._default.kind if self._default is not None else "local"

    def check(self) -> None:
        """To be called before a cell is created.

        Raises ExportError where an artifact has nowhere to go, or two would be written to one URL; ConfigError where no client can be made.
        """
        places: dict[str, Artifact] = {}
        for artifact in self._artifacts:
            store = self._store_of(artifact)
            if store is None:
                cure = self._cure(self._target_of(artifact))
                raise ExportError(f'export requested for artifact "{artifact.name}" but no export sink is configured; {cure}')
            if not isinstance(store, DirectoryStore):
                store.upload.open()
                first = places.setdefault(store.url("cell", artifact.name), artifact)
                if first is not artifact:
                    shown = store.destination("cell", artifact.name)
                    raise ExportError(
                        f'artifacts "{first.name}" and "{artifact.name}" would both be written to {shown}: '
                        "put {artifact_name} into the URL, or give each a target of its own"
                    )

    def _target_of(self, artifact: Artifact) -> str | None:
        return artifact.target or (next(iter(self._named)) if len(self._named) == 1 else None)

    def _cure(self, name: str | None) -> str:
        if name is None:
            return f"set {DIRECTORY} or {HTTP_URL}"
        return f"set {_scoped_name(S3_URL if isinstance(self._named.get(name), S3Target) else HTTP_URL, name)}"

    def close(self) -> None:
        for store in (*self._stores.values(), self._default):
            if store is not None and not isinstance(store, DirectoryStore):
                store.upload.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_targets(spec: CellSpec, environment: Mapping[str, str], *, sleep: Callable[[float], None] = time.sleep) -> Targets:
    """Read the variables that this document uses: none without `export`. Opens no connection.

    Raises ConfigError; fallbacks are listed, not raised.
    """
    fallbacks: list[Fallback] = []
    stores: dict[str, HttpStore | S3Store] = {}
    for target in (spec.export and spec.export.targets) or ():
        store: HttpStore | S3Store | None
        if isinstance(target, HttpTarget):
            store = _http_target(target, spec, environment, fallbacks, sleep)
        else:
            store = _s3_target(target, environment, fallbacks, sleep)
        if store is not None:
            stores[target.name] = store
    default = None if spec.export is None else _default(environment, sleep)
    return Targets(spec, stores, default, tuple(fallbacks))


def scoped(environment: Mapping[str, str], variable: str, target: str | None) -> tuple[str, str] | None:
    """Name and value of a variable for a target: the target's own where it is not blank, else the general one; None where both are."""
    names = (variable,) if target is None else (_scoped_name(variable, target), variable)
    return next(((name, environment[name].strip()) for name in names if environment.get(name, "").strip()), None)


def _scoped_name(variable: str, target: str) -> str:
    return f"{variable}__{re.sub(r'[^A-Z0-9]', '_', target.upper())}"


def _default(environment: Mapping[str, str], sleep: Callable[[float], None]) -> DirectoryStore | HttpStore | None:
    url = scoped(environment, HTTP_URL, None)
    if url is not None:
        return _http_store(url, None, environment, _token(environment, None), sleep)
    root = environment.get(DIRECTORY, "").strip()
    return _directory(root) if root else None


def _directory(root: str) -> DirectoryStore:
    try:
        if not os.path.isdir(root) and os.path.lexists(root):
            os.close(os.open(root, os.O_DIRECTORY))
    except OSError as error:
        raise ConfigError(f"{DIRECTORY} local sink: {root}: {os_error_text(error)}") from error
    return DirectoryStore(root)


def _http_target(
    target: HttpTarget, spec: CellSpec, environment: Mapping[str, str], fallbacks: list[Fallback], sleep: Callable[[float], None]
) -> HttpStore | None:
    url = scoped(environment, HTTP_URL, target.name)
    if url is not None:
        return _http_store(url, target.name, environment, _token(environment, target.name), sleep)
    if _required(environment, REQUIRE_HTTP):
        raise ConfigError(f'{REQUIRE_HTTP} is set but no HTTP export base URL is configured for target "{target.name}"')
    from cellos.core.documents.base_url import parse_base_url
    from cellos.core.urls import without_credentials

    variable = _scoped_name(HTTP_URL, target.name)
    base = parse_base_url(target.base_url)
    rules = spec.authority.egress_rules or ()
    if not any(rule.host.lower() == base.host and rule.port == base.port for rule in rules):
        reason = f'no HTTP export base URL is configured for target "{target.name}", and no egress rule lists {base.host}:{base.port}'
        fallbacks.append(Fallback(variable, "", reason))
        return None
    shown = without_credentials(target.base_url)
    reason = f'no HTTP export base URL is configured for target "{target.name}"; its baseUrl {shown} is used'
    fallbacks.append(Fallback(variable, "", reason))
    return _http_store(("spec.export.targets[].baseUrl", target.base_url), target.name, environment, None, sleep)


def _s3_target(
    target: S3Target, environment: Mapping[str, str], fallbacks: list[Fallback], sleep: Callable[[float], None]
) -> S3Store | None:
    from cellos.artifacts.s3 import S3Store
    from cellos.artifacts.upload import Upload
    from cellos.core.urls import without_credentials

    own = _scoped_name(S3_URL, target.name)
    url = scoped(environment, S3_URL, target.name)
    if url is None:
        url = scoped(environment, HTTP_URL, target.name)
        if url is not None:
            reason = f'used for the s3 target "{target.name}" in place of {own}'
            fallbacks.append(Fallback(url[0], without_credentials(url[1]), reason))
    if url is None:
        if _required(environment, REQUIRE_HTTP) or _required(environment, REQUIRE_S3):
            raise ConfigError(f'S3 export is required but no presigned URL is configured for target "{target.name}"')
        fallbacks.append(Fallback(own, "", f'no presigned URL is configured for target "{target.name}"'))
        return None
    if target.secret_ref is not None:
        reason = f'the s3 target "{target.name}" does not use its secretRef: a presigned URL is its own authorization'
        fallbacks.append(Fallback("spec.export.targets[].secretRef", target.secret_ref, reason))
    region = scoped(environment, S3_REGION, target.name)
    upload = Upload("s3", environment, retries=_retries("s3", environment, target.name), sleep=sleep)
    try:
        return S3Store(
            url[1],
            upload,
            target=target.name,
            bucket=target.bucket,
            key_prefix=target.key_prefix,
            region=region[1] if region is not None else target.region,
        )
    except ExportError as error:
        raise ConfigError(f"S3 export sink init: {error} ({url[0]})") from error


def _required(environment: Mapping[str, str], flag: str) -> bool:
    """A flag is on when it is there, even empty; 0, false, no, off mean what they say."""
    return flag in environment and environment[flag].strip().lower() not in {"0", "false", "no", "off"}


def _http_store(
    found: tuple[str, str], target: str | None, environment: Mapping[str, str], token: str | None, sleep: Callable[[float], None]
) -> HttpStore:
    name, url = found
    from cellos.artifacts.http import HttpStore
    from cellos.artifacts.upload import Upload

    upload = Upload("http", environment, retries=_retries("http", environment, target), sleep=sleep)
    try:
        return HttpStore(url, upload, target=target, token=token)
    except ExportError as error:
        raise ConfigError(f"HTTP export sink init: {error} ({name})") from error


def _token(environment: Mapping[str, str], target: str | None) -> str | None:
    found = scoped(environment, HTTP_TOKEN, target)
    if found is None:
        return None
    name, token = found
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{name}: a token is printable ASCII without blanks")
    return token


def _retries(kind: Kind, environment: Mapping[str, str], target: str | None) -> Retries:
    from cellos.artifacts.upload import LABEL, Retries

    prefix = f"CELLOS_EXPORT_{LABEL[kind]}"
    return Retries(
        max_attempts=_integer(environment, f"{prefix}_MAX_ATTEMPTS", target, least=1),
        backoff_ms=_integer(environment, f"{prefix}_RETRY_BACKOFF_MS", target, least=0),
    )


def _integer(environment: Mapping[str, str], variable: str, target: str | None, *, least: int) -> int:
    """The least is the default, too."""
    found = scoped(environment, variable, target)
    if found is None:
        return least
    name, text = found
    if not re.fullmatch(r"\+?[0-9]{1,9}", text):
        raise ConfigError(f"{variable} must be an integer >= {least}: {name} is {text[:40]!r}")
    if int(text) < least:
        raise ConfigError(f"{variable} must be >= {least}")
    return int(text)
