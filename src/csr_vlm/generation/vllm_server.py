"""A running vLLM server, as a stream of tokens.

OpenAI's own endpoints take a picture as a conversation only, and a conversation is encoded
anew. vLLM's ``/inference/v1/generate``, which a server started with ``--enable-scale-out`` has,
takes token ids and a picture, and gives token ids. A candidate that is given up is closed at our
end, whereupon the server stops it.
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

from csr_vlm.core.errors import CsrError
from csr_vlm.generation.streaming import Asked, Piece
from csr_vlm.generation.vllm import Images, adapter_name
from csr_vlm.models.encoding import PromptEncoder

_TIMEOUT = 600.0
"""Seconds without a word from the server."""
_HOW = "start it as docs/engines.md says: vllm serve MODEL --enable-scale-out --enable-lora"


class ServerStream:
    """Requests to a server, each in a thread that listens to its answer."""

    def __init__(self, server: str, model: str, prompt_encoder: PromptEncoder, max_rows: int) -> None:
        self._server = server
        self._model = model
        self._images = Images(prompt_encoder)
        self._urls: dict[str, str] = {}
        self._answers: SimpleQueue[Piece | CsrError] = SimpleQueue()
        self._given_up: set[str] = set()
        self._closed = False
        self._threads = ThreadPoolExecutor(max_rows, thread_name_prefix="vllm-server")

    def start(self, asked: Asked) -> None:
        name, image = self._images.of(asked.prompt)
        url = self._urls.get(asked.prompt.prompt_id) or _data_url(image)
        self._urls[asked.prompt.prompt_id] = url
        body = {
            "model": self._model,
            "token_ids": asked.token_ids,
            "content_parts": [{"type": "image_url", "url": url, "uuid": name}],
            "sampling_params": asked.sampling,
            "return_token_ids": True,
            "stream": True,
        }
        self._threads.submit(self._listen, asked.key, body)

    def pieces(self) -> list[Piece]:
        found = [self._answers.get()]
        try:
            while True:
                found.append(self._answers.get_nowait())
        except Empty:
            pass
        for answer in found:
            if isinstance(answer, CsrError):
                raise answer
        return [answer for answer in found if isinstance(answer, Piece)]

    def stop(self, keys: Sequence[str]) -> None:
        self._given_up.update(keys)

    def forget(self, prompt_id: str) -> None:
        self._images.forget(prompt_id)
        self._urls.pop(prompt_id, None)

    def close(self) -> None:
        """Give up whatever is under way."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _listen(self, key: str, body: dict[str, Any]) -> None:
        try:
            with _send(self._server, "/inference/v1/generate", body) as response:
                for line in response:
                    if self._closed or key in self._given_up:
                        break
                    if line.startswith(b"data: {"):
                        self._answers.put(_piece(key, json.loads(line[6:])))
        except CsrError as error:
            self._answers.put(error)
        except Exception as error:
            # Whatever goes wrong in this thread must reach the one that waits.
            self._answers.put(CsrError(f"{self._server} broke off: {type(error).__name__}: {error}", "see its log"))
        self._given_up.discard(key)


@contextmanager
def connected(
    server: str, prompt_encoder: PromptEncoder, adapter: Path | None, max_rows: int
) -> Iterator[ServerStream]:
    """Connect to a server; an adapter is loaded there for as long.

    Raises:
        CsrError: Nothing answers, or the adapter is refused. The server reads its directory.
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


def _piece(key: str, chunk: dict[str, Any]) -> Piece:
    if "error" in chunk:
        raise CsrError(f"the vLLM server failed: {chunk['error'].get('message', chunk['error'])}", "see its log")
    choice = chunk["choices"][0]
    return Piece(
        key=key,
        token_ids=choice["token_ids"] or (),
        logprobs=[entry["logprob"] for entry in (choice["logprobs"] or {"content": ()})["content"]],
        ended=choice["finish_reason"] is not None,
        prompt_ids=chunk.get("prompt_token_ids"),
    )


def _data_url(image: Any) -> str:
    """Write an image as the server is to see it, without loss."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _headers() -> dict[str, str]:
    key = os.environ.get("VLLM_API_KEY")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _send(server: str, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
    """Post a body, or get a page where there is none; the configuration lets nothing but http(s) through."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"{server}{path}", data, _headers())  # noqa: S310
    try:
        response: HTTPResponse = urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    except HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        raise CsrError(f"{request.full_url} answers {error.code}: {said}", _HOW) from None
    except (URLError, HTTPException, OSError) as error:
        raise CsrError(f"nothing answers at {request.full_url}: {error}", _HOW) from None
    return response
