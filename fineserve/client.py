"""A typed client of the API, synchronous and asynchronous.

    with Client("http://localhost:8000") as client:
        model = client.wait(client.create_model(max_mem_gb=4).id)
        for image in client.generate(model.id, class_labels=["Sneaker"], n=4):
            image.save(f"{image.seed}.png")

What a service refuses for now (429, 503, a connection that breaks) is asked for again, not before
its Retry-After; what makes something carries an Idempotency-Key, so that nothing is made twice.
Streams of events go on where they broke off. All of it needs neither torch nor the server's parts.
"""

import asyncio
import base64
import contextlib
import functools
import io
import json
import tarfile
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Concatenate, Literal, ParamSpec, Self, TypedDict, TypeVar, Unpack

import httpx
from httpx_retries import Retry, RetryTransport
from httpx_sse import ServerSentEvent, aconnect_sse
from pydantic import BaseModel, ValidationError

from fineserve.packing import packed
from fineserve.transport import RETRIES, TIMEOUT, BlockingTransport, Body, proxy_of, result_of
from fineserve.wire import (
    ExportFormat,
    GenerationResponse,
    ModelList,
    ModelResponse,
    PlanResponse,
    Served,
    SkippedResponse,
    Status,
    TaskList,
    TaskResponse,
)
from learngenes.config import DType, Mode, Scheduler
from learngenes.data.folders import Skipped
from learngenes.sizing.budget import LatencyPercentile, MemoryScope

T = TypeVar("T")
P = ParamSpec("P")
M = TypeVar("M", bound=BaseModel)
Record = TypeVar("Record", ModelResponse, GenerationResponse)

FRUITLESS_SECONDS = 5.0
"""Seconds from which a stream without events is one in which nothing happened."""
FINISHED = {"ready", "undertrained", "done", "failed", "cancelled", "deleted"}
OnEvent = Callable[[str, dict[str, Any]], object]
"""Callback with the name and content of each event."""
OnBytes = Callable[[int, int], object]
"""Callback with (bytes received, bytes in all)."""


class FineserveError(Exception):
    """Refusal by the service: `status`, its stable `kind`, and a `detail` that says what to do."""

    def __init__(self, status: int, kind: str, detail: str, problem: Mapping[str, Any]) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail, self.problem = status, kind, detail, problem


class NotReady(Exception):
    """A model did not become ready; `model` is its record."""

    def __init__(self, model: ModelResponse) -> None:
        super().__init__(f"model {model.id} is {model.status}: {model.error or 'on request'}")
        self.model = model


class SamplingFields(TypedDict, total=False):
    """How images are sampled; what is left out the service chooses."""

    num_inference_steps: int
    scheduler: Scheduler | str
    guidance_scale: float
    guidance_start: float
    guidance_stop: float
    guide: dict[str, int]


class PlanFields(SamplingFields, total=False):
    """Fields of POST /plan."""

    max_mem_gb: float
    mem_scope: MemoryScope
    max_latency_ms: float
    latency_percentile: LatencyPercentile
    min_quality: float
    n: int
    depth: int
    rank: int
    mode: Mode | str
    dtype: DType | str
    family: str
    device_class: str


class ModelFields(PlanFields, total=False):
    """Fields of POST /models."""

    name: str
    task: str
    refine: dict[str, int]
    elastic: dict[str, float]


class GenerateFields(SamplingFields, total=False):
    """Fields of POST /generate, without the model."""

    class_labels: list[int | str]
    n: int
    seed: int
    deadline_seconds: float
    min_quality: float
    when_late: Literal["smaller", "end"]
    previews: bool


class GenerationFields(GenerateFields, total=False):
    """The same, of a family where no model is asked."""

    family: str


@dataclass(frozen=True)
class GeneratedImage:
    png: bytes = field(repr=False)
    class_label: int
    seed: int

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.png)


@dataclass(frozen=True)
class ElasticImages:
    images: list[GeneratedImage]
    served: Served
    """By what they were made, and what was promised."""


