"""How far an image travels from `register` to the first step of the optimisation."""

import inspect
import sys
from itertools import pairwise

import torch

from icon_nephi import register
from icon_nephi.fit.from_scratch import fit_pair
from icon_nephi.fit.optimize import optimize
from icon_nephi.fit.settings import GRID

SIZE = (20, 24, 22)
JUDGES = tuple(f"icon_nephi.fit.{room}" for room in ("learned", "likeness", "simpler"))


class Arrived(Exception):
    """The loop is reached."""


def holds_image(value, depth=0):
    """Whether it is an image of that size, or something of ours that holds one."""
    if isinstance(value, torch.Tensor):
        return value.dim() >= 4 and value.shape[2:] == SIZE
    if depth == 2:
        return False
    ours = type(value).__module__.startswith("icon_nephi")
    parts = vars(value).values() if ours and hasattr(value, "__dict__") else ()
    parts = value if isinstance(value, tuple | list) else parts
    return any(holds_image(part, depth + 1) for part in parts)


def aside(frame):
    """Whether it is on behalf of what judges maps: a look aside, not a way."""
    while frame is not None:
        if frame.f_globals.get("__name__") in JUDGES:
            return True
        frame = frame.f_back
    return False


def way_of_an_image():
    """The rooms (modules) in the order of the calls that an image is handed to."""
    rooms = []

    def look(frame, event, _):
        room = frame.f_globals.get("__name__", "")
        if event != "call" or not room.startswith("icon_nephi."):
            return
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount
        arguments = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
        new = any(map(holds_image, arguments)) and rooms[-1:] != [room]
        if new and not aside(frame):
            rooms.append(room)
        if code is optimize.__code__:
            raise Arrived

    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 1, *SIZE, generator=generator) for _ in "AB"]
    sys.setprofile(look)
    try:
        # Named, for "auto" looks at the images first: a look aside, not a way.
        how = {"similarity": "lncc", "affine": False}
        register(*images, field=GRID, **how, progress=False)
    except Arrived:
        pass
    finally:
        sys.setprofile(None)
    return rooms


def without_leaves(rooms):
    """A room that asks another again and again, A B A B, is one way from A to B."""
    way = []
    for room in rooms:
        way.append(room)
        if way[-4:-2] == way[-2:]:
            del way[-2:]
    return way


def test_an_image_passes_few_rooms_and_hardly_ever_climbs_back():
    rooms = way_of_an_image()
    assert rooms[0] == register.__module__
    assert rooms[-1] == optimize.__module__
    order = list(dict.fromkeys(rooms))
    assert len(order) <= 8, order
    way = [order.index(room) for room in without_leaves(rooms)]
    climbs = sum(then < now for now, then in pairwise(way))
    assert climbs <= 2, [order[number] for number in way]


def test_a_fit_is_asked_for_in_few_words():
    assert len(inspect.signature(fit_pair).parameters) <= 10
