"""A transformers model as probes see it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from foveate.hf.apply import Run, apply
from foveate.hf.compat import cache_keyword
from foveate.hf.identity import identify
from foveate.hf.modules import text_config
from foveate.probes.base import Hear, Listener


class ModelSubject:
    """A causal LM to be probed; the model is as it was between sessions."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.identity = identify(model)
        self.vocabulary = int(text_config(model).vocab_size)

    @contextlib.contextmanager
    def session(self, hear: Hear) -> Iterator[ModelSession]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), apply(self.model, Listener(hear=hear)) as run:
                yield ModelSession(run)
        finally:
            self.model.train(training)


class ModelSession:
    """A model under a Listener, with the cache of one request."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._cache_name = cache_keyword(run.model)
        takes = inspect.signature(inspect.unwrap(type(run.model).forward)).parameters
        # Without it a long prompt's logits would be [N, vocabulary].
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.start()

    def start(self) -> None:
        self.cache = self.run.new_cache()

    def feed(self, ids: Tensor) -> Tensor:
        model: Any = self.run.model
        given = {self._cache_name: self.cache, **self._last_only}
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=True, **given).logits
        return logits[:, -1]