class AsyncClient:
    """Asynchronous client. Methods raise FineserveError for a refusal, httpx.HTTPError for none."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", api_key: str | None = None, retry: Retry = RETRIES
    ) -> None:
        self._retry = retry
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=TIMEOUT,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            transport=self._transport(proxy_of(url)),
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

    async def status(self) -> Status:
        """Status of the service: workers, queues, failures, memory."""
        return await self._record("/status", Status)

    async def plan(self, **budget: Unpack[PlanFields]) -> PlanResponse:
        """Plan a budget without making a model."""
        return _parsed(PlanResponse, await self._post("/plan", budget))

    async def create_model(self, **budget: Unpack[ModelFields]) -> ModelResponse:
        """Queue a model; `wait` for it."""
        return _parsed(ModelResponse, await self._make("/models", budget))

    async def model(self, model_id: str) -> ModelResponse:
        """Present record of a model."""
        return await self._record(f"/models/{model_id}", ModelResponse)

    async def models(self) -> AsyncGenerator[ModelResponse, None]:
        """All models, newest first."""
        offset: int | None = 0
        while offset is not None:
            params = {"offset": offset, "limit": 200}
            page = _parsed(ModelList, await self._call("GET", "/models", params=params))
            for model in page.models:
                yield model
            offset = page.next_offset

    async def wait(self, model_id: str, on_event: OnEvent | None = None) -> ModelResponse:
        """Follow a build to its end. Raises NotReady when the model does not become ready."""
        model = await self._finished(f"/models/{model_id}", ModelResponse, on_event)
        if model.status != "ready":
            raise NotReady(model)
        return model

    async def cancel_model(self, model_id: str) -> ModelResponse:
        """Stop a build; a model that is being refined keeps the best so far."""
        return _parsed(ModelResponse, await self._call("POST", f"/models/{model_id}/cancel"))

    async def continue_model(self, model_id: str) -> ModelResponse:
        """Train a model on that was not trained enough, for as long again."""
        return _parsed(ModelResponse, await self._call("POST", f"/models/{model_id}/continue"))

    async def delete_model(self, model_id: str) -> None:
        """Delete a model and everything that it stored."""
        await self._call("DELETE", f"/models/{model_id}")

    async def export(
        self,
        model_id: str,
        into: Path,
        form: ExportFormat = ExportFormat.DIFFUSERS,
        on_bytes: OnBytes | None = None,
    ) -> Path:
        """Fetch a model as a directory, which is made in `into`."""
        path, params = f"/models/{model_id}/export", {"format": form}
        with tempfile.TemporaryFile() as file:
            asked = self._http.stream("GET", path, params=params, follow_redirects=True)
            async with asked as answer:  # the key is not sent to another host
                total = int((await _accepted(answer)).headers.get("content-length", 0))
                async for chunk in answer.aiter_bytes():
                    file.write(chunk)
                    if on_bytes is not None:
                        on_bytes(file.tell(), total)
            try:
                await self._apart(functools.partial(_unpack, file, into))
            except tarfile.TarError as error:
                raise _unknown(answer, "no tar") from error
        return into / model_id

    async def generate(
        self, model_id: str, on_event: OnEvent | None = None, **request: Unpack[GenerateFields]
    ) -> list[GeneratedImage]:
        """Sample images and wait for them."""
        if on_event is None:
            made = await self._make("/generate", {"model": model_id, **request})
            record = _parsed(GenerationResponse, made)
        else:
            record = await self.create_generation(model_id, **request)
        if record.status != "done":  # it takes longer than one answer may
            record = await self.wait_generation(record.id, on_event)
        return _images(record)

    async def generate_within(
        self, seconds: float, family: str, **request: Unpack[GenerateFields]
    ) -> ElasticImages:
        """Sample images of the best size of a family that has them there in so many seconds.

        Raises FineserveError when that cannot be promised: `too-busy` says when to try again.
        """
        body = {"family": family, **request, "deadline_seconds": seconds}
        record = _parsed(GenerationResponse, await self._make("/generate", body))
        if record.status != "done":
            record = await self.wait_generation(record.id)
        assert record.elastic is not None, "the service tells by what it served a family"
        return ElasticImages(_images(record), record.elastic)

    async def create_generation(
        self, model_id: str | None = None, **request: Unpack[GenerationFields]
    ) -> GenerationResponse:
        """Queue a generation of a model, or of a family; `wait_generation` for it."""
        body = {**({} if model_id is None else {"model": model_id}), **request}
        made = await self._make("/generate", body, Prefer="respond-async")
        return _parsed(GenerationResponse, made)

    async def generation(self, generation_id: str) -> GenerationResponse:
        """Present record of a generation, with the images once it is done."""
        return await self._record(f"/generations/{generation_id}", GenerationResponse)

    async def wait_generation(
        self, generation_id: str, on_event: OnEvent | None = None
    ) -> GenerationResponse:
        """Follow the sampling to its end. Raises FineserveError when it made no images."""
        path = f"/generations/{generation_id}"
        record = await self._finished(path, GenerationResponse, on_event)
        if record.status != "done":
            detail = f"generation {record.id} is {record.status}: {record.error or 'on request'}"
            raise FineserveError(500, f"generation-{record.status}", detail, {})
        return record

    async def create_task(
        self,
        images: Path | IO[bytes],
        *,
        name: str | None = None,
        family: str | None = None,
        dry_run: bool = False,
    ) -> TaskResponse:
        """Upload images in folders that are named after their classes (a directory, or a zip or tar
        of one), or a directory that Hugging Face `datasets` has saved; in a dry run nothing is
        kept. The answer tells what was skipped, here or there. Raises DataError, too."""
        given = {"name": name, "family": family, "dry_run": "true" if dry_run else None}
        params = {key: value for key, value in given.items() if value is not None}
        with contextlib.ExitStack() as stack:
            archive, here = await self._apart(lambda: stack.enter_context(_archive(images)))
            task = _parsed(TaskResponse, await self._upload("/tasks", archive, params))
        mine = [SkippedResponse.model_validate(vars(some)) for some in here]
        return task.model_copy(update={"skipped": [*mine, *task.skipped]})

    async def tasks(self) -> list[TaskResponse]:
        """All data sets, newest first."""
        return (await self._record("/tasks", TaskList)).tasks

    async def delete_task(self, task_id: str) -> None:
        """Delete a data set; models that were made of it stay."""
        await self._call("DELETE", f"/tasks/{task_id}")

    async def _record(self, path: str, kind: type[M]) -> M:
        return _parsed(kind, await self._call("GET", path))

    async def _make(self, path: str, body: Mapping[str, Any], **headers: str) -> httpx.Response:
        return await self._post(path, body, **{"Idempotency-Key": uuid.uuid4().hex, **headers})

    async def _post(self, path: str, body: Mapping[str, Any], **headers: str) -> httpx.Response:
        content = json.dumps(body)  # NaN, too: the service's refusal says more than httpx's
        headers = {"Content-Type": "application/json", **headers}
        return await self._call("POST", path, content=content, headers=headers)

    async def _call(self, method: str, path: str, **content: Any) -> httpx.Response:
        return await _accepted(await self._http.request(method, path, **content))

    async def _upload(
        self, path: str, file: IO[bytes], params: Mapping[str, str]
    ) -> httpx.Response:
        body = Body(file)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(body.size)}
        request = self._http.build_request("POST", path, params=params, headers=headers)
        request.stream = body
        return await _accepted(await self._http.send(request))

    async def _finished(self, path: str, kind: type[Record], on_event: OnEvent | None) -> Record:
        """Record once it is finished; its events are heard until then.

        Raises FineserveError when again and again there are none to be heard.
        """
        hearing, patience = _Hearing(f"{path}/events", on_event), self._retry
        while (record := await self._record(path, kind)).status not in FINISHED:
            trouble = await self._hear(hearing)
            if trouble is None:
                patience = self._retry
            elif patience.is_exhausted():
                detail = (
                    f"{hearing.path} tells no events ({trouble}), and {record.id} is "
                    f"{record.status}: let what is between here and the service pass events on"
                )
                raise FineserveError(502, "no-events", detail, {})
            else:
                patience = patience.increment()
                await self._pause(patience, trouble)
        return record

    async def _hear(self, hearing: "_Hearing") -> str | None:
        """Hear events until the stream ends or breaks off; returns why none was new."""
        began, before, trouble = time.monotonic(), hearing.last_id, "it ended at once"
        async with aconnect_sse(self._http, "GET", hearing.path, headers=hearing.headers) as source:
            await _accepted(source.response)
            try:
                async for event in source.aiter_sse():
                    hearing.hear(event)
            except httpx.TransportError as error:
                trouble = str(error)
        fruitful = hearing.last_id != before or time.monotonic() - began > FRUITLESS_SECONDS
        return None if fruitful else trouble

    def _transport(self, proxy: str | None) -> httpx.AsyncBaseTransport:
        return RetryTransport(httpx.AsyncHTTPTransport(proxy=proxy), self._retry)

    async def _pause(self, retry: Retry, why: str) -> None:
        await retry.asleep(httpx.RemoteProtocolError(why))

    async def _apart(self, work: Callable[[], T]) -> T:
        """Result of work that would hold up everything else."""
        return await asyncio.to_thread(work)


class _BlockingClient(AsyncClient):
    """Asynchronous client whose awaits never wait for an event loop; `Client` runs it."""

    def _transport(self, proxy: str | None) -> httpx.AsyncBaseTransport:
        return BlockingTransport(RetryTransport(httpx.HTTPTransport(proxy=proxy), self._retry))

    async def _pause(self, retry: Retry, why: str) -> None:
        retry.sleep(httpx.RemoteProtocolError(why))

    async def _apart(self, work: Callable[[], T]) -> T:
        return work()


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    @functools.wraps(method)
    def called(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return result_of(method(self._client, *args, **kwargs))

    return called


class Client:
    """Synchronous client: `AsyncClient` without `await`."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", api_key: str | None = None, retry: Retry = RETRIES
    ) -> None:
        self._client = _BlockingClient(url, api_key, retry)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def models(self) -> Iterator[ModelResponse]:
        """All models, newest first."""
        models = self._client.models()
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield result_of(anext(models))

    close = _blocking(AsyncClient.close)
    status = _blocking(AsyncClient.status)
    plan = _blocking(AsyncClient.plan)
    create_model = _blocking(AsyncClient.create_model)
    model = _blocking(AsyncClient.model)
    wait = _blocking(AsyncClient.wait)
    cancel_model = _blocking(AsyncClient.cancel_model)
    continue_model = _blocking(AsyncClient.continue_model)
    delete_model = _blocking(AsyncClient.delete_model)
    export = _blocking(AsyncClient.export)
    generate = _blocking(AsyncClient.generate)
    generate_within = _blocking(AsyncClient.generate_within)
    create_generation = _blocking(AsyncClient.create_generation)
    generation = _blocking(AsyncClient.generation)
    wait_generation = _blocking(AsyncClient.wait_generation)
    create_task = _blocking(AsyncClient.create_task)
    tasks = _blocking(AsyncClient.tasks)
    delete_task = _blocking(AsyncClient.delete_task)


