"""python -m scripts.calibrate [out=machine.yaml] [seconds=1]: the table of this machine for plans.

Measures FLOP/s of matrix products and attention by dtype, the bandwidth of memory, and that of the
link between two ranks here, and writes a yaml file for `python -m scripts.plan device=FILE`. Each
is measured for so many seconds, and the median of its calls counts. Across machines it takes a
tenth of the link within: two machines are not at hand.
"""

from trainer.entry import run_command
from trainer.planning.calibration import calibrate_command

if __name__ == "__main__":
    run_command(calibrate_command, __doc__)
