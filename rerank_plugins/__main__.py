"""``python -m rerank_plugins``: the same as the command `rerank-plugins`."""

from rerank_plugins.cli import main

if __name__ == "__main__":
    main()
