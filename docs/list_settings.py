"""Write docs/settings.md from registry/settings.py: `python docs/list_settings.py`."""

import re
from pathlib import Path
from typing import Any

from registry.settings import Settings

PAGE = Path(__file__).parent / "settings.md"
HEAD = """# Settings

Variables of the environment that every process reads at its start, where a value that cannot be is
refused. [Operations](operations.md) says when to change which. Made from `registry/settings.py` by
`docs/list_settings.py`.

| variable | value | default | |
|---|---|---|---|
"""
TYPES = {
    "boolean": "`true` or `false`",
    "integer": "whole number",
    "number": "number",
    "path": "path",
    "password": "secret",
    "string": "text",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}


def page() -> str:
    fields = Settings.model_json_schema()["properties"]
    rows = (
        f"| {_variable(name)} | {_value(field)} | {_default(field)} | {_meaning(field)} |\n"
        for name, field in fields.items()
    )
    return HEAD + "".join(rows)


def _variable(name: str) -> str:
    return f"`FINESERVE_{name.upper()}`"


def _meaning(field: dict[str, Any]) -> str:
    """Its docstring, which names other settings as Python does."""
    text = " ".join(field["description"].split())
    others = "|".join(Settings.model_fields)
    return re.sub(f"`({others})`", lambda match: _variable(match[1]), text)


def _value(field: dict[str, Any]) -> str:
    """What may be given, in words."""
    (kind,) = (kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null")
    if "enum" in kind:
        return " or ".join(f"`{choice}`" for choice in kind["enum"])
    bounds = (f"{sign} {kind[name]:g}" for name, sign in BOUNDS.items() if name in kind)
    return ", ".join([TYPES[kind.get("format", kind["type"])], *bounds])


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if isinstance(default, bool):
        default = str(default).lower()
    return "" if default in (None, "") else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page())
