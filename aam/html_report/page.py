"""HTML that is safe by default: what is not `Html` already is escaped, wherever it is put in."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aam.html_report.style import CSS


class Html(str):
    """Text that is HTML, and goes into a page as it is."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page, with a heading and an entry in its contents."""

    id: str
    title: str
    content: Html


def element(name: str, *children: str | None, **attributes: str) -> Html:
    """An element.

    Parameters
    ----------
    name : str
        Of the tag.
    *children : str or None
        What is not `Html` is escaped; None is left out.
    **attributes : str
        `class_` stands for class, `aria_label` for aria-label.
    """
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Iterable[str | None]) -> Html:
    """Children one after the other, escaped where they are not `Html`."""
    present = (child for child in children if child is not None)
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in present))


def paragraph(*children: str) -> Html:
    """A paragraph."""
    return element("p", *children)


def bullets(items: Iterable[str]) -> Html:
    """A list; nothing where there are no items."""
    shown = [element("li", item) for item in items]
    return element("ul", *shown) if shown else Html("")


def folded(summary: str, *children: str) -> Html:
    """What is shown when its summary is clicked."""
    return element("details", element("summary", summary), *children)


def figure(picture: Html, caption: str) -> Html:
    """A picture and what it shows."""
    return element("figure", picture, element("figcaption", caption))


def grid(*children: str, class_: str = "grid") -> Html:
    """Things beside each other, where there is room for them."""
    return element("div", *children, class_=class_)


def tiles(values: Iterable[tuple[str, str]]) -> Html:
    """Names and numbers that stand out."""
    shown = [element("div", element("dt", name), element("dd", value)) for name, value in values]
    return element("dl", *shown, class_="tiles")


def facts(values: Iterable[tuple[str, str]]) -> Html:
    """Names and values in little room."""
    shown = [element("div", element("dt", name), element("dd", value)) for name, value in values]
    return element("dl", *shown, class_="facts")


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table, which scrolls where the page is narrow; the first cell of a row names it."""
    head = element("tr", *(element("th", name, scope="col") for name in header))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    # A part that scrolls must be reached by the keyboard too.
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """A whole page that needs nothing but itself."""
    contents = [element("li", element("a", section.title, href=f"#{section.id}")) for section in sections]
    body = [element("section", element("h2", section.title), section.content, id=section.id) for section in sections]
    head = join(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            # An empty icon: else a browser asks for one.
            Html('<link rel="icon" href="data:,">'),
            element("title", title),
            element("style", Html(CSS)),
        ]
    )
    header = element("header", element("h1", title), element("p", subtitle, class_="subtitle"))
    nav = element("nav", element("ul", *contents), aria_label="Contents")
    return (
        "<!DOCTYPE html>\n"
        + element("html", element("head", head), element("body", header, nav, element("main", *body)), lang="en")
        + "\n"
    )
