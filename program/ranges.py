"""Ranges: which values a field may have, for configs and options alike. The range stands beside the default."""

from dataclasses import dataclass, field, fields

from program.edges import short


def within(default, interval: str):
    """A field of a `Ranged` dataclass. Its number, or each of its numbers, must lie in the interval, such as "[1, 512]"
    or "(0, inf)"."""
    return field(default=default, metadata={"within": interval})


def only(default):
    """A field of a `Ranged` dataclass that has one possible value: what another one asks for is not implemented."""
    return field(default=default, metadata={"only": True})


@dataclass
class Ranged:
    """A dataclass whose values lie in their fields' ranges, else ValueError. None is always allowed. Without a range,
    an integer must be at least 0 and below 2^31, and any other number finite."""

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.metadata.get("only") and value != entry.default:
                raise ValueError(f"{entry.name} is {short(value)}; only {entry.default!r} is implemented")
            for number in value if isinstance(value, tuple | list) else (value,):
                default = {int: "[0, 2147483648)", float: "(-inf, inf)"}.get(type(number))
                allowed = entry.metadata.get("within") or default
                if number is not None and allowed:
                    check_range(self.called(entry.name), number, allowed)

    @staticmethod
    def called(name: str) -> str:
        """The name of a field in an error message."""
        return name


def check_range(name: str, value: float | str, allowed: str) -> None:
    """ValueError, with the name of the flag or key, unless the value is in the interval, or one of the words "a | b"."""
    if "|" in allowed:
        if value not in allowed.split(" | "):
            raise ValueError(f"{name} {str(value)[:60]}: expected is {allowed.replace('|', 'or')}")
    elif not inside(value, allowed):
        raise ValueError(f"{name} {short(value)}: a number in {allowed} is expected")


def inside(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below
