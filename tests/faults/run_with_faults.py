"""The training command under torchrun, with the faults that the environment names."""

import json
import os
import sys

from tests.faults import faults
from train.main import main

if __name__ == "__main__":
    for name, arguments in json.loads(os.environ["FAULTS"]):
        getattr(faults, name)(int(os.environ["RANK"]), **arguments)
    sys.exit(main(sys.argv[1:]))
