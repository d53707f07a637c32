"""NBD URIs: what is written can be read back, and what is wrong is said."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lhblock.errors import UsageError
from lhblock.frontend.nbd import NbdUri, parse_uri

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
PATHS = NAMES.filter(bool)


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (NbdUri(export="db", host="localhost"), "nbd://localhost/db"),
        (NbdUri(export="db@s1", host="::1", port=7), "nbd://[::1]:7/db@s1"),
        (NbdUri(host="example.com"), "nbd://example.com/"),
        (NbdUri(export="/disk", host="h"), "nbd://h//disk"),
        (NbdUri(export="a b?#%", host="h"), "nbd://h/a%20b%3F%23%25"),
        (
            NbdUri(export="db", socket_path="/run/a b&c.sock"),
            "nbd+unix:///db?socket=/run/a%20b%26c.sock",
        ),
    ],
)
def test_uri_is_written_as_the_specification_says_and_read_back(uri: NbdUri, text: str) -> None:
    assert str(uri) == text
    assert parse_uri(text) == uri


def test_host_without_path_is_the_default_export() -> None:
    assert parse_uri("nbd://example.com") == NbdUri(host="example.com")


@given(name=NAMES, path=PATHS, port=st.integers(0, 65535))
def test_any_name_and_path_survive_the_round_trip(name: str, path: str, port: int) -> None:
    for uri in (NbdUri(export=name, host="h", port=port), NbdUri(export=name, socket_path=path)):
        assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize(
    "text",
    [
        "",
        "db",
        "http://h/db",
        "nbds://h/db",
        "nbd:///db",
        "nbd://h:99999/db",
        "nbd://h:x/db",
        "nbd://[::1/db",
        "nbd://h/%00",
        "nbd://h/%ff",
        "nbd://h/db?socket=/x",
        "nbd://h/db#part",
        "nbd+unix:///db",
        "nbd+unix:///db?socket=",
        "nbd+unix:///db?socket",
        "nbd+unix:///db?socket=/a&socket=/b",
        "nbd+unix:///db?socket=/a&tls-type=psk",
        "nbd+unix://host/db?socket=/a",
    ],
)
def test_what_is_not_an_nbd_uri_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_uri(text)


@given(st.text(max_size=60))
def test_no_text_makes_the_parser_fail_otherwise(text: str) -> None:
    for prefix in ("", "nbd://", "nbd+unix:///", "nbd+unix:///x?socket="):
        with suppress(UsageError):
            parse_uri(prefix + text)
