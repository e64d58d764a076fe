"""When a rank fails: which one it was, and that all others stop."""

from __future__ import annotations

from feedbackward.errors import FeedbackError


class LostRankError(FeedbackError):
    """A rank of a pipeline ended, hung, or could not be reached. `rank`: its number in the
    pipeline."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


def lost(peer: int, message: str, error: Exception) -> LostRankError:
    """The error of a wait for a rank."""
    late = "imed out" in str(error) or "imeout" in str(error)
    how = "did not answer within the timeout" if late else "closed its connection"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return LostRankError(
        peer,
        f"rank {peer} of the pipeline {how} ({message}): it ended, hangs, or its host cannot be reached. Look at its own "
        f"output first; start all ranks again from the last checkpoint. [{first}]",
    )
