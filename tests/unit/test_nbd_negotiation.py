"""The NBD option haggling, over memory streams."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from lhblock.errors import VolumeFaulted
from lhblock.frontend.nbd import Agreement, HandshakeEnded, negotiate
from tests.unit import nbd_client as c
from tests.unit.nbd_client import Client, FakeExport, FakeExports, Reply

READ_WRITE_FLAGS = 0b1101_0110_1101
DF_FLAG = 1 << 7
READ_ONLY_FLAGS = 0b0101_0000_1111


@dataclass
class Outcome:
    agreement: Agreement | None = None
    ended: str | None = None
    done: trio.Event = field(default_factory=trio.Event)


@asynccontextmanager
async def handshake(
    exports: FakeExports, *, greet: int | None = 3, admit: Callable[[], str | None] = lambda: None
) -> AsyncIterator[tuple[Client, Outcome]]:
    """A client connected to a negotiation; leaving the block waits for the negotiation's end."""
    near, far = trio.testing.memory_stream_pair()
    outcome = Outcome()

    async def serve() -> None:
        async with AsyncExitStack() as held:
            try:
                outcome.agreement = await negotiate(far, exports, held, admit=admit)
            except HandshakeEnded as ended:
                outcome.ended = str(ended)
            await far.aclose()
            outcome.done.set()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            client = Client(near)
            if greet is not None:
                await client.greet(greet)
            yield client, outcome
            await near.aclose()


def one_volume() -> FakeExports:
    return FakeExports(
        db=FakeExport(description="the database"), db_at_s1=FakeExport(read_only=True)
    )


def kinds(replies: list[Reply]) -> list[int]:
    return [reply.kind for reply in replies]


async def test_go_agrees_on_an_export_and_tells_size_and_flags() -> None:
    exports = one_volume()
    async with handshake(exports) as (client, outcome):
        replies = await client.ask(c.GO, c.go_data("db"))
        assert replies == [
            Reply(c.GO, c.REP_INFO, struct.pack(">HQH", 0, 7 << 20, READ_WRITE_FLAGS)),
            Reply(c.GO, c.ACK, b""),
        ]
        await outcome.done.wait()
    assert outcome.agreement == Agreement(exports.exports["db"], "db", False, None)


async def test_go_answers_the_information_that_was_asked_for_once_each() -> None:
    async with handshake(one_volume()) as (client, _):
        await client.ask(c.STRUCTURED_REPLY)
        # 99 is unknown and 3 comes twice.
        replies = await client.ask(c.GO, c.go_data("db", 3, 99, 2, 1, 3))
    assert sorted(reply.data for reply in replies[:-1]) == [
        struct.pack(">HQH", 0, 7 << 20, READ_WRITE_FLAGS | DF_FLAG),
        b"\0\1db",
        b"\0\2the database",
        struct.pack(">HIII", 3, 1, 4096, 32 << 20),
    ]
    assert replies[-1].kind == c.ACK


async def test_read_only_export_offers_no_command_that_writes() -> None:
    async with handshake(one_volume()) as (client, _):
        info = (await client.ask(c.INFO, c.go_data("db@s1")))[0]
    assert info.data == struct.pack(">HQH", 0, 7 << 20, READ_ONLY_FLAGS)


async def test_info_describes_and_haggling_goes_on_without_opening_twice() -> None:
    exports = one_volume()
    async with handshake(exports) as (client, outcome):
        info = await client.ask(c.INFO, c.go_data("db"))
        assert outcome.agreement is None
        go = await client.ask(c.GO, c.go_data("db"))
        assert [r.data for r in info] == [r.data for r in go]
    assert (exports.exports["db"].opened, exports.exports["db"].closed) == (1, 1)


async def test_looking_at_another_export_closes_the_first() -> None:
    exports = one_volume()
    async with handshake(exports) as (client, _):
        await client.ask(c.INFO, c.go_data("db"))
        await client.ask(c.INFO, c.go_data("db@s1"))
        assert exports.exports["db"].closed == 1
    assert exports.exports["db@s1"].closed == 1


