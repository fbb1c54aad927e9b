"""Recurrent propagation over a grid in four directions (thesis, section 3.2.3, equations 3.2 and 3.3), without a loop over cells.

A cell's state needs the states of the cell above, to the left, and above to the left, in the direction "down, right"; the other directions
are flips of it. All cells of one anti-diagonal are computed at once, so a pass takes 2 S - 1 steps, and the four paths run side by side.
Each path is a pass in one direction, and a second one in the opposite direction that reads the states of the first.

Left open by the thesis: the nonlinearity (leaky ReLU, as everywhere in the chapter), alpha, and whether paths share weights (they do not).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.1  # of leaky ReLUs in ISFP
# axes (rows, columns) to flip so that a path's first direction becomes "down, right": of DR then UL, UL then DR, DL then UR, UR then DL
PATHS: tuple[tuple[int, ...], ...] = ((), (-3, -2), (-2,), (-3,))
BOTH = (-3, -2)


class Propagation(nn.Module):
    """Four paths of two passes each; returns the sum of their final states."""

    diagonals: Tensor
    places: Tensor
    valid: Tensor

    def __init__(self, width: int, side: int, alpha: float) -> None:
        super().__init__()
        self.side, self.alpha = side, alpha
        shape = (2, len(PATHS), width, width)  # pass, path
        self.input_weight = nn.Parameter(torch.empty(shape))  # W_1
        self.state_weight = nn.Parameter(torch.empty(shape))  # W_2
        for weight in (self.input_weight, self.state_weight):
            nn.init.uniform_(weight, -((3 / width) ** 0.5), (3 / width) ** 0.5)  # Xavier's
        rows, steps = torch.arange(side), torch.arange(2 * side - 1)
        columns = steps[:, None] - rows
        valid = (columns >= 0) & (columns < side)
        cells = torch.where(valid, rows * side + columns, 0)
        places = (rows[:, None] + rows) * side + rows[:, None]
        self.register_buffer("diagonals", cells.flatten(), persistent=False)  # cell at each place of each anti-diagonal
        self.register_buffer("places", places.flatten(), persistent=False)  # the other way round
        self.register_buffer("valid", valid[:, None, :, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Propagate float [E, S * S, C], row by row; returns the same shape."""
        grid = x.unflatten(1, (self.side, self.side))
        turned = torch.stack([grid.flip(axes) if axes else grid for axes in PATHS])  # [4, E, S, S, C]
        first = self._pass(turned, 0)
        second = self._pass(first.flip(BOTH), 1).flip(BOTH)
        paths = [states.flip(axes) if axes else states for states, axes in zip(second, PATHS, strict=True)]
        return torch.stack(paths).sum(dim=0).flatten(1, 2)

    def _pass(self, grid: Tensor, number: int) -> Tensor:
        """Run "down, right" over every path's grid [4, E, S, S, C]."""
        paths, num, side, _, width = grid.shape
        own = grid.reshape(paths, num * side * side, width) @ self.input_weight[number].transpose(1, 2)
        steps = own.unflatten(1, (num, side * side)).index_select(2, self.diagonals).unflatten(2, (2 * side - 1, side))
        weight = self.alpha * self.state_weight[number].transpose(1, 2)
        before = last = grid.new_zeros(paths, num, side, width)  # states two and one diagonals ago; place i lies in row i
        states = []
        for step, valid in zip(steps.unbind(2), self.valid, strict=True):
            incoming = last + F.pad((last + before)[:, :, :-1], (0, 0, 1, 0))  # left, above, above to the left
            added = torch.bmm(incoming.flatten(1, 2), weight.to(incoming.dtype)).unflatten(1, (num, side))
            before, last = last, F.leaky_relu(step + added, SLOPE).masked_fill(~valid, 0.0).to(grid.dtype)
            states.append(last)
        return torch.stack(states, dim=2).flatten(2, 3).index_select(2, self.places).unflatten(2, (side, side))
