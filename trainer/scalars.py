"""The types of the config's knobs: numbers that are no truth values, in ranges that some machine has."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from trainer.values import LARGEST, magnitude


def no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


def only_bool(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("true or false is needed")
    return value


def held(value: float) -> float:
    if unfit := magnitude(value):
        raise ValueError(unfit)
    return value


Whole = Annotated[int, BeforeValidator(no_bool), Field(le=LARGEST)]
Real = Annotated[float, BeforeValidator(no_bool), AfterValidator(held), Field(allow_inf_nan=False)]
Flag = Annotated[bool, BeforeValidator(only_bool)]
Count = Annotated[Whole, Field(ge=1)]
Natural = Annotated[Whole, Field(ge=0)]
Ranks = Annotated[Count, Field(le=2**20)]
Seconds = Annotated[Real, Field(gt=0, le=30 * 24 * 3600)]
Grace = Annotated[Count, Field(le=24 * 3600)]
Positive = Annotated[Real, Field(gt=0)]
Share = Annotated[Real, Field(ge=0, lt=1)]
Size = Annotated[Count, Field(le=2**24)]
Heads = Annotated[Count, Field(le=2**16)]
Layers = Annotated[Count, Field(le=4096)]
Vocabulary = Annotated[Count, Field(le=2**31)]
Seed = Annotated[int, BeforeValidator(no_bool), Field(ge=0, lt=2**63)]
