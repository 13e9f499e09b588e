"""`python -m slipstream`, and `torchrun -m slipstream step …`: the command `slipstream`."""

from slipstream.cli import main

main()
