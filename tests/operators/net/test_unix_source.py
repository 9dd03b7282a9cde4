"""unix_source: as tcp_source, behind a file."""

from __future__ import annotations

import os
import stat

import pytest

HI = {"prompt": "hi", "max_new_tokens": 3}


@pytest.mark.parametrize("framing", ["json_lines", "msgpack"])
def test_requests_and_their_answers(serve, tmp_path, framing):
    async def body(server):
        assert server.source.address == f"unix://{tmp_path}/s.sock"
        async with await server.connect(framing) as client:
            await client.send(*({**HI, "id": f"r{n}"} for n in range(5)))
            assert {event["event"] for event in (await client.ends(5)).values()} == {"done"}

    serve(body, {"type": "unix_source", "path": "s.sock", "framing": framing})
    assert not (tmp_path / "s.sock").exists()


@pytest.mark.parametrize(("config", "mode"), [({}, 0o600), ({"mode": "660"}, 0o660)])
def test_who_may_connect(serve, tmp_path, config, mode):
    async def body(server):
        assert stat.S_IMODE(os.stat(tmp_path / "s.sock").st_mode) == mode

    serve(body, {"type": "unix_source", "path": "s.sock", **config})


def test_a_connection_cut_is_noticed_at_once(serve, endless):
    async def body(server):
        client = await server.connect()
        await client.send(endless("a"))
        await server.until(lambda: server.services.num_running == 1)
        await client.close()
        await server.until(lambda: server.counts.get("cancelled") == 1)

    serve(body, {"type": "unix_source", "path": "s.sock"})


def test_the_file_of_a_later_server_is_left_alone(serve, tmp_path):
    async def body(server):
        (tmp_path / "s.sock").unlink()
        (tmp_path / "s.sock").write_text("another's")

    serve(body, {"type": "unix_source", "path": "s.sock"})
    assert (tmp_path / "s.sock").exists()
