"""Table 3: which part of FINE does what. Sharing is in table 1: scratch, SVD, FINE as published."""

import itertools

import torch

from benchmarks.paper import initialisations
from benchmarks.paper.ancestors import FORMS
from benchmarks.paper.depth import learning_rates
from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import FINE, retrained, second_stage, train_all, written_out
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
    width = setting.network.width
    return [
        *itertools.product(["sigma"], FORMS, INITIALISATIONS, setting.seeds),
        *itertools.product(["prefix"], FORMS, (width // 2, width), setting.seeds),
        *itertools.product(["rank"], ["any-size"], (width // 2, width), setting.seeds),
    ]


def measure(lab: Lab, kind: str, form: str, value: int | str, seed: int) -> list[Row]:
    if kind == "sigma":
        return [_initialised(lab, form, str(value), seed)]
    if kind == "prefix":
        return [_cut(lab, form, int(value), seed)]
    return _of_rank(lab, form, int(value), seed)


def _initialised(lab: Lab, form: str, initialisation: str, seed: int) -> Row:
    """Everything trained from a Sigma that was not: `trained` is FINE's own row of table 1."""
    setting = lab.setting
    key = {"table": "sigma", "form": form, "sigma": initialisation, "seed": seed}
    if not lab.rows.has(key):
        _, rate = learning_rates(lab, METHOD_OF[form])
        torch.manual_seed(seed)
        family = lab.ancestors.fine(form)
        size = Size(depth=setting.searched_depth, rank=family.full_size.rank)
        begun = written_out(family, _scales(family, size, initialisation, seed))
        model = train_all(begun, lab.ancestors, setting.sigma_steps, seed, rate)
        model = second_stage(lab.ancestors, model, seed, rate)
        lab.judged(key, model, steps=setting.sigma_steps + setting.further_steps)
    return lab.rows.get(key, dict)


def _scales(family: Family, size: Size, initialisation: str, seed: int) -> Scales:
    if initialisation == "random":
        generator = torch.Generator().manual_seed(seed)
        return initialisations.random(family.manifest.network, size, generator)
    made = {"identical": initialisations.identical, "linear": sigma.interpolated}[initialisation]
    return made(family.scales, size)


def _cut(lab: Lab, form: str, rank: int, seed: int) -> Row:
    """A rank prefix with its Sigma retrained: trained at any rank, or cut from a full-rank one."""
    setting = lab.setting
    key = {"table": "prefix", "form": form, "rank": rank, "seed": seed}
    if not lab.rows.has(key):
        rate, _ = learning_rates(lab, METHOD_OF[form])
        torch.manual_seed(seed)
        family = lab.ancestors.fine(form)
        begun = family.scales_of(Size(depth=setting.searched_depth, rank=rank))
        scales = retrained(lab.ancestors, family, begun, seed, rate)
        lab.judged(key, written_out(family, scales), steps=setting.sigma_steps)
    return lab.rows.get(key, dict)


def _of_rank(lab: Lab, form: str, rank: int, seed: int) -> list[Row]:
    """A family of another rank, after stages A and B; 2 d is FINE's own row of table 1."""
    setting = lab.setting
    keys = [{"table": "rank", "rank": rank, "seed": seed, "stage": stage} for stage in "AB"]
    if not all(lab.rows.has(key) for key in keys):
        first, second = learning_rates(lab, METHOD_OF[form])
        torch.manual_seed(seed)
        family = lab.ancestors.fine(form, rank)
        begun = family.scales_of(Size(depth=setting.searched_depth, rank=rank))
        model = written_out(family, retrained(lab.ancestors, family, begun, seed, first))
        lab.judged(keys[0], model, steps=setting.sigma_steps)
        model = second_stage(lab.ancestors, model, seed, second)
        lab.judged(keys[1], model, steps=setting.sigma_steps + setting.further_steps)
    return [lab.rows.get(key, dict) for key in keys]
