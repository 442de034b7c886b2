"""/families: families that the workers hold."""

from fastapi import APIRouter, Response

from fineserve.wire import FamilyList, FamilyResponse
from registry.records import FamilyRecord
from registry.store import PREVIEWS_FILE, family_name
from service.access import Anybody
from service.deps import State, StateDep
from service.problems import Problem

router = APIRouter(prefix="/families", tags=["status"])


@router.get("")
def list_families(state: StateDep, _: Anybody) -> FamilyList:
    """Families that the workers hold, by name."""
    return FamilyList(families=[_shown(family) for family in state.repository.families()])


@router.get("/{name}")
def get_family(name: str, state: StateDep, _: Anybody) -> FamilyResponse:
    return _shown(_family(state, name))


@router.get("/{name}/previews.png", response_class=Response)
def get_previews(name: str, state: StateDep, _: Anybody) -> Response:
    """Samples of every size before retraining: a row each, by depth and then rank."""
    family = _family(state, name)
    sheet = state.store.read(family_name(family.fingerprint), PREVIEWS_FILE)
    return Response(sheet, media_type="image/png", headers={"Cache-Control": "max-age=3600"})


def _shown(family: FamilyRecord) -> FamilyResponse:
    return FamilyResponse.model_validate(family.model_dump(mode="json"))


def _family(state: State, name: str) -> FamilyRecord:
    if family := state.repository.family(name):
        return family
    raise Problem(404, "not-found", f"no family {name!r}; GET /families lists them")