@pytest.mark.parametrize(("flags", "zeroes"), [(3, 0), (1, 124), (0, 124), (2, 0)])
async def test_export_name_is_followed_by_zeroes_unless_both_declined(
    flags: int, zeroes: int
) -> None:
    async with handshake(one_volume(), greet=flags) as (client, outcome):
        await client.stream.send_all(c.option(c.EXPORT_NAME, b"db"))
        expected = struct.pack(">QH", 7 << 20, READ_WRITE_FLAGS) + bytes(zeroes)
        assert await client.receive(len(expected)) == expected
        assert await client.at_end()
        await outcome.done.wait()
    assert outcome.agreement is not None


@pytest.mark.parametrize("name", [b"nosuch", b"\xff", b"d\0b", b"n" * 4097, b"n" * 100_000])
async def test_export_name_that_is_not_served_closes_the_connection(name: bytes) -> None:
    async with handshake(one_volume()) as (client, outcome):
        await client.stream.send_all(c.option(c.EXPORT_NAME, name))
        assert await client.at_end()
    assert outcome.agreement is None
    assert outcome.ended


async def test_list_names_every_export_with_its_description() -> None:
    async with handshake(one_volume()) as (client, _):
        assert await client.ask(c.LIST) == [
            Reply(c.LIST, c.SERVER, b"\0\0\0\2dbthe database"),
            Reply(c.LIST, c.SERVER, b"\0\0\0\5db@s1"),
            Reply(c.LIST, c.ACK, b""),
        ]


async def test_empty_name_means_the_only_volume_whatever_snapshots_there_are() -> None:
    async with handshake(one_volume()) as (client, outcome):
        replies = await client.ask(c.GO, c.go_data("", 1))
        assert replies[1].data == b"\0\1db"
        await outcome.done.wait()
    assert outcome.agreement is not None
    assert outcome.agreement.export_name == "db"


@pytest.mark.parametrize("exports", [FakeExports(), FakeExports(a=FakeExport(), b=FakeExport())])
async def test_empty_name_is_unknown_when_there_is_not_exactly_one_volume(
    exports: FakeExports,
) -> None:
    async with handshake(exports) as (client, outcome):
        (reply,) = await client.ask(c.GO, c.go_data(""))
        assert reply.kind == c.ERR_UNKNOWN
        assert b"volumes are served" in reply.data
    assert outcome.ended == "client closed the connection between options"


async def test_unknown_export_is_refused_and_another_may_be_chosen() -> None:
    async with handshake(one_volume()) as (client, outcome):
        (reply,) = await client.ask(c.GO, c.go_data("nosuch"))
        assert reply.kind == c.ERR_UNKNOWN
        assert reply.data == b"no export 'nosuch' is served"
        await client.ask(c.GO, c.go_data("db"))
    assert outcome.agreement is not None


async def test_export_that_cannot_be_opened_is_refused_with_its_sentence() -> None:
    class Broken(FakeExports):
        @asynccontextmanager
        async def open(self, name: str) -> AsyncIterator[FakeExport]:
            raise VolumeFaulted(name, "no usable replica is left")
            yield

    async with handshake(Broken(db=FakeExport())) as (client, _):
        (reply,) = await client.ask(c.GO, c.go_data("db"))
    assert reply.kind == c.ERR_UNKNOWN
    assert reply.data == b"volume db: no usable replica is left"


@pytest.mark.parametrize("number", [c.INFO, c.GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\2d",
        struct.pack(">I", 2**32 - 1) + b"db\0\0",
        c.go_data("db")[:-1],
        c.go_data("db", 3)[:-1],
        c.go_data("db") + b"x",
        c.go_data(b"\xc3"),
        c.go_data(b"d\0b"),
        c.go_data(b"n" * 4097),
    ],
)
async def test_malformed_go_is_invalid_and_haggling_goes_on(number: int, data: bytes) -> None:
    async with handshake(one_volume()) as (client, outcome):
        assert kinds(await client.ask(number, data)) == [c.ERR_INVALID]
        assert kinds(await client.ask(c.GO, c.go_data("db")))[-1] == c.ACK
    assert outcome.agreement is not None


