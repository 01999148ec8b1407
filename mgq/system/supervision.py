"""Supervises the ranks of an MPI job: a small process beside each rank, connected to the others by plain TCP.

MPI itself does not say reliably that a rank is gone: a launcher kills everything without a word, or waits for ever. So
what a launcher starts is a supervisor, and that starts the worker that computes. The first rank's supervisor is the
hub: all others are connected to it. A worker that dies is seen at once by its own, a machine that vanishes by its
silence. The hub has the first rank's worker say what happened, in one line, and ends all others.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import psutil  # type: ignore[import-untyped]

from mgq.errors import printable
from mgq.system.mpi_world import JOBS_VARIABLE, World, note_leader
from mgq.system.parent_death import end_with_parent

WORKER_VARIABLE = "MGQ_WORKER"
"""The descriptor over which a worker and its supervisor talk: where it is set, this process is a worker."""
BEAT_S = 1.0
SILENCE_S = 10.0
"""After so long without a sign another rank is taken to be lost; on a machine with too much to do after twice that."""
LONGEST_STEP_S = 1.0
"""What a step of a supervisor takes at most: where it took longer, this process did not run."""
PATIENCE_S = 8.0
"""What is to end has so long until it is ended."""
WAITING = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
"""States of a process that has something to do, and as yet no core, or no memory, to do it with."""
LAUNCHER_NAMES = ("mpiexec", "mpirun", "prterun", "orterun")
_TICK_S = 0.2
_CONNECT_S = 3.0
_SAME_SIGNAL_S = 1.0
_SAME_MOMENT_S = 1.0
_CONSEQUENCE_S = 3.0
"""What ended a worker that gave no reason itself may be heard from another rank so long after."""
_LONGEST = 1 << 20

RESUME = "`--resume` goes on from the state last saved"


class Link:
    """A socket over which JSON objects go, one a line. It is ``closed`` once the other side is gone.

    ``process``: the number of the other side's process, where it has told it.
    """

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.closed = False
        self.heard = time.monotonic()
        self.forgiven = 0.0  # of the silence since then, seconds in which this process could not hear
        self.process: int | None = None
        self._rest = b""

    def fileno(self) -> int:
        return self.end.fileno()

    def send(self, **message: Any) -> None:
        try:
            self.end.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True

    def read(self) -> list[dict[str, Any]]:
        """What has come; call it when there is something to read."""
        try:
            data = self.end.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self.closed = True
        self.heard, self.forgiven = time.monotonic(), 0.0
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:
            self.closed = True
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:  # somebody else's
            self.closed = True
            return []
        return [message for message in found if isinstance(message, dict)]

    @property
    def is_lost(self) -> bool:
        """Whether the other side has been silent for too long. It has twice the time where the machine, not the other
        side, may be why: it was this process that did not run, or the other one waits for a core."""
        silence = time.monotonic() - self.heard
        if silence <= SILENCE_S + min(self.forgiven, SILENCE_S):
            return False
        return silence > 2 * SILENCE_S or not self.waits_for_core()

    def waits_for_core(self) -> bool:
        """Whether the other side's process is on this machine, and would run if it could."""
        with contextlib.suppress(OSError, psutil.Error, TypeError, ValueError, LookupError):
            if self.process is not None and self.end.getpeername()[0] == self.end.getsockname()[0]:
                return bool(psutil.Process(self.process).status() in WAITING)
        return False


def link_to_supervisor() -> Link | None:
    """The link of a worker to its supervisor, which can be taken once; None elsewhere."""
    descriptor = os.environ.pop(WORKER_VARIABLE, "")
    if not descriptor:
        return None
    end_with_parent()
    return Link(socket.socket(fileno=int(descriptor)))


def supervise(world: World, words: Sequence[str]) -> int:
    """Run ``mgq words`` as one rank of ``world``, and watch over it and the others; the exit code of all.

    A launcher that loses a machine kills what it has started on the others at once. So the hub is a child of that, and
    can still say which rank is gone. Not with `--jobs`, which says itself that its launcher has failed.
    """
    if world.rank or JOBS_VARIABLE in os.environ:
        return _Supervisor(world, words).run()
    guard, console = os.getpid(), launchers_console()
    child = os.fork()
    if child:
        return stand_for(child)
    os.setsid()
    code = 1
    try:
        code = _Supervisor(world, words, guard, console).run()
    finally:
        sys.stderr.flush()
        os._exit(code)


