"""tgtd: that of a serving process, one on a plain file, and what a test suite says of them."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.live.serving import TIMEOUT_S, Serve, requires

TGTD = "/usr/sbin/tgtd"
TGTADM = "/usr/sbin/tgtadm"
POLL_S = 0.02


def unit_uri(served: Serve, volume: str = "db", user: str = "") -> str:
    """Where initiators find a volume; `user` is ``NAME%SECRET@``."""
    for each in served.ready["volumes"]:
        if each["name"] == volume:
            uri: str = next(uri for uri in each["uris"] if uri.startswith("iscsi:"))
            return uri.replace("iscsi://", f"iscsi://{user}")
    raise AssertionError(f"{volume} is not served")


def tgtd_pid(served: Serve) -> int:
    """The tgtd of a serving process; waits until it has one."""
    tasks = Path(f"/proc/{served.process.pid}/task")
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        for thread in list(tasks.iterdir()):
            for pid in (thread / "children").read_text().split():
                if Path(f"/proc/{pid}/comm").read_text().strip() == "tgtd":
                    return int(pid)
        time.sleep(POLL_S)
    raise AssertionError("it has no tgtd")


class PlainTgtd:
    """A tgtd that lhblock has nothing to do with. `module`: a backing store it loads."""

    def __init__(self, directory: Path, module: Path | None = None) -> None:
        self.socket = directory / "ipc"
        self.portal = ""
        self._environment = os.environ | {"TGT_IPC_SOCKET": str(self.socket)}
        self._preload = {"LD_PRELOAD": str(module)} if module else {}

    def adm(self, *arguments: str) -> str:
        done = subprocess.run(
            [TGTADM, "--lld", "iscsi", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        return done.stdout

    @contextmanager
    def running(self) -> Iterator[PlainTgtd]:
        requires(TGTD)
        process = subprocess.Popen(
            [TGTD, "-f", "--iscsi", "portal=127.0.0.1:0"],
            env=self._environment | self._preload,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not self.portal and time.monotonic() < deadline:
                try:
                    shown = self.adm("--op", "show", "--mode", "portal")
                    self.portal = re.findall(r"Portal: ([\d.:]+)", shown)[0]
                except (subprocess.CalledProcessError, IndexError):
                    time.sleep(POLL_S)
            assert self.portal
            yield self
        finally:
            process.kill()
            process.wait()

    def offer(self, file: Path, *how: str) -> str:
        """Make a target of a file, thin as ours, and return its URI. `how`: more for tgtadm."""
        new = ("--op", "new", "--tid", "1")
        self.adm(*new, "--mode", "target", "-T", "iqn.test:plain")
        self.adm(*new, "--mode", "logicalunit", "--lun", "1", "-b", str(file), *how)
        thin = ("--params", "thin_provisioning=1")
        self.adm("--op", "update", "--mode", "logicalunit", "--tid", "1", "--lun", "1", *thin)
        self.adm("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
        return f"iscsi://{self.portal}/iqn.test:plain/1"


def conformance_failures(directory: Path, uri: str) -> set[str]:
    """Run the destructive tests of libiscsi against a unit; return the names of those that fail."""
    directory.mkdir()
    subprocess.run(
        [requires("iscsi-test-cu"), "--dataloss", "--xml", "--test=ALL", uri],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=2 * TIMEOUT_S,
        check=False,
    )
    text = (directory / "CUnitAutomated-Results.xml").read_text(errors="replace")
    failed, suite = set(), ""
    pattern = r"<SUITE_NAME>\s*(\S+)|<CUNIT_RUN_TEST_FAILURE>.*?<TEST_NAME>\s*(\S+)"
    for match in re.finditer(pattern, text, re.DOTALL):
        if match[1]:
            suite = match[1]
        else:
            failed.add(f"{suite}.{match[2]}")
    assert suite
    return failed
