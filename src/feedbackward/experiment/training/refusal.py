"""Whether a net, its sites and the schedule take a rule at all, before a comparison begins."""

from __future__ import annotations

from feedbackward.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    FeedbackError,
)
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.training.building import find_device, shared_data
from feedbackward.experiment.training.run import Run


def refusal(config: TrainConfig) -> str | None:
    """Why this run is refused, found by its first step and, where it is to be probed, a probe; None where it is not.

    Raises ConfigError, DataError, CheckpointError: what is wrong is not the rule's fit.
    """
    if config.parallel.pipeline:
        from feedbackward.experiment.training.piped import check_parallel

        check_parallel(config, config.parallel.processes)
    try:
        run = Run(config, shared_data(config.data, config.task), find_device(config.device))
        run.step(*next(run.loader.epoch(0)))
        if config.probe_every:
            run.probe()
    except (ConfigError, DataError, CheckpointError):
        raise
    except DivergenceError:  # is a result, and found again
        return None
    except FeedbackError as error:
        return str(error)
    return None
