"""The routes of `grex serve`. Imported only where FastAPI is installed (the extra `serve`)."""

from __future__ import annotations

import asyncio
import io
import unicodedata
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from grex_mllm import __version__
from grex_mllm.errors import GrexError, fault
from grex_mllm.models.grex import GrexModel, check_expression
from grex_mllm.ops.masks import encode_rle
from grex_mllm.serve import limits
from grex_mllm.serve.engine import Engine, Selection
from grex_mllm.serve.folder import Folder
from grex_mllm.serve.gallery import NUM_SCENES, PREFIX, Gallery
from grex_mllm.serve.guard import IMAGE_TYPES, App, Guard
from grex_mllm.serve.held import Held, Pictures, new_name
from grex_mllm.serve.pictures import kept
from grex_mllm.serve.worker import LineFull, Worker
from grex_mllm.zeroshot.segmenters import Prompted

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("page.js", "search.js", "masks.js", "docs.js")
PAGE_FILES = {"page.css": "text/css", **dict.fromkeys(SCRIPTS, "text/javascript")}
Box = tuple[float, float, float, float]
BOXES, POINTS = "in pixels of the picture", "in pixels: the object under each is meant"
Ticket = Annotated[str, Field(max_length=64, description="any text; GET /queue?ticket=... then tells the place in the line")]


class Selected(BaseModel):
    """A set of objects of a picture: positions among the picture's objects, drawn boxes, and clicked points."""

    model_config = ConfigDict(extra="forbid")
    objects: list[int] = Field([], max_length=limits.MAX_OBJECTS, description="positions among the picture's objects, from 0")
    boxes_xyxy: list[Box] = Field([], max_length=limits.MAX_DRAWN, description=BOXES)
    points_xy: list[tuple[float, float]] = Field([], max_length=limits.MAX_DRAWN, description=POINTS)

    def selection(self) -> Selection:
        """Return the set, of which each member counts once."""
        once = dict.fromkeys
        return Selection(tuple(once(self.objects)), tuple(once(self.boxes_xyxy)), tuple(once(self.points_xy)))


class Asked(BaseModel):
    """Expressions to ground in a picture."""

    model_config = ConfigDict(extra="forbid")
    image: str = Field(max_length=64, description="the picture's id, from POST /images or POST /gallery/{number}")
    expressions: list[str] = Field(min_length=1, max_length=limits.MAX_EXPRESSIONS)
    threshold: float | None = Field(None, ge=0, le=1, description='"no target" is said above this probability')
    history: list[str] | None = Field(None, max_length=limits.MAX_TURNS, description="said before: each expression may be a follow-up")
    selected: Selected | None = Field(None, description="objects selected before (what the history follows): follow-ups refer to them")
    ticket: Ticket = ""


class Chosen(Selected):
    """A set of objects to describe."""

    image: str = Field(max_length=64)
    boxes_xyxy: list[Box] = Field([], max_length=limits.MAX_OBJECTS, description=BOXES)
    points_xy: list[tuple[float, float]] = Field([], max_length=limits.MAX_OBJECTS, description=POINTS)
    candidates: int = Field(8, ge=1, le=limits.MAX_CANDIDATES)
    ticket: Ticket = ""


class Wanted(BaseModel):
    """What to look for in the folder of images that the server was started with."""

    model_config = ConfigDict(extra="forbid")
    expression: str
    top: int = Field(8, ge=1, le=limits.MAX_FOUND, description="at most so many images, best first")
    masks: bool = Field(True, description="ground it in each of them: mask (COCO RLE), boxes, count; false: scores alone, sooner")
    ticket: Ticket = ""


class Rooms:
    """What the routes share: the model's engine, the line before it, the pictures and the gallery."""

    def __init__(self, model: GrexModel, name: str, num_pictures: int, timeout_s: float, segmenter: Prompted | None = None) -> None:
        self.name, self.timeout_s = name, timeout_s
        self.held = Pictures(num_pictures)
        self.engine = Engine(model, self.held, segmenter)
        self.gallery = Gallery(model.config.data.sources.get("synthetic"))
        self.worker = Worker(timeout_s)

    async def ask(self, key: Hashable, run: Callable[[list[Any]], list[Any]], payload: Any, ticket: str = "") -> Any:
        """Wait in the line for an answer.

        Raises:
            HTTPException: too many wait (503), or no answer in time (504).
        """
        try:
            future = self.worker.submit(key, run, payload, ticket)
        except LineFull:
            raise HTTPException(503, f"{limits.MAX_WAITING} requests in line; expected fewer; try again in a minute") from None
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.timeout_s)
        except TimeoutError:
            text = f"no answer within {self.timeout_s:g} s; expected a shorter line; try again, with fewer expressions"
            raise HTTPException(504, text) from None

    async def picture(self, name: str) -> Held:
        """Return a held picture; those of the gallery are opened again where they were forgotten.

        Raises:
            GrexError: neither held nor of the gallery.
        """
        number = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and number.isdecimal() and len(number) < 4 and self.held.find(name) is None:
            return await self.open_scene(int(number))
        return self.held.get(name)

    async def open_scene(self, number: int) -> Held:
        """Encode a picture of the gallery, or take it from the held pictures."""
        picture = self.gallery.get(number).picture
        name = f"{PREFIX}{number}"

        def run(jobs: list[Any]) -> list[Any]:
            return [self.held.find(name) or self.engine.open(picture, name)] * len(jobs)

        return await self.ask(("open", name), run, None)


