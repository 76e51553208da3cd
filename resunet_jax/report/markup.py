"""Text for HTML: escaped strings, numbers, data as JSON, and a page whose own script and style alone may run."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

DISCLAIMER = "A research tool, not a medical device. Not for diagnosis or treatment."
DASH = "–"
_SAFE = str.maketrans("&<>", ",.:")


def number(value: object, digits: int = 0, unit: str = "") -> str:
    """A number with so many decimals and its unit; a dash for None, NaN and what is no number.

    A small one that would round to 0 has as many decimals as show its first digit, up to six.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return DASH
    if value and abs(value) <= 0.5 * 10**-digits:
        digits = min(6, -math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", "\N{MINUS SIGN}")
    return f"{text}\N{NO-BREAK SPACE}{unit}" if unit else text


def json_block(value: object) -> str:
    """JSON to stand inside `<script type="application/json">`.

    Raises:
      ValueError: a number is not finite.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def to_base85(data: bytes) -> str:
    """Bytes as text that JSON and HTML leave as it is: RFC 1924, with & < > replaced; a tenth shorter than base64."""
    return base64.b85encode(data).decode().translate(_SAFE)


def table_row(cells: Sequence[str]) -> str:
    """A row of a table: a header, then values; the cells are HTML."""
    values = "".join(f"<td>{cell}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{cells[0]}</th>{values}</tr>'


def items(texts: Sequence[object]) -> str:
    """A list of escaped texts."""
    return "".join(f"<li>{escape(str(text))}</li>" for text in texts)


def fill_page(template: str, /, style: str = "", **parts: str) -> str:
    """The page `<template>.html` with its script, the common style and `style`; `parts` are the HTML of its `$part`."""
    css = _asset("style.css") + style
    script = _asset(f"{template}.js")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(css)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    values: dict[str, Any] = {**parts, "policy": policy, "style": css, "script": script, "disclaimer": DISCLAIMER}
    return Template(_asset(f"{template}.html")).substitute(values)


def _asset(name: str) -> str:
    return files("resunet_jax.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
