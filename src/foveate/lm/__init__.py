"""Language models of any mixers: the shell, its cache and configuration, conversion, synthetic tasks, training.

Importing it registers HybridLM with transformers' AutoConfig and AutoModelForCausalLM.
"""

from foveate.lm.cache import HybridCache
from foveate.lm.config import HybridConfig
from foveate.lm.model import HybridLM
from foveate.lm.spikes import spike_coded
from foveate.lm.upcycle import upcycle

__all__ = ["HybridCache", "HybridConfig", "HybridLM", "spike_coded", "upcycle"]
