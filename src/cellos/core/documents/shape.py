"""From plain objects to structs: every member known, present where required, and of its type, or one line that names the path.

The conversion is msgspec's. Only when it fails is the value looked at again, member by member, for words that a reader can act on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from cellos.core.documents.execution_cell import U64_MAX, Filesystem
from cellos.core.documents.wording import given, member, one_of
from cellos.errors import SpecSyntaxError

T = TypeVar("T", bound=msgspec.Struct)

# What a cell sees of the host is never loosened: an ignored member here could be somebody's "read-only".
_ALWAYS_STRICT = (Filesystem,)


_Fault = tuple[str, str]
"""(path, problem)"""


def to_struct(value: object, cls: type[T], *, allow_unknown_fields: bool = False) -> T:
    """`value` as a `cls`. With `allow_unknown_fields` members that it does not have are dropped. Raises SpecSyntaxError."""
    if allow_unknown_fields:
        value = _without_unknown(value, _type_info(cls))
    try:
        return msgspec.convert(value, cls)
    except msgspec.ValidationError as error:
        path, problem = _fault(value, _type_info(cls), "") or ("", str(error))
        raise SpecSyntaxError(f"{path or 'the document'} {problem}", path=path) from None


@cache
def _type_info(cls: type[msgspec.Struct]) -> inspect.Type:
    return inspect.type_info(cls)


def _fault(value: object, kind: inspect.Type, path: str) -> _Fault | None:
    """The first fault of `value`, in the order of the document's structs: unknown members, missing ones, then each in turn."""
    match kind:
        case inspect.Metadata():
            return _fault(value, kind.type, path)
        case inspect.UnionType():
            return _union_fault(value, kind, path)
        case inspect.StructType():
            return _struct_fault(value, kind, path)
        case inspect.VarTupleType():
            if not isinstance(value, list):
                return path, f"must be a list, given {given(value)}"
            faults = (_fault(item, kind.item_type, f"{path}[{index}]") for index, item in enumerate(value))
            return next((fault for fault in faults if fault), None)
        case inspect.DictType():
            if not isinstance(value, dict):
                return path, f"must be an object, given {given(value)}"
            faults = (_fault(item, kind.value_type, member(path, name)) for name, item in value.items())
            return next((fault for fault in faults if fault), None)
        case _:
            return None if _is_scalar(value, kind) else (path, f"must be {_expected(kind)}, given {given(value)}")


def _union_fault(value: object, kind: inspect.UnionType, path: str) -> _Fault | None:
    """A union is either one type or null, or structs told apart by a tag."""
    if value is None and kind.includes_none:
        return None
    types = [inner for inner in kind.types if not isinstance(inner, inspect.NoneType)]
    if len(types) == 1:
        return _fault(value, types[0], path)
    structs = _tagged(types)
    if not isinstance(value, dict):
        return path, f"must be an object, given {given(value)}"
    field = next(iter(structs.values())).tag_field or ""
    if field not in value:
        return member(path, field), f"is required: {one_of(tuple(structs))}"
    tag = value[field]
    if not isinstance(tag, str) or tag not in structs:
        return member(path, field), f"must be {one_of(tuple(structs))}, given {given(tag)}"
    return _struct_fault(value, structs[tag], path)


def _tagged(types: Sequence[inspect.Type]) -> dict[str, inspect.StructType]:
    return {str(kind.tag): kind for kind in types if isinstance(kind, inspect.StructType)}


def _struct_fault(value: object, kind: inspect.StructType, path: str) -> _Fault | None:
    if not isinstance(value, dict):
        return path, f"must be an object, given {given(value)}"
    names = [field.encode_name for field in kind.fields]
    for name in value:
        if name not in names and name != kind.tag_field:
            return member(path, name), f"is not a known member{_nearest(name, names)}"
    for field in kind.fields:
        if field.required and field.encode_name not in value:
            return member(path, field.encode_name), "is required"
    for field in kind.fields:
        if field.encode_name in value and (fault := _fault(value[field.encode_name], field.type, member(path, field.encode_name))):
            return fault
    return None


def _nearest(name: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    lowered = {known.lower(): known for known in names}
    close = get_close_matches(name[:64].lower(), lowered, n=1, cutoff=0.5)
    return f"; did you mean {lowered[close[0]]}?" if close else f"; known here: {', '.join(names)}"


def _is_scalar(value: object, kind: inspect.Type) -> bool:
    match kind:
        case inspect.AnyType():
            return True
        case inspect.StrType():
            return isinstance(value, str) and len(value) >= (kind.min_length or 0)
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.IntType():
            # A bool is an int to Python, and to nobody else.
            return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= (kind.le or U64_MAX)
        case inspect.LiteralType():
            return isinstance(value, str) and value in kind.values
        case _:
            return False


def _expected(kind: inspect.Type) -> str:
    match kind:
        case inspect.StrType():
            return "a non-empty string" if kind.min_length else "a string"
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return f"an integer from 0 to {kind.le or U64_MAX}"
        case inspect.LiteralType():
            return one_of(tuple(str(word) for word in kind.values))
        case _:
            return "of another type"


def _without_unknown(value: object, kind: inspect.Type) -> object:
    """`value` without members that its struct does not have. What is of the wrong type passes: conversion refuses it."""
    match kind, value:
        case inspect.Metadata(), _:
            return _without_unknown(value, kind.type)
        case inspect.UnionType(), _:
            types = [inner for inner in kind.types if not isinstance(inner, inspect.NoneType)]
            if len(types) == 1:
                return _without_unknown(value, types[0])
            struct = next((s for s in _tagged(types).values() if isinstance(value, dict) and value.get(s.tag_field or "") == s.tag), None)
            return _without_unknown(value, struct) if struct else value
        case inspect.VarTupleType(), list():
            return [_without_unknown(item, kind.item_type) for item in value]
        case inspect.StructType(), dict() if kind.cls not in _ALWAYS_STRICT:
            fields: dict[str, Any] = {field.encode_name: field.type for field in kind.fields}
            known = {name: _without_unknown(item, fields[name]) for name, item in value.items() if name in fields}
            return known | {kind.tag_field: value[kind.tag_field]} if kind.tag_field in value else known
        case _:
            return value
