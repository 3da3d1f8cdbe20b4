"""Methods that need to know one model's heads: their profile is checked against the model before anything runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from foveate.errors import ProfileError
from foveate.methods.base import Method
from foveate.methods.profile import ModelIdentity, Profile, remake, resolve
from foveate.options import option

M = TypeVar("M", bound="Calibrated")


@dataclass(frozen=True, kw_only=True)
class Calibrated(Method):
    """A method with a profile.

    calibration: the kind of profile it reads. bound: the profile that `for_model` found and checked.
    """

    calibration: ClassVar[str]

    profile: str | Profile | None = option(  # noqa: RUF009 (a field, not a shared default)
        None, "folder of the calibration profile; default: the user's cache, then the profiles shipped with foveate"
    )
    bound: Profile | None = field(default=None, init=False, repr=False, compare=False)

    def for_model(self: M, identity: Any) -> M:
        """A copy bound to the model's profile; ProfileError when there is none, or it is damaged or another's."""
        found = resolve(self.profile, self.calibration, identity)
        self.check_profile(found)
        made = dataclasses.replace(self)
        object.__setattr__(made, "bound", found)
        return made

    def check_profile(self, profile: Profile) -> None:
        """Rules between options and profile; raise ProfileError or OptionError."""

    @property
    def found(self) -> Profile:
        """The bound profile."""
        if self.bound is None:
            raise ProfileError(
                f"{type(self).__name__} has no profile yet: call for_model(identity) (foveate.apply does); "
                f"{remake(self.calibration)}"
            )
        return self.bound

    def table(self, name: str) -> Tensor:
        """A tensor of the bound profile."""
        return self.found.tensors[name]


def check_table(profile: Profile, name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor `name` of a profile if it has this shape; ProfileError otherwise."""
    table = profile.tensors.get(name)
    if table is None or tuple(table.shape) != shape:
        given = "missing" if table is None else f"of shape {list(table.shape)}"
        raise ProfileError(
            f"the {profile.kind!r} profile is damaged: its table {name!r} is {given}, allowed: {list(shape)}; "
            f"{remake(profile.kind)}"
        )
    return table


def table_profile(kind: str, model: ModelIdentity, **tables: Tensor) -> Profile:
    """A profile made by hand from head tables, e.g. published gates."""
    return Profile(kind, model, tables, {"made": "by hand"})
