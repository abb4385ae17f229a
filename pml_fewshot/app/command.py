"""pml-fewshot app: a page in the browser on which you teach classes yourself; nothing leaves the machine."""

import argparse
import socket
import sys
import warnings
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Timer

from PIL import Image

from pml_fewshot.app.pictures import MOST_PIXELS, PictureEmbedder
from pml_fewshot.checks import UsageError, import_extra
from pml_fewshot.experiment.command_line import one_line_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: serves the page until Ctrl-C."""
    with one_line_errors():
        _serve(_parser().parse_args(arguments))


def _serve(given: argparse.Namespace) -> None:
    uvicorn = import_extra("app", "for the page", "uvicorn", "starlette", "python_multipart")
    from pml_fewshot.app.server import application, is_loopback

    # Pillow refuses an image with twice as many before decoding it, and warns below that
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    listening = _bound(given.host, given.port)  # before loading the network: a port in use is the likeliest mistake
    with listening:
        embedder = PictureEmbedder.of(given.embedder, given.checkpoint, given.image_size)
        app = application(embedder, given.sets, given.host, given.most_megabytes, given.most_examples)
        host = f"[{given.host}]" if ":" in given.host else given.host
        address = f"http://{host}:{listening.getsockname()[1]}/"
        if not is_loopback(given.host):
            what = "whoever reaches this machine can see, change and delete what is taught and saved"
            print(f"warning: served beyond this machine, without a password: {what}", file=sys.stderr, flush=True)
        print(f"open {address} ({embedder.name}; Ctrl-C ends it, and forgets what is not saved)", flush=True)
        if given.open:
            opener = Timer(1, webbrowser.open, [address])
            opener.daemon = True
            opener.start()
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3, server_header=False)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn raises it again after shutting down, which is the way to end it
            return


def _bound(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:  # the system would use the remainder
        raise UsageError(f"expected a port from 0 to 65535, got {port}; give another --port")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        do = "give another --port, or 0 for any that is free"
        raise UsageError(f"expected to serve at {host} port {port}, got: {error.strerror}; {do}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pml-fewshot app", description="Teach classes on a page in your browser.")
    add = parser.add_argument
    add(
        "--embedder",
        default="glyphs",
        help="embedder: glyphs, the built-in network for drawings and writing; for photos "
        "timm/NAME or torchvision/NAME, or the folder of a run (%(default)s)",
    )
    add("--checkpoint", type=Path, help="file with the embedder's weights, instead of a download")
    add("--image-size", type=int, metavar="N", help="side of a run's images in pixels (84)")
    add("--host", default="127.0.0.1", help="address to serve at, without a password (%(default)s)")
    add("--port", type=int, default=8000, help="port; 0 for any free one (%(default)s)")
    add("--sets", type=Path, default=Path("taught"), metavar="DIR", help="folder of saved sets (%(default)s)")
    add("--most-megabytes", type=_positive(float), default=20, metavar="N", help="limit of an upload (%(default)s)")
    add("--most-examples", type=_positive(int), default=2000, metavar="N", help="limit for all classes (%(default)s)")
    add("--open", action="store_true", help="open the page in the browser")
    return parser


def _positive(kind: type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}; give one")
        return value

    return number
