"""Samplings: which steps are guided, and what is left open to a plan."""

import pytest
from pydantic import ValidationError

from learngenes.config import Sampling, SamplingRequest, Scheduler, Size

CHOSEN = Sampling(
    num_inference_steps=8,
    scheduler=Scheduler.DPMSOLVER,
    guidance_scale=3,
    guidance_start=0.25,
    guidance_stop=0.75,
    guide=Size(depth=2, rank=8),
)


def test_guided_steps_are_rounded_as_diffusers_guiders_do() -> None:
    assert Sampling(num_inference_steps=5).guided == range(5)
    assert Sampling(num_inference_steps=5, guidance_scale=1).guided == range(0)
    assert CHOSEN.guided == range(2, 6)
    assert CHOSEN.model_copy(update={"num_inference_steps": 7}).guided == range(1, 5)


def test_what_is_left_open_is_what_was_chosen() -> None:
    assert SamplingRequest().over(CHOSEN) == CHOSEN
    asked = SamplingRequest(num_inference_steps=20).over(CHOSEN)
    assert asked == CHOSEN.model_copy(update={"num_inference_steps": 20})


@pytest.mark.parametrize(
    ("asked", "rest"),
    [
        ({"guidance_scale": 2}, {}),
        ({"guidance_scale": 1}, {}),
        ({"guidance_stop": 0.5}, {"guidance_scale": 2}),
        ({"guide": Size(depth=1, rank=8)}, {"guidance_scale": 2}),
    ],
)
def test_guidance_is_one_choice(asked: dict[str, object], rest: dict[str, object]) -> None:
    """Of half a guidance nobody has measured what the other half is worth."""
    neutral = {"guidance_start": 0, "guidance_stop": 1, "guide": None}
    expected = {**dict(CHOSEN), **neutral, **rest, **asked}
    assert SamplingRequest.model_validate(asked).over(CHOSEN) == Sampling.model_validate(expected)


def test_an_old_request_that_says_everything_is_what_it_was() -> None:
    old = {"num_inference_steps": 25, "guidance_scale": 2, "scheduler": "ddim"}
    assert SamplingRequest.model_validate(old).over(CHOSEN) == Sampling()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"guidance_start": 0.5, "guidance_stop": 0.5}, "stops at 0.5: let it stop after"),
        ({"guidance_start": 1}, "let it stop after it starts"),
        ({"guidance_stop": 1.5}, "less than or equal to 1"),
        ({"guidance_start": float("nan")}, "finite"),
        ({"guide": {"depth": 0, "rank": 8}}, "greater than 0"),
    ],
)
def test_a_guidance_that_cannot_be_is_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplingRequest.model_validate(asked)
