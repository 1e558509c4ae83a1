"""Ranges: which values a field may have. Its range stands beside its default, for configs and for options alike."""

from dataclasses import dataclass, field, fields

from program.edges import short


def within(default, interval: str):
    """A field of a `Ranged` dataclass whose number (or numbers) must lie in an interval, as in "[1, 512]" or "(0, inf)"."""
    return field(default=default, metadata={"within": interval})


@dataclass
class Ranged:
    """A dataclass that holds no value outside of its fields' ranges, else ValueError. None is always allowed. Without a
    range a whole number is at least 0 and below 2^31, and any other number finite."""

    def __post_init__(self):
        for entry in fields(self):
            values = getattr(self, entry.name)
            for value in values if isinstance(values, tuple | list) else (values,):
                default = {int: "[0, 2147483648)", float: "(-inf, inf)"}.get(type(value))
                if value is not None and (allowed := entry.metadata.get("within") or default):
                    check_range(self.called(entry.name), value, allowed)

    @staticmethod
    def called(name: str) -> str:
        """A field's name in an error."""
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
