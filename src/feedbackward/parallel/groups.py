"""The process groups of a pipeline, made from a device mesh or from all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from feedbackward.engine.outside import in_group
from feedbackward.errors import AttachError


@dataclass(frozen=True)
class Groups:
    """`up`, `down`: two groups of the ranks of this pipeline. `data`: those that hold the same
    stage in other pipelines. None where one rank would be alone in it."""

    up: dist.ProcessGroup | None = None
    down: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None

    @property
    def name(self) -> str:
        """A name that the ranks of this pipeline have in common, and no other pipeline has."""
        return "alone" if self.up is None else self.up.group_name

    @property
    def rank(self) -> int:
        return 0 if self.up is None else dist.get_rank(self.up)

    @property
    def size(self) -> int:
        return 1 if self.up is None else dist.get_world_size(self.up)

    @property
    def data_rank(self) -> int:
        return 0 if self.data is None else dist.get_rank(self.data)


def make_groups(mesh: DeviceMesh | None, timeout: float) -> Groups:
    """The groups of this rank; without a mesh, one pipeline of all ranks, or of one process where
    torch.distributed has not begun.

    Raises AttachError where the mesh has other dimensions than "pipeline" and "data".
    """
    if not in_group():
        return Groups()
    wait = timedelta(seconds=timeout)
    if mesh is None:
        ranks = list(range(dist.get_world_size()))
        return Groups(*_pair([ranks], wait))
    names = mesh.mesh_dim_names or ()
    if set(names) - {"pipeline", "data"} or "pipeline" not in names:
        raise AttachError(
            f'the mesh must have the dimensions "pipeline" and, for replicas, "data", got {names}: '
            'init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline")).'
        )
    table = mesh.mesh if names[-1] == "pipeline" else mesh.mesh.T
    rows = table.reshape(-1, table.shape[-1]).tolist()
    up, down = _pair(rows, wait)
    columns = [list(column) for column in zip(*rows, strict=True)]
    return Groups(up, down, _own(columns, wait))


def _pair(
    rows: list[list[int]], wait: timedelta
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    return _own(rows, wait), _own(rows, wait)


def _own(rows: list[list[int]], wait: timedelta) -> dist.ProcessGroup | None:
    """Make a group of each row, in the same order on every rank, and return the one that holds this
    rank; none where it would be alone."""
    if len(rows[0]) < 2:
        return None
    made = [dist.new_group(row, timeout=wait) for row in rows]
    mine = next(i for i, row in enumerate(rows) if dist.get_rank() in row)
    return made[mine]
