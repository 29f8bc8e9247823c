"""The server's half of a session: what a line means, after the lines before it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecefs.control.qmp import LINE_MAX
from fleecefs.control.session import Phase, Request, Session

HANDSHAKE = b'{"execute": "qmp_capabilities"}\n'


def session_ready():
    session = Session()
    assert list(session.feed(HANDSHAKE)) == [{"return": {}}]
    return session


def reply_to(session, **message):
    (item,) = session.feed(json.dumps(message).encode() + b"\n")
    return item


def test_a_command_before_negotiation_is_not_found():
    session = Session()

    reply = reply_to(session, execute="query-version")

    assert reply["error"]["class"] == "CommandNotFound"
    assert "qmp_capabilities" in reply["error"]["desc"]
    assert session.phase is Phase.NEGOTIATING


def test_negotiating_twice_is_not_found():
    reply = reply_to(session_ready(), execute="qmp_capabilities")

    assert reply["error"]["class"] == "CommandNotFound"


def test_there_are_no_capabilities():
    session = Session()

    refused = reply_to(session, execute="qmp_capabilities", arguments={"enable": ["x"]})
    accepted = reply_to(session, execute="qmp_capabilities", arguments={"enable": []})

    assert refused["error"]["class"] == "GenericError"
    assert accepted == {"return": {}}


@pytest.mark.parametrize(
    "name", [pytest.param(x, id=repr(x)) for x in [None, 0, "x", [1], {"a": 1}, 1.5]]
)
def test_an_id_of_any_type_is_echoed(name):
    session = Session()

    early = reply_to(session, execute="stop", id=name)
    shaken = reply_to(session, execute="qmp_capabilities", id=name)
    malformed = reply_to(session, id=name)
    request = reply_to(session, execute="stop", id=name)

    assert [early["id"], shaken["id"], malformed["id"]] == [name] * 3
    assert request == Request("stop", {}, {"id": name})


def test_no_id_is_no_id():
    assert reply_to(session_ready(), execute="stop").tag == {}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        pytest.param({}, "'execute' is missing", id="empty"),
        pytest.param({"execute": 1}, "'execute' is not a string", id="no-name"),
        pytest.param(
            {"execute": "x", "arguments": []}, "not an object", id="arguments"
        ),
        pytest.param({"exec-oob": "x"}, "'exec-oob' is unexpected", id="out-of-band"),
        pytest.param({"execute": "x", "argument": {}}, "unexpected", id="misspelt"),
    ],
)
def test_a_malformed_request_is_refused(message, words):
    reply = reply_to(session_ready(), **message)

    assert reply["error"]["class"] == "GenericError"
    assert words in reply["error"]["desc"]


def test_a_session_survives_bad_lines_in_their_order():
    session = session_ready()

    bad, request, worse, last = session.feed(
        b'x\n{"execute": "a"}\n[]\n{"execute": "b"}\n'
    )

    assert "error" in bad
    assert request.name == "a"
    assert "error" in worse
    assert last.name == "b"


def test_a_line_that_is_too_long_closes_the_session():
    session = session_ready()

    request, reply = session.feed(b'{"execute": "a"}\n' + b"x" * (LINE_MAX + 1))

    assert request.name == "a"
    assert "error" in reply
    assert session.phase is Phase.CLOSED
    assert list(session.feed(HANDSHAKE)) == []


FRAGMENTS = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b"1", b"null", b"e", b"-"),
        *(b"\n", b'"execute"', b'"id"', b'"arguments"', b'"qmp_capabilities"'),
        b'{"execute":',
    ]
)


@given(st.lists(FRAGMENTS, max_size=60))
def test_nearly_json_gets_a_reply_for_each_line(fragments):
    session = Session()

    items = list(session.feed(b"".join(fragments) + b"\n"))

    for item in items:
        assert isinstance(item, Request) or {"return", "error"} & set(item)
