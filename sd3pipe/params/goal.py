"""What an adapter is to learn, as an option says it."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from sd3pipe.words import Goal

_OTHER_WORDS = {"subject": "object", "concepts": "concept"}


def _known(word: Any) -> Any:
    return _OTHER_WORDS.get(word, word) if isinstance(word, str) else word


AnyGoal = Annotated[Goal, BeforeValidator(_known)]
