"""Several processes that train one learner: the segments are divided over the ranks of a pipeline,
and with direct feedback all ranks run their backward at the same time.

Example:
    >>> import feedbackward as fb
    >>> stages = [fb.parallel.StageCost(forward=1.0, inputs=0.7, weights=1.2)] * 4
    >>> backprop = fb.parallel.simulate("1f1b", stages, micro_batches=8)
    >>> direct = fb.parallel.simulate("star", stages, micro_batches=8)
    >>> backprop.steady / direct.steady > 1.7
    True
"""

from feedbackward.parallel.faults import LostRankError
from feedbackward.parallel.pipeline import Loss, Pipeline, pipeline
from feedbackward.parallel.simulate import SCHEDULES, Link, Simulated, StageCost, simulate
from feedbackward.parallel.start import start

__all__ = [
    "SCHEDULES",
    "Link",
    "Loss",
    "LostRankError",
    "Pipeline",
    "Simulated",
    "StageCost",
    "pipeline",
    "simulate",
    "start",
]
