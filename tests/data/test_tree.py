"""The Newick parser: shape and lengths of the sheared tree, and what it says of broken files."""

import re
from itertools import pairwise

import numpy as np
import pytest

from aam.data.tree import parse_newick, root_paths


def parse(text, tips):
    return parse_newick(text, tips, source="my.nwk")


def heights(tree):
    """Distance of each requested tip from above the root, by walking up."""
    result = []
    for tip in tree.tip:
        total, node = 0.0, tip
        while node >= 0:
            total += tree.length[node]
            node = tree.parent[node]
        result.append(total)
    return result


def test_arrays_of_a_small_tree():
    tree = parse("((a:1,b:2):3,c:4);", ["c", "a", "b"])
    assert tree.parent.tolist() == [-1, 0, 1, 1, 0]
    assert tree.length.tolist() == [0.0, 3.0, 1.0, 2.0, 4.0]
    assert tree.tip.tolist() == [4, 2, 3]
    assert tree.notes == ()
    assert (tree.parent.dtype, tree.length.dtype, tree.tip.dtype) == (np.int32, np.float64, np.int32)


def test_shearing_drops_and_merges():
    text = "(((a:1,b:2):4,(x:8,(y:1,z:1):1):1):16,(((c:32):64):128,w:1):256):512;"
    tree = parse(text, ["a", "b", "c"])
    assert tree.parent.tolist() == [-1, 0, 1, 1, 0]
    assert tree.length.tolist() == [512, 16 + 4, 1, 2, 32 + 64 + 128 + 256]
    # With all tips of one side the root itself has a single child: its edge takes up the chain.
    tree = parse(text, ["b", "a"])
    assert tree.parent.tolist() == [-1, 0, 0]
    assert tree.length.tolist() == [512 + 16 + 4, 1, 2]
    tree = parse(text, ["c"])
    assert tree.parent.tolist() == [-1]
    assert tree.length.tolist() == [512 + 256 + 128 + 64 + 32]


def test_tips_the_tree_lacks():
    tree = parse("((a:1,b:2):3,c:4);", ["gone", "a", "missing", "c"])
    assert (tree.tip < 0).tolist() == [True, False, True, False]
    assert heights(tree) == [0, 4, 0, 4]
    nothing = parse("((a:1,b:2):3,c:4);", ["gone"])
    assert nothing.tip.tolist() == [-1]
    assert len(nothing.parent) == len(nothing.length) == 0
    offsets, nodes = root_paths(nothing)
    assert offsets.tolist() == [0, 0]
    assert len(nodes) == 0


@pytest.mark.parametrize(
    ("text", "tips"),
    [
        ("((a:1,b:2)0.98:3,c:4)root:0;", "abc"),
        ("((a:1,b:2)'0.98:f__X; g__Y (z)':3,c:4);", "abc"),
        ("[&R] ((a[one]:1,b:2[&two [nested] 'quote]):3,c:4);[end]\n", "abc"),
        (" (\n(a :\t1,\nb:2)\n:3 , c:4\r\n)\n;\n\n", "abc"),
        ("\ufeff((a:1,b:2):3,c:4)", "abc"),
        ("((a:1E0,b:+2.0):.3e+1,c:400e-2);", "abc"),
        ("(('it''s':1,'b [x],(:)':2):3,a_b:4);", ["it's", "b [x],(:)", "a_b"]),
        ("((:9,a:1,b:2,:1):3,c:4,(,):0);", "abc"),
    ],
    ids=["support", "quoted-inner", "comments", "blanks", "bom-no-end", "numbers", "quoted", "nameless"],
)
def test_dialects(text, tips):
    assert heights(parse(text, list(tips))) == [4.0, 5.0, 4.0]


def test_multifurcation_is_kept():
    tree = parse("((a:1,b:1,c:1,d:1):1,e:1);", list("abcde"))
    assert tree.parent.tolist() == [-1, 0, 1, 1, 1, 1, 0]


def test_notes():
    tree = parse("((a,b:2):3,c:,d:1);", list("abcd"))
    assert heights(tree) == [3, 5, 0, 1]
    missing, unrooted = tree.notes
    assert missing == "my.nwk: 2 of 5 branches have no length; they are taken as 0."
    assert unrooted.startswith("my.nwk: the root has 3 children, as in an unrooted tree")


def test_root_paths():
    tree = parse("((a:1,b:2):3,c:4);", ["c", "gone", "b", "a"])
    offsets, nodes = root_paths(tree)
    assert (offsets.dtype, nodes.dtype) == (np.int64, np.int32)
    paths = [nodes[i:j].tolist() for i, j in pairwise(offsets)]
    assert paths == [[4, 0], [], [3, 1, 0], [2, 1, 0]]


