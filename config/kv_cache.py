"""The section `kv_cache`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotation
from typing import Annotated

from pydantic import Field, model_validator

from .base import Config, Positive, Ratio
from .choices import Eviction, Granularity, KVEviction, KVGranularity


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

    @model_validator(mode="after")
    def _available(self) -> KVCacheConfig:
        if self.ttl_s and not (self.enable_prefix_caching and self.enable_cross_request_sharing):
            raise ValueError(f"ttl_s {self.ttl_s} is for prefixes, but none are cached: leave it out, or cache them")
        if self.max_tokens < self.block_size:
            raise ValueError(f"max_tokens {self.max_tokens} is less than one block of {self.block_size} tokens")
        return self

    @model_validator(mode="after")
    def _tiers(self) -> KVCacheConfig:
        ratios = (self.hbm_ratio, self.ddr_ratio, self.nvme_ratio)
        sizes = {"ddr_tokens": self.ddr_tokens, "nvme_tokens": self.nvme_tokens}
        if not self.enable_tiering:
            given = [name for name, size in sizes.items() if size] + ["nvme_path"] * (self.nvme_path is not None)
            given += ["hbm_ratio, ddr_ratio and nvme_ratio"] * (ratios != (1.0, 0.0, 0.0))
            if given:
                raise ValueError(f"{given[0]} is for enable_tiering: true: write that, or leave it out")
            return self
        if not (self.enable_prefix_caching and self.enable_cross_request_sharing):
            raise ValueError("enable_tiering keeps prefixes, but none are cached: leave it out, or cache them")
        if self.ttl_s:
            raise ValueError(f"ttl_s {self.ttl_s} forgets what enable_tiering keeps: leave one of them out")
        if ratios != (1.0, 0.0, 0.0):
            if any(sizes.values()):
                raise ValueError("found ratios and ddr_tokens or nvme_tokens: write sizes in one of these ways")
            if not self.hbm_ratio or abs(sum(ratios) - 1) > 1e-6:
                raise ValueError(f"hbm_ratio, ddr_ratio, nvme_ratio: found {ratios}, write shares that add up to 1")
        ddr, nvme = self.tier_tokens
        if not ddr and not nvme:
            raise ValueError("enable_tiering: say how large the tiers are, ddr_tokens: 262144 for example")
        for name, tokens in (("ddr", ddr), ("nvme", nvme)):
            if 0 < tokens < self.block_size:
                raise ValueError(f"{name}: {tokens} tokens are less than one block of {self.block_size}")
        if bool(nvme) != (self.nvme_path is not None):
            raise ValueError("nvme_path and nvme_tokens (or nvme_ratio) go together: give both, or neither")
        return self

    @model_validator(mode="after")
    def _migration(self) -> KVCacheConfig:
        for switch, names in (
            ("enable_migration", ("hot_threshold", "cold_timeout_s", "promote_below")),
            ("enable_tiering", ("enable_migration", "demote_above", "demote_to")),
        ):
            for name in names:
                if getattr(self, name) != type(self).model_fields[name].default and not getattr(self, switch):
                    raise ValueError(f"{name} is for {switch}: true: write that, or leave it out")
        if self.enable_migration and not self.tier_tokens[0]:
            raise ValueError("enable_migration moves blocks between the pool and DDR: give ddr_tokens, or leave it out")
        if not self.promote_below <= self.demote_to <= self.demote_above:
            found = f"promote_below {self.promote_below}, demote_to {self.demote_to}, demote_above {self.demote_above}"
            raise ValueError(f"found {found}: write them in ascending order")
        return self

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
