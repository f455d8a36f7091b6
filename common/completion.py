"""Shell completion of words that contain a colon, such as `run:FOLDER` and `LAYER:REDUCTION`.

Bash splits words at colons and completes what follows the last one, while click compares whole words.
"""

from __future__ import annotations

from click.shell_completion import BashComplete, CompletionItem, add_completion_class

COLON = ":"


class Bash(BashComplete):
    """Completion for bash of words with colons."""

    typed = ""
    """Part of the incomplete word that stands before what bash completes."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the complete words and the incomplete one, with words joined that bash has split."""
        args, incomplete = super().get_completion_args()
        words = joined([*args, incomplete])
        self.typed = words[-1] if incomplete == COLON else words[-1].removesuffix(incomplete)
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """Return a completion without the part of the word that bash does not replace."""
        return f"{item.type},{item.value.removeprefix(self.typed)}"


def joined(words: list[str]) -> list[str]:
    """Join words with the colons between them.

    >>> joined(["--tap", "layer1", ":", "po"])
    ['--tap', 'layer1:po']
    """
    found: list[str] = []
    is_open = False
    for word in words:
        if found and word and (is_open or word == COLON):
            found[-1] += word
        else:
            found.append(word)
        is_open = word == COLON
    return found


def register() -> None:
    """Make click complete with the class of this module in bash."""
    add_completion_class(Bash, "bash")
