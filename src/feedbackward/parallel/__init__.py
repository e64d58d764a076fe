"""Several processes that train one learner: the segments are divided over the ranks of a pipeline,
and with direct feedback all ranks run their backward at the same time."""

from feedbackward.parallel.faults import LostRankError
from feedbackward.parallel.pipeline import Loss, Pipeline, pipeline

__all__ = ["Loss", "LostRankError", "Pipeline", "pipeline"]
