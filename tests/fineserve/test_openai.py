"""OpenAI's own client against a real server."""

import base64
import io

import httpx
import openai
import pytest
from PIL import Image

from registry.settings import Settings
from tests.support.commands import made

FEW = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture
def sdk(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_the_same_images_as_from_generate(sdk: openai.OpenAI, url: str, working: None) -> None:
    model = made(url)
    assert [m.id for m in sdk.models.list()] == [model]
    assert sdk.models.retrieve(model).owned_by == "fineserve"
    answer = sdk.images.generate(
        model=model, prompt="star", n=2, size="8x8", response_format="b64_json", extra_body=FEW
    )
    assert answer.data is not None
    pngs = [base64.b64decode(image.b64_json or "") for image in answer.data]
    assert [Image.open(io.BytesIO(png)).size for png in pngs] == [(8, 8)] * 2
    body = {"model": model, "class_labels": ["star"], "n": 2, **FEW}
    ours = httpx.post(f"{url}/generate", json=body, trust_env=False).json()["images"]
    assert [base64.b64decode(image["b64_png"]) for image in ours] == pngs
    nothing = {"user": "u-1", "moderation": "low"}  # what the API takes and no image depends on
    same = sdk.images.generate(model=model, prompt="star", n=2, **nothing, extra_body=FEW)
    assert same.data == answer.data
    by_number = sdk.images.generate(model=model, prompt="3", n=2, extra_body=FEW)
    assert by_number.data == answer.data


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "stra"}, "did you mean star?"),
        ({"prompt": "99"}, "number from 0 to 4"),
        ({"prompt": "9" * 5000}, "number from 0 to 4"),
        ({"prompt": "a photo of a Star"}, "did you mean star?"),
        ({"size": "1024x1024"}, "makes images of 8x8"),
        ({"response_format": "url"}, "response_format"),
        ({"quality": "hd"}, "quality"),
        ({"style": "vivid"}, "style"),
        ({"n": 21}, "over this server's limit"),
        ({"model": "m-0123456789abcdef"}, "no model"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    sdk: openai.OpenAI, url: str, working: None, wrong: dict[str, object], message: str
) -> None:
    request = {"model": made(url), "prompt": "star", **wrong}
    kind = openai.NotFoundError if "model" in wrong else openai.BadRequestError
    with pytest.raises(kind, match=message) as refused:
        sdk.images.generate(**request)
    if "model" not in wrong:
        assert refused.value.body["message"]


def test_a_model_that_is_not_ready_is_not_found(sdk: openai.OpenAI, url: str) -> None:
    model = made(url, "--no-wait")
    assert list(sdk.models.list()) == []
    with pytest.raises(openai.NotFoundError, match="is queued"):
        sdk.models.retrieve(model)
    with pytest.raises(openai.ConflictError, match="is queued"):
        sdk.images.generate(model=model, prompt="star")


def test_what_takes_longer_than_an_answer_may_is_not_begun_again(
    url: str, settings: Settings, working: None
) -> None:
    model = made(url)
    settings.wait_seconds = 0
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2) as patient,
        pytest.raises(openai.InternalServerError, match="has its images later"),
    ):
        patient.images.generate(model=model, prompt="star", extra_body={"num_inference_steps": 100})
    status = httpx.get(f"{url}/status", trust_env=False).json()
    assert status["active_generations"] == 1
