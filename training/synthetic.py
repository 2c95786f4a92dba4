"""Pairs of images of things that do not exist, with the exact motion between them.

Everything is a function of the seed: anatomies (blobs, folded layers, vessels, bodies
with shells and organs), contrasts, faults of imaging, and motions known both ways. All
of it is torch, in batches, on any device.

Two frames: the unit box of the images (ICON's), and *isotropic* coordinates, in which
the longest side of the box is 1 and all others are in proportion around 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# What lies outside the box can move into it: random fields go on for this share of it.
MARGIN = 0.35
# Nodes a side of random fields: anatomy, fine detail, velocity.
COARSE, FINE = {2: 64, 3: 40}, {2: 224, 3: 104}
VELOCITY, SQUARINGS = {2: 64, 3: 44}, 6
BLOBS, LAYERS, ORGANS = 8, 6, 5
BACKGROUND, VESSEL, FINE_VESSEL, SHELL, INNER_SHELL = range(5)
FIRST_BLOB = 5
FIRST_LAYER = FIRST_BLOB + BLOBS
FIRST_ORGAN = FIRST_LAYER + LAYERS
LABELS = FIRST_ORGAN + ORGANS


@dataclass(frozen=True)
class Pairs:
    """A batch of pairs.

    Attributes:
        image_A: moving ``[B, 1, *grid]``, about [0, 1].
        image_B: fixed.
        u_AB: ``[B, d, *grid]``, voxels: A(x + u_AB) shows what B(x) does.
        u_BA: the same of the way back, on A's grid.
        weight_A: ``[B, 1, *grid]``: how much there is to be known of u_BA.
        weight_B: of u_AB.
        clean_A: both anatomies in one contrast, without faults.
        clean_B: the same.
    """

    image_A: Tensor
    image_B: Tensor
    u_AB: Tensor
    u_BA: Tensor
    weight_A: Tensor
    weight_B: Tensor
    clean_A: Tensor
    clean_B: Tensor

    def to(self, device: torch.device | str) -> Pairs:
        """The same on a device."""
        parts = {name: value.to(device) for name, value in vars(self).items()}
        return Pairs(**parts)


class _Draw:
    """Random numbers of a batch; ``[B, ...]`` each."""

    def __init__(self, count: int, d: int, generator: torch.Generator) -> None:
        self.count, self.d, self.generator = count, d, generator
        self.device = generator.device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        value = torch.rand(
            self.count, *shape, generator=self.generator, device=self.device
        )
        return low + (high - low) * value

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(
            self.count, *shape, generator=self.generator, device=self.device
        )

    def chance(self, share: float, *shape: int) -> Tensor:
        return self.uniform(0, 1, *shape) < share

    def whole(self, count: int, *shape: int) -> Tensor:
        """Integers from 0 to count - 1."""
        return self.uniform(0, count, *shape).long().clamp(max=count - 1)

    def field(self, channels: int, nodes: int, smooth: Tensor) -> Tensor:
        """``[B, C, *nodes]``: noise, smoothed by ``[B, C]`` nodes, of deviation 1.

        Periodic: what leaves on one side comes in on the other.
        """
        noise = self.normal(channels, *(nodes,) * self.d)
        axes = tuple(range(2, noise.dim()))
        waves = torch.fft.rfftn(noise, dim=axes)
        for axis in axes:
            last = torch.fft.rfftfreq if axis == axes[-1] else torch.fft.fftfreq
            turns = last(nodes, device=self.device) * 2 * math.pi
            damping = -0.5 * (smooth[:, :, None] * turns).square()
            damping = damping.clamp(min=-40).exp()  # denormal numbers are slow
            ones = (n if i == axis - 2 else 1 for i, n in enumerate(waves.shape[2:]))
            waves = waves * damping.reshape(*damping.shape[:2], *ones)
        noise = torch.fft.irfftn(waves, s=(nodes,) * self.d, dim=axes)
        return noise / noise.std(axes, keepdim=True).clamp(min=1e-6)

    def spread(self, values: Tensor) -> Tensor:
        """``[B, ...]`` with axes added, to multiply images by."""
        return values.reshape(*values.shape, *(1,) * (self.d + 2 - values.dim()))


def make_pairs(
    shape: Sequence[int], count: int, generator: torch.Generator, strength: float = 1.0
) -> Pairs:
    """`Pairs` of that shape, on the generator's device; motions times a strength."""
    draw = _Draw(count, len(shape), generator)
    lattice = _lattice(shape, draw.device)
    there, back = _motion(draw, strength)
    scene = _scene(draw)
    moved = back(lattice.expand(count, *lattice.shape[1:]))
    seen = [scene(moved), scene(lattice.expand(count, *lattice.shape[1:]))]
    renders, cleans, weights = [], [], []
    tables = _contrasts(draw)
    for side, (labels, texture) in enumerate(seen):
        painted = _paint(labels, texture, *tables[side])
        cleans.append(_paint(labels, texture, *tables[0]))
        known = (labels != BACKGROUND).to(painted)
        painted, gone = _lesion(draw, painted, lattice)
        image, cut = _photograph(draw, painted, shape)
        renders.append(image)
        known = F.max_pool2d(known, 5, 1, 2) if draw.d == 2 else _grown(known)
        weights.append(known * (1 - 0.8 * gone) * (1 - 0.9 * cut))
    forward = there(lattice.expand(count, *lattice.shape[1:]))
    voxels = max(shape) - 1
    u_AB, u_BA = (forward - lattice) * voxels, (moved - lattice) * voxels
    inside = [_inside(points, shape) for points in (moved, forward)]
    weights = [
        0.03 + w * (0.15 + 0.82 * i) for w, i in zip(weights, inside, strict=True)
    ]
    return Pairs(*renders, u_AB, u_BA, *weights, *cleans)


