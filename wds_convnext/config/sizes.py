"""The schedule of image sizes, as text: 0:128,0.4:160,0.8:224."""

import itertools

import click

# Each is compiled once for training, and torch.compile gives up after 8 shapes.
_MAX_SIZES, _RANGE = 6, (8, 4096)


def size_shares(schedule: str) -> list[tuple[float, int]]:
    """The share of the run's steps from which each image size is used, in [0, 1), and the size.

    Raises:
        ValueError: unless shares rise from 0 and sizes from 8 to 4096.
    """
    parts = [part.partition(":") for part in schedule.split(",")]
    pairs = [(float(share), int(size)) for share, _, size in parts]
    shares, sizes = zip(*pairs)
    rise = all(a < b for row in (shares, sizes) for a, b in itertools.pairwise(row))
    in_range = _RANGE[0] <= sizes[0] and sizes[-1] <= _RANGE[1] and shares[0] == 0
    if not (rise and in_range and shares[-1] < 1 and len(pairs) <= _MAX_SIZES):
        raise ValueError(schedule)
    return pairs


class SizeSchedule(click.ParamType):
    """Image sizes and the shares of the run from which they are used."""

    name = "share:size,..."
    expected = (
        f"share of the run:size for up to {_MAX_SIZES} sizes from {_RANGE[0]} to {_RANGE[1]}, both "
        "rising, the first share 0: 0:128,0.4:160,0.8:224"
    )

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            pairs = size_shares(value)
        except ValueError:
            self.fail(f"{value!r} is no schedule of image sizes", param, ctx)
        return ",".join(f"{repr(share).removesuffix('.0')}:{size}" for share, size in pairs)
