"""The option haggling of one NBD connection, from the greeting to the transmission phase.

Nothing here knows about sockets. Reads are exact: a client may send its first requests before it
has seen our last reply, and those bytes must stay in the socket for the C core.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from lhblock.errors import FrontendError, LhblockError

from . import _protocol as p
from ._exports import Export, Exports, canonical_name

BASE_ALLOCATION_ID: Final = 1
_SKIP_CHUNK_BYTES: Final = 16 << 10


class HandshakeEnded(FrontendError):
    """The handshake is over and no transmission phase follows. ``str()`` is the reason."""


class ByteStream(Protocol):
    """The part of ``trio.abc.Stream`` that a handshake uses."""

    async def receive_some(self, max_bytes: int) -> bytes | bytearray: ...

    async def send_all(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Agreement:
    """What client and server agreed on. The export is held open by the caller's stack."""

    export: Export
    export_name: str
    structured: bool
    base_allocation_id: int | None


class _Refusal(Exception):
    """The option in hand is answered with this error, and haggling goes on."""

    def __init__(self, kind: int, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


class _Wire:
    """Exact reads and whole writes; a lost peer is a :class:`HandshakeEnded`."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def receive(self, length: int, where: str) -> bytes:
        data = bytearray()
        while len(data) < length:
            data += await self._receive_some(length - len(data), where)
        return bytes(data)

    async def skip(self, length: int) -> None:
        while length:
            length -= len(await self._receive_some(min(length, _SKIP_CHUNK_BYTES), "in an option"))

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise HandshakeEnded("client vanished before it read our answer") from error

    async def _receive_some(self, max_bytes: int, where: str) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise HandshakeEnded(f"connection lost {where}") from error
        if not data:
            raise HandshakeEnded(f"client closed the connection {where}")
        return data


class _Fields:
    """A cursor over the data of one option; reading past its end refuses the option."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def integer(self, width_bytes: int) -> int:
        return int.from_bytes(self._take(width_bytes), "big")

    def string(self) -> str:
        """A string behind its 32-bit length."""
        return _decode(self._take(self.integer(4)))

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Refusal(p.NBD_REP_ERR_INVALID, "the option has more data than its fields fill")

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise _Refusal(p.NBD_REP_ERR_INVALID, "the option ends inside one of its fields")
        taken = self._data[self._at : self._at + length]
        self._at += length
        return taken


def _decode(raw: bytes) -> str:
    if len(raw) > p.NBD_MAX_STRING:
        raise _Refusal(
            p.NBD_REP_ERR_INVALID,
            f"a string of {len(raw)} bytes is longer than the {p.NBD_MAX_STRING} allowed",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refusal(p.NBD_REP_ERR_INVALID, "a string is not UTF-8") from None
    if "\0" in text:
        raise _Refusal(p.NBD_REP_ERR_INVALID, "a string contains a zero byte")
    return text


async def negotiate(
    stream: ByteStream,
    exports: Exports,
    held: AsyncExitStack,
    *,
    admit: Callable[[], str | None],
) -> Agreement:
    """Greet a client and answer its options until it enters the transmission phase.

    Args:
      held: keeps the export open after this returns; the caller leaves it when the connection is
        over. At most one export is open at a time, because opening one may be expensive and
        clients name the same export in several options.
      admit: called once the client has chosen its export. None lets it in; a sentence refuses,
        and the client may go on haggling.

    Raises:
      HandshakeEnded: the client left, or did something that ends the connection.

    Cancelled at any point: the connection is useless afterwards, ``held`` is consistent.
    """
    return await _Negotiation(_Wire(stream), exports, held, admit).run()


class _Negotiation:
    def __init__(
        self,
        wire: _Wire,
        exports: Exports,
        held: AsyncExitStack,
        admit: Callable[[], str | None],
    ) -> None:
        self._wire = wire
        self._exports = exports
        self._held = held
        self._admit = admit
        self._open: tuple[str, Export] | None = None
        self._no_zeroes = False
        self._structured = False
        self._context_export: str | None = None  # the export base:allocation was selected for
        self._agreement: Agreement | None = None
        # Each answers its option, and may set _agreement or raise.
        self._answers: dict[int, Callable[[int, bytes], Awaitable[bytes]]] = {
            p.NBD_OPT_LIST: self._list,
            p.NBD_OPT_INFO: self._info,
            p.NBD_OPT_GO: self._info,
            p.NBD_OPT_STRUCTURED_REPLY: self._structured_reply,
            p.NBD_OPT_LIST_META_CONTEXT: self._meta_context,
            p.NBD_OPT_SET_META_CONTEXT: self._meta_context,
        }

    async def run(self) -> Agreement:
        await self._wire.send(p.GREETING)
        raw_flags = await self._wire.receive(p.CLIENT_FLAGS.size, "before its flags")
        (flags,) = p.CLIENT_FLAGS.unpack(raw_flags)
        if flags & ~(p.NBD_FLAG_C_FIXED_NEWSTYLE | p.NBD_FLAG_C_NO_ZEROES):
            raise HandshakeEnded(f"client set unknown flags {flags:#x}")
        self._no_zeroes = bool(flags & p.NBD_FLAG_C_NO_ZEROES)

        for _ in range(p.OPTIONS_MAX):
            await self._option()
            if self._agreement is not None:
                return self._agreement
        raise HandshakeEnded(f"client sent {p.OPTIONS_MAX} options without choosing an export")

    async def _option(self) -> None:
        header = await self._wire.receive(p.OPTION_HEADER.size, "between options")
        magic, option, length = p.OPTION_HEADER.unpack(header)
        if magic != p.NBD_IHAVEOPT:
            raise HandshakeEnded(f"client sent option magic {magic:#x}")
        if length > p.OPTION_SKIP_BYTES_MAX:
            raise HandshakeEnded(f"client sent an option of {length} bytes")
        if option == p.NBD_OPT_ABORT:
            await self._abort(length)
        if length > p.OPTION_BYTES_MAX:
            await self._too_big(option, length)
            return
        data = await self._wire.receive(length, "in an option")
        if option == p.NBD_OPT_EXPORT_NAME:
            await self._export_name(data)
            return
        answer = self._answers.get(option, self._unsupported)
        try:
            packed = await answer(option, data)
        except _Refusal as refusal:
            packed = p.error_reply(option, refusal.kind, str(refusal))
        await self._wire.send(packed)

    async def _abort(self, length: int) -> None:
        # Its data is ignored, and the client need not wait for the answer.
        await self._wire.skip(length)
        with suppress(HandshakeEnded):
            await self._wire.send(p.reply(p.NBD_OPT_ABORT, p.NBD_REP_ACK))
        raise HandshakeEnded("client ended the handshake")

    async def _too_big(self, option: int, length: int) -> None:
        if option == p.NBD_OPT_EXPORT_NAME:
            # This option cannot be answered with an error.
            raise HandshakeEnded(f"client asked for an export name of {length} bytes")
        if option == p.NBD_OPT_SET_META_CONTEXT:
            self._context_export = None
        await self._wire.skip(length)
        sentence = f"{length} bytes of option data; the limit is {p.OPTION_BYTES_MAX}"
        await self._wire.send(p.error_reply(option, p.NBD_REP_ERR_TOO_BIG, sentence))

    async def _unsupported(self, option: int, data: bytes) -> bytes:
        if option == p.NBD_OPT_STARTTLS:
            raise _Refusal(p.NBD_REP_ERR_UNSUP, "this server does not speak TLS")
        raise _Refusal(p.NBD_REP_ERR_UNSUP, f"option {option} is not supported")

    async def _list(self, option: int, data: bytes) -> bytes:
        _Fields(data).end()
        entries = [p.server_reply(e.name, e.description) for e in self._exports.list()]
        return b"".join([*entries, p.reply(option, p.NBD_REP_ACK)])

    async def _structured_reply(self, option: int, data: bytes) -> bytes:
        _Fields(data).end()
        self._structured = True
        return p.reply(option, p.NBD_REP_ACK)

    async def _info(self, option: int, data: bytes) -> bytes:
        """``NBD_OPT_INFO`` and ``NBD_OPT_GO``: the same answer, but GO ends the haggling."""
        fields = _Fields(data)
        asked = fields.string()
        wanted = {fields.integer(2) for _ in range(fields.integer(2))}
        fields.end()
        name, export = await self._export(asked)
        flags = p.transmission_flags(read_only=export.read_only, structured=self._structured)
        payloads = {
            p.NBD_INFO_EXPORT: p.export_payload(export.size_bytes, flags),
            p.NBD_INFO_NAME: name.encode(),
            p.NBD_INFO_DESCRIPTION: export.description.encode(),
            p.NBD_INFO_BLOCK_SIZE: p.block_size_payload(),
        }
        wanted.add(p.NBD_INFO_EXPORT)
        if option == p.NBD_OPT_GO:
            self._choose(name, export)
        infos = [p.info_reply(option, k, v) for k, v in payloads.items() if k in wanted]
        return b"".join([*infos, p.reply(option, p.NBD_REP_ACK)])

    async def _export_name(self, data: bytes) -> None:
        try:
            name, export = await self._export(_decode(data))
            self._choose(name, export)
        except _Refusal as refusal:
            raise HandshakeEnded(f"refused NBD_OPT_EXPORT_NAME: {refusal}") from None
        flags = p.transmission_flags(read_only=export.read_only, structured=self._structured)
        zeroes = b"" if self._no_zeroes else p.EXPORT_NAME_ZEROES
        await self._wire.send(p.export_payload(export.size_bytes, flags) + zeroes)

    async def _meta_context(self, option: int, data: bytes) -> bytes:
        selecting = option == p.NBD_OPT_SET_META_CONTEXT
        if selecting:
            # A new selection replaces the old one even when it fails.
            self._context_export = None
        if not self._structured:
            raise _Refusal(p.NBD_REP_ERR_INVALID, "negotiate structured replies first")
        fields = _Fields(data)
        asked = fields.string()
        count = fields.integer(4)
        if count > p.META_QUERIES_MAX:
            raise _Refusal(
                p.NBD_REP_ERR_TOO_BIG, f"{count} queries; the limit is {p.META_QUERIES_MAX}"
            )
        queries = [fields.string() for _ in range(count)]
        fields.end()
        name, _ = await self._export(asked)

        if selecting:
            matches = p.BASE_ALLOCATION in queries
        else:
            # Listing knows wildcards: no query at all, or a namespace without a leaf.
            matches = not queries or p.BASE_ALLOCATION in queries or "base:" in queries
        packed = p.reply(option, p.NBD_REP_ACK)
        if not matches:
            return packed
        context_id = 0
        if selecting:
            context_id = BASE_ALLOCATION_ID
            self._context_export = name
        described = struct.pack(">I", context_id) + p.BASE_ALLOCATION.encode()
        return p.reply(option, p.NBD_REP_META_CONTEXT, described) + packed

    async def _export(self, asked: str) -> tuple[str, Export]:
        """Open what the client names, unless it is the one that is open already."""
        try:
            name = canonical_name(self._exports, asked)
            if self._open is None or self._open[0] != name:
                self._open = None
                await self._held.aclose()
                export = await self._held.enter_async_context(self._exports.open(name))
                self._open = (name, export)
        except LhblockError as error:
            raise _Refusal(p.NBD_REP_ERR_UNKNOWN, str(error)) from error
        return self._open

    def _choose(self, name: str, export: Export) -> None:
        refused = self._admit()
        if refused is not None:
            raise _Refusal(p.NBD_REP_ERR_POLICY, refused)
        # A context selected for another export does not count for this one.
        selected = self._context_export == name
        self._agreement = Agreement(
            export=export,
            export_name=name,
            structured=self._structured,
            base_allocation_id=BASE_ALLOCATION_ID if selected else None,
        )