def _lattice(shape: Sequence[int], device: torch.device) -> Tensor:
    """``[1, d, *grid]``: isotropic coordinates of the voxels."""
    longest = max(shape) - 1
    axes = [
        (torch.arange(n, device=device) - (n - 1) / 2) / longest + 0.5 for n in shape
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _inside(points: Tensor, shape: Sequence[int]) -> Tensor:
    half = points.new_tensor([(n - 1) / (max(shape) - 1) / 2 for n in shape])
    half = half.view(1, -1, *(1,) * len(shape))
    return ((points - 0.5).abs() <= half).all(1, keepdim=True).to(points)


def _at(fields: Tensor, points: Tensor, mode: str = "bilinear") -> Tensor:
    """Fields ``[B, C, *nodes]`` at isotropic points ``[B, d, *any]``, linearly."""
    unit = (points - 0.5) / (0.5 + MARGIN)
    where = unit.flip(1).movedim(1, -1)
    return F.grid_sample(
        fields, where, mode=mode, padding_mode="border", align_corners=True
    )


def _blur_matrix(sigma: Tensor, n: int, keep: Tensor | None = None) -> Tensor:
    """``[K, n, n]``: Gaussian smoothing by sigma ``[K]``, then every ``keep``-th."""
    x = torch.arange(n, device=sigma.device, dtype=torch.float32)
    row = x.expand(len(sigma), n)
    if keep is not None:
        row = (row / keep[:, None]).round() * keep[:, None]
    far = (row[:, :, None] - x) / sigma.clamp(min=0.2)[:, None, None]
    weights = torch.exp((-0.5 * far.square()).clamp(min=-40))
    weights = weights * (far.abs() < 5)
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-12)


def _along_axes(images: Tensor, *matrices: Tensor) -> Tensor:
    """Images ``[K, C, *grid]``, each axis multiplied by ``[K, m, n]`` of its image."""
    d = images.dim() - 2
    for axis in range(d):
        matrix = matrices[axis % len(matrices)]
        rows = images.movedim(2 + axis, -1)
        flat = rows.reshape(len(images), -1, rows.shape[-1])
        rows = torch.bmm(flat, matrix.mT).reshape(*rows.shape[:-1], matrix.shape[1])
        images = rows.movedim(-1, 2 + axis)
    return images.contiguous()


# --- anatomy ------------------------------------------------------------------------


