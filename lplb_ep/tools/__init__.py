"""What the command line offers: replay, placements, benchmarks, pictures."""
