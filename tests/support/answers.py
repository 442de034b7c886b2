"""Refusals of the service, as a client gets them."""

from typing import Any

import httpx

LATER = (429, 503, 507)
"""Statuses of what may be accepted when it is sent again."""


def refused(answer: httpx.Response, status: int, told: str = "", kind: str = "") -> dict[str, Any]:
    """Problem document of a refusal of a kind, whose detail has `told` in it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert status == 409 or ("retry-after" in answer.headers) == (status in LATER)
    problem: dict[str, Any] = answer.json()
    assert told in problem["detail"]
    assert not kind or problem["type"] == f"urn:fineserve:problem:{kind}"
    return problem