def stand_for(child: int) -> int:
    """Pass on what the launcher sends to the supervisor ``child``; its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        say(f"rank 0, its supervisor,{end_of(code)}")
    return code if code >= 0 else 1


@dataclass
class _Verdict:
    """Why all are to end: the exit code, and the line that says so (None where it was said)."""

    code: int
    line: str | None = None
    since: float = field(default_factory=time.monotonic)

    @property
    def is_old(self) -> bool:
        return time.monotonic() - self.since > PATIENCE_S


class _Supervisor:
    def __init__(
        self, world: World, words: Sequence[str], guard: int | None = None, console: TextIO | None = None
    ) -> None:
        self.world = world
        self.guard = guard  # the process that the launcher has started, above this one
        self.console = console  # the launcher's, to be used once that is gone
        self.is_hub = world.rank == 0
        self.hosts: list[str] = []
        self.hub: Link | None = None
        self.peers: dict[int, Link] = {}
        self.strangers: list[Link] = []
        self.verdict: _Verdict | None = None
        self.told: str | None = None  # what the worker itself said of its failure
        self.code: int | None = None  # of the worker, once it has ended
        self.ended = 0.0  # when it was seen to
        self.has_spoken = False  # the worker has said why it ends with another code than 0
        self.is_cut = False  # a machine is gone without a word
        self.is_said = False  # the line of the verdict stands on the launcher's console
        self.beaten = self.signalled = 0.0
        self.listened = time.monotonic()
        self.stopped: float | None = None  # since when the worker is
        self.progress: dict[str, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.forward)
        self.listener = self.token = None
        ours, theirs = socket.socketpair()
        self.worker = Link(ours)
        if self.is_hub:
            note_leader()
            self.listener = socket.create_server(("", 0), backlog=1024)
            self.token = secrets.token_hex(16)
            self.worker.send(hub=[own_addresses(), self.listener.getsockname()[1], self.token])
        theirs.set_inheritable(True)
        # Descriptors stay open, as the launcher talks to the worker by one of them.
        self.child = subprocess.Popen(
            [sys.executable, "-m", "mgq", *words],
            env={**os.environ, WORKER_VARIABLE: str(theirs.fileno())},
            close_fds=False,
            start_new_session=True,
        )
        theirs.close()

    def forward(self, number: int, _: FrameType | None) -> None:
        """A signal is the first rank's. One key press may come from the terminal and from the launcher, too."""
        now = time.monotonic()
        if self.is_hub and now - self.signalled > _SAME_SIGNAL_S:
            self.signalled = now
            self.child.send_signal(number)

    # ---- the loop ----

    def run(self) -> int:
        try:
            while (code := self.step()) is None:
                pass
            return code
        finally:
            self.child.kill()
            self.child.wait()

    def step(self) -> int | None:
        """Wait a moment for what comes, and take it; the exit code once all is over."""
        self.listen()
        self.beat()
        if self.code is None:
            self.look_for_end()
        if self.code is None and self.stopped is not None and time.monotonic() - self.stopped > SILENCE_S:
            self.end_stopped()
        return self.step_hub() if self.is_hub else self.step_member()

    def look_for_end(self) -> None:
        self.code = self.child.poll()
        if self.code is not None:
            self.ended = time.monotonic()
            self.listen()  # to its last words

    @property
    def is_consequence(self) -> bool:
        """Whether the worker may have ended because another rank did: an MPI that sees that first ends its process,
        without a word of mgq. Who that other one was will be heard in a moment."""
        mute = self.code is not None and self.code > 0 and not self.has_spoken
        return mute and time.monotonic() - self.ended < _CONSEQUENCE_S

    def listen(self) -> None:
        self.forgive_own_pause()
        for link in self.readable():
            if isinstance(link, socket.socket):
                self.strangers.append(Link(link.accept()[0]))
                continue
            for message in link.read():
                self.take(link, message)

    def forgive_own_pause(self) -> None:
        """Leave out of others' silence the time in which this process itself did not run: it could hear nobody.

        So it is on a machine with far too much to do, and where all was stopped for a while.
        """
        now = time.monotonic()
        pause = now - self.listened - LONGEST_STEP_S
        self.listened = now
        if pause <= 0:
            return
        for link in (self.hub, *self.peers.values()):
            if link is not None:
                link.forgiven += pause
        if self.stopped is not None:
            self.stopped += pause

    def has_lost(self, link: Link) -> bool:
        """Whether ``link`` is too long silent. In a step that took long what came meanwhile is to be heard first."""
        return time.monotonic() - self.listened <= LONGEST_STEP_S and link.is_lost

    def readable(self) -> list[Any]:
        with selectors.DefaultSelector() as selector:
            links = [self.worker, self.hub, *self.peers.values(), *self.strangers]
            for link in links:
                if link is not None and not link.closed:
                    selector.register(link, selectors.EVENT_READ)
            if self.listener is not None:
                selector.register(self.listener, selectors.EVENT_READ)
            return [key.fileobj for key, _ in selector.select(_TICK_S)]

    def beat(self) -> None:
        now = time.monotonic()
        if now - self.beaten < BEAT_S:
            return
        self.beaten = now
        if not is_stopped(self.child.pid):
            self.stopped = None
        elif self.stopped is None:
            self.stopped = now
        if self.hub is not None:
            self.hub.send(progress=self.progress.get(str(self.world.rank)))
        for link in self.peers.values():
            link.send(process=os.getpid())
        if self.is_hub and self.progress:
            self.worker.send(ranks=self.progress)

    def take(self, link: Link, message: dict[str, Any]) -> None:
        if link in self.strangers:
            self.admit(link, message)
        elif link is self.worker:
            self.take_of_worker(message)
        elif link is self.hub:
            link.process = message.get("process", link.process)
            if "end" in message:
                self.verdict = _Verdict(int(message["end"]))
        else:
            rank = next(rank for rank, peer in self.peers.items() if peer is link)
            if message.get("progress"):
                self.progress[str(rank)] = message["progress"]
            if "done" in message:
                del self.peers[rank]
            if "failed" in message:
                self.judge(int(message["code"]), message["failed"])

    def admit(self, link: Link, message: dict[str, Any]) -> None:
        self.strangers.remove(link)
        rank = message.get("rank")
        if message.get("token") == self.token and isinstance(rank, int) and 0 < rank < self.world.size:
            self.peers[rank] = link
            link.process = message.get("process")
        else:
            link.end.close()

    def take_of_worker(self, message: dict[str, Any]) -> None:
        if "hosts" in message:
            self.hosts = message["hosts"]
        if "join" in message:
            self.connect(*message["join"])
        if "progress" in message:
            self.progress[str(self.world.rank)] = message["progress"]
        self.has_spoken |= "spoken" in message
        if "failed" in message:
            self.told = str(message["failed"])
            named = self.told if message["named"] else f"{self.name_of(self.world.rank)}: {self.told}"
            self.report(named, int(message["code"]))

    def connect(self, addresses: list[str], port: int, token: str) -> None:
        for address in addresses:
            with contextlib.suppress(OSError):
                self.hub = Link(socket.create_connection((address, port), _CONNECT_S))
                self.hub.send(token=token, rank=self.world.rank, process=os.getpid())
                return
        where = f"{self.name_of(0)}, port {port} of {', '.join(addresses)}"
        self.report(f"{self.name_of(self.world.rank)} cannot reach {where}", 1)

    def end_stopped(self) -> None:
        """The worker was stopped from outside, and all others wait for it: one that hangs is lost to them."""
        self.stopped = None
        self.told = f"{self.name_of(self.world.rank)} was stopped for {SILENCE_S:.0f} s (SIGSTOP); {RESUME}"
        self.report(self.told, 1)
        self.child.kill()

    # ---- how it ends ----

    def name_of(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}" if rank < len(self.hosts) else f"rank {rank}"

    def report(self, line: str, code: int) -> None:
        """Another rank than the first tells the hub what became of it; without a hub it says so itself."""
        if self.hub is not None and not self.hub.closed:
            self.hub.send(failed=line, code=code)
        else:
            self.judge(code, line)

    def judge(self, code: int, line: str) -> None:
        """All are to end: the first reason counts."""
        if self.verdict is None:
            self.verdict = _Verdict(code, line)
            if self.is_hub:
                self.worker.send(end=line, code=code, said=self.is_said)

    def judge_lost(self, line: str) -> None:
        """The same where a machine is gone. The launcher may fail of that before it passes on what the worker says, or
        just after: so it is said here, past the launcher, where that can be, and the worker is silent."""
        if self.console is not None:
            say(line, self.console)
            self.is_said = True
        self.judge(1, line)

    def step_hub(self) -> int | None:
        if self.guard is not None and os.getppid() != self.guard:
            return self.end_without_launcher()
        if self.verdict is None and self.code is None:
            self.look_for_lost()
        if self.code is None:
            if self.verdict is None or not self.verdict.is_old:
                return None
            self.child.kill()  # it hangs: then this says it
            self.child.wait()
            self.code = -signal.SIGKILL
        if self.verdict is None and self.is_consequence:
            self.look_for_lost()
            return None
        is_mute = self.code != 0 and not self.has_spoken
        if self.verdict is None and is_mute:
            self.verdict = _Verdict(1, f"{self.name_of(0)}{end_of(self.code)}")
        if is_mute and self.verdict is not None and self.verdict.line is not None and not self.is_said:
            say(self.verdict.line)
        code = self.code if self.verdict is None else self.verdict.code
        self.end_others(code)
        if self.is_cut:
            end_launcher()
        return code

    def end_without_launcher(self) -> int:
        """The launcher has ended what it started: say why where it would have said it."""
        if self.code is None:
            self.look_for_end()
        worker_has_said = self.code == 0 or self.has_spoken
        self.child.kill()
        until = time.monotonic() + _SAME_MOMENT_S
        while self.verdict is None and time.monotonic() < until:
            self.listen()
            self.look_for_lost()
        if not self.is_said and not worker_has_said:
            reason = None if self.verdict is None else self.verdict.line
            say(reason or f"{self.name_of(0)} was ended by the launcher; {RESUME}", self.console)
        self.end_others(1)
        return 1

    def look_for_lost(self) -> None:
        for rank, link in self.peers.items():
            if link.closed:
                return self.judge_lost(f"{self.name_of(rank)} was ended, its supervisor with it; {RESUME}")
            if self.has_lost(link):
                self.is_cut = True
                return self.judge_lost(f"{self.name_of(rank)} gave no sign for {SILENCE_S:.0f} s; {RESUME}")
        return None

    def end_others(self, code: int) -> None:
        """Have all others end, and give them the time to."""
        for link in self.peers.values():
            link.send(end=code)
        until = time.monotonic() + PATIENCE_S / 2
        while time.monotonic() < until and any(not link.closed for link in self.peers.values()):
            for link in self.readable():
                if isinstance(link, Link):
                    for message in link.read():
                        if "done" in message:
                            link.closed = True

    def step_member(self) -> int | None:
        if self.verdict is not None and self.code != 0:
            if self.verdict.code == 0 and self.code is None and not self.verdict.is_old:
                return None  # the first rank is done already; a worker that is killed now would seem to have failed
            if self.verdict.line is not None:
                say(self.verdict.line)
            return self.verdict.code
        if self.code == 0:
            if self.hub is not None:
                self.hub.send(done=True)
            return 0
        if self.hub is not None and (self.hub.closed or self.has_lost(self.hub)):
            if self.speaks_without_hub():
                cause = "was ended" if self.hub.closed else f"gave no sign for {SILENCE_S:.0f} s"
                say(f"{self.name_of(0)} {cause}; {RESUME}")
            return 1
        if self.code is not None and self.told is None and not self.is_consequence:
            self.told = f"{self.name_of(self.world.rank)}{end_of(self.code)}"
            self.report(self.told, 1)
        return None

    def speaks_without_hub(self) -> bool:
        """Whether this is the first rank that is left: one is enough to tell of it."""
        assert self.hub is not None
        left = [r for r in range(1, self.world.size) if self.hub.closed or self.hosts[r] != self.hosts[0]]
        return self.world.rank == min(left, default=1)


