"""The console command `eim_jax`, and `python -m eim_jax`."""

import sys


def cli() -> None:
    """Runs the command line; where its dependencies are not installed, says in one line how to get them."""
    try:
        from eim_jax.main import cli as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("eim_jax"):
            raise
        sys.exit(
            f"error: the command needs {error.name}, which is not installed: pip install '.[train]' in eim_jax's "
            "folder (without it the queue losses and the partition can be imported)"
        )
    run()


if __name__ == "__main__":
    cli()
