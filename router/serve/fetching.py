"""Opens images that requests name: files below a directory, and URLs. Both are off by default."""

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
"""Most seconds from the look-up of a host's name to the last byte, with redirects."""
REDIRECTS = 3
AT_A_TIME = 16
"""Most URLs that are fetched at the same time. Others wait, but at most URL_S."""
MOST_TEXT = 4096
"""Most characters of a path or URL."""


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
        root: requests may name files below it; None: no files. Links below it are not followed.
        urls: whether requests may name http and https URLs. They, and each redirect, must lead to public addresses.
        most_bytes: most bytes of one image.
    Raises:
        RouterError: `root` is not a directory.
    """

    def __init__(self, root: Path | None, urls: bool, most_bytes: int) -> None:
        if root is not None and not os.path.isdir(root):
            raise RouterError(f"root {str(root)!r}: expected a directory")
        self._root, self._urls, self._most = root, urls, most_bytes
        self._names = ThreadPool(AT_A_TIME, "pear-serve-names")  # a slow name server only blocks these threads
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._tls: ssl.SSLContext | None = None

    def close(self) -> None:
        self._names.shutdown(wait=False, cancel_futures=True)

    async def images(self, images: Sequence[bytes | Place], count: Callable[[int], None]) -> list["bytes | FetchError"]:
        """The bytes of a request's images, or the error of each that cannot be opened.

        Args:
            count: is called with the number of bytes as they arrive; it may raise an error.
        Raises:
            Problem: a request names a path or URL that this server does not open.
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
            raise Problem(
                400, f"{what}: this server opens no paths: send the file, or start pear-serve with --root DIR"
            )
        if isinstance(place, Url) and not self._urls:
            raise Problem(
                400, f"{what}: this server opens no URLs: send the file, or start pear-serve with --allow-urls"
            )

    async def _fetch(self, place: Place, count: Callable[[int], None]) -> bytes:
        if len(place.text) > MOST_TEXT:
            raise FetchError(400, f"path or URL: expected at most {MOST_TEXT} characters, found {len(place.text)}")
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
            # a client for each host, so that cookies and connections are never used with another host
            async with httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=URL_S) as client:
                request = client.build_request(
                    "GET",
                    url.copy_with(host=address),  # connect to the address that was checked
                    headers={"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity", "User-Agent": "pear"},
                    extensions={"sni_hostname": url.host},  # and expect a certificate for the host's name
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
            raise FetchError(422, f"URL {text!r:.200}: its server sent it compressed, which was not asked for")
        body = bytearray()
        chunks: AsyncIterator[bytes] = response.aiter_raw()
        async for chunk in chunks:
            if len(body) + len(chunk) > self._most:
                raise FetchError(413, f"URL {text!r:.200}: more than {self._most} bytes")
            count(len(chunk))
            body += chunk
        return bytes(body)

    async def _address(self, url: httpx.URL) -> str:
        """The current address of a URL's host.

        Raises:
            FetchError: such URLs are not fetched, or the host has an address that is not public.
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
    """Whether an address is public, so that requests cannot reach the server's own network."""
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
    """The bytes of a regular file below a directory.

    Each part of the path is opened within the part before, and links are refused. So a change of folders meanwhile
    cannot lead outside.

    Raises:
        FetchError: there is no such file, or it may not be read.
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
            _check_regular(
                os.stat(name, dir_fd=inner, follow_symlinks=False), path
            )  # before open, which may act on a device
            descriptor = os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=inner)
            file = stack.enter_context(open(descriptor, "rb"))
            found = os.fstat(descriptor)
            _check_regular(found, path)
            data = b"" if found.st_size > most_bytes else file.read(most_bytes + 1)
        except (OSError, ValueError):  # ValueError: text that cannot be a file name
            raise FetchError(404, f"path {path!r:.200}: no readable file; links are not followed") from None
    if found.st_size > most_bytes or len(data) > most_bytes:
        raise FetchError(413, f"path {path!r:.200}: more than {most_bytes} bytes")
    return data


def _check_regular(found: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise FetchError(400, f"path {path!r:.200}: not a regular file; links are not followed")