def end_of(code: int) -> str:
    """How a worker ended: goes after its name."""
    return f" was killed by {signal.Signals(-code).name}; {RESUME}" if code < 0 else f" ended with code {code}"


def is_stopped(process: int) -> bool:
    """Whether ``process`` was stopped by a signal, and does nothing until another has it go on."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(process).status() == psutil.STATUS_STOPPED)
    return False


def end_launcher() -> None:
    """Ask the launcher above this process to end: it would wait for ever for a machine that is gone."""
    with contextlib.suppress(psutil.Error):
        launcher = find_running_launcher()
        if launcher is not None:
            for ask in (launcher.terminate, launcher.terminate, launcher.kill):  # it takes the first as one to pass on
                ask()
                time.sleep(_TICK_S)


def find_running_launcher() -> psutil.Process | None:
    """The launcher above this process, where it is on this machine."""
    with contextlib.suppress(psutil.Error):
        return next((p for p in psutil.Process().parents() if p.name().startswith(LAUNCHER_NAMES)), None)
    return None


def launchers_console() -> TextIO | None:
    """The file to which the launcher writes its errors; None where it cannot be found."""
    launcher = find_running_launcher()
    if launcher is None:
        return None
    try:
        end = os.open(f"/proc/{launcher.pid}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
        if stat.S_ISREG(os.fstat(end).st_mode) and not appends(launcher.pid):
            os.close(end)
            return None
    except OSError:  # another system, or a socket
        return None
    return os.fdopen(end, "w")


def appends(process: int) -> bool:
    """Whether ``process`` writes its errors behind all that is in a file: else it writes over what others add."""
    lines = Path(f"/proc/{process}/fdinfo/2").read_text(encoding="ascii").splitlines()
    flags = next((line.split()[1] for line in lines if line.startswith("flags:")), "0")
    return bool(int(flags, 8) & os.O_APPEND)


def say(line: str, to: TextIO | None = None) -> None:
    """The one line of an error, where no worker is left to say it."""
    to = to or sys.stderr
    with contextlib.suppress(OSError, ValueError):
        to.write(f"error: {printable(line)}\n")
        to.flush()


def own_addresses() -> list[str]:
    """The addresses at which other machines, and processes of this one, may reach this machine."""
    found = [a.address for links in psutil.net_if_addrs().values() for a in links if a.family == socket.AF_INET]
    return sorted(found, key=lambda address: address.startswith("127."))
