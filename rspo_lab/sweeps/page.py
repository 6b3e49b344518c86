"""The parts of a self-contained HTML page: its style, tables, pictures with their captions."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; color: #222; background: #fff }
img { max-width: min(100%, 56rem); height: auto }
figcaption { color: #555 }
figure { margin: 1.5rem 0 }
nav { columns: 2; margin: 1rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0; font-size: .8rem }
td, th { padding: .15rem .4rem; text-align: right; border-bottom: 1px solid #ddd;
         vertical-align: top }
td { white-space: nowrap }
td.text { white-space: normal }
td:first-child, th:first-child, td.text, .text th { text-align: left }
.failed { color: #b00020 }
section { break-inside: avoid-page }
@media print {
  body { font-size: 10pt; max-width: none; margin: 0 }
  table { font-size: 7pt }
  td, th { padding: .1rem .2rem; white-space: normal }
  .wide { overflow: visible }
  figure, table { break-inside: avoid }
  a { color: inherit; text-decoration: none }
}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page that needs no other file."""
    title = html.escape(title)
    head = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        "<meta name=viewport content='width=device-width'><link rel=icon href='data:,'>"
    )
    body = "\n".join([f"<style>{STYLE}</style><h1>{title}</h1>", *parts])
    return f"{head}{body}</html>\n"


def table(frame: pd.DataFrame) -> str:
    """A table of numbers that scrolls sideways where it is too wide."""
    return f"<div class=wide>{frame.to_html(index=False, border=0)}</div>"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of sentences, which wrap; its cells are plain text."""
    names = "".join(f"<th>{name}" for name in head)
    lines = "".join(
        "<tr>" + "".join(f"<td class=text>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<div class='wide text'><table><tr>{names}</tr>{lines}</table></div>"


def figure(image: Path, caption: str) -> str:
    """A PNG with its caption, held in the page itself."""
    caption = html.escape(caption)
    data = base64.b64encode(image.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
