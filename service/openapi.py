"""What /openapi.json says beyond what FastAPI finds out: every refusal is a problem document."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from service.problems import MEDIA_TYPE


class ProblemDocument(BaseModel):
    """RFC 9457; some kinds have further members."""

    model_config = ConfigDict(extra="allow")

    type: str
    """Stable: urn:fineserve:problem:KIND."""
    title: str
    status: int
    detail: str
    """What is wrong, and what to do."""


def describe_problems(app: FastAPI) -> None:
    """Adds them to each operation, instead of FastAPI's own word for what is invalid."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = made()
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
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
