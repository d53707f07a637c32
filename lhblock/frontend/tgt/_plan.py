"""What tgtd shall offer, and how it is told."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lhblock.errors import FrontendError, UsageError
from lhblock.settings import Listen

from ._chap import Chap
from ._management import Management, Mode, Operation, Refused

# Longhorn's, so initiators configured for it find their target.
IQN_PREFIX: Final = "iqn.2019-10.io.longhorn:"
FIRST_LUN: Final = 1  # unit 0 of a target is tgtd's own
EVERYBODY: Final = "ALL"
VENDOR: Final = "LHBLOCK"

_IQN = re.compile(r"(iqn|eui|naa)\.[a-zA-Z0-9.:-]{1,220}")
_TARGET = re.compile(r"^Target (\d+): (\S+)$", re.MULTILINE)
_STORE = re.compile(r"^ +Backing store path: (.*)$", re.MULTILINE)
_ACCOUNT = re.compile(r"^ +Account information:\n((?: {8}.*\n)*)", re.MULTILINE)


def target_name(volume: str) -> str:
    """The target of a volume, as Longhorn names it: ``_`` is not allowed there."""
    return IQN_PREFIX + volume.replace("_", ":")


def check_allowed(who: str) -> str:
    """Return an address, a network or the name of an initiator, as tgtd wants it.

    Raises:
      UsageError: it is none of them.
    """
    if _IQN.fullmatch(who):
        return who
    try:
        network = ipaddress.ip_network(who)
    except ValueError as error:
        raise UsageError(
            f"--iscsi-allow {who!r} is no address, network (10.0.0.0/8) or initiator name (iqn...)"
        ) from error
    # A mask of all bits is not understood; then it is an address.
    text = str(network.network_address)
    text = f"[{text}]" if network.version == 6 else text
    whole = network.prefixlen == network.max_prefixlen
    return text if whole else f"{text}/{network.prefixlen}"


@dataclass(frozen=True)
class UnitPlan:
    """One logical unit.

    Attributes:
      identity: of the volume, the same for ever; what initiators recognise it by.
      path: of the NBD socket, or of the file.
    """

    volume: str
    lun: int
    identity: str
    path: str
    read_only: bool = False

    @property
    def numeric_id(self) -> int:
        """60 bits that are this volume's."""
        return int.from_bytes(self._digest[:8], "big") >> 4

    @property
    def serial(self) -> str:
        """Of the unit; hexadecimal, as tgtd computes a number from it."""
        return self._digest.hex()[:32]

    @property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.identity.encode()).digest()


@dataclass(frozen=True)
class TargetPlan:
    """One target and its units."""

    name: str
    units: tuple[UnitPlan, ...]

    @property
    def tid(self) -> int:
        """tgtd numbers units by the id of their target, so this one is always the same."""
        digest = hashlib.sha256(self.units[0].identity.encode()).digest()
        return int.from_bytes(digest[8:12], "big") >> 1 or 1


