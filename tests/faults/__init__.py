"""What is done to files and processes on purpose, and what must come of it: `make faults`."""
