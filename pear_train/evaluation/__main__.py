"""Starts pear-eval, or says in a line what it needs."""

import sys

_NEEDED = {"sklearn": "scikit-learn", "scipy": "scipy", "jinja2": "jinja2"}


def main() -> None:
    try:
        from pear_train.evaluation.cli import main as command
    except ModuleNotFoundError as error:
        missing = _NEEDED.get(str(error.name).partition(".")[0])
        if missing is None:
            raise
        sys.exit(f"Error: pear-eval needs {missing}: pip install 'pear-adapters[eval]'")
    command()


if __name__ == "__main__":
    main()
