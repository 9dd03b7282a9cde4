"""TLS of what listens: files that can be used, and in words what is wrong with the others."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

import pytest

from sageLLM.errors import ConfigError
from sageLLM.operators.sources.net.tls import TLSConfig, client_context, server_context

FILES = Path(__file__).parent / "certificates"


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> str | None:
    """The TLS version that the two agree on, in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
    ]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0].version()


def test_who_trusts_the_ca_can_connect():
    server = server_context(TLSConfig(cert="server.pem", key="server.key"), FILES)
    assert shake_hands(server, client_context("ca.pem", FILES)) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client_context(None, FILES))


def test_certificate_and_key_in_one_file(tmp_path):
    (tmp_path / "both.pem").write_bytes((FILES / "server.pem").read_bytes() + (FILES / "server.key").read_bytes())
    server = server_context(TLSConfig(cert="both.pem"), tmp_path)
    assert shake_hands(server, client_context("ca.pem", FILES)) == "TLSv1.3"


def test_with_client_ca_only_clients_with_a_certificate():
    server = server_context(TLSConfig(cert="server.pem", key="server.key", client_ca="ca.pem"), FILES)
    client = client_context("ca.pem", FILES)
    with pytest.raises(ssl.SSLError):
        shake_hands(server, client)
    client.load_cert_chain(FILES / "client.pem", FILES / "client.key")
    assert shake_hands(server, client) == "TLSv1.3"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"cert": "none.pem"}, r"none\.pem: cannot be read: No such file"),
        ({"cert": "server.pem", "key": "none.key"}, r"none\.key: cannot be read: No such file"),
        ({"cert": "server.key"}, r"server\.key: cannot be used for TLS"),
        ({"cert": "server.pem", "key": "client.key"}, r"server\.pem and client\.key: cannot be used for TLS"),
        ({"cert": "server.pem", "key": "locked.key"}, r"locked\.key: cannot be used .* without a password"),
        ({"cert": "server.pem", "key": "server.key", "client_ca": "server.key"}, r"server\.key: holds no CA"),
    ],
)
def test_what_is_wrong_names_the_file(config, told):
    with pytest.raises(ConfigError, match=told):
        server_context(TLSConfig(**config), FILES)
