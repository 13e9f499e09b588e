"""`slipstream init MODEL`: inspects a trained model and this machine, and writes a spec to start from.

`source` determines what was named, `inspect` inspects it (in its framework's environment, in a separate process),
`machine` inspects the hardware, `compose` writes the spec and the data function, and `command` joins them.
"""