async def test_longest_name_is_looked_up() -> None:
    async with handshake(one_volume()) as (client, _):
        (reply,) = await client.ask(c.GO, c.go_data("n" * 4096))
    assert reply.kind == c.ERR_UNKNOWN
    assert len(reply.data) <= 4096


@pytest.mark.parametrize(
    ("number", "data", "kind"),
    [
        (c.LIST, b"x", c.ERR_INVALID),
        (c.STRUCTURED_REPLY, b"x", c.ERR_INVALID),
        (c.STARTTLS, b"", c.ERR_UNSUP),
        (c.EXTENDED_HEADERS, b"", c.ERR_UNSUP),
        (4, b"", c.ERR_UNSUP),
        (2**32 - 1, b"data of some kind", c.ERR_UNSUP),
        (c.LIST_META_CONTEXT, c.context_data("db"), c.ERR_INVALID),
        (c.SET_META_CONTEXT, c.context_data("db", "base:allocation"), c.ERR_INVALID),
        (c.GO, bytes((64 << 10) + 1), c.ERR_TOO_BIG),
        (99, bytes(1 << 20), c.ERR_TOO_BIG),
    ],
)
async def test_option_that_is_refused_leaves_the_handshake_usable(
    number: int, data: bytes, kind: int
) -> None:
    async with handshake(one_volume()) as (client, outcome):
        assert kinds(await client.ask(number, data)) == [kind]
        assert kinds(await client.ask(c.GO, c.go_data("db")))[-1] == c.ACK
    assert outcome.agreement is not None


@pytest.mark.parametrize("data", [b"", b"ignored"])
async def test_abort_is_acknowledged_and_ends_the_connection(data: bytes) -> None:
    async with handshake(one_volume()) as (client, outcome):
        assert kinds(await client.ask(c.ABORT, data)) == [c.ACK]
        assert await client.at_end()
    assert outcome.ended == "client ended the handshake"


async def test_client_may_abort_without_waiting_for_the_answer() -> None:
    async with handshake(one_volume()) as (client, outcome):
        await client.stream.send_all(c.option(c.ABORT))
    assert outcome.ended == "client ended the handshake"


async def test_selected_context_is_agreed_with_its_id() -> None:
    async with handshake(one_volume()) as (client, outcome):
        await client.ask(c.STRUCTURED_REPLY)
        selected = await client.ask(
            c.SET_META_CONTEXT, c.context_data("db", "x-other:thing", "base:allocation")
        )
        assert kinds(selected) == [c.META_CONTEXT, c.ACK]
        (context_id,) = struct.unpack(">I", selected[0].data[:4])
        assert selected[0].data[4:] == b"base:allocation"
        await client.ask(c.GO, c.go_data("db"))
        await outcome.done.wait()
    assert outcome.agreement is not None
    assert outcome.agreement.structured
    assert outcome.agreement.base_allocation_id == context_id


@pytest.mark.parametrize(
    "queries", [(), ("base:",), ("base:other",), ("x-y:",), ("nonsense",), ("base:allocation2",)]
)
async def test_selection_without_an_exact_query_selects_nothing(queries: tuple[str, ...]) -> None:
    async with handshake(one_volume()) as (client, outcome):
        await client.ask(c.STRUCTURED_REPLY)
        await client.ask(c.SET_META_CONTEXT, c.context_data("db", "base:allocation"))
        assert kinds(await client.ask(c.SET_META_CONTEXT, c.context_data("db", *queries))) == [
            c.ACK
        ]
        await client.ask(c.GO, c.go_data("db"))
        await outcome.done.wait()
    assert outcome.agreement is not None
    assert outcome.agreement.base_allocation_id is None


@pytest.mark.parametrize(
    "bad",
    [
        c.context_data("nosuch", "base:allocation"),
        c.context_data("db", "base:allocation")[:-1],
        bytes(70_000),
    ],
)
async def test_failed_selection_drops_the_earlier_one(bad: bytes) -> None:
    async with handshake(one_volume()) as (client, outcome):
        await client.ask(c.STRUCTURED_REPLY)
        await client.ask(c.SET_META_CONTEXT, c.context_data("db", "base:allocation"))
        assert kinds(await client.ask(c.SET_META_CONTEXT, bad))[0] & 2**31
        await client.ask(c.GO, c.go_data("db"))
        await outcome.done.wait()
    assert outcome.agreement is not None
    assert outcome.agreement.base_allocation_id is None


