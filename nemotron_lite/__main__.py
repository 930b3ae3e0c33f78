"""`python -m nemotron_lite`: the same commands as `nemotron-lite`."""

from nemotron_lite.cli import app

if __name__ == "__main__":
    app()
