"""A server in this process, on a thread and a port of its own, and clients of it."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.from_thread
import openai
import pytest

import sageLLM.operators
from sageLLM.graph import load_pipeline
from sageLLM.runtime.assembly import assemble
from sageLLM.runtime.services import EngineServices

TOOL_TEMPLATE = (
    "{{ 'Call with <tool_call>.' }}{{ tools | tojson if tools }}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}\n{% endfor %}"
)
SERVE = Path(sageLLM.__file__).parent / "pipelines" / "serve.yaml"


class Server:
    """A running pipeline with an http_source. `port` is the one it listens on."""

    def __init__(self, settings: list[str]) -> None:
        self.pipeline = load_pipeline(SERVE, ["port=0", *settings])
        self.services = EngineServices(self.pipeline.engine)
        self.flow = assemble(self.pipeline, self.services)
        self.ended: Future[None] = Future()
        self.loaded = threading.Event()  # unset: the model is still loading
        self.is_to_fail = False
        self._running: Future[None] = Future()
        self._thread = threading.Thread(target=self._main, daemon=True)

    def _main(self) -> None:
        try:
            anyio.run(self._run)
        except BaseException as error:
            if not self._running.done():
                self._running.set_exception(error)
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    async def _run(self) -> None:
        self._token = anyio.lowlevel.current_token()
        async with self.flow.claimed():
            self._running.set_result(None)
            self.services.load()
            await anyio.to_thread.run_sync(self.loaded.wait)
            async with self.services.running():
                await self.flow.run()

    def start(self) -> None:
        """Until it listens."""
        self._thread.start()
        self._running.result()

    def call(self, function, *arguments):
        """Call it on the flow's loop."""
        return anyio.from_thread.run_sync(function, *arguments, token=self._token)

    def run(self, function, *arguments):
        """Run a coroutine function on the flow's loop."""
        return anyio.from_thread.run(function, *arguments, token=self._token)

    def until(self, condition) -> None:
        """Wait until something is true of the flow, which its own loop looks at."""

        async def wait() -> None:
            with anyio.fail_after(20):
                while not condition():  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.001)

        self.run(wait)

    @property
    def source(self):
        return self.flow.operators["source"]

    @property
    def port(self) -> int:
        return int(self.source.address.rpartition(":")[2])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def drain(self) -> None:
        self.call(self.flow.drain, "the test says so")

    def stop(self) -> None:
        """Drain, and check that nothing is left of any request."""
        if not self.ended.done():
            self.drain()
        if self.is_to_fail:
            assert self.ended.exception(30) is not None
        else:
            self.ended.result(30)
        self._thread.join(30)
        counters = self.flow.ledger.counters()
        assert counters["in_flight"] == 0
        self.flow.ledger.check()
        self.check_free()

    def check_free(self) -> None:
        services = self.services
        assert services.leases.free_slots == services.leases.num_slots
        assert services.worker.num_running == 0
        services.kv.check_integrity(owners=[])
        assert services.kv.available() == services.kv.num_blocks

    # -- plain HTTP --------------------------------------------------------------------------------------------------

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def exchange(self, method: str, path: str, body=None, **headers: str):
        """One request on a connection of its own -> (status, headers, body as JSON or text)."""
        from http.client import HTTPConnection

        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            if data is not None:
                given.setdefault("content-type", "application/json")
            connection.request(method, path, data, given)
            response = connection.getresponse()
            text = response.read().decode()
            kind = response.getheader("content-type", "")
            return response.status, response.headers, json.loads(text) if "json" in kind else text
        finally:
            connection.close()

    def post(self, path: str, **body):
        """The status and the answer of a JSON request."""
        status, _, answer = self.exchange("POST", path, body)
        return status, answer


@contextmanager
def serving(*settings: str, loading: bool = False):
    """A server for the length of the block; `loading`: set `loaded` to let it go on."""
    server = Server([*settings])
    if not loading:
        server.loaded.set()
    server.start()
    try:
        if not loading:
            server.until(lambda: server.source.intake is not None)
        yield server
    finally:
        server.loaded.set()
        server.stop()


@pytest.fixture
def serve():
    """`with serve("operators.source.max_in_flight=1") as server:` on the null model."""
    return lambda *settings, **options: serving("model=builtin:null", *settings, **options)


@pytest.fixture(scope="module")
def null_server():
    """A server of the null model, for what needs no settings of its own."""
    with serving("model=builtin:null") as server:
        yield server


@pytest.fixture(scope="module")
def tiny_server():
    """A server of the built-in model, which answers greedily."""
    with serving("model=builtin:pydoc-tiny") as server:
        yield server


@pytest.fixture(scope="module")
def serve_tools(checkpoint_folder, tmp_path_factory):
    """As `serve`, on `random`, a model with random weights whose template knows tools. Token 2 begins a call."""
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(checkpoint_folder("qwen3"), folder)
    for name, changes in (
        ("config.json", {"max_position_embeddings": 2048}),
        ("tokenizer_config.json", {"chat_template": TOOL_TEMPLATE}),
    ):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text().replace("<|user|>", "<tool_call>"))
    next(token for token in tokenizer["added_tokens"] if token["id"] == 2)["special"] = False  # as Qwen's is none
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    own = [f"model={folder}", "operators.source.model_name=random", "engine.kv_cache.max_tokens=4096"]
    return lambda *settings: serving(*own, "engine.backend.backend_type=cpu", *settings)


@pytest.fixture(scope="module")
def tool_server(serve_tools):
    """A server of that model, for what needs no settings of its own."""
    with serve_tools() as server:
        yield server


@pytest.fixture
def client(tiny_server):
    """OpenAI's own, of the built-in model."""
    with openai.OpenAI(base_url=tiny_server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def model(tiny_server):
    """What calls name the built-in model by."""
    return tiny_server.source.service.model_name
