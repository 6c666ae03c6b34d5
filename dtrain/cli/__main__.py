"""``python -m dtrain.cli``: the command, of this very Python."""

from dtrain.cli import main

main()
