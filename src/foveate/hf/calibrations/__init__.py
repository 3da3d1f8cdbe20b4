"""Calibrations: what is found out about one model, once, for methods that need it. One file each."""
