from registry.store import PREVIEWS_FILE, family_name
from tests.service.conftest import Stack


def test_a_family_is_listed_and_found_by_its_name(stack: Stack) -> None:
    (family,) = stack.told("/families")["families"]
    assert family["class_names"][3] == "star"
    assert family["quality"]["source"] == "made up"
    assert stack.told("/families/tiny") == family
    assert stack.api.get("/families/huge").status_code == 404


def test_previews_of_a_family_are_those_that_a_worker_has_stored(stack: Stack) -> None:
    assert stack.api.get("/families/tiny/previews.png").status_code == 410
    (family,) = stack.runtime.repository.families()
    stack.runtime.store.put(family_name(family.fingerprint), {PREVIEWS_FILE: b"a sheet"}, {})
    answer = stack.api.get("/families/tiny/previews.png")
    assert (answer.content, answer.headers["content-type"]) == (b"a sheet", "image/png")
    assert stack.api.get("/families/huge/previews.png").status_code == 404
