"""A typed client of the API, synchronous and asynchronous.

    with Client("http://localhost:8000") as client:
        model = client.wait(client.create_model(max_mem_gb=4).id)
        for image in client.generate(model.id, class_labels=["Sneaker"], n=4):
            image.save(f"{image.seed}.png")

What a service refuses for now (429, 503, a connection that breaks) is asked for again, not before
its Retry-After; what makes something carries an Idempotency-Key, so that nothing is made twice.
"""

import asyncio
import base64
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, Literal, Self, TypedDict, TypeVar, Unpack

import httpx
from httpx_retries import Retry, RetryTransport
from httpx_sse import ServerSentEvent, aconnect_sse, connect_sse
from pydantic import BaseModel

from fineserve.packing import packed
from fineserve.wire import (
    GenerationResponse,
    ModelList,
    ModelResponse,
    PlanResponse,
    TaskList,
    TaskResponse,
)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

RETRIES = Retry(
    total=8,
    backoff_factor=0.5,
    max_backoff_wait=120.0,
    allowed_methods=("GET", "POST", "DELETE"),
    status_forcelist=(429, 502, 503),
)
TIMEOUT = httpx.Timeout(30, read=330)
ENDED = {"failed", "cancelled", "deleted"}
OnEvent = Callable[[str, dict[str, Any]], object]
"""Hears the name and the content of each event."""


class FineserveError(Exception):
    """A refusal: `status`, its stable `kind`, and a `detail` that says what to do."""

    def __init__(self, status: int, kind: str, detail: str, problem: Mapping[str, Any]) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail, self.problem = status, kind, detail, problem


class NotReady(Exception):
    """A model that ended otherwise; `model` is its record."""

    def __init__(self, model: ModelResponse) -> None:
        super().__init__(f"model {model.id} {model.status}: {model.error or 'on request'}")
        self.model = model


class PlanFields(TypedDict, total=False):
    """As POST /plan takes them."""

    max_mem_gb: float
    mem_scope: Literal["model", "process"]
    max_latency_ms: float
    min_quality: float
    n: int
    num_inference_steps: int
    guidance_scale: float
    depth: int
    rank: int
    mode: Literal["factored", "materialised"]
    dtype: Literal["float32", "bfloat16", "int8"]
    family: str
    device_class: str


class ModelFields(PlanFields, total=False):
    """As POST /models takes them."""

    name: str
    task: str
    refine: dict[str, int]


class GenerateFields(TypedDict, total=False):
    """As POST /generate takes them, without the model."""

    class_labels: list[int | str]
    n: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: Literal["ddim", "dpmsolver++", "euler"]
    seed: int
    deadline_seconds: float
    previews: bool


@dataclass(frozen=True)
class GeneratedImage:
    png: bytes = field(repr=False)
    class_label: int
    seed: int

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.png)


@dataclass(frozen=True)
class _Call(Generic[T]):
    """One request, and what becomes of its answer."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    content: dict[str, Any] = field(default_factory=dict)
    """Arguments of httpx's request."""


def _making(path: str, body: Mapping[str, Any], read: Callable[[httpx.Response], T]) -> _Call[T]:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    return _Call("POST", path, read, {"json": body, "headers": headers})


def _parsed(kind: type[M]) -> Callable[[httpx.Response], M]:
    return lambda answer: kind.model_validate_json(answer.content)


_model, _task, _generation = (
    _parsed(ModelResponse),
    _parsed(TaskResponse),
    _parsed(GenerationResponse),
)


def _generating(
    model_id: str, request: Mapping[str, Any], on_event: OnEvent | None
) -> _Call[GenerationResponse]:
    """Answered when it is done, or at once where its events are wanted."""
    call = _making("/generate", {"model": model_id, **request}, _generation)
    if on_event is not None:
        call.content["headers"]["Prefer"] = "respond-async"
    return call


def _plan(fields: Mapping[str, Any]) -> _Call[PlanResponse]:
    return _Call("POST", "/plan", _parsed(PlanResponse), {"json": fields})


def _models_page(offset: int) -> _Call[ModelList]:
    params = {"offset": offset, "limit": 200}
    return _Call("GET", "/models", _parsed(ModelList), {"params": params})


