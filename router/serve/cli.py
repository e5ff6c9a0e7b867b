"""Serve the tasks of a store over HTTP. Requests for different tasks share batches on one backbone.

\b
    pear-serve --store pear.store --backbone MODEL
    curl -H 'Content-Type: image/jpeg' --data-binary @cat.jpg localhost:8090/v1/tasks/dtd/predict

By default only this machine can reach it. With another --host, it needs a token, or --no-auth. Tokens come from
--token-file: line 1 is the token to use tasks, line 2 the token to manage the server. Without the file they come from
$PEAR_SERVE_TOKEN and $PEAR_SERVE_MANAGE_TOKEN. Clients send 'Authorization: Bearer TOKEN'.

After SIGTERM or Ctrl-C it accepts no more requests, finishes those that wait, and exits with 0. After SIGHUP, and every
--refresh-s seconds, it takes over changes of the store. If the device fails, it exits with 1.

docs/serving.md describes the API and the limits.
"""

import ipaddress
import json
import logging
import os
import socket
import sys
from pathlib import Path

import click
import torch
import uvloop
from platformdirs import user_data_path

from pear_store import PearStoreError, Store
from pear_store.remote.cache import CacheSettings
from pear_store.terminal import NumberRange, echo, printable, version_option
from router import Router, RouterError
from router.pictures import MAX_PIXELS
from router.serve.app import create_app
from router.serve.batcher import Batcher
from router.serve.catalogue import Catalogue
from router.serve.limits import RequestLimits
from router.serve.metrics import Metrics
from router.serve.server import serve_until_told
from router.serve.tokens import check_tokens
from router.threads import compute_alone