@dataclass
class _Hearing:
    """State of a stream of events: where to go on after it broke off."""

    path: str
    on_event: OnEvent | None
    last_id: str = "0"

    def hear(self, event: ServerSentEvent) -> None:
        if not event.data:
            return  # a comment, which keeps the connection, after an event
        self.last_id = event.id or self.last_id
        if self.on_event is not None:
            self.on_event(event.event, json.loads(event.data))

    @property
    def headers(self) -> dict[str, str]:
        return {"Last-Event-ID": self.last_id}


@contextlib.contextmanager
def _archive(images: Path | IO[bytes]) -> Iterator[tuple[IO[bytes], list[Skipped]]]:
    """Open an upload as a file that can be read again from where it stands, and what is left out
    of it."""
    if isinstance(images, Path):
        with packed(images) as opened:
            yield opened
    else:
        yield images if images.seekable() else io.BytesIO(images.read()), []


def _unpack(file: IO[bytes], into: Path) -> None:
    file.seek(0)
    into.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=file) as tar:
        tar.extractall(into, filter="data")


def _images(record: GenerationResponse) -> list[GeneratedImage]:
    return [
        GeneratedImage(base64.b64decode(image.b64_png), image.class_label, image.seed)
        for image in record.images
    ]


def _parsed(kind: type[M], answer: httpx.Response) -> M:
    """Parse an answer. Raises FineserveError."""
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError as error:
        raise _unknown(answer, "something else") from error


async def _accepted(answer: httpx.Response) -> httpx.Response:
    """Pass an answer on that is no refusal. Raises FineserveError."""
    if answer.is_success:
        return answer
    try:
        problem = json.loads(await answer.aread())
        kind = str(problem["type"]).rpartition(":")[2]
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        raise _unknown(answer, str(answer.status_code)) from None
    raise FineserveError(answer.status_code, kind, detail, problem)


def _unknown(answer: httpx.Response, what: str) -> FineserveError:
    detail = f"{answer.url} answered {what}: is that fineserve?"
    return FineserveError(answer.status_code, "unknown", detail, {})