def _tasks(answer: httpx.Response) -> list[TaskResponse]:
    return TaskList.model_validate_json(answer.content).tasks


def _upload(images: Path | IO[bytes], name: str | None, family: str | None) -> _Call[TaskResponse]:
    if isinstance(images, Path):
        with packed(images) as archive:
            return _upload(archive, name, family)
    given = {"name": name, "family": family}
    params = {key: value for key, value in given.items() if value is not None}
    return _Call("POST", "/tasks", _task, {"params": params, "content": images.read()})


def _images(generation: GenerationResponse) -> list[GeneratedImage]:
    return [
        GeneratedImage(base64.b64decode(image.b64_png), image.class_label, image.seed)
        for image in generation.images
    ]


def _nothing(_: httpx.Response) -> None:
    return None


def _checked(answer: httpx.Response) -> httpx.Response:
    """Raises FineserveError."""
    if answer.is_success:
        return answer
    try:
        problem = answer.json()
        kind = str(problem["type"]).rpartition(":")[2]
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        problem, kind, detail = {}, "unknown", f"answered {answer.status_code}: is that fineserve?"
    raise FineserveError(answer.status_code, kind, detail, problem)


@dataclass
class _Hearing:
    """Goes on with a stream of events where it broke off."""

    on_event: OnEvent | None
    last_id: str = "0"

    def hear(self, event: ServerSentEvent) -> None:
        if not event.data:
            return  # a comment, which keeps the connection, after an event
        self.last_id = event.id or self.last_id
        content = json.loads(event.data)
        if self.on_event is not None:
            self.on_event(event.event, content)

    @property
    def headers(self) -> dict[str, str]:
        return {"Last-Event-ID": self.last_id}


def _ended(model: ModelResponse) -> ModelResponse | None:
    """The model if it is ready, None while it is not. Raises NotReady."""
    if model.status in ENDED:
        raise NotReady(model)
    return model if model.status == "ready" else None


def _headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


