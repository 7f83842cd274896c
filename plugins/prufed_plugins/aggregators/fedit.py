"""FedIT: FedAvg on the two LoRA factors, each by itself, weighted by samples.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning",
https://arxiv.org/abs/2305.05644, Algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

from prufed_plugins.aggregators.fedavg import FedAvg


class FedIT(FedAvg):
    """A' = Σ p_i A_i and B' = Σ p_i B_i with p_i = n_i / Σ n_j: FedAvg under the paper's name.

    The product of the means is not the mean of the products; they differ by
    Σ p_i (B_i - B')(A_i - A'), which ``flexlora`` and ``lora-fair`` set out to mend.
    """

    name: ClassVar[str] = "fedit"
