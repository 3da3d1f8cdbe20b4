"""Evaluation tasks: seeded, offline, of exact length in the model's own tokens. `base` says how a runner uses them."""

from foveate.tasks.base import Example, Task, Turn, perplexity_from_nll

__all__ = ["Example", "Task", "Turn", "perplexity_from_nll"]
