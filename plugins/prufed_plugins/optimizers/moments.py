"""What server optimizers remember of every entry between rounds.

The pseudo-gradient of a round is Δ = aggregate − old (Reddi et al. 2020, 2003.00295, Algorithm 2).
An entry that no client of the round had has none: it keeps its value *and* its moments, so that it
neither drifts on old momentum nor decays. Moments are float32; sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prufed_plugins.errors import MethodError


class Moments:
    """Tensors by kind and name, such as the ``m`` of one adapter tensor."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def get(self, kind: str, name: str, like: Tensor, start: float) -> Tensor:
        """Return a moment in float64, of the shape of ``like``; ``start`` where it is new.

        Raises:
            MethodError: the moment that was loaded has another shape.
        """
        moment = self._tensors.get(f"{kind}/{name}")
        if moment is None:
            # float32 first, as if it had been kept: an entry must not tell when it was first seen
            return torch.full(like.shape, start, dtype=torch.float32).double()
        if moment.shape != like.shape:
            raise MethodError(
                f"the server optimizer's state of {name} has shape {list(moment.shape)}, "
                f"not {list(like.shape)}",
                "it belongs to another run; start a new one",
            )
        return moment.double()

    def put(self, kind: str, name: str, old: Tensor, new: Tensor, covered: Tensor | None) -> None:
        """Keep ``new`` where an entry is covered and ``old`` elsewhere."""
        self._tensors[f"{kind}/{name}"] = where_covered(covered, new, old).float()

    def state(self) -> dict[str, Tensor]:
        """Return every moment by ``kind/name``."""
        return dict(self._tensors)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` returned."""
        self._tensors = {name: tensor.float() for name, tensor in state.items()}


def where_covered(covered: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """Return ``new`` where ``covered``, else ``old``; None covers every entry."""
    return new if covered is None else torch.where(covered, new, old)
