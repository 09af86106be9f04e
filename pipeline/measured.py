"""The model in training as evaluations see it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.optimizer_state import full_parameter


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
    def whole(self, engine: Engine) -> Iterator[nn.Module]:
        """The model as it is after the last step; at stage 3 a collective.

        Args:
            engine: that trains it.
        """
        if self._copy is None:
            self._model.eval()
            try:
                yield self._model
            finally:
                self._model.train()
            return
        source, buffers = dict(self._model.named_parameters()), dict(self._model.named_buffers())
        for name, parameter in self._copy.named_parameters():
            if parameter.requires_grad:  # what is frozen is as it was copied
                parameter.data.copy_(full_parameter(engine, source[name]))
        for name, buffer in self._copy.named_buffers():
            buffer.copy_(buffers[name])
        device = engine.device
        try:
            yield self._copy.to(device)
        finally:
            self._copy.cpu()
