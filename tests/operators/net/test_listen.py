"""Addresses: bound at once, free again after a crash, and in use by one server only."""

from __future__ import annotations

import logging
import os
import socket
import stat

import anyio
import pytest

from sageLLM.errors import ConfigError
from sageLLM.operators.sources.net.listen import ListenConfig, bind_tcp, bind_unix, tell_address


@pytest.fixture
def bind(loop_name):
    """`bind(port=..., host=...)` -> listening sockets, closed after the test."""
    bound: list[socket.socket] = []

    def make(port=0, host="127.0.0.1"):
        sockets = anyio.run(bind_tcp, "tcp", ListenConfig(host=host, port=port), backend=loop_name)
        bound.extend(sockets)
        return sockets

    yield make
    for each in bound:
        each.close()


def connect(port):
    return socket.create_connection(("127.0.0.1", port))


def test_who_connects_waits_until_somebody_accepts(bind):
    (listening,) = bind()
    with connect(listening.getsockname()[1]):
        accepted, _ = listening.accept()
        accepted.close()


def test_a_second_server_on_the_same_port_is_one_clear_error(bind):
    port = bind()[0].getsockname()[1]
    with pytest.raises(ConfigError, match=rf"tcp: tcp://127\.0\.0\.1:{port} is in use: .* write another port"):
        bind(port)


def test_the_port_is_free_again_though_connections_of_before_linger(bind):
    (listening,) = bind()
    port = listening.getsockname()[1]
    with connect(port):
        listening.accept()[0].close()  # the server's side closes first: TIME_WAIT is here
        listening.close()
        assert bind(port)[0].getsockname()[1] == port


def test_every_address_of_a_name_has_the_same_port(bind):
    assert len({each.getsockname()[1] for each in bind(host="localhost")}) == 1


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1"])
def test_an_address_that_is_not_ours(bind, host):
    with pytest.raises(ConfigError, match=r"is no address"):
        bind(host=host)


@pytest.mark.parametrize(
    ("host", "has", "warns"),
    [
        ("127.0.0.1", False, None),
        ("0.0.0.0", False, "beyond this machine (0.0.0.0) without keys and tls"),
        ("0.0.0.0", True, None),
    ],
)
def test_the_log_tells_the_address_and_warns_beyond_loopback(bind, caplog, host, has, warns):
    caplog.set_level(logging.INFO, "sageLLM")
    sockets = bind(host=host)
    port = sockets[0].getsockname()[1]
    assert tell_address("tcp", "tcp", ListenConfig(host=host, port=0), sockets, has, has) == f"tcp://{host}:{port}"
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == f"tcp listens on tcp://{host}:{port}"
    assert (told[1:] == []) if warns is None else (warns in told[1])


def test_a_unix_socket_has_the_mode_that_was_asked_for(tmp_path):
    with bind_unix("unix", tmp_path / "s", 0o600):
        assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))


def test_a_socket_that_a_crashed_server_has_left_is_replaced(tmp_path):
    bind_unix("unix", tmp_path / "s", 0o600).close()
    with bind_unix("unix", tmp_path / "s", 0o660), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))


def test_a_unix_socket_in_use_is_one_clear_error(tmp_path):
    with bind_unix("unix", tmp_path / "s", 0o600), pytest.raises(ConfigError, match="is in use by another server"):
        bind_unix("unix", tmp_path / "s", 0o600)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    (tmp_path / "s").write_text("mine")
    with pytest.raises(ConfigError, match="is no socket"):
        bind_unix("unix", tmp_path / "s", 0o600)
    assert (tmp_path / "s").read_text() == "mine"


@pytest.mark.parametrize("name", ["missing/s", "x" * 200])
def test_a_unix_socket_that_cannot_be_made(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot listen on unix://"):
        bind_unix("unix", tmp_path / name, 0o600)
