"""The life of an app: it starts, becomes ready, refreshes, and ends."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from pear_store import PearStoreError
from router.errors import RouterError
from router.router import Router
from router.serve.batcher import Batcher
from router.serve.bodies import Held, Parser
from router.serve.catalogue import Catalogue
from router.serve.fetching import Fetcher
from router.serve.limits import RequestLimits
from router.serve.problems import DEVICE_FAILED, Problem

log = logging.getLogger(__name__)


class Life:
    """The parts of one app, from its start to its end.

    Args:
        drain_s: most seconds for waiting requests when the app ends.
    """

    def __init__(
        self,
        router: Router,
        batcher: Batcher,
        limits: RequestLimits,
        fetcher: Fetcher,
        drain_s: float,
    ) -> None:
        self.router, self.batcher, self.limits, self.fetcher = router, batcher, limits, fetcher
        self.catalogue = Catalogue(router)
        self.held, self.parser = Held(limits.held_bytes), Parser()
        self.drained = True
        """Whether all requests that waited when the app ended were finished."""
        self._drain_s = drain_s
        self._warming: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[bool] | None = None
        self._refreshing = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The lifespan of an app that runs by itself. A mounted app starts with its first request."""
        self.start()
        yield
        await self.end()
        self.fetcher.close()
        self.parser.close()

    async def end(self) -> None:
        """Admits no more requests and finishes those that wait. After the time limit the rest fail with an error."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self.batcher.close(self._drain_s))
        self.drained = await asyncio.shield(self._ending)

    def start(self) -> "asyncio.Task[None]":
        """Starts a first run of the backbone, unless it was already started."""
        if self._warming is None:
            self._warming = asyncio.get_running_loop().create_task(self._warm_up())
        return self._warming

    async def _warm_up(self) -> None:
        try:
            await self.batcher.warm_up()
        except Exception as error:
            log.error("the backbone does not run: %s", error)
            self.batcher.failed = error

    @property
    def why_not_ready(self) -> str | None:
        """Why no prediction can be made now. None if one can."""
        if self.batcher.failed is not None:
            return DEVICE_FAILED
        if self.batcher.draining:
            return "this server is shutting down"
        if self._warming is None or not self._warming.done():
            return "this server is starting: the backbone has not run yet"
        return None

    async def refresh(self) -> dict[str, int | None]:
        """Takes over changes of the store, see `Router.refresh`.

        Raises:
            PearStoreError: the store cannot be read; nothing changed.
        """
        async with self._refreshing:
            changed = await asyncio.to_thread(self.router.refresh)
            self.catalogue.forget()
        if changed:
            log.info("refreshed: %s", ", ".join(f"{name} is now {version}" for name, version in changed.items()))
        return changed

    async def try_refresh(self) -> None:
        """Like `refresh`. If the store cannot be read, it logs the error and keeps the known tasks."""
        try:
            await self.refresh()
        except (PearStoreError, RouterError) as error:
            log.error("the store could not be refreshed, the known tasks are kept: %s", error)

    async def refresh_every(self, seconds: float) -> None:
        """Refreshes again and again until it is cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.try_refresh()

    async def must_be_ready(self) -> None:
        if self._warming is None:  # a mounted app, which was not started
            await asyncio.shield(self.start())
        if (reason := self.why_not_ready) is not None:
            raise Problem(503, reason, headers={"Retry-After": "1"})
