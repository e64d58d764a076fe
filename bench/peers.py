"""Step time and memory of other implementations' mechanisms beside ours and backprop's, interleaved in one process.

    python bench/peers.py --model vgg6 --rounds 11 --dkp-gist DIR --json bench/results/peers.json

Timed where their code can be had, none of which is part of this repository:
- BioTorch (github.com/jsalbert/biotorch) if `import biotorch` works, for example with PYTHONPATH at a checkout: its
  `BioModule` around the same net, modes dfa and fa;
- the DKP authors' hooks (github.com/webstah/dkp-gist): --dkp-gist is a checkout; their modules follow the same sites as ours.
All train the same net on the same batch with the same optimizer (SGD with momentum; the DKP authors use Adam for the feedback),
so that what differs is the mechanism. The DKP authors' copies of activities for printed alignments are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.errors import AttachError, ConfigError
from feedbackward.experiment.benchmark import cost_report
from feedbackward.experiment.benchmark.cases import LEARNING_RATE, Factory, make_cases
from feedbackward.experiment.benchmark.steps import Bench, Case, TrainingStep, summary
from feedbackward.experiment.benchmark.subject import resolved
from feedbackward.experiment.config.cost import CostConfig
from feedbackward.experiment.training.building import find_device
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.progress import Progress

HOW = {
    "BioTorch": "git clone https://github.com/jsalbert/biotorch DIR, then PYTHONPATH=DIR python bench/peers.py",
    "dkp-gist": "git clone https://github.com/webstah/dkp-gist DIR, then python bench/peers.py --dkp-gist DIR",
}


def trained(
    factory: Factory,
    holder: nn.Module,
    forward: Callable[[], Tensor],
    feedback: list[Tensor],
    kept: tuple[Tensor, ...] = (),
) -> TrainingStep:
    """A step as all others take it; `feedback` are the peer's feedback weights."""
    trainable = [p for p in holder.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=LEARNING_RATE, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        factory.loss(forward()).backward()
        optimizer.step()

    size = sum(t.numel() * t.element_size() for t in feedback)
    return TrainingStep(step, holder, optimizer, (factory.x, factory.y), size, kept)


def biotorch_cases(factory: Factory) -> list[Case]:
    """BioTorch's modes on a copy of the net."""
    if importlib.util.find_spec("biotorch") is None:
        return []
    from biotorch.module.biomodule import BioModule

    def build(mode: str) -> TrainingStep:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it converts
            net = BioModule(factory.net(), mode=mode, output_dim=factory.config.classes)
        net = net.to(factory.device).train()
        loss = nn.CrossEntropyLoss()
        inputs = (factory.x, factory.y, loss) if mode == "dfa" else (factory.x,)
        weights = [p for name, p in net.named_parameters() if name.endswith("_backward")]
        return trained(factory, net, lambda: net(*inputs), weights)

    return [
        Case(f"BioTorch {mode}", "joint", "-", lambda mode=mode: build(mode))
        for mode in ("dfa", "fa")
    ]


def gist_cases(factory: Factory, folder: Path | None) -> list[Case]:
    """The DKP authors' hooks behind the sites that ours use."""
    if folder is None:
        return []
    hooks = _load(folder / "utils" / "gradfunctions.py")

    def build(mode: str) -> TrainingStep:
        net = factory.net()
        learner = fb.attach(net, fb.DFA(), example=factory.x[:2])
        sites = [site.name for site in learner.sites]
        learner.detach()
        errors = torch.zeros(factory.config.batch, factory.config.classes, device=factory.device)
        outputs = torch.zeros_like(errors)
        added = nn.ModuleDict()
        for name in sites:
            if name not in dict(net.named_modules()):
                raise AttachError(
                    f"the site {name!r} is no module's output, behind which a hook could be put."
                )
            key = name.replace(".", "/")
            added[key] = hooks.DFATrainingHook(mode)
            net.get_submodule(name).register_forward_hook(
                lambda m, args, out, key=key: added[key](out, errors, outputs)
            )
        last = hooks.OutputTrainingHook()

        def forward() -> Tensor:
            output = last(net(factory.x), errors)
            outputs.copy_(output.detach())
            return output

        with _current_device(
            factory.device
        ):  # feedback is made in the first pass, on the current CUDA device
            forward()
        holder = nn.ModuleDict({"net": net, "hooks": added})
        weights = [hook.backward_weights for hook in added.values()]
        return trained(factory, holder, forward, weights, (errors, outputs))

    return [Case(f"dkp-gist {m}", "joint", "-", lambda m=m: build(m)) for m in ("DFA", "DKP")]


def _load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("dkp_gist_gradfunctions", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"{path} is not there: {HOW['dkp-gist']}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _current_device(device: torch.device) -> Iterator[None]:
    with mock.patch.object(torch.cuda, "current_device", return_value=device):
        yield


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="vgg6", help="of plain layers: a net whose sites are modules' outputs"
    )
    for name, default in {"batch": 64, "size": 32, "classes": 10, "rounds": 11}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--dkp-gist", type=Path, metavar="DIR", help="a checkout of the DKP authors' repository"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(config: CostConfig, folder: Path | None) -> tuple[dict[str, Any], int]:
    """The results, ready for JSON, and the signal that stopped the run, or 0."""
    device, stopped = find_device(config.device), 0
    (model,) = config.models
    factory = Factory(config, model, device)
    peers = {"BioTorch": biotorch_cases(factory), "dkp-gist": gist_cases(factory, folder)}
    for name, cases in peers.items():
        if not cases:
            print(f"{name} is not on the import path: {HOW[name]}")
    ours = make_cases(config, model, device)
    with Interrupts() as interrupts, Progress() as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their code uses deprecated parts of PyTorch
        cases = [*ours, *peers["BioTorch"], *peers["dkp-gist"]]
        bench = Bench(cases, device, progress, interrupts.check)
        try:
            bench.measure(config.rounds)
        except InterruptedRunError as stop:
            stopped = stop.signum
    rows = summary(bench.rows, config.batch)
    cost_report.print_measured(cost_report.describe(config, model), rows, bench.rows, Console())
    print(cost_report.MEASURED)
    measured = [{"model": model, "rows": rows}]
    return cost_report.document(config, measured, device, bool(stopped)), stopped


def main() -> int:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    names = ("batch", "size", "classes", "rounds", "threads", "device")
    chosen = {name: getattr(args, name) for name in names}
    try:
        rules = ["dfa", "fa", "dkp"]
        config = resolved(CostConfig(models=[args.model], rules=rules, measure=True, **chosen))
        results, stopped = measure(config, args.dkp_gist)
    except fb.FeedbackError as error:
        print(f"peers.py: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        cost_report.write_json(args.json, results)
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
