"""Every error that CellOS raises on purpose: one tree, stable codes.

    CellosError
    ├── InvalidSpec            invalid_spec          the document breaks a rule; `path` names the member where it is known
    │   └── SpecSyntaxError    spec_syntax           not a well-formed document: bytes, JSON, shape
    ├── ArgvTooLarge           argv_too_large        the backend cannot pass that many argument bytes
    ├── Unenforceable          unenforceable         the host or backend cannot enforce `field`: refused, nothing was run
    ├── ConfigError            config                a variable or option has an unusable value
    ├── HostBackendError       host_backend          the isolating backend failed
    │   └── MissingPrimitive   missing_primitive     this host lacks `primitive`; `cure` says what to change
    ├── EventSinkError         event_sink            an event could not be recorded
    ├── SecretBrokerError      secret_broker         a secret could not be had; never holds a value
    ├── ExportError            export_sink           an artifact could not be read or delivered
    ├── LifecycleError         lifecycle             an illegal transition was attempted
    └── EvidenceError          evidence              a record of events does not verify

The printed form is `<prefix>: <text>`; the prefixes are part of the contract that users grep for.
Only a `main` turns these into exit codes; nothing logs and raises.
"""

from __future__ import annotations


class CellosError(Exception):
    """Base of the tree. `code` is stable and safe to match on; `text` is the message without its prefix."""

    code = "error"
    prefix = ""

    def __init__(self, text: str) -> None:
        super().__init__(f"{self.prefix}: {text}" if self.prefix else text)
        self.text = text


class InvalidSpec(CellosError):
    """A document that breaks a rule. `path` is the dotted member path (`spec.run.argv[0]`), empty where no single one is at fault."""

    code = "invalid_spec"
    prefix = "invalid cell specification"

    def __init__(self, text: str, *, path: str = "") -> None:
        super().__init__(text)
        self.path = path


class SpecSyntaxError(InvalidSpec):
    """Not a well-formed document. `line` and `column` count from 1; both are 0 where the fault is one of shape."""

    code = "spec_syntax"
    prefix = "parse ExecutionCellDocument"

    def __init__(self, text: str, *, path: str = "", line: int = 0, column: int = 0) -> None:
        super().__init__(text, path=path)
        self.line = line
        self.column = column


class ArgvTooLarge(CellosError):
    """More argument bytes than the backend can hand over."""

    code = "argv_too_large"

    def __init__(self, *, encoded_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"spec.run.argv encoded is {encoded_bytes} bytes; exceeds the backend's limit of {limit_bytes} bytes")
        self.encoded_bytes = encoded_bytes
        self.limit_bytes = limit_bytes


class Unenforceable(CellosError):
    """A declared `field` that nothing here would enforce. The cell is refused before anything is created."""

    code = "unenforceable"
    prefix = "cannot enforce"

    def __init__(self, *, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why


class ConfigError(CellosError):
    code = "config"


class HostBackendError(CellosError):
    code = "host_backend"
    prefix = "host backend"


class MissingPrimitive(HostBackendError):
    """This host lacks something that isolation needs."""

    code = "missing_primitive"

    def __init__(self, *, primitive: str, why: str, cure: str) -> None:
        super().__init__(f"{primitive}: {why}; {cure}")
        self.primitive = primitive
        self.why = why
        self.cure = cure


class EventSinkError(CellosError):
    code = "event_sink"
    prefix = "event sink"


class SecretBrokerError(CellosError):
    code = "secret_broker"
    prefix = "secret broker"


class ExportError(CellosError):
    code = "export_sink"
    prefix = "export sink"


class LifecycleError(CellosError):
    code = "lifecycle"
    prefix = "lifecycle"


class EvidenceError(CellosError):
    code = "evidence"
    prefix = "evidence"


def os_error_text(error: OSError) -> str:
    """The operating system's words and number, as the contract prints them: `No such file or directory (os error 2)`."""
    return f"{error.strerror or error} (os error {error.errno})" if error.errno is not None else str(error)
