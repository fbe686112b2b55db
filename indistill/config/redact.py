"""Leave secrets out of what is shown or kept: the query of a URL, which signs it, and a name and password."""

from __future__ import annotations

import re

HIDDEN = "REDACTED"
_PUNCTUATION = ":;,.!)]"
_URL = re.compile(
    # Nothing that takes quadratic time: a scheme is short, and a query ends with its characters.
    r"""(?P<scheme>[a-z][a-z0-9+.-]{0,30}://)
        (?P<user>[^\s/?\#'"<>`]*@)?
        (?P<path>[^\s?'"<>`]*)
        (?P<query>\?[^\s'"<>`]*)?
        """,
    re.IGNORECASE | re.VERBOSE,
)


def redacted(text: str) -> str:
    """Return a text with `?REDACTED` and `REDACTED@` in its URLs instead of queries, names and passwords."""
    return _URL.sub(_redact, text) if "://" in text else text


def _redact(match: re.Match[str]) -> str:
    user = f"{HIDDEN}@" if match["user"] else ""
    query = match["query"] or ""
    if query:  # the punctuation of the sentence stays
        query = f"?{HIDDEN}{query[len(query.rstrip(_PUNCTUATION)) :]}"
    return f"{match['scheme']}{user}{match['path']}{query}"


def is_redacted(url: str) -> bool:
    """Whether a URL lacks what `redacted` has left out."""
    return "://" in url and (f"?{HIDDEN}" in url or f"{HIDDEN}@" in url)
