"""Random damage to small inputs, for every reader: `make fuzz`."""
