"""Newick text -> a flat tree sheared to the wanted tips, and each tip's path to the root."""

import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np

# One match per "(" and one per end of a node: label, branch length, and the mark that follows ("" at the end
# of the text). The last group takes any character that fits nowhere, so that nothing is skipped in silence.
# Possessive quantifiers (*+) keep a broken file of 100 MB from backtracking.
_TOKEN = re.compile(
    r"""\s*+(?:
        (\()
      | ('(?:[^']++|'')*+' | [^'()\[\],:;]*+) \s*+ (?: : \s*+ ([^\s_'()\[\],:;]*+) \s*+ )?+ ([,);]|\Z)
      | (.)
    )""",
    re.VERBOSE | re.DOTALL,
)
_QUOTED_OR_COMMENT = re.compile(r"'(?:[^']++|'')*+'|\[(?:[^\[\]]++|\[[^\[\]]*+\])*+\]")
_NOT_GIVEN = math.nan
_HINT = "is a ',' missing, a comment [] or quote not closed, or a name in need of quotes?"
_MAX_PATH_NODES = 2**30  # 4 GiB of int32


@dataclass(frozen=True, kw_only=True)
class FlatTree:
    """A rooted tree as arrays over its nodes, in preorder: parents precede children, node 0 is the root.

    Each node stands for the edge above it, the root included: a root length counts, as it does in scikit-bio.
    """

    parent: np.ndarray
    """int32 [E], parent of each node, -1 for the root"""
    length: np.ndarray
    """float64 [E], length of the edge above each node"""
    tip: np.ndarray
    """int32 [n], node of each requested tip, -1 where the tree has no such tip"""
    notes: tuple[str, ...]
    """what the user should be told about the tree"""


class _Parsed(NamedTuple):
    """All nodes of the file in preorder; `length` is NaN where none is written."""

    parent: np.ndarray
    end: np.ndarray  # one past the last node below each node
    length: np.ndarray
    node_of: np.ndarray  # [n] node of each requested tip or -1


def parse_newick(text: str, tips: Sequence[str], *, source: str) -> FlatTree:
    """Parse a Newick tree and shear it to the requested tips.

    Nodes that shearing leaves with a single child are merged with it (lengths added), so every sum of lengths
    along a path to the root stays what it was.

    Parameters
    ----------
    text
        One tree in Newick format.
    tips
        Names of the wanted tips; names that the tree lacks get node -1.
    source
        Where the text is from, for messages.
    """
    wanted = {name: i for i, name in enumerate(tips)}
    if len(wanted) != len(tips):
        culprit = next(name for i, name in enumerate(tips) if wanted[name] != i)
        raise ValueError(f"{source}: tip {culprit!r} is requested more than once; feature ids must be unique.")
    text = _blank_comments(text)
    _check_is_newick(text, source)
    parsed = _scan(text, wanted, source)
    missing = np.isnan(parsed.length)
    n_missing = int(missing[1:].sum())
    if n_missing == len(missing) - 1:
        raise ValueError(
            f"{source}: no branch of the tree has a length, so no UniFrac distance is defined. "
            "Export the tree with branch lengths (a cladogram has none)."
        )
    notes = []
    if n_missing:
        notes.append(f"{source}: {n_missing:,} of {len(missing) - 1:,} branches have no length; they are taken as 0.")
    root_children = int((parsed.parent == 0).sum())
    if root_children > 2:
        notes.append(
            f"{source}: the root has {root_children:,} children, as in an unrooted tree; it is taken as "
            "rooted where it is written. Root it (midpoint, outgroup) if that is not meant."
        )
    parent, length, tip = _shear(parsed._replace(length=np.where(missing, 0.0, parsed.length)))
    return FlatTree(parent=parent, length=length, tip=tip, notes=tuple(notes))


def _blank_comments(text: str) -> str:
    """Overwrite [comments] and a byte order mark with blanks, so that positions in messages stay right."""
    if text.startswith("\ufeff"):
        text = " " + text[1:]
    if "[" not in text:
        return text

    def blank(match: re.Match[str]) -> str:
        found = match[0]
        return found if found[0] == "'" else re.sub(r"[^\n]", " ", found)

    return _QUOTED_OR_COMMENT.sub(blank, text)


def _check_is_newick(text: str, source: str) -> None:
    head = text[:1000].lstrip()
    if not head and not text.strip():
        raise ValueError(f"{source}: the file is empty; a tree in Newick format is expected.")
    if head[:6].upper() == "#NEXUS":
        raise ValueError(f"{source}: this is a NEXUS file; export the tree in Newick format.")
    if head.startswith("PK\x03\x04") or "\0" in head or "\ufffd" in head:
        raise ValueError(f"{source}: this is a binary file; a tree in Newick format (plain text) is expected.")
    if head and head[0] != "(":
        at = len(text) - len(text.lstrip())
        _refuse(source, text, at, f"a Newick tree starts with '(', found {_excerpt(text, at)}")


