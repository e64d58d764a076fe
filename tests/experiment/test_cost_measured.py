"""`feedbackward cost --measure`: what is counted, that every configuration is timed once per round, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.cli import main
from feedbackward.errors import AttachError, ConfigError
from feedbackward.experiment.benchmark.steps import Bench, Case, TrainingStep, summary
from feedbackward.experiment.benchmark.subject import parse_cost
from feedbackward.experiment.training.checkpointed import add_checkpoints, groupings
from feedbackward.experiment.training.interrupts import InterruptedRunError
from feedbackward.experiment.training.measure import WARM_UP, activation_bytes, rounds
from feedbackward.experiment.training.progress import Progress

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")])  # fmt: skip
TINY = ["small_cnn", "--size", "8", "--batch", "4", "--threads", "1"]
N, WIDTH = 4, 8
UNIT = N * WIDTH * 4  # bytes of one hidden layer's activities


def deep(hidden: int) -> nn.Sequential:
    """`hidden` layers of WIDTH ReLU units, 6 inputs, 2 outputs."""
    layers: list[nn.Module] = []
    for size in [6, *[WIDTH] * (hidden - 1)]:
        layers += [nn.Linear(size, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 2))


def activations(rule: fb.Rule, hidden: int, schedule: Any = "joint", device: str = "cpu") -> int:
    """Activation memory of a whole training step."""
    x, y = torch.randn(N, 6, device=device), torch.tensor([0, 1, 0, 1], device=device)
    learner = fb.attach(deep(hidden).to(device), rule, example=x)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        learner.backward(x, lambda out: F.cross_entropy(out, y), schedule=schedule)
        optimizer.step()

    made = TrainingStep(step, learner, optimizer, (x, y))
    for _ in range(2):
        step()
    found = made.activation_bytes(torch.device(device))
    assert found is not None
    return found


class TestMemory:
    @pytest.mark.parametrize("hidden", [1, 3, 6])
    def test_backprop_by_hand(self, hidden: int) -> None:
        """Most is alive when the top ReLU's backward has run: the output of every ReLU, the gradient above and below the top
        one, the loss and its own gradient, numbers of 4 bytes."""
        assert activations(fb.BP(), hidden) == (hidden + 2) * UNIT + 8

    @pytest.mark.parametrize("hidden", [1, 3, 6])
    def test_direct_feedback_by_hand(self, hidden: int) -> None:
        """As for backprop, but the signals of all sites are there at once."""
        assert activations(fb.DFA(), hidden) == (2 * hidden + 1) * UNIT + 8

    def test_replay_holds_one_segment_whatever_the_depth(self) -> None:
        few, many = activations(fb.DFA(), 3, "replay"), activations(fb.DFA(), 12, "replay")
        assert few == many < activations(fb.BP(), 12)

    def test_gradients_and_what_is_held_do_not_count(self) -> None:
        weight = nn.Parameter(torch.zeros(1000))
        held = torch.ones(1000)

        def step() -> None:
            (
                weight * held
            ).sum().backward()  # a product, its sum, and the gradients of both, of 4000 and 4 bytes
            held.add_(1)

        weight.grad = None
        assert activation_bytes(step, [weight, held], [weight], CPU) == 4000 + 4

    def test_temporaries_count(self) -> None:
        def step() -> None:
            (torch.zeros(500) + 1).sum()

        assert activation_bytes(step, [], [], CPU) == 2 * 500 * 4

    @pytest.mark.parametrize("device", [GPU])
    def test_cuda_by_hand(self, device: str) -> None:
        """The allocator gives blocks of 512 bytes, and kernels may have scratch memory: at least the tensors' blocks."""
        assert activations(fb.BP(), 6, device=device) >= (6 + 2) * 512

    def test_checkpoints_keep_less_and_give_the_same_gradients(self) -> None:
        x = torch.randn(64, 6)
        model, other = deep(16), deep(16)
        other.load_state_dict(model.state_dict())
        assert groupings(other) == [1, 2, 4, 8, 16]
        assert add_checkpoints(other, 4) == 5  # 16 hidden layers and the last one
        peaks = []
        for net in (model, other):
            held = [x, *net.parameters()]
            peaks.append(activation_bytes(lambda net=net: net(x).sum().backward(), held, list(net.parameters()), CPU))  # fmt: skip
        assert peaks[1] < peaks[0]
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]

    def test_a_net_without_parts_cannot_be_checkpointed(self) -> None:
        with pytest.raises(AttachError, match="Linear holds no block"):
            add_checkpoints(nn.Linear(2, 2))


