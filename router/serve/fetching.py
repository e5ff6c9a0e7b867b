"""Images that a request only names: files below a directory, and URLs. Nothing is opened unless that was asked for."""

import asyncio
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from pear_store.pools import ThreadPool
from router.errors import RouterError
from router.serve.errors import FetchError
from router.serve.problems import Problem

URL_S = 10.0
"""From the look-up of a name to the last byte, redirects included."""
REDIRECTS = 3
AT_A_TIME = 16
"""Most URLs that are fetched at the same time; others wait, within URL_S."""
MOST_TEXT = 4096
"""Characters of a path or URL."""


@dataclass(frozen=True)
class FilePath:
    text: str


@dataclass(frozen=True)
class Url:
    text: str


Place = FilePath | Url


class Fetcher:
    """Reads images that requests name.

    Args:
        root: files below it may be named; None for no files. Links below it are not followed.
        urls: whether http and https URLs may be named. They must lead to public addresses, each redirect too.
        most_bytes: of one image.
    """

    def __init__(self, root: Path | None, urls: bool, most_bytes: int) -> None:
        if root is not None and not os.path.isdir(root):
            raise RouterError(f"root {str(root)!r}: expected a directory")
        self._root, self._urls, self._most = root, urls, most_bytes
        self._names = ThreadPool(AT_A_TIME, "pear-serve-names")  # a slow name server holds up nothing else
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._tls: ssl.SSLContext | None = None

    def close(self) -> None:
        self._names.shutdown(wait=False, cancel_futures=True)

    async def images(self, images: Sequence[bytes | Place], count: Callable[[int], None]) -> list["bytes | FetchError"]:
        """The bytes of a request's images; where one that is named is not to be had, why.

        Args:
            count: is told of bytes that come; may raise.

        Raises:
            Problem: a path or URL, and none is opened here.
        """
        for number, image in enumerate(images):
            if not isinstance(image, bytes):
                self._check(image, f"image {number}")
        fetches = [asyncio.ensure_future(self._image(image, count)) for image in images]
        try:
            return await asyncio.gather(*fetches)
        finally:
            for fetch in fetches:
                fetch.cancel()

    async def _image(self, image: bytes | Place, count: Callable[[int], None]) -> "bytes | FetchError":
        try:
            return image if isinstance(image, bytes) else await self._fetch(image, count)
        except FetchError as error:
            return error

    def _check(self, place: Place, what: str) -> None:
        if isinstance(place, FilePath) and self._root is None:
            raise Problem(400, f"{what}: no path is opened here; whoever runs pear-serve can say --root DIR")
        if isinstance(place, Url) and not self._urls:
            raise Problem(400, f"{what}: no URL is opened here; whoever runs pear-serve can say --allow-urls")

    async def _fetch(self, place: Place, count: Callable[[int], None]) -> bytes:
        if len(place.text) > MOST_TEXT:
            raise FetchError(400, f"a name of more than {MOST_TEXT} characters")
        if isinstance(place, FilePath):
            assert self._root is not None
            data = await asyncio.to_thread(read_below, self._root, place.text, self._most)
            count(len(data))
            return data
        try:
            async with asyncio.timeout(URL_S), self._turns:
                return await self._download(place.text, count)
        except TimeoutError:
            raise FetchError(422, f"URL {place.text!r:.200}: not fetched within {URL_S:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise FetchError(422, f"URL {place.text!r:.200}: cannot be fetched: {type(error).__name__}") from None

    async def _download(self, text: str, count: Callable[[int], None]) -> bytes:
        try:
            url = httpx.URL(text)
        except (httpx.InvalidURL, ValueError):
            raise FetchError(400, f"URL {text!r:.200} cannot be read") from None
        if self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        for _ in range(REDIRECTS + 1):
            address = await self._address(url)
            # a client for each, so that nothing of one host, such as a cookie or a connection, is used with another
            async with httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=URL_S) as client:
                request = client.build_request(
                    "GET",
                    url.copy_with(host=address),  # the connection goes to the address that was checked
                    headers={"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity", "User-Agent": "pear"},
                    extensions={"sni_hostname": url.host},  # and must show a certificate of the name
                )
                response = await client.send(request, stream=True)
                try:
                    if not response.has_redirect_location:
                        return await self._body(response, text, count)
                    url = url.join(response.headers["Location"])
                finally:
                    await response.aclose()
        raise FetchError(422, f"URL {text!r:.200}: more than {REDIRECTS} redirects")

    async def _body(self, response: httpx.Response, text: str, count: Callable[[int], None]) -> bytes:
        if response.status_code != 200:
            raise FetchError(422, f"URL {text!r:.200}: its server answered {response.status_code}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise FetchError(422, f"URL {text!r:.200}: its server sent it compressed, unasked")
        body = bytearray()
        chunks: AsyncIterator[bytes] = response.aiter_raw()
        async for chunk in chunks:
            if len(body) + len(chunk) > self._most:
                raise FetchError(413, f"URL {text!r:.200}: more than {self._most} bytes")
            count(len(chunk))
            body += chunk
        return bytes(body)

    async def _address(self, url: httpx.URL) -> str:
        """The address that a URL's host has now.

        Raises:
            FetchError: the URL is not one that may be fetched, or its host has an address that is not public.
        """
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise FetchError(400, f"URL {str(url)!r:.200}: expected http:// or https://, without a user")
        resolve = partial(socket.getaddrinfo, url.raw_host.decode("ascii"), url.port, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._names, resolve)
        except (OSError, UnicodeError):
            raise FetchError(422, f"URL {str(url)!r:.200}: its host is not known") from None
        addresses = [str(address[0]) for *_, address in found]
        if not addresses or not all(map(is_public, addresses)):
            raise FetchError(400, f"URL {str(url)!r:.200}: its host has an address that is not public: not fetched")
        return addresses[0]


def is_public(text: str) -> bool:
    """Whether an address is reached by everybody, so that nothing of our own network is asked."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # such as one with a zone
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if any(one is not None and not is_public(str(one)) for one in inner):
            return False
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def read_below(root: Path, path: str, most_bytes: int) -> bytes:
    """The bytes of a regular file below a directory. Each part is opened within the one before, links refused, so
    nobody can lead elsewhere meanwhile.

    Raises:
        FetchError: there is none, or it is not one that may be read.
    """
    *folders, name = path.split("/")
    if any(part in ("", ".", "..") for part in (*folders, name)):
        raise FetchError(400, f"path {path!r:.200}: expected one below the server's directory, without '..'")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with ExitStack() as stack:
        try:
            inner = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, inner)
            for folder in folders:
                inner = os.open(folder, flags | os.O_DIRECTORY, dir_fd=inner)
                stack.callback(os.close, inner)
            _check_regular(os.stat(name, dir_fd=inner, follow_symlinks=False), path)  # first: a device may do something
            descriptor = os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=inner)
            file = stack.enter_context(open(descriptor, "rb"))
            found = os.fstat(descriptor)
            _check_regular(found, path)
            data = b"" if found.st_size > most_bytes else file.read(most_bytes + 1)
        except (OSError, ValueError):  # ValueError: text that file names cannot hold
            raise FetchError(404, f"path {path!r:.200}: no file that can be read; links are not followed") from None
    if found.st_size > most_bytes or len(data) > most_bytes:
        raise FetchError(413, f"path {path!r:.200}: more than {most_bytes} bytes")
    return data


def _check_regular(found: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise FetchError(400, f"path {path!r:.200}: no regular file; links are not followed")
