"""`fineserve`: every command, each imported with what it needs alone."""

import contextlib
import io
import logging
import sys

import typer

from fineserve.cli import datasets, deployment, families, keys, models, plan

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
cli.add_typer(deployment.cli)
cli.add_typer(plan.cli)
cli.add_typer(families.cli)
cli.add_typer(models.cli, name="models")
cli.add_typer(datasets.cli, name="tasks")
cli.add_typer(keys.cli, name="keys")
cli.command()(models.generate)


@cli.callback()
def fineserve() -> None:
    """On-demand model sizing: send a budget, get a diffusion transformer that fits it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal that knows ASCII alone
    with contextlib.suppress(ModuleNotFoundError):  # what the client alone needs logs nothing
        from registry.logs import configure_logging

        configure_logging("console")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    for library in ("torchao", "torch.utils._pytree", "diffusers"):  # of kernels that nobody needs
        logging.getLogger(library).setLevel(logging.ERROR)
