"""The HTTP API as the command line uses it."""

import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Self

import httpx
from httpx_sse import connect_sse

from registry.settings import get_settings

Answer = dict[str, Any]

REFUSED, UNREACHABLE = 1, 3
"""Exit codes; 2 is a wrong command line."""


class RemoteError(Exception):
    """The message says what to do; `exit_code`, for scripts, whether a repetition can help."""

    def __init__(self, message: str, exit_code: int = REFUSED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Remote:
    def __init__(self, url: str | None = None) -> None:
        """By default this host's own."""
        settings = get_settings()
        self.url = url or f"http://{settings.host}:{settings.port}"
        key = settings.api_key
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(30, read=330),
            headers={"authorization": f"Bearer {key.get_secret_value()}"} if key else {},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> Answer:
        return self._call("GET", path, params=query)

    def post(self, path: str, body: object, **headers: str) -> Answer:
        content = json.dumps(body)  # NaN, too: the service's refusal says more than httpx's
        headers = {"content-type": "application/json", **headers}
        return self._call("POST", path, content=content, headers=headers)

    def upload(self, path: str, file: IO[bytes], **query: str | None) -> Answer:
        given = {name: value for name, value in query.items() if value is not None}
        headers = {"content-type": "application/octet-stream"}
        return self._call("POST", path, params=given, content=file, headers=headers)

    def delete(self, path: str) -> None:
        self._call("DELETE", path)

    def unpack(self, path: str, into: Path, on_bytes: Callable[[int, int], None]) -> None:
        """Fetch a tar and extract it; `on_bytes` hears how many came, of how many."""
        with tempfile.TemporaryFile() as file:
            try:
                with self._http.stream("GET", path) as answer:
                    if answer.is_error:
                        answer.read()
                        raise self._refused(answer)
                    total = int(answer.headers.get("content-length", 0))
                    for chunk in answer.iter_bytes():
                        file.write(chunk)
                        on_bytes(file.tell(), total)
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error
            file.seek(0)
            with tarfile.open(fileobj=file) as tar:
                tar.extractall(into, filter="data")

    def events(self, path: str) -> Iterator[tuple[str, Answer]]:
        """Name and content of each, from the first one until the record is finished."""
        try:
            with connect_sse(self._http, "GET", path) as source:
                if source.response.status_code != httpx.codes.OK:
                    source.response.read()
                    raise self._refused(source.response)
                for event in source.iter_sse():
                    yield event.event, json.loads(event.data)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _call(self, method: str, path: str, **content: Any) -> Answer:
        try:
            answer = self._http.request(method, path, **content)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if answer.is_error:
            raise self._refused(answer)
        try:
            result: Answer = answer.json() if answer.content else {}
        except ValueError as error:
            raise RemoteError(f"{self.url}{path} answered no JSON: is that fineserve?") from error
        return result

    def _refused(self, answer: httpx.Response) -> RemoteError:
        try:
            return RemoteError(str(answer.json()["detail"]))
        except (ValueError, KeyError, TypeError):
            return RemoteError(f"{self.url} answered {answer.status_code}: is that fineserve?")

    def _unreachable(self, error: Exception) -> RemoteError:
        return RemoteError(
            f"no fineserve at {self.url} ({error}); `make up`, or say --url", UNREACHABLE
        )
