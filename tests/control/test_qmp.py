"""QMP's wire protocol: limits and errors."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleecefs.control.qmp import (
    LINE_MAX,
    NESTING_MAX,
    Decoder,
    ErrorClass,
    LineTooLong,
    QmpError,
    decode,
    encode,
    event,
    failure,
    greeting,
    success,
    version,
)

HANDSHAKE = b'{"execute": "qmp_capabilities"}\n'


def one_by_one(data):
    return [data[i : i + 1] for i in range(len(data))]


def decoded(pieces):
    """Return all messages, with an error's text in the place of a bad line."""
    decoder = Decoder()
    found = []
    for piece in pieces:
        messages = decoder.feed(piece)
        while True:
            try:
                found += messages
                break
            except LineTooLong as e:
                return [*found, e.desc]
            except QmpError as e:
                found.append(e.desc)
                messages = decoder.feed(b"")
    return found


LINES = [
    pytest.param(b'{"a": 1}\n{"b": [true, null]}\n', id="two-lines"),
    pytest.param(b'{"a": 1}\r\n\r\n\n  \t\n{"b": 2}\r\n', id="crlf-and-blank"),
    pytest.param('{"ä": "\u20ac\U0001f4be"}\n'.encode(), id="utf-8"),
    pytest.param(b'{"a": "\\n\\"[{"}\n', id="escapes"),
    pytest.param(b'{"a": 1}\nnonsense\n{"b": 2}\n\xff\n{"c": 3}\n', id="bad-between"),
    pytest.param(b'{"a": 1}\n{"b"', id="incomplete"),
    pytest.param(b'{"a": 1}{"b": [{}, "}"]} {"c": 3}', id="without-newlines"),
    pytest.param(b'{"a": 1}}]{"b": 2}\n{"c": "\\\\"}', id="closed-too-often"),
    pytest.param(b'{"a": 1}\n{"b": [\n{"c": 3}', id="cut-by-the-end-of-a-line"),
    pytest.param(b'{"a": 1}\n{"b": "\n{"c": 3}', id="string-cut-by-it"),
    pytest.param(b'{"a": 1}\n{"b": "\\\n{"c": 3}', id="escape-cut-by-it"),
    pytest.param(b'{"a": 1}\n' + b"x" * (LINE_MAX + 1), id="too-long"),
]


@pytest.mark.parametrize("data", LINES)
def test_bytes_in_any_pieces_give_the_same_messages(data):
    whole = decoded([data])

    assert decoded(one_by_one(data)) == whole
    assert whole[0] == next(iter(Decoder().feed(data)))


def test_a_bad_line_leaves_the_next_ones():
    assert decoded([b'{"a": 1}\nx\n{"b": 2}\n']) == [
        {"a": 1},
        "invalid JSON at column 1: Expecting value",
        {"b": 2},
    ]


def test_a_message_needs_no_newline():
    assert decoded([b'{"a": {}}{"b": "}"} {"c"']) == [{"a": {}}, {"b": "}"}]


def test_the_end_of_a_line_ends_what_was_wrong_on_it():
    first, second, third = decoded([b'{"a": [{"\\\n{"b": 2}\n]]}{"c": 3}\n{"d": 4}\n'])[
        :3
    ]

    assert "invalid JSON" in first
    assert second == {"b": 2}
    assert "invalid JSON" in third


def test_data_is_kept_although_nobody_looks_at_the_messages():
    decoder = Decoder()

    decoder.feed(b'{"a"')

    assert list(decoder.feed(b": 1}\n")) == [{"a": 1}]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_that_is_too_long_is_final(end):
    decoder = Decoder()

    with pytest.raises(LineTooLong):
        list(decoder.feed(b"x" * (LINE_MAX + 1) + end))

    with pytest.raises(LineTooLong):
        list(decoder.feed(HANDSHAKE))


def test_a_line_may_be_as_long_as_the_limit():
    line = b'{"a": "' + b"x" * (LINE_MAX - 9) + b'"}'

    assert len(list(Decoder().feed(line + b"\n"))) == 1


DEEP = NESTING_MAX - 1

