"""Additions to /openapi.json: refusals, and links from each answer to what its id is good for."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from service.problems import MEDIA_TYPE

MADE_BY = {"model_id": "/models", "generation_id": "/generate", "task_id": "/tasks"}
"""Path whose POST answers with an id, for each id in a path."""


class ProblemDocument(BaseModel):
    """RFC 9457; some kinds have further members."""

    model_config = ConfigDict(extra="allow")

    type: str
    """Stable: urn:fineserve:problem:KIND."""
    title: str
    status: int
    detail: str
    """Sentence that says what is wrong, and what to do."""


def complete(app: FastAPI) -> None:
    """Describe every refusal as a problem document, instead of FastAPI's own, and link every id."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            _describe_problems(schema)
            _link(schema["paths"])
        return made()

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_problems(schema: dict[str, Any]) -> None:
    schemas = schema["components"]["schemas"]
    schemas["ProblemDocument"] = ProblemDocument.model_json_schema()
    reference = {"$ref": "#/components/schemas/ProblemDocument"}
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            for statuses, whose in (("4XX", "The request"), ("5XX", "The service")):
                operation["responses"][statuses] = {
                    "description": f"{whose} is at fault, or what it needs is missing.",
                    "content": {MEDIA_TYPE: {"schema": reference}},
                }
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)


def _link(paths: dict[str, Any]) -> None:
    for name, maker in MADE_BY.items():
        parameters = {name: "$response.body#/id"}
        links = {
            using["operationId"]: {"operationId": using["operationId"], "parameters": parameters}
            for path, operations in paths.items()
            if f"{{{name}}}" in path
            for using in operations.values()
        }
        for status, answer in paths[maker]["post"]["responses"].items():
            if status.startswith("2"):
                answer["links"] = links
