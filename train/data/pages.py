"""The text that a page of HTML shows, in the order of its elements.

Kept libraries lay it out for a terminal: they pad the cells of a table, so that 40 kB become 10 MB,
indent each `div`, and take time that is quadratic in a paragraph's elements. Here lxml parses, and
what it read is walked once.
"""

import re
from typing import Any

from vllm_memdec.errors import MemdecError

DEEPEST = 2048  # elements within each other that the parser takes
# The tag that ends a page, which more text or another page may follow: the parser stops there.
END_OF_PAGE = re.compile(r"</(?:body|html)(?=[\s/>])[^>]*>", re.IGNORECASE)
SPACES = re.compile(r"[ \t\n\r\f\xa0]+")
HIDDEN_STYLE = re.compile(r"\bdisplay\s*:\s*none", re.IGNORECASE)
PRE_STYLE = re.compile(r"\bwhite-space\s*:\s*(?:pre|break)", re.IGNORECASE)
NOT_SHOWN = frozenset((
    "datalist", "head", "iframe", "noembed", "noframes", "script", "style", "template", "title",
))  # fmt: skip
PRE = frozenset(("listing", "plaintext", "pre", "textarea", "xmp"))
APART = frozenset((  # a blank line before and after
    "blockquote", "dl", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "listing", "p",
    "plaintext", "pre", "xmp",
))  # fmt: skip
BLOCKS = APART | frozenset((
    "address", "article", "aside", "body", "caption", "center", "dd", "details", "dialog",
    "dir", "div", "dt", "fieldset", "figcaption", "footer", "form", "header", "hgroup", "html",
    "legend", "li", "main", "menu", "nav", "ol", "optgroup", "option", "search", "section",
    "select", "summary", "table", "tbody", "tfoot", "thead", "tr", "ul",
))  # fmt: skip
LISTS = frozenset(("dir", "menu", "ol", "ul"))
CELLS = frozenset(("td", "th"))
GAP = "  "  # between cells of a row, and before an item for each list that its list is in


def text_of_page(page: str, where: str) -> str:
    """Return the text that a page shows, to its end; MemdecError if the parser stopped before."""
    from lxml.etree import ErrorLevels, LxmlError, ParserError
    from lxml.html import HTMLParser, document_fromstring

    # By itself the parser stops, without a word, at 256 elements within each other, at 10 MB of
    # text, and at the end tag of the page.
    parser = HTMLParser(encoding="utf-8", huge_tree=True)
    page = END_OF_PAGE.sub("<hr>", page.replace("\r\n", "\n").replace("\r", "\n"))
    try:
        tree = document_fromstring(page.encode(), parser=parser)
    except ParserError:  # it holds nothing but comments
        return ""
    except LxmlError as error:
        raise MemdecError(f"{where} is not HTML ({error}): leave it out.") from None
    if any(error.level == ErrorLevels.FATAL for error in parser.error_log):
        raise MemdecError(
            f"{where} has elements within elements beyond the parser's limit of {DEEPEST:,}, "
            "and its text would be cut there: flatten it, or leave it out."
        )
    return _Text().of(tree)


class _Text:
    """Text that grows by what elements hold."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.lines = 0  # line ends due before what follows
        self.gap = ""  # due between it and what stands in its line
        self.bullet = ""  # due before it
        self.pre = [False]  # of each open element: whether its spaces are shown
        self.counters: list[int | None] = []  # of each open list: the number of its next item

    def of(self, tree: Any) -> str:
        """Return the text of a tree."""
        from lxml.etree import iterwalk

        skipped = None
        walk = iterwalk(tree, events=("start", "end", "comment", "pi"))
        for event, element in walk:
            if event == "start":
                style = element.get("style")
                if _hidden(element, style):
                    walk.skip_subtree()
                    skipped = element
                else:
                    self.start(element, style)
            else:
                if event == "end" and element is not skipped:
                    self.end(element.tag)
                if element is not tree:
                    self.add(element.tail)
        return "".join(self.parts).strip("\n")

    def start(self, element: Any, style: str | None) -> None:
        """Take a start tag and the text that follows it."""
        tag, text = element.tag, element.text
        self.block(tag)
        if tag == "br":
            self.lines += 1
        elif tag == "q":
            self.add('"')
        elif tag in CELLS and not self.lines:
            self.gap = GAP if self.gap in ("", " ") else self.gap + GAP  # an empty cell is one
        elif tag in LISTS:
            self.counters.append(_number(element, "start", 1) if tag == "ol" else None)
        elif tag == "li":
            count = self.counters[-1] if self.counters else None
            if count is not None:
                count = _number(element, "value", count)
                self.counters[-1] = count + 1
            indent = GAP * (len(self.counters) - 1)
            self.bullet = indent + ("* " if count is None else f"{count}. ")
        if tag in PRE:
            text = text and text.removeprefix("\n")
        pre = tag in PRE or bool(style and PRE_STYLE.search(style))
        self.pre.append(pre or self.pre[-1])
        self.add(text)

    def end(self, tag: str) -> None:
        """Take an end tag."""
        self.pre.pop()
        if tag in LISTS:
            self.counters.pop()
        elif tag == "li":
            self.bullet = ""  # of an item without text
        elif tag == "q":
            self.add('"')
        self.block(tag)

    def block(self, tag: str) -> None:
        """Begin a line if a tag does."""
        apart = tag in APART or (tag in LISTS and not self.counters)
        if tag in BLOCKS:
            self.lines = max(self.lines, 1 + apart)

    def add(self, text: str | None) -> None:
        """Add what lies between two tags."""
        if not text:
            return
        pre = self.pre[-1]
        words = text if pre else SPACES.sub(" ", text)
        if not pre:
            if words[0] == " " and not self.lines:
                self.gap = self.gap or " "
            words = words.strip(" ")
            if not words:
                return
        if self.lines:
            last = self.parts[-1] if self.parts else ""
            there = len(last) - len(last.rstrip("\n"))
            self.parts.append("\n" * (self.lines - there) if self.parts else "")
        elif self.parts:
            self.parts.append(self.gap)
        self.parts += [self.bullet, words]
        self.lines, self.bullet = 0, ""
        self.gap = " " if not pre and text[-1:] in " \t\n\r\f\xa0" else ""


def _hidden(element: Any, style: str | None) -> bool:
    return (
        element.tag in NOT_SHOWN
        or element.get("hidden") is not None
        or bool(style and HIDDEN_STYLE.search(style))
    )


def _number(element: Any, name: str, otherwise: int) -> int:
    value = (element.get(name) or "").strip()
    return int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else otherwise
