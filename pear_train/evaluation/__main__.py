"""Starts pear-eval, or prints in one line what must be installed."""

import sys
from importlib import import_module

_NEEDED = {"sklearn": "scikit-learn", "scipy": "scipy", "jinja2": "jinja2"}


def main() -> None:
    for module, package in _NEEDED.items():
        try:
            import_module(module)
        except ModuleNotFoundError:
            sys.exit(f"Error: pear-eval needs {package}: pip install 'pear-adapters[eval]'")
    from pear_train.evaluation.cli import main as command

    command()


if __name__ == "__main__":
    main()
