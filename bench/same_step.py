"""How much of backprop's signal to a lower recurrent layer comes from the error of the same step.

    python bench/same_step.py runs/char-lm-recurrent --data-root data

For the nets of `char_lm_recurrent.yaml` that backprop has trained (seed 0): the cosine of the whole signal with the part that
passes the upper layer within one step, and with the best linear estimate (ridge regression) from the error of the step, on other
sequences.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from feedbackward.experiment import nets
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.text import load_text


def cut_in_time(layer: nn.RNNBase, h: Tensor) -> Tensor:
    """The layer's outputs, every step detached from the state before."""
    state: Any = None
    outputs = []
    for step in h.split(1, 1):
        output, state = layer(step, state)
        outputs.append(output)
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
    return torch.cat(outputs, 1)


def best_estimate(e: Tensor, signal: Tensor) -> float:
    """The cosine of a ridge regression's estimate, fitted on three quarters of the rows, on the rest."""
    a, b = e.flatten(0, 1).double(), signal.flatten(0, 1).double()
    cut = len(a) * 3 // 4
    gram = a[:cut].T @ a[:cut]
    eye = torch.eye(len(gram), dtype=gram.dtype) * 1e-2 * gram.trace() / len(gram)
    estimate = a[cut:] @ torch.linalg.solve(gram + eye, a[:cut].T @ b[:cut])
    return F.cosine_similarity(estimate.flatten(), b[cut:].flatten(), 0).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--data-root", default="data")
    options = parser.parse_args()
    data = load_text(DataConfig("tiny-shakespeare", options.data_root, context=64, test_limit=32))
    x, y = data.test.inputs, data.test.targets
    for kind in ("gru", "lstm"):
        net: Any = nets.build(kind, (64,), len(data.classes), task="language_model")
        net.load_state_dict(load_file(options.runs / kind / "all" / "bp-s0" / "model.safetensors"))
        h = net.layers[0](net.embed(x))[0].detach().requires_grad_()
        signals = []
        for upper in (net.layers[1](h)[0], cut_in_time(net.layers[1], h)):
            loss = F.cross_entropy(net.head(upper).flatten(0, 1), y.flatten())
            signals.append(torch.autograd.grad(loss, h)[0])
        whole, part = signals
        with torch.no_grad():
            e = net.head(net.layers[1](h)[0]).softmax(-1) - F.one_hot(y, len(data.classes))
        same = F.cosine_similarity(whole.flatten(), part.flatten(), 0).item()
        print(f"{kind}: same step {same:.2f}, best linear estimate {best_estimate(e, whole):.2f}")


if __name__ == "__main__":
    main()
