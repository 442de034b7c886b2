import re

from fastapi.testclient import TestClient


def test_the_page_and_the_documentation_need_no_host_elsewhere(api: TestClient) -> None:
    for page in (api.get("/"), api.get("/docs")):
        assert page.status_code == 200
        linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(linked) >= 3
        for path in linked:
            assert "//" not in path
            assert api.get(f"/{path.lstrip('/')}").status_code == 200
    assert api.put("/models").json()["type"] == "urn:fineserve:problem:method-not-allowed"


def test_every_module_of_the_page_is_there(api: TestClient) -> None:
    seen, modules = set(), ["main.js"]
    while modules:
        name = modules.pop()
        if name in seen:
            continue
        seen.add(name)
        answer = api.get(f"/page/{name}")
        assert answer.status_code == 200, name
        assert "javascript" in answer.headers["content-type"]
        modules += re.findall(r'from "\./([^"]+)"', answer.text)
    assert {"budgets.js", "models.js", "playground.js", "health.js", "vendor/uplot.js"} <= seen