def make_app(
    model: GrexModel,
    name: str,
    *,
    num_pictures: int = 16,
    timeout_s: float = 60.0,
    token: str | None = None,
    loopback: bool = True,
    folder: Folder | None = None,
    segmenter: Prompted | None = None,
) -> App:
    """Return the application (ASGI): the page, its files, the API, all behind the guard.

    name: what the page calls the model.  num_pictures: held in memory.  token: demanded of every request.  loopback: see `Guard`.
    folder: of images, indexed with this model, that POST /search ranks.
    segmenter: see `Engine`.
    """
    rooms = Rooms(model, name, num_pictures, timeout_s, segmenter)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(rooms.worker.stop)

    app = FastAPI(title="grex serve", version=__version__, docs_url=None, redoc_url=None, lifespan=life, description=__doc__ or "")
    app.state.rooms = rooms
    _add_page(app)
    _add_pictures(app, rooms, folder)
    _add_questions(app, rooms)
    _add_search(app, rooms, folder)
    _add_errors(app)
    return Guard(app, token, loopback)  # type: ignore[arg-type]


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "page.html", media_type="text/html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html", media_type="text/html")

    @app.get("/page/{file}", include_in_schema=False)
    async def part(file: str) -> FileResponse:
        if file not in PAGE_FILES:
            raise HTTPException(404, "no such file; expected one of the page; open /")
        return FileResponse(PAGE / file, media_type=PAGE_FILES[file])


def _add_pictures(app: FastAPI, rooms: Rooms, folder: Folder | None) -> None:
    @app.get("/status")
    async def status() -> dict[str, Any]:
        """Tell what is served, and the limits."""
        size = {"max_upload_bytes": limits.MAX_UPLOAD_BYTES, "max_upload_pixels": limits.MAX_UPLOAD_PIXELS, "max_side": limits.MAX_SIDE}
        rules = {
            "model": rooms.name,
            "describes": rooms.engine.describes,
            "segments": rooms.engine.segmenter is not None,
            "scenes": NUM_SCENES,
            "photographs": len(rooms.gallery) - NUM_SCENES,
            "types": list(IMAGE_TYPES),
        }
        threshold = rooms.engine.model.config.predict.no_target_threshold
        rules["searches"] = None if folder is None else len(folder)  # images
        return {**rules, **size, "max_expressions": limits.MAX_EXPRESSIONS, "threshold": threshold, "waiting": rooms.worker.waiting}

    @app.get("/queue")
    async def queue(ticket: Ticket) -> dict[str, Any]:
        """Tell how many requests are before the one with this ticket; 0: it is being answered; null: it is not waiting."""
        return {"before": rooms.worker.place(ticket)}

    @app.post("/images", openapi_extra={"requestBody": {"required": True, "content": {kind: {} for kind in IMAGE_TYPES}}})
    async def upload(request: Request, ticket: Ticket = "") -> dict[str, Any]:
        """Open a picture: the body is the file. Returns its id, its size as it is kept, and the objects that the model proposes."""
        if not request.headers["content-type"].startswith("image/"):
            raise HTTPException(415, f"a body that is no picture; expected {', '.join(IMAGE_TYPES)}; send the file itself")
        data = await request.body()
        return _told(await rooms.ask(None, lambda jobs: [rooms.engine.open_upload(job) for job in jobs], data, ticket))

    @app.get("/images/{name}")
    async def image(name: str) -> dict[str, Any]:
        """Tell of a picture that is held."""
        return _told(await rooms.picture(name))

    @app.get("/images/{name}/pixels", responses={200: {"content": {"image/png": {}}}}, response_class=Response)
    async def pixels(name: str) -> Response:
        """Return the pixels that all coordinates and masks refer to."""
        return await asyncio.to_thread(_png, (await rooms.picture(name)).pixels)

    @app.get("/gallery/{number}/pixels", responses={200: {"content": {"image/png": {}}}}, response_class=Response)
    async def scene(number: int) -> Response:
        """Return the pixels of a picture of the gallery: scenes first, then photographs."""
        return await asyncio.to_thread(lambda: _png(rooms.gallery.get(number).picture.pixels))

    @app.post("/gallery/{number}")
    async def open_scene(number: int, nothing: Annotated[dict[str, Any], Body(max_length=0)]) -> dict[str, Any]:
        """Open a picture of the gallery (the body is {}). Like POST /images, with expressions to try and a photograph's credit."""
        shown = rooms.gallery.get(number)
        return {**_told(await rooms.open_scene(number)), "examples": shown.examples, "credit": shown.credit}


