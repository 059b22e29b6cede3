"""A prompt with a picture, which image-to-video models start from."""

from __future__ import annotations

from pathlib import Path
from typing import Self


class Pictured(str):
    """A text that goes wherever a prompt goes, and names the picture that belongs to it.

    Two of them are the same if both text and picture are.

    Args:
        text: the prompt.
        picture: a picture's file.
    """

    picture: Path

    def __new__(cls, text: str, picture: Path) -> Self:
        """Make one; see the class."""
        made = super().__new__(cls, text)
        made.picture = Path(picture)
        return made

    def __getnewargs__(self) -> tuple[str, Path]:  # type: ignore[override]  # str's own knows one
        return str(self), self.picture

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Pictured):
            return str(self) == str(other) and self.picture == other.picture
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), self.picture))
