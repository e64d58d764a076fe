"""When a rank fails: which one it was, and that all others stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from feedbackward.errors import DivergenceError, FeedbackError

# how long the survivors wait for what the others have to say
_HEARING = 2.0


class LostRankError(FeedbackError):
    """A rank of a pipeline ended, hung, or could not be reached.

    Attributes:
        rank: its number in the pipeline.

    Example:
        >>> import feedbackward as fb
        >>> issubclass(fb.parallel.LostRankError, fb.FeedbackError)
        True
    """

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


class Witnesses:
    """What each rank saw when it lost another, kept in the store through which the ranks met.

    A rank that is lost because it had lost another itself is not the one to name. A rank that stopped at a number that is not
    finite is not lost: all stop at that number.
    """

    def __init__(self, rank: int, ranks: int, name: str) -> None:
        self.rank, self.ranks, self.name = rank, ranks, name
        self.store: dist.Store | None = None
        if ranks > 1:
            store = dist.distributed_c10d._get_default_store()
            self.store = dist.PrefixStore(f"feedbackward/{name}", store)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A step: an error that another rank's end has caused names the rank that ended first."""
        try:
            yield
        except LostRankError as error:
            first = self._first_lost(error.rank)
            reason = self._reason(first)
            if reason:
                raise DivergenceError(reason) from error
            if first == error.rank:
                raise
            raise LostRankError(
                first,
                f"rank {first} of the pipeline ended or hangs, and rank {error.rank} stopped because of it. Look at the "
                f"output of rank {first} first; start all ranks again from the last checkpoint.",
            ) from error
        except DivergenceError as error:
            # what this rank has found out holds for all, and some may only see that it ended
            self._say(f"{self.rank} {error}")
            raise
        except Exception:
            # this rank is the cause
            self._say(str(self.rank))
            raise

    def _say(self, text: str) -> None:
        self._asked(lambda store: store.set(str(self.rank), text))

    def _asked(self, question: Callable[[dist.Store], Any]) -> Any:
        """What the store says; None where it does not answer. Over a link that is cut its calls do not end, so they are made
        in a thread, and no more of them after the first of these."""
        store, said = self.store, list[Any]()
        if store is None:
            return None

        def ask() -> None:
            with suppress(Exception):
                said.append(question(store))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_HEARING)
        if thread.is_alive():
            self.store = None
        return said[0] if said else None

    def _first_lost(self, seen: int) -> int:
        """Follow who lost whom to a rank that says nothing, or that it failed by itself."""
        self._say(str(seen))
        end = time.monotonic() + _HEARING
        told: dict[int, int] = {self.rank: seen}
        while time.monotonic() < end:
            for other in set(range(self.ranks)) - told.keys():
                said = self._said(other)
                if said is not None:
                    told[other] = said
            last = self._follow(seen, told)
            if told.get(last) == last:  # it says so itself
                return last
            time.sleep(0.05)
        return self._follow(seen, told)

    def _said(self, rank: int) -> int | None:
        """The rank that this one has lost; itself, if it failed by itself."""
        text = self._read(rank)
        return None if text is None else int(text.split()[0])

    def _reason(self, rank: int) -> str:
        """The number that is not finite for which a rank stopped, in its words; empty where it was something else."""
        return (self._read(rank) or "").partition(" ")[2]

    def _read(self, rank: int) -> str | None:
        return self._asked(
            lambda store: store.get(str(rank)).decode() if store.check([str(rank)]) else None
        )

    @staticmethod
    def _follow(rank: int, told: dict[int, int]) -> int:
        seen = set[int]()
        while rank in told and told[rank] != rank and rank not in seen:
            seen.add(rank)
            rank = told[rank]
        return rank
