"""Starts pear-infer, or prints in one line what must be installed."""

import sys


def main() -> None:
    try:
        from router.infer.cli import main as command
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "pyarrow":
            raise
        sys.exit("Error: pear-infer needs pyarrow: pip install 'pear-adapters[infer]'")
    command()


if __name__ == "__main__":
    main()
