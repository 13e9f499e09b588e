"""Colors of the report. Plots are drawn in the light palette; on the page each color becomes a CSS variable.

The hues are those of Okabe and Ito (2008), darkened until text in them has a contrast of 4.5 on white, so that they can
be distinguished with any color vision; status is never shown by color alone.
"""

import re

LIGHT = {
    "paper": "#fdfdfc",
    "ink": "#1b1e24",
    "muted": "#626a78",
    "line": "#d9dce1",
    "panel": "#f4f5f6",
    "accent": "#0a5fb4",
    "second": "#b0480a",
    "third": "#00755a",
    "fourth": "#98417f",
    "good": "#17703a",
    "bad": "#b3261e",
    "unsure": "#7f5a00",
}
DARK = {
    "paper": "#14161a",
    "ink": "#e9ebef",
    "muted": "#9aa3b2",
    "line": "#31353d",
    "panel": "#1d2026",
    "accent": "#6cb2f8",
    "second": "#f39a5f",
    "third": "#4fc9a4",
    "fourth": "#dc92c8",
    "good": "#63c987",
    "bad": "#f2867c",
    "unsure": "#e0b44c",
}
SERIES = ("accent", "second", "third", "fourth")
"""Colors of targets, in the order of the spec."""


def themed(svg: str) -> str:
    """Return a plot's SVG without its prologue, its palette replaced by CSS variables, so it follows the page's
    theme."""
    body = svg[svg.index("<svg") :]
    names = {value: name for name, value in LIGHT.items()}
    return re.sub("|".join(names), lambda hit: f"var(--{names[hit.group()]})", body, flags=re.IGNORECASE)


def _variables(palette: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in palette.items())


CSS = (
    f":root{{{_variables(LIGHT)}color-scheme:light dark}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;
  font-variant-numeric:tabular-nums}
main{max-width:70rem;margin:0 auto;padding:2.2rem 1.5rem 4rem}
.eyebrow{margin:0 0 .7rem;font-size:.8rem;color:var(--muted);display:flex;gap:.8rem;align-items:center;flex-wrap:wrap}
.eyebrow b{color:var(--ink);font-weight:600}
h1{font-size:1.75rem;line-height:1.25;font-weight:640;letter-spacing:-.015em;margin:0;max-width:46rem;text-wrap:balance}
.why{margin:.7rem 0 0;max-width:46rem;color:var(--muted)}
h2{font-size:1.05rem;font-weight:640;margin:2.8rem 0 .2rem;letter-spacing:-.005em}
h2+p{margin:.1rem 0 .9rem;color:var(--muted);max-width:46rem;font-size:.9rem}
.pill{display:inline-flex;align-items:center;gap:.35em;padding:.1em .65em;border-radius:1em;font-size:.8rem;
  font-weight:600;border:1px solid currentColor;white-space:nowrap}
.passed,.pass,.good{color:var(--good)} .rejected,.fail,.missing,.bad{color:var(--bad)}
.inconclusive,.unsure{color:var(--unsure)} .reference,.muted{color:var(--muted)}
.tiles{display:flex;flex-wrap:wrap;gap:1px;margin:1.6rem 0 0;padding:0;
  background:var(--line);border:1px solid var(--line);border-radius:8px;overflow:hidden}
.tiles div{background:var(--paper);padding:.75rem .95rem;flex:1 1 8.6rem}
.tiles dt{font-size:.78rem;color:var(--muted)} .tiles dd{margin:0}
.tiles dd.value{font-size:1.4rem;font-weight:620;letter-spacing:-.01em}
.tiles dd.note{font-size:.78rem;color:var(--muted)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.865rem}
th{text-align:right;font-weight:500;color:var(--muted);padding:.35rem .55rem;border-bottom:1px solid var(--line);
  white-space:nowrap;vertical-align:bottom;font-size:.8rem}
th small,td small{display:block;color:var(--muted);font-size:.76rem;font-weight:400;white-space:nowrap}
td{text-align:right;padding:.5rem .55rem;vertical-align:top;white-space:nowrap}
tbody tr.lead td{border-top:1px solid var(--line)} tbody:first-of-type tr.lead td{border-top:0}
th.text,td.text{text-align:left} td.wrap{white-space:normal;min-width:14rem}
tr.reason td{padding:0 .55rem .55rem;text-align:left;white-space:normal;font-size:.82rem;color:var(--muted)}
tbody.release{background:var(--panel)} tbody.release td:first-child{box-shadow:inset 3px 0 0 var(--good)}
td b{font-weight:600}
code,.mono{font:.84em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
figure{margin:.4rem 0 0} figure svg{width:100%;height:auto;display:block}
.plots{display:grid;grid-template-columns:1fr;gap:.5rem}
details{border-top:1px solid var(--line);margin-top:2.2rem} details+details{margin-top:0}
summary{cursor:pointer;padding:.7rem 0;font-weight:600} details[open]{padding-bottom:1.2rem}
summary span{font-weight:400;color:var(--muted);font-size:.88rem;margin-left:.4rem}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.4rem;margin:0;font-size:.88rem}
dl.facts dt{color:var(--muted)} dl.facts dd{margin:0;overflow-wrap:anywhere}
.alert{border-left:3px solid var(--bad);background:var(--panel);padding:.7rem 1rem;margin:1.4rem 0 0;font-size:.9rem}
.alert p{margin:.2rem 0}
svg.interval{width:104px;height:16px;vertical-align:middle}
@media(max-width:62rem){main{padding:1.4rem 1rem 3rem} .drawn{display:none} table{font-size:.8rem}
  td{padding:.45rem .4rem} th{padding:.35rem .4rem} h1{font-size:1.5rem}}
@media(max-width:50rem){table{font-size:.75rem} th,th small,td small{font-size:.7rem} td,th{padding-inline:.3rem}}
@media print{details{display:block}}
"""
)
