from fastapi.testclient import TestClient

from tests.service.conftest import LOCAL


def test_an_unexpected_error_is_a_problem_without_details(api: TestClient) -> None:
    state = api.app.state
    state.fineserve.repository = None
    api = TestClient(api.app, LOCAL, raise_server_exceptions=False)
    answer = api.post("/models", json={"max_mem_gb": 4})
    assert answer.status_code == 500
    assert "NoneType" not in answer.text
