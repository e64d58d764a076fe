"""The command line as a user meets it: exit codes, one clear sentence, signals, and output that pipes."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from feedbackward.cli import main
from feedbackward.errors import FeedbackError
from feedbackward.experiment import nets
from feedbackward.experiment.config.options import options
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.training import checkpoint
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.rules import RULES

torch.set_num_threads(1)
TINY = [
    "--model",
    "mlp",
    "--data.train-limit",
    "60",
    "--data.validation",
    "40",
    "--batch-size",
    "20",
    "--no-tensorboard",
]
COMMAND = [sys.executable, "-m", "feedbackward"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def cli(capsys, *arguments):
    """(exit code, stdout, stderr) of a command run in this process."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments):
    """The sentence with which the command line refuses these arguments."""
    code, out, err = cli(capsys, *arguments)
    assert code == 2
    assert err.startswith("feedbackward: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err + out
    return err


def started(*arguments):
    """The command in a process of its own."""
    arguments = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def wait_for_epoch(process, epoch):
    for line in process.stdout:
        if line.startswith(f"epoch {epoch}/"):
            return
    raise AssertionError(process.stderr.read())


def test_help_and_version(capsys):
    code, out, _ = cli(capsys)
    assert code == 0
    assert all(word in out for word in ("train", "compare", "probe", "rules", "--config demo"))
    assert cli(capsys, "--version")[1].startswith("feedbackward ")
    for command in ("train", "compare", "probe", "rules"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "usage: feedbackward" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "compare", "probe", "cost", "rules"])
