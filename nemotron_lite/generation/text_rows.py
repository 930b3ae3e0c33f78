"""Text from tokens while they are written: whole characters, and nothing of a stop string.

    row = TextRow(tokenizer, prompt, stop, max_new_tokens, stop_strings=("User:",))
    for token in tokens: print(row.add(token), end="")

A token may be a part of a character, or of a word that a stop string begins with. So a piece of
text is given when its characters are complete, and when it is certain that no stop string begins in
it: what could become one is held back until the next token decides.

Which stop string ends a row does not depend on how the tokens cut the text: it is the first one
that is complete, reading character by character; of several that end at the same character, the
longest. Its characters and all after it are cut off.

Source: tokenizers' DecodeStream for characters of several tokens. Left out: stop strings that begin
in the prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextRow:
    """Turns the tokens of one row into text while they are written.

    Args:
        tokenizer: of the model.
        prompt: the row's prompt, which the first piece of text continues.
        stop: tokens that end the row and are not shown.
        max_new_tokens: tokens after which the row ends.
        stop_strings: texts that end the row and are not shown.
        skip_special_tokens: leave special tokens out of the text.

    Attributes:
        text: given so far.
        stop_string: the one that has ended the row; None if none has.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        stop: Collection[int],
        max_new_tokens: int,
        *,
        stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._stop, self._max_new_tokens = stop, max_new_tokens
        self._skip = skip_special_tokens
        self._decoder = DecodeStream(ids=prompt, skip_special_tokens=skip_special_tokens)
        self._tokens: list[int] = []
        self._length = 0  # characters decoded so far: those in `text` and those held back
        self._search = StopStrings(stop_strings)
        self._pieces: list[str] = []
        self.stop_string: str | None = None

    @property
    def text(self) -> str:
        """The pieces so far, joined."""
        return "".join(self._pieces)

    def add(self, token: int | None) -> str:
        """The text that this token completes; often nothing, for a part of a character.

        The last token of the row gives the rest, even if its last character is not complete.
        """
        if token is None or self.stop_string is not None:
            return ""
        self._tokens.append(token)
        last = token in self._stop or len(self._tokens) >= self._max_new_tokens
        new = self._rest() if last else self._decoded(token)
        self._length += len(new)
        piece = self._search.add(new)
        self.stop_string = self._search.found
        if last:
            piece += self._search.end()
        self._pieces.append(piece)
        return piece

    def _decoded(self, token: int) -> str:
        try:
            return self._decoder.step(self._tokenizer, token) or ""
        except Exception:
            # tokenizers refuses to go on where an invalid character has changed what it gave
            # before. A new stream starts from here.
            ids = [*self._prompt, *self._tokens]
            self._decoder = DecodeStream(ids=ids, skip_special_tokens=self._skip)
            return self._rest().rstrip("�")

    def _rest(self) -> str:
        whole = continuation(
            self._tokenizer, self._prompt, self._tokens, self._stop, skip_special_tokens=self._skip
        )
        return whole[self._length :]


class StopStrings:
    """Looks for stop strings in a text that comes in pieces.

    Attributes:
        found: the stop string that was found; nothing is given after it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = sorted(strings, key=len, reverse=True)
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """What may be shown now that this piece has come."""
        if self.found is not None:
            return ""
        if not self._strings:
            return piece
        # Nothing that was given before can be part of a stop string: it would have been held.
        text = self._held + piece
        ends = [
            (start + len(string), start, string)
            for string in self._strings
            if (start := text.find(string)) >= 0
        ]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        held = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, now that no further piece comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest beginning of `string`, not all of it, that `text` ends in."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


def continuation(
    tokenizer: Tokenizer,
    prompt: list[int],
    tokens: list[int],
    stop: Collection[int],
    *,
    skip_special_tokens: bool = True,
) -> str:
    """The text of `tokens` behind `prompt`, without the stop token at its end."""
    if tokens and tokens[-1] in stop:
        tokens = tokens[:-1]
    before = tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode(prompt + tokens, skip_special_tokens=skip_special_tokens)
    return whole[len(before) :]
