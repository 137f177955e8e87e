"""CostModel: cycles for what a design does, from a TOML file or a preset of estimates."""

from dataclasses import dataclass, fields
from importlib.resources import files
from os import PathLike
from typing import Any, Self

from kvmmu.arch.arguments import check_name
from kvmmu.arch.files import read_regular

__all__ = ["CostModel"]


@dataclass(frozen=True)
class CostModel:
    """Cycles that an access takes beside its own, for each thing that it meets.

    Parameters
    ----------
    name : str
    second_level_hit : float
        A hit in a TLB level behind the first one that the access asks.
    walk : float
        A page walk, beside its references.
    guest_ref, host_ref : float
        An entry of the guest's tables, and of the host's, that a walk reads.
    exit : float
        A VM exit, with what the host does.
    source : str
        Where the figures come from; an estimate says so.
    """

    name: str = "none"
    second_level_hit: float = 0.0
    walk: float = 0.0
    guest_ref: float = 0.0
    host_ref: float = 0.0
    exit: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in ("name", "source"):
                if not isinstance(value, str):
                    raise TypeError(f"{one.name}: want a str, got {type(value).__name__}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
                raise ValueError(f"{one.name}: want cycles, a number of 0 or more, got {value!r}")

    @classmethod
    def from_toml(cls, path: "str | PathLike[str]") -> Self:
        """Read a model from a TOML file: the parameters as keys, of those with cycles at least one."""
        return cls._from_text(read_regular(path), str(path))

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return a model of estimates: one of `presets()`. Their files name the source of each figure."""
        check_name("name", name, cls.presets())
        return cls._from_text((files("kvmmu") / "data" / "cost" / f"{name}.toml").read_bytes(), f"preset {name}")

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Return the names of the models of estimates."""
        return tuple(sorted(entry.name.removesuffix(".toml") for entry in (files("kvmmu") / "data" / "cost").iterdir()
                            if entry.name.endswith(".toml")))

    @classmethod
    def _from_text(cls, content: bytes, where: str) -> Self:
        import tomllib

        try:
            found: dict[str, Any] = tomllib.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not TOML ({error})") from error
        for key in found:
            check_name(f"{where}: key", key, tuple(one.name for one in fields(cls)))
        cycles = [one.name for one in fields(cls) if one.name not in ("name", "source")]
        if not any(name in found for name in cycles):
            raise ValueError(f"{where}: has no cycles; want one or more of {', '.join(cycles)}")
        try:
            return cls(**{"name": where} | found)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error


def cost_of(name: str, cost: Any) -> CostModel | None:
    """Return the model that an argument means: one, a preset by its name, a TOML file by its path, or None."""
    if cost is None or isinstance(cost, CostModel):
        return cost
    if isinstance(cost, str) and cost in CostModel.presets():
        return CostModel.preset(cost)
    if isinstance(cost, PathLike) or isinstance(cost, str) and cost.endswith(".toml"):
        return CostModel.from_toml(cost)
    presets = ", ".join(CostModel.presets())
    if isinstance(cost, str):
        raise ValueError(f"{name}: want a path that ends in .toml, or one of {presets}; got {cost!r}")
    raise TypeError(f"{name}: want a CostModel, a path, or one of {presets}; got {type(cost).__name__}")
