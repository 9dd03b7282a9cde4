"""Which request is it that kills whoever computes it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..scheduler.plan import StepPlan
    from ..scheduler.resident import ResidentSequence, ResidentTable

MAX_LOSSES = 3


def note_loss(plans: Iterable[StepPlan], table: ResidentTable) -> list[ResidentSequence]:
    """The executor was lost while it computed `plans`: note where, and return who is no longer to be computed.

    These are the sequences of which the same positions were under way at `MAX_LOSSES` losses in a row.
    """
    windows: dict[int, tuple[ResidentSequence, int, int]] = {}
    for plan in plans:
        for slot, epoch, start, end in _places(plan):
            row = table.rows[slot]
            if row is not None and table.epoch[slot] == epoch:
                _, first, last = windows.get(id(row.owner), (row.owner, start, end))
                windows[id(row.owner)] = row.owner, min(first, start), max(last, end)
    suspects = []
    for owner, start, end in windows.values():
        first, last = max(start, owner.lost_at[0]), min(end, owner.lost_at[1])
        if first < last:
            owner.losses, owner.lost_at = owner.losses + 1, (first, last)
        else:
            owner.losses, owner.lost_at = 1, (start, end)
        if owner.losses >= MAX_LOSSES:
            suspects.append(owner)
    return suspects


def _places(plan: StepPlan) -> Iterator[tuple[int, int, int, int]]:
    """Slot, epoch, and the positions from where to where."""
    columns = (plan.decode_slots, plan.sample_epochs, plan.decode_positions)
    for slot, epoch, position in zip(*(column.tolist() for column in columns), strict=False):
        yield slot, epoch, position, position + 1
    for chunk in plan.chunks:
        yield chunk.slot, chunk.epoch, chunk.start, chunk.start + len(chunk.tokens)
