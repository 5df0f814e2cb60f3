"""JSON files that a damaged disk, another version or another hand may have written, read against a JSON Schema."""

import functools
import json
import reprlib
from typing import Any

from data_prep import storage
from data_prep.errors import InputError

MOST = (1 << 53) - 1
COUNT = {"type": "integer", "minimum": 0, "maximum": MOST}
TEXT = {"type": "string"}
HEX = {"type": "string", "pattern": r"\A[0-9a-f]+\Z"}
FILE_NAME = {  # in the same folder
    "type": "string",
    "pattern": "\\A(?!\\.)[^/\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,255}\\Z",
}


def record(**properties: dict) -> dict:
    """The schema of an object that has all these properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def list_of(item: dict) -> dict:
    """The schema of an array."""
    return {"type": "array", "items": item}


def row(*items: dict) -> dict:
    """The schema of an array with exactly these items."""
    return {"type": "array", "prefixItems": list(items), "minItems": len(items), "maxItems": len(items)}


def read(path: str, schema: dict, fix: str) -> Any:
    """The content of a JSON file.

    Args:
      path: the file's path.
      schema: JSON Schema, draft 2020-12, but 1.0 is not an integer.
      fix: what the message says at its end: what to do about a file that does not fit.
    Raises:
      FileNotFoundError: there is no such file.
      InputError: it is no regular file, not JSON, too deep, holds a number too long to read, or does not fit.
    """
    try:
        value = json.loads(storage.read(path))
        error = next(_validator(json.dumps(schema)).iter_errors(value), None)
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply; fix: {fix}") from None
    except ValueError as damage:
        raise InputError(f"{path}: is damaged, no JSON ({damage}); fix: {fix}") from None
    if error:
        what = f"{error.json_path[:100]} is {reprlib.repr(error.instance)}, against {error.validator}"
        raise InputError(f"{path}: is damaged: {what}; fix: {fix}")
    return value


def encoded(value: Any) -> bytes:
    """A value in the form of our JSON files."""
    return (json.dumps(value, indent=1) + "\n").encode()


@functools.cache
def _validator(schema: str):
    import jsonschema  # here, so that --help does not wait for it

    base = jsonschema.Draft202012Validator
    types = base.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return jsonschema.validators.extend(base, type_checker=types)(json.loads(schema))
