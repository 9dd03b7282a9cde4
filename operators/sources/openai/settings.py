"""http_source's configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ....runtime.flow.operator import OperatorConfig
from ..net.intake import IntakeConfig
from ..net.keys import KeysConfig
from ..net.listen import ListenConfig
from ..net.tls import TLSConfig  # noqa: TC001 - pydantic reads it

_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class HTTPConfig(OperatorConfig, ListenConfig, IntakeConfig, KeysConfig):
    """Where to listen (`host`, `port`), who may call (`keys`, `tls`), and what is too much.

    `model_name` is what calls name it by, by default the model's id. A request must arrive within `read_timeout_s`
    and be no longer than `max_body_bytes`; a client that does not read what it is sent for `write_timeout_s` is cut
    off. Browsers may call from the `cors_origins`, as "https://example.org" or "*".
    """

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    tls: TLSConfig | None = None
    model_name: Annotated[str, Field(min_length=1)] | None = None
    max_connections: Annotated[int, Field(gt=0)] = 1024
    max_body_bytes: Annotated[int, Field(gt=0)] = 4 * 1024 * 1024
    read_timeout_s: _Seconds = 20.0
    write_timeout_s: _Seconds = 20.0
    cors_origins: list[str] = Field(default_factory=list)