def rows_have_macs(document: dict[str, Any]) -> bool:
    """Every rule's counted multiply-adds, relative to backprop's, whose own are 1."""
    found = {row["rule"]: row["macs_ratio"] for row in document["models"][0]["rows"]}
    checkpointed = found.pop("bp, checkpointed")
    return (
        checkpointed is None and found["bp"] == 1 and all(0 < macs < 2 for macs in found.values())
    )


def counting(calls: list[str], name: str) -> Case:
    holder = nn.Linear(1, 1)

    def build() -> TrainingStep:
        optimizer = torch.optim.SGD(holder.parameters(), lr=0.1)
        return TrainingStep(lambda: calls.append(name), holder, optimizer, ())

    return Case(name, "joint", "-", build)


def refusing() -> TrainingStep:
    raise AttachError("a reason,\n with its fix.")


def silent() -> Progress:
    return Progress(Console(file=open(os.devnull, "w"), force_terminal=False))


class TestRounds:
    def test_every_configuration_once_per_round_in_rotating_order(self) -> None:
        calls: list[str] = []
        bench = Bench([counting(calls, name) for name in "abc"], CPU, silent())
        ticks = iter(range(1000))
        bench.measure(3, clock=lambda: float(next(ticks)))
        memory = 3 * (WARM_UP + 1)
        assert "".join(calls[:memory]) == "".join(name * (WARM_UP + 1) for name in "abc")
        warm = memory + 3 * WARM_UP
        assert "".join(calls[warm:]) == "abc" + "bca" + "cab"
        assert [row.milliseconds for row in bench.rows] == [[1000.0] * 3] * 3

    def test_ratios_are_taken_within_a_round(self) -> None:
        """A machine that is ten times slower in the second round does not change them."""
        bench = Bench([counting([], name) for name in "ab"], CPU, silent())
        bench.rows[0].milliseconds, bench.rows[1].milliseconds = [2.0, 20.0, 4.0], [3.0, 30.0, 2.0]
        first, second = summary(bench.rows, batch=10)
        assert first["time_ratio"] == {"median": 1, "min": 1, "max": 1}
        assert second["time_ratio"] == {"median": 1.5, "min": 0.5, "max": 1.5}
        assert second["ms"] == {"median": 3, "min": 2, "max": 30}
        assert first["images_per_second"] == 2500  # 10 images in 4 ms
        assert second["rounds"] == 3

    def test_a_refused_configuration_is_told_and_left_out(self) -> None:
        calls: list[str] = []
        cases = [counting(calls, "a"), Case("x", "replay", "-", refusing), counting(calls, "b")]
        bench = Bench(cases, CPU, silent())
        bench.measure(2)
        assert [row.refused for row in bench.rows] == [None, "a reason, with its fix.", None]
        assert [len(row.milliseconds) for row in bench.rows] == [2, 0, 2]
        assert summary(bench.rows, 1)[1]["ms"] is None

    def test_a_stop_leaves_whole_rounds(self) -> None:
        left = (
            2 * (WARM_UP + 1) + 2 * WARM_UP + 3
        )  # checks until the second step of the second round

        def check() -> None:
            nonlocal left
            if left == 0:
                raise InterruptedRunError(signal.SIGINT)
            left -= 1

        bench = Bench([counting([], name) for name in "ab"], CPU, silent(), check)
        with pytest.raises(InterruptedRunError):
            bench.measure(5)
        assert [len(row.milliseconds) for row in bench.rows] == [1, 1]

    def test_nothing_is_measured_twice_under_one_name(self) -> None:
        with pytest.raises(ConfigError, match="two configurations are called 'a, joint'"):
            Bench([counting([], "a"), counting([], "a")], CPU, silent())

    def test_rounds_of_one(self) -> None:
        assert [len(spent) for spent in rounds([lambda: None], 4, CPU)] == [1] * 4