async def test_context_selected_for_another_export_does_not_count() -> None:
    async with handshake(one_volume()) as (client, outcome):
        await client.ask(c.STRUCTURED_REPLY)
        await client.ask(c.SET_META_CONTEXT, c.context_data("db", "base:allocation"))
        await client.ask(c.GO, c.go_data("db@s1"))
        await outcome.done.wait()
    assert outcome.agreement is not None
    assert outcome.agreement.base_allocation_id is None


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), True),
        (("base:",), True),
        (("x-y:", "base:allocation"), True),
        (("base:other",), False),
        (("x-y:",), False),
    ],
)
async def test_listing_contexts_knows_wildcards(queries: tuple[str, ...], found: bool) -> None:
    async with handshake(one_volume()) as (client, _):
        await client.ask(c.STRUCTURED_REPLY)
        replies = await client.ask(c.LIST_META_CONTEXT, c.context_data("db", *queries))
    assert [r.data for r in replies[:-1]] == ([b"\0\0\0\0base:allocation"] if found else [])
    assert replies[-1].kind == c.ACK


@pytest.mark.parametrize("number", [c.LIST_META_CONTEXT, c.SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (c.context_data("nosuch"), c.ERR_UNKNOWN),
        (c.context_data("db", *["x:y"] * 65), c.ERR_TOO_BIG),
        (struct.pack(">I2sI", 2, b"db", 2**32 - 1), c.ERR_TOO_BIG),
        (struct.pack(">I2sI", 2, b"db", 2), c.ERR_INVALID),
        (c.context_data("db", b"\xff:"), c.ERR_INVALID),
        (c.context_data("db", "x:y") + b"z", c.ERR_INVALID),
        (b"", c.ERR_INVALID),
    ],
)
async def test_bad_context_request_is_refused(number: int, data: bytes, kind: int) -> None:
    async with handshake(one_volume()) as (client, _):
        await client.ask(c.STRUCTURED_REPLY)
        assert kinds(await client.ask(number, data)) == [kind]


async def test_refused_admission_tells_why_and_leaves_the_handshake_usable() -> None:
    answers = iter(["all 5 connections are taken", None])
    async with handshake(one_volume(), admit=lambda: next(answers)) as (client, outcome):
        (reply,) = await client.ask(c.GO, c.go_data("db"))
        assert (reply.kind, reply.data) == (c.ERR_POLICY, b"all 5 connections are taken")
        await client.ask(c.GO, c.go_data("db"))
    assert outcome.agreement is not None


async def test_refused_admission_ends_export_name() -> None:
    async with handshake(one_volume(), admit=lambda: "full") as (client, outcome):
        await client.stream.send_all(c.option(c.EXPORT_NAME, b"db"))
        assert await client.at_end()
    assert outcome.ended == "refused NBD_OPT_EXPORT_NAME: full"


@pytest.mark.parametrize("flags", [4, 2**31 | 3])
async def test_unknown_client_flag_ends_the_connection(flags: int) -> None:
    async with handshake(one_volume(), greet=flags) as (client, outcome):
        assert await client.at_end()
    assert outcome.ended == f"client set unknown flags {flags:#x}"


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.0\r\n\r\n", struct.pack(">QII", c.OPTION_MAGIC, c.GO, (1 << 20) + 1)],
)
async def test_garbage_instead_of_an_option_ends_the_connection(garbage: bytes) -> None:
    async with handshake(one_volume()) as (client, outcome):
        await client.stream.send_all(garbage)
        assert await client.at_end()
    assert outcome.ended
    assert outcome.ended.startswith("client sent")


async def test_options_without_end_end_the_connection() -> None:
    async with handshake(one_volume()) as (client, outcome):
        for _ in range(1000):
            await client.ask(c.LIST)
        assert await client.at_end()
    assert outcome.ended == "client sent 1000 options without choosing an export"


