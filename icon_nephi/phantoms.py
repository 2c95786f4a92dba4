"""Images whose true correspondence is known: a breathing thorax, and 2D shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

_NAMES = "air", "body", "right lung", "left lung", "heart", "liver", "spleen", "bone"
#: The integers in ``ThoraxPhantom.labels_A`` and ``labels_B``.
LABELS = {name: number for number, name in enumerate(_NAMES)}

# The scene is a formula in a box of these millimetres with axes in ITK's array order:
# z from feet to head, y from front to back, x from the patient's right to left.
_BOX = torch.tensor([300.0, 250.0, 300.0])
_EDGE = 1.2  # softness of every surface in mm: about what a CT scanner resolves
_CHUNK = 2**17  # voxels painted at a time, so that large images need little memory
_CELLS = (24, 20, 24)  # where a point looks up the vessels near it
_HILA = {"right lung": (0.60, 0.54, 0.41), "left lung": (0.60, 0.54, 0.59)}
# Ellipsoids, each painted over those above it: label, HU, centre and radii as
# fractions of the box; an infinite radius makes a cylinder.
_SHAPES = (
    ("body", -100.0, (0.50, 0.50, 0.50), (math.inf, 0.45, 0.475)),  # fat
    ("body", 45.0, (0.50, 0.50, 0.50), (math.inf, 0.42, 0.445)),  # muscle
    ("bone", 350.0, (0.45, 0.50, 0.50), (0.62, 0.375, 0.43)),  # rib cage: a shell
    ("right lung", -870.0, (0.42, 0.50, 0.29), (0.50, 0.32, 0.185)),
    ("left lung", -870.0, (0.42, 0.50, 0.71), (0.50, 0.32, 0.185)),
    ("body", -980.0, (1.05, 0.48, 0.50), (0.40, 0.034, 0.030)),  # windpipe
    ("heart", 60.0, (0.42, 0.40, 0.55), (0.15, 0.17, 0.15)),
    ("body", 40.0, (0.62, 0.48, 0.50), (0.17, 0.16, 0.06)),  # great vessels
    ("liver", 110.0, (0.08, 0.52, 0.28), (0.29, 0.36, 0.25)),
    ("spleen", 50.0, (0.05, 0.52, 0.71), (0.28, 0.36, 0.24)),
    ("body", -900.0, (0.19, 0.46, 0.72), (0.05, 0.07, 0.08)),  # air in the stomach
    ("body", 160.0, (0.50, 0.69, 0.55), (math.inf, 0.045, 0.036)),  # aorta
    ("bone", 260.0, (0.50, 0.80, 0.50), (math.inf, 0.075, 0.065)),  # spine
)
_ORDER = [name for name, *_ in _SHAPES]
_Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ThoraxPhantom:
    """Two images of one thorax, and everything a registration of them should find.

    A moves (breathed in), B is fixed (breathed out): ``image_A(phi_AB(x)) =
    image_B(x)`` up to noise. Array axes are z, y, x as in ITK; in 2D z, x.

    Attributes:
        image_A, image_B: [1, 1, *shape], float32, in HU.
        mask_A, mask_B: the lungs with their vessels, [1, 1, *shape], bool.
        labels_A, labels_B: the integers of ``LABELS``, [1, 1, *shape], uint8.
        points_A, points_B: the same vessel forks in both images, [N, d], float32,
            unit box (voxel i of an axis at i / (n - 1)); ``millimetres`` converts.
        spacing: mm between voxels, one for each array axis.
        phi_AB, phi_BA: the true map from fixed to moving space and its inverse;
            [B, d, *any] in the unit box to the same shape and dtype.
    """

    image_A: Tensor
    image_B: Tensor
    mask_A: Tensor
    mask_B: Tensor
    labels_A: Tensor
    labels_B: Tensor
    points_A: Tensor
    points_B: Tensor
    spacing: tuple[float, ...]
    phi_AB: _Map
    phi_BA: _Map

    def millimetres(self, points: Tensor) -> Tensor:
        """Return points [N, d] of the unit box in mm from voxel 0, array-axis order."""
        steps = [n - 1 for n in self.image_A.shape[2:]]
        return points * points.new_tensor(steps) * points.new_tensor(self.spacing)


def breathing_thorax(
    shape: Sequence[int] = (96, 80, 96),
    spacing: Sequence[float] | None = None,
    seed: int = 0,
    amplitude: float = 20.0,
    noise: float = 20.0,
) -> ThoraxPhantom:
    """Return a CT-like thorax breathed in (A) and out (B), and the exact map between.

    The scene is a formula: each image is read from it without interpolation. Anatomy
    and map depend on the seed and the number of axes, not on the shape: a finer shape
    shows the same patient.

    Args:
        shape: voxels along (z, y, x), or (z, x) for a coronal section.
        spacing: mm between voxels. By default the first and last voxel are 300 mm
            apart (250 mm for y); any other spacing stretches the same anatomy.
        seed: another seed is another patient.
        amplitude: how far the diaphragm sinks, in mm.
        noise: standard deviation in HU, independent in the two images.

    Raises:
        ValueError: a shape, spacing, amplitude or noise that makes no image, or an
            amplitude so large that the motion could fold.
    """
    size = tuple(int(n) for n in shape)
    if len(size) not in (2, 3) or min(size) < 8:
        raise ValueError(
            f"shape must be 2 or 3 numbers of voxels, each at least 8, got {size}; use "
            "for example (96, 80, 96) or (96, 96)"
        )
    axes = [0, 1, 2] if len(size) == 3 else [0, 2]
    steps = torch.tensor(size) - 1
    mm = tuple(map(float, _BOX[axes] / steps if spacing is None else spacing))
    if len(mm) != len(size) or not all(0 < s < math.inf for s in mm):
        raise ValueError(
            f"spacing must be {len(size)} positive numbers of mm for the shape "
            f"{size}, got {mm}; leave it out for a life-sized thorax"
        )
    if not (0 <= amplitude < math.inf and 0 <= noise < math.inf):
        raise ValueError(
            "amplitude and noise must be finite and not negative, got amplitude="
            f"{amplitude}, noise={noise}; use 0 for none"
        )
    # Breathing in: the diaphragm sinks, the chest rises to the front, lungs part.
    strengths = torch.tensor([-1.0, -0.3, 0.25])[axes] / (torch.tensor(mm) * steps)
    steepest = (strengths.abs() * torch.tensor([4.8, 3.1, 7.0])[axes]).max()
    if amplitude * steepest > 0.6:  # above 1 the motion folds
        raise ValueError(
            f"amplitude must be at most {0.6 / steepest:.4g} mm for the shape {size} "
            f"and spacing {mm}, or the motion could fold, got {amplitude}; lower it"
        )
    generator = torch.Generator().manual_seed(seed)
    anatomy = _Anatomy(axes, generator)
    phases = 2 * math.pi * torch.rand(len(size), generator=generator)
    numbers = ((amplitude * strengths).tolist(), phases.tolist())
    forward, inverse = (partial(_breathe, *numbers, back) for back in (False, True))
    labels_B, image_B = _paint(anatomy, size, lambda u: u)
    labels_A, image_A = _paint(anatomy, size, inverse)
    points_B = (anatomy.forks / _BOX)[:, axes]
    return ThoraxPhantom(
        image_A=image_A + noise * torch.randn(image_A.shape, generator=generator),
        image_B=image_B + noise * torch.randn(image_B.shape, generator=generator),
        mask_A=(labels_A == 2) | (labels_A == 3),
        mask_B=(labels_B == 2) | (labels_B == 3),
        labels_A=labels_A,
        labels_B=labels_B,
        points_A=forward(points_B.T[None])[0].T.contiguous(),
        points_B=points_B,
        spacing=mm,
        phi_AB=forward,
        phi_BA=inverse,
    )


@dataclass(frozen=True, eq=False)
class ThoraxCycle:
    """Images of one breathing thorax: ``images[k](maps[k](x))`` is the same place x.

    Attributes:
        images: of each phase, [1, 1, *shape], float32, in HU; phase 0 breathed out.
        points: the same vessel forks in each, [phases, N, d], float32, unit box.
        maps: from phase 0 to each, [B, d, *any] in the unit box.
        spacing: mm between voxels, one for each array axis.
    """

    images: tuple[Tensor, ...]
    points: Tensor
    maps: tuple[_Map, ...]
    spacing: tuple[float, ...]


def breathing_cycle(
    shape: Sequence[int] = (96, 80, 96),
    phases: int = 10,
    seed: int = 0,
    amplitude: float = 20.0,
    noise: float = 20.0,
) -> ThoraxCycle:
    """Return the thorax of `breathing_thorax` at evenly spaced times of one breath.

    The diaphragm goes down and up as a raised cosine; the chest follows a twentieth of
    a breath later, so the way out is not the way in. Arguments and errors as there.
    """
    whole = breathing_thorax(shape, None, seed, amplitude, noise)
    axes = [0, 1, 2] if len(shape) == 3 else [0, 2]
    anatomy = _Anatomy(axes, torch.Generator().manual_seed(seed))
    strengths, waves, _ = whole.phi_AB.args  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed + 1)
    images, maps = [], []
    lags = [0.05 * bool(axis) for axis in axes]
    for time in torch.arange(phases) / phases:
        now = [  # less what lags behind at the time 0
            s * (math.cos(2 * math.pi * lag) - math.cos(2 * math.pi * (time - lag))) / 2
            for s, lag in zip(strengths, lags, strict=True)
        ]
        forth, back = (partial(_breathe, now, waves, way) for way in (False, True))
        image = _paint(anatomy, tuple(whole.image_A.shape[2:]), back)[1]
        images.append(image + noise * torch.randn(image.shape, generator=generator))
        maps.append(forth)
    points = torch.stack([phi(whole.points_B.T[None])[0].T for phi in maps])
    return ThoraxCycle(tuple(images), points, tuple(maps), whole.spacing)


# Breathing along z, y, x: profiles over the own coordinate, at most 1 in size. They
# and their slopes vanish at both ends, so nothing leaves the box. z peaks at the
# diaphragm (1/3) and dies off slowly towards the apex; x moves the two lungs apart.
_PROFILES = (
    lambda t: 45.56 * (t * (1 - t) ** 2) ** 2,
    lambda t: 16.0 * (t * (1 - t)) ** 2,
    lambda t: 55.9 * (t * (1 - t)) ** 2 * (2 * t - 1),
)


def _breathe(
    strengths: list[float], phases: list[float], back: bool, coords: Tensor
) -> Tensor:
    """Return coordinates [B, d, *any] in the unit box, moved or moved back.

    One axis after the other: ``strength * profile(own coordinate) * weight(other
    coordinates)`` is added. The determinant is the product of the steps' ``1 +
    strength * weight * profile'``, positive; a step is undone by solving one equation
    in one unknown, a fixed point that every iteration brings 0.6 times nearer.
    """
    if coords.dim() < 3 or coords.shape[1] != len(strengths):
        raise ValueError(
            f"coords must be [B, {len(strengths)}, *any] in the unit box, got shape "
            f"{tuple(coords.shape)}; for rows of points use points.T[None]"
        )
    c = list(coords.double().unbind(1))
    profiles = _PROFILES if len(c) == 3 else _PROFILES[::2]
    for axis in reversed(range(len(c))) if back else range(len(c)):
        amount: Tensor | float = -strengths[axis] if back else strengths[axis]
        wave: Tensor | float = 1.0
        for other, t in enumerate(v.clamp(0, 1) for v in c):
            if other != axis:
                flat = (1 - (2 * t - 1) ** 4) ** 2  # flat inside, 0 at the body wall
                amount = amount * (_PROFILES[0](t) if other == 0 else flat)
                wave = wave * torch.sin(4 * math.pi * t + phases[other])
        amount = amount * (0.8 + 0.2 * wave)  # no two places move alike
        start = c[axis]
        for _ in range(35 if back else 1):
            c[axis] = start + amount * profiles[axis](c[axis].clamp(0, 1))
    return torch.stack(c, 1).to(coords.dtype)


class _Anatomy:
    """One patient in mm of the box: shapes, texture, a vessel tree in each lung."""

    def __init__(self, axes: list[int], generator: torch.Generator) -> None:
        rand = partial(torch.rand, generator=generator)
        self.axes = axes  # those of the box that the image has
        self.shapes = []  # label, HU, centre and radii [2, 3, 1]
        for name, hu, *numbers in _SHAPES:
            near_one = 1 + torch.tensor([[0.02], [0.06]]) * (rand(2, 3) - 0.5)
            shape = torch.tensor(numbers) * near_one * _BOX
            self.shapes.append((name, hu, shape[..., None]))
        # Texture: plane waves of three lengths, [60, 3] radians per mm.
        lengths = torch.tensor([48.0, 24.0, 13.0]).repeat_interleave(20)
        waves = torch.randn(60, 3, generator=generator)
        self.waves = waves * (2 * math.pi / waves.norm(dim=1) / lengths)[:, None]
        self.phases = 2 * math.pi * rand(60, 1)
        tubes, forks = [], []
        for lung, hilum in _HILA.items():
            # The tree fills the lung: each branch runs towards the middle of the
            # places it supplies and forks; each child supplies half of them.
            start, places = torch.tensor(hilum) * _BOX, rand(40_000, 3) * _BOX
            if len(axes) == 2:
                start[1] = places[:, 1] = 0.5 * _BOX[1]
            branches = [(start, places[self._depth(places, lung) > 4], 6.5)]
            for level in range(5 + len(axes)):
                grown, branches = branches, []
                for start, cloud, radius in grown:
                    end = 0.5 * (start + cloud.mean(0))
                    radii = torch.tensor([radius, 0.8 * radius]).clamp_min(1.5)
                    tubes.append(torch.cat((start, end, radii)))
                    if level < 4 + len(axes) and self._depth(end[None], lung) > 3:
                        forks.append(end)
                    along = cloud @ torch.linalg.eigh(cloud.T.cov())[1][:, -1]
                    for half in (along > along.median(), along <= along.median()):
                        branches.append((end, cloud[half], 0.8 * radius))
        self.forks = torch.stack(forks)  # [N, 3]
        self.tubes = torch.stack(tubes, 1)  # first, last point; two radii: [8, S]
        # A point asks only the tubes that are nearest to the middle of its cell.
        cells = torch.cartesian_prod(*(torch.arange(0.5, n) for n in _CELLS)).T
        middles = cells / torch.tensor(_CELLS)[:, None] * _BOX[:, None]
        walls = [_tube_distance(middles, tube[:, None]) for tube in self.tubes.T]
        self.nearest = torch.stack(walls).topk(16, dim=0, largest=False).indices

    def _depth(self, points: Tensor, lung: str) -> Tensor:
        """Return how many mm points [N, 3] lie in a lung and outside its neighbours."""
        distance = _distance(points.T, self.shapes[_ORDER.index(lung)][2])
        for _, _, shape in self.shapes[_ORDER.index("heart") :]:
            distance = torch.maximum(distance, -_distance(points.T, shape))
        return -distance

    def _vessels(self, x: Tensor) -> Tensor:
        """Return the share of vessel, 0 to 1, at points [3, N]."""
        n = torch.tensor(_CELLS)[:, None]
        cell = (x / _BOX[:, None] * n).long().minimum(n - 1)
        row = (cell[0] * n[1] + cell[1]) * n[2] + cell[2]
        walls = [_tube_distance(x, self.tubes[:, near[row]]) for near in self.nearest]
        return torch.sigmoid(-torch.stack(walls).amin(0) / _EDGE)

    def scene(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels (uint8) and HU (float32), [N], at points [3, N] in mm."""
        labels, hu = torch.zeros(x.shape[1]).byte(), torch.full((x.shape[1],), -1000.0)
        distances = [_distance(x, shape) for _, _, shape in self.shapes]
        body = distances[0] < 0
        texture = torch.zeros_like(hu)
        angles = self.waves @ x[:, body] + self.phases
        texture[body] = angles.cos_().sum(0) / math.sqrt(30.0)  # variance 1
        # Ribs are slices of a shell; they fall from the spine to the front.
        slices = ((x[0] + 0.35 * x[1]) % 26.0 - 13.0).abs() - 5.5
        distances[2] = torch.maximum(distances[2].abs() - 4.0, slices)
        for (name, value, _), distance in zip(self.shapes, distances, strict=True):
            tissue = torch.tensor(value)
            if "lung" in name:  # denser at the back, as in a lying patient; blobs
                tissue = value + 0.3 * x[1] + 45.0 * texture
                near = (distance < 4 * _EDGE).nonzero()[:, 0]
                tissue[near] += (50.0 - tissue[near]) * self._vessels(x[:, near])
            hu += (tissue - hu) * torch.sigmoid(distance / -_EDGE)
            labels.masked_fill_(distance < 0, LABELS[name])
        return labels, hu + 12.0 * texture


