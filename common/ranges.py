"""Ranges of numbers as part of an argument's annotation: `learning_rate: PositiveFloat = 1e-3`."""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple, get_args, get_type_hints

from common.arguments import fail


class Range(NamedTuple):
    """The numbers that an argument accepts. It stands in the annotation: `Annotated[int, Range("even", is_even)]`."""

    text: str
    accepts: Callable[[float], bool]


PositiveInt = Annotated[int, Range("at least 1", lambda x: x >= 1)]
NonNegativeInt = Annotated[int, Range("at least 0", lambda x: x >= 0)]
PositiveFloat = Annotated[float, Range("above 0 and finite", lambda x: 0 < x < math.inf)]
NonNegativeFloat = Annotated[float, Range("at least 0 and finite", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Range("between 0 and 1", lambda x: 0 <= x <= 1)]


def check_args(args) -> None:
    """`fail` if a number lies outside of its range, as NaN does, or if an evaluation is asked for without episodes."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        values = getattr(args, name)
        for value in values if isinstance(values, tuple) else (values,):
            for allowed in _ranges(hint):
                if value is not None and not allowed.accepts(value):
                    fail(f"--{name.replace('_', '-')} must be {allowed.text}, not {value:g}")
    if getattr(args, "eval_episodes", 1) == 0 and (args.capture_video or args.evaluate is not None):
        fail("--capture-video and --evaluate need an evaluation: give --eval-episodes 1 or more")


def _ranges(hint: object) -> Iterator[Range]:
    """The ranges in an annotation, also inside of `tuple[...]` and `... | None`."""
    for part in get_args(hint):
        yield from [part] if isinstance(part, Range) else _ranges(part)
