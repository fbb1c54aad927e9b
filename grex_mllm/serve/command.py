"""`grex serve`: check what would go wrong, load the model, and serve until interrupted."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import socket
from pathlib import Path

from grex_mllm.errors import fault
from grex_mllm.serve.limits import MIN_TOKEN_CHARACTERS, TOKEN_VARIABLE

NEEDED = ("fastapi", "uvicorn")


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    pictures: int = 16,
    timeout_s: float = 60.0,
    images: str | None = None,
    index: str | None = None,
    segmenter: str | None = None,
) -> int:
    """Serve a page and an HTTP API: find objects from expressions, describe selected ones.

    Args:
        model: a model folder or hub id.
        host: 127.0.0.1 is seen from this machine alone; beyond it GREX_SERVE_TOKEN must hold a token.
        port: 0 takes a free one.
        device: auto, cpu, cuda, cuda:1, ...
        pictures: how many to hold in memory; the one that was not used for longest goes first.
        timeout_s: after which a request is given up.
        images: a folder whose images POST /search ranks; whoever reaches the server sees those images.
        index: folder of its index, as of grex search (default: .grex_index in the folder of images).
        segmenter: folder or hub id of SAM or SAM 2, so that clicks and boxes find objects also where the model proposes none.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise fault(f"no {' and '.join(missing)}", "the packages of the extra serve", "pip install 'grex-mllm[serve]'")
    for name, value in (("--pictures", pictures), ("--timeout_s", timeout_s)):
        if value <= 0:
            raise fault(f"{name} {value}", "a number above 0", "give another one")
    if index is not None and images is None:
        raise fault(f"--index {index} without --images", "the folder of images that it is an index of", "add --images FOLDER")
    if images is not None and not Path(images).is_dir():
        raise fault(f"--images {images}, which is no folder", "a folder of images", "check the path")
    token = checked_token(host)
    listener = bind(host, port)
    import uvicorn

    from grex_mllm.models.grex import GrexModel
    from grex_mllm.precision import pick_device
    from grex_mllm.search import open_index
    from grex_mllm.serve.app import make_app
    from grex_mllm.serve.folder import Folder
    from grex_mllm.zeroshot.segmenters import Prompted

    prompted = Prompted(segmenter, device) if segmenter is not None else None
    loaded = GrexModel.from_pretrained(model, device=pick_device(device))
    name = Path(model).resolve().name if Path(model).is_dir() else model
    folder = Folder(open_index(loaded, images, index)) if images is not None else None
    options = {"num_pictures": pictures, "timeout_s": timeout_s, "token": token, "loopback": is_loopback(host)}
    app = make_app(loaded, name, **options, folder=folder, segmenter=prompted)  # type: ignore[arg-type]
    config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=15, limit_concurrency=200, timeout_graceful_shutdown=5)
    listener.listen(128)  # from here on nobody is turned away
    shown = f"[{host}]" if ":" in host else host
    print(f"grex serves {name} at http://{shown}:{listener.getsockname()[1]}/ (Ctrl+C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends its requests first, then raises it again
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def checked_token(host: str) -> str | None:
    """Return the token that requests must carry, from the environment; None on loopback where there is none.

    Raises:
        GrexError: beyond loopback without a token, or one that is soon guessed.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and (len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token):
        given = f"a {TOKEN_VARIABLE} of {len(token)} characters"
        raise fault(given, f"at least {MIN_TOKEN_CHARACTERS} printable ASCII characters without spaces", "choose a longer one at random")
    if token is None and not is_loopback(host):
        remedy = f"set {TOKEN_VARIABLE} to a long random text, or serve on 127.0.0.1"
        raise fault(f"--host {host} without a token", "a token beyond this machine's own loopback", remedy)
    return token


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket, before a model is loaded for nothing. Port 0 takes a free one.

    Raises:
        GrexError: a port in use, or a host that is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise fault(f"--host {host} --port {port} ({error})", "a free port of this machine", "give another --port, or 0 for any") from None
    return listener
