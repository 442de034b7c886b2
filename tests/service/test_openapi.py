"""/openapi.json, beyond what FastAPI makes of the routes."""

import pytest

from registry.settings import Settings
from service.app import make_app


@pytest.mark.parametrize(
    ("maker", "name", "some"),
    [
        ("/models", "model_id", {"get_model", "delete_model", "cancel_model", "export_model"}),
        ("/generate", "generation_id", {"get_generation", "cancel_generation"}),
        ("/tasks", "task_id", {"get_task", "delete_task", "get_preview"}),
    ],
)
def test_what_an_answered_id_is_good_for(maker: str, name: str, some: set[str]) -> None:
    answers = make_app(Settings()).openapi()["paths"][maker]["post"]["responses"]
    made = [answer for status, answer in answers.items() if status[0] == "2"]
    assert made
    for links in [answer["links"] for answer in made]:
        linked = [link["operationId"] for link in links.values()]
        assert all(any(one.startswith(f"{wanted}_") for one in linked) for wanted in some)
        assert all(link["parameters"] == {name: "$response.body#/id"} for link in links.values())


def test_a_refusal_is_a_problem_document() -> None:
    paths = make_app(Settings()).openapi()["paths"]
    for path in paths.values():
        for operation in path.values():
            assert [*operation["responses"]["4XX"]["content"]] == ["application/problem+json"]
            assert "422" not in operation["responses"]
