"""Frames of a story: any moment on its own, or all in order; and what is to be seen in each, exactly.

Every frame is a function of the story and the time alone, so 100 frames of an hour cost 100 renderings, and memory
does not grow with the length. Cheap by making textures once per scene: a pattern is a map of phases in steps of
1/256, and uint8 arithmetic, which wraps, moves it. Colours leave room below 255 for the grain, which is added last.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .dice import Dice
from .story import ACTIONS, RADII, SHAPES, Distractor, Event, Scene, Story

RGB = {
    "red": (222, 28, 28),
    "green": (20, 150, 40),
    "blue": (30, 50, 225),
    "yellow": (236, 226, 30),
    "white": (238, 238, 238),
    "orange": (238, 128, 0),
    "purple": (130, 25, 165),
    "cyan": (30, 215, 225),
    "pink": (238, 140, 195),
    "black": (4, 4, 4),
}
SMALLEST, LARGEST = 32, 1024
BLINKS = 5  # phases of a blinking object: on, off, on, off, on
FAINT = 0.25  # an object less opaque than this is not to be seen


@dataclass(frozen=True)
class FrameTruth:
    """What a frame shows. Without an object, `event` is `None`, the words are `None` and the numbers 0.

    `x`, `y`, `radius`: fractions of the side; `angle`: degrees; `opacity`: 0 to 1; `progress`: of the event, 0 to 1.
    `mask`: `(size, size)` bool, the object's pixels; empty where it is fainter than a quarter. `box`: left, top, right
    and bottom of the mask in pixels, the last two exclusive; `None` where the mask is empty.
    """

    time: float
    scene: str
    event: int | None
    shape: str | None
    colour: str | None
    size: str | None
    action: str | None
    x: float
    y: float
    radius: float
    angle: float
    opacity: float
    progress: float
    mask: np.ndarray
    box: tuple[int, int, int, int] | None

    @property
    def visible(self) -> bool:
        return self.box is not None


@dataclass(frozen=True)
class _Pose:
    x: float
    y: float
    radius: float
    angle: float
    opacity: float
    progress: float


class Renderer:
    """Draws a story at one size: frames are RGB uint8 `(size, size, 3)`.

    Raises:
        ValueError: `size` is not within 32 to 1024.
    """

    def __init__(self, story: Story, size: int = 64):
        if not SMALLEST <= size <= LARGEST:
            raise ValueError(f"a frame of size={size} is not possible; choose {SMALLEST} to {LARGEST}")
        self.story, self.size = story, size
        self._scenes: dict[int, _Backdrop] = {}
        self._grain = _grain(story, size)
        self._axis = (np.arange(size, dtype=np.float32) + 0.5) / size

    def frame_at(self, time: float) -> np.ndarray:
        """The frame at `time` seconds, 0 <= time < duration (a later time shows the end)."""
        frame = self._background(time)
        for distractor in self.story.distractors:
            self._draw(frame, *self._distractor(distractor, time))
        event = self.story.event_at(time)
        if event is not None:
            pose = pose_at(event, time)
            if pose.opacity > 0:
                rows, columns, cover = self._cover(event.shape, pose)
                self._draw(frame, rows, columns, cover, np.array(RGB[event.colour], np.float32))
        # The noise of a moment is a window on one big sheet, at a place that is a hash of the time.
        milliseconds = round(time * 1000)
        down = (milliseconds * 2654435761 >> 7) % self.size
        right = (milliseconds * 2246822519 >> 9) % self.size
        frame += self._grain[down : down + self.size, right : right + self.size]
        return frame

    def truth_at(self, time: float) -> FrameTruth:
        """What the frame at `time` shows."""
        mask = np.zeros((self.size, self.size), bool)
        event = self.story.event_at(time)
        scene = self.story.scene_at(time).kind
        if event is None:
            words = dict.fromkeys(("event", "shape", "colour", "size", "action"))
            return FrameTruth(time, scene, **words, **vars(_Pose(0, 0, 0, 0, 0, 0)), mask=mask, box=None)  # type: ignore[arg-type]
        pose = pose_at(event, time)
        box = None
        if pose.opacity >= FAINT:
            rows, columns, cover = self._cover(event.shape, pose, opacity=1.0)
            mask[rows, columns] = cover > 0.5
            ys, xs = np.nonzero(mask)
            if len(xs):
                box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        return FrameTruth(
            time=time,
            scene=scene,
            event=self.story.events.index(event),
            shape=event.shape,
            colour=event.colour,
            size=event.size,
            action=event.action,
            **vars(pose),
            mask=mask,
            box=box,
        )

    def _background(self, time: float) -> np.ndarray:
        scene = self.story.scene_at(time)
        number = self.story.scenes.index(scene)
        if number not in self._scenes:
            self._scenes[number] = _Backdrop(scene, self.size)
        return self._scenes[number].at(time / self.story.duration)

    def _cover(self, shape: str, pose: _Pose, opacity: float | None = None):
        """-> rows, columns (slices), and how much of each of their pixels the object covers, 0 to 1, times opacity."""
        rows, columns = self._window(pose.x, pose.y, pose.radius)
        x = (self._axis[columns] - pose.x)[None, :] / pose.radius
        y = (self._axis[rows] - pose.y)[:, None] / pose.radius
        # Rounded, so that a last digit of another C library changes no pixel.
        cos, sin = (round(f(math.radians(pose.angle)), 7) for f in (math.cos, math.sin))
        distance = _DISTANCES[shape](cos * x + sin * y, cos * y - sin * x)
        cover = np.clip(0.5 - distance * (pose.radius * self.size), 0, 1)
        return rows, columns, cover * (pose.opacity if opacity is None else opacity)

    def _window(self, x: float, y: float, radius: float) -> tuple[slice, slice]:
        reach = radius * 1.05 + 1 / self.size
        left, right = (int(np.clip((x + side * reach) * self.size, 0, self.size)) for side in (-1, 1))
        top, bottom = (int(np.clip((y + side * reach) * self.size, 0, self.size)) for side in (-1, 1))
        return slice(top, bottom + 1), slice(left, right + 1)

    def _distractor(self, distractor: Distractor, time: float):
        share = time / self.story.duration
        x, y = (
            _bounce(start + way * share)
            for start, way in ((distractor.x, distractor.dx), (distractor.y, distractor.dy))
        )
        rows, columns = self._window(x, y, distractor.radius)
        across = np.abs(self._axis[columns] - x)[None, :] / distractor.radius
        down = np.abs(self._axis[rows] - y)[:, None] / distractor.radius
        if distractor.shape == "dot":
            distance = np.sqrt(across * across + down * down) - 0.9
        else:
            distance = np.maximum(across - 1, down - 0.35)
        cover = np.clip(0.5 - distance * (distractor.radius * self.size), 0, 1)
        return rows, columns, cover, np.float32(distractor.grey)

    @staticmethod
    def _draw(frame: np.ndarray, rows: slice, columns: slice, cover: np.ndarray, colour) -> None:
        part = frame[rows, columns]
        part[...] = part + cover[:, :, None].astype(np.float32) * (colour - part) + np.float32(0.5)


def pose_at(event: Event, time: float) -> _Pose:
    """Place, size, angle and opacity of the event's object; `time` within the event."""
    progress = min(max((time - event.start) / (event.end - event.start), 0.0), 1.0)
    radius, angle, opacity = RADII[event.size], event.angle, 1.0
    if event.action == "grow":
        radius *= 0.55 + 0.85 * progress
    elif event.action == "shrink":
        radius *= 1.4 - 0.85 * progress
    elif event.action == "turn":
        angle += 180 * progress
    elif event.action == "blink":
        opacity = float(int(min(progress, 0.999) * BLINKS) % 2 == 0)
    elif event.action == "appear":
        opacity = min(0.1 + 1.1 * progress, 1.0)
    elif event.action == "leave":
        opacity = min(1.2 - 1.1 * progress, 1.0)
    x, y = event.x + event.dx * progress, event.y + event.dy * progress
    return _Pose(x, y, radius, angle, opacity, progress)


