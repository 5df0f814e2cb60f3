"""JSON files that a person, another program or a damaged disk may have written, read against a JSON Schema.

    manifest = read_json(path, object_of(name=TEXT, counts=list_of(COUNT)), fix="...")

The returned value fits the schema; otherwise an `InputError` of one line says where the file differs. A schema's
`description` is what that message says was wanted.
"""

import io
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from bn_keras.errors import InputError
from bn_keras.storage import file_size, read

MOST_BYTES = 1 << 26
"""Largest file that is read. None of ours comes near: a manifest of 100,000 shards has 10 MB."""

COUNT = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "description": "a count below 2^63"}
COUNT_TEXT = {  # protocol buffers write int64 as strings
    "type": ["string", "integer"],
    "pattern": r"\A[0-9]{1,18}\Z",
    "minimum": 0,
    "maximum": 10**18 - 1,
    "description": "a count below 10^18",
}
NUMBER = {"type": "number", "minimum": -1e308, "maximum": 1e308, "description": "a finite number"}
TEXT = {"type": "string", "pattern": "\\A[^\ud800-\udfff]*\\Z", "description": "text"}  # a lone surrogate has no UTF-8
_PORT = r"(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
ADDRESS = {
    "type": "string",
    "pattern": r"\A(\[[0-9A-Fa-f:.%]+\]|[^\s:/,\[\]]+):" + _PORT + r"\Z",
    "description": "HOST:PORT with a port from 1 to 65535",
}
FILE_NAME = {
    "type": "string",
    "pattern": "\\A(?!\\.)[^/\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,255}\\Z",
    "description": "the name of a file in the same folder",
}


def object_of(optional: Mapping[str, dict] | None = None, **required: dict) -> dict:
    """The schema of an object with these fields, each given with its schema. The object may have more."""
    return {"type": "object", "required": [*required], "properties": {**required, **(optional or {})}}


def list_of(item: dict, **bounds: int) -> dict:
    """The schema of a list; `bounds` are `minItems` and `maxItems`."""
    return {"type": "array", "items": item, **bounds}


def map_of(value: dict, **rules: Any) -> dict:
    """The schema of an object whose fields have names of their own; `rules` are `required` and `propertyNames`."""
    return {"type": "object", **rules, "additionalProperties": value}


def read_bytes(path: str, fix: str) -> bytes:
    """A file of at most `MOST_BYTES`.

    Raises:
      InputError: it is larger, or no regular file.
      OSError: it is missing or cannot be read.
    """
    check_size(path, fix)
    return read(path)


def check_size(path: str, fix: str) -> None:
    """Refuses what `read_bytes` does."""
    size = file_size(path) or 0
    if size > MOST_BYTES:
        raise InputError(f"{path} has {size:,} bytes, at most {MOST_BYTES:,} are read: {fix}")


def read_json(path: str, schema: dict, fix: str) -> dict:
    """The content of a file, which fits a schema.

    Args:
      path: the file's path.
      schema: JSON Schema, draft 2020-12, where 1.0 is no integer.
      fix: what the message says at its end: what to do about a file that does not fit.

    Raises:
      InputError: it cannot be read by `read_bytes`, is not JSON in UTF-8, holds NaN, an infinity or what is too deep or
        too long to read, or does not fit the schema. Names the file, the place in it and what is there.
      OSError: it is missing or cannot be read.
    """
    return parse_json(read_bytes(path, fix), path, schema, fix)


def parse_json(content: bytes, path: str, schema: dict, fix: str) -> dict:
    """What `read_json` makes of the bytes of a file."""
    try:
        value = _loads(content)
        error = next(_validator(schema).iter_errors(value), None)
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: {fix}") from None
    except ValueError as damage:
        raise InputError(f"{path} is not JSON ({damage}): {fix}") from None
    if error:
        raise InputError(f"{path}: {_describe(error)}: {fix}")
    return value


def read_json_lines(path: str, schema: dict) -> tuple[list[dict], list[int]]:
    """The lines of a file that fit a schema, and the numbers, from 1, of the lines that do not.

    A last line without a line end was cut short while it was written, and is ignored.

    Raises:
      InputError: it is no regular file.
      OSError: it is missing or cannot be read.
    """
    file_size(path)
    fitting, others = [], []
    validator = _validator(schema)
    for number, line in enumerate(io.BytesIO(read(path)), 1):
        if not line.endswith(b"\n"):
            break
        try:
            value = _loads(line)
            fits = validator.is_valid(value)
        except (RecursionError, ValueError):
            fits = False
        if fits:
            fitting.append(value)
        else:
            others.append(number)
    return fitting, others


def _loads(content: bytes):
    return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)


def _validator(schema):
    import jsonschema  # here, so that --help does not wait for it

    base = jsonschema.Draft202012Validator
    types = base.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return jsonschema.validators.extend(base, type_checker=types)(schema)


def _describe(error) -> str:
    """Where a value does not fit and what it is, shortened: a file may hold anything at any length."""
    place = error.json_path if len(error.json_path) <= 100 else f"{error.json_path[:100]}..."
    if error.validator == "required":
        missing = [name for name in error.validator_value if name not in error.instance]
        return f"{place} lacks {', '.join(missing)}"
    if error.validator == "additionalProperties" and "description" not in error.schema:
        unknown = [name for name in error.instance if name not in error.schema["properties"]]
        return f"{place} has {reprlib.repr(unknown)}, which this version does not know"
    wanted = error.schema.get("description") or f"{error.validator} {error.validator_value!r}"
    return f"{place} is {reprlib.repr(error.instance)}, not {wanted}"


def _refuse_constant(name):
    raise ValueError(f"it holds {name}")


def _finite(digits):
    if math.isinf(value := float(digits)):
        raise ValueError("it holds a number beyond the range of floats")
    return value
