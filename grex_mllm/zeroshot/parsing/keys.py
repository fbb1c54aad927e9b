"""Names under which models write boxes, points and what does not matter."""

from __future__ import annotations

import re
from itertools import product


def _words(text: str) -> list[str]:
    return text.split()


# key, lower case without signs -> what its value is; "" = a container, whose content says it
ROLES = {
    **dict.fromkeys(
        _words(
            "bbox bbox2d box box2d boxes bboxes boundingbox boundingboxes boundingbox2d boundingbox2ds bboxes2d boxes2d rect rects "
            "rectangle "
            "rectangles coordinates coords coordinate coord bounds bnd bndbox bb bbs "
            "boundaries area2d boxcoordinates bboxcoordinates boundingboxcoordinates pixelcoordinates "
            "边界框 坐标 位置 框"
        ),
        "box",
    ),
    # their value may be words as well
    **dict.fromkeys(_words("location locations region regions position positions area"), "any"),
    **dict.fromkeys(_words("xyxy bboxxyxy boxxyxy boxesxyxy bboxesxyxy"), "xyxy"),
    **dict.fromkeys(_words("yxyx bboxyxyx boxyxyx"), "yxyx"),
    **dict.fromkeys(_words("xywh bboxxywh boxxywh ltwh tlwh"), "xywh"),
    **dict.fromkeys(_words("cxcywh bboxcxcywh boxcxcywh xywhcenter"), "cxcywh"),
    **dict.fromkeys(
        _words("point point2d points points2d keypoint keypoints center centre centers centres centerpoint click clicks"), "point"
    ),
    **dict.fromkeys(
        _words("polygon polygons segmentation contour contours outline outlines vertices polygonpoints maskpolygon"), "polygon"
    ),
    **dict.fromkeys(
        _words(
            "objects detections detection answer answers result results target targets instances instance annotations predictions "
            "prediction "
            "matches items output outputs data response object detectedobjects matchingobjects final finalanswer list arguments parameters"
        ),
        "",
    ),
}
IGNORED = set(
    _words(
        "label labels name description caption class category text text2d textcontent expression phrase query score scores "
        "confidence id index "
        "reasoning reason thought thoughts explanation rationale comment note notes size imagesize imagewidth imageheight width height w h "
        "color colour colors rgb rgba mask attributes type angle rotation count total num image imageid resolution originalsize format "
        "coordinatesystem timestamp probability certainty"
    )
)
PRESENT = set(
    _words(
        "found exists exist present ispresent match matched matchfound objectfound targetfound targetpresent targetexists objectexists "
        "objectpresent hasmatch hastarget hasobject detected isfound isvisibleinimage"
    )
)
ABSENT = set(_words("notarget notfound nomatch noobject noobjects notpresent absent empty missing istargetmissing nomatches nothing none"))
COUNTS = ("count", "total", "num", "numobjects", "numberofobjects", "objectcount", "n")

_LOW_X = _words("x1 xmin minx x0 left xleft leftx xstart startx xtl tlx topleftx xtopleft")
_LOW_Y = _words("y1 ymin miny y0 top ytop topy ystart starty ytl tly toplefty ytopleft")
_HIGH_X = _words("x2 xmax maxx x1 right xright rightx xend endx xbr brx bottomrightx xbottomright")
_HIGH_Y = _words("y2 ymax maxy y1 bottom ybottom bottomy yend endy ybr bry bottomrighty ybottomright")
_WIDE, _TALL = ("width", "w", "boxwidth", "bw"), ("height", "h", "boxheight", "bh")
_SIDES = (("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"), ("l", "t", "r", "b"))
_CENTRES = (("cx", "cy"), ("xc", "yc"), ("centerx", "centery"), ("xcenter", "ycenter"), ("centrex", "centrey"), ("xcentre", "ycentre"))
_PLACES = (("x", "y"), ("left", "top"), ("x1", "y1"), ("xmin", "ymin"), ("minx", "miny"), ("x0", "y0"), ("topleftx", "toplefty"))
# order -> tuples of keys that name it, tried in turn
AXES: dict[str, list[tuple[str, ...]]] = {
    "xyxy": [("x0", "y0", "x1", "y1"), *_SIDES, *zip(_LOW_X, _LOW_Y, _HIGH_X, _HIGH_Y)],
    "cxcywh": [(*centre, w, h) for centre, (w, h) in product(_CENTRES, zip(_WIDE, _TALL))],
    "xywh": [(*place, w, h) for place, (w, h) in product(_PLACES, zip(_WIDE, _TALL))],
    "point": [("x", "y"), *_CENTRES],
}
AXIS_NAMES = {name for ways in (AXES["xyxy"], AXES["xywh"], AXES["cxcywh"]) for way in ways for name in way} - set("ltrb")

_LOW = re.compile(
    r"(?:top|upper)left(?:corner|point)?|left(?:top|upper)(?:corner)?|tl|lt|min|start|from|p1|pt1|point1|corner1|startpoint|xy1|左上角?"
)
_HIGH = re.compile(
    r"(?:bottom|lower)right(?:corner|point)?|right(?:bottom|lower)(?:corner)?|br|rb|max|end|to|p2|pt2|point2|corner2|endpoint|xy2|右下角?"
)
_SIGNS = re.compile(r"[\W_]+")


def normal(key: str) -> str:
    """Return a key in lower case, without signs."""
    return _SIGNS.sub("", key[:100]).lower()


def corner_of(key: str) -> str:
    """Return "low" for a name of the top left corner, "high" for one of the bottom right, else ""."""
    return "low" if _LOW.fullmatch(key) else "high" if _HIGH.fullmatch(key) else ""