def _scene(draw: _Draw) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function of isotropic points: labels ``[B, 1, *any]``, texture about 1."""
    d = draw.d
    nodes = COARSE[d]
    box = nodes / (1 + 2 * MARGIN)  # nodes along the longest side
    # Channels: blobs, layers, 2 for vessels, body, mixture, organs.
    size = draw.uniform(0.0, 1.0, 1).pow(1.5) * 0.09 + 0.022
    smooth = box * size * draw.uniform(0.7, 1.4, BLOBS + 5 + ORGANS)
    smooth[:, BLOBS + 1 : BLOBS + 3] = box * draw.uniform(0.025, 0.06, 1)
    smooth[:, BLOBS + 3 :] = box * draw.uniform(0.05, 0.12, 2 + ORGANS)
    coarse = draw.field(BLOBS + 5 + ORGANS, nodes, smooth)
    many = FINE[d]
    detail = draw.uniform(0.006, 0.022, 3) * many / (1 + 2 * MARGIN)
    fine = draw.field(3, many, detail)
    bias = draw.normal(BLOBS) * draw.uniform(0, 1, 1)
    frequency, phase = draw.uniform(1.0, 4.0, 1), draw.uniform(0, 6, 1)
    layered = draw.normal(1) * 2.5
    width, thin = draw.uniform(-0.1, 0.35, 1), draw.uniform(-0.2, 0.3, 1)
    jitter = draw.uniform(0, 0.25, 1)
    whole = draw.chance(0.35, 1)
    radius = torch.where(whole, 10.0, draw.uniform(0.3, 0.55, 1))
    stretch = draw.uniform(0.75, 1.3, d)
    power = draw.uniform(2.0, 5.0, 1)
    middle = 0.5 + 0.06 * draw.normal(d)
    wobble = draw.uniform(0.0, 0.05, 1)
    shells = draw.uniform(0.0, 0.05, 2) * draw.chance(0.6, 2)
    centres = 0.5 + draw.uniform(-0.3, 0.3, d, ORGANS)
    radii = draw.uniform(0.05, 0.26, d, ORGANS)
    organs = draw.chance(0.5, ORGANS)
    organ_wobble = draw.uniform(0.0, 0.35, ORGANS)
    solid = draw.chance(0.4, ORGANS)  # without vessels
    s = draw.spread

    def scene(points: Tensor) -> tuple[Tensor, Tensor]:
        f, g = _at(coarse, points), _at(fine, points)
        rough = s(jitter) * g[:, :1]
        blobs = (f[:, :BLOBS] + s(bias)).argmax(1, keepdim=True) + FIRST_BLOB
        level = f[:, BLOBS : BLOBS + 1] * s(frequency) + s(phase) + rough
        layers = level.floor().long().remainder(LAYERS) + FIRST_LAYER
        mixture = f[:, BLOBS + 4 : BLOBS + 5]
        labels = torch.where(mixture + s(layered) > 0, layers, blobs)
        at = points - s(middle)
        tubes = f[:, BLOBS + 1 : BLOBS + d].square().sum(1, keepdim=True).sqrt()
        vessels = tubes < s(width)
        small = g[:, 1:d].square().sum(1, keepdim=True).sqrt() < s(thin)
        for i in range(ORGANS):
            r = ((points - s(centres[..., i])) / s(radii[..., i])).square().sum(1, True)
            r = r.sqrt() + s(organ_wobble[:, i : i + 1]) * (
                f[:, BLOBS + 5 + i : BLOBS + 6 + i] + rough
            )
            organ = (r < 1) & s(organs[:, i : i + 1])
            labels = torch.where(organ, FIRST_ORGAN + i, labels)
            vessels = vessels & ~(organ & s(solid[:, i : i + 1]))
        labels = torch.where(small, FINE_VESSEL, labels)
        labels = torch.where(vessels, VESSEL, labels)
        p = s(power)
        r = (at / s(stretch)).abs().clamp(min=1e-4).pow(p).sum(1, True).pow(1 / p)
        depth = s(radius) - r + s(wobble) * (f[:, BLOBS + 3 : BLOBS + 4] + 0.3 * rough)
        thick, thick_2 = s(shells[:, :1]), s(shells[:, 1:])
        labels = torch.where(depth < thick + thick_2, INNER_SHELL, labels)
        labels = torch.where(depth < thick, SHELL, labels)
        labels = torch.where(depth < 0, BACKGROUND, labels)
        return labels, g[:, :1]

    return scene


def _contrasts(draw: _Draw) -> list[tuple[Tensor, Tensor]]:
    """For each image an intensity and an amount of texture, ``[B, LABELS]``."""
    values = draw.uniform(0.0, 1.0, LABELS)
    dull = torch.where(draw.chance(0.35, 1), draw.uniform(0.1, 0.5, 1), 1.0)
    inner = slice(FIRST_BLOB, FIRST_ORGAN)
    values[:, inner] = 0.5 + (values[:, inner] - 0.5) * dull
    values[:, BACKGROUND] *= draw.chance(0.15)
    texture = draw.uniform(0.0, 1.0, LABELS).square() * draw.uniform(0.0, 0.25, 1)
    texture[:, BACKGROUND] = 0
    # The other image: the same, another scale of grey, its negative, or all other.
    kind = draw.uniform(0.0, 1.0, 1)
    near = values + 0.06 * draw.normal(LABELS) * draw.chance(0.5, 1)
    grey = near.clamp(min=0.01).pow(draw.uniform(-0.7, 0.7, 1).exp())
    other = torch.lerp(
        draw.uniform(0.0, 1.0, LABELS), values, draw.uniform(0.0, 0.8, 1)
    )
    other[:, BACKGROUND] = values[:, BACKGROUND]
    second = torch.where(kind < 0.5, near, grey)
    second = torch.where(kind > 0.75, other, second)
    second = torch.where(kind > 0.92, 1 - near, second)
    sign = torch.where(kind > 0.92, -1.0, 1.0)
    amount = torch.where(kind > 0.75, draw.uniform(0.0, 1.0, LABELS), 1.0)
    return [(values, texture), (second, texture * amount * sign)]


def _paint(labels: Tensor, texture: Tensor, values: Tensor, amount: Tensor) -> Tensor:
    flat = labels.flatten(1)
    value, much = (t.gather(1, flat).reshape(labels.shape) for t in (values, amount))
    return value + much * texture


def _lesion(draw: _Draw, image: Tensor, lattice: Tensor) -> tuple[Tensor, Tensor]:
    """The image with something that the other one does not have, and where."""
    at = 0.5 + draw.uniform(-0.35, 0.35, draw.d)
    radius = draw.uniform(0.03, 0.13, 1)
    there = draw.chance(0.2, 1)
    value = draw.uniform(0.0, 1.0, 1)
    r = (lattice - draw.spread(at)).square().sum(1, True).sqrt()
    gone = (r < draw.spread(radius)) & draw.spread(there)
    return torch.where(gone, draw.spread(value), image), gone.to(image)


def _photograph(
    draw: _Draw, image: Tensor, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Blur, thick slices, bias, noise, a field of view; and where it was cut off."""
    d, count = draw.d, draw.count
    sigma = draw.uniform(0.3, 1.0, 1) + draw.uniform(0, 1.5, 1) * draw.chance(0.25, 1)
    thick = torch.where(draw.chance(0.3), draw.uniform(2.0, 6.0), 1.0)
    along, matrices = draw.whole(d), []
    for axis, n in enumerate(shape):
        keep = torch.where(along == axis, thick, torch.ones_like(thick))
        blur = torch.maximum(sigma[:, 0], 0.4 * keep * (keep > 1))
        matrices.append(_blur_matrix(blur, n, keep))
    image = _along_axes(image, *matrices)
    noise = draw.field(1, 16, draw.uniform(2.0, 4.0, 1))
    bias = _at(noise, _lattice(shape, draw.device).expand(count, d, *shape))
    much = draw.uniform(0.0, 0.25, 1) * draw.chance(0.5, 1)
    image = image * (draw.spread(much) * bias).exp()
    level = draw.uniform(0.0, 1.0, 1).pow(2) * 0.1
    rough = draw.normal(1, *shape)
    image = image + draw.spread(level) * rough
    # The field of view: a slab along one axis, from one side or both.
    axis, low, high = draw.whole(d), draw.uniform(-0.4, 0.25), draw.uniform(0.75, 1.4)
    narrow = draw.chance(0.25)
    outside = torch.zeros_like(image, dtype=torch.bool)
    for a, n in enumerate(shape):
        x = torch.linspace(0, 1, n, device=image.device)
        x = x.view(1, 1, *(n if i == a else 1 for i in range(d)))
        here = draw.spread((narrow & (axis == a))[:, None])
        outside = outside | (
            ((x < draw.spread(low[:, None])) | (x > draw.spread(high[:, None]))) & here
        )
    return image.masked_fill(outside, 0.0), outside.to(image)


