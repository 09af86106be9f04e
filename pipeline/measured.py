"""The model in training as evaluations see it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.optimizer_state import full_parameter, full_state, state_keys, state_shapes


class Measured:
    """Hands out the model with its weights whole, in eval mode.

    At ZeRO stage 3 that is a copy: DeepSpeed gathers a module's weights when it is called, together with all ranks, but
    ranks share out an evaluation's samples and may call the model unequally often.

    Args:
        model: not yet cut up.
        partitioned: whether it will be; the copy is kept on the host between evaluations.
    """

    def __init__(self, model: nn.Module, partitioned: bool) -> None:
        self._model = model
        self._copy = copy.deepcopy(model).cpu().eval() if partitioned else None

    @contextmanager
    def whole(self, engine: Engine, state: str | None = None) -> Iterator[nn.Module]:
        """The model as it is after the last step; from ZeRO stage 3 on, and for a state from stage 1 on, a collective.

        Args:
            engine: that trains it.
            state: of the optimizer, to be seen in place of the weights, e.g. their average; what the optimizer has not
                updated yet, or does not train, is seen as it is. Up to stage 2 the weights are set aside meanwhile, on
                their device, and put back bit for bit.
        """
        shown = _shown(engine, state)
        if self._copy is None:
            self._model.eval()
            kept = [] if state is None else _exchanged(engine.trainable, shown)
            try:
                yield self._model
            finally:
                for parameter, value in kept:
                    parameter.data.copy_(value)
                self._model.train()
            return
        source, buffers = dict(self._model.named_parameters()), dict(self._model.named_buffers())
        for name, parameter in self._copy.named_parameters():
            if parameter.requires_grad:  # what is frozen is as it was copied
                parameter.data.copy_(shown(source[name]))
        for name, buffer in self._copy.named_buffers():
            buffer.copy_(buffers[name])
        device = engine.device
        try:
            yield self._copy.to(device)
        finally:
            self._copy.cpu()


def _shown(engine: Engine, state: str | None) -> Callable[[nn.Parameter], Tensor]:
    """What is to be seen of a trainable parameter, whole."""
    keys = [] if state is None else state_keys(engine)

    def value(parameter: nn.Parameter) -> Tensor:
        if state is not None and state in state_shapes(engine, parameter, keys):
            return full_state(engine, parameter, state)
        return full_parameter(engine, parameter)

    return value


def _exchanged(
    parameters: Iterable[nn.Parameter], shown: Callable[[nn.Parameter], Tensor]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Put other values into parameters; they, with their own values, to be put back."""
    kept = []
    for parameter in parameters:
        value = shown(parameter)
        kept.append((parameter, parameter.detach().clone()))
        parameter.data.copy_(value)
    return kept
