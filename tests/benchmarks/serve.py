"""How long does a client of ``mgq serve`` wait, and is anything lost when it is restarted?

``python -m tests.benchmarks.serve [REQUESTS]`` needs the load generator ``hey`` (Debian's package has it).

The service runs in a process of its own on the loopback interface, with the built-in network. Eight clients send the
same photograph as fast as they are answered. In the last row a second process takes over the listening socket in the
middle, and the first one is told to stop: the socket is inherited by both, clients do not try again.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mgq.service.server import address_of, open_socket

CLIENTS = 8
REQUESTS = 4000
CAT = Path(__file__).parents[2] / "assets" / "cat.jpg"
MGQ = str(Path(sys.executable).with_name("mgq"))
ENGINES = ("native", "openvino", "onnxruntime")


@contextlib.contextmanager
def service(descriptor: int, engine: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [MGQ, "serve", "--fd", str(descriptor), "--engine", engine, *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, pass_fds=[descriptor], env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    if "answers" not in process.stdout.readline():
        raise SystemExit(f"{command} did not start")
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(90):
            raise SystemExit(f"{command} ended with {process.returncode}")


def load(url: str, requests: int, clients: int = CLIENTS) -> str:
    """What ``hey`` says of so many ``requests``."""
    command = ["hey", "-c", str(clients), "-n", str(requests), "-m", "POST", "-D", str(CAT), f"{url}/predict"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def row(name: str, said: str, requests: int) -> str:
    """Requests a second, milliseconds of the median and of one in a hundred, answers of status 200, and what was not
    answered."""
    speed = float(re.findall(r"Requests/sec:\s+([\d.]+)", said)[0])
    half, worst = (float(re.findall(rf"{part}% in ([\d.]+) secs", said)[0]) * 1e3 for part in (50, 99))
    fine = sum(int(number) for number in re.findall(r"\[200\]\s+(\d+) responses", said))
    return f"{name:32s} {speed:8.0f} {half:8.1f} {worst:8.1f} {fine:8d} {requests - fine:8d}"


def main() -> None:
    if shutil.which("hey") is None:
        raise SystemExit("hey is not installed, which makes the load: apt-get install hey")
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else REQUESTS
    requests -= requests % CLIENTS
    listening = open_socket("127.0.0.1", 0)
    listening.listen(1024)
    descriptor, url = listening.fileno(), address_of(listening)
    print(f"{'':32s} {'a second':>8s} {'p50 ms':>8s} {'p99 ms':>8s} {'answered':>8s} {'lost':>8s}")
    for engine in ENGINES:
        for name, clients, words in (
            (f"{engine}, one client", 1, ()),
            (f"{engine}, up to 16 together", CLIENTS, ("--batch", "16")),
            (f"{engine}, one by one", CLIENTS, ("--batch", "1")),
        ):
            with service(descriptor, engine, *words):
                load(url, 80)
                print(row(name, load(url, requests, clients), requests), flush=True)
    said = []
    with service(descriptor, "native") as first:
        load(url, 80)
        asking = threading.Thread(target=lambda: said.append(load(url, 2 * requests)))
        asking.start()
        time.sleep(2)
        with service(descriptor, "native"):
            first.send_signal(signal.SIGTERM)
            asking.join()
    print(row("native, restarted meanwhile", said[0], 2 * requests))


if __name__ == "__main__":
    main()
