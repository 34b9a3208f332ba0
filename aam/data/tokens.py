"""Nucleotides to tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aam.data.files import short

PAD, A, C, G, T, START, MASK, N = range(8)
VOCABULARY_SIZE = 8

_TABLE = np.full(256, 255, dtype=np.uint8)
for _letter, _token in {"A": A, "C": C, "G": G, "T": T, "U": T, **dict.fromkeys("RYSWKMBDHVN", N)}.items():
    _TABLE[ord(_letter)] = _TABLE[ord(_letter.lower())] = _token


def encode(sequences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode sequences, START first, padded to the longest.

    Parameters
    ----------
    sequences : sequence of str
        Nucleotides; U is read as T, any IUPAC code but A, C, G, T, U as N.

    Returns
    -------
    tokens : ndarray of uint8 [n, 1 + longest]
    lengths : ndarray of uint16 [n]
        Tokens of each sequence with its START.

    Raises
    ------
    ValueError
        For a letter that is no nucleotide; the message names the sequence and the letter.
    """
    lengths = np.fromiter((len(s) + 1 for s in sequences), dtype=np.uint16, count=len(sequences))
    tokens = np.full((len(sequences), int(lengths.max(initial=1))), PAD, dtype=np.uint8)
    tokens[:, 0] = START
    for row, sequence in enumerate(sequences):
        encoded = _TABLE[np.frombuffer(sequence.encode("latin-1", "replace"), dtype=np.uint8)]
        if (encoded == 255).any():
            position = int(np.argmax(encoded == 255))
            raise ValueError(
                f"ASV {short(sequence)!r}: letter {sequence[position]!r} at position {position + 1} "
                "is not a nucleotide (A, C, G, T, U or an IUPAC code)"
            )
        tokens[row, 1 : 1 + len(encoded)] = encoded
    return tokens, lengths
