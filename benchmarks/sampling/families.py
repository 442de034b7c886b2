"""The families that are sampled, their real images, and those of an earlier commit."""

import functools
from pathlib import Path

from benchmarks.baseline import checkout
from benchmarks.parts import REPOSITORY
from learngenes.family.family import Family, load_family
from learngenes.training.pictures import Judge, pictures_config

DATA = {
    "fashion": Path("/usr/share/datasets/fashion-mnist"),
    "emoji": REPOSITORY / "var" / "data" / "emoji",
}


def shipped(name: str) -> Family:
    return load_family(REPOSITORY / "families" / name)


def before(name: str) -> Family:
    return load_family(checkout() / "families" / name)


@functools.cache
def judge(name: str) -> Judge:
    return pictures_config(shipped(name), DATA[name]).judge
