"""The command line, in the process of the test."""

import json

from click.testing import Result
from typer.testing import CliRunner

from fineserve.cli.main import cli


def run(*words: str, exit_code: int = 0) -> Result:
    """Result of `fineserve WORDS`, which ends with this exit code."""
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == exit_code, result.output
    return result


def made(url: str, *options: str) -> str:
    """Id of a model that the command line makes in 4 GB."""
    result = run("models", "create", "--max-mem-gb", "4", "--json", "--url", url, *options)
    return str(json.loads(result.stdout)["id"])
