"""The command that shows the store as a web page."""

import click

from pear_store.cli.group import main, open_store, store_option
from pear_store.errors import PearStoreError
from pear_store.terminal import echo


@main.command()
@click.option(
    "--port",
    default=8091,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="The port to listen on. 0: any free one.",
)
@store_option
def ui(port: int) -> None:
    """Show the store in a browser on this machine, until Ctrl-C: tasks, versions, what they share, and how it grew.

    Nothing can be changed there. Needs Starlette and uvicorn (pip install 'pear-adapters[serve]').
    """
    try:
        from pear_store.ui.server import HOST, listen, serve
    except ImportError as error:
        raise PearStoreError(f"ui needs Starlette and uvicorn: {error}; pip install 'pear-adapters[serve]'") from None
    with open_store() as store, listen(port) as listener:
        echo(f"http://{HOST}:{listener.getsockname()[1]}/ shows {store.where}; Ctrl-C ends it")
        serve(store, listener)