LIMITS = RequestLimits()


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@version_option
@click.option(
    "--store", "where", type=click.Path(), envvar="PEAR_STORE", default=str(user_data_path("pear") / "store"),
    help="Store of the tasks: a directory, or a remote's URL, which is read through a cache [default: $PEAR_STORE, "
    "else the user's data directory].",
)  # fmt: skip
@click.option(
    "--cache-bytes", type=click.IntRange(1), envvar="PEAR_CACHE_BYTES", show_default="$PEAR_CACHE_BYTES, else 10 GiB",
    help="The most bytes of a remote to cache on this machine, in $PEAR_CACHE_DIR or the user's cache directory.",
)  # fmt: skip
@click.option("--backbone", default="pear_tiny", show_default=True, help="A timm model's name.")
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@click.option("--device", help="Device to compute on, such as cpu [default: cuda if there is one].")
@click.option(
    "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    help="Precision of the forward.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=8090,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0: any free port.",
)
@click.option("--max-batch", default=64, show_default=True, type=click.IntRange(1), help="Most rows of a batch.")
@click.option(
    "--max-wait-ms", default=0.0, show_default=True, type=NumberRange(0, 60_000),
    help="Most milliseconds that a batch waits to become full.",
)  # fmt: skip
@click.option("--queue", default=1024, show_default=True, type=click.IntRange(1), help="Most images that may wait.")
@click.option(
    "--timeout-s", default=LIMITS.timeout_s, show_default=True, type=NumberRange(0, min_open=True),
    help="Most seconds from the end of a request's body to its answer.",
)  # fmt: skip
@click.option(
    "--drain-s", default=30.0, show_default=True, type=NumberRange(0, 86_400),
    help="Most seconds for waiting requests when the server ends.",
)  # fmt: skip
@click.option("--slot-bytes", type=click.IntRange(1), help="Most bytes that loaded tasks may take [default: no limit].")
@click.option("--preload", help="Tasks to load before the first request: comma-separated names, or all.")
@click.option(
    "--refresh-s", default=60.0, show_default=True, type=NumberRange(0),
    help="Seconds between two checks of the store for changes; 0: never.",
)  # fmt: skip
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="File of tokens: line 1 to use tasks, line 2 to manage the server.",
)
@click.option("--no-auth", is_flag=True, help="Serve other machines without a token.")
@click.option(
    "--allowed-host", "hosts", multiple=True,
    help="A name by which clients call the server, beside localhost and addresses; several are allowed, '*' is any "
    "[default: none; with a token or --no-auth any].",
)  # fmt: skip
@click.option(
    "--max-body-bytes",
    default=LIMITS.body_bytes,
    show_default=True,
    type=click.IntRange(1),
    help="Most bytes of a request's body.",
)
@click.option(
    "--max-images", default=LIMITS.images, show_default=True, type=click.IntRange(1), help="Most images in a request."
)
@click.option(
    "--max-tasks", default=LIMITS.tasks, show_default=True, type=click.IntRange(1), help="Most tasks for one image."
)
@click.option(
    "--max-pixels", default=MAX_PIXELS, show_default=True, type=click.IntRange(1),
    help="Refuse pictures with more pixels, before they are decoded.",
)  # fmt: skip
@click.option(
    "--root", type=click.Path(path_type=Path), help="Let requests name images below this directory [default: none]."
)
@click.option("--allow-urls", is_flag=True, help="Let requests name images by http(s) URLs of public addresses.")
@click.option("--log-json", is_flag=True, help="Log in JSON, one object per line.")
def main(
    where: str, cache_bytes: int | None, backbone: str, weights: str | None, device: str | None, dtype: str,
    host: str, port: int, max_batch: int, max_wait_ms: float, queue: int, timeout_s: float, drain_s: float,
    slot_bytes: int | None, preload: str | None, refresh_s: float, token_file: Path | None, no_auth: bool,
    hosts: tuple[str, ...],
    max_body_bytes: int, max_images: int, max_tasks: int, max_pixels: int, root: Path | None, allow_urls: bool,
    log_json: bool,
) -> None:  # fmt: skip
    compute_alone()  # forwards run in another thread
    use, manage = _tokens(token_file)
    if not (_is_loopback(host) or use or no_auth):
        raise click.UsageError(
            f"--host {host}: other machines can reach it: give a token by --token-file or $PEAR_SERVE_TOKEN, "
            "or give --no-auth"
        )
    _set_logging_up(log_json)
    limits = RequestLimits(body_bytes=max_body_bytes, images=max_images, tasks=max_tasks, timeout_s=timeout_s)
    try:
        place = where if "://" in where else Path(where).expanduser()
        with Store.open(place, cache=CacheSettings(limit_bytes=cache_bytes)) as store:
            router = Router(
                backbone, store, weights=weights, device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
                dtype="auto" if dtype == "auto" else getattr(torch, dtype), slot_bytes=slot_bytes,
                max_pixels=max_pixels,
            )  # fmt: skip
            if preload is not None:
                names = list(Catalogue(router).tasks()) if preload == "all" else preload.split(",")
                router.preload([name.strip() for name in names]).result()
            metrics = Metrics()
            batcher = Batcher(router, max_batch=max_batch, max_wait_ms=max_wait_ms, queue=queue, watch=metrics)
            app = create_app(
                router, batcher=batcher, limits=limits, use_token=use, manage_token=manage,
                allowed_hosts=hosts if hosts or not (use or no_auth) else None, root=root,
                allow_urls=allow_urls, drain_s=drain_s, counted=metrics.counted,
                more_routes=[metrics.route(router, batcher)],
            )  # fmt: skip
            with _listen(host, port) as listener:
                shown = f"[{host}]" if ":" in host else host
                echo(f"serving on http://{shown}:{listener.getsockname()[1]}", err=True)
                drained = uvloop.run(serve_until_told(app, listener, drain_s, refresh_s))
            if not drained:  # the device may work for a long time, so do not wait for it
                echo("some requests were not finished in time", err=True)
                sys.stderr.flush()
                os._exit(0)
    except (RouterError, PearStoreError) as error:
        raise _failure(str(error), getattr(error, "exit_code", 1)) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _failure(f"out of memory: give a smaller --slot-bytes or --max-batch; {error}") from None


def _tokens(file: Path | None) -> tuple[str | None, str | None]:
    """The token to use tasks and the one to manage the server."""
    if file is None:
        names = ("PEAR_SERVE_TOKEN", "PEAR_SERVE_MANAGE_TOKEN")
        found = [os.environ.get(name) or None for name in names]
        where = ("$" + names[0], "$" + names[1])
    else:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise _failure(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        found = [line.strip() or None for line in [*lines[:2], "", ""][:2]]
        where = (f"{file}, line 1", f"{file}, line 2")
        if found[0] is None:
            raise _failure(f"{where[0]}: expected a token, found an empty line")
    use, manage = found
    try:
        check_tokens(use, manage, where)
    except RouterError as error:
        raise _failure(str(error)) from None
    return use, manage


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise _failure(
            f"--host {host} --port {port}: cannot listen there: {error.strerror or error}: choose others"
        ) from None
    listener.setblocking(False)
    return listener


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "name": record.name}
        line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _LineFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _set_logging_up(as_json: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if as_json else _LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # else it logs every form that cannot be read


def _failure(text: str, exit_code: int = 1) -> click.ClickException:
    failure = click.ClickException(printable(text))
    vars(failure)["exit_code"] = exit_code
    return failure


if __name__ == "__main__":
    main()
