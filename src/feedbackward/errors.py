"""The exceptions of feedbackward. Every message names the place, the cause and the fix.

Example:
    >>> import feedbackward as fb
    >>> issubclass(fb.errors.DataError, fb.FeedbackError)  # one class to catch
    True
"""

__all__ = [
    "AttachError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "FeedbackError",
    "SiteError",
]


class FeedbackError(Exception):
    """Base class: anything feedbackward refuses. The command line turns it into exit code 2.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x = torch.randn(16, 4)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> try:
        ...     learner.feedback_step(x)
        ... except fb.FeedbackError as error:
        ...     print(error)
        DFA has no phase of its own for its feedback: leave out the call of feedback_step.
    """


class AttachError(FeedbackError):
    """The model, the rule and the sites do not fit together.

    Example:
        >>> import feedbackward as fb
        >>> try:
        ...     fb.LowRank(rank=0)
        ... except fb.AttachError as error:
        ...     print(error)
        rank=0: give a whole number of at least 1.
    """


class SiteError(FeedbackError):
    """A site is unknown, or did not behave in a forward pass as it did when it was found.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> try:
        ...     fb.attach(model, fb.DFA(), example=torch.randn(16, 4), sites=["nowhere"])
        ... except fb.SiteError as error:
        ...     print("nowhere" in str(error))
        True
    """


class ConfigError(FeedbackError):
    """A configuration value, rule, data set or model name is unknown or out of range.

    Example:
        >>> import feedbackward as fb
        >>> from feedbackward.experiment.nets import build
        >>> try:
        ...     build("vgg17", (3, 32, 32), classes=10)
        ... except fb.errors.ConfigError as error:
        ...     print(str(error)[:19])
        unknown net 'vgg17'
    """


class DataError(FeedbackError):
    """A data set is missing, truncated or does not match its labels.

    Example:
        >>> import feedbackward as fb
        >>> from feedbackward.experiment.data.sources import find_source
        >>> try:
        ...     find_source("no/such/images", root=None)
        ... except fb.errors.DataError as error:
        ...     print(str(error)[:24])
        There is no image folder
    """


class CheckpointError(FeedbackError):
    """A checkpoint is corrupt, foreign, or belongs to another model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=torch.randn(16, 4))
        >>> kept = fb.Delayed(learner, 2).state_dict()
        >>> try:
        ...     fb.Delayed(learner, 1).load_state_dict(kept)
        ... except fb.errors.CheckpointError as error:
        ...     print(str(error).split(":")[0])
        the waiting gradients belong to another network or staleness
    """


class DivergenceError(FeedbackError):
    """The loss of a training run became NaN or infinite.

    `feedbackward train` raises it and names the first image, weight or activity that is not finite.

    Example:
        >>> import feedbackward as fb
        >>> try:
        ...     raise fb.errors.DivergenceError("the loss is nan in step 3")
        ... except fb.FeedbackError as error:
        ...     print(error)
        the loss is nan in step 3
    """
