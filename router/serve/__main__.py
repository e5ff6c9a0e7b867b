"""Starts pear-serve, or prints in one line what must be installed."""

import sys

NEEDS = {"starlette", "uvicorn", "uvloop", "httptools", "python_multipart", "prometheus_client", "httpx"}


def main() -> None:
    try:
        from router.serve.cli import main as command
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in NEEDS:
            raise
        sys.exit(f"Error: pear-serve needs {error.name}: pip install 'pear-adapters[serve]'")
    command()


if __name__ == "__main__":
    main()
