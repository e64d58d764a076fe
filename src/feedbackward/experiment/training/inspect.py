"""Looking at a trained run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from feedbackward.experiment.training import checkpoint
from feedbackward.experiment.training.building import find_device, import_from_here, shared_data
from feedbackward.experiment.training.checkpoint import replace_file
from feedbackward.experiment.training.identity import check_same_data
from feedbackward.experiment.training.run import Run
from feedbackward.experiment.training.runfolder import RunFolder
from feedbackward.measure.probe import Probe


def probe_run(
    path: Path,
    images: int | None,
    file: Path | None,
    data: str | None = None,
    root: str | None = None,
) -> None:
    """Print the alignment of a run's last checkpoint with backprop, and write it to ``file``.

    ``data`` and ``root`` say where the run's data lie now, if they have moved.
    """
    folder = RunFolder.existing(path)
    state = checkpoint.load(folder.checkpoint)
    config = folder.config().resolved()
    if images is not None:
        config = replace(config, probe_images=images).resolved()
    place = replace(config.data, name=data or config.data.name, root=root or config.data.root)
    config = replace(config, data=place)
    import_from_here()
    run = Run(config, shared_data(config.data, config.task), find_device(config.device))
    run.load_weights(state, folder.checkpoint)
    check_same_data(state["data"], run.data, folder.checkpoint, "probe another run")
    found = run.probe()
    print(f"{config.rule} on {config.model}, after {state['position']['epoch']} epochs\n{found}")
    print("Compared with backprop's own gradient, whose norm is |BP|. Angles are in degrees.")
    if file:
        _write(file, found)


def _write(file: Path, found: Probe) -> None:
    text = json.dumps(found.as_dict(), indent=1)
    replace_file(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
