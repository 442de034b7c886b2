import sys

EXTRAS = dict.fromkeys(("typer", "rich", "pydantic_settings"), "cli")
"""Packages of other extras than the server's."""


def main() -> None:
    """Run the command line; a package that is missing is told in one line."""
    try:
        from fineserve.cli.main import cli

        cli()
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "", "server")
        sys.exit(f"{error.name} is not installed: pip install 'fineserve[{extra}]'")


if __name__ == "__main__":
    main()