def _grown(known: Tensor) -> Tensor:
    return F.max_pool3d(known, 5, 1, 2)


# --- motion -------------------------------------------------------------------------

_Way = Callable[[Tensor], Tensor]


def _motion(draw: _Draw, strength: float) -> tuple[_Way, _Way]:
    """Random invertible motions of isotropic points, and the way back.

    Affine first, then the flow of a stationary velocity (back: that of its negative).
    """
    d, nodes = draw.d, VELOCITY[draw.d]
    box = nodes / (1 + 2 * MARGIN)
    velocity = torch.zeros(draw.count, d, *(nodes,) * d, device=draw.device)
    # Widths of the motions (shares of the box), how far they go, how often they are.
    for low, high, far, share in (
        (0.15, 0.3, 0.13, 0.8),
        (0.07, 0.15, 0.07, 0.7),
        (0.035, 0.07, 0.025, 0.6),
    ):
        width = draw.uniform(low, high, 1)
        flow = draw.field(d, nodes, (box * width).expand(-1, d))
        amount = draw.uniform(0.0, 1.0, 1).square() * far * draw.chance(share, 1)
        velocity = velocity + draw.spread(amount) * flow
    velocity = velocity + _sliding(draw, box, nodes)
    reach = velocity.square().sum(1).amax(tuple(range(1, d + 1))).sqrt()
    limit = (0.25 / reach.clamp(min=1e-6)).clamp(max=1.0) * strength
    velocity = velocity * draw.spread(limit[:, None])
    there, back = _flow(velocity), _flow(-velocity)
    matrix, shift = _affine(draw, strength)
    inverse = torch.linalg.inv(matrix)

    def onward(points: Tensor) -> Tensor:
        at = points - 0.5
        at = torch.einsum("bij,bj...->bi...", matrix, at) + draw.spread(shift) + 0.5
        return at + _at(there, at)

    def homeward(points: Tensor) -> Tensor:
        at = points + _at(back, points) - 0.5 - draw.spread(shift)
        return torch.einsum("bij,bj...->bi...", inverse, at) + 0.5

    return onward, homeward


