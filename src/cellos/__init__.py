"""CellOS: run untrusted work in cells, and keep evidence of it.

    import cellos
    result = cellos.run(["python3", "-c", "print('hello')"])

Importing this costs next to nothing; what `run` needs is loaded at its first use.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cellos.client.local import RunResult, run

__version__ = "0.1.0"
__all__ = ["RunResult", "__version__", "run"]


def __getattr__(name: str) -> object:
    if name in ("run", "RunResult"):
        from cellos.client import local

        value: object = getattr(local, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
