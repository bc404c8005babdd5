"""Tools that the client runs: their definitions, as grammar, as a line of the prompt, and as a check.

Owns what follows from a tool's JSON Schema. Owns no tool: a call ends the run, and the client comes
back with the result. A call's id names the run that made it, by which the next request finds it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from memory.errors import ConfigError
from memory.records import Message

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_PATTERN = 20_000
"""A longer regex would take the engine long to compile: such a tool's arguments are any JSON object.

For the same reason texts, digits and lists are not counted: engines unroll a counted repetition, and nested
ones multiply (xgrammar: minutes). The schema's own bounds are checked afterwards.
"""

_DEPTH = 4
_NUMBER = r"-?(0|[1-9][0-9]*)"
_FRACTION = r"(\.[0-9]+)?"
_KEY = r'"[^"\\\n]+"'
_CHAR = r'([^"\\\n]|\\["\\/bfnrt])'
_JSON_TYPES = {"integer": _NUMBER, "number": _NUMBER + _FRACTION, "boolean": "(true|false)", "null": "null"}


@dataclass(frozen=True)
class ClientTool:
    """One function of a request's `tools`."""

    name: str
    description: str
    schema: str
    """Its `parameters`, a JSON Schema, as JSON text."""

    @property
    def parameters(self) -> dict[str, Any]:
        return json.loads(self.schema)


def tools_of(definitions: list[dict[str, Any]]) -> list[ClientTool]:
    """OpenAI's function tools as ours."""
    functions = [definition["function"] for definition in definitions]
    return [
        ClientTool(
            name=function["name"],
            description=" ".join(str(function.get("description") or "").split()),
            schema=json.dumps(function.get("parameters") or {"type": "object", "properties": {}}),
        )
        for function in functions
    ]


def check_schema(parameters: dict[str, Any]) -> None:
    """ConfigError, saying why, when this is no JSON Schema of an object."""
    from jsonschema import Draft202012Validator, SchemaError

    if parameters.get("type", "object") != "object":
        raise ConfigError(f"the schema must be of type 'object', got {parameters['type']!r}")
    try:
        Draft202012Validator.check_schema(parameters)
    except SchemaError as exc:
        raise ConfigError(f"not a JSON Schema: {exc.message[:200]}") from exc
    except RecursionError as exc:
        raise ConfigError("the schema is nested too deeply") from exc


def call_id(run_id: str, step: int) -> str:
    """The id of a call that a run makes in its n-th step."""
    return f"call_{run_id.removeprefix('traj_')}_{step}"


def run_of_call(call: str) -> str | None:
    """The run whose call this id names; None when it is not one of ours."""
    found = re.fullmatch(r"call_([0-9A-Za-z-]+)_\d+", call)
    return f"traj_{found.group(1)}" if found else None


def arguments_of(tool: ClientTool, text: str) -> str | None:
    """The text as a JSON object in one line that fits the tool's schema; None when it does not."""
    value, clean = _read(text), text.strip()
    if not isinstance(value, dict) or not _fits(tool.schema, value):
        return None
    try:
        json.loads(clean)
    except ValueError:
        # Raw control characters inside a string: read by us, but no client's parser would take them.
        return json.dumps(value)
    return one_line(clean)


def one_line(arguments: str) -> str:
    """A call's arguments as they stand in a line: as they are, unless they are spread over several."""
    if "\n" not in arguments:
        return arguments
    value = _read(arguments)
    return arguments.replace("\n", "\\n") if value is None else json.dumps(value, ensure_ascii=False)


def fits(tool: ClientTool, call: Message) -> bool:
    """Whether a call that was made once, maybe with other tools, could be made with this one."""
    return call["function"]["name"] == tool.name and arguments_of(tool, call["function"]["arguments"]) is not None


def signature(tool: ClientTool) -> str:
    """`name({"city": string, "days": integer})`, for the prompt."""
    schema = tool.parameters
    required = set(schema.get("required") or ())
    parts = [
        f"{json.dumps(name, ensure_ascii=False)}: {_type_name(part)}" + ("" if name in required else " (optional)")
        for name, part in (schema.get("properties") or {}).items()
    ]
    return f"{tool.name}({{{', '.join(parts)}}})"


def pattern(tool: ClientTool) -> str:
    """The regex of the tool's arguments, one JSON object in one line."""
    schema = tool.parameters
    made = _object(schema, schema, _DEPTH)
    return made if len(made) <= MAX_PATTERN else _any_object(1)


