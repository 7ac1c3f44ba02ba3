"""The frame of a page: one file that asks for nothing else, in the reader's colours and at any width."""

from html import escape

from hdc.report.html import Html, element, joined

# Blue, orange and green are told apart by most colour-blind readers; tasks differ by their dashes besides.
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --panel: #f6f8fa; --good: #1a7f37; --bad: #cf222e; --blue: #0072b2; --orange: #d55e00; --green: #007a5a;
  --on-blue: #fff; --on-orange: #1f2328; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --panel: #151b23;
    --good: #3fb950; --bad: #f85149; --blue: #56b4e9; --orange: #e69f00; --green: #3ecf9a;
    --on-blue: #0d1117; --on-orange: #0d1117; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 1rem clamp(.75rem, 3vw, 2.5rem) 3rem;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: .5rem 0 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 1.4rem 0 .4rem; font-size: 1.05rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; max-width: 75ch; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1em; margin-top: .6rem; }
nav a { color: var(--blue); }
.soft, caption { color: var(--soft); font-size: .9rem; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; }
.wide { overflow-x: auto; max-width: 100%; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; font-weight: normal;
  border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; vertical-align: bottom; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; padding: .3rem 0; }
figure { margin: 0; }
svg { display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); }
.panel { padding: .6rem; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
.panel > svg { width: 100%; height: auto; }
.key { display: inline-block; margin-left: .8em; color: var(--soft); font-size: .85rem; white-space: nowrap; }
.key svg { display: inline-block; vertical-align: middle; }
text.y { text-anchor: end; }
text.x { text-anchor: middle; }
.rule { stroke: var(--line); }
.line { fill: none; stroke: var(--blue); stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.line.block3 { stroke: var(--green); }
.line.block4 { stroke: var(--orange); }
.line.temporal { stroke-dasharray: 5 3.5; }
.hover { fill: var(--ink); fill-opacity: 0; }
.hover:hover { fill-opacity: .12; }
.confusion { max-width: none; }
.confusion text { font-size: inherit; }
.confusion .empty { fill: var(--panel); stroke: var(--line); }
.confusion .right { fill: var(--blue); }
.confusion .wrong { fill: var(--orange); }
.confusion .count { fill: var(--ink); text-anchor: middle; pointer-events: none; }
.confusion .on-right { fill: var(--on-blue); font-weight: 600; }
.confusion .on-wrong { fill: var(--on-orange); font-weight: 600; }
.grid th, .grid td { padding: .3rem .4rem; border: 0; }
.grid tbody th { position: sticky; left: 0; background: var(--paper); }
.clip { width: 136px; }
.clip video, .clip p { display: block; width: 136px; height: 102px; margin: 0; object-fit: contain;
  background: var(--panel); border: 3px solid var(--line); border-radius: 4px; font-size: .75rem; overflow: hidden; }
.clip figcaption { font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere; }
.hit video, .hit p { border-color: var(--good); }
.miss video, .miss p { border-color: var(--bad); }
.hit figcaption { color: var(--good); }
.hit figcaption span { text-decoration: underline; }
.miss figcaption { color: var(--bad); }
"""

# Clips stop at a click, and do not start by themselves for readers who asked for less motion.
SCRIPT = """
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
for (const clip of document.querySelectorAll("video")) {
  if (still) clip.pause();
  clip.onclick = () => clip.paused ? clip.play() : clip.pause();
}
"""

# Nothing is ever fetched, whatever a name on the page may say.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; media-src data:"
)


def page(title: str, *content: Html) -> str:
    """The whole file."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{joined([element('h1', title), *content])}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
