"""A web server on this machine, whose answers a test writes itself."""

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator, Mapping


class Answering(http.server.BaseHTTPRequestHandler):
    """What an answer gets: `send(content)`, `redirect(url)`, and the methods of the standard handler."""

    answers: Mapping[str, Callable]

    def do_GET(self):
        self.server.asked.append(self.path)
        answer = self.answers.get(self.path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if answer is None:
                self.send_error(404)
            else:
                answer(self)

    def send(self, content: bytes, **headers) -> None:
        self.head({"Content-Length": str(len(content)), **headers})
        self.wfile.write(content)

    def head(self, headers: Mapping[str, str]) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def redirect(self, url: str) -> None:
        self.send_response(302)
        self.send_header("Location", url)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serve(answers: Mapping[str, Callable]) -> Iterator[http.server.ThreadingHTTPServer]:
    """
    Args:
        answers: for each path, a function that is called with the `Answering` handler.
    Yields:
        The server: `server.url` has no slash at its end, and `server.asked` lists the paths that were asked for.
    """
    handler = type("Handler", (Answering,), {"answers": answers})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
