"""From ``key=value`` and YAML to a method's validated parameters.

The values are checked by the method's own pydantic model; what is wrong is said in terms of the
key, what was given, and what is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

from prufed_plugins.api import SUB_MODELS
from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

_BOUNDS: Final = {
    "exclusiveMinimum": "> ",
    "minimum": ">= ",
    "exclusiveMaximum": "< ",
    "maximum": "<= ",
    "minLength": "length >= ",
    "maxLength": "length <= ",
    "minItems": "items >= ",
    "maxItems": "items <= ",
    "pattern": "matching ",
}

_KINDS: Final = {
    "array": "a list",
    "boolean": "true | false",
    "integer": "an integer",
    "number": "a number",
    "string": "text",
}

_OUT_OF_RANGE: Final = frozenset(
    {
        "enum",
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "literal_error",
    }
)


@dataclass(frozen=True)
class Problem:
    """One setting that is not accepted.

    Attributes:
        key: the setting's name, dotted where it is inside another; empty where several contradict
            each other.
        message: what is wrong with it and what is accepted.
    """

    key: str
    message: str

    def __str__(self) -> str:
        """Return the two as one sentence."""
        return f"{self.key}: {self.message}" if self.key else self.message


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as a person reads it.

    Attributes:
        name: what stands before the ``=`` in ``--set``.
        type: the type's name.
        required: whether it must be given.
        default: the value where it is not given; None where it is required.
        accepts: the accepted range or choices; empty where the type says it all.
        description: one line.
    """

    name: str
    type: str
    required: bool
    default: Any
    accepts: str
    description: str


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the settings that ``--set key=value`` options give.

    Values are YAML scalars or lists; ``2:4`` and ``2024-01-01`` stay text.

    Raises:
        MethodError: an assignment without ``=``, a value that is no scalar or list, a key twice.
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not key:
            raise MethodError(f"cannot read the setting {assignment!r}", "write --set key=value")
        if key in settings:
            raise MethodError(f"the setting {key} is given twice", f"keep one --set {key}=...")
        settings[key] = _parse_value(key, text)
    return settings


def _parse_value(key: str, text: str) -> Any:
    import yaml

    if text.startswith("*"):
        return text  # a pattern: in YAML an alias, which a single value cannot have
    try:
        value = yaml.load(text, Loader=_loader())  # a SafeLoader with fewer implicit types
    except yaml.YAMLError as error:
        raise MethodError(
            f"cannot read the value of {key}: {text!r}", f"quote it: --set {key}='\"...\"'"
        ) from error
    if isinstance(value, Mapping):
        raise MethodError(
            f"the value of {key} is a mapping: {text!r}", "give a number, a word or a [list]"
        )
    return value


@cache
def _loader() -> type[yaml.SafeLoader]:
    """Return a loader of YAML 1.2's core types: 1.1 reads ``2:4`` as 124 and ``no`` as false."""
    import yaml

    class CoreLoader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (yaml's own protocol)

    for tag, pattern in (
        ("bool", r"true|True|TRUE|false|False|FALSE"),
        ("null", r"null|~|"),
        ("int", r"[-+]?(?:0|[1-9][0-9]*)"),
        (
            "float",
            r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
        ),
    ):
        CoreLoader.add_implicit_resolver(
            f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), None
        )
    return CoreLoader


def check_settings(model: type[BaseModel], settings: Mapping[str, Any]) -> list[Problem]:
    """Return everything in ``settings`` that ``model`` does not accept; empty where all is well."""
    from pydantic import ValidationError

    try:
        accepted = model.model_validate(dict(settings))
    except ValidationError as error:
        problems = (_problem(model, details, settings) for details in error.errors())
        return list(dict.fromkeys(problems))
    return _counted(accepted, settings)


