"""FedProx: clients are held near the global adapter (Li et al. 2018, arXiv 1812.06127)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from prufed_plugins.api import AdaptedModel
from prufed_plugins.params import FedProxParams
from prufed_plugins.tuners.lora import LoraTuner
from prufed_plugins.tuners.training import Penalty, add_gradient


class FedProxTuner(LoraTuner):
    """LoRA on ``loss + μ/2 ‖θ − θ_g‖²``, θ_g being the adapter that the client was sent."""

    def __init__(self, params: FedProxParams) -> None:
        super().__init__(params)
        self._mu = params.mu

    def penalty(self, model: AdaptedModel) -> Penalty | None:
        """Return the pull towards where the adapter stands now."""
        if not self._mu:
            return None
        start = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
        return lambda trained: add_pull(trained, start, self._mu)


def add_pull(
    parameters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], mu: float
) -> None:
    """Add the gradient μ (θ − θ_g) of FedProx's term μ/2 ‖θ − θ_g‖² (1812.06127, Equation 2).

    Args:
        parameters: θ by name; masked-out entries are zero in θ and θ_g alike.
        start: θ_g by the same names.
        mu: μ ≥ 0.
    """
    for name, parameter in parameters.items():
        add_gradient(parameter, mu * (parameter.detach() - start[name]))