def _read(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, strict=False, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _fits(schema: str, value: dict[str, Any]) -> bool:
    from jsonschema.exceptions import ValidationError
    from referencing.exceptions import Unresolvable

    try:
        _validator(schema).validate(value)
    except (ValidationError, Unresolvable, RecursionError, TimeoutError, re.error):
        return False
    return True


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """A validator that fetches nothing and whose patterns cannot run for ever: schemas come from users."""
    import regex
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema.validators import extend
    from referencing import Registry

    def check_pattern(_: Any, wanted: str, value: Any, __: Any) -> Any:
        try:
            found = not isinstance(value, str) or regex.search(wanted, value, timeout=0.1)
        except (regex.error, TimeoutError):
            found = True
        if not found:
            yield ValidationError("does not match its pattern")

    kind = extend(Draft202012Validator, {"pattern": check_pattern, "patternProperties": lambda *_: None})
    return kind(json.loads(schema), registry=Registry())


def _type_name(schema: Any) -> str:
    if not isinstance(schema, dict):
        return "any"
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    if values:
        return " or ".join(json.dumps(value, ensure_ascii=False) for value in values[:12])
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        return " or ".join(dict.fromkeys(_type_name(option) for option in options))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"[{_type_name(schema.get('items'))}, ...]"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _value(schema: Any, whole: dict[str, Any], depth: int) -> str:
    """The regex of what fits a schema, or of any value where the schema says more than a regex can."""
    if not isinstance(schema, dict) or depth == 0:
        return _any_value(0)
    if "$ref" in schema:
        return _value(_resolved(schema["$ref"], whole), whole, depth - 1)
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    if values:
        return f"({'|'.join(_literal(value) for value in values)})"
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        return f"({'|'.join(_value(option, whole, depth - 1) for option in options)})"
    kind = schema.get("type")
    if isinstance(kind, list) and kind:
        return f"({'|'.join(_value({**schema, 'type': one}, whole, depth) for one in kind)})"
    if kind == "string":
        return _text(least=1 if schema.get("minLength") else 0)
    if kind == "array":
        item = _value(schema.get("items"), whole, depth - 1)
        some = rf"{item}(, {item})*"
        return rf"\[{some}\]" if schema.get("minItems") else rf"\[({some})?\]"
    if kind == "object":
        return _object(schema, whole, depth - 1)
    return _JSON_TYPES.get(str(kind)) or _any_value(0)


def _object(schema: dict[str, Any], whole: dict[str, Any], depth: int) -> str:
    """An object's properties in one fixed order, the required ones first."""
    properties = schema.get("properties")
    if not properties:
        open_ended = properties is None and schema.get("additionalProperties") is not False
        return _any_object(1) if open_ended else r"\{\}"
    required = [name for name in properties if name in (schema.get("required") or ())]
    pairs = {name: f"{_literal(name)}: {_value(part, whole, depth)}" for name, part in properties.items()}
    optional = [name for name in properties if name not in required]
    if required:
        body = ", ".join(pairs[name] for name in required) + "".join(f"(, {pairs[name]})?" for name in optional)
        return rf"\{{{body}\}}"
    # Without a required one each may be the first, and only what stands after it has a comma before it.
    starts = [
        pairs[name] + "".join(f"(, {pairs[later]})?" for later in optional[i + 1 :]) for i, name in enumerate(optional)
    ]
    return rf"\{{({'|'.join(starts)})?\}}"


def _resolved(reference: Any, whole: dict[str, Any]) -> Any:
    found: Any = whole
    for part in str(reference).removeprefix("#/").split("/"):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _text(least: int = 0) -> str:
    return f'"{_CHAR}{"+" if least else "*"}"'


def _any_value(depth: int) -> str:
    scalar = f"{_text()}|{_NUMBER}{_FRACTION}|true|false|null"
    if depth == 0:
        return rf"({scalar}|\[(({scalar})(, ({scalar}))*)?\])"
    inner = _any_value(depth - 1)
    return rf"({scalar}|\[({inner}(, {inner})*)?\]|{_any_object(depth - 1)})"


def _any_object(depth: int) -> str:
    pair = f"{_KEY}: {_any_value(depth)}"
    return rf"\{{({pair}(, {pair})*)?\}}"


def _literal(value: Any) -> str:
    """A JSON value as a regex; only what every engine's dialect escapes is escaped."""
    return re.sub(r"[\\.\[\]{}()*+?^$|]", r"\\\g<0>", json.dumps(value, ensure_ascii=False))
