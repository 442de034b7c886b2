"""Table 3: which part of FINE does what. Sharing is in table 1: scratch, SVD, FINE as published."""

import itertools

import torch

from benchmarks.paper import initialisations
from benchmarks.paper.ancestors import FORMS
from benchmarks.paper.depth import choices
from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import (
    FINE,
    later_stage,
    retrained,
    taught_by,
    train_all,
    written_out,
)
from benchmarks.paper.rows import Row
from benchmarks.paper.setting import Setting
from learngenes.config import Size
from learngenes.family.family import Family
from learngenes.model import sigma
from learngenes.model.factors import Scales

Case = tuple[str, str, int | str, int]
METHOD_OF = {form: method for method, form in FINE.items()}
INITIALISATIONS = ("random", "identical", "linear")


def cases(setting: Setting) -> list[Case]:
    published, ours = (
        itertools.product(["prefix"], [form], (rank // 4, rank // 2), setting.seeds)
        for form, rank in zip(FORMS, (setting.published_rank, setting.network.rank), strict=True)
    )
    sigmas = itertools.product(["sigma"], FORMS, INITIALISATIONS, setting.seeds)
    return [*sigmas, *published, *ours]


def measure(lab: Lab, kind: str, form: str, value: int | str, seed: int) -> list[Row]:
    if kind == "sigma":
        return [_initialised(lab, form, str(value), seed)]
    return [_cut(lab, form, int(value), seed)]


def _initialised(lab: Lab, form: str, initialisation: str, seed: int) -> Row:
    """Everything trained from a Sigma that was not: `trained` is FINE's own row of table 1."""
    setting = lab.setting
    key = {"table": "sigma", "form": form, "sigma": initialisation, "seed": seed}
    if not lab.rows.has(key):
        choice = choices(lab, METHOD_OF[form])["B"]
        torch.manual_seed(seed)
        family = lab.ancestors.fine(form)
        size = Size(depth=setting.searched_depth, rank=family.full_size.rank)
        begun = written_out(family, _scales(family, size, initialisation, seed))
        model = train_all(
            begun,
            lab.ancestors,
            setting.sigma_steps,
            seed,
            choice.further,
            teacher=taught_by(lab.ancestors, METHOD_OF[form]),
            distillation=choice.distillation,
        )
        model = later_stage(lab.ancestors, METHOD_OF[form], model, "B", seed, choice)
        lab.judged(key, model, steps=setting.steps_until("B"))
    return lab.rows.get(key, dict)


def _scales(family: Family, size: Size, initialisation: str, seed: int) -> Scales:
    if initialisation == "random":
        generator = torch.Generator().manual_seed(seed)
        return initialisations.random(family.manifest.network, size, generator)
    made = {"identical": initialisations.identical, "linear": sigma.interpolated}[initialisation]
    return made(family.scales, size)


def _cut(lab: Lab, form: str, rank: int, seed: int) -> Row:
    """The longest components alone, and their Sigma retrained."""
    setting = lab.setting
    key = {"table": "prefix", "form": form, "rank": rank, "seed": seed}
    if not lab.rows.has(key):
        rate = choices(lab, METHOD_OF[form])["A"].first
        torch.manual_seed(seed)
        family = lab.ancestors.fine(form)
        begun = family.scales_of(Size(depth=setting.searched_depth, rank=rank))
        scales = retrained(lab.ancestors, family, begun, seed, rate)
        lab.judged(key, written_out(family, scales), steps=setting.sigma_steps)
    return lab.rows.get(key, dict)
