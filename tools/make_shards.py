"""Convert a source of images to tar shards: `wds-convnext shards`, from a checkout."""

import sys

from wds_convnext.cli import main

if __name__ == "__main__":
    main(["shards", *sys.argv[1:]])
