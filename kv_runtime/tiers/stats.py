"""What the tiers did, counted since they were made."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class TierCounters:
    """Each is written by one thread at a time. Hits are tokens whose KV was brought up; bytes are by direction."""

    host_hit_tokens: int = 0
    file_hit_tokens: int = 0
    bytes_to_host: int = 0  # saved from the pool
    bytes_to_files: int = 0
    bytes_from_host: int = 0  # brought up into the pool
    bytes_from_files: int = 0
    fetches: int = 0
    fetch_failures: int = 0  # blocks that were there and could not be brought up
    lost_blocks: int = 0  # given up by the tree and kept nowhere
    unexported_blocks: int = 0  # of prompts that were exported: not in files


@dataclass(frozen=True, slots=True)
class TierStats:
    """The counters, and as it is now, in blocks."""

    ddr_hit_tokens: int
    nvme_hit_tokens: int
    bytes_hbm_to_ddr: int
    bytes_ddr_to_nvme: int
    bytes_ddr_to_hbm: int
    bytes_nvme_to_hbm: int
    fetches: int
    fetch_failures: int
    lost_blocks: int
    unexported_blocks: int
    ddr_blocks: int
    ddr_capacity: int
    nvme_blocks: int
    nvme_capacity: int
    fetching_blocks: int

    @classmethod
    def total(cls, parts: list[TierStats]) -> TierStats:
        """The sum over pools, which have their files in common."""
        sums = {field.name: sum(getattr(part, field.name) for part in parts) for field in fields(cls)}
        return cls(**{**sums, "nvme_blocks": parts[0].nvme_blocks, "nvme_capacity": parts[0].nvme_capacity})
