"""``python -m dtrain.azureml [OPTIONS] SCRIPT|-m MODULE [ARGS]...``: what ``dtrain azureml`` does, too."""

import argparse
import sys

from dtrain.azureml.console import warn
from dtrain.azureml.script import run_script
from dtrain.errors import DtrainError

parser = argparse.ArgumentParser(prog="python -m dtrain.azureml", description="Run a control script with dtrain's azureml.")
parser.add_argument("--force", action="store_true", help="use dtrain's azureml although the real one is installed")
parser.add_argument("--any-version", action="store_true", help="packages of another version than asked for only warn")
parser.add_argument("--no-install", action="store_true", help="packages that are missing are an error, and nothing is installed")
parser.add_argument("--secret", dest="secrets", action="append", default=[], metavar="NAME", help="variable that nothing shows")
parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module's name")
parser.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT [ARGS]...")
given = parser.parse_args()
if not given.command:
    parser.error("name the script to run")
try:
    run_script(**vars(given))
except DtrainError as error:  # as `dtrain azureml` does; what the script itself raises does not come here
    warn(str(error))
    sys.exit(error.exit_code)
