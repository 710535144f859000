"""python -m scripts.plan KEY=VALUE ... [gpus=8] [device=h200] [memory=80GiB] [search=false]

Plans a step of a run before there is a machine for it. Takes the overrides of the run and takes a
step of its loop, its model, its engine and its drivers without numbers, as one of so many ranks.
Prints the memory of the fullest rank by kind, what it sends by kind of move and by link, FLOPs, the
seconds of a step and what most of them are for, the largest context that fits, and the settings
that would help most.

gpus=N is the number of ranks: parallel.context=N, unless parallel.context or parallel.data is
given. device= is one of a100, h100, h200, b200, cpu, or a yaml file that scripts.calibrate wrote.
memory= is that of one rank, in KiB, MiB, GiB, KB, MB or GB; the device's by default. search=false
leaves out the largest context and the settings. Exit status 2 for what is refused.
"""

from trainer.entry import run_command
from trainer.planning.command import plan_command

if __name__ == "__main__":
    run_command(plan_command, __doc__)
