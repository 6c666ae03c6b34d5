"""``python -m dtrain``: the command, of this very Python."""

from dtrain.cli import main

main(prog_name="dtrain")