def _scan(text: str, wanted: dict[str, int], source: str) -> _Parsed:
    """Read the tokens into preorder arrays. No recursion: a ladder is as deep as it has tips."""
    parent, end, length = array("i"), array("i"), array("d")
    node_of = np.full(len(wanted), -1, dtype=np.int32)
    open_nodes = [-1]
    node, expects_node, done = -1, True, False
    for match in _TOKEN.finditer(text):
        opening, label, length_text, mark, stray = match.groups()
        if done and match[0].strip():
            at = match.end() - len(match[0].lstrip())
            _refuse(source, text, at, "text after the ';', but the file must hold one tree only")
        if stray or (opening and not expects_node):
            at = match.start(match.lastindex or 0)
            _refuse(source, text, at, f"{_excerpt(text, at)} does not fit here ({_HINT})")
        if done:
            break
        if opening or expects_node:
            node = len(parent)
            parent.append(open_nodes[-1])
            end.append(node + 1)
            length.append(_NOT_GIVEN)
            if opening:
                open_nodes.append(node)
                continue
            if label and (index := wanted.get(_name(label))) is not None:
                if node_of[index] >= 0:
                    _refuse(source, text, match.start(2), f"the tree has more than one tip {_name(label)!r}")
                node_of[index] = node
        if length_text:
            length[node] = _branch_length(length_text, source, text, match)
        expects_node = mark == ","
        if mark == ")":
            node = open_nodes.pop()
            if node < 0:
                _refuse(source, text, match.end() - 1, "a ')' without its '('")
            end[node] = len(parent)
        elif mark == ",":
            if len(open_nodes) == 1:
                _refuse(source, text, match.end() - 1, "a ',' outside all parentheses")
        else:
            if len(open_nodes) > 1:
                _refuse(source, text, match.end(), f"the tree ends while {len(open_nodes) - 1:,} '(' are open")
            done = True
    return _Parsed(
        np.frombuffer(parent, dtype=np.int32),
        np.frombuffer(end, dtype=np.int32),
        np.frombuffer(length, dtype=np.float64),
        node_of,
    )


def _name(label: str) -> str:
    return label[1:-1].replace("''", "'") if label[0] == "'" else label.rstrip()


def _branch_length(length_text: str, source: str, text: str, match: re.Match[str]) -> float:
    try:
        length = float(length_text)
    except ValueError:
        length = math.nan
    if not 0 <= length < math.inf:
        label = match[2].rstrip()
        node = f"node {_name(label)!r}" if label else "the unnamed node that ends here"
        fault = "negative" if length < 0 else "not a finite number"
        what = f"the branch length {length_text!r} of {node} is {fault}; correct the tree (0 or more is needed)"
        _refuse(source, text, match.start(3), what)
    return length


def _refuse(source: str, text: str, at: int, what: str) -> NoReturn:
    line = text.count("\n", 0, at) + 1
    column = at - (text.rfind("\n", 0, at) + 1) + 1
    raise ValueError(f"{source}, line {line:,}, column {column:,}: {what}.")


def _excerpt(text: str, at: int) -> str:
    found = text[at : at + 20].strip()
    return f"{found!r}..." if len(text) > at + 20 else repr(found)


def _shear(tree: _Parsed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep what leads to a requested tip, merge single-child chains; return parent, length, tip."""
    n_nodes = len(tree.parent)
    found = tree.node_of >= 0
    is_wanted = np.zeros(n_nodes, dtype=bool)
    is_wanted[tree.node_of[found]] = True
    wanted_before = np.concatenate([[0], np.cumsum(is_wanted)])
    kept = np.flatnonzero(wanted_before[tree.end] > wanted_before[:-1])  # subtree of a node: node .. end - 1
    n_children = np.bincount(tree.parent[kept[1:]], minlength=n_nodes)[kept]

    # In preorder a single-child node comes right before that child: a chain is a run of kept nodes that ends
    # at a tip or a fork. It becomes one node; the parent of its first node is a fork, so it ends a run too.
    ends_run = n_children != 1
    run = np.cumsum(ends_run) - ends_run
    first_of_run = kept[np.concatenate([[True], ends_run[:-1]])] if len(kept) else kept
    run_of_node = np.full(n_nodes, -1, dtype=np.int32)
    run_of_node[kept] = run
    parent = np.full(len(first_of_run), -1, dtype=np.int32)
    parent[1:] = run_of_node[tree.parent[first_of_run[1:]]]
    length = np.bincount(run, weights=tree.length[kept], minlength=len(parent))
    tip = np.where(found, run_of_node[tree.node_of], np.int32(-1))
    return parent, length, tip


def root_paths(tree: FlatTree) -> tuple[np.ndarray, np.ndarray]:
    """Nodes from each tip to the root, both included.

    Returns
    -------
    offsets, nodes
        int64 [n+1] and int32 [sum]: nodes[offsets[i] : offsets[i + 1]] is the path of tip i, empty where
        the tree has no such tip.
    """
    n_above = _depth(tree.parent) + 1
    found = np.flatnonzero(tree.tip >= 0)
    offsets = np.zeros(len(tree.tip) + 1, dtype=np.int64)
    offsets[found + 1] = n_above[tree.tip[found]]
    np.cumsum(offsets, out=offsets)
    if offsets[-1] > _MAX_PATH_NODES:
        raise ValueError(
            f"The paths of {len(found):,} tips to the root hold {offsets[-1]:,} nodes, above the limit of "
            f"{_MAX_PATH_NODES:,}: the tree is close to a ladder. Give a tree with real branching "
            "(FastTree, SEPP insertion, Greengenes2)."
        )
    nodes = np.empty(offsets[-1], dtype=np.int32)
    at, node = offsets[found], tree.tip[found]
    while len(node):  # one step up for all tips at once
        nodes[at] = node
        node = tree.parent[node]
        below_root = node >= 0
        at, node = at[below_root] + 1, node[below_root]
    return offsets, nodes


def _depth(parent: np.ndarray) -> np.ndarray:
    """Count the edges between each node and the root, by doubling the stride: log2(depth) passes."""
    ancestor = np.maximum(parent, 0)
    depth = (parent >= 0).astype(np.int64)
    while ancestor.any():
        depth += depth[ancestor]
        ancestor = ancestor[ancestor]
    return depth