def test_ladder_as_deep_as_it_has_tips():
    depth = 100_000
    text = "(" * depth + "t0:1" + "".join(f",t{i}:1):1" for i in range(1, depth + 1)) + ";"
    names = [f"t{i}" for i in range(depth + 1)]
    whole = parse(text, names)
    assert len(whole.parent) == 2 * depth + 1
    with pytest.raises(ValueError, match=r"100,001 tips to the root hold 5,000,\d+,\d+ nodes.*close to a ladder"):
        root_paths(whole)
    few = parse(text, names[::1000])
    assert len(few.parent) == 2 * 101 - 1
    # t_i hangs below the edges of the depth - i + 1 forks above it, the root's among them, and its own.
    assert heights(few) == [depth + 1.0, *(depth - i + 2.0 for i in range(1000, depth + 1, 1000))]
    offsets, nodes = root_paths(few)
    assert np.diff(offsets).tolist() == [101, *range(101, 1, -1)]
    assert nodes[offsets[1:] - 1].tolist() == [0] * 101


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my.nwk: the file is empty"),
        (" \n\t", "my.nwk: the file is empty"),
        ("[only a comment]", "my.nwk: the file is empty"),
        ("#NEXUS\nbegin trees;\ntree a = (a:1,b:1);\nend;", "my.nwk: this is a NEXUS file; export"),
        ("PK\x03\x04\x14\x00\x00", "my.nwk: this is a binary file"),
        ("\x89HDF\r\n\x1a\n\x00\x00", "my.nwk: this is a binary file"),
        ("\ufffd\ufffdH\x12", "my.nwk: this is a binary file"),
        ('\n  {"tree": 1}', r"line 2, column 3: a Newick tree starts with '\(', found '\{\"tree\": 1\}'"),
        ("sample-id\tage\nx\t1\n", r"line 1, column 1: a Newick tree starts with '\(', found 'sample-id"),
        ("((a:1,b:1):1,c:1;", r"line 1, column 18: the tree ends while 1 '\(' are open"),
        ("((a:1,b:1", r"line 1, column 10: the tree ends while 2 '\(' are open"),
        ("(a:1,b:1)):1;", r"line 1, column 10: a '\)' without its '\('"),
        ("(a:1,b:1),(c:1,d:1);", "line 1, column 10: a ',' outside all parentheses"),
        ("(a:1,b:1)(c:1,d:1);", r"column 10: '\(c:1,d:1\);' does not fit here"),
        ("(a:1,\n b:1 c(d:1));", "line 2, column 2: 'b:1 c.*does not fit here"),
        ("(a:1,b'c:1);", "column 6: .b'c.*does not fit here"),
        ("(a:1,'b:1);", "column 6: .*quote not closed"),
        ("(a:1,b[c:1);", "column 6: .*comment .* not closed"),
        ("(a:1,b:1:2);", "column 6: .*does not fit here"),
        ("(a:1,b:1_0);", "column 6: .*does not fit here"),
        ("(a:1,b:1);\n (c:1,d:1);", r"line 2, column 2: text after the ';', but .* one tree only"),
        ("(a:1,b:1);;", r"line 1, column 11: text after the ';'"),
        ("(a:1,b:-0.5);", "column 8: the branch length '-0.5' of node 'b' is negative; correct the tree"),
        ("((a:1,c:1)'x y':-1,b:1);", "length '-1' of node 'x y' is negative"),
        ("((a:1,c:1):-1,b:1);", "length '-1' of the unnamed node that ends here is negative"),
        ("(a:1,b:long);", "the branch length 'long' of node 'b' is not a finite number"),
        ("(a:1,b:nan);", "the branch length 'nan' of node 'b' is not a finite number"),
        ("(a:1,b:inf);", "the branch length 'inf' of node 'b' is not a finite number"),
        ("(a:1,b:0.1{7});", r"the branch length '0.1\{7\}' of node 'b' is not a finite number"),
        ("((a,b),c):1;", "my.nwk: no branch of the tree has a length"),
        ("((a:1,b:1):1,a:1);", "column 14: the tree has more than one tip 'a'"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ValueError, match=rf"^my\.nwk.*{message.removeprefix('my.nwk')}") as error:
        parse(text, ["a", "b"])
    assert re.search(r"\.$", str(error.value))


def test_tip_requested_twice():
    with pytest.raises(ValueError, match=r"my\.nwk: tip 'b' is requested more than once"):
        parse("((a:1,b:2):3,c:4);", ["a", "b", "c", "b"])
