"""The cat's grid as a gymnasium environment: 5 x 5 cells, a broom, a bath and some meat."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

SIZE = 5
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # (row, column)
START = (0, 0)
BROOM, BATH, MEAT = (0, 1), (3, 2), (4, 4)
REWARDS = {BROOM: -1.0, BATH: -10.0, MEAT: 100.0}  # for moving onto a cell; 0 for the others
ENDS = {BATH, MEAT}  # the cat faints, or has eaten
CELL = 48  # pixels

STATES, ACTIONS = SIZE * SIZE, len(MOVES)
ID = "rlhf_fast/Cat-v0"


def state_of(cell: tuple[int, int]) -> int:
    return cell[0] * SIZE + cell[1]


def cell_of(state: int) -> tuple[int, int]:
    return divmod(state, SIZE)


class CatEnv(gymnasium.Env):
    """Observation: the cell, row·5 + column. Actions: up, down, left, right.

    A move off the grid leaves the cat where it is and costs nothing. Bath and meat end the episode;
    ``reset`` puts the cat back at the start. The drunk cat: with probability ``slip`` the move is
    drawn afresh, each of the four alike.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(self, slip: float = 0.0, render_mode: str | None = None) -> None:
        if not 0 <= slip <= 1:
            raise ValueError(f"slip must be a probability, got {slip}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be ansi, rgb_array or None, got {render_mode!r}")
        self.slip, self.render_mode = slip, render_mode
        self.observation_space = gymnasium.spaces.Discrete(STATES)
        self.action_space = gymnasium.spaces.Discrete(ACTIONS)
        self.cell = START

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell = START
        return state_of(self.cell), {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """One uniform draw a step: below ``slip`` the cat slips, and the draw says whereto."""
        draw = self.np_random.random()
        if draw < self.slip:
            action = int(draw / self.slip * ACTIONS)
        cell, reward, terminated = move(self.cell, action)
        self.cell = cell
        return state_of(cell), reward, terminated, False, {}

    def render(self) -> str | np.ndarray | None:
        if self.render_mode == "ansi":
            return ansi(self.cell)
        return picture(self.cell) if self.render_mode == "rgb_array" else None


def move(cell: tuple[int, int], action: int) -> tuple[tuple[int, int], float, bool]:
    """(new cell, reward, whether the episode is over) of a sober move."""
    (row, column), (down, right) = cell, list(MOVES.values())[action]
    new = (row + down, column + right)
    if not (0 <= new[0] < SIZE and 0 <= new[1] < SIZE):
        return cell, 0.0, False
    return new, REWARDS.get(new, 0.0), new in ENDS


# A time limit is no end of the episode: gymnasium's TimeLimit reports it as `truncated`.
gymnasium.register(ID, entry_point=CatEnv, max_episode_steps=100)


def ansi(cat: tuple[int, int]) -> str:
    """C the cat, b the broom, ~ the bath, m the meat."""
    signs = {BROOM: "b", BATH: "~", MEAT: "m"} | {cat: "C"}
    rows = [" ".join(signs.get((r, c), ".") for c in range(SIZE)) for r in range(SIZE)]
    return "\n".join(rows) + "\n"


def picture(cat: tuple[int, int]) -> np.ndarray:
    """[240, 240, 3] uint8."""
    from PIL import Image, ImageDraw

    scale = 4  # drawn large and shrunk: smooth edges
    side = CELL * scale
    image = Image.new("RGB", (SIZE * side, SIZE * side), "white")
    draw = ImageDraw.Draw(image)
    for cell in np.ndindex(SIZE, SIZE):
        y, x = cell[0] * side, cell[1] * side
        draw.rectangle((x, y, x + side, y + side), outline="#b8b8b8", width=scale)
    for cell, paint in ((BROOM, paint_broom), (BATH, paint_bath), (MEAT, paint_meat)):
        paint(draw, cell[1] * side, cell[0] * side, side / 100)
    paint_cat(draw, cat[1] * side, cat[0] * side, side / 100)
    return np.asarray(image.resize((SIZE * CELL, SIZE * CELL), Image.Resampling.LANCZOS))


def scaled(points: str, x: float, y: float, s: float) -> list[tuple[float, float]]:
    """ "10,20 30,40" in hundredths of a cell -> pixels."""
    pairs = [point.split(",") for point in points.split()]
    return [(x + float(a) * s, y + float(b) * s) for a, b in pairs]


def paint_broom(draw: Any, x: float, y: float, s: float) -> None:
    draw.line(scaled("80,12 45,58", x, y, s), fill="#8a5a2b", width=int(7 * s))
    draw.polygon(scaled("36,50 56,64 38,92 10,72", x, y, s), fill="#e0b040", outline="#8a5a2b")


def paint_bath(draw: Any, x: float, y: float, s: float) -> None:
    draw.polygon(scaled("8,45 92,45 80,82 20,82", x, y, s), fill="#f2f6fa", outline="#446688")
    draw.polygon(scaled("14,50 86,50 83,60 17,60", x, y, s), fill="#58aee8")
    for foot in ("24,82 34,92", "66,82 76,92"):
        draw.ellipse(scaled(foot, x, y, s), fill="#446688")
    for bubble in ("30,26 44,40", "48,14 64,30", "66,30 76,40"):
        draw.ellipse(scaled(bubble, x, y, s), fill="#cfe8fa", outline="#58aee8")


def paint_meat(draw: Any, x: float, y: float, s: float) -> None:
    draw.line(scaled("60,60 84,84", x, y, s), fill="#efe6d2", width=int(10 * s))
    for knob in ("74,84 88,98", "84,74 98,88"):
        draw.ellipse(scaled(knob, x, y, s), fill="#efe6d2", outline="#b8a888")
    draw.ellipse(scaled("10,12 72,70", x, y, s), fill="#b5452c", outline="#7a2a18")
    draw.ellipse(scaled("24,22 44,38", x, y, s), fill="#d8745a")


def paint_cat(draw: Any, x: float, y: float, s: float) -> None:
    for ear in ("20,48 24,10 48,34", "80,48 76,10 52,34"):
        draw.polygon(scaled(ear, x, y, s), fill="#f09030", outline="#a85c10")
    draw.ellipse(scaled("16,26 84,88", x, y, s), fill="#f09030", outline="#a85c10")
    for eye in ("34,46 43,58", "57,46 66,58"):
        draw.ellipse(scaled(eye, x, y, s), fill="#203020")
    draw.polygon(scaled("45,64 55,64 50,70", x, y, s), fill="#803030")
    for whisker in ("40,70 18,66", "40,74 20,78", "60,70 82,66", "60,74 80,78"):
        draw.line(scaled(whisker, x, y, s), fill="#703c08", width=max(1, int(1.5 * s)))