def frame_times(story: Story, fps: float) -> Iterator[float]:
    """The time of every frame of a video with `fps` frames a second: 0, 1 / fps, ..."""
    if not fps > 0:
        raise ValueError(f"fps={fps} is not possible; it must be above 0")
    return (number / fps for number in range(max(1, round(story.duration * fps))))


def middle_times(story: Story, num_frames: int) -> list[float]:
    """The middles of `num_frames` equal parts of the story."""
    return [(number + 0.5) / num_frames * story.duration for number in range(num_frames)]


def iter_frames(story: Story, *, fps: float = 10, size: int = 64) -> Iterator[np.ndarray]:
    """All frames in order, RGB uint8 `(size, size, 3)`, one in memory at a time."""
    renderer = Renderer(story, size)
    return (renderer.frame_at(time) for time in frame_times(story, fps))


def frames_at(story: Story, times, *, size: int = 64) -> np.ndarray:
    """The frames at these seconds alone: `(times, size, size, 3)` uint8."""
    renderer = Renderer(story, size)
    frames = [renderer.frame_at(time) for time in times]
    return np.stack(frames) if frames else np.empty((0, size, size, 3), np.uint8)


# --- backgrounds ---


class _Backdrop:
    """One scene at one size. `at(share)`: the picture at a part of the video, `(size, size, 3)` uint8, a new array."""

    def __init__(self, scene: Scene, size: int):
        self.scene = scene
        axis = (np.arange(size) + 0.5) / size
        self.table = _table(scene)
        turn = 256 * scene.repeats
        if scene.kind in ("gradient", "stripes"):
            cos, sin = (round(f(math.radians(scene.direction)), 7) for f in (math.cos, math.sin))
            self.phases = _wrap(turn * (cos * axis[None, :] + sin * axis[:, None]))
        elif scene.kind == "rings":
            self.phases = _wrap(turn * np.sqrt((axis[None, :] - 0.5) ** 2 + (axis[:, None] - 0.5) ** 2))
        elif scene.kind == "noise":
            # A sheet of random blocks, a few times as large as the frame; the frame wanders over it.
            cells = int(scene.repeats)
            greys = Dice(scene.seed, 6).bytes((4 * cells) ** 2).reshape(4 * cells, 4 * cells)
            places = (np.arange(3 * size) * cells) // size
            self.sheet = greys[places % (4 * cells)][:, places % (4 * cells)]
        else:
            self.phases = _wrap(turn * axis)

    def at(self, share: float) -> np.ndarray:
        scene = self.scene
        moved = share * scene.speed
        shift = np.uint8(int(256 * moved) % 256)
        index: np.ndarray
        if scene.kind in ("gradient", "stripes"):
            index = self.phases + shift
        elif scene.kind == "rings":
            index = self.phases - shift
        elif scene.kind == "noise":
            size = len(self.sheet) // 3
            top, left = (int(size * 2 * _bounce(moved * factor / 2)) for factor in (1.0, 0.7))
            index = self.sheet[top : top + size, left : left + size]
        else:
            angle = math.radians(scene.direction)
            across = self.phases + np.uint8(int(256 * moved * round(math.cos(angle), 7)) % 256)
            down = self.phases + np.uint8(int(256 * moved * round(math.sin(angle), 7)) % 256)
            if scene.kind == "checker":
                index = (down & 128)[:, None] ^ (across & 128)[None, :]
            else:  # dots: near the middle of a cell
                near = [(phases.astype(np.int32) - 128) ** 2 for phases in (down, across)]
                index = ((near[0][:, None] + near[1][None, :]) < 72**2).astype(np.uint8) * np.uint8(255)
        return self.table[index]


