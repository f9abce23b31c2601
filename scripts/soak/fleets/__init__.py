"""The parts of `soak.fleet`: the processes, and the devices that are withdrawn."""
