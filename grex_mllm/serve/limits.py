"""What a server takes at most, and how long it waits. One place, so that the page can tell it, too."""

from __future__ import annotations

MAX_UPLOAD_BYTES = 24_000_000
MAX_UPLOAD_PIXELS = 24_000_000  # twice a photograph of 4000x3000
MAX_SIDE = 1280  # of the picture that is kept; larger ones are scaled down
MAX_JSON_BYTES = 200_000
MAX_EXPRESSIONS = 32  # of one request
MAX_TURNS = 24  # of the history that a request carries
MAX_OBJECTS = 64  # selected ones of one request
MAX_DRAWN = 16  # boxes, and points, that a follow-up refers to
MAX_CANDIDATES = 16
MAX_FOUND = 24  # images of one search
MAX_WAITING = 64  # requests in line
BODY_TIMEOUT_S = 30.0  # for a request's body to arrive
IDLE_S = 3600.0  # after which an unused picture is forgotten
MIN_TOKEN_CHARACTERS = 16
TOKEN_VARIABLE = "GREX_SERVE_TOKEN"