class TestCommand:
    def test_table_json_and_plot(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        files = tmp_path / "made" / "bench.json", tmp_path / "bench.png"
        command = [
            "cost",
            "--measure",
            *TINY,
            "--rules",
            "[bp,dfa,{rule: dkp, options: {center: true}},kp]",
        ]
        command += ["--schedules", "[joint,replay]", "--rounds", "2"]
        assert main([*command, "--json", str(files[0]), "--plot", str(files[1])]) == 0
        out = capsys.readouterr().out
        found = json.loads(files[0].read_text())
        told = "cpu cores threads memory_bytes device platform python torch numpy feedbackward"
        assert {*told.split()} <= found["environment"].keys()
        assert found["command"]
        assert rows_have_macs(found)
        assert found["date"]
        assert found["interrupted"] is False
        assert found["settings"]["batch"] == 4
        (model,) = found["models"]
        rows = {(row["rule"], row["schedule"]): row for row in model["rows"]}
        assert list(rows)[:2] == [("bp", "joint"), ("bp, checkpointed", "joint")]
        asked = {
            (rule, s) for rule in ("dfa", "dkp center=True", "kp") for s in ("joint", "replay")
        }
        assert set(rows) == {*list(rows)[:2], *asked}
        refused = rows.pop(("kp", "replay"))
        assert "is a chain" in refused["refused"]
        assert f"kp, replay: refused: {refused['refused']}" in out
        for row in rows.values():
            assert (row["rounds"], len(row["all_ms"])) == (2, 2)
            assert row["images_per_second"] > 0
            assert row["activation_bytes"] > 0
            assert re.search(rf"(?m)^ {re.escape(row['rule'])} +{row['schedule']}", out)
        assert rows["dfa", "joint"]["feedback_bytes"] > 0 == rows["bp", "joint"]["feedback_bytes"]
        assert "parts of" in rows["bp, checkpointed", "joint"]["note"]
        assert files[1].read_bytes().startswith(b"\x89PNG")
        assert "round 2/2, 0:00 left" in out
        assert "\x1b" not in out

    def test_operators_of_rules_that_have_a_choice(self) -> None:
        from feedbackward.experiment.benchmark.cases import make_cases

        config = parse_cost(
            ["mlp", "--rules", "dfa,frozen", "--operators", "[dense,{name: dense, scale: 2}]"]
        )
        labels = [case.label for case in make_cases(config, "mlp", CPU)[2:]]
        assert labels == ["dfa, joint, dense", "dfa, joint, dense scale=2", "frozen, joint"]

    @pytest.mark.single
    @pytest.mark.parametrize(
        "options",
        [
            ["--rules", "drtp,dgl", "--schedules", "eager"],
            ["--precision", "bf16", "--channels-last"],
            ["--rules", "dfa", "--schedules", "replay,replay-keep"],
            ["--rules", "dsp,usf"],
        ],
        ids=["eager", "bf16", "replay", "late and chained"],
    )
    def test_other_ways_to_step(
        self, options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        file = tmp_path / "bench.json"
        assert (
            main(["cost", "--measure", *TINY, "--rounds", "1", "--json", str(file), *options]) == 0
        )
        rows = json.loads(file.read_text())["models"][0]["rows"]
        assert len(rows) == 4
        assert all(row["rounds"] == 1 for row in rows)

    def test_replay_is_not_compiled(self) -> None:
        from feedbackward.experiment.benchmark.cases import make_cases

        config = parse_cost(
            ["small_cnn", "--size", "8", "--compile", "--schedules", "replay", "--rules", "dfa"]
        )
        with pytest.raises(AttachError, match="leave out --compile"):
            make_cases(config, "small_cnn", CPU)[2].build()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nomodel"], "unknown net 'nomodel'"),
            (["mlp", "mlp"], "models must name at least one, and none twice"),
            (["mlp", "--rules", "dfx"], "unknown rule 'dfx': did you mean"),
            (
                ["mlp", "--rules", "[{rule: dfa, options: {oops: 1}}]"],
                "the rule 'dfa' has no option 'oops'",
            ),
            (
                ["mlp", "--operators", "dens"],
                "unknown feedback operator 'dens': did you mean 'dense'",
            ),
            (["mlp", "--schedules", "later"], "--schedules: expected one of joint, replay"),
            (["mlp", "--rounds", "0"], "rounds is 0: it must be at least 1"),
            (["mlp", "--batch", "0"], "batch is 0: it must be at least 1"),
            (["mlp", "--rules", "dfa,dfa"], "two configurations are called 'dfa, joint, dense'"),
            (["mlp", "--plot", "x.txt"], "plot is 'x.txt': it must end with .png"),
            (["mlp", "--oops", "1"], "unknown option --oops"),
            (["alexnet", "--size", "8"], "needs images of at least 15 x 15 px"),
        ],
    )
    def test_bad_input(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["cost", "--measure", *arguments]) == 2
        out, err = capsys.readouterr()
        assert message in err
        assert err.startswith("feedbackward: error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err + out

    @pytest.mark.nightly
    def test_ctrl_c_prints_what_was_measured(self, tmp_path: Path) -> None:
        file = tmp_path / "bench.json"
        command = [
            sys.executable,
            "-m",
            "feedbackward",
            "cost",
            "--measure",
            *TINY,
            "--rules",
            "dfa",
            "--rounds",
            "100000",
        ]
        with subprocess.Popen(
            [*command, "--json", str(file)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("round 2/"):
                    break
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert re.search(r"(?m)^ dfa +joint +dense", rest)
        found = json.loads(file.read_text())
        assert found["interrupted"] is True
        assert all(row["rounds"] >= 2 for row in found["models"][0]["rows"])

    def test_documented_commands_parse(self) -> None:
        pages = [ROOT / "README.md", ROOT / "bench" / "README.md", *(ROOT / "docs").glob("*.md")]
        text = "\n".join(page.read_text() for page in pages)
        commands = re.findall(r"^feedbackward cost ((?:[^\n`|#\\]|\\\n)*)", text, flags=re.M)
        assert commands
        for command in commands:
            parse_cost(shlex.split(command.replace("\\\n", " ")))


class TestPeers:
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(ROOT / "bench" / "peers.py"),
            "--model",
            "small_cnn",
            "--size",
            "8",
        ]
        command += ["--batch", "4", "--rounds", "1", "--threads", "1", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    @pytest.mark.nightly
    def test_without_them_ours_are_timed(self, tmp_path: Path) -> None:
        done = self.run("--json", str(tmp_path / "peers.json"))
        assert (done.returncode, done.stderr) == (0, "")
        for name in ("BioTorch", "dkp-gist"):
            assert f"{name} is not on the import path: git clone" in done.stdout
        (model,) = json.loads((tmp_path / "peers.json").read_text())["models"]
        assert [row["rule"] for row in model["rows"]] == [
            "bp",
            "bp, checkpointed",
            "dfa",
            "fa",
            "dkp",
        ]

    @pytest.mark.nightly
    def test_a_folder_that_does_not_hold_them(self, tmp_path: Path) -> None:
        done = self.run("--dkp-gist", str(tmp_path))
        assert done.returncode == 2
        assert "gradfunctions.py is not there: git clone" in done.stderr
        assert "Traceback" not in done.stderr
