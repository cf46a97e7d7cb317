"""What the pages have in common: colours by day, by night and on paper, tables, and a policy that lets nothing else in.

A page is one HTML file that asks the network for nothing. Its policy allows the style it carries by its digest, so that
nothing that gets into a page (a gene, a file name) could bring a style, a script or an address of its own.
"""

import base64
import hashlib
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --page: #fff; --line: #d5dae1; --dim: #5a6675; --stripe: #f5f7f9;
  --good: #d8efdd; --warn: #fff4d6; --bad: #f9dfdc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --page: #14181e; --line: #38414d; --dim: #9aa6b4;
  --stripe: #1b2129; --good: #1d4129; --warn: #40360f; --bad: #512825; } }
@media print { :root { color-scheme: light; --ink: #000; --page: #fff; --line: #999; --dim: #444; --stripe: #f3f3f3;
  --good: #d8efdd; --warn: #fff4d6; --bad: #f9dfdc; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1650px; margin: 0 auto; padding: 1rem 1.25rem 3rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { max-width: 75ch; margin: .5rem 0; }
a { color: inherit; }
.warn { background: var(--warn); padding: .4rem .7rem; border-radius: 4px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; max-width: max-content; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
.text { text-align: left; }
@media print { .scroll { overflow: visible; border: 0; } tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def document(title: str, body: str, *, style: str = "", script: str = "", images: str = "") -> str:
    """A whole page.

    Parameters
    ----------
    title
        Plain text; it is escaped here.
    body
        HTML of what stands in ``<main>``, every name in it escaped.
    style, script
        What this page has beside the common style.
    images
        Sources of pictures that the policy allows, such as ``"data:"``; none where empty.
    """
    style = _STYLE + style
    policy = f"default-src 'none'; style-src {_digest(style)}; "
    policy += f"script-src {_digest(script)}; " if script else ""
    policy += f"img-src {images}; " if images else ""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}base-uri 'none'; form-action 'none'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style>\n</head>\n<body>\n<main>",
            body,
            "</main>",
            *([f"<script>{script}</script>"] if script else []),
            "</body>\n</html>\n",
        ]
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
