"""TLS for whoever listens, and for whoever connects."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ....config import Config
from ....errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_Path = Annotated[str, Field(min_length=1)]


class TLSConfig(Config):
    """PEM files, relative to the current directory: the certificate chain, its private key (None: in the same file),
    and, to ask clients for certificates, the CA that has signed them."""

    cert: _Path
    key: _Path | None = None
    client_ca: _Path | None = None


def server_context(config: TLSConfig, base_dir: Path) -> ssl.SSLContext:
    """What a listener needs: TLS 1.2 or later; with `client_ca` only clients with a certificate that it has signed.

    Raises:
        ConfigError: a file cannot be read or used; the message names it.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load_certificate(context, config.cert, config.key, base_dir)
    if config.client_ca is not None:
        _load_authority(context, config.client_ca, base_dir)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(ca: str | None, base_dir: Path) -> ssl.SSLContext:
    """What a client needs: trusts the CAs of the machine, or only those in the file `ca`.

    Raises:
        ConfigError: the file cannot be read or holds no certificate.
    """
    if ca is None:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load_authority(context, ca, base_dir)
    return context


def _load_certificate(context: ssl.SSLContext, cert: str, key: str | None, base_dir: Path) -> None:
    for name in (cert, key or cert):
        _check_readable(name, base_dir)
    try:
        # An empty password, for a key that has one would be asked for at the terminal.
        context.load_cert_chain(base_dir / cert, None if key is None else base_dir / key, password="")
    except ssl.SSLError as error:
        reason = error.reason or "not PEM"
        where = cert if key is None else f"{cert} and {key}"
        raise ConfigError(
            f"{where}: cannot be used for TLS ({reason}): write PEM files, a certificate and its key without a password"
        ) from None


def _load_authority(context: ssl.SSLContext, ca: str, base_dir: Path) -> None:
    _check_readable(ca, base_dir)
    try:
        context.load_verify_locations(base_dir / ca)
    except ssl.SSLError as error:
        raise ConfigError(f"{ca}: holds no CA certificate in PEM ({error.reason or 'not PEM'})") from None


def _check_readable(name: str, base_dir: Path) -> None:
    try:
        with open(base_dir / name, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror} (looked for {base_dir / name})") from None
