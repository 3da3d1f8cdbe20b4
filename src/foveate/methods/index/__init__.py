"""Indexes over keys: maximum-inner-product search, exact or approximate."""

from foveate.methods.index.attention_graph import AttentionGraph, GraphOptions
from foveate.methods.index.base import Found, KeyIndex, recall_of
from foveate.methods.index.flat import FlatIndex
from foveate.methods.index.hnsw import UsearchIndex

__all__ = ["AttentionGraph", "FlatIndex", "Found", "GraphOptions", "KeyIndex", "UsearchIndex", "recall_of"]
