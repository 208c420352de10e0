"""Videos from the web, within limits."""

import ipaddress
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from .arriving_data import Arrival, Limits, Spool
from .video_errors import VideoDecodeError, one_line, short

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 60.0  # seconds
MAX_REDIRECTS = 10


class WebArrival(Arrival):
    """What comes from a web address. From a public machine nothing leads into a private network.

    Args:
        url: of http or https.
    """

    def __init__(self, url: str, name: str, spool: Spool, limits: Limits):
        super().__init__(name, spool, limits)
        self.url = self.found = url  # `found`: after redirects
        self.origin = urlsplit(url).hostname or ""

    def blocks(self) -> Iterator[bytes]:
        yield from self.get(self.url)

    def get(self, url: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yields the bytes at an address, or `length` of them from `start` on."""
        try:
            from huggingface_hub.utils import httpx  # the client that transformers itself uses
        except ImportError:
            import httpx  # type: ignore[no-redef]
        timeout = httpx.Timeout(min(READ_TIMEOUT, self.limits.max_seconds), connect=CONNECT_TIMEOUT)
        headers = {} if length is None else {"Range": f"bytes={start}-{start + length - 1}"}
        try:
            with httpx.Client(timeout=timeout) as client:
                response = self._follow(client, client.build_request("GET", url, headers=headers))
                try:
                    response.raise_for_status()
                    if length is None:
                        self._expect(response.headers, alone=url == self.url)
                        yield from response.iter_bytes()
                    else:  # a server may send everything instead of the range
                        skipped = 0 if response.status_code == 206 else start
                        yield from take(response.iter_bytes(), skipped, length)
                finally:
                    response.close()
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = f"the server answered {status}" if status else one_line(error)
            piece = "" if url == self.url else f"{short(url)} "
            raise VideoDecodeError(f"{self.video}: {piece}cannot be downloaded ({reason})") from None

    def _expect(self, headers, alone: bool) -> None:
        length = headers.get("content-length", "")
        if length.isdecimal() and "content-encoding" not in headers:
            self.limits.check_bytes(self.video, self.spool.size + int(length))
            self.expected = int(length) if alone else 0

    def _follow(self, client, request):
        for _ in range(MAX_REDIRECTS + 1):
            host, target = request.url.host, short(str(request.url))
            if request.url.scheme not in ("http", "https"):
                raise VideoDecodeError(f"{self.video}: leads to {target}; only http and https are followed")
            if host != self.origin and is_private(host) and not is_private(self.origin):
                raise VideoDecodeError(f"{self.video}: leads to {target}, which is in a private network")
            response = client.send(request, stream=True)
            if response.next_request is None:
                self.found = str(request.url)
                return response
            response.close()
            request = response.next_request
        raise VideoDecodeError(f"{self.video}: cannot be downloaded (more than {MAX_REDIRECTS} redirects)")


def take(blocks: Iterator[bytes], skipped: int, length: int) -> Iterator[bytes]:
    """`length` bytes, after some that are skipped."""
    for block in blocks:
        block, skipped = block[skipped:], max(skipped - len(block), 0)
        yield block[:length]
        length -= len(block)
        if length <= 0:
            return


def is_private(host: str) -> bool:
    """Whether a machine is this one, or in a network of its own."""
    try:
        addresses = {str(found[4][0]).split("%")[0] for found in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False  # a proxy may know it
    return any(not ipaddress.ip_address(address).is_global for address in addresses)


def download(url: str, name: str, suffix: str, limits: Limits, progress=None) -> tuple[Spool, str]:
    """
    Args:
        url: of http or https.
        name: what to call the video in messages.
        suffix: of its name.
        progress: called as `progress("download", done, total)`, in bytes; the total is 0 if the server does not say.
    Returns:
        What came, and the address where it was found.
    Raises:
        VideoDecodeError: unreachable, led elsewhere than to the web, or past a limit. Nothing is left behind.
    """
    arrival = WebArrival(url, name, Spool(suffix[:8]), limits)
    arrival.wait(progress)
    return arrival.spool, arrival.found