BAD_LINES = [
    pytest.param(b"nonsense", "invalid JSON", id="not-json"),
    pytest.param(b'{"a": 1', "invalid JSON", id="no-end"),
    pytest.param(b'{"a": 1} {"b": 2}', "invalid JSON", id="two-on-a-line"),
    pytest.param(b'{"a": "x', "invalid JSON", id="string-without-end"),
    pytest.param(b'{"a": "\\', "invalid JSON", id="escape-without-end"),
    pytest.param(b'{"a": "\x01"}', "invalid JSON", id="control-character"),
    pytest.param(b'\xef\xbb\xbf{"a": 1}', "invalid JSON", id="byte-order-mark"),
    pytest.param(b'{"a": "\xff"}', "UTF-8", id="not-utf-8"),
    pytest.param(b'{"a": "\xed\xa0\x80"}', "UTF-8", id="surrogate-in-utf-8"),
    pytest.param(b"[]", "object", id="list"),
    pytest.param(b"null", "object", id="null"),
    pytest.param(b'"a"', "object", id="string"),
    pytest.param(b'{"a": 1, "b": 2, "a": 3}', "'a' occurs twice", id="same-key"),
    pytest.param(b'{"a": {"b": 1, "b": 1}}', "'b' occurs twice", id="same-key-inside"),
    pytest.param(b'{"a": NaN}', "NaN", id="nan"),
    pytest.param(b'{"a": -Infinity}', "-Infinity", id="infinity"),
    pytest.param(b'{"a": 1e999}', "out of range", id="infinite-float"),
    pytest.param(b'{"a": 18446744073709551616}', "64 bits", id="integer-2**64"),
    pytest.param(b'{"a": -9223372036854775809}', "64 bits", id="integer-below-2**63"),
    pytest.param(b'{"a": ' + b"9" * 900_000 + b"}", "64 bits", id="long-integer"),
    pytest.param(b"[" * 500_000, "nested deeper", id="bomb-of-lists"),
    pytest.param(b'{"a":' * 150_000, "nested deeper", id="bomb-of-objects"),
    pytest.param(
        b'{"a":' + b"[" * (DEEP + 1) + b"]" * (DEEP + 1) + b"}",
        "nested deeper",
        id="one-too-deep",
    ),
    pytest.param(b"]" * 99 + b"[" * 99, "invalid JSON", id="closed-before-opened"),
    pytest.param(b'{"a": "' + b'\\"' * 300_000, "invalid JSON", id="many-quotes"),
    pytest.param(
        b"{" + b",".join(b'"%d":0' % i for i in range(80_000)) + b',"79999":0}',
        "'79999' occurs twice",
        id="same-key-after-many",
    ),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_a_bad_line_is_one_clear_error(line, words):
    with pytest.raises(QmpError) as e:
        decode(line)

    assert words in e.value.desc
    assert "\n" not in e.value.desc
    assert e.value.error_class is ErrorClass.GENERIC


@pytest.mark.parametrize(
    ("line", "value"),
    [
        pytest.param(b'{"a": 18446744073709551615}', 2**64 - 1, id="uint64"),
        pytest.param(b'{"a": -9223372036854775808}', -(2**63), id="int64"),
        pytest.param(b'{"a": 1.5e3}', 1500.0, id="float"),
        pytest.param(
            b'{"a": "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}', "[" * 33, id="text"
        ),
        pytest.param(b'{"a": "\\"[[["}', '"[[[', id="quote-in-text"),
    ],
)
def test_what_is_within_the_limits_is_taken(line, value):
    assert decode(line) == {"a": value}


def test_nesting_up_to_the_limit_is_taken():
    assert decode(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}")


@given(st.binary(max_size=200))
@example(b"\\")
@example(b'"')
def test_garbage_gives_messages_or_one_kind_of_error(data):
    # `decoded` lets everything but QmpError through.
    assert decoded([data]) == decoded(one_by_one(data))


def test_builders_have_the_shapes_of_the_specification():
    greeted = greeting(version("1.20.3"))
    happened = event("SHUTDOWN", {})

    assert greeted["QMP"]["version"]["qemu"] == {"major": 1, "minor": 20, "micro": 3}
    assert greeted["QMP"]["capabilities"] == []
    assert success([1], {"id": None}) == {"return": [1], "id": None}
    assert failure(QmpError("no", ErrorClass.DEVICE_NOT_FOUND), {}) == {
        "error": {"class": "DeviceNotFound", "desc": "no"}
    }
    assert set(happened) == {"event", "data", "timestamp"}
    assert 0 <= happened["timestamp"]["microseconds"] < 10**6


def test_encoding_is_one_line_that_decodes_again():
    message = {"a": "ä\n\udcff", "b": [1, 2.5, None]}

    line = encode(message)

    assert line.count(b"\n") == 1
    assert decode(line) == message
