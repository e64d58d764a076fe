"""The exceptions of feedbackward. Every message says what, where, why, and the fix."""


class FeedbackError(Exception):
    """Base class: anything feedbackward refuses. The command line turns it into exit code 2."""


class AttachError(FeedbackError):
    """The model, the rule and the sites do not fit together."""


class SiteError(FeedbackError):
    """A site is unknown, or did not behave in a forward pass as it did when it was found."""


class ConfigError(FeedbackError):
    """A configuration value, rule, data set or model name is unknown or out of range."""


class DataError(FeedbackError):
    """A data set is missing, truncated or does not match its labels."""


class CheckpointError(FeedbackError):
    """A checkpoint is corrupt, foreign, or belongs to another model."""


class DivergenceError(FeedbackError):
    """A loss, activity, gradient or feedback matrix became NaN or infinite."""
