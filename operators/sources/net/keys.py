"""Bearer keys: who may send requests, for which tenant, and how many. A key itself is never shown anywhere."""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field, ValidationError

from ....config import Config
from ....config.wording import did_you_mean
from ....errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_HEX = r"^[0-9a-fA-F]{64}$"
_SECRETS = ("key", "key_sha256", "key_env")


class KeysConfig(Config):
    """`keys` is a YAML file of bearer keys, relative to the current directory; without it nobody is asked for one."""

    keys: Annotated[str, Field(min_length=1)] | None = None


class KeyEntry(Config):
    """One entry of the file: exactly one of `key`, `key_sha256` (64 hex digits), `key_env` (a variable's name).

    Requests count as they are taken, tokens (of prompt and output) when their request has ended, so that what one
    takes beyond `tokens_per_minute` is a debt that later ones wait for. A minute's worth may come at once.
    """

    key: Annotated[str, Field(min_length=1)] | None = Field(default=None, repr=False)
    key_sha256: Annotated[str, Field(pattern=_HEX)] | None = Field(default=None, repr=False)
    key_env: Annotated[str, Field(min_length=1)] | None = None
    name: Annotated[str, Field(min_length=1)]
    tenant: str | None = None  # None: the name
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_in_flight: Annotated[int, Field(gt=0)] | None = None


class TokenBucket:
    """So much per minute, as much at once; may go into debt. `clock` gives monotonic seconds."""

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._rate = per_minute / 60
        self._capacity = self._level = max(1.0, per_minute)
        self._clock = clock
        self._filled_at = clock()

    def take(self, amount: float) -> None:
        self._fill()
        self._level -= amount

    def time_until(self, amount: float) -> float:
        """Seconds until so much is there; 0 if it is."""
        self._fill()
        return max(0.0, (amount - self._level) / self._rate)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled_at) * self._rate)
        self._filled_at = now


class Key:
    """Who a bearer key belongs to, and what is left of its limits."""

    def __init__(self, entry: KeyEntry, clock: Callable[[], float]) -> None:
        self.name = entry.name
        self.tenant = entry.name if entry.tenant is None else entry.tenant
        self._max_in_flight = entry.max_in_flight
        self._in_flight = 0
        self._requests = TokenBucket(entry.requests_per_minute, clock) if entry.requests_per_minute else None
        self._tokens = TokenBucket(entry.tokens_per_minute, clock) if entry.tokens_per_minute else None
        self._limits = entry

    def find_limit(self) -> tuple[str, float] | None:
        """The limit that another request would pass, in words, and for how many seconds; None: it may come."""
        if self._max_in_flight is not None and self._in_flight >= self._max_in_flight:
            return f"the key has {self._in_flight} requests in flight, and may have no more", 1.0
        if self._requests is not None and (wait := self._requests.time_until(1)) > 0:
            return f"the key may send {self._limits.requests_per_minute:g} requests per minute", wait
        if self._tokens is not None and (wait := self._tokens.time_until(0)) > 0:
            return f"the key may use {self._limits.tokens_per_minute:g} tokens per minute", wait
        return None

    def begin(self) -> None:
        """A request of this key was taken."""
        self._in_flight += 1
        if self._requests is not None:
            self._requests.take(1)

    def end(self, tokens: int) -> None:
        """A request of this key has ended, and has used so many tokens."""
        self._in_flight -= 1
        if self._tokens is not None:
            self._tokens.take(tokens)


class KeyRing:
    """The keys of one file; none where no file is configured."""

    def __init__(self, keys: list[tuple[bytes, Key]] | None = None) -> None:
        self._keys = keys

    @classmethod
    def load(cls, config: KeysConfig, base_dir: Path, clock: Callable[[], float]) -> KeyRing:
        """Read the file that the configuration names.

        Raises:
            ConfigError: it cannot be read, an entry is wrong, or two have the same key or name. It shows no key.
        """
        if config.keys is None:
            return cls()
        where = config.keys
        try:
            data = yaml.safe_load((base_dir / where).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"{where}: cannot be read: {reason}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"
            raise ConfigError(f"{where}{place}: is not YAML") from None  # its words would show what stands there
        if not isinstance(data, list) or not data:
            raise ConfigError(f"{where}: write a list of keys, as `- {{name: alice, key_env: ALICE_KEY}}`")
        keys: list[tuple[bytes, Key]] = []
        names: set[str] = set()
        for number, item in enumerate(data, 1):
            entry = _read_entry(item, f"{where}: key {number}")
            digest = _digest_of(entry, f"{where}: key {number}")
            if any(hmac.compare_digest(digest, known) for known, _ in keys):
                raise ConfigError(
                    f"{where}: key {number} ({entry.name}) stands there twice: give each a key of its own"
                )
            if entry.name in names:
                raise ConfigError(f"{where}: key {number}: the name {entry.name!r} is taken: write another one")
            names.add(entry.name)
            keys.append((digest, Key(entry, clock)))
        return cls(keys)

    @property
    def is_required(self) -> bool:
        """Whether requests need a key."""
        return self._keys is not None

    def authenticate(self, bearer: str) -> Key | None:
        """Whose key this is; None if it is nobody's. Takes as long whichever it is."""
        digest = hashlib.sha256(bearer.encode("utf-8", "surrogatepass")).digest()
        found = None
        for known, key in self._keys or ():
            if hmac.compare_digest(digest, known):
                found = key
        return found


def bearer_of(authorization: str) -> str | None:
    """The key in `Bearer <key>`, as an Authorization header has it; None for anything else."""
    scheme, _, key = authorization.strip().partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _read_entry(item: Any, where: str) -> KeyEntry:
    if not isinstance(item, dict):
        raise ConfigError(f"{where}: write a mapping, as `{{name: alice, key_env: ALICE_KEY}}`")
    try:
        entry = KeyEntry.model_validate(item)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        detail = next((each for each in details if each["type"] == "extra_forbidden"), details[0])
        field = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            hint = did_you_mean(field, KeyEntry.model_fields)
            raise ConfigError(f"{where}: there is no field {field!r}{hint}") from None
        raise ConfigError(f"{where}: field {field!r}: {detail['msg']}") from None
    given = [name for name in _SECRETS if getattr(entry, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ConfigError(f"{where} ({entry.name}): found {found} of {', '.join(_SECRETS)}: write exactly one")
    return entry


def _digest_of(entry: KeyEntry, where: str) -> bytes:
    if entry.key_sha256 is not None:
        return bytes.fromhex(entry.key_sha256)
    key = entry.key
    if entry.key_env is not None:
        key = os.environ.get(entry.key_env)
        if not key:
            raise ConfigError(f"{where} ({entry.name}): the environment has no {entry.key_env}: set it to the key")
    assert key is not None
    return hashlib.sha256(key.encode()).digest()
