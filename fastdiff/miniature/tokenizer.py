"""A `CLIPTokenizer` for the miniature world, built in code: every world word is one token, others are spelled out."""

import itertools

from transformers import CLIPTokenizer

from . import world

START, END, LENGTH = "<|startoftext|>", "<|endoftext|>", 24
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges after which each word is one token.

    Ordinary byte-pair training: the most frequent neighbouring pair is merged until no word has two pieces, so the
    merges of one word are never undone by those of another.
    """
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for parts in pieces.values():
            for pair in itertools.pairwise(parts):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = {word: _merged(parts, best) for word, parts in pieces.items()}


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined, i = [], 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            joined.append(parts[i] + parts[i + 1])
            i += 2
        else:
            joined.append(parts[i])
            i += 1
    return joined


def build() -> CLIPTokenizer:
    """The tokenizer: ids are stable, sequences are padded to 24 tokens, the last two ids are start and end (= pad)."""
    merges = _merges(world.vocabulary())
    singles = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS)]
    tokens = list(dict.fromkeys([*singles, *(left + right for left, right in merges), START, END]))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        model_max_length=LENGTH,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )
