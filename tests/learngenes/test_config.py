import pytest
from pydantic import ValidationError

from learngenes.config import NetworkConfig, SizeSpace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "not a multiple of patch_size 3"),
        ({"num_attention_heads": 5}, "must be a multiple"),
        ({"depth": 1}, "greater than or equal to 2"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_impossible_shapes_are_refused(
    network: NetworkConfig, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        NetworkConfig.model_validate({**network.model_dump(), **change})


@pytest.mark.parametrize("depths", [(), (3, 2), (2, 2)])
def test_sizes_must_ascend(depths: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="ascending"):
        SizeSpace(depths=depths, ranks=(8,))
