"""Tokens to text while they come."""

from megamtp.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # of a character of which not all bytes are there yet


class TextStream:
    """Gives the text that each new token adds; a character that is cut in two waits for its rest."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]):
        # Decoded together with a few tokens before them: some tokenizers drop a space in front of the first token.
        self.tokenizer, self.tokens = tokenizer, list(context[-8:])
        self.shown = len(self.tokenizer.decode(self.tokens))

    def add(self, new: list[int]) -> str:
        """The text that is certain now."""
        self.tokens += new
        text = self.tokenizer.decode(self.tokens)
        if text.endswith(REPLACEMENT):
            return ""
        return self._from(text)

    def end(self) -> str:
        """What is left, cut characters included."""
        return self._from(self.tokenizer.decode(self.tokens))

    def _from(self, text: str) -> str:
        added, self.shown = text[self.shown :], len(text)
        if len(self.tokens) > 64 and added and not text.endswith(REPLACEMENT):
            self.tokens = self.tokens[-8:]
            self.shown = len(self.tokenizer.decode(self.tokens))
        return added
