"""Classes by the names or numbers that callers give."""

import difflib
import unicodedata
from collections.abc import Sequence

from service.problems import Problem


def resolve_classes(wanted: Sequence[int | str] | None, names: Sequence[str]) -> list[int]:
    """Class numbers of names or numbers; None is every class. Raises Problem 422."""
    if wanted is None:
        return list(range(len(names)))
    resolved = []
    for label in wanted:
        number = label if isinstance(label, int) else _number_of(label, names)
        name = str(label)
        if isinstance(label, int) and name in names and names.index(name) != label:
            raise Problem(
                422,
                "ambiguous-class",
                f"class {label} may be the one of that name or of that number, which is another: "
                f'send the name, "{label}"',
                field="class_labels",
            )
        if number is None or not 0 <= number < len(names):
            close = _close(str(label), names)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise Problem(
                422,
                "unknown-class",
                f"no class {label!r}; {hint}It is a number from 0 to {len(names) - 1} "
                f"or one of {', '.join(names)}",
                classes=list(names),
                field="class_labels",
            )
        resolved.append(number)
    return resolved


def _number_of(label: str, names: Sequence[str]) -> int | None:
    """Number of a class by its name, by its name in other letter case, or by its number."""
    label = unicodedata.normalize("NFC", label)
    if label in names:
        return names.index(label)
    folded = [name.casefold() for name in names]
    if label.casefold() in folded:
        return folded.index(label.casefold())
    return int(label) if label.isdecimal() and len(label) <= len(str(len(names))) else None


def _close(label: str, names: Sequence[str]) -> list[str]:
    """Names that are spelt like `label`, or are among its words."""
    folded = {name.casefold(): name for name in names}
    words = f" {label.casefold()} "
    among = [name for name in folded if f" {name} " in words]
    alike = difflib.get_close_matches(label.casefold(), folded, n=3, cutoff=0.5)
    return [folded[name] for name in [*among, *(a for a in alike if a not in among)][:3]]
