"""Splits from id files, and drawn ones: grouped, stratified, both."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aam.data.split import describe_dropped, draw_split, draw_test, read_ids, split_from_files

USABLE = [f"{i:03d}.10" for i in range(20)]
DROPPED = {"900.10": "fewer reads than --rarefy-depth 10", "901.10": "no reads"}


def write(path: Path, ids: list[str]) -> Path:
    path.write_text("\n".join(ids) + "\n")
    return path


def split(folder: Path, **ids: list[str]):
    """Split by files of these ids; a part without ids has no file."""
    files = {
        part: write(folder / f"{part}.txt", ids[part]) if part in ids else None for part in ("train", "val", "test")
    }
    return split_from_files(files, USABLE, DROPPED)


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_id_files_are_followed(tmp_path):
    found = split(tmp_path, train=USABLE[:10], val=USABLE[12:9:-1], test=USABLE[13:])
    assert found.train == USABLE[:10]
    assert found.val == USABLE[12:9:-1]
    assert found.test == USABLE[13:]
    assert found.notes == ()


def test_samples_in_no_file_are_said(tmp_path):
    found = split(tmp_path, train=USABLE[:10], val=USABLE[10:15])
    assert found.test == []
    assert found.notes == ("5 usable samples are in no id file and stay unused",)


def test_listed_samples_that_were_dropped_are_said_with_the_reason(tmp_path):
    found = split(tmp_path, train=USABLE[:10], val=[*USABLE[10:], *DROPPED])
    assert found.val == USABLE[10:]
    assert "--val-ids: 1 sample dropped: no reads (901.10)" in found.notes
    assert "--val-ids: 1 sample dropped: fewer reads than --rarefy-depth 10 (900.10)" in found.notes


def test_a_part_of_which_nothing_is_left_is_an_error(tmp_path):
    message = refusal(split, tmp_path, train=USABLE, val=list(DROPPED))
    assert "val.txt: none of its 2 samples can be used" in message
    files = {part: tmp_path / f"{part}.txt" for part in ("train", "val", "test")}
    for part, ids in zip(files, (USABLE[:5], USABLE[5:], list(DROPPED)), strict=True):
        files[part].write_text("\n".join(ids))
    assert "test.txt: none of its 2 samples" in refusal(split_from_files, files, USABLE, DROPPED)
    assert split_from_files(files, USABLE, DROPPED, only_kept_out=True).test == []
    assert "900.10 (fewer reads than --rarefy-depth 10)" in message


def test_an_unknown_id_is_named_beside_the_table_s(tmp_path):
    message = refusal(split, tmp_path, train=USABLE[:5], val=["5.1", USABLE[6], "x"])
    assert "val.txt: 2 of 3 ids are not in the table: 5.1, x" in message
    assert "000.10, 001.10, 002.10" in message


def test_an_id_in_two_files_is_named(tmp_path):
    message = refusal(split, tmp_path, train=USABLE[:5], val=USABLE[5:9], test=["019.10", "004.10"])
    assert "test.txt" in message
    assert "--train-ids" in message
    assert "004.10" in message
    assert "019.10" not in message


def test_a_repeated_id_is_named(tmp_path):
    message = refusal(read_ids, write(tmp_path / "ids.txt", ["a", "b", "a", "c", "b"]))
    assert "ids.txt" in message
    assert "twice: a, b;" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"\n \n\n", "an empty file"),
        (b"sample-id\n", "found none"),
        (b"\x89HDF\r\n\x1a\n\x00\x00", "an HDF5 file"),
        (b"PK\x03\x04abc", "a zip archive"),
        (b"a\x00b\x01", "a binary file"),
        ("a\nb\n".encode("utf-16"), "UTF-16"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"(a:1,b:2);", "a newick tree"),
    ],
)
def test_a_file_that_holds_no_ids_says_what_it_is(tmp_path, content, words):
    path = tmp_path / "ids.txt"
    path.write_bytes(content)
    message = refusal(read_ids, path)
    assert str(path) in message
    assert words in message


def test_an_absent_file_and_a_folder(tmp_path):
    assert "No such file" in refusal(read_ids, tmp_path / "absent.txt")
    assert "a directory" in refusal(read_ids, tmp_path)


def test_ids_stay_text_and_a_table_s_first_column_does(tmp_path):
    path = tmp_path / "ids.tsv"
    path.write_bytes("\ufeff#SampleID\tsite\r\n007\tgut\r\n10317.000001230\t\r\n\r\n 1e5 \tskin".encode())
    assert read_ids(path) == ["007", "10317.000001230", "1e5"]


def test_reasons_are_counted():
    dropped = {f"s{i}": "no reads" for i in range(7)} | {"t": "no value in column 'a, b'"}
    assert describe_dropped(dropped) == [
        "7 samples dropped: no reads (s0, s1, s2, s3, s4, ... (2 more))",
        "1 sample dropped: no value in column 'a, b' (t)",
    ]


def check_parts(found, ids):
    assert sorted(found.train + found.val) == sorted(ids)
    assert found.train
    assert found.val


@given(st.integers(5, 200), st.floats(0.05, 0.8), st.integers(0, 10))
def test_a_plain_split_has_the_share_asked_for(n, fraction, seed):
    ids = [f"s{i}" for i in range(n)]
    found = draw_split(ids, val_fraction=fraction, seed=seed)
    check_parts(found, ids)
    assert abs(len(found.val) - fraction * n) <= 1


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.floats(0.1, 0.5), st.integers(0, 5))
def test_a_group_is_never_on_both_sides(groups, fraction, seed):
    ids, names = [f"s{i}" for i in range(len(groups))], [f"g{g}" for g in groups]
    if len(set(groups)) < 2:
        assert "g" + str(groups[0]) in refusal(draw_split, ids, val_fraction=fraction, seed=seed, groups=names)
        return
    found = draw_split(ids, val_fraction=fraction, seed=seed, groups=names)
    check_parts(found, ids)
    of = dict(zip(ids, names, strict=True))
    assert not {of[s] for s in found.train} & {of[s] for s in found.val}


@pytest.mark.parametrize("fraction", [0.2, 0.3, 0.4, 0.6])
def test_groups_of_uneven_size_come_near_the_share(fraction):
    sizes = [40, 20, 10, 10, 5, 5, 4, 3, 2, 1]
    groups = [f"g{g}" for g, size in enumerate(sizes) for _ in range(size)]
    ids = [f"s{i}" for i in range(100)]
    for seed in range(5):
        found = draw_split(ids, val_fraction=fraction, seed=seed, groups=groups)
        assert abs(len(found.val) - 100 * fraction) <= 15


def test_classes_are_in_both_parts_by_their_share():
    classes = ["a"] * 50 + ["b"] * 40 + ["c"] * 10
    ids = [f"s{i}" for i in range(100)]
    found = draw_split(ids, val_fraction=0.2, seed=1, classes=classes)
    check_parts(found, ids)
    of = dict(zip(ids, classes, strict=True))
    assert Counter(of[s] for s in found.val) == {"a": 10, "b": 8, "c": 2}


def test_grouped_and_stratified():
    rng = np.random.default_rng(0)
    groups = [f"g{g}" for g in rng.integers(25, size=200)]
    classes = [("a", "a", "a", "b")[int(g[1:]) % 4] for g in groups]  # a subject has one class, as in a trial
    ids = [f"s{i}" for i in range(200)]
    found = draw_split(ids, val_fraction=0.25, seed=2, groups=groups, classes=classes)
    check_parts(found, ids)
    group, of = dict(zip(ids, groups, strict=True)), dict(zip(ids, classes, strict=True))
    assert not {group[s] for s in found.train} & {group[s] for s in found.val}
    held, everything = Counter(of[s] for s in found.val), Counter(classes)
    for name in "ab":
        assert held[name] / everything[name] == pytest.approx(0.25, abs=0.08)


def test_a_class_of_a_single_group_stays_in_training():
    groups = ["g0"] * 6 + [f"g{i // 4}" for i in range(4, 40)]
    classes = ["rare"] * 6 + ["a", "b"] * 18
    ids = [f"s{i:02d}" for i in range(42)]
    for seed in range(10):
        found = draw_split(ids, val_fraction=0.25, seed=seed, groups=groups, classes=classes)
        assert ids[0] in found.train


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("stratified", [False, True])
def test_a_split_depends_on_the_seed_and_not_on_the_order_of_the_table(grouped, stratified):
    rng = np.random.default_rng(1)
    ids = [f"s{i}" for i in range(60)]
    groups = [f"g{g}" for g in rng.integers(12, size=60)] if grouped else None
    classes = [f"c{c}" for c in rng.integers(3, size=60)] if stratified else None

    def at(order, seed):
        def pick(values):
            return None if values is None else [values[i] for i in order]

        return draw_split(pick(ids), val_fraction=0.2, seed=seed, groups=pick(groups), classes=pick(classes))

    first = at(range(60), 0)
    assert at(range(60), 0) == first
    assert at(rng.permutation(60), 0) == first
    assert any(at(range(60), seed).val != first.val for seed in (1, 2, 3))


def test_what_cannot_be_split_says_so():
    message = refusal(draw_split, ["a"], val_fraction=0.2, seed=0)
    assert "--val-fraction 0.2" in message
    assert "--train-ids" in message
    message = refusal(draw_split, list("uvwxyz"), val_fraction=0.2, seed=0, classes=["a", "a", "b", "b", "c", "c"])
    assert "2 should be greater or equal to the number of classes = 3" in message
    # A class of one sample is learned from, for it cannot be on both sides.
    assert "z" in draw_split(list("wxyz"), val_fraction=0.5, seed=0, classes=["a", "a", "a", "b"]).train


def test_test_samples_depend_on_the_samples_and_the_seed_alone():
    rng = np.random.default_rng(3)
    ids = [f"s{i}" for i in range(80)]
    groups = [f"g{g}" for g in rng.integers(20, size=80)]
    first = draw_test(ids, test_fraction=0.25, seed=4, groups=groups)
    order = rng.permutation(80)
    shuffled = [ids[i] for i in order], [groups[i] for i in order]
    assert draw_test(shuffled[0], test_fraction=0.25, seed=4, groups=shuffled[1]) == first
    assert draw_test(ids, test_fraction=0.25, seed=5, groups=groups) != first
    of = dict(zip(ids, groups, strict=True))
    drawn = {of[s] for s in first}
    assert first == sorted(s for s in ids if of[s] in drawn), "a group is torn apart"
    assert len(first) == pytest.approx(20, abs=4)
    assert len(draw_test(ids, test_fraction=0.25, seed=4)) == 20


def test_test_samples_that_cannot_be_drawn():
    message = refusal(draw_test, ["a"], test_fraction=0.2, seed=0)
    assert "--test-fraction 0.2" in message
    assert "--test-ids" in message
    assert "one group only (g)" in refusal(draw_test, ["a", "b"], test_fraction=0.5, seed=0, groups=["g", "g"])
