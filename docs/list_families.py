"""Write docs/families.md from families/ and a training's file: `python docs/list_families.py`."""

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path

from learngenes.config import Frozen, NetworkConfig, SizeSpace
from learngenes.family.family import read_manifest, read_quality
from learngenes.training.config import (
    CondensationConfig,
    DataConfig,
    PretrainingConfig,
    TrainingConfig,
)

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "families.md"
DRAWN = {
    "fashion": "clothes, 28 x 28, grey",
    "emoji": "emoji, 32 x 32, in colour",
    "emoji-latents": "the same emoji as latents, decoded to 32 x 32",
}
HEAD = """# Families

A family is one set of weights from which models of every size are cut: U and V, which all sizes
share, and what the service needs to know of each size (Σ, the scales by which a layer uses U and V;
a table of how good each size is). Made from `families/` and the configuration's classes by
`docs/list_families.py`.

## Those that come with fineserve

| family | draws | layers x rank | classes | trained | of it, on disk | licence of the images |
|---|---|---|---|---|---|---|
"""
CONFIGURATION = """
Beside each are its samples (`samples.png`) and what each size is worth (`quality.json`), which
plans quote.

## The file that trains one

`families/fashion/config.toml`, whole:

```toml
{config}```

Every field that such a file can have; a field without a default is needed.

"""
SECTIONS: dict[str, type[Frozen]] = {
    "top level, of `fineserve pretrain`": PretrainingConfig,
    "top level, of `fineserve condense`": CondensationConfig,
    "`[data]`": DataConfig,
    "`[network]`": NetworkConfig,
    "`[sizes]`": SizeSpace,
    "`[training]`": TrainingConfig,
}


def page() -> str:
    rows = "".join(_row(path.parent) for path in sorted((ROOT / "families").glob("*/family.json")))
    config = (ROOT / "families" / "fashion" / "config.toml").read_text()
    tables = "\n".join(f"### {name}\n\n{_fields(of)}" for name, of in SECTIONS.items())
    return HEAD + rows + CONFIGURATION.format(config=config) + tables


def _row(directory: Path) -> str:
    manifest = read_manifest(directory)
    network, megabytes = manifest.network, sum(f.stat().st_size for f in directory.iterdir()) / 1e6
    quality = read_quality(directory, manifest)
    judged = "by its pictures" if quality and quality.pictures else "by its loss"
    licence = re.sub(r"\((https?://\S+)\)", r"(<\1>)", manifest.licence)
    return (
        f"| `{manifest.name}` | {DRAWN.get(manifest.name, '')} | {network.depth} x {network.rank} "
        f"| {len(manifest.class_names)} | {manifest.trained_steps:,} steps, judged {judged} "
        f"| {megabytes:.1f} MB | {licence} |\n"
    )


def _fields(of: type[Frozen]) -> str:
    told = _docstrings(of)
    rows = ["| field | default | |\n|---|---|---|\n"]
    for name, field in of.model_fields.items():
        if of is NetworkConfig and name == "autoencoder":  # it comes from a directory
            continue
        given, default = field.get_default(call_default_factory=True), "needed"
        if not field.is_required():
            default = f"`{json.dumps(given)}`" if isinstance(given, (int, float, str)) else "…"
        rows.append(f"| `{name}` | {default} | {' '.join(told[name].split())} |\n")
    return "".join(rows)


def _docstrings(of: type[Frozen]) -> dict[str, str]:
    """Docstring of each field, that of the classes that it inherits from among them."""
    found: dict[str, str] = {}
    for each in reversed([base for base in of.__mro__ if issubclass(base, Frozen)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(words))):
                    found[name] = words
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
