"""How fast the gateway answers with a million timesteps; see bench/gateway.py."""

import sys
from pathlib import Path
from runpy import run_module

if __name__ == "__main__":
    # Python looks beside a script first, and would take this file for the package that is measured.
    sys.path.remove(str(Path(__file__).parent))
    run_module("bench.gateway", run_name="__main__")
