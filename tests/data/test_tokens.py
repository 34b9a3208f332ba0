"""Nucleotides to tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aam.data.tokens import PAD, START, VOCABULARY_SIZE, A, C, G, N, T, encode


def test_known_sequences():
    tokens, lengths = encode(["ACGT", "uN"])
    assert tokens.tolist() == [[START, A, C, G, T], [START, T, N, PAD, PAD]]
    assert lengths.tolist() == [5, 3]
    assert (tokens.dtype, lengths.dtype) == (np.uint8, np.uint16)


def test_the_numbers_are_those_of_the_contract():
    assert (PAD, A, C, G, T, START, N, VOCABULARY_SIZE) == (0, 1, 2, 3, 4, 5, 7, 8)


@given(st.lists(st.text("ACGTURYSWKMBDHVNacgturyswkmbdhvn", min_size=1, max_size=30), min_size=1, max_size=8))
def test_each_letter_is_found_again(sequences):
    tokens, lengths = encode(sequences)
    assert tokens.shape == (len(sequences), 1 + max(map(len, sequences)))
    letter = {A: "A", C: "C", G: "G", T: "T", N: "N"}
    for sequence, row, length in zip(sequences, tokens, lengths, strict=True):
        plain = sequence.upper().replace("U", "T")
        assert row[0] == START
        assert [letter[t] for t in row[1:length]] == [x if x in "ACGT" else "N" for x in plain]
        assert (row[length:] == PAD).all()


@pytest.mark.parametrize("letter", ["X", "-", ".", " ", "E", "é", "\u212a", "核"])
def test_another_letter_is_named_with_its_place(letter):
    with pytest.raises(ValueError, match="is not a nucleotide") as caught:
        encode(["ACGT", f"AC{letter}GT"])
    assert f"letter {letter!r} at position 3" in str(caught.value)
    assert f"AC{letter}GT" in str(caught.value)


def test_nothing_to_encode():
    tokens, lengths = encode([])
    assert tokens.shape == (0, 1)
    assert len(lengths) == 0