def _add_questions(app: FastAPI, rooms: Rooms) -> None:
    @app.post("/ground")
    async def ground(asked: Asked) -> dict[str, Any]:
        """Ground expressions: a mask (COCO RLE), boxes, a count, the probability that nothing is meant, and the picture's objects in it.

        With a history, or with selected objects, each expression comes next, and may refer to what was selected ("not the red one").
        """
        for text in [*(asked.history or []), *asked.expressions]:
            _check(text)
        held = await rooms.picture(asked.image)
        chosen = asked.selected.selection() if asked.selected is not None else None
        run: Callable[[list[Any]], list[Any]]
        payload: Any
        if asked.history is None and chosen is None:
            run, kind, payload = (lambda jobs: rooms.engine.ground(held, jobs, asked.threshold)), "ground", asked.expressions
        else:
            run, kind = (lambda jobs: rooms.engine.follow(held, jobs, asked.threshold, chosen)), "follow"
            payload = (asked.history or [], asked.expressions)
        results = await rooms.ask((kind, held.name, asked.threshold, chosen), run, payload, asked.ticket)
        return {"image": held.name, "width": held.pixels.shape[1], "height": held.pixels.shape[0], "results": results}

    @app.post("/describe")
    async def describe(chosen: Chosen) -> dict[str, Any]:
        """Describe a set of objects by one expression, with candidates and the overlap (IoU) of what each leads back to with the set."""
        held = await rooms.picture(chosen.image)

        def run(jobs: list[Selection]) -> list[Any]:
            return [rooms.engine.describe(held, job, chosen.candidates) for job in jobs]

        answer = await rooms.ask(None, run, chosen.selection(), chosen.ticket)
        return {"image": held.name, **answer}


def _add_search(app: FastAPI, rooms: Rooms, given: Folder | None) -> None:
    def folder() -> Folder:
        if given is None:
            raise HTTPException(404, "a server without a folder of images; expected one; start it with grex serve --images FOLDER")
        return given

    @app.get("/search")
    async def about() -> dict[str, int]:
        """Tell how many images are searched."""
        return {"num_images": len(folder())}

    @app.post("/search")
    async def search(wanted: Wanted) -> dict[str, Any]:
        """Rank the images of the server's folder that contain what is said, with masks. An image is named by its id."""
        images = folder()
        _check(wanted.expression)
        num_found, results = await rooms.ask(("search",), images.rank, (wanted.expression, wanted.top), wanted.ticket)
        for line in results if wanted.masks else ():

            def run(jobs: list[str]) -> list[Any]:
                return [images.ground(job, wanted.expression) for job in jobs]

            line |= await rooms.ask(None, run, line["id"], wanted.ticket)
        return {"expression": wanted.expression, "num_images": len(images), "num_found": num_found, "results": results}

    @app.get("/search/{name}/pixels", responses={200: {"content": {"image/png": {}}}}, response_class=Response)
    async def found(name: str, side: Annotated[int, Query(ge=16, le=limits.MAX_SIDE)] = limits.MAX_SIDE) -> Response:
        """Return the pixels of an image of the folder, scaled down to a longer side of at most `side`."""
        return await asyncio.to_thread(lambda: _png(kept(folder().picture(name).pixels, side).pixels))

    @app.post("/search/{name}")
    async def open_found(name: str, nothing: Annotated[dict[str, Any], Body(max_length=0)]) -> dict[str, Any]:
        """Open an image of the folder (the body is {}). Like POST /images."""
        images = folder()
        return _told(await rooms.ask(None, lambda jobs: [rooms.engine.open(images.picture(job), new_name()) for job in jobs], name))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(GrexError)
    async def wrong(request: Request, error: GrexError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 404 if "does not hold" in str(error) else 422)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        return JSONResponse({"error": f"{place[:80]}: {first['msg']}; expected what /docs shows; fix the request"}, 422)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"{type(error).__name__} in the server; expected an answer; its log tells more"}, 500)


def _check(text: str) -> None:
    check_expression(text)
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise fault("an expression with control characters", "printable text on one line", "write it in plain letters")


def _told(held: Held) -> dict[str, Any]:
    objects = [{"box_xyxy": box, "mask_rle": encode_rle(mask)} for box, mask in zip(held.boxes_xyxy, held.objects, strict=True)]
    height, width = held.pixels.shape[:2]
    scaled = None if held.given == (width, height) else {"width": held.given[0], "height": held.given[1]}
    return {"image": held.name, "width": width, "height": height, "scaled_from": scaled, "proposes": held.proposes, "objects": objects}


def _png(pixels: Any) -> Response:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG", compress_level=1)
    return Response(data.getvalue(), media_type="image/png")
