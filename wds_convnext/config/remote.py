"""The options of every command that may read remote shards."""

from dataclasses import dataclass

from wds_convnext.config.fields import ByteSize, Config, FiniteRange, option

REMOTE = "Remote shards"  # the heading of these options, which stands after the command's own


@dataclass(frozen=True)
class RemoteConfig(Config):
    """How shards of s3, gs, az, hf and http(s) are read: through a cache of whole shards."""

    cache_dir: str | None = option(
        None,
        "Folder of the cache. Default: wds_convnext/remote in $XDG_CACHE_HOME or ~/.cache.",
        group=REMOTE,
        is_output=True,
    )
    cache_size: int | None = option(
        None,
        "Bytes that the cache may take: 50GB. Default: three quarters of what is free there.",
        group=REMOTE,
        type=ByteSize(),
    )
    remote_timeout: float = option(
        600.0,
        "Seconds without progress after which an object is given up; until then it is asked for "
        "again.",
        group=REMOTE,
        type=FiniteRange(0.1, 86400),
    )
