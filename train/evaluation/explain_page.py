"""The page of `memdec explain --html`: the text as a heat map, each token's numbers and sources.

It is one file that asks for nothing outside. All text in it is escaped here; its script only shows
and hides what is there.
"""

import html
from pathlib import Path

from vllm_memdec.checkpoint import json_text
from vllm_memdec.train.evaluation.explain import (
    Explanation,
    Source,
    Token,
    report,
    weight_of,
)
from vllm_memdec.train.evaluation.token_page import (
    KEY,
    STYLE,
    head,
    numbers,
    percent,
    shade,
    visible,
)

PAGE = """<!doctype html>
<html lang="en"><head>{head}
<title>memdec explain</title>
<style>{style}
.written {{ border-bottom: 2px solid var(--ink); }}
.sourced {{ cursor: pointer; }}
.sourced:hover, .sourced:focus-visible, .sourced.on {{ outline: 2px solid var(--ink);
  outline-offset: 1px; }}
.columns {{ display: flex; gap: 2rem; align-items: flex-start; margin: 1.5rem 0; }}
.columns > .text {{ flex: 1 1 24rem; }}
aside {{ flex: 1 1 24rem; position: sticky; top: 1rem; border: 1px solid var(--line);
  border-radius: 8px; padding: 1rem 1.25rem; background: var(--raised);
  max-height: calc(100vh - 4rem); overflow: auto; }}
aside h2 {{ margin: 0; font-size: 1.1rem; }}
aside ol {{ list-style: none; margin: 0; padding: 0; }}
aside li {{ border-top: 1px solid var(--line); padding: .7rem 0 .3rem; }}
.document {{ display: flex; justify-content: space-between; gap: 1rem; font-weight: 600; }}
.other .bar div {{ background: #aaa; }}
blockquote {{ margin: 0; font: 14px/1.6 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; color: var(--faint); }}
mark {{ background: var(--mark); color: var(--ink); padding: 1px 0; }}
mark.said {{ background: var(--said); font-weight: 700; }}
b.said {{ color: var(--ink); border-bottom: 2px dotted #888; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin-top: 1.5rem; }}
td, th {{ padding: .1rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }}
td:first-child, td:nth-child(n+6), th:first-child, th:nth-child(n+6) {{ text-align: left; }}
td:first-child, td:nth-child(7), td:nth-child(8) {{ font-family: ui-monospace, monospace; }}
@media (max-width: 50rem) {{ .columns {{ display: block; }} aside {{ margin-top: 1rem; }} }}
</style></head><body>
<h1>Who said that?</h1>
<p>base <b>{base}</b>, memory <b>{memory}</b>, alpha {alpha}. Colour: whose probability it was,
from the base {key} to the memory; the stronger, the surer the mixture.
Underlined tokens were written by the mixture. Point at a token for its numbers{hint}.</p>
{body}
<div class="wide"><table><tr><th>token</th><th>alpha</th><th>P(base)</th><th>P(memory)</th>
<th>P(mixture)</th><th>decided</th><th>base says</th><th>memory says</th>{column}</tr>
{rows}
</table></div>
<script type="application/json" id="figures">{figures}</script>
{script}</body></html>
"""

SCRIPT = """<script>
const shown = document.querySelectorAll("aside section");
const tokens = document.querySelectorAll(".sourced");
let kept = null;
function show(token) {
  for (const part of shown) part.hidden = part.id !== (token ? token.dataset.of : "hint");
  for (const each of tokens) each.classList.toggle("on", each === token);
}
for (const token of tokens) {
  token.addEventListener("mouseenter", () => show(token));
  token.addEventListener("mouseleave", () => kept && show(kept));
  token.addEventListener("focus", () => show(kept = token));
  token.addEventListener("click", () => show(kept = token));
}
</script>
"""

HINT = """<section id="hint"><h2>Where it comes from</h2>
<p>Point at a token that the memory decided, or click to keep it: here are the documents
of {build} whose keys are nearest to its context.</p></section>"""


def page(explanation: Explanation) -> str:
    """Return one self-contained HTML page: the text as a heat map, sources, and the table."""
    spans, rows, sections = [html.escape(explanation.first)], [], []
    for n, token in enumerate(explanation.tokens):
        given = token.base, token.memory, token.mixture
        words, percents = numbers(*given, token.decided), map(percent, given)
        spans.append(_span(token, f"of-{n}", words))
        cells = [visible(token.text), f"{token.alpha:.2f}", *percents, token.decided]
        cells += [visible(token.base_says), visible(token.memory_says)]
        if explanation.build is not None:
            cells.append("; ".join(f"{s.title} ({s.percent})" for s in token.sources[:1]))
        rows.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
        if token.sources:
            sections.append(_section(token, f"of-{n}", words))
    body, sourced = f'<p class="text">{"".join(spans)}</p>', explanation.build is not None
    if sourced:
        hint = HINT.format(build=html.escape(Path(explanation.build or "").name))
        body = f'<div class="columns">{body}\n<aside>{hint}{"".join(sections)}</aside></div>'
    return PAGE.format(
        head=head(),
        style=STYLE,
        key=KEY,
        base=html.escape(Path(explanation.base).name),
        memory=html.escape(explanation.memory),
        alpha=weight_of(explanation),
        hint=", at one that the memory decided for its sources, too" if sourced else "",
        body=body,
        column="<th>first source</th>" if sourced else "",
        rows="\n".join(rows),
        figures=json_text(report(explanation)).replace("<", "\\u003c"),
        script=SCRIPT if sourced else "",
    )


def _span(token: Token, name: str, words: str) -> str:
    """Return a token of the heat map; name: of the section that has its sources."""
    kinds = ["written" if token.written else "given", *["sourced"][: len(token.sources)]]
    to_show = f' data-of="{name}" tabindex="0" role="button"' if token.sources else ""
    return (
        f'<span class="{" ".join(kinds)}" title="{words}"{to_show} '
        f'style="background: {shade(token.share, token.mixture)}">'
        f"{html.escape(token.text)}</span>"
    )


def _section(token: Token, name: str, words: str) -> str:
    """Return what is shown beside the text of a token: its numbers and its sources."""
    items = "".join(_item(source) for source in token.sources)
    text = html.escape(visible(token.text))
    return (
        f'<section id="{name}" hidden><h2>Where <code>{text}</code> comes from</h2>'
        f'<p class="small">{words}</p><ol>{items}</ol></section>'
    )


def _item(source: Source) -> str:
    """Return a source: its document, its share, and its passage."""
    before, after = "" if source.begins else "… ", "" if source.ends else " …"
    passage = []
    for span in source.passage:
        tag = "mark" if span.shared else "b"
        kind = ' class="said"' if span.said else ""
        marked = span.shared or span.said
        text = html.escape(span.text)
        passage.append(f"<{tag}{kind}>{text}</{tag}>" if marked else text)
    note = "" if source.agrees else '<p class="small">Its keys say another token.</p>'
    return (
        f'<li class="{"same" if source.agrees else "other"}">'
        f'<div class="document"><span>{html.escape(source.title)}</span>'
        f"<span>{html.escape(source.percent)}</span></div>"
        f'<div class="bar"><div style="width: {source.weight:.0%}"></div></div>'
        f"{note}<blockquote>{before}{''.join(passage)}{after}</blockquote></li>"
    )