def _distance(x: Tensor, shape: Tensor) -> Tensor:
    """Return about the distance in mm of points [3, N] to an ellipsoid."""
    centre, radii = shape
    q = (x - centre) / radii
    rho = q.square().sum(0).sqrt()
    slope = (q / radii).square().sum(0).sqrt()
    distance: Tensor = rho * (rho - 1) / slope.clamp_min(1e-6)
    return distance


def _tube_distance(x: Tensor, tube: Tensor) -> Tensor:
    """Return the distance in mm of points [3, N] to the walls of tubes [8, N or 1]."""
    p, v = x - tube[:3], tube[3:6] - tube[:3]
    along = ((p * v).sum(0) / (v * v).sum(0)).clamp(0, 1)
    off_axis: Tensor = (p - along * v).square().sum(0).sqrt()
    return off_axis - tube[6].lerp(tube[7], along)


def _paint(anatomy: _Anatomy, size: tuple[int, ...], inverse: _Map) -> list[Tensor]:
    """Return labels and HU, [1, 1, *size], read at ``inverse`` of each voxel."""
    axes = [torch.linspace(0, 1, n, dtype=torch.float64) for n in size]
    painted = []
    for rows in axes[0].split(max(1, _CHUNK // math.prod(size[1:]))):
        unit = inverse(torch.cartesian_prod(rows, *axes[1:]).T[None])[0]
        x = torch.full((3, unit.shape[1]), 0.5)  # a 2D image cuts through the middle
        x[anatomy.axes] = unit.float()
        painted.append(anatomy.scene(x * _BOX[:, None]))
    return [torch.cat(parts).view(1, 1, *size) for parts in zip(*painted, strict=True)]


@dataclass(frozen=True, eq=False)
class Shapes:
    """Images and labels (1 inside, filled; uint8), both [count, 1, size, size]."""

    images: Tensor
    labels: Tensor


def triangles_and_circles(
    count: int, size: int = 128, hollow: bool = False, seed: int = 0, noise: float = 0.0
) -> Shapes:
    """Return ICON's 2D toy shapes: each a triangle or a circle, anywhere, of any size.

    Same distribution and soft edge as ``icon_registration.data`` draws: -1 outside to
    1 inside; hollow: 0 to 1 on the outline (the labels stay filled). ``size`` is the
    voxels a side, ``noise`` the standard deviation of what is added. For pairs, draw
    twice with two seeds, or draw twice as many and cut the batch in half.

    Raises:
        ValueError: count below 0, size below 2, or noise negative or not finite.
    """
    if count < 0 or size < 2 or not 0 <= noise < math.inf:
        raise ValueError(
            "count must be at least 0, size at least 2 and noise finite and not "
            f"negative, got count={count}, size={size}, noise={noise}; change that one"
        )
    generator = torch.Generator().manual_seed(seed)
    cx, cy, r, turn, kind = torch.rand(5, count, 1, 1, generator=generator)
    axis, radius = torch.linspace(0, 1, size), 0.2 + 0.2 * r
    x, y = axis[:, None] - (0.4 + 0.3 * cx), axis - (0.4 + 0.3 * cy)
    # How far out along the normal of the nearest of a triangle's three sides; the
    # side itself is half a radius out.
    angle = torch.atan2(y, x) - 2 * math.pi * turn
    out = torch.stack([torch.cos(angle + k * math.pi / 1.5) for k in range(3)]).amax(0)
    edge = torch.hypot(x, y) - radius * torch.where(kind < 0.5, 1.0, 0.5 / out)
    images = torch.tanh(-40 * edge)
    if hollow:
        images = 1 - images**2
    images += noise * torch.randn(images.shape, generator=generator)
    return Shapes(images[:, None], (edge < 0)[:, None].byte())
