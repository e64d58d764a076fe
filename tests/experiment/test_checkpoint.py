"""Checkpoints: exact round trips, atomic writes, and refusal of what is not ours."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from feedbackward.errors import CheckpointError
from feedbackward.experiment.training import checkpoint


def same(a, b):
    """Equal in type, structure, order and bits."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert [type(k) for k in a] == [type(k) for k in b]
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b)
    else:
        assert a == b


def test_every_kind_of_value_survives_exactly(tmp_path):
    shared = torch.randn(2, 3)
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    state = {
        "tensors": [torch.randn(2, 3).to(kind) for kind in kinds],
        "odd": (
            torch.tensor(3),
            torch.zeros(0, 4),
            torch.tensor([True, False]),
            torch.arange(5).byte(),
        ),
        "not contiguous": torch.randn(4, 6).t()[::2],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "shared": {"a": shared, "b": shared, "view": shared[0]},
        "keys": {0: "int", "0": "str", 1.5: "float", (1, "a"): "tuple", None: 0, True: 1},
        "numbers": [
            1,
            1.0,
            0.1,
            1e-320,
            -0.0,
            2**80,
            True,
            False,
            None,
            math.inf,
            -math.inf,
            math.nan,
        ],
        "text": ["", "ünï\n\"'\\", {"dict": 1}, {"tensor": "t"}, {"float": 1}, [], (), {}],
        "rng": torch.get_rng_state(),
    }
    checkpoint.save(tmp_path / "a.safetensors", state)
    same(checkpoint.load(tmp_path / "a.safetensors"), state)


def test_an_adam_state_round_trips(tmp_path):
    def trained():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, betas=(0.9, 0.99))
        layer(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        return optimizer

    optimizer = trained()
    checkpoint.save(tmp_path / "a.safetensors", optimizer.state_dict())
    same(checkpoint.load(tmp_path / "a.safetensors"), optimizer.state_dict())


def test_foreign_values_are_named():
    with pytest.raises(CheckpointError, match=r"state\.a\.1 is a set"):
        checkpoint.save("unused", {"a": [1, {2}]})


def test_missing_foreign_and_newer_files(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of feedbackward"):
        checkpoint.load(path)
    path.write_bytes(b"PK\x03\x04 something else entirely")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        checkpoint.load(path)
    save_file({}, path, {"format": checkpoint.FORMAT, "version": "99", "state": "null"})
    with pytest.raises(CheckpointError, match="format version 99"):
        checkpoint.load(path)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, fraction):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"w": torch.randn(1000)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is truncated"):
        checkpoint.load(path)


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "a.safetensors"
    state = {"w": torch.randn(50), "epoch": 3, "lr": 0.25}
    checkpoint.save(path, state)
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            same(checkpoint.load(path), state)  # bytes without a meaning may pass
        except CheckpointError:
            continue


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"epoch": 1})
    program = f"""
import resource, signal, torch
from feedbackward.experiment.training import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoint.save({str(path)!r}, {{"w": torch.zeros(1_000_000)}})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "CheckpointError: could not write" in done.stderr
    assert "the previous one is untouched" in done.stderr
    assert checkpoint.load(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_unwritable_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="could not write"):
        checkpoint.save(tmp_path / "no such folder" / "a.safetensors", {})


def test_another_model_is_named_by_its_first_difference():
    ours = torch.nn.Linear(3, 2).state_dict()
    checkpoint.check_same_tensors(ours, ours, "c")
    with pytest.raises(
        CheckpointError, match=r"'weight' is \[2, 4\] float32 there and \[2, 3\] float32 here"
    ):
        checkpoint.check_same_tensors(torch.nn.Linear(4, 2).state_dict(), ours, "c")
    with pytest.raises(CheckpointError, match="it has no 'bias'"):
        checkpoint.check_same_tensors(torch.nn.Linear(3, 2, bias=False).state_dict(), ours, "c")
    with pytest.raises(CheckpointError, match="it has 'bias', which this model lacks"):
        checkpoint.check_same_tensors(ours, torch.nn.Linear(3, 2, bias=False).state_dict(), "c")
    with pytest.raises(CheckpointError, match="float64 there"):
        checkpoint.check_same_tensors(torch.nn.Linear(3, 2).double().state_dict(), ours, "c")


def test_no_pickle_is_used():
    source = Path(checkpoint.__file__).read_text()
    assert "import pickle" not in source
    assert "torch.load" not in source
