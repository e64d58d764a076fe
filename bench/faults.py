"""Faults: what a training run, a comparison and a grid survive. Prints the table of docs/reliability.md.

    python bench/faults.py                 all groups, some minutes; full disk needs the right to mount a tmpfs
    python bench/faults.py kill term       some of them
    python bench/faults.py kill --phases checkpoint

Every case trains a tiny network on a folder of images in a process of its own, which is forked from this one so that
imports are paid once. After the fault the same command goes on with --resume, and its end is compared with that of a
run without a fault: checkpoint, exported weights, metrics and result, bit by bit, clocks left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fault_tools import (
    AGAIN,
    PHASES,
    After,
    Ended,
    World,
    command,
    config_of,
    end_of,
    ended,
    fault_at,
    mount,
    mounted,
    trained,
)
from PIL import Image

from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts


@dataclass
class Row:
    """A row of the table."""

    done: str
    seen: str
    survived: str
    good: bool = True


RESUMED = "resumed, the end is bit-equal"
UNHURT = "the run ends bit-equal"
KILLED = -int(signal.SIGKILL)


def judged(done: str, seen: str, survived: str, good: bool, otherwise: str = "") -> Row:
    """A row, with what was written instead of the expected where the case went wrong."""
    return Row(done, seen, survived if good else f"**LOST** {otherwise[-400:]}", good)


def send(signum: int) -> Callable[[], None]:
    """For `fault_at`: a signal to the process itself."""
    return lambda: os.kill(os.getpid(), signum)


class Faults:
    """The groups of cases; each method is one and gives rows."""

    def __init__(self, root: Path) -> None:
        self.world = World(root)
        self.out = self.world.out
        done = self.run()
        assert done.code == 0, done.text
        self.whole = end_of(self.out)

    def run(self, fault: Callable[[], None] = lambda: None, fresh: bool = False) -> Ended:
        """The run, from nothing if `fresh`, else from where it is."""
        if fresh:
            self.world.forget()
        return command(self.world, self.world.train(), fault)

    def ends_whole(self, last: Ended, out: Path | None = None) -> bool:
        """Whether a run ended without a traceback, and bit-equal with the one that had no fault."""
        return last.code == 0 and last.clean and end_of(out or self.out) == self.whole

    def resumed(self, what: str, first: Ended, codes: tuple[int, ...]) -> Row:
        """Go on after a fault, and compare the ends."""
        again = self.run()
        known = (".lock", ".writing-")  # an abandoned write into the cache is removed an hour later
        left = [p.name for p in self.world.root.rglob(".*") if not p.name.startswith(known)]
        good = first.code in codes and first.clean and self.ends_whole(again) and not left
        return judged(what, said(first), RESUMED, good, f"{first.text} {again.text} {left}")

    def kill(self) -> Iterator[Row]:
        """kill -9 in each phase."""
        for phase in PHASES:
            first = self.run(fault_at(phase, send(signal.SIGKILL)), fresh=True)
            yield self.resumed(f"`kill -9`: {phase}", first, (KILLED,))

    def term(self) -> Iterator[Row]:
        """SIGTERM in each phase; in the last one the run is over before it looks."""
        for phase in PHASES:
            first = self.run(fault_at(phase, send(signal.SIGTERM)), fresh=True)
            yield self.resumed(
                f"SIGTERM: {phase}", first, (143, 0) if phase == "result" else (143,)
            )

    def report(self) -> Iterator[Row]:
        """kill -9 while the files of a report are written."""
        arguments = self.world.compare("tiny_net:net", "--workers=1")
        for count, after in enumerate(("results.json", "report.md", "report.html"), 1):
            self.world.forget()
            PHASES["report"] = ("feedbackward.experiment.report.report", "replace_whole", count, "after")  # fmt: skip
            first = command(self.world, arguments, fault_at("report", send(signal.SIGKILL)))
            done = {file: file.stat().st_mtime_ns for file in self.out.rglob("result.json")}
            again = command(self.world, arguments)
            names = ("results.json", "report.md", "report.html", "picture.png")
            there = all((self.out / name).is_file() for name in names)
            kept = len(done) == 6 and all(f.stat().st_mtime_ns == t for f, t in done.items())
            good = first.code == KILLED and again.code == 0 and again.clean and there and kept
            what = f"`kill -9`: report, after {after}"
            end = "the same command writes the report; no run is trained again"
            yield judged(what, said(first), end, good, first.text + again.text)

    def disk(self) -> Iterator[Row]:
        """A disk, for run and cache, that fills up in each phase; and one of every size from nothing to enough."""
        for phase in PHASES:
            yield self._filled(phase)
        yield self._filled_at_the_report()
        yield self._disk("false", 32, "")
        yield self._disk("true", 64, ", TensorBoard's file too")

    def _filled(self, phase: str) -> Row:
        place = self.world.root / "disk"
        arguments = self.world.train(out=place / "run")
        with mounted(place, "64m"):
            first = command(self.world, arguments, self._filling(phase, place))
            (place / "filler").unlink()
            again = command(self.world, arguments)
            # what needs no more space than there is ends as it would have
            ended = first.code == 0 or (first.code == 2 and "space" in first.text)
            good = ended and first.clean and self.ends_whole(again, place / "run")
        what = f"the disk is full from here on: {phase}"
        return judged(what, said(first), RESUMED, good, first.text + again.text)

    def _filled_at_the_report(self) -> Row:
        place = self.world.root / "disk"
        PHASES["report"] = ("feedbackward.experiment.report.report", "replace_whole", 1, "before")
        arguments = self.world.compare("tiny_net:net", "--workers=1", f"--out={place / 'run'}")
        with mounted(place, "64m"):
            first = command(self.world, arguments, self._filling("report", place))
            (place / "filler").unlink()
            done = {file: file.stat().st_mtime_ns for file in place.rglob("result.json")}
            again = command(self.world, arguments)
            kept = len(done) == 6 and all(f.stat().st_mtime_ns == t for f, t in done.items())
            there = (place / "run" / "report.html").is_file() and again.code == 0
            good = first.code == 2 and "space" in first.text and first.clean and kept and there
        end = "the same command writes the report; no run is trained again"
        what = "the disk is full from here on: report"
        return judged(what, said(first), end, good, first.text + again.text)

    def _filling(self, phase: str, place: Path) -> Callable[[], None]:
        def fill() -> None:
            with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        def before() -> None:
            os.environ["FEEDBACKWARD_CACHE"] = str(place / "cache")
            fault_at(phase, fill)()

        return before

    def _disk(self, board: str, step: int, more: str) -> Row:
        place = self.world.root / "disk"
        arguments = [*self.world.train(out=place / "run"), f"--tensorboard={board}"]
        tries, bad, seen = 0, "", set()
        for kilobytes in range(8, 4000, step):
            with mounted(place, f"{kilobytes}k"):
                first = command(self.world, arguments)
                if first.code == 0 and self.ends_whole(first, place / "run"):
                    break
                tries += 1
                mount("-o", "remount,size=64m", str(place))
                again = command(self.world, arguments)
                if not (first.code == 2 and first.clean and self.ends_whole(again, place / "run")):
                    bad += f"{kilobytes} KB: {first.text[-300:]} / {again.text[-300:]}; "
                where = re.search(r"could not write \S*?(\w+\.\w+) ", first.text)
                seen.add(where[1] if where else said(first))
        what = f"a full disk, {tries} sizes of a tmpfs from 8 KB to enough{more}"
        names = ", ".join(sorted(seen))
        end = "refused in a sentence; with more space each is resumed, and its end is bit-equal"
        return judged(what, f"exit code 2 at: {names}", end, not bad, bad)

    def readonly(self) -> Iterator[Row]:
        """Folders that cannot be written."""
        place = self.world.root / "disk"
        arguments = self.world.train(out=place / "run")
        with mounted(place, "64m"):
            mount("-o", "remount,ro", str(place))
            first = command(self.world, arguments)
            good = first.code == 2 and first.clean
            yield judged("a read-only folder", said(first), "refused before training", good, first.text)  # fmt: skip
        away = self.out.with_name("away")
        first = self.run(fault_at("step", lambda: self.out.rename(away)), fresh=True)
        away.rename(self.out)
        yield self.resumed(
            "the folder is moved away in a step, and back after the run", first, (2,)
        )
        self.world.forget()
        with mounted(self.world.root / "cache", "16k"):
            first = self.run()
        good = self.ends_whole(first) and "FEEDBACKWARD_CACHE" in first.text
        seen = "a warning that names FEEDBACKWARD_CACHE"
        yield judged("no space for the cache of decoded images", seen, UNHURT, good, first.text)

    def both(self) -> Iterator[Row]:
        """Two runs in one folder."""
        self.world.forget()
        slow = fault_at("first step", lambda: time.sleep(20))
        one = command(self.world, self.world.train(), slow, wait=False)
        while not (self.out / "data.json").exists():
            time.sleep(0.1)
        second = self.run()
        first = ended(*one)
        good = self.ends_whole(first) and second.code == 2 and "another process" in second.text
        what = "a second run in the same folder"
        yield judged(what, said(second), "the first ends bit-equal", good, first.text + second.text)

    def checkpoints(self) -> Iterator[Row]:
        """Checkpoints that are cut off, altered, of another program or of another run."""
        stop = fault_at("step", send(signal.SIGTERM))
        other, file = self.world.root / "other", self.out / "checkpoint.safetensors"
        command(self.world, [*self.world.train(out=other), "--rule=dfa", "--seed=9"], stop)
        torch.save({"model": {}}, other / "pickled.pt")
        cases: dict[str, Callable[[bytes], bytes]] = {
            "a checkpoint cut off in the middle": lambda whole: whole[: len(whole) // 2],
            "an empty checkpoint": lambda whole: b"",
            "a checkpoint with one bit flipped": lambda whole: whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:],
            "a `torch.save` file in its place": lambda whole: (other / "pickled.pt").read_bytes(),
            "the checkpoint of another rule's run": lambda whole: (other / file.name).read_bytes(),
        }  # fmt: skip
        for what, damage in cases.items():
            self.run(stop, fresh=True)
            whole = file.read_bytes()
            file.write_bytes(damage(whole))
            first = self.run()
            file.write_bytes(whole)
            yield self.resumed(what, first, (2,))
        shutil.rmtree(other)

    def inputs(self) -> Iterator[Row]:
        """Data that change, and numbers that are none."""
        picture = self.world.root / "pets" / "train" / "ant" / "3.png"
        whole = picture.read_bytes()

        def alter() -> None:
            Image.new("RGB", (8, 8)).save(picture)

        first = self.run(fault_at("step", alter), fresh=True)
        what, seen = "an image changes during training", "nothing: the images are in memory"
        yield judged(what, seen, UNHURT, self.ends_whole(first), first.text)
        again = self.run()
        good = again.code == 2 and "the train images" in again.text
        end = "refused until the image is back"
        yield judged("... and the run is asked for again", said(again), end, good, again.text)
        picture.write_bytes(whole)
        first = self.run(fault_at("decode", alter), fresh=True)
        picture.write_bytes(whole)
        yield self.resumed("an image changes while the folder is decoded", first, (2,))
        self.world.forget()
        first = command(self.world, [*self.world.train(), "--model=tiny_net:broken"])
        good = first.code == 2 and first.clean and "'6'" in first.text
        end = "refused, with the layer's name; no weight was changed"
        yield judged("a layer gives NaN", said(first), end, good, first.text)

    def clock(self) -> Iterator[Row]:
        """A clock that jumps."""
        for years in (-30, 30):
            real = time.time

            def jump(years: int = years, real: Callable[[], float] = real) -> None:
                time.time = lambda: real() + years * 3.15e7

            first = self.run(fault_at("step", jump), fresh=True)
            what = f"the clock jumps by {years} years in a step"
            yield judged(what, "nothing", UNHURT, self.ends_whole(first), first.text)

    def grid(self) -> Iterator[Row]:
        """A worker of a comparison that has too little memory."""
        cases = {"killed": "is killed by the system (-9)", "starved": "raises MemoryError"}
        for name, what in cases.items():
            self.world.forget()
            arguments = self.world.compare(f"tiny_net:{name}", "--workers=2")
            done = subprocess.run(
                [sys.executable, "-m", "feedbackward", *arguments],
                cwd=self.world.root,
                capture_output=True,
                text=True,
                env=os.environ | {"FEEDBACKWARD_CACHE": str(self.world.root / "cache")},
                check=False,
            )
            finished = len(list(self.out.rglob("result.json")))
            good = done.returncode == 1 and finished == 4 and "failed" in done.stderr
            seen = f"exit code {done.returncode}, {finished} of 6 runs finished"
            end = "the others finish; the failed are named, and tried again by the same command"
            yield judged(f"a worker of a comparison {what}", seen, end, good, done.stdout + done.stderr)  # fmt: skip

    def resumes(self) -> Iterator[Row]:
        """1,008 interruptions of one run: every ninth a `kill -9`, the others in this process, after one step."""
        # a stop lets one step pass, and a kill loses what is not saved, so that the run never ends before the last of them
        config = replace(config_of(self.world), epochs=300, out=str(self.out))
        self.world.forget()
        os.environ["FEEDBACKWARD_CACHE"] = str(self.world.root / "cache")
        sys.path.insert(0, str(self.world.root))
        trained(config, Interrupts())
        whole = end_of(self.out)
        shutil.rmtree(self.out)
        again = ["train", f"--config={self.out}/config.yaml", "--resume"]
        for number in range(1008):
            if number % 9 == 8:
                phase = list(AGAIN)[number // 9 % len(AGAIN)]
                last = command(self.world, again, fault_at(phase, send(signal.SIGKILL)))
                assert last.code == KILLED, f"{phase}: {last.text}"
            else:
                with contextlib.suppress(InterruptedRunError):
                    trained(replace(config, resume=True), After(1))
            assert not (self.out / "result.json").exists(), f"it ended after {number} stops"
        trained(replace(config, resume=True), Interrupts())
        what = "a run of 1,500 steps, stopped and resumed 1,008 times"
        seen = "`kill -9` of the process, 112 times, in steps, checkpoints and metrics; stopped after one step, 896 times"
        yield judged(what, seen, "the end is bit-equal", end_of(self.out) == whole, "another end")


def said(first: Ended) -> str:
    lines = [line for line in first.text.splitlines() if line.startswith("feedbackward:")]
    said = re.sub(r"/\S*/", ".../", lines[-1].removeprefix("feedbackward: ")) if lines else ""
    said = said.split(": ")[1] if said.startswith("error: ") else ""
    trace = "" if first.clean else " WITH A TRACEBACK"
    code = f"killed by signal {-first.code}" if first.code < 0 else f"exit code {first.code}"
    return f"{code}{trace}{': ' if said else ''}{said[:110]}"


GROUPS = [
    "kill",
    "term",
    "report",
    "disk",
    "readonly",
    "both",
    "checkpoints",
    "inputs",
    "clock",
    "grid",
    "resumes",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=GROUPS, choices=[*GROUPS, []])
    parser.add_argument("--phases", help="of kill and term: those with this text in their names")
    options = parser.parse_args()
    for phase in [name for name in PHASES if (options.phases or "") not in name]:
        del PHASES[phase]
    torch.set_num_threads(1)
    bad = 0
    print("| what was done | what the program said | what survived |\n|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        faults = Faults(Path(folder))
        for group in options.groups or GROUPS:
            for row in getattr(faults, group)():
                bad += not row.good
                print(f"| {row.done} | {row.seen} | {' '.join(row.survived.split())} |", flush=True)
    print(f"\ntorch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
