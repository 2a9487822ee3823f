r"""BatchBALD: rows chosen together, by what their labels tell of the weights jointly.

Kirsch et al. 2019 (arXiv 1906.08158): a_1, a_2, ... are chosen greedily, each with the largest gain

    I(y_1 .. y_k; w) - I(y_1 .. y_{k-1}; w) = sum_m P(m) H[p(y_k | m)] - mean_s H[p_s(y_k)]

where m are the configurations of labels of the rows chosen before, P(m) = mean_s prod_i p_s(m_i), and p(y | m) is the
average of the draws by their weights given m. The chain rule makes this the difference of the paper's joint entropies
(eq. 9 to 12), and it needs no entropy of a whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scores import bald, normalized

__all__ = ["Configurations", "batchbald", "joint_mutual_information"]

_ELEMENTS = 2**22  # of a temporary tensor, 32 MB in float64


@dataclass(frozen=True, eq=False)
class Configurations:
    """Labels that the rows chosen so far may get: all of them, or a sample.

    Attributes:
        probs: P(m), (M,), which sum to 1.
        draw_weights: the posterior of the S draws given configuration m, (M, S), whose rows sum to 1.
    """

    probs: Tensor
    draw_weights: Tensor

    @classmethod
    def of_no_row(cls, num_draws: int) -> Configurations:
        """The one configuration of no labels."""
        ones = torch.ones(1, dtype=torch.float64)
        return cls(ones, ones.new_full((1, num_draws), 1 / num_draws))

    def with_row(self, probs: Tensor, limit: int, generator: torch.Generator) -> Configurations:
        """Return the configurations with one row more.

        Args:
            probs: the row's p_s, (S, C).
            limit: how many configurations are enumerated; of more a sample of so many is taken, each with the same
                probability, by systematic resampling, whose averages have no bias.
            generator: of the sample.
        """
        joint = self.probs[:, None] * (self.draw_weights @ probs)  # (M, C)
        if joint.numel() <= limit:
            before, label = joint.nonzero(as_tuple=True)
            kept = joint[before, label]
        else:
            edges = joint.flatten().cumsum(0)
            places = (torch.arange(limit) + torch.rand((), generator=generator, dtype=torch.float64)) / limit
            chosen = torch.searchsorted(edges, places * edges[-1], right=True).clamp_max(joint.numel() - 1)
            before, label = chosen // joint.shape[1], chosen % joint.shape[1]
            kept = joint.new_full((limit,), 1 / limit)
        weights = self.draw_weights[before] * probs.T[label]
        return Configurations(kept, weights / weights.sum(1, keepdim=True))

    def gains(self, probs: Tensor) -> Tensor:
        """Return what the label of each row would add, (N,).

        Args:
            probs: p_s of the rows, (S, N, C).
        """
        num_draws, _, num_classes = probs.shape
        found = []
        size = max(1, _ELEMENTS // (len(self.probs) * num_classes))
        for part in torch.split(probs, size, dim=1):
            given = (self.draw_weights @ part.reshape(num_draws, -1)).reshape(-1, *part.shape[1:])
            found.append(self.probs @ torch.special.entr(given).sum(-1))
        known: Tensor = torch.special.entr(probs).sum(-1).mean(0)
        return (torch.cat(found) - known).clamp_min(0)


def batchbald(log_probs: Tensor, n: int, *, num_configurations: int = 1024, seed: int = 0) -> tuple[list[int], Tensor]:
    """Choose ``n`` rows greedily; by enumeration, within 1 - 1/e of the best joint information.

    A row's gain is never above its BALD score, so rows are looked at in falling order of that, until none can win.

    Args:
        log_probs: (S, N, C) of the same draws for all rows.
        n: how many rows, 1 .. N.
        num_configurations: up to which number they are enumerated; beyond it a sample of so many.
        seed: of that sample.

    Returns:
        The rows in the order of choice, and the gain of each, (n,): their sum is I(y_1 .. y_n; w).

    >>> draws = torch.tensor([[[0.9, 0.1]] * 2 + [[0.8, 0.2]], [[0.1, 0.9]] * 2 + [[0.5, 0.5]]]).log()
    >>> batchbald(draws, 2)
    ([0, 1], tensor([0.3681, 0.1463], dtype=torch.float64))
    """
    generator = torch.Generator().manual_seed(seed)
    order = bald(log_probs).argsort(descending=True, stable=True)
    probs, bounds = normalized(log_probs)[:, order], bald(log_probs)[order]
    known, left = Configurations.of_no_row(len(probs)), torch.ones(len(order), dtype=torch.bool)
    chosen, gains = list[int](), list[float]()
    for _ in range(n):
        place, gain = _best(known, probs, bounds, left)
        left[place] = False
        chosen.append(int(order[place]))
        gains.append(gain)
        known = known.with_row(probs[:, place], num_configurations, generator)
    return chosen, torch.tensor(gains, dtype=torch.float64)


def _best(known: Configurations, probs: Tensor, bounds: Tensor, left: Tensor) -> tuple[int, float]:
    """The place with the largest gain, and the gain; of equal ones the first."""
    place, gain = -1, -1.0
    for part in torch.split(left.nonzero().squeeze(1), 64):
        if float(bounds[part[0]]) <= gain:
            break
        gains = known.gains(probs[:, part])
        if float(gains.max()) > gain:
            place, gain = int(part[gains.argmax()]), float(gains.max())
    return place, gain


def joint_mutual_information(log_probs: Tensor, *, num_configurations: int = 1024, seed: int = 0) -> float:
    """Return I(y_1 .. y_n; w) of the labels of all rows, in nats; exact up to ``num_configurations`` = C^n.

    Args:
        log_probs: (S, n, C).
        num_configurations: as of `batchbald`.
        seed: of the sample beyond.

    >>> round(joint_mutual_information(torch.tensor([[[0.9, 0.1]] * 2, [[0.1, 0.9]] * 2]).log()), 4)
    0.5144
    """
    generator, probs = torch.Generator().manual_seed(seed), normalized(log_probs)
    known, total = Configurations.of_no_row(len(probs)), 0.0
    for row in range(probs.shape[1]):
        total += float(known.gains(probs[:, row : row + 1]))
        known = known.with_row(probs[:, row], num_configurations, generator)
    return total
