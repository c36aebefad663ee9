"""Reads the page of `memdec explain`: its text, its cells, and whatever would be fetched."""

from html.parser import HTMLParser


class Reading(HTMLParser):
    """Collects the text of the heat map, the cells, the passages, and what would be fetched."""

    def __init__(self):
        super().__init__()
        self.inside, self.text, self.cells, self.quotes, self.fetched = [], "", [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta",):
            self.inside.append((tag, dict(attributes).get("class")))
        if tag == "blockquote":
            self.quotes.append("")
        self.fetched += [v for k, v in attributes if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag

    def handle_data(self, data):
        if ("p", "text") in self.inside:
            self.text += data
        if ("blockquote", None) in self.inside:
            self.quotes[-1] += data
        if self.inside and self.inside[-1][0] == "td":
            self.cells.append(data)
