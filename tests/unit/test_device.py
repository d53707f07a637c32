"""Attaching, as far as it goes without a kernel that has nbd: what is found, refused and said."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lhblock.device import (
    Attached,
    AttachOptions,
    Host,
    Target,
    attach,
    attached_devices,
    choose,
    detach,
    uri_identity,
    volume_identity,
)
from lhblock.device import _kernel_nbd as kernel
from lhblock.device._nbd import keeper_runs, lock_path
from lhblock.device._netlink import Family, attribute, nested, parse_attributes, parse_messages
from lhblock.device._target import pack, unpack
from lhblock.errors import DeviceError, DeviceForeign, DeviceUnavailable, NotAttached, UsageError

URI = "nbd://127.0.0.1:10809/db"


class FakeHost:
    """Directories that look like those of a host."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("sys/module", "sys/block", "dev"):
            (root / name).mkdir(parents=True)
        (root / "mountinfo").touch()
        self.host = Host(
            sysfs=root / "sys",
            devices=root / "dev",
            run=root / "run",
            mountinfo=root / "mountinfo",
            search_path="",
        )

    def add_device(self, index: int, backend: str | None, *, sectors: int = 8) -> Path:
        block = self.root / "sys" / "block" / f"nbd{index}"
        block.mkdir()
        (block / "size").write_text(f"{sectors}\n")
        if backend is not None:
            (block / "backend").write_text(f"{backend}\n")
        node = self.root / "dev" / f"nbd{index}"
        node.touch()
        return node


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


# ---- Netlink. "nlctrl" is the family that every kernel has: it tells about the others.


def test_a_family_is_found_and_answers() -> None:
    get_family, name_kind, id_kind = 3, 2, 1
    with Family("nlctrl") as family:
        (reply,) = family.request(get_family, attribute(name_kind, b"nlctrl\0"))
        assert struct.unpack("=H", reply[id_kind]) == (0x10,)
        family.join("notify").close()
        with pytest.raises(KeyError):
            family.join("no such group")


def test_a_family_that_is_not_there_is_enoent() -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        Family("lhblock-none")
    assert caught.value.errno == errno.ENOENT


def test_a_request_the_kernel_refuses_has_its_number() -> None:
    with Family("nlctrl") as family, pytest.raises(OSError, match="not supported") as caught:
        family.request(200, b"")
    assert caught.value.errno == errno.EOPNOTSUPP


def test_attributes_are_padded_and_read_back() -> None:
    data = attribute(1, b"abc") + nested(2, attribute(3, b"d"))
    assert len(data) % 4 == 0
    found = dict(parse_attributes(data))
    assert found[1] == b"abc"
    assert parse_attributes(found[2]) == [(3, b"d")]


@pytest.mark.parametrize("data", [b"", b"\0", b"\3\0\1\0", b"\xff\xff\1\0abcd"])
def test_attributes_that_are_cut_off_end_the_list(data: bytes) -> None:
    assert parse_attributes(data) == []
    assert parse_messages(data * 4) == []


def test_an_event_names_its_device() -> None:
    assert kernel.dead_link(bytes(4) + attribute(1, struct.pack("=I", 7))) == 7
    assert kernel.dead_link(bytes(4)) is None


# ---- Which devices there are.


def test_only_devices_with_our_identity_are_ours(fake: FakeHost) -> None:
    fake.add_device(0, "someone else's")
    fake.add_device(1, None)
    ours = fake.add_device(2, "lhblock:/data/volumes/db", sectors=16)
    found = Attached(ours, "nbd", "lhblock:/data/volumes/db", 8192)
    assert attached_devices(fake.host) == [found]


def test_a_foreign_device_is_refused(fake: FakeHost) -> None:
    node = fake.add_device(0, "someone else's")
    with pytest.raises(DeviceForeign, match="nbd0 was not attached by lhblock"):
        detach(fake.host, device=node)


def test_a_device_that_does_not_exist_is_said_to(fake: FakeHost) -> None:
    with pytest.raises(NotAttached, match="does not exist"):
        detach(fake.host, device=fake.root / "dev" / "nbd9")
    with pytest.raises(NotAttached):
        detach(fake.host, identity="lhblock:/data/volumes/db")


def test_a_host_with_nothing_says_what_to_install(fake: FakeHost) -> None:
    with pytest.raises(DeviceUnavailable, match=r"modprobe nbd.*apt install linux-image"):
        choose(fake.host)
    with pytest.raises(DeviceUnavailable):
        attach(fake.host, Target.of_uri(URI), AttachOptions())


def test_a_loaded_module_is_enough(fake: FakeHost) -> None:
    (fake.root / "sys" / "module" / "nbd").mkdir()
    assert choose(fake.host).name == "nbd"


def test_where_a_device_is_mounted(fake: FakeHost) -> None:
    number = Path("/dev/null").stat().st_rdev
    where = f"{os.major(number)}:{os.minor(number)}"
    (fake.root / "mountinfo").write_text(
        f"20 1 0:5 / /dev rw - devtmpfs x rw\n21 1 {where} / /a\\040b rw - ext4 /dev/nbd0 rw\n"
    )
    assert fake.host.mounted_at(Path("/dev/null")) == ("/a b",)


def test_a_keeper_is_whoever_holds_the_lock(fake: FakeHost) -> None:
    identity = volume_identity("/data", "db")
    assert not keeper_runs(fake.host, identity)
    path = lock_path(fake.host, identity)
    path.parent.mkdir()
    with path.open("w") as file:
        assert not keeper_runs(fake.host, identity)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert keeper_runs(fake.host, identity)


