"""Part: what every model of a manifest's parts has in common."""

from typing import Annotated

import pydantic
from pydantic import Field

Size = Annotated[int, Field(ge=0)]


class Part(pydantic.BaseModel):
    """Strict: no strings for numbers, no unknown names, nothing that can be changed."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)
