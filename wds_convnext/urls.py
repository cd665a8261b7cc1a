"""URLs of remote shards: taken apart, put together, and kept free of secrets."""

import re

from wds_convnext.errors import UsageError

# A Windows drive is no scheme, and a scheme of one letter is none that is in use.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_SECRETS = re.compile(r"(?<=://)[^/\s,]*@|[?#][^\s,]*")


def scheme_of(text: str) -> str | None:
    """The scheme of a URL, in lower case; None for a path."""
    match = _URL.match(text)
    return match[1].lower() if match else None


def is_remote(text: str) -> bool:
    """Whether this is the URL of something that is not a local file."""
    return scheme_of(text) not in (None, "file")


def names_remote(spec: str | None) -> bool:
    """Whether there is a URL in a comma list of paths and patterns."""
    return spec is not None and any(is_remote(part.strip()) for part in spec.split(","))


def redacted(text: str) -> str:
    """A text, perhaps of several URLs, without what may be secret in them."""
    if "://" not in text:
        return text
    return ",".join(_SECRETS.sub("", part) if is_remote(part) else part for part in text.split(","))


def check_url(url: str) -> str:
    """A URL that may be stored and shown.

    Raises:
        UsageError: if it holds credentials, or a query, where signatures stand.
    """
    # A glob's question mark is followed by the rest of a name, a query by name=value.
    rest = url.split("://", 1)[1]
    has_query = re.search(r"\?[^/]*=", rest) or "#" in rest
    if has_query or "@" in rest.split("/")[0]:
        raise UsageError(
            f"{redacted(url)}: it holds credentials or a query, which would be stored with the "
            "run. Leave them out, and give credentials in the environment (see docs/remote.md)."
        )
    if re.search(r"(^|/)\.\.?(/|$)", rest) or "\\" in rest or not rest.isprintable():
        raise UsageError(f"{redacted(url)}: not a plain URL. Write it without . and .. in it.")
    return url


def parent(url: str) -> str:
    """The folder of what a URL names, without the last slash."""
    return url.rstrip("/").rpartition("/")[0]


def name_in(url: str) -> str:
    """The last part of a URL."""
    return url.rstrip("/").rpartition("/")[2]


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def refuse_remote(spec: str, *, what: str) -> None:
    """Raise UsageError if a spec names a URL, where that is not possible: `what` says why."""
    if names_remote(spec):
        raise UsageError(f"{redacted(spec)}: {what}. Do it with a local copy.")
