"""What must not be written down: credentials in addresses, tokens, and values of secret environment variables."""

from __future__ import annotations

import os
import re

ADDRESS = re.compile(
    r"\b([A-Za-z][A-Za-z0-9+.-]+:/{1,2})"  # of two slashes a path keeps one
    r"([^\s/?#'\"<>@:]*:(?!\d+(?:/|$))[^\s'\"<>]*|[^\s/?#'\"<>]*)@"
)
"""An address up to its host, and who asks: a name, or a name and a password, which may hold anything."""
QUERY = re.compile(
    r"([?&;](?:[\w.-]*(?:signature|token(?!s)|password|passwd|secret|credential|api_?key|access_?key)[\w.-]*|sig|pwd)=)"
    r"[^&;#\s'\"]+",
    re.IGNORECASE,
)
"""A part of an address that lets in whoever has it, as in signed links."""
TOKENS = {
    "a token of Hugging Face": r"hf_[A-Za-z0-9]{20,}",
    "an access key of AWS": r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    "a token of GitHub": r"(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a token of GitLab": r"glpat-[A-Za-z0-9_-]{20,}",
    "a token of Slack": r"xox[abprs]-[A-Za-z0-9-]{20,}",
    "an API key": r"sk-[A-Za-z0-9_-]{32,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
"""Forms that nothing else has."""
ANY_TOKEN = re.compile("|".join(f"(?:{pattern})" for pattern in TOKENS.values()))
NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE)
"""Of environment variables whose values are secret."""
SHORTEST = 8
"""Letters of such a value: shorter ones are words that stand elsewhere too."""
LEFT = "..."


def credentials(text: str) -> str:
    """What in a text lets somebody in, in words and without the secret itself; empty if nothing does.

    A user's name alone is none, save where it is a token in that place, as in ``https://TOKEN@host``.
    """
    for scheme, who in ADDRESS.findall(text):
        if ":" in who:
            return "a password in an address"
        if who and scheme.lower().rstrip("/").endswith(("http:", "https:")):
            return "credentials in an address"
    if ":/" in text and QUERY.search(text):
        return "a signature or key in an address"
    return next((what for what, pattern in TOKENS.items() if re.search(pattern, text)), "")


def hidden(text: str) -> str:
    """A text without what lets somebody in; for messages and logs."""
    text = ADDRESS.sub(rf"\1{LEFT}@", text)
    text = ANY_TOKEN.sub(LEFT, QUERY.sub(rf"\1{LEFT}", text))
    for name, value in os.environ.items():
        if (
            len(value) >= SHORTEST and NAMES.search(name) and not os.path.exists(value)
        ):  # some name a file that holds it
            text = text.replace(value, f"<{name}>")
    return text
