"""The parts of the command line: replay, placements, benchmarks, pictures."""
