"""Several hosts on one machine: network namespaces with addresses of their own, joined by links of a given speed.

python bench/hosts.py             # a pipeline over three hosts, and one whose link is cut in training
python bench/hosts.py --hosts 2

Needs root, `ip` and, for a speed, `tc`. Its last line says what was seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TIMEOUT = 8.0
STEPS = 40
# nothing here may take longer
LONGEST = 150.0


_MADE = itertools.count()


class Hosts:
    """Namespaces that a bridge joins, each with one interface, `eth0`."""

    def __init__(self, count: int, mbit: float | None = None) -> None:
        # a namespace may go a little later than it is deleted
        self.key = f"fb{os.getpid() % 10000}{chr(97 + next(_MADE))}"
        self.names = [f"{self.key}h{i}" for i in range(count)]
        self.count, self.mbit = count, mbit

    def __enter__(self) -> Hosts:
        try:
            self._ip("link", "add", self.key, "type", "bridge")
            self._ip("link", "set", self.key, "up")
            for number, name in enumerate(self.names):
                self._join(number, name)
        except BaseException:
            self.close()
            raise
        return self

    def _join(self, number: int, name: str) -> None:
        self._ip("netns", "add", name)
        outside = f"{name}v"
        self._ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._ip("link", "set", outside, "master", self.key, "up")
        self._ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self._ip("-n", name, "link", "set", device, "up")
        if self.mbit:
            # both ways, and never more than a tenth of a second of them in the queue at once
            shape = [
                "root",
                "tbf",
                "rate",
                f"{self.mbit:g}mbit",
                "burst",
                "256kb",
                "latency",
                "400ms",
            ]
            _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", *shape)

    def address(self, number: int) -> str:
        return f"10.17.0.{number + 1}"

    def inside(self, number: int) -> list[str]:
        """What a command begins with that runs on a host."""
        return ["ip", "netns", "exec", self.names[number]]

    def cut(self, number: int) -> None:
        """Pull the cable of a host."""
        self._ip("link", "set", f"{self.names[number]}v", "down")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self.key], capture_output=True, check=False)

    def __exit__(self, *error: object) -> None:
        self.close()

    @staticmethod
    def _ip(*words: str) -> None:
        _run("ip", *words)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=20)


def why_not() -> str:
    """Why this machine makes no such hosts; empty where it does."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "there is no `ip` and `tc`"
    try:
        with Hosts(1, mbit=100):
            return ""
    except (subprocess.SubprocessError, OSError) as error:
        told = getattr(error, "stderr", b"") or str(error).encode()
        return " ".join(told.decode().split()) or type(error).__name__


def bytes_sent() -> int:
    """On a host: what its interface has sent."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


@contextmanager
def processes(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that run side by side, and that none outlives."""
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, own in zip(commands, environments, strict=True)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def train(rank: int, folder: Path) -> None:
    """On a host: steps of a small pipeline, until another host is lost or all are done."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    import feedbackward as fb

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.ReLU())]
    x, y = torch.randn(64, 32), torch.arange(64) % 3
    learner = fb.attach(nn.Sequential(*layers, nn.Linear(32, 3)), fb.DKP(), example=x)
    with fb.parallel.start(timeout=60):
        pipe = fb.parallel.pipeline(learner, x, timeout=TIMEOUT)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.05)
        found: dict[str, object] = {"steps": 0, "lost": None, "text": ""}
        try:
            for step in range(STEPS):
                began = time.monotonic()
                loss = pipe.backward(x, F.cross_entropy, y)
                optimizer.step()
                optimizer.zero_grad()
                found |= {"steps": step + 1, "loss": loss.item()}
                (folder / f"{rank}.step").write_text(str(step))
                time.sleep(0.01)
        except fb.parallel.LostRankError as error:
            seconds = time.monotonic() - began
            found |= {"lost": error.rank, "text": str(error), "seconds": seconds}
        (folder / f"{rank}.json").write_text(json.dumps(found))


def run(count: int, cut: int | None) -> list[dict[str, object]]:
    """What each host saw; `cut`: the host whose link is cut after some steps."""
    with Hosts(count) as hosts, tempfile.TemporaryDirectory() as folder:
        commands = [
            [*hosts.inside(i), sys.executable, __file__, "--folder", folder] for i in range(count)
        ]
        common = {"MASTER_ADDR": hosts.address(0), "MASTER_PORT": "29517", "WORLD_SIZE": str(count)}
        common |= {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        environments = [{**common, "RANK": str(i)} for i in range(count)]
        end = time.monotonic() + LONGEST
        with processes(commands, environments) as running:
            first = Path(folder) / "0.step"
            while cut is not None and time.monotonic() < end:
                if first.exists() and int(first.read_text() or 0) >= 10:
                    hosts.cut(cut)
                    break
                time.sleep(0.05)
            told = [
                process.communicate(timeout=max(1.0, end - time.monotonic()))[0]
                for process in running
            ]
        files = [Path(folder) / f"{i}.json" for i in range(count)]
        for file, text in zip(files, told, strict=True):
            if not file.exists():
                raise RuntimeError(f"a host has failed: {text[-2000:]}")
        return [json.loads(file.read_text()) for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        train(int(os.environ["RANK"]), options.folder)
        return
    why = why_not()
    if why:
        print(f"not run: this machine makes no network namespaces ({why})")
        return
    whole = run(options.hosts, cut=None)
    print("undisturbed:", json.dumps(whole))
    last = options.hosts - 1
    found = run(options.hosts, cut=last)
    print("cut:", json.dumps(found))
    slowest = max(float(str(host.get("seconds", LONGEST))) for host in found)
    print(
        f"Summary: {options.hosts} hosts trained {[h['steps'] for h in whole]} steps; with the link of host {last} cut, all "
        f"ended within {slowest:.1f} s (timeout {TIMEOUT:g} s), and lost {[h['lost'] for h in found]}."
    )


if __name__ == "__main__":
    main()
