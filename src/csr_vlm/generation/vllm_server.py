"""Stream tokens from a running vLLM server.

The OpenAI-compatible endpoints accept images in chat messages only, which the server tokenizes
again. vLLM's ``/inference/v1/generate``, available on a server started with
``--enable-scale-out``, accepts token ids and an image and returns token ids. To abort a request
the client closes its connection, and the server stops generating.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError, PromptError
from csr_vlm.generation.streaming import TokenChunk, TokenRequest
from csr_vlm.generation.vllm import PromptImages, adapter_name, allowed_rank
from csr_vlm.models.encoding import PromptEncoder

_TIMEOUT = 600.0
"""Seconds to wait for the server to send something."""
_REJECTIONS = (400, 413, 422)
"""Status codes with which a server rejects one request, such as a prompt that is too long."""
_START_HINT = "start it as described in docs/engines.md: vllm serve MODEL --enable-scale-out --enable-lora"


def server_command(config: RunConfig) -> str:
    """Return the command that starts a server for a run."""
    rank = allowed_rank(config.training.lora.r)
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {config.model.path} --enable-scale-out --enable-lora "
        f"--max-lora-rank {rank}"
    )


class ServerStream:
    """Send requests to a server, each with a thread that reads its response (a TokenStream).

    Args:
        server: Address of the server, without a trailing slash.
        model: Name of the model or adapter on the server.
        max_rows: Most requests in progress at once.
    """

    def __init__(self, server: str, model: str, prompt_encoder: PromptEncoder, max_rows: int) -> None:
        self._server = server
        self._model = model
        self._images = PromptImages(prompt_encoder)
        self._urls: dict[str, str] = {}
        self._received: SimpleQueue[TokenChunk | tuple[str, CsrError]] = SimpleQueue()
        self._aborted: set[str] = set()
        self._closed = False
        self._threads = ThreadPoolExecutor(max_rows, thread_name_prefix="vllm-server")

    def add(self, request: TokenRequest) -> None:
        """Start a request."""
        uuid, image = self._images.load(request.prompt)
        url = self._urls.get(request.prompt.prompt_id) or _data_url(image)
        self._urls[request.prompt.prompt_id] = url
        body = {
            "model": self._model,
            "token_ids": request.token_ids,
            "content_parts": [{"type": "image_url", "url": url, "uuid": uuid}],
            "sampling_params": request.sampling,
            "return_token_ids": True,
            "stream": True,
        }
        self._threads.submit(self._listen, request.request_id, body)

    def next_chunks(self) -> list[TokenChunk]:
        """Wait for chunks of any requests, and return them.

        Raises:
            CsrError: A request failed.
        """
        received = [self._received.get()]
        try:
            while True:
                received.append(self._received.get_nowait())
        except Empty:
            pass
        for item in received:
            if isinstance(item, tuple) and item[0] not in self._aborted:
                raise item[1]
        return [item for item in received if isinstance(item, TokenChunk)]

    def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests; their threads close the connections at the next chunk."""
        self._aborted.update(request_ids)

    def release(self, prompt_id: str) -> None:
        """Drop a prompt's image."""
        self._images.release(prompt_id)
        self._urls.pop(prompt_id, None)

    def close(self) -> None:
        """Abort all requests and wait for their threads."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _listen(self, request_id: str, body: dict[str, Any]) -> None:
        try:
            with _send(self._server, "/inference/v1/generate", body) as response:
                for line in response:
                    if self._closed or request_id in self._aborted:
                        break
                    if line.startswith(b"data: {"):
                        self._received.put(_chunk(request_id, json.loads(line[6:])))
        except CsrError as error:
            self._received.put((request_id, error))
        except Exception as error:
            # Any error in this thread must reach the thread that waits in next_chunks.
            message = f"{self._server} stopped responding: {type(error).__name__}: {error}"
            self._received.put((request_id, CsrError(message, "see the server's log")))
        else:
            self._aborted.discard(request_id)


@contextmanager
def server_stream(
    server: str, prompt_encoder: PromptEncoder, adapter: Path | None, max_rows: int
) -> Iterator[ServerStream]:
    """Connect to a server; an adapter stays loaded there until the context is left.

    Args:
        adapter: LoRA adapter; the server itself reads the directory. None for the base model.

    Raises:
        CsrError: The server does not respond, or rejects the adapter.
    """
    server = server.rstrip("/")
    with _send(server, "/v1/models") as response:
        models = json.loads(response.read())["data"]
    name = next(model["id"] for model in models if not model.get("parent"))
    if adapter is not None:
        name = adapter_name(adapter)
        if name not in [model["id"] for model in models]:
            body = {"lora_name": name, "lora_path": str(adapter.resolve())}
            with _send(server, "/v1/load_lora_adapter", body):
                pass
    stream = ServerStream(server, name, prompt_encoder, max_rows)
    try:
        yield stream
    finally:
        stream.close()
        if adapter is not None:
            with _send(server, "/v1/unload_lora_adapter", {"lora_name": name}):
                pass


def require_server(config: RunConfig) -> None:
    """Verify that the server of a run responds.

    Raises:
        CsrError: It does not; the hint is the command that starts it.
    """
    assert config.generation.server is not None
    try:
        with _send(config.generation.server.rstrip("/"), "/v1/models"):
            pass
    except CsrError as error:
        raise CsrError(error.message, f"start it there: {server_command(config)}") from None


def _chunk(request_id: str, event: dict[str, Any]) -> TokenChunk:
    if "error" in event:
        reason = event["error"].get("message", event["error"])
        raise CsrError(f"the vLLM server failed: {reason}", "see the server's log")
    choice = event["choices"][0]
    return TokenChunk(
        request_id=request_id,
        token_ids=choice["token_ids"] or (),
        logprobs=[entry["logprob"] for entry in (choice["logprobs"] or {"content": ()})["content"]],
        is_last=choice["finish_reason"] is not None,
        prompt_ids=event.get("prompt_token_ids"),
    )


def _data_url(image: Any) -> str:
    """Encode an image as a data URL, without loss."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _headers() -> dict[str, str]:
    key = os.environ.get("VLLM_API_KEY")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _send(server: str, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
    """Send a POST request with a body, or a GET request without one; the configuration allows http(s) URLs only.

    Raises:
        CsrError: The server responds with an error status, or does not respond.
    """
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"{server}{path}", data, _headers())  # noqa: S310
    try:
        response: HTTPResponse = urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    except HTTPError as error:
        reason = error.read().decode(errors="replace")[:300]
        kind = PromptError if error.code in _REJECTIONS else CsrError
        raise kind(f"{request.full_url} returned status {error.code}: {reason}", _START_HINT) from None
    except (URLError, HTTPException, OSError) as error:
        raise CsrError(f"no response from {request.full_url}: {error}", _START_HINT) from None
    return response
