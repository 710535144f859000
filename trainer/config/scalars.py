"""Types of the settings: numbers in sensible ranges, for which true and false do not pass."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from trainer.config.values import LARGEST, magnitude


def reject_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


def require_bool(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("true or false is needed")
    return value


def representable(value: float) -> float:
    if unfit := magnitude(value):
        raise ValueError(unfit)
    return value


Integer = Annotated[int, BeforeValidator(reject_bool), Field(le=LARGEST)]
Real = Annotated[
    float, BeforeValidator(reject_bool), AfterValidator(representable), Field(allow_inf_nan=False)
]
Flag = Annotated[bool, BeforeValidator(require_bool)]
Count = Annotated[Integer, Field(ge=1)]
Natural = Annotated[Integer, Field(ge=0)]
Ranks = Annotated[Count, Field(le=2**20)]
Seconds = Annotated[Real, Field(gt=0, le=30 * 24 * 3600)]
Grace = Annotated[Count, Field(le=24 * 3600)]
Positive = Annotated[Real, Field(gt=0)]
Fraction = Annotated[Real, Field(ge=0, lt=1)]
Size = Annotated[Count, Field(le=2**24)]
Heads = Annotated[Count, Field(le=2**16)]
Layers = Annotated[Count, Field(le=4096)]
Vocabulary = Annotated[Count, Field(le=2**31)]
Seed = Annotated[int, BeforeValidator(reject_bool), Field(ge=0, lt=2**63)]
