"""What element-wise pruners share: which matrices, how much of each, calibrated block after block.

Block after block: collect a statistic of every matrix's inputs, prune the matrices, write them into
the block, run it again, and hand its outputs, which now show what pruning did to them, to the next
block (2301.00774, §4; 2306.11695, §3). A method is a statistic, or none, and a rule that turns one
matrix and its statistic into a mask and new weights.

Several sub-models at once are calibrated with dense activations instead: one forward pass, one
statistic per matrix, and each target's mask inside the one before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, Literal

import torch
from torch import nn

from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.collecting import Observed, S, States, advance, embed, observe
from prufed_plugins.pruners.matrices import Choice, absent, apply, float_matrix, keep
from prufed_plugins.pruners.modules import selected
from prufed_plugins.pruners.owl import outlier_ratios, owl_sparsities
from prufed_plugins.pruners.selection import check_pattern, check_target

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Decoder, Progress, PrunedMatrix, PruneTarget
    from prufed_plugins.params import ElementParams


class ElementPruner(Generic[S]):
    """Prunes the entries of single matrices.

    A method says how it chooses them, and, where it looks at inputs, in what statistic.

    Attributes:
        result: ``masked``.
        looks_at_inputs: whether :meth:`choose` needs what calibration showed.
        looks_at_outputs: whether it needs the energy of the outputs, too, where that costs nothing.
        needs_calibration: whether it, or the layer ratios, need calibration text.
    """

    result: Literal["masked"] = "masked"
    looks_at_inputs = True
    looks_at_outputs = False

    def __init__(self, params: ElementParams) -> None:
        self._params = params
        self._varies = params.layer_ratio == "owl"
        self.needs_calibration = self.looks_at_inputs or self._varies

    def choose(
        self,
        weight: Tensor,
        observed: Observed[S] | None,
        target: PruneTarget,
        forced: Tensor | None,
    ) -> Choice:
        """Return what goes of one matrix, and what becomes of the rest.

        Args:
            weight: float32 (rows, columns).
            observed: what calibration showed of it; None where nothing is looked at.
            target: sparsity or pattern.
            forced: bool (rows, columns), entries that must go and are counted: those that an
                earlier prune or a smaller target removed; None where there are none.

        Raises:
            MethodError: the target cannot be met.
        """
        raise NotImplementedError

    def new_statistic(self, columns: int, device: torch.device) -> S:
        """Return an empty statistic of inputs with so many columns."""
        raise NotImplementedError

    def prune(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> Iterator[PrunedMatrix]:
        """Yield the pruned matrices in block order; see :meth:`prufed_plugins.api.Pruner.prune`.

        Matrices that the patterns leave out, and experts that no token was routed to, come as they
        are, with the mask they have or a full one, and say ``excluded`` or ``unrouted`` in their
        report.

        Raises:
            MethodError: no calibration, a target that cannot be met, a pattern that matches no
                matrix, activations that are not finite, or a matrix the calibration never reached.
        """
        for (result,) in self._run(decoder, calibration, [target], progress, dense=False):
            yield result

    def prune_nested(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        targets: Sequence[PruneTarget],
        progress: Progress,
    ) -> Iterator[tuple[PrunedMatrix, ...]]:
        """Yield one result per target; see :meth:`prufed_plugins.api.NestedPruner.prune_nested`.

        Every group loses exactly what it would lose at that target alone. The weights of a target
        are made from the dense ones, with the entries that the target before removes forced out.

        Raises:
            MethodError: as :meth:`prune`, and targets that are not ascending sparsities.
        """
        sparsities = [-1.0 if one.sparsity is None else one.sparsity for one in targets]
        if not targets or min(sparsities) < 0 or any(a > b for a, b in pairwise(sparsities)):
            raise MethodError(
                "nested sub-models need ascending sparsities", "pass --sparsity 0.25,0.5,0.75"
            )
        yield from self._run(decoder, calibration, targets, progress, dense=True)

    def survey(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> PruneTarget:
        """Return the target with each matrix's own sparsity, where the parameters vary it.

        Raises:
            MethodError: as :meth:`prune`.
        """
        return self.survey_nested(decoder, calibration, [target], progress)[0]

    def survey_nested(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        targets: Sequence[PruneTarget],
        progress: Progress,
    ) -> Sequence[PruneTarget]:
        """Return what :meth:`survey` returns for each target, looking at the model once.

        Raises:
            MethodError: as :meth:`prune`.
        """
        names = self._chosen(decoder, targets)
        return self._surveyed(decoder, calibration, names, targets, progress)

    def statistic_bytes(self, columns: int) -> int:
        """Return how much memory is kept of an input with so many columns."""
        return 4 * columns if self.needs_calibration else 0

    def _run(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        targets: Sequence[PruneTarget],
        progress: Progress,
        *,
        dense: bool,
    ) -> Iterator[tuple[PrunedMatrix, ...]]:
        names = self._chosen(decoder, targets)
        targets = self._surveyed(decoder, calibration, names, targets, progress)
        total = len(decoder.blocks)
        last = max(index for index in range(total) if names & decoder.shapes(index).keys())
        calibrated = self.looks_at_inputs and decoder.start <= last
        states = embed(decoder, calibration) if calibrated else None
        for index in range(decoder.start, total):
            more = index < last  # what comes after it is neither pruned nor run
            observed = self._observe(decoder, index, names, states, advancing=dense and more)
            for name, module in decoder.linears(index).items():
                if name not in names:
                    yield (keep(name, module, decoder.masks, "excluded"),) * len(targets)
                elif observed is not None and name not in observed:
                    yield (keep(name, module, decoder.masks, "unrouted"),) * len(targets)
                else:
                    gone = absent(name, module, decoder.masks)
                    stored = decoder.stored_dtype(f"{name}.weight")
                    yield self._prune_matrix(
                        name, module, observed, targets, stored, gone, dense=dense
                    )
            observed = None  # the next block's statistics are not held beside these
            if not more:
                states = None
            elif states is not None and not dense:
                advance(decoder, index, states)
            progress("block", index + 1, total)

    def _observe(
        self,
        decoder: Decoder,
        index: int,
        names: frozenset[str],
        states: States | None,
        *,
        advancing: bool,
    ) -> dict[str, Observed[S]] | None:
        if states is None:
            return None
        return observe(
            decoder,
            index,
            names,
            self.new_statistic,
            states,
            energies=self.looks_at_outputs,
            advancing=advancing,
        )

    def _prune_matrix(
        self,
        name: str,
        module: nn.Module,
        observed: dict[str, Observed[S]] | None,
        targets: Sequence[PruneTarget],
        stored: torch.dtype,
        forced: Tensor | None,
        *,
        dense: bool,
    ) -> tuple[PrunedMatrix, ...]:
        """Prune one matrix; what was observed of it is dropped as soon as nothing needs it."""
        matrix = float_matrix(name, module)
        found = None if observed is None else observed.pop(name)
        results: list[PrunedMatrix] = []
        for target in targets:
            started = time.perf_counter()
            try:
                with torch.no_grad():
                    choice = self.choose(matrix, found, _target_of(name, target), forced)
            except MethodError as error:
                raise MethodError(f"{name}: {error.message}", error.hint) from error
            if len(results) + 1 == len(targets):
                found = None
            report = _report(choice, target, matrix.shape[1])
            report["seconds"] = time.perf_counter() - started
            results.append(apply(name, module, choice, stored, report, in_place=not dense))
            forced = choice.pruned
        return tuple(results)

    def check(self, decoder: Decoder, targets: Sequence[PruneTarget]) -> None:
        """Refuse what cannot be met, without looking at a weight.

        Raises:
            MethodError: a target that cannot be met, or a pattern that matches no matrix.
        """
        self._chosen(decoder, targets)

    def _chosen(self, decoder: Decoder, targets: Sequence[PruneTarget]) -> frozenset[str]:
        """Return the names of the matrices to prune, once every target can be met on them."""
        params = self._params
        names = selected(decoder, params.include, params.exclude, params.include_layers)
        for target in targets:
            check_target(target)
            if target.pattern is None:
                continue
            if self._params.layer_ratio == "owl":
                raise MethodError(
                    "layer_ratio owl gives each layer its own sparsity, a pattern gives all the "
                    "same",
                    "pass --sparsity, or --set layer_ratio=uniform",
                )
            for index in range(len(decoder.blocks)):
                for name, (_, columns) in decoder.shapes(index).items():
                    if name in names:
                        check_pattern(name, columns, target.pattern)
        return names

    def _surveyed(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        names: frozenset[str],
        targets: Sequence[PruneTarget],
        progress: Progress,
    ) -> Sequence[PruneTarget]:
        """Return the targets with the sparsity of each matrix, looking at the model if need be."""
        if not self._varies or any(one.pattern or one.per_matrix is not None for one in targets):
            return targets
        if decoder.start:
            raise ValueError("a run that goes on needs the survey of its beginning")
        return self._vary(decoder, calibration, names, targets, progress)

    def _vary(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        names: frozenset[str],
        targets: Sequence[PruneTarget],
        progress: Progress,
    ) -> Sequence[PruneTarget]:
        """Return the targets with OWL's sparsity for the matrices of each block."""
        params = self._params
        blocks = _selected_entries(decoder, names)
        ratios = outlier_ratios(decoder, calibration, names, params.owl_m, progress)
        kept = [ratios[index] for index in blocks]
        varied = []
        for target in targets:
            sparsities = owl_sparsities(
                kept, list(blocks.values()), target.sparsity or 0.0, params.owl_lambda
            )
            per_matrix = {
                name: sparsity
                for index, sparsity in zip(blocks, sparsities, strict=True)
                for name in decoder.shapes(index)
                if name in names
            }
            varied.append(replace(target, per_matrix=per_matrix))
        return varied


def _selected_entries(decoder: Decoder, names: frozenset[str]) -> dict[int, int]:
    """Return how many entries each block has to prune, without the blocks that have none."""
    entries = {
        index: sum(
            rows * columns
            for name, (rows, columns) in decoder.shapes(index).items()
            if name in names
        )
        for index in range(len(decoder.blocks))
    }
    return {index: count for index, count in entries.items() if count}


def _target_of(name: str, target: PruneTarget) -> PruneTarget:
    """Return what one matrix has to meet."""
    if target.per_matrix is None or name not in target.per_matrix:
        return target
    return replace(target, sparsity=target.per_matrix[name])


def _report(choice: Choice, target: PruneTarget, columns: int) -> dict[str, float]:
    report = dict(choice.report)
    if choice.squared_error is not None and (choice.energy or not choice.squared_error):
        report["error"] = choice.squared_error / choice.energy if choice.energy else 0.0
    if target.pattern is not None and columns % target.pattern[1]:
        report["partial_group"] = float(columns % target.pattern[1])
    return report
