"""The section `kv_cache`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotation
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from .base import Config, Positive, Ratio
from .choices import Eviction, Granularity, KVEviction, KVGranularity
from .problems import Contradiction

if TYPE_CHECKING:
    from collections.abc import Iterator

_RATIOS = ("hbm_ratio", "ddr_ratio", "nvme_ratio")
_SWITCHED = {  # what takes effect only where the switch is on
    "enable_migration": ("hot_threshold", "cold_timeout_s", "promote_below"),
    "enable_tiering": (
        "ddr_tokens", "nvme_tokens", "nvme_path", *_RATIOS, "enable_migration", "demote_above", "demote_to",
    ),
}  # fmt: skip


class KVCacheConfig(Config):
    """The paged KV pool and its prefix tree. `max_tokens` bounds the pool; `block_size` is in tokens.

    `eviction` says which prefix is given up for room: the least recently used one, the least frequently used one, or
    the one that is cheapest to recompute for what it holds and how often it was used. A prefix that nobody used for
    `ttl_s` seconds is forgotten even if there is room; 0 is never. Neither holds for the prompts that requests with
    `pin` keep cached, together in at most the share `max_pinned_ratio` of the pool.

    `granularity` is the unit in which KV moves between workers (BLOCK and LAYER send a layer as soon as it is computed,
    TOKEN and HEAD all layers at the end of a step) and between tiers.

    With `enable_tiering`, what the pool gives up is kept in main memory (DDR), and what that gives up in files below
    `nvme_path` (NVME), which outlive the process. `max_tokens` is the pool's size, HBM; the other sizes are either
    `ddr_tokens` and `nvme_tokens`, or `hbm_ratio`, `ddr_ratio` and `nvme_ratio`, the tiers' shares of all, which add
    up to 1. Without DDR, what goes to files is buffered in main memory, at most 256 blocks. KV is brought
    up only where that is estimated to be faster than to compute it.

    DDR whose blocks are more than the share `demote_above` in no file has them written, the coldest first, until the
    share is `demote_to`. With `enable_migration` the pool's blocks go to DDR by the same marks, before they are given
    up, and while less than `promote_below` of the pool is used hot prefixes come up: those that prompts asked for
    `hot_threshold` times a second. After `cold_timeout_s` seconds without, a block is cold.
    """

    max_tokens: Positive = 65536
    block_size: Positive = 16
    granularity: Granularity = KVGranularity.BLOCK
    enable_tiering: bool = False
    hbm_ratio: Ratio = 1.0
    ddr_ratio: Ratio = 0.0
    nvme_ratio: Ratio = 0.0
    ddr_tokens: Positive | None = None
    nvme_tokens: Positive | None = None
    nvme_path: Path | None = None
    enable_prefix_caching: bool = True
    enable_cross_request_sharing: bool = True
    eviction: Eviction = KVEviction.LRU
    ttl_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_pinned_ratio: Ratio = 0.5
    enable_migration: bool = False
    demote_above: Ratio = 0.9
    demote_to: Ratio = 0.8
    promote_below: Ratio = 0.5
    hot_threshold: Annotated[float, Field(gt=0)] = 1.0
    cold_timeout_s: Annotated[float, Field(gt=0)] = 60.0

    def contradictions(self) -> Iterator[Contradiction]:
        if self.max_tokens < self.block_size:
            text = f"max_tokens {self.max_tokens} is less than one block: write at least block_size, {self.block_size}"
            yield Contradiction(text, ("max_tokens", "block_size"))
        if not self.caches_prefixes:
            off = "enable_cross_request_sharing" if self.enable_prefix_caching else "enable_prefix_caching"
            for name in self.changed("ttl_s", "eviction", "max_pinned_ratio", "enable_tiering"):
                text = f"{name} is for cached prefixes, but {off} is false: leave one of them out"
                yield Contradiction(text, (name, off))
        for switch, names in _SWITCHED.items():
            for name in self.changed(*names) if not getattr(self, switch) else ():
                text = f"{name} is for {switch}: true: write that, or leave {name} out"
                yield Contradiction(text, (name, switch))
        if self.enable_tiering:
            yield from self._contradictions_of_sizes()
            if self.ttl_s:
                text = f"ttl_s {self.ttl_s:g} forgets what enable_tiering keeps: leave one of them out"
                yield Contradiction(text, ("ttl_s", "enable_tiering"))
        if not self.promote_below <= self.demote_to <= self.demote_above:
            found = f"promote_below {self.promote_below}, demote_to {self.demote_to}, demote_above {self.demote_above}"
            marks = self.changed("demote_to", "demote_above", "promote_below")
            yield Contradiction(f"found {found}: write them in ascending order", tuple(marks))

    def _contradictions_of_sizes(self) -> Iterator[Contradiction]:
        """Those of the sizes of tiers, where there are some."""
        sizes, ratios = [*self.changed("ddr_tokens", "nvme_tokens")], [*self.changed(*_RATIOS)]
        if sizes and ratios:
            text = f"found {ratios[0]} and {sizes[0]}: write the sizes as shares or as tokens, not both"
            yield Contradiction(text, (ratios[0], sizes[0]))
            return
        if ratios and (not self.hbm_ratio or abs(self.hbm_ratio + self.ddr_ratio + self.nvme_ratio - 1) > 1e-6):
            found = f"found hbm_ratio {self.hbm_ratio:g}, ddr_ratio {self.ddr_ratio:g}, nvme_ratio {self.nvme_ratio:g}"
            text = f"{found}: write shares that add up to 1, that of the pool, hbm_ratio, above 0"
            yield Contradiction(text, tuple(ratios))
            return
        ddr, nvme = self.tier_tokens
        if not ddr and not nvme:
            text = "enable_tiering: say how large the tiers are, ddr_tokens: 262144 for example"
            yield Contradiction(text, ("enable_tiering",))
        for tier, tokens in (("ddr", ddr), ("nvme", nvme)):
            if 0 < tokens < self.block_size:
                size = f"{tier}_ratio" if ratios else f"{tier}_tokens"
                text = f"{size}: {tokens} tokens are less than one block: write at least block_size, {self.block_size}"
                yield Contradiction(text, (size, "block_size"))
        if bool(nvme) != (self.nvme_path is not None):
            size = "nvme_ratio" if ratios else "nvme_tokens"
            found, lacking = (size, "nvme_path") if nvme else ("nvme_path", "nvme_tokens")
            text = f"{found} goes together with {lacking}, which is not given: give both, or neither"
            yield Contradiction(text, (found,))
        if self.enable_migration and not ddr:
            text = "enable_migration moves blocks between the pool and DDR: give ddr_tokens, or leave it out"
            yield Contradiction(text, ("enable_migration",))

    @property
    def caches_prefixes(self) -> bool:
        """Whether what one request has computed is kept for others."""
        return self.enable_prefix_caching and self.enable_cross_request_sharing

    @property
    def watermarks(self) -> tuple[float, float, float]:
        """Shares at which blocks begin to move down, stop to, and stop to move up."""
        return self.demote_above, self.demote_to, self.promote_below

    @property
    def tier_tokens(self) -> tuple[int, int]:
        """How many tokens DDR and NVME hold; 0 is no such tier."""
        if not self.enable_tiering:
            return 0, 0
        if self.ddr_tokens or self.nvme_tokens:
            return self.ddr_tokens or 0, self.nvme_tokens or 0
        whole = self.max_tokens / self.hbm_ratio
        return round(whole * self.ddr_ratio), round(whole * self.nvme_ratio)