async def test_bytes_after_go_stay_in_the_stream() -> None:
    near, far = trio.testing.memory_stream_pair()
    script = struct.pack(">I", 3) + c.option(c.STRUCTURED_REPLY) + c.option(c.GO, c.go_data("db"))
    await near.send_all(script + b"first request")
    async with AsyncExitStack() as held:
        await negotiate(far, one_volume(), held, admit=lambda: None)
        assert await far.receive_some(100) == b"first request"


FULL_SCRIPT = (
    struct.pack(">I", 3)
    + c.option(c.STRUCTURED_REPLY)
    + c.option(c.LIST)
    + c.option(c.SET_META_CONTEXT, c.context_data("db", "base:allocation"))
    + c.option(c.GO, c.go_data("db", 1, 3))
)


async def negotiate_bytes(script: bytes, exports: FakeExports) -> tuple[Agreement | None, bytes]:
    """Run a whole handshake from bytes that end; returns the agreement and all that was sent."""
    near, far = trio.testing.memory_stream_pair()
    await near.send_all(script)
    await near.send_eof()
    agreement = None
    with trio.fail_after(5):
        async with AsyncExitStack() as held:
            with suppress(HandshakeEnded):
                agreement = await negotiate(far, exports, held, admit=lambda: None)
        await far.send_eof()
        sent = bytearray()
        while chunk := await near.receive_some(1 << 20):
            sent += chunk
    for export in exports.exports.values():
        assert export.opened == export.closed
    return agreement, bytes(sent)


@pytest.mark.parametrize("length", range(len(FULL_SCRIPT)))
async def test_peer_that_closes_after_any_byte_only_ends_the_handshake(length: int) -> None:
    agreement, _ = await negotiate_bytes(FULL_SCRIPT[:length], one_volume())
    assert agreement is None


async def test_whole_script_agrees() -> None:
    agreement, _ = await negotiate_bytes(FULL_SCRIPT, one_volume())
    assert agreement is not None
    assert agreement.base_allocation_id is not None


NAMES = st.one_of(
    st.sampled_from([b"", b"db", b"db@s1", b"x", b"base:", b"base:allocation"]),
    st.binary(max_size=20),
)
STRINGS = st.builds(
    lambda raw, wrong: struct.pack(">I", wrong if wrong is not None else len(raw)) + raw,
    NAMES,
    st.none() | st.none() | st.none() | st.integers(0, 2**32 - 1),
)
OPTION_DATA = st.one_of(
    st.just(b""),
    NAMES,
    st.binary(max_size=60),
    st.builds(
        lambda name, infos: name + struct.pack(f">H{len(infos)}H", len(infos), *infos),
        STRINGS,
        st.lists(st.integers(0, 5), max_size=5),
    ),
    st.builds(
        lambda name, queries: name + struct.pack(">I", len(queries)) + b"".join(queries),
        STRINGS,
        st.lists(STRINGS, max_size=5),
    ),
)
OPTIONS = st.builds(c.option, st.integers(0, 12) | st.integers(0, 2**32 - 1), OPTION_DATA)
SCRIPTS = st.builds(
    lambda flags, options, tail: struct.pack(">I", flags) + b"".join(options) + tail,
    st.sampled_from([0, 1, 2, 3]),
    st.lists(OPTIONS, max_size=12),
    st.binary(max_size=40),
)


@settings(max_examples=300, deadline=None)
@given(script=SCRIPTS)
async def test_any_sequence_of_options_ends_in_agreement_or_disconnect(script: bytes) -> None:
    agreement, sent = await negotiate_bytes(script, one_volume())
    # 20 bytes of header and at most one name or sentence for each of the few replies an option
    # can have; nothing the client says makes us send more.
    assert len(sent) <= 18 + 12 * 700 + 134
    if agreement is not None:
        assert agreement.export_name in ("db", "db@s1")
        assert agreement.structured or agreement.base_allocation_id is None


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=200))
async def test_any_bytes_end_in_disconnect(noise: bytes) -> None:
    agreement, sent = await negotiate_bytes(noise, one_volume())
    assert agreement is None
    assert sent.startswith(c.GREETING)
    assert len(sent) <= 18 + 1000
