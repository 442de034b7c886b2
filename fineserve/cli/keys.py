"""`fineserve keys …`: who may call the service. A running service heeds every change at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated

import typer
from rich.table import Table

from fineserve.cli.options import AsJson, echo, echo_table, fail
from registry.errors import KeysError
from registry.keys import ApiKey, Keys, Scope
from registry.settings import get_settings

cli = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")


@contextmanager
def _keys() -> Iterator[Keys]:
    try:
        yield Keys(get_settings().resolved_keys_file)
    except (KeysError, OSError) as error:
        fail(error)


@cli.command()
def create(
    owner: Annotated[str, typer.Option(help="models and images are seen by keys of one owner")],
    scope: Annotated[list[Scope], typer.Option(help="may be given several times")],
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    max_active: Annotated[
        int | None, typer.Option(min=1, help="of unfinished models, and of unfinished generations")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0, help="after which it expires")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and show it, this once. With the first one the service is open to nobody else."""
    with _keys() as keys:
        made, key = keys.create(
            owner,
            scope,
            requests_per_minute=requests_per_minute,
            max_active=max_active,
            valid_for=None if days is None else timedelta(days=days),
        )
    text = f"{made.id} of {owner}; it is not shown again:\n\n  export FINESERVE_API_KEY={key}\n"
    echo(text, {**_shown(made), "key": key}, as_json)


@cli.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List all keys, with their state."""
    with _keys() as keys:
        found = keys.all()
    table = Table("id", "owner", "scopes", "a minute", "at once", "expires", "")
    for key in found:
        limits = (str(limit or "") for limit in (key.requests_per_minute, key.max_active))
        expires = f"{key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else ""
        table.add_row(key.id, key.owner, ", ".join(key.scopes), *limits, expires, key.state)
    echo_table(table, [_shown(key) for key in found], as_json)


@cli.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="as `fineserve keys list` shows it")],
    as_json: AsJson = False,
) -> None:
    """Revoke a key from now on."""
    with _keys() as keys:
        revoked = keys.revoke(key_id)
    echo(f"{key_id} is revoked", _shown(revoked), as_json)


def _shown(key: ApiKey) -> dict[str, object]:
    return {**key.model_dump(mode="json", exclude={"sha256"}), "state": key.state}