def _counted(accepted: BaseModel, settings: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for every true or false that pydantic took for a 1 or a 0."""
    schema = _schema(type(accepted)).get("properties", {})
    problems = []
    for name, field in type(accepted).model_fields.items():
        spelling = _spelling(name, field)
        given, value = settings.get(spelling), getattr(accepted, name)
        if isinstance(given, bool) and isinstance(value, int | float) and value is not given:
            accepts = _accepts(schema.get(spelling, {})) or "a number"
            problems.append(Problem(spelling, f"must be {accepts}, not {given!r}"))
    return problems


def validate(label: str, model: type[BaseModel], settings: Mapping[str, Any]) -> BaseModel:
    """Return the parameters that ``settings`` give.

    Args:
        label: the method as a person knows it, ``sampler uniform``.
        model: the method's parameter model.
        settings: values by name.

    Raises:
        MethodError: names every key at fault and what is accepted.
    """
    problems = check_settings(model, settings)
    if problems:
        said = "; ".join(map(str, problems))
        reference = label.replace(" ", ":", 1)
        raise MethodError(f"{label}: {said}", f"prufed plugins show {reference}")
    return model.model_validate(dict(settings))


def _problem(model: type[BaseModel], details: ErrorDetails, settings: Mapping[str, Any]) -> Problem:
    where, what = details["loc"], details["type"]
    name = str(where[0]) if where else ""
    if what == "extra_forbidden":
        known = [_spelling(*field) for field in model.model_fields.items()]
        return Problem(name, _unknown(name, known))
    accepts = _accepts(_schema(model).get("properties", {}).get(name, {}))
    if what == "missing" and len(where) == 1:
        return Problem(name, f"must be given ({accepts})" if accepts else "must be given")
    # pydantic fails once per alternative of a union and puts the alternative's name after the key.
    of_union = len(where) > 1 and isinstance(where[1], str)
    if accepts and (of_union or what in _OUT_OF_RANGE):
        return Problem(name, f"must be {accepts}, not {settings.get(name)!r}")
    key = ".".join(map(str, where))
    if what in {"value_error", "assertion_error"}:
        return Problem(key, str(details.get("ctx", {}).get("error", details["msg"])))
    said = f"{details['msg'][:1].lower()}{details['msg'][1:]}, not {details['input']!r}"
    return Problem(key, f"{said} (accepted: {accepts})" if accepts and len(where) == 1 else said)


def _unknown(key: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
    if near:
        return f"no such setting; did you mean {near[0]}?"
    return f"no such setting; there is {', '.join(known)}" if known else "there is nothing to set"


def _spelling(name: str, field: FieldInfo) -> str:
    return field.alias or name


def parameters(model: type[BaseModel]) -> list[Parameter]:
    """Return what can be set on a method, in the order of its model."""
    schema = _schema(model).get("properties", {})
    return [
        Parameter(
            name=_spelling(name, field),
            type=_type_name(field.annotation),
            required=field.is_required(),
            default=None
            if field.is_required()
            else field.get_default(call_default_factory=True, validated_data={}),
            accepts=_accepts(schema.get(_spelling(name, field), {})),
            description=field.description or "",
        )
        for name, field in model.model_fields.items()
    ]


def holds_sub_models(field: FieldInfo) -> bool:
    """Return whether a parameter's paths are sub-models, which users name by reference."""
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and bool(extra.get(SUB_MODELS))


def example(model: type[BaseModel]) -> Mapping[str, Any]:
    """Return the first of the ``examples`` in a model's JSON schema; empty where it has none."""
    found = _schema(model).get("examples", [])
    return next((one for one in found if isinstance(one, Mapping)), {})


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    from pydantic.errors import PydanticInvalidForJsonSchema

    try:
        return model.model_json_schema()
    except PydanticInvalidForJsonSchema:
        return {}  # a stranger's type without a JSON form: its range cannot be told


def _accepts(schema: Mapping[str, Any]) -> str:
    """Return the range that one property of a JSON schema accepts, ``> 0, <= 1``."""
    if "anyOf" in schema:
        alternatives = (_accepts(option) or _kind(option) for option in schema["anyOf"])
        return " or ".join(dict.fromkeys(alternatives))
    if "enum" in schema:
        return " | ".join(str(choice) for choice in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    bounds = ((sign, schema[key]) for key, sign in _BOUNDS.items() if key in schema)
    return ", ".join(sign + _number(bound) for sign, bound in bounds)


def _number(bound: object) -> str:
    return f"{bound:.12g}" if isinstance(bound, float) else str(bound)


def _kind(schema: Mapping[str, Any]) -> str:
    if schema.get("format") in {"path", "file-path", "directory-path"}:
        return "a path"
    return _KINDS.get(schema.get("type", ""), str(schema.get("type", "another value")))


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in {Union, UnionType}:
        return " | ".join(_type_name(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(dict.fromkeys(type(choice).__name__ for choice in arguments))
    if annotation is NoneType:
        return "null"
    if isinstance(annotation, type) and not arguments:
        return annotation.__name__
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+", "", str(annotation))