def test_attaching_needs_root(fake: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake.root / "sys" / "module" / "nbd").mkdir()
    node = fake.add_device(0, "lhblock:/data/volumes/db")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(DeviceError, match="need root"):
        attach(fake.host, Target.of_uri(URI), AttachOptions())
    with pytest.raises(DeviceError, match="need root"):
        detach(fake.host, device=node)


# ---- What is attached.


def test_the_unix_socket_is_preferred_because_its_path_stays() -> None:
    unix = "nbd+unix:///db?socket=/run/nbd.sock"
    target = Target.of_volume("/data", "db", [URI, unix])
    assert str(target.uri) == unix
    assert target.identity == volume_identity("/data", "db")


def test_a_uri_is_the_same_volume_however_it_is_written() -> None:
    assert uri_identity("nbd://h/db") == uri_identity("nbd://h:10809/db")
    assert uri_identity("nbd://h/db") != uri_identity("nbd://h/db@s1")
    with pytest.raises(UsageError):
        Target.of_uri("http://h/db")


def test_a_data_directory_is_the_same_by_every_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert volume_identity(f"{tmp_path}/link", "db") == volume_identity(str(tmp_path), "db")


def test_the_keeper_is_told_everything() -> None:
    target, options = Target.of_uri(URI), AttachOptions(4, 5, 6, read_only=True)
    assert unpack(pack(target, options)) == (target, options)


def test_an_identity_that_sysfs_cannot_show_is_refused(fake: FakeHost) -> None:
    target = Target.of_uri("nbd://h/" + "x" * 4000)
    with pytest.raises(DeviceError, match="too long"):
        attach(fake.host, target, AttachOptions())


def test_a_keeper_is_small() -> None:
    heavy = {"trio", "grpc", "click", "_cffi_backend", "pydantic", "rich"}
    code = f"import sys, lhblock.device; print(sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- iSCSI, with an iscsiadm that plays the kernel.

UNIT = "iscsi://10.0.0.9:3260/iqn.2019-10.io.longhorn:db/1"
ISCSIADM = """#!/bin/sh
echo "$@" >> {root}/calls
session={root}/sys/class/iscsi_session/session1
case "$*" in
  *--login*)
    [ ! -e {root}/refuse ] || {{ echo "iscsiadm: (24 - authorization)" >&2; exit 24; }}
    mkdir -p $session/device/target2:0:0/2:0:0:1/block/sdq {root}/sys/block/sdq
    echo iqn.2019-10.io.longhorn:db > $session/targetname
    echo 16 > {root}/sys/block/sdq/size
    touch {root}/dev/sdq ;;
  *--logout*) rm -r {root}/sys/class/iscsi_session/session1 ;;
esac
"""


@pytest.fixture
def initiator(fake: FakeHost, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """A host whose kernel has the initiator, and where this is root."""
    programs = fake.root / "bin"
    programs.mkdir()
    (programs / "iscsiadm").write_text(ISCSIADM.format(root=fake.root))
    (programs / "iscsiadm").chmod(0o755)
    (fake.root / "sys" / "module" / "iscsi_tcp").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    fake.host = replace(fake.host, search_path=str(programs))
    return fake


def calls(host: FakeHost) -> str:
    return (host.root / "calls").read_text()


def test_an_iscsi_unit_is_attached_once_and_detached(initiator: FakeHost) -> None:
    target = Target.of_uri(UNIT)
    first = attach(initiator.host, target, AttachOptions(away_s=77))
    assert (first.device.name, first.kind, first.size_bytes) == ("sdq", "iscsi", 8192)
    assert first.made
    assert "replacement_timeout --value 77" in calls(initiator)
    second = attach(initiator.host, target, AttachOptions())
    assert (second.device, second.made) == (first.device, False)
    assert calls(initiator).count("--login") == 1
    assert calls(initiator).splitlines()[-1].endswith("--rescan")
    assert attached_devices(initiator.host) == [second]
    assert detach(initiator.host, device=first.device).device == first.device
    assert attached_devices(initiator.host) == []
    with pytest.raises(NotAttached):
        detach(initiator.host, identity=target.identity)


def test_a_session_of_somebody_else_is_left_alone(initiator: FakeHost) -> None:
    attach(initiator.host, Target.of_uri(UNIT), AttachOptions())
    (note,) = initiator.host.run.glob("iscsi-*.json")
    note.unlink()
    with pytest.raises(DeviceForeign, match="did not make"):
        attach(initiator.host, Target.of_uri(UNIT), AttachOptions())
    with pytest.raises(DeviceForeign):
        detach(initiator.host, device=initiator.root / "dev" / "sdq")
    assert "--logout" not in calls(initiator)


def test_a_refused_login_leaves_nothing(initiator: FakeHost) -> None:
    (initiator.root / "refuse").touch()
    with pytest.raises(DeviceError, match="authorization"):
        attach(initiator.host, Target.of_uri(UNIT), AttachOptions())
    assert list(initiator.host.run.glob("iscsi-*")) == []
    assert calls(initiator).splitlines()[-1].endswith("--op delete")


def test_what_iscsi_needs_is_said(fake: FakeHost) -> None:
    with pytest.raises(DeviceUnavailable, match="apt install open-iscsi"):
        attach(fake.host, Target.of_uri(UNIT), AttachOptions())
    with pytest.raises(DeviceUnavailable, match="not served over iSCSI"):
        attach(fake.host, Target.of_uri(URI), AttachOptions(), "iscsi")


@pytest.mark.parametrize("uri", ["iscsi://h/t", "iscsi://u%s@h/t/1", "iscsi://h:x/t/1"])
def test_addresses_that_are_none(uri: str) -> None:
    with pytest.raises(UsageError, match="iscsi://HOST"):
        Target.of_uri(uri)
