"""A page of HTML gives the text that it shows: each word, apart where the page has them apart."""

import random

import pytest

from vllm_memdec.train.data.documents import documents

BLOCKS = [
    "address", "article", "aside", "blockquote", "center", "dd", "div", "dl", "dt", "fieldset",
    "figcaption", "figure",
    "footer", "h1", "h2", "header", "hr", "li", "main", "nav", "ol", "p", "section", "ul",
]  # fmt: skip


@pytest.fixture
def shown(tmp_path):
    """Return the text of a page."""

    def read(page):
        (tmp_path / "a.html").write_text(page)
        return next(documents(tmp_path / "a.html"), "")

    return read


SHOWN = {
    # A reference is resolved once: addresses and lessons of HTML are full of such names.
    "<p>x?a=1&amp;section=2&amp;copy=3 is &amp;lt;b&amp;gt;": "x?a=1&section=2&copy=3 is &lt;b&gt;",
    "<xmp>a <b> &amp; c</xmp>": "a <b> &amp; c",
    # Spaces are those of the page.
    "<p><span>O</span>nce (<span>a</span>) <b>b</b><i>c</i>": "Once (a) bc",
    "<pre>\n<code>def f():\n    <b>try</b>:  1\n</code></pre>end": "def f():\n    try:  1\nend",
    "<div><div><div>a <!-- c --> b c\n</div></div></div>d": "a b c\nd",
    "a\u3000b\u200bc": "a\u3000b\u200bc",
    # What stands in lines of its own is not joined to its neighbours.
    "<dl><dt>term<dd>what<dt>other<dd>that</dl>": "term\nwhat\nother\nthat",
    "a<hr>b<center>c</center>d<section>e</section>f<br>g": "a\nb\nc\nd\ne\nf\ng",
    "<p>a<br></p>\n<p>b</p>": "a\n\nb",
    "<p>a</p></body></html><html><body><p>b": "a\n\nb",
    # A table is read cell by cell, and not padded.
    "<table><tr><td>a</td><td>b</td></tr> <tr><td>c<td>d</table>e": "a\t\tb\nc\t\td\ne",
    "a<ul><li>b<ul><li>c</ul><li>d</ul>e": "a\n  • b\n    • c\n  • d\ne",
    "<figure><pre><code>a  b</code></pre><figcaption>c</figcaption></figure>d": "a  b\nc\nd",
    "<label>a</label><input value=x><textarea>x</textarea><p>b": "a\n\nb",
    # What a page does not show.
    "a<template>x</template><iframe><b>x</b></iframe><script>x</script><p hidden>x</p>b": "ab",
    "<title>x</title>a<p style='color:red;DISPLAY: none'>x<b>x</b></p><style>x</style>b": "ab",
    "a<!-- x > --><![if !IE]>b<![endif]><!--[if IE]>x<![endif]-->c<?x x?>d<img alt=x>": "abcd",
}  # fmt: skip


@pytest.mark.parametrize("page", SHOWN)
def test_the_text_that_a_page_shows(shown, page):
    assert shown(page) == SHOWN[page]


def test_a_table_is_no_larger_than_its_text(shown):
    """Laid out in columns, each row is as wide as the longest: 40 kB were 10 MB of spaces."""
    rows = "".join(f"<tr><td>row {n}</td><td>x</td></tr>" for n in range(1000))
    page = f"<table><tr><td>{'word ' * 2000}</td><td>y</td></tr>{rows}</table>"
    assert len(shown(page)) < len(page)


def test_no_word_of_a_page_is_lost(shown):
    """Whatever is in whatever, closed or not: its words are there, those of blocks apart."""
    rng = random.Random(0)
    for trial in range(200):
        tags = BLOCKS if trial % 2 else [*BLOCKS, "b", "br", "custom", "table", "td", "th", "tr"]
        opened = [rng.choice(tags) for _ in range(30)]
        starts = [trial % 2 or rng.random() < 0.5 for _ in opened]
        tags = [f"<{'/' * (not start)}{tag}>" for tag, start in zip(opened, starts, strict=True)]
        words = [f"w{n}w" for n in range(30)]
        page = "".join(tag + word for tag, word in zip(tags, words, strict=True))
        text = shown(page)
        assert all(word in text for word in words), page
        if trial % 2:
            assert {word for word in text.split() if "w" in word} == set(words), page
