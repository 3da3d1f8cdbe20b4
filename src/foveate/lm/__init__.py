"""Language models of any mixers: the shell, its cache and configuration, synthetic tasks, training.

Importing it registers HybridLM with transformers' AutoConfig and AutoModelForCausalLM.
"""

from foveate.lm.cache import HybridCache
from foveate.lm.config import HybridConfig
from foveate.lm.model import HybridLM

__all__ = ["HybridCache", "HybridConfig", "HybridLM"]
