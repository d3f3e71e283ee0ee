"""The training command under torchrun, with the faults that the environment names."""

import json
import os
import sys

from tests.faults import faults
from train.main import main
from train.parallel.runtime import end_process

if __name__ == "__main__":
    for name, arguments in json.loads(os.environ["FAULTS"]):
        getattr(faults, name)(int(os.environ["RANK"]), **arguments)
    end_process(lambda: main(sys.argv[1:]))