@dataclass(frozen=True)
class Plan:
    """All targets of one process, and who may use them.

    Attributes:
      store: ``lhblock``, our module in tgtd, or ``rdwr`` for files.
      directory: where every path of a unit begins; tells targets of ours from others.
      allowed: as `check_allowed` returns it; empty is everybody.
    """

    targets: tuple[TargetPlan, ...]
    store: str
    directory: Path
    allowed: tuple[str, ...] = ()
    chap: Chap | None = None
    block_bytes: int = 512

    async def apply(self, management: Management, *, shared: bool) -> None:
        """Make the targets. In a tgtd of others, what a dead process of ours left is removed.

        Raises:
          FrontendError: tgtd refuses, or a name is taken.
        """
        present = await self.remove(management) if shared else {}
        await self._make_accounts(management)
        for target in self.targets:
            tid = target.tid
            if shared:
                if target.name in present:
                    raise FrontendError(f"tgtd has a target {target.name} of somebody else")
                tid = next(each for each in range(1, 1 << 15) if each not in present.values())
                present[target.name] = tid
            await self._make_target(management, target, tid)

    async def remove(self, management: Management) -> dict[str, int]:
        """Remove our targets from a tgtd of others; return the ids of those that stay."""
        text = await management.call(Mode.TARGET, Operation.SHOW, what="a list of targets")
        ours = {target.name for target in self.targets}
        accounts: set[str] = set()
        others: set[str] = set()
        present: dict[str, int] = {}
        for tid, name, described in _each_target(text):
            names = _accounts(described)
            if name in ours and self._is_ours(described):
                await management.call(
                    Mode.TARGET, Operation.DELETE, what=f"to delete {name}", tid=tid, force=True
                )
                accounts |= names
            else:
                present[name] = tid
                others |= names
        for user in accounts - others:
            await management.call(
                Mode.ACCOUNT, Operation.DELETE, f"user={user}", what=f"to delete account {user}"
            )
        return present

    def _is_ours(self, described: str) -> bool:
        paths = [path for path in _STORE.findall(described) if path != "None"]
        # One that was interrupted while it was made has none.
        return all(Path(path).is_relative_to(self.directory.parent) for path in paths)

    async def _make_accounts(self, management: Management) -> None:
        if self.chap is None:
            return
        pairs = [(self.chap.user, self.chap.secret)]
        if self.chap.mutual_user:
            pairs.append((self.chap.mutual_user, self.chap.mutual_secret))
        for user, secret in pairs:
            await management.call(
                Mode.ACCOUNT,
                Operation.NEW,
                f"user={user},password={secret}",
                what=f"account {user}",
            )

    async def _make_target(self, management: Management, target: TargetPlan, tid: int) -> None:
        what = f"target {target.name}"
        await management.call(
            Mode.TARGET, Operation.NEW, f"targetname={target.name}", what=what, tid=tid
        )
        for unit in target.units:
            await self._make_unit(management, unit, tid)
        if self.chap is not None:
            pairs = [(self.chap.user, False), (self.chap.mutual_user, True)]
            for user, outgoing in pairs:
                if user:
                    await management.call(
                        Mode.ACCOUNT,
                        Operation.BIND,
                        f"user={user}",
                        what=f"account {user} for {target.name}",
                        tid=tid,
                        outgoing=outgoing,
                    )
        # Last: from here on initiators are let in.
        for who in self.allowed or (EVERYBODY,):
            kind = "name" if _IQN.fullmatch(who) else "address"
            await management.call(
                Mode.TARGET,
                Operation.BIND,
                f"initiator-{kind}={who}",
                what=f"access of {who} to {target.name}",
                tid=tid,
            )

    async def _make_unit(self, management: Management, unit: UnitPlan, tid: int) -> None:
        if "," in unit.path:
            raise FrontendError(f"tgtd takes no path with a comma: {unit.path}")
        parameters = [
            f"path={unit.path}",
            f"bstype={self.store}",
            f"blocksize={self.block_bytes}",
        ]
        if self.store == "lhblock":
            parameters.append(f"bsopts=export={unit.volume};id={unit.numeric_id:x}")
        what = f"volume {unit.volume} as unit {unit.lun}"
        try:
            await management.call(
                Mode.DEVICE, Operation.NEW, ",".join(parameters), what=what, tid=tid, lun=unit.lun
            )
        except Refused as error:
            raise FrontendError(f"{error}; its words are in the log") from error
        settings = {
            "vendor_id": VENDOR,
            # 16 characters, all there is room for.
            "product_id": unit.volume[:16],
            "scsi_sn": unit.serial,
            "scsi_id": unit.serial,
            "lbppbe": str((4096 // self.block_bytes).bit_length() - 1),
        }
        if unit.read_only:
            settings["readonly"] = "1"
        await management.call(
            Mode.DEVICE,
            Operation.UPDATE,
            ",".join(f"{key}={value}" for key, value in settings.items()),
            what=f"the names of volume {unit.volume}",
            tid=tid,
            lun=unit.lun,
        )


async def open_portal(management: Management, wanted: Listen) -> Listen:
    """Let initiators in at an address, and nowhere else; return it with its port.

    Raises:
      FrontendError: it cannot be had.
    """
    before = await _portals(management)
    try:
        await management.call(
            Mode.PORTAL, Operation.NEW, f"portal={wanted}", what=f"address {wanted}"
        )
    except Refused as error:
        raise FrontendError(
            f"tgtd cannot listen on {wanted}; if another tgtd does, choose another address with"
            " --iscsi-listen, or use that one with --iscsi-shared"
        ) from error
    for other in before:
        await management.call(
            Mode.PORTAL, Operation.DELETE, f"portal={other}", what=f"to leave {other}"
        )
    opened = await _portals(management)
    if not opened:
        raise FrontendError(f"tgtd does not listen on {wanted}")
    return opened[-1]


async def portal_of(management: Management) -> Listen:
    """An address that a tgtd of others listens on. FrontendError: there is none."""
    found = await _portals(management)
    if not found:
        raise FrontendError("the tgtd that runs here listens nowhere")
    return found[-1]


async def _portals(management: Management) -> Sequence[Listen]:
    text = await management.call(Mode.PORTAL, Operation.SHOW, what="a list of addresses")
    found = []
    for line in text.splitlines():
        address = line.removeprefix("Portal: ").partition(",")[0]
        host, _, port = address.rpartition(":")
        if port.isdecimal():
            found.append(Listen(host.strip("[]"), int(port)))
    return found


def _each_target(text: str) -> list[tuple[int, str, str]]:
    starts = list(_TARGET.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return [
        (int(match[1]), match[2], text[match.end() : end])
        for match, end in zip(starts, ends, strict=True)
    ]


def _accounts(described: str) -> set[str]:
    match = _ACCOUNT.search(described)
    return {line.split()[0] for line in match[1].splitlines()} if match else set()