def _wrap(phases: np.ndarray) -> np.ndarray:
    return (np.floor(phases).astype(np.int64) % 256).astype(np.uint8)


def _table(scene: Scene) -> np.ndarray:
    """`(256, 3)` uint8: the colour of every phase. Smooth for a gradient and noise, two colours for the others."""
    steps = np.arange(256)
    if scene.kind == "gradient":
        weight = np.abs(steps - 128) / 128
    elif scene.kind == "noise":
        weight = steps / 255
    else:
        weight = (steps >= 128).astype(float)
    first, second = (np.array(colour, float) for colour in scene.colours)
    return (first + weight[:, None] * (second - first) + 0.5).astype(np.uint8)


def _grain(story: Story, size: int) -> np.ndarray:
    """`(2 * size, 2 * size, 3)` uint8 noise below the story's grain, of grey and a little colour."""
    noise = Dice(story.seed, 7).bytes(4 * size * size * 3).reshape(2 * size, 2 * size, 3).astype(np.uint16)
    return (noise * story.grain >> 8).astype(np.uint8)


def _bounce(place: float) -> float:
    """Folds a line to 0 .. 1: there and back."""
    place %= 2.0
    return 2.0 - place if place > 1 else place


# --- shapes: how far a point is outside; about 1 from the centre to the farthest corner; y points down ---


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - 0.75


def _triangle(x, y):
    return np.maximum(y, np.abs(x) * 0.8660254 - y * 0.5) - 0.5


def _star(x, y):
    # Inside at least four of the five lines that join every second corner.
    lines = [x * a + y * b for a, b in _STAR_NORMALS]
    return np.partition(np.stack(lines), 3, axis=0)[3] - 0.36


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.9, np.minimum(x, y) - 0.3)


def _moon(x, y):
    return np.maximum(np.sqrt(x * x + y * y) - 0.92, 0.72 - np.sqrt((x - 0.45) ** 2 + y * y))


_STAR_NORMALS = [(round(math.sin(math.tau * k / 5), 7), round(math.cos(math.tau * k / 5), 7)) for k in range(5)]
_DISTANCES = {"square": _square, "triangle": _triangle, "star": _star, "cross": _cross, "moon": _moon}
assert set(_DISTANCES) == set(SHAPES) and len(ACTIONS) == 10
