"""What `aws configure` has written: keys, region and endpoint, which obstore does not read."""

import configparser
import os
from pathlib import Path

from wds_convnext.errors import UsageError

_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


def aws_profile() -> dict[str, str]:
    """Options for obstore, of the profile that AWS_PROFILE names, else of `default`.

    Keys in the environment come first, and so do AWS_REGION and AWS_ENDPOINT_URL.

    Raises:
        UsageError: if AWS_PROFILE names none, or one without keys (single sign-on, roles).
    """
    named = os.environ.get("AWS_PROFILE")
    name = named or "default"
    section = dict[str, str]()
    for variable, file, title in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.environ.get(variable) or Path.home() / ".aws" / file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise UsageError(f"~/.aws/{file}: cannot be read ({type(error).__name__}).") from None
        if parser.has_section(title):
            section |= parser[title]
    found = dict[str, str]()
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        if named and not all(section.get(key) for key in _KEYS[:2]):
            raise UsageError(
                f"AWS_PROFILE={named}: no keys of it in ~/.aws. Of single sign-on and roles get "
                'some first: eval "$(aws configure export-credentials --format env)".'
            )
        found |= {key: section[key] for key in _KEYS if section.get(key)}
    if not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys() and "region" in section:
        found["aws_region"] = section["region"]
    if not {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"} & os.environ.keys():
        endpoint = section.get("endpoint_url")
        found |= {"aws_endpoint": endpoint} if endpoint else {}
    return found
