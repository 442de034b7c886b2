"""/openapi.json, beyond what FastAPI makes of the routes."""

import pytest

from registry.settings import Settings
from service.app import make_app


@pytest.mark.parametrize(
    ("maker", "name"),
    [("/models", "model_id"), ("/generate", "generation_id"), ("/tasks", "task_id")],
)
def test_what_an_answered_id_is_good_for(maker: str, name: str) -> None:
    paths = make_app(Settings()).openapi()["paths"]
    using = {
        operation["operationId"]
        for path, operations in paths.items()
        if f"{{{name}}}" in path
        for operation in operations.values()
    }
    assert using
    answers = paths[maker]["post"]["responses"]
    for links in [answer["links"] for status, answer in answers.items() if status[0] == "2"]:
        assert {link["operationId"] for link in links.values()} == using
        assert all(link["parameters"] == {name: "$response.body#/id"} for link in links.values())


def test_a_refusal_is_a_problem_document() -> None:
    paths = make_app(Settings()).openapi()["paths"]
    for path in paths.values():
        for operation in path.values():
            assert [*operation["responses"]["4XX"]["content"]] == ["application/problem+json"]
            assert "422" not in operation["responses"]
