"""The page at `/`, and the reference at `/docs`: each one file, without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse, Response

_PAGE = Path(__file__).with_name("page.html")

_INT64_MAX = 2**63 - 1

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto;
  padding: 0 1rem; }
h2 { margin: 2.2rem 0 .2rem; font-size: 1.05rem; }
code, .method { font-family: ui-monospace, monospace; font-size: .9em; }
.method { font-weight: 700; margin-right: .5rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-size: .9rem; }
td { border-top: 1px solid #8884; padding: .25rem .6rem .25rem 0; vertical-align: top; }
td:first-child { width: 34%; overflow-wrap: anywhere; }
td:nth-child(2) { width: 34%; }
.soft { opacity: .7; }
"""


def chat_page() -> Response:
    """Returns the page with load and chat."""
    return _page(_PAGE.read_text(encoding="utf-8"))


def reference_page(schema: Mapping[str, Any]) -> Response:
    """Returns a page that tells of every route of an OpenAPI schema."""
    routes = "".join(
        _route(method, path, said, schema)
        for path, methods in schema["paths"].items()
        for method, said in methods.items()
    )
    title = html.escape(f"{schema['info']['title']} {schema['info']['version']}")
    return _page(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>"
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style><h1>{title}</h1>'
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{routes}</html>"
    )


def _route(method: str, path: str, said: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    content = said.get("requestBody", {}).get("content", {})
    reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
    name = reference.rpartition("/")[2]
    fields = schema["components"]["schemas"][name] if name else {}
    rows = "".join(
        f"<tr><td><code>{html.escape(field)}</code>"
        f"{' <b>required</b>' if field in fields.get('required', ()) else ''}</td>"
        f"<td>{html.escape(_kind(kind))}</td>"
        f'<td class="soft">{html.escape(_described(kind))}</td></tr>'
        for field, kind in fields.get("properties", {}).items()
    )
    table = f"<table>{rows}</table>" if rows else ""
    return (
        f'<h2><span class="method">{method.upper()}</span><code>{html.escape(path)}</code></h2>'
        f'<div class="soft">{html.escape(said.get("summary", ""))}</div>{table}'
    )


def _kind(schema: Mapping[str, Any]) -> str:
    """Returns the type of a field, in words."""
    if "anyOf" in schema:
        return " or ".join(_kind(part) for part in schema["anyOf"])
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    kind = str(schema.get("type", "any"))
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if high == _INT64_MAX:
        return "int64"
    if low is not None:
        kind += f" from {low}" if high is None else f" {low} to {high}"
    if kind == "array" and "items" in schema:
        kind += f" of {_kind(schema['items'])}"
    return kind


def _described(schema: Mapping[str, Any]) -> str:
    parts = [schema, *schema.get("anyOf", ())]
    return next((part["description"] for part in parts if "description" in part), "")


def _page(text: str) -> Response:
    """Returns a page that may run and load only what it holds itself."""
    return HTMLResponse(text, headers={"content-security-policy": _policy(text), **_HEADERS})


_HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


@cache
def _policy(text: str) -> str:
    """Returns the content security policy of a page, with the hashes of its scripts and styles."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(text, 'script')}",
            f"style-src {_hashes(text, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hashes(text: str, tag: str) -> str:
    """Returns the sources of a kind that may run: the hash of each that the page holds."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in found)
    return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests) or "'none'"
