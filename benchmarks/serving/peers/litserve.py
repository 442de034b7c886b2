"""LitServe with dynamic batching, as in its guide "Batching"."""

import litserve as ls
from fastapi import Response

from benchmarks.serving.peers.pipeline import Pipelines, Request, Settings


class GenerateAPI(ls.LitAPI):
    def __init__(self, settings: Settings) -> None:
        super().__init__(
            api_path="/generate",
            max_batch_size=settings.max_batch_size,
            batch_timeout=settings.batch_timeout,
        )
        self.settings = settings

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        self.pipelines = Pipelines(self.settings)

    def decode_request(self, request: dict[str, object]) -> Request:
        return Request.model_validate(request)

    def batch(self, inputs: list[Request]) -> list[Request]:
        return inputs

    def predict(self, requests: list[Request]) -> list[bytes]:
        return self.pipelines.generate(requests)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


def main() -> None:
    settings = Settings.read()
    server = ls.LitServer(
        GenerateAPI(settings), accelerator="cpu", workers_per_device=1, timeout=False
    )
    server.run(
        host="127.0.0.1", port=settings.port, generate_client_file=False, log_level="warning"
    )


if __name__ == "__main__":
    main()
