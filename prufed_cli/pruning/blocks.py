"""Pruned matrices become finished blocks in a work directory as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from prufed_cli.models.skeleton import Skeleton
from prufed_cli.models.stored import Spec, TensorWriter
from prufed_cli.models.streaming import StreamedDecoder
from prufed_cli.pruning.work import WorkBlock, WorkDirectory
from prufed_plugins.entries import clear, count
from prufed_plugins.errors import MethodError
from prufed_plugins.mask_files import mask_metadata, pack

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import PrunedMatrix

_HINT: Final = "`prufed plugins check NAME` says what a pruner has to do"

_ROWS: Final = 128
"""Rows that are looked at together, few enough for what lies between to stay in the cache."""


class BlockStore:
    """Writes each block of one or more sub-models while it is pruned.

    A block is finished when the decoder lets go of it, or at the end. Nothing of it is held but
    its packed masks. What the base's own masks leave out stays out, whatever the pruner says.
    Nothing is published of a matrix that the model has not, that came twice, or whose mask does not
    fit its weight.
    """

    def __init__(
        self,
        work: WorkDirectory,
        skeleton: Skeleton,
        decoder: StreamedDecoder,
        submodels: int,
    ) -> None:
        self._work = work
        self._skeleton = skeleton
        self._decoder = decoder
        self._submodels = submodels
        self._next = work.finished(submodels, len(decoder.blocks))
        self._open: list[_OpenBlock] = []
        self._matrices = {
            f"{name}.weight"
            for index in range(len(decoder.blocks))
            for name in decoder.shapes(index)
        }
        decoder.start = self._next
        decoder.released = self._released
        if submodels == 1:
            for index in range(self._next):
                self._replace(index)

    @property
    def finished(self) -> int:
        """How many blocks are finished."""
        return self._next

    def take(self, results: Sequence[PrunedMatrix]) -> None:
        """Write one matrix of every sub-model.

        Raises:
            MethodError: the pruner made up a matrix, returned one twice, came back to a finished
                block, or returned what is not as :class:`PrunedMatrix` says.
        """
        names = [result.name for result in results]
        if len(names) != self._submodels or len(set(names)) != 1:
            raise MethodError(
                f"the pruner returned {', '.join(names) or 'nothing'} at once, not one matrix of "
                f"{self._submodels} sub-models",
                _HINT,
            )
        name = names[0]
        index = self._skeleton.block_of(name) if name in self._matrices else None
        if index is None or name not in self._skeleton.stored:
            raise MethodError(f"the pruner returned {name}, which is no matrix of the model", _HINT)
        if index < self._next:
            raise MethodError(f"the pruner returned {name} after its block was finished", _HINT)
        for result in results:
            _check(result, self._skeleton.stored[name].shape)
        if not self._open or self._open[0].index != index:
            self._finish()
            self._skip_to(index)
            self._open = [self._begin(each, index) for each in range(self._submodels)]
        if self._open[0].has(name):
            raise MethodError(f"the pruner returned {name} twice", _HINT)
        before = self._decoder.masks.get(name)
        for block, result in zip(self._open, results, strict=True):
            block.put(result if before is None else _within(before, result))

    def close(self) -> None:
        """Finish the last block, and those that the pruner left alone."""
        self._finish()
        self._skip_to(len(self._decoder.blocks))

    def discard(self) -> None:
        """Delete what is written of an unfinished block."""
        for block in self._open:
            block.discard()
        self._open = []

    def _begin(self, submodel: int, index: int) -> _OpenBlock:
        names = self._decoder.parameters(index)
        return _OpenBlock(index, self._work.block(submodel, index), self._skeleton, names)

    def _released(self, index: int) -> None:
        if self._open and self._open[0].index == index:
            self._finish()

    def _finish(self) -> None:
        if not self._open:
            return
        index = self._open[0].index
        for block in self._open:
            facts = block.commit()
            self._work.write(block.place.facts, {**facts, "checksums": block.place.checksums()})
        self._open = []
        self._next = index + 1
        if self._submodels == 1:
            self._replace(index)

    def _skip_to(self, index: int) -> None:
        """Finish the blocks before ``index`` as they are in the base."""
        for skipped in range(self._next, index):
            for each in range(self._submodels):
                facts = self._work.block(each, skipped).facts
                self._work.write(facts, {"rows": [], "shapes": {}, "kept": {}, "checksums": {}})
        self._next = max(self._next, index)

    def _replace(self, index: int) -> None:
        weights = self._work.block(0, index).weights
        if weights.is_file():
            self._decoder.finish(index, weights)


def _check(result: PrunedMatrix, shape: tuple[int, ...]) -> None:
    """Refuse a weight or mask of another shape than is stored, and weights outside their mask.

    What is stored has the parameter's own layout, which is (inputs, outputs) of a ``Conv1D``.

    Raises:
        MethodError: as said, naming the matrix.
    """
    name, weight, mask = result.name, result.weight, result.mask
    for what, tensor in (("weight", weight), ("mask", mask)):
        if tuple(tensor.shape) != shape:
            raise MethodError(
                f"the pruner returned a {what} of shape {list(tensor.shape)} for {name}, "
                f"which is stored as {list(shape)}",
                _HINT,
            )
    if mask.dtype != torch.bool:
        raise MethodError(
            f"the pruner returned a mask of {mask.dtype} for {name}, which has to be torch.bool",
            _HINT,
        )
    if not _lies_within(weight, mask.to(weight.device)):
        raise MethodError(
            f"the pruner's mask of {name} calls entries absent whose weight is not zero", _HINT
        )


def _lies_within(weight: Tensor, mask: Tensor) -> bool:
    """Return whether a weight is zero, of either sign, wherever its mask is False."""
    pairs = zip(torch.split(weight, _ROWS), torch.split(mask, _ROWS), strict=True)
    return not any(count(some.bool() > flags) for some, flags in pairs)


def _within(before: Tensor, result: PrunedMatrix) -> PrunedMatrix:
    """Return a pruned matrix without what an earlier mask leaves out; its weight is changed."""
    mask = result.mask & before.to(result.mask.device)
    clear(result.weight, mask)
    sparsity = (mask.numel() - count(mask)) / mask.numel()
    return replace(result, mask=mask, report={**result.report, "sparsity": sparsity})


class _OpenBlock:
    """One block of one sub-model that is being written."""

    def __init__(
        self,
        index: int,
        place: WorkBlock,
        skeleton: Skeleton,
        names: Sequence[str],
    ) -> None:
        self.index = index
        self.place = place
        self._stored = {name: skeleton.stored[name] for name in names}
        specs = {name: Spec(one.dtype, one.shape) for name, one in self._stored.items()}
        self._writer = TensorWriter(place.weights, specs).__enter__()
        self._masks: dict[str, Tensor] = {}
        self._facts: dict[str, Any] = {"rows": [], "shapes": {}, "kept": {}}

    def has(self, name: str) -> bool:
        """Return whether a matrix is written already."""
        return name in self._masks

    def put(self, result: PrunedMatrix) -> None:
        """Write one matrix."""
        name = result.name
        self._writer.put(name, result.weight)
        self._masks[name] = pack(result.mask)
        self._facts["shapes"][name] = list(result.mask.shape)
        self._facts["kept"][name] = count(result.mask)
        self._facts["rows"].append({"name": name, **result.report})

    def commit(self) -> dict[str, Any]:
        """Write what the pruner left alone, and the masks; return the block's facts."""
        for name in sorted(self._writer.missing()):
            self._writer.copy(name, self._stored[name])
        self._writer.commit()
        specs = {name: Spec(mask.dtype, tuple(mask.shape)) for name, mask in self._masks.items()}
        metadata = mask_metadata(self._facts["shapes"])
        with TensorWriter(self.place.masks, specs, metadata) as writer:
            for name, mask in self._masks.items():
                writer.put(name, mask)
        return self._facts

    def discard(self) -> None:
        """Delete what was written."""
        self._writer.discard()
