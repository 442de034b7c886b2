"""The paper's tables for the README; a cell that is not measured yet is a hyphen."""

from collections.abc import Iterable
from typing import Any

from benchmarks.paper.rows import LAYER_STEPS, OURS, SIZES, TASKS, Row, cell
from benchmarks.parts import Table

STAGES = {"A": "300 steps", "B": "500 steps", "C": "2,667 steps"}


def _fd(rows: list[Row], **wanted: object) -> str:
    """Mean and, of several seeds, spread."""
    found = cell(rows, **wanted)
    if found is None:
        return "-"
    return f"{found.mean:.0f}" + (f" ± {found.spread / 2:.0f}" if found.rows > 1 else "")


def _values(rows: Iterable[Row], table: str, name: str) -> list[Any]:
    """Values of one part of a table's keys, in order of appearance."""
    keys = (row["key"] for row in rows)
    found = [key[name] for key in keys if key.get("table") == table and name in key]
    return list(dict.fromkeys(found))


def depth(result: dict[str, Any]) -> Table:
    rows = result["rows"]
    depths = sorted(_values(rows, "depth", "depth"))
    table: Table = [("after", "method", *(f"L{d}" for d in depths))]
    measured = _values(rows, "depth", "stage")
    for stage, after in STAGES.items():
        for method in _values(rows, "depth", "method") if stage in measured else ():
            wanted = {"table": "depth", "method": method, "stage": stage}
            cells = [_fd(rows, depth=d, **wanted) for d in depths]
            table.append((after, _strong(method, OURS), *cells))
    return table


def cost(result: dict[str, Any]) -> Table:
    rows = result["rows"]
    depths = sorted(_values(rows, "cost", "depth"))
    ours = {"table": "depth", "method": OURS, "stage": "B"}
    table: Table = [("", *(f"L{d}" for d in depths))]
    table.append(("**fine any-size**, s steps", *(_fd(rows, depth=d, **ours) for d in depths)))
    for multiple in sorted(_values(rows, "cost", "multiple")):
        cells = [_fd(rows, table="cost", depth=d, multiple=multiple) for d in depths]
        table.append((f"scratch, {multiple} s steps", *cells))
    return table


def totals(result: dict[str, Any]) -> Table:
    rows = [row for row in result["rows"] if row["key"].get("table") == "totals"]
    counts = _values(rows, "totals", "n")
    table: Table = [("", "", *(str(n) for n in counts))]
    for what, named, unit in (
        (LAYER_STEPS, "training steps x layers, of so many sizes", 1e3),
        (SIZES, "stored (FINE: Σ alone), of so many sizes", 1e6),
        (TASKS, "stored (FINE: Σ alone), of so many tasks", 1e6),
    ):
        of_it = [row for row in rows if row["key"]["what"] == what]
        for method in _values(of_it, "totals", "method"):
            cells = [row["total"] / unit for row in of_it if row["key"]["method"] == method]
            told = [f"{c:.0f},000" if unit == 1e3 else f"{c:.2f} MB" for c in cells]
            table.append((named, _strong(method, OURS), *told))
    return table


def ablations(result: dict[str, Any]) -> Table:
    rows, at_six = result["rows"], {"table": "depth", "depth": 6}
    forms = {"fixed-depth": "fine as published", "any-size": OURS}
    table: Table = [("what", "as", "fixed-depth family", "any-size family")]
    for initialisation in _values(rows, "sigma", "sigma"):
        cells = [_fd(rows, table="sigma", sigma=initialisation, form=form) for form in forms]
        table.append(("Σ, then everything trained", initialisation, *cells))
    trained = [_fd(rows, **at_six, method=method, stage="B") for method in forms.values()]
    table.append(("Σ, then everything trained", "trained", *trained))
    prefixes = [row["key"] for row in rows if row["key"].get("table") == "prefix"]
    for rank in sorted({key["rank"] for key in prefixes}):
        cells = [_fd(rows, table="prefix", rank=rank, form=form) for form in forms]
        table.append(("the longest components, Σ retrained", str(rank), *cells))
    whole = [_fd(rows, **at_six, method=method, stage="A") for method in forms.values()]
    table.append(("the longest components, Σ retrained", "all", *whole))
    return table


