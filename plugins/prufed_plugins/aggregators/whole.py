"""A first pass over whole adapters, for methods that weigh or choose clients by their values.

It runs at the first merge rather than in ``prepare``, which is also called in a rehearsal, before
anybody has trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from prufed_plugins.aggregators.validation import load_part
from prufed_plugins.api import GlobalState, Part, Update
from prufed_plugins.names import by_module, in_layers


def module_parts(
    updates: Sequence[Update], state: GlobalState
) -> Iterator[tuple[str, dict[str, Tensor], Iterator[Part]]]:
    """Yield (module, global tensors, the clients' parts) of every module, as ``merge`` gets them.

    Raises:
        UpdateError: a tensor is not what it should be.
    """
    for module, names in by_module(state.tensors).items():
        holders = [update for update in updates if in_layers(module, update.kept_layers)]
        current = {key: state.tensors[name] for key, name in names.items()}
        yield module, current, _parts(holders, names, state)


def _parts(holders: Sequence[Update], names: dict[str, str], state: GlobalState) -> Iterator[Part]:
    return (load_part(update, names, state) for update in holders)