def _sliding(draw: _Draw, box: float, nodes: int) -> Tensor:
    """Velocity along one axis, other on both sides of a wall along that axis."""
    d = draw.d
    wall = draw.field(1, nodes, box * draw.uniform(0.08, 0.2, 1))
    push = draw.field(1, nodes, box * draw.uniform(0.12, 0.3, 1)) + draw.normal(
        1, *(1,) * d
    )
    amount = draw.uniform(0.02, 0.09, 1) * draw.chance(0.3, 1)
    along = draw.whole(d)
    parts = []
    for axis in range(d):
        flat = wall.mean(2 + axis, keepdim=True)
        flat = flat / flat.std(tuple(range(2, d + 2)), keepdim=True).clamp(min=1e-6)
        here = draw.spread(amount * (along == axis)[:, None])
        parts.append(torch.sigmoid(12 * flat) * push * here)
    return torch.cat(parts, 1)


def _flow(velocity: Tensor) -> Tensor:
    """Displacement after unit time, by scaling and squaring on its own nodes."""
    d, nodes = velocity.shape[1], velocity.shape[2]
    line = torch.linspace(-MARGIN, 1 + MARGIN, nodes, device=velocity.device)
    x = torch.stack(torch.meshgrid(*[line] * d, indexing="ij"))[None]
    u = velocity / 2**SQUARINGS
    for _ in range(SQUARINGS):
        u = u + _at(u, x + u)
    return u


def _affine(draw: _Draw, strength: float) -> tuple[Tensor, Tensor]:
    """What an affine start left, and more of it now and then."""
    d = draw.d
    much = strength * draw.uniform(0.0, 1.0, 1).pow(2.5)
    skew = draw.uniform(-1, 1, d, d)
    skew = skew - skew.mT
    turn = torch.linalg.matrix_exp(much[:, :, None] * math.radians(40) * skew)
    stretch = 0.25 * much[:, :, None] * draw.uniform(-1, 1, d, d)
    eye = torch.eye(d, device=draw.device)
    shift = strength * draw.uniform(0, 1, 1).square() * 0.16 * draw.uniform(-1, 1, d)
    return turn @ (eye + stretch), shift