class Client:
    """Every method raises FineserveError for what is refused, httpx.HTTPError for no answer."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", api_key: str | None = None, retry: Retry = RETRIES
    ) -> None:
        self._http = httpx.Client(
            base_url=url,
            timeout=TIMEOUT,
            headers=_headers(api_key),
            transport=RetryTransport(retry=retry),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def plan(self, **budget: Unpack[PlanFields]) -> PlanResponse:
        """What a budget would give, without making it."""
        return self._do(_plan(budget))

    def create_model(self, **budget: Unpack[ModelFields]) -> ModelResponse:
        """It is queued; `wait` for it."""
        return self._do(_making("/models", budget, _model))

    def model(self, model_id: str) -> ModelResponse:
        return self._do(_Call("GET", f"/models/{model_id}", _model))

    def models(self) -> Iterator[ModelResponse]:
        """Newest first, and as many as there are."""
        offset: int | None = 0
        while offset is not None:
            page = self._do(_models_page(offset))
            yield from page.models
            offset = page.next_offset

    def wait(self, model_id: str, on_event: OnEvent | None = None) -> ModelResponse:
        """Follow a build to its end. Raises NotReady when that is another than `ready`."""
        hearing = _Hearing(on_event)
        while (model := _ended(self.model(model_id))) is None:
            self._hear(f"/models/{model_id}/events", hearing)
        return model

    def cancel_model(self, model_id: str) -> ModelResponse:
        return self._do(_Call("POST", f"/models/{model_id}/cancel", _model))

    def delete_model(self, model_id: str) -> None:
        self._do(_Call("DELETE", f"/models/{model_id}", _nothing))

    def generate(
        self, model_id: str, on_event: OnEvent | None = None, **request: Unpack[GenerateFields]
    ) -> list[GeneratedImage]:
        """Sample images and wait for them."""
        generation = self._do(_generating(model_id, request, on_event))
        hearing = _Hearing(on_event)
        while generation.status != "done":  # it takes longer than one answer may
            path = f"/generations/{generation.id}"
            self._hear(f"{path}/events", hearing)
            generation = self._do(_Call("GET", path, _generation))
            _check_generation(generation)
        return _images(generation)

    def create_task(
        self, images: Path | IO[bytes], *, name: str | None = None, family: str | None = None
    ) -> TaskResponse:
        """Upload images in folders that are named after their classes, or what Hugging Face
        datasets has saved: a directory, or a zip or tar of one."""
        return self._do(_upload(images, name, family))

    def tasks(self) -> list[TaskResponse]:
        return self._do(_Call("GET", "/tasks", _tasks))

    def delete_task(self, task_id: str) -> None:
        self._do(_Call("DELETE", f"/tasks/{task_id}", _nothing))

    def _hear(self, path: str, hearing: _Hearing) -> None:
        """Until the stream ends or breaks off."""
        with (
            contextlib.suppress(httpx.TransportError),
            connect_sse(self._http, "GET", path, headers=hearing.headers) as source,
        ):
            for event in source.iter_sse():
                hearing.hear(event)

    def _do(self, call: _Call[T]) -> T:
        return call.read(_checked(self._http.request(call.method, call.path, **call.content)))


class AsyncClient:
    """`Client`, to be awaited."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", api_key: str | None = None, retry: Retry = RETRIES
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=TIMEOUT,
            headers=_headers(api_key),
            transport=RetryTransport(retry=retry),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def plan(self, **budget: Unpack[PlanFields]) -> PlanResponse:
        return await self._do(_plan(budget))

    async def create_model(self, **budget: Unpack[ModelFields]) -> ModelResponse:
        return await self._do(_making("/models", budget, _model))

    async def model(self, model_id: str) -> ModelResponse:
        return await self._do(_Call("GET", f"/models/{model_id}", _model))

    async def models(self) -> AsyncIterator[ModelResponse]:
        offset: int | None = 0
        while offset is not None:
            page = await self._do(_models_page(offset))
            for model in page.models:
                yield model
            offset = page.next_offset

    async def wait(self, model_id: str, on_event: OnEvent | None = None) -> ModelResponse:
        hearing = _Hearing(on_event)
        while (model := _ended(await self.model(model_id))) is None:
            await self._hear(f"/models/{model_id}/events", hearing)
        return model

    async def cancel_model(self, model_id: str) -> ModelResponse:
        return await self._do(_Call("POST", f"/models/{model_id}/cancel", _model))

    async def delete_model(self, model_id: str) -> None:
        await self._do(_Call("DELETE", f"/models/{model_id}", _nothing))

    async def generate(
        self, model_id: str, on_event: OnEvent | None = None, **request: Unpack[GenerateFields]
    ) -> list[GeneratedImage]:
        generation = await self._do(_generating(model_id, request, on_event))
        hearing = _Hearing(on_event)
        while generation.status != "done":
            path = f"/generations/{generation.id}"
            await self._hear(f"{path}/events", hearing)
            generation = await self._do(_Call("GET", path, _generation))
            _check_generation(generation)
        return _images(generation)

    async def create_task(
        self, images: Path | IO[bytes], *, name: str | None = None, family: str | None = None
    ) -> TaskResponse:
        return await self._do(await asyncio.to_thread(_upload, images, name, family))

    async def tasks(self) -> list[TaskResponse]:
        return await self._do(_Call("GET", "/tasks", _tasks))

    async def delete_task(self, task_id: str) -> None:
        await self._do(_Call("DELETE", f"/tasks/{task_id}", _nothing))

    async def _hear(self, path: str, hearing: _Hearing) -> None:
        with contextlib.suppress(httpx.TransportError):
            async with aconnect_sse(self._http, "GET", path, headers=hearing.headers) as source:
                async for event in source.aiter_sse():
                    hearing.hear(event)

    async def _do(self, call: _Call[T]) -> T:
        answer = await self._http.request(call.method, call.path, **call.content)
        return call.read(_checked(answer))


def _check_generation(generation: GenerationResponse) -> None:
    """Raises FineserveError when it ended without images."""
    if generation.status in ENDED:
        detail = f"generation {generation.id} {generation.status}: {generation.error}"
        raise FineserveError(500, f"generation-{generation.status}", detail, {})
