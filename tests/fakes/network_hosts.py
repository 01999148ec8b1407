"""Two machines on this one: network namespaces with a cable between them, where the system allows that."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

SYSTEM = f"{os.environ['PATH']}:/usr/sbin:/sbin"
LOGIN = """#!/bin/sh
# Stands for ssh: [-OPTION] ADDRESS COMMAND...
while [ "${{1#-}}" != "$1" ]; do shift; done
case $1 in {first}) name={names[0]};; *) name={names[1]};; esac
shift
exec {ip} netns exec $name unshare --uts sh -c "hostname $name; exec $*"
"""


@dataclass(frozen=True)
class Hosts:
    """Two machines by their ``names`` and ``addresses``; ``login`` is what MPI starts processes with."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    login: Path

    def ip(self, *words: str) -> None:
        subprocess.run([find("ip"), *words], check=True, capture_output=True)

    def on_first(self, *command: str) -> list[str]:
        """``command`` as it is run on the first machine."""
        return [str(self.login), self.addresses[0], *command]

    def processes_of(self, name: str) -> list[psutil.Process]:
        """Those that run on one machine."""
        found = subprocess.run([find("ip"), "netns", "pids", name], check=True, capture_output=True, text=True)
        processes = []
        for pid in found.stdout.split():
            with contextlib.suppress(psutil.Error):
                processes.append(psutil.Process(int(pid)))
        return processes

    def commands_on(self, name: str) -> list[str]:
        """What those of one machine were started with, without the program."""
        commands = []
        for process in self.processes_of(name):
            with contextlib.suppress(psutil.Error):
                commands.append(" ".join(process.cmdline()[1:3]))
        return commands

    def kill(self, name: str) -> None:
        """End every process of one machine at once."""
        processes = self.processes_of(name)
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):  # first none may see that another is gone
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal_number)

    def cut(self) -> None:
        """Pull the cable."""
        self.ip("-n", self.names[1], "link", "set", "cable", "down")


def find(program: str) -> str:
    found = shutil.which(program, path=SYSTEM)
    if found is None:
        pytest.skip(f"two machines need the program {program}, which is not here")
    return found


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Skips the test where this system lets nobody make network namespaces."""
    number = os.getpid() % 200
    names = (f"mgq{os.getpid()}a", f"mgq{os.getpid()}b")
    addresses = (f"10.77.{number}.1", f"10.77.{number}.2")
    login = folder / "login"
    login.write_text(LOGIN.format(first=addresses[0], names=names, ip=find("ip")))
    login.chmod(0o755)
    hosts = Hosts(names, addresses, login)
    try:
        for name in names:
            hosts.ip("netns", "add", name)
        end = ("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        hosts.ip(*end)
        for name, address in zip(names, addresses, strict=True):
            hosts.ip("-n", name, "link", "set", "lo", "up")
            hosts.ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            hosts.ip("-n", name, "link", "set", "cable", "up")
    except subprocess.CalledProcessError as error:
        remove(names)
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    try:
        yield hosts
    finally:
        remove(names)


def remove(names: tuple[str, str]) -> None:
    for name in names:
        subprocess.run([find("ip"), "netns", "del", name], capture_output=True, check=False)
