"""How an answer is chosen and where it ends: the fields that every request has, and a generation config too."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

#: Stop strings of a request, and characters of each: every token looks for all of them.
_STOPS, _STOP_LENGTH = 16, 1000

Stop = Annotated[str, Field(min_length=1, max_length=_STOP_LENGTH)]
Token = Annotated[int, Field(ge=0)]


class Choice(BaseModel):
    """Fields that are absent are None, which stands for the server's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    stop: Stop | Annotated[list[Stop], Field(max_length=_STOPS)] | None = None
    eos_token_id: Token | list[Token] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def ends(self) -> frozenset[int] | None:
        """The tokens that end the answer; None for the model's own."""
        found = self.eos_token_id
        return None if found is None else frozenset([found] if isinstance(found, int) else found)
