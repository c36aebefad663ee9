"""What the pages share that colour the tokens of a text: colours, styles, the words of its numbers.

They are those of `memdec explain --html` and of `memdec playground`. Neither asks for anything
outside: their policy forbids it.
"""

BASE_RGB, MEMORY_RGB = (66, 133, 244), (255, 145, 0)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
KEY = '<span class="key"></span>'

STYLE = f"""
:root {{ color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #666; --line: #ddd;
  --raised: #fafafa; --track: #e5e5e5; --mark: #ffe3bf; --said: #ffb454; --alarm: #b3261e;
  --base: rgb{BASE_RGB}; --memory: rgb{MEMORY_RGB}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e6e6; --paper: #16181b; --faint: #9aa0a6;
  --line: #34383d; --raised: #1e2125; --track: #34383d; --mark: #5a3d12; --said: #8a5a10;
  --alarm: #ffb4ab; }} }}
body {{ font: 16px/1.6 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 72rem;
  color: var(--ink); background: var(--paper); }}
h1 {{ margin: 0 0 .5rem; font-size: 1.6rem; }}
.text {{ font: 18px/2.1 ui-monospace, monospace; white-space: break-spaces; margin: 0;
  overflow-wrap: anywhere; }}
.text span {{ border-radius: 3px; padding: 2px 0; }}
.small {{ color: var(--faint); font-size: .85rem; margin: .1rem 0 .8rem; }}
.bar {{ height: 4px; border-radius: 2px; background: var(--track); margin: .25rem 0 .5rem; }}
.bar div {{ height: 100%; border-radius: 2px; background: var(--memory); }}
.key {{ display: inline-block; width: 8rem; height: .8rem; border-radius: 3px;
  background: linear-gradient(90deg, var(--base), var(--memory)); }}
code {{ background: var(--mark); border-radius: 3px; padding: 2px 4px; white-space: pre-wrap; }}
"""


def head(more: str = "") -> str:
    """Return the first lines of a page's head; more: what its policy allows besides."""
    return (
        '<meta charset="utf-8"><meta name="generator" content="memdec">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}{more}">\n'
        '<meta name="viewport" content="width=device-width">'
    )


def shade(share: float, mixture: float) -> str:
    """Return a token's background as CSS has it.

    The colour tells whose probability it was (share: of the memory), its strength how sure the
    mixture is (mixture: the token's probability).
    """
    mixed = zip(BASE_RGB, MEMORY_RGB, strict=True)
    rgb = ", ".join(f"{a + (b - a) * share:.0f}" for a, b in mixed)
    return f"rgba({rgb}, {0.1 + 0.8 * mixture:.2f})"


def percent(probability: float) -> str:
    """Return a probability as the pages print it."""
    return f"{probability:.1%}"


def numbers(base: float, memory: float, mixture: float, decided: str) -> str:
    """Return in words what the three gave to a token, and who decided."""
    p_base, p_memory, p_mixture = map(percent, (base, memory, mixture))
    return f"base {p_base}, memory {p_memory}, mixture {p_mixture}: {decided}"


def visible(text: str) -> str:
    """Return a token with its white space to be seen."""
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