def tasks(result: dict[str, Any]) -> Table:
    rows = result["rows"]
    names, shots = _values(rows, "task", "task"), sorted(_values(rows, "task", "shots"))
    table: Table = [("method", *(f"{name}, {n} a class" for name in names for n in shots))]
    for method in _values(rows, "task", "method"):
        cells = [
            _fd(rows, table="task", task=name, shots=n, method=method)
            for name in names
            for n in shots
        ]
        table.append((method, *cells))
    return table


def budget(result: dict[str, Any]) -> Table:
    """What each approach has at a budget: of several seeds the first's, and the mean FD."""
    rows = [row for row in result["rows"] if row["key"].get("table") == "budget"]
    table: Table = [("budget", "approach", "made", "memory", "latency", "FD")]
    for row in rows:
        key = {name: value for name, value in row["key"].items() if name != "seed"}
        if row["key"].get("seed", 0):
            continue
        approach, of = key["approach"], key.get("of", "memory")
        limit = f"{100 * key['share']:.3g}% of the {of}"
        if "fd" not in row:
            table.append((limit, approach, "nothing fits", "", "", ""))
            continue
        made = f"L{row['depth']}" + (f" r{row['rank']} {row['mode']}" if "rank" in row else "")
        memory = (row.get("memory") or row["memory_bytes"]) / 1e6
        latency = (row.get("latency") or row["latency_seconds"]) * 1e3
        figures = f"{made}, {row['dtype']}", f"{memory:.2f} MB", f"{latency:.0f} ms"
        table.append((limit, _strong(approach, "fine"), *figures, _fd(rows, **key)))
    return table


def shipped(result: dict[str, Any]) -> Table:
    s = result["summary"]
    rows = {r["key"]["shipped"]: r for r in result["rows"] if "shipped" in r["key"]}
    quality, unseen, sigma = (rows.get(name) for name in ("quality", "unseen", "sigma"))
    table: Table = [("`families/fashion`", "")]
    if quality is not None:
        for guidance in ("1", "2"):
            q = quality[f"guidance {guidance}"]
            told = f"{q['fd']:.0f} · {q['class_accuracy']:.1%}"
            table.append((f"FD · class accuracy of 5,000 samples, guidance {guidance}", told))
        table.append(("FD of 5,000 real images", f"{s['fashion_fd_floor']:.0f}"))
    if unseen is not None:
        size = f"depth {unseen['depth']}, rank {unseen['rank']}"
        told = f"{unseen['loss']:.4f} → {unseen['loss_retrained']:.4f}"
        table.append((f"never trained at {size}: held-out loss before → after Σ", told))
    if sigma is not None:
        told = f"{sigma['before_seconds']:.0f} s → {sigma['seconds']:.0f} s"
        table.append(("300 Σ steps at full size: float32, batches of 32 → now", told))
    return table


def emoji(result: dict[str, Any]) -> Table:
    table: Table = [
        (
            "style",
            "training images",
            "held-out loss before → after Σ",
            "nearest training image: of samples · of unseen images",
            "nearer than 99 % of unseen images are",
        )
    ]
    for row in result["rows"]:
        if "style" in row["key"]:
            learned = f"{row['loss_before']:.4f}" + (
                f" → {row['loss']:.4f}" if row["steps"] else " (its own)"
            )
            near = f"{row['nearest_median']:.0f} · {row['nearest_median_of_unseen']:.0f} of 255"
            copies = f"{row['nearer_than_99_percent_of_unseen']:.1%} of samples"
            table.append((row["key"]["style"], str(row["images"]), learned, near, copies))
    return table


def _strong(name: str, ours: str) -> str:
    return f"**{name}**" if name == ours else name
