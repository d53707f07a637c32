"""Generic netlink, as much of it as talking to one family of the kernel takes.

A request is one datagram and is answered by messages with its sequence number, the last of them
an acknowledgement or an error. Events come unasked, to sockets that joined the family's group.
All integers are in the order of the machine, attributes are padded to four bytes.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Final

NETLINK_GENERIC: Final = 16
REPLY_TIMEOUT_S: Final = 30.0
MESSAGES_MAX: Final = 64  # of one reply
DATAGRAM_BYTES_MAX: Final = 64 << 10

_SOL_NETLINK: Final = 270
_ADD_MEMBERSHIP: Final = 1
_REQUEST: Final = 0x1
_ACK: Final = 0x4
_ERROR: Final = 0x2
_NESTED: Final = 0x8000
_KIND_MASK: Final = 0x3FFF

_CONTROL: Final = 0x10
_GET_FAMILY: Final = 3
_FAMILY_ID: Final = 1
_FAMILY_NAME: Final = 2
_GROUPS: Final = 7
_GROUP_NAME: Final = 1
_GROUP_ID: Final = 2

_MESSAGE: Final = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_GENERIC: Final = struct.Struct("=BBH")  # command, version, reserved
_ATTRIBUTE: Final = struct.Struct("=HH")  # length with this header, kind

Attributes = dict[int, bytes]


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute with its padding."""
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute made of others."""
    return attribute(kind | _NESTED, b"".join(attributes))


def text(value: str) -> bytes:
    """The payload of a string attribute."""
    return os.fsencode(value) + b"\0"


def parse_attributes(data: bytes) -> list[tuple[int, bytes]]:
    """Kinds and payloads, in their order. What is cut off or too short ends the list."""
    found = []
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            break
        found.append((kind & _KIND_MASK, data[_ATTRIBUTE.size : length]))
        data = data[length + -length % 4 :]
    return found


def parse_messages(data: bytes) -> list[tuple[int, int, bytes]]:
    """Type, sequence number and payload of every message of a datagram."""
    found = []
    while len(data) >= _MESSAGE.size:
        length, kind, _, sequence, _ = _MESSAGE.unpack_from(data)
        if not _MESSAGE.size <= length <= len(data):
            break
        found.append((kind, sequence, data[_MESSAGE.size : length]))
        data = data[length + -length % 4 :]
    return found


class Family:
    """One family of the kernel, found by its name.

    Raises:
      OSError: ENOENT when the kernel has no such family, EPERM and others as it answers.
    """

    def __init__(self, name: str, *, version: int = 1) -> None:
        self._version = version
        self._sequence = 0
        self._socket = _open()
        try:
            request = attribute(_FAMILY_NAME, text(name))
            (reply,) = self._exchange(_CONTROL, _GET_FAMILY, request)
        except BaseException:
            self._socket.close()
            raise
        self._id = int(struct.unpack("=H", reply[_FAMILY_ID])[0])
        self._groups = _groups(reply.get(_GROUPS, b""))

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, command: int, attributes: bytes) -> list[Attributes]:
        """Send a command and return what the replies to it hold. Blocking.

        Raises:
          OSError: with the number the kernel answered; ETIMEDOUT if it did not.
        """
        return self._exchange(self._id, command, attributes)

    def join(self, group: str) -> socket.socket:
        """Return a socket that receives the events of a group. KeyError: there is none."""
        number = self._groups[group]
        events = _open()
        try:
            events.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, number)
        except BaseException:
            events.close()
            raise
        events.setblocking(False)
        return events

    def _exchange(self, kind: int, command: int, attributes: bytes) -> list[Attributes]:
        self._sequence += 1
        body = _GENERIC.pack(command, self._version, 0) + attributes
        head = _MESSAGE.pack(_MESSAGE.size + len(body), kind, _REQUEST | _ACK, self._sequence, 0)
        self._socket.sendto(head + body, (0, 0))
        replies: list[Attributes] = []
        for _ in range(MESSAGES_MAX):
            try:
                datagram = self._socket.recv(DATAGRAM_BYTES_MAX)
            except TimeoutError as error:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error
            for found, sequence, payload in parse_messages(datagram):
                if sequence != self._sequence:
                    continue
                if found == _ERROR:
                    number = -int(struct.unpack_from("=i", payload)[0])
                    if number:
                        raise OSError(number, os.strerror(number))
                    return replies
                replies.append(dict(parse_attributes(payload[_GENERIC.size :])))
        raise OSError(errno.EPROTO, "the kernel's answer has no end")


def _open() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC)
    sock.settimeout(REPLY_TIMEOUT_S)
    sock.bind((0, 0))
    return sock


def _groups(data: bytes) -> dict[str, int]:
    found = {}
    for _, group in parse_attributes(data):
        fields = dict(parse_attributes(group))
        name = os.fsdecode(fields[_GROUP_NAME].rstrip(b"\0"))
        found[name] = int(struct.unpack("=I", fields[_GROUP_ID])[0])
    return found
