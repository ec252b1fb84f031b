"""What a backbone is given: the source's own step runs on a batch, until it calls the backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_zipit._common.arguments import Arguments
from lightning_zipit._common.calls import Call
from lightning_zipit._common.structure import UnknownContainerError
from lightning_zipit._common.views import Inputs, as_inputs, each_view
from lightning_zipit._lightning.delegation import call_as_trainer
from lightning_zipit._lightning.internals import overrides
from lightning_zipit._lightning.sources import find_input, get_backbone
from lightning_zipit.errors import CalibrationError

Given: TypeAlias = "tuple[tuple[Any, ...], Mapping[str, Any]]"
"""Positional and keyword arguments."""

STEPS = ("validation_step", "test_step", "predict_step", "training_step")
"""The steps of a source in which its backbone is looked for, in order."""


class _Entered(BaseException):
    """Ends a step where it calls the backbone. It is no Exception, so that a step does not handle it."""


class Entering:
    """Find the arguments with which a source calls its backbone for a batch.

    The first of the source's steps that calls the backbone is used for all batches. It runs to its end on the first
    batch, to count the calls of the backbone. If there is one call, it runs up to that call on all other batches.

    Args:
        source: the source module, or a copy. It must be in eval mode.
        backbone: dotted name of the part that is merged.
        task: the name of the task, for errors.
        around: a context manager in which the source runs.
    """

    def __init__(
        self, source: Any, backbone: str, task: str, around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.around = around
        self.source, self.network, self.task = source, get_backbone(source, backbone), task
        self._arguments = Arguments.of(self.network)
        self._run: Callable[[Any, int], Any] | None = None
        self._calls_once = False
        self._dtype: torch.dtype | None = None  # what inputs are converted to, if the backbone takes no others
        self._checked = False

    def calls(self, batch: Any, batch_idx: int, trainer: Any) -> list[Call]:
        """Return the arguments of every call of the backbone.

        Args:
            batch: the batch, on the device.
            batch_idx: the index of the batch.
            trainer: the Trainer, for steps that use it.

        Raises:
            CalibrationError: if no step of the source calls its backbone with tensors.
        """
        with self.around(), torch.no_grad(), _lent(self.source, trainer):
            failures = []
            if self._run is not None:
                found, error = self._follow(self._run, batch, batch_idx, self._calls_once)
                if found:
                    return found
                failures.append(f"the step {_describe(error)}")
            for name, run in self._candidates() if self._run is None else ():
                found, error = self._follow(run, batch, batch_idx, stop=False)
                if found and isinstance(batch, Tensor) and batch.ndim and found[0].samples != len(batch):
                    found, error = [], ValueError(f"it takes a tensor of {len(batch)} samples for several tensors")
                if found:
                    self._run, self._calls_once = run, len(found) == 1
                    return found
                failures.append(f"`{name}` {_describe(error)}")
        raise CalibrationError(
            f"The input of the backbone of task {self.task!r} was not found in a calibration batch "
            f"({_described(batch)}): {'; '.join(failures)}. Pass `get_input`, a function from a batch to the "
            "backbone's input, for example get_input=lambda batch: batch['pixels']."
        )

    def converted(self, call: Call, forward: Callable[..., Any] | None = None) -> Call:
        """Convert an input to the dtype of the backbone, if that is lower than 32 bits and the backbone takes no other.

        Args:
            call: the arguments of a call of the backbone.
            forward: the forward of the backbone.
        """
        if not self._checked:
            self._checked = True
            self._dtype = _find_dtype(self.network, call, forward or self.network.forward)
        return call if self._dtype is None else call.to(call.device, self._dtype)

    def _candidates(self) -> Iterator[tuple[str, Callable[[Any, int], Any]]]:
        for name in STEPS:
            if self._has(name):
                yield name, partial(call_as_trainer, getattr(self.source, name))
        if self._has("forward"):
            yield "forward", lambda batch, _: self.source(find_input(batch))
        yield "the backbone", lambda batch, _: self.network(find_input(batch))

    def _has(self, name: str) -> bool:
        return name in vars(self.source) or overrides(name, self.source)

    def _follow(
        self, run: Callable[[Any, int], Any], batch: Any, batch_idx: int, stop: bool
    ) -> tuple[list[Call], BaseException | None]:
        """Run a step, and return the calls of the backbone, and the error that ended the step."""
        found: list[Call] = []

        def enter(args: tuple[Any, ...], kwargs: Mapping[str, Any], forward: Callable[..., Any]) -> Given:
            try:
                call = self._arguments.bind(Call.of_arguments(args, kwargs)).each(_kept)
                found.append(self.converted(call, forward))
            except UnknownContainerError as error:
                raise CalibrationError(
                    f"The backbone of task {self.task!r} is called with {error}, which may hold tensors and does not "
                    "say where. Register the type with `torch.utils._pytree.register_pytree_node`, or pass `get_input`."
                ) from error
            if stop:
                raise _Entered
            return (args, kwargs) if self._dtype is None else found[-1].arguments

        try:
            with _watched(self.network, enter), torch.random.fork_rng():
                run(batch, batch_idx)
        except _Entered:
            pass
        except Exception as error:  # a step after its call of the backbone may need labels, loggers or optimizers
            return found, error
        return found, None


class StepInputs:
    """Find the inputs of the backbones of all tasks in a batch.

    Args:
        entering: finds what a source's own step gives its backbone, by task.
        get_input: the user's function from a batch to the backbone's input; by default, the steps are used.
    """

    def __init__(self, entering: Mapping[str, Entering], get_input: Callable[[Any], Any] = find_input) -> None:
        self.entering, self.get_input = entering, get_input

    def __call__(self, batch: Any, batch_idx: int, trainer: Any = None) -> list[Inputs]:
        """Return the inputs of the backbones for every call of a backbone in a step.

        Args:
            batch: the batch, or the batches by task.
            batch_idx: the index of the batch.
            trainer: the Trainer, for steps that use it.
        """
        if self.get_input is not find_input:
            convert = next(iter(self.entering.values())).converted
            return [each_view(as_inputs(self.get_input(batch), self.entering), convert)]
        by_task = isinstance(batch, Mapping) and all(task in batch for task in self.entering)
        found = {
            task: entering.calls(batch[task] if by_task else batch, batch_idx, trainer)
            for task, entering in self.entering.items()
        }
        return side_by_side(found)


def side_by_side(calls: Mapping[str, list[Call]]) -> list[Inputs]:
    """Combine the calls of the backbones of all tasks, for one batch.

    Args:
        calls: the calls of each task's backbone in its step.

    Returns:
        The inputs of all backbones for each call. Backbones that are given the same have one input.

    Raises:
        CalibrationError: if the steps call their backbones on other numbers of samples, or not equally often.
    """
    counts = {task: [call.samples for call in own] for task, own in calls.items()}
    first, *others = counts
    if different := [task for task in others if counts[task] != counts[first]]:
        raise CalibrationError(
            f"The steps of tasks {first!r} and {different[0]!r} call their backbones with other numbers of samples for "
            f"the same batch: {counts[first]} and {counts[different[0]]}. Every model sees every sample. Pass "
            "`get_input`, a function from a batch to the backbone's input."
        )
    together = [dict(zip(calls, each, strict=True)) for each in zip(*calls.values(), strict=True)]
    return [each[first] if all(_same(each[first], each[task]) for task in others) else each for each in together]


def _same(first: Call, second: Call) -> bool:
    pairs = zip(first.tensors, second.tensors, strict=False)
    return first.structure == second.structure and all(_same_tensor(*pair) for pair in pairs)


def _same_tensor(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


def _find_dtype(network: nn.Module, call: Call, forward: Callable[..., Any]) -> torch.dtype | None:
    """Find the dtype without which a network of 16 bits does not run; ``None`` if it runs on what it is given."""
    types = {tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()}
    given = {tensor.dtype for tensor in call.tensors if tensor.is_floating_point()}
    if len(types) != 1 or given <= types or next(iter(types)).itemsize != 2:
        return None
    try:
        with torch.random.fork_rng():
            call.run(forward)
    except RuntimeError:
        return next(iter(types))
    return None


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor._is_view() else tensor.detach()


@contextmanager
def _watched(network: nn.Module, enter: Callable[..., Given]) -> Iterator[None]:
    """Call a function with the arguments of each call of a network. A call inside another call does not count.

    Args:
        network: the network.
        enter: a function of positional arguments, keyword arguments and the forward of the network. It returns the
            arguments for the network.
    """
    own = network.__dict__.get("forward")
    forward, inside = network.forward, False

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return forward(*args, **kwargs)
        inside = True
        try:
            taken, named = enter(args, kwargs, forward)
            return forward(*taken, **named)
        finally:
            inside = False

    network.__dict__["forward"] = watched
    try:
        yield
    finally:
        if own is None:
            del network.__dict__["forward"]
        else:
            network.__dict__["forward"] = own


@contextmanager
def _lent(source: LightningModule, trainer: Any) -> Iterator[None]:
    """Lend a Trainer to a source. What the source logs is dropped."""
    loggers = None if trainer is None else trainer.loggers
    source.__dict__["log"] = source.__dict__["log_dict"] = _drop
    try:
        if trainer is not None:
            source.trainer, trainer.loggers = trainer, []
        yield
    finally:
        del source.__dict__["log"], source.__dict__["log_dict"]
        if trainer is not None:
            source.trainer, trainer.loggers = None, loggers


def _drop(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


def _describe(error: BaseException | None) -> str:
    if error is None:
        return "does not call the backbone"
    first = str(error).partition("\n")[0]
    return f"ends before it calls the backbone, with {type(error).__name__}: {first}"


def _described(batch: Any) -> str:
    keys = f" with keys {list(batch)}" if isinstance(batch, Mapping) else ""
    return f"a {type(batch).__name__}{keys}"