def test_help_does_not_wait_for_pytorch(command):
    code = f"""
import sys
from feedbackward.cli import main
try:
    main(["{command}", "--help"])
except SystemExit:
    sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: feedbackward {command}" in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


def test_every_flag_of_train_has_a_heading_and_a_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for option in options(TrainConfig):
        assert f"  {option.flag}" in out
        assert option.help
    headings = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    assert (
        headings.index("Model and rule") < headings.index("Training") < headings.index("examples")
    )
    assert sum(heading.startswith("Advanced") for heading in headings) >= 3


def test_train_probe_and_the_files_they_leave(capsys, tmp_path):
    run = tmp_path / "run"
    code, out, err = cli(capsys, "train", *TINY, "--epochs", "2", "--out", run)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["epoch 1/2", "epoch 2/2"]
    assert re.fullmatch(
        r"test accuracy \d+\.\d\d %, on images that no choice was made with", lines[2]
    )
    assert "\x1b" not in out  # no colours or cursor movements where nobody looks
    nets.build("mlp", (1, 28, 28), 10).load_state_dict(load_file(run / "model.safetensors"))
    (environment,) = json.loads((run / "environment.json").read_text())
    assert {
        "feedbackward",
        "git_commit",
        "python",
        "torch",
        "cpu",
        "cores",
        "threads",
        "device",
    } <= environment.keys()
    code, out, _ = cli(capsys, "probe", run, "--images", "30", "--json", tmp_path / "probe.json")
    assert code == 0
    found = json.loads((tmp_path / "probe.json").read_text())
    assert all(site in out for site in found["sites"])
    head = list(found["parameters"].values())[-1]
    assert head["angle"] == pytest.approx(0, abs=1e-2)  # the last layer has its true gradient


def test_compare_writes_its_report_and_is_quick_the_second_time(capsys, tmp_path):
    folder = tmp_path / "c"
    flags = [
        "compare",
        *TINY,
        "--epochs",
        "1",
        "--rules",
        "dkp,bp",
        "--seeds",
        "0",
        "--timing-steps",
        "1",
        "--workers",
        "1",
        "--out",
        folder,
    ]
    code, out, err = cli(capsys, *flags)
    assert (code, err) == (0, "")
    assert "DKP" in out
    assert str(folder / "report.html") in out
    results = json.loads((folder / "results.json").read_text())
    assert [rule["rule"] for rule in results["rules"]] == ["bp", "dkp"]
    before = (folder / "bp-s0" / "result.json").stat().st_mtime_ns
    assert cli(capsys, "compare", "--config", folder / "config.yaml")[0] == 0
    assert (folder / "bp-s0" / "result.json").stat().st_mtime_ns == before
    log = (folder / "compare.log").read_text()
    assert len(re.findall(r"\] (BP|DKP), seed 0: done in", log)) == 2
    assert len(re.findall(r"^\d{4}-\d\d-\d\d .*epoch 1/1: train loss", log, re.MULTILINE)) == 2


@pytest.mark.parametrize("form", ["table", "markdown", "json"])
def test_every_rule_is_in_the_table_of_rules(capsys, form):
    code, out, _ = cli(capsys, "rules", "--format", form)
    assert code == 0
    assert all(rule in out for rule in RULES)
    if form == "json":
        assert json.loads(out)["dkp"]["learned"] is True
    if form == "markdown":
        rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in out.splitlines()]
        column = next(row for row in rows if row[0] == "Rule").index("Transport")
        said = {row[0]: row[column] for row in rows if row[0] in RULES}
        assert [said[name] for name in ("bp", "fa", "usf", "brsf", "frsf")] == [
            "yes",
            "no",
            "signs",
            "signs",
            "signs",
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'"),
        (["train", "--epoch", "3"], "unknown option --epoch: did you mean --epochs"),
        (["train", "--rule", "dpk"], "unknown rule 'dpk': did you mean 'dkp'"),
        (["train", "--model", "vgg61"], "vgg"),
        (["train", "--data", "fashon-mini"], "fashion-mini"),
        (["train", "--data.classes", "11"], "10 classes"),
        (["train", "--recipe", "best"], "unknown recipe 'best'"),
        (["train", "--sites", "[nowhere]"], "nowhere"),
        (["train", "--error-at", "nowhere"], "nowhere"),
        (["train", "--rule-options.centre", "true"], "did you mean 'center'"),
        (["train", "--lr", "-1"], "forward.lr is -1"),
        (["train", "--lr", "fast"], "--forward.lr: "),
        (["train", "--out", "/dev/null/run"], "cannot be written"),
        (["compare", "--config", "dmeo"], "no config file dmeo"),
        (["compare", "--rules", "bp,dpk"], "unknown rule 'dpk'"),
        (["cost", "mlp", "--parallel.pipeline", "2"], "only train and compare divide a run"),
        (["probe"], "required: run"),
        (["probe", "nowhere"], "nowhere is not the folder of a run"),
        (["rules", "--format", "csv"], "csv"),
        (["train", "--data", "cifar10", "--data-root", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_refused_with_one_sentence(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_only_train_is_divided_over_processes(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("compare", "probe", "cost", "rules"):
        message = refused(capsys, command)
        assert f"{command} runs in one" in message
        assert "without torchrun" in message


def test_a_damaged_checkpoint_is_refused(capsys, tmp_path):
    run = tmp_path / "run"
    assert cli(capsys, "train", *TINY, "--epochs", "1", "--out", run)[0] == 0
    data = (run / "checkpoint.safetensors").read_bytes()
    (run / "checkpoint.safetensors").write_bytes(data[: len(data) // 2])
    assert "truncated" in refused(capsys, "probe", run)
    (run / "checkpoint.safetensors").unlink()
    assert "no checkpoint" in refused(capsys, "probe", run)


def test_a_diverged_run_says_where_and_what_to_do(capsys, tmp_path):
    error = refused(
        capsys, "train", *TINY, "--lr", "1e30", "--epochs", "2", "--out", tmp_path / "run"
    )
    assert "the loss is nan" in error or "the loss is inf" in error
    assert "lower --forward.lr (now 1e+30)" in error


def test_a_disk_that_is_full_is_told(capsys, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("feedbackward.experiment.training.checkpoint.os.fsync", full)
    assert "No space left on device" in refused(capsys, "train", *TINY, "--out", tmp_path / "run")


@pytest.mark.single
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_printed_command_goes_on(tmp_path, signum, code):
    run = tmp_path / "run"
    process = started("train", *TINY, "--lr", "1e-3", "--epochs", "2000", "--out", run)
    wait_for_epoch(process, 2)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    again = f"feedbackward train --config {run}/config.yaml --resume"
    assert err == f"feedbackward: stopped; saved to {run}; go on with: {again}\n"
    if signum == signal.SIGINT:
        process = started(*again.split()[1:])
        assert re.match(rf"resumed {run} in epoch \d+, batch \d", process.stdout.readline())
        process.kill()
        process.communicate()


def test_a_second_ctrl_c_stops_at_once(capsys, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(InterruptedRunError):
            interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

    def twice(*arguments):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("feedbackward.experiment.training.run.Run.step", twice)
    code, _, err = cli(capsys, "train", *TINY, "--out", tmp_path / "run")
    assert code == 130
    assert "stopped at once" in err


def test_a_killed_run_keeps_its_last_epoch(capsys, tmp_path):
    run = tmp_path / "run"
    process = started("train", *TINY, "--lr", "1e-3", "--epochs", "2000", "--out", run)
    wait_for_epoch(process, 3)
    process.kill()
    process.communicate()
    assert checkpoint.load(run / "checkpoint.safetensors")["position"]["epoch"] >= 2
    assert "unfinished run: give --resume" in refused(
        capsys, "train", *TINY, "--epochs", "2000", "--out", run
    )


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    command = " ".join([*COMMAND, "rules", "--format", "json", "|", "head", "-1"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_models_and_rules_of_the_working_directory_are_found(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine_for_cli.py").write_text(
        "from torch import nn\n"
        "import feedbackward as fb\n"
        "class Rule(fb.DKP):\n    pass\n"
        "def net(in_shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.ReLU(), nn.Linear(9, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    )
    flags = ["--model", "mine_for_cli:net", "--rule", "mine_for_cli:Rule", "--epochs", "1"]
    code, _, err = cli(capsys, "train", *TINY, *flags)
    assert (code, err) == (0, "")
    assert (
        tmp_path / "runs" / "mine_for_cli-net-fashion-mini-mine_for_cli-rule-s0" / "result.json"
    ).exists()


def test_library_errors_all_have_one_base():
    with pytest.raises(FeedbackError):
        nets.build("nothing", (1, 28, 28), 10)
