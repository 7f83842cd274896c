"""Drop the layers of the smallest mean |weight|.

PruFed's "magnitude-based dropping" (Bhansali et al., "PruFed: Federated Fine-Tuning of Pruned
LLMs", §3), which the paper names and does not define: the mean runs over all entries of the
block's matrices.
"""

from __future__ import annotations

from prufed_plugins.pruners.layers import ScoringLayerPruner, Subject
from prufed_plugins.pruners.weight_scores import mean_abs, weight_scores


class MagnitudeLayers(ScoringLayerPruner):
    """Drops the K layers of the smallest mean |w|."""

    needs_matrices = True

    def scores(self, subject: Subject) -> list[float]:
        """Return the mean |w| of every layer."""
        return weight_scores(subject.decoder, mean_abs, subject.progress)
