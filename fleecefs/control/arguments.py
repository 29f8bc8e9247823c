"""What a command takes: checked in one place, before its handler runs.

So a handler is an ordinary method with ordinary parameters.
"""

import enum
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar, cast

from fleecefs.control.qmp import Message, QmpError

Word = TypeVar("Word", bound=enum.Enum)

Handler = Callable[..., Awaitable[object]]


class Argument(NamedTuple):
    """What one parameter of a command takes."""

    expected: str
    accepts: Callable[[object], bool]
    required: bool = True
    # The words it takes, if it takes only some.
    choices: tuple[str, ...] = ()


class Command(NamedTuple):
    """A handler, called with the arguments by name once they have been checked."""

    handler: Handler
    arguments: dict[str, Argument]


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_string, value))


def _is_objects(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_object, value))


def _is_strings_or_objects(value: object) -> bool:
    return isinstance(value, list) and all(
        _is_string(each) or _is_object(each) for each in value
    )


STRING = Argument("string", _is_string)
STRINGS = Argument("array of strings", _is_strings)
INTEGER = Argument("integer", _is_integer)
NUMBER = Argument("number", _is_number)
BOOLEAN = Argument("boolean", _is_boolean)
OBJECT = Argument("object", _is_object)
OBJECTS = Argument("array of objects", _is_objects)
STRINGS_OR_OBJECTS = Argument("array of strings or objects", _is_strings_or_objects)


def one_of(*words: str) -> Argument:
    """Return an argument that is one of these words."""
    return STRING._replace(choices=words)


def optional(argument: Argument) -> Argument:
    """Return the same argument, which may be left out."""
    return argument._replace(required=False)


def check_at_least_0(arguments: Message, name: str) -> None:
    """Raise QmpError for a number that is negative, if it is there."""
    if cast("float", arguments.get(name, 0)) < 0:
        raise QmpError(f"Parameter {name!r} expects a value of at least 0")


def word(arguments: Message, name: str, kind: type[Word]) -> Word | None:
    """Return the member of an enumeration that an argument is, if it is there."""
    return kind(arguments[name]) if name in arguments else None


def words_of(kind: type[enum.Enum]) -> Argument:
    """Return an argument that is a member of an enumeration."""
    return one_of(*(member.value for member in kind))


def check_arguments(arguments: Message, expected: dict[str, Argument]) -> None:
    """Raise QmpError unless the arguments are what the command takes."""
    for name in arguments:
        if name not in expected:
            raise QmpError(f"Parameter {name!r} is unexpected")
    for name, argument in expected.items():
        if name in arguments:
            _check_argument(name, arguments[name], argument)
        elif argument.required:
            raise QmpError(f"Parameter {name!r} is missing")


def _check_argument(name: str, value: object, argument: Argument) -> None:
    if not argument.accepts(value):
        raise QmpError(
            f"Invalid parameter type for {name!r}, expected: {argument.expected}"
        )
    # JSON can escape half a surrogate pair, which no name or path can hold.
    strings = value if isinstance(value, list) else [value]
    for string in strings:
        if isinstance(string, str) and not _is_text(string):
            raise QmpError(f"Parameter {name!r} is not valid Unicode")
    if argument.choices and value not in argument.choices:
        raise QmpError(
            f"Parameter {name!r} does not accept value {value!r}:"
            f" it takes {', '.join(argument.choices)}"
        )


def _is_text(string: str) -> bool:
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True
