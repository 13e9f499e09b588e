"""`slipstream init MODEL`: looks at a trained model and at this machine, and writes a spec to start from.

`source` tells what was named, `inspect` looks into it (in its framework's environment, as a process of its own),
`machine` at the hardware, `compose` writes the spec and the data function, and `command` joins them.
"""
