"""Every exception a user can meet.

    FoveateError
    ├── OptionError            an option's value is not allowed            (ValueError)
    ├── UnknownNameError       no such mechanism, task or option            (LookupError)
    ├── ShapeError             a tensor's shape or dtype does not fit       (ValueError)
    ├── PlanError              a plan that does not fit its inputs          (ValueError)
    ├── StateError             state of another mixer, batch or length      (ValueError)
    ├── BackendError           the backend asked for cannot run this call
    ├── CompositionError       members that cannot work together
    ├── UnsupportedModelError  a model the method cannot serve
    ├── UnsupportedCacheError  a cache or generation mode the method cannot serve
    ├── ProfileError           a missing, damaged or foreign calibration profile
    ├── DataError              a user's file that cannot be read as documented
    ├── ResultsError           results that cannot be written or resumed
    ├── HostMemoryError        the host has no memory left for cold keys    (MemoryError)
    └── MissingPackageError    an optional package is not installed         (ImportError)

Each message says what was given, what is allowed and what to do.
"""

from __future__ import annotations


class FoveateError(Exception):
    """Base of all errors that foveate raises on purpose."""


class OptionError(FoveateError, ValueError):
    """An option has a value that is not allowed."""


class UnknownNameError(FoveateError, LookupError):
    """A name that is not in the registry, or an option that a mechanism lacks."""


class ShapeError(FoveateError, ValueError):
    """A tensor's shape or dtype does not fit the others."""


class PlanError(FoveateError, ValueError):
    """A plan that does not fit the tensors it is used with."""


class StateError(FoveateError, ValueError):
    """A recurrent or cached state that belongs to something else."""


class BackendError(FoveateError, RuntimeError):
    """The backend that was asked for cannot run this call."""


class CompositionError(FoveateError, ValueError):
    """Methods that cannot be combined."""


class UnsupportedModelError(FoveateError, TypeError):
    """A model that cannot be served."""


class UnsupportedCacheError(FoveateError, TypeError):
    """A cache or a generation mode that cannot be served."""


class ProfileError(FoveateError, ValueError):
    """A calibration profile that is missing, damaged, or made for another model."""


class DataError(FoveateError, ValueError):
    """A user's file does not hold what it must."""


class ResultsError(FoveateError, OSError):
    """Results could not be written, or do not belong to this run."""


class HostMemoryError(FoveateError, MemoryError):
    """The host has no memory left for cold keys and values."""


class MissingPackageError(FoveateError, ImportError):
    """An optional package is needed."""

    def __init__(self, package: str, purpose: str, command: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}; install it with: {command}", name=package)
