"""Random interruptions of real commands: `python -m tests.kill --kills=50`.

A command is killed, told to stop, or halted for a while, at moments drawn over all that it does, and started again
until it finishes. What it leaves has to equal what one that nobody disturbed leaves, bit for bit.
"""
