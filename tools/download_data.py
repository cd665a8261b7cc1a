"""Download timm/mini-imagenet (7 GB) with the Hugging Face client; resumes where it stopped."""

import sys

import click
from huggingface_hub import snapshot_download


@click.command()
@click.option("--repo", default="timm/mini-imagenet", show_default=True)
@click.option("--out", default="mini-imagenet", show_default=True, help="Folder to download to.")
def main(repo: str, out: str) -> None:
    """Download a dataset repository of the Hugging Face hub."""
    try:
        snapshot_download(repo, repo_type="dataset", local_dir=out)
    except Exception as error:  # the client passes on whatever its HTTP library raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        click.echo(
            f"{repo}: cannot be downloaded ({reason}). Check the network and run make data again, "
            "it goes on where it stopped; or try make demo, which needs none.",
            err=True,
        )
        sys.exit(2)
    click.echo(f"{repo} is in {out}. Next: make shards")


if __name__ == "__main__":
    main()
