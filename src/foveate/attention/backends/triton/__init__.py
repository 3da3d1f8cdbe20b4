"""Triton kernels for softmax attention. Importing this package imports no triton; its modules do."""
